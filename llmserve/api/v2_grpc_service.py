"""GRPCInferenceService over the data plane: each method decodes, calls, encodes. Knows no port and no process."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llmserve.api.v2_errors import REPOSITORY_NAME, SHARED_MEMORY, error_kind, error_text
from llmserve.api.v2_grpc_codec import read_request, write_response
from llmserve.api.v2_grpc_stream import InferenceStream
from llmserve.api.v2_statistics import statistics_json
from llmserve.errors import InferenceError, InvalidRequestError, LLMServeError
from llmserve.repository.data_plane import DataPlane, TensorMetadata

logger = logging.getLogger(__name__)

_STATUSES = {
    InferenceError.INTERNAL: grpc.StatusCode.INTERNAL,
    InferenceError.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    InferenceError.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    InferenceError.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    InferenceError.INVALID_ARG: grpc.StatusCode.INVALID_ARGUMENT,
    InferenceError.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    InferenceError.CANCELLED: grpc.StatusCode.CANCELLED,
}


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """The gRPC door: whatever a unary method raises becomes a status."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Wraps unary methods; streams answer for their own errors."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler
        method = handler.unary_unary

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await method(request, context)
            except LLMServeError as error:
                code, text = _STATUSES.get(error_kind(error), grpc.StatusCode.UNKNOWN), error_text(error)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # the gRPC door
                logger.exception("%s failed", details.method)
                code, text = grpc.StatusCode.INTERNAL, error_text(error)
            return await context.abort(code, text)

        return grpc.unary_unary_rpc_method_handler(
            guarded, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


class InferenceService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Every method of the service. What it raises, `ErrorInterceptor` turns into a status."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    async def ServerLive(self, request: Any, context: Any) -> service_pb2.ServerLiveResponse:
        """It answers, so it lives."""
        return service_pb2.ServerLiveResponse(live=self._plane.server_live())

    async def ServerReady(self, request: Any, context: Any) -> service_pb2.ServerReadyResponse:
        """Whether the models that should serve do."""
        return service_pb2.ServerReadyResponse(ready=self._plane.server_ready())

    async def ModelReady(self, request: Any, context: Any) -> service_pb2.ModelReadyResponse:
        """False, and no error, for a model that is not there."""
        return service_pb2.ModelReadyResponse(ready=self._plane.model_ready(request.name, request.version))

    async def ServerMetadata(self, request: Any, context: Any) -> service_pb2.ServerMetadataResponse:
        """Name, version, extensions."""
        metadata = self._plane.server_metadata()
        return service_pb2.ServerMetadataResponse(
            name=metadata.name, version=metadata.version, extensions=metadata.extensions
        )

    async def ModelMetadata(self, request: Any, context: Any) -> service_pb2.ModelMetadataResponse:
        """A model's signature."""
        metadata = self._plane.model_metadata(request.name, request.version)
        response = service_pb2.ModelMetadataResponse(
            name=metadata.name, versions=metadata.versions, platform=metadata.platform
        )
        _add_tensors(response.inputs, metadata.inputs)
        _add_tensors(response.outputs, metadata.outputs)
        return response

    async def ModelConfig(self, request: Any, context: Any) -> service_pb2.ModelConfigResponse:
        """The complete configuration."""
        return service_pb2.ModelConfigResponse(config=self._plane.model_config(request.name, request.version))

    async def ModelStatistics(self, request: Any, context: Any) -> service_pb2.ModelStatisticsResponse:
        """Of a version, a model or all."""
        response = service_pb2.ModelStatisticsResponse()
        for statistics in self._plane.statistics(request.name, request.version):
            entry = statistics_json(statistics)
            del entry["memory_usage"]
            response.model_stats.add(**entry)
        return response

    async def ModelInfer(self, request: Any, context: Any) -> service_pb2.ModelInferResponse:
        """One request, one response. A cancelled call or a passed deadline cancels the request."""
        if self._plane.is_decoupled(request.model_name, request.model_version):
            raise InferenceError(
                "ModelInfer RPC doesn't support models with decoupled transaction policy", InferenceError.UNSUPPORTED
            )
        infer_request, _ = read_request(request)
        async with aclosing(self._plane.infer(infer_request)) as responses:
            async for response in responses:
                return write_response(response)
        raise InferenceError(f"model '{request.model_name}' gave no response")

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[service_pb2.ModelInferRequest], context: Any
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        """Any number of requests and responses."""
        try:
            async with aclosing(InferenceStream(self._plane).run(request_iterator)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # the gRPC door, of streams
            logger.exception("A stream of requests failed")
            await context.abort(grpc.StatusCode.INTERNAL, error_text(error))

    async def RepositoryIndex(self, request: Any, context: Any) -> service_pb2.RepositoryIndexResponse:
        """Every model and version."""
        _refuse_repository_name(request)
        response = service_pb2.RepositoryIndexResponse()
        for entry in await self._plane.repository_index(ready=request.ready):
            response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return response

    async def RepositoryModelLoad(self, request: Any, context: Any) -> service_pb2.RepositoryModelLoadResponse:
        """Loads or reloads a model, maybe with a configuration and files of the request's own."""
        _refuse_repository_name(request)
        config: str | None = None
        files: dict[str, bytes] = {}
        for key, parameter in request.parameters.items():
            kind = parameter.WhichOneof("parameter_choice")
            if key == "config":
                if kind != "string_param":
                    raise InvalidRequestError("invalid value type for 'config' parameter, expected string_param.", key)
                config = parameter.string_param
            elif key.startswith("file:"):
                if kind != "bytes_param":
                    raise InvalidRequestError(f"invalid value type for '{key}' parameter, expected bytes_param.", key)
                files[key] = parameter.bytes_param
            else:
                raise InvalidRequestError(f"unrecognized load parameter '{key}': use 'config' or 'file:<path>'", key)
        await self._plane.load(request.model_name, config, files)
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> service_pb2.RepositoryModelUnloadResponse:
        """Takes a model out of service."""
        _refuse_repository_name(request)
        dependents = request.parameters["unload_dependents"].bool_param if request.parameters else False
        await self._plane.unload(request.model_name, dependents)
        return service_pb2.RepositoryModelUnloadResponse()

    async def TraceSetting(self, request: Any, context: Any) -> service_pb2.TraceSettingResponse:
        """Shows the trace settings, changed first if the request says so."""
        changes: dict[str, str | list[str] | None] = {}
        for key, setting in request.settings.items():
            values = list(setting.value)
            if key != "trace_level" and len(values) > 1:
                raise InvalidRequestError(f"expect only 1 value for '{key}'", key)
            changes[key] = None if not values else values if key == "trace_level" else values[0]
        response = service_pb2.TraceSettingResponse()
        for key, shown in self._plane.trace_settings(request.model_name, changes).items():
            response.settings[key].value.extend([shown] if isinstance(shown, str) else shown)
        return response

    async def LogSettings(self, request: Any, context: Any) -> service_pb2.LogSettingsResponse:
        """Shows the log settings, changed first if the request says so."""
        changes: dict[str, bool | int | str] = {}
        for key, setting in request.settings.items():
            kind = setting.WhichOneof("parameter_choice")
            expected = _LOG_KINDS.get(key, kind)
            if kind is None or kind != expected:
                raise InvalidRequestError(f"expect {expected or 'a value'} for '{key}'", key)
            changes[key] = getattr(setting, kind)
        response = service_pb2.LogSettingsResponse()
        for key, shown in self._plane.log_settings.update(changes).items():
            setattr(response.settings[key], _LOG_KINDS[key], shown)
        return response

    # Shared memory: there is never a region, and none can be registered.

    async def SystemSharedMemoryStatus(
        self, request: Any, context: Any
    ) -> service_pb2.SystemSharedMemoryStatusResponse:
        """Empty."""
        _refuse_region("system", request.name)
        return service_pb2.SystemSharedMemoryStatusResponse()

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        """Not served yet."""
        raise InferenceError(SHARED_MEMORY, InferenceError.UNSUPPORTED)

    async def SystemSharedMemoryUnregister(
        self, request: Any, context: Any
    ) -> service_pb2.SystemSharedMemoryUnregisterResponse:
        """What is not there is gone already."""
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> service_pb2.CudaSharedMemoryStatusResponse:
        """Empty."""
        _refuse_region("CUDA", request.name)
        return service_pb2.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        """Not served yet."""
        raise InferenceError(SHARED_MEMORY, InferenceError.UNSUPPORTED)

    async def CudaSharedMemoryUnregister(
        self, request: Any, context: Any
    ) -> service_pb2.CudaSharedMemoryUnregisterResponse:
        """What is not there is gone already."""
        return service_pb2.CudaSharedMemoryUnregisterResponse()


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1: one status whatever service is asked for, as Triton answers. `Watch` is not offered."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        """SERVING when the server is ready."""
        statuses = health_pb2.HealthCheckResponse
        return statuses(status=statuses.SERVING if self._plane.server_ready() else statuses.NOT_SERVING)


_LOG_KINDS = {
    "log_file": "string_param",
    "log_info": "bool_param",
    "log_warning": "bool_param",
    "log_error": "bool_param",
    "log_verbose_level": "uint32_param",
    "log_format": "string_param",
}


def _refuse_repository_name(request: Any) -> None:
    if request.repository_name:
        raise InferenceError(REPOSITORY_NAME, InferenceError.UNSUPPORTED)


def _refuse_region(kind: str, name: str) -> None:
    if name:
        raise InferenceError(f"Unable to find {kind} shared memory region: '{name}'", InferenceError.NOT_FOUND)


def _add_tensors(field: Any, tensors: tuple[TensorMetadata, ...]) -> None:
    for tensor in tensors:
        field.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
