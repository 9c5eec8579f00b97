"""Training data written by a local LLM that follows instructions (Qwen2.5-Instruct and kin).

    python -m prepare.synth translate asr.jsonl st.jsonl --llm DIR --languages de it zh
    python -m prepare.synth questions asr.jsonl sqa.jsonl --llm DIR --unanswerable 0.25
    python -m prepare.synth concatenate asr.jsonl longer.jsonl --seconds 30
    python -m prepare.synth filter st.all.jsonl st.jsonl --threshold round_trip=50

Everything that is written goes at once into OUT.all.jsonl, with its scores and the names of those
it fails; what fails none goes into OUT.jsonl. A run that was stopped goes on where it was. The LLM
answers greedily, so an example does not depend on its batch (but for the rounding of bfloat16).
"""

import argparse
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import INSTRUCTIONS, REFUSALS, AudioError, Manifest, join_texts
from eval import item_scores
from model import UserError, fingerprint, steady_output
from prepare import filters
from prepare.derive import concatenate, derive, join_audio, neighbours
from prepare.writer import Writer, produce

LANGUAGES = list(INSTRUCTIONS["targets"])
LANGUAGE_NAMES = INSTRUCTIONS["targets"]["en"]  # {to} and {in} of each language, in English

# What the LLM is asked: passage, newline, instruction, as the speech model is.
TRANSLATE = "{text}\nTranslate {to}."
WRITE = (
    "{text}\nWrite one question {in}, if possible about {kind}, that this text answers, and its "
    "answer {in} in at most {words} words. Use this form:\nQuestion: ...\nAnswer: ..."
)
KINDS = (
    "a person, a place, a time, a number, a reason, a thing, what happens, how something is done"
).split(", ")
ANSWER = {
    "en": "Give a short answer in English. {question}",
    "de": "Gib eine kurze Antwort auf Deutsch. {question}",
    "it": "Dai una risposta breve in italiano. {question}",
    "zh": "用中文简短回答。{question}",
}
REFUSE = {
    "en": "If the text does not tell, answer:",
    "de": "Steht es nicht im Text, antworte:",
    "it": "Se il testo non lo dice, rispondi:",
    "zh": "文中没有的，回答：",
}
WRITTEN = re.compile(
    r"(?:question|frage|domanda|问题)\W*?[:：][\s*]*(.+?)[\s*]*\n"
    r"\W*(?:answer|antwort|risposta|答案|回答|答)\W*?[:：][\s*]*(.+)",
    re.IGNORECASE,
)
WRITE_LIMIT = 200  # tokens of a question and its answer


def usable_examples(manifest: Manifest, bare: bool) -> list[tuple[int, dict]]:
    """(number, example) of the transcripts that the LLM can work on. Raises UserError for none."""
    usable = []
    for number, example in enumerate(manifest):
        written = bare or example["style"] != "bare"
        if example["task"] == "asr" and example["source_language"] in LANGUAGES and written:
            usable.append((number, example))
    if not usable:
        raise UserError(
            f"{manifest.path}: found no asr example in {', '.join(LANGUAGES)} with case and "
            "punctuation; give another manifest, or --bare to take those without, too"
        )
    return usable


def draw_rows(candidates: list, args) -> list:
    """As many candidates as --rows wants, drawn, in their order."""
    if not candidates:
        raise UserError(f"{args.input}: is in these languages already; give other --languages")
    if not args.rows or args.rows >= len(candidates):
        return candidates
    drawn = random.Random(args.seed).sample(range(len(candidates)), args.rows)
    return [candidates[i] for i in sorted(drawn)]


# --------------------------------------------------------------------------------------------------
# Translations


class Translations:
    """The st examples of usable transcripts in other languages."""

    def __init__(self, args, writer: Writer, made_by: dict):
        self.writer = writer
        self.round_trip = not args.no_round_trip
        manifest = Manifest(args.input)
        made_by = made_by | {"kind": "translated", "prompt": TRANSLATE}
        examples = []
        for number, source in usable_examples(manifest, args.bare):
            for language in args.languages:
                if language != source["source_language"]:
                    fields = {"text": "", "task": "st", "target_language": language}
                    example = derive(args.out, manifest, [source], source, **fields)
                    example["made_by"] = made_by | {"transcript": source["text"]}
                    example["id"] = f"{number + 1} {language}"
                    examples.append(example)
        self.examples = draw_rows(examples, args)

    def prompt(self, text: str, language: str) -> list[int]:
        return self.writer.prompt(TRANSLATE.format(text=text, **LANGUAGE_NAMES[language]))

    def write(self, examples: list[dict]) -> None:
        """Has the LLM translate, and scores what it wrote."""
        # A translation of twice the tokens of its transcript has gone wrong.
        prompts = []
        limits = []
        for example in examples:
            transcript = example["made_by"]["transcript"]
            prompts.append(self.prompt(transcript, example["target_language"]))
            limits.append(2 * len(self.writer.encode(transcript)) + 32)
        asked = self.writer.read(prompts)
        answers = self.writer.answer(asked, limits)
        columns = examples, answers, limits, self.writer.weigh(asked, answers)
        for example, ids, limit, (log_p, tokens) in zip(*columns, strict=True):
            text = self.writer.decode(ids)
            made_by = example["made_by"]
            language = example["target_language"]
            transcript = made_by["transcript"]
            scores = filters.translation_scores(transcript, text, language, ids)
            if len(ids) == limit:
                scores["loop"] = 1
            made_by["scores"] = scores | {"log_p": round(log_p / tokens, 4)}
            if not text:
                made_by["failed"] = "empty"
            example["text"] = text
        if self.round_trip:
            self.translate_back(examples, limits)

    def translate_back(self, examples: list[dict], limits: list[int]) -> None:
        """Scores translations by what the LLM makes of them in the language of the transcript."""
        # Half a character at the end of a text takes more tokens than were written.
        prompts = []
        for example, limit in zip(examples, limits, strict=True):
            text = self.writer.decode(self.writer.encode(example["text"])[:limit])
            prompts.append(self.prompt(text, example["source_language"]))
        for example, text in zip(examples, self.writer.reply(prompts, limits), strict=True):
            made_by = example["made_by"]
            made_by["back"] = text
            language = example["source_language"]
            scores = item_scores("st", language, made_by["transcript"], text)
            made_by["scores"]["round_trip"] = scores["chrf"]


# --------------------------------------------------------------------------------------------------
# Questions


class Passage(NamedTuple):
    """Neighbouring transcripts that questions are about."""

    examples: list
    text: str
    groups: list  # what it belongs to, the narrowest first: recording, speaker, corpus


class Question(NamedTuple):
    """A question to be asked about a passage; the LLM is to write it if it has no text."""

    number: int
    passage: Passage
    language: str
    text: str | None = None
    example: dict | None = None  # that the question is from


def read_passages(manifest: Manifest, bare: bool, utterances: int) -> list[Passage]:
    """Passages of at most so many successive utterances."""
    examples = [example for _, example in usable_examples(manifest, bare)]
    passages = []
    for number, run in enumerate(neighbours(examples)):
        corpus = run[0]["corpus"]
        groups = [number, (corpus, run[0]["speaker"]), corpus]
        for start in range(0, len(run), utterances):
            part = run[start : start + utterances]
            text = join_texts([example["text"] for example in part])
            passages.append(Passage(part, text, groups))
    return passages


def read_questions(args, passages: list[Passage]) -> list[Question]:
    """The answerable questions of args.questions about passages. Raises UserError for none."""

    def place(path, example):
        audio = os.path.abspath(Path(path).parent / example["audio"])
        return audio, round(example["start"], 3), round(example["duration"] or 0, 3)

    by_place = {}
    for passage in passages:
        for example in passage.examples:
            by_place[place(args.input, example)] = passage
    questions = []
    for number, example in enumerate(Manifest(args.questions)):
        language = example["target_language"]
        refused = example["text"] in REFUSALS.values()
        if example["task"] == "sqa" and language in args.languages and not refused:
            passage = by_place.get(place(args.questions, example))
            if passage:
                text = example["question"]
                questions.append(Question(number, passage, language, text, example))
    if not questions:
        raise UserError(
            f"{args.questions}: none of its answerable questions in {', '.join(args.languages)} is "
            f"about a recording of {args.input}; both must give the same audio, start and duration"
        )
    return questions


class Questions:
    """The sqa examples about passages, of questions from a manifest or written by the LLM."""

    def __init__(self, args, writer: Writer, made_by: dict):
        self.args = args
        self.writer = writer
        self.made_by = made_by | {"unanswerable": args.unanswerable}
        self.manifest = Manifest(args.input)
        self.limit = 8 + 6 * args.answer_words  # tokens of an answer

        # Without a manifest of questions, one is written about every passage in every language.
        passages = read_passages(self.manifest, args.bare, args.utterances)
        self.names = filters.find_names([passage.text for passage in passages])
        questions = []
        if args.questions:
            questions = read_questions(args, passages)
        else:
            for number, passage in enumerate(passages):
                questions += [Question(number, passage, language) for language in args.languages]

        # Other questions to draw from, and the questions that a passage does answer.
        self.by_group = {}
        self.answered = {}
        for question in questions:
            self.answered.setdefault(question.passage.text, set()).add(question.text)
            for group in question.passage.groups:
                self.by_group.setdefault((group, question.language), []).append(question)
        bar = tqdm(draw_rows(questions, args), "questions", dynamic_ncols=True)
        self.examples = [self.prepare(question) for question in bar]

    def draw_other(self, question: Question, draw: random.Random) -> Question | None:
        """A question about another passage of the recording, else of the speaker or corpus."""
        text = question.passage.text
        for group in question.passage.groups:
            for _ in range(20):
                other = draw.choice(self.by_group[group, question.language])
                repeated = other.text and other.text in self.answered[text]
                if other.passage.text != text and not repeated:
                    return other
        return None

    def draw_unanswerable(self, question: Question, draw: random.Random) -> tuple:
        """A question that the passage does not answer: how, its text, and the question it was."""
        other = self.draw_other(question, draw)
        if draw.random() < 0.5 or other is None:
            text = question.text
            if text:
                text = filters.swap_name(text, question.passage.text, self.names, draw)
            if text or not question.text or other is None:
                return "swap", text, question
        return "other passage", other.text, other

    def prepare(self, question: Question) -> dict:
        """The example that asks a question, or another one which its passage does not answer."""
        passage = question.passage
        language = question.language
        id = f"{question.number + 1} {language}"

        # The draws depend on the seed and the id alone, so that they are the same in every run.
        draw = random.Random(f"{self.args.seed} {id}")
        prompt = f"{REFUSE[language]} {REFUSALS[language]}\n{ANSWER[language]}"
        about = {"kind": "answerable", "transcript": passage.text, "prompt": prompt}
        text = question.text
        original = question
        if draw.random() < self.args.unanswerable:
            way, text, original = self.draw_unanswerable(question, draw)
            about |= {"kind": "unanswerable", "way": way, "asked_of": original.passage.text}
        if self.args.questions and not text:
            about["failed"] = "swap"

        # An example without audio is kept with its reason, beside those that fail by their scores.
        try:
            place = join_audio(self.args.out, self.manifest, passage.examples)
        except AudioError as error:
            place = passage.examples[0]
            about |= {"failed": "audio", "error": str(error)}

        # The passage that the question was asked of and the question's own example are sources.
        sources = passage.examples + original.passage.examples
        fields = {"text": "", "task": "sqa", "target_language": language, "question": text or ""}
        if question.example:
            sources = [*sources, original.example]
            fields["text"] = question.example["text"]
        example = derive(self.args.out, self.manifest, sources, place, **fields)
        return example | {"made_by": self.made_by | about, "id": id}

    def write(self, examples: list[dict]) -> None:
        if not self.args.questions:
            self.write_questions(examples)
        checks = {"answerable": self.check_answerable, "unanswerable": self.check_unanswerable}
        for kind, check in checks.items():
            chosen = [example for example in examples if example["made_by"]["kind"] == kind]
            chosen = [example for example in chosen if "failed" not in example["made_by"]]
            if chosen:
                check(chosen)

    def write_questions(self, examples: list[dict]) -> None:
        """Has the LLM write the question and, if it is to be answerable, the answer."""
        prompts = []
        draws = []
        for example in examples:
            made_by = example["made_by"]
            made_by["question_prompt"] = WRITE
            draw = random.Random(f"{self.args.seed} {example['id']} written")
            words = {"kind": draw.choice(KINDS), "words": self.args.answer_words}
            words |= LANGUAGE_NAMES[example["target_language"]]
            text = made_by.get("asked_of", made_by["transcript"])
            prompts.append(self.writer.prompt(WRITE.format(text=text, **words)))
            draws.append(draw)
        texts = self.writer.reply(prompts, [WRITE_LIMIT] * len(examples))
        for example, draw, text in zip(examples, draws, texts, strict=True):
            made_by = example["made_by"]
            made_by["wrote"] = text
            match = WRITTEN.search(text)
            if not match or len(self.writer.encode(match[0])) > WRITE_LIMIT:
                made_by["failed"] = "form"
                continue
            question = match[1].strip(" *")
            if made_by.get("way") == "swap":
                question = filters.swap_name(question, made_by["transcript"], self.names, draw)
            if not question:
                made_by["failed"] = "swap"
            example |= {"question": question or "", "text": match[2].strip(" *")}

    def read_passage(self, examples: list[dict]) -> tuple:
        """Has the LLM read the questions of examples behind their passages."""
        prompts = []
        for example in examples:
            made_by = example["made_by"]
            question = made_by["prompt"].replace("{question}", example["question"])
            prompts.append(self.writer.prompt(f"{made_by['transcript']}\n{question}"))
        return self.writer.read(prompts)

    def check_answerable(self, examples: list[dict]) -> None:
        """Scores answers by what the LLM answers with and without the passage."""
        # A prompt without the passage shows which answers can be guessed.
        writer = self.writer
        prompts = []
        for example in examples:
            question = ANSWER[example["target_language"]].format(question=example["question"])
            prompts.append(writer.prompt(question))
        answers = [writer.encode(example["text"]) for example in examples]
        limits = [self.limit] * len(examples)
        with_passage = self.read_passage(examples)
        without = writer.read(prompts)
        columns = (
            examples,
            writer.answer(with_passage, limits),
            writer.answer(without, limits),
            writer.weigh(with_passage, answers),
            writer.weigh(without, answers),
        )
        for example, again, guess, (log_p, tokens), (guess_log_p, _) in zip(*columns, strict=True):
            made_by = example["made_by"]
            made_by["again"] = writer.decode(again)
            made_by["without_passage"] = writer.decode(guess)
            scores = filters.answer_scores(example, made_by["transcript"], self.args.answer_words)
            for name, other in (("agreement", "again"), ("guess", "without_passage")):
                language = example["target_language"]
                f1 = item_scores("sqa", language, example["text"], made_by[other])["f1"]
                scores[name] = round(f1, 3)
            scores["gain"] = round((log_p - guess_log_p) / tokens, 4)
            made_by["scores"] = scores

    def check_unanswerable(self, examples: list[dict]) -> None:
        """Makes the refusal the answer, and scores it against the best other answer."""
        writer = self.writer
        # The best other answer is what the LLM says if it may not begin like a refusal.
        never_first = {writer.encode(refusal)[0] for refusal in REFUSALS.values()}
        refusals = [REFUSALS[example["target_language"]] for example in examples]
        asked = self.read_passage(examples)
        others = writer.answer(asked, [self.limit] * len(examples), never_first)
        weights = writer.weigh(asked, [writer.encode(refusal) for refusal in refusals])
        columns = examples, refusals, others, weights, writer.weigh(asked, others)
        for example, refusal, other, (log_p, _), (other_log_p, _) in zip(*columns, strict=True):
            made_by = example["made_by"]
            made_by["best_other"] = writer.decode(other)
            language = int(filters.looks_like(example["question"], example["target_language"]))
            made_by["scores"] = {"language": language, "refusal": round(log_p - other_log_p, 4)}
            example["text"] = refusal


# --------------------------------------------------------------------------------------------------
# The command


def parse_threshold(text: str) -> tuple[str, float]:
    """NAME=NUMBER as a pair."""
    name, _, value = text.partition("=")
    if name not in filters.THRESHOLDS:
        names = ", ".join(filters.THRESHOLDS)
        raise argparse.ArgumentTypeError(f"found {text!r}, expected NAME=NUMBER, of {names}")
    return name, float(value)


def number_within(kind: type, low: float, high: float):
    """A parser of numbers of a kind from low to high, for argparse."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"found {text}, expected {low} to {high}")
        return value

    return number


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    translate = commands.add_parser("translate", help="transcripts into translations")
    questions = commands.add_parser("questions", help="questions about transcripts")
    join = commands.add_parser("concatenate", help="neighbouring utterances as one example")
    choose = commands.add_parser("filter", help="other thresholds, without the LLM")
    for command in (translate, questions, join, choose):
        inputs = "an OUT.all.jsonl" if command is choose else "manifest with transcripts"
        command.add_argument("input", help=inputs)
        command.add_argument("out", type=Path, help="manifest of what passes")

    count = number_within(int, 1, 10**9)
    for command in (translate, questions):
        add = command.add_argument
        add("--llm", required=True, help="LLM that chats in ChatML: directory or Hub id")
        add("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES, help="to write in")
        add("--rows", type=count, help="make so many examples, drawn, instead of all")
        add("--seed", type=int, default=0, help="of all that is drawn")
        add("--batch", type=count, default=32, help="examples the LLM works on together")
        add("--bare", action="store_true", help="transcripts without case and punctuation, too")
    for command in (translate, questions, choose):
        defaults = ", ".join(f"{name}={value:g}" for name, value in filters.THRESHOLDS.items())
        options = {"type": parse_threshold, "nargs": "+", "action": "extend", "default": []}
        command.add_argument("--threshold", metavar="NAME=NUMBER", help=defaults, **options)

    faster = "do not translate back to compare; twice as fast"
    translate.add_argument("--no-round-trip", action="store_true", help=faster)
    add = questions.add_argument
    add("--questions", help="manifest whose sqa examples about the same audio are asked")
    add("--utterances", type=count, default=1, help="how many neighbours a question is about")
    share = number_within(float, 0, 1)
    add("--unanswerable", type=share, default=0.25, help="the share of such questions")
    words = number_within(int, 1, 1000)
    add("--answer-words", type=words, default=10, help="the most; in Chinese, characters")
    join.add_argument("--seconds", type=float, default=30.0, help="the most of an example")
    return parser


def run(args) -> None:
    if args.command == "concatenate":
        return concatenate(args.input, args.out, args.seconds)
    thresholds = filters.THRESHOLDS | dict(args.threshold)
    if args.command == "filter":
        return filters.select(filters.read_made(args.input), args.out, thresholds)

    # A language given twice is meant once.
    args.languages = list(dict.fromkeys(args.languages))
    made_by = {"model": args.llm, "sha256": fingerprint(args.llm)["sha256"], "seed": args.seed}
    makers = {"translate": Translations, "questions": Questions}
    maker = makers[args.command](args, Writer(args.llm), made_by)

    # The settings are all that an example depends on; with other settings a run begins anew.
    settings = {"model": made_by["sha256"], "prompts": [TRANSLATE, WRITE, ANSWER, REFUSE]}
    for name, value in vars(args).items():
        if name not in ("out", "batch", "threshold", "llm"):
            settings[name] = value
        if value and name in ("input", "questions"):
            stat = os.stat(value)
            settings[name] = [value, stat.st_size, stat.st_mtime_ns]

    path = args.out.with_suffix(".all.jsonl")
    examples = produce(maker, path, settings, thresholds, args.batch)
    filters.select(examples, args.out, thresholds)


def main(argv=None) -> None:
    steady_output()
    parser = build_parser()
    args = parser.parse_args(argv)
    if os.path.abspath(args.input) == os.path.abspath(args.out):
        parser.error(f"{args.input} is both input and output; give another name for the output")
    try:
        run(args)
    except (UserError, OSError, torch.cuda.OutOfMemoryError) as error:
        sys.exit(f"prepare.synth: {error}")
    except KeyboardInterrupt:
        print("prepare.synth: stopped; start again to go on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
