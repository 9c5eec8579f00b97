"""What goes into the model: audio files to 16 kHz waveforms and filterbank features, text, and batches of both."""

import io
import itertools
import json
import math
import re
import tarfile
from array import array
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer

from model import AUDIO, CheckpointError, adapter_length

SAMPLE_RATE = 16000
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms windows every 10 ms
MIN_SAMPLES = WINDOW + HOP  # two windows make one 20 ms output frame


class AudioError(ValueError):
    """Audio that cannot be used; the message names what was found, what was expected and the remedy."""


# -----------------------------------------------------------------------------
# audio files

def load_audio(path, start=0.0, duration=None):
    """Read one audio file, or `duration` seconds of it from `start`, as a mono 16 kHz waveform.

    path: any file libsndfile decodes (wav, flac, ogg vorbis, opus, mp3, aiff, sphere, ...), sampled at 1 to 200 kHz;
    SHARD.tar/MEMBER is a member of an uncompressed tar.
    Returns a (N,) float32 tensor, full scale at +-1. Channels are averaged. For n samples at another rate
    N = ceil(n * 16000 / rate), and sample k is the sound at k / 16000 s (no delay); 16 kHz files come back untouched.

    Resampling is a Kaiser-windowed sinc whose stopband starts at the lower of the two Nyquist frequencies:
    flat within 0.01 dB up to 0.92 of it, aliases and images below -100 dB.

    Raises AudioError for a file that cannot be opened or decoded, holds no samples, NaN or inf, is shorter than 35 ms,
    or delivers less than asked for or than its header promises (more than 0.1 s less: mp3 headers also count the
    decoder delay).
    A cut ogg promises nothing and comes back short.
    """
    name = repr(str(path))
    with _opened(path) as sound:
        rate, first = sound.samplerate, round(start * sound.samplerate)
        if not 1000 <= rate <= 200000:
            raise AudioError(f"{name}: found a sample rate of {rate} Hz, expected 1000 to 200000; convert it to "
                             "16000 Hz")
        expected, left = _promised_samples(sound) - first, math.inf
        if duration is not None:
            expected = left = round(duration * rate)
        size = 2**24 // sound.channels  # samples at a time, so that memory stays near that of the mono result
        blocks = [torch.empty(0)]
        sound.seek(min(first, sound.frames))
        while left > 0:
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


def audio_seconds(path):
    """The length of an audio file by its header, in seconds. Raises AudioError."""
    with _opened(path) as sound:
        return _promised_samples(sound) / sound.samplerate


@contextmanager
def _opened(path):
    # The file or tar member as a soundfile.SoundFile; whatever goes wrong with it is an AudioError.
    name = repr(str(path))
    shard, tar, member = str(path).partition(".tar/")
    try:
        if tar:
            offset, size = _tar_members(shard + ".tar")[member]
        file = open(shard + ".tar" if tar else path, "rb")
    except KeyError:
        raise AudioError(f"{name}: found no such member in the tar, expected an audio file; correct the path") from None
    except (OSError, ValueError, tarfile.TarError) as error:
        raise AudioError(f"{name}: {error.args[-1]}, expected an audio file; correct the path") from error
    with file:
        if tar:
            file.seek(offset)
            file = io.BytesIO(file.read(size))
        try:
            # by descriptor, so that libsndfile judges the content and never the name
            with soundfile.SoundFile(file if tar else file.fileno(), closefd=False) as sound:
                yield sound
        except soundfile.SoundFileError as error:
            file.seek(0)
            head = file.read(16)
            found = f"content that cannot be decoded (it starts with {head})" if head else "0 bytes"
            raise AudioError(f"{name}: found {found}, expected intact audio such as wav, flac, ogg or mp3; "
                             "copy or download it again, or convert it to flac") from error


@lru_cache(maxsize=64)
def _tar_members(shard):
    with tarfile.open(shard, "r:") as tar:
        return {m.name.removeprefix("./"): (m.offset_data, m.size) for m in tar if m.isfile()}


def _promised_samples(sound):
    # libsndfile shows only in its log that a wav was cut; sizes near 2^31 and 2^32 are a stream's, of unknown length
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", sound.extra_info)
    return sound.frames * int(cut[1]) // int(cut[2]) if cut and int(cut[1]) < 2**31 - 2**16 else sound.frames


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


# -----------------------------------------------------------------------------
# manifests: JSON Lines, one example a row

TASKS = ("asr", "st", "sqa")


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names file and line, what was found, what was expected."""


class Manifest:
    """The rows of a JSON Lines file. Only their places in the file are kept; a row is parsed when it is asked for.

    A row has audio (a path relative to the manifest, or SHARD.tar/MEMBER for a member of an uncompressed tar), text
    (what is to be said), task (asr, st or sqa), licence (SPDX), and may have start and duration (seconds within the
    audio), source_language, target_language (en), question (sqa), instruction, speaker, corpus.
    """

    def __init__(self, path):
        self.path = Path(path)
        ends, size = [np.zeros(1, np.int64)], 0
        try:
            with open(path, "rb") as file:
                while block := file.read(2**24):
                    ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size + 1)
                    size += len(block)
        except OSError as error:
            raise ManifestError(f"{str(path)!r}: {error.strerror}, expected a manifest; correct the path") from error
        self.bounds = np.concatenate(ends + [np.array([size])])  # where line i begins; the last is the file's end
        self.lines = np.flatnonzero(np.diff(self.bounds) > 2)  # those that are not empty
        if not len(self.lines):
            raise ManifestError(f"{str(path)!r}: found no rows, expected one JSON object a line")

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        """Row i as a dict, checked, with defaults filled in and `where` naming file and line. Raises ManifestError."""
        line = self.lines[i]
        with open(self.path, "rb") as file:
            file.seek(self.bounds[line])
            text = file.read(self.bounds[line + 1] - self.bounds[line])
        return parse_row(text, f"{str(self.path)!r} line {line + 1}")

    def __iter__(self):
        kept = iter(self.lines.tolist())
        wanted = next(kept, None)
        with open(self.path, "rb") as file:
            for line, text in enumerate(file):
                if line == wanted:
                    yield parse_row(text, f"{str(self.path)!r} line {line + 1}")
                    wanted = next(kept, None)

    def audio(self, row):
        """The waveform of a row. Raises AudioError."""
        return load_audio(self.path.parent / row["audio"], row["start"], row["duration"])

    def seconds(self, row):
        """How long a row's audio is, by the row itself or else by the audio's header; 0 if that cannot be read."""
        if row["duration"] is not None:
            return row["duration"]
        try:
            return max(0.0, audio_seconds(self.path.parent / row["audio"]) - row["start"])
        except AudioError:
            return 0.0

    def keep(self, tasks):
        """Reads the file once, keeps only the rows of these tasks, and returns how many seconds they are, a Counter by
        (corpus, licence, target language). Raises ManifestError at the first bad row."""
        keep, seconds = array("q"), Counter()
        for i, row in enumerate(self):
            if row["task"] in tasks:
                keep.append(i)
                seconds[row["corpus"], row["licence"], row["target_language"]] += self.seconds(row)
        self.lines = self.lines[np.array(keep, np.int64)]
        return seconds


ROW = {"start": 0.0, "duration": None, "source_language": "en", "target_language": "en", "licence": "unknown",
       "corpus": "unknown", "speaker": "unknown"}  # what a row has that does not say otherwise


def parse_row(text, where):
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: found a {type(row).__name__}, expected a JSON object")
    row = ROW | {name: value for name, value in row.items() if value is not None} | {"where": where}
    texts = ["audio", "text", "task", "source_language", "target_language", "licence", "corpus", "speaker"]
    texts += ["question"] if row.get("task") == "sqa" else []
    for name in texts + (["instruction"] if "instruction" in row else []):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
            raise ManifestError(f"{where}: {name} is {value!r}, expected text; add it or leave the row out")
    if row["task"] not in TASKS:
        raise ManifestError(f"{where}: task is {row['task']!r}, expected one of {', '.join(TASKS)}")
    for name in ("start", "duration"):
        if row[name] is not None and (type(row[name]) not in (int, float) or not 0 <= row[name] < 1e6):
            raise ManifestError(f"{where}: {name} is {row[name]!r}, expected a number of seconds")
    return row


# -----------------------------------------------------------------------------
# rows: what the model reads, what it must say

LANGUAGES = {"en": "English", "de": "German", "it": "Italian", "zh": "Chinese"}
INSTRUCTIONS = {
    "asr": "Transcribe the {source} speech.",
    "st": "Translate the {source} speech to {target}.",
    "sqa": "Answer the question in {target}: {question}",
}
# The reference's second form of prompt. These ids are ours alone: -2, -3, ... index the adapter's own embeddings.
TASK_TOKENS = {"asr": "<|transcribe|>", "st": "<|translate|>", "sum": "<|summarize|>", "sqa": "<|reply|>"}
LANGUAGE_CODES = ("bg cs da de el en es et fi fr ga hr hu it lt lv mt nl pl pt ro sk sl sv "
                  "sq ast eu br ca fy gl oc rm sc hsb cy zh").split()
PROMPT_TOKENS = [*TASK_TOKENS.values(), *(f"<|{code}|>" for code in LANGUAGE_CODES)]


def load_tokenizer(directory):
    """The tokenizer.json of an LLM's directory. Raises CheckpointError."""
    path = Path(directory) / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: {error}; copy the LLM's own tokenizer.json there") from error


def instruction_of(row):
    if row.get("instruction"):
        return row["instruction"]
    source, target = (LANGUAGES.get(row[side], row[side]) for side in ("source_language", "target_language"))
    return INSTRUCTIONS[row["task"]].format(source=source, target=target, question=row.get("question", ""))


def render(row, audio_frames, tokenizer, end_id, form="text", length_hint=False):
    """The ids of a row and how many at its end are the answer: the one place where prompt and loss mask are made.

    text:   [begin token, if the tokenizer has one] audio \\n instruction \\n answer end
    tokens: audio <|language|><|task|> [characters of the answer, as digits] [question] answer end

    row: a manifest row; without "text" the ids stop where the answer begins. audio_frames: AUDIO placeholders, 80 ms
    each. tokens is the reference's form (arXiv 2506.17019), whose length hint is for training. Pure: same in, same out.
    """
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    answer = [] if row.get("text") is None else encode(row["text"]) + [end_id]
    if form == "text":
        before, after = tokenizer.encode("").ids, encode(f"\n{instruction_of(row)}\n")
    else:
        tokens = (f"<|{row['target_language']}|>", TASK_TOKENS[row["task"]])
        before, after = [], [AUDIO - 1 - PROMPT_TOKENS.index(token) for token in tokens]
        after += encode((str(len(row["text"])) if length_hint else "") + row.get("question", ""))
    return before + [AUDIO] * audio_frames + after + answer, len(answer)


def collate(examples):
    """Right-pads examples, each (ids, answer size, frames (F, 160) or encoder states (F, D)), into one batch for
    SpeechLM.forward: features (B, F, 160) or (B, F, D), lengths (B,), ids (B, T), targets (N,)."""
    ids, answers, frames = zip(*examples)
    width = max(map(len, ids))
    ends = [b * width + len(row) for b, row in enumerate(ids)]
    return {
        "features": torch.nn.utils.rnn.pad_sequence(frames, batch_first=True),
        "lengths": torch.tensor([len(f) for f in frames]),
        "ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        "targets": torch.cat([torch.arange(end - n, end) for end, n in zip(ends, answers)]),
    }


# -----------------------------------------------------------------------------
# batches: an endless, resumable stream

POOL = 4096  # rows that are sorted by length together


def feature_length(seconds):
    """20 ms frames that fbank gives for this many seconds."""
    return max(0, (1 + (int(seconds * SAMPLE_RATE) - WINDOW) // HOP) // 2)


def cut(sizes, max_frames, max_tokens):
    """Cuts rows into batches whose padded sizes stay within both budgets. sizes: a (frames, tokens, row) each, sorted
    by length; a row over a budget is a batch of its own. Returns lists of rows."""
    batches, frames, tokens = [], 0, 0
    for f, t, row in sizes:
        frames, tokens = max(frames, f), max(tokens, t)
        rows = len(batches[-1]) + 1 if batches else 0
        if rows == 0 or frames * rows > max_frames or tokens * rows > max_tokens:
            batches.append([])
            frames, tokens = f, t
        batches[-1].append(row)
    return batches


def schedule(manifests, weights, size, max_frames, max_tokens, seed, position=None):
    """Endless batches of (manifest, row) numbers, shuffled, rows of similar length together.

    Each pool of rows takes from every manifest, by weight, the next rows of that manifest's shuffled order (a new
    order every time it has been gone through); the pool is sorted by length, cut by the budgets of frames and LLM
    positions, and its batches are shuffled. size(manifest, row) gives (frames, positions). Yields (position, batch):
    starting again from that position continues right behind the batch, whatever was prefetched. All choices derive
    from seed and position.
    """
    position = position or {"pool": 0, "batch": 0, "taken": [0] * len(manifests)}
    share = np.array(weights, float) / sum(weights)
    while True:
        random = np.random.default_rng([seed, position["pool"]])
        counts = random.multinomial(min(POOL, sum(map(len, manifests))), share)
        sizes = []
        for m, (manifest, taken, count) in enumerate(zip(manifests, position["taken"], counts)):
            for turn, group in itertools.groupby(range(taken, taken + count), lambda k: k // len(manifest)):
                order = np.random.default_rng([seed, m, turn]).permutation(len(manifest))
                sizes += [(*size(m, int(i)), (m, int(i))) for i in (order[k % len(manifest)] for k in group)]
        batches = cut(sorted(sizes), max_frames, max_tokens)
        random.shuffle(batches)
        taken = [int(t + c) for t, c in zip(position["taken"], counts)]
        after = {"pool": position["pool"] + 1, "batch": 0, "taken": taken}
        for b in range(position["batch"], len(batches)):
            yield (after if b + 1 == len(batches) else {**position, "batch": b + 1}), batches[b]
        position = after


class Examples(torch.utils.data.Dataset):
    """Scheduled batches made into tensors, in worker processes: audio read, features computed, rows rendered.

    states: a function (manifest, row) -> (F, D) encoder outputs, which then take the place of audio and features. A
    row whose audio cannot be used is left out; the batch's "bad" has its (file and line, reason).
    """

    def __init__(self, manifests, tokenizer, end_id, adapter, form="text", length_hint=0.0, max_seconds=30.0,
                 states=None, seed=0):
        self.manifests, self.tokenizer, self.end_id, self.adapter = manifests, tokenizer, end_id, adapter
        self.form, self.length_hint, self.max_seconds = form, length_hint, max_seconds
        self.states, self.seed = states, seed

    def size(self, m, i):
        """The 20 ms frames and LLM positions of a row, by its manifest (or, lacking a duration there, its audio)."""
        row = self.manifests[m][i]
        frames = feature_length(self.manifests[m].seconds(row))
        ids, _ = render(row, 0, self.tokenizer, self.end_id, self.form)
        return frames, adapter_length(frames, self.adapter) + len(ids)

    def __getitem__(self, scheduled):
        position, batch = scheduled
        hint = np.random.default_rng([self.seed, position["pool"], position["batch"]])
        examples, rows, bad = [], [], []
        for m, i in batch:
            row, hinted = self.manifests[m][i], hint.random() < self.length_hint
            try:
                frames = self.frames(m, i, row)
            except AudioError as error:
                bad.append((row["where"], str(error)))
                continue
            examples.append(self.example(row, frames, hinted))
            rows.append(row)
        out = {"position": position, "rows": rows, "bad": bad}
        return out | collate(examples) if examples else out

    def example(self, row, frames, hinted=False):
        """A row and what is heard of it, frames (F, 160) or (F, D), as collate takes it."""
        audio_frames = adapter_length(len(frames), self.adapter)
        return *render(row, audio_frames, self.tokenizer, self.end_id, self.form, hinted), frames

    def frames(self, m, i, row):
        """What the model hears of a row: features (F, 160), or the encoder's states. Raises AudioError."""
        seconds = self.manifests[m].seconds(row)
        if seconds > self.max_seconds:
            raise AudioError(f"{seconds:.1f} s of audio, expected at most {self.max_seconds:g} s; raise --max-seconds")
        if self.states is not None:
            return self.states(m, i)
        return fbank([self.manifests[m].audio(row)])[0][0]  # (F, 160)
