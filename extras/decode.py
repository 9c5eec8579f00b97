"""A faster decode step: compiled on a CPU, replayed as a CUDA graph on a GPU."""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import first_line

# Weights become constants of the compiled step, in the layout that its products read fastest.
CPU_OPTIONS = {
    "freezing": True,
    "max_autotune": True,
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
}
ADVICE = "is there a C++ compiler (g++)?"


class FastDecode:
    """Takes the place of sample.decode_step: generate(..., step=FastDecode(decode_step)).

    It counts the seconds that each batch and cache size has taken, and compiles a step of that
    shape when they reach `pays`, about as long as compiling takes. So short runs never wait for the
    compiler, and long ones take at most twice the shortest time. PyTorch keeps compiled steps on
    disk for later runs (TORCHINDUCTOR_CACHE_DIR). Without a compiler one line says so, and nothing
    else changes.

    On a CPU the compiled step holds a second copy of the weights, and later changes of them have no
    effect. On CUDA the kernels of a step, compiled or not, are recorded with the second token that
    goes into a cache, and replayed for those after it.
    """

    def __init__(self, decode_step: Callable, pays: float = 60.0):
        self.decode_step = decode_step
        self.pays = pays
        self.seconds = {}  # (sequences, size of the cache) -> spent in steps that are not compiled
        self.compiled = {}  # the same -> its compiled step
        self.recording = None

    def __call__(
        self, llm: nn.Module, ids: Tensor, positions: Tensor, cache, filled: int
    ) -> Tensor:
        """One token a sequence: ids (B,) at positions (B,) go into the cache, a sample.KVCache of
        which the first `filled` positions are in use -> logits (B, V) of the next. On CUDA the next
        call overwrites them."""
        shape = (len(ids), cache.size)
        due = self.seconds.get(shape, 0.0) >= self.pays and ids.device.type != "mps"
        if due or shape in self.compiled:
            try:
                if shape not in self.compiled:
                    step = compile_step(self.decode_step, ids.is_cuda)
                    if not self.compiled:
                        remark = "compiling the decoding step, about a minute"
                        tqdm.write(remark, file=sys.stderr)
                    self.compiled[shape] = step
                return self.run(self.compiled[shape], llm, ids, positions, cache)
            except Exception as error:  # those of dynamo, inductor, triton, g++ have no common base
                reason = f"{first_line(error)}; {ADVICE}"
                text = f"decoding is not compiled and therefore slower: {reason}"
                tqdm.write(text, file=sys.stderr)
                self.pays = float("inf")
                self.compiled.clear()

        start = time.perf_counter()
        if ids.is_cuda:
            logits = self.run(self.decode_step, llm, ids, positions, cache)
            torch.cuda.synchronize()
        else:
            logits = self.decode_step(llm, ids, positions, cache, filled)
        self.seconds[shape] = self.seconds.get(shape, 0.0) + time.perf_counter() - start
        return logits

    def run(self, step: Callable, llm: nn.Module, ids: Tensor, positions: Tensor, cache) -> Tensor:
        """A step over the whole cache, which has the same shapes for every token."""
        if not ids.is_cuda:
            return step(llm, ids, positions, cache, cache.size)
        # What a step sets up when it first runs cannot be recorded: its second run is.
        key = (step, len(ids), cache.size, *(x.data_ptr() for x in [*cache.keys, *cache.values]))
        if self.recording is None or self.recording.key != key:
            self.recording = Recording(key)
            return step(llm, ids, positions, cache, cache.size)
        return self.recording.replay(step, llm, ids, positions, cache)


class Recording:
    """The kernels of a step as a CUDA graph; key: all that a replay takes for granted."""

    def __init__(self, key: tuple):
        self.key = key
        self.graph = None

    def replay(self, step, llm, ids, positions, cache) -> Tensor:
        if self.graph is None:
            self.ids, self.positions = ids.clone(), positions.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = step(llm, self.ids, self.positions, cache, cache.size)
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits


def compile_step(decode_step: Callable, on_cuda: bool) -> Callable:
    """decode_step compiled for a single shape."""
    # Importing the compiler takes a second, so it waits until now.
    import torch._dynamo
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    if not on_cuda:
        get_cpp_compiler()  # raises an error if there is none
    torch._dynamo.config.recompile_limit = 256  # there is one compilation for each shape
    step = torch.compile(decode_step, fullgraph=True, dynamic=False)
    options = {} if on_cuda else CPU_OPTIONS

    def run(*inputs):
        with config.patch(options):
            return step(*inputs)

    return run
