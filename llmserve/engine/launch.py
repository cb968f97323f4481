"""What an engine process is told at start. Both sides import this; it imports nothing heavy."""

from __future__ import annotations

import signal

import msgspec

from llmserve.config import EngineConfig

HEARTBEAT_S = 1.0  # an idle engine says this often that it is alive
FAILED_STATUS = 1  # exit status of an engine that has said why: its last message is an EngineFailed
OUT_OF_MEMORY_STATUS = 3  # of one that has said that there was no memory to be had
PROCESS_NAME = "llmserve-engine"  # from the moment it is told; the kernel keeps 15 characters

_CRASHES = {-s for s in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)}


def died_of_its_step(status: int) -> bool:
    """Whether an exit status (below 0: the signal) can only mean that the engine ended by what it was doing. Others can
    take the memory, send a signal, or hold the whole machine up."""
    return (status > 0 and status != OUT_OF_MEMORY_STATUS) or status in _CRASHES


def was_ended_from_outside(status: int | None) -> bool:
    """Whether an exit status (None: there was no process) means that somebody ended the engine, or asked it to."""
    return status is not None and status <= 0 and status not in _CRASHES


class EngineLaunch(msgspec.Struct):
    """JSON on the engine's standard input. The addresses are ZMQ endpoints the server has bound."""

    config: EngineConfig
    in_address: str
    out_address: str
    server_pid: int  # when this is no longer its parent, the engine ends
    recorder_fd: int  # inherited: the memory of its FlightRecorder
    log_level: str = "info"
