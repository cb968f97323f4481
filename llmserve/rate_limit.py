"""Token buckets: how many requests and tokens a minute one tenant may ask for. Knows no tenant; is told the time."""

from __future__ import annotations

from dataclasses import dataclass

_MINUTE_S = 60.0


@dataclass(slots=True)
class TokenBucket:
    """Holds at most a minute's worth, and fills steadily. `per_minute` 0 is no limit. May be overdrawn by `give`."""

    per_minute: int = 0
    _level: float = 0.0
    _at_s: float | None = None

    def remaining(self, now_s: float) -> float:
        """What may be taken now."""
        if self._at_s is None:
            self._level, self._at_s = float(self.per_minute), now_s
        elapsed_s = max(now_s - self._at_s, 0.0)
        self._level = min(self._level + elapsed_s * self.per_minute / _MINUTE_S, float(self.per_minute))
        self._at_s = now_s
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` can be taken; 0 is now. More than the bucket holds waits for a full one."""
        if not self.per_minute:
            return 0.0
        missing = min(amount, float(self.per_minute)) - self.remaining(now_s)
        return max(missing * _MINUTE_S / self.per_minute, 0.0)

    def take(self, amount: float, now_s: float) -> None:
        """Takes `amount`, below zero if need be: then those to come wait for it."""
        if self.per_minute:
            self._level = self.remaining(now_s) - amount

    def give(self, amount: float, now_s: float) -> None:
        """Gives back what was taken and not used."""
        self.take(-amount, now_s)

    def full_in_s(self, now_s: float) -> float:
        """Seconds until it is full again."""
        return self.wait_s(float(self.per_minute), now_s)


class RateLimits:
    """The two buckets of a tenant."""

    __slots__ = ("requests", "tokens")

    def __init__(self, requests_per_minute: int = 0, tokens_per_minute: int = 0) -> None:
        self.requests = TokenBucket(requests_per_minute)
        self.tokens = TokenBucket(tokens_per_minute)

    def headers(self, now_s: float) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-*` as OpenAI writes them, for the buckets that have a limit."""
        headers: list[tuple[bytes, bytes]] = []
        if not (self.requests.per_minute or self.tokens.per_minute):
            return headers
        for name, bucket in ((b"requests", self.requests), (b"tokens", self.tokens)):
            if bucket.per_minute:
                remaining = max(int(bucket.remaining(now_s)), 0)
                headers += (
                    (b"x-ratelimit-limit-" + name, b"%d" % bucket.per_minute),
                    (b"x-ratelimit-remaining-" + name, b"%d" % remaining),
                    (b"x-ratelimit-reset-" + name, _duration(bucket.full_in_s(now_s))),
                )
        return headers


def _duration(seconds: float) -> bytes:
    """`6m0s`, `1.5s` or `12ms`, as OpenAI writes it."""
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    minutes, rest = divmod(seconds, 60)
    text = f"{rest:.3f}".rstrip("0").rstrip(".")
    return (f"{int(minutes)}m{text}s" if minutes else f"{text}s").encode()
