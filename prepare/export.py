"""A trained model as a directory that transformers loads, and the Hub shows.

    python -m prepare.export out/ift.pt DIR [--dtype float32] [--scores out/eval/test-ift.json]

DIR gets the weights of encoder, adapter and LLM, with low-rank updates merged, the tokenizer, one
file of code for transformers (prepare/exported/), a model card and the NOTICE of the data. Then

    AutoModel.from_pretrained(DIR, trust_remote_code=True)

needs nothing of this project, and sample.py, eval.py (--ckpt DIR) and train.py (--init DIR) take it
as they take a checkpoint.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
from safetensors.torch import save_file

from data import FREE, make_prompt, notice
from model import (
    EXPORTED,
    EXPORTED_CONFIGS,
    SpeechLM,
    UserError,
    fetch,
    load_checkpoint,
    load_tokenizer,
    locate_base,
    one_line_errors,
    steady_output,
    visible,
)

CODE = Path(__file__).with_name("exported") / "modeling_speech_lm.py"
SHARD = 10**9  # bytes of weights in a file
CLASSES = {
    "AutoConfig": "SpeechLMConfig",
    "AutoModel": "SpeechLMForConditionalGeneration",
    "AutoProcessor": "SpeechLMProcessor",
}
EXTRACTORS = {"wav2vec2-bert": "SeamlessM4TFeatureExtractor", "whisper": "WhisperFeatureExtractor"}
CARD = """\
---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags:
{tags}
---

# A speech-language model

It follows an instruction in words: it {does}. A {encoder} encoder feeds
a {llm} LLM through a length adapter; all three have {millions} million parameters. Training took
{steps} steps of phase `{phase}`.

## Use

```python
{code}
```

`wave` is a mono recording of 16 kHz, full scale at +-1. Those of the training were at most
{window} s long; cut longer ones at pauses. Instructions in words of the training work best, such as
"Transcribe." or "Translate to German."

## Training data

{data}

Licences that may restrict the use of the model: {licences}. `NOTICE` has the attributions.

## Scores

{scores}

## Limits

Speech unlike that of the training is answered with fluent text that is wrong. Facts in answers were
not checked. The licences of the two pretrained halves hold for this model, too.
"""
TASKS = {"asr": "automatic-speech-recognition", "st": "translation", "sqa": "question-answering"}


def export(source: str, out: Path, dtype: torch.dtype, scores: str, encoder="", llm="") -> None:
    """Writes the directory of a checkpoint. Raises UserError; then nothing is left of it."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; give a new directory")
    checkpoint = load_checkpoint(source)
    llm = llm or locate_base("llm", checkpoint["bases"]["llm"])
    model = SpeechLM.from_pretrained(source, dtype, "cpu", encoder, llm, checkpoint)
    tokenizer_file = fetch(llm) / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_file.parent)
    summary = read_summary(scores) if scores else []
    with one_line_errors(out, "make room for it, or give another directory"):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            write_weights(partial, model)
            for name, content in configurations(model, tokenizer, checkpoint, dtype).items():
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (partial / name).write_text(text, encoding="utf-8")
            shutil.copyfile(tokenizer_file, partial / "tokenizer.json")
            shutil.copyfile(CODE, partial / CODE.name)
            (partial / "NOTICE").write_text(notice(checkpoint["data"]), encoding="utf-8")
            card = model_card(model, checkpoint, summary)
            (partial / "README.md").write_text(card, encoding="utf-8")
            partial.chmod(0o755)
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_weights(out: Path, model: SpeechLM) -> None:
    """The state dict in files of about SHARD bytes each, and the index that names them."""
    state, shards, size = model.state_dict(), [{}], 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, file)
        save_file(
            {name: tensor.contiguous() for name, tensor in shard.items()},
            out / file,
            metadata={"format": "pt"},
        )
        os.chmod(out / file, 0o644)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def configurations(model: SpeechLM, tokenizer, checkpoint: dict, dtype: torch.dtype) -> dict:
    """{file name: JSON} of all that transformers and this project read besides the weights."""
    encoder, llm = model.encoder.config, model.llm.config
    longest = encoder.max_source_positions / 50 or 30.0  # seconds
    prompt = make_prompt(tokenizer, llm.eos_token_id, model.prompt)
    ends, end = llm.eos_token_id, tokenizer.id_to_token(prompt.end)
    names = {auto: f"{CODE.stem}.{name}" for auto, name in CLASSES.items()}
    adapter = checkpoint["adapter"]
    training = {name: checkpoint.get(name) for name in ("data", "window", "step", "refuse_above")}
    training["config"] = {"phase": checkpoint["config"]["phase"], "prompt": model.prompt}
    config = {
        "model_type": EXPORTED,
        "architectures": [CLASSES["AutoModel"]],
        "auto_map": {auto: name for auto, name in names.items() if auto != "AutoProcessor"},
        "dtype": str(dtype).removeprefix("torch."),
        EXPORTED_CONFIGS["encoder"]: encoder.to_dict(),
        EXPORTED_CONFIGS["llm"]: llm.to_dict(),
        "adapter_config": adapter,
        "tie_word_embeddings": False,
        "training": training | {"adapter": adapter},
    }
    bins = encoder.feature_projection_input_dim // 2
    extractor = {"feature_extractor_type": EXTRACTORS[encoder.model_type], "feature_size": bins}
    extractor |= {"sampling_rate": 16000, "padding_side": "right", "return_attention_mask": True}
    if encoder.model_type == "whisper":
        extractor |= {"hop_length": 160, "n_fft": 400, "chunk_length": 30}
        extractor["return_attention_mask"] = False
    else:
        extractor |= {"num_mel_bins": bins, "stride": 2, "padding_value": 0.0}
    processor = {"processor_class": CLASSES["AutoProcessor"], "longest": longest}
    processor["auto_map"] = {"AutoProcessor": names["AutoProcessor"]}
    processor["adapter"] = adapter
    processor["prompt"] = {
        name: getattr(prompt, name) for name in ("before", "text_after", "after")
    }
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    tokens |= {"clean_up_tokenization_spaces": False, "padding_side": "left"}
    generation = {"eos_token_id": ends, "pad_token_id": prompt.end, "max_new_tokens": 256}
    return {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": extractor,
        "processor_config.json": processor,
        "tokenizer_config.json": tokens,
    }


def read_summary(path: str) -> list[dict]:
    """The lines of scores in a summary that eval.py wrote. Raises UserError."""
    with one_line_errors(path, "give the JSON file that eval.py wrote beside its answers"):
        return json.loads(Path(path).read_text(encoding="utf-8"))["scores"]


def model_card(model: SpeechLM, checkpoint: dict, summary: list[dict]) -> str:
    """The README.md of the directory."""
    phase, window = checkpoint["config"]["phase"], checkpoint["window"]
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    does, tasks = "transcribes a recording", ["asr"]
    if phase != "align":
        does += ", translates it, or answers a question about it"
        tasks = list(TASKS)
    licences = {licence for _, licence, _, _ in checkpoint["data"]}
    restricted = [licence for licence in licences if not FREE.fullmatch(licence)]
    code = CODE.read_text(encoding="utf-8").split("\n\n")[1]
    rows = ["| corpus | licence | into | hours |", "|---|---|---|---|"]
    for corpus, licence, language, seconds in checkpoint["data"]:
        cells = corpus, licence, language, f"{seconds / 3600:.2f}"
        rows.append(f"| {' | '.join(map(visible, cells))} |")
    return CARD.format(
        tags="\n".join(f"- {TASKS[task]}" for task in tasks),
        does=does,
        encoder=model.encoder.config.model_type,
        llm=model.llm.config.model_type,
        millions=f"{millions:,.0f}",
        steps=f"{checkpoint['step']:,}",
        phase=phase,
        code=textwrap.dedent(code),
        window=f"{window:.1f}",
        data="\n".join(rows),
        licences=", ".join(sorted(restricted)) or "none",
        scores="\n".join(score_table(summary)) if summary else "None were given to the export.",
    )


def score_table(summary: list[dict]) -> list[str]:
    """A Markdown table of the scores over all rows, with their 95 % intervals."""
    lines = ["| task | into | rows | scores |", "|---|---|---|---|"]
    for line in summary:
        if line["group"] == "all":
            texts = []
            for name, (value, low, high) in line["scores"].items():
                texts.append(f"{name} {value:.3g} ({low:.3g} to {high:.3g})")
            lines.append(
                f"| {line['task']} | {line['language']} | {line['items']} | {', '.join(texts)} |"
            )
    return lines


def main(argv: list[str] | None = None) -> None:
    steady_output()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("checkpoint", help="an align.pt or ift.pt")
    add("directory", type=Path, help="a new one, or one that is empty")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    add("--scores", default="", help="summary of eval.py, for the model card")
    add("--encoder", default="", help="where the encoder is, if not where it was in training")
    add("--llm", default="", help="where the LLM is, if not where it was in training")
    args = parser.parse_args(argv)
    try:
        dtype = getattr(torch, args.dtype)
        inputs = args.checkpoint, args.directory, dtype, args.scores
        export(*inputs, args.encoder, args.llm)
    except UserError as error:
        sys.exit(f"export: {error}")
    size = sum(path.stat().st_size for path in args.directory.iterdir()) / 1e9
    print(visible(f"{args.directory}: written, {size:.2f} GB"))


if __name__ == "__main__":
    main()
