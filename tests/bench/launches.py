"""How many kernels a training step launches on CUDA, by what PyTorch's compiler makes of each kind
of layer. It is made to believe in an H200 and its code is read, not run, so that no GPU is needed.

    python tests/bench/launches.py [--code DIR]

Printed are, for a layer of w2v-BERT 2.0, of the adapter and of Qwen2.5-1.5B, forward and backward:
compiled kernels, matrix products, and kernels of attention and convolution; and their sum over all
layers. --code leaves the compiled code there. Dropout, which adds no kernel, is left out. At last
it counts how many graphs of layers 200 random batches make, and how many have a break. It looks
into the insides of the PyTorch of requirements.txt, and may not work with another.
"""

import argparse
import contextlib
import copy
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch._inductor.fx_passes.reinplace as reinplace
import torch._inductor.scheduler as scheduler
import triton
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from full_size import ENCODER, LLM  # noqa: E402
from kernels import Driver  # noqa: E402

import conftest  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

H200 = SimpleNamespace(
    name="H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    warp_size=32,
    total_memory=141 * 2**30,
    L2_cache_size=50 * 2**20,
    clock_rate=1980000,
    gcnArchName="",
)
BELIEFS = {  # functions of torch.cuda
    "is_available": lambda: True,
    "is_initialized": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda device=None: (9, 0),
    "get_rng_state": lambda *device: torch.zeros(2),
    "set_rng_state": lambda *device: None,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
    "_lazy_init": lambda: None,
    "_get_device_properties": lambda device: H200,
}
# Kernels that an operator of ours launches, with those of PyTorch that it calls.
LAUNCHES = {
    "relative_attention": 1,
    "relative_attention_gradients": 3,
    "depthwise": 1,
    "depthwise_gradients": 4,
    "_varlen_attn": 2,
    "_varlen_attn_backward": 3,
}
LENGTHS = [300, 500, 17]
# The kind of a layer, whether its weights and whether its input learn, and how many there are in
# the two steps. In align the LLM passes gradients on; everything is trained in the other.
STEPS = ("align", "ift")
KINDS = [
    ("encoder", False, False, (24, 0)),
    ("adapter", True, True, (2, 2)),
    ("LLM", False, True, (28, 0)),
    ("encoder", True, True, (0, 24)),
    ("LLM", True, True, (0, 28)),
]


class Code(Exception):
    """What the compiler has made of a graph."""


def stop_with_code(graph: GraphLowering, *_) -> None:
    code, _ = graph.codegen()
    raise Code(code.value)


def move_device(value):
    return torch.device("cuda:0") if isinstance(value, torch.device) else value


class Compiler:
    """A backend of torch.compile that keeps the code it would run on CUDA, and runs the graph."""

    def __init__(self):
        self.codes: list[str] = []
        kinds = dict.fromkeys(("fw_compiler", "bw_compiler", "inference_compiler"), self.lower)
        self.backend = aot_autograd(
            **kinds,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )

    def lower(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        fake_mode = torch._guards.TracingContext.get().fake_mode
        on_cuda, fake_inputs = copy.deepcopy(graph), []
        for node in on_cuda.graph.nodes:
            node.args, node.kwargs = tree_map(move_device, (node.args, node.kwargs))
        with fake_mode:
            for x in inputs:
                if isinstance(x, Tensor):
                    x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")
                fake_inputs.append(x)
        FakeTensorProp(on_cuda, fake_mode).propagate_dont_convert_inputs(*fake_inputs)
        try:
            with V.set_fake_mode(fake_mode):
                compile_fx.compile_fx_inner(on_cuda, fake_inputs)
        except InductorError as error:
            if not isinstance(error.inner_exception, Code):
                raise
            self.codes.append(str(error.inner_exception))
        return make_boxed_func(graph)


@contextlib.contextmanager
def believing():
    """Inside, PyTorch's compiler takes this machine for one with an H200."""
    triton.runtime.driver.set_active(Driver(90))
    with (
        mock.patch.multiple(torch.cuda, create=True, **BELIEFS),
        mock.patch.object(scheduler, "has_triton", lambda *_: True),
        # It would compute on CUDA, if only to see which shapes fit.
        mock.patch.object(reinplace, "canonicalize_view_scatter_ops", lambda graph: None),
        mock.patch.object(GraphLowering, "compile_to_module", stop_with_code),
    ):
        yield


def count_launches(code: str) -> tuple[int, int, int]:
    """Of compiled code: Triton kernels, matrix products, and kernels of other operators."""
    body = code[code.rindex("def call(") :]
    fused = len(re.findall(r"\.run\(", body))
    products = len(re.findall(r"extern_kernels\.", body))
    operators = re.findall(r"= torch\.ops\.\w+\.(\w+)\.default\(", body)
    return fused, products, sum(LAUNCHES[name] for name in operators)


def layers() -> dict[str, tuple[nn.Module, list, int]]:
    """Of each kind a layer on the meta device, its inputs behind the first, and its width."""
    kernels, without_chance = model.default_kernels("cuda"), dict(conformer_conv_dropout=0.0)
    sizes = {name: size for name, size in ENCODER.items() if name != "position_embeddings_type"}
    encoder, llm = model.EncoderConfig(**sizes, **without_chance), model.LLMConfig.from_dict(LLM)
    adapter = model.AdapterConfig.between(encoder, llm)
    rows = model.Rows(LENGTHS, "meta")
    pooled = model.Rows([model.strided_length(n, adapter) for n in LENGTHS], "meta")
    cos, sin = (angle.bfloat16() for angle in model.rope(rows.position, llm))
    with torch.device("meta"):
        conformer, decoder = (
            model.ConformerLayer(encoder, kernels),
            model.DecoderLayer(llm, kernels),
        )
        pooling = model.AdapterLayer(adapter, kernels)
    reads = model.convolved_frames(rows, pooled, pooling.residual_conv)
    return {
        "encoder": (conformer, [rows], encoder.hidden_size),
        "adapter": (pooling, [reads, pooled], encoder.hidden_size),
        "LLM": (decoder, [None, rows, cos, sin, None, None], llm.hidden_size),
    }


def compiled_codes(layer: nn.Module, inputs: list, width: int, learns: bool) -> list[str]:
    """What the compiler makes of a layer forward and, if its input learns, backward."""
    shape, compiler = (sum(LENGTHS), width), Compiler()
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=learns)
    with believing():
        call = torch.compile(model.call_layer, dynamic=True, backend=compiler.backend)
        y = call(layer, x, *inputs)
        if learns:
            y.backward(torch.empty_like(y))
    return compiler.codes


def count_graphs(batches: int) -> tuple[int, int]:
    """The graphs of layers, and breaks in them, after so many steps of tiny models."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        kernels = train.training_kernels("cuda", compiled=True)
    speech_lm = conftest.tiny_speech_lm(kernels=kernels).train()
    conftest.place(speech_lm, "meta", torch.float32, torch.bfloat16)
    random = np.random.default_rng(0)
    for _ in range(batches):
        count = random.integers(1, 20)
        sizes = [random.integers(low, 90, count).tolist() for low in (1, 0, 1)]
        batch = conftest.move(conftest.speech_batch(speech_lm, *sizes), "meta")
        speech_lm(*batch)[0].backward()
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--code", type=Path, help="directory for the compiled code")
    args = parser.parse_args()
    print("| layer | fused | products | attention, convolution | launches |")
    print("|---|---|---|---|---|")
    totals = dict.fromkeys(STEPS, 0)
    for name, trained, learns, counts in KINDS:
        layer, inputs, width = layers()[name]
        layer.to(torch.float32 if trained else torch.bfloat16)
        layer.requires_grad_(trained).train(trained)
        codes = compiled_codes(layer, inputs, width, learns)
        for direction, code in zip(("forward", "backward"), codes, strict=False):
            launches = count_launches(code)
            what = f"{name}, {'trained' if trained else 'frozen'}, {direction}"
            print(f"| {what} | {' | '.join(map(str, launches))} | {sum(launches)} |", flush=True)
            for step, count in zip(STEPS, counts, strict=True):
                totals[step] += count * sum(launches)
            if args.code:
                args.code.mkdir(parents=True, exist_ok=True)
                (args.code / f"{what.replace(', ', '-')}.py").write_text(code)
    for step, total in totals.items():
        print(f"all layers in a step of {step}: {total:,} launches")
    graphs, breaks = count_graphs(200)
    print(f"200 random batches: {graphs} graphs, {breaks} breaks")


if __name__ == "__main__":
    main()
