"""The official XML files of IWSLT 2025 instruction following and of MCIF: sources, answers, references.

The format is what the code of https://github.com/hlt-mt/mcif does: dataset_build/testset_generator.py writes sources
and references, src/mcif/io.py writes answers, src/mcif/evaluation.py reads answers and references. A <testset> holds
<task track="short" text_lang="de"> elements, each with <sample id="0"> elements. The track is short or long, the
language the two-letter code of the answers; an id is a string that is unique within its task. Every reader here takes
plain or gzipped UTF-8 of at most 50 MB (the official ones are far smaller), with no DOCTYPE and so no entities.
"""

import gzip
import os
import re
import zlib
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.etree import ElementTree

from prepare.errors import UserError
from prepare.paths import leads_out, open_regular

LIMIT, TAGS = 50_000_000, 2_000_000  # bytes, unpacked; tags, an element of which takes many times its bytes
NOT_XML = re.compile("[^\\s\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # all of \s stays, for split() to see
NAMES_OF_2025 = {"ST": "TRANS", "SQA": "QA", "SSUM": "SUM"}


class FormatError(UserError):
    """A file that cannot be used; the message names what was found, what was expected and the remedy."""


class Sample(NamedTuple):
    id: str
    audio: str  # a relative path; the recordings lie in SHORT_AUDIOS or LONG_AUDIOS
    instruction: str


class Task(NamedTuple):
    track: str
    language: str
    samples: list[Sample]


class Reference(NamedTuple):
    ids: list[str]  # the samples it covers, in the short track all segments of a talk
    iid: str
    task: str  # ASR, TRANS, QA or SUM; later editions add others
    qa_type: str | None  # of QA: A, AV, V or NA
    lines: list[str]
    transcript: list[str]  # of TRANS: the English of each line


def read_source(path, folder=None):
    """The list of Tasks of a source file, in file order. folder: that of the recordings, out of which no symbolic link
    may lead.

    Raises FormatError for a file that cannot be read or has no task, a sample whose id, audio_path or instruction is
    missing or empty, an audio_path that is absolute or has a "..", an id that occurs twice in its task, and a task that
    is empty or has the track and language of another."""
    tasks = {}
    for key, samples in _tasks(path):
        if key in tasks or not samples:
            raise _error(path, f"task {key} twice" if samples else f"no sample in task {key}",
                         "one task with samples for each track and language", "remove it")
        found = {}
        for id, where, sample in samples:
            audio, instruction = (_need(path, sample.findtext(tag), tag, where).strip()
                                  for tag in ("audio_path", "instruction"))
            place = PureWindowsPath(audio)  # knows both slashes and drives
            if place.anchor or ".." in place.parts:
                raise _error(path, f"audio_path {audio!r} in {where}", "a path below the audio folder", "correct it")
            if folder is not None and leads_out(folder, audio):
                raise _error(path, f"audio_path {audio!r} in {where}, a link out of {str(folder)!r}",
                             "a recording in that folder", "if you trust the link, give --trust-paths")
            if id in found:
                raise _error(path, f"id {id!r} twice in task {key}", "every id once", "remove one of the samples")
            found[id] = Sample(id, audio, instruction)
        tasks[key] = Task(*key, list(found.values()))
    return list(tasks.values())


def xml_text(text):
    """The text without the characters that XML 1.0 cannot hold even escaped (control characters, lone surrogates,
    U+FFFE, U+FFFF), and with each run of whitespace, newlines too, made one space."""
    return " ".join(NOT_XML.sub("", text).split())


def write_answers(path, name, tasks, answers):
    """Writes a system's answers as the official scorer wants them, one to each sample of tasks, in their order.

    name: the system's. tasks: from read_source. answers: {(track, language, id): text}, each text is written as
    xml_text makes it; keys that are in no task are left out. The new file is on disk and read back before it replaces
    an older one. Raises FormatError where an answer is missing or the file reads back differently, OSError where the
    disk fails; the older file then stays as it was."""
    path = Path(path)
    keys = [(task.track, task.language, sample.id) for task in tasks for sample in task.samples]
    missing = [key for key in keys if key not in answers]
    if missing:
        raise _error(path, f"no answer to {len(missing)} of {len(keys)} samples, the first {missing[0]}",
                     "one to each sample of the source", "answer these too")
    written, root = {}, ElementTree.Element("testset", name=xml_text(name), type="output")
    for track, language, samples in tasks:
        texts = written[track, language] = {id: xml_text(answers[track, language, id]) for id, _, _ in samples}
        task = ElementTree.SubElement(root, "task", track=track, text_lang=language)
        for id, text in texts.items():
            ElementTree.SubElement(task, "sample", id=id).text = text
    ElementTree.indent(root)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            ElementTree.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)
            file.flush()
            os.fsync(file.fileno())
        if read_answers(temporary) != written:
            raise _error(path, "other ids or texts on reading back", "those written", "check the disk and try again")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_answers(path):
    """{(track, language): {id: text}} of an answer file, as the official scorer reads it: of tasks with equal track and
    language the first counts, of samples with equal id the last; a text is stripped, and "" where there is none.
    Raises FormatError for a file that cannot be read, has no task or lacks an attribute."""
    tasks = {}
    for key, samples in _tasks(path):
        tasks.setdefault(key, {id: (sample.text or "").strip() for id, _, sample in samples})
    return tasks


def read_references(path):
    """{(track, language): list of References} of a reference file, as the official scorer reads it: of tasks with equal
    track and language the first counts, of samples with equal task and iid the last; lines are not stripped. The task
    names of 2025 (ST, SQA, SSUM) become those of MCIF. Raises FormatError for a file that cannot be read, has no task,
    lacks an attribute or a reference, or has a translation of more or fewer lines than its transcript."""
    tasks = {}
    for key, samples in _tasks(path):
        found = {}
        for id, where, sample in samples:
            iid, task = (_need(path, sample.get(name), name, where) for name in ("iid", "task"))
            task = NAMES_OF_2025.get(task, task)
            lines = _need(path, sample.findtext("reference"), "reference", where).split("\n")
            english = sample.findtext("metadata/transcript")
            transcript = english.split("\n") if english else []
            if task == "TRANS" and len(lines) != len(transcript):
                raise _error(path, f"{len(lines)} lines of reference and {len(transcript)} of transcript in {where}",
                             "equal numbers", "copy the file again")
            found[task, iid] = Reference(id.split(","), iid, task, sample.get("qa_type"), lines, transcript)
        tasks.setdefault(key, list(found.values()))
    return tasks


def _error(path, found, expected, remedy):
    return FormatError(f"{str(path)!r}: found {found}, expected {expected}; {remedy}")


def _need(path, value, what, where):
    if not (value or "").strip():
        raise _error(path, f"no {what} in {where}", "one", "add it or copy the official file again")
    return value


def _tasks(path):
    # ((track, language), [(id, where it stands, element) of each sample]) of each task element; both at any depth
    try:
        with open_regular(path) as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if gzipped else file).read(LIMIT + 1)
        if len(data) > LIMIT:
            raise _error(path, f"more than {LIMIT} bytes", "an official file, far smaller", "correct the path")
        if data.count(b"<") > TAGS:
            raise _error(path, f"more than {TAGS} tags", "an official file, far smaller", "correct the path")
        if b"<!DOCTYPE" in data:
            raise _error(path, "a DOCTYPE", "none, as in official files", "remove it or correct the path")
        tasks = list(ElementTree.fromstring(data.decode()).iter("task"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise FormatError(f"{str(path)!r}: {error.args[-1]}, expected XML in UTF-8; correct the path or copy the file "
                          "again") from error
    if not tasks:
        raise _error(path, "XML without a task element", "an official file", "correct the path")
    for i, task in enumerate(tasks, 1):
        if task.find(".//task") is not None:
            raise _error(path, f"a task inside task {i}", "none, as in official files", "correct the path")
        key = tuple(_need(path, task.get(name), name, f"task {i}") for name in ("track", "text_lang"))
        samples = []
        for j, sample in enumerate(task.iter("sample"), 1):
            id = _need(path, sample.get("id"), "id", f"sample {j} of task {i}")
            samples.append((id, f"sample {id!r} of task {i}", sample))
        yield key, samples
