"""Whole models in the layout of the reference code of arXiv 2506.17019 (model_type speech_lm), whose adapter lies inside
its encoder."""

from dataclasses import asdict

import torch

from model import (ACTIVATIONS, AdapterConfig, EncoderConfig, LengthAdapter, LLM, LLMConfig, SpeechEncoder, SpeechLM,
                   encoder_dict)
from prepare.checkpoint import (check_tied, expect, fetch, known_fields, llm_name, load, read_generation, read_json, save,
                                typed)
from prepare.errors import CheckpointError

SPEECH_LM_KEYS = [("adapter.layers.", "encoder.adapter.layers."), ("adapter.enc_to_dec_proj.", "enc_to_dec_proj."),
                  ("adapter.prompt_tokens.", "prompt_tokens."), ("llm.", "decoder.")]  # ours, and the reference's


def load_reference(path_or_hub_id, dtype=torch.float32, compute_dtype=None, device="cpu"):
    """Loads a whole model: one saved by save_reference or by the reference code (model_type speech_lm), whose
    adapter lies inside its encoder. Raises CheckpointError."""
    directory = fetch(path_or_hub_id)
    where = directory / "config.json"
    raw = read_json(where)
    expect(raw, where, model_type=["speech_lm"], add_pre_adapter=[False])
    typed(raw, where, encoder=dict, decoder=dict)
    own, decoder, where = raw.get("encoder") or {}, raw.get("decoder") or {}, f"{where}, encoder"
    encoder = EncoderConfig.from_dict(own, where)
    llm = LLMConfig.from_dict(decoder, f"{directory / 'config.json'}, decoder", read_generation(directory))
    expect(own, where, add_adapter=[True], use_intermediate_ffn_before_adapter=[False],
           output_hidden_size=[encoder.hidden_size], adapter_act=list(ACTIVATIONS))
    adapter = AdapterConfig(**known_fields(AdapterConfig, {"num_adapter_layers": 1, **own}, where)
                            | {"output_size": llm.hidden_size})
    padding = own.get("adapter_padding", adapter.adapter_stride // 2)
    if adapter.adapter_kernel_size // 2 != padding:
        raise CheckpointError(f"{where}: adapter kernel {adapter.adapter_kernel_size} padded by {padding}, expected "
                              "kernel // 2; the original masks such rows wrongly and cannot be reproduced")
    check_tied(llm, directory, "decoder.")

    def rename(key):
        for ours, stored in SPEECH_LM_KEYS:
            if key.startswith(stored):
                return llm_name(ours + key.removeprefix(stored), llm)
        return key

    def build(compute):
        return SpeechLM(SpeechEncoder(encoder, compute), LengthAdapter(adapter, compute), LLM(llm, compute))

    return load(build, directory, rename, dtype, compute_dtype, device)


def save_reference(model, directory):
    """Writes config.json and model.safetensors in the reference's layout, which load_reference reads."""
    adapter = asdict(model.adapter.config)
    own = {name: adapter.pop(name) for name in list(adapter) if name not in asdict(model.encoder.config)}
    if adapter != asdict(model.encoder.config):
        raise ValueError("the adapter's width, heads, FFN and dropout differ from the encoder's, but the saved form "
                         "has one place for both; build the adapter from the encoder's configuration")
    own |= {"add_adapter": True, "adapter_padding": own["adapter_kernel_size"] // 2}
    state = {}
    for key, tensor in model.state_dict().items():
        ours, stored = next((pair for pair in SPEECH_LM_KEYS if key.startswith(pair[0])), ("", ""))
        state[stored + key.removeprefix(ours)] = tensor
    save(directory, {"model_type": "speech_lm", "encoder": encoder_dict(model.encoder.config) | own,
                     "decoder": asdict(model.llm.config)}, state, model.llm.config.eos_token_id)
