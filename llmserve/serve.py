"""`llmserve serve`: gets the models, starts an engine for each and the HTTP server before them, ends them in order.

The one place where the rooms are wired together. HTTP answers from the first moment (`/ready` says 503 while models
load); on SIGTERM or Ctrl-C no new connection is taken, requests in flight finish within the drain time, then the
engines end. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time

import uvicorn
import uvloop
from rich.console import Console

from llmserve.api.app import create_app
from llmserve.api.settings import ApiSettings
from llmserve.backends.llm import LLM
from llmserve.config import ModelConfigEntry, ServeConfig
from llmserve.errors import ConfigError
from llmserve.metrics import Metrics
from llmserve.repository.embedded import DEFAULT_LLM
from llmserve.repository.served_models import ServedModels, open_llm
from llmserve.repository.sources import resolve_model
from llmserve.tools.progress import StartupDisplay

logger = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Runs until told to stop. Raises LLMServeError if a model, a file or the port is not to be had."""
    logging.basicConfig(
        level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    display = StartupDisplay(Console(stderr=True))
    listener = _listen(config.server.host, config.server.port)
    with listener:
        return uvloop.run(_Server(config, listener, display).run())


class _Server:
    def __init__(self, config: ServeConfig, listener: socket.socket, display: StartupDisplay) -> None:
        self._config = config
        self._listener = listener
        self._display = display
        self._metrics = Metrics(vllm_names=config.server.vllm_metrics)
        self._started = time.monotonic()

    async def run(self) -> int:
        models = ServedModels()
        for entry in self._config.models or (ModelConfigEntry(model=""),):
            self._open(entry, models)
        http = self._http_server(models)
        # uvicorn raises the signal again once it has shut down: by then there is nothing left to end
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        serving = asyncio.create_task(http.serve(sockets=[self._listener]), name="http")
        loading = asyncio.create_task(self._load(models.llms), name="load")
        loading.add_done_callback(lambda task: _stop_if_failed(task, http))
        try:
            await serving
        finally:
            loading.cancel()
            drain_s = self._config.server.drain_timeout_s
            await asyncio.gather(*(llm.shutdown(timeout_s=drain_s) for llm in models.llms))
        if not loading.cancelled() and (error := loading.exception()) is not None:
            raise error
        return 0

    def _open(self, entry: ModelConfigEntry, models: ServedModels) -> None:
        name = entry.model or DEFAULT_LLM
        with self._display.fetching(name) as progress:
            source = resolve_model(name, progress)
        llm = open_llm(source, entry, self._config.server, self._metrics)
        models.add(llm, entry.served_names or (llm.name,))

    async def _load(self, llms: list[LLM]) -> None:
        with self._display.loading() as display:
            await asyncio.gather(
                *(llm.start(display.plan_printer(llm.name), display.progress_bar(llm.name)) for llm in llms)
            )
        host, port = self._listener.getsockname()[:2]
        self._display.ready(f"http://{host}:{port}", [llm.name for llm in llms], time.monotonic() - self._started)

    def _http_server(self, models: ServedModels) -> uvicorn.Server:
        server = self._config.server
        settings = ApiSettings(max_body_bytes=server.max_body_bytes, keep_alive_s=server.keep_alive_s)
        app = create_app(models, settings, self._metrics)
        return uvicorn.Server(
            uvicorn.Config(
                app,
                http="httptools",
                loop="uvloop",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                timeout_graceful_shutdown=int(server.drain_timeout_s),
                server_header=False,
            )
        )


def _stop_if_failed(loading: asyncio.Task[None], http: uvicorn.Server) -> None:
    if not loading.cancelled() and loading.exception() is not None:
        http.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """Binds before anything is loaded: a taken port is said in the first second."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror}. Choose another host or port.") from error
