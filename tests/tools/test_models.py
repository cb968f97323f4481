"""What `llmserve models` prints."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from llmserve.repository.sources import ModelListing
from llmserve.tools.models import print_listings


def test_a_narrow_console_has_room_for_everything() -> None:
    description = "A small model whose description is longer than any line of a narrow console. Apache-2.0."
    listings = [
        ModelListing("embedded", "a-model-with-a-name", Path("/x"), 370_960_419, ("none", "q8_0", "int8"), description),
        ModelListing("hub", "another", None, 1, (), ""),
    ]
    output = io.StringIO()
    print_listings(listings, Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert lines[1].split() == ["a-model-with-a-name", "embedded", "354", "MiB", "yes", "none,", "q8_0,", "int8"]
    assert lines[2].split()[-1] == "damaged"
    assert max(len(line) for line in lines) <= 80
    assert " ".join(" ".join(lines).split()).endswith(f"a-model-with-a-name: {description}")
