"""The words that cross rooms and the process border of an engine. Plain data: no behaviour, no tensors.

Everything sent between the server process and an engine process is a tagged `msgspec.Struct` in MessagePack.
Times are seconds of `time.monotonic()`, which on one machine is the same clock in every process.
"""

from __future__ import annotations

import enum

import msgspec


class FinishReason(enum.StrEnum):
    """Why a request ended. The values are OpenAI's words where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one sequence are chosen. Resolved: no field means "ask the model" any more.

    `seed` is always set (the server draws one where the client gave none), so that a request recomputed after a
    preemption or a crash says the same thing. `stop_token_ids` holds every id that ends the sequence, the model's own
    end tokens included unless the client asked to ignore them; until `min_tokens` are generated they are masked.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[list[int]] | None = None  # token sequences that must not appear
    stop_token_ids: list[int] = []
    logprobs: int | None = None  # alternatives to report beside the chosen token; 0: the chosen one only
    prompt_logprobs: int | None = None


class EngineRequest(msgspec.Struct, tag="add", kw_only=True, omit_defaults=True):
    """One sequence to generate. `n > 1` is several of these: their prompts meet in the prefix cache.

    `output_token_ids` are what an earlier engine has generated of it, and the client has been told: it goes on behind
    them as if they had been generated here, positions, penalties and limits included.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    priority: int = 0  # lower runs first
    tenant: str = ""  # whose it is, and that tenant's part of the tokens: for the policy `fair`
    weight: float = 1.0
    cache_salt: str = ""  # requests share cached blocks only within one salt
    output_token_ids: list[int] = []
    deadline_s: float | None = None  # when the answer is no longer wanted


class AbortRequests(msgspec.Struct, tag="abort"):
    """The named requests are wanted no longer. Unknown ids are ignored: they have just finished."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Finish what is in flight (`drain`) or drop it, then exit."""

    drain: bool = True


ToEngine = EngineRequest | AbortRequests | Shutdown


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position, of the model's raw distribution (before temperature, penalties and filters).

    `top` is sorted, most likely first, and holds (token id, log-probability); the chosen token need not be in it.
    """

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: list[tuple[int, float]]


class SequenceOutput(msgspec.Struct, array_like=True):
    """What one step brought to one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the member of `stop_token_ids` that ended the sequence
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first token; entry 0 is None
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache when the request was first scheduled
    first_scheduled_s: float = 0.0  # sent with the first token
    num_preemptions: int = 0
    error: tuple[str, str] | None = None  # (code, message) of an error in `errors.py`, with FinishReason.ERROR


class EngineStats(msgspec.Struct, array_like=True):
    """The engine's gauges after a step, and what this step did."""

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    num_step_tokens: int = 0  # tokens computed in this step
    num_prompt_tokens: int = 0  # of them, tokens of prompts
    num_preemptions: int = 0  # in this step
    prefix_cache_queries: int = 0  # tokens looked up in this step
    prefix_cache_hits: int = 0  # tokens found in this step
    num_drafts: int = 0  # sequences that had draft tokens verified in this step
    num_draft_tokens: int = 0  # draft tokens computed in this step
    num_accepted_tokens: int = 0  # of them, those that came true
    host_cache_hits: int = 0  # tokens restored from the host's memory in this step, after a preemption too


class StepOutputs(msgspec.Struct, tag="step"):
    """The one message of a step: the tokens of all requests. `time_s` is when the step ended."""

    step: int
    time_s: float
    outputs: list[SequenceOutput]
    stats: EngineStats


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """Sent by the loop's own thread when it falls idle and while it is: a hung loop sends none."""

    stats: EngineStats


class LoadProgress(msgspec.Struct, tag="progress"):
    """How far loading is, for a progress bar."""

    stage: str
    done: int
    total: int


class MemoryPlan(msgspec.Struct, tag="plan", kw_only=True):
    """What a model will occupy on its device: worked out, and said, before anything is loaded."""

    device: str
    dtype: str
    weight_format: str
    weight_bytes: int
    activation_bytes: int
    kv_cache_bytes: int
    kv_cache_dtype: str = ""  # of keys and values; "": as `dtype`
    available_bytes: int  # free on the device, as far as this model may take it
    block_size: int
    num_blocks: int
    num_tokens: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_host_blocks: int = 0  # that the host's memory keeps beside those of the device
    graph_bytes: int = 0  # of CUDA graphs: measured, so not known before the weights are loaded
    vocab_size: int  # rows of the embedding: ids at or above it do not exist, whatever the tokenizer says


class EngineReady(msgspec.Struct, tag="ready"):
    """The engine takes requests."""

    plan: MemoryPlan


class EngineFailed(msgspec.Struct, tag="failed"):
    """The engine cannot go on; the process ends after this. `code` is that of the error in `errors.py`."""

    code: str
    message: str


FromEngine = StepOutputs | Heartbeat | LoadProgress | MemoryPlan | EngineReady | EngineFailed
