"""The index finds what a naive search finds, however the text grows, and forgets what is over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmserve.scheduler.ngram_proposer import MIN_NGRAM, NgramProposer


def naive(token_ids: list[int], max_drafts: int, max_ngram: int, max_candidates: int) -> tuple[list[int], int] | None:
    """Looks at every earlier place; drafts come from the text written on as if it repeated itself."""
    last = len(token_ids) - 1
    places = [end for end in range(1, last) if token_ids[end - 1 : end + 1] == token_ids[last - 1 :]]
    best, best_length = -1, 0
    for end in list(reversed(places))[:max_candidates]:
        length = max(
            n
            for n in range(MIN_NGRAM, max_ngram + 1)
            if n <= end + 1 and token_ids[end + 1 - n : end + 1] == token_ids[last + 1 - n :]
        )
        if length > best_length:
            best, best_length = end, length
    if best < 0:
        return None
    text = list(token_ids)
    for offset in range(max_drafts):
        text.append(text[best + 1 + offset])
    return text[last + 1 :], best_length


@given(
    pieces=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8),
    max_drafts=st.integers(1, 9),
    max_ngram=st.integers(2, 5),
    max_candidates=st.integers(1, 4),
)
def test_it_finds_what_a_naive_search_finds_after_every_step(
    pieces: list[list[int]], max_drafts: int, max_ngram: int, max_candidates: int
) -> None:
    proposer = NgramProposer(max_ngram, max_candidates)
    token_ids: list[int] = []
    for piece in pieces:
        token_ids += piece
        found = proposer.propose("a", token_ids, max_drafts)
        expected = naive(token_ids, max_drafts, max_ngram, max_candidates)
        assert (found and tuple(found)) == expected


def test_the_longest_match_wins_and_the_newest_of_equals() -> None:
    proposer = NgramProposer()
    text = [1, 2, 3, 4, 50, 9, 3, 4, 60, 8, 3, 4, 70, 1, 2, 3, 4]
    assert proposer.propose("a", text, 2) == ([50, 9], 4)
    assert proposer.propose("b", [9, 3, 4, 60, 8, 3, 4, 70, 7, 3, 4], 1) == ([70], 2)


def test_a_loop_goes_on_as_a_loop() -> None:
    assert NgramProposer().propose("a", [5, 1, 2, 3, 1, 2, 3], 7) == ([1, 2, 3, 1, 2, 3, 1], 3)


def test_a_long_prompt_is_read_over_several_calls() -> None:
    proposer = NgramProposer()
    text = [*range(10_000), 3, 4]
    found = [proposer.propose("a", text, 2) for _ in range(4)]
    assert found == [None, None, ([5, 6], 2), ([5, 6], 2)]


def test_requests_are_apart_and_forgotten_ones_begin_anew() -> None:
    proposer = NgramProposer()
    assert proposer.propose("a", [1, 2, 3, 1, 2], 1) == ([3], 2)
    assert proposer.propose("b", [1, 2], 1) is None
    proposer.forget("a")
    proposer.forget("never seen")
    assert proposer.propose("a", [7, 8, 9, 7, 8], 1) == ([9], 2)


def test_one_or_no_token_proposes_nothing() -> None:
    assert NgramProposer().propose("a", [], 3) is None
    assert NgramProposer().propose("a", [1], 3) is None
