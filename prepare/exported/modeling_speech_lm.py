"""A speech-language model for transformers: speech encoder, length adapter, LLM.

    model = AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(DIRECTORY, trust_remote_code=True)
    inputs = processor(audio=[wave], text=["Translate to German."])
    ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    print(processor.batch_decode(ids, skip_special_tokens=True))

A sequence is audio frames, instruction, answer, without holes; a batch is padded on the left, where
nothing sees it. Recordings are encoded one by one, so that no answer depends on its batch.

Letters in shape comments: B sequences of a batch, T positions of the longest, F frames of 20 ms,
A frames of 80 ms, D width.
"""

import unicodedata

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BatchFeature,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperEncoder

SHORTEST = 8000  # samples; a shorter recording gets silence behind it


class SpeechLMConfig(PretrainedConfig):
    model_type = "speech_lm"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}

    def __init__(self, audio_config=None, text_config=None, adapter_config=None, **kwargs):
        self.audio_config = make_config(audio_config, "wav2vec2-bert")
        self.text_config = make_config(text_config, "qwen2")
        self.adapter_config = adapter_config or {}
        super().__init__(**kwargs)


def make_config(config: PretrainedConfig | dict | None, usual: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    fields = {"model_type": usual, **(config or {})}
    return AutoConfig.for_model(**fields)


class ShortWhisperEncoder(WhisperEncoder):
    """Whisper's encoder for windows of their real length, where its own takes 30 s only."""

    def forward(self, input_features: Tensor, **kwargs) -> Tensor:  # (1, bins, 2 F) -> (1, F, D)
        x = nn.functional.gelu(self.conv1(input_features))
        x = nn.functional.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.embed_positions.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
        return self.layer_norm(x)


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """(1, H, A, d) each -> (1, A, H, d). A recording is alone, so that there is no mask."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


class AdapterAttention(nn.Module):
    is_causal, num_key_value_groups = False, 1  # for attention functions of transformers

    def __init__(self, config: SpeechLMConfig):
        super().__init__()
        D = config.adapter_config["hidden_size"]
        self.linear_q = nn.Linear(D, D)
        self.linear_k = nn.Linear(D, D)
        self.linear_v = nn.Linear(D, D)
        self.linear_out = nn.Linear(D, D)
        self.config = config
        self.head_dim = D // config.adapter_config["num_attention_heads"]

    def forward(self, x: Tensor) -> Tensor:  # (1, A, D) -> (1, A, D)
        shape = (*x.shape[:2], -1, self.head_dim)
        projections = self.linear_q, self.linear_k, self.linear_v
        q, k, v = (project(x).view(shape).transpose(1, 2) for project in projections)
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        y, _ = attend(self, q, k, v, None, scaling=self.head_dim**-0.5, dropout=0.0)
        return self.linear_out(y.reshape(x.shape))


class AdapterFeedForward(nn.Module):
    def __init__(self, sizes: dict):
        super().__init__()
        self.intermediate_dense = nn.Linear(sizes["hidden_size"], sizes["intermediate_size"])
        self.output_dense = nn.Linear(sizes["intermediate_size"], sizes["hidden_size"])
        self.act = ACT2FN[sizes["adapter_act"]]

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(self.act(self.intermediate_dense(x)))


class AdapterLayer(nn.Module):
    def __init__(self, config: SpeechLMConfig):
        super().__init__()
        sizes = config.adapter_config
        D, eps = sizes["hidden_size"], sizes["layer_norm_eps"]
        kernel, stride = sizes["adapter_kernel_size"], sizes["adapter_stride"]
        self.residual_layer_norm = nn.LayerNorm(D, eps)
        self.residual_conv = nn.Conv1d(D, 2 * D, kernel, stride, kernel // 2)
        self.self_attn_layer_norm = nn.LayerNorm(D, eps)
        self.self_attn_conv = nn.Conv1d(D, 2 * D, kernel, stride, kernel // 2)
        self.self_attn = AdapterAttention(config)
        self.ffn_layer_norm = nn.LayerNorm(D, eps)
        self.ffn = AdapterFeedForward(sizes)

    def forward(self, x: Tensor) -> Tensor:  # (1, F, D) -> (1, fewer, D)
        residual = strided(self.residual_conv, self.residual_layer_norm(x))
        y = strided(self.self_attn_conv, self.self_attn_layer_norm(x))
        x = residual + self.self_attn(y)
        return x + self.ffn(self.ffn_layer_norm(x))


def strided(conv: nn.Conv1d, x: Tensor) -> Tensor:
    return nn.functional.glu(conv(x.transpose(1, 2)), dim=1).transpose(1, 2)


class LengthAdapter(nn.Module):
    def __init__(self, config: SpeechLMConfig):
        super().__init__()
        sizes = config.adapter_config
        layers = [AdapterLayer(config) for _ in range(sizes["num_adapter_layers"])]
        self.layers = nn.ModuleList(layers)
        self.enc_to_dec_proj = nn.Linear(sizes["hidden_size"], sizes["output_size"])

    def forward(self, x: Tensor) -> Tensor:  # (1, F, D) -> (1, A, D of the LLM)
        for layer in self.layers:
            x = layer(x)
        return self.enc_to_dec_proj(x)


def adapter_length(frames: int, sizes: dict) -> int:
    """80 ms frames of so many 20 ms frames."""
    kernel, stride = sizes["adapter_kernel_size"], sizes["adapter_stride"]
    for _ in range(sizes["num_adapter_layers"]):
        frames = (frames + 2 * (kernel // 2) - kernel) // stride + 1
    return frames


class SpeechLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = SpeechLMConfig
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _no_split_modules = ["AdapterLayer"]

    def __init__(self, config: SpeechLMConfig):
        super().__init__(config)
        if config.audio_config.model_type == "whisper":
            self.encoder = ShortWhisperEncoder(config.audio_config)
        else:
            self.encoder = AutoModel.from_config(config.audio_config)
        self.adapter = LengthAdapter(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def encode(self, features: Tensor) -> Tensor:
        """One recording: features (F, 2 * mel bins) of 20 ms -> audio embeddings (A, D)."""
        x = features[None].to(self.adapter.enc_to_dec_proj.weight.dtype)
        if self.config.audio_config.model_type == "whisper":
            # Two frames of 10 ms stand beside each other.
            x = self.encoder(x.reshape(1, 2 * len(features), -1).transpose(1, 2))
        else:
            x = self.encoder(x).last_hidden_state
        return self.adapter(x)[0]

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        input_features=None,
        feature_lengths=None,
        audio_mask=None,
        inputs_embeds=None,
        **kwargs,
    ):
        """As the LLM's. input_features (B, F, 2 * mel bins): a recording each, of which
        feature_lengths (B,) frames count; audio_mask (B, T): where input_ids stand for its frames.
        Without position_ids, those of a padded batch are counted from its first token on."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        if input_features is not None:
            pairs = zip(input_features, feature_lengths.tolist(), strict=True)
            audio = torch.cat([self.encode(x[:length]) for x, length in pairs])
            mask = audio_mask[..., None].bool()
            inputs_embeds = inputs_embeds.masked_scatter(mask, audio.to(inputs_embeds.dtype))
        counted = kwargs.get("past_key_values") is None and attention_mask is not None
        if counted and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        """The recording is read in the first step alone."""
        recording = {x: kwargs.pop(x, None) for x in ("input_features", "feature_lengths")}
        recording["audio_mask"] = kwargs.pop("audio_mask", None)
        options = {"is_first_iteration": is_first_iteration, **kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, **options)
        return inputs | recording if is_first_iteration else inputs


class SpeechLMProcessor(ProcessorMixin):
    """Makes the model's inputs of recordings and instructions. prompt: ids `before` the audio and
    `after` the instruction, and the `text_after` it; adapter: the adapter's configuration;
    longest: the longest recording in seconds."""

    def __init__(self, feature_extractor, tokenizer, prompt=None, adapter=None, longest=30.0):
        self.prompt, self.adapter, self.longest = prompt, adapter, longest
        super().__init__(feature_extractor, tokenizer)

    def __call__(self, audio, text, sampling_rate: int = 16000, **kwargs) -> BatchFeature:
        """audio: a mono wave (N,) of 16 kHz, full scale at +-1, or a list of them; text: as many
        instructions, or one. Returns tensors for the model. Raises ValueError."""
        waves = list(audio) if isinstance(audio, list | tuple) else [audio]
        texts = [text] * len(waves) if isinstance(text, str) else list(text)
        if sampling_rate != 16000 or len(texts) != len(waves):
            fault = f"{len(waves)} recordings of {sampling_rate} Hz for {len(texts)} instructions"
            raise ValueError(f"{fault}, expected as many, of 16000 Hz")
        features = [self.extract_features(torch.as_tensor(wave).float()) for wave in waves]
        lengths = [len(x) for x in features]
        counts = [adapter_length(length, self.adapter) for length in lengths]
        rows, masks = [], []
        for words, count in zip(texts, counts, strict=True):
            before, after = self.prompt["before"], self.prompt["after"]
            behind = self.encode(f"\n{words}{self.prompt['text_after']}") + after
            # Any token may stand where the audio will be.
            rows.append(before + [self.tokenizer.pad_token_id] * count + behind)
            masks.append([0] * len(before) + [1] * count + [0] * len(behind))
        data = {
            "input_ids": pad_left(rows, self.tokenizer.pad_token_id),
            "attention_mask": pad_left([[1] * len(row) for row in rows], 0),
            "audio_mask": pad_left(masks, 0),
            "input_features": nn.utils.rnn.pad_sequence(features, batch_first=True),
            "feature_lengths": torch.tensor(lengths),
        }
        return BatchFeature(data)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of which is a special token, whatever is written there."""
        tokenizer = self.tokenizer.backend_tokenizer
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer.encode(unicodedata.normalize("NFC", text), add_special_tokens=False).ids

    def extract_features(self, wave: Tensor) -> Tensor:
        """The features (F, 2 * mel bins) of one wave (N,), of its real length."""
        if wave.ndim != 1 or not 560 <= len(wave) <= self.longest * 16000 + 160:
            fault = f"audio of {tuple(wave.shape)} samples, expected one channel of 0.035 s"
            raise ValueError(f"{fault} to {self.longest:g} s; cut it at pauses")
        wave = nn.functional.pad(wave, (0, max(0, SHORTEST - len(wave))))
        options = {"sampling_rate": 16000, "return_tensors": "pt"}
        inputs = self.feature_extractor(wave.numpy(), **options)
        x = inputs["input_features"][0]
        if "attention_mask" in inputs:  # w2v-BERT's, padded to an even number of 10 ms frames
            return x[: int(inputs["attention_mask"].sum())]
        frames = -(-len(wave) // 320)  # Whisper's (bins, 3000), padded to 30 s
        return x[:, : 2 * frames].T.reshape(frames, -1)

    def apply_chat_template(self, *args, **kwargs):
        raise NotImplementedError("call the processor with audio= and text=, it makes the prompt")


def pad_left(rows: list[list[int]], value: int) -> Tensor:
    """Lists of numbers -> (B, T)."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])
