"""`llmserve health`: asks the server on this machine whether it lives, or is ready. For probes; knows no model.

It takes what `llmserve serve` takes, flags, environment and TOML file, and finds host, port and TLS in it.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
import sys

import msgspec

from llmserve.config import ServeConfig
from llmserve.errors import ConfigError
from llmserve.settings import add_setting_flags, load_serve_config
from llmserve.tools.http_client import ClientError, HttpClient, explain_error

_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `llmserve health` to its parser."""
    parser.usage = "llmserve health [--ready] [--timeout-s X] [what `llmserve serve` was given]"
    parser.description = "Exit status 0 if the server on this machine lives (--ready: is ready), 1 if not."
    parser.add_argument("models", nargs="*", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--served-model-name", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--ready", action="store_true", help="Every model runs requests now, as GET /ready has it.")
    parser.add_argument("--timeout-s", type=float, default=4.0, help="An answer must have come by then. Default: 4.")
    add_setting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 or 1; what is wrong goes to standard error. Raises ConfigError."""
    if not args.timeout_s > 0:
        raise ConfigError(f"--timeout-s must be above 0, not {args.timeout_s:g}.")
    url = local_url(load_serve_config(vars(args)))
    problem = asyncio.run(_problem(url, "/ready" if args.ready else "/health", args.timeout_s))
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


def local_url(config: ServeConfig, taken_port: int = 0) -> str:
    """Where a server of this configuration answers on its own machine; `taken_port` is what `--port 0` came to.
    Raises ConfigError."""
    host, port = config.server.host, config.server.port or taken_port
    if not port:
        raise ConfigError("With --port 0 the server's port is not known: give the one it has taken.")
    host = _LOOPBACK.get(host) or (f"[{host}]" if ":" in host else host)
    return f"{'https' if config.door.tls_certificate else 'http'}://{host}:{port}"


async def _problem(url: str, path: str, timeout_s: float) -> str:
    """Why the server is not well; empty if it is."""
    # It is our own machine, nothing secret is sent, and a certificate is seldom made out to a loopback address.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with HttpClient(url, {}, tls=context) as client:
        try:
            status, body = await asyncio.wait_for(client.fetch("GET", path), timeout_s)
        except TimeoutError:
            return f"llmserve health: {url}{path} has not answered within {timeout_s:g} s."
        except ClientError as error:
            return explain_error(error, "health", url, "--host and --port")
    return "" if status == 200 else f"llmserve health: {url}{path} says {status}: {_reason(body)}"


def _reason(body: bytes) -> str:
    """In one line, whatever it is that answers there."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return repr(body[:200])
    return msgspec.json.encode(answer).decode()[:2000]
