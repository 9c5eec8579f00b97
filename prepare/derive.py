"""Manifest rows made from others: what they inherit, and neighbouring utterances joined."""

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from data import Manifest, join
from prepare.audio import SAMPLE_RATE, load_audio
from prepare.checkpoint import write_atomically
from prepare.errors import AudioError, ManifestError
from prepare.licences import strictest
from prepare.paths import leads_out, outside


def derived(out, manifest, rows, place, **fields):
    """A row for the manifest `out` made from rows of another: its audio is at `place`, a row of that manifest or what
    join_audio gave; beside its own fields it has what it inherits."""
    sources = sorted({tuple(pair) for row in rows for pair in row["sources"] or [[row["corpus"], row["licence"]]]})
    audio = os.path.relpath(manifest.path.parent / place["audio"], out.parent)
    return {"audio": Path(audio).as_posix()} | {
        name: place[name] for name in ("start", "duration") if place.get(name)} | fields | {
        "source_language": rows[0]["source_language"], "speaker": rows[0]["speaker"],
        "corpus": "+".join(dict.fromkeys(row["corpus"] for row in rows)),
        "licence": strictest([licence for _, licence in sources] + [row["licence"] for row in rows]),
        "sources": [list(pair) for pair in sources]} | (
        {"test_only": True} if any(row.get("test_only") for row in rows) else {})


def neighbours(rows):
    """Rows, each of another place in audio, as lists of those that follow one another: in one file, or, by one speaker,
    in files whose names differ in their last number alone."""
    files, groups = Counter(row["audio"] for row in rows), {}
    for row in rows:
        name = row["audio"]
        if files[name] == 1 and row["speaker"] != "unknown":
            name = re.sub(r"\d+(?=\D*$)", "", name.rpartition(".")[0])
        groups.setdefault((row["corpus"], row["speaker"], row["source_language"], row["style"], name), []).append(row)

    def order(row):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", row["audio"])], row["start"]

    return [sorted(some, key=order) for some in groups.values()]


def join_audio(out, manifest, rows):
    """Where the audio of successive rows is: audio, start and duration (seconds). If one follows the other in one file,
    it is a longer cut of that, else a new 16 kHz flac in a folder beside `out`. Raises AudioError."""
    first, last = rows[0], rows[-1]
    if all(a["audio"] == b["audio"] and a["duration"] and abs(a["start"] + a["duration"] - b["start"]) < 0.01
           for a, b in zip(rows, rows[1:])):
        duration = None if last["duration"] is None else round(last["start"] + last["duration"] - first["start"], 4)
        return {"audio": first["audio"], "start": first["start"], "duration": duration}
    pieces = [(str(manifest.path.parent / row["audio"]), row["start"], row["duration"]) for row in rows]
    name = hashlib.sha256(json.dumps([(*piece, changed(piece[0])) for piece in pieces]).encode()).hexdigest()[:16]
    path = Path(os.path.abspath(out.parent)) / f"{out.stem}-audio" / name[:2] / f"{name}.flac"
    if not path.exists():
        wave = torch.cat([load_audio(*piece) for piece in pieces])  # (N,)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: soundfile.write(file, wave.numpy(), SAMPLE_RATE, format="FLAC"))
    return {"audio": str(path), "duration": soundfile.info(path).frames / SAMPLE_RATE}


def changed(path):
    """When an audio file, or the tar it is in, was changed, in ns; 0 if there is none."""
    shard, tar, _ = path.partition(".tar/")
    file = Path(shard + tar.rstrip("/"))
    return file.stat().st_mtime_ns if file.exists() else 0


def concatenate(path, out, longest, trust_paths=False):
    """Joins neighbouring utterances of the manifest `path` into rows of at most `longest` seconds, one of each task and
    language that all of them have, and writes those to the manifest `out`. Raises ManifestError."""
    manifest, said = Manifest(path, trust_paths), {}  # place -> (task, language, instruction) -> row
    for row in manifest:
        if row["task"] != "sqa":
            place = said.setdefault((row["audio"], row["start"], row["duration"]), {})
            place[row["task"], row["target_language"], row.get("instruction")] = row
    places = [min(rows.values(), key=lambda row: row["task"]) for rows in said.values()]  # asr, where there is one
    groups, bad, away = [], 0, 0
    for some in neighbours(places):
        total = math.inf
        for row in some:
            seconds = manifest.seconds(row)
            if total + seconds > longest:
                groups.append([])
                total = 0.0
            groups[-1].append(row)
            total += seconds
    groups = [rows for rows in groups if len(rows) > 1]
    if not groups:
        raise ManifestError(f"{path!r}: found no neighbouring utterances, asr or st, of together at most {longest:g} "
                            "s; give another manifest or more --seconds")

    def save(file):
        nonlocal bad, away
        for rows in tqdm(groups, out.name, unit=" recordings", dynamic_ncols=True):
            try:
                place = join_audio(out, manifest, rows)
            except AudioError as error:
                bad += 1
                print(f"left out: {error}", file=sys.stderr)
                continue
            parts = [said[row["audio"], row["start"], row["duration"]] for row in rows]
            for task, language, instruction in parts[0]:
                if all((task, language, instruction) in part for part in parts):
                    some = [part[task, language, instruction] for part in parts]
                    fields = {"text": join([row["text"] for row in some]), "task": task, "target_language": language}
                    fields |= {"instruction": instruction} if instruction else {}
                    fields |= {"style": some[0]["style"]} if task == "asr" else {}
                    row = derived(out, manifest, some, place, **fields)
                    away += leads_out(out.parent, row["audio"])
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, save)
    print(f"{out}: {len(groups) - bad} recordings joined of {sum(map(len, groups))} of the {len(places)} utterances; "
          f"{bad} left out because their audio cannot be used", *[outside(away)] * bool(away), sep="\n")
