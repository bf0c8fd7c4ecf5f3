"""GPT-2 in transformers, ``GPT2LMHeadModel``; minGPT and nanoGPT use its weight names."""

from collections.abc import Mapping
from typing import Any

from lightning_gpt.checkpoint.architectures.base import Architecture, ConfigField, Weight

TOKENS = 50257  # the vocabulary of the published models
_WIDTH = 768


class GPT2(Architecture):
    """Adapter of GPT-2, whose Conv1D stores its weight as (in, out), the transpose of Linear's."""

    name = "GPT-2"
    model_type = "gpt2"
    hf_class = "GPT2LMHeadModel"
    config = (
        ConfigField("n_layer", "n_layer", 12),
        ConfigField("n_head", "n_head", 12),
        ConfigField("n_embd", "n_embd", _WIDTH),
        ConfigField("vocab_size", "vocab_size", TOKENS),
        ConfigField("n_positions", "block_size", 1024),
        ConfigField(
            "activation_function",
            "gelu",
            "gelu_new",
            {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"},
        ),
        ConfigField("tie_word_embeddings", "tied_head", True, {True: True, False: False}),
    )
    fixed = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    implied = {"bias": True, "position": "learned"}
    kept = ("position", "gelu", "bias", "tied_head")
    weights = (
        Weight("transformer.wte.weight"),
        Weight("transformer.wpe.weight"),
        Weight("transformer.h.*.ln_1.weight"),
        Weight("transformer.h.*.ln_1.bias"),
        Weight("transformer.h.*.attn.c_attn.weight", transposed=True),
        Weight("transformer.h.*.attn.c_attn.bias"),
        Weight("transformer.h.*.attn.c_proj.weight", transposed=True),
        Weight("transformer.h.*.attn.c_proj.bias"),
        Weight("transformer.h.*.ln_2.weight"),
        Weight("transformer.h.*.ln_2.bias"),
        Weight("transformer.h.*.mlp.c_fc.weight", transposed=True),
        Weight("transformer.h.*.mlp.c_fc.bias"),
        Weight("transformer.h.*.mlp.c_proj.weight", transposed=True),
        Weight("transformer.h.*.mlp.c_proj.bias"),
        Weight("transformer.ln_f.weight"),
        Weight("transformer.ln_f.bias"),
        Weight("lm_head.weight"),
    )
    prefix = "transformer."
    ignored = (".attn.bias", ".attn.masked_bias")  # causal masks

    def settings_from_hf(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings; also require an MLP of width 4 n_embd."""
        inner, width = hf_config.get("n_inner"), hf_config.get("n_embd", _WIDTH)
        if inner not in (None, 4 * width):
            raise ValueError(f"n_inner is {inner}; only 4 n_embd = {4 * width} is supported")
        return super().settings_from_hf(hf_config)

    def hf_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``config.json``; also accept a model without biases, for which ``exported`` writes zeros."""
        return super().hf_config({**settings, "bias": True})
