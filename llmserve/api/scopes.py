"""Which scope a route needs. What is not listed needs `admin`: a route that is added later is closed until it is named.

Knows no key and no request.
"""

from __future__ import annotations

from functools import lru_cache

OPEN = "open"  # anyone: whether the server lives, and whether it is ready. Orchestrators carry no keys
ANY = "any"  # whoever has a key
INFER, METRICS, ADMIN = "infer", "metrics", "admin"

_EXACT = {
    **dict.fromkeys(("/health", "/ready", "/v2/health/live", "/v2/health/ready"), OPEN),
    **dict.fromkeys(("/", "/docs", "/openapi.json", "/version", "/v1/models"), ANY),
    **dict.fromkeys(("/v2", "/v2/", "/v2/repository/index"), ANY),
    **dict.fromkeys(("/metrics", "/v2/models/stats"), METRICS),
    **dict.fromkeys(("/tokenize", "/detokenize", "/rerank", "/v2/rerank", "/v2/embed", "/score", "/classify"), INFER),
    **dict.fromkeys(("/pooling", "/embed", "/embed_all", "/embeddings", "/predict", "/similarity"), INFER),
}
_MAX_REMEMBERED_CHARS = 512  # strangers make paths up, before anybody asks who they are
_V2_MODEL = {
    "": INFER,
    "ready": ANY,
    "config": INFER,
    "infer": INFER,
    "generate": INFER,
    "generate_stream": INFER,
    "stats": METRICS,
    "explain": METRICS,
}
_GRPC_SERVICE = "/inference.GRPCInferenceService/"
_GRPC = {
    **dict.fromkeys(("ServerLive", "ServerReady"), OPEN),
    **dict.fromkeys(("ServerMetadata", "ModelReady", "RepositoryIndex"), ANY),
    **dict.fromkeys(("ModelInfer", "ModelStreamInfer", "ModelMetadata", "ModelConfig"), INFER),
    "ModelStatistics": METRICS,
}


def http_scope(path: str) -> str:
    """The scope of an HTTP route. The same path, decoded, decides here and in the routers."""
    return _remembered_scope(path) if len(path) <= _MAX_REMEMBERED_CHARS else _scope(path)


def _scope(path: str) -> str:
    exact = _EXACT.get(path)
    if exact is not None:
        return exact
    if path.startswith("/v1/models/"):
        return ANY
    if path.startswith("/v1/"):
        return INFER
    if path.startswith("/v2/models/"):
        return _v2_model_scope(path.split("/")[4:])
    return ADMIN


_remembered_scope = lru_cache(1024)(_scope)


def _v2_model_scope(rest: list[str]) -> str:
    """What follows /v2/models/{model}."""
    if len(rest) > 1 and rest[0] == "versions":
        rest = rest[2:]
    return _V2_MODEL.get("/".join(rest), ADMIN)


def grpc_scope(method: str) -> str:
    """The scope of a gRPC method, `/package.Service/Method`."""
    if method.startswith(_GRPC_SERVICE):
        return _GRPC.get(method.removeprefix(_GRPC_SERVICE), ADMIN)
    if method.startswith("/grpc.health.v1.Health/"):
        return OPEN  # a kubelet's probe carries no key
    return ANY if method.startswith("/grpc.reflection.") else ADMIN
