"""The `llmserve` command: reads the command line and hands over to what it names. Knows how nothing works."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

from llmserve import __version__
from llmserve.errors import ConfigError, LLMServeError
from llmserve.settings import add_setting_flags
from llmserve.suggestions import did_you_mean


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if all went well, 1 after an error that is explained in one line, 2 for a wrong command line."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(_unknown(unknown[0], args.parser))
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except LLMServeError as error:
        print(f"llmserve: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmserve", description="Serve language models and the models around them.")
    parser.add_argument("--version", action="version", version=f"llmserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text, add in (
        ("serve", "serve models over HTTP", _add_serve),
        ("chat", "chat with a running server", _add_chat),
        ("bench", "measure any OpenAI-compatible server", _add_bench),
        ("models", "list the models that are embedded, cached and loadable", _add_models),
        ("keys", "make an API key", _add_keys),
        ("health", "ask the server on this machine whether it is well", _add_health),
        ("pull", "fetch a model without serving it", _add_pull),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)  # --api-key is not short for --api-keys
        command.set_defaults(parser=command)
        add(command)
    return parser


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    flag = argument.partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    return f"unknown argument {flag!r}." + did_you_mean(flag, known)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.usage = "llmserve serve [MODEL ...] [flags]"  # a hundred flags are in `--help`, with what they mean
    parser.description = "Serve one or more LLMs. Every flag is also a TOML key (--config) and LLMSERVE_<NAME>."
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a Hugging Face folder, a .gguf file, an embedded model's name or a hub name; by default the embedded LLM",
    )
    parser.add_argument("--served-model-name", nargs="+", metavar="NAME", help="the names clients use")
    add_setting_flags(parser)

    def run(args: argparse.Namespace) -> int:
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is imported: it warns at every child
        from llmserve.settings import load_serve_config, unknown_variables

        for told in unknown_variables():
            print(f"llmserve: {told}", file=sys.stderr)
        config = load_serve_config(vars(args))
        _require_server_threads()  # before the imports: libraries start some there already
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # libraries half imported take a KeyboardInterrupt badly
        from llmserve.serve import serve

        signal.signal(signal.SIGINT, signal.default_int_handler)
        return serve(config)

    parser.set_defaults(run=run)


def _require_server_threads() -> None:
    """Raises ConfigError if there are not enough for the server; each engine asks for its own when it is started."""
    from llmserve.threads import ThreadLimitError, require_threads, server_threads

    try:
        require_threads(server_threads(), "The server")
    except ThreadLimitError as error:
        raise ConfigError(str(error)) from error


def _add_chat(parser: argparse.ArgumentParser) -> None:
    from llmserve.tools import chat

    chat.add_arguments(parser)
    parser.set_defaults(run=chat.run)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from llmserve.tools.bench import cli as bench

    bench.add_arguments(parser)
    parser.set_defaults(run=bench.run)


def _add_models(parser: argparse.ArgumentParser) -> None:
    from llmserve.tools import models

    models.add_list_arguments(parser)
    parser.set_defaults(run=models.run_list)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    from llmserve.tools import keys

    keys.add_arguments(parser)
    parser.set_defaults(run=keys.run)


def _add_health(parser: argparse.ArgumentParser) -> None:
    from llmserve.tools import health

    health.add_arguments(parser)
    parser.set_defaults(run=health.run)


def _add_pull(parser: argparse.ArgumentParser) -> None:
    from llmserve.tools import models

    models.add_pull_arguments(parser)
    parser.set_defaults(run=models.run_pull)


if __name__ == "__main__":
    sys.exit(main())
