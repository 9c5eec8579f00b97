"""prepare/corpora.py: each corpus from a miniature of its true layout, quirks included, and what goes wrong."""

import errno
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import Manifest
from prepare import corpora, corpus_formats
from prepare.audio import audio_seconds
from prepare.errors import ManifestError
from prepare.licences import accepted, check_row, notice, test_fingerprints

test_fingerprints.__test__ = False  # pytest would take it for a test


def sound(path, seconds=0.5, rate=16000):
    """Writes a tone, in the format its suffix says, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.3 * np.sin(np.arange(round(seconds * rate)) / 9)
    kind = {".opus": {"format": "OGG", "subtype": "OPUS"}, ".ogg": {"format": "OGG"}}.get(path.suffix, {})
    soundfile.write(path, wave, rate, **kind)
    return path


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines))
    return path


def tsv(path, *rows):
    return text(path, *("\t".join(row) for row in rows))


def pack(path, mode, *files):
    """A tar of files, each in a folder as in the published ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for file in files:
            tar.add(file, f"./{path.name.split('.')[0]}/{file.name}" if "gz" in mode else f"./{file.name}")


@pytest.fixture
def run(tmp_path, capsys):
    """Converts tmp_path/NAME. Returns its rows, each as training reads it and its audio as long as it says, what was
    printed, and the last words of a run that ends with an exit code of 1, else None."""
    def convert(name, *options, source=None, out="out.jsonl"):
        out, last = tmp_path / out, None
        try:
            corpora.main([name, str(source or tmp_path / name), str(out), *map(str, options)])
        except SystemExit as stop:
            last = str(stop.code)
        rows = []
        if out.exists():
            manifest = Manifest(out)
            for row in manifest:
                wave = manifest.audio(row)  # at least 0.5 s, by padding
                assert len(wave) / 16000 == pytest.approx(max(row["duration"], 0.5), abs=0.08), row
                rows.append(row)
        return rows, capsys.readouterr().out, last
    return convert


def of(rows, *names):
    return [tuple(row.get(name) for name in names) for row in rows]


# -----------------------------------------------------------------------------
# the corpora


def test_list_of_corpora_needs_no_torch():
    """The list is read before anything is installed, and training reads it for the NOTICE."""
    code = "import sys; from prepare import corpora; corpora.main([]); assert not {'torch', 'numpy'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).resolve().parent.parent).stdout
    for name, corpus in corpora.CORPORA.items():
        assert re.search(f"^{name} +{re.escape(corpus.licence)} ", shown, re.M) and corpus.attribution
    refused = {name for name, corpus in corpora.CORPORA.items() if not accepted(corpus.licence)}
    assert refused == {"europarl-st", "spoken-squad", "librisqa", "kaldi"}
    assert [name for name, corpus in corpora.CORPORA.items() if corpus.test_only] == ["mcif"]
    assert "Vassil Panayotov" in notice([["librispeech", "CC-BY-4.0", "en", 3600]])


def librispeech(folder, split="train-clean-100", chapter="84-121123", texts=("GO DO YOU HEAR", "IT'S A FOX"),
                seconds=0.7):
    place = folder / split / chapter.replace("-", "/")
    text(place / f"{chapter}.trans.txt", *(f"{chapter}-{i:04d} {said}" for i, said in enumerate(texts)))
    for i in range(len(texts)):
        sound(place / f"{chapter}-{i:04d}.flac", seconds + i / 10)


def test_librispeech(run, tmp_path):
    """UPPER CASE becomes bare lower case; --split train takes all its parts, and no test speaker."""
    for split in ("train-clean-100", "train-other-500", "test-clean"):
        librispeech(tmp_path / "librispeech", split)
    rows, shown, last = run("librispeech")
    assert of(rows, "text", "duration", "style", "speaker", "licence") == 2 * [
        ("go do you hear", 0.7, "bare", "84", "CC-BY-4.0"), ("it's a fox", 0.8, "bare", "84", "CC-BY-4.0")]
    assert rows[0]["audio"] == "librispeech/train-clean-100/84/121123/84-121123-0000.flac" and rows[0]["task"] == "asr"
    assert shown == "librispeech: read 4 rows, 0.00 h; kept 4 rows (100.0%), 0.00 h\n" and last is None
    assert len(run("librispeech", "--split", "train-other-500", "test")[0]) == 4
    assert run("librispeech", "--split", "validation")[2] == (
        "corpora: librispeech: no split 'validation'; found test-clean, train-clean-100, train-other-500: choose from "
        "these")


def test_mls(run, tmp_path):
    """Languages by the folders' names; opus beside flac; what limited_supervision lists is not read twice."""
    for folder, suffix in (("mls_german", "flac"), ("mls_italian_opus", "opus")):
        split = tmp_path / "mls" / folder / "dev"
        text(split / "transcripts.txt", "10148_10119_000000\tja das ist ein satz", "10148_10119_000001\tnoch einer")
        for i in range(2):
            sound(split / f"audio/10148/10119/10148_10119_{i:06d}.{suffix}", 0.6 + i)
        text(split / "segments.txt", "10148_10119_000000\thttp://a.mp3\t1.0\t1.6")
        text(split / "limited_supervision/9hr/handles.txt", "10148_10119_000000")
    rows, *_ = run("mls", "--split", "dev")
    assert of(rows, "source_language", "target_language", "text", "style", "speaker") == [
        (code, code, said, "bare", "10148") for code in ("de", "it") for said in ("ja das ist ein satz", "noch einer")]
    assert of(rows, "duration")[0] == (0.6,) and of(rows, "duration")[3] == (pytest.approx(1.6, abs=0.01),)
    assert {row["source_language"] for row in run("mls", "--split", "dev", "--language", "it")[0]} == {"it"}
    assert len(run("mls", "--split", "dev", source=tmp_path / "mls/mls_german")[0]) == 2
    assert "no split 'validation'; found dev: choose" in run("mls", "--split", "validation")[2]
    assert "no language 'fr'; found de, it: choose" in run("mls", "--split", "dev", "--language", "fr")[2]


GENERATIONS = ["client_id path sentence up_votes down_votes age gender accent",
               "client_id path sentence up_votes down_votes age gender accent locale segment",
               "client_id path sentence up_votes down_votes age gender accents variant locale segment",
               "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant "
               "locale segment"]


@pytest.mark.parametrize("columns", GENERATIONS)
def test_commonvoice_of_any_release(run, tmp_path, columns):
    """Columns have come and gone over the years; a quote that is never closed must not swallow the rows behind it."""
    old, columns, folder = columns == GENERATIONS[0], columns.split(), tmp_path / "commonvoice" / "zh-HK"
    for name, seconds in (("a", 0.8), ("b", 3.2)):
        sound(folder / "clips" / f"{name}.mp3", seconds, 32000)
    rows = [{"client_id": "abc", "up_votes": "2", "locale": "zh-HK", "path": path, "sentence": said} for path, said in (
        ("a" if old else "a.mp3", '"你好， 你係邊個？'), ("b.mp3", 'He "said.'))]  # the first paths had no suffix
    tsv(folder / "train.tsv", columns, *([row.get(name, "") for name in columns] for row in rows))
    found, *_ = run("commonvoice")
    assert of(found, "text", "source_language", "speaker", "style", "licence") == [
        ('"你好，你係邊個？', "yue", "abc", "written", "CC0-1.0"), ('He "said.', "yue", "abc", "written", "CC0-1.0")]
    assert of(found, "duration") == [(pytest.approx(0.8, abs=0.08),), (pytest.approx(3.2, abs=0.08),)]


def test_commonvoice_durations_are_milliseconds_and_bad_rows_are_named(run, tmp_path):
    folder = tmp_path / "commonvoice"
    for name, seconds in (("a", 2.0), ("b", 1.0), ("wrong", 2.0)):
        sound(folder / f"clips/{name}.mp3", seconds)
    text(folder / "clips/empty.mp3", b"")
    text(folder / "clips/page.mp3", "<html>Not found</html>")
    sound(folder / "clips/short.mp3", 0.02).write_bytes(sound(tmp_path / "short.wav", 0.02).read_bytes())
    tsv(folder / "clip_durations.tsv", ["clip", "duration[ms]"], ["a.mp3", "2000"], ["wrong.mp3", "120000"],
        ["b.mp3", "x"])
    path = tsv(folder / "train.tsv", ["client_id", "path", "sentence", "locale"], ["s", "a.mp3", "One.", "de"],
               ["s", "b.mp3", "Two.", "de"], ["s", "wrong.mp3", "Three.", "de"], ["s", "empty.mp3", "Four.", "de"],
               ["s", "page.mp3", "Five.", "de"], ["s", "gone.mp3", "Six.", "de"], ["s", "a.mp3"],
               ["s", "a.mp3", " ", "de"], ["s", "short.mp3", "Nine.", "de"])
    with open(path, "ab") as file:
        file.write("s\ta.mp3\tZehn für".encode("latin-1") + b"\tde\n")
    rows, shown, last = run("commonvoice")
    assert of(rows, "text", "source_language") == [("One.", "de"), ("Two.", "de"), ("Three.", "de")]
    assert "1 stated durations are wrong by more than 0.1 s and 2 %; those of the audio were taken" in shown
    for reason, line in (("audio of 0 bytes", 5), ("audio that cannot be decoded or has no samples", 6),
                         ("audio missing", 7), ("unreadable line", 8), ("no text", 9), ("audio shorter than 35 ms", 10),
                         ("text or name that is not UTF-8", 11)):
        assert f"left out 1 rows, 0.00 h (10.0%): {reason}\n  '{path}' line {line}\n" in shown, reason
    assert "warning: 70% of the rows and " in shown
    assert last == ("corpora: commonvoice: the recordings of 1 rows are missing; download the rest and run this again")
    tsv(folder / "train.tsv", ["client_id", "file", "text"])
    assert run("commonvoice")[2] == (f"corpora: commonvoice: '{path}': found the columns client_id, file, text, "
                                     "expected also path, sentence; get the file again")


def test_covost2_joins_with_any_release_of_common_voice(run, tmp_path):
    """Of a later release clips are missing: their share is told. A backslash escapes; a quote does not."""
    folder, voice = tmp_path / "covost2", tmp_path / "cv-corpus-17.0" / "en"
    tsv(folder / "covost_v2.en_zh-CN.tsv", ["path", "translation", "split"], ["a.mp3", "你 好", "train"],
        ["b.mp3", '他说"不。', "train_covost"], ["gone.mp3", "无", "train"], ["c.mp3", "测试", "test"], ["a.mp3", "x"])
    tsv(folder / "covost_v2.en_zh-CN.train.tsv", ["path", "sentence", "translation", "client_id"])  # of the script
    tsv(folder / "covost_v2.de_en.tsv", ["path", "translation", "split"], ["a.mp3", 'A tab\\\there, a "quote', "dev"])
    tsv(voice / "validated.tsv", ["client_id", "path", "sentence_id", "sentence"],
        *([f"spk-{name}", f"{name}.mp3", "", "Hi."] for name in "abc"))
    for name in "abc":
        sound(voice / f"clips/{name}.mp3", 1.5)
    rows, shown, last = run("covost2", "--language", "en-zh", "--common-voice", voice.parent)
    assert of(rows, "task", "source_language", "target_language", "text", "speaker", "licence") == [
        ("st", "en", "zh", "你好", "spk-a", "CC0-1.0"), ("st", "en", "zh", '他说"不。', "spk-b", "CC0-1.0")]
    assert "kept 2 rows (50.0%)" in shown and "(25.0%): not in this release of Common Voice" in shown
    assert "(25.0%): unreadable line" in shown and last is None
    rows, *_ = run("covost2", "--language", "de-en", "--split", "dev", "--common-voice", voice)
    assert of(rows, "source_language", "target_language", "text") == [("de", "en", 'A tab here, a "quote')]
    assert "no translation 'en-it'; found de-en, en-zh: choose" in run("covost2", "--language", "en-it")[2]
    assert "expected validated.tsv or en/validated.tsv; give" in run("covost2", "--language", "en-zh")[2]


@pytest.fixture
def fleurs(tmp_path):
    def row(id, name, raw):
        return [id, name, raw, raw.lower().strip("."), "|", "16000", "FEMALE"]

    data = tmp_path / "fleurs" / "data"
    tsv(data / "en_us/train.tsv", row("7", "a.wav", 'A "Fox.'), row("7", "b.wav", 'A "Fox.'),
        row("9", "c.wav", "Not there."))
    tsv(data / "de_de/train.tsv", row("7", "d.wav", "Ein Fuchs."), row("7", "e.wav", "Ein Fuchs."))
    tsv(data / "cmn_hans_cn/train.tsv", row("7", "f.wav", "一 只 狐狸 run 了 。"), row("8", "f.wav", "别 的")[:3])
    clips = [sound(tmp_path / "fleurs-clips" / name, 1.0) for name in ("a.wav", "b.wav", "c.wav")]
    pack(data / "en_us/audio/train.tar.gz", "w:gz", *clips)
    sound(data / "cmn_hans_cn/audio/train/f.wav", 1.0)
    return data


def test_fleurs(run, fleurs, tmp_path):
    """Cased text from the third column; a join by sentence id makes human translations, for every speaker of it."""
    rows, shown, last = run("fleurs", "--language", "en")
    assert of(rows, "task", "text", "style", "duration") == [
        ("asr", 'A "Fox.', "written", 1.0), ("asr", 'A "Fox.', "written", 1.0), ("asr", "Not there.", "written", 1.0)]
    assert rows[0]["audio"] == "fleurs-audio/en_us/train/a.wav" and last is None and "stated" not in shown
    (tmp_path / "fleurs/data/en_us/audio/train.tar.gz").write_bytes(b"")  # unpacked once, not again
    rows, shown, _ = run("fleurs", "--language", "en-de", "en-zh", source=fleurs)
    assert of(rows, "task", "source_language", "target_language", "text", "style") == 2 * [
        ("st", "en", "de", "Ein Fuchs.", "written")] + 2 * [("st", "en", "zh", "一只狐狸 run 了。", "written")]
    assert "left out 1 rows, 0.00 h (16.7%): no sentence of this id in de" in shown
    rows, shown, _ = run("fleurs", "--language", "zh")
    assert of(rows, "text", "source_language") == [("一只狐狸 run 了。", "zh")] and "unreadable line" in shown
    rows, shown, last = run("fleurs", "--language", "de", out="de.jsonl")
    assert not rows and "no row of" in last and "audio missing" in shown and not (tmp_path / "de.jsonl").exists()
    assert "no language 'it'; found de, en, zh: choose" in run("fleurs", "--language", "en-it")[2]


def test_damaged_archive_is_named_and_what_was_unpacked_is_no_corpus(run, fleurs, tmp_path):
    archive = fleurs / "en_us/audio/train.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:len(whole) // 2])
    assert re.search(f"{archive}': .*; it is cut or damaged, get it again$", run("fleurs", "--language", "en")[2])
    assert not (tmp_path / "fleurs-audio/en_us/train").exists()
    archive.write_bytes(whole)
    assert len(run("fleurs", "--language", "en")[0]) == 3


VOXPOPULI = "id raw_text normalized_text speaker_id split gender is_gold_transcript accent".split()


def test_voxpopuli_as_the_official_script_leaves_it(run, tmp_path):
    folder = tmp_path / "voxpopuli/transcribed_data/it"
    tsv(folder / "asr_dev.tsv", VOXPOPULI,
        ["20130114-PLENARY-1-it_0", 'Signor "Presidente.', "signor presidente", "123", "dev", "male", "True", "None"],
        ["20130114-PLENARY-1-it_1", "", "è solo normalizzato", "None", "dev", "male", "True", "None"],
        ["20130114-PLENARY-1-it_2", "Non è oro.", "non è oro", "123", "dev", "male", "False", "None"])
    for i in range(3):
        sound(folder / f"2013/20130114-PLENARY-1-it_{i}.ogg", 36)
    rows, shown, _ = run("voxpopuli", "--split", "dev")
    assert of(rows, "text", "style", "speaker", "source_language") == [
        ('Signor "Presidente.', "written", "123", "it"), ("è solo normalizzato", "bare", "unknown", "it")]
    assert "left out 1 rows, 0.01 h (33.3%): not a gold transcript" in shown
    assert "expected asr_it.tsv.gz or asr_train.tsv" in run("voxpopuli")[2]


def test_voxpopuli_of_the_hub_and_by_the_table_it_was_cut_from(run, tmp_path):
    hub = tmp_path / "voxpopuli/data/de"
    tsv(hub / "asr_train.tsv", VOXPOPULI, ["20100210-3-de_4", "Ja.", "ja", "7", "train", "male", "True", "None"])
    pack(hub / "train/train_part_0.tar.gz", "w:gz", sound(tmp_path / "clips/20100210-3-de_4.wav", 0.9))
    rows, *_ = run("voxpopuli")
    assert of(rows, "text", "audio") == [("Ja.", "voxpopuli-audio/de/train/20100210-3-de_4.wav")]

    root = tmp_path / "raw"
    sound(root / "raw_audios/original/2010/20100210-3_original.ogg", 5)
    table = ["session_id|id_|original_text|normed_text|speaker_id|split|gender|vad|start_time|end_time",
             '20100210-3|a|"Er sagte ""nein""."|er sagte nein|7|train|male|[(1.0, 3.5)]|1.0|3.5',
             "20100210-3|b|Spät.|spät|7|train|male|[]|4.0|9.0", "20100210-3|c|Test.|test|7|test|male|[]|0.0|1.0",
             "20100210-3|d|Ohne.|ohne|7|train|male|[]||1.0"]
    (root / "transcribed_data/de").mkdir(parents=True)
    with gzip.open(root / "transcribed_data/de/asr_de.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(table) + "\n")
    rows, shown, _ = run("voxpopuli", source=root)
    assert of(rows, "text", "start", "duration") == [('Er sagte "nein".', 1.0, 2.5)]
    assert "part that ends after its recording" in shown and "unreadable line" in shown


def test_peoples_speech(run, tmp_path):
    """Flac in tars or a folder; share-alike parts and items keep their licence; what cannot be its text is left out."""
    train = tmp_path / "peoples-speech/train"

    def item(*clips, **fields):
        names, labels, ms = zip(*clips)
        data = {"name": names, "label": labels, "duration_ms": ms}
        return json.dumps({"identifier": "talk", "audio_document_id": "talk/a.mp3", "training_data": data} | fields)

    text(train / "clean.json",
         item(("./talk_DOT_mp3_00000.flac", "a clip of speech", 2000), ("talk_1.flac", "second clip", 2000)),
         item(("talk_2.flac", "licensed clip", 2000), licenseurl="http://creativecommons.org/licenses/by/3.0/us/"),
         item(("talk_3.flac", "x" * 500, 2000)), item(("talk_4.flac", "nowhere to be found", 2000)),
         '{"identifier": "cut', '{"training_data": {"name": [1]}}')
    text(train / "clean_000000.json", item(("./talk_DOT_mp3_00000.flac", "a clip of speech", 2000)))  # a sample of it
    text(train / "clean_sa.json", item(("sa/x.flac", "shared alike", 2000)))
    clips = [sound(tmp_path / "clips" / name, 2) for name in ("talk_DOT_mp3_00000.flac", "talk_1.flac", "talk_2.flac")]
    pack(train / "clean/clean_000000.tar", "w", *clips[:2])
    pack(train / "clean/clean_000001.tar", "w", clips[2])
    sound(train / "clean_sa/sa/x.flac", 2)
    text(tmp_path / "peoples-speech/test/test.json", item(("t.flac", "test", 2000)))
    rows, shown, last = run("peoples-speech")
    assert of(rows, "text", "licence", "style", "speaker") == [
        ("a clip of speech", "CC-BY-4.0", "bare", "talk"), ("second clip", "CC-BY-4.0", "bare", "talk"),
        ("licensed clip", "CC-BY-3.0", "bare", "talk"), ("shared alike", "CC-BY-SA-4.0", "bare", "talk")]
    assert rows[0]["audio"] == "peoples-speech/train/clean/clean_000000.tar/talk_DOT_mp3_00000.flac"
    assert "text too long or too short for its audio" in shown
    assert "left out 2 rows, 0.00 h (25.0%): unreadable line" in shown
    assert "recordings of 1 rows are missing" in last
    assert len(run("peoples-speech", "--split", "clean_sa", "--shards", tmp_path / "shards")[0]) == 1
    (train / "clean/clean_000001.tar").write_bytes((train / "clean/clean_000001.tar").read_bytes()[:9000])
    rows, shown, last = run("peoples-speech", "--split", "clean")
    assert len(rows) == 2 and "recordings of 2 rows are missing" in last and "cut or damaged" in shown


@pytest.mark.parametrize("given, spdx", [
    ("https://creativecommons.org/licenses/by-sa/3.0/", "CC-BY-SA-3.0"), ("cc-by-2.5", "CC-BY-2.5"),
    ("http://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"), ("CC BY 4.0", "CC-BY-4.0"),
    ("http://creativecommons.org/licenses/by-nc-nd/3.0/us/", "CC-BY-NC-ND-3.0"),
    ("all rights reserved", "all rights reserved")])
def test_spdx(given, spdx):
    assert corpora.spdx(given) == spdx


def test_europarl_st(run, tmp_path):
    """Parts of long recordings; refused later by its licence; what cannot be decoded says how to convert it."""
    folder = tmp_path / "europarl-st/v1.1/en"
    path = text(folder / "it/train/segments.lst", "en.20081117.22 0.5 2.25", "en.20081117.22 2.25 4.0",
                "en.20081117.23 0.0 1.0", "cut")
    text(folder / "it/train/segments.it", "Grazie.", 'È "così.', "Altro.", "Che?")
    text(folder / "it/train/speeches.lst", "en.20081117.22", "en.20081117.23")
    text(folder / "it/train/speakers.lst", "MEP_1", "MEP_2")
    text(folder / "it/train-noisy/segments.lst", "en.20081117.22 0.0 1.0")
    sound(folder / "audios/en.20081117.22.wav", 4.0)
    text(folder / "audios/en.20081117.23.m4a", b"\0\0\0\x20ftypM4A what libsndfile does not decode")
    rows, shown, last = run("europarl-st", "--language", "en-it")
    assert of(rows, "text", "start", "duration", "speaker", "source_language", "target_language", "task") == [
        ("Grazie.", 0.5, 1.75, "MEP_1", "en", "it", "st"), ('È "così.', 2.25, 1.75, "MEP_1", "en", "it", "st")]
    assert "m4a audio: convert it by ffmpeg -i NAME.m4a NAME.flac and run this again" in shown and last is None
    assert "unreadable line" in shown
    with pytest.raises(ManifestError, match="the corpus 'europarl-st' has the licence 'CC-BY-NC-4.0'"):
        check_row(rows[0], (), frozenset())
    path.write_text(path.read_text().replace("cut\n", ""))
    assert f"'{folder}/it/train/segments.it' line 4: found an end here" in run("europarl-st")[2]


def squad(path, *articles):
    """A file in SQuAD's format of (title, [paragraphs, each a list of (id, question, answers)]) each."""
    text(path, json.dumps({"data": [{"title": title, "paragraphs": [{"context": "recognised words", "qas": [
        {"id": id, "question": question, "answers": [{"text": answer, "answer_start": 0} for answer in answers]}
        for id, question, answers in qas]} for qas in paragraphs]} for title, paragraphs in articles]}))


def test_spoken_squad(run, tmp_path):
    """Sentences become passages; answers are SQuAD's, not the recogniser's; no article is both in train and in dev."""
    folder = tmp_path / "spoken-squad"
    titles = [f"Article_{i}" for i in range(40)]
    held_out = [title for title in titles if zlib.crc32(title.encode()) % 10 == 0]
    assert held_out
    squad(folder / "spoken_train-v1.1.json",
          *((title, [[(f"q{i}", "Where?", ["new york"])]]) for i, title in enumerate(titles)))
    squad(folder / "spoken_test-v1.1.json", ("Bowl", [
        [("t0", "Who?", ["denver broncos"]), ("t1", "Which?", ["x"])], [("t2", "What?", ["y"])],
        [("t3", "When?", ["z"])], []]))
    squad(tmp_path / "dev-v1.1.json", ("Bowl", [
        [("t0", "Who?", ["Denver Broncos", "Broncos"])], [("t2", "What?", ["Y"])], [("t3", "When?", ["Z"])]]))
    for i in range(40):
        sound(folder / f"Spoken-SQuAD_audio/train_wav/{i}_0_0.wav", 0.5, 24000)
    audio = folder / "Spoken-SQuAD_audio/dev_wav"
    for name, seconds in (("0_0_0", 0.5), ("0_0_1", 1.0), ("0_0_10", 0.1), ("0_2_0", 0.5)):
        sound(audio / f"{name}.wav", seconds, 24000)
    for i in range(2, 10):
        sound(audio / f"0_0_{i}.wav", 0.1, 24000)
    text(audio / "0_2_1.wav", "no sound")
    rows, shown, last = run("spoken-squad", "--split", "test", "--squad", tmp_path / "dev-v1.1.json")
    assert of(rows, "task", "question", "text", "duration", "licence") == [
        ("sqa", "Who?", "Denver Broncos", 2.4, "CC-BY-SA-4.0")]
    wave, rate = soundfile.read(tmp_path / rows[0]["audio"], dtype="int16")
    parts = [soundfile.read(audio / f"0_0_{i}.wav", dtype="int16")[0] for i in range(11)]  # 10 comes last
    assert rate == 24000 and np.array_equal(wave, np.concatenate(parts))
    for reason in ("question that is not in SQuAD's file", "audio missing",
                   "sentences that cannot be decoded or joined"):
        assert f"(25.0%): {reason}" in shown
    assert "recordings of 1 rows are missing" in last
    train, dev = ({row["audio"] for row in run("spoken-squad", "--split", split)[0]} for split in ("train", "dev"))
    assert len(dev) == len(held_out) and len(train) == 40 - len(held_out) and not train & dev
    assert run("spoken-squad", "--split", "dev")[0][0]["text"] == "new york"
    text(tmp_path / "dev-v1.1.json", '{"data": [{"title": "T"}]}')
    last = run("spoken-squad", "--squad", tmp_path / "dev-v1.1.json")[2]
    assert "no 'paragraphs' where SQuAD's format has it; get the file again" in last


def test_librisqa(run, tmp_path):
    """Two kinds of items; the paths in it say .wav, LibriSpeech has flac; no licence is stated, so none is given."""
    librispeech(tmp_path / "LibriSpeech", "train-clean-360", "100-121669", ("A", "B"))
    item = {"speech_path": "train-clean-360/100/121669/100-121669-0000.wav", "text": "A", "duration": 0.7}
    folder = tmp_path / "librisqa"
    text(folder / "LibriSQA-PartI/LibriSQA-PartI-train.json", json.dumps([
        item | {"question": "What is it?", "answer": "An A."}, {"speech_path": None},
        item | {"question": "", "answer": "B."}]))
    text(folder / "LibriSQA-PartII/LibriSQA-PartII-train.json", json.dumps([item | {
        "question_and_option": "What? A. an A B. a B", "answer": "A", "answer_and_analysis": "A. It is an A."}]))
    rows, shown, _ = run("librisqa", "--librispeech", tmp_path / "LibriSpeech")
    assert of(rows, "task", "question", "text", "licence", "speaker") == [
        ("sqa", "What is it?", "An A.", "unknown", "100"),
        ("sqa", "What? A. an A B. a B", "A. It is an A.", "unknown", "100")]
    assert "unreadable line\n" in shown and "item 2" in shown and "no question" in shown
    assert "expected train-clean-360 or LibriSpeech/train-clean-360" in run("librisqa")[2]


def mcif(folder, track, samples, references):
    """Source and reference of one language: samples (id, audio, instruction), references as XML."""
    xml = "".join(f'<sample id="{id}"><audio_path>{audio}</audio_path><instruction>{said}</instruction></sample>'
                  for id, audio, said in samples)
    head = f'<testset name="MCIF1.0"><task track="{track}" text_lang="de">'
    for kind in ("fixedprompts", "mixedprompts"):
        text(folder / f"MCIF1.0.IF.{track}.de.src.{kind}.xml", f"{head}{xml}</task></testset>")
    text(folder / f"MCIF1.0.{track}.de.ref.xml", f"{head}{references}</task></testset>")


def test_mcif_is_for_testing_and_keeps_its_texts_out_of_training(run, tmp_path):
    folder, question = tmp_path / "mcif", "Wie viele Sprachen hat das Korpus insgesamt?"
    trans = ('<sample id="{}" iid="TRANS_1" task="TRANS"><reference>Guten Tag zusammen, liebe Leute.\nWir zeigen heute '
             "etwas Neues.</reference><metadata><transcript>Hello everyone and welcome.\nToday we present a corpus."
             "</transcript></metadata></sample>")
    mcif(folder, "long", [("1", "talk.wav", "Übersetze."), ("2", "talk.wav", f"Beantworte die Frage: {question}"),
                          ("3", "talk.wav", "Fasse zusammen.")],
         trans.format("1") + '<sample id="2" iid="QA_1" task="QA" qa_type="NA"><reference>Nicht zu beantworten.'
         '</reference></sample><sample id="3" iid="SUM_1" task="SUM"><reference>Kurz gesagt.</reference></sample>'
         '<sample id="9" iid="QA_9" task="QA"><reference>Ja.</reference></sample>')
    mcif(folder, "short", [("1", "a.wav", "Übersetze."), ("2", "b.wav", "Übersetze.")], trans.format("1,2"))
    sound(folder / "LONG_AUDIOS/talk.wav", 2)
    rows, shown, last = run("mcif", out="mcif.jsonl")
    assert of(rows, "task", "text", "question", "target_language", "source_language", "test_only") == [
        ("st", "Guten Tag zusammen, liebe Leute. Wir zeigen heute etwas Neues.", None, "de", "en", True),
        ("sqa", "Nicht zu beantworten.", question, "de", "en", True)]
    assert "not transcription, translation or a question" in shown and "id that is not in the source file" in shown
    prints = test_fingerprints([tmp_path / "mcif.jsonl"])
    assert len(prints) == 6  # no answer is among them, as "No." is everybody's
    clean = {"corpus": "x", "licence": "CC0-1.0", "where": "m line 1", "task": "asr"}
    check_row(clean | {"text": "Something else that is said."}, (), prints)
    for stolen in ({"text": "hello everyone, and WELCOME"}, {"text": "Wir zeigen heute etwas Neues"},
                   {"task": "sqa", "question": question}):
        with pytest.raises(ManifestError, match="is a text of a test-only corpus"):
            check_row(clean | stolen, (), prints)
    with pytest.raises(ManifestError, match="for testing only"):
        check_row(rows[0], (), frozenset())
    rows, shown, last = run("mcif", "--split", "short", out="short.jsonl")
    assert not rows and "left out 2 rows" in shown and "take --split long" in shown and "no row of" in last


def test_ljspeech(run, tmp_path):
    """The text as printed, not with its numbers spelled out; a quote is a quote."""
    text(tmp_path / "ljspeech/metadata.csv", 'LJ001-0001|In 1813 "he|In eighteen thirteen "he', "LJ001-0002|Two.|Two.",
         "LJ001")
    for i in (1, 2):
        sound(tmp_path / f"ljspeech/wavs/LJ001-000{i}.wav", 0.9, 22050)
    rows, shown, _ = run("ljspeech")
    assert of(rows, "text", "style", "duration") == [('In 1813 "he', "written", 0.9), ("Two.", "written", 0.9)]
    assert "unreadable line" in shown


def test_kaldi_never_runs_a_command(run, tmp_path):
    """wav.scp may hold shell commands: they are counted and named, not run."""
    folder = tmp_path / "kaldi"
    sound(folder / "wav dir/rec 1.wav", 4)
    text(folder / "wav.scp", "rec1 wav dir/rec 1.wav", f"rec2  touch {tmp_path}/ran; cat x.wav |",
         f"rec3 {folder}/wav dir/rec 1.wav")
    text(folder / "text", "utt1 HALLO WELT", "utt2 WIEDER DA", "utt3 EINE PFEIFE", "utt4 NIRGENDS", "utt5 GANZ")
    text(folder / "segments", "utt1 rec1 0.5 1.5", "utt2 rec1 1.5 3.75", "utt3 rec2 0 1", "utt5 rec3 0 4")
    text(folder / "utt2spk", "utt1 anna", "utt2 bert")
    rows, shown, _ = run("kaldi", "--language", "de", "--licence", "CC-BY-4.0")
    assert of(rows, "text", "start", "duration", "speaker", "style", "source_language", "licence") == [
        ("hallo welt", 0.5, 1.0, "anna", "bare", "de", "CC-BY-4.0"),
        ("wieder da", 1.5, 2.25, "bert", "bare", "de", "CC-BY-4.0"),
        ("ganz", 0.0, 4.0, "unknown", "bare", "de", "CC-BY-4.0")]
    assert "wav.scp has a command, which is not run: write the audio to files" in shown
    assert not (tmp_path / "ran").exists()
    assert "no place in segments or wav.scp" in shown
    (folder / "segments").unlink()
    text(folder / "text", "rec1 Hallo Welt.")
    assert of(run("kaldi")[0], "text", "duration", "style", "licence") == [("Hallo Welt.", 4.0, "written", "unknown")]


# -----------------------------------------------------------------------------
# what goes wrong


def test_wrong_directories_and_commands(run, tmp_path, capsys):
    for name in "abcdef":
        text(tmp_path / "librispeech" / name, "x")
    assert run("librispeech")[2] == (
        f"corpora: librispeech: '{tmp_path}/librispeech': found a, b, c, d, e, ..., expected */*/*/*.trans.txt or "
        "LibriSpeech/*/*/*/*.trans.txt; give the corpus's own directory, as it is when unpacked")
    for name in corpora.CORPORA:
        for source in ("librispeech", "nothing"):
            rows, shown, last = run(name, source=tmp_path / source)
            assert "found a, b" in last or "found nothing" in last, name
    assert not list(tmp_path.glob("*.part"))  # nothing was begun
    for argv, message in ((["libri", "a", "b"], "no corpus 'libri'; choose from librispeech, mls"),
                          (["mls"], "expected NAME SOURCE_DIR OUT.jsonl"),
                          (["ljspeech", "a", "b", "--split", "dev"], "ljspeech takes no --split"),
                          (["mls", "a", "b", "--common-voice", "c"], "mls takes no --common-voice")):
        with pytest.raises(SystemExit) as stop:
            corpora.main(argv)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_half_a_corpus_goes_on_and_ends_with_an_exit_code(run, tmp_path):
    librispeech(tmp_path / "librispeech", texts=["WORD"] * 10)
    for path in sorted(tmp_path.glob("librispeech/*/*/*/*.flac"))[7:]:
        path.unlink()
    rows, shown, last = run("librispeech")
    assert len(rows) == 7 and last == ("corpora: librispeech: the recordings of 3 rows are missing; download the rest "
                                       "and run this again")
    assert "warning: 30% of the rows and 0% of the hours were left out, mainly for: audio missing" in shown
    librispeech(tmp_path / "librispeech", texts=["WORD"] * 10)
    assert len(run("librispeech")[0]) == 10


def test_headers_are_read_in_parallel_little_ahead_and_in_order():
    """On a slow disk four can wait at once; a corpus is never held in memory, however far its reader could run."""
    together = threading.Barrier(4, timeout=20)
    meet = corpus_formats.in_order(lambda i: i % 32 or together.wait() * 0, range(128))
    assert list(meet) == [i % 32 for i in range(128)]
    begun = 0

    def rows():
        nonlocal begun
        for begun in range(1, 100_001):
            yield begun

    done = corpus_formats.in_order(lambda row: -row, rows())
    for i in range(1, 5001):
        assert next(done) == -i and begun - i < 1000
    done.close()


def test_names_with_the_same_hash_are_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_formats, "hash", lambda _: 7, raising=False)
    lines = corpus_formats.Lines(tsv(tmp_path / "t.tsv", ["path", "client_id"], ["a", "1"], ["b", "2"]), "path")
    assert lines.get("a") == {"path": "a", "client_id": "1"} and lines.get("b") == {}


def stop_after(monkeypatch, count, error):
    """Rows are counted one by one: the run ends like this behind so many."""
    add = corpus_formats.Tally.add

    def counted(self, entry):
        add(self, entry)
        if self.kept == count:
            monkeypatch.setattr(corpus_formats.Tally, "add", add)
            raise error
    monkeypatch.setattr(corpus_formats.Tally, "add", counted)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_run_goes_on(run, tmp_path, monkeypatch, shards, error):
    """What was done is kept, shards too: the second run reads no header again and ends with the same manifest."""
    librispeech(tmp_path / "librispeech", texts=["WORD"] * 30, seconds=0.1)
    for path in sorted(tmp_path.glob("librispeech/*/*/*/*.flac"))[3:6]:
        path.unlink()
    monkeypatch.setattr(corpus_formats.Shards.__init__, "__defaults__", (30_000,))  # bytes a shard
    whole, *told = run("librispeech", *(("--shards", tmp_path / "whole") if shards else ()), out="whole.jsonl")
    options = ("--shards", tmp_path / "shards") if shards else ()
    stop_after(monkeypatch, 20, error)
    rows, _, last = run("librispeech", *options)
    assert not rows and "what was converted is kept, run the same command again to go on" in last
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 1 + 23
    other = run("librispeech", "--split", "train-clean-100", *options)
    assert "found what a run with other arguments has begun, expected nothing; repeat that command" in other[2]

    def not_again(path):
        assert int(path.stem[-4:]) >= 23, f"{path} is read again"
        return audio_seconds(path)
    monkeypatch.setattr("prepare.audio.audio_seconds", not_again)
    rows, *told_then = run("librispeech", *options)
    assert told_then == told and not list(tmp_path.rglob("*.part"))
    assert of(rows, "text", "duration", "speaker") == of(whole, "text", "duration", "speaker") and len(rows) == 27
    if shards:
        tars = sorted((tmp_path / "shards").glob("*.tar"))
        members = [member for tar in tars for member in tarfile.open(tar).getnames()]
        assert [row["audio"] for row in rows] == [f"shards/{tar.name}/{member}" for tar in tars
                                                 for member in tarfile.open(tar).getnames()]
        assert len(tars) > 2 and members[0] == "train-clean-100/84/121123/84-121123-0000.flac"
        assert "found out-00000.tar of an earlier run, expected none" in run("librispeech", *options)[2]


def test_a_killed_run_goes_on_before_the_shard_it_was_writing(run, tmp_path, monkeypatch):
    """After a kill nothing is closed: half a line and half a shard are done again."""
    librispeech(tmp_path / "librispeech", texts=["WORD"] * 30, seconds=0.1)
    monkeypatch.setattr(corpus_formats.Shards.__init__, "__defaults__", (30_000,))
    options = ("--shards", tmp_path / "shards")
    stop_after(monkeypatch, 20, KeyboardInterrupt())
    run("librispeech", *options)
    last = sorted((tmp_path / "shards").glob("*.tar"))[-1]
    last.rename(f"{last}.part").write_bytes(b"half")
    with open(tmp_path / "out.jsonl.part", "a") as file:
        file.write('{"row": {"au')
    rows, shown, stopped = run("librispeech", *options)
    assert len(rows) == 30 and stopped is None and not list(tmp_path.rglob("*.part"))


def test_a_full_disk_leaves_no_half_file_in_a_shard(tmp_path):
    """The file during which the disk filled up is cut off; those before it stay, and take no more room than alone."""
    path, shards = sound(tmp_path / "a.wav"), [corpus_formats.Shards(tmp_path, stem) for stem in ("alone", "full")]
    for some in shards:
        some.add(path, "a.wav")
    half = io.BytesIO(bytes(100_000))
    half.fileno = sound(tmp_path / "b.wav", 9).open().fileno  # promises more than there is to read
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(corpus_formats, "open", lambda *_: half, raising=False)
        shards[1].add(tmp_path / "b.wav", "b.wav")
    for some in shards:
        some.close()
    assert (tmp_path / "full-00000.tar").read_bytes() == (tmp_path / "alone-00000.tar").read_bytes()
    with tarfile.open(tmp_path / "full-00000.tar") as tar:
        assert tar.getnames() == ["a.wav"] and tar.extractfile("a.wav").read() == path.read_bytes()
