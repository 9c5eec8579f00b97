"""What a run needs before it is run: python train.py --dry-run and the run's other options.

One training step, a validation's reading and the encoder cache go through the model operator by operator, on tensors that
have shapes and no memory; what they would hold is counted as they come and go.
"""

import os
import shutil
import time
import weakref
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Examples, feature_length, render, schedule
from model import AdapterConfig, EncoderConfig, LengthAdapter, LLM, LLMConfig, SpeechEncoder, SpeechLM, adapter_length
from prepare.checkpoint import fetch, read_generation, read_json, weight_files
from prepare.errors import CheckpointError, TrainError
from sample import BATCH_FRAMES, MAX_NEW_TOKENS

GB = 1e9
TIMED = 3  # steps


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make within it: `now`, those alive; `peak`, the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:  # else a view
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, storage, size):
        self.known.discard(storage)
        self.now -= size


def meta_parts(encoder, llm, dtype, compute_dtype, device, float32=(), **adapter):
    """SpeechLM.from_parts without weights: shapes alone, on the meta device, from the two config.json."""
    raw, directory = read_json(Path(encoder) / "config.json"), Path(llm)
    heard = EncoderConfig.from_dict(raw, Path(encoder) / "config.json")
    said = LLMConfig.from_dict(read_json(directory / "config.json"), directory / "config.json", read_generation(directory))
    config = AdapterConfig(**asdict(heard) | {"output_size": said.hidden_size} | adapter)
    with torch.device("meta"):
        model = SpeechLM(SpeechEncoder(heard, compute_dtype), LengthAdapter(config, compute_dtype), LLM(said, compute_dtype))
    for name, part in model.named_children():
        part.to(torch.float32 if name in float32 else dtype)
    return model.eval()


def size(parameters):
    return sum(p.nbytes for p in parameters)


def memory_now():
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_there(device):
    """Bytes of memory that are free on the device."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def fake_batch(rows, width):
    """What SpeechLM.forward takes of rows, each (frames, positions, answer tokens), in tensors without memory."""
    frames, positions, answers = zip(*rows)
    return {"features": torch.empty(sum(frames), width), "lengths": list(frames),
            "ids": torch.empty(sum(positions), dtype=torch.long), "ids_lengths": list(positions),
            "targets": torch.empty(sum(answers), dtype=torch.long)}


def largest(batches, budgets):
    """Of batches of rows (frames, positions, answer tokens) those that may need most memory; the longest row, repeated as
    often as the budgets of frames and positions allow, stands for a batch that was not seen."""
    chosen = [max(batches, key=lambda batch: sum(row[i] ** power for row in batch)) for i, power in
              ((0, 1), (0, 2), (1, 1), (2, 1))]
    longest = max((row for batch in batches for row in batch))
    chosen.append([longest] * max(1, min(budgets[0] // longest[0], budgets[1] // longest[1])))
    return list({tuple(batch): batch for batch in chosen}.values())


def step_memory(model, rows, width, accumulate):
    """Bytes that a training step holds beside weights and optimizer state: when its forward pass is done, and at most."""
    with Live() as live:
        parameters, batch = [p for p in model.parameters() if p.requires_grad], fake_batch(rows, width)
        for _ in range(min(2, accumulate)):  # the second batch finds the gradients of the first
            before = live.now
            loss, count = model(**batch)
            held = live.now - before
            (loss / count).backward()
            del loss
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for p in parameters:
            p.grad = None
    return held, live.peak


@torch.no_grad()
def encode_memory(model, frames, longest, width):
    """Bytes that encoding so many frames without gradients takes, in windows of the longest row."""
    lengths = [longest] * max(1, frames // longest)
    with Live() as live:
        model.encode(torch.empty(sum(lengths), width), lengths)
    return live.peak


def dry_run(cfg, rates, opened, build, parameter_groups, on_device):
    """Prints what a run would need, and how long it would take if its weights are there. cfg: a settled TrainConfig, with
    the learning rates of the trained parts; opened: what open_manifests gives; the rest are train.py's functions. Raises
    CheckpointError."""
    manifests, weights, dev, *_, seconds = opened
    cfg = replace(cfg, encoder=str(fetch(cfg.encoder, weights=False)), llm=str(fetch(cfg.llm, weights=False)))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    model, tokenizer, _ = build(cfg, rates, meta=True)
    examples = Examples([*manifests, dev], tokenizer, model.llm.config.eos_token_id[0], model.adapter.config,
                        cfg.prompt, cfg.length_hint, cfg.max_seconds, seed=cfg.seed)
    baseline = memory_now()

    # the batches of the first pool, as (frames, positions, answer tokens) of each row
    pool, drawn = [], []
    for position, batch in schedule(manifests, weights, examples.size, cfg.batch_frames, cfg.batch_tokens, cfg.seed):
        pool.append(batch)
        if position["pool"]:
            break
    for batch in pool:
        rows = []
        for m, i, turn in batch:
            row, hinted = examples.row(m, i, turn)
            frames = feature_length(manifests[m].seconds(row))
            if frames <= feature_length(cfg.max_seconds):
                ids, answer = render(row, adapter_length(frames, examples.adapter), tokenizer, examples.end_id, cfg.prompt,
                                     hinted)
                rows.append((frames, len(ids), answer))
        if rows:
            drawn.append(rows)
    longest = max(row[0] for rows in drawn for row in rows)

    # what is kept all the time, and what the steps add
    parts = {name: list(part.parameters()) for name, part in model.named_children()}
    trained = [p for p in model.parameters() if p.requires_grad]
    frames = 0
    if "encoder" not in rates and cfg.cache_gb:
        clips = {(m, row["audio"], row["start"], manifest.seconds(row))
                 for m, manifest in enumerate([*manifests, dev]) for row in manifest}
        frames = sum(feature_length(clip[3]) for clip in clips if clip[3] <= cfg.max_seconds)
    width, compute = model.encoder.config.hidden_size, model.encoder.compute_dtype
    cache = frames * width * compute.itemsize
    place = next(path for path in (Path(cfg.out).resolve(), *Path(cfg.out).resolve().parents) if path.exists())
    cached = 0 < cache <= min(cfg.cache_gb * GB, 0.9 * shutil.disk_usage(place).free)
    weights_size, moments, gradients = size(model.parameters()), 8 * sum(p.numel() for p in trained), size(trained)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        encoding = encode_memory(model, cfg.batch_frames, longest, 160) if cached else 0
        listening = encode_memory(model, BATCH_FRAMES, longest, 160)
        encoder = model.encoder
        if cached:
            model.encoder = None
        steps = [(*step_memory(model, rows, width if cached else 160, cfg.accumulate), rows)
                 for rows in largest(drawn, (cfg.batch_frames, cfg.batch_tokens))]
        model.encoder = encoder
    held, step, rows = max(steps, key=lambda found: found[1])
    c = model.llm.config
    answering = 2 * 16 * (max(row[1] for some in drawn for row in some) + MAX_NEW_TOKENS) * 2 * c.num_hidden_layers * (
        c.num_key_value_heads * c.head_dim) * compute.itemsize
    merged = size(parts["llm"]) if cfg.lora_rank else 0
    kept = weights_size + moments - cached * size(parts["encoder"])
    stages = {"a training step": kept + step + cached * cache, "a validation": kept + max(listening, answering) + cached * cache,
              "saving": kept + merged + cached * cache}
    if cached:
        stages["the encoder cache"] = weights_size + cache + encoding
    worst = max(stages, key=stages.get)
    peak = stages[worst] + (baseline if cfg.device == "cpu" else 0)

    for name, some in parts.items():
        count = sum(p.numel() for p in some)
        learns = sum(p.numel() for p in some if p.requires_grad)
        print(f"{name}: {count / 1e6:.2f} M parameters, {learns / 1e6:.2f} M of them trained, {size(some) / GB:.3f} GB")
    print(f"memory: weights {weights_size / GB:.3f} GB, gradients {gradients / GB:.3f} GB, optimizer {moments / GB:.3f} GB")
    print(f"memory: largest batch of {len(rows)} rows, {sum(row[0] for row in rows)} frames and {sum(row[1] for row in rows)} "
          f"LLM positions: activations {held / GB:.3f} GB, with gradients and temporaries at most {step / GB:.3f} GB")
    if frames:
        print(f"memory: encoder outputs {cache / GB:.3f} GB, " + ("kept on disk and in memory" if cached else
              f"too much for --cache-gb {cfg.cache_gb:g} or the disk: the encoder runs in every step"))
    for name, amount in stages.items():
        print(f"memory: {name} {amount / GB:.3f} GB")
    there = memory_there(cfg.device)
    print(f"memory: peak {peak / GB:.3f} GB on each of {ranks} ranks, in {worst}, {baseline / GB:.3f} GB of it Python and its "
          f"libraries; {there / GB:.1f} GB are free")
    total, drawn_rows = sum(map(len, manifests)), cfg.steps * cfg.accumulate * ranks * sum(map(len, drawn)) / len(drawn)
    print(f"{cfg.steps} steps, {drawn_rows:.0f} rows drawn, {drawn_rows / total:.1f} passes over {total} rows")
    if not all(weights_there(place) for place in (cfg.encoder, cfg.llm)):
        print("the weights are not there: no step was timed")
    elif peak * int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) > there:
        raise TrainError(f"it does not fit: {peak / GB:.1f} GB are needed on each rank, {there / GB:.1f} GB are free; "
                         f"{remedies(cfg, ranks)}")
    else:
        taken, audio = timed_steps(cfg, rates, examples, pool, build, parameter_groups, on_device, cached)
        whole = sum(row[0] for some in drawn for row in some) / len(drawn) / 50  # seconds of audio in a batch
        print(f"{TIMED} steps of {audio:.0f} s of audio took {taken:.2f} s each: about "
              f"{taken / audio * whole * cfg.accumulate * cfg.steps / 3600:.2f} h for all, without validation")


def weights_there(directory):
    try:
        return bool(weight_files(Path(directory)))
    except CheckpointError:
        return False


def remedies(cfg, ranks):
    """The options that would make a run smaller."""
    some = ["--checkpointing"] * (not cfg.checkpointing) + ["a smaller --batch-frames"]
    some += ["--lora-rank 16"] * (cfg.phase == "ift" and not cfg.lora_rank) + ["--fsdp"] * (ranks > 1)
    return f"give {', '.join(some[:-1])} or {some[-1]}"


def timed_steps(cfg, rates, examples, pool, build, parameter_groups, on_device, cached):
    """Seconds of a real training step, and the seconds of audio in it, as means over some behind a first one."""
    model, *_ = build(cfg, rates)
    groups = parameter_groups(model, rates, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    batches = islice((batch for batch in (examples[{}, some] for some in pool) if "ids" in batch), TIMED + 1)
    encoder, taken = model.encoder, []
    for batch in batches:
        made, audio = on_device(batch, cfg.device), sum(batch["lengths"]) / 50
        if cached:
            model.encoder = encoder
            with torch.no_grad():
                made["features"] = encoder(made["features"], made["lengths"])
            model.encoder = None
        start = time.time()
        loss, count = model(**made)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], cfg.clip).item()
        optimizer.step()
        optimizer.zero_grad()
        taken.append((time.time() - start, audio))
    if len(taken) <= 1:
        raise TrainError("too few batches can be read to time a step; mend the manifests")
    return (sum(column) / (len(taken) - 1) for column in zip(*taken[1:]))
