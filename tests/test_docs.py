"""What the documents say is there, is there: links, flags, code, settings."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

import pytest

from llmserve import cli
from llmserve.config import EngineConfig, RepositoryConfig, ServerConfig, setting_names

ROOT = Path(__file__).parents[1]
SECTIONS = (ServerConfig, EngineConfig, RepositoryConfig)
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
GUIDES = "".join((ROOT / name).read_text() for name in ("README.md", "docs/operating.md", "docs/models.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDES, re.MULTILINE | re.DOTALL)


def subparsers() -> dict[str, argparse.ArgumentParser]:
    parser = cli.build_parser()
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_flag_the_guides_name_exists() -> None:
    known = {flag for parser in subparsers().values() for action in parser._actions for flag in action.option_strings}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDES))
    assert used - known == set()


def test_every_command_the_guides_name_exists() -> None:
    assert set(re.findall(r"llmserve (serve|chat|bench|models|pull|keys)\b", GUIDES)) <= set(subparsers())


def test_python_examples_compile() -> None:
    assert blocks("python")
    for block in blocks("python"):
        compile(block, "<guide>", "exec")


def test_the_readme_shows_the_example_as_it_is() -> None:
    example = (ROOT / "examples" / "rag.py").read_text()
    assert example.partition('"""\n\n')[2] in blocks("python")


def test_toml_examples_hold_known_settings() -> None:
    assert blocks("toml")
    for block in blocks("toml"):
        values = tomllib.loads(block)
        engine = {"model", "served_model_name", *setting_names(EngineConfig)}
        for table in values.pop("models", []):
            assert table.keys() <= engine
        assert values.keys() <= {name for section in SECTIONS for name in setting_names(section)}


def test_nothing_is_left_to_fill_in() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"@@\w+@@|TODO|FIXME", document.read_text()), document.name


def test_every_top_level_folder_is_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for folder in ("api", "repository", "backends", "engine", "worker", "models"):
        assert f"`llmserve/{folder}/`" in text
    for folder in ("scheduler", "kv_cache", "kernels"):
        assert f"`{folder}/`" in text
