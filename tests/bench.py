"""Speed against transformers, measured in the same run on one thread: python tests/bench.py

Ours and the peer's take turns, round by round; printed are medians and their ratio.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    features()
