"""`llmserve models` and `llmserve pull`: what can be served by name, and getting it ahead of time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmserve.config import format_bytes
from llmserve.repository.sources import ModelListing, list_models, resolve_model
from llmserve.tools.progress import StartupDisplay


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `llmserve models`."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `llmserve pull`."""
    parser.add_argument("model", metavar="MODEL", help="an embedded model's name or a hub name")


def run_list(args: argparse.Namespace) -> int:
    """Prints the embedded models and those in the caches."""
    listings = list_models()
    if args.json:
        rows = [asdict(listing) | {"path": str(listing.path) if listing.path else None} for listing in listings]
        print(json.dumps(rows, indent=2))
        return 0
    print_listings(listings, Console())
    return 0


def print_listings(listings: Sequence[ModelListing], console: Console) -> None:
    """A line a model; what each is for beneath, where a console of 80 columns has room for it."""
    table = Table(box=None, pad_edge=False)
    for title in ("MODEL", "FROM", "SIZE", "HERE", "QUANTIZATION"):
        table.add_column(title, no_wrap=title != "QUANTIZATION")
    for listing in listings:
        here = "yes" if listing.path else "no"
        size, quantizations = format_bytes(listing.size_bytes), ", ".join(listing.quantizations) or "damaged"
        table.add_row(listing.name, listing.kind, size, here, quantizations)
    console.print(table)
    for listing in listings:
        if listing.description:
            console.print(Text(f"\n{listing.name}: {listing.description}"))


def run_pull(args: argparse.Namespace) -> int:
    """Fetches a model and prints where it lies."""
    with StartupDisplay(Console(file=sys.stderr)).fetching(args.model) as progress:
        source = resolve_model(args.model, progress)
    print(source.path)
    return 0
