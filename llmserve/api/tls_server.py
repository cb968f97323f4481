"""uvicorn's server, which takes TLS connections itself: counted from the first moment, handshakes bounded in time.

Where the event loop makes the handshakes, a connection is nobody's until that is over, which takes a minute if its
client says nothing: such clients took every open file. Knows no route.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl

import uvicorn

from llmserve.api.http_connection import ConnectionLimits, LimitedConnections
from llmserve.http_metrics import HttpMetrics
from llmserve.pause import pause

logger = logging.getLogger(__name__)

_PAUSE_S = 1.0  # after a connection could not be taken, for want of open files


class HttpServer(uvicorn.Server):
    """Serves a configuration of `http_config`."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._listening: list[asyncio.Task[None]] = []
        self._shaking: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes connections from here on."""
        context = self.config.ssl
        connections: object = self.config.http  # what `http_config` has put there
        if context is None or sockets is None:
            await super().startup(sockets)
            return
        await super().startup([])
        assert isinstance(connections, LimitedConnections)
        for listener in sockets:
            listener.listen(self.config.backlog)
            listener.setblocking(False)
            accepting = self._accept(listener, context, connections.limits, connections.metrics)
            self._listening.append(asyncio.create_task(accepting, name="accept TLS"))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes none any more, and lets those there are finish."""
        for task in (*self._listening, *self._shaking):
            task.cancel()
        await asyncio.gather(*self._listening, *self._shaking, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(
        self, listener: socket.socket, context: ssl.SSLContext, limits: ConnectionLimits, metrics: HttpMetrics
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as error:
                logger.warning("A connection cannot be taken: %s", error)
                await pause(_PAUSE_S)
                continue
            num_open = len(self.server_state.connections) + len(self._shaking)
            if limits.max_connections and num_open >= limits.max_connections:
                metrics.refuse("too_many_connections")
                client.close()  # without a word: that would cost both sides a handshake
                continue
            shaking = self._shake_hands(client, context, limits.header_timeout_s, metrics)
            task = asyncio.create_task(shaking, name="handshake")
            self._shaking.add(task)
            task.add_done_callback(self._shaking.discard)

    async def _shake_hands(
        self, client: socket.socket, context: ssl.SSLContext, timeout_s: float, metrics: HttpMetrics
    ) -> None:
        def connection() -> asyncio.Protocol:
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None
            )

        metrics.num_connections += 1  # until it is a connection that counts itself
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                connection, client, ssl=context, ssl_handshake_timeout=timeout_s
            )
        except OSError as error:  # no TLS, none in time, or the client has gone
            client.close()
            if isinstance(error, ConnectionAbortedError):  # by the event loop: it was none in time
                metrics.refuse("handshake_timeout")
            logger.debug("A handshake failed: %s", error)
        finally:
            metrics.num_connections -= 1
