"""The command line: what it does not know."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve.cli import main


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--max-model-length", "--max-model-len"), ("--gpu-memory-utilization=0.9", "--gpu-memory"), ("--prot", "--port")],
)
def test_an_unknown_flag_points_to_the_one_that_was_meant(
    flag: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", flag])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"unknown argument '{flag.split('=')[0]}'. Did you mean '{meant}'?\n")


def test_a_flag_is_not_short_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's --api-key holds a key, --api-keys names a file."""
    with pytest.raises(SystemExit):
        main(["serve", "--api-key", "sk-123"])
    assert "unknown argument '--api-key'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--device", "cuda"], "device is 'cuda', but this machine has no driver of a GPU"),
        (["--device", "cpu", "--gpu-memory", "0.5"], "gpu_memory is for models on a GPU, and device is 'cpu'"),
        (["--device", "cpu", "--kv-cache-host-memory", "1GiB"], "kv_cache_host_memory is for models on a GPU"),
        (["--request-log", "/nowhere/log"], "Cannot write the request log /nowhere/log"),
        (["--api-keys", "/nowhere/keys"], "/nowhere/keys"),
        (["--tls-certificate", "/nowhere/pem", "--tls-key", "/nowhere/key"], "/nowhere/pem"),
    ],
)
def test_what_needs_no_model_to_be_refused_is_refused_before_one_is_fetched(
    flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmserve.serve.has_gpu_driver", lambda: False)
    assert main(["serve", "no-such-model", "--port", "0", *flags]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_taken_port_is_said_before_a_model_is_fetched(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "no-such-model", "--port", "0", flag, port]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"llmserve: Cannot listen on 127.0.0.1:{port}: ")
    assert line.endswith(f"Choose another --host or {flag}.")


def test_every_model_is_looked_at_before_the_first_is_loaded(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start_process(*_: object) -> None:
        raise AssertionError("an engine is started")

    monkeypatch.setattr("llmserve.engine.processes.start_process", start_process)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
    for second, told in ((f"'{smollm2_path}'\nmax_model_len = 9000", "9000 is beyond"), (f"'{other}'", "NoSuch")):
        config = tmp_path / "server.toml"
        config.write_text(
            f"[[models]]\nmodel = '{smollm2_path}'\nserved_model_name = 'a'\n[[models]]\nmodel = {second}"
        )
        assert main(["serve", "--config", str(config), "--port", "0", "--embedding-model", "none"]) == 1
        assert told in capsys.readouterr().err


def test_an_unknown_variable_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMSERVE_PROT", "8001")
    assert main(["serve", "--config", "nowhere.toml"]) == 1
    assert "LLMSERVE_PROT is no setting, and is ignored. Did you mean LLMSERVE_PORT?" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--weight", "-1"), ("--share", "3"), ("--tokens-per-minute", "-5")])
def test_no_key_is_made_that_the_server_would_not_take(
    flag: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    assert main(["keys", str(path), "me", flag, value]) == 1
    assert "must be a number from" in capsys.readouterr().err
    assert not path.exists()


def test_ctrl_c_while_the_server_imports_ends_it_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("import os, signal\n\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "llmserve.cli", "serve", "no-such-model", "--port", "0"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_while_models_are_looked_at_ends_the_server(smollm2_path: Path) -> None:
    code = (
        "import os, signal, sys; import llmserve.serve; from llmserve.cli import main\n"
        "llmserve.serve.open_llm = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.exit(main(['serve', {str(smollm2_path)!r}, '--port', '0', '--embedding-model', 'none']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
