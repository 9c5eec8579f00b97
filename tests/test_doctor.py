"""prepare/doctor.py: every fault planted is found, named by its line, and decides the exit code."""

import json
import os
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from data import Manifest
from prepare import doctor
from prepare.instructions import REFUSALS
from prepare.licences import fingerprint

DEMO = Path(__file__).resolve().parent.parent / "demo"
SENTENCES = {
    "en": ["The old woman sells red apples on the market.", "My brother is waiting for the train to London.",
           "There are three green bottles on the table.", "Julia wants to buy a house with a garden."],
    "de": ["Die alte Frau verkauft rote Äpfel auf dem Markt.", "Mein Bruder wartet auf den Zug nach London.",
           "Auf dem Tisch stehen drei grüne Flaschen.", "Julia will ein Haus mit einem Garten kaufen."],
    "it": ["La vecchia vende mele rosse al mercato.", "Mio fratello aspetta il treno per Londra.",
           "Sul tavolo ci sono tre bottiglie verdi.", "Julia vuole comprare una casa con un giardino."],
    "zh": ["老太太在市场上卖红苹果。", "我弟弟在等去伦敦的火车。", "桌子上有三个绿瓶子。", "朱莉娅想买一座带花园的房子。"]}
QUESTIONS = [("What does the old woman sell?", "Red apples."), ("Where does my brother go?", "To London."),
             ("Who drinks the milk?", REFUSALS["en"]), ("What does Julia want to buy?", "A house with a garden.")]


def noise(seconds, seed, level=0.1, rate=16000):
    return level * np.random.default_rng(seed).standard_normal(int(seconds * rate))


@pytest.fixture
def corpus(tmp_path):
    """Writes a manifest, made as the demo's are, after change(rows) has had its way with it; and runs the doctor on it.
    Rows 0 to 3 are asr, 4 to 15 st, 16 to 19 sqa; rows of one recording share it. Line numbers are one more."""
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", noise(3, i), 16000)
    soundfile.write(tmp_path / "copy.flac", soundfile.read(tmp_path / "3.wav", dtype="int16")[0], 16000)

    def row(i, task, language, text, **more):
        return {"audio": f"{i}.wav", "duration": 3.0, "text": text, "task": task, "source_language": "en",
                "target_language": language, "speaker": f"s{i}", "corpus": "demo", "licence": "CC0-1.0", **more}

    def run(change=lambda rows: None, *options, name="train"):
        rows = [row(i, "st" if language != "en" else "asr", language, text)
                for language, texts in SENTENCES.items() for i, text in enumerate(texts)]
        rows += [row(i, "sqa", "en", answer, question=question) for i, (question, answer) in enumerate(QUESTIONS)]
        change(rows)
        lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return examine(tmp_path / f"{name}.jsonl", *options)
    return run


def examine(path, *options):
    """The exit code and the report, whose findings become {kind: finding}, each with "at", its lines."""
    code, out = 0, path.parent / "doctor"
    try:
        doctor.main([str(path), *map(str, options), "--out", str(out)])
    except SystemExit as stop:
        code = stop.code
    if code == 2:
        return code, None
    report = json.loads((out / f"{path.stem}.json").read_text(encoding="utf-8"))
    for finding in report["findings"]:
        assert finding["count"] == sum(map(len, finding["lines"].values())) and "\n" not in finding["text"]
        finding["at"] = [line for lines in finding["lines"].values() for line in lines]
    assert code == any(finding["serious"] for finding in report["findings"])
    report["findings"] = {finding["kind"]: finding for finding in report["findings"]}
    return code, report


def test_a_clean_manifest(corpus, capsys, tmp_path):
    code, report = corpus()
    assert code == 0 and report["findings"] == {}
    assert (report["rows"], report["recordings"], report["decoded"]) == (20, 4, 4)
    figures = report["figures"]
    assert [(line["task"], line["target_language"]) for line in figures] == [
        ("asr", "en"), ("st", "de"), ("st", "it"), ("st", "zh"), ("sqa", "en")]
    asr = figures[0]
    assert (asr["rows"], asr["recordings"], asr["speakers"], asr["licences"]) == (4, 4, 4, {"CC0-1.0": 4})
    assert asr["hours"] == round(12 / 3600, 4) and asr["seconds"] == [3, 3, 3]
    assert asr["shares"]["cased_punctuated"] == 1
    lengths = [len(text) for text in SENTENCES["en"]]
    assert asr["characters"][1] == np.median(lengths)
    assert asr["characters_per_s"][1] == pytest.approx(np.median(lengths) / 3, rel=1e-3)
    assert figures[3]["shares"]["uncased"] == 1 and figures[4]["shares"]["unanswerable"] == 0.25
    assert report["sample_rates"] == {"16000": 4} and report["level_dbfs"][1] == pytest.approx(-20, abs=0.2)
    longest = report["outliers"]["longest text"]["rows"][0]
    assert longest["value"] == max(map(len, SENTENCES["de"])) and longest["line"] == 5
    printed = capsys.readouterr().out
    assert "demo, st en-de: 4 rows, 4 recordings, 0.00 h" in printed and "0 serious findings, 0 notes" in printed
    svg = ElementTree.parse(tmp_path / "doctor/train.svg")
    words = "".join(svg.getroot().itertext())
    assert all(title in words for title in ("audio length (s)", "characters per second", "level (dBFS)", "st en-zh"))


# faults of the text: (the kind found, its lines, whether it is serious, what the line of text says, the change)
TEXT_FAULTS = {
    "JSON cut off": ("bad line", [3], True, "not JSON", lambda rows: rows.__setitem__(2, '{"audio": "2.wav')),
    "a task of its own": ("bad line", [1], True, "task is 'tts'", lambda rows: rows[0].update(task="tts")),
    "empty answer": ("no text", [18], True, "text is ''", lambda rows: rows[17].update(text="")),
    "text of dashes": ("no text", [2], True, "text is '--'", lambda rows: rows[1].update(text="--")),
    "licence": ("refused", [1, 4], True, "the corpus 'demo' has the licence 'CC-BY-NC-4.0'",
                lambda rows: [rows[i].update(licence="CC-BY-NC-4.0") for i in (0, 3)]),
    "licence of a source": ("refused", [5], True, "the corpus 'web' has the licence 'unknown'",
                            lambda rows: rows[4].update(sources=[["demo", "CC0-1.0"], ["web", "unknown"]])),
    "test only": ("refused", [9], True, "for testing only", lambda rows: rows[8].update(test_only=True)),
    "milliseconds": ("units", [1, 2, 3, 4, 21], True, "a median of 0.01",
                     lambda rows: (rows.append({**rows[0], "audio": "5.wav"}),
                                   [rows[i].update(duration=3000) for i in (0, 1, 2, 3, 20)])),
    "milliseconds by 60": ("units", [5, 6, 7, 8, 21], True, "expected 2 to 35",
                           lambda rows: (rows.append({**rows[4], "audio": "5.wav"}),
                                         [rows[i].update(duration=3000 // 60) for i in (4, 5, 6, 7, 20)])),
    "minutes": ("units", [9, 10, 11, 12, 21], True, "expected 2 to 35",
                lambda rows: (rows.append({**rows[8], "audio": "5.wav"}),
                              [rows[i].update(duration=3 / 60) for i in (8, 9, 10, 11, 20)])),
    "wrong language": ("language", [7, 18], True, "de: 'There are three",
                       lambda rows: (rows[6].update(text=SENTENCES["en"][2] + " They are big."),
                                     rows[17].update(question="桌子上有几个瓶子？"))),
    "transcript as translation": ("untranslated", [6], True, "as line 2",
                                  lambda rows: rows[5].update(text=rows[1]["text"].lower())),
    "asr of two languages": ("asr languages", [4], True, "from en to de",
                             lambda rows: rows[3].update(target_language="de", text=rows[7]["text"])),
    "st of one language": ("st languages", [5], True, "from de to de",
                           lambda rows: rows[4].update(source_language="de")),
    "refusal without full stop": ("refusal", [19], True, "'Not answerable'",
                                  lambda rows: rows[18].update(text="Not answerable")),
    "refusal of another language": ("refusal", [19], True, "'无法回答。'", lambda rows: rows[18].update(text="无法回答。")),
    "refusal in other words": ("refusal", [19], True, "'This question cannot",
                               lambda rows: rows[18].update(text="This question cannot be answered.")),
    "question as answer": ("echo", [17], True, "'what does the old",
                           lambda rows: rows[16].update(text=rows[16]["question"].lower())),
    "loop": ("loop", [1], False, "and then and then", lambda rows: rows[0].update(text="He went" + " and then" * 6)),
    "loop without spaces": ("loop", [12], False, "老太太在卖苹果", lambda rows: rows[11].update(text="老太太在卖" + "苹果" * 6)),
    "markup": ("markup", [2], False, "&amp;", lambda rows: rows[1].update(text="My brother &amp; my sister wait.")),
    "mojibake": ("markup", [6], False, "Ã",
                 lambda rows: rows[5].update(text="Mein Bruder wartet auf den nÃ¤chsten Zug.")),
    "row twice": ("same row", [21], False, "as line 7", lambda rows: rows.append(dict(rows[6]))),
    "two transcripts": ("two texts", [21], False, "unlike line 1",
                        lambda rows: rows.append({**rows[0], "text": SENTENCES["en"][1]})),
    "same text": ("same text", [21], False, "as line 1", lambda rows: rows.append({**rows[0], "audio": "9.wav"})),
    "bare that says nothing": ("style", [3], False, "lower case without punctuation, says written",
                               lambda rows: rows[2].update(text="there are three green bottles on the table")),
    "upper case that says bare": ("style", [3], False, "upper case, says bare",
                                  lambda rows: rows[2].update(text=SENTENCES["en"][2].upper(), style="bare")),
    "written that says bare": ("style", [3], False, "with case or punctuation, says bare",
                               lambda rows: rows[2].update(style="bare")),
    "mixed styles": ("mixed style", [8], False, "demo, st en-de: mostly with case", lambda rows: rows[7].update(
        text="julia will ein haus mit einem garten kaufen")),
    "no refusals": ("refusals", list(range(17, 37)), False, "demo, sqa en: 0 %", lambda rows: rows.__setitem__(
        slice(16, None), [{**rows[16], "audio": f"{i}.wav"} for i in range(20)])),
}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_faults_of_texts(corpus, fault, capsys):
    kind, lines, serious, words, change = TEXT_FAULTS[fault]
    code, report = corpus(change, "--sample", 0)
    found = report["findings"][kind]
    assert found["at"] == lines and found["serious"] == serious and words in found["text"], found["text"]
    assert f"train.jsonl line {lines[0]}" in found["text"]
    printed = capsys.readouterr().out
    assert found["text"] in printed.splitlines() and ("serious: " if serious else "note: ") in printed
    assert code == 1 if serious else not {"bad line", "no text", "refused", "units"} & set(report["findings"])


def test_a_bad_row_among_many_is_a_note_and_among_few_is_serious(corpus):
    def one(rows):
        rows[5].update(text=rows[1]["text"])
        rows += [{**row, "audio": f"{k}{row['audio']}"} for k in range(2) for row in rows[4:8]]
    code, report = corpus(one, "--sample", 0)
    assert report["findings"]["untranslated"]["of"] == 12 + 8 and not report["findings"]["untranslated"]["serious"]
    assert corpus(lambda rows: rows[5].update(text=rows[1]["text"]), "--sample", 0)[0] == 1


def test_one_recording_asked_for_several_tasks_and_questions_is_not_twice_there(corpus):
    def change(rows):
        rows.append({**rows[16], "question": "Who sells apples?", "text": "The old woman."})
        rows.append({**rows[0], "instruction": "Write down what you hear."})
        rows.append({**rows[0], "text": "the old woman sells red apples on the market", "style": "bare"})
    code, report = corpus(change)
    assert code == 0 and report["findings"] == {} and report["recordings"] == 4


def test_an_allowed_licence(corpus):
    change = lambda rows: [row.update(licence="CC-BY-SA-4.0") for row in rows]  # noqa: E731
    code, report = corpus(change, "--sample", 0)
    assert code == 1 and report["findings"]["refused"]["count"] == 20 and report["figures"][0]["refused_licences"]
    code, report = corpus(change, "--sample", 0, "--allow-licence", "CC-BY-SA-4.0")
    assert code == 0 and report["figures"][0]["refused_licences"] == []


def test_faults_of_recordings(corpus, tmp_path):
    good = noise(3, 99)
    files = {"empty.wav": b"", "page.mp3": b"<html>404</html>"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    waves = {"zero.wav": good[:0], "brief.wav": good[:900], "long.wav": np.tile(good, 11), "quiet.wav": 0.002 * good,
             "zeros.wav": 0 * good, "gaps.wav": good * (np.arange(len(good)) > 28000),
             "clipped.wav": np.clip(4 * good, -1, 1),
             "double.wav": np.tile(good, 2),
             "nearly.wav": np.tile(good, 7)}
    for name, wave in waves.items():
        soundfile.write(tmp_path / name, wave, 16000)
    soundfile.write(tmp_path / "phone.wav", noise(3, 98, rate=8000), 8000)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(len(good)) == 5, np.nan, good), 16000, subtype="FLOAT")
    cases = [("missing.wav", 3, "unusable", "No such file"), ("empty.wav", 3, "unusable", "found 0 bytes"),
             ("zero.wav", None, "unusable", "found no samples"), ("page.mp3", 3, "unusable", "cannot be decoded"),
             ("nan.wav", 3, "unusable", "NaN"), ("double.wav", 25, "beyond", "ends at 25.00 s of 6.00 s"),
             ("brief.wav", None, "too short", "0.056 s"), ("long.wav", None, "too long", "33.0 s"),
             ("quiet.wav", 3, "silent", "-74 dBFS"), ("zeros.wav", 3, "silent", "-120 dBFS"),
             ("gaps.wav", 3, "pauses", "58 %"), ("clipped.wav", 3, "clipped", "% of its samples"),
             ("copy.flac", 3, "same audio", "as line 4"), ("phone.wav", 3, "narrow", "8000 Hz"),
             ("double.wav", 2, "partly", "2.00 s of 6.00 s"), ("nearly.wav", 20, None, "")]
    for chosen in (cases[:-2], cases[-2:]):
        code, report = corpus(lambda rows: rows.extend(
            {**rows[0], "audio": name, "duration": seconds, "text": f"Sentence {name} for the test."}
            for name, seconds, *_ in chosen))
        places = {}
        for line, (name, _, kind, words) in enumerate(chosen, 21):
            if kind:
                places.setdefault(kind, []).append(line)
                assert words in report["findings"][kind]["text"], name
        assert {kind: report["findings"][kind]["at"] for kind in places} == places
        assert set(report["findings"]) == set(places)
        assert code == ("unusable" in places)
        serious = {kind for kind, finding in report["findings"].items() if finding["serious"]}
        assert serious == {"unusable", "beyond", "too long", "silent", "same audio"} & set(places)


def test_parts_of_files(corpus, tmp_path):
    soundfile.write(tmp_path / "packed.wav", noise(6, 9), 16000)
    soundfile.write(tmp_path / "word.wav", noise(1, 8), 16000)

    def change(rows):
        rows[0].update(audio="packed.wav")
        rows[1].update(audio="packed.wav", start=3.0)
        rows[2].update(audio="word.wav", duration=0.7)
    assert corpus(change)[1]["findings"] == {}, "two rows share a file, and of another the pause at the end is left out"


def test_a_slow_chinese_translation_is_as_fast_as_it_should_be(corpus):
    def change(rows):
        rows.append({**rows[12], "audio": "5.wav", "text": "这是第五句话。"})
        for row in rows[12:16] + rows[-1:]:
            row["duration"] = 8
    assert corpus(change, "--sample", 0)[1]["findings"] == {}


def test_copies_of_digital_silence_are_no_copies(corpus, tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(48000), 16000)
    _, report = corpus(lambda rows: [rows[i].update(audio=f"{name}.wav") for i, name in enumerate("ab")])
    assert report["findings"]["silent"]["at"] == [1, 2] and "same audio" not in report["findings"]


def test_a_file_that_kills_the_decoder(corpus, monkeypatch):
    load = doctor.load_audio
    monkeypatch.setattr(doctor, "load_audio",
                        lambda path, *part: os._exit(9) if path.endswith("2.wav") else load(path, *part))
    code, report = corpus()
    assert code == 1 and report["findings"]["unusable"]["at"] == [3] and report["decoded"] == 3
    assert "the decoder crashed" in report["findings"]["unusable"]["text"]


def test_a_sample(corpus):
    code, report = corpus(lambda rows: rows[0].pop("duration"), "--sample", 2)
    assert code == 0 and report["decoded"] == 2 and report["recordings"] == 5
    assert report["figures"][0]["seconds"] == [3, 3, 3], "without a duration, the header tells it"
    assert corpus(lambda rows: None, "--sample", 0)[1]["decoded"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Leaks


def other(rows):
    """A test set that shares nothing with the corpus: other recordings, texts, speakers."""
    for row in rows:
        row.update(audio=f"test{row['audio']}", speaker=f"test{row['speaker']}")
        if row["text"] not in REFUSALS.values():
            row["text"] += " Twice."
        if row["task"] == "sqa":
            row["question"] = f"And {row['question']}"


@pytest.fixture
def tests(corpus, tmp_path):
    """Writes a test manifest, other than the corpus but for change(rows)."""
    for i in range(4):
        soundfile.write(tmp_path / f"test{i}.wav", noise(3, 50 + i), 16000)

    def write(change=lambda rows: None):
        corpus(lambda rows: (other(rows), change(rows)), "--sample", 0, name="test")
        return tmp_path / "test.jsonl"
    return write


LONG = "In which of the four small villages did the old woman sell her apples?"
LEAKS = {
    "nothing": (None, [], lambda rows: None, lambda rows: None),
    "a sentence": ("test text", [2], lambda rows: None, lambda rows: rows[0].update(text=SENTENCES["en"][1].upper())),
    "a translation": ("test text", [10], lambda rows: None, lambda rows: rows[5].update(text=SENTENCES["it"][1])),
    "a short sentence": (None, [], lambda rows: rows[0].update(text="Thank you."),
                         lambda rows: rows[0].update(text="Thank you.")),
    "a question with its answer": ("test question", [17],
                                   lambda rows: rows[16].update(question=LONG, text="In the first."),
                                   lambda rows: rows[16].update(question=LONG, text="In the first.")),
    "a common question": ("common question", [17], lambda rows: None,
                          lambda rows: rows[16].update(question=QUESTIONS[0][0])),
    "a long question that none answers": ("common question", [19], lambda rows: rows[18].update(question=LONG),
                                          lambda rows: rows[18].update(question=LONG)),
    "speakers of no name": (None, [], lambda rows: [row.pop("speaker") for row in rows],
                            lambda rows: [row.pop("speaker") for row in rows]),
    "a speaker": ("test speaker", [1, 5, 9, 13, 17], lambda rows: None, lambda rows: rows[3].update(speaker="s0")),
    "the same recording": ("test audio", [3], lambda rows: None, lambda rows: rows[1].update(audio="./2.wav")),
    "the same sound, other file": ("test audio", [4], lambda rows: None,
                                   lambda rows: rows[1].update(audio="copy.flac")),
    "another part of the file": (None, [], lambda rows: [row.update(duration=1) for row in rows[2::4]],
                                 lambda rows: rows[1].update(audio="2.wav", start=1, duration=2)),
    "an overlapping part": ("test audio", [3], lambda rows: [row.update(duration=1.5) for row in rows[2::4]],
                            lambda rows: rows[1].update(audio="2.wav", start=1, duration=2)),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_leaks_into_training(corpus, tests, tmp_path, leak):
    kind, lines, change, test_change = LEAKS[leak]
    code, report = corpus(change, "--against", tests(test_change))
    assert set(report["findings"]) - {"partly"} == ({kind} if kind else set())
    assert code == (kind in ("test text", "test question", "test audio"))
    if kind:
        assert report["findings"][kind]["at"] == lines and "test.jsonl line " in report["findings"][kind]["text"]


def test_texts_of_test_only_corpora_beside_the_manifest(corpus, tmp_path):
    (tmp_path / "mcif.fingerprints").write_text(fingerprint("the old woman sells red apples on the market!") + "\n")
    code, report = corpus(lambda rows: None, "--sample", 0)
    assert code == 1 and report["findings"]["test text"]["at"] == [1]


def test_what_of_a_test_set_cannot_be_compared(corpus, tests):
    path = tests(lambda rows: (rows[1].update(audio="gone.wav"), rows.append('{"audio')))
    code, report = corpus(lambda rows: None, "--against", path)
    found = report["findings"]["against"]
    assert code == 0 and found["at"] == [2, 21] and "No such file" in found["text"] and "not JSON" in found["text"]


def test_the_demo_is_clean_and_its_test_sentences_are_not_in_training(tmp_path):
    train, test = (str(DEMO / f"{split}.jsonl") for split in ("train", "test"))
    doctor.main([train, "--against", test, "--sample", "0", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    assert {finding["kind"] for finding in report["findings"]} == {"same text", "test speaker", "common question"}


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_several_manifests_are_one_corpus(corpus, tmp_path, capsys):
    corpus(lambda rows: None, "--sample", 0, name="b")
    code, report = corpus(lambda rows: None, tmp_path / "b.jsonl", "--sample", 0, name="a")
    assert code == 1 and report["findings"]["same row"]["lines"] == {str(tmp_path / "b.jsonl"): list(range(1, 21))}
    assert f"{tmp_path / 'b.jsonl'} line 1 (as {tmp_path / 'a.jsonl'} line 1), line 2 (as" in capsys.readouterr().out


ROW = '{"audio": "a.wav", "text": "Hello.", "task": "asr"}'


@pytest.mark.parametrize("content, options, message", [
    (None, (), "No such file or directory, expected a manifest; correct the path"), ("\n", (), "found no rows"),
    ("RIFF\nWAVE\n", (), "line 1 and all others: no row that can be used, expected JSON objects"),
    (ROW, ("--tokenizer", "{}"), "copy the LLM's own tokenizer.json there"),
    (ROW, ("--against", "{}/gone.jsonl"), "gone.jsonl': No such file"),
    (ROW, ("--sample", "-1"), "--sample -1: expected 0 or more"),
    (ROW, ("--out", "{}/m.jsonl/x"), "Not a directory; give another --out")])
def test_what_cannot_be_looked_over(tmp_path, capsys, content, options, message):
    if content:
        (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        doctor.main([str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"),
                     *(option.format(tmp_path) for option in options)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and message in printed.err.splitlines()[-1] and not printed.out


def test_memory_does_not_hold_the_rows(tmp_path):
    def peak(count):
        path = tmp_path / f"{count}.jsonl"
        row = {"duration": 2, "task": "asr", "licence": "CC-BY-4.0", "instruction": "Write down what you hear. " * 200}
        path.write_text("".join(json.dumps(row | {"audio": f"{i}.wav", "text": f"This is sentence number {i}."}) + "\n"
                                for i in range(count)))
        manifests, tokenizer = [Manifest(path)], doctor.load_tokenizer(DEMO / "llm")
        tracemalloc.start()
        rows, *_ = doctor.read_rows(manifests, range(1), {}, tokenizer, (), frozenset())
        doctor.listen(manifests, rows, 0, "audio")
        return tracemalloc.get_traced_memory()[1], tracemalloc.stop()
    peak(10)  # what is loaded once
    (small, _), (large, _) = peak(200), peak(1200)
    assert (large - small) / 1000 < 400, "a row is 5 kB"


def test_a_picture_of_names_and_numbers_of_any_kind():
    from prepare.draw import draw_histograms
    rows = {"c & d\nasr en": ([1.0, 2.0, 1000.0], []), "e": ([5.0], [-3.0])}
    text = draw_histograms(("a (s)", "b <x>"), rows, "Enough.")
    words = [element.text for element in ElementTree.fromstring(text).iter() if element.text]
    assert {"b <x>", "c & d", "asr en", "-3"} <= set(words) and words[-1].endswith("Enough.")


# ----------------------------------------------------------------------------------------------------------------------
# Texts


def test_which_language_a_text_looks_like():
    for language, texts in SENTENCES.items():
        for text in texts:
            for claimed in SENTENCES:
                assert doctor.looks_like(text, claimed) == (language == claimed), (text, claimed)
                assert doctor.looks_like(text, "fr"), "no opinion of other languages"
    for name in ("BERT", "1984", "Angela Merkel", "To London.", "42 %", "Meta AI", "α"):
        assert all(doctor.looks_like(name, language) for language in SENTENCES), name
    assert doctor.looks_like("这个模型是在 LibriSpeech 和 VoxPopuli 上训练的。", "zh")
    assert doctor.looks_like("Das Large Language Model heißt GPT und ist von OpenAI.", "de")
    assert doctor.looks_like("THE OLD WOMAN SELLS RED APPLES ON THE MARKET", "en")
    assert not doctor.looks_like("東京 に 行きました。 とても 楽しかった です", "zh")
    assert not doctor.looks_like("佢哋喺街市賣蘋果", "zh"), "Cantonese"
    assert not doctor.looks_like("La sorpresa y el disgusto que produjo la noticia", "it"), "Spanish"
    assert not doctor.looks_like("Le chat est sur la table et il dort", "it"), "French"
    assert not doctor.looks_like("Бедный мальчик", "en") and not doctor.looks_like("猫", "it")


@pytest.mark.parametrize("split", ("dev", "test"))
def test_the_demo_looks_like_its_languages(split):
    rows = [row for row in Manifest(DEMO / f"{split}.jsonl")]
    assert all(doctor.looks_like(row["text"], row["target_language"]) for row in rows)
    assert all(doctor.looks_like(row["question"], row["target_language"]) for row in rows if row["task"] == "sqa")
    swapped = [doctor.looks_like(row["text"], "en") for row in rows if row["task"] == "st"]
    assert sum(swapped) < 0.15 * len(swapped)


def test_refusals_loops_and_styles():
    for language, text in REFUSALS.items():
        assert doctor.refuses(text, language) is True and doctor.refuses(text.rstrip(".。"), language) is False
        assert doctor.refuses(text, "fr") is True and doctor.refuses(text, "it" if language != "it" else "en") is False
    for text in ("N/A", "Unanswerable", "I cannot answer that.",
                 "nicht beantwortbar", "Non si può rispondere.", "不能回答"):
        assert doctor.refuses(text, "en") is False, text
    for text in ("Na.", "No.", "The answer is on the table.", "Nessuno.", "没有。", "None of them can."):
        assert doctor.refuses(text, "en") is None, text
    assert doctor.loops("no no no no no no no no") and doctor.loops("haha" * 5) and doctor.loops("I see. " * 8)
    assert not doctor.loops("no no no no") and not doctor.loops("one two one two one two nine zero zero zero")
    assert doctor.style_of("HELLO THERE") == (doctor.UPPER, False)
    assert doctor.style_of("it's 3.5") == (doctor.LOWER, False)
    assert doctor.style_of("你好。") == (doctor.UNCASED, True) and doctor.style_of("Hello, you") == (doctor.CASED, True)
