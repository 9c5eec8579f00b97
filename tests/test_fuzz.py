"""Damaged and forged files of every kind: each gives a result or a UserError, and soon. By hand,
`python tests/test_fuzz.py --inputs 50000` tries as many; one that fails is left in out/fuzz."""

import argparse
import faulthandler
import io
import json
import random
import tarfile
from functools import partial

import soundfile
import torch
from hypothesis import given, settings, strategies

import conftest  # makes the project's files importable
import data
import model
import sample
from prepare import mcif

SECONDS = 20  # an input that takes longer ends the process
FORMATS = "WAV.PCM_16 WAV.FLOAT FLAC.PCM_16 AIFF.PCM_16 OGG.OPUS OGG.VORBIS MP3.MPEG_LAYER_III"
JSON = "encoder/config encoder/model.safetensors.index llm/config llm/generation_config"
SIZES = [0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**60, 2**62, 2**63 - 512, 2**64 - 1]
VALUES = [None, True, -1, 0, 1, 0.5, 1e308, float("nan"), "", "\x1b[31m", "\ud800", "a\0b", [], {}]
ROW = {"audio": "FLAC.PCM_16", "text": "Ja", "task": "sqa", "question": "Wer?", "duration": 1}
ROW |= {"target_language": "de", "licence": "CC0-1.0", "sources": [["c", "MIT"]], "style": "bare"}
WEIGHTS = "encoder/a.safetensors llm/model.safetensors align.pt"
INDEX = '{"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}'
XML = """<testset><task track="short" text_lang="de"><sample id="0" iid="A_1" task="TRANS">
<audio_path>WAV.FLOAT</audio_path><instruction>Say it.</instruction><reference>a</reference>
<metadata><transcript>c</transcript></metadata></sample></task></testset>"""


def forge_bytes(content, rng):
    """Bytes with some of them changed, moved, doubled or missing, or with a size in their place."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        other, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 4, 8, 100])
        at = rng.randrange(min(len(content), rng.choice([200, 2**30])) + 1)  # often in a header
        size = rng.choice(SIZES).to_bytes(8, rng.choice(["little", "big"]))
        copied = content[other : other + length]
        piece = rng.choice([rng.randbytes(1), size, size[:4], size[4:], copied, copied * 3, b""])
        content[at : at + rng.choice([len(piece), length])] = piece
    return bytes(content[: rng.choice([None] * 9 + [rng.randrange(len(content) + 1)])])


def forge_value(value, rng, values=VALUES):
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(values)
    forged = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    forged[key] = forge_value(value[key], rng, values)
    return forged


def forge_json(content, rng):
    if rng.random() < 0.2:
        return forge_bytes(content, rng)
    text = json.dumps(forge_value(json.loads(content), rng, [*VALUES, 10**12, 10**400, "DEEP"]))
    return text.replace('"DEEP"', "[" * rng.choice([30, 950, 10**5])).encode()


def forge_checkpoint(content, rng):
    buffer = io.BytesIO()
    torch.save(forge_value(torch.load(io.BytesIO(content)), rng), buffer)
    return buffer.getvalue()


def read_manifest(path):
    data.open_mixture([str(path)], str(path.with_name("dev.jsonl")), data.TASKS, ("unknown",))
    data.render(data.Manifest(path)[0], 3, conftest.make_tokenizer(), conftest.PLAIN)


def make_kinds(folder):
    """Writes files in order: path, content, how each is forged and what reads it."""
    conftest.make_project(folder)
    (folder / "train.jsonl").write_text(json.dumps(ROW))
    (folder / "x.xml").write_text(XML)
    wave, _ = soundfile.read(folder / "train0.wav")
    for name in FORMATS.split():
        kind, subtype = name.split(".")
        soundfile.write(folder / name, wave, 16000, subtype, format=kind)
    with tarfile.open(folder / "x.tar", "w") as tar:
        tar.add(folder / "train0.wav", "ü" * 99)
    weights = folder / "encoder" / "model.safetensors"
    weights.rename(weights.with_name("a.safetensors"))
    weights.with_name(f"{weights.name}.index.json").write_text(INDEX)
    bases = {name: str(folder / name) for name in ("encoder", "llm")}
    adapter = model.SpeechLM.from_parts(**bases).adapter.state_dict(prefix="adapter.")
    prints = {name: model.fingerprint(path) for name, path in bases.items()}
    checkpoint = {"model": adapter, "bases": prints, "adapter": {"adapter_act": "relu"}}
    checkpoint |= {"config": {}, "data": [], "window": 30.0, "step": 5}
    torch.save(checkpoint, folder / "align.pt")

    def load(_):
        sample.load_model(folder / "align.pt")

    source = partial(mcif.read_source, folder=folder)
    reads = data.audio_seconds, data.load_audio, partial(data.load_audio, start=0.05, duration=0.1)
    kinds = [(name, forge_bytes, *reads) for name in FORMATS.split()]
    kinds += [
        ("x.tar", forge_bytes, data.tar_members.__wrapped__),
        ("x.xml", forge_bytes, source, mcif.read_answers, mcif.read_references),
        ("train.jsonl", forge_json, read_manifest),
        ("llm/tokenizer.json", forge_json, load),
        ("align.pt", forge_checkpoint, load),
    ]
    kinds += [(f"{name}.json", forge_json, load) for name in JSON.split()]
    kinds += [(name, forge_bytes, load) for name in WEIGHTS.split()]
    return [(folder / name, (folder / name).read_bytes(), *how) for name, *how in kinds]


def check(path, content, forge, *reads, seed):
    path.write_bytes(forge(content, random.Random(seed)))
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    for read in reads:
        try:
            read(path)
        except model.UserError as error:
            assert str(error).isprintable() and len(str(error)) < 2100
    faulthandler.cancel_dump_traceback_later()
    path.write_bytes(content)


def test_no_file_does_more_than_fail_with_one_line(tmp_path):
    for path, content, forge, *reads in make_kinds(tmp_path):
        for read in reads:
            read(path)
        for seed in range(8):
            check(path, content, forge, *reads, seed=seed)


@settings(deadline=1000 * SECONDS, database=None)
@given(strategies.text())
def test_any_text_may_be_an_instruction(text):
    assert data.recognise(text)[0] in (*data.TASKS, None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000)
    kinds = make_kinds(conftest.ROOT / "out" / "fuzz")
    for seed in range(parser.parse_args().inputs):
        check(*kinds[seed % len(kinds)], seed=seed)


if __name__ == "__main__":
    main()
