"""`llmserve chat`: over a pipe, in one shot, and in a pseudo-terminal with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmserve.tools.answer_timing import AnswerTiming
from llmserve.tools.chat import describe

PROGRAM = """
import argparse, sys
from llmserve.tools import chat
parser = argparse.ArgumentParser()
chat.add_arguments(parser)
sys.exit(chat.run(parser.parse_args()))
"""
COMMAND = [sys.executable, "-c", PROGRAM]


def chat(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False)


def test_a_pipe_is_one_message_and_stdout_is_the_answer_alone(fake_server: Any) -> None:
    fake_server.push_events(fake_server.chat_events(["Hé", "llo\n", "\x1b[1mworld"], 12, 5))
    done = chat(
        "--url", fake_server.url, "--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "9", stdin="hi\n"
    )
    assert done.returncode == 0
    assert done.stdout == "Héllo\n\x1b[1mworld\n"  # a pipe gets what the model said, byte for byte
    assert re.fullmatch(r"\[3 tokens \| TTFT \d+ ms( \| [\d.]+ tokens/s)? \| prompt 12 \(5 cached\)\]\n", done.stderr)
    (seen,) = fake_server.completions
    assert seen.body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert (seen.body["temperature"], seen.body["max_tokens"], seen.body["model"]) == (0.5, 9, "fake-model")


def test_message_does_not_read_stdin(fake_server: Any) -> None:
    fake_server.push_events(fake_server.chat_events(["w0 ", "w1 ", "w2 "], 3, 0))
    done = chat("--url", fake_server.url, "--message", "from the flag", "--model", "mine", stdin="from the pipe")
    assert (done.returncode, done.stdout) == (0, "w0 w1 w2 \n")
    (seen,) = fake_server.completions
    assert seen.body["max_tokens"] == 1024  # small models do not always end by themselves
    assert seen.body["messages"] == [{"role": "user", "content": "from the flag"}]
    assert seen.body["model"] == "mine"


def test_an_empty_message_is_not_sent(fake_server: Any) -> None:
    done = chat("--url", fake_server.url, stdin=" \n")
    assert done.returncode == 1
    assert "empty" in done.stderr
    assert not fake_server.completions


def test_no_server_is_said_with_what_to_do() -> None:
    done = chat("--url", "http://127.0.0.1:9/v1", stdin="hi")
    assert done.returncode == 1
    assert "No server answers at http://127.0.0.1:9/v1" in done.stderr
    assert "llmserve serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_answer_that_breaks_off_is_a_failure(fake_server: Any) -> None:
    fake_server.push_events(fake_server.chat_events(["half "])[:2], then="reset", end=False)
    done = chat("--url", fake_server.url, stdin="hi")
    assert done.returncode == 1
    assert done.stdout == "half \n"
    assert "broke off" in done.stderr


def test_describe() -> None:
    timing = AnswerTiming(0.0, token_times_s=[0.25, 2.25], end_s=2.25, completion_tokens=5, prompt_tokens=8)
    assert describe(timing) == "5 tokens | TTFT 250 ms | 2.0 tokens/s | prompt 8"
    timing.cached_tokens, timing.finish_reason = 3, "length"
    assert describe(timing) == "5 tokens | TTFT 250 ms | 2.0 tokens/s | prompt 8 (3 cached) | ended by length"
    assert describe(AnswerTiming(0.0)) == "0 tokens (chunks: the server sent no usage)"


class Terminal:
    """A person at a terminal: types, and waits for what should appear."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self._unread = ""

    def until(self, text: str) -> str:
        """Reads on until `text` has appeared; returns all up to its end."""
        assert self.shows(text, within_s=60), f"{text!r} did not appear after {self._unread!r}"
        shown, _, self._unread = self._unread.partition(text)
        return shown + text

    def shows(self, text: str, within_s: float) -> bool:
        """Whether `text` appears in time; what was read stays unread."""
        deadline_s = time.monotonic() + within_s
        while text not in self._unread:
            ready, _, _ = select.select([self._master], [], [], max(deadline_s - time.monotonic(), 0))
            if not ready:
                return False
            try:
                data = os.read(self._master, 4096)
            except OSError:  # Linux: the other end is closed
                data = b""
            assert data, f"the terminal closed before {text!r} appeared: {self._unread!r}"
            self._unread += data.decode().replace("\r\n", "\n")
        return True

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def leave(self) -> int:
        """Ctrl-D."""
        self.type("\x04")
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(fake_server: Any) -> Any:
    opened = Terminal("--url", fake_server.url, "--max-tokens", "3")
    opened.until("fake-model. /help lists the commands.")
    opened.until("> ")
    yield opened
    opened.close()


def test_turns_follow_one_another(fake_server: Any, terminal: Terminal) -> None:
    fake_server.push_events(fake_server.chat_events(["one ", "\x1b[31mtwo"]))
    fake_server.push_events(fake_server.chat_events(["three"]))
    terminal.type("hello\n")
    shown = terminal.until("cached)")
    assert "one [31mtwo" in shown  # no escape sequence of the model's reaches the terminal
    assert "2 tokens | TTFT" in shown
    terminal.until("> ")
    terminal.type("more\n")
    terminal.until("three")
    terminal.until("> ")
    assert terminal.leave() == 0
    assert fake_server.completions[1].body["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "one \x1b[31mtwo"},
        {"role": "user", "content": "more"},
    ]
    assert fake_server.num_connections == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(fake_server: Any, terminal: Terminal) -> None:
    fake_server.push_events(fake_server.chat_events(["so far "])[:2], then="hang", end=False)
    fake_server.push_events(fake_server.chat_events(["again"]))
    terminal.type("tell me\n")
    terminal.until("so far ")
    terminal.interrupt()
    terminal.until("stopped")
    assert fake_server.client_left.wait(10), "the server was left to work on"
    terminal.until("> ")
    terminal.type("go on\n")
    terminal.until("again")
    terminal.until("> ")
    terminal.type("/exit\n")
    assert terminal.process.wait(60) == 0
    assert [message["content"] for message in fake_server.completions[1].body["messages"]] == [
        "tell me",
        "so far ",
        "go on",
    ]


def test_ctrl_c_at_the_prompt_drops_the_line(fake_server: Any, terminal: Terminal) -> None:
    terminal.type("never sent")
    terminal.until("never sent")
    # A signal in the instant before readline waits for a key is only seen at the next key: a person presses again.
    while not terminal.shows("> ", within_s=0.5):
        terminal.interrupt()
    terminal.type("sent\n")
    terminal.until("cached)")
    (seen,) = fake_server.completions
    assert seen.body["messages"] == [{"role": "user", "content": "sent"}]


def test_an_error_does_not_end_the_chat_and_is_not_remembered(fake_server: Any, terminal: Terminal) -> None:
    fake_server.push(fake_server.http(503, b'{"error": {"message": "the model is loading"}}'))
    terminal.type("hello\n")
    terminal.until("HTTP 503: the model is loading")
    terminal.until("> ")
    terminal.type("again\n")
    terminal.until("cached)")
    assert fake_server.completions[1].body["messages"] == [{"role": "user", "content": "again"}]


def test_commands(fake_server: Any, terminal: Terminal, tmp_path: Path) -> None:
    fake_server.models = ["fake-model", "other"]
    saved = tmp_path / "chat.json"
    for line, answer in [
        ("/help", "/save FILE"),
        ("/nonsense", "'/nonsense' is no command"),
        ("/save", "'/save' is no command"),
        ("/model", "* fake-model\n  other"),
        ("/model nobody", "'nobody' is not served here."),
        ("/model other", "  fake-model\n* other"),
        ("forgotten", "cached)"),
        ("/reset", "forgotten"),
        ("/system Be kind.", "with that system prompt"),
        ("hi", "cached)"),
        (f"/save {saved}", "Saved to"),
        ("/save /no/such/folder/x", "No such file"),
        ("/system", "without a system prompt"),
        ("bare", "cached)"),
    ]:
        terminal.type(line + "\n")
        terminal.until(line + "\n")
        terminal.until(answer)
        terminal.until("> ")
    assert terminal.leave() == 0
    assert json.loads(saved.read_text()) == {
        "model": "other",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "w0 w1 w2 "},
        ],
    }
    bodies = [seen.body for seen in fake_server.completions]
    assert [body["model"] for body in bodies] == ["other"] * 3
    assert [len(body["messages"]) for body in bodies] == [1, 2, 1]
