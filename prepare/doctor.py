"""Checks manifests before training: python -m prepare.doctor train.jsonl --against test.jsonl

Prints figures by corpus, task and languages, then findings; OUT/train.json has all lines of each.
Exit code 0: nothing serious; 1: something would spoil training; 2: a manifest cannot be read.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import model
from data import REFUSALS, letter_count, text_hash
from model import UserError, one_line_errors, visible

ALWAYS, FEW, MANY, NEVER = 0.0, 0.01, 0.05, 1.0
KINDS = {  # kind: (share of the rows above which it is serious, fault, remedy)
    "example": (ALWAYS, "cannot be trained on", "correct or delete them"),
    "refused": (ALWAYS, "must not be trained on", "leave them out, or see --allow-licence"),
    "audio": (ALWAYS, "have audio that cannot be used", "copy it again or leave them out"),
    "context": (ALWAYS, "are longer than the LLM's context", "shorten them, or see --tokenizer"),
    "cut": (ALWAYS, "have too little audio for their text", "get it again or leave them out"),
    "test text": (ALWAYS, "have a text of a test", "leave them out"),
    "test audio": (ALWAYS, "have a recording of a test", "leave them out"),
    "duration": (FEW, "are under 0.1 s or over 30 s", "cut them or see --max-seconds"),
    "speed": (MANY, "have an impossible speed", "give text and seconds of the same speech"),
    "language": (MANY, "are not in their target_language", "correct it or the text"),
    "refusal": (FEW, "refuse otherwise than training does", "use the words of data.REFUSALS"),
    "duplicate": (MANY, "repeat an earlier one", "leave them out"),
    "two texts": (MANY, "contradict an earlier one", "decide for one text"),
    "test row": (NEVER, "could not be compared", "check the tests, too"),
}
GROUP = ("corpus", "task", "source_language", "target_language")
REQUEST = ("recording", *GROUP[1:], "question", "instruction", "style")
# Characters a second that are possible. Translations may be longer than what is spoken.
SPEEDS = {"asr": (1.5, 40), "st": (1.5, 60), "sqa": (0, math.inf)}
CJK_SPEEDS = {"asr": (0.5, 20), "st": (0.5, 30), "sqa": (0, math.inf)}
MIN_SECONDS, MAX_SECONDS = 0.1, 30.0  # the latter is the default of training
SILENCE = -60  # dBFS
KNOWN_TEXT, KNOWN_QUESTION = 20, 40  # letters: shorter texts may be alike by chance

CJK = ("zh", "yue", "ja", "ko")
SCRIPTS = {"zh": "[\u3400-\u9fff]", "ja": "[\u3040-\u30ff\u3400-\u9fff]", "ko": "[\uac00-\ud7af]"}
SCRIPTS |= dict.fromkeys(("en", "de", "it", "fr", "es", "pt", "nl"), "[A-Za-z\u00c0-\u024f]")
COMMON = {
    "en": set("the and of is that with this are have you they not it to there for".split()),
    "de": set("der die das und ist nicht ein eine den dem mit auf von sie ich wir".split()),
    "it": set("il che di è non una per la sono con le gli della nel del si".split()),
}
REFUSING = re.compile(
    r"not answerable|unanswerable|can ?(not|['’]t) (be )?answer|^n/a\W*$|nicht (zu )?beantwort|"
    "unbeantwortbar|non (è possibile|si può|posso) risponde|(无法|不能|没法)(作答|回答)"
)
Recording = tuple[str, float, float | None]  # file, start and duration in seconds


class Sound(NamedTuple):
    seconds: float
    content: str = ""  # hash of the samples, empty if they were not decoded
    error: str = ""


def looks_like(text: str, language: str) -> bool:
    """Whether a text can be in a language, by its script and its commonest words. True for names
    and numbers; false for a text without letters and digits."""
    letters = sum(map(str.isalpha, text))
    if language not in SCRIPTS or not letters:
        return any(map(str.isalnum, text))

    # Names may be in another script; one Chinese character is about as much as three letters.
    in_script = len(re.findall(SCRIPTS[language], text))
    if 3 * in_script < letters:
        return letters < (KNOWN_TEXT if language in CJK else 2)

    # Two common words of another language and none of this one speak for the other one.
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {name: sum(word in common for word in words) for name, common in COMMON.items()}
    return counts.get(language, 1) > 0 or max(counts.values()) < 2


def refuses_otherwise(text: str, language: str) -> bool:
    """Whether an answer refuses, but not in the words that training has for its language."""
    if text in REFUSALS.values():
        return REFUSALS.get(language, text) != text
    alike = text_hash(text) in map(text_hash, REFUSALS.values())
    return alike or letter_count(text) < 60 and bool(REFUSING.search(text.casefold()))


def known_by(example: dict) -> str:
    """The hash of a text, or of a question with its answer; empty if it may be alike by chance."""
    text, question = example["text"], example.get("question", "")
    if example["task"] == "sqa":
        return text_hash(question + text) if letter_count(question) >= KNOWN_QUESTION else ""
    return text_hash(text) if letter_count(text) >= KNOWN_TEXT else ""


def reason_of(error: UserError) -> str:
    """An error's message without its place and remedy, which a finding has by itself."""
    return re.sub(r"^.*? line \d+: |; [^;]*$", "", str(error))


def read_examples(paths: list[str], faults: dict[str, str]) -> list[dict]:
    """The examples of manifests, each with its recording. Lines that are none go into faults.
    Raises UserError for a manifest that cannot be read or has no example."""
    examples = []
    for path in paths:
        manifest = data.Manifest(path)
        before = len(examples)
        for i in tqdm(range(len(manifest)), manifest.path.name, unit=" lines", mininterval=1):
            try:
                example = manifest[i]
                data.instruction_of(example)  # of which there may be none for the language
            except UserError as error:
                faults[f"{path} line {manifest.lines[i] + 1}"] = reason_of(error)
                continue
            file = os.path.abspath(manifest.path.parent / example["audio"])
            examples.append(example | {"recording": (file, example["start"], example["duration"])})
        if len(examples) == before:
            where, reason = next(reversed(faults.items()))
            raise UserError(f"{where} and all others: {reason}; give a manifest")
    return examples


def examine(recording: Recording, decode: bool) -> Sound:
    """Decodes a recording that training takes, or else finds out its duration."""
    torch.set_num_threads(1)  # as there is a process for each processor
    path, start, duration = recording
    seconds = max(0.0, data.audio_seconds(path) - start) if duration is None else duration
    if seconds > MAX_SECONDS or seconds and not decode:
        return Sound(seconds)
    try:
        wave = data.load_audio(path, start, duration)
    except UserError as error:
        return Sound(seconds, error=reason_of(error))
    level = 10 * math.log10(wave.square().mean().item() + 1e-12)
    if level < SILENCE:
        return Sound(seconds, error=f"no sound, {level:.0f} dBFS")
    samples = (wave * 32767).round().int().numpy()  # alike for a wav and its flac
    return Sound(seconds, hashlib.blake2b(samples, digest_size=8).hexdigest())


def listen(examples: list[dict], sample: float) -> dict[Recording, Sound]:
    """Examines the recordings of examples in a pool of processes, and decodes so many of them."""
    recordings = list(dict.fromkeys(example["recording"] for example in examples))
    decoded = set(random.Random(0).sample(recordings, max(0, min(sample, len(recordings)))))
    wanted = [recording in decoded for recording in recordings]
    pool = ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    sounds = pool.map(examine, recordings, wanted, chunksize=4)
    with one_line_errors("decoding", "divide the manifest to find it"), pool, closing(sounds):
        return dict(zip(recordings, tqdm(sounds, "audio", len(recordings), delay=1), strict=True))


def check_example(example: dict, sound: Sound, licences: list, hashes: frozenset, context: tuple):
    """Yields the kind and reason of each finding that an example shows by itself. licences, hashes:
    as check_licence takes them; context: an LLM's tokenizer, prompt and
    positions, each of 80 ms."""
    task, target = example["task"], example["target_language"]
    text = example["text"].strip()
    try:
        data.check_licence(example, tuple(licences), hashes)
    except UserError as error:
        yield "refused", reason_of(error)
    for part in [text] + [example.get("question")] * (task == "sqa"):
        if not looks_like(part, target):
            yield "language", f"{target}: {part[:40]!r}"
    if task == "sqa" and refuses_otherwise(text, target):
        yield "refusal", repr(text[:40])
    positions = sound.seconds / 0.08 + len(data.render(example, 0, *context[:2])[0])
    if positions > context[2]:
        yield "context", f"{positions:,.0f} of {context[2]:,} positions"

    # What the recording shows.
    if sound.error:
        yield "audio", sound.error
        return
    if not MIN_SECONDS <= sound.seconds <= MAX_SECONDS:
        yield "duration", f"{sound.seconds:.3g} s"
    speed = len(text) / max(sound.seconds, 1e-3)
    low, high = CJK_SPEEDS[task] if target in CJK else SPEEDS[task]
    if not low <= speed <= high:
        kind = "cut" if speed > 1.5 * high else "speed"
        yield kind, f"{speed:.3g} characters/s, expected {low:g} to {high:g}"


def compare(examples: list[dict], tests: list[dict], sounds: dict, findings: dict) -> None:
    """Compares examples with tests and with each other."""
    places, answers = {}, {}
    for test in tests:
        sound = sounds[test["recording"]]
        if sound.error:
            findings["test row"][test["where"]] = sound.error
        keys = (known_by(test), test["recording"], sound.content)
        places |= dict.fromkeys(filter(None, keys), test["where"])

    for example in examples:
        # A test may have the text, or the recording, be it under another name.
        where = example["where"]
        if known_by(example) in places:
            findings["test text"][where] = f"as {places[known_by(example)]}"
        for key in (example["recording"], sounds[example["recording"]].content):
            if key in places:
                findings["test audio"][where] = f"as {places[key]}"

        # A request is to have one answer, once.
        answer = text_hash(example["text"])
        request = tuple(example.get(key) for key in REQUEST)
        first_answer, first = answers.setdefault(request, (answer, where))
        if first != where:
            kind = "duplicate" if first_answer == answer else "two texts"
            findings[kind][where] = f"as {first}"


def figure_lines(examples: list[dict], sounds: dict[Recording, Sound]):
    groups = {}
    for example in examples:
        groups.setdefault(" ".join(example[key] for key in GROUP), []).append(example)
    for group, members in sorted(groups.items()):
        recordings = {example["recording"] for example in members}
        hours = sum(sounds[recording].seconds for recording in recordings) / 3600
        speakers = len({example["speaker"] for example in members} - {"unknown"})
        licences = ", ".join(sorted({example["licence"] for example in members}))
        yield f"{group}: {len(members):,} rows, {hours:.2f} h, {speakers:,} speakers, {licences}"


def look_over(args: argparse.Namespace) -> dict:
    """The report. Raises UserError."""
    directory = model.fetch(args.tokenizer)
    config = model.LLM.read_config(directory)
    tokenizer = model.load_tokenizer(directory)
    prompt = data.make_prompt(tokenizer, config.eos_token_id)
    context = (tokenizer, prompt, config.max_position_embeddings)
    hashes = data.protected_hashes(args.manifests)
    findings = {kind: {} for kind in KINDS}
    examples = read_examples(args.manifests, findings["example"])
    tests = read_examples(args.against, findings["test row"])
    sounds = listen(examples, args.sample) | listen(tests, args.sample)
    for example in examples:
        sound = sounds[example["recording"]]
        for kind, reason in check_example(example, sound, args.allow_licence, hashes, context):
            findings[kind][example["where"]] = reason
    compare(examples, tests, sounds, findings)
    total = len(examples) + len(findings["example"])
    entries = [describe(kind, lines, total) for kind, lines in findings.items() if lines]
    entries.sort(key=lambda entry: entry["level"], reverse=True)  # serious ones first
    return {"figures": list(figure_lines(examples, sounds)), "findings": entries}


def describe(kind: str, lines: dict[str, str], total: int) -> dict:
    """A finding as the report has it."""
    share, fault, remedy = KINDS[kind]
    level = "serious" if len(lines) > share * total else "note"
    where, *others = list(lines)[:3]
    first = ", ".join([f"{where} ({lines[where]})", *others])
    text = f"{level}: {kind}: {len(lines):,} rows {fault}: {first}; {remedy}"
    return {"kind": kind, "level": level, "text": text, "lines": lines}


def main(argv: list[str] | None = None) -> None:
    model.steady_output()
    parser = argparse.ArgumentParser(description="Checks manifests before training")
    option = parser.add_argument
    option("manifests", nargs="+", help="manifests to train on")
    option("--against", nargs="+", default=[], help="manifests of tests, to find leaks from them")
    llm = model.DEMO / "llm"
    option("--tokenizer", default=llm, help="LLM whose context all must fit into; default: demo's")
    option("--sample", type=int, default=math.inf, help="decode so many recordings, 0 for none")
    option("--allow-licence", nargs="+", default=[], help="SPDX licences to take besides free ones")
    option("--out", type=Path, default=Path("out/doctor"), help="directory of the report")
    args = parser.parse_args(argv)
    path = args.out / f"{Path(args.manifests[0]).stem}.json"
    try:
        report = look_over(args)
        with one_line_errors(args.out, "give another --out"):
            args.out.mkdir(parents=True, exist_ok=True)
            data.write_text(path, json.dumps(report, ensure_ascii=False, indent=1))
    except UserError as error:
        parser.exit(2, f"doctor: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "doctor: stopped\n")
    texts = [finding["text"] for finding in report["findings"]]
    print(*map(visible, report["figures"] + texts), sep="\n")
    serious = sum(finding["level"] == "serious" for finding in report["findings"])
    print(f"{serious} serious findings, {len(texts) - serious} notes; {path} has all lines of each")
    parser.exit(min(serious, 1))


if __name__ == "__main__":
    main()
