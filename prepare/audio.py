"""Audio files, or parts of them, to mono 16 kHz waveforms."""

import io
import math
import os
import re
from contextlib import contextmanager
from functools import lru_cache

import soundfile
import torch

from prepare.errors import AudioError
from prepare.paths import open_regular
from prepare.tars import tar_members

SAMPLE_RATE = 16000
MIN_SAMPLES = 560  # 35 ms: two windows of 25 ms, 10 ms apart, make one 20 ms frame
# Samples of a recording: so many may be read whatever the file's size; more only at so many a byte, which no codec's
# speech comes near, and never more than the last.
FEW_SAMPLES, DENSEST, MOST_SAMPLES = 2**26, 128, 2**30


def load_audio(path, start=0.0, duration=None):
    """Read one audio file, or `duration` seconds of it from `start`, as a mono 16 kHz waveform.

    path: any file libsndfile decodes (wav, flac, ogg vorbis, opus, mp3, aiff, sphere, ...), sampled at 1 to 200 kHz;
    SHARD.tar/MEMBER is a member of an uncompressed tar.
    Returns a (N,) float32 tensor, full scale at +-1. Channels are averaged. For n samples at another rate
    N = ceil(n * 16000 / rate), and sample k is the sound at k / 16000 s (no delay); 16 kHz files come back untouched.

    Resampling is a Kaiser-windowed sinc whose stopband starts at the lower of the two Nyquist frequencies:
    flat within 0.01 dB up to 0.92 of it, aliases and images below -100 dB.

    Raises AudioError for a file that cannot be opened or decoded, holds no samples, NaN or inf, is shorter than 35 ms
    or longer than 18 hours at 16 kHz, promises more samples than its bytes can hold,
    or delivers less than asked for or than its header promises (more than 0.1 s less: mp3 headers also count the
    decoder delay).
    A cut ogg promises nothing and comes back short.
    """
    name = repr(str(path))
    with open_sound(path) as sound:
        rate, first = sound.samplerate, round(start * sound.samplerate)
        if not 1000 <= rate <= 200000:
            raise AudioError(f"{name}: found a sample rate of {rate} Hz, expected 1000 to 200000; convert it to "
                             "16000 Hz")
        expected, left = _promised_samples(sound) - first, math.inf
        if duration is not None:
            expected = left = round(duration * rate)
        most = min(MOST_SAMPLES, max(FEW_SAMPLES, DENSEST * sound.bytes))
        if expected > most:
            raise AudioError(f"{name}: found {expected:,} samples to be read from {sound.bytes:,} bytes, expected at "
                             f"most {most:,}; its header or the duration is wrong, or it is to be cut into parts")
        size = 2**24 // sound.channels  # samples at a time, so that memory stays near that of the mono result
        blocks = [torch.empty(0)]
        at = min(first, max(0, sound.frames))
        # libsndfile crashes when it seeks in a Vorbis file that does not begin to sound; some codecs cannot seek at all
        if at and not (len(sound.read(1)) and sound.seek(at) == at):
            raise AudioError(f"{name}: found no way to go to {start:g} s of it, expected intact audio; copy or "
                             "download it again, or convert it to flac")
        while left > 0 and sound.frames > 0:
            block = torch.from_numpy(sound.read(min(size, left), dtype="float32", always_2d=True))  # (n, channels)
            blocks.append(block.mean(1))
            left -= len(block)
            if len(block) < size:  # the end, or a damaged place: libsndfile would go on at a wrong one
                break

    wave = torch.cat(blocks)  # (n,)
    if not len(wave):
        raise AudioError(f"{name}: found no samples, expected at least 35 ms; leave the file out")
    if expected - len(wave) > rate // 10:
        raise AudioError(f"{name}: found {len(wave) / rate:.2f} s of audio, expected the {expected / rate:.2f} s its "
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


def encode_opus(wave, **options):
    """The bytes of an ogg file of a 16 kHz wave (N,); options of soundfile.SoundFile."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, format="OGG", subtype="OPUS", **options) as file:
        for i in range(0, len(wave), SAMPLE_RATE):  # libsndfile crashes on minutes of audio in one call
            file.write(wave[i:i + SAMPLE_RATE])
    return buffer.getvalue()


def audio_seconds(path):
    """The length of an audio file by its header, in seconds; 0 if it cannot be read."""
    try:
        with open_sound(path) as sound:
            return _promised_samples(sound) / sound.samplerate
    except AudioError:
        return 0.0


@contextmanager
def open_sound(path):
    # The file or tar member as a soundfile.SoundFile; whatever goes wrong with it is an AudioError.
    name = repr(str(path))
    shard, tar, member = str(path).partition(".tar/")
    try:
        if tar:
            offset, size = _tar_members(shard + ".tar")[member]
        file = open_regular(shard + ".tar" if tar else path)
    except KeyError:
        raise AudioError(f"{name}: found no such member in the tar, expected an audio file; correct the path") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: {error.args[-1]}, expected an audio file; correct the path") from error
    with file:
        if tar:
            file.seek(offset)
            file = io.BytesIO(file.read(size))
        try:
            # by descriptor, so that libsndfile judges the content and never the name
            with soundfile.SoundFile(file if tar else file.fileno(), closefd=False) as sound:
                sound.bytes = size if tar else os.fstat(file.fileno()).st_size
                yield sound
        except soundfile.SoundFileError as error:
            file.seek(0)
            head = file.read(16)
            found = f"content that cannot be decoded (it starts with {head})" if head else "0 bytes"
            raise AudioError(f"{name}: found {found}, expected intact audio such as wav, flac, ogg or mp3; "
                             "copy or download it again, or convert it to flac") from error


@lru_cache(maxsize=64)
def _tar_members(shard):
    with open_regular(shard) as file:
        return {name: (offset, size) for name, offset, size in tar_members(file)}


def _promised_samples(sound):
    # libsndfile shows only in its log that a wav was cut; sizes near 2^31 and 2^32 are a stream's, of unknown length
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", sound.extra_info)
    return sound.frames * int(cut[1]) // int(cut[2]) if cut and 0 < int(cut[1]) < 2**31 - 2**16 else sound.frames


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
