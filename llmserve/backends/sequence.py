"""A request in flight, as the server process sees it: one SequenceState for each answer, gathered in a Generation.

Turns the engine's token ids into whole characters, watches for stop strings, keeps the times. Owns no engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import msgspec

from llmserve.backends.admission import Admission, AdmissionLimits, Ticket
from llmserve.backends.generation import GenerationDelta, GenerationSpec
from llmserve.detokenizer import IncrementalDetokenizer
from llmserve.errors import DeadlineExceededError, EngineDeadError, InvalidRequestError, LLMServeError
from llmserve.messages import FinishReason, SamplingParams, SequenceOutput
from llmserve.metrics import ModelMetrics
from llmserve.request_context import RequestContext
from llmserve.stop_strings import StopStringMatcher
from llmserve.tokenizer import Tokenizer

MAX_UNREAD = 512  # deltas of one sequence that nobody takes: beyond them a full socket holds up the engine too


class Owner(Protocol):
    """The model a generation belongs to."""

    tokenizer: Tokenizer
    metrics: ModelMetrics

    def finish(self, sequences: list[SequenceState], abort: bool) -> None: ...

    def pause(self, sequences: list[SequenceState]) -> None: ...

    def unpause(self, sequences: list[SequenceState]) -> None: ...


@dataclasses.dataclass(slots=True)
class Timing:
    """Seconds of time.monotonic(); 0 is not yet."""

    arrival_s: float
    first_scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


class SequenceState:
    """One of the `n` answers to a prompt."""

    def __init__(
        self, generation: LLMGeneration, index: int, params: SamplingParams, arrival_s: float, ticket: Ticket
    ) -> None:
        spec, tokenizer = generation.spec, generation.owner.tokenizer
        self.generation = generation
        self.index = index
        self.id = generation.request_id if spec.n == 1 else f"{generation.request_id}-{index}"
        self.params = params
        self.timing = Timing(arrival_s)
        self._ticket = ticket
        ticket.fail = generation.fail
        self.finished = False
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self._detokenizer: IncrementalDetokenizer = tokenizer.detokenizer(
            skip_special_tokens=spec.skip_special_tokens, prompt_token_ids=spec.prompt_token_ids
        )
        self._stop = StopStringMatcher(spec.stop, spec.include_stop_str_in_output) if spec.stop else None
        self._early = ""  # the end of what was shown before `min_tokens`
        self._num_shown = 0  # characters of it that the matcher has still to give back
        self._metrics = generation.owner.metrics

    def receive(self, output: SequenceOutput, now: float) -> None:
        """Takes in what a step brought; hands the news to the generation."""
        if output.error is not None:
            self.generation.fail(_error_of(output.error))
            return
        self._observe(output, now)
        for part in (output,) if self._stop is None else _single_tokens(output):
            self._take(part, now)
            if self.finished:
                break  # a stop string was complete: what the engine sampled behind it was never said

    def _take(self, output: SequenceOutput, now: float) -> None:
        self.num_tokens += len(output.token_ids)
        reason, stop_reason = output.finish_reason, None
        shown = output.token_ids
        if output.stop_token_id is not None:
            # as vLLM does: the token that ends a sequence is no part of its text, unless asked for
            if not self.generation.spec.include_stop_str_in_output:
                shown = shown[:-1]
            spec, ends = self.generation.spec, self.generation.owner.tokenizer.eos_token_ids
            if spec.ignore_eos or output.stop_token_id not in ends:
                stop_reason = output.stop_token_id
        text = self._detokenizer.push(shown)
        if reason is not None:
            text += self._detokenizer.flush()
        matched = None
        if self._stop is not None:
            text, matched = self._match_stop(text, reason is not None)
        delta = GenerationDelta(
            index=self.index,
            text=text,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=FinishReason.STOP if matched is not None else reason,
            stop_reason=matched if matched is not None else stop_reason,
            num_cached_tokens=self.num_cached_tokens,
        )
        if delta.finish_reason is not None:
            self.finish(delta.finish_reason, now, abort=reason is None)
        self.generation.push(delta)

    def finish(self, reason: FinishReason, now: float, abort: bool) -> None:
        """Ends the sequence, once; `abort` if the engine does not know yet."""
        if self.finished:
            return
        self.finished = True
        self.generation.owner.finish([self], abort)
        self._close(reason, now)
        timing, started = self.timing, self.num_tokens > 0
        self._metrics.observe_request_finished(
            reason=reason,
            prompt_tokens=len(self.generation.spec.prompt_token_ids),
            generation_tokens=self.num_tokens,
            cached_tokens=self.num_cached_tokens,
            e2e_s=now - timing.arrival_s,
            queue_s=timing.first_scheduled_s - timing.arrival_s if started else None,
            prefill_s=timing.first_token_s - timing.first_scheduled_s if started else None,
            decode_s=timing.last_token_s - timing.first_token_s if started else None,
            num_preemptions=self.num_preemptions,
        )

    def _close(self, reason: FinishReason, now: float) -> None:
        """Writes down what became of it: in the queue's books, and for whoever asked."""
        num_prompt_tokens = len(self.generation.spec.prompt_token_ids)
        self._ticket.end(num_prompt_tokens if self.num_tokens else 0, self.num_tokens, now)
        context, timing = self.generation.context, self.timing
        context.completion_id = self.generation.request_id
        context.num_sequences += 1
        context.prompt_tokens += num_prompt_tokens
        context.cached_tokens += self.num_cached_tokens
        context.generation_tokens += self.num_tokens
        context.num_preemptions += self.num_preemptions
        context.finish_reason = reason.value
        context.num_restarts = self._metrics.engine_restarts - self.generation.num_restarts_before
        if self.num_tokens:
            context.queue_s = max(timing.first_scheduled_s - timing.arrival_s, context.queue_s or 0.0)
            context.prefill_s = max(timing.first_token_s - timing.first_scheduled_s, context.prefill_s or 0.0)
            context.decode_s = max(timing.last_token_s - timing.first_token_s, context.decode_s or 0.0)

    def _match_stop(self, text: str, last: bool) -> tuple[str, str | None]:
        assert self._stop is not None
        if self.num_tokens < self.params.min_tokens:
            # shown at once; but a stop string may begin in it and be complete only later
            self._early = (self._early + text)[-max(map(len, self.generation.spec.stop)) + 1 :]
            return text, None
        if self._early:
            text, self._num_shown, self._early = self._early + text, len(self._early), ""
        text, matched = self._stop.push(text)
        if last and matched is None:
            text += self._stop.flush()
        num_shown = min(self._num_shown, len(text))
        self._num_shown -= num_shown
        return text[num_shown:], matched

    def _observe(self, output: SequenceOutput, now: float) -> None:
        timing = self.timing
        if not output.token_ids:
            return
        if not timing.first_token_s:
            timing.first_token_s = now
            timing.first_scheduled_s = output.first_scheduled_s
            self.num_cached_tokens = output.num_cached_tokens
            self._ticket.start(now)
            self._metrics.observe_first_token(now - timing.arrival_s)
        else:
            num_tokens = len(output.token_ids)  # several came at once: each counts as having taken its share
            self._metrics.observe_inter_token((now - timing.last_token_s) / num_tokens, num_tokens)
        timing.last_token_s = now
        self.num_preemptions = output.num_preemptions


class LLMGeneration:
    """Implements `Generation`: deltas are collected as they come and handed over all at once."""

    def __init__(
        self,
        request_id: str,
        spec: GenerationSpec,
        owner: Owner,
        arrival_s: float,
        context: RequestContext | None = None,
        tickets: Sequence[Ticket] = (),
    ) -> None:
        """`tickets`: one for each of the `spec.n` sequences; without any, they stand in books of their own."""
        self.request_id = request_id
        self.spec = spec
        self.owner = owner
        self.context = context or RequestContext()
        self.num_restarts_before = owner.metrics.engine_restarts
        tickets = tickets or Admission(AdmissionLimits()).admit(spec, self.context, arrival_s)
        self.sequences = [
            SequenceState(self, index, _params_of(spec.sampling, index), arrival_s, ticket)
            for index, ticket in enumerate(tickets)
        ]
        self._pause_at = MAX_UNREAD * spec.n  # unread deltas
        self._paused: list[SequenceState] = []
        self._num_running = spec.n
        self._ready: list[GenerationDelta] = []
        self._wakeup: asyncio.Future[None] | None = None
        self._error: LLMServeError | None = None
        self._timer: asyncio.TimerHandle | None = None

    def watch_deadline(self) -> None:
        """Ends the generation at its deadline, if it has one, by our own clock."""
        if self.spec.deadline_s is not None:
            delay_s = self.spec.deadline_s - time.monotonic()
            error = DeadlineExceededError("The request was not answered by its deadline.")
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.fail, error)

    def push(self, delta: GenerationDelta) -> None:
        """News of a sequence; wakes whoever waits for it."""
        self._ready.append(delta)
        if delta.finish_reason is not None:
            self._num_running -= 1
        if len(self._ready) >= self._pause_at:
            self._pause()
        self._wake()

    def fail(self, error: LLMServeError) -> None:
        """The whole request cannot go on; what was ready is still delivered first. Too late if it has ended."""
        if not self._num_running:
            return
        self._error = error
        self._end(FinishReason.ERROR)
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end(FinishReason.ABORT)
        if self._timer is not None:
            self._timer.cancel()
        # both lead back here: without them the request, and its model, are gone as soon as nobody needs them
        self.sequences.clear()
        self._paused.clear()
        self._error = None

    async def __aiter__(self) -> AsyncIterator[list[GenerationDelta]]:
        while True:
            if self._ready:
                ready, self._ready = self._ready, []
                if self._paused:
                    self._unpause()
                yield ready
            elif self._error is not None:
                raise self._error
            elif not self._num_running:
                return
            else:
                self._wakeup = asyncio.get_running_loop().create_future()
                await self._wakeup

    def _pause(self) -> None:
        """The client is behind: it gets no more until it has taken what there is. Those that the engine does not let
        go of yet are asked for again."""
        self._pause_at += MAX_UNREAD * self.spec.n
        self._paused = [sequence for sequence in self.sequences if not sequence.finished]
        self.owner.pause(self._paused)

    def _unpause(self) -> None:
        self._pause_at = MAX_UNREAD * self.spec.n
        paused, self._paused = self._paused, []
        self.owner.unpause(paused)

    def _end(self, reason: FinishReason) -> None:
        now = time.monotonic()
        for sequence in self.sequences:
            sequence.finish(reason, now, abort=True)

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)


def _params_of(params: SamplingParams, index: int) -> SamplingParams:
    """Sequence 0 keeps the request's seed; the others' follow from it (an odd stride visits all 2^63 seeds)."""
    if index == 0:
        return params
    return msgspec.structs.replace(params, seed=(params.seed + index * 0x9E3779B97F4A7C15) % 2**63)


def _single_tokens(output: SequenceOutput) -> Iterator[SequenceOutput]:
    """The same news, a token at a time: what ended the sequence comes with the last."""
    last = len(output.token_ids) - 1
    if last < 1:
        yield output
        return
    for index, token_id in enumerate(output.token_ids):
        yield SequenceOutput(
            output.request_id,
            [token_id],
            output.finish_reason if index == last else None,
            output.stop_token_id if index == last else None,
            logprobs=None if output.logprobs is None else [output.logprobs[index]],
            prompt_logprobs=output.prompt_logprobs if index == 0 else None,
        )


def _error_of(error: tuple[str, str]) -> LLMServeError:
    code, message = error
    for kind in (InvalidRequestError, DeadlineExceededError):
        if kind.code == code:
            return kind(message)
    return EngineDeadError(message)
