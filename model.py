"""The speech-language model, in data-flow order: encoder, length adapter, LLM, their join, generation.

Knows tensors and weights, no audio and no text. The rows of a batch stand end to end (see Rows), so nothing computes
padding. Letters in shape comments: B rows of a batch, N positions of all its rows together, n of one row, S positions
of a key/value cache, D width, H heads, d width of a head, V vocabulary. Modules are named as in the pretrained
checkpoints, so loading is one strict load_state_dict.

Precision is two choices, each float32 or bfloat16: the dtype the weights are kept in, and compute_dtype, in which
activations flow and matrix products run. Norms, softmax and loss are computed in float32 whichever they are.
"""

import os
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from prepare.checkpoint import (check_tied, divides, encoder_name, expect, fetch, known_fields, llm_fields, llm_name,
                                load, read_generation, read_json, save)
from prepare.compiled import as_it_is, compiled_call, compiled_flex, compiler_found
from prepare.kernels import Depthwise, Spread

# large tensors on pages of 2 MB: getting a small one takes longer than filling it
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
AUDIO = -1  # placeholder id: this position of a row holds the recording's next audio frame
QUERIES = 192  # of a row that attend at once, on CUDA at least: few enough for their scores to stay in a CPU's caches
LOSS_CHUNK = 1024  # answer positions whose logits exist at once: 1,024 x 151,936 bfloat16 is 311 MB
SOFTMAX_ROWS = {"cpu": 4, "cuda": 256}  # of them, whose probabilities do in float32; on CPU few enough for its caches
ACTIVATIONS = {"swish": F.silu, "silu": F.silu, "relu": F.relu, "gelu": F.gelu}


# ----------------------------------------------------------------------------------------------------------------------
# Configurations: field names and defaults are those of the checkpoints' config.json


@dataclass
class EncoderConfig:
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    feature_projection_input_dim: int = 160
    hidden_act: str = "swish"
    layer_norm_eps: float = 1e-5
    left_max_position_embeddings: int = 64  # frames to the left that have a position of their own
    right_max_position_embeddings: int = 8
    conv_depthwise_kernel_size: int = 31
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

    @classmethod
    def from_dict(cls, raw, where="config.json"):
        expect(raw, where, model_type=["wav2vec2-bert"], position_embeddings_type=["relative_key"],
               feature_projection_input_dim=[160], hidden_act=list(ACTIVATIONS))
        config = cls(**known_fields(cls, raw, where))
        divides(where, config, "hidden_size", "num_attention_heads")
        return config


@dataclass
class AdapterConfig(EncoderConfig):
    """The encoder's configuration, which gives the adapter its width, heads, FFN and dropout, and the adapter's own."""

    output_size: int = 1536  # width of the LLM
    num_adapter_layers: int = 2
    adapter_kernel_size: int = 3  # frames
    adapter_stride: int = 2  # two layers of stride 2: 20 ms frames in, 80 ms frames out
    adapter_act: str = "relu"
    prompt_tokens: int = 0  # embeddings for prompt tokens that the LLM does not have

    @classmethod
    def between(cls, encoder, llm, **adapter):
        """That of an adapter between the models of two configurations, which give its widths whatever `adapter` says."""
        return cls(**known_fields(cls, adapter | asdict(encoder) | {"output_size": llm.hidden_size}, "the adapter"))


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
        usual_head_dim = 128 if self.model_type == "qwen3" else self.hidden_size // self.num_attention_heads
        self.head_dim = self.head_dim or usual_head_dim

    @classmethod
    def from_dict(cls, raw, where="config.json", generation={}):
        """raw: the parsed config.json; generation: the parsed generation_config.json, whose end tokens win."""
        expect(raw, where, model_type=["qwen2", "qwen3", "llama"], hidden_act=["silu"], mlp_bias=[False],
               num_experts=[0], num_local_experts=[0], quantization_config=[None], partial_rotary_factor=[1.0])
        config = cls(**llm_fields(cls, raw, where, generation))
        divides(where, config, "num_attention_heads", "num_key_value_heads")
        return config


# ----------------------------------------------------------------------------------------------------------------------
# Layers that state their precision: weights in any dtype, products in the input's, norms in float32


class Linear(nn.Linear):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        for name in ("lora_a", "lora_b"):  # see add_lora
            self.register_parameter(name, None)

    def forward(self, x):
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.lora_b is None:
            return y
        return y + F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype)) * self.lora_scale


class Conv1d(nn.Conv1d):
    """A convolution over time as one product: each output reads the frames it is given, x (N, kernel, D) -> (N, out)."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x.transpose(1, 2).flatten(1), self.weight.to(x.dtype).flatten(1), bias)


def depthwise(x, weight):
    """x (1, D, T) convolved with a weight (D, 1, kernel) of its own for every channel."""
    return F.conv1d(x, weight, groups=len(weight)) if x.is_cuda else Depthwise.apply(x, weight)


class DepthwiseConv1d(nn.Conv1d):
    """A causal convolution over time, channel by channel: x (N, D) -> (N, D). Zeros stand before the first frame of
    every row, so that it reads no other row."""

    def forward(self, x, rows):
        gap = self.kernel_size[0] - 1
        at = torch.arange(len(x), device=x.device) + gap * (rows.row + 1)
        x = x.new_zeros(len(x) + gap * len(rows.begin), x.shape[1]).index_copy(0, at, x)
        x = rows.depthwise(x.T.contiguous()[None], self.weight.to(x.dtype))  # (1, D, ...)
        return x[0].T[at - gap]


class Embedding(nn.Embedding):
    def reset_parameters(self):
        nn.init.uniform_(self.weight, -0.035, 0.035)  # std 0.02; the usual normal_ takes 3 s on the meta device


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        y = x.float() if x.is_cuda else x  # the CPU's kernel takes bfloat16 with float32 weights, and computes in float32
        return F.layer_norm(y, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).type_as(x)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def fused(x):
    """Whether layers are compiled, and one kernel attends in all rows of a batch: where a GPU trains. Answers have shapes
    of their own and would wait for the compiler."""
    return x.is_cuda and torch.is_grad_enabled() and compiler_found()


def run(layer, checkpointing, *inputs):
    """layer(*inputs); with checkpointing its activations are not kept but computed again in the backward pass."""
    # not with attention dropout, which attends row by row, and not within FSDP, whose hooks can't be compiled
    alone = not layer.self_attn.config.attention_dropout and not hasattr(layer, "_is_fsdp_managed_module")
    compiled = fused(inputs[0]) and alone
    call = compiled_call() if compiled else nn.Module.__call__
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(call, layer, *inputs, use_reentrant=False)
    return call(layer, *inputs)


def add_lora(module, rank, alpha, targets):
    """Freezes a module and gives each linear layer of these names a trainable low-rank update (arXiv 2106.09685): it
    adds alpha / rank * B A x to its output, A (rank, in) random, B (out, rank) zero, both float32."""
    module.requires_grad_(False)
    for name, linear in module.named_modules():
        if isinstance(linear, Linear) and name.split(".")[-1] in targets:
            linear.lora_scale, device = alpha / rank, linear.weight.device
            linear.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
            linear.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
            nn.init.kaiming_uniform_(linear.lora_a, 5**0.5)


def merged_state(module, state=None):
    """The state dict, or part of it, with every low-rank update added into its layer's weight, in the weight's dtype."""
    state = module.state_dict() if state is None else state
    for name in [name.removesuffix("lora_a") for name in state if name.endswith(".lora_a")]:
        a, b, weight = state.pop(name + "lora_a"), state.pop(name + "lora_b"), state[name + "weight"]
        scale = module.get_submodule(name[:-1]).lora_scale
        state[name + "weight"] = (weight.float() + scale * b @ a).to(weight.dtype)
    return state


# ----------------------------------------------------------------------------------------------------------------------
# Packed rows, and attention within each of them


class Rows:
    """Whose each position of a packed batch is: rows of these lengths stand end to end. Made once a batch and shared by
    all layers. lengths are Python integers, as they shape the computation.

    start (B,): positions that a cache already holds of each row. reach: how many frames to the left and to the right have
    a relative key of their own; those further away share the outermost.
    """

    def __init__(self, lengths, device, causal=False, start=None, reach=None):
        self.lengths, self.causal, self.reach = list(lengths), causal, reach
        # a step of one position a row copies nothing from the host, so that CUDA can replay it
        count = torch.tensor(lengths, device=device) if max(lengths) > 1 else torch.ones(len(lengths), dtype=torch.long, device=device)
        self.begin = count.cumsum(0) - count  # (B,)
        self.row = torch.arange(len(count), device=device).repeat_interleave(count, output_size=sum(self.lengths))  # (N,)
        self.offset = torch.arange(len(self.row), device=device) - self.begin[self.row]  # (N,) within the row
        self.position = self.offset if start is None else self.offset + start[self.row]  # (N,)
        self.flex, self.depthwise, self.mask = None, depthwise, None  # mask: made when flex first needs it
        if fused(self.row):
            self.flex, self.depthwise = compiled_flex(), as_it_is(depthwise)


def attend(q, k, v, rows, bias=None, dropout=0.0):
    """Attention within each row: q (N, H, d), k and v (N, Hkv, d) -> (N, H, d). bias (N, H, left + 1 + right): what the
    relative keys add to a query's scores. Where a GPU trains, one kernel does all rows; it has no dropout."""
    if rows.flex is not None and not dropout:
        return rows.flex(q, k, v, rows, bias)
    biases = bias.split(rows.lengths) if bias is not None else rows.lengths
    parts = zip(*(x.split(rows.lengths) for x in (q, k, v)), biases)
    return torch.cat([attend_row(*part, rows, dropout) for part in parts])


def attend_row(q, k, v, bias, rows, dropout):
    """The same of one row by plain products, some queries at a time: on CPU these are faster than
    scaled_dot_product_attention, above all backward."""
    (n, H, d), G, found = q.shape, k.shape[1], []
    q, k, v = q.view(n, G, -1, d), k.transpose(0, 1).contiguous().mT, v.transpose(0, 1).contiguous()  # G groups of queries share a key
    for i in range(0, n, step := max(QUERIES, 2**26 // (H * n)) if q.is_cuda else QUERIES):
        m = min(step, n - i)
        x, end = q[i:i + m].permute(1, 2, 0, 3).reshape(G, -1, d), i + m if rows.causal else n
        if rows.reach is not None:
            added = Spread.apply(bias[i:i + m].transpose(0, 1), i, n, rows.reach[0])  # (H, m, n)
        elif rows.causal:
            added = x.new_full((m, end), -torch.inf).triu(i + 1).repeat(G, H // G, 1)
        else:
            added = x.new_zeros(G, x.shape[1], n)
        p = added.baddbmm_(x, k[..., :end], alpha=d**-0.5).softmax(-1)  # (G, H / G * m, end)
        p = F.dropout(p, dropout, dropout > 0)
        found.append((p @ v[:, :end]).view(G, -1, m, d).permute(2, 0, 1, 3).reshape(m, H, d))
    return torch.cat(found)


def attend_cache(q, keys, values, rows, mask):
    """Attention of rows that continue a cache: q (N, H, d); keys, values (B, Hkv, S, d) -> (N, H, d). mask (B, n, S): what
    each position of a row sees. The linear layers know no padding, but here all rows have n positions."""
    B, n, _ = mask.shape
    x = q.new_zeros(B, n, *q.shape[1:]).index_put((rows.row, rows.offset), q)
    # with a mask, enable_gqa copies the keys for every query head: queries sharing a key become rows instead
    x = x.transpose(1, 2).reshape(B, keys.shape[1], -1, q.shape[2])  # (B, Hkv, H / Hkv * n, d)
    mask = mask.repeat(1, x.shape[2] // n, 1)[:, None]
    x = F.scaled_dot_product_attention(x, keys, values, mask)
    return x.reshape(B, -1, n, q.shape[2]).transpose(1, 2)[rows.row, rows.offset]


# ----------------------------------------------------------------------------------------------------------------------
# Speech encoder: w2v-BERT 2.0 (arXiv 2312.05187), a Conformer (arXiv 2005.08100) with relative keys (arXiv 1803.02155)


class FeatureProjection(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm = LayerNorm(config.feature_projection_input_dim, config.layer_norm_eps)
        self.projection = Linear(config.feature_projection_input_dim, config.hidden_size)
        self.config = config

    def forward(self, x):  # (N, 160) -> (N, D)
        return F.dropout(self.projection(self.layer_norm(x)), self.config.feat_proj_dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, config, act):
        super().__init__()
        self.intermediate_dense = Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[act]
        self.config = config

    def forward(self, x):
        x = F.dropout(self.act(self.intermediate_dense(x)), self.config.activation_dropout, self.training)
        return F.dropout(self.output_dense(x), self.config.hidden_dropout, self.training)


class SelfAttention(nn.Module):
    """Bidirectional attention of encoder and adapter. With relative keys, the score of query i and key j gains
    q_i . E[clip(j - i, -left, right)]: the product with all left + 1 + right embeddings is taken once per query, and
    attend picks from it for every key."""

    def __init__(self, config, relative_key):
        super().__init__()
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (
            Linear(config.hidden_size, config.hidden_size) for _ in range(4))
        self.config = config
        if relative_key:
            positions = config.left_max_position_embeddings + 1 + config.right_max_position_embeddings
            self.distance_embedding = Embedding(positions, config.hidden_size // config.num_attention_heads)

    def forward(self, x, rows):  # (N, D) -> (N, D)
        heads, dropout = self.config.num_attention_heads, self.config.attention_dropout if self.training else 0.0
        q, k, v = (linear(x).view(len(x), heads, -1) for linear in (self.linear_q, self.linear_k, self.linear_v))
        bias = None
        if rows.reach is not None:
            bias = q @ (self.distance_embedding.weight * q.shape[-1] ** -0.5).to(q.dtype).T  # (N, H, left + 1 + right)
        return self.linear_out(attend(q, k, v, rows, bias, dropout).flatten(1))


class ConvolutionModule(nn.Module):
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.layer_norm = LayerNorm(D, config.layer_norm_eps)
        self.pointwise_conv1 = Conv1d(D, 2 * D, 1, bias=False)
        self.depthwise_conv = DepthwiseConv1d(D, D, config.conv_depthwise_kernel_size, groups=D, bias=False)
        self.depthwise_layer_norm = LayerNorm(D, config.layer_norm_eps)
        self.pointwise_conv2 = Conv1d(D, D, 1, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]
        self.config = config

    def forward(self, x, rows):
        x = F.glu(self.pointwise_conv1(self.layer_norm(x)[:, None]))
        x = self.act(self.depthwise_layer_norm(self.depthwise_conv(x, rows)))
        return F.dropout(self.pointwise_conv2(x[:, None]), self.config.conformer_conv_dropout, self.training)


class ConformerLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.ffn1_layer_norm, self.ffn1 = LayerNorm(D, eps), FeedForward(config, config.hidden_act)
        self.self_attn_layer_norm, self.self_attn = LayerNorm(D, eps), SelfAttention(config, relative_key=True)
        self.conv_module = ConvolutionModule(config)
        self.ffn2_layer_norm, self.ffn2 = LayerNorm(D, eps), FeedForward(config, config.hidden_act)
        self.final_layer_norm = LayerNorm(D, eps)
        self.config = config

    def forward(self, x, rows):
        x = x.add(self.ffn1(self.ffn1_layer_norm(x)), alpha=0.5)
        y = self.self_attn(self.self_attn_layer_norm(x), rows)
        x = x + F.dropout(y, self.config.attention_dropout, self.training)
        x = x + self.conv_module(x, rows)
        x = x.add(self.ffn2(self.ffn2_layer_norm(x)), alpha=0.5)
        return self.final_layer_norm(x)


class SpeechEncoder(nn.Module):
    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype, self.checkpointing = config, compute_dtype, False
        self.feature_projection = FeatureProjection(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(
            ConformerLayer(config) for _ in range(config.num_hidden_layers))})
        if config.mask_time_prob > 0 or config.mask_feature_prob > 0:
            self.masked_spec_embed = nn.Parameter(torch.rand(config.hidden_size))

    def forward(self, features, lengths):
        """Hidden states of the last layer. features (N, 160): log-mel frames of 20 ms, row after row; lengths: how many
        each row has, at least 1 -> (N, D). In training, dropout, layerdrop and SpecAugment apply as the config says.
        Source: Wav2Vec2BertModel of transformers.
        """
        c = self.config
        rows = Rows(lengths, features.device, reach=(c.left_max_position_embeddings, c.right_max_position_embeddings))
        x = self.feature_projection(features.to(self.compute_dtype))
        if self.training and c.apply_spec_augment:
            x = self.spec_augment(x, rows)
        x = F.dropout(x, c.hidden_dropout, self.training)
        for layer in self.encoder.layers:
            y = run(layer, self.checkpointing, x, rows)
            # a dropped layer is computed too, so that compiled graphs and gradients keep their shape on every rank
            x = torch.where(torch.rand((), device=x.device) < c.layerdrop, x, y) if self.training and c.layerdrop else y
        return x

    def spec_augment(self, x, rows):
        """Replaces spans of frames by a learned vector and zeroes spans of channels (SpecAugment, arXiv 1904.08779)."""
        c, lengths = self.config, torch.tensor(rows.lengths, device=x.device)
        if c.mask_time_prob > 0:
            spans = span_mask(lengths, max(rows.lengths), c.mask_time_prob, c.mask_time_length, c.mask_time_min_masks)
            x = torch.where(spans[rows.row, rows.offset, None], self.masked_spec_embed.to(x.dtype), x)
        if c.mask_feature_prob > 0:
            D = x.shape[1]
            channels = torch.full_like(lengths, D)
            spans = span_mask(channels, D, c.mask_feature_prob, c.mask_feature_length, c.mask_feature_min_masks)
            x = x.masked_fill(spans[rows.row], 0)
        return x

    @classmethod
    def from_pretrained(cls, path_or_hub_id, dtype=torch.float32, compute_dtype=None, device="cpu"):
        """Loads a w2v-BERT 2.0 checkpoint, or the encoder inside a fine-tune of it (CTC, classification), whose head,
        adapter and intermediate FFN are left out. Raises CheckpointError."""
        directory = fetch(path_or_hub_id)
        config = EncoderConfig.from_dict(read_json(directory / "config.json"), directory / "config.json")
        return load(lambda compute: cls(config, compute), directory, lambda key: encoder_name(key, config), dtype,
                    compute_dtype, device)

    def save_pretrained(self, directory):
        save(directory, encoder_dict(self.config), self.state_dict())


def encoder_dict(config):
    return {"model_type": "wav2vec2-bert", "position_embeddings_type": "relative_key", **asdict(config)}


def span_mask(lengths, size, prob, span, min_spans):
    """Random spans covering at most a share `prob` of each row: lengths (B,) -> (B, size) bool.

    A row of n positions gets floor(prob * n / span + u) spans, u uniform, at least min_spans and as many as fit, at
    distinct starts. As _compute_mask_indices in transformers, except that what fits depends on the row, not on the
    longest row of the batch, and a row shorter than a span is left alone instead of refused.
    """
    device, at = lengths.device, torch.arange(size, device=lengths.device)
    count = (prob * lengths / span + torch.rand(len(lengths), device=device)).long().clamp(min=min_spans)
    count = count.minimum(lengths // span)
    order = torch.rand(len(lengths), size, device=device).masked_fill(at > (lengths - span)[:, None], -1)
    starts = order.argsort(1, descending=True).argsort(1) < count[:, None]  # (B, size)
    begun = starts.cumsum(1)
    return begun > F.pad(begun, (span, 0))[:, :size]  # a span began here or less than `span` positions ago


# ----------------------------------------------------------------------------------------------------------------------
# Length adapter: the reference system's (arXiv 2506.17019), 20 ms frames in, 80 ms frames of the LLM's width out


class AdapterLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.residual_layer_norm = LayerNorm(D, eps)
        self.residual_conv = Conv1d(D, 2 * D, config.adapter_kernel_size, config.adapter_stride)
        self.self_attn_layer_norm = LayerNorm(D, eps)
        self.self_attn_conv = Conv1d(D, 2 * D, config.adapter_kernel_size, config.adapter_stride)
        self.self_attn = SelfAttention(config, relative_key=False)
        self.ffn_layer_norm, self.ffn = LayerNorm(D, eps), FeedForward(config, config.adapter_act)
        self.config = config

    def forward(self, x, reads, rows):
        """x (N, D) -> (N', D): output i convolves the frames reads[i] (N', kernel) of x, N for a frame of zeros; rows are
        those after the stride."""
        def pool(norm, conv):
            return F.glu(conv(F.pad(norm(x), (0, 0, 0, 1))[reads]))

        residual = pool(self.residual_layer_norm, self.residual_conv)
        y = self.self_attn(pool(self.self_attn_layer_norm, self.self_attn_conv), rows)
        x = residual + F.dropout(y, self.config.conformer_conv_dropout, self.training)
        return x + self.ffn(self.ffn_layer_norm(x))


class LengthAdapter(nn.Module):
    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.layers = nn.ModuleList(AdapterLayer(config) for _ in range(config.num_adapter_layers))
        self.enc_to_dec_proj = Linear(config.hidden_size, config.output_size)
        if config.prompt_tokens:
            self.prompt_tokens = Embedding(config.prompt_tokens, config.output_size)

    def forward(self, x, lengths):
        """x (N, D) encoder states of 20 ms, lengths of the rows -> (N', LLM width) of 80 ms, lengths.

        Source: Wav2Vec2BertAdapter of transformers and the reference's projection, with two differences: a convolution
        reads zeros past a row's end (there, padding, unless a length divides by 4), and there is no layerdrop (there a
        dropped layer keeps its input's length and half of the frames get masked out).
        """
        c, x, rows = self.config, x.to(self.compute_dtype), Rows(lengths, x.device)
        for layer in self.layers:
            after = Rows([strided_length(n, c) for n in rows.lengths], x.device)
            frame = torch.arange(c.adapter_kernel_size, device=x.device) - c.adapter_kernel_size // 2
            frame = frame + c.adapter_stride * after.offset[:, None] + rows.begin[after.row, None]  # (N', kernel), in x
            within = F.pad(rows.row, (0, 1), value=-1)[frame.clamp(-1, len(x))] == after.row[:, None]
            x, rows = run(layer, False, x, torch.where(within, frame, len(x)), after), after
        return self.enc_to_dec_proj(x), rows.lengths


def adapter_length(frames, config):
    """80 ms frames after the adapter, of a number of 20 ms frames, at least 1."""
    for _ in range(config.num_adapter_layers):
        frames = strided_length(frames, config)
    return frames


def strided_length(frames, config):
    """Frames after one layer of the adapter, whose convolutions pad kernel // 2 frames of zeros at either end."""
    return (frames + 2 * (config.adapter_kernel_size // 2) - config.adapter_kernel_size) // config.adapter_stride + 1


# ----------------------------------------------------------------------------------------------------------------------
# LLM: one decoder for Qwen2.5, Qwen3 and Llama (also SmolLM2, EuroLLM)


def rope(positions, config):
    """Rotary angles (arXiv 2104.09864): positions (N,) -> cos, sin (N, 1, d), float32.

    Llama 3 scaling: wavelengths over the original context / low_freq_factor are slowed by `factor`, those under
    context / high_freq_factor are kept, those between are interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent  # (head_dim / 2,)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # within the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / s["factor"]
    angle = (positions[:, None] * frequency).repeat(1, 2)[:, None]  # (N, 1, d)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)  # the checkpoints pair channel i with channel i + head_dim / 2
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = Linear(D, config.num_attention_heads * d, bias=qkv_bias)
        self.k_proj = Linear(D, config.num_key_value_heads * d, bias=qkv_bias)
        self.v_proj = Linear(D, config.num_key_value_heads * d, bias=qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * d, D, bias=config.attention_bias)
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.config = config

    def forward(self, x, rows, cos, sin, cache=None, mask=None):
        """Causal attention, x (N, D). With a cache, the new keys and values are written into it; with a mask (B, n, S),
        attention runs over the whole cache, else over the new keys alone."""
        q, k, v = (proj(x).view(len(x), -1, self.config.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (N, H, d), (N, Hkv, d)
        if cache is not None:
            for store, new in zip(cache, (k, v)):
                store[rows.row, :, rows.position] = new
        if mask is None:
            y = attend(q, k, v, rows, dropout=self.config.attention_dropout if self.training else 0.0)
        else:
            y = attend_cache(q, *cache, rows, mask)
        return self.o_proj(y.flatten(1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(config.hidden_size, config.rms_norm_eps), Attention(config)
        self.post_attention_layernorm, self.mlp = RMSNorm(config.hidden_size, config.rms_norm_eps), MLP(config)

    def forward(self, x, wanted, *attention):  # wanted: the positions that go on, of the last layer; None for all
        y = self.self_attn(self.input_layernorm(x), *attention)
        x = x + y if wanted is None else x[wanted] + y[wanted]
        return x + self.mlp(self.post_attention_layernorm(x))


class LLM(nn.Module):
    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype, self.checkpointing = config, compute_dtype, False
        self.fast = None  # takes decode_step's place in generation, see prepare/fast_decode.py
        self.model = nn.ModuleDict({
            "embed_tokens": Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:  # tied: the embedding matrix itself is the output layer
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids, lengths):
        """ids (N,), row after row of these lengths -> logits (N, V), float32."""
        return self.logits(self.hidden(self.embed(ids), lengths))

    def embed(self, ids):
        return self.model.embed_tokens(ids).to(self.compute_dtype)  # (N,) -> (N, D)

    def hidden(self, x, lengths, cache=None, start=None, wanted=None):
        """x (N, D) embeddings, row after row of these lengths -> (N, D) states after the final norm, or those of the
        `wanted` positions alone (n, D): behind its keys and values, the last layer computes no others.

        cache: one (keys, values) pair a layer, each (B, Hkv, S, d), written in place. start (B,): how many positions of
        each row the cache already holds; None means none, and the rows begin here.
        """
        rows, mask = Rows(lengths, x.device, causal=True, start=start), None
        if start is not None:
            last = start[:, None] + torch.arange(max(rows.lengths), device=x.device)  # (B, n)
            mask = torch.arange(cache[0][0].shape[2], device=x.device) <= last[..., None]  # (B, n, S)
        cos, sin = (table.to(x.dtype) for table in rope(rows.position, self.config))
        for i, layer in enumerate(self.model.layers):
            here = wanted if i == len(self.model.layers) - 1 else None
            x = run(layer, self.checkpointing, x, here, rows, cos, sin, None if cache is None else cache[i], mask)
        return self.model.norm(x)

    @property
    def head(self):
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight  # (V, D)

    def logits(self, hidden):
        if hasattr(self, "lm_head"):
            return self.lm_head(hidden).float()  # (N, D) -> (N, V)
        return F.linear(hidden, self.head.to(hidden.dtype)).float()

    @classmethod
    def from_pretrained(cls, path_or_hub_id, dtype=torch.float32, compute_dtype=None, device="cpu"):
        """Loads a Qwen2.5, Qwen3 or Llama checkpoint, single-file or sharded. Raises CheckpointError."""
        directory = fetch(path_or_hub_id)
        config = LLMConfig.from_dict(read_json(directory / "config.json"), directory / "config.json",
                                     read_generation(directory))
        check_tied(config, directory)
        return load(lambda compute: cls(config, compute), directory, lambda key: llm_name(key, config), dtype,
                    compute_dtype, device)

    def save_pretrained(self, directory):
        save(directory, asdict(self.config), self.state_dict(), self.config.eos_token_id)


# ----------------------------------------------------------------------------------------------------------------------
# SpeechLM: the join


class AnswerLoss(torch.autograd.Function):
    """Summed cross-entropy, float32, of hidden (N, D) @ head (V, D).T against labels (N,). Logits exist once and for
    LOSS_CHUNK positions at a time: their gradient is taken there and then (as in arXiv 2410.10989), in their place."""

    @staticmethod
    def forward(ctx, hidden, head, labels):
        weight, total = head.to(hidden.dtype), torch.zeros((), device=hidden.device)
        d_hidden, d_head, at_once = torch.empty_like(hidden), None, SOFTMAX_ROWS["cuda" if hidden.is_cuda else "cpu"]
        for h, y, d in zip(*(t.split(LOSS_CHUNK) for t in (hidden, labels, d_hidden))):
            logits = F.linear(h, weight)  # (n, V)
            for some, label in zip(logits.split(at_once), y[:, None].split(at_once)):
                p = some.float()
                top, logit = p.amax(-1, keepdim=True), p.gather(1, label)
                size = p.sub_(top).exp_().sum(-1, keepdim=True)
                total += (size.log() + top - logit).sum()
                if ctx.needs_input_grad[0]:
                    some.copy_(p.div_(size).scatter_add_(1, label, torch.full_like(logit, -1)))
            if ctx.needs_input_grad[0]:
                torch.mm(logits, weight, out=d)
            if all(ctx.needs_input_grad[:2]):
                more = logits.T @ h
                d_head = more if d_head is None else d_head.float().add_(more)  # chunks add up in float32
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(None if d is None else d * grad for d in ctx.saved_tensors), None


class SpeechLM(nn.Module):
    """A row is prompt tokens, audio frames, instruction tokens, answer tokens, without holes; rows stand end to end.

    `ids` (N,) holds the tokens, and AUDIO at the position of every audio frame; adapter_length says how many frames a
    recording gives. The lengths of rows, in frames or in ids, are lists of Python integers.
    """

    def __init__(self, encoder, adapter, llm):
        super().__init__()
        self.encoder, self.adapter, self.llm = encoder, adapter, llm

    def encode(self, features, lengths):
        """features (N, 160) of 20 ms, lengths of the recordings -> audio embeddings (N', D) of 80 ms, their lengths.
        With encoder None, features are the encoder's states (N, D), computed before."""
        return self.adapter(features if self.encoder is None else self.encoder(features, lengths), lengths)

    def embed(self, ids, audio=None):
        """ids (N,), audio (N', D) -> (N, D). Each AUDIO placeholder takes the next frame; ids below AUDIO are the
        adapter's own prompt tokens, the first of them AUDIO - 1."""
        x = self.llm.embed(ids.clamp(min=0))
        if self.adapter is not None and self.adapter.config.prompt_tokens:
            own = self.adapter.prompt_tokens((AUDIO - 1 - ids).clamp(0, self.adapter.config.prompt_tokens - 1))
            x = torch.where((ids < AUDIO)[:, None], own.to(x.dtype), x)
        if audio is None:
            return x
        here = ids == AUDIO
        return torch.where(here[:, None], audio.to(x.dtype)[(here.cumsum(0) - 1).clamp(0, len(audio) - 1)], x)

    def forward(self, features, lengths, ids, ids_lengths, targets):
        """Summed cross-entropy of the answers, and the number of their tokens.

        features (N, 160), lengths; ids (N,) int64, ids_lengths, with as many placeholders in a row as adapter_length
        says; targets: the positions in ids of every supervised token (the answer from its first token to its end
        token), none of them a row's first. Divide by the count over all batches of a step, not by each batch's.
        """
        audio, _ = self.encode(features, lengths)
        hidden = self.llm.hidden(self.embed(ids, audio), ids_lengths, wanted=targets - 1)
        return AnswerLoss.apply(hidden, self.llm.head, ids[targets]), len(targets)

    @torch.no_grad()
    def read(self, ids, ids_lengths, features=None, lengths=None, heard=None):
        """Encodes recordings and reads the given beginning of each row once; the result is a `prefix` for generate,
        which may then be asked any number of instructions. Arguments as in generate."""
        x = self.embed(ids, self.checked_audio(ids, ids_lengths, features, lengths, heard))
        cache = new_cache(self.llm, len(ids_lengths), max(ids_lengths))
        self.llm.hidden(x, ids_lengths, cache, wanted=[])
        return Prefix(cache, ids_lengths)

    @torch.no_grad()
    def generate(self, ids, ids_lengths, features=None, lengths=None, heard=None, **options):
        """Answers for a batch of rows. ids (N,) up to the answer, row after row, ids_lengths; features and lengths as in
        encode, or heard, what encode gave, or none of them when a prefix has the audio; options as in the function
        generate. Returns a list of ids for each row."""
        x = self.embed(ids, self.checked_audio(ids, ids_lengths, features, lengths, heard))
        return generate(self.llm, x, ids_lengths, **options)

    @torch.no_grad()
    def score(self, ids, ids_lengths, answer_lengths, prefix, prefix_rows):
        """log p of the last answer_lengths ids of each row, which continue rows of a prefix: (B,), float32."""
        start, cache = continued_cache(self.llm, prefix, prefix_rows, max(ids_lengths))
        ends, device = accumulate(ids_lengths), ids.device
        targets = torch.cat([torch.arange(end - n, end, device=device) for end, n in zip(ends, answer_lengths)])
        hidden = self.llm.hidden(self.embed(ids), ids_lengths, cache, start, targets - 1)
        log_p = self.llm.logits(hidden).log_softmax(-1).gather(1, ids[targets, None])[:, 0]
        return torch.stack([some.sum() for some in log_p.split(answer_lengths)])

    def checked_audio(self, ids, ids_lengths, features, lengths, heard):
        heard = self.encode(features, lengths) if features is not None else heard
        audio, found = heard or (None, [0] * len(ids_lengths))
        places = [(row == AUDIO).sum().item() for row in ids.split(ids_lengths)]
        if places != list(found):
            raise ValueError(f"rows hold {places} audio placeholders for {list(found)} audio frames; "
                             "adapter_length(frames) says how many a row needs")
        return audio

    @classmethod
    def from_parts(cls, encoder, llm, dtype=torch.float32, compute_dtype=None, device="cpu", float32=(), **adapter):
        """Joins two pretrained checkpoints (directories or Hub ids) by a new adapter. float32: names of the parts whose
        weights are float32 whatever dtype says; adapter: fields of AdapterConfig. Raises CheckpointError."""
        kept = {part: torch.float32 if part in float32 else dtype for part in ("encoder", "adapter", "llm")}
        encoder = SpeechEncoder.from_pretrained(encoder, kept["encoder"], compute_dtype or dtype, device)
        llm = LLM.from_pretrained(llm, kept["llm"], compute_dtype or dtype, device)
        config = AdapterConfig.between(encoder.config, llm.config, **adapter)
        return cls(encoder, LengthAdapter(config, llm.compute_dtype).to(device, kept["adapter"]), llm).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Generation: prefill, decode step, drivers


class Prefix(NamedTuple):
    """Rows already read: the cache's keys and values, and how many positions each row fills."""

    cache: list
    lengths: list


def new_cache(llm, batch, size):
    """One (keys, values) pair a layer, each (B, Hkv, S, head_dim), zeros in the compute dtype."""
    c, weight, size = llm.config, llm.model.embed_tokens.weight, llm.fast.room(size) if llm.fast else size
    shape = (batch, c.num_key_value_heads, size, c.head_dim)
    return [tuple(torch.zeros(shape, dtype=llm.compute_dtype, device=weight.device) for _ in range(2))
            for _ in range(c.num_hidden_layers)]


def continued_cache(llm, prefix, rows, more):
    """How many positions these rows of a prefix fill (B,), and a cache that holds them with room for `more`."""
    lengths = [prefix.lengths[row] for row in rows]
    cache = new_cache(llm, len(rows), max(lengths) + more)
    for new, old in zip(cache, prefix.cache):
        for store, kept in zip(new, old):
            store[:, :, :max(lengths)] = kept[rows, :, :max(lengths)]
    return torch.tensor(lengths, device=cache[0][0].device), cache


def filled(cache, size):
    """The first `size` positions of a cache, as views."""
    return [tuple(store[:, :, :size] for store in layer) for layer in cache]


def prefill(llm, x, lengths, cache, start=None):
    """Reads x (N, D), row after row of these lengths, into the cache, behind the `start` (B,) positions it already
    holds. Returns the logits (B, V) that follow each row's last position."""
    return llm.logits(llm.hidden(x, lengths, cache, start, [end - 1 for end in accumulate(lengths)]))


def decode_step(llm, ids, positions, cache):
    """One token a row: ids (B,) at positions (B,) go into the cache; returns the logits (B, V) of the next."""
    return llm.logits(llm.hidden(llm.embed(ids), [1] * len(ids), cache, positions))


def sample(logits, temperature, top_p, generator):
    """logits (B, V) -> ids (B,): the most likely at temperature 0, else drawn from the smallest set of tokens whose
    probabilities reach top_p (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1).sort(descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # multinomial normalises again
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]


@torch.no_grad()
def generate(llm, x, lengths, max_new_tokens=256, num_beams=1, length_penalty=1.0, temperature=0.0, top_p=1.0,
             generator=None, on_token=None, prefix=None, prefix_rows=None, never_first=(), stop_loops=False):
    """Continues rows of embeddings, greedily unless told otherwise, until each meets an end token.

    x (N, D), row after row of these lengths. num_beams > 1 is beam search with scores sum(log p) / n**length_penalty;
    temperature and top_p are for sampling, with an optional torch generator. on_token(row, id) is called for every
    token as it is made (not with beams). prefix: rows read before, of which prefix_rows are continued here (row b by
    row b when not given). never_first: ids that no answer begins with. stop_loops ends an answer that repeats
    itself and keeps one turn of the loop. Returns a list of ids for each row, without the end token. Raises ValueError when a row
    could outgrow the model's context.
    """
    B = len(lengths)
    if max_new_tokens < 1 or num_beams < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and num_beams {num_beams} must be at least 1, temperature "
                         f"{temperature} at least 0, top_p {top_p} above 0 and at most 1")
    if num_beams > 1 and (temperature > 0 or on_token is not None):
        raise ValueError("beam search neither samples nor streams; give num_beams, or temperature and on_token")
    if min(lengths) < 1 or sum(lengths) != len(x):
        raise ValueError(f"row lengths {lengths} of {len(x)} positions; expected at least 1 each, and as many in all")
    if prefix is not None and prefix_rows is None and len(prefix.lengths) != B:
        raise ValueError(f"a prefix of {len(prefix.lengths)} rows for {B} rows; say with prefix_rows which to continue")
    prefix_rows = range(B) if prefix_rows is None else prefix_rows
    whole = [n + prefix.lengths[row] for n, row in zip(lengths, prefix_rows)] if prefix else lengths
    needed, context = max(whole) + max_new_tokens, llm.config.max_position_embeddings
    if needed > context:
        raise ValueError(f"a row needs {needed} positions with its {max_new_tokens} new tokens, the model's context "
                         f"has {context}; give shorter audio or text, or lower max_new_tokens")
    if prefix is None:
        start, cache = None, new_cache(llm, B, needed)
    else:
        start, cache = continued_cache(llm, prefix, list(prefix_rows), max(lengths) + max_new_tokens)
    logits = prefill(llm, x, lengths, cache, start)
    logits[:, list(never_first)] = float("-inf")
    positions = torch.tensor(whole, device=x.device)
    if num_beams > 1:
        answers = beam_search(llm, logits, positions, cache, max_new_tokens, num_beams, length_penalty)
        return [ids[:len(ids) - looped(ids)] if stop_loops else ids for ids in answers]

    answers, done, rows = [[] for _ in range(B)], [False] * B, list(range(B))  # rows: those in the batch
    for step in range(max_new_tokens):
        ids = sample(logits, temperature, top_p, generator)
        for row, token in zip(rows, ids.tolist()):
            done[row] = done[row] or token in llm.config.eos_token_id
            if not done[row]:
                answers[row].append(token)
                if on_token is not None:
                    on_token(row, token)
            if stop_loops and not done[row] and (extra := looped(answers[row])):
                done[row], answers[row] = True, answers[row][:-extra]
        if all(done) or step == max_new_tokens - 1:
            return answers
        order = sorted(range(len(rows)), key=lambda i: done[rows[i]])
        kept = 1 << (len(rows) - sum(done[row] for row in rows) - 1).bit_length()
        if kept < len(rows):  # those that are done leave the batch, which shrinks to a power of two
            order = order[:kept]
            rows, ids, positions = [rows[i] for i in order], ids[order], positions[order]
            cache = [tuple(store[order] for store in layer) for layer in cache]
        logits = (llm.fast or decode_step)(llm, ids, positions + step, filled(cache, max(whole[row] for row in rows) + step + 1))


def looped(ids):
    """How many ids at the end repeat what stands before them: those of a loop of up to 32 ids gone through at least four
    times and over at least 24 ids, without its first turn; 0 if there is no such loop."""
    for period in range(1, 33):
        size = max(4 * period, 24)
        if len(ids) >= size and ids[-size:-period] == ids[period - size:]:
            while size < len(ids) and ids[-size - 1] == ids[period - size - 1]:
                size += 1
            return size - period
    return 0


def beam_search(llm, logits, positions, cache, max_new_tokens, num_beams, length_penalty):
    """Keeps the num_beams likeliest beginnings of each row and stops a row when no beginning can still beat its
    num_beams finished answers at the present length. Same results as beam search in transformers.

    logits (B, V), positions (B,) and cache as prefill leaves them. Returns B lists of ids, without the end token.
    """
    (B, V), K, eos = logits.shape, num_beams, llm.config.eos_token_id
    rows = torch.arange(B, device=logits.device).repeat_interleave(K)
    cache = [tuple(store[rows] for store in layer) for layer in cache]  # (B * K, Hkv, S, head_dim)
    logits, positions, size = logits[rows], positions[rows], int(positions.max())
    scores = torch.tensor([0.0] + [float("-inf")] * (K - 1), device=logits.device).repeat(B)  # (B * K,)
    beams = [[[]] * K for _ in range(B)]
    finished, done = [[] for _ in range(B)], [False] * B
    for step in range(1, max_new_tokens + 1):
        totals = (scores[:, None] + logits.log_softmax(-1)).view(B, K * V)
        # a beam can end in len(eos) ways, so this many candidates leave num_beams that go on
        best, index = (t.tolist() for t in totals.topk(min(K * max(2, 1 + len(eos)), K * V)))
        chosen = []  # (score, row of the old cache, token) of every new beam
        for b in range(B):
            going_on = []
            for rank, (score, i) in enumerate(zip(best[b], index[b])):
                parent, token = divmod(i, V)
                if token in eos or step == max_new_tokens:
                    if rank < K and not done[b]:
                        ids = beams[b][parent] + [token] * (token not in eos)
                        finished[b].append((score / step**length_penalty, ids))
                elif len(going_on) < K:
                    going_on.append((score, parent, token))
            finished[b] = sorted(finished[b], key=lambda f: -f[0])[:K]
            if going_on:
                done[b] |= len(finished[b]) == K and going_on[0][0] / step**length_penalty <= finished[b][-1][0]
                beams[b] = [beams[b][parent] + [token] for _, parent, token in going_on]
                chosen += [(score, b * K + parent, token) for score, parent, token in going_on]
        if all(done) or step == max_new_tokens:
            return [f[0][1] for f in finished]
        scores = torch.tensor([c[0] for c in chosen], device=logits.device)
        rows, ids = torch.tensor([c[1:] for c in chosen], device=logits.device).T
        for layer in cache:
            for store in layer:
                store[:, :, :size + step - 1] = store[rows, :, :size + step - 1]
        logits = (llm.fast or decode_step)(llm, ids, positions + step - 1, filled(cache, size + step))
