"""prepare/doctor.py: every fault that is planted is found at its line and decides the exit code."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from conftest import ROOT
from data import REFUSALS, text_hash
from prepare import doctor

SENTENCES = {
    "en": ["The old woman sells red apples on the market.", "My brother is at the station."],
    "de": ["Die alte Frau verkauft rote Äpfel auf dem Markt.", "Mein Bruder ist auf dem Weg."],
    "zh": ["老太太在市场上卖红苹果。", "我的弟弟今天在火车站。"],
}
ASR, GERMAN, CHINESE, SQA = 0, 2, 4, 6  # the first row of each task in the manifest of the tests


def noise(seconds, seed, level=3000):
    random = np.random.default_rng(seed)
    return (level * random.standard_normal(int(seconds * 16000))).astype(np.int16)


def clean_rows():
    """Two recordings: their transcripts, translations, and an answer and a refusal."""
    rows = []
    for language, texts in SENTENCES.items():
        rows += [dict(text=text, target_language=language) for text in texts]
    rows.append(dict(text="Red apples.", question="What does the old woman sell?"))
    rows.append(dict(text=REFUSALS["en"], question="Who sells the station?"))
    for i, row in enumerate(rows):
        row.update(audio=f"{i % 2}.wav", duration=3.0, task=("asr", "st", "st", "sqa")[i // 2])
        row.update(corpus="demo", speaker=f"s{i % 2}", licence="CC0-1.0")
    return rows


def write(rows, path):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def examine(tmp_path):
    """Runs the doctor on rows. Returns the exit code, and {kind: finding}, each with the reasons
    "at" its lines."""
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", noise(3, i), 16000)

    def run(rows, *options):
        path = write(rows, tmp_path / "train.jsonl")
        with pytest.raises(SystemExit) as stop:
            doctor.main([str(path), *map(str, options), "--out", str(tmp_path / "doctor")])
        report = json.loads((tmp_path / "doctor/train.json").read_text(encoding="utf-8"))
        findings = {finding["kind"]: finding for finding in report["findings"]}
        for finding in findings.values():
            reasons = finding["lines"].items()
            finding["at"] = {int(where.split()[-1]): reason for where, reason in reasons}
        serious = [finding["level"] == "serious" for finding in findings.values()]
        assert stop.value.code == any(serious) and serious == sorted(serious, reverse=True)
        return stop.value.code, findings

    return run


def check(findings, expected):
    """expected: {kind: {line: words of the reason}}, and no more."""
    lines = {kind: list(finding["at"]) for kind, finding in findings.items()}
    assert lines == {kind: list(reasons) for kind, reasons in expected.items()}
    for kind, reasons in expected.items():
        for line, words in reasons.items():
            assert words in findings[kind]["at"][line]


def test_a_clean_manifest(examine, capsys):
    assert examine(clean_rows(), "--tokenizer", ROOT / "demo/llm") == (0, {})
    printed = capsys.readouterr().out
    assert printed.startswith("demo asr en en: 2 rows, 0.00 h, 2 speakers, CC0-1.0\n")
    assert "\n0 serious findings, 0 notes" in printed


# The row of this number with changes, which is put behind the clean rows, and its finding.
FAULTS = [
    (ASR, dict(task="tts"), "example", "task is 'tts'"),
    (SQA, dict(text=""), "example", "text is ''"),
    (GERMAN, dict(target_language="fr"), "example", "no wording for the language 'fr'"),
    (ASR, dict(licence="CC-BY-NC-4.0"), "refused", "licence 'CC-BY-NC-4.0'"),
    (GERMAN, dict(sources=[["web", "unknown"]]), "refused", "'web' has the licence 'unknown'"),
    (SQA, dict(duration=31), "duration", "31 s"),
    (ASR, dict(duration=0.7), "cut", "64.3 characters/s, expected 1.5 to 40"),
    (ASR, dict(duration=1.0), "speed", "45 characters/s"),
    (ASR, dict(text="Yes."), "speed", "1.33 characters/s"),
    (CHINESE, dict(duration=0.3), "speed", "40 characters/s, expected 0.5 to 30"),
    (CHINESE, dict(text=SENTENCES["en"][0]), "language", "zh: 'The old woman"),
    (GERMAN, dict(text=SENTENCES["zh"][0]), "language", "de: '老太太"),
    (GERMAN, dict(text=SENTENCES["en"][0]), "language", "de: 'The old woman"),
    (SQA, dict(question="桌子上有几个瓶子？"), "language", "en: '桌子上"),
    (ASR, dict(source_language="de"), "example", "target_language is 'en', expected 'de'"),
    (ASR, dict(task="st"), "example", "target_language is 'en', expected another than 'en'"),
    (SQA, dict(text="This question cannot be answered."), "refusal", "'This question cannot"),
    (SQA, dict(text=REFUSALS["de"]), "refusal", REFUSALS["de"]),
    (GERMAN, dict(audio="./0.wav"), "duplicate", "train.jsonl line 3"),
    (ASR, dict(audio="0.wav", text="The old man sells apples."), "two texts", "train.jsonl line 1"),
]


def test_faults_of_rows(examine, capsys):
    rows, expected = clean_rows(), {}
    for i, (row, changes, kind, words) in enumerate(FAULTS):
        rows.append(rows[row] | {"audio": f"other{i}.wav"} | changes)
        expected.setdefault(kind, {})[len(rows)] = words
    expected["example"][len(rows) + 1] = "Expecting"
    code, findings = examine([*rows, '{"audio": '], "--sample", 0)
    check(dict(sorted(findings.items())), dict(sorted(expected.items())))
    printed = capsys.readouterr().out.splitlines()
    assert code == 1 and all(finding["text"] in printed for finding in findings.values())
    text = findings["example"]["text"]
    assert text.startswith("serious: example: 6 rows cannot be trained on: ")
    assert "train.jsonl line 9 (task is 'tts'" in text and text.endswith("; correct or delete them")
    assert findings["refusal"]["level"] == "serious", "2 of 30 are over 1 %"
    assert findings["two texts"]["level"] == "note", "1 of 30 is not"


@pytest.mark.parametrize(
    "row, changes, levels",
    [
        (ASR, dict(duration=0.6), {"cut": "serious"}),
        (CHINESE, dict(duration=0.2), {"cut": "serious"}),
        (GERMAN, dict(text="Die alte Frau " * 20000), dict(cut="serious", context="serious")),
        (SQA, dict(question="Who sells red apples? " * 12000), {"context": "serious"}),
        (SQA, dict(duration=30.5), {"duration": "note"}),
    ],
)
def test_one_row_amid_many(examine, row, changes, levels):
    """What is certainly wrong is serious however rare it is, and whatever the options. What
    training leaves out and counts is not."""
    rows = [good | {"audio": f"{i}.flac"} for i, good in enumerate(30 * clean_rows())]
    code, findings = examine([*rows, rows[row] | {"audio": "x.flac"} | changes], "--sample", 0)
    assert {kind: finding["level"] for kind, finding in findings.items()} == levels
    assert code == ("serious" in levels.values())
    assert all(list(finding["at"]) == [241] for finding in findings.values())


def test_faults_of_recordings(examine, tmp_path):
    (tmp_path / "page.mp3").write_bytes(b"<html>404</html>")
    waves = dict(quiet=noise(3, 9, 20), zero=noise(3, 9, 0), none=noise(0, 9), long=noise(33, 9))
    for name, wave in waves.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000)
    cases = [
        ("missing.wav", 3, "missing.wav: no such file"),
        ("page.mp3", 3, "starts with b'<html>"),
        ("none.wav", None, "no samples"),
        ("1.wav", 5, "found 3.00 s of audio, expected 5.00 s"),
        ("zero.wav", 3, "no sound, -120 dBFS"),
        ("quiet.wav", 3, "no sound, -64 dBFS"),
    ]
    rows = clean_rows()
    rows += [rows[ASR] | dict(audio=name, duration=seconds) for name, seconds, _ in cases]
    rows.append(rows[SQA] | dict(audio="long.wav", duration=None))
    expected = {line: words for line, (_, _, words) in enumerate(cases, 9)}
    code, findings = examine(rows)
    check(findings, {"audio": expected, "duration": {15: "33 s"}})
    assert code == 1

    # Without decoding, a file is opened only if its duration is not stated.
    check(examine(rows, "--sample", 0)[1], {"audio": {11: "no samples"}, "duration": {15: "33 s"}})


def test_leaks(examine, tmp_path):
    soundfile.write(tmp_path / "copy.flac", noise(3, 1), 16000)
    soundfile.write(tmp_path / "test.wav", noise(3, 8), 16000)
    path = tmp_path / "test.jsonl"
    rows = clean_rows()
    rows[SQA].update(question="In which of the four small villages does the old woman sell apples?")
    test = rows[ASR] | dict(audio="test.wav", text="Nobody said this in training.")
    tests = [
        test | dict(text=SENTENCES["en"][1].upper()),
        rows[SQA] | dict(audio="test.wav"),
        rows[SQA + 1] | dict(audio="test.wav"),  # a question that is asked of many recordings
        test | dict(audio="copy.flac"),
        test | dict(audio="gone.wav"),
    ]
    recording = dict.fromkeys((2, 4, 6, 8), "test.jsonl line 4")
    code, findings = examine(rows, "--against", write(tests, path))
    assert code == 1 and findings.pop("test row")["at"].keys() == {5}
    check(findings, {"test text": {2: "line 1", SQA + 1: "line 2"}, "test audio": recording})

    # The same file needs no decoding, nor does a text that was put on record.
    (tmp_path / "mcif.fingerprints").write_text(text_hash(SENTENCES["en"][0]) + "\n")
    write([test, test, test, test | dict(audio="./1.wav")], path)
    findings = examine(rows, "--against", path, "--sample", 0)[1]
    check(findings, {"refused": {1: "of a test-only corpus"}, "test audio": recording})


def test_options(examine, tmp_path):
    rows = [row | {"licence": "CC-BY-SA-4.0"} for row in clean_rows()]
    assert examine(rows, "--sample", 0)[0] == 1
    assert examine(rows, "--sample", 0, "--allow-licence", "CC-BY-SA-4.0") == (0, {})
    rows[SQA].update(text="Red apples. " * 400)
    findings = examine(rows, "--sample", 0, "--tokenizer", ROOT / "demo/llm")[1]
    assert "of 1,024 positions" in findings["context"]["at"][SQA + 1]
    second = write(clean_rows(), tmp_path / "second.jsonl")
    findings = examine(clean_rows(), second, "--sample", 0)[1]
    assert list(findings["duplicate"]["lines"]) == [f"{second} line {i}" for i in range(1, 9)]


ROW = json.dumps(clean_rows()[0])


@pytest.mark.parametrize(
    "content, options, message",
    [
        (None, (), "m.jsonl: No such file or directory"),
        ("\n", (), "found no rows"),
        ("RIFF\nWAVE\n", (), "m.jsonl line 2 and all others: Expecting value"),
        (ROW, ("--tokenizer", "{}"), "config.json"),
        (ROW, ("--against", "{}/gone.jsonl"), "gone.jsonl: No such file"),
        (ROW, ("--out", "{}/m.jsonl/x"), "give another --out"),
    ],
)
def test_what_cannot_be_read(tmp_path, capsys, content, options, message):
    if content:
        (tmp_path / "m.jsonl").write_text(content)
    options = [option.format(tmp_path) for option in ("--sample", "0", "--out", "{}", *options)]
    with pytest.raises(SystemExit) as stop:
        doctor.main([str(tmp_path / "m.jsonl"), *options])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and message in printed.err.splitlines()[-1] and not printed.out


def test_which_language_a_text_looks_like():
    for language, texts in SENTENCES.items():
        for claimed in SENTENCES:
            assert all(doctor.looks_like(text, claimed) == (language == claimed) for text in texts)
    for name in ("BERT", "1984", "Angela Merkel", "To London.", "42 %", "α"):
        assert all(doctor.looks_like(name, language) for language in SENTENCES), name
    assert doctor.looks_like("这个模型是在 LibriSpeech 和 VoxPopuli 上训练的。", "zh")
    assert not doctor.looks_like("Бедный мальчик", "en") and not doctor.looks_like("--", "fr")


def test_no_sentence_of_the_demos_test_is_trained_on(examine):
    train = (ROOT / "demo/train.jsonl").read_text(encoding="utf-8").splitlines()
    test = ROOT / "demo/test.jsonl"
    assert examine(train[:2400], "--against", test, "--sample", 0) == (0, {})


# ------------------------------------------------------------------------------
# All commands of prepare/


def start(*argv, stdout=None):
    """A command in a process group of its own, as in a terminal, its stderr to be read."""
    options = dict(cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen([sys.executable, *argv], stdout=stdout, **options)


def stop_after(words, process):
    """Ctrl-C once stderr has these words. Returns the exit code, and what stderr has after them."""
    text = ""
    while words not in text:
        text += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=60)[1]
    return process.returncode, text


def test_help_without_docstrings():
    commands = ("corpora", "doctor", "mcif", "synth")
    runs = [start("-OO", "-m", f"prepare.{command}", "--help") for command in commands]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 4


def test_output_that_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    run = start("-m", "prepare.corpora", stdout=writing)
    os.close(writing)
    assert (run.communicate()[1], run.returncode) == ("", 0)


@pytest.mark.parametrize("module", ["prepare", "numpy", "torch.nn"])
def test_stopped_while_it_is_imported(module):
    run = start("-X", "importtime", "-m", "prepare.corpora")
    code, text = stop_after(f" {module}\n", run)
    # In some places of these imports, a signal ends a process by itself.
    assert code in (130, -signal.SIGINT) and "Traceback" not in text


def test_stopped_while_it_works(tmp_path):
    """Processes that decode end without a word, too."""
    soundfile.write(tmp_path / "0.wav", np.tile(noise(5, 0), 6), 44100)
    rows = []
    for i in range(400):
        os.link(tmp_path / "0.wav", tmp_path / f"x{i}.wav")
        rows.append(clean_rows()[ASR] | {"audio": f"x{i}.wav", "duration": None})
    path = write(rows, tmp_path / "train.jsonl")
    run = start("-m", "prepare.doctor", str(path), "--out", str(tmp_path))
    code, text = stop_after("audio: ", run)
    assert code == 130 and text.endswith("doctor: stopped\n") and "Traceback" not in text
