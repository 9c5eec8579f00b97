"""Scores: what the model says, decoded in batches, against what it should have said."""

import jiwer
import torch
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from data import collate, render
from model import adapter_length


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
