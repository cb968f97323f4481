"""The house rules that a program can check: floors, walls, links, sizes. The table below is the architecture.

Each check is a function from a source tree to a list of violations. It runs on this repository, and on small trees into
which a violation was planted, so that a check that finds nothing is known to be able to find something.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "kv_cache", "scheduler")  # real folders at the root, links in the package
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

# A room imports only itself and rooms on lower floors. A room is a folder or several modules of `llmserve/`.
FLOORS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (9, ("cli", "serve", "general_models", "tools")),
    (8, ("api",)),
    (7, ("repository",)),
    (6, ("backends",)),
    (5, ("engine",)),
    (4, ("worker",)),
    (3, ("models",)),
    (3, ("scheduler",)),
    (2, ("config", "settings", "api_keys")),
    (2, ("pooling_config", "pooling_modules")),
    (
        2,
        (
            *("tokenizer", "tokenizer_files", "gguf_file", "gguf_tokenizer"),
            *("chat_template", "bounded_template", "token_bytes", "detokenizer", "stop_strings"),
        ),
    ),
    (
        1,
        (
            *("messages", "errors", "json_fields", "histogram", "http_metrics", "metrics", "general_metrics"),
            *("inference", "pooling_metrics", "request_context", "rate_limit", "threads", "temporary_folder"),
            *("gpu_driver", "pause", "suggestions"),
        ),
    ),
    (1, ("kv_cache",)),
    (1, ("kernels",)),
)
ROOM_OF = {name: names for _, names in FLOORS for name in names}
FLOOR_OF = {name: floor for floor, names in FLOORS for name in names}

# Top-level modules from elsewhere, and the only places in `llmserve/` that may import them; () is nowhere.
WALLS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("pydantic", "fastapi", "starlette", "sse_starlette"), ("api",)),
    "uvicorn": ("api", "serve", "cli"),
    "matplotlib": ("tools",),
    **dict.fromkeys(("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"), ()),
}
# Rooms and what they must do without: ids and counts only.
BARE = {"kv_cache": ("torch", "numpy"), "scheduler": ("torch", "numpy")}

# The doors behind which anything may go wrong without taking down the rest.
DOORS = {
    "llmserve.api.stream": "an HTTP handler whose answer has begun",
    "llmserve.api.v2_http": "the v2 HTTP handlers",
    "llmserve.api.v2_http_direct": "the v2 HTTP handler that comes past them",
    "llmserve.api.v2_grpc_service": "the gRPC interceptor",
    "llmserve.api.entrance": "the books of a request, which are no part of its answer",
    "llmserve.engine.loop": "the engine's loop",
    "llmserve.backends.instance": "the reader of what a model process says, on the event loop",
    "llmserve.backends.backend_runner": "a model process's loop, which runs other people's code",
}
# Waits for a point in time that are the purpose of the code, not a poll.
TIMERS = (
    "llmserve.tools.bench.load",  # when the next request of an arrival process is due
    "llmserve.repository.model_repository",  # the control mode that Triton calls poll
)


@dataclass(frozen=True)
class Module:
    """A parsed file. `name` is dotted, as it is imported."""

    name: str
    path: Path
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, filename=str(self.path))

    @property
    def room(self) -> str:
        """The first name under `llmserve`; "" for the package itself."""
        return self.name.partition(".")[2].partition(".")[0]

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 1)}: {what}"


def modules(root: Path) -> list[Module]:
    """Every module of the package under `root`, linked folders included."""
    found = []
    for folder, subfolders, files in os.walk(root / "llmserve", followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        for path in sorted(Path(folder) / name for name in files if name.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path, path.read_text("utf-8")))
    return found


def imports(module: Module, known: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Every module that `module` names in an import, wherever it stands: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = full in known or any(name.startswith(f"{full}.") for name in known)
                yield node, full if is_module else base
        elif isinstance(node, ast.Call) and _call_name(node) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node, argument.value


def _call_name(call: ast.Call) -> str:
    """`f` of both `f()` and `a.b.f()`."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def check_rooms(root: Path) -> list[str]:
    """Every module has a place in the table, and the table names nothing that is gone."""
    rooms = {module.room for module in modules(root)} - {""}
    unplaced = [f"llmserve.{room} has no floor: add it to FLOORS" for room in sorted(rooms - FLOOR_OF.keys())]
    return unplaced + [f"FLOORS names llmserve.{room}, which is gone" for room in sorted(FLOOR_OF.keys() - rooms)]


def check_floors(root: Path) -> list[str]:
    """Imports go down, or stay in their room."""
    found = []
    every = modules(root)
    known = {module.name for module in every}
    for module in every:
        for node, name in imports(module, known):
            if not name.startswith("llmserve."):
                if name.partition(".")[0] in LINKED:
                    found.append(module.at(node, f"imports {name}: write llmserve.{name}"))
                continue
            target = name.split(".")[1]
            if target not in FLOOR_OF:
                found.append(module.at(node, f"imports {name}, which has no floor"))
            elif module.room == "":
                found.append(module.at(node, f"the package itself imports {name}"))
            elif ROOM_OF.get(module.room) is not ROOM_OF[target] and FLOOR_OF.get(module.room, 0) <= FLOOR_OF[target]:
                here, there = FLOOR_OF.get(module.room, 0), FLOOR_OF[target]
                found.append(module.at(node, f"floor {here} imports {name} on floor {there}"))
    return found


def check_walls(root: Path) -> list[str]:
    """Libraries stay in the rooms that are theirs."""
    found = []
    every = modules(root)
    known = {module.name for module in every}
    for module in every:
        for node, name in imports(module, known):
            library = name.partition(".")[0]
            if module.room not in WALLS.get(library, (module.room,)):
                where = ", ".join(WALLS[library]) or "nowhere"
                found.append(module.at(node, f"imports {library}, whose place is: {where}"))
            if library in BARE.get(module.room, ()):
                found.append(module.at(node, f"imports {library}: {module.room} handles ids and counts only"))
            if module.room == "kernels" and library == "llmserve" and not name.startswith("llmserve.kernels"):
                found.append(module.at(node, f"imports {name}: kernels import nothing else of ours"))
    return found


def check_excepts(root: Path) -> list[str]:
    """Whoever catches everything stands at a door, or cleans up and raises on."""
    found = []
    for module in modules(root):
        if module.name in DOORS:
            continue
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = [node.type] if not isinstance(node.type, ast.Tuple) else node.type.elts
            names = {"everything" if item is None else ast.unparse(item) for item in caught}
            last = node.body[-1]
            if names & {"everything", "Exception", "BaseException"} and not (
                isinstance(last, ast.Raise) and not last.exc
            ):
                found.append(module.at(node, "catches everything, and is no door"))
    return found


def check_calls(root: Path) -> list[str]:
    """No pickle by another name, no sleep, no `**kwargs` passed through, no global statement."""
    found = []
    for module in modules(root):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                found.append(module.at(node, f"changes the global {', '.join(node.names)}"))
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if _call_name(node) in ("send_pyobj", "recv_pyobj"):
                    found.append(module.at(node, f"{name} is pickle"))
                if name == "torch.load" and not any(k.arg == "weights_only" for k in node.keywords):
                    found.append(module.at(node, "torch.load without weights_only is pickle"))
                yields = name == "asyncio.sleep" and ast.unparse(node).endswith("sleep(0)")
                if name in ("time.sleep", "asyncio.sleep") and module.name not in TIMERS and not yields:
                    found.append(module.at(node, f"{name}: wait for an event, a socket or a condition"))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
                found += _passed_through(module, node, node.args.kwarg.arg)
    return found


def _passed_through(module: Module, function: ast.AST, kwargs: str) -> Iterator[str]:
    for call in ast.walk(function):
        if isinstance(call, ast.Call):
            for keyword in call.keywords:
                if keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == kwargs:
                    yield module.at(call, f"passes **{kwargs} through")


def check_docstrings(root: Path) -> list[str]:
    """A module's first line says what stands here."""
    found = []
    for module in modules(root):
        if not (ast.get_docstring(module.tree) or "").strip():
            found.append(f"{module.name}: no docstring")
        elif not module.source.startswith('"""'):
            found.append(f"{module.name}: the docstring is not the first line")
    return found


def check_sizes(root: Path) -> list[str]:
    """One noun, one file; a function fits a screen."""
    found = []
    for module in modules(root):
        num_lines = module.source.count("\n")
        if num_lines > MAX_FILE_LINES:
            found.append(f"{module.name}: {num_lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(module.at(node, f"{node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"))
    return found


def check_packages(root: Path) -> list[str]:
    """Links point to the folders at the root, and the only `__init__.py` is the package's own.

    An importable top-level `kernels` would be taken by transformers for the Hugging Face package of that name.
    """
    found = []
    for name in LINKED:
        link = root / "llmserve" / name
        if not link.is_symlink() or os.readlink(link) != f"../{name}":
            found.append(f"llmserve/{name} is not a link to ../{name}")
    folders = ["llmserve", *LINKED]
    inits = sorted({path for folder in folders for path in (root / folder).rglob("__init__.py")})
    return found + [str(path.relative_to(root)) for path in inits if path != root / "llmserve" / "__init__.py"]


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    check_rooms,
    check_floors,
    check_walls,
    check_excepts,
    check_calls,
    check_docstrings,
    check_sizes,
    check_packages,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rules(check: Callable[[Path], list[str]]) -> None:
    assert check(ROOT) == []


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small house without fault: an empty module in every room."""
    package = tmp_path / "llmserve"
    package.mkdir()
    for name in LINKED:
        (tmp_path / name).mkdir()
        (package / name).symlink_to(f"../{name}")
    for name in FLOOR_OF:
        path = package / name / "thing.py" if name in LINKED or name == "api" else package / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text('"""A thing."""\n')
    (package / "__init__.py").write_text('"""The package."""\n')
    return tmp_path


def test_a_house_without_fault_passes(house: Path) -> None:
    allowed = {
        "api/thing.py": "import pydantic\nfrom llmserve.backends import x\nfrom llmserve import errors, __version__\n",
        "cli.py": "import uvicorn\nfrom llmserve.tools import x\nimport llmserve.api.thing\n",
        "worker.py": "from llmserve.scheduler import thing\nfrom llmserve.kernels.thing import x\nimport torch\n",
        "scheduler/thing.py": "from llmserve.kv_cache.thing import x\nimport heapq\nfrom . import thing\n",
        "detokenizer.py": "from llmserve.tokenizer import x\nfrom llmserve.messages import y\n",
        "engine.py": "try:\n    x = 1\nexcept BaseException:\n    x = 2\n    raise\n",
        "tools.py": "import asyncio\nasync def f(**options):\n    await asyncio.sleep(0)\n    return {**options}\n",
    }
    for path, source in allowed.items():
        (house / "llmserve" / path).write_text('"""A thing."""\n' + source)
    assert {check.__name__: check(house) for check in CHECKS if check(house)} == {}


PLANTED: tuple[tuple[Callable[[Path], list[str]], str, str], ...] = (
    (check_rooms, "novelty.py", ""),
    (check_floors, "kv_cache/thing.py", "from llmserve.scheduler import thing"),
    (check_floors, "kv_cache/thing.py", "from llmserve.kernels import thing"),  # the same floor, another room
    (check_floors, "scheduler/thing.py", "import llmserve.models"),
    (check_floors, "config.py", "import llmserve.tokenizer"),
    (check_floors, "messages.py", "from llmserve import config"),
    (check_floors, "engine.py", "def f():\n    from llmserve.api.thing import x"),
    (check_floors, "engine.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import llmserve.api.thing"),
    (check_floors, "engine.py", "import importlib\nx = importlib.import_module('llmserve.backends')"),
    (check_floors, "api/thing.py", "from ..cli import x"),
    (check_floors, "api/thing.py", "from .. import cli"),
    (check_floors, "engine.py", "import kernels.ops"),
    (check_floors, "engine.py", "from scheduler import thing"),
    (check_floors, "engine.py", "import llmserve.unheard_of"),
    (check_floors, "__init__.py", "import llmserve.errors"),
    (check_walls, "kv_cache/thing.py", "import torch.nn"),
    (check_walls, "scheduler/thing.py", "def f():\n    from numpy import array"),
    (check_walls, "kernels/thing.py", "from llmserve.errors import LLMServeError"),
    (check_walls, "backends.py", "from pydantic import BaseModel"),
    (check_walls, "cli.py", "import fastapi"),
    (check_walls, "repository.py", "from starlette.requests import Request"),
    (check_walls, "engine.py", "import uvicorn"),
    (check_walls, "engine.py", "import pickle"),
    (check_walls, "api/thing.py", "from pickle import loads"),
    (check_walls, "worker.py", "import importlib\nimportlib.import_module('cloudpickle')"),
    (check_excepts, "worker.py", "try:\n    x = 1\nexcept Exception:\n    x = 2"),
    (check_excepts, "worker.py", "try:\n    x = 1\nexcept (ValueError, BaseException) as e:\n    x = 2"),
    (check_excepts, "worker.py", "try:\n    x = 1\nexcept:\n    x = 2"),
    (check_excepts, "worker.py", "try:\n    x = 1\nexcept Exception as e:\n    raise ValueError from e"),
    (check_calls, "engine.py", "import time\ntime.sleep(1)"),
    (check_calls, "engine.py", "import asyncio\nasync def f():\n    await asyncio.sleep(0.1)"),
    (check_calls, "engine.py", "def f(socket):\n    socket.send_pyobj(1)"),
    (check_calls, "models.py", "import torch\nx = torch.load('f')"),
    (check_calls, "models.py", "def f(g, **kwargs):\n    return g(1, **kwargs)"),
    (check_calls, "models.py", "x = 1\ndef f():\n    global x\n    x = 2"),
    (check_sizes, "models.py", "x = 1\n" * MAX_FILE_LINES),
    (check_sizes, "models.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
)


@pytest.mark.parametrize(("check", "path", "source"), PLANTED)
def test_a_planted_violation_is_found(house: Path, check: Callable[[Path], list[str]], path: str, source: str) -> None:
    (house / "llmserve" / path).write_text(f'"""A thing."""\n{source}\n')
    assert len(check(house)) == 1
    others = {other.__name__: other(house) for other in CHECKS if other not in (check, check_floors) and other(house)}
    assert others == {}


@pytest.mark.parametrize("source", ["", "x = 1\n", '""" """\n', '# A comment.\n"""Late."""\n'])
def test_a_missing_docstring_is_found(house: Path, source: str) -> None:
    (house / "llmserve" / "models.py").write_text(source)
    assert len(check_docstrings(house)) == 1


def test_wrong_links_and_stray_packages_are_found(house: Path) -> None:
    (house / "llmserve" / "kernels").unlink()
    (house / "llmserve" / "kernels").symlink_to(house / "kernels")  # absolute: true on this machine only
    (house / "kv_cache" / "__init__.py").touch()
    (house / "llmserve" / "api" / "__init__.py").touch()
    assert check_packages(house) == [
        "llmserve/kernels is not a link to ../kernels",
        "kv_cache/__init__.py",
        "llmserve/api/__init__.py",
    ]


def test_a_room_that_is_gone_is_found(house: Path) -> None:
    (house / "llmserve" / "config.py").unlink()
    assert check_rooms(house) == ["FLOORS names llmserve.config, which is gone"]


def test_every_door_is_one() -> None:
    """An entry that no longer catches anything must go, or something else will come in by it."""
    sources = {module.name: module.source for module in modules(ROOT)}
    assert [name for name in DOORS if "except Exception" not in sources[name]] == []
    assert [name for name in TIMERS if "asyncio.sleep(" not in sources[name]] == []


def test_git_knows_the_links_as_links() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-s", *(f"llmserve/{name}" for name in LINKED)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,  # an unpacked archive is no repository
    )
    modes = [line.split()[0] for line in listed.stdout.splitlines()]
    assert set(modes) <= {"120000"}


def run_python(code: str, cwd: Path, python_path: str = "") -> str:
    """Runs `code` in a process of its own and returns what it printed."""
    environment = {**os.environ, "PYTHONPATH": python_path or str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_server_process_does_not_import_torch(tmp_path: Path) -> None:
    """Start-up time and memory: the engine's process has torch, the server's has not. Nor have the tools."""
    code = """
        import sys
        import llmserve.api.app, llmserve.backends.llm, llmserve.cli, llmserve.serve, llmserve.tokenizer
        import llmserve.tools.bench.cli, llmserve.tools.chat
        print(sorted({"torch", "transformers", "matplotlib"} & sys.modules.keys()))
    """
    assert run_python(code, cwd=tmp_path) == "[]"


def test_transformers_is_not_misled_by_our_folders() -> None:
    """Started in the repository's root, `kernels` is found on the path; it must not pass for Hugging Face's package."""
    code = """
        import importlib.util, transformers, transformers.modeling_utils
        from transformers.utils.import_utils import is_kernels_available
        spec = importlib.util.find_spec("kernels")
        ours = spec is not None and spec.origin is None
        assert not (ours and is_kernels_available())
        from transformers import LlamaConfig, LlamaForCausalLM
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        LlamaForCausalLM(LlamaConfig(**sizes))
    """
    run_python(code, cwd=ROOT)


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9'\n")
    code = "import kernels, llmserve.kernels.ops; print(kernels.__version__, llmserve.kernels.ops.__name__)"
    assert run_python(code, ROOT, python_path=str(tmp_path)) == "9 llmserve.kernels.ops"
