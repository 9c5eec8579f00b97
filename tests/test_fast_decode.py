"""prepare/fast_decode.py: compiled steps and weights of 8 bits answer as the plain model does."""

import pytest
import torch
from conftest import relative_error
from test_model import begins, speech_batch, tiny_llm, tiny_speech_lm

from model import decode_step, generate, new_cache, prefill
from prepare import fast_decode
from prepare.fast_decode import FastDecode, Int8Linear, int8, quantise


@pytest.fixture(autouse=True)
def own_compiler_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@torch.no_grad()
def test_compiled_decoding_says_the_same(monkeypatch):
    """Uneven rows that end at different steps, a prefix, beams: the same ids as without, and one compilation a shape."""
    monkeypatch.setitem(fast_decode.ON_CPU, "max_autotune", False)  # takes ten seconds a shape
    speech_lm = tiny_speech_lm("qwen3", eos_token_id=list(range(60)), num_hidden_layers=1)
    features, lengths, ids, ids_lengths, _ = speech_batch(speech_lm)
    ids, ids_lengths = begins(speech_lm, ids, ids_lengths)

    def answers():
        prefix = speech_lm.read(ids, ids_lengths, features, lengths)
        asked = torch.randint(90, 211, (7,), generator=torch.Generator().manual_seed(0))
        options = [dict(), dict(num_beams=2)]
        return ([speech_lm.generate(ids, ids_lengths, features, lengths, max_new_tokens=12, **some) for some in options]
                + [speech_lm.generate(asked, [4, 3], prefix=prefix, prefix_rows=[3, 0], max_new_tokens=12)])

    plain = answers()
    assert len({len(row) for row in plain[0]}) > 1
    speech_lm.llm.fast = FastDecode(pays=0)
    counters = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    counters.clear()
    assert answers() == answers() == plain
    assert counters["unique_graphs"] == len(speech_lm.llm.fast.compiled) > 2


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("eight", [False, True])
def test_compiled_logits(monkeypatch, dtype, bound, eight):
    if eight or dtype == torch.float32:  # tuning takes a minute
        monkeypatch.setitem(fast_decode.ON_CPU, "max_autotune", False)
    llm, ids, lengths = tiny_llm("qwen2", num_hidden_layers=1).to(dtype), torch.randint(8, 211, (10,)), [6, 1, 3]
    llm.compute_dtype = dtype
    if eight:
        quantise(llm)
    fast, logits = FastDecode(pays=0), []
    for step in (decode_step, fast):
        cache = new_cache(llm, 3, fast.room(20))
        prefill(llm, llm.embed(ids), lengths, cache)
        some = [(store[:, :, :12] for store in layer) for layer in cache]
        logits.append(step(llm, ids[:3], torch.tensor(lengths), [tuple(layer) for layer in some]))
    assert len(fast.compiled) == 1 and relative_error(logits[1], logits[0]) < bound


def test_nothing_is_compiled_before_it_pays(monkeypatch):
    """The compiler is called once the steps of a shape have taken the given time, and for that shape alone."""
    clock, made = iter(range(10**6)), []  # every step takes one second
    monkeypatch.setattr(fast_decode.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(fast_decode, "compiled_step", lambda cuda: made.append(cuda) or decode_step)
    llm = tiny_llm()
    llm.config.eos_token_id = []  # answers never end by themselves
    x, plain = llm.embed(torch.randint(0, 211, (6,))), None
    for fast in (None, FastDecode(pays=10)):
        llm.fast = fast
        plain, again = generate(llm, x, [3, 3], max_new_tokens=10), plain
    assert plain == again and not made and fast.seconds == {(2, 256): 9}
    generate(llm, x[:3], [3], max_new_tokens=8)
    assert not made
    assert generate(llm, x, [3, 3], max_new_tokens=10) == plain and made == [False]


def test_without_a_compiler(capsys):
    from torch._inductor import config
    llm = tiny_llm()
    x = llm.embed(torch.randint(0, 211, (6,)))
    plain = generate(llm, x, [3, 3], max_new_tokens=9)
    llm.fast = FastDecode(pays=0)
    torch._dynamo.reset()
    with config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        assert generate(llm, x, [3, 3], max_new_tokens=9) == plain == generate(llm, x, [3, 3], max_new_tokens=9)
    said = capsys.readouterr().err
    assert said.startswith("decoding is not compiled and therefore slower: ") and said.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_products_with_8_bits(dtype, rows):
    """Few rows by a kernel of their own, many by unpacking: both as if the rounded weights were multiplied."""
    weight, x, bias = torch.randn(64, 32), torch.randn(rows, 32).to(dtype), torch.randn(64)
    weight[3] *= 100  # an output with large weights does not make the others coarse
    weight[5] = 0
    packed, scale = int8(weight)
    rounded = packed * scale[:, None]
    assert ((rounded - weight).abs() <= 0.5001 * scale[:, None]).all() and packed.abs().amax(1)[[0, 3]].tolist() == [127, 127]
    y = Int8Linear(packed, scale, bias)(x)
    assert y.dtype == dtype
    expected = x.float() @ rounded.T + bias
    torch.testing.assert_close(y.float(), expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_the_compiler_gets_the_kernel_for_few_rows():
    """Else it would unpack all weights for every token, which takes longer than not to round them at all."""
    linear, code = Int8Linear(*int8(torch.randn(64, 32))), []
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend=lambda graph, _: code.append(graph.code) or graph, dynamic=False)
    for rows in (1, 9):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(compiled(x), linear(x))
    assert ["int8pack" in some for some in code] == [True, False]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen2 untied", "qwen3"])
def test_a_model_of_8_bits(family):
    """Its logits are those of the model with rounded weights; nothing keeps the old ones; it still generates."""
    llm, rounded = tiny_llm(family), tiny_llm(family)
    for name, p in rounded.named_parameters():
        if p.dim() == 2:
            packed, scale = int8(p)
            p.copy_(packed * scale[:, None])
    ids = torch.randint(0, 211, (12,))
    before = llm(ids, [7, 5])
    quantise(llm)
    assert all(p.dim() == 1 for p in llm.parameters())
    assert relative_error(llm(ids, [7, 5]), rounded(ids, [7, 5])) < 1e-5
    assert 0 < relative_error(llm(ids, [7, 5]), before) < 0.05
    assert generate(llm, llm.embed(ids), [7, 5], 8) == generate(rounded, rounded.embed(ids), [7, 5], 8)
