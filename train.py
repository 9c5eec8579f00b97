"""Training, both phases: python train.py --phase align, then python train.py --phase ift --init out/align.pt.

One config, one table of phases, one loop. python train.py --help lists every option.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import POOL, PROMPT_TOKENS, TASKS, Examples, collate, cut, schedule
from eval import quick_figures, refusal_threshold
from model import SpeechLM, add_lora, merged_state
from prepare.checkpoint import (fast_dtype, fetch, fingerprint, load_checkpoint, load_tokenizer, read_lines, restore,
                                write_checkpoint, write_text)
from prepare.distributed import (distribute, full, full_state, last_backward, load_resume, read_resume, remove_shards,
                                 save_resume, whole)
from prepare.draw import draw_curves
from prepare.encoder_cache import encoder_states
from prepare.errors import AudioError, CheckpointError, ManifestError, RankError, TrainError, visible
from prepare.faults import Stop, expect_finite, ignore_signals, leave_out, next_batch
from prepare.licences import notice, used
from prepare.memory import keep_freed
from prepare.mixture import open_manifests
from prepare.plan import dry_run, meta_parts
from prepare.ranks import deal, gather, rank, ranks, seed_for, start, together, world
from sample import answer_rows, listen

ROOT = Path(__file__).resolve().parent
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


@dataclass
class TrainConfig:
    phase: str = "align"  # which row of PHASES
    encoder: str = str(ROOT / "demo/encoder")  # w2v-BERT 2.0 checkpoint, directory or Hub id
    llm: str = str(ROOT / "demo/llm")  # Qwen2.5, Qwen3 or Llama checkpoint, directory or Hub id
    data: list[str] = field(default_factory=lambda: [str(ROOT / "demo/train.jsonl")])  # manifests; PATH=2 counts double
    dev: str = str(ROOT / "demo/dev.jsonl")  # manifest for validation
    trust_paths: bool = False  # take audio from outside a manifest's folder, too, where its rows or links lead there
    allow_licence: list[str] = field(default_factory=list)  # accept data of these licences, too (SPDX)
    out: str = "out"  # directory of checkpoints, log and picture
    init: str = ""  # start from this checkpoint of an earlier phase
    resume: bool = False  # go on where the last run of this phase stopped
    dry_run: bool = False  # only print what the run would need: memory, steps, time
    steps: int = 0  # optimizer steps; 0: the phase's own number
    warmup: int = 0  # steps of rising learning rate; 0: the phase's own number
    min_lr: float = 0.1  # the cosine ends at this share of the learning rate
    adapter_lr: float = 0.0  # learning rate of the adapter; 0: the phase's own
    encoder_lr: float = 0.0  # of the encoder, in a phase that trains it
    llm_lr: float = 0.0  # of the LLM, in a phase that trains it
    temperature: float = 1.0  # a task and language is drawn as often as its rows to the power 1 / temperature
    lora_rank: int = 0  # train the LLM by low-rank updates of this rank, merged on saving; 0: train all of it
    lora_alpha: float = 32.0  # their scale, times the rank
    lora_targets: list[str] = field(default_factory=lambda: LINEAR.split())  # the layers of the LLM that they are added to
    weight_decay: float = 0.01  # of matrices; norms and biases have none
    clip: float = 1.0  # gradient norm
    batch_frames: int = 0  # 20 ms frames in a batch, of which each rank has its own; 0: the phase's own
    batch_tokens: int = 4000  # LLM positions in a batch
    accumulate: int = 1  # batches of each rank in a step; a resumed run keeps their number over all ranks
    fsdp: bool = False  # split weights and optimizer among the ranks of torchrun, where one GPU has no room for them
    max_seconds: float = 30.0  # longer recordings are left out and counted as bad
    prompt: str = "text"  # text: instructions in words; tokens: the reference's <|lang|><|task|>
    length_hint: float = 0.0  # with prompt tokens: share of rows told the answer's length (reference: 0.9)
    adapter_layers: int = 2  # each divides the frame rate by the stride
    adapter_kernel: int = 3  # frames
    adapter_stride: int = 2  # frames
    precision: str = "auto"  # compute in float32 or bfloat16; auto: bfloat16 where it is faster
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    cache_gb: float = 2.0  # keep a frozen encoder's outputs on disk if they fit in this; 0: never
    workers: int = 2  # processes that read audio and compute features
    eval_every: int = 500  # steps between validations, each of which also saves
    eval_rows: int = 200  # rows for the validation loss
    eval_clips: int = 48  # clips transcribed for the validation WER
    seed: int = 0  # of everything random
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda or cpu


@dataclass(frozen=True)
class Phase:
    rates: dict  # parts that are trained, with their learning rates; every other part is frozen
    tasks: tuple
    steps: int
    warmup: int
    batch_frames: int


PHASES = {
    "align": Phase({"adapter": 2e-4}, ("asr",), 2000, 30, 3000),
    "ift": Phase({"adapter": 2e-4, "encoder": 6e-6, "llm": 2e-5}, ("asr", "st", "sqa"), 4000, 50, 3000),
}
DEMO_PHASES = {  # for the tiny models of demo/, when nothing else is named
    "align": Phase({"adapter": 2e-3}, ("asr",), 1500, 100, 1500),
    "ift": Phase({"adapter": 7e-4, "encoder": 1e-4, "llm": 1.5e-4}, ("asr", "st", "sqa"), 300, 30, 3000),
}


CHOICES = {"phase": PHASES, "prompt": ("text", "tokens"), "precision": ("auto", "float32", "bfloat16"),
           "device": ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)}
BOUNDS = {"min_lr": (0, 1), "length_hint": (0, 1), "clip": (1e-9, math.inf), **dict.fromkeys(
    ["temperature", "batch_tokens", "accumulate", "adapter_layers", "adapter_kernel", "adapter_stride", "eval_every",
     "max_seconds"], (1, math.inf)), "eval_rows": (2, math.inf)}  # other numbers: at least 0
CURVES = [{"loss": "#999999", "dev_loss": "#1f6fb4", "shuffled_loss": "#d1662b"},
          {"wer": "#2a8a3e", "exact_match": "#1f6fb4", "refusals": "#7b4fa3", "false_refusals": "#d1662b"},
          {"bleu": "#1f6fb4"}]  # the picture's panels
# every other option must stay for a run to be resumed
MAY_CHANGE = ("resume", "dry_run", "out", "device", "workers", "fsdp", "trust_paths")


def parse(argv):
    """The TrainConfig of a command line. Exits with code 2 on an unknown flag or value."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    comments = re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(encoding="utf-8"), re.M)
    for f in fields(TrainConfig):
        kind = {bool: {"action": "store_true"}, list[str]: {"nargs": "+"}}.get(f.type, {"type": f.type})
        default = f.default_factory() if f.type == list[str] else f.default
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=default, help=dict(comments)[f.name], **kind)
    cfg = TrainConfig(**vars(parser.parse_args(argv)))
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            parser.error(f"--{name} is {getattr(cfg, name)!r}, expected {' or '.join(allowed)}")
    for f in fields(TrainConfig):
        low, high = BOUNDS.get(f.name, (0, math.inf))
        if f.type in (int, float) and not (low <= getattr(cfg, f.name) <= high and math.isfinite(getattr(cfg, f.name))):
            parser.error(f"--{f.name.replace('_', '-')} is {getattr(cfg, f.name)}, expected {low} to {high}")
    if set(cfg.lora_targets) - set(LINEAR.split()) or cfg.lora_rank and "llm" not in PHASES[cfg.phase].rates:
        parser.error(f"--lora-rank is for phase ift, --lora-targets are some of {LINEAR}")
    if cfg.fsdp and "LOCAL_RANK" not in os.environ:
        parser.error("--fsdp is for several ranks: torchrun --nproc_per_node=8 train.py --fsdp ...")
    return cfg


def settle(cfg):
    """The config with the phase's own numbers where it leaves them open, {part: learning rate} of the parts that are
    trained, and the tasks."""
    demo = all(getattr(cfg, name) == getattr(TrainConfig(), name) for name in ("encoder", "llm", "data"))
    phase = (DEMO_PHASES if demo else PHASES)[cfg.phase]
    rates = {part: getattr(cfg, f"{part}_lr") or rate for part, rate in phase.rates.items()}
    own = {name: getattr(cfg, name) or getattr(phase, name) for name in ("steps", "warmup", "batch_frames")}
    return replace(cfg, **own), rates, phase.tasks


# ----------------------------------------------------------------------------------------------------------------------
# Model, optimizer, schedule


def build(cfg, rates, meta=False):
    """The model, its tokenizer and the fingerprints of its two base checkpoints. Trained parts have float32 weights,
    frozen parts the compute dtype's. An --init checkpoint brings its adapter's shape with it. meta: shapes alone."""
    bases = {} if meta else {name: fingerprint(getattr(cfg, name)) for name in ("encoder", "llm")}
    init = load_checkpoint(cfg.init) if cfg.init else None
    frozen = sorted({name.split(".")[0] for name in init["model"]} - rates.keys()) if init else []
    if frozen:
        raise TrainError(f"{cfg.init} holds a trained {' and '.join(frozen)}, which phase {cfg.phase} would freeze and not "
                         "save; start this phase from the base models, or from a checkpoint of phase align")
    directory = fetch(cfg.llm)
    tokenizer = load_tokenizer(directory)
    compute = fast_dtype(directory, cfg.device) if cfg.precision == "auto" else getattr(torch, cfg.precision)
    adapter = {"num_adapter_layers": cfg.adapter_layers, "adapter_kernel_size": cfg.adapter_kernel,
               "adapter_stride": cfg.adapter_stride, "prompt_tokens": len(PROMPT_TOKENS) * (cfg.prompt == "tokens")}
    if init:
        adapter = init["adapter"]
        if bool(adapter["prompt_tokens"]) != (cfg.prompt == "tokens"):
            raise TrainError(f"{cfg.init} was trained with --prompt {init['config']['prompt']}; give the same")
    join, exact = meta_parts if meta else SpeechLM.from_parts, rates.keys() - ({"llm"} if cfg.lora_rank else set())
    model = join(cfg.encoder, cfg.llm, compute, compute, cfg.device, exact, **adapter)
    if init and not meta:
        restore(model, init, bases, cfg.init)
    for name, part in model.named_children():
        part.requires_grad_(name in rates).train(name in rates)
    spec = model.encoder.config
    if not (spec.apply_spec_augment and spec.mask_time_prob) and hasattr(model.encoder, "masked_spec_embed"):
        model.encoder.masked_spec_embed.requires_grad_(False)  # nothing reads it, so it would wait for a gradient
    if cfg.lora_rank and "llm" in rates:
        add_lora(model.llm, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    model.encoder.checkpointing = model.llm.checkpointing = cfg.checkpointing
    return model, tokenizer, bases


def parameter_groups(model, rates, weight_decay):
    """AdamW groups: the matrices of each part, and its vectors. Every trained parameter is in exactly one."""
    groups = []
    for part, rate in rates.items():
        parameters = [p for p in getattr(model, part).parameters() if p.requires_grad]
        for decayed in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == decayed]
            groups.append({"params": chosen, "rate": rate, "weight_decay": weight_decay * decayed})
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    return groups


def on_device(batch, device):
    """What SpeechLM.forward takes of a batch; lengths stay on the host."""
    names = ("features", "lengths", "ids", "ids_lengths", "targets")
    return {name: batch[name] if "lengths" in name else batch[name].to(device, non_blocking=True) for name in names}


def scale_projection(model, batch):
    """Scales a new adapter's projection so that its output spreads like the LLM's token embeddings."""
    with torch.no_grad():
        audio, _ = model.encode(batch["features"], batch["lengths"])
        factor = model.llm.model.embed_tokens.weight.float().std() / audio.float().std()
        for p in model.adapter.enc_to_dec_proj.parameters():
            p.mul_(factor)


def lr_at(step, cfg):
    """Share of the learning rate at a step, counted from 0: linear warmup, then a cosine from 1 down to min_lr."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


# ----------------------------------------------------------------------------------------------------------------------
# Validation


@torch.no_grad()
def validate(cfg, model, examples, picks):
    """Loss on the picked rows of the dev manifest (the last one), the loss when every row hears another row's audio,
    and the scores of answering the first rows of each task. Returns figures, and (reference, hypothesis) pairs."""
    dev, rows, frames = len(examples.manifests) - 1, [], []
    for i in picks:
        row = examples.manifests[dev][i]
        try:
            frames.append(examples.frames(dev, i, row))
        except AudioError as error:
            tqdm.write(f"validation leaves out {row['where']}: {error}")
            continue
        rows.append(row)
    if len(rows) < 2:
        raise TrainError(f"{cfg.dev}: {len(rows)} recordings can be used, expected at least 2; mend the files")
    training = {name: part.training for name, part in model.named_children()}
    model.eval()
    figures = {}
    for name, heard in [("dev_loss", frames), ("shuffled_loss", frames[1:] + frames[:1])]:
        made = [examples.example(row, x) for row, x in zip(rows, heard)]
        made.sort(key=lambda example: len(example[2]))
        total = count = 0
        for batch in cut([(len(e[2]), len(e[0]), e) for e in made], cfg.batch_frames, cfg.batch_tokens):
            loss, n = model(**on_device(collate(batch), cfg.device))
            total, count = total + loss.item(), count + n
        figures[name] = total / max(1, count)
    some = [i for task in TASKS for i in [i for i, row in enumerate(rows) if row["task"] == task][:cfg.eval_clips]]
    rows = [rows[i] for i in some]
    answers = answer_rows(model, examples.tokenizer, rows, listen(model, [[frames[i]] for i in some]), cfg.prompt)
    said = [(row, answer.text) for row, answer in zip(rows, answers) if not isinstance(answer, AudioError)]
    for name, part in model.named_children():
        part.train(training[name])
    return figures | quick_figures(said), [(row["text"], text) for row, text in said]


def settle_refusals(cfg, model, examples):
    """The threshold above which questions are refused, set on up to 500 questions of the dev manifest: {} if it has
    too few."""
    dev, asked, heard = len(examples.manifests) - 1, [], []
    for i in np.random.default_rng(0).permutation(len(examples.manifests[dev])).tolist():
        if len(asked) == 500:
            break
        row = examples.manifests[dev][i]
        if row["task"] == "sqa":
            try:
                heard.append([examples.frames(dev, i, row)])
            except AudioError:
                continue
            asked.append(row)
    model.eval()
    answers = answer_rows(model, examples.tokenizer, asked, listen(model, heard), cfg.prompt, weigh=True)
    return refusal_threshold(asked, answers)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(cfg, stop):
    start(cfg.device)
    cfg, rates, tasks = settle(cfg)
    torch.manual_seed(cfg.seed)
    if cfg.dry_run:
        return dry_run(cfg, rates, open_manifests(cfg, tasks), build, parameter_groups, on_device)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        write_text(out / "config.json", json.dumps(asdict(cfg), indent=2))
    checkpoint_path, resume_path, log_path, rows_path = (
        out / f"{cfg.phase}{end}" for end in (".pt", ".resume.pt", ".jsonl", ".nonfinite.jsonl"))
    manifests, weights, dev, hours, longest = open_manifests(cfg, tasks)
    model, tokenizer, bases = build(cfg, rates)
    data = used(load_checkpoint(cfg.init)["data"] if cfg.init else [], hours)  # of earlier phases and this one
    for name, part in model.named_children():
        count, how = sum(p.numel() for p in part.parameters()), f"lr {rates[name]:g}" if name in rates else "frozen"
        print(f"{name}: {count / 1e6:.2f} M parameters, {how}, {next(part.parameters()).dtype} weights")
    states = None
    if "encoder" not in rates and cfg.cache_gb:
        states = encoder_states(cfg, model.encoder, [*manifests, dev], bases["encoder"])
    if states is not None:
        model.encoder = None
    examples = Examples([*manifests, dev], tokenizer, model.llm.config.eos_token_id[0], model.adapter.config,
                        cfg.prompt, cfg.length_hint, cfg.max_seconds, states, cfg.seed)
    picks = np.random.default_rng(0).permutation(len(dev))[:cfg.eval_rows].tolist()

    first, position, total = 0, None, cfg.accumulate * world()  # total: batches in a step
    seen, bad = 0, {}  # rows drawn; file and line of those that could not be used -> why
    validated = skipped = 0  # the step of the last validation; steps just left out in a row
    resumed = gather(cfg.resume and resume_path.exists())[0]
    if resumed:
        state = read_resume(resume_path, asdict(cfg), MAY_CHANGE, total)
        restore(model, state, bases, resume_path)
        first, position, total, seen, bad, validated, skipped = (state[name] for name in (
            "step", "position", "total", "seen", "bad", "validated", "skipped"))
        if validated == cfg.steps:
            print(f"{checkpoint_path}: all {first} steps are done")
            return
    size = lru_cache(2 * POOL)(examples.size)
    order = partial(schedule, manifests, weights, size, cfg.batch_frames, cfg.batch_tokens, cfg.seed)
    if not resumed and not cfg.init:
        usable = (batch for batch in map(examples.__getitem__, islice(order(), 100)) if batch["rows"])
        if batch := next_batch(chain(usable, [None])):
            seed_for(cfg.seed, batch["position"])
            scale_projection(model, on_device(batch, cfg.device))
    net = distribute(model, cfg.fsdp, cfg.device)
    groups = parameter_groups(model, rates, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    if resumed:
        load_resume(resume_path, state, model, optimizer)
    if rank() == 0:
        kept = [line for line in read_lines(log_path) if resumed and line["step"] <= first]
        write_text(log_path, "".join(json.dumps(line) + "\n" for line in kept))
        if not resumed:
            for path in (resume_path, rows_path):  # of another run
                path.unlink(missing_ok=True)
            remove_shards(resume_path)
    loader = iter(torch.utils.data.DataLoader(
        examples, sampler=deal(order(position), size, total), batch_size=None, num_workers=0 if states else cfg.workers,
        pin_memory=cfg.device != "cpu", worker_init_fn=ignore_signals))

    def save(step, **settled):
        state = {"config": asdict(cfg), "adapter": asdict(model.adapter.config), "bases": bases, "data": data,
                 "window": min(30.0, max(1.0, longest)), "step": step, **settled,
                 "versions": {"torch": str(torch.__version__), "python": sys.version}}
        if validated:  # a run stopped before that leaves the result of an earlier one
            merged = merged_state(model, full_state(model, rates))  # every rank takes part
            if rank() == 0:
                write_checkpoint(checkpoint_path, {"model": merged, **state})
                write_text(out / f"{cfg.phase}.NOTICE", notice(data))
        save_resume(resume_path, model, optimizer, {**state, "position": position, "total": total, "seen": seen,
                                                    "bad": bad, "validated": validated, "skipped": skipped})

    def record(**figures):
        if rank() == 0:
            with open(log_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")

    bar = tqdm(total=cfg.steps, initial=first, desc=cfg.phase, unit=" steps", dynamic_ncols=True, disable=rank() > 0)
    for step in range(first, cfg.steps + 1):
        # once in a while: validate, show two transcripts, save; a signal ends a validation, which --resume makes up for
        found, stop.waits = None, True
        due = step > validated and (step % cfg.eval_every == 0 or step == cfg.steps)
        if due and not any(gather(stop.asked)):
            with whole(model), stop.at_once():
                found = *validate(cfg, model, examples, picks), (
                    settle_refusals(cfg, model, examples) if step == cfg.steps and "sqa" in tasks else {})
            found = None if any(gather(stop.asked)) else found
        if found:
            figures, pairs, settled = found
            expect_finite(step, figures["dev_loss"])
            validated = step
            record(step=step, **figures)
            bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
            for reference, hypothesis in pairs[::max(1, len(pairs) // 4)][:4] if len(tasks) > 1 else pairs[:2]:
                bar.write(f"  said: {visible(reference)}\n  read: {visible(hypothesis)}")
            save(step, **settled)
        if any(gather(stop.asked)):
            # weights that give no finite gradient are not worth an older checkpoint
            if not found and not skipped and step > first:
                save(step)
            gather("saved")  # torchrun ends the others when one ends
            raise KeyboardInterrupt
        if step == cfg.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * lr_at(step, cfg)

        # one step: every batch's summed loss over the target tokens of all its batches, on all ranks
        began, tokens, tries = time.time(), 0, 0  # again if no row of them can be used
        while not tokens:
            tries += 1
            batches = [next_batch(loader) for _ in range(math.ceil(total / world()))]
            position, drawn, missed, tokens, audio = together(batches)
            seen, bad = seen + drawn, bad | missed
            met = min(seen, sum(map(len, manifests)))  # different recordings, as far as one can tell
            if len(bad) > 0.01 * max(met, 300) or not tokens and tries == 100:
                raise TrainError(f"{len(bad)} of {met} recordings could not be used, more than 1 %: "
                                 + "; ".join(f"{where}: {why}" for where, why in list(bad.items())[-3:]))
        loss = 0.0
        for batch in batches:
            seed_for(cfg.seed, batch["position"])
            with last_backward(net, batch is batches[-1]):
                part, _ = net(**on_device(batch, cfg.device))
                (part * world() / tokens).backward()  # the ranks' gradients are averaged
            loss += part.item()
        loss = sum(gather(loss)) / tokens
        norm = full(torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], cfg.clip)).item()
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            figures, skipped = {"loss": loss, "norm": norm}, 0
        else:  # no update
            figures, skipped = {"skipped": f"loss {loss}, gradient norm {norm}"}, skipped + 1
            rows = sum(gather([row for batch in batches for row in batch["rows"]]), [])
            bar.write(leave_out(rows_path, step + 1, rows, skipped, seed=cfg.seed, **figures))
        optimizer.zero_grad()
        record(step=step + 1, **figures, lr=lr_at(step, cfg), tokens=tokens, audio=audio)
        bar.set_postfix(loss=f"{loss:.3f}", audio_s_per_s=f"{audio / (time.time() - began):.0f}")
        bar.update()
    bar.close()
    lines = read_lines(log_path)
    if rank() == 0:
        write_text(out / f"{cfg.phase}.svg", draw_curves(lines, CURVES))
    for where, why in bad.items():
        print(visible(f"left out: {where}: {why}"))
    print(f"{checkpoint_path}: {seen} rows drawn, {sum('skipped' in line for line in lines)} steps and {len(bad)} "
          f"recordings left out; curves in {out / cfg.phase}.svg")


def main(argv=None):
    cfg = parse(argv)
    keep_freed()
    try:
        with ranks(), Stop() as stop:
            train(cfg, stop)
    except KeyboardInterrupt:
        print("train.py: stopped" + "; what was saved is intact: go on with --resume" * (not cfg.dry_run), file=sys.stderr)
        sys.exit(128 + stop.asked if stop.asked else 130)
    except (CheckpointError, ManifestError, AudioError, RankError, TrainError) as error:
        sys.exit(f"train.py: {error}")
    except OSError as error:
        sys.exit(visible(f"train.py: {error.filename or cfg.out}: {error.strerror}; what was saved before is intact: mend "
                         "this and start again with --resume"))


if __name__ == "__main__":
    main()
