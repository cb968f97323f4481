"""`llmserve health`: what a probe that runs beside the server is told, over HTTP and over TLS."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme

from llmserve.cli import main
from llmserve.config import DoorConfig, ServeConfig, ServerConfig
from llmserve.tools.health import local_url
from tests.door.conftest import ServeGuarded, write_keys


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Somebody who takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_server_that_is_well(serve_guarded: ServeGuarded, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.toml", alice="")  # a probe has none
    port = str(serve_guarded(DoorConfig(api_keys=str(tmp_path / "keys.toml"))).port)
    assert main(["health", "--port", port]) == 0
    assert main(["health", "--port", port, "--ready"]) == 0
    assert capsys.readouterr().err == ""


def test_alive_is_not_ready(serve_guarded: ServeGuarded, capsys: pytest.CaptureFixture[str]) -> None:
    served = serve_guarded()
    served.script.ready = False
    assert main(["health", "--port", str(served.port)]) == 0
    assert main(["health", "--port", str(served.port), "--ready"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1:{served.port}/ready says 503" in line
    assert "loading" in line


def test_the_flags_environment_and_file_of_the_server_are_read(
    serve_guarded: ServeGuarded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = serve_guarded().port
    assert main(["health", "some/model", "--host", "0.0.0.0", "--port", str(port), "--max-model-len", "512"]) == 0
    file = tmp_path / "server.toml"
    file.write_text(f"port = {port}\n")
    assert main(["health", "--config", str(file)]) == 0
    monkeypatch.setenv("LLMSERVE_PORT", str(port))
    assert main(["health"]) == 0


def test_a_certificate_for_another_name_is_no_illness(serve_guarded: ServeGuarded, tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("llm.example.com")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    issued.cert_chain_pems[0].write_to_path(str(certificate))
    issued.private_key_pem.write_to_path(str(key))
    port = str(serve_guarded(DoorConfig(tls_certificate=str(certificate), tls_key=str(key))).port)
    assert main(["health", "--port", port, "--tls-certificate", str(certificate), "--tls-key", str(key)]) == 0
    assert main(["health", "--port", port]) == 1  # it does not speak plain HTTP


def test_nobody_is_there(silent_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--port", str(silent_port), "--timeout-s", "0.1"]) == 1
    assert "has not answered within 0.1 s" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    assert main(["health", "--port", str(closed)]) == 1
    told = capsys.readouterr().err
    assert f"No server answers at http://127.0.0.1:{closed} (No connection to " in told
    assert "say where it is with --host and --port" in told


def test_the_grpc_port_is_no_place_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert main(["health", "--port", str(port)]) == 1
    finally:
        server.stop(0)
    told = "llmserve health: What answers there does not speak HTTP/1.1; perhaps it is the port of gRPC.\n"
    assert capsys.readouterr().err == told


def test_what_cannot_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--port", "0"]) == 1
    assert "port is not known" in capsys.readouterr().err
    assert main(["health", "--timeout-s", "0"]) == 1
    assert "--timeout-s must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80"),
        ("10.0.0.7", "http://10.0.0.7:80"),
        ("llm.local", "http://llm.local:80"),
    ],
)
def test_a_server_is_asked_where_it_listens(host: str, url: str) -> None:
    assert local_url(ServeConfig(server=ServerConfig(host=host, port=80))) == url


def test_the_port_that_was_taken_stands_in_for_any() -> None:
    assert local_url(ServeConfig(server=ServerConfig(host="::", port=0)), 81) == "http://[::1]:81"
