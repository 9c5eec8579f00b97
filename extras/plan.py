"""Looks ahead, for train.py: what a run would read, what it would need, how large its batches can
be. Without this file these three options are refused, and a run is the same."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from model import AUDIO, UserError, visible

FULL = 0.85  # the share of a GPU's memory that a step may take
LESS_MEMORY = (
    "lower --batch-frames and --batch-tokens, or give --checkpointing, --lora-rank 16 or, with "
    "several GPUs, --fsdp"
)


def show_batch(run, schedule: Callable) -> None:
    """Prints the sequences of a run's first batch: what is read, what is to be answered, and the
    ids, of which the loss counts those of the answer."""
    batch, begin = run.examples[next(schedule(run))], 0
    decode = partial(run.examples.tokenizer.decode, skip_special_tokens=False)
    targets = set(batch["targets"].tolist())
    for example, length in zip(batch["examples"], batch["ids_lengths"], strict=True):
        numbered = list(enumerate(batch["ids"][begin : begin + length].tolist(), begin))
        prompt = [token for place, token in numbered if place not in targets]
        answer = [token for place, token in numbered if place in targets]
        text = [token for token in prompt if token != AUDIO]
        begin += length
        print(visible(f"{example['where']}: {example['task']} of {example['audio']}"))
        print(f"  audio   {prompt.count(AUDIO)} frames of 80 ms, no loss")
        print(f"  prompt  {visible(repr(decode(text)))}, no loss, ids {text}")
        print(f"  answer  {visible(repr(decode(answer)))}, loss, ids {answer}")
    for where, why in batch["bad"]:
        print(visible(f"left out: {where}: {why}"))


def largest_batches(run, schedule: Callable) -> list[tuple]:
    """The three largest of the next 200 batches, the largest first."""
    scheduled = islice(schedule(run), 200)
    return sorted(scheduled, key=lambda entry: -sum(sum(run.size(*key)) for key in entry[1]))[:3]


def dry_run(
    run, schedule: Callable, backward: Callable, update: Callable, steps_of_a_pass: float
) -> None:
    """Takes the largest steps of the first 200 batches, and prints what the run would need. Raises
    UserError if they do not fit into memory."""
    cfg, seconds = run.cfg, []
    try:
        for entry in largest_batches(run, schedule):
            began = time.time()
            batch = run.examples[entry]
            loss, norm = backward(run, [batch], max(1, len(batch["targets"])))
            update(run, loss, norm)
            loss.item()  # waits for the GPU
            seconds.append(time.time() - began)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise UserError(f"the largest batches do not fit into memory; {LESS_MEMORY}") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cfg.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    step = statistics.median(seconds) * cfg.accumulate
    print(
        f"dry run: peak memory {peak / 1e9:.2f} GB, {step:.2f} s a step of the largest batches, "
        f"at most {step * cfg.steps / 3600:.1f} h for {cfg.steps} steps, which pass over the data "
        f"{cfg.steps / steps_of_a_pass:.1f} times; validations and the encoder cache come on top"
    )


def fit_batches(run, schedule: Callable, on_device: Callable):
    """The config of a run with the largest --batch-frames, and as much larger --batch-tokens, with
    which the largest step takes at most FULL of the GPU's memory. Raises UserError if none do."""
    cfg, best, frames = run.cfg, None, 1000
    while frames < 10**6:
        tokens = round(frames * cfg.batch_tokens / 3000)  # in the proportion of the defaults
        larger = replace(cfg, batch_frames=frames, batch_tokens=tokens)
        trial = replace(run, cfg=larger)
        batch = run.examples[largest_batches(trial, schedule)[0]]
        if memory_share(run.model, on_device(batch, cfg.device)) > FULL:
            break
        best, frames = larger, round(1.25 * frames)
    if best is None:
        raise UserError(f"a batch of {frames} frames does not fit into memory; {LESS_MEMORY}")
    print(f"--batch-frames {best.batch_frames} --batch-tokens {best.batch_tokens} fit into memory")
    return best


def memory_share(model: torch.nn.Module, inputs: dict) -> float:
    """The share of a GPU's memory that a step on these inputs takes, with AdamW's moments."""
    torch.cuda.reset_peak_memory_stats()
    try:
        model(**inputs)[0].backward()
    except torch.OutOfMemoryError:
        return 1.0
    finally:
        model.zero_grad()
    moments = sum(8 * p.numel() for p in model.parameters() if p.requires_grad)
    return (torch.cuda.max_memory_allocated() + moments) / torch.cuda.mem_get_info()[1]
