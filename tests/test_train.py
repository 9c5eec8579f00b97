"""train.py and the manifests and batches of data.py that feed it, on a tiny project of tones."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data
import sample
import train
from data import Examples, Manifest, ManifestError, collate, cut, load_audio, render, schedule
from model import AUDIO, AdapterConfig
from prepare.checkpoint import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def arguments(project, out, **options):
    named = dict(phase="align", encoder=project / "encoder", llm=project / "llm", data=project / "train.jsonl",
                 dev=project / "dev.jsonl", out=out, steps=8, eval_every=4, eval_rows=6, eval_clips=2, warmup=2,
                 adapter_lr=3e-3, batch_frames=300) | options
    return [word for name, value in named.items() if value is not False
            for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))]


def log(out, phase="align"):
    return [json.loads(line) for line in (Path(out) / f"{phase}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------- manifests


def write_rows(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return Manifest(path)


GOOD = {"audio": "a.wav", "text": "Hallo", "task": "asr"}
FREE = {**GOOD, "licence": "CC0-1.0"}


def test_manifest_rows(tmp_path):
    manifest = write_rows(tmp_path / "m.jsonl", GOOD, "", {**GOOD, "text": "你好", "task": "st", "target_language": "zh",
                                                           "start": 1.5, "duration": 2})
    assert len(manifest) == 2 and [row["text"] for row in manifest] == ["Hallo", "你好"]
    assert manifest[1]["where"].endswith("m.jsonl' line 3") and manifest[1] == list(manifest)[1]
    assert manifest[0]["start"] == 0 and manifest[0]["duration"] is None and manifest[0]["licence"] == "unknown"
    (tmp_path / "n.jsonl").write_text(json.dumps(GOOD))  # no newline at the end
    assert len(Manifest(tmp_path / "n.jsonl")) == 1
    parts, seconds, longest = manifest.split(["st"], 30, lambda row: None)
    assert seconds == {("unknown", "unknown", "zh"): 2} and list(parts) == [("st", "zh")] and longest == 2
    part = parts["st", "zh"]
    assert len(part) == 1 and part[0]["text"] == "你好" and [row["text"] for row in part] == ["你好"] and len(manifest) == 2
    assert manifest.split(["st"], 1.5, lambda row: None)[2] == 0


@pytest.mark.parametrize("row, message", [
    ("{oops", "line 2: not JSON"), ("[1]", "line 2: found a list, expected a JSON object"),
    ({**GOOD, "text": ""}, "line 2: text is '', expected text; add it or leave the row out"),
    ({"audio": "a.wav", "task": "asr"}, "line 2: text is None"), ({**GOOD, "audio": 5}, "line 2: audio is 5"),
    ({**GOOD, "task": "tts"}, "line 2: task is 'tts', expected one of asr, st, sqa"),
    ({**GOOD, "task": "sqa"}, "line 2: question is None, expected text"),
    ({**GOOD, "start": -1}, "line 2: start is -1, expected a number of seconds"), ({**GOOD, "duration": "3"}, "duration is '3'"),
    ('{"audio": "a", "text": "b", "task": "asr", "duration": Infinity}', "duration is inf"),
    ({**GOOD, "duration": True}, "duration is True"), ({**GOOD, "target_language": ["de"]}, "target_language is ..de.."),
    ('{"audio": "a", "text": "\\ud800", "task": "asr"}', "text is .*, expected text"), ("[" * 99999, "line 2: not JSON"),
    ({**GOOD, "instruction": 5}, "instruction is 5, expected text"),
    ({**GOOD, "style": "shouted"}, "style is 'shouted', expected written or bare"),
    ({**GOOD, "sources": ["CC0-1.0"]}, "sources is .*, expected a list of .corpus, licence."),
    ({**GOOD, "sources": [["c", 1]]}, "expected a list of .corpus, licence.")])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    manifest = write_rows(tmp_path / "m.jsonl", GOOD, row)
    for read in (lambda: manifest[1], lambda: list(manifest), lambda: manifest.split(["asr"], 30, print)):
        with pytest.raises(ManifestError, match=message) as error:
            read()
        assert "m.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_no_manifest_and_an_empty_one(tmp_path):
    with pytest.raises(ManifestError, match="none.jsonl': No such file or directory, expected a manifest"):
        Manifest(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ManifestError, match="empty.jsonl': found no rows, expected one JSON object a line"):
        Manifest(tmp_path / "empty.jsonl")


def test_parts_of_files_and_members_of_tar_shards(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 32000).astype("float32")
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "a.wav", "in/a.wav")
    for path in (tmp_path / "a.wav", tmp_path / "s.tar" / "in" / "a.wav"):
        assert np.array_equal(load_audio(path), wave)
        assert np.array_equal(load_audio(path, 0.5), wave[8000:])
        assert np.array_equal(load_audio(path, 0.25, 0.5), wave[4000:12000])
        assert data.audio_seconds(path) == 2.0
        for start, duration, message in [(3.0, None, "found no samples"), (1.5, 1.0, "found 0.50 s of audio, expected")]:
            with pytest.raises(data.AudioError, match=message):
                load_audio(path, start, duration)
    with pytest.raises(data.AudioError, match="b.wav': found no such member in the tar"):
        load_audio(tmp_path / "s.tar" / "b.wav")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(data.AudioError, match="bad.tar/b.wav': .*, expected an audio file"):
        load_audio(tmp_path / "bad.tar" / "b.wav")
    manifest = write_rows(tmp_path / "m.jsonl", {**GOOD, "audio": "s.tar/in/a.wav", "start": 1, "duration": 0.5}, GOOD)
    assert np.array_equal(manifest.audio(manifest[0]), wave[16000:24000]) and manifest.seconds(manifest[1]) == 2.0


# --------------------------------------------------------------------------------------------------------------- rows


def letters(begin=False):
    """A tokenizer of single characters, with or without a begin token."""
    tokenizer = Tokenizer(models.WordLevel({chr(c): c for c in range(128)} | {"<s>": 128}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 128)])
    return tokenizer


def test_rendered_rows_exactly():
    row = {**GOOD, "source_language": "en", "target_language": "de", "text": "ja"}

    def codes(text):
        return [ord(c) for c in text]

    asked = codes("\nTranscribe the speech.\n")
    assert render(row, 3, letters(), 0) == ([AUDIO] * 3 + asked + codes("ja") + [0], 3)
    assert render(row, 1, letters(begin=True), 9)[0] == [128, AUDIO] + asked + codes("ja") + [9]
    assert render({**row, "text": None}, 2, letters(), 0) == ([AUDIO] * 2 + asked, 0)
    assert render({**row, "instruction": "Say it"}, 1, letters(), 0)[0] == [AUDIO] + codes("\nSay it\nja") + [0]
    st, sqa = {**row, "task": "st"}, {**row, "task": "sqa", "question": "Wer?"}
    assert render(st, 0, letters(), 0)[0] == codes("\nTranslate the speech to German.\nja") + [0]
    assert render(sqa, 0, letters(), 0)[0] == codes("\nBeantworte die Frage: Wer?\nja") + [0]
    task, language = (AUDIO - 1 - data.PROMPT_TOKENS.index(t) for t in ("<|reply|>", "<|de|>"))
    assert render(sqa, 2, letters(), 0, "tokens") == ([AUDIO, AUDIO, language, task] + codes("Wer?ja") + [0], 3)
    assert render(sqa, 0, letters(), 0, "tokens", True)[0] == [language, task] + codes("2Wer?ja") + [0]
    assert len(set(data.PROMPT_TOKENS)) == 41


def test_collate_marks_exactly_the_answers():
    batch = collate([([5, 6, 7, 8], 2, torch.ones(3, 160)), ([1, 2, 3, 4, 5, 6], 3, torch.ones(5, 160)),
                     ([9, 8], 1, torch.ones(1, 160))])
    assert batch["features"].shape == (9, 160) and batch["lengths"] == [3, 5, 1] and batch["ids_lengths"] == [4, 6, 2]
    assert batch["features"].sum() == 160 * 9
    assert batch["ids"].tolist() == [5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 9, 8]
    assert batch["ids"][batch["targets"]].tolist() == [7, 8, 4, 5, 6, 8]
    assert batch["targets"].tolist() == [2, 3, 7, 8, 9, 11]


# ------------------------------------------------------------------------------------------------------------ batches


class Sized(list):
    """Stands for a manifest: a list of (frames, tokens)."""


def batches(manifests, weights, count, position=None, seed=0, frames=3000, tokens=10**6):
    stream = schedule(manifests, weights, lambda m, i, _: manifests[m][i], frames, tokens, seed, position)
    return list(itertools.islice(stream, count))


def test_budgets_are_kept_and_used_on_long_tailed_lengths():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.7, 20000).clip(10, 1500).astype(int)
    rows = Sized((int(n), int(n) // 4 + 20) for n in lengths)
    used = []
    for _, batch in batches([rows], [1], 3000, frames=6000, tokens=3000):
        frames, tokens = (sum(column) for column in zip(*(rows[i] for _, i, _ in batch)))
        assert frames <= 6000 and tokens <= 3000
        used.append(max(frames / 6000, tokens / 3000))
    assert np.mean(used) > 0.9
    assert cut([(9, 1, "a"), (5000, 1, "b"), (5000, 1, "c")], 100, 10) == [["a"], ["b"], ["c"]]


def test_every_row_once_an_epoch_in_a_new_order():
    rows = Sized((int(n), 5) for n in np.random.default_rng(1).integers(10, 500, 9000))
    stream = schedule([rows], [1], lambda m, i, _: rows[i], 3000, 10**6, 0)
    drawn = []
    while len(drawn) < 18000:
        turns = next(stream)[1]
        drawn += [i for _, i, _ in turns]
        assert all(turn in (0, 1, 2) for _, _, turn in turns)
    in_first = sum(1 for i in set(drawn[:8192]))
    assert in_first == 8192  # two whole pools of the first epoch hold no row twice
    assert sorted(set(drawn)) == list(range(9000))
    assert drawn[:9000] != drawn[9000:18000]
    assert batches([rows], [1], 50, seed=1) != batches([rows], [1], 50, seed=2)


def test_weights_mix_manifests():
    manifests = [Sized([(100, 5)] * 700), Sized([(100, 5)] * 300)]
    drawn = [m for _, batch in batches(manifests, [1, 3], 400) for m, _, _ in batch]
    assert np.mean(drawn) == pytest.approx(0.75, abs=0.03)


def test_any_position_continues_exactly():
    rows = [Sized((int(n), 5) for n in np.random.default_rng(m).integers(10, 500, 600)) for m in range(2)]
    whole = batches(rows, [2, 1], 120)
    for stop in (0, 1, 17, 60, 119):
        position = whole[stop][0]
        again = batches(rows, [2, 1], 119 - stop, json.loads(json.dumps(position)))
        assert again == whole[stop + 1:]


def test_bad_recordings_are_left_out_and_named(tiny_project, tmp_path):
    for name in ("train0.wav", "train1.wav"):
        (tmp_path / name).write_bytes((tiny_project / name).read_bytes())
    (tmp_path / "bad.wav").write_text("not audio")
    rows = [{**GOOD, "audio": a, "duration": d} for a, d in [("train0.wav", 0.25), ("bad.wav", 1), ("train1.wav", 99), ("no.wav", 1)]]
    manifest = write_rows(tmp_path / "m.jsonl", *rows)
    tokenizer = load_tokenizer(tiny_project / "llm")
    examples = Examples([manifest], tokenizer, 0, AdapterConfig())
    batch = examples[{"pool": 0, "batch": 0}, [(0, i, 0) for i in range(4)]]
    assert [row["audio"] for row in batch["rows"]] == ["train0.wav"] and len(batch["ids_lengths"]) == 1
    messages = ["line 2: .*cannot be decoded", "line 3: 99.0 s of audio, expected at most 30 s", "line 4: .*No such file"]
    for bad, message in zip(batch["bad"], messages, strict=True):
        assert re.search(message, ": ".join(bad))
    batch = examples[{"pool": 0, "batch": 0}, [(0, 1, 0)]]  # silence, of which nothing is to be learned
    assert batch["rows"] == [] and len(batch["targets"]) == 0 and batch["features"].shape == (1, 160)
    for turn in range(4):  # what the schedule is told is what the batch will be
        batch = examples[{"pool": 0, "batch": 0}, [(0, 0, turn)]]
        assert examples.size(0, 0, turn) == (batch["lengths"][0], len(batch["ids"])) and batch["lengths"] == [24]
    assert len({examples.size(0, 0, turn) for turn in range(9)}) > 2  # another wording every turn


# ----------------------------------------------------------------------------------------------------------- training


def test_schedule_of_the_learning_rate():
    cfg = train.TrainConfig(steps=100, warmup=10, min_lr=0.1)
    rates = [train.lr_at(step, cfg) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_every_parameter_is_in_one_group_or_frozen(tiny_project, tmp_path):
    for rates in ({"adapter": 1e-3}, {"adapter": 1e-3, "encoder": 1e-5, "llm": 1e-4}):
        cfg = train.parse(arguments(tiny_project, tmp_path))
        model, _, bases = train.build(cfg, rates)
        groups = train.parameter_groups(model, rates, 0.01)
        named = {id(p): name for name, p in model.named_parameters()}
        grouped = {named[id(p)]: group for group in groups for p in group["params"]}
        assert set(grouped) == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, group in grouped.items():
            assert group["rate"] == rates[name.split(".")[0]]
            assert group["weight_decay"] == (0.01 if dict(model.named_parameters())[name].ndim > 1 else 0)
        assert {part for part, module in model.named_children() if module.training} == set(rates)
        assert "adapter.enc_to_dec_proj.weight" in grouped  # which the reference forgot
    with pytest.raises(AssertionError):
        model.llm.requires_grad_(True)
        train.parameter_groups(model, {"adapter": 1e-3}, 0.01)


def test_accumulation_equals_one_big_batch(tiny_project, tmp_path):
    cfg = train.parse(arguments(tiny_project, tmp_path))
    model, tokenizer, _ = train.build(cfg, {"adapter": 1e-3})
    model.eval()
    manifest = Manifest(tiny_project / "train.jsonl")
    examples = Examples([manifest], tokenizer, 0, model.adapter.config)
    rows = [examples.example(manifest[i], examples.frames(0, i, manifest[i])) for i in range(8)]
    grads = []
    for size in (8, 2):
        model.zero_grad()
        parts = [collate(rows[i:i + size]) for i in range(0, 8, size)]
        tokens = sum(len(part["targets"]) for part in parts)
        for part in parts:
            (model(**part)[0] / tokens).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_align_end_to_end(tiny_project, tmp_path, capsys):
    torch.set_num_threads(1)
    train.main(arguments(tiny_project, tmp_path, steps=24, eval_every=12))
    said = capsys.readouterr()
    assert "data: tones, CC0-1.0, into en: " in said.out and "encoder: 0.0" in said.out and "frozen" in said.out
    assert "encoder outputs: 0.0" in said.out and "0 recordings left out" in said.out
    lines = log(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 25))
    assert np.mean([line["loss"] for line in steps[-4:]]) < np.mean([line["loss"] for line in steps[:2]]) - 0.5
    validations = [line for line in lines if "wer" in line]
    assert [line["step"] for line in validations] == [12, 24] and all("shuffled_loss" in line for line in validations)
    state = torch.load(tmp_path / "align.pt", weights_only=True)
    assert all(name.startswith("adapter.") for name in state["model"]) and "optimizer" not in state
    assert state["step"] == 24 and state["data"][0][:3] == ["tones", "CC0-1.0", "en"] and set(state["bases"]) == {"encoder", "llm"}
    curves = ElementTree.parse(tmp_path / "align.svg").getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(curve.get("points").split()) for curve in curves] == [24, 2, 2, 2]
    # what was saved is what was trained: the checkpoint alone gives the same validation loss
    model, tokenizer, state = sample.load_model(tmp_path / "align.pt")
    examples = Examples([Manifest(tiny_project / "dev.jsonl")], tokenizer, 0, model.adapter.config)
    cfg = train.TrainConfig(**state["config"])
    picks = np.random.default_rng(0).permutation(10)[:6].tolist()
    cfg.device = "cpu"
    figures, pairs = train.validate(cfg, model, examples, picks)
    assert figures["dev_loss"] == pytest.approx(validations[-1]["dev_loss"], rel=1e-4)
    assert figures["wer"] == validations[-1]["wer"] and len(pairs) == 2 and 0 < state["window"] < 2
    sample.main([str(tiny_project / "dev0.wav"), "Transcribe the English speech.", "--ckpt", str(tmp_path / "align.pt")])
    assert capsys.readouterr().out.endswith("\n")


def losses(out):
    return [(line["step"], line["loss"], line["norm"]) for line in log(out) if "loss" in line]


def test_cached_encoder_outputs_change_nothing(tiny_project, tmp_path):
    torch.set_num_threads(1)
    train.main(arguments(tiny_project, tmp_path / "a"))
    train.main(arguments(tiny_project, tmp_path / "b", cache_gb=0, workers=0))
    assert np.allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-4)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("encoder-*")}
    assert len(kept) == 1
    train.main(arguments(tiny_project, tmp_path / "a"))  # found again, not made again
    assert kept == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("encoder-*")}


def test_ift_trains_everything_from_an_align_checkpoint(tiny_project, tmp_path):
    torch.set_num_threads(1)
    train.main(arguments(tiny_project, tmp_path, steps=4))
    train.main(arguments(tiny_project, tmp_path, phase="ift", init=tmp_path / "align.pt", steps=4, adapter_lr=1e-3,
                         encoder_lr=1e-3, llm_lr=1e-3, checkpointing=True))
    align, ift = (torch.load(tmp_path / f"{phase}.pt", weights_only=True)["model"] for phase in ("align", "ift"))
    assert {name.split(".")[0] for name in ift} == {"encoder", "adapter", "llm"}
    assert not torch.equal(align["adapter.enc_to_dec_proj.weight"], ift["adapter.enc_to_dec_proj.weight"])
    before = sample.load_model(tmp_path / "align.pt")[0].state_dict()
    unmoved = [name for name in ift if torch.equal(ift[name], before[name])]
    assert all(name.endswith("linear_k.bias") or "masked_spec" in name for name in unmoved)


def test_low_rank_training_is_merged_on_saving_and_resumed(tiny_project, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    train.main(arguments(tiny_project, tmp_path, steps=2))
    ift = dict(phase="ift", init=tmp_path / "align.pt", steps=6, eval_every=3, llm_lr=1e-2, lora_rank=2, lora_targets="q_proj")
    train.main(arguments(tiny_project, tmp_path / "a", **ift))
    state = torch.load(tmp_path / "a" / "ift.pt", weights_only=True)
    before = sample.load_model(tmp_path / "align.pt")[0].state_dict()
    assert set(state["model"]) == set(before)
    moved = {name for name in before if name.startswith("llm.") and not torch.equal(before[name], state["model"][name])}
    assert moved == {name for name in before if name.endswith("q_proj.weight")}
    kept = torch.load(tmp_path / "a" / "ift.resume.pt", weights_only=True)["model"]
    assert not any(name.startswith("llm.") and "lora" not in name for name in kept)
    model, tokenizer, state = sample.load_model(tmp_path / "a" / "ift.pt")  # the merged model is the trained one
    examples = Examples([Manifest(tiny_project / "dev.jsonl")], tokenizer, 0, model.adapter.config)
    cfg = train.TrainConfig(**state["config"])
    figures, _ = train.validate(cfg, model, examples, np.random.default_rng(0).permutation(10)[:6].tolist())
    assert figures["dev_loss"] == pytest.approx([line for line in log(tmp_path / "a", "ift") if "wer" in line][-1]["dev_loss"], rel=1e-4)
    whole = log(tmp_path / "a", "ift")
    validate, calls = train.validate, []

    def stop_at_second(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*args)

    monkeypatch.setattr(train, "validate", stop_at_second)
    with pytest.raises(SystemExit):
        train.main(arguments(tiny_project, tmp_path / "b", **ift))
    train.main(arguments(tiny_project, tmp_path / "b", resume=True, **ift))
    assert log(tmp_path / "b", "ift") == whole


def test_tasks_and_languages_by_temperature(tiny_project, tmp_path, capsys):
    rows = [json.loads(line) for line in (tiny_project / "train.jsonl").read_text().splitlines()]
    made = [{**row, **extra, "audio": str(tiny_project / row["audio"])} for row, extra in zip(rows, [
        *[{"task": "st", "target_language": "de"}] * 32, *[{"task": "st", "target_language": "zh"}] * 2, *[{}] * 4,
        *[{"task": "sqa", "question": "Who?"}] * 2])]
    write_rows(tmp_path / "m.jsonl", *made)
    for temperature, shares in ((1, [4, 2, 32, 2]), (2, [2, 2**0.5, 32**0.5, 2**0.5]), (1e9, [1, 1, 1, 1])):
        cfg = train.parse(arguments(tiny_project, tmp_path, trust_paths=True, data=tmp_path / "m.jsonl",
                                    temperature=temperature))
        manifests, weights, *_ = train.open_manifests(cfg, ("asr", "st", "sqa"))
        assert [len(manifest) for manifest in manifests] == [4, 2, 32, 2]
        assert np.allclose(np.array(weights) / sum(weights), np.array(shares) / sum(shares))
    assert "data: st into de: 32 rows, 25.0 % of those drawn" in capsys.readouterr().out


def test_prompt_tokens_are_trained_in_align(tiny_project, tmp_path):
    torch.set_num_threads(1)
    train.main(arguments(tiny_project, tmp_path, prompt="tokens", length_hint=0.5, steps=3))
    trained = torch.load(tmp_path / "align.pt", weights_only=True)["model"]["adapter.prompt_tokens.weight"]
    assert trained.shape == (41, 48)
    model, _, state = sample.load_model(tmp_path / "align.pt")
    assert state["config"]["prompt"] == "tokens" and torch.equal(model.adapter.prompt_tokens.weight, trained)
    ids = torch.tensor([AUDIO - 1, AUDIO - 41, 5])
    assert torch.equal(model.embed(ids)[:2], trained[[0, 40]])
    assert torch.equal(model.embed(ids)[2], model.llm.embed(torch.tensor(5)))


def start(project, out, **options):
    command = [sys.executable, ROOT / "train.py", *arguments(project, out, **options)]
    return subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def test_killed_and_resumed_equals_uninterrupted(tiny_project, tmp_path):
    """kill -9 in the middle, twice, then --resume: the log and the weights are those of a run left alone, bit for bit."""
    options = dict(steps=400, eval_every=20, eval_clips=1, workers=0)
    assert start(tiny_project, tmp_path / "whole", **options).wait() == 0
    for lines in (30, 150):
        run = start(tiny_project, tmp_path / "killed", resume=lines > 30, **options)
        path = tmp_path / "killed" / "align.jsonl"
        while run.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        torch.load(tmp_path / "killed" / "align.pt", weights_only=True)  # whole at any moment
    assert start(tiny_project, tmp_path / "killed", resume=True, **options).wait() == 0
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    a, b = (torch.load(tmp_path / out / "align.pt", weights_only=True)["model"] for out in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, argv, message, code=1):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    said = str(stop.value.code) if code == 1 else capsys.readouterr().err
    assert re.search(message, said), said
    assert stop.value.code == code if code == 2 else said.startswith("train.py: ") and "\n" not in said


def test_bad_command_lines_exit_with_2(capsys, tiny_project, tmp_path):
    for argv, message in [(["--fase", "align"], "unrecognized arguments: --fase"), (["--steps", "many"], "invalid int value"),
                          (["--phase", "allign"], "--phase is 'allign', expected align or ift"),
                          (["--precision", "float16"], "--precision is 'float16', expected auto or float32 or bfloat16"),
                          (["--accumulate", "0"], "--accumulate is 0, expected 1 to inf"), (["--lora-rank", "4"], "--lora-rank is for phase ift"),
                          (["--lora-targets", "q_prj"], "--lora-targets are some of q_proj"), (["--min-lr", "5"], "0 to 1"),
                          (["--seed", "-1"], "--seed is -1, expected 0 to inf"), (["--fsdp"], "--fsdp is for several ranks: torchrun"), (["--device", "cud"], "--device is 'cud'")]:
        refused(capsys, argv, message, 2)


def test_bad_input_is_one_line_and_exit_1(capsys, tiny_project, tmp_path):
    def run(message, **options):
        refused(capsys, arguments(tiny_project, **{"out": tmp_path / "out", **options}), message)

    run("nowhere/at/all: no such directory", encoder="nowhere/at/all")
    run("model_type is 'qwen2', expected 'wav2vec2-bert'", encoder=tiny_project / "llm")
    run("none.jsonl': No such file", data=tmp_path / "none.jsonl")
    (tmp_path / "st.jsonl").write_text(json.dumps({**GOOD, "task": "st"}) + "\n")
    run("st.jsonl': 0 rows of the tasks this phase trains, asr, expected at least 1", data=tmp_path / "st.jsonl")
    (tmp_path / "one.jsonl").write_text((tiny_project / "dev.jsonl").read_text().splitlines()[0])
    run("one.jsonl': 1 rows of the tasks this phase trains, asr, expected at least 2", dev=tmp_path / "one.jsonl")
    (tmp_path / "fr.jsonl").write_text(json.dumps({**FREE, "target_language": "tlh"}) + "\n")
    run("--prompt tokens has no token for tlh", data=tmp_path / "fr.jsonl", prompt="tokens")
    run("=0: a manifest of weight 0; leave it out", data=f"{tiny_project / 'train.jsonl'}=0")
    (tmp_path / "fr.jsonl").write_text(2 * (json.dumps({**FREE, "task": "st", "target_language": "fr"}) + "\n"))
    run("fr.jsonl' line 1: prepare/instructions.json has no wording for the language 'fr'", data=tmp_path / "fr.jsonl", phase="ift")
    (tmp_path / "bad.jsonl").write_text(json.dumps(FREE) + "\n" + json.dumps({**FREE, "text": " "}) + "\n")
    run("bad.jsonl' line 2: text is ' ', expected text", data=tmp_path / "bad.jsonl")
    run("none.pt: no such checkpoint; train it first or correct the path", init=tmp_path / "none.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    run("junk.pt: not a checkpoint of this project", init=tmp_path / "junk.pt")
    (tmp_path / "file").write_text("")
    torch.save({"a": 1}, tmp_path / "other.pt")
    run("other.pt: not a checkpoint of this project", init=tmp_path / "other.pt")
    run("file: File exists|file/out: Not a directory", out=tmp_path / "file")
    run("step 6: loss .*, as in 5 steps in a row, .*; the last checkpoint is untouched", adapter_lr=1e30, eval_every=8)
    rows = "".join(json.dumps({**FREE, "audio": f"no{i}.wav", "duration": 1}) + "\n" for i in range(40))
    (tmp_path / "gone.jsonl").write_text(rows)
    for cache in (1, 0):
        run(r"\d+ of \d+ recordings could not be used, more than 1 %", data=tmp_path / "gone.jsonl", cache_gb=cache, workers=0)


def test_init_and_resume_fit_or_are_refused(capsys, tiny_project, tmp_path):
    torch.set_num_threads(1)
    train.main(arguments(tiny_project, tmp_path, steps=1, adapter_layers=1))
    ift = dict(phase="ift", out=tmp_path / "ift", steps=1, init=tmp_path / "align.pt")
    train.main(arguments(tiny_project, **ift))  # the adapter's shape comes with the checkpoint
    assert torch.load(tmp_path / "ift" / "ift.pt", weights_only=True)["adapter"]["num_adapter_layers"] == 1

    def run(message, **options):
        refused(capsys, arguments(tiny_project, **{"out": tmp_path, **options}), message)

    run("ift.pt holds a trained encoder and llm, which phase align would freeze", init=tmp_path / "ift" / "ift.pt")
    run("align.pt was trained with --prompt text; give the same", **{**ift, "prompt": "tokens"})
    from model import LLM
    other = LLM.from_pretrained(tiny_project / "llm")
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.json").write_bytes((tiny_project / "llm" / "tokenizer.json").read_bytes())
    run("was trained on the llm .*, found another model at .*; give the same --llm", **{**ift, "llm": tmp_path / "llm"})
    state = torch.load(tmp_path / "align.pt", weights_only=True)
    del state["model"]["adapter.layers.0.ffn.output_dense.weight"]
    torch.save(state, tmp_path / "part.pt")
    run("1 tensors of the adapter do not fit, adapter.layers.0.ffn.output_dense.weight first", **{**ift, "init": tmp_path / "part.pt"})
    out = tmp_path / "resumed"
    train.main(arguments(tiny_project, out))
    run("was trained with seed 0, found 1; give the same, or start anew", out=out, resume=True, seed=1)
    before = log(out)
    train.main(arguments(tiny_project, out, resume=True))
    assert "all 8 steps are done" in capsys.readouterr().out and log(out) == before
    train.main(arguments(tiny_project, out, seed=1, steps=4))  # a new run does not leave the old one to be resumed
    assert torch.load(out / "align.resume.pt", weights_only=True)["config"]["seed"] == 1


def test_a_recipe_by_hand_gives_the_logged_figures(tiny_project, tmp_path):
    """Loss, gradient norm and learning rate of the log against a plain loop, with two batches a step."""
    torch.set_num_threads(1)
    shutil.copytree(tiny_project / "encoder", tmp_path / "encoder")
    raw = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(raw | {"conformer_conv_dropout": 0.0}))
    argv = arguments(tiny_project, tmp_path, steps=5, accumulate=2, clip=0.5, cache_gb=0, workers=0, warmup=3, min_lr=0.2,
                     encoder=tmp_path / "encoder")
    train.main(argv)
    cfg, rates, tasks = train.settle(train.parse(argv))
    torch.manual_seed(0)
    manifests, weights, *_ = train.open_manifests(cfg, tasks)
    model, tokenizer, _ = train.build(cfg, rates)
    examples = Examples(manifests, tokenizer, 0, model.adapter.config)
    stream = (examples[scheduled] for scheduled in schedule(manifests, weights, examples.size, 300, 4000, 0))
    matrices, vectors = ([p for p in model.adapter.parameters() if (p.ndim > 1) == big] for big in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.01), dict(params=vectors, weight_decay=0.0)],
                                  betas=(0.9, 0.95))
    for step, line in enumerate(line for line in log(tmp_path) if "loss" in line):
        share = [1 / 3, 2 / 3, 1.0, 1.0, 0.2 + 0.8 * 0.5][step]
        batches = [next(stream) for _ in range(2)]
        if step == 0:
            with torch.no_grad():
                real, _ = model.encode(batches[0]["features"], batches[0]["lengths"])
                model.adapter.enc_to_dec_proj.weight.mul_(model.llm.model.embed_tokens.weight.std() / real.std())
                model.adapter.enc_to_dec_proj.bias.mul_(model.llm.model.embed_tokens.weight.std() / real.std())
        sums = [model(**train.on_device(batch, "cpu")) for batch in batches]
        tokens = sum(count for _, count in sums)
        loss = sum(total for total, _ in sums) / tokens
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.adapter.parameters()]).norm()
        for p in model.adapter.parameters():
            p.grad.mul_(min(1, 0.5 / (norm + 1e-6)))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * share
        optimizer.step()
        assert (line["tokens"], line["lr"]) == (tokens, pytest.approx(share))
        assert (line["loss"], line["norm"]) == (pytest.approx(loss.item(), rel=1e-4), pytest.approx(norm.item(), rel=1e-3))
    assert line["step"] == 5


def test_shuffled_loss(tiny_project, tmp_path):
    torch.set_num_threads(1)
    cfg = train.parse(arguments(tiny_project, tmp_path))
    model, tokenizer, _ = train.build(cfg, {"adapter": 1e-3})
    model.eval()
    dev = Manifest(tiny_project / "dev.jsonl")
    examples = Examples([dev], tokenizer, 0, model.adapter.config)
    figures, _ = train.validate(cfg, model, examples, [3, 1, 7])
    rows, frames = [dev[i] for i in (3, 1, 7)], [examples.frames(0, i, dev[i]) for i in (3, 1, 7)]
    for name, heard in (("dev_loss", (0, 1, 2)), ("shuffled_loss", (1, 2, 0))):
        batches = [collate([examples.example(row, frames[i])]) for row, i in zip(rows, heard)]
        with torch.no_grad():
            sums = [model(**batch) for batch in batches]
        assert figures[name] == pytest.approx(sum(s.item() for s, _ in sums) / sum(n for _, n in sums), rel=1e-4)
    assert figures["dev_loss"] != figures["shuffled_loss"]


def test_weights_of_manifests(tiny_project, tmp_path):
    path = tiny_project / "train.jsonl"
    cfg = train.parse(arguments(tiny_project, tmp_path))
    cfg.data, cfg.temperature = [f"{path}=2", str(path), f"{path}=0.5"], 1.0
    manifests, weights, _, hours, longest = train.open_manifests(cfg, ("asr",))
    assert weights == [80, 40, 20] and hours[0][:3] == ["tones", "CC0-1.0", "en"] and 0.5 < longest < 2


def test_the_encoder_cache_knows_what_it_depends_on(capsys, tiny_project, tmp_path):
    torch.set_num_threads(1)
    shutil.copytree(tiny_project, tmp_path / "p")
    out = tmp_path / "out"

    def caches(**options):
        train.main(arguments(tmp_path / "p", out, steps=2, eval_every=2, **options))
        return len(list(out.glob("encoder-*.pt")))

    assert caches() == 1
    first = losses(out)
    (next(out.glob("encoder-*.pt"))).write_bytes(b"")  # cut: made again
    assert caches() == 1 and losses(out) == first
    wave, _ = soundfile.read(tmp_path / "p" / "train0.wav")
    soundfile.write(tmp_path / "p" / "train0.wav", wave[::-1], 16000)
    assert caches() == 2
    from model import SpeechEncoder
    encoder = SpeechEncoder.from_pretrained(tmp_path / "p" / "encoder")
    encoder.feature_projection.projection.bias.data += 0.1
    encoder.save_pretrained(tmp_path / "p" / "encoder")
    assert caches() == 3
    capsys.readouterr()
    assert caches(cache_gb=1e-6) == 3 and "they do not fit in --cache-gb 1e-06" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "p" / "train.jsonl").read_text().splitlines()]
    (tmp_path / "p" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + [
        {**rows[0], "audio": "none.wav"}, {**rows[0], "duration": 40.0}]))
    for cache_gb in (2.0, 0.0):  # the same rows are left out with the cache and without
        train.main(arguments(tmp_path / "p", out, steps=12, cache_gb=cache_gb, max_seconds=2, workers=0))
        said = capsys.readouterr().out
        assert "line 41: " in said and "No such file" in said and "2 recordings left out" in said
        assert re.search("line 42: .*(longer than 2 s|40.0 s of audio, expected at most 2 s)", said)


def test_length_hints_are_drawn_by_the_seed(tiny_project):
    manifest = Manifest(tiny_project / "train.jsonl")
    tokenizer = load_tokenizer(tiny_project / "llm")
    config = AdapterConfig()

    def hinted(seed, share):
        examples = Examples([manifest], tokenizer, 0, config, "tokens", share, seed=seed)
        return examples[{"pool": 0, "batch": 3}, [(0, i, 0) for i in range(12)]]["ids"].tolist()

    assert hinted(0, 0.5) == hinted(0, 0.5) != hinted(1, 0.5)
    assert hinted(0, 0.0) != hinted(0, 1.0)


def test_dead_worker_and_interrupt(capsys, monkeypatch, tiny_project, tmp_path):
    torch.set_num_threads(1)
    read = Examples.__getitem__
    for error, code in ((RuntimeError("DataLoader worker (pid 7) is killed"), "a loader process died .*killed"),
                        (KeyboardInterrupt(), "130")):
        def broken(*args, error=error, calls=itertools.count()):
            if next(calls):  # the first is for the scale of the new adapter
                raise error
            return read(*args)

        monkeypatch.setattr(Examples, "__getitem__", broken)
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(tiny_project, tmp_path, workers=0))
        assert re.search(code, str(stop.value.code))


def test_a_full_disk_keeps_the_last_checkpoint(capsys, monkeypatch, tiny_project, tmp_path):
    torch.set_num_threads(1)
    train.main(arguments(tiny_project, tmp_path, steps=4))
    before = (tmp_path / "align.pt").read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device", "align.pt.tmp")

    monkeypatch.setattr(torch, "save", full)
    refused(capsys, arguments(tiny_project, tmp_path, steps=4, seed=1),
            "align.pt.tmp: No space left on device; what was saved before is intact")

    def fuller(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 1 vs 2")

    monkeypatch.setattr(torch, "save", fuller)
    refused(capsys, arguments(tiny_project, tmp_path, steps=4, seed=1), "align.pt: could not be written to the end")
    assert (tmp_path / "align.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step():
    """After keep_freed, a large tensor's memory is still the process's when the tensor is gone."""
    code = """if True:
        import re, torch
        from prepare.memory import keep_freed
        def resident():
            return int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1])
        for keep in (lambda: None, keep_freed):
            keep()
            before = resident()
            torch.ones(50_000_000)
            print(resident() - before)"""
    given_back, kept = map(int, subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                                               check=True).stdout.split())
    assert given_back < 50_000 < 190_000 < kept  # KB
