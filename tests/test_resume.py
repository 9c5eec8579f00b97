"""What can happen to a run of train.py: signals, kills, a full disk, loader processes that die or
hang, steps without a finite gradient. What was saved stays intact, and with --resume the run
becomes the one that nothing happened to."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import arguments, log, refused, saved

import train
from data import Examples
from model import SpeechEncoder, SpeechLM

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")
RESUME = "what was saved is intact"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def stopped(argv):
    """The exit code of a run that a signal ends."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    return stop.value.code


def signal_at(monkeypatch, owner, name, at, *numbers):
    """Sends signals to this process as the function is called for the at-th time."""
    function = getattr(owner, name)
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


def assert_same_run(out, other):
    """Log and weights are equal bit for bit."""
    assert log(out) == log(other)
    weights, expected = saved(out)["model"], saved(other)["model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.fixture(scope="module")
def undisturbed(tiny_project, tmp_path_factory):
    """The out directory of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    train.main(arguments(tiny_project, out))
    return out


# ------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(
    "owner, name, at, step, number",
    [
        # A step is computed: it is finished and saved.
        (SpeechLM, "forward", 3, 3, signal.SIGTERM),
        (SpeechLM, "forward", 2, 2, signal.SIGINT),
        # A validation: what was trained is saved, and --resume validates.
        (train, "answer_examples", 1, 4, signal.SIGTERM),
        # The last one, of a run that has trained all its steps.
        (train, "answer_examples", 2, 8, signal.SIGINT),
        # A save: it is finished.
        (torch, "save", 1, 4, signal.SIGINT),
        (torch, "save", 2, 4, signal.SIGTERM),
    ],
)
def test_a_signal_saves_and_ends_the_run(
    monkeypatch, capfd, undisturbed, tiny_project, tmp_path, owner, name, at, step, number
):
    with monkeypatch.context() as patch:
        signal_at(patch, owner, name, at, number)
        assert stopped(arguments(tiny_project, tmp_path)) == 128 + number
    output = capfd.readouterr().err
    assert f"train.py: stopped; {RESUME}" in output and "Traceback" not in output
    assert saved(tmp_path, "align.resume.pt")["step"] == step
    assert not list(tmp_path.glob("*.tmp"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train.main(arguments(tiny_project, tmp_path, resume=True))
    assert_same_run(tmp_path, undisturbed)


def test_low_rank_training_is_resumed(monkeypatch, tiny_project, tmp_path):
    """In phase ift, where dropout, masks and layers that are left out are drawn anew each step."""
    lora = {"phase": "ift", "lora_rank": 2, "llm_lr": 1e-2, "encoder_lr": 1e-3, "steps": 4}
    train.main(arguments(tiny_project, tmp_path / "a", **lora))
    with monkeypatch.context() as patch:
        signal_at(patch, torch.optim.AdamW, "step", 2, signal.SIGTERM)
        assert stopped(arguments(tiny_project, tmp_path / "b", **lora)) == 143
    assert not (tmp_path / "b" / "ift.pt").exists()  # nothing was validated yet
    train.main(arguments(tiny_project, tmp_path / "b", resume=True, **lora))
    assert log(tmp_path / "a", "ift") == log(tmp_path / "b", "ift")


@pytest.mark.parametrize("options", [{"phase": "ift"}, {"cache_gb": 2}])
def test_a_run_on_changed_recordings_is_resumed(monkeypatch, tiny_project, tmp_path, options):
    """With features and with cached states, half of them changed, and silence among them."""
    options = {"augment": 0.5, "silence": 0.2, **options}
    phase = options.get("phase", "align")
    train.main(arguments(tiny_project, tmp_path / "a", **options))
    with monkeypatch.context() as patch:
        signal_at(patch, torch.optim.AdamW, "step", 3, signal.SIGTERM)
        assert stopped(arguments(tiny_project, tmp_path / "b", **options)) == 143
    train.main(arguments(tiny_project, tmp_path / "b", resume=True, **options))
    assert log(tmp_path / "a", phase) == log(tmp_path / "b", phase)


def test_a_warm_start_is_resumed(monkeypatch, tiny_project, tmp_path):
    """Amid it, where it ends, and behind it."""
    warm = {"warm_start": 3, "steps": 6, "eval_every": 2, "lora_rank": 2}
    train.main(arguments(tiny_project, tmp_path / "whole", **warm))
    for step in (1, 3, 5):
        out = tmp_path / str(step)
        with monkeypatch.context() as patch:
            signal_at(patch, torch.optim.AdamW, "step", step, signal.SIGTERM)
            assert stopped(arguments(tiny_project, out, **warm)) == 143
        assert saved(out, "align.resume.pt")["step"] == step
        train.main(arguments(tiny_project, out, resume=True, **warm))
        assert_same_run(out, tmp_path / "whole")


def test_a_signal_before_the_first_step_ends_the_run_there(
    monkeypatch, capfd, tiny_project, tmp_path
):
    """While the encoder cache is computed or saved, nothing half-written stays."""
    for owner, name in ((SpeechEncoder, "forward"), (torch, "save")):
        with monkeypatch.context() as patch:
            signal_at(patch, owner, name, 1, signal.SIGTERM)
            assert stopped(arguments(tiny_project, tmp_path, cache_gb=2)) == 143
        assert f"train.py: stopped; {RESUME}" in capfd.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# ------------------------------------------------------------------------------
# Processes


def program(argv, patch="", **options):
    """train.py as a process of a group of its own, with some Python that is run before main."""
    code = f"import os, signal, sys, time, train\n{patch}\ntrain.main(sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for_lines(process, path, count):
    """Until a log has so many lines, or the run that writes it has ended."""
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)


def test_killed_and_resumed_equals_uninterrupted(tiny_project, tmp_path):
    """kill -9 in the middle, twice."""
    options = {"steps": 40, "eval_every": 10, "eval_rows": 2, "eval_clips": 0}
    train.main(arguments(tiny_project, tmp_path / "a", **options))
    out = tmp_path / "b"
    for lines in (13, 28):
        run = program(arguments(tiny_project, out, resume=True, **options))
        wait_for_lines(run, out / "align.jsonl", lines)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL
        assert 0 < saved(out)["step"] < 40  # complete at any moment
    train.main(arguments(tiny_project, out, resume=True, **options))
    assert_same_run(tmp_path / "a", out)


def test_a_signal_to_the_group_leaves_the_loader_at_work(tiny_project, tmp_path):
    """Ctrl-C in a terminal reaches the loader's processes, too: they must not end before the step
    does."""
    options = {"workers": 2, "steps": 10**6, "eval_every": 10**6}
    run = program(arguments(tiny_project, tmp_path, **options))
    wait_for_lines(run, tmp_path / "align.jsonl", 4)
    os.killpg(run.pid, signal.SIGINT)
    output = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "Traceback" not in output
    assert "stopping after this step; a second signal stops at once" in output
    assert f"train.py: stopped; {RESUME}" in output
    assert saved(tmp_path, "align.resume.pt")["step"] == len(log(tmp_path)) > 0


def test_a_second_signal_ends_the_run_at_once(tiny_project, tmp_path):
    """The step that the first signal comes in would take a minute."""
    slow = f"lambda *_, **__: (os.kill(os.getpid(), {signal.SIGTERM}), time.sleep(60))"
    run = program(arguments(tiny_project, tmp_path), f"train.SpeechLM.forward = {slow}")
    while "stopping after this step" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == -signal.SIGINT and not list(tmp_path.glob("*.pt*"))
    run.stderr.close()


def patch_loader(monkeypatch, do):
    """Makes loader processes do something before they read a batch."""
    read = Examples.__getitem__

    def patched(*args):
        if torch.utils.data.get_worker_info():
            do()
        return read(*args)

    monkeypatch.setattr(Examples, "__getitem__", patched)


def test_a_loader_process_that_hangs_ends_the_run(monkeypatch, undisturbed, tiny_project, tmp_path):
    monkeypatch.setattr(train, "LOADER_SECONDS", 2)
    patch_loader(monkeypatch, lambda: time.sleep(600))
    start = time.time()
    refused(arguments(tiny_project, tmp_path, workers=1), "the loader failed .*timed out.*; what w")
    assert time.time() - start < 60
    time.sleep(0.2)  # were the end of a loader an error, it would be raised here


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def robbed():
    raise FileNotFoundError(2, "No such file or directory", "gone.jsonl")


@pytest.mark.parametrize(
    "do, message",
    [(killed, r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly"), (robbed, "gone.jsonl")],
)
def test_a_loader_process_that_dies_ends_the_run(monkeypatch, tiny_project, tmp_path, do, message):
    """As for want of memory, or because the manifest is gone."""
    patch_loader(monkeypatch, do)
    refused(arguments(tiny_project, tmp_path, workers=1), f"the loader failed .*{message}.*; what")
    time.sleep(0.2)  # were the end of the others an error, it would be raised here


# ------------------------------------------------------------------------------
# Disks


@pytest.mark.parametrize(
    "size, eval_every, message",
    [
        (2500, 400, f": File too large; {RESUME}"),  # the log
        (100_000, 4, f"align.pt: could not be written .*the disk full|: File too large; {RESUME}"),
    ],
)
def test_a_file_that_cannot_grow_ends_the_run(tiny_project, tmp_path, size, eval_every, message):
    """The kernel refuses to write beyond a file size, as it does on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    argv = arguments(tiny_project, tmp_path, steps=400, eval_every=eval_every)
    run = program(argv, preexec_fn=limit)
    output = run.communicate(timeout=100)[1]
    assert run.returncode == 1 and output.count("train.py: ") == 1, output
    assert re.search(message, output) and "Traceback" not in output, output
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.pt"))


def test_a_full_disk_keeps_the_last_checkpoint(monkeypatch, tiny_project, tmp_path):
    train.main(arguments(tiny_project, tmp_path, steps=1))
    before = (tmp_path / "align.pt").read_bytes()

    def fill(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device", "align.pt.tmp")

    monkeypatch.setattr(torch, "save", fill)
    refused(
        arguments(tiny_project, tmp_path, steps=1, seed=1),
        f"align.pt.tmp: No space left on device; {RESUME}",
    )
    assert (tmp_path / "align.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------
# Numbers


def break_losses(monkeypatch, calls, value=float("nan")):
    """Makes the loss of these calls of the model in training not finite."""
    function = SpeechLM.forward
    count = []

    def forward(self, *args, **options):
        loss, tokens = function(self, *args, **options)
        if torch.is_grad_enabled():
            count.append(1)
            loss = loss * value if len(count) in calls else loss
        return loss, tokens

    monkeypatch.setattr(SpeechLM, "forward", forward)


def test_a_step_without_a_finite_gradient_is_left_out(monkeypatch, capsys, tiny_project, tmp_path):
    """It changes no weight, and its rows are written down as they were drawn."""
    break_losses(monkeypatch, {3, 4, 6})
    train.main(arguments(tiny_project, tmp_path, eval_every=8))
    output = capsys.readouterr().out
    assert "step 3: loss nan, gradient norm nan: left out" in output
    assert "3 steps and 0 recordings left out" in output
    lines = [line for line in log(tmp_path) if "lr" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "skipped" in line] == [3, 4, 6]
    assert all("tokens" in line for line in lines)
    rows = log(tmp_path, "align.nonfinite")
    assert {row["step"] for row in rows} == {3, 4, 6}
    for row in rows:
        assert "train.jsonl line" in row["where"] and row["instruction"] and row["text"]
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path)["model"].values())
    moments = saved(tmp_path, "align.resume.pt")["optimizer"].values()
    assert all(state["step"] == 5 for state in moments)


def test_five_such_steps_in_a_row_end_the_run(monkeypatch, tiny_project, tmp_path):
    """A run that is resumed counts on."""
    argv = arguments(tiny_project, tmp_path, steps=20)
    with monkeypatch.context() as patch:
        break_losses(patch, range(7, 99), float("inf"))
        refused(
            argv,
            "step 11: loss inf, gradient norm .*, as in 5 steps in a row, whose rows are in "
            ".*align.nonfinite.jsonl; the last checkpoint is untouched: lower the learning rate",
        )
    assert saved(tmp_path, "align.resume.pt")["step"] == 8
    with monkeypatch.context() as patch:
        break_losses(patch, range(1, 99))
        refused([*argv, "--resume"], "step 11: loss nan, gradient norm nan, as in 5 steps in a row")
    rows = log(tmp_path, "align.nonfinite")
    assert sorted({row["step"] for row in rows}) == [7, 8, 9, 10, 11]


def test_a_signal_amid_such_steps_keeps_the_older_checkpoint(monkeypatch, tiny_project, tmp_path):
    break_losses(monkeypatch, {6, 7, 8})  # the last is under way when the second is left out
    signal_at(monkeypatch, train, "leave_out", 2, signal.SIGTERM)
    assert stopped(arguments(tiny_project, tmp_path)) == 143
    assert saved(tmp_path, "align.resume.pt")["step"] == 4


def test_a_validation_loss_that_is_not_finite_keeps_the_older_checkpoint(
    monkeypatch, tiny_project, tmp_path
):
    function = SpeechLM.forward

    def forward(self, *args, **options):
        loss, tokens = function(self, *args, **options)
        late = (tmp_path / "align.pt").exists() and not torch.is_grad_enabled()
        return loss * float("nan") if late else loss, tokens

    monkeypatch.setattr(SpeechLM, "forward", forward)
    message = "step 8: dev_loss nan; the last checkpoint is untouched: lower the learning rate"
    refused(arguments(tiny_project, tmp_path), message)
    assert saved(tmp_path, "align.resume.pt")["step"] == 4
