"""Synthetic training data, written by a local LLM that follows instructions (Qwen2.5-Instruct and kin).

    python -m prepare.synth translate asr.jsonl st.jsonl --llm DIR --languages de it zh
    python -m prepare.synth questions asr.jsonl sqa.jsonl --llm DIR --unanswerable 0.25
    python -m prepare.synth paraphrase more.json --llm DIR
    python -m prepare.synth concatenate asr.jsonl longer.jsonl --seconds 30
    python -m prepare.synth filter st.all.jsonl st.jsonl --threshold round_trip=50

Everything that is written goes at once into OUT.all.jsonl, with its scores and the names of those it fails; what
fails none goes into OUT.jsonl. A run that was stopped goes on where it was. The LLM answers greedily, so a row does not
depend on what it is batched with (but for the rounding of bfloat16); the seed draws what is asked.
"""

import argparse
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import sacrebleu
import torch

from data import Manifest, join
from prepare import filters
from prepare.checkpoint import fingerprint
from prepare.derive import concatenate, derived, join_audio, neighbours
from prepare.errors import AudioError, CheckpointError, ManifestError
from prepare.instructions import INSTRUCTIONS, REFUSALS
from prepare.writer import ask, decode, encode, load_writer, produce, prompt, say, weigh

LANGUAGES = list(INSTRUCTIONS["targets"])
NAMES = INSTRUCTIONS["targets"]["en"]  # {to} and {in} of each language, as English says them

# What the LLM is asked: passage, newline, instruction, as the speech model is
TRANSLATE = "{text}\nTranslate {to}."
WRITE = ("{text}\nWrite one question {in}, if possible about {kind}, that this text answers, and its answer {in} in at "
         "most {words} words. Use this form:\nQuestion: ...\nAnswer: ...")
KINDS = ("a person", "a place", "a time", "a number", "a reason", "a thing", "what happens", "how something is done")
ANSWER = {"en": "Give a short answer in English. {question}", "de": "Gib eine kurze Antwort auf Deutsch. {question}",
          "it": "Dai una risposta breve in italiano. {question}", "zh": "用中文简短回答。{question}"}
REFUSE = {"en": "If the text does not tell, answer:", "de": "Steht es nicht im Text, antworte:",
          "it": "Se il testo non lo dice, rispondi:", "zh": "文中没有的，回答："}
PARAPHRASE = ("{wording}\nThis is an instruction for a program that listens to a recording. Say the same {in} in five "
              "other ways, one a line, without numbers.{keep}")
WRITTEN = re.compile(r"(?:question|frage|domanda|问题)\W*?[:：][\s*]*(.+?)[\s*]*\n\W*(?:answer|antwort|risposta|答案|回答|答)"
                     r"\W*?[:：][\s*]*(.+)", re.I)
WRITE_LIMIT = 200  # tokens of a question and its answer, or of some wordings


def usable(manifest, bare):
    """(number, row) of the rows whose transcript the LLM can work on. Raises ManifestError if there are none."""
    found = False
    for i, row in enumerate(manifest):
        if row["task"] == "asr" and row["source_language"] in LANGUAGES and (bare or row["style"] != "bare"):
            found = True
            yield i, row
    if not found:
        raise ManifestError(f"{str(manifest.path)!r}: found no asr row in {', '.join(LANGUAGES)} with case and "
                            "punctuation; give another manifest, or --bare to take those without, too")


# ----------------------------------------------------------------------------------------------------------------------
# Translations


def translate(args, writer, made_by):
    manifest = Manifest(args.input, args.trust_paths)
    items = [(f"{i + 1} {language}", i, language) for i, row in usable(manifest, args.bare)
             for language in args.languages if language != row["source_language"]]

    def prepare(id, i, language):
        row = manifest[i]
        limit = 2 * len(encode(writer, row["text"])) + 32
        new = derived(args.out, manifest, [row], row, text="", task="st", target_language=language)
        new |= {"made_by": made_by | {"kind": "translated", "prompt": TRANSLATE, "transcript": row["text"]}, "id": id}
        ids = prompt(writer, TRANSLATE.format(text=row["text"], **NAMES[language]))
        return {"row": new, "prompt": ids, "limit": limit, "size": max(len(ids), limit + 64) + limit}

    def back(rows, limits):
        prompts = []
        for row, limit in zip(rows, limits):
            text = decode(writer, encode(writer, row["text"])[:limit])  # half characters take more than was written
            prompts.append(prompt(writer, TRANSLATE.format(text=text, **NAMES[row["source_language"]])))
        return say(writer, ask(writer, prompts), limits)

    def write(jobs):
        rows, limits = [job["row"] for job in jobs], [job["limit"] for job in jobs]
        asked = ask(writer, [job["prompt"] for job in jobs])
        answers = say(writer, asked, limits)
        for row, ids, limit, (log_p, tokens) in zip(rows, answers, limits, weigh(writer, asked, answers)):
            row["text"] = decode(writer, ids)
            scores = filters.translation_scores(row["made_by"]["transcript"], row["text"], row["target_language"], ids)
            scores |= {"loop": max(scores["loop"], int(len(ids) == limit)), "log_p": round(log_p / tokens, 4)}
            row["made_by"] |= {"scores": scores} | ({} if row["text"] else {"failed": "empty"})
        for row, ids in zip(rows, [] if args.no_round_trip else back(rows, limits)):
            row["made_by"]["back"] = decode(writer, ids)
            chrf = sacrebleu.sentence_chrf(row["made_by"]["back"], [row["made_by"]["transcript"]]).score
            row["made_by"]["scores"]["round_trip"] = round(chrf, 1)

    return items, prepare, write


# ----------------------------------------------------------------------------------------------------------------------
# Questions


class Passage(NamedTuple):
    rows: list
    text: str
    groups: list  # what it belongs to, the narrowest first: recording, speaker, corpus


class Question(NamedTuple):
    number: int
    passage: int
    language: str
    text: str | None = None  # None: the LLM writes it
    answer: str | None = None
    row: dict | None = None  # the manifest row it is from


def read_passages(args, manifest):
    found = []
    for number, some in enumerate(neighbours([row for _, row in usable(manifest, args.bare)])):
        for i in range(0, len(some), args.utterances):
            rows = some[i:i + args.utterances]
            corpus, speaker = rows[0]["corpus"], rows[0]["speaker"]
            found.append(Passage(rows, join([row["text"] for row in rows]), [number, (corpus, speaker), corpus]))
    return found


def read_questions(args, manifest, passages):
    """The answerable questions of the manifest args.questions about passages. Raises ManifestError."""
    def place(folder, row):
        return os.path.abspath(folder / row["audio"]), round(row["start"], 3), round(row["duration"] or 0, 3)

    where = {place(manifest.path.parent, row): p for p, passage in enumerate(passages) for row in passage.rows}
    given = Manifest(args.questions, args.trust_paths)
    found = [Question(i, where.get(place(given.path.parent, row)), row["target_language"], row["question"], row["text"],
                      row) for i, row in enumerate(given) if row["task"] == "sqa" and
             row["target_language"] in args.languages and row["text"] not in REFUSALS.values()]
    about = [question for question in found if question.passage is not None]
    if not about:
        raise ManifestError(f"{args.questions!r}: of its {len(found)} answerable questions in "
                            f"{', '.join(args.languages)} none is about a recording of {args.input!r}; both must give "
                            "the same audio, start and duration")
    return about


def questions(args, writer, made_by):
    manifest = Manifest(args.input, args.trust_paths)
    passages = read_passages(args, manifest)
    asked = read_questions(args, manifest, passages) if args.questions else [
        Question(p, p, language) for p in range(len(passages)) for language in args.languages]
    names = filters.entities([passage.text for passage in passages])
    own, by = {}, {}  # questions of a passage, and of a group and language
    for question in asked:
        own.setdefault(question.passage, set()).add(question.text)
        for group in passages[question.passage].groups:
            by.setdefault((group, question.language), []).append(question)

    def elsewhere(question, rng):
        """A question about another passage of the recording, else of the speaker, else of the corpus; None if none."""
        here = passages[question.passage]
        for group in here.groups:
            for _ in range(20):
                other = rng.choice(by[group, question.language])
                if passages[other.passage].text != here.text and (
                        not other.text or other.text not in own[question.passage]):
                    return other

    def unanswerable(question, rng):
        """A question that the passage of this one does not answer: the way it is found, its text, the question it was
        before."""
        here, other = passages[question.passage], elsewhere(question, rng)
        if rng.random() < 0.5 or not other:
            text = question.text and filters.swapped(question.text, here.text, names, rng)
            if text or not question.text or not other:
                return "swap", text, question
        return "other passage", other.text, other

    def prepare(id, question):
        rng, here = random.Random(f"{args.seed} {id}"), passages[question.passage]
        text, was, place = question.text, question, here.rows[0]
        refuse = f"{REFUSE[question.language]} {REFUSALS[question.language]}\n"
        about = {"kind": "answerable", "transcript": here.text, "prompt": refuse + ANSWER[question.language],
                 "unanswerable": args.unanswerable}
        if rng.random() < args.unanswerable:
            way, text, was = unanswerable(question, rng)
            about |= {"kind": "unanswerable", "way": way, "asked_of": passages[was.passage].text}
        if args.questions and not text:
            about["failed"] = "swap"
        try:
            place = join_audio(args.out, manifest, here.rows)
        except AudioError as error:
            about |= {"failed": "audio", "error": str(error)}
        rows = here.rows + (passages[was.passage].rows if was is not question else []) + ([was.row] if was.row else [])
        row = derived(args.out, manifest, rows, place, text=question.answer or "", task="sqa",
                      target_language=question.language, question=text or "")
        row |= {"made_by": made_by | about, "id": id}
        job = {"row": row, "rng": rng}
        job["size"] = len(prompt(writer, "\n".join([here.text, about["prompt"], row["question"], row["text"]])))
        if not args.questions:
            row["made_by"]["question_prompt"] = WRITE
            job["write"] = prompt(writer, WRITE.format(text=passages[was.passage].text, kind=rng.choice(KINDS),
                                                       words=args.answer_words, **NAMES[question.language]))
            job["size"] = max(job["size"], len(job["write"])) + WRITE_LIMIT
        job["size"] += answer_limit(args.answer_words)
        return job

    def write(jobs):
        if not args.questions:
            write_questions(writer, jobs, names)
        for kind, check in (("answerable", check_answerable), ("unanswerable", check_unanswerable)):
            rows = [job["row"] for job in jobs if job["row"]["made_by"]["kind"] == kind]
            if rows := [row for row in rows if "failed" not in row["made_by"]]:
                check(writer, rows, args.answer_words)

    return [(f"{question.number + 1} {question.language}", question) for question in asked], prepare, write


def answer_limit(words):
    return 8 + 6 * words  # tokens


def write_questions(writer, jobs, names):
    """Lets the LLM write the question and, if it is to be answerable, the answer of each job's row."""
    answers = say(writer, ask(writer, [job["write"] for job in jobs]), [WRITE_LIMIT] * len(jobs))
    for job, ids in zip(jobs, answers):
        row, about = job["row"], job["row"]["made_by"]
        about["wrote"] = decode(writer, ids)
        parts = WRITTEN.search(about["wrote"])
        if not parts or len(encode(writer, parts[0])) > WRITE_LIMIT:
            about["failed"] = "form"
            continue
        row["question"], row["text"] = (part.strip(" *") for part in parts.groups())
        if about.get("way") == "swap":
            row["question"] = filters.swapped(row["question"], about["transcript"], names, job["rng"]) or ""
            about |= {} if row["question"] else {"failed": "swap"}


def check_answerable(writer, rows, most):
    """Asks the LLM the questions of rows with and without the passage, and scores their answers by that."""
    questions = [ANSWER[row["target_language"]].format(question=row["question"]) for row in rows]
    answers, limits = [encode(writer, row["text"]) for row in rows], [answer_limit(most)] * len(rows)
    read, alone = ask(writer, passage_prompts(writer, rows)), ask(writer, [prompt(writer, text) for text in questions])
    for row, again, guess, (log_p, tokens), (log_p_alone, _) in zip(
            rows, say(writer, read, limits), say(writer, alone, limits), weigh(writer, read, answers),
            weigh(writer, alone, answers)):
        language, about = row["target_language"], row["made_by"]
        again, guess = decode(writer, again), decode(writer, guess)
        about |= {"again": again, "without_passage": guess}
        about["scores"] = filters.answer_scores(row, about["transcript"], most) | {
            "agreement": round(filters.token_f1(row["text"], again, language), 3),
            "guess": round(filters.token_f1(row["text"], guess, language), 3),
            "gain": round((log_p - log_p_alone) / tokens, 4)}


def check_unanswerable(writer, rows, most):
    """Makes the refusal the answer of rows, and scores it against the best that the LLM answers otherwise."""
    firsts = {encode(writer, refusal)[0] for refusal in REFUSALS.values()}
    read = ask(writer, passage_prompts(writer, rows))
    others = say(writer, read, [answer_limit(most)] * len(rows), never_first=firsts)
    refusals = [encode(writer, REFUSALS[row["target_language"]]) for row in rows]
    for row, other, (log_p_other, _), (log_p, _) in zip(rows, others, weigh(writer, read, others),
                                                        weigh(writer, read, refusals)):
        row["text"], row["made_by"]["best_other"] = REFUSALS[row["target_language"]], decode(writer, other)
        row["made_by"]["scores"] = {"language": int(filters.looks_like(row["question"], row["target_language"])),
                                    "refusal": round(log_p - log_p_other, 4)}


def passage_prompts(writer, rows):
    return [prompt(writer, row["made_by"]["transcript"] + "\n" + row["made_by"]["prompt"].replace(
        "{question}", row["question"])) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# Wordings of instructions


def paraphrase(args, writer, made_by):
    items = [(f"{key}, {language}, {number}", key, language, wording)
             for key, language, number, wording in filters.known_wordings() if language in args.languages]

    def prepare(id, key, language, wording):
        blanks = "".join(re.findall("{.*?}", wording))
        ids = prompt(writer, PARAPHRASE.format(wording=wording, keep=blanks and f" Keep {blanks} as it stands.",
                                               **NAMES[language]))
        about = made_by | {"kind": "wordings", "prompt": PARAPHRASE, "scores": {}}
        return {"row": {"task": key, "target_language": language, "text": wording, "made_by": about, "id": id},
                "prompt": ids, "size": len(ids) + WRITE_LIMIT}

    def write(jobs):
        answers = say(writer, ask(writer, [job["prompt"] for job in jobs]), [WRITE_LIMIT] * len(jobs))
        for row, ids in zip((job["row"] for job in jobs), answers):
            lines = [re.sub(r"^\s*(?:[-*•]|\d+[.):、])\s*", "", line).strip(" \t\"'“”„«»「」")
                     for line in decode(writer, ids).splitlines() if line.strip()]
            failed = [filters.wording_failure(line, row["task"], row["target_language"]) for line in lines]
            row["made_by"] |= {"wrote": list(zip(lines, failed))} | ({"failed": "no wording"} if all(failed) else {})

    return items, prepare, write


# ----------------------------------------------------------------------------------------------------------------------
# The program


def threshold(text):
    """NAME=NUMBER as a pair."""
    name, _, value = text.partition("=")
    try:
        value = float(value)
    except ValueError:
        name = None
    if name not in filters.THRESHOLDS:
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=NUMBER, of {', '.join(filters.THRESHOLDS)}")
    return name, value


def run(args):
    if args.command == "concatenate":
        return concatenate(args.input, args.out, args.seconds, args.trust_paths)
    thresholds = filters.THRESHOLDS | dict(getattr(args, "threshold", None) or [])
    if args.command == "filter":
        return filters.select(args.input, args.out, thresholds)
    writer, args.languages = load_writer(args.llm), list(dict.fromkeys(args.languages))
    made_by = {"model": args.llm, "sha256": fingerprint(args.llm)["sha256"], "seed": args.seed}
    make = {"translate": translate, "questions": questions, "paraphrase": paraphrase}[args.command]
    items, prepare, write = make(args, writer, made_by)
    if not items:
        raise ManifestError(f"{args.input!r}: nothing to translate: its transcripts are in the given languages already")
    if args.rows and args.rows < len(items):
        items = [items[i] for i in sorted(random.Random(args.seed).sample(range(len(items)), args.rows))]
    left_out = ("out", "batch", "threshold", "llm", "trust_paths")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    settings |= {"model": made_by["sha256"], "prompts": [TRANSLATE, WRITE, ANSWER, REFUSE, PARAPHRASE]}
    for name in ("input", "questions"):
        if settings.get(name):
            stat = os.stat(settings[name])
            settings[name] = [settings[name], stat.st_size, stat.st_mtime_ns]
    path = args.out.with_suffix(".all.jsonl")
    produce(writer, path, settings, items, prepare, write, lambda row: filters.failures(row, thresholds), args.batch)
    if args.command == "paraphrase":
        return filters.select_wordings(path, args.out)
    filters.select(path, args.out, thresholds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help, out="manifest of what is kept", **inputs):
        some = commands.add_parser(name, help=help)
        for option, text in inputs.items():
            some.add_argument(option, help=text)
        some.add_argument("out", type=Path, help=out)
        if name not in ("concatenate", "filter"):
            some.add_argument("--llm", required=True, help="LLM that chats in ChatML: directory or Hub id")
            some.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES, help="to write in")
            some.add_argument("--rows", type=int, help="make so many, drawn, instead of all")
            some.add_argument("--seed", type=int, default=0, help="of all that is drawn")
            some.add_argument("--batch", type=int, default=32, help="rows that the LLM works on together")
        if name in ("translate", "questions"):
            some.add_argument("--bare", action="store_true", help="use transcripts without case and punctuation, too")
        if name in ("translate", "questions", "concatenate"):
            some.add_argument("--trust-paths", action="store_true",
                              help="take audio from outside the manifest's folder, too")
        if name in ("translate", "questions", "filter"):
            some.add_argument("--threshold", type=threshold, nargs="+", action="extend", metavar="NAME=NUMBER",
                              help="of " + ", ".join(f"{name}={value:g}" for name, value in filters.THRESHOLDS.items()))
        return some

    some = command("translate", "transcripts into translations (asr to st rows)", input="manifest with asr rows")
    some.add_argument("--no-round-trip", action="store_true", help="do not translate back to compare; twice as fast")
    some = command("questions", "questions about transcripts (asr to sqa rows)", input="manifest with asr rows")
    some.add_argument("--questions", help="manifest whose sqa rows about the same audio give the questions and answers")
    some.add_argument("--utterances", type=int, default=1, help="how many neighbouring ones a question is about")
    some.add_argument("--unanswerable", type=float, default=0.25, help="their share")
    some.add_argument("--answer-words", type=int, default=10, help="the most; in Chinese, characters")
    command("paraphrase", "more wordings of the instructions", "JSON like prepare/instructions.json")
    some = command("concatenate", "neighbouring utterances as one row", input="manifest with asr rows, st rows or both")
    some.add_argument("--seconds", type=float, default=30.0, help="the most")
    command("filter", "other thresholds, without the LLM", input="OUT.all.jsonl of translate or questions")
    args = parser.parse_args(argv)
    for name, least, most in (("rows", 1, 10**9), ("batch", 1, 10**9), ("utterances", 1, 10**9), ("unanswerable", 0, 1),
                              ("answer_words", 1, 1000)):
        if (value := getattr(args, name, None)) is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected {least} to {most}")
    if args.command != "paraphrase" and os.path.abspath(args.input) == os.path.abspath(args.out):
        parser.error(f"{args.input}: is both input and output; give another name for the output")
    try:
        run(args)
    except (CheckpointError, ManifestError) as error:
        sys.exit(f"prepare.synth: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit("prepare.synth: the GPU's memory is full; what was made is kept: start again with a smaller --batch")
    except KeyboardInterrupt:
        print("prepare.synth: stopped; start again to go on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"prepare.synth: {error.filename or args.out}: {error.strerror}; what was made is kept: mend this and "
                 "start again")


if __name__ == "__main__":
    main()
