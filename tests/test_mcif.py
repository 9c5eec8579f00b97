"""prepare/mcif.py: what it reads and writes, as the official scorer reads it; scores by hand; a run
that is stopped and goes on."""

import gzip
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch

import eval
from conftest import make_project, refused
from data import REFUSALS
from model import SpeechLM, UserError, fingerprint
from prepare import mcif

SOURCE = """<?xml version='1.0' encoding='utf-8'?>
<testset name="IWSLT2025"><task track="short" text_lang="de">
<sample id="7"><audio_path>a.wav</audio_path><video_path>a.mp4</video_path>
<instruction>Übersetze den englischem Inhalt nach Deutsch.</instruction></sample>
<sample id="3"><audio_path>a.wav</audio_path>
<instruction> Beantworte die folgende Frage &amp; begründe: Wer?\n</instruction></sample>
<sample id="9"><audio_path>b.wav</audio_path><instruction>Wer ist das?</instruction></sample>
<sample id="1"><audio_path>b.wav</audio_path><instruction>Transkribiere.</instruction></sample>
</task></testset>"""
REFERENCES = """<testset name="x"><task track="short" text_lang="en">
<sample id="7,1" iid="t" task="ASR"><reference>The cat sat.\nIt slept.</reference></sample>
<sample id="3" iid="q" task="QA" qa_type="A"><reference>A dog.</reference></sample>
<sample id="9" iid="r" task="QA" qa_type="NA"><reference>Not answerable.</reference></sample>
<sample id="0" iid="s" task="SUM"><reference>A talk.</reference></sample></task>
<task track="short" text_lang="de"><sample id="3,4" iid="t" task="TRANS">
<reference>Guten Tag. \nDas ist &lt;alles&gt;.</reference>
<metadata><transcript>Hello.\nThat's all.</transcript></metadata></sample></task></testset>"""
HOSTILE = [
    "\x00a\x07b\x1b[0m\x7f \ud800c\udfff d\ufffee\uffff\ufffd",
    "\n a\x0bb\r\nc\x1cd\x1fe\x85f  g\t \u3000",
    "]]> <![CDATA[x]]> <!-- y --> <?z?> </sample> &amp; &#0;",
    "👩‍🚀 \U0010ffff \u202eאב \ufeff \"è' 无法回答。",
    " \r\n\xa0",
]


def official(path, track, language):
    """The answers as the official scorer reads them."""
    for task in ElementTree.parse(path).getroot().iter("task"):
        if task.attrib["track"] == track and task.attrib["text_lang"] == language:
            return {x.attrib["id"]: (x.text or "").strip() for x in task.iter("sample")}


@pytest.fixture
def file(tmp_path):
    def write(content, name="x.xml"):
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


# --------------------------------------------------------------------------------------------------
# Reading


def test_source(file, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(8000), 16000)
    deep = SOURCE.replace("<task", "<x><y><task").replace("</task>", "</task></y></x>")
    for content in (SOURCE, deep, SOURCE.encode("utf-8-sig"), gzip.compress(SOURCE.encode())):
        examples = mcif.read_source(file(content), tmp_path)
        assert [example["id"][-1] for example in examples] == ["7", "3", "9", "1"]
        assert [example["seconds"] for example in examples] == [0.5, 0.5, 0, 0]
        assert examples[1]["instruction"] == "Beantworte die folgende Frage & begründe: Wer?"
        assert examples[1]["task"] == "sqa" and examples[1]["target_language"] == "de"


def test_tasks_of_official_instructions():
    tasks = {
        "Transcribe the English content.": "asr",
        "Traduci il contenuto inglese in italiano.": "st",
        "Beantworte die folgende Frage kurz und bündig: Nenne ihn": "sqa",
        "根据所给的英文内容，简要回答以下问题：谁": "sqa",
        "Fasse den englischen Inhalt in etwa 200 Wörtern zusammen.": "sqa",
        "Xyzzy": None,
    }
    assert {text: mcif.sample_task(text) for text in tasks} == tasks


BOMB = '<!DOCTYPE t [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><t>&b;</t>'


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no element found"),
        ("<html><body>404</body></html>", "found no task element"),
        ('<task track="short" text_lang="de"/>', "found no sample"),
        (SOURCE[:-10], "no element found"),
        (BOMB.encode("utf-16"), "invalid start byte"),
        (SOURCE.encode("latin-1"), "invalid continuation byte"),
        (BOMB, "found a DOCTYPE"),
        (gzip.compress(SOURCE.encode())[:-9], "Compressed file ended before"),
        (b"\x1f\x8bnonsense", "Unknown compression method"),
        (SOURCE.replace("Frage", "&nothing;"), "undefined entity"),
        (SOURCE.replace(' id="9"', ' id=" "'), "found no id"),
        (SOURCE.replace('track="short"', ""), "found no track"),
        (SOURCE.replace("<audio_path>b.wav</audio_path>", "", 1), "found no audio_path in .*'9'"),
        (SOURCE.replace("Wer ist das?", " "), "found no instruction in sample '9'"),
        (SOURCE.replace('id="9"', 'id="7"'), "found id '7' twice in task short de"),
    ],
)
def test_what_is_wrong_with_a_source(content, message, file, tmp_path):
    text = refused(message, mcif.read_source, file(content), tmp_path)
    assert text.startswith(f"{tmp_path / 'x.xml'}: ") and text.endswith(mcif.REMEDY)


def test_answers_are_read_as_the_scorer_reads_them(file, tmp_path):
    path = file("""<testset><part><task track="short" text_lang="de"><sample id="7">first</sample>
        <sample id="07"> a <b>c</b> d</sample><sample id="7">\n last\u3000</sample><sample id="8"/>
        <part><sample id="9">deep</sample></part></task></part><task track="long" text_lang="de"/>
        <task track="short" text_lang="de"><sample id="7">second</sample></task></testset>""")
    answers = mcif.read_answers(path)
    first = {"7": "last", "07": "a", "8": "", "9": "deep"}
    assert answers == {("short", "de"): first, ("long", "de"): {}}
    assert all(official(path, *key) == texts for key, texts in answers.items())
    refused("No such file", mcif.read_answers, tmp_path / "none.xml")


def test_references(file):
    english, german = mcif.read_references(file(REFERENCES)).values()
    assert english == [
        (["7", "1"], "asr", ["The cat sat.", "It slept."]),
        (["3"], "sqa", ["A dog."]),
        (["9"], "sqa", ["Not answerable."]),
    ]
    assert german == [(["3", "4"], "st", ["Guten Tag. ", "Das ist <alles>."])]
    names_of_2025 = REFERENCES.replace('"TRANS"', '"ST"').replace('"QA"', '"SQA"')
    assert mcif.read_references(file(names_of_2025))["short", "de"] == german
    again = REFERENCES.replace('iid="r"', 'iid="q"')  # of two with one name the last counts
    assert mcif.read_references(file(again))["short", "en"] == [english[0], english[2]]
    for old, what in ((' task="SUM"', "task"), ("A talk.", "reference")):
        damaged = file(REFERENCES.replace(old, ""))
        refused(f"found no {what} in sample '0'", mcif.read_references, damaged)


# --------------------------------------------------------------------------------------------------
# Writing


def test_texts_hold_every_character_of_xml_and_no_other():
    assert [mcif.xml_text(text) for text in HOSTILE] == [
        "ab[0m\x7f c de\ufffd",
        "a b c d e f g",
        *HOSTILE[2:4],
        "",
    ]
    for code in [*range(0x10000), *range(0x10000, sys.maxunicode, 997), sys.maxunicode]:
        valid = 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or code > 0xFFFF
        expected = f"a{chr(code)}b" if valid else "ab"
        if chr(code).isspace():
            expected = "a b"
        assert mcif.xml_text(f"a{chr(code)}b") == expected, hex(code)


def test_round_trip(tmp_path):
    texts = {str(i): mcif.xml_text(text) for i, text in enumerate(HOSTILE)}
    texts |= {"a b": "x", "<&\"'>": "y", "问\t\n": "z"}
    answers = {(track, to): texts for track in ("short", "long") for to in REFUSALS}
    path = tmp_path / "out.xml"
    mcif.write_answers(path, "x", answers)
    assert mcif.read_answers(path) == answers
    assert all(official(path, *key) == texts for key in answers)
    mcif.write_answers(path, 'T\x00 "1"', {("short", "de"): {"1": "", "0": "<Ja>"}})
    assert path.read_text(encoding="utf-8") == (
        "<?xml version='1.0' encoding='utf-8'?>\n"
        '<testset name="T &quot;1&quot;" type="output">\n  <task track="short" text_lang="de">\n'
        '    <sample id="1" />\n    <sample id="0">&lt;Ja&gt;</sample>\n  </task>\n</testset>'
    )


@pytest.mark.parametrize("text", ["a\x00", "\ud800", "\uffff", " a", "a\r\nb"])
def test_what_cannot_be_read_back_replaces_nothing(text, tmp_path):
    path = tmp_path / "out.xml"
    mcif.write_answers(path, "older", {("short", "de"): {"1": "a"}})
    before = path.read_bytes()
    with pytest.raises(UserError):
        mcif.write_answers(path, "newer", {("short", "de"): {"1": "b", "2": text}})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.xml"]


# --------------------------------------------------------------------------------------------------
# Scoring


@pytest.mark.parametrize(
    "texts, lines, pieces",
    [
        (["a b c d"], ["a b", "c d"], ["a b", "c d"]),
        (["a x b", "c d"], ["a b", "c d"], ["a x b", "c d"]),
        (["c d"], ["a b", "c d"], ["", "c d"]),
        (["x a"], ["", "a"], ["x", "a"]),
        (["one two three"], ["uno two"], ["one two three"]),
        (["我们用 ML 来", "GPT。"], ["我们用 ML", "来 GPT。"], ["我们用 ML", "来 GPT。"]),
    ],
)
def test_resegmentation_by_least_edit_distance(texts, lines, pieces):
    assert mcif.resegment(texts, lines) == pieces


def test_scores_by_hand(file, capsys):
    english = {"7": "the cat, sad", "1": "it slept", "3": "a dog", "9": "Not answerable."}
    german = {"3": "Guten Tag. Das", "4": "ist <alles>."}
    references, path = file(REFERENCES, "ref.xml"), file("", "hyp.xml")
    mcif.write_answers(path, "x", {("short", "en"): english, ("short", "de"): german})
    mcif.main(["score", str(path), str(references)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "short track, answers in en:" and len(lines) == 5
    assert lines[1].startswith("asr en, all, 1: WER 20.0 % (")  # one of five words
    assert "exact match 100.0 % (" in lines[2] and "refusal recall 100.0 % (" in lines[2]
    assert "BLEU 100.0 (" in lines[4] and "chrF2 100.0 (" in lines[4]
    file(REFERENCES.replace("7,1", "99,98"), "ref.xml")
    with pytest.raises(SystemExit, match="hyp.xml: found no answer to '99' and 1 more of track sh"):
        mcif.main(["score", str(path), str(references)])


# --------------------------------------------------------------------------------------------------
# Answering


ANSWER = "answer src.xml --audio . --out hyp.xml --ckpt ift.pt".split()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, with a checkpoint, SOURCE, and its two recordings."""
    monkeypatch.chdir(make_project(tmp_path))
    model = SpeechLM.from_parts("encoder", "llm")
    checkpoint = {
        "model": {f"adapter.{name}": p for name, p in model.adapter.state_dict().items()},
        "adapter": {},
        "bases": {part: fingerprint(part) for part in ("encoder", "llm")},
        "config": {"phase": "ift"},
        "data": [],
        "window": 30.0,
        "step": 1,
    }
    torch.save(checkpoint, "ift.pt")
    Path("src.xml").write_text(SOURCE, encoding="utf-8")
    os.rename("train0.wav", "a.wav")
    os.rename("train1.wav", "b.wav")


def test_a_run_that_is_stopped_goes_on(project, monkeypatch, capsys):
    answer_examples, stop = eval.answer_examples, [False, True]

    def answer_shortly(*args, **options):
        if stop and stop.pop(0):
            raise KeyboardInterrupt
        return answer_examples(*args, **{**options, "max_new_tokens": 8})

    monkeypatch.setattr(eval, "answer_examples", answer_shortly)
    monkeypatch.setattr(eval, "GROUP_ROWS", 2)
    with pytest.raises(SystemExit, match="130"):
        mcif.main(ANSWER)
    assert "stopped; start again to go on from here" in capsys.readouterr().err
    assert not os.path.exists("hyp.xml")
    mcif.main(ANSWER)
    out = capsys.readouterr().out
    assert "2 items are there already" in out and "4 answers, 0 without" in out
    answers = mcif.read_answers("hyp.xml")["short", "de"]
    assert list(answers) == ["7", "3", "9", "1"] and answers["3"] and answers["9"]


def test_every_id_has_an_answer(project, monkeypatch, capsys):
    hostile = {"sqa": "\x01", None: "\x00a\x1b[31m]]> <b>&amp; \ufffe"}

    def answer_hostile(model, tokenizer, examples, *args, **options):
        return [eval.Answer(hostile[example["task"]]) for example in examples]

    monkeypatch.setattr(eval, "answer_examples", answer_hostile)
    Path("b.wav").write_bytes(b"no audio")
    with pytest.raises(SystemExit, match="1"):
        mcif.main(ANSWER)
    out, err = capsys.readouterr()
    assert "4 answers, 2 without a usable recording" in out and "left out: short de 9: " in err
    no = "Nicht zu beantworten."
    answers = {"7": "a[31m]]> <b>&amp;", "3": no, "9": no, "1": ""}
    assert mcif.read_answers("hyp.xml") == {("short", "de"): answers}
    for name, message in (("--audio", "none: no such directory"), ("--ckpt", "none: No such file")):
        with pytest.raises(SystemExit, match=f"mcif: {message}"):
            mcif.main([*ANSWER, name, "none"])
