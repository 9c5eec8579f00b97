"""What goes into the model, in data-flow order: audio files to waveforms, waveforms to features,
augmentation, instructions, licences, manifests, prompts, and resumable batches of all that.

A manifest row is an example (a dict); an element of a batch is a sequence. Samples are those of
16 kHz audio. Frames are named by their length: 10 ms inside fbank, 20 ms for the speech encoder,
80 ms for the LLM.
"""

import copy
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import reprlib
import tarfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from model import AUDIO, DEMO, EncoderConfig, UserError, adapter_length, one_line_errors, visible


class AudioError(UserError):
    """A recording that cannot be used. Long jobs leave it out, count it and name it."""


# --- Files that are written whole or not at all, and JSON Lines


def write_atomically(path: Path, save: Callable) -> None:
    """save(file open for writing), then rename: path is always a complete file, old or new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch.save's word for a disk that fills up
            reason = "could not be written to the end, is the disk full?"
            raise OSError(errno.ENOSPC, reason, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file, if it is there, but for half a line that a kill left."""
    objects = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError):
            objects.append(json.loads(line))
    return objects


# --- Audio files, or parts of them, to mono 16 kHz waveforms

SAMPLE_RATE = 16000  # samples a second
MIN_SAMPLES = 560  # 35 ms: two windows of 25 ms, 10 ms apart, make one 20 ms frame
MIN_WINDOW = SAMPLE_RATE // 2  # samples; shorter clips get silence behind them
OUTPUTS = 80  # of the resampler that are computed from one slice of its input
AudioFile = str | Path | io.BytesIO  # a path, or the bytes of a file
READ_AGAIN = "copy or download it again, or convert it to flac"


def load_audio(path: AudioFile, start: float = 0.0, duration: float | None = None) -> Tensor:
    """An audio file, or `duration` seconds of it from `start`, as a mono 16 kHz waveform: (N,)
    float32, full scale at +-1, channels averaged. path: any file that libsndfile decodes, sampled
    at 1 to 200 kHz; SHARD.tar/MEMBER is a member of an uncompressed tar. For n samples at another
    rate N is ceil(n * 16000 / rate), and sample k is the sound at k / 16000 s (no delay).

    Raises AudioError for a file that cannot be decoded, holds NaN or inf, is shorter than 35 ms, or
    gives 0.1 s less than asked for or less or more, up to its end, than its header promises."""
    with open_sound(path) as (sound, _):
        rate = sound.samplerate
        if not 1000 <= rate <= 200000:
            raise AudioError(f"{path}: found {rate} Hz, expected 1000 to 200000 Hz; convert it")
        seconds = promised_seconds(path) - start if duration is None else duration
        wave = read_samples(sound, path, round(start * rate), round(seconds * rate))
    wave = wave if rate == SAMPLE_RATE else resample(wave, rate)
    if seconds * SAMPLE_RATE - len(wave) > SAMPLE_RATE // 10:
        raise AudioError(
            f"{path}: found {len(wave) / SAMPLE_RATE:.2f} s of audio, expected {seconds:.2f} s by "
            "its header or the manifest; the file is cut or damaged: copy or download it again"
        )
    if len(wave) < MIN_SAMPLES:
        length = f"{len(wave) / 16:.1f} ms of audio" if len(wave) else "no samples"
        raise AudioError(f"{path}: found {length}, expected at least 35 ms; leave the file out")
    if not wave.isfinite().all():
        raise AudioError(f"{path}: found NaN or inf, expected finite samples; export it again")
    return wave


def read_samples(sound: soundfile.SoundFile, path, first: int, count: float) -> Tensor:
    """`count` samples of an open file from the sample `first`, or those up to its end: (n,)."""
    # In Vorbis, libsndfile goes to wrong places or crashes, so that it is read from its beginning.
    # Some codecs cannot seek at all.
    first = min(first, max(0, sound.frames))
    skipped = first if sound.subtype == "VORBIS" else 0
    if first > skipped and sound.seek(first) != first:
        raise AudioError(f"{path}: found no way to go to sample {first} of it; {READ_AGAIN}")
    count += skipped
    # Blocks keep the memory near that of the mono result. A short one is the end, or a damaged
    # place, behind which libsndfile would go on at a wrong one.
    size = 2**24 // sound.channels
    sound.seekable = lambda: False  # or soundfile seeks after reading, and fails at unknown ends
    blocks = [torch.empty(0)]
    while count > 0 and sound.frames > 0:
        wanted = int(min(size, count))
        block = torch.from_numpy(sound.read(wanted, dtype="float32", always_2d=True))
        blocks.append(block.mean(1))  # (n, channels) -> (n,)
        count = count - wanted if len(block) == wanted else 0
    return torch.cat(blocks)[skipped:]


def audio_seconds(path: str | Path) -> float:
    """The length of an audio file in seconds, by promised_seconds; 0 if that refuses the file."""
    with suppress(AudioError):
        return promised_seconds(path)
    return 0.0


@contextmanager
def open_sound(path: AudioFile) -> Iterator[tuple[soundfile.SoundFile, io.IOBase]]:
    """An audio file or a member of a tar, opened, and its bytes. Raises nothing but AudioError."""
    shard, tar, member = str(path).partition(".tar/")
    name = shard + ".tar" if tar else path
    with one_line_errors(path, "correct the path, or its rights", AudioError):
        if isinstance(path, io.BytesIO):  # each opening has a place of its own in it
            file = io.BytesIO(path.getvalue())
        elif not os.path.isfile(name) or tar and member not in tar_members(name):
            raise AudioError(f"{path}: no such file; correct the path")
        else:
            file = open(name, "rb", buffering=0)
    with file, one_line_errors(path, READ_AGAIN, AudioError):
        if tar:
            offset, size = tar_members(name)[member]
            file.seek(offset)
            file = io.BytesIO(file.read(size))
        try:
            # By its descriptor, so that libsndfile judges the content and never the name.
            source = file if isinstance(file, io.BytesIO) else file.fileno()
            sound = soundfile.SoundFile(source, closefd=False)
        except soundfile.SoundFileError as error:
            file.seek(0)
            head = file.read(16)
            content = f"content that starts with {head}" if head else "0 bytes"
            reason = str(error).rpartition(": ")[2]  # libsndfile's own
            raise AudioError(
                f"{path}: found {content} ({reason}), expected audio such as wav, flac, ogg; "
                f"{READ_AGAIN}"
            ) from error
        if sound.format == "MP3":
            # The first frame, behind tags whose sizes are in the log, may count all. Otherwise
            # libsndfile guesses that from the number of bytes, or counts if it does not know it.
            tags = re.findall(r"header length\s*:\s*(\d+)", sound.extra_info)
            file.seek(sum(map(int, tags)))
            content = file.read()
            header = re.search(rb"(?s)(?:Xing|Info)...(.)", content[:3000])
            counted = header and header[1][0] & 1  # the flag of a count
            file = io.BytesIO(content) if counted else Endless(content)
            sound = soundfile.SoundFile(file)
        empty_wav = sound.format in ("WAV", "WAVEX", "RF64") and not sound.frames
        if empty_wav and audio_is_left(sound, file, 0):
            # It was streamed. With 8 as the size of the whole, libsndfile reads it to its end.
            file.seek(8)
            file = io.BytesIO(b"RIFF\x08\0\0\0" + file.read())
            sound = soundfile.SoundFile(file)
        with sound:
            yield sound, file


@lru_cache(maxsize=None)
def tar_members(shard: str) -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} of the files in an uncompressed tar. Raises AudioError."""
    members = {}
    with one_line_errors(shard, READ_AGAIN, AudioError):
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    if member.size < 0:  # tarfile would read the same headers for ever
                        raise tarfile.ReadError("found a member of negative size")
                    if member.isreg() and not member.issparse():
                        members[member.name.removeprefix("./")] = member.offset_data, member.size
        except MemoryError as error:
            raise tarfile.ReadError("found a name of a forged size") from error
    return members


class Endless(io.BytesIO):  # bytes whose number cannot be known by seeking the end
    def seek(self, offset: int, whence: int = 0) -> int:
        return super().seek(0) if whence == os.SEEK_END else super().seek(offset, whence)


def promised_seconds(path: AudioFile) -> float:
    """A file's length by its header, or decoded if that says none. AudioError if it is longer."""
    with open_sound(path) as (sound, file):
        frames, seekable, log = sound.frames, sound.seekable(), sound.extra_info
        if frames > 2**35:  # so libsndfile says that the header says none
            frames = len(read_samples(sound, path, 0, math.inf))
        if seekable and audio_is_left(sound, file, frames):
            raise AudioError(f"{path}: found more audio than its header says; convert it to flac")
        # Only libsndfile's log shows the size that a cut file promises. Programs that stream write
        # sizes of 2 GB and more, which promise nothing.
        cut = re.search(r"(?:data|SSND|[Ss]ize|riff) *: (\d+) \(should be (\d+)\)", log)
        if cut and int(cut[2]) < int(cut[1]) < 2 * 10**9:
            frames = frames * int(cut[1]) // max(1, int(cut[2]))
        if sound.subtype == "OPUS" and "lacks an end-of-stream" in log:
            frames -= sound.samplerate // 50  # libsndfile refuses the last packet
        return frames / sound.samplerate


def audio_is_left(sound: soundfile.SoundFile, file: io.IOBase, frames: int) -> bool:
    """Whether a file holds audio behind its frames, those that libsndfile would read."""
    if sound.format in ("OGG", "FLAC"):
        # A second stream would begin with the same words as the first one.
        file.seek(0)
        content = file.read()
        flac = len(re.findall(rb"fLaC[\0\x80]\0\0\x22", content))
        return flac + content.count(b"\x01vorbis") + content.count(b"OpusHead") > 1
    sound.seek(frames)
    rest = file.read().strip(b"\0")
    if sound.format == "MP3":
        # Seeking leaves up to 8 frames, and 10 kB of a tag have one header of layer III by chance.
        headers = re.findall(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", rest)
        return sound.subtype == "MPEG_LAYER_III" and len(headers) > 10 + len(rest) // 2048
    # A chunk of a name and a size under 2^24 is no audio, if it does not begin another file.
    is_chunk = re.match(rb"(?s)(?!RIFF|RF64|FORM|caff)[\w ]{4}(\0|...\0)", rest)
    return not is_chunk and len(rest) > sound.samplerate // 10 * sound.channels


def resample(wave: Tensor, rate: int) -> Tensor:
    """A wave (n,) to 16 kHz, (ceil(n * 16000 / rate),), by a Kaiser-windowed sinc, flat within
    0.01 dB to 0.92 of the lower Nyquist frequency, aliases and images below -100 dB."""
    kernels, width, period = resampling_kernels(rate)  # (groups, span, 80)
    groups, span, _ = kernels.shape
    step = period * rate // SAMPLE_RATE  # input samples per period
    length = math.ceil(len(wave) * SAMPLE_RATE / rate)
    periods = math.ceil(length / period)
    wave = F.pad(wave, (width, periods * step + span - len(wave)))
    out = wave.new_empty(periods, groups, OUTPUTS)
    for group in range(groups):
        begin = group * OUTPUTS * rate // SAMPLE_RATE
        slices = wave[begin:].unfold(0, span, step)[:periods]  # (periods, span)
        for i in range(0, periods, 256):  # few enough to stay in a CPU's cache
            torch.mm(slices[i : i + 256], kernels[group], out=out[i : i + 256, group])
    return out.view(-1)[:length]


@lru_cache(maxsize=8)
def resampling_kernels(rate: int) -> tuple[Tensor, int, int]:
    """The filter's taps for groups of 80 outputs (groups, span, 80), half its width in input
    samples, and after how many outputs its phases repeat.

    Source: Kaiser's formulas (Oppenheim & Schafer, Discrete-Time Signal Processing, 7.5.3) for a
    100 dB stopband and a transition from 0.92 to 1.0 of the lower Nyquist frequency."""
    lower = min(rate, SAMPLE_RATE)
    beta = 0.1102 * (100 - 8.7)
    width = math.ceil((100 - 7.95) / (2.285 * 0.08 * math.pi) / 2 * rate / lower)
    cutoff = 0.96 * lower / rate
    period = math.lcm(SAMPLE_RATE // math.gcd(rate, SAMPLE_RATE), OUTPUTS)
    span = math.ceil(OUTPUTS * rate / SAMPLE_RATE) + 2 * width + 1
    kernels = torch.empty(period // OUTPUTS, span, OUTPUTS)
    for group, kernel in enumerate(kernels):
        outputs = group * OUTPUTS + torch.arange(OUTPUTS)  # (80,)
        begin = group * OUTPUTS * rate // SAMPLE_RATE - width
        inputs = begin + torch.arange(span)[:, None]  # (span, 1)
        t = (inputs * SAMPLE_RATE - outputs * rate).double() / SAMPLE_RATE  # (span, 80)
        window = torch.special.i0(beta * (1 - (t / width) ** 2).clamp(min=0).sqrt())
        kernel.copy_(cutoff * torch.sinc(cutoff * t) * window * (t.abs() <= width))
    kernels /= torch.special.i0(torch.tensor(beta))
    return kernels, width, period


def cut_windows(wave: Tensor, longest: float = 30.0) -> list[Tensor]:
    """Cuts a 16 kHz wave (N,) at its quietest points into windows of at most `longest` seconds, so
    that their concatenation is the wave; each is longer than a quarter of that. A wave under 0.5 s
    is one window, with silence behind it up to 0.5 s."""
    if len(wave) < MIN_WINDOW:
        return [F.pad(wave, (0, MIN_WINDOW - len(wave)))]
    windows, most = [], int(min(longest * SAMPLE_RATE, len(wave)))
    while len(wave) > most:
        low, high = most // 2, min(most, len(wave) - most // 4)
        energy = wave[low:high].square().unfold(0, HOP, HOP).mean(1)  # of 10 ms
        # Smoothed over 0.2 s around each.
        energy = F.avg_pool1d(energy[None], 21, 1, 10, count_include_pad=False)[0]
        end = low + HOP * int(energy.argmin()) + HOP // 2
        windows.append(wave[:end])
        wave = wave[end:]
    return windows + [wave]


def load_clip(clip: tuple[str, float, float | None]) -> Tensor:
    """The waveform of a path, start and length: (N,), at least 0.5 s; or, without a path, the
    speechless_wave of that number and length. Raises AudioError."""
    return cut_windows(load_audio(*clip) if clip[0] else speechless_wave(*clip[1:]), math.inf)[0]


# --- Features: the Kaldi filterbank of w2v-BERT, and Whisper's log-mel spectrogram

WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms windows every 10 ms


@torch.no_grad()
def fbank(waves: list[Tensor]) -> tuple[Tensor, list[int]]:
    """Log-mel filterbank features of 16 kHz waveforms, as SeamlessM4TFeatureExtractor makes them.
    waves: (N,) float tensors on one device, N >= 560 samples (35 ms), full scale at +-1. Returns
    features (F, 160) float32, the frames of one wave after another's, and how many each has.

    A 10 ms frame is 80 log-mel energies, each bin with zero mean and unit variance over its wave;
    two of them make one 20 ms output frame, so a wave has (1 + (N - 400) // 160) // 2. An odd last
    10 ms frame only counts for the mean and variance. Raises AudioError for a wave that is too
    short, not 1-d or not floating point."""
    window, mel = fbank_constants(waves[0].device)
    size = 128 if waves[0].device.type == "cpu" else 16384  # 10 ms frames, for a CPU's cache
    features = []
    for i, wave in enumerate(waves):
        if wave.ndim != 1 or not wave.is_floating_point() or len(wave) < MIN_SAMPLES:
            raise AudioError(
                f"wave {i}: found {tuple(wave.shape)} {wave.dtype}, expected (N,) float, N >= 560"
            )
        padded = F.pad(wave.float(), (0, FFT))
        energies = mel.new_empty(1 + (len(wave) - WINDOW) // HOP, 80)
        for k, out in enumerate(energies.split(size)):
            # Near-empty bins would drown in the rounding of a float32 FFT.
            x = padded[k * size * HOP :][: (len(out) - 1) * HOP + FFT + 1].double()
            means = x.unfold(0, WINDOW, HOP).mean(1, keepdim=True)  # (n, 1)
            # A frame's mean m, had it been removed before the pre-emphasis, would have taken 0.03 m
            # off every sample.
            frames = (x[1:] - 0.97 * x[:-1]).unfold(0, FFT, HOP) - 0.03 * means  # (n, 512)
            power = torch.view_as_real(torch.fft.rfft(frames * window)).square_()  # (n, 257, 2)
            # Writing into `out` also keeps autocast away.
            torch.mm((power[..., 0] + power[..., 1]).to(mel.dtype), mel, out=out)
        # Each wave is normalised over all its frames, then pairs of frames are joined.
        x = energies.clamp_(min=1.192092955078125e-07).log_().double()  # (n, 80)
        x = x - x.mean(0)
        x = x / (x.square().sum(0) / (len(x) - 1) + 1e-7).sqrt()
        features.append(x[: len(x) // 2 * 2].float().view(-1, 160))
    return torch.cat(features), [len(x) for x in features]


@lru_cache
def fbank_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The window (512,) and the mel filters (257, 80)."""
    # Kaldi's Povey window at 16-bit scale, without its first sample, which is 0, padded to the FFT.
    window = 2**15 * torch.hann_window(WINDOW, periodic=False, dtype=torch.float64)[1:] ** 0.85
    window = F.pad(window, (0, FFT - len(window)))
    # The filters are triangles over the FFT bins, straight on the mel scale.
    edges = torch.linspace(mel_scale(20), mel_scale(8000), 82, dtype=torch.float64)
    bins = [mel_scale(i * SAMPLE_RATE / FFT) for i in range(FFT // 2 + 1)]
    bins = torch.tensor(bins, dtype=torch.float64)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    mel = torch.minimum(rise, fall).clamp(min=0)
    # float32 is faster on a CPU; on a GPU it would be rounded to TF32 where the trainer allows it.
    dtype = torch.float32 if device.type == "cpu" else torch.float64
    return window.to(device), mel.to(device, dtype)


def mel_scale(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


@torch.no_grad()
def log_mel(waves: list[Tensor], bins: int) -> tuple[Tensor, list[int]]:
    """Log-mel features of 16 kHz waveforms (N,), as WhisperFeatureExtractor makes them, but of the
    waves' own length, as if followed by silence. Returns features (F, 2 * bins), each a pair of
    frames of 10 ms, one wave after another, and how many each has: ceil(N / 320)."""
    window, mel = log_mel_constants(waves[0].device, bins)
    features = []
    for wave in waves:
        frames = math.ceil(len(wave) / (2 * HOP))
        x = F.pad(wave.float(), (0, 2 * HOP * frames + WINDOW - len(wave)))
        spectrum = torch.stft(x, WINDOW, HOP, window=window, return_complex=True)
        power = spectrum[:, : 2 * frames].abs().square()  # (201, 2 F)
        energies = (mel @ power).clamp(min=1e-10).log10()  # (bins, 2 F)
        energies = energies.maximum(energies.max() - 8)
        features.append(((energies + 4) / 4).T.reshape(frames, -1))
    return torch.cat(features), [len(x) for x in features]


@lru_cache
def log_mel_constants(device: torch.device, bins: int) -> tuple[Tensor, Tensor]:
    """The window (400,) and Slaney's mel filters (bins, 201): triangles of equal area in hertz,
    evenly spaced up to 1 kHz and by the logarithm from there on."""
    linear, octave = 15.0, math.log(6.4) / 27  # mels at 1 kHz, and the logarithm's step of one
    highest = linear + math.log(8) / octave  # at 8 kHz
    mels = torch.linspace(0, highest, bins + 2, dtype=torch.float64)
    logarithmic = 1000 * torch.exp((mels - linear) * octave)
    edges = torch.where(mels < linear, mels * 1000 / linear, logarithmic)[:, None]  # hertz
    bin_hertz = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    rise = (bin_hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bin_hertz) / (edges[2:] - edges[1:-1])
    mel = torch.minimum(rise, fall).clamp(min=0) * 2 / (edges[2:] - edges[:-2])
    return torch.hann_window(WINDOW, device=device), mel.float().to(device)


# By the model_type of an encoder: what makes its features, and samples to frames of 20 ms.
FEATURES = {
    "wav2vec2-bert": (lambda waves, bins: fbank(waves), lambda size: (size - WINDOW + HOP) // 320),
    "whisper": (log_mel, lambda size: math.ceil(size / 320)),
}


def extract_features(waves: list[Tensor], encoder: EncoderConfig) -> tuple[Tensor, list[int]]:
    """The features (F, 2 * mel bins) of 16 kHz waveforms that an encoder reads, the frames of one
    wave after another's, and how many each has. Raises AudioError."""
    compute, _ = FEATURES[encoder.model_type]
    return compute(waves, encoder.feature_projection_input_dim // 2)


def feature_length(seconds: float, encoder: EncoderConfig) -> int:
    """20 ms frames of a window of this many seconds, as an encoder reads it."""
    _, count_frames = FEATURES[encoder.model_type]
    return count_frames(max(MIN_WINDOW, round(seconds * SAMPLE_RATE)))


# --- Augmentation: waves (N,) as other places would have made them, and those without any speech

SPEECHLESS_CLIPS = [("", number, 1 + number % 32 / 8) for number in range(96)]  # of 1 to 5 s


def noise(size: int, exponent: float, random: np.random.Generator) -> Tensor:
    """Noise (size,) of mean square 1 whose power falls as 1 / f ** exponent above 50 Hz."""
    white = torch.from_numpy(random.standard_normal(size + -size % 4096, np.float32))
    hertz = torch.fft.rfftfreq(len(white), 1 / SAMPLE_RATE).clamp(min=50)
    coloured = torch.fft.irfft(torch.fft.rfft(white) * hertz ** (-exponent / 2))[:size]
    return coloured / coloured.square().mean().sqrt()


def babble(size: int, others: "Manifest", random: np.random.Generator) -> Tensor:
    """Three recordings of a manifest at once (size,), each from anywhere in it on, over again."""
    voices = torch.zeros(size)
    for i in random.integers(len(others), size=3):
        with suppress(AudioError):
            voice = others.audio(others[i])
            voices += voice[(random.integers(len(voice)) + torch.arange(size)) % len(voice)]
    return voices


def mix(wave: Tensor, other: Tensor, decibels: float) -> Tensor:
    """A wave (N,) with another (N,) added, of so much less power."""
    return wave + other * (wave.norm() / other.norm().clamp(min=1e-9) * 10 ** (-decibels / 20))


def reverberate(wave: Tensor, seconds: float, random: np.random.Generator) -> Tensor:
    """A wave (N,) in a room where sound falls by 60 dB in so many seconds, by Polack's model: noise
    that decays, behind a direct path of the same energy, together of energy 1."""
    size = round(seconds * SAMPLE_RATE)
    response = noise(size, 0, random) * 10 ** (-3 * torch.arange(size) / size)
    response[0] = response[1:].norm()
    padded = (len(wave) + size) // 4096 * 4096 + 4096
    spectra = [torch.fft.rfft(x, padded) for x in (wave, response / response.norm())]
    return torch.fft.irfft(spectra[0] * spectra[1])[: len(wave)]


def telephone(wave: Tensor) -> Tensor:
    """What of a wave (N,) is within 300 to 3400 Hz, at whose edges of 100 Hz half of it is left."""
    hertz = torch.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    band = ((hertz - 250) / 100).clamp(0, 1) * ((3450 - hertz) / 100).clamp(0, 1)
    return torch.fft.irfft(torch.fft.rfft(wave) * band, len(wave))


def augment(wave: Tensor, random: np.random.Generator, others: "Manifest") -> Tensor:
    """A wave (N,) as another recording of it, which is drawn: faster or slower by a tenth at most,
    if that leaves it within 30 s, in a room, in noise, by telephone, faint, or clipped."""
    rate = int(random.choice((14400, 15200, 16800, 17600)))  # few, as resample keeps filters
    if random.random() < 0.3 and len(wave) <= 30 * rate:
        wave = resample(wave, rate)
    if random.random() < 0.3:
        wave = reverberate(wave, random.uniform(0.1, 0.8), random)
    if random.random() < 0.3:
        wave = mix(wave, noise(len(wave), random.uniform(0, 2), random), random.uniform(5, 30))
    if random.random() < 0.2:
        wave = mix(wave, babble(len(wave), others, random), random.uniform(5, 20))
    if random.random() < 0.1:
        wave = telephone(wave)
    gain = 10 ** (random.uniform(-30, 6) / 20) / wave.abs().max().clamp(min=1e-5)
    return (wave * gain).clamp(-1, 1)


def speechless_wave(number: int, seconds: float) -> Tensor:
    """A wave (N,) in which nobody speaks, the same for the same number: one in four is silence, one
    hums at 50 Hz, the others are noise, at -80 to -20 dB of full scale."""
    random, size = np.random.default_rng(number), round(seconds * SAMPLE_RATE)
    level = 10 ** (random.uniform(-80, -20) / 20) * (number % 4 > 0)
    period = SAMPLE_RATE // 50 if number % 4 == 1 else size
    wave = level * noise(period, random.uniform(0, 2), random)
    return wave.repeat(math.ceil(size / period))[:size]


DEGRADATIONS = {  # of eval.py --degrade, as functions of a wave, a random generator and a manifest
    "babble": lambda wave, random, others: mix(wave, babble(len(wave), others, random), 10),
    "room": lambda wave, random, others: reverberate(wave, 0.5, random),
    "telephone": lambda wave, random, others: telephone(wave),
    "silence": lambda wave, random, others: torch.zeros_like(wave),
    "noise": lambda wave, random, others: 0.03 * noise(len(wave), 1, random),
}


# --- Instructions in words

TASKS = ("asr", "st", "sqa")
UNSPACED = ("zh", "yue", "ja", "th", "lo", "km", "my")  # languages written without spaces
LONG_CODES = "eng deu ger ita zho chi cmn cn fra fre spa por nld jpn jp kor tha lao khm mya"
CODES = "en de de it zh zh zh zh fr fr es pt nl ja ja ko th lo km my"
SHORT_CODES = dict(zip(LONG_CODES.split(), CODES.split(), strict=True))


def language_code(text: str) -> str | None:
    """The code of a language alone, without region and script, such as zh for zh_TW, ZH-Hans-CN and
    cmn, or en for en-US and eng; None for what is no code."""
    code = re.split("[-_]", text.strip().lower())[0]
    return SHORT_CODES.get(code, code) if re.fullmatch("[a-z]{2,3}", code) else None


# Wordings by task and language of the wording; "targets" are what {to} and {in} stand for.
INSTRUCTIONS = json.loads((DEMO / "instructions.json").read_text(encoding="utf-8"))
# The only right answers to a question that the recording does not answer.
REFUSALS = {
    "en": "Not answerable.",
    "de": "Nicht zu beantworten.",
    "it": "Non è possibile rispondere.",
    "zh": "无法回答。",
}


def speechless_answer(example: dict) -> str | None:
    """What is right where nobody speaks; None for a question whose language has no refusal."""
    return REFUSALS.get(example["target_language"]) if example["task"] == "sqa" else ""


def instruction_of(example: dict, random=None) -> str:
    """The instruction of an example: its own, or else the first wording of its task, for sqa in the
    question's language. A random generator (random.Random or numpy's) draws any wording, for asr
    and st in any language. Raises UserError if there is none."""
    if example.get("instruction"):
        return example["instruction"]
    task, target = example["task"], example["target_language"]
    languages = list(INSTRUCTIONS["targets"])
    if target not in languages and task != "asr":
        raise UserError(
            f"{example['where']}: demo/instructions.json has no wording for the language "
            f"{target!r}; add it there, or give the row an instruction of its own"
        )

    def draw(choices: list[str]) -> str:
        return choices[int(random.random() * len(choices)) if random else 0]

    # A question is put in its own language, everything else in any.
    language = target if task == "sqa" else draw(languages)
    choices = INSTRUCTIONS[task][language]
    if task == "asr" and example.get("style") == "bare":
        choices = INSTRUCTIONS["asr bare"][language]
    elif example["source_language"] == "en":
        choices = choices + INSTRUCTIONS[f"{task} of English"][language]
    forms = INSTRUCTIONS["targets"][language].get(target, {})
    return draw(choices).format(**forms, question=example.get("question", ""))


def wordings(task: str) -> Iterator[tuple[str, str]]:
    """(language, wording) of a task in every language."""
    for key in (task, f"{task} of English", f"{task} bare"):
        for language, choices in INSTRUCTIONS.get(key, {}).items():
            for wording in choices:
                yield language, wording


COURTESY = r"(?:(?:please|bitte|per\s+favore),?\s+|请)*"  # what people type before a wording
LAST_MARKS = ".。!！?？"
QUESTION = re.escape("{question}")


def plain(text: str) -> str:
    """A text without what people type in another way: case, blanks, last mark, courtesy."""
    words = " ".join(text.casefold().replace("’", "'").split())
    return re.sub(f"^{COURTESY}", "", words).rstrip(f" {LAST_MARKS}")


@lru_cache
def known_wordings() -> tuple[dict[str, tuple], list[tuple]]:
    """{plain wording: (task, wording)} for every target; and (pattern, task, wording) of those with
    a question, which only a pattern can tell from it."""
    known, patterns = {}, []
    for task in TASKS:
        for language, wording in wordings(task):
            for forms in INSTRUCTIONS["targets"][language].values():
                text = wording.format(**forms, question="{question}")
                known[plain(text)] = task, text
    for task, wording in known.values():
        pattern = re.escape(wording.rstrip(LAST_MARKS)).replace("\\ ", r"\s+").replace("'", "['’]")
        if QUESTION in pattern and pattern != QUESTION:
            pattern = COURTESY + pattern.replace(QUESTION, r"(.*\S)") + f"[{LAST_MARKS}]*"
            patterns.append((re.compile(pattern, re.IGNORECASE | re.DOTALL), task, wording))
    return known, patterns


def recognise(instruction: str) -> tuple[str | None, str]:
    """The task and the text of an instruction. A known wording, in any case, is spelled as in
    training, around a question as it was typed. The task of others is sqa for a question mark, or
    None, answered as asr is."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", instruction)  # bytes that are no text
    text = unicodedata.normalize("NFC", text).strip()
    known, patterns = known_wordings()
    if plain(text) in known:
        return known[plain(text)]
    for pattern, task, wording in patterns:
        match = pattern.fullmatch(text)
        if match:
            return task, wording.format(question=match[1])
    return "sqa" if re.search("[?？]", text) else None, text


# --- Licences: what training accepts, and whom a trained model owes a mention

FREE = re.compile(
    r"(?i)CC0-1\.0|PDDL-1\.0|LicenseRef-PublicDomain|public domain|MIT|Apache-2\.0"
    r"|CC-BY(-[1-4]\.\d(-(?!NC|ND|SA)[A-Z]{2,3})?)?"
)
NO_CREDIT_NEEDED = re.compile("CC0-.*|PDDL-.*|LicenseRef-PublicDomain|public domain", re.IGNORECASE)
# What the corpora that prepare/corpora.py knows want to be said.
ATTRIBUTIONS = json.loads((DEMO / "attributions.json").read_text(encoding="utf-8"))


@lru_cache
def accepted(licence: str, allowed: tuple[str, ...] = ()) -> bool:
    """Whether training takes data of an SPDX licence: CC0, public domain, CC-BY, MIT, Apache-2.0,
    or one that is named in `allowed`. Of "A AND B" both must be accepted, of "A OR B" one."""

    def is_free(part: str) -> bool:
        return part.strip() in allowed or FREE.fullmatch(part.strip()) is not None

    plain = re.fullmatch(r"\s*[(]?([^()]*)[)]?\s*", licence)  # no part of it is in brackets
    choices = plain[1].split(" OR ") if plain else []
    return licence in allowed or any(all(map(is_free, x.split(" AND "))) for x in choices)


def letters(text: str) -> str:
    """A text without case, punctuation and spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum())


def letter_count(text: str) -> int:
    """How many letters there are to know a text by. A Chinese character counts as three."""
    return sum(3 if "\u4e00" <= character <= "\u9fff" else 1 for character in letters(text))


def text_hash(text: str) -> str:
    """16 hexadecimal digits, the same for texts that differ in case, punctuation and spaces."""
    return hashlib.sha256(letters(text).encode("utf-8", "replace")).hexdigest()[:16]


def protected_hashes(manifests: Iterable[str | Path]) -> frozenset[str]:
    """The hashes of test-only texts, in *.fingerprints files beside manifests. Raises UserError."""
    folders = {Path(manifest).parent for manifest in manifests}
    hashes = set()
    for path in itertools.chain(*(folder.glob("[!.]*.fingerprints") for folder in folders)):
        with one_line_errors(path, "convert the test corpus again, or remove this file"):
            hashes |= set(path.read_text(encoding="utf-8").split())
    return frozenset(hashes)


def refused_licences(example: dict, allowed: tuple[str, ...]) -> dict[str, str]:
    """{licence: who has it} of an example and its sources, as far as training does not take it."""
    refused, where = {}, example["where"]
    for corpus, licence in ((example["corpus"], example["licence"]), *example["sources"]):
        if not accepted(licence, allowed):
            refused[licence] = f"{where}: the corpus {corpus!r} has the licence {licence!r}"
    return refused


def expect_none(refused: dict[str, str]) -> None:
    """Raises UserError with all the refused_licences, if there are any."""
    if refused:
        raise UserError(
            f"{', '.join(refused.values())}, expected CC0-1.0, public domain, CC-BY, MIT or "
            "Apache-2.0; leave such rows out or, if you may use them, give --allow-licence "
            f"{' '.join(map(repr, refused))}"
        )


def check_licence(example: dict, allowed: tuple[str, ...], hashes: frozenset[str]) -> None:
    """Raises UserError if a licence of an example is refused, it is marked test_only, or its text
    (of sqa, its question), if that has the 20 letters to know it by, is among protected_hashes."""
    expect_none(refused_licences(example, allowed))
    text = example["question"] if example["task"] == "sqa" else example["text"]
    reason = example.get("test_only") and f"the corpus {example['corpus']!r} is for testing only"
    if hashes and letter_count(text) >= 20 and text_hash(text) in hashes:
        reason = f"{text[:40]!r} is of a test-only corpus, by *.fingerprints"
    if reason:
        raise UserError(f"{example['where']}: {reason}; leave the row out")


def merge_hours(*data: list) -> list:
    """Lists of (corpus, licence, language, seconds) as one, of equal entries the longest."""
    longest = {}
    for *key, seconds in itertools.chain(*data):
        longest[tuple(key)] = max(seconds, longest.get(tuple(key), 0))
    return [[*key, seconds] for key, seconds in sorted(longest.items())]


def notice(data: list) -> str:
    """Whom a model's training data came from. data: (corpus, licence, language, seconds) each."""
    hours = {}
    for corpus, licence, language, seconds in data:
        hours.setdefault((corpus, licence), []).append(f"{seconds / 3600:.2f} h into {language}")
    lines = ["This model was trained on the following data.", ""]
    for (corpus, licence), shares in hours.items():
        credit = "no attribution is on record here; whoever made the manifest knows it"
        if NO_CREDIT_NEEDED.fullmatch(licence):
            credit = "needs no attribution"
        credit = ATTRIBUTIONS.get(corpus, credit)
        lines += [f"{corpus}, {licence}: {', '.join(shares)}", f"  {credit}"]
    return "\n".join(lines) + "\n"


# --- Manifests: JSON Lines, one example a row

# What other people's manifests, NeMo's first, call the fields.
OTHER_NAMES = {
    "audio": ["audio_filepath", "file_name"],
    "start": ["offset"],
    "text": ["transcription", "answer"],
    "source_language": ["lang", "source_lang"],
    "target_language": ["target_lang"],
    "licence": ["license"],
}
FIELD_NAMES = {theirs: ours for ours, names in OTHER_NAMES.items() for theirs in names}
# The fields of an example that does not state them.
UNKNOWN = dict.fromkeys(("licence", "corpus", "speaker"), "unknown")
EXAMPLE = {"start": 0.0, "duration": None, **UNKNOWN, "style": "written", "sources": []}
TEXT_FIELDS = "audio text licence corpus speaker".split()


def parse_example(line: str | bytes, where: str) -> dict:
    """An example by its line of a manifest, checked, with defaults filled in and `where` naming
    file and line. A field that is null or empty counts as absent. Raises UserError."""
    with one_line_errors(where, "expected one JSON object a line, in UTF-8"):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"found a {type(row).__name__}")
    stated = stated_fields(row, where)
    example = EXAMPLE | stated | {"where": where}

    def refuse(name: str, expected: str):
        value = reprlib.repr(example.get(name, row.get(name)))
        raise UserError(f"{where}: {name} is {value}, expected {expected}; mend or remove the row")

    set_languages(example, refuse)
    if example["task"] not in TASKS:
        refuse("task", f"one of {', '.join(TASKS)}")
    if example["style"] not in ("written", "bare"):
        refuse("style", "written or bare")
    optional = {"question": example["task"] == "sqa", "instruction": "instruction" in stated}
    for name in TEXT_FIELDS + [name for name, is_needed in optional.items() if is_needed]:
        value = example.get(name)
        if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
            refuse(name, "text")
    for name in ("start", "duration"):
        value = example[name]
        if value is not None and not (type(value) in (int, float) and 0 <= value < 1e6):
            refuse(name, "a number of seconds")
    pairs = example["sources"] if isinstance(example["sources"], list) else [None]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        refuse("sources", "a list of [corpus, licence]")
    return example


def stated_fields(row: dict, where: str) -> dict:
    """The fields of a row that are not empty, by our names. Raises UserError if two differ."""
    stated = {}
    for name, value in row.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        ours = FIELD_NAMES.get(name, name)
        if stated.setdefault(ours, value) != value:
            raise UserError(f"{where}: {name} is another {ours} than there is; keep one of them")
    return stated


def set_languages(example: dict, refuse: Callable) -> None:
    """Makes the languages of an example canonical, and states them and its task where it does not.
    refuse(field, what was expected) raises."""
    for name in ("source_language", "target_language"):
        if name in example:
            code = language_code(str(example[name]))
            example[name] = code or refuse(name, "a code such as en, de or zh")
    source, target = example.get("source_language"), example.get("target_language")
    if "task" not in example:
        translated = target not in (None, source or "en")
        example["task"] = "sqa" if "question" in example else "st" if translated else "asr"

    # A transcript is in the language that is spoken, whichever of the two fields says so.
    task, spoken = example["task"], target if example["task"] == "asr" else None
    source = source or spoken or "en"
    target = target or source
    example |= {"source_language": source, "target_language": target}
    if task in ("asr", "st") and (task == "asr") != (source == target):
        other = "" if task == "asr" else "another than "
        refuse("target_language", f"{other}{source!r}, the source_language, for the task {task}")


class Manifest:
    """The examples of a JSON Lines file, which are parsed when they are asked for.

    An example has audio (a path relative to the manifest's folder, or SHARD.tar/MEMBER for a member
    of an uncompressed tar), text (what is to be answered), task (asr, st or sqa), licence (SPDX),
    and may have start and duration (seconds within the audio), source_language (en),
    target_language (the same), question (sqa), instruction, speaker, corpus, style (of a
    transcript: written, or bare of case and punctuation), sources ([corpus, licence] of what it was
    derived from), test_only. OTHER_NAMES has other names of these. A row without a task is sqa if
    it has a question, st if it has two languages, else asr."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # Where each line begins, and the file's end; and which lines are not blank.
        bounds, lines, digest = array("q", [0]), array("q"), hashlib.sha256()
        with one_line_errors(path, "give the path of a manifest"), open(path, "rb") as file:
            for line, text in enumerate(file):
                digest.update(text)
                bounds.append(bounds[-1] + len(text))
                if not text.isspace():
                    lines.append(line)
        self.bounds, self.lines = np.array(bounds), np.array(lines)
        self.content = len(self.lines), digest.hexdigest()  # rows, and a hash of the file
        if not len(self.lines):
            raise UserError(f"{path}: found no rows, expected one JSON object a line")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> dict:
        return next(iter(self.select([i])))

    def __iter__(self) -> Iterator[dict]:
        with open(self.path, "rb") as file:
            for line in self.lines.tolist():
                file.seek(self.bounds[line])
                yield parse_example(file.readline(), f"{self.path} line {line + 1}")

    def select(self, rows: Iterable[int]) -> "Manifest":
        """Those rows of this manifest, by their numbers in it, in the file's order."""
        part = copy.copy(self)
        part.lines = self.lines[np.sort(np.array(list(rows), np.int64))]
        return part

    def clip(self, example: dict) -> tuple[str, float, float]:
        """The path of an example's audio, and the start and length of its part of it in seconds."""
        path = example["audio"] and str(self.path.parent / example["audio"])
        return path, example["start"], self.seconds(example)

    def audio(self, example: dict) -> Tensor:
        """The waveform (N,) of an example, at least 0.5 s. Raises AudioError."""
        path = example["audio"] and str(self.path.parent / example["audio"])
        return load_clip((path, example["start"], example["duration"]))

    def seconds(self, example: dict) -> float:
        """How long an example's audio is by the example, or by its header; 0 if unreadable."""
        if example["duration"] is not None:
            return example["duration"]
        return max(0.0, audio_seconds(self.path.parent / example["audio"]) - example["start"])


# --- The mixture that a run is trained on


class Mixture(NamedTuple):
    manifests: list[Manifest]  # of training, one for each task and target language of each file
    weights: list[float]  # how often each is drawn
    dev: Manifest
    hours: list  # (corpus, licence, target language, seconds) of the training data
    longest: float  # seconds of the longest training example
    contents: list[tuple]  # (path, rows, hash, weight) of each file, see Manifest.content


def open_mixture(paths, dev, tasks, allowed=(), temperature=1.0, excess=None) -> Mixture:
    """Opens the manifests of a run, of which only examples of these tasks count, and prints what is
    in them. paths: manifests; PATH=2 counts each of its examples twice. A task and language is
    drawn as often as its examples to the power 1 / temperature. excess(example, seconds) says why
    an example is too long; these are left out. Raises UserError at the first bad row, or with all
    licences that must not be trained on."""
    hashes = protected_hashes([dev, *paths])
    refused = {}  # licences, see refused_licences

    def check(example: dict, seconds: float) -> str | None:
        refused.update(refused_licences(example, allowed) | refused)  # the first rows stay
        if not refused:
            check_licence(example, allowed, hashes)
        instruction_of(example)  # raises if its language has no wordings
        return excess(example, seconds) if excess else None

    manifests, groups, weights = [], [], []
    sizes = Counter()  # of each task and language over all files, weighted
    totals, longest, contents = Counter(), 0.0, []
    for name in paths:
        path, weight = re.fullmatch(r"(.*?)(?:=(\d*[.]?\d+))?", name).groups("1")
        weight = float(weight)
        if not weight:
            raise UserError(f"{name}: a manifest of weight 0; leave it out")
        manifest = Manifest(path)
        contents.append((path, *manifest.content, weight))
        rows = {}
        for i, example, seconds in usable_rows(manifest, tasks, check, least=1):
            language = example["target_language"]
            rows.setdefault((example["task"], language), array("q")).append(i)
            totals[example["corpus"], example["licence"], language] += seconds
            longest = max(longest, seconds)
        for group in sorted(rows):
            groups.append(group)
            manifests.append(manifest.select(rows[group]))
            weights.append(weight * len(rows[group]))
            sizes[group] += weights[-1]
    dev = Manifest(dev)
    contents.append((str(dev.path), *dev.content, 1.0))
    dev = dev.select(i for i, *_ in usable_rows(dev, tasks, check, least=2))
    expect_none(refused)

    scales = {group: size ** (1 / temperature - 1) for group, size in sizes.items()}
    weights = [weight * scales[group] for weight, group in zip(weights, groups, strict=True)]
    for group, size in sorted(sizes.items()):
        share = f"{100 * size * scales[group] / sum(weights):.1f} % of those drawn"
        print(visible(f"data: {' into '.join(group)}: {size:.0f} rows, {share}"))
    hours = [[*key, round(total)] for key, total in sorted(totals.items())]
    for corpus, licence, language, total in hours:
        print(visible(f"data: {corpus}, {licence}, into {language}: {total / 3600:.2f} h"))
    return Mixture(manifests, weights, dev, hours, longest, contents)


def usable_rows(manifest: Manifest, tasks, check: Callable, least: int) -> Iterator[tuple]:
    """(number, example, seconds) of each row of these tasks, but for those to which check(example,
    seconds) gives a reason, which are counted and named. UserError if there are under `least`."""
    count, excess = 0, []
    for i, example in enumerate(manifest):
        if example["task"] not in tasks:
            continue
        seconds = manifest.seconds(example)
        reason = check(example, seconds)
        if reason:
            excess.append(f"{example['where']}: {reason}")
        else:
            count += 1
            yield i, example, seconds
    if excess:
        print(visible(f"data: {len(excess)} rows are left out: {'; '.join(excess[:3])}"))
    if count < least:
        raise UserError(
            f"{manifest.path}: {count} rows of the tasks this phase trains, {', '.join(tasks)}, "
            f"expected at least {least}; give another manifest"
        )


def find_excess(example, seconds, tokenizer, prompt, adapter, max_seconds, room) -> str | None:
    """Why an example is too long to be trained on, or None: it takes more seconds than max_seconds,
    or more LLM positions than room."""
    if seconds > max_seconds:
        return f"{seconds:.1f} s of audio, expected at most {max_seconds:g} s by --max-seconds"
    frames = adapter_length(feature_length(seconds, adapter), adapter)
    # Hardly a tokenizer makes more than two tokens of a byte: most texts need not be tokenized.
    if 2 * len(f"{instruction_of(example)} {example['text']}".encode()) + frames < room:
        return None
    ids, _ = render(example, frames, tokenizer, prompt)
    if len(ids) <= room:
        return None
    return f"{len(ids):,} LLM positions, expected at most {room:,} by the LLM and --batch-tokens"


# --- Sequences: what the model reads, what it must answer


def join_texts(texts: Iterable[str]) -> str:
    """Answers about successive windows as one text, spaces between them but not behind Chinese."""
    joined = ""
    for text in map(str.strip, texts):
        if joined and text and re.search("[^\u3000-\u9fff\uff00-\uffef]$", joined):
            joined += " "
        joined += text
    return joined


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, none of which is a special token, whatever is written there."""
    tokenizer.encode_special_tokens = True  # which is lost where a tokenizer is pickled
    return tokenizer.encode(text, add_special_tokens=False).ids


class Prompt(NamedTuple):
    """What stands around audio, instruction and answer."""

    kind: str  # plain or chat
    before: list[int]  # ids in front of the audio
    text_after: str  # of the instruction
    after: list[int]  # ids in front of the answer
    end: int  # the token that ends an answer


# How an instruct model writes the user's turn and begins its own, by the token that ends a turn.
CHATS = {
    "<|im_end|>": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "<|eot_id|>": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


def make_prompt(tokenizer: Tokenizer, end_ids: list[int], kind: str = "auto") -> Prompt:
    """The prompt of a kind: plain, chat, or auto, which is chat if a token that ends a turn is
    among end_ids, those of the LLM. Raises UserError if the tokenizer has no chat form."""
    template = tokenizer.encode("a")
    begin = template.ids[: template.special_tokens_mask.index(0)]
    for turn_end, forms in CHATS.items():
        end = tokenizer.token_to_id(turn_end)
        if end is not None and (kind == "chat" or kind == "auto" and end in end_ids):
            tokenizer.encode_special_tokens = False
            user, assistant = (tokenizer.encode(x, add_special_tokens=False).ids for x in forms)
            return Prompt("chat", begin + user, "", assistant, end)
    if kind == "chat":
        raise UserError(f"--prompt chat: the tokenizer has no {' or '.join(CHATS)}; give plain")
    return Prompt("plain", begin, "\n", [], end_ids[0])


def render(example: dict, audio_frames: int, tokenizer: Tokenizer, prompt: Prompt):
    """The ids of a sequence, and how many at its end are the answer: the one place where prompt and
    loss mask are made, in the plain form or a chat form, such as ChatML:

        [begin token, if the tokenizer has one] audio \\n instruction \\n answer end
        <|im_start|>user\\n audio \\n instruction <|im_end|>\\n
        <|im_start|>assistant\\n answer <|im_end|>

    example: a manifest row; without "text" the ids stop where the answer begins. audio_frames: how
    many AUDIO placeholders, of 80 ms each. Pure: same in, same out."""
    instruction = encode(tokenizer, f"\n{instruction_of(example)}{prompt.text_after}")
    answer = []
    if example.get("text") is not None:
        answer = encode(tokenizer, example["text"]) + [prompt.end]
    question = prompt.before + [AUDIO] * audio_frames + instruction + prompt.after
    return question + answer, len(answer)


def collate(sequences: list[tuple[list[int], int, Tensor]]) -> dict:
    """A batch for SpeechLM.forward of sequences (ids, answer size, features or states (F, D)),
    without padding: all end to end, how long each is, and the places of the targets in ids."""
    ids, answers, frames = zip(*sequences, strict=True)
    ends = itertools.accumulate(map(len, ids))
    targets = [torch.arange(end - size, end) for end, size in zip(ends, answers, strict=True)]
    return {
        "features": torch.cat(frames),
        "lengths": [len(x) for x in frames],
        "ids": torch.tensor(list(itertools.chain(*ids))),
        "ids_lengths": [len(sequence) for sequence in ids],
        "targets": torch.cat(targets),
    }


# --- Batches: an endless, resumable stream

POOL = 4096  # examples that are sorted by length together


def cut_batches(sizes: Iterable[tuple], max_frames: float, max_tokens: float) -> list[list]:
    """Cuts items into batches that stay within both budgets. sizes: (frames, tokens, item) each; an
    item over a budget is a batch of its own. Returns lists of items."""
    batches, total_frames, total_tokens = [], 0, 0
    for frames, tokens, item in sizes:
        total_frames += frames
        total_tokens += tokens
        if not batches or total_frames > max_frames or total_tokens > max_tokens:
            batches.append([])
            total_frames, total_tokens = frames, tokens
        batches[-1].append(item)
    return batches


def schedule(manifests, weights, size, max_frames, max_tokens, seed, position=None) -> Iterator:
    """Endless batches of (manifest, row, turn) numbers, shuffled, examples of like length together.

    Each pool takes from every manifest, by weight, the next rows of that manifest's shuffled order
    (a new order every time it has been gone through, which is its turn); the pool is sorted by
    length and cut by the budgets of 20 ms frames and LLM positions, and its batches are shuffled.
    size(manifest, row, turn) gives (frames, positions). Yields (position, batch): from that
    position it continues right behind the batch. All choices derive from seed and position."""
    position = position or {"pool": 0, "batch": 0, "taken": [0] * len(manifests)}
    share = np.array(weights, float) / sum(weights)
    while True:
        random = np.random.default_rng([seed, position["pool"]])
        counts = random.multinomial(min(POOL, sum(map(len, manifests))), share).tolist()
        sizes = []
        for m, taken in enumerate(position["taken"]):
            for k in range(taken, taken + counts[m]):
                turn, place = divmod(k, len(manifests[m]))
                key = m, int(shuffled_rows(len(manifests[m]), seed, m, turn)[place]), turn
                sizes.append((*size(*key), key))
        batches = cut_batches(sorted(sizes), max_frames, max_tokens)
        random.shuffle(batches)
        taken = [before + more for before, more in zip(position["taken"], counts, strict=True)]
        next_pool = {"pool": position["pool"] + 1, "batch": 0, "taken": taken}
        for b in range(position["batch"], len(batches)):
            last = b + 1 == len(batches)
            yield next_pool if last else {**position, "batch": b + 1}, batches[b]
        position = next_pool


@lru_cache(maxsize=1)
def shuffled_rows(length: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(length)


class Examples(torch.utils.data.Dataset):
    """Scheduled batches made into tensors, in worker processes. An example whose audio cannot be
    used is left out; the batch's "bad" has its (file and line, reason). A batch of which none is
    left is silence without targets: its loss and gradients are 0.

    states: a function from a clip (see Manifest.clip) to encoder outputs (F, D), which then take
    the place of audio and features.

    shares: of recordings that are changed (some get a tenth longer than budgets know; 0.3 times as
    many instructions are put as people type them), and of rows in which nobody speaks."""

    def __init__(self, manifests, tokenizer, prompt, adapter, states=None, seed=0, shares=(0, 0)):
        self.manifests, self.tokenizer, self.prompt = manifests, tokenizer, prompt
        self.adapter, self.states, self.seed = adapter, states, seed
        self.augment, self.silence = shares

    def example(self, m: int, i: int, turn: int) -> dict:
        """An example with the wording of its instruction, drawn anew each turn."""
        example = self.manifests[m][i]
        random = np.random.default_rng([self.seed, m, i, turn])
        text = instruction_of(example, random)
        if random.random() < 0.3 * self.augment:
            spellings = text.lower(), text.upper(), text.rstrip(LAST_MARKS), f"please {text}"
            text = [*spellings, text.replace(" ", "  ")][random.integers(5)]
        example |= {"instruction": text}
        answer = speechless_answer(example)
        if random.random() < self.silence and answer is not None:
            path, number, seconds = SPEECHLESS_CLIPS[random.integers(len(SPEECHLESS_CLIPS))]
            example |= {"audio": path, "start": number, "duration": seconds, "text": answer}
        return example

    def size(self, m: int, i: int, turn: int) -> tuple[int, int]:
        """The 20 ms frames and the LLM positions of an example by its manifest."""
        example = self.example(m, i, turn)
        frames = feature_length(self.manifests[m].seconds(example), self.adapter)
        ids, _ = render(example, 0, self.tokenizer, self.prompt)
        return frames, adapter_length(frames, self.adapter) + len(ids)

    def frames(self, m: int, example: dict, random: np.random.Generator | None = None) -> Tensor:
        """The features of an example, or encoder states (F, D). A random generator changes
        a share of them: the wave, or spans of 1 to 10 states, 8 % of all. Raises AudioError."""
        changed = random and example["audio"] and random.random() < self.augment
        if self.states is None:
            wave = self.manifests[m].audio(example)
            wave = augment(wave, random, self.manifests[m]) if changed else wave
            return extract_features([wave], self.adapter)[0]
        states = self.states(self.manifests[m].clip(example))
        if changed:
            states = states.clone()
            for start in random.integers(len(states), size=random.poisson(len(states) / 70)):
                states[start : start + random.integers(1, 11)] = 0
        return states

    def sequence(self, example: dict, frames: Tensor) -> tuple[list[int], int, Tensor]:
        """An example and its frames as collate takes them."""
        audio_frames = adapter_length(len(frames), self.adapter)
        return *render(example, audio_frames, self.tokenizer, self.prompt), frames

    def __getitem__(self, scheduled: tuple[dict, list]) -> dict:
        position, batch = scheduled
        sequences, examples, bad = [], [], []
        for m, i, turn in batch:
            example = self.example(m, i, turn)
            random = np.random.default_rng([self.seed, m, i, turn, 1])
            try:
                sequences.append(self.sequence(example, self.frames(m, example, random)))
                examples.append(example)
            except AudioError as error:
                bad.append((example["where"], str(error)))
        if not sequences:
            config = self.adapter
            width = config.hidden_size if self.states else config.feature_projection_input_dim
            placeholders = [AUDIO] * adapter_length(1, config)
            sequences = [(placeholders + [self.prompt.end], 0, torch.zeros(1, width))]
        return {"position": position, "examples": examples, "bad": bad} | collate(sequences)
