"""Speed, on one thread: python tests/bench.py features | manifest | loader

features: ours and transformers' take turns, round by round; printed are medians and their ratio. manifest: a manifest
of a million rows. loader: how fast the demo's batches are read, against how fast a step without the encoder cache
uses them.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from full_size import memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def interleaved(rounds, *runs):
    """Median seconds of each run, taken in turns; the first round only warms up."""
    times = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, taken in zip(runs, times):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]


def features():
    from data import fbank
    from transformers import SeamlessM4TFeatureExtractor
    extractor = SeamlessM4TFeatureExtractor()
    print(f"{'features':24}{'peer ms':>10}{'ours ms':>10}{'ratio':>8}{'ours, audio-s/s':>18}")
    for name, seconds in [("1 x 2 s", [2]), ("1 x 10 s", [10]), ("1 x 60 s", [60]), ("8 x 3 to 17 s", range(3, 19, 2))]:
        waves = [0.1 * torch.randn(16000 * s) for s in seconds]
        arrays = [wave.numpy() for wave in waves]
        peer, ours = interleaved(15, lambda: extractor(arrays, sampling_rate=16000, return_tensors="pt"),
                                 lambda: fbank(waves))
        print(f"{name:24}{1e3 * peer:10.1f}{1e3 * ours:10.1f}{peer / ours:7.1f}x{sum(seconds) / ours:18.0f}")


def manifest():
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


def loader():
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"features": features, "manifest": manifest, "loader": loader}[sys.argv[1] if len(sys.argv) > 1 else "features"]()
