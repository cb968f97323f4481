"""`llmserve bench` as a whole: from flags to table, JSON, PNG and exit status."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llmserve.errors import ConfigError
from llmserve.tools.bench import cli

PROGRAM = """
import argparse, sys
from llmserve.tools.bench import cli
parser = argparse.ArgumentParser()
cli.add_arguments(parser)
sys.exit(cli.run(parser.parse_args()))
"""


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(arguments)


def run(*arguments: str) -> int:
    return cli.run(parse(*arguments))


def test_a_sweep_from_flags_to_report(fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_server.count_tokens = lambda text, is_chat: len(text.split())
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    status = run(
        *("--url", fake_server.url, "--concurrency", "1,4", "--num-requests", "12", "--num-warmup", "2"),
        *("--prompt-len", "8:16", "--output-len", "5", "--shared-prefix", "0.5", "--seed", "3", "--ignore-eos"),
        *("--slo", "ttft:60000", "--json", str(report), "--plot", str(plot)),
    )
    assert status == 0
    shown = capsys.readouterr().out
    assert "concurrency 1: 12/12 requests" in shown
    assert "concurrency 4: 12/12 requests" in shown
    assert "All runs" in shown
    assert "60 tokens, 5 each" in shown

    document = json.loads(report.read_text())
    assert document["config"]["model"] == "fake-model"
    assert document["config"]["prompt_len_exact"] is True
    assert document["config"]["seed"] == 3
    assert [run["load"] for run in document["runs"]] == [
        {"kind": "closed", "concurrency": 1},
        {"kind": "closed", "concurrency": 4},
    ]
    for run_report in document["runs"]:
        summary = run_report["summary"]
        assert (summary["num_requests"], summary["num_succeeded"], summary["output_tokens"]) == (12, 12, 60)
        assert summary["goodput_per_s"] == summary["requests_per_s"] > 0
        assert summary["itl_ms"]["count"] == 12 * 4
        assert summary["cached_tokens"] == 12 * 2
        for request in run_report["requests"]:
            assert 8 <= request["prompt_len"] == request["prompt_tokens"] <= 16

    with Image.open(plot) as image:
        image.verify()
        assert image.format == "PNG"
        assert image.width > 800
        assert image.height > 1000

    bodies = [seen.body for seen in fake_server.completions]
    assert len(bodies) == 2 + 12 + 12
    assert all(body["ignore_eos"] is True and body["temperature"] == 0.0 for body in bodies)
    prompts = [body["messages"][0]["content"] for body in bodies]
    assert len(set(prompts)) == len(prompts), "a run must not find another one's prompts in the cache"


def test_the_same_seed_makes_the_same_requests(fake_server: Any) -> None:
    for seed in ("5", "5", "6"):
        run(
            "--url",
            fake_server.url,
            "--num-requests",
            "4",
            "--concurrency",
            "1",
            "--seed",
            seed,
            "--prompt-len",
            "9:40",
        )
    sent = [(seen.body["messages"][0]["content"], seen.body["max_tokens"]) for seen in fake_server.completions]
    assert sent[:5] == sent[5:10] != sent[10:]


def test_an_open_loop_on_completions_with_one_plot(fake_server: Any, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    report = tmp_path / "report.json"
    status = run(
        *("--url", fake_server.url, "--endpoint", "completions", "--request-rate", "500", "--burstiness", "inf"),
        *("--num-requests", "10", "--output-len", "4", "--plot", str(plot), "--json", str(report)),
    )
    assert status == 0
    assert {seen.path for seen in fake_server.completions} == {"/v1/completions"}
    (run_report,) = json.loads(report.read_text())["runs"]
    assert run_report["load"] == {"kind": "open", "rate": 500.0, "burstiness": "inf"}
    assert run_report["summary"]["cached_tokens"] is None
    with Image.open(plot) as image:
        image.verify()


def test_failures_are_shown_and_all_failed_is_a_failure(
    fake_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = fake_server.answer(fake_server.http(500, b'{"error": {"message": "kaboom"}}'))
    fake_server.default = lambda seen: refusal
    plot = tmp_path / "plot.png"
    arguments = ("--url", fake_server.url, "--num-requests", "3", "--plot", str(plot))
    assert run(*arguments, "--concurrency", "1,2") == 1
    shown = capsys.readouterr().out
    assert "0/3 requests" in shown
    assert "3 x http_500: HTTP 500: kaboom" in shown
    with Image.open(plot) as image:  # a plot of nothing is still a plot
        image.verify()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_server_refuses_at_all_is_said_in_a_line(
    fake_server: Any, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    refusal = fake_server.answer(fake_server.http(status, b'{"error": {"message": "There is no model nope."}}'))
    fake_server.default = lambda seen: refusal
    assert run("--url", fake_server.url, "--model", "nope", "--num-requests", "3") == 1
    shown = capsys.readouterr()
    assert shown.err == f"llmserve bench: HTTP {status}: There is no model nope.\n"
    assert "requests/s" not in shown.out
    assert len(fake_server.completions) == 1


def test_some_failures_are_not_a_failure_of_the_run(fake_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake_server.push(fake_server.http(500, b""))
    arguments = ("--url", fake_server.url, "--num-requests", "3", "--concurrency", "1", "--num-warmup", "0")
    assert run(*arguments) == 0
    assert "2/3 requests" in capsys.readouterr().out


def test_no_server_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--url", "http://127.0.0.1:9/v1") == 1
    told = capsys.readouterr().err
    assert "No server answers at http://127.0.0.1:9" in told
    assert "Start one with `llmserve serve`, or say where it is with --url." in told


def test_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--plot", "x.png") == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--concurrency", "0"), "--concurrency"),
        (("--concurrency", "1,x"), "--concurrency"),
        (("--concurrency", "1.5"), "--concurrency"),
        (("--request-rate", "-1"), "--request-rate"),
        (("--request-rate", "inf"), "--request-rate"),
        (("--request-rate", "1", "--burstiness", "0"), "--burstiness"),
        (("--num-requests", "0"), "--num-requests"),
        (("--duration", "0"), "--duration"),
        (("--prompt-len", "none"), "--prompt-len"),
        (("--output-len", "0"), "--output-len"),
        (("--slo", "itl:3"), "--slo"),
        (("--json", "/no/such/folder/x.json"), "/no/such/folder"),
    ],
)
def test_unusable_flags_are_named(arguments: tuple[str, ...], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        cli.Benchmark(parse(*arguments), console=None)  # type: ignore[arg-type]


def test_ctrl_c_prints_and_writes_what_there_is(fake_server: Any, tmp_path: Path) -> None:
    for _ in range(3):
        fake_server.push_events(fake_server.chat_events(["a", "b"]))
    fake_server.push_events(fake_server.chat_events(["a", "b"])[:2], then="hang", end=False)
    report = tmp_path / "report.json"
    flags = ["--url", fake_server.url, "--concurrency", "1,2", "--json", str(report), "--num-warmup", "0"]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert fake_server.hanging.wait(60)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "concurrency 1: 3/4 requests" in shown
    assert "(interrupted)" in shown
    assert "1 x cancelled" in shown
    (run_report,) = json.loads(report.read_text())["runs"]
    assert run_report["interrupted"] is True
    assert run_report["summary"]["num_succeeded"] == 3
    assert fake_server.client_left.wait(10)


def test_a_bug_is_not_taken_for_an_interruption() -> None:
    async def main() -> None:
        async def broken() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await cli._finish_or_interrupt(asyncio.create_task(broken()))

    asyncio.run(main())
