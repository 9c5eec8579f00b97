"""Weights of 8 bits for an LLM that only answers: less memory, and faster for a single answer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import LLM, Linear

FEW = 8  # rows up to which the kernel that reads 8-bit weights is faster than unpacking them
BLOCK = 4096  # rows of a matrix that are rounded at once, so that no whole copy exists in float32


class Int8Linear(nn.Module):
    """y = (x W.T) * scale + bias, with W (out, in) of 8 bits and a scale for each output (out,)."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.bias = bias
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:  # (N, in) -> (N, out)
        scale = self.scale.to(x.dtype)
        if len(x) <= FEW and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(x, self.weight, scale)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * scale
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int8Embedding(nn.Module):
    """An embedding (V, D) of 8 bits with a scale for each id (V,)."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:  # (N,) -> (N, D)
        return self.weight[ids] * self.scale[ids, None]


def round_matrix(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) rounded to 8 bits, and the scale of each of its rows (out,), float32."""
    rounded = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = []
    for target, source in zip(rounded.split(BLOCK), matrix.detach().split(BLOCK), strict=True):
        source = source.float()
        scale = source.abs().amax(1).clamp(min=1e-12) / 127
        target.copy_((source / scale[:, None]).round())
        scales.append(scale)
    return rounded, torch.cat(scales)


def quantise(llm: LLM) -> LLM:
    """Rounds the LLM's linear layers, output layer and embedding to 8 bits, symmetrically, with a
    scale for every output. Norms, biases and all computing stay as they were."""
    for module in list(llm.modules()):
        for name, linear in list(module.named_children()):
            if isinstance(linear, Linear):
                setattr(module, name, Int8Linear(*round_matrix(linear.weight), linear.bias))
    embedding = Int8Embedding(*round_matrix(llm.model.embed_tokens.weight))
    llm.model.embed_tokens = embedding
    if llm.config.tie_word_embeddings:
        llm.lm_head = Int8Linear(embedding.weight, embedding.scale)
    return llm
