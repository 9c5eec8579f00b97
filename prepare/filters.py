"""What an LLM wrote, judged: scores of translations and of questions, and the thresholds that decide what is kept; new
wordings of instructions; and questions turned into others that a passage does not answer."""

import json
import re
import zlib
from collections import Counter
from pathlib import Path

from eval import normalise
from model import looped
from prepare.checkpoint import write_atomically, write_text
from prepare.doctor import looks_like
from prepare.errors import ManifestError, visible
from prepare.instructions import INSTRUCTIONS, language_of, task_of
from prepare.licences import letters
from prepare.paths import leads_out, outside

# Of every score the least, or the most, that is kept
LEAST = {
    "language": 1,  # 1 if the text (the question) looks like its language, else 0
    "log_p": -0.7,  # of a translation: mean log p of its tokens, in nats, by the LLM that wrote it
    "round_trip": 40.0,  # chrF of the translation translated back, against the source
    "agreement": 0.8,  # token F1 of the answer and what the LLM answers when it reads the passage
    "found": 0.0,  # share of the answer's words that the passage has, where both are in one language
    "refusal": 0.0,  # of an unanswerable question: log p(refusal) - log p(best other answer), in nats
}
MOST = {
    "ratio": 2.0,  # of the longer to the shorter of translation and source
    "copied": 0.6,  # share of the translation's words that the source has
    "loop": 0,  # 1 if the translation repeats itself or does not come to an end, else 0
    "lines": 0,  # how many lines the translation has more than its source
    "extra_words": 0,  # of an answer, beyond those asked for; in Chinese, characters
}
# A question's answer may be guessed without the passage (token F1 above `guess`) only if reading it makes the answer
# likelier by `gain` nats a token.
GUESSED = {"guess": 0.8, "gain": 1.0}
THRESHOLDS = LEAST | MOST | GUESSED


def failures(made_by, thresholds=THRESHOLDS):
    """Why a row is not kept, as a list of names; empty if it is. made_by: the row's, with scores."""
    if made_by.get("failed"):
        return [made_by["failed"]]
    scores = {name: value for name, value in made_by["scores"].items() if value is not None}
    found = [name for name in LEAST if scores.get(name, thresholds[name]) < thresholds[name]]
    found += [name for name in MOST if scores.get(name, thresholds[name]) > thresholds[name]]
    if scores.get("guess", 0) > thresholds["guess"] and scores.get("gain", thresholds["gain"]) < thresholds["gain"]:
        found.append("guess")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def words(text):
    """Lower-case words; of Chinese, characters."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+", text.casefold())


def size(text):
    """How long a text is, in Latin letters; a Chinese character counts as three."""
    return len(text) + 2 * len(re.findall("[\u3000-\u9fff\uff00-\uffef]", text))


def translation_scores(source, text, language, ids):
    """Of a translation (text and the LLM's token ids) and its source."""
    a, b = size(source) + 10, size(text) + 10  # 10: a word more or less does not count in short texts
    known, mine = set(words(source)), words(text)
    loop = any(looped(ids[:n]) for n in range(24, len(ids) + 1)) or doubled(mine) and not doubled(words(source))
    return {"language": int(looks_like(text, language)), "ratio": round(max(a / b, b / a), 3),
            "copied": round(sum(word in known for word in mine) / max(1, len(mine)), 3), "loop": int(loop),
            "lines": max(0, len(text.splitlines()) - len(source.splitlines()))}


def doubled(words):
    """Whether three words or more are followed by the same ones."""
    return any(words[i:i + n] == words[i + n:i + 2 * n] for n in range(3, len(words) // 2 + 1)
               for i in range(len(words) - 2 * n + 1))


def token_f1(a, b, language):
    """F1 of the words that two answers share, after Whisper's normaliser."""
    a, b = (Counter(normalise(text, language).split()) for text in (a, b))
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def answer_scores(row, passage, most):
    """Of an sqa row about a passage, whose answer should have at most so many words."""
    language = row["target_language"]
    answer, known = (normalise(text, language).split() for text in (row["text"], passage))
    found = sum(word in known for word in answer) / max(1, len(answer))
    return {"language": int(looks_like(row["question"], language) and looks_like(row["text"], language)),
            "extra_words": len(answer) - most, "found": round(found, 3) if language == row["source_language"] else None}


def known_wordings():
    """(key, language, number, wording) of all INSTRUCTIONS."""
    for key, by_language in INSTRUCTIONS.items():
        if key.split()[0] in ("asr", "st", "sqa"):
            for language, some in by_language.items():
                yield from ((key, language, i + 1, wording) for i, wording in enumerate(some))


def wording_failure(wording, key, language):
    """Why a new wording of an instruction (see INSTRUCTIONS) cannot be used, or None."""
    kind = key.split()[0]
    blanks = re.findall(r"[{].*?[}]", wording)
    wanted = {"asr": [[]], "st": [["{to}"], ["{in}"]], "sqa": [["{question}"]]}[kind]
    if blanks not in wanted or re.search("[{}]", re.sub(r"[{].*?[}]", "", wording)):
        return "placeholder"
    bare = re.sub(r"[{].*?[}]", "", wording)
    if not 2 <= size(bare) <= 150:
        return "length"
    target = INSTRUCTIONS["targets"][language]["de"]
    task = task_of(wording.format(**target, question="?"))
    if task != kind and not (kind == "asr" and task == "sqa"):  # task_of knows only some words for asr
        return "task"
    chinese = re.search("[\u3400-\u9fff]", bare)
    known = language_of(bare) in (language, None) and looks_like(bare, language)
    return None if known and bool(chinese) == (language == "zh") else "language"


# ----------------------------------------------------------------------------------------------------------------------
# What is kept


def read_rows(path):
    """The rows of a .all.jsonl, one after another; a last line torn by a kill is passed over. Raises ManifestError."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    row["made_by"]["kind"], row["id"]
                except (ValueError, KeyError, TypeError):
                    if not line.endswith("\n"):
                        return
                    raise ManifestError(f"{str(path)!r} line {number}: not a row that prepare.synth made; give the "
                                        ".all.jsonl file of a run") from None
                yield row
    except OSError as error:
        raise ManifestError(f"{str(path)!r}: {error.strerror}, expected the .all.jsonl file of a run; correct the "
                            "path") from error


def select(everything, out, thresholds=THRESHOLDS):
    """Writes the rows of the file `everything` that fail nothing to the manifest `out`. Of answerable and unanswerable
    questions in a language, the surplus over the share that was asked for is left out, by a hash of the row's id.
    Prints what was kept and why the rest was not. Raises ManifestError."""
    kept, failed, total, share = {}, {}, Counter(), None  # by target language
    for row in read_rows(everything):
        language, made_by = row["target_language"], row["made_by"]
        if made_by["kind"] == "wordings":
            raise ManifestError(f"{str(everything)!r}: holds wordings of instructions, expected translations or "
                                "questions; give another file")
        reasons = failures(made_by, thresholds)
        total[language] += 1
        failed.setdefault(language, Counter()).update(reasons)
        kinds, share = kept.setdefault(language, {}), made_by.get("unanswerable")
        if not reasons:
            kinds.setdefault(made_by["kind"], []).append((zlib.crc32(row["id"].encode()), row["id"]))
    for language, kinds in kept.items():
        if len(kinds) == 2 and 0 < share < 1:
            whole = min(len(kinds["answerable"]) / (1 - share), len(kinds["unanswerable"]) / share)
            for kind, part in (("answerable", 1 - share), ("unanswerable", share)):
                some = sorted(kinds[kind])
                kinds[kind] = some[:round(whole * part)]
                failed[language]["surplus"] += len(some) - len(kinds[kind])
    ids = {id for kinds in kept.values() for some in kinds.values() for _, id in some}

    away = 0

    def save(file):
        nonlocal away
        for row in read_rows(everything):
            if row["id"] in ids:
                away += leads_out(Path(out).parent, row.get("audio", ""))
                row = {name: value for name, value in row.items() if name not in ("id", "reasons")}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    write_atomically(Path(out), save)
    print(f"{out}: kept {len(ids)} of {total.total()} rows ({100 * len(ids) / max(1, total.total()):.1f} %)")
    for language, kinds in sorted(kept.items()):
        part = ", ".join(f"{len(some)} {kind}" for kind, some in sorted(kinds.items())) or "nothing"
        reasons = ", ".join(f"{name} {n}" for name, n in failed[language].most_common() if n)
        print(visible(f"  {language}: of {total[language]} kept {part}; failed: {reasons or 'none'}"))
    if away:
        print(outside(away))


def select_wordings(everything, out):
    """Writes the new wordings in the file `everything` to the JSON file `out`, in the shape of INSTRUCTIONS, each once.
    Prints what was kept and why the rest was not. Raises ManifestError."""
    known = {letters(wording) for *_, wording in known_wordings()}
    new, failed, made_by = {}, Counter(), {}
    for row in read_rows(everything):
        made_by = {name: row["made_by"].get(name) for name in ("model", "sha256", "prompt", "seed")}
        for wording, reason in row["made_by"].get("wrote", []):
            reason = reason or ("known" if letters(wording) in known else None)
            failed[reason] += 1
            if reason is None:
                known.add(letters(wording))
                new.setdefault(row["task"], {}).setdefault(row["target_language"], []).append(wording)
    write_text(out, json.dumps(new | {"made_by": made_by}, ensure_ascii=False, indent=1) + "\n")
    count, total = failed.pop(None, 0), failed.total()
    print(f"{out}: {count} new wordings of {count + total}; failed: "
          f"{visible(', '.join(f'{name} {n}' for name, n in failed.most_common())) or 'none'}")


# ----------------------------------------------------------------------------------------------------------------------
# Questions that a passage does not answer


def entities(texts):
    """Names and numbers of texts: {name: set of the (side, word) it stands beside}, and that the other way round. A
    name is a word written with a capital within a sentence and never without one; Chinese has none."""
    parts = [re.findall(r"\w[\w'’-]*|[.!?:]", text) for text in texts]
    small = {word for part in parts for word in part if word[0].islower()}
    names = {word for part in parts for before, word in zip(part, part[1:])
             if word[0].isdecimal() or word[0].isupper() and before not in ".!?:" and word.lower() not in small}
    known, beside = {}, {}
    for part in parts:
        for before, word, after in zip(["", *part], part, [*part[1:], ""]):
            if word in names:
                known.setdefault(word, set()).update((("left", before.lower()), ("right", after.lower())))
    for name in sorted(known):
        for place in known[name]:
            beside.setdefault(place, []).append(name)
    return known, beside


def swapped(question, passage, names, rng):
    """The question about another name or number, which the passage does not have but which is used alike elsewhere;
    None if there is none to put in. names: as entities gives them."""
    known, beside = names
    has = set(re.findall(r"\w[\w'’-]*", passage))
    mine = [word for word in re.findall(r"\w[\w'’-]*", question) if word in known and word in has]
    if not mine:
        return None
    old = rng.choice(mine)
    alike = Counter(name for place in known[old] for name in beside[place])
    alike = {name: n for name, n in alike.items()
             if name not in has and name not in question and name[0].isdecimal() == old[0].isdecimal()}
    best = sorted(name for name, n in alike.items() if n > max(alike.values()) / 2)
    return re.sub(rf"\b{re.escape(old)}\b", rng.choice(best), question) if best else None
