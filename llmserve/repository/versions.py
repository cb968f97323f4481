"""Which versions a model's folder holds and which of them its version policy serves. Loads nothing."""

from __future__ import annotations

from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig


def parse_version(name: str) -> int | None:
    """The version a folder's name means; None for one that is no version (`0`, `01`, `v1`, `labels`)."""
    if not name.isascii() or not name.isdigit() or name.startswith("0"):
        return None
    version = int(name)
    return version if version < 2**63 else None


def scan_versions(model_path: Path) -> dict[int, Path]:
    """The version folders of a model, lowest first."""
    found: dict[int, Path] = {}
    for child in model_path.iterdir():
        version = parse_version(child.name)
        if version is not None and child.is_dir():
            found[version] = child
    return dict(sorted(found.items()))


def select_versions(config: ModelConfig, available: list[int]) -> list[int]:
    """Those of `available` that the version policy serves, lowest first. Without a policy: the highest."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return sorted(available)
        case "specific":
            return sorted(set(available).intersection(policy.specific.versions))
        case _:
            return sorted(available)[-max(1, policy.latest.num_versions) :]
