"""What an LLM wrote, judged: scores, the thresholds that they must pass, and names to exchange."""

import re
import zlib
from collections import Counter
from pathlib import Path
from random import Random

from data import letter_count, read_lines
from eval import normalise
from model import UserError, one_line_errors, visible
from prepare.derive import write_examples
from prepare.doctor import looks_like
from sample import loop_size

# The least of each score that passes.
LEAST = {
    "language": 1,  # 1 if the text (the question) looks like its language, else 0
    "log_p": -0.7,  # of a translation: mean log p of its tokens, in nats, by its writer
    "round_trip": 40.0,  # chrF of the translation translated back, against the source
    "agreement": 0.8,  # token F1 of the answer and what the LLM answers with the passage
    "found": 0.0,  # share of the answer's words that the passage has, within one language
    "refusal": 0.0,  # log p(refusal) - log p(best other answer) of an unanswerable question, nats
}
# The most of each score that passes.
MOST = {
    "ratio": 2.0,  # of the longer to the shorter of translation and source
    "copied": 0.6,  # share of the translation's words that the source has
    "loop": 0,  # 1 if the translation repeats itself or does not come to an end, else 0
    "lines": 0,  # how many lines the translation has more than its source
    "extra_words": 0,  # of an answer, beyond those asked for; in Chinese, characters
}
# The answer may be guessed without the passage (token F1 above `guess`) only if reading the passage
# makes it likelier by `gain` nats a token.
GUESSED = {"guess": 0.8, "gain": 1.0}
THRESHOLDS = LEAST | MOST | GUESSED


def failures(made_by: dict, thresholds: dict = THRESHOLDS) -> list[str]:
    """The names of the scores by which an example does not pass. made_by: the example's."""
    if made_by.get("failed"):
        return [made_by["failed"]]
    given = {name: score for name, score in made_by["scores"].items() if score is not None}
    scores = thresholds | given
    names = [name for name in LEAST if scores[name] < thresholds[name]]
    names += [name for name in MOST if scores[name] > thresholds[name]]
    if scores["guess"] > thresholds["guess"] and scores["gain"] < thresholds["gain"]:
        names.append("guess")
    return names


# --------------------------------------------------------------------------------------------------
# Scores


def words_of(text: str) -> list[str]:
    """Lower-case words; of Chinese, characters."""
    return re.findall(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+", text.casefold())


def translation_scores(source: str, text: str, language: str, ids: list[int]) -> dict:
    """Scores of a translation, as text and as the LLM's token ids, against its source."""
    # Ten letters are added so that a word more or less does not count in short texts.
    ratio = (letter_count(text) + 10) / (letter_count(source) + 10)
    source_words = words_of(source)
    words = words_of(text)
    copied = sum(word in source_words for word in words)
    loop = any(loop_size(ids[:end]) for end in range(24, len(ids) + 1))
    loop = loop or (doubled(words) and not doubled(source_words))
    return {
        "language": int(looks_like(text, language)),
        "ratio": round(max(ratio, 1 / ratio), 3),
        "copied": round(copied / max(1, len(words)), 3),
        "loop": int(loop),
        "lines": max(0, len(text.splitlines()) - len(source.splitlines())),
    }


def doubled(words: list[str]) -> bool:
    """Whether three words or more are followed by the same ones."""
    for size in range(3, len(words) // 2 + 1):
        for start in range(len(words) - 2 * size + 1):
            middle = start + size
            if words[start:middle] == words[middle : middle + size]:
                return True
    return False


def answer_scores(example: dict, passage: str, most_words: int) -> dict:
    """Scores of an sqa example about a passage, with an answer of at most so many words."""
    language = example["target_language"]
    answer = normalise(example["text"], language).split()
    passage_words = normalise(passage, language).split()
    share = sum(word in passage_words for word in answer) / max(1, len(answer))
    texts = [example["question"], example["text"]]
    return {
        "language": int(all(looks_like(text, language) for text in texts)),
        "extra_words": len(answer) - most_words,
        "found": round(share, 3) if language == example["source_language"] else None,
    }


# --------------------------------------------------------------------------------------------------
# What passes


def read_made(path: str) -> list[dict]:
    """The examples of an .all.jsonl file. Raises UserError."""
    remedy = "give the .all.jsonl file of a run of prepare.synth"
    with one_line_errors(path, remedy):
        examples = read_lines(Path(path))
    if not examples:
        raise UserError(f"{path}: found no examples; {remedy}")
    for number, example in enumerate(examples, 1):
        with one_line_errors(f"{path} line {number}: not made by prepare.synth", remedy):
            failures(example["made_by"])
    return examples


def select(examples: list[dict], out: Path, thresholds: dict = THRESHOLDS) -> None:
    """Writes the examples that pass to the manifest `out`; prints how many, and why others fail."""
    # An example passes if nothing is held against it.
    reasons = {example["id"]: failures(example["made_by"], thresholds) for example in examples}
    passing = [example for example in examples if not reasons[example["id"]]]
    for id in surplus_ids(passing):
        reasons[id] = ["surplus"]
    selected = []
    table = {}  # {language: (Counter of kinds that pass, Counter of reasons)}
    for example in examples:
        names = reasons[example["id"]]
        kinds, counts = table.setdefault(example["target_language"], (Counter(), Counter()))
        counts.update(names)
        if not names:
            kinds[example["made_by"]["kind"]] += 1
            fields = [name for name in example if name not in ("id", "reasons")]
            selected.append({name: example[name] for name in fields})
    write_examples(out, selected)

    print(f"{out}: kept {len(selected)} of {len(examples)} examples")
    for language, (kinds, counts) in sorted(table.items()):
        print(visible(f"  {language}: kept {listing(kinds)}; failed {listing(counts)}"))


def listing(counter: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


def surplus_ids(examples: list[dict]) -> set[str]:
    """The ids of questions beyond the share of unanswerable ones that was asked for, by language.

    The hash of its id decides whether a question is one of them.
    """
    languages = {}
    for example in sorted(examples, key=lambda x: (zlib.crc32(x["id"].encode()), x["id"])):
        kinds = languages.setdefault(example["target_language"], {})
        kinds.setdefault(example["made_by"]["kind"], []).append(example)
    ids = set()
    for kinds in languages.values():
        if not {"answerable", "unanswerable"} <= kinds.keys():
            continue
        # The scarcer kind decides how many questions there can be in all.
        share = kinds["unanswerable"][0]["made_by"]["unanswerable"]
        shares = {"answerable": 1 - share, "unanswerable": share}
        total = min(len(kinds[kind]) / part for kind, part in shares.items())
        for kind, part in shares.items():
            ids.update(example["id"] for example in kinds[kind][round(total * part) :])
    return ids


# --------------------------------------------------------------------------------------------------
# Questions that a passage does not answer


def find_names(texts: list[str]) -> tuple[dict, dict]:
    """Names and numbers of texts: {name: {(side, word) beside it}}, and {(side, word): [name]}.

    A name is a word written with a capital within a sentence and never without one, so that
    Chinese has none.
    """
    tokens = [re.findall(r"\w[\w'’-]*|[.!?:]", text) for text in texts]
    # A word that is also written small is no name, nor is one that begins a sentence.
    lower = {word for part in tokens for word in part if word[0].islower()}
    names = set()
    for part in tokens:
        for before, word in zip(part, part[1:], strict=False):
            capital = word[0].isupper() and before not in ".!?:" and word.lower() not in lower
            if capital or word[0].isdecimal():
                names.add(word)
    # The neighbours of a name tell how it is used.
    contexts = {name: set() for name in sorted(names)}
    for part in tokens:
        padded = ["", *part, ""]
        for before, word, after in zip(padded, part, padded[2:], strict=False):
            if word in names:
                contexts[word] |= {("left", before.lower()), ("right", after.lower())}
    beside = {}
    for name, pairs in contexts.items():
        for pair in pairs:
            beside.setdefault(pair, []).append(name)
    return contexts, beside


def swap_name(question: str, passage: str, names: tuple, random: Random) -> str | None:
    """The question with a name or number of the passage exchanged for another one.

    The other one, of `names` (from find_names), is not in the passage but stands beside the same
    words elsewhere, and a number is exchanged for a number. None if there is no such name.
    """
    contexts, beside = names
    passage_words = set(re.findall(r"\w[\w'’-]*", passage))
    words = [word for word in re.findall(r"\w[\w'’-]*", question) if word in passage_words]
    candidates = [word for word in words if word in contexts]
    if not candidates:
        return None

    # Of the names used alike, those that share more than half as many neighbours as the best.
    old = random.choice(candidates)
    shared = Counter(name for pair in contexts[old] for name in beside[pair])
    for name in list(shared):
        alike = name[0].isdecimal() == old[0].isdecimal()
        if not alike or name in passage_words or name in question:
            del shared[name]
    best = sorted(name for name, count in shared.items() if count > max(shared.values()) / 2)
    return re.sub(rf"\b{re.escape(old)}\b", random.choice(best), question) if best else None
