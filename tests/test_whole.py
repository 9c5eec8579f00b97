"""The five files are whole: alone with demo/ in an empty folder they do what they do here, only
slower or plainer."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import log

import eval
import sample
import train

ROOT = Path(__file__).resolve().parent.parent
FILES = ("model.py", "data.py", "sample.py", "eval.py", "train.py")
SHORT = "--steps 2 --eval-every 2 --eval-rows 8 --eval-clips 1 --dev demo/few.jsonl".split()
ALIGN = ["--phase", "align", "--batch-frames", "600", "--cache-gb", "0", *SHORT]
IFT = ["--phase", "ift", "--init", "out/align.pt", "--batch-frames", "600", *SHORT]
ANSWER = ["demo/sample.wav", "Translate to German", "--json"]
SCORE = ["demo/few.jsonl", "--tasks", "asr", "st"]


def few_rows(path):
    """The first rows of each task and language of a manifest, for short runs."""
    groups = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        group = groups.setdefault((row["task"], row.get("target_language")), [])
        if len(group) < 2:
            group.append(line)
    return "".join(line + "\n" for group in groups.values() for line in group)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders with demo/ and what the commands leave: of the five files alone, run there, and
    of the repository as it is."""
    alone, here = (tmp_path_factory.mktemp(name) for name in ("alone", "here"))
    for place in (alone, here):
        shutil.copytree(ROOT / "demo", place / "demo")
        (place / "demo" / "few.jsonl").write_text(few_rows(ROOT / "demo" / "dev.jsonl"))
    for name in FILES:
        shutil.copy(ROOT / name, alone)
    return alone, here


def run_alone(folder, program, argv):
    """What a program prints, run as the README runs it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, f"{program}.py", *argv],
        cwd=folder,
        env=dict(environment, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(folder, program, argv):
    """What a program prints that has extras/, with the folder's copy of demo/."""
    models = ["--encoder", "demo/encoder", "--llm", "demo/llm", "--data", "demo/train.jsonl"]
    output = io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(output):
            program.main([*argv, *(models if program is train else ())])
    finally:
        os.chdir(before)
    return output.getvalue()


def assert_same_log(places, phase):
    names = ("loss", "norm", "lr", "tokens", "audio", "dev_loss", "shuffled_loss", "wer", "bleu")
    logs = [log(place / "out", phase) for place in places]
    # Two steps and a validation; with --init, there is a validation before the first step, too.
    assert len(logs[0]) == len(logs[1]) == (3 if phase == "align" else 4)
    for plain, fast in zip(*logs, strict=True):
        assert plain.keys() == fast.keys()
        for name in plain.keys() & set(names):
            assert plain[name] == pytest.approx(fast[name], abs=1e-4 if name != "norm" else 1e-2)


def test_the_five_files_run_alone_with_the_same_results(places):
    alone, here = places
    torch.set_num_threads(1)
    assert sorted(path.name for path in alone.iterdir()) == sorted(["demo", *FILES])
    for argv in (ALIGN, IFT):
        assert "preset for LLMs of width 0" in run_alone(alone, "train", argv)
        run_here(here, train, argv)
        assert_same_log(places, argv[1])
        assert (here / "out" / f"{argv[1]}.svg").exists()
        assert not list(alone.glob("out/*.svg"))

    answers = [run_alone(alone, "sample", ANSWER), run_here(here, sample, ANSWER)]
    assert answers[0] == answers[1] and json.loads(answers[0])["task"] == "st"
    run_alone(alone, "eval", SCORE)
    run_here(here, eval, SCORE)
    items = [log(place / "out" / "eval", "few-ift") for place in places]
    assert len(items[0]) == 8
    for plain, fast in zip(*items, strict=True):
        assert plain["hypothesis"] == fast["hypothesis"] and plain["scores"] == fast["scores"]
    summary = json.loads((alone / "out" / "eval" / "few-ift.json").read_text())
    assert {line["task"] for line in summary["scores"]} == {"asr", "st"}
    assert (here / "out" / "eval" / "few-ift.html").exists()
    assert not list(alone.glob("out/eval/*.html"))
