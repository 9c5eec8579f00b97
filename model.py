"""The speech-language model, in data-flow order: speech encoder, length adapter, LLM, their join.

The sequences of a batch are packed: they stand end to end in one dimension (see Rows), so that no
layer computes padding. Modules are named as in the pretrained checkpoints, so that loading is one
strict load_state_dict.

Letters in shape comments: B sequences of a batch, N positions of all of them together, n positions
of one, S positions of a key/value cache, D width, H heads, d width of a head, V vocabulary.

Precision is two choices, each float32 or bfloat16: the dtype in which weights are kept, and
compute_dtype, in which activations flow and matrix products run. Norms, softmax and loss are
computed in float32 whichever they are.
"""

import ctypes
import errno
import hashlib
import io
import json
import math
import os
import re
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parent / "demo"
AUDIO = -1  # placeholder id: this position of a sequence holds the recording's next audio frame
LOSS_CHUNK = 1024  # answer positions whose logits exist at once: 1,024 x 151,936 bfloat16 is 311 MB
SOFTMAX_ROWS = {"cpu": 4, "cuda": 256}  # of them, those in float32 at once; on a CPU, in its caches
ACTIVATIONS = {"swish": F.silu, "silu": F.silu, "relu": F.relu, "gelu": F.gelu}

# --- Errors: every message is one line with the file, what was found, what was expected, the remedy

# C0 and C1 controls, marks and overrides of the writing direction, line separators, surrogates.
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object, keep: str = "") -> str:
    """A text of unknown origin as it may be printed: a character that a terminal would obey instead
    of print, unless it is in `keep`, appears as \\u001b and so on."""
    return HIDDEN.sub(lambda m: m[0] if m[0] in keep else f"\\u{ord(m[0]):04x}", str(text))


class UserError(ValueError):
    """A file or a command that cannot be used. The message is one line that is safe to print."""

    def __str__(self) -> str:
        text = visible(super().__str__())
        return text if len(text) <= 2000 else text[:2000] + "..."


class SteadyFile(io.FileIO):
    """A descriptor for writing that, once it refuses to be written to, leads nowhere."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except OSError as error:  # its reader is gone, or its disk is full
            if error.errno == errno.ENOSPC:
                os.write(2, b"what is printed from here on is lost: no space left\n")
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(content)


def steady_output() -> None:
    """Lets no print end a program: standard output and error, but no others in their place, escape
    what their encoding lacks, and are dropped from where they are closed or full. Warnings of
    libraries are left out."""
    warnings.simplefilter("ignore")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the program was started without it
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
        elif stream is getattr(sys, f"__{name}__"):
            file = io.BufferedWriter(SteadyFile(stream.fileno(), "w", closefd=False))
            options = {"errors": "backslashreplace", "line_buffering": True}
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, **options))


def first_line(error: BaseException) -> str:
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip())  # a heading and what is below it
    return text.splitlines()[0][:1500] if text else type(error).__name__


@contextmanager
def one_line_errors(where: object, remedy: str, kind: type = UserError) -> Iterator[None]:
    """The boundary of a loader: whatever a library raises inside is one UserError about `where`."""
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers panics with something that is no Exception
        reason = getattr(error, "strerror", None) or first_line(error)
        raise kind(f"{where}: {reason}; {remedy}") from error


# --- Configurations: field names and defaults are those of the checkpoints' config.json

COPY_CONFIG = "copy the checkpoint's own config.json again, or choose another checkpoint"


def expect(raw: dict, **allowed: list) -> None:
    """Raises ValueError unless each field of raw is absent, null or has an allowed value."""
    for name, values in allowed.items():
        if raw.get(name) is not None and raw[name] not in values:
            expected = " or ".join(map(repr, values)) or "none"
            raise ValueError(f"{name} is {reprlib.repr(raw[name])}, expected {expected}")


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def has_type(value: object, kind: type) -> bool:
    """Whether a parsed JSON value can be a field of this type. Numbers must not be negative."""
    if kind in (int, float):
        return type(value) in (int, kind) and value >= 0
    return kind not in (bool, str) or type(value) is kind


def known_fields(cls: type, raw: dict) -> dict:
    """The fields of the dataclass cls that raw has; null counts as absent. Raises ValueError."""
    known = [f for f in fields(cls) if raw.get(f.name) is not None]
    for f in known:
        if not has_type(raw[f.name], f.type):
            raise ValueError(f"{f.name} is {reprlib.repr(raw[f.name])}, expected {f.type.__name__}")
    return {f.name: raw[f.name] for f in known}


def check_divides(config: object, multiple: str, divisor: str) -> None:
    total, part = getattr(config, multiple), getattr(config, divisor)
    if part == 0 or total % part:
        raise ValueError(f"{multiple} {total} is no multiple of {divisor} {part}")


@dataclass
class EncoderConfig:
    model_type: str = "wav2vec2-bert"
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    feature_projection_input_dim: int = 160
    hidden_act: str = "swish"
    layer_norm_eps: float = 1e-5
    left_max_position_embeddings: int = 64  # frames to the left that have a position of their own
    right_max_position_embeddings: int = 8
    conv_depthwise_kernel_size: int = 31  # frames
    hidden_dropout: float = 0.0
    activation_dropout: float = 0.0
    attention_dropout: float = 0.0
    feat_proj_dropout: float = 0.0
    conformer_conv_dropout: float = 0.1
    layerdrop: float = 0.1
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10  # frames
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10  # channels
    mask_feature_min_masks: int = 0
    max_source_positions: int = 0  # frames of the longest window; 0: any

    def __post_init__(self):
        check_divides(self, "hidden_size", "num_attention_heads")

    @classmethod
    def from_dict(cls, raw: dict) -> "EncoderConfig":
        """The configuration in a parsed config.json. Raises some error for one that is none."""
        raw = {"model_type": "", **raw}
        expect(raw, model_type=["wav2vec2-bert"], position_embeddings_type=["relative_key"])
        expect(raw, feature_projection_input_dim=[160], hidden_act=list(ACTIVATIONS))
        return cls(**known_fields(cls, raw))

    def to_dict(self) -> dict:
        return asdict(self) | {"position_embeddings_type": "relative_key"}


WHISPER_NAMES = {  # of the fields in Whisper's config.json
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "max_source_positions": "max_source_positions",
}


@dataclass
class WhisperConfig(EncoderConfig):
    """The encoder of a Whisper model. A frame of 20 ms holds two of its frames of 10 ms."""

    model_type: str = "whisper"
    hidden_act: str = "gelu"
    max_source_positions: int = 1500

    @classmethod
    def from_dict(cls, raw: dict) -> "WhisperConfig":
        raw = {"num_mel_bins": 0, **raw}
        expect(raw, num_mel_bins=[80, 128], encoder_layerdrop=[0], apply_spec_augment=[False])
        expect(raw, activation_function=list(ACTIVATIONS))
        ours = {name: raw.get(theirs) for theirs, name in WHISPER_NAMES.items()}
        ours["feature_projection_input_dim"] = 2 * raw["num_mel_bins"]
        return cls(**known_fields(cls, ours))

    def to_dict(self) -> dict:
        theirs = {name: getattr(self, ours) for name, ours in WHISPER_NAMES.items()}
        bins = self.feature_projection_input_dim // 2
        return {"model_type": "whisper", "num_mel_bins": bins} | theirs


@dataclass
class AdapterConfig(EncoderConfig):
    """The encoder's configuration, of which the adapter has its sizes and dropout, and its own."""

    output_size: int = 1536  # width of the LLM
    num_adapter_layers: int = 2
    adapter_kernel_size: int = 3  # frames
    adapter_stride: int = 2  # two layers of stride 2: 20 ms frames in, 80 ms frames out
    adapter_act: str = "relu"

    @classmethod
    def between(cls, encoder: EncoderConfig, llm: "LLMConfig", **adapter) -> "AdapterConfig":
        """That of an adapter, of whose fields these two have the last word. Raises UserError."""
        raw = adapter | asdict(encoder) | {"output_size": llm.hidden_size}
        with one_line_errors("the adapter", COPY_CONFIG):
            expect(raw, adapter_act=list(ACTIVATIONS))
            return cls(**known_fields(cls, raw))


@dataclass
class LLMConfig:
    model_type: str  # qwen2, qwen3 or llama
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int = 0  # 0: as many as num_attention_heads
    head_dim: int = 0  # 0: 128 for qwen3, else hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, or none
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    eos_token_id: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        check_divides(self, "num_attention_heads", "num_key_value_heads")
        usual = self.hidden_size // self.num_attention_heads
        self.head_dim = self.head_dim or (128 if self.model_type == "qwen3" else usual)

    to_dict = asdict

    @classmethod
    def from_dict(cls, raw: dict) -> "LLMConfig":
        """The configuration in a parsed config.json. Raises some error for one that is none."""
        raw = {"model_type": "", **raw}
        expect(raw, model_type=["qwen2", "qwen3", "llama"], hidden_act=["silu"], mlp_bias=[False])
        expect(raw, partial_rotary_factor=[1.0], use_sliding_window=[False], quantization_config=[])
        expect(raw, num_experts=[0], num_local_experts=[0])
        for kind in raw.get("layer_types") or []:
            expect({"layer_types": kind}, layer_types=["full_attention"])
        end_ids = raw.get("eos_token_id")
        raw["eos_token_id"] = end_ids if isinstance(end_ids, list) else [end_ids]
        config = cls(**known_fields(cls, raw | rope_fields(raw)))
        valid = [type(x) is int and 0 <= x < config.vocab_size for x in config.eos_token_id]
        if not valid or not all(valid):
            fault = f"eos_token_id is {reprlib.repr(end_ids)}"
            raise ValueError(f"{fault}, expected integers below {config.vocab_size}")
        return config


def rope_fields(raw: dict) -> dict:
    """rope_theta and, if it is Llama 3's, rope_scaling, from whichever of their places has them."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    scaling = {**scaling, "rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
    expect(scaling, rope_type=["default", "llama3"], partial_rotary_factor=[1.0])
    numbers = {"rope_theta": scaling.get("rope_theta", raw.get("rope_theta", 10000.0))}
    llama3 = scaling["rope_type"] == "llama3"
    if llama3:
        names = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
        numbers |= {name: scaling.get(name) for name in names}
    for name, value in numbers.items():
        if not is_number(value) or not 0 < float(value) < float("inf"):
            raise ValueError(f"{name} is {reprlib.repr(value)}, expected a positive number")
    return {"rope_theta": numbers["rope_theta"], "rope_scaling": scaling if llama3 else None}


# --- Layers that state their precision: weights in any dtype, products in the input's


class Linear(nn.Linear):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_parameter("lora_a", None)  # see add_lora
        self.register_parameter("lora_b", None)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if self.lora_b is None:
            return y
        low_rank = F.linear(x, self.lora_a.to(x.dtype))
        return y + F.linear(low_rank, self.lora_b.to(x.dtype)) * self.lora_scale


class Conv1d(nn.Conv1d):
    """A convolution over time as one product: each output reads the frames that it is given,
    x (N, D), reads (N', kernel) -> (N', out). Without them it is one frame each."""

    def forward(self, x: Tensor, reads: Tensor | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if reads is not None:  # frame N is of zeros
            x = F.pad(x, (0, 0, 0, 1))[reads].transpose(1, 2).flatten(1)  # (N', D * kernel)
        return F.linear(x, self.weight.to(x.dtype).flatten(1), bias)


def convolved_frames(rows: "Rows", pooled: "Rows", conv: Conv1d) -> Tensor:
    """The frames (N', kernel) that each output of a convolution reads, of N, or N itself beyond
    either end of the sequence. rows, pooled: the sequences before and after it."""
    N = len(rows.row)
    (kernel,), (stride,) = conv.kernel_size, conv.stride
    tap = torch.arange(kernel, device=rows.row.device) - kernel // 2
    middle = rows.begin[pooled.row] + stride * pooled.offset  # (N',)
    frame = middle[:, None] + tap
    owner = F.pad(rows.row, (0, 1), value=-1)[frame.clamp(-1, N)]
    return torch.where(owner == pooled.row[:, None], frame, N)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        # The standard deviation is 0.02; the usual normal_ takes 3 s on the meta device.
        nn.init.uniform_(self.weight, -0.035, 0.035)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        # The CPU's operator takes bfloat16 with float32 weights, and computes in float32.
        y = x.float() if x.is_cuda else x
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(y, self.normalized_shape, weight, bias, self.eps).type_as(x)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class Pretrained(nn.Module):
    """A module that is read from a checkpoint directory. Its classes have a config_class, the name
    of the part that they are in a SpeechLM, and a module_key(config, key): the module's name of a
    checkpoint's tensor, None if not needed."""

    @classmethod
    def read_config(cls, directory: Path):
        """The configuration of a checkpoint. Raises UserError."""
        where, generation = directory / "config.json", directory / "generation_config.json"
        raw, _ = read_base(directory, cls.part)
        if generation.exists():  # its end tokens win
            raw |= {k: v for k, v in read_json(generation).items() if k == "eos_token_id"}
        with one_line_errors(where, COPY_CONFIG):
            return cls.config_class.from_dict(raw)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype=torch.float32, compute_dtype=None, device="cpu", kernels=None
    ):
        """Loads the checkpoint of a directory or Hub id, in eval mode. Raises UserError, which
        names missing, unexpected or mis-shaped tensors, and ValueError for another dtype than
        float32 and bfloat16."""
        compute_dtype = compute_dtype or dtype
        if {dtype, compute_dtype} - {torch.float32, torch.bfloat16}:
            raise ValueError(f"found {dtype}, {compute_dtype}, expected torch.float32 or bfloat16")
        directory = fetch(source)
        config = cls.read_config(directory)
        _, prefix = read_base(directory, cls.part)
        state = read_state(directory, prefix, partial(cls.module_key, config), dtype, device)
        with one_line_errors(directory, "the weights and config.json are of different models"):
            if config.num_hidden_layers > len(state):  # before so many layers are built
                raise ValueError(f"{len(state)} tensors for {config.num_hidden_layers} layers")
            with torch.device("meta"):
                model = cls(config, compute_dtype, kernels or default_kernels(device))
            model.load_state_dict(state, strict=True, assign=True)
        return model.eval()


# --- Packed sequences, and attention within each of them


class Rows:
    """Whose each position of a packed batch is: sequences of these lengths stand end to end.

    lengths: list of B, with the longest of them; count (B,): the same; bounds (B + 1,) int32: where
    they begin and end, and begin (B,); row (N,): the sequence of each position; offset (N,): its
    place among the batch's own positions of that sequence; position (N,): its place in the
    sequence, which is `start` (B,) further when a cache already holds so many of each."""

    def __init__(self, lengths: list[int], device: torch.device, start: Tensor | None = None):
        self.lengths, self.longest = list(lengths), max(lengths)
        B = len(self.lengths)
        # A step of one position each copies nothing from the host, so that CUDA can replay it.
        if self.longest == 1:
            self.count = torch.ones(B, dtype=torch.long, device=device)
        else:
            self.count = torch.tensor(self.lengths).to(device, non_blocking="cuda" in str(device))
        self.bounds = F.pad(self.count.cumsum(0), (1, 0)).int()
        self.begin = self.bounds[:-1]
        each = torch.arange(B, device=device)
        self.row = each.repeat_interleave(self.count, output_size=sum(self.lengths))
        self.offset = torch.arange(len(self.row), device=device) - self.begin[self.row]
        self.position = self.offset if start is None else self.offset + start[self.row]


def spread_bias(bias: Tensor, left: int) -> Tensor:
    """What relative keys add to the scores of a sequence's n queries and n keys:
    bias (..., n, left + 1 + right) -> (..., n, n). Key j of query i takes the bias of the distance
    j - i, which counts as `left` or `right` where it is further away."""
    n, places = bias.shape[-2:]
    at = torch.arange(n, device=bias.device)
    place = (at - at[:, None] + left).clamp(0, places - 1)  # (n, n)
    return bias.gather(-1, place.expand(*bias.shape[:-1], n))


def attend(q, k, v, rows, causal=False, bias=None, left=0, dropout=0.0) -> Tensor:
    """Attention within each sequence, one after the other: q (N, H, d), k and v (N, Hkv, d), where
    H / Hkv queries share a key -> (N, H, d). bias (N, H, left + 1 + right) is what relative keys
    add to a query's scores, see spread_bias; it is not for causal attention."""
    shared = q.shape[1] != k.shape[1]
    biases = [None] * len(rows.lengths) if bias is None else bias.split(rows.lengths)
    parts = zip(*(x.split(rows.lengths) for x in (q, k, v)), biases, strict=True)
    outputs = []
    for *qkv, bias_n in parts:
        qkv = [x.transpose(0, 1)[None] for x in qkv]  # (1, H, n, d)
        mask = None if bias_n is None else spread_bias(bias_n.transpose(0, 1), left)[None]
        y = F.scaled_dot_product_attention(*qkv, mask, dropout, causal, enable_gqa=shared)
        outputs.append(y[0].transpose(0, 1))
    return torch.cat(outputs)


def attend_varlen(q, k, v, rows, causal=False, bias=None, left=0, dropout=0.0) -> Tensor:
    """attend for CUDA by one kernel for all sequences, unless there is bias, dropout or float32."""
    if bias is not None or dropout or q.dtype == torch.float32:
        # Its loop would be compiled anew for all lengths.
        return torch.compiler.disable(attend)(q, k, v, rows, causal, bias, left, dropout)
    from torch.nn.attention.varlen import varlen_attn

    limits = rows.bounds, rows.bounds, rows.longest, rows.longest
    window, shared = (-1, 0 if causal else -1), q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, *limits, window_size=window, enable_gqa=shared)


def attend_cache(q: Tensor, keys: Tensor, values: Tensor, rows: Rows, mask: Tensor) -> Tensor:
    """Attention of sequences that continue a cache: q (N, H, d); keys, values (B, Hkv, S, d)
    -> (N, H, d). mask (B, n, S): what each new position of a sequence sees."""
    B, n, _ = mask.shape
    H, d = q.shape[1:]
    x = q.new_zeros(B, n, H, d).index_put((rows.row, rows.offset), q)
    # With a mask, enable_gqa would copy the keys for every query head. Queries that share a key
    # become further queries of one head instead.
    x = x.transpose(1, 2).reshape(B, keys.shape[1], -1, d)  # (B, Hkv, H / Hkv * n, d)
    mask = mask.repeat(1, x.shape[2] // n, 1)[:, None]
    x = F.scaled_dot_product_attention(x, keys, values, mask)
    return x.reshape(B, H, n, d).transpose(1, 2)[rows.row, rows.offset]


def depthwise(x: Tensor, weight: Tensor, rows: Rows, convolve: Callable = F.conv1d) -> Tensor:
    """Each channel of x (N, D) convolved with its line of weight (D, 1, kernel) -> (N, D). A frame
    reads itself and those before it in its sequence; convolve works as conv1d does."""
    gap = weight.shape[2] - 1
    # Zeros stand before the first frame of every sequence, so that it reads no other one.
    place = torch.arange(len(x), device=x.device) + gap * (rows.row + 1)
    spaced = x.new_zeros(len(x) + gap * len(rows.lengths), x.shape[1])
    spaced = spaced.index_copy(0, place, x).T.contiguous()[None]  # (1, D, N + gaps)
    y = convolve(spaced, weight, groups=len(weight))
    return y[0].T[place - gap]


def call_layer(layer: nn.Module, *inputs) -> Tensor:
    return layer(*inputs)


@dataclass(frozen=True)
class Kernels:
    """The operators that have faster versions, see default_kernels and train.training_kernels."""

    attend: Callable = attend
    depthwise: Callable = depthwise
    call_layer: Callable = call_layer


PLAIN = Kernels()


def pick_device() -> str:
    """The fastest kind of device that is here: cuda, mps (Apple's) or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_kernels(device: str) -> Kernels:
    """The fastest operators for a device: those of extras/cpu.py or extras/cuda.py, if there."""
    kind = str(device).partition(":")[0]
    with suppress(ImportError):  # there is none of another kind, and that for cuda needs Triton
        operators = import_module(f"extras.{kind}")
        return Kernels(attend=operators.attend, depthwise=operators.depthwise)
    return Kernels(attend=attend_varlen) if kind == "cuda" else PLAIN


def keep_freed_memory() -> None:
    """Freed memory stays with the process, for its next step: glibc (no other is changed) would
    return tensors of 32 MB and more to the system, which fills their pages with zeros when it hands
    them out again (a fifth of a training step on a CPU)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX of glibc's malloc.h
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


# --- Encoder: w2v-BERT 2.0 (arXiv 2312.05187), a Conformer (2005.08100), relative keys (1803.02155)


class FeatureProjection(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        inputs = config.feature_projection_input_dim
        self.layer_norm = LayerNorm(inputs, config.layer_norm_eps)
        self.projection = Linear(inputs, config.hidden_size)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:  # (N, 160) -> (N, D)
        x = self.projection(self.layer_norm(x))
        return F.dropout(x, self.config.feat_proj_dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, config: EncoderConfig, act: str):
        super().__init__()
        self.intermediate_dense = Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[act]
        self.config = config

    def forward(self, x: Tensor) -> Tensor:  # (N, D) -> (N, D)
        x = self.act(self.intermediate_dense(x))
        x = F.dropout(x, self.config.activation_dropout, self.training)
        return F.dropout(self.output_dense(x), self.config.hidden_dropout, self.training)


class SelfAttention(nn.Module):
    """Bidirectional attention of encoder and adapter. With relative keys, the score of query i and
    key j gains q_i . E[clip(j - i, -left, right)], picked from the products with all of E."""

    def __init__(self, config: EncoderConfig, kernels: Kernels, relative_key: bool):
        super().__init__()
        D = config.hidden_size
        self.linear_q = Linear(D, D)
        self.linear_k = Linear(D, D)
        self.linear_v = Linear(D, D)
        self.linear_out = Linear(D, D)
        self.config, self.kernels = config, kernels
        self.distance_embedding = None
        if relative_key:
            places = config.left_max_position_embeddings + 1 + config.right_max_position_embeddings
            self.distance_embedding = Embedding(places, D // config.num_attention_heads)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (N, D) -> (N, D)
        heads = self.config.num_attention_heads
        q = self.linear_q(x).view(len(x), heads, -1)  # (N, H, d)
        k = self.linear_k(x).view(len(x), heads, -1)
        v = self.linear_v(x).view(len(x), heads, -1)
        bias = None
        if self.distance_embedding is not None:
            distances = self.distance_embedding.weight * q.shape[-1] ** -0.5
            # Products on CUDA are slow unless their widths divide by 8.
            spare = -len(distances) % 8 if x.is_cuda else 0
            bias = q @ F.pad(distances, (0, 0, 0, spare)).to(q.dtype).T
            bias = bias[..., : len(distances)]  # (N, H, left + 1 + right)
        left = self.config.left_max_position_embeddings
        dropout = self.config.attention_dropout if self.training else 0.0
        y = self.kernels.attend(q, k, v, rows, bias=bias, left=left, dropout=dropout)
        return self.linear_out(y.flatten(1))


class ConvolutionModule(nn.Module):
    def __init__(self, config: EncoderConfig, kernels: Kernels):
        super().__init__()
        D = config.hidden_size
        self.layer_norm = LayerNorm(D, config.layer_norm_eps)
        self.pointwise_conv1 = Conv1d(D, 2 * D, 1, bias=False)
        taps = config.conv_depthwise_kernel_size
        self.depthwise_conv = nn.Conv1d(D, D, taps, groups=D, bias=False)
        self.depthwise_layer_norm = LayerNorm(D, config.layer_norm_eps)
        self.pointwise_conv2 = Conv1d(D, D, 1, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]
        self.config, self.kernels = config, kernels

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (N, D) -> (N, D)
        x = F.glu(self.pointwise_conv1(self.layer_norm(x)))
        x = self.kernels.depthwise(x, self.depthwise_conv.weight.to(x.dtype), rows)
        x = self.act(self.depthwise_layer_norm(x))
        x = self.pointwise_conv2(x)
        return F.dropout(x, self.config.conformer_conv_dropout, self.training)


class ConformerLayer(nn.Module):
    def __init__(self, config: EncoderConfig, kernels: Kernels):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.ffn1_layer_norm = LayerNorm(D, eps)
        self.ffn1 = FeedForward(config, config.hidden_act)
        self.self_attn_layer_norm = LayerNorm(D, eps)
        self.self_attn = SelfAttention(config, kernels, relative_key=True)
        self.conv_module = ConvolutionModule(config, kernels)
        self.ffn2_layer_norm = LayerNorm(D, eps)
        self.ffn2 = FeedForward(config, config.hidden_act)
        self.final_layer_norm = LayerNorm(D, eps)
        self.config = config

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (N, D) -> (N, D)
        x = x.add(self.ffn1(self.ffn1_layer_norm(x)), alpha=0.5)
        y = self.self_attn(self.self_attn_layer_norm(x), rows)
        x = x + F.dropout(y, self.config.attention_dropout, self.training)
        x = x + self.conv_module(x, rows)
        x = x.add(self.ffn2(self.ffn2_layer_norm(x)), alpha=0.5)
        return self.final_layer_norm(x)


class SpeechEncoder(Pretrained):
    config_class, part = EncoderConfig, "encoder"

    def __init__(self, config: EncoderConfig, compute_dtype=torch.float32, kernels=PLAIN):
        super().__init__()
        self.config, self.compute_dtype, self.kernels = config, compute_dtype, kernels
        self.feature_projection = FeatureProjection(config)
        layers = [ConformerLayer(config, kernels) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        if config.mask_time_prob > 0 or config.mask_feature_prob > 0:
            self.masked_spec_embed = nn.Parameter(torch.rand(config.hidden_size))

    def forward(self, features: Tensor, lengths: list[int]) -> Tensor:
        """Hidden states of the last layer. features (N, 160): log-mel frames of 20 ms, sequence
        after sequence; lengths: how many frames each has, at least 1 -> (N, D).

        Source: Wav2Vec2BertModel of transformers."""
        rows = Rows(lengths, features.device)
        x = self.feature_projection(features.to(self.compute_dtype))
        if self.training and self.config.apply_spec_augment:
            x = self.spec_augment(x, rows)
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        for layer in self.encoder.layers:
            y = self.kernels.call_layer(layer, x, rows)
            if self.training and self.config.layerdrop:
                # A dropped layer is computed, too, so that compiled graphs and gradients keep their
                # shape on every rank.
                dropped = torch.rand((), device=x.device) < self.config.layerdrop
                y = torch.where(dropped, x, y)
            x = y
        return x

    def spec_augment(self, x: Tensor, rows: Rows) -> Tensor:
        """Replaces spans of frames by a learned vector and zeroes spans of channels (SpecAugment,
        arXiv 1904.08779): x (N, D) -> (N, D)."""
        c = self.config
        if c.mask_time_prob > 0:
            spans = c.mask_time_prob, c.mask_time_length, c.mask_time_min_masks
            frames = span_mask(rows.count, max(rows.lengths), *spans)
            masked = frames[rows.row, rows.offset, None]  # (N, 1)
            x = torch.where(masked, self.masked_spec_embed.to(x.dtype), x)
        if c.mask_feature_prob > 0:
            D = x.shape[1]
            spans = c.mask_feature_prob, c.mask_feature_length, c.mask_feature_min_masks
            channels = span_mask(torch.full_like(rows.count, D), D, *spans)
            x = x.masked_fill(channels[rows.row], 0)
        return x

    @staticmethod
    def module_key(config: EncoderConfig, key: str) -> str | None:
        """Of a fine-tune of the encoder (CTC, classification), too, without what it adds."""
        key = key.removeprefix("wav2vec2_bert.")
        added = ("adapter.", "intermediate_ffn.", "lm_head.", "projector.", "classifier.")
        masks = config.mask_time_prob > 0 or config.mask_feature_prob > 0
        if key.startswith(added) or (key == "masked_spec_embed" and not masks):
            return None
        return key


def span_mask(lengths: Tensor, size: int, prob: float, span: int, min_spans: int) -> Tensor:
    """Random spans over at most a share `prob` of each sequence: lengths (B,) -> (B, size) bool.

    A sequence of n positions gets floor(prob * n / span + u) spans, u uniform, at least min_spans
    and as many as fit, at distinct starts. As _compute_mask_indices in transformers, except that
    what fits depends on the sequence, not on the longest of the batch, and that a sequence shorter
    than a span is left alone instead of refused."""
    device = lengths.device
    at = torch.arange(size, device=device)
    count = (prob * lengths / span + torch.rand(len(lengths), device=device)).long()
    count = count.clamp(min=min_spans).minimum(lengths // span)
    # The places with the highest random numbers are where spans start.
    order = torch.rand(len(lengths), size, device=device)
    order = order.masked_fill(at > (lengths - span)[:, None], -1)
    starts = order.argsort(1, descending=True).argsort(1) < count[:, None]  # (B, size)
    # A position is covered if a span began there or less than `span` positions ago.
    begun = starts.cumsum(1)
    return begun > F.pad(begun, (span, 0))[:, :size]


# --- Encoder: Whisper's (arXiv 2212.04356), a Transformer


class WhisperAttention(nn.Module):
    def __init__(self, config: WhisperConfig, kernels: Kernels):
        super().__init__()
        D = config.hidden_size
        self.q_proj = Linear(D, D)
        self.k_proj = Linear(D, D, bias=False)
        self.v_proj = Linear(D, D)
        self.out_proj = Linear(D, D)
        self.config, self.kernels = config, kernels

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (N, D) -> (N, D)
        heads = self.config.num_attention_heads
        q = self.q_proj(x).view(len(x), heads, -1)  # (N, H, d)
        k = self.k_proj(x).view(len(x), heads, -1)
        v = self.v_proj(x).view(len(x), heads, -1)
        dropout = self.config.attention_dropout if self.training else 0.0
        return self.out_proj(self.kernels.attend(q, k, v, rows, dropout=dropout).flatten(1))


class WhisperLayer(nn.Module):
    def __init__(self, config: WhisperConfig, kernels: Kernels):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn_layer_norm = LayerNorm(D, eps)
        self.self_attn = WhisperAttention(config, kernels)
        self.final_layer_norm = LayerNorm(D, eps)
        self.fc1 = Linear(D, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, D)
        self.config = config

    def forward(self, x: Tensor, rows: Rows) -> Tensor:  # (N, D) -> (N, D)
        y = self.self_attn(self.self_attn_layer_norm(x), rows)
        x = x + F.dropout(y, self.config.hidden_dropout, self.training)
        y = ACTIVATIONS[self.config.hidden_act](self.fc1(self.final_layer_norm(x)))
        y = self.fc2(F.dropout(y, self.config.activation_dropout, self.training))
        return x + F.dropout(y, self.config.hidden_dropout, self.training)


class WhisperEncoder(Pretrained):
    config_class, part = WhisperConfig, "encoder"

    def __init__(self, config: WhisperConfig, compute_dtype=torch.float32, kernels=PLAIN):
        super().__init__()
        self.config, self.compute_dtype, self.kernels = config, compute_dtype, kernels
        D = config.hidden_size
        self.conv1 = Conv1d(config.feature_projection_input_dim // 2, D, 3)
        self.conv2 = Conv1d(D, D, 3, 2)
        self.embed_positions = Embedding(config.max_source_positions, D)
        layers = [WhisperLayer(config, kernels) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.layer_norm = LayerNorm(D, config.layer_norm_eps)

    def forward(self, features: Tensor, lengths: list[int]) -> Tensor:
        """As SpeechEncoder's, of features (N, 2 * mel bins). Windows have their real length, not
        30 s. Raises UserError for a longer window than there are positions.

        Source: WhisperEncoder of transformers."""
        longest = self.config.max_source_positions
        if max(lengths) > longest:
            fault = f"a window of {max(lengths) / 50:g} s, expected at most {longest / 50:g} s"
            raise UserError(f"{fault} for this encoder; give shorter windows")
        rows = Rows(lengths, features.device)
        rows_of_10_ms = Rows([2 * n for n in lengths], features.device)
        x = features.to(self.compute_dtype).reshape(2 * len(features), -1)  # (2 N, bins)
        x = F.gelu(self.conv1(x, convolved_frames(rows_of_10_ms, rows_of_10_ms, self.conv1)))
        x = F.gelu(self.conv2(x, convolved_frames(rows_of_10_ms, rows, self.conv2)))  # (N, D)
        x = x + self.embed_positions.weight.to(x.dtype)[rows.position]
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        for layer in self.layers:
            x = self.kernels.call_layer(layer, x, rows)
        return self.layer_norm(x)

    @staticmethod
    def module_key(config: WhisperConfig, key: str) -> str | None:
        """Of a whole Whisper model, too, whose decoder is left out."""
        key = key.removeprefix("model.").removeprefix("encoder.")
        return None if key.startswith(("decoder.", "proj_out.")) else key


# By the model_type of their config.json. What each of them reads is in data.FEATURES.
ENCODERS = {"wav2vec2-bert": SpeechEncoder, "whisper": WhisperEncoder}


def encoder_class(path_or_hub_id: str | Path) -> type[Pretrained]:
    """The class of an encoder's checkpoint. Raises UserError."""
    directory = fetch(path_or_hub_id)
    with one_line_errors(directory / "config.json", COPY_CONFIG):
        raw = {"model_type": "", **read_base(directory, "encoder")[0]}
        expect(raw, model_type=list(ENCODERS))
        return ENCODERS[raw["model_type"]]


# --- Length adapter: the reference system's (arXiv 2506.17019), 20 ms frames in, 80 ms frames out


class AdapterLayer(nn.Module):
    def __init__(self, config: AdapterConfig, kernels: Kernels):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        kernel, stride = config.adapter_kernel_size, config.adapter_stride
        self.residual_layer_norm = LayerNorm(D, eps)
        self.residual_conv = Conv1d(D, 2 * D, kernel, stride)
        self.self_attn_layer_norm = LayerNorm(D, eps)
        self.self_attn_conv = Conv1d(D, 2 * D, kernel, stride)
        self.self_attn = SelfAttention(config, kernels, relative_key=False)
        self.ffn_layer_norm = LayerNorm(D, eps)
        self.ffn = FeedForward(config, config.adapter_act)
        self.config = config

    def forward(self, x: Tensor, reads: Tensor, rows: Rows) -> Tensor:
        """x (N, D) -> (N', D). reads: see convolved_frames; rows: those after the stride."""
        residual = F.glu(self.residual_conv(self.residual_layer_norm(x), reads))  # (N', D)
        y = F.glu(self.self_attn_conv(self.self_attn_layer_norm(x), reads))
        y = self.self_attn(y, rows)
        x = residual + F.dropout(y, self.config.conformer_conv_dropout, self.training)
        return x + self.ffn(self.ffn_layer_norm(x))


class LengthAdapter(nn.Module):
    def __init__(self, config: AdapterConfig, compute_dtype=torch.float32, kernels=PLAIN):
        super().__init__()
        self.config, self.compute_dtype, self.kernels = config, compute_dtype, kernels
        layers = [AdapterLayer(config, kernels) for _ in range(config.num_adapter_layers)]
        self.layers = nn.ModuleList(layers)
        self.enc_to_dec_proj = Linear(config.hidden_size, config.output_size)

    def forward(self, x: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """x (N, D): encoder states of 20 ms, their lengths -> (N', D of the LLM) of 80 ms, theirs.

        Source: Wav2Vec2BertAdapter of transformers and the reference's projection, but past a
        sequence's end a convolution reads zeros (there padding, unless a length divides by 4), and
        no layer is dropped (there it keeps its input's length, and half of the frames are lost)."""
        x = x.to(self.compute_dtype)
        rows = Rows(lengths, x.device)
        for layer in self.layers:
            pooled = Rows([strided_length(n, self.config) for n in rows.lengths], x.device)
            reads = convolved_frames(rows, pooled, layer.residual_conv)
            x = self.kernels.call_layer(layer, x, reads, pooled)
            rows = pooled
        return self.enc_to_dec_proj(x), rows.lengths


def strided_length(frames: int, config: AdapterConfig) -> int:
    """Frames after one layer of the adapter, which pads kernel // 2 frames at either end."""
    padded = frames + 2 * (config.adapter_kernel_size // 2)
    return (padded - config.adapter_kernel_size) // config.adapter_stride + 1


def adapter_length(frames: int, config: AdapterConfig) -> int:
    """80 ms frames after the adapter, of a number of 20 ms frames, at least 1."""
    for _ in range(config.num_adapter_layers):
        frames = strided_length(frames, config)
    return frames


# --- LLM: one decoder for Qwen2.5, Qwen3 and Llama (also SmolLM2, EuroLLM)


def rope(positions: Tensor, config: LLMConfig) -> tuple[Tensor, Tensor]:
    """Rotary angles (arXiv 2104.09864): positions (N,) -> cos, sin (N, 1, d), float32.

    Llama 3 scaling: wavelengths over the original context / low_freq_factor are slowed by `factor`,
    those under context / high_freq_factor are kept, those between are interpolated."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent  # (d / 2,)
    if scaling := config.rope_scaling:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        context = scaling["original_max_position_embeddings"]
        turns = context * frequency / (2 * torch.pi)  # within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angle = (positions[:, None] * frequency).repeat(1, 2)[:, None]  # (N, 1, d)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # The checkpoints pair channel i with channel i + d / 2.
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, config: LLMConfig, kernels: Kernels):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * d, config.num_key_value_heads * d
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = Linear(D, queries, bias=qkv_bias)
        self.k_proj = Linear(D, keys, bias=qkv_bias)
        self.v_proj = Linear(D, keys, bias=qkv_bias)
        self.o_proj = Linear(queries, D, bias=config.attention_bias)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(d, config.rms_norm_eps)
            self.k_norm = RMSNorm(d, config.rms_norm_eps)
        self.config, self.kernels = config, kernels

    def forward(self, x, rows, cos, sin, update=None, mask=None):
        """Causal attention, x (N, D) -> (N, D). update(k, v, rows) puts new keys and values into a
        cache and returns all of it, (B, Hkv, S, d) each; with a mask (B, n, S) attention runs over
        the whole cache, else over the new keys alone."""
        d = self.config.head_dim
        q = self.q_proj(x).view(len(x), -1, d)  # (N, H, d)
        k = self.k_proj(x).view(len(x), -1, d)  # (N, Hkv, d)
        v = self.v_proj(x).view(len(x), -1, d)
        if self.config.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if update is not None:
            keys, values = update(k, v, rows)
        if mask is not None:
            y = attend_cache(q, keys, values, rows, mask)
        else:
            dropout = self.config.attention_dropout if self.training else 0.0
            y = self.kernels.attend(q, k, v, rows, causal=True, dropout=dropout)
        return self.o_proj(y.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: LLMConfig, kernels: Kernels):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, wanted: Tensor | None, *attention) -> Tensor:
        # wanted: the positions that go on, of the last layer; None for all.
        y = self.self_attn(self.input_layernorm(x), *attention)
        x = x + y if wanted is None else x[wanted] + y[wanted]
        return x + self.mlp(self.post_attention_layernorm(x))


class LLM(Pretrained):
    config_class, part = LLMConfig, "llm"

    def __init__(self, config: LLMConfig, compute_dtype=torch.float32, kernels=PLAIN):
        super().__init__()
        self.config, self.compute_dtype, self.kernels = config, compute_dtype, kernels
        embedding = Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, kernels) for _ in range(config.num_hidden_layers)]
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        parts = {"embed_tokens": embedding, "layers": nn.ModuleList(layers), "norm": norm}
        self.model = nn.ModuleDict(parts)
        # Where the two are tied, the embedding matrix itself is the output layer.
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """ids (N,), sequence after sequence of these lengths -> logits (N, V), float32."""
        return self.logits(self.hidden(self.embed(ids), lengths))

    def embed(self, ids: Tensor) -> Tensor:  # (N,) -> (N, D)
        return self.model.embed_tokens(ids).to(self.compute_dtype)

    def hidden(self, x: Tensor, lengths: list[int], cache=None, start=None, wanted=None) -> Tensor:
        """x (N, D) embeddings, sequence after sequence of these lengths -> (N, D) states after the
        final norm, or of the `wanted` positions alone (n, D), for which the last layer does less.

        cache: a sample.KVCache, written in place. start (B,): how many positions of each sequence
        it already holds; None means none, and the sequences begin here."""
        rows = Rows(lengths, x.device, start)
        mask = None
        if start is not None:
            last = start[:, None] + torch.arange(max(lengths), device=x.device)  # (B, n)
            mask = torch.arange(cache.size, device=x.device) <= last[..., None]  # (B, n, S)
        cos, sin = (angle.to(x.dtype) for angle in rope(rows.position, self.config))
        for i, layer in enumerate(self.model.layers):
            chosen = wanted if i == self.config.num_hidden_layers - 1 else None
            update = None if cache is None else partial(cache.update, i)
            x = self.kernels.call_layer(layer, x, chosen, rows, cos, sin, update, mask)
        return self.model.norm(x)

    @property
    def head(self) -> Tensor:
        """The output layer's matrix (V, D)."""
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    def logits(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, V)
        if hasattr(self, "lm_head"):
            return self.lm_head(hidden).float()
        return F.linear(hidden, self.head.to(hidden.dtype)).float()

    @staticmethod
    def module_key(config: LLMConfig, key: str) -> str | None:
        if config.tie_word_embeddings and key.endswith("lm_head.weight"):
            return "model.embed_tokens.weight"  # of which it is a copy
        return None if key.endswith("rotary_emb.inv_freq") else key


# --- SpeechLM: the join, and its loss


class AnswerLoss(torch.autograd.Function):
    """Summed cross-entropy, float32, of hidden (N, D) @ head (V, D).T against labels (N,). Logits
    exist once and for LOSS_CHUNK positions at a time: their gradient is taken there and then, in
    their place (as in arXiv 2410.10989)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        learns, learns_head = ctx.needs_input_grad[0], all(ctx.needs_input_grad[:2])
        weight = head.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        d_hidden, d_head = torch.empty_like(hidden), None
        chunks = [x.split(LOSS_CHUNK) for x in (hidden, labels, d_hidden)]
        for states, targets, d_states in zip(*chunks, strict=True):
            logits = F.linear(states, weight)  # (n, V)
            total += cross_entropy_in_place(logits, targets, learns)
            if learns:
                torch.mm(logits, weight, out=d_states)
            if learns_head:
                d_chunk = logits.T @ states
                # Chunks add up in float32.
                d_head = d_chunk if d_head is None else d_head.float().add_(d_chunk)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * grad, None if d_head is None else d_head * grad, None


def cross_entropy_in_place(logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
    """The summed cross-entropy of logits (n, V) against labels (n,), computed in float32 a few rows
    at a time. With its gradient, that replaces the logits."""
    total = torch.zeros((), device=logits.device)
    rows = SOFTMAX_ROWS["cuda" if logits.is_cuda else "cpu"]
    for part, label in zip(logits.split(rows), labels[:, None].split(rows), strict=True):
        p = part.float()
        top = p.amax(-1, keepdim=True)
        target = p.gather(1, label)
        mass = p.sub_(top).exp_().sum(-1, keepdim=True)
        total += (mass.log() + top - target).sum()
        if with_gradient:
            p.div_(mass).scatter_add_(1, label, torch.full_like(target, -1))
            part.copy_(p)
    return total


class SpeechLM(nn.Module):
    """A sequence is audio frames, instruction tokens, answer tokens (and before them a begin token,
    if the LLM has one), without holes. `ids` (N,) holds the tokens, and AUDIO at the position of
    every audio frame, of which adapter_length says how many a recording gives."""

    def __init__(self, encoder: nn.Module, adapter: LengthAdapter, llm: LLM, prompt: str = "plain"):
        super().__init__()
        self.encoder, self.adapter, self.llm = encoder, adapter, llm
        self.prompt = prompt  # the form of its prompts, see data.make_prompt

    def encode(self, features: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """features (N, 2 * mel bins) of 20 ms, lengths of the recordings -> audio embeddings
        (N', D) of 80 ms, their lengths."""
        return self.adapter(self.encoder(features, lengths), lengths)

    def embed(self, ids: Tensor, audio: Tensor | None = None) -> Tensor:
        """ids (N,), audio (N', D) -> (N, D). Each AUDIO placeholder takes the next frame. Raises
        ValueError, but not with gradients, where it would wait for CUDA, if these are not N'."""
        x = self.llm.embed(ids.clamp(min=0))
        if audio is None:
            return x
        placeholder = ids == AUDIO
        if not torch.is_grad_enabled() and placeholder.sum() != len(audio):
            fault = f"{int(placeholder.sum())} audio placeholders for {len(audio)} audio frames"
            raise ValueError(f"ids hold {fault}; adapter_length says how many a recording needs")
        frame = (placeholder.cumsum(0) - 1).clamp(0, len(audio) - 1)  # (N,)
        return torch.where(placeholder[:, None], audio.to(x.dtype)[frame], x)

    def forward(
        self,
        features: Tensor,
        lengths: list[int],
        ids: Tensor,
        ids_lengths: list[int],
        targets: Tensor,
        warm_start: bool = False,
    ) -> tuple[Tensor, int]:
        """Summed cross-entropy of the answers, or with warm_start their ctc_loss, for which the LLM
        is not run; and the number of their tokens, by which to divide over a step's batches.

        features and lengths as in encode; ids (N',) int64 of sequences of ids_lengths; targets: the
        places in ids of every supervised token (the answer from its first token to its end token),
        none of them a sequence's first."""
        audio, audio_lengths = self.encode(features, lengths)
        if warm_start:
            return self.ctc_loss(audio, audio_lengths, ids, ids_lengths, targets), len(targets)
        hidden = self.llm.hidden(self.embed(ids, audio), ids_lengths, wanted=targets - 1)
        return AnswerLoss.apply(hidden, self.llm.head, ids[targets]), len(targets)

    def token_scores(self, audio: Tensor) -> Tensor:
        """How much audio embeddings (N, D) are like those of every token: products (N, V), float32,
        which deviate by about 3 where the two spread alike. CTC's blank has log(V) instead: it is
        as likely as all tokens together where audio is zero."""
        embeddings = self.llm.model.embed_tokens.weight.detach()
        scale = 3 / (embeddings[::64].float().var() * embeddings.shape[1] ** 0.5)
        return F.linear(audio * scale.to(audio.dtype), embeddings.to(audio.dtype)).float()

    def spell(self, audio: Tensor) -> list[int]:
        """What CTC reads in audio embeddings (N, D): the likeliest tokens, without repeats."""
        scores, ids = self.token_scores(audio).max(1)
        blank = scores < math.log(self.llm.config.vocab_size)
        ids = ids.masked_fill(blank, AUDIO).unique_consecutive()
        return ids[ids != AUDIO].tolist()

    def ctc_loss(self, audio, lengths, ids, ids_lengths, targets) -> Tensor:
        """Summed CTC loss (Graves et al., 2006) of the answers, without their end tokens, in audio
        embeddings (N', D) of these lengths; 0 for an answer of more tokens than embeddings. ids,
        ids_lengths and targets as in forward."""
        if not len(targets):
            return 0 * audio.float().sum()
        rows = Rows(ids_lengths, ids.device)
        spelled = targets[~torch.isin(targets, rows.begin + rows.count - 1)]
        counts = rows.row[spelled].bincount(minlength=len(ids_lengths))
        used, labels = ids[spelled].unique(return_inverse=True)
        # Tokens of no answer in the batch count as one, so that CTC's table is small.
        scores = self.token_scores(audio)
        blank = scores.new_full((len(scores), 1), math.log(scores.shape[1]))
        others = scores.index_fill(1, used, -math.inf).logsumexp(1, keepdim=True)
        table = torch.cat([blank, scores[:, used], others], 1).log_softmax(1).cpu()
        padded = nn.utils.rnn.pad_sequence(table.split(lengths))  # (n, B, 1 + used + 1)
        sizes = torch.tensor(lengths), counts.cpu()
        inputs = padded, labels.cpu() + 1, *sizes
        return F.ctc_loss(*inputs, reduction="sum", zero_infinity=True).to(audio.device)

    @classmethod
    def from_parts(
        cls,
        encoder: str | Path,
        llm: str | Path,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        device: str = "cpu",
        float32: tuple[str, ...] = (),
        kernels: Kernels | None = None,
        prompt: str = "plain",
        **adapter,
    ) -> "SpeechLM":
        """Joins two pretrained checkpoints (directories or Hub ids) by a new adapter. float32: the
        names of the parts whose weights are float32 whatever dtype says; adapter: fields of
        AdapterConfig. Raises UserError."""
        parts = ("encoder", "adapter", "llm")
        dtypes = {part: torch.float32 if part in float32 else dtype for part in parts}
        shared = (compute_dtype or dtype, device, kernels or default_kernels(device))
        encoder = encoder_class(encoder).from_pretrained(encoder, dtypes["encoder"], *shared)
        llm = LLM.from_pretrained(llm, dtypes["llm"], *shared)
        config = AdapterConfig.between(encoder.config, llm.config, **adapter)
        join = LengthAdapter(config, llm.compute_dtype, llm.kernels)
        return cls(encoder, join.to(device, dtypes["adapter"]), llm, prompt).eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        encoder: str | Path = "",
        llm: str | Path = "",
        checkpoint: dict | None = None,
    ) -> "SpeechLM":
        """The trained model of a checkpoint, of a directory of prepare/export.py, or of its Hub id.
        dtype: of all weights, None is the fastest; encoder, llm: where a checkpoint's base models
        are now; checkpoint: load_checkpoint(source), if that is at hand. Raises UserError."""
        checkpoint = checkpoint or load_checkpoint(source)
        bases = {"encoder": encoder, "llm": llm}
        places = {x: bases[x] or locate_base(x, checkpoint["bases"][x]) for x in bases}
        dtype = dtype or fast_dtype(fetch(places["llm"]), device)
        prompt = checkpoint["config"].get("prompt", "plain")  # older checkpoints knew no other
        more = {"prompt": prompt, **checkpoint["adapter"]}
        model = cls.from_parts(*places.values(), dtype, None, device, **more)
        restore(model, checkpoint, {x: fingerprint(places[x]) for x in places}, source)
        return model


# --- Low-rank updates (LoRA, arXiv 2106.09685)


def add_lora(module: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Freezes a module and gives each linear layer of these names a trainable update, float32: it
    adds alpha / rank * B A x to its output, with A (rank, in) random and B (out, rank) zero."""
    module.requires_grad_(False)
    for name, linear in module.named_modules():
        if isinstance(linear, Linear) and name.split(".")[-1] in targets:
            device = linear.weight.device
            linear.lora_scale = alpha / rank
            linear.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
            linear.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
            nn.init.kaiming_uniform_(linear.lora_a, 5**0.5)


def is_update(name: str) -> bool:
    return name.endswith((".lora_a", ".lora_b"))


def merged_state(module: nn.Module, state: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state dict in which every low-rank update is added into its layer's weight, which is the
    module's where the state has none, in the weight's dtype."""
    merged = {name: tensor for name, tensor in state.items() if not is_update(name)}
    for name, a in state.items():
        layer, _, matrix = name.rpartition(".")
        if matrix == "lora_a":
            weight = merged.get(f"{layer}.weight", module.get_submodule(layer).weight.detach())
            update = (alpha / len(a) * state[f"{layer}.lora_b"] @ a).to(weight.device)
            merged[f"{layer}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged


# --- Pretrained checkpoints: a directory of config.json and safetensors, one file or several

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BLOCK = 2**24  # numbers converted at once: 64 MB of float32
DOWNLOAD_AGAIN = "it is truncated or damaged: download it again"
# A directory that prepare/export.py made has all parts of a model. By the model_type in its
# config.json, and by what its configurations of the two base models are called there.
EXPORTED, EXPORTED_CONFIGS = "speech_lm", {"encoder": "audio_config", "llm": "text_config"}
EXPORT_AGAIN = "it is no directory of prepare/export.py: export the model again"


def fetch(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint. A Hub id is downloaded, only the files needed, into the
    Hub's cache (HF_HOME), or taken from there alone (HF_HUB_OFFLINE=1). Raises UserError."""
    path = Path(path_or_hub_id)
    if os.path.isdir(path):
        return path
    if not HUB_ID.fullmatch(str(path_or_hub_id)):
        remedy = "give the directory of a checkpoint or a Hub id (a/b) by --encoder or --llm"
        raise UserError(f"{path}: no such directory; {remedy}")
    from huggingface_hub import snapshot_download  # takes half a second, so only when needed

    configs = ["config.json", "generation_config.json", "tokenizer.json"]
    weights = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    remedy = "give a directory that is here, or check the name, the network and HF_HUB_OFFLINE"
    with one_line_errors(f"{path} (of the Hub)", remedy):
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=configs + weights))


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError."""
    with one_line_errors(path, "a checkpoint has config.json and model.safetensors: copy it again"):
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError(f"found a {type(raw).__name__}, expected a JSON object")
    return raw


def read_base(directory: Path, part: str) -> tuple[dict, str]:
    """The configuration of a base model and what the names of its tensors begin with: nothing where
    it is alone in its directory; in an exported one it is a part. Raises UserError."""
    raw = read_json(directory / "config.json")
    if raw.get("model_type") != EXPORTED:
        return raw, ""
    with one_line_errors(directory / "config.json", EXPORT_AGAIN):
        return dict(raw[EXPORTED_CONFIGS[part]]), f"{part}."


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, single or sharded. Raises UserError."""
    names, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    with one_line_errors(directory, "take all files of the checkpoint's safetensors version"):
        if index.exists() and not (directory / names[0]).is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing or not names:
            raise ValueError(f"no {', '.join(missing) or 'weights'}")
    return [directory / name for name in names]


def fingerprint(path_or_hub_id: str | Path) -> dict[str, str]:
    """Where a checkpoint is, and a hash of its config.json and of 64 KB at 16 places of each of its
    weight files. Raises UserError."""
    directory = fetch(path_or_hub_id)
    read_json(directory / "config.json")  # says what is wrong with it
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in weight_files(directory):
        size = path.stat().st_size
        with one_line_errors(path, "correct its rights"), open(path, "rb") as file:
            for i in range(16):
                file.seek(size * i // 16)
                digest.update(file.read(2**16))
    place = directory.resolve() if os.path.isdir(path_or_hub_id) else path_or_hub_id
    return {"path": str(place), "sha256": digest.hexdigest()}


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer.json of an LLM's directory. Raises UserError."""
    path = Path(directory) / "tokenizer.json"
    with one_line_errors(path, "copy the LLM's own tokenizer.json there"):
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.decode(tokenizer.encode("A b. 1\n中").ids)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    has_config = path.with_name("config.json").exists()
    size = read_base(path.parent, "llm")[0].get("vocab_size") if has_config else None
    if largest < 0 or (is_number(size) and largest >= size):
        fault = f"has tokens up to {largest}, config.json {size}"
        raise UserError(f"{path}: {fault}; copy both from the same LLM")
    return tokenizer


def fast_dtype(directory: Path, device: str) -> torch.dtype:
    """bfloat16 where an LLM, but no tiny one, computes faster in it. Raises UserError."""
    width = read_base(Path(directory), "llm")[0].get("hidden_size")
    large = is_number(width) and width >= 512
    fast_cpu = str(device) == "cpu" and large and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if str(device).startswith("cuda") or fast_cpu else torch.float32


def read_state(directory: Path, prefix: str, rename: Callable, dtype: torch.dtype, device: str):
    """{name: tensor} of a checkpoint's tensors whose keys begin with a prefix, by the names that
    rename(the rest of the key) gives, without those of None. Tensors already in `dtype` stay
    memory-mapped; others are converted in blocks of 64 MB, so that loading needs hardly more memory
    than the weights. Raises UserError."""
    device = str(torch.empty(0, device=device).device)  # "cuda" alone would be GPU 0
    state = {}
    for path in weight_files(directory):
        with one_line_errors(path, DOWNLOAD_AGAIN), safe_open(path, framework="pt") as file:
            for key in file.keys():
                name = rename(key.removeprefix(prefix)) if key.startswith(prefix) else None
                if name is None:
                    continue
                tensor = read_tensor(path, key, dtype, device)
                if name in state and not torch.equal(state[name], tensor):
                    raise ValueError(f"two different {name}, expected one (tie_word_embeddings?)")
                state[name] = tensor
    return state


def read_tensor(path: Path, key: str, dtype: torch.dtype, device: str) -> Tensor:
    """One tensor of a safetensors file in a dtype. Raises ValueError if its own is none of ours."""
    with safe_open(path, framework="pt", device=device) as file:
        stored = file.get_slice(key)
        shape, stored_dtype = stored.get_shape(), stored.get_dtype()
        if stored_dtype not in STORED:
            raise ValueError(f"{key} is {stored_dtype}, expected {', '.join(STORED)}")
        if STORED[stored_dtype] == dtype:
            return file.get_tensor(key)
    tensor = torch.empty(shape, dtype=dtype, device=device)
    rows = max(1, BLOCK // max(1, tensor[0].numel()))
    for i in range(0, len(tensor), rows):
        # The file is opened again for each block, as what it maps into memory stays while it is.
        with safe_open(path, framework="pt", device=device) as file:
            tensor[i : i + rows] = file.get_slice(key)[i : i + rows]
    return tensor


# --- Checkpoints of this project: one file with the parts that were trained, see train.py

CHECKPOINT_PARTS = dict.fromkeys(("model", "adapter", "bases", "config"), dict)
CHECKPOINT_PARTS |= {"data": list, "window": int | float, "step": int}


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint as a dict, its tensors mapped into memory; that of an exported directory or its
    Hub id holds the adapter, and has that directory as both base models. Raises UserError."""
    with one_line_errors(path, "give an align.pt or ift.pt of this project, or train it first"):
        if is_exported(path):
            directory = fetch(path)
            raw = read_json(directory / "config.json")
            expect({"model_type": "", **raw}, model_type=[EXPORTED])
            state = read_state(directory, "adapter.", "adapter.{}".format, torch.float32, "cpu")
            bases = dict.fromkeys(EXPORTED_CONFIGS, fingerprint(path))
            checkpoint = raw["training"] | {"model": state, "bases": bases}
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name, kind in CHECKPOINT_PARTS.items():
            if not isinstance(checkpoint.get(name), kind):
                raise ValueError(f"not a checkpoint of this project (it has no such {name})")
        for name in ("encoder", "llm"):
            Path(checkpoint["bases"][name]["path"])  # raises an error if it is no text
    return checkpoint


def is_exported(path: str | Path) -> bool:
    """Whether this is the place of an exported model, or such a Hub id, instead of a file's."""
    is_hub_id = HUB_ID.fullmatch(str(path)) and Path(path).suffix != ".pt"
    return os.path.isdir(path) or bool(is_hub_id) and not os.path.exists(path)


def locate_base(name: str, base: dict) -> str | Path:
    """Where a base model of a checkpoint is: where it was in training, or in demo/ beside this."""
    for place in (base["path"], DEMO / name):
        with suppress(UserError):
            if os.path.isdir(place) and fingerprint(place)["sha256"] == base["sha256"]:
                return place
    return base["path"]  # of the Hub, or gone, or another model now


def restore(model: SpeechLM, checkpoint: dict, bases: dict, path: str | Path) -> set[str]:
    """Puts the parts of a checkpoint into a model of bases with these fingerprints. Its low-rank
    updates go into the model's if these are of the same layers and rank, else into the weights.
    Returns the parts that differ from the bases by more than low-rank updates. Raises UserError."""
    with one_line_errors(path, "it is damaged or of another version: train it again"):
        for name, base in bases.items():
            trained = checkpoint["bases"][name]
            if trained["sha256"] != base["sha256"]:
                fault = f"{name} {trained['path']}, found another model at {base['path']}"
                raise UserError(f"{path}: was trained on the {fault}; give the same --{name}")
        state = checkpoint["model"]
        complete = changed_parts(state)
        shapes = {name: p.shape for name, p in model.named_parameters() if is_update(name)}
        if shapes != {name: tensor.shape for name, tensor in state.items() if is_update(name)}:
            state = merged_state(model, state, checkpoint["config"]["lora_alpha"])
        missing, unexpected = model.load_state_dict(state, strict=False)
        # Parts of which it holds nothing, or low-rank updates alone, are the base models'.
        missing = [n for n in missing if n.split(".")[0] in complete and not is_update(n)]
        misfits = missing + unexpected
        if misfits:
            raise ValueError(f"{len(misfits)} tensors do not fit, {min(misfits)} first")
        return changed_parts(state)


def changed_parts(state: dict[str, Tensor]) -> set[str]:
    """The parts of which a state dict has more than low-rank updates."""
    return {name.split(".")[0] for name in state if not is_update(name)}
