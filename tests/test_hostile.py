"""Files made to harm whoever opens them: each is refused by one line, soon, in little memory, and no path leads out."""

import gzip
import itertools
import json
import os
import pickle
import re
import resource
import struct
import tarfile
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch
from test_train import arguments

import eval
import sample
import train
from data import Manifest
from model import LLM, SpeechEncoder
from prepare import audio, corpora, doctor, mcif
from prepare.audio import audio_seconds, load_audio
from prepare.checkpoint import fetch, load_checkpoint, load_tokenizer
from prepare.errors import AudioError, CheckpointError, ManifestError, UserError, visible
from prepare.licences import test_fingerprints as fingerprints_beside

ROW = {"text": "one two", "task": "asr", "corpus": "tones", "licence": "CC0-1.0"}
TERMINAL = "\x1b]0;owned\x07\x1b[2J\u202etxt.exe\x9b31m"  # sets the title, clears the screen, turns the direction
ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@contextmanager
def small_memory(most=200 * 2**20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < most


def refused(kind, message, call, *args):
    with small_memory(), pytest.raises(kind, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and not ESCAPES.search(str(caught.value)) and len(str(caught.value)) < 2100


def tone(path, seconds=0.5):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(np.arange(int(16000 * seconds)) / 5), 16000)
    return path


def manifest(path, *audio):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"audio": str(name), **ROW}) + "\n" for name in audio))
    return path


def stopped(call, argv):
    with pytest.raises(SystemExit) as stop:
        call([str(word) for word in argv])
    return stop.value.code


# ----------------------------------------------------------------------------------------------------------------------
# Paths


@pytest.fixture
def places(tmp_path):
    """A folder of a stranger's, whose links lead out of it, and a recording that is none of theirs."""
    mine, folder = tone(tmp_path / "mine" / "secret.wav"), tmp_path / "theirs"
    tone(folder / "in" / "a.wav")
    (folder / "link.wav").symlink_to(mine)
    (folder / "links").symlink_to(mine.parent)
    (folder / "within.wav").symlink_to(folder / "in" / "a.wav")
    with tarfile.open(mine.parent / "s.tar", "w") as tar:
        tar.add(mine, "a.wav")
    (folder / "s.tar").symlink_to(mine.parent / "s.tar")
    return folder


@pytest.mark.parametrize("name", ["../mine/secret.wav", "in/../../mine/secret.wav", "{mine}/secret.wav", "link.wav",
                                  "links/secret.wav", "links/../mine/secret.wav", "s.tar/a.wav", "../mine/s.tar/a.wav",
                                  "./in/.././../mine/secret.wav", "/dev/zero", ".."])
def test_no_audio_from_outside_the_folder_of_a_manifest(places, name):
    name = name.format(mine=places.parent / "mine")
    path = manifest(places / "m.jsonl", "in/a.wav", name)
    for read in (lambda rows: rows[1], list, lambda rows: rows.split(["asr"], 30, lambda row: None)):
        refused(ManifestError, r"m.jsonl' line 2: audio is '.*', which leads out of the manifest's folder; .* --trust-paths",
                read, Manifest(path))
    rows = list(Manifest(path, trust_paths=True))
    assert len(rows) == 2
    if name.endswith("secret.wav"):
        assert len(Manifest(path, trust_paths=True).audio(rows[1])) == 8000


def test_audio_within_the_folder_needs_no_trust(places, monkeypatch):
    """By any way that ends there: dots, absolute paths, links; and from a relative working directory."""
    names = ["in/a.wav", "in/../in/a.wav", "../theirs/in/a.wav", places / "in" / "a.wav", "within.wav", "./in//a.wav"]
    manifest(places / "m.jsonl", *names)
    for directory, path in ((places, "m.jsonl"), (places / "in", "../m.jsonl"), (places.parent, "theirs/m.jsonl")):
        monkeypatch.chdir(directory)
        rows = Manifest(path)
        assert [len(rows.audio(row)) for row in rows] == [8000] * 6


def test_programs_refuse_such_paths_unless_told(tiny_project, places, tmp_path, capsys):
    path = manifest(places / "m.jsonl", *["link.wav"] * 4)
    said = stopped(train.main, arguments(tiny_project, tmp_path / "out", data=path))
    assert "m.jsonl' line 1: audio is 'link.wav', which leads out" in said and "\n" not in said
    cfg = train.parse(arguments(tiny_project, tmp_path / "out", data=path, trust_paths=True))
    assert len(train.open_manifests(cfg, ("asr",))[0][0]) == 4
    code = stopped(doctor.main, [path, "--out", tmp_path / "doctor"])
    assert code == 2 and "no row that can be used" in capsys.readouterr().err
    stopped(doctor.main, [path, "--out", tmp_path / "doctor", "--trust-paths"])
    report = json.loads((tmp_path / "doctor" / "m.json").read_text())
    assert report["decoded"] == 1 and not any(f["kind"] == "bad line" for f in report["findings"])
    manifest(places / "m.jsonl", "in/a.wav", "link.wav")
    stopped(doctor.main, [path, "--out", tmp_path / "doctor"])
    said = capsys.readouterr().out
    assert "serious: lines that training stops at: 1 of 2, " in said and "line 2 (audio is 'link.wav', which leads" in said


def test_what_a_corpus_names_outside_itself_is_left_out(tmp_path, capsys):
    """And a manifest that lies away from its corpus says that training will need --trust-paths."""
    mine = tone(tmp_path / "mine" / "secret.wav")
    folder = tmp_path / "theirs" / "en"
    tone(folder / "clips" / "a.mp3")
    (folder / "clips" / "b.mp3").symlink_to(mine)
    (mine.parent / "c.mp3").write_bytes(mine.read_bytes())
    (folder / "validated.tsv").write_text("client_id\tpath\tsentence\nx\ta.mp3\tHello.\nx\tb.mp3\tYou.\n"
                                          f"x\t../../../mine/c.mp3\tThere.\nx\t{mine.parent}/c.mp3\tHere.\n")
    out = tmp_path / "theirs" / "m.jsonl"
    command = ["commonvoice", str(tmp_path / "theirs"), str(out), "--split", "validated"]
    corpora.main(command)
    said = capsys.readouterr().out
    assert "left out 3 rows, 0.00 h (75.0%): audio outside the corpus's directory, which --trust-paths takes" in said
    assert [row["audio"] for row in Manifest(out)] == ["en/clips/a.mp3"] and "outside the manifest" not in said
    corpora.main([*command, "--trust-paths"])
    said = capsys.readouterr().out
    assert "kept 4 rows" in said and "the audio of 3 rows is outside the manifest's folder: train with --trust-paths" in said
    refused(ManifestError, "m.jsonl' line 2: .* leads out", list, Manifest(out))
    command[2] = str(tmp_path / "elsewhere" / "m.jsonl")
    corpora.main(command)
    assert "the audio of 1 rows is outside the manifest's folder" in capsys.readouterr().out
    command[2] = str(tmp_path / "sharded" / "m.jsonl")
    corpora.main([*command, "--shards", str(tmp_path / "sharded")])
    assert len(list(Manifest(command[2]))) == 1 and "outside the manifest" not in capsys.readouterr().out


def test_pipes_and_devices_are_no_audio(tmp_path):
    """Opening a pipe that nobody writes to would wait for ever, and a device has no end."""
    os.mkfifo(tmp_path / "pipe.wav")
    os.mkfifo(tmp_path / "pipe.tar")
    os.mkfifo(tmp_path / "config.json")
    for name in (tmp_path / "pipe.wav", tmp_path / "pipe.tar" / "a.wav", "/dev/zero", "/dev/stdin"):
        refused(AudioError, "not a regular file|No such file", load_audio, name)
    refused(CheckpointError, "config.json: not readable as JSON .not a regular file", LLM.from_pretrained, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Forged headers


def header(name=b"a.wav", size=b"00000001000\0", kind=b"0"):
    block = bytearray(512)
    block[:len(name)], block[124:124 + len(size)], block[156:157], block[257:265] = name, size, kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


@pytest.mark.parametrize("content, message", [
    (header(size=b"\x80" + (2**63 - 1).to_bytes(11, "big")) + bytes(1024), "a tar with 9,223,372,036,854,775,807 bytes"),
    (header(size=b"77777777777\0") + bytes(1024), "a tar that is cut off"),
    (header(size=b"\xff" * 12) + bytes(1024), "not a tar or a damaged one"),  # -1: Python's tarfile goes round for ever
    (header(size=b"-0000000777\0") + bytes(1024), "not a tar or a damaged one"),
    (header(kind=b"x", size=b"77777777777\0") + bytes(1024), "a tar with a name of 8,589,934,591 bytes"),
    (header(kind=b"L", size=b"\x80" + (2**62).to_bytes(11, "big")) + bytes(1024), "a tar with a name of 4,611,686"),
    (header(kind=b"x", size=b"00000000022\0") + b"99999999 size=-5\n".ljust(512, b"\0"), "a damaged tar"),
    (header(kind=b"x", size=b"00000000014\0") + b"12 size=-5\n\n".ljust(512, b"\0"), "not a tar or a damaged one"),
    (header(kind=b"S"), "a tar with sparse files"), (b"x" * 1024, "not a tar"), (header()[:300], "not a whole tar"),
    (header(kind=b"L", size=b"00000000001\0").ljust(1024, b"a") * 5000, "no such member")], ids=itertools.count())
def test_forged_tars(tmp_path, content, message):
    (tmp_path / "s.tar").write_bytes(content)
    refused(AudioError, f"s.tar/a.wav': (found )?{message}", load_audio, tmp_path / "s.tar" / "a.wav")


def test_links_in_tars_are_not_followed(tmp_path):
    tone(tmp_path / "b.wav")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind, target in (("a.wav", tarfile.SYMTYPE, tmp_path / "b.wav"), ("c.wav", tarfile.LNKTYPE, "b.wav"),
                                   ("d.wav", tarfile.SYMTYPE, "../../etc/passwd"), ("e.wav", tarfile.CHRTYPE, "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(target)
            tar.addfile(info)
        tar.add(tmp_path / "b.wav", "../b.wav")
    for name in "acde":
        refused(AudioError, "found no such member in the tar", load_audio, tmp_path / "s.tar" / f"{name}.wav")
    assert len(load_audio(f"{tmp_path}/s.tar/../b.wav")) == 8000  # a name like any other: nothing is written anywhere


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sound_tars_are_read_as_tarfile_reads_them(tmp_path, kind):
    names = ["a.wav", "in/Grüße " + "x" * 60 + ".wav", "y" * 60 + "/" + "z" * 90 + ".wav"]
    if kind != tarfile.USTAR_FORMAT:
        names.append("long/" * 60 + "名.wav")
    tone(tmp_path / "a.wav")
    with tarfile.open(tmp_path / "s.tar", "w", format=kind) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        for name in names:
            info = tar.gettarinfo(tmp_path / "a.wav", name)
            info.mtime += 0.5  # which pax writes into a header of its own
            tar.addfile(info, open(tmp_path / "a.wav", "rb"))
    with tarfile.open(tmp_path / "s.tar") as tar:
        known = {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
    assert audio._tar_members(str(tmp_path / "s.tar")) == known and known.keys() == set(names)
    for name in names:
        assert len(load_audio(tmp_path / "s.tar" / name)) == 8000


def test_forged_audio_headers(tmp_path):
    """None of them makes room for what it promises."""
    path = tmp_path / "x"

    def changed(kind, at, value, subtype="PCM_16"):
        soundfile.write(path, np.zeros(4000), 16000, format=kind, subtype=subtype)
        content = bytearray(path.read_bytes())
        at = content.index(at[0]) + at[1] if isinstance(at, tuple) else at
        content[at:at + len(value)] = value
        path.write_bytes(content)
        with small_memory():
            seconds = audio_seconds(path)
        assert seconds >= 0
        return path

    refused(AudioError, "found a sample rate of 1000000000 Hz", load_audio, changed("WAV", 24, struct.pack("<I", 10**9)))
    refused(AudioError, "found .*, expected", load_audio, changed("WAV", 22, struct.pack("<H", 1000)))
    refused(AudioError, "found .*, expected", load_audio, changed("WAV", 22, struct.pack("<H", 65535)))
    refused(AudioError, "found .*, expected", load_audio, changed("WAV", 40, struct.pack("<I", 2**31 - 2**17)))
    with small_memory():  # libsndfile goes by the length of what is there
        assert len(load_audio(changed("AIFF", (b"COMM", 10), struct.pack(">I", 2**32 - 1)))) == 4000
        assert len(load_audio(changed("W64", (b"data\xf3", 16), struct.pack("<Q", 2**60)))) == 4000
    refused(AudioError, "found 68,719,476,735 samples to be read from [0-9,]+ bytes, expected at most 67,108,864; its "
            "header or the duration is wrong", load_audio, changed("FLAC", 21, b"\xff" * 5))
    refused(AudioError, "found .* samples to be read", load_audio, changed("WAV", 0, b"RIFF"), 0.0, 999_999.0)


def test_little_that_unpacks_to_much(tmp_path, monkeypatch):
    """Silence takes nearly no bytes in a flac: a megabyte of it would fill any memory."""
    monkeypatch.setattr(audio, "FEW_SAMPLES", 2**18)
    soundfile.write(tmp_path / "bomb.flac", np.zeros(2**21, np.int16), 16000)
    refused(AudioError, "found 2,097,152 samples to be read from .* bytes", load_audio, tmp_path / "bomb.flac")
    assert len(load_audio(tmp_path / "bomb.flac", 5.0, 10.0)) == 160_000  # a part that is asked for is no harm
    speech = np.random.default_rng(0).normal(0, 0.1, 2**20)
    soundfile.write(tmp_path / "long.ogg", speech[:2**19], 16000, format="OGG", subtype="OPUS")
    assert len(load_audio(tmp_path / "long.ogg")) == 2**19


def test_a_vorbis_file_that_crashed_the_decoder(tmp_path):
    """Found by fuzzing: libsndfile 1.2.2 died on seeking where no packet can be decoded."""
    path = tmp_path / "x.ogg"
    soundfile.write(path, 0.3 * np.sin(np.arange(16000) / 5), 16000, format="OGG", subtype="VORBIS")
    content = path.read_bytes()
    for page in [at for at in range(len(content)) if content[at:at + 4] == b"OggS"][2:]:
        content = content[:page + 30] + bytes(200) + content[page + 230:]  # which breaks the page's checksum, too
    path.write_bytes(content)
    refused(AudioError, "x.ogg': found", load_audio, path, 0.5, 0.1)


def test_a_codec_that_cannot_seek(tmp_path):
    soundfile.write(tmp_path / "x.wav", 0.3 * np.sin(np.arange(16000) / 5), 16000, subtype="GSM610")
    assert len(load_audio(tmp_path / "x.wav")) >= 15900
    refused(AudioError, "cannot be decoded|no way to go to", load_audio, tmp_path / "x.wav", 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Text files


def test_a_manifest_line_without_an_end(tmp_path):
    manifest(tmp_path / "m.jsonl", "a.wav")
    with open(tmp_path / "m.jsonl", "a") as file:
        file.truncate(2**25)
    refused(ManifestError, r"m.jsonl' line 2: found 33,554,\d+ bytes, expected at most 16,777,216; is this a manifest",
            Manifest, tmp_path / "m.jsonl")


def test_nested_and_monstrous_values_of_a_row(tmp_path):
    for depth in (10, 300, 900, 990, 5000, 100_000):
        for name in ("text", "audio", "sources", "start", "task"):
            line = json.dumps({"audio": "a.wav", **ROW, name: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
            (tmp_path / "m.jsonl").write_text(line)
            refused(ManifestError, "line 1: ", lambda: Manifest(tmp_path / "m.jsonl")[0])
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "a.wav", **ROW, "task": "x" * 10**6}))
    refused(ManifestError, "task is 'xx.{1,40}', expected one of", lambda: Manifest(tmp_path / "m.jsonl")[0])


def test_files_beside_a_manifest(tmp_path):
    (tmp_path / "a.fingerprints").write_bytes(b"\xff\xfe")
    refused(ManifestError, "a.fingerprints: .* expected what prepare.corpora mcif writes", fingerprints_beside,
            [tmp_path / "m.jsonl"])
    (tmp_path / "a.fingerprints").unlink()
    os.mkfifo(tmp_path / "b.fingerprints")
    refused(ManifestError, "b.fingerprints: not a regular file", fingerprints_beside, [tmp_path / "m.jsonl"])


LAUGHS = "<!DOCTYPE a [<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{i + 1} '{f'&a{i};' * 10}'>" for i in range(12)) + "]>"
TESTSET = "<testset><task track='short' text_lang='de'><sample id='0'>{}</sample></task></testset>"


@pytest.mark.parametrize("content, message", [
    (LAUGHS + TESTSET.format("&a12;"), "found a DOCTYPE, expected none"),
    ("<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>" + TESTSET.format("&x;"), "found a DOCTYPE"),
    ("<!DOCTYPE a SYSTEM 'http://example.org/a.dtd'>" + TESTSET.format(""), "found a DOCTYPE"),
    (("<!DOCTYPE a [<!ENTITY x 'y'>]>" + TESTSET.format("&x;")).encode("utf-16"), "expected XML in UTF-8"),
    ("<?xml version='1.0' encoding='utf-7'?>+ADwAIQ-DOCTYPE a>" + TESTSET.format(""), "expected XML in UTF-8"),
    (TESTSET.format("&undefined;"), "undefined entity"), (TESTSET.format("<a/>" * 2_000_001), "found more than 2000000 tags"),
    (gzip.compress(TESTSET.format(" " * 60_000_000).encode(), 1), "found more than 50000000 bytes")], ids=itertools.count())
def test_hostile_xml(tmp_path, content, message):
    (tmp_path / "x.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (mcif.read_source, mcif.read_answers, mcif.read_references):
        refused(mcif.FormatError, message, read, tmp_path / "x.xml")


def test_recordings_of_a_source_file_stay_in_their_folder(places, tmp_path):
    for name, message in (("../a.wav", "a path below the audio folder"), ("link.wav", "a link out of '.*theirs'"),
                          ("links/secret.wav", "if you trust the link, give --trust-paths")):
        (tmp_path / "x.xml").write_text(TESTSET.format(
            f"<audio_path>{name}</audio_path><instruction>Transcribe.</instruction>"))
        refused(mcif.FormatError, message, mcif.read_source, tmp_path / "x.xml", places)
    assert mcif.read_source(tmp_path / "x.xml")[0].samples[0].audio == "links/secret.wav"


# ----------------------------------------------------------------------------------------------------------------------
# Models


@pytest.fixture
def parts(tiny_project, tmp_path):
    """Copies of the tiny encoder and LLM, to be spoilt; and a function that changes a config.json."""
    for name in ("encoder", "llm"):
        (tmp_path / name).mkdir()
        for file in (tiny_project / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())

    def change(part, **fields):
        raw = json.loads((tiny_project / part / "config.json").read_text()) | fields
        (tmp_path / part / "config.json").write_text(json.dumps(raw))
        return tmp_path / part
    return change


@pytest.mark.parametrize("fields, message", [
    ({"hidden_size": 10**12}, "hidden_size is 1000000000000, expected int of at least 1 and at most 262,144"),
    ({"hidden_size": 1e12}, "hidden_size is 1000000000000.0, expected int"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected int of at least 1 and at most 1,000"),
    ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904"), ({"intermediate_size": 2**18}, "do not fit config.json"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"), ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"), ({"eos_token_id": 10**9}, "eos_token_id is .1000000000., expected"),
    ({"eos_token_id": -1}, "eos_token_id is .-1., expected"), ({"attention_dropout": 7}, "attention_dropout is 7"),
    ({"model_type": "\x1b[31mqwen2"}, r"model_type is '\\x1b\[31mqwen2', expected"),
    ({"hidden_size": "9" * 10**6}, "hidden_size is '9999")])
def test_hostile_configs(parts, fields, message):
    directory = parts("llm", **fields)
    (directory / "generation_config.json").unlink()  # whose end tokens win
    refused(CheckpointError, message, LLM.from_pretrained, directory)


def test_hostile_encoder_configs(parts):
    for fields in ({"hidden_size": 10**12, "num_attention_heads": 10**6}, {"num_hidden_layers": 10**9},
                   {"conv_depthwise_kernel_size": 2**40}, {"left_max_position_embeddings": 2**40},
                   {"feature_projection_input_dim": 80}, {"layer_norm_eps": float("nan")}):
        refused(CheckpointError, f"{list(fields)[0]} is ", SpeechEncoder.from_pretrained, parts("encoder", **fields))


def test_deep_and_large_json(parts, tmp_path):
    directory = parts("llm")
    for depth in (900, 100_000):
        (directory / "config.json").write_text('{"model_type": ' + "[" * depth + "]" * depth + "}")
        refused(CheckpointError, "config.json: ", LLM.from_pretrained, directory)
    with open(directory / "config.json", "wb") as file:
        file.truncate(2**34)
    refused(CheckpointError, "config.json: not readable as JSON .more than 16,777,216 bytes", LLM.from_pretrained, directory)
    with open(directory / "tokenizer.json", "wb") as file:
        file.truncate(2**34)
    refused(CheckpointError, "tokenizer.json: more than 134,217,728 bytes; copy", load_tokenizer, directory)


def test_hostile_tokenizers(parts, tiny_project):
    directory = parts("llm")
    raw = json.loads((tiny_project / "llm" / "tokenizer.json").read_text())

    def write(**fields):
        (directory / "tokenizer.json").write_text(json.dumps(raw | fields))

    write(padding={"strategy": {"Fixed": 2**50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                   "pad_type_id": 0, "pad_token": "x"})
    with small_memory():
        assert len(load_tokenizer(directory).encode("one two").ids) < 10  # rows are never padded
    write(added_tokens=[{"id": 10**8, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False,
                         "normalized": False, "special": True}])
    refused(CheckpointError, "tokenizer.json: ", load_tokenizer, directory)
    vocabulary = raw["model"] | {"vocab": raw["model"]["vocab"] | {"zzz": 10**6}}
    write(model=vocabulary)
    refused(CheckpointError, "has tokens up to 1000000, expected them below the vocab_size of config.json, 2",
            load_tokenizer, directory)
    for content in (b"[" * 10**6, b"{}", b"\xff" * 100, b'{"version": "1.0", "model": 5}'):
        (directory / "tokenizer.json").write_bytes(content)
        refused(CheckpointError, "tokenizer.json: .*; copy the LLM's own tokenizer.json there", load_tokenizer, directory)


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, {"dtype": "F32", "shape": [1], "data_offsets": [2**63, 2**63 + 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [float("nan"), 4]}, {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [48], "data_offsets": [0, 2**40]}])
def test_forged_weights(parts, entry):
    directory = parts("llm")
    for entries in ({"model.norm.weight": entry}, {"model.norm.weight": entry, "other": entry}):  # the last: overlapping
        text = json.dumps(entries).encode()
        for size in (len(text), 2**63, 2**40, 0):
            (directory / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + bytes(400))
            refused(CheckpointError, "not a whole safetensors file|do not fit config.json", LLM.from_pretrained, directory)


def test_shards_are_files_beside_their_index(parts):
    directory = parts("llm")
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    for name in ("../model.safetensors", "../../etc/passwd", "/etc/passwd", "a/../../model.safetensors", "\x1b[2J"):
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        refused(CheckpointError, "index.json: names the shard .*, which is not a file beside it", LLM.from_pretrained, directory)


def test_names_of_models_are_no_paths(tmp_path):
    for name in ("../../x", "a/b/../../c", "x" * 1000, "a\0b", "\x1b[2J/x"):
        refused(CheckpointError, "no such directory; give the directory of a checkpoint", fetch, name)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def trained(tiny_project, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.main(arguments(tiny_project, out, steps=2, eval_every=2))
    return out / "align.pt"


class Command:
    def __reduce__(self):
        return os.system, ("touch owned",)


class Zeros:
    def __reduce__(self):
        return bytearray, (2**33,)


@pytest.mark.parametrize("hidden", [Command(), Zeros()])
def test_pickles_that_do_something(trained, tmp_path, hidden, monkeypatch):
    """A command would be run; eight gigabytes of zeros would be made, by what torch itself holds for safe."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(trained) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, pickle.dumps(hidden, 2) if entry.filename.endswith("data.pkl") else content)
    refused(CheckpointError, "x.pt: not a checkpoint of this project .it names '.*', expected tensors alone", load_checkpoint,
            tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(hidden))
    refused(CheckpointError, "x.pt: not a checkpoint of this project", load_checkpoint, tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


def nested(depth):
    found = ["x"] * 10
    for _ in range(depth):
        found = [found] * 10  # little in a file, but its repr is ten times as long at each level
    return found


@pytest.mark.parametrize("part, value", [
    ("model", {"adapter.x": torch.zeros(1).expand(2**20, 2**20)}), ("model", {"adapter.x": 5}), ("model", []),
    ("model", {"adapter.x": torch.zeros(2, 2, device="meta")}), ("adapter", {"adapter_act": "rm -rf"}), ("adapter", 5),
    ("bases", {"encoder": {"path": 5, "sha256": ""}, "llm": {}}), ("config", {"phase": "ift", "prompt": "x"}),
    ("config", {"phase": "ift", "prompt": "text", "data": nested(12)}), ("window", float("nan")), ("window", 1e9),
    ("step", -1), ("refuse_above", "x"), ("data", [["c", "l", "en"]]), ("data", [["c", "l", "en", float("inf")]])])
def test_forged_parts_of_a_checkpoint(trained, tmp_path, part, value):
    state = torch.load(trained, weights_only=True)
    torch.save(state | {part: value}, tmp_path / "x.pt")
    refused(CheckpointError, f"x.pt: its part {part} is not what this project writes|x.pt: not a checkpoint of this project",
            load_checkpoint, tmp_path / "x.pt")


@pytest.mark.parametrize("fields, message", [
    ({"num_adapter_layers": 10**9}, "num_adapter_layers is 1000000000"), ({"adapter_kernel_size": 10**6}, "adapter_kernel"),
    ({"prompt_tokens": 10**9}, "prompt_tokens is"), ({"hidden_size": 2**17, "intermediate_size": 2**17}, None),
    ({"unheard_of": 1}, None), ({"num_adapter_layers": 3}, "tensors of the adapter do not fit")])
def test_forged_adapters(trained, tmp_path, fields, message):
    """Its sizes are those of the encoder and the LLM, whatever the checkpoint says."""
    state = torch.load(trained, weights_only=True)
    torch.save(state | {"adapter": state["adapter"] | fields}, tmp_path / "x.pt")
    with small_memory():
        if message is None:
            sample.load_model(tmp_path / "x.pt")
            return
    refused(CheckpointError, message, sample.load_model, tmp_path / "x.pt")


def test_compressed_checkpoints(trained, tmp_path):
    with zipfile.ZipFile(trained) as old, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    refused(CheckpointError, "it has compressed or overlapping parts", load_checkpoint, tmp_path / "x.pt")


# ----------------------------------------------------------------------------------------------------------------------
# What is printed


def test_visible():
    assert visible("Grüße, 你好 שלום \U0001f600 a\u200db") == "Grüße, 你好 שלום \U0001f600 a\u200db"
    assert visible("a\x1b[31mb\x9bc\u202ed\ne\tf\x00\x7f") == (
        r"a\u001b[31mb\u009bc\u202ed\u000ae\u0009f\u0000\u007f")
    assert visible("a\nb\tc\r\n", keep="\n\t") == "a\nb\tc\\u000d\n"
    for text in (TERMINAL, "\ud800", 'x"\\'):
        assert json.loads(visible(json.dumps({"a": text}, ensure_ascii=False))) == {"a": text}
    error = UserError(f"x.wav: {TERMINAL}\n" + "y" * 10**6)
    assert not ESCAPES.search(str(error)) and "\n" not in str(error) and len(str(error)) < 2010


def test_training_prints_no_escape_sequences(tiny_project, tmp_path, capsys, monkeypatch):
    rows = [json.loads(line) for line in (tiny_project / "train.jsonl").read_text().splitlines()]
    path = tiny_project / "escapes.jsonl"
    path.write_text("".join(json.dumps(row | {"corpus": f"c{TERMINAL}", "text": f"{TERMINAL} {row['text']}"}) + "\n"
                            for row in rows))
    monkeypatch.setattr(train, "validate", lambda *_: ({"dev_loss": 1.0}, [(TERMINAL, f"{TERMINAL}\n  read: it")] * 2))
    train.main(arguments(tiny_project, tmp_path, data=path, dev=path, steps=2, eval_every=2))
    said = "".join(capsys.readouterr())
    assert "said: \\u001b]0;owned\\u0007" in said and "c\\u001b]0;owned" in said
    assert not ESCAPES.search(said.replace("\r", "").replace("\x1b[A", ""))  # those two are the progress bar's


def test_evaluation_and_doctor_print_no_escape_sequences(tiny_project, trained, tmp_path, capsys):
    rows = [json.loads(line) for line in (tiny_project / "dev.jsonl").read_text().splitlines()]
    path = tiny_project / "harm.jsonl"
    harm = f"{TERMINAL}</script><script>alert(1)</script><!--"
    names = [{"corpus": f"a{harm}", "speaker": harm}, {"corpus": f"b{harm}", "speaker": harm}]
    path.write_text("".join(json.dumps(row | names[i % 2] | {"text": row["text"] + harm}) + "\n"
                            for i, row in enumerate(rows)) + json.dumps(rows[0] | {"audio": f"no{TERMINAL}.wav"}) + "\n")
    eval.main([str(path), "--ckpt", str(trained), "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "corpus a\\u001b]0;owned" in out and "left out" in err
    assert not ESCAPES.search(out) and not ESCAPES.search(err.replace("\r", "").replace("\x1b[A", ""))
    page = (tmp_path / "harm-align.html").read_text()
    assert page.count("<script") == 2 == page.count("</script>")
    data = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert "<" not in data and json.loads(data)["items"][0]["speaker"] == harm
    stopped(doctor.main, [path, "--out", tmp_path / "doctor"])
    out = capsys.readouterr().out
    assert not ESCAPES.search(out) and "\\u001b]0;owned" in out
    assert not ESCAPES.search((tmp_path / "doctor" / "harm.svg").read_text())


def test_sampling_prints_no_escape_sequences(tiny_project, trained, tmp_path, capsys, monkeypatch):
    recording = tmp_path / f"a{TERMINAL.replace('/', '')}.wav"
    recording.write_bytes((tiny_project / "dev0.wav").read_bytes())

    def ask(model, tokenizer, state, heard, instruction, on_text=None, **options):
        if on_text:
            on_text(f"Hello{TERMINAL}\nyou")
        return "asr", sample.Answer(f"Hello{TERMINAL}")

    monkeypatch.setattr(sample, "ask", ask)
    argv = [str(recording), str(tiny_project / "dev1.wav"), "Transcribe.", "--ckpt", str(trained)]
    sample.main(argv)
    out = capsys.readouterr().out
    assert not ESCAPES.search(out) and "Hello\\u001b]0;owned" in out and "\nyou" in out and "a\\u001b" in out
    sample.main([*argv, "--json"])
    out = capsys.readouterr().out
    assert not ESCAPES.search(out) and json.loads(out.splitlines()[0])["text"] == f"Hello{TERMINAL}"
    recording.write_bytes(b"")
    said = stopped(sample.main, argv)
    assert "found 0 bytes" in said and not ESCAPES.search(said)
