"""extras/cuda.py without a GPU: in Triton's interpreter on the CPU, the kernels give what the plain
operators give, values and gradients. It is exact in float32; its products in bfloat16 are not."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import model
from conftest import gradients, randomise, tiny_encoder
from model import Kernels, Rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs within test_in_the_interpreter")
if INTERPRETED:
    from extras import cuda

BOUND = {"rtol": 1e-4, "atol": 1e-5}
SMALL = [(32, 16, 4, 1), (16, 32, 4, 1)]  # queries and keys of a tile, warps, stages


def test_in_the_interpreter():
    """Triton has to be imported for its interpreter, so that this needs a process of its own."""
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed, 1 skipped" in done.stdout


# --- Attention


@pytest.fixture
def tiles(monkeypatch, request):
    """Small tiles for all three kernels, so that short rows have many."""
    monkeypatch.setitem(cuda.TILES, 4, (request.param,) * 3)


def compare(lengths, reach, width=16, heads=2, spare=0):
    """Attention and its four gradients against the plain ones; of biases that are part of longer
    lines."""
    left, right = reach
    N, places = sum(lengths), left + 1 + right
    shapes = [(N, heads, width)] * 3 + [(N, heads, places + spare)]
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    q, k, v, lines = inputs
    bias = lines[..., :places]
    rows = Rows(lengths, "cpu")
    plain, ours = (f(q, k, v, rows, bias=bias, left=left) for f in (model.attend, cuda.attend))
    assert width in (12, 20) or "relative_attention" in ours.grad_fn.name()
    grad = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, grad)
    computed = torch.autograd.grad(ours, inputs, grad)
    for x, y in zip((ours, *computed), (plain, *expected), strict=True):
        torch.testing.assert_close(x, y, **BOUND)


@inside
@pytest.mark.parametrize("tiles", SMALL, indirect=True)
def test_attention(tiles):
    """Several heads and rows, of many tiles and of one frame."""
    compare([33, 1, 66], (12, 3))


@inside
@pytest.mark.parametrize("tiles", SMALL[:1], indirect=True)
@pytest.mark.parametrize("reach", [(0, 0), (0, 5), (7, 0), (64, 8)])
def test_bands_of_other_width(tiles, reach):
    compare([33, 1, 66], reach, heads=1)


@inside
@pytest.mark.parametrize("tiles", SMALL, indirect=True)
@pytest.mark.parametrize("lengths", [[1], [2, 1], [15], [16], [17], [31, 32], [64]])
def test_lengths_around_the_borders_of_tiles(tiles, lengths):
    compare(lengths, (12, 3), heads=1)


@inside
@pytest.mark.parametrize("tiles", SMALL[:1], indirect=True)
@pytest.mark.parametrize("width", [12, 20])
def test_heads_of_other_widths(tiles, width):
    compare([33, 1, 20], (12, 3), width=width)


@inside
@pytest.mark.parametrize("tiles", SMALL[:1], indirect=True)
def test_biases_in_longer_lines(tiles):
    """Whose products are faster; and such that are not in order, which are copied."""
    compare([33, 1, 20], (12, 3), spare=7)
    bias = torch.randn(2, 50, 16).transpose(0, 1)
    assert cuda.evenly_spaced(bias).is_contiguous() and torch.equal(cuda.evenly_spaced(bias), bias)


@inside
@pytest.mark.parametrize("size", [2, 4])
def test_attention_in_real_tiles(monkeypatch, size):
    """Those of a GPU, with heads and reach of the real encoder, and keys on both sides of it."""
    monkeypatch.setitem(cuda.TILES, 4, cuda.TILES[size])
    compare([200, 65], (64, 8), width=64, heads=1)


@inside
def test_large_scores():
    """The highest score of a row changes from tile to tile, and sums stay finite."""
    q = 40 * torch.randn(150, 1, 16)
    bias = 40 * torch.randn(150, 1, 16)
    rows = Rows([150], "cpu")
    plain, ours = (f(q, q, q, rows, bias=bias, left=12) for f in (model.attend, cuda.attend))
    torch.testing.assert_close(ours, plain, **BOUND)


def shifted_places(places):
    return "places", lambda i, j, C: places(i, j + 1, C)


def without_left(keys_on_side):
    def faulty(side, at, n, *sizes):
        return (0, 0) if side == 0 else keys_on_side(side, at, n, *sizes)

    return "keys_on_side", faulty


def without_right(keys_on_side):
    def faulty(side, at, n, *sizes):
        return (n, n) if side == 2 else keys_on_side(side, at, n, *sizes)

    return "keys_on_side", faulty


@inside
@pytest.mark.parametrize("tiles", SMALL[:1], indirect=True)
@pytest.mark.parametrize("fault", [shifted_places, without_left, without_right])
def test_a_fault_is_noticed(monkeypatch, tiles, fault):
    plain = cuda.places if fault is shifted_places else cuda.keys_on_side
    monkeypatch.setattr(cuda, *fault(plain))
    with pytest.raises(AssertionError, match="not close"):
        compare([70], (12, 3), heads=1)


@inside
@pytest.mark.parametrize("column", [0, 7, -1])
def test_a_lost_column_of_the_bias_gradient_is_noticed(monkeypatch, column):
    def launch(step, *arguments):
        plain(step, *arguments)
        if step == 1:
            arguments[-1][..., column] = 0  # the bias's gradient comes last

    plain = cuda.launch
    monkeypatch.setattr(cuda, "launch", launch)
    with pytest.raises(AssertionError, match="not close"):
        compare([40], (12, 3))


@inside
def test_the_rest_goes_to_the_other_kernel(monkeypatch):
    """No biases, and dropout."""
    calls = []
    monkeypatch.setattr(model, "attend_varlen", lambda *arguments: calls.append(arguments))
    rows = Rows([5], "cpu")
    for biased, dropout in ((False, 0.0), (True, 0.1)):
        q = torch.randn(5, 2, 16)
        bias = torch.randn(5, 2, 16) if biased else None
        cuda.attend(q, q, q, rows, bias=bias, left=12, dropout=dropout)
        assert calls.pop() == (q, q, q, rows, False, bias, 12, dropout)


# --- Convolution


@inside
@pytest.mark.parametrize("kernel", [1, 7, 31])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 33], [64, 31, 32, 200]])
def test_depthwise_convolution(kernel, lengths):
    """Within each row, values and gradients, of fewer and more channels than a tile has."""
    for channels in (3, 130):
        x = torch.randn(sum(lengths), channels, requires_grad=True)
        weight = torch.randn(channels, 1, kernel, requires_grad=True)
        rows = Rows(lengths, "cpu")
        plain, ours = model.depthwise(x, weight, rows), cuda.depthwise(x, weight, rows)
        grad = torch.randn_like(plain)
        expected = torch.autograd.grad(plain, (x, weight), grad)
        computed = torch.autograd.grad(ours, (x, weight), grad)
        for y, z in zip((ours, *computed), (plain, *expected), strict=True):
            torch.testing.assert_close(y, z, **BOUND)


@inside
def test_rows_do_not_read_each_other():
    """Each is convolved as if it were alone, from its first frame on."""
    lengths = [40, 1, 33]
    x, weight = torch.randn(sum(lengths), 2), torch.randn(2, 1, 31)
    ours = cuda.depthwise(x, weight, Rows(lengths, "cpu")).split(lengths)
    for y, row in zip(ours, x.split(lengths), strict=True):
        alone = F.conv1d(F.pad(row.T, (30, 0)), weight, groups=2).T
        torch.testing.assert_close(y, alone, **BOUND)


# --- Both


@inside
def test_they_are_chosen_for_cuda(monkeypatch):
    """Where Triton is."""
    kernels = model.default_kernels("cuda:1")
    assert (kernels.attend, kernels.depthwise) == (cuda.attend, cuda.depthwise)
    monkeypatch.delitem(sys.modules, "extras.cuda")
    monkeypatch.delattr(sys.modules["extras"], "cuda")
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    assert model.default_kernels("cuda:1") == Kernels(attend=model.attend_varlen)


@inside
def test_an_encoder_with_and_without():
    """Its states and the gradients of all its weights, those of the distances included."""
    results = []
    for kernels in (Kernels(), Kernels(attend=cuda.attend, depthwise=cuda.depthwise)):
        torch.manual_seed(0)
        encoder = randomise(tiny_encoder(kernels, hidden_size=64, num_hidden_layers=1))
        states = encoder(torch.randn(60, 160), [40, 1, 19])
        (states * torch.randn_like(states)).sum().backward()
        results.append((states, gradients(encoder)))
    assert any("distance_embedding" in name for name in results[0][1])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
