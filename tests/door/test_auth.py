"""Who gets in: every route over HTTP and gRPC, with and without keys."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llmserve.api.app import create_routes
from llmserve.api.gatekeeper import Gatekeeper, is_loopback
from llmserve.api.scopes import ADMIN, INFER, OPEN, grpc_scope, http_scope
from llmserve.api.settings import ApiSettings
from llmserve.api.v2_grpc import GrpcServer
from llmserve.api.v2_grpc_door import GrpcDoor
from llmserve.api_keys import ApiKeys
from llmserve.config import DoorConfig
from llmserve.metrics import Metrics
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.model_repository import ModelRepository
from llmserve.repository.settings import RepositorySettings
from tests.api.conftest import Directory, Script, ScriptedModel
from tests.door.conftest import ASK, ServeGuarded, write_keys

PROBES = ("/health", "/ready", "/v2/health/live", "/v2/health/ready")
V2_ROUTES = [
    ("GET", "/v2/health/live"),
    ("GET", "/v2"),
    ("GET", "/v2/health/ready"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/m"),
    ("GET", "/v2/models/m/versions/1/config"),
    ("POST", "/v2/models/m/infer"),
    ("POST", "/v2/models/m/generate_stream"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/trace/setting"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/m/load"),
    ("POST", "/v2/systemsharedmemory/region/r/register"),
    ("GET", "/no/such/route"),
]


@pytest.fixture
def plane() -> DataPlane:
    return DataPlane(ModelRepository(RepositorySettings(), lambda *_: None), version="1")  # type: ignore[arg-type]


def openapi_routes() -> list[tuple[str, str]]:
    app = create_routes(Directory([ScriptedModel("m", Script())]), ApiSettings(), Metrics())
    paths = app.openapi()["paths"].items()
    return [(method.upper(), path.replace("{model_id}", "m")) for path, methods in paths for method in methods]


def test_every_route_but_liveness_needs_a_key(serve_guarded: ServeGuarded, plane: DataPlane, tmp_path: Path) -> None:
    write_keys(tmp_path / "keys.toml", alice="")
    served = serve_guarded(DoorConfig(api_keys=str(tmp_path / "keys.toml")), plane=plane)
    routes = [*openapi_routes(), *V2_ROUTES, ("GET", "/docs"), ("GET", "/")]
    with served.client() as nobody, served.client("sk-llmserve-guess") as guesser:
        for method, path in routes:
            statuses = {client.request(method, path).status_code for client in (nobody, guesser)}
            assert (statuses == {401}) is (path not in PROBES), (method, path)
        assert nobody.request("OPTIONS", "/v1/models").status_code == 401  # no CORS unless configured
        refused = nobody.post("/v1/chat/completions", json=ASK)
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
        assert set(nobody.get("/v2/models/m").json()) == {"error"}
    assert served.script.specs == []


def test_probes_say_yes_or_no_to_strangers_and_more_to_those_with_a_key(
    serve_guarded: ServeGuarded, tmp_path: Path
) -> None:
    key = write_keys(tmp_path / "keys.toml", alice="")["alice"]
    served = serve_guarded(DoorConfig(api_keys=str(tmp_path / "keys.toml")))
    with served.client() as nobody, served.client("sk-llmserve-guess") as guesser, served.client(key) as alice:
        for stranger in nobody, guesser:
            assert stranger.get("/health").json() == {"status": "ok"}
            assert stranger.get("/ready").json() == {"status": "ready"}
        assert alice.get("/health").json() == {"status": "ok", "live": {"scripted": True}}
        assert alice.get("/ready").json() == {"status": "ready", "ready": {"scripted": True}}
        served.script.ready = False
        assert nobody.get("/ready").status_code == 503
        assert nobody.get("/ready").json() == {"status": "not ready"}


def test_scopes_are_kept_apart(serve_guarded: ServeGuarded, plane: DataPlane, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.toml", user="", ops='scopes = ["admin"]', prometheus='scopes = ["metrics"]')
    served = serve_guarded(DoorConfig(api_keys=str(tmp_path / "keys.toml")), plane=plane)
    expected = {
        ("POST", "/v1/chat/completions"): {"user"},
        ("GET", "/v1/models"): {"user", "ops", "prometheus"},
        ("GET", "/metrics"): {"prometheus"},
        ("GET", "/v2/models/stats"): {"prometheus"},
        ("GET", "/v2/logging"): {"ops"},
        ("POST", "/v2/repository/models/m/load"): {"ops"},
    }
    for (method, path), admitted in expected.items():
        for name, key in keys.items():
            with served.client(key) as client:
                status = client.request(method, path, json=ASK if method == "POST" else None).status_code
            assert (status != 403) is (name in admitted), (name, path, status)
            assert status != 401


@pytest.mark.parametrize("path", ["/no/such/route", "/v2/no/such/route", "/v2/models/m/nothing", "/v1/nothing"])
def test_where_nothing_is_a_known_key_gets_not_found(
    serve_guarded: ServeGuarded, plane: DataPlane, tmp_path: Path, path: str
) -> None:
    key = write_keys(tmp_path / "keys.toml", alice="")["alice"]
    served = serve_guarded(DoorConfig(api_keys=str(tmp_path / "keys.toml")), plane=plane)
    with served.client() as nobody, served.client(key) as alice:
        assert nobody.get(path).status_code == 401
        assert alice.get(path).status_code == 404
        assert alice.get("/v2/logging").status_code == 403


def test_every_route_of_the_openai_side_is_listed() -> None:
    """One that is added later is closed to all but admins until `scopes` names it: this says so to who adds it."""
    unlisted = [path for _, path in openapi_routes() if not path.startswith("/v2/") and http_scope(path) == ADMIN]
    assert unlisted == []


@pytest.mark.parametrize("header", ["x-api-key", "api-key"])
def test_keys_are_taken_from_the_headers_other_clients_send(
    serve_guarded: ServeGuarded, tmp_path: Path, header: str
) -> None:
    key = write_keys(tmp_path / "keys.toml", alice="")["alice"]
    served = serve_guarded(DoorConfig(api_keys=str(tmp_path / "keys.toml")))
    assert httpx.get(f"{served.url}/v1/models", headers={header: key}).status_code == 200


ADMIN_REQUEST = ("POST", "/v2/logging")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "203.0.113.9"},
        {"Forwarded": "for=127.0.0.1"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://[evil"},
        {"X-Forwarded-Host": "models.example", "X-Forwarded-Proto": "https"},
        {"Host": "evil.example"},
    ],
    ids=str,
)
def test_without_keys_admin_routes_are_this_machines_own(
    serve_guarded: ServeGuarded, plane: DataPlane, headers: dict[str, str]
) -> None:
    """Not a proxy's, not a web page's through a browser here, not those of a host name made to point here."""
    served = serve_guarded(plane=plane)
    with served.client() as client:
        assert client.request(*ADMIN_REQUEST, json={}).status_code == 200
        refused = client.request(*ADMIN_REQUEST, json={}, headers=headers)
        assert refused.status_code == 403
        assert "--api-keys" in refused.json()["error"]
        assert client.get("/v1/models", headers=headers).status_code == 200  # all else stays open


def test_without_keys_a_proxy_that_says_nothing_of_itself_is_not_this_machine(
    serve_guarded: ServeGuarded, plane: DataPlane
) -> None:
    """nginx, unless configured otherwise, names the host it was told of, adds no header, and asks in HTTP/1.0."""
    served = serve_guarded(plane=plane)
    for version, status in (b"1.1", b"200"), (b"1.0", b"403"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            host = b"127.0.0.1:%d" % served.port
            connection.sendall(b"GET /v2/logging HTTP/%s\r\nhost: %s\r\nconnection: close\r\n\r\n" % (version, host))
            answer = b"".join(iter(lambda: connection.recv(65536), b""))  # read at once
        assert answer.split(b" ")[1] == status


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9:80", True),
        ("::1", True),
        ("[::1]:8000", True),
        ("LOCALHOST:1", True),
        ("10.0.0.1", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.nip.io", False),
        ("", False),
    ],
)
def test_loopback_is_told_from_what_looks_like_it(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/embeddings", INFER),
        ("/v2/models/m/versions/3/infer", INFER),
        ("/v2/models/m/trace/setting", ADMIN),
        ("/v2/models/m/versions/3/anything", ADMIN),
        ("/v2//logging", ADMIN),
        ("/V1/models", ADMIN),
        ("/health/", ADMIN),
        ("/v2/health/live", OPEN),
    ],
)
def test_what_is_not_listed_needs_the_highest_scope(path: str, scope: str) -> None:
    assert http_scope(path) == scope


async def grpc_code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def guard_grpc(plane: DataPlane, keys_path: Path) -> None:
    keys = write_keys(keys_path, user="", ops='scopes = ["admin"]')
    server = GrpcServer(plane, "127.0.0.1", 0, interceptors=[GrpcDoor(Gatekeeper(ApiKeys(keys_path)))])
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            infer, load = service_pb2.ModelInferRequest(model_name="m"), service_pb2.RepositoryModelLoadRequest()
            user = [("authorization", f"Bearer {keys['user']}")]
            ops = [("authorization", f"Bearer {keys['ops']}")]
            codes = grpc.StatusCode
            assert await grpc_code(stub.ServerLive(service_pb2.ServerLiveRequest())) is codes.OK
            for method in stub.ModelInfer, stub.ModelMetadata, stub.RepositoryModelLoad, stub.LogSettings:
                message = service_pb2.LogSettingsRequest() if method is stub.LogSettings else infer
                message = load if method is stub.RepositoryModelLoad else message
                message = service_pb2.ModelMetadataRequest(name="m") if method is stub.ModelMetadata else message
                assert await grpc_code(method(message)) is codes.UNAUTHENTICATED
            assert await grpc_code(stub.ModelInfer(infer, metadata=user)) is codes.NOT_FOUND
            assert await grpc_code(stub.RepositoryModelLoad(load, metadata=user)) is codes.PERMISSION_DENIED
            assert await grpc_code(stub.ModelInfer(infer, metadata=ops)) is codes.PERMISSION_DENIED
            settings = service_pb2.LogSettingsRequest()
            assert await grpc_code(stub.LogSettings(settings, metadata=ops)) is codes.OK
            stream = stub.ModelStreamInfer(iter([infer]))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stream.read()
            assert refused.value.code() is codes.UNAUTHENTICATED
    finally:
        await server.stop(0)


@pytest.fixture
def keys_path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_grpc_is_guarded(plane: DataPlane, keys_path: Path) -> None:
    asyncio.run(guard_grpc(plane, keys_path))


def test_every_grpc_method_has_a_scope_and_unknown_ones_the_highest() -> None:
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    scopes = {method.name: grpc_scope(f"/inference.GRPCInferenceService/{method.name}") for method in methods}
    assert [name for name, scope in scopes.items() if scope == OPEN] == ["ServerLive", "ServerReady"]
    assert {name for name, scope in scopes.items() if scope == INFER} == {
        "ModelInfer",
        "ModelStreamInfer",
        "ModelMetadata",
        "ModelConfig",
    }
    assert grpc_scope("/other.Service/Method") == ADMIN
