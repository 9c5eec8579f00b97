"""prepare/mcif.py: what is written and read, against a reader written as the official scorer's is."""

import gzip
import os
import re
import sys
import time
import tracemalloc
from xml.etree import ElementTree

import pytest

from prepare import mcif
from prepare.mcif import FormatError, Reference, Sample, Task, read_answers, read_references, read_source, write_answers

TRACKS, LANGUAGES = ("short", "long"), ("en", "de", "it", "zh")
INSTRUCTIONS = {"en": "Transcribe the English content.", "de": "Beantworte die Frage: Wer & warum?",
                "it": "Traduci il contenuto inglese in italiano.", "zh": "将英文内容翻译成中文。"}
HOSTILE = {
    "\x00a\x07b\x1b[0m\x7f": "ab[0m\x7f",
    "a\x0bb\x0cc\x1cd\x1fe\x85f": "a b c d e f",
    "]]> <![CDATA[x]]> <!-- y --> <?z?>": "]]> <![CDATA[x]]> <!-- y --> <?z?>",
    "</sample></task><task> &amp; &lt; &#0; \"'": "</sample></task><task> &amp; &lt; &#0; \"'",
    "<!DOCTYPE x [<!ENTITY a 'b'>]>&a;": "<!DOCTYPE x [<!ENTITY a 'b'>]>&a;",
    "a\ud800b\udfffc": "abc",
    "a\ufffeb\uffffc\ufffd": "abc\ufffd",
    "": "",
    " \r\n\t \u3000\u2028\xa0": "",
    "\n one\r\ntwo  three\t": "one two three",
    "a \x00 b": "a b",
    "👩‍🚀 \U0001f600 \U0010ffff": "👩‍🚀 \U0001f600 \U0010ffff",
    "\u202eאב \u2066x\u2069 \ufeff": "\u202eאב \u2066x\u2069 \ufeff",
    "Straße 'è' 无法回答。": "Straße 'è' 无法回答。",
    "0123456789 " * 100_000: "0123456789 " * 99_999 + "0123456789",
}


def official(path, track, language):
    for task in ElementTree.parse(path).getroot().iter("task"):
        if task.attrib["track"] == track and task.attrib["text_lang"] == language:
            return {sample.attrib["id"]: (sample.text or "").strip() for sample in task.iter("sample")}


def valid(code):  # https://www.w3.org/TR/xml/#charsets
    return code in (9, 10, 13) or 0x20 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or 0x10000 <= code <= 0x10FFFF


def source(*tasks):
    """The XML of (track, language, ids) as the generator of the test sets writes it, with all its optional children."""
    body = "".join(f'<task track="{track}" text_lang="{language}">' + "".join(
        f'\n  <sample id="{id}"><audio_path>{track}{id}.wav</audio_path><video_path>a.mp4</video_path>'
        f'<text_path>a.en</text_path><instruction>{INSTRUCTIONS[language].replace("&", "&amp;")}</instruction></sample>'
        for id in ids) + "\n</task>" for track, language, ids in tasks)
    return f"<?xml version='1.0' encoding='utf-8'?>\n<testset name=\"MCIF1.0\">{body}</testset>"


def sample(id=' id="1"', audio="<audio_path>a.wav</audio_path>", instruction="<instruction>Go.</instruction>"):
    return f'<testset><task track="short" text_lang="de"><sample{id}>{audio}{instruction}</sample></task></testset>'


@pytest.fixture
def file(tmp_path):
    def write(content, name="x.xml"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name
    return write


@pytest.fixture
def fails(file):
    """Reads content, which must raise a FormatError: one line that names the file, then exactly the message."""
    def check(read, content, message):
        path = file(content)
        with pytest.raises(FormatError) as error:
            read(path)
        assert str(error.value) == f"{str(path)!r}: {message}" and "\n" not in message
    return check


# -----------------------------------------------------------------------------
# sources

def test_source(file):
    de, zh = INSTRUCTIONS["de"], INSTRUCTIONS["zh"]
    assert read_source(file(source(("short", "de", ["10", "2"]), ("long", "zh", ["2"])))) == [
        Task("short", "de", [Sample("10", "short10.wav", de), Sample("2", "short2.wav", de)]),
        Task("long", "zh", [Sample("2", "long2.wav", zh)])]


def test_source_of_any_name_depth_and_packing(file):
    plain = source(("short", "it", ["1"])).replace("MCIF1.0", "IWSLT2025")
    expected = [Task("short", "it", [Sample("1", "short1.wav", INSTRUCTIONS["it"])])]
    deep = plain.replace("<task", "<x><y><task").replace("</task>", "</task></y></x>")
    deep = deep.replace("<sample", "<part><sample").replace("</sample>", "</sample></part>")
    spaced = plain.replace("<audio_path>", "<audio_path>\n ").replace("</instruction>", "\t</instruction>")
    for content in (plain, deep, spaced, plain.encode("utf-8-sig"), gzip.compress(plain.encode())):
        assert read_source(file(content)) == expected
    assert read_source(str(file(gzip.compress(plain.encode()), "x.xml.gz"))) == expected


def test_source_errors(fails):
    add = "expected one; add it or copy the official file again"
    one = "expected one task with samples for each track and language; remove it"
    no_task = "found XML without a task element, expected an official file; correct the path"
    fails(read_source, "<testset/>", no_task)
    fails(read_source, "<html><body>404</body></html>", no_task)
    fails(read_source, sample(id=""), f"found no id in sample 1 of task 1, {add}")
    fails(read_source, sample(id=' id=" "'), f"found no id in sample 1 of task 1, {add}")
    fails(read_source, sample(audio=""), f"found no audio_path in sample '1' of task 1, {add}")
    fails(read_source, sample(audio="<audio_path/>"), f"found no audio_path in sample '1' of task 1, {add}")
    fails(read_source, sample(instruction=""), f"found no instruction in sample '1' of task 1, {add}")
    fails(read_source, sample(instruction="<instruction>\n </instruction>"),
          f"found no instruction in sample '1' of task 1, {add}")
    fails(read_source, sample().replace(' track="short"', ""), f"found no track in task 1, {add}")
    fails(read_source, source(("short", "en", ["1"]), ("short", "it", ["1"])).replace(' text_lang="it"', ""),
          f"found no text_lang in task 2, {add}")
    fails(read_source, source(("short", "de", ["7", "8", "7"])),
          "found id '7' twice in task ('short', 'de'), expected every id once; remove one of the samples")
    fails(read_source, source(("short", "de", ["1"]), ("long", "de", ["1"]), ("short", "de", ["2"])),
          f"found task ('short', 'de') twice, {one}")
    fails(read_source, source(("short", "de", [])), f"found no sample in task ('short', 'de'), {one}")
    fails(read_source, sample().replace("<sample", '<task track="long" text_lang="it"/><sample'),
          "found a task inside task 1, expected none, as in official files; correct the path")


@pytest.mark.parametrize("audio", ["/etc/passwd", "../a.wav", "a/../../b.wav", "..", "..\\a.wav", "C:\\a.wav",
                                   "c:a.wav", "\\\\host\\a.wav", "//host/a.wav", "\\a.wav"])
def test_audio_stays_below_its_folder(audio, fails):
    fails(read_source, sample(audio=f"<audio_path> {audio}</audio_path>"),
          f"found audio_path {audio!r} in sample '1' of task 1, expected a path below the audio folder; correct it")


@pytest.mark.parametrize("audio", ["AbCdEfGhIj.wav", "LONG_AUDIOS/x y.wav", "s.tar/1.flac", "a..b.wav", "演讲.wav"])
def test_plain_relative_audio_passes(audio, file):
    assert read_source(file(sample(audio=f"<audio_path>{audio}</audio_path>")))[0].samples[0].audio == audio


# -----------------------------------------------------------------------------
# files that are no XML, or hostile XML

PLAIN = source(("short", "de", ["1"]))
NO_XML = [("", "no element found"), ("RIFF....WAVE", "syntax error"), (PLAIN[:-10], "no element found"),
          (PLAIN.replace("Frage", "\x01"), "not well-formed"),
          (PLAIN.replace("Frage", "&#1;"), "reference to invalid character number"),
          (PLAIN.replace("Frage", "&x;"), "undefined entity"), (PLAIN.encode("utf-16"), "invalid start byte"),
          (PLAIN.replace("Frage", "Fr\xe4ge").encode("latin-1"), "invalid continuation byte"),
          (gzip.compress(PLAIN.encode())[:-9], "Compressed file ended before the end-of-stream marker was reached"),
          (gzip.compress(PLAIN.encode())[:-8] + bytes(8), "CRC check failed"),
          (gzip.compress(PLAIN.encode())[:30] + bytes(99), "Error -3 while decompressing data"),
          (b"\x1f\x8bnonsense", "Unknown compression method")]


@pytest.mark.parametrize("read", [read_source, read_answers, read_references])
def test_what_is_no_xml(read, file, tmp_path):
    paths = [(file(content, f"{i}.xml"), found) for i, (content, found) in enumerate(NO_XML)]
    for path, found in (*paths, (tmp_path / "none.xml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(FormatError) as error:
            read(path)
        remedy = "expected XML in UTF-8; correct the path or copy the file again"
        assert re.fullmatch(rf"'{re.escape(str(path))}': {found}.*, {remedy}", str(error.value)), error.value


LAUGHS = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(12))
DOCTYPES = [
    f'<!DOCTYPE testset [<!ENTITY a0 "ha">{LAUGHS}]>' + sample(instruction="<instruction>&a12;</instruction>"),
    f'<!DOCTYPE t [<!ENTITY a "{"a" * 100_000}">]>' + sample(instruction=f"<instruction>{'&a;' * 9999}</instruction>"),
    '<!DOCTYPE t [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + sample(instruction="<instruction>&a;</instruction>"),
    '<!-- <a> --><?p?>\n<!DOCTYPE t SYSTEM "http://localhost/t.dtd">' + sample(),
    "<?xml version='1.0' encoding='utf-8'?><!DOCTYPE\nt>" + sample(),
]


@pytest.mark.parametrize("read", [read_source, read_answers, read_references])
@pytest.mark.parametrize("pack", [str.encode, lambda text: gzip.compress(text.encode())])
def test_doctypes_are_refused_at_once(read, pack, fails):
    started = time.perf_counter()
    message = "found a DOCTYPE, expected none, as in official files; remove it or correct the path"
    for content in DOCTYPES:
        fails(read, pack(content), message)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp037"])
def test_no_doctype_hides_in_another_encoding(encoding, file):
    head = f"<?xml version='1.0' encoding='{encoding}'?>"
    start = head.encode() if encoding == "cp037" else head.encode(encoding)
    with pytest.raises(FormatError, match="expected XML in UTF-8"):
        read_source(file(start + DOCTYPES[2].encode(encoding)))


def test_size_is_bounded(fails, file, monkeypatch):
    message = "found more than 50000000 bytes, expected an official file, far smaller; correct the path"
    fails(read_answers, gzip.compress(bytes(1_000_000)) * 51, message)
    assert read_source(file(gzip.compress(sample().encode() + b" " * 1_000_000)))
    monkeypatch.setattr(mcif, "LIMIT", 1_000_000)
    tracemalloc.start()
    fails(read_answers, gzip.compress(bytes(1_000_000)) * 50, message.replace("50000000", "1000000"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    monkeypatch.setattr(mcif, "LIMIT", len(sample()))
    assert read_source(file(sample()))
    fails(read_source, sample() + " ", message.replace("50000000", str(len(sample()))))


def test_a_long_file_is_read_in_time_that_grows_with_its_size(file):
    key = f'track="{"s" * 100_000}" text_lang="de"'
    samples = "".join(f'<sample id="{i}">x</sample>' for i in range(50_000))
    started = time.perf_counter()
    assert len(read_answers(file(f"<task {key}>{samples}</task>")).popitem()[1]) == 50_000
    with pytest.raises(FormatError, match="a task inside task 1,"):
        read_answers(file('<task track="short" text_lang="de">' * 20_000 + "</task>" * 20_000))
    assert time.perf_counter() - started < 5


# -----------------------------------------------------------------------------
# answers

def answers_to(tasks, text="{} {} {}"):
    return {(task.track, task.language, sample.id): text.format(task.track, task.language, sample.id)
            for task in tasks for sample in task.samples}


def round_trip(path, tasks, answers):
    """The answers as they come back; the official reader must see the same, and every id once, in the tasks' order."""
    write_answers(path, "TEAM", tasks, answers)
    found = read_answers(path)
    assert list(found) == [task[:2] for task in tasks]
    for task in tasks:
        assert official(path, *task[:2]) == found[task[:2]]
        assert list(found[task[:2]]) == [sample.id for sample in task.samples]
    written = [s.attrib["id"] for s in ElementTree.parse(path).iter("sample")]
    assert written == [sample.id for task in tasks for sample in task.samples]
    return {(*key, id): text for key, texts in found.items() for id, text in texts.items()}


def test_every_track_and_language_in_one_file_and_apart(tmp_path, file):
    keys = [(track, language) for track in TRACKS for language in LANGUAGES]
    tasks = read_source(file(source(*((*key, ["12", "3", "0"]) for key in keys))))
    answers = answers_to(tasks)
    assert len(answers) == 24 and round_trip(tmp_path / "out.xml", tasks, answers) == answers
    for task in tasks:
        assert round_trip(tmp_path / "out.xml", [task], answers) == answers_to([task])
        assert official(tmp_path / "out.xml", "other", task.language) is None


def test_the_file_is_as_the_official_writer_makes_it(tmp_path):
    task = Task("short", "de", [Sample("1", "a.wav", "Go."), Sample("0", "a.wav", "Go.")])
    answers = {("short", "de", "0"): "<Ja>", ("short", "de", "1"): "", ("long", "de", "0"): "of no task"}
    write_answers(str(tmp_path / "out.xml"), 'T\x00 "1"', [task], answers)
    assert (tmp_path / "out.xml").read_text(encoding="utf-8") == """<?xml version='1.0' encoding='utf-8'?>
<testset name="T &quot;1&quot;" type="output">
  <task track="short" text_lang="de">
    <sample id="1" />
    <sample id="0">&lt;Ja&gt;</sample>
  </task>
</testset>"""
    assert os.listdir(tmp_path) == ["out.xml"]


def test_hostile_texts_and_ids(tmp_path):
    ids = ["0", "a b", "<&\"'>", "问\t\n", *map(str, range(1, len(HOSTILE) - 3))]
    task = Task("short", "zh", [Sample(id, "a.wav", "Go.") for id in ids])
    answers = {("short", "zh", id): text for id, text in zip(ids, HOSTILE)}
    found = round_trip(tmp_path / "out.xml", [task], answers)
    assert list(found.values()) == list(HOSTILE.values())


@pytest.mark.parametrize("text, expected", HOSTILE.items(), ids=range(len(HOSTILE)))
def test_xml_text(text, expected):
    assert mcif.xml_text(text) == expected == mcif.xml_text(expected)


def test_xml_text_keeps_every_character_xml_has_and_no_other(tmp_path):
    codes = [*range(0x10000), *range(0x10000, sys.maxunicode, 997), 0x1FFFE, 0x1FFFF, sys.maxunicode]
    for c in map(chr, codes):
        assert mcif.xml_text(f"a{c}b") == ("a b" if c.isspace() else f"a{c}b" if valid(ord(c)) else "ab"), hex(ord(c))
    task = Task("long", "en", [Sample("1", "a.wav", "Go.")])
    text = "".join(f"x{chr(code)}" for code in codes)
    assert round_trip(tmp_path / "out.xml", [task], {("long", "en", "1"): text}).popitem()[1] == mcif.xml_text(text)


def test_answers_are_read_as_the_scorer_reads_them(file):
    path = file("""<testset name="x" type="output"><part>
        <task track="short" text_lang="de"><sample id="7">first</sample><sample id="07"> a <b>c</b> d</sample>
            <sample id="7">\n last\u3000</sample><sample id="8"/><part><sample id="9">deep</sample></part></task></part>
        <task track="short" text_lang="de"><sample id="7">second task</sample><sample id="10">x</sample></task>
        <task track="long" text_lang="de"/><task track="short" text_lang="en"><sample id="7">en</sample></task>
        </testset>""")
    assert read_answers(path) == {("short", "de"): {"7": "last", "07": "a", "8": "", "9": "deep"}, ("long", "de"): {},
                                  ("short", "en"): {"7": "en"}}
    for key, texts in read_answers(path).items():
        assert official(path, *key) == texts
    assert read_answers(file(gzip.compress(path.read_bytes()))) == read_answers(path)


def test_answer_errors(fails):
    add = "expected one; add it or copy the official file again"
    fails(read_answers, "<x/>", "found XML without a task element, expected an official file; correct the path")
    fails(read_answers, '<task track="short"/>', f"found no text_lang in task 1, {add}")
    fails(read_answers, '<task track="short" text_lang="de"><sample id="1"/><sample/></task>',
          f"found no id in sample 2 of task 1, {add}")


TASKS = [Task(track, "de", [Sample(id, "a.wav", "Go.") for id in ids])
         for track, ids in (("short", "321"), ("long", "1"))]


@pytest.fixture
def older(tmp_path):
    write_answers(tmp_path / "out.xml", "older", TASKS, answers_to(TASKS, "older"))
    return tmp_path / "out.xml"


def check_older_file_is_kept(path, error, tasks=TASKS, answers=answers_to(TASKS)):
    before = path.read_bytes()
    with pytest.raises(error) as raised:
        write_answers(path, "newer", tasks, answers)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    return str(raised.value)


def test_an_older_file_is_replaced(older):
    write_answers(older, "newer", TASKS, answers_to(TASKS))
    assert b"older" not in older.read_bytes() and os.listdir(older.parent) == [older.name]


def test_missing_answers(older):
    answers = answers_to(TASKS)
    del answers["short", "de", "2"], answers["long", "de", "1"]
    assert check_older_file_is_kept(older, FormatError, answers=answers) == (
        f"{str(older)!r}: found no answer to 2 of 4 samples, the first ('short', 'de', '2'), expected one to each "
        "sample of the source; answer these too")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_disk_errors(step, older, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, step, fail)
    assert "No space left" in check_older_file_is_kept(older, OSError)


def test_an_interrupt_leaves_nothing_behind(older, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    check_older_file_is_kept(older, KeyboardInterrupt)


@pytest.mark.parametrize("damage", [lambda data: data.replace(b"short de 2", b"short de 3"),
                                    lambda data: data.replace(b'id="2"', b'id="4"'),
                                    lambda data: data.replace(b'text_lang="de"', b'text_lang="it"', 1),
                                    lambda data: data.replace(b"</task>", b'<sample id="9"/></task>', 1)])
def test_what_reads_back_differently(damage, older, monkeypatch):
    fsync = os.fsync

    def damaged_fsync(descriptor):
        fsync(descriptor)
        path = older.with_name("out.xml.tmp")
        assert damage(path.read_bytes()) != path.read_bytes()
        path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setattr(os, "fsync", damaged_fsync)
    assert check_older_file_is_kept(older, FormatError) == (
        f"{str(older)!r}: found other ids or texts on reading back, expected those written; check the disk and try "
        "again")


def test_a_file_cut_short_by_the_disk(older, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.ftruncate(descriptor, 150))
    assert "expected XML in UTF-8" in check_older_file_is_kept(older, FormatError)


def test_the_new_file_is_synced_whole_and_checked_before_it_replaces(older, monkeypatch):
    steps = []

    def logged(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (steps.append((name, args)), function(*args))[1])
    for module, name in ((mcif, "read_answers"), (os, "replace")):
        logged(module, name)
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append(("fsync", os.fstat(descriptor).st_size)))
    write_answers(older, "newer", TASKS, answers_to(TASKS))
    temporary = older.with_name("out.xml.tmp")
    assert steps == [("fsync", older.stat().st_size), ("read_answers", (temporary,)), ("replace", (temporary, older))]


def test_ids_that_xml_cannot_hold(older):
    for id in ("a\x00", "\ud800", "", "\uffff"):
        task = Task("short", "de", [Sample(id, "a.wav", "Go.")])
        check_older_file_is_kept(older, FormatError, [task], answers_to([task], "x"))


# -----------------------------------------------------------------------------
# references

REFERENCES = """<?xml version='1.0' encoding='utf-8'?>
<testset name="MCIF1.0">
  <task track="short" text_lang="de">
    <sample id="3,4,5" iid="TRANS_1" task="TRANS">
      <audio_path>a.wav,b.wav,c.wav</audio_path>
      <reference>Guten Tag. \nDas ist &lt;alles&gt;.</reference>
      <metadata><transcript>Hello.\nThat's all.</transcript></metadata>
    </sample>
    <sample id="6" iid="QA_1_2" task="QA" qa_type="NA" qa_origin="General">
      <audio_path>d.wav</audio_path><video_path>d.mp4</video_path><reference>Nicht zu beantworten.</reference>
    </sample>
  </task>
  <task track="long" text_lang="en">
    <sample id="0" iid="ASR_1" task="ASR"><reference>Hello.</reference></sample>
    <sample id="1" iid="SUM_1" task="SUM"><reference>A talk.</reference></sample>
    <sample id="2" iid="ACHAP_1" task="ACHAP"><reference>[["Start", 0.0]]</reference>
      <metadata><transcript>Hello.\nThat's all.</transcript></metadata></sample>
  </task>
</testset>"""
EXPECTED = {
    ("short", "de"): [
        Reference(["3", "4", "5"], "TRANS_1", "TRANS", None, ["Guten Tag. ", "Das ist <alles>."],
                  ["Hello.", "That's all."]),
        Reference(["6"], "QA_1_2", "QA", "NA", ["Nicht zu beantworten."], [])],
    ("long", "en"): [
        Reference(["0"], "ASR_1", "ASR", None, ["Hello."], []), Reference(["1"], "SUM_1", "SUM", None, ["A talk."], []),
        Reference(["2"], "ACHAP_1", "ACHAP", None, ['[["Start", 0.0]]'], ["Hello.", "That's all."])]}


def test_references(file):
    assert read_references(file(REFERENCES)) == EXPECTED
    assert read_references(file(gzip.compress(REFERENCES.encode()), "MCIF1.0.short.de.ref.xml.gz")) == EXPECTED
    of_2025 = REFERENCES.replace('"TRANS"', '"ST"').replace('"QA"', '"SQA"').replace('"SUM"', '"SSUM"')
    odd = read_references(file(REFERENCES.replace("A talk.", "A\u2028talk\r\n or\x85\n")))
    assert odd["long", "en"][1].lines == ["A\u2028talk", " or\x85", ""]
    assert of_2025.count('task="S') == 3 and read_references(file(of_2025)) == EXPECTED


def test_references_count_as_the_scorer_counts_them(file):
    one = '<sample id="{}" iid="{}" task="{}"><reference>{}</reference></sample>'
    task = '<task track="short" text_lang="en">{}</task>'
    samples = [(1, 1, "QA", "old"), ("2,3", 1, "ASR", "x"), (4, 1, "QA", "new")]
    first, second = task.format("".join(one.format(*s) for s in samples)), task.format(one.format(5, 5, "QA", "y"))
    assert read_references(file(f"<testset>{first}{second}</testset>")) == {("short", "en"): [
        Reference(["4"], "1", "QA", None, ["new"], []), Reference(["2", "3"], "1", "ASR", None, ["x"], [])]}


def test_reference_errors(fails):
    add = "expected one; add it or copy the official file again"
    fails(read_references, "<x/>", "found XML without a task element, expected an official file; correct the path")
    fails(read_references, REFERENCES.replace(' id="6"', ""), f"found no id in sample 2 of task 1, {add}")
    fails(read_references, REFERENCES.replace(' iid="QA_1_2"', ""), f"found no iid in sample '6' of task 1, {add}")
    fails(read_references, REFERENCES.replace(' task="ASR"', ""), f"found no task in sample '0' of task 2, {add}")
    fails(read_references, REFERENCES.replace("<reference>A talk.</reference>", ""),
          f"found no reference in sample '1' of task 2, {add}")
    fails(read_references, REFERENCES.replace("A talk.", ""), f"found no reference in sample '1' of task 2, {add}")
    remedy = "expected equal numbers; copy the file again"
    fails(read_references, REFERENCES.replace("Tag. \n", "Tag."),
          f"found 1 lines of reference and 2 of transcript in sample '3,4,5' of task 1, {remedy}")
    fails(read_references, REFERENCES.replace("<transcript>Hello.\nThat's all.</transcript>", "", 1),
          f"found 2 lines of reference and 0 of transcript in sample '3,4,5' of task 1, {remedy}")
