"""One model's life: load, reload, unload, and which of its versions answers a request. Reads no folder.

A reload starts the new versions beside the old ones, swaps them between two requests and retires the old ones once
their last request is answered. If any new one fails, all of them are dropped and the old ones serve on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from llmserve.errors import InferenceError, LLMServeError, UnsupportedConfigError
from llmserve.repository.model_folder import Fingerprint, ModelFolder, fingerprint
from llmserve.repository.model_version import OpenVersion
from llmserve.repository.served_version import ServedVersion, VersionState
from llmserve.repository.versions import select_versions


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A line of the repository index. A model that was never loaded has neither version nor state."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class ModelLifecycle:
    """The versions of one model, in every state."""

    def __init__(self, name: str, opener: OpenVersion, drain_s: float) -> None:
        self.name = name
        self.error: LLMServeError | None = None  # of the last load, for a model that has no version to carry it
        self._opener = opener
        self._drain_s = drain_s
        self._versions: dict[int, ServedVersion] = {}
        self._lock = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> list[ServedVersion]:
        """The versions requests are sent to, lowest first."""
        return [version for _, version in sorted(self._versions.items()) if version.serving]

    @property
    def ready(self) -> bool:
        """Whether it serves, and every version it serves takes requests now."""
        serving = self.serving
        return bool(serving) and all(version.ready for version in serving)

    @property
    def failure(self) -> str:
        """Why the last load failed, if nothing serves and something was asked to."""
        if self.serving:
            return ""
        return next((entry.reason for entry in reversed(self.index()) if entry.reason), "")

    @property
    def loaded_once(self) -> bool:
        """Whether a load was ever asked for."""
        return bool(self._versions) or self.error is not None

    def index(self) -> list[IndexEntry]:
        """A line a version; one with the reason if the configuration itself is wrong; the bare name before any load."""
        if not self._versions:
            if self.error is None:
                return [IndexEntry(self.name)]
            return [IndexEntry(self.name, "", VersionState.UNAVAILABLE, self.error.message)]
        entries = []
        for number, version in sorted(self._versions.items()):
            state = version.state
            if state is VersionState.READY and not version.ready:
                state = VersionState.UNAVAILABLE
            entries.append(IndexEntry(self.name, str(number), state, version.reason))
        return entries

    def find(self, version: int | None) -> ServedVersion:
        """The version a request means; None: the highest that serves. Raises InferenceError (not found)."""
        if version is not None:
            found = self._versions.get(version)
            if found is not None and found.serving:
                return found
            missing = f"'{self.name}' version {version} is not found"
        else:
            highest: ServedVersion | None = None
            for candidate in self._versions.values():
                if candidate.serving and (highest is None or candidate.version > highest.version):
                    highest = candidate
            if highest is not None:
                return highest
            missing = f"'{self.name}' has no available versions"
        if isinstance(self.error, UnsupportedConfigError):
            missing = f"{missing}. {self.error.message}"
        raise InferenceError(f"Request for unknown model: {missing}", InferenceError.NOT_FOUND)

    def fail(self, error: LLMServeError) -> None:
        """The folder could not be read: what serves goes on serving, the reason is kept."""
        self.error = error
        for number, version in list(self._versions.items()):
            if version.state is VersionState.UNAVAILABLE:
                del self._versions[number]

    async def load(self, folder: ModelFolder, *, keep_unchanged: bool = False) -> None:
        """Brings the versions that `folder`'s policy selects into service. Raises InferenceError.

        `keep_unchanged` leaves a version running whose files and configuration are as they were.
        """
        async with self._lock:
            folder.retain()
            try:
                await self._load(folder, keep_unchanged)
            finally:
                folder.release()

    async def unload(self) -> None:
        """Takes no more requests; those in flight finish behind the scenes."""
        async with self._lock:
            self.error = None
            self._retire(self.serving)

    async def stop(self) -> None:
        """Unloads and waits until everything has ended."""
        await self.unload()
        await asyncio.gather(*self._retiring)

    async def _load(self, folder: ModelFolder, keep_unchanged: bool) -> None:
        selected = select_versions(folder.config, list(folder.versions))
        if not selected:
            self.fail(
                InferenceError(
                    f"at least one version must be available under the version policy of model '{self.name}'"
                )
            )
            assert self.error is not None
            raise InferenceError(
                f"load failed for model '{self.name}': {self.error.message}", InferenceError.INVALID_ARG
            )
        old = {version.version: version for version in self.serving}
        marks = await asyncio.to_thread(lambda: {number: fingerprint(folder.versions[number]) for number in selected})
        kept = {n: v for n, v in old.items() if keep_unchanged and _unchanged(v, folder, marks.get(n))}
        fresh = {
            number: ServedVersion(self.name, number, folder, marks[number], self._opener)
            for number in selected
            if number not in kept
        }
        # what serves stays in view until it is replaced; what is new shows as LOADING
        self._versions = {**self._versions, **{n: v for n, v in fresh.items() if n not in old}}
        failures = await _start(list(fresh.values()))
        started = [version for version in fresh.values() if version.state is VersionState.LOADING]
        if failures and old:
            self._versions = {n: v for n, v in self._versions.items() if n not in fresh or n in old}
            self._retire(started)
        else:
            self._versions = {**self._versions, **fresh}
            for version in started:
                version.serve()
            self._retire([v for n, v in old.items() if n not in kept])
            self.error = None
        if failures:
            raise InferenceError(
                f"load failed for model '{self.name}': {' '.join(failures)}", InferenceError.INVALID_ARG
            )

    def _retire(self, versions: list[ServedVersion]) -> None:
        for version in versions:
            version.state = VersionState.UNLOADING  # at once: no request may be routed to it from here on
            task = asyncio.create_task(version.retire(self._drain_s), name=f"retire {self.name}/{version.version}")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)


async def _start(versions: list[ServedVersion]) -> list[str]:
    """Starts them all; what went wrong, in Triton's words."""
    results = await asyncio.gather(*(version.start() for version in versions), return_exceptions=True)
    failures = []
    for version, result in zip(versions, results, strict=True):
        if isinstance(result, LLMServeError):
            failures.append(f"version {version.version} is at UNAVAILABLE state: {version.reason};")
        elif isinstance(result, BaseException):
            raise result
    return failures


def _unchanged(version: ServedVersion, folder: ModelFolder, mark: Fingerprint | None) -> bool:
    return version.fingerprint == mark and version.folder.config == folder.config and not version.folder.temporary
