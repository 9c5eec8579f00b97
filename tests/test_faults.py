"""What goes wrong while train.py runs: signals, loader processes, disks, numbers. Each by its message and exit code."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_ask import run
from test_train import ROOT, arguments, log, refused

import eval
import sample
import train
from data import Examples
from model import SpeechLM
from prepare import faults


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def weights(out):
    return torch.load(Path(out) / "align.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopped(argv):
    """The exit code of a run that a signal or an error ends."""
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    return stop.value.code


def signal_at(monkeypatch, owner, name, at, *numbers):
    """Sends signals to this process as the function is called for the at-th time."""
    whole, calls = getattr(owner, name), []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, interrupted)


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def whole(tiny_project, tmp_path_factory):
    """The out directory of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train.main(arguments(tiny_project, out, cache_gb=0, workers=0))
    return out


@pytest.mark.parametrize("owner, name, at, step, number, code", [
    (SpeechLM, "forward", 3, None, signal.SIGTERM, 143),  # a step is computed: it is finished and saved
    (SpeechLM, "forward", 2, None, signal.SIGINT, 130),
    (train, "validate", 1, 4, signal.SIGTERM, 143),  # a validation: what was trained is saved, and --resume validates
    (train, "validate", 2, 8, signal.SIGINT, 130),  # the last one, of a run that has trained all its steps
    (torch, "save", 1, 4, signal.SIGINT, 130),  # a save: it is finished
    (torch, "save", 2, 4, signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_the_run(monkeypatch, capfd, whole, tiny_project, tmp_path, owner, name, at, step, number,
                                         code):
    """With --resume the log and the weights become those of a run that was left alone, bit for bit."""
    with monkeypatch.context() as patch:
        signal_at(patch, owner, name, at, number)
        assert stopped(arguments(tiny_project, tmp_path, cache_gb=0, workers=0)) == code
    assert "train.py: stopped; what was saved is intact: go on with --resume" in capfd.readouterr().err
    found = torch.load(tmp_path / "align.resume.pt", weights_only=True)["step"]
    assert 0 < found < 4 if step is None else found == step
    assert not list(tmp_path.glob("*.tmp")) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train.main(arguments(tiny_project, tmp_path, cache_gb=0, workers=0, resume=True))
    assert log(tmp_path) == log(whole) and same(weights(tmp_path), weights(whole))


def test_a_signal_before_the_first_step_ends_the_run_there(monkeypatch, capfd, tiny_project, tmp_path):
    """While the encoder cache is computed: nothing is saved and nothing half-written stays."""
    from prepare import encoder_cache
    for owner, name in ((encoder_cache, "fbank"), (torch, "save")):
        with monkeypatch.context() as patch:
            signal_at(patch, owner, name, 1, signal.SIGTERM)
            assert stopped(arguments(tiny_project, tmp_path)) == 143
        assert "train.py: stopped; what was saved is intact" in capfd.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def program(argv, patch="", **options):
    """train.py as a process of its own group, with a line of Python that is run before main."""
    code = f"import os, signal, sys, time, train\n{patch}\ntrain.main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"),
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


def test_a_signal_to_the_whole_group_leaves_the_loader_at_work(tiny_project, tmp_path):
    """Ctrl-C in a terminal reaches the loader's processes, too: they must not end before the step does."""
    argv = arguments(tiny_project, tmp_path, cache_gb=0, workers=2, steps=10**6, eval_every=10**6)
    run, path = program(argv), tmp_path / "align.jsonl"
    while run.poll() is None and not (path.exists() and path.stat().st_size > 400):
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "stopping after this step; a second signal stops at once" in said
    assert "go on with --resume" in said and "Traceback" not in said
    assert torch.load(tmp_path / "align.resume.pt", weights_only=True)["step"] == len(log(tmp_path)) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_run_at_once(tiny_project, tmp_path, number):
    """The step that the first signal comes in would take a minute."""
    run = program(arguments(tiny_project, tmp_path, cache_gb=0, workers=0), "train.SpeechLM.forward = lambda *_, **__: ("
                  f"os.kill(os.getpid(), {number}), time.sleep(60))")
    while "stopping after this step" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(number)
    assert run.wait(30) == -number and not list(tmp_path.glob("*.pt*"))
    run.stderr.close()


# -------------------------------------------------------------------------------------------------- loader processes


def test_a_loader_process_that_hangs_ends_the_run(monkeypatch, capsys, tiny_project, tmp_path):
    train.main(arguments(tiny_project, tmp_path, cache_gb=0, workers=0, steps=4, eval_every=4))
    before = weights(tmp_path)
    monkeypatch.setattr(faults, "LOADER_SECONDS", 2)
    read = Examples.__getitem__
    monkeypatch.setattr(Examples, "__getitem__", lambda *args: (
        time.sleep(600) if torch.utils.data.get_worker_info() else read(*args)))
    start = time.time()
    refused(capsys, arguments(tiny_project, tmp_path, cache_gb=0, workers=1, seed=1),
            "the loader has delivered nothing for 2 s, is the disk or network of the audio gone.*mend this and start again")
    assert time.time() - start < 60 and same(weights(tmp_path), before)


def test_a_loader_process_that_dies_ends_the_run(monkeypatch, capsys, tiny_project, tmp_path):
    """Killed, as for want of memory, while the run is elsewhere; and one whose manifest is gone."""
    argv = arguments(tiny_project, tmp_path, cache_gb=0, workers=1)

    read = Examples.__getitem__  # the first batch is read by the run itself

    def killed(self, scheduled):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, scheduled)

    def gone(self, scheduled):
        if torch.utils.data.get_worker_info():
            raise FileNotFoundError(2, "No such file or directory", "gone.jsonl")
        return read(self, scheduled)

    for broken, message in ((killed, r"a loader process died \(DataLoader worker \(pid\(s\) \d+\) exited unexpectedly\)"),
                            (gone, r"a loader process died \(FileNotFoundError: .*'gone.jsonl'\); start again with --res")):
        monkeypatch.setattr(Examples, "__getitem__", broken)
        refused(capsys, argv, message)


# ---------------------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize("size, options, message", [
    (2500, {}, ": File too large; what was saved before is intact: mend this and start again with --resume"),  # the log
    (100_000, dict(eval_every=4), "align.pt: could not be written to the end, is the disk full|: File too large; what was")])
def test_a_file_that_cannot_grow_ends_the_run(tiny_project, tmp_path, size, options, message):
    """The kernel refuses to write beyond a file size, as it does on a full disk."""
    argv = arguments(tiny_project, tmp_path, **{**dict(cache_gb=0, workers=0, steps=400, eval_every=400), **options})
    run = program(argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and said.count("train.py: ") == 1, said
    assert re.search(message, said) and "Traceback" not in said, said
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("damage", [lambda whole: whole[:len(whole) // 2],
                                    lambda whole: whole[:len(whole) // 2] + bytes(999) + whole[len(whole) // 2 + 999:]])
def test_a_checkpoint_that_reads_back_differently_is_not_kept(monkeypatch, capsys, tiny_project, tmp_path, damage):
    """The disk loses bytes behind the writer's back: the older checkpoint stays."""
    argv = arguments(tiny_project, tmp_path, cache_gb=0, workers=0, steps=4)
    train.main(argv)
    before, fsync = (tmp_path / "align.pt").read_bytes(), os.fsync

    def lose(file):
        fsync(file)
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.name == "align.pt.tmp":
            path.write_bytes(damage(path.read_bytes()))

    monkeypatch.setattr(os, "fsync", lose)
    refused(capsys, [*argv, "--seed", "1"], "align.pt.tmp: does not read back as it was written .*, is the disk sound")
    assert (tmp_path / "align.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------- numbers


def broken_at(monkeypatch, calls, value=float("nan")):
    """Makes the loss of these calls of the model in training not finite."""
    whole, count = SpeechLM.forward, []

    def forward(self, *args, **options):
        loss, n = whole(self, *args, **options)
        if torch.is_grad_enabled():
            count.append(1)
            loss = loss * value if len(count) in calls else loss
        return loss, n

    monkeypatch.setattr(SpeechLM, "forward", forward)


def test_a_step_without_a_finite_gradient_is_left_out(monkeypatch, capsys, tiny_project, tmp_path):
    """It changes no weight, and its rows are written down as they were drawn."""
    argv = arguments(tiny_project, tmp_path, cache_gb=0, workers=0, eval_every=8)
    with monkeypatch.context() as patch:
        broken_at(patch, {3, 4, 6})
        moments = []
        step = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda self, *args: (moments.append(1), step(self, *args))[1])
        train.main(argv)
    said = capsys.readouterr().out
    assert "step 3: loss nan, gradient norm nan: left out, its rows are in" in said and len(moments) == 5
    assert "3 steps and 0 recordings left out" in said
    lines = [line for line in log(tmp_path) if "lr" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "skipped" in line] == [3, 4, 6] and all("tokens" in line for line in lines)
    rows = [json.loads(line) for line in (tmp_path / "align.nonfinite.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {3, 4, 6}
    for row in rows:
        assert "train.jsonl' line" in row["where"] and row["instruction"] and row["text"] and row["seed"] == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_five_such_steps_in_a_row_end_the_run_and_resuming_counts_on(monkeypatch, capsys, tiny_project, tmp_path):
    argv = arguments(tiny_project, tmp_path, cache_gb=0, workers=0, steps=20, eval_every=4)
    with monkeypatch.context() as patch:
        broken_at(patch, range(7, 99), float("inf"))
        refused(capsys, argv, "step 11: loss inf, gradient norm .*, as in 5 steps in a row, whose rows are in .*align.nonfinite.jsonl; "
                "the last checkpoint is untouched: lower the learning rate or leave such rows out")
    assert torch.load(tmp_path / "align.resume.pt", weights_only=True)["skipped"] == 2
    with monkeypatch.context() as patch:
        broken_at(patch, range(1, 99))
        refused(capsys, [*argv, "--resume"], "step 11: loss nan, gradient norm nan, as in 5 steps in a row")
    rows = [json.loads(line) for line in (tmp_path / "align.nonfinite.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows}) == [7, 8, 9, 10, 11]


def test_a_signal_amid_such_steps_keeps_the_older_checkpoint(monkeypatch, tiny_project, tmp_path):
    broken_at(monkeypatch, {6, 7})
    signal_at(monkeypatch, train, "leave_out", 2, signal.SIGTERM)
    assert stopped(arguments(tiny_project, tmp_path, cache_gb=0, workers=0)) == 143
    assert torch.load(tmp_path / "align.resume.pt", weights_only=True)["step"] == 4


def test_a_validation_loss_that_is_not_finite_keeps_the_older_checkpoint(monkeypatch, capsys, tiny_project, tmp_path):
    validate, calls = train.validate, []

    def broken(*args):
        figures, pairs = validate(*args)
        calls.append(1)
        return (figures | {"dev_loss": float("nan")} if len(calls) == 2 else figures), pairs

    monkeypatch.setattr(train, "validate", broken)
    refused(capsys, arguments(tiny_project, tmp_path, cache_gb=0, workers=0),
            "step 8: dev_loss nan; the last checkpoint is untouched: lower the learning rate")
    assert torch.load(tmp_path / "align.resume.pt", weights_only=True)["step"] == 4


# ---------------------------------------------------------------------------------------------------------- bad input


def tone(path, samples=16000, **values):
    wave = 0.3 * np.sin(np.arange(samples) / 5)
    wave[:len(values.get("start", ()))] = values.get("start", ())
    soundfile.write(path, wave, values.get("rate", 16000), subtype="FLOAT", format="WAV")


@pytest.mark.parametrize("make, message", [
    (lambda path: path.write_bytes(b"<html>"), "x.wav': found content that cannot be decoded"),
    (lambda path: path.write_bytes(b""), "x.wav': found 0 bytes, expected intact audio"),
    (lambda path: tone(path, 559), "x.wav': found 34.9 ms of audio, expected at least 35 ms"),
    (lambda path: tone(path, start=[float("nan")]), "x.wav': found 1 NaN or inf samples, the first at 0.000 s"),
    (lambda path: tone(path, 999, rate=500), "x.wav': found a sample rate of 500 Hz, expected 1000 to 200000")])
def test_a_recording_that_cannot_be_used(capsys, whole, tiny_project, tmp_path, make, message):
    """sample.py names it and ends; eval.py and train.py leave it out, name it and go on."""
    make(tmp_path / "x.wav")
    ckpt = ["--ckpt", whole / "align.pt"]
    assert message in run(sample, tmp_path / "x.wav", "Transcribe.", *ckpt, code=1, capsys=capsys)[1]
    row = json.loads((tiny_project / "dev.jsonl").read_text().splitlines()[0])
    rows = [{**row, "duration": None, "audio": str(path)} for path in (tmp_path / "x.wav", tiny_project / "dev0.wav", tiny_project / "dev1.wav")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run(eval, tmp_path / "m.jsonl", *ckpt, "--out", tmp_path / "e", "--trust-paths", capsys=capsys)[1]
    assert "left out: " in said and "m.jsonl' line 1: " in said and message in said
    argv = arguments(tiny_project, tmp_path, dev=tmp_path / "m.jsonl", steps=1, cache_gb=0, workers=0, trust_paths=True)
    said = run(train, *argv, capsys=capsys)[0]
    assert "m.jsonl' line 1: " in said and message in said and "0 recordings left out" in said
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert "m.jsonl: 1 recordings can be used, expected at least 2; mend the files" in run(train, *argv, code=1, capsys=capsys)[1]


@pytest.mark.parametrize("row, message", [
    ({"licence": None}, "line 2: the corpus 'tones' has the licence 'unknown', expected CC0-1.0, public domain"),
    ({"instruction": " "}, "line 2: instruction is ' ', expected text; add it or leave the row out"),
    ({"duration": -1}, "line 2: duration is -1, expected a number of seconds")])
def test_a_row_that_cannot_be_trained_on(capsys, tiny_project, tmp_path, row, message):
    rows = [json.loads(line) for line in (tiny_project / "train.jsonl").read_text().splitlines()[:3]]
    rows = [{**own, "audio": str(tiny_project / own["audio"])} for own in rows]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(own | row if n == 1 else own) + "\n" for n, own in enumerate(rows)))
    argv = arguments(tiny_project, tmp_path, data=tmp_path / "m.jsonl", trust_paths=True)
    refused(capsys, argv, re.escape(f"m.jsonl' {message}"))


@pytest.mark.parametrize("change, message", [
    (lambda place: (place / "llm" / "tokenizer.json").unlink(), "tokenizer.json: .*; copy the LLM's own tokenizer.json there"),
    (lambda place: (place / "llm" / "config.json").write_text("[1]"), "config.json: found a list, expected a JSON object; copy"),
    (lambda place: (place / "llm" / "config.json").write_text("{"), "config.json: not readable as JSON .*; copy it from the"),
    (lambda place: (place / "llm" / "config.json").write_text('{"hidden_size": "768", "vocab_size": 290}'),
     "llm/config.json: hidden_size is '768', expected int"),
    (lambda place: (place / "encoder" / "config.json").unlink(), "encoder/config.json: not found; a checkpoint has config.json"),
    (lambda place: (place / "encoder" / "model.safetensors").unlink(), "encoder: found no weights, expected model.safetensors"),
    (lambda place: (place / "encoder" / "model.safetensors").write_bytes(b"x" * 99), "99 bytes that are not a whole safetensors"),
    (lambda place: shutil.copy(place / "encoder/model.safetensors", place / "llm/model.safetensors"),
     "llm: .* tensors do not fit config.json: .*the weights and config.json are of different models")])
def test_base_models_that_cannot_be_used(capsys, tiny_project, tmp_path, change, message):
    shutil.copytree(tiny_project / "llm", tmp_path / "llm")
    shutil.copytree(tiny_project / "encoder", tmp_path / "encoder")
    change(tmp_path)
    refused(capsys, arguments(tiny_project, tmp_path / "out", encoder=tmp_path / "encoder", llm=tmp_path / "llm"), message)


def test_checkpoints_that_cannot_be_used_to_ask(monkeypatch, capsys, whole, tiny_project, tmp_path):
    wav = tiny_project / "dev0.wav"
    (tmp_path / "cut.pt").write_bytes((whole / "align.pt").read_bytes()[:5000])
    state = torch.load(whole / "align.pt", weights_only=True)
    torch.save({**state, "bases": {**state["bases"], "llm": {**state["bases"]["llm"], "sha256": "0"}}}, tmp_path / "other.pt")
    torch.save({**state, "config": {**state["config"], "prompt": "tokens"}}, tmp_path / "tokens.pt")
    for name, message in (("none.pt", "none.pt: no such checkpoint; train it first or correct the path"),
                          ("cut.pt", "cut.pt: not a checkpoint of this project ("),
                          ("other.pt", "other.pt: was trained on the llm "),
                          ("tokens.pt", "tokens.pt: knows <|language|><|task|> prompts only, not instructions in words")):
        assert message in run(sample, wav, "Transcribe.", "--ckpt", tmp_path / name, code=1, capsys=capsys)[1]
    xml = ["--xml", tmp_path / "no.xml", "--audio", tmp_path, "--out", tmp_path / "h.xml", "--ckpt", whole / "align.pt"]
    assert "no.xml: No such file or directory; what was answered is kept" in run(eval, *xml, code=1, capsys=capsys)[1]
    for text, message in (("<testset/>", "no.xml': found XML without a task element"), ("<testset", "expected XML in UTF-8")):
        (tmp_path / "no.xml").write_text(text)
        assert message in run(eval, *xml, code=1, capsys=capsys)[1]
    assert "give a manifest, or --xml SRC.xml --audio DIR --out HYP.xml" in run(eval, code=2, capsys=capsys)[1]
    assert "unrecognized arguments: --beam-size" in run(eval, "m.jsonl", "--beam-size", "4", code=2, capsys=capsys)[1]
    assert "unrecognized arguments: --beam-size" in run(sample, wav, "--beam-size", code=2, capsys=capsys)[1]
    signal_at(monkeypatch, eval, "answer_rows", 1, signal.SIGINT)
    argv = [tiny_project / "dev.jsonl", "--ckpt", whole / "align.pt", "--out", tmp_path / "e"]
    assert "eval.py: stopped; start again to go on from here" in run(eval, *argv, code=130, capsys=capsys)[1]
