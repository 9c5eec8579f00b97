"""train.py --dry-run: what it counts, what it says and that it leaves nothing behind."""

import re
import shutil

import pytest
import torch
from test_train import arguments, refused

import train
from prepare import plan


def planned(capsys, project, out, **options):
    train.main(arguments(project, out, dry_run=True, **options))
    return capsys.readouterr().out


def figure(said, before):
    return float(re.search(before + r" ([\d.]+)", said)[1])


def test_tensors_are_counted_while_they_live():
    """Once, whatever views there are of them, and no weights; a peak is what was alive together."""
    layer = torch.nn.Linear(100, 100, bias=False)
    with plan.Live(layer) as live:
        x = torch.ones(10, 100)
        assert live.now == 4000
        y = x.T[:50].reshape(10, 50)[:, None]  # a copy
        assert live.now == 6000
        z = layer.weight.T
        assert live.now == 6000
        del y
        assert live.now == 4000
        (x * x).exp()
        assert (live.now, live.peak) == (4000, 12000) and z.shape == (100, 100)


def test_what_is_held_for_the_backward_pass_is_what_torch_holds(tiny_project, tmp_path):
    """The count without memory against the storages that a real forward pass keeps."""
    torch.set_num_threads(1)
    cfg = train.parse(arguments(tiny_project, tmp_path, phase="ift", llm_lr=1e-3))
    rates = {"adapter": 1e-3, "encoder": 1e-3, "llm": 1e-3}
    rows = [(40, 30, 6), (25, 20, 5)]
    shapes, *_ = train.build(cfg, rates, meta=True)
    with plan.FakeTensorMode(allow_non_fake_inputs=True):
        shapes.to_empty(device="cpu")
        held, peak = plan.step_memory(shapes, rows, 160, 1)
    model, *_ = train.build(cfg, rates)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.tensor([-1] * 10 + [1] * 20 + [-1] * 7 + [1] * 13)
    targets = torch.tensor([*range(24, 30), *range(45, 50)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = model(torch.randn(65, 160), [40, 25], ids, [30, 20], targets)
    assert held == pytest.approx(sum(kept.values()), rel=0.1) and held < peak
    gradients = sum(p.nbytes for p in model.parameters())
    assert peak < held + 2 * gradients


def test_a_dry_run_says_what_a_run_needs_and_leaves_nothing(capsys, monkeypatch, tiny_project, tmp_path):
    torch.set_num_threads(1)
    said = planned(capsys, tiny_project, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "8 steps: " in said and "encoder outputs 0.00" in said and "3 steps of" in said and "h in all" in said
    for part in ("the encoder cache", "a training step", "a validation", "saving"):
        assert f"memory in {part}: " in said
    assert figure(said, "peak") == max(map(float, re.findall(r"memory in .*: ([\d.]+) GB", said)))
    ift = dict(phase="ift", batch_frames=3000)
    full, low = planned(capsys, tiny_project, tmp_path, **ift), planned(capsys, tiny_project, tmp_path, lora_rank=1, **ift)
    few = planned(capsys, tiny_project, tmp_path, checkpointing=True, **ift)
    assert figure(low, "optimizer") <= figure(full, "optimizer") and "encoder outputs" not in full
    assert 0 < figure(few, "activations") < 0.5 * figure(full, "activations")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "on each of 4 ranks" in planned(capsys, tiny_project, tmp_path)
    monkeypatch.setattr(plan, "memory_there", lambda device: 2e8)
    for options, message in ((ift, "give --checkpointing, a smaller --batch-frames, --lora-rank 16 or --fsdp"),
                             ({}, "give --checkpointing, a smaller --batch-frames or --fsdp")):
        refused(capsys, arguments(tiny_project, tmp_path, dry_run=True, **options),
                r"it does not fit: 4 x [\d.]+ GB are needed, 0.2 GB are free; " + message)


def test_a_dry_run_needs_no_weights(capsys, tiny_project, tmp_path):
    for name in ("encoder", "llm"):
        shutil.copytree(tiny_project / name, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    said = planned(capsys, tiny_project, tmp_path / "out", encoder=tmp_path / "encoder", llm=tmp_path / "llm")
    assert "llm: 0." in said and "peak " in said and "no step was timed: the weights are not there" in said
