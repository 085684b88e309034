"""Finds a model's files by the name a user gives: the embedded model, a path, or a repository of the hub."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from baton.engine.files.download import fetch_embedded
from baton.engine.files.metadata import read_json
from baton.errors import ConfigError, ModelFileError

EMBEDDED_MODEL = "smollm2-135m"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model's files on this machine: a .gguf file, or a folder as Hugging Face lays it out."""

    name: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    def weight_files(self) -> tuple[Path, ...]:
        """Sorted by name. Raises ModelFileError when there are none."""
        if self.is_gguf:
            return (self.path,)
        if (self.path / _SINGLE).exists():
            return (self.path / _SINGLE,)
        if not (self.path / INDEX).exists():
            raise ModelFileError(f"{self.path}: has neither {_SINGLE} nor {INDEX}")
        shards = read_json(self.path / INDEX).section("weight_map")
        files = {shards.text(tensor) for tensor in shards.names()}
        if any(Path(name).name != name for name in files):
            raise shards.error("weight_map names a file outside the folder")
        return tuple(self.path / name for name in sorted(files))


def resolve(name: str) -> ResolvedModel:
    """Fetches the embedded model and models of the hub. Raises ConfigError for a model that is unknown or can't be
    fetched, with the forms of a valid name."""
    if name == EMBEDDED_MODEL:
        return ResolvedModel(name, fetch_embedded())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelFileError(f"{path}: has no config.json, so it is no model folder")
        return ResolvedModel(path.resolve().name, path)
    if path.exists():
        if path.suffix != ".gguf":
            raise ModelFileError(f"{path}: neither a folder nor a .gguf file")
        return ResolvedModel(path.stem, path)
    if _HUB_NAME.fullmatch(name) and not name.startswith("."):
        return ResolvedModel(name, _fetch_from_hub(name))
    raise ConfigError(
        f"unknown model {name!r}: give {EMBEDDED_MODEL!r} (the embedded model), the path of a folder with "
        "config.json and safetensors, the path of a .gguf file, or a hub name such as 'org/name'"
    )


def _fetch_from_hub(name: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(f"model {name!r} is neither a path nor embedded; for the hub: pip install 'baton[hub]'")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # noqa: BLE001 - the hub raises its HTTP library's errors too; all mean the same here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"model {name!r} is no path here and can't be fetched from the hub: {reason}") from None
