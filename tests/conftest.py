"""What the tests share: tiny models with random weights, ours and those of transformers, batches
for them, and a small project on disk."""

import json
import os
import re
import sys
from pathlib import Path

# As in the programs, before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
from data import Prompt  # noqa: E402
from model import AUDIO, adapter_length  # noqa: E402

ENCODER = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    conv_depthwise_kernel_size=7,
    left_max_position_embeddings=12,
    right_max_position_embeddings=3,
)
PLAIN = Prompt("plain", [], "\n", [], 0)  # of the tokenizers here
LLM = dict(
    vocab_size=211,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=7,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
FAMILIES = {
    "qwen2": dict(
        tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)
    ),
    "qwen2 untied": dict(tie_word_embeddings=False),
    "qwen3": dict(tie_word_embeddings=True, head_dim=16),
    "llama": dict(tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama untied": dict(
        tie_word_embeddings=False, attention_bias=True, rms_norm_eps=1e-5, num_key_value_heads=6
    ),
}
FRAMES = (61, 1, 34, 7)  # of the recordings of a batch
BEFORE = (2, 0, 3, 1)  # tokens before the audio
ANSWERS = (5, 1, 2, 9)  # tokens of the answers, behind two of an instruction
WORDS = "one two three four five six".split()
ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def pytest_configure():
    # The tests are about the CPU, but for those of test_cuda.py.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- Models


def randomise(module, seed=0):
    """Every parameter random, norm gains and biases too, so that a layer that ignores one cannot
    pass. The scale keeps activations near 1."""
    device = next(module.parameters()).device
    generator = torch.Generator("cuda" if device.type == "cuda" else "cpu").manual_seed(seed)
    for name, p in module.named_parameters():
        scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.3
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        noise = torch.randn(p.shape, generator=generator, device=generator.device)
        p.data = (centre + scale * noise).to(device)
    return module.eval()


def peer_encoder(**config):
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    return randomise(Wav2Vec2BertModel(Wav2Vec2BertConfig(**{**ENCODER, **config})))


def peer_llm(family, **config):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family.split()[0], **{**LLM, **FAMILIES[family], **config})
    return randomise(AutoModelForCausalLM.from_config(config))


def tiny_encoder(kernels=model.Kernels(), **config):  # noqa: B008  (frozen)
    config = model.EncoderConfig(**{**ENCODER, **config})
    return randomise(model.SpeechEncoder(config, kernels=kernels))


def tiny_llm(family="qwen2", kernels=model.Kernels(), **config):  # noqa: B008  (frozen)
    raw = {"model_type": family.split()[0], **LLM, **FAMILIES[family], **config}
    return randomise(model.LLM(model.LLMConfig.from_dict(raw), kernels=kernels))


def tiny_speech_lm(family="qwen2", kernels=model.Kernels(), **llm_config):  # noqa: B008  (frozen)
    llm = tiny_llm(family, kernels, **llm_config)
    config = model.AdapterConfig(**ENCODER, output_size=llm.config.hidden_size)
    adapter = model.LengthAdapter(config, kernels=kernels)
    return randomise(model.SpeechLM(tiny_encoder(kernels), adapter, llm))


def save_base(module, directory):
    """Writes a pretrained encoder's or LLM's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    # Weights that are mapped into memory from there must not be written over.
    save_file(state, directory / "new.safetensors", metadata={"format": "pt"})
    (directory / "new.safetensors").rename(directory / "model.safetensors")
    config = module.config.to_dict()
    (directory / "config.json").write_text(json.dumps(config))
    if "eos_token_id" in config:
        ends = {"eos_token_id": config["eos_token_id"]}
        (directory / "generation_config.json").write_text(json.dumps(ends))


# --- Batches


def packed(x, lengths):
    """The first `lengths` positions of each line of x (B, T, ...), end to end (N, ...)."""
    return torch.cat([line[:n] for line, n in zip(x, lengths, strict=True)])


def speech_batch(speech_lm, frames=FRAMES, before=BEFORE, answers=ANSWERS):
    """A batch of [tokens][audio][two tokens of an instruction][answer], as SpeechLM takes it:
    features, lengths, ids, ids_lengths, targets."""
    ids, lengths, targets = [], [], []
    for f, b, a in zip(frames, before, answers, strict=True):
        audio = adapter_length(f, speech_lm.adapter.config)
        sequence = torch.randint(8, 211, (b,)).tolist() + [AUDIO] * audio
        sequence += torch.randint(8, 211, (2 + a,)).tolist()
        ids += sequence
        lengths.append(len(sequence))
        targets += range(len(ids) - a, len(ids))
    features = torch.randn(sum(frames), 160)
    targets = torch.tensor(targets, dtype=torch.long)
    return features, list(frames), torch.tensor(ids), lengths, targets


def single_batches(batch, answers=ANSWERS):
    """The sequences of a batch, each as a batch of its own."""
    features, lengths, ids, ids_lengths, _ = batch
    parts = zip(features.split(lengths), ids.split(ids_lengths), answers, strict=True)
    batches = []
    for x, sequence, n in parts:
        targets = torch.arange(len(sequence) - n, len(sequence))
        batches.append((x, [len(x)], sequence, [len(sequence)], targets))
    return batches


def without_answers(ids, ids_lengths, answers=ANSWERS, instruction=2):
    """The sequences of a batch up to the answer, ids and lengths; or, with instruction=0, up to the
    instruction."""
    lengths = [n - a - 2 + instruction for n, a in zip(ids_lengths, answers, strict=True)]
    return packed(ids.split(ids_lengths), lengths), lengths


def place(speech_lm, device="cpu", dtype=torch.float32, compute_dtype=None):
    """Puts the model on a device, its weights in a dtype and its products in another."""
    speech_lm.to(device, dtype)
    for part in speech_lm.children():
        part.compute_dtype = compute_dtype or dtype
    return speech_lm


def move(batch, device):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in batch]


# --- What is checked


def relative_error(ours, theirs):
    ours, theirs = ours.float(), theirs.float()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gradients(module):
    """A copy of the gradients of all parameters that have one, by their names."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


class Shapes(TorchDispatchMode):
    """Records the shapes and devices of every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.shapes, self.devices, self.on_cpu = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
                self.devices.add(tensor.device.type)
                if tensor.device.type == "cpu":
                    self.on_cpu.add(tuple(tensor.shape))
        return out


def refused(message, call, *args, kind=model.UserError):
    """Checks that the call raises an error of one line that is safe to print, and returns it."""
    with pytest.raises(kind, match=message) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text and not ESCAPES.search(text) and len(text) <= 2003
    return text


# --- A project on disk


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def make_project(directory, special_tokens=(), end=0):
    """Writes a random tiny encoder and LLM, a tokenizer, and manifests of tones, where each word
    has its pitch. Returns the directory."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(list(special_tokens))
    save_base(tiny_encoder(), directory / "encoder")
    llm = tiny_llm(vocab_size=tokenizer.get_vocab_size(), eos_token_id=end)
    save_base(llm, directory / "llm")
    tokenizer.save(str(directory / "llm" / "tokenizer.json"))
    random = np.random.default_rng(0)
    write_tones(directory, "train", 40, random)
    write_tones(directory, "dev", 10, random)
    return directory


def make_tokenizer():
    """A byte-level BPE of a few merges, with an end token as its first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    return tokenizer


def write_tones(directory, split, count, random):
    """A manifest of recordings of one to three tones, a quarter of a second each."""
    time = np.arange(4000) / 16000
    with open(directory / f"{split}.jsonl", "w", encoding="utf-8") as manifest:
        for i in range(count):
            words = random.integers(0, 6, random.integers(1, 4))
            tones = [0.3 * np.sin(2 * np.pi * (200 + 150 * word) * time) for word in words]
            soundfile.write(directory / f"{split}{i}.wav", np.concatenate(tones), 16000)
            example = {
                "audio": f"{split}{i}.wav",
                "duration": len(words) / 4,
                "text": " ".join(WORDS[word] for word in words),
                "task": "asr",
                "corpus": "tones",
                "licence": "CC0-1.0",
            }
            manifest.write(json.dumps(example) + "\n")
