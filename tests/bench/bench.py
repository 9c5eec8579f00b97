"""Speed: python tests/bench.py WHAT [PART] [--rounds N] [--threads N] [--cpu] [--device cuda]

features       ours and transformers' take turns, round by round; printed are medians and their ratio
manifest       a manifest of a million rows
loader         how fast the demo's batches are read, against how fast a step without the encoder cache uses them
corpora        100,000 tiny clips in the layout of Common Voice made into a manifest
start          from starting sample.py to the first letter of its answer
step           training steps of a mid-size pair (encoder 512 x 8 layers, LLM 768 x 8 layers, vocabulary 151,936) of random
               bfloat16 weights that transformers has too, 8 rows; part align (the adapter is trained: loss and gradients)
               or full (everything is: loss, gradients and fused AdamW)
decode         answers of that pair; part bfloat16 or int8
growth         how a step's seconds and memory grow, as pictures
plan           what train.py --dry-run says of the peak memory of runs of that size, against what they then take

With --device cuda, step and decode are of a pair as large as w2v-BERT 2.0 and Qwen2.5-1.5B, and steps of four times the rows.

In step, decode and growth each side is a process of its own; they take turns, and in each the second of two runs counts. Peak
memory is above that of libraries and weights. The floor is ours: its products at the speed of a large one, or its weights
at the speed of reading, both measured in the same run. Tables are left in out/bench/ as JSON.
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from full_size import memory
from mid_size import ENCODER, GROUPED, LLM, RAGGED, SIZES, Worker

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prepare.draw import draw_curves  # noqa: E402

CLOCK = time.perf_counter  # or process_time, see --cpu
DEVICE = "cpu"  # see --device


def interleaved(rounds, *runs):
    """Median seconds of each run, taken in turns; the first round only warms up."""
    times = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, taken in zip(runs, times):
            start = CLOCK()
            run()
            taken.append(CLOCK() - start)
    return [statistics.median(taken[1:]) for taken in times]


def features(rounds):
    from data import fbank
    from transformers import SeamlessM4TFeatureExtractor
    extractor = SeamlessM4TFeatureExtractor()
    print(f"{'features':24}{'peer ms':>10}{'ours ms':>10}{'ratio':>8}{'ours, audio-s/s':>18}")
    for name, seconds in [("1 x 2 s", [2]), ("1 x 10 s", [10]), ("1 x 60 s", [60]), ("8 x 3 to 17 s", range(3, 19, 2))]:
        waves = [0.1 * torch.randn(16000 * s) for s in seconds]
        arrays = [wave.numpy() for wave in waves]
        peer, ours = interleaved(rounds, lambda: extractor(arrays, sampling_rate=16000, return_tensors="pt"),
                                 lambda: fbank(waves))
        print(f"{name:24}{1e3 * peer:10.1f}{1e3 * ours:10.1f}{peer / ours:7.1f}x{sum(seconds) / ours:18.0f}")


def manifest(_):
    from data import Manifest
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for i in range(1_000_000):
            file.write(json.dumps({
                "audio": f"train-{i // 1000:03d}.tar/{i}.flac", "duration": 3 + i % 2000 / 100, "text": "some words " * 12,
                "task": "asr", "speaker": f"s{i % 900}", "corpus": "c", "licence": "CC-BY-4.0"}) + "\n")
        file.flush()
        print(f"before: {memory('VmRSS') / 2**20:.0f} MB")
        start = time.perf_counter()
        rows = Manifest(file.name)
        print(f"opened {len(rows):,} rows in {time.perf_counter() - start:.2f} s, peak {memory('VmHWM') / 2**20:.0f} MB")
        start = time.perf_counter()
        rows.split(["asr"], 30, lambda row: None)
        print(f"read through in {time.perf_counter() - start:.2f} s, peak {memory('VmHWM') / 2**20:.0f} MB")


def loader(_):
    import train
    from data import Examples, schedule
    cfg = train.parse(["--cache-gb", "0"])
    cfg, rates, tasks = train.settle(cfg)
    manifests, weights, dev, *_ = train.open_manifests(cfg, tasks)
    model, tokenizer, _ = train.build(cfg, rates)
    examples = Examples([*manifests, dev], tokenizer, model.llm.config.eos_token_id[0], model.adapter.config)
    order = schedule(manifests, weights, examples.size, cfg.batch_frames, cfg.batch_tokens, 0)
    scheduled = list(itertools.islice(order, 12))
    start = time.perf_counter()
    batches = [examples[batch] for batch in scheduled]
    read = time.perf_counter() - start
    audio = sum(sum(batch["lengths"]) for batch in batches) / 50
    steps = []
    for batch in batches[:4]:
        start = time.perf_counter()
        loss, count = model(**train.on_device(batch, "cpu"))
        (loss / count).backward()
        steps.append((time.perf_counter() - start) / (sum(batch["lengths"]) / 50))
    step = statistics.median(steps)
    print(f"one worker reads {audio / read:.0f} audio-s/s, a step uses {1 / step:.0f}: {step * audio / read:.1f} times")


# ----------------------------------------------------------------------------------------------------------------------
# The mid-size pair of mid_size.py


def turns(rounds, runs):
    """runs: {name: function that returns a worker's reply}, taken in turns, twice each: the second counts, as a system may
    have taken memory from a process that waited. Returns for each name (median seconds, peak in GB, the last reply)."""
    replies = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            replies[name].append(run())
    clock = "cpu" if CLOCK is time.process_time else "wall"
    return {name: (statistics.median(reply[clock] for reply in found), max(reply["peak"] for reply in found), found[-1])
            for name, found in replies.items()}


def started(names, layers=0):
    workers = {who: Worker(who, layers, torch.get_num_threads(), DEVICE) for who in names}
    return {who: worker.ready() for who, worker in workers.items()}


def machine(ask, rounds=5):
    """What the machine does at most: floating point operations and bytes a second."""
    found = turns(rounds, {"gemm": lambda: ask(do="gemm"), "stream": lambda: ask(do="stream")})
    peaks = {name: reply["work"] / seconds for name, (seconds, _, reply) in found.items()}
    print(f"matrix product {peaks['gemm'] / 1e9:.0f} GFLOP/s in bfloat16, reading {peaks['stream'] / 1e9:.1f} GB/s")
    return peaks


def write(name, rows, **more):
    path = ROOT / "out/bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    processor = (torch.cuda.get_device_name() if DEVICE == "cuda" else
                 next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")))
    path.write_text(json.dumps({"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__, **more,
                                "rows": rows}, indent=2) + "\n")
    print(path.relative_to(ROOT))


STEPS = {"align": [("align", "ragged"), ("align", "grouped"), ("align, cached encoder", "grouped")],
         "full": [(what, kind) for kind in ("grouped", "ragged") for what in ("full", "full, checkpointing")]}


def step(rounds, part="align"):
    sides = {"align": ("stock", "tuned", "ours"), "full": ("stock", "ours")}[part]  # of full, three would need 27 GB
    workers = started(sides)
    peaks, found, whole = machine(workers["ours"]), [], {}
    titles = [*(f"{who} s" for who in sides), *(f"{who}/ours" for who in sides[:-1]), "of floor",
              *(f"{who} GB" for who in sides), "padding"]
    copies = {"cpu": 1, "cuda": 4}[DEVICE]
    print(f"{f'a step, {copies * 91} s of audio':32}" + "".join(f"{title:>12}" for title in titles))
    for what, kind in STEPS[part]:
        seconds = copies * {"grouped": GROUPED, "ragged": RAGGED}[kind]
        asked = dict(what=what, seconds=seconds)
        runs = {who: lambda ask=ask: ask(do="step", **asked) for who, ask in workers.items()
                if who == "ours" or "cached" not in what}  # the peer has no such cache: its own step is compared with
        took = turns(rounds, runs)
        whole = (whole if "cached" in what else {}) | took  # that of the same batch comes last before
        floor = workers["ours"](do="count", **asked)["value"] / peaks["gemm"]
        padding = 1 - sum(seconds) / len(seconds) / max(seconds)
        line, ours = {who: whole[who][0] for who in sides}, whole["ours"][0]
        memory_of = {f"{who} GB": whole[who][1] for who in sides}
        found.append({"step": what, "batch": kind, **line, "floor": floor, **memory_of, "peer's padding": padding,
                      "loss": {who: took[who][2]["value"] for who in took}})
        print(f"{what + ', ' + kind:32}" + "".join(f"{value:12.2f}" for value in line.values())
              + "".join(f"{line[who] / ours:12.2f}" for who in sides[:-1]) + f"{100 * floor / ours:11.0f}%"
              + "".join(f"{value:12.2f}" for value in memory_of.values()) + f"{100 * padding:11.1f}%", flush=True)
    write(f"step-{part}", found, gflops=peaks["gemm"] / 1e9)


def decode(rounds, part="bfloat16", tokens=33):
    kinds = {"bfloat16": ("stock", "ours", "compiled"), "int8": ("stock", "int8", "int8 compiled")}[part]
    workers = started(kinds)
    peaks, found, llm = machine(workers["stock"]), [], SIZES[DEVICE][1]
    D, keys = llm["hidden_size"], llm["num_key_value_heads"] / llm["num_attention_heads"]
    weights = D * (llm["num_hidden_layers"] * (D * (2 + 2 * keys) + 3 * llm["intermediate_size"]) + llm["vocab_size"])  # read for every token
    floor = weights * (2 if part == "bfloat16" else 1) / peaks["stream"]
    print(f"{'decoding':24}" + "".join(f"{who + ' ms':>17}{'':9}" for who in kinds) + "     floor ms")
    for batch in (1, 8):
        took = {count: turns(rounds, {who: lambda ask=ask: ask(do="answer", seconds=RAGGED[:batch], count=count)
                                      for who, ask in workers.items()}) for count in (1, tokens)}
        first = {who: took[1][who][0] for who in kinds}
        later = {who: (took[tokens][who][0] - first[who]) / (tokens - 1) for who in kinds}
        for name, line, least in (("first token", first, None), ("each later", later, floor)):
            found.append({"figure": name, "batch": batch, **line, "floor": least,
                          "peak GB": {who: took[tokens][who][1] for who in kinds}})
            print(f"{name}, batch {batch}".ljust(24) + "".join(
                f"{1e3 * line[who]:17.1f} {line['stock'] / line[who]:7.2f}x" for who in kinds)
                + (f"{1e3 * least:13.1f}" if least else ""), flush=True)
    write(f"decode-{part}", found, bandwidth=peaks["stream"] / 1e9)


def growth(rounds):
    """How seconds and memory of a step of phase align grow with the length of a row, with rows, and with layers."""
    sweeps = {"seconds": [(s, [float(s)], 8) for s in (2, 5, 10, 20, 40, 60)],
              "rows": [(n, [5.0] * n, 8) for n in (1, 2, 4, 8, 16)], "layers": [(n, [10.0, 10.0], n) for n in (2, 4, 8, 16)]}
    found, workers = {}, {}
    for name, points in sweeps.items():
        found[name] = []
        for x, seconds, layers in points:
            workers[layers] = workers.get(layers) or started(("stock", "ours"), layers)
            took = turns(rounds, {who: lambda who=who: workers[layers][who](do="step", what="align", seconds=seconds)
                                  for who in ("stock", "ours")})
            found[name].append({"step": x} | {f"{who} {unit}": took[who][i] for who in took for i, unit in enumerate(("s", "GB"))})
            print(name, ", ".join(f"{key} {value:.4g}" for key, value in found[name][-1].items() if key != "step"), f"at {x}", flush=True)
        panels = [{f"stock {unit}": "#999999", f"ours {unit}": "#1f6fb4"} for unit in ("s", "GB")]
        (ROOT / "out/bench").mkdir(parents=True, exist_ok=True)
        (ROOT / "out/bench" / f"growth-{name}.svg").write_text(draw_curves(found[name], panels))
    write("growth", found)


def start(rounds):
    """Seconds from starting sample.py, on the demo's models with an untrained adapter, to the first letter of its answer."""
    import train
    with tempfile.TemporaryDirectory() as place:
        cfg = train.settle(train.parse(["--phase", "ift"]))[0]
        model, _, bases = train.build(cfg, {})
        state = {name: p for name, p in model.state_dict().items() if name.startswith("adapter.")}
        torch.save({"model": state, "adapter": asdict(model.adapter.config), "bases": bases, "config": asdict(cfg), "data": [],
                    "window": 10.0, "step": 0}, Path(place) / "ift.pt")
        runs = {"import torch": ["-c", "import torch; print()"],
                "first letter": ["sample.py", "demo/sample.wav", "Translate to German", "--ckpt", f"{place}/ift.pt"]}
        times = {name: [] for name in runs}
        for _ in range(rounds + 1):
            for name, command in runs.items():
                began = time.perf_counter()
                process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                process.stdout.read(1)
                times[name].append(time.perf_counter() - began)
                process.communicate()
    for name, taken in times.items():
        print(f"{name}: {statistics.median(taken[1:]):.2f} s")


def corpora(_rounds, count=100_000):
    import numpy as np
    import soundfile
    from prepare import corpora
    with tempfile.TemporaryDirectory() as place:
        clips = Path(place) / "cv" / "en" / "clips"
        clips.mkdir(parents=True)
        soundfile.write(clips / "0.mp3", np.zeros(1600, np.int16), 16000, format="WAV")
        data = (clips / "0.mp3").read_bytes()
        with open(clips.parent / "train.tsv", "w") as rows, open(clips.parent / "clip_durations.tsv", "w") as durations:
            rows.write("client_id\tpath\tsentence\n")
            durations.write("clip\tduration[ms]\n")
            for i in range(int(count)):
                (clips / f"{i}.mp3").write_bytes(data)
                rows.write(f"s{i % 900}\t{i}.mp3\tThis is sentence {i} of so many.\n")
                durations.write(f"{i}.mp3\t100\n")
        start = time.perf_counter()
        corpora.main(["commonvoice", f"{place}/cv", f"{place}/out.jsonl"])
        print(f"{int(count):,} clips in {time.perf_counter() - start:.1f} s, peak {memory('VmHWM') / 2**20:.0f} MB")


PLANS = {"align": [], "align, no encoder cache": ["--cache-gb", "0"], "ift": ["--phase", "ift"],
         "ift, --checkpointing": ["--phase", "ift", "--checkpointing"],
         "ift, --lora-rank 16": ["--phase", "ift", "--lora-rank", "16"]}


def plan(_rounds):
    import os

    import numpy as np
    import soundfile
    from conftest import make_project
    from model import LLM as Ours, EncoderConfig, LLMConfig, SpeechEncoder
    with tempfile.TemporaryDirectory() as place:
        place, random = Path(place), np.random.default_rng(0)
        make_project(place)
        tokenizer = (place / "llm" / "tokenizer.json").read_bytes()
        SpeechEncoder(EncoderConfig(**ENCODER)).save_pretrained(place / "encoder")
        Ours(LLMConfig.from_dict({"model_type": "qwen2", **LLM, "eos_token_id": 0})).bfloat16().save_pretrained(place / "llm")
        (place / "llm" / "tokenizer.json").write_bytes(tokenizer)
        for split in ("train", "dev"):
            rows = []
            for i, seconds in enumerate(2 * RAGGED):
                soundfile.write(place / f"{split}{i}.wav", 0.1 * random.standard_normal(int(16000 * seconds)), 16000)
                rows.append({"audio": f"{split}{i}.wav", "duration": seconds, "text": "one two " * int(seconds),
                             "task": "asr", "corpus": "noise", "licence": "CC0-1.0"})
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = [sys.executable, ROOT / "train.py", "--encoder", place / "encoder", "--llm", place / "llm", "--data",
               place / "train.jsonl", "--dev", place / "dev.jsonl", "--out", place / "out", "--steps", "2", "--eval-rows",
               "2", "--eval-clips", "1", "--workers", "0"]
        print(f"{'peak memory of a run':34}{'planned GB':>11}{'measured GB':>12}{'ratio':>7}")
        for name, options in PLANS.items():
            said = subprocess.run([*own, *options, "--dry-run"], capture_output=True, text=True, check=True).stdout
            planned = float(re.search(r"peak ([\d.]+) GB", said)[1])
            run = subprocess.Popen([*own, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, used = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
            measured = used.ru_maxrss * 1024 / 1e9
            print(f"{name:34}{planned:11.2f}{measured:12.2f}{planned / measured:7.2f}" + " failed" * bool(status), flush=True)


RUNS = {f.__name__: f for f in (features, manifest, loader, corpora, step, decode, growth, start, plan)}
ROUNDS = {"features": 7, "step": 2, "decode": 3, "growth": 1, "start": 5}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="features", choices=RUNS)
    parser.add_argument("part", nargs="*", help="of step: align or full; of decode: bfloat16 or int8")
    parser.add_argument("--rounds", type=int, help="of which the medians are taken")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cpu", action="store_true", help="seconds of CPU instead of the wall's, on a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    CLOCK, DEVICE = time.process_time if args.cpu else CLOCK, args.device
    RUNS[args.what](args.rounds or ROUNDS.get(args.what, 1), *args.part)
