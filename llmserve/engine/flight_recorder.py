"""What an engine was doing when it died: the requests of the step in progress, in memory that outlives it.

A message would not do: what a process has not yet written to its socket dies with it. The memory is anonymous and
shared, so a step costs one copy of some ids, and nothing is left behind whoever ends. Knows no process and no socket.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterable
from itertools import chain

from llmserve.engine.core import Runner
from llmserve.engine.overlap import LaunchedStep, LaunchingRunner
from llmserve.scheduler.output import SchedulerOutput
from llmserve.worker.output import ModelRunnerOutput

_SIZE = 1 << 20  # bytes; the kernel provides only those that are written to
_HEADER = struct.Struct("<I")  # length of the ids that follow, joined by newlines; 0 between two steps


def make_recorder_fd() -> int:
    """The descriptor of memory for a recorder, to be inherited by the engine. Raises OSError."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("llmserve-flight-recorder")
    else:  # not on Linux: an unlinked file
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, _SIZE)
    return fd


class FlightRecorder:
    """Both sides map the same memory: the engine writes, the server reads once the engine is dead."""

    def __init__(self, fd: int) -> None:
        """`fd` from `make_recorder_fd`; the caller goes on owning it. Raises OSError."""
        self._memory = mmap.mmap(fd, _SIZE)

    def begin(self, request_ids: Iterable[str]) -> None:
        """A step with these requests begins."""
        ids = "\n".join(request_ids).encode()[: _SIZE - _HEADER.size]
        self._memory[_HEADER.size : _HEADER.size + len(ids)] = ids
        _HEADER.pack_into(self._memory, 0, len(ids))

    def end(self) -> None:
        """The step is over."""
        _HEADER.pack_into(self._memory, 0, 0)

    def executing(self) -> list[str]:
        """The requests of the step in progress; none between two steps."""
        (length,) = _HEADER.unpack_from(self._memory)
        ids = self._memory[_HEADER.size : _HEADER.size + length]
        return ids.decode(errors="replace").split("\n") if ids else []

    def close(self) -> None:
        """Unmaps the memory."""
        self._memory.close()


class RecordedRunner:
    """A runner whose steps are noted. A step that raises stays noted: it is the engine's last."""

    def __init__(self, runner: Runner, recorder: FlightRecorder) -> None:
        self._runner = runner
        self._recorder = recorder

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One step of the runner."""
        self._recorder.begin(output.num_scheduled_tokens)
        computed = self._runner.execute(output)
        self._recorder.end()
        return computed


class RecordedLauncher(RecordedRunner):
    """A runner whose steps overlap. All that are on their way are noted: which of them ended the engine, nobody
    knows."""

    def __init__(self, runner: LaunchingRunner, recorder: FlightRecorder) -> None:
        super().__init__(runner, recorder)
        self._launcher = runner
        self._on_their_way: list[list[str]] = []

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """One step of the runner, noted until its result is taken."""
        if not output.num_scheduled_tokens:
            return self._launcher.launch(output)
        self._on_their_way.append(list(output.num_scheduled_tokens))
        self._note()
        return _RecordedStep(self._launcher.launch(output), self)

    def ended(self) -> None:
        """The oldest step on its way is over."""
        del self._on_their_way[0]
        self._note()

    def _note(self) -> None:
        self._recorder.begin(dict.fromkeys(chain.from_iterable(self._on_their_way)))


class _RecordedStep:
    """A launched step that says when it is over."""

    def __init__(self, step: LaunchedStep, launcher: RecordedLauncher) -> None:
        self._step = step
        self._launcher = launcher

    @property
    def holds_up_next(self) -> bool:
        return self._step.holds_up_next

    def result(self) -> ModelRunnerOutput:
        """Of the step."""
        computed = self._step.result()
        self._launcher.ended()
        return computed
