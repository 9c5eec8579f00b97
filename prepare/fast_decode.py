"""Faster answers of an LLM that is no longer trained: a compiled decode step, and weights of 8 bits."""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from model import Linear, decode_step
from prepare.checkpoint import first_line

ON_CPU = {"freezing": True, "max_autotune": True, "autotune_num_choices_displayed": 0,
          "max_autotune_report_choices_stats": False}
PAYS = 60.0  # seconds that the steps of one shape must have taken before it is compiled, which takes about as long


class FastDecode:
    """Takes decode_step's place in generation: llm.fast = FastDecode(). Counts the seconds that each batch and cache size
    has taken, and compiles a step of that shape when they reach `pays`: so short runs never wait for the compiler, and
    long ones take at most twice the shortest time. What it made is kept on disk by PyTorch (TORCHINDUCTOR_CACHE_DIR), for
    later runs, too. Without a compiler it says so once, and nothing else changes.

    On CPU the weights become constants of the compiled step, in the layout its products read fastest: a second copy in
    memory, and later changes of the weights have no effect. On CUDA the kernels of a step, compiled or not, are recorded with
    the second token that goes into a cache, and replayed for the others.
    """

    def __init__(self, pays=PAYS):
        self.pays, self.seconds, self.compiled, self.recorded = pays, {}, {}, (None, None)

    def room(self, size):
        """The size of a cache that is to hold so many positions: a power of two, as few sizes mean few compilations."""
        return max(256, 1 << (size - 1).bit_length())

    def __call__(self, llm, ids, positions, cache):
        """As decode_step. cache: views of the filled part of a cache whose size room gave."""
        size = cache[0][0].stride(1) // cache[0][0].stride(2)
        shape = (len(ids), size)
        if self.seconds.get(shape, 0.0) >= self.pays and shape not in self.compiled:
            self.compiled[shape] = compiled_step(ids.is_cuda)
        if step := self.compiled.get(shape):
            try:
                inputs = llm, ids, positions, whole(cache, size)
                return self.replay(step, *inputs) if ids.is_cuda else step(*inputs)
            except Exception as error:  # of dynamo, inductor, triton or the C++ compiler, which have no common base
                print(f"decoding is not compiled and therefore slower: {first_line(error)}; is there a C++ compiler "
                      "(g++)?", file=sys.stderr)
                self.pays, self.compiled = float("inf"), {}
        start = time.perf_counter()
        if ids.is_cuda:
            logits = self.replay(decode_step, llm, ids, positions, whole(cache, size))
            torch.cuda.synchronize()
        else:
            logits = decode_step(llm, ids, positions, cache)
        self.seconds[shape] = self.seconds.get(shape, 0.0) + time.perf_counter() - start
        return logits

    def replay(self, step, llm, ids, positions, cache):
        """step(llm, ids, positions, cache) as a CUDA graph, recorded when a step and cache come for the second time: what a
        first call sets up can't be recorded. The logits are overwritten by the next call."""
        key = (step, len(ids), cache[0][0].shape[2], *(store.data_ptr() for layer in cache for store in layer))
        if self.recorded[0] != key:
            self.recorded = key, None
            return step(llm, ids, positions, cache)
        if self.recorded[1] is None:
            inputs, graph = (ids.clone(), positions.clone()), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = step(llm, *inputs, cache)
            self.recorded = key, (graph, inputs, logits)
        graph, inputs, logits = self.recorded[1]
        for store, new in zip(inputs, (ids, positions)):
            store.copy_(new)
        graph.replay()
        return logits


def whole(cache, size):
    """The cache of `size` positions whose filled part these views are."""
    return [tuple(x.as_strided((*x.shape[:2], size, x.shape[3]), x.stride()) for x in layer) for layer in cache]


def compiled_step(cuda):
    """decode_step compiled, for one shape; on CPU with the weights folded in."""
    import torch._dynamo  # takes a second, so only when needed
    from torch._inductor import config
    torch._dynamo.config.recompile_limit = 256
    step = torch.compile(decode_step, fullgraph=True, dynamic=False)

    def run(*inputs):
        with config.patch({} if cuda else ON_CPU):
            return step(*inputs)

    return run


# ----------------------------------------------------------------------------------------------------------------------
# Weights of 8 bits


class Int8Linear(nn.Module):
    """y = (x W.T) * scale + bias with W of 8 bits, each row of the matrix (an output) with a scale of its own."""

    def __init__(self, weight, scale, bias=None):
        super().__init__()
        self.bias = bias
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x):  # (N, in) -> (N, out)
        if len(x) <= 8 and not x.is_cuda:  # made for few rows
            y = torch._weight_int8pack_mm(x, self.weight, self.scale.to(x.dtype))
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int8Embedding(nn.Module):
    def __init__(self, weight, scale):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids):  # (N,) -> (N, D)
        return self.weight[ids] * self.scale[ids, None]


def int8(weight):
    """A matrix (out, in) rounded to 8 bits, and the scale of each of its rows (out,), float32."""
    found, scale = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), []
    for part, rows in zip(found.split(4096), weight.detach().split(4096)):
        rows = rows.float()
        scale.append(rows.abs().amax(1).clamp(min=1e-12) / 127)
        part.copy_((rows / scale[-1][:, None]).round())
    return found, torch.cat(scale)


def quantise(llm):
    """Rounds the LLM's linear layers, output layer and embedding to 8 bits, symmetrically, with a scale for every output.
    Norms, biases and all computing stay as they were. For answering only."""
    for module in list(llm.modules()):
        for name, linear in module.named_children():
            if isinstance(linear, Linear):
                setattr(module, name, Int8Linear(*int8(linear.weight), linear.bias))
    llm.model.embed_tokens = Int8Embedding(*int8(llm.model.embed_tokens.weight))
    if llm.config.tie_word_embeddings:
        llm.lm_head = Int8Linear(llm.model.embed_tokens.weight, llm.model.embed_tokens.scale)
    return llm
