"""The images and manifests name what there is: files, commands, flags, routes, ports. Nothing is built here."""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmserve import cli
from llmserve.api.scopes import OPEN, http_scope
from llmserve.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL"}
INSTRUCTIONS |= {"USER", "VOLUME", "WORKDIR"}


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its arguments), continued lines joined."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line]  # type: ignore[misc]


def arguments(name: str, instruction: str) -> list[str]:
    return [rest for found, rest in instructions(name) if found == instruction]


def check_command(words: list[str]) -> None:
    """That `llmserve` takes it."""
    parser = cli.build_parser()
    assert isinstance(parser.parse_args(words), argparse.Namespace)


def documents(name: str) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((FOLDER / name).read_text())


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_is_made_of_what_there_is(name: str) -> None:
    assert {instruction for instruction, _ in instructions(name)} <= INSTRUCTIONS
    assert instructions(name)[0][0] == "FROM"
    stages = {rest.split(" AS ")[1] for rest in arguments(name, "FROM") if " AS " in rest}
    for rest in arguments(name, "COPY"):
        words = rest.split()
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        else:
            assert all((ROOT / source).exists() for source in words[:-1]), rest
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"'\.\[([a-z,]+)\]'", "\n".join(arguments(name, "RUN")))
    assert set(wanted.split(",")) <= extras.keys()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_starts_the_server_as_somebody_who_may_do_nothing(name: str) -> None:
    (entrypoint,), (command,) = arguments(name, "ENTRYPOINT"), arguments(name, "CMD")
    assert json.loads(entrypoint) == ["llmserve"]
    check_command(json.loads(command))
    assert arguments(name, "USER") == ["llmserve"]
    ports = {int(port) for rest in arguments(name, "EXPOSE") for port in rest.split()}
    assert ports == {ServerConfig().port, ServerConfig().port + 1}
    (probe,) = arguments(name, "HEALTHCHECK")
    program, *words = json.loads(probe.partition("CMD ")[2])
    assert program == "llmserve"
    check_command(words)
    (limit,) = re.findall(r"--timeout=(\d+)s", probe)
    assert cli.build_parser().parse_args(words).timeout_s < int(limit)  # so that it can say what is wrong


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_sent_to_the_builder_and_nothing_else(name: str) -> None:
    allowed = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = [source for rest in arguments(name, "COPY") if "--from" not in rest for source in rest.split()[:-1]]
    assert sorted(copied) == sorted(allowed)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert any(fnmatch.fnmatch("llmserve", pattern) for pattern in packages)


@pytest.mark.parametrize("name", [*DOCKERFILES, "compose.yaml", "kubernetes.yaml"])
def test_commands_in_comments_are_right(name: str) -> None:
    text = "\n".join(line for line in (FOLDER / name).read_text().splitlines() if line.startswith("#"))
    text = re.sub(r"\\\n#\s*", "", text)
    for command in re.findall(r"\bllmserve (keys [^&\n]+)", text):
        check_command(shlex.split(command))
    for command in re.findall(r" llmserve(?::cuda)? +(serve .+)", text):
        check_command(shlex.split(command))
    for path in re.findall(r"docker/[\w.]+", text):
        assert (ROOT / path).exists(), path


def test_the_composition_runs_what_there_is() -> None:
    (composition,) = documents("compose.yaml")
    service = composition["services"]["llmserve"]
    check_command(service["command"])
    assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert int(service["stop_grace_period"].removesuffix("s")) > drain_s(service["command"])
    assert {volume.split(":")[0] for volume in service["volumes"]} >= composition["volumes"].keys()


def test_the_manifests_probe_routes_that_need_no_key() -> None:
    deployment, service = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": ServerConfig().port, "grpc": ServerConfig().port + 1}
    for kind, path in ("startupProbe", "/ready"), ("livenessProbe", "/health"), ("readinessProbe", "/ready"):
        asked = container[kind]["httpGet"]
        assert asked["path"] == path
        assert asked["port"] in ports
        assert http_scope(path) == OPEN
    assert pod["terminationGracePeriodSeconds"] > drain_s(container["args"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()


def drain_s(command: list[str]) -> float:
    return float(command[command.index("--drain-timeout-s") + 1])
