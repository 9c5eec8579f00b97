"""prepare/corpora.py: each corpus from a miniature of its layout, quirks included, and bad input.

A layout is text: PATH, and what it has indented below it; SECONDS PATH ..., tones; TAR MEMBER ...,
with tones of 1 s. In tables | is a tab. After "$ OPTIONS" follow the examples that these options
make, "- COUNT REASON; ..." for rows left out, and "! MESSAGE".
"""

import json
import re
import sys
import tarfile
import zlib

import numpy as np
import pytest
import soundfile

from data import ATTRIBUTIONS, Manifest, accepted, check_licence, protected_hashes
from model import UserError
from prepare import corpora
from prepare import corpus_formats as formats

# UPPER CASE becomes bare lower case; --split train takes all its parts, no test speaker.
LIBRISPEECH = """
train-clean-100/84/1/84-1.trans.txt
    84-1-0000 GO DO YOU HEAR
    84-1-0001 IT'S A FOX
train-other-500/85/1/85-1.trans.txt
    85-1-0000 OTHER
test-clean/86/1/86-1.trans.txt
0.7 train-clean-100/84/1/84-1-0000.flac train-other-500/85/1/85-1-0000.flac
$
asr en>en CC-BY-4.0 84 bare: go do you hear
asr en>en CC-BY-4.0 85 bare: other
- 1 audio missing: DIR/librispeech/train-clean-100/84/1/84-1.trans.txt line 2
! recordings are missing; get the rest and run this again
$ --split validation
! found no split 'validation'; choose from test-clean, train-clean-100, train-other-500
"""
# Languages by the folders' names; opus beside flac.
MLS = """
mls_german/dev/transcripts.txt
    10_20_000000|ja das ist
mls_italian_opus/dev/transcripts.txt
    11_20_000000|ecco
    11_20_000001|ecco
mls_italian_opus/dev/segments.txt
    11_20_000000 http://x/11.mp3 2.5 4.1
    11_20_000001 http://x/11.mp3 4.1 8.1
1 mls_german/dev/audio/10/20/10_20_000000.flac
1.6 mls_italian_opus/dev/audio/11/20/11_20_000000.opus
1.6 mls_italian_opus/dev/audio/11/20/11_20_000001.opus
$ --split dev
asr de>de CC-BY-4.0 10 bare: ja das ist
asr it>it CC-BY-4.0 11 bare: ecco
- 1 audio much shorter or longer than the corpus states
"""
# Columns come and go from release to release, the first paths had no suffix, and a quote that is
# never closed must not swallow the rows behind it. A quoted field is read as what was quoted.
COMMONVOICE = """
zh-HK/train.tsv
    client_id|path|sentence|accent
    abc|a|"你好， 你係邊個？|
    abc|a|He "said.|
ta/train.tsv
    client_id|path|sentence_id|sentence|accents|locale
    x|a.mp3|1ed7|வந்து||ta
    x|empty.mp3|2|A.||ta
    x|page.mp3|3|B.||ta
    x|a.mp3|4
    x|a.mp3|5| ||ta
    x|short.mp3|6|C.||ta
    x|a.mp3|7|D.\udcfc||ta
de/train.tsv
    client_id|path|sentence|locale
    c|a.mp3|"Er sagte ""Hallo"" zu mir."|de
    c|a.mp3|\"""Hallo"", sagte er."|de
    c|a.mp3|""Hallo"", sagte er.|de
    c|a.mp3|"Hallo", sagte er "zu" mir.|de
    c|a.mp3|"Ja" und "Nein"|de
    c|a.mp3|Er sagte \\"Hallo\\".|de
    c|a.mp3|"Er sagte \\"Hallo\\" zu mir."|de
    c|a.mp3|Kaum "mehr|de
    c|b.mp3|Zu kurz.|de
    "c"|"a.mp3"|"Alles."|"de"
de/clip_durations.tsv
    clip|duration[ms]
    a.mp3|1040
    b.mp3|2250
1 de/clips/a.mp3 de/clips/b.mp3
3.2 zh-HK/clips/a.mp3 ta/clips/a.mp3
0.02 ta/clips/short.mp3
ta/clips/empty.mp3
ta/clips/page.mp3
    <html>
$ --language yue
asr yue>yue CC0-1.0 abc: "你好，你係邊個？
asr yue>yue CC0-1.0 abc: He "said.
$ --language de
asr de>de CC0-1.0 c: Er sagte "Hallo" zu mir.
asr de>de CC0-1.0 c: "Hallo", sagte er.
asr de>de CC0-1.0 c: ""Hallo"", sagte er.
asr de>de CC0-1.0 c: "Hallo", sagte er "zu" mir.
asr de>de CC0-1.0 c: "Ja" und "Nein"
asr de>de CC0-1.0 c: Er sagte "Hallo".
asr de>de CC0-1.0 c: Er sagte "Hallo" zu mir.
asr de>de CC0-1.0 c: Kaum "mehr
asr de>de CC0-1.0 c: Alles.
- 1 audio much shorter or longer than the corpus states: DIR/commonvoice/de/train.tsv line 10
$ --language ta
asr ta>ta CC0-1.0 x: வந்து
- 2 audio that cannot be decoded; 1 unreadable line: DIR/commonvoice/ta/train.tsv line 5
- 1 no text; 1 audio shorter than 35 ms; 1 text or name that is not UTF-8
"""
# A later release of Common Voice lacks clips. A backslash escapes in the table; a quote does not.
COVOST2 = r"""
covost_v2.en_zh-CN.tsv
    path|translation|split
    a.mp3|你 好|train
    a.mp3|他说"不。|train_covost
    gone.mp3|无|train
    a.mp3|REMOVE|train
    a.mp3|"REMOVE"|train
    a.mp3||train
    a.mp3|"他说""不""。"|train
    a.mp3|Remove 这个|train
    b.mp3|短|train
    a.mp3|测试|test
covost_v2.en_zh-CN.train.tsv
covost_v2.de_en.tsv
    path|translation|split
    a.mp3|A tab\|here, a "quote|dev
../cv/en/validated.tsv
    client_id|path|sentence
    spk|a.mp3|Hi.
    spk|b.mp3|Hi.
../cv/en/clip_durations.tsv
    clip|duration[ms]
    b.mp3|4000
1.5 ../cv/en/clips/a.mp3 ../cv/en/clips/b.mp3
$ --language en-zh --common-voice DIR/cv
st en>zh CC0-1.0 spk: 你好
st en>zh CC0-1.0 spk: 他说"不。
st en>zh CC0-1.0 spk: 他说"不"。
st en>zh CC0-1.0 spk: Remove 这个
- 2 translation marked REMOVE: DIR/covost2/covost_v2.en_zh-CN.tsv line 5; 1 no text
- 1 audio much shorter or longer than the corpus states
- 1 not in this release of Common Voice: DIR/covost2/covost_v2.en_zh-CN.tsv line 4
$ --language de-en --split dev --common-voice DIR/cv/en
st de>en CC0-1.0 spk: A tab here, a "quote
$
! found no validated.tsv or de/validated.tsv; give the corpus's own directory
"""
# Cased text from the third column; the same id is the same sentence in every language.
FLEURS = """
data/en_us/train.tsv
    7|a.wav|A "Fox.|a "fox|-|16000|FEMALE
    9|b.wav|None.|none|-|16000|MALE
    10|b.wav|Cut.|cut|-|36000|MALE
    11|b.wav|"It is ""known""."|known|-|?|MALE
data/en_us/audio/train.tar.gz a.wav b.wav
data/de_de/train.tsv
    7|d.wav|Ein Fuchs.|ein fuchs|-|16000|FEMALE
data/cmn_hans_cn/train.tsv
    7|f.wav|一 只 狐狸 run 了 。|-|-|16000|FEMALE
    8|f.wav|别 的
1 data/cmn_hans_cn/audio/train/f.wav
$ --language en
asr en>en CC-BY-4.0: A "Fox.
asr en>en CC-BY-4.0: None.
asr en>en CC-BY-4.0: It is "known".
- 1 audio much shorter or longer than the corpus states
$ --language zh en-de
asr zh>zh CC-BY-4.0: 一只狐狸 run 了。
st en>de CC-BY-4.0: Ein Fuchs.
- 3 no sentence of this id in de; 1 unreadable line
$ --language de
- 1 audio missing
! no row could be used; no manifest was written
"""
# Clips in folders of years, as the official script leaves them, or in archives, as on the Hub.
VOXPOPULI = """
data/it/asr_dev.tsv
    id|raw_text|normalized_text|speaker_id|gender|is_gold_transcript
    2013-it_0|Signor "Presidente.|signor presidente|123|male|True
    2013-it_0||è solo normalizzato|None|male|True
    2013-it_0|Non è oro.|non è oro|123|male|False
data/de/asr_train.tsv
    id|raw_text|normalized_text|speaker_id
    2010-de_4|Ja.|ja|7
data/de/train/part_0.tar.gz 2010-de_4.wav
1 data/it/2013/2013-it_0.ogg
$ --split dev
asr it>it CC0-1.0 123: Signor "Presidente.
asr it>it CC0-1.0 bare: è solo normalizzato
- 1 not a gold transcript
$
asr de>de CC0-1.0 7: Ja.
"""
# Flac in tars or a folder; samples of a subset are not read again. An item may have its own
# licence, and lengths are stated.
PEOPLES_SPEECH = """
train/clean.json
    {"training_data": {"name": ["./0.flac"], "label": ["a clip"], "duration_ms": [1000]}}
    {"training_data": {"name": ["0.flac"], "label": ["no"], "duration_ms": [1000]}}
    {"training_data": {"name": [1]}}
    {"identifier": "cut
    {"identifier": "a", "licenseurl": "http://creativecommons.org/licenses/by-nc/3.0/us/", \
    "training_data": {"name": ["0.flac", "0.flac"], "label": ["another", "cut off"], \
    "duration_ms": [1100, 2000]}}
train/clean/0.tar 0.flac
train/clean_000000.json
train/clean_sa.json
    {"training_data": {"name": ["x/x.flac"], "label": ["alike"], "duration_ms": [1000]}}
1 train/clean_sa/x/x.flac
$
asr en>en CC-BY-4.0 bare: a clip
asr en>en CC-BY-NC-3.0 a bare: another
asr en>en CC-BY-SA-4.0 bare: alike
- 2 unreadable line; 1 text too long or too short for its audio
- 1 audio much shorter or longer than the corpus states
$ --split clean_sa
asr en>en CC-BY-SA-4.0 bare: alike
"""
# Answers are those of the recogniser's text or, where it is given, of SQuAD's file.
SPOKEN_SQUAD = """
spoken_test-v1.1.json
    {"data": [{"title": "Bowl", "paragraphs": [
    {"qas": [{"id": "t0", "question": "Who?", "answers": [{"text": "denver broncos"}]},
             {"id": "t1", "question": "Which?", "answers": [{"text": "x"}]}]},
    {"qas": [{"id": "t2", "question": "What?", "answers": [{"text": "y"}]}]},
    {"qas": [{"id": "t3", "question": "When?", "answers": [{"text": "z"}]}]}]}]}
../squad.json
    {"data": [{"title": "Bowl", "paragraphs": [
    {"qas": [{"id": "t0", "question": "Who?", "answers": [{"text": "Denver Broncos"}]},
             {"id": "t3", "question": "When?", "answers": []}]}]}]}
0.3 audio/dev_wav/0_0_0.wav audio/dev_wav/0_0_1.wav audio/dev_wav/0_1_0.wav audio/dev_wav/0_1_2.wav
audio/dev_wav/0_2_0.wav
    no sound
$ --split test --squad DIR/squad.json
sqa en>en CC-BY-SA-4.0 google-tts: Who? Denver Broncos
- 1 question that is not in SQuAD's file; 1 audio missing; 1 sentences that cannot be decoded
$ --split test
sqa en>en CC-BY-SA-4.0 google-tts: Who? denver broncos
sqa en>en CC-BY-SA-4.0 google-tts: Which? x
- 1 audio missing: DIR/spoken-squad/spoken_test-v1.1.json question t2 (dev_wav/0_1_1.wav)
- 1 sentences that cannot be decoded
"""
# The text as printed, not with its numbers spelled out; a quote is a quote.
LJSPEECH = """
metadata.csv
    LJ001-0001|In 1813 "he|In eighteen thirteen "he
    LJ001-0001|Two.|Two.
    LJ001
    LJ001-0001|"Three," he said, "four."|""
0.9 wavs/LJ001-0001.wav
$
asr en>en LicenseRef-PublicDomain lj: In 1813 "he
asr en>en LicenseRef-PublicDomain lj: Two.
asr en>en LicenseRef-PublicDomain lj: "Three," he said, "four."
- 1 unreadable line
"""
# wav.scp may hold shell commands, which are not run, and absolute paths.
KALDI = """
wav.scp
    rec1 wav dir/1.wav
    rec2  touch DIR/out.jsonl; cat x.wav |
    rec3 DIR/elsewhere/3.wav
    rec6 DIR/elsewhere/3.wav
text
    u1 HALLO WELT
    u3 PFEIFE
    u4 NIRGENDS
    u5 GANZ
    u6 ZU KURZ
reco2dur
    rec3 4.05
    rec6 9.5
segments
    u1 rec1 0.5 1.5
    u3 rec2 0 1
    u5 rec3 0 4
    u6 rec6 0 2
utt2spk
    u1 anna
4 ../elsewhere/3.wav
$ --language de --licence CC-BY-4.0
asr de>de CC-BY-4.0 bare: ganz
- 1 command in wav.scp, which is not run; 1 no place in segments or wav.scp; 1 audio missing
- 1 audio much shorter or longer than the corpus states
"""
# A text beside each recording, whatever the case of its suffix and the folder.
FOLDER = """
a.txt
    Der alte
    Mann.
Sub/b.TXT
    Ein "Wort".
Sub/c.txt
latin.txt
    K\udcfche
README.txt
    About this.
talk.txt
    Es folgt ein Film.
talk.mp4
    no sound
0.8 a.wav Sub/b.FLAC Sub/c.ogg Sub/alone.mp3 latin.opus
$ --language de --licence CC-BY-4.0
asr de>de CC-BY-4.0: Ein "Wort".
asr de>de CC-BY-4.0: Der alte Mann.
- 1 text without a recording of its name: DIR/folder/README.txt; 1 no text: DIR/folder/Sub/c.txt
- 1 recording without a text of its name: DIR/folder/Sub/alone.mp3; 1 text or name that is not UTF-8
- 1 audio that cannot be decoded
"""
MCIF = """
MCIF1.0.IF.long.de.src.fixedprompts.xml
    <testset><task track="long" text_lang="de">
    <sample id="1"><audio_path>talk.wav</audio_path><instruction>Ja.</instruction></sample>
    <sample id="2"><audio_path>talk.wav</audio_path>
    <instruction>Beantworte: Wie viele Sprachen hat das Korpus?</instruction></sample>
    </task></testset>
MCIF1.0.long.de.ref.xml
    <testset><task track="long" text_lang="de">
    <sample id="1" iid="T1" task="TRANS"><reference>Guten Tag, liebe Leute.
    Wir zeigen heute etwas Neues.</reference>
    <metadata><transcript>Hello everyone, welcome.
    Today we present a corpus.</transcript></metadata></sample>
    <sample id="2" iid="Q2" task="QA"><reference>Nicht zu beantworten.</reference></sample>
    <sample id="9" iid="Q9" task="QA"><reference>Ja.</reference></sample>
    <sample id="1,2" iid="T3" task="TRANS"><reference>Zwei.</reference></sample>
    <sample id="1" iid="S1" task="SUM"><reference>Kurz gesagt.</reference></sample>
    </task></testset>
2 LONG_AUDIOS/talk.wav
$
st en>de CC-BY-4.0: Guten Tag, liebe Leute. Wir zeigen heute etwas Neues.
sqa en>de CC-BY-4.0: Wie viele Sprachen hat das Korpus? Nicht zu beantworten.
- 2 not one recording with one text: take --split long
- 1 not transcription, translation or a question
"""


def sound(path, seconds):
    """Writes a tone, as wav, since the content counts and not the name; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.3 * np.sin(np.arange(round(seconds * 16000)) / 9)
    soundfile.write(path, wave, 16000, format="WAV")
    return path


def build(folder, layout):
    """Writes the files of a layout."""
    for block in re.split(r"\n(?=\S)", layout.strip("\n")):
        head, *lines = block.split("\n")
        name, *words = head.split()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if ".tar" in name:
            with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as tar:
                for word in words:
                    tar.add(sound(folder.parent / "members" / word, 1), f"./{word}")
                    tar.add(__file__, f"./._{word}")
        elif words:
            for word in words:
                sound(folder / word, float(name))
        else:
            text = "".join(f"{line[4:]}\n" for line in lines)
            is_table = path.suffix == ".tsv" or path.name == "transcripts.txt"
            text = text.replace("|", "\t") if is_table else text
            path.write_text(text, "utf-8", errors="surrogateescape")


def hide_files(folder):
    """Adds what a Mac leaves beside and above every file."""
    for path in list(folder.rglob("*")):
        part = path.relative_to(folder)
        for hidden in (path.parent / f"._{path.name}", folder / "__MACOSX" / part):
            hidden.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                hidden.write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
        (path.parent / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")


def show(example):
    """An example as one line, without what is as usual."""
    languages = f"{example['source_language']}>{example['target_language']}"
    speaker = "" if example["speaker"] == "unknown" else f" {example['speaker']}"
    part = f" {example['start']}+{example['duration']:.1f}" if example["start"] else ""
    bare = " bare" if example["style"] == "bare" else ""
    question = f"{example['question']} " if example["task"] == "sqa" else ""
    head = f"{example['task']} {languages} {example['licence']}{speaker}{part}{bare}"
    return f"{head}: {question}{example['text']}"


@pytest.fixture
def run(tmp_path, capsys):
    """Converts tmp_path/NAME. Returns the examples, as training reads them, whose audio is as long
    as they say, and what was printed, with the last words of a run whose exit code is 1."""

    def convert(name, *options, out="out.jsonl", source=None):
        out, stopped = tmp_path / out, ""
        out.unlink(missing_ok=True)
        try:
            corpora.main([name, str(tmp_path / (source or name)), str(out), *map(str, options)])
        except SystemExit as error:
            stopped = str(error.code)
        examples = list(Manifest(out)) if out.exists() else []
        for example in examples:
            wave = Manifest(out).audio(example)  # at least 0.5 s, by padding
            length = max(example["duration"], 0.5)
            assert len(wave) / 16000 == pytest.approx(length, abs=0.08), example
        printed = capsys.readouterr()
        return examples, printed.out + printed.err + stopped

    return convert


@pytest.mark.parametrize("name", sorted(corpora.CORPORA.keys() - {"parquet", "chat"}))
@pytest.mark.parametrize("prepare", [lambda folder: None, hide_files], ids=["plain", "mac"])
def test_layout(run, tmp_path, name, prepare):
    """Here audio is not below the manifest's folder, so that its paths are absolute."""
    layout = globals()[name.upper().replace("-", "_")].replace("DIR", str(tmp_path))
    files, *runs = layout.rstrip("\n").split("\n$")
    build(tmp_path / name, files)
    prepare(tmp_path / name)
    for case in runs:
        options, *lines = case.split("\n")
        examples, printed = run(name, *options.split(), out="made/out.jsonl")
        assert [show(e) for e in examples] == [line for line in lines if line[0] not in "-!"]
        dropped = [part for line in lines if line[0] == "-" for part in line[2:].split("; ")]
        for count, reason in (part.split(" ", 1) for part in dropped):
            pattern = rf"^{count} left out \([\d.]+%\), {re.escape(reason)}"
            assert re.search(pattern, printed, re.M), printed
        assert printed.count("left out") == len(dropped), printed
        assert all(line[2:] in printed for line in lines if line[0] == "!"), printed


def test_every_corpus_has_a_licence_and_an_attribution(capsys):
    corpora.main([])
    printed = capsys.readouterr().out
    for name, (licence, address, _) in corpora.CORPORA.items():
        assert re.search(f"^{name} +{re.escape(licence)} +{re.escape(address)}$", printed, re.M)
    refused = {name for name, (licence, *_) in corpora.CORPORA.items() if not accepted(licence)}
    forms = {"kaldi", "folder", "parquet", "chat"}  # of anybody's data
    assert refused == {"spoken-squad"} | forms
    assert corpora.CORPORA.keys() - ATTRIBUTIONS.keys() == forms
    address = "http://creativecommons.org/licenses/by-nc-nd/3.0/us/"
    names = [corpora.spdx(name) for name in (address, "publicdomain/zero/1.0", "CC BY 4.0", "mine")]
    assert names == ["CC-BY-NC-ND-3.0", "CC0-1.0", "CC-BY-4.0", "mine"]


def test_texts_of_mcif_are_kept_out_of_training(run, tmp_path):
    """Questions, lines and transcripts are protected; no answer is, as "No." is everybody's."""
    build(tmp_path / "mcif", MCIF.split("\n$")[0])
    examples, _ = run("mcif", out="mcif.jsonl")
    with pytest.raises(UserError, match="for testing only"):
        check_licence(examples[0], (), frozenset())
    hashes = protected_hashes([tmp_path / "mcif.jsonl"])
    assert len(hashes) == 7
    clean = {"corpus": "x", "licence": "CC0-1.0", "where": "m line 1", "task": "asr", "sources": []}
    check_licence(clean | {"text": "Something else that is said."}, (), hashes)
    for fields in (
        {"text": "hello everyone, WELCOME"},
        {"text": "Wir zeigen heute etwas Neues"},
        {"task": "sqa", "question": "Wie viele Sprachen hat das Korpus?"},
    ):
        with pytest.raises(UserError, match="test-only"):
            check_licence(clean | fields, (), hashes)


def test_passages_and_articles_of_spoken_squad(run, tmp_path):
    """Sentences become passages in the order of their numbers. No article is in train and dev."""
    qas = '{"qas": [{"id": "%s", "question": "Where?", "answers": [{"text": "here"}]}]}'
    titles = [f"Article_{i}" for i in range(20)]
    articles = [f'{{"title": "{title}", "paragraphs": [{qas % title}]}}' for title in titles]
    lines = ["spoken_train-v1.1.json", f'    {{"data": [{", ".join(articles)}]}}']
    lines += [f"0.3 train_wav/{i}_0_0.wav" for i in range(1, 20)]
    lines += [f"{0.1 + i / 20} train_wav/0_0_{i}.wav" for i in range(11)]  # 10 comes last
    build(tmp_path / "spoken-squad", "\n".join(lines))
    train, dev = (run("spoken-squad", "--split", split)[0] for split in ("train", "dev"))
    assert len(dev) == sum(zlib.crc32(title.encode()) % 10 == 0 for title in titles) > 0
    assert len({example["audio"] for example in train + dev}) == 20
    files = [tmp_path / f"spoken-squad/train_wav/0_0_{i}.wav" for i in range(11)]
    parts = [soundfile.read(file, dtype="int16")[0] for file in files]
    passage, _ = soundfile.read(tmp_path / "spoken-squad-audio/train-0_0.flac", dtype="int16")
    assert np.array_equal(passage, np.concatenate(parts))

    # The first sentence that is missing is named, whether others are there or not.
    for file in (tmp_path / "spoken-squad/train_wav").iterdir():
        file.unlink()
    examples, printed = run("spoken-squad")
    assert not examples and "no row could be used; no manifest was written" in printed
    assert f"{len(train)} left out (100.0%), audio missing: " in printed
    assert "question Article_0 (train_wav/0_0_0.wav)" in printed


def test_conversations(run, tmp_path):
    """A message's parts as the common formats have them; the first with its file in another way."""

    def messages(answer, *parts):
        turns = [("system", "You listen."), ("user", list(parts)), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    def ask(text):
        return {"type": "text", "text": text}

    audio = sound(tmp_path / "chat/data/a.wav", 1.2)
    qwen = {"type": "audio", "audio_url": audio.as_uri()}
    openai = {"type": "input_audio", "input_audio": {"data": "a.wav", "format": "wav"}}
    vllm = {"type": "audio_url", "audio_url": {"url": "a.wav"}}
    file = {"type": "audio", "audio": "a.wav"}
    rows = [
        messages("A fox.", qwen, ask("Who is it?")),
        messages([ask("Go.")], ask("Write it down."), openai),
        messages("Geh.", vllm, ask("Translate to German.")),
        messages("Alone.", file),
        messages("Gone.", {"type": "audio", "audio": "gone.wav"}),
        messages("Two.", file, file),
        messages("None.", ask("What?")),
        {"messages": [{"role": "user", "content": "What?"}]},
        {"messages": None},
    ]
    path = audio.with_name("rows.jsonl")
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"messages"')
    examples, printed = run("chat", "--licence", "CC-BY-4.0", "--language", "en", "de")
    assert [show(example) for example in examples] == [
        "sqa en>de CC-BY-4.0: Who is it? A fox.",
        "asr en>en CC-BY-4.0: Go.",
        "st en>de CC-BY-4.0: Geh.",
        "asr en>en CC-BY-4.0: Alone.",
    ]
    instructions = [example.get("instruction") for example in examples]
    assert instructions == ["Who is it?", "Write it down.", "Translate to German.", None]
    assert "5 left out (50.0%), not one recording, one instruction and one answer" in printed
    assert f"{path} line 6" in printed and "1 left out (10.0%), audio missing" in printed
    examples, printed = run("chat", source="chat/data/rows.jsonl")
    assert examples[0]["corpus"] == "rows.jsonl" and len(examples) == 3
    assert "1 left out (10.0%), translation, of which --language en de does not say" in printed


def test_parquet(run, tmp_path):
    """Audio inside, as bytes alone or with a name, or as a name; the first text column counts."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(name, **columns):
        path = tmp_path / "parquet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(columns), path, row_group_size=2)

    content = sound(tmp_path / "parquet/data/one.wav", 1).read_bytes()
    clips = [
        {"bytes": content, "path": "x.wav"},
        {"bytes": content, "path": None},
        {"bytes": None, "path": "one.wav"},
        {"bytes": b"page", "path": "x.wav"},
        {"bytes": content, "path": "x.wav"},
        {"bytes": content, "path": "x.wav"},
        None,
    ]
    texts = ["Ja.", 'So "was".', "Drei.", "Vier.", None, "Kurz.", "Nichts."]
    lengths = [1000, 1000, None, 1000, 1000, 3000, 1000]
    columns = dict(audio=clips, text=texts, speaker_id=[7] * 7, duration_ms=lengths)
    write("data/train-00000-of-00001.parquet", **columns)
    write("test/0000.parquet", audio=[content], normalized_text=["nur ein test"])
    hide_files(tmp_path / "parquet")
    options = ("--language", "de", "--licence", "CC-BY-4.0")
    examples, printed = run("parquet", *options)
    lines = ["Ja.", 'So "was".', "Drei."]
    assert [show(e) for e in examples] == [f"asr de>de CC-BY-4.0 7: {line}" for line in lines]
    assert examples[0]["corpus"] == "parquet" and len({e["audio"] for e in examples}) == 3
    assert "2 left out (28.6%), audio that cannot be decoded" in printed
    assert "(14.3%), no text" in printed and "shorter or longer than the corpus states" in printed
    examples, _ = run("parquet", *options, "--split", "test", "--shards", tmp_path / "shards")
    assert [show(e) for e in examples] == ["asr de>de CC-BY-4.0 bare: nur ein test"]

    assert "found no split 'dev'; choose from test, train" in run("parquet", "--split", "dev")[1]
    write("odd/train.parquet", sound=[content], text=["Ja."])
    assert "odd/train.parquet: expected the columns audio and text or sen" in run("parquet")[1]
    (tmp_path / "parquet/odd/train.parquet").write_bytes(content)
    assert "odd/train.parquet: Parquet magic bytes not found" in run("parquet")[1]


def test_without_pyarrow(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    build(tmp_path / "parquet", "train.parquet")
    printed = run("parquet")[1]
    assert "; pip install pyarrow; no manifest was written" in printed and "\n" not in printed


def test_an_archive_is_unpacked_once_and_never_in_part(run, tmp_path):
    build(tmp_path / "fleurs", FLEURS.split("\n$")[0])
    archive = tmp_path / "fleurs/data/en_us/audio/train.tar.gz"
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    examples, printed = run("fleurs", "--language", "en")
    assert not examples and re.search(f"{archive}: .*; it is cut or damaged, get it again", printed)
    assert not (tmp_path / "fleurs-audio/en_us/train").exists()
    archive.write_bytes(content)
    assert run("fleurs", "--language", "en")[0][0]["audio"] == "fleurs-audio/en_us/train/a.wav"
    unpacked = (tmp_path / "fleurs-audio/en_us/train").iterdir()
    assert sorted(path.name for path in unpacked) == ["a.wav", "b.wav"], "no ._a.wav"
    archive.write_bytes(b"")
    assert len(run("fleurs", "--language", "en")[0]) == 3


def test_wrong_directories_and_commands(run, tmp_path, capsys):
    for name in corpora.CORPORA:
        assert f"{tmp_path}/{name}: found no " in run(name)[1]
    assert not list(tmp_path.glob("*.jsonl*"))
    for command, message in {
        "libri a b": "invalid choice: 'libri'",
        "mls": "expected NAME SOURCE OUT.jsonl",
        "ljspeech a b --split dev": "ljspeech takes no --split",
        "mls a b --common-voice c": "mls takes no --common-voice",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            corpora.main(command.split())
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_that_is_stopped_leaves_no_manifest_and_no_shards(run, tmp_path, monkeypatch, error):
    """The same command does it all again. A shard has the sound of each row, links too, once."""
    names = [f"8-1-{i:04d}" for i in range(30)]
    lines = ["test/8/1/8-1.trans.txt", *(f"    {name} WORD" for name in names)]
    lines += [f"0.7 test/8/1/{name}.flac" for name in names]
    build(tmp_path / "librispeech", "\n".join(lines))
    first = tmp_path / "librispeech/test/8/1/8-1-0000.flac"
    first.rename(tmp_path / "linked.flac")
    first.symlink_to(tmp_path / "linked.flac")
    monkeypatch.setattr(formats, "SHARD_SIZE", 60_000)
    monkeypatch.setattr(formats, "BATCH", 8)

    def seconds(path):
        if path.stem.endswith("20"):
            raise error
        return 0.7

    options = ("--split", "test", "--shards", tmp_path / "shards")
    with monkeypatch.context() as patch:
        patch.setattr(formats, "audio_seconds", seconds)
        examples, printed = run("librispeech", *options)
    assert not examples and "no manifest was written" in printed
    assert not list(tmp_path.rglob("*.tar")) and not list(tmp_path.glob("out.jsonl*"))

    examples, _ = run("librispeech", *options)
    tars = sorted((tmp_path / "shards").iterdir())
    members = [f"shards/{tar.name}/{name}" for tar in tars for name in tarfile.open(tar).getnames()]
    assert [example["audio"] for example in examples] == members and len(tars) > 2
    assert members[0] == "shards/out-00000.tar/test/8/1/8-1-0000.flac" and len(members) == 30
    assert "a shard of an earlier run" in run("librispeech", *options)[1]
