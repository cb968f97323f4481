"""`llmserve keys`: makes an API key, shows it once and writes its hash to the file that the server reads."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from llmserve.api_keys import SCOPES, is_key_name, new_key, read_key_file, read_tenant
from llmserve.errors import ConfigError

_LIMITS = ("weight", "share", "requests_per_minute", "tokens_per_minute")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `llmserve keys`."""
    parser.description = "Make an API key. It is shown once; the file holds only its hash. To revoke a key, delete it."
    parser.add_argument("file", type=Path, help="the file that `llmserve serve --api-keys` reads; made if missing")
    parser.add_argument("name", help="who holds the key: it stands in logs and metrics")
    parser.add_argument("--scope", action="append", choices=SCOPES, help="what the key may do; repeatable")
    parser.add_argument(
        "--weight", type=float, help="its part of the tokens under --scheduling-policy fair, 0.001 to 1000 (default: 1)"
    )
    parser.add_argument("--share", type=float, help="the most it may take of the server's queue, 0 to 1")
    parser.add_argument("--requests-per-minute", type=int, help="0: no limit (default)")
    parser.add_argument("--tokens-per-minute", type=int, help="0: no limit (default)")


def run(args: argparse.Namespace) -> int:
    """Prints the key on standard output, alone. Raises ConfigError if the name is taken, the file is not ours or a
    limit is none that the server takes."""
    path: Path = args.file
    if not is_key_name(args.name):
        raise ConfigError(f"{args.name!r} is no name for a key: use 1 to 64 letters, digits or any of . _ @ -.")
    if path.exists() and any(entry.get("name") == args.name for entry in read_key_file(path)):
        raise ConfigError(f"{path} has a key {args.name!r} already. Choose another name, or delete its table first.")
    key, digest = new_key()
    limits = {field: value for field in _LIMITS if (value := getattr(args, field)) is not None}
    read_tenant({"name": args.name, "sha256": digest, **limits}, "The new key", {})
    lines = ["[[keys]]", f'name = "{args.name}"', f'sha256 = "{digest}"']
    lines.append("scopes = [" + ", ".join(f'"{scope}"' for scope in args.scope or ["infer"]) + "]")
    lines += [f"{field} = {value}" for field, value in limits.items()]
    _append(path, ("\n".join(lines) + "\n\n").encode())
    print(f"The key of {args.name!r}, shown this once:", file=sys.stderr)
    print(key)
    return 0


def _append(path: Path, table: bytes) -> None:
    """All of it or, where the disk is full, nothing: the server reads the file as it is. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            num_before = os.fstat(fd).st_size
            if os.write(fd, table) < len(table):
                os.ftruncate(fd, num_before)
                raise ConfigError(f"Cannot write {path}: the disk is full.")
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}.") from error
