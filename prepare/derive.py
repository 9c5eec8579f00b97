"""Examples made from others: what they inherit, and neighbouring utterances joined."""

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

import data
from data import SAMPLE_RATE, AudioError, Manifest
from model import UserError

# From the freest to the strictest; the versions of a licence are alike.
RANKS = (
    r"CC0-.*|PDDL-.*|LicenseRef-PublicDomain|public domain",
    r"MIT|Apache-.*",
    r"CC-BY(-\d.*)?",
    r"CC-BY-SA-.*",
    r"CC-BY-ND-.*",
    r"CC-BY-NC-\d.*",
    r"CC-BY-NC-SA-.*",
    r"CC-BY-NC-ND-.*",
)
ATTRIBUTION = 2  # the last rank that asks for no more than a mention


def licence_rank(licence: str) -> int:
    """Its place in RANKS; an unknown licence is stricter than every known one."""
    for rank, pattern in enumerate(RANKS):
        if re.fullmatch(pattern, licence, re.IGNORECASE):
            return rank
    return len(RANKS)


def strictest(licences: list[str]) -> str:
    """The licence of what is made from material under these licences, which is the strictest.

    Where several bind in different ways (share-alike and non-commercial), it is "A AND B". Of
    "A OR B" the freer counts. It is "unknown" where there is none.
    """
    parts = set()
    for licence in licences:
        choices = [choice.split(" AND ") for choice in licence.strip("() ").split(" OR ")]
        parts.update(min(choices, key=lambda choice: max(map(licence_rank, choice))))
    ordered = sorted(parts, key=lambda part: (licence_rank(part), part))
    binding = [part for part in ordered if licence_rank(part) > ATTRIBUTION]
    return " AND ".join(binding or ordered[-1:]) or "unknown"


def derive(out: Path, manifest: Manifest, sources: list[dict], place: dict, **fields) -> dict:
    """An example for the manifest `out` with these fields, made from examples of another manifest.

    Its audio is at `place`, an example of that manifest or what join_audio returned. The first
    source gives language and speaker; all of them give corpus and licence.
    """
    pairs = set()
    for source in sources:
        given = source["sources"] or [[source["corpus"], source["licence"]]]
        pairs.update(tuple(pair) for pair in given)
    licences = [licence for _, licence in pairs] + [source["licence"] for source in sources]

    # The path is relative to the new manifest, which may lie in another folder.
    audio = os.path.relpath(manifest.path.parent / place["audio"], out.parent)
    example = {"audio": Path(audio).as_posix()}
    example |= {name: place[name] for name in ("start", "duration") if place.get(name)}
    example |= fields
    example["source_language"] = sources[0]["source_language"]
    example["speaker"] = sources[0]["speaker"]
    example["corpus"] = "+".join(dict.fromkeys(source["corpus"] for source in sources))
    example["licence"] = strictest(licences)
    example["sources"] = [list(pair) for pair in sorted(pairs)]
    if any(source.get("test_only") for source in sources):
        example["test_only"] = True
    return example


def write_examples(path: Path, examples: list[dict]) -> None:
    """Writes a manifest, which replaces an older one only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    data.write_text(path, "".join(lines))


# --------------------------------------------------------------------------------------------------
# Neighbouring utterances


def neighbours(examples: list[dict]) -> list[list[dict]]:
    """Groups examples, each of another piece of audio, into runs that follow one another.

    A run lies in one file or, by one speaker, in files whose names differ in the last number alone.
    """
    pieces = Counter(example["audio"] for example in examples)
    runs = {}
    for example in examples:
        name = example["audio"]
        if pieces[name] == 1 and example["speaker"] != "unknown":
            name = re.sub(r"\d+(?=\D*$)", "", name.rpartition(".")[0])
        kind = [example[field] for field in ("corpus", "speaker", "source_language", "style")]
        runs.setdefault((*kind, name), []).append(example)

    def order(example):
        parts = re.split(r"(\d+)", example["audio"])
        return [int(part) if part.isdecimal() else part for part in parts], example["start"]

    return [sorted(run, key=order) for run in runs.values()]


def continues(before: dict, after: dict) -> bool:
    """Whether an example begins where another one in the same file ends, within 10 ms."""
    if before["audio"] != after["audio"] or not before["duration"]:
        return False
    return abs(before["start"] + before["duration"] - after["start"]) < 0.01


def join_audio(out: Path, manifest: Manifest, examples: list[dict]) -> dict:
    """Where the joined audio of successive examples is: audio, start and duration (seconds).

    If each continues the one before in the same file, this is a longer piece of that file, else a
    new 16 kHz FLAC file in a folder beside `out`. Raises AudioError.
    """
    # Pieces without a gap need no file of their own.
    first, last = examples[0], examples[-1]
    if all(map(continues, examples, examples[1:])):
        duration = last["duration"]
        if duration is not None:
            duration = round(last["start"] + duration - first["start"], 4)
        return {"audio": first["audio"], "start": first["start"], "duration": duration}

    # The new file is named after what goes into it, so that a run which goes on finds it there.
    pieces = []
    for example in examples:
        file = manifest.path.parent / example["audio"]
        pieces.append((str(file), example["start"], example["duration"]))
    contents = [(*piece, modification_time(piece[0])) for piece in pieces]
    name = hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
    path = Path(os.path.abspath(out.parent)) / f"{out.stem}-audio" / name[:2] / f"{name}.flac"
    if not path.exists():
        wave = torch.cat([data.load_audio(*piece) for piece in pieces])  # (N,)
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"samplerate": SAMPLE_RATE, "format": "FLAC"}
        data.write_atomically(path, lambda file: soundfile.write(file, wave.numpy(), **options))
    return {"audio": str(path), "duration": data.audio_seconds(path)}


def modification_time(path: str) -> int:
    """When an audio file, or the tar that holds it, was changed, in ns; 0 if it is not there."""
    shard, is_member, _ = path.partition(".tar/")
    file = Path(shard + ".tar" if is_member else path)
    return file.stat().st_mtime_ns if file.exists() else 0


def piece_of(example: dict) -> tuple:
    return example["audio"], example["start"], example["duration"]


def concatenate(path: str, out: Path, longest: float) -> None:
    """Joins neighbouring utterances of a manifest into examples of at most `longest` seconds.

    A joined recording has an example of every task and language that all its parts have. Those
    whose audio cannot be used are counted and left out. Raises UserError if there are none.
    """
    # The tasks of a piece of audio are {(task, language, instruction): example}.
    manifest = Manifest(path)
    tasks = {}
    for example in manifest:
        if example["task"] != "sqa":
            key = example["task"], example["target_language"], example.get("instruction")
            tasks.setdefault(piece_of(example), {})[key] = example

    # Of these, the transcript stands for the piece, where there is one.
    utterances = [
        min(part.values(), key=lambda example: example["task"]) for part in tasks.values()
    ]
    groups = group_neighbours(manifest, utterances, longest)

    # Every group becomes a recording, and that an example of each task.
    joined = []
    skipped = 0
    for group in tqdm(groups, out.name, unit=" recordings"):
        parts = [tasks[piece_of(utterance)] for utterance in group]
        try:
            place = join_audio(out, manifest, group)
        except AudioError as error:
            skipped += 1
            print(f"left out: {error}", file=sys.stderr)
            continue
        joined += join_parts(out, manifest, place, parts)
    write_examples(out, joined)
    print(
        f"{out}: {len(groups) - skipped} recordings joined of {sum(map(len, groups))} of the "
        f"{len(utterances)} utterances; {skipped} left out because their audio cannot be used"
    )


def group_neighbours(manifest: Manifest, utterances: list, longest: float) -> list[list[dict]]:
    """Neighbours in groups of at most `longest` seconds. Raises UserError if there are none."""
    groups = []
    for run in neighbours(utterances):
        total = math.inf
        for utterance in run:
            seconds = manifest.seconds(utterance)
            if total + seconds > longest:
                groups.append([])
                total = 0.0
            groups[-1].append(utterance)
            total += seconds
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        raise UserError(
            f"{manifest.path}: found no neighbouring utterances, asr or st, of together at most "
            f"{longest:g} s; give another manifest or more --seconds"
        )
    return groups


def join_parts(out: Path, manifest: Manifest, place: dict, parts: list[dict]) -> list[dict]:
    """An example of every (task, language, instruction) that all parts of a recording have."""
    joined = []
    for task, language, instruction in parts[0]:
        sources = [part.get((task, language, instruction)) for part in parts]
        if None in sources:
            continue
        text = data.join_texts([source["text"] for source in sources])
        fields = {"text": text, "task": task, "target_language": language}
        if instruction:
            fields["instruction"] = instruction
        if task == "asr":
            fields["style"] = sources[0]["style"]
        joined.append(derive(out, manifest, sources, place, **fields))
    return joined
