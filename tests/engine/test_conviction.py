"""Whatever poisons arrive in whatever order: no innocent request is ever convicted, and every poison is, soon.

And whoever is paused meanwhile, and whatever is on its way then: everybody hears every token once, in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine.in_flight import InFlightRequests
from llmserve.messages import EngineRequest, EngineStats, FinishReason, SamplingParams, SequenceOutput, StepOutputs

_NUM_TOKENS = 4  # of every answer
_MAX_DEATHS = {"crash": 4, "add": 4, "hang": 8}  # that one poison can cause before it is convicted
_MAX_CHANCE_DEATHS = 2  # the third in a row may convict: chance is told from guilt by nothing else
_NO_STATS = EngineStats(0, 0, 0, 0)


@dataclass(frozen=True)
class Visitor:
    """A request: when it comes, and how it ends its engine once it has so many tokens, if it does."""

    arrival: int
    poison: str = ""
    after_tokens: int = 0
    leaves_at: int | None = None
    pauses: frozenset[int] = frozenset()  # for one turn, or several in a row


@dataclass
class Died(Exception):
    """The engine has ended."""

    executing: list[str]
    for_certain: bool


@dataclass
class SimulatedEngine:
    """Runs what it was sent in order of arrival, as many at once as there are seats."""

    visitors: dict[str, Visitor]
    num_seats: int
    queue: deque[EngineRequest] = field(default_factory=deque)
    tokens: dict[str, int] = field(default_factory=dict)

    def receive(self, request: EngineRequest) -> None:
        self.queue.append(request)

    def abort(self, names: list[str]) -> None:
        self.queue = deque(request for request in self.queue if request.request_id not in names)
        for name in names:
            self.tokens.pop(name, None)

    def visitor(self, name: str) -> Visitor:
        return self.visitors[name.partition("~")[0]]

    def step(self) -> list[SequenceOutput]:
        """A token for each that runs, its place in the answer; raises Died instead if a poison works."""
        while self.queue and len(self.tokens) < self.num_seats:
            request = self.queue.popleft()
            name = request.request_id
            if self.visitor(name).poison == "add":
                raise Died([], for_certain=True)  # between two steps
            self.tokens[name] = len(request.output_token_ids)
        names = list(self.tokens)
        for name in names:
            visitor = self.visitor(name)
            if visitor.poison and self.tokens[name] >= visitor.after_tokens:
                raise Died(names, for_certain=visitor.poison == "crash")
        outputs = []
        for name in names:
            self.tokens[name] += 1
            is_last = self.tokens[name] == _NUM_TOKENS
            outputs.append(SequenceOutput(name, [self.tokens[name]], FinishReason.LENGTH if is_last else None))
            if is_last:
                del self.tokens[name]
        return outputs


@dataclass
class House:
    """What the supervisor does with the books, without processes."""

    visitors: dict[str, Visitor]
    num_seats: int
    chance: frozenset[int]
    latency: int = 0  # turns
    requests: InFlightRequests = field(default_factory=InFlightRequests)
    convicted: list[str] = field(default_factory=list)
    num_deaths: int = 0

    def run(self) -> None:
        """Until everybody has left. What a step says arrives some turns later, or never if the engine has died by
        then."""
        self.heard: dict[str, list[int]] = {name: [] for name in self.visitors}
        self.engine = SimulatedEngine(self.visitors, self.num_seats)
        on_its_way: deque[list[SequenceOutput]] = deque()
        for turn in range(3000):
            self._come_and_go(turn)
            if len(on_its_way) > self.latency:
                self._hear(on_its_way.popleft())
            if turn > 60 and not self.requests:
                return
            for request in self.requests.take_unsent():
                self.engine.receive(request)
            try:
                if turn in self.chance:
                    raise Died(list(self.engine.tokens), for_certain=False)
                on_its_way.append(self.engine.step())
            except Died as death:
                self.num_deaths += 1
                self.convicted += self.requests.engine_died(death.executing, for_certain=death.for_certain)
                self.engine = SimulatedEngine(self.visitors, self.num_seats)
                on_its_way.clear()
        raise AssertionError(f"{self.requests.ids()} wait for ever")

    def _come_and_go(self, turn: int) -> None:
        for name, visitor in self.visitors.items():
            if visitor.arrival == turn:
                params = SamplingParams(max_tokens=_NUM_TOKENS, seed=1)
                self.requests.add(
                    EngineRequest(request_id=name, prompt_token_ids=[1], params=params, arrival_s=float(turn))
                )
            if visitor.leaves_at == turn:
                self.engine.abort(self.requests.forget([name]))
            if turn in visitor.pauses:
                self.engine.abort(self.requests.pause([name]))
            else:
                self.requests.unpause([name])

    def _hear(self, outputs: list[SequenceOutput]) -> None:
        self.requests.record(StepOutputs(1, 0.0, outputs, _NO_STATS))
        for output in outputs:
            if output.request_id:
                self.heard[output.request_id] += output.token_ids


def visitors() -> st.SearchStrategy[Visitor]:
    arrival = st.integers(0, 30)
    pauses = st.frozensets(st.integers(0, 60), max_size=6)
    innocent = st.builds(Visitor, arrival, leaves_at=st.none() | st.integers(5, 40), pauses=pauses)
    tokens = st.integers(0, _NUM_TOKENS - 1)
    poison = st.builds(Visitor, arrival, st.sampled_from(["crash", "crash", "add", "hang"]), tokens, pauses=pauses)
    return st.one_of(innocent, innocent, poison)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(visitors(), min_size=1, max_size=14),
    st.integers(1, 8),
    st.frozensets(st.integers(0, 60), max_size=_MAX_CHANCE_DEATHS),
    st.integers(0, 2),
)
def test_all_poisons_are_convicted_soon_and_nobody_else_is(
    crowd: list[Visitor], num_seats: int, chance: frozenset[int], latency: int
) -> None:
    house = House({f"r{number}": visitor for number, visitor in enumerate(crowd)}, num_seats, chance, latency)
    house.run()
    poisons = {name: visitor.poison for name, visitor in house.visitors.items() if visitor.poison}
    assert sorted(house.convicted) == sorted(poisons)
    for name, visitor in house.visitors.items():
        heard = house.heard[name]
        assert heard == list(range(1, len(heard) + 1))
        assert len(heard) == _NUM_TOKENS or visitor.poison or visitor.leaves_at is not None
    assert house.num_deaths <= sum(_MAX_DEATHS[poison] for poison in poisons.values()) + len(chance)


def test_a_newcomer_that_kills_is_not_mistaken_for_the_suspect_it_came_in_with() -> None:
    crowd = {
        "innocent": Visitor(0),
        "chance": Visitor(0),
        "poison": Visitor(3, "crash"),
    }
    house = House(crowd, 8, frozenset({0, 1}))
    house.run()
    assert house.convicted == ["poison"]


def test_who_was_aborted_in_the_step_may_have_been_the_culprit() -> None:
    house = House({"innocent": Visitor(0), "gone": Visitor(0)}, 8, frozenset())
    requests = house.requests
    house._come_and_go(0)
    for _ in range(3):
        list(requests.take_unsent())
        assert requests.engine_died(["innocent", "gone"], for_certain=True) == []
    requests.forget(["gone"])
    list(requests.take_unsent())
    assert requests.engine_died(["innocent", "gone"], for_certain=True) == []
