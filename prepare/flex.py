"""Attention of packed rows on CUDA: one kernel for all rows of a batch, by PyTorch's flex_attention (arXiv 2412.05496)."""

from functools import cache

import torch
import torch.nn.functional as F

BUCKET = 512  # the kernel is compiled for every multiple of so many positions


def attend_flex(flex_attention, q, k, v, rows, mask, bias=None):
    """attend by flex_attention, which looks the bias up itself. The batch is filled up to a multiple of BUCKET positions,
    for which it is compiled once."""
    spare = -len(q) % BUCKET
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, spare)).transpose(0, 1)[None] for x in (q, k, v))  # (1, H, N', d)
    score = None
    if bias is not None:
        bias, (left, right) = F.pad(bias, (0, 0, 0, 0, 0, spare)), rows.reach

        def score(score, b, head, i, j):
            return score + bias[i, head, (j - i).clamp(-left, right) + left]

    y = flex_attention(q, k, v, score, mask, enable_gqa=q.shape[1] != k.shape[1])
    return y[0].transpose(0, 1)[:len(rows.row)]


def document_mask(row, causal):
    """The block mask of flex_attention: a position sees its own row (N,), up to itself if causal."""
    from torch.nn.attention.flex_attention import create_block_mask  # takes half a second, so only when needed
    row = F.pad(row, (0, -len(row) % BUCKET), value=-1)

    def sees(b, head, i, j):
        return (row[i] == row[j]) & (j <= i) if causal else row[i] == row[j]

    return create_block_mask(sees, None, None, len(row), len(row), row.device)


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)
