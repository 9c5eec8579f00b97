"""model.py against transformers on the same random weights, and against itself: packing, batching, caching, compiling."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ENCODER, FAMILIES, LLM as TINY_LLM, peer_encoder, peer_llm, randomise, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import (AUDIO, AdapterConfig, EncoderConfig, LengthAdapter, LLM, LLMConfig, SpeechEncoder, SpeechLM,
                   adapter_length, add_lora, decode_step, generate, merged_state, new_cache, prefill, sample, span_mask)
from prepare import compiled
from prepare.errors import CheckpointError
from prepare.kernels import Spread
from prepare.reference import load_reference, save_reference

ROOT = Path(__file__).resolve().parent.parent


def tiny_llm(family="qwen2", **config):
    raw = {"model_type": family.split()[0], **TINY_LLM, **FAMILIES[family], **config}
    return randomise(LLM(LLMConfig.from_dict(raw)))


def tiny_speech_lm(family="qwen2", seed=0, **llm_config):
    encoder, llm = EncoderConfig(**ENCODER), tiny_llm(family, **llm_config)
    adapter = AdapterConfig(**ENCODER, output_size=llm.config.hidden_size)
    return randomise(SpeechLM(SpeechEncoder(encoder), LengthAdapter(adapter), llm), seed)


def packed(x, lengths):
    """The first `lengths` positions of each row of x (B, T, ...), end to end (N, ...)."""
    return torch.cat([row[:n] for row, n in zip(x, lengths)])


def speech_batch(speech_lm, frames=(61, 1, 34, 7), prompt=(2, 0, 3, 1), answer=(5, 1, 2, 9)):
    """A batch of rows [prompt][audio][two instruction tokens][answer]: features, lengths, ids, ids_lengths, targets."""
    rows, targets = [], []
    for f, p, a in zip(frames, prompt, answer):
        before = torch.randint(8, 211, (p,)).tolist() + [AUDIO] * adapter_length(f, speech_lm.adapter.config)
        rows.append(before + torch.randint(8, 211, (2 + a,)).tolist())
        end = sum(map(len, rows))
        targets += range(end - a, end)
    return torch.randn(sum(frames), 160), list(frames), torch.tensor(sum(rows, [])), list(map(len, rows)), torch.tensor(targets)


def begins(speech_lm, ids, lengths, answer=(5, 1, 2, 9), instruction=2):
    """The rows of a batch up to the answer, or without the two instruction tokens: ids and lengths again."""
    lengths_before = [n - a - 2 + instruction for n, a in zip(lengths, answer)]
    return packed(ids.split(lengths), lengths_before), lengths_before


class Shapes(TorchDispatchMode):
    """Records the shapes and devices of every tensor any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen, self.devices = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.seen |= {tuple(t.shape) for t in made}
        self.devices |= {t.device.type for t in made}
        return out


# ---------------------------------------------------------------------------------------------------------- exactness


@torch.no_grad()
def test_encoder_equals_peer_row_by_row(tmp_path):
    peer = peer_encoder()
    peer.save_pretrained(tmp_path)
    ours = SpeechEncoder.from_pretrained(tmp_path)
    features, lengths = torch.randn(106, 160), [70, 33, 1, 2]
    hidden = ours(features, lengths)
    for x, row in zip(features.split(lengths), hidden.split(lengths)):
        assert relative_error(row, peer(x[None]).last_hidden_state[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True])
def test_encoder_of_a_ctc_finetune(tmp_path, adapter):
    """A fine-tune's keys have a prefix; its head and its own adapter are left out, the encoder is taken as it is."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForCTC
    config = dict(ENCODER, vocab_size=30, add_adapter=adapter, use_intermediate_ffn_before_adapter=adapter,
                  mask_time_prob=0.0)
    peer = randomise(Wav2Vec2BertForCTC(Wav2Vec2BertConfig(**config)))
    peer.save_pretrained(tmp_path)
    assert any(key.startswith("wav2vec2_bert.") for key in peer.state_dict())
    features = torch.randn(2, 40, 160)
    w = peer.wav2vec2_bert
    theirs = w.encoder(w.feature_projection(features)[0]).last_hidden_state
    hidden = SpeechEncoder.from_pretrained(tmp_path)(features.flatten(0, 1), [40, 40])
    assert relative_error(hidden, theirs.flatten(0, 1)) < 1e-5


@torch.no_grad()
def test_no_position_table_per_query_key_pair():
    """The relative-position term is a (queries, 16) product, spread: nothing has query x key x head_dim elements."""
    encoder = randomise(SpeechEncoder(EncoderConfig(**{**ENCODER, "num_hidden_layers": 1, "hidden_size": 64})))
    with Shapes() as shapes:
        encoder(torch.randn(400, 160), [400])
    assert max(math.prod(s) for s in shapes.seen) <= 4 * 400 * 400  # heads x queries x keys; head_dim is 16


@pytest.mark.parametrize("left, right", [(64, 8), (12, 3), (0, 0), (0, 5), (7, 0)])
def test_biases_spread_over_the_keys(left, right):
    """Of any stretch of queries, at the row's ends and far from them: what a lookup for every key gives, with gradients."""
    for i, m, n in ((0, 1, 1), (0, 5, 5), (3, 1, 4), (0, 192, 400), (192, 192, 570), (384, 186, 570), (100, 50, 150), (0, 300, 300)):
        bias = torch.randn(3, m, left + 1 + right, dtype=torch.float64, requires_grad=True)
        places = (torch.arange(n) - i - torch.arange(m)[:, None]).clamp(-left, right) + left
        slow, ours = bias.gather(-1, places.expand(3, -1, -1)), Spread.apply(bias, i, n, left)
        assert torch.equal(ours, slow)
        grad = torch.randn_like(slow)
        torch.testing.assert_close(*(torch.autograd.grad(y, bias, grad) for y in (ours, slow)))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 3, 2), (3, 3, 2), (1, 8, 8), (2, 3, 3)])
def test_adapter_equals_peer_unpadded(shape):
    layers, kernel, stride = shape
    peer = peer_encoder(add_adapter=True, num_adapter_layers=layers, adapter_kernel_size=kernel, adapter_stride=stride)
    config = AdapterConfig(**ENCODER, output_size=48, num_adapter_layers=layers, adapter_kernel_size=kernel,
                           adapter_stride=stride)
    ours = randomise(LengthAdapter(config))
    ours.layers.load_state_dict(peer.adapter.layers.state_dict(), strict=True)
    for n in range(1, 30):
        x = torch.randn(1, n, 32)
        out, lengths = ours(x[0], [n])
        assert [len(out)] == lengths == [adapter_length(n, config)] and len(out) >= 1
        assert lengths == [peer._get_feat_extract_output_lengths(torch.tensor(n)).item()]
        assert relative_error(out, ours.enc_to_dec_proj(peer.adapter(x))[0]) < 1e-5


@torch.no_grad()
def test_adapter_reads_nothing_past_a_rows_end():
    """Where the peer leaks padding into the last frame of a row, at every length modulo the stride of 4."""
    for layers, kernel, stride in [(2, 3, 2), (1, 8, 8), (2, 5, 2), (1, 7, 2)]:
        config = AdapterConfig(**ENCODER, output_size=48, num_adapter_layers=layers, adapter_kernel_size=kernel,
                               adapter_stride=stride)
        adapter, lengths = randomise(LengthAdapter(config)), list(range(1, 14))
        x = torch.randn(sum(lengths), 32)
        out, out_lengths = adapter(x, lengths)
        loud = torch.cat([row if n % 2 else 1e3 * torch.randn(row.shape) for n, row in zip(lengths, x.split(lengths))])
        again, _ = adapter(loud, lengths)  # every second row is another one
        for n, row, one, two in zip(lengths, x.split(lengths), out.split(out_lengths), again.split(out_lengths)):
            alone, _ = adapter(row, [n])
            torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-5)
            if n % 2:
                torch.testing.assert_close(two, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_llm_equals_peer(tmp_path, family):
    peer = peer_llm(family)
    peer.save_pretrained(tmp_path)
    ours, ids, lengths = LLM.from_pretrained(tmp_path), torch.randint(0, 211, (3, 200)), [200, 131, 1]
    assert relative_error(ours(packed(ids, lengths), lengths), packed(peer(ids).logits, lengths)) < 1e-5
    assert hasattr(ours, "lm_head") == ("untied" in family)


@torch.no_grad()
def test_llm_sharded_checkpoint(tmp_path):
    peer = peer_llm("qwen2")
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    ids = torch.randint(0, 211, (1, 30))
    assert relative_error(LLM.from_pretrained(tmp_path)(ids[0], [30]), peer(ids).logits[0]) < 1e-5
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="index.json: names the shard 'model-00002-of-.*download the missing"):
        LLM.from_pretrained(tmp_path)


# Fields of the real config.json files that decide the forward pass, in the form they have on the Hub.
REAL_CONFIGS = {
    "Qwen2.5-1.5B": (dict(model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                          num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, hidden_act="silu",
                          max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=1000000.0,
                          sliding_window=131072, use_sliding_window=False, max_window_layers=28,
                          tie_word_embeddings=True, eos_token_id=151643), 1_543_714_304),
    "Qwen3-1.7B": (dict(model_type="qwen3", vocab_size=151936, hidden_size=2048, intermediate_size=6144, head_dim=128,
                        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, hidden_act="silu",
                        max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None,
                        sliding_window=None, use_sliding_window=False, max_window_layers=28, attention_bias=False,
                        tie_word_embeddings=True, eos_token_id=151645), 1_720_574_976),
    "Llama-3.2-1B": (dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, head_dim=64,
                          num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, hidden_act="silu",
                          max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
                          rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                                            original_max_position_embeddings=8192, rope_type="llama3"),
                          attention_bias=False, mlp_bias=False, tie_word_embeddings=True, eos_token_id=128001),
                     1_235_814_400),
    "SmolLM2-1.7B": (dict(model_type="llama", vocab_size=49152, hidden_size=2048, intermediate_size=8192,
                          num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32, hidden_act="silu",
                          max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=130000, rope_scaling=None,
                          attention_bias=False, mlp_bias=False, tie_word_embeddings=True, eos_token_id=0),
                     1_711_376_384),
    "EuroLLM-1.7B": (dict(model_type="llama", vocab_size=128000, hidden_size=2048, intermediate_size=5632,
                          num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=8, hidden_act="silu",
                          max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
                          attention_bias=False, mlp_bias=False, tie_word_embeddings=False, eos_token_id=4),
                     1_656_850_432),
}


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_real_configurations_have_the_published_size(name):
    from transformers import AutoConfig, AutoModelForCausalLM
    raw, parameters = REAL_CONFIGS[name]
    with torch.device("meta"):
        ours = LLM(LLMConfig.from_dict(raw))
        config = AutoConfig.for_model(**raw)
        peer = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(p.numel() for p in peer.parameters()) == parameters
    names = {name for name, _ in peer.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == names - ({"lm_head.weight"} if raw["tie_word_embeddings"] else set())
    positions = torch.arange(0, raw["max_position_embeddings"], 97)[None]
    from transformers.models.auto.modeling_auto import MODEL_MAPPING
    rotary = sys.modules[MODEL_MAPPING[type(config)].__module__]
    rotary = next(getattr(rotary, n) for n in dir(rotary) if n.endswith("RotaryEmbedding"))(config)
    for mine, theirs in zip(model.rope(positions[0], ours.config), rotary(torch.zeros(1), positions)):
        torch.testing.assert_close(mine[:, 0], theirs[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_close_to_float32(tmp_path, family):
    speech_lm = tiny_speech_lm(family)
    save_reference(speech_lm, tmp_path)
    features, lengths, ids, ids_lengths, _ = speech_batch(speech_lm)
    ids = ids.clamp(min=0)
    hidden = speech_lm.encoder(features, lengths)
    audio, _ = speech_lm.adapter(hidden, lengths)
    for dtype, compute in [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]:
        ours = load_reference(tmp_path, dtype, compute)
        assert {p.dtype for p in ours.parameters()} == {dtype}
        hidden16, (audio16, _) = ours.encoder(features, lengths), ours.adapter(hidden, lengths)
        logits = ours.llm(ids, ids_lengths)
        assert hidden16.dtype == audio16.dtype == ours.llm.embed(ids).dtype == compute and logits.dtype == torch.float32
        for approximate, exact in [(hidden16, hidden), (audio16, audio), (logits, speech_lm.llm(ids, ids_lengths))]:
            assert 1e-4 < (approximate.float() - exact).norm() / exact.norm() < 2e-2
    with pytest.raises(ValueError, match="precision torch.float16 is not supported; choose torch.float32 or"):
        load_reference(tmp_path, torch.float16)


def test_norms_and_loss_are_float32_under_bfloat16(monkeypatch):
    x = (torch.randn(4, 2000) * 30 + 500).bfloat16()
    for norm, exact in [(model.LayerNorm(2000), lambda y: (y - y.mean(-1, keepdim=True)) / y.std(-1, keepdim=True, correction=0)),
                        (model.RMSNorm(2000, 1e-6), lambda y: y / y.square().mean(-1, keepdim=True).sqrt())]:
        norm = randomise(norm)
        expected = exact(x.double()) * norm.weight + getattr(norm, "bias", 0.0)
        torch.testing.assert_close(norm(x).double(), expected.bfloat16().double(), rtol=2**-7, atol=2**-9)
    llm = tiny_llm()
    llm.compute_dtype = torch.bfloat16
    hidden, labels = llm.hidden(llm.embed(torch.randint(0, 211, (9,))), [9]), torch.randint(0, 211, (9,))
    loss = model.AnswerLoss.apply(hidden, llm.head, labels)
    expected = F.cross_entropy(llm.logits(hidden).double(), labels, reduction="sum")  # in bfloat16 it would be 1e-3 off
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


def reference_logits(peer, proj, llm, features, mask, ids, ids_mask):
    """The reference system's forward: audio right-padded, then text left-padded, one arange of positions over all."""
    frames = peer._get_feature_vector_attention_mask
    audio = peer(features, attention_mask=mask).last_hidden_state
    audio_mask = frames(audio.shape[1], mask, add_adapter=True).long()
    x = torch.cat([F.linear(audio, proj.weight, proj.bias), llm.get_input_embeddings()(ids)], 1)
    return llm(inputs_embeds=x, attention_mask=torch.cat([audio_mask, ids_mask], 1)).logits


@torch.no_grad()
def test_equals_the_reference_composite(tmp_path):
    """Two rows of equal audio (16 frames of 20 ms, a multiple of 4, where the peer does not leak) and equal text: the
    reference's layout has no holes there, and logits and loss agree. Where ours differs on purpose: (a) with unequal
    rows the reference leaves holes between audio and text, so its rows depend on batch mates; (b) its loss drops
    the first target token of the longest row, ours has all of them.
    """
    peer, llm = peer_encoder(add_adapter=True, num_adapter_layers=2), peer_llm("qwen2")
    proj = randomise(torch.nn.Linear(32, 48))
    state = {"encoder." + k: v for k, v in peer.state_dict().items()}
    state |= {"decoder." + k: v for k, v in llm.state_dict().items()}
    state |= {"enc_to_dec_proj." + k: v for k, v in proj.state_dict().items()}
    from safetensors.torch import save_file
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    assert "decoder.lm_head.weight" in state  # the tied copy, which must be recognised
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "speech_lm", "tie_word_embeddings": False,
        "encoder": peer.config.to_dict(), "decoder": llm.config.to_dict()}))
    ours = load_reference(tmp_path)

    features, lengths, answer = torch.randn(2, 16, 160), [16, 16], 6
    text = torch.randint(8, 211, (2, 3 + answer))
    ones = torch.ones(2, 16).long()
    theirs = reference_logits(peer, proj, llm, features, ones, text, torch.ones_like(text))
    ids = torch.cat([torch.full((2, 4), AUDIO), text], 1).flatten()
    audio, _ = ours.encode(features.flatten(0, 1), lengths)
    logits = ours.llm.logits(ours.llm.hidden(ours.embed(ids, audio), [13, 13]))
    assert relative_error(logits, theirs.flatten(0, 1)) < 1e-5
    targets = torch.tensor([b * 13 + t for b in range(2) for t in range(7, 13)])
    loss, count = ours(features.flatten(0, 1), lengths, ids, [13, 13], targets)
    per_token = F.cross_entropy(theirs[:, 6:-1].flatten(0, 1), text[:, 3:].flatten(), reduction="none").view(2, answer)
    assert count == 12
    torch.testing.assert_close(loss, per_token.sum(), rtol=1e-5, atol=1e-4)
    state["decoder.lm_head.weight"] = torch.randn(211, 48)
    save_file(state | {"decoder.model.embed_tokens.weight": torch.randn(211, 48)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight differs from the embedding"):
        load_reference(tmp_path)
    # (b) what the reference trains on: logits cut to the label length, then shifted by one once more
    cut = theirs[:, -answer:]
    dropped = F.cross_entropy(cut[:, :-1].flatten(0, 1), text[:, 4:].flatten(), reduction="sum")
    torch.testing.assert_close(dropped, per_token[:, 1:].sum(), rtol=1e-5, atol=1e-4)
    assert (loss - dropped).item() == pytest.approx(per_token[:, 0].sum().item(), rel=1e-3)
    # (a) a shorter second row, padded in the middle as the reference does, is not what the row is alone
    text_mask = torch.ones_like(text)
    text_mask[1, :2] = 0
    mask = ones.clone()
    mask[1, 8:] = 0
    holes = reference_logits(peer, proj, llm, features, mask, text, text_mask)[1, -answer:]
    alone = reference_logits(peer, proj, llm, features[1:, :8], ones[1:, :8], text[1:, 2:], text_mask[1:, 2:])[0, -answer:]
    assert relative_error(holes, alone) > 1e-2
    row = torch.cat([torch.full((2,), AUDIO), text[1, 2:]])
    audio, _ = ours.encode(features[1, :8], [8])
    assert relative_error(ours.llm.logits(ours.llm.hidden(ours.embed(row, audio), [len(row)]))[-answer:], alone) < 1e-5


# ------------------------------------------------------------------------- packing, batching, caching, compiling, meta


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_rows(family):
    speech_lm = tiny_speech_lm(family)
    features, lengths, ids, ids_lengths, targets = speech_batch(speech_lm)
    loss, count = speech_lm(features, lengths, ids, ids_lengths, targets)
    rows = list(zip(features.split(lengths), ids.split(ids_lengths), (5, 1, 2, 9)))
    alone = [speech_lm(x, [len(x)], row, [len(row)], torch.arange(len(row) - n, len(row)))[0] for x, row, n in rows]
    torch.testing.assert_close(loss, sum(alone), rtol=1e-5, atol=1e-4)
    assert count == len(targets) == 17
    for b, x in enumerate(features.split(lengths)):  # a row of NaN touches no other
        kept = x.clone()
        x.fill_(float("nan"))
        others = torch.tensor([t for t in targets.tolist() if not sum(ids_lengths[:b]) <= t < sum(ids_lengths[:b + 1])])
        loss, _ = speech_lm(features, lengths, ids, ids_lengths, others)
        torch.testing.assert_close(loss, sum(alone) - alone[b], rtol=1e-5, atol=1e-4)
        x.copy_(kept)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_batch_are_the_sum_of_its_rows(checkpointing):
    speech_lm = tiny_speech_lm("qwen3")
    speech_lm.encoder.checkpointing = speech_lm.llm.checkpointing = checkpointing
    features, lengths, ids, ids_lengths, targets = speech_batch(speech_lm)
    speech_lm(features, lengths, ids, ids_lengths, targets)[0].backward()
    together = {name: p.grad.clone() for name, p in speech_lm.named_parameters() if p.grad is not None}
    speech_lm.zero_grad()
    for x, row, n in zip(features.split(lengths), ids.split(ids_lengths), (5, 1, 2, 9)):
        speech_lm(x, [len(x)], row, [len(row)], torch.arange(len(row) - n, len(row)))[0].backward()
    alone = {name: p.grad for name, p in speech_lm.named_parameters() if p.grad is not None}
    assert any("distance_embedding" in name for name in alone) and any("depthwise_conv" in name for name in alone)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_linear_layers_see_no_padding(monkeypatch):
    """Every product with a weight matrix has as many rows as the batch has frames or tokens."""
    speech_lm, seen, linear = tiny_speech_lm(), set(), F.linear
    features, lengths, ids, ids_lengths, targets = speech_batch(speech_lm)
    monkeypatch.setattr(F, "linear", lambda x, *weights: seen.add(tuple(x.shape[:-1])) or linear(x, *weights))
    speech_lm(features, lengths, ids, ids_lengths, targets)
    half = sum((n + 1) // 2 for n in lengths)
    assert seen == {(sum(lengths),), (half,), (sum(adapter_length(n, speech_lm.adapter.config) for n in lengths),),
                    (sum(ids_lengths),), (len(targets),)}
    seen.clear()
    speech_lm.generate(ids, ids_lengths, features, lengths, max_new_tokens=2)
    assert (len(ids),) in seen and all(sum(shape) in (sum(lengths), half, 28, len(ids), 4) for shape in seen)


@pytest.mark.parametrize("queries", [1, 7, 192])
@pytest.mark.parametrize("causal, heads, reach", [(True, 2, None), (False, 6, None), (False, 6, (12, 3)), (False, 6, (0, 0))])
def test_attention_in_pieces_equals_the_whole(monkeypatch, queries, causal, heads, reach):
    """However many queries are taken at a time, values and gradients are those of attention with its full bias."""
    monkeypatch.setattr(model, "QUERIES", queries)
    lengths = [40, 1, 2, 15]
    rows, N = model.Rows(lengths, "cpu", causal, reach=reach), sum(lengths)
    sizes = [(N, 6, 16), (N, heads, 16), (N, heads, 16)] + ([] if reach is None else [(N, 6, sum(reach) + 1)])
    given, grad = [torch.randn(size, requires_grad=True) for size in sizes], torch.randn(N, 6, 16)
    whole = []
    for q, k, v, *bias in zip(*(x.split(lengths) for x in given)):
        mask = None
        if bias:
            at = torch.arange(len(q))
            far = (at - at[:, None]).clamp(-reach[0], reach[1]) + reach[0]
            mask = bias[0].transpose(0, 1).gather(-1, far.expand(6, -1, -1))[None]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        whole.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=heads < 6)[0].transpose(0, 1))
    ours, whole = model.attend(*given[:3], rows, *given[3:]), torch.cat(whole)
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(y, given, grad) for y in (ours, whole)), rtol=1e-4, atol=1e-5)


def flexed(q, k, v, rows, bias=None):
    """What CUDA computes, by the slow form of flex_attention."""
    from torch.nn.attention.flex_attention import flex_attention
    rows.mask = compiled.document_mask(rows.row, rows.causal)
    return compiled.attend_flex(flex_attention, q, k, v, rows, bias)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_gradients_of_the_kernel_of_cuda(monkeypatch):
    """Of queries, keys, values and biases, by the slow form, which has a backward pass on the CPU though it is refused
    there; and that kernel traces as a whole, without a device, once for all batches that fill up to the same size."""
    from torch.nn.attention import flex_attention
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(compiled, "BUCKET", 128)
    for causal, heads, reach in [(True, 2, None), (False, 6, None), (False, 6, (12, 3))]:
        counted = CompileCounterWithBackend("aot_eager")
        traced = torch.compile(flex_attention.flex_attention, fullgraph=True, dynamic=False, backend=counted)
        for lengths in ([61, 1, 34, 7], [90, 3], [128]):
            rows, N = model.Rows(lengths, "cpu", causal, reach=reach), sum(lengths)
            shapes = [(N, 6, 16), (N, heads, 16), (N, heads, 16)] + [(N, 6, 16)] * (reach is not None)
            given, grad = [torch.randn(shape, requires_grad=True) for shape in shapes], torch.randn(N, 6, 16)
            ours, plain = (torch.autograd.grad(run(*given[:3], rows, *given[3:]), given, grad) for run in (flexed, model.attend))
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
            rows = model.Rows(lengths, "meta", causal, reach=reach)
            given = [x.detach().to("meta").requires_grad_() for x in given]
            rows.mask = compiled.document_mask(rows.row, causal)
            y = compiled.attend_flex(traced, *given[:3], rows, *given[3:])
            grads = torch.autograd.grad(y, given, grad.to("meta"))
            assert y.shape == grad.shape and [tuple(g.shape) for g in grads] == shapes
        assert counted.frame_count == 1


def test_blocks_of_the_mask():
    """Those that the slow way of making a mask finds, which looks at every pair of positions."""
    from torch.nn.attention.flex_attention import create_block_mask
    for lengths in ([1], [512], [127, 1, 128, 300, 5, 700], [300, 257, 1, 2, 60], [7] * 90):
        for causal in (False, True):
            row = model.Rows(lengths, "cpu").row
            ours, size = compiled.document_mask(row, causal), compiled.bucket(len(row))
            whole = F.pad(row, (0, size - len(row)), value=len(row))
            slow = create_block_mask(lambda b, h, i, j: (whole[i] == whole[j]) & (~torch.tensor(causal) | (j <= i)), None, None,
                                     size, size, "cpu")
            assert ours.seq_lengths == slow.seq_lengths == (size, size)
            for kind in ("kv", "full_kv", "q", "full_q"):
                found = [[sorted(blocks[:n].tolist()) for n, blocks in zip(getattr(mask, f"{kind}_num_blocks")[0, 0],
                                                                           getattr(mask, f"{kind}_indices")[0, 0])]
                         for mask in (ours, slow)]
                assert found[0] == found[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_compiled_once(monkeypatch, checkpointing):
    """Where a GPU trains, layers are compiled for batches of any size, here by the compiler for the CPU."""
    speech_lm = tiny_speech_lm("qwen2", num_hidden_layers=3).train()
    for config in (speech_lm.encoder.config, speech_lm.adapter.config):
        config.layerdrop, config.conformer_conv_dropout, config.apply_spec_augment = 0.0, 0.0, False
    speech_lm.encoder.checkpointing = speech_lm.llm.checkpointing = checkpointing
    batches = [speech_batch(speech_lm), speech_batch(speech_lm, (33, 90), (1, 2), (4, 1)),
               speech_batch(speech_lm, (20, 30, 64, 5, 8), (1, 2, 3, 4, 5), (4, 1, 3, 2, 6))]

    def results():
        for batch in batches:
            speech_lm.zero_grad()
            loss, _ = speech_lm(*batch)
            loss.backward()
            yield {"loss": loss.detach()} | {name: p.grad.clone() for name, p in speech_lm.named_parameters() if p.grad is not None}

    plain = list(results())
    attend = model.attend

    def alone(q, k, v, rows, bias=None):
        rows = copy.copy(rows)
        rows.flex = None
        return attend(q, k, v, rows, bias)

    flex = torch.compiler.disable(alone)
    monkeypatch.setattr(model, "fused", lambda x: torch.is_grad_enabled())
    monkeypatch.setattr(model, "compiled_flex", lambda: flex)
    torch._dynamo.reset()
    stats, graphs = torch._dynamo.utils.counters["stats"], []
    stats.clear()
    for ours, theirs in zip(results(), plain):
        graphs.append(stats["unique_graphs"])
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4, msg=name)
    assert 0 < graphs[0] == graphs[2]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("bucket", [128, 256])
def test_the_kernel_of_cuda_equals_attention_row_by_row(monkeypatch, bucket):
    """Masks, biases and filling up of flex_attention, proven on the CPU, in isolation and in the whole model."""
    monkeypatch.setattr(compiled, "BUCKET", bucket)
    for lengths in ([61, 1, 34, 7], [128], [1], [1, 1, 127], [15, 1]):
        for causal, heads, reach in [(True, 2, None), (False, 6, None), (False, 6, (12, 3))]:
            rows = model.Rows(lengths, "cpu", causal, reach=reach)
            q = torch.randn(len(rows.row), 6, 16)
            k, v = torch.randn(2, len(rows.row), heads, 16)
            bias = None if reach is None else torch.randn(len(rows.row), 6, 16)
            torch.testing.assert_close(flexed(q, k, v, rows, bias), model.attend(q, k, v, rows, bias), rtol=1e-5, atol=1e-5)
    speech_lm = tiny_speech_lm("qwen3")
    batch = speech_batch(speech_lm)
    loss, _ = speech_lm(*batch)
    monkeypatch.setattr(model, "attend", lambda q, k, v, rows, bias=None, dropout=0.0: flexed(q, k, v, rows, bias))
    torch.testing.assert_close(speech_lm(*batch)[0], loss, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=4), dict(num_beams=3, length_penalty=0.4)])
def test_a_generated_batch_equals_its_rows(options):
    ends = list(range(60))  # many end tokens: rows end at different steps
    speech_lm = tiny_speech_lm(eos_token_id=ends)
    features, lengths, ids, ids_lengths, _ = speech_batch(speech_lm)
    ids, ids_lengths = begins(speech_lm, ids, ids_lengths)
    batch = speech_lm.generate(ids, ids_lengths, features, lengths, max_new_tokens=12, **options)
    alone = [speech_lm.generate(row, [len(row)], x, [len(x)], max_new_tokens=12, **options)[0]
             for row, x in zip(ids.split(ids_lengths), features.split(lengths))]
    assert batch == alone
    assert len({len(row) for row in batch}) > 1


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_full_forward(family):
    llm = tiny_llm(family)
    ids, lengths = torch.randint(0, 211, (3, 20)), torch.tensor([11, 6, 1])
    full = llm(ids.flatten(), [20] * 3).view(3, 20, -1)
    cache = new_cache(llm, 3, 32)
    logits = prefill(llm, llm.embed(packed(ids, lengths)), lengths.tolist(), cache)
    for step in range(9):
        torch.testing.assert_close(logits, full[torch.arange(3), lengths + step - 1], rtol=1e-4, atol=1e-4)
        logits = decode_step(llm, ids[torch.arange(3), lengths + step], lengths + step, cache)
    cache = new_cache(llm, 3, 32)  # the same rows in two unequal pieces
    prefill(llm, llm.embed(packed(ids, lengths)), lengths.tolist(), cache)
    rest = torch.cat([ids[b, n:n + more] for b, (n, more) in enumerate(zip(lengths, [9, 2, 5]))])
    logits = prefill(llm, llm.embed(rest), [9, 2, 5], cache, start=lengths)
    torch.testing.assert_close(logits, full[torch.arange(3), lengths + torch.tensor([9, 2, 5]) - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [
    dict(), dict(num_beams=2), dict(num_beams=4, length_penalty=0.0), dict(num_beams=5, length_penalty=2.0),
    dict(num_beams=3, length_penalty=-1.0)])
@pytest.mark.parametrize("eos", [[7], list(range(20, 60))])
def test_generated_ids_equal_peer(tmp_path, options, eos):
    peer = peer_llm("qwen2", eos_token_id=eos)
    peer.generation_config.eos_token_id = eos
    peer.save_pretrained(tmp_path)
    ours = LLM.from_pretrained(tmp_path)
    assert ours.config.eos_token_id == eos
    lengths = torch.tensor([9, 4, 1, 17, 12])
    ids = torch.randint(60, 211, (5, 17))
    answers = generate(ours, ours.embed(packed(ids, lengths)), lengths.tolist(), max_new_tokens=10, **options)
    for b, n in enumerate(lengths):
        theirs = peer.generate(ids[b:b + 1, :n], attention_mask=torch.ones(1, n).long(), max_new_tokens=10,
                               do_sample=False, pad_token_id=0, **options)[0, n:].tolist()
        end = next((i for i, token in enumerate(theirs) if token in eos), len(theirs))
        assert answers[b] == theirs[:end]
    if len(eos) > 1 and options.get("length_penalty", 1) <= 1:
        assert any(len(answer) < 10 for answer in answers)


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_computes_what_is_needed(monkeypatch, beams):
    """Rows that are done leave the batch, and only the filled part of the cache is read."""
    speech_lm, seen, step = tiny_speech_lm(eos_token_id=list(range(60))), [], model.decode_step
    features, lengths, ids, ids_lengths, _ = speech_batch(speech_lm)
    ids, ids_lengths = begins(speech_lm, ids, ids_lengths)
    monkeypatch.setattr(model, "decode_step", lambda llm, ids, positions, cache: seen.append(
        (len(ids), positions.max().item(), *cache[0][0].shape[::2])) or step(llm, ids, positions, cache))
    answers = speech_lm.generate(ids, ids_lengths, features, lengths, max_new_tokens=12, num_beams=beams)
    assert all(rows == held and filled == last + 1 for rows, last, held, filled in seen)
    if beams == 1:
        going = [sum(len(answer) > n for answer in answers) for n in range(len(seen))]
        assert len(set(going)) > 1 and all(n <= rows < 2 * n for n, (rows, *_) in zip(going, seen))


def test_stop_callback_prefix_and_context():
    speech_lm = tiny_speech_lm(eos_token_id=list(range(0, 90)))
    features, lengths, ids, ids_lengths, _ = speech_batch(speech_lm)
    spoken = [[] for _ in range(4)]
    answers = speech_lm.generate(*begins(speech_lm, ids, ids_lengths), features, lengths, max_new_tokens=9,
                                 on_token=lambda row, token: spoken[row].append(token))
    assert spoken == answers and len({len(a) for a in answers}) > 1 and max(max(a, default=90) for a in answers) >= 90
    assert min(min(a, default=90) for a in answers) >= 90  # the end token is not part of the answer

    # the prompt and the audio read once, then six instructions asked of the four recordings, encoder out of reach
    ids, ids_lengths = begins(speech_lm, ids, ids_lengths, instruction=0)  # prompt and audio
    prefix = speech_lm.read(ids, ids_lengths, features, lengths)
    of, sizes = [0, 3, 3, 1, 2, 0], [3, 1, 2, 3, 2, 1]
    questions = torch.randint(90, 211, (sum(sizes),))
    separately, beamed = [], []
    for q, row in zip(questions.split(sizes), of):
        whole, x = torch.cat([ids.split(ids_lengths)[row], q]), features.split(lengths)[row]
        separately += speech_lm.generate(whole, [len(whole)], x, [len(x)], max_new_tokens=9)
        beamed += speech_lm.generate(whole, [len(whole)], x, [len(x)], max_new_tokens=9, num_beams=3)
    speech_lm.encoder = speech_lm.adapter = None
    for _ in range(2):  # asking leaves the prefix as it was
        assert speech_lm.generate(questions, sizes, prefix=prefix, prefix_rows=of, max_new_tokens=9) == separately
    asked = speech_lm.generate(questions, sizes, prefix=prefix, prefix_rows=of, max_new_tokens=9, num_beams=3)
    assert asked == beamed
    assert speech_lm.generate(questions[:9], sizes[:4], prefix=prefix, max_new_tokens=9) == [
        speech_lm.generate(q, [len(q)], prefix=prefix, prefix_rows=[b], max_new_tokens=9)[0]
        for b, q in enumerate(questions.split(sizes)[:4])]
    with pytest.raises(ValueError, match="a prefix of 4 rows for 6 rows; say with prefix_rows which to continue"):
        speech_lm.generate(questions, sizes, prefix=prefix)
    with pytest.raises(ValueError, match=r"a row needs \d+ positions with its 500 new tokens, the model's context has 512"):
        speech_lm.generate(questions, sizes, prefix=prefix, prefix_rows=of, max_new_tokens=500)


def test_wrong_number_of_placeholders_is_refused():
    speech_lm = tiny_speech_lm()
    features, lengths, ids, ids_lengths, _ = speech_batch(speech_lm)
    ids[2] = 5
    with pytest.raises(ValueError, match=r"rows hold \[15, 1, 9, 2\] audio placeholders for \[16, 1, 9, 2\] audio frames"):
        speech_lm.generate(ids, ids_lengths, features, lengths)


@pytest.mark.parametrize("options, message", [
    (dict(max_new_tokens=0), "max_new_tokens 0 and num_beams 1 must be at least 1"),
    (dict(num_beams=0), "num_beams 0 must be at least 1"), (dict(temperature=-1), "temperature -1 at least 0"),
    (dict(top_p=0), "top_p 0 above 0"), (dict(num_beams=2, temperature=1.0), "beam search neither samples nor streams"),
    (dict(ids_lengths=[0, 8]), r"row lengths \[0, 8\] of 8 positions; expected at least 1 each, and as many in all"),
    (dict(ids=torch.full((8,), AUDIO)), r"rows hold \[5, 3\] audio placeholders for \[0, 0\] audio frames")])
def test_generate_refuses_what_makes_no_sense(options, message):
    speech_lm = tiny_speech_lm()
    arguments = dict(ids=torch.randint(0, 211, (8,)), ids_lengths=[5, 3])
    assert len(speech_lm.generate(**arguments, max_new_tokens=2)) == 2  # text alone will do
    with pytest.raises(ValueError, match=message):
        speech_lm.generate(**{**arguments, **options})


def test_sampling():
    from transformers import TopPLogitsWarper
    logits = torch.randn(5, 40) * 3
    for top_p in (0.2, 0.7, 0.95, 1.0):
        kept = TopPLogitsWarper(top_p)(None, logits / 0.8).softmax(-1)
        drawn = torch.zeros(5, 40)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3000):
            drawn[torch.arange(5), sample(logits, 0.8, top_p, generator)] += 1 / 3000
        assert not drawn[kept == 0].any()
        assert (drawn - kept).abs().max() < 0.05
    assert torch.equal(sample(logits, 0, 0.3, None), logits.argmax(-1))
    llm, ids = tiny_llm(), torch.randint(0, 211, (8,))
    run = [generate(llm, llm.embed(ids), [5, 3], 20, temperature=1.0,
                    generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert run[0] == run[1] != run[2]


def test_whole_path_on_the_meta_device():
    """Shapes flow from features to loss, gradients and decoding with no tensor made on another device."""
    with torch.device("meta"):
        speech_lm = tiny_speech_lm("qwen3")
    batch = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in speech_batch(speech_lm)]
    with Shapes() as made:
        for train in (False, True):
            speech_lm.train(train)
            loss, count = speech_lm(*batch)
            loss.backward()
            assert loss.shape == () and count == 17
        with torch.no_grad():
            features, lengths, ids, ids_lengths, _ = batch
            audio, _ = speech_lm.encode(features, lengths)
            cache, start = new_cache(speech_lm.llm, 4, 64), torch.tensor(ids_lengths, device="meta")
            logits = prefill(speech_lm.llm, speech_lm.embed(ids, audio), ids_lengths, cache)
            logits = decode_step(speech_lm.llm, sample(logits, 0, 1.0, None), start, cache)
            logits = prefill(speech_lm.llm, speech_lm.embed(ids), ids_lengths, cache, start)
    assert logits.shape == (4, 211) and made.devices == {"meta"}


@torch.no_grad()
def test_compiled_equals_eager():
    speech_lm = tiny_speech_lm("qwen3")
    features, lengths, ids, ids_lengths, _ = speech_batch(speech_lm)
    compiled, hidden = torch.compile(speech_lm.encoder, fullgraph=True, dynamic=False), speech_lm.encoder(features, lengths)
    torch.testing.assert_close(compiled(features, lengths), hidden, rtol=1e-4, atol=1e-4)
    llm, text, ends = speech_lm.llm, ids.clamp(min=0), torch.tensor(ids_lengths)
    torch.testing.assert_close(torch.compile(llm, fullgraph=True, dynamic=False)(text, ids_lengths),
                               llm(text, ids_lengths), rtol=1e-4, atol=1e-4)
    step, caches = torch.compile(decode_step, fullgraph=True, dynamic=False), [new_cache(llm, 4, 40) for _ in range(2)]
    for cache in caches:
        prefill(llm, llm.embed(text), ids_lengths, cache)
    for i in range(3):
        logits = [run(llm, text[4 * i:4 * i + 4], ends + i, cache) for run, cache in zip((step, decode_step), caches)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*caches, rtol=1e-4, atol=1e-4)


def test_compiled_training_step_equals_eager():
    speech_lm = tiny_speech_lm()
    speech_lm.encoder.train()  # with layerdrop and time masking it must trace; to compare, all chances are 0
    torch.compile(speech_lm.encoder, fullgraph=True, dynamic=False, backend="aot_eager")(*speech_batch(speech_lm)[:2])
    speech_lm.encoder.eval()
    batch = speech_batch(speech_lm)
    grads = []
    for run in (speech_lm, torch.compile(speech_lm, fullgraph=True, dynamic=False)):
        speech_lm.zero_grad()
        run(*batch)[0].backward()
        grads.append({name: p.grad.clone() for name, p in speech_lm.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ training


def test_one_step_moves_what_is_trained_and_nothing_else():
    for trained in (["adapter"], ["encoder", "adapter", "llm"]):
        speech_lm = tiny_speech_lm()
        speech_lm.encoder.config.layerdrop = speech_lm.encoder.config.mask_time_prob = 0.0
        for part in ("encoder", "adapter", "llm"):
            getattr(speech_lm, part).requires_grad_(part in trained).train(part in trained)
        before = {name: p.clone() for name, p in speech_lm.named_parameters()}
        loss, count = speech_lm(*speech_batch(speech_lm))
        (loss / count).backward()
        assert speech_lm.adapter.layers[0].residual_conv.weight.grad.abs().sum() > 0
        torch.optim.SGD([p for p in speech_lm.parameters() if p.requires_grad], 0.1).step()
        for name, p in speech_lm.named_parameters():
            moved = not torch.equal(p, before[name])
            # not used without time masking; and a key bias shifts all scores of a query alike: no gradient
            if name != "encoder.masked_spec_embed" and not name.endswith("linear_k.bias") or moved:
                assert moved == (name.split(".")[0] in trained), name


def test_loss_makes_no_logits_for_the_whole_batch(monkeypatch):
    speech_lm = tiny_speech_lm()
    batch = speech_batch(speech_lm)
    whole, _ = speech_lm(*batch)
    whole.backward()
    grad = speech_lm.llm.model.embed_tokens.weight.grad.clone()
    monkeypatch.setattr(model, "LOSS_CHUNK", 4)
    speech_lm.zero_grad()
    kept = set()
    with Shapes() as shapes:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(tuple(t.shape)) or t, lambda t: t):
            loss, _ = speech_lm(*batch)
        loss.backward()
    assert kept and not any(s[-1:] == (211,) for s in kept)  # logits are not kept for the backward pass
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(speech_lm.llm.model.embed_tokens.weight.grad, grad, rtol=1e-4, atol=1e-5)
    with_vocabulary = {s for s in shapes.seen if 211 in s and 48 not in s}
    assert with_vocabulary and max(math.prod(s) for s in with_vocabulary) == 4 * 211


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, dtype, frozen):
    """In several chunks, the last one short; frozen weights get no gradient, not even a computed one."""
    monkeypatch.setattr(model, "LOSS_CHUNK", 4)
    monkeypatch.setattr(model, "SOFTMAX_ROWS", {"cpu": 3})
    head, labels = torch.randn(211, 48).requires_grad_(not frozen), torch.randint(0, 211, (11,))
    ours, plain = (torch.randn(11, 48, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_() for _ in range(2))
    with Shapes() as shapes:
        loss = model.AnswerLoss.apply(ours, head, labels)
        (loss / 3).backward()
    grad, head.grad = head.grad, None
    expected = F.cross_entropy(F.linear(plain.float(), head), labels, reduction="sum")
    (expected / 3).backward()
    bounds = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=3e-2)
    torch.testing.assert_close(loss, expected, **bounds)
    torch.testing.assert_close(ours.grad.float(), plain.grad.float(), **bounds)
    assert (grad is None) == frozen == (head.grad is None)
    if not frozen:
        torch.testing.assert_close(grad, head.grad, **bounds)
        with torch.no_grad(), Shapes() as shapes:  # nor does a validation compute any
            assert model.AnswerLoss.apply(ours.detach(), head, labels) == loss
    made = [s for s in shapes.seen if s == (211, 48)]
    assert len(made) == (dtype == torch.bfloat16)  # the head in the compute dtype


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_of_the_depthwise_convolution(dtype, bound):
    """Are those of PyTorch's own, also of a row shorter than the kernel."""
    conv = randomise(model.DepthwiseConv1d(32, 32, 31, groups=32, bias=False)).to(dtype)
    for frames in (40, 3):
        x, dy, found = torch.randn(1, 32, frames + 30).to(dtype), torch.randn(1, 32, frames).to(dtype), []
        for convolve in (lambda x, w: F.conv1d(x, w, groups=32), model.Depthwise.apply):
            at, conv.weight.grad = x.clone().requires_grad_(), None
            convolve(at, conv.weight).backward(dy)
            found.append((at.grad, conv.weight.grad))
        assert all(relative_error(ours, plain) < bound for ours, plain in zip(found[1], found[0]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_computes_no_more_than_is_wanted(checkpointing):
    """Its states, all gradients and the cache are those of the whole; elsewhere its MLP does nothing."""
    llm, lengths, wanted = tiny_llm("qwen3", num_hidden_layers=3), [6, 1, 5], [2, 5, 6, 11]
    llm.checkpointing, x, found = checkpointing, torch.randn(12, 48), []
    for some in (None, wanted):
        at = x.clone().requires_grad_()
        llm.zero_grad()
        with Shapes() as shapes:
            states = llm.hidden(at, lengths, wanted=some)
            states = states[wanted] if some is None else states
            states.square().sum().backward()
        found.append((states, at.grad, *[p.grad for p in llm.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    inner = llm.config.intermediate_size
    assert (len(wanted), inner) in shapes.seen and (12, inner) in shapes.seen
    with torch.no_grad():
        caches = [new_cache(llm, 3, 6) for _ in range(2)]
        llm.hidden(x, lengths, caches[0])
        assert llm.hidden(x, lengths, caches[1], wanted=[]).shape == (0, 48)
    torch.testing.assert_close(caches[1], caches[0])


# how many dropouts with the given rate the peer's module of the same configuration applies in one forward pass
DROPOUTS = [("hidden_dropout", 1 + 3 * 2, 2), ("activation_dropout", 3 * 2, 2), ("attention_dropout", 2 * 3, 2),
            ("feat_proj_dropout", 1, 0), ("conformer_conv_dropout", 3, 2)]


@pytest.mark.parametrize("name, in_encoder, in_adapter", DROPOUTS)
def test_every_dropout_of_the_peer_is_there_and_in_training_only(monkeypatch, name, in_encoder, in_adapter):
    rates = dict.fromkeys([rate for rate, *_ in DROPOUTS], 0.0) | {name: 0.25}
    config = {**ENCODER, **rates, "layerdrop": 0.0, "mask_time_prob": 0.0}
    encoder, adapter = SpeechEncoder(EncoderConfig(**config)), LengthAdapter(AdapterConfig(**config, output_size=48))
    used, dropout = [], F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p, training: used.append(p * training) or dropout(x, p, training))
    for train in (True, False):
        for module, features, count in [(encoder, torch.randn(20, 160), in_encoder), (adapter, torch.randn(20, 32), in_adapter)]:
            used.clear()
            module.train(train)(features, [20])
            assert used.count(0.25) == count * train and set(used) <= {0.0, 0.25}


def test_attention_dropout_of_the_llm():
    llm, ids = tiny_llm(attention_dropout=0.5), torch.randint(0, 211, (30,))
    assert torch.equal(llm(ids, [30]), llm(ids, [30]))
    llm.train()
    assert not torch.equal(llm(ids, [30]), llm(ids, [30]))


def test_layerdrop_and_masking_in_training_only():
    features, lengths = torch.randn(101, 160), [60, 41]
    off = dict(ENCODER, layerdrop=0.0, mask_time_prob=0.0, conformer_conv_dropout=0.0)
    for on in (dict(layerdrop=0.5), dict(mask_time_prob=0.3), dict(mask_feature_prob=0.5), {}):
        encoder = randomise(SpeechEncoder(EncoderConfig(**{**off, **on})))
        runs = [encoder(features, lengths) for _ in range(2)]
        assert torch.equal(*runs)
        encoder.train()
        runs += [encoder(features, lengths) for _ in range(12)]
        assert all(torch.equal(runs[0], run) for run in runs) == (not on), on
    encoder.config.apply_spec_augment, encoder.config.mask_time_prob = False, 0.9
    assert torch.equal(encoder(features, lengths), runs[0])
    encoder.config.layerdrop = 1.0  # every layer dropped: the projected features come out
    torch.testing.assert_close(encoder(features, lengths), encoder.feature_projection(features))


def test_masked_frames_become_the_learned_vector_and_masked_channels_zero():
    encoder = randomise(SpeechEncoder(EncoderConfig(**ENCODER, mask_time_prob=0.3, mask_feature_prob=0.3)))
    lengths = [60, 60, 30]
    x = torch.randn(150, 32) + 5
    masked = encoder.spec_augment(x, model.Rows(lengths, "cpu")).split(lengths)
    found = set()
    for row, y in zip(x.split(lengths), masked):
        channels = (y == 0).all(0)  # (D,), the same in all frames of a row
        frames = ((y == encoder.masked_spec_embed) | channels).all(1)  # (F,)
        assert channels.any() and frames.any()
        assert torch.equal(y, torch.where(channels, 0, torch.where(frames[:, None], encoder.masked_spec_embed, row)))
        found.add((*channels.tolist(), *frames[:30].tolist()))
    assert len(found) == 3  # each row has spans of its own


@torch.no_grad()
def test_other_activations_equal_peer():
    peer = peer_encoder(add_adapter=True, hidden_act="gelu", adapter_act="swish")
    config = dict(ENCODER, hidden_act="gelu", adapter_act="swish", num_adapter_layers=1)
    encoder = SpeechEncoder(EncoderConfig(**{k: v for k, v in config.items() if "adapter" not in k})).eval()
    adapter = LengthAdapter(AdapterConfig(**config, output_size=48)).eval()
    state = peer.state_dict()
    encoder.load_state_dict({k: v for k, v in state.items() if not k.startswith("adapter")})
    adapter.layers.load_state_dict(peer.adapter.layers.state_dict())
    features = torch.randn(21, 160)
    x, _ = adapter(encoder(features, [21]), [21])
    assert relative_error(x, adapter.enc_to_dec_proj(peer(features[None]).last_hidden_state)[0]) < 1e-5


def test_masked_spans_have_the_peers_statistics():
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import _compute_mask_indices
    lengths = torch.tensor([200, 120, 50, 12, 9, 1] * 400)
    real = torch.arange(200) < lengths[:, None]
    for prob, span, least in ((0.3, 10, 2), (0.05, 10, 0), (0.65, 5, 1)):
        ours = span_mask(lengths, 200, prob, span, least)
        assert not ours[~real].any()
        for n in (200, 120, 50, 12):
            rows = ours[lengths == n][:, :n].float()
            theirs = torch.cat([torch.tensor(_compute_mask_indices((1, n), prob, span, None, least))
                                for _ in range(400)]).float()
            assert rows.mean().item() == pytest.approx(theirs.mean().item(), abs=0.06), n
        begins = ours & ~F.pad(ours, (1, 0))[:, :200]
        ends = ours & ~F.pad(ours, (0, 1))[:, 1:]
        widths = ends.nonzero()[:, 1] - begins.nonzero()[:, 1] + 1
        assert widths.min() >= span
    assert not span_mask(lengths, 200, 0.3, 10, 2)[(lengths == 9) | (lengths == 1)].any()


# ------------------------------------------------------------------------------------------------------------- loading


def test_save_and_load_again(tmp_path):
    speech_lm = tiny_speech_lm("qwen3")
    save_reference(speech_lm, tmp_path / "whole")
    speech_lm.encoder.save_pretrained(tmp_path / "encoder")
    speech_lm.llm.save_pretrained(tmp_path / "llm")
    again = load_reference(tmp_path / "whole")
    assert [p.name for p in sorted((tmp_path / "whole").iterdir())] == ["config.json", "generation_config.json",
                                                                      "model.safetensors"]
    assert len({p.stat().st_mode for p in (tmp_path / "whole").iterdir()}) == 1  # all readable by whom config.json is
    half = SpeechLM.from_parts(tmp_path / "encoder", tmp_path / "llm", torch.bfloat16, torch.float32)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not half.training
    assert {half.encoder.compute_dtype, half.adapter.compute_dtype, half.llm.compute_dtype} == {torch.float32}
    parts = SpeechLM.from_parts(tmp_path / "encoder", tmp_path / "llm", num_adapter_layers=3)
    assert len(parts.adapter.layers) == 3 and parts.adapter.config.output_size == 48
    for other in (again, parts):
        state = other.state_dict()
        for name, tensor in speech_lm.state_dict().items():
            assert name.startswith("adapter.") and other is parts or torch.equal(state[name], tensor), name
    assert again.adapter.config == speech_lm.adapter.config and again.llm.config == speech_lm.llm.config
    from transformers import AutoModelForCausalLM, Wav2Vec2BertModel  # what we save is a checkpoint like any other
    ids = torch.randint(0, 211, (1, 20))
    with torch.no_grad():
        peer = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
        assert relative_error(speech_lm.llm(ids[0], [20]), peer(ids).logits[0]) < 1e-5
        x = torch.randn(30, 160)
        peer = Wav2Vec2BertModel.from_pretrained(tmp_path / "encoder").eval()
        assert relative_error(speech_lm.encoder(x, [30]), peer(x[None]).last_hidden_state[0]) < 1e-5


@torch.no_grad()
def test_a_new_adapter_of_any_shape_is_saved_and_loaded(tmp_path):
    encoder, llm = EncoderConfig(**ENCODER), tiny_llm(eos_token_id=[5, 6])
    for kernel, stride in ((5, 2), (3, 4), (3, 1), (8, 8)):
        adapter = AdapterConfig(**ENCODER, output_size=48, adapter_kernel_size=kernel, adapter_stride=stride)
        whole = randomise(SpeechLM(SpeechEncoder(encoder), LengthAdapter(adapter), llm))
        save_reference(whole, tmp_path)  # over the memory-mapped model of the round before
        again = load_reference(tmp_path)
        features = torch.randn(34, 160)
        (ours, lengths), (theirs, again_lengths) = whole.encode(features, [33, 1]), again.encode(features, [33, 1])
        assert torch.equal(ours, theirs) and lengths == again_lengths
        assert again.llm.config.eos_token_id == [5, 6]
    whole.adapter.config.num_attention_heads = 2
    with pytest.raises(ValueError, match="the adapter's width, heads, FFN and dropout differ from the encoder's"):
        save_reference(whole, tmp_path)


def test_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch):
    llm = tiny_llm()
    llm.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        randomise(llm, 1).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


PEAK = r"""
import re, sys, torch
from model import LLM
def peak(): return int(re.search(r"VmHWM:\s*([0-9]+) kB", open("/proc/self/status").read())[1]) * 1024
for dtype in (torch.float32, torch.bfloat16):
    LLM.from_pretrained(sys.argv[2], dtype)  # whatever the first loading of anything costs
before = peak()
llm = LLM.from_pretrained(sys.argv[1], getattr(torch, sys.argv[3]))
for p in llm.parameters(): p.flatten()[::1024].sum()  # touch every page that is memory-mapped
print((peak() - before) / sum(p.nbytes for p in llm.parameters()))
"""


@pytest.mark.parametrize("stored, wanted", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"),
                                            ("bfloat16", "float32")])
def test_peak_memory_of_loading(tmp_path, stored, wanted):
    size = dict(vocab_size=60000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16)
    for name, config in (("big", size), ("small", {})):
        tiny_llm(**config).to(getattr(torch, stored)).save_pretrained(tmp_path / name)
    out = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "big", tmp_path / "small", wanted], cwd=ROOT,
                         capture_output=True, text=True, check=True).stdout
    assert 0.9 < float(out) < 1.15


def test_hub_id_from_the_local_cache(tmp_path):
    """A Hub id is looked up under HF_HOME; offline, nothing else is asked."""
    folder = tmp_path / "hub" / "models--some--model"
    tiny_llm().save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    run = "import sys\nfrom model import LLM\nfrom prepare.errors import CheckpointError\ntry: print(LLM.from_pretrained(sys.argv[1]).config.vocab_size)" \
          "\nexcept CheckpointError as e: print(e)"
    env = dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    say = [subprocess.run([sys.executable, "-c", run, name], cwd=ROOT, env=env, capture_output=True, text=True).stdout
           for name in ("some/model", "some/other")]
    assert say[0] == "211\n"
    assert re.fullmatch(r"some/other: no such directory here, and the Hub gave no such model \(LocalEntryNotFoundError: .*"
                        r"\); check the name, the network and HF_HUB_OFFLINE\n", say[1])


def damage(directory, **config):
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | config
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "gone"}))


REFUSED_CONFIGS = [
    (dict(num_attention_heads=0), "config.json: num_attention_heads is 0, expected int of at least 1"),
    (dict(num_attention_heads="6"), "num_attention_heads is '6', expected int of at least 1"),
    (dict(hidden_size=48.0), "hidden_size is 48.0, expected int"), (dict(vocab_size=None), "no field vocab_size"),
    (dict(tie_word_embeddings="true"), "tie_word_embeddings is 'true', expected bool"),
    (dict(rope_theta=0, rope_scaling="gone"), "rope_theta of the RoPE is 0, expected a positive number"),
    (dict(rope_scaling="llama3"), "rope_scaling is 'llama3', expected dict"), (dict(layer_types=5), "layer_types is 5"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor of the RoPE is None"),
    (dict(num_key_value_heads=4), "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
    (dict(model_type="mistral"), "config.json: model_type is 'mistral', expected 'qwen2' or 'qwen3' or 'llama'"),
    (dict(model_type="gone"), "config.json: model_type is None, expected 'qwen2'"),
    (dict(use_sliding_window=True, max_window_layers=1), "config.json: sliding-window attention is in use"),
    (dict(layer_types=["full_attention", "sliding_attention", "full_attention"]), "sliding-window attention is in use"),
    (dict(num_experts=60), "config.json: num_experts is 60, expected 0"),
    (dict(num_local_experts=8), "num_local_experts is 8"),
    (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope_type is 'yarn', expected 'default' or 'llama3'"),
    (dict(rope_parameters=dict(rope_type="linear", factor=2.0)), "rope_type is 'linear'"),
    (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor is 0.5"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    (dict(mlp_bias=True), "mlp_bias is True"),
    (dict(quantization_config=dict(bits=4)), "quantization_config is {'bits': 4}"),
    (dict(vocab_size="gone"), "config.json: no field vocab_size; copy the checkpoint's own config.json again"),
    (dict(hidden_size=64), r"29 tensors do not fit config.json: model.embed_tokens.weight is \(211, 48\), expected \(211, 64\)"),
    (dict(num_hidden_layers=2), r"12 tensors do not fit config.json: unexpected model.layers.2.input_layernorm.weight \(48,\)"),
    (dict(num_hidden_layers=4), "12 tensors do not fit config.json: missing model.layers.3.input_layernorm.weight"),
    (dict(tie_word_embeddings=False), "1 tensors do not fit config.json: missing lm_head.weight"),
]


@pytest.mark.parametrize("config, message", REFUSED_CONFIGS)
def test_what_is_not_supported_is_refused_by_name(tmp_path, config, message):
    tiny_llm().save_pretrained(tmp_path)
    damage(tmp_path, **config)
    with pytest.raises(CheckpointError, match=message) as error:
        LLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_sliding_window_fields_that_are_not_in_use_are_accepted(tmp_path):
    tiny_llm().save_pretrained(tmp_path)
    damage(tmp_path, sliding_window=32, use_sliding_window=False, max_window_layers=1)
    LLM.from_pretrained(tmp_path)
    damage(tmp_path, use_sliding_window=True, max_window_layers=3, layer_types=["full_attention"] * 3)
    LLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("config, message", [
    (dict(model_type="wav2vec2"), "model_type is 'wav2vec2', expected 'wav2vec2-bert'"),
    (dict(position_embeddings_type="rotary"), "position_embeddings_type is 'rotary', expected 'relative_key'"),
    (dict(hidden_act="selu"), "hidden_act is 'selu', expected 'swish' or"),
    (dict(left_max_position_embeddings=64), r"distance_embedding.weight is \(16, 8\), expected \(68, 8\)")])
def test_encoder_config_is_refused_by_name(tmp_path, config, message):
    tiny_speech_lm().encoder.save_pretrained(tmp_path)
    damage(tmp_path, **config)
    with pytest.raises(CheckpointError, match=message):
        SpeechEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("config, message", [
    (dict(model_type="qwen2"), "model_type is 'qwen2', expected 'speech_lm'"),
    (dict(add_pre_adapter=True), "add_pre_adapter is True"),
    (dict(decoder="gone"), "config.json, decoder: model_type is None"),
    (dict(encoder=dict(model_type="wav2vec2-bert", add_adapter=False)), "config.json, encoder: add_adapter is False"),
    (dict(encoder=dict(model_type="wav2vec2-bert", hidden_size=32, output_hidden_size=64)), "output_hidden_size is 64"),
    (dict(encoder=dict(model_type="wav2vec2-bert", adapter_kernel_size=7)), "adapter kernel 7 padded by 1, expected kernel // 2")])
def test_speech_lm_config_is_refused_by_name(tmp_path, config, message):
    save_reference(tiny_speech_lm(), tmp_path)
    damage(tmp_path, **config)
    with pytest.raises(CheckpointError, match=message):
        load_reference(tmp_path)


def test_bad_checkpoint_directories(tmp_path):
    def refused(path, message):
        with pytest.raises(CheckpointError, match=message) as error:
            LLM.from_pretrained(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "no" / "such", "no/such: no such directory; give the directory of a checkpoint")
    refused(tmp_path, "config.json: not found; a checkpoint has config.json and model.safetensors")
    (tmp_path / "config.json").write_text("{ not json")
    refused(tmp_path, "config.json: not readable as JSON .*; copy it from the checkpoint again")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json: found a list, expected a JSON object")
    (tmp_path / "config.json").write_text("[" * 100000)
    refused(tmp_path, "config.json: not readable as JSON")
    llm = tiny_llm()
    llm.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [[7]]}')
    refused(tmp_path, r"eos_token_id is \[\[7\]\], expected integers")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert LLM.from_pretrained(tmp_path).config.eos_token_id == [8, 9]  # config.json says 7
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for n in (0, 5, 1000, len(whole) - 1):
        weights.write_bytes(whole[:n])
        refused(tmp_path, f"model.safetensors: {n:,} bytes that are not a whole safetensors file .* download it again")
    weights.unlink()
    refused(tmp_path, "found no weights, expected model.safetensors or model.safetensors.index.json")
    torch.save(llm.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "found pytorch_model.bin, expected model.safetensors .* take the checkpoint's safetensors version")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refused(tmp_path, r"weight_map is \[\], expected dict")
    for name in ("../secret.safetensors", str(tmp_path / "x.safetensors"), 5, None, "x" * 400 + ".safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        (tmp_path.parent / "secret.safetensors").write_bytes(whole)
        (tmp_path / "x.safetensors").write_bytes(whole)
        refused(tmp_path, "index.json: names the shard .* which is not a file beside it")


def test_doubled_and_quantised_tensors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    tiny_llm().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(48)}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(state, "a.safetensors") | {"model.norm.weight": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match="model.norm.weight is there twice"):
        LLM.from_pretrained(tmp_path)
    save_file(state | {"model.norm.weight": torch.ones(48, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.norm.weight is I8, expected F32, BF16 or F16"):
        LLM.from_pretrained(tmp_path)


def test_tied_checkpoint_with_another_output_layer_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    tiny_llm().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)  # in checkpoints of old releases
    save_file(state, tmp_path / "model.safetensors")
    LLM.from_pretrained(tmp_path)
    state["lm_head.weight"][100, 3] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true in config.json, but lm_head.weight differs"):
        LLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------- scores and LoRA


def test_score_is_the_log_probability_of_the_answer():
    """Continuing a prefix, in one batch of uneven rows, against a forward pass over each whole row."""
    speech_lm = tiny_speech_lm().eval()
    features, lengths = torch.randn(95, 160), [61, 34]
    counts = [adapter_length(n, speech_lm.adapter.config) for n in lengths]
    ids = torch.full((sum(counts),), AUDIO)
    prefix = speech_lm.read(ids, counts, features, lengths)
    again = speech_lm.read(ids, counts, heard=speech_lm.encode(features, lengths))
    for one, two in zip(prefix.cache, again.cache):
        torch.testing.assert_close(one, two)
    asked, answers, of = [3, 1, 2, 4], [2, 5, 1, 3], [1, 0, 0, 1]
    rows = [torch.randint(8, 211, (n + k,)) for n, k in zip(asked, answers)]
    scores = speech_lm.score(torch.cat(rows), [len(row) for row in rows], answers, prefix, of)
    for row, n, r, score in zip(rows, answers, of, scores):
        whole = torch.cat([torch.full((counts[r],), AUDIO), row])
        targets = torch.arange(len(whole) - n, len(whole))
        loss, _ = speech_lm(features.split(lengths)[r], lengths[r:r + 1], whole, [len(whole)], targets)
        assert score.item() == pytest.approx(-loss.item(), rel=1e-4)


def test_no_answer_begins_with_a_forbidden_id():
    llm = tiny_llm()
    x, lengths = llm.embed(torch.randint(8, 211, (18,))), [6, 6, 6]
    first = [answer[0] for answer in generate(llm, x, lengths, 3)]
    for beams in (1, 3):
        answers = generate(llm, x, lengths, 3, never_first=first, num_beams=beams)
        assert not {answer[0] for answer in answers} & set(first)


def test_low_rank_updates():
    llm, plain = tiny_llm(), tiny_llm()
    ids = torch.randint(8, 211, (18,))
    names = set(llm.state_dict())
    add_lora(llm, 4, 8.0, ["q_proj", "down_proj"])
    trained = {name for name, p in llm.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{i}.{layer}.lora_{ab}" for i in range(llm.config.num_hidden_layers)
                       for layer in ("self_attn.q_proj", "mlp.down_proj") for ab in "ab"}
    assert torch.equal(llm(ids, [9, 9]), plain(ids, [9, 9]))  # B is zero
    for p in llm.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    layer = llm.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    by_hand = x @ (layer.weight + 8.0 / 4 * layer.lora_b @ layer.lora_a).T + layer.bias
    torch.testing.assert_close(layer(x), by_hand)
    state = merged_state(llm)
    assert set(state) == names
    plain.load_state_dict(state)
    assert not torch.equal(llm(ids, [9, 9]), tiny_llm()(ids, [9, 9])) and relative_error(plain(ids, [9, 9]), llm(ids, [9, 9])) < 1e-5
    llm(ids, [9, 9]).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in llm.parameters())
