"""Several ranks do what one process does: losses, checkpoints, resuming, the encoder cache, answers. A launch of ranks
costs seconds, so one launch makes all runs that need two of them, and another loses a rank."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from data import schedule  # noqa: E402
from prepare import journal, ranks  # noqa: E402

STEPS = 6


def run(argv, half=None):
    """A training run on however many ranks there are. half: where its directory is copied to as it was saved half way,
    when step 3 of 6 was done."""
    cfg, validate, calls = train.parse(argv), train.validate, itertools.count(1)

    def copying(*args):
        if next(calls) == 2 and half:
            if ranks.rank() == 0:
                shutil.copytree(cfg.out, half)
            ranks.gather("copied")
        return validate(*args)

    train.validate = copying
    try:
        train.train(cfg)
    finally:
        train.validate = validate


def on_two_ranks(work, **env):
    """Launches this file on two ranks, which do what work.json in the directory says. Returns exit code and output."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__,
                           str(work)], env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=240)
    return done.returncode, done.stdout


def losses(out, phase="ift"):
    lines = [json.loads(line) for line in (out / f"{phase}.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in ("step", "loss", "norm", "tokens", "audio")] for line in lines if "loss" in line])


def weights(out):
    return torch.load(out / "ift.pt", weights_only=True)["model"]


# ------------------------------------------------------------------------------------------------------ without ranks


def test_every_batch_of_a_step_is_dealt_once_and_evenly(monkeypatch):
    sizes = np.random.default_rng(0).lognormal(5, 1, 400).clip(10, 1500).astype(int).tolist()

    def size(m, i, turn):
        return sizes[i], 5

    def order():
        return schedule([sizes], [1], size, 1500, 10**6, 0)

    for count, total in ((1, 4), (2, 4), (4, 16), (2, 3), (3, 4), (3, 2)):
        monkeypatch.setattr(ranks, "world", lambda: count)
        dealt = []
        for r in range(count):
            monkeypatch.setattr(ranks, "rank", lambda: r)
            dealt.append(list(itertools.islice(ranks.deal(order(), size, total), 5 * -(-total // count))))
        steps = zip(*[iter(order())] * total)
        for at, step in zip(range(0, len(dealt[0]), -(-total // count)), steps):
            shares = [some[at:at - (-total // count)] for some in dealt]
            found = [batch for share in shares for batch in share if batch[1]]
            assert sorted(map(str, found)) == sorted(map(str, step))  # and empty ones where they do not suffice
            assert count > 1 or found == list(step)
            assert max((p["pool"], p["batch"]) for share in shares for p, _ in share) == \
                (step[-1][0]["pool"], step[-1][0]["batch"])
            cost = [sum(sizes[i] + 5 for _, batch in share for _, i, _ in batch) for share in shares]
            dearest = max(sum(sizes[i] + 5 for _, i, _ in batch) for _, batch in step)
            assert max(cost) - min(cost) <= dearest


def test_journals_of_a_stopped_run_are_joined(tmp_path, capsys):
    path, settings = tmp_path / "a[1].jsonl", {"beams": 1}
    items, own = journal.open_journal(path, settings)
    assert items == {} and own == path
    path.write_text('{"id": "1"}\n{"id": "2"}\n{"id": "3')  # as kills leave them
    (tmp_path / "a[1].part0.jsonl").write_text('{"id": "4"}\n')
    (tmp_path / "a[1].part1.jsonl").write_text('{"id": "2"}\n{"id": "5"}\n')
    items, _ = journal.open_journal(path, settings)
    assert list(items) == ["1", "2", "4", "5"] and "4 answers are there already" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a[1].json", "a[1].jsonl"]
    assert journal.open_journal(path, {"beams": 2})[0] == {}  # made otherwise: kept aside
    assert len((tmp_path / "a[1].old.jsonl").read_text().splitlines()) == 4


# ---------------------------------------------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def work(tiny_project, tmp_path_factory):
    """Runs of one process, then those of two ranks, some of which go on from them, all in directories by their names."""
    torch.set_num_threads(1)
    work, project = tmp_path_factory.mktemp("work"), tiny_project
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = str(project / row["audio"])
    rows += [{**rows[i], "start": 0.001 * i, "duration": 40.0} for i in range(3)]  # too long: batches without a usable row
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def argv(name, **options):
        options = dict(phase="ift", encoder=project / "encoder", llm=project / "llm", data=work / "train.jsonl",
                       dev=project / "dev.jsonl", out=work / name, steps=STEPS, eval_every=3, eval_rows=4, eval_clips=1,
                       warmup=2, adapter_lr=1e-3, encoder_lr=1e-3, llm_lr=1e-3, batch_frames=100, workers=0) | options
        return [str(word) for key, value in options.items() if value is not False
                for word in (f"--{key.replace('_', '-')}", *([] if value is True else [value]))]

    for n in (3, 4):
        run(argv(f"one{n}", accumulate=n), work / f"one{n}-half")
    run(argv("align", phase="align", steps=3))
    evaluation.main([str(project / "dev.jsonl"), "--ckpt", str(work / "one4/ift.pt"), "--out", str(work / "eval1")])
    jobs = [(argv("ddp", accumulate=2), "ddp-half"), (argv("fsdp", accumulate=2, fsdp=True, checkpointing=True), "fsdp-half")]
    for name, half, options in [
            ("ddp-ddp", "ddp-half", dict(accumulate=2)), ("one4-ddp", "one4-half", dict(accumulate=2)),
            ("fsdp-fsdp", "fsdp-half", dict(accumulate=2, fsdp=True, checkpointing=True)),
            ("one3-fsdp", "one3-half", dict(accumulate=3, fsdp=True)),
            ("fsdp-ddp", "fsdp-half", dict(accumulate=2, checkpointing=True))]:
        jobs.append((argv(name, resume=True, **options), None))
        half = work / half
        jobs[-1] = (*jobs[-1], str(half))
    jobs.append((argv("align2", phase="align", steps=3), None))
    jobs = [(words, name and str(work / name), *rest) for words, name, *rest in jobs]
    (work / "work.json").write_text(json.dumps({"train": jobs, "eval": [
        str(project / "dev.jsonl"), "--ckpt", str(work / "one4/ift.pt"), "--out", str(work / "eval2")]}))
    code, said = on_two_ranks(work)
    assert code == 0, said
    (work / "said").write_text(said)
    for name, half, options in [("ddp-one", "ddp-half", dict(accumulate=4)), ("fsdp-one", "fsdp-half", dict(accumulate=2, checkpointing=True))]:
        shutil.copytree(work / half, work / name)
        run(argv(name, resume=True, **options))
    return work


def test_two(work):
    for name in ("ddp", "fsdp", "ddp-ddp", "one4-ddp", "fsdp-fsdp", "one3-fsdp", "fsdp-ddp", "ddp-one", "fsdp-one"):
        a, b = losses(work / name), losses(work / ("one3" if "one3" in name else "one4"))
        print(name, np.abs(a / b - 1).max(0))
    print((work / "said").read_text()[:3000])
    assert 0


def main(work):
    """What a rank does."""
    work = json.loads((Path(work) / "work.json").read_text())
    torch.set_num_threads(1)
    for argv, half, *origin in work["train"]:
        if origin:
            if ranks.rank() == 0:
                shutil.copytree(origin[0], train.parse(argv).out)
            ranks.gather("copied")
        run(argv, half)
    evaluation.main(work["eval"])


if __name__ == "__main__":
    main(*sys.argv[1:])
