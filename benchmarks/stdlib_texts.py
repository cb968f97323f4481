"""Real English of many lengths without a download: the documentation in this Python's own standard library."""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def docstrings() -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every documented function, class and module, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and text.isascii():
                    yield ".".join([*parts, getattr(node, "name", "")]).rstrip("."), inspect.cleandoc(text)


def mixed_texts(count: int, shortest: int = 3, longest: int = 180) -> list[str]:
    """Different texts of `shortest` to `longest` words, as many of each length as of any other (about 5-250 tokens)."""
    by_length: dict[int, list[str]] = {}
    for _, text in docstrings():
        for paragraph in (text, *text.split("\n\n")):
            num_words = len(paragraph.split())
            if shortest <= num_words <= longest:
                by_length.setdefault(num_words, []).append(paragraph)
    source = random.Random(0)
    lengths = sorted(by_length)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[source.choice(by_length[source.choice(lengths)])] = None
    return list(texts)
