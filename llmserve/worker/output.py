"""What a step computed: token ids and log-probabilities, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmserve.messages import TokenLogprobs


@dataclass(slots=True)
class ModelRunnerOutput:
    """`sampled` names exactly the requests whose scheduled tokens reached the end of what they had; with drafts, each
    has as many tokens as were accepted, and one more. `logprobs` has an entry for each of them."""

    sampled: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs | None]] = field(default_factory=dict)
