"""Training, both phases: python train.py --phase align, then
python train.py --phase ift --init out/align.pt

One config, one table of phases, one loop. python train.py --help lists every option.
"""

import argparse
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import IO, get_args

# Idle threads spin only briefly, see tests/bench/README.md. Large tensors stand on pages of 2 MB,
# as many small ones take longer to get than to fill. Both count only before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the long imports at once

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import data
from eval import json_line, refusal_threshold, validation_scores
from model import (
    DEMO,
    LLM,
    AdapterConfig,
    Kernels,
    SpeechLM,
    UserError,
    add_lora,
    call_layer,
    default_kernels,
    depthwise,
    encoder_class,
    fast_dtype,
    fetch,
    fingerprint,
    first_line,
    is_exported,
    is_update,
    keep_freed_memory,
    load_checkpoint,
    load_tokenizer,
    one_line_errors,
    pick_device,
    restore,
    steady_output,
    visible,
)
from sample import Answer, answer_examples, encode_recordings

LINEAR = {  # layers that low-rank updates can be added to, by part
    "llm": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
    "encoder": "linear_q linear_k linear_v linear_out intermediate_dense output_dense".split(),
}
LINEAR["encoder"] += "out_proj fc1 fc2".split()  # Whisper's, beside those called as the LLM's

# Opus of 48 kHz needs twelve cores to feed a GPU, others up to five, see tests/bench/README.md.
GPUS = torch.cuda.device_count()
LOADERS = max(1, min(12, os.cpu_count() // GPUS)) if GPUS else 2

# --- The configuration, and the phases


def option(default, help: str, low: float = 0, high: float = math.inf, choices: str = ""):
    """A field of TrainConfig with its help text and the values that it may have."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices.split() or None}
    return field(default_factory=lambda: default, metadata=metadata)


@dataclass
class TrainConfig:
    """Every option of a run. None stands for the phase's own value."""

    phase: str = option("align", "The row of the table of phases to run.", choices="align ift")
    init: str = option("", "Start from this checkpoint of an earlier phase.")
    out: str = option("out", "Directory of checkpoints, log and picture.")
    resume: bool = option(False, "Go on where the last run of this phase stopped.")
    dry_run: bool = option(False, "Measure three steps of the largest batches, and leave nothing.")
    show_batch: bool = option(False, "Print the first batch as it is read; leave nothing.")
    seed: int = option(0, "Seed of everything random.")
    log: str = option("", "Show the log there, too.", choices="tensorboard wandb")

    encoder: str = option(str(DEMO / "encoder"), "w2v-BERT 2.0 or Whisper, directory or Hub id.")
    llm: str = option(str(DEMO / "llm"), "Qwen2.5, Qwen3 or Llama, directory or Hub id.")
    prompt: str = option("auto", "auto is chat for instruct models.", choices="auto plain chat")
    adapter_layers: int = option(2, "Layers of the adapter; each divides the frame rate.", low=1)
    adapter_kernel: int = option(3, "Frames that its convolutions read.", low=1)
    adapter_stride: int = option(2, "By what each layer divides the frame rate.", low=1)

    data: list[str] = option([str(DEMO / "train.jsonl")], "Manifests; PATH=2 counts double.")
    dev: str = option(str(DEMO / "dev.jsonl"), "Manifest for validation.")
    allow_licence: list[str] = option([], "Accept data of these licences, too (SPDX).")
    temperature: float = option(1.0, "A task and language is drawn by rows ** (1 / this).", low=1)
    max_seconds: float = option(30.0, "Longer recordings are left out and counted.", low=1)
    augment: float = option(0.5, "Share of recordings with noise, echo and the like.", high=1)
    silence: float = option(0.03, "Share of rows in whose recording nobody speaks.", high=1)

    steps: int | None = option(None, "Optimizer steps.", low=1)
    epochs: float | None = option(None, "Passes over the data, in place of --steps.", low=1e-3)
    warmup: int | None = option(None, "Steps of rising learning rate.")
    warm_start: int = option(0, "First steps of phase align in which the LLM has no part, by CTC.")
    adapter_lr: float | None = option(None, "Learning rate of the adapter; 0 freezes a part.")
    encoder_lr: float | None = option(None, "That of the encoder, in a phase that trains it.")
    llm_lr: float | None = option(None, "That of the LLM, in a phase that trains it.")
    min_lr: float = option(0.1, "The cosine ends at this share of the learning rate.", high=1)
    weight_decay: float = option(0.01, "Of matrices; norms and biases have none.")
    clip: float = option(1.0, "Largest gradient norm.", low=1e-9)
    average: int = option(1, "The result is the mean of so many validated checkpoints.", low=1)
    lora_rank: int = option(0, "Train low-rank updates of this rank, not whole parts; 0: none.")
    lora_alpha: float = option(32.0, "Their sum is scaled by this / rank.", low=1e-3)
    lora_targets: list[str] = option(LINEAR["llm"], "Layers of LLM and encoder that have them.")

    batch_frames: int | str | None = option(None, "20 ms frames a batch; auto: what fits.", low=1)
    batch_tokens: int = option(4000, "LLM positions in a batch.", low=1)
    accumulate: int = option(1, "Batches of each rank in a step.", low=1)
    precision: str = option("auto", "auto is bfloat16 if faster.", choices="auto float32 bfloat16")
    checkpointing: bool = option(False, "Compute activations again in the backward pass.")
    cache_gb: float = option(2.0, "Keep a frozen encoder's outputs on disk if they fit; 0: never.")
    fsdp: bool = option(False, "Split weights and optimizer among the ranks of torchrun.")
    workers: int = option(LOADERS, "Processes that read audio and compute features.")
    device: str = option(pick_device(), "Where to compute.", choices="cuda mps cpu")

    eval_every: int = option(500, "Steps between validations, each of which also saves.", low=1)
    eval_rows: int = option(200, "Rows for the validation loss.", low=2)
    eval_clips: int = option(48, "Clips of each task that are answered in a validation.")


GROUPS = {  # of --help, by the first option of each
    "phase": "run",
    "encoder": "models",
    "data": "data",
    "steps": "optimization",
    "batch_frames": "batches, speed and memory",
    "eval_every": "validation",
}
PARTS = ("adapter", "encoder", "llm")
# By phase, for LLMs of this width and above, the last for those of demo/: learning rates of PARTS,
# one of 0 is frozen; that of a part trained by low-rank updates; tasks; the values of DEFAULTS.
PHASES = {
    ("align", 1024): ((2e-4, 0, 0), 2e-4, ("asr",), (2000, 30, 3000)),
    ("align", 512): ((1e-3, 0, 0), 5e-4, ("asr",), (2000, 100, 1500)),
    ("align", 0): ((2e-3, 0, 0), 2e-3, ("asr",), (1500, 100, 1500)),
    ("ift", 1024): ((2e-4, 6e-6, 2e-5), 2e-4, data.TASKS, (4000, 50, 3000)),
    ("ift", 512): ((5e-4, 3e-5, 1e-4), 5e-4, data.TASKS, (4000, 100, 3000)),
    ("ift", 0): ((7e-4, 1e-4, 1.5e-4), 1e-3, data.TASKS, (300, 30, 3000)),
}
DEFAULTS = ("steps", "warmup", "batch_frames")

# Every other option must stay for a run to be resumed. Models and manifests are known by content,
# and --accumulate follows the number of ranks.
MAY_CHANGE = "resume dry_run show_batch log out device workers fsdp checkpointing".split()
MAY_CHANGE += ["init", "encoder", "llm", "data", "dev", "accumulate"]


def parse(argv: list[str] | None) -> TrainConfig:
    """The TrainConfig of a command line. Exits with code 2 on an unknown option or value."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    group = parser
    for f in fields(TrainConfig):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        kind = frames_or_auto if f.name == "batch_frames" else next(iter(get_args(f.type)), f.type)
        more = {"type": kind, "choices": f.metadata["choices"]}
        if f.type is bool:
            more = {"action": "store_true"}
        elif f.type == list[str]:
            more = {"nargs": "+"}
        default, text = f.default_factory(), f.metadata["help"]
        if default or default is None:
            text += f" Default: {'of the phase' if default is None else default}."
        group.add_argument("--" + f.name.replace("_", "-"), default=default, help=text, **more)
    cfg = TrainConfig(**vars(parser.parse_args(argv)))
    check(cfg, parser.error)
    return cfg


def frames_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def check(cfg: TrainConfig, refuse: Callable) -> None:
    """Refuses what is wrong with the values of a configuration."""
    for f in fields(TrainConfig):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, int | float) and not (low <= value <= high and math.isfinite(value)):
            refuse(f"--{f.name.replace('_', '-')} is {value}, expected {low} to {high}")
    for name in cfg.lora_targets:
        if name not in chain(*LINEAR.values()):
            refuse(f"--lora-targets {name}, expected some of {' '.join(chain(*LINEAR.values()))}")
    if cfg.epochs and cfg.steps:
        refuse("--epochs and --steps exclude each other")
    if cfg.warm_start and cfg.phase != "align":
        refuse("--warm-start is for --phase align")
    if cfg.batch_frames == "auto" and (cfg.device != "cuda" or cfg.fsdp):
        refuse("--batch-frames auto is for CUDA without --fsdp")
    if cfg.fsdp and "LOCAL_RANK" not in os.environ:
        refuse("--fsdp is for several ranks: torchrun --nproc_per_node=8 train.py --fsdp ...")


def resolve_phase(cfg: TrainConfig) -> tuple[TrainConfig, dict[str, float], tuple[str, ...]]:
    """The config with the phase's own numbers where it leaves them open, {part: learning rate} of
    the parts that are trained, and the tasks. Raises UserError if nothing is trained."""
    width = LLM.read_config(fetch(cfg.llm)).hidden_size
    least = max(least for _, least in PHASES if least <= width)
    usual, lora_rate, tasks, numbers = PHASES[cfg.phase, least]
    stated = {name: value for name, value in asdict(cfg).items() if value is not None}
    rates = {}
    for part, rate in zip(PARTS, usual, strict=True):
        rates[part] = stated.get(f"{part}_lr", lora_rate if has_updates(part, cfg) else rate)
    rates = {part: rate for part, rate in rates.items() if rate > 0}
    if not rates:
        raise UserError("every learning rate is 0, so nothing would be trained; leave one above 0")
    cfg = TrainConfig(**dict(zip(DEFAULTS, numbers, strict=True)) | stated)
    numbers = f"{cfg.steps} steps, warmup {cfg.warmup}, batches of {cfg.batch_frames} frames"
    print(f"preset for LLMs of width {least} and above: {numbers}")
    return cfg, rates, tasks


def has_updates(part: str, cfg: TrainConfig) -> bool:
    """Whether a part gets low-rank updates."""
    return cfg.lora_rank > 0 and not set(cfg.lora_targets).isdisjoint(LINEAR.get(part, ()))


# --- Model and optimizer


def can_compile() -> bool:
    """Whether layers can be compiled where a GPU trains. If not, that is said."""
    able = default_kernels("cuda").depthwise is not depthwise
    if not able:
        needs = "extras/cuda.py, Triton, gcc, Python's headers"
        print(f"training is not compiled: that needs {needs}", file=sys.stderr)
    return able


def training_kernels(device: str, checkpointing: bool = False, compiled: bool = False) -> Kernels:
    """default_kernels, and layers that are compiled or, with checkpointing, computed again."""
    kernels = default_kernels(device)
    call = call_layer
    if compiled:
        from torch._dynamo import config

        config.optimize_ddp = False  # which would cut the layers to pieces
        config.recompile_limit = 32  # kinds of layers, times those of batches: one row or several
        call = torch.compile(call_layer, dynamic=True)
    if checkpointing:
        call = partial(recompute, call, use_reentrant=False)

    def call_in_training(layer: nn.Module, *inputs) -> Tensor:
        # Answers have shapes of their own and would wait for the compiler.
        return (call if torch.is_grad_enabled() else call_layer)(layer, *inputs)

    return replace(kernels, call_layer=call_in_training)


def build(cfg: TrainConfig, rates: dict[str, float], adapter: dict, path="", checkpoint=None):
    """The model, as it is in the checkpoint of this path, if there is one, with float32 weights
    where it is trained; the fingerprints of its base models; and the parts that will differ from
    these by more than low-rank updates. adapter: fields of AdapterConfig. Raises UserError."""
    bases = {name: fingerprint(getattr(cfg, name)) for name in ("encoder", "llm")}
    compute = fast_dtype(fetch(cfg.llm), cfg.device)
    if cfg.precision != "auto":
        compute = getattr(torch, cfg.precision)
    # Low-rank updates leave a part's own weights alone, so these need not be float32.
    changed = {part for part in rates if not has_updates(part, cfg)}
    compiled = cfg.device == "cuda" and not cfg.fsdp and compute == torch.bfloat16 and can_compile()
    kernels = training_kernels(cfg.device, cfg.checkpointing, compiled)
    shared = (compute, compute, cfg.device, tuple(changed), kernels, cfg.prompt)
    model = SpeechLM.from_parts(cfg.encoder, cfg.llm, *shared, **adapter)
    for name, part in model.named_children():
        how = f"lr {rates[name]:g}" if name in rates else "frozen"
        part.requires_grad_(name in rates).train(name in rates)
        if name in rates and has_updates(name, cfg):
            add_lora(part, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
            how += " for low-rank updates"
        millions = sum(p.numel() for p in part.parameters()) / 1e6
        dtype = next(part.parameters()).dtype
        print(f"{name}: {millions:.2f} M parameters, {how}, {dtype} weights")
    config = model.encoder.config
    masks_frames = config.apply_spec_augment and config.mask_time_prob > 0
    if hasattr(model.encoder, "masked_spec_embed") and not masks_frames:
        # Nothing reads it, so it would wait for a gradient.
        model.encoder.masked_spec_embed.requires_grad_(False)
    if checkpoint:
        alpha = checkpoint["config"].get("lora_alpha")
        if cfg.lora_rank and any(map(is_update, checkpoint["model"])) and alpha != cfg.lora_alpha:
            raise UserError(f"{path}: has updates of --lora-alpha {alpha:g}; give the same")
        changed |= restore(model, checkpoint, bases, path)
    return model, bases, changed


def parameter_groups(model: SpeechLM, rates: dict[str, float], weight_decay: float) -> list[dict]:
    """AdamW groups: each part's matrices, and its vectors. Each trained parameter is in one."""
    groups = []
    for part, rate in rates.items():
        trained = [p for p in getattr(model, part).parameters() if p.requires_grad]
        matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay}
        vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
        groups += [matrices | {"rate": rate}, vectors | {"rate": rate}]
    return groups


def rate_share(step: int, cfg: TrainConfig) -> float:
    """Share of the learning rate: warmup, then a cosine to min_lr. A warm start has its own."""
    steps = cfg.warm_start
    if step >= cfg.warm_start:
        step, steps = step - cfg.warm_start, cfg.steps - cfg.warm_start
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, steps - cfg.warmup)
    return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def on_device(batch: dict, device: str) -> dict:
    """What SpeechLM.forward takes of a batch. Lengths stay on the host."""
    inputs = {name: batch[name] for name in ("lengths", "ids_lengths")}
    for name in ("features", "ids", "targets"):
        inputs[name] = batch[name].to(device, non_blocking=True)
    return inputs


# --- The outputs of a frozen encoder, computed once and kept on disk

ENCODE_FRAMES = 1500  # 20 ms frames that are encoded together


class CachedEncoder(nn.Module):
    """Stands in for an encoder whose outputs were computed before: the features are those."""

    def forward(self, features: Tensor, lengths: list[int]) -> Tensor:
        return features


def encoder_states(cfg: TrainConfig, encoder: nn.Module, manifests: list, base: dict):
    """Runs the frozen encoder once over the clips of the manifests, each rank over a share, into
    files that later runs find again if encoder, clips and audio are the same. Returns a function
    from a clip to its states (F, D), which may raise AudioError; None if they would not fit."""
    clips = {manifest.clip(example) for manifest in manifests for example in manifest}
    clips.update(data.SPEECHLESS_CLIPS if cfg.silence else ())
    sizes = sorted((data.feature_length(clip[2], encoder.config), 0, clip) for clip in clips)
    frames = sum(size[0] for size in sizes)
    size_gb = frames * encoder.config.hidden_size * encoder.compute_dtype.itemsize / 1e9
    free_gb = gather(shutil.disk_usage(cfg.out).free)[0] / 1e9
    print(f"encoder outputs: {frames / 180000:.2f} h, {size_gb:.2f} GB ({free_gb:.0f} GB free)")
    if size_gb > min(cfg.cache_gb, 0.9 * free_gb):
        print("they do not fit in --cache-gb or on the disk: the encoder runs in every step")
        return None

    # The files are named by all that their contents depend on.
    stamps = sorted({file_stamp(clip[0]) for clip in clips})
    key = [base["sha256"], str(encoder.compute_dtype), stamps, sizes]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    paths = [Path(cfg.out, f"encoder-{name}-{r + 1}-of-{world()}.pt") for r in range(world())]
    if not all(gather(paths[rank()].exists())):
        states = encode_clips(cfg, encoder, sizes)
        data.write_atomically(paths[rank()], partial(torch.save, states))
        gather("written")
    states = {}
    for path in paths:
        with one_line_errors(path, "it is damaged: remove it"):
            states |= torch.load(path, weights_only=True, mmap=True)

    def states_of(clip: tuple) -> Tensor:
        value = states[clip]
        if isinstance(value, str):
            raise data.AudioError(value)
        return value  # (F, D)

    return states_of


def file_stamp(path: str) -> tuple:
    """What tells whether the file, or the tar, of a clip is still the same."""
    shard, tar, _ = path.partition(".tar/")
    name = shard + tar.rstrip("/")
    status = os.stat(name) if os.path.exists(name) else None
    return name, status and status.st_size, status and status.st_mtime_ns


@torch.no_grad()
def encode_clips(cfg: TrainConfig, encoder: nn.Module, sizes: list[tuple]) -> dict:
    """States (F, D) of this rank's share of (frames, 0, clip) by clip, or why there are none."""
    states = {}
    batches = data.cut_batches(sizes, ENCODE_FRAMES, math.inf)[rank() :: world()]
    for batch in tqdm(batches, "encoder", unit=" batches", disable=rank() > 0):
        waves = {}
        for clip in batch:
            try:
                waves[clip] = data.load_clip(clip)
            except data.AudioError as error:
                states[clip] = str(error)
        if waves:
            features, lengths = data.extract_features(list(waves.values()), encoder.config)
            outputs = encoder(features.to(cfg.device), lengths).split(lengths)
            for clip, output in zip(waves, outputs, strict=True):
                states[clip] = output.cpu().clone()
    return states


# --- Several processes, the ranks, which torchrun starts: on a GPU each, or on the CPU. Without
# torchrun there is one rank and no process group, and every function here does the plain thing.

TORCHRUN = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# By torchrun or Kubernetes, by Slurm's srun, and by kinds of mpirun.
NUMBERS_OF_PROCESSES = "WORLD_SIZE SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE PMI_SIZE".split()
RANK_TIMEOUT = timedelta(minutes=30)  # the longest wait is for rank 0 to write a checkpoint


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(device: str) -> None:
    """Joins the other ranks. Rank 0 alone prints from here on. Raises UserError."""
    missing = [name for name in TORCHRUN if not os.environ.get(name)]
    alone = all(os.environ.get(name) in (None, "", "1") for name in NUMBERS_OF_PROCESSES)
    if dist.is_initialized() or (alone and "LOCAL_RANK" in missing):
        return
    with one_line_errors("environment of several processes", "start by torchrun, or unset it"):
        if missing:
            raise ValueError(f"has no {', '.join(missing)}")
        local, number, size = (int(os.environ[name]) for name in TORCHRUN[:3])
        if not 0 <= number < size or not 0 < int(os.environ["MASTER_PORT"]) < 2**16:
            raise ValueError(f"RANK {number} of WORLD_SIZE {size}, or an impossible MASTER_PORT")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        with one_line_errors(f"GPU {local} of {gpus}", f"give --nproc_per_node={gpus}"):
            torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=RANK_TIMEOUT)
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def gather(value) -> list:
    """The values of all ranks, in their order. Every rank must take part."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def distribute(model: SpeechLM, cfg: TrainConfig) -> nn.Module:
    """The module to call in training: the model, a DistributedDataParallel of it, or with --fsdp an
    FSDP2 module, whose layers are gathered in the compute dtype. Gradients are float32 means."""
    if not dist.is_initialized():
        return model
    if not cfg.fsdp:
        # The steps of a warm start do not use what is trained of the LLM.
        options = {"find_unused_parameters": cfg.warm_start > 0}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(model.llm.compute_dtype, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(cfg.device, (world(),))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for module in [*chain(*lists), model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, every rank has all of a sharded model, and can call it without the other ranks."""
    shards = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def complete(tensor: Tensor) -> Tensor | None:
    """All of a tensor, of a sharded one on rank 0 and its CPU. Every rank must take part."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if rank() == 0 else None


def like(p: Tensor, tensor: Tensor) -> Tensor:
    """This rank's share of a tensor that all ranks have, split as the parameter p is."""
    if not hasattr(p, "full_tensor") or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def seed_for(seed: int, position: dict) -> None:
    """Makes dropout and masks of a batch the same on any rank and after any pause."""
    sequence = np.random.SeedSequence([seed, position["pool"], position["batch"]])
    torch.manual_seed(int(sequence.generate_state(1)[0]))


# --- Signals, and loader processes

LOADER_SECONDS = 600  # a loader may take so long for one batch
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """How a run answers SIGNALS: `with Stop() as stop`. The first is noted, and raises
    KeyboardInterrupt unless `waits` is true; the second ends the process there and then."""

    def __init__(self):
        self.signal, self.waits = None, False

    def __enter__(self) -> "Stop":
        self.before = [signal.signal(number, self.note) for number in SIGNALS]
        return self

    def __exit__(self, *_):
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises an error
        for process in multiprocessing.active_children():  # loaders, which know no other signal
            process.kill()
            process.join()
        signal.signal(signal.SIGCHLD, handler)
        for number, handler in zip(SIGNALS, self.before, strict=True):
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.waits:
            raise KeyboardInterrupt
        # print must not be entered twice, and nobody may be there to read it.
        with suppress(OSError):
            os.write(2, b"\ntrain.py: stopping after this step; a second signal stops at once\n")


def ignore_signals(_) -> None:
    """For loader processes: a terminal signals them, too, but the run decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# --- A run, and what is saved of it


@dataclass
class RunState:
    """How far a run is."""

    step: int = 0
    position: dict | None = None  # in the schedule, behind the last batch
    seen: int = 0  # examples drawn
    bad: dict = field(default_factory=dict)  # why recordings could not be used, by file and line
    validated: int = -1  # the step of the last validation
    skipped: int = 0  # steps just left out in a row
    averaged: list = field(default_factory=list)  # steps of checkpoints to be averaged in the end


@dataclass
class Run:
    """What the loop works with."""

    cfg: TrainConfig
    rates: dict[str, float]
    tasks: tuple[str, ...]
    mixture: data.Mixture
    model: SpeechLM
    bases: dict[str, dict]
    changed: set[str]  # parts whose weights will not be those of the bases; all of them is saved
    examples: data.Examples
    size: Callable  # of an example, see data.Examples.size
    lock: IO | None  # see lock_directory
    net: nn.Module | None = None  # the model as it is called in training
    optimizer: torch.optim.Optimizer | None = None
    state: RunState = field(default_factory=RunState)
    log: Callable | None = None  # see open_log

    @property
    def warm_start(self) -> bool:
        """Whether the next step is one of the warm start."""
        return self.state.step < self.cfg.warm_start

    def path(self, ending: str) -> Path:
        return Path(self.cfg.out) / f"{self.cfg.phase}{ending}"

    def record(self, ending: str, *lines: dict) -> None:
        """Appends lines to a log, on rank 0."""
        if rank() == 0:
            with open(self.path(ending), "a", encoding="utf-8") as file:
                file.writelines(json_line(line) for line in lines)
        if self.log and ending == ".jsonl":
            for line in lines:
                self.log(line)


def open_run(cfg: TrainConfig) -> Run:
    """Everything that a run needs, as it was saved or new. Raises UserError."""
    if cfg.init and is_exported(cfg.init):
        cfg = replace(cfg, encoder=cfg.init, llm=cfg.init)  # it has both base models
    cfg, rates, tasks = resolve_phase(cfg)
    torch.manual_seed(cfg.seed)
    leaves_files = not (cfg.dry_run or cfg.show_batch)
    lock = lock_directory(cfg.out) if leaves_files else None

    # A run begins with what it saved, with another run's result, or with the base models.
    if cfg.init and Path(cfg.init).resolve() == Path(cfg.out, f"{cfg.phase}.pt").resolve():
        raise UserError(f"{cfg.init} is what this run would replace; give another --out")
    path = Path(cfg.out, f"{cfg.phase}.resume.pt")
    resumed = gather(cfg.resume and path.exists())[0]
    if cfg.resume and not resumed:
        print(f"{path}: not there, so the run starts from its beginning")
    path = path if resumed else cfg.init
    checkpoint = load_checkpoint(path) if path else {}
    adapter = checkpoint.get("adapter") or {
        "num_adapter_layers": cfg.adapter_layers,
        "adapter_kernel_size": cfg.adapter_kernel,
        "adapter_stride": cfg.adapter_stride,
    }

    encoder_config = encoder_class(cfg.encoder).read_config(fetch(cfg.encoder))
    longest = encoder_config.max_source_positions / 50 or math.inf
    if cfg.max_seconds > longest:
        raise UserError(f"--max-seconds {cfg.max_seconds:g}: the encoder takes up to {longest:g} s")
    directory = fetch(cfg.llm)
    tokenizer, llm_config = load_tokenizer(directory), LLM.read_config(directory)
    if cfg.prompt == "auto" and checkpoint:
        cfg.prompt = checkpoint["config"].get("prompt", "plain")
    prompt = data.make_prompt(tokenizer, llm_config.eos_token_id, cfg.prompt)
    cfg.prompt = prompt.kind
    room = min(cfg.batch_tokens, llm_config.max_position_embeddings)
    adapter_config = AdapterConfig.between(encoder_config, llm_config, **adapter)
    limits = {"adapter": adapter_config, "max_seconds": cfg.max_seconds, "room": room}
    excess = partial(data.find_excess, tokenizer=tokenizer, prompt=prompt, **limits)
    allowed = tuple(cfg.allow_licence)
    mixture = data.open_mixture(cfg.data, cfg.dev, tasks, allowed, cfg.temperature, excess)
    if resumed:
        cfg = resumed_config(cfg, path, checkpoint, mixture.contents)
    model, bases, changed = build(cfg, rates, adapter, path, checkpoint)
    manifests, states = [*mixture.manifests, mixture.dev], None
    if "encoder" not in rates.keys() | changed and cfg.cache_gb and leaves_files:
        states = encoder_states(cfg, model.encoder, manifests, bases["encoder"])
    if states is not None:
        model = SpeechLM(CachedEncoder(), model.adapter, model.llm, model.prompt)
    inputs = manifests, tokenizer, prompt, model.adapter.config, states
    examples = data.Examples(*inputs, cfg.seed, (cfg.augment, cfg.silence))
    hours = data.merge_hours(checkpoint.get("data", []), mixture.hours)
    mixture = mixture._replace(hours=hours)  # of this phase and those before
    size = lru_cache(2 * data.POOL)(examples.size)
    run = Run(cfg, rates, tasks, mixture, model, bases, changed, examples, size, lock)
    start(run, checkpoint if resumed else None)
    return run


def lock_directory(path: str) -> IO | None:
    """Makes the out directory. Returns a file that keeps other runs from it while it is open, on
    rank 0 and where the file system has locks. Raises UserError if another run has it."""
    Path(path).mkdir(parents=True, exist_ok=True)
    if rank() > 0:
        return None
    lock = open(Path(path) / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError | PermissionError):
            raise UserError(f"{path}: another run writes there; give another --out") from None
    return lock


def start(run: Run, resumed: dict | None) -> None:
    """Brings a run and its files to where it was stopped, or to its beginning. Raises UserError."""
    cfg = run.cfg
    if cfg.batch_frames == "auto":
        fitting = rank() or import_plan().fit_batches(run, run_schedule, on_device)
        run.cfg = cfg = gather(fitting)[0]
    if cfg.epochs and not resumed:
        run.cfg = cfg = replace(cfg, steps=max(1, round(cfg.epochs * steps_of_a_pass(run))))
        print(f"{cfg.steps} steps are {cfg.epochs:g} passes over the data")
    if resumed:
        run.state = RunState(**resumed["state"])
    elif not cfg.init:
        start_adapter(run)
    run.net = distribute(run.model, cfg)
    groups = parameter_groups(run.model, run.rates, cfg.weight_decay)
    run.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=cfg.device != "mps")
    if resumed:
        for name, p in run.model.named_parameters():
            for key, tensor in resumed["optimizer"].get(name, {}).items():
                run.optimizer.state[p][key] = like(p, tensor)
        run.optimizer.load_state_dict(run.optimizer.state_dict())  # puts each on its device
    if not run.lock:
        return

    # The logs keep their lines up to where the run goes on; files of another run go.
    for path in (run.path(".jsonl"), run.path(".nonfinite.jsonl")):
        lines = [x for x in data.read_lines(path) if resumed and x["step"] <= run.state.step]
        if path.exists():
            data.write_text(path, "".join(map(json_line, lines)))
    data.write_text(Path(cfg.out) / "config.json", json.dumps(asdict(cfg), indent=2))
    if not resumed and run.path(".resume.pt").exists():
        os.replace(run.path(".resume.pt"), run.path(".resume.old.pt"))


@torch.no_grad()
def start_adapter(run: Run) -> None:
    """Scales a new adapter by the first usable batch: its output spreads like LLM embeddings."""
    for scheduled in islice(run_schedule(run), 100):
        batch = run.examples[scheduled]
        if batch["examples"]:
            seed_for(run.cfg.seed, batch["position"])
            audio, _ = run.model.encode(batch["features"].to(run.cfg.device), batch["lengths"])
            embeddings = run.model.llm.model.embed_tokens.weight
            factor = embeddings.float().std() / audio.float().std()
            for p in run.model.adapter.enc_to_dec_proj.parameters():
                p.mul_(factor)
            return


def steps_of_a_pass(run: Run) -> float:
    """In how many steps as many examples are drawn as there are, by the first batches."""
    batches = [len(batch) for _, batch in islice(run_schedule(run), 200)]
    rows = sum(batches) / len(batches) * run.cfg.accumulate * world()
    return sum(map(len, run.mixture.manifests)) / rows


def run_schedule(run: Run) -> Iterator[tuple[dict, list]]:
    """All batches from where the run is."""
    cfg, mixture, position = run.cfg, run.mixture, run.state.position
    budgets = cfg.batch_frames, cfg.batch_tokens
    return data.schedule(mixture.manifests, mixture.weights, run.size, *budgets, cfg.seed, position)


def open_loader(run: Run) -> Iterator[dict]:
    """This rank's batches, made by worker processes."""
    workers = 0 if run.examples.states else run.cfg.workers
    # What each sends, two batches of float32, stands there twice, and containers have little of it.
    needed = 16 * run.cfg.batch_frames * run.model.adapter.config.feature_projection_input_dim
    room = shutil.disk_usage("/dev/shm").free // needed if os.path.isdir("/dev/shm") else workers
    if room < workers:
        workers = room
        print(f"/dev/shm has room for {workers} workers only: docker run --shm-size=1g gives more")
    turns = islice(run_schedule(run), rank(), None, world())  # the ranks take turns
    options = {"num_workers": workers, "pin_memory": run.cfg.device == "cuda"}
    options |= {"worker_init_fn": ignore_signals, "timeout": LOADER_SECONDS if workers else 0}
    loader = torch.utils.data.DataLoader(run.examples, batch_size=None, sampler=turns, **options)
    return iter(loader)


def save(run: Run, **thresholds) -> None:
    """Writes the checkpoint and what the run can be resumed from. Every rank must take part. A run
    that was stopped before its first validation leaves the result of an earlier one."""
    weights, moments = {}, {}
    for name, p in run.model.named_parameters():
        if name.split(".")[0] in run.changed or is_update(name):
            weights[name] = complete(p.detach())
        if p in run.optimizer.state:
            moments[name] = {key: complete(x) for key, x in run.optimizer.state[p].items()}
    if rank() > 0:
        return
    checkpoint = {
        "model": weights,
        "config": asdict(run.cfg),
        "adapter": asdict(run.model.adapter.config),
        "bases": run.bases,
        "data": run.mixture.hours,
        "contents": run.mixture.contents,
        "window": min(30.0, max(1.0, run.mixture.longest)),
        "step": run.state.step,
        "versions": {"torch": str(torch.__version__), "python": sys.version},
        **thresholds,
    }
    state = run.state
    if state.validated > 0:
        data.write_atomically(run.path(".pt"), partial(torch.save, checkpoint))
        data.write_text(run.path(".NOTICE"), data.notice(run.mixture.hours))
    if run.cfg.average > 1 and 0 < state.validated == state.step < run.cfg.steps:
        shutil.copyfile(run.path(".pt"), run.path(f".{state.step}.pt"))
        state.averaged.append(state.step)
        if len(state.averaged) == run.cfg.average:
            run.path(f".{state.averaged.pop(0)}.pt").unlink(missing_ok=True)
    resume = {"optimizer": moments, "state": asdict(state)}
    resume["batches_a_step"] = run.cfg.accumulate * world()
    data.write_atomically(run.path(".resume.pt"), partial(torch.save, checkpoint | resume))


def resumed_config(cfg: TrainConfig, path: Path, resumed: dict, contents: list) -> TrainConfig:
    """The config of a run that goes on, with what it found out when it began. Raises UserError if
    it is not the run that was saved: of another configuration or manifests with other content."""
    complete_file = {"state", "contents"} <= resumed.keys()
    if not complete_file or resumed["config"].keys() != asdict(cfg).keys():
        raise UserError(f"{path}: is of an older version; start anew without --resume")
    automatic = cfg.batch_frames == "auto"
    names = ["steps"] * bool(cfg.epochs) + ["batch_frames", "batch_tokens"] * automatic
    cfg = replace(cfg, **{name: resumed["config"][name] for name in names})
    config = asdict(cfg) | {"accumulate * ranks": cfg.accumulate * world()}
    expected = resumed["config"] | {"accumulate * ranks": resumed["batches_a_step"]}
    changes = []
    for name, value in expected.items():
        if name not in MAY_CHANGE and config.get(name) != value:
            changes.append(f"{name} {value!r}, found {config.get(name)!r}")
    pairs = zip_longest(resumed["contents"], contents, fillvalue=("no manifest", 0, "", 0))
    for (before, rows, *content), (now, rows_now, *content_now) in pairs:
        if content != content_now:
            other = f"{now} of {rows_now} rows and other content or weight"
            changes.append(f"{before} of {rows} rows, found {other}")
    if changes:
        remedy = "give the same, or start anew without --resume"
        raise UserError(f"{path}: was trained with {changes[0]}; {remedy}")
    return cfg


# --- Validation


@torch.no_grad()
def validate(run: Run) -> tuple[dict[str, float], list[tuple[dict, str]], dict[str, float]]:
    """Loss on some rows of the dev manifest, the loss when every row hears another row's audio, and
    the scores of answering the first rows of each task, or in a warm start of what CTC reads there.
    Returns figures, (example, answer) pairs, and in the end refusal_threshold. Raises UserError."""
    cfg, model, examples = run.cfg, run.model, run.examples
    rows, frames = dev_examples(run, run.tasks, cfg.eval_rows)
    if len(rows) < 2:
        raise UserError(f"{cfg.dev}: {len(rows)} recordings can be used, expected 2; mend them")
    model.eval()
    figures = {"dev_loss": mean_loss(run, rows, frames)}
    figures["shuffled_loss"] = mean_loss(run, rows, frames[1:] + frames[:1])
    answered = []
    for task in data.TASKS:
        of_task = [i for i, example in enumerate(rows) if example["task"] == task]
        answered += of_task[: cfg.eval_clips]
    recordings = encode_recordings(model, [[frames[i]] for i in answered])
    asked = [rows[i] for i in answered]
    if run.warm_start:
        texts = [examples.tokenizer.decode(model.spell(audio)) for (audio,) in recordings]
        answers = [Answer(text.strip()) for text in texts]
    else:
        answers = answer_examples(model, examples.tokenizer, asked, recordings)
    pairs = []
    for example, answer in zip(asked, answers, strict=True):
        if not isinstance(answer, data.AudioError):
            pairs.append((example, answer.text))
    threshold = {}
    if run.state.step == cfg.steps and "sqa" in run.tasks:
        questions, frames = dev_examples(run, ("sqa",), 500)
        recordings = encode_recordings(model, [[x] for x in frames])
        answers = answer_examples(model, examples.tokenizer, questions, recordings, weigh=True)
        threshold = refusal_threshold(questions, answers)
    for name, part in model.named_children():
        part.train(name in run.rates)
    return figures | validation_scores(pairs), pairs, threshold


def dev_examples(run: Run, tasks: tuple[str, ...], count: int) -> tuple[list[dict], list[Tensor]]:
    """Up to `count` usable examples of these tasks of dev, always the same, and their frames."""
    dev, chosen, frames = run.mixture.dev, [], []
    order = np.random.default_rng(0).permutation(len(dev)).tolist()
    for example in (dev[i] for i in order):
        if len(chosen) == count:
            break
        if example["task"] not in tasks:
            continue
        try:
            frames.append(run.examples.frames(-1, example))  # the last manifest is dev
            chosen.append(example)
        except data.AudioError as error:
            tqdm.write(f"validation leaves out {example['where']}: {error}")
    return chosen, frames


def mean_loss(run: Run, rows: list[dict], frames: list[Tensor]) -> float:
    """The loss per target token of rows that hear these frames."""
    sequences = [run.examples.sequence(row, x) for row, x in zip(rows, frames, strict=True)]
    sequences.sort(key=lambda sequence: len(sequence[2]))
    sizes = [(len(sequence[2]), len(sequence[0]), sequence) for sequence in sequences]
    total, count = 0.0, 0
    for batch in data.cut_batches(sizes, run.cfg.batch_frames, run.cfg.batch_tokens):
        inputs = on_device(data.collate(batch), run.cfg.device)
        loss, tokens = run.model(**inputs, warm_start=run.warm_start)
        total += loss.item()
        count += tokens
    return total / count


# --- The loop

NONFINITE_STEPS = 5  # so many in a row end a run
LOWER_RATE = "the last checkpoint is untouched: lower the learning rate or leave such rows out"


def next_step(run: Run, loader: Iterator[dict]) -> tuple[list[dict], int, float]:
    """This rank's batches of the next step that has a usable row, and all ranks' target tokens and
    seconds of audio. Their draws go into the state. Raises UserError if too much is unusable."""
    state, rows = run.state, sum(map(len, run.mixture.manifests))
    for _ in range(100):
        batches = [next(loader) for _ in range(run.cfg.accumulate)]
        drawn = []
        for batch in batches:
            frames = sum(batch["lengths"]) if batch["examples"] else 0
            count = len(batch["examples"]) + len(batch["bad"])
            drawn.append((batch["position"], count, batch["bad"], len(batch["targets"]), frames))
        tokens = audio = 0
        for position, count, bad, targets, frames in chain(*gather(drawn)):
            state.position = position  # the ranks take turns, so that the last one is the furthest
            state.seen += count
            state.bad |= dict(bad)
            tokens += targets
            audio += frames
        met = min(state.seen, rows)  # different recordings
        if len(state.bad) > 0.01 * max(met, 300):
            break
        if tokens:
            return batches, tokens, audio / 50
    why = "; ".join(f"{where}: {reason}" for where, reason in list(state.bad.items())[-3:])
    raise UserError(f"{len(state.bad)} of {met} recordings could not be used, more than 1 %: {why}")


def backward(run: Run, batches: list[dict], tokens: int) -> tuple[Tensor, Tensor]:
    """Gradients of a step: the summed loss over the target tokens of all batches, on all ranks.
    Returns the step's loss, and the norm of the gradients, which are clipped, on the device."""
    losses = []
    for batch in batches:
        seed_for(run.cfg.seed, batch["position"])
        # The ranks' gradients are brought together after the last batch alone, and averaged.
        last = batch is batches[-1]
        if run.cfg.fsdp:
            run.net.set_requires_gradient_sync(last)
        separate = isinstance(run.net, DistributedDataParallel) and not last
        with run.net.no_sync() if separate else nullcontext():
            part, _ = run.net(**on_device(batch, run.cfg.device), warm_start=run.warm_start)
            (part * world() / tokens).backward()
        losses.append(part.detach())
    loss = torch.stack(losses).sum() / tokens
    if world() > 1:
        dist.all_reduce(loss)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, run.cfg.clip)
    return loss, norm.full_tensor() if run.cfg.fsdp else norm


def update(run: Run, loss: Tensor, norm: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A step of the optimizer on the gradients, which it passes over if loss or norm is not finite.
    Returns these two on the host, and on CUDA what tells when they are there."""
    broken = ~(loss + norm).isfinite()
    on_mps = run.cfg.device == "mps"  # whose AdamW cannot be told
    run.optimizer.found_inf = None if on_mps else broken.float()  # as torch.amp.GradScaler does
    if not (on_mps and broken):
        run.optimizer.step()
    run.optimizer.zero_grad()
    figures = torch.stack([loss, norm]).to("cpu", non_blocking=loss.is_cuda)
    return figures, torch.cuda.current_stream().record_event() if loss.is_cuda else None


def finish_step(run: Run, bar: tqdm, line: dict, batches: list[dict], figures, event) -> None:
    """Waits for the figures of a step, see update, and shows and logs them with the line. Raises
    UserError as leave_out does."""
    if event is not None:
        event.synchronize()
    loss, norm = figures.tolist()
    result = {"loss": loss, "norm": norm}
    if math.isfinite(loss) and math.isfinite(norm):
        run.state.skipped = 0
    else:
        result = leave_out(run, line["step"], batches, loss, norm)
    run.record(".jsonl", {"step": line["step"], **result, **line})
    bar.update()
    speed = line["audio"] * (bar.format_dict["rate"] or 0)
    bar.set_postfix(loss=f"{loss:.3f}", audio_s_per_s=f"{speed:.0f}")


def leave_out(run: Run, step: int, batches: list[dict], loss: float, norm: float) -> dict:
    """Writes down the rows of a step that was passed over. Returns the figures of the step; raises
    UserError when NONFINITE_STEPS in a row were like that."""
    path = run.path(".nonfinite.jsonl")
    run.state.skipped += 1
    figures = {"skipped": f"loss {loss}, gradient norm {norm}"}
    rows = chain(*gather([row for batch in batches for row in batch["examples"]]))
    run.record(".nonfinite.jsonl", *({"step": step, **figures, **row} for row in rows))
    what = f"step {step}: {figures['skipped']}"
    if run.state.skipped >= NONFINITE_STEPS:
        count = f"{run.state.skipped} steps in a row"
        raise UserError(f"{what}, as in {count}, whose rows are in {path}; {LOWER_RATE}")
    tqdm.write(f"{what}: left out, its rows are in {path}")
    return figures


def validate_and_save(run: Run, stop: Stop) -> None:
    """Validates, saves, shows some answers. --resume makes up for what a signal ends."""
    cfg, state = run.cfg, run.state
    state.averaged = gather(state.averaged)[0]  # what rank 0 has saved
    if state.step == cfg.steps and state.averaged:
        average_checkpoints(run)
    with unsharded(run.model):
        with suppress(KeyboardInterrupt):
            stop.waits = False
            figures, pairs, threshold = validate(run)
        stop.waits = True
    if any(gather(stop.signal)):
        return
    if not math.isfinite(figures["dev_loss"]):
        raise UserError(f"step {state.step}: dev_loss {figures['dev_loss']}; {LOWER_RATE}")
    state.validated = state.step
    run.record(".jsonl", {"step": state.step, **figures})
    save(run, **threshold)
    if rank() == 0:
        texts = [f"{name} {value:.3f}" for name, value in figures.items()]
        tqdm.write(f"step {state.step}: {', '.join(texts)}")
        for example, answer in pairs[:: max(1, len(pairs) // 4)][:4]:
            for name, text in (("said", example["text"]), ("read", answer)):
                tqdm.write(f"  {name}: {visible(text)[:300]}")
        if figures["shuffled_loss"] < 1.05 * figures["dev_loss"]:
            tqdm.write("the model is not listening yet: other recordings serve it as well")


@torch.no_grad()
def average_checkpoints(run: Run) -> None:
    """Makes the weights the mean of themselves and of those of the last validated checkpoints."""
    steps = run.state.averaged
    states = [load_checkpoint(run.path(f".{step}.pt"))["model"] for step in steps]
    print(f"step {run.state.step}: its weights are averaged with those of steps {steps}")
    for name, p in run.model.named_parameters():
        if p.requires_grad:
            p.add_(sum(like(p, state[name].to(p.device)) for state in states))
            p.div_(1 + len(states))
    run.state.averaged = []  # so that it is done once


def train(cfg: TrainConfig, stop: Stop) -> None:
    """Runs a phase, from its beginning or from where it was stopped."""
    run = open_run(cfg)
    cfg, state, optimizer = run.cfg, run.state, run.optimizer
    if cfg.show_batch:
        return import_plan().show_batch(run, run_schedule)
    if cfg.dry_run:
        state.step = cfg.warm_start  # the steps behind it need more
        return import_plan().dry_run(run, run_schedule, backward, update, steps_of_a_pass(run))
    if state.validated == cfg.steps:
        return print(f"{run.path('.pt')}: all {state.step} steps are done")
    run.log = open_log(run)
    loader = open_loader(run)
    progress = {"initial": state.step, "total": cfg.steps, "unit": " steps"}
    bar = tqdm(desc=cfg.phase, disable=rank() > 0, **progress)
    under_way = ()  # what finish_step takes of the last step
    while True:
        # Once in a while, validate and save. A signal is answered here, between two steps.
        stop.waits = True
        due = state.step % cfg.eval_every == 0 or state.step == cfg.steps
        due = due and (state.step > 0 or bool(cfg.init))  # without --init there is nothing to see
        stopped = any(gather(stop.signal))
        if under_way and (due or stopped):
            finish_step(run, bar, *under_way)
            under_way = ()
        if due and state.step > state.validated and not stopped:
            validate_and_save(run, stop)
            stopped = any(gather(stop.signal))
        if stopped:
            # Weights that give no finite gradient are not worth an older checkpoint.
            if state.step > max(0, state.validated) and not state.skipped:
                save(run)
            gather("saved")  # torchrun ends the others when one ends
            raise KeyboardInterrupt
        if state.step == cfg.steps:
            break

        # The learning rate of this step.
        share = rate_share(state.step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * share

        # One step, on the batches of all ranks.
        batches, tokens, audio = next_step(run, loader)
        figures, event = update(run, *backward(run, batches, tokens))
        state.step += 1

        # While the GPU computes it, the figures of the step before are read.
        if under_way:
            finish_step(run, bar, *under_way)
        line = {"step": state.step, "lr": share, "tokens": tokens, "audio": audio}
        under_way = line, batches, figures, event
    bar.close()
    report(run)


def report(run: Run) -> None:
    """The picture of the curves, if extras/ is there, and what was left out."""
    lines = data.read_lines(run.path(".jsonl"))
    if rank() == 0:
        with suppress(ImportError):
            from extras.curves import draw_curves

            data.write_text(run.path(".svg"), draw_curves(lines))
            print(f"{run.path('.svg')}: the curves")
    for where, why in run.state.bad.items():
        print(visible(f"left out: {where}: {why}"))
    skipped = sum("skipped" in line for line in lines)
    counts = f"{run.state.seen} rows drawn, {skipped} steps and {len(run.state.bad)} recordings"
    print(f"{run.path('.pt')}: {counts} left out")


def open_log(run: Run) -> Callable | None:
    """What shows the lines of the log elsewhere, on rank 0. Raises UserError if it is missing."""
    if not run.cfg.log or rank() > 0:
        return None
    with one_line_errors(f"--log {run.cfg.log}", f"pip install {run.cfg.log}"):
        from extras import logs

        return logs.open_log(run.cfg.log, run.path(""), asdict(run.cfg), run.state.step)


def import_plan():
    with one_line_errors("this option", "it needs extras/plan.py beside train.py"):
        from extras import plan
    return plan


def main(argv: list[str] | None = None) -> None:
    steady_output()
    cfg = parse(argv)
    keep_freed_memory()
    with Stop() as stop:
        try:
            join_ranks(cfg.device)
            train(cfg, stop)
            if dist.is_initialized():
                dist.destroy_process_group()
        except KeyboardInterrupt:
            print("train.py: stopped; what was saved is intact, --resume goes on", file=sys.stderr)
            sys.exit(128 + (stop.signal or signal.SIGINT))
        except (UserError, OSError, RuntimeError) as error:
            sys.exit(f"train.py: {explain(error, cfg.out)}")


def explain(error: Exception, out: str) -> str:
    """The line about an error that a user can do something about; others are raised again."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)  # torchrun ends the other ranks when one ends, and rank 0 is to speak first
    reason = first_line(error)
    if "DataLoader" in reason:
        reason = f"the loader failed ({str(error).strip().splitlines()[-1]})"
    elif isinstance(error, UserError):
        return reason
    elif isinstance(error, OSError):
        reason = f"{error.filename or out}: {error.strerror}"
    elif isinstance(error, torch.OutOfMemoryError):
        reason = "a batch does not fit into memory: lower --batch-frames and --batch-tokens"
    elif isinstance(error, dist.DistError) or "gloo/" in reason:
        reason = f"lost another rank, whose own message says why ({reason})"
    else:
        raise error
    return visible(f"{reason}; what was saved is intact: mend this and start again with --resume")


if __name__ == "__main__":
    main()
