"""kill -9 at random moments, --resume, and the same weights in the end:

    python tests/bench/kill_loop.py [--kills N]

trains a tiny run that is left alone. Then the same run is killed, with its loader's processes,
again and again, each time at a moment between its start and 1.5 times the time to its first save.
Every second kill then waits for the next save and hits it. After every kill each checkpoint that is
there must be complete, and in the end log and weights must be those of the run left alone, bit for
bit.
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
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import ROOT, make_project  # noqa: E402

EVERY = 10  # steps between saves
OPTIONS = f"""--adapter-lr 3e-3 --warmup 2 --batch-frames 300 --eval-every {EVERY} --eval-rows 2
--eval-clips 1 --workers 1 --cache-gb 0 --resume"""


def start(place: Path, steps: int, out: Path) -> subprocess.Popen:
    """Starts or resumes the run of the tiny project in `place`."""
    command = [sys.executable, ROOT / "train.py", "--out", out, "--steps", str(steps)]
    command += ["--encoder", place / "encoder", "--llm", place / "llm"]
    command += ["--data", place / "train.jsonl", "--dev", place / "dev.jsonl"]
    return subprocess.Popen(
        [*command, *OPTIONS.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def run_alone(place: Path, steps: int, out: Path) -> float:
    """Runs to the end; returns the seconds until the first save."""
    begun, first = time.time(), None
    run = start(place, steps, out)
    while run.poll() is None:
        if first is None and (out / "align.resume.pt").exists():
            first = time.time() - begun
        time.sleep(0.01)
    if run.returncode or first is None:
        sys.exit("the run that was left alone failed")
    print(
        f"left alone: {time.time() - begun:.0f} s for {steps} steps and {steps // EVERY} saves, "
        f"the first after {first:.1f} s",
        flush=True,
    )
    return first


def saving(out: Path) -> bool:
    return bool(list(out.glob("*.pt.tmp")))


def kill(run: subprocess.Popen, out: Path, seconds: float, amid_save: bool) -> None:
    """Kills a run and its processes after so many seconds, or else amid the next save."""
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        while amid_save and run.poll() is None and not saving(out):
            time.sleep(0.001)
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def check_files(out: Path) -> int:
    """Reads every checkpoint that is there; returns the step that --resume will begin with."""
    step = 0
    for path in sorted(out.glob("*.pt")):  # align.pt, then align.resume.pt
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
        if damaged:
            sys.exit(f"{path}: {damaged} is not what was written")
        step = torch.load(path, weights_only=True)["step"]
    return step


def same_result(out: Path, other: Path) -> bool:
    logs = [(path / "align.jsonl").read_bytes() for path in (out, other)]
    states = [torch.load(path / "align.pt", weights_only=True)["model"] for path in (out, other)]
    equal = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    return equal and logs[0] == logs[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400, help="of a run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    started, place = time.time(), Path(tempfile.mkdtemp(prefix="kill-loop-"))
    make_project(place)
    alone = place / "alone"
    startup = run_alone(place, args.steps, alone)
    kills, runs, amid_save, early = 0, 0, 0, 0
    while kills < args.kills:
        runs += 1
        out = place / f"killed-{runs}"
        while True:
            run = start(place, args.steps, out)
            if kills == args.kills:
                run.wait()
            else:
                kill(run, out, random.uniform(0, 1.5 * startup), amid_save=kills % 2 == 1)
            if run.returncode == 0:
                break
            if run.returncode != -signal.SIGKILL:
                sys.exit(f"exit code {run.returncode} after {kills} kills; see {out}")
            kills += 1
            hit, step = saving(out), check_files(out)
            amid_save += hit
            early += step == 0
            for path in out.glob("*.tmp"):
                path.unlink()  # else the next kill would take it for its own
            print(f"kill {kills}: step {step}{', amid a save' if hit else ''}", flush=True)
        if not same_result(out, alone):
            sys.exit(f"the weights or the log of {out} are not those of {alone}")
    shutil.rmtree(place)
    print(
        f"{kills} kills in {runs} runs and {time.time() - started:.0f} s, {amid_save} of them amid "
        f"a save, {early} before the first: every checkpoint was complete, and {args.steps} steps "
        "end in the same weights and log, bit for bit"
    )


if __name__ == "__main__":
    main()
