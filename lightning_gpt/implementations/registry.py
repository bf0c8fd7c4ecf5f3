"""The registry of model implementations: what a model must offer, and the rows of those built in.

A model is a class ``Model(config)`` with ``forward(idx, targets=None) -> (logits, loss or None)``: ``idx`` and
``targets`` are ``(B, T)`` int64, a target of -1 is ignored, and the loss is the mean over the other targets.
``config`` is a dataclass that has at least the fields ``vocab_size`` and ``block_size``.

A model whose weights do not depend on ``block_size`` and whose positions go on beyond it says so with an attribute
``extends_context = True`` or a property of that name; it can then be scored with a longer context than it was trained
with.

A model that cannot compute everywhere has a method ``refuses(device_type, dtype)``: None where it can, else the reason
and the fields of its config with which the same weights mean the same there. Training refuses it before it begins;
what was trained elsewhere is scored and sampled with those fields.

An ``nn.Linear`` whose weight is several matrices of the same size, one above the other, says so with an attribute
``parts``, their number, as a projection to query, key and value has ``parts = 3``; Muon then treats them one by one.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_gpt.config import SIZES, UserError
from lightning_gpt.options import Option, options_in_file, options_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def decay_linear(module: "nn.Module", name: str) -> bool:
    """minGPT's rule: the weights of Linear layers decay, nothing else does."""
    from torch import nn

    return isinstance(module, nn.Linear) and name == "weight"


def decay_matrices(module: "nn.Module", name: str) -> bool:
    """nanoGPT's rule, tensors of two or more dimensions decay.

    It is told by module type where that is known, since a sharded parameter does not show its dimensions.
    """
    from torch import nn

    if isinstance(module, (nn.Linear, nn.Embedding)):
        return name == "weight"
    parameter = module.get_parameter(name)
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # ZeRO-3 keeps one dimension of the parameter


def token_embedding_name(model: "nn.Module", *, vocab_size: int) -> str:
    """The name of a model's token embeddings: the weight of the first nn.Embedding that has a row for each token.

    Raises:
        UserError: The model has none.
    """
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == vocab_size:
            return f"{name}.weight".lstrip(".")
    raise UserError(
        f"{type(model).__name__} has no nn.Embedding with a row for each of its {vocab_size} tokens, which"
        " --pretrained_embeddings and --freeze_embeddings need"
    )


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One row of the registry.

    Attributes:
        name: What ``--implementation`` calls it.
        module: The module it lives in, imported when a model is built.
        model: Name of the model class in that module.
        config: Name of its config dataclass.
        block: Name of the module class that is compiled, recomputed and sharded as a unit; None for the whole model.
        presets: Where to find the named sizes, as ``module:NAME``.
        decays: ``(module, parameter name) -> bool``, whether weight decay applies.
        architecture: Hugging Face's ``model_type`` of the same model; see ``checkpoint/architectures``.
        hard_coded: Settings of that architecture that the model has no config field for, each with its value.
    """

    name: str
    module: str
    model: str = "GPT"
    config: str = "GPTConfig"
    block: str | None = "Block"
    presets: str | None = None
    decays: Callable[["nn.Module", str], bool] = decay_matrices
    architecture: str | None = None
    hard_coded: dict[str, Any] = field(default_factory=dict)
    builtin: bool = field(default=False, repr=False)

    def load(self, name: str) -> Any:
        """An attribute of the row's module, or ``module:NAME`` of another, imported now."""
        module, _, attribute = name.rpartition(":")
        return getattr(importlib.import_module(module or self.module), attribute)

    def config_options(self) -> list[Option]:
        """The fields of the model's config that become flags; a built-in model is not imported for it."""
        if not self.builtin:
            return options_of(self.load(self.config))
        spec = importlib.util.find_spec(self.module)
        assert spec is not None and spec.origin is not None
        return options_in_file(spec.origin, self.config)

    def block_class(self) -> "type[nn.Module] | None":
        """The unit that is compiled and sharded."""
        return self.load(self.block) if self.block else None

    def hidden_matrices(self, model: "nn.Module", *, vocab_size: int) -> dict[str, int]:
        """The weights between embeddings and head: names of parameters, to the ``parts`` of each.

        They are those of nn.Linear inside of blocks, or where blocks are not known, of any nn.Linear without a row for
        each token. A weight that is used elsewhere too, such as a tied head, is none.

        Args:
            model: The model, also on the meta device or sharded: shapes are not looked at.
            vocab_size: Rows of its embeddings.

        Raises:
            UserError: It has none, or the ``parts`` of one do not divide its rows.
        """
        from torch import nn

        unit = self.block_class()
        inside = {m for block in model.modules() if unit and isinstance(block, unit) for m in block.modules()}
        found: dict[nn.Parameter, tuple[str, int]] = {}
        elsewhere: set[nn.Parameter] = set()
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(module, nn.Linear) or name != "weight":
                    elsewhere.add(parameter)
                elif module not in inside if unit else module.out_features == vocab_size:
                    elsewhere.add(parameter)
                elif module.out_features % (parts := getattr(module, "parts", 1)):
                    raise UserError(
                        f"--implementation {self.name}: {prefix} has {module.out_features} rows, which are not"
                        f" parts = {parts} matrices of the same size"
                    )
                else:
                    found.setdefault(parameter, (f"{prefix}.{name}".lstrip("."), parts))
        hidden = dict(where for parameter, where in found.items() if parameter not in elsewhere)
        if not hidden:
            raise UserError(
                f"--implementation {self.name} has no nn.Linear between its embeddings and its head, and nothing else"
                " is trained by muon; give --optimizer adamw"
            )
        return hidden

    def sizes(self, model_type: str) -> dict[str, int]:
        """The sizes of a preset.

        Raises:
            UserError: The preset does not exist, or the implementation has none.
        """
        if self.presets is None:
            raise UserError(f"--implementation {self.name} has no presets; leave --model_type out and give its sizes")
        presets = self.load(self.presets)
        if model_type not in presets:
            raise UserError(f"--model_type {model_type} is unknown; choose one of {', '.join(presets)}")
        return dict(presets[model_type])

    def resolve(self, *, model_type: str | None = None, **fields: Any) -> dict[str, Any]:
        """Config fields with a preset applied below the sizes that were given, and fields of None left out.

        Without a preset, sizes that are missing come from the config's own defaults.
        """
        given = {k: v for k, v in fields.items() if v is not None}
        return (self.sizes(model_type) if model_type else {}) | given

    def complete(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Config fields with the config's own defaults for those that are left out."""
        return {f.name: f.default for f in dataclasses.fields(self.load(self.config))} | fields

    @property
    def initialises_by_apply(self) -> bool:
        """Whether the model says that ``model.apply(model._init_weights)`` sets every one of its parameters.

        Then it can be built without memory and be initialised where its shards live. A model that says nothing is built
        whole first.
        """
        return getattr(self.load(self.model), "initialises_by_apply", False)

    def build(self, fields: dict[str, Any], *, meta: bool = False) -> "nn.Module":
        """Builds the model from its config fields; on the meta device it has shapes and no memory.

        Raises:
            UserError: The config refuses the fields; the message is the model's own.
        """
        config_class = self.load(self.config)
        known = {f.name for f in dataclasses.fields(config_class)}
        for name in fields:
            if name not in known:
                raise UserError(f"--implementation {self.name} has no option {name}; it has {', '.join(sorted(known))}")
        for f in dataclasses.fields(config_class):
            if f.name not in fields and f.default is f.default_factory is dataclasses.MISSING:
                raise UserError(f"--implementation {self.name} has no default for {f.name}; give --{f.name}")
        import torch

        try:
            with torch.device("meta") if meta else nullcontext():
                return self.load(self.model)(config_class(**fields))
        except ValueError as error:
            raise UserError(f"--implementation {self.name}: {error}") from error


IMPLEMENTATIONS: dict[str, Implementation] = {
    row.name: row
    for row in (
        Implementation(
            name="mingpt",
            module="mingpt.model",
            presets="mingpt.model:PRESETS",
            decays=decay_linear,
            architecture="gpt2",
            hard_coded={"gelu": "tanh", "tied_head": False, "bias": True, "position": "learned"},
            builtin=True,
        ),
        Implementation(
            name="nanogpt",
            module="nanogpt.model",
            presets="mingpt.model:PRESETS",
            architecture="gpt2",
            hard_coded={"tied_head": True},
            builtin=True,
        ),
        Implementation(
            name="moderngpt",
            module="moderngpt.model",
            presets="mingpt.model:PRESETS",
            decays=decay_linear,
            architecture="nanochat",
            builtin=True,
        ),
    )
}


def refused_by(model: "nn.Module", *, device_type: str, dtype: "torch.dtype") -> tuple[str, dict[str, Any]]:
    """Why a model cannot compute on a type of device in a type of numbers, and the config fields with which it can.

    Returns:
        An empty reason and no fields where nothing is against it.
    """
    refuses = getattr(model, "refuses", None)
    return (refuses and refuses(device_type, dtype)) or ("", {})


def get_implementation(name: str) -> Implementation:
    """The row of a built-in implementation, or one made for ``package.module:Class``.

    Raises:
        UserError: There is no such row, module or class, or the class has no config dataclass.
    """
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    module_name, _, class_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        choices = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"--implementation {name} is unknown; choose one of {choices}, or package.module:Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script's own folder is on the path, the folder it is called from is not
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"--implementation {name}: {error}; give package.module:Class from this folder") from error
    model = getattr(module, class_name, None)
    if not inspect.isclass(model):
        raise UserError(f"--implementation {name}: {module_name} has no class {class_name}")
    config = next(iter(typing.get_type_hints(model.__init__).values()), None)
    if not dataclasses.is_dataclass(config) or not {"vocab_size", "block_size"} <= {
        f.name for f in dataclasses.fields(config)
    }:
        raise UserError(
            f"--implementation {name}: annotate the first argument of {class_name}.__init__ with a dataclass that has"
            " the fields vocab_size and block_size"
        )
    return Implementation(
        name=name,
        module=module_name,
        model=class_name,
        config=f"{config.__module__}:{config.__name__}",
        block="Block" if hasattr(module, "Block") else None,
    )


def flag_options(row: Implementation) -> list[Option]:
    """The model config's fields that are flags: all but those that the data or ModelOptions decide.

    Sizes default to None where presets exist, meaning the preset's.
    """
    decided = ("vocab_size", "vocab_padding", "block_size", "model_type")
    options = [o for o in row.config_options() if o.name not in decided]
    if row.presets is None:
        return options
    return [dataclasses.replace(o, type=int | None, default=None) if o.name in SIZES else o for o in options]
