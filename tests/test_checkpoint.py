"""Loading and saving: pretrained checkpoints good and bad, tokenizers, the Hub's cache, memory,
checkpoints of this project. What is wrong is said in one line."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from conftest import (
    ROOT,
    peer_llm,
    randomise,
    refused,
    relative_error,
    save_base,
    tiny_encoder,
    tiny_llm,
)
from model import LLM, SpeechEncoder, SpeechLM, UserError, fingerprint, load_checkpoint, visible


@pytest.fixture
def parts(tmp_path, tiny_project):
    """Copies of the tiny encoder and LLM, to be spoilt, and a function that changes the config.json
    of one of them and returns its directory. A value of ... removes a field."""
    for name in ("encoder", "llm"):
        shutil.copytree(tiny_project / name, tmp_path / name)

    def change(name, **changes):
        raw = json.loads((tiny_project / name / "config.json").read_text()) | changes
        raw = {field: value for field, value in raw.items() if value is not ...}
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
        return tmp_path / name

    return change


# --- Saving and loading


@torch.no_grad()
def test_save_and_load_again(tmp_path):
    from transformers import AutoModelForCausalLM, Wav2Vec2BertModel

    encoder, llm = tiny_encoder(), tiny_llm("qwen3", eos_token_id=[5, 6])
    save_base(encoder, tmp_path / "encoder")
    save_base(llm, tmp_path / "llm")
    llm = LLM.from_pretrained(tmp_path / "llm")
    assert llm.config.eos_token_id == [5, 6]

    # What is saved is a checkpoint like any other.
    ids, features = torch.randint(0, 211, (1, 20)), torch.randn(30, 160)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert relative_error(llm(ids[0], [20]), peer(ids).logits[0]) < 1e-5
    peer = Wav2Vec2BertModel.from_pretrained(tmp_path / "encoder").eval()
    theirs = peer(features[None]).last_hidden_state[0]
    assert relative_error(encoder(features, [30]), theirs) < 1e-5


def test_parts_are_joined_in_the_precision_asked_for(tiny_project):
    parts = tiny_project / "encoder", tiny_project / "llm"
    bfloat16, float32 = torch.bfloat16, torch.float32
    plain = SpeechLM.from_parts(*parts, num_adapter_layers=3)
    assert len(plain.adapter.layers) == 3 and plain.adapter.config.output_size == 48
    assert not plain.training
    rounded = SpeechLM.from_parts(*parts, bfloat16, float32, float32=("adapter",))
    for name, parameter in rounded.named_parameters():
        if name.startswith("adapter"):
            assert parameter.dtype == float32
        else:
            assert torch.equal(parameter, plain.get_parameter(name).bfloat16())
    assert {part.compute_dtype for part in rounded.children()} == {float32}
    with pytest.raises(ValueError, match="torch.float16, .* expected torch.float32 or bfloat16"):
        LLM.from_pretrained(parts[1], torch.float16)


def test_adapters_that_are_none(tiny_project):
    join = partial(SpeechLM.from_parts, tiny_project / "encoder", tiny_project / "llm")
    refused("the adapter: adapter_act is 'x', expected", partial(join, adapter_act="x"))
    refused("the adapter: adapter_stride is -1, expected", partial(join, adapter_stride=-1))


@torch.no_grad()
def test_shards(tmp_path):
    peer = peer_llm("qwen2")
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    ids = torch.randint(0, 211, (1, 30))
    assert relative_error(LLM.from_pretrained(tmp_path)(ids[0], [30]), peer(ids).logits[0]) < 1e-5
    shards[1].unlink()
    refused(f"no {shards[1].name}; take all files", LLM.from_pretrained, tmp_path)


PEAK = """
import sys, torch, model
model.BLOCK, dtype = 2**20, getattr(torch, sys.argv[3])
def peak(): return next(int(x.split()[1]) for x in open("/proc/self/status") if "VmHWM" in x) * 1024
model.LLM.from_pretrained(sys.argv[2], dtype)  # whatever the first loading of anything costs
before = peak()
llm = model.LLM.from_pretrained(sys.argv[1], dtype)
for p in llm.parameters(): p.flatten()[::1024].sum()  # touch every page that is memory-mapped
print((peak() - before) / sum(p.nbytes for p in llm.parameters()))
"""


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading(tmp_path, stored, dtype):
    """Is that of the weights, whether they are mapped into memory or converted."""
    size = dict(vocab_size=60000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    for name, config in (("large", size), ("small", {})):
        save_base(tiny_llm(**config).to(getattr(torch, stored)), tmp_path / name)
    command = [sys.executable, "-c", PEAK, tmp_path / "large", tmp_path / "small", dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.15


FETCH = """
import sys, model
print(model.LLM.from_pretrained(sys.argv[1]).config.vocab_size)
print(model.fingerprint(sys.argv[1])["path"])
try: model.fetch("a/b")
except model.UserError as error: print(error)
"""


def test_hub_id_from_the_local_cache(tmp_path):
    """A Hub id is looked up under HF_HOME; offline, nothing else is asked."""
    folder = tmp_path / "hub" / "models--org--model"
    save_base(tiny_llm(), folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    env = dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", FETCH, "org/model"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    size, place, error = done.stdout.splitlines()
    assert (size, place) == ("211", "org/model")
    assert error.startswith("a/b (of the Hub): ") and "HF_HUB_OFFLINE" in error


def test_names_of_models_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("../../x", "a/b/../../c", "x" * 1000, "a\0b", "\x1b[2J/x", "no/such/dir"):
        refused("no such directory; give the directory of a checkpoint", model.fetch, name)


def test_fingerprint(parts):
    """Is that of the same model elsewhere, and another one after any change."""
    directory = parts("llm")
    first = fingerprint(directory)
    assert first["path"] == str(directory.resolve())
    moved = shutil.copytree(directory, directory.with_name("moved"))
    assert fingerprint(moved)["sha256"] == first["sha256"]
    parts("llm", rms_norm_eps=2e-6)
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    changed = fingerprint(directory)["sha256"], fingerprint(moved)["sha256"]
    assert first["sha256"] not in changed
    (moved / "model.safetensors").unlink()
    refused("no model.safetensors; take all files", fingerprint, moved)


def test_the_faster_precision(parts, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    tiny, large = parts("llm"), parts("encoder", hidden_size=512)
    assert model.fast_dtype(tiny, "cpu") == torch.float32
    assert model.fast_dtype(large, "cpu") == model.fast_dtype(tiny, "cuda:0") == torch.bfloat16


LLM_CONFIGS = [
    (dict(model_type="mistral"), "model_type is 'mistral', expected 'qwen2' or 'qwen3' or 'llama'"),
    (dict(model_type="\x1b[31mqwen2"), r"model_type is '\\x1b\[31mqwen2', expected"),
    (dict(vocab_size=...), "argument: 'vocab_size'; copy the checkpoint's own config.json again"),
    (dict(num_attention_heads=-6), "num_attention_heads is -6, expected int"),
    (dict(num_attention_heads=0), "config.json: "),
    (dict(num_key_value_heads=4), "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
    (dict(hidden_size="9" * 10**6), "hidden_size is '9999"),
    (dict(hidden_size=64), "size mismatch for model.embed_tokens.weight: .*different models"),
    (dict(num_hidden_layers=2), 'Unexpected key.*"model.layers.2.*different models'),
    (dict(num_hidden_layers=4), 'Missing key.*"model.layers.3.*different models'),
    (dict(num_hidden_layers=10**9), "38 tensors for 1000000000 layers"),
    (dict(tie_word_embeddings="true"), "tie_word_embeddings is 'true', expected bool"),
    (dict(tie_word_embeddings=False), 'Missing key.* "lm_head.weight"'),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan, expected float"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    (dict(num_experts=60), "num_experts is 60, expected 0"),
    (dict(quantization_config=dict(bits=4)), "quantization_config is {'bits': 4}"),
    (dict(use_sliding_window=True, max_window_layers=1), "use_sliding_window is True, expected"),
    (dict(layer_types=["sliding_attention"] * 3), "layer_types is 'sliding_attention', expected"),
    (dict(rope_theta=0), "rope_theta is 0, expected a positive number"),
    (dict(rope_theta=10**400), "config.json: "),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8)), "low_freq_factor is None, expected"),
    (dict(rope_scaling=dict(type="yarn")), "rope_type is 'yarn', expected 'default' or 'llama3'"),
    (dict(rope_parameters=dict(rope_type="linear")), "rope_type is 'linear'"),
    (dict(eos_token_id=[-1]), r"eos_token_id is \[-1\], expected integers below"),
]
ENCODER_CONFIGS = [
    (dict(model_type=...), "model_type is '', expected 'wav2vec2-bert'"),
    (dict(position_embeddings_type="rotary"), "is 'rotary', expected 'relative_key'"),
    (dict(hidden_act="selu"), "hidden_act is 'selu', expected 'swish' or"),
    (dict(feature_projection_input_dim=80), "feature_projection_input_dim is 80, expected 160"),
    (dict(num_attention_heads=0), "hidden_size 32 is no multiple of num_attention_heads 0"),
    (dict(left_max_position_embeddings=64), "distance_embedding.weight: .*different models"),
    (dict(conv_depthwise_kernel_size=2**40), "different models"),
]
CONFIGS = [("llm", LLM, *case) for case in LLM_CONFIGS]
CONFIGS += [("encoder", SpeechEncoder, *case) for case in ENCODER_CONFIGS]


@pytest.mark.parametrize("name, build, changes, message", CONFIGS)
def test_models_that_are_not_supported(parts, name, build, changes, message):
    directory = parts(name, **changes)
    (directory / "generation_config.json").unlink(missing_ok=True)  # whose end tokens win
    assert str(directory) in refused(message, build.from_pretrained, directory)


JUNK = [-1, 10**12, -1e300, float("inf"), True, "\x1b[2J", [[[]]], {}, {"a": [None]}]


@pytest.mark.parametrize("name, build", [("llm", LLM), ("encoder", SpeechEncoder)])
def test_no_value_of_a_config_gives_another_error(parts, name, build):
    fields = json.loads((parts(name) / "config.json").read_text())
    for field in [*fields, "layer_types", "rope_parameters", "use_sliding_window"]:
        for value in JUNK:
            try:
                build.from_pretrained(parts(name, **{field: value}))
            except UserError as error:
                assert "\n" not in str(error) and "config.json" in str(error), (field, value)


def test_json_that_is_none(parts):
    config, generation = (parts("llm") / f"{x}.json" for x in ("config", "generation_config"))
    generation.write_text('{"eos_token_id": [8, 9]}')
    assert LLM.from_pretrained(config.parent).config.eos_token_id == [8, 9]  # config.json has 0
    generation.write_text('{"eos_token_id": [[7]]}')
    refused(r"eos_token_id is \[\[7\]\], expected integers", LLM.from_pretrained, config.parent)
    deep = b'{"model_type": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    for content in (b"{ not json", b"", b"[]", b"[" * 100_000, deep, b"\xff\xfe"):
        config.write_bytes(content)
        refused("config.json: ", LLM.from_pretrained, config.parent)
    config.unlink()
    refused("config.json: No such file .* a checkpoint has", LLM.from_pretrained, config.parent)


def test_weights_that_are_torn_or_missing(parts):
    directory = parts("llm")
    weights, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    content = weights.read_bytes()
    for size in (0, 5, 1000, len(content) - 1):
        weights.write_bytes(content[:size])
        refused("safetensors: .* truncated or damaged: download", LLM.from_pretrained, directory)
    weights.unlink()
    refused("no model.safetensors; take all .* safetensors version", LLM.from_pretrained, directory)
    for files in ({}, [], {"a": 5}, {"a": "../no"}, {"a": "\x1b[2J"}, {"a": "x" * 400}):
        index.write_text(json.dumps({"weight_map": files}))
        refused("llm: .*; take all files|index.json: ", LLM.from_pretrained, directory)


@pytest.mark.parametrize("shape", [[2**40, 2**40], [2**62, 4], [-1], [48]])
@pytest.mark.parametrize("offsets", [[0, 4], [4, 0], [2**63, 2**63 + 4], [float("nan"), 4]])
def test_forged_weights(parts, shape, offsets):
    directory = parts("llm")
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps({"model.norm.weight": entry}).encode()
    for size in (len(text), 2**63, 2**40, 0):
        content = struct.pack("<Q", size) + text + bytes(400)
        (directory / "model.safetensors").write_bytes(content)
        refused("truncated or damaged: download it again", LLM.from_pretrained, directory)


def test_doubled_and_quantised_tensors(parts):
    directory = parts("llm")
    weights = directory / "model.safetensors"
    state = load_file(weights)
    norm = "model.norm.weight"
    save_file(state | {norm: torch.ones(48, dtype=torch.int8)}, weights)
    refused(f"{norm} is I8, expected F32, BF16, F16", LLM.from_pretrained, directory)
    save_file(state, directory / "a.safetensors")
    save_file({norm: torch.zeros(48)}, directory / "b.safetensors")
    files = dict.fromkeys(state, "a.safetensors") | {norm: "b.safetensors"}
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    weights.unlink()
    refused(f"two different {norm}, expected one", LLM.from_pretrained, directory)


def test_tied_checkpoint_with_another_output_layer(parts):
    directory = parts("llm")
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)  # of old releases
    save_file(state, directory / "model.safetensors")
    LLM.from_pretrained(directory)
    state["lm_head.weight"][100, 3] += 1
    save_file(state, directory / "model.safetensors")
    message = "two different model.embed_tokens.weight, expected one .tie_word_embeddings"
    refused(message, LLM.from_pretrained, directory)


def test_tokenizers(parts):
    path = parts("llm") / "tokenizer.json"
    raw = json.loads(path.read_text())
    padding = dict(strategy={"Fixed": 2**50}, direction="Right", pad_to_multiple_of=None)
    padding |= dict(pad_id=0, pad_type_id=0, pad_token="x")
    path.write_text(json.dumps(raw | {"padding": padding}))
    ids = model.load_tokenizer(path.parent).encode("one two").ids
    assert len(ids) < 10  # nothing is ever padded

    vocabulary = raw["model"]["vocab"] | {"zzz": 10**6}
    path.write_text(json.dumps(raw | {"model": raw["model"] | {"vocab": vocabulary}}))
    message = "has tokens up to 1000000, .*276"
    refused(message, model.load_tokenizer, path.parent)
    for content in (b"[" * 10**6, b"{}", b"", b"\xff" * 100, b'{"version": "1.0", "model": 5}'):
        path.write_bytes(content)
        refused("tokenizer.json: .*; copy the LLM's own", model.load_tokenizer, path.parent)
    path.unlink()
    refused("tokenizer.json: No such file", model.load_tokenizer, path.parent)


# --- Checkpoints of this project


@pytest.fixture
def trained(tiny_project, tmp_path):
    """A checkpoint with an adapter, where it is, and the fingerprints of its base models."""
    speech_lm = SpeechLM.from_parts(tiny_project / "encoder", tiny_project / "llm")
    bases = {name: fingerprint(tiny_project / name) for name in ("encoder", "llm")}
    state = {f"adapter.{k}": v for k, v in randomise(speech_lm.adapter).state_dict().items()}
    checkpoint = dict(model=state, adapter=asdict(speech_lm.adapter.config), bases=bases)
    checkpoint |= dict(config={}, data=[], window=30.0, step=2)
    torch.save(checkpoint, tmp_path / "align.pt")
    return checkpoint, tmp_path / "align.pt", bases


def build(bases):
    """The model as training builds it: only what is to be trained requires a gradient."""
    speech_lm = SpeechLM.from_parts(bases["encoder"]["path"], bases["llm"]["path"])
    speech_lm.encoder.requires_grad_(False)
    speech_lm.llm.requires_grad_(False)
    return speech_lm


def test_a_checkpoint_is_restored(trained):
    checkpoint, path, bases = trained
    speech_lm = build(bases)
    before = {name: p.clone() for name, p in speech_lm.named_parameters()}
    model.restore(speech_lm, load_checkpoint(path), bases, path)
    for name, parameter in speech_lm.named_parameters():
        assert torch.equal(parameter, checkpoint["model"].get(name, before[name]))


def test_checkpoints_that_are_none(trained, tmp_path):
    checkpoint, path, _ = trained
    content = path.read_bytes()
    for damaged in (b"", b"\x80", content[:100], content[: len(content) // 2], b"x" * 1000):
        path.write_bytes(damaged)
        refused("align.pt: .*; give an align.pt or ift.pt", load_checkpoint, path)
    wrong = [checkpoint | {name: None} for name in checkpoint]
    for value in (5, [], {}, torch.zeros(3), checkpoint | {"bases": {"llm": {}}}, *wrong):
        torch.save(value, path)
        refused("align.pt: .*; give an align.pt or ift.pt", load_checkpoint, path)
    refused("no.pt: No such file", load_checkpoint, tmp_path / "no.pt")
    refused("config.json: No such file", load_checkpoint, tmp_path)


class Command:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_checkpoints_run_no_code(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint, path, _ = trained
    torch.save(checkpoint | {"data": Command()}, path)
    refused("align.pt: ", load_checkpoint, path)
    path.write_bytes(pickle.dumps(Command()))
    refused("align.pt: ", load_checkpoint, path)
    assert not (tmp_path / "owned").exists()


OTHER = {"encoder": {"path": "/x", "sha256": "0"}}
MISFITS = [
    (dict(bases=OTHER), "align.pt: was trained on the encoder /x, found another model at /"),
    (dict(bases={}), "align.pt: "),
    (dict(bases=5), "align.pt: "),
    (dict(model={"adapter.x": torch.zeros(3)}), "align.pt: 47 tensors do not fit"),
    (dict(model={"adapter.enc_to_dec_proj.bias": 5}), "align.pt: "),
    (dict(model=[]), "align.pt: "),
]


@pytest.mark.parametrize("changes, message", MISFITS)
def test_checkpoints_that_do_not_fit(trained, changes, message):
    checkpoint, path, bases = trained
    refused(message, model.restore, build(bases), checkpoint | changes, bases, path)


# --- What is printed

TERMINAL = "\x1b]0;owned\x07\x1b[2J\u202etxt.exe\x9b31m"  # sets the title, clears the screen


def test_visible():
    plain = "Grüße, 你好 שלום \U0001f600 a\u200db"
    assert visible(plain) == plain
    assert visible("a\x1b[31mb\x9bc\u202ed\ne\tf\x00\x7f") == (
        r"a\u001b[31mb\u009bc\u202ed\u000ae\u0009f\u0000\u007f"
    )
    assert visible("a\nb\tc\r\n", keep="\n\t") == "a\nb\tc\\u000d\n"
    for text in (TERMINAL, "\ud800", 'x"\\'):
        assert json.loads(visible(json.dumps(text, ensure_ascii=False))) == text


def test_errors_are_one_line():
    def fail(error):
        with model.one_line_errors("x.wav", "copy it again"):
            raise error

    refused("^x", fail, UserError(f"x{TERMINAL}\n" + "y" * 10**6))
    refused("^x.wav: first; copy it again$", fail, RuntimeError("\n first\nsecond"))
    refused("^x.wav: KeyError; copy it again$", fail, KeyError())
    refused("^x.wav: No space; copy it again$", fail, OSError(28, "No space"))
    panic = type("PanicException", (BaseException,), {})
    refused("^x.wav: bad; copy it again$", fail, panic("bad"))
    for kind in (KeyboardInterrupt, MemoryError, SystemExit):
        with pytest.raises(kind):
            fail(kind())
