"""NanoChat in transformers, ``NanoChatForCausalLM``: moderngpt without windows, bigram embeddings and smear."""

from collections.abc import Mapping
from typing import Any

from lightning_gpt.checkpoint.architectures.base import Architecture, ConfigField, Weight

_HEADS, _WIDTH = 6, 768
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


class NanoChat(Architecture):
    """Adapter of NanoChat, which has moderngpt's matrices under other names; norms have no parameters."""

    name = "NanoChat"
    model_type = "nanochat"
    hf_class = "NanoChatForCausalLM"
    config = (
        ConfigField("vocab_size", "vocab_size", 50304),
        ConfigField("hidden_size", "n_embd", _WIDTH),
        ConfigField("num_hidden_layers", "n_layer", 12),
        ConfigField("num_attention_heads", "n_head", _HEADS),
        ConfigField("num_key_value_heads", "n_kv_head", _HEADS),
        ConfigField("max_position_embeddings", "block_size", 2048),
        ConfigField("final_logit_softcapping", "softcap", 15.0),
    )
    fixed = {
        "hidden_act": "relu2",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    implied = {"window": 0, "bigram": 0, "smear": False}
    weights = (
        Weight("transformer.wte.weight", "model.embed_tokens.weight"),
        Weight("transformer.h.*.attn.c_q.weight", "model.layers.*.self_attn.q_proj.weight"),
        Weight("transformer.h.*.attn.c_k.weight", "model.layers.*.self_attn.k_proj.weight"),
        Weight("transformer.h.*.attn.c_v.weight", "model.layers.*.self_attn.v_proj.weight"),
        Weight("transformer.h.*.attn.c_proj.weight", "model.layers.*.self_attn.o_proj.weight"),
        Weight("transformer.h.*.mlp.c_fc.weight", "model.layers.*.mlp.fc1.weight"),
        Weight("transformer.h.*.mlp.c_proj.weight", "model.layers.*.mlp.fc2.weight"),
        Weight("lm_head.weight"),
    )
    prefix = "model."

    def settings_from_hf(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings; also require default rotary positions, head size and MLP width."""
        known = dict(hf_config)
        if known.get("num_key_value_heads") is None:
            known["num_key_value_heads"] = known.get("num_attention_heads", _HEADS)
        settings = super().settings_from_hf(known)
        # Before transformers 5, rope_theta and rope_scaling held the fields of rope_parameters.
        rope = {"rope_theta": known.get("rope_theta", _ROPE["rope_theta"])}
        rope |= known.get("rope_scaling") or {}
        rope |= known.get("rope_parameters") or {}
        for name, only in _ROPE.items():
            if rope.get(name, only) != only:
                raise ValueError(f"{name} is {rope[name]!r}; only {only!r} is supported")
        width = settings["n_embd"]
        derived = {"intermediate_size": (8192, 4 * width), "head_dim": (None, width / settings["n_head"])}
        for name, (default, only) in derived.items():
            value = known.get(name, default)
            if value not in (None, only):
                raise ValueError(f"{name} is {value!r}; only {only:g} is supported")
        return settings

    def hf_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``config.json``, including dropout and the fields that follow from others."""
        heads = settings["n_kv_head"] or settings["n_head"]
        return super().hf_config({**settings, "n_kv_head": heads}) | {
            "intermediate_size": 4 * settings["n_embd"],
            "attention_dropout": settings["dropout"],
            "rope_parameters": dict(_ROPE),
        }
