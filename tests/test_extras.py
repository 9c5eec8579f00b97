"""extras/: every faster operator, step and weight gives what its plain twin gives, values and
gradients; the report shows any text as text; curves are drawn."""

import json
import re
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import soundfile
import torch
from test_train import arguments

import model
import train
from conftest import (
    gradients,
    refused,
    relative_error,
    speech_batch,
    tiny_llm,
    tiny_speech_lm,
)
from data import AudioError, load_audio
from extras import cpu, decode, plan, serve
from extras.curves import draw_curves
from extras.decode import FastDecode
from extras.int8 import Int8Linear, quantise, round_matrix
from extras.logs import numbers
from extras.report import write_report
from model import Kernels, Rows, default_kernels
from sample import KVCache, decode_step, generate, prefill, read_prefix

DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
LENGTHS = [400, 1, 2, 193, 192, 15]
CAUSAL = {"causal": True, "heads": 2}
FULL = {"causal": False, "heads": 6}
KINDS = [CAUSAL, FULL, FULL | {"reach": (64, 8)}, FULL | {"reach": (0, 3)}]

# --- Operators for the CPU


def attention_inputs(lengths, heads, reach, dtype):
    """Queries, keys, values and, with a reach (left, right), biases; all need gradients."""
    N = sum(lengths)
    sizes = [(N, 6, 16), (N, heads, 16), (N, heads, 16)]
    if reach is not None:
        sizes.append((N, 6, sum(reach) + 1))
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("queries", [7, 192])
@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention(monkeypatch, kind, dtype, bound, queries):
    """Of sequences of 1 to 400 positions, however many queries are taken at a time."""
    monkeypatch.setattr(cpu, "QUERIES", queries)
    reach = kind.get("reach")
    inputs = attention_inputs(LENGTHS, kind["heads"], reach, dtype)
    rows = Rows(LENGTHS, "cpu")
    q, k, v, bias = [*inputs, None][:4]
    arguments = (q, k, v, rows, kind["causal"], bias, reach[0] if reach else 0)
    plain = model.attend(*arguments)
    ours = cpu.attend(*arguments)
    assert ours.dtype == dtype and relative_error(ours, plain) < bound
    grad = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, grad)
    for x, y in zip(torch.autograd.grad(ours, inputs, grad), expected, strict=True):
        assert relative_error(x, y) < bound


def test_attention_with_dropout():
    """A seed gives the same again; what is dropped is made up for by what is not."""
    lengths = [60, 3]
    q, k, v = attention_inputs(lengths, 6, None, torch.float32)
    rows = Rows(lengths, "cpu")

    def attend(seed):
        torch.manual_seed(seed)
        return cpu.attend(q, k, v, rows, dropout=0.4)

    assert torch.equal(attend(1), attend(1)) and not torch.equal(attend(1), attend(2))
    mean = torch.stack([attend(seed) for seed in range(400)]).mean(0)
    assert relative_error(mean, cpu.attend(q, k, v, rows)) < 0.15


@pytest.mark.parametrize("left, right", [(64, 8), (12, 3), (0, 0), (0, 5), (7, 0)])
def test_biases_spread_over_the_keys(left, right):
    """Of any stretch of queries, at the ends of a sequence and far from them: what a lookup for
    every key gives."""
    stretches = [(0, 1, 1), (0, 5, 5), (3, 1, 4), (0, 192, 400), (192, 192, 570), (384, 186, 570)]
    for i, m, n in stretches:
        bias = torch.randn(3, m, left + 1 + right, dtype=torch.float64, requires_grad=True)
        distance = torch.arange(n) - i - torch.arange(m)[:, None]
        place = distance.clamp(-left, right) + left
        plain = bias.gather(-1, place.expand(3, -1, -1))
        ours = cpu.SpreadBias.apply(bias, i, n, left)
        assert torch.equal(ours, plain)
        grad = torch.randn_like(plain)
        ours, plain = (torch.autograd.grad(y, bias, grad) for y in (ours, plain))
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("lengths", [[40, 1, 35], [3]])
def test_depthwise_convolution(lengths, dtype, bound):
    x = torch.randn(sum(lengths), 32).to(dtype).requires_grad_()
    weight = torch.randn(32, 1, 31).to(dtype).requires_grad_()
    rows = model.Rows(lengths, "cpu")
    plain, ours = model.depthwise(x, weight, rows), cpu.depthwise(x, weight, rows)
    assert torch.equal(ours, plain)
    grad = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (x, weight), grad)
    for y, z in zip(torch.autograd.grad(ours, (x, weight), grad), expected, strict=True):
        assert relative_error(y, z) < bound


def test_models_with_and_without():
    """The loss and all gradients of a model that is built with the operators for the CPU."""
    assert default_kernels("cpu").attend is cpu.attend
    results = []
    for kernels in (Kernels(), default_kernels("cpu")):
        torch.manual_seed(0)
        speech_lm = tiny_speech_lm("qwen3", kernels)
        loss, _ = speech_lm(*speech_batch(speech_lm))
        loss.backward()
        results.append((loss, gradients(speech_lm)))
    assert any("distance_embedding" in name for name in results[0][1])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


# --- The decode step


@pytest.fixture(scope="module", autouse=True)
def compiler_cache(tmp_path_factory):
    """A compiler cache that earlier runs have not filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def tiny_products(dtype):
    """An LLM of one layer whose products all have one shape, as the compiler tunes each shape."""
    sizes = dict.fromkeys(["hidden_size", "intermediate_size", "vocab_size"], 32)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    llm = tiny_llm("llama", num_hidden_layers=1, **sizes, **heads).to(dtype)
    llm.config.eos_token_id = []  # answers never end by themselves
    llm.compute_dtype = dtype
    return llm


@torch.no_grad()
def test_compiled_steps_answer_the_same():
    """Greedy answers, beams, and answers behind a prefix: the same ids as without, and a single
    compilation, as their batches and caches have the same size."""
    llm = tiny_products(torch.float32)
    x, questions = llm.embed(torch.randint(8, 32, (19,))).split([12, 7])

    def answers(step):
        options = {"max_new_tokens": 12, "step": step}
        prefix = read_prefix(llm, x, [7, 5])
        greedy = generate(llm, x, [7, 5], **options)
        beams = generate(llm, x[:7], [7], num_beams=2, **options)
        behind = generate(llm, questions, [4, 3], prefix=prefix, prefix_rows=[1, 0], **options)
        return greedy, beams, behind

    plain = answers(decode_step)
    fast = FastDecode(decode_step, pays=0)
    counters = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    counters.clear()
    assert answers(fast) == answers(fast) == plain
    assert counters["unique_graphs"] == len(fast.compiled) == 1


@torch.no_grad()
def test_compiled_logits(monkeypatch):
    """In bfloat16, with weights of 8 bits."""
    monkeypatch.setitem(decode.CPU_OPTIONS, "max_autotune", False)  # which takes its time
    llm = quantise(tiny_products(torch.bfloat16))
    ids, lengths = torch.randint(8, 32, (10,)), [6, 1, 3]
    fast = FastDecode(decode_step, pays=0)
    logits = []
    for step in (decode_step, fast):
        cache = KVCache.empty(llm, 3, 20)
        prefill(llm, llm.embed(ids), lengths, cache)
        logits.append(step(llm, ids[:3], torch.tensor(lengths), cache, 7))
    assert len(fast.compiled) == 1 and relative_error(*logits) < 3e-2


def test_nothing_is_compiled_before_it_pays(monkeypatch, capsys):
    """The compiler is called once the steps of a shape have taken the given time, and for that
    shape alone."""
    compilations = []

    def compile_step(step, on_cuda):
        compilations.append(on_cuda)
        return step

    clock = iter(range(10**6))  # so every step takes one second
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(decode, "compile_step", compile_step)
    llm = tiny_llm()
    llm.config.eos_token_id = []  # answers never end by themselves
    x = llm.embed(torch.randint(0, 211, (6,)))
    plain = generate(llm, x, [3, 3], max_new_tokens=10)
    fast = FastDecode(decode_step, pays=10)
    assert generate(llm, x, [3, 3], max_new_tokens=10, step=fast) == plain
    assert fast.seconds == {(2, 256): 9}
    generate(llm, x[:3], [3], max_new_tokens=8, step=fast)
    assert not compilations
    assert generate(llm, x, [3, 3], max_new_tokens=10, step=fast) == plain
    assert compilations == [False]
    remark = "compiling the decoding step, about a minute\n"
    generate(llm, x, [2, 2, 2], max_new_tokens=30, step=fast)
    assert len(compilations) == 2 and capsys.readouterr().err == remark  # once


def test_without_a_compiler(capsys):
    from torch._inductor import config

    llm = tiny_llm(num_hidden_layers=1)
    x = llm.embed(torch.randint(0, 211, (6,)))
    plain = generate(llm, x, [3, 3], max_new_tokens=9)
    fast = FastDecode(decode_step, pays=0)
    torch._dynamo.reset()
    with config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        for _ in range(2):
            assert generate(llm, x, [3, 3], max_new_tokens=9, step=fast) == plain
    message = capsys.readouterr().err
    assert message.startswith("decoding is not compiled and therefore slower: ")
    assert message.count("\n") == 1


# --- Weights of 8 bits


@pytest.mark.parametrize("dtype, bound", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_products_with_8_bits(rows, dtype, bound):
    """Few rows by a kernel of their own, many by unpacking: both as if the rounded weights were
    multiplied, also when they are compiled."""
    weight, bias = torch.randn(64, 32), torch.randn(64)
    weight[3] *= 100  # an output with large weights does not make the others coarse
    weight[5] = 0
    integers, scale = round_matrix(weight)
    rounded = integers * scale[:, None]
    assert ((rounded - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert integers.abs().amax(1)[[0, 3]].tolist() == [127, 127]

    x = torch.randn(rows, 32).to(dtype)
    linear, graphs = Int8Linear(integers, scale, bias), []
    y = linear(x)
    assert y.dtype == dtype and relative_error(y, x.float() @ rounded.T + bias) < bound

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    assert torch.equal(torch.compile(linear, backend=backend, dynamic=False)(x), y)
    assert ["int8pack" in code for code in graphs] == [rows <= 8]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen2 untied", "qwen3"])
def test_a_model_of_8_bits(family):
    """Its logits are those of the model with rounded weights; nothing keeps the old ones; it still
    generates."""
    llm, rounded = tiny_llm(family), tiny_llm(family)
    for p in rounded.parameters():
        if p.dim() == 2:
            integers, scale = round_matrix(p)
            p.copy_(integers * scale[:, None])
    ids = torch.randint(0, 211, (12,))
    before = llm(ids, [7, 5])
    quantise(llm)
    assert all(p.dim() == 1 for p in llm.parameters())
    assert relative_error(llm(ids, [7, 5]), rounded(ids, [7, 5])) < 1e-5
    assert 0 < relative_error(llm(ids, [7, 5]), before) < 0.05
    ours, plain = (generate(x, x.embed(ids), [7, 5], 8) for x in (llm, rounded))
    assert ours == plain


# --- The report and the curves


def report_item(number, error, text, start=0.0):
    return {
        "id": str(number),
        "audio": f"{text}.wav",
        "start": start,
        "seconds": 1.0,
        "hypothesis": text,
        "scores": {"error": error},
    }


def test_report(tmp_path):
    """Worst items first, each recording once, as many as there is room for; a recording that is
    gone has no player; no text of the data ends its script element or becomes markup."""
    hostile = "</script><script>hacked = 1</script> <!--<script> {{data}} $& \u202e\u2028"
    items = [report_item(1, 0.1, "a"), report_item(2, 0.9, hostile), report_item(3, 0.5, "gone")]
    items += [report_item(4, 0.3, hostile), report_item(5, 0.2, "a", start=1.0)]
    loaded = []

    def load_wave(item):
        loaded.append(item["id"])
        if item["audio"] == "gone.wav":
            raise AudioError("no such file")
        return torch.zeros(16000)

    path = tmp_path / "report.html"
    table = [{"task": "asr", "language": hostile, "group": "all", "items": 5, "scores": {}}]
    arguments = (path, hostile, {"rows": hostile}, table, {"BLEU it": hostile}, items, load_wave)
    write_report(*arguments)
    page = path.read_text(encoding="utf-8")
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    assert page.count("<script") == page.count("</script>") == 2 and "<" not in text
    data = json.loads(text)
    assert data["title"] == data["facts"]["rows"] == data["items"][0]["hypothesis"] == hostile
    assert [item["id"] for item in data["items"]] == ["2", "3", "4", "5", "1"]
    clips = [item["clip"] for item in data["items"]]
    assert clips == ["0", "1", "0", "2", "3"] and sorted(data["audio"]) == ["0", "2", "3"]
    assert all(url.startswith("data:audio/ogg;base64,") for url in data["audio"].values())
    assert loaded == ["2", "3", "5", "1"] and "clip" not in items[0]

    write_report(*arguments, room=1)
    assert path.read_text(encoding="utf-8").count("data:audio/ogg") == 1


def test_curves():
    """Those that have points, in their panels, from 0 to the highest value of the panel."""
    lines = [{"step": 0, "loss": 4.0}, {"step": 50, "loss": 1.0, "dev_loss": 2.0}, {"step": 100}]
    panels = [{"loss": "#999999", "dev_loss": "#1f6fb4", "none": "red"}, {"wer": "green"}]
    picture = ElementTree.fromstring(draw_curves(lines, panels))
    svg = "{http://www.w3.org/2000/svg}"
    curves = {curve.get("stroke"): curve.get("points") for curve in picture.iter(f"{svg}polyline")}
    assert curves == {"#999999": "60.0,30.0 420.0,255.0", "#1f6fb4": "420.0,180.0"}
    texts = [text.text for text in picture.iter(f"{svg}text")]
    assert {"4", "0", "100", "loss", "dev loss"} <= set(texts)
    assert len(picture.findall(f"{svg}rect")) == 1
    draw_curves([{"step": 0, "loss": 0.0}], panels)


# --- Looking ahead


@pytest.mark.parametrize("room, fits", [(900, False), (1200, True)])
def test_batches_that_fit_into_memory(monkeypatch, capsys, tiny_project, tmp_path, room, fits):
    """The largest of which the memory, here as much as its frames, is at most 85 % full."""
    argv = f"--encoder {tiny_project / 'encoder'} --llm {tiny_project / 'llm'} --cache-gb 0"
    argv += f" --data {tiny_project / 'train.jsonl'} --dev {tiny_project / 'dev.jsonl'}"
    run = train.open_run(train.parse([*argv.split(), "--out", str(tmp_path)]))
    before = [p.clone() for p in run.model.parameters()]
    taken = []

    def share(model, inputs):
        taken.append(sum(inputs["lengths"]))
        return taken[-1] / room

    def fit():
        return plan.fit_batches(run, train.run_schedule, train.on_device)

    # All 40 rows together have some 1,100 frames.
    monkeypatch.setattr(plan, "memory_share", share)
    if not fits:
        refused("a batch of 1000 frames does not fit into memory; lower --batch-frames", fit)
        return
    cfg = fit()
    assert (cfg.batch_frames, cfg.batch_tokens) == (1000, 1333)
    assert 800 < taken[0] <= 1000 < taken[1] and len(taken) == 2
    assert "--batch-frames 1000 --batch-tokens 1333 fit" in capsys.readouterr().out
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))


def test_the_memory_of_a_step(monkeypatch):
    """Of its tensors, and of AdamW's moments, which there are not yet; no gradient stays."""
    model = torch.nn.Linear(100, 10)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 100_000))

    def forward(fails, x):
        if fails:
            raise torch.OutOfMemoryError("out of memory")
        return model(x).sum(), 1

    forward.parameters, forward.zero_grad = model.parameters, model.zero_grad
    share = plan.memory_share(forward, {"fails": False, "x": torch.ones(100)})
    assert share == pytest.approx((2000 + 8 * 1010) / 100_000) and model.weight.grad is None
    assert plan.memory_share(forward, {"fails": True, "x": torch.ones(100)}) == 1


# --- Logs elsewhere


class FakeLog:
    """Stands for TensorBoard's writer and wandb's module and run: notes what it is given."""

    def __init__(self, *args, **options):
        self.opened, self.lines = (args, options), []

    def init(self, **options):
        self.opened = options
        return self

    def add_scalar(self, name, value, step):
        self.lines.append((step, name, value))

    def log(self, figures, step):
        self.lines += [(step, name, value) for name, value in figures.items()]

    def flush(self):
        self.flushed = len(self.lines)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_logs_elsewhere_are_those_on_disk(tiny_project, tmp_path, monkeypatch, kind):
    """A run that goes on shows its steps from there on only."""
    logs = []

    def open_fake(*args, **options):
        logs.append(FakeLog(*args, **options))
        return logs[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace())
    sys.modules["torch.utils.tensorboard"].SummaryWriter = open_fake
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **x: open_fake(**x)))
    train.main(arguments(tiny_project, tmp_path, log=kind, steps=4))
    lines = [json.loads(line) for line in (tmp_path / "align.jsonl").open()]
    expected = [(x["step"], k, v) for x in lines for k, v in x.items() if k != "step"]
    assert logs[0].lines == expected and {name for _, name, _ in expected} >= {"loss", "dev_loss"}

    # Without the option nothing is imported, and the log on disk is the same.
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train.main(arguments(tiny_project, tmp_path / "plain", steps=4))
    plain = (tmp_path / "plain" / "align.jsonl").read_text()
    assert plain == (tmp_path / "align.jsonl").read_text()
    with pytest.raises(SystemExit, match=f"train.py: --log {kind}: .*; pip install {kind}$"):
        train.main(arguments(tiny_project, tmp_path / "none", log=kind))


def test_text_is_no_figure():
    line = {"step": 3, "loss": 1.5, "skipped": "loss nan, gradient norm 1.0"}
    assert numbers(line) == {"loss": 1.5}


# --- The page, whose answers tests/test_serve.py compares with the command's


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_a_recording_of_the_page_is_the_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, 0.5 * torch.randn(30000, 2).numpy(), 44100)
    assert torch.equal(serve.read_recording(path.read_bytes()), load_audio(path))
