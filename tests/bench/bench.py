"""Speed: python tests/bench/bench.py WHAT [PART]

features   ours and transformers' take turns; printed are medians and their ratio
manifest   a manifest of a million rows
loader     how fast recordings of each format become features, on one core
start      from starting sample.py to the first letter of its answer
step       training steps of a pair of models with random bfloat16 weights that transformers has
           too; part align (the adapter is trained: loss and gradients) or full (everything is:
           loss, gradients and fused AdamW)
decode     answers of that pair; part bfloat16 or int8
growth     how a step's seconds and memory grow, as pictures

The pair is of middle size (encoder 512 x 8 layers, LLM 768 x 8 layers, vocabulary 151,936), with
batches of 8 rows; with --device cuda it is as large as w2v-BERT 2.0 and Qwen2.5-1.5B, with steps of
32 rows. See pair.py for its sides, which --sides chooses.

In step, decode and growth each side is a process of its own; they take turns, and in each the
second of two runs counts. Peak memory is above that of libraries and weights, on CUDA with
weights. The floor is ours:
its products at the speed of a large one, or its weights at the speed of reading, both measured in
the same run. Tables are left in out/bench/ as JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from full_size import memory  # noqa: E402
from pair import GROUPED, PEERS, RAGGED, SIZES, Worker  # noqa: E402

from conftest import ROOT  # noqa: E402

OUT = ROOT / "out" / "bench"
LABEL = 36  # width of a table's first column


def take_turns(rounds: int, clock: Callable, *runs: Callable) -> list[float]:
    """Median seconds of each run, taken in turns; the first round only warms up."""
    times = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, seconds in zip(runs, times, strict=True):
            start = clock()
            run()
            seconds.append(clock() - start)
    return [statistics.median(seconds[1:]) for seconds in times]


# --- Data, and the start


def features(args) -> None:
    from transformers import SeamlessM4TFeatureExtractor

    from data import fbank

    extract = SeamlessM4TFeatureExtractor()
    clock = time.process_time if args.cpu else time.perf_counter
    print(f"{'features':24}{'peer ms':>10}{'ours ms':>10}{'ratio':>8}{'ours, audio-s/s':>18}")
    batches = {"1 x 2 s": [2], "1 x 10 s": [10], "1 x 60 s": [60], "8 x 3 to 17 s": range(3, 19, 2)}
    for name, seconds in batches.items():
        waves = [0.1 * torch.randn(16000 * s) for s in seconds]
        arrays = [wave.numpy() for wave in waves]

        def theirs(arrays=arrays):
            extract(arrays, sampling_rate=16000, return_tensors="pt")

        def ours(waves=waves):
            fbank(waves)

        peer, here = take_turns(args.rounds, clock, theirs, ours)
        speed = sum(seconds) / here
        print(f"{name:24}{1e3 * peer:10.1f}{1e3 * here:10.1f}{peer / here:7.1f}x{speed:18.0f}")


def manifest(args) -> None:
    from data import Manifest, usable_rows

    count = 10_000 if args.quick else 1_000_000
    example = {"text": "some words " * 12, "task": "asr", "corpus": "c", "licence": "CC-BY-4.0"}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        with open(path, "w") as file:
            for i in range(count):
                audio = f"train-{i // 1000:03d}.tar/{i}.flac"
                row = {"audio": audio, "duration": 3 + i % 2000 / 100, "speaker": f"s{i % 900}"}
                file.write(json.dumps(row | example) + "\n")
        print(f"before: {memory('VmRSS') / 2**20:.0f} MB")
        start = time.perf_counter()
        rows = Manifest(path)
        seconds, peak = time.perf_counter() - start, memory("VmHWM") / 2**20
        print(f"opened {count:,} rows in {seconds:.2f} s, peak {peak:.0f} MB")
        start = time.perf_counter()
        sum(1 for _ in usable_rows(rows, ("asr",), lambda example, seconds: None, 1))
        seconds, peak = time.perf_counter() - start, memory("VmHWM") / 2**20
        print(f"read and checked in {seconds:.2f} s, peak {peak:.0f} MB")


# Suffix, and libsndfile's names of the format and of what is in it.
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
CLIP_SECONDS = 12
GPU_SPEED = 2500  # seconds of audio a second that an align step on an H200 is to use


def loader(args) -> None:
    """Seconds of audio that a core turns into features in a second, alone and with the augmentation
    of every second recording, and how many cores feed a GPU."""
    torch.set_num_threads(1)  # as in a worker process
    rows = []
    print("| format | read | and features | and augmentation | cores for a GPU |")
    print("|---|---|---|---|---|")
    for name in FORMATS:
        for rate in (16000, 48000):
            speeds = reading_speeds(name, rate, seconds=0.2 if args.quick else 2)
            cores = GPU_SPEED / speeds[-1]
            rows.append({"format": name, "rate": rate, "speeds": speeds, "cores": cores})
            cells = " | ".join(f"{speed:.0f}" for speed in speeds)
            print(f"| {name}, {rate // 1000} kHz | {cells} | {cores:.1f} |", flush=True)
    write_table(args, "loader", rows)


def reading_speeds(name: str, rate: int, seconds: float) -> list[float]:
    """Seconds of audio a second of CPU: read, read to features, and the same augmented as in
    training."""
    import data
    from model import DEMO, EncoderConfig

    speech = data.load_audio(DEMO / "sample.wav").repeat(CLIP_SECONDS)
    at = np.arange(CLIP_SECONDS * rate) * 16000 / rate
    wave = np.interp(at, np.arange(len(speech)), speech.numpy())
    config, random = EncoderConfig(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"clip.{name}"
        container, subtype = FORMATS[name]
        soundfile.write(path, wave, rate, format=container, subtype=subtype)
        row = {"audio": path.name, "text": "words", "task": "asr", "licence": "CC0-1.0"}
        (Path(place) / "rows.jsonl").write_text(json.dumps(row | {"duration": CLIP_SECONDS}))
        rows = data.Manifest(Path(place) / "rows.jsonl")

        def read() -> torch.Tensor:
            return rows.audio(rows[0])

        def to_features() -> None:
            data.extract_features([read()], config)

        def with_augmentation() -> None:
            read_wave = read()
            if random.random() < 0.5:
                read_wave = data.augment(read_wave, random, rows)
            data.extract_features([read_wave], config)

        return [
            CLIP_SECONDS / cpu_seconds(f, seconds) for f in (read, to_features, with_augmentation)
        ]


def cpu_seconds(run: Callable, seconds: float) -> float:
    """The mean of CPU seconds of runs that take so many together."""
    run()
    count, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        run()
        count += 1
    return (time.process_time() - start) / count


def start(args) -> None:
    """Seconds from starting sample.py, on the demo's models with a hardly trained adapter, to the
    first letter of its answer."""
    with tempfile.TemporaryDirectory() as out:
        options = (
            "--steps 1 --cache-gb 0 --eval-rows 2 --eval-clips 1 --workers 0 --batch-frames 500"
        )
        command = [sys.executable, "train.py", "--out", out, *options.split()]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        question = [
            "demo/sample.wav",
            "Transcribe the English speech.",
            "--ckpt",
            f"{out}/align.pt",
        ]
        commands = {
            "import torch": ["-c", "import torch; print()"],
            "first letter": ["sample.py", *question],
        }
        times = {name: [] for name in commands}
        for _ in range(args.rounds + 1):
            for name, command in commands.items():
                times[name].append(first_letter([sys.executable, *command]))
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds[1:]):.2f} s")


def first_letter(command: list[str]) -> float:
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.read(1)
    seconds = time.perf_counter() - began
    process.communicate()
    return seconds


# --- The pair of models


class Result:
    """What a run of a side took: median seconds, peak of memory in GB, and its last reply."""

    def __init__(self, replies: list[dict], clock: str):
        self.seconds = statistics.median(reply[clock] for reply in replies)
        self.peak = max(reply["peak"] for reply in replies)
        self.reply = replies[-1]


def compare(args, workers: dict[str, Worker], **task) -> dict[str, Result]:
    """The sides do a task in turns, twice each: the second counts, as a system may have taken
    memory from a process that waited."""
    replies = {side: [] for side in workers}
    for _ in range(args.rounds):
        for side, worker in workers.items():
            worker(**task)
            replies[side].append(worker(**task))
            if len(workers) > 1 and args.device == "cuda":  # its memory is for the next side
                worker(do="rest")
    clock = "cpu" if args.cpu else "wall"
    return {side: Result(replies[side], clock) for side in replies}


def start_workers(args, sides: list[str], layers: int = 0) -> dict[str, Worker]:
    """A process for each side, ready one after the other."""
    layers = layers or (2 if args.quick else 0)
    workers = {}
    for side in args.sides or sides:
        workers[side] = Worker(side, layers, args.threads, args.device)
        workers[side].wait()
    return workers


def batch_seconds(args, batch: list[float]) -> list[float]:
    """The recordings of a batch in seconds: on CUDA four times as many, in --quick short ones."""
    batch = batch * {"cpu": 1, "cuda": 4}[args.device]
    return [s / 10 for s in batch] if args.quick else batch


def machine_speed(args, worker: Worker) -> dict[str, float]:
    """What the machine does at most: floating point operations and bytes a second."""
    speeds = {}
    for name in ("multiply", "read"):
        result = compare(argparse.Namespace(rounds=5, cpu=args.cpu), {"": worker}, do=name)[""]
        speeds[name] = result.reply["work"] / result.seconds
    gflops, gigabytes = speeds["multiply"] / 1e9, speeds["read"] / 1e9
    print(f"products of {gflops:.0f} GFLOP/s in bfloat16, reading at {gigabytes:.1f} GB/s")
    return speeds


def write_table(args, name: str, rows: list | dict, speeds: dict[str, float] | None = None) -> None:
    """Leaves a table as JSON, with what it was measured on."""
    processor = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    facts = {"processor": processor, "threads": args.threads, "torch": str(torch.__version__)}
    path = OUT / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"speeds": speeds, "rows": rows}, indent=2) + "\n")
    print(path.relative_to(ROOT))


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return "unknown"


BATCHES = {"like length": GROUPED, "ragged": RAGGED}
STEPS = {
    "align": [
        ("align", "ragged"),
        ("align", "like length"),
        ("align, cached encoder", "like length"),
    ],
    "full": [
        ("full", "like length"),
        ("full, checkpointing", "like length"),
        ("full", "ragged"),
        ("full, checkpointing", "ragged"),
    ],
}
SIDES = {
    "align": ["stock", "tuned", "ours", "plain"],
    "full": ["stock", "ours"],  # a third would need 9 GB more
    "bfloat16": ["stock", "ours", "compiled"],
    "int8": ["stock", "int8", "int8 compiled"],
}


def step(args) -> None:
    part = args.part or "align"
    workers = start_workers(args, SIDES[part])
    sides = list(workers)
    speeds = machine_speed(args, workers["ours"])
    others = [side for side in sides if side != "ours"]
    titles = [f"{side} s" for side in sides] + [f"{side}/ours" for side in others]
    titles += ["of floor", *(f"{side} GB" for side in sides), "padding"]
    heading = f"a step, {sum(batch_seconds(args, GROUPED)):.0f} s of audio"
    print(f"{heading:{LABEL}}" + "".join(f"{title:>12}" for title in titles))

    rows, results = [], {}
    for what, kind in STEPS[part]:
        seconds = batch_seconds(args, BATCHES[kind])
        task = {"what": what, "seconds": seconds}
        # transformers has no encoder cache: its step without one, just before, is compared with.
        able = {s: w for s, w in workers.items() if s not in PEERS or "cached" not in what}
        results = results | compare(args, able, do="step", **task)
        floor = workers["ours"](do="count", **task)["value"] / speeds["multiply"]
        padding = 1 - sum(seconds) / len(seconds) / max(seconds)
        taken = {side: results[side].seconds for side in sides}
        peaks = {side: results[side].peak for side in sides}
        losses = {side: results[side].reply["value"] for side in sides}
        rows.append({"step": what, "batch": kind, "seconds": taken, "floor": floor})
        rows[-1] |= {"GB": peaks, "peer's padding": padding, "loss": losses}
        cells = [f"{taken[side]:.2f}" for side in sides]
        cells += [f"{taken[side] / taken['ours']:.2f}" for side in others]
        cells += [f"{100 * floor / taken['ours']:.0f}%"]
        cells += [f"{peaks[side]:.2f}" for side in sides] + [f"{100 * padding:.1f}%"]
        print(f"{f'{what}, {kind}':{LABEL}}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
    write_table(args, f"step-{part}", rows, speeds)


def decode(args) -> None:
    part = args.part or "bfloat16"
    tokens = 5 if args.quick else 33
    workers = start_workers(args, SIDES[part])
    sides = list(workers)
    speeds = machine_speed(args, workers[sides[0]])
    floor = weights_read(SIZES[args.device][1]) * (2 if part == "bfloat16" else 1) / speeds["read"]
    print(f"{'decoding':{LABEL}}" + "".join(f"{side + ' ms':>26}" for side in sides) + "  floor ms")
    rows = []
    for count in (1, 8):
        seconds = batch_seconds(args, RAGGED)[:count]
        results = {}
        for n in (1, tokens):
            results[n] = compare(args, workers, do="answer", seconds=seconds, count=n)
        first = {side: results[1][side].seconds for side in sides}
        total = {side: results[tokens][side].seconds for side in sides}
        later = {side: (total[side] - first[side]) / (tokens - 1) for side in sides}
        peaks = {side: results[tokens][side].peak for side in sides}
        for name, times, least in (("first token", first, None), ("each later", later, floor)):
            rows.append({"figure": name, "batch": count, "seconds": times, "floor": least})
            rows[-1]["GB"] = peaks
            cells = []
            for side in sides:
                ratio = times[sides[0]] / times[side]
                cells.append(f"{1e3 * times[side]:17.1f} {ratio:7.2f}x")
            end = f"{1e3 * least:10.1f}" if least else ""
            print(f"{f'{name}, batch {count}':{LABEL}}" + "".join(cells) + end, flush=True)
    write_table(args, f"decode-{part}", rows, speeds)


def weights_read(llm: dict) -> float:
    """How many weights of an LLM are read for every token."""
    D, keys = llm["hidden_size"], llm["num_key_value_heads"] / llm["num_attention_heads"]
    layer = D * (2 + 2 * keys) + 3 * llm["intermediate_size"]
    return D * (llm["num_hidden_layers"] * layer + llm["vocab_size"])


def growth(args) -> None:
    """Seconds and memory of a step of phase align by the length of a row, by rows, by layers."""
    from extras.curves import draw_curves

    sweeps = {
        "seconds": [(s, [float(s)], 8) for s in (2, 5, 10, 20, 40, 60)],
        "rows": [(n, [5.0] * n, 8) for n in (1, 2, 4, 8, 16)],
        "layers": [(n, [10.0, 10.0], n) for n in (2, 4, 8, 16)],
    }
    if args.quick:
        sweeps = {name: points[:2] for name, points in sweeps.items()}
    tables, workers = {}, {}
    for name, points in sweeps.items():
        table = []
        for x, seconds, layers in points:
            if layers not in workers:
                workers[layers] = start_workers(args, ["stock", "ours"], layers)
            results = compare(args, workers[layers], do="step", what="align", seconds=seconds)
            line = {}
            for side, result in results.items():
                line |= {f"{side} s": result.seconds, f"{side} GB": result.peak}
            table.append({"step": x} | line)
            figures = ", ".join(f"{key} {value:.4g}" for key, value in line.items())
            print(f"{name} {x}: {figures}", flush=True)
        colours = {"stock": "#999999", "ours": "#1f6fb4"}
        panels = []
        for unit in ("s", "GB"):
            panels.append({f"{side} {unit}": colour for side, colour in colours.items()})
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / f"growth-{name}.svg").write_text(draw_curves(table, panels))
        tables[name] = table
    write_table(args, "growth", tables)


COMMANDS = {f.__name__: f for f in (features, manifest, loader, start, step, decode, growth)}
ROUNDS = {"features": 7, "step": 2, "decode": 3, "start": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", nargs="?", default="features", choices=COMMANDS)
    add("part", nargs="?", choices=list(SIDES), help="of step: align, full; of decode: the others")
    add("--rounds", type=int, help="of which the medians are taken")
    add("--threads", type=int, default=1, help="of each process (%(default)s)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="of the pair (%(default)s)")
    add("--sides", nargs="+", help="sides of the pair, see pair.py; step needs ours")
    add("--cpu", action="store_true", help="count seconds of CPU, on a busy machine")
    add("--quick", action="store_true", help="tiny, only to see that it runs")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else ROUNDS.get(args.what, 1))
    torch.set_num_threads(args.threads)
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
