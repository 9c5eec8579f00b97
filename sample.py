"""Follows an instruction about recordings: python sample.py audio.wav "Translate to German"

In reading order: the LLM's cache, generation (greedy, sampling, beams), answers to instructions
about recordings of any length, the command, which prints an answer as it is made.
"""

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

# Idle threads spin only briefly, see tests/bench/README.md. It counts only before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the long imports at once

import torch
from tokenizers import Tokenizer
from torch import Tensor

import data
from model import (
    AUDIO,
    LLM,
    Rows,
    SpeechLM,
    UserError,
    fetch,
    load_checkpoint,
    load_tokenizer,
    locate_base,
    pick_device,
    steady_output,
    visible,
)

BATCH_FRAMES = 6000  # 20 ms frames encoded together: two minutes
BATCH_POSITIONS = 16384  # LLM positions read together
MAX_NEW_TOKENS = 512  # of the answer to a window

# --- The cache of keys and values, and the two ways to fill it


@dataclass
class KVCache:
    """Keys and values of the positions that were read: of every layer (B, Hkv, S, d) each."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def empty(cls, llm: LLM, batch: int, size: int) -> "KVCache":
        """Zeros for at least `size` positions. Few sizes mean few compilations of a step."""
        config = llm.config
        size = max(256, 1 << (size - 1).bit_length())
        shape = (batch, config.num_key_value_heads, size, config.head_dim)
        zeros = partial(llm.model.norm.weight.new_zeros, shape, dtype=llm.compute_dtype)
        layers = range(config.num_hidden_layers)
        return cls([zeros() for _ in layers], [zeros() for _ in layers])

    @property
    def size(self) -> int:
        return self.keys[0].shape[2]

    def update(self, layer: int, keys: Tensor, values: Tensor, rows: Rows):
        """Writes new keys and values (N, Hkv, d) to the places of their positions; returns all."""
        self.keys[layer][rows.row, :, rows.position] = keys
        self.values[layer][rows.row, :, rows.position] = values
        return self.keys[layer], self.values[layer]

    def view(self, size: int) -> "KVCache":
        """Its first positions, in the same memory."""
        return KVCache([x[:, :, :size] for x in self.keys], [x[:, :, :size] for x in self.values])

    def select(self, sequences: list[int] | Tensor) -> "KVCache":
        """A new cache of these sequences of it."""
        return KVCache([x[sequences] for x in self.keys], [x[sequences] for x in self.values])

    def copy_from(self, other: "KVCache", sequences: list[int] | Tensor, size: int) -> None:
        """Writes the first positions of these sequences of another cache, or of itself."""
        for store, source in zip(self.keys + self.values, other.keys + other.values, strict=True):
            store[:, :, :size] = source[sequences, :, :size]


class Prefix(NamedTuple):
    """Sequences already read, and how many positions each of them fills."""

    cache: KVCache
    lengths: list[int]


@torch.no_grad()
def read_prefix(llm: LLM, x: Tensor, lengths: list[int]) -> Prefix:
    """Reads x (N, D), beginnings of sequences of these lengths, for generate(..., prefix=...)."""
    cache = KVCache.empty(llm, len(lengths), max(lengths))
    llm.hidden(x, lengths, cache, wanted=torch.empty(0, dtype=torch.long, device=x.device))
    return Prefix(cache, list(lengths))


def continue_prefix(llm: LLM, prefix: Prefix, rows: list[int], more: int) -> tuple[Tensor, KVCache]:
    """The positions that sequences of a prefix fill (B,), and a cache of them with more room."""
    lengths = [prefix.lengths[row] for row in rows]
    cache = KVCache.empty(llm, len(rows), max(lengths) + more)
    cache.copy_from(prefix.cache, rows, max(lengths))
    return torch.tensor(lengths, device=cache.keys[0].device), cache


def prefill(llm: LLM, x: Tensor, lengths: list[int], cache: KVCache, start=None) -> Tensor:
    """Reads x (N, D), sequence after sequence of these lengths, into the cache, behind the `start`
    (B,) positions that it already holds. Returns the logits (B, V) that follow each one's last."""
    last = torch.tensor(lengths, device=x.device).cumsum(0) - 1
    return llm.logits(llm.hidden(x, lengths, cache, start, wanted=last))


def decode_step(llm: LLM, ids: Tensor, positions: Tensor, cache: KVCache, filled: int) -> Tensor:
    """One token each: ids (B,) at positions (B,) go into the cache, of which the first `filled`
    positions are in use with them. Returns the logits (B, V) of the next."""
    hidden = llm.hidden(llm.embed(ids), [1] * len(ids), cache.view(filled), positions)
    return llm.logits(hidden)


def fast_step() -> Callable:
    """The step of decoding to generate with: extras/decode.py's, or else the plain one."""
    with suppress(ImportError):
        from extras.decode import FastDecode

        return FastDecode(decode_step)
    return decode_step


# --- Generation


def draw_token(logits: Tensor, temperature: float, top_p: float, generator=None) -> Tensor:
    """logits (B, V) -> ids (B,): the most likely at temperature 0, else drawn from the smallest set
    of tokens whose probabilities reach top_p (nucleus sampling, arXiv 1904.09751)."""
    if temperature < 1e-6:  # as good as 0, and dividing by it may overflow
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1).sort(descending=True)
    beyond = probs.cumsum(-1) - probs >= top_p
    probs = probs.masked_fill(beyond, 0)  # multinomial normalises again
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]


@torch.no_grad()
def generate(
    llm: LLM,
    x: Tensor,
    lengths: list[int],
    max_new_tokens: int = 256,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    on_token: Callable[[int, int], None] | None = None,
    prefix: Prefix | None = None,
    prefix_rows: list[int] | None = None,
    never_first: tuple[int, ...] = (),
    stop_loops: bool = False,
    step: Callable = decode_step,
) -> list[list[int]]:
    """Continues sequences of embeddings, greedily unless told otherwise, until each meets an end
    token. Returns the ids of each, without it. Raises ValueError.

    x (N, D), sequence after sequence of these lengths: llm.embed(ids) or model.embed(ids, audio).
    num_beams > 1 is beam search with scores sum(log p) / n**length_penalty; temperature, top_p and
    generator are for sampling. on_token(row, id) is called for every token as it is made (not with
    beams). prefix: sequences read before, of which prefix_rows are continued here, or all in turn.
    never_first: ids that no answer begins with. stop_loops keeps one turn of an answer's loop."""
    check_options(max_new_tokens, num_beams, temperature, top_p, on_token)
    if min(lengths) < 1 or sum(lengths) != len(x):
        raise ValueError(f"lengths {lengths} of {len(x)} positions, expected that sum, each >= 1")
    totals = list(lengths)
    if prefix is not None:
        prefix_rows = range(len(prefix.lengths)) if prefix_rows is None else prefix_rows
        totals = [n + prefix.lengths[r] for n, r in zip(lengths, prefix_rows, strict=True)]
    needed, context = max(totals) + max_new_tokens, llm.config.max_position_embeddings
    if needed > context:
        raise ValueError(f"a row needs {needed} positions, the LLM's context has {context}")

    # Read what is given, then make the answers token by token.
    if prefix is None:
        start, cache = None, KVCache.empty(llm, len(lengths), needed)
    else:
        start, cache = continue_prefix(llm, prefix, prefix_rows, max(lengths) + max_new_tokens)
    logits = prefill(llm, x, lengths, cache, start)
    logits[:, list(never_first)] = float("-inf")
    inputs = logits, totals, cache, max_new_tokens, partial(step, llm), set(llm.config.eos_token_id)
    if num_beams > 1:
        answers = beam_search(*inputs, num_beams, length_penalty)
    else:
        draw = partial(draw_token, temperature=temperature, top_p=top_p, generator=generator)
        answers = extend(*inputs, draw, on_token, stop_loops)
    return [ids[: len(ids) - loop_size(ids)] if stop_loops else ids for ids in answers]


def check_options(max_new_tokens, num_beams, temperature, top_p, on_token) -> None:
    """Raises ValueError for options of generate that are impossible or exclude each other."""
    possible = (
        min(max_new_tokens, num_beams) >= 1 and 0 <= temperature < math.inf and 0 < top_p <= 1
    )
    if not possible or num_beams > 1 and (temperature > 0 or on_token is not None):
        raise ValueError(
            f"max_new_tokens {max_new_tokens} and num_beams {num_beams} must be at least 1, "
            f"temperature {temperature} at least 0 and finite, top_p {top_p} above 0 and at most "
            "1; and beam search neither samples nor streams"
        )


def extend(logits, totals, cache, max_new_tokens, step, end_ids, draw, on_token, stop_loops):
    """The answer to each sequence, token by token. logits (B, V) and cache as prefill leaves them;
    totals: how many positions each sequence fills; a loop is left at the end of its answer."""
    answers: list[list[int]] = [[] for _ in totals]
    done = set()
    live = list(range(len(totals)))  # which answers the rows of the batch are
    positions = torch.tensor(totals, device=logits.device)
    for count in range(1, max_new_tokens + 1):
        ids = draw(logits)
        for row, token in zip(live, ids.tolist(), strict=True):
            if row in done or token in end_ids:
                done.add(row)
                continue
            answers[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if stop_loops and loop_size(answers[row]):
                done.add(row)
        remaining = len(totals) - len(done)
        if not remaining or count == max_new_tokens:
            break

        # Those that are done leave the batch, which shrinks to a power of two.
        kept_rows = 1 << (remaining - 1).bit_length()
        if kept_rows < len(live):
            order = sorted(range(len(live)), key=lambda i: live[i] in done)[:kept_rows]
            live = [live[i] for i in order]
            ids, positions, cache = ids[order], positions[order], cache.select(order)
        filled = max(totals[row] for row in live) + count
        logits = step(ids, positions + count - 1, cache, filled)
    return answers


def loop_size(ids: list[int]) -> int:
    """How many ids at the end repeat what stands before them: those of a loop of up to 32 ids gone
    through at least four times and over at least 24 ids, without its first turn; or 0."""
    for period in range(1, 33):
        size = max(4 * period, 24)
        if len(ids) < size or ids[-size:-period] != ids[period - size :]:
            continue
        while size < len(ids) and ids[-size - 1] == ids[period - size - 1]:
            size += 1
        return size - period
    return 0


def beam_search(logits, totals, cache, max_new_tokens, step, end_ids, K, length_penalty) -> list:
    """The best of K beams for each sequence, as in transformers. Arguments as those of extend."""
    (B, V), device = logits.shape, logits.device
    # Every sequence becomes K rows, of which only the first counts at the beginning.
    rows = torch.arange(B, device=device).repeat_interleave(K)
    cache, logits = cache.select(rows), logits[rows]
    positions = torch.tensor(totals, device=device)[rows]
    scores = torch.tensor([0.0] + [float("-inf")] * (K - 1), device=device).repeat(B)  # (B * K,)
    beginnings: list[list[int]] = [[] for _ in rows]
    finished = [[] for _ in totals]  # (score, ids) of the K best answers to each sequence
    done = [False] * B
    # A beam can end in as many ways as there are end tokens, so this many candidates leave K.
    width = min(K * max(2, 1 + len(end_ids)), K * V)
    for length in range(1, max_new_tokens + 1):
        sums = (scores[:, None] + logits.log_softmax(-1)).view(B, K * V)
        best, index = (x.tolist() for x in sums.topk(width))
        penalty = length**length_penalty
        last = length == max_new_tokens
        chosen = []  # (sum of log p, row, token) of every row to come
        for b in range(B):
            going_on = []
            for rank, (total, place) in enumerate(zip(best[b], index[b], strict=True)):
                row, token = b * K + place // V, place % V
                if token not in end_ids and not last:
                    going_on.append((total, row, token))
                elif rank < K and not done[b]:
                    ids = beginnings[row] + ([] if token in end_ids else [token])
                    finished[b].append((total / penalty, ids))
            finished[b] = sorted(finished[b], key=lambda answer: -answer[0])[:K]
            chosen += going_on[:K]
            # The search ends when no beginning can still beat the finished answers at this length.
            if going_on and len(finished[b]) == K:
                done[b] = done[b] or going_on[0][0] / penalty <= finished[b][-1][0]
        if last or all(done):
            break
        columns = zip(*chosen, strict=True)
        scores, rows, ids = (torch.tensor(column, device=device) for column in columns)
        beginnings = [beginnings[row] + [token] for _, row, token in chosen]
        filled = max(totals) + length
        cache.copy_from(cache, rows, filled - 1)
        logits = step(ids, positions + length - 1, cache, filled)
    return [answers[0][1] for answers in finished]


@torch.no_grad()
def score(llm, ids, lengths, answer_lengths, prefix, prefix_rows) -> Tensor:
    """log p of the last answer_lengths ids of each sequence, which continue rows of a prefix:
    (B,), float32. ids (N,), sequence after sequence of these lengths."""
    start, cache = continue_prefix(llm, prefix, prefix_rows, max(lengths))
    ends = zip(accumulate(lengths), answer_lengths, strict=True)
    targets = torch.cat([torch.arange(end - n, end, device=ids.device) for end, n in ends])
    hidden = llm.hidden(llm.embed(ids), lengths, cache, start, wanted=targets - 1)
    log_p = llm.logits(hidden).log_softmax(-1).gather(1, ids[targets, None])[:, 0]
    return torch.stack([part.sum() for part in log_p.split(answer_lengths)])


def pack(rows: list[list[int]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Lists of ids -> ids (N,) of all of them end to end, their lengths."""
    ids = [token for row in rows for token in row]
    return torch.tensor(ids, device=device), [len(row) for row in rows]


# --- Recordings: lists of windows, which are features (F, 160), then audio embeddings (A, D)


@torch.no_grad()
def encode_recordings(model: SpeechLM, recordings: list[list[Tensor]]) -> list[list[Tensor]]:
    """Encodes recordings, each a list of windows: features (F, 160), or encoder states (F, D) where
    the model's encoder is a CachedEncoder. Returns for each a list of audio embeddings (A, D)."""
    device = next(model.adapter.parameters()).device
    windows = [window for recording in recordings for window in recording]
    embeddings = {}
    sizes = sorted((len(window), 0, i) for i, window in enumerate(windows))
    for batch in data.cut_batches(sizes, BATCH_FRAMES, math.inf):
        features = torch.cat([windows[i] for i in batch]).to(device)
        audio, lengths = model.encode(features, [len(windows[i]) for i in batch])
        embeddings.update(zip(batch, audio.split(lengths), strict=True))
    in_order = (embeddings[i] for i in range(len(windows)))
    return [[next(in_order) for _ in recording] for recording in recordings]


def encode_waves(model: SpeechLM, waves: list[Tensor], longest: float) -> list[list[Tensor]]:
    """Encodes waveforms (N,), each cut into windows of at most `longest` seconds."""
    device = next(model.adapter.parameters()).device
    recordings = []
    for wave in waves:
        place = "cpu" if device.type == "mps" else device  # fbank needs float64
        windows = data.cut_windows(wave.to(place), longest)
        features, lengths = data.extract_features(windows, model.adapter.config)
        recordings.append(list(features.split(lengths)))
    return encode_recordings(model, recordings)


# --- Answers


class Answer(NamedTuple):
    text: str
    margin: float | None = None  # of a question: log p(refusal) - log p(best other answer)
    other: str | None = None  # that best other answer
    cut: bool = False  # longer than max_new_tokens, so the rest is missing


class Request(NamedTuple):
    """An instruction about a window of a recording."""

    example: int  # its number
    window: int  # the window's number
    audio: Tensor  # (A, D)
    ids: list[int]  # the sequence up to where the answer begins


@torch.no_grad()
def answer_examples(
    model: SpeechLM,
    tokenizer: Tokenizer,
    examples: list[dict],
    recordings: list[list[Tensor]],
    refuse_above: float | None = None,
    weigh: bool = False,
    on_text: Callable[[str], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **options,
) -> list[Answer | data.AudioError]:
    """Answers the instruction of every example about its recording. Returns for each an Answer, or
    an AudioError if it does not fit into the LLM's context.

    examples: manifest rows, whose text is not shown to the model. recordings: for each example what
    encode_recordings gave for its recording; examples that share one share its place in the LLM's
    cache. sqa is asked of all windows at once, everything else window by window, and joined.
    refuse_above: a question with a greater margin is refused; None leaves that to the model, and
    weigh asks for the margins all the same. on_text gets each new piece of the first example's
    answer as it is made, on_batch after each batch how many it began. options: as for generate."""
    weigh = weigh or refuse_above is not None
    requests, failures = make_requests(model, tokenizer, examples, recordings)
    live = LiveText(tokenizer, on_text) if on_text else None
    # The first answer of a search, or to a question that is weighed, may not be the last word.
    streams = on_text is not None and options.get("num_beams", 1) == 1
    streams = streams and not (weigh and examples[0]["task"] == "sqa")
    if live is None:
        requests.sort(key=lambda request: -len(request.audio))
    answers: list[dict[int, Answer]] = [{} for _ in examples]
    sizes = []
    for request in requests:
        # One that leaves its answer less room than asked for is alone, not to cut other answers.
        short = len(request.ids) + max_new_tokens > model.llm.config.max_position_embeddings
        sizes.append((len(request.ids), batch_size if short else 1, request))
    options = {"max_new_tokens": max_new_tokens, "stop_loops": True, **options}
    for batch in data.cut_batches(sizes, BATCH_POSITIONS, batch_size):
        options["on_token"] = live.add if streams and batch[0].example == 0 else None
        outputs = answer_batch(model, tokenizer, examples, batch, refuse_above, weigh, options)
        for request, answer in zip(batch, outputs, strict=True):
            answers[request.example][request.window] = answer
        if on_batch is not None:
            on_batch(sum(request.window == 0 for request in batch))
        if live is not None:
            live.finish([answer.text for answer in answers[0].values()])
    return [failures.get(i) or join_answers(windows) for i, windows in enumerate(answers)]


def make_requests(model, tokenizer, examples, recordings):
    """The requests of examples, and {number: AudioError} of those too long for the LLM."""
    config = model.llm.config
    prompt = data.make_prompt(tokenizer, config.eos_token_id, model.prompt)
    requests, failures = [], {}
    # Questions hear all windows at once, which are joined once for all that share a recording.
    pairs = list(zip(examples, recordings, strict=True))
    asked = {id(windows): windows for example, windows in pairs if example["task"] == "sqa"}
    joined = {key: [torch.cat(windows)] for key, windows in asked.items() if len(windows) > 1}
    for i, (example, windows) in enumerate(pairs):
        if example["task"] == "sqa":
            windows = joined.get(id(windows), windows)
        for w, audio in enumerate(windows):
            ids, _ = data.render(example | {"text": None}, len(audio), tokenizer, prompt)
            requests.append(Request(i, w, audio, ids))
            if len(ids) + 32 > config.max_position_embeddings:
                failures[i] = data.AudioError(
                    f"{0.08 * len(audio):.0f} s of audio and the instruction take {len(ids)} of "
                    f"{config.max_position_embeddings} LLM positions; ask about a shorter part"
                )
    return [request for request in requests if request.example not in failures], failures


def answer_batch(model, tokenizer, examples, batch, refuse_above, weigh, options) -> list[Answer]:
    """The answers to a batch of requests. Audio is read once for all requests about it."""
    llm, device = model.llm, next(model.adapter.parameters()).device
    beginnings, instructions = {}, []
    for request in batch:
        first = len(request.ids) - request.ids[::-1].index(AUDIO)  # where the instruction begins
        beginnings[id(request.audio)] = (request.audio, request.ids[:first])
        instructions.append(request.ids[first:])
    audios, prefix_ids = zip(*beginnings.values(), strict=True)
    prefix_rows = [list(beginnings).index(id(request.audio)) for request in batch]
    ids, lengths = pack(prefix_ids, device)
    prefix = read_prefix(llm, model.embed(ids, torch.cat(audios)), lengths)

    room = llm.config.max_position_embeddings - max(len(request.ids) for request in batch)
    most = min(options["max_new_tokens"], room)
    options = options | {"max_new_tokens": most, "prefix": prefix, "prefix_rows": prefix_rows}
    ids, lengths = pack(instructions, device)
    outputs = generate(llm, llm.embed(ids), lengths, **options)
    answers = []
    for b, request in enumerate(batch):
        example, output = examples[request.example], outputs[b]
        cut = len(output) == most
        answer = Answer(tokenizer.decode(output).strip(), cut=cut)
        if weigh and example["task"] == "sqa":
            alone = options | {"prefix_rows": [prefix_rows[b]], "on_token": None}
            inputs = example["target_language"], instructions[b], output, refuse_above
            answer = weigh_answer(model, tokenizer, *inputs, alone)._replace(cut=cut)
        answers.append(answer)
    return answers


def weigh_answer(model, tokenizer, language, instruction, output, refuse_above, options) -> Answer:
    """The Answer to a question, of which instruction and output are ids and whose prefix is one of
    the options: what the model answered or, if it refused, the best that it would have answered
    instead, against refusing, in the language of the question if known, else in the likeliest."""
    llm, encode = model.llm, partial(data.encode, tokenizer)
    end = data.make_prompt(tokenizer, llm.config.eos_token_id, model.prompt).end
    texts = list(data.REFUSALS.values())
    refusals = [data.REFUSALS[language]] if language in data.REFUSALS else texts
    device = llm.model.norm.weight.device
    text = tokenizer.decode(output).strip()
    if text in texts:
        first_ids = tuple({encode(refusal)[0] for refusal in texts})
        ids, lengths = pack([instruction], device)
        (output,) = generate(llm, llm.embed(ids), lengths, never_first=first_ids, **options)
    candidates = [output + [end]] + [encode(refusal) + [end] for refusal in refusals]
    ids, lengths = pack([instruction + candidate for candidate in candidates], device)
    answer_lengths = [len(candidate) for candidate in candidates]
    rows = options["prefix_rows"] * len(candidates)
    scores = score(llm, ids, lengths, answer_lengths, options["prefix"], rows)
    margin = (scores[1:].max() - scores[0]).item()
    other = tokenizer.decode(output).strip()
    if refuse_above is not None:
        text = refusals[scores[1:].argmax()] if margin > refuse_above else other
    return Answer(text, margin, other)


def join_answers(windows: dict[int, Answer]) -> Answer:
    """The answers to all windows of a recording as one."""
    ordered = [windows[w] for w in sorted(windows)]
    text = data.join_texts(answer.text for answer in ordered)
    return ordered[0]._replace(text=text, cut=any(answer.cut for answer in ordered))


class LiveText:
    """The first example's answer as it is made: gives on_text each new piece."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.finished: list[str] = []  # of windows before
        self.ids: list[int] = []
        self.shown = ""

    def add(self, row: int, token: int) -> None:
        if row > 0:
            return
        self.ids.append(token)
        text = data.join_texts([*self.finished, self.tokenizer.decode(self.ids)])
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            self.show(text)

    def finish(self, texts: list[str]) -> None:
        self.finished, self.ids = texts, []
        self.show(data.join_texts(texts))

    def show(self, text: str) -> None:
        # If a loop was cut off, the text is shown anew.
        anew = not text.startswith(self.shown)
        self.on_text("\n" + text if anew else text[len(self.shown) :])
        self.shown = text


# --- The program


def newest_checkpoint() -> Path:
    """The newest of out/ift.pt and out/align.pt. Raises UserError if there is none."""
    paths = [path for path in (Path("out/align.pt"), Path("out/ift.pt")) if path.exists()]
    if not paths:
        raise UserError("no out/align.pt or out/ift.pt; run python train.py first, or give --ckpt")
    return max(paths, key=lambda path: path.stat().st_mtime)


def load_model(
    path: str | Path, device: str = "cpu", int8: bool = False, encoder: str = "", llm: str = ""
):
    """The model of a checkpoint or an exported directory, in float32 or, where that is faster, in
    bfloat16, with int8 of the LLM's weights rounded to 8 bits; its tokenizer; the checkpoint
    without weights. encoder, llm: as in SpeechLM.from_pretrained. Raises UserError."""
    checkpoint = load_checkpoint(path)
    llm = llm or locate_base("llm", checkpoint["bases"]["llm"])
    model = SpeechLM.from_pretrained(path, None, device, encoder, llm, checkpoint)
    del checkpoint["model"]
    if int8:
        try:
            from extras.int8 import quantise
        except ImportError:
            raise UserError("--int8 needs extras/int8.py beside sample.py") from None
        quantise(model.llm)
    return model, load_tokenizer(fetch(llm)), checkpoint


def ask(model, tokenizer, checkpoint, recording, instruction, task=None, **options):
    """The task and the Answer of an instruction in words about a recording as encode_waves gave it.
    task: sqa asks about all of it at once. options: of answer_examples. Raises AudioError."""
    likely_task, wording = data.recognise(instruction)
    task = task or likely_task
    example = {"instruction": wording, "task": task, "target_language": None}
    if likely_task is None and " " not in instruction:
        warn(f"{visible(instruction)!r} is taken for an instruction")
    if checkpoint["config"]["phase"] == "align" and task != "asr":
        warn("this checkpoint was trained on transcribing only (phase align); trying")
    refuse_above = checkpoint.get("refuse_above") if likely_task == "sqa" else None
    (answer,) = answer_examples(model, tokenizer, [example], [recording], refuse_above, **options)
    if isinstance(answer, data.AudioError):
        raise answer
    if answer.cut:
        warn(f"the answer is longer than {MAX_NEW_TOKENS} tokens a window; the rest is missing")
    return task, answer


def warn(text: str) -> None:
    print(f"sample.py: {text}", file=sys.stderr)


FILE_NAME = re.compile(
    r"(?is)\S*[.](?=\d*[a-z])[a-z0-9]{2,5}"  # one word with a suffix
    r"|(?=.*[0-9_])[a-z0-9_-]+"  # one word with digits
    r"|(?!.*[\s⺀-鿿]).*[/\\].*[^.?!]"  # one word with a slash, but not "and/or?" and no Chinese
    r"|([a-z]:|~|[.]+)?[/\\].*"
    r"|.*[.](wave?|flac|mp[1-4]|mpe?g|og[agv]|opus|ai(ff?|fc)|m4[abv]|aac|amr|wm[av]|web[am]"
    r"|mk[av]|mov|avi|3gp|caf|au)"
)


def is_recording(word: str) -> bool:
    """Whether a word of the command line names a file, be it there or not."""
    return os.path.exists(word) or FILE_NAME.fullmatch(word.strip()) is not None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with its last word in args.instruction if that is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("audio", nargs="*", help="recordings, and behind them the instruction; else you are asked")
    add("--ckpt", help="checkpoint; otherwise the newest of out/ift.pt and out/align.pt")
    add("--json", action="store_true", help="print one JSON object per recording and instruction")
    add("--whole", action="store_true", help="ask about a long recording at once, as questions do")
    add("--beams", type=int, default=1, help="beam search with so many beams; 1 is greedy")
    add("--temperature", type=float, default=0.0, help="draw the answer at this temperature")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share")
    add("--seed", type=int, default=0, help="of the drawing")
    add("--int8", action="store_true", help="8-bit LLM weights: less memory, faster alone")
    add("--encoder", help="directory or Hub id of the encoder, if it is not where it was")
    add("--llm", help="directory or Hub id of the LLM, if it is not where it was")
    add("--serve", action="store_true", help="record and ask on a page in the browser")
    add("--host", default="127.0.0.1", help="address of the page; others than this reach further")
    add("--port", type=int, default=7860, help="port of the page")
    args = parser.parse_intermixed_args(argv)
    if bool(args.audio) == args.serve:
        parser.error("either these arguments are required: audio; or --serve, without them")
    args.instruction = None
    if len(args.audio) > 1 and args.audio[-1].strip() and not is_recording(args.audio[-1]):
        args.instruction = args.audio.pop()
    for word in args.audio:
        if not is_recording(word):
            parser.error(f'"{visible(word)}" is no file; give the instruction behind recordings')
    try:
        check_options(1, args.beams, args.temperature, args.top_p, None)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> None:
    steady_output()
    args = parse(argv)
    device = pick_device()
    generator = torch.Generator(device).manual_seed(args.seed % 2**63)
    drawing = {"temperature": args.temperature, "top_p": args.top_p, "generator": generator}
    options = {"num_beams": args.beams, "step": fast_step(), "task": "sqa" if args.whole else None}
    options |= drawing | {"on_text": None if args.json else print_piece}
    try:
        waves = {path: data.load_audio(path) for path in args.audio}
        bases = args.encoder, args.llm
        loaded = load_model(args.ckpt or newest_checkpoint(), device, args.int8, *bases)
        if args.serve:
            from extras.serve import serve_page

            return serve_page(args.host, args.port, encode_waves, ask, loaded, options)
    except ImportError as error:
        sys.exit(f"sample.py: --serve needs extras/serve.py beside sample.py ({error})")
    except UserError as error:
        sys.exit(f"sample.py: {error}")
    model, _, checkpoint = loaded
    recordings, failed = {}, False
    for instruction in [args.instruction] if args.instruction else iter(read_instruction, ""):
        for path, wave in waves.items():
            recording = recordings.get(path) or encode_waves(model, [wave], checkpoint["window"])[0]
            recordings[path] = recording
            if len(waves) > 1 and not args.json:
                print(visible(f"{path}: "), end="")
            try:
                task, answer = ask(*loaded, recording, instruction, **options)
            except data.AudioError as error:
                failed = True
                print(end="" if args.json else "\n")
                warn(f"{visible(path)}: {error}")
                continue
            line = {"audio": path, "instruction": instruction, "task": task, "text": answer.text}
            line["seconds"] = len(wave) / data.SAMPLE_RATE
            if answer.text or task == "sqa" or args.json or len(waves) > 1:
                print(visible(json.dumps(line, ensure_ascii=False)) if args.json else "")
            if not answer.text and task != "sqa":
                warn(f"{visible(path)}: no speech")
    if not recordings:
        sys.exit("sample.py: no instruction; give it behind the recordings, or type it")
    if failed:
        sys.exit(1)


def print_piece(text: str) -> None:
    print(visible(text, keep="\n\t"), end="", flush=True)


def read_instruction() -> str:
    """An instruction that the user types; "" when there is none any more."""
    try:
        return input("instruction> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt, AttributeError):  # at its end, or there is no input
        return ""
    except UnicodeDecodeError as error:
        sys.exit(f"sample.py: what was typed is no text ({error}); type it in {error.encoding}")


if __name__ == "__main__":
    main()
