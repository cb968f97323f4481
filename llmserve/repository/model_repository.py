"""The model repository: which models there are, and their loading by the control mode. Runs no model."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from llmserve.errors import ConfigError, InferenceError, LLMServeError, ModelLoadError
from llmserve.repository.cache import Progress, no_progress
from llmserve.repository.lifecycle import IndexEntry, ModelLifecycle
from llmserve.repository.location import LocalRepository, NamedFolders, RepositoryLocation, open_repository
from llmserve.repository.model_folder import (
    Fingerprint,
    ModelFolder,
    check_model_name,
    is_hugging_face_folder,
    is_pooling_model,
    read_inline_config,
    read_model_folder,
    write_model_folder,
)
from llmserve.repository.model_version import OpenVersion
from llmserve.repository.settings import ModelControlMode, RepositorySettings
from llmserve.repository.wheels import Downloads, fetch_files

logger = logging.getLogger(__name__)

ProgressOf = Callable[[str], Progress]  # by the model's name

_NOT_EXPLICIT = (
    "explicit model load / unload is not allowed if polling is enabled: models are loaded and unloaded by request only "
    "where the server was started with --model-control-mode=explicit"
)


class ModelRepository:
    """Every model of every repository given. `opener` makes a version from its folder; nothing here knows how."""

    def __init__(
        self, settings: RepositorySettings, opener: OpenVersion, named: Mapping[str, Path] | None = None
    ) -> None:
        """`named` are folders that are models too, by name; whatever the control mode, they are loaded at the start."""
        self.settings = settings
        self._opener = opener
        self._named = dict(named or {})
        self._locations: list[RepositoryLocation] = [open_repository(url) for url in settings.model_repository]
        if self._named:
            self._locations.append(NamedFolders(self._named))
        self._models: dict[str, ModelLifecycle] = {}
        self._known: dict[str, list[RepositoryLocation]] = {}  # what the last look at the folders found
        self._hugging_face: list[Path] = []
        self._fingerprints: dict[str, Fingerprint] = {}  # by name, in mode poll
        self._loading = asyncio.Semaphore(settings.model_load_thread_count)
        self._started = False
        self._downloads = Downloads()
        self._progress_of: ProgressOf = lambda model: no_progress
        self._poller: asyncio.Task[None] | None = None

    # Life.

    async def start(self, progress_of: ProgressOf = lambda model: no_progress) -> None:
        """Loads what the control mode loads at the start. A model that fails is reported in the index, not raised,
        unless `exit_on_error` is set. `progress_of` gives each model that is fetched something to report to. Raises
        ConfigError, InferenceError."""
        self._progress_of = progress_of
        await self._scan()
        wanted = self._initial_models()
        polling = self.settings.model_control_mode is ModelControlMode.POLL
        if polling:  # before anything is loaded, so that what changes meanwhile is seen
            self._fingerprints = await asyncio.to_thread(self._look_at_files)
        errors = await self._load_all(wanted)
        if self.settings.exit_on_error and errors:
            raise errors[0]
        self._started = True
        self._progress_of = lambda model: no_progress  # what is loaded later nobody watches
        if polling:
            self._poller = asyncio.create_task(self._poll(), name="repository poll")

    async def stop(self) -> None:
        """Unloads everything; returns when every version has ended."""
        self._downloads.end()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        await asyncio.gather(*(model.stop() for model in self._models.values()))

    @property
    def ready(self) -> bool:
        """What `/v2/health/ready` says of the repository.

        With `strict_readiness` every model must serve. In mode explicit only those that were brought into service
        count: a load request that fails says so itself, and must not take the whole server out of rotation.
        """
        if not self._started:
            return False
        if not self.settings.strict_readiness:
            return True
        if self.settings.model_control_mode is ModelControlMode.EXPLICIT:
            return all(model.ready for model in self._models.values() if model.serving)
        return all(model.ready for name, model in self._models.items() if name in self._known)

    @property
    def missing(self) -> dict[str, str]:
        """The models that should serve and do not, with what their load failed on."""
        settings = self.settings
        if not settings.strict_readiness or settings.model_control_mode is ModelControlMode.EXPLICIT:
            return {}
        return {name: model.failure for name, model in self._models.items() if name in self._known and model.failure}

    # Looking.

    def has(self, name: str) -> bool:
        """Whether a model of that name was ever asked to load."""
        return self.get(name) is not None

    def get(self, name: str) -> ModelLifecycle | None:
        """The model of that name; None for one that was never asked to load."""
        model = self._models.get(name)
        return model if model is not None and model.loaded_once else None

    def find(self, name: str) -> ModelLifecycle:
        """The model of that name. Raises InferenceError (not found) for one that was never asked to load."""
        model = self.get(name)
        if model is None:
            raise InferenceError(f"Request for unknown model: '{name}' is not found", InferenceError.NOT_FOUND)
        return model

    @property
    def models(self) -> Iterable[ModelLifecycle]:
        """Every model that was ever asked to load, by name."""
        return (model for _, model in sorted(self._models.items()))

    async def index(self) -> list[IndexEntry]:
        """Every model and version, those never loaded by name alone; sorted by name."""
        if self._started and self.settings.model_control_mode is not ModelControlMode.NONE:
            await self._scan()
        entries = [entry for model in self._models.values() for entry in model.index()]
        entries += [IndexEntry(name) for name in self._known if name not in self._models]
        return sorted(entries, key=lambda entry: (entry.name, int(entry.version or 0)))

    @property
    def hugging_face_folders(self) -> list[Path]:
        """Local folders that hold a Hugging Face model: other backends serve them, and they are left alone here."""
        return self._hugging_face

    # Changing.

    async def load(self, name: str, config_json: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Loads or reloads a model, on a load request. Raises InferenceError, InvalidRequestError.

        `config_json` stands in for the configuration on disk; `files` (`file:<version>/<path>` -> content) for the
        folder, and then needs `config_json`. A request that goes away does not leave a load half done.
        """
        self.require_explicit()
        check_model_name(name)
        if files and config_json is None:
            raise InferenceError(
                f"failed to load '{name}', the 'config' parameter must be given where the load overrides files",
                InferenceError.INVALID_ARG,
            )
        await asyncio.shield(asyncio.create_task(self._load(name, config_json, files or {})))

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        """Takes a model out of service. One that is unknown or not loaded is fine.

        `unload_dependents` would take the models of an ensemble with it; nothing depends on anything yet.
        """
        self.require_explicit()
        model = self._models.get(name)
        if model is not None:
            await model.unload()

    # Inside.

    def require_explicit(self) -> None:
        """Raises InferenceError where models are not loaded by request."""
        if self.settings.model_control_mode is not ModelControlMode.EXPLICIT:
            raise InferenceError(_NOT_EXPLICIT, InferenceError.UNAVAILABLE)

    def _initial_models(self) -> list[str]:
        settings = self.settings
        if settings.model_control_mode is not ModelControlMode.EXPLICIT:
            if settings.load_model:
                raise ConfigError("--load-model needs --model-control-mode=explicit: the other modes load every model.")
            return sorted(self._known)
        if settings.load_model == ("*",):
            return sorted(self._known)
        if missing := [name for name in settings.load_model if name not in self._known]:
            raise ConfigError(f"--load-model {missing[0]!r}: no model repository holds a model of that name.")
        return sorted({*settings.load_model, *self._named})

    async def _load_all(self, names: Iterable[str]) -> list[LLMServeError]:
        """Loads several at a time; what failed is in the index and in the log."""

        async def load(name: str) -> LLMServeError | None:
            try:
                async with self._loading:
                    await self._load(name, None, {})
            except LLMServeError as error:
                return error
            return None

        return [error for error in await asyncio.gather(*(load(name) for name in names)) if error is not None]

    async def _load(self, name: str, config_json: str | None, files: Mapping[str, bytes]) -> None:
        if not files and name not in self._known:
            await self._scan()
            if name not in self._known:
                raise InferenceError(f"failed to load '{name}', failed to poll from model repository")
        polling = self.settings.model_control_mode is ModelControlMode.POLL
        known = name in self._models
        model = self._models.setdefault(name, ModelLifecycle(name, self._opener, self.settings.exit_timeout_secs))
        try:
            folder = await asyncio.to_thread(self._read, name, config_json, files)
            await model.load(folder, keep_unchanged=polling)
        except LLMServeError as error:
            logger.error("Model %s: %s", name, error.message)
            if not known and files:
                del self._models[name]  # an upload that failed leaves nothing behind
            elif not isinstance(error, InferenceError):
                model.fail(error)
            if isinstance(error, ModelLoadError):
                raise InferenceError(
                    f"load failed for model '{name}': {error.message}", InferenceError.INVALID_ARG
                ) from error
            raise

    def _read(self, name: str, config_json: str | None, files: Mapping[str, bytes]) -> ModelFolder:
        """Blocks on files. Raises ModelLoadError, InvalidRequestError."""
        config = None if config_json is None else read_inline_config(name, config_json)
        if files:
            assert config is not None
            return write_model_folder(name, config, files)
        locations = self._known[name]
        if len(locations) > 1:
            listed = ", ".join(str(location) for location in locations)
            raise ModelLoadError(f"Model {name!r} stands in several repositories: {listed}. Leave it in one.")
        location = locations[0]
        path = location.fetch(name)
        named = isinstance(location, NamedFolders)  # what its user names may hold links to anywhere, as the hub's do
        try:
            return read_model_folder(
                name,
                path,
                path.parent if isinstance(location, LocalRepository) else Path(path.anchor if named else path),
                config_name=self.settings.model_config_name,
                config=config,
                temporary=location.remote,
                fetch=partial(fetch_files, progress=self._progress_of(name), downloads=self._downloads),
            )
        except BaseException:
            if location.remote:
                shutil.rmtree(path.parent, ignore_errors=True)
            raise

    async def _scan(self) -> None:
        """Looks at the folders again. Raises InferenceError where a repository cannot be read."""

        def look() -> tuple[dict[str, list[RepositoryLocation]], list[Path]]:
            found: dict[str, list[RepositoryLocation]] = {}
            hugging_face: list[Path] = []
            for location in self._locations:
                for name in location.model_names():
                    folder = location.root / name if isinstance(location, LocalRepository) else None
                    if folder is not None and is_hugging_face_folder(folder) and not is_pooling_model(folder):
                        hugging_face.append(folder)
                    else:
                        found.setdefault(name, []).append(location)
            return found, hugging_face

        try:
            self._known, self._hugging_face = await asyncio.to_thread(look)
        except OSError as error:
            raise InferenceError(f"failed to poll from model repository: {error}") from error

    # Mode poll.

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.settings.repository_poll_secs)  # the mode is called poll
            try:
                await self.poll_once()
            except (LLMServeError, OSError) as error:
                logger.error("The model repository could not be polled: %s", error)

    async def poll_once(self) -> None:
        """Loads what is new or changed on disk since the last look, unloads what is gone."""
        await self._scan()
        before, now = self._fingerprints, await asyncio.to_thread(self._look_at_files)
        self._fingerprints = now
        gone = [model for name, model in self._models.items() if name not in now]
        await asyncio.gather(*(model.unload() for model in gone))
        await self._load_all(sorted(name for name, mark in now.items() if before.get(name) != mark))

    def _look_at_files(self) -> dict[str, Fingerprint]:
        return {
            name: tuple(entry for location in locations for entry in location.fingerprint(name))
            for name, locations in self._known.items()
        }
