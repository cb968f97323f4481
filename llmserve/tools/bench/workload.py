"""What a load is made of: lengths, arrival times, and the requests of a run. Knows no server and no clock."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from llmserve.errors import ConfigError


class LengthDistribution(Protocol):
    """Draws a number of tokens, at least 1."""

    def sample(self, rng: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    length: int

    def sample(self, rng: random.Random) -> int:
        return self.length


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every whole number from `low` to `high`, both included, alike."""

    low: int
    high: int

    def sample(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Normal:
    """Rounded, and clipped to `low`..`high`."""

    mean: float
    std: float
    low: int
    high: float

    def sample(self, rng: random.Random) -> int:
        return _clip(rng.gauss(self.mean, self.std), self.low, self.high)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """`mean` and `std` are those of the lengths themselves, not of their logarithms. Rounded and clipped."""

    mean: float
    std: float
    low: int
    high: float

    def sample(self, rng: random.Random) -> int:
        variance = math.log1p((self.std / self.mean) ** 2)
        return _clip(rng.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance)), self.low, self.high)


def _clip(value: float, low: int, high: float) -> int:
    return int(min(max(round(value), low), high))


LENGTH_FORMS = "128, 64:192 (uniform), normal:MEAN,STD[,MIN,MAX] or lognormal:MEAN,STD[,MIN,MAX]"


def parse_lengths(text: str, flag: str) -> LengthDistribution:
    """Reads a distribution of lengths. Raises ConfigError, naming `flag`."""
    name, separator, arguments = text.partition(":")
    try:
        if not separator:
            return _checked_fixed(int(text))
        if name in ("normal", "lognormal"):
            numbers = [float(part) for part in arguments.split(",")]
            if len(numbers) not in (2, 4):
                raise ValueError("it takes MEAN,STD or MEAN,STD,MIN,MAX")
            return _checked_bell(name, numbers)
        low, high = int(name), int(arguments)
        if not 1 <= low <= high:
            raise ValueError("it takes 1 <= LOW <= HIGH")
        return Uniform(low, high)
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r} is not a length ({error}): use {LENGTH_FORMS}.") from None


def _checked_fixed(length: int) -> Fixed:
    if length < 1:
        raise ValueError("it must be at least 1")
    return Fixed(length)


def _checked_bell(name: str, numbers: list[float]) -> Normal | LogNormal:
    mean, std = numbers[:2]
    low, high = (int(numbers[2]), numbers[3]) if len(numbers) == 4 else (1, math.inf)
    if not all(math.isfinite(number) for number in numbers) or mean <= 0 or std < 0 or not 1 <= low <= high:
        raise ValueError("it takes MEAN > 0, STD >= 0 and 1 <= MIN <= MAX")
    return Normal(mean, std, low, high) if name == "normal" else LogNormal(mean, std, low, high)


def arrival_times(rate: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    """Yields the seconds after the start at which requests of an open loop are sent, without end.

    The gaps have a gamma distribution of mean `1 / rate` and shape `burstiness`: 1 is a Poisson process, less comes in
    bursts, more is more regular, infinity is a metronome. The first request is sent at 0.
    """
    time_s = 0.0
    while True:
        yield time_s
        time_s += 1 / rate if math.isinf(burstiness) else rng.gammavariate(burstiness, 1 / (rate * burstiness))


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a load, its body ready to send."""

    body: bytes
    prompt_len: int  # tokens aimed at; what the server counted is in the record
    output_len: int  # tokens asked for at most
