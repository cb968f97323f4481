"""Who may do what: one answer for HTTP and gRPC. Knows neither."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable

from llmserve.api.scopes import ADMIN, ANY, OPEN
from llmserve.api_keys import ApiKeys
from llmserve.errors import ForbiddenError, RateLimitError, UnauthorizedError
from llmserve.request_context import EVERYONE, STRANGER, Tenant


class Gatekeeper:
    """With a file of keys, everything but the probes needs one. Without, only what changes the server is closed: to all
    but this machine."""

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys

    @property
    def keys(self) -> ApiKeys | None:
        """The keys in force; None where none are asked for."""
        return self._keys

    def admit(self, key: str | None, scope: str, is_local: Callable[[], bool]) -> Tenant:
        """Who asks. `is_local`: whether surely from this machine; asked only where that matters.

        Raises UnauthorizedError, ForbiddenError, RateLimitError.
        """
        if self._keys is None:
            if scope == ADMIN and not is_local():
                raise ForbiddenError(
                    "Without API keys, this is open to clients on the server's own machine only. "
                    "Start the server with --api-keys, and ask with a key that has the scope 'admin'."
                )
            return EVERYONE
        if scope == OPEN:
            return (self._keys.find(key) if key else None) or STRANGER
        if not key:
            raise UnauthorizedError("You did not provide an API key. Send it as 'Authorization: Bearer <key>'.")
        tenant = self._keys.find(key)
        if tenant is None:
            raise UnauthorizedError("The API key is not known here. Check it, or ask the operator for a new one.")
        if scope != ANY and scope not in tenant.scopes:
            tenant.usage.num_refused += 1
            raise ForbiddenError(f"The key {tenant.name!r} lacks the scope {scope!r}.")
        _count(tenant)
        return tenant


def _count(tenant: Tenant) -> None:
    """Raises RateLimitError."""
    requests, now_s = tenant.limits.requests, time.monotonic()
    if wait_s := requests.wait_s(1, now_s):
        tenant.usage.num_refused += 1
        raise RateLimitError(
            f"The key {tenant.name!r} has used its {requests.per_minute} requests a minute. "
            f"Try again in {wait_s:.1f} s.",
            wait_s,
        )
    requests.take(1, now_s)
    tenant.usage.num_requests += 1


def bearer_key(authorization: str, *alternatives: str) -> str | None:
    """The key in `Authorization: Bearer ...`, else the first of the other headers that has one (`x-api-key`)."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer" and value.strip():
        return value.strip()
    return next((other.strip() for other in alternatives if other.strip()), None)


def is_from_proxy(header: str) -> bool:
    """Whether a header (or a gRPC metadata key), in lower case, is one that proxies add."""
    return header.startswith(("forwarded", "x-forwarded-", "x-real-ip", "via", "x-envoy-"))


def is_loopback(host: str) -> bool:
    """Whether a host, maybe with a port, is this machine."""
    host = host.rpartition(":")[0] if host.count(":") == 1 or "]:" in host else host
    host = host.strip("[]").lower()
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
