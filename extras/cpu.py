"""Faster operators for the CPU: attention some queries at a time, and the depthwise convolution.

Both give what the operators of the same names in model.py give, values and gradients. Letters in
shape comments: N positions of all rows of a batch, n of one row, m neighbouring queries of it, H
heads, Hkv heads of keys, d width of a head, D channels, T frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import model

QUERIES = 192  # that attend at once: their scores stay in the processor's caches
LINES = 16  # of a bias that are filled at once, see SpreadBias


# --- Attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows,
    causal: bool = False,
    bias: Tensor | None = None,
    left: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Attention within each row: q (N, H, d), k and v (N, Hkv, d) -> (N, H, d).

    rows: model.Rows, of which only the lengths are read. bias (N, H, left + 1 + right): what
    relative keys add to the scores of a query; keys further away take the outermost. It is not for
    causal attention. Where there is neither a bias nor a gradient, PyTorch's kernel is faster.
    """
    if bias is None and not torch.is_grad_enabled():
        return model.attend(q, k, v, rows, causal, dropout=dropout)
    biases = [None] * len(rows.lengths) if bias is None else bias.split(rows.lengths)
    parts = zip(*(x.split(rows.lengths) for x in (q, k, v)), biases, strict=True)
    return torch.cat([attend_row(*part, causal, left, dropout) for part in parts])


def attend_row(q, k, v, bias, causal, left, dropout):
    """The same for a single row, by plain products. On a CPU these are faster than
    scaled_dot_product_attention, above all backward."""
    n, heads, d = q.shape
    groups = k.shape[1]  # of query heads, which share a key
    q = q.view(n, groups, -1, d)
    k = k.transpose(0, 1).contiguous().mT  # (Hkv, d, n)
    v = v.transpose(0, 1).contiguous()  # (Hkv, n, d)
    outputs = []
    for i in range(0, n, QUERIES):
        m = min(QUERIES, n - i)
        end = i + m if causal else n
        x = q[i : i + m].permute(1, 2, 0, 3).reshape(groups, -1, d)  # (Hkv, H / Hkv * m, d)
        added = added_scores(x, i, m, end, bias, causal, left)
        p = added.baddbmm_(x, k[..., :end], alpha=d**-0.5).softmax(-1)  # (Hkv, H / Hkv * m, end)
        p = F.dropout(p, dropout, dropout > 0)
        y = (p @ v[:, :end]).view(groups, -1, m, d)
        outputs.append(y.permute(2, 0, 1, 3).reshape(m, heads, d))
    return torch.cat(outputs)


def added_scores(x, i, m, end, bias, causal, left):
    """What is added to the scores of the m queries from position i on and the first `end` keys: a
    new tensor of the scores' shape (Hkv, H / Hkv * m, end)."""
    groups, lines, _ = x.shape
    if bias is not None:
        added = SpreadBias.apply(bias[i : i + m].transpose(0, 1), i, end, left)  # (H, m, end)
        # The scores are added in place, and behind a view that would copy the gradient.
        return added if len(added) == groups else added.view(groups, lines, end)
    if causal:
        return x.new_full((m, end), -torch.inf).triu(i + 1).repeat(groups, lines // m, 1)
    return x.new_zeros(groups, lines, end)


class SpreadBias(torch.autograd.Function):
    """Spreads the biases of m neighbouring queries over all n keys: bias (H, m, places) ->
    (H, m, n). The first query stands at position i of its row; key j of query a takes
    bias[clip(j - (i + a) + left, 0, places - 1)].

    A step down is a step to the right, so the biases of all queries are copied at once, along a
    buffer's diagonal. Right of the diagonal stands the last bias. Left of it stands the first,
    filled in steps of LINES lines; the diagonal, made longer by the first bias, smooths the steps.
    """

    @staticmethod
    def forward(ctx, bias, i, n, left):
        heads, m, places = bias.shape
        longer = LINES - 1
        before = max(0, left + longer - i)  # columns for keys that are not there
        after = max(0, i + m - 1 + places - left - n)
        begin = before + i - left  # where the first line's biases begin
        width = before + n + after

        # Every bias beyond the diagonal is one of the two outermost.
        out = bias.new_empty(heads, m, width)
        first = bias[..., :1]
        out[..., begin:] = bias[..., -1:]
        for a in range(0, m, LINES):
            out[:, a : a + LINES, : begin + a] = first[:, a : a + LINES]

        # A view whose lines are one element longer than the buffer's runs along the diagonal.
        lines = torch.cat([first.expand(-1, -1, longer), bias], -1)
        diagonal = out.as_strided(lines.shape, (m * width, width + 1, 1), begin - longer)
        diagonal.copy_(lines)
        ctx.sizes = begin, before, after, bias.shape
        if not before and not after:
            return out
        return out[..., before : before + n].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, d_out):
        begin, before, after, (heads, m, places) = ctx.sizes
        d_out = F.pad(d_out, (before, after)).contiguous()
        width = d_out.shape[2]
        end = begin + m + places - 1  # of the columns that the diagonal touches
        near = d_out[..., begin:end]
        strides = (m * width, width + 1, 1)
        d_bias = d_out.as_strided((heads, m, places), strides, begin).clone()
        d_bias[..., 0] += d_out[..., :begin].sum(-1) + near.tril(-1).sum(-1)
        d_bias[..., -1] += d_out[..., end:].sum(-1) + near.triu(places).sum(-1)
        return d_bias, None, None, None


# --- Convolution


def depthwise(x: Tensor, weight: Tensor, rows) -> Tensor:
    """As model.depthwise: x (N, D), weight (D, 1, kernel) -> (N, D)."""
    return model.depthwise(x, weight, rows, lambda x, weight, groups: Depthwise.apply(x, weight))


class Depthwise(torch.autograd.Function):
    """Both gradients are depthwise convolutions again, and five times as fast as PyTorch's."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv1d(x, weight, groups=len(weight))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        gap = weight.shape[2] - 1
        dx = F.conv1d(F.pad(dy, (gap, gap)), weight.flip(2), groups=len(weight))
        d_weight = F.conv1d(x, dy.transpose(0, 1), groups=len(weight)).transpose(0, 1)
        return dx, d_weight
