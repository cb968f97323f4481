"""Where engine processes come from: started when one is wanted, or kept ready. Knows no model and no message.

Most of the time an engine takes to be replaced goes into its imports. An engine is told on its standard input what to
do, so a *standby* is an engine's process that has made its imports and has not been told yet: it waits in a read, and
that read ends, and with it the process, when the server is gone, however it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence

from llmserve.engine.flight_recorder import FlightRecorder, make_recorder_fd
from llmserve.pause import pause
from llmserve.threads import engine_threads, require_threads, standby_threads

logger = logging.getLogger(__name__)

# -P: the current directory is its owner's, and none of its files is a module of ours
ENGINE_COMMAND = (sys.executable, "-P", "-m", "llmserve.engine.process")
STANDBY_COMMAND = (sys.executable, "-P", "-m", "llmserve.engine.standby_process")

# While weights are read, torch's threads meet some thousand times, and spin until the last is there, unless told not
# to. On a busy machine each meeting then takes as long as it takes to get all cores at once: a model that is read in
# half a second took 25 to 50 s, and 0.9 s where its threads wait asleep.
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "passive"}
_MAX_BACKOFF_S = 60.0  # between two standbys that ended by themselves


class EngineProcess:
    """A process that waits for its EngineLaunch, and the memory it will note its steps in."""

    def __init__(self, process: asyncio.subprocess.Process, recorder: FlightRecorder, recorder_fd: int) -> None:
        self.process = process
        self.recorder = recorder
        self.recorder_fd = recorder_fd  # the number of the descriptor over there

    def tell(self, launch: bytes) -> None:
        """What it is to do; never blocks."""
        assert self.process.stdin is not None
        self.process.stdin.write(launch)
        self.process.stdin.close()

    async def end(self) -> None:
        """Kills it; nothing of it is left then."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                self.process.kill()
        await self.process.wait()
        self.recorder.close()


async def start_process(command: Sequence[str]) -> EngineProcess:
    """Raises OSError if there is no process, descriptor or memory to be had."""
    recorder_fd = make_recorder_fd()
    try:
        recorder = FlightRecorder(recorder_fd)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(recorder_fd,),
                start_new_session=True,  # Ctrl-C does not reach it: the server says when to end
                env=PASSIVE_WAITING | os.environ,
            )
        except BaseException:
            recorder.close()
            raise
    finally:
        os.close(recorder_fd)
    return EngineProcess(process, recorder, recorder_fd)


class EngineProcesses:
    """All engines of a server are started here; at most one standby serves all of them."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND, standby_command: Sequence[str] | None = None) -> None:
        """Without `standby_command` every process is started when it is wanted."""
        self._command = command
        self._standby_command = standby_command
        self._standby: EngineProcess | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def standby_pid(self) -> int | None:
        """The process that waits now."""
        return self._standby.process.pid if self._standby is not None else None

    async def take(self, num_threads: int | None = None, device: str = "auto") -> EngineProcess:
        """A process that nobody has told anything yet, to compute on `num_threads` (None: one a core) and `device`, as
        in EngineConfig: the standby, or a new one.

        A standby that is still importing is taken too: it is ahead of a new one. Raises OSError.
        """
        is_standby: bool | None = None
        while is_standby is not (self._standby is not None):  # it may have come or gone while threads were asked for
            is_standby = self._standby is not None
            num_needed = engine_threads(num_threads, device=device, is_standby=is_standby)
            await asyncio.to_thread(require_threads, num_needed, "An engine")
        standby, self._standby = self._standby, None
        if standby is None:
            return await start_process(self._command)
        assert self._keeping is not None
        self._keeping.cancel()
        if standby.process.returncode is not None:
            await standby.end()
            return await start_process(self._command)
        logger.info("The standby (process %d) becomes an engine", standby.process.pid)
        return standby

    def prepare(self, *, is_awaited: bool = False) -> None:
        """Starts a standby in the background, unless there is one. To be called when an engine has got ready, or while
        none is started: two processes that import at the same time would hold each other up.

        `is_awaited`: there is no engine, and there will be one only when this has its imports; so it gives way to
        nobody.
        """
        if self._standby_command is None or self._standby is not None:
            return
        if self._keeping is None or self._keeping.done() or self._keeping.cancelling():
            command = self._command if is_awaited else self._standby_command
            self._keeping = asyncio.create_task(self._keep(command), name="keep a standby engine")

    async def close(self) -> None:
        """Ends the standby. Safe to call twice."""
        self._standby_command = None
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        standby, self._standby = self._standby, None
        if standby is not None:
            await standby.end()

    async def _keep(self, command: Sequence[str]) -> None:
        """Replaces the standby whenever it dies, after pauses that double. Cancelled when it is taken."""
        pause_s = 0.5
        while True:
            try:
                await asyncio.to_thread(require_threads, standby_threads(), "A standby engine")
                self._standby = await start_process(command)
                status = await self._standby.process.wait()
                standby, self._standby = self._standby, None
                await standby.end()
                reason = f"it ended with status {status}"
            except OSError as error:
                reason = str(error).rstrip(".")
            logger.warning("There is no standby engine: %s. Another is started in %.1f s", reason, pause_s)
            await pause(pause_s)
            pause_s = min(2 * pause_s, _MAX_BACKOFF_S)
