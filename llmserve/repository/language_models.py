"""Loads, reloads and unloads LLMs while the server runs, without losing a request. Knows no engine and no route.

A reload starts the new version beside the old one; if it cannot start, the old one serves on. Then new requests go to
the new version, and the old one ends when it has answered its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from llmserve.backends.llm import LLM
from llmserve.config import ModelConfigEntry
from llmserve.errors import InferenceError, LLMServeError
from llmserve.repository.heap import give_back
from llmserve.repository.served_models import ServedModels

logger = logging.getLogger(__name__)

_LATE_S = 5.0  # for a request that has chosen its version, and is being tokenized; later it goes to the next version
_ENGINE_GRACE_S = 5.0

OpenLLM = Callable[[ModelConfigEntry, int], LLM]  # blocks on files; the number is that of the version


class LanguageModels:
    """The LLMs of a server, by every name each is served under."""

    def __init__(self, served: ServedModels, open_llm: OpenLLM, drain_s: float) -> None:
        self._served = served
        self._open = open_llm
        self._drain_s = drain_s
        self._entries: dict[str, tuple[ModelConfigEntry, Sequence[str]]] = {}  # unloaded ones too
        self._lock = asyncio.Lock()
        self._ending = asyncio.Event()
        self._retiring: dict[asyncio.Task[None], LLM] = {}

    def add(self, llm: LLM, entry: ModelConfigEntry) -> None:
        """One that is opened at the start. Raises ConfigError if one of its names is taken."""
        names = entry.served_names or (llm.name,)
        self._served.add(llm, names)
        self._entries.update(dict.fromkeys(names, (entry, names)))

    def has(self, name: str) -> bool:
        """Whether an LLM of that name is served, or has been."""
        return name in self._entries

    async def load(self, name: str) -> None:
        """Reads the model's files again and brings what they hold into service. A request that goes away does not
        leave a load half done. Raises InferenceError; what served goes on serving then."""
        await asyncio.shield(asyncio.create_task(self._load(name), name=f"load {name}"))

    async def unload(self, name: str) -> None:
        """Takes an LLM out of service under all its names; requests in flight finish behind the scenes."""
        async with self._lock:
            if (old := self._served.find(name)) is not None:
                self._served.remove(old)
                self._retire(old)

    async def drain(self, timeout_s: float) -> None:
        """Takes no more requests anywhere; returns when all are answered, or when the time is over."""
        self._ending.set()
        llms = [*self._served.llms, *self._retiring.values()]
        await asyncio.gather(*(llm.drain(timeout_s) for llm in llms))

    async def stop(self, grace_s: float) -> None:
        """Ends every engine."""
        self._ending.set()
        for task in self._retiring:
            task.cancel()
        llms = [*self._served.llms, *self._retiring.values()]
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await asyncio.gather(*(llm.shutdown(grace_s) for llm in llms))

    async def _load(self, name: str) -> None:
        async with self._lock:
            entry, names = self._entries[name]
            old = self._served.find(name)
            try:
                new = await asyncio.to_thread(self._open, entry, old.version + 1 if old is not None else 1)
                await self._start(new)
            except LLMServeError as error:
                logger.error("Model %s could not be loaded: %s", name, error.message)
                raise InferenceError(
                    f"load failed for model '{name}': {error.message}", InferenceError.INVALID_ARG
                ) from error
            if old is None:
                self._served.add(new, names)
            else:
                if await asyncio.to_thread(old.tokenizer.is_same_as, new.tokenizer):
                    old.successor = new
                self._served.replace(old, new)
                self._retire(old)
            logger.info("Model %s: version %d serves", name, new.version)

    async def _start(self, llm: LLM) -> None:
        try:
            await llm.start()
        except BaseException:
            await llm.shutdown(_ENGINE_GRACE_S)
            raise

    def _retire(self, llm: LLM) -> None:
        task = asyncio.create_task(self._end(llm), name=f"retire {llm.name}/{llm.version}")
        self._retiring[task] = llm
        task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Task[None]) -> None:
        del self._retiring[task]
        if not self._ending.is_set():
            give_back()

    async def _end(self, llm: LLM) -> None:
        """Nobody finds it any more; those that have found it already may still come for a moment."""
        try:
            await asyncio.wait_for(self._ending.wait(), _LATE_S)
        except TimeoutError:
            await llm.retire(self._drain_s)
            await llm.shutdown(_ENGINE_GRACE_S)
            logger.info("Model %s: version %d has ended", llm.name, llm.version)
