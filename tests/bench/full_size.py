"""The real configurations of w2v-BERT 2.0 and Qwen2.5-1.5B at full size, random weights, against transformers.

    python tests/full_size.py [--dir DIR]     about 5 minutes, 6 GB of disk under DIR, 12 GB of memory

Writes both checkpoints as safetensors in the published layout and dtype (encoder float32, LLM bfloat16), then runs
each implementation in a process of its own: loads, computes hidden states of 10 s of audio and logits of 64 tokens.
Prints errors between the two, seconds to load, seconds to compute and peak memory over the weights' size.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ENCODER = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
               feature_projection_input_dim=160, position_embeddings_type="relative_key")
LLM = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=151936, hidden_size=1536,
           intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
           hidden_act="silu", max_position_embeddings=131072, max_window_layers=28, rms_norm_eps=1e-6,
           rope_theta=1000000.0, sliding_window=131072, use_sliding_window=False, tie_word_embeddings=True,
           bos_token_id=151643, eos_token_id=151643, initializer_range=0.02, torch_dtype="bfloat16")
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}  # relative error: largest against the peer, mean against float32
PEAK = 1.15  # times the weights' size


def peer_class(part):
    from transformers import Qwen2Config, Qwen2ForCausalLM, Wav2Vec2BertConfig, Wav2Vec2BertModel
    return (Wav2Vec2BertModel, Wav2Vec2BertConfig(**ENCODER)) if part == "encoder" else (Qwen2ForCausalLM, Qwen2Config(**LLM))


def write(part, directory):
    from conftest import randomise
    cls, config = peer_class(part)
    randomise(cls(config)).to(torch.float32 if part == "encoder" else torch.bfloat16).save_pretrained(directory)
    if part == "llm":  # as the Hub has it, not as the installed transformers rewrites it
        (directory / "config.json").write_text(json.dumps(LLM, indent=2))


def memory(field):
    """VmHWM (peak) or VmRSS (now) of this process in bytes."""
    return int(re.search(field + r":\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@torch.no_grad()
def run(part, who, dtype, directory):
    """Loads one model, computes on fixed inputs, saves the outputs; prints its figures as JSON."""
    torch.manual_seed(1)
    features, ids = torch.randn(1, 500, 160), torch.randint(0, 151000, (1, 64))
    if who == "ours":
        import model
        cls = model.SpeechEncoder if part == "encoder" else model.LLM
    else:
        cls = peer_class(part)[0]
    before, start = memory("VmRSS"), time.time()
    module = cls.from_pretrained(directory, dtype=dtype).eval()
    seconds_load = time.time() - start
    for p in module.parameters():
        p.flatten()[::1024].sum()  # memory-mapped pages count too, so touch every one
    peak, size = memory("VmHWM") - before, sum(p.nbytes for p in module.parameters())
    times = []
    for _ in range(2):
        start = time.time()
        if who == "ours":
            out = (module(features[0], [500]) if part == "encoder" else module(ids[0], [64]))[None]
        else:
            out = module(features.to(dtype)).last_hidden_state if part == "encoder" else module(ids).logits
        times.append(time.time() - start)
    torch.save(out.float(), directory / f"{who}-{dtype}.pt")
    print(json.dumps(dict(load_s=seconds_load, forward_s=min(times), peak=peak, size=size)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=Path("out/full_size"))
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        part, who, dtype = args.run
        return run(part, who, getattr(torch, dtype), args.dir / part)
    missed = []

    def judge(what, value, bound):
        if not value < bound:
            missed.append(f"{what} {value:.3g}, expected below {bound}")

    for part in ("encoder", "llm"):
        if not (args.dir / part / "config.json").exists():
            print(f"writing a random {part} checkpoint to {args.dir / part}", flush=True)
            write(part, args.dir / part)
        for dtype in ("float32", "bfloat16"):
            for who in ("ours", "peer"):
                result = subprocess.run([sys.executable, __file__, "--dir", args.dir, "--run", part, who, dtype],
                                        capture_output=True, text=True)
                if result.returncode:
                    sys.exit(result.stderr)
                figures = json.loads(result.stdout.splitlines()[-1])
                print(f"{part:7} {dtype:8} {who}: weights {figures['size'] / 1e9:.2f} GB, loaded in {figures['load_s']:5.1f} s, "
                      f"peak {figures['peak'] / figures['size']:.2f} x weights, forward {figures['forward_s']:.2f} s", flush=True)
                if who == "ours":
                    judge(f"{part} {dtype} peak", figures["peak"] / figures["size"], PEAK)
            ours, peer = (torch.load(args.dir / part / f"{who}-torch.{dtype}.pt") for who in ("ours", "peer"))
            largest, mean = (ours - peer).abs().max() / peer.abs().max(), (ours - peer).norm() / peer.norm()
            print(f"{part:7} {dtype:8} ours against peer: largest {largest:.1e}, mean {mean:.1e} (relative)", flush=True)
            if dtype == "float32":
                exact = ours
                judge(f"{part} against peer", largest, BOUNDS["float32"])
        mean = (ours - exact).norm() / exact.norm()
        print(f"{part:7} ours bfloat16 against ours float32: mean {mean:.1e} (relative)", flush=True)
        judge(f"{part} bfloat16", mean, BOUNDS["bfloat16"])
    sys.exit("; ".join(missed) or None)


if __name__ == "__main__":
    main()
