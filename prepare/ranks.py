"""Programs run by several processes, the ranks, which torchrun starts: on a GPU each, or on a CPU.

Without torchrun there is one rank and no process group, and every function here does the plain thing.
"""

import itertools
import os
import re
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from prepare.errors import RankError

TIMEOUT = timedelta(minutes=30)  # that a rank waits for the others; the longest wait is for rank 0 to write a checkpoint


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device):
    """Joins the other ranks, if torchrun started this process: by gloo, and by nccl on CUDA, where each rank of a machine
    has a GPU of its own. Rank 0 alone prints from here on. Raises RankError."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise RankError(f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} ranks on this machine, found "
                            f"{torch.cuda.device_count()} GPUs; give --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


@contextmanager
def ranks():
    """What a program does on every rank. An error of all ranks is told by the first of each machine, as torchrun ends
    the others; one of a single rank by that rank. Raises RankError when another rank is gone."""
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)
        broken = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo/" in str(error)
        if dist.is_initialized() and broken:
            reason = re.sub(r"^\[.*?\] |[.] .*", "", str(error).splitlines()[0])
            raise RankError(f"rank {rank()} of {world()} lost another rank, whose own message says why ({reason}); what "
                            "was saved is intact: start all of them again, train.py with --resume") from error
        raise


def gather(value):
    """The values of all ranks, in their order. Every rank must take part."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def seed_for(seed, position):
    """Makes dropout and masks of a batch follow from its place in the schedule, so that they are the same on any rank
    and after any pause."""
    torch.manual_seed(int(np.random.SeedSequence([seed, position["pool"], position["batch"]]).generate_state(1)[0]))


def deal(order, size, total):
    """This rank's batches of a schedule, of which each step takes the next `total` over all ranks. size(*key) gives the
    frames and LLM positions of a row.

    Longest first, every rank gets a batch in turn, and the longer of these goes to the rank with the least to do; so the
    ranks have equally many, of similar cost at any time. Where the batches of a step do not suffice a rank gets an
    empty one. The sum over a step does not depend on who takes which.
    """
    if world() == 1:
        yield from order
    while True:
        step = list(itertools.islice(order, total))
        costs = [sum(sum(size(*key)) for key in batch) for _, batch in step]
        longest, loads = sorted(range(total), key=lambda i: -costs[i]), [0] * world()
        for i in range(0, total, world()):
            idle = sorted(range(world()), key=loads.__getitem__)
            mine = step[-1][0], []
            for taker, n in zip(idle, longest[i:i + world()]):
                loads[taker] += costs[n]
                mine = step[n] if taker == rank() else mine
            yield mine


def together(batches):
    """Of a step's batches, which every rank gives its own of: the place in the schedule behind them all, how many rows
    were drawn, {file and line: reason} of those that could not be used, target tokens, seconds of audio."""
    found = gather([(batch["position"], len(batch["rows"]), batch["bad"], len(batch["targets"]),
                     sum(batch["lengths"]) if batch["rows"] else 0) for batch in batches])
    places, rows, missed, tokens, frames = zip(*itertools.chain(*found))
    position = max(places, key=lambda place: (place["pool"], place["batch"]))
    return position, sum(rows) + sum(map(len, missed)), dict(itertools.chain(*missed)), sum(tokens), sum(frames) / 50
