"""An adapter between one Hugging Face architecture and the implementations here that can hold its weights.

An adapter is two tables: config fields and weight names. An import translates from Hugging Face's side to ours, an
export from ours to theirs. Config fields are translated by way of *settings*: a dict of a model's sizes and choices
under our names, including choices that an implementation hard-codes (``Implementation.hard_coded``).
"""

import re
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gpt.implementations.registry import IMPLEMENTATIONS, Implementation
from lightning_gpt.parsing import shown

# Reads one tensor by name.
Read = Callable[[str], Tensor]

# Prefixes that torch.compile and DDP add to a parameter's name.
_WRAPPERS = ("_orig_mod.", "module.")
_LAYER = re.compile(r"\.(\d+)\.")

# Values with which a model can also hold weights trained with the other value: missing biases become zeros, and the
# head becomes a copy of a tied embedding.
_WIDER = {"bias": True, "tied_head": False}


@dataclass(frozen=True)
class ConfigField:
    """A row of the config table.

    Attributes:
        theirs: The name in Hugging Face's ``config.json``.
        ours: The name in our settings.
        default: Hugging Face's value if ``config.json`` omits the field.
        values: For a choice, Hugging Face's values to ours; None for a positive number of the default's type.
    """

    theirs: str
    ours: str
    default: Any
    values: Mapping[Any, Any] | None = None

    def read(self, hf_config: Mapping[str, Any]) -> Any:
        """Return our value of the field; ValueError if it is not supported."""
        value = hf_config.get(self.theirs, self.default)
        if self.values is not None:
            for theirs, ours in self.values.items():
                if value == theirs:
                    return ours
            raise ValueError(f"{self.theirs} is {value!r}; supported are {', '.join(map(repr, self.values))}")
        whole = isinstance(self.default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
            raise ValueError(f"{self.theirs} is {value!r}, it must be a positive {'whole ' if whole else ''}number")
        return value

    def write(self, settings: Mapping[str, Any]) -> Any:
        """Return Hugging Face's value of the field."""
        value = settings[self.ours]
        return value if self.values is None else next(t for t, ours in self.values.items() if ours == value)


@dataclass(frozen=True)
class Weight:
    """A row of the weight table; ``*`` in a name matches any layer number.

    Attributes:
        ours: Name in our models.
        theirs: Name in Hugging Face's model; None if it is the same.
        transposed: Whether Hugging Face stores the transpose.
    """

    ours: str
    theirs: str | None = None
    transposed: bool = False


class Architecture(ABC):
    """The adapter of one Hugging Face ``model_type``. Its methods raise ValueError with a reason but no file name.

    Attributes:
        name: Name for messages.
        model_type: Hugging Face's ``model_type``.
        hf_class: Name of the class in transformers, with its head.
        config: The config table.
        fixed: Hugging Face's fields that we have no setting for, each with the only supported value.
        implied: Our settings that Hugging Face has no field for, each with the value of its models.
        kept: Settings in which a model must match the weights that it loads (see ``holds``).
        weights: The weight table.
        prefix: Prefix of all weight names in Hugging Face's model except the head's.
        ignored: Suffixes of stored names that are not weights, such as masks.
    """

    name: ClassVar[str]
    model_type: ClassVar[str]
    hf_class: ClassVar[str]
    config: ClassVar[tuple[ConfigField, ...]]
    fixed: ClassVar[dict[str, Any]]
    implied: ClassVar[dict[str, Any]]
    kept: ClassVar[tuple[str, ...]] = ()
    weights: ClassVar[tuple[Weight, ...]]
    prefix: ClassVar[str]
    ignored: ClassVar[tuple[str, ...]] = ()

    # Config

    def settings_from_hf(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a ``config.json`` describes.

        Dropout is left out, because it does not belong to the weights.

        Raises:
            ValueError: A field has a value that is not supported.
        """
        for name, only in self.fixed.items():
            if hf_config.get(name, only) != only:
                raise ValueError(f"{name} is {shown(hf_config[name])}; only {only!r} is supported")
        return {field.ours: field.read(hf_config) for field in self.config} | self.implied

    def settings(self, row: Implementation, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of one of our models.

        Args:
            row: Its implementation, which has this architecture.
            fields: Its config fields; those left out have the config's defaults.
        """
        return row.complete(dict(fields)) | row.hard_coded

    def hf_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``config.json`` of a model, without its special tokens. Padding of the vocabulary is left out.

        Raises:
            ValueError: Hugging Face's architecture has no field for one of the settings.
        """
        for name, only in self.implied.items():
            if settings[name] != only:
                raise ValueError(f"a model with --{name} {settings[name]} is not a {self.name}")
        settings = {**settings, "vocab_size": settings["vocab_size"] - settings.get("vocab_padding", 0)}
        return {
            "architectures": [self.hf_class],
            "model_type": self.model_type,
            **{field.theirs: field.write(settings) for field in self.config},
            **self.fixed,
        }

    def fields(self, settings: Mapping[str, Any], *, row: Implementation) -> dict[str, Any]:
        """Translate settings to the config fields of an implementation.

        Raises:
            ValueError: The implementation hard-codes another value.
        """
        for name, value in row.hard_coded.items():
            if not holds(name, want=value, have=settings[name]):
                raise ValueError(f"{row.name} always has {name}={value}, and these weights have {settings[name]}")
        names = {field.ours for field in self.config} | self.implied.keys()
        return {name: settings[name] for name in settings if name in names - row.hard_coded.keys()}

    def choices(self, row: Implementation) -> dict[str, Any]:
        """Return the config fields, except sizes, that make an implementation equal to Hugging Face's default model."""
        choices = {field.ours: field.read({}) for field in self.config if field.values is not None} | self.implied
        return {name: value for name, value in choices.items() if name not in row.hard_coded}

    def implementation_for(self, settings: Mapping[str, Any]) -> tuple[Implementation, dict[str, Any]]:
        """Return the first implementation that has exactly these settings, and its config fields.

        Raises:
            ValueError: There is none.
        """
        reasons = []
        for row in IMPLEMENTATIONS.values():
            if row.architecture == self.model_type:
                wrong = [f"{name}={value}" for name, value in row.hard_coded.items() if settings[name] != value]
                if not wrong:
                    return row, self.fields(settings, row=row)
                reasons.append(f"{row.name} always has {' and '.join(wrong)}")
        raise ValueError(f"no implementation is such a {self.name}: {', '.join(reasons)}")

    # Weights

    def hf_name(self, name: str) -> str:
        """Return Hugging Face's name of one of our weights; a name that is not in the table is unchanged."""
        return _translate(name, {weight.ours: weight.theirs or weight.ours for weight in self.weights})

    def our_name(self, name: str) -> str:
        """Return our name of one of Hugging Face's weights; a name that is not in the table is unchanged."""
        return _translate(name, {weight.theirs or weight.ours: weight.ours for weight in self.weights})

    def plain_names(self, stored: Iterable[str]) -> dict[str, str]:
        """Map each weight's name in Hugging Face's model to the name it is stored under.

        Strips the prefixes of wrappers, adds the prefix that a model saved without its head lacks, and leaves out names
        that are not weights.
        """
        names = {}
        for key in stored:
            name = key
            while name.startswith(_WRAPPERS):
                name = name.partition(".")[2]
            if not name.endswith(self.ignored):
                names[name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name] = key
        return names

    def imported(self, stored: Mapping[str, Tensor], read: Read) -> tuple[dict[str, Tensor], Read]:
        """Translate Hugging Face's weights.

        Args:
            stored: Tensors by stored name; only their shapes and dtypes are used.
            read: Reads a stored tensor.

        Returns:
            Our weights on the meta device by name, and a function that reads one.
        """
        keys = {self.our_name(name): key for name, key in self.plain_names(stored).items()}
        transposed = {name for name in keys if self._is_transposed(name)}

        def read_ours(name: str) -> Tensor:
            tensor = read(keys[name])
            return tensor.t().contiguous() if name in transposed else tensor

        return {name: _shape_of(stored[key], flipped=name in transposed) for name, key in keys.items()}, read_ours

    def exported(self, stored: Mapping[str, Tensor], read: Read) -> tuple[dict[str, Tensor], Read]:
        """Translate our weights; the inverse of ``imported``. Biases that our model lacks become zeros.

        Args:
            stored: Our weights by name; only their shapes and dtypes are used.
            read: Reads one of them.

        Returns:
            Hugging Face's weights on the meta device by name, and a function that reads one.
        """
        known = {weight.ours for weight in self.weights}
        layout: dict[str, Tensor] = {}
        sources: dict[str, str] = {}
        for name, tensor in stored.items():
            theirs = self.hf_name(name)
            layout[theirs] = _shape_of(tensor, flipped=self._is_transposed(name))
            sources[theirs] = name
            bias = name.removesuffix("weight") + "bias"
            if _LAYER.sub(".*.", bias) in known and bias not in stored:
                layout[self.hf_name(bias)] = tensor.new_empty(tensor.shape[:1], device="meta")

        def read_theirs(name: str) -> Tensor:
            if name not in sources:
                return torch.zeros_like(layout[name], device="cpu")
            tensor = read(sources[name])
            return tensor.t() if self._is_transposed(sources[name]) else tensor

        return layout, read_theirs

    def _is_transposed(self, name: str) -> bool:
        pattern = _LAYER.sub(".*.", name)
        return any(weight.ours == pattern and weight.transposed for weight in self.weights)


def holds(name: str, *, want: Any, have: Any) -> bool:
    """Return whether a model whose setting has the value `want` can hold weights trained with `have`."""
    return want == have or (name in _WIDER and _WIDER[name] == want)


def _translate(name: str, table: Mapping[str, str]) -> str:
    layer = _LAYER.search(name)
    if layer is None:
        return table.get(name, name)
    found = table.get(f"{name[: layer.start()]}.*.{name[layer.end() :]}")
    return name if found is None else found.replace("*", layer[1])


def _shape_of(tensor: Tensor, *, flipped: bool) -> Tensor:
    return tensor.new_empty(tuple(reversed(tensor.shape)) if flipped else tuple(tensor.shape), device="meta")
