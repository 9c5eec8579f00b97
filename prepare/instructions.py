"""Instructions in words: wordings for manifest rows that have none, and what an unknown one asks for."""

import json
import re
from pathlib import Path

from prepare.errors import ManifestError

# Wordings of the instructions by task and language of the wording; "targets" are what {to} and {in} stand for.
INSTRUCTIONS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
REFUSALS = {"en": "Not answerable.", "de": "Nicht zu beantworten.", "it": "Non è possibile rispondere.",
            "zh": "无法回答。"}  # the only right answers to a question that the recording does not answer
TASK_WORDS = {"st": "translat|übersetz|übertrag|tradu[czt]|译", "asr": "transcri|transkri|trascri|verschrift|转写|转录|听写"}


def instruction_of(row, random=None):
    """The instruction of a row: its own, or else the first wording of its task, for sqa in the question's language. A
    random generator (random.Random or numpy's) draws any wording, for asr and st in any language."""
    if row.get("instruction"):
        return row["instruction"]
    task, target, known = row["task"], row["target_language"], list(INSTRUCTIONS["targets"])
    language = target if task == "sqa" else known[int(random.random() * len(known))] if random else "en"
    if target not in known and task != "asr":
        raise ManifestError(f"{row['where']}: prepare/instructions.json has no wording for the language {target!r}; add "
                            "it there, or give the row an instruction of its own")
    wordings = INSTRUCTIONS[task][language]
    if row["source_language"] == "en":
        wordings = wordings + INSTRUCTIONS[f"{task} of English"][language]
    wording = wordings[int(random.random() * len(wordings)) if random else 0]
    return wording.format(**INSTRUCTIONS["targets"][language].get(target, {}), question=row.get("question", ""))


def task_of(instruction):
    """The task an instruction in words asks for: that of the wording it equals, else by its words; one that is no
    question is st if it names a language ("In German, please"), asr if it speaks of text; the rest is sqa."""
    known = [word for forms in INSTRUCTIONS["targets"].values() for names in forms.values() for word in names.values()]
    for task in ("asr", "st"):
        for key in (task, f"{task} of English"):
            for language, wordings in INSTRUCTIONS[key].items():
                names = INSTRUCTIONS["targets"][language].values()
                if any(instruction.strip() == w.format(**forms) for w in wordings for forms in names):
                    return task
    for task, words in TASK_WORDS.items():
        if re.search(words, instruction.lower()):
            return task
    if re.search("[?？]", instruction):
        return "sqa"
    if any(word.split()[-1].lower() in instruction.lower() for word in known):
        return "st"
    return "asr" if re.search("text|wortlaut|testo|文本|文字", instruction.lower()) else "sqa"


def language_of(text):
    """Which of the languages of INSTRUCTIONS a text is in, by the words it shares with their wordings; None if none."""
    def words(text):
        return set(re.findall(r"[\u4e00-\u9fff]|[^\W\d_]+", text.lower()))

    shared = {language: len(words(text) & words(" ".join(sum((INSTRUCTIONS[key][language] for key in INSTRUCTIONS
              if key != "targets"), [])))) for language in INSTRUCTIONS["targets"]}
    best = max(shared, key=shared.get)
    return best if shared[best] else None
