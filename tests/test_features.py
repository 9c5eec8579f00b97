"""data.fbank against the SeamlessM4TFeatureExtractor of transformers."""

import numpy as np
import pytest
import torch
from transformers import SeamlessM4TFeatureExtractor

from conftest import refused
from data import AudioError, fbank

RATE = 16000


@pytest.fixture(scope="module")
def extractor():
    return SeamlessM4TFeatureExtractor()


def speech_like(seconds, seed=0, level=0.1, noise=1e-3, lowcut=0.0):
    """Syllables of gliding harmonics over a noise floor (N,); lowcut (Hz) empties the mel bins
    below it."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * time + seed) + 20 * np.sin(2 * np.pi * 2.3 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 40))
    syllables = np.sin(np.pi * 3.1 * time) ** 2 * (1 + 0.5 * np.sin(2 * np.pi * 0.37 * time))
    x = level * (voice * syllables + noise * rng.standard_normal(len(time)))
    spectrum = np.fft.rfft(x)
    spectrum[: round(lowcut * seconds)] = 0
    return torch.from_numpy(np.fft.irfft(spectrum, len(x))).float()


def kinds_of_waves(seconds):
    """Waves of one length: quiet, loud, without low frequencies, of 16 bits, clipped, with digital
    silence, and white noise."""
    time = torch.arange(round(seconds * RATE))
    generator = torch.Generator().manual_seed(7)
    return [
        speech_like(seconds, seed=1),
        speech_like(seconds, seed=2, level=1.0, noise=1e-2),
        speech_like(seconds, seed=3, level=1e-3, noise=1e-2),
        speech_like(seconds, seed=4, lowcut=400),
        (speech_like(seconds, seed=5, level=0.02) * 2**15).round() / 2**15,
        (100 * speech_like(seconds, seed=6)).clamp(-1, 1),
        speech_like(seconds, seed=8) * (time % 4000 < 2500),
        0.1 * torch.randn(len(time), generator=generator),
    ]


# 0.115 s, 0.125 s, 2.005 s and 7.015 s have an odd number of 10 ms frames.
LENGTHS = [0.035, 0.1, 0.115, 0.125, 0.33, 0.5, 1.0, 2.005, 3.3337, 7.015, 11.2]


@pytest.mark.parametrize("seconds", LENGTHS)
def test_fbank_is_the_extractors(extractor, seconds):
    # Over two frames a standard deviation can be tiny, which magnifies the peer's rounding.
    tolerance = 1e-4 if seconds > 0.035 else 1e-3
    for wave in kinds_of_waves(seconds):
        features, lengths = fbank([wave])
        out = extractor([wave.numpy()], sampling_rate=RATE, return_tensors="pt")
        assert (
            lengths == out.attention_mask.sum(1).tolist() == [(1 + (len(wave) - 400) // 160) // 2]
        )
        assert features.shape == (lengths[0], 160) and features.dtype == torch.float32
        expected = out.input_features[0, : lengths[0]]
        torch.testing.assert_close(features, expected, rtol=0, atol=tolerance)


def test_fbank_of_a_batch(extractor):
    durations = [1.0, 0.1, 4.567, 2.005, 0.0449, 3.0, 0.125, 4.57]
    waves = [speech_like(seconds, seed=i) for i, seconds in enumerate(durations)]
    features, lengths = fbank(waves)
    out = extractor([wave.numpy() for wave in waves], sampling_rate=RATE, return_tensors="pt")
    assert lengths == out.attention_mask.sum(1).tolist() and features.shape == (sum(lengths), 160)
    parts = zip(waves, features.split(lengths), out.input_features, strict=True)
    for wave, ours, theirs in parts:
        torch.testing.assert_close(ours, theirs[: len(ours)], rtol=0, atol=1e-4)
        alone, alone_lengths = fbank([wave])
        assert alone_lengths == [len(ours)]
        torch.testing.assert_close(alone, ours, rtol=0, atol=1e-6)


def test_fbank_is_normalised_over_all_frames():
    wave = speech_like(3.015)  # 300 frames of 10 ms
    frames = fbank([wave])[0].view(-1, 80)
    torch.testing.assert_close(frames.mean(0), torch.zeros(80), rtol=0, atol=1e-5)
    torch.testing.assert_close(frames.std(0), torch.ones(80), rtol=0, atol=1e-5)
    # An odd last frame is not among the features, but counts in the mean.
    noise = torch.randn(160, generator=torch.Generator().manual_seed(0))
    longer = fbank([torch.cat([wave, noise])])[0]
    assert longer.shape == (150, 160)
    assert (longer.view(-1, 80).mean(0).abs() > 1e-4).all()


def test_fbank_of_digital_silence_is_zero():
    features, lengths = fbank([torch.zeros(RATE), torch.zeros(2 * RATE)])
    assert lengths == [49, 99] and features.abs().max() < 1e-6


def test_fbank_under_autocast_and_grad():
    wave = speech_like(1.0)
    expected, _ = fbank([wave])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fbank([wave])[0], expected)
    assert torch.equal(fbank([wave.requires_grad_()])[0], expected)
    assert torch.equal(fbank([wave.detach().double()])[0], expected)


def test_fbank_on_meta():
    waves = [torch.empty(16000, device="meta"), torch.empty(32160, device="meta")]
    features, lengths = fbank(waves)
    assert features.shape == (148, 160) and features.is_meta and lengths == [49, 99]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fbank_on_cuda(monkeypatch):
    waves = [speech_like(seconds, seed=3) for seconds in (0.1, 3.015, 60.0)]
    expected, lengths = fbank(waves)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    features, cuda_lengths = fbank([wave.cuda() for wave in waves])
    assert features.is_cuda and cuda_lengths == lengths
    torch.testing.assert_close(features.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wave, message",
    [
        (torch.zeros(559), r"\(559,\) torch.float32"),
        (torch.zeros(2, RATE), r"\(2, 16000\) torch.float32"),
        (torch.zeros(RATE, dtype=torch.int16), r"\(16000,\) torch.int16"),
    ],
)
def test_fbank_refuses(wave, message):
    expected = rf"wave 1: found {message}, expected \(N,\) float, N >= 560"
    refused(expected, fbank, [torch.zeros(RATE), wave], kind=AudioError)
