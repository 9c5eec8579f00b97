"""eval.py: scores against those of jiwer and sacrebleu and by hand, answers that outlast a stop,
and the command."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import sacrebleu
import soundfile
import torch
from test_sample import make_folder, run, write_checkpoint

import data
import eval
import sample
from data import REFUSALS, AudioError, Manifest, instruction_of, load_audio
from eval import Answer, Journal, corpus_scores, item_scores, normalise


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------
# Scores


def item(task, language, reference, hypothesis, **more):
    scores = item_scores(task, language, reference, hypothesis)
    texts = {"reference": reference, "hypothesis": hypothesis, "scores": scores}
    kind = {"task": task, "target_language": language, "corpus": "c", "speaker": "s"}
    return kind | texts | more


def test_word_and_character_errors_are_those_of_jiwer():
    pairs = [
        ("Mr. Smith's colour is grey.", "mister smith's color is gray"),
        ("Red, green blue", "red blue pink"),
        ("Hmm.", "a"),  # nothing is left of it
        ("Hmm.", "hmm"),
        ("five", ""),
    ]
    items = [item("asr", "en", *pair) for pair in pairs]
    assert [x["scores"]["error"] for x in items] == [0, pytest.approx(2 / 3), 1, 0, 1]
    scores, _ = corpus_scores(items)
    references = [normalise(reference, "en") for reference, _ in pairs]
    hypotheses = [normalise(hypothesis, "en") for _, hypothesis in pairs]
    assert scores["WER"][0] == pytest.approx(jiwer.wer(references, hypotheses))
    assert scores["CER"][0] == pytest.approx(jiwer.cer(references, hypotheses))


def test_words_where_nobody_speaks_are_invented():
    for task, language in (("asr", "en"), ("asr", "zh"), ("st", "de")):
        items = [item(task, language, "", text) for text in ("", "na so was", "x", "")]
        assert items[0]["scores"]["error"] == 0 and items[1]["scores"]["error"] >= 1
        scores, signatures = corpus_scores(items)
        assert list(scores) == ["invented"] and not signatures
        value, low, high = scores["invented"]
        assert value == 0.5 and low < 0.5 < high
    # Beside others, these words are errors as any, and the share is of silence alone.
    items = [item("asr", "en", *pair) for pair in (("a b c d", "a b c"), ("", "x"), ("", ""))]
    scores, _ = corpus_scores(items)
    assert scores["WER"][0] == 2 / 4 and scores["invented"][0] == 1 / 2
    assert "invented" not in corpus_scores(items[:1])[0]
    assert "invented" not in corpus_scores([item("sqa", "en", "a", "b")])[0]
    translations = [item("st", "de", *pair) for pair in (("ja gut", "ja gut"), ("", ""))]
    assert list(corpus_scores(translations)[0]) == ["invented", "BLEU", "chrF2"]


def test_errors_of_other_languages():
    assert item_scores("asr", "de", "Der Hund, ja.", "der hund JA")["error"] == 0
    assert item_scores("asr", "de", "colour", "color")["word_errors"] == 1
    # Chinese characters are words.
    assert item_scores("asr", "zh", "你好世界", "你好世")["word_errors"] == 1
    half = item_scores("asr", "zh", "你好世界", "你好市界")
    assert (half["character_errors"], half["characters"], half["words"]) == (1, 4, 4)


@pytest.mark.parametrize("language", ["yue", "ja", "th", "lo", "km", "my"])
def test_scripts_without_spaces_are_scored_by_characters(language):
    reference, hypothesis = "กขคง จฉ", "กขค จฉช"
    if language in ("yue", "ja"):
        reference, hypothesis = "黄鸟在花 园里", "黄鸟在 园里睡"
    scores = item_scores("asr", language, reference, hypothesis)
    assert (scores["word_errors"], scores["words"]) == (2, 6)
    assert (scores["character_errors"], scores["characters"]) == (2, 6)
    assert item_scores("sqa", language, reference, hypothesis)["f1"] == pytest.approx(5 / 6)


def test_tokenizers_of_bleu(monkeypatch):
    pairs = [item("st", "ja", "黄鸟在花园里睡觉。", "黄鸟在花园里睡。")]
    assert corpus_scores(pairs)[0]["BLEU"][0] > 50
    expected = {"yue": "zh", "ja": "char", "ko": "char", "th": "char", "my": "char", "it": "13a"}
    bleu = sacrebleu.BLEU

    def without_mecab(tokenize):
        if "mecab" in tokenize:
            raise RuntimeError("requires extra dependencies")
        return bleu(tokenize=tokenize)

    monkeypatch.setattr(sacrebleu, "BLEU", without_mecab)
    for language, tokenizer in expected.items():
        _, signatures = corpus_scores([item("st", language, "a b", "a b")])
        assert f"tok:{tokenizer}|" in signatures[f"BLEU {language}"]
    monkeypatch.setattr(sacrebleu, "BLEU", lambda tokenize: tokenize)
    assert [eval.bleu(language) for language in ("ja", "ko")] == ["ja-mecab", "ko-mecab"]


GERMAN = [
    ("Der gelbe Vogel schläft im Garten.", "Der gelbe Vogel schläft heute im Garten."),
    ("Das ist ein sehr guter Tag.", "Das ist ein sehr guter Tag."),
]
CHINESE = [
    ("黄色的鸟每天在花园里睡觉。", "黄鸟每天在花园里睡觉。"),
    ("今天天气很好。", "今天天气很好。"),
]


@pytest.mark.parametrize(
    "language, tokenize, pairs", [("de", "13a", GERMAN), ("zh", "zh", CHINESE)]
)
def test_bleu_and_chrf_are_those_of_sacrebleu(language, tokenize, pairs):
    items = [item("st", language, *pair) for pair in pairs * 3]
    scores, signatures = corpus_scores(items)
    references, hypotheses = zip(*pairs * 3, strict=True)
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenize)
    chrf = sacrebleu.corpus_chrf(hypotheses, [references])
    assert scores["BLEU"][0] == pytest.approx(bleu.score)
    assert scores["chrF2"][0] == pytest.approx(chrf.score)
    assert scores["BLEU"][1] < scores["BLEU"][0] < scores["BLEU"][2]
    assert f"tok:{tokenize}" in signatures[f"BLEU {language}"]


@pytest.mark.parametrize(
    "language, reference, hypothesis",
    [
        ("th", "ดี", "ดุ"),
        ("lo", "ດີ", "ດຸ"),
        ("km", "គឺ", "គូ"),
        ("hi", "किताब", "कुतुब"),
        ("ar", "كَتَبَ", "كُتِب"),
    ],
)
def test_marks_of_vowels_and_tones_count(language, reference, hypothesis):
    scores = item_scores("asr", language, reference, hypothesis)
    assert scores["word_errors"] == 1 == scores["words"] and scores["character_errors"] > 0
    assert item_scores("asr", language, reference, f"{reference}!")["word_errors"] == 0


def test_codes_of_languages_in_any_spelling():
    texts = "黄鸟在花园里睡觉。", "黄鸟在花园睡觉"
    expected = item_scores("asr", "zh", *texts)
    assert expected["error"] == 1 / 8
    for code in ("zh-CN", "zh_TW", "ZH", "cmn", "yue", "ja", "ja-JP"):
        assert item_scores("asr", code, *texts) == expected
    assert item_scores("asr", "en-US", "Colour", "color!")["error"] == 0
    tokenizers = [eval.bleu(code).tokenizer.signature() for code in ("zh_CN", "yue", "de-AT")]
    assert tokenizers == ["zh", "zh", "13a"]


def test_questions_are_scored_with_their_refusals():
    no = REFUSALS["de"]
    pairs = [("Der Hund.", "der Hund"), ("Im Garten", "im grünen Garten"), ("rot", no)]
    pairs += [(no, no), (no, "blau"), (no, REFUSALS["en"])]  # a refusal in any language is one
    items = [item("sqa", "de", *pair) for pair in pairs]
    assert [x["scores"]["error"] for x in items] == [0, pytest.approx(0.6), 1, 0, 1, 0]
    for language in REFUSALS:
        for refusal in REFUSALS.values():
            assert item_scores("sqa", language, "x", refusal)["refused"]
    scores, _ = corpus_scores(items)
    assert all(low <= value <= high for value, low, high in scores.values())
    expected = {"exact match": 1 / 3, "F1": (1 + 0.8 + 0) / 3, "false refusals": 1 / 3}
    expected |= {"refusal precision": 2 / 3, "refusal recall": 2 / 3}
    assert {name: value for name, (value, *_) in scores.items()} == pytest.approx(expected)
    assert "refusal precision" not in corpus_scores(items[:2])[0]


def test_bootstrap_intervals():
    """That of a rate is close to the one of a binomial share."""
    random = np.random.default_rng(0)
    items = [item("sqa", "en", "a", "a" if random.random() < 0.7 else "b") for _ in range(400)]
    value, low, high = corpus_scores(items)[0]["exact match"]
    half = 1.96 * math.sqrt(value * (1 - value) / 400)
    assert [low, high] == pytest.approx([value - half, value + half], abs=0.01)
    assert corpus_scores(items)[0]["exact match"] == (value, low, high)  # the draws are the same
    assert corpus_scores(items, draws=0)[0]["exact match"] == (value, None, None)
    assert corpus_scores([item("st", "de", "ja", "nein")] * 2)[0]["BLEU"] == (0, 0, 0)


def test_groups_of_the_summary():
    items = [item("st", "de", "ja", "ja")]
    for i in range(20):
        more = {"speaker": f"s{i % 3 if i < 9 else 0}", "corpus": "cd"[i % 2]}
        items.append(item("asr", "en", "a b", "a b" if i % 2 else "a", **more))
    table, signatures = eval.summarise(items, least=10)
    assert [(line["task"], line["group"], line["items"]) for line in table] == [
        ("asr", "all", 20),
        ("asr", "corpus c", 10),
        ("asr", "corpus d", 10),
        ("asr", "speaker s0", 14),
        ("asr", "other speakers", 6),
        ("st", "all", 1),
    ]
    assert [line["scores"]["WER"][0] for line in table[:3]] == [0.25, 0.5, 0]
    assert set(signatures) == {"BLEU de", "chrF2 de"}


def test_figures_of_a_validation():
    """Each is the mean of those of the languages."""
    rows = [
        ("asr", "en", "a b", "a"),
        ("asr", "de", "eins", "eins"),
        ("st", "de", *GERMAN[1]),
        ("sqa", "en", "red", "red"),
        ("sqa", "en", REFUSALS["en"], "red"),
        ("sqa", "de", "rot", REFUSALS["de"]),
    ]
    pairs = []
    for task, language, text, answer in rows:
        pairs.append(({"task": task, "target_language": language, "text": text}, answer))
    figures = {
        "wer": 0.25,
        "bleu": 100,
        "exact_match": 0.5,
        "refusal_recall": 0,
        "false_refusals": 0.5,
    }
    assert eval.validation_scores(pairs) == pytest.approx(figures)
    assert eval.validation_scores(pairs[:2]) == {"wer": 0.25} and eval.validation_scores([]) == {}


def test_the_threshold_of_refusing():
    """It refuses as much as an eighth of the questions that have an answer allows."""
    margins = [-9, 0.5, -8, -7, -6, -5, 2, -4, -3, -2, -1, 0, 1, 3, -9, -9, -5, 1.5, 4]
    answers = [Answer("", margin, "a") for margin in margins]
    examples = [{"text": "a"}] * 16 + [{"text": REFUSALS["de"]}] * 3

    def threshold(part):
        return eval.refusal_threshold(examples[part], answers[part])

    assert threshold(slice(None)) == {"refuse_above": 1}  # 2 of 16 are above it
    assert threshold(slice(10, None)) == {"refuse_above": 3}  # of six none may be lost
    assert threshold(slice(16)) == threshold(slice(16, None)) == threshold(slice(0)) == {}
    answers[18] = AudioError("")
    assert threshold(slice(None)) == {"refuse_above": 1} and threshold(slice(18, None)) == {}


# ------------------------------------------------------------------------------
# Journals

HOSTILE = 'a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\r\nh\x00 \x1b[m \ufeff"\\ 中𝄞'
ITEMS = [{"id": str(i), "text": HOSTILE * i} for i in range(3)]


def write_items(path):
    journal = Journal(path, {"beams": 1})
    for x in ITEMS:
        journal.add(x)


def test_a_journal_goes_on_where_it_stopped(tmp_path, capsys):
    """Wherever a kill or a full disk tore the last line, be it within a character."""
    path = tmp_path / "new" / "a.jsonl"
    write_items(path)
    assert capsys.readouterr().out == ""
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == ITEMS
    for size in range(len(lines[2]) + 1):
        path.write_bytes(b"".join(lines[:2]) + lines[2][:size])
        journal = Journal(path, {"beams": 1})
        complete = 3 if size >= len(lines[2]) - 1 else 2
        assert list(journal.items.values()) == ITEMS[:complete]
        assert capsys.readouterr().out == f"{path}: {complete} items are there already\n"
        if complete == 2:
            journal.add(ITEMS[2])
        assert path.read_bytes() == b"".join(lines)
    journal.add({"id": "1"})  # anew
    assert Journal(path, {"beams": 1}).items == {x["id"]: x for x in ITEMS} | {"1": {"id": "1"}}


def test_items_of_other_settings_are_moved_aside(tmp_path, capsys):
    path = tmp_path / "a.b.jsonl"
    write_items(path)
    before = path.read_bytes()
    texts = ['{"settings": {"beams": 2}}', "", "[1]", '"settings"', "{}", "\xff", "null", None]
    for number, text in enumerate(texts, 1):
        if text is None:
            path.with_suffix(".json").unlink()
        else:
            path.with_suffix(".json").write_text(text, encoding="latin-1")
        assert not Journal(path, {"beams": 1}).items and path.read_bytes() == b""
        assert (tmp_path / f"a.b.old{number}.jsonl").read_bytes() == before
        assert f"of other settings, now in a.b.old{number}.jsonl" in capsys.readouterr().out
        path.write_bytes(before)
    assert len(Journal(path, {"beams": 1}).items) == 3
    path.write_bytes(b"")
    assert not Journal(path, {"beams": 3}).items and "other settings" not in capsys.readouterr().out


# ------------------------------------------------------------------------------
# Answering


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a checkpoint is, and a manifest of three rows about each of eight recordings."""
    return make_folder(tmp_path_factory.mktemp("eval"))


def read_items(path):
    return {x["id"]: x for x in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def answer_by_hand(example, model, tokenizer, checkpoint):
    recordings = sample.encode_waves(model, [load_audio(example["audio"])], 1.0)
    refuse_above = checkpoint["refuse_above"]
    return sample.answer_examples(model, tokenizer, [example], recordings, refuse_above)[0]


def test_groups_of_recordings():
    def sizes(*seconds):
        examples = [{"audio": str(i), "seconds": s} for i, s in enumerate(seconds)]
        groups = eval.group_recordings(examples)
        return [[example["seconds"] for example in group] for group in groups]

    assert sizes(100, 300, 200, 250) == [[300, 250], [200, 100]]
    assert sizes(700, 900, 1) == [[900], [700], [1]] and sizes() == []
    assert list(map(len, sizes(*[1] * 70))) == [32, 32, 6]
    parts = [{"audio": "a", "start": start, "seconds": 1} for start in (0, 1, 0)]
    assert eval.group_recordings(parts) == [[parts[0], parts[2], parts[1]]]


def test_the_command(folder, capsys, tmp_path, monkeypatch):
    """A recording is read once, and answers are those to each example by itself."""
    rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    soundfile.write(tmp_path / "long.wav", torch.randn(16000 * 45).numpy() / 9, 16000)
    lost = [rows[2] | {"audio": name, "duration": None} for name in ("none\x1b.wav", "long.wav")]
    manifest, out = tmp_path / "m.jsonl", tmp_path / "new" / "e"
    manifest.write_text("\n\n".join(map(json.dumps, rows + lost)))
    ckpt = write_checkpoint(folder, tmp_path / "ift.pt", refuse_above=-1e9)
    loads = []
    monkeypatch.setitem(sys.modules, "extras.report", None)
    monkeypatch.setattr(data, "load_audio", lambda *args: loads.append(args) or load_audio(*args))
    printed, err = run(eval, capsys, manifest, "--ckpt", ckpt, "--out", out)
    assert len(loads) == len(set(loads)) == 10
    assert f"left out: {manifest} line 49: {tmp_path}/none\\u001b.wav: no such file" in err
    assert f"left out: {manifest} line 51: 4" in err and "ask about a shorter part" in err

    items, loaded = read_items(out / "m-ift.jsonl"), sample.load_model(ckpt)
    assert len(items) == 24
    for i, example in enumerate(Manifest(folder / "all.jsonl"), 1):
        answer = answer_by_hand(example, *loaded)
        expected = {name: example[name] for name in ("audio", "start", "task", "corpus")}
        expected |= {"reference": example["text"], "seconds": example["duration"], "cut": False}
        expected |= {"hypothesis": answer.text, "instruction": instruction_of(example)}
        kind = example["task"], example["target_language"]
        expected |= {"scores": item_scores(*kind, example["text"], answer.text)}
        assert items[str(i)] == items[str(i)] | expected
        assert (answer.text == REFUSALS["en"]) == (example["task"] == "sqa")

    # The summary has the scores that are printed, and what they were made with.
    summary = json.loads((out / "m-ift.json").read_text(encoding="utf-8"))
    words = [x for x in items.values() if x["task"] == "asr"]
    references = [normalise(x["reference"], "en") for x in words]
    rate = jiwer.wer(references, [normalise(x["hypothesis"], "en") for x in words])
    tables = {(line["task"], line["group"]): line["scores"] for line in summary["scores"]}
    value, low, high = tables["asr", "all"]["WER"]
    assert value == pytest.approx(rate, abs=1e-4) and ("st", "corpus b") in tables
    rates = f"WER {100 * value:.1f} % ({100 * low:.1f}-{100 * high:.1f}), CER "
    assert f"asr en, all, 8: {rates}" in printed and "refusal recall 100.0 % (" in printed
    assert summary["checkpoint"] == f"{ckpt}, phase ift, step 5"
    assert summary["rows"] == "24 answered, 2 left out" and summary["refused above"] == -1e9
    assert "BLEU de" in summary["signatures"]


def recording_of(example, kind):
    """An example's recording as --degrade leaves it, by the definition of its seed."""
    key = example["audio"], example["start"], example["duration"]
    random = np.random.default_rng(list(repr(key).encode()))
    manifest = Manifest(Path(example["where"].rpartition(" line ")[0]))
    return data.DEGRADATIONS[kind](load_audio(example["audio"]), random, manifest)


@pytest.mark.parametrize("kind", ["babble", "room", "telephone"])
def test_degraded_recordings(folder, capsys, tmp_path, kind):
    argv = [folder / "all.jsonl", "--ckpt", folder / "ift.pt", "--out", tmp_path]
    run(eval, capsys, *argv, "--degrade", kind)
    items, loaded = read_items(tmp_path / f"all-ift-{kind}.jsonl"), sample.load_model(argv[2])
    assert len(items) == 24 and not (tmp_path / "all-ift.jsonl").exists()
    for i, example in enumerate(Manifest(folder / "all.jsonl"), 1):
        recordings = sample.encode_waves(loaded[0], [recording_of(example, kind)], 1.0)
        (answer,) = sample.answer_examples(*loaded[:2], [example], recordings)
        assert items[str(i)]["hypothesis"] == answer.text
        assert items[str(i)]["reference"] == example["text"]
    out, _ = run(eval, capsys, *argv, "--degrade", kind)
    assert "24 items are there already" in out
    run(eval, capsys, *argv)  # as they are: a run of its own
    plain = read_items(tmp_path / "all-ift.jsonl")
    assert [x["hypothesis"] for x in plain.values()] != [x["hypothesis"] for x in items.values()]


@pytest.mark.parametrize("kind", ["silence", "noise"])
def test_recordings_in_which_nobody_speaks(folder, capsys, tmp_path, kind):
    rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    unknown = rows[2] | {"source_language": "fr", "target_language": "fr", "instruction": "Où ?"}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, [*rows, unknown])))
    argv = [manifest, "--ckpt", folder / "ift.pt", "--out", tmp_path, "--degrade", kind]
    out, _ = run(eval, capsys, *argv)
    items = read_items(tmp_path / f"m-ift-{kind}.jsonl")
    assert sorted(items, key=int) == [str(i) for i in range(1, 25)]  # the last has no answer
    summary = json.loads((tmp_path / f"m-ift-{kind}.json").read_text(encoding="utf-8"))
    assert summary["settings"]["degrade"] == kind
    tables = {line["task"]: line["scores"] for line in summary["scores"] if line["group"] == "all"}
    for task, language in (("asr", "en"), ("st", "de")):
        of_task = [x for x in items.values() if x["task"] == task]
        assert {x["reference"] for x in of_task} == {""} and list(tables[task]) == ["invented"]
        share = sum(x["hypothesis"] != "" for x in of_task) / 8
        assert tables[task]["invented"][0] == pytest.approx(share, abs=1e-4)
        assert f"{task} {language}, all, 8: invented {100 * share:.1f} % (" in out
    questions = [x for x in items.values() if x["task"] == "sqa"]
    assert {x["reference"] for x in questions} == {REFUSALS["en"]}
    assert list(tables["sqa"]) == ["refusal recall"] and len(questions) == 8


def test_a_stop_and_going_on(folder, capsys, tmp_path, monkeypatch):
    calls = []

    def answer_or_stop(model, tokenizer, examples, *args, **options):
        calls.append([example["id"] for example in examples])
        if len(calls) == 3:
            calls[2].clear()
            raise KeyboardInterrupt
        return sample.answer_examples(model, tokenizer, examples, *args, **options)

    monkeypatch.setattr(eval, "answer_examples", answer_or_stop)
    monkeypatch.setattr(eval, "GROUP_ROWS", 7)
    argv = [folder / "all.jsonl", "--ckpt", folder / "ift.pt", "--out", tmp_path]
    path = tmp_path / "all-ift.jsonl"
    _, err = run(eval, capsys, *argv, code=130)
    assert err.splitlines()[-1] == "eval.py: stopped; start again to go on from here"
    assert list(read_items(path)) == calls[0] + calls[1]
    with open(path, "a") as file:
        file.write('{"id": "9", "hypo')
    out, _ = run(eval, capsys, *argv)
    assert "12 items are there already" in out and sum(map(len, calls)) == 24
    out, _ = run(eval, capsys, *argv)
    assert "24 items are there already" in out and sum(map(len, calls)) == 24
    monkeypatch.undo()
    run(eval, capsys, *argv[:-1], tmp_path / "anew")
    assert read_items(tmp_path / "anew" / "all-ift.jsonl") == read_items(path)


def test_other_settings_are_another_run(folder, capsys, tmp_path):
    manifest, path = tmp_path / "m\x1b[2K.jsonl", tmp_path / "m\x1b[2K-ift.jsonl"
    manifest.write_text("\n".join((folder / "all.jsonl").read_text().splitlines()[:3]))
    argv = [manifest, "--out", tmp_path, "--ckpt", folder / "ift.pt", "--tasks"]
    out, _ = run(eval, capsys, *argv, "asr")
    assert list(read_items(path)) == ["1"] and "st de" not in out
    out, _ = run(eval, capsys, *argv, "st", "asr")
    assert "1 items are there already" in out and sorted(read_items(path)) == ["1", "2"]
    before = path.read_text()
    for number, more in enumerate((["--beams", "2"], ["--int8"], []), 1):
        out, _ = run(eval, capsys, *argv, "asr", *more)
        assert f"held items of other settings, now in m\\u001b[2K-ift.old{number}.jsonl" in out
    assert path.with_suffix(".old1.jsonl").read_text() == before


def test_results_of_other_paths_are_moved_aside(folder, capsys, tmp_path, monkeypatch):
    """Manifests or checkpoints of one name, or of changed content: the items that were there, the
    summary and the report."""
    lines, paths = (folder / "all.jsonl").read_text().splitlines(), []
    for name in "ab":
        paths.append(tmp_path / name / "test.jsonl")
        paths[-1].parent.mkdir()
        paths[-1].write_text(lines["ab".index(name)])
    ckpt, out = write_checkpoint(folder, tmp_path / "b" / "ift.pt"), tmp_path / "out"
    endings = ("html", "json", "jsonl")
    runs = [(paths[0], folder / "ift.pt"), (paths[1], folder / "ift.pt"), (paths[1], ckpt)]
    for number, (manifest, checkpoint) in enumerate(runs):
        before = [(out / f"test-ift.{ending}") for ending in endings if number]
        before = [path.read_bytes() for path in before]
        run(eval, capsys, manifest, "--ckpt", checkpoint, "--out", out)
        aside = [out / f"test-ift.old{number}.{ending}" for ending in endings if number]
        assert [path.read_bytes() for path in aside] == before
    assert len(list(out.iterdir())) == 9

    # The same paths by another spelling go on.
    monkeypatch.chdir(tmp_path / "a")
    printed, _ = run(eval, capsys, "../b/test.jsonl", "--ckpt", "../b/ift.pt", "--out", out)
    assert "test-ift.jsonl: 1 items are there already" in printed
    summary = (out / "test-ift.json").read_bytes()
    paths[1].write_text("\n".join(lines[:2]))
    run(eval, capsys, paths[1], "--ckpt", ckpt, "--out", out)
    assert (out / "test-ift.old3.json").read_bytes() == summary


def test_the_bar_moves_with_every_batch(folder, capsys, tmp_path, monkeypatch):
    moves = []

    class Bar(eval.tqdm):
        def update(self, n=1):
            moves.append(n)
            return super().update(n)

    monkeypatch.setattr(eval, "tqdm", Bar)
    run(eval, capsys, folder / "all.jsonl", "--ckpt", folder / "ift.pt", "--out", tmp_path)
    assert sum(moves) == 24 and len(moves) > 1


def test_the_program_prints_its_scores_alone(folder, tmp_path):
    """No remark of a library, and what its standard output cannot say is escaped."""
    manifest = tmp_path / "花.jsonl"
    manifest.write_text((folder / "all.jsonl").read_text().splitlines()[1])
    command = [sys.executable, Path(eval.__file__), manifest, "--ckpt", folder / "ift.pt"]
    command += ["--out", tmp_path, "--llm", folder / "llm", "--encoder", folder / "encoder"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    summary, page = (f"{tmp_path}/\\u82b1-ift.{suffix}: the " for suffix in ("json", "html"))
    lines = done.stdout.splitlines()
    assert lines[0].startswith("st de, all, 1: BLEU") and len(lines) == 3
    assert lines[1].startswith(summary) and lines[2].startswith(page)
    errors = re.split("[\r\n]+", done.stderr.strip())
    assert done.returncode == 0 and all(line.startswith("eval: ") for line in errors)


def test_ctrl_c_while_it_answers(folder, tmp_path):
    command = [sys.executable, Path(eval.__file__), folder / "all.jsonl", "--beams", "64"]
    command += ["--ckpt", folder / "ift.pt", "--out", tmp_path]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert program.stderr.read(5).strip() == "eval"  # the bar is there
    program.send_signal(signal.SIGINT)
    error = program.communicate()[1]
    assert program.returncode == 130 and "Traceback" not in error
    assert error.endswith("eval.py: stopped; start again to go on from here\n")


def test_without_extras(folder, capsys, tmp_path, monkeypatch):
    argv = [folder / "all.jsonl", "--ckpt", folder / "ift.pt", "--out"]
    run(eval, capsys, *argv, tmp_path / "with")
    for name in ("cpu", "decode", "int8", "report"):
        monkeypatch.setitem(sys.modules, f"extras.{name}", None)
    out, _ = run(eval, capsys, *argv, tmp_path / "without")
    names = sorted(path.name for path in (tmp_path / "with").iterdir())
    assert names == ["all-ift.html", "all-ift.json", "all-ift.jsonl"]
    assert sorted(path.name for path in (tmp_path / "without").iterdir()) == names[1:]
    answers = [read_items(tmp_path / name / "all-ift.jsonl") for name in ("with", "without")]
    assert answers[0] == answers[1] and sample.fast_step() is sample.decode_step
    _, err = run(eval, capsys, *argv, tmp_path, "--int8", code=1)
    assert "--int8 needs extras/int8.py" in err


@pytest.mark.parametrize(
    "argv, code, message",
    [
        ("", 2, "arguments are required: manifest"),
        ("all.jsonl --tasks tts", 2, "invalid choice: 'tts'"),
        ("all.jsonl --degrade echo", 2, "invalid choice: 'echo'"),
        ("all.jsonl --ckpt ift.pt --beams 0", 2, "at least 1"),
        ("all.jsonl --beam-size 4", 2, "unrecognized arguments: --beam-size"),
        ("all.jsonl", 1, "no out/align.pt or out/ift.pt; run python train.py first"),
        ("all.jsonl --ckpt none.pt", 1, "none.pt: No such file"),
        ("none.jsonl --ckpt ift.pt", 1, "none.jsonl: No such file"),
        ("empty.jsonl --ckpt ift.pt", 1, "empty.jsonl: found no rows"),
        ("bad.jsonl --ckpt ift.pt", 1, "bad.jsonl line 2: task is 'tts', expected one of asr"),
        ("train.jsonl --ckpt ift.pt --tasks sqa", 1, "none of its 0 rows of the tasks sqa could"),
        (
            "lost.jsonl --ckpt ift.pt",
            1,
            "lost.jsonl: none of its 1 rows of the tasks asr, st, sqa could",
        ),
        ("all.jsonl --ckpt ift.pt --out ift.pt", 1, "ift.pt: File exists; what was answered"),
        ("all.jsonl --ckpt ift.pt --out ift.pt/x", 1, "Not a directory; what was answered is kept"),
    ],
)
def test_what_the_command_refuses(folder, capsys, monkeypatch, argv, code, message):
    monkeypatch.chdir(folder)
    example = json.loads((folder / "all.jsonl").read_text().splitlines()[0])
    lost = json.dumps(example | {"audio": "none.wav"})
    Path("empty.jsonl").write_text("")
    Path("lost.jsonl").write_text(lost)
    Path("bad.jsonl").write_text(lost + "\n" + json.dumps(example | {"task": "tts"}))
    _, err = run(eval, capsys, *argv.split(), code=code)
    assert message in err and (code == 2 or err.splitlines()[-1].startswith("eval.py: "))
