"""Damaged and forged files of every kind that is read: each gives a value or one line of ours, soon and in little memory.

In the suite hypothesis draws a few hundred inputs a kind. By hand, in processes that may crash:

    python tests/test_fuzz.py --inputs 100000

prints how many inputs of each kind were tried and every finding, whose input is kept in out/fuzz.
"""

import argparse
import copy
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from conftest import make_project
from data import Manifest
from model import AdapterConfig, EncoderConfig, LengthAdapter, LLM, SpeechEncoder
from prepare import corpora, mcif
from prepare.audio import audio_seconds, load_audio
from prepare.checkpoint import fingerprint, load_checkpoint, load_tokenizer
from prepare.corpus_formats import convert, tar_members
from prepare.errors import HIDDEN, UserError
from prepare.instructions import instruction_of
from sample import load_model

MEMORY, SECONDS = 500 * 2**20, 20  # more is a finding: bytes above those in use, and for one input
ROOT = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------------------------------
# Mutations. rng: a random.Random, in the suite one whose choices are hypothesis's.

NUMBERS = [0, 1, -1, 255, 1000, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**64 - 1]
VALUES = [None, True, -1, 0, 1, 3, 10**9, 10**12, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", " ", "x" * 300,
          "../../etc/passwd", "/etc/passwd", "\x1b[31m\u202e", "\ud800", "a\0b", [], {}, [None], {"a": 1}, "NESTED"]


def mutate(content, rng):
    """Bytes with some of them changed, doubled, moved or missing, or with a number where another was."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 4, 16, 100])
        if rng.random() < 0.5:
            at = min(at, rng.randrange(200))  # headers
        kind = rng.randrange(7)
        if kind == 0:
            content[at:at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            value, size, order = rng.choice(NUMBERS), rng.choice([1, 2, 4, 8]), rng.choice(["little", "big"])
            content[at:at + size] = (value % 256**size).to_bytes(size, order)
        elif kind == 2:
            del content[at:at + length]
        elif kind == 3:
            content[at:at] = content[at:at + length] * rng.choice([1, 3, 50])
        elif kind == 4:
            other = rng.randrange(len(content) + 1)
            content[at:at + length] = content[other:other + length]
        elif kind == 5 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def mutate_json(content, rng):
    """JSON with another value at some places, or without them; sometimes changed as bytes."""
    if rng.random() < 0.2:
        return mutate(content, rng)
    raw = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        node = raw
        while isinstance(node, (dict, list)) and node:
            key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
                if rng.random() < 0.1:
                    del node[key]
                else:
                    node[key] = copy.deepcopy(rng.choice(VALUES))
                break
            node = node[key]
    depth = rng.choice([30, 500, 950, 5000, 100_000])
    return json.dumps(raw).encode().replace(b'"NESTED"', b"[" * depth + b"]" * depth)


def mutate_line(content, rng):
    """JSON Lines of which one is changed."""
    lines = content.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    lines[i] = mutate_json(lines[i], rng) + b"\n"
    return b"".join(lines)


def mutate_tar(content, rng):
    """A tar; the checksums of its first headers are mostly right again."""
    content = bytearray(mutate(content, rng))
    for at in range(0, min(len(content) - 511, 2048), 512) if rng.random() < 0.8 else ():
        if content[at + 257:at + 262] == b"ustar":
            total = sum(content[at:at + 148]) + 256 + sum(content[at + 156:at + 512])
            content[at + 148:at + 156] = b"%06o\0 " % total
    return bytes(content)


def ogg_checksum(page):
    found = 0
    for byte in page:
        found = found << 8 & 0xFFFFFFFF ^ OGG_TABLE[found >> 24 ^ byte]
    return found


OGG_TABLE = [0] * 256
for i in range(256):
    value = i << 24
    for _ in range(8):
        value = value << 1 & 0xFFFFFFFF ^ (0x04C11DB7 if value & 0x80000000 else 0)
    OGG_TABLE[i] = value


def mutate_ogg(content, rng):
    """An ogg whose pages' checksums are mostly right again, so that what is in them is decoded."""
    content = bytearray(mutate(content, rng))
    starts = [at for at in range(len(content) - 27) if content[at:at + 4] == b"OggS"]
    for at in starts if rng.random() < 0.8 else ():
        segments = content[at + 27:at + 27 + content[at + 26]]
        end = at + 27 + len(segments) + sum(segments)
        content[at + 22:at + 26] = bytes(4)
        content[at + 22:at + 26] = struct.pack("<I", ogg_checksum(content[at:end]))
    return bytes(content)


def mutate_safetensors(content, rng):
    """Safetensors; half of them with a changed header that is whole."""
    if rng.random() < 0.5:
        return mutate(content, rng)
    size = struct.unpack("<Q", content[:8])[0]
    header = mutate_json(content[8:8 + size], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size:]


# ----------------------------------------------------------------------------------------------------------------------
# What is read


class Target(types.SimpleNamespace):
    """seeds: valid inputs; mutate: how they are changed; read(content): reads one, wherever it has to lie."""


def make_targets(folder):
    """{name: Target}, with their files below a folder."""
    project = make_project(folder / "project")
    targets = {}

    def target(name, seeds, change, path, read):
        def run(content):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            read(path)

        targets[name] = Target(seeds=seeds, mutate=change, read=run)

    # audio
    random_state = np.random.default_rng(0)

    def read_audio(path):
        audio_seconds(path)
        for part in ((), (0.05, 0.1)):
            try:
                load_audio(path, *part)
            except UserError as error:
                last = error
            else:
                last = None
        if last:
            raise last

    wave = 0.3 * np.sin(np.arange(4000) / 5) + 0.05 * random_state.standard_normal(4000)
    for name, options in {
            "wav": [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "ULAW"), ("WAV", "GSM610")],
            "flac": [("FLAC", "PCM_16"), ("FLAC", "PCM_24")], "ogg": [("OGG", "VORBIS"), ("OGG", "OPUS")],
            "mp3": [("MP3", "MPEG_LAYER_III")], "aiff": [("AIFF", "PCM_16"), ("AIFF", "IMA_ADPCM")],
            "other audio": [("AU", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"),
                            ("NIST", "PCM_16"), ("VOC", "PCM_16"), ("SVX", "PCM_16"), ("MAT4", "PCM_16"),
                            ("MAT5", "PCM_16"), ("PAF", "PCM_16"), ("HTK", "PCM_16"), ("XI", "DPCM_16"), ("SDS", "PCM_16"),
                            ("AVR", "PCM_16"), ("IRCAM", "PCM_16"), ("PVF", "PCM_16"), ("WVE", "ALAW"),
                            ("MPC2K", "PCM_16")]}.items():
        seeds = []
        for kind, subtype in options:
            coded = folder / "seed"
            soundfile.write(coded, wave, 8000 if kind == "WVE" else 16000, subtype=subtype, format=kind)
            seeds.append(coded.read_bytes())
        target(name, seeds, mutate_ogg if name == "ogg" else mutate, folder / "sound" / f"x{name}",
               read_audio)
    wav = targets["wav"].seeds[0]
    tars = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=kind) as tar:
            for name in ("a.wav", "b" * 150 + ".wav" if kind != tarfile.USTAR_FORMAT else "b.wav"):
                member = tarfile.TarInfo(name)
                member.size = 2000
                tar.addfile(member, io.BytesIO(wav[:2000]))
            link = tarfile.TarInfo("c.wav")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        tars.append(packed.getvalue())

    def read_tar(path):
        path = path.rename(path.with_name(f"{time.monotonic_ns()}.tar"))  # the index of a tar is kept by its name
        try:
            for name in ("a.wav", "b.wav", "c.wav"):
                try:
                    load_audio(path / name)
                except UserError:
                    pass
            list(tar_members([path]))
            load_audio(path / "a.wav")
        finally:
            path.unlink()

    target("tar", tars, mutate_tar, folder / "tar" / "x", read_tar)

    # manifests
    rows = [{"audio": "a.wav", "start": 0.5, "duration": 1, "text": "Hallo", "task": "st", "source_language": "en",
             "target_language": "de", "speaker": "s", "corpus": "c", "licence": "CC0-1.0", "style": "written",
             "sources": [["c", "CC0-1.0"]], "test_only": False},
            {"audio": "s.tar/b.wav", "text": "Yes.", "task": "sqa", "question": "Is it?", "instruction": None}]

    def read_manifest(path):
        manifest = Manifest(path)
        for row in manifest:
            instruction_of(row)
            manifest.seconds(row)
        manifest.split(["asr", "st", "sqa"], 30, lambda row: None)

    target("manifest", ["".join(json.dumps(row) + "\n" for row in rows).encode()], mutate_line,
           folder / "manifest" / "m.jsonl", read_manifest)

    # pretrained models
    for part, kind in (("encoder", SpeechEncoder), ("llm", LLM)):
        place = folder / f"config of {part}"
        (place / "x").mkdir(parents=True)
        (place / "model.safetensors").symlink_to(project / part / "model.safetensors")
        target(f"{part} config.json", [(project / part / "config.json").read_bytes()], mutate_json, place / "config.json",
               lambda path, kind=kind: (fingerprint(path.parent), kind.from_pretrained(path.parent)))
    place = folder / "weights"
    place.mkdir()
    (place / "config.json").write_bytes((project / "llm" / "config.json").read_bytes())
    target("safetensors", [(project / "llm" / "model.safetensors").read_bytes()], mutate_safetensors,
           place / "model.safetensors", lambda path: (fingerprint(path.parent), LLM.from_pretrained(path.parent)))
    place = folder / "index"
    place.mkdir()
    (place / "config.json").write_bytes((project / "llm" / "config.json").read_bytes())
    (place / "a.safetensors").write_bytes((project / "llm" / "model.safetensors").read_bytes())
    target("index.json", [b'{"metadata": {"total_size": 5}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}'],
           mutate_json, place / "model.safetensors.index.json", lambda path: LLM.from_pretrained(path.parent))

    def read_tokenizer(path):
        tokenizer = load_tokenizer(path.parent)
        for text in ("", "\nTranscribe.\n", "one two three", "Größe 中文 \U0001f600"):
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)

    place = folder / "tokenizer"
    place.mkdir()
    (place / "config.json").write_bytes((project / "llm" / "config.json").read_bytes())
    target("tokenizer.json", [(project / "llm" / "tokenizer.json").read_bytes()], mutate_json, place / "tokenizer.json",
           read_tokenizer)

    # checkpoints
    adapter = LengthAdapter(AdapterConfig(**json_fields(project / "encoder" / "config.json"), output_size=48))
    state = {"model": {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()},
             "adapter": asdict(adapter.config), "window": 30.0, "step": 5, "refuse_above": 0.5,
             "bases": {name: fingerprint(project / name) for name in ("encoder", "llm")},
             "config": {"phase": "ift", "prompt": "text", "data": ["a", "b"]}, "data": [["c", "CC0-1.0", "en", 5]]}
    packed = io.BytesIO()
    torch.save(state, packed)
    target("checkpoint", [packed.getvalue()], mutate, folder / "x.pt", load_model)
    with zipfile.ZipFile(packed) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    pickled, = (name for name in parts if name.endswith("data.pkl"))

    def read_pickle(path):
        with zipfile.ZipFile(path.with_suffix(".pt"), "w") as archive:
            for name, content in {**parts, pickled: path.read_bytes()}.items():
                archive.writestr(name, content)
        load_checkpoint(path.with_suffix(".pt"))

    target("pickle", [parts[pickled]], mutate, folder / "pickle" / "x", read_pickle)

    # the shared task's files
    xml = [b'<?xml version="1.0" encoding="utf-8"?><testset name="a" type="source"><task track="short" text_lang="de">'
           b'<sample id="0"><audio_path>a.wav</audio_path><instruction>Say &lt;it&gt;.</instruction></sample></task></testset>',
           b'<testset><task track="long" text_lang="en"><sample id="0,1" iid="TRANS_1" task="TRANS"><reference>a\nb</reference>'
           b'<metadata><transcript>c\nd</transcript></metadata></sample></task></testset>',
           b'<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><testset><task track="s" text_lang="en">'
           b'<sample id="0">&d;</sample></task></testset>']

    def read_xml(path):
        found = []
        for read in (mcif.read_source, mcif.read_answers, mcif.read_references):
            try:
                read(path)
            except UserError as error:
                found.append(error)
        if found:
            raise found[0]

    target("XML", xml, mutate, folder / "xml" / "x.xml", read_xml)

    # tables of corpora
    tables = {
        "commonvoice": ("en/validated.tsv", b"client_id\tpath\tsentence\tlocale\nx\ta.mp3\tHello.\ten\nx\tb\tYou.\ten\n", mutate),
        "kaldi": ("text", b"utt1 HELLO YOU\nutt2 AND YOU\nrec1 ME\n", mutate),
        "kaldi's segments": ("segments", b"utt1 rec1 0.5 1.5\nutt2 rec1 1.5 3.75\n", mutate),
        "kaldi's wav.scp": ("wav.scp", b"rec1 a.wav\nutt1 a.wav\nutt2 /etc/passwd\n", mutate),
        "librisqa": ("LibriSQA-PartI-train.json", json.dumps([
            {"speech_path": "1-2-3.flac", "question": "a?", "answer": "b", "duration": 3.5}] * 2).encode(), mutate_json),
        "peoples-speech": ("train/clean.json", json.dumps({"identifier": "x", "license": "CC-BY", "training_data": {
            "name": ["./a.flac"], "label": ["hello you"], "duration_ms": [900]}}).encode(), mutate_json),
        "fleurs": ("en_us/train.tsv", b"1\ta.wav\tHello.\thello\th e\t16000\tMALE\n" * 2, mutate)}
    for name, (file, table, change) in tables.items():
        corpus = corpora.CORPORA[name.split("'")[0]]
        source = folder / name
        (source / "en" / "clips").mkdir(parents=True)
        (source / "train-clean-360" / "x").mkdir(parents=True)
        (source / "wav.scp").write_text("rec1 a.wav\nutt1 a.wav\nutt2 a.wav\n")
        (source / "text").write_text("utt1 HELLO\nutt2 YOU\n")
        (source / "en" / "clips" / "a.mp3").write_bytes(wav)
        for place in ("a.wav", "en_us/audio/train/a.wav", "train/clean/a.flac", "train-clean-360/1/2/1-2-3.flac"):
            (source / place).parent.mkdir(parents=True, exist_ok=True)
            (source / place).write_bytes(wav)

        def run(path, corpus=corpus, source=source, name=name):
            args = argparse.Namespace(out=source / "out.jsonl", split=[{"commonvoice": "validated"}.get(name, "train")],
                                      language=None, common_voice=None, librispeech=None, squad=None, licence=None,
                                      shards=None, trust_paths=False)
            try:
                list(convert(corpus, source, args).report(corpus.name))
                for row in Manifest(args.out) if args.out.exists() else ():
                    pass
            finally:
                for left in source.glob("out.jsonl*"):
                    left.unlink()

        target(f"table of {name}", [table], change, source / file, run)
    return targets


def json_fields(path):
    known = EncoderConfig.__dataclass_fields__
    return {name: value for name, value in json.loads(path.read_text()).items() if name in known}


def finding(target, content):
    """What is wrong with how an input was read, or None."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    try:
        target.read(content)
        return None
    except UserError as error:
        if len(str(error)) > 2100 or HIDDEN.search(str(error)):
            return f"a message that is long or not safe to print: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < MEMORY, f"{grown:,} bytes of memory"
        assert time.time() - began < SECONDS, f"{time.time() - began:.0f} s"


# ----------------------------------------------------------------------------------------------------------------------
# In the suite

NAMES = ["wav", "flac", "ogg", "mp3", "aiff", "other audio", "tar", "manifest", "encoder config.json", "llm config.json",
         "safetensors", "index.json", "tokenizer.json", "checkpoint", "pickle", "XML", "table of commonvoice",
         "table of kaldi", "table of kaldi's segments",
         "table of kaldi's wav.scp", "table of librisqa", "table of peoples-speech", "table of fleurs"]
SLOW = {"checkpoint": 60, "encoder config.json": 60, "llm config.json": 60, "safetensors": 60}  # inputs; others 200


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    torch.set_num_threads(1)
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
def test_no_input_does_more_than_fail_with_one_line(targets, name):
    """A traceback, a hang, a message of many lines or a gigabyte taken for a forged size would be found here."""
    target = targets[name]
    if name != "XML":  # no file is a source, an answer and a reference file at once
        target.read(target.seeds[0])  # what is not damaged is read

    @settings(max_examples=SLOW.get(name, 200), deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategies.integers(0, 2**32))
    def try_it(seed):
        rng = random.Random(seed)
        assert finding(target, target.mutate(rng.choice(target.seeds), rng)) is None

    try_it()


def test_targets_are_all_named(targets):
    assert list(targets) == NAMES


# ----------------------------------------------------------------------------------------------------------------------
# By hand


def child(name, first, last, progress):
    """Tries inputs first to last - 1 of a target and prints findings; where it is, is in the file `progress`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        target = make_targets(Path(folder))[name]
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, size + 2**32))
        with open(progress, "wb", buffering=0) as file:
            for i in range(first, last):
                file.seek(0)
                file.write(f"{i}\n".encode())
                content = input_of(target, name, i)
                signal.alarm(SECONDS)  # ends the process, as a hang within C code would not let Python do
                try:
                    found = finding(target, content)
                except AssertionError as error:
                    found = str(error)
                signal.alarm(0)
                if found:
                    print(json.dumps([i, found]), flush=True)
            file.seek(0)
            file.write(f"{last}\n".encode())


def input_of(target, name, i):
    rng = random.Random(f"{name} {i}")
    return target.mutate(rng.choice(target.seeds), rng)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--targets", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each target")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.targets[0], *map(int, args.child[:2]), args.child[2])
    args.out.mkdir(parents=True, exist_ok=True)
    slow = sum(name in SLOW for name in args.targets)
    share = max(1, round(args.inputs / (len(args.targets) - 0.75 * slow)))  # slow ones get a quarter of it
    total = findings = 0
    folder = tempfile.TemporaryDirectory()
    targets = make_targets(Path(folder.name))
    for name in args.targets:
        began, at, found = time.time(), args.first, []
        last = args.first + (max(1, share // 4) if name in SLOW else share)
        progress = args.out / "progress"
        while at < last:
            command = [sys.executable, __file__, "--targets", name, "--child", str(at), str(last), str(progress)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            reached = int(progress.read_text().split()[0])
            found += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
            if reached < last:
                what = f"the process ended with {done.returncode}: {' '.join(done.stderr.splitlines()[-1:])}"
                found.append([reached, "more than 20 s" if done.returncode == -signal.SIGALRM else what])
            at = reached + 1
        for i, what in found:
            (args.out / f"{name.replace(' ', '-')}-{i}").write_bytes(input_of(targets[name], name, i))
        kinds = {}
        for i, what in found:
            kinds.setdefault(what[:120], []).append(i)
        print(f"{name}: {last - args.first} inputs, {time.time() - began:.0f} s, {len(found)} findings", flush=True)
        for what, which in kinds.items():
            print(f"  {len(which)} times, first input {which[0]}: {ascii(what)}", flush=True)
        total, findings = total + last - args.first, findings + len(found)
    folder.cleanup()
    print(f"{total} inputs, {findings} findings; their inputs are in {args.out}")
    sys.exit(int(bool(findings)))


if __name__ == "__main__":
    main()
