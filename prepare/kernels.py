"""What PyTorch computes slowly on a CPU, and its gradients, by faster operators."""

import torch
import torch.nn.functional as F

STEP = 16  # lines, see Spread


class Depthwise(torch.autograd.Function):
    """F.conv1d of x (1, D, T) with a weight (D, 1, kernel) of its own for every channel. Both gradients are such
    convolutions again: five times as fast as the ones of PyTorch."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv1d(x, weight, groups=len(weight))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        gap = weight.shape[2] - 1
        dx = F.conv1d(F.pad(dy, (gap, gap)), weight.flip(2), groups=len(weight))
        return dx, F.conv1d(x, dy.transpose(0, 1), groups=len(weight)).transpose(0, 1)


class Spread(torch.autograd.Function):
    """What relative keys add to the scores of m neighbouring queries, the first of them at position i of its row, and all n
    keys: bias (H, m, places) -> (H, m, n), where key j of query a takes bias[clip(j - (i + a) + left, 0, places - 1)].

    A step down is a step to the right, so all lines go into a buffer at once, along its diagonal. Right of them stands the
    last bias; left of them the first, in steps of STEP lines, which the diagonal ones, made longer, smooth."""

    @staticmethod
    def forward(ctx, bias, i, n, left):
        (H, m, places), more = bias.shape, STEP - 1
        before, after = max(0, left + more - i), max(0, i + m - 1 + places - left - n)  # columns for keys that are not there
        begin, width = before + i - left, before + n + after
        out, first = bias.new_empty(H, m, width), bias[..., :1]
        out[..., begin:] = bias[..., -1:]
        for a in range(0, m, STEP):
            out[:, a:a + STEP, :begin + a] = first[:, a:a + STEP]
        lines = torch.cat([first.expand(-1, -1, more), bias], -1)
        out.as_strided(lines.shape, (m * width, width + 1, 1), begin - more).copy_(lines)
        ctx.sizes = begin, before, after, bias.shape
        return out[..., before:before + n].clone(memory_format=torch.contiguous_format) if before or after else out

    @staticmethod
    def backward(ctx, d):
        begin, before, after, (H, m, places) = ctx.sizes
        d = F.pad(d, (before, after)).contiguous()
        found = d.as_strided((H, m, places), (m * d.shape[2], d.shape[2] + 1, 1), begin).clone()
        near = d[..., begin:begin + m + places - 1]
        found[..., 0] += d[..., :begin].sum(-1) + near.tril(-1).sum(-1)
        found[..., -1] += d[..., begin + m + places - 1:].sum(-1) + near.triu(places).sum(-1)
        return found, None, None, None
