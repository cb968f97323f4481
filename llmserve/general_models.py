"""The half of the server that is not LLMs, put together: model repository, v2 over HTTP and gRPC, Triton's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from llmserve import __version__
from llmserve.api.entrance import Entrance
from llmserve.api.settings import ApiSettings
from llmserve.api.v2_grpc import GrpcServer
from llmserve.api.v2_llm import ServedLanguageModels
from llmserve.backends.general import GeneralModel
from llmserve.backends.instance import InstanceSettings
from llmserve.backends.pooling_model import PoolingModel
from llmserve.config import RepositoryConfig, ServerConfig
from llmserve.repository.data_plane import DataPlane
from llmserve.repository.language_models import LanguageModels
from llmserve.repository.model_folder import POOLING
from llmserve.repository.model_repository import ModelRepository, ProgressOf
from llmserve.repository.model_version import ModelVersion
from llmserve.repository.pooling_models import PoolingModels
from llmserve.repository.served_models import ServedModels
from llmserve.repository.settings import ModelControlMode, RepositorySettings


class GeneralModels:
    """Lives as long as the server. LLMs stand in the same index and answer the same protocol."""

    def __init__(
        self,
        config: RepositoryConfig,
        server: ServerConfig,
        llms: ServedModels,
        language_models: LanguageModels,
        api: ApiSettings,
        entrance: Entrance,
        named: Mapping[str, Path],
    ) -> None:
        """`named` are models that stand in no repository, by name."""
        self._server = server
        self._entrance = entrance
        self._inline = frozenset(config.inline)
        self._repository = ModelRepository(_repository_settings(config, server), self._open, named)
        self.pooling = PoolingModels(self._repository)
        self.plane = DataPlane(
            self._repository,
            version=__version__,
            llms=ServedLanguageModels(llms, api),
            language_models=language_models,
        )
        self._grpc: GrpcServer | None = None

    async def start(self, http_port: int, progress_of: ProgressOf) -> str | None:
        """Loads the repository and opens the gRPC port. Returns its address, None if there is to be no gRPC."""
        port = grpc_port(self._server, http_port)
        if port is not None:
            self._grpc = GrpcServer(
                self.plane,
                self._server.host,
                port,
                self._entrance.grpc_settings(self._server.max_body_bytes),
                interceptors=[self._entrance.grpc_door()],
                credentials=self._entrance.grpc_credentials(),
            )
            await self._grpc.start()
        await self._repository.start(progress_of)
        return f"{self._server.host}:{self._grpc.port}" if self._grpc else None

    @property
    def names(self) -> list[str]:
        """The general models that serve."""
        return [model.name for model in self._repository.models if model.ready]

    @property
    def hugging_face_folders(self) -> Sequence[Path]:
        """Language models that lie in the repository; known once it is started."""
        return self._repository.hugging_face_folders

    async def stop(self, drain_s: float) -> None:
        """In-flight requests finish first."""
        if self._grpc is not None:
            await self._grpc.stop(drain_s)
        await self._repository.stop()

    def _open(self, name: str, version: str, version_path: Path, model_path: Path, config: ModelConfig) -> ModelVersion:
        settings = InstanceSettings(log_level=self._server.log_level)
        if config.backend == POOLING:
            return PoolingModel(name, version, version_path, model_path, config, settings)
        inline = not self._inline.isdisjoint((name, "*"))
        return GeneralModel(name, version, version_path, model_path, config, settings, inline)


def grpc_port(server: ServerConfig, http_port: int) -> int | None:
    """The port that gRPC is to have: 0 is any, None is no gRPC."""
    if not server.grpc:
        return None
    if server.grpc_port is not None:
        return server.grpc_port
    return http_port + 1 if server.port else 0


def _repository_settings(config: RepositoryConfig, server: ServerConfig) -> RepositorySettings:
    names = {field.name for field in fields(RepositorySettings)} & {field.name for field in fields(config)}
    values = {name: getattr(config, name) for name in names}
    values["model_control_mode"] = ModelControlMode(config.model_control_mode)
    return RepositorySettings(**values, exit_timeout_secs=server.drain_timeout_s)
