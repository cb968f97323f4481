"""`llmserve chat`: a conversation in the terminal, streamed from an OpenAI-compatible server. Knows no engine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console

from llmserve.errors import LLMServeError
from llmserve.tools.answer_timing import AnswerTiming
from llmserve.tools.http_client import ClientError, explain_error
from llmserve.tools.openai_client import (
    DEFAULT_URL,
    OpenAIClient,
    api_key_from_environment,
    choose_model,
    encode_request,
)

HELP = """\
/reset           forget the conversation
/system TEXT     set the system prompt and start anew; without TEXT, none
/model [NAME]    talk to another model; without NAME, list what is served
/save FILE       write the conversation as JSON
/help            this
/exit            leave (also Ctrl-D); Ctrl-C stops an answer"""

# A model's text must not steer the terminal: control characters but tab and line feed are not shown there.
_CONTROL_CHARACTERS = dict.fromkeys([code for code in (*range(32), *range(127, 160)) if code not in (9, 10)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `llmserve chat`."""
    parser.add_argument("--url", default=DEFAULT_URL, help="the server's address, /v1 or not (default: %(default)s)")
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--api-key", help="default: LLMSERVE_API_KEY or OPENAI_API_KEY from the environment")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--temperature", type=float, help="default: the model's")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of one answer (default: 1024)")
    parser.add_argument("--message", help="say this, print the answer and leave; so does text from a pipe")


def run(args: argparse.Namespace) -> int:
    """Chats until the user leaves. Returns 0; 1 if there is no server or a one-shot got no whole answer; 130."""
    stderr = Console(stderr=True)
    with asyncio.Runner() as runner:
        client = OpenAIClient(args.url, api_key_from_environment(args.api_key))
        try:
            model = runner.run(choose_model(client, args.model))
            chat = Chat(client, model, args, sys.stdout)
            if args.message is not None or not sys.stdin.isatty():
                return _one_shot(chat, runner, sys.stdin.read() if args.message is None else args.message)
            return Terminal(chat, runner).loop()
        except ClientError as error:
            stderr.print(
                explain_error(error, "chat", args.url), style="red", markup=False, highlight=False, soft_wrap=True
            )
        except KeyboardInterrupt:
            return 130
        finally:
            client.close()
    return 1


class Chat:
    """A conversation: its messages, and how the next answer is got and written to `output` as it comes."""

    def __init__(self, client: OpenAIClient, model: str, args: argparse.Namespace, output: TextIO) -> None:
        self.client = client
        self.model = model
        self._args = args
        self._output = output
        self._is_terminal = output.isatty()
        self.messages: list[dict[str, str]] = []
        self.set_system(args.system)

    def set_system(self, text: str | None) -> None:
        """Starts anew with `text` as the system prompt, or with none."""
        self._system = text
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    async def say(self, text: str) -> AnswerTiming:
        """Sends `text` after what was said before and writes the answer. Raises ClientError.

        However it ends, the answer stays in the conversation as far as it came; if nothing came, neither does `text`.
        Cancelling closes the connection, which stops the server's work.
        """
        self.messages.append({"role": "user", "content": text})
        body = encode_request(
            "chat",
            self.model,
            self.messages,
            max_tokens=self._args.max_tokens,
            temperature=self._args.temperature,
        )
        timing = AnswerTiming(self.client.clock())
        parts: list[str] = []
        try:
            async with self.client.stream("chat", body) as stream:
                async for batch in stream:
                    timing.take(batch)
                    for _, chunk in batch:
                        self._write_reasoning(chunk.reasoning)
                        self._write(chunk.text)
                        parts.append(chunk.text)
                    self._output.flush()
        finally:
            if answer := "".join(parts):
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()
            self._write("\n")
            self._output.flush()
        return timing

    def _write(self, text: str) -> None:
        self._output.write(text.translate(_CONTROL_CHARACTERS) if self._is_terminal else text)

    def _write_reasoning(self, text: str) -> None:
        """Shown dimmed to someone who watches; a pipe gets the answer alone."""
        if text and self._is_terminal:
            self._output.write(f"\033[2m{text.translate(_CONTROL_CHARACTERS)}\033[0m")


def describe(timing: AnswerTiming) -> str:
    """The line under an answer: tokens, TTFT, tokens a second, cached tokens."""
    counted = "" if timing.completion_tokens is not None else " (chunks: the server sent no usage)"
    facts = [f"{timing.num_output_tokens} tokens{counted}"]
    if timing.ttft_s is not None:
        facts.append(f"TTFT {timing.ttft_s * 1e3:.0f} ms")
    if timing.tpot_s:
        facts.append(f"{1 / timing.tpot_s:.1f} tokens/s")
    if timing.prompt_tokens is not None:
        cached = "" if timing.cached_tokens is None else f" ({timing.cached_tokens} cached)"
        facts.append(f"prompt {timing.prompt_tokens}{cached}")
    if timing.finish_reason not in (None, "stop"):
        facts.append(f"ended by {timing.finish_reason}")
    return " | ".join(facts)


def _one_shot(chat: Chat, runner: asyncio.Runner, text: str) -> int:
    """One message, one answer: the text on stdout, alone; what else there is to say on stderr."""
    if not text.strip():
        print("llmserve chat: the message is empty.", file=sys.stderr)
        return 1
    timing = runner.run(chat.say(text.rstrip("\n")))
    print(f"[{describe(timing)}]", file=sys.stderr)
    return 0


class Terminal:
    """Reads what a person types and carries it out."""

    def __init__(self, chat: Chat, runner: asyncio.Runner) -> None:
        self._chat = chat
        self._runner = runner
        self._console = Console(highlight=False, soft_wrap=True)

    def loop(self) -> int:
        """Until /exit or Ctrl-D. Returns 0."""
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (gives input() a history and line editing)
        self._say(f"{self._chat.model}. /help lists the commands.", "dim")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:  # drops the line that was being typed
                print()
                continue
            if line == "/exit":
                return 0
            if line:
                self._carry_out(line)

    def _carry_out(self, line: str) -> None:
        try:
            if line.startswith("/"):
                self._command(line)
            else:
                timing = self._runner.run(self._chat.say(line))
                self._say(describe(timing), "dim")
        except KeyboardInterrupt:
            self._say("stopped", "yellow")
        except (LLMServeError, OSError) as error:
            self._say(str(error), "red")

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/reset":
            self._chat.reset()
            self._say("The conversation is forgotten.", "dim")
        elif name == "/system":
            self._chat.set_system(argument or None)
            self._say(
                "A new conversation, " + ("with that system prompt." if argument else "without a system prompt."), "dim"
            )
        elif name == "/model":
            self._choose_model(argument)
        elif name == "/save" and argument:
            document = {"model": self._chat.model, "messages": self._chat.messages}
            Path(argument).expanduser().write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
            self._say(f"Saved to {argument}.", "dim")
        elif name == "/help":
            self._say(HELP, "")
        else:
            self._say(f"{line!r} is no command. /help lists them.", "red")

    def _choose_model(self, name: str) -> None:
        served = [card.id for card in self._runner.run(self._chat.client.models())]
        if name in served:
            self._chat.model = name
        elif name:
            self._say(f"{name!r} is not served here.", "red")
        marks = (f"{'*' if model == self._chat.model else ' '} {model}" for model in served)
        self._say("\n".join(marks), "")

    def _say(self, text: str, style: str) -> None:
        self._console.print(text, style=style, markup=False)
