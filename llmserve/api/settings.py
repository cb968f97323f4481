"""The bounds of the HTTP surface. Knows no flags: `serve.py` fills it in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """What one request may ask for, and how long a silent stream stays silent."""

    max_body_bytes: int = 32 * 2**20
    keep_alive_s: float = 15.0  # a stream with nothing to say sends an SSE comment this often
    resume_window_s: float = 0.0  # a stream waits this long for a lost client; 0: none does, and events have no ids
    max_n: int = 128
    max_prompts: int = 1024  # in one request to /v1/completions
    max_sequences: int = 1024  # prompts times n
    max_inputs: int = 2048  # of one request for embeddings, scores or labels
    max_messages: int = 4096
    max_stop_strings: int = 16
    max_stop_chars: int = 1024  # of one stop string or bad word: that much text may have to be held back
    max_logit_bias: int = 1024
    max_bad_words: int = 256
    max_stop_token_ids: int = 256
    inline_parse_bytes: int = 65536  # a larger body is validated in a thread
    inline_render_messages: int = 64  # a longer conversation is written by its template in a thread
    inline_tokenize_chars: int = 16384  # a longer text is tokenised in a thread, to keep other streams flowing
