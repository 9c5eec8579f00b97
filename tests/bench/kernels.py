"""Compiles the kernels of extras/cuda.py ahead of time, which needs Triton but no GPU.

    python tests/bench/kernels.py [--float32] [--arch 80 90 100]

Prints what each takes of a GPU, and how long a layer would take an H200 that is bound by nothing
but its products, its exponentials, or its memory. Nothing is run on CUDA, so no time is measured.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from extras import cuda  # noqa: E402
from model import Rows  # noqa: E402

ATTENTION = ("attention", "query_gradients", "key_gradients")
CONVOLUTION = ("taps_sum", "weight_gradients")
INSTRUCTIONS = ("mma.sync", "wgmma.mma", "tcgen05.mma", "cp.async")
# An H200: bfloat16 products, exponentials (16 a cycle of each of 132 multiprocessors at 1.8 GHz),
# and bytes, a second.
PRODUCTS, EXPONENTIALS, BYTES = 989e12, 16 * 132 * 1.8e9, 4.8e12
ROWS, FRAMES, HEADS, WIDTH = 32, 364 * 50, 16, 64  # 364 s of audio
BEFORE, AFTER, TAPS = 64, 8, 31


class Driver:
    """Says that there is a GPU of this architecture, for which Triton then compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Compiled:
    """Stands in for a kernel: compiles it for the arguments of a launch instead of running it."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.binaries = []

    def __getitem__(self, grid):
        def compile_kernel(*arguments, **options):
            self.binaries.append(self.kernel.warmup(*arguments, grid=grid, **options))

        return compile_kernel


def compile_kernels(arch: int, dtype: torch.dtype) -> dict:
    """{name: binary}, by the very calls that training makes."""
    kernels = {name: Compiled(getattr(cuda, name)) for name in ATTENTION + CONVOLUTION}
    plain = {name: compiled.kernel for name, compiled in kernels.items()}
    triton.runtime.driver.set_active(Driver(arch))
    vars(cuda).update(kernels)
    rows = Rows([70, 30], "cpu")
    q, k, v = (torch.zeros(100, HEADS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3))
    lines = torch.zeros(100, HEADS, 80, dtype=dtype, requires_grad=True)  # as model.py makes them
    bias = lines[..., : BEFORE + 1 + AFTER]
    cuda.attend(q, k, v, rows, bias=bias, left=BEFORE).sum().backward()
    x = torch.zeros(100, HEADS * WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.zeros(HEADS * WIDTH, 1, TAPS, dtype=dtype, requires_grad=True)
    cuda.depthwise(x, weight, rows).sum().backward()
    vars(cuda).update(plain)
    return {name: compiled.binaries[0] for name, compiled in kernels.items()}


def resources(binary) -> tuple[int, int, int]:
    """Registers of a thread, bytes of shared memory, bytes of registers that are spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, binary.metadata.shared, stack + local


def outer_share(n: int, queries: int, keys: int) -> float:
    """The share of a row's tiles that lie wholly to one side of the band."""
    tiles = outer = 0
    for i in range(0, n, queries):
        for j in range(0, n, keys):
            tiles += 1
            left = j + keys - 1 - i <= -BEFORE
            outer += left or j - (i + queries - 1) >= AFTER
    return outer / tiles


def print_resources(archs: list[int], dtype: torch.dtype) -> None:
    print("| kernel | GPU | registers | shared memory | spilled | on tensor cores, copied ahead |")
    print("|---|---|---|---|---|---|")
    for arch in archs:
        for name, binary in compile_kernels(arch, dtype).items():
            registers, shared, spilled = resources(binary)
            units = " ".join(x for x in INSTRUCTIONS if x in binary.asm["ptx"])
            cells = name, f"sm_{arch}", registers, f"{shared:,} B", f"{spilled} B", units
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_arithmetic() -> None:
    """Of a layer in bfloat16. Each product of n x n scores with a width is 2 n n d operations."""
    n = FRAMES // ROWS
    scores = ROWS * HEADS * n * n
    line = 2 * FRAMES * HEADS * WIDTH  # bytes of queries, keys, and so on
    biases = 2 * FRAMES * HEADS * (BEFORE + 1 + AFTER)
    sums = 4 * FRAMES * HEADS  # lse, delta
    # The numbers of products and exponentials of each score, bytes read and written.
    kernels = {
        "attention": (2, 1, 4 * line + biases + sums),
        "query_gradients": (3, 1, 6 * line + 3 * biases + 2 * sums),
        "key_gradients": (4, 1, 6 * line + biases + 2 * sums),
    }
    print("\n| kernel | outer tiles | GFLOP | GB | products | exponentials | memory |")
    print("|---|---|---|---|---|---|---|")
    for name, tile in zip(kernels, cuda.TILES[2], strict=True):
        products, exponentials, size = kernels[name]
        operations = products * 2 * WIDTH * scores
        seconds = operations / PRODUCTS, exponentials * scores / EXPONENTIALS, size / BYTES
        times = " | ".join(f"{1e6 * second:.0f} us" for second in seconds)
        share = f"{outer_share(n, *tile[:2]):.0%}"
        print(f"| {name} | {share} | {operations / 1e9:.1f} | {size / 1e9:.2f} | {times} |")
    spread = 2 * scores
    print(f"\nSpread over the keys, the biases of a layer would be {spread / 1e9:.2f} GB.")
    size = 2 * line * 1e-9
    operations = 2 * TAPS * FRAMES * HEADS * WIDTH * 1e-9
    print(f"The convolution: {operations:.1f} GFLOP, {size:.2f} GB, {size / BYTES * 1e15:.0f} us.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--float32", action="store_true", help="instead of bfloat16")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    options = parser.parse_args()
    print_resources(options.arch, torch.float32 if options.float32 else torch.bfloat16)
    print_arithmetic()
