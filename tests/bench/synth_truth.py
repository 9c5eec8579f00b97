"""What prepare.synth wrote about the demo's transcripts, against the truth of the grammar.

    python -m prepare.synth translate demo/train.jsonl out/st.jsonl --llm demo/llm \
        --languages de it zh --no-round-trip --threshold log_p=-0.03
    python tests/bench/synth_truth.py train out/st.all.jsonl
    python -m prepare.synth questions demo/train.jsonl out/sqa.jsonl --llm demo/llm \
        --questions demo/train.jsonl --unanswerable 0.4
    python tests/bench/synth_truth.py train out/sqa.all.jsonl

The demo's LLM reads English only, so it cannot translate back, nor can it write questions.
"""

import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from demo import make
from demo.grammar import LANGUAGES, example
from prepare.filters import read_made


def draw_sentences(split: str) -> dict:
    """{English sentence: (texts in all languages, {question: answer})} of a split of the corpus.

    They are drawn as demo.make drew them. Its engines run without their programs, for the random
    numbers that speaking took.
    """
    make.run = lambda *command: None
    sentences = {}
    for name, files in make.CORPUS.items():
        if name.split("-")[0] != split:
            continue
        for index in range(files):
            rng = random.Random(f"{name} {index}")
            for _ in range(make.CLIPS_PER_FILE):
                texts, facts, _ = example(rng, split)
                voice = make.TEST_VOICE if name == "test-rms" else make.draw_voice(rng, name)
                engine, speaker = voice.split("-", 1)
                make.ENGINES[engine](texts[make.EN], speaker, "", rng)
                answers = {}
                for questions, replies in facts:
                    answers.update(zip(questions, replies, strict=True))
                sentences[texts[make.EN]] = texts, answers
    return sentences


def is_right(written: dict, sentences: dict) -> bool:
    made_by = written["made_by"]
    texts, answers = sentences[made_by["transcript"]]
    if made_by["kind"] == "translated":
        return written["text"] == texts[LANGUAGES.index(written["target_language"])]
    if made_by["kind"] == "answerable":
        return answers.get(written["question"]) == written["text"]
    return written["question"] not in answers


def main(split: str, path: str) -> None:
    sentences = draw_sentences(split)
    table = {}
    for written in read_made(path):
        verdict = "rejected" if written["reasons"] else "accepted"
        for language in (written["target_language"], "all"):
            counts = table.setdefault((written["made_by"]["kind"], language), Counter())
            counts[verdict] += 1
            counts[verdict, "right"] += is_right(written, sentences)
    for (kind, language), counts in sorted(table.items()):
        parts = []
        for verdict in ("accepted", "rejected"):
            right = counts[verdict, "right"]
            parts.append(f"{counts[verdict]} {verdict}, of which {right} are right")
        print(f"{kind}, {language}: {'; '.join(parts)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
