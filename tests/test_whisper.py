"""Whisper's encoder and features against transformers, and everything that a run does with it."""

import io
import json
import re
from contextlib import redirect_stdout

import numpy as np
import pytest
import soundfile
import torch
from test_resume import assert_same_run, signal_at, stopped
from test_train import EVERYTHING, arguments, log, losses, read_rows, refused, saved, write_rows

import data
import eval
import model
import sample
import train
from conftest import gradients, make_project, randomise, relative_error, save_base
from conftest import refused as one_line

RATE = 16000
CONFIG = dict(
    d_model=32,
    encoder_layers=3,
    encoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_layers=1,
    decoder_attention_heads=4,
    decoder_ffn_dim=48,
    vocab_size=60,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
    decoder_start_token_id=1,
)


def peer_whisper(bins=80, positions=100):
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(**CONFIG, num_mel_bins=bins, max_source_positions=positions)
    return randomise(WhisperModel(config))


def peer_states(peer, x):
    """The peer's states of features (F, 2 * bins), by an encoder of just so many positions, as it
    takes no shorter windows than it has positions for."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = type(peer.config)(**{**peer.config.to_dict(), "max_source_positions": len(x)})
    encoder = WhisperEncoder(config).eval()
    state = dict(peer.encoder.state_dict())
    state["embed_positions.weight"] = state["embed_positions.weight"][: len(x)]
    encoder.load_state_dict(state)
    return encoder(x.reshape(1, 2 * len(x), -1).mT).last_hidden_state[0]


def tiny_whisper(bins=80, **options):
    config = model.WhisperConfig.from_dict(peer_whisper(bins).config.to_dict())
    return randomise(model.WhisperEncoder(config, **options))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose encoder is the encoder of a whole Whisper model."""
    directory = make_project(tmp_path_factory.mktemp("whisper"))
    (directory / "encoder" / "model.safetensors").unlink()
    peer_whisper().save_pretrained(directory / "encoder")
    return directory


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------
# Features


@pytest.mark.parametrize("bins", [80, 128])
def test_features_are_the_extractors(bins):
    """Which fills up to 30 s with silence. Any number of samples gives whole frames."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=bins)
    noise = torch.Generator().manual_seed(0)
    lengths = [560, 8000, 3 * RATE, 40001, 29 * RATE + 777]
    waves = [0.1 * torch.randn(n, generator=noise) for n in lengths]
    waves.append(torch.sin(torch.arange(RATE) / 5))  # nearly empty bins
    features, frames = data.log_mel(waves, bins)
    assert frames == [-(-len(wave) // 320) for wave in waves] and len(features) == sum(frames)
    for wave, ours in zip(waves, features.split(frames), strict=True):
        theirs = extractor(wave.numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]
        theirs = theirs[:, : 2 * len(ours)].T.reshape(len(ours), -1)
        assert (ours - theirs).abs().max() < 1e-4


def test_every_family_has_features():
    assert model.ENCODERS.keys() == data.FEATURES.keys()
    for config in (model.EncoderConfig(), tiny_whisper().config, tiny_whisper(128).config):
        waves = [torch.randn(n) for n in (8000, 12345, 30 * RATE)]
        features, lengths = data.extract_features(waves, config)
        assert features.shape == (sum(lengths), config.feature_projection_input_dim)
        assert lengths == [data.feature_length(len(wave) / RATE, config) for wave in waves]


# ------------------------------------------------------------------------------
# States


@torch.no_grad()
@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("kernels", [model.Kernels(), model.default_kernels("cpu")])
def test_encoder_equals_peer(bins, kernels):
    peer, ours = peer_whisper(bins), tiny_whisper(bins, kernels=kernels)
    ours.load_state_dict(peer.encoder.state_dict())
    features, lengths = torch.randn(136, 2 * bins), [100, 33, 1, 2]
    states = ours(features, lengths).split(lengths)
    for x, y in zip(features.split(lengths), states, strict=True):
        assert relative_error(y, peer_states(peer, x)) < 1e-5


def test_gradients_equal_those_of_single_rows():
    ours = tiny_whisper()
    features, lengths = torch.randn(60, 160), [40, 19, 1]
    ours(features, lengths).square().sum().backward()
    together = gradients(ours)
    ours.zero_grad()
    for x in features.split(lengths):
        ours(x, [len(x)]).square().sum().backward()
    for name, gradient in gradients(ours).items():
        assert relative_error(together[name], gradient) < 1e-4, name


def test_compiled_equals_eager():
    ours, x = tiny_whisper(), torch.randn(30, 160)
    compiled = torch.compile(ours, fullgraph=True, dynamic=False, backend="aot_eager")
    results = []
    for encoder in (ours, compiled):
        ours.zero_grad()
        encoder(x, [20, 10]).square().sum().backward()
        results.append(gradients(ours))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_whole_models_and_encoders_load(project, tmp_path):
    """In bfloat16, too; what is saved is loaded again, and by transformers."""
    from transformers.models.whisper.modeling_whisper import WhisperConfig, WhisperEncoder

    encoder = model.encoder_class(project / "encoder").from_pretrained(project / "encoder")
    assert isinstance(encoder, model.WhisperEncoder)
    save_base(encoder, tmp_path)
    again = model.WhisperEncoder.from_pretrained(tmp_path)
    x = torch.randn(50, 160)
    assert torch.equal(encoder(x, [50]), again(x, [50]))
    half = model.WhisperEncoder.from_pretrained(tmp_path, torch.bfloat16)
    assert relative_error(half(x, [50]), encoder(x, [50])) < 0.05
    config = WhisperConfig.from_pretrained(tmp_path)
    peer = WhisperEncoder(config)
    peer.load_state_dict(again.state_dict())


def test_the_published_sizes():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    large = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120)
    config = WhisperConfig(**large, num_mel_bins=128)
    with torch.device("meta"):
        ours = model.WhisperEncoder(model.WhisperConfig.from_dict(config.to_dict()))
        peer = WhisperEncoder(config)
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (ours, peer)]
    assert shapes[0] == shapes[1]


BAD_CONFIGS = {
    "num_mel_bins is 64, expected 80 or 128": {"num_mel_bins": 64},
    "num_mel_bins is 0": {"num_mel_bins": None},
    "model_type is 'wavlm', expected 'wav2vec2-bert' or 'whisper'": {"model_type": "wavlm"},
    "encoder_layerdrop is 0.1": {"encoder_layerdrop": 0.1},
    "activation_function is 'tanh'": {"activation_function": "tanh"},
    "hidden_size 32 is no multiple of num_attention_heads 5": {"encoder_attention_heads": 5},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_other_checkpoints_are_refused(project, tmp_path, message):
    raw = json.loads((project / "encoder" / "config.json").read_text()) | BAD_CONFIGS[message]
    raw = {name: value for name, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))

    def load():
        model.encoder_class(tmp_path).read_config(tmp_path)

    assert message in one_line("config.json: ", load)


# ------------------------------------------------------------------------------
# Runs


def test_both_phases_answer_and_are_scored(project, tmp_path, capsys):
    """Phase align with cached states, without, and after a stop are the same."""
    options = {"max_seconds": 2, "steps": 6, "eval_every": 3}
    train.main(arguments(project, tmp_path / "a", **options, cache_gb=2))
    assert len(list((tmp_path / "a").glob("encoder-*.pt"))) == 1
    train.main(arguments(project, tmp_path / "b", **options))
    for x, y in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    init = tmp_path / "a" / "align.pt"
    ift = options | EVERYTHING | {"phase": "ift", "init": init}
    train.main(arguments(project, tmp_path / "a", **ift))
    assert {name.split(".")[0] for name in saved(tmp_path / "a", "ift.pt")["model"]} == {
        "encoder",
        "adapter",
        "llm",
    }
    ckpt = ["--ckpt", str(tmp_path / "a" / "ift.pt")]
    capsys.readouterr()
    sample.main([str(project / "dev0.wav"), "Transcribe.", "--json", *ckpt])
    assert json.loads(capsys.readouterr().out)["task"] == "asr"
    eval.main([str(project / "dev.jsonl"), *ckpt, "--out", str(tmp_path / "eval")])
    assert re.search(r"asr en, all, 10: WER", capsys.readouterr().out)


@pytest.mark.parametrize("options", [{}, EVERYTHING | {"lora_rank": 2, "lora_targets": ["fc1"]}])
def test_a_run_is_resumed(monkeypatch, project, tmp_path, options):
    options = options | {"max_seconds": 2, "cache_gb": 0 if options else 2}
    train.main(arguments(project, tmp_path / "one", **options))
    with monkeypatch.context() as patch:
        signal_at(patch, train, "backward", 6, 15)
        assert stopped(arguments(project, tmp_path / "two", **options)) == 143
    assert len([line for line in log(tmp_path / "two") if "loss" in line]) == 6
    train.main(arguments(project, tmp_path / "two", **options, resume=True))
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_dry_run(project, tmp_path):
    out = io.StringIO()
    with redirect_stdout(out):
        train.main(arguments(project, tmp_path, dry_run=True, max_seconds=2))
    assert "memory" in out.getvalue() and not list(tmp_path.iterdir())


def test_windows_are_as_long_as_there_are_positions(project, tmp_path):
    """100 positions, 2 s, of this encoder."""
    message = "--max-seconds 30: the encoder takes up to 2 s"
    refused(arguments(project, tmp_path, max_seconds=30), message)
    encoder = tiny_whisper()
    one_line("a window of 2.02 s, expected at most 2 s", encoder, torch.randn(101, 160), [101])
    soundfile.write(tmp_path / "long.wav", np.zeros(40000, np.float32), RATE)
    rows = read_rows(project / "train.jsonl")[:4]
    long = rows[0] | {"audio": str(tmp_path / "long.wav"), "duration": 2.5}
    rows = write_rows(tmp_path / "rows.jsonl", [*rows, long])
    out = io.StringIO()
    with redirect_stdout(out):
        train.main(arguments(project, tmp_path / "out", data=rows, max_seconds=2, steps=1))
    assert "1 rows are left out" in out.getvalue()
    assert saved(tmp_path / "out")["window"] <= 2


def test_a_checkpoint_of_another_encoder_is_refused(project, tiny_project, tmp_path):
    train.main(arguments(tiny_project, tmp_path / "a", steps=1))
    init = tmp_path / "a" / "align.pt"
    options = {"init": init, "max_seconds": 2, "out": tmp_path / "b"}
    refused(arguments(project, **options), "was trained on the encoder")
