"""deploy/ against the compose schema, the Dockerfile linter and the command line. No container engine is needed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
COMPOSE = ROOT / "deploy" / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
SERVING = {name: service for name, service in SERVICES.items() if name != "model"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": str(Path(sys.executable).parent), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), comments gone and continued lines joined."""
    lines = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines).splitlines()
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in joined) if word]


def last(instruction: str) -> str:
    return [rest for word, rest in instructions() if word == instruction][-1]


def baton_commands() -> list[list[str]]:
    """Every `baton` command line that the image or a service runs, without the word `baton`."""
    commands = [service["command"] for service in SERVICES.values()]
    commands += [service["healthcheck"]["test"][2:] for service in SERVING.values()]
    commands.append(json.loads(last("CMD")))
    shell = [*json.loads(last("HEALTHCHECK").partition(" CMD ")[2])[2:], *(r for w, r in instructions() if w == "RUN")]
    found = [re.findall(r"(?:^|exec |then |&& )baton ([^;&|]+)", line) for line in shell]
    return commands + [shlex.split(text) for texts in found for text in texts]


def test_compose_file_is_valid_against_the_compose_specification() -> None:
    ran = run(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_dockerfile_passes_the_linter() -> None:
    ran = run(program("hadolint"), "--no-color", "--failure-threshold", "info", str(DOCKERFILE))
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_image_runs_as_an_ordinary_user_in_exec_form() -> None:
    stage = [word for word, _ in instructions()]
    assert last("USER") not in ("root", "0")
    assert json.loads(last("ENTRYPOINT")) == ["baton"]
    assert stage.index("USER") < stage.index("ENTRYPOINT")
    assert "HEALTHCHECK" in stage


def test_image_copies_every_package_and_its_ignore_file_lets_them_through() -> None:
    wanted = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    wanted |= {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    copied = {
        name for word, rest in instructions() if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]
    }
    let_through = {line[1:] for line in Path(f"{DOCKERFILE}.dockerignore").read_text().split() if line.startswith("!")}
    assert copied == wanted
    assert let_through == wanted


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["stop_grace_period"]
    assert service["restart"]
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()


def test_compose_is_one_router_and_one_worker_of_each_kind_over_tcp() -> None:
    assert sorted(service["command"][0] for service in SERVING.values()) == ["decode", "prefill", "router"]
    assert all(service["healthcheck"]["test"][:3] == ["CMD", "baton", "health"] for service in SERVING.values())
    for name in ("prefill", "decode"):
        assert "--transport=tcp" in SERVICES[name]["command"]
        assert f"--advertise={name}:9701" in SERVICES[name]["command"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["router"]["ports"])


def subcommand(command: list[str]) -> list[str]:
    """The leading words that choose what runs: `model fetch` is two of them."""
    return command[:2] if command[0] == "model" else command[:1]


HELP_OF = sorted({" ".join(subcommand(command)) for command in baton_commands()})


def test_the_image_and_the_services_run_the_commands_we_think() -> None:
    assert HELP_OF == ["decode", "health", "model fetch", "prefill", "router"]


@pytest.mark.parametrize("words", HELP_OF)
def test_commands_and_flags_are_those_of_the_command_line(words: str) -> None:
    used = [command for command in baton_commands() if " ".join(subcommand(command)) == words]
    flags = {word.partition("=")[0] for command in used for word in command if word.startswith("--")}
    ran = run(sys.executable, "-m", "baton.cli", *words.split(), "--help")
    assert ran.returncode == 0, ran.stderr
    assert flags <= set(re.findall(r"--[a-z][a-z-]*", ran.stdout)), f"baton {words} --help does not have them all"
