"""Follows an instruction about a recording: python sample.py audio.wav "Translate to German"

Uses the newest of out/ift.pt and out/align.pt unless told otherwise, and prints the answer as it is made.
"""

import argparse
import sys
from pathlib import Path

import torch

from data import AudioError, fbank, load_audio, load_tokenizer, render
from model import (AdapterConfig, CheckpointError, LengthAdapter, LLM, SpeechEncoder, SpeechLM, adapter_length, fetch,
                   fingerprint)


def load_checkpoint(path):
    """A checkpoint as a dict. Raises CheckpointError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        whole = {"model", "adapter", "bases", "config", "step"} <= state.keys()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train it first or correct the path") from None
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, ...
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: not a checkpoint of this project ({reason})") from error
    if not whole:
        raise CheckpointError(f"{path}: not a checkpoint of this project (it lacks parts); give an align.pt or ift.pt")
    return state


def restore(model, state, bases, path):
    """Puts the parts that a checkpoint holds into the model. Raises CheckpointError if they belong to another model."""
    for name, found in bases.items():
        trained = state["bases"][name]
        if trained["sha256"] != found["sha256"]:
            raise CheckpointError(f"{path}: was trained on the {name} {trained['path']}, found another model at "
                                  f"{found['path']}; give the same --{name}")
    for part in {name.split(".")[0] for name in state["model"]}:
        own = {name: tensor.shape for name, tensor in model.state_dict().items() if name.split(".")[0] == part}
        saved = {name: tensor.shape for name, tensor in state["model"].items() if name.split(".")[0] == part}
        wrong = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        if wrong:
            raise CheckpointError(f"{path}: {len(wrong)} tensors of the {part} do not fit, {wrong[0]} first; it is damaged "
                                  "or of another version: train it again")
    model.load_state_dict(state["model"], strict=False)  # the parts it does not hold are the base models'


def newest_checkpoint():
    found = [path for path in (Path("out/align.pt"), Path("out/ift.pt")) if path.exists()]
    if not found:
        raise CheckpointError("no out/align.pt or out/ift.pt; run python train.py --phase align first, or give --ckpt")
    return max(found, key=lambda path: path.stat().st_mtime)


def load_model(path, device="cpu"):
    """The model of a checkpoint, on its two base models, in float32 on CPU and bfloat16 on CUDA; its tokenizer; the
    training configuration. Raises CheckpointError."""
    state = load_checkpoint(path)
    bases = {name: base["path"] for name, base in state["bases"].items()}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    encoder, llm = (part.from_pretrained(bases[name], dtype, device=device)
                    for name, part in (("encoder", SpeechEncoder), ("llm", LLM)))
    adapter = LengthAdapter(AdapterConfig(**state["adapter"]), dtype).to(device, dtype)
    model = SpeechLM(encoder, adapter, llm)
    restore(model, state, {name: fingerprint(base) for name, base in bases.items()}, path)
    return model.eval(), load_tokenizer(fetch(bases["llm"])), state["config"]


def answer(model, tokenizer, row, wave, form, on_text):
    """Answers one row's instruction about a waveform; on_text gets every new piece of text. Returns the whole text."""
    features, lengths = fbank([wave.to(next(model.parameters()).device)])
    frames = adapter_length(lengths.item(), model.adapter.config)
    ids, _ = render(row, frames, tokenizer, model.llm.config.eos_token_id[0], form)
    said, shown = [], ""

    def on_token(_, token):
        nonlocal shown
        said.append(token)
        text = tokenizer.decode(said)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            on_text(text[len(shown):])
            shown = text

    model.generate(torch.tensor([ids], device=features.device), torch.tensor([len(ids)], device=features.device),
                   features, lengths, on_token=on_token)
    return tokenizer.decode(said)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("audio", help="a recording")
    parser.add_argument("instruction", help='such as "Transcribe the English speech."')
    parser.add_argument("--ckpt", help="checkpoint; otherwise the newest of out/ift.pt and out/align.pt")
    args = parser.parse_args(argv)
    try:
        wave = load_audio(args.audio)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer, config = load_model(args.ckpt or newest_checkpoint(), device)
    except (AudioError, CheckpointError) as error:
        sys.exit(f"sample.py: {error}")
    if config["prompt"] == "tokens":
        sys.exit("sample.py: this checkpoint knows <|language|><|task|> prompts only, not instructions in words; train "
                 "with --prompt text")
    row = {"instruction": args.instruction, "text": None, "task": "asr"}
    try:
        answer(model, tokenizer, row, wave, config["prompt"], lambda text: print(text, end="", flush=True))
    except ValueError as error:  # longer than the LLM's context
        sys.exit(f"sample.py: {args.audio}: {error}")
    print()


if __name__ == "__main__":
    main()
