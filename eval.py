"""Scores what a checkpoint says against what it should have said: python eval.py demo/test.jsonl

Prints the WER of transcribing the manifest's asr rows.
"""

import argparse
import sys
from collections import Counter

import jiwer
import torch
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from data import AudioError, Manifest, ManifestError, collate, fbank, render
from model import CheckpointError, adapter_length
from sample import load_model, newest_checkpoint


def word_error_rate(references, hypotheses, languages):
    """Corpus word error rate as a fraction, after Whisper's normalisers: the English one for en, the basic one else."""
    english, basic = EnglishTextNormalizer(), BasicTextNormalizer()
    normalise = [english if language == "en" else basic for language in languages]
    return jiwer.wer([f(text) for f, text in zip(normalise, references)],
                     [f(text) for f, text in zip(normalise, hypotheses)])


@torch.no_grad()
def answer_rows(model, tokenizer, rows, frames, form="text", batch_size=16, max_new_tokens=256):
    """Answers the instruction of every row, longest recordings together; as far as the LLM's context goes.

    rows: manifest rows, whose text is not shown to the model; frames: a (F, 160) or encoder states (F, D) each.
    Returns texts in the rows' order.
    """
    device = next(model.parameters()).device
    texts = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(frames[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        some = order[start:start + batch_size]
        examples = [(*render({**rows[i], "text": None}, adapter_length(len(frames[i]), model.adapter.config), tokenizer,
                             model.llm.config.eos_token_id[0], form), frames[i]) for i in some]
        batch = {name: tensor.to(device) for name, tensor in collate(examples).items()}
        sizes = torch.tensor([len(ids) for ids, *_ in examples], device=device)
        room = min(max_new_tokens, model.llm.config.max_position_embeddings - int(sizes.max()))
        answers = model.generate(batch["ids"], sizes, batch["features"], batch["lengths"], max_new_tokens=room)
        for i, ids in zip(some, answers):
            texts[i] = tokenizer.decode(ids)
    return texts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest")
    parser.add_argument("--ckpt", help="checkpoint; otherwise the newest of out/ift.pt and out/align.pt")
    args = parser.parse_args(argv)
    rows, frames = [], []
    try:
        model, tokenizer, config = load_model(args.ckpt or newest_checkpoint())
        manifest = Manifest(args.manifest)
        manifest.keep(["asr"])
        for row in manifest:
            try:
                frames.append(fbank([manifest.audio(row)])[0][0])
            except AudioError as error:
                print(f"left out: {row['where']}: {error}", file=sys.stderr)
                continue
            rows.append(row)
    except (CheckpointError, ManifestError) as error:
        sys.exit(f"eval.py: {error}")
    texts = answer_rows(model, tokenizer, rows, frames, config["prompt"])
    clips = Counter(row["speaker"] for row in rows)
    names = [row["speaker"] if clips[row["speaker"]] >= 100 else "other speakers" for row in rows]
    for name in ["all", *sorted(set(names))]:
        i = [i for i, own in enumerate(names) if name in ("all", own)]
        references, languages = [rows[k]["text"] for k in i], [rows[k]["target_language"] for k in i]
        wer = word_error_rate(references, [texts[k] for k in i], languages)
        print(f"{name}: WER {100 * wer:.2f} % of {len(i)} clips")


if __name__ == "__main__":
    main()
