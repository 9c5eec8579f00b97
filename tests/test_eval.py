"""eval.py: scores against those of jiwer and sacrebleu and by hand, answers that outlast a stop,
and the command."""

import json
import math
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import sacrebleu
import soundfile
import torch
from test_sample import make_folder, run, write_checkpoint, write_examples

import eval
import sample
from data import REFUSALS, AudioError, Manifest, instruction_of, load_audio
from eval import Answer, Journal, answer_manifest, corpus_scores, item_scores, normalise

SHORT = {"max_new_tokens": 9}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a checkpoint and a manifest of eight recordings are."""
    folder = make_folder(tmp_path_factory.mktemp("eval"))
    write_checkpoint(folder, folder / "ift.pt")
    write_examples(folder, folder / "all.jsonl")
    return folder


# ------------------------------------------------------------------------------
# Scores


def item(task, language, reference, hypothesis, **more):
    scores = item_scores(task, language, reference, hypothesis)
    texts = {"reference": reference, "hypothesis": hypothesis}
    kind = {"task": task, "target_language": language, "corpus": "c", "speaker": "s"}
    return kind | texts | {"scores": scores} | more


def test_word_and_character_errors_are_those_of_jiwer():
    pairs = [
        ("Mr. Smith's colour is grey.", "mister smith's color is gray"),
        ("One, two three", "one three four"),
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
    assert scores["WER"][1] <= scores["WER"][0] <= scores["WER"][2]


def test_errors_of_other_languages():
    assert item_scores("asr", "de", "Der Hund, ja.", "der hund JA")["error"] == 0
    assert item_scores("asr", "de", "colour", "color")["word_errors"] == 1
    # Chinese characters are words.
    assert item_scores("asr", "zh", "你好世界", "你好世")["word_errors"] == 1
    half = item_scores("asr", "zh", "你好世界", "你好市界")
    assert (half["character_errors"], half["characters"], half["words"]) == (1, 4, 4)


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
    pairs = pairs * 3
    scores, signatures = corpus_scores([item("st", language, *pair) for pair in pairs])
    references, hypotheses = zip(*pairs, strict=True)
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], tokenize=tokenize)
    chrf = sacrebleu.corpus_chrf(hypotheses, [references])
    assert scores["BLEU"][0] == pytest.approx(bleu.score)
    assert scores["chrF2"][0] == pytest.approx(chrf.score)
    assert scores["BLEU"][1] < scores["BLEU"][0] < scores["BLEU"][2]
    assert f"tok:{tokenize}" in signatures[f"BLEU {language}"]
    sentence = sacrebleu.sentence_chrf(hypotheses[0], references[:1]).score
    first = item_scores("st", language, *pairs[0])
    assert first == {"error": pytest.approx(1 - sentence / 100), "chrf": round(sentence, 1)}


def test_questions_are_scored_with_their_refusals():
    no = REFUSALS["de"]
    pairs = [("Der Hund.", "der Hund"), ("Im Garten", "im grünen Garten"), ("rot", no)]
    pairs += [(no, no), (no, "blau"), (no, REFUSALS["en"])]
    items = [item("sqa", "de", *pair) for pair in pairs]
    assert [x["scores"]["error"] for x in items] == [0, pytest.approx(0.6), 1, 0, 1, 0]
    for language in REFUSALS:  # a refusal in any language is one
        for refusal in REFUSALS.values():
            assert item_scores("sqa", language, "x", refusal)["refused"]
    assert {name: score for name, (score, *_) in corpus_scores(items)[0].items()} == pytest.approx(
        {
            "exact match": 1 / 3,
            "F1": (1 + 0.8 + 0) / 3,
            "refusal precision": 2 / 3,
            "refusal recall": 2 / 3,
            "false refusals": 1 / 3,
        }
    )
    assert "refusal precision" not in corpus_scores(items[:2])[0]


def test_bootstrap_intervals():
    """Of a rate, close to those of a binomial share; of one item, none that would mislead."""
    random = np.random.default_rng(0)
    items = [item("sqa", "en", "a", "a" if random.random() < 0.7 else "b") for _ in range(400)]
    value, low, high = corpus_scores(items)[0]["exact match"]
    half = 1.96 * math.sqrt(value * (1 - value) / 400)
    assert [low, high] == pytest.approx([value - half, value + half], abs=0.01)
    assert corpus_scores(items)[0]["exact match"] == (value, low, high)  # the same draws
    assert corpus_scores(items, draws=0)[0]["exact match"] == (value, None, None)
    assert corpus_scores(items[:1])[0]["exact match"] == (1, 1, 1)
    bleu = corpus_scores([item("st", "de", "ja", "nein")] * 2)[0]["BLEU"]
    assert bleu == (0, 0, 0)


def test_groups_of_the_summary():
    items = [item("st", "de", "ja", "ja"), item("st", "zh", "是", "是")]
    for i in range(20):
        speaker = f"s{i % 3 if i < 9 else 0}"
        hypothesis = "a b" if i % 2 else "a"
        items.append(item("asr", "en", "a b", hypothesis, speaker=speaker, corpus="cd"[i % 2]))
    table, signatures = eval.summarise(items, least=10)
    assert [(line["task"], line["language"], line["group"], line["items"]) for line in table] == [
        ("asr", "en", "all", 20),
        ("asr", "en", "corpus c", 10),
        ("asr", "en", "speaker s0", 14),
        ("asr", "en", "corpus d", 10),
        ("asr", "en", "other speakers", 6),
        ("st", "de", "all", 1),
        ("st", "zh", "all", 1),
    ]
    rates = [line["scores"]["WER"][0] for line in table if line["task"] == "asr"]
    assert rates[:2] == [0.25, 0.5] and rates[3] == 0
    assert set(signatures) == {"BLEU de", "chrF2 de", "BLEU zh", "chrF2 zh"}
    json.dumps(table)


def test_figures_of_a_validation():
    """Each is the mean of those of the languages."""
    rows = [
        ("asr", "en", "one two", "one"),
        ("asr", "de", "eins", "eins"),
        ("st", "de", *GERMAN[1]),
        ("sqa", "en", "red", "red"),
        ("sqa", "en", REFUSALS["en"], "red"),
        ("sqa", "de", "rot", REFUSALS["de"]),
    ]
    pairs = []
    for task, language, text, answer in rows:
        pairs.append(({"task": task, "target_language": language, "text": text}, answer))
    figures = {"wer": 0.25, "bleu": 100, "exact_match": 0.5, "refusals": 0, "false_refusals": 0.5}
    assert eval.validation_scores(pairs) == pytest.approx(figures)
    assert eval.validation_scores(pairs[:2]) == {"wer": 0.25} and eval.validation_scores([]) == {}


def test_the_threshold_of_refusing():
    """It refuses as much as an eighth of the questions with an answer allows."""
    margins = [-9, 0.5, -8, -7, -6, -5, 2, -4, -3, -2, -1, 0, 1, 3, -9, -9]
    examples = [{"target_language": "en", "text": "a"} for _ in margins]
    answers = [Answer("", margin, "a") for margin in margins]
    for margin in (-5, 1.5, 4):
        examples.append({"target_language": "de", "text": REFUSALS["de"]})
        answers.append(Answer("", margin, "b"))

    def threshold(chosen):
        return eval.refusal_threshold(examples[chosen], answers[chosen])

    assert threshold(slice(None)) == {"refuse_above": 1}  # 2 of 16 are above it
    assert threshold(slice(7)) == threshold(slice(0)) == {}  # none is to be refused
    assert threshold(slice(-3, None)) == {}  # none has an answer
    assert threshold(slice(13, None)) == {"refuse_above": 3}  # of three none may be lost
    examples.append(examples[0])
    assert eval.refusal_threshold(examples, [*answers, AudioError("")]) == {"refuse_above": 1}


# ------------------------------------------------------------------------------
# Journals

HOSTILE = 'a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\r\nh\x00 \x1b[m \ufeff"\\ 中𝄞'
ITEMS = [{"id": str(i), "text": HOSTILE * i} for i in range(3)]


def write_items(path, settings=1):
    journal = Journal(path, {"made with": settings})
    for x in ITEMS:
        journal.add(x)
    assert journal.items == {x["id"]: x for x in ITEMS}
    return journal


def test_a_journal_goes_on(tmp_path, capsys):
    path = tmp_path / "new" / "a.jsonl"
    journal = write_items(path)
    assert capsys.readouterr().out == ""
    again = Journal(path, {"made with": 1})
    assert (
        again.items == journal.items
        and capsys.readouterr().out == f"{path}: 3 items are there already\n"
    )
    again.add({"id": "1", "text": "anew"})
    again.add({"id": "x"})
    items = Journal(path, {"made with": 1}).items
    assert items == journal.items | {"1": {"id": "1", "text": "anew"}, "x": {"id": "x"}}
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == list(items.values())


def test_a_torn_line_is_dropped(tmp_path):
    """Wherever a kill or a full disk cut it off, be it within a character."""
    path = tmp_path / "a.jsonl"
    write_items(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for size in range(len(lines[2])):
        path.write_bytes(b"".join(lines[:2]) + lines[2][:size])
        journal = Journal(path, {"made with": 1})
        complete = 3 if size == len(lines[2]) - 1 else 2
        assert list(journal.items.values()) == ITEMS[:complete]
        journal.add(ITEMS[2])
        assert path.read_bytes() == b"".join(lines)


def test_items_of_other_settings_are_moved_aside(tmp_path, capsys):
    path = tmp_path / "a.b.jsonl"
    write_items(path)
    before, settings = path.read_bytes(), path.with_suffix(".json")

    def other(number):
        assert not Journal(path, {"made with": 2}).items and path.read_bytes() == b""
        assert (tmp_path / f"a.b.old{number}.jsonl").read_bytes() == before
        assert f"of other settings, now in a.b.old{number}.jsonl" in capsys.readouterr().out
        path.write_bytes(before)

    other(1)
    for number, text in enumerate(("", "[1]", '"settings"', "{}", "\xff", "null"), 2):
        settings.write_text(text, encoding="latin-1")
        other(number)
    settings.unlink()
    other(8)
    path.write_bytes(b"")
    assert not Journal(path, {"made with": 3}).items and not capsys.readouterr().out


# ------------------------------------------------------------------------------
# Answering a manifest


class Asked:
    """A model, the examples of a manifest, and the calls that were made."""

    def __init__(self, folder, monkeypatch):
        self.loaded = sample.load_model(folder / "ift.pt")
        self.manifest = Manifest(folder / "all.jsonl")
        self.examples, self.groups, self.loads = [], [], []
        for i, example in enumerate(self.manifest):
            seconds = self.manifest.seconds(example)
            self.examples.append(example | {"id": f"n{i}", "seconds": seconds})
        monkeypatch.setattr(eval, "answer_examples", self.answer_examples)

    def answer_examples(self, model, tokenizer, examples, *args, **options):
        self.groups.append([example["id"] for example in examples])
        return sample.answer_examples(model, tokenizer, examples, *args, **options)

    def load_wave(self, example):
        self.loads.append(example["audio"])
        return load_audio(example["audio"])

    def answer(self, path, examples=None, settings=None, **options):
        examples = self.examples if examples is None else examples
        journal = Journal(path, settings or {})
        options = SHORT | options
        return answer_manifest(*self.loaded, examples, self.load_wave, journal, **options)


@pytest.fixture
def asked(folder, monkeypatch):
    return Asked(folder, monkeypatch)


def test_a_manifest_is_answered_as_its_examples_are(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(eval, "GROUP_ROWS", 7)
    items, failures = asked.answer(tmp_path / "a.jsonl")
    assert len(items) == 24 and not failures and len(asked.loads) == len(set(asked.loads)) == 8
    assert [len(group) for group in asked.groups] == [
        6,
        6,
        6,
        6,
    ]  # all about one recording together
    model, tokenizer, _ = asked.loaded
    for example in asked.examples:
        wave = load_audio(example["audio"])
        recordings = sample.encode_waves(model, [wave], 1.0)
        (answer,) = sample.answer_examples(model, tokenizer, [example], recordings, **SHORT)
        line = items[example["id"]]
        expected = {name: example[name] for name in ("id", "audio", "start", "task", "speaker")}
        expected |= {"reference": example["text"], "hypothesis": answer.text, "cut": answer.cut}
        expected |= {"seconds": len(wave) / 16000, "instruction": instruction_of(example)}
        kind = example["task"], example["target_language"]
        expected["scores"] = item_scores(*kind, example["text"], answer.text)
        assert line == line | expected and line["margin"] is None
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == list(items.values()) and lines[-1] == ""


def test_groups_of_recordings(asked):
    def sizes(*seconds):
        examples = [{"audio": str(i), "seconds": s} for i, s in enumerate(seconds)]
        groups = eval.group_recordings(examples)
        return [[example["seconds"] for example in group] for group in groups]

    assert sizes(100, 300, 200, 250) == [[300, 250], [200, 100]]
    assert sizes(700, 900, 1) == [[900], [700], [1]] and sizes() == []
    assert list(map(len, sizes(*[1] * 70))) == [32, 32, 6]
    parts = [{"audio": "a", "start": start, "seconds": 1} for start in (0, 1, 0)]
    assert eval.group_recordings(parts) == [[parts[0], parts[2], parts[1]]]


def test_what_cannot_be_answered_is_left_out(asked, tmp_path, capsys):
    gone, endless = tmp_path / "gone\x1b.wav", tmp_path / "long.wav"
    soundfile.write(endless, torch.randn(16000 * 45).numpy() / 9, 16000)
    changes = [{}, {"audio": str(gone)}, {"audio": str(endless)}, {"audio": str(gone)}]
    question = asked.examples[2]
    examples = [question | change | {"id": str(i)} for i, change in enumerate(changes)]
    del examples[3]["where"]
    items, failures = asked.answer(tmp_path / "a.jsonl", examples)
    assert list(items) == ["0"] and sorted(failures) == ["1", "2", "3"]
    assert failures["1"].endswith("gone\\u001b.wav: no such file; correct the path")
    assert "45 s of audio and the instruction" in failures["2"]
    left_out = [line for line in capsys.readouterr().err.split("\n") if "left out" in line]
    assert left_out[0].endswith(f"left out: {question['where']}: {failures['1']}")
    assert left_out[2].endswith(f"left out: 3: {failures['3']}")


def test_answers_that_are_there_are_not_made_again(asked, tmp_path):
    path = tmp_path / "a.jsonl"
    first, _ = asked.answer(path, asked.examples[:3], score=False)
    assert "scores" not in first["n0"]
    asked.loads.clear()
    items, _ = asked.answer(path, asked.examples[:6])
    assert asked.loads == [asked.examples[3]["audio"]] and items == items | first
    assert "scores" in items["n3"]


def test_questions_are_refused_above_the_threshold(folder, asked, tmp_path):
    asked.loaded[2]["refuse_above"] = -1e9
    items, _ = asked.answer(tmp_path / "a.jsonl")
    for line in items.values():
        question = line["task"] == "sqa"
        assert (line["hypothesis"] == REFUSALS["en"]) == (line["margin"] is not None) == question


# ------------------------------------------------------------------------------
# The command


def read_items(path):
    return {x["id"]: x for x in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_the_command(folder, capsys, tmp_path):
    lines = (folder / "all.jsonl").read_text().splitlines()
    manifest = tmp_path / "m.jsonl"
    lost = json.dumps(json.loads(lines[0]) | {"audio": "none.wav"})
    manifest.write_text("\n".join([*lines, "", lost]) + "\n")
    argv = [manifest, "--ckpt", folder / "ift.pt", "--out", tmp_path / "new" / "e"]
    out, err = run(eval, capsys, *argv)
    assert "asr en, all, 8: WER " in out and "refusal recall " in out
    assert f"left out: {manifest} line 26: {tmp_path}/none.wav: no such file" in err
    path = tmp_path / "new" / "e" / "m-ift.jsonl"
    items, examples = read_items(path), list(Manifest(folder / "all.jsonl"))
    assert sorted(map(int, items)) == list(range(1, 25))
    for i, example in enumerate(examples, 1):
        assert items[str(i)]["audio"] == example["audio"]
        assert items[str(i)]["reference"] == example["text"]

    # The summary has the scores that are printed, and what they were made with.
    summary = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    words = [x for x in items.values() if x["task"] == "asr"]
    references = [normalise(x["reference"], "en") for x in words]
    rate = jiwer.wer(references, [normalise(x["hypothesis"], "en") for x in words])
    asr = {
        line["group"]: line["scores"]["WER"]
        for line in summary["scores"]
        if "WER" in line["scores"]
    }
    assert asr["all"][0] == pytest.approx(rate, abs=1e-4) and len(asr) == 2
    assert f"WER {100 * asr['all'][0]:.1f} % ({100 * asr['all'][1]:.1f}-" in out
    assert summary["checkpoint"] == f"{folder / 'ift.pt'}, phase ift, step 5"
    assert summary["rows"] == "24 answered, 1 left out"
    assert path.with_suffix(".html").exists() and "BLEU de" in summary["signatures"]


def test_a_stop_and_going_on(folder, capsys, tmp_path, monkeypatch):
    argv = [folder / "all.jsonl", "--ckpt", folder / "ift.pt", "--out", tmp_path]
    run(eval, capsys, *argv)
    path, calls = tmp_path / "all-ift.jsonl", []
    items, summary = read_items(path), path.with_suffix(".json").read_text()
    path.unlink()
    monkeypatch.setattr(eval, "GROUP_ROWS", 6)

    def stop_at_third(*args, **options):
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample.answer_examples(*args, **options)

    monkeypatch.setattr(eval, "answer_examples", stop_at_third)
    _, err = run(eval, capsys, *argv, code=130)
    assert err.endswith("eval.py: stopped; start again to go on from here\n")
    assert len(read_items(path)) == 12
    with open(path, "a") as file:
        file.write('{"id": "9", "hypo')
    out, _ = run(eval, capsys, *argv)
    assert "12 items are there already" in out and len(calls) == 5
    assert sum(map(len, calls[3:])) == 12
    assert read_items(path) == items and path.with_suffix(".json").read_text() == summary
    run(eval, capsys, *argv)
    assert len(calls) == 5


def test_other_settings_are_another_run(folder, capsys, tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join((folder / "all.jsonl").read_text().splitlines()[:3]))
    argv = [manifest, "--ckpt", folder / "ift.pt", "--out", tmp_path / "e", "--tasks"]
    out, _ = run(eval, capsys, *argv, "asr")
    path = tmp_path / "e" / "m-ift.jsonl"
    assert list(read_items(path)) == ["1"] and "st de" not in out
    out, _ = run(eval, capsys, *argv, "st", "asr")
    assert "1 items are there already" in out and sorted(read_items(path)) == ["1", "2"]
    before = path.read_text()
    for number, more in enumerate((["--beams", "2"], ["--int8"], []), 1):
        out, _ = run(eval, capsys, *argv, "asr", *more)
        assert f"held items of other settings, now in m-ift.old{number}.jsonl" in out
    assert (tmp_path / "e" / "m-ift.old1.jsonl").read_text() == before
    write_checkpoint(folder, tmp_path / "align.pt")
    argv[2] = tmp_path / "align.pt"
    out, _ = run(eval, capsys, *argv, "asr")
    assert "items" not in out and (tmp_path / "e" / "m-align.html").exists()


def test_without_extras(folder, capsys, tmp_path, monkeypatch):
    argv = [folder / "all.jsonl", "--ckpt", folder / "ift.pt", "--out"]
    run(eval, capsys, *argv, tmp_path / "with")
    for name in ("cpu", "decode", "int8", "report"):
        monkeypatch.setitem(sys.modules, f"extras.{name}", None)
    out, _ = run(eval, capsys, *argv, tmp_path / "without")
    names = sorted(path.name for path in (tmp_path / "without").iterdir())
    assert names == ["all-ift.json", "all-ift.jsonl"] and "the report" not in out
    with_extras, without = (read_items(tmp_path / x / "all-ift.jsonl") for x in ("with", "without"))
    assert with_extras == without
    _, err = run(eval, capsys, *argv, tmp_path, "--int8", code=1)
    assert "--int8 needs extras/int8.py" in err


def test_a_recording_that_is_gone_since_has_no_player(folder, capsys, tmp_path):
    manifest, wav = tmp_path / "m.jsonl", tmp_path / "here.wav"
    example = json.loads((folder / "all.jsonl").read_text().splitlines()[0])
    manifest.write_text(json.dumps(example | {"audio": "here.wav"}))
    soundfile.write(wav, load_audio(example["audio"]).numpy(), 16000)
    argv = [manifest, "--ckpt", folder / "ift.pt", "--out", tmp_path]
    run(eval, capsys, *argv)
    page = tmp_path / "m-ift.html"
    assert "data:audio/ogg" in page.read_text()
    wav.unlink()
    assert "WER" in run(eval, capsys, *argv)[0]
    assert "data:audio/ogg" not in page.read_text()


@pytest.mark.parametrize(
    "argv, code, message",
    [
        ("", 2, "arguments are required: manifest"),
        ("all.jsonl --tasks tts", 2, "invalid choice: 'tts'"),
        ("all.jsonl --beam-size 4", 2, "unrecognized arguments: --beam-size"),
        ("all.jsonl", 1, "no out/align.pt or out/ift.pt; run python train.py --phase align first"),
        ("all.jsonl --ckpt none.pt", 1, "none.pt: No such file"),
        ("none.jsonl --ckpt ift.pt", 1, "none.jsonl: No such file"),
        ("empty.jsonl --ckpt ift.pt", 1, "empty.jsonl: found no rows"),
        ("bad.jsonl --ckpt ift.pt", 1, "bad.jsonl line 2: task is 'tts', expected one of asr"),
        ("train.jsonl --ckpt ift.pt --tasks sqa", 1, "no row of the tasks sqa; give others"),
        ("lost.jsonl --ckpt ift.pt", 1, "lost.jsonl: none of its 1 rows could be answered"),
        (
            "all.jsonl --ckpt ift.pt --out ift.pt",
            1,
            "ift.pt: File exists; what was answered is kept",
        ),
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
