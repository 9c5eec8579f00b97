"""Generation of sample.py: the cache against the full forward pass, greedy and beam search against
transformers, sampling, prefixes, scores."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sample
from conftest import (
    ANSWERS,
    FAMILIES,
    FRAMES,
    Shapes,
    packed,
    peer_llm,
    single_batches,
    speech_batch,
    tiny_llm,
    tiny_speech_lm,
    without_answers,
)
from model import AUDIO, LLM, adapter_length
from sample import KVCache, decode_step, draw_token, generate, prefill, read_prefix

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def embed_questions(speech_lm, batch, instruction=2):
    """The embeddings of a batch's sequences up to the answer, and their lengths."""
    features, lengths, ids, ids_lengths, _ = batch
    audio, _ = speech_lm.encode(features, lengths)
    ids, ids_lengths = without_answers(ids, ids_lengths, instruction=instruction)
    return speech_lm.embed(ids, audio), ids_lengths


@pytest.fixture
def speech_lm():
    """With so many end tokens that answers end at different steps."""
    return tiny_speech_lm(eos_token_id=list(range(60)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_full_forward(family):
    llm = tiny_llm(family)
    ids, start = torch.randint(0, 211, (3, 20)), torch.tensor([11, 6, 1])
    begun = llm.embed(packed(ids, start))
    full = llm(ids.flatten(), [20] * 3).view(3, 20, -1)
    each = torch.arange(3)
    cache = KVCache.empty(llm, 3, 32)
    logits = prefill(llm, begun, start.tolist(), cache)
    for t in range(9):
        at = start + t
        torch.testing.assert_close(logits, full[each, at - 1], rtol=1e-4, atol=1e-4)
        logits = decode_step(llm, ids[each, at], at, cache, int(at.max()) + 1)

    # The same sequences, read in two uneven pieces.
    cache, more = KVCache.empty(llm, 3, 32), torch.tensor([9, 2, 5])
    prefill(llm, begun, start.tolist(), cache)
    parts = zip(ids, start, start + more, strict=True)
    rest = torch.cat([sequence[begin:end] for sequence, begin, end in parts])
    logits = prefill(llm, llm.embed(rest), more.tolist(), cache, start)
    torch.testing.assert_close(logits, full[each, start + more - 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache():
    """Is filled to the last layer even if no state is wanted; its parts are views or copies."""
    llm, x, lengths = tiny_llm(), torch.randn(12, 48), [6, 1, 5]
    cache, prefix = KVCache.empty(llm, 3, 300), read_prefix(llm, x, lengths)
    prefill(llm, x, lengths, cache)
    assert (cache.size, prefix.cache.size, prefix.lengths) == (512, 256, lengths)
    view, again = cache.view(6), prefix.cache.view(6)
    torch.testing.assert_close(view.keys + view.values, again.keys + again.values)
    assert view.size == 6 and view.values[1].data_ptr() == cache.values[1].data_ptr()
    chosen, other = cache.select([2, 0, 2]), KVCache.empty(llm, 2, 20)
    assert torch.equal(chosen.keys[2], cache.keys[2][[2, 0, 2]])
    other.copy_from(cache, [1, 2], 5)
    assert torch.equal(other.values[0][:, :, :5], cache.values[0][1:, :, :5])
    assert not other.values[0][:, :, 5:].any()


BEAMS = [dict()]
for count, penalty in ((2, 1.0), (4, 0.0), (5, 2.0), (3, -1.0)):
    BEAMS.append(dict(num_beams=count, length_penalty=penalty))


@pytest.mark.parametrize("options", BEAMS)
@pytest.mark.parametrize("end_ids", [[7], list(range(20, 60))])
def test_generated_ids_equal_peer(tmp_path, options, end_ids):
    peer = peer_llm("qwen2", eos_token_id=end_ids)
    peer.generation_config.eos_token_id = end_ids
    peer.save_pretrained(tmp_path)
    ours = LLM.from_pretrained(tmp_path)
    assert ours.config.eos_token_id == end_ids
    lengths = [9, 4, 1, 17, 12]
    ids = torch.randint(60, 211, (5, 17))
    x = ours.embed(packed(ids, lengths))
    answers = generate(ours, x, lengths, max_new_tokens=10, **options)
    for question, n, answer in zip(ids, lengths, answers, strict=True):
        theirs = peer.generate(
            question[None, :n],
            attention_mask=torch.ones(1, n).long(),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            **options,
        )[0, n:].tolist()
        ends = [i for i, token in enumerate(theirs) if token in end_ids]
        assert answer == theirs[: min(ends, default=10)]
    if len(end_ids) > 1 and options.get("length_penalty", 1) <= 1:
        assert any(len(answer) < 10 for answer in answers)


@pytest.mark.parametrize("options", [dict(), BEAMS[2], dict(num_beams=3, length_penalty=0.4)])
@torch.no_grad()
def test_a_generated_batch_equals_its_sequences(speech_lm, options):
    x, lengths = embed_questions(speech_lm, speech_batch(speech_lm))
    answer = partial(generate, speech_lm.llm, max_new_tokens=12, **options)
    answers = answer(x, lengths)
    alone = [answer(part, [len(part)])[0] for part in x.split(lengths)]
    assert answers == alone and len({len(ids) for ids in answers}) > 1
    if not options:  # every token but the end is announced
        streams = [[] for _ in lengths]
        answer(x, lengths, on_token=lambda row, token: streams[row].append(token))
        assert streams == answers and all(token >= 60 for ids in answers for token in ids)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_computes_what_is_needed(speech_lm, beams):
    """Sequences that are done leave the batch, and only the filled part of the cache is read."""
    x, lengths = embed_questions(speech_lm, speech_batch(speech_lm))
    sizes = []

    def step(llm, ids, positions, cache, filled):
        assert filled == positions.max() + 1 <= cache.size
        assert len(ids) == len(cache.keys[0])
        sizes.append(len(ids))
        with Shapes() as made:
            logits = decode_step(llm, ids, positions, cache, filled)
        assert (len(ids), 1, filled) in made.shapes  # the mask
        assert not any(cache.size in shape for shape in made.shapes)
        return logits

    answers = generate(speech_lm.llm, x, lengths, 12, beams, step=step)
    if beams == 1:
        live = [sum(len(answer) > n for answer in answers) for n in range(len(sizes))]
        assert len(set(live)) > 1
        assert all(n <= size < 2 * n for n, size in zip(live, sizes, strict=True))


@torch.no_grad()
def test_questions_about_a_prefix(speech_lm):
    """What is before the instruction is read once, and then asked as often as one likes."""
    batch = speech_batch(speech_lm)
    x, lengths = embed_questions(speech_lm, batch, instruction=0)
    llm = speech_lm.llm
    prefix = read_prefix(llm, x, lengths)
    rows, sizes = [0, 3, 3, 1, 2, 0], [3, 1, 2, 3, 2, 1]
    questions = llm.embed(torch.randint(90, 211, (sum(sizes),)))
    for beams in (1, 3):
        expected = []
        for row, question in zip(rows, questions.split(sizes), strict=True):
            joined = torch.cat([x.split(lengths)[row], question])
            expected += generate(llm, joined, [len(joined)], 9, beams)
        ask = partial(generate, llm, prefix=prefix, max_new_tokens=9, num_beams=beams)
        for _ in range(2):  # asking leaves the prefix as it was
            assert ask(questions, sizes, prefix_rows=rows) == expected
        in_order = ask(questions[:9], sizes[:4])
        assert in_order == ask(questions[:9], sizes[:4], prefix_rows=[0, 1, 2, 3])


@torch.no_grad()
def test_answers_that_repeat_themselves_end():
    """A loop of up to 32 tokens, gone through four times and over 24 tokens, keeps one turn."""
    size = sample.loop_size
    assert size([1, 2, 3] * 8) == size([9] + [1, 2, 3] * 8) == 21 and size([1, 2, 3] * 7) == 0
    assert size([5] * 24) == 23 and size([5] * 23) == size(list(range(100))) == 0
    assert size(list(range(32)) * 4) == 96 and size(list(range(33)) * 4) == 0
    assert size([7, 1, 2] + [3, 1, 2] * 11) == 32  # as far back as it goes

    # A step that goes in circles: 101, 102, 100, 101 and so on.
    llm, x, steps = tiny_llm(), torch.randn(4, 48), []

    def step(llm, ids, positions, cache, filled):
        steps.append(len(ids))
        logits = torch.zeros(len(ids), 211)
        logits[:, 100 + len(steps) % 3] = 1.0
        return logits

    first = generate(llm, x, [4], 1)[0]
    answers = generate(llm, x, [4], 90, stop_loops=True, step=step)
    assert answers == [first + [101, 102, 100]] and len(steps) == 24
    assert len(generate(llm, x, [4], 90, step=step)[0]) == 90


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_no_answer_begins_with_a_forbidden_id(beams):
    llm = tiny_llm()
    x, lengths = llm.embed(torch.randint(8, 211, (18,))), [6, 6, 6]
    firsts = {answer[0] for answer in generate(llm, x, lengths, 3)}
    answers = generate(llm, x, lengths, 3, beams, never_first=tuple(firsts))
    assert not {answer[0] for answer in answers} & firsts


REFUSED = [
    (dict(max_new_tokens=0), "max_new_tokens 0 and num_beams 1 must be at least 1"),
    (dict(num_beams=0), "num_beams 0 must be at least 1"),
    (dict(temperature=-1), "temperature -1 at least 0"),
    (dict(top_p=0), "top_p 0 above 0"),
    (dict(num_beams=2, temperature=1.0), "beam search neither samples nor streams"),
    (dict(num_beams=2, on_token=print), "beam search neither samples nor streams"),
    (dict(lengths=[0, 8]), r"lengths \[0, 8\] of 8 positions"),
    (dict(lengths=[5, 4]), r"lengths \[5, 4\] of 8 positions"),
    (dict(max_new_tokens=508), "needs 513 positions, .* context has 512"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_generate_refuses_what_makes_no_sense(options, message):
    llm = tiny_llm()
    arguments = dict(x=torch.randn(8, 48), lengths=[5, 3])
    with pytest.raises(ValueError, match=message):
        generate(llm, **{**arguments, **options})


def test_prefixes_that_do_not_fit_are_refused():
    llm, x = tiny_llm(), torch.randn(8, 48)
    prefix = read_prefix(llm, x, [5, 3])
    with pytest.raises(ValueError, match="needs 513 positions"):
        generate(llm, x[:2], [2], 506, prefix=prefix, prefix_rows=[0])
    with pytest.raises(ValueError):
        generate(llm, x, [2, 2, 4], prefix=prefix)  # which three of the two?


def test_sampling():
    from transformers import TopPLogitsWarper

    logits, generator = torch.randn(5, 40) * 3, torch.Generator().manual_seed(1)
    for top_p in (0.2, 0.7, 0.95, 1.0):
        expected = TopPLogitsWarper(top_p)(None, logits / 0.8).softmax(-1)
        ids = draw_token(logits.repeat(3000, 1), 0.8, top_p, generator).view(3000, 5)
        drawn = F.one_hot(ids, 40).float().mean(0)
        assert not drawn[expected == 0].any()
        assert (drawn - expected).abs().max() < 0.05
    assert torch.equal(draw_token(logits, 0, 0.3, None), logits.argmax(-1))


def test_the_same_seed_gives_the_same_answer():
    llm, x = tiny_llm(), torch.randn(8, 48)
    answers = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        answers.append(generate(llm, x, [5, 3], 20, temperature=1.0, generator=generator))
    assert answers[0] == answers[1] != answers[2]


@torch.no_grad()
def test_score_is_the_log_probability_of_the_answer():
    """Of uneven sequences that continue a prefix, against the loss of each of them alone."""
    speech_lm = tiny_speech_lm()
    batch = speech_batch(speech_lm, before=(0,) * 4)
    _, _, ids, ids_lengths, _ = batch
    audio, counts = speech_lm.encode(*batch[:2])
    assert counts == [adapter_length(n, speech_lm.adapter.config) for n in FRAMES]
    prefix = read_prefix(speech_lm.llm, audio, counts)
    rows = [3, 1, 0, 2]
    sequences = [ids.split(ids_lengths)[row][counts[row] :] for row in rows]
    sizes = [ANSWERS[row] for row in rows]
    lengths = [len(sequence) for sequence in sequences]
    assert AUDIO not in torch.cat(sequences)
    scores = sample.score(speech_lm.llm, torch.cat(sequences), lengths, sizes, prefix, rows)
    losses = [speech_lm(*single)[0] for single in single_batches(batch)]
    expected = torch.stack([-losses[row] for row in rows])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
