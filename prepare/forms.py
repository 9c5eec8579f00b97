"""The forms of people's own data, which prepare/corpora.py reads as it reads public corpora.

A folder of recordings and texts, Kaldi's data directory, parquet as on the Hub, and JSON Lines of
conversations. Their rows are called by the name of the directory or file, are of one language, and
have the licence that the command line says, as the data do not.
"""

import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from data import recognise
from model import UserError, one_line_errors
from prepare.corpus_formats import (
    DAMAGED,
    find,
    language_code,
    parse_segment,
    read_lines,
    read_map,
    read_pairs,
    select,
)

SOUNDS = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .sph .m4a .mp4 .aac .webm".split())
TEXTS = "text sentence raw_transcription transcription transcript raw_text normalized_text".split()


def find_all(source: Path, suffix: str) -> list[Path]:
    """The files with a suffix anywhere below source, or source, if it is a file itself."""
    return [source] if source.is_file() else find(source, f"**/*{suffix}")


def user_fields(source: Path, language: list, licence: str, texts: Iterable[str] = ()) -> dict:
    """The fields of all rows of data that is no corpus of these. Transcripts are bare if the first
    of them are in one case and have no punctuation."""
    first = " ".join(islice(texts, 1000))
    in_one_case = first in (first.lower(), first.upper())
    bare = first and in_one_case and not re.search("[.,?!。，？！]", first)
    fields = dict(corpus=source.resolve().name, source_language=language_code(language[0]))
    return fields | dict(licence=licence, style="bare" if bare else "written")


def kaldi(source, dropped, language=("en",), licence="unknown"):
    texts = list(read_pairs(find(source, "text")[0]))
    names = "wav.scp segments utt2spk reco2dur utt2dur".split()
    recordings, segments, speakers, *lengths = (read_map(source / name) for name in names)
    lengths = lengths[0] if segments else lengths[0] | lengths[1]
    fields = user_fields(source, language, licence, (text for _, _, text in texts))
    for where, id, text in texts:
        recording, part = parse_segment(segments.get(id, "")) if segments else (id, {})
        file = recordings.get(recording)
        if not file or part is None:
            dropped["no place in segments or wav.scp"].append(where)
        elif "|" in (file[0], file[-1]):
            dropped["command in wav.scp, which is not run: write audio files"].append(where)
        else:
            audio = source / file if (source / file).exists() else Path(file)
            part.update(speaker=speakers.get(id), stated=(lengths.get(recording), 1))
            yield fields | part | dict(where=where, audio=audio, text=text)


def folder(source, dropped, language=("en",), licence="unknown"):
    recordings, texts = {}, {}
    for path in find(source, "**/*"):
        suffix = path.suffix.lower()
        if suffix == ".txt":
            texts[path] = " ".join(line for _, line in read_lines(path))
        elif suffix in SOUNDS:
            recordings[path.with_suffix("")] = path
    fields = user_fields(source, language, licence, texts.values())
    for path, text in texts.items():
        audio = recordings.pop(path.with_suffix(""), None)
        if audio:
            yield dict(fields, where=str(path), audio=audio, text=text)
        else:
            dropped["text without a recording of its name"].append(str(path))
    for path in recordings.values():
        dropped["recording without a text of its name"].append(str(path))


def parquet(source, dropped, out, split=("train",), language=("en",), licence="unknown"):
    def split_of(path):  # of data/train-00000-of-00002.parquet, or of train/0000.parquet
        name = path.stem.split("-")[0]
        return path.resolve().parent.name if name.isdigit() else name

    files = select(find_all(source, ".parquet"), split, split_of, "split")
    with one_line_errors("parquet", "pip install pyarrow"):
        from pyarrow.parquet import ParquetFile
    for path in files:
        clips = out.parent / f"{out.stem}-audio" / path.relative_to(source.parent).with_suffix("")
        clips.mkdir(parents=True, exist_ok=True)
        with one_line_errors(path, DAMAGED):
            file = ParquetFile(path)
            columns = [name for name in TEXTS if name in file.schema_arrow.names]
            if not columns or "audio" not in file.schema_arrow.names:
                raise UserError(f"{path}: expected the columns audio and {' or '.join(TEXTS)}")
            texts = file.read(columns=columns[:1]).column(0).to_pylist()
            fields = user_fields(source, language, licence, filter(None, texts))
            rows = (row for batch in file.iter_batches(64) for row in batch.to_pylist())
            for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
                sound = row["audio"] if isinstance(row["audio"], dict) else {"bytes": row["audio"]}
                audio = path.parent / (sound.get("path") or "")
                if sound.get("bytes"):
                    audio = clips / f"{number}{audio.suffix}"
                    audio.write_bytes(sound["bytes"])
                fields["speaker"] = str(row.get("speaker_id") or row.get("client_id") or "")
                fields["stated"] = row.get("duration_ms"), 1000
                yield dict(fields, where=f"{path} row {number}", audio=audio, text=text)


def chat(source, dropped, language=("en",), licence="unknown"):
    fields = user_fields(source, language, licence)
    for path in find_all(source, ".jsonl"):
        for where, line in read_lines(path):
            try:
                turns = json.loads(line)["messages"]
                asked, answer = (turn["content"] for turn in turns if turn["role"] != "system")
                (sound,) = (part for part in asked if part["type"] != "text")
                audio = sound.get(sound["type"]) or sound["audio_url"]
                audio = audio if isinstance(audio, str) else audio.get("url") or audio["data"]
                audio = path.parent / audio.removeprefix("file://")
                instruction = " ".join(part["text"] for part in asked if part["type"] == "text")
                task = recognise(instruction)[0] or "asr"
                text = answer if isinstance(answer, str) else answer[0]["text"]
            except (ValueError, TypeError, LookupError, AttributeError):
                dropped["not one recording, one instruction and one answer"].append(where)
                continue
            fields |= dict(task=task, instruction=instruction, question=instruction)
            fields["target_language"] = language_code(language[0 if task == "asr" else -1])
            if task == "st" and len(set(language)) == 1:
                dropped["translation, of which --language en de does not say the target"].append(
                    where
                )
                continue
            yield dict(fields, where=where, audio=audio, text=text)
