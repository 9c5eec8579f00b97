"""Scores what a checkpoint answers: python eval.py demo/test.jsonl, or answers an official file of the shared task:
python eval.py --xml SRC.xml --audio DIR --out HYP.xml

Every answer goes at once into a journal, so that a run that was stopped goes on where it was.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from datetime import date
from functools import lru_cache
from pathlib import Path

import jiwer
import numpy as np
import sacrebleu
import torch
from tqdm import tqdm
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from data import TASKS, Manifest
from prepare import mcif
from prepare.audio import SAMPLE_RATE, audio_seconds, load_audio
from prepare.checkpoint import newest_checkpoint, write_text
from prepare.errors import AudioError, CheckpointError, ManifestError, RankError, visible
from prepare.instructions import REFUSALS, instruction_of, task_of
from prepare.journal import close_journal, open_journal
from prepare.memory import keep_freed
from prepare.ranks import rank, ranks, start, world
from prepare.report import write_report
from sample import MAX_NEW_TOKENS, answer_rows, expect_words, hear_waves, load_model

GROUP_ROWS, GROUP_SECONDS = 32, 600.0  # recordings that are encoded and answered together
FALSE_REFUSALS = 0.125  # share of the answerable questions that may be refused, for the sake of the others


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@lru_cache
def normaliser(language):
    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer(split_letters=language == "zh")


def normalise(text, language):
    """After Whisper's normalisers: the English one for en, the basic one otherwise; Chinese characters are words."""
    return normaliser(language)(text).strip()


def item_scores(task, language, reference, hypothesis):
    """What one answer adds to the corpus scores, and "error", by which answers are sorted: 0 is right."""
    r, h = (normalise(text, language) for text in (reference, hypothesis))
    if task == "asr":
        letters = [text.replace(" ", "") if language == "zh" else text for text in (r, h)]
        words, characters = jiwer.process_words(r, h), jiwer.process_characters(*letters)
        count = [sum((x.substitutions, x.deletions, x.insertions)) for x in (words, characters)]
        return {"error": count[0] / max(1, len(r.split())), "word_errors": count[0], "words": len(r.split()),
                "character_errors": count[1], "characters": len(letters[0])}
    if task == "st":
        chrf = sacrebleu.sentence_chrf(hypothesis, [reference]).score
        return {"error": 1 - chrf / 100, "chrf": round(chrf, 1)}
    refused, unanswerable = (text in [normalise(refusal, language) for refusal in REFUSALS.values()] for text in (h, r))
    common = sum((Counter(r.split()) & Counter(h.split())).values())
    f1 = 2 * common / max(1, len(r.split()) + len(h.split()))
    right = refused if unanswerable else r == h
    return {"error": 1 - right if unanswerable or refused or right else 1 - 0.5 * f1, "right": int(right), "f1": f1,
            "refused": int(refused), "unanswerable": int(unanswerable)}


def corpus_scores(items, draws=1000):
    """Scores of items of one task and target language: {name: (value, low, high)}, with the 95 % interval of as many
    bootstrap draws (Koehn, 2004), and sacrebleu's signatures. Fractions, but BLEU and chrF 0 to 100."""
    task, language = items[0]["task"], items[0]["target_language"]
    pick = np.random.default_rng(0).integers(len(items), size=(draws, len(items)))
    found, signatures = {}, {}

    def ratio(name, above, below):
        above, below = (np.array([float(part(item["scores"])) for item in items]) for part in (above, below))
        if below.sum():
            sums = below[pick].sum(1)
            drawn = above[pick].sum(1)[sums > 0] / sums[sums > 0]
            found[name] = (above.sum() / below.sum(), *(np.percentile(drawn, (2.5, 97.5)) if draws else (None, None)))

    if task == "asr":
        ratio("WER", lambda s: s["word_errors"], lambda s: s["words"])
        ratio("CER", lambda s: s["character_errors"], lambda s: s["characters"])
    elif task == "st":
        hypotheses, references = [item["hypothesis"] for item in items], [[item["reference"] for item in items]]
        for metric in (sacrebleu.BLEU(tokenize="zh" if language == "zh" else "13a"), sacrebleu.CHRF()):
            score = metric.corpus_score(hypotheses, references)
            # sacrebleu's own bootstrap stumbles over a draw of score 0
            counts = np.array(metric._extract_corpus_statistics(hypotheses, references))
            drawn = [metric._compute_score_from_stats(counts[i].sum(0).tolist()).score for i in pick]
            found[score.name] = (score.score, *(np.percentile(drawn, (2.5, 97.5)) if draws else (None, None)))
            signatures[f"{score.name} {language}"] = str(metric.get_signature())
    else:
        ratio("exact match", lambda s: s["right"] and not s["unanswerable"], lambda s: not s["unanswerable"])
        ratio("F1", lambda s: s["f1"] * (not s["unanswerable"]), lambda s: not s["unanswerable"])
        ratio("refusal precision", lambda s: s["refused"] and s["unanswerable"], lambda s: s["refused"])
        ratio("refusal recall", lambda s: s["refused"] and s["unanswerable"], lambda s: s["unanswerable"])
        ratio("false refusals", lambda s: s["refused"] and not s["unanswerable"], lambda s: not s["unanswerable"])
    return found, signatures


def summarise(items, least=100):
    """The scores of every task and target language, over all items, and by corpus and by speaker where there are
    several; speakers with fewer than `least` items count as other speakers. Returns a list of dicts, signatures."""
    table, signatures = [], {}
    for task in TASKS:
        for language in sorted({item["target_language"] for item in items if item["task"] == task}):
            own = [item for item in items if (item["task"], item["target_language"]) == (task, language)]
            groups = {"all": own}
            for by in ("corpus", "speaker"):
                count = Counter(item[by] for item in own)
                for item in own:
                    name = item[by] if by == "corpus" or count[item[by]] >= least else "other speakers"
                    groups.setdefault(f"{by} {item[by]}" if name == item[by] else name, []).append(item)
            for name, some in groups.items():
                if name == "all" or len(some) < len(own):
                    scores, marks = corpus_scores(some)
                    signatures |= marks
                    table.append({"task": task, "language": language, "group": name, "items": len(some), "scores": {
                        key: [None if x is None else round(float(x), 4) for x in value] for key, value in scores.items()}})
    return table, signatures


def quick_figures(pairs):
    """Figures of (row, answer) pairs for the validation of a training run: each score's mean over target languages."""
    items = [{"task": row["task"], "target_language": row["target_language"], "reference": row["text"], "hypothesis": text,
              "scores": item_scores(row["task"], row["target_language"], row["text"], text)}
             for row, text in pairs]
    names = {"WER": "wer", "BLEU": "bleu", "exact match": "exact_match", "refusal recall": "refusals",
             "false refusals": "false_refusals"}
    values = {}
    for key in sorted({(item["task"], item["target_language"]) for item in items}):
        some = [item for item in items if (item["task"], item["target_language"]) == key]
        for name, (value, *_) in corpus_scores(some, draws=0)[0].items():
            if name in names:
                values.setdefault(names[name], []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def refusal_threshold(rows, answers):
    """The margin above which to refuse: the lowest at which no more than FALSE_REFUSALS of the answerable questions are
    refused, {"refuse_above": margin}; {} if the rows have no such question, or none that is to be refused."""
    heard = [(row, answer.margin) for row, answer in zip(rows, answers) if not isinstance(answer, AudioError)]
    answerable = [margin for row, margin in heard if row["text"] not in REFUSALS.values()]
    if not answerable or len(answerable) == len(heard):
        return {}
    return {"refuse_above": sorted(answerable)[-1 - int(FALSE_REFUSALS * len(answerable))]}


# ----------------------------------------------------------------------------------------------------------------------
# Answers, kept as they are made


def decode(model, tokenizer, state, rows, hear, path, settings, score=True, **options):
    """Answers rows, each with an "id", those about one recording together, and appends every answer to `path` (.jsonl)
    as an item; those already there, if made with the same settings, are kept. hear(row) gives the waveform. Returns
    {id: item} and {id: why it has none}. Each of several ranks answers a share, and has the answers of all in the end."""
    failed, form = {}, state["config"]["prompt"]
    items, journal = open_journal(path, settings)
    recordings = {}
    for row in rows:
        if row["id"] not in items:
            recordings.setdefault((row["audio"], row.get("start"), row.get("duration")), []).append(row)
    groups, seconds = [[]], 0.0
    for key, some in sorted(recordings.items(), key=lambda recording: -recording[1][0]["seconds"]):
        seconds += some[0]["seconds"]
        if groups[-1] and (len(groups[-1]) + len(some) > GROUP_ROWS or seconds > GROUP_SECONDS):
            groups, seconds = groups + [[]], some[0]["seconds"]
        groups[-1] += [(row, key) for row in some]
    share, audio, began = groups[rank()::world()], 0.0, time.time()
    bar = tqdm(total=sum(map(len, share)), desc="eval", unit=" rows", dynamic_ncols=True, disable=rank() > 0)
    for group in share:
        waves, asked = {}, []
        for row, key in group:
            try:
                if key not in waves:
                    waves[key] = hear(row)
                asked.append((row, key))
            except AudioError as error:
                failed[row["id"]] = str(error)
        heard = dict(zip(waves, hear_waves(model, waves.values(), state["window"])))
        answers = answer_rows(model, tokenizer, [row for row, _ in asked], [heard[key] for _, key in asked],
                              form, state.get("refuse_above"), **options)
        with open(journal, "a", encoding="utf-8") as file:
            for (row, key), answer in zip(asked, answers):
                if isinstance(answer, AudioError):
                    failed[row["id"]] = str(answer)
                    continue
                item = {name: row.get(name) for name in ("id", "audio", "start", "task", "source_language",
                                                         "target_language", "corpus", "speaker")}
                item |= {"seconds": round(len(waves[key]) / SAMPLE_RATE, 3), "reference": row.get("text"),
                         "instruction": instruction_of(row) if form == "text" else row.get("question", ""),
                         "hypothesis": answer.text, "cut": answer.cut, "margin": answer.margin}
                if score:
                    item["scores"] = item_scores(row["task"], row["target_language"], row["text"], answer.text)
                items[row["id"]] = item
                file.write(json.dumps(item, ensure_ascii=False) + "\n")
        audio += sum(map(len, waves.values())) / SAMPLE_RATE
        bar.set_postfix(audio_s_per_s=f"{audio / (time.time() - began):.0f}")
        bar.update(len(group))
    bar.close()
    items, failed = close_journal(path, items, failed, [row["id"] for group in groups for row, _ in group])
    for row in rows if rank() == 0 else ():
        if row["id"] in failed:
            print(visible(f"left out: {row.get('where') or row['id']}: {failed[row['id']]}"), file=sys.stderr)
    return items, failed


# ----------------------------------------------------------------------------------------------------------------------
# The two programs


def evaluate(args, model, tokenizer, state, settings):
    manifest, ckpt = Manifest(args.manifest, args.trust_paths), Path(settings["checkpoint"][0])
    rows = [row | {"id": str(i + 1), "seconds": manifest.seconds(row)}
            for i, row in enumerate(manifest) if row["task"] in args.tasks]
    if not rows:
        raise ManifestError(f"{args.manifest!r}: no row of the tasks {', '.join(args.tasks)}; give others with --tasks")
    place = {row["id"]: row for row in rows}

    def hear(row):
        row = place[row["id"]]
        return load_audio(manifest.path.parent / row["audio"], row["start"], row["duration"])

    path = Path(args.out or "out/eval") / f"{manifest.path.stem}-{ckpt.stem}.jsonl"
    items, failed = decode(model, tokenizer, state, rows, hear, path, settings, num_beams=args.beams)
    if not items:
        raise ManifestError(f"{args.manifest!r}: none of its {len(rows)} rows could be answered")
    if rank():
        return
    items = [items[row["id"]] for row in rows if row["id"] in items]
    table, signatures = summarise(items)
    facts = {"checkpoint": f"{ckpt}, phase {state['config']['phase']}, step {state['step']}", "date": str(date.today()),
             f"cut off at {MAX_NEW_TOKENS} tokens": sum(item["cut"] for item in items),
             "rows": f"{len(items)} answered, {len(failed)} left out", "refused above": state.get("refuse_above")}
    summary = {"settings": settings, **facts, "scores": table, "signatures": signatures}
    write_text(path.with_suffix(".json"), json.dumps(summary, ensure_ascii=False, indent=1))
    write_report(path.with_suffix(".html"), f"{args.manifest}, {ckpt}", facts, table, signatures, items, hear)
    for line in table:
        scores = [f"{name} {value:.1f} ({low:.1f}-{high:.1f})" if name in ("BLEU", "chrF2") else
                  f"{name} {100 * value:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
                  for name, (value, low, high) in line["scores"].items()]
        print(visible(f"{line['task']} {line['language']}, {line['group']}, {line['items']}: {', '.join(scores)}"))
    print(f"{path.with_suffix('.html')}: the report; items and summary are beside it")


def answer_xml(args, model, tokenizer, state, settings):
    """Answers an official source file. Every id is answered: one that cannot be heard, by the refusal if it is a
    question, else by nothing."""
    expect_words(state, settings["checkpoint"][0])
    tasks, out = mcif.read_source(args.xml, None if args.trust_paths else args.audio), Path(args.out)
    rows = [{"key": (task.track, task.language, sample.id), "id": f"{task.track} {task.language} {sample.id}",
             "audio": sample.audio, "instruction": sample.instruction, "task": task_of(sample.instruction),
             "source_language": "en", "target_language": task.language,
             "seconds": audio_seconds(Path(args.audio) / sample.audio)} for task in tasks for sample in task.samples]
    items, failed = decode(model, tokenizer, state, rows, lambda row: load_audio(Path(args.audio) / row["audio"]),
                           out.with_suffix(".answers.jsonl"), settings, score=False, num_beams=args.beams)
    if rank():
        return
    answers = {}
    for row in rows:
        text = mcif.xml_text(items[row["id"]]["hypothesis"]) if row["id"] in items else ""
        empty = REFUSALS.get(row["target_language"], REFUSALS["en"]) if row["task"] == "sqa" else ""
        answers[row["key"]] = text or empty
    mcif.write_answers(out, Path(settings["checkpoint"][0]).stem, tasks, answers)
    print(f"{out}: {len(answers)} answers, {len(failed)} of them for recordings that could not be heard")
    return int(bool(failed))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", nargs="?", help="manifest to be answered and scored")
    parser.add_argument("--ckpt", help="checkpoint; otherwise the newest of out/ift.pt and out/align.pt")
    parser.add_argument("--out", help="directory of items, summary and report (out/eval); with --xml, the answer file")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="rows of the manifest to be answered")
    parser.add_argument("--beams", type=int, default=1, help="beam search with so many beams; 1 is greedy")
    parser.add_argument("--int8", action="store_true", help="8-bit LLM weights: less memory, faster one answer at a time")
    parser.add_argument("--xml", help="IWSLT 2025 or MCIF source file to be answered")
    parser.add_argument("--audio", help="directory of its recordings")
    parser.add_argument("--trust-paths", action="store_true", help="take audio from outside these folders, too")
    args = parser.parse_args(argv)
    if bool(args.manifest) == bool(args.xml) or args.xml and not (args.audio and args.out):
        parser.error("give a manifest, or --xml SRC.xml --audio DIR --out HYP.xml")
    keep_freed()
    try:
        with ranks():
            start(device := "cuda" if torch.cuda.is_available() else "cpu")
            ckpt = Path(args.ckpt or newest_checkpoint())
            model, tokenizer, state = load_model(ckpt, device, args.int8)
            source = os.stat(args.manifest or args.xml)
            settings = {"checkpoint": [str(ckpt), ckpt.stat().st_size, ckpt.stat().st_mtime_ns], "beams": args.beams,
                        "int8": args.int8, "source": [args.manifest or args.xml, source.st_size, source.st_mtime_ns]}
            failed = (answer_xml if args.xml else evaluate)(args, model, tokenizer, state, settings)
        if failed:
            sys.exit(1)
    except (AudioError, CheckpointError, ManifestError, RankError, mcif.FormatError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        print("eval.py: stopped; start again to go on from here", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(visible(f"eval.py: {error.filename or args.out}: {error.strerror}; what was answered is kept: start again"))


if __name__ == "__main__":
    main()
