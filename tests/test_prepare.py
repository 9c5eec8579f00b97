"""prepare/: the demo's grammar, and the folder demo/ that was made from it."""

import random
from collections import Counter
from pathlib import Path

import pytest

from data import Manifest
from prepare.demo_grammar import LANGUAGES, REFUSALS, count_sentences, example, split_of
from prepare.errors import ManifestError
from held_out import HELD_OUT
from prepare.instructions import INSTRUCTIONS, instruction_of, language_of, task_of

DEMO = Path(__file__).resolve().parent.parent / "demo"


def test_grammar():
    assert sum(count_sentences().values()) > 1_000_000
    assert list(LANGUAGES) == ["en", "de", "it", "zh"]
    assert tuple(REFUSALS) == ("Not answerable.", "Nicht zu beantworten.", "Non è possibile rispondere.", "无法回答。")
    for split in ("train", "dev", "test"):
        random_numbers = random.Random(split)
        for _ in range(300):
            texts, facts, traps = example(random_numbers, split)
            assert split_of(texts[0]) == split and len(facts) >= 2 and traps
            for four in (texts, *traps, *(text for fact in facts for text in fact)):
                assert len(four) == 4 and all(text and "  " not in text and text == text.strip() for text in four)
            assert all(text[-1] == mark for text, mark in zip(texts, "...。"))
            assert not any("\u4e00" <= c <= "\u9fff" for text in texts[:3] for c in text)
            assert not any(c.isascii() and c.isalpha() for c in texts[3])


def test_ten_instructions_a_task_and_language():
    for task in ("asr", "st", "sqa"):
        for language in LANGUAGES:
            assert len(set(INSTRUCTIONS[task][language])) >= 10
    random_numbers = random.Random(0)
    for task, target in (("asr", "en"), ("st", "de"), ("st", "zh"), ("sqa", "it")):
        row = {"task": task, "source_language": "en", "target_language": target, "question": "Who {x}?"}
        drawn = {instruction_of(row, random_numbers) for _ in range(400)}
        assert len(drawn) > (15 if task == "sqa" else 60) and not any("{to}" in text for text in drawn)
        assert {task_of(text) for text in drawn} == {task} and {language_of(text) for text in drawn} >= {"en", "zh"} - (
            {"en", "zh"} if task == "sqa" else set())
        assert task != "sqa" or all("Who {x}?" in text for text in drawn)
        assert instruction_of(row) in drawn and instruction_of({**row, "instruction": "So"}, random_numbers) == "So"
        german = {instruction_of({**row, "source_language": "de"}, random_numbers) for _ in range(400)}
        assert not any(word in text for text in german for word in ("English", "englisch", "inglese", "英语")) or task == "sqa"
    with pytest.raises(ManifestError, match="m.jsonl line 3: prepare/instructions.json has no wording for the language 'fr'"):
        instruction_of({"task": "st", "source_language": "en", "target_language": "fr", "where": "m.jsonl line 3"})


@pytest.mark.parametrize("text, task, language", [
    ("Transcribe the English content.", "asr", "en"), ("What does the speaker say?", "asr", "en"),
    ("Please make a full transcription of the talk", "asr", "en"), ("Trascrivi tutto", "asr", "it"),
    ("Translate to German", "st", "en"), ("In German, please", "st", "en"), ("Übersetze den englischem Inhalt nach Deutsch.", "st", "de"),
    ("Traduci il contenuto inglese in italiano.", "st", "it"), ("将英文内容翻译成中文。", "st", "zh"),
    ("Answer the following question concisely given the English content: Which translation model do they use?", "sqa", "en"),
    ("Rispondi in modo conciso alla seguente domanda dato il contenuto inglese: quali sistemi di traduzione?", "sqa", "it"),
    ("Beantworte die folgende Frage kurz und bündig basierend auf dem englischen Inhalt: Nenne das Korpus.", "sqa", "de"),
    ("How many transcripts are in the corpus?", "sqa", "en"), ("Could you translate this to German?", "st", "en"),
    ("Fasse den englischen Inhalt auf Deutsch zusammen.", "sqa", "de"), ("用中文总结英文内容。", "sqa", "zh"),
    ("Wer mag Schokolade?", "sqa", "de"), ("Dove va Maria?", "sqa", "it"), ("谁喜欢奶酪？", "sqa", "zh"),
    ("What does the English speaker like?", "sqa", "en"), ("Was macht der Hund?", "sqa", "de"),
    ("根据所给的英文内容，简要回答以下问题：谁在睡觉？", "sqa", "zh"), ("Summarise the talk.", "sqa", "en"), ("xyzzy", "sqa", None)])
def test_what_an_instruction_asks_for(text, task, language):
    assert task_of(text) == task and language_of(text) == language


@pytest.mark.parametrize("language", INSTRUCTIONS["targets"])
@pytest.mark.parametrize("task", HELD_OUT)
def test_wordings_that_no_training_saw_are_told_too(task, language):
    known = {wording for key, table in INSTRUCTIONS.items() if key != "targets" for some in table.values() for wording in some}
    question = {"en": "Does Anna write the text?", "de": "Was schreibt Anna?", "it": "Che cosa scrive Anna?", "zh": "安娜写什么？"}[language]
    own = [wording for wording in HELD_OUT[task] if language_of(wording) == language]
    assert len(own) == 2 and not known & set(own)
    for wording in own:
        assert task_of(wording.format(question=question, **INSTRUCTIONS["targets"][language]["it"])) == task
    assert task_of(question) == "sqa"


@pytest.fixture(scope="module")
def splits():
    return {split: list(Manifest(DEMO / f"{split}.jsonl")) for split in ("train", "dev", "test")}


def test_demo_is_small_free_and_split_by_sentence(splits):
    assert sum(p.stat().st_size for p in DEMO.rglob("*") if p.is_file()) < 30e6
    said = {split: {row["text"] for row in rows if row["task"] == "asr"} for split, rows in splits.items()}
    assert not said["train"] & said["dev"] and not said["train"] & said["test"] and not said["dev"] & said["test"]
    voices = {split: {row["speaker"] for row in rows} for split, rows in splits.items()}
    assert "flite-rms" in voices["test"] and "flite-rms" not in voices["train"] | voices["dev"]
    for rows in splits.values():
        assert {(row["licence"], row["corpus"], row["source_language"]) for row in rows} == {("CC0-1.0", "demo", "en")}
        clips = Counter(row["task"] for row in rows)
        assert clips["st"] == 3 * clips["asr"] and clips["sqa"] == 2 * clips["asr"]
        refused = [row["text"] in REFUSALS for row in rows if row["task"] == "sqa"]
        assert 0.15 < sum(refused) / len(refused) < 0.35


def test_demo_audio_is_what_the_manifests_say(splits):
    for split, rows in splits.items():
        manifest = Manifest(DEMO / f"{split}.jsonl")
        for row in random.Random(0).sample([row for row in rows if row["task"] == "asr"], 25):
            wave = manifest.audio(row)
            assert len(wave) / 16000 == pytest.approx(row["duration"], abs=0.001)
            assert wave.abs().max() > 0.1 and 1 < row["duration"] < 6
