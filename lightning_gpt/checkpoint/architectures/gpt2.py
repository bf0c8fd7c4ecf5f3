"""GPT-2 in Hugging Face's words, the language in which implementations of its layout exchange weights.

Names are those of ``transformers.GPT2LMHeadModel``, which minGPT and nanoGPT share. The sizes and traits stand in a
``config.json`` of ``model_type: gpt2``.
"""

from collections.abc import Iterable
from typing import Any

from lightning_gpt.config import UserError
from lightning_gpt.implementations.registry import IMPLEMENTATIONS, GPT2Traits, Implementation

# Conv1D keeps its weight as (in, out), the transpose of a Linear's.
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

_MASKS = (".attn.bias", ".attn.masked_bias")
_WRAPPERS = ("_orig_mod.", "module.")

TOKENS = 50257  # of the published GPT-2

_SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": TOKENS, "n_positions": 1024}
_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# What no implementation has a field for: the only value of each that is understood, GPT-2's own.
_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def gpt2_names(stored: Iterable[str]) -> dict[str, str]:
    """The names in ``GPT2LMHeadModel`` of tensors that lie in a file, each with the name that it has there.

    What DDP and ``torch.compile`` put before a name is taken off, what a model without a head leaves out is put there,
    and buffers that hold the causal mask are left out.
    """
    names = {}
    for key in stored:
        name = key
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        if not name.endswith(_MASKS):
            names[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = key
    return names


def row_for(traits: GPT2Traits, *, source: str) -> Implementation:
    """The first implementation of the registry that is such a GPT-2, head and all.

    Raises:
        UserError: There is none.
    """
    reasons = []
    for row in IMPLEMENTATIONS.values():
        if row.gpt2 is None:
            continue
        try:
            if gpt2_traits(row, row.gpt2.fields(traits)) == traits:
                return row
        except ValueError as error:
            reasons.append(str(error))
    raise UserError(f"{source} is a GPT-2 that no implementation can express: {'; '.join(reasons)}")


def is_transposed(name: str) -> bool:
    """Whether a weight lies transposed in Hugging Face's GPT-2."""
    return name.endswith(_CONV1D)


def traits_from_gpt2(config: dict[str, Any], *, source: str) -> GPT2Traits:
    """What a GPT-2 ``config.json`` says beside the sizes.

    Args:
        config: The content of ``config.json``; what it leaves out has Hugging Face's default.
        source: What to call it in an error message.

    Raises:
        UserError: It says what nothing here can express.
    """
    inner = config.get("n_inner")
    if inner not in (None, 4 * config.get("n_embd", _SIZES["n_embd"])):
        raise UserError(f"{source}: n_inner is {inner}, and only an MLP of 4 n_embd is known")
    for name, only in _FIXED.items():
        if config.get(name, only) != only:
            raise UserError(f"{source}: {name} is {config[name]!r}, and only {only!r} is known")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _GELU:
        raise UserError(f"{source}: activation_function is {activation!r}, and only {', '.join(_GELU)} are known")
    return GPT2Traits(gelu=_GELU[activation], tied=config.get("tie_word_embeddings", True))


def fields_from_gpt2(row: Implementation, config: dict[str, Any], *, source: str) -> dict[str, Any]:
    """The fields of an implementation's config that say what a GPT-2 ``config.json`` says.

    Dropout is no property of the weights: it is left to the implementation's defaults and the user's flags.

    Args:
        row: The implementation.
        config: The content of ``config.json``; what it leaves out has Hugging Face's default.
        source: What to call it in an error message.

    Raises:
        UserError: The implementation cannot express it.
    """
    if row.gpt2 is None:
        raise UserError(f"{source} holds GPT-2's weights, whose layout --implementation {row.name} does not have")
    sizes = {name: config.get(name, default) for name, default in _SIZES.items()}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{source}: {name} is {value!r}, it must be a positive whole number")
    traits = traits_from_gpt2(config, source=source)
    try:
        fields = row.gpt2.fields(traits)
    except ValueError as error:
        raise UserError(f"{source} does not fit --implementation {row.name}: {error}") from error
    return fields | {"block_size" if name == "n_positions" else name: value for name, value in sizes.items()}


def gpt2_traits(row: Implementation, fields: dict[str, Any]) -> GPT2Traits:
    """What a model of an implementation amounts to as a GPT-2.

    Args:
        row: The implementation.
        fields: The fields of its config; those left out have the config's own defaults.

    Raises:
        UserError: The implementation does not have GPT-2's layout.
    """
    if row.gpt2 is None:
        raise UserError(f"--implementation {row.name} does not have GPT-2's layout, so it cannot be expressed as one")
    return row.gpt2.traits(row.complete(fields))


def gpt2_config(row: Implementation, fields: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` that opens a model of an implementation as a GPT-2; the inverse of ``fields_from_gpt2``.

    Missing biases are zeros there. Padding of the vocabulary is left out.

    Args:
        row: The implementation.
        fields: The fields of its config, sizes included.

    Raises:
        UserError: The implementation does not have GPT-2's layout, or its positions are not learned.
    """
    traits = gpt2_traits(row, fields)
    if traits.position != "learned":
        raise UserError(f"a model with --position {traits.position} is no GPT-2, whose positions are learned")
    sizes = {name: fields["block_size" if name == "n_positions" else name] for name in _SIZES}
    sizes["vocab_size"] -= fields.get("vocab_padding", 0)
    activation = next(name for name, gelu in _GELU.items() if gelu == traits.gelu)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **sizes,
        "activation_function": activation,
        **_FIXED,
        "tie_word_embeddings": traits.tied,
    }
