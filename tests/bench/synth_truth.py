r"""What prepare.synth wrote about the demo's transcripts, against the truth of the grammar; to be run by hand:

    python -m prepare.synth translate demo/train.jsonl out/st.jsonl --llm demo/llm --languages de it zh --no-round-trip \
        --threshold log_p=-0.03
    python tests/synth_truth.py train out/st.all.jsonl
    python -m prepare.synth questions demo/train.jsonl out/sqa.jsonl --llm demo/llm --questions demo/train.jsonl \
        --unanswerable 0.4
    python tests/synth_truth.py train out/sqa.all.jsonl

The demo's LLM reads English only, so it cannot translate back; nor can it write questions.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prepare.demo import CLIPS_PER_FILE, CORPUS, EN, TEST_VOICE, draw_voice
from prepare.demo_grammar import LANGUAGES, example


def sentences(split):
    """{English sentence: (its four texts, {question: answer} of its facts in all languages)} of a split of the corpus,
    drawn again as prepare.demo drew them, with the random numbers that speaking took."""
    found = {}
    for name, files in CORPUS.items():
        for index in range(files if name.split("-")[0] == split else 0):
            rng = random.Random(f"{name} {index}")
            for _ in range(CLIPS_PER_FILE):
                texts, facts, _ = example(rng, split)
                voice = TEST_VOICE if name == "test-rms" else draw_voice(rng, name)
                if voice.startswith("flite"):
                    for _ in range(1 if voice == TEST_VOICE else 2):
                        rng.random()
                else:
                    rng.randint(160, 210), rng.randint(25, 75), rng.random()
                found[texts[EN]] = texts, {q: a for questions, answers in facts for q, a in zip(questions, answers)}
    return found


def main(split, path):
    known, table = sentences(split), {}
    for row in map(json.loads, open(path, encoding="utf-8")):
        made_by, language = row["made_by"], row["target_language"]
        texts, facts = known[made_by["transcript"]]
        if row["task"] == "st":
            right = row["text"] == texts[LANGUAGES.index(language)]
        elif made_by["kind"] == "answerable":
            right = facts.get(row["question"]) == row["text"]
        else:
            right = row["question"] not in facts
        kind = row["task"] if row["task"] == "st" else made_by["kind"]
        for group in (language, "all"):
            table.setdefault((kind, group), Counter())["rejected" if row["reasons"] else "kept", right] += 1
    for (kind, group), n in sorted(table.items()):
        kept, rejected = (f"{n[which, True]} of {n[which, True] + n[which, False]} right" for which in ("kept", "rejected"))
        print(f"{kind} {group}: of {n.total()} kept {n['kept', True] + n['kept', False]}, {kept}; rejected {rejected}")


if __name__ == "__main__":
    main(*sys.argv[1:])
