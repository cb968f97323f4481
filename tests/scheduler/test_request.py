"""Request: when a sequence ends."""

from __future__ import annotations

from llmserve.messages import FinishReason
from llmserve.scheduler.request import Request
from tests.scheduler.fake_worker import engine_request


def make_request(max_model_len: int = 100, **params: object) -> Request:
    prompt = [1, 2, 3]
    return Request(engine_request("a", prompt, **params), (0.0, 0.0, 0), max_model_len)  # type: ignore[arg-type]


def append_all(request: Request, token_ids: list[int]) -> list[int]:
    """Appends until the request ends; returns what it took."""
    for index, token_id in enumerate(token_ids):
        if request.append(token_id):
            return token_ids[: index + 1]
    return token_ids


def test_max_tokens_ends_with_length() -> None:
    request = make_request(max_tokens=2)
    assert append_all(request, [9, 9, 9]) == [9, 9]
    assert request.finish_reason is FinishReason.LENGTH
    assert request.stop_token_id is None


def test_the_context_ends_with_length() -> None:
    request = make_request(max_model_len=5, max_tokens=50)
    assert append_all(request, [9, 9, 9]) == [9, 9]
    assert request.finish_reason is FinishReason.LENGTH


def test_a_stop_token_ends_with_stop_and_is_kept() -> None:
    request = make_request(stop_token_ids=[7, 8])
    assert append_all(request, [9, 8, 9]) == [9, 8]
    assert request.finish_reason is FinishReason.STOP
    assert request.stop_token_id == 8
    assert request.output_token_ids == [9, 8]


def test_a_stop_token_in_the_last_place_says_stop() -> None:
    request = make_request(max_tokens=2, stop_token_ids=[8])
    append_all(request, [9, 8])
    assert request.finish_reason is FinishReason.STOP


def test_stop_tokens_count_only_after_min_tokens() -> None:
    request = make_request(min_tokens=2, stop_token_ids=[8])
    assert append_all(request, [8, 8, 8, 9]) == [8, 8, 8]
    assert request.finish_reason is FinishReason.STOP


def test_stop_tokens_in_the_prompt_mean_nothing() -> None:
    request = make_request(stop_token_ids=[1, 2, 3])
    assert append_all(request, [9]) == [9]
    assert request.finish_reason is None


def test_the_prompt_given_is_not_touched() -> None:
    source = engine_request("a", [1, 2])
    request = Request(source, (0.0, 0.0, 0), 100)
    request.append(5)
    assert request.token_ids == [1, 2, 5]
    assert source.prompt_token_ids == [1, 2]
    assert request.prompt_token_ids == [1, 2]
