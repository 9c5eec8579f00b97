"""A local LLM that writes training data, in batches, and the file in which every row is kept as soon as it is made."""

import itertools
import json
import math
import os
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from data import cut
from model import LLM, Prefix, SpeechLM
from prepare.checkpoint import fetch, load_tokenizer, write_text
from prepare.errors import CheckpointError
from sample import BATCH_POSITIONS, pack

CHATML = "<|im_start|>", "<|im_end|>"
WINDOW = 2048  # rows that are sorted by length together
SCORED = 1024  # tokens whose log p is computed at once


class Writer(NamedTuple):
    model: SpeechLM  # without ears
    tokenizer: Tokenizer
    end: int  # the token that ends an answer
    chat: str  # a prompt as the LLM was trained to read it, with %s where the text goes
    context: int  # tokens


def load_writer(path, device=None, dtype=None):
    """An LLM that chats in ChatML, a directory or a Hub id; unless told otherwise on CUDA if there is any, and in
    bfloat16 where that is fast. Raises CheckpointError."""
    directory = fetch(path)
    tokenizer = load_tokenizer(directory)
    end = tokenizer.token_to_id(CHATML[1])
    if end is None or tokenizer.token_to_id(CHATML[0]) is None:
        raise CheckpointError(f"{path}: its tokenizer has no {' and '.join(CHATML)}, expected an LLM that chats in "
                              "ChatML; give Qwen2.5-Instruct or kin")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    llm = LLM.from_pretrained(directory, dtype or (torch.bfloat16 if fast else torch.float32), device=device)
    llm.config.eos_token_id = list(dict.fromkeys([*llm.config.eos_token_id, end]))
    chat = "{0}system\nYou are a helpful assistant.{1}\n{0}user\n%s{1}\n{0}assistant\n".format(*CHATML)
    if llm.config.model_type == "qwen3":
        chat += "<think>\n\n</think>\n\n"  # how its own template tells it not to think aloud
    return Writer(SpeechLM(None, None, llm).eval(), tokenizer, llm.config.eos_token_id[0], chat,
                  llm.config.max_position_embeddings)


def device_of(writer):
    return next(writer.model.parameters()).device


def encode(writer, text):
    return writer.tokenizer.encode(text, add_special_tokens=False).ids


def decode(writer, ids):
    return writer.tokenizer.decode(ids).strip()


def prompt(writer, text):
    """The ids of a text as the user's turn, up to where the answer begins."""
    return encode(writer, writer.chat % text.replace("<|", "< |"))


class Asked(NamedTuple):
    prefix: Prefix  # the prompts but for their last tokens, read
    last: list


def ask(writer, prompts):
    """Reads prompts, each a list of ids, once for all that is said and weighed after them."""
    packed = pack([ids[:-1] for ids in prompts], device_of(writer))
    return Asked(writer.model.read(*packed), [ids[-1:] for ids in prompts])


def say(writer, asked, limits, never_first=()):
    """The greedy answers, as lists of ids, of at most so many tokens each."""
    room = writer.context - max(asked.prefix.lengths) - 1
    answers = writer.model.generate(*pack(asked.last, device_of(writer)), prefix=asked.prefix, never_first=never_first,
                                    max_new_tokens=min(max(limits), room))
    return [ids[:limit] for ids, limit in zip(answers, limits)]


def weigh(writer, asked, answers):
    """(log p in nats, tokens) of an answer, a list of ids, to each prompt; its end counts as a token."""
    found = []
    for rows in cut([(len(ids) + 1, 1, row) for row, ids in enumerate(answers)], SCORED, math.inf):
        ids = [answers[row] + [writer.end] for row in rows]
        packed = pack([asked.last[row] + some for row, some in zip(rows, ids)], device_of(writer))
        lengths = [len(some) for some in ids]
        found += zip(writer.model.score(*packed, lengths, asked.prefix, rows).tolist(), lengths)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Rows, kept as they are made


def journal(path, settings):
    """The ids of the rows that a run with the same settings left in `path`, and how many of them fail nothing. Rows of
    other settings are moved aside."""
    settings_path, done, kept, end = path.with_suffix(".json"), set(), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        same = json.loads(settings_path.read_text(encoding="utf-8")) == settings
    except (OSError, ValueError):
        same = False
    if not same and path.exists() and path.stat().st_size:
        aside = next(p for n in itertools.count(1) if not (p := path.with_suffix(f".old{n}.jsonl")).exists())
        os.replace(path, aside)
        print(f"{path}: held rows of other settings, now in {aside}")
    write_text(settings_path, json.dumps(settings, ensure_ascii=False))
    with open(path, "ab+") as file:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):  # torn by a kill
                break
            row, end = json.loads(line), end + len(line)
            done.add(row["id"])
            kept += not row["reasons"]
        file.truncate(end)
    if done:
        print(f"{path}: {len(done)} rows are there already")
    return done, kept


def produce(writer, path, settings, items, prepare, write, judge, batch):
    """Makes the row of every item and appends it to `path`, but for those that are there already.

    items: tuples of an id and what else prepare(*item) wants to make a job of it: a dict with "row", a manifest row
    that lacks what the LLM is to write, and "size", the most tokens it takes. write(jobs) fills the rows of a batch in.
    judge(made_by) gives the reasons against a row. Batches depend on the items alone, so that a run which was stopped
    and went on gives the same as one which was not."""
    done, kept = journal(path, settings)
    made = len(done)
    bar = tqdm(total=len(items), initial=made, desc=path.name, unit=" rows", dynamic_ncols=True)
    with open(path, "a", encoding="utf-8") as file:
        for i in range(0, len(items), WINDOW):
            window = items[i:i + WINDOW]
            if all(item[0] in done for item in window):
                continue
            jobs = [prepare(*item) for item in window]
            jobs.sort(key=lambda job: (job["row"]["made_by"]["kind"], job["size"]))
            for some in cut([(job["size"], 1, job) for job in jobs], BATCH_POSITIONS, batch):
                rows = [job["row"] for job in some]
                if all(row["id"] in done for row in rows):
                    continue
                for job in some:
                    if job["size"] > writer.context:
                        job["row"]["made_by"].setdefault("failed", "too long")
                if live := [job for job in some if "failed" not in job["row"]["made_by"]]:
                    write(live)
                for row in rows:
                    if row["id"] not in done:
                        row["reasons"] = judge(row["made_by"])
                        made, kept = made + 1, kept + (not row["reasons"])
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                bar.set_postfix(kept=f"{100 * kept / made:.0f} %")
                bar.update(made - bar.n)
    bar.close()
