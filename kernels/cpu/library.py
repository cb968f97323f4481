"""The built kernels as a ctypes library: argument types once, so that a call costs about a microsecond."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from llmserve.kernels.cpu.build import BuildError, build_library, host_isas

logger = logging.getLogger(__name__)

F32, BF16 = 0, 1  # dtypes of activations
PLAIN, PRE_NORM, POST_NORM = 0, 1, 2  # kinds of layer_norm
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3, "tanh": 4, "sigmoid": 5}
FORMATS = {"f32": 0, "bf16": 1, "int8": 2, "q8_0": 3, "q4_0": 4, "q4_1": 5}  # of packed weights, as in gemm.h


class WeightStruct(ctypes.Structure):
    """`Weight` of gemm.h."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("format", c_int),
    )


class KVCacheStruct(ctypes.Structure):
    """`KVCache` of kv_layout.h."""

    _fields_ = (
        ("data", c_void_p),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("dtype", c_int),
    )


class StepMetaStruct(ctypes.Structure):
    """`StepMeta` of kv_layout.h."""

    _fields_ = (
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("slot_mapping", c_void_p),
        ("positions", c_void_p),
        ("block_table_stride", c_int64),
        ("num_seqs", c_int64),
        ("num_tokens", c_int64),
    )


class Library:
    """The functions of one built library and the thread pool they run on. `close` ends the threads."""

    def __init__(self, path: Path, isa: str, num_threads: int) -> None:
        self.path = path
        self.isa = isa
        self.pool: int | None = None
        self._dll = ctypes.CDLL(str(path))
        p, i, f, n = c_void_p, c_int, c_float, c_int64
        create = self._function("llm_pool_create", p, i)
        self._destroy = self._function("llm_pool_destroy", None, p)
        self.rms_norm = self._function("llm_rms_norm", None, p, p, p, p, p, n, n, f, i)
        self.gate_and_mul = self._function("llm_gate_and_mul", None, p, p, p, n, n, i, i)
        self.layer_norm = self._function("llm_layer_norm", None, p, p, p, p, p, p, n, n, f, i, i)
        self.activate = self._function("llm_activate", None, p, p, n, n, i, i)
        self.segment_sum = self._function("llm_segment_sum", None, p, p, p, p, n, n, i, p)
        self.rotary_packed = self._function("llm_rotary_packed", None, p, p, p, p, n, n, n, i)
        self.packed_attention = self._function("llm_packed_attention", None, p, p, p, n, n, n, f, n, p, n, i, p)
        self.embedding = self._function("llm_embedding", n, p, n, p, n, n, p)
        self.rotary_and_cache = self._function("llm_rotary_and_cache", None, p, p, p, p, p, n, p, p, f, p)
        self.paged_attention = self._function("llm_paged_attention", None, p, p, p, p, n, f, n, f, p, p)
        self.linear = self._function("llm_linear", None, p, p, p, p, n, n, i, i)
        self.decoder = self._function("llm_decoder", None, p, p, n, p, p, p, p, i)
        self.sample = self._function("llm_sample", None, p, p, n, n, p, p, p, p, p, p, p)
        self.pool = create(num_threads)
        if not self.pool:
            raise MemoryError("no memory for the kernels' thread pool")
        self.num_threads: int = self._function("llm_pool_threads", i, p)(self.pool)
        if self.num_threads < num_threads:
            logger.warning(
                "The kernels run on %d threads instead of %d: the system gives no more. Raise the limit of this user's "
                "processes (ulimit -u), or the container's limit of pids.",
                *(self.num_threads, num_threads),
            )

    def _function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        function = getattr(self._dll, name)
        function.restype = result
        function.argtypes = arguments
        return function  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the pool's threads. The library may not be used again."""
        if self.pool:
            self._destroy(self.pool)
            self.pool = None

    def __del__(self) -> None:
        self.close()


def load_library(num_threads: int, isa: str | None = None) -> Library | None:
    """The kernels for `isa`, or for the best instruction set that the host has and the compiler knows.

    None, with a line in the log, if nothing can be built. An `isa` the host lacks is a ValueError; a compiler that
    cannot be started for want of processes is a BlockingIOError.
    """
    candidates = [known for known in host_isas() if isa in (None, known.name)]
    if not candidates:
        raise ValueError(f"This CPU does not run {isa!r}; it runs {[known.name for known in host_isas()]}.")
    for candidate in candidates:
        try:
            return Library(build_library(candidate), candidate.name, num_threads)
        except BlockingIOError:
            raise  # for want of a process: the next attempt may find one, and other kernels would mean other answers
        except (BuildError, OSError) as error:
            reason = str(error)
            logger.info("CPU kernels for %s cannot be built: %s", candidate.name, reason)
    logger.warning(
        "No native CPU kernels: the slower torch ops run instead, and int8 and GGUF weights are not available. "
        "Install a C compiler (gcc or clang) to change that. Reason: %s",
        reason.splitlines()[-1] if reason else "unknown",
    )
    return None
