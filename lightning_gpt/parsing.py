"""Read JSON, YAML and pickles of any origin: an error is one line, and no file takes much memory or time."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

from lightning_gpt.config import UserError

# Python objects take up to 24 times the bytes of their JSON text.
_MAX_JSON = 48 << 20
_MAX_PICKLE = 64 << 20
_MAX_YAML = 256 << 10  # PyYAML reads about 100 kB per second
_MAX_YAML_NODES = 100_000
_MAX_DIGITS = 19  # 64-bit integers
_MAX_TEXT = 200  # characters of a value in an error message


def parse_json(text: str | bytes, *, source: str) -> Any:
    """Parse JSON.

    Args:
        text: The text, or its UTF-8 bytes.
        source: Name of the text; the error message begins with it.

    Raises:
        UserError: It is not JSON in UTF-8, is nested too deeply, or holds an integer of more than 64 bits.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), parse_int=_bounded)
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 (byte {error.start} is 0x{text[error.start]:02X})") from None
    except RecursionError:
        raise UserError(f"{source} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from None


def read_json(path: Path, *, flag: str = "") -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        flag: Prefix of the path in error messages.

    Raises:
        UserError: The file cannot be read, is too large, or ``parse_json`` refuses it.
    """
    return parse_json(_read(path, limit=_MAX_JSON, flag=flag), source=f"{flag}{path}")


def read_yaml(path: Path, *, flag: str = "") -> Any:
    """Return the content of a YAML file.

    Args:
        path: The file.
        flag: Prefix of the path in error messages.

    Raises:
        UserError: The file cannot be read, is too large or not YAML in UTF-8, is nested too deeply, or holds an integer
            of more than 64 bits, or gives a key twice; the message names the line.
    """
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """A loader that refuses huge integers, and a key given twice, of which YAML would silently take the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """Return a mapping; raise a YAMLError that marks the line of a key's second occurrence."""
            seen: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, line) != line:
                    problem = f"{key.value} is given twice, first in line {seen[key.value]}; remove one of them"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
            """Return an integer; raise a YAMLError that marks the line of one that no option can hold."""
            value = super().construct_yaml_int(node)
            if value.bit_length() > 64:
                problem = f"an integer of {value.bit_length():,} bits; give one below 2^63"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return value

    StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)

    source = f"{flag}{path}"
    try:
        text = _read(path, limit=_MAX_YAML, flag=flag).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not a text in UTF-8") from error
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MAX_YAML_NODES:
            raise UserError(f"{source}: its aliases (*name) stand for more than {_MAX_YAML_NODES:,} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{where}: {getattr(error, 'problem', error)}") from error
    except RecursionError:
        raise UserError(f"{source}: it is nested too deeply") from None
    except UserError:
        raise
    except (ValueError, OverflowError) as error:  # a number or date that Python refuses
        raise UserError(f"{source}: {error}") from None


class StrictUnpickler(pickle._Unpickler):
    """An unpickler of containers, text and numbers; a subclass may allow classes in ``find_class``.

    It is the one in Python, because the one in C allocates a table of the size that an index in the file asks for.

    Args:
        path: The file, which is read whole.

    Raises:
        UserError: The file cannot be read or is too large.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(_read(path, limit=_MAX_PICKLE, flag="")))

    def find_class(self, module: str, name: str) -> Any:
        """Refuse classes and functions, which could run any code."""
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read(path: Path, *, limit: int, flag: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{flag}{path}: {error.strerror}") from error
    if len(content) > limit:
        raise UserError(f"{flag}{path} is larger than the {limit >> 10:,} KiB that such a file may have")
    return content


def _bounded(digits: str) -> int:
    if len(digits) > _MAX_DIGITS + 1:
        raise ValueError(f"an integer of {len(digits):,} characters")
    return int(digits)


def _size(node: Any, known: dict[int, float]) -> float:
    """Return how many values a YAML node stands for, aliases expanded; infinity if it contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is known
        parts = node.value if isinstance(node.value, list) else []
        known[id(node)] = 1 + sum(
            _size(each, known) for part in parts for each in (part if isinstance(part, tuple) else (part,))
        )
    return known[id(node)]


def brief(error: BaseException) -> str:
    """Return the first line of an error, shortened, or its type."""
    try:
        text = str(error).strip()
    except (ValueError, RecursionError):  # it quotes a huge integer, or something nested deeply
        text = ""
    return (text.splitlines()[0] if text else type(error).__name__)[:_MAX_TEXT]


def shown(value: Any) -> str:
    """Return a value for an error message: short, and without Python's errors for huge integers or deep nesting."""
    if isinstance(value, str):
        return repr(value[:_MAX_TEXT])
    if value is None or isinstance(value, bool | float) or (type(value) is int and abs(value) <= 2**53):
        return repr(value)
    if type(value) is int:
        return f"an integer of {value.bit_length():,} bits"
    return f"of type {type(value).__name__}"
