"""Instructions in words that no training saw, against the first training wording: python tests/held_out.py

Asks the newest checkpoint about clips of demo/test.jsonl, each with every wording below; to be run by hand.
"""

import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HELD_OUT = {
    "asr": ["Could you write out the words that were spoken?", "I would like a text version of this clip.",
            "Kannst du den gesprochenen Text bitte abschreiben?", "Ich hätte gern den Wortlaut der Aufnahme.",
            "Puoi scrivere le parole che sono state dette?", "Vorrei il testo scritto di questo audio.",
            "你能把录音中的话写出来吗？", "我想要这段语音的文本。"],
    "st": ["Could you put what you hear {in}?", "I need a version {in} of this clip.",
           "Kannst du mir das Gehörte bitte {in} sagen?", "Ich brauche den Text der Aufnahme {in}.",
           "Puoi dirmi {in} che cosa senti?", "Ho bisogno di una versione {in} di questo audio.",
           "你能用{in}告诉我录音的内容吗？", "我需要这段录音的{in}版本。"],
    "sqa": ["Having heard the clip, tell me the following: {question}", "Could you tell me something? {question}",
            "Sag mir nach dem Hören der Aufnahme: {question}", "Kannst du mir das sagen? {question}",
            "Dopo aver sentito l'audio, dimmi: {question}", "Puoi dirmi questo? {question}",
            "听完录音后告诉我：{question}", "你能告诉我吗？{question}"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", help="checkpoint; otherwise the newest of out/ift.pt and out/align.pt")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--out", default="out/held_out")
    args = parser.parse_args()
    import eval
    from data import Manifest
    from prepare.instructions import INSTRUCTIONS, language_of, task_of
    rng, manifest = random.Random(0), Manifest(ROOT / "demo/test.jsonl")
    rows = [row for row in manifest if row["speaker"] != "flite-rms"]
    clips = rng.sample(sorted({(row["audio"], row["start"]) for row in rows}), args.clips)
    rows = [row for row in rows if (row["audio"], row["start"]) in clips]
    known = {w for key, table in INSTRUCTIONS.items() if key != "targets" for some in table.values() for w in some}
    made = {"training wording": rows, "held-out wordings": []}
    for row in rows:
        wordings = HELD_OUT[row["task"]]
        assert not known & set(wordings)
        for wording in wordings:
            language = language_of(wording)
            if row["task"] == "sqa" and language != row["target_language"]:
                continue
            text = wording.format(question=row.get("question"), **INSTRUCTIONS["targets"][language][row["target_language"]])
            made["held-out wordings"].append({**row, "instruction": text})
    told = [task_of(row["instruction"]) == row["task"] for row in made["held-out wordings"]]
    print(f"task told by the wording alone: {100 * sum(told) / len(told):.1f} %")
    for name, some in made.items():
        path = Path(args.out) / f"{name.split()[0]}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({**row, "audio": str(ROOT / "demo" / row["audio"])}) + "\n" for row in some))
        print(f"--- {name}: {len(some)} rows")
        eval.main([str(path), "--trust-paths", "--out", args.out, *(["--ckpt", args.ckpt] if args.ckpt else [])])


if __name__ == "__main__":
    main()
