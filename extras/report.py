"""The HTML report of an evaluation: report.html with the scores, the items and their audio."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from torch import Tensor

from data import SAMPLE_RATE, AudioError, write_text

TEMPLATE = Path(__file__).with_suffix(".html")


def write_report(
    path: Path,
    title: str,
    facts: dict,
    table: list[dict],
    signatures: dict[str, str],
    items: list[dict],
    load_wave: Callable[[dict], Tensor],
    room: int = 48_000_000,
) -> None:
    """Writes the scores and all items, worst first, as one HTML file that loads nothing else.

    facts: shown below the title. table, signatures: as eval.summarise gives them. load_wave(item):
    the waveform of an item; those that raise AudioError have no player. The audio of the worst
    items is put in until it fills `room` bytes.
    """
    items = sorted(items, key=lambda item: -item["scores"]["error"])
    clips = {}  # (file, start, seconds) -> name of the clip
    audio = {}  # name of a clip -> its data URL
    size = 0
    shown = []
    for item in items:
        place = (item["audio"], item["start"], item["seconds"])
        clip = clips.setdefault(place, str(len(clips)))
        shown.append({**item, "clip": clip})
        if clip in audio or size >= room:
            continue
        try:
            encoded = encode_opus(load_wave(item))
        except AudioError:
            continue
        audio[clip] = "data:audio/ogg;base64," + base64.b64encode(encoded).decode()
        size += len(audio[clip])
    data = {
        "title": title,
        "facts": facts,
        "summary": table,
        "signatures": signatures,
        "items": shown,
        "audio": audio,
    }
    write_text(path, fill_template(data))


def fill_template(data: dict) -> str:
    """The page with its data inside a script element, which no text of theirs can end."""
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def encode_opus(wave: np.ndarray | Tensor) -> bytes:
    """The bytes of an ogg file of a 16 kHz wave (N,)."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, "OPUS", format="OGG") as file:
        for i in range(0, len(wave), SAMPLE_RATE):  # libsndfile crashes on minutes in one call
            file.write(wave[i : i + SAMPLE_RATE])
    return buffer.getvalue()
