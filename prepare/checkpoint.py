"""Checkpoints on disk. Pretrained ones: a directory with config.json and model.safetensors, or shards and their index.
This project's: one file of the parts that were trained.

Knows files, not layers: model.py says which tensors and fields it wants, and what does not fit is refused in one line.
"""

import errno
import hashlib
import json
import math
import os
import pickletools
import re
import reprlib
import shutil
import zipfile
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from prepare.errors import CheckpointError
from prepare.paths import open_regular, read_bytes


# ----------------------------------------------------------------------------------------------------------------------
# Checks of config.json

MAY_BE_ZERO = ("left_max_position_embeddings", "right_max_position_embeddings", "mask_time_min_masks",
               "mask_feature_min_masks", "max_window_layers", "prompt_tokens")
# More than any model has. What is left multiplies to sizes that torch can name, and without weights they cost nothing.
MOST = {"num_hidden_layers": 1000, "num_adapter_layers": 16, "adapter_kernel_size": 64, "adapter_stride": 64,
        "prompt_tokens": 10_000, "max_position_embeddings": 2**30, "vocab_size": 2**24}
MOST_OF_OTHERS, MOST_OF_FLOATS = 2**18, 1e12
LARGEST_JSON, LARGEST_TOKENIZER = 2**24, 2**27  # bytes


def expect(raw, where, **allowed):
    """Raises CheckpointError, naming the field, unless each field of raw is absent, null or has an allowed value."""
    for name, values in allowed.items():
        if raw.get(name) not in [*values, None] or name == "model_type" and name not in raw:
            raise CheckpointError(f"{where}: {name} is {reprlib.repr(raw.get(name))}, expected "
                                  f"{' or '.join(map(repr, values))}; "
                                  "this architecture is not supported: choose another checkpoint")


def typed(raw, where, **types):
    """Raises CheckpointError, naming the field, unless each is absent, null, or of its type and within bounds."""
    for name, kind in types.items():
        value, least = raw.get(name), int(kind is int and name not in MAY_BE_ZERO)
        most = MOST.get(name, MOST_OF_OTHERS) if kind is int else MOST_OF_FLOATS
        if name.endswith(("dropout", "prob", "layerdrop")):
            most = 1
        if value is not None and (type(value) not in ((int, float) if kind is float else (kind,)) or
                                  kind in (int, float) and not least <= value <= most):
            bounds = f" of at least {least} and at most {most:,}" if kind in (int, float) else ""
            raise CheckpointError(f"{where}: {name} is {reprlib.repr(value)}, expected {kind.__name__}{bounds}; "
                                  "copy the checkpoint's own config.json again")


def known_fields(cls, raw, where):
    """The fields of the dataclass cls that raw has, checked; null counts as absent, and only defaults may be absent."""
    typed(raw, where, **{f.name: f.type for f in fields(cls) if f.type in (int, float, bool, str)})
    values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
    missing = [f.name for f in fields(cls) if f.name not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise CheckpointError(f"{where}: no field {', '.join(missing)}; copy the checkpoint's own config.json again")
    return values


LLAMA3_FIELDS = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]


def llm_fields(cls, raw, where, generation):
    """The fields of an LLM's config.json that cls has, checked, with the RoPE's and the end tokens from whichever of
    their places has them."""
    values = known_fields(cls, raw, where)
    typed(raw, where, max_window_layers=int, layer_types=list, rope_scaling=dict, rope_parameters=dict)
    windowed = raw.get("use_sliding_window") and raw.get("max_window_layers", 28) < values["num_hidden_layers"]
    if windowed or any(kind != "full_attention" for kind in raw.get("layer_types") or []):
        raise CheckpointError(f"{where}: sliding-window attention is in use (use_sliding_window, layer_types); "
                              "only full attention is supported: choose another checkpoint")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = {"rope_theta": values.get("rope_theta", 10000.0), "rope_type": rope.get("type", "default"), **rope}
    expect(rope, where, rope_type=["default", "llama3"], partial_rotary_factor=[1.0])
    for name in ["rope_theta"] + LLAMA3_FIELDS * (rope["rope_type"] == "llama3"):
        if type(rope.get(name)) not in (int, float) or not 0 < rope[name] <= MOST_OF_FLOATS:
            raise CheckpointError(f"{where}: {name} of the RoPE is {reprlib.repr(rope.get(name))}, expected a positive "
                                  "number; copy the checkpoint's own config.json again")
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not eos or not all(type(token) is int and 0 <= token < values["vocab_size"] for token in eos):
        raise CheckpointError(f"{where}: eos_token_id is {reprlib.repr(eos)}, expected integers below the vocab_size, "
                              f"{values['vocab_size']}; copy the config files again")
    return values | {"rope_theta": rope["rope_theta"], "eos_token_id": eos,
                     "rope_scaling": rope if rope["rope_type"] == "llama3" else None}


def divides(where, config, whole, part):
    a, b = getattr(config, whole), getattr(config, part)
    if a % b:
        raise CheckpointError(f"{where}: {whole} {a} is no multiple of {part} {b}; copy the checkpoint's config.json again")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def fetch(path_or_hub_id, weights=True):
    """The local directory of a checkpoint; a Hub id is downloaded, only the files needed, and weights only if they are
    wanted, into the Hub's cache (HF_HOME), or taken from there alone (HF_HUB_OFFLINE=1). Raises CheckpointError."""
    path = Path(path_or_hub_id)
    if os.path.isdir(path):
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_hub_id)):
        raise CheckpointError(f"{path}: no such directory; give the directory of a checkpoint (config.json and "
                              "model.safetensors) or a Hub id such as Qwen/Qwen2.5-1.5B")
    from huggingface_hub import snapshot_download  # takes half a second, so only when needed
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=[
            "config.json", "generation_config.json", "tokenizer.json", *["model.safetensors",
            "model.safetensors.index.json", "model-*-of-*.safetensors"] * weights]))
    except Exception as error:  # its errors have no common base: network, HTTP status, cache, disk
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{path}: no such directory here, and the Hub gave no such model ({reason}); check the "
                              "name, the network and HF_HUB_OFFLINE") from error


def first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(path):
    try:
        raw = json.loads(read_bytes(path, LARGEST_JSON))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; a checkpoint has config.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it from the checkpoint again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: found a {type(raw).__name__}, expected a JSON object; copy it again")
    return raw


def fast_dtype(directory, device):
    """bfloat16 where an LLM computes faster in it: on CUDA, and on CPUs that have it if the LLM is not tiny. Raises
    CheckpointError."""
    raw = read_json(directory / "config.json")
    typed(raw, directory / "config.json", hidden_size=int)
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported() and (raw.get("hidden_size") or 0) >= 512
    return torch.bfloat16 if fast else torch.float32


def weight_files(directory):
    """The safetensors files of a checkpoint directory, single or sharded."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
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
        return safe_open(file, framework="pt", device=str(torch.empty(0, device=device).device))  # "cuda" were GPU 0
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes that are not a whole safetensors file ({error}); "
                              "it is truncated or damaged: download it again") from error


def fingerprint(path_or_hub_id):
    """Where a checkpoint is, and a hash of its config.json and of 64 KB at 16 places of its weights. Raises
    CheckpointError."""
    directory = fetch(path_or_hub_id)
    read_json(directory / "config.json")  # says what is wrong with it
    digest = hashlib.sha256(read_bytes(directory / "config.json", LARGEST_JSON))
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


def load_tokenizer(directory):
    """The tokenizer.json of an LLM's directory. Raises CheckpointError."""
    path = Path(directory) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(path, LARGEST_TOKENIZER))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.decode(tokenizer.encode("A b. 1\n中").ids)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except BaseException as error:  # tokenizers raises bare Exception, and where it panics not even that
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(f"{path}: {first_line(error)}; copy the LLM's own tokenizer.json there") from error
    config = path.with_name("config.json")
    size = read_json(config).get("vocab_size") if config.exists() else None
    if not 0 <= largest < (size if type(size) is int else math.inf):
        raise CheckpointError(f"{path}: has tokens up to {largest}, expected them below the vocab_size of config.json, "
                              f"{size}; copy both from the same LLM")
    return tokenizer


ENCODER_KEYS_LEFT_OUT = ("adapter.", "intermediate_ffn.", "lm_head.", "projector.", "classifier.")


def encoder_name(key, config):
    """Our name of a tensor of a w2v-BERT checkpoint or a fine-tune of it; None if not needed."""
    key = key.removeprefix("wav2vec2_bert.")
    unused = key == "masked_spec_embed" and config.mask_time_prob == config.mask_feature_prob == 0
    return None if unused or key.startswith(ENCODER_KEYS_LEFT_OUT) else key


def llm_name(key, config):
    """Our name of an LLM checkpoint's tensor; None if not needed: RoPE tables, the copy of a tied output layer."""
    tied_copy = config.tie_word_embeddings and key.endswith("lm_head.weight")
    return None if tied_copy or key.endswith("rotary_emb.inv_freq") else key


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


def load_checkpoint(path):
    """A checkpoint as a dict, whose parts are what they should be. Raises CheckpointError."""
    try:
        check_pickle(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train it first or correct the path") from None
    except Exception as error:  # zipfile and torch.load raise RuntimeError, UnpicklingError, EOFError, ...
        raise CheckpointError(f"{path}: not a checkpoint of this project ({first_line(error)})") from error
    if not isinstance(state, dict) or not PARTS.keys() - {"refuse_above"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this project (it lacks parts); give an align.pt or ift.pt")
    for name in PARTS.keys() & state.keys():
        if not PARTS[name](state[name]):
            raise CheckpointError(f"{path}: its part {name} is not what this project writes; it is damaged or of "
                                  "another version: train it again")
    return state


PICKLED = re.compile(r"torch [A-Z]\w+Storage|torch[._]*utils _rebuild_tensor_v2|collections OrderedDict")
LARGEST_PICKLE = 2**26  # bytes


def check_pickle(path):
    """Raises ValueError or another Exception if what torch.load would unpickle names anything but tensors, or if the
    file promises more than it holds."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        whole = sum(entry.file_size for entry in entries) <= os.path.getsize(path)
        if not whole or any(entry.compress_type for entry in entries):
            raise ValueError("it has compressed or overlapping parts")
        pickled = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickled) != 1 or pickled[0].file_size > LARGEST_PICKLE:
            raise ValueError("it has no pickle, several, or a large one")
        for code, value, _ in pickletools.genops(archive.read(pickled[0])):
            if code.name == "GLOBAL" and not PICKLED.fullmatch(value):
                raise ValueError(f"it names {value[:80]!r}, expected tensors alone")


def number(value, low=-1e12, high=1e12):
    return type(value) in (int, float) and low <= value <= high


def plain(value):
    """Whether a value is one that json.dumps can write and has at most one level of lists."""
    return value is None or type(value) in (bool, str) or number(value) or (
        type(value) is list and all(type(x) in (bool, str) or number(x) for x in value))


def stored(tensor):
    """Whether a tensor is an array that the file holds in full."""
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided and (
        tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and tensor.is_contiguous())


PARTS = {  # of this project's checkpoints, and whether a value can be one
    "model": lambda part: isinstance(part, dict) and all(type(key) is str and stored(x) for key, x in part.items()),
    "adapter": lambda part: isinstance(part, dict) and (
        all(type(key) is str and plain(x) for key, x in part.items()) and
        part.get("adapter_act", "relu") in ("swish", "silu", "relu", "gelu") and "prompt_tokens" in part),
    "bases": lambda part: isinstance(part, dict) and part.keys() == {"encoder", "llm"} and all(
        isinstance(base, dict) and [type(base.get(name)) for name in ("path", "sha256")] == [str, str]
        for base in part.values()),
    "config": lambda part: isinstance(part, dict) and all(map(plain, part.values())) and (
        part.get("prompt") in ("text", "tokens") and type(part.get("phase")) is str),
    "window": lambda part: number(part, 0.1, 60),
    "step": lambda part: type(part) is int and number(part, 0),
    "refuse_above": lambda part: part is None or number(part),
    "data": lambda part: isinstance(part, list) and all(
        isinstance(entry, list) and [type(x) for x in entry[:3]] == [str] * 3 and list(map(number, entry[3:])) == [True]
        for entry in part),
}


def restore(model, state, bases, path):
    """Puts the parts that a checkpoint holds into the model. Raises CheckpointError if they belong to another model."""
    for name, found in bases.items():
        trained = state["bases"][name]
        if trained["sha256"] != found["sha256"]:
            raise CheckpointError(f"{path}: was trained on the {name} {trained['path']}, found another model at "
                                  f"{found['path']}; give the same --{name}")
    for part in {name.split(".")[0] for name in state["model"]}:
        own = {name: p.shape for name, p in model.named_parameters() if p.requires_grad and name.split(".")[0] == part}
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


def write_atomically(path, save, check=None):
    """save(temporary file), check(its path), then rename: path is always whole, the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch.save's word for a disk that fills up
            raise OSError(errno.ENOSPC, "could not be written to the end, is the disk full?", str(path)) from error
        raise


def write_checkpoint(path, state):
    """torch.save, which replaces an older file only when the new one is on disk and was read back."""
    write_atomically(path, lambda file: torch.save(state, file), read_back)


def read_back(path):
    """Raises OSError unless every part of a file of torch.save has the checksum that it was written with."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as parts:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
            damaged = parts.testzip()
    except zipfile.BadZipFile as error:
        damaged = str(error)
    if damaged:
        raise OSError(errno.EIO, f"does not read back as it was written ({damaged}), is the disk sound?", str(path))


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
