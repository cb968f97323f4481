"""`llmserve serve`: gets the models, starts an engine for each and the HTTP server before them, ends them in order.

The one place where the rooms are wired together. HTTP answers from the first moment (`/ready` says 503 while models
load). On SIGTERM or Ctrl-C the server is not ready any more and answers new requests with 503, those in flight finish
within the drain time, then the engines end. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop
from rich.console import Console

from llmserve.api.app import create_app
from llmserve.api.entrance import Entrance
from llmserve.api.http_server import raise_file_limit
from llmserve.api.settings import ApiSettings
from llmserve.api.tls_server import HttpServer
from llmserve.backends.llm import LLM
from llmserve.config import ModelConfigEntry, ServeConfig
from llmserve.engine.processes import STANDBY_COMMAND, EngineProcesses
from llmserve.errors import ConfigError, ModelLoadError
from llmserve.general_models import GeneralModels, grpc_port
from llmserve.gpu_driver import has_gpu_driver
from llmserve.metrics import Metrics
from llmserve.pooling_config import is_pooling_folder
from llmserve.repository.embedded import DEFAULT_EMBEDDING, DEFAULT_LLM
from llmserve.repository.language_models import LanguageModels
from llmserve.repository.served_models import ServedModels, open_llm
from llmserve.repository.sources import ModelSource, resolve_model
from llmserve.temporary_folder import temporary_folder
from llmserve.threads import start_executor
from llmserve.tools.health import local_url
from llmserve.tools.progress import Served, StartupDisplay

logger = logging.getLogger(__name__)

_ENGINE_GRACE_S = 5.0  # for an engine to end once nobody waits for its answers


def serve(config: ServeConfig) -> int:
    """Runs until told to stop. Raises LLMServeError if a model, a file or the port is not to be had."""
    logging.basicConfig(
        level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    display = StartupDisplay(Console(stderr=True))
    raise_file_limit()
    _check_devices(config)
    listener = _listen(config.server.host, config.server.port)
    with listener:
        if port := grpc_port(config.server, listener.getsockname()[1]):
            _listen(config.server.host, port, "--grpc-port").close()  # gRPC binds it itself, when models load
        with temporary_folder():
            server = _Server(config, listener, display)
            # as SIGTERM, until the server takes both: a KeyboardInterrupt out of uvloop's loop may crash the process
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            return uvloop.run(server.run())


class _Server:
    def __init__(self, config: ServeConfig, listener: socket.socket, display: StartupDisplay) -> None:
        self._config = config
        self._listener = listener
        self._display = display
        self._metrics = Metrics(vllm_names=config.server.vllm_metrics)
        self._entrance = Entrance(config.door, self._metrics)  # its keys and files are looked at before models are
        self._models = ServedModels()
        server = config.server
        self._processes = EngineProcesses(standby_command=STANDBY_COMMAND if server.standby_engine else None)
        self._api = ApiSettings(
            max_body_bytes=server.max_body_bytes,
            keep_alive_s=server.keep_alive_s,
            resume_window_s=config.door.resume_window_s,
        )
        sources = [(entry, self._fetch(entry.model or DEFAULT_LLM)) for entry in config.models]
        self._sources = [(entry, source) for entry, source in sources if not is_pooling_folder(source.path)]
        pooling = [(entry, source) for entry, source in sources if is_pooling_folder(source.path)]
        if (default := self._embedding_model()) is not None:
            pooling.append((ModelConfigEntry(model=default.name), default))
        self._llms = LanguageModels(self._models, self._reopen, server.drain_timeout_s)
        self._general = GeneralModels(
            config.repository, server, self._models, self._llms, self._api, self._entrance, _by_name(pooling)
        )
        self._started = time.monotonic()
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> int:
        for entry, source in self._sources:
            self._open(entry, source)
        loop = asyncio.get_running_loop()
        loop.set_default_executor(start_executor())
        http = self._http_server(lambda: loop.call_soon_threadsafe(begin_drain))
        # uvicorn takes over both signals, and raises them again once it is done: then the engines end by themselves
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        serving = asyncio.create_task(http.serve(sockets=[self._listener]), name="http")
        loading = asyncio.create_task(self._load(), name="load")
        loading.add_done_callback(lambda task: _stop_if_failed(task, http))

        def begin_drain() -> None:
            self._draining = asyncio.create_task(self._drain(http, loading), name="drain")

        try:
            await serving
        finally:
            loading.cancel()
            if self._draining is not None:
                self._draining.cancel()
            if http.force_exit:
                await http.drop_connections()
            # HTTP is over: what is still in flight has nobody to read it
            grace_s = 0.0 if http.force_exit else _ENGINE_GRACE_S
            await asyncio.gather(self._general.stop(grace_s), self._llms.stop(grace_s))
            await self._processes.close()
            self._entrance.close()
        if not loading.cancelled() and (error := loading.exception()) is not None:
            raise error
        return 0

    async def _drain(self, http: _HttpServer, loading: asyncio.Task[None]) -> None:
        """Takes nothing new, and ends HTTP once all that is in flight has been answered. Until then it says so."""
        drain_s = self._config.server.drain_timeout_s
        end_s = time.monotonic() + drain_s
        if loading.done():
            logger.info("Draining: not ready any more; requests in flight may take %.0f s to finish", drain_s)
        else:
            logger.info("Stopping before every model is loaded")
        loading.cancel()
        self._general.plane.begin_drain()
        await asyncio.gather(self._general.stop(drain_s), self._llms.drain(drain_s))
        http.finish(end_s - time.monotonic())

    def _fetch(self, name: str) -> ModelSource:
        with self._display.fetching(name) as progress:
            return resolve_model(name, progress)

    def _embedding_model(self) -> ModelSource | None:
        """The model of `--embedding-model`. The default one is no reason not to serve when it cannot be fetched."""
        name = self._config.repository.embedding_model
        if name == "auto":
            if [entry.model for entry in self._config.models] != [""]:
                return None
            try:
                return self._fetch(DEFAULT_EMBEDDING)
            except ModelLoadError as error:
                logger.warning("There are no embeddings: %s (--embedding-model none: do without)", error.message)
                return None
        if name == "none":
            return None
        source = self._fetch(name)
        if not is_pooling_folder(source.path):
            raise ConfigError(f"--embedding-model {name}: this is not an embedding, reranker or classifier model.")
        return source

    def _open(self, entry: ModelConfigEntry, source: ModelSource) -> LLM:
        llm = open_llm(source, entry, self._config.server, self._metrics, self._processes)
        self._llms.add(llm, entry)
        return llm

    def _reopen(self, entry: ModelConfigEntry, version: int) -> LLM:
        """The same model as it is on disk now. Blocks."""
        source = resolve_model(entry.model or DEFAULT_LLM)
        return open_llm(source, entry, self._config.server, self._metrics, self._processes, version)

    async def _load(self) -> None:
        port = self._listener.getsockname()[1]
        with self._display.loading() as display:

            async def start(llm: LLM) -> None:
                await llm.start(display.plan_printer(llm.name), display.progress_bar(llm.name))

            general = asyncio.create_task(self._general.start(port, display.fetching))
            for llm in self._models.llms:
                await start(llm)  # one after the other: each plans with the memory that the one before has left
            await general
            for folder in self._general.hugging_face_folders:
                entry = ModelConfigEntry(model=str(folder), engine=self._config.engine)
                await start(self._open(entry, resolve_model(entry.model)))
        v1 = [llm.name for llm in self._models.llms] + list(self._general.pooling.names)
        only_v2 = [name for name in self._general.names if name not in v1]
        gc.collect()
        gc.freeze()  # what stays for good is not gone through again while streams wait
        plane = self._general.plane
        served = Served(
            url=local_url(self._config, port),
            grpc=general.result(),
            names=v1,
            only_v2=only_v2,
            failed=[] if plane.server_ready() else sorted(plane.unready_reasons()),
            has_docs=not self._config.door.api_keys,  # a browser sends no key
        )
        self._display.ready(served, time.monotonic() - self._started)

    def _http_server(self, on_signal: Callable[[], object]) -> _HttpServer:
        general = self._general
        app = create_app(self._models, self._api, self._metrics, general.plane, general.pooling, self._entrance)
        return _HttpServer(self._entrance.http_config(app, self._config.server.drain_timeout_s), on_signal)


def _check_devices(config: ServeConfig) -> None:
    """What an engine would say of a machine without a GPU, before anything is fetched or loaded. Raises ConfigError."""
    engines = (config.engine, *(entry.engine for entry in config.models))
    if any(engine.device == "cuda" for engine in engines) and not has_gpu_driver():
        raise ConfigError("device is 'cuda', but this machine has no driver of a GPU. Use --device cpu, or install it.")


def _by_name(pooling: list[tuple[ModelConfigEntry, ModelSource]]) -> dict[str, Path]:
    """The folders of the pooling models, each under its one name. Raises ConfigError."""
    folders: dict[str, Path] = {}
    for entry, source in pooling:
        if len(entry.served_names) > 1:
            raise ConfigError(f"{source.root}: an embedding, reranker or classifier model has one name only.")
        name = entry.served_names[0] if entry.served_names else source.name.rpartition("/")[2]
        if folders.setdefault(name, source.path) != source.path:
            raise ConfigError(f"Two models are named {name!r}. Give each its own with --served-model-name.")
    return folders


class _HttpServer(HttpServer):
    """The first signal is passed on, so that requests are still answered while the server drains; any second one ends
    it at once. (uvicorn would take no connection from the first on, and only SIGINT for a second.)"""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self._was_signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._was_signalled:
            self.force_exit = self.should_exit = True
        else:
            self._was_signalled = True
            self._on_signal()

    def finish(self, timeout_s: float) -> None:
        """Takes no more connections; those whose answers are still being read get `timeout_s` seconds."""
        self.config.timeout_graceful_shutdown = max(1, int(timeout_s))
        self.should_exit = True

    async def drop_connections(self) -> None:
        """Closes them as if the clients had gone: their requests end quietly, each by its own way out."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_ENGINE_GRACE_S)


def _stop_if_failed(loading: asyncio.Task[None], http: uvicorn.Server) -> None:
    if not loading.cancelled() and loading.exception() is not None:
        http.should_exit = True


def _listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """Binds before anything is loaded: a taken port is said in the first second."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:  # the port after 65535 is none
        reason = error.strerror if isinstance(error, OSError) else "a port is at most 65535"
        raise ConfigError(f"Cannot listen on {host}:{port}: {reason}. Choose another --host or {flag}.") from error
