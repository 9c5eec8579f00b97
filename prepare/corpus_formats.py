"""What the readers of prepare/corpora.py share: files and tables in, a manifest and shards out.

Text is UTF-8. Bytes that are not become lone surrogates, by which find_fault() knows the row.
`dropped` is everywhere {reason: where the rows stand that were left out for it}.
"""

import csv
import json
import os
import re
import shutil
import tarfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

import data
from data import MIN_SAMPLES, SAMPLE_RATE, audio_seconds, write_atomically
from model import UserError, one_line_errors, visible

UNREADABLE, MISSING = "unreadable line", "audio missing"
DAMAGED = "it is cut or damaged, get it again"
TEXT = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
BATCH = 1024  # rows whose audio is looked at together
SHARD_SIZE = 2**30  # bytes
QUOTED = re.compile(r'"((?:[^"\\]|""|\\.)*)"')
BETWEEN_CHINESE = re.compile("(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])")


def language_code(name: str) -> str:
    """The code of a language by its name in a corpus: zh-CN, cmn_hans_cn, en_us. Others stay as
    they are, and reading the manifest refuses them."""
    return "yue" if name == "zh-HK" else data.language_code(name) or name


def is_hidden(path: Path) -> bool:
    """Whether a path inside a corpus or a tar is hidden, as ._x, .DS_Store and __MACOSX/x are."""
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def list_paths(folder: Path, pattern: str) -> list[Path]:
    """The sorted paths below a folder that match and are not hidden."""
    paths = folder.glob(pattern)
    return sorted(path for path in paths if not is_hidden(path.relative_to(folder)))


def find(source: Path, *patterns: str) -> list[Path]:
    """The list_paths of the first pattern that matches any. Raises UserError."""
    for pattern in patterns:
        if paths := list_paths(source, pattern):
            return paths
    raise UserError(f"{source}: found no {' or '.join(patterns)}; give the corpus's own directory")


def select(items: Iterable, wanted: list[str] | None, key: Callable, what: str) -> list:
    """The items whose key is wanted or, where none is equal, begins with a wanted name and a hyphen
    (train-clean-100 for train). None wants all. Raises UserError, naming the keys there are."""
    items = list(items)
    keys = {key(item) for item in items}
    chosen = set() if wanted else keys
    for name in wanted or ():
        matches = {name} & keys or {k for k in keys if k.startswith(f"{name}-")}
        if not matches:
            raise UserError(f"found no {what} {name!r}; choose from {', '.join(sorted(keys))}")
        chosen |= matches
    return [item for item in items if key(item) in chosen]


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where it stands, line) of each line of a text file. Raises UserError."""
    with one_line_errors(path, "get the file again"), open(path, **TEXT) as file:
        for number, line in enumerate(file, 1):
            yield f"{path} line {number}", line.strip()


def read_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where it stands, first word, the rest) of each line that is not empty. Raises UserError."""
    for where, line in read_lines(path):
        if line:
            name, *rest = line.split(maxsplit=1)
            yield where, name, "".join(rest)


def read_map(path: Path) -> dict[str, str]:
    """{first word: the rest} of the lines of a text file, if it is there. Raises UserError."""
    return {name: rest for _, name, rest in read_pairs(path)} if path.exists() else {}


def parse_segment(text: str) -> tuple[str, dict | None]:
    """RECORDING START END as the recording and the part's start and duration, in seconds; the part
    is None if the text is another."""
    match = re.match(r"(\S+)\s+(\d{1,12}(?:\.\d+)?)\s+(\d{1,12}(?:\.\d+)?)(\s|$)", text, re.ASCII)
    if not match:
        return "", None
    start, end = float(match[2]), float(match[3])
    return match[1], dict(start=start, duration=end - start)


def unquote(field: str) -> str:
    """A table's field without its quotes, if it begins and ends with one and escapes those inside
    by another or by a backslash (RFC 4180 and MySQL)."""
    match = QUOTED.fullmatch(field)
    return re.sub(r'["\\]"', '"', match[1]) if match else field.replace(r"\"", '"')


def read_table(
    path: Path, needed: list[str], dropped: dict, columns: list[str] | None = None, escapechar=None
) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it stands, {column: field}) of each row of a table; others than those of as many
    fields as columns are dropped. columns: of a file that does not name them. Fields are unquoted
    one by one, so that a quote that is never closed swallows nothing. Raises UserError."""
    dialect = dict(delimiter="\t", quoting=csv.QUOTE_NONE, escapechar=escapechar)
    with one_line_errors(path, DAMAGED), open(path, newline="", **TEXT) as file:
        records = csv.DictReader(file, columns, **dialect)
        records.fieldnames = list(map(unquote, records.fieldnames or []))
        for name in needed:
            if name not in records.fieldnames:
                raise UserError(f"{path}: found no column {name!r}; get the file again")
        for record in records:
            where = f"{path} line {records.line_num}"
            if None in record or None in record.values():
                dropped[UNREADABLE].append(where)
            else:
                yield where, {name: unquote(field) for name, field in record.items()}


def read_column(path: Path, key: str, value: str, **options) -> dict[str, str | None]:
    """{field of column key: that of column value} of a table, if it is there. Raises UserError."""
    records = read_table(path, [key], defaultdict(list), **options) if path.exists() else ()
    return {record[key]: record.get(value) for _, record in records}


def unpack(archives: list[Path], folder: Path) -> Path:
    """Unpacks the files of tars, whatever folders they are in there, into one new folder, which has
    its name only when it is complete. One that is there is not written again. Raises UserError."""
    part = folder.with_name(f"{folder.name}.part")
    if folder.exists():
        return folder
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for archive in archives:
        with one_line_errors(archive, DAMAGED), tarfile.open(archive) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                if not is_hidden(Path(member.name)):
                    with open(part / Path(member.name).name, "wb") as file:
                        shutil.copyfileobj(tar.extractfile(member), file)
    os.replace(part, folder)
    return folder


def join(parts: list[Path], path: Path) -> bool:
    """Writes the sound of files behind one another as one flac. Returns whether it could: not if
    they cannot be decoded or differ in rate or channels."""
    try:
        waves, rates = zip(*(soundfile.read(part, dtype="int16") for part in parts), strict=True)
        (rate,) = set(rates)
        wave = np.concatenate(waves)
    except (soundfile.SoundFileError, ValueError):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: soundfile.write(file, wave, rate, format="FLAC"))
    return True


def locate(audio: Path, folder: Path) -> str:
    """The path of a file as seen from a folder: relative if it is below it, otherwise absolute."""
    audio, folder = Path(os.path.abspath(audio)), os.path.abspath(folder)
    return str(audio.relative_to(folder) if audio.is_relative_to(folder) else audio)


def shard(examples: Iterable[dict], args: Namespace) -> Iterator[dict]:
    """The examples with their audio copied into uncompressed tars in the folder args.shards, which
    have their names only when all are complete. Raises UserError where there are such tars."""
    for path in args.shards.glob(f"{args.out.stem}-[0-9]*.tar"):
        raise UserError(f"{path}: a shard of an earlier run; remove all of its or change --shards")
    args.shards.mkdir(parents=True, exist_ok=True)
    tars, copies = [], {}  # copies: {audio: SHARD.tar/MEMBER}
    for example in examples:
        audio = example["audio"]
        if ".tar/" not in str(audio) and audio not in copies:
            if not tars or tars[-1].offset > SHARD_SIZE:
                if tars:
                    tars[-1].close()
                part = args.shards / f"{args.out.stem}-{len(tars):05d}.tar.part"
                tars.append(tarfile.open(part, "w"))
            # A member is named by its path below the corpus or the manifest's folder, else by all.
            names = [locate(audio, folder) for folder in (args.source, args.out.parent)]
            member = tarfile.TarInfo(min(names, key=os.path.isabs).lstrip("/"))
            member.size = audio.stat().st_size
            with open(audio, "rb") as file:
                tars[-1].addfile(member, file)
            copies[audio] = Path(tars[-1].name.removesuffix(".part"), member.name)
        yield example | {"audio": copies.get(audio, audio)}
    for tar in tars:
        tar.close()
        os.replace(tar.name, tar.name.removesuffix(".part"))


def is_other_length(seconds: float, units: str | float | None, rate: float) -> bool:
    """Whether a recording is much shorter or longer than so many units of so many a second."""
    try:
        stated = float(units) / rate
    except (TypeError, ValueError):  # nothing is stated
        return False
    return stated > 0 and abs(seconds - stated) > 0.2 + 0.02 * stated


def find_fault(row: dict, seconds: float) -> str | None:
    """Why a row cannot be used whose recording has so many seconds, or None if it can."""
    for name in ("text", "question") if row.get("task") == "sqa" else ("text",):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"no {name}"
    if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False, default=str)):
        return "text or name that is not UTF-8"
    if not seconds:
        path = re.sub(r"\.tar/.*", ".tar", str(row["audio"]))
        exists = os.path.exists(path)  # unlike Path.exists, for names that no file can have, too
        return "audio that cannot be decoded: get it again or convert it" if exists else MISSING
    if is_other_length(seconds, *row.get("stated", (None, 1))):
        return "audio much shorter or longer than the corpus states"
    duration = row.get("duration", seconds)
    if row.get("start", 0) + duration > seconds + 0.1:
        return "part that ends after its recording"
    return "audio shorter than 35 ms" if duration < MIN_SAMPLES / SAMPLE_RATE else None


def complete(row: dict, terms: dict, seconds: float) -> dict:
    """A row as a manifest's example, without the fields that say nothing."""
    order = dict(audio="", start=None, duration=seconds, text="", task="asr", source_language="en")
    example = order | terms | row
    example["duration"] = round(example["duration"], 4)
    example.setdefault("target_language", example["source_language"])
    example.pop("stated", None)
    for name in ("text", "question"):
        if example.get(name):
            example[name] = BETWEEN_CHINESE.sub("", " ".join(example[name].split()))
    if example["task"] == "asr" and example.setdefault("style", "written") == "bare":
        example["text"] = example["text"].lower()
    return {name: value for name, value in example.items() if value not in (None, "", False)}


def check(rows: Iterator[dict], terms: dict, dropped: dict) -> Iterator[dict]:
    """The examples that a reader's rows make, in their order. terms: their corpus and licence."""
    read_seconds = lru_cache(maxsize=BATCH)(audio_seconds)  # many rows may be of one recording
    with ThreadPoolExecutor(8) as pool:
        while batch := list(islice(rows, BATCH)):
            lengths = pool.map(read_seconds, [row["audio"] for row in batch])
            for row, seconds in zip(batch, lengths, strict=True):
                where = row.pop("where")
                fault = find_fault(row, seconds)
                if fault:
                    dropped[fault].append(where)
                else:
                    yield complete(row, terms, seconds)


def convert(rows: Iterator[dict], dropped: dict, terms: dict, args: Namespace) -> None:
    """Writes a reader's rows as the manifest args.out, which has its name only when it is complete,
    and prints what became of them. terms: corpus and licence. Raises UserError and OSError."""
    folder, durations = args.out.parent, []
    examples = check(rows, terms, dropped)
    if args.shards:
        examples = shard(examples, args)

    def write_examples(file):
        for example in tqdm(examples, args.name, unit=" rows", delay=1):
            durations.append(example["duration"])
            example["audio"] = locate(example["audio"], folder)
            file.write((json.dumps(example, ensure_ascii=False) + "\n").encode())
        print(visible(report(durations, dropped), keep="\n"))
        if not durations:
            raise UserError("no row could be used")

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, write_examples)


def report(durations: list[float], dropped: dict) -> str:
    """What became of the rows of a corpus; durations of the examples in seconds."""
    rows = len(durations) + sum(map(len, dropped.values()))
    lines = [f"{rows:,} rows read, {len(durations):,} written, {sum(durations) / 3600:.2f} h"]
    for reason, places in sorted(dropped.items(), key=lambda item: -len(item[1])):
        first = ", ".join(places[:3])
        lines.append(f"{len(places):,} left out ({len(places) / rows:.1%}), {reason}: {first}")
    return "\n".join(lines)
