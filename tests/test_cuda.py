"""What CUDA computes, against the CPU: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENCODER, relative_error
from test_model import begins, randomise, speech_batch, tiny_llm

import model
from model import (AdapterConfig, EncoderConfig, LengthAdapter, Rows, SpeechEncoder, SpeechLM, decode_step, generate, new_cache,
                   prefill)
from prepare import compiled
from prepare.fast_decode import FastDecode, quantise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py")
ROOT = Path(__file__).resolve().parent.parent
LENGTHS = ([61, 1, 34, 7], [300, 150, 62], [700, 1, 90], [2049, 600])


def speech_lm(**llm):
    """A small model whose heads are as wide as the kernels of CUDA want them: at least 16."""
    spec = {**ENCODER, "hidden_size": 64, "conformer_conv_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False}
    llm = tiny_llm("qwen2", head_dim=16, **llm)
    adapter = LengthAdapter(AdapterConfig(**spec, output_size=llm.config.hidden_size))
    return randomise(SpeechLM(SpeechEncoder(EncoderConfig(**spec)), adapter, llm))


def moved(batch, device):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in batch]


def placed(whole, device, compute_dtype):
    whole.to(device)
    for part in whole.children():
        part.compute_dtype = compute_dtype


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("causal, heads, d, reach", [(True, 2, 128, None), (False, 4, 64, (64, 8)), (False, 4, 48, (64, 8))])
def test_attention_of_all_rows_at_once(causal, heads, d, reach, dtype, bound):
    """One kernel for all rows, of several sizes, against attention row by row on the CPU in float32, with its gradients."""
    for lengths in LENGTHS:
        N = sum(lengths)
        shapes = [(N, 4, d), (N, heads, d), (N, heads, d)] + [(N, 4, 73)] * (reach is not None)
        given, grad = [torch.randn(shape).to(dtype) for shape in shapes], torch.randn(N, 4, d).to(dtype)
        plain = [x.float().requires_grad_() for x in given]
        expected = model.attend(*plain[:3], Rows(lengths, "cpu", causal, reach=reach), *plain[3:])
        gradients = torch.autograd.grad(expected, plain, grad.float())
        on_gpu, rows = [x.to("cuda").requires_grad_() for x in given], Rows(lengths, "cuda", causal, reach=reach)
        assert rows.flex is not None
        y = model.attend(*on_gpu[:3], rows, *on_gpu[3:])
        assert y.dtype == dtype and relative_error(y.cpu(), expected) < bound
        for ours, theirs in zip(torch.autograd.grad(y, on_gpu, grad.to("cuda")), gradients):
            assert relative_error(ours.cpu(), theirs) < bound, lengths


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 1e-1)])
def test_loss_and_gradients(dtype, bound, checkpointing):
    """Of the whole model, every part trained, its layers compiled; and the loss alone, as a validation takes it."""
    whole = speech_lm()
    batches = [speech_batch(whole, frames=(300, 1, 170, 64), answer=(50, 1, 20, 9)), speech_batch(whole)]
    whole.encoder.checkpointing = whole.llm.checkpointing = checkpointing
    for batch in batches:
        whole.zero_grad()
        placed(whole, "cpu", torch.float32)
        loss, count = whole(*batch)
        loss.backward()
        gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        whole.zero_grad()
        placed(whole, "cuda", dtype)
        ours, n = whole(*moved(batch, "cuda"))
        ours.backward()
        with torch.no_grad():
            again, _ = whole(*moved(batch, "cuda"))
        assert n == count and all(abs(x.item() / loss.item() - 1) < bound / 5 for x in (ours, again))
        size = torch.cat([g.flatten() for g in gradients.values()]).norm()
        for name, p in whole.named_parameters():
            if name in gradients:
                assert p.grad.dtype == p.dtype
                assert (p.grad.cpu() - gradients[name]).norm() < bound * (gradients[name].norm() + 1e-2 * size), name


@torch.no_grad()
def test_answers():
    """Greedy, of beams, behind a prefix: the same ids as on the CPU; also by the steps that are replayed as a graph."""
    whole = speech_lm(eos_token_id=list(range(20)))
    features, lengths, ids, ids_lengths, _ = speech_batch(whole, frames=(300, 1, 170, 64))
    ids, ids_lengths = begins(whole, ids, ids_lengths)
    asked = torch.randint(90, 211, (7,), generator=torch.Generator().manual_seed(0))

    def answers(device):
        whole.to(device)
        prefix = whole.read(*moved((ids, ids_lengths, features, lengths), device))
        given = moved((ids, ids_lengths, features, lengths), device)
        return [whole.generate(*given, max_new_tokens=20), whole.generate(*given, max_new_tokens=20, num_beams=3),
                whole.generate(asked.to(device), [4, 3], prefix=prefix, prefix_rows=[3, 0], max_new_tokens=20)]

    plain = answers("cpu")
    assert answers("cuda") == plain
    for pays in (0, 1e-3, 1e9):  # compiled at once, amid the answers, never
        whole.llm.fast = FastDecode(pays)
        for _ in range(3):
            assert answers("cuda") == plain


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("eight", [False, True])
def test_steps_that_are_replayed(dtype, bound, eight):
    """Their logits and what they write into the cache, for 1 and 8 rows, step after step, on several caches in turn."""
    llm = tiny_llm("qwen2", head_dim=16).to(dtype).cuda()
    llm.compute_dtype = dtype
    if eight:
        quantise(llm)
    llm.fast = fast = FastDecode(pays=0)
    for B in (1, 8, 1, 8):
        lengths, ids = [5 + i for i in range(B)], torch.randint(8, 211, (sum(5 + i for i in range(B)),)).cuda()
        caches = [new_cache(llm, B, 40) for _ in range(2)]
        for cache in caches:
            prefill(llm, llm.embed(ids), lengths, cache)
        for t in range(4):
            some, at = ids[:B], torch.tensor(lengths, device="cuda") + t
            plain, ours = (step(llm, some, at, model.filled(cache, max(lengths) + t + 1))
                           for step, cache in zip((decode_step, fast), caches))
            assert relative_error(ours, plain) < bound
            for a, b in zip(*caches):
                assert all(relative_error(x, y) < bound for x, y in zip(a, b))


@torch.no_grad()
def test_drawing_on_the_device():
    llm = speech_lm().llm.cuda()
    x = llm.embed(torch.randint(8, 211, (9,)).cuda())
    one, again = (generate(llm, x, [4, 5], 12, temperature=1.0, top_p=0.9, generator=torch.Generator("cuda").manual_seed(3))
                  for _ in range(2))
    assert one == again


def test_flex_is_compiled_once_a_bucket():
    compiled.compiled_flex.cache_clear()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for lengths in ([100, 90], [300, 1, 1], [512], [7] * 70, [600], [1000, 20]):
        q, k, v = torch.randn(3, sum(lengths), 2, 16, device="cuda")
        model.attend(q, k, v, Rows(lengths, "cuda", True))
    assert counters["unique_graphs"] == 2


def test_programs(tmp_path):
    """Both phases on the demo with their validations, and an answer: by the programs themselves."""
    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    fast = ["--out", tmp_path, "--eval-rows", "8", "--eval-clips", "2"]
    run("train.py", "--phase", "align", "--steps", "3", *fast)
    run("train.py", "--phase", "ift", "--init", tmp_path / "align.pt", "--steps", "3", *fast)
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "ift.jsonl") if '"loss"' in line]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses), losses
    assert run("sample.py", "demo/sample.wav", "Translate to German", "--ckpt", tmp_path / "ift.pt").strip()
