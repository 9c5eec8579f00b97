"""prepare/synth.py and what it is made of: rows that an LLM writes, the filters that judge them, neighbours joined."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import FAMILIES, LLM, randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import model
from data import Manifest
from prepare import filters, synth, writer
from prepare.instructions import INSTRUCTIONS, REFUSALS

DEMO = Path(__file__).resolve().parent.parent / "demo"
OFF = ["language=0", "log_p=-99", "round_trip=0", "ratio=99", "copied=1", "loop=1", "lines=999"]  # fails only nothing


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    """A random LLM, one token a byte, that chats in ChatML."""
    directory = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(
        special_tokens=["<|endoftext|>", *writer.CHATML], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    raw = {"model_type": "qwen2", **LLM, **FAMILIES["qwen2"], "vocab_size": tokenizer.get_vocab_size(),
           "eos_token_id": 0, "hidden_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    randomise(model.LLM(model.LLMConfig.from_dict(raw))).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return str(directory)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def asr(i, text, **more):
    return {"audio": f"{i}.wav", "duration": 1.0 + i, "text": text, "task": "asr", "speaker": "s", "corpus": "c",
            "licence": "CC-BY-4.0", **more}


SENTENCES = ["Anna bought a hat.", "On Monday Paul sold two red apples.", "We met Emma in Rome last week.",
             "It rained.", "My sister lives in Paris and works as a doctor.", "The dog sleeps."]


@pytest.fixture
def manifest(tmp_path):
    (tmp_path / "in").mkdir()
    return write(tmp_path / "in" / "asr.jsonl", [asr(i, text) for i, text in enumerate(SENTENCES)])


# ----------------------------------------------------------------------------------------------------------------------
# The LLM, from end to end


def test_translations_of_a_random_llm_are_rows_with_scores(llm, manifest, tmp_path, capsys):
    out = tmp_path / "out" / "st.jsonl"
    synth.main(["translate", manifest, str(out), "--llm", llm, "--languages", "de", "zh", "--threshold", *OFF])
    rows = read(out.with_suffix(".all.jsonl"))
    assert len(rows) == 12 and len({row["id"] for row in rows}) == 12
    for row in rows:
        made_by = row["made_by"]
        assert made_by["model"] == llm and len(made_by["sha256"]) == 64 and made_by["seed"] == 0
        assert made_by["prompt"] == "{text}\nTranslate {to}." and made_by["transcript"] in SENTENCES
        assert made_by["scores"].keys() == {"language", "ratio", "copied", "loop", "lines", "log_p", "round_trip"}
        assert made_by["scores"]["log_p"] < 0 and (out.parent / row["audio"]).parent.samefile(tmp_path / "in")
        assert row["duration"] == 1 + SENTENCES.index(made_by["transcript"]) and row["target_language"] in ("de", "zh")
        assert row["sources"] == [["c", "CC-BY-4.0"]] and row["licence"] == "CC-BY-4.0"
        assert row["reasons"] == (["empty"] if not row["text"] else [])
    kept = list(Manifest(out, trust_paths=True))  # each of them a valid row
    assert [row["text"] for row in kept] == [row["text"] for row in rows if row["text"]]
    shown = capsys.readouterr().out
    assert f"kept {len(kept)} of 12 rows" in shown and "is outside the manifest's folder: train with --trust-paths" in shown


def test_filtering_again_equals_a_run_with_those_thresholds(llm, manifest, tmp_path):
    common = [manifest, "--llm", llm, "--languages", "it", "--threshold"]
    synth.main(["translate", *common[:1], str(tmp_path / "a.jsonl"), *common[1:], *OFF])
    scores = sorted(row["made_by"]["scores"]["log_p"] for row in read(tmp_path / "a.all.jsonl"))
    middle = f"log_p={(scores[2] + scores[3]) / 2}"
    synth.main(["translate", *common[:1], str(tmp_path / "b.jsonl"), *common[1:], *OFF, middle])
    synth.main(["filter", str(tmp_path / "a.all.jsonl"), str(tmp_path / "c.jsonl"), "--threshold", *OFF, middle])
    assert len(read(tmp_path / "c.jsonl")) == 3 < len(read(tmp_path / "a.jsonl"))
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("command", ["translate", "questions", "paraphrase"])
def test_a_run_that_was_killed_goes_on_to_the_same_result(command, llm, manifest, tmp_path, monkeypatch, capsys):
    def run(out):
        options = {"translate": ["--threshold", *OFF], "paraphrase": ["--rows", "24"],
                   "questions": ["--questions", questions, "--threshold", "agreement=0", "extra_words=999"]}
        synth.main([command, *([manifest] if command != "paraphrase" else []), str(out), "--llm", llm, "--batch", "3",
                    "--languages", "en", "de", "it", *options[command]])

    questions = write(Path(manifest).with_name("sqa.jsonl"), [asr(i, "Yes.") | {
        "task": "sqa", "question": f"Is it {i}?", "target_language": "en"} for i in range(6) for _ in range(2)])
    run(tmp_path / "whole.json")
    calls, generate = [], model.SpeechLM.generate

    def until_killed(self, ids, *args, **options):
        calls.append(len(ids))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(self, ids, *args, **options)

    monkeypatch.setattr(model.SpeechLM, "generate", until_killed)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "killed.json")
    path = tmp_path / "killed.all.jsonl"
    assert stopped.value.code == 130 and not (tmp_path / "killed.json").exists() and 3 <= len(read(path)) <= 15
    torn = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(torn[:-1]) + torn[-1][:40])  # within a batch, and within a row
    del calls[5:]
    run(tmp_path / "killed.json")
    assert "rows are there already" in capsys.readouterr().out
    assert path.read_bytes() == (tmp_path / "whole.all.jsonl").read_bytes()
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    done = len(calls)
    run(tmp_path / "killed.json")
    assert len(calls) == done, "a run that is done asks the LLM nothing"


def test_rows_of_other_settings_are_moved_aside(llm, manifest, tmp_path, capsys):
    def run(*options):
        synth.main(["translate", manifest, str(tmp_path / "st.jsonl"), "--llm", llm, "--no-round-trip", *options])

    run("--languages", "de", "--threshold", *OFF)
    first = (tmp_path / "st.all.jsonl").read_bytes()
    run("--languages", "de", "--batch", "2", "--threshold", "log_p=-1")  # these two change no row
    assert (tmp_path / "st.all.jsonl").read_bytes() == first
    run("--languages", "it")
    assert (tmp_path / "st.all.old1.jsonl").read_bytes() == first
    assert "held rows of other settings" in capsys.readouterr().out
    run("--languages", "zh")
    assert (tmp_path / "st.all.old1.jsonl").read_bytes() == first, "what was saved is never lost"
    assert {row["target_language"] for row in read(tmp_path / "st.all.old2.jsonl")} == {"it"}


def test_a_row_does_not_depend_on_its_batch(llm, manifest, tmp_path):
    for batch in ("1", "5"):
        synth.main(["translate", manifest, str(tmp_path / f"{batch}.jsonl"), "--llm", llm, "--batch", batch])
    alone, together = ({row["id"]: row for row in read(tmp_path / f"{batch}.all.jsonl")} for batch in ("1", "5"))
    assert alone.keys() == together.keys() and len(alone) == 18
    for id, row in alone.items():
        assert row["text"] == together[id]["text"] and row["made_by"]["back"] == together[id]["made_by"]["back"]
        for name, score in row["made_by"].pop("scores").items():
            assert together[id]["made_by"]["scores"][name] == pytest.approx(score, abs=2e-4), name


def test_weighing_equals_a_plain_forward_pass(llm):
    w = writer.load_writer(llm)
    prompts, answers = [writer.prompt(w, text) for text in ("Hello.", "And?")], [writer.encode(w, "Yes."), []]
    found = writer.weigh(w, writer.ask(w, prompts), answers)
    for prompt, answer, (log_p, tokens) in zip(prompts, answers, found):
        ids = prompt + answer + [w.end]
        scores = w.model.llm(model.torch.tensor(ids), [len(ids)]).log_softmax(-1)
        expected = sum(scores[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        assert log_p == pytest.approx(expected, abs=1e-4) and tokens == len(answer) + 1


def test_prompts_are_chatml_and_texts_cannot_break_out(llm):
    w = writer.load_writer(llm)
    ids = writer.prompt(w, "End.<|im_end|>\nNew")
    assert [ids.count(w.tokenizer.token_to_id(token)) for token in writer.CHATML] == [3, 2]
    assert w.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nEnd.< |im_end|>\nNew<|im_end|>\n"
        "<|im_start|>assistant\n")
    assert w.model.llm.config.eos_token_id == [0, 2], "the turn's end ends an answer, too"


# ----------------------------------------------------------------------------------------------------------------------
# Filters, on rows with one fault each


def judged(source, text, language="de", ids=range(5), **scores):
    scores = filters.translation_scores(source, text, language, list(ids)) | {"log_p": -0.2, "round_trip": 80} | scores
    return filters.failures({"scores": scores})


HOUSE, HAUS = "She wants to sell the old house.", "Sie will das alte Haus verkaufen."


def test_good_translations_pass():
    assert judged(HOUSE, HAUS) == [] and judged(HOUSE, "Vuole vendere la vecchia casa.", "it") == []
    assert judged(HOUSE, "她想卖掉那座老房子。", "zh") == [] and judged("Yes.", "Ja.") == []
    assert judged("Anna and Paul went to Rome.", "Anna und Paul fuhren nach Rom.") == []
    assert judged("It was very, very, very, very, very, very late.", "Es war sehr, sehr, sehr, sehr, sehr, sehr spät."
                  ) == [], "repeated in the source, too"


@pytest.mark.parametrize("text, language, scores, reason", [
    ("Lei vuole vendere la casa che è in paese.", "de", {}, "language"), (HAUS, "zh", {}, "language"),
    (HOUSE, "de", {}, "copied"), ("She wants to sell das alte house.", "de", {}, "copied"),
    ("Haus.", "de", {}, "ratio"), (HAUS + " Das ist eine sehr gute Idee, meint ihre Mutter dazu.", "de", {}, "ratio"),
    ("Sie will das alte das alte Haus das alte Haus verkaufen.", "de", {}, "loop"),
    (HAUS, "de", {"ids": [5, *[1, 2] * 14, 9]}, "loop"), (HAUS + "\n(Das ist alt.)", "de", {}, "lines"),
    (HAUS, "de", {"log_p": -1.4}, "log_p"), (HAUS, "de", {"round_trip": 12.0}, "round_trip")])
def test_a_faulty_translation_fails_by_its_fault(text, language, scores, reason):
    assert reason in judged(HOUSE, text, language, **scores)


def test_an_empty_translation_fails_whatever_the_thresholds():
    lenient = filters.THRESHOLDS | {name: -1e9 for name in filters.LEAST} | {name: 1e9 for name in filters.MOST}
    assert filters.failures({"failed": "empty", "scores": {"language": 1}}, lenient) == ["empty"]


def answered(text, language="en", most=10, **scores):
    row = {"question": "Who sold the old house?", "text": text, "target_language": language, "source_language": "en"}
    scores = filters.answer_scores(row, "On Monday Emma sold the old house.", most) | {
        "agreement": 1.0, "guess": 0.0, "gain": 3.0} | scores
    return filters.failures({"scores": scores}, filters.THRESHOLDS | {"found": 0.5})


def test_answers_fail_by_their_fault():
    assert answered("Emma.") == [] == answered("Emma did.")
    assert answered("Paul.") == ["found"], "an answer of which the passage has no word"
    assert answered("Emma.", agreement=0.5) == ["agreement"]
    assert answered("Emma.", guess=1.0) == [] == answered("Emma.", gain=0.1), "a lucky guess, but the passage helped"
    assert answered("Emma.", guess=1.0, gain=0.1) == ["guess"], "known without the passage"
    assert answered("Emma sold the old house.", most=4) == ["extra_words"]
    assert "language" in answered("Emma.", "zh")
    assert filters.failures({"scores": {"language": 1, "refusal": -0.1}}) == ["refusal"]


def test_names_and_numbers_are_swapped_for_others_used_alike():
    texts = ["On Monday Anna bought 3 hats in Rome.", "Then Paul bought 4 hats in Paris.",
             "On Friday Emma bought bread.", "The hats are old. In Rome it rains."]
    names = filters.entities(texts)
    assert names[0].keys() == {"Monday", "Anna", "3", "Rome", "Paul", "4", "Paris", "Friday", "Emma"}
    drawn = {filters.swapped("What did Anna buy?", texts[0], names, random.Random(i)) for i in range(20)}
    assert drawn == {"What did Paul buy?", "What did Emma buy?"}
    assert filters.swapped("Who bought 3 hats?", texts[0], names, random.Random(0)) == "Who bought 4 hats?"
    assert filters.swapped("Chi abita a Rome?", texts[0], names, random.Random(0)) == "Chi abita a Paris?"
    assert filters.swapped("Who is old?", texts[3], names, random.Random(0)) is None, "no name to swap"
    assert filters.swapped("What did Anna buy?", texts[1], names, random.Random(0)) is None, "not in the passage"


def test_the_share_of_unanswerable_questions_is_kept_in_every_language(tmp_path):
    def row(i, language, kind, **scores):
        return {"id": f"{i} {language}", "target_language": language, "text": "x", "made_by": {
            "kind": kind, "unanswerable": 0.25, "scores": scores}, "reasons": []}

    rows = [row(i, "en", "answerable") for i in range(40)]
    rows += [row(i, "en", "unanswerable", refusal=i - 45) for i in range(40, 50)]
    rows += [row(i, "de", "answerable") for i in range(9)] + [row(i, "de", "unanswerable") for i in range(9, 49)]
    rows += [row(i, "it", "answerable") for i in range(5)]
    write(tmp_path / "sqa.all.jsonl", rows)
    filters.select(tmp_path / "sqa.all.jsonl", tmp_path / "sqa.jsonl")
    kept = [(row["target_language"], row["made_by"]["kind"]) for row in read(tmp_path / "sqa.jsonl")]
    assert {key: kept.count(key) for key in set(kept)} == {
        ("en", "answerable"): 15, ("en", "unanswerable"): 5, ("de", "answerable"): 9, ("de", "unanswerable"): 3,
        ("it", "answerable"): 5}, "five of ten are refused; a kind of which there is nothing takes nothing away"


@pytest.mark.parametrize("wording, key, language, failure", [
    ("Write {in} what you hear.", "st", "en", None), ("Schreibe {in}, was du hörst.", "st", "de", None),
    ("Please write the words.", "asr", "en", None), ("Die Frage lautet: {question}", "sqa", "de", None),
    ("请写下来。", "asr bare", "zh", None), ("Write what you hear.", "st", "en", "placeholder"),
    ("Write {in} or {in}.", "st", "en", "placeholder"), ("Answer {the question}", "sqa", "en", "placeholder"),
    ("Answer: {question", "sqa", "en", "placeholder"), ("Write {question}", "asr", "en", "placeholder"),
    ("x" * 200, "asr", "en", "length"), ("Translate the speech.", "asr", "en", "task"),
    ("Transcribe this: {question}", "sqa", "en", "task"), ("Schreibe auf, was du hörst.", "asr", "en", "language"),
    ("Write down what you hear.", "asr", "zh", "language")])
def test_wordings(wording, key, language, failure):
    assert filters.wording_failure(wording, key, language) == failure


# ----------------------------------------------------------------------------------------------------------------------
# The demo's LLM, which can answer: labels that are wrong are found


def demo_questions(tmp_path, change):
    """The demo's dev sentences, and its English questions about their facts with answers changed."""
    rows = [row | {"audio": str(DEMO / row["audio"])} for row in read(DEMO / "dev.jsonl")]
    asked = [row for row in rows if row["task"] == "sqa" and row["target_language"] == "en"
             and row["text"] not in REFUSALS.values()][:16]
    places = [(row["audio"], row.get("start")) for row in asked]
    said = [row for row in rows if row["task"] == "asr" and (row["audio"], row.get("start")) in places]
    return write(tmp_path / "said.jsonl", said), write(tmp_path / "asked.jsonl", [change(row, asked) for row in asked])


def test_right_answers_are_kept_and_hallucinated_ones_are_not(tmp_path):
    share = {}
    for name, change in (("right", lambda row, asked: row | {"corpus": "quiz", "licence": "CC-BY-SA-4.0"}),
                         ("wrong", lambda row, asked: row | {"text": asked[asked.index(row) - 5]["text"]}),
                         ("made up", lambda row, asked: row | {"text": "A purple elephant."})):
        said, asked = demo_questions(tmp_path, change)
        out = tmp_path / f"{name}.jsonl"
        synth.main(["questions", said, str(out), "--llm", str(DEMO / "llm"), "--questions", asked,
                    "--unanswerable", "0", "--trust-paths"])
        share[name] = len(read(out)) / 16
        assert {row["text"] for row in read(out)} <= {row["text"] for row in read(asked)}
        for row in read(out.with_suffix(".all.jsonl")):
            assert row["reasons"] or row["licence"] == "CC-BY-SA-4.0", "a question's own licence counts"
            assert name != "right" or row["sources"] == [["demo", "CC0-1.0"], ["quiz", "CC-BY-SA-4.0"]]
            assert name == "right" or row["reasons"]
    assert share["right"] > 0.7 and share["wrong"] == share["made up"] == 0


def test_unanswerable_questions_are_refused_and_those_with_an_answer_are_found_out(tmp_path, monkeypatch):
    said, asked = demo_questions(tmp_path, lambda row, asked: row)
    common = ["--llm", str(DEMO / "llm"), "--questions", asked, "--unanswerable", "1", "--trust-paths"]
    synth.main(["questions", said, str(tmp_path / "sqa.jsonl"), *common])
    rows, kept = read(tmp_path / "sqa.all.jsonl"), read(tmp_path / "sqa.jsonl")
    asked_of = {row["question"]: row["audio"] for row in read(asked)}
    assert len(rows) == 16 and 10 <= len(kept) and {row["text"] for row in kept} == {"Not answerable."}
    ways = [row["made_by"]["way"] for row in rows]
    assert ways.count("other passage") > 4 and ways.count("swap") > 0
    for row in rows:
        own = [q["question"] for q in read(asked) if (q["audio"], q.get("start")) ==
               (str((tmp_path / row["audio"]).resolve()), row.get("start"))]
        assert row["question"] not in own
        assert (row["question"] in asked_of) == (row["made_by"]["way"] == "other passage")
        assert (row["made_by"]["scores"]["refusal"] < 0) == (row["reasons"] == ["refusal"])
    monkeypatch.setattr(filters, "swapped", lambda question, *_: question)  # a swap that changes nothing
    synth.main(["questions", said, str(tmp_path / "own.jsonl"), *common])
    own = [row["reasons"] for row in read(tmp_path / "own.all.jsonl") if row["made_by"]["way"] == "swap"]
    assert len(own) > 4 and own.count(["refusal"]) >= len(own) - 1


# ----------------------------------------------------------------------------------------------------------------------
# An LLM that writes, played by a script


@pytest.fixture
def scripted(monkeypatch):
    """Has `reply(prompt)`, to be set, answer in the LLM's place; likelihoods are made up."""
    script = {}
    monkeypatch.setattr(synth, "ask", lambda w, prompts: [
        w.tokenizer.decode(ids).split("user\n", 1)[1].removesuffix("\nassistant\n") for ids in prompts])
    monkeypatch.setattr(synth, "say", lambda w, asked, limits, never_first=(): [
        writer.encode(w, script["reply"](text))[:limit] for text, limit in zip(asked, limits)])
    monkeypatch.setattr(synth, "weigh", lambda w, asked, answers: [
        (-1.0 if ids == writer.encode(w, "Not answerable.") or "\n" in text else -50.0, 4)
        for text, ids in zip(asked, answers)])
    return script


def test_questions_are_written_about_neighbouring_utterances(scripted, llm, tmp_path):
    def reply(text):
        if "Write one question" in text:
            name = text.split()[0]
            written = f"1. **Question:** What does {name} like?\n\n**Answer:** Tea and rice."
            return "no form" if name == "Otto" else written
        return "Tea and rice." if text.count("\n") else "No idea."

    scripted["reply"] = reply
    names, licences, rows = ["Anna", "Otto", "Emma", "Paul"], ["CC0-1.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"], []
    for n, name in enumerate(names):
        for k, text in enumerate((f"{name} likes tea and rice.", f"Also {name} sleeps.")):
            soundfile.write(tmp_path / f"{n}-{k}.wav", np.full(8000, n / 9 + k / 5), 16000, subtype="PCM_16")
            rows.append(asr(0, text, audio=f"{n}-{k}.wav", duration=0.5, speaker=name, licence=licences[n]))
    source = write(tmp_path / "asr.jsonl", rows[::-1])  # neighbours are told by name, not by place in the manifest
    synth.main(["questions", source, str(tmp_path / "sqa.jsonl"), "--llm", llm, "--languages", "en", "--seed", "1",
                "--utterances", "2", "--unanswerable", "0.5", "--answer-words", "4"])
    found = read(tmp_path / "sqa.all.jsonl")
    assert len(found) == 4
    for row in found:
        name, about = row["speaker"], row["made_by"]
        assert about["transcript"] == f"{name} likes tea and rice. Also {name} sleeps." and row["duration"] == 1.0
        wave, _ = soundfile.read(tmp_path / row["audio"])
        level = names.index(name) / 9
        assert wave.tolist() == pytest.approx([level] * 8000 + [level + 0.2] * 8000, abs=1e-4)
        asked_of = about.get("asked_of", about["transcript"]).split()[0]
        both = names.index(name), names.index(asked_of)
        assert row["licence"] == licences[max(both)], "the passage that the question was made from counts, too"
        if asked_of == "Otto":
            assert row["reasons"] == ["form"]
        elif about["kind"] == "answerable":
            assert (row["question"], row["text"]) == (f"What does {name} like?", "Tea and rice.") and not row["reasons"]
        else:
            assert row["text"] == "Not answerable." and name not in row["question"] and not row["reasons"]
    assert {row["made_by"]["kind"] for row in found} == {"answerable", "unanswerable"}
    kinds = [row["made_by"]["kind"] for row in read(tmp_path / "sqa.jsonl")]
    assert kinds.count("answerable") == kinds.count("unanswerable")


def test_new_wordings_are_cleaned_sorted_out_and_each_written_once(scripted, llm, tmp_path, capsys):
    lines = ['1. "Put the recording into words."', "- put the recording into words", "• Transcribe.",
             "Schreibe auf, was du hörst.", "Translate it.", "", "6) Write {in} please."]
    scripted["reply"] = lambda text: (
        "\n".join(lines) if text.startswith("Transcribe the audio.\n") else "Say it all {question}.")
    synth.main(["paraphrase", str(tmp_path / "more.json"), "--llm", llm, "--languages", "en"])
    new = json.loads((tmp_path / "more.json").read_text())
    assert new.pop("made_by")["model"] == llm
    assert new == {"asr": {"en": ["Put the recording into words."]}, "sqa": {"en": ["Say it all {question}."]}}
    assert set(new) <= set(INSTRUCTIONS), "the shape of instructions.json"
    rows = {row["id"]: row for row in read(tmp_path / "more.all.jsonl")}
    wrote = {text: why for text, why in rows["asr, en, 2"]["made_by"]["wrote"]}
    assert wrote["Schreibe auf, was du hörst."] == "language" and wrote["Translate it."] == "task"
    assert wrote["Write {in} please."] == "placeholder" and "known" in capsys.readouterr().out
    assert rows["st, en, 1"]["reasons"] == ["no wording"]


# ----------------------------------------------------------------------------------------------------------------------
# Joined utterances


def library(folder):
    """Utterances of three chapters in the layout of a public corpus, and of one packed file; 16-bit noise."""
    noise, rows = np.random.default_rng(0), []
    chapters = [(1, 7, k, 4.0) for k in range(5)] + [(1, 8, 9, 4.0), (1, 8, 10, 5.5), (2, 7, 0, 4.0)]
    for speaker, chapter, n, seconds in chapters:
        name = f"{speaker}/{chapter}/{speaker}-{chapter}-{n}.flac"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, noise.integers(-9999, 9999, int(seconds * 16000), dtype=np.int16), 16000)
        rows.append({"audio": name, "duration": seconds, "text": f"Chapter {chapter}, line {n}.", "task": "asr",
                     "speaker": str(speaker), "corpus": "books", "licence": "CC-BY-4.0"})
    soundfile.write(folder / "talk.wav", noise.integers(-9999, 9999, 320000, dtype=np.int16), 16000)
    for start, duration in ((0.0, 3.25), (3.25, 4.5), (7.75, 2.0), (12.0, 3.0)):
        rows.append({"audio": "talk.wav", "start": start, "duration": duration, "text": f"From {start}.", "task": "asr",
                     "corpus": "talks", "licence": "CC-BY-SA-4.0"})
    return rows


def test_joined_utterances_are_exact(tmp_path):
    rows = library(tmp_path)
    st = [row | {"task": "st", "target_language": "zh", "text": f"第{i}句。", "licence": "CC-BY-NC-4.0", "corpus": "mt"}
          for i, row in enumerate(rows) if row["audio"] != "1/7/1-7-4.flac"]
    random.Random(0).shuffle(rows)
    source = write(tmp_path / "in.jsonl", rows + st)
    (tmp_path / "to").mkdir()
    out = tmp_path / "to" / "long.jsonl"
    synth.main(["concatenate", source, str(out), "--seconds", "12"])
    found = {(row["task"], row["text"]): row for row in read(out)}
    assert sorted(text for task, text in found if task == "asr") == [
        "Chapter 7, line 0. Chapter 7, line 1. Chapter 7, line 2.", "Chapter 7, line 3. Chapter 7, line 4.",
        "Chapter 8, line 9. Chapter 8, line 10.", "From 0.0. From 3.25. From 7.75."]
    assert sorted(text for task, text in found if task == "st") == ["第0句。第1句。第2句。", "第5句。第6句。", "第8句。第9句。第10句。"]
    row = found["asr", "Chapter 8, line 9. Chapter 8, line 10."]
    parts = [soundfile.read(tmp_path / f"1/8/1-8-{n}.flac", dtype="int16")[0] for n in (9, 10)]
    wave, rate = soundfile.read(out.parent / row["audio"], dtype="int16")
    assert rate == 16000 and np.array_equal(wave, np.concatenate(parts)) and row["duration"] == 9.5
    cut = found["asr", "From 0.0. From 3.25. From 7.75."]
    assert cut["audio"] == "../talk.wav" and "start" not in cut and cut["duration"] == 9.75, "contiguous: no new audio"
    assert cut["licence"] == "CC-BY-SA-4.0" and cut["sources"] == [["talks", "CC-BY-SA-4.0"]]
    manifest = Manifest(out, trust_paths=True)
    waves = {row["text"]: manifest.audio(row) for row in manifest}
    assert len(waves["From 0.0. From 3.25. From 7.75."]) == 9.75 * 16000
    assert all(row["duration"] <= 12 and row["style"] == "written" for row in read(out) if row["task"] == "asr")


def test_with_room_a_pause_is_cut_out_and_not_said(tmp_path):
    source = write(tmp_path / "in.jsonl", library(tmp_path)[8:])
    synth.main(["concatenate", source, str(tmp_path / "long.jsonl")])
    row, = read(tmp_path / "long.jsonl")
    talk, _ = soundfile.read(tmp_path / "talk.wav", dtype="int16")
    wave, _ = soundfile.read(tmp_path / row["audio"], dtype="int16")
    assert np.array_equal(wave, np.concatenate([talk[:int(9.75 * 16000)], talk[12 * 16000:15 * 16000]]))


def test_what_cannot_be_heard_is_left_out_and_told(tmp_path, capsys):
    rows = library(tmp_path)
    (tmp_path / "1/8/1-8-10.flac").write_bytes(b"")
    synth.main(["concatenate", write(tmp_path / "in.jsonl", rows), str(tmp_path / "long.jsonl")])
    said = capsys.readouterr()
    assert "1 left out because their audio cannot be used" in said.out and "1-8-10.flac" in said.err
    assert not any("Chapter 8" in row["text"] for row in read(tmp_path / "long.jsonl"))


def test_audio_that_has_changed_is_joined_again(tmp_path):
    source, out = write(tmp_path / "in.jsonl", library(tmp_path)[5:7]), tmp_path / "long.jsonl"
    synth.main(["concatenate", source, str(out)])
    soundfile.write(tmp_path / "1/8/1-8-9.flac", np.zeros(64000, np.int16), 16000)
    synth.main(["concatenate", source, str(out)])
    assert not soundfile.read(tmp_path / read(out)[0]["audio"])[0][:64000].any()


def test_derived_rows_inherit_licence_sources_and_test_only(llm, tmp_path):
    rows = [asr(0, "One two.", licence="CC-BY-SA-4.0", sources=[["x", "CC-BY-4.0"], ["y", "CC-BY-SA-4.0"]]),
            asr(1, "Three four.", test_only=True)]
    source = write(tmp_path / "in.jsonl", rows)
    synth.main(["translate", source, str(tmp_path / "st.jsonl"), "--llm", llm, "--languages", "de"])
    first, second = sorted(read(tmp_path / "st.all.jsonl"), key=lambda row: row["id"])
    assert first["licence"] == "CC-BY-SA-4.0" and first["sources"] == [["x", "CC-BY-4.0"], ["y", "CC-BY-SA-4.0"]]
    assert second["licence"] == "CC-BY-4.0" and second["test_only"] is True and "test_only" not in first


# ----------------------------------------------------------------------------------------------------------------------
# Wrong calls


@pytest.mark.parametrize("call, code, message", [
    ("translate IN OUT --llm nowhere", 1, "nowhere: no such directory; give the directory of a checkpoint"),
    ("translate IN OUT --llm PLAIN", 1, "its tokenizer has no <|im_start|> and <|im_end|>, expected an LLM that chats"),
    ("translate BARE OUT --llm LLM", 1, "found no asr row in en, de, it, zh with case and punctuation; give another "
     "manifest, or --bare"),
    ("questions BARE OUT --llm LLM", 1, "found no asr row"),
    ("translate IN OUT --llm LLM --languages fr", 2, "invalid choice: 'fr'"),
    ("translate IN OUT --llm LLM --languages en", 1, "nothing to translate"),
    ("translate missing.jsonl OUT --llm LLM", 1, "'missing.jsonl': No such file"),
    ("translate IN IN --llm LLM", 2, "is both input and output"),
    ("translate IN OUT --llm LLM --threshold fluency=1", 2, "'fluency=1', expected NAME=NUMBER, of language, log_p"),
    ("translate IN OUT --llm LLM --threshold log_p", 2, "'log_p', expected NAME=NUMBER"),
    ("questions IN OUT --llm LLM --unanswerable 25", 2, "--unanswerable is 25.0, expected 0 to 1"),
    ("questions IN OUT --llm LLM --answer-words 0", 2, "--answer-words is 0, expected 1 to 1000"),
    ("questions IN OUT --llm LLM --questions IN", 1, "of its 0 answerable questions in en, de, it, zh none is about"),
    ("concatenate IN OUT --seconds 1", 1, "found no neighbouring utterances, asr or st, of together at most 1 s"),
    ("filter IN OUT", 1, "line 1: not a row that prepare.synth made; give the .all.jsonl file of a run"),
    ("filter gone.all.jsonl OUT", 1, "'gone.all.jsonl': No such file or directory, expected the .all.jsonl file of")])
def test_wrong_calls_end_in_one_line(call, code, message, llm, tiny_project, manifest, tmp_path, capsys):
    bare = write(tmp_path / "bare.jsonl", [asr(0, "no case", style="bare"), asr(1, "Sí.", source_language="es")])
    names = {"IN": manifest, "OUT": str(tmp_path / "out.jsonl"), "LLM": llm, "PLAIN": str(tiny_project / "llm"),
             "BARE": bare}
    with pytest.raises(SystemExit) as stopped:
        synth.main([names.get(word, word) for word in call.split()])
    said = capsys.readouterr().err if code == 2 else str(stopped.value)
    assert message in said and (stopped.value.code == code or code == 1 and isinstance(stopped.value.code, str))
    assert code == 2 or "\n" not in said and said.startswith("prepare.synth: ")
    assert not (tmp_path / "out.jsonl").exists()


def test_bare_transcripts_are_translated_only_if_told(llm, tmp_path):
    rows = [asr(0, "no case", style="bare"), asr(1, "With case.")]
    source = write(tmp_path / "in.jsonl", rows)
    for name, options in (("a", []), ("b", ["--bare"])):
        synth.main(["translate", source, str(tmp_path / f"{name}.jsonl"), "--llm", llm, "--languages", "de", *options])
    assert [len(read(tmp_path / f"{name}.all.jsonl")) for name in "ab"] == [1, 2]


def test_rows_draws_as_many_and_the_seed_which(llm, manifest, tmp_path):
    drawn = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        synth.main(["translate", manifest, str(tmp_path / f"{name}.jsonl"), "--llm", llm, "--rows", "5", "--seed", seed,
                    "--no-round-trip"])
        drawn.append({row["id"] for row in read(tmp_path / f"{name}.all.jsonl")})
    assert drawn[0] == drawn[1] != drawn[2] and {len(ids) for ids in drawn} == {5}


def test_a_transcript_beyond_the_context_is_told_and_not_written(llm, tmp_path):
    source = write(tmp_path / "in.jsonl", [asr(0, "word " * 900), asr(1, "Short.")])
    synth.main(["translate", source, str(tmp_path / "st.jsonl"), "--llm", llm, "--languages", "de"])
    reasons = {row["id"]: row["reasons"] for row in read(tmp_path / "st.all.jsonl")}
    assert reasons["1 de"] == ["too long"] and reasons["2 de"] != ["too long"]
