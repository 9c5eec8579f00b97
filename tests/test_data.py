"""data.py from manifests to batches: rows, instructions, licences, mixtures, sequences, schedules;
and the corpus of the demo."""

import itertools
import json
import pickle
import random
import re
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data
from conftest import ESCAPES, ROOT, refused
from data import (
    INSTRUCTIONS,
    Examples,
    Manifest,
    instruction_of,
    make_prompt,
    open_mixture,
    recognise,
    render,
)
from demo.grammar import LANGUAGES, count_sentences, example, split_of
from model import AUDIO, AdapterConfig, load_tokenizer

TERMINAL = "\x1b]0;owned\x07\x1b[2J\u202etxt.exe\x9b31m"  # would set the title, clear the screen
GOOD = {"audio": "a.wav", "text": "Hallo", "task": "asr"}
FREE = GOOD | {"corpus": "tones", "licence": "CC0-1.0", "duration": 1.0}


def write_rows(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------
# Files


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "x.json"
    data.write_text(path, "old 中")
    for error, raised in ((RuntimeError("no"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def save(file, error=error):
            file.write(b"half")
            raise error

        with pytest.raises(raised):
            data.write_atomically(path, save)
        assert path.read_text(encoding="utf-8") == "old 中" and list(tmp_path.iterdir()) == [path]


def test_half_a_line_is_passed_over(tmp_path):
    assert data.read_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert data.read_lines(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


# ------------------------------------------------------------------------------
# Manifests


def test_examples_of_a_manifest(tmp_path):
    chinese = GOOD | {"text": "你好", "task": "st", "target_language": "zh", "start": 1.5}
    path = write_rows(tmp_path / "m.jsonl", GOOD, "", chinese, "\r")
    path.write_text(path.read_text() + json.dumps(GOOD))  # no newline at its end
    manifest = Manifest(path)
    assert [example["text"] for example in manifest] == ["Hallo", "你好", "Hallo"]
    assert len(manifest) == 3 and list(manifest) == [manifest[i] for i in range(3)]
    assert manifest[1]["where"] == f"{path} line 3" and manifest[1]["start"] == 1.5
    languages = {"source_language": "en", "target_language": "en"}
    assert manifest[0] == data.EXAMPLE | languages | GOOD | {"where": f"{path} line 1"}
    part = manifest.select([2, 1])
    assert [example["where"][-1] for example in part] == ["3", "5"] and len(manifest) == 3


@pytest.mark.parametrize(
    "row, message",
    [
        ("{oops", "Expecting property name.*; expected one JSON object a line"),
        ("[1]", "found a list; expected one JSON object a line"),
        ("[" * 99999, ".*recursion.*; expected one JSON object a line"),
        (GOOD | {"text": ""}, "text is '', expected text; mend or remove the row"),
        ({"audio": "a.wav", "task": "asr"}, "text is None"),
        (GOOD | {"text": "\ud800"}, "text is .*, expected text"),
        (GOOD | {"audio": 5}, "audio is 5"),
        (GOOD | {"task": "tts" * 99999}, "task is 'tts.{1,40}', expected one of asr, st, sqa"),
        (GOOD | {"task": "sqa"}, "question is None, expected text"),
        (GOOD | {"start": -1}, "start is -1, expected a number of seconds"),
        (GOOD | {"duration": "3"}, "duration is '3'"),
        (GOOD | {"duration": float("inf")}, "duration is inf"),
        (GOOD | {"duration": True}, "duration is True"),
        (GOOD | {"target_language": ["de"]}, "target_language is ..de.., expected a code such as"),
        (GOOD | {"source_language": "German"}, "source_language is 'German', expected a code su"),
        (
            GOOD | {"lang": "de", "target_lang": "en"},
            "target_language is 'en', expected 'de', the source_language",
        ),
        (GOOD | {"task": "st"}, "target_language is 'en', expected another than 'en', the so"),
        (GOOD | {"instruction": 5}, "instruction is 5, expected text"),
        (GOOD | {"style": "shouted"}, "style is 'shouted', expected written or bare"),
        (GOOD | {"sources": ["CC0-1.0"]}, "sources is .*, expected a list of .corpus, licence."),
        (GOOD | {"sources": [["c", 1]]}, "sources is .*, expected a list of .corpus, licence."),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    manifest = Manifest(write_rows(tmp_path / "m.jsonl", GOOD, row))
    for read in (lambda: manifest[1], lambda: list(manifest)):
        refused(f"m.jsonl line 2: {message}", read)


@pytest.mark.parametrize(
    "codes, canonical",
    [
        ("zh zh-CN zh_TW ZH zh-Hans-CN cmn cmn_hans_cn zho zh-HK", "zh"),
        ("en EN en-US en_us eng En-gb", "en"),
        ("de de-AT deu ger DE_ch", "de"),
        ("yue yue-HK", "yue"),
        ("ja ja-JP jpn jp", "ja"),
        ("pt-BR por", "pt"),
        ("German 中文 e x1 en1 chinese-simplified", None),
    ],
)
def test_language_codes(codes, canonical):
    assert {data.language_code(code) for code in codes.split()} == {canonical}


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, "asr en en"),
        ({"source_language": "de-DE"}, "asr de de"),
        ({"target_language": "it"}, "asr it it"),
        ({"source_language": "zh_TW", "target_language": "zh-CN"}, "asr zh zh"),
        ({"task": "st", "target_language": "ZH"}, "st en zh"),
        ({"task": "sqa", "question": "Wer?", "source_language": "de"}, "sqa de de"),
        ({"task": "sqa", "question": "Wer?", "target_language": "de"}, "sqa en de"),
        ({"task": None, "target_language": "de"}, "st en de"),
        ({"task": None, "source_language": "de"}, "asr de de"),
        ({"task": None, "question": "Who?"}, "sqa en en"),
    ],
)
def test_languages_and_task_that_a_row_leaves_open(fields, expected):
    example = data.parse_example(json.dumps(GOOD | fields), "m.jsonl line 1")
    assert [example[key] for key in ("task", "source_language", "target_language")] == (
        expected.split()
    )


def test_manifests_of_other_people(tmp_path):
    """NeMo's for recognition and for translation, and the metadata of a folder of audio."""
    part = {"offset": 1.5, "duration": 0.5}
    rows = [
        {"audio_filepath": "a.wav", "text": "hi", "lang": "en-US", "pnc": "no"} | part,
        {"audio_filepath": "a.wav", "answer": "Ja", "source_lang": "en", "target_lang": "de"},
        {"file_name": "b/c.flac", "transcription": "hi", "license": "CC-BY-4.0", "speaker": ""},
    ]
    both = {"answer": "no", "text": "hi", "audio": "a.wav"}
    message = "m.jsonl line 1: text is another text than there is; keep one of them"
    refused(message, data.parse_example, json.dumps(both), "m.jsonl line 1")
    nemo, translated, folder = Manifest(write_rows(tmp_path / "m.json", *rows))
    assert (nemo["audio"], nemo["start"], nemo["duration"]) == ("a.wav", 1.5, 0.5)
    assert nemo["task"] == "asr" and nemo["source_language"] == "en"
    assert (translated["task"], translated["text"], translated["target_language"]) == (
        "st",
        "Ja",
        "de",
    )
    assert (folder["audio"], folder["licence"], folder["speaker"]) == (
        "b/c.flac",
        "CC-BY-4.0",
        "unknown",
    )


def test_empty_fields_count_as_absent():
    empty = dict.fromkeys("speaker corpus licence instruction style lang duration".split(), " ")
    example = data.parse_example(json.dumps(GOOD | empty), "m.jsonl line 1")
    plain = data.parse_example(json.dumps(GOOD), "m.jsonl line 1")
    assert example == plain and example["style"] == "written"


def test_the_content_of_a_manifest(tmp_path):
    first, same, other = (
        Manifest(write_rows(tmp_path / name, GOOD, GOOD | {"text": text})).content
        for name, text in (("a.jsonl", "x"), ("b.jsonl", "x"), ("c.jsonl", "y"))
    )
    assert first == same and first[0] == other[0] == 2 and first[1] != other[1]


def test_blank_lines_are_passed_over(tmp_path):
    manifest = Manifest(write_rows(tmp_path / "m.jsonl", "", GOOD, "    ", "\t\r", GOOD))
    assert [example["where"][-1] for example in manifest] == ["2", "5"]
    message = "m.jsonl line 1: .*; expected one JSON object a line, in UTF-8"
    (tmp_path / "m.jsonl").write_bytes(f"{json.dumps(GOOD)}\n{{}}\n".encode("utf-16"))
    refused(message, lambda: Manifest(tmp_path / "m.jsonl")[0])


def test_what_is_no_manifest(tmp_path):
    refused("none.jsonl: No such file or directory; give", Manifest, tmp_path / "none.jsonl")
    write_rows(tmp_path / "empty.jsonl", "")
    refused("empty.jsonl: found no rows", Manifest, tmp_path / "empty.jsonl")


def test_audio_of_examples(tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 32000).astype("float32")
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    part = GOOD | {"start": 1, "duration": 0.75}
    rows = [part, part | {"duration": None}, part | {"duration": 0.25}, GOOD | {"audio": "no.wav"}]
    manifest = Manifest(write_rows(tmp_path / "m.jsonl", *rows))
    assert [manifest.seconds(example) for example in manifest] == [0.75, 1.0, 0.25, 0.0]
    assert np.array_equal(manifest.audio(manifest[0]), wave[16000:28000])
    assert np.array_equal(manifest.audio(manifest[1]), wave[16000:])
    short = manifest.audio(manifest[2])
    assert np.array_equal(short[:4000], wave[16000:20000]) and len(short) == 8000
    refused("no.wav: no such file", manifest.audio, manifest[3], kind=data.AudioError)


# ------------------------------------------------------------------------------
# Instructions


@pytest.mark.parametrize("task, target", [("asr", "en"), ("st", "de"), ("st", "zh"), ("sqa", "it")])
def test_instructions_are_drawn_from_the_wordings(task, target):
    example = {"task": task, "source_language": "en", "target_language": target}
    example["question"] = "Who {x}?"
    assert all(len(set(choices)) >= 10 for choices in INSTRUCTIONS[task].values())
    rng = random.Random(0)
    drawn = {instruction_of(example, rng) for _ in range(400)}
    assert len(drawn) > (15 if task == "sqa" else 60) and instruction_of(example) in drawn
    assert {recognise(text)[0] for text in drawn} == {task}
    if task == "sqa":
        assert all("Who {x}?" in text for text in drawn)
    else:
        assert not any("{" in text for text in drawn)
        german = {instruction_of(example | {"source_language": "de"}, rng) for _ in range(400)}
        names = ("English", "englisch", "inglese", "英语", "英文")
        assert not any(name in text for text in german for name in names)
    assert instruction_of(example | {"instruction": "So"}, rng) == "So"


def test_bare_transcripts_are_asked_for_as_such():
    example = {"task": "asr", "source_language": "en", "target_language": "en"}
    bare = INSTRUCTIONS["asr bare"]
    tables = [INSTRUCTIONS["asr"], INSTRUCTIONS["asr of English"]]
    written = {wording for table in tables for choices in table.values() for wording in choices}
    assert instruction_of(example | {"style": "bare"}) == bare["en"][0]
    assert instruction_of(example) in written
    assert instruction_of(example | {"target_language": "fr"}) in written  # of any language
    for choices in bare.values():
        assert len(set(choices)) >= 10 and not written & set(choices)
        assert {recognise(wording)[0] for wording in choices} == {"asr"}


ASKED = {
    "asr": ["Transcribe the English speech.", "  transcribe THE English speech "],
    "st": ["Translate to German", "将英语内容翻译成中文。"],
    "sqa": ["Answer the question: Name the corpus", "Which model do they use?", "谁喜欢奶酪？"],
    None: ["Summarise the talk.", "xyzzy", ""],
}


def test_what_an_instruction_asks_for():
    for task, texts in ASKED.items():
        assert {recognise(text)[0] for text in texts} == {task}


# ------------------------------------------------------------------------------
# Licences


TAKEN = """CC0-1.0|PDDL-1.0|public domain|LicenseRef-PublicDomain|MIT|Apache-2.0|CC-BY-4.0|CC-BY
CC-BY-2.5-AU|cc-by-3.0|CC-BY-4.0 AND MIT|GPL-3.0-only OR MIT|(MIT OR GPL-3.0-only)"""
REFUSED = """CC-BY-SA-4.0|CC-BY-NC-4.0|CC-BY-ND-4.0|CC-BY-NC-SA-4.0|CC-BY-4.0-NC|unknown|
GPL-3.0-only|LicenseRef-MIT-like|CC-BY-4.0 AND CC-BY-NC-4.0
(MIT OR CC-BY-4.0) AND CC-BY-NC-4.0|CC-BY-NC-4.0 AND (MIT OR CC-BY-4.0)"""


def test_what_training_takes():
    assert all(data.accepted(licence) for licence in re.split("[|\n]", TAKEN))
    assert not any(data.accepted(licence) for licence in re.split("[|\n]", REFUSED))


def test_a_named_licence_is_taken_and_no_other():
    allowed = ("CC-BY-SA-4.0",)
    assert data.accepted("CC-BY-SA-4.0", allowed) and data.accepted(
        "CC-BY-SA-4.0 AND CC-BY-4.0", allowed
    )
    assert not data.accepted("CC-BY-SA-3.0", allowed)
    assert not data.accepted("CC-BY-SA-4.0 AND CC-BY-NC-4.0", allowed)


def test_texts_of_test_only_corpora_are_refused_by_their_hashes(tmp_path):
    secret = "We present a corpus of talks, and it is for testing."
    texts = (secret, "What is it?", "一个用于测试的语料库", "one two")
    lines = [data.text_hash(text) for text in texts]
    (tmp_path / "mcif.fingerprints").write_text("\n".join(lines) + "\n")
    hashes = data.protected_hashes([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert hashes == set(lines) and not data.protected_hashes([tmp_path.parent / "c.jsonl"])

    def check(**fields):
        line = json.dumps(FREE | fields)
        data.check_licence(data.parse_example(line, "m.jsonl line 7"), (), hashes)

    # The corpus that a row claims to be from does not matter, nor do case and punctuation.
    protected = [
        {"text": "we present a corpus of talks and it is for TESTING"},
        {"text": "一个用于测试的语料库。"},
        {"task": "sqa", "question": secret, "text": "Yes."},
    ]
    for fields in protected:
        refused("m.jsonl line 7: '.*' is of a test-only corpus", lambda x=fields: check(**x))
    check(text="We present a corpus.")
    check(text="one two")  # too short to tell where it is from
    check(task="sqa", question="What is it?", text=secret)
    (tmp_path / "mcif.fingerprints").write_bytes(b"\xff\xfe")
    refused("mcif.fingerprints: .*; convert", data.protected_hashes, [tmp_path / "a.jsonl"])


def test_the_notice_lists_every_corpus():
    # Two phases see the same recordings, so that their hours are not added up.
    align = [["tones", "MIT", "en", 1800], ["demo", "CC0-1.0", "en", 36]]
    ift = [["tones", "MIT", "en", 900], ["tones", "MIT", "de", 3600]]
    hours = data.merge_hours(align, ift + [["librispeech", "CC-BY-4.0", "en", 5]])
    assert ["tones", "MIT", "en", 1800] in hours and len(hours) == 4
    text = data.notice(hours)
    assert "tones, MIT: 1.00 h into de, 0.50 h into en\n  no attribution is on record" in text
    assert "demo, CC0-1.0: 0.01 h into en\n  needs no attribution" in text
    assert "librispeech, CC-BY-4.0: 0.00 h into en\n  LibriSpeech, by Vassil Panayotov" in text


# ------------------------------------------------------------------------------
# The mixture


@pytest.fixture
def mixture(tmp_path):
    """A manifest of 4 rows of asr, 34 of st into two languages and 2 of sqa; another for dev."""
    targets = ["de"] * 32 + ["zh"] * 2
    st = [FREE | {"task": "st", "target_language": target} for target in targets]
    sqa = [FREE | {"task": "sqa", "question": "Who?", "duration": 40}] * 2
    train = write_rows(tmp_path / "train.jsonl", *[FREE] * 4, *st, *sqa)
    dev = write_rows(tmp_path / "dev.jsonl", st[0], FREE, sqa[0], st[-1])
    return str(train), str(dev)


def test_tasks_and_languages_are_drawn_by_temperature(mixture, capsys):
    train, dev = mixture
    roots = [2, 2**0.5, 32**0.5, 2**0.5]
    for temperature, shares in ((1, [4, 2, 32, 2]), (2, roots), (1e9, [1, 1, 1, 1])):
        opened = open_mixture([train], dev, data.TASKS, temperature=temperature)
        assert [len(manifest) for manifest in opened.manifests] == [4, 2, 32, 2]
        drawn = np.array(opened.weights) / sum(opened.weights)
        assert np.allclose(drawn, np.array(shares) / sum(shares))
    assert "data: st into de: 32 rows, 25.0 % of those drawn" in capsys.readouterr().out
    assert [example["task"] for example in opened.dev] == ["st", "asr", "sqa", "st"]
    assert opened.longest == 40 and ["tones", "CC0-1.0", "de", 32] in opened.hours
    assert opened.contents == [
        (train, *Manifest(train).content, 1.0),
        (dev, *Manifest(dev).content, 1.0),
    ]


def test_weights_of_manifests(mixture):
    train, dev = mixture
    double = open_mixture([train, f"{train}=2"], dev, ("st",))
    assert double.weights == [32, 2, 64, 4]
    thrice = open_mixture([train] * 3, dev, ("st",), temperature=2)
    single = open_mixture([f"{train}=3"], dev, ("st",), temperature=2)
    assert np.allclose(np.reshape(thrice.weights, (3, 2)).sum(0), single.weights)
    refused("a manifest of weight 0; leave it out", open_mixture, [f"{train}=0.0"], dev, ("st",))


LICENCE = "the corpus '{}' has the licence '{}', .* --allow-licence '{}'"
SQUAD = ["squad", "CC-BY-SA-4.0"]
FRENCH = {"task": "st", "target_language": "fr"}
UNFIT = [
    ({"licence": "CC-BY-NC-4.0"}, LICENCE.format("tones", "CC-BY-NC-4.0", "CC-BY-NC-4.0")),
    ({"licence": None}, LICENCE.format("tones", "unknown", "unknown")),
    ({"sources": [["tones", "MIT"], SQUAD]}, LICENCE.format(*SQUAD, "CC-BY-SA-4.0")),
    ({"test_only": True}, "the corpus 'tones' is for testing only; leave the row out"),
    (FRENCH, "demo/instructions.json has no wording for the language 'fr'; add it there"),
]


@pytest.mark.parametrize("fields, message", UNFIT)
def test_one_refused_row_stops_a_run(mixture, tmp_path, fields, message):
    train, dev = mixture
    bad = str(write_rows(tmp_path / "bad.jsonl", FREE, FREE, FREE | fields))
    for paths in (([train, bad], dev), ([train], bad)):
        refused(f"bad.jsonl line 3: {message}", open_mixture, *paths, data.TASKS)


def test_all_refused_licences_are_named_at_once(mixture, tmp_path):
    train, dev = mixture
    rows = [FREE | {"licence": f"CC-BY-NC-{n}"} for n in ("4.0", "3.0", "4.0")]
    bad = str(write_rows(tmp_path / "bad.jsonl", *rows, FREE | {"sources": [SQUAD]}))
    text = refused(
        "--allow-licence 'CC-BY-NC-4.0' 'CC-BY-NC-3.0' 'CC-BY-SA-4.0'$",
        lambda: open_mixture([train, bad], dev, data.TASKS),
    )
    for line in (1, 2, 4):
        assert f"bad.jsonl line {line}: the corpus" in text
    assert "line 3" not in text


def test_rows_too_long_are_left_out_counted_and_named(mixture, tmp_path, capsys, tiny_project):
    train, dev = mixture
    tokenizer = load_tokenizer(tiny_project / "llm")
    limits = make_prompt(tokenizer, [0]), AdapterConfig(), 30, 300
    long = FREE | {"text": "six " * 300}
    # Without the audio's frames, this one would fit.
    middle = FREE | {"duration": 20, "text": "一" * 60}
    rows = [long, FREE, FREE | {"duration": 31}, middle, FREE | {"duration": 20}]
    path = str(write_rows(tmp_path / "long.jsonl", *rows))

    def excess(example, seconds):
        return data.find_excess(example, seconds, tokenizer, *limits)

    opened = open_mixture([path], dev, ("asr", "st"), excess=excess)
    assert [example["where"][-1] for example in opened.manifests[0]] == ["2", "5"]
    assert opened.longest == 20 and opened.hours == [["tones", "CC0-1.0", "en", 21]]
    output = capsys.readouterr().out
    assert "data: 3 rows are left out: " in output and "line 3: 31.0 s of audio, exp" in output
    assert re.search("line 1: [0-9,]+ LLM positions, expected at most 300 by the LLM", output)
    assert "long.jsonl line 4: " in output
    nothing = str(write_rows(tmp_path / "none.jsonl", long, long))
    message = "none.jsonl: 0 rows of the tasks this phase trains, asr"
    refused(message, lambda: open_mixture([path], nothing, ("asr",), excess=excess))


def test_only_rows_of_the_tasks_are_looked_at(mixture, tmp_path):
    train, _ = mixture
    question = FREE | {"task": "sqa", "question": "Who?", "licence": "unknown"}
    bad = str(write_rows(tmp_path / "bad.jsonl", FREE, FREE, question))
    assert [len(manifest) for manifest in open_mixture([bad], bad, ("asr", "st")).manifests] == [2]
    assert len(open_mixture([bad], bad, data.TASKS, ("unknown",)).manifests) == 2
    message = "bad.jsonl: 0 rows of the tasks this phase trains, st, expected at least"
    refused(f"{message} 1", open_mixture, [bad], bad, ("st",))
    refused(f"{message} 2", open_mixture, [train], bad, ("st",))


def test_names_of_corpora_are_printed_safely(tmp_path, capsys):
    bad = str(write_rows(tmp_path / "m.jsonl", *[FREE | {"corpus": TERMINAL}] * 2))
    open_mixture([bad], bad, ("asr",))
    printed = capsys.readouterr().out
    assert "\\u001b]0;owned\\u0007" in printed and not ESCAPES.search(printed)


# ------------------------------------------------------------------------------
# Sequences


def letter_tokenizer(begin=False):
    """A tokenizer whose ids are ASCII codes, with or without a begin token."""
    vocabulary = {chr(code): code for code in range(128)} | {"<s>": 128}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begin:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 128)])
        tokenizer.post_processor = template
    return tokenizer


def test_rendered_sequences_exactly():
    tokenizer = letter_tokenizer()
    row = GOOD | {"source_language": "en", "target_language": "de", "text": "ja"}
    st = row | {"task": "st"}
    sqa = row | {"task": "sqa", "question": "Wer?"}
    prompt = make_prompt(tokenizer, [0])

    def codes(text):
        return [ord(character) for character in text]

    asked = codes("\nTranscribe the speech.\n")
    assert render(row, 3, tokenizer, prompt) == ([AUDIO] * 3 + asked + codes("ja") + [0], 3)
    other = letter_tokenizer(begin=True)
    with_begin = render(row, 1, other, make_prompt(other, [9]))
    assert with_begin == ([128, AUDIO] + asked + codes("ja") + [9], 3)
    assert render(row | {"text": None}, 2, tokenizer, prompt) == ([AUDIO] * 2 + asked, 0)
    instructed = render(row | {"instruction": "Say it"}, 1, tokenizer, prompt)
    assert instructed == ([AUDIO] + codes("\nSay it\nja") + [0], 3)
    translated = codes("\nTranslate the speech to German.\nja")
    assert render(st, 0, tokenizer, prompt)[0] == translated + [0]
    answered = codes("\nBeantworte die Frage: Wer?\nja")
    assert render(sqa, 0, tokenizer, prompt)[0] == answered + [0]


CHAT_FORMS = {
    "<|im_end|>": (
        ["<|im_start|>", "user\n", AUDIO, "\nHi <|im_end|>", "<|im_end|>", "\n"]
        + ["<|im_start|>", "assistant\n", "ja", "<|im_end|>"]
    ),
    "<|eot_id|>": (
        ["<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", AUDIO, "\nHi <|im_end|>"]
        + ["<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"]
        + ["ja", "<|eot_id|>"]
    ),
}


@pytest.mark.parametrize("end", CHAT_FORMS)
def test_chat_prompts_exactly(end):
    """Turns are marked by special tokens, which an instruction cannot write itself."""
    tokenizer = letter_tokenizer()
    special = list(dict.fromkeys(x for x in CHAT_FORMS[end] if x != AUDIO and x[:2] == "<|"))
    tokenizer.add_special_tokens(special)
    turn_end = tokenizer.token_to_id(end)
    expected = []
    for part in CHAT_FORMS[end]:
        if part in special:
            expected.append(tokenizer.token_to_id(part))
        else:
            expected += [AUDIO] if part == AUDIO else map(ord, part)
    row = GOOD | {"text": "ja", "instruction": "Hi <|im_end|>"}
    for kind, end_ids in (("auto", [5, turn_end]), ("chat", [5])):
        prompt = make_prompt(tokenizer, end_ids, kind)
        assert prompt.kind == "chat"
        assert render(row, 1, tokenizer, prompt) == (expected, 3)
    # A base model knows the tokens, too, but does not end its answers by them.
    assert make_prompt(tokenizer, [5]) == ("plain", [], "\n", [], 5)
    assert make_prompt(tokenizer, [turn_end], "plain").kind == "plain"
    refused("--prompt chat: the tokenizer", make_prompt, letter_tokenizer(), [0], "chat")


def byte_tokenizer(template=None):
    """A byte-level tokenizer with the special tokens <s> 1 and </s> 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0, "<s>": 1} | {c: i for i, c in enumerate(alphabet, 2)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["</s>", "<s>"])
    if template:
        special = [("<s>", 1), ("</s>", 0)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    return tokenizer


@pytest.mark.parametrize(
    "template, begin", [(None, []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", [])]
)
def test_no_special_token_comes_by_the_back_door(template, begin):
    """Neither an end token out of a template, nor one that a text or an instruction spells."""
    tokenizer = byte_tokenizer(template)
    prompt = make_prompt(tokenizer, [0])
    row = GOOD | {"source_language": "en", "target_language": "en", "text": "a</s><s>"}
    ids, answer = render(row | {"instruction": "<s>Say</s>?"}, 2, tokenizer, prompt)
    assert ids[: len(begin) + 2] == [*begin, AUDIO, AUDIO] and ids[-1] == 0
    assert not {0, 1} & set(ids[len(begin) : -1]) and answer == len("a</s><s>") + 1
    # A tokenizer that was sent to another process is the same.
    other = pickle.loads(pickle.dumps(tokenizer))
    assert render(row | {"instruction": "<s>Say</s>?"}, 2, other, prompt) == (ids, answer)


def test_collate_marks_exactly_the_answers():
    sequences = [
        ([5, 6, 7, 8], 2, torch.ones(3, 160)),
        ([1, 2, 3, 4, 5, 6], 3, torch.ones(5, 160)),
        ([9, 8], 1, torch.ones(1, 160)),
    ]
    batch = data.collate(sequences)
    assert batch["features"].shape == (9, 160) and batch["lengths"] == [3, 5, 1]
    assert batch["ids"].tolist() == [5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 9, 8]
    assert batch["ids_lengths"] == [4, 6, 2] and batch["targets"].tolist() == [2, 3, 7, 8, 9, 11]


def test_joined_texts():
    assert data.join_texts(["One two.", " three", "", "four "]) == "One two. three four"
    assert data.join_texts(["你好。", "世界", "ok", "再见"]) == "你好。世界ok 再见"
    assert data.join_texts([]) == data.join_texts(["", " "]) == ""


# ------------------------------------------------------------------------------
# Batches


class Sized(list):
    """Stands for a manifest: a list of (frames, tokens)."""


def random_sizes(count, seed=0):
    lengths = np.random.default_rng(seed).integers(10, 500, count)
    return Sized((int(n), 5) for n in lengths)


def batches(manifests, weights, count, position=None, seed=0, frames=3000, tokens=10**6):
    def size(m, i, turn):
        return manifests[m][i]

    stream = data.schedule(manifests, weights, size, frames, tokens, seed, position)
    return list(itertools.islice(stream, count))


def test_budgets_are_used_and_never_exceeded():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.7, 20000).clip(10, 1500).astype(int)
    rows = Sized((int(n), int(n) // 4 + 20) for n in lengths)
    used = []
    for _, batch in batches([rows], [1], 3000, frames=6000, tokens=3000):
        frames = sum(rows[i][0] for _, i, _ in batch)
        tokens = sum(rows[i][1] for _, i, _ in batch)
        used.append(max(frames / 6000, tokens / 3000))
    assert max(used) <= 1 and np.mean(used) > 0.9
    sizes = [(9, 1, "a"), (5000, 1, "b"), (50, 6, "c"), (50, 5, "d"), (1, 1, "e")]
    assert data.cut_batches(sizes, 100, 10) == [["a"], ["b"], ["c"], ["d", "e"]]


def test_every_row_comes_once_an_epoch_in_a_new_order():
    rows = random_sizes(9000)
    drawn = [key for _, batch in batches([rows], [1], 1800) for key in batch][:18000]
    assert len(drawn) == 18000 and {turn for _, _, turn in drawn} == {0, 1, 2}
    first = [i for _, i, turn in drawn if turn == 0]
    second = [i for _, i, turn in drawn if turn == 1]
    assert sorted(first) == list(range(9000)) and first != second
    # Two pools of the first turn hold no row twice.
    assert len({i for _, i, _ in drawn[:8192]}) == 8192
    assert batches([rows], [1], 50, seed=1) != batches([rows], [1], 50, seed=2)


def test_weights_mix_manifests():
    manifests = [Sized([(100, 5)] * 700), Sized([(100, 5)] * 300)]
    drawn = [m for _, batch in batches(manifests, [1, 3], 400) for m, _, _ in batch]
    assert np.mean(drawn) == pytest.approx(0.75, abs=0.03)


def test_any_position_continues_exactly():
    manifests = [random_sizes(600, m) for m in range(2)]
    expected = batches(manifests, [2, 1], 120)
    for stop in (0, 1, 17, 60, 119):
        position = json.loads(json.dumps(expected[stop][0]))
        again = batches(manifests, [2, 1], 119 - stop, position)
        assert again == expected[stop + 1 :]


@pytest.fixture
def examples(tiny_project, tmp_path):
    """Examples of four rows, of which only the first can be used."""
    for name in ("train0.wav", "train1.wav"):
        (tmp_path / name).write_bytes((tiny_project / name).read_bytes())
    (tmp_path / "bad.wav").write_text("not audio")
    files = {"train0.wav": 0.25, "bad.wav": 1, "train1.wav": 99, "no.wav": 1}
    rows = [GOOD | {"audio": audio, "duration": duration} for audio, duration in files.items()]
    manifest = Manifest(write_rows(tmp_path / "m.jsonl", *rows))
    tokenizer = load_tokenizer(tiny_project / "llm")
    return Examples([manifest], tokenizer, make_prompt(tokenizer, [0]), AdapterConfig())


def test_bad_recordings_are_left_out_and_named(examples):
    position = {"pool": 0, "batch": 0}
    batch = examples[position, [(0, i, 0) for i in range(4)]]
    assert [example["audio"] for example in batch["examples"]] == ["train0.wav"]
    assert len(batch["ids_lengths"]) == 1 and batch["position"] == position
    wheres = [where.split()[-1] for where, _ in batch["bad"]]
    reasons = [
        "content that starts with",
        "expected 99.00 s by its header or the man",
        "no such file",
    ]
    assert wheres == ["2", "3", "4"]
    assert all(reason in text for reason, (_, text) in zip(reasons, batch["bad"], strict=True))
    # A batch of nothing but bad recordings is silence, of which nothing is to be learned.
    batch = examples[position, [(0, 1, 0)]]
    assert batch["examples"] == [] and len(batch["targets"]) == 0
    assert batch["features"].shape == (1, 160) and batch["ids_lengths"] == [2]


def test_scheduled_sizes_are_those_of_the_batches(examples):
    sizes = []
    for turn in range(9):
        batch = examples[{}, [(0, 0, turn)]]
        sizes.append((batch["lengths"][0], len(batch["ids"])))
        assert examples.size(0, 0, turn) == sizes[-1]
    # Every turn has another wording of the instruction, the same whenever it is drawn.
    assert len(set(sizes)) > 2 and {frames for frames, _ in sizes} == {24}
    assert examples.example(0, 0, 5) == examples.example(0, 0, 5)


def test_states_take_the_place_of_features(examples):
    states = torch.randn(24, 1024)
    clips = []
    examples.states = lambda clip: clips.append(clip) or states
    batch = examples[{}, [(0, 0, 0)]]
    assert torch.equal(batch["features"], states)
    assert clips == [(str(examples.manifests[0].path.parent / "train0.wav"), 0.0, 0.25)]

    def fail(clip):
        raise data.AudioError("none")

    examples.states = fail
    batch = examples[{}, [(0, 2, 0)]]
    assert batch["features"].shape == (1, 1024) and len(batch["bad"]) == 1


# ------------------------------------------------------------------------------
# The demo's corpus


def test_grammar():
    assert sum(count_sentences().values()) > 1_000_000
    assert list(LANGUAGES) == list(data.REFUSALS) == ["en", "de", "it", "zh"]
    for split in ("train", "dev", "test"):
        rng = random.Random(split)
        for _ in range(100):
            sentence, facts, traps = example(rng, split)
            assert split_of(sentence[0]) == split and len(facts) >= 2 and traps
            check_texts([sentence, *traps, *itertools.chain(*facts)])
            assert [text[-1] for text in sentence] == list("...。")


def check_texts(groups):
    for texts in groups:
        assert len(texts) == 4 and all(texts)
        assert all(text == " ".join(text.split()) for text in texts)
        assert not any("\u4e00" <= character <= "\u9fff" for character in "".join(texts[:3]))
        assert not any(character.isascii() and character.isalpha() for character in texts[3])


@pytest.fixture(scope="module")
def splits():
    return {split: Manifest(ROOT / "demo" / f"{split}.jsonl") for split in ("train", "dev", "test")}


def test_demo_is_small_free_and_split_by_sentence(splits):
    files = [path for path in (ROOT / "demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    texts, voices = {}, {}
    for split, manifest in splits.items():
        rows = list(manifest)
        texts[split] = {row["text"] for row in rows if row["task"] == "asr"}
        voices[split] = {row["speaker"] for row in rows}
        origins = {(row["licence"], row["corpus"], row["source_language"]) for row in rows}
        assert origins == {("CC0-1.0", "demo", "en")}
        counts = Counter(row["task"] for row in rows)
        assert counts["st"] == 3 * counts["asr"] and counts["sqa"] == 2 * counts["asr"]
        answers = [row["text"] for row in rows if row["task"] == "sqa"]
        refusals = sum(answer in data.REFUSALS.values() for answer in answers)
        assert 0.15 < refusals / len(answers) < 0.35
    for one, other in itertools.combinations(texts.values(), 2):
        assert not one & other
    assert "flite-rms" in voices["test"] and "flite-rms" not in voices["train"] | voices["dev"]


def test_demo_audio_is_what_the_manifests_say(splits):
    for manifest in splits.values():
        for i in random.Random(0).sample(range(len(manifest)), 20):
            row = manifest[i]
            wave = manifest.audio(row)
            assert len(wave) / 16000 == pytest.approx(row["duration"], abs=0.001)
            assert wave.abs().max() > 0.1 and 1 < row["duration"] < 6
