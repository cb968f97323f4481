"""The requests an engine owes an answer to, and what it has answered: enough to go on in another one.

Also who is under suspicion of killing engines. Decides in ids and counts; knows no process, no socket and no clock.

A death tells of the requests that were in the step in progress. Anyone of them may be at fault, or none: a kernel short
of memory, or a person, may have ended the process. So nobody is judged by one death. A request that has been in two
deaths in a row without a token in between is *suspected*: from then on suspects enter the engine one at a time, while
the others go on. One that gets a token is cleared. One that is the only suspect in a step that dies is *convicted* at
once if the engine died of that step for certain (it raised, or crashed); if the process was killed, or hung, it takes
three such deaths in a row, because chance can look like that, but hardly thrice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator

import msgspec

from llmserve.messages import EngineRequest, StepOutputs

_SUSPECTED_AFTER = 2  # deaths in a row, without a token in between
_CONVICTED_AFTER = 3  # deaths in a row as the only suspect, where they may have had another cause


class InFlightRequest:
    """One sequence: what was asked, and every token that has been passed on."""

    __slots__ = ("is_sent", "num_deaths", "num_deaths_alone", "output_token_ids", "request")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.output_token_ids: list[int] = list(request.output_token_ids)
        self.is_sent = False
        self.num_deaths = 0  # in a row, in the step in progress, without a token in between
        self.num_deaths_alone = 0

    @property
    def is_suspected(self) -> bool:
        """Whether it may enter an engine only as the one suspect there."""
        return self.num_deaths >= _SUSPECTED_AFTER

    def resume(self) -> EngineRequest:
        """The request as another engine has to see it, to go on where this one is."""
        if not self.output_token_ids:
            return self.request
        params = self.request.params
        if params.prompt_logprobs is not None:  # they came with the first token
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(self.request, params=params, output_token_ids=self.output_token_ids)


class InFlightRequests:
    """By id, in order of arrival, from `add` until the answer is complete or unwanted."""

    def __init__(self) -> None:
        self._requests: dict[str, InFlightRequest] = {}
        self._new: list[InFlightRequest] = []  # not sent, and not suspected
        self._suspects: deque[InFlightRequest] = deque()  # not sent
        self._on_trial: InFlightRequest | None = None  # the suspect that has been sent

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far of all that are in flight."""
        return sum(len(record.output_token_ids) for record in self._requests.values())

    def ids(self) -> list[str]:
        """All, the oldest first."""
        return list(self._requests)

    def add(self, request: EngineRequest) -> None:
        """One more, not sent yet."""
        self._requests[request.request_id] = record = InFlightRequest(request)
        self._new.append(record)

    def forget(self, request_ids: Iterable[str]) -> list[str]:
        """They are wanted no longer. Returns those that an engine knows of."""
        sent = []
        for request_id in request_ids:
            record = self._requests.pop(request_id, None)
            if record is not None and record.is_sent:
                sent.append(request_id)
            if record is self._on_trial:
                self._on_trial = None
        return sent

    def record(self, step: StepOutputs) -> None:
        """Notes what a step brought, before anyone is told."""
        requests = self._requests
        for output in step.outputs:
            record = requests.get(output.request_id)
            if record is None:
                continue
            record.output_token_ids += output.token_ids
            if record.num_deaths and output.token_ids:
                self._clear(record)
            if output.finish_reason is not None:
                self.forget((output.request_id,))

    def take_unsent(self) -> Iterator[EngineRequest]:
        """What the engine should be sent now; counts as sent when it is taken. At most one suspect is among it."""
        new, self._new = self._new, []
        while self._on_trial is None and self._suspects:
            suspect = self._suspects.popleft()
            if suspect.request.request_id in self._requests:
                self._on_trial = suspect
                new.append(suspect)
        for record in new:
            if record.request.request_id in self._requests:
                record.is_sent = True
                yield record.resume()

    @property
    def has_unsent(self) -> bool:
        """Whether `take_unsent` may have something."""
        return bool(self._new or (self._suspects and self._on_trial is None))

    def engine_died(self, executing: Collection[str], *, for_certain: bool) -> list[str]:
        """All are unsent again. `executing` were in the step in progress; `for_certain`: the engine died of that step.

        Returns those convicted: they are in flight no longer.
        """
        present = [self._requests[request_id] for request_id in executing if request_id in self._requests]
        if self._on_trial is not None and self._on_trial in present:
            present = [self._on_trial]  # the others are with it only because they are above suspicion
        for record in present:
            record.num_deaths += 1
        convicted = []
        if len(present) == 1:
            alone = present[0]
            alone.num_deaths_alone += 1
            if alone.is_suspected and (for_certain or alone.num_deaths_alone >= _CONVICTED_AFTER):
                convicted.append(alone.request.request_id)
        self.forget(convicted)
        self._start_over()
        return convicted

    def _start_over(self) -> None:
        waiting = set(map(id, self._suspects))
        self._on_trial = None
        self._new = []
        for record in self._requests.values():
            record.is_sent = False
            if not record.is_suspected:
                self._new.append(record)
            elif id(record) not in waiting:
                self._suspects.append(record)  # who has just failed its trial comes last

    def _clear(self, record: InFlightRequest) -> None:
        record.num_deaths = record.num_deaths_alone = 0
        if record is self._on_trial:
            self._on_trial = None
