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
from pathlib import Path

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
    tiny_encoder,
    tiny_llm,
    tiny_speech_lm,
)
from model import (
    LLM,
    SpeechEncoder,
    SpeechLM,
    UserError,
    fetch,
    fingerprint,
    load_checkpoint,
    load_tokenizer,
    restore,
    visible,
)


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


# ------------------------------------------------------------------------------
# Saving and loading


@torch.no_grad()
def test_save_and_load_again(tmp_path):
    from transformers import AutoModelForCausalLM, Wav2Vec2BertModel

    encoder, llm = tiny_encoder(), tiny_llm("qwen3", eos_token_id=[5, 6])
    encoder.save_pretrained(tmp_path / "encoder")
    for _ in range(2):
        llm.save_pretrained(tmp_path / "llm")
        llm = LLM.from_pretrained(tmp_path / "llm")  # saved over its own memory-mapped file
    files = sorted((tmp_path / "llm").iterdir())
    assert [file.name for file in files] == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert len({file.stat().st_mode for file in files}) == 1  # others may read all or none
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
    with pytest.raises(ValueError, match="torch.float16, expected torch.float32 or torch.bfloat16"):
        LLM.from_pretrained(parts[1], torch.float16)


def test_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch):
    llm = tiny_llm()
    llm.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        randomise(llm, 1).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@torch.no_grad()
def test_shards(tmp_path):
    peer = peer_llm("qwen2")
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    ids = torch.randint(0, 211, (1, 30))
    assert relative_error(LLM.from_pretrained(tmp_path)(ids[0], [30]), peer(ids).logits[0]) < 1e-5
    shards[1].unlink()
    refused(
        f"index.json: no shard {shards[1].name} beside it; download", LLM.from_pretrained, tmp_path
    )


PEAK = r"""
import re, sys, torch, model
def peak(): return int(re.search(r"VmHWM:\s*([0-9]+) kB", open("/proc/self/status").read())[1]) * 1024
model.BLOCK = 2**20
dtype = getattr(torch, sys.argv[3])
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
        tiny_llm(**config).to(getattr(torch, stored)).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", PEAK, tmp_path / "large", tmp_path / "small", dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.15


FETCH = """
import sys, model
print(model.LLM.from_pretrained(sys.argv[1]).config.vocab_size, model.fingerprint(sys.argv[1])["path"])
try: model.fetch("a/b")
except model.UserError as error: print(error)
"""


def test_hub_id_from_the_local_cache(tmp_path):
    """A Hub id is looked up under HF_HOME; offline, nothing else is asked."""
    folder = tmp_path / "hub" / "models--org--model"
    tiny_llm().save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    env = dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", FETCH, "org/model"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    first, *rest = done.stdout.splitlines()
    assert first == "211 org/model" and len(rest) == 1
    assert rest[0].startswith("a/b (of the Hub): ") and "HF_HUB_OFFLINE" in rest[0]


def test_names_of_models_are_no_paths():
    for name in ("../../x", "a/b/../../c", "x" * 1000, "a\0b", "\x1b[2J/x", "no/such/dir"):
        refused("no such directory; give the directory of a checkpoint", fetch, name)


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
    assert (
        len({first["sha256"], fingerprint(directory)["sha256"], fingerprint(moved)["sha256"]}) == 3
    )
    (moved / "model.safetensors").unlink()
    refused("found no weights, expected model.safetensors", fingerprint, moved)


def test_the_faster_precision(parts, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    tiny, large = parts("llm"), parts("encoder", hidden_size=512)
    assert model.fast_dtype(tiny, "cpu") == torch.float32
    assert model.fast_dtype(large, "cpu") == model.fast_dtype(tiny, "cuda:0") == torch.bfloat16


# ------------------------------------------------------------------------------
# Configurations

ROPE = dict(rope_type="llama3", factor=8.0)
LLM_CONFIGS = [
    (dict(model_type="mistral"), "model_type is 'mistral', expected 'qwen2' or 'qwen3' or 'llama'"),
    (dict(model_type=...), "model_type is '', expected 'qwen2'"),
    (dict(model_type="\x1b[31mqwen2"), r"model_type is '\\x1b\[31mqwen2', expected"),
    (dict(vocab_size=...), "no field vocab_size; copy the checkpoint's own config.json again"),
    (dict(vocab_size=None), "no field vocab_size"),
    (dict(num_attention_heads="6"), "num_attention_heads is '6', expected int"),
    (dict(num_attention_heads=0), "config.json: "),
    (dict(num_attention_heads=-6), "num_attention_heads is -6, expected int"),
    (dict(num_key_value_heads=4), "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
    (dict(hidden_size=48.0), "hidden_size is 48.0, expected int"),
    (dict(hidden_size="9" * 10**6), "hidden_size is '9999"),
    (dict(hidden_size=10**12), "config.json: "),
    (dict(hidden_size=64), r"29 tensors do not fit .*embed_tokens.weight is \(291, 48\), expected"),
    (dict(num_hidden_layers=2), "12 tensors do not fit config.json: unexpected model.layers.2"),
    (dict(num_hidden_layers=4), "12 tensors do not fit config.json: missing model.layers.3"),
    (dict(num_hidden_layers=10**9), "config.json has 1000000000 layers for 38 tensors"),
    (dict(tie_word_embeddings="true"), "tie_word_embeddings is 'true', expected bool"),
    (dict(tie_word_embeddings=False), "1 tensors do not fit config.json: missing lm_head.weight"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan, expected float"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    (dict(mlp_bias=True), "mlp_bias is True"),
    (dict(num_experts=60), "num_experts is 60, expected 0"),
    (dict(num_local_experts=8), "num_local_experts is 8"),
    (dict(quantization_config=dict(bits=4)), "quantization_config is {'bits': 4}"),
    (dict(use_sliding_window=True, max_window_layers=1), "sliding-window attention is in use"),
    (dict(layer_types=["sliding_attention"] * 3), "sliding-window attention is in use"),
    (dict(layer_types=5), "config.json: "),
    (dict(rope_theta=0, rope_scaling=...), "rope_theta of the RoPE is 0, expected a positive"),
    (dict(rope_theta=10**400), "config.json: "),
    (dict(rope_scaling="llama3"), "config.json: "),
    (dict(rope_scaling=ROPE), "low_freq_factor of the RoPE is None"),
    (dict(rope_scaling=dict(type="yarn")), "rope_type is 'yarn', expected 'default' or 'llama3'"),
    (dict(rope_parameters=dict(rope_type="linear"), rope_scaling=...), "rope_type is 'linear'"),
    (dict(rope_scaling=dict(partial_rotary_factor=0.5)), "partial_rotary_factor is 0.5"),
    (
        dict(eos_token_id=10**9),
        "eos_token_id is 1000000000, expected integers below the vocab_size",
    ),
    (dict(eos_token_id=[-1]), r"eos_token_id is \[-1\], expected integers below the vocab_size"),
]
ENCODER_CONFIGS = [
    (dict(model_type="wav2vec2"), "model_type is 'wav2vec2', expected 'wav2vec2-bert'"),
    (dict(position_embeddings_type="rotary"), "is 'rotary', expected 'relative_key'"),
    (dict(hidden_act="selu"), "hidden_act is 'selu', expected 'swish' or"),
    (dict(feature_projection_input_dim=80), "feature_projection_input_dim is 80, expected 160"),
    (dict(num_attention_heads=5), "hidden_size 32 is no multiple of num_attention_heads 5"),
    (dict(num_attention_heads=0), "hidden_size 32 is no multiple of num_attention_heads 0"),
    (dict(left_max_position_embeddings=64), r"distance_embedding.weight is \(16, 8\), expected"),
    (dict(conv_depthwise_kernel_size=2**40), "encoder"),
    (dict(layer_norm_eps=float("nan")), "layer_norm_eps is nan"),
]


@pytest.mark.parametrize("changes, message", LLM_CONFIGS)
def test_llm_that_is_not_supported(parts, changes, message):
    directory = parts("llm", **changes)
    (directory / "generation_config.json").unlink()  # whose end tokens win
    assert str(directory) in refused(message, LLM.from_pretrained, directory)


@pytest.mark.parametrize("changes, message", ENCODER_CONFIGS)
def test_encoder_that_is_not_supported(parts, changes, message):
    directory = parts("encoder", **changes)
    assert str(directory) in refused(message, SpeechEncoder.from_pretrained, directory)


JUNK = [-1, 10**12, 2**63, -1e300, float("inf"), True, "", "\x1b[2J", [], [[[]]], {}, {"a": [None]}]


@pytest.mark.parametrize("name, build", [("llm", LLM), ("encoder", SpeechEncoder)])
def test_no_value_of_a_config_gives_another_error(parts, name, build):
    fields = json.loads((parts(name) / "config.json").read_text())
    for field in [*fields, "layer_types", "rope_parameters", "max_window_layers", "num_experts"]:
        for value in JUNK:
            try:
                build.from_pretrained(parts(name, use_sliding_window=True, **{field: value}))
            except UserError as error:
                assert "\n" not in str(error) and "config.json" in str(error), (field, value)


def test_sliding_window_fields_that_are_not_in_use(parts):
    LLM.from_pretrained(parts("llm", sliding_window=32, use_sliding_window=False))
    full = dict(max_window_layers=3, layer_types=["full_attention"] * 3)
    LLM.from_pretrained(parts("llm", use_sliding_window=True, **full))


def test_json_that_is_none(parts):
    config, generation = (parts("llm") / f"{x}.json" for x in ("config", "generation_config"))
    generation.write_text('{"eos_token_id": [8, 9]}')
    assert LLM.from_pretrained(config.parent).config.eos_token_id == [8, 9]  # config.json has 0
    generation.write_text('{"eos_token_id": [[7]]}')
    refused(r"eos_token_id is \[\[7\]\], expected integers", LLM.from_pretrained, config.parent)
    for text in (
        "{ not json",
        "",
        "[" * 100_000,
        '{"model_type": ' + "[" * 5000 + "]" * 5000 + "}",
    ):
        config.write_text(text)
        refused("config.json: ", LLM.from_pretrained, config.parent)
    config.write_bytes(b"\xff\xfe")
    refused("config.json: .*copy it again", LLM.from_pretrained, config.parent)
    config.write_text("[]")
    refused("config.json: found a list, expected a JSON object", LLM.from_pretrained, config.parent)
    config.unlink()
    refused("config.json: No such file .* a checkpoint has", LLM.from_pretrained, config.parent)


# ------------------------------------------------------------------------------
# Weights


def test_weights_that_are_torn_or_missing(parts):
    directory = parts("llm")
    weights, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    content = weights.read_bytes()
    for size in (0, 5, 1000, len(content) - 1):
        weights.write_bytes(content[:size])
        refused("safetensors: .* truncated or damaged: download", LLM.from_pretrained, directory)
    weights.unlink()
    refused("found no weights, expected model.safetensors", LLM.from_pretrained, directory)
    torch.save({}, directory / "pytorch_model.bin")
    refused("found pytorch_model.bin, .* not opened", LLM.from_pretrained, directory)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {}}', "5"):
        index.write_text(text)
        refused("index.json: ", LLM.from_pretrained, directory)
    for name in ("../../etc/no", "\x1b[2J", "x" * 400):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused("index.json: ", LLM.from_pretrained, directory)


FORGED = [
    ("F32", [2**40, 2**40], [0, 4]),
    ("F32", [2**62, 4], [0, 4]),
    ("F32", [-1], [0, 4]),
    ("F32", [1], [4, 0]),
    ("F32", [1], [2**63, 2**63 + 4]),
    ("F32", [1], [float("nan"), 4]),
    ("F9", [1], [0, 4]),
    ("F32", [48], [0, 2**40]),
]


@pytest.mark.parametrize("dtype, shape, offsets", FORGED)
def test_forged_weights(parts, dtype, shape, offsets):
    directory = parts("llm")
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps({"model.norm.weight": entry, "other": entry}).encode()
    for size in (len(text), 2**63, 2**40, 0):
        content = struct.pack("<Q", size) + text + bytes(400)
        (directory / "model.safetensors").write_bytes(content)
        refused("download it again|do not fit|layers for", LLM.from_pretrained, directory)


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
    refused(f"{norm} is there twice", LLM.from_pretrained, directory)


def test_tied_checkpoint_with_another_output_layer(parts):
    directory = parts("llm")
    state = load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)  # of old releases
    save_file(state, directory / "model.safetensors")
    LLM.from_pretrained(directory)
    state["lm_head.weight"][100, 3] += 1
    save_file(state, directory / "model.safetensors")
    message = "tie_word_embeddings is true in config.json, but lm_head.weight differs"
    refused(message, LLM.from_pretrained, directory)


# ------------------------------------------------------------------------------
# Tokenizers


def test_tokenizers(parts):
    path = parts("llm") / "tokenizer.json"
    raw = json.loads(path.read_text())
    padding = dict(strategy={"Fixed": 2**50}, direction="Right", pad_to_multiple_of=None)
    padding |= dict(pad_id=0, pad_type_id=0, pad_token="x")
    path.write_text(json.dumps(raw | {"padding": padding}))
    assert len(load_tokenizer(path.parent).encode("one two").ids) < 10  # nothing is ever padded

    vocabulary = raw["model"]["vocab"] | {"zzz": 10**6}
    path.write_text(json.dumps(raw | {"model": raw["model"] | {"vocab": vocabulary}}))
    refused(
        "has tokens up to 1000000, .* vocab_size of config.json, 2", load_tokenizer, path.parent
    )
    for content in (b"[" * 10**6, b"{}", b"", b"\xff" * 100, b'{"version": "1.0", "model": 5}'):
        path.write_bytes(content)
        refused("tokenizer.json: .*; copy the LLM's own", load_tokenizer, path.parent)
    path.unlink()
    refused("tokenizer.json: No such file", load_tokenizer, path.parent)


# ------------------------------------------------------------------------------
# Checkpoints of this project


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
    restore(speech_lm, load_checkpoint(path), bases, path)
    for name, parameter in speech_lm.named_parameters():
        assert torch.equal(parameter, checkpoint["model"].get(name, before[name]))


def test_checkpoints_that_are_none(trained, tmp_path):
    checkpoint, path, _ = trained
    content = path.read_bytes()
    for damaged in (b"", b"\x80", content[:100], content[: len(content) // 2], b"x" * 1000):
        path.write_bytes(damaged)
        refused("align.pt: .*; give an align.pt or ift.pt", load_checkpoint, path)
    for value in (5, [], {}, {"model": 1}, torch.zeros(3), "step"):
        torch.save(value, path)
        refused("align.pt: .*; give an align.pt or ift.pt", load_checkpoint, path)
    refused("no.pt: No such file", load_checkpoint, tmp_path / "no.pt")
    refused("Is a directory", load_checkpoint, tmp_path)


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


MISFITS = [
    (dict(bases={}), "align.pt: "),
    (
        dict(bases={"encoder": {"path": "/x", "sha256": "0"}}),
        "was trained on the encoder /x, found",
    ),
    (dict(bases=5), "align.pt: "),
    (
        dict(model={"adapter.x": torch.zeros(3)}),
        "35 tensors do not fit, adapter.enc_to_dec_proj.bias",
    ),
    (dict(model={"adapter.enc_to_dec_proj.bias": 5}), "align.pt: "),
    (dict(model=[]), "align.pt: "),
]


@pytest.mark.parametrize("changes, message", MISFITS)
def test_checkpoints_that_do_not_fit(trained, changes, message):
    checkpoint, path, bases = trained
    refused(message, restore, build(bases), checkpoint | changes, bases, path)


# ------------------------------------------------------------------------------
# What is printed

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

    refused("", fail, UserError(f"{TERMINAL}\n" + "y" * 10**6))
    refused("^x.wav: first; copy it again$", fail, RuntimeError("\n first\nsecond"))
    refused("^x.wav: KeyError; copy it again$", fail, KeyError())
    refused("^x.wav: No space; copy it again$", fail, OSError(28, "No space"))
    refused(
        "^x.wav: bad; copy it again$", fail, type("PanicException", (BaseException,), {})("bad")
    )
    for kind in (KeyboardInterrupt, MemoryError, SystemExit):
        with pytest.raises(kind):
            fail(kind())
