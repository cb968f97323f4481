"""TLS for HTTP and gRPC from a certificate and its key, which may be replaced while the server runs.

Both ask at a handshake whether the files have changed: no signal, no poll, and connections that stand are left alone.
"""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import Any

import grpc

from llmserve.errors import ConfigError

logger = logging.getLogger(__name__)

Mark = tuple[tuple[int, int, int], ...]


class TlsFiles:
    """A PEM certificate chain and its private key. Raises ConfigError if they are missing or do not belong together."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate = certificate
        self._key = key
        self._mark = self._read_mark()
        self.context = self._load()  # what the HTTP server listens with
        self._current = self.context
        self.context.sni_callback = self._on_hello  # called at every handshake, whether a name was sent or not
        self._grpc_mark = self._mark

    def grpc_credentials(self) -> Any:
        """The same files for gRPC."""
        return grpc.dynamic_ssl_server_credentials(self._grpc_configuration(), self._next_grpc_configuration)

    def _on_hello(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        mark = self._read_mark()
        if mark != self._mark:
            self._mark = mark
            try:
                self._current = self._load()
            except ConfigError as error:
                logger.error("The certificate stays as it was: %s", error.message)
            else:
                logger.info("read the certificate %s anew", self._certificate)
        connection.context = self._current

    def _next_grpc_configuration(self) -> Any:
        mark = self._read_mark()
        if mark == self._grpc_mark:
            return None  # as before
        self._grpc_mark = mark
        try:
            self._load()
        except ConfigError as error:
            logger.error("The certificate of gRPC stays as it was: %s", error.message)
            return None
        return self._grpc_configuration()

    def _grpc_configuration(self) -> Any:
        pair = (self._key.read_bytes(), self._certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair])

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._certificate, self._key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"The certificate {self._certificate} and its key {self._key} cannot be used: {error}."
            ) from error
        return context

    def _read_mark(self) -> Mark:
        marks = []
        for path in (self._certificate, self._key):
            try:
                stat = os.stat(path)
            except OSError:
                continue
            marks.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return tuple(marks)
