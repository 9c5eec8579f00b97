"""A file of answers (.jsonl) that grows as they are made, so that a run that was stopped goes on there. With several
ranks each appends to a part of its own, which is joined to the file at the end, or when the next run begins."""

import json
import os
from glob import escape

from prepare.checkpoint import read_lines, write_text
from prepare.ranks import gather, rank, world


def open_journal(path, settings):
    """The items that the file and parts beside it hold, if they were made with the same settings, by id; and the file to
    which this rank appends. Items of other settings are kept in another file."""
    items, settings_path = {}, path.with_suffix(".json")
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = parts_of(path)
        if parts:
            write_items(path, {item["id"]: item for file in (path, *parts) for item in read_lines(file)})
            remove(parts)
        try:
            if json.loads(settings_path.read_text(encoding="utf-8"))["settings"] == settings:
                items = {item["id"]: item for item in read_lines(path)}
        except (OSError, ValueError, KeyError):
            pass
        if not items and path.exists() and path.stat().st_size:
            os.replace(path, path.with_suffix(".old.jsonl"))
            print(f"{path}: held answers of other settings, now in {path.with_suffix('.old.jsonl')}")
        write_items(path, items)
        write_text(settings_path, json.dumps({"settings": settings}, ensure_ascii=False))
        if items:
            print(f"{path}: {len(items)} answers are there already")
    return gather(items)[0], path if world() == 1 else path.with_suffix(f".part{rank()}.jsonl")


def close_journal(path, items, failed, order):
    """What all ranks have answered, {id: item}, and {id: why it has none}; in the file, answers stand as one rank would
    have made them, in this order of ids."""
    answered, missing = {}, {}
    for theirs, without in gather((items, failed)):
        answered |= theirs
        missing |= without
    if world() > 1 and rank() == 0:
        place = {name: i for i, name in enumerate(order)}
        write_items(path, dict(sorted(answered.items(), key=lambda item: place.get(item[0], -1))))
        remove(parts_of(path))
    return answered, missing


def parts_of(path):
    return sorted(path.parent.glob(f"{escape(path.stem)}.part*.jsonl"))


def remove(parts):
    for part in parts:
        part.unlink()


def write_items(path, items):
    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items.values()))
