"""`llmserve bench`: reads the flags, runs one load after another, reports each. Measures nothing itself."""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import math
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import llmserve
from llmserve.errors import ConfigError, LLMServeError
from llmserve.tools.bench.load import ClosedLoop, Load, LoadGenerator, OpenLoop
from llmserve.tools.bench.plot import require_matplotlib, save_plot
from llmserve.tools.bench.prompts import PromptFactory, Vocabulary, learn_vocabulary
from llmserve.tools.bench.record import RequestRecord
from llmserve.tools.bench.report import Run, as_json, print_run, print_sweep
from llmserve.tools.bench.summary import parse_slo, summarize
from llmserve.tools.bench.workload import LENGTH_FORMS, PlannedRequest, arrival_times, parse_lengths
from llmserve.tools.http_client import ClientError, explain_error
from llmserve.tools.openai_client import (
    DEFAULT_URL,
    OpenAIClient,
    api_key_from_environment,
    choose_model,
    encode_request,
)

INTERRUPTED = 130  # what a shell gives a program that Ctrl-C ended
_REFUSALS = ("http_401", "http_403", "http_404")  # of the key, or the model: every other request would meet the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `llmserve bench`."""
    parser.add_argument("--url", default=DEFAULT_URL, help="the server's address, /v1 or not (default: %(default)s)")
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--api-key", help="default: LLMSERVE_API_KEY or OPENAI_API_KEY from the environment")
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="default: %(default)s")
    load = parser.add_argument_group("load").add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", help="closed loop: users who each wait for their answer; a list runs each: 1,8,32"
    )
    load.add_argument("--request-rate", help="open loop: requests a second, whatever the server does; a list runs each")
    parser.add_argument(
        "--burstiness", type=float, default=1.0, help="of an open loop: 1 Poisson, < 1 bursts, inf constant"
    )
    parser.add_argument("--num-requests", type=int, help="of each run (default: 100, or no limit with --duration)")
    parser.add_argument(
        "--duration", type=float, help="seconds in which each run sends; what is in flight then finishes"
    )
    parser.add_argument(
        "--num-warmup", type=int, default=1, help="requests sent first and not counted (default: %(default)s)"
    )
    shape = parser.add_argument_group("requests")
    shape.add_argument("--prompt-len", default="128", metavar="TOKENS", help=f"{LENGTH_FORMS} (default: %(default)s)")
    shape.add_argument("--output-len", default="128", metavar="TOKENS", help="the same forms (default: %(default)s)")
    shape.add_argument(
        "--shared-prefix", type=float, default=0.0, metavar="SHARE", help="share of a prompt that others have too"
    )
    shape.add_argument("--prefix-groups", type=int, default=1, help="how many different shared prefixes there are")
    shape.add_argument(
        "--ignore-eos", action="store_true", help="go on to --output-len (servers that know `ignore_eos`)"
    )
    shape.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s")
    shape.add_argument(
        "--seed", type=int, help="of prompts, lengths and arrivals; a seed used again meets its prompts in the cache"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="of a request (default: %(default)s)"
    )
    parser.add_argument("--slo", help="count goodput: milliseconds a good request keeps to, such as ttft:200,tpot:50")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and requests as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the distributions (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark. Returns 0; 1 if nothing could start or a run got no answer at all; 130 after Ctrl-C."""
    console = Console()
    try:
        benchmark = Benchmark(args, console)
        runs = _run_loop(benchmark.run())
        if len(runs) > 1:
            print_sweep(console, runs)
        benchmark.save(runs)
    except (LLMServeError, OSError) as error:
        text = f"llmserve bench: {error}"
        if isinstance(error, ClientError):
            text = explain_error(error, "bench", args.url)
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:  # before the first load, or the second Ctrl-C
        return INTERRUPTED
    if any(run.interrupted for run in runs):
        return INTERRUPTED
    return 0 if all(run.summary.num_succeeded for run in runs) else 1


def _run_loop(coroutine: Any) -> list[Run]:
    try:
        import uvloop
    except ImportError:  # not on Windows
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    else:
        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        result: list[Run] = runner.run(coroutine)
        return result


class Benchmark:
    """The loads of one command line and the requests they are made of. Raises ConfigError for unusable flags."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self._args = args
        self._console = console
        self._loads = _loads(args)
        self._prompt_len = parse_lengths(args.prompt_len, "--prompt-len")
        self._output_len = parse_lengths(args.output_len, "--output-len")
        self._slo = parse_slo(args.slo) if args.slo else None
        self._seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
        self._num_requests = _num_requests(args)
        self._model = ""
        self._vocabulary: Vocabulary | None = None
        if args.plot:
            require_matplotlib()
        for path in (args.json, args.plot):  # found out before the run, not after it
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"The folder of {path} does not exist.")

    async def run(self) -> list[Run]:
        """Runs every load and prints each as it ends. Ctrl-C ends the one that is running, and with it all."""
        client = OpenAIClient(self._args.url, api_key_from_environment(self._args.api_key))
        try:
            self._model = await choose_model(client, self._args.model)
            self._vocabulary = await learn_vocabulary(client, self._args.endpoint, self._model)
            self._say_what_runs()
            await self._warm_up(client)
            runs: list[Run] = []
            for index, load in enumerate(self._loads):
                runs.append(await self._run_load(client, load, index))
                print_run(self._console, runs[-1])
                if runs[-1].interrupted:
                    break
            return runs
        finally:
            client.close()

    async def _warm_up(self, client: OpenAIClient) -> None:
        generator = LoadGenerator(client, self._args.endpoint, self._args.timeout)
        requests = itertools.islice(self._requests("warm-up"), self._args.num_warmup)
        await generator.run(ClosedLoop(concurrency=8), requests, iter(()))
        failed = [record for record in generator.records if not record.succeeded]
        if failed and failed[0].error_kind in _REFUSALS:
            raise ClientError(failed[0].error_kind, failed[0].error_message)
        if failed:
            message = f"warm-up: {len(failed)} of {len(generator.records)} requests failed: {failed[0].error_message}"
            self._console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)

    async def _run_load(self, client: OpenAIClient, load: Load, index: int) -> Run:
        requests: Iterator[PlannedRequest] = itertools.islice(self._requests(f"run {index}"), self._num_requests)
        if self._num_requests is not None:
            requests = iter(list(requests))  # built before the clock starts
        burstiness = load.burstiness if isinstance(load, OpenLoop) else 1.0
        arrivals = arrival_times(load.level, burstiness, random.Random(f"{self._seed} arrivals {index}"))
        gc.collect()
        gc.freeze()  # what exists now is not looked at again by collections that would fall into the run
        with self._progress(load) as on_done:
            generator = LoadGenerator(client, self._args.endpoint, self._args.timeout, on_done)
            task = asyncio.create_task(generator.run(load, requests, arrivals, self._args.duration))
            interrupted = await _finish_or_interrupt(task)
        summary = summarize(generator.records, generator.duration_s, self._slo)
        return Run(load, generator.records, summary, generator.cpu_s, interrupted)

    def _requests(self, purpose: str) -> Iterator[PlannedRequest]:
        """Requests without end. Each purpose has prompts of its own, or the cache would answer the second run."""
        assert self._vocabulary is not None
        rng = random.Random(f"{self._seed} {purpose}")
        args = self._args
        factory = PromptFactory(self._vocabulary, rng, args.shared_prefix, args.prefix_groups)
        while True:
            prompt_len, output_len = self._prompt_len.sample(rng), self._output_len.sample(rng)
            body = encode_request(
                args.endpoint,
                self._model,
                factory.make(prompt_len),
                max_tokens=output_len,
                temperature=args.temperature,
                ignore_eos=args.ignore_eos,
            )
            yield PlannedRequest(body, prompt_len, output_len)

    @contextmanager
    def _progress(self, load: Load) -> Iterator[Callable[[RequestRecord], None]]:
        """A bar on a terminal, drawn when requests end and at most five times a second: it must not cost the run."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(
            *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task(load.label, total=self._num_requests)
            drawn_s = 0.0

            def on_done(record: RequestRecord) -> None:
                nonlocal drawn_s
                bar.advance(task)
                if time.monotonic() - drawn_s > 0.2:
                    drawn_s = time.monotonic()
                    bar.refresh()

            yield on_done

    def _say_what_runs(self) -> None:
        assert self._vocabulary is not None
        lengths = "counted by the server's tokenizer" if self._vocabulary.exact else "estimated: one token a word"
        args = self._args
        text = (
            f"{self._model} at {args.url} ({args.endpoint}): prompts of {args.prompt_len} tokens ({lengths}), "
            f"up to {args.output_len} out, seed {self._seed}"
        )
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def save(self, runs: list[Run]) -> None:
        """Writes what --json and --plot ask for. Raises OSError."""
        args = self._args
        if args.json is not None:
            args.json.write_text(json.dumps(as_json(self._config(), runs), indent=1, allow_nan=False) + "\n")
        if args.plot is not None:
            title = f"{self._model}: prompt {args.prompt_len}, output {args.output_len} tokens ({args.endpoint})"
            save_plot(args.plot, runs, title)

    def _config(self) -> dict[str, Any]:
        args = self._args
        assert self._vocabulary is not None
        names = (
            *("url", "endpoint", "duration", "num_warmup", "prompt_len", "output_len", "shared_prefix"),
            *("prefix_groups", "ignore_eos", "temperature", "timeout"),
        )
        return {
            "model": self._model,
            "num_requests": self._num_requests,
            "seed": self._seed,
            "slo_ms": self._slo,
            "prompt_len_exact": self._vocabulary.exact,
            **{name: getattr(args, name) for name in names},
            "client": f"llmserve {llmserve.__version__}, Python {platform.python_version()}, {sys.platform}",
            "unix_time_s": time.time(),
        }


async def _finish_or_interrupt(task: asyncio.Task[None]) -> bool:
    """Waits for `task`; Ctrl-C cancels it once (a second one ends the program). Returns whether that happened."""
    loop = asyncio.get_running_loop()
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        loop.remove_signal_handler(signal.SIGINT)
        task.cancel()

    try:
        loop.add_signal_handler(signal.SIGINT, interrupt)
    except (NotImplementedError, ValueError, RuntimeError):  # Windows, or not the main thread: Ctrl-C ends the program
        await task
        return False
    try:
        await asyncio.wait([task])
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    if not task.cancelled():
        task.result()  # a bug of ours is not to be hidden
    return interrupted


def _num_requests(args: argparse.Namespace) -> int | None:
    if args.num_requests is not None and args.num_requests < 1:
        raise ConfigError(f"--num-requests {args.num_requests}: at least one request must be sent.")
    if args.duration is not None and not args.duration > 0:
        raise ConfigError(f"--duration {args.duration}: it must be more than 0 seconds.")
    if args.num_requests is None and args.duration is None:
        return 100
    number: int | None = args.num_requests
    return number


def _loads(args: argparse.Namespace) -> list[Load]:
    if args.request_rate is None:
        levels = _numbers(args.concurrency or "8", "--concurrency")
        if not all(level.is_integer() for level in levels):
            raise ConfigError(f"--concurrency {args.concurrency}: these must be whole numbers.")
        return [ClosedLoop(int(level)) for level in levels]
    if not args.burstiness > 0:
        raise ConfigError(f"--burstiness {args.burstiness}: it must be more than 0 (1 is Poisson, inf is constant).")
    return [OpenLoop(rate, args.burstiness) for rate in _numbers(args.request_rate, "--request-rate")]


def _numbers(text: str, flag: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(number > 0 and math.isfinite(number) for number in numbers):
        raise ConfigError(f"{flag} {text!r}: give a number above 0, or several joined by commas.")
    return numbers
