"""Where a setting's value comes from: flags over environment over file over defaults, each checked by name."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from llmserve.config import EngineConfig, ServeConfig, format_bytes, parse_bytes
from llmserve.errors import ConfigError
from llmserve.settings import add_setting_flags, load_serve_config, unknown_variables


def load(*argv: str, environ: dict[str, str] | None = None) -> ServeConfig:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--served-model-name", nargs="+")
    add_setting_flags(parser)
    return load_serve_config(vars(parser.parse_args(argv)), environ or {})


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_leave_the_model_and_the_limits_open() -> None:
    config = load()
    assert config.server.port == 8000
    assert [entry.model for entry in config.models] == [""]  # the embedded default


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", "max_num_seqs = 1\nmax_model_len = 1\nblock_size = 32\n")
    environ = {"LLMSERVE_MAX_NUM_SEQS": "2", "LLMSERVE_MAX_MODEL_LEN": "2", "LLMSERVE_CONFIG": file}
    engine = load("model", "--max-num-seqs", "3", environ=environ).models[0].engine
    assert (engine.max_num_seqs, engine.max_model_len, engine.block_size, engine.max_logprobs) == (3, 2, 32, 20)


def test_models_tables_hold_their_own_settings(tmp_path: Path) -> None:
    file = write(
        tmp_path / "c.toml",
        "dtype = 'float32'\n[[models]]\nmodel = 'a'\nserved_model_name = ['x', 'y']\nkv-cache-memory = '1GiB'\n"
        "[[models]]\nmodel = 'b'\ndtype = 'bfloat16'\n",
    )
    first, second = load("--config", file, "--max-num-seqs", "5").models
    assert (first.model, first.served_names, first.engine.dtype) == ("a", ("x", "y"), "float32")
    assert first.engine.kv_cache_memory == 2**30
    assert (second.model, second.engine.dtype, second.engine.max_num_seqs) == ("b", "bfloat16", 5)


def test_served_model_name_names_the_only_model_several_times_or_each_model_once() -> None:
    assert load("m", "--served-model-name", "a", "b").models[0].served_names == ("a", "b")
    assert load("--served-model-name", "a").models[0].served_names == ("a",)
    several = load("m", "n", "--served-model-name", "a", "b").models
    assert [entry.served_names for entry in several] == [("a",), ("b",)]
    with pytest.raises(ConfigError, match="1 names for 2 models"):
        load("m", "n", "--served-model-name", "a")


def test_booleans_have_a_flag_each_way() -> None:
    assert load("m").models[0].engine.enable_prefix_caching is True
    assert load("m", "--no-enable-prefix-caching").models[0].engine.enable_prefix_caching is False
    environ = {"LLMSERVE_ENABLE_PREFIX_CACHING": "false"}
    assert load("m", environ=environ).models[0].engine.enable_prefix_caching is False


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (["--port", "eight"], {}, "--port"),
        (["--port", "70000"], {}, "port"),
        (["--drain-timeout-s", "-1"], {}, "drain_timeout_s must be at least 0"),
        (["m", "--max-model-len", "0"], {}, "max_model_len"),
        (["m", "--dtype", "int3"], {}, "float32, bfloat16"),
        (["m", "--quantization", "awq"], {}, "auto, none, q8_0, int8, fp8, gguf"),
        (["m", "--kv-cache-memory", "lots"], {}, "512M"),
        (["m", "--kv-cache-host-memory", "1GiB", "--no-enable-prefix-caching"], {}, "enable_prefix_caching"),
        (["m", "--block-size", "20"], {}, "multiple of 16"),
        (["m", "--itl-slowdown", "1.0"], {}, "itl_slowdown"),
        ([], {"LLMSERVE_PORT": "x"}, "LLMSERVE_PORT"),
        ([], {"LLMSERVE_VLLM_METRICS": "maybe"}, "LLMSERVE_VLLM_METRICS"),
        (["--config", "nowhere.toml"], {}, "nowhere.toml"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_source(argv: list[str], environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(*argv, environ=environ)


def test_a_variable_that_is_no_setting_is_said() -> None:
    environ = {
        "LLMSERVE_MAX_MODEL_LENGTH": "8",
        "LLMSERVE_QWERTY": "1",
        "LLMSERVE_PORT": "8000",
        "LLMSERVE_API_KEY": "sk-1",
        "LLMSERVE_CACHE": "/tmp",
        "LLMSERVE_CONFIG": "c.toml",
        "LLMSERVE_MODELS": "a b",
        "OTHER_LLMSERVE_PROT": "1",
    }
    assert unknown_variables(environ) == [
        "the environment variable LLMSERVE_MAX_MODEL_LENGTH is no setting, and is ignored. "
        "Did you mean LLMSERVE_MAX_MODEL_LEN?",
        "the environment variable LLMSERVE_QWERTY is no setting, and is ignored.",
    ]


@pytest.mark.parametrize("service", ["LLMSERVE", "LLMSERVE_GRPC", "LLMSERVE_MY_MODELS"])
def test_what_kubernetes_says_of_a_service_called_so_is_no_setting(service: str) -> None:
    environ = {
        f"{service}_PORT": "tcp://10.0.171.239:8000",
        f"{service}_PORT_8000_TCP": "tcp://10.0.171.239:8000",
        f"{service}_PORT_8000_TCP_ADDR": "10.0.171.239",
        f"{service}_PORT_8000_TCP_PORT": "8000",
        f"{service}_PORT_8000_TCP_PROTO": "tcp",
        f"{service}_PORT_53_UDP": "udp://10.0.171.239:53",
        f"{service}_SERVICE_HOST": "10.0.171.239",
        f"{service}_SERVICE_PORT": "8000",
        f"{service}_SERVICE_PORT_HTTP": "8000",
    }
    assert unknown_variables(environ) == []
    server = load("m", environ=environ).server
    assert (server.port, server.grpc_port) == (8000, None)
    server = load("m", environ={"LLMSERVE_PORT": "9000", "LLMSERVE_GRPC_PORT": "9001"}).server
    assert (server.port, server.grpc_port) == (9000, 9001)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot = 8000", "Did you mean 'port'"),
        ("port = 8000.5", "port"),
        ("port = true", "port"),
        ("not toml", "not valid TOML"),
        ("models = 3", r"\[\[models\]\]"),
        ("[[models]]\ndtype = 'float32'", r"models\[0\] needs a key 'model'"),
        ("[[models]]\nmodel = 'a'\nport = 3", "unknown setting 'port'"),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_key(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load("--config", write(tmp_path / "c.toml", text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1024", 1024), ("2GiB", 2**31), ("512M", 512 * 10**6), ("1.5g", 15 * 10**8), ("3 KiB", 3072)],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_bytes_for_people() -> None:
    assert [format_bytes(n) for n in (10, 2048, 3 * 2**20, 2**31)] == ["10 B", "2 KiB", "3 MiB", "2.00 GiB"]


def test_an_engine_config_survives_json() -> None:
    import msgspec

    config: Any = EngineConfig(model="x", kv_cache_memory=5, dtype="float32")
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config


def test_each_model_may_state_its_share_of_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('gpu_memory = 0.2\n[[models]]\nmodel = "a"\ngpu_memory = "60%"\n[[models]]\nmodel = "b"\n')
    assert [entry.engine.gpu_memory for entry in load("--config", str(file)).models] == [0.6, 0.2]
    assert load("m", "--gpu-memory", "40GiB").models[0].engine.gpu_memory == 40 * 2**30
    assert load("m", environ={"LLMSERVE_GPU_MEMORY": "1"}).models[0].engine.gpu_memory == 1.0
    assert load("m").models[0].engine.gpu_memory is None
    for wrong in ("0", "-3", "lots", "150%"):
        with pytest.raises(ConfigError, match=r"gpu.memory"):
            load("m", "--gpu-memory", wrong)


def test_a_model_on_the_cpu_does_not_inherit_what_is_for_the_gpu(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    everyone = 'gpu_memory = 0.5\nkv_cache_host_memory = "1GiB"\n[[models]]\nmodel = "a"\n'
    file.write_text(everyone + '[[models]]\nmodel = "b"\ndevice = "cpu"\n')
    config = load("--config", str(file))
    engines = [config.engine, *(entry.engine for entry in config.models)]
    assert [engine.gpu_memory for engine in engines] == [0.5, 0.5, None]
    assert [engine.kv_cache_host_memory for engine in engines] == [2**30, 2**30, 0]
    assert load("m", "--device", "cpu", environ={"LLMSERVE_GPU_MEMORY": "0.5"}).models[0].engine.gpu_memory is None
    with pytest.raises(ConfigError, match="gpu_memory is for models on a GPU"):  # a flag is meant for every model
        load("--config", str(file), "--gpu-memory", "0.6")
    file.write_text(everyone + '[[models]]\nmodel = "b"\ndevice = "cpu"\ngpu_memory = 0.4\n')
    with pytest.raises(ConfigError, match="gpu_memory is for models on a GPU"):
        load("--config", str(file))
