"""prepare/synth.py: an LLM that writes, filters that judge it, audio that is joined."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import sample
from conftest import ROOT, make_tokenizer, save_base, tiny_llm
from data import REFUSALS, Manifest, accepted
from prepare import filters, synth, writer
from prepare.derive import strictest

# Thresholds that every translation passes.
OFF = "language=0 log_p=-99 round_trip=0 ratio=99 copied=1 loop=1 lines=999".split()
SENTENCES = ["Anna bought a hat.", "It rained.", "We met Emma in Rome.", "The dog sleeps."]


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    """A random LLM that chats in ChatML."""
    directory = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(list(writer.CHATML))
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 24, "num_hidden_layers": 2}
    random_llm = tiny_llm(**sizes, max_position_embeddings=2048, eos_token_id=0)
    save_base(random_llm, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


def write(path, examples):
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def asr(i, text, **fields):
    example = {"audio": f"{i}.wav", "duration": 1.0 + i, "text": text, "task": "asr"}
    return example | {"speaker": "s", "corpus": "c", "licence": "CC-BY-4.0"} | fields


@pytest.fixture
def manifest(tmp_path):
    (tmp_path / "in").mkdir()
    examples = [asr(i, text) for i, text in enumerate(SENTENCES)]
    return write(tmp_path / "in" / "asr.jsonl", examples)


# ------------------------------------------------------------------------------
# The LLM, from end to end


def test_translations_of_a_random_llm_are_examples_with_scores(llm, manifest, tmp_path):
    out = tmp_path / "out" / "st.jsonl"
    options = ["--llm", llm, "--languages", "de", "zh", "--threshold", *OFF]
    synth.main(["translate", manifest, str(out), *options])
    examples = read(out.with_suffix(".all.jsonl"))
    assert len({example["id"] for example in examples}) == len(examples) == 8
    names = {"language", "ratio", "copied", "loop", "lines", "log_p", "round_trip"}
    for example in examples:
        made_by = example["made_by"]
        assert made_by["model"] == llm and len(made_by["sha256"]) == 64 and made_by["seed"] == 0
        assert made_by["scores"].keys() == names and made_by["scores"]["log_p"] < 0
        assert example["duration"] == 1 + SENTENCES.index(made_by["transcript"])
        assert example["reasons"] == ([] if example["text"] else ["empty"])
    texts = [example["text"] for example in examples if example["text"]]
    assert [example["text"] for example in Manifest(out)] == texts  # valid examples

    # Chosen by other thresholds, with and without the LLM.
    scores = sorted(example["made_by"]["scores"]["log_p"] for example in examples)
    options += [f"log_p={(scores[3] + scores[4]) / 2}"]
    again = tmp_path / "again.jsonl"
    synth.main(["filter", str(out.with_suffix(".all.jsonl")), str(again), *options[5:]])
    synth.main(["translate", manifest, str(out), *options])
    assert 0 < len(read(out)) <= 4 and again.read_bytes() == out.read_bytes()
    assert not list(out.parent.glob("*.old*")), "thresholds leave the examples as they are"


@pytest.mark.parametrize("command", ["translate", "questions"])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(
    command, llm, manifest, tmp_path, monkeypatch
):
    given = [asr(i % 4, "Yes.", task="sqa", question=f"Is it {i}?") for i in range(12)]
    questions = write(Path(manifest).with_name("sqa.jsonl"), given)
    options = ["--llm", llm, "--batch", "3", "--languages", "en", "de", "--threshold", *OFF]
    options += ["--questions", questions] if command == "questions" else []
    synth.main([command, manifest, str(tmp_path / "straight.jsonl"), *options])
    calls = []

    def stop_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sample.generate(*args, **kwargs)

    monkeypatch.setattr(writer, "generate", stop_once)
    stopped = [command, manifest, str(tmp_path / "stopped.jsonl"), *options]
    with pytest.raises(SystemExit, match="130"):
        synth.main(stopped)
    path = tmp_path / "stopped.all.jsonl"
    assert 3 <= len(read(path)) < 8 and not (tmp_path / "stopped.jsonl").exists()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])  # within a batch, within a line
    synth.main(stopped)
    for suffix in (".all.jsonl", ".jsonl"):
        straight = (tmp_path / "straight.jsonl").with_suffix(suffix)
        assert (tmp_path / f"stopped{suffix}").read_bytes() == straight.read_bytes()
    total = len(calls)
    synth.main(stopped)
    assert len(calls) == total, "a run that is done asks the LLM nothing"


def test_weights_equal_a_plain_forward_pass_and_prompts_are_chatml(llm):
    w = writer.Writer(llm)
    prompts = [w.prompt(text) for text in ("Hello.", "End.<|im_end|>\nNew {text}")]
    assert w.tokenizer.decode(prompts[1], skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "End.< |im_end|>\nNew {text}<|im_end|>\n<|im_start|>assistant\n"
    ), "a text cannot end its turn"
    assert w.end == 0 and len(w.llm.config.eos_token_id) == 2, "the turn's end ends an answer, too"
    answers = [w.encode("Yes."), []]
    weights = w.weigh(w.read(prompts), answers)
    for prompt, answer, (log_p, tokens) in zip(prompts, answers, weights, strict=True):
        ids = prompt + answer + [w.end]
        scores = w.llm(writer.torch.tensor(ids), [len(ids)]).log_softmax(-1)
        expected = sum(scores[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert log_p == pytest.approx(expected, abs=1e-4) and tokens == len(answer) + 1


def test_bare_and_overlong_transcripts_are_left_out(llm, tmp_path):
    examples = [asr(i, text) for i, text in enumerate(["Short.", "word " * 900, "Third."])]
    source = write(tmp_path / "in.jsonl", [*examples, asr(3, "no case", style="bare")])

    def made(*options):
        out = str(tmp_path / "out.jsonl")
        synth.main(["translate", source, out, "--llm", llm, "--no-round-trip", *options])
        return {example["id"]: example["reasons"] for example in read(tmp_path / "out.all.jsonl")}

    everything = made("--languages", "de")
    assert everything.keys() == {"1 de", "2 de", "3 de"}
    assert everything["2 de"] == ["too long"] != everything["1 de"]
    assert made("--languages", "de", "--bare").keys() == everything.keys() | {"4 de"}


# ------------------------------------------------------------------------------
# Filters, on examples with one fault each

HOUSE, HAUS = "She wants to sell the old house.", "Sie will das alte Haus verkaufen."


def judged(source, text, language="de", ids=(1, 2, 3), **scores):
    good = filters.translation_scores(source, text, language, list(ids))
    return filters.failures({"scores": good | {"log_p": -0.2, "round_trip": 80} | scores})


@pytest.mark.parametrize(
    "text, language, scores, reasons",
    [
        (HAUS, "de", {}, []),
        ("她想卖掉那座老房子。", "zh", {}, []),
        (HAUS, "zh", {}, ["language"]),
        ("Lei vuole vendere la casa che è in paese.", "de", {}, ["language"]),
        ("She wants to sell das alte house.", "de", {}, ["copied"]),
        ("Haus.", "de", {}, ["ratio"]),
        ("Sie will das alte das alte Haus das alte Haus verkaufen.", "de", {}, ["loop"]),
        (HAUS, "de", {"ids": [5, *[1, 2] * 14, 9]}, ["loop"]),
        (HAUS + "\n(Das ist alt.)", "de", {}, ["lines"]),
        (HAUS, "de", {"log_p": -1.4, "round_trip": 12.0}, ["log_p", "round_trip"]),
    ],
)
def test_a_faulty_translation_fails_by_its_fault(text, language, scores, reasons):
    assert judged(HOUSE, text, language, **scores) == reasons


def answered(text, language="en", most=10, **scores):
    example = {"question": "Who sold the old house?", "text": text, "source_language": "en"}
    example["target_language"] = language
    good = filters.answer_scores(example, "On Monday Emma sold the old house.", most)
    good |= {"agreement": 1.0, "guess": 0.0, "gain": 3.0}
    thresholds = filters.THRESHOLDS | {"found": 0.5}
    return filters.failures({"scores": good | scores}, thresholds)


def test_answers_fail_by_their_fault():
    assert answered("Emma.") == answered("Emma did.") == answered("Emma.", gain=0.1) == []
    assert answered("Emma.", guess=1.0) == [], "a lucky guess, but the passage helped"
    assert answered("Emma.", guess=1.0, gain=0.1) == ["guess"], "known without the passage"
    assert answered("Paul.") == ["found"], "an answer of which the passage has no word"
    assert answered("Emma.", agreement=0.5) == ["agreement"]
    assert answered("Emma sold the old house.", most=4) == ["extra_words"]
    assert filters.failures({"scores": {"language": 1, "refusal": -0.1}}) == ["refusal"]
    assert filters.failures({"failed": "empty", "scores": {"language": 1}}) == ["empty"]


def test_names_and_numbers_are_swapped_for_others_used_alike():
    texts = ["On Monday Anna bought 3 hats in Rome.", "Then Paul bought 4 hats in Paris."]
    texts += ["On Friday Emma bought bread.", "The hats are old. In Rome it rains."]
    names = filters.find_names(texts)
    assert names[0].keys() == set("Monday Anna 3 Rome Paul 4 Paris Friday Emma".split())

    def swapped(question, passage):
        draws = [random.Random(seed) for seed in range(20)]
        return {filters.swap_name(question, passage, names, draw) for draw in draws}

    assert swapped("What did Anna buy?", texts[0]) == {"What did Paul buy?", "What did Emma buy?"}
    assert swapped("Who bought 3 hats?", texts[0]) == {"Who bought 4 hats?"}
    assert swapped("Who is old?", texts[3]) == {None}, "there is no name"
    assert swapped("What did Anna buy?", texts[1]) == {None}, "the passage does not have it"


def test_the_share_of_unanswerable_questions_is_the_same_in_every_language(tmp_path):
    given = {"en a": 40, "en un": 5, "de a": 9, "de un": 40, "it a": 5}
    expected = {"en a": 15, "en un": 5, "de a": 9, "de un": 3, "it a": 5}
    examples = []
    for group, count in given.items():
        language, kind = group.split()
        made_by = {"kind": f"{kind}nswerable".replace("unn", "unan"), "scores": {}}
        made_by["unanswerable"] = 0.25
        example = {"target_language": language, "made_by": made_by, "group": group}
        examples += [example | {"id": f"{i} {group}"} for i in range(count)]
    filters.select(examples, tmp_path / "sqa.jsonl")
    assert Counter(example["group"] for example in read(tmp_path / "sqa.jsonl")) == expected


# ------------------------------------------------------------------------------
# The demo's LLM, which can answer, and a scripted one, which can write


def ask_demo(tmp_path, share, change=lambda example, _: example):
    """Has the demo's LLM judge 16 English questions, changed by change(example, all)."""
    examples = read(ROOT / "demo" / "dev.jsonl")
    asked = []
    for example in examples:
        example["audio"] = str(ROOT / "demo" / example["audio"])
        english = example["task"] == "sqa" and example["target_language"] == "en"
        if english and example["text"] not in REFUSALS.values():
            asked.append(example)
    asked = asked[:16]
    places = [(example["audio"], example.get("start")) for example in asked]
    source = [example for example in examples if (example["audio"], example.get("start")) in places]
    source = write(tmp_path / "asr.jsonl", source)
    given = write(tmp_path / "sqa.jsonl", [change(example, asked) for example in asked])
    out = tmp_path / "out.jsonl"
    llm = str(ROOT / "demo" / "llm")
    options = ["--llm", llm, "--questions", given, "--unanswerable", share]
    synth.main(["questions", source, str(out), *options])
    return read(out), read(out.with_suffix(".all.jsonl"))


def test_right_answers_pass_and_hallucinated_ones_do_not(tmp_path):
    quiz = {"corpus": "quiz", "licence": "CC-BY-SA-4.0"}
    passing, examples = ask_demo(tmp_path, "0", lambda example, _: example | quiz)
    assert len(passing) > 11 and len(examples) == 16
    for example in examples:
        assert example["licence"] == "CC-BY-SA-4.0", "the licence of a question counts"
        assert example["sources"] == [["demo", "CC0-1.0"], ["quiz", "CC-BY-SA-4.0"]]

    def exchange(example, asked):
        other = asked[asked.index(example) - 5]
        return example | {"text": other["text"]}

    assert ask_demo(tmp_path, "0", exchange)[0] == []
    assert ask_demo(tmp_path, "0", lambda example, _: example | {"text": "A cow."})[0] == []


def test_unanswerable_questions_are_refused_and_answerable_ones_rejected(tmp_path, monkeypatch):
    passing, examples = ask_demo(tmp_path, "1")
    assert len(passing) >= 10 and {example["text"] for example in passing} == {REFUSALS["en"]}
    assert {example["made_by"]["way"] for example in examples} == {"swap", "other passage"}
    monkeypatch.setattr(filters, "swap_name", lambda question, *_: question + " ")
    _, examples = ask_demo(tmp_path, "1")
    unchanged = [x["reasons"] for x in examples if x["made_by"]["way"] == "swap"]
    assert len(unchanged) > 4 and unchanged.count(["refusal"]) >= len(unchanged) - 1


class ScriptedWriter(writer.Writer):
    """Writes and answers by a script; its likelihoods are made up."""

    def read(self, prompts):
        turns = [self.decode(prompt).split("user\n", 1)[1] for prompt in prompts]
        return [turn.removesuffix("\nassistant") for turn in turns]

    def answer(self, asked, limits, never_first=()):
        return [self.encode(self.script(text)) for text in asked]

    def script(self, text):
        name = text.split()[0]
        if "Write one question" not in text:
            return "Tea and rice." if "\n" in text else "No idea."
        if name == "Otto":
            return "no form"
        return f"1. **Question:** What does {name} like?\n\n**Answer:** Tea and rice."

    def weigh(self, asked, answers):
        likely = self.encode("Not answerable.")
        pairs = zip(asked, answers, strict=True)
        return [(-1.0 if ids == likely or "\n" in text else -50.0, 4) for text, ids in pairs]


def test_questions_are_written_about_neighbouring_utterances(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "Writer", ScriptedWriter)
    licences = {"Anna": "CC0-1.0", "Otto": "MIT", "Emma": "CC-BY-4.0", "Paul": "CC-BY-SA-4.0"}
    examples = []
    for name, licence in licences.items():
        for k, text in enumerate((f"{name} likes tea and rice.", f"Also {name} sleeps.")):
            fields = {"audio": f"{name}-{k}.wav", "speaker": name, "licence": licence}
            fields["duration"] = 0.5
            soundfile.write(tmp_path / fields["audio"], np.full(8000, len(name) / 9 + k / 5), 16000)
            examples.append(asr(0, text, **fields))
    source = write(tmp_path / "asr.jsonl", examples[::-1])  # names order them, not lines
    options = "--languages en --seed 1 --utterances 2 --unanswerable 0.5 --answer-words 4"
    out = str(tmp_path / "sqa.jsonl")
    synth.main(["questions", source, out, "--llm", llm, *options.split()])
    kinds = Counter()
    for example in read(tmp_path / "sqa.all.jsonl"):
        name, made_by = example["speaker"], example["made_by"]
        assert made_by["transcript"] == f"{name} likes tea and rice. Also {name} sleeps."
        wave, _ = soundfile.read(tmp_path / example["audio"])
        assert example["duration"] == 1.0 and len(wave) == 16000 and wave[0] < wave[-1]
        asked_of = made_by.get("asked_of", made_by["transcript"]).split()[0]
        both = [licences[name], licences[asked_of]]
        assert example["licence"] == strictest(both), "the passage it was asked of counts, too"
        if asked_of == "Otto":
            assert example["reasons"] == ["form"]
            continue
        kinds[made_by["kind"]] += 1
        answers = {"answerable": "Tea and rice.", "unanswerable": "Not answerable."}
        assert example["text"] == answers[made_by["kind"]] and not example["reasons"]
        assert (name in example["question"]) == (made_by["kind"] == "answerable")
    assert len(kinds) == 2


# ------------------------------------------------------------------------------
# Joined utterances and their licences


def test_the_strictest_licence_is_inherited():
    for licences, inherited in {
        ("CC0-1.0", "CC-BY-4.0"): "CC-BY-4.0",
        ("MIT", "CC0-1.0"): "MIT",
        ("CC-BY-4.0", "CC-BY-SA-4.0"): "CC-BY-SA-4.0",
        ("CC-BY-NC-4.0", "CC-BY-SA-4.0"): "CC-BY-SA-4.0 AND CC-BY-NC-4.0",
        ("CC-BY-SA-4.0 AND CC-BY-NC-4.0", "MIT"): "CC-BY-SA-4.0 AND CC-BY-NC-4.0",
        ("CC-BY-4.0", "unknown"): "unknown",
        ("GPL-3.0-only OR MIT", "CC0-1.0"): "MIT",
    }.items():
        assert strictest(licences) == inherited
        assert accepted(inherited) == all(map(accepted, licences)), "never freer than its parts"
    assert strictest([]) == "unknown"


def library(folder):
    """Utterances of two chapters, a file each, and of a talk, pieces of one file; 16-bit noise."""
    noise = np.random.default_rng(0)
    examples = []
    for chapter, n, seconds in [(7, 0, 4), (7, 1, 4), (7, 2, 4), (7, 3, 4), (8, 9, 4), (8, 10, 5)]:
        name = f"{chapter}/{chapter}-{n}.flac"
        (folder / name).parent.mkdir(exist_ok=True)
        wave = noise.integers(-9999, 9999, seconds * 16000, dtype=np.int16)
        soundfile.write(folder / name, wave, 16000)
        fields = {"audio": name, "duration": seconds, "corpus": "books"}
        examples.append(asr(0, f"Chapter {chapter}, line {n}.", **fields))
    talk = noise.integers(-9999, 9999, 320000, dtype=np.int16)
    soundfile.write(folder / "talk.wav", talk, 16000)
    for start, duration in [(0.0, 3.25), (3.25, 4.5), (7.75, 2.0), (12.0, 3.0)]:
        fields = {"audio": "talk.wav", "start": start, "duration": duration, "speaker": "t"}
        examples.append(asr(0, f"From {start}.", **fields, licence="CC-BY-SA-4.0", corpus="talks"))
    return examples


def test_joined_utterances_are_exact(tmp_path):
    examples = library(tmp_path)
    st = []
    for i, example in enumerate(examples[1:]):
        fields = {"task": "st", "target_language": "zh", "text": f"第{i}句。", "test_only": True}
        st.append(example | fields)
    random.Random(0).shuffle(examples)
    source = write(tmp_path / "in.jsonl", examples + st)
    out = tmp_path / "to" / "long.jsonl"
    synth.main(["concatenate", source, str(out), "--seconds", "12"])
    joined = {example["text"]: example for example in read(out)}
    lines = "Chapter 8, line 9. Chapter 8, line 10."
    talk = "From 0.0. From 3.25. From 7.75."
    first = "Chapter 7, line 0. Chapter 7, line 1. Chapter 7, line 2."
    assert joined.keys() == {first, lines, talk, "第3句。第4句。", "第5句。第6句。第7句。"}
    assert "test_only" not in joined[lines] and joined["第3句。第4句。"]["test_only"]

    parts = [soundfile.read(tmp_path / f"8/8-{n}.flac", dtype="int16")[0] for n in (9, 10)]
    wave, rate = soundfile.read(out.parent / joined[lines]["audio"], dtype="int16")
    assert rate == 16000 and np.array_equal(wave, np.concatenate(parts))
    assert joined[lines]["duration"] == 9
    piece = joined[talk]
    assert piece["audio"] == "../talk.wav" and piece["duration"] == 9.75, "one piece of the file"
    assert piece["sources"] == [["talks", "CC-BY-SA-4.0"]] and "start" not in piece
    assert len(list(Manifest(out))) == 5, "valid examples"


def test_audio_that_cannot_be_used_is_left_out(tmp_path, capsys):
    examples = library(tmp_path)[4:]
    (tmp_path / "8/8-10.flac").write_bytes(b"")
    out = tmp_path / "long.jsonl"
    synth.main(["concatenate", write(tmp_path / "in.jsonl", examples), str(out)])
    printed = capsys.readouterr()
    assert "1 left out because their audio cannot be used" in printed.out
    assert "8-10.flac" in printed.err
    assert [example["corpus"] for example in read(out)] == ["talks"]


# ------------------------------------------------------------------------------
# Wrong calls


@pytest.mark.parametrize(
    "call, message",
    [
        ("translate IN OUT --llm PLAIN", "its tokenizer has no <|im_start|> and <|im_end|>"),
        ("translate BARE OUT --llm LLM", "found no asr example in en, de, it, zh with case"),
        ("translate IN OUT --llm LLM --languages en", "in these languages already"),
        ("translate IN IN --llm LLM", "is both input and output"),
        ("translate IN OUT --llm LLM --threshold fluency=1", "found 'fluency=1', expected"),
        ("questions IN OUT --llm LLM --unanswerable 25", "found 25, expected 0 to 1"),
        ("concatenate IN OUT --seconds 1", "found no neighbouring utterances"),
        ("filter IN OUT", "line 1: not made by prepare.synth"),
        ("filter gone.all.jsonl OUT", "gone.all.jsonl: found no examples"),
    ],
)
def test_wrong_calls_end_in_one_line(call, message, llm, tiny_project, manifest, capsys):
    folder = Path(manifest).parent
    names = {"IN": manifest, "OUT": str(folder / "out.jsonl"), "LLM": llm}
    names["PLAIN"] = str(tiny_project / "llm")
    names["BARE"] = write(folder / "bare.jsonl", [asr(0, "no case", style="bare")])
    with pytest.raises(SystemExit) as stopped:
        synth.main([names.get(word, word) for word in call.split()])
    text = stopped.value.code
    if text == 2:  # by argparse, behind the usage
        text = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in text and "\n" not in text
    assert not (folder / "out.jsonl").exists()
