"""Several ranks do what one process does: losses, checkpoints, resuming, the encoder cache, answers. A launch of ranks
costs seconds, so one launch makes all runs that need two of them, and another loses a rank."""

import itertools
import json
import os
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
from prepare.faults import Stop  # noqa: E402


def run(argv, half=None):
    """A training run on however many ranks there are. half: where its directory is copied to, as it is when it was saved
    half way, at step 2 of 4."""
    cfg, validate, calls = train.parse(argv), train.validate, itertools.count(1)

    def copying(*args):
        if next(calls) == 2 and half:
            if ranks.rank() == 0:
                shutil.copytree(cfg.out, half)
            ranks.gather("copied")
        return validate(*args)

    train.validate = copying
    try:
        with Stop() as stop:
            train.train(cfg, stop)
    finally:
        train.validate = validate


def on_two_ranks(work):
    """Launches this file on two ranks, which do what work.json in that directory says. Returns exit code and output."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__,
                           str(work)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=580)
    return done.returncode, done.stdout


def losses(out, phase="ift"):
    lines = [json.loads(line) for line in (out / f"{phase}.jsonl").read_text().splitlines()]
    names = "step", "loss", "norm", "tokens", "audio"
    return np.array([[line[name] for name in names] for line in lines if "loss" in line])


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


def argv(project, work, name, **options):
    options = dict(phase="ift", encoder=project / "encoder", llm=project / "llm", data=work / "train.jsonl",
                   dev=project / "dev.jsonl", out=work / name, steps=4, eval_every=2, eval_rows=4, eval_clips=1, warmup=2,
                   adapter_lr=1e-3, encoder_lr=1e-3, llm_lr=1e-3, batch_frames=100, workers=0, trust_paths=True) | options
    return [str(word) for key, value in options.items() if value is not False
            for word in (f"--{key.replace('_', '-')}", *([] if value is True else [value]))]


@pytest.fixture(scope="module")
def work(tiny_project, tmp_path_factory):
    """A directory with runs of one process, runs of two ranks, and runs of either that go on with half a run of the
    other. Dropout, layerdrop and masks are on, and some batches have no usable row."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("work")
    rows = [json.loads(line) for line in (tiny_project / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "audio": str(tiny_project / row["audio"])} for row in rows]
    rows += [{**row, "duration": 40.0} for row in rows[:3]]  # too long, and each a batch of its own
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def job(name, half=None, origin=None, **options):
        """The arguments of `run` and, for a run that goes on, the half that it starts from."""
        return [argv(tiny_project, work, name, resume=bool(origin), **options), half and str(work / half),
                origin and str(work / origin)]

    def scores(out):
        return [str(tiny_project / "dev.jsonl"), "--ckpt", str(work / "four/ift.pt"), "--out", str(work / out)]

    sharded = dict(accumulate=2, fsdp=True, checkpointing=True)
    do(job("four", "four-half", accumulate=4))
    do(job("three", "three-half", accumulate=3))
    do(job("align", phase="align"))
    evaluation.main(scores("scores"))
    (work / "work.json").write_text(json.dumps({"eval": scores("scores-ranks"), "train": [
        job("ddp", "ddp-half", accumulate=2), job("fsdp", "fsdp-half", **sharded),
        job("ddp-ddp", origin="ddp-half", accumulate=2), job("fsdp-fsdp", origin="fsdp-half", **sharded),
        job("four-ddp", origin="four-half", accumulate=2), job("three-fsdp", origin="three-half", accumulate=3, fsdp=True),
        job("align-ddp", phase="align")]}))
    code, said = on_two_ranks(work)
    assert code == 0, said
    do(job("ddp-one", origin="ddp-half", accumulate=4))
    do(job("fsdp-one", origin="fsdp-half", accumulate=2, checkpointing=True))
    return work


def do(job):
    argv, half, origin = job
    if origin:
        if ranks.rank() == 0:
            shutil.copytree(origin, train.parse(argv).out)
        ranks.gather("copied")
    run(argv, half)


@pytest.mark.parametrize("name, same", [("ddp", "four"), ("fsdp", "four"), ("four-ddp", "four"), ("ddp-one", "four"),
                                        ("fsdp-one", "four"), ("three-fsdp", "three")])
def test_ranks_do_what_one_process_does(work, name, same):
    """Also when a run goes on with other ranks, or with a number that does not divide the batches of a step (three)."""
    assert np.allclose(losses(work / name), losses(work / same), rtol=1e-5, atol=0) and len(losses(work / name)) == 4
    mine, one = weights(work / name), weights(work / same)
    assert list(mine) == list(one) and all(type(tensor) is torch.Tensor for tensor in mine.values())
    for part in mine:  # a key's bias has no effect: its gradient is rounding, which AdamW takes for a direction
        assert part.endswith(("linear_k.bias", "k_proj.bias")) or torch.allclose(mine[part], one[part], atol=1e-4), part
    assert (work / name / "ift.resume-4-4").exists() == name.endswith("fsdp")  # and no older shards
    assert len(list((work / name).glob("ift.resume*"))) == 1 + name.endswith("fsdp")
    states = [torch.load(work / out / "ift.resume.pt", weights_only=True) for out in (name, same)]
    assert states[0]["bad"] == states[1]["bad"] != {} and states[0]["seen"] == states[1]["seen"]
    assert states[0]["position"] == states[1]["position"]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_resumed_on_as_many_ranks_is_the_same_bit_for_bit(work, name):
    assert (work / name / "ift.jsonl").read_bytes() == (work / f"{name}-{name}" / "ift.jsonl").read_bytes()
    whole, resumed = weights(work / name), weights(work / f"{name}-{name}")
    assert all(torch.equal(whole[part], resumed[part]) for part in whole)


def test_the_encoder_cache_is_made_together(work):
    one, two = (list((work / name).glob("encoder-*")) for name in ("align", "align-ddp"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 1
    for a, b in zip(*(torch.load(paths[0], weights_only=True) for paths in (one, two)), strict=True):
        assert a == b if isinstance(a, str) else torch.equal(a, b)
    assert len(losses(work / "align-ddp", "align")) == 4


def test_answers_are_shared_out_and_joined_in_order(work):
    for name in ("dev-ift.jsonl", "dev-ift.json"):
        assert (work / "scores" / name).read_bytes() == (work / "scores-ranks" / name).read_bytes()
    assert len(list((work / "scores-ranks").iterdir())) == 3


def test_runs_that_cannot_go_on_say_why(work, tiny_project, tmp_path):
    shutil.copytree(work / "fsdp-half", tmp_path / "half")
    for change, message in [
            (dict(accumulate=3), "was trained with accumulate 2, found 3; give the same, or start anew without --resume"),
            (dict(accumulate=2), "ift.resume-2-2: .*; ift.resume.pt needs this directory beside it, as it was written")]:
        with pytest.raises(train.CheckpointError, match=message) as error:
            run(argv(tiny_project, work, tmp_path / "half", resume=True, checkpointing=True, **change))
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "half" / "ift.resume-2-2", ignore_errors=True)


def test_a_lost_rank_ends_the_run_and_nothing_is_lost(work, tiny_project):
    (work / "work.json").write_text(json.dumps({"lose": argv(tiny_project, work, "lost", accumulate=2, fsdp=True)}))
    code, said = on_two_ranks(work)
    assert code == 1 and "Signal 9 (SIGKILL) received" in said
    assert "[rank0]" not in said and said.count("lost another rank") <= 1, said  # torchrun may have ended it before
    assert torch.load(work / "lost/ift.resume.pt", weights_only=True)["step"] == 2
    run(argv(tiny_project, work, "lost", resume=True, accumulate=4))
    assert np.allclose(losses(work / "lost"), losses(work / "four"), rtol=1e-5, atol=0)


def lose_a_rank(argv):
    validate, calls = train.validate, itertools.count(1)

    def dying(*args):
        if next(calls) == 2 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return validate(*args)

    train.validate = dying
    train.main(argv)


if __name__ == "__main__":  # a rank
    work = json.loads((Path(sys.argv[1]) / "work.json").read_text())
    torch.set_num_threads(1)
    if "lose" in work:
        lose_a_rank(work["lose"])
    for job in work.get("train", ()):
        do(job)
    evaluation.main(work["eval"])
