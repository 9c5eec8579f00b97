"""What goes into the model: waveforms to filterbank features, manifests, prompts, and batches of all that."""

import copy
import itertools
import json
import math
import re
import reprlib
from array import array
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from model import AUDIO, adapter_length
from prepare.audio import MIN_SAMPLES, SAMPLE_RATE, audio_seconds, load_audio
from prepare.errors import AudioError, ManifestError
from prepare.instructions import instruction_of
from prepare.paths import leads_out

WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms windows every 10 ms
MIN_HEARD = SAMPLE_RATE // 2  # samples; shorter clips are padded with silence: the model never heard less


def windows(wave, longest=30.0):
    """Cuts a 16 kHz wave (N,) at its quietest points into windows of at most `longest` seconds, so that their
    concatenation is the wave; each is longer than a quarter of that. A wave under 0.5 s is one window, padded with
    silence to 0.5 s. Returns a list of (n,) tensors."""
    if len(wave) < MIN_HEARD:
        return [torch.nn.functional.pad(wave, (0, MIN_HEARD - len(wave)))]
    found, longest = [], int(min(longest * SAMPLE_RATE, len(wave)))
    while len(wave) > longest:
        low, high = longest // 2, min(longest, len(wave) - longest // 4)
        energy = wave[low:high].square().unfold(0, HOP, HOP).mean(1)  # of 10 ms
        energy = torch.nn.functional.avg_pool1d(energy[None], 21, 1, 10, count_include_pad=False)[0]  # over 0.2 s around each
        end = low + HOP * int(energy.argmin()) + HOP // 2
        found.append(wave[:end])
        wave = wave[end:]
    return found + [wave]


# -----------------------------------------------------------------------------
# features

@torch.no_grad()
def fbank(waves):
    """Log-mel filterbank features of 16 kHz waveforms: the Kaldi fbank as in SeamlessM4TFeatureExtractor.

    waves: list of (N,) float tensors on one device, N >= 560 samples (35 ms), full scale at +-1.
    Returns features (F, 160) float32, the frames of one wave after another's, and a list of how many each wave has.
    A 10 ms frame is 80 log-mel energies, each bin with zero mean and unit variance over its wave; two of them make one
    20 ms output frame, so a wave has (1 + (N - 400) // 160) // 2. An odd last 10 ms frame only counts for the mean and
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
    features = torch.empty(sum(lengths), 160, dtype=torch.float32, device=device)
    for row, start, n, length in zip(features.split(lengths), starts, frames, lengths):
        x = energies[start : start + n].double()  # (n, 80)
        x = x - x.mean(0)
        x = x / (x.square().sum(0) / (n - 1) + 1e-7).sqrt()
        row.copy_(x[: 2 * length].view(length, 160))
    return features, lengths


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
LONGEST_LINE = 2**24  # bytes


class Manifest:
    """The rows of a JSON Lines file. Only their places in the file are kept; a row is parsed when it is asked for.

    A row has audio (a path relative to the manifest, or SHARD.tar/MEMBER for a member of an uncompressed tar; unless
    trust_paths is set, neither the path nor a symbolic link may lead out of the manifest's folder), text
    (what is to be said), task (asr, st or sqa), licence (SPDX), and may have start and duration (seconds within the
    audio), source_language, target_language (en), question (sqa), instruction, speaker, corpus, style (of a transcript:
    written, or bare of case and punctuation), sources ([corpus, licence] of what it was derived from), test_only.
    """

    def __init__(self, path, trust_paths=False):
        self.path = Path(path)
        self.folder = None if trust_paths else self.path.parent
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
        if (size := np.diff(self.bounds)).max() > LONGEST_LINE:
            raise ManifestError(f"{str(path)!r} line {size.argmax() + 1}: found {size.max():,} bytes, expected at most "
                                f"{LONGEST_LINE:,}; is this a manifest?")

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        """Row i as a dict, checked, with defaults filled in and `where` naming file and line. Raises ManifestError."""
        line = self.lines[i]
        with open(self.path, "rb") as file:
            file.seek(self.bounds[line])
            text = file.read(self.bounds[line + 1] - self.bounds[line])
        return parse_row(text, f"{str(self.path)!r} line {line + 1}", self.folder)

    def __iter__(self):
        kept = iter(self.lines.tolist())
        wanted = next(kept, None)
        with open(self.path, "rb") as file:
            for line, text in enumerate(file):
                if line == wanted:
                    yield parse_row(text, f"{str(self.path)!r} line {line + 1}", self.folder)
                    wanted = next(kept, None)

    def audio(self, row):
        """The waveform of a row as one window, so at least 0.5 s long. Raises AudioError."""
        return windows(load_audio(self.path.parent / row["audio"], row["start"], row["duration"]), math.inf)[0]

    def seconds(self, row):
        """How long a row's audio is, by the row itself or else by the audio's header; 0 if that cannot be read."""
        if row["duration"] is not None:
            return row["duration"]
        return max(0.0, audio_seconds(self.path.parent / row["audio"]) - row["start"])

    def split(self, tasks, longest, check):
        """Reads the file once. Returns {(task, target language): Manifest of those rows alone}; how many seconds they
        are, a Counter by (corpus, licence, target language); and how long the longest row is that is not longer than
        `longest` seconds. Raises ManifestError at the first bad row, or the first that check(row) refuses by that."""
        groups, total, window = {}, Counter(), 0.0
        for i, row in enumerate(self):
            if row["task"] in tasks:
                check(row)
                groups.setdefault((row["task"], row["target_language"]), array("q")).append(i)
                seconds = self.seconds(row)
                total[row["corpus"], row["licence"], row["target_language"]] += seconds
                window = max(window, seconds) if seconds <= longest else window
        parts = {}
        for group, rows in sorted(groups.items()):
            parts[group] = copy.copy(self)
            parts[group].lines = self.lines[np.array(rows)]
        return parts, total, window


ROW = {"start": 0.0, "duration": None, "source_language": "en", "target_language": "en", "licence": "unknown",
       "corpus": "unknown", "speaker": "unknown", "style": "written", "sources": []}  # of a row that does not say


def parse_row(text, where, folder=None):
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
            raise ManifestError(f"{where}: {name} is {reprlib.repr(value)}, expected text; add it or leave the row out")
    if row["task"] not in TASKS:
        raise ManifestError(f"{where}: task is {reprlib.repr(row['task'])}, expected one of {', '.join(TASKS)}")
    if row["style"] not in ("written", "bare"):
        raise ManifestError(f"{where}: style is {reprlib.repr(row['style'])}, expected written or bare")
    if not isinstance(row["sources"], list) or not all(
            isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in row["sources"]):
        raise ManifestError(f"{where}: sources is {reprlib.repr(row['sources'])}, expected a list of [corpus, licence]")
    for name in ("start", "duration"):
        if row[name] is not None and (type(row[name]) not in (int, float) or not 0 <= row[name] < 1e6):
            raise ManifestError(f"{where}: {name} is {reprlib.repr(row[name])}, expected a number of seconds")
    if folder is not None and leads_out(folder, row["audio"]):
        raise ManifestError(f"{where}: audio is {row['audio']!r}, which leads out of the manifest's folder; if you "
                            "trust whoever wrote it, give --trust-paths")
    return row


# -----------------------------------------------------------------------------
# rows: what the model reads, what it must say

# The reference's second form of prompt. These ids are ours alone: -2, -3, ... index the adapter's own embeddings.
TASK_TOKENS = {"asr": "<|transcribe|>", "st": "<|translate|>", "sum": "<|summarize|>", "sqa": "<|reply|>"}
LANGUAGE_CODES = ("bg cs da de el en es et fi fr ga hr hu it lt lv mt nl pl pt ro sk sl sv "
                  "sq ast eu br ca fy gl oc rm sc hsb cy zh").split()
PROMPT_TOKENS = [*TASK_TOKENS.values(), *(f"<|{code}|>" for code in LANGUAGE_CODES)]


def join(texts):
    """Answers about successive windows as one text: a space between two, but none behind Chinese."""
    whole = ""
    for text in filter(None, map(str.strip, texts)):
        whole += " " * bool(re.search("[^\u3000-\u9fff\uff00-\uffef]$", whole)) + text
    return whole


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
    """Packs examples, each (ids, answer size, frames (F, 160) or encoder states (F, D)), into one batch for
    SpeechLM.forward, without padding: features and ids of all rows end to end, how long each row's are, and the targets'
    positions in ids."""
    ids, answers, frames = zip(*examples)
    ends = itertools.accumulate(map(len, ids))
    return {
        "features": torch.cat(frames),
        "lengths": [len(f) for f in frames],
        "ids": torch.tensor(list(itertools.chain(*ids))),
        "ids_lengths": [len(row) for row in ids],
        "targets": torch.cat([torch.arange(end - n, end) for end, n in zip(ends, answers)]),
    }


# -----------------------------------------------------------------------------
# batches: an endless, resumable stream

POOL = 4096  # rows that are sorted by length together


def feature_length(seconds):
    """20 ms frames of a window of this many seconds."""
    return (1 + (max(MIN_HEARD, int(seconds * SAMPLE_RATE)) - WINDOW) // HOP) // 2


def cut(sizes, max_frames, max_tokens):
    """Cuts rows into batches that stay within both budgets. sizes: a (frames, tokens, row) each; a row over a budget is
    a batch of its own. Returns lists of rows."""
    batches, frames, tokens = [], 0, 0
    for f, t, row in sizes:
        frames, tokens = frames + f, tokens + t
        if not batches or frames > max_frames or tokens > max_tokens:
            batches.append([])
            frames, tokens = f, t
        batches[-1].append(row)
    return batches


def schedule(manifests, weights, size, max_frames, max_tokens, seed, position=None):
    """Endless batches of (manifest, row, turn) numbers, shuffled, rows of similar length together.

    Each pool of rows takes from every manifest, by weight, the next rows of that manifest's shuffled order (a new
    order every time it has been gone through, which is its turn); the pool is sorted by length, cut by the budgets of
    frames and LLM positions, and its batches are shuffled. size(manifest, row, turn) gives (frames, positions). Yields
    (position, batch): starting again from that position continues right behind the batch, whatever was prefetched. All
    choices derive from seed and position.
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
                keys = [(m, int(order[k % len(manifest)]), turn) for k in group]
                sizes += [(*size(*key), key) for key in keys]
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

    def row(self, m, i, turn):
        """A row with the wording of its instruction, and whether to give a length hint, both drawn anew each turn."""
        row, random = self.manifests[m][i], np.random.default_rng([self.seed, m, i, turn])
        if self.form == "text":
            row["instruction"] = instruction_of(row, random)
        return row, random.random() < self.length_hint

    def size(self, m, i, turn):
        """The 20 ms frames and LLM positions of a row, by its manifest (or, lacking a duration there, its audio)."""
        row, hinted = self.row(m, i, turn)
        frames = feature_length(self.manifests[m].seconds(row))
        ids, _ = render(row, 0, self.tokenizer, self.end_id, self.form, hinted)
        return frames, adapter_length(frames, self.adapter) + len(ids)

    def __getitem__(self, scheduled):
        position, batch = scheduled
        examples, rows, bad = [], [], []
        for m, i, turn in batch:
            row, hinted = self.row(m, i, turn)
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
        return fbank([self.manifests[m].audio(row)])[0]  # (F, 160)
