"""The HTML report of an evaluation: report.html with the scores, the items and their audio put in."""

import base64
import json
from pathlib import Path

from prepare.audio import encode_opus
from prepare.checkpoint import write_text
from prepare.errors import AudioError


def write_report(path, title, facts, table, signatures, items, hear, room=48_000_000):
    """The scores and all items, worst first, as one HTML file with the audio inside, as long as it fits into `room`
    bytes."""
    items = sorted(items, key=lambda item: -item["scores"]["error"])
    clips, audio, size = {}, {}, 0
    for item in items:
        key = (item["audio"], item["start"], item["seconds"])
        item["clip"] = clips.setdefault(key, str(len(clips)))
        if item["clip"] not in audio and size < room:
            try:
                coded = encode_opus(hear(item))
            except AudioError:  # gone since it was answered: the page says that there is no player
                continue
            audio[item["clip"]] = "data:audio/ogg;base64," + base64.b64encode(coded).decode()
            size += len(audio[item["clip"]])
    data = json.dumps({"title": title, "facts": facts, "summary": table, "signatures": signatures, "items": items,
                       "audio": audio}, ensure_ascii=False).replace("<", "\\u003c")
    write_text(path, Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("{{data}}", data))
