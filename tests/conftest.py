"""Shared by the tests: tiny configurations, and the peer (transformers) with every weight random."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure():
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests are about the CPU, but for those of test_cuda.py


ENCODER = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
               conv_depthwise_kernel_size=7, left_max_position_embeddings=12, right_max_position_embeddings=3)
LLM = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
           num_key_value_heads=2, max_position_embeddings=512, pad_token_id=None, bos_token_id=None, eos_token_id=7)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
FAMILIES = {
    "qwen2": dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen2 untied": dict(tie_word_embeddings=False),
    "qwen3": dict(tie_word_embeddings=True, head_dim=16),
    "llama": dict(tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama untied": dict(tie_word_embeddings=False, attention_bias=True, rms_norm_eps=1e-5, num_key_value_heads=6),
}


def randomise(module, seed=0):
    """Every parameter random, norm gains and biases too, so that a layer that ignores one cannot pass."""
    device = "cuda" if next(module.parameters()).is_cuda else None
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    for name, p in module.named_parameters():
        scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.3  # keeps activations near 1
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.data = around + scale * torch.randn(p.shape, generator=generator, device=device)
    return module.eval()


def peer_encoder(**config):
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel
    return randomise(Wav2Vec2BertModel(Wav2Vec2BertConfig(**{**ENCODER, **config})))


def peer_llm(family, **config):
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(family.split()[0], **{**LLM, **FAMILIES[family], **config})
    return randomise(AutoModelForCausalLM.from_config(config))


def relative_error(ours, theirs):
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


WORDS = "one two three four five six".split()


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def make_project(directory):
    """Writes a random tiny encoder and LLM, a tokenizer, and manifests of tones: each word has its pitch."""
    import json

    import numpy as np
    import soundfile
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    import model
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    randomise(model.SpeechEncoder(model.EncoderConfig(**ENCODER))).save_pretrained(directory / "encoder")
    raw = {"model_type": "qwen2", **LLM, **FAMILIES["qwen2"], "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0}
    randomise(model.LLM(model.LLMConfig.from_dict(raw))).save_pretrained(directory / "llm")
    tokenizer.save(str(directory / "llm" / "tokenizer.json"))
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("dev", 10)):
        with open(directory / f"{split}.jsonl", "w", encoding="utf-8") as manifest:
            for i in range(count):
                said = random.integers(0, 6, random.integers(1, 4))
                wave = np.concatenate([0.3 * np.sin(2 * np.pi * (200 + 150 * w) * np.arange(4000) / 16000) for w in said])
                soundfile.write(directory / f"{split}{i}.wav", wave, 16000)
                row = {"audio": f"{split}{i}.wav", "duration": len(wave) / 16000, "text": " ".join(WORDS[w] for w in said),
                       "task": "asr", "corpus": "tones", "licence": "CC0-1.0"}
                manifest.write(json.dumps(row) + "\n")
    return directory
