"""Looks manifests over before they are trained on: python -m prepare.doctor train.jsonl --against test.jsonl

Prints figures of every corpus, task and language, then findings, one a line, each with the first lines of the manifest
it is about and what to do. OUT/train.json keeps all of that, with all lines of each finding and the most extreme rows;
OUT/train.svg shows the distributions. The exit code is 0 if nothing serious was found, 1 if something was that would
spoil training, 2 if a manifest could not be read.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from array import array
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import TASKS, Manifest
from prepare.audio import SAMPLE_RATE, audio_seconds, load_audio, open_sound
from prepare.checkpoint import fetch, load_tokenizer, write_text
from prepare.draw import draw_histograms
from prepare.errors import AudioError, CheckpointError, ManifestError, visible
from prepare.instructions import REFUSALS
from prepare.licences import accepted, check_row, fingerprint, letter_count, letters, test_fingerprints

ROOT = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------------------------------
# Findings

# of each kind: what was found, what to do, above which share it is serious, and the share of which rows or recordings
ALWAYS, MANY, NEVER = 0.0, 0.05, math.inf
KINDS = {
    "bad line": ("lines that training stops at", "mend them or leave them out", ALWAYS, "rows"),
    "no text": ("rows without text", "add it or leave them out", ALWAYS, "rows"),
    "refused": ("rows that training refuses", "leave them out; --allow-licence takes a licence you may use", ALWAYS,
                "rows"),
    "units": ("rows of an impossible speed", "give durations in seconds, and the text of the same recording", ALWAYS,
              "rows"),
    "unusable": ("recordings that cannot be used", "copy or download them again, or leave them out", ALWAYS, "tried"),
    "beyond": ("recordings that go on after the end of their file", "correct start and duration, in seconds", ALWAYS,
               "recordings"),
    "test text": ("rows with a text of a test set", "leave them out", ALWAYS, "rows"),
    "test question": ("rows with a question and answer of a test set", "leave them out", ALWAYS, "sqa"),
    "test audio": ("recordings of a test set", "leave them out", ALWAYS, "recordings"),
    "too long": ("recordings longer than 30 s, which training leaves out", "cut them or raise --max-seconds", 0.01,
                 "recordings"),
    "silent": ("recordings without sound", "leave them out", MANY, "tried"),
    "same audio": ("recordings that sound exactly like another", "leave one out", MANY, "tried"),
    "same row": ("rows that are there twice", "leave one out", MANY, "rows"),
    "two texts": ("rows whose recording has another text for the same task", "decide for one", MANY, "rows"),
    "untranslated": ("translations that equal the transcript", "translate them or leave them out", MANY, "st"),
    "language": ("texts that do not look like their target_language", "correct it or leave them out", MANY, "rows"),
    "asr languages": ("asr rows of two languages", "make both languages the one spoken", MANY, "asr"),
    "st languages": ("st rows of one language", "correct source_language, target_language or task", MANY, "st"),
    "refusal": ("answers that refuse, but not in the words of their language", "write the refusals of "
                "prepare/instructions.py, letter by letter", MANY, "sqa"),
    "echo": ("questions that are their own answer", "correct them or leave them out", MANY, "sqa"),
    "loop": ("texts that run in a loop", "leave them out", MANY, "rows"),
    "markup": ("texts with markup or broken characters", "clean them or leave them out", MANY, "rows"),
    "style": ("transcripts of another style than they say", 'make those without case and punctuation lower case and '
              '"style": "bare", and no others', NEVER, "asr"),
    "mixed style": ("rows of another style than their corpus", "restore case and punctuation, or give each style a "
                    "corpus of its own", NEVER, "rows"),
    "refusals": ("questions of which too few or too many cannot be answered", "aim at 10 to 50 %", NEVER, "sqa"),
    "same text": ("rows that say what an earlier recording says", "nothing, if it was said twice", NEVER, "rows"),
    "partly": ("recordings that are the beginning of a file of which no row has the rest", "check duration, in seconds",
               NEVER, "recordings"),
    "pauses": ("recordings of which more than half is silence", "cut them closer", NEVER, "tried"),
    "clipped": ("clipped recordings", "leave them out if there are others", NEVER, "tried"),
    "too short": ("recordings shorter than 0.1 s", "check start and duration, in seconds", NEVER, "recordings"),
    "narrow": ("recordings sampled below 16 kHz", "nothing, but they lack high frequencies", NEVER, "recordings"),
    "test speaker": ("rows of a speaker of a test set", "leave them out if the test is of new speakers", NEVER,
                     "rows"),
    "common question": ("questions that a test set asks, too", "nothing, if they suit many recordings", NEVER, "sqa"),
    "against": ("lines and recordings of the test sets that could not be compared", "look these over, too", NEVER,
                "tests"),
}
EXAMPLES = 5  # places of a finding that are printed
LINES = 2**40  # a place is LINES * number of the manifest + line


def put(findings, kind, place, reason="", about=""):
    """Adds a place to the finding of a kind and, if there are several of that kind, what it is about."""
    found = findings.setdefault((kind, about), {"places": array("q"), "reasons": []})
    found["places"].append(place)
    if len(found["reasons"]) < EXAMPLES:
        found["reasons"].append(reason)


def put_all(findings, kind, places, wrong, reason=lambda i: "", about=""):
    """Adds the places where wrong, a mask, holds."""
    for n, i in enumerate(np.flatnonzero(wrong).tolist()):
        put(findings, kind, int(places[i]), reason(i) if n < EXAMPLES else "", about)


def where(manifests, place, beside=-1):
    """A place in words; beside a place in the same manifest, the line is enough."""
    line = f"line {place % LINES}"
    return line if beside // LINES == place // LINES else f"{manifests[place // LINES].path} {line}"


def listed(manifests, places, reasons):
    """Places in words, with reasons behind them."""
    return [where(manifests, place, before) + f" ({reason})" * bool(reason)
            for place, before, reason in zip(places, [-1, *places], reasons)]


# ----------------------------------------------------------------------------------------------------------------------
# Texts

STOP_WORDS = {language: frozenset(words.split()) for language, words in {
    "en": "a i the of and to is it that was for on are with as his they be at this have from or had by but not what "
          "all were we when your can there an which she do does did how their if will about out many then them these "
          "some her him would into has two more could my than been who its you he where why every much after our only "
          "very such costs in three four five six no yes says said because before between behind under over through "
          "here each other new",
    "de": "der die das und ist nicht ein eine einen einem einer eines dem den des zu mit auf für von im sie er wir ihr "
          "ich sich auch wie als bei aus nach oder wenn aber sind haben hat wird werden wurde kann über noch nur mehr "
          "durch vor zum zur hier dass daß wer wo wen welche welcher kein keine seine seinem ihre ihren mein meine "
          "unter jeden uns in am an was so zwei drei vier fünf sechs ja nein weil hinter zwischen neben ohne gegen bis "
          "war waren jede",
    "it": "il lo la gli le di da del della dei delle degli dello al alla alle ai nel nella nei nelle un una uno che "
          "non è e per con sono ha hanno si come questo questa mio mia sua suo più anche ma se ci cosa dove quando chi "
          "quale a i in quanto dal dalla sul sulla tra fra era ogni dell all nell l un due tre quattro cinque sei o no "
          "sì perché senza dietro davanti sotto sopra accanto prima dopo molto quello quella loro noi voi lui lei io",
    "es": "el la los las un una y en de del que por para con como no se al lo pero está muy su sus es este esta hay "
          "qué más también porque sin sobre ya cuando fue ser a e o u ha si mi",
    "fr": "le la les un une de des est et dans pour pas vous nous je il elle sur avec ce cette aux mais qui que du au "
          "où en être sont deux à a ne se sa son par plus ou l d c n qu",
    "nl": "het een van niet en op te dat zijn voor met er maar om aan hij heb ook wat naar bij nog uit dan wel deze "
          "zij de in is was die ik je we hebben",
    "pt": "o os a as um uma de do da em no na e é que não com para por mais como dos das foi ao ele ela se seu sua são "
          "ou",
}.items()}  # es, fr, nl and pt only to know them apart
HAN, KANA = re.compile("[\u3400-\u9fff]"), re.compile("[\u3040-\u30ff]")
CANTONESE = re.compile("[嘅咗喺冇佢唔哋嚟咁啲]")
SHORT = 5  # words: shorter texts can be in any language, being names and numbers often


def looks_like(text, language):
    """Whether a text can be in a language, by its script and by its commonest words: false only where that speaks
    clearly for another one. True for short texts in the right script, and for languages other than en, de, it, zh."""
    if language not in ("en", "de", "it", "zh"):
        return True
    words = re.findall(r"[^\W\d_]+", HAN.sub(" ", text).lower())
    han, kana = len(HAN.findall(text)), len(KANA.findall(text))
    if language == "zh":
        foreign = len(words) - sum(map(bool, map(KANA.match, words)))
        if not han + kana:
            return foreign < SHORT
        return 2 * han >= foreign and 10 * kana <= han and len(CANTONESE.findall(text)) < 2
    latin = sum(len(word) for word in words if "a" <= word[0] <= "\u024f")
    if sum(map(len, words)) + 3 * han > max(1, 2 * latin):  # a Chinese character is about three letters
        return False
    if len(words) < SHORT:
        return True
    found = {name: sum(word in some for word in words) for name, some in STOP_WORDS.items()}
    mine = found.pop(language)
    return max(found.values()) <= max(1, 1.5 * mine + 0.5) and (mine > 0 or len(words) < 12)


PUNCTUATION = re.compile("[.,;:!?](?=\\s|$|[\"'”»)])|[。，！？；：、…¿¡«»“”„]")
UNCASED, LOWER, UPPER, CASED = range(4)
KNOWN, KNOWN_QUESTION = 20, 40  # letters: shorter ones may be alike, or in one case, by chance


def style_of(text):
    """UNCASED, LOWER, UPPER or CASED, and whether there is punctuation."""
    case = UPPER if text.isupper() else LOWER if text.islower() else UNCASED if text.lower() == text.upper() else CASED
    return case, bool(PUNCTUATION.search(text))


REFUSING = re.compile(r"not answerable|unanswerable|can ?(not|['’]t) (be )?answer|^n/a\W*$|nicht (zu )?beantwort|"
                      "unbeantwortbar|non (è possibile|si può|posso) risponde|(无法|不能|没法)(作答|回答)")


def refuses(text, language):
    """None if an answer does not refuse; if it does, whether in the words that count for questions in this language."""
    if text in REFUSALS.values():
        return REFUSALS.get(language, text) == text
    near = letters(text) in map(letters, REFUSALS.values())
    return False if near or letter_count(text) < 60 and REFUSING.search(text.casefold()) else None


def loops(text):
    """Whether a text says the same 1 to 16 words (or Chinese characters) at least four times on end, 8 words or more,
    or has the same 2 to 8 characters six times or one character ten times."""
    words = re.findall(r"[\u3040-\u9fff]|[^\s\u3040-\u9fff]+", text.lower())
    for period in range(1, min(16, len(words) // 4) + 1):
        same = 0
        for a, b in zip(words, words[period:]):
            same = same + 1 if a == b else 0
            if same >= max(3 * period, 8 - period):
                return True
    return bool(re.search(r"(\S)\1{9}|(\S{2,8}?)\2{5}", text))


MARKUP = re.compile("[\ufffd\x00-\x08\x0e-\x1f]|Ã[\x80-\xbf]|â€|&(amp|quot|lt|gt|nbsp|#\\d+);|</?[a-z][^<>]*>", re.I)

# ----------------------------------------------------------------------------------------------------------------------
# Rows: read once; only numbers are kept of them, some 130 bytes a row

COLUMNS = {"place": "q", "group": "I", "start": "d", "duration": "d", "characters": "I", "tokens": "I", "letters": "I",
           "case": "B", "punctuated": "B", "bare": "B", "refused": "B",  # bare by its style, refused by its text
           # hashes: of the file, of the part of it, of all that is asked, of the text, of the text by its letters, of
           # question and text, of the question, of the speaker; 0 where there is none
           "file": "Q", "recording": "Q", "asked": "Q", "exact": "Q", "text": "Q", "pair": "Q", "question": "Q",
           "speaker": "Q"}
GROUP = ("corpus", "task", "source_language", "target_language")


def number(*parts):
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def read_rows(manifests, numbers, findings, tokenizer, allowed, test_texts):
    """Reads those of the manifests that have these numbers and puts what single rows show into findings.

    Returns {column: array of all rows}, the groups of rows, each (corpus, task, source language, target language), and
    a Counter of (*group, licence)."""
    columns, groups, licences = {name: array(kind) for name, kind in COLUMNS.items()}, {}, Counter()
    for m in numbers:
        manifest, folder = manifests[m], os.path.abspath(manifests[m].path.parent)
        for i in tqdm(range(len(manifest)), manifest.path.name, unit=" rows", mininterval=1, dynamic_ncols=True):
            place = LINES * m + int(manifest.lines[i]) + 1
            try:
                row = manifest[i]
            except ManifestError as error:
                reason = re.sub(r"^.*? line \d+: |[,;] expected .*$", "", str(error))
                put(findings, "no text" if reason.startswith("text is") else "bad line", place, reason)
                continue
            key = _, task, source, target = tuple(row[name] for name in GROUP)
            text, question = row["text"].strip(), row["question"].strip() if task == "sqa" else ""
            licences[(*key, row["licence"])] += 1
            file = number(os.path.normpath(os.path.join(folder, row["audio"])))
            recording = number(file, row["start"], row["duration"])
            mark, question_mark = fingerprint(text), fingerprint(question) if question else "0"
            case, punctuated = style_of(text)
            refused = refuses(text, target) if task == "sqa" else None
            for name, value in {
                    "place": place, "group": groups.setdefault(key, len(groups)), "start": row["start"],
                    "duration": math.nan if row["duration"] is None else row["duration"], "characters": len(text),
                    "tokens": len(tokenizer.encode(text, add_special_tokens=False).ids),
                    "letters": letter_count(question or text), "case": case, "punctuated": punctuated,
                    "bare": row["style"] == "bare", "refused": refused is not None, "file": file,
                    "recording": recording, "exact": number(text), "text": int(mark, 16),
                    "asked": number(recording, task, source, target, question, row.get("instruction"), row["style"]),
                    "pair": number(question_mark, mark) if question else 0, "question": int(question_mark, 16),
                    "speaker": 0 if row["speaker"] == "unknown" else number(row["corpus"], row["speaker"])}.items():
                columns[name].append(value)
            if refusal := training_refuses(row, allowed, frozenset()):
                put(findings, "refused", place, about=refusal)
            elif test_texts and training_refuses(row, allowed, test_texts):
                put(findings, "test text", place, repr((question or text)[:40]))
            if not letters(text):
                put(findings, "no text", place, f"text is {text[:20]!r}")
            if wrong := [some for some in (text, question) if not looks_like(some, target)]:
                put(findings, "language", place, f"{target}: {wrong[0][:40]!r}")
            if task != "sqa" and (task == "asr") != (source == target):
                put(findings, f"{task} languages", place, f"from {source} to {target}")
            if refused is False:
                put(findings, "refusal", place, repr(text[:40]))
            if mark == question_mark:
                put(findings, "echo", place, repr(text[:40]))
            if loops(text):
                put(findings, "loop", place, repr(text[:40]))
            if found := MARKUP.search(f"{text} {question}"):
                put(findings, "markup", place, repr(found[0][:20]))
    rows = {name: np.frombuffer(column, column.typecode) for name, column in columns.items()}
    ordered = sorted(groups, key=lambda key: (key[0], TASKS.index(key[1]), *key[2:]))
    rows["group"] = np.array([ordered.index(key) for key in groups], int)[rows["group"]]
    return rows, ordered, licences


def training_refuses(row, allowed, test_texts):
    """What train.py has against a row, or None."""
    try:
        check_row(row, allowed, test_texts)
    except ManifestError as error:
        return re.sub(r"^.*? line \d+: |[,;] (expected|leave) .*$", "", str(error))


def row_at(manifests, place):
    manifest = manifests[place // LINES]
    return manifest[int(np.searchsorted(manifest.lines, place % LINES - 1))]


# ----------------------------------------------------------------------------------------------------------------------
# Sound: each recording once, in a pool of processes

SOUND = np.dtype([("seconds", "f8"), ("file_seconds", "f8"), ("rate", "i4"), ("level", "f4"), ("clipped", "f4"),
                  ("silent", "f4"), ("content", "u8")])
# level in dBFS, NaN if not decoded; clipped is a share of samples, silent of 10 ms frames; content a hash, 0 if silent
BLOCK, LONGEST = 20_000, 600.0  # recordings given to a pool; seconds of a recording that are decoded
FULL_SCALE, SILENCE = 0.99, -60  # a sample, dBFS


def examine(job):
    """Why a recording, (path, start, duration, whether to decode it), cannot be used, or None; and its SOUND."""
    path, start, duration, decode = job
    torch.set_num_threads(1)
    try:
        with open_sound(path) as sound:
            rate = sound.samplerate
        whole = audio_seconds(path)
        if duration is None:
            duration = max(0.0, whole - start)
        there = min(duration, whole - start)  # to ask for more is another finding
        if not decode or there <= 0 < whole:
            return None, (duration, whole, rate, math.nan, 0, 0, 0)
        x = load_audio(path, start, None if there == whole < LONGEST else min(there, LONGEST)).numpy()
    except AudioError as error:
        return re.sub("^'.*?': |; .*$", "", str(error)), (duration or 0, 0, 0, math.nan, 0, 0, 0)
    frames = x[:len(x) // 160 * 160].reshape(-1, 160)  # (n, 160), of 10 ms
    level, levels = (10 * np.log10(np.square(some, dtype=np.float64).mean(-1) + 1e-12) for some in (x, frames))
    samples = np.round(x * 32767).astype(np.int32)  # equal for a wav and its flac
    content = int.from_bytes(hashlib.blake2b(samples, digest_size=8).digest(), "little") if level >= SILENCE else 0
    return None, (duration, whole, rate, level, (np.abs(x) >= FULL_SCALE).mean(), (levels < SILENCE).mean(), content)


def examine_all(jobs, bar):
    """examine() of every job; one that kills its process is a recording that cannot be used."""
    done = []
    try:
        with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            for result in pool.map(examine, jobs, chunksize=1 + min(15, len(jobs) // 64)):
                done.append(result)
                bar.update()
        return done
    except BrokenProcessPool:
        bar.update(-len(done))
    if len(jobs) == 1:
        bar.update()
        return [("the decoder crashed", (jobs[0][2] or 0, 0, 0, math.nan, 0, 0, 0))]
    return examine_all(jobs[:len(jobs) // 2], bar) + examine_all(jobs[len(jobs) // 2:], bar)


def listen(manifests, rows, sample, what):
    """Decodes the recordings of rows, or as many of them as `sample` says, and reads the headers of others that have no
    duration. Returns for each row the number of its recording (rows,); for each recording its first row and its SOUND
    (recordings,); and why some cannot be used, {number: reason}."""
    _, first, recording = np.unique(rows["recording"], return_index=True, return_inverse=True)
    order = np.argsort(first)  # as they come in the manifests
    first, recording = first[order], np.argsort(order)[recording]
    sounds, failed, decoded = np.zeros(len(first), SOUND), {}, np.ones(len(first), bool)
    sounds["seconds"], sounds["level"] = rows["duration"][first], math.nan
    if sample is not None:
        decoded[np.random.default_rng(0).permutation(len(first))[sample:]] = False
    wanted = np.flatnonzero(decoded | np.isnan(sounds["seconds"])).tolist()

    def jobs():
        for r in wanted:
            place = int(rows["place"][first[r]])
            row = row_at(manifests, place)
            path = manifests[place // LINES].path.parent / row["audio"]
            yield str(path), row["start"], row["duration"], bool(decoded[r])

    waiting, numbers = jobs(), iter(wanted)
    with tqdm(total=len(wanted), desc=what, unit=" recordings", mininterval=1, dynamic_ncols=True,
              disable=not wanted) as bar:
        while block := list(islice(waiting, BLOCK)):
            for (error, found), r in zip(examine_all(block, bar), numbers):
                sounds[r] = found
                if error:
                    failed[r] = error
    return recording, first, sounds, failed


# ----------------------------------------------------------------------------------------------------------------------
# What only all rows together show

# from and to which characters per second a median is possible, with room for slow and fast corpora
SPEEDS, SPEED = {"zh": (0.7, 15), "ja": (1, 25), "ko": (0.7, 20)}, (2, 35)


def earlier(values):
    """For each of values the index of the first that equals it: its own if there is none before."""
    _, first, same = np.unique(values, return_index=True, return_inverse=True)
    return first[same]


def match(values, others):
    """For each of values the index of an equal one among others, or -1. 0 equals nothing."""
    if not len(others):
        return np.full(len(values), -1)
    order = np.argsort(others, kind="stable")
    at = order[np.minimum(np.searchsorted(others[order], values), len(others) - 1)]
    return np.where((others[at] == values) & (values != 0), at, -1)


def name_of(corpus, task, source, target):
    return f"{corpus}, {task} {target if source == target else f'{source}-{target}'}"


def judge_sounds(manifests, rows, first, sounds, failed, findings):
    """first: (recordings,), the first row of each; failed: {recording: reason}."""
    places, start = rows["place"][first], rows["start"][first]
    seconds, whole, opened = sounds["seconds"], sounds["file_seconds"], sounds["file_seconds"] > 0
    for r, reason in failed.items():
        put(findings, "unusable", int(places[r]), reason)
    put_all(findings, "beyond", places, opened & (start + seconds > whole + 0.1),
            lambda r: f"ends at {start[r] + seconds[r]:.2f} s of {whole[r]:.2f} s")
    _, file, parts = np.unique(rows["file"][first], return_inverse=True, return_counts=True)
    put_all(findings, "partly", places, opened & (parts[file] == 1) & (start == 0) & (seconds < whole - 0.5) &
            (seconds < 0.9 * whole), lambda r: f"{seconds[r]:.2f} s of {whole[r]:.2f} s")
    put_all(findings, "too long", places, seconds > 30, lambda r: f"{seconds[r]:.1f} s")
    put_all(findings, "too short", places, (seconds > 0) & (seconds < 0.1), lambda r: f"{seconds[r]:.3f} s")
    put_all(findings, "silent", places, sounds["level"] < SILENCE, lambda r: f"{sounds['level'][r]:.0f} dBFS")
    put_all(findings, "pauses", places, (sounds["level"] >= SILENCE) & (sounds["silent"] > 0.5),
            lambda r: f"{100 * sounds['silent'][r]:.0f} %")
    put_all(findings, "clipped", places, sounds["clipped"] > 0.001,
            lambda r: f"{100 * sounds['clipped'][r]:.1f} % of its samples")
    put_all(findings, "narrow", places, opened & (sounds["rate"] < SAMPLE_RATE), lambda r: f"{sounds['rate'][r]} Hz")
    before = earlier(sounds["content"])
    put_all(findings, "same audio", places, (sounds["content"] != 0) & (before != np.arange(len(before))),
            lambda r: f"as {where(manifests, places[before[r]], places[r])}")


def judge_rows(manifests, rows, groups, recording, seconds, findings):
    """recording, seconds: (rows,), the number of each row's recording and its length."""
    places, group, tasks = rows["place"], rows["group"], np.array([task for _, task, _, _ in groups])[rows["group"]]
    known = (rows["letters"] >= KNOWN) & (tasks != "sqa")
    before = earlier(rows["asked"])
    same = rows["exact"][before] == rows["exact"]
    put_all(findings, "same row", places, same & (before != np.arange(len(before))),
            lambda i: f"as {where(manifests, places[before[i]], places[i])}")
    put_all(findings, "two texts", places, ~same, lambda i: f"unlike {where(manifests, places[before[i]], places[i])}")
    said = rows["text"] ^ np.array([number(task, target) for _, task, _, target in groups], np.uint64)[group]
    known_before = earlier(said)
    put_all(findings, "same text", places, known & (recording[known_before] != recording),
            lambda i: f"as {where(manifests, places[known_before[i]], places[i])}")
    asr = np.flatnonzero(tasks == "asr")
    heard = match(rows["recording"], rows["recording"][asr])  # each row's transcript
    equal = known & (tasks == "st") & (heard >= 0)
    equal[equal] = rows["text"][equal] == rows["text"][asr[heard[equal]]]
    put_all(findings, "untranslated", places, equal,
            lambda i: f"as {where(manifests, places[asr[heard[i]]], places[i])}")

    looks = ("lower case without punctuation", "upper case", "with case or punctuation")
    style = np.select([rows["case"] == UPPER, (rows["case"] != CASED) & (rows["punctuated"] == 0)], [1, 0], 2)
    put_all(findings, "style", places, known & (tasks == "asr") & np.where(rows["bare"] == 1, style != 0, style != 2),
            lambda i: f"{looks[style[i]]}, says {'bare' if rows['bare'][i] else 'written'}")
    for g, (name, task, target) in enumerate((name_of(*key), key[1], key[3]) for key in groups):
        own = group == g
        for some in (own & known & (rows["bare"] == bare) for bare in (0, 1)):
            counts = np.bincount(style[some], minlength=3)
            if counts.sum() - counts.max() > MANY * counts.sum():
                put_all(findings, "mixed style", places, some & (style != counts.argmax()), lambda i: looks[style[i]],
                        f"{name}: mostly {looks[counts.argmax()]}")
        timed, (low, high) = own & (seconds > 0), SPEEDS.get(target, SPEED)
        if task != "sqa" and timed.sum() >= 5:
            speed = np.median(rows["characters"][timed] / seconds[timed])
            put_all(findings, "units", places, timed & (not low <= speed <= high),
                    about=f"{name}: a median of {speed:.3g} characters/s, expected {low:g} to {high:g}")
        share = rows["refused"][own].mean()
        put_all(findings, "refusals", places, own & (task == "sqa" and own.sum() >= 20 and not 0 < share <= 0.6),
                about=f"{name}: {100 * share:.0f} %")


def judge_leaks(manifests, rows, first, sounds, tests, test_first, test_sounds, findings):
    """Rows that a test set (the rows `tests`) has, too."""
    places, test_places, spoken = rows["place"], tests["place"], tests["pair"] == 0  # the last: no questions
    at = match(rows["text"], tests["text"][spoken])
    put_all(findings, "test text", places, (at >= 0) & (rows["pair"] == 0) & (rows["letters"] >= KNOWN),
            lambda i: f"as {where(manifests, test_places[spoken][at[i]])}")
    pair, question, speaker = (match(rows[name], tests[name]) for name in ("pair", "question", "speaker"))
    telling = (pair >= 0) & (rows["letters"] >= KNOWN_QUESTION) & (rows["refused"] == 0)
    put_all(findings, "test question", places, telling, lambda i: f"as {where(manifests, test_places[pair[i]])}")
    put_all(findings, "common question", places, (question >= 0) & ~telling,
            lambda i: f"as {where(manifests, test_places[question[i]])}")
    put_all(findings, "test speaker", places, speaker >= 0, lambda i: f"as {where(manifests, test_places[speaker[i]])}")

    found = match(sounds["content"], test_sounds["content"])
    start, test_start, parts = rows["start"][first], tests["start"][test_first], {}
    for t in np.flatnonzero(np.isin(tests["file"][test_first], rows["file"])).tolist():
        parts.setdefault(int(tests["file"][test_first[t]]), []).append(t)
    for r in np.flatnonzero(np.isin(rows["file"][first], np.array(list(parts), np.uint64))).tolist():
        for t in parts[int(rows["file"][first[r]])]:  # parts of one file overlap
            end = min(start[r] + sounds["seconds"][r], test_start[t] + test_sounds["seconds"][t])
            if end - max(start[r], test_start[t]) > 0.05:
                found[r] = t
    put_all(findings, "test audio", places[first], found >= 0,
            lambda r: f"as {where(manifests, test_places[test_first[found[r]]])}")


# ----------------------------------------------------------------------------------------------------------------------
# The report


def spread(values):
    """The 1st percentile, the median and the 99th percentile, or None of nothing."""
    return [float(f"{x:.4g}") for x in np.percentile(values, (1, 50, 99))] if len(values) else None


def in_words(spread):
    return " ".join(f"{x:.4g}" for x in spread) if spread else "unknown"


def figures_of(rows, groups, licences, recording, seconds, allowed):
    """A dict for each group."""
    table = []
    for g, key in enumerate(groups):
        own = rows["group"] == g
        one = np.flatnonzero(own)[np.unique(recording[own], return_index=True)[1]]  # a row of each recording
        timed, case, punctuated = own & (seconds > 0), rows["case"][own], rows["punctuated"][own] == 1
        found = {licence: count for (*group, licence), count in sorted(licences.items()) if tuple(group) == key}
        shares = {"lower": case == LOWER, "upper": case == UPPER, "cased_punctuated": (case == CASED) & punctuated,
                  "uncased": case == UNCASED, "punctuated": punctuated, "unanswerable": rows["refused"][own] == 1}
        table.append({
            **dict(zip(GROUP, key)), "rows": int(own.sum()),
            "recordings": len(one), "hours": round(float(seconds[one].sum()) / 3600, 4),
            "tokens": int(rows["tokens"][own].sum()), "texts": len(np.unique(rows["text"][own])),
            "speakers": int(np.count_nonzero(np.unique(rows["speaker"][own]))), "licences": found,
            "refused_licences": [licence for licence in found if not accepted(licence, allowed)],
            "seconds": spread(seconds[one][seconds[one] > 0]), "characters": spread(rows["characters"][own]),
            "characters_per_s": spread(rows["characters"][timed] / seconds[timed]),
            "tokens_per_s": spread(rows["tokens"][timed] / seconds[timed]),
            "shares": {name: round(float(share.mean()), 4) for name, share in shares.items()}})
    return table


def figure_lines(table):
    names = {"lower": "in lower case", "upper": "in upper case", "cased_punctuated": "cased with punctuation",
             "uncased": "without case", "punctuated": "with punctuation", "unanswerable": "unanswerable"}
    spreads = {"seconds": "s", "characters": "characters", "characters_per_s": "characters/s",
               "tokens_per_s": "tokens/s"}
    for line in table:
        licences = ", ".join(name + " (refused)" * (name in line["refused_licences"]) for name in line["licences"])
        yield (f"{name_of(*(line[name] for name in GROUP))}: {line['rows']:,} rows, {line['recordings']:,} recordings, "
               f"{line['hours']:.2f} h, {line['tokens']:,} tokens, {line['texts']:,} different texts, "
               f"{line['speakers']:,} speakers, {licences}")
        yield "  " + "; ".join(f"{in_words(line[name])} {unit}" for name, unit in spreads.items())
        yield "  " + ", ".join(f"{100 * share:.3g} % {names[name]}" for name, share in line["shares"].items() if share)


def findings_of(findings, totals, manifests):
    """A dict for each finding, with its line of text, the serious ones first."""
    entries = []
    for (kind, about), found in findings.items():
        what, remedy, limit, of = KINDS[kind]
        places = np.unique(found["places"])
        serious = len(places) > limit * totals[of]
        shown = listed(manifests, found["places"].tolist(), found["reasons"]) + ["..."] * (len(places) > EXAMPLES)
        entries.append({
            "kind": kind, "serious": serious, "about": about, "count": len(places), "of": totals[of],
            "text": f"{'serious' if serious else 'note'}: {what}{f' ({about})' * bool(about)}: {len(places):,} of "
                    f"{totals[of]:,}, {', '.join(shown)}; {remedy}",
            "lines": {str(manifests[m].path): (places[places // LINES == m] % LINES).tolist()
                      for m in np.unique(places // LINES)}})
    return sorted(entries, key=lambda entry: (not entry["serious"], list(KINDS).index(entry["kind"])))


def outliers_of(manifests, rows, groups, first, seconds, sounds, count=20):
    """{kind: the `count` most extreme rows or recordings of that kind, in words and as dicts}."""
    group, characters = rows["group"], rows["characters"].astype(float)
    level, clipped = sounds["level"], sounds["clipped"]
    speed = np.where((seconds > 0) & (rows["pair"] == 0), characters / np.maximum(seconds, 1e-3), math.nan)
    usual = np.ones(len(groups))
    for g in np.unique(group[~np.isnan(speed)]):
        usual[g] = np.nanmedian(speed[group == g])
    length = np.where(sounds["seconds"] > 0, sounds["seconds"], math.nan)
    found = {}
    for name, order, value, unit in (
            # languages differ in speed, so that of a row is compared with its group's
            ("most characters per second", -speed / usual[group], speed, "characters/s"),
            ("fewest characters per second", speed / usual[group], speed, "characters/s"),
            ("longest text", -characters, characters, "characters"),
            ("longest recording", -length, length, "s"), ("shortest recording", length, length, "s"),
            ("quietest recording", level, level, "dBFS"),
            ("most clipped recording", np.where(clipped > 0, -clipped, math.nan), 100 * clipped, "% of its samples")):
        places = rows["place"] if len(order) == len(rows["place"]) else rows["place"][first]
        worst = [i for i in np.argsort(order, kind="stable")[:count].tolist() if not np.isnan(order[i])]
        if worst:
            words = listed(manifests, places[worst[:3]].tolist(), [f"{value[i]:.3g} {unit}" for i in worst])
            found[name] = {"text": ", ".join(words), "rows": [
                {"manifest": str(manifests[places[i] // LINES].path), "line": int(places[i] % LINES),
                 "value": float(f"{value[i]:.4g}"), "text": row_at(manifests, places[i])["text"][:80]} for i in worst]}
    return found


def draw(rows, groups, recording, seconds, sounds, most=12):
    """The distributions of the largest groups as SVG."""
    panels, level = {}, sounds["level"][recording]
    largest = np.argsort(-np.bincount(rows["group"], minlength=len(groups)), kind="stable")[:most]
    for g in sorted(largest.tolist()):
        own = rows["group"] == g
        timed = own & (seconds > 0) & (rows["pair"] == 0)
        corpus, rest = name_of(*groups[g]).rsplit(", ", 1)
        panels[f"{corpus}\n{rest}\n{own.sum():,} rows"] = (
            seconds[own & (seconds > 0)], rows["characters"][timed] / seconds[timed], rows["characters"][own],
            level[own & ~np.isnan(level)])
    columns = ("audio length (s)", "characters per second", "text length (characters)", "level (dBFS)")
    return draw_histograms(columns, panels, f"The {most} largest of {len(groups)} groups." * (len(groups) > most))


def look_over(paths, tests, tokenizer, allowed, sample, trust_paths=False):
    """The report as a dict, and the picture as SVG. Raises ManifestError for a manifest that cannot be read or has no
    row that can be used."""
    manifests = [Manifest(path, trust_paths) for path in [*paths, *tests]]
    count, findings, aside = len(paths), {}, {}
    rows, groups, licences = read_rows(manifests, range(count), findings, tokenizer, allowed, test_fingerprints(paths))
    if not groups:
        place = min(place for found in findings.values() for place in found["places"])
        raise ManifestError(f"{where(manifests, place)} and all others: no row that can be used, expected JSON objects "
                            "with audio, text and task; correct the path")
    recording, first, sounds, failed = listen(manifests, rows, sample, "audio")
    seconds, tasks = sounds["seconds"][recording], Counter()
    for g, size in enumerate(np.bincount(rows["group"])):
        tasks[groups[g][1]] += int(size)
    judge_rows(manifests, rows, groups, recording, seconds, findings)
    judge_sounds(manifests, rows, first, sounds, failed, findings)
    if tests:
        theirs, *_ = read_rows(manifests, range(count, len(manifests)), aside, tokenizer, (), frozenset())
        _, their_first, their_sounds, their_failed = listen(manifests, theirs, 0 if sample == 0 else None, "test audio")
        judge_leaks(manifests, rows, first, sounds, theirs, their_first, their_sounds, findings)
        for found in (aside[key] for key in aside if key[0] in ("bad line", "no text")):
            put_all(findings, "against", found["places"], np.ones(len(found["places"])), found["reasons"].__getitem__)
        for r, reason in their_failed.items():
            put(findings, "against", int(theirs["place"][their_first[r]]), reason)
    decoded = ~np.isnan(sounds["level"])
    totals = {"rows": sum(map(len, manifests[:count])), **{task: tasks[task] for task in TASKS},
              "recordings": len(first), "tried": int(decoded.sum()) + len(failed),
              "tests": sum(map(len, manifests[count:]))}
    return {
        "manifests": list(map(str, paths)), "against": list(map(str, tests)), **totals, "decoded": int(decoded.sum()),
        "hours": round(float(sounds["seconds"].sum()) / 3600, 4), "level_dbfs": spread(sounds["level"][decoded]),
        "sample_rates": {str(rate): int(n) for rate, n in zip(*np.unique(sounds["rate"][decoded], return_counts=True))},
        "figures": figures_of(rows, groups, licences, recording, seconds, allowed),
        "findings": findings_of(findings, totals, manifests),
        "outliers": outliers_of(manifests, rows, groups, first, seconds, sounds),
    }, draw(rows, groups, recording, seconds, sounds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST", help="manifests of training rows")
    parser.add_argument("--against", nargs="+", default=[], metavar="MANIFEST",
                        help="manifests of tests, of which nothing may be trained on")
    parser.add_argument("--tokenizer", default=str(ROOT / "demo/llm"),
                        help="directory or Hub id of the LLM whose tokens are counted")
    parser.add_argument("--out", default="out/doctor", help="directory of the report and the picture")
    parser.add_argument("--sample", type=int, help="decode only so many recordings, drawn at random, and with 0 none")
    parser.add_argument("--allow-licence", nargs="+", default=[], metavar="SPDX",
                        help="licences that training is to accept, too")
    parser.add_argument("--trust-paths", action="store_true", help="take audio from outside a manifest's folder, too")
    args = parser.parse_args(argv)
    if args.sample is not None and args.sample < 0:
        parser.error(f"--sample {args.sample}: expected 0 or more")
    began, stem = time.time(), Path(args.out) / Path(args.manifests[0]).stem
    try:
        report, picture = look_over(args.manifests, args.against, load_tokenizer(fetch(args.tokenizer)),
                                    tuple(args.allow_licence), args.sample, args.trust_paths)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        write_text(Path(f"{stem}.json"), json.dumps(report, ensure_ascii=False))
        write_text(Path(f"{stem}.svg"), picture)
    except (CheckpointError, ManifestError) as error:
        print(f"doctor: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"doctor: {error.filename or args.out}: {error.strerror}; give another --out", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("doctor: stopped", file=sys.stderr)
        sys.exit(130)
    print(f"three numbers: the 1st percentile, the median, the 99th percentile; tokens: of {args.tokenizer}")
    print(visible("\n".join(figure_lines(report["figures"])), keep="\n"))
    rates = "".join(f"; {count:,} of {rate} Hz" for rate, count in report["sample_rates"].items())
    print(f"audio: {report['decoded']:,} of {report['recordings']:,} recordings decoded{rates}; "
          f"{in_words(report['level_dbfs'])} dBFS")
    for name, some in report["outliers"].items():
        print(visible(f"{name}: {some['text']}"))
    for finding in report["findings"]:
        print(visible(finding["text"]))
    serious = sum(finding["serious"] for finding in report["findings"])
    print(f"{serious} serious findings, {len(report['findings']) - serious} notes, {time.time() - began:.0f} s; "
          f"{stem}.json has all of it, {stem}.svg the distributions")
    if serious:
        sys.exit(1)


if __name__ == "__main__":
    main()
