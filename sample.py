"""Follows an instruction about recordings: python sample.py audio.wav "Translate to German"

Uses the newest of out/ift.pt and out/align.pt unless told otherwise, and prints the answer as it is made. Without an
instruction it asks for one after another.
"""

import argparse
import json
import math
import os
import re
import sys
from typing import NamedTuple

import torch

from data import cut, fbank, join, render, windows
from model import AUDIO, SpeechLM
from prepare.audio import SAMPLE_RATE, load_audio
from prepare.checkpoint import fast_dtype, fetch, fingerprint, load_checkpoint, load_tokenizer, newest_checkpoint, restore
from prepare.errors import AudioError, CheckpointError, visible
from prepare.fast_decode import FastDecode, quantise
from prepare.instructions import INSTRUCTIONS, REFUSALS, language_of, task_of

BATCH_FRAMES = 6000  # 20 ms frames encoded together: two minutes
BATCH_POSITIONS = 16384  # LLM positions read together
MAX_NEW_TOKENS = 512  # of the answer to a window


def load_model(path, device="cpu", int8=False):
    """The model of a checkpoint, on its two base models, in float32 or, where that is faster, bfloat16, or with the LLM's
    weights rounded to 8 bits; its tokenizer; the checkpoint without weights. Raises CheckpointError."""
    state = load_checkpoint(path)
    bases = {name: base["path"] for name, base in state["bases"].items()}
    llm = fetch(bases["llm"])
    dtype = fast_dtype(llm, device)
    model = SpeechLM.from_parts(bases["encoder"], bases["llm"], dtype, device=device, **state["adapter"])
    restore(model, state, {name: fingerprint(base) for name, base in bases.items()}, path)
    del state["model"]
    if int8:
        quantise(model.llm)
    model.llm.fast = FastDecode()
    return model.eval(), load_tokenizer(llm), state


# ----------------------------------------------------------------------------------------------------------------------
# Answering


class Answer(NamedTuple):
    text: str
    margin: float | None = None  # of a question: log p(refusal) - log p(best other answer), if it was weighed
    other: str | None = None  # that best other answer
    cut: bool = False  # longer than max_new_tokens, so the rest is missing


@torch.no_grad()
def listen(model, recordings):
    """Encodes recordings, each a list of windows (F, 160), or of encoder states (F, D). Returns for each a list of audio
    embeddings (A, D)."""
    device, flat = next(model.parameters()).device, [window for recording in recordings for window in recording]
    heard = [None] * len(flat)
    for batch in cut(sorted((len(window), 0, i) for i, window in enumerate(flat)), BATCH_FRAMES, math.inf):
        features = torch.cat([flat[i] for i in batch])
        audio, lengths = model.encode(features.to(device), [len(flat[i]) for i in batch])
        for i, part in zip(batch, audio.split(lengths)):
            heard[i] = part
    parts = iter(heard)
    return [[next(parts) for _ in recording] for recording in recordings]


def hear_waves(model, waves, longest):
    """listen to waveforms (N,), each cut into windows of at most `longest` seconds."""
    device = next(model.parameters()).device
    made = [fbank(windows(wave.to(device), longest)) for wave in waves]
    return listen(model, [features.split(lengths) for features, lengths in made])


def pack(rows, device):
    """Lists of ids -> ids (N,) of all rows end to end, their lengths."""
    return torch.tensor([token for row in rows for token in row], device=device), [len(row) for row in rows]


@torch.no_grad()
def answer_rows(model, tokenizer, rows, heard, form="text", refuse_above=None, weigh=False, on_text=None, batch_size=16,
                max_new_tokens=MAX_NEW_TOKENS, **options):
    """Answers the instruction of every row about its recording.

    rows: manifest rows, whose text is not shown to the model. heard: for each row what listen gave for its recording;
    rows that share it share its place in the LLM's cache. asr and st are answered window by window and joined, sqa
    hears all windows at once. refuse_above: a question with a greater margin is refused; None leaves that to the model,
    and weigh asks for the margins all the same. on_text gets each new piece of the first row's text as it is made.
    options: of generate. Returns for each row an Answer, or an AudioError if it does not fit into the LLM's context.
    """
    llm, device, weigh = model.llm.config, next(model.parameters()).device, weigh or refuse_above is not None
    whole = {id(parts): parts if len(parts) == 1 else [torch.cat(parts)] for parts in heard}
    found, shown, pieces = [{} for _ in rows], "", []  # row -> window -> Answer; pieces: row, window, (A, D), ids
    for i, (row, parts) in enumerate(zip(rows, heard)):
        for w, audio in enumerate(whole[id(parts)] if row["task"] == "sqa" else parts):
            ids, _ = render({**row, "text": None}, len(audio), tokenizer, llm.eos_token_id[0], form)
            pieces.append((i, w, audio, ids))
            if len(ids) + 32 > llm.max_position_embeddings:
                found[i] = AudioError(f"{0.08 * len(audio):.0f} s of audio and the instruction take {len(ids)} of the "
                                      f"LLM's {llm.max_position_embeddings} positions, which leaves no room for an "
                                      "answer; ask about a shorter part")
    pieces = [piece for piece in pieces if not isinstance(found[piece[0]], AudioError)]
    if on_text is None:
        pieces.sort(key=lambda piece: -len(piece[2]))

    def show(text, last=False):
        nonlocal shown
        text = join([*(answer.text for answer in found[0].values()), text])
        if last or not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            on_text(text[len(shown):] if text.startswith(shown) else "\n" + text)  # anew if a loop was cut off
            shown = text

    for some in cut([(len(piece[3]), 1, piece) for piece in pieces], BATCH_POSITIONS, batch_size):
        live, firsts = [], [len(ids) - ids[::-1].index(AUDIO) for *_, ids in some]  # where the instruction begins
        begun = {id(audio): (audio, ids[:first]) for (*_, audio, ids), first in zip(some, firsts)}
        audios, begins = zip(*begun.values())
        prefix = model.read(*pack(begins, device), heard=(torch.cat(audios), [len(audio) for audio in audios]))
        asked = [ids[first:] for (*_, ids), first in zip(some, firsts)]
        of = [list(begun).index(id(audio)) for _, _, audio, _ in some]
        room = llm.max_position_embeddings - max(len(ids) for *_, ids in some)
        continued = {"max_new_tokens": min(max_new_tokens, room), "stop_loops": True, **options}

        def on_token(b, token):
            if b == 0:
                live.append(token)
                show(tokenizer.decode(live))

        if on_text and not (weigh and rows[0]["task"] == "sqa") and options.get("num_beams", 1) == 1:
            continued["on_token"] = on_token
        answers = model.generate(*pack(asked, device), prefix=prefix, prefix_rows=of, **continued)
        continued.pop("on_token", None)
        for b, (i, w, *_) in enumerate(some):
            found[i][w] = Answer(tokenizer.decode(answers[b]).strip(), cut=len(answers[b]) == continued["max_new_tokens"])
            if rows[i]["task"] == "sqa" and weigh:
                found[i][w] = weigh_answer(model, tokenizer, rows[i], asked[b], answers[b], refuse_above,
                                           prefix=prefix, prefix_rows=of[b:b + 1], **continued)._replace(
                                               cut=found[i][w].cut)
        if on_text:
            show("", last=True)
    return [said if isinstance(said, AudioError) else Answer(
        join([said[w].text for w in sorted(said)]), *said[0][1:3], any(part.cut for part in said.values()))
        for said in found]


def weigh_answer(model, tokenizer, row, asked, said, refuse_above, prefix, prefix_rows, **options):
    """The Answer to a question: what the model said or, if it refused, the best it would have said instead, against
    refusing; in the row's language if that is known, else in the likeliest. asked, said: ids."""
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    text, texts = tokenizer.decode(said).strip(), list(REFUSALS.values())
    own = [REFUSALS[row["target_language"]]] if row["target_language"] in REFUSALS else texts
    device, end = next(model.parameters()).device, model.llm.config.eos_token_id[0]
    if text in texts:
        firsts = {encode(refusal)[0] for refusal in texts}
        said, = model.generate(*pack([asked], device), prefix=prefix, prefix_rows=prefix_rows, never_first=firsts,
                               **options)
    candidates = [ids + [end] for ids in (said, *map(encode, own))]
    scores = model.score(*pack([asked + ids for ids in candidates], device), [len(ids) for ids in candidates], prefix,
                         prefix_rows * len(candidates))
    margin, other = (scores[1:].logsumexp(0) - scores[0]).item(), tokenizer.decode(said).strip()
    if refuse_above is not None:
        text = own[scores[1:].argmax()] if margin > refuse_above else other
    return Answer(text, margin, other)


# ----------------------------------------------------------------------------------------------------------------------
# The program


def expect_words(state, path):
    if state["config"]["prompt"] == "tokens":
        raise CheckpointError(f"{path}: knows <|language|><|task|> prompts only, not instructions in words; train with "
                              "--prompt text")


def ask(model, tokenizer, state, heard, instruction, on_text=None, **options):
    """The answer to an instruction in words about a recording, as listen gave it. Raises AudioError."""
    row = {"instruction": instruction, "task": task_of(instruction), "target_language": language_of(instruction)}
    if state["config"]["phase"] == "align" and row["task"] != "asr":
        print("sample.py: this checkpoint was trained on transcribing only (phase align); trying", file=sys.stderr)
    if row["target_language"] is None:
        print(f"sample.py: no word of {instruction!r} is known in {', '.join(INSTRUCTIONS['targets'])}, the languages of "
              "the training instructions; trying", file=sys.stderr)
    answer, = answer_rows(model, tokenizer, [row], [heard], "text", state.get("refuse_above"), on_text=on_text, **options)
    if isinstance(answer, AudioError):
        raise answer
    if answer.cut:
        print(f"sample.py: the answer is longer than {MAX_NEW_TOKENS} tokens a window; the rest is missing", file=sys.stderr)
    return row["task"], answer


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("audio", nargs="+", help="recordings, and behind them the instruction, such as "
                        '"Transcribe the English speech."; without one you are asked for instructions')
    parser.add_argument("--ckpt", help="checkpoint; otherwise the newest of out/ift.pt and out/align.pt")
    parser.add_argument("--json", action="store_true", help="print one JSON object per recording and instruction")
    parser.add_argument("--beams", type=int, default=1, help="beam search with so many beams; 1 is greedy")
    parser.add_argument("--temperature", type=float, default=0.0, help="draw the answer at random at this temperature")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--int8", action="store_true", help="8-bit LLM weights: less memory, faster one answer at a time")
    args = parser.parse_args(argv)
    *files, last = args.audio
    if not files or os.path.exists(last) or re.fullmatch(r"\S*[.](wav|flac|mp3|ogg|opus|oga|aiff?|m4a)", last, re.I):
        files, instruction = args.audio, None
    elif not last.strip():
        parser.error("the instruction is empty; say what to do, such as \"Translate to German\"")
    else:
        instruction = last
    if args.beams < 1 or args.temperature < 0 or not 0 < args.top_p <= 1 or args.beams > 1 and args.temperature:
        parser.error("--beams is at least 1, --temperature at least 0, --top-p within 0 and 1; beams do not draw")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"num_beams": args.beams, "temperature": args.temperature, "top_p": args.top_p,
               "generator": torch.Generator(device).manual_seed(args.seed)}
    try:
        waves = {file: load_audio(file) for file in files}
        model, tokenizer, state = load_model(ckpt := args.ckpt or newest_checkpoint(), device, args.int8)
        expect_words(state, ckpt)
    except (AudioError, CheckpointError) as error:
        sys.exit(f"sample.py: {error}")
    heard, failed = {}, False
    for instruction in [instruction] if instruction else iter(ask_user, None):
        for file, wave in waves.items():
            if file not in heard:
                heard[file], = hear_waves(model, [wave], state["window"])
            live = None if args.json else lambda text: print(visible(text, keep="\n\t"), end="", flush=True)
            if len(files) > 1 and not args.json:
                print(visible(f"{file}: "), end="")
            try:
                task, answer = ask(model, tokenizer, state, heard[file], instruction, live, **options)
            except AudioError as error:
                failed = True
                print(f"sample.py: {visible(file)}: {error}", file=sys.stderr)
                continue
            print(visible(json.dumps({"audio": file, "instruction": instruction, "task": task, "text": answer.text,
                                      "seconds": len(wave) / SAMPLE_RATE}, ensure_ascii=False)) if args.json else "")
    if failed:
        sys.exit(1)


def ask_user():
    """An instruction typed by the user; None when there is none any more."""
    try:
        return input("instruction> " if sys.stdin.isatty() else "").strip() or None
    except (EOFError, KeyboardInterrupt):
        return None


if __name__ == "__main__":
    main()
