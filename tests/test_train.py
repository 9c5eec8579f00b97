"""train.py on a tiny project of tones: command lines and phases, the figures of a run against a
recipe by hand, what a run leaves, and what it refuses."""

import contextlib
import functools
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch

import sample
import train
from conftest import (
    ESCAPES,
    gradients,
    make_project,
    move,
    place,
    save_base,
    speech_batch,
    tiny_speech_lm,
)
from data import (
    Examples,
    Manifest,
    collate,
    cut_windows,
    fbank,
    load_audio,
    make_prompt,
    open_mixture,
    render,
    schedule,
)
from model import LLM, Kernels, SpeechEncoder, SpeechLM, adapter_length, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FREE = {"audio": "a.wav", "text": "Hallo", "task": "asr", "licence": "CC0-1.0", "duration": 1}
GERMAN = {"task": "st", "target_language": "de"}
EVERYTHING = {"adapter_lr": 1e-3, "encoder_lr": 1e-3, "llm_lr": 1e-3}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------
# Runs, and what they leave


def arguments(project, out, **options):
    """The command line of a short run. True is a flag; an option that is False is not given."""
    values = {
        "phase": "align",
        "encoder": project / "encoder",
        "llm": project / "llm",
        "data": project / "train.jsonl",
        "dev": project / "dev.jsonl",
        "out": out,
        "steps": 8,
        "eval_every": 4,
        "eval_rows": 4,
        "eval_clips": 1,
        "warmup": 2,
        "adapter_lr": 3e-3,
        "batch_frames": 300,
        "workers": 0,
        "cache_gb": 0,
        "augment": 0,
        "silence": 0,
    }
    words = []
    for name, value in (values | options).items():
        if value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def log(out, phase="align"):
    text = (Path(out) / f"{phase}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(out, phase="align"):
    return [(x["step"], x["loss"], x["norm"]) for x in log(out, phase) if "loss" in x]


def saved(out, name="align.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def files(directory):
    return {path.name: path.stat().st_mtime_ns for path in Path(directory).iterdir()}


def refused(argv, message):
    """Checks that a run ends with exit code 1 and one line."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    text = stop.value.code
    assert isinstance(text, str) and text.startswith("train.py: ") and not ESCAPES.search(text)
    assert re.search(message, text) and "\n" not in text, text


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    """The rows of a manifest, for a manifest that stands elsewhere."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row | {"audio": str(path.parent / row["audio"])} for row in rows]


def features(manifest, i):
    """The frames of an example, whose audio is one window."""
    example = manifest[i]
    path = manifest.path.parent / example["audio"]
    wave = load_audio(path, example["start"], example["duration"])
    return fbank(cut_windows(wave))[0]


def sequence(example, frames, model, tokenizer):
    """What collate takes of an example that these frames are the audio of."""
    audio_frames = adapter_length(len(frames), model.adapter.config)
    prompt = make_prompt(tokenizer, model.llm.config.eos_token_id, model.prompt)
    return *render(example, audio_frames, tokenizer, prompt), frames


def inputs(batch):
    """What the model takes of a batch."""
    names = ("features", "lengths", "ids", "ids_lengths", "targets")
    return {name: batch[name] for name in names}


@pytest.fixture(scope="module")
def aligned(tiny_project, tmp_path_factory):
    """The out directory of an align run with the encoder cache, and what the run printed."""
    out = tmp_path_factory.mktemp("aligned")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train.main(arguments(tiny_project, out, steps=24, eval_every=12, cache_gb=2))
    return out, output.getvalue()


# ------------------------------------------------------------------------------
# The command line, and the phases


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in train.TrainConfig.__dataclass_fields__.values():
        assert f"--{field.name.replace('_', '-')} " in text
        assert field.metadata["help"].endswith(".") and field.metadata["help"] in text


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--fase align", "unrecognized arguments: --fase"),
        ("--step 5", "unrecognized arguments: --step"),
        ("--steps many", "invalid int value: 'many'"),
        ("--phase allign", "invalid choice: 'allign'"),
        ("--precision float16", "invalid choice: 'float16'"),
        ("--device cud", "invalid choice: 'cud'"),
        ("--accumulate 0", "--accumulate is 0, expected 1 to inf"),
        ("--clip nan", "--clip is nan"),
        ("--min-lr 5", "--min-lr is 5.0, expected 0 to 1"),
        ("--seed -1", "--seed is -1, expected 0 to inf"),
        ("--augment 2", "--augment is 2.0, expected 0 to 1"),
        ("--silence -1", "--silence is -1.0, expected 0 to 1"),
        ("--steps 0", "--steps is 0, expected 1 to inf"),
        ("--batch-frames 0", "--batch-frames is 0, expected 1 to inf"),
        ("--batch-frames many", "invalid frames_or_auto value: 'many'"),
        ("--batch-frames auto --device cpu", "--batch-frames auto is for CUDA without --fsdp"),
        ("--epochs 2 --steps 9", "--epochs and --steps exclude each other"),
        ("--lora-rank 4 --lora-targets q_prj", "--lora-targets q_prj, expected some of q_proj"),
        ("--warm-start 5 --phase ift", "--warm-start is for --phase align"),
        ("--fsdp", "--fsdp is for several ranks: torchrun"),
    ],
)
def test_bad_command_lines_exit_with_2(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        train.main(argv.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def resolved(*argv):
    return train.resolve_phase(train.parse(list(argv)))


def test_phases_fill_in_what_is_left_open(capsys):
    cfg, rates, tasks = resolved()
    assert (cfg.steps, cfg.warmup, cfg.batch_frames) == (1500, 100, 1500)
    assert rates == {"adapter": 2e-3} and tasks == ("asr",)
    assert "preset for LLMs of width 0 and above: 1500 steps" in capsys.readouterr().out
    _, rates, tasks = resolved("--phase", "ift")
    assert rates == {"adapter": 7e-4, "encoder": 1e-4, "llm": 1.5e-4}
    assert tasks == ("asr", "st", "sqa")

    # Stated values win, and 0 is one of them.
    argv = ["--phase", "ift", "--steps", "7", "--warmup", "0", "--llm-lr", "0", "--adapter-lr", "1"]
    cfg, rates, _ = resolved(*argv)
    assert (cfg.steps, cfg.warmup) == (7, 0) and rates == {"adapter": 1.0, "encoder": 1e-4}
    refused(["--adapter-lr", "0", "--out", "/nowhere/at/all"], "every learning rate is 0")


@pytest.mark.parametrize(
    "width, align, ift",
    [(1536, 2e-4, 2e-5), (1024, 2e-4, 2e-5), (576, 1e-3, 1e-4), (448, 2e-3, 1.5e-4)],
)
def test_rates_follow_the_width_of_the_llm(tiny_project, tmp_path, width, align, ift):
    config = json.loads((tiny_project / "llm" / "config.json").read_text())
    config |= {"hidden_size": width, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = ("--llm", str(tmp_path))
    assert resolved(*llm)[1] == {"adapter": align}
    assert resolved(*llm, "--phase", "ift")[1]["llm"] == ift


def test_low_rank_updates_in_either_phase_and_part():
    assert resolved("--lora-rank", "4")[1] == {"adapter": 2e-3, "llm": 2e-3}
    _, rates, _ = resolved("--lora-rank", "4", "--lora-targets", "linear_q", "--encoder-lr", "3e-4")
    assert rates == {"adapter": 2e-3, "encoder": 3e-4}
    _, rates, _ = resolved("--phase", "ift", "--lora-rank", "4", "--encoder-lr", "0")
    assert rates == {"adapter": 7e-4, "llm": 1e-3}


def build(cfg, rates):
    """A model of the base models, and its tokenizer."""
    model, _, changed = train.build(cfg, rates, {})
    assert changed == set(rates)
    return model, load_tokenizer(cfg.llm)


@pytest.mark.parametrize("rates", [{"adapter": 1e-3}, {"adapter": 1e-3, "encoder": 1e-5}])
def test_every_parameter_is_in_one_group_or_frozen(tiny_project, tmp_path, rates):
    model = build(train.parse(arguments(tiny_project, tmp_path)), rates)[0]
    parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    groups = {}
    for group in train.parameter_groups(model, rates, 0.01):
        groups |= {names[id(p)]: group for p in group["params"]}
    assert set(groups) == {name for name, p in parameters.items() if p.requires_grad}
    for name, group in groups.items():
        assert group["rate"] == rates[name.split(".")[0]]
        assert group["weight_decay"] == (0.01 if parameters[name].ndim > 1 else 0)
    assert {name for name, part in model.named_children() if part.training} == set(rates)
    assert "adapter.enc_to_dec_proj.weight" in groups  # which the reference forgot


# ------------------------------------------------------------------------------
# A step


def test_accumulation_equals_one_big_batch(tiny_project, tmp_path):
    cfg = train.parse(arguments(tiny_project, tmp_path))
    model, tokenizer = build(cfg, {"adapter": 1e-3})
    model.eval()
    manifest = Manifest(tiny_project / "train.jsonl")
    sequences = []
    for i in range(8):
        frames = features(manifest, i)
        sequences.append(sequence(manifest[i], frames, model, tokenizer))
    results = []
    for size in (8, 2):
        model.zero_grad()
        batches = [collate(sequences[i : i + size]) for i in range(0, 8, size)]
        tokens = sum(len(batch["targets"]) for batch in batches)
        for batch in batches:
            (model(**batch)[0] / tokens).backward()
        results.append(gradients(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing, compiled", [(True, False), (False, True), (True, True)])
def test_compiled_and_recomputed_layers_change_nothing(monkeypatch, checkpointing, compiled):
    """Layers are traced as for a GPU; the code generation, of a minute, is left out."""
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", traced)
    batch = None
    results = []
    for kernels in (Kernels(), train.training_kernels("cpu", checkpointing, compiled)):
        speech_lm = tiny_speech_lm(kernels=kernels, num_hidden_layers=1).train()
        del speech_lm.encoder.encoder.layers[1:]
        speech_lm.encoder.config.layerdrop = 0.0
        for part in (speech_lm.encoder, speech_lm.adapter):
            part.config.conformer_conv_dropout = 0.0 if compiled else 0.3
        batch = batch or speech_batch(speech_lm, (21, 1), (0, 1), (3, 1))
        torch.manual_seed(1)
        loss, _ = speech_lm(*batch)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(speech_lm)})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(results[0]) > 70


def test_layers_for_cuda_are_traced_as_one_graph_each(monkeypatch):
    """Without a break, and few times whatever the batches: once for each kind of layer, of which
    the LLM's last is another, and again for those that take a batch of one sequence otherwise."""
    pytest.importorskip("triton")
    from torch._dynamo.utils import counters

    traced = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    kernels = train.training_kernels("cuda", compiled=True)
    speech_lm = tiny_speech_lm("qwen3", kernels, num_hidden_layers=2).train()
    del speech_lm.encoder.encoder.layers[1:]
    place(speech_lm, "meta", torch.float32, torch.bfloat16)
    random, graphs = np.random.default_rng(0), []
    for several in (True, False):
        for _ in range(20):
            count = random.integers(2, 20) if several else 1
            sizes = [random.integers(low, 90, count).tolist() for low in (4, 0, 2)]
            loss, _ = speech_lm(*move(speech_batch(speech_lm, *sizes), "meta"))
            loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [4, 6]


def test_figures_are_read_while_the_next_step_runs(monkeypatch, tiny_project, tmp_path):
    """But before a validation, and in the end, those of every step are in the log. On CUDA they are
    copied before the next step is launched, see update."""
    events = []

    def noted(function, *args):
        events.append(function.__name__.split("_")[0])
        return function(*args)

    for name in ("backward", "finish_step", "validate_and_save"):
        monkeypatch.setattr(train, name, functools.partial(noted, getattr(train, name)))
    train.main(arguments(tiny_project, tmp_path, steps=5, eval_every=3))
    late = ["backward", "backward", "finish", "backward", "finish", "finish", "validate"]
    assert events == late + ["backward", "backward", "finish", "finish", "validate"]
    steps = [line["step"] for line in log(tmp_path) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5]


class Recipe:
    """Training as a plain loop: two batches a step, AdamW by hand-made groups, a clipped norm."""

    def __init__(self, argv):
        cfg, rates, tasks = train.resolve_phase(train.parse(argv))
        torch.manual_seed(cfg.seed)
        mixture = open_mixture(cfg.data, cfg.dev, tasks)
        self.model, tokenizer = build(cfg, rates)
        examples = Examples(
            mixture.manifests, tokenizer, make_prompt(tokenizer, [0]), self.model.adapter.config
        )
        order = schedule(mixture.manifests, mixture.weights, examples.size, 300, 4000, 0)
        self.batches = (inputs(examples[scheduled]) for scheduled in order)
        self.parameters = list(self.model.adapter.parameters())
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": 0.01},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    @torch.no_grad()
    def scale_adapter(self, batch):
        audio, _ = self.model.encode(batch["features"], batch["lengths"])
        factor = self.model.llm.model.embed_tokens.weight.std() / audio.std()
        self.model.adapter.enc_to_dec_proj.weight.mul_(factor)
        self.model.adapter.enc_to_dec_proj.bias.mul_(factor)

    def step(self, batches, rate, clip):
        """The loss, the norm of the gradients and the target tokens of a step."""
        results = [self.model(**batch) for batch in batches]
        tokens = sum(count for _, count in results)
        loss = sum(total for total, _ in results) / tokens
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in self.parameters]).norm()
        for p in self.parameters:
            p.grad.mul_(min(1, clip / (norm + 1e-6)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.item(), norm.item(), tokens


def test_a_recipe_by_hand_gives_the_logged_figures(tiny_project, tmp_path):
    encoder = shutil.copytree(tiny_project / "encoder", tmp_path / "encoder")
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"conformer_conv_dropout": 0.0}))
    options = {"steps": 5, "accumulate": 2, "clip": 0.5, "warmup": 3, "min_lr": 0.2}
    argv = arguments(tiny_project, tmp_path, encoder=encoder, eval_every=9, **options)
    train.main(argv)
    recipe = Recipe(argv)
    shares = [1 / 3, 2 / 3, 1.0, 1.0, 0.2 + 0.8 * 0.5]
    lines = [line for line in log(tmp_path) if "loss" in line]
    for share, line in zip(shares, lines, strict=True):
        batches = [next(recipe.batches) for _ in range(2)]
        if line["step"] == 1:
            recipe.scale_adapter(batches[0])
        loss, norm, tokens = recipe.step(batches, 3e-3 * share, clip=0.5)
        assert line["lr"] == pytest.approx(share) and line["tokens"] == tokens
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["norm"] == pytest.approx(norm, rel=1e-3)
        seconds = sum(sum(batch["lengths"]) for batch in batches) / 50
        assert line["audio"] == pytest.approx(seconds)


# ------------------------------------------------------------------------------
# Both phases, and what they leave


def test_what_an_align_run_prints_and_leaves(aligned):
    out, output = aligned
    assert "data: asr into en: 40 rows, 100.0 % of those drawn" in output
    assert "data: tones, CC0-1.0, into en: 0.01 h" in output
    assert "encoder: 0.05 M parameters, frozen, torch.float32 weights" in output
    assert "encoder outputs: 0.0" in output and "0 steps and 0 recordings left out" in output
    lines = [line for line in log(out) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 25))
    first, last = lines[:2], lines[-4:]
    difference = np.mean([x["loss"] for x in first]) - np.mean([x["loss"] for x in last])
    assert difference > 0.5
    validations = [line for line in log(out) if "wer" in line]
    assert [line["step"] for line in validations] == [12, 24]

    checkpoint = saved(out)
    assert checkpoint["step"] == 24 and 0 < checkpoint["window"] < 2
    assert all(name.startswith("adapter.") for name in checkpoint["model"])
    assert checkpoint["data"][0][:3] == ["tones", "CC0-1.0", "en"]
    assert set(checkpoint["bases"]) == {"encoder", "llm"} and "optimizer" not in checkpoint
    assert "tones, CC0-1.0: 0.01 h into en" in (out / "align.NOTICE").read_text()
    assert json.loads((out / "config.json").read_text()) == checkpoint["config"]
    tree = ElementTree.parse(out / "align.svg").getroot()
    curves = tree.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(curve.get("points").split()) for curve in curves] == [24, 2, 2, 2]
    assert not list(out.glob("*.tmp"))


def validation_by_hand(model, tokenizer, dev, rows):
    """dev_loss and shuffled_loss, one sequence after the other."""
    manifest = Manifest(dev)
    picks = np.random.default_rng(0).permutation(len(manifest))[:rows].tolist()
    frames = [features(manifest, i) for i in picks]
    figures = []
    for others in (frames, frames[1:] + frames[:1]):
        total, tokens = 0.0, 0
        for i, x in zip(picks, others, strict=True):
            batch = collate([sequence(manifest[i], x, model, tokenizer)])
            loss, count = model(**batch)
            total += loss.item()
            tokens += count
        figures.append(total / tokens)
    return figures


@torch.no_grad()
def test_what_was_saved_is_what_was_validated(aligned, tiny_project, capsys):
    out, _ = aligned
    model, tokenizer, _ = sample.load_model(out / "align.pt")
    figures = validation_by_hand(model, tokenizer, tiny_project / "dev.jsonl", 4)
    line = [line for line in log(out) if "wer" in line][-1]
    assert figures == pytest.approx([line["dev_loss"], line["shuffled_loss"]], rel=1e-4)
    assert figures[0] != figures[1]
    recording = str(tiny_project / "dev0.wav")
    sample.main([recording, "Transcribe the speech.", "--ckpt", str(out / "align.pt")])
    assert capsys.readouterr().out.endswith("\n")


def test_cached_states_and_loader_processes_change_nothing(aligned, tiny_project, tmp_path):
    train.main(arguments(tiny_project, tmp_path, steps=24, eval_every=12, workers=2))
    assert np.allclose(losses(tmp_path), losses(aligned[0]), rtol=1e-4)
    assert not list(tmp_path.glob("encoder-*")) and len(list(aligned[0].glob("encoder-*"))) == 1


def test_the_encoder_cache_knows_what_it_depends_on(capsys, tiny_project, tmp_path):
    project = shutil.copytree(tiny_project, tmp_path / "project")
    out = tmp_path / "out"

    def caches(**options):
        train.main(arguments(project, out, **{"steps": 1, "cache_gb": 2} | options))
        return {name: time for name, time in files(out).items() if name.startswith("encoder-")}

    first = caches()
    assert len(first) == 1 and caches() == first
    cache = next(out.glob("encoder-*"))
    complete = cache.read_bytes()
    cache.write_bytes(complete[:99])
    refused(arguments(project, out, cache_gb=2), f"{cache.name}: .*; it is damaged: remove it")
    cache.write_bytes(complete)
    wave, rate = soundfile.read(project / "train0.wav")
    soundfile.write(project / "train0.wav", wave[::-1], rate)
    assert len(caches()) == 2
    encoder = SpeechEncoder.from_pretrained(project / "encoder")
    encoder.feature_projection.projection.bias.data += 0.1
    save_base(encoder, project / "encoder")
    assert len(caches()) == 3
    capsys.readouterr()
    assert len(caches(cache_gb=1e-6)) == 3
    assert "they do not fit in --cache-gb" in capsys.readouterr().out


@pytest.mark.parametrize("cache_gb", [0, 2])
def test_changed_recordings_and_silence_are_trained_on(
    monkeypatch, tiny_project, tmp_path, cache_gb
):
    """With the encoder cache and without; validations are of the recordings as they are."""
    drawn = []

    def collate(sequences):
        drawn.extend((size, frames) for _, size, frames in sequences)
        return collate_all(sequences)

    collate_all = train.data.collate
    options = {"steps": 8, "cache_gb": cache_gb, "adapter_lr": 1e-12}
    # A new adapter would be scaled by its first batch, which differs.
    train.main(arguments(tiny_project, tmp_path / "base", **options))
    options |= {"init": tmp_path / "base" / "align.pt"}
    train.main(arguments(tiny_project, tmp_path / "plain", **options))
    options |= {"augment": 0.5, "silence": 0.2}
    monkeypatch.setattr(train.data, "collate", collate)
    train.main(arguments(tiny_project, tmp_path / "changed", **options))
    monkeypatch.undo()
    plain, changed = (log(tmp_path / name) for name in ("plain", "changed"))
    names = ("dev_loss", "shuffled_loss", "wer")
    for one, other in zip(plain, changed, strict=True):
        for name in one.keys() & set(names):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert losses(tmp_path / "plain") != losses(tmp_path / "changed")
    assert 0 < sum(size == 1 for size, _ in drawn) < len(drawn) / 3
    if cache_gb:  # nothing but a change of them leaves states of zeros
        assert any(not frames.any(1).all() for size, frames in drawn if size > 1)
    # Loader processes change nothing.
    train.main(arguments(tiny_project, tmp_path / "again", **options | {"workers": 2}))
    assert log(tmp_path / "again") == changed


@pytest.mark.parametrize("cache_gb", [0, 2])
def test_bad_recordings_are_left_out_and_named(capsys, tiny_project, tmp_path, cache_gb):
    """Of training and of validation, with the encoder cache and without."""
    rows = read_rows(tiny_project / "train.jsonl")
    bad = [rows[0] | {"audio": "none.wav"}, rows[0] | {"duration": 40.0}]
    data = write_rows(tmp_path / "train.jsonl", rows + bad)
    dev = write_rows(tmp_path / "dev.jsonl", rows[:2] + bad[:1])
    options = {"steps": 2, "batch_frames": 10**6, "max_seconds": 2, "cache_gb": cache_gb}
    train.main(arguments(tiny_project, tmp_path, data=data, dev=dev, **options))
    output = capsys.readouterr().out
    assert re.search(r"left out: .*train.jsonl line 41: .*none.wav: no such file", output)
    assert re.search("data: 1 rows are left out: .*line 42: 40.0 s of audio, .* 2 s by", output)
    assert "82 rows drawn, 0 steps and 1 recordings left out" in output
    assert re.search("validation leaves out .*dev.jsonl line 3: .*none.wav", output)
    refused(
        arguments(tiny_project, tmp_path, dev=write_rows(dev, rows[:1] + bad[:1])),
        "dev.jsonl: 1 recordings can be used, expected .*2; mend them",
    )


def test_ift_trains_everything_from_an_align_checkpoint(aligned, tiny_project, tmp_path):
    init = aligned[0] / "align.pt"
    ift = {"phase": "ift", "init": init, "steps": 3, "checkpointing": True}
    train.main(arguments(tiny_project, tmp_path, **ift, **EVERYTHING))
    weights = saved(tmp_path, "ift.pt")["model"]
    before = sample.load_model(init)[0].state_dict()
    assert set(weights) == set(before)
    unmoved = {name for name in weights if torch.equal(weights[name], before[name])}
    # A bias of the keys has no effect, and no frame may have been masked.
    assert all(name.endswith(("linear_k.bias", "masked_spec_embed")) for name in unmoved)

    # A rate of 0 freezes a part, which is then not saved.
    frozen = {"encoder_lr": 0, "llm_lr": 0, "adapter_lr": 1e-3}
    train.main(arguments(tiny_project, tmp_path, **ift | frozen | {"steps": 1}))
    assert {name.split(".")[0] for name in saved(tmp_path, "ift.pt")["model"]} == {"adapter"}


def mixed_rows(rows):
    """32 rows into German, 2 into Chinese, 4 of English, and 2 questions, one without an answer."""
    kinds = [{"task": "st", "target_language": "de"}] * 32
    kinds += [{"task": "st", "target_language": "zh"}] * 2
    kinds += [{}] * 4
    question = {"task": "sqa", "question": "Who?"}
    kinds += [question, question | {"text": "Not answerable."}]
    return [row | kind for row, kind in zip(rows, kinds, strict=True)]


def test_tasks_and_languages_by_temperature(monkeypatch, capsys, tiny_project, tmp_path):
    rows = mixed_rows(read_rows(tiny_project / "train.jsonl"))
    data = write_rows(tmp_path / "m.jsonl", rows)
    read = Examples.__getitem__
    tasks = []

    def record(self, scheduled):
        batch = read(self, scheduled)
        tasks.extend(example["task"] for example in batch["examples"])
        return batch

    monkeypatch.setattr(Examples, "__getitem__", record)
    options = {"phase": "ift", "data": data, "dev": data, "temperature": 1e9, "eval_rows": 40}
    train.main(arguments(tiny_project, tmp_path, steps=9, eval_every=9, **options))
    output = capsys.readouterr().out
    for group in ("asr into en: 4", "st into de: 32", "st into zh: 2", "sqa into en: 2"):
        assert f"data: {group} rows, 25.0 % of those drawn" in output
    assert len(tasks) > 80 and 0.15 < tasks.count("sqa") / len(tasks) < 0.4

    # The validation answers each task, and the last one sets the threshold of refusals.
    (line,) = [line for line in log(tmp_path, "ift") if "dev_loss" in line]
    assert {"wer", "bleu", "exact_match"} <= set(line)
    assert np.isfinite(saved(tmp_path, "ift.pt")["refuse_above"])


def dev_loss_of(path, project, rows=4):
    model, tokenizer, _ = sample.load_model(path)
    with torch.no_grad():
        return validation_by_hand(model, tokenizer, project / "dev.jsonl", rows)[0]


def last_dev_loss(out, phase):
    return [line for line in log(out, phase) if "dev_loss" in line][-1]["dev_loss"]


def test_a_warm_start_is_ctc_before_the_llm_has_a_part(tiny_project, tmp_path):
    """It has a warmup and a cosine of its own, and is validated by what CTC reads."""
    steps = {"steps": 24, "warm_start": 16, "eval_every": 8, "lora_rank": 2}
    train.main(arguments(tiny_project, tmp_path, **steps))
    ctc = [loss for step, loss, _ in losses(tmp_path) if step <= 16]
    assert np.mean(ctc[-4:]) < 0.7 * np.mean(ctc[:4])
    validated = {line["step"]: line for line in log(tmp_path) if "dev_loss" in line}
    assert validated.keys() == {8, 16, 24} and validated[8]["wer"] >= 0
    shares = [line["lr"] for line in log(tmp_path) if "lr" in line]
    assert shares[:2] == shares[16:18] == [0.5, 1] and shares[15] < 0.12 and shares[23] < 0.2


@pytest.mark.parametrize("phase", ["align", "ift"])
def test_low_rank_updates_are_saved_apart_and_merged_where_used(
    aligned, tiny_project, tmp_path, phase
):
    init, out = aligned[0] / "align.pt", tmp_path / "out"
    lora = {"lora_rank": 2, "lora_targets": ["q_proj", "linear_q"], "llm_lr": 1e-2, "steps": 4}
    lora |= {"phase": phase, "init": init, "encoder_lr": 1e-2}
    train.main(arguments(tiny_project, out, **lora))
    weights = saved(out, f"{phase}.pt")["model"]
    updates = {name for name in weights if ".lora_" in name}
    assert all(name in updates for name in weights if not name.startswith("adapter."))
    assert {name.split(".")[-2] for name in updates} == {"q_proj", "linear_q"}

    # Where the checkpoint is used, they are in the weights, and no other weight has moved.
    model, _, _ = sample.load_model(out / f"{phase}.pt")
    before, after = sample.load_model(init)[0].state_dict(), model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    layers = {name.rpartition(".")[0] for name in updates}
    assert {name for name in moved if not name.startswith("adapter.")} == {
        f"{layer}.weight" for layer in layers
    }
    assert dev_loss_of(out / f"{phase}.pt", tiny_project) == pytest.approx(
        last_dev_loss(out, phase), rel=1e-4
    )


def test_what_an_init_had_trained_is_never_lost(aligned, tiny_project, tmp_path):
    """Low-rank updates are trained further, merged or carried along; so are parts that freeze."""
    lora = {"lora_rank": 2, "lora_targets": ["q_proj"], "llm_lr": 1e-2, "steps": 2}
    first = tmp_path / "first"
    train.main(arguments(tiny_project, first, init=aligned[0] / "align.pt", **lora))

    def names(out):
        return {n.split(".")[0]: ".lora_" in n for n in sorted(saved(out, "ift.pt")["model"])}

    expected = {
        "on": (lora, {"adapter": False, "llm": True}),
        "other rank": (lora | {"lora_rank": 3}, {"adapter": False, "llm": False}),
        "frozen": ({"llm_lr": 0, "encoder_lr": 0, "cache_gb": 2}, {"adapter": False, "llm": False}),
        "full": ({"llm_lr": 1e-3, "encoder_lr": 0}, {"adapter": False, "llm": False}),
    }
    for name, (options, kinds) in expected.items():
        out = tmp_path / name
        options = {"phase": "ift", "init": first / "align.pt", "steps": 2} | options
        train.main(arguments(tiny_project, out, **{"encoder_lr": 0} | options))
        loaded = dev_loss_of(out / "ift.pt", tiny_project)
        assert loaded == pytest.approx(last_dev_loss(out, "ift"), rel=1e-4), name
        assert names(out) == kinds or name == "other rank"
        # A validation before the first step shows where the run begins.
        assert log(out, "ift")[0]["step"] == 0
        assert log(out, "ift")[0]["dev_loss"] == pytest.approx(
            last_dev_loss(first, "align"), rel=1e-4
        )
    refused(
        arguments(tiny_project, tmp_path / "new", init=first / "align.pt", lora_alpha=8, **lora),
        "has updates of --lora-alpha 32; give the same",
    )


def test_the_form_of_the_prompt_stays_with_the_checkpoint(tmp_path, capsys):
    """Of an instruct model, here: training, --init, --resume and answers use the same."""
    project = make_project(tmp_path, ["<|im_start|>", "<|im_end|>"], end=[277, 0])
    tokenizer = load_tokenizer(project / "llm")
    assert tokenizer.token_to_id("<|im_end|>") == 277
    options = {"steps": 2, "eval_every": 2}
    train.main(arguments(project, tmp_path / "a", show_batch=True))
    shown = capsys.readouterr().out
    assert "<|im_start|>user\\n" in shown and "<|im_end|>\\n<|im_start|>assistant\\n" in shown
    for prompt in ("auto", "plain"):
        out = tmp_path / prompt
        train.main(arguments(project, out, prompt=prompt, **options))
        train.main(arguments(project, out, prompt=prompt, steps=2, eval_every=2, resume=True))
        train.main(arguments(project, out, phase="ift", init=out / "align.pt", **options))
        kind = "plain" if prompt == "plain" else "chat"
        assert saved(out, "ift.pt")["config"]["prompt"] == kind
        model, _, _ = sample.load_model(out / "ift.pt")
        assert model.prompt == kind
        loss = dev_loss_of(out / "ift.pt", project)
        assert loss == pytest.approx(last_dev_loss(out, "ift"), rel=1e-4)
    other = "was trained with prompt 'plain', found 'chat'"
    refused(arguments(project, tmp_path / "plain", prompt="chat", resume=True, **options), other)
    assert saved(tmp_path / "auto")["model"].keys() == saved(tmp_path / "plain")["model"].keys()


def test_a_cached_encoder_is_the_base_models(aligned, tiny_project, tmp_path):
    """One that an --init has trained is run in every step, and saved again."""
    trained = {"phase": "ift", "init": aligned[0] / "align.pt", "steps": 1, **EVERYTHING}
    train.main(arguments(tiny_project, tmp_path / "ift", **trained))
    init = tmp_path / "ift" / "ift.pt"
    train.main(arguments(tiny_project, tmp_path / "on", init=init, cache_gb=2, steps=1))
    assert set(saved(tmp_path / "on")["model"]) == set(saved(init.parent, "ift.pt")["model"])
    assert not list((tmp_path / "on").glob("encoder-*"))


def test_the_mean_of_the_last_checkpoints(aligned, tiny_project, tmp_path):
    options = {"steps": 6, "eval_every": 2, "average": 2, "adapter_lr": 1e-2}
    train.main(arguments(tiny_project, tmp_path, **options))
    assert [path.name for path in tmp_path.glob("align.[0-9]*.pt")] == ["align.4.pt"]
    earlier = saved(tmp_path, "align.4.pt")["model"]
    train.main(arguments(tiny_project, tmp_path / "plain", **options | {"average": 1}))
    last = saved(tmp_path / "plain")["model"]
    for name, tensor in saved(tmp_path)["model"].items():
        torch.testing.assert_close(tensor, (earlier[name] + last[name]) / 2)
    # What is validated in the end is the mean.
    loss = last_dev_loss(tmp_path, "align")
    assert dev_loss_of(tmp_path / "align.pt", tiny_project) == pytest.approx(loss, rel=1e-4)
    assert loss != last_dev_loss(tmp_path / "plain", "align")


def test_the_mean_leaves_frozen_weights_alone(tiny_project, tmp_path):
    """In bfloat16 the mean of three equal numbers is often another number."""
    options = {"steps": 3, "eval_every": 1, "eval_clips": 0, "precision": "bfloat16"}
    train.main(arguments(tiny_project, tmp_path / "a", phase="ift", **options | EVERYTHING))
    init = tmp_path / "a" / "ift.pt"
    train.main(arguments(tiny_project, tmp_path / "b", init=init, average=3, **options))
    mean, earlier = (saved(tmp_path / "b", n)["model"] for n in ("align.pt", "align.2.pt"))
    same = {name.split(".")[0] for name in mean if torch.equal(mean[name], earlier[name])}
    moved = {name.split(".")[0] for name in mean if not torch.equal(mean[name], earlier[name])}
    assert same == {"encoder", "llm"} and moved == {"adapter"}


def test_epochs_are_passes_over_the_data(capsys, tiny_project, tmp_path):
    options = {"steps": False, "epochs": 2, "eval_every": 1000}
    train.main(arguments(tiny_project, tmp_path, **options))
    output = capsys.readouterr().out
    steps = int(re.search(r"(\d+) steps are 2 passes", output)[1])
    rows = re.search(r"(\d+) rows drawn", output)[1]
    assert log(tmp_path)[-1]["step"] == steps and 60 <= int(rows) <= 100
    train.main(arguments(tiny_project, tmp_path, resume=True, **options))
    assert f"all {steps} steps are done" in capsys.readouterr().out


def test_the_first_batch_is_shown(capsys, tiny_project, tmp_path):
    train.main(arguments(tiny_project, tmp_path / "new", show_batch=True, steps=2))
    output = capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    run = train.open_run(train.parse(arguments(tiny_project, tmp_path)))
    batch = run.examples[next(train.run_schedule(run))]
    ids = batch["ids"].split(batch["ids_lengths"])
    shown = output[output.index("train.jsonl line") :]
    for example, sequence in zip(batch["examples"], ids, strict=True):
        text, length = example["text"], len(run.examples.tokenizer.encode(example["text"]).ids) + 1
        assert f"answer  '{text}<|endoftext|>', loss, ids {sequence[-length:].tolist()}" in shown
        prompt = sequence[sequence >= 0][:-length].tolist()
        assert f"\\n{example['instruction']}\\n" in shown and f"no loss, ids {prompt}" in shown
        assert f"audio   {int((sequence < 0).sum())} frames" in shown


def test_dry_run_measures_and_leaves_nothing(monkeypatch, capsys, tiny_project, aligned):
    path = tiny_project / "train.jsonl"
    data = [f"{path}=2", path, f"{path}=0.5"]
    new = aligned[0] / "new"
    before = files(aligned[0])
    for out in (new, aligned[0]):
        train.main(arguments(tiny_project, out, data=data, dry_run=True, cache_gb=2))
    output = capsys.readouterr().out
    assert "data: asr into en: 140 rows, 100.0 % of those drawn" in output
    figures = re.search(
        r"dry run: peak memory (\S+) GB, (\S+) s a step of the largest batches, at most (\S+) h "
        r"for 8 steps, which pass over the data (\S+) times",
        output,
    )
    memory, seconds, hours, passes = map(float, figures.groups())
    assert 0.1 < memory < 10 and 0 < seconds < 60 and hours < 1
    assert passes == pytest.approx(8 * 300 / 29 / 120, abs=0.3)
    assert files(aligned[0]) == before and not new.exists()

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(SpeechLM, "forward", exhausted)
    refused(
        arguments(tiny_project, new, dry_run=True),
        "do not fit into memory; lower --batch-frames and --batch-tokens, or give --checkpointing",
    )


# ------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "row, message",
    [
        (GERMAN, "rows.jsonl: 0 rows of the tasks this phase trains, asr, expected at l"),
        ({"licence": None}, "rows.jsonl line 1: the corpus 'unknown' has the licence 'unknown'"),
        ({"text": " "}, "rows.jsonl line 1: text is ' ', expected text; mend or remove the row"),
        ({"text": "six " * 9000}, "rows.jsonl: 0 rows of the tasks this phase trains"),
        ({"instruction": "\x1b["}, "recordings could not be used, more than 1 %: .*rows.jsonl"),
    ],
)
def test_manifests_that_cannot_be_used(tiny_project, tmp_path, row, message):
    data = write_rows(tmp_path / "rows.jsonl", [FREE | row] * 40)
    for cache_gb in (0, 2):
        refused(arguments(tiny_project, tmp_path, data=data, cache_gb=cache_gb), message)


def test_bad_input_is_one_line_and_exit_1(tiny_project, tmp_path):
    def run(message, **options):
        refused(arguments(tiny_project, **{"out": tmp_path / "out"} | options), message)

    row = json.loads((tiny_project / "dev.jsonl").read_text().splitlines()[0])
    one = write_rows(tmp_path / "one.jsonl", [row])
    french = [FREE | {"task": "st", "target_language": "fr"}] * 2
    french = write_rows(tmp_path / "fr.jsonl", french)
    run("nowhere/at/all: no such directory", encoder="nowhere/at/all")
    run("model_type is 'qwen2', expected 'wav2vec2-bert'", encoder=tiny_project / "llm")
    run("none.jsonl: No such file", data=tmp_path / "none.jsonl")
    run("one.jsonl: 1 rows of the tasks this phase trains, asr, expected at least 2", dev=one)
    run("=0: a manifest of weight 0; leave it out", data=f"{one}=0")
    run("fr.jsonl line 1: demo/instructions.json has no wording", data=french, phase="ift")
    run("none.pt: No such file", init=tmp_path / "none.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    run("junk.pt: .*; give an align.pt or ift.pt of this project", init=tmp_path / "junk.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    run("other.pt: not a checkpoint of this project", init=tmp_path / "other.pt")
    (tmp_path / "file").write_text("")
    run("file: File exists|file/out: Not a directory", out=tmp_path / "file")


def test_what_is_no_users_fault_is_raised(monkeypatch, tiny_project, tmp_path):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train.main(arguments(tiny_project, tmp_path))


def test_init_fits_or_is_refused(aligned, tiny_project, tmp_path):
    train.main(arguments(tiny_project, tmp_path, steps=1, adapter_layers=1))
    init = tmp_path / "align.pt"
    ift = {"phase": "ift", "out": tmp_path, "steps": 1, "init": init}
    train.main(arguments(tiny_project, **ift))  # the adapter's shape comes with the checkpoint
    assert saved(tmp_path, "ift.pt")["adapter"]["num_adapter_layers"] == 1
    refused(
        arguments(tiny_project, **ift | {"init": tmp_path / "ift.pt"}),
        "ift.pt is what this run would replace; give another --out",
    )
    other = LLM.from_pretrained(tiny_project / "llm")
    other.model.norm.weight.data += 1
    save_base(other, tmp_path / "llm")
    shutil.copy(tiny_project / "llm" / "tokenizer.json", tmp_path / "llm")
    refused(
        arguments(tiny_project, **ift | {"llm": tmp_path / "llm"}),
        "was trained on the llm .*, found another model at .*; give the same --llm",
    )
    checkpoint = saved(tmp_path)
    del checkpoint["model"]["adapter.layers.0.ffn.output_dense.weight"]
    torch.save(checkpoint, init)
    refused(
        arguments(tiny_project, **ift),
        "1 tensors do not fit, adapter.layers.0.ffn.output_dense.weight first",
    )


def test_resume_fits_or_is_refused(capsys, aligned, tiny_project, tmp_path):
    out = shutil.copytree(aligned[0], tmp_path / "out")
    run = {"out": out, "steps": 24, "eval_every": 12, "cache_gb": 2, "resume": True}
    before = log(out)
    train.main(arguments(tiny_project, **run))
    assert "all 24 steps are done" in capsys.readouterr().out and log(out) == before
    for change, message in (
        ({"seed": 1}, "was trained with seed 0, found 1; give the same, or start anew without"),
        ({"clip": 2.0}, "was trained with clip 1.0, found 2.0"),
        ({"augment": 0.1}, "was trained with augment 0.0, found 0.1"),
        ({"silence": 0.1}, "was trained with silence 0.0, found 0.1"),
        ({"accumulate": 2}, r"was trained with accumulate \* ranks 1, found 2"),
    ):
        refused(arguments(tiny_project, **run | change), message)
    with_fewer = read_rows(tiny_project / "train.jsonl")[:5]
    data = write_rows(tmp_path / "few.jsonl", with_fewer)
    message = "was trained with .*train.jsonl of 40 rows, found .*few.jsonl of 5 rows and other"
    refused(arguments(tiny_project, **run | {"data": data}), message)
    twice = f"{tiny_project / 'train.jsonl'}=2"
    message = "found .*train.jsonl of 40 rows and other content or weight"
    refused(arguments(tiny_project, **run | {"data": twice}), message)
    newest = saved(out, "align.resume.pt")
    fewer_options = {k: v for k, v in newest["config"].items() if k != "silence"}
    for change in ({"config": fewer_options}, {"state": None}):
        older = {k: v for k, v in (newest | change).items() if v is not None}
        torch.save(older, out / "align.resume.pt")
        refused(arguments(tiny_project, **run), "is of an older version; start anew without --res")

    # A new run puts what the old one could be resumed from aside.
    train.main(arguments(tiny_project, out, seed=1, steps=1))
    assert saved(out, "align.resume.pt")["config"]["seed"] == 1 and len(log(out)) == 2
    assert saved(out, "align.resume.old.pt")["config"]["seed"] == 0


def test_models_and_manifests_are_known_by_their_content(capsys, aligned, tiny_project, tmp_path):
    """A project that moved is the same, however its paths are written."""
    out = shutil.copytree(aligned[0], tmp_path / "out")
    project = shutil.copytree(tiny_project, tmp_path / "moved")
    run = {"out": out, "steps": 24, "eval_every": 12, "cache_gb": 2, "resume": True}
    data = project / ".." / "moved" / "train.jsonl"
    train.main(arguments(project, **run, data=data))
    assert "all 24 steps are done" in capsys.readouterr().out
    other = read_rows(project / "train.jsonl")
    other[3]["text"] = "seven"
    write_rows(project / "train.jsonl", other)
    message = "train.jsonl of 40 rows, found .*train.jsonl of 40 rows and other content"
    refused(arguments(project, **run), message)


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_directory_in_use_is_refused(tiny_project, tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        for phase in ("align", "ift"):
            argv = arguments(tiny_project, tmp_path, phase=phase)
            refused(argv, "another run writes there; give another --out")
        assert list(files(tmp_path)) == [".lock"]
        train.main(arguments(tiny_project, tmp_path, dry_run=True))
    train.main(arguments(tiny_project, tmp_path, steps=1))


RANKS = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}
RANKS |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29577"}


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "has no LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start by"),
        ({"LOCAL_RANK": "0"}, "has no RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start by torch"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2"},
            "environment of several processes: has no LOCAL_RANK, RANK",
        ),
        (
            RANKS | {"RANK": "x"},
            "processes: invalid literal for int.*; start by torchrun, or unset",
        ),
        (RANKS | {"RANK": "2"}, "RANK 2 of WORLD_SIZE 2, or an impossible MASTER_PORT; start by"),
        (RANKS | {"MASTER_PORT": "0"}, "or an impossible MASTER_PORT; start by torchrun, or unset"),
        (
            {"SLURM_STEP_NUM_TASKS": "4"},
            "environment of several processes: has no LOCAL_RANK, RANK",
        ),
    ],
)
def test_half_an_environment_of_ranks_is_refused(
    monkeypatch, tiny_project, tmp_path, environment, message
):
    for name in (*train.TORCHRUN, *train.NUMBERS_OF_PROCESSES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(arguments(tiny_project, tmp_path), message)


def test_workers_are_as_many_as_shared_memory_has_room_for(
    monkeypatch, capsys, tiny_project, tmp_path
):
    usage = shutil.disk_usage

    def little(path):
        return usage(path)._replace(free=2**18) if path == "/dev/shm" else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", little)
    monkeypatch.setattr("os.path.isdir", lambda path: True)
    train.main(arguments(tiny_project, tmp_path, workers=2, steps=1))
    assert "/dev/shm has room for 0 workers only: docker run" in capsys.readouterr().out
    assert len(log(tmp_path)) == 2


def test_a_batch_too_large_for_memory_is_one_line(monkeypatch, tiny_project, tmp_path):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(SpeechLM, "forward", exhausted)
    refused(
        arguments(tiny_project, tmp_path), "a batch does not fit into memory: lower --batch-fra"
    )


def test_what_is_validated_is_saved_before_it_is_printed(monkeypatch, tiny_project, tmp_path):
    def fail(*_, **__):
        raise OSError("no terminal")

    monkeypatch.setattr(train.tqdm, "write", fail)
    with pytest.raises(SystemExit):
        train.main(arguments(tiny_project, tmp_path, steps=2, eval_every=2))
    assert saved(tmp_path)["step"] == 2 and saved(tmp_path, "align.resume.pt")["step"] == 2


# ------------------------------------------------------------------------------
# Memory

RESIDENT = """
import re
import torch
from model import keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1])

for prepare in (lambda: None, keep_freed_memory):
    prepare()
    before = resident()
    torch.ones(50_000_000)
    print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_stays_for_the_next_step():
    command = [sys.executable, "-c", RESIDENT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    returned, remaining = map(int, done.stdout.split())
    assert returned < 50_000 < 190_000 < remaining  # KB
