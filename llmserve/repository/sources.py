"""From what a user calls a model to files on this machine. Knows names, folders and the hub; reads no weights.

A name is taken, in this order, as
1. a path that exists: a Hugging Face folder (config.json, *.safetensors) or a .gguf file;
2. the name or an alias of an embedded model (`embedded.py`), whatever its case;
3. a name on the Hugging Face hub: `owner/model`, or `owner/model/file.gguf` for one GGUF file of a repository.
So `./smollm2` is always a path, and a hub model is never hidden but by a folder of that very path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmserve.errors import ModelLoadError
from llmserve.gguf_file import is_gguf, read_gguf
from llmserve.json_fields import read_json
from llmserve.kernels.weight_formats import CPU_FORMATS
from llmserve.models.checkpoint_quantization import read_quantization
from llmserve.models.quantization import quantization_choices
from llmserve.repository import embedded
from llmserve.repository.cache import Progress, folder_bytes, no_progress

Kind = Literal["folder", "gguf", "hub", "embedded"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files lie. `name` is what clients call it by default, `root` what the user asked for."""

    kind: Kind
    path: Path  # a Hugging Face folder or a .gguf file
    name: str
    root: str


@dataclass(frozen=True, slots=True)
class ModelListing:
    """A line of `llmserve models`. `path` is None while the model is not on this machine; sizes are bytes."""

    kind: Kind
    name: str
    path: Path | None
    size_bytes: int
    quantizations: tuple[str, ...]  # what --quantization may be where every format is computed; () of a damaged file
    description: str = ""


def resolve_model(name: str, progress: Progress = no_progress) -> ModelSource:
    """Finds the model and fetches it if need be. Raises ModelLoadError, which says what was tried and what to do."""
    path = Path(name).expanduser()
    if path.exists():
        return _local(path, name)
    if (model := embedded.find(name)) is not None:
        return ModelSource("embedded", embedded.fetch_model(model, progress), model.name, name)
    repository, file = _split_hub_name(name)
    if repository is None:
        known = ", ".join(row.name for row in embedded.CATALOGUE)
        raise ModelLoadError(
            f"There is no model {name!r}: no such file or folder, not an embedded model ({known}), and not a hub name "
            "(owner/model)."
        )
    return _from_hub(name, repository, file, progress)


def list_models() -> list[ModelListing]:
    """What can be served by name: the embedded models, then the loadable ones of the Hugging Face cache."""
    return [*map(_embedded_listing, embedded.CATALOGUE), *_hub_cache()]


def _embedded_listing(model: embedded.EmbeddedModel) -> ModelListing:
    folder = embedded.folder_of(model) if embedded.is_fetched(model) else None
    size_bytes = folder_bytes(folder) if folder is not None else model.download_bytes
    description = f"{model.description} {model.licence}."
    return ModelListing("embedded", model.name, folder, size_bytes, quantization_choices((), CPU_FORMATS), description)


def _gguf_quantizations(path: Path) -> tuple[str, ...]:
    """Reads the file's header."""
    try:
        tensors = read_gguf(path).tensors.values()
    except ModelLoadError:
        return ()
    return quantization_choices({tensor.type_name for tensor in tensors}, CPU_FORMATS)


def _folder_quantizations(folder: Path) -> tuple[tuple[str, ...], str]:
    """What `--quantization` may be, and how its matrices are packed, if they are; () if that cannot be read."""
    try:
        packed = read_quantization(read_json(folder / "config.json"))
    except ModelLoadError as error:
        return (), error.message
    own = packed.block_type if packed is not None else None
    return quantization_choices([own] if own is not None else [], CPU_FORMATS), "" if packed is None else f"{packed}."


def _local(path: Path, name: str) -> ModelSource:
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            hint = f" It holds {', '.join(files)}: name one of these files." if files else ""
            raise ModelLoadError(f"{path}: holds no config.json, so it is not a Hugging Face model folder.{hint}")
        return ModelSource("folder", path, path.resolve().name, name)
    if not path.is_file() or not is_gguf(path):
        raise ModelLoadError(f"{path}: neither a Hugging Face model folder nor a GGUF file.")
    return ModelSource("gguf", path, path.stem, name)


def _split_hub_name(name: str) -> tuple[str | None, str]:
    """("owner/model", file or ""), or (None, "") if this can only be a path, or nothing at all."""
    owner_and_model, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if _HUB_NAME.fullmatch(owner_and_model) is None or owner_and_model.endswith(".gguf"):
        return None, ""
    return (None, "") if file and not file.endswith(".gguf") else (owner_and_model, file)


def _from_hub(name: str, repository: str, file: str, progress: Progress) -> ModelSource:
    from llmserve.repository import hub  # the hub's library is slow to import, and most starts need none of it

    if file:
        path = hub.download_file(repository, file, progress)
        return ModelSource("hub", path, path.stem, name)
    path = hub.download_model(repository, progress)
    if not is_loadable(path):
        raise ModelLoadError(
            f"{repository} on the hub holds no config.json with *.safetensors. For a GGUF file of it, name the file: "
            f"{repository}/<file>.gguf."
        )
    return ModelSource("hub", path, repository, name)


def is_loadable(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model: a configuration and weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _hub_cache() -> Iterator[ModelListing]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories: list[Any] = sorted(scan_cache_dir().repos, key=lambda repository: repository.repo_id)
    except CacheNotFound:
        return
    for repository in repositories:
        if repository.repo_type != "model":
            continue
        for revision in sorted(repository.revisions, key=lambda revision: -revision.last_modified)[:1]:
            if is_loadable(revision.snapshot_path):
                choices, packed = _folder_quantizations(revision.snapshot_path)
                yield ModelListing(
                    "hub", repository.repo_id, revision.snapshot_path, repository.size_on_disk, choices, packed
                )
            for path in sorted(revision.snapshot_path.glob("*.gguf")):
                name = f"{repository.repo_id}/{path.name}"
                yield ModelListing("hub", name, path, path.stat().st_size, _gguf_quantizations(path))
