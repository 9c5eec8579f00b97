"""Several ranks do what one process does: losses, checkpoints, resuming, the encoder cache. A
launch of ranks costs seconds, so that one launch makes all runs that need two of them, and another
loses a rank."""

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from test_train import EVERYTHING, arguments, log, read_rows, refused, saved, write_rows  # noqa: E402

import train  # noqa: E402
from model import SpeechLM  # noqa: E402

WARM = {"phase": "align", "warm_start": 2, "encoder_lr": False, "lora_rank": 2}
SHARDED = {"accumulate": 2, "fsdp": True, "checkpointing": True}


# ------------------------------------------------------------------------------
# Jobs: lists of runs, which a process or two ranks do one after the other


def job(project, work, name, origin=None, at=None, sent=None, spoilt=None, **options):
    """A run into work/name. origin: the run that this one goes on with; at: the step at which it is
    sent a signal; spoilt: the batch of the last rank whose loss is infinite."""
    common = {
        "phase": "ift",
        "data": work / "train.jsonl",
        "steps": 4,
        "eval_every": 2,
        "eval_rows": 2,
        "eval_clips": 0,
        "batch_frames": 100,
        "average": 2,
        **EVERYTHING,
    }
    argv = arguments(project, work / name, resume=bool(origin), **common | options)
    origin = str(work / origin) if origin else None
    out = str(work / name)
    return {"argv": argv, "out": out, "origin": origin, "at": at, "signal": sent, "spoilt": spoilt}


def run(job):
    """Does a job in this process, which may be a rank."""
    if job["origin"] and int(os.environ.get("RANK", 0)) == 0:
        shutil.copytree(job["origin"], job["out"], dirs_exist_ok=True)
    step, destroy = torch.optim.AdamW.step, torch.distributed.destroy_process_group
    forward = SpeechLM.forward
    calls, batches = [], []
    # What happens reaches only the last rank.
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", 1)) - 1)

    def signalled(*args):
        calls.append(1)
        if len(calls) == job["at"] and last:
            os.kill(os.getpid(), job["signal"])
        return step(*args)

    def spoilt(self, *args, **options):
        loss, tokens = forward(self, *args, **options)
        batches.extend([1] * torch.is_grad_enabled())
        if last and torch.is_grad_enabled() and len(batches) == job["spoilt"]:
            loss = loss + float("inf")  # its gradients stay finite
        return loss, tokens

    torch.optim.AdamW.step, SpeechLM.forward = signalled, spoilt
    torch.distributed.destroy_process_group = lambda: None  # the next job needs it, too
    try:
        train.main(job["argv"])
    except SystemExit as stop:
        if job["at"] is None or stop.code not in (128 + job["signal"], 128 + signal.SIGINT):
            raise
    finally:
        torch.optim.AdamW.step, torch.distributed.destroy_process_group = step, destroy
        SpeechLM.forward = forward


def run_on_two_ranks(work, jobs):
    """Launches this file on two ranks. Returns exit code and output."""
    (work / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, __file__, str(work / "jobs.json")],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


# ------------------------------------------------------------------------------
# Two ranks


def figures(out, phase="ift"):
    """Step, loss, gradient norm, target tokens and seconds of audio of every step."""
    names = ("step", "loss", "norm", "tokens", "audio")
    lines = [line for line in log(out, phase) if "loss" in line]
    return np.array([[line[name] for name in names] for line in lines])


@pytest.fixture(scope="module")
def work(tiny_project, tmp_path_factory):
    """A directory with runs of one process, runs of two ranks, and runs of either that go on with
    half a run of the other. Dropout, layerdrop and masks are on, and some batches have no row that
    can be used."""
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("work")
    rows = read_rows(tiny_project / "train.jsonl")
    # Recordings that are not there, each a batch alone.
    rows += [row | {"audio": f"none{i}.wav", "duration": 12.0} for i, row in enumerate(rows[:3])]
    write_rows(work / "train.jsonl", rows)

    def make(name, origin=None, **options):
        return job(tiny_project, work, name, origin, **options)

    half = {"at": 2, "sent": signal.SIGTERM}
    run(make("four", accumulate=4))
    run(make("four-half", accumulate=4, **half))
    run(make("align", phase="align", cache_gb=2, encoder_lr=False, llm_lr=False))
    run(make("warm", accumulate=4, **WARM))
    run(make("spoilt", accumulate=4, spoilt=8))
    jobs = [
        make("ddp", accumulate=2),
        make("ddp-half", accumulate=2, **half),
        make("ddp-ddp", "ddp-half", accumulate=2),
        make("four-ddp", "four-half", accumulate=2),
        make("fsdp", **SHARDED),
        make("fsdp-half", **SHARDED, **half),
        make("fsdp-fsdp", "fsdp-half", **SHARDED),
        make("four-fsdp", "four-half", accumulate=2, fsdp=True),
        make("align-ddp", phase="align", cache_gb=2, encoder_lr=False, llm_lr=False),
        make("warm-ddp", accumulate=2, **WARM),
        make("warm-fsdp", accumulate=2, fsdp=True, **WARM),
        make("spoilt-ddp", accumulate=2, spoilt=4),
        make("spoilt-fsdp", accumulate=2, fsdp=True, spoilt=4),
    ]
    code, output = run_on_two_ranks(work, jobs)
    assert code == 0, output
    run(make("ddp-one", "ddp-half", accumulate=4))
    run(make("fsdp-one", "fsdp-half", accumulate=4, checkpointing=True))
    return work


def check_weights(weights, expected):
    for part, tensor in weights.items():
        # A bias of the keys has no effect: its gradient is rounding, of which AdamW makes steps.
        idle = part.endswith(("linear_k.bias", "k_proj.bias"))
        assert idle or torch.allclose(tensor, expected[part], atol=1e-4), part


@pytest.mark.parametrize("name", ["ddp", "fsdp", "four-ddp", "four-fsdp", "ddp-one", "fsdp-one"])
def test_ranks_do_what_one_process_does(work, name):
    """Also when a run goes on with another number of ranks."""
    assert len(figures(work / name)) == 4
    assert np.allclose(figures(work / name), figures(work / "four"), rtol=1e-5, atol=0)
    weights, expected = (saved(work / out, "ift.pt")["model"] for out in (name, "four"))
    assert list(weights) == list(expected)
    assert all(type(tensor) is torch.Tensor for tensor in weights.values())
    check_weights(weights, expected)
    resumes = [saved(work / out, "ift.resume.pt") for out in (name, "four")]
    assert list(resumes[0]) == list(resumes[1])
    assert resumes[0]["state"] == resumes[1]["state"] and resumes[0]["state"]["bad"]
    assert sorted(path.name for path in (work / name).iterdir()) == sorted(
        path.name for path in (work / "four").iterdir()
    )


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_resumed_on_as_many_ranks_is_the_same_bit_for_bit(work, name):
    resumed = work / f"{name}-{name}"
    assert log(work / name, "ift") == log(resumed, "ift")
    weights, expected = (saved(out, "ift.pt")["model"] for out in (resumed, work / name))
    assert all(torch.equal(weights[part], expected[part]) for part in expected)


def test_ranks_share_the_work_of_the_encoder_cache(work):
    one = list((work / "align").glob("encoder-*"))
    two = sorted((work / "align-ddp").glob("encoder-*"))
    assert len(one) == 1 and len(two) == 2
    expected, parts = torch.load(one[0]), [torch.load(path) for path in two]
    assert all(parts) and not parts[0].keys() & parts[1].keys()
    states = parts[0] | parts[1]
    assert states.keys() == expected.keys()
    for clip, value in expected.items():
        assert value == states[clip] if isinstance(value, str) else torch.equal(value, states[clip])
    assert len(figures(work / "align-ddp", "align")) == 4


@pytest.mark.parametrize("name", ["warm-ddp", "warm-fsdp"])
def test_ranks_warm_start_what_one_process_does(work, name):
    """The LLM's low-rank updates have no gradients at first."""
    outs = work / name, work / "warm"
    ours, expected = (figures(out, "align") for out in outs)
    assert len(ours) == 4 and np.allclose(ours, expected, rtol=1e-5, atol=0)
    weights, expected = (saved(out, "align.pt")["model"] for out in outs)
    updates = [part for part in expected if part.endswith("lora_b")]
    assert updates and list(weights) == list(expected)
    assert all(torch.allclose(weights[part], expected[part], atol=1e-4) for part in updates)


@pytest.mark.parametrize("name", ["spoilt-ddp", "spoilt-fsdp"])
def test_all_ranks_pass_over_a_step_that_one_finds_infinite(work, name):
    """Though all gradients are finite."""
    outs = work / name, work / "spoilt"
    ours, expected = (figures(out) for out in outs)
    assert expected[:, 0].tolist() == [1, 3, 4] and np.allclose(ours, expected, rtol=1e-5, atol=0)
    rows, expected = (read_rows(out / "ift.nonfinite.jsonl") for out in outs)
    assert {row.pop("skipped")[:8] for row in rows + expected} == {"loss inf"}
    assert sorted(map(str, rows)) == sorted(map(str, expected)) and rows[0]["step"] == 2
    resumes = [saved(out, "ift.resume.pt") for out in outs]
    for moments, expected in zip(*(x["optimizer"].values() for x in resumes), strict=True):
        assert moments["step"] == expected["step"] == 3
    check_weights(resumes[0]["model"], resumes[1]["model"])


def test_another_number_of_batches_a_step_is_refused(work, tiny_project):
    made = job(tiny_project, work, "ddp-half", "ddp-half", accumulate=3)
    refused(made["argv"], "ddp-half.ift.resume.pt: .*(accumulate|batches a step)")


def test_a_lost_rank_ends_the_run_and_nothing_is_lost(work, tiny_project):
    lost = job(tiny_project, work, "lost", at=3, sent=signal.SIGKILL, accumulate=2)
    code, output = run_on_two_ranks(work, [lost])
    assert code == 1 and "Signal 9 (SIGKILL) received" in output
    # Rank 0 says so in one line, if torchrun has not ended it before.
    assert output.count("lost another rank") <= 1 and "[rank0]" not in output, output
    assert saved(work / "lost", "ift.resume.pt")["step"] == 2
    run(job(tiny_project, work, "mended", "lost", accumulate=4))
    assert np.allclose(figures(work / "mended"), figures(work / "four"), rtol=1e-5, atol=0)


def test_a_rank_that_lets_the_first_one_speak_ends_quietly(tiny_project, tmp_path):
    """What is wrong for all ranks is told once; torchrun then ends the others."""
    argv = arguments(tiny_project, tmp_path, data=tmp_path / "none.jsonl")
    code = """if True:
        import os, signal, sys, time, train
        train.join_ranks = lambda device: None
        time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
        train.main(sys.argv[1:])"""
    environment = dict(os.environ, OMP_NUM_THREADS="1", LOCAL_RANK="1")
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == -signal.SIGTERM and not done.stderr, done.stderr


def main(path):
    """What each rank does."""
    torch.set_num_threads(1)
    for made in json.loads(Path(path).read_text()):
        run(made)


if __name__ == "__main__":
    main(sys.argv[1])
