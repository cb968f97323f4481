"""The requests an engine owes an answer to, and what it has answered: enough to go on in another one.

Also who is under suspicion of killing engines. Decides in ids and counts; knows no process, no socket and no clock.

A death tells of the requests that were in the step in progress. Anyone of them may be at fault, or none: a kernel short
of memory, or a person, may have ended the process. So nobody is judged by what others were part of. A request is
*convicted* only of a step that held nobody else, and only if it has been in a death before: at once if the engine died
of that step for certain (it raised, or crashed); after three such deaths in a row if the process was killed, or hung,
because chance can look like that, but hardly thrice.

What brings a culprit into a step of its own:

* After a death, those that were in it enter the next engine with whoever has come since. A token clears a request.
  (Newcomers could be kept out until then. That would spare them a mark if the next death is soon, which alone makes
  nobody a suspect, and let all of them wait for the longest prompt that was in the first, for minutes.)
* One that has been in two deaths in a row without a token in between is *suspected*. Suspects enter one at a time: the
  first of them before everybody else, alone, and the next when that one has its token and the others are running again;
  newcomers wait. One that dies beside others is the first in the next engine, and alone.

So every death brings at least one culprit nearer to its conviction, which it meets in its fourth at the latest (its
eighth, if the engine is killed or hangs of it), and no step that a request is judged by holds anybody else.

A request whose answer nobody takes is *paused*: the engine is told to forget it, and later gets it as another engine
would. It has a new name there then, so that what the engine had sent of it before it forgot it is told apart, and
dropped: it will be said again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator

import msgspec

from llmserve.messages import EngineRequest, StepOutputs

_SUSPECTED_AFTER = 2  # deaths in a row, without a token in between
_CONVICTED_AFTER = 3  # deaths in a row, alone in the step, where they may have had another cause


class InFlightRequest:
    """One sequence: what was asked, and every token that has been passed on."""

    __slots__ = (
        "engine_id",
        "is_paused",
        "num_deaths",
        "num_deaths_alone",
        "num_pauses",
        "output_token_ids",
        "request",
        "was_sent",
    )

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.output_token_ids: list[int] = list(request.output_token_ids)
        self.engine_id: str | None = None  # its name in the engine there is now, once sent
        self.was_sent = False  # to any
        self.num_deaths = 0  # in a row, in the step in progress, without a token in between
        self.num_deaths_alone = 0  # of them, those in steps that held nobody else
        self.is_paused = False
        self.num_pauses = 0

    @property
    def is_suspected(self) -> bool:
        """Whether it may enter an engine only as the one suspect there."""
        return self.num_deaths >= _SUSPECTED_AFTER

    def resume(self) -> EngineRequest:
        """The request as another engine has to see it, to go on where this one is."""
        if not self.output_token_ids:
            return self.request  # never paused
        request_id = f"{self.request.request_id}~{self.num_pauses}" if self.num_pauses else self.request.request_id
        params = self.request.params
        if params.prompt_logprobs is not None:  # they came with the first token
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        return msgspec.structs.replace(
            self.request, request_id=request_id, params=params, output_token_ids=self.output_token_ids
        )


class InFlightRequests:
    """By id, in order of arrival, from `add` until the answer is complete or unwanted."""

    def __init__(self) -> None:
        self._requests: dict[str, InFlightRequest] = {}
        self._sent: dict[str, InFlightRequest] = {}  # by their names in the engine there is now
        self._new: list[InFlightRequest] = []  # never sent
        self._returning: list[InFlightRequest] = []  # not sent to this engine, but to an earlier one; no suspects
        self._suspects: deque[InFlightRequest] = deque()  # not sent
        self._clouded: set[str] = set()  # those that were in the last death, and have had no token since
        self._on_trial: InFlightRequest | None = None  # the suspect that has been sent
        self._is_alone = False  # it was sent before all others
        self._num_sent = 0  # to the engine there is now

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    @property
    def has_sent(self) -> bool:
        """Whether the engine has something to do."""
        return bool(self._sent)

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
        """They are wanted no longer. Returns the names of those that the engine knows of."""
        names = []
        for request_id in request_ids:
            record = self._requests.pop(request_id, None)
            if record is not None:
                names += self._take_back(record)
                self._clear(record)
        return names

    def pause(self, request_ids: Iterable[str]) -> list[str]:
        """They get no more tokens until `unpause`. Returns the names of those that the engine has to forget: not of
        those that are under a cloud, which only their next token takes away."""
        names = []
        for request_id in request_ids:
            record = self._requests.get(request_id)
            if record is not None and record.output_token_ids and not record.num_deaths:
                record.is_paused = True
                record.num_pauses += 1
                names += self._take_back(record)
        return names

    def unpause(self, request_ids: Iterable[str]) -> None:
        """They go on where they were."""
        for request_id in request_ids:
            record = self._requests.get(request_id)
            if record is not None and record.is_paused:
                record.is_paused = False
                self._returning.append(record)

    def record(self, step: StepOutputs) -> None:
        """Notes what a step brought, before anyone is told, and calls everyone by their own names again."""
        sent = self._sent
        for output in step.outputs:
            record = sent.get(output.request_id)
            if record is None:
                output.request_id = ""  # it is wanted no longer, or has been paused and says this once more
                continue
            output.request_id = record.request.request_id
            record.output_token_ids += output.token_ids
            if record.num_deaths and output.token_ids:
                self._clear(record)
            if output.finish_reason is not None:
                self.forget((output.request_id,))

    def take_unsent(self) -> Iterator[EngineRequest]:
        """What the engine should be sent now; counts as sent when it is taken. At most one suspect is among it."""
        for record in self._choose():
            is_wanted = record.request.request_id in self._requests and not record.is_paused
            if is_wanted and record.engine_id is None:  # one that was paused and unpaused at once stands here twice
                self._num_sent += 1
                record.was_sent = True
                request = record.resume()
                record.engine_id = request.request_id
                self._sent[request.request_id] = record
                yield request

    @property
    def has_unsent(self) -> bool:
        """Whether `take_unsent` may have something."""
        return bool(self._new or self._returning or self._suspects)

    @property
    def num_held(self) -> int:
        """Those that wait here for their turn: they count as waiting, though the engine has not heard of them."""
        unsent = (*self._new, *self._returning, *self._suspects)
        names = {record.request.request_id for record in unsent if record.engine_id is None and not record.is_paused}
        return len(names & self._requests.keys())

    def engine_died(self, executing: Collection[str], *, for_certain: bool) -> list[str]:
        """All are unsent again. `executing` are the names of those in the step in progress, some of which may have been
        aborted meanwhile; `for_certain`: the engine died by itself, of that step, or between two of them over any it
        was sent.

        Returns those convicted: they are in flight no longer.
        """
        num_present = len(executing)
        if for_certain and not executing:
            executing, num_present = list(self._sent), self._num_sent
        present = [self._sent[name] for name in executing if name in self._sent]
        for record in present:
            record.num_deaths += 1
            self._clouded.add(record.request.request_id)
        convicted = []
        is_alone = len(present) == num_present == 1
        if is_alone:
            alone = present[0]
            alone.num_deaths_alone += 1
            if alone.is_suspected and (for_certain or alone.num_deaths_alone >= _CONVICTED_AFTER):
                convicted.append(alone.request.request_id)
        next_on_trial = self._on_trial if self._on_trial in present and not is_alone else None
        self.forget(convicted)
        self._start_over(next_on_trial)
        return convicted

    def _choose(self) -> list[InFlightRequest]:
        """Whose turn it is, in the order of the module's docstring; some of them may have left."""
        if not self._num_sent and self._try_next():
            assert self._on_trial is not None
            self._is_alone = True
            return [self._on_trial]
        if self._is_alone:
            return []
        returning, self._returning = self._returning, []
        num_suspects = len(self._suspects) + (self._on_trial is not None)
        if num_suspects:
            if len(self._clouded) > num_suspects:
                return returning
            return [*returning, self._on_trial] if self._try_next() and self._on_trial is not None else returning
        new, self._new = self._new, []
        return returning + new

    def _try_next(self) -> bool:
        """Puts the next suspect on trial, if there is one and nobody is."""
        if self._on_trial is not None or not self._suspects:
            return False
        self._on_trial = self._suspects.popleft()
        return True

    def _start_over(self, next_on_trial: InFlightRequest | None) -> None:
        """`next_on_trial` comes first; a suspect that was not waiting for its trial, because it had it, comes last."""
        suspects = deque(record for record in self._suspects if record is not next_on_trial)
        waiting = set(map(id, suspects))
        if next_on_trial is not None:
            suspects.appendleft(next_on_trial)
            waiting.add(id(next_on_trial))
        self._on_trial, self._is_alone, self._num_sent = None, False, 0
        self._new, self._returning = [], []
        others = []
        self._sent.clear()
        for record in self._requests.values():
            record.engine_id = None
            if record.is_paused:
                continue
            if not record.is_suspected:
                (self._returning if record.was_sent else self._new).append(record)
            elif id(record) not in waiting:
                others.append(record)
        others.sort(
            key=lambda record: bool(record.output_token_ids)
        )  # who has run well before is the likelier innocent
        suspects.extend(others)
        self._suspects = suspects

    def _take_back(self, record: InFlightRequest) -> list[str]:
        """Its name in the engine, if it has one; from now on nothing that comes under that name is listened to."""
        name, record.engine_id = record.engine_id, None
        if name is None:
            return []
        del self._sent[name]
        return [name]

    def _clear(self, record: InFlightRequest) -> None:
        """It is above suspicion, or gone."""
        record.num_deaths = record.num_deaths_alone = 0
        self._clouded.discard(record.request.request_id)
        if record in self._suspects:
            self._suspects.remove(record)
        if record is self._on_trial:
            self._on_trial = None
            self._is_alone = False
