"""What is compiled where a GPU trains: layers, and one attention kernel for all rows of a batch, by PyTorch's flex_attention
(arXiv 2412.05496)."""

import os
import shutil
import sys
import sysconfig
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 128  # positions: what of the mask is decided at once
BUCKET = 512  # positions: the smallest size that a batch is filled up to


def bucket(n):
    """The size that a batch of n positions is filled up to, at most four sizes for every power of two: for each the kernel
    is compiled once."""
    step = max(BUCKET, (1 << n.bit_length()) // 8)
    return -(-n // step) * step


def attend_flex(flex_attention, q, k, v, rows, bias=None):
    """attend by flex_attention, which looks the bias up itself, on a batch that is filled up to its bucket. Heads are at
    least 16 wide."""
    rows.mask = document_mask(rows.row, rows.causal) if rows.mask is None else rows.mask
    spare = bucket(len(q)) - len(q)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, spare)).transpose(0, 1)[None] for x in (q, k, v))  # (1, H, N', d)
    score = None
    if bias is not None:
        bias, (left, right) = F.pad(bias, (0, 0, 0, 0, 0, spare)), rows.reach

        def score(score, b, head, i, j):
            return score + bias[i, head, (j - i).clamp(-left, right) + left]

    y = flex_attention(q, k, v, score, rows.mask, enable_gqa=q.shape[1] != k.shape[1])
    return y[0].transpose(0, 1)[:len(rows.row)]


def document_mask(row, causal):
    """The block mask of flex_attention: a position sees its own row (N,), up to itself if causal. Rows stand in order, so
    the first and the last position of a block tell which rows it touches."""
    from torch.nn.attention.flex_attention import BlockMask  # takes half a second, so only when needed
    N = bucket(len(row))
    row = F.pad(row, (0, N - len(row)), value=len(row))  # what fills up is a row of its own
    first, last = row[::BLOCK], row[BLOCK - 1::BLOCK]  # (N / BLOCK,)
    touched = (first[:, None] <= last) & (first <= last[:, None])  # of each block of queries, the blocks of keys
    whole = (first == last)[:, None] & (first == last) & (first[:, None] == first)
    if causal:
        touched, whole = touched.tril(), whole.tril(-1)

    def listed(blocks):  # how many blocks each line has, and which, the others behind them
        return blocks.sum(1, dtype=torch.int32)[None, None], (~blocks).int().argsort(dim=1, stable=True).int()[None, None]

    def sees(b, head, i, j):
        return (row[i] == row[j]) & (j <= i) if causal else row[i] == row[j]

    return BlockMask.from_kv_blocks(*listed(touched & ~whole), *listed(whole), BLOCK, sees, (N, N))


@cache
def compiler_found():
    """Whether there is Triton and the C compiler that it needs, and PyTorch's TORCH_COMPILE_DISABLE is not 1. If not, nothing
    is compiled, which is said once."""
    from torch.utils._triton import has_triton
    found = any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]))
    found = found and Path(sysconfig.get_path("include"), "Python.h").exists() and has_triton()
    found = found and os.environ.get("TORCH_COMPILE_DISABLE") != "1"
    if not found:
        print("training is not compiled and therefore slower: it needs Triton, a C compiler (gcc), Python's headers, and "
              "TORCH_COMPILE_DISABLE not set", file=sys.stderr)
    return found


@cache
def compiled_flex():
    """attend_flex with its kernel compiled once a bucket; compiled layers call it as it is."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.config.recompile_limit = 256
    return as_it_is(partial(attend_flex, torch.compile(flex_attention, fullgraph=True, dynamic=False)))


@cache
def as_it_is(function):
    """A function that compiled layers call without compiling it: a convolution would be compiled for every size."""
    return torch.compiler.disable(function)


@cache
def compiled_call():
    """A layer's call, compiled once for each kind of layer and for batches of any size."""
    import torch._dynamo
    torch._dynamo.config.optimize_ddp = False  # which would cut the compiled layers to pieces
    return torch.compile(nn.Module.__call__, dynamic=True)
