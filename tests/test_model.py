"""model.py against transformers on the same random weights, and against itself: packed batches,
kernels, precision, compiling, the loss, what happens in training only, LoRA."""

import copy
import math
import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import model
from conftest import (
    ENCODER,
    FAMILIES,
    FRAMES,
    LLAMA3,
    Shapes,
    gradients,
    move,
    packed,
    peer_encoder,
    peer_llm,
    place,
    randomise,
    relative_error,
    single_batches,
    speech_batch,
    tiny_encoder,
    tiny_llm,
    tiny_speech_lm,
)
from model import AUDIO, LLM, EncoderConfig, Kernels, Rows, SpeechEncoder, adapter_length

KERNELS = {"plain": Kernels(), "of this machine": model.default_kernels("cpu")}


@pytest.fixture(params=KERNELS)
def kernels(request):
    return KERNELS[request.param]


# --- The same results as transformers


@torch.no_grad()
@pytest.mark.parametrize("act", ["swish", "gelu"])
def test_encoder_equals_peer(kernels, act):
    peer, ours = peer_encoder(hidden_act=act), tiny_encoder(kernels, hidden_act=act)
    ours.load_state_dict(peer.state_dict())
    features, lengths = torch.randn(106, 160), [70, 33, 1, 2]
    states = ours(features, lengths).split(lengths)
    for x, y in zip(features.split(lengths), states, strict=True):
        assert relative_error(y, peer(x[None]).last_hidden_state[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True])
def test_encoder_of_a_ctc_finetune(tmp_path, adapter):
    """Its keys have a prefix. Its head and its adapter are left out."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForCTC

    config = Wav2Vec2BertConfig(
        **ENCODER,
        vocab_size=30,
        add_adapter=adapter,
        use_intermediate_ffn_before_adapter=adapter,
        mask_time_prob=0.0,
    )
    peer = randomise(Wav2Vec2BertForCTC(config))
    peer.save_pretrained(tmp_path)
    assert any(key.startswith("wav2vec2_bert.") for key in peer.state_dict())
    features = torch.randn(2, 40, 160)
    projected, _ = peer.wav2vec2_bert.feature_projection(features)
    theirs = peer.wav2vec2_bert.encoder(projected).last_hidden_state
    ours = SpeechEncoder.from_pretrained(tmp_path)(features.flatten(0, 1), [40, 40])
    assert relative_error(ours, theirs.flatten(0, 1)) < 1e-5


def test_encoder_has_the_published_names_and_sizes():
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    with torch.device("meta"):
        ours, peer = SpeechEncoder(EncoderConfig()), Wav2Vec2BertModel(Wav2Vec2BertConfig())
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (ours, peer)]
    assert shapes[0] == shapes[1] and sum(map(math.prod, shapes[0].values())) == 580_493_120


def adapter_options(layers, kernel, stride, act="relu"):
    options = dict(num_adapter_layers=layers, adapter_kernel_size=kernel)
    return options | dict(adapter_stride=stride, adapter_act=act)


def build_adapter(*shape):
    config = model.AdapterConfig(**ENCODER, output_size=48, **adapter_options(*shape))
    return randomise(model.LengthAdapter(config))


SHAPES = [(2, 3, 2), (1, 3, 2, "swish"), (3, 3, 2), (1, 8, 8, "gelu"), (2, 3, 3)]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_adapter_equals_peer(shape):
    peer, ours = peer_encoder(add_adapter=True, **adapter_options(*shape)), build_adapter(*shape)
    ours.layers.load_state_dict(peer.adapter.layers.state_dict(), strict=True)
    for n in range(1, 30):
        x = torch.randn(1, n, 32)
        out, lengths = ours(x[0], [n])
        assert [len(out)] == lengths == [adapter_length(n, ours.config)]
        assert lengths == [peer._get_feat_extract_output_lengths(torch.tensor(n)).item()]
        assert relative_error(out, ours.enc_to_dec_proj(peer.adapter(x))[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 8, 8), (2, 5, 2), (1, 7, 2)])
def test_adapter_reads_nothing_past_a_sequences_end(shape):
    """There the peer reads padding, at any length that does not divide by the stride."""
    adapter, lengths = build_adapter(*shape), list(range(1, 14))
    x = torch.randn(sum(lengths), 32)
    out, out_lengths = adapter(x, lengths)
    loud = [y if n % 2 else 1e3 * torch.randn(n, 32) for n, y in enumerate(x.split(lengths), 1)]
    beside_loud, _ = adapter(torch.cat(loud), lengths)  # every second sequence is another one
    out, beside_loud = out.split(out_lengths), beside_loud.split(out_lengths)
    for n, y, one, two in zip(lengths, x.split(lengths), out, beside_loud, strict=True):
        alone, _ = adapter(y, [n])
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-5)
        if n % 2:
            torch.testing.assert_close(two, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_llm_equals_peer(tmp_path, family, kernels):
    peer = peer_llm(family)
    peer.save_pretrained(tmp_path)
    ours = LLM.from_pretrained(tmp_path, kernels=kernels)
    ids, lengths = torch.randint(0, 211, (3, 200)), [200, 131, 1]
    logits = ours(packed(ids, lengths), lengths)
    assert relative_error(logits, packed(peer(ids).logits, lengths)) < 1e-5
    assert hasattr(ours, "lm_head") == ("untied" in family)


# The number of parameters, and what decides the forward pass in the real config.json files.
REAL_FIELDS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings"
).split()
REAL_MODELS = {
    "Qwen2.5": (1543714304, "qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, 1e-6, 1e6, True),
    "Qwen3": (1720574976, "qwen3", 151936, 2048, 6144, 28, 16, 8, 40960, 1e-6, 1000000, True),
    "Llama-3.2": (1235814400, "llama", 128256, 2048, 8192, 16, 32, 8, 131072, 1e-5, 5e5, True),
    "SmolLM2": (1711376384, "llama", 49152, 2048, 8192, 24, 32, 32, 8192, 1e-5, 130000, True),
    "EuroLLM": (1656850432, "llama", 128000, 2048, 5632, 24, 16, 8, 4096, 1e-5, 10000.0, False),
}
MORE_FIELDS = {
    "Qwen2.5": dict(sliding_window=131072, use_sliding_window=False, max_window_layers=28),
    "Qwen3": dict(head_dim=128, rope_scaling=None, sliding_window=None, use_sliding_window=False),
    "Llama-3.2": dict(
        rope_scaling=dict(LLAMA3, original_max_position_embeddings=8192), mlp_bias=False
    ),
}


@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_llms_have_the_published_names_sizes_and_angles(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    parameters, *values = REAL_MODELS[name]
    raw = dict(zip(REAL_FIELDS, values, strict=True), hidden_act="silu", eos_token_id=0)
    raw |= MORE_FIELDS.get(name, {})
    with torch.device("meta"):
        ours = LLM(model.LLMConfig.from_dict(raw))
        peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    shapes, theirs = ({n: p.shape for n, p in m.named_parameters()} for m in (ours, peer))
    if raw["tie_word_embeddings"]:
        theirs.pop("lm_head.weight", None)
    assert shapes == theirs

    # The rotary embedding is made again, as the one of the meta device has no numbers.
    rotary = type(peer.model.rotary_emb)(peer.config)
    positions = torch.arange(0, raw["max_position_embeddings"], 97)
    angles = rotary(torch.zeros(1), positions[None])
    for mine, theirs in zip(model.rope(positions, ours.config), angles, strict=True):
        torch.testing.assert_close(mine[:, 0], theirs[0], rtol=1e-4, atol=1e-4)


def reference_logits(peer, projection, llm, features, ids):
    """The forward pass of the reference system (arXiv 2506.17019): audio, then text."""
    audio = projection(peer(features).last_hidden_state)
    return llm(inputs_embeds=torch.cat([audio, llm.get_input_embeddings()(ids)], 1)).logits


def join_reference(peer, projection, llm):
    """Our model with the weights of the reference's parts, whose adapter lies in its encoder."""
    config = EncoderConfig.from_dict(peer.config.to_dict())
    encoder, ours = SpeechEncoder(config), LLM(model.LLMConfig.from_dict(llm.config.to_dict()))
    adapter = model.LengthAdapter(model.AdapterConfig.between(config, ours.config))
    states = peer.state_dict().items()
    encoder.load_state_dict({k: v for k, v in states if not k.startswith("adapter.")})
    adapter.layers.load_state_dict(peer.adapter.layers.state_dict())
    adapter.enc_to_dec_proj.load_state_dict(projection.state_dict())
    states = llm.state_dict().items()
    ours.load_state_dict({k: v for k, v in states if k != "lm_head.weight"})
    return model.SpeechLM(encoder, adapter, ours).eval()


@torch.no_grad()
def test_equals_the_reference_where_it_has_no_holes():
    """It leaves a hole between the audio and the text of a shorter sequence, so these are equal,
    and of a length that divides by 4. Its loss drops the first token of the longest answer."""
    peer, llm = peer_encoder(add_adapter=True, num_adapter_layers=2), peer_llm("qwen2")
    parts = peer, randomise(torch.nn.Linear(32, 48)), llm
    ours = join_reference(*parts)
    features, text = torch.randn(2, 16, 160), torch.randint(8, 211, (2, 9))
    theirs = reference_logits(*parts, features, text)
    ids = torch.cat([torch.full((2, 4), AUDIO), text], 1).flatten()
    features = features.flatten(0, 1)
    audio, _ = ours.encode(features, [16, 16])
    logits = ours.llm.logits(ours.llm.hidden(ours.embed(ids, audio), [13, 13]))
    assert relative_error(logits, theirs.flatten(0, 1)) < 1e-5

    # The answers are the last 6 tokens.
    targets = torch.cat([torch.arange(7, 13), torch.arange(20, 26)])
    loss, count = ours(features, [16, 16], ids, [13, 13], targets)
    answers = text[:, 3:]
    losses = F.cross_entropy(theirs[:, 6:-1].flatten(0, 1), answers.flatten(), reduction="none")
    assert count == 12
    torch.testing.assert_close(loss, losses.sum(), rtol=1e-5, atol=1e-4)

    # The reference cuts its logits to the length of the labels, and shifts them once more.
    shifted = theirs[:, -6:-1].flatten(0, 1)
    dropped = F.cross_entropy(shifted, answers[:, 1:].flatten(), reduction="sum")
    first = losses.view(2, 6)[:, 0].sum()
    assert (loss - dropped).item() == pytest.approx(first.item(), rel=1e-3)


# --- Attention and convolution


@pytest.mark.parametrize("left, right", [(64, 8), (12, 3), (0, 0), (0, 5), (7, 0)])
def test_biases_spread_over_the_keys(left, right):
    for n in (1, 2, 30):
        bias = torch.randn(3, n, left + 1 + right)
        expected = torch.empty(3, n, n)
        for i in range(n):
            for j in range(n):
                distance = max(-left, min(right, j - i))
                expected[:, i, j] = bias[:, i, left + distance]
        assert torch.equal(model.spread_bias(bias, left), expected)


def attend_by_query(q, k, v, lengths, causal, bias, left):
    """Attention within each sequence by its definition, one query after the other."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    outputs = []
    for n, end in zip(lengths, accumulate(lengths), strict=True):
        for i in range(n):
            here = end - n + i
            last = here + 1 if causal else end
            scores = (q[here] * k[end - n : last]).sum(-1) * q.shape[-1] ** -0.5  # (n, H)
            if bias is not None:
                distance = torch.arange(n) - i
                place = (distance + left).clamp(0, bias.shape[-1] - 1)
                scores = scores + bias[here][:, place].T
            outputs.append((scores.softmax(0)[..., None] * v[end - n : last]).sum(0))
    return torch.stack(outputs)


CASES = [(True, 2, 0, 0), (False, 6, 0, 0)]  # causal, heads of keys, left, width of the bias
CASES += [(False, 6, left, places) for left, places in ((12, 16), (0, 1), (3, 4))]


@pytest.mark.parametrize("causal, heads, left, places", CASES)
def test_attention_and_its_gradients(causal, heads, left, places):
    lengths = [40, 1, 2, 15]
    N = sum(lengths)
    shapes = [(N, 6, 16), (N, heads, 16), (N, heads, 16), (N, 6, places)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes if 0 not in shape]
    q, k, v, *rest = inputs
    bias = rest[0] if rest else None
    rows = Rows(lengths, torch.device("cpu"))
    ours = model.attend(q, k, v, rows, causal, bias, left)
    expected = attend_by_query(q, k, v, lengths, causal, bias, left)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(ours)
    pair = [torch.autograd.grad(y, inputs, grad) for y in (ours, expected)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_depthwise_convolution_within_each_sequence(kernels):
    """Values and gradients are those of PyTorch's, also of a sequence shorter than the kernel."""
    weight = torch.randn(8, 1, 31, requires_grad=True)
    lengths = [40, 3, 1, 34]
    x = torch.randn(sum(lengths), 8, requires_grad=True)
    ours = kernels.depthwise(x, weight, Rows(lengths, torch.device("cpu")))
    padded = [F.pad(part.T, (30, 0)) for part in x.split(lengths)]
    expected = torch.cat([F.conv1d(part, weight, groups=8).T for part in padded])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(ours)
    pair = [torch.autograd.grad(y, (x, weight), grad) for y in (ours, expected)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


def test_kernels_are_used_in_every_layer():
    calls = []

    def counted(name):
        operator = getattr(model, name)
        return lambda *args, **kw: calls.append(name) or operator(*args, **kw)

    names = ("attend", "depthwise", "call_layer")
    speech_lm = tiny_speech_lm(kernels=Kernels(*map(counted, names)))
    speech_lm(*speech_batch(speech_lm))
    # The encoder and the LLM have three layers each, the adapter has two.
    assert [calls.count(name) for name in names] == [8, 3, 8]


def test_extras_are_optional(monkeypatch):
    for name in ("extras", "extras.cpu", "extras.cuda"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert model.default_kernels("cpu") == Kernels()
    assert model.default_kernels("cuda:1").attend in (model.attend, model.attend_varlen)


# --- Packed batches


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_sequences(family, kernels):
    speech_lm = tiny_speech_lm(family, kernels)
    features, lengths, ids, ids_lengths, targets = batch = speech_batch(speech_lm)
    loss, count = speech_lm(*batch)
    alone = [speech_lm(*single)[0] for single in single_batches(batch)]
    torch.testing.assert_close(loss, sum(alone), rtol=1e-5, atol=1e-4)
    assert count == len(targets) == 17

    # A sequence of NaN touches no other.
    rows = Rows(ids_lengths, torch.device("cpu"))
    for b in range(4):
        parts = list(features.split(lengths))
        parts[b] = torch.full_like(parts[b], math.nan)
        others = targets[rows.row[targets] != b]
        loss, _ = speech_lm(torch.cat(parts), lengths, ids, ids_lengths, others)
        torch.testing.assert_close(loss, sum(alone) - alone[b], rtol=1e-5, atol=1e-4)


def recompute(layer, *inputs):
    return checkpoint(layer, *inputs, use_reentrant=False)


@pytest.mark.parametrize("call_layer", [model.call_layer, recompute])
def test_gradients_of_a_batch_are_the_sum_of_its_sequences(call_layer, kernels):
    speech_lm = tiny_speech_lm("qwen3", replace(kernels, call_layer=call_layer))
    batch = speech_batch(speech_lm)
    speech_lm(*batch)[0].backward()
    batched = gradients(speech_lm)
    speech_lm.zero_grad()
    for single in single_batches(batch):
        speech_lm(*single)[0].backward()
    summed = gradients(speech_lm)
    # Without masking, the vector of masked frames has no use.
    assert set(speech_lm.state_dict()) - set(summed) == {"encoder.masked_spec_embed"}
    torch.testing.assert_close(batched, summed, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_linear_layers_see_no_padding(monkeypatch):
    """Every product with a weight matrix has as many lines as the batch has frames or tokens."""
    speech_lm, sizes, linear = tiny_speech_lm(), set(), F.linear
    batch = speech_batch(speech_lm)

    def counted(x, *weights):
        sizes.add(tuple(x.shape[:-1]))
        return linear(x, *weights)

    monkeypatch.setattr(F, "linear", counted)
    speech_lm(*batch)
    halves = sum((n + 1) // 2 for n in FRAMES)
    quarters = sum(adapter_length(n, speech_lm.adapter.config) for n in FRAMES)
    _, _, ids, _, targets = batch
    assert sizes == {(sum(FRAMES),), (halves,), (quarters,), (len(ids),), (len(targets),)}


@pytest.mark.parametrize("call_layer", [model.call_layer, recompute])
def test_the_last_layer_computes_no_more_than_is_wanted(call_layer):
    """Its states and all gradients are those of all positions; elsewhere its MLP does nothing."""
    llm = tiny_llm("qwen3", Kernels(call_layer=call_layer))
    lengths, wanted, results = [6, 1, 5], torch.tensor([2, 5, 6, 11]), []
    x = torch.randn(12, 48, requires_grad=True)
    for chosen in (None, wanted):
        x.grad = None
        llm.zero_grad()
        with Shapes() as made:
            states = llm.hidden(x, lengths, wanted=chosen)
            states = states[wanted] if chosen is None else states
            states.square().sum().backward()
        results.append({"states": states, "x": x.grad, **gradients(llm)})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    inner = llm.config.intermediate_size
    assert {(12, inner), (4, inner)} <= made.shapes


def test_wrong_number_of_placeholders_is_refused():
    speech_lm = tiny_speech_lm()
    features, lengths, ids, _, _ = speech_batch(speech_lm)
    audio, _ = speech_lm.encode(features, lengths)
    ids[2] = 5
    message = "ids hold 27 audio placeholders for 28 audio frames"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        speech_lm.embed(ids, audio)


def test_nothing_is_made_on_another_device():
    """On the meta device, from features to the loss, its gradients and logits. It has no values, so
    that no operation waits for one, either. Lengths alone come from the host, four times."""
    with torch.device("meta"):
        speech_lm = tiny_speech_lm("qwen3")
    features, lengths, ids, ids_lengths, targets = move(speech_batch(speech_lm), "meta")
    with Shapes() as made:
        speech_lm.train()
        loss, count = speech_lm(features, lengths, ids, ids_lengths, targets)
        loss.backward()
        audio, _ = speech_lm.encode(features, lengths)
        hidden = speech_lm.llm.hidden(speech_lm.embed(ids, audio), ids_lengths)
        logits = speech_lm.llm.logits(hidden)
    assert loss.shape == () and count == 17 and logits.shape == (len(ids), 211)
    assert made.devices == {"meta", "cpu"} and made.on_cpu == {(4,)}


# --- Precision, and the compiler


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_close_to_float32(family):
    speech_lm = tiny_speech_lm(family)
    features, lengths, ids, ids_lengths, _ = speech_batch(speech_lm)
    ids = ids.clamp(min=0)
    states = speech_lm.encoder(features, lengths)
    audio, _ = speech_lm.adapter(states, lengths)
    exact = states, audio, speech_lm.llm(ids, ids_lengths)
    for dtype in (torch.bfloat16, torch.float32):
        rounded = place(copy.deepcopy(speech_lm), "cpu", dtype, torch.bfloat16)
        states16, (audio16, _) = (
            rounded.encoder(features, lengths),
            rounded.adapter(states, lengths),
        )
        logits = rounded.llm(ids, ids_lengths)
        assert states16.dtype == audio16.dtype == rounded.llm.embed(ids).dtype == torch.bfloat16
        assert logits.dtype == torch.float32
        for approximate, plain in zip((states16, audio16, logits), exact, strict=True):
            assert 1e-4 < (approximate.float() - plain).norm() / plain.norm() < 2e-2


def test_norms_and_loss_are_float32_under_bfloat16():
    x = (torch.randn(4, 2000) * 30 + 500).bfloat16()
    y = x.double()
    centred = y - y.mean(-1, keepdim=True)
    normed = {
        model.LayerNorm(2000): centred / y.std(-1, keepdim=True, correction=0),
        model.RMSNorm(2000, 1e-6): y / y.square().mean(-1, keepdim=True).sqrt(),
    }
    for norm, exact in normed.items():
        randomise(norm)
        exact = (exact * norm.weight + getattr(norm, "bias", 0.0)).bfloat16()
        torch.testing.assert_close(norm(x), exact, rtol=2**-7, atol=2**-9)
    llm = tiny_llm()
    llm.compute_dtype = torch.bfloat16
    hidden = llm.hidden(llm.embed(torch.randint(0, 211, (9,))), [9])
    labels = torch.randint(0, 211, (9,))
    loss = model.AnswerLoss.apply(hidden, llm.head, labels)
    exact = F.cross_entropy(llm.logits(hidden).double(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)  # in bfloat16 it would be 1e-3 off


def compiled(run):
    """Traced and differentiated as one graph; the code generation, of a minute, is left out."""
    return torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")


def test_compiled_training_step_equals_eager():
    """With dropout, layerdrop and masking it must trace; to compare, all chances are zero."""
    speech_lm = tiny_speech_lm(num_hidden_layers=1).train()
    del speech_lm.encoder.encoder.layers[1:], speech_lm.adapter.layers[1:]
    speech_lm.adapter.config.num_adapter_layers = 1
    batch = speech_batch(speech_lm, (21, 1), (0, 1), (3, 1))
    compiled(speech_lm.encoder)(*batch[:2])
    for part in (speech_lm.encoder, speech_lm.adapter):
        part.config.layerdrop = part.config.conformer_conv_dropout = 0.0
        part.config.apply_spec_augment = False
    results = []
    for run in (speech_lm, compiled(speech_lm)):
        speech_lm.zero_grad()
        run(*batch)[0].backward()
        results.append(gradients(speech_lm))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


# --- Loss, training, LoRA


def test_loss_makes_no_logits_for_all_positions(monkeypatch):
    speech_lm = tiny_speech_lm()
    batch = speech_batch(speech_lm)
    expected, _ = speech_lm(*batch)
    expected.backward()
    grad = speech_lm.llm.head.grad.clone()
    monkeypatch.setattr(model, "LOSS_CHUNK", 4)
    speech_lm.zero_grad()
    saved = set()

    def save(tensor):
        saved.add(tuple(tensor.shape))
        return tensor

    with Shapes() as made:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss, _ = speech_lm(*batch)
        loss.backward()
    assert saved and not any(shape[-1:] == (211,) for shape in saved)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(speech_lm.llm.head.grad, grad, rtol=1e-4, atol=1e-5)
    logits = {shape for shape in made.shapes if 211 in shape and 48 not in shape}
    assert max(map(math.prod, logits)) == 4 * 211


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, dtype, frozen):
    """In several chunks, the last one short. Of a frozen head no gradient is even computed."""
    monkeypatch.setattr(model, "LOSS_CHUNK", 4)
    monkeypatch.setattr(model, "SOFTMAX_ROWS", {"cpu": 3})
    head, labels = torch.randn(211, 48).requires_grad_(not frozen), torch.randint(0, 211, (11,))
    ours = torch.randn(11, 48).to(dtype).requires_grad_()
    plain = ours.detach().clone().requires_grad_()
    with Shapes() as made:
        loss = model.AnswerLoss.apply(ours, head, labels)
        (loss / 3).backward()
    grad, head.grad = head.grad, None
    expected = F.cross_entropy(F.linear(plain.float(), head), labels, reduction="sum")
    (expected / 3).backward()

    exact = dtype == torch.float32
    bounds = dict(rtol=1e-5, atol=1e-5) if exact else dict(rtol=2e-2, atol=3e-2)
    torch.testing.assert_close(loss, expected, **bounds)
    torch.testing.assert_close(ours.grad.float(), plain.grad.float(), **bounds)
    assert (grad is None) == frozen == (head.grad is None)
    if not frozen:
        torch.testing.assert_close(grad, head.grad, **bounds)
        with torch.no_grad(), Shapes() as made:  # nor does a validation compute any
            assert model.AnswerLoss.apply(ours.detach(), head, labels) == loss
    # All that has the shape of the head is the head in the dtype of the products.
    assert ((211, 48) in made.shapes) == (not exact)


@pytest.mark.parametrize("family", ["qwen2", "qwen2 untied"])
def test_ctc_of_a_warm_start_by_hand(family):
    """Over all tokens, sequence by sequence, with the embeddings as output layer. An answer may be
    its end token alone. The last one, of eight tokens in two embeddings, does not count."""
    speech_lm = tiny_speech_lm(family)
    batch = speech_batch(speech_lm)
    loss, count = speech_lm(*batch, warm_start=True)
    loss.backward()
    ours = gradients(speech_lm)
    assert count == len(batch[-1]) and not any(name.startswith("llm") for name in ours)
    speech_lm.zero_grad()

    embeddings = speech_lm.llm.model.embed_tokens.weight.detach()
    blank, expected = len(embeddings), []
    for features, lengths, ids, _, targets in single_batches(batch):
        audio, _ = speech_lm.encode(features, lengths)
        deviation = embeddings[::64].var() * embeddings.shape[1] ** 0.5
        scores = 3 / deviation * audio @ embeddings.T
        scores = torch.cat([scores, torch.full((len(audio), 1), math.log(blank))], 1)
        answer, table = ids[targets][:-1], scores.log_softmax(1)[:, None]
        sizes = torch.tensor([len(audio)]), torch.tensor([len(answer)])
        expected.append(F.ctc_loss(table, answer[None], *sizes, blank, "sum", True))
        read = scores.argmax(1).unique_consecutive().tolist()
        assert speech_lm.spell(audio) == [token for token in read if token != blank]
    assert [loss.item() > 0 for loss in expected] == [True, True, True, False]
    assert torch.allclose(loss, sum(expected))
    sum(expected).backward()
    theirs = gradients(speech_lm)
    assert ours.keys() == theirs.keys()
    vectors = [torch.cat([g.flatten() for g in each.values()]) for each in (ours, theirs)]
    assert relative_error(*vectors) < 1e-4


def test_ctc_of_a_batch_without_answers_is_zero():
    speech_lm = tiny_speech_lm()
    *inputs, targets = speech_batch(speech_lm)
    loss, count = speech_lm(*inputs, targets[:0], warm_start=True)
    loss.backward()
    assert loss == count == 0
    assert all((g == 0).all() for g in gradients(speech_lm).values())


# How often the peer's encoder and adapter apply each dropout in a forward pass.
DROPOUTS = [
    ("hidden_dropout", 1 + 3 * 2, 2),
    ("activation_dropout", 3 * 2, 2),
    ("attention_dropout", 2 * 3, 2),
    ("feat_proj_dropout", 1, 0),
    ("conformer_conv_dropout", 3, 2),
]


@pytest.mark.parametrize("name, in_encoder, in_adapter", DROPOUTS)
def test_every_dropout_of_the_peer_in_training_only(monkeypatch, name, in_encoder, in_adapter):
    """In attention it is an argument of the kernel, and elsewhere a call of its own."""
    rates, dropout = [], F.dropout

    def drop(x, p, training):
        rates.append(p * training)
        return dropout(x, p, training)

    def attend(*args, dropout=0.0, **options):
        rates.append(dropout)
        return model.attend(*args, dropout=dropout, **options)

    monkeypatch.setattr(F, "dropout", drop)
    off = dict.fromkeys([dropout for dropout, *_ in DROPOUTS], 0.0)
    config = {**ENCODER, **off, name: 0.25, "layerdrop": 0.0, "mask_time_prob": 0.0}
    kernels = Kernels(attend=attend)
    encoder = SpeechEncoder(EncoderConfig(**config), kernels=kernels)
    adapter = model.LengthAdapter(model.AdapterConfig(**config, output_size=48), kernels=kernels)
    for train in (True, False):
        for module, width, count in ((encoder, 160, in_encoder), (adapter, 32, in_adapter)):
            rates.clear()
            module.train(train)(torch.randn(20, width), [20])
            assert rates.count(0.25) == count * train and set(rates) <= {0.0, 0.25}


def test_attention_dropout_of_the_llm(kernels):
    llm, ids = tiny_llm(kernels=kernels, attention_dropout=0.5), torch.randint(0, 211, (30,))
    assert torch.equal(llm(ids, [30]), llm(ids, [30]))
    llm.train()
    assert not torch.equal(llm(ids, [30]), llm(ids, [30]))


def test_layerdrop_and_masking_in_training_only():
    features, lengths = torch.randn(101, 160), [60, 41]
    off = dict(layerdrop=0.0, mask_time_prob=0.0, conformer_conv_dropout=0.0)
    for on in (dict(layerdrop=0.5), dict(mask_time_prob=0.3), dict(mask_feature_prob=0.5), {}):
        encoder = tiny_encoder(**{**off, **on})
        expected = encoder(features, lengths)
        assert torch.equal(encoder(features, lengths), expected)
        encoder.train()
        runs = [encoder(features, lengths) for _ in range(12)]
        assert all(torch.equal(expected, run) for run in runs) == (not on), on
    encoder.config.apply_spec_augment, encoder.config.mask_time_prob = False, 0.9
    assert torch.equal(encoder(features, lengths), expected)
    encoder.config.layerdrop = 1.0  # every layer dropped: the projected features come out
    torch.testing.assert_close(encoder(features, lengths), encoder.feature_projection(features))


def test_masked_frames_become_the_learned_vector_and_masked_channels_zero():
    encoder = tiny_encoder(mask_time_prob=0.3, mask_feature_prob=0.3)
    lengths, masks = [60, 60, 30], set()
    x = torch.randn(150, 32) + 5
    masked = encoder.spec_augment(x, Rows(lengths, torch.device("cpu")))
    for before, after in zip(x.split(lengths), masked.split(lengths), strict=True):
        channels = (after == 0).all(0)  # (D,), the same in all frames
        frames = ((after == encoder.masked_spec_embed) | channels).all(1)  # (F,)
        assert channels.any() and frames.any()
        expected = torch.where(frames[:, None], encoder.masked_spec_embed, before)
        assert torch.equal(after, expected.masked_fill(channels, 0))
        masks.add((*channels.tolist(), *frames[:30].tolist()))
    assert len(masks) == 3  # each sequence has spans of its own


def test_masked_spans_have_the_peers_statistics():
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import _compute_mask_indices

    lengths = torch.tensor([200, 120, 50, 12, 9, 1] * 400)
    real = torch.arange(200) < lengths[:, None]
    for prob, span, least in ((0.3, 10, 2), (0.05, 10, 0), (0.65, 5, 1)):
        ours = model.span_mask(lengths, 200, prob, span, least)
        assert not ours[~real].any()
        for n in (200, 120, 50, 12):
            share = ours[lengths == n][:, :n].float().mean()
            peers = [_compute_mask_indices((1, n), prob, span, None, least) for _ in range(400)]
            theirs = torch.cat([torch.tensor(mask) for mask in peers]).float().mean()
            assert share.item() == pytest.approx(theirs.item(), abs=0.06), n
        first = ours & ~F.pad(ours, (1, 0))[:, :200]
        last = ours & ~F.pad(ours, (0, 1))[:, 1:]
        widths = last.nonzero()[:, 1] - first.nonzero()[:, 1] + 1
        assert widths.min() >= span
    short = (lengths == 9) | (lengths == 1)
    assert not model.span_mask(lengths, 200, 0.3, 10, 2)[short].any()


def test_low_rank_updates():
    llm, plain = tiny_llm(), tiny_llm()
    ids, lengths = torch.randint(8, 211, (18,)), [9, 9]
    names = set(llm.state_dict())
    before = plain(ids, lengths)
    model.add_lora(llm, 4, 8.0, ["q_proj", "down_proj"])
    trained = {name for name, p in llm.named_parameters() if p.requires_grad}
    layers = [
        f"model.layers.{i}.{x}" for i in range(3) for x in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert trained == {f"{layer}.lora_{ab}" for layer in layers for ab in "ab"}
    assert torch.equal(llm(ids, lengths), before)  # B is zero

    for name in trained:
        torch.nn.init.normal_(llm.get_parameter(name), std=0.1)
    layer = llm.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    weight = layer.weight + 8.0 / 4 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)
    state = model.merged_state(llm, llm.state_dict(), 8.0)
    assert set(state) == names
    plain.load_state_dict(state)
    updated = llm(ids, lengths)
    assert relative_error(updated, before) > 1e-3
    assert relative_error(plain(ids, lengths), updated) < 1e-5
    updated.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in llm.parameters())
