"""Instructions in words: wordings for manifest rows that have none, and what an unknown one asks for."""

import json
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from prepare.errors import ManifestError

# Wordings of the instructions by task and language of the wording; "targets" are what {to} and {in} stand for, "words"
# are more words by which a language is known.
INSTRUCTIONS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
REFUSALS = {"en": "Not answerable.", "de": "Nicht zu beantworten.", "it": "Non è possibile rispondere.",
            "zh": "无法回答。"}  # the only right answers to a question that the recording does not answer
# Words that tell the task of an instruction that is none of the wordings
QUESTION = "question|frage|domanda|问题|summar|zusammen|riassu|总结|概括|摘要"  # a summary hears the whole recording too
TRANSLATE, TRANSCRIBE = "translat|übersetz|übertrag|tradu[czt]|译", "transcribe|transkribier|trascriv|转写|转录|听写"
TEXT = ("transcri|transkri|trascri|verschrift|text|testo|文本|文字|write|wording|dictat|caption|schreib|wortlaut|notier|"
        "untertitel|scriv|iscritto|dettatura|sottotitol|写|字幕")
POLITE = "(can|could|would|will) (you|i)|(kannst|könntest|würdest) du|kann ich|puoi|potresti|posso|[你可]?[能以]"  # no question


def instruction_of(row, random=None):
    """The instruction of a row: its own, or else the first wording of its task, for sqa in the question's language; a
    bare transcript is asked for as such. A random generator (random.Random or numpy's) draws any wording, for asr and
    st in any language."""
    if row.get("instruction"):
        return row["instruction"]
    task, target, known = row["task"], row["target_language"], list(INSTRUCTIONS["targets"])
    language = target if task == "sqa" else known[int(random.random() * len(known))] if random else "en"
    if target not in known and task != "asr":
        raise ManifestError(f"{row['where']}: prepare/instructions.json has no wording for the language {target!r}; add "
                            "it there, or give the row an instruction of its own")
    some = INSTRUCTIONS[task][language]
    if task == "asr" and row.get("style") == "bare":
        some = INSTRUCTIONS["asr bare"][language]
    elif row["source_language"] == "en":
        some = some + INSTRUCTIONS[f"{task} of English"][language]
    wording = some[int(random.random() * len(some)) if random else 0]
    return wording.format(**INSTRUCTIONS["targets"][language].get(target, {}), question=row.get("question", ""))


def wordings(task):
    """(language, wording) of a task in every language."""
    for key in (task, f"{task} of English", f"{task} bare"):
        for language, some in INSTRUCTIONS.get(key, {}).items():
            yield from ((language, wording) for wording in some)


def task_of(instruction):
    """The task an instruction in words asks for. One of the wordings is known exactly; of others, what stands before a
    colon decides: one that speaks of a question is sqa, one that translates or names a language to write in ("In German,
    please") st, one that transcribes or speaks of text or writing asr; the rest, and all that asks otherwise, is sqa."""
    text = instruction.strip()
    for _, wording in wordings("sqa"):
        before, after = wording.split("{question}")
        if (before or after) and text.startswith(before) and text.endswith(after):
            return "sqa"
    for task in ("asr", "st"):
        if any(text == wording.format(**forms) for language, wording in wordings(task)
               for forms in INSTRUCTIONS["targets"][language].values()):
            return task
    head = re.split("[:：]", text.lower())[0]
    named = any(form.lower() in head for targets in INSTRUCTIONS["targets"].values() for forms in targets.values()
                for form in forms.values())
    asks = len(re.findall("[?？]", head)) > bool(re.match(POLITE, head))
    if re.search(QUESTION, head):
        return "sqa"
    if re.search(TRANSLATE, head) and (named or not asks):
        return "st"
    if re.search(TRANSCRIBE, head):
        return "asr"
    return "sqa" if asks else "st" if named else "asr" if re.search(TEXT, head) else "sqa"


def language_of(text):
    """Which of the languages of INSTRUCTIONS a text is in: Chinese if it has a Chinese character, else by the words
    that only one language's wordings have; None if it has none."""
    if re.search("[\u4e00-\u9fff]", text):
        return "zh"
    found = Counter(word for language in _words() for word in _words()[language])
    mine = set(re.findall(r"[^\W\d_]+", text.lower()))
    shared = {language: sum(found[word] == 1 for word in mine & words) for language, words in _words().items()}
    best = max(shared, key=shared.get)
    return best if shared[best] else None


@lru_cache
def _words():
    known = {language: [*INSTRUCTIONS["words"].get(language, [])] for language in INSTRUCTIONS["targets"]}
    for task in ("asr", "st", "sqa"):
        for language, wording in wordings(task):
            known[language].append(re.sub("{.*?}", " ", wording))
    for language, targets in INSTRUCTIONS["targets"].items():
        known[language] += [form for forms in targets.values() for form in forms.values()]
    return {language: set(re.findall(r"[^\W\d_]+", " ".join(some).lower())) for language, some in known.items()}
