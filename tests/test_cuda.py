"""What CUDA computes, against the CPU. Run it alone, with CUDA_VISIBLE_DEVICES=0."""

from types import SimpleNamespace

import pytest
import torch

import model
import train
from conftest import (
    ENCODER,
    gradients,
    move,
    place,
    randomise,
    relative_error,
    speech_batch,
    tiny_llm,
    without_answers,
)
from sample import generate, read_prefix

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a GPU: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py",
)
PRECISIONS = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
LENGTHS = ([61, 1, 34, 7], [300, 150, 62], [700, 1, 90], [2049, 600])


@pytest.mark.parametrize("dtype, bound", PRECISIONS)
@pytest.mark.parametrize(
    "causal, heads, d, places", [(True, 2, 128, 0), (False, 4, 64, 0), (False, 4, 48, 0)]
)
def test_attention_of_all_sequences_at_once(causal, heads, d, places, dtype, bound):
    """Against attention of one sequence after the other in float32, with its gradients."""
    for lengths in LENGTHS:
        N = sum(lengths)
        shapes = [(N, 4, d), (N, heads, d), (N, heads, d), (N, 4, places)]
        inputs = [torch.randn(shape).to(dtype) for shape in shapes if 0 not in shape]
        grad = torch.randn(N, 4, d).to(dtype)
        results = []
        for attend, device, kind in (
            (model.attend, "cpu", torch.float32),
            (model.attend_varlen, "cuda", dtype),
        ):
            q, k, v, *bias = leaves = [x.to(device, kind).requires_grad_() for x in inputs]
            rows = model.Rows(lengths, torch.device(device))
            y = attend(q, k, v, rows, causal, *(bias or [None]), left=64)
            assert y.dtype == kind
            results.append([y, *torch.autograd.grad(y, leaves, grad.to(device, kind))])
        for expected, ours in zip(*results, strict=True):
            assert relative_error(ours.cpu(), expected) < bound, lengths


@pytest.mark.parametrize("dtype, bound", PRECISIONS)
@pytest.mark.parametrize("reach, d", [((64, 8), 64), ((64, 8), 48), ((12, 3), 64), ((0, 0), 64)])
def test_attention_with_relative_keys(reach, d, dtype, bound):
    """By the Triton kernels, with four gradients, against float32; the same bits again."""
    cuda = pytest.importorskip("extras.cuda")
    left, right = reach
    for lengths in ([1], [2, 1], [63, 64, 65], [500, 1, 129], [1500]):
        N = sum(lengths)
        shapes = [(N, 2, d)] * 3 + [(N, 2, left + 1 + right)]
        inputs = [torch.randn(shape).to(dtype) for shape in shapes]
        grad = torch.randn(N, 2, d).to(dtype)
        results = []
        for attend, device, kind in (
            (model.attend, "cpu", torch.float32),
            (cuda.attend, "cuda", dtype),
            (cuda.attend, "cuda", dtype),
        ):
            q, k, v, bias = leaves = [x.to(device, kind).requires_grad_() for x in inputs]
            y = attend(q, k, v, model.Rows(lengths, torch.device(device)), bias=bias, left=left)
            computed = torch.autograd.grad(y, leaves, grad.to(device, kind))
            results.append([x.cpu() for x in (y, *computed)])
        assert d < 64 or "relative_attention" in y.grad_fn.name()
        assert y.dtype == dtype
        for expected, ours, again in zip(*results, strict=True):
            assert torch.equal(ours, again), lengths
            size = expected.norm() + 0.1 * grad.float().norm()  # with a single key, most are zero
            assert (ours.float() - expected).norm() < bound * size, lengths


@pytest.mark.parametrize("dtype, bound", PRECISIONS)
@pytest.mark.parametrize("lengths", [[1], [31, 1, 64], [543], [2000, 33]])
def test_depthwise_convolution(lengths, dtype, bound):
    """By the Triton kernels, with both gradients, against float32; the same bits again."""
    cuda = pytest.importorskip("extras.cuda")
    assert model.default_kernels("cuda").depthwise is cuda.depthwise
    inputs = [torch.randn(shape).to(dtype) for shape in ((sum(lengths), 200), (200, 1, 31))]
    grad = torch.randn(sum(lengths), 200).to(dtype)
    results = []
    for depthwise, device, kind in (
        (model.depthwise, "cpu", torch.float32),
        (cuda.depthwise, "cuda", dtype),
        (cuda.depthwise, "cuda", dtype),
    ):
        leaves = [x.to(device, kind).requires_grad_() for x in inputs]
        y = depthwise(*leaves, model.Rows(lengths, torch.device(device)))
        assert y.dtype == kind
        both = torch.autograd.grad(y, leaves, grad.to(device, kind))
        results.append([x.cpu() for x in (y, *both)])
    for expected, ours, again in zip(*results, strict=True):
        assert torch.equal(ours, again) and relative_error(ours, expected) < bound


def build(device, **llm):
    """A small model with the kernels of a device, whose heads are as wide as CUDA's want them."""
    kernels = model.default_kernels(device)
    off = dict(conformer_conv_dropout=0.0, layerdrop=0.0, apply_spec_augment=False)
    spec = {**ENCODER, **off, "hidden_size": 64}
    encoder = model.SpeechEncoder(model.EncoderConfig(**spec), kernels=kernels)
    adapter = model.LengthAdapter(model.AdapterConfig(**spec, output_size=48), kernels=kernels)
    llm = tiny_llm("qwen2", kernels, head_dim=16, **llm)
    return randomise(model.SpeechLM(encoder, adapter, llm)).to(device)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 1e-1)])
def test_loss_and_gradients(dtype, bound):
    """Of every part. The weights are float32, and products in dtype."""
    plain = build("cpu").train()
    ours = build("cuda").train()
    ours.load_state_dict(plain.state_dict())
    place(ours, "cuda", torch.float32, dtype)
    for frames, answers in (((300, 1, 170, 64), (50, 1, 20, 9)), ((61, 1, 34, 7), (5, 1, 2, 9))):
        batch = speech_batch(plain, frames, answers=answers)
        results = []
        for speech_lm, device in ((plain, "cpu"), (ours, "cuda")):
            speech_lm.zero_grad()
            loss, _ = speech_lm(*move(batch, device))
            loss.backward()
            results.append((loss.item(), gradients(speech_lm)))
        (expected, exact), (loss, computed) = results
        assert abs(loss / expected - 1) < bound / 5
        size = torch.cat([g.flatten() for g in exact.values()]).norm()
        for name, g in exact.items():
            error = (computed[name].cpu() - g).norm()
            assert error < bound * (g.norm() + 1e-2 * size), name


def test_a_batch_without_targets():
    """That of a rank whose recordings cannot be used: no loss, and gradients of zero."""
    speech_lm = build("cuda").train()
    batch = move(speech_batch(speech_lm, (1,), (0,), (0,)), "cuda")
    loss, count = speech_lm(*batch)
    loss.backward()
    assert loss.item() == 0 and count == 0
    assert all(g.eq(0).all() for g in gradients(speech_lm).values())


def test_a_step_never_waits_for_the_gpu():
    """Two steps: what an optimizer first sets up may wait."""
    speech_lm = place(build("cuda").train(), "cuda", torch.float32, torch.bfloat16)
    optimizer = torch.optim.AdamW(speech_lm.parameters(), fused=True)
    run = SimpleNamespace(optimizer=optimizer, cfg=SimpleNamespace(device="cuda"))
    batch = speech_batch(speech_lm, (300, 1, 170, 64))
    batch = [x.pin_memory() if isinstance(x, torch.Tensor) else x for x in batch]
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            inputs = [
                x.to("cuda", non_blocking=True) if isinstance(x, torch.Tensor) else x for x in batch
            ]
            loss, _ = speech_lm(*inputs)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(speech_lm.parameters(), 1.0)
            figures, event = train.update(run, loss.detach(), norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    event.synchronize()
    assert figures.is_pinned() and figures.isfinite().all()


def test_attention_is_by_fused_kernels():
    speech_lm = place(build("cuda").train(), "cuda", torch.float32, torch.bfloat16)
    batch = move(speech_batch(speech_lm, (300, 1, 170, 64)), "cuda")
    with torch.profiler.profile() as profiler:
        speech_lm(*batch)[0].backward()
    names = {event.key for event in profiler.key_averages()}
    assert {"speech_lm::relative_attention", "torch_attn::_varlen_attn"} <= names
    assert not any("attention_math" in name for name in names)


@torch.no_grad()
def test_answers():
    """Greedy, of beams and behind a prefix, the same ids as on the CPU."""
    models = {device: build(device, eos_token_id=list(range(20))) for device in ("cpu", "cuda")}
    models["cuda"].load_state_dict(models["cpu"].state_dict())
    features, lengths, ids, ids_lengths, _ = speech_batch(models["cpu"], (300, 1, 170, 64))
    ids, ids_lengths = without_answers(ids, ids_lengths)
    asked = torch.randint(90, 211, (7,))
    answers = []
    for device, speech_lm in models.items():
        llm, audio = speech_lm.llm, speech_lm.encode(features.to(device), lengths)[0]
        x = speech_lm.embed(ids.to(device), audio)
        prefix = read_prefix(llm, x, ids_lengths)
        questions = llm.embed(asked.to(device))
        answers.append(
            [
                generate(llm, x, ids_lengths, 20),
                generate(llm, x, ids_lengths, 20, num_beams=3),
                generate(llm, questions, [4, 3], 20, prefix=prefix, prefix_rows=[3, 0]),
            ]
        )
    assert answers[0] == answers[1]


@torch.no_grad()
def test_drawing_on_the_device():
    llm = build("cuda").llm
    x, answers = llm.embed(torch.randint(8, 211, (9,)).cuda()), []
    for _ in range(2):
        generator = torch.Generator("cuda").manual_seed(3)
        options = dict(temperature=1.0, top_p=0.9, generator=generator)
        answers.append(generate(llm, x, [4, 5], 12, **options))
    assert answers[0] == answers[1]
