"""The configurations of w2v-BERT 2.0 and Qwen2.5-1.5B at full size, with random weights, against
transformers.

    python tests/bench/full_size.py [--dir DIR]

takes about 5 minutes, 6 GB of disk and 12 GB of memory. It writes both checkpoints as safetensors
in the published layout and dtype (encoder float32, LLM bfloat16). Then each implementation, in a
process of its own, loads them and computes hidden states of 10 s of audio and logits of 64 tokens.
Printed are the errors between the two, seconds to load and to compute, and the peak of memory over
the weights' size. At last both are exported with a new adapter (prepare/export.py); `--only export`
does nothing else. --layers 1 is a quick try, which needs a --dir of its own.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402

ENCODER = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    feature_projection_input_dim=160,
    position_embeddings_type="relative_key",
)
LLM = dict(
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    hidden_act="silu",
    max_position_embeddings=131072,
    max_window_layers=28,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=131072,
    use_sliding_window=False,
    tie_word_embeddings=True,
    bos_token_id=151643,
    eos_token_id=151643,
    initializer_range=0.02,
    torch_dtype="bfloat16",
)
LARGEST = 1e-4  # relative error of float32: the largest difference to transformers
MEAN = 2e-2  # relative error of bfloat16: the mean difference to float32
PEAK = 1.15  # times the weights' size
EXPORT_PEAK, EXPORT_SECONDS = 1.3, 60  # the same, and seconds beside writing the files


def peer_class(part: str, layers: int = 0) -> tuple[type, object]:
    """The class in transformers, and the configuration with so many layers, 0 for its own."""
    from transformers import (
        Qwen2Config,
        Qwen2ForCausalLM,
        Wav2Vec2BertConfig,
        Wav2Vec2BertModel,
    )

    if part == "encoder":
        config = Wav2Vec2BertConfig(**with_layers(ENCODER, layers))
        return Wav2Vec2BertModel, config
    return Qwen2ForCausalLM, Qwen2Config(**with_layers(LLM, layers))


def with_layers(config: dict, layers: int) -> dict:
    return config | {"num_hidden_layers": layers or config["num_hidden_layers"]}


def write(part: str, directory: Path, layers: int) -> None:
    """A checkpoint with random weights, as it would be published."""
    peer, config = peer_class(part, layers)
    dtype = torch.float32 if part == "encoder" else torch.bfloat16
    conftest.randomise(peer(config)).to(dtype).save_pretrained(directory)
    if part == "llm":  # as the Hub has it, not as the installed transformers rewrites it
        text = json.dumps(with_layers(LLM, layers), indent=2)
        (directory / "config.json").write_text(text)


def memory(field: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\s*(\d+) kB", status)[1]) * 1024


@torch.no_grad()
def run(part: str, side: str, dtype_name: str, directory: Path) -> None:
    """Loads one model, computes on fixed inputs, saves the outputs; prints its figures as JSON."""
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(1)
    features, ids = torch.randn(1, 500, 160), torch.randint(0, 151000, (1, 64))
    if side == "ours":
        import model

        loader = model.SpeechEncoder if part == "encoder" else model.LLM
    else:
        loader, _ = peer_class(part)
    before, start = memory("VmRSS"), time.time()
    module = loader.from_pretrained(directory, dtype=dtype).eval()
    load_seconds = time.time() - start
    for p in module.parameters():
        p.flatten()[::1024].sum()  # pages that are mapped count too, so every one is touched
    peak, size = memory("VmHWM") - before, sum(p.nbytes for p in module.parameters())

    seconds = []
    for _ in range(2):
        start = time.time()
        if side == "ours":
            inputs = (features[0], [500]) if part == "encoder" else (ids[0], [64])
            out = module(*inputs)[None]
        elif part == "encoder":
            out = module(features.to(dtype)).last_hidden_state
        else:
            out = module(ids).logits
        seconds.append(time.time() - start)
    torch.save(out.float(), directory / f"{side}-{dtype_name}.pt")
    figures = {"load": load_seconds, "forward": min(seconds), "peak": peak, "size": size}
    print(json.dumps(figures))


def measure(part: str, side: str, dtype: str, directory: Path) -> float:
    """Runs one model in a process of its own. Returns its peak of memory over its size."""
    command = [sys.executable, __file__, "--dir", directory, "--run", part, side, dtype]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    figures = json.loads(result.stdout.splitlines()[-1])
    peak = figures["peak"] / figures["size"]
    print(
        f"{part:7} {dtype:8} {side}: weights {figures['size'] / 1e9:.2f} GB, loaded in "
        f"{figures['load']:5.1f} s, peak {peak:.2f} x weights, forward {figures['forward']:.2f} s",
        flush=True,
    )
    return peak


def run_export(directory: Path) -> None:
    """Exports both halves and a new adapter in bfloat16; prints its figures as JSON."""
    import model
    from prepare import export

    bases = {part: model.fingerprint(directory / part) for part in ("encoder", "llm")}
    encoder = model.SpeechEncoder.read_config(directory / "encoder")
    config = model.AdapterConfig.between(encoder, model.LLM.read_config(directory / "llm"))
    adapter = model.LengthAdapter(config)
    checkpoint = {
        "model": {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()},
        "adapter": vars(config),
        "bases": bases,
        "config": {"phase": "align", "lora_alpha": 32.0},
        "data": [["random", "CC0-1.0", "en", 1.0]],
        "window": 30.0,
        "step": 0,
    }
    torch.save(checkpoint, directory / "align.pt")
    shutil.copy(model.DEMO / "llm" / "tokenizer.json", directory / "llm")
    shutil.rmtree(directory / "exported", ignore_errors=True)
    del checkpoint, adapter
    writing = []
    save_file = export.save_file

    def timed_save(*args, **options) -> None:
        start = time.time()
        save_file(*args, **options)
        writing.append(time.time() - start)

    export.save_file = timed_save
    before, start = memory("VmRSS"), time.time()
    export.main([str(directory / "align.pt"), str(directory / "exported")])
    seconds = time.time() - start
    size = sum(path.stat().st_size for path in (directory / "exported").iterdir())
    peak = memory("VmHWM") - before
    print(json.dumps({"peak": peak, "size": size, "seconds": seconds, "writing": sum(writing)}))


def measure_export(directory: Path) -> dict[str, tuple[float, float]]:
    """Runs the export in a process of its own. Returns what is bounded."""
    command = [sys.executable, __file__, "--dir", directory, "--run", "export", "", ""]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    figures = json.loads(result.stdout.splitlines()[-1])
    peak, beside = figures["peak"] / figures["size"], figures["seconds"] - figures["writing"]
    print(
        f"export: {figures['size'] / 1e9:.2f} GB in {figures['seconds']:.1f} s, of which "
        f"{figures['writing']:.1f} s write, peak {peak:.2f} x weights",
        flush=True,
    )
    return {"export peak": (peak, EXPORT_PEAK), "export seconds": (beside, EXPORT_SECONDS)}


def differences(ours: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest and the mean difference, relative to the other's largest value and norm."""
    largest = (ours - other).abs().max() / other.abs().max()
    return largest.item(), ((ours - other).norm() / other.norm()).item()


def compare(part: str, directory: Path) -> dict[str, tuple[float, float]]:
    """Runs both sides in both dtypes. Returns what is bounded: {name: (value, bound)}."""
    bounded, outputs = {}, {}
    for dtype in ("float32", "bfloat16"):
        for side in ("ours", "peer"):
            peak = measure(part, side, dtype, directory)
            outputs[side, dtype] = torch.load(directory / part / f"{side}-{dtype}.pt")
            if side == "ours":
                bounded[f"{part} {dtype} peak"] = peak, PEAK
        largest, mean = differences(outputs["ours", dtype], outputs["peer", dtype])
        figures = f"largest {largest:.1e}, mean {mean:.1e} (relative)"
        print(f"{part:7} {dtype:8} ours against peer: {figures}", flush=True)
        if dtype == "float32":
            bounded[f"{part} against peer"] = largest, LARGEST
    _, mean = differences(outputs["ours", "bfloat16"], outputs["ours", "float32"])
    print(f"{part:7} ours bfloat16 against ours float32: mean {mean:.1e} (relative)", flush=True)
    bounded[f"{part} bfloat16"] = mean, MEAN
    return bounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("out/full_size"))
    parser.add_argument("--layers", type=int, default=0, help="of each model; 0: all")
    parser.add_argument("--only", choices=["export"], help="compare nothing")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run and args.run[0] == "export":
        return run_export(args.dir)
    if args.run:
        return run(*args.run, args.dir / args.run[0])
    bounded = {}
    for part in ("encoder", "llm"):
        directory = args.dir / part
        if not (directory / "config.json").exists():
            print(f"writing a random {part} checkpoint to {directory}", flush=True)
            write(part, directory, args.layers)
        if not args.only:
            bounded |= compare(part, args.dir)
    bounded |= measure_export(args.dir)
    missed = []
    for name, (value, bound) in bounded.items():
        if not value < bound:
            missed.append(f"{name} {value:.3g}, expected below {bound}")
    sys.exit("; ".join(missed) or None)


if __name__ == "__main__":
    main()
