"""What a run needs before it is run: python train.py --dry-run and the run's other options.

One training step, a validation's reading and the encoder cache go through the model operator by operator, on tensors
that have shapes and no memory; what they would hold is counted as they come and go. Attention is counted as on the CPU,
row by row; on CUDA, where one kernel does all rows of a training step, an encoder that is trained takes less.
"""

import os
import shutil
import time
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Examples, feature_length, render, schedule
from model import AdapterConfig, EncoderConfig, LengthAdapter, LLM, LLMConfig, SpeechEncoder, SpeechLM, adapter_length
from prepare.checkpoint import fetch, read_generation, read_json, weight_files
from prepare.encoder_cache import clips_of, fits, sizes_of, states_size
from prepare.errors import CheckpointError, TrainError
from sample import BATCH_FRAMES, MAX_NEW_TOKENS

GB = 1e9
TIMED = 3  # steps
# What a process on the CPU takes beside its tensors, as measured (python tests/bench.py plan):
LIBRARIES = 0.2e9  # bytes of kernels and threads that the libraries load as they begin to compute
SCATTERED = 0.2  # of what a step takes, what lies unused between other tensors (see memory.py)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make within it: `now`, those alive; `peak`, the most there were.
    The model's weights do not count."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:  # else a view
                    self.known.add(storage._cdata)
                    self.count(storage.nbytes())
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def freed(self, storage, size):
        self.known.discard(storage)
        self.count(-size)


def meta_parts(encoder, llm, dtype, compute_dtype, device, float32=(), **adapter):
    """SpeechLM.from_parts without weights: shapes alone, on the meta device, from the two config.json."""
    raw, directory = read_json(Path(encoder) / "config.json"), Path(llm)
    heard = EncoderConfig.from_dict(raw, Path(encoder) / "config.json")
    where = directory / "config.json"
    said = LLMConfig.from_dict(read_json(where), where, read_generation(directory))
    config = AdapterConfig.between(heard, said, **adapter)
    with torch.device("meta"):
        model = SpeechLM(SpeechEncoder(heard, compute_dtype), LengthAdapter(config, compute_dtype),
                         LLM(said, compute_dtype))
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
    """Of batches of rows (frames, positions, answer tokens) those that may need most memory; the longest row, repeated
    as often as the budgets of frames and positions allow, stands for a batch that was not seen."""
    chosen = [max(batches, key=lambda batch: sum(row[i] ** power for row in batch)) for i, power in
              ((0, 1), (0, 2), (1, 1), (2, 1))]
    longest = max((row for batch in batches for row in batch))
    chosen.append([longest] * max(1, min(budgets[0] // longest[0], budgets[1] // longest[1])))
    return list({tuple(batch): batch for batch in chosen}.values())


def step_memory(model, rows, width, accumulate):
    """Bytes that a training step holds beside weights and optimizer state: when its forward pass is done, and at most."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with Live(model) as live:
        for _ in range(min(2, accumulate)):  # the second batch finds the gradients of the first
            before, batch = live.now, fake_batch(rows, width)
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
    with Live(model) as live:
        model.encode(torch.empty(sum(lengths), width), lengths)
    return live.peak


def cache_size(cfg, model, manifests):
    """Bytes of the encoder's outputs for every recording of the manifests, and whether they will be kept."""
    clips, _ = clips_of(manifests)
    out = Path(cfg.out).resolve()
    free = shutil.disk_usage(next(path for path in (out, *out.parents) if path.exists())).free
    amount = states_size(model.encoder, sizes_of(cfg, clips))
    return amount, fits(cfg, amount, free)


def read_rows(examples, batch):
    """(frames, positions, answer tokens) of a scheduled batch's rows, by their manifests."""
    rows = []
    for m, i, turn in batch:
        row, hinted = examples.row(m, i, turn)
        seconds = examples.manifests[m].seconds(row)
        if seconds <= examples.max_seconds:
            frames = feature_length(seconds)
            ids, answer = render(row, adapter_length(frames, examples.adapter), examples.tokenizer, examples.end_id,
                                 examples.form, hinted)
            rows.append((frames, len(ids), answer))
    return rows


def stages_of(cfg, model, drawn, ranks, cache, cached):
    """The bytes that each stage of a run holds beside Python: {name: bytes}; of its largest batch the bytes held after
    the forward pass, those held at most, and the rows."""
    trained, c = [p for p in model.parameters() if p.requires_grad], model.llm.config
    weights, encoder, dtype = size(model.parameters()), model.encoder, model.llm.compute_dtype
    kept = weights + 8 * sum(p.numel() for p in trained)  # AdamW's two moments, float32
    longest, positions = (max(row[i] for rows in drawn for row in rows) for i in (0, 1))
    stages, width = {}, 160
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if cached:
            stages["the encoder cache"] = weights + cache + encode_memory(model, cfg.batch_frames, longest, width)
            kept, width, model.encoder = kept + cache - size(encoder.parameters()), encoder.config.hidden_size, None
        listening = encode_memory(model, BATCH_FRAMES, longest, width)
        held, step, rows = max(((*step_memory(model, rows, width, cfg.accumulate), rows)
                                for rows in largest(drawn, (cfg.batch_frames, cfg.batch_tokens))),
                               key=lambda found: found[1])
        model.encoder = encoder
    step += SCATTERED * step * (cfg.device == "cpu")
    whole = 0
    if cfg.fsdp:  # a share of everything, and the parts or, to validate, the whole in the compute dtype
        layers = {p for part in (encoder.encoder.layers, model.llm.model.layers) for p in part.parameters()}
        kept, step = kept / ranks, step - size(trained) * (1 - 1 / ranks)
        step += dtype.itemsize * sum(p.numel() for p in model.parameters() if p not in layers)
        whole = dtype.itemsize * sum(p.numel() for p in model.parameters())
    else:
        step += size(trained) * (ranks > 1)  # what is sent to the other ranks is a copy of the gradients
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * dtype.itemsize  # its keys and values
    answering = 2 * min(16, cfg.eval_clips) * (positions + MAX_NEW_TOKENS) * token  # read and copied for the answers
    stages["a training step"] = kept + step
    stages["a validation"] = kept + whole + max(listening, answering)
    stages["saving"] = kept + sum(layer.weight.nbytes for layer in model.llm.modules()
                                  if getattr(layer, "lora_b", None) is not None)  # merged
    return stages, held, step, rows


def dry_run(cfg, rates, opened, build, parameter_groups, on_device):
    """Prints what a run would need and, if its weights are there, how long it would take. cfg: a settled TrainConfig;
    rates: the learning rates of its trained parts; opened: what open_manifests gives; the rest are functions of train.py.
    Raises CheckpointError, and TrainError if the run would not fit into memory."""
    if not os.path.exists("/proc/self/statm"):
        raise TrainError("--dry-run reads /proc, which only Linux has; run it there")
    manifests, weights, dev, *_ = opened
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    cfg = replace(cfg, encoder=str(fetch(cfg.encoder, weights=False)), llm=str(fetch(cfg.llm, weights=False)))
    model, tokenizer, _ = build(cfg, rates, meta=True)
    examples = Examples([*manifests, dev], tokenizer, model.llm.config.eos_token_id[0], model.adapter.config,
                        cfg.prompt, cfg.length_hint, cfg.max_seconds, seed=cfg.seed)
    pool = []
    for position, batch in schedule(manifests, weights, examples.size, cfg.batch_frames, cfg.batch_tokens, cfg.seed):
        pool.append(batch)
        if position["pool"]:
            break
    drawn = [rows for rows in (read_rows(examples, batch) for batch in pool) if rows]
    if not drawn:
        raise TrainError(f"no row is as short as --max-seconds {cfg.max_seconds:g}; raise it")
    for name, part in model.named_children():
        count = sum(p.numel() for p in part.parameters())
        learned = sum(p.numel() for p in part.parameters() if p.requires_grad)
        print(f"{name}: {count / 1e6:.2f} M parameters, {learned / 1e6:.2f} M trained, "
              f"{size(part.parameters()) / GB:.3f} GB")
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"weights {size(model.parameters()) / GB:.3f} GB, gradients {size(trained) / GB:.3f} GB, optimizer "
          f"{8 * sum(p.numel() for p in trained) / GB:.3f} GB")
    cache, cached = 0, False
    if "encoder" not in rates and cfg.cache_gb:
        cache, cached = cache_size(cfg, model, examples.manifests)
        print(f"encoder outputs {cache / GB:.3f} GB, " + ("computed once" if cached else "too much for --cache-gb "
              f"{cfg.cache_gb:g} or the disk: the encoder runs in every step"))
    baseline = memory_now() + LIBRARIES if cfg.device == "cpu" else 0
    stages, held, step, rows = stages_of(cfg, model, drawn, ranks, cache, cached)
    frames, positions, _ = map(sum, zip(*rows))
    print(f"largest batch: {len(rows)} rows, {frames} frames, {positions} LLM positions; activations {held / GB:.3f} "
          f"GB, with gradients and temporaries {step / GB:.3f} GB")
    for name, amount in stages.items():
        print(f"memory in {name}: {(baseline + amount) / GB:.3f} GB")
    peak, there = baseline + max(stages.values()), memory_there(cfg.device)
    print(f"peak {peak / GB:.3f} GB on each of {ranks} ranks, in {max(stages, key=stages.get)}"
          + f", {baseline / GB:.3f} GB of it Python and libraries" * bool(baseline) + f"; {there / GB:.1f} GB are free")
    count = cfg.steps * cfg.accumulate * ranks * sum(map(len, drawn)) / len(drawn)
    total = sum(map(len, manifests))
    print(f"{cfg.steps} steps: {count:.0f} rows drawn, {count / total:.1f} passes over the {total}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if cfg.device == "cpu" else 1
    if here * peak > there:
        raise TrainError(f"it does not fit: {here} x {peak / GB:.1f} GB are needed, {there / GB:.1f} GB are free; "
                         f"{remedies(cfg, ranks)}")
    if not weights_there(cfg.encoder) or not weights_there(cfg.llm):
        print("no step was timed: the weights are not there")
        return
    taken, audio = timed_steps(cfg, rates, examples, pool, build, parameter_groups, on_device, cached)
    batch = sum(row[0] for rows in drawn for row in rows) / 50 / len(drawn)  # seconds of audio
    hours = taken / audio * batch * cfg.accumulate * cfg.steps / 3600
    print(f"{TIMED} steps of {audio:.0f} s of audio took {taken:.2f} s each: about {hours:.2f} h in all, without validation")


def weights_there(directory):
    try:
        return bool(weight_files(Path(directory)))
    except CheckpointError:
        return False


def remedies(cfg, ranks):
    """The options that would make a run smaller."""
    some = ["--checkpointing"] * (not cfg.checkpointing) + ["a smaller --batch-frames"]
    some += ["--lora-rank 16"] * (cfg.phase == "ift" and not cfg.lora_rank) + ["--fsdp"] * (ranks > 1 and not cfg.fsdp)
    return f"give {', '.join(some[:-1])} or {some[-1]}"


def timed_steps(cfg, rates, examples, pool, build, parameter_groups, on_device, cached):
    """Seconds of a real training step, and the seconds of audio in it, as means over some behind a first one; on CUDA, where
    layers are compiled for what they meet, behind a first time through them all."""
    model, *_ = build(cfg, rates)
    groups = parameter_groups(model, rates, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    read = (examples[{}, some] for some in pool * (TIMED + 1))
    batches = list(islice((batch for batch in read if batch["rows"]), TIMED + 1))
    before, timed = batches if cfg.device != "cpu" else batches[:1], batches[1:]
    encoder, taken = model.encoder, []
    for batch in before + timed:
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
    if not timed:
        raise TrainError("no step was timed: no recording of the first batches can be used; run prepare.doctor")
    return (sum(column) / len(timed) for column in zip(*taken[len(before):]))
