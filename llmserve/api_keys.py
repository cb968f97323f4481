"""The API keys of a file: who holds them and what they may do. Knows no protocol.

The file holds hashes only. A key is 256 random bits, so a plain SHA-256 cannot be reversed, and a slow, salted hash
would only cost every request its time. The file is looked at again when a key is checked, at most once a second: a key
that is added or taken away counts from then on, without a signal and without a poll.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llmserve.errors import ConfigError
from llmserve.rate_limit import RateLimits
from llmserve.request_context import Tenant

logger = logging.getLogger(__name__)

SCOPES = ("infer", "admin", "metrics")
KEY_PREFIX = "sk-llmserve-"
_LOOK_AGAIN_S = 1.0
_NAME = re.compile(r"[\w.@-]{1,64}")
_DEFAULT_SHARE = 0.5  # no single tenant fills the queue, unless its entry says so
_FIELDS = ("name", "sha256", "scopes", "weight", "share", "requests_per_minute", "tokens_per_minute")


def new_key() -> tuple[str, str]:
    """A key, and the hash of it that the file holds."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_key_name(name: str) -> bool:
    """Whether a holder may be called so: the name stands in logs, metrics and TOML."""
    return _NAME.fullmatch(name) is not None


class ApiKeys:
    """The keys of one file, as it is now."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if the file cannot be read or holds something that is not understood."""
        self._path = path
        self._clock = clock
        # Keys are looked up under a keyed hash of theirs: how long that takes says nothing about any key of the file.
        self._blind = secrets.token_bytes(32)
        self._tenants: dict[bytes, Tenant] = {}
        self._by_name: dict[str, Tenant] = {}
        self._mark = _mark(path)
        self._look_again_s = clock() + _LOOK_AGAIN_S
        self._load()

    def find(self, key: str) -> Tenant | None:
        """Who holds `key`; None if nobody does."""
        self._refresh()
        return self._tenants.get(self._blinded(hash_key(key)))

    @property
    def tenants(self) -> Iterable[Tenant]:
        """Every holder of a key, in the file's order."""
        return self._by_name.values()

    def _refresh(self) -> None:
        """A file that cannot be read leaves the keys as they were: half a file must not lock everyone out."""
        now_s = self._clock()
        if now_s < self._look_again_s:
            return
        self._look_again_s = now_s + _LOOK_AGAIN_S
        mark = _mark(self._path)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._load()
        except ConfigError as error:
            logger.error("The API keys stay as they were: %s", error.message)
        else:
            logger.info("read %d API keys from %s", len(self._by_name), self._path)

    def _load(self) -> None:
        tenants: dict[bytes, Tenant] = {}
        by_name: dict[str, Tenant] = {}
        for position, entry in enumerate(read_key_file(self._path)):
            tenant = read_tenant(entry, f"{self._path}: keys[{position}]", self._by_name)
            blinded = self._blinded(entry["sha256"].lower())
            if tenant.name in by_name or blinded in tenants:
                raise ConfigError(f"{self._path}: the key {tenant.name!r} stands there twice.")
            tenants[blinded] = by_name[tenant.name] = tenant
        self._tenants, self._by_name = tenants, by_name

    def _blinded(self, digest: str) -> bytes:
        return hmac.digest(self._blind, digest.encode(), "sha256")


def read_key_file(path: Path) -> list[dict[str, Any]]:
    """The `[[keys]]` tables. Raises ConfigError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the API keys in {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The API keys in {path} are not valid TOML: {error}.") from error
    entries = raw.get("keys", [])
    if raw.keys() - {"keys"} or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path} may hold [[keys]] tables and nothing else.")
    return entries


def read_tenant(entry: dict[str, Any], where: str, known_tenants: Mapping[str, Tenant]) -> Tenant:
    """Raises ConfigError. What a known tenant has used, and what is left of its limits, stays with it."""
    if unknown := sorted(entry.keys() - set(_FIELDS)):
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}. Known are {', '.join(_FIELDS)}.")
    name, digest, scopes = entry.get("name"), entry.get("sha256"), entry.get("scopes", ["infer"])
    if not isinstance(name, str) or not is_key_name(name):
        raise ConfigError(f"{where}: name must be 1 to 64 letters, digits or any of . _ @ -, not {name!r}.")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise ConfigError(f"{where}: sha256 must be the 64 hexadecimal digits that `llmserve keys` writes.")
    if not isinstance(scopes, list) or not scopes or not set(map(str, scopes)) <= set(SCOPES):
        raise ConfigError(f"{where}: scopes must be a list of {', '.join(SCOPES)}, not {scopes!r}.")
    weight = _number(entry, "weight", 1.0, where, least=0.001, most=1000.0)
    share = _number(entry, "share", _DEFAULT_SHARE, where, least=0.001, most=1.0)
    requests = int(_number(entry, "requests_per_minute", 0, where, least=0, most=2**53))
    tokens = int(_number(entry, "tokens_per_minute", 0, where, least=0, most=2**53))
    tenant = Tenant(name=name, scopes=frozenset(scopes), weight=weight, share=share)
    if (known := known_tenants.get(name)) is not None:
        tenant.usage = known.usage
        tenant.limits = known.limits
    if (tenant.limits.requests.per_minute, tenant.limits.tokens.per_minute) != (requests, tokens):
        tenant.limits = RateLimits(requests, tokens)
    return tenant


def _number(entry: dict[str, Any], field: str, default: float, where: str, *, least: float, most: float) -> float:
    value = entry.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(f"{where}: {field} must be a number from {least:g} to {most:g}, not {value!r}.")
    return float(value)


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file is written or replaced; None while it is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
