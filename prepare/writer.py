"""A local LLM that writes training data in batches, each example kept as soon as it is made."""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from data import cut_batches
from eval import Journal
from model import LLM, UserError, default_kernels, fast_dtype, fetch, load_tokenizer
from prepare.filters import failures
from sample import BATCH_POSITIONS, Prefix, generate, pack, read_prefix, score

CHATML = "<|im_start|>", "<|im_end|>"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
)
NO_THINKING = "<think>\n\n</think>\n\n"  # how Qwen3's template asks for an answer at once
WINDOW = 2048  # examples that are sorted by length together
MARGIN = 512  # positions for instructions, questions and answers
SCORED = 1024  # tokens whose log p is computed at once


class Writer:
    """An LLM that chats in ChatML, such as Qwen2.5-Instruct; on CUDA if there is any.

    Raises UserError for another kind of LLM.
    """

    def __init__(self, path: str):
        directory = fetch(path)
        self.tokenizer = load_tokenizer(directory)
        ids = [self.tokenizer.token_to_id(token) for token in CHATML]
        if None in ids:
            raise UserError(
                f"{path}: its tokenizer has no {' and '.join(CHATML)}, expected an LLM that chats "
                "in ChatML; give Qwen2.5-Instruct or kin"
            )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = fast_dtype(directory, self.device)
        kernels = default_kernels(self.device)
        llm = LLM.from_pretrained(directory, dtype, device=self.device, kernels=kernels)
        self.llm = llm.eval()

        # The end of its turn ends an answer, beside the ends that the LLM already knows.
        config = llm.config
        config.eos_token_id = list(dict.fromkeys([*config.eos_token_id, ids[1]]))
        self.end = config.eos_token_id[0]
        self.context = config.max_position_embeddings
        self.chat = CHAT + NO_THINKING if config.model_type == "qwen3" else CHAT

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids).strip()

    def prompt(self, text: str) -> list[int]:
        """The ids of a text as the user's turn, up to where the answer begins."""
        return self.encode(self.chat.replace("{text}", text.replace("<|", "< |")))

    @torch.no_grad()
    def read(self, prompts: list[list[int]]) -> tuple[Prefix, list]:
        """Reads prompts once, but for their last tokens, for all that is answered and weighed."""
        ids, lengths = pack([prompt[:-1] for prompt in prompts], self.device)
        last = [prompt[-1:] for prompt in prompts]
        return read_prefix(self.llm, self.llm.embed(ids), lengths), last

    @torch.no_grad()
    def answer(self, asked: tuple, limits: list[int], never_first=()) -> list[list[int]]:
        """Greedy answers to what `read` returned, of at most limits[i] tokens each."""
        # A batch is as long as its longest prompt, and must not outgrow the context.
        prefix, last = asked
        ids, lengths = pack(last, self.device)
        room = self.context - max(prefix.lengths) - 1
        options = {"max_new_tokens": min(max(limits), room), "never_first": never_first}
        answers = generate(self.llm, self.llm.embed(ids), lengths, prefix=prefix, **options)
        return [answer[:limit] for answer, limit in zip(answers, limits, strict=True)]

    def reply(self, prompts: list[list[int]], limits: list[int]) -> list[str]:
        """Greedy answers to prompts, as text."""
        return [self.decode(ids) for ids in self.answer(self.read(prompts), limits)]

    @torch.no_grad()
    def weigh(self, asked: tuple, answers: list[list[int]]) -> list[tuple[float, int]]:
        """(log p in nats, tokens) of an answer to each prompt; its end counts as a token."""
        # Few answers are scored at once, because a token has as many scores as there are words.
        prefix, last = asked
        weights = []
        sizes = [(len(answer) + 1, 1, i) for i, answer in enumerate(answers)]
        for places in cut_batches(sizes, SCORED, math.inf):
            counts = [len(answers[i]) + 1 for i in places]
            ids, lengths = pack([last[i] + answers[i] + [self.end] for i in places], self.device)
            log_p = score(self.llm, ids, lengths, counts, prefix, places)
            weights += zip(log_p.tolist(), counts, strict=True)
        return weights


def count_tokens(writer: Writer, example: dict) -> int:
    """Tokens of all the texts of an example that prompts are made of."""
    made_by = example["made_by"]
    texts = [made_by["transcript"], made_by.get("asked_of", "")]
    texts += [example["text"], example.get("question", "")]
    return len(writer.encode("\n".join(texts)))


def produce(maker, path: Path, settings: dict, thresholds: dict, batch_size: int) -> list[dict]:
    """Has the LLM complete examples, and returns them as they stand in the journal at `path`.

    maker has a writer, the examples (with id and made_by) and write(examples), which completes a
    batch of them. Batches depend on the examples alone, so that a run which was stopped and went on
    gives the same as one which was not.
    """
    journal = Journal(path, settings)
    made = journal.items
    bar = tqdm(total=len(maker.examples), initial=len(made), desc=path.name, unit=" examples")
    for start in range(0, len(maker.examples), WINDOW):
        # Examples of a kind and of similar length are written together.
        sizes = []
        for example in maker.examples[start : start + WINDOW]:
            tokens = count_tokens(maker.writer, example)
            sizes.append((tokens, 1, example))
            # A translation, of up to twice the tokens, is also read and translated back.
            if 4 * tokens + MARGIN > maker.writer.context:
                example["made_by"]["failed"] = "too long"
        sizes.sort(key=lambda entry: (entry[2]["made_by"]["kind"], entry[0]))

        # A batch in which a run was stopped is written again, and what is missing is added.
        for batch in cut_batches(sizes, BATCH_POSITIONS, batch_size):
            missing = [example for example in batch if example["id"] not in made]
            live = [example for example in batch if "failed" not in example["made_by"]]
            if missing and live:
                maker.write(live)
            for example in missing:
                example["reasons"] = failures(example["made_by"], thresholds)
                journal.add(example)
            bar.update(len(missing))
    bar.close()
    return list(made.values())
