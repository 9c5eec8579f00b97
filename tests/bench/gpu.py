"""What is to be known about a GPU, in one command of under eight minutes:

    python tests/bench/gpu.py [--only PART ...] [--minutes 8]

attention    one encoder layer's, 32 rows, by the kernel of extras/cuda.py and by PyTorch
correctness  tests/test_cuda.py; and train.py on the demo: align, stopped and resumed, ift, LoRA,
             checkpointing, the largest batches that fit
steps        of the pair of models of pair.py: align and full, 8, 32 and as many rows as fit, of
             like length and ragged; memory, share of the GPU's peak, and the kernels of a step
decoding     answers to 1, 8 and 64 recordings
loader       how fast recordings become features
compiled     answers by compiled steps, if there is time, or with --only compiled

Parts for which no time is left are skipped, which is said. Tables are printed as Markdown, and all
figures are left in out/bench/gpu.json. --device cpu --quick is a tiny run without a GPU, which only
shows that this program works.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench  # noqa: E402
from pair import GROUPED, RAGGED, SIZES, Worker  # noqa: E402

from conftest import ROOT  # noqa: E402

ROWS_OF_32 = 364 * 50 // 32  # frames of each of 32 rows
FULL = 0.85  # of the memory, that the largest batch may take
LONGEST = 120  # seconds of one short training


def table(*rows: list) -> None:
    """Prints rows as Markdown, the first as a heading."""
    lines = [" | ".join(map(str, row)) for row in rows]
    lines.insert(1, " | ".join(["---"] * len(rows[0])))
    print("\n".join(f"| {line} |" for line in lines), flush=True)


# --- One layer's attention


def attention(args) -> dict:
    """Milliseconds of attention with relative keys, alone and with its gradients."""
    import model

    kernels = {"plain": model.attend, "ours": model.default_kernels(args.device).attend}
    heads, d, line = (2, 16, 80) if args.quick else (16, 64, 80)  # of 73 biases
    lengths = [20, 30] if args.quick else [ROWS_OF_32] * 32
    N, device = sum(lengths), args.device
    shapes = [(N, heads, d)] * 3 + [(N, heads, line)]
    inputs = [torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], device=device).bfloat16()
    rows, figures = model.Rows(lengths, torch.device(device)), {}
    for name, attend in kernels.items():

        def forward(attend=attend) -> torch.Tensor:
            q, k, v, lines = inputs
            return attend(q, k, v, rows, bias=lines[..., :73], left=64)

        def with_gradients(forward=forward) -> None:
            torch.autograd.grad(forward(), inputs, grad)

        figures[name] = [milliseconds(run, device) for run in (forward, with_gradients)]
    cells = [[name, *(f"{ms:.2f} ms" for ms in pair)] for name, pair in figures.items()]
    table(["attention of an encoder layer, 32 rows", "forward", "and gradients"], *cells)
    return figures


def milliseconds(run: Callable, device: str, times: int = 20) -> float:
    """The mean of so many runs, behind three that warm up."""
    for count in (3, times):
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        wait(device)
    return 1e3 * (time.perf_counter() - start) / times


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- Correctness


def correctness(args) -> dict:
    """Runs the tests and the trainings side by side."""
    with ThreadPoolExecutor() as pool, tempfile.TemporaryDirectory() as place:
        tests = pool.submit(run_tests, args)
        results = train_demo(args, Path(place))
        results["tests/test_cuda.py"] = tests.result()
    table(["check", "result"], *results.items())
    return results


def run_tests(args) -> str:
    """The last line of the tests for CUDA; what failed is shown."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-p", "no:cacheprovider"]
    env = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}  # or tests would look for no GPU
    options = {"capture_output": True, "text": True, "timeout": args.seconds()}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, **options)
    except subprocess.TimeoutExpired:
        return "no time was left"
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        print("\n".join(lines[-60:]), flush=True)
    return lines[-1]


def train_demo(args, place: Path) -> dict[str, str]:
    """{what was tried: how it ended} of short runs of train.py."""
    steps = 6 if args.quick else 40
    common = f"--device {args.device} --eval-rows 8 --eval-clips 1 --eval-every {steps // 2}"
    align = ["--phase", "align", "--steps", str(steps), "--cache-gb", "0", *common.split()]
    ift = ["--phase", "ift", "--init", f"{place}/a/align.pt", "--steps", "6", *common.split()]
    results = {"align": train(args, place / "a", align)}
    results["align, stopped and resumed"] = resume(args, place, align, steps // 2 + 1)
    results["ift"] = train(args, place / "ift", ift)
    results["ift, LoRA"] = train(args, place / "lora", [*ift, "--lora-rank", "8"])
    results["ift, checkpointing"] = train(args, place / "again", [*ift, "--checkpointing"])
    if args.device == "cuda":
        fitting = [*align, "--steps", "2", "--batch-frames", "auto"]
        results["align, --batch-frames auto"] = train(args, place / "auto", fitting)
    return results


def start_training(out: Path, options: list[str]) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--out", str(out), *options]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)


def train(args, out: Path, options: list[str]) -> str:
    """How a run ended: the loss of its last step, or its error."""
    start = time.perf_counter()
    process = start_training(out, options)
    try:
        _, errors = process.communicate(timeout=min(LONGEST, args.seconds()))
    except subprocess.TimeoutExpired:
        process.kill()
        return "took too long"
    if process.returncode:
        return f"FAILED: {(errors.strip() or 'without a word').splitlines()[-1]}"
    lines = log_lines(out)
    losses = [line["loss"] for line in lines if "loss" in line]
    seconds = time.perf_counter() - start
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps, {seconds:.0f} s"


def log_lines(out: Path) -> list[dict]:
    path = out / ("align.jsonl" if (out / "align.jsonl").exists() else "ift.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def resume(args, place: Path, options: list[str], stop_after: int) -> str:
    """Stops the run of place / "a" once more by a signal, resumes it, and compares the weights."""
    out = place / "b"
    process = start_training(out, options)
    end = time.monotonic() + min(LONGEST, args.seconds())
    while len(log_lines(out)) < stop_after and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
    stopped = sum("loss" in line for line in log_lines(out))
    ended = train(args, out, [*options, "--resume"])
    if not ended.startswith("loss") or not (place / "a" / "align.pt").exists():
        return ended
    states = [torch.load(place / name / "align.pt", mmap=True)["model"] for name in "ab"]
    differences = [
        (x.float() - states[1][name].float()).abs().max().item() for name, x in states[0].items()
    ]
    verdict = "the same bits" if max(differences) == 0 else f"differs by {max(differences):.1e}"
    return f"stopped after {stopped} steps, then {verdict}"


# --- Steps


@contextmanager
def running(args, sides: list[str]) -> Iterator[dict[str, Worker]]:
    """A process for each side, which start side by side, and take turns when they are measured."""
    layers = 2 if args.quick else 0
    workers = {side: Worker(side, layers, 4, args.device) for side in sides}
    try:
        for worker in workers.values():
            worker.wait()
        yield workers
    finally:
        for worker in workers.values():
            worker.process.kill()


def steps(args) -> dict:
    rows, kernels = [], {}
    batches = {"like length": GROUPED, "ragged": RAGGED}
    with running(args, ["stock", "tuned", "ours"]) as workers:
        ours = {"ours": workers["ours"]}
        speeds = bench.machine_speed(args, workers["ours"])
        for what in ("align", "full"):
            print("| step | here | of the GPU's products | stock | tuned |\n|---|---|---|---|---|")
            memory = {}
            for count in (8, 32):
                for kind, seconds in batches.items():
                    seconds = scaled(args, seconds * (count // 8))
                    row = measure_step(args, workers, what, seconds, speeds["multiply"])
                    rows.append({"step": what, "rows": count, "kind": kind} | row)
                    memory[count] = row["GB"]["ours"]
                    print_step(rows[-1])
            task = {"do": "profile", "what": what, "seconds": seconds}
            kernels[what] = workers["ours"](**task)["value"] or []
            # As many rows as fit are for ours alone.
            count = fitting_rows(args, memory, workers["ours"](do="rest")["peak"])
            seconds = scaled(args, GROUPED * (count // 8))
            row = measure_step(args, ours, what, seconds, speeds["multiply"])
            rows.append({"step": what, "rows": count, "kind": "like length"} | row)
            print_step(rows[-1])
            print_kernels(what, kernels[what], rows[-2]["seconds"]["ours"])
    return {"speeds": speeds, "steps": rows, "kernels": kernels}


def scaled(args, seconds: list[float]) -> list[float]:
    return [s / 20 for s in seconds[:4]] if args.quick else seconds


def measure_step(args, workers: dict, what: str, seconds: list[float], peak: float) -> dict:
    results = bench.compare(args, workers, do="step", what=what, seconds=seconds)
    # The operations of a few rows, as many times as there are such rows.
    few = seconds[:8]
    operations = workers["ours"](do="count", what=what, seconds=few)["value"] or 0
    workers["ours"](do="rest")
    operations *= len(seconds) // len(few)
    taken = {side: result.seconds for side, result in results.items()}
    return {
        "seconds": taken,
        "GB": {side: result.peak for side, result in results.items()},
        "share of products": operations / peak / taken["ours"],
        "audio": sum(seconds),
        "loss": {side: result.reply["value"] for side, result in results.items()},
    }


def print_step(row: dict) -> None:
    """Milliseconds, GB and seconds of audio a second of ours; of the others also the ratio."""
    taken, gigabytes = row["seconds"], row["GB"]
    ours, speed = taken["ours"], row["audio"] / taken["ours"]
    cells = [f"{row['step']}, {row['rows']} rows, {row['kind']}"]
    cells.append(f"{1e3 * ours:.0f} ms, {gigabytes['ours']:.1f} GB, {speed:.0f} audio-s/s")
    cells.append(f"{row['share of products']:.0%}")
    for side in [side for side in taken if side != "ours"]:
        ratio = f"{taken[side] / ours:.2f} x"
        cells.append(f"{1e3 * taken[side]:.0f} ms, {gigabytes[side]:.1f} GB, {ratio}")
    print(f"| {' | '.join(cells)} |", flush=True)


def fitting_rows(args, memory: dict[int, float], resident: float) -> int:
    """How many rows fit into what is free, a multiple of 8, by the memory of 8 and 32, which grows
    evenly; resident: GB that ours keeps between steps."""
    if args.device == "cpu":
        return 32
    room = resident + FULL * torch.cuda.mem_get_info()[0] / 1e9
    slope = (memory[32] - memory[8]) / 24
    return max(32, int((room - memory[8]) / slope + 8) // 8 * 8)


def print_kernels(what: str, rows: list[list], seconds: float) -> None:
    """The kernels of a step of 32 rows, and which attend."""
    total, launches = sum(row[2] for row in rows) or 1, sum(row[1] for row in rows)
    print(f"{what}: {launches} launches, {1e3 * total:.0f} ms of {1e3 * seconds:.0f} ms busy")
    cells = [
        [name[:80], count, f"{1e3 * spent:.2f}", f"{spent / total:.1%}"]
        for name, count, spent in rows
    ]
    table(["kernel", "times", "ms", "share"], *cells[:20])
    names = [name for name, *_ in rows]
    ours = ("flash", "attention", "query_gradients", "key_gradients")
    attending = [name[:60] for name in names if any(part in name.lower() for part in ours)]
    print(f"attention: {', '.join(attending) or 'NO FUSED KERNEL'}")


# --- Answers, and feeding


def decoding(args, sides=("stock", "replayed"), counts=(1, 8, 64)) -> list[dict]:
    """Milliseconds of the first and of each later token, and how near the latter is to the time of
    reading all weights."""
    rows, tokens = [], 5 if args.quick else 33
    with running(args, list(sides)) as workers:
        speeds = bench.machine_speed(args, workers[sides[1]])
        floor = 2 * bench.weights_read(SIZES[args.device][1]) / speeds["read"]
        for count in counts:
            seconds, taken = scaled(args, (RAGGED * 8)[:count]), {}
            for n in (1, tokens):
                results = bench.compare(args, workers, do="answer", seconds=seconds, count=n)
                taken[n] = {side: result.seconds for side, result in results.items()}
            first, total = taken.values()
            later = {side: (total[side] - first[side]) / (tokens - 1) for side in sides}
            rows.append({"rows": count, "first": first, "later": later, "floor": floor})
    cells = []
    for row in rows:
        for name in ("first", "later"):
            theirs, ours = (1e3 * row[name][side] for side in sides)
            share = f"{1e3 * floor / ours:.0%}" if name == "later" else ""
            ratio = f"{theirs / ours:.1f}"
            what = f"{name} token, batch {row['rows']}"
            cells.append([what, f"{theirs:.1f} ms", f"{ours:.1f} ms", ratio, share])
    table(["decoding", *sides, "ratio", "of the bandwidth"], *cells)
    return rows


def compiled(args) -> list[dict]:
    """The same of steps that are compiled and replayed, which takes the compiler a minute each."""
    return decoding(args, ("replayed", "compiled"), (1, 8))


# --- The program

PARTS = {  # and the seconds that each is expected to take
    attention: 15,
    steps: 220,
    decoding: 60,
    correctness: 120,
    bench.loader: 40,
    compiled: 180,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = [part.__name__ for part in PARTS]
    add("--only", nargs="+", choices=names, default=names, help="these parts alone")
    add("--minutes", type=float, default=8, help="begin no part that would end later")
    add("--device", default="cuda", choices=("cpu", "cuda"))
    add("--quick", action="store_true", help="tiny, only to see that it runs")
    args = parser.parse_args()
    args.rounds, args.cpu, args.threads = 1 if args.quick else 2, False, 1
    end = time.monotonic() + 60 * args.minutes
    args.seconds = lambda: max(1.0, end - time.monotonic())
    torch.backends.cuda.matmul.allow_tf32 = False
    results = {}
    for part, expected in PARTS.items():
        name = part.__name__
        if name not in args.only:
            continue
        if args.seconds() < expected and not args.quick:
            print(f"{name}: skipped, as {args.seconds():.0f} s are left")
            continue
        print(f"\n{name}", flush=True)
        start = time.monotonic()
        try:
            results[name] = part(args)
        except Exception as error:  # the other parts are still worth their time
            results[name] = f"FAILED: {type(error).__name__}: {error}"
            print(results[name])
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        bench.write_table(args, "gpu", results)


if __name__ == "__main__":
    main()
