"""Answering with sample.py on a model of random weights: recordings of any length, a batch against
its examples, streaming, refusals by hand, and the command."""

import io
import json
import math
import os
import re
import string
import sys
from types import SimpleNamespace

import pytest
import soundfile
import torch

import sample
from conftest import ESCAPES, make_project, randomise, tiny_llm
from data import (
    REFUSALS,
    AudioError,
    Examples,
    Manifest,
    cut_windows,
    fbank,
    join_texts,
    load_audio,
)
from model import SpeechLM, UserError, fingerprint, load_tokenizer
from sample import Answer, answer_examples, encode_waves, generate

SHORT = {"max_new_tokens": 9}
SAY = "Transcribe the speech."
ASK = "Who is that?"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def make_folder(folder):
    """A project whose LLM answers with letters, and ends answers by capital ones."""
    make_project(folder)
    tokens = load_tokenizer(folder / "llm").get_vocab()
    capitals = [token for text, token in tokens.items() if text in string.ascii_uppercase]
    llm = tiny_llm("qwen2 untied", vocab_size=len(tokens), eos_token_id=[0, *capitals])
    for text, token in tokens.items():
        letters = text.removeprefix("Ġ")
        if not (letters.isascii() and letters.isalpha()):
            llm.lm_head.weight.data[token] = 0
    llm.save_pretrained(folder / "llm")
    return folder


def write_checkpoint(folder, path, **more):
    """A checkpoint of a random adapter between the models of a folder. Returns its path."""
    adapter = randomise(SpeechLM.from_parts(folder / "encoder", folder / "llm").adapter)
    checkpoint = {
        "model": {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()},
        "adapter": {},
        "bases": {name: fingerprint(folder / name) for name in ("encoder", "llm")},
        "config": {"phase": "ift"},
        "data": [],
        "window": 1.0,
        "step": 5,
    }
    torch.save(checkpoint | more, path)
    return path


def write_examples(project, path, recordings=8):
    """A manifest with a transcript, a translation and a question about each recording. Some of the
    questions are not to be answered."""
    lines = []
    for i, example in enumerate(Manifest(project / "train.jsonl").select(range(recordings))):
        example |= {"audio": str(project / example["audio"]), "speaker": "ab"[i % 2]}
        german = {"task": "st", "target_language": "de", "text": f"Sie sagt {example['text']}."}
        question = {"task": "sqa", "question": ASK}
        if i % 3 == 0:
            question["text"] = REFUSALS["en"]
        lines += [json.dumps(example | change) for change in ({}, german, question)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Manifest(path)


def run(program, capsys, *argv, code=0):
    """Runs a command that must end with this exit code. Returns what it printed, and its errors."""
    found, message = 0, ""
    try:
        program.main([str(word) for word in argv])
    except SystemExit as stop:
        message = stop.code if isinstance(stop.code, str) else ""
        found = 1 if message else stop.code or 0
    out, err = capsys.readouterr()
    assert found == code, (found, message, out, err)
    printed = re.sub("\r|\x1b\\[A", "", out + err + message)  # but for progress bars
    assert not ESCAPES.search(printed) and "\n" not in message
    return out, err + message


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A project, a checkpoint of it with its model, a manifest, and encoded recordings."""
    folder = make_folder(tmp_path_factory.mktemp("asked"))
    ckpt = write_checkpoint(folder, folder / "ift.pt")
    model, tokenizer, checkpoint = sample.load_model(ckpt)
    manifest = write_examples(folder, folder / "all.jsonl")
    waves = [load_audio(example["audio"]) for example in manifest]
    soundfile.write(folder / "long.wav", torch.cat(waves[::3]).numpy(), 16000)
    (long,) = encode_waves(model, [load_audio(folder / "long.wav")], 1.0)
    recordings = encode_waves(model, waves[::3], math.inf)
    return SimpleNamespace(
        folder=folder,
        ckpt=ckpt,
        loaded=(model, tokenizer, checkpoint),
        model=model,
        tokenizer=tokenizer,
        manifest=manifest,
        examples=list(manifest),
        recordings=[recordings[i // 3] for i in range(len(waves))],
        long=long,
    )


def answers_to(asked, examples, recordings, **options):
    options = SHORT | options
    return answer_examples(asked.model, asked.tokenizer, examples, recordings, **options)


def sequence_of(asked, example):
    """An example as training takes it: ids, how many are the answer, and frames."""
    examples = Examples([asked.manifest], asked.tokenizer, 0, asked.model.adapter.config)
    return examples.sequence(example, examples.frames(0, example))


@torch.no_grad()
def ids_of_one(asked, example):
    """The ids that answer an example, without a batch, windows or a prefix."""
    ids, answer, frames = sequence_of(asked, example)
    question = torch.tensor(ids[:-answer])
    audio, _ = asked.model.encode(frames, [len(frames)])
    x = asked.model.embed(question, audio)
    return generate(asked.model.llm, x, [len(x)], **SHORT)[0]


def endless(asked, monkeypatch):
    """Makes a model that says "x" for ever."""
    size = asked.tokenizer.get_vocab_size()
    always = torch.eye(size)[[asked.tokenizer.token_to_id("x")]]
    monkeypatch.setattr(asked.model.llm, "logits", lambda hidden: always.repeat(len(hidden), 1))


# ------------------------------------------------------------------------------
# Answers


def test_a_batch_equals_its_examples(asked):
    """Also, training, evaluation and sampling build the same sequence."""
    answers = answers_to(asked, asked.examples, asked.recordings, batch_size=5)
    sizes = set()
    for example, answer in zip(asked.examples, answers, strict=True):
        ids = ids_of_one(asked, example)
        sizes.add(len(ids))
        assert answer == Answer(asked.tokenizer.decode(ids).strip(), cut=len(ids) == 9)
    assert len(sizes) > 3 and len({answer.text for answer in answers}) > 6
    for i, instruction in enumerate((SAY, "Translate to German", ASK)):
        example = asked.examples[i] | {"instruction": instruction}
        task, answer = sample.ask(*asked.loaded, asked.recordings[i], instruction, **SHORT)
        assert [answer] == answers_to(asked, [example], [asked.recordings[i]])
        assert task == example["task"]


def test_a_window_is_encoded_as_if_alone(asked, monkeypatch):
    monkeypatch.setattr(sample, "BATCH_FRAMES", 60)
    waves = [torch.randn(n) for n in (43000, 4800, 16000, 600)]
    recordings = encode_waves(asked.model, waves, 1.0)
    assert [len(recording) for recording in recordings][1:] == [1, 1, 1] and len(recordings[0]) > 2
    for wave, recording in zip(waves, recordings, strict=True):
        for window, audio in zip(cut_windows(wave, 1.0), recording, strict=True):
            with torch.no_grad():
                alone, _ = asked.model.encode(*fbank([window]))
            torch.testing.assert_close(audio, alone, rtol=1e-4, atol=1e-4)


def test_long_recordings(asked, monkeypatch):
    """Questions are asked of all windows at once, everything else of one after another. What was
    read is not read again for another instruction."""
    sizes, read_prefix = [], sample.read_prefix

    def spy(llm, x, lengths):
        sizes.extend(lengths)
        return read_prefix(llm, x, lengths)

    monkeypatch.setattr(sample, "read_prefix", spy)
    transcript, german, question = asked.examples[:3]
    other = german | {"task": None, "instruction": "Hum it"}
    examples = [transcript, other, question, question | {"question": "Who speaks?"}]
    answers = answers_to(asked, examples, [asked.long] * 4, batch_size=99)
    windows = [len(window) for window in asked.long]
    assert len(windows) > 4 and sorted(sizes) == sorted([*windows, sum(windows)])
    for example, answer in zip(examples[:2], answers[:2], strict=True):
        parts = [answers_to(asked, [example], [[window]])[0] for window in asked.long]
        assert answer.text == join_texts(part.text for part in parts)
        assert answer.cut == any(part.cut for part in parts)
    at_once = [[torch.cat(asked.long)]] * 2
    assert answers[2:] == answers_to(asked, examples[2:], at_once)


def test_recordings_beyond_the_context(asked):
    long = [asked.long[0].repeat(200, 1)]
    first, error, last = answers_to(
        asked, asked.examples[:3], [asked.recordings[0], long, asked.recordings[0]]
    )
    assert [first, last] == answers_to(asked, asked.examples[:3:2], asked.recordings[:2])
    assert isinstance(error, AudioError)
    message = r"\d+ s of audio and the instruction take \d+ of the LLM's 512 positions, .*; ask"
    assert re.match(message, str(error))


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_that_would_not_end(asked, monkeypatch, beams):
    endless(asked, monkeypatch)
    example, recording = asked.examples[0], asked.recordings[0]
    options = {"num_beams": beams, "max_new_tokens": 40}
    assert answers_to(asked, [example], [recording], **options) == [Answer("x")]
    options |= {"stop_loops": False}
    assert answers_to(asked, [example], [recording], **options) == [Answer("x" * 40, cut=True)]

    # A recording that fills the context nearly up leaves room for a shorter one, and takes none
    # from other examples.
    ids, answer, _ = sequence_of(asked, example)
    room = 512 - 450 - (len(ids) - answer - len(recording[0]))
    full = [recording[0][:1].repeat(450, 1)]
    options |= {"max_new_tokens": room + 20}
    alone = answers_to(asked, [example], [full], **options)
    assert alone == [Answer("x" * room, cut=True)]
    together = answers_to(asked, [example] * 2, [full, recording], **options)
    assert together == [*alone, Answer("x" * (room + 20), cut=True)]


# ------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("options", [{}, {"weigh": True}, {"num_beams": 2}])
def test_streamed_pieces_are_the_answer(asked, options):
    for example in asked.examples[:3]:
        pieces = []
        more = {"on_text": pieces.append, "batch_size": 2, **options}
        (answer,) = answers_to(asked, [example], [asked.long], **more)
        assert "".join(pieces) == answer.text
        assert [answer] == answers_to(asked, [example], [asked.long], **options)
        question = example["task"] == "sqa"
        batches = 1 if question else math.ceil(len(asked.long) / 2)
        at_once = "num_beams" in options or (question and "weigh" in options)
        assert len(pieces) == batches if at_once else len(pieces) > batches + 2


def test_only_the_first_example_is_streamed(asked):
    for size in (1, 9):
        pieces = []
        options = {"on_text": pieces.append, "batch_size": size}
        first, _ = answers_to(asked, asked.examples[:2], asked.recordings[:2], **options)
        assert "".join(pieces) == first.text


def test_streaming_over_a_loop_loses_no_window(asked, monkeypatch):
    texts, pieces = ["one two " * 12, "three four"], []

    def generate_loop(llm, x, lengths, on_token, **options):
        ids = asked.tokenizer.encode(texts.pop(0)).ids
        for token in ids:
            on_token(0, token)
        return [ids[: len(ids) - sample.loop_size(ids)]]

    monkeypatch.setattr(sample, "generate", generate_loop)
    recording, options = asked.recordings[0] * 2, {"on_text": pieces.append, "batch_size": 1}
    (answer,) = answers_to(asked, asked.examples[:1], [recording], **options)
    looping, text = "".join(pieces).split("\n")
    assert looping.startswith("one two one two one two") and text == answer.text
    assert answer.text.startswith("one two") and answer.text.endswith("three four")


# ------------------------------------------------------------------------------
# Refusing


@torch.no_grad()
def log_p(asked, example, ids):
    """log p of an answer of these ids by the loss of training."""
    question, size, frames = sequence_of(asked, example)
    sequence = torch.tensor([*question[:-size], *ids, 0])
    targets = torch.arange(len(sequence) - len(ids) - 1, len(sequence))
    loss, _ = asked.model(frames, [len(frames)], sequence, [len(sequence)], targets)
    return -loss.item()


def test_margins_by_hand(asked):
    example = asked.examples[2] | {"instruction": ASK}
    ids = ids_of_one(asked, example)
    text, other = asked.tokenizer.decode(ids).strip(), log_p(asked, example, ids)
    scores = {}
    for refusal in REFUSALS.values():
        scores[refusal] = log_p(asked, example, asked.tokenizer.encode(refusal).ids)

    def weigh(language, **options):
        question = example | {"target_language": language}
        return answers_to(asked, [question], [asked.recordings[2]], **options)[0]

    answer = weigh("en", weigh=True)
    assert answer == Answer(text, answer.margin, text, len(ids) == 9)
    assert answer.margin == pytest.approx(scores[REFUSALS["en"]] - other, abs=1e-3)
    assert weigh("en") == Answer(text, cut=answer.cut)
    every = torch.tensor(list(scores.values())).logsumexp(0).item()
    assert weigh(None, weigh=True).margin == pytest.approx(every - other, abs=1e-3)
    assert weigh("it", weigh=True).margin == pytest.approx(scores[REFUSALS["it"]] - other, abs=1e-3)

    # Above the threshold it is refused, in the language of the question or in the likeliest.
    for language, refusal in (("it", REFUSALS["it"]), (None, max(scores, key=scores.get))):
        refused, margin = weigh(language, refuse_above=-1e9), weigh(language, weigh=True).margin
        assert refused == Answer(refusal, margin, text, len(ids) == 9)
        assert weigh(language, refuse_above=margin + 1e-6).text == text
    transcript = answers_to(asked, asked.examples[:1], asked.recordings[:1], refuse_above=-1e9)
    assert transcript == answers_to(asked, asked.examples[:1], asked.recordings[:1])


def test_a_refusing_model_still_has_another_answer(asked, monkeypatch):
    refusal = asked.tokenizer.encode(REFUSALS["en"]).ids

    def refuse(llm, x, lengths, never_first=(), **options):
        if not never_first:
            return [refusal] * len(lengths)
        return generate(llm, x, lengths, never_first=never_first, **options)

    monkeypatch.setattr(sample, "generate", refuse)
    question = asked.examples[2:3], asked.recordings[2:3]
    (answer,) = answers_to(asked, *question, weigh=True)
    assert answer.text == REFUSALS["en"] and answer.other[0] not in "N无"
    (answered,) = answers_to(asked, *question, refuse_above=1e9)
    assert answered == answer._replace(text=answer.other)
    assert answers_to(asked, *question, refuse_above=-1e9) == [answer]


# ------------------------------------------------------------------------------
# The command


def spoken(asked, path, instruction, task, **options):
    """The text that the command has to give."""
    recordings = encode_waves(asked.model, [load_audio(path)], 1.0)
    example = {"instruction": instruction, "task": task, "target_language": None}
    return answer_examples(asked.model, asked.tokenizer, [example], recordings, **options)[0].text


def test_the_command(asked, capsys):
    one, two = asked.folder / "train0.wav", asked.folder / "train1.wav"
    ckpt = ["--ckpt", asked.ckpt]
    texts = [spoken(asked, path, SAY, "asr") for path in (one, two)]
    assert run(sample, capsys, one, SAY, *ckpt) == (texts[0] + "\n", "")
    out, _ = run(sample, capsys, one, two, SAY, *ckpt)
    assert out == f"{one}: {texts[0]}\n{two}: {texts[1]}\n"
    out, _ = run(sample, capsys, one, two, SAY, "--json", *ckpt)
    for line, path, text in zip(out.splitlines(), (one, two), texts, strict=True):
        seconds = len(load_audio(path)) / 16000
        line, expected = json.loads(line), {"audio": str(path), "text": text, "seconds": seconds}
        assert line == expected | {"instruction": SAY, "task": "asr"}
    beams = spoken(asked, one, SAY, "asr", num_beams=3)
    assert run(sample, capsys, one, SAY, "--beams", "3", *ckpt)[0] == beams + "\n"
    assert beams != texts[0]
    drawn = []
    for seed in (1, 1, 2, 3):
        hot = ["--temperature", "2", "--top-p", "0.99", "--seed", seed]
        drawn.append(run(sample, capsys, one, SAY, *hot, *ckpt)[0])
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert run(sample, capsys, one, SAY, "--int8", *ckpt)[0].strip()


def test_a_long_recording_window_by_window_or_at_once(asked, capsys):
    path, texts = asked.folder / "long.wav", {}
    for task, flags in ((None, []), ("sqa", ["--whole"])):
        argv = [path, "Hum it", "--json", "--ckpt", asked.ckpt, *flags]
        line = json.loads(run(sample, capsys, *argv)[0])
        assert line["task"] == task and line["text"] == spoken(asked, path, "Hum it", task)
        texts[task] = line["text"]
    assert texts[None] != texts["sqa"]


def test_instructions_that_are_typed(asked, capsys, monkeypatch):
    path, calls = asked.folder / "train0.wav", []
    typed = [SAY, ASK]

    def encode_once(*args):
        calls.append(args)
        return encode_waves(*args)

    monkeypatch.setattr(sample, "encode_waves", encode_once)
    texts = [spoken(asked, path, typed[0], "asr"), spoken(asked, path, typed[1], "sqa")]
    for end in ("", "\n", " \n" + SAY):
        calls.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n" + end))
        assert run(sample, capsys, path, "--ckpt", asked.ckpt) == ("\n".join([*texts, ""]), "")
        assert len(calls) == 1


def test_what_a_terminal_would_obey_is_escaped(asked, capsys, monkeypatch):
    text, path = "a\x1b[31m\u2028b\x9b1m\tc\nd", asked.folder / "b\x1b[2K.wav"
    soundfile.write(path, load_audio(asked.folder / "train0.wav").numpy(), 16000)

    def answer_hostile(*args, on_text=None, **options):
        if on_text:
            on_text(text)
        return [Answer(text)]

    monkeypatch.setattr(sample, "answer_examples", answer_hostile)
    ckpt = ["--ckpt", asked.ckpt]
    out, _ = run(sample, capsys, path, asked.folder / "train0.wav", SAY, *ckpt)
    assert out.startswith(f"{asked.folder}/b\\u001b[2K.wav: a\\u001b[31m\\u2028b\\u009b1m\tc\nd\n")
    out, _ = run(sample, capsys, path, SAY, "--json", *ckpt)
    assert json.loads(out)["text"] == text and json.loads(out)["audio"] == str(path)
    assert len(out.splitlines()) == 1


def test_recordings_that_cannot_be_answered(asked, capsys, tmp_path):
    """They are named; the others are answered, each on a line of its own."""
    short, long = asked.folder / "train0.wav", tmp_path / "long.wav"
    soundfile.write(long, torch.randn(16000 * 60).numpy() / 9, 16000)
    argv = [long, short, ASK, "--ckpt", asked.ckpt]
    text = spoken(asked, short, ASK, "sqa")
    out, err = run(sample, capsys, *argv, code=1)
    assert err.startswith(f"sample.py: {long}: 61 s of audio and the instruction take")
    assert err.count("\n") == 1 and f"{short}: {text}" in out.splitlines()
    out, _ = run(sample, capsys, *argv, "--json", code=1)
    assert json.loads(out)["text"] == text


def test_remarks(asked, capsys, tmp_path, monkeypatch):
    wav = asked.folder / "train0.wav"
    align = ["--ckpt", write_checkpoint(asked.folder, tmp_path / "a.pt", config={"phase": "align"})]
    remark = "sample.py: this checkpoint was trained on transcribing only (phase align); trying\n"
    assert run(sample, capsys, wav, "Translate to German", *align)[1] == remark
    assert run(sample, capsys, wav, SAY, *align)[1] == ""
    refusing = write_checkpoint(asked.folder, tmp_path / "r.pt", refuse_above=-1e9)
    out, err = run(sample, capsys, wav, ASK, "--ckpt", refusing)
    assert out.strip() in REFUSALS.values() and not err

    def answer_too_long(*args, **options):
        return [Answer("", cut=True)]

    monkeypatch.setattr(sample, "answer_examples", answer_too_long)
    message = "the answer is longer than 512 tokens a window; the rest is missing\n"
    assert run(sample, capsys, wav, SAY, *align)[1] == f"sample.py: {message}"


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (
            "train0.wav SAY",
            1,
            "no out/align.pt or out/ift.pt; run python train.py .*, or give --ck",
        ),
        ("train0.wav SAY --ckpt none.pt", 1, "none.pt: No such file"),
        ("train0.wav SAY --ckpt all.jsonl", 1, "all.jsonl: .*; give an align.pt or ift.pt"),
        ("none.wav SAY --ckpt ift.pt", 1, "none.wav: no such file; correct the path"),
        ("train0.wav none.FLAC --ckpt ift.pt", 1, "none.FLAC: no such file"),
        ("train0.wav all.jsonl --ckpt ift.pt", 1, "all.jsonl: found content that starts with"),
        ("train0.wav EMPTY", 2, "the instruction is empty; say what to do"),
        ("train0.wav SAY --beams 0", 2, "num_beams 0 must be at least 1"),
        ("train0.wav SAY --temperature -1", 2, "temperature -1.0 at least 0"),
        ("train0.wav SAY --top-p 0", 2, "top_p 0.0 above 0"),
        ("train0.wav SAY --beams 2 --temperature 1", 2, "beam search neither samples nor streams"),
        ("train0.wav --beam-size 2", 2, "unrecognized arguments: --beam-size"),
        ("--ckpt ift.pt", 2, "arguments are required: audio"),
    ],
)
def test_what_the_command_refuses(asked, capsys, monkeypatch, argv, code, message):
    monkeypatch.chdir(asked.folder)
    words = [{"SAY": SAY, "EMPTY": " "}.get(word, word) for word in argv.split()]
    out, err = run(sample, capsys, *words, code=code)
    assert re.search(message, err) and not out
    assert code == 2 or err.startswith("sample.py: ")


def test_any_text_may_be_an_instruction(asked, capsys):
    for text in ("很" * 100, "a\x00b", "-", "{question} {to}", "a.wav b"):
        argv = [asked.folder / "train0.wav", text, "--ckpt", asked.ckpt, "--json"]
        assert json.loads(run(sample, capsys, *argv)[0])["instruction"] == text


def test_the_newest_checkpoint_is_taken(asked, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for i, name in enumerate(("align.pt", "ift.pt", "align.pt")):
        write_checkpoint(asked.folder, tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name, (i, i))
        assert sample.newest_checkpoint().name == name
    assert run(sample, capsys, asked.folder / "train0.wav", SAY)[0].strip()


def test_without_extras(asked, monkeypatch):
    for name in ("cpu", "decode", "int8"):
        monkeypatch.setitem(sys.modules, f"extras.{name}", None)
    assert sample.fast_step() is sample.decode_step
    with pytest.raises(UserError, match="--int8 needs extras/int8.py"):
        sample.load_model(asked.ckpt, int8=True)
    model, tokenizer, _ = sample.load_model(asked.ckpt)
    answers = answer_examples(model, tokenizer, asked.examples[:3], asked.recordings[:3], **SHORT)
    assert answers == answers_to(asked, asked.examples[:3], asked.recordings[:3])
