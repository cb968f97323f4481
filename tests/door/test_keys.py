"""API keys: what the file may hold, who is found in it, and when it is read again."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import pytest

from llmserve.api_keys import ApiKeys, hash_key, new_key
from llmserve.cli import main
from llmserve.errors import ConfigError
from tests.door.conftest import write_keys


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_key_is_found_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    keys = write_keys(path, alice="weight = 2", bob='scopes = ["infer", "metrics"]\nrequests_per_minute = 3')
    found = ApiKeys(path)
    alice, bob = found.find(keys["alice"]), found.find(keys["bob"])
    assert alice is not None
    assert (alice.name, alice.weight, alice.scopes) == ("alice", 2.0, {"infer"})
    assert bob is not None
    assert bob.limits.requests.per_minute == 3
    assert bob.scopes == {"infer", "metrics"}
    assert found.find(keys["alice"][:-1]) is None
    assert found.find("") is None
    assert found.find(hash_key(keys["alice"])) is None  # what the file holds opens nothing
    assert keys["alice"] not in path.read_text()


def test_a_changed_file_counts_without_a_signal(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.toml", Clock()
    old = write_keys(path, alice="")["alice"]
    keys = ApiKeys(path, clock)
    new = write_keys(path, bob="", carol="")
    assert keys.find(new["bob"]) is None  # within the second it is not looked at again
    clock.now_s += 2
    assert keys.find(new["bob"]) is not None
    assert keys.find(old) is None


def test_what_a_tenant_has_used_survives_a_change_of_the_file(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.toml", Clock()
    key = write_keys(path, alice="requests_per_minute = 5")["alice"]
    keys = ApiKeys(path, clock)
    alice = keys.find(key)
    assert alice is not None
    alice.usage.prompt_tokens = 7
    path.write_text(path.read_text() + "weight = 3\n")
    clock.now_s += 2
    changed = keys.find(key)
    assert changed is not None
    assert changed.weight == 3
    assert changed.usage.prompt_tokens == 7
    assert changed.limits is alice.limits


@pytest.mark.parametrize("broken", ["[[keys]]\nname = 1", "[[keys]]\nname = [1]", "not toml", None])
def test_a_broken_file_locks_nobody_out(tmp_path: Path, broken: str | None, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys.toml", Clock()
    key = write_keys(path, alice="")["alice"]
    keys = ApiKeys(path, clock)
    if broken is None:
        os.remove(path)
    else:
        path.write_text(broken)
    clock.now_s += 2
    assert keys.find(key) is not None
    assert "stay as they were" in caplog.text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("colour = 1", "unknown field 'colour'"),
        ('scopes = ["root"]', "scopes must be"),
        ("weight = 0", "weight must be a number from 0.001"),
        ("share = 2", "share must be"),
        ("tokens_per_minute = true", "tokens_per_minute must be"),
    ],
)
def test_a_field_that_is_not_understood_is_named(tmp_path: Path, fields: str, reason: str) -> None:
    write_keys(tmp_path / "keys.toml", alice=fields)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        ApiKeys(tmp_path / "keys.toml")


def test_a_hash_that_is_none_and_a_name_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[keys]]\nname = "a"\nsha256 = "sk-plain"\n')
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        ApiKeys(path)
    digest = new_key()[1]
    path.write_text(f'[[keys]]\nname = "a"\nsha256 = "{digest}"\n[[keys]]\nname = "b"\nsha256 = "{digest}"\n')
    with pytest.raises(ConfigError, match="twice"):
        ApiKeys(path)


def test_the_command_makes_a_key_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    assert main(["keys", str(path), "alice"]) == 0
    alice = capsys.readouterr().out.strip()
    assert main(["keys", str(path), "ops", "--scope", "admin", "--scope", "metrics", "--tokens-per-minute", "9"]) == 0
    ops = capsys.readouterr().out.strip()
    keys = ApiKeys(path)
    found = keys.find(ops)
    assert found is not None
    assert found.scopes == {"admin", "metrics"}
    assert found.limits.tokens.per_minute == 9
    assert keys.find(alice) is not None
    assert path.stat().st_mode & 0o077 == 0
    assert main(["keys", str(path), "alice"]) == 1
    assert main(["keys", str(path), 'a"b']) == 1


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    assert main(["keys", str(path), "alice"]) == 0
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))  # there is room for a part of a table
    try:
        assert main(["keys", str(path), "bob"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"Cannot write {path}" in capsys.readouterr().err
    assert path.read_bytes() == before
