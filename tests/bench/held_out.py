"""Instructions in words that no training saw, against the first training wording:

    python tests/bench/held_out.py [--ckpt CKPT] [--clips N]

asks a checkpoint about clips of demo/test.jsonl, each with every wording below.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import ROOT  # noqa: E402

# By task and the language of the wording. {in} becomes the language that is asked for.
HELD_OUT = {
    "asr": {
        "en": [
            "Could you write out the words that were spoken?",
            "I would like a text version of this clip.",
        ],
        "de": [
            "Kannst du den gesprochenen Text bitte abschreiben?",
            "Ich hätte gern den Wortlaut der Aufnahme.",
        ],
        "it": [
            "Puoi scrivere le parole che sono state dette?",
            "Vorrei il testo scritto di questo audio.",
        ],
        "zh": ["你能把录音中的话写出来吗？", "我想要这段语音的文本。"],
    },
    "st": {
        "en": ["Could you put what you hear {in}?", "I need a version {in} of this clip."],
        "de": [
            "Kannst du mir das Gehörte bitte {in} sagen?",
            "Ich brauche den Text der Aufnahme {in}.",
        ],
        "it": [
            "Puoi dirmi {in} che cosa senti?",
            "Ho bisogno di una versione {in} di questo audio.",
        ],
        "zh": ["你能用{in}告诉我录音的内容吗？", "我需要这段录音的{in}版本。"],
    },
    "sqa": {
        "en": [
            "Having heard the clip, tell me the following: {question}",
            "Could you tell me something? {question}",
        ],
        "de": [
            "Sag mir nach dem Hören der Aufnahme: {question}",
            "Kannst du mir das sagen? {question}",
        ],
        "it": [
            "Dopo aver sentito l'audio, dimmi: {question}",
            "Puoi dirmi questo? {question}",
        ],
        "zh": ["听完录音后告诉我：{question}", "你能告诉我吗？{question}"],
    },
}
TEST_VOICE = "flite-rms"  # which no training heard: here the wordings alone are to be new


def draw_examples(clips: int) -> list[dict]:
    """The examples of randomly drawn clips of the test set, of voices that training heard."""
    from data import Manifest

    manifest = Manifest(ROOT / "demo/test.jsonl")
    examples = [example for example in manifest if example["speaker"] != TEST_VOICE]
    places = sorted({(example["audio"], example["start"]) for example in examples})
    drawn = set(random.Random(0).sample(places, clips))
    chosen = [example for example in examples if (example["audio"], example["start"]) in drawn]
    return [example | {"audio": str(ROOT / "demo" / example["audio"])} for example in chosen]


def reword(example: dict) -> list[dict]:
    """An example with every wording; a question is framed in its own language."""
    from data import INSTRUCTIONS

    target, question = example["target_language"], example.get("question")
    reworded = []
    for language, wordings in HELD_OUT[example["task"]].items():
        if example["task"] == "sqa" and language != target:
            continue
        forms = INSTRUCTIONS["targets"][language][target]
        for wording in wordings:
            reworded.append({**example, "instruction": wording.format(question=question, **forms)})
    return reworded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", help="checkpoint; otherwise the newest in out/")
    parser.add_argument("--clips", type=int, default=40, help="of the test set (%(default)s)")
    parser.add_argument("--out", default="out/held_out", help="directory (%(default)s)")
    args = parser.parse_args()
    import eval
    from data import recognise, wordings

    for task, by_language in HELD_OUT.items():
        known = {wording for _, wording in wordings(task)}
        assert not known & {wording for choices in by_language.values() for wording in choices}
    examples = draw_examples(args.clips)
    reworded = [variant for example in examples for variant in reword(example)]
    right = 0
    for example in reworded:
        is_question = recognise(example["instruction"])[0] == "sqa"
        right += is_question == (example["task"] == "sqa")
    share = 100 * right / len(reworded)
    print(f"the wording alone tells of {share:.1f} % whether they are questions")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, rows in (("training", examples), ("held-out", reworded)):
        print(f"--- {name} wordings: {len(rows)} rows")
        path = Path(args.out) / f"{name}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        checkpoint = ["--ckpt", args.ckpt] if args.ckpt else []
        eval.main([str(path), "--out", args.out, *checkpoint])


if __name__ == "__main__":
    main()
