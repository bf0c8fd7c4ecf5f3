"""The registry of model implementations: what a model must offer, and a row for each built-in one.

A model is a class ``Model(config)`` with ``forward(idx, targets=None) -> (logits, loss or None)``: ``idx`` and
``targets`` are ``(B, T)`` int64, targets of -1 are ignored, and the loss is the mean over the others. ``config`` is a
dataclass with at least the fields ``vocab_size`` and ``block_size``.

A model may also have:

- ``extends_context`` (attribute or property): True if positions continue beyond ``block_size`` and no weight depends on
  it. The model can then be scored with a longer context than it was trained with.
- ``refuses(device_type, dtype)``: returns None if the model runs there, else why not, and config fields with which the
  same weights give the same result there. Training reports the reason; evaluation and sampling apply the fields.
- ``initialises_by_apply = True``: ``model.apply(model._init_weights)`` sets every parameter. The model can then be
  built on the meta device and initialised shard by shard.
- ``parts`` on an ``nn.Linear``: the number of equal matrices that are stacked along the rows of its weight, such as 3
  for a projection to query, key and value. Muon orthogonalises each one separately.

A resumed run may only change config fields that leave the meaning of the weights as it is: those in ``CHANGEABLE``. The
metadata of a field overrides this, as in ``rate: float = field(default=0.1, metadata={"changeable": True})``.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_gpt.config import SIZES, UserError
from lightning_gpt.options import Option, options_in_file, options_of
from lightning_gpt.trust import import_code, split_name

if TYPE_CHECKING:
    import torch
    from torch import nn


# Config fields that a resumed run may change: rates of dropout, and the choice of the attention kernel.
CHANGEABLE = frozenset({"dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "attention", "flash"})


def decay_linear(module: "nn.Module", name: str) -> bool:
    """Return whether a parameter decays: only weights of Linear layers do (minGPT's rule)."""
    from torch import nn

    return isinstance(module, nn.Linear) and name == "weight"


def decay_matrices(module: "nn.Module", name: str) -> bool:
    """Return whether a parameter decays: tensors of two or more dimensions do (nanoGPT's rule).

    Decides by the module's type if possible, because a sharded parameter does not show its dimensions.
    """
    from torch import nn

    if isinstance(module, (nn.Linear, nn.Embedding)):
        return name == "weight"
    parameter = module.get_parameter(name)
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # under ZeRO-3 a parameter has one dimension


def token_embedding_name(model: "nn.Module", *, vocab_size: int) -> str:
    """Return the name of the token embeddings: the weight of the first nn.Embedding with a row for each token.

    Raises:
        UserError: The model has no such module.
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
        name: The value of ``--implementation``.
        module: Name of the Python module, which is imported when a model is built.
        model: Name of the model class in the module.
        config: Name of its config dataclass.
        block: Name of the class that is compiled, recomputed and sharded as a unit; None for the whole model.
        presets: The named sizes, as ``module:NAME``.
        decays: ``(module, parameter name) -> bool``, whether weight decay applies.
        architecture: Hugging Face's ``model_type`` of the same architecture; see ``checkpoint/architectures``.
        hard_coded: Values of that architecture's settings for which the model has no config field.
        builtin: Whether the row is one of ours.
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
        """Import and return an attribute of the row's module, or ``module:NAME`` of another module."""
        module, _, attribute = name.rpartition(":")
        return getattr(importlib.import_module(module or self.module), attribute)

    def config_options(self) -> list[Option]:
        """Return the config fields that become flags, without importing a built-in model."""
        if not self.builtin:
            return options_of(self.load(self.config))
        spec = importlib.util.find_spec(self.module)
        assert spec is not None and spec.origin is not None
        return options_in_file(spec.origin, self.config)

    def block_class(self) -> "type[nn.Module] | None":
        """Return the class that is compiled, recomputed and sharded as a unit; None for the whole model."""
        return self.load(self.block) if self.block else None

    def hidden_matrices(self, model: "nn.Module", *, vocab_size: int) -> dict[str, int]:
        """Find the weight matrices between embeddings and head.

        These are the nn.Linear weights inside blocks; without a block class, all except the head, which
        has a row for each token. A weight that is also used elsewhere, such as a tied head, is left out.

        Args:
            model: The model, which may be on the meta device or sharded; shapes of parameters are not used.
            vocab_size: Number of rows of its embeddings.

        Returns:
            Parameter names, each with the ``parts`` of its module.

        Raises:
            UserError: There is none, or ``parts`` does not divide the rows of one.
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
                        f"--implementation {self.name}: {prefix} has {module.out_features} rows, which parts = {parts}"
                        " does not divide"
                    )
                else:
                    found.setdefault(parameter, (f"{prefix}.{name}".lstrip("."), parts))
        hidden = dict(where for parameter, where in found.items() if parameter not in elsewhere)
        if not hidden:
            raise UserError(
                f"--implementation {self.name} has no nn.Linear between embeddings and head, which is all that muon"
                " trains; give --optimizer adamw"
            )
        return hidden

    def sizes(self, model_type: str) -> dict[str, int]:
        """Return the sizes of a preset.

        Raises:
            UserError: There is no such preset, or the implementation has none.
        """
        if self.presets is None:
            raise UserError(f"--implementation {self.name} has no presets; leave --model_type out and give its sizes")
        presets = self.load(self.presets)
        if model_type not in presets:
            raise UserError(f"--model_type {model_type} is unknown; choose one of {', '.join(presets)}")
        return dict(presets[model_type])

    def resolve(self, *, model_type: str | None = None, **fields: Any) -> dict[str, Any]:
        """Return the fields that are not None, on top of the sizes of a preset if one is given."""
        given = {k: v for k, v in fields.items() if v is not None}
        return (self.sizes(model_type) if model_type else {}) | given

    def complete(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Fill in the config's defaults for fields that are left out."""
        defaults = {
            f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(self.load(self.config))
        }
        return defaults | fields

    def may_change(self, name: str) -> bool:
        """Return whether the weights keep their meaning if a config field changes, so that a resumed run may change it.

        The field's metadata ``changeable`` decides; without it, the names in ``CHANGEABLE`` do.
        """
        field = next(f for f in dataclasses.fields(self.load(self.config)) if f.name == name)
        return field.metadata.get("changeable", name in CHANGEABLE)

    @property
    def initialises_by_apply(self) -> bool:
        """Whether the model can be built on the meta device; otherwise every rank first builds it whole."""
        return getattr(self.load(self.model), "initialises_by_apply", False)

    def build(self, fields: dict[str, Any], *, meta: bool = False) -> "nn.Module":
        """Build the model from its config fields.

        Args:
            fields: Config fields; those left out have the config's defaults.
            meta: Whether to build it on the meta device, without memory.

        Raises:
            UserError: A field is unknown or missing, or the model rejects a value; its own message is passed on.
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
    """Ask a model whether it runs on a kind of device in a dtype.

    Returns:
        Why it does not (empty if it does), and config fields with which it does.
    """
    refuses = getattr(model, "refuses", None)
    return (refuses and refuses(device_type, dtype)) or ("", {})


def get_implementation(name: str) -> Implementation:
    """Return the row of a built-in implementation, or make one for ``package.module:Class``.

    Raises:
        UserError: There is no such row, module or class, or the class has no config dataclass.
    """
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    if split_name(name) is None:
        choices = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"--implementation {name} is unknown; choose one of {choices}, or package.module:Class")
    hint = "give package.module:Class from this folder"
    module, class_name = import_code(name, flag="implementation", hint=hint)
    model = getattr(module, class_name, None)
    if not inspect.isclass(model):
        raise UserError(f"--implementation {name}: {module.__name__} has no class {class_name}")
    config = next(iter(typing.get_type_hints(model.__init__).values()), None)
    needed = {"vocab_size", "block_size"}
    if (
        not isinstance(config, type)
        or not dataclasses.is_dataclass(config)
        or not needed <= {f.name for f in dataclasses.fields(config)}
    ):
        raise UserError(
            f"--implementation {name}: annotate the first argument of {class_name}.__init__ with a dataclass that has"
            " the fields vocab_size and block_size"
        )
    return Implementation(
        name=name,
        module=module.__name__,
        model=class_name,
        config=f"{config.__module__}:{config.__name__}",
        block="Block" if hasattr(module, "Block") else None,
    )


def flag_options(row: Implementation) -> list[Option]:
    """Return the config fields that become flags: all except those that ModelOptions or the data set.

    If there are presets, sizes default to None, which means the preset's value.
    """
    decided = ("vocab_size", "vocab_padding", "block_size", "model_type")
    options = [o for o in row.config_options() if o.name not in decided]
    if row.presets is None:
        return options
    return [dataclasses.replace(o, type=int | None, default=None) if o.name in SIZES else o for o in options]
