"""Exports a trained demo in float32 and compares what transformers answers with our own answers.

    python tests/bench/hub_answers.py [--ckpt out/ift.pt] [--rows 40]

The rows are the first of each task and language in turn, asked in the first wording of each.
transformers runs in a process that finds nothing of this project, with batches of 1 and 8.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import chain, islice, zip_longest
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import sample  # noqa: E402
from model import SpeechLM  # noqa: E402
from prepare import export  # noqa: E402

NEW_TOKENS = 64
PEER = """
import sys, time, torch
from transformers import AutoModel, AutoProcessor

directory, inputs, out, limit = sys.argv[1:]
model = AutoModel.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
waves, texts = torch.load(inputs)
results = {}
for size in (1, 8):
    start, results[size] = time.time(), []
    for i in range(0, len(waves), size):
        batch = processor(audio=waves[i : i + size], text=texts[i : i + size])
        ids = model.generate(**batch, max_new_tokens=int(limit), do_sample=False)
        ids = ids[:, batch["input_ids"].shape[1] :]
        results[size] += processor.batch_decode(ids, skip_special_tokens=True)
    print(f"transformers, batches of {size}: {time.time() - start:.1f} s", flush=True)
torch.save(results, out)
"""


def draw_rows(count: int) -> tuple[list[torch.Tensor], list[str]]:
    """Recordings and instructions of the test, all tasks and languages in turn."""
    manifest, kinds = data.Manifest(ROOT / "demo" / "test.jsonl"), {}
    for example in manifest:
        kinds.setdefault((example["task"], example["target_language"]), []).append(example)
    in_turn = [x for x in chain(*zip_longest(*kinds.values())) if x is not None]
    rows = list(islice(in_turn, count))
    return [manifest.audio(row) for row in rows], [data.instruction_of(row) for row in rows]


@torch.no_grad()
def our_answers(model: SpeechLM, tokenizer, waves: list, texts: list[str]) -> list[str]:
    """Greedy answers, one by one."""
    prompt = data.make_prompt(tokenizer, model.llm.config.eos_token_id, model.prompt)
    answers = []
    for wave, text in zip(waves, texts, strict=True):
        ((audio,),) = sample.encode_waves(model, [wave], 30)
        ids, _ = data.render({"instruction": text}, len(audio), tokenizer, prompt)
        x = model.embed(torch.tensor(ids), audio)
        (answer,) = sample.generate(model.llm, x, [len(ids)], NEW_TOKENS)
        answers.append(tokenizer.decode(answer))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default=str(ROOT / "out" / "ift.pt"))
    parser.add_argument("--rows", type=int, default=40)
    args = parser.parse_args()
    waves, texts = draw_rows(args.rows)
    model, tokenizer, _ = sample.load_model(args.ckpt)
    start = time.time()
    answers = our_answers(model, tokenizer, waves, texts)
    print(f"here, one by one: {time.time() - start:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        hub, inputs, out = (Path(folder) / name for name in ("hub", "inputs.pt", "out.pt"))
        export.main([args.ckpt, str(hub), "--dtype", "float32"])
        torch.save((waves, texts), inputs)
        command = [sys.executable, "-I", "-c", PEER, hub, inputs, out, str(NEW_TOKENS)]
        subprocess.run(list(map(str, command)), check=True, cwd=folder)
        results = torch.load(out)
    for size, theirs in results.items():
        differing = [
            f"{text!r}: {ours!r}, {other!r}"
            for text, ours, other in zip(texts, answers, theirs, strict=True)
            if ours != other
        ]
        print(f"batches of {size}: {len(differing)} of {len(answers)} answers differ", *differing)
        if differing:
            sys.exit(1)


if __name__ == "__main__":
    main()
