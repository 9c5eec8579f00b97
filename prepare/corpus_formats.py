"""What the readers of prepare/corpora.py share, and what becomes of their rows: checked, counted, written.

Nothing here holds a whole corpus in memory: rows are streamed, and a table that is joined by name takes 16 bytes a row.
Text is UTF-8; bytes that are not become lone surrogates, by which check() knows the row.
"""

import csv
import gzip
import io
import json
import os
import re
import tarfile
import zlib
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from prepare.errors import UserError, visible
from prepare.paths import leads_out, open_regular, outside, read_bytes
from prepare.tars import tar_members as members

UNREADABLE, MISSING = "unreadable line", "audio missing"
OUTSIDE = "audio outside the corpus's directory, which --trust-paths takes"
LONGEST_LINE, LARGEST_JSON = 2**24, 2**30  # bytes
TEXT = {"encoding": "utf-8-sig", "errors": "surrogateescape"}


class CorpusError(UserError):
    """A corpus or a command that cannot be used; one line with what was found, what was expected and the remedy."""


def drop(reason, where, seconds=0.0, count=1):
    """What a reader yields instead of `count` rows that cannot be used, of so many seconds if that is known."""
    return {"drop": reason, "where": where, "seconds": seconds, "count": count}


def find(source, *patterns):
    """The sorted paths below source of the first of the patterns that has any. Raises CorpusError."""
    for pattern in patterns:
        if found := sorted(Path(source).glob(pattern)):
            return found
    there = sorted(path.name for path in Path(source).iterdir()) if Path(source).is_dir() else []
    there = ", ".join(there[:5]) + ", ..." * (len(there) > 5) if there else "nothing"
    raise CorpusError(f"{str(source)!r}: found {there}, expected {' or '.join(patterns)}; give the corpus's own "
                      "directory, as it is when unpacked")


def select(found, wanted, key, what):
    """Those of `found` whose key is among the wanted, or where none is equal begins with a wanted one and a hyphen
    (train for train-clean-100); all if wanted is None. Raises CorpusError, naming the keys there are."""
    keys = sorted({key(item) for item in found})
    chosen = keys if wanted is None else []
    for name in wanted or ():
        some = [k for k in keys if k == name] or [k for k in keys if k.startswith(f"{name}-")]
        if not some:
            raise CorpusError(f"no {what} {name!r}; found {', '.join(keys) or 'none'}: choose from these")
        chosen += some
    return [item for item in found if key(item) in chosen]


# -----------------------------------------------------------------------------
# text files


def read_lines(path):
    """(where it stands, line) of each line of a text file that is not empty."""
    with open(path, **TEXT) as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), ""), 1):
            if len(line) == LONGEST_LINE:
                raise CorpusError(f"{str(path)!r} line {number}: found more than {LONGEST_LINE:,} characters, expected "
                                  "a line of text; get the file again")
            if line.strip():
                yield f"{str(path)!r} line {number}", line.rstrip("\r\n")


def table(path, need, columns=None, delimiter="\t", quoting=csv.QUOTE_NONE, escape=None):
    """(where it stands, {column: field}) of each row of a table, plain or gzipped; {} for a row with more or fewer
    fields than columns. need: columns without which it is no use. columns: for a file that does not begin with them.
    Raises CorpusError."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", **TEXT) as file:
        lines = iter(partial(file.readline, LONGEST_LINE), "")
        rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, escapechar=escape)
        columns = columns or next(rows, [])
        _need(path, columns, need)
        while True:
            try:
                fields = next(rows, None)
            except csv.Error:
                fields = ["unreadable"] * (len(columns) + 1)
            except (EOFError, zlib.error) as error:
                raise CorpusError(f"{str(path)!r}: {error}; it is cut or damaged, get it again") from error
            if fields is None:
                return
            if fields:
                yield (f"{str(path)!r} line {rows.line_num}",
                       dict(zip(columns, fields)) if len(fields) == len(columns) else {})


def _need(path, columns, need):
    if missing := [name for name in need if name not in columns]:
        raise CorpusError(f"{str(path)!r}: found the columns {', '.join(columns) or 'none'}, expected also "
                          f"{', '.join(missing)}; get the file again")


def read_json(path):
    """The content of a JSON file. Raises CorpusError."""
    try:
        return json.loads(read_bytes(path, LARGEST_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"{str(path)!r}: {error.args[-1]}, expected JSON; get the file again") from error


class Index:
    """{name: whole number} of millions of names, read-only, in 16 bytes each: the names' hashes, sorted."""

    def __init__(self, entries):
        import numpy as np
        hashes, numbers = array("q"), array("q")
        for name, number in entries:
            hashes.append(hash(name))
            numbers.append(number)
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.numbers = np.array(hashes, np.int64)[order], np.array(numbers, np.int64)[order]

    def get(self, name):
        at = self.hashes.searchsorted(hash(name))
        return int(self.numbers[at]) if at < len(self.hashes) and self.hashes[at] == hash(name) else None


class Lines:
    """The rows of a text file by one of their columns; only where each begins is held. columns: for a file that does
    not begin with them. separator: None is white space, of which the last column may hold more."""

    def __init__(self, path, column, columns=None, separator="\t"):
        self.file, self.separator = open(path, "rb"), separator
        self.columns = columns or self.file.readline().decode(**TEXT).rstrip("\r\n").split(separator)
        _need(path, self.columns, [column])
        self.column = column
        self.index = Index(self._places())

    def _places(self):
        at = self.file.tell()
        for line in iter(partial(self.file.readline, LONGEST_LINE), b""):
            yield self._row(line).get(self.column), at
            at += len(line)

    def _row(self, line):
        fields = line.decode(errors="surrogateescape").rstrip("\r\n").split(self.separator, len(self.columns) - 1)
        return dict(zip(self.columns, fields))

    def get(self, name):
        """{column: field} of the row of that name, {} if there is none."""
        at = self.index.get(name)
        if at is None:
            return {}
        self.file.seek(at)
        row = self._row(self.file.readline(LONGEST_LINE))
        return row if row.get(self.column) == name else {}


# -----------------------------------------------------------------------------
# audio


def unpack(archives, folder):
    """Unpacks the files of compressed tars, whatever folders they are in there, into one new folder, unless it is
    there. What an interrupted run has unpacked is not written again. Raises CorpusError."""
    part = folder.with_name(folder.name + ".part")
    for archive in archives if not folder.exists() else ():
        part.mkdir(parents=True, exist_ok=True)
        try:
            with gzip.open(archive) as tar:
                files = tqdm(members(tar), f"unpacking {visible(archive.name)}", unit=" files", leave=False)
                for name, _, left in files:
                    target = part / Path(name).name
                    if target.exists() and target.stat().st_size == left:
                        continue
                    with open(target, "wb") as file:
                        while block := tar.read(min(2**20, left)):
                            left -= file.write(block)
        except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CorpusError(f"{str(archive)!r}: {error}; it is cut or damaged, get it again") from error
    if part.exists() and not folder.exists():
        os.replace(part, folder)
    return folder


def tar_members(tars):
    """(name, number of the tar) of all files in uncompressed tars; a tar that is cut or damaged is passed over."""
    for number, path in enumerate(tqdm(tars, desc="reading tars", leave=False)):
        try:
            with open_regular(path) as tar:
                names = [name for name, *_ in members(tar)]
        except ValueError as error:
            tqdm.write(f"{str(path)!r}: {error}; it is cut or damaged, get it again")
            continue
        yield from ((name, number) for name in names)


def join(parts, path):
    """Writes the sound of some files behind one another as one flac, unless it is there. Returns whether it could: not
    if they cannot be decoded or differ in rate or channels."""
    import numpy as np
    import soundfile
    from prepare.checkpoint import write_atomically  # needs torch, which the list of corpora does not
    if path.exists():
        return True
    coded = io.BytesIO()
    try:
        waves, rates = zip(*(soundfile.read(part, dtype="int16") for part in parts))
        if len(set(rates)) > 1:
            return False
        soundfile.write(coded, np.concatenate(waves), rates[0], format="FLAC")
    except (soundfile.SoundFileError, ValueError):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(coded.getvalue()))
    return True


class Shards:
    """Uncompressed tars of about 1 GB that audio files are copied into as they are. The one that is being written is
    called .tar.part; close() makes it whole, without a file that was not copied to its end."""

    def __init__(self, directory, stem, size=2**30):
        self.directory, self.stem, self.size = Path(directory), stem, size
        self.directory.mkdir(parents=True, exist_ok=True)
        self.tar = None

    def finished(self):
        return sorted(self.directory.glob(f"{self.stem}-[0-9]*.tar"))

    def add(self, path, name):
        """The path of the file as a member of a shard; the same file again, if nothing came between, is copied once."""
        if self.tar and self.good > self.size:
            self.close()
        if not self.tar:
            self.path = self.directory / f"{self.stem}-{len(self.finished()):05d}.tar"
            self.tar, self.good, self.last = tarfile.open(f"{self.path}.part", "w"), 0, None
        if name != self.last:
            info = tarfile.TarInfo(name)
            with open(path, "rb") as file:
                info.size = os.fstat(file.fileno()).st_size
                self.tar.addfile(info, file)
            self.good, self.last = self.tar.offset, name
        return self.path / name

    def close(self):
        if self.tar:
            self.tar.fileobj.seek(self.good)
            self.tar.fileobj.truncate()
            self.tar.offset = self.good
            self.tar.close()
            os.replace(f"{self.path}.part", self.path)
            self.tar = None


def in_order(function, items, workers=8, batch=32):
    """function(item) of each item, in order, computed by threads; only a few batches are read ahead."""
    items, waiting = iter(items), deque()
    with ThreadPoolExecutor(workers) as pool:
        while some := list(islice(items, batch)):
            waiting.append(pool.submit(lambda some: [function(item) for item in some], some))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


# -----------------------------------------------------------------------------
# conversion

# between two Chinese characters
SPACES = re.compile("(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])")


def check(row, corpus, seconds_of, folders):
    """A reader's row as {"row": the manifest's row, "off": whether the stated duration is wrong}, or what drop() makes
    of it. seconds_of(path) is how long a recording is by its header, 0 if that cannot be read. folders: where the audio
    may lie; None is anywhere."""
    if "audio" in row and folders and all(leads_out(folder, Path.cwd() / row["audio"]) for folder in folders):
        return drop(OUTSIDE, row["where"], count=row.get("count", 1))
    if "drop" in row:
        heard_s = row.get("duration") or seconds_of(row["audio"]) if "audio" in row else 0.0
        return drop(row["drop"], row["where"], row["seconds"] or heard_s, row["count"])
    path, where, stated_s = row["audio"], row.pop("where"), row.pop("stated_s", None)
    whole_s = seconds_of(path)
    duration_s = row.get("duration", whole_s)
    if reason := _unusable(row, whole_s, duration_s):
        return drop(reason, where, duration_s or stated_s or 0.0)
    texts = {name: SPACES.sub("", " ".join(row[name].split())) for name in ("text", "question") if name in row}
    row = {"audio": None, "start": None, "duration": None, "text": None, "task": "asr", "source_language": "en",
           "corpus": corpus.name, "licence": corpus.licence, "test_only": corpus.test_only} | row | texts | {
               "audio": str(path), "duration": round(duration_s, 4)}
    row.setdefault("target_language", row["source_language"])
    if row["task"] == "asr" and row.setdefault("style", "written") == "bare":
        row["text"] = row["text"].lower()
    row = {name: value for name, value in row.items() if value not in (None, "", False)}
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return drop("text or name that is not UTF-8", where, duration_s)
    return {"row": row, "off": stated_s is not None and abs(stated_s - whole_s) > max(0.1, 0.02 * stated_s)}


def _unusable(row, whole_s, duration_s):
    # why, or None
    for name in ("text", "question") if row.get("task") == "sqa" else ("text",):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"no {name}"
    if not whole_s:
        shard, tar, _ = str(row["audio"]).partition(".tar/")
        file = Path(shard + ".tar" if tar else row["audio"])
        if not os.path.exists(file):  # unlike Path.exists, for names that no file can have, too
            return MISSING
        if not file.stat().st_size:
            return "audio of 0 bytes"
        if file.suffix == ".m4a":
            return "m4a audio: convert it by ffmpeg -i NAME.m4a NAME.flac and run this again"
        return "audio that cannot be decoded or has no samples"
    if row.get("start", 0) + duration_s > whole_s + 0.1:
        return "part that ends after its recording"
    if duration_s < 0.035:
        return "audio shorter than 35 ms"
    return None


@dataclass
class Tally:
    """What became of the rows of a corpus."""
    kept: int = 0
    kept_s: float = 0.0
    off: int = 0
    outside: int = 0  # rows of which the manifest's folder does not have the audio
    dropped: dict = field(default_factory=dict)  # reason: [rows, seconds, the first places]

    def add(self, entry):
        if "row" in entry:
            self.kept += 1
            self.kept_s += entry["row"]["duration"]
            self.off += entry["off"]
            self.outside += entry.get("outside", 0)
        else:
            lost = self.dropped.setdefault(entry["drop"], [0, 0.0, []])
            lost[0] += entry["count"]
            lost[1] += entry["seconds"]
            lost[2] += [entry["where"]] * (len(lost[2]) < 3)

    def report(self, name):
        """The lines that tell it."""
        rows = self.kept + sum(lost[0] for lost in self.dropped.values())
        seconds = self.kept_s + sum(lost[1] for lost in self.dropped.values())
        yield (f"{name}: read {rows:,} rows, {seconds / 3600:.2f} h; kept {self.kept:,} rows "
               f"({self.kept / max(rows, 1):.1%}), {self.kept_s / 3600:.2f} h")
        dropped = sorted(self.dropped.items(), key=lambda item: -item[1][0])
        for reason, (count, lost_s, places) in dropped:
            yield (f"left out {count:,} rows, {lost_s / 3600:.2f} h ({count / rows:.1%}): {reason}\n"
                   f"  {', '.join(places)}{', ...' * (count > len(places))}")
        if self.off:
            yield f"{self.off:,} stated durations are wrong by more than 0.1 s and 2 %; those of the audio were taken"
        lost_rows, lost_hours = 1 - self.kept / max(rows, 1), 1 - self.kept_s / max(seconds, 1e-9)
        if dropped and max(lost_rows, lost_hours) > 0.2:
            yield (f"warning: {lost_rows:.0%} of the rows and {lost_hours:.0%} of the hours were left out, mainly for: "
                   f"{dropped[0][0]}")
        if self.outside:
            yield f"{outside(self.outside)}, or use --shards"


def convert(corpus, source, args):
    """Writes the manifest args.out of a corpus, by way of a journal OUT.part with a line for each row that was read,
    from which an interrupted run goes on. Returns the Tally. Raises CorpusError, and OSError as for a full disk."""
    from prepare.audio import audio_seconds  # needs torch, which the list of corpora does not
    from prepare.checkpoint import write_atomically
    out, tally = args.out, Tally()
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = out.with_name(out.name + ".part")
    shards = Shards(args.shards, out.stem) if args.shards else None
    if shards and shards.finished() and not journal.exists():
        raise CorpusError(f"{str(args.shards)!r}: found {shards.finished()[0].name} of an earlier run, expected none; "
                          "remove it or choose another directory")

    @lru_cache(maxsize=1024)
    def finished(shard):
        return (out.parent / f"{shard}.tar").exists()

    done = _resume(journal, {name: str(value) for name, value in vars(args).items()}, tally,
                   lambda audio: not shards or finished(audio.partition(".tar/")[0]))
    folders = [path for path in (source, out.parent, args.common_voice, args.librispeech) if path]
    checked = partial(check, corpus=corpus, seconds_of=lru_cache(maxsize=1024)(audio_seconds),
                      folders=None if args.trust_paths else folders)
    rows = islice(corpus.read(source, args), done, None)
    bar = tqdm(desc=corpus.name, unit=" rows", initial=done, delay=1)
    try:
        with open(journal, "a", encoding="utf-8") as file, bar:
            for entry in in_order(checked, rows):
                if "row" in entry:
                    audio = Path(entry["row"]["audio"])
                    if shards and ".tar/" not in str(audio):
                        audio = shards.add(audio, _member(audio, source, out.parent))
                    audio = entry["row"]["audio"] = os.path.relpath(audio, out.parent)
                    entry["outside"] = leads_out(out.parent, audio)
                file.write(json.dumps(entry, ensure_ascii="drop" in entry) + "\n")
                tally.add(entry)
                bar.update()
    finally:
        if shards:
            shards.close()
        if not (tally.kept or tally.dropped):
            journal.unlink()

    def manifest(target):
        with open(journal, encoding="utf-8") as file:
            for entry in map(json.loads, file):
                if "row" in entry:
                    target.write((json.dumps(entry["row"], ensure_ascii=False) + "\n").encode())

    if tally.kept:
        write_atomically(out, manifest)
    journal.unlink(missing_ok=True)
    return tally


def _member(audio, *directories):
    # the name of an audio file in a shard: its path below one of the directories or, as names must differ, all of it
    audio = Path(os.path.abspath(audio))
    for directory in map(os.path.abspath, directories):
        if audio.is_relative_to(directory):
            return audio.relative_to(directory).as_posix()
    return audio.as_posix().lstrip("/")


def _resume(journal, arguments, tally, whole):
    # Takes into the tally what an interrupted run with the same arguments has written, cuts off what follows its last
    # whole line or the first row whose audio is not whole(audio), and returns how many entries are left.
    first = json.dumps({"arguments": arguments}) + "\n"
    if not journal.exists() or not journal.stat().st_size:
        journal.write_text(first, encoding="utf-8")
        return 0
    with open(journal, "r+b") as file:
        if file.readline() != first.encode():
            raise CorpusError(f"{str(journal)!r}: found what a run with other arguments has begun, expected nothing; "
                              "repeat that command to finish it, or remove the file")
        count, end = 0, file.tell()
        for line in file:
            entry = json.loads(line) if line.endswith(b"\n") else None
            if not entry or "row" in entry and not whole(entry["row"]["audio"]):
                break
            tally.add(entry)
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count
