"""Kernels for CUDA, in Triton: attention with clipped relative keys, and the depthwise convolution.

Both give what the operators of the same names in model.py give, values and gradients, and the same
bits every time, as nothing is added atomically. Triton comes with PyTorch for CUDA; its interpreter
(TRITON_INTERPRET=1) runs the kernels on a CPU. They were not run on CUDA.

Letters in shape comments: N positions of all rows of a batch, n of one row, m queries and k keys of
a tile, H heads, d width of a head, D channels.
"""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import model

# Triton compiles its launcher when it first runs a kernel.
HEADER = Path(sysconfig.get_path("include"), "Python.h")
if not (shutil.which(os.environ.get("CC", "gcc")) and HEADER.exists()):
    raise ImportError("Triton needs gcc and Python's headers")

# Queries and keys of a tile, warps, and stages of the pipeline: of the kernel that computes
# attention, and of those for the gradients of queries and biases, and of keys and values; by the
# bytes of a number. With heads of 64 none spills, see tests/bench/kernels.py.
TILES = {
    2: ((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2)),
    4: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
# Frames and channels that a program of the convolution computes, and one of its weights' gradients.
FRAME_TILE = (32, 64)
WEIGHT_TILE = (64, 64)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2 ** (x * LOG2E), and 2 ** x is one instruction


# --- Attention


def attend(q, k, v, rows, causal=False, bias=None, left=0, dropout=0.0) -> Tensor:
    """Attention within each row: q (N, H, d), k and v (N, Hkv, d) -> (N, H, d).

    rows: model.Rows. bias (N, H, left + 1 + right): what relative keys add to the scores of a
    query; keys further away take the outermost. Without it, or with dropout, PyTorch's kernels are
    used.
    """
    if bias is None or dropout:
        return model.attend_varlen(q, k, v, rows, causal, bias, left, dropout)
    # Kernels compute widths that are powers of two.
    d = q.shape[2]
    spare = max(16, triton.next_power_of_2(d)) - d
    if spare:
        q, k, v = (F.pad(x, (0, spare)) for x in (q, k, v))
    places = rows.begin, rows.count, rows.longest, left
    y, _ = relative_attention(q, k, v, bias, *places, d**-0.5)
    return y[..., :d] if spare else y


@torch.library.custom_op("speech_lm::relative_attention", mutates_args=())
def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    begin: Tensor,
    count: Tensor,
    n: int,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (N, H, d), and of each query the logarithm to base 2 of the sum of its exponentials (N, H),
    from which the backward pass computes the weights again. n: the length of the longest row;
    scale: of the products of queries and keys."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    bias = evenly_spaced(bias)
    y, lse = empty_results(q)
    launch(0, (begin, count, n, left, scale), q, k, v, bias, y, lse)
    return y, lse


@torch.library.custom_op("speech_lm::relative_attention_gradients", mutates_args=())
def relative_attention_gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    y: Tensor,
    lse: Tensor,
    begin: Tensor,
    count: Tensor,
    n: int,
    left: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of q, k, v (N, H, d) and of the biases (N, H, places)."""
    dy, q, k, v = (x.contiguous() for x in (dy, q, k, v))
    bias = evenly_spaced(bias)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    d_bias = bias.new_zeros(bias.shape)  # a place without a key stays zero
    delta = torch.empty_like(lse)
    rows = begin, count, n, left, scale
    launch(1, rows, q, k, v, bias, y, lse, dy, delta, dq, d_bias)
    launch(2, rows, q, k, v, bias, lse, dy, delta, dk, dv)
    return dq, dk, dv, d_bias


def evenly_spaced(bias: Tensor) -> Tensor:
    """Biases (N, H, places) whose lines may be part of longer ones, but lie one behind another."""
    step, line, inner = bias.stride()
    return bias if inner == 1 and step == bias.shape[1] * line else bias.contiguous()


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def save_attention(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, begin, count, ctx.n, ctx.left, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, begin, count)


def attention_backward(ctx, dy: Tensor, _) -> tuple:
    sizes = ctx.n, ctx.left, ctx.scale
    return *relative_attention_gradients(dy, *ctx.saved_tensors, *sizes), *[None] * 5


# What the compiler needs to know, so that layers are traced without a break.
relative_attention.register_fake(lambda q, *_: empty_results(q))
relative_attention_gradients.register_fake(
    lambda dy, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:4])
)
relative_attention.register_autograd(attention_backward, setup_context=save_attention)


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    heads: int
    width: int  # of a head
    places: int  # of a bias
    line: int  # from those of one head to those of the next, in memory
    left: int
    scale: float
    queries: int  # of a tile
    keys: int


def launch(step: int, rows: tuple, *tensors: Tensor) -> None:
    """Runs one of the three kernels on its tensors, the first of which are queries, keys, values
    and biases. rows: where they begin and their lengths (B,), the longest, how far left keys are
    told apart, and the scale of products."""
    begin, count, n, left, scale = rows
    q, _, _, bias, *_ = tensors
    queries, keys, warps, stages = TILES[q.element_size()][step]
    sizes = Sizes(*q.shape[1:], bias.shape[2], bias.stride(1), left, scale, queries, keys)
    tiles = triton.cdiv(n, keys if step == 2 else queries)
    kernel = (attention, query_gradients, key_gradients)[step]
    with torch.cuda.device_of(q):
        grid = kernel[tiles, len(count), sizes.heads]
        grid(*tensors, begin, count, sizes, num_warps=warps, num_stages=stages)


@triton.jit
def extent(begin, count, C: tl.constexpr):
    """Of this program's row the length, and the place of its first line of this head, int64."""
    row = tl.program_id(1)
    first = tl.load(begin + row).to(tl.int64) * C.heads + tl.program_id(2)
    return tl.load(count + row).to(tl.int32), first


@triton.jit
def lines(x, at, n, C: tl.constexpr):
    """Pointers to the lines (d) of one head at positions `at`, and which are there."""
    column = tl.arange(0, C.width)[None]
    return x + at[:, None] * (C.heads * C.width) + column, (at[:, None] < n) & (column >= 0)


@triton.jit
def load_lines(x, at, n, C: tl.constexpr):
    """Lines of one head, zeros from position n on: (m, d) or (k, d)."""
    pointers, there = lines(x, at, n, C)
    return tl.load(pointers, mask=there, other=0.0)


@triton.jit
def store_lines(x, values, at, n, C: tl.constexpr):
    pointers, there = lines(x, at, n, C)
    tl.store(pointers, values, mask=there)


@triton.jit
def load_bias(bias, i, place, n, C: tl.constexpr):
    """The biases of queries i at these places, to base 2, of the shape that both broadcast to."""
    x = tl.load(bias + (i * (C.heads * C.line) + place), mask=i + 0 * place < n, other=0.0)
    return x.to(tl.float32) * LOG2E


@triton.jit
def places(i, j, C: tl.constexpr):
    """The place of the bias of queries i for keys j."""
    return tl.minimum(tl.maximum(j - i + C.left, 0), C.places - 1)


@triton.jit
def keys_on_side(side: tl.constexpr, at, n, FAR: tl.constexpr, NEAR: tl.constexpr, M, K):
    """(start, stop): of a row's n keys, in tiles of K, those that lie left of the band of M queries
    from position `at` on (side 0), across it (1), or right of it (2). Left are tiles whose every
    key is FAR or more left of each query, right those NEAR or more right of it."""
    first = tl.minimum(tl.maximum(at - FAR + 1, 0) // K * K, n)
    end = tl.minimum((at + M - 1 + NEAR + K - 1) // K * K, n)
    if side == 0:
        return 0, first
    elif side == 1:
        return first, end
    else:
        return end, n


@triton.jit
def scores(x, keys, bias, added, i, j, n, side: tl.constexpr, C: tl.constexpr):
    """The scores (m, k), to base 2, of queries x (m, d) at positions i for keys (k, d) at j. added:
    the bias of each query beside the band."""
    s = tl.dot(x, keys.T, input_precision="ieee") * (LOG2E * C.scale)
    if side == 1:
        s += load_bias(bias, i[:, None], places(i[:, None], j[None], C), n, C)
    else:
        s += added
    return tl.where(j[None] < n, s, float("-inf"))


@triton.jit
def attention(q, k, v, bias, y, lse, begin, count, C: tl.constexpr):
    """y (N, H, d) of M queries of a row and head, and their lse (N, H)."""
    M: tl.constexpr = C.queries
    K: tl.constexpr = C.keys
    D: tl.constexpr = C.width
    n, base = extent(begin, count, C)
    m0 = tl.program_id(0) * M
    if m0 >= n:
        return
    k, v, bias = k + base * D, v + base * D, bias + base * C.line
    i = m0 + tl.arange(0, M)
    x = load_lines(q + base * D, i, n, C)  # (m, d)

    # Of each query the highest score, the sum of exponentials, and that of weighted values.
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for side in tl.static_range(3):
        start, stop = keys_on_side(side, m0, n, C.left, C.places - 1 - C.left, M, K)
        added = load_bias(bias, i[:, None], C.places - 1 if side == 2 else 0, n, C)
        for k0 in range(start, stop, K):
            j = k0 + tl.arange(0, K)
            s = scores(x, load_lines(k, j, n, C), bias, added, i, j, n, side, C)
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            values = load_lines(v, j, n, C)
            acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
            top = higher
    store_lines(y + base * D, acc / total[:, None], i, n, C)
    tl.store(lse + base + i * C.heads, top + tl.log2(total), mask=i < n)


@triton.jit
def query_gradients(q, k, v, bias, y, lse, dy, delta, dq, d_bias, begin, count, C: tl.constexpr):
    """dq (N, H, d) and d_bias (N, H, places) of M queries of a row and head; and delta (N, H), the
    sums of y * dy, for the other kernel. A place between the two outermost has one key at most, so
    its gradient is stored where the score is; those of the outermost are summed."""
    M: tl.constexpr = C.queries
    K: tl.constexpr = C.keys
    D: tl.constexpr = C.width
    n, base = extent(begin, count, C)
    m0 = tl.program_id(0) * M
    if m0 >= n:
        return
    k, v = k + base * D, v + base * D
    bias, d_bias = bias + base * C.line, d_bias + base * C.places
    i = m0 + tl.arange(0, M)
    x = load_lines(q + base * D, i, n, C)  # (m, d)
    dx = load_lines(dy + base * D, i, n, C)
    d_total = tl.sum(load_lines(y + base * D, i, n, C).to(tl.float32) * dx, 1)  # (m,)
    tl.store(delta + base + i * C.heads, d_total, mask=i < n)
    total = tl.load(lse + base + i * C.heads, mask=i < n, other=float("inf"))

    d_first = tl.zeros((M,), tl.float32)
    d_last = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for side in tl.static_range(3):
        start, stop = keys_on_side(side, m0, n, C.left, C.places - 1 - C.left, M, K)
        added = load_bias(bias, i[:, None], C.places - 1 if side == 2 else 0, n, C)
        for k0 in range(start, stop, K):
            j = k0 + tl.arange(0, K)
            keys = load_lines(k, j, n, C)
            s = scores(x, keys, bias, added, i, j, n, side, C)
            dp = tl.dot(dx, load_lines(v, j, n, C).T, input_precision="ieee")
            ds = tl.exp2(s - total[:, None]) * (dp - d_total[:, None])
            if side == 0:
                d_first += tl.sum(ds, 1)
            elif side == 1:
                place = places(i[:, None], j[None], C)
                inner = (place > 0) & (place < C.places - 1) & (i[:, None] < n) & (j[None] < n)
                pointers = d_bias + i[:, None] * (C.heads * C.places) + place
                tl.store(pointers, ds, mask=inner)
                d_first += tl.sum(tl.where(place == 0, ds, 0.0), 1)
                if C.places > 1:
                    d_last += tl.sum(tl.where(place == C.places - 1, ds, 0.0), 1)
            else:
                d_last += tl.sum(ds, 1)
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")
    store_lines(dq + base * D, acc * C.scale, i, n, C)
    outermost = d_bias + i * (C.heads * C.places)
    if C.places > 1:
        tl.store(outermost + (C.places - 1), d_last, mask=i < n)
    else:
        d_first += d_last
    tl.store(outermost, d_first, mask=i < n)


@triton.jit
def key_gradients(q, k, v, bias, lse, dy, delta, dk, dv, begin, count, C: tl.constexpr):
    """dk and dv (N, H, d) of K keys of a row and head, from all queries of the row, M at a time.
    Seen from a key, the queries that take their last bias for it are on the left."""
    M: tl.constexpr = C.queries
    K: tl.constexpr = C.keys
    D: tl.constexpr = C.width
    SCALE: tl.constexpr = LOG2E * C.scale
    n, base = extent(begin, count, C)
    k0 = tl.program_id(0) * K
    if k0 >= n:
        return
    q, dy, bias = q + base * D, dy + base * D, bias + base * C.line
    j = k0 + tl.arange(0, K)
    keys = load_lines(k + base * D, j, n, C)  # (k, d)
    values = load_lines(v + base * D, j, n, C)

    k_acc = tl.zeros((K, D), tl.float32)
    v_acc = tl.zeros((K, D), tl.float32)
    for side in tl.static_range(3):
        start, stop = keys_on_side(side, k0, n, C.places - 1 - C.left, C.left, K, M)
        for m0 in range(start, stop, M):
            i = m0 + tl.arange(0, M)
            x = load_lines(q, i, n, C)  # (m, d)
            dx = load_lines(dy, i, n, C)
            # Behind the row's end the weights are 2 ** -inf, and nothing is added.
            total = tl.load(lse + base + i * C.heads, mask=i < n, other=float("inf"))
            d_total = tl.load(delta + base + i * C.heads, mask=i < n, other=0.0)
            s = tl.dot(keys, x.T, input_precision="ieee") * SCALE  # (k, m)
            if side == 1:
                place = places(i[:, None], j[None], C)
                s += load_bias(bias, i[:, None], place, n, C).T  # neighbours in memory, then turned
            else:
                s += load_bias(bias, i[None], C.places - 1 if side == 0 else 0, n, C)
            p = tl.exp2(s - total[None])
            v_acc = tl.dot(p.to(dx.dtype), dx, v_acc, input_precision="ieee")
            dp = tl.dot(values, dx.T, input_precision="ieee")
            ds = p * (dp - d_total[None])
            k_acc = tl.dot(ds.to(x.dtype), x, k_acc, input_precision="ieee")
    store_lines(dk + base * D, k_acc * C.scale, j, n, C)
    store_lines(dv + base * D, v_acc, j, n, C)


# --- Convolution


def depthwise(x: Tensor, weight: Tensor, rows) -> Tensor:
    """As model.depthwise: x (N, D), weight (D, 1, kernel) -> (N, D). Frames are read where they
    are packed; a frame is of the same row as one before it if its place in the row is so high."""
    # Channels that are neighbours in memory are loaded at once.
    taps = weight[:, 0].T.contiguous()  # (kernel, D)
    return depthwise_rows(x, taps, rows.offset)


@torch.library.custom_op("speech_lm::depthwise", mutates_args=())
def depthwise_rows(x: Tensor, taps: Tensor, offset: Tensor) -> Tensor:
    return convolve(x.contiguous(), taps, offset, ahead=False)


@torch.library.custom_op("speech_lm::depthwise_gradients", mutates_args=())
def depthwise_gradients(
    dy: Tensor, x: Tensor, taps: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Those of x (N, D), a convolution that reads ahead, and of taps (kernel, D)."""
    dy, x = dy.contiguous(), x.contiguous()
    N, D = x.shape
    frames, channels = WEIGHT_TILE
    grid = triton.cdiv(N, frames), triton.cdiv(D, channels)
    d_taps = x.new_empty(grid[0], *taps.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        weight_gradients[grid](x, dy, d_taps, offset, N, D, len(taps), frames, channels)
    return convolve(dy, taps, offset, ahead=True), d_taps.sum(0).to(x.dtype)


def convolve(x: Tensor, taps: Tensor, offset: Tensor, ahead: bool) -> Tensor:
    N, D = x.shape
    frames, channels = FRAME_TILE
    y, grid = torch.empty_like(x), (triton.cdiv(N, frames), triton.cdiv(D, channels))
    with torch.cuda.device_of(x):
        taps_sum[grid](x, taps, y, offset, N, D, len(taps), ahead, frames, channels)
    return y


def save_convolution(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


depthwise_rows.register_fake(lambda x, taps, offset: x.new_empty(x.shape))
depthwise_gradients.register_fake(lambda dy, x, w, _: (x.new_empty(x.shape), w.new_empty(w.shape)))
depthwise_rows.register_autograd(
    lambda ctx, dy: (*depthwise_gradients(dy, *ctx.saved_tensors), None),
    setup_context=save_convolution,
)


@triton.jit
def taps_sum(
    x,
    weight,
    y,
    offset,
    N,
    D: tl.constexpr,
    TAPS: tl.constexpr,
    AHEAD: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
):
    """F frames and C channels of y (N, D): the sums of TAPS frames of x times the weights. The last
    weight is for the frame itself, the others for those before it, or AHEAD of it."""
    t = tl.program_id(0) * F + tl.arange(0, F)
    c = tl.program_id(1) * C + tl.arange(0, C)
    place = tl.load(offset + t, mask=t < N, other=-1)
    acc = tl.zeros((F, C), tl.float32)
    for back in tl.static_range(TAPS):
        at = t + back if AHEAD else t - back
        if AHEAD:
            place = tl.load(offset + at, mask=at < N, other=-1)
        # That both are of one row shows at the later of the two.
        there = (place >= back)[:, None] & (c < D)[None]
        frames = tl.load(x + at[:, None].to(tl.int64) * D + c[None], mask=there, other=0.0)
        tap = tl.load(weight + (TAPS - 1 - back) * D + c, mask=c < D, other=0.0)
        acc += frames.to(tl.float32) * tap.to(tl.float32)[None]
    there = (t < N)[:, None] & (c < D)[None]
    tl.store(y + t[:, None].to(tl.int64) * D + c[None], acc, mask=there)


@triton.jit
def weight_gradients(
    x,
    dy,
    d_weight,
    offset,
    N,
    D: tl.constexpr,
    TAPS: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
):
    """The weights' gradients (TAPS, D) of C channels by F frames, to be summed."""
    t = tl.program_id(0) * F + tl.arange(0, F)
    c = tl.program_id(1) * C + tl.arange(0, C)
    place = tl.load(offset + t, mask=t < N, other=-1)
    there = (t < N)[:, None] & (c < D)[None]
    line = t[:, None].to(tl.int64) * D + c[None]
    dy_t = tl.load(dy + line, mask=there, other=0.0).to(tl.float32)
    part = d_weight + tl.program_id(0).to(tl.int64) * (TAPS * D) + c
    for back in tl.static_range(TAPS):
        there = (place >= back)[:, None] & (c < D)[None]
        products = dy_t * tl.load(x + line - back * D, mask=there, other=0.0).to(tl.float32)
        tl.store(part + (TAPS - 1 - back) * D, tl.sum(products, 0), mask=c < D)
