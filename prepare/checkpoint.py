"""Pretrained checkpoints on disk: a directory with config.json and model.safetensors, or shards and their index.

Knows files, not layers: model.py says which tensors and fields it wants, and what does not fit is refused in one line.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prepare.errors import CheckpointError


# ----------------------------------------------------------------------------------------------------------------------
# Checks of config.json

MAY_BE_ZERO = ("left_max_position_embeddings", "right_max_position_embeddings", "mask_time_min_masks",
               "mask_feature_min_masks", "max_window_layers", "prompt_tokens")


def expect(raw, where, **allowed):
    """Raises CheckpointError, naming the field, unless each field of raw is absent, null or has an allowed value."""
    for name, values in allowed.items():
        if raw.get(name) not in [*values, None] or name == "model_type" and name not in raw:
            raise CheckpointError(f"{where}: {name} is {raw.get(name)!r}, expected {' or '.join(map(repr, values))}; "
                                  "this architecture is not supported: choose another checkpoint")


def typed(raw, where, **types):
    """Raises CheckpointError, naming the field, unless each is absent, null, or of its type and large enough."""
    for name, kind in types.items():
        value, least = raw.get(name), int(kind is int and name not in MAY_BE_ZERO)
        if value is not None and (type(value) not in ((int, float) if kind is float else (kind,)) or
                                  kind in (int, float) and value < least):
            at_least = f" of at least {least}" if kind in (int, float) else ""
            raise CheckpointError(f"{where}: {name} is {value!r}, expected {kind.__name__}{at_least}; "
                                  "copy the checkpoint's own config.json again")


def known_fields(cls, raw, where):
    """The fields of the dataclass cls that raw has, checked; null counts as absent, and only defaults may be absent."""
    typed(raw, where, **{f.name: f.type for f in fields(cls) if f.type in (int, float, bool, str)})
    values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
    missing = [f.name for f in fields(cls) if f.name not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise CheckpointError(f"{where}: no field {', '.join(missing)}; copy the checkpoint's own config.json again")
    return values


def divides(where, config, whole, part):
    a, b = getattr(config, whole), getattr(config, part)
    if a % b:
        raise CheckpointError(f"{where}: {whole} {a} is no multiple of {part} {b}; copy the checkpoint's config.json again")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def fetch(path_or_hub_id):
    """The local directory of a checkpoint; a Hub id is downloaded, only the files needed, into the Hub's cache
    (HF_HOME), or taken from there alone (HF_HUB_OFFLINE=1). Raises CheckpointError."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_hub_id)):
        raise CheckpointError(f"{path}: no such directory; give the directory of a checkpoint (config.json and "
                              "model.safetensors) or a Hub id such as Qwen/Qwen2.5-1.5B")
    from huggingface_hub import snapshot_download  # takes half a second, so only when needed
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=[
            "config.json", "generation_config.json", "tokenizer.json", "model.safetensors",
            "model.safetensors.index.json", "model-*-of-*.safetensors"]))
    except Exception as error:  # its errors have no common base: network, HTTP status, cache, disk
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise CheckpointError(f"{path}: no such directory here, and the Hub gave no such model ({reason}); check the "
                              "name, the network and HF_HUB_OFFLINE") from error


def read_json(path):
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; a checkpoint has config.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it from the checkpoint again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: found a {type(raw).__name__}, expected a JSON object; copy it again")
    return raw


def weight_files(directory):
    """The safetensors files of a checkpoint directory, single or sharded."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    if not index.exists():
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5"))
        raise CheckpointError(f"{directory}: found {', '.join(others) or 'no weights'}, expected model.safetensors or "
                              "model.safetensors.index.json; pickled weights are not opened: take the checkpoint's "
                              "safetensors version or convert it")
    raw = read_json(index)
    typed(raw, index, weight_map=dict)
    names = sorted({str(name) for name in (raw.get("weight_map") or {}).values()})
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]{,200}[.]safetensors", name) or not (directory / name).is_file():
            raise CheckpointError(f"{index}: names the shard {name!r}, which is not a file beside it; "
                                  "download the missing shards")
    return [directory / name for name in names]


def open_weights(file, device="cpu"):
    try:
        return safe_open(file, framework="pt", device=str(torch.device(device)))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes that are not a whole safetensors file ({error}); "
                              "it is truncated or damaged: download it again") from error


def fingerprint(path_or_hub_id):
    """Where a checkpoint is, and a hash of its config.json and of 64 KB at 16 places of its weights."""
    directory = fetch(path_or_hub_id)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in weight_files(directory):
        size = file.stat().st_size
        with open(file, "rb") as f:
            for i in range(16):
                f.seek(size * i // 16)
                digest.update(f.read(2**16))
    where = directory.resolve() if Path(path_or_hub_id).is_dir() else path_or_hub_id
    return {"path": str(where), "sha256": digest.hexdigest()}


def read_generation(directory):
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def check_tied(config, directory, prefix=""):
    """Raises CheckpointError if the output layer is to be the embedding, but the checkpoint has another one."""
    pair = dict.fromkeys([prefix + "lm_head.weight", prefix + "model.embed_tokens.weight"] * config.tie_word_embeddings)
    for file in weight_files(directory):
        with open_weights(file) as f:
            pair |= {key: f.get_tensor(key) for key in pair if key in f.keys()}
    found = [tensor for tensor in pair.values() if tensor is not None]
    if len(found) == 2 and not torch.equal(*found):
        raise CheckpointError(f"{directory}: tie_word_embeddings is true in config.json, but lm_head.weight differs "
                              "from the embedding; set it to false to use both")


def load(build, directory, rename, dtype, compute_dtype, device):
    """The module that build(compute_dtype) gives, with its weights taken from the directory, in eval mode.

    rename gives the module's name of a checkpoint's tensor, or None to leave it out. Tensors already in `dtype` stay
    memory-mapped; others are converted in blocks of 64 MB, after each of which the file is closed, so that loading
    needs hardly more memory than the weights. Raises CheckpointError listing missing, unexpected and mis-shaped keys.
    """
    for precision in (dtype, compute_dtype or dtype):
        if precision not in (torch.float32, torch.bfloat16):
            raise ValueError(f"precision {precision} is not supported; choose torch.float32 or torch.bfloat16")
    with torch.device("meta"):
        model = build(compute_dtype or dtype)
    wanted, plan, problems = model.state_dict(), {}, []
    for file in weight_files(directory):
        with open_weights(file) as f:
            for key in f.keys():
                name, tensor = rename(key), f.get_slice(key)
                if name is None:
                    continue
                shape, stored = tuple(tensor.get_shape()), tensor.get_dtype()
                if name not in wanted:
                    problems.append(f"unexpected {key} {shape}")
                elif name in plan:
                    problems.append(f"{key} is there twice")
                elif shape != wanted[name].shape:
                    problems.append(f"{key} is {shape}, expected {tuple(wanted[name].shape)}")
                elif stored not in ("F32", "BF16", "F16"):
                    problems.append(f"{key} is {stored}, expected F32, BF16 or F16")
                plan[name] = file, key, stored
    problems += [f"missing {name}" for name in sorted(wanted.keys() - plan.keys())]
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{directory}: {len(problems)} tensors do not fit config.json: "
                              f"{'; '.join(problems[:12])}{more}; the weights and config.json are of different models")
    state = {}
    for name, (file, key, stored) in plan.items():
        with open_weights(file, device) as f:
            if stored == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]:
                state[name] = f.get_tensor(key)
                continue
        state[name] = torch.empty(wanted[name].shape, dtype=dtype, device=device)
        rows = max(1, 2**24 // wanted[name][0].numel())  # 64 MB of float32
        for i in range(0, len(state[name]), rows):
            with open_weights(file, device) as f:
                state[name][i:i + rows] = f.get_slice(key)[i:i + rows]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def save(directory, config, state, eos_token_id=None):
    """Writes the weights and the JSON files; each replaces its forerunner only when it is whole."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    texts = {"config.json": config}
    if eos_token_id is not None:
        texts["generation_config.json"] = {"eos_token_id": eos_token_id}
    written = [directory / f"{name}.tmp" for name in ("model.safetensors", *texts)]
    try:
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state, written[0], metadata={"format": "pt"})
        for file, values in zip(written[1:], texts.values()):
            file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(written[1], written[0])  # safetensors makes its file readable by its owner alone
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    for file in written:
        os.replace(file, file.with_suffix(""))


def write_atomically(path, save):
    """save(temporary file), then rename: path is always whole, the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch.save's word for a disk that fills up
            raise OSError(errno.ENOSPC, "could not be written to the end, is the disk full?", str(path)) from error
        raise


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def read_lines(path):
    """The objects of a JSON Lines file, none if it is not there; half a line, as a kill leaves, is passed over."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            pass
    return lines
