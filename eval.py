"""Scores what a checkpoint answers: python eval.py demo/test.jsonl

Every answer goes at once into a journal, so that a run that was stopped goes on where it was.
"""

import argparse
import json
import os
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import lru_cache
from itertools import chain, count
from pathlib import Path

# Idle threads spin only briefly, see tests/bench/README.md. It counts only before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the long imports at once

import jiwer
import numpy as np
import sacrebleu
from torch import Tensor
from tqdm import tqdm
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

import data
import sample
from model import UserError, keep_freed_memory, pick_device, steady_output, visible
from sample import Answer, answer_examples, encode_waves, load_model

GROUP_ROWS, GROUP_SECONDS = 32, 600.0  # examples and audio that are encoded and answered together
FALSE_REFUSALS = 0.125  # share of the answerable questions that may be refused


# --- Scores


@lru_cache
def normaliser(language: str) -> Callable[[str], str]:
    if language == "en":
        return EnglishTextNormalizer()
    basic = BasicTextNormalizer(split_letters=language in data.UNSPACED)
    basic.clean = remove_symbols
    return basic


def remove_symbols(text: str) -> str:
    """Spaces for symbols and punctuation. Whisper's own takes vowel marks, as of Thai, for such."""
    characters = unicodedata.normalize("NFKC", text)
    return "".join(" " if unicodedata.category(c)[0] in "SP" else c for c in characters)


def normalise(text: str, language: str) -> str:
    """A text after Whisper's normalisers. In scripts without spaces, characters become words."""
    return normaliser(language)(text).strip()


def item_scores(task: str, language: str, reference: str, hypothesis: str) -> dict:
    """What one answer adds to the scores of a corpus, and its "error", 0 for a right one."""
    about_words = {"speechless": int(not reference), "answered": int(bool(hypothesis))}
    if task == "st":
        empty = not reference and not hypothesis
        chrf = 100.0 if empty else sacrebleu.sentence_chrf(hypothesis, [reference]).score
        return {"error": 1 - chrf / 100, "chrf": round(chrf, 1)} | about_words
    language = data.language_code(language) or language
    r, h = normalise(reference, language), normalise(hypothesis, language)
    of_task = transcript_scores if task == "asr" else question_scores
    return of_task(language, r, h) | about_words


def transcript_scores(language: str, reference: str, hypothesis: str) -> dict:
    texts = [reference, hypothesis]
    words = jiwer.process_words(*texts)
    if language in data.UNSPACED:
        texts = [text.replace(" ", "") for text in texts]
    scores = {}
    for unit, aligned in (("word", words), ("character", jiwer.process_characters(*texts))):
        lost = aligned.substitutions + aligned.deletions
        scores[f"{unit}_errors"] = lost + aligned.insertions
        scores[f"{unit}s"] = lost + aligned.hits
    return {"error": scores["word_errors"] / max(1, scores["words"])} | scores


def question_scores(language: str, reference: str, hypothesis: str) -> dict:
    refusals = [normalise(refusal, language) for refusal in data.REFUSALS.values()]
    refused, unanswerable = hypothesis in refusals, reference in refusals
    r, h = reference.split(), hypothesis.split()
    common = sum((Counter(r) & Counter(h)).values())
    f1 = 2 * common / max(1, len(r) + len(h))
    right = refused if unanswerable else reference == hypothesis
    # A wrong answer that shares words with the right one is half an error at least.
    shared = 0.0 if unanswerable or refused else 0.5 * f1
    return {
        "error": 0.0 if right else 1 - shared,
        "right": int(right),
        "f1": f1,
        "refused": int(refused),
        "unanswerable": int(unanswerable),
        "answerable": int(not unanswerable),
    }


# Ratios of sums over items: the name, and which scores of an item are multiplied above and below.
RATIOS = {
    "asr": [("WER", ["word_errors"], "words"), ("CER", ["character_errors"], "characters")],
    "st": [],
    "sqa": [
        ("exact match", ["right", "answerable"], "answerable"),
        ("F1", ["f1", "answerable"], "answerable"),
        ("refusal precision", ["refused", "unanswerable"], "refused"),
        ("refusal recall", ["refused", "unanswerable"], "unanswerable"),
        ("false refusals", ["refused", "answerable"], "answerable"),
    ],
    "every task": [("invented", ["answered", "speechless"], "speechless")],
}


def bleu(language: str) -> sacrebleu.BLEU:
    """BLEU with sacrebleu's tokenizer for a language; by characters where that is not installed."""
    tokenizers = {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}
    language = data.language_code(language) or language
    usual = "char" if language in data.UNSPACED else "13a"
    try:
        return sacrebleu.BLEU(tokenize=tokenizers.get(language, usual))
    except (ImportError, RuntimeError):
        return sacrebleu.BLEU(tokenize="char")


def corpus_scores(items: list[dict], draws: int = 1000) -> tuple[dict, dict]:
    """Scores of items of one task and target language, {name: (value, low, high)} with the 95 %
    interval of bootstrap draws (Koehn, 2004), and sacrebleu's signatures. BLEU and chrF are %."""
    task, language = items[0]["task"], items[0]["target_language"]
    picks = np.random.default_rng(0).integers(len(items), size=(draws, len(items)))
    scores, signatures = {}, {}
    for name, above, below in RATIOS[task] + RATIOS["every task"]:
        factors = [[item["scores"][name] for name in above] for item in items]
        numerators = np.array(factors, float).prod(1)
        denominators = np.array([item["scores"][below] for item in items], float)
        if denominators.sum():
            value = numerators.sum() / denominators.sum()
            sums = denominators[picks].sum(1)
            usable = sums > 0
            drawn = numerators[picks].sum(1)[usable] / sums[usable]
            scores[name] = value, *interval(drawn)
    if task == "st" and any(item["reference"] for item in items):
        for metric in (bleu(language), sacrebleu.CHRF()):
            hypotheses = [item["hypothesis"] for item in items]
            references = [[item["reference"] for item in items]]
            result = metric.corpus_score(hypotheses, references)
            # sacrebleu's own bootstrap stumbles over a draw of score 0.
            counts = np.array(metric._extract_corpus_statistics(hypotheses, references))
            sums = [counts[pick].sum(0).tolist() for pick in picks]
            drawn = [metric._compute_score_from_stats(total).score for total in sums]
            scores[result.name] = result.score, *interval(drawn)
            signatures[f"{result.name} {language}"] = str(metric.get_signature())
    return scores, signatures


def interval(drawn) -> tuple:
    """The 95 % interval of bootstrap draws; (None, None) if there are none."""
    return tuple(np.percentile(drawn, (2.5, 97.5))) if len(drawn) else (None, None)


def by_kind(items: list[dict]) -> list[tuple[tuple[str, str], list[dict]]]:
    """[((task, target language), its items)], in the order of data.TASKS."""
    kinds = {}
    for item in items:
        kinds.setdefault((item["task"], item["target_language"]), []).append(item)
    return sorted(kinds.items(), key=lambda entry: (data.TASKS.index(entry[0][0]), entry[0][1]))


def summarise(items: list[dict], least: int = 100) -> tuple[list[dict], dict]:
    """A list of the scores of every task and target language, over all items, by corpus and by
    speaker, or other speakers with fewer than `least` items, if there are several; signatures."""
    table, signatures = [], {}
    for (task, language), of_kind in by_kind(items):
        speakers = Counter(item["speaker"] for item in of_kind)
        groups = {"all": of_kind}
        for field in ("corpus", "speaker"):
            for item in of_kind:
                rare = field == "speaker" and speakers[item["speaker"]] < least
                name = "other speakers" if rare else f"{field} {item[field]}"
                groups.setdefault(name, []).append(item)
        for name, group in groups.items():
            if name != "all" and len(group) == len(of_kind):
                continue
            scores, marks = corpus_scores(group)
            signatures |= marks
            rounded = {key: [round(float(x), 4) for x in values] for key, values in scores.items()}
            line = {"task": task, "language": language, "group": name, "items": len(group)}
            table.append(line | {"scores": rounded})
    return table, signatures


VALIDATED = ("WER", "BLEU", "exact match", "refusal recall", "false refusals")


def validation_scores(pairs: list[tuple[dict, str]]) -> dict[str, float]:
    """Figures of (example, answer) pairs for a validation: each score's mean over languages."""
    items, values = [], {}
    for example, text in pairs:
        scores = item_scores(example["task"], example["target_language"], example["text"], text)
        items.append(example | {"reference": example["text"], "hypothesis": text, "scores": scores})
    for _, of_kind in by_kind(items):
        for name, (value, *_) in corpus_scores(of_kind, draws=0)[0].items():
            if name in VALIDATED:
                values.setdefault(name.lower().replace(" ", "_"), []).append(value)
    return {name: sum(of_languages) / len(of_languages) for name, of_languages in values.items()}


def refusal_threshold(examples: list[dict], answers: list[Answer | data.AudioError]) -> dict:
    """The lowest margin above which no more than FALSE_REFUSALS of the answerable questions are
    refused, {"refuse_above": margin}; {} unless there are such questions and others."""
    answerable, refusable = [], []
    for example, answer in zip(examples, answers, strict=True):
        if isinstance(answer, Answer):
            margins = refusable if example["text"] in data.REFUSALS.values() else answerable
            margins.append(answer.margin)
    if not answerable or not refusable:
        return {}
    allowed = int(FALSE_REFUSALS * len(answerable))
    return {"refuse_above": sorted(answerable)[-1 - allowed]}


# --- Answers, kept as they are made


class Journal:
    """Items with an "id" in a JSON Lines file that grows as they are made, with their settings in a
    .json file beside it. Items of other settings are moved aside, with all that is beside them."""

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.items: dict[str, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        same = False
        with suppress(OSError, ValueError, KeyError, TypeError):
            text = path.with_suffix(".json").read_text(encoding="utf-8")
            same = json.loads(text)["settings"] == settings
        if same:
            self.items = {item["id"]: item for item in data.read_lines(path)}
            print(f"{visible(path)}: {len(self.items)} items are there already")
        elif path.exists() and path.stat().st_size:
            names = (path.with_suffix(f".old{number}.jsonl") for number in count(1))
            aside = next(name for name in names if not name.exists())
            for suffix in (".jsonl", ".json", ".html"):
                if path.with_suffix(suffix).exists():
                    os.replace(path.with_suffix(suffix), aside.with_suffix(suffix))
            print(visible(f"{path}: held items of other settings, now in {aside.name}"))
        # What a kill left of a line is not kept.
        data.write_text(path, "".join(map(json_line, self.items.values())))
        if not same:
            data.write_text(path.with_suffix(".json"), json_line({"settings": settings}))

    def add(self, item: dict) -> None:
        self.items[item["id"]] = item
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json_line(item))


def json_line(item: dict) -> str:
    return json.dumps(item, ensure_ascii=False) + "\n"


def answer_manifest(model, tokenizer, checkpoint, examples, load_wave, journal, **options) -> tuple:
    """Answers examples that have an "id" and "seconds" and are not in the journal (a Journal) yet,
    those about one recording together. load_wave(example) gives the waveform (N,) or raises
    AudioError. options: those of answer_examples. Returns {id: item} and {id: why it has none}."""
    failures = {}
    pending = [example for example in examples if example["id"] not in journal.items]
    with tqdm(total=len(pending), desc="eval", unit=" rows", dynamic_ncols=True) as bar:
        options = {"refuse_above": checkpoint.get("refuse_above"), "on_batch": bar.update} | options
        for group in group_recordings(pending):
            waves, answerable = {}, []
            for example in group:
                key = recording_key(example)
                try:
                    if key not in waves:
                        waves[key] = load_wave(example)
                    answerable.append(example)
                except data.AudioError as error:
                    failures[example["id"]] = str(error)
            recordings = encode_waves(model, list(waves.values()), checkpoint["window"])
            by_key = dict(zip(waves, recordings, strict=True))
            encoded = [by_key[recording_key(example)] for example in answerable]
            answers = answer_examples(model, tokenizer, answerable, encoded, **options)
            for example, answer in zip(answerable, answers, strict=True):
                if isinstance(answer, data.AudioError):
                    failures[example["id"]] = str(answer)
                    continue
                seconds = len(waves[recording_key(example)]) / data.SAMPLE_RATE
                journal.add(make_item(example, answer, seconds))
    for example in examples:
        if example["id"] in failures:
            where = example.get("where") or example["id"]
            print(visible(f"left out: {where}: {failures[example['id']]}"), file=sys.stderr)
    return journal.items, failures


def recording_key(example: dict) -> tuple:
    return example["audio"], example.get("start"), example.get("duration")


def group_recordings(examples: list[dict]) -> list[list[dict]]:
    """Groups to be answered together, the longest recordings first, and none in two of them."""
    recordings = {}
    for example in examples:
        recordings.setdefault(recording_key(example), []).append(example)
    longest_first = sorted(recordings.values(), key=lambda group: -group[0]["seconds"])
    sizes = [(group[0]["seconds"], len(group), group) for group in longest_first]
    groups = data.cut_batches(sizes, GROUP_SECONDS, GROUP_ROWS)
    return [list(chain(*group)) for group in groups]


ITEM_FIELDS = "id audio start task source_language target_language corpus speaker".split()


def make_item(example: dict, answer: Answer, seconds: float) -> dict:
    """What the journal keeps of an answer, with scores if there is a reference."""
    item = {name: example.get(name) for name in ITEM_FIELDS} | {
        "seconds": round(seconds, 3),
        "reference": example.get("text"),
        "instruction": data.instruction_of(example),
        "hypothesis": answer.text,
        "cut": answer.cut,
        "margin": answer.margin,
    }
    if item["reference"] is not None:
        kind = example["task"], example["target_language"]
        item["scores"] = item_scores(*kind, item["reference"], answer.text)
    return item


# --- The program


def run_settings(ckpt: Path, source: str, args: argparse.Namespace) -> dict:
    """What the answers of a run depend on."""
    settings = {"beams": args.beams, "int8": args.int8}
    for name, path in (("checkpoint", ckpt), ("source", source)):
        status = os.stat(path)
        settings[name] = [os.path.realpath(path), status.st_size, status.st_mtime_ns]
    return settings


def evaluate(args: argparse.Namespace) -> None:
    """Answers and scores a manifest, and leaves items, summary and report in a directory."""
    ckpt = Path(args.ckpt or sample.newest_checkpoint())
    options = pick_device(), args.int8, args.encoder, args.llm
    model, tokenizer, checkpoint = load_model(ckpt, *options)
    manifest = data.Manifest(args.manifest)
    examples = {}
    for i, example in enumerate(manifest, 1):
        if args.degrade in ("silence", "noise"):
            example["text"] = data.speechless_answer(example)
        if example["task"] in args.tasks and example["text"] is not None:
            examples[str(i)] = example | {"id": str(i), "seconds": manifest.seconds(example)}

    def load_wave(item: dict) -> Tensor:
        example = examples[item["id"]]
        path = manifest.path.parent / example["audio"]
        wave = data.load_audio(path, example["start"], example["duration"])
        if args.degrade:
            seed = list(repr(recording_key(example)).encode())  # one for all rows about it
            wave = data.DEGRADATIONS[args.degrade](wave, np.random.default_rng(seed), manifest)
        return wave

    settings = run_settings(ckpt, args.manifest, args) | {"degrade": args.degrade}
    name = "-".join(filter(None, [manifest.path.stem, ckpt.stem, args.degrade]))
    path = Path(args.out) / f"{name}.jsonl"
    journal = Journal(path, settings)
    inputs = model, tokenizer, checkpoint, list(examples.values()), load_wave, journal
    answers, failures = answer_manifest(*inputs, num_beams=args.beams, step=sample.fast_step())
    items = [answers[i] for i in examples if i in answers]
    if not items:
        count = f"{len(examples)} rows of the tasks {', '.join(args.tasks)}"
        raise UserError(f"{args.manifest}: none of its {count} could be answered; see --tasks")
    table, signatures = summarise(items)
    facts = {
        "checkpoint": f"{ckpt}, phase {checkpoint['config']['phase']}, step {checkpoint['step']}",
        "date": str(date.today()),
        f"cut off at {sample.MAX_NEW_TOKENS} tokens": sum(item["cut"] for item in items),
        "rows": f"{len(items)} answered, {len(failures)} left out",
        "refused above": checkpoint.get("refuse_above"),
    }
    summary = {"settings": settings, **facts, "scores": table, "signatures": signatures}
    data.write_text(path.with_suffix(".json"), json.dumps(summary, ensure_ascii=False, indent=1))
    print_scores(table)
    print(visible(f"{path.with_suffix('.json')}: the summary; answers are beside it"))
    with suppress(ImportError):
        from extras.report import write_report

        page = path.with_suffix(".html")
        write_report(page, path.stem, facts, table, signatures, items, load_wave)
        print(visible(f"{page}: the report, worst answers first"))


def print_scores(table: list[dict]) -> None:
    for line in table:
        scores = []
        for name, (value, low, high) in line["scores"].items():
            scale, unit = (1, "") if name in ("BLEU", "chrF2") else (100, " %")
            spread = f"{scale * low:.1f}-{scale * high:.1f}"
            scores.append(f"{name} {scale * value:.1f}{unit} ({spread})")
        group = f"{line['task']} {line['language']}, {line['group']}, {line['items']}"
        print(visible(f"{group}: {', '.join(scores)}"))


def main(argv: list[str] | None = None) -> None:
    steady_output()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("manifest", help="manifest to be answered and scored")
    add("--ckpt", help="checkpoint; otherwise the newest of out/ift.pt and out/align.pt")
    add("--out", default="out/eval", help="directory of answers, summary and report (%(default)s)")
    add("--tasks", nargs="+", choices=data.TASKS, default=data.TASKS, help="rows to be answered")
    add("--beams", type=int, default=1, help="beam search with so many beams; 1 is greedy")
    add("--degrade", choices=data.DEGRADATIONS, help="do this to every recording first")
    add("--int8", action="store_true", help="8-bit LLM weights: less memory, faster alone")
    add("--encoder", help="directory or Hub id of the encoder, if it is not where it was")
    add("--llm", help="directory or Hub id of the LLM, if it is not where it was")
    args = parser.parse_args(argv)
    if args.beams < 1:
        parser.error(f"num_beams {args.beams} must be at least 1")
    keep_freed_memory()
    try:
        evaluate(args)
    except UserError as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        print("eval.py: stopped; start again to go on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        place = visible(f"{error.filename or args.out}: {error.strerror}")
        sys.exit(f"eval.py: {place}; what was answered is kept: start again")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
