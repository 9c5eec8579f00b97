"""Answers and scores the official XML files of IWSLT instruction following and of MCIF.

    python -m prepare.mcif answer SRC.xml --audio DIR --out HYP.xml
    python -m prepare.mcif score HYP.xml REF.xml

The format is what the code of https://github.com/hlt-mt/mcif does: <task track="short"
text_lang="de"> elements with <sample id="0"> elements, in UTF-8, plain or gzipped. The track is
short or long, the language that of the answers; an id is a string that is unique within its task.
Scores are those that need no downloaded model: neither COMET nor BERTScore.
"""

import argparse
import gzip
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from data import REFUSALS, audio_seconds, load_audio, recognise, write_atomically
from eval import (
    Journal,
    answer_manifest,
    item_scores,
    normalise,
    print_scores,
    run_settings,
    summarise,
)
from model import (
    UserError,
    keep_freed_memory,
    one_line_errors,
    pick_device,
    steady_output,
    visible,
)
from sample import fast_step, load_model, newest_checkpoint

Key = tuple[str, str]  # the track and the language of a task


class Reference(NamedTuple):
    ids: list[str]  # the samples that it covers, in the short track all segments of a talk
    task: str  # asr, st or sqa
    lines: list[str]


# --------------------------------------------------------------------------------------------------
# Reading

REMEDY = "expected an official file, XML in UTF-8; correct the path or copy the file again"
TASKS = {"ASR": "asr", "TRANS": "st", "ST": "st", "QA": "sqa", "SQA": "sqa"}  # of MCIF and of 2025


def read_tasks(path: str | Path) -> list[tuple[Key, list]]:
    """(key, [(id, element) of each sample]) of every task element, at any depth. Raises whatever
    its parts raise; the readers below make one line of it."""
    data = Path(path).read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    if b"<!DOCTYPE" in data:  # the one way to entities, as the file is UTF-8
        raise ValueError("found a DOCTYPE")
    tasks = []
    for task in ElementTree.fromstring(data.decode()).iter("task"):
        key = required(task.get("track"), "track"), required(task.get("text_lang"), "text_lang")
        samples = [(required(sample.get("id"), "id"), sample) for sample in task.iter("sample")]
        tasks.append((key, samples))
    if not tasks:
        raise ValueError("found no task element")
    return tasks


def required(value: str | None, what: str) -> str:
    if not (value or "").strip():
        raise ValueError(f"found no {what}")
    return value


def read_source(path: str | Path, folder: Path) -> list[dict]:
    """The samples of a source file, in its order, as examples for eval.answer_manifest; their
    recordings lie in folder. Raises UserError, also for an id that is twice in a task."""
    examples = {}
    with one_line_errors(path, REMEDY):
        for (track, language), samples in read_tasks(path):
            for id, sample in samples:
                name = f"{track} {language} {id}"
                if name in examples:
                    raise ValueError(f"found id {id!r} twice in task {track} {language}")
                where = f"in sample {id!r}"
                audio = required(sample.findtext("audio_path"), f"audio_path {where}").strip()
                instruction = required(sample.findtext("instruction"), f"instruction {where}")
                examples[name] = {
                    "id": name,
                    "place": (track, language, id),
                    "audio": audio,
                    "seconds": audio_seconds(folder / audio),
                    "instruction": instruction.strip(),
                    "task": sample_task(instruction),
                    "source_language": "en",
                    "target_language": language,
                }
        if not examples:
            raise ValueError("found no sample")
    return list(examples.values())


# Words of the official instructions to questions and summaries
QUESTION = re.compile("question|frage|domanda|问题|summar|zusammen|riassu|总结|概括|摘要", re.I)


def sample_task(instruction: str) -> str | None:
    """The task of a sample, which the files do not tell. A summary counts as a question: it is
    about the recording as one piece."""
    task, _ = recognise(instruction)
    return "sqa" if task is None and QUESTION.search(instruction) else task


def read_answers(path: str | Path) -> dict[Key, dict[str, str]]:
    """The answers by their ids, as the official scorer reads them: of tasks with equal key the
    first counts, of samples with equal id the last, and texts are stripped. Raises UserError."""
    tasks = {}
    with one_line_errors(path, REMEDY):
        for key, samples in read_tasks(path):
            tasks.setdefault(key, {id: (sample.text or "").strip() for id, sample in samples})
    return tasks


def read_references(path: str | Path) -> dict[Key, list[Reference]]:
    """The references of transcripts, translations and questions, as the official scorer reads them:
    of tasks with equal key the first counts, of samples with equal task and iid the last. Raises
    UserError."""
    tasks = {}
    with one_line_errors(path, REMEDY):
        for key, samples in read_tasks(path):
            references = {}
            for ids, sample in samples:
                where = f"in sample {ids!r}"
                task = TASKS.get(required(sample.get("task"), f"task {where}"))
                lines = required(sample.findtext("reference"), f"reference {where}").split("\n")
                if task:
                    references[task, sample.get("iid")] = Reference(ids.split(","), task, lines)
            tasks.setdefault(key, list(references.values()))
    return tasks


# --------------------------------------------------------------------------------------------------
# Writing

# What XML 1.0 cannot hold, not even escaped: https://www.w3.org/TR/xml/#charsets. All white space
# stays, for split() to see it.
NOT_XML = re.compile("[^\\s\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(text: str) -> str:
    """The text without the characters that XML cannot hold (control characters, lone surrogates,
    U+FFFE, U+FFFF), and with each run of white space, newlines too, made one space."""
    return " ".join(NOT_XML.sub("", text).split())


def write_answers(path: str | Path, name: str, answers: dict[Key, dict[str, str]]) -> None:
    """Writes the answers of a system of this name as the official scorer wants them; the texts are
    xml_text's. The new file is read back before it replaces an older one. Raises UserError if it
    then has other ids or texts, OSError where the disk fails."""
    root = ElementTree.Element("testset", name=xml_text(name), type="output")
    for (track, language), texts in answers.items():
        task = ElementTree.SubElement(root, "task", track=track, text_lang=language)
        for id, text in texts.items():
            ElementTree.SubElement(task, "sample", id=id).text = text
    ElementTree.indent(root)

    def save(file):
        ElementTree.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)
        file.flush()
        if read_answers(file.name) != answers:
            raise UserError(f"{path}: found other texts on reading it back; check the disk")

    write_atomically(Path(path), save)


# --------------------------------------------------------------------------------------------------
# Answering


def answer(args: argparse.Namespace) -> int:
    """Answers every id of a source file. Those whose recording cannot be heard get the refusal if
    they are questions, else an empty text; returns how many they are. Raises UserError."""
    keep_freed_memory()
    folder, out = Path(args.audio), Path(args.out)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give that of the recordings")
    examples = read_source(args.source, folder)
    path = Path(args.ckpt or newest_checkpoint())
    device = pick_device()
    model, tokenizer, checkpoint = load_model(path, device, args.int8, args.encoder, args.llm)

    # What an earlier run with the same settings answered is taken from the journal.
    items, failed = answer_manifest(
        model,
        tokenizer,
        checkpoint,
        examples,
        lambda example: load_audio(folder / example["audio"]),
        Journal(out.with_suffix(".answers.jsonl"), run_settings(path, args.source, args)),
        num_beams=args.beams,
        step=fast_step(),
    )

    # The official score punishes an empty answer to a question more than a refusal.
    answers = {}
    for example in examples:
        track, language, id = example["place"]
        item = items.get(example["id"], {"hypothesis": ""})
        text = xml_text(item["hypothesis"])
        if not text and example["task"] == "sqa":
            text = REFUSALS.get(language, REFUSALS["en"])
        answers.setdefault((track, language), {})[id] = text
    write_answers(out, path.stem, answers)
    print(f"{visible(out)}: {len(examples)} answers, {len(failed)} without a usable recording")
    return len(failed)


# --------------------------------------------------------------------------------------------------
# Scoring

# A word or, of Chinese, a character, with the space before it
UNIT = re.compile(r"\s*(?:[\u3000-\u9fff\uff00-\uffef]|[^\s\u3000-\u9fff\uff00-\uffef]+)")


def edit_distances(hypothesis: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Between the first r units of the reference and the first h of the hypothesis:
    (H,), (R,) -> (R + 1, H + 1)."""
    steps = np.arange(len(hypothesis) + 1)
    distances = np.zeros((len(reference) + 1, len(steps)), np.int32)
    distances[0] = steps
    for r, unit in enumerate(reference, 1):
        row = distances[r - 1] + 1  # the unit is left out
        row[1:] = np.minimum(row[1:], distances[r - 1, :-1] + (hypothesis != unit))
        # Each unit too much costs one more than the place to its left.
        distances[r] = np.minimum.accumulate(row - steps) + steps
    return distances


def resegment(texts: list[str], lines: list[str]) -> list[str]:
    """Cuts the words of texts into one piece for each reference line: where an alignment of least
    edit distance puts the ends of the lines (Matusov et al., IWSLT 2005)."""
    units = UNIT.findall(" ".join(texts))
    line_units = [UNIT.findall(line) for line in lines]
    hypothesis = np.array([unit.strip() for unit in units], str)
    reference = np.array([unit.strip() for line in line_units for unit in line], str)
    distances = edit_distances(hypothesis, reference)

    # ends[r] is how many units of the hypothesis go with the first r of the reference. The way back
    # from the last leads over units too much to the one in place of unit r, unless it is left out.
    ends = [0] * (len(reference) + 1)
    h = len(hypothesis)
    for r in range(len(reference), 0, -1):
        ends[r] = h
        while h:
            replaced = distances[r - 1, h - 1] + (hypothesis[h - 1] != reference[r - 1])
            if distances[r, h] == replaced:
                h -= 1
                break
            if distances[r, h] == distances[r - 1, h] + 1:
                break
            h -= 1
    ends[0] = h

    cuts = [ends[r] for r in np.cumsum([0, *map(len, line_units)])]
    cuts[0], cuts[-1] = 0, len(units)
    return ["".join(units[start:end]).strip() for start, end in pairwise(cuts)]


def score_items(reference: Reference, texts: list[str], language: str) -> list[dict]:
    """An item of eval.summarise for each line of a translation, each talk, and each question."""
    task, lines = reference.task, reference.lines
    if task == "asr":  # the segments are normalised before they are joined, as the scorer does
        lines = [normalise(line, language) for line in lines]
        texts = [normalise(text, language) for text in texts]
    pairs = [(" ".join(lines), " ".join(texts))]
    if task == "st":
        pairs = zip(lines, resegment(texts, lines), strict=True)
    items = []
    for line, text in pairs:
        item = {"task": task, "target_language": language, "corpus": "", "speaker": ""}
        scores = item_scores(task, language, line, text)
        items.append({**item, "reference": line, "hypothesis": text, "scores": scores})
    return items


def score(args: argparse.Namespace) -> None:
    """Prints the scores of every track and language of a reference file. Raises UserError, also if
    an id has no answer."""
    answers = read_answers(args.hypothesis)
    for (track, language), references in read_references(args.reference).items():
        texts = answers.get((track, language), {})
        ids = [id for reference in references for id in reference.ids]
        missing = [id for id in ids if id not in texts]
        if missing:
            raise UserError(
                f"{args.hypothesis}: found no answer to {missing[0]!r} and {len(missing) - 1} more "
                f"of track {track}, language {language}; answer every id"
            )
        items = []
        for reference in references:
            items += score_items(reference, [texts[id] for id in reference.ids], language)
        print(f"{visible(track)} track, answers in {visible(language)}:")
        print_scores(summarise(items)[0])


# --------------------------------------------------------------------------------------------------
# The program


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("answer", help="answer every instruction of a source file")
    command.set_defaults(run=answer)
    command.add_argument("source", help="the source file")
    command.add_argument("--audio", required=True, help="directory of its recordings")
    command.add_argument("--out", required=True, help="the answer file to be written")
    command.add_argument("--ckpt", help="checkpoint; otherwise the newest of out/")
    command.add_argument("--beams", type=int, default=1, help="beams of the search; 1 is greedy")
    command.add_argument("--int8", action="store_true", help="8-bit LLM weights: less memory")
    command.add_argument("--encoder", help="the encoder, if it is not where it was in training")
    command.add_argument("--llm", help="the LLM, if it is not where it was in training")
    command = commands.add_parser("score", help="score an answer file")
    command.set_defaults(run=score)
    command.add_argument("hypothesis", help="the answer file")
    command.add_argument("reference", help="the reference file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    steady_output()
    args = parse(argv)
    try:
        failed = args.run(args)
    except UserError as error:
        sys.exit(f"mcif: {error}")
    except OSError as error:
        place = visible(f"{error.filename}: {error.strerror}")
        sys.exit(f"mcif: {place}; what was answered is kept: start again")
    except KeyboardInterrupt:
        print("mcif: stopped; start again to go on from here", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
