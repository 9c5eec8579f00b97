"""What goes into the model: audio files to 16 kHz waveforms and filterbank features, text, and batches of both."""

import math
import re
from functools import lru_cache

import soundfile
import torch

SAMPLE_RATE = 16000
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms windows every 10 ms
MIN_SAMPLES = WINDOW + HOP  # two windows make one 20 ms output frame


class AudioError(ValueError):
    """Audio that cannot be used; the message names what was found, what was expected and the remedy."""


# -----------------------------------------------------------------------------
# audio files

def load_audio(path):
    """Read one audio file as a mono 16 kHz waveform.

    path: any file libsndfile decodes (wav, flac, ogg vorbis, opus, mp3, aiff, sphere, ...), sampled at 1 to 200 kHz.
    Returns a (N,) float32 tensor, full scale at +-1. Channels are averaged. For n samples at another rate
    N = ceil(n * 16000 / rate), and sample k is the sound at k / 16000 s (no delay); 16 kHz files come back untouched.

    Resampling is a Kaiser-windowed sinc whose stopband starts at the lower of the two Nyquist frequencies:
    flat within 0.01 dB up to 0.92 of it, aliases and images below -100 dB.

    Raises AudioError for a file that cannot be opened or decoded, holds no samples, NaN or inf, is shorter than 35 ms,
    or delivers less than its header promises (more than 0.1 s less: mp3 headers also count the decoder delay).
    A cut ogg promises nothing and comes back short.
    """
    name = repr(str(path))
    try:
        file = open(path, "rb")
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: {error.args[-1]}, expected an audio file; correct the path") from error
    with file:
        try:
            # by descriptor, so that libsndfile judges the content and never the name
            with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                rate, promised, log = sound.samplerate, sound.frames, sound.extra_info
                size = 2**24 // sound.channels  # samples at a time, so that memory stays near that of the mono result
                blocks = []
                while True:
                    block = torch.from_numpy(sound.read(size, dtype="float32", always_2d=True))  # (n, channels)
                    blocks.append(block.mean(1))
                    if len(block) < size:  # the end, or a damaged place: libsndfile would go on at a wrong one
                        break
        except soundfile.SoundFileError as error:
            file.seek(0)
            head = file.read(16)
            found = f"content that cannot be decoded (it starts with {head})" if head else "0 bytes"
            raise AudioError(f"{name}: found {found}, expected intact audio such as wav, flac, ogg or mp3; "
                             "copy or download it again, or convert it to flac") from error

    wave = torch.cat(blocks)  # (n,)
    if not len(wave):
        raise AudioError(f"{name}: found no samples, expected at least 35 ms; leave the file out")
    if not 1000 <= rate <= 200000:
        raise AudioError(f"{name}: found a sample rate of {rate} Hz, expected 1000 to 200000; convert it to 16000 Hz")
    # libsndfile shows only in its log that a wav was cut; sizes near 2^31 and 2^32 are a stream's, of unknown length
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", log)
    if cut and int(cut[1]) < 2**31 - 2**16:
        promised = promised * int(cut[1]) // int(cut[2])
    if promised - len(wave) > rate // 10:
        raise AudioError(f"{name}: found {len(wave) / rate:.2f} s of audio, expected the {promised / rate:.2f} s its "
                         "header promises; the file is cut or damaged, copy or download it again")
    finite = wave.isfinite()
    if not finite.all():
        raise AudioError(f"{name}: found {int((~finite).sum())} NaN or inf samples, the first at "
                         f"{int(finite.int().argmin()) / rate:.3f} s, expected finite ones; export it again")
    if rate != SAMPLE_RATE:
        wave = _resample(wave, rate)
    if len(wave) < MIN_SAMPLES:
        raise AudioError(f"{name}: found {1000 * len(wave) / SAMPLE_RATE:.1f} ms of audio, expected at least 35 ms "
                         "(two 25 ms windows, 10 ms apart); leave the file out")
    return wave


OUTPUTS = 80  # output samples computed together from one slice of the input


@torch.no_grad()
def _resample(wave, rate):
    # The filter's phases repeat every `period` outputs; 80 neighbouring outputs share one slice of the input.
    kernels, width, period = _resample_kernels(rate)  # (groups, span, 80)
    groups, span, _ = kernels.shape
    step = period * rate // SAMPLE_RATE  # input samples per period
    length = math.ceil(len(wave) * SAMPLE_RATE / rate)
    periods = math.ceil(length / period)
    wave = torch.nn.functional.pad(wave, (width, periods * step + span - len(wave)))
    out = wave.new_empty(periods, groups, OUTPUTS)
    for group in range(groups):
        slices = wave[group * OUTPUTS * rate // SAMPLE_RATE :].unfold(0, span, step)[:periods]  # (periods, span)
        for i in range(0, periods, 256):  # few enough to stay in cache
            torch.mm(slices[i : i + 256], kernels[group], out=out[i : i + 256, group])  # (256, 80)
    return out.view(-1)[:length]


@lru_cache(maxsize=8)
def _resample_kernels(rate):
    # Kaiser's formulas (Oppenheim & Schafer, Discrete-Time Signal Processing, 7.5.3) for a 100 dB stopband and a
    # transition from 0.92 to 1.0 of the lower Nyquist frequency, all in input samples.
    lower = min(rate, SAMPLE_RATE)
    beta = 0.1102 * (100 - 8.7)
    width = math.ceil((100 - 7.95) / (2.285 * 0.08 * math.pi) / 2 * rate / lower)  # half of the filter
    cutoff = 0.96 * lower / rate
    period = math.lcm(SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE), OUTPUTS)
    span = math.ceil(OUTPUTS * rate / SAMPLE_RATE) + 2 * width + 1
    kernels = torch.empty(period // OUTPUTS, span, OUTPUTS)
    for group, kernel in enumerate(kernels):
        outputs = group * OUTPUTS + torch.arange(OUTPUTS)  # (80,)
        inputs = group * OUTPUTS * rate // SAMPLE_RATE - width + torch.arange(span)[:, None]  # (span, 1)
        t = (inputs * SAMPLE_RATE - outputs * rate).double() / SAMPLE_RATE  # (span, 80)
        window = torch.special.i0(beta * (1 - (t / width) ** 2).clamp(min=0).sqrt()) * (t.abs() <= width)
        kernel.copy_(cutoff * torch.sinc(cutoff * t) * window)
    kernels /= torch.special.i0(torch.tensor(beta))
    return kernels, width, period


# -----------------------------------------------------------------------------
# features

@torch.no_grad()
def fbank(waves):
    """Log-mel filterbank features of 16 kHz waveforms: the Kaldi fbank as in SeamlessM4TFeatureExtractor.

    waves: list of (N,) float tensors on one device, N >= 560 samples (35 ms), full scale at +-1.
    Returns features (B, F, 160) float32, one row per wave, padded on the right with zeros, and lengths (B,) int64.
    A 10 ms frame is 80 log-mel energies, each bin with zero mean and unit variance over its wave; two of them make one
    20 ms output frame, so lengths = (1 + (N - 400) // 160) // 2. An odd last 10 ms frame only counts for the mean and
    variance. Raises AudioError (a ValueError) for a wave that is too short, not 1-d or not floating point.
    """
    for i, wave in enumerate(waves):
        if wave.ndim != 1 or not wave.is_floating_point() or len(wave) < MIN_SAMPLES:
            raise AudioError(f"wave {i}: found {tuple(wave.shape)} {wave.dtype}, expected (N,) floating point samples, "
                             "N >= 560 (35 ms at 16 kHz); load it with load_audio")
    device = waves[0].device
    window, mel = _fbank_constants(device)

    # all waves in one line, each starting on a whole hop; the few frames that cross a seam are computed and not used
    hops = [math.ceil(len(wave) / HOP) for wave in waves]
    starts = [sum(hops[:i]) for i in range(len(waves))]
    line = torch.zeros(sum(hops) * HOP + FFT, dtype=torch.float32, device=device)
    for wave, start in zip(waves, starts):
        line[start * HOP : start * HOP + len(wave)] = wave

    energies = torch.empty(sum(hops), 80, dtype=mel.dtype, device=device)
    size = 128 if device.type == "cpu" else 16384  # frames at a time; few enough to stay in the CPU's cache
    for i in range(0, len(energies), size):
        out = energies[i : i + size]
        _mel_energies(line[i * HOP : (i + len(out) - 1) * HOP + FFT + 1], window, mel, out)
    energies.clamp_(min=1.192092955078125e-07).log_()

    frames = [1 + (len(wave) - WINDOW) // HOP for wave in waves]
    lengths = [n // 2 for n in frames]
    features = torch.zeros(len(waves), max(lengths), 160, dtype=torch.float32, device=device)
    for row, start, n, length in zip(features, starts, frames, lengths):
        x = energies[start : start + n].double()  # (n, 80)
        x = x - x.mean(0)
        x = x / (x.square().sum(0) / (n - 1) + 1e-7).sqrt()
        row[:length] = x[: 2 * length].view(length, 160)
    return features, torch.tensor(lengths, device=device)


def _mel_energies(x, window, mel, out):
    # x: the samples of n frames and one before them; float64, as near-empty bins drown in the rounding of a float32 FFT
    x = x.double()
    means = x.unfold(0, WINDOW, HOP).mean(1, keepdim=True)  # (n, 1)
    # a frame's mean m, had it been removed before the pre-emphasis, would have taken 0.03 m off every sample
    frames = (x[1:] - 0.97 * x[:-1]).unfold(0, FFT, HOP) - 0.03 * means  # (n, 512)
    frames *= window
    power = torch.view_as_real(torch.fft.rfft(frames)).square_()  # (n, 257, 2)
    torch.mm((power[..., 0] + power[..., 1]).to(mel.dtype), mel, out=out)  # (n, 80); out= also keeps autocast away


@lru_cache
def _fbank_constants(device):
    # The Povey window at 16-bit scale, as in Kaldi, without its first sample, which is 0, and padded to the FFT.
    window = 2**15 * torch.hann_window(WINDOW, periodic=False, dtype=torch.float64)[1:] ** 0.85  # (399,)
    window = torch.nn.functional.pad(window, (0, FFT - len(window)))  # (512,)
    # mel filters: triangles over the FFT bins, straight on the mel scale
    edges = torch.linspace(_mel(20), _mel(8000), 82, dtype=torch.float64)
    bins = torch.tensor([_mel(i * SAMPLE_RATE / FFT) for i in range(FFT // 2 + 1)], dtype=torch.float64)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    mel = torch.minimum(rise, fall).clamp(min=0)  # (257, 80)
    # float32 is faster on CPU; on a GPU it would be rounded to TF32 where the trainer allows that
    return window.to(device), mel.to(device, torch.float32 if device.type == "cpu" else torch.float64)


def _mel(hertz):
    return 1127 * math.log(1 + hertz / 700)
