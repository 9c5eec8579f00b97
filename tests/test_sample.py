"""sample.py on a model of random weights: recordings of any length, a batch against its examples,
streaming, refusals by hand, and the command."""

import io
import json
import math
import os
import re
import signal
import string
import subprocess
import sys
import time
import unicodedata
from types import SimpleNamespace

import pytest
import soundfile
import torch

import data
import model
import sample
from conftest import ESCAPES, ROOT, make_project, randomise, refused, save_base, tiny_llm
from data import (
    REFUSALS,
    Examples,
    Manifest,
    cut_windows,
    fbank,
    join_texts,
    load_audio,
    make_prompt,
)
from model import SpeechLM, fingerprint, load_tokenizer
from sample import Answer, answer_examples, encode_waves, generate

SHORT = {"max_new_tokens": 9}
SAY = "Transcribe the speech."
ASK = "Who is that?"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def make_folder(folder):
    """A project with a checkpoint of random weights, whose answers are of letters and end early,
    and a manifest of a transcript, a translation and a question about each of 8 recordings."""
    make_project(folder)
    tokens = load_tokenizer(folder / "llm").get_vocab()
    capitals = [token for text, token in tokens.items() if text in string.ascii_uppercase]
    llm = tiny_llm("qwen2 untied", vocab_size=len(tokens), eos_token_id=[0, *capitals])
    for text, token in tokens.items():
        if not re.fullmatch("Ġ?[A-Za-z]+", text):
            llm.lm_head.weight.data[token] = 0
    save_base(llm, folder / "llm")
    write_checkpoint(folder, folder / "ift.pt")
    lines = []
    for i, example in enumerate(Manifest(folder / "train.jsonl").select(range(8))):
        example |= {"audio": str(folder / example["audio"]), "corpus": "ab"[i % 2]}
        german = {"task": "st", "target_language": "de", "text": f"Sie sagt {example['text']}."}
        text = REFUSALS["en"] if i % 3 == 0 else example["text"]
        question = {"task": "sqa", "question": ASK, "text": text}
        lines += [json.dumps(example | change) for change in ({}, german, question)]
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_checkpoint(folder, path, **more):
    adapter = randomise(SpeechLM.from_parts(folder / "encoder", folder / "llm").adapter)
    state = {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()}
    bases = {name: fingerprint(folder / name) for name in ("encoder", "llm")}
    checkpoint = dict(model=state, adapter={}, bases=bases, config={"phase": "ift"}, data=[])
    torch.save(checkpoint | dict(window=1.0, step=5) | more, path)
    return path


def run(program, capsys, *argv, code=0):
    """What a command that ends with this exit code prints, and its errors."""
    stopped, message = 0, ""
    try:
        program.main([str(word) for word in argv])
    except SystemExit as stop:
        message = stop.code if isinstance(stop.code, str) else ""
        stopped = 1 if message else stop.code
    out, err = capsys.readouterr()
    assert stopped == code, (stopped, message, out, err)
    printed = re.sub("\r|\x1b\\[A", "", out + err + message)  # but for progress bars
    assert not ESCAPES.search(printed) and "\n" not in message
    return out, err + message


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The folder, its model, its examples with their recordings, and a long recording."""
    folder = make_folder(tmp_path_factory.mktemp("asked"))
    asked = SimpleNamespace(folder=folder, wav=folder / "train0.wav")
    asked.ckpt = ["--ckpt", folder / "ift.pt"]
    asked.model, asked.tokenizer, asked.checkpoint = sample.load_model(folder / "ift.pt")
    asked.examples = list(Manifest(folder / "all.jsonl"))
    waves = [load_audio(example["audio"]) for example in asked.examples]
    recordings = encode_waves(asked.model, waves[::3], math.inf)
    asked.recordings = [recordings[i // 3] for i in range(len(waves))]
    soundfile.write(folder / "long.wav", torch.cat(waves[::3]).numpy(), 16000)
    (asked.long,) = encode_waves(asked.model, [load_audio(folder / "long.wav")], 1.0)
    return asked


def answers_to(asked, examples, recordings, **options):
    options = SHORT | options
    return answer_examples(asked.model, asked.tokenizer, examples, recordings, **options)


def sequence_of(asked, example):
    """An example as training takes it: the ids before the answer, and frames."""
    manifest = Manifest(asked.folder / "all.jsonl")
    examples = Examples(
        [manifest], asked.tokenizer, make_prompt(asked.tokenizer, [0]), asked.model.adapter.config
    )
    ids, size, frames = examples.sequence(example, examples.frames(0, example))
    return ids[:-size], frames


@torch.no_grad()
def ids_of_one(asked, example):
    """The ids that answer an example, without a batch, windows or a prefix."""
    ids, frames = sequence_of(asked, example)
    audio, _ = asked.model.encode(frames, [len(frames)])
    x = asked.model.embed(torch.tensor(ids), audio)
    return generate(asked.model.llm, x, [len(x)], **SHORT)[0]


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
    loaded = asked.model, asked.tokenizer, asked.checkpoint
    for i, instruction in enumerate((SAY, "translate to german", ASK)):
        wording = instruction.replace("translate to german", "Translate to German.")
        example = asked.examples[i] | {"instruction": wording}
        task, answer = sample.ask(*loaded, asked.recordings[i], instruction, **SHORT)
        assert [answer] == answers_to(asked, [example], [asked.recordings[i]])
        assert task == example["task"]


@torch.no_grad()
def test_a_window_is_encoded_as_if_alone(asked, monkeypatch):
    monkeypatch.setattr(sample, "BATCH_FRAMES", 60)
    waves = [torch.randn(n) for n in (43000, 4800, 16000, 600)]
    for wave, recording in zip(waves, encode_waves(asked.model, waves, 1.0), strict=True):
        for window, audio in zip(cut_windows(wave, 1.0), recording, strict=True):
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
    examples = [transcript, other, question, question | {"instruction": ASK}]
    answers = answers_to(asked, examples, [asked.long] * 4, batch_size=99)
    windows = [len(window) for window in asked.long]
    assert len(windows) > 4 and sorted(sizes) == sorted([*windows, sum(windows)])
    for example, answer in zip(examples[:2], answers[:2], strict=True):
        parts = [answers_to(asked, [example], [[window]])[0] for window in asked.long]
        assert answer.text == join_texts(part.text for part in parts)
        assert answer.cut == any(part.cut for part in parts)
    assert answers[2:] == answers_to(asked, examples[2:], [[torch.cat(asked.long)]] * 2)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_that_would_not_end(asked, monkeypatch, beams):
    always_x = torch.eye(asked.tokenizer.get_vocab_size())[[asked.tokenizer.token_to_id("x")]]
    monkeypatch.setattr(asked.model.llm, "logits", lambda hidden: always_x.repeat(len(hidden), 1))
    example, recording = asked.examples[0], asked.recordings[0]
    options = {"num_beams": beams, "max_new_tokens": 60}
    assert answers_to(asked, [example], [recording], **options) == [Answer("x")]

    # An answer has what room its own recording leaves in the context.
    instruction = len(sequence_of(asked, example)[0]) - len(recording[0])
    full = [recording[0][:1].repeat(512 - 40 - instruction, 1)]
    options |= {"stop_loops": False}
    answers = answers_to(asked, [example] * 2, [full, recording], **options)
    assert answers == [Answer("x" * 40, cut=True), Answer("x" * 60, cut=True)]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("options", [{}, {"weigh": True}, {"num_beams": 2}])
def test_streamed_pieces_are_the_first_answer(asked, size, options):
    for example in asked.examples[:3]:
        pieces, inputs = [], ([example, asked.examples[3]], [asked.long, asked.recordings[3]])
        streaming = {"on_text": pieces.append, "batch_size": size, **options}
        answers = answers_to(asked, *inputs, **streaming)
        assert "".join(pieces) == answers[0].text
        silent = answers_to(asked, *inputs, **options)
        assert [answer.text for answer in answers] == [answer.text for answer in silent]
        question = example["task"] == "sqa"
        batches = math.ceil((2 if question else len(asked.long) + 1) / size)
        at_once = "num_beams" in options or (question and "weigh" in options)
        assert len(pieces) == batches if at_once else len(pieces) > batches + 2


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
    question, frames = sequence_of(asked, example)
    sequence = torch.tensor([*question, *ids, 0])
    targets = torch.arange(len(question), len(sequence))
    loss, _ = asked.model(frames, [len(frames)], sequence, [len(sequence)], targets)
    return -loss.item()


def test_margins_by_hand(asked):
    example = asked.examples[2] | {"instruction": ASK}
    ids = ids_of_one(asked, example)
    text, cut = asked.tokenizer.decode(ids).strip(), len(ids) == 9
    scores = {}
    for refusal in REFUSALS.values():
        scores[refusal] = log_p(asked, example, asked.tokenizer.encode(refusal).ids)

    def weigh(language, **options):
        question = example | {"target_language": language}
        return answers_to(asked, [question], [asked.recordings[2]], **options)[0]

    # Against the refusal in the language of the question, or the likeliest if that is not known.
    assert weigh("en") == Answer(text, cut=cut)
    for language, refusal in (("it", REFUSALS["it"]), (None, max(scores, key=scores.get))):
        margin = scores[refusal] - log_p(asked, example, ids)
        answer = weigh(language, weigh=True)
        assert answer == Answer(text, answer.margin, text, cut)
        assert answer.margin == pytest.approx(margin, abs=1e-3)
        assert weigh(language, refuse_above=answer.margin + 1e-6) == answer
        refused = answer._replace(text=refusal)
        assert weigh(language, refuse_above=answer.margin - 1e-6) == refused
    example |= {"task": "asr"}
    assert weigh("en", refuse_above=-1e9) == Answer(text, cut=cut)


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
    answered = answer._replace(text=answer.other)
    assert answers_to(asked, *question, refuse_above=1e9) == [answered]
    assert answers_to(asked, *question, refuse_above=-1e9) == [answer]


# ------------------------------------------------------------------------------
# Instructions in any spelling


SPELLINGS = {
    "as trained": lambda text: text,
    "lower case": str.lower,
    "upper case": str.upper,
    "no last mark": lambda text: text.rstrip(".。?？"),
    "blanks": lambda text: f"  {text}\n".replace(" ", "  "),
    "a phone's apostrophe": lambda text: text.replace("'", "’"),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "politely": lambda text: f"please {text.lower()}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_known_wording_in_another_spelling(spelling):
    """Training has one spelling of each, and that is asked. A question stays as it was typed."""
    question = "Who is  Anna’s Friend?"
    for task, wording in data.known_wordings()[0].values():
        if wording == "{question}":  # which anything would match
            continue
        typed = SPELLINGS[spelling](wording.replace("{question}", "@")).replace("@", question)
        expected = wording.replace("{question}", question)
        assert data.recognise(typed) == (task, expected), typed


def test_other_instructions_stay_as_they_are():
    for text in ("hum  IT", '"Who IS it?" ', "Translate to Klingon", "transcribe it backwards", ""):
        assert data.recognise(text)[1] == text.strip()
    assert data.recognise("\udcdc it") == (None, "\ufffd it")  # bytes that are no text


def test_the_spelling_of_training_is_asked(asked, capsys):
    out, _ = run(sample, capsys, asked.wav, "TRANSCRIBE  the speech", "--json", *asked.ckpt)
    line = json.loads(out)
    assert line["text"] == answer_by_hand(asked, asked.wav, SAY, "asr")
    assert line["instruction"] == "TRANSCRIBE  the speech" and line["task"] == "asr"


# ------------------------------------------------------------------------------
# Base models


def test_base_models_that_moved(asked, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "old"
    folder.mkdir()
    make_folder(folder)
    ckpt, moved = folder / "ift.pt", tmp_path / "new"
    before = run(sample, capsys, folder / "train0.wav", SAY, "--ckpt", ckpt)
    folder.rename(moved)
    ckpt = moved / "ift.pt"
    argv = [moved / "train0.wav", SAY, "--ckpt", ckpt]
    message = f"{folder}/llm: no such directory; .* by --encoder or --llm"
    assert re.search(message, run(sample, capsys, *argv, code=1)[1])
    options = ["--encoder", moved / "encoder", "--llm", moved / "llm"]
    assert run(sample, capsys, *argv, *options) == before

    # Those beside the program are taken, if they are the same ones, also for a relative path or a
    # directory that is empty now.
    monkeypatch.setattr(model, "DEMO", moved)
    assert run(sample, capsys, *argv) == before
    (folder / "llm").mkdir(parents=True)
    assert run(sample, capsys, *argv) == before
    bases = {name: fingerprint(moved / name) | {"path": f"a/{name}"} for name in ("encoder", "llm")}
    write_checkpoint(moved, ckpt, bases=bases)
    sample.load_model(ckpt)
    bases["llm"] |= {"sha256": "0", "path": str(moved / "llm")}
    write_checkpoint(moved, ckpt, bases=bases)
    refused("was trained on the llm .* give the same --llm", sample.load_model, ckpt)


def test_devices(monkeypatch, tmp_path):
    """Those of Apple get the plain operators and float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for available, device in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda here=available: here)
        assert model.pick_device() == device
    (tmp_path / "config.json").write_text('{"hidden_size": 4096}')
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert model.fast_dtype(tmp_path, "mps") == torch.float32
    assert model.fast_dtype(tmp_path, "cuda") == torch.bfloat16
    assert model.default_kernels("mps") == model.Kernels()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model.pick_device() == "cuda"


# ------------------------------------------------------------------------------
# Output that cannot be written


def replace_stream(monkeypatch, name, descriptor, encoding):
    stream = open(descriptor, "w", encoding=encoding, closefd=False)
    monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, f"__{name}__", stream)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(monkeypatch, encoding):
    reading, writing = os.pipe()
    replace_stream(monkeypatch, "stdout", writing, encoding)
    for _ in range(2):
        model.steady_output()
    text = "Schläft 花 \ud800"
    print(text)
    assert os.read(reading, 99) == f"{text}\n".encode(encoding, "backslashreplace")
    assert sys.stdout.fileno() == writing and not sys.stdout.isatty()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_nobody_takes_is_dropped(monkeypatch, name):
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor in (writing, os.open("/dev/full", os.O_WRONLY)):
        replace_stream(monkeypatch, name, descriptor, "utf-8")
        model.steady_output()
        for _ in range(9999):
            print("a long line", file=getattr(sys, name), flush=True)
    monkeypatch.setattr(sys, name, None)
    model.steady_output()
    print("\ud800", file=getattr(sys, name), flush=True)


def test_other_streams_are_left_alone(monkeypatch, capsys):
    for stream in (sys.stdout, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        model.steady_output()
        assert sys.stdout is stream


def test_a_pipe_that_is_closed_early(asked):
    """No error, no exit code 120, nothing on standard error, which is empty anyway."""
    command = [sys.executable, ROOT / "sample.py", *[asked.wav] * 3, SAY, *asked.ckpt]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 0


@pytest.mark.parametrize("name", ["sample", "eval", "train"])
def test_ctrl_c_while_a_program_is_loaded(name):
    command = [sys.executable, ROOT / f"{name}.py", "--help"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(0.3)
    program.send_signal(signal.SIGINT)
    assert program.communicate() == (b"", b"") and program.wait() == -signal.SIGINT


# ------------------------------------------------------------------------------
# The command


def test_file_names_and_instructions():
    names = ["a.webm", "My Rec 1.wav", "My Talk.MP3", "path/to/file", "a.wave", "~/x", "../x y"]
    names += ["/no where/a", "https://a.org/b?c=1", "*.wav", "a.tar/b c.flac", "C:\\a", "会议.m4a"]
    instructions = ["Translate to German.", "What is 3.5 + 2?", "Transcribe.", "and/or?", "3.5"]
    instructions += [
        "Say it in German/Italian",
        "Is it 24/7?",
        "Who likes Node.js?",
        "译成英语/德语",
    ]
    for word in names:
        assert sample.parse([__file__, word]).audio == [__file__, word]
    for word in instructions:
        assert sample.parse([__file__, "--beams", "3", word]).instruction == word
        assert sample.parse(["a.wav", "b/c", word, "--json"]).instruction == word


def test_options_between(asked, capsys):
    argv = [asked.wav, "--json", asked.folder / "train1.wav", *asked.ckpt, SAY, "--whole"]
    assert run(sample, capsys, *argv)[0].count(SAY) == 2


def test_without_docstrings(monkeypatch):
    """As python -OO leaves them."""
    monkeypatch.setattr(sample, "__doc__", None)
    assert sample.parse(["a.wav", SAY]).instruction == SAY


def test_temperatures_near_zero():
    logits = torch.tensor([[1.0, 3e4, 2.0]])
    for temperature in (0.0, 1e-320, 1e-40, 1e-5):
        assert sample.draw_token(logits, temperature, 1.0).tolist() == [1]


def answer_by_hand(asked, path, instruction, task, **options):
    """The text that the command has to give."""
    recordings = encode_waves(asked.model, [load_audio(path)], 1.0)
    example = {"instruction": instruction, "task": task, "target_language": None}
    return answer_examples(asked.model, asked.tokenizer, [example], recordings, **options)[0].text


def test_the_command(asked, capsys):
    paths = [asked.wav, asked.folder / "train1.wav"]
    texts = [answer_by_hand(asked, path, SAY, "asr") for path in paths]
    assert run(sample, capsys, asked.wav, SAY, *asked.ckpt) == (texts[0] + "\n", "")
    out, _ = run(sample, capsys, *paths, SAY, *asked.ckpt)
    assert out == "".join(f"{path}: {text}\n" for path, text in zip(paths, texts, strict=True))
    out, _ = run(sample, capsys, *paths, SAY, "--json", *asked.ckpt)
    for line, path, text in zip(out.splitlines(), paths, texts, strict=True):
        expected = {"audio": str(path), "instruction": SAY, "task": "asr", "text": text}
        assert json.loads(line) == expected | {"seconds": len(load_audio(path)) / 16000}
    beams = answer_by_hand(asked, asked.wav, SAY, "asr", num_beams=3)
    assert run(sample, capsys, asked.wav, SAY, "--beams", "3", *asked.ckpt)[0] == beams + "\n"
    drawn = []
    for seed in (1, 1, 2, 3):
        options = ["--temperature", "2", "--top-p", "0.99", "--seed", seed]
        drawn.append(run(sample, capsys, asked.wav, SAY, *options, *asked.ckpt)[0])
    assert drawn[0] == drawn[1] and len({*drawn, beams, texts[0]}) == 5
    assert run(sample, capsys, asked.wav, SAY, "--int8", *asked.ckpt)[0].strip()


def test_a_long_recording_window_by_window_or_at_once(asked, capsys):
    path, texts = asked.folder / "long.wav", set()
    for task, flags in ((None, []), ("sqa", ["--whole"])):
        out, _ = run(sample, capsys, path, "Hum it", "--json", *flags, *asked.ckpt)
        line = json.loads(out)
        assert line["task"] == task
        assert line["text"] == answer_by_hand(asked, path, "Hum it", task)
        texts.add(line["text"])
    assert len(texts) == 2


def test_instructions_that_are_typed(asked, capsys, monkeypatch):
    calls = []

    def encode_once(*args):
        calls.append(args)
        return encode_waves(*args)

    texts = [answer_by_hand(asked, asked.wav, *pair) for pair in ((SAY, "asr"), (ASK, "sqa"))]
    monkeypatch.setattr(sample, "encode_waves", encode_once)
    monkeypatch.setattr(sys, "stdin", None)  # closed
    _, err = run(sample, capsys, asked.wav, *asked.ckpt, code=1)
    assert err.startswith("sample.py: no instruction")
    for end in ("", "\n", f" \n{SAY}"):
        calls.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SAY}\n{ASK}\n{end}"))
        out, err = run(sample, capsys, asked.wav, *asked.ckpt)
        assert out.splitlines() == texts and not err and len(calls) == 1


def test_any_text_may_be_asked_and_answered(asked, capsys, monkeypatch):
    for text in ("很" * 100, "a\x00b", "-", "{question} {to}", "a.wav b"):
        out, _ = run(sample, capsys, asked.wav, text, "--json", *asked.ckpt)
        assert json.loads(out)["instruction"] == text
    text, path = "a\x1b[31m\u2028b\x9b1m\tc\nd", asked.folder / "b\x1b[2K.wav"
    soundfile.write(path, load_audio(asked.wav).numpy(), 16000)

    def answer_hostile(*args, on_text, **options):
        (on_text or str)(text)
        return [Answer(text)]

    monkeypatch.setattr(sample, "answer_examples", answer_hostile)
    out, _ = run(sample, capsys, path, asked.wav, SAY, *asked.ckpt)
    assert out.startswith(f"{asked.folder}/b\\u001b[2K.wav: a\\u001b[31m\\u2028b\\u009b1m\tc\nd\n")
    out, _ = run(sample, capsys, path, SAY, "--json", *asked.ckpt)
    line = json.loads(out)
    assert (line["text"], line["audio"]) == (text, str(path)) and out.count("\n") == 1


def test_recordings_that_cannot_be_answered(asked, capsys, tmp_path):
    """They are named; the others are answered, each on a line of its own."""
    long = tmp_path / "long.wav"
    soundfile.write(long, torch.randn(16000 * 45).numpy() / 9, 16000)
    argv = [long, asked.wav, ASK, *asked.ckpt]
    text = answer_by_hand(asked, asked.wav, ASK, "sqa")
    out, err = run(sample, capsys, *argv, "--json", code=1)
    assert json.loads(out)["text"] == text
    assert re.match(f"sample.py: {long}: 4. s of audio and the instruction take .* part\n$", err)
    out, _ = run(sample, capsys, *argv, code=1)
    assert out.splitlines()[-1] == f"{asked.wav}: {text}"


def test_remarks(asked, capsys, tmp_path, monkeypatch):
    ckpt = write_checkpoint(asked.folder, tmp_path / "a.pt", config={"phase": "align"})
    argv = [asked.wav, "Translate to German", "--ckpt", ckpt]
    remark = "this checkpoint was trained on transcribing only (phase align); trying"
    assert run(sample, capsys, *argv)[1] == f"sample.py: {remark}\n"
    assert run(sample, capsys, asked.wav, SAY, *argv[2:])[1] == ""
    write_checkpoint(asked.folder, ckpt, refuse_above=-1e9)
    out, err = run(sample, capsys, asked.wav, ASK, *argv[2:])
    assert out.strip() in REFUSALS.values() and not err
    out, _ = run(sample, capsys, asked.wav, "Hum it", "--whole", *argv[2:])
    assert out.strip() not in REFUSALS.values()
    monkeypatch.setattr(sample, "answer_examples", lambda *args, **options: [Answer("", cut=True)])
    remark = "the answer is longer than 512 tokens a window; the rest is missing"
    remarks = f"sample.py: {remark}\nsample.py: {asked.wav}: no speech\n"
    assert run(sample, capsys, *argv) == ("", remarks)


def test_where_nobody_speaks(asked, capsys, monkeypatch):
    monkeypatch.setattr(sample, "answer_examples", lambda *args, **options: [Answer("")])
    paths = [asked.wav, asked.folder / "train1.wav"]
    remarks = [f"sample.py: {path}: no speech\n" for path in paths]
    for text in (SAY, "Translate to German", "Hum it"):
        assert run(sample, capsys, asked.wav, text, *asked.ckpt) == ("", remarks[0])
    out, err = run(sample, capsys, *paths, SAY, *asked.ckpt)
    assert out == f"{paths[0]}: \n{paths[1]}: \n" and err == "".join(remarks)
    out, err = run(sample, capsys, asked.wav, SAY, "--json", *asked.ckpt)
    assert json.loads(out)["text"] == "" and err == remarks[0]
    # An empty answer to a question says nothing about the recording.
    assert run(sample, capsys, asked.wav, ASK, *asked.ckpt) == ("\n", "")


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
        ("train0.wav meeting.webm --ckpt ift.pt", 1, "meeting.webm: no such file"),
        ("train0.wav ~/x/y", 1, "~/x/y: no such file"),
        ("SAY", 2, '"Transcribe the speech." is no file; give the instruction behind recordings'),
        ("SAY train0.wav", 2, '"Transcribe the speech." is no file'),
        ("train0.wav SAY --temperature nan", 2, "temperature nan at least 0 and finite"),
        ("train0.wav SAY --ckpt ift.pt --llm none", 1, "none: no such directory; .* --llm"),
        ("train0.wav EMPTY", 2, '" " is no file; give the instruction'),
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


def test_the_newest_checkpoint_is_taken(asked, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for i, name in enumerate(("align.pt", "ift.pt", "align.pt")):
        path = write_checkpoint(asked.folder, tmp_path / "out" / name)
        os.utime(path, (i, i))
        assert sample.newest_checkpoint().name == name
    assert run(sample, capsys, asked.wav, SAY) == run(sample, capsys, asked.wav, SAY, *asked.ckpt)
