"""Typed access to a model file's metadata, with errors that name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from baton.errors import ModelFileError


class Metadata:
    """Keys and values of one file: a config.json, or the header of a GGUF file.

    Every getter raises ModelFileError, naming file and key, for a value of another type, and for an absent one without
    a default. An explicit null counts as absent.
    """

    def __init__(self, source: str, values: Mapping[str, object]) -> None:
        self.source = source
        self._values = values

    def names(self) -> list[str]:
        return list(self._values)

    def get(self, key: str) -> object:
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._need(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{key} must be an integer, not {value!r}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self.error(f"{key} must be at least 1, not {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._need(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key} must be a number, not {value!r}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._need(key, default)
        if not isinstance(value, str):
            raise self.error(f"{key} must be text, not {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._need(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {value!r}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._need(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key} must be a list of texts")
        return value

    def numbers(self, key: str) -> list[float]:
        value = self._need(key, None)
        if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
            raise self.error(f"{key} must be a list of numbers")
        return value

    def section(self, key: str) -> Metadata:
        """The object under `key`; empty when absent."""
        value = self._values.get(key)
        if value is None:
            return Metadata(self.source, {})
        if not isinstance(value, dict):
            raise self.error(f"{key} must be an object, not {type(value).__name__}")
        return Metadata(self.source, value)

    def under(self, prefix: str) -> Metadata:
        """The values whose keys start with `prefix`, by the rest of their keys."""
        values = {key.removeprefix(prefix): value for key, value in self._values.items() if key.startswith(prefix)}
        return Metadata(self.source, values)

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty when absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
            raise self.error(f"{key} must be token ids, not {value!r}")
        return tuple(items)

    def error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {message}")

    def _need(self, key: str, default: object) -> object:
        found = self._values.get(key)
        value = default if found is None else found
        if value is None:
            raise self.error(f"{key} is missing")
        return value


def read_json(path: Path, optional: bool = False) -> Metadata:
    """Empty for an `optional` file that is absent. Raises ModelFileError for one that can't be read or is no object."""
    if optional and not path.exists():
        return Metadata(str(path), {})
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path}: must hold an object, not {type(values).__name__}")
    return Metadata(str(path), values)
