"""kill -9 at random moments, --resume, and the same weights in the end: python tests/kill_loop.py --kills 50

Trains a tiny run that is left alone, then the same run killed with its loader's processes again and again, each time at
a moment between its start and 1.5 times the time to its first save; every second kill then waits for the next save and
hits it. After every kill each checkpoint that is there must be whole, and in the end log and weights must be those of the
run left alone, bit for bit.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import make_project
from test_train import arguments, log

from prepare.checkpoint import read_back

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 400, 10  # of the run, and between saves


def start(project, out):
    argv = arguments(project, out, steps=STEPS, eval_every=EVERY, eval_rows=2, eval_clips=1, workers=1, cache_gb=0,
                     resume=True)
    return subprocess.Popen([sys.executable, ROOT / "train.py", *argv], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True)


def check(out):
    """Reads every checkpoint that is there; returns the step that --resume will begin with."""
    step = 0
    for path in sorted(out.glob("*.pt")):
        read_back(path)
        step = torch.load(path, weights_only=True)["step"]  # align.pt, then align.resume.pt
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    started = time.time()
    place = Path(tempfile.mkdtemp(prefix="kill-loop-"))
    make_project(place)
    whole, begun = place / "whole", time.time()
    run = start(place, whole)
    while not (whole / "align.resume.pt").exists():
        time.sleep(0.01)
    startup = time.time() - begun  # until the first save
    if run.wait():
        sys.exit("the run that was left alone failed")
    print(f"left alone: {time.time() - begun:.0f} s for {STEPS} steps and {STEPS // EVERY} saves, the first after "
          f"{startup:.1f} s", flush=True)
    wanted, kills, runs, saving, early = log(whole), 0, 0, 0, 0
    while kills < args.kills:
        runs, out, begun = runs + 1, place / f"killed-{runs}", time.time()
        while True:
            run, last = start(place, out), kills == args.kills
            try:
                run.wait(None if last else random.uniform(0, 1.5 * startup))
            except subprocess.TimeoutExpired:
                while kills % 2 and run.poll() is None and not list(out.glob("*.pt.tmp")):
                    time.sleep(0.001)
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
            if run.wait() == 0:
                break
            if run.returncode != -signal.SIGKILL:
                sys.exit(f"exit code {run.returncode} after {kills} kills; see {out}")
            kills, half = kills + 1, bool(list(out.glob("*.pt.tmp")))
            step = check(out)
            saving, early = saving + half, early + (step == 0)
            for path in out.glob("*.tmp"):
                path.unlink()  # else the next kill would take it for its own
            print(f"kill {kills}: step {step}" + ", a save was under way" * half, flush=True)
        a, b = (torch.load(path / "align.pt", weights_only=True)["model"] for path in (whole, out))
        if not all(torch.equal(a[name], b[name]) for name in a) or log(out) != wanted:
            sys.exit(f"the weights or the log of {out} are not those of {whole}")
    shutil.rmtree(place)
    print(f"{kills} kills in {runs} runs and {time.time() - started:.0f} s, {saving} of them amid a save, {early} before the "
          f"first: every checkpoint was whole, and {STEPS} steps end in the same weights and log, bit for bit")


if __name__ == "__main__":
    main()
