"""data.py: audio files of every kind and state, parts of them, tars, the resampler, windows."""

import io
import math
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
import soundfile
import torch

import data
from conftest import refused
from data import AudioError, audio_seconds, cut_windows, load_audio
from extras.report import encode_opus
from model import EncoderConfig

RATE = 16000


def refuses(path, message, *part):
    refused(message, load_audio, path, *part, kind=AudioError)


def noisy_tone(seconds):
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, len(time))
    return (0.3 * np.sin(2 * np.pi * 440 * time) + noise).astype("float32")


def write_tone(path, seconds=1.0, **options):
    """Writes a noisy tone as a file, and returns its samples."""
    wave = noisy_tone(seconds)
    soundfile.write(path, wave, RATE, **options)
    return torch.from_numpy(wave)


# ------------------------------------------------------------------------------
# Resampling


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44099, 44100, 48000, 192000])
def test_resampling_of_sines(tmp_path, rate):
    nyquist = min(rate, RATE) / 2
    inside = np.append(np.linspace(0.01, 0.92, 7), 0.5 * np.sqrt(2))
    beyond = np.append(np.linspace(1.0, 1.15, 5), np.linspace(1.2, 0.49 * rate / nyquist, 4))
    shares = np.concatenate([inside, [0.94, 0.97, 0.99], beyond])
    time = np.arange(rate) / rate
    for frequency in shares[shares * nyquist < rate / 2] * nyquist:
        sine = np.sin(2 * np.pi * frequency * time + 0.3)
        soundfile.write(tmp_path / "sine.wav", sine, rate, subtype="FLOAT")
        out = load_audio(tmp_path / "sine.wav").double()
        assert out.shape == (RATE,)
        check_sine(out, frequency, nyquist)


def check_sine(out, frequency, nyquist):
    """Checks a resampled sine (16000,) away from its ends, where it begins and stops."""
    inner = slice(400, -400)
    out, k = out[inner], torch.arange(RATE, dtype=torch.float64)[inner]
    if frequency >= nyquist:
        assert out.abs().max() < 1e-5  # -100 dB
        return
    angle = 2 * np.pi * frequency * k / RATE
    basis = torch.stack([torch.sin(angle + 0.3), torch.cos(angle + 0.3)], 1)
    gains = torch.linalg.lstsq(basis, out[:, None]).solution
    # What is not this sine are images.
    assert (out - (basis @ gains)[:, 0]).abs().max() < 1e-5
    if frequency <= 0.921 * nyquist:
        assert abs(20 * np.log10(gains[0].item())) < 0.01
        assert (out - basis[:, 0]).abs().max() < 3e-5  # there is no delay either


@pytest.mark.parametrize("rate", [8000, 11025, 15999, 22050, 44100, 48000])
def test_resampled_length(tmp_path, rate):
    for samples in (rate // 10, rate // 10 + 1, rate // 7 + 2, rate + 1):
        soundfile.write(tmp_path / "x.wav", np.full(samples, 0.25), rate, subtype="FLOAT")
        out = load_audio(tmp_path / "x.wav")
        assert len(out) == math.ceil(samples * RATE / rate)
        assert (out[200:-200] - 0.25).abs().max() < 1e-5


def test_resampling_keeps_the_time_of_a_click(tmp_path):
    x = np.zeros(48000)
    x[[30000, 47997]] = 1
    soundfile.write(tmp_path / "click.wav", x, 48000, subtype="FLOAT")
    out = load_audio(tmp_path / "click.wav")
    assert set(out.topk(2).indices.tolist()) == {10000, 15999}
    torch.testing.assert_close(out[9900:10000], out[10001:10101].flip(0), rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize(
    "extension, subtype, tolerance",
    [
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-23),
        ("wav", "PCM_U8", 2**-7),
        ("wav", "FLOAT", 0),
        ("flac", "PCM_16", 2**-15),
        ("aiff", "PCM_16", 2**-15),
        ("w64", "DOUBLE", 0),
        ("ogg", "VORBIS", 0.2),
        ("ogg", "OPUS", 0.2),
        ("mp3", "MPEG_LAYER_III", 0.2),
    ],
)
def test_formats(tmp_path, extension, subtype, tolerance):
    path = tmp_path / f"Grüße an {subtype}.{extension}"
    x = write_tone(path, subtype=subtype)
    wave = load_audio(path)
    assert wave.dtype == torch.float32 and wave.shape == x.shape
    assert (wave - x).abs().max() <= tolerance
    assert torch.equal(load_audio(str(path)), wave)
    assert audio_seconds(path) == pytest.approx(1.0, abs=0.1)


def test_a_file_is_known_by_its_content(tmp_path):
    x = write_tone(tmp_path / "x.wav", 0.5, subtype="FLOAT")
    for name in ("x.raw", "x.mp3", "x"):
        (tmp_path / name).write_bytes((tmp_path / "x.wav").read_bytes())
        assert torch.equal(load_audio(tmp_path / name), x)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_channels_are_averaged(tmp_path, rate):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 3))
    soundfile.write(tmp_path / "three.wav", x, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", x.mean(1), rate, subtype="FLOAT")
    three, mono = load_audio(tmp_path / "three.wav"), load_audio(tmp_path / "mono.wav")
    torch.testing.assert_close(three, mono, rtol=0, atol=1e-6)


def test_a_file_longer_than_one_block(tmp_path):
    x = np.random.default_rng(0).integers(-(2**15), 2**15, (2**23 + 12345, 2), dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", x, RATE)
    expected = torch.from_numpy(x).float().mean(1) / 2**15
    assert torch.equal(load_audio(tmp_path / "long.wav"), expected)


def test_encoded_opus_is_read_again(tmp_path):
    x = torch.from_numpy(noisy_tone(2.5))
    (tmp_path / "x.ogg").write_bytes(encode_opus(x))
    assert (load_audio(tmp_path / "x.ogg") - x).abs().mean() < 0.05


# ------------------------------------------------------------------------------
# Parts of files, and members of tars


def pack_tar(path, names, content, **options):
    """A tar of equal files, and a link, which is no member. Pax writes broken times into headers of
    its own."""
    link = tarfile.TarInfo("link.wav")
    link.type, link.linkname = tarfile.SYMTYPE, names[0]
    with tarfile.open(path, "w", **options) as tar:
        tar.addfile(link)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5
            tar.addfile(member, io.BytesIO(content))


def test_parts_of_files_and_members_of_tars(tmp_path):
    wave = write_tone(tmp_path / "a.wav", 2.0, subtype="FLOAT")
    pack_tar(tmp_path / "s.tar", ["./in/a.wav"], (tmp_path / "a.wav").read_bytes())
    for path in (tmp_path / "a.wav", tmp_path / "s.tar" / "in" / "a.wav"):
        assert torch.equal(load_audio(path), wave)
        assert torch.equal(load_audio(path, 0.5), wave[8000:])
        assert torch.equal(load_audio(path, 0.25, 0.5), wave[4000:12000])
        assert audio_seconds(path) == 2.0
        refuses(path, "a.wav: found no samples, expected at least 35 ms", 3.0)
        refuses(path, "a.wav: found 0.50 s of audio, expected 1.00 s", 1.5, 1.0)
    refuses(tmp_path / "s.tar" / "link.wav", "s.tar/link.wav: no such file; correct the path")
    assert audio_seconds(tmp_path / "s.tar" / "link.wav") == 0


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_tars_of_every_kind(tmp_path, kind):
    names = ["a.wav", "in/Grüße " + "x" * 60 + ".wav", "y" * 60 + "/" + "z" * 90 + ".wav"]
    if kind != tarfile.USTAR_FORMAT:
        names.append("long/" * 60 + "名.wav")
    x = write_tone(tmp_path / "a.wav", 0.1, subtype="FLOAT")
    pack_tar(tmp_path / "s.tar", names, (tmp_path / "a.wav").read_bytes(), format=kind)
    assert list(data.tar_members(str(tmp_path / "s.tar"))) == names
    for name in names:
        assert torch.equal(load_audio(tmp_path / "s.tar" / name), x)


def tar_header(kind=b"0", size=b"00000001000\0"):
    """A header of a tar with a right checksum."""
    block = bytearray(512)
    block[:5], block[124:136], block[156:157] = b"a.wav", size, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # -512


@pytest.mark.parametrize(
    "content, message",
    [
        (tar_header(size=b"77777777777\0") + bytes(1024), "unexpected end of data"),
        (tar_header(size=b"\x80" + b"\xff" * 11) + bytes(1024), "offset-sized integer"),
        (tar_header() + bytes(512) + tar_header(size=NEGATIVE), "a member of negative size"),
        (
            tar_header(b"L", b"\x80" + (2**62).to_bytes(11, "big")) + bytes(1024),
            "a name of a forged size",
        ),
        (tar_header(b"x", b"00000000014\0") + b"12 size=-5\n\n".ljust(512), "header"),
        (tar_header(b"L", b"00000000001\0").ljust(1024, b"a") * 5000, "recursion.*"),
        (tar_header()[:300], "truncated header"),
        (b"x" * 2000, "invalid header"),
        (b"", "empty file"),
    ],
)
def test_damaged_and_forged_tars(tmp_path, content, message):
    (tmp_path / "s.tar").write_bytes(content)
    refuses(tmp_path / "s.tar" / "a.wav", f"s.tar: .*{message}; copy or download it again")


# ------------------------------------------------------------------------------
# What a header promises, and what there is


def write_odd(path, content, seconds=None):
    """Writes the bytes of a file, also as a member of a tar, and returns the waveforms of both, or
    checks that both are refused if there is no length that they should have."""
    path.write_bytes(content)
    pack_tar(path.with_suffix(".tar"), [path.name], content)
    data.tar_members.cache_clear()
    paths = [path, path.with_suffix(".tar") / path.name]
    if seconds is None:
        for place in paths:
            refuses(place, "found more audio than its header says; convert it to flac")
            assert audio_seconds(place) == 0
        return None
    assert [audio_seconds(place) for place in paths] == pytest.approx([seconds] * 2, abs=0.1)
    first, second = [load_audio(place) for place in paths]
    assert torch.equal(first, second) and len(first) / RATE == pytest.approx(seconds, abs=0.1)
    return first


def encode(wave, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, **options)
    return buffer.getvalue()


def encode_mp3(loudness):
    """An mp3 whose seconds are this loud, with a frame that counts the others, and without it."""
    wave = np.repeat(np.array(loudness), RATE) * noisy_tone(len(loudness))
    content = encode(wave, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    return content, content[content.index(content[:2], 3) :]


@pytest.mark.parametrize("loudness", [[1, 0, 0, 0], [0, 0, 0, 1]])
def test_an_mp3_without_a_count_is_read_to_its_end(tmp_path, loudness):
    content, uncounted = encode_mp3(loudness)
    wave = write_odd(tmp_path / "x.mp3", uncounted, 4.1)
    expected = write_odd(tmp_path / "counted.mp3", content, 4.0)
    delayed = wave[1105:][: len(expected)]  # LAME's delay and the decoder's
    assert (delayed - expected[: len(delayed)])[2000:].abs().max() < 1e-4
    assert len(load_audio(tmp_path / "x.mp3", 3.5, 0.5)) == 8000
    write_odd(tmp_path / "x.mp3", uncounted + uncounted, 8.2)


def test_an_mp3_longer_than_its_count_is_refused(tmp_path):
    content, _ = encode_mp3([1, 0, 1, 0])
    at = content.index(b"Xing") + 8
    frames = int.from_bytes(content[at : at + 4], "big")
    write_odd(tmp_path / "x.mp3", content[:at] + struct.pack(">I", frames // 2) + content[at + 4 :])
    write_odd(tmp_path / "x.mp3", content + content)
    write_odd(tmp_path / "x.mp3", content + encode(np.zeros((RATE, 2)), format="MP3"))


@pytest.mark.parametrize(
    "before, after",
    [
        (b"ID3\x03\0\0\0\0\x4e\x10" + bytes(10000), b""),
        (b"", b"TAG" + bytes(125)),
        (b"", b"APETAGEX" + bytes(24) + np.random.default_rng(0).bytes(50000)),
        (b"", bytes(20000)),
    ],
)
def test_an_mp3_may_have_tags_and_padding(tmp_path, before, after):
    for content in encode_mp3([1, 0, 1, 0]):
        (tmp_path / "plain.mp3").write_bytes(content)
        wave = load_audio(tmp_path / "plain.mp3")
        tagged = write_odd(tmp_path / "x.mp3", before + content + after, len(wave) / RATE)
        assert torch.equal(tagged, wave)


@pytest.mark.parametrize("kind", ["OGG VORBIS", "OGG OPUS", "FLAC PCM_16", "AU PCM_16"])
def test_a_stream_behind_a_stream_is_refused(tmp_path, kind):
    kind, subtype = kind.split()
    long, short = (encode(noisy_tone(n), format=kind, subtype=subtype) for n in (1.0, 0.5))
    for content in (long + short, short + long, long + long):
        write_odd(tmp_path / "x", content)
    write_odd(tmp_path / "x", long + bytes(5000), 1.0)


def test_a_flac_of_unknown_length(tmp_path):
    wave = torch.from_numpy(noisy_tone(2.0))
    content = bytearray(encode(wave.numpy(), format="FLAC"))
    for unknown in (0, 2**36 - 1):
        # 36 bits, behind 28 of the rate, the channels and the bits of a sample.
        known = int.from_bytes(content[18:26], "big") >> 36 << 36
        content[18:26] = (known + unknown).to_bytes(8, "big")
        loaded = write_odd(tmp_path / "x.flac", content, 2.0)
        assert (loaded - wave).abs().max() <= 2**-15 and audio_seconds(tmp_path / "x.flac") == 2.0
        assert torch.equal(load_audio(tmp_path / "x.flac", 0.5, 1.0), loaded[8000:24000])


SIZES = [0, 2 * 10**9, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@pytest.mark.parametrize("kind", ["WAV PCM_16", "WAV FLOAT", "WAVEX PCM_24", "RF64 PCM_16"])
def test_a_streamed_wav_of_unknown_length(tmp_path, kind):
    kind, subtype = kind.split()
    wave = torch.from_numpy(noisy_tone(1.0))
    wave[-2000:] = 0  # silence at the end is no padding
    content = bytearray(encode(wave.numpy(), format=kind, subtype=subtype))
    at = content.index(b"ds64" if kind == "RF64" else b"data") + (16 if kind == "RF64" else 4)
    for size in SIZES[: 1 if kind == "RF64" else None]:
        content[at : at + 4] = struct.pack("<I", size)
        assert (write_odd(tmp_path / "x.wav", content, 1.0) - wave).abs().max() <= 2**-15


def test_what_stands_behind_the_samples_of_a_wav(tmp_path):
    content = encode(noisy_tone(1.0), format="WAV")
    at = content.index(b"data") + 4
    for chunk in (b"LIST\x20\x4e\0\0INFO" + bytes(range(1, 251)) * 80, bytes(20000)):
        wave = write_odd(tmp_path / "x.wav", content + chunk, 1.0)
        assert len(wave) == RATE
    empty = content[:at] + bytes(4) + b"LIST\x20\x4e\0\0INFO" + bytes(20000)
    (tmp_path / "x.wav").write_bytes(empty)
    refuses(tmp_path / "x.wav", "found no samples")
    for size in (100, 16000):  # the first of several blocks
        write_odd(tmp_path / "x.wav", content[:at] + struct.pack("<I", size) + content[at + 4 :])
    write_odd(tmp_path / "x.wav", content[:at] + struct.pack("<I", 100) + b"name" * 3000)


def test_opus_without_a_flag_of_its_end(tmp_path):
    content = bytearray(encode_opus(noisy_tone(1.505)))
    page = content.rindex(b"OggS")
    content[page + 5] &= ~4
    content[page + 22 : page + 26] = bytes(4)
    # Ogg's checksum is zlib's of bytes whose bits are turned round.
    turned = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    checksum = zlib.crc32(content[page:].translate(turned), 2**32 - 1) ^ (2**32 - 1)
    content[page + 22 : page + 26] = checksum.to_bytes(4, "big").translate(turned)
    write_odd(tmp_path / "x.opus", content, 1.5)


# ------------------------------------------------------------------------------
# Damage


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")  # opening it would wait for ever
    names = ["none.wav", "none\n\x1b[31m.wav", "", "pipe.wav", "nul\0.wav", "none.tar/a.wav", "."]
    for name in names:
        refuses(f"{tmp_path}/{name}", "no such file; correct the path")
        assert audio_seconds(f"{tmp_path}/{name}") == 0
    refuses("/dev/zero", "no such file")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.wav", b"", "found 0 bytes"),
        ("text.raw", b"A transcript.\n" * 20, "found content that starts with b'A transcript.."),
        (
            "page.mp3",
            b"<!DOCTYPE html><html>404",
            "found content that starts with b'<!DOCTYPE html><'",
        ),
        ("x.m4a", b"\0\0\0\x1cftypM4A " + bytes(900), "found content that starts with .*ftypM4A"),
        ("x.webm", b"\x1aE\xdf\xa3\x9f" + bytes(900), "found content that starts with"),
        ("noise.flac", bytes(range(256)) * 40, "found content that starts with"),
        ("header.wav", b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00", "found content that starts with"),
    ],
)
def test_what_is_no_audio_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    remedy = "expected audio such as wav, flac, ogg; copy .* again, or convert it to flac"
    refuses(tmp_path / name, f"{name}: {message}.*, {remedy}")


def test_too_few_samples_are_refused(tmp_path):
    path = tmp_path / "x.wav"
    for samples, message in ((0, "no samples"), (80, "5.0 ms of audio"), (559, "34.9 ms of audio")):
        soundfile.write(path, np.zeros(samples), RATE)
        refuses(path, f"found {message}, expected at least 35 ms; leave .* out")
    for samples, rate in ((560, 16000), (1679, 48000)):
        soundfile.write(path, np.zeros(samples), rate)
        assert len(load_audio(path)) == 560


def test_nan_and_inf_are_refused(tmp_path):
    x = noisy_tone(1.0)
    x[4000:4010] = np.nan
    x[9000] = np.inf
    soundfile.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT")
    refuses(tmp_path / "x.wav", "found NaN or inf, expected finite samples; export it")


def test_impossible_rates_are_refused(tmp_path):
    for rate in (10, 400000):
        soundfile.write(tmp_path / "x.wav", np.zeros(1000), rate)
        refuses(tmp_path / "x.wav", f"found {rate} Hz, expected 1000 to 200000 Hz; convert it")


@pytest.mark.parametrize(
    "name, share, message",
    [
        ("x.wav", 0.5, "found 2.00 s of audio, expected 4.00 s by its header or the manifest"),
        ("x.mp3", 0.5, r"found (1\.[89]|2\.0)\d s of audio, expected 4.00 s"),
        ("x.flac", 0.6, "copy or download it again"),
        ("x.aiff", 0.5, "found 2.00 s of audio, expected 4.00 s"),
        ("x.au", 0.5, "found 2.00 s of audio, expected 4.00 s"),
        ("x.w64", 0.5, "found 2.00 s of audio, expected 4.00 s"),
        ("x.rf64", 0.5, "found 2.00 s of audio, expected 4.00 s"),
    ],
)
def test_cut_files_are_refused(tmp_path, name, share, message):
    write_tone(tmp_path / name, 4.0)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    refuses(tmp_path / name, message)


def test_a_damaged_middle_is_refused(tmp_path):
    write_tone(tmp_path / "x.ogg", 4.0)
    content = (tmp_path / "x.ogg").read_bytes()
    middle = len(content) // 2
    content = content[:middle] + bytes(600) + content[middle + 600 :]
    (tmp_path / "x.ogg").write_bytes(content)
    refuses(tmp_path / "x.ogg", r"found 3.\d\d s of audio, expected 4.00 s")


def test_a_vorbis_file_in_which_libsndfile_dies_on_seeking(tmp_path):
    path = tmp_path / "x.ogg"
    write_tone(path, 1.0, format="OGG", subtype="VORBIS")
    content = path.read_bytes()
    pages = [at for at in range(len(content)) if content[at : at + 4] == b"OggS"]
    for page in pages[2:]:  # behind the headers, no packet is left that can be decoded
        content = content[: page + 30] + bytes(200) + content[page + 230 :]
    path.write_bytes(content)
    refuses(path, "x.ogg: found", 0.5, 0.1)


def test_a_codec_that_cannot_seek(tmp_path):
    write_tone(tmp_path / "x.wav", subtype="GSM610")
    assert len(load_audio(tmp_path / "x.wav")) >= 15900
    refuses(tmp_path / "x.wav", "copy or download it again, or convert it to flac", 0.5)


# ------------------------------------------------------------------------------
# Windows


def speech_with_pauses(seconds, every, seed=0, loudness=0.01):
    """Noise (N,) that gets fainter for 0.3 s at every so many seconds, and those times."""
    noise = np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE))
    wave = torch.from_numpy(noise.astype("float32"))
    pauses = np.arange(every, seconds, every)
    for time in pauses:
        wave[int((time - 0.15) * RATE) : int((time + 0.15) * RATE)] *= loudness
    return wave, pauses


def test_windows_are_the_wave_cut_at_its_pauses():
    wave, pauses = speech_with_pauses(100, 7.0)
    windows = cut_windows(wave, 30)
    assert torch.equal(torch.cat(windows), wave) and len(windows) <= 7
    assert all(7.5 * RATE <= len(window) <= 30 * RATE for window in windows)
    ends = np.cumsum([len(window) for window in windows])[:-1] / RATE
    assert all(np.abs(pauses - end).min() < 0.06 for end in ends)


def test_windows_end_at_a_slight_pause():
    ends = []
    for seed in range(10):
        wave, _ = speech_with_pauses(32, 22.0, seed, 0.8)
        ends.append(len(cut_windows(wave, 30)[0]) / RATE)
    assert sum(abs(end - 22.0) < 0.1 for end in ends) >= 8


@pytest.mark.parametrize("seconds", [0.04, 0.3, 0.5, 1.015, 29.99, 30.0, 30.01, 31, 45.3, 61, 300])
def test_windows_of_any_length(seconds):
    wave = torch.randn(round(seconds * RATE))
    windows = cut_windows(wave)
    joined = torch.cat(windows)
    assert torch.equal(joined[: len(wave)], wave) and not joined[len(wave) :].any()
    assert all(8000 <= len(window) <= 480000 for window in windows)
    features, _ = data.fbank(windows)
    assert features.isfinite().all()
    single = cut_windows(wave, math.inf)
    assert data.fbank(single)[1] == [data.feature_length(seconds, EncoderConfig())]


def test_parts_of_vorbis_files(tmp_path):
    """libsndfile goes to wrong places in them."""
    time = np.arange(16000 * 3) / 16000
    wave = 0.4 * np.sin(2 * np.pi * (200 + 300 * time) * time)
    wave[:4000] = 0  # it does not begin to sound
    for rate, name in ((16000, "a.ogg"), (44100, "b.ogg")):
        with soundfile.SoundFile(tmp_path / name, "w", rate, 1, "VORBIS", format="OGG") as file:
            file.write(np.resize(wave, 3 * rate))
        complete = load_audio(tmp_path / name)
        for start in (0.1, 0.3, 0.5, 1.0, 1.6, 2.5):
            part = load_audio(tmp_path / name, start, 0.25)
            expected = complete[round(16000 * start) :][:4000]
            # A part at another rate is resampled by itself, which its ends show.
            middle = slice(200, 3800)
            assert torch.allclose(part[middle], expected[middle], atol=1e-3), (name, start)


def test_an_mp3_whose_header_has_no_count(tmp_path):
    wave = 0.3 * np.sin(np.arange(32000) / 5)
    soundfile.write(tmp_path / "a.mp3", wave, 16000)
    content = (tmp_path / "a.mp3").read_bytes()
    place = max(content.find(b"Xing"), content.find(b"Info"))
    assert place > 0 and content[place + 7] & 1
    (tmp_path / "b.mp3").write_bytes(content[: place + 7] + b"\0" + content[place + 8 :])
    assert abs(audio_seconds(tmp_path / "b.mp3") - 2) < 0.2
    assert abs(len(load_audio(tmp_path / "b.mp3")) - 32000) < 3200
