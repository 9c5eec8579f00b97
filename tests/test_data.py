"""data.py: audio files of every kind and state, the resampler's quality, and the features against SeamlessM4T's."""

import struct

import numpy as np
import pytest
import soundfile
import torch
from transformers import SeamlessM4TFeatureExtractor

from data import AudioError, fbank, load_audio

RATE = 16000


def speech_like(seconds, seed=0, level=0.1, noise=1e-3, lowcut=0.0):
    """Syllables of gliding harmonics over a noise floor; lowcut (Hz) empties the mel bins below it."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * t + seed) + 20 * np.sin(2 * np.pi * 2.3 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 40))
    syllables = np.sin(np.pi * 3.1 * t) ** 2 * (1 + 0.5 * np.sin(2 * np.pi * 0.37 * t))
    x = level * (voice * syllables + noise * rng.standard_normal(len(t)))
    spectrum = np.fft.rfft(x)
    spectrum[: round(lowcut * seconds)] = 0
    return torch.from_numpy(np.fft.irfft(spectrum, len(x))).float()


# -----------------------------------------------------------------------------
# features

@pytest.fixture(scope="module")
def extractor():
    return SeamlessM4TFeatureExtractor()


def reference(extractor, waves):
    out = extractor([wave.numpy() for wave in waves], sampling_rate=RATE, return_tensors="pt")
    return out.input_features, out.attention_mask.sum(1)


# 0.115 s, 0.125 s, ... have an odd number of 10 ms frames
@pytest.mark.parametrize("seconds", [0.035, 0.1, 0.115, 0.125, 0.33, 0.5, 1.0, 2.005, 3.3337, 7.015, 10.0, 31.2, 60.0])
def test_fbank_is_the_extractors(extractor, seconds):
    waves = [
        speech_like(seconds, seed=1),
        speech_like(seconds, seed=2, level=1.0, noise=1e-2),
        speech_like(seconds, seed=3, level=1e-3, noise=1e-2),
        speech_like(seconds, seed=4, lowcut=400),
        (speech_like(seconds, seed=5, level=0.02) * 2**15).round() / 2**15,
        (100 * speech_like(seconds, seed=6)).clamp(-1, 1),
        speech_like(seconds, seed=8) * (torch.arange(round(seconds * RATE)) % 4000 < 2500),  # with digital silence
        0.1 * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(7)),
    ]
    for wave in waves:
        features, lengths = fbank([wave])
        expected, expected_lengths = reference(extractor, [wave])
        assert lengths == expected_lengths.tolist() == [(1 + (len(wave) - 400) // 160) // 2]
        assert features.shape == (lengths[0], 160) and features.dtype == torch.float32
        # over two frames a standard deviation can be anything, and a tiny one magnifies the peer's rounding
        tolerance = 1e-4 if seconds > 0.035 else 1e-3
        torch.testing.assert_close(features, expected[0, : lengths[0]], rtol=0, atol=tolerance)


def test_fbank_of_a_batch(extractor):
    durations = [1.0, 0.1, 4.567, 2.005, 0.0449, 3.0, 0.125, 4.57]
    waves = [speech_like(seconds, seed=i) for i, seconds in enumerate(durations)]
    features, lengths = fbank(waves)
    expected, expected_lengths = reference(extractor, waves)
    assert features.shape == (sum(lengths), 160) and lengths == expected_lengths.tolist()
    for wave, row, theirs in zip(waves, features.split(lengths), expected):
        torch.testing.assert_close(row, theirs[:len(row)], rtol=0, atol=1e-4)
        alone, alone_length = fbank([wave])
        assert alone_length == [len(row)]
        torch.testing.assert_close(alone, row, rtol=0, atol=1e-6)


def test_fbank_is_normalised_over_all_frames():
    wave = speech_like(3.015)  # 300 frames of 10 ms
    frames = fbank([wave])[0].view(-1, 80)
    torch.testing.assert_close(frames.mean(0), torch.zeros(80), rtol=0, atol=1e-5)
    torch.testing.assert_close(frames.std(0), torch.ones(80), rtol=0, atol=1e-5)
    # the odd frame is not in the output, but counts
    longer = fbank([torch.cat([wave, torch.randn(160, generator=torch.Generator().manual_seed(0))])])[0]
    assert longer.shape == (150, 160)
    assert (longer.view(-1, 80)[:300].mean(0).abs() > 1e-4).all()


def test_fbank_of_digital_silence_is_finite_and_zero():
    features, lengths = fbank([torch.zeros(RATE), torch.zeros(2 * RATE)])
    assert lengths == [49, 99]
    assert features.abs().max() < 1e-6


def test_fbank_under_autocast_and_grad():
    wave = speech_like(1.0)
    expected, _ = fbank([wave])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fbank([wave])[0], expected)
    assert torch.equal(fbank([wave.requires_grad_()])[0], expected)
    assert torch.equal(fbank([wave.detach().double()])[0], expected)


def test_fbank_on_meta():
    features, lengths = fbank([torch.empty(16000, device="meta"), torch.empty(32160, device="meta")])
    assert features.shape == (148, 160) and features.is_meta and lengths == [49, 99]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fbank_on_cuda():
    waves = [speech_like(seconds, seed=3) for seconds in (0.1, 3.015, 60.0)]
    expected, lengths = fbank(waves)
    torch.backends.cuda.matmul.allow_tf32 = True
    features, cuda_lengths = fbank([wave.cuda() for wave in waves])
    torch.backends.cuda.matmul.allow_tf32 = False
    assert features.is_cuda and cuda_lengths == lengths
    torch.testing.assert_close(features.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad, found", [
    (torch.zeros(559), r"\(559,\) torch.float32"),
    (torch.zeros(2, RATE), r"\(2, 16000\) torch.float32"),
    (torch.zeros(RATE, dtype=torch.int16), r"\(16000,\) torch.int16"),
])
def test_fbank_refuses(bad, found):
    with pytest.raises(AudioError, match=rf"wave 1: found {found}, expected \(N,\) floating point samples, N >= 560"):
        fbank([torch.zeros(RATE), bad])


# -----------------------------------------------------------------------------
# resampling

@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44099, 44100, 48000, 192000])
def test_resampling_by_sine_sweep(tmp_path, rate):
    nyquist = min(rate, RATE) / 2
    passband = np.append(np.linspace(0.01, 0.92, 10), 0.5 * np.sqrt(2)) * nyquist
    transition = np.array([0.94, 0.97, 0.99]) * nyquist
    stopband = np.append(nyquist * np.linspace(1.0, 1.1, 6), np.linspace(1.15 * nyquist, 0.49 * rate, 7))
    times = np.arange(2 * rate) / rate
    for frequency in np.concatenate([passband, transition, stopband[stopband < rate / 2]]):
        soundfile.write(tmp_path / "sine.wav", np.sin(2 * np.pi * frequency * times + 0.3), rate, subtype="FLOAT")
        out = load_audio(tmp_path / "sine.wav").double()
        assert out.shape == (2 * RATE,)
        inner = slice(400, -400)  # away from the edges, where the sine begins and ends
        out, k = out[inner], torch.arange(2 * RATE, dtype=torch.float64)[inner]
        if frequency >= nyquist:
            assert out.abs().max() < 1e-5, frequency  # -100 dB
            continue
        angle = 2 * np.pi * frequency * k / RATE
        basis = torch.stack([torch.sin(angle + 0.3), torch.cos(angle + 0.3)], 1)
        gain = torch.linalg.lstsq(basis, out[:, None]).solution
        assert (out - (basis @ gain)[:, 0]).abs().max() < 1e-5, frequency  # whatever is not this sine: images
        if frequency <= 0.921 * nyquist:
            assert abs(20 * np.log10(gain[0].item())) < 0.01, frequency
            assert (out - basis[:, 0]).abs().max() < 3e-5, frequency  # in time, too: no delay


@pytest.mark.parametrize("rate", [8000, 11025, 15999, 22050, 44100, 48000])
def test_resampled_length(tmp_path, rate):
    for samples in (rate // 10, rate // 10 + 1, rate // 7 + 2, rate + 1):
        soundfile.write(tmp_path / "x.wav", np.full(samples, 0.25), rate, subtype="FLOAT")
        out = load_audio(tmp_path / "x.wav")
        assert len(out) == -(-samples * RATE // rate)
        assert (out[200:-200] - 0.25).abs().max() < 1e-5


def test_resampling_a_click_keeps_its_time(tmp_path):
    x = np.zeros(48000)
    x[[30000, 47997]] = 1
    soundfile.write(tmp_path / "click.wav", x, 48000, subtype="FLOAT")
    out = load_audio(tmp_path / "click.wav")
    assert set(out.topk(2).indices.tolist()) == {10000, 15999}
    torch.testing.assert_close(out[9900:10000], out[10001:10101].flip(0), rtol=0, atol=1e-7)


# -----------------------------------------------------------------------------
# files

@pytest.mark.parametrize("extension, subtype, tolerance", [
    ("wav", "PCM_16", 2**-15), ("wav", "PCM_24", 2**-23), ("wav", "PCM_U8", 2**-7), ("wav", "FLOAT", 0),
    ("flac", "PCM_16", 2**-15), ("flac", "PCM_24", 2**-23), ("aiff", "PCM_16", 2**-15), ("w64", "DOUBLE", 0),
    ("ogg", "VORBIS", 0.1), ("ogg", "OPUS", 0.1), ("mp3", "MPEG_LAYER_III", 0.1),
])
def test_formats(tmp_path, extension, subtype, tolerance):
    x = speech_like(2.0, level=0.2)
    path = tmp_path / f"Grüße an {subtype}.{extension}"
    soundfile.write(path, x.numpy(), RATE, subtype=subtype)
    wave = load_audio(path)
    assert wave.dtype == torch.float32 and wave.shape == x.shape
    assert (wave - x).abs().max() <= tolerance
    assert torch.equal(load_audio(str(path)), wave)


def test_the_name_does_not_matter(tmp_path):
    x = speech_like(0.5)
    soundfile.write(tmp_path / "x.wav", x.numpy(), RATE, subtype="FLOAT")
    for name in ("x.raw", "x.mp3", "x"):
        (tmp_path / name).write_bytes((tmp_path / "x.wav").read_bytes())
        assert torch.equal(load_audio(tmp_path / name), x)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_channels_are_averaged(tmp_path, rate):
    x = np.stack([speech_like(1.0, seed=i).numpy() for i in range(3)], 1)  # (16000, 3)
    soundfile.write(tmp_path / "three.wav", x, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", x.mean(1), rate, subtype="FLOAT")
    torch.testing.assert_close(load_audio(tmp_path / "three.wav"), load_audio(tmp_path / "mono.wav"), rtol=0, atol=1e-6)


def test_a_file_longer_than_one_read(tmp_path):
    x = np.random.default_rng(0).integers(-(2**15), 2**15, (2**23 + 12345, 2), dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", x, RATE)
    assert torch.equal(load_audio(tmp_path / "long.wav"), torch.from_numpy(x).float().mean(1) / 2**15)


def test_a_streamed_wav_of_unknown_length_loads(tmp_path):
    x = speech_like(1.0)
    path = tmp_path / "stream.wav"
    soundfile.write(path, x.numpy(), RATE, subtype="PCM_16")
    header = bytearray(path.read_bytes())
    at = header.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000):
        header[at : at + 4] = struct.pack("<I", size)
        path.write_bytes(header)
        assert len(load_audio(path)) == len(x)


def damaged(tmp_path, name, **options):
    """A 4 s file with a name, and its bytes."""
    soundfile.write(tmp_path / name, speech_like(4.0, noise=0.1).numpy(), RATE, **options)
    return tmp_path / name, (tmp_path / name).read_bytes()


def refuses(path, message):
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(path)
    assert isinstance(caught.value, ValueError)
    assert repr(str(path)) in str(caught.value)
    assert str(caught.value).isprintable()


def test_refuses_missing_directory_and_impossible_paths(tmp_path):
    refuses(tmp_path / "none.wav", "No such file or directory, expected an audio file; correct the path")
    refuses(tmp_path / "none\n\x1b[31m.wav", "No such file or directory")
    refuses(tmp_path, "Is a directory")
    refuses(str(tmp_path / "nul\0.wav"), "null byte")


@pytest.mark.parametrize("name, content, found", [
    ("empty.wav", b"", "found 0 bytes"),
    ("text.wav", b"This is a transcript.\n" * 20, "content that cannot be decoded .it starts with b'This is a transc'"),
    ("text.raw", b"This is a transcript.\n" * 20, "content that cannot be decoded .it starts with b'This is a transc'"),
    ("page.mp3", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "it starts with b'<!DOCTYPE html><'"),
    ("noise.flac", bytes(range(256)) * 40, "cannot be decoded"),
    ("header.wav", b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00", "cannot be decoded"),
])
def test_refuses_what_is_not_audio(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, f"{found}.*, expected intact audio such as wav, flac, ogg or mp3; copy or download it")


def test_refuses_no_samples_and_too_few(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, np.zeros(0), RATE)
    refuses(path, "found no samples, expected at least 35 ms; leave the file out")
    soundfile.write(path, np.zeros(80), RATE)
    refuses(path, "found 5.0 ms of audio, expected at least 35 ms .two 25 ms windows, 10 ms apart.; leave the file out")
    soundfile.write(path, np.zeros(559), RATE)
    refuses(path, "found 34.9 ms")
    soundfile.write(path, np.zeros(560), RATE)
    assert len(load_audio(path)) == 560
    soundfile.write(path, np.zeros(1679), 48000)
    assert len(load_audio(path)) == 560


def test_refuses_nan_and_inf(tmp_path):
    x = speech_like(1.0).numpy()
    x[4000:4010] = np.nan
    x[9000] = np.inf
    soundfile.write(tmp_path / "x.wav", x, RATE, subtype="FLOAT")
    refuses(tmp_path / "x.wav", "found 11 NaN or inf samples, the first at 0.250 s, expected finite ones; export it")


def test_refuses_impossible_rates(tmp_path):
    for rate in (10, 400000):
        soundfile.write(tmp_path / "x.wav", np.zeros(1000), rate)
        refuses(tmp_path / "x.wav", f"found a sample rate of {rate} Hz, expected 1000 to 200000; convert it")


def test_refuses_cut_files(tmp_path):
    path, content = damaged(tmp_path, "cut.wav")
    path.write_bytes(content[: len(content) // 2])
    refuses(path, "found 2.00 s of audio, expected the 4.00 s its header promises; the file is cut or damaged, copy")
    path, content = damaged(tmp_path, "cut.mp3")
    path.write_bytes(content[: len(content) // 2])
    refuses(path, r"found (1\.[89]|2\.0)\d s of audio, expected the 4.00 s its header promises")
    path, content = damaged(tmp_path, "cut.flac")
    path.write_bytes(content[: len(content) * 6 // 10])
    refuses(path, "cannot be decoded .it starts with b'fLaC")


def test_refuses_a_damaged_middle(tmp_path):
    path, content = damaged(tmp_path, "damaged.ogg")
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(600) + content[middle + 600 :])
    refuses(path, r"found 3.\d\d s of audio, expected the 4.00 s its header promises")
