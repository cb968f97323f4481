"""A tiny embedded model in a wheel of its own, and a package index in a folder to fetch it from."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from llmserve.repository.cache import cache_dir
from llmserve.repository.embedded import EmbeddedModel
from llmserve.repository.wheels import PackagedFile, Wheel

_HIDDEN, _HEADS, _KV_HEADS, _FFN, _LAYERS = 64, 4, 2, 96, 2


def write_tiny_llama(path: Path, architecture: str = "llama", extra_tensor: str | None = None) -> None:
    """A Llama of two layers, its matrices Q4_1 but for the embedding (Q8_0) and the norms (F32), as SmolLM2's."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>", "he"]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_block_count(_LAYERS)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)

    def add(name: str, kind: gguf.GGMLQuantizationType, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    kinds = gguf.GGMLQuantizationType
    add("token_embd.weight", kinds.Q8_0, len(tokens), _HIDDEN)
    add("output_norm.weight", kinds.F32, _HIDDEN)
    kv = _HIDDEN * _KV_HEADS // _HEADS
    shapes = {"attn_q": (_HIDDEN, _HIDDEN), "attn_k": (kv, _HIDDEN), "attn_v": (kv, _HIDDEN)}
    shapes |= {"attn_output": (_HIDDEN, _HIDDEN), "ffn_gate": (_FFN, _HIDDEN), "ffn_up": (_FFN, _HIDDEN)}
    for layer in range(_LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", kinds.F32, _HIDDEN)
        for name, shape in (shapes | {"ffn_down": (_HIDDEN, _FFN)}).items():
            add(f"blk.{layer}.{name}.weight", kinds.Q4_1, *shape)
    if extra_tensor is not None:
        add(extra_tensor, kinds.F32, 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class PackageIndex:
    """The model as a row of the catalogue, and the folder pip is told to find wheels in."""

    model: EmbeddedModel
    folder: Path

    @property
    def wheel(self) -> Path:
        return self.folder / self.model.wheel.filename

    def take_offline(self) -> None:
        """The index has the wheel no more: whoever still gets the model did not download it."""
        self.wheel.unlink()

    def bring_by_hand(self) -> None:
        """The wheel lies where a user without a network may put it; the index has it no more."""
        downloads = cache_dir() / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        self.wheel.rename(downloads / self.model.wheel.filename)

    def other_model(self, **changes: object) -> EmbeddedModel:
        return replace(self.model, **changes)  # type: ignore[arg-type]


def _build_wheel(folder: Path, scratch: Path) -> EmbeddedModel:
    write_tiny_llama(scratch / "tiny.gguf")
    contents = {
        "tiny_llm/tiny.gguf": (scratch / "tiny.gguf").read_bytes(),
        "tiny_llm-1.0.dist-info/LICENSE": b"Do as you like.\n",
        "tiny_llm-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\nRequires-Dist: x\n",
        "tiny_llm-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in contents) + "tiny_llm-1.0.dist-info/RECORD,,\n"
    path = folder / "tiny_llm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (contents | {"tiny_llm-1.0.dist-info/RECORD": record.encode()}).items():
            archive.writestr(name, data)

    def file(member: str, name: str) -> PackagedFile:
        return PackagedFile(member, name, _sha256(contents[member]))

    return EmbeddedModel(
        name="tiny",
        aliases=(),
        description="",
        licence="none",
        wheel=Wheel(path.name, _sha256(path.read_bytes())),
        gguf=file("tiny_llm/tiny.gguf", "tiny.gguf"),
        licence_text=file("tiny_llm-1.0.dist-info/LICENSE", "LICENSE"),
        sampling={"temperature": 0.5},
        download_bytes=path.stat().st_size,
        folder_bytes=10**6,
    )


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageIndex:
    """pip finds the tiny model's wheel in a folder and looks nowhere else; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    model = _build_wheel(folder, tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("LLMSERVE_CACHE", str(tmp_path / "cache"))
    return PackageIndex(model, folder)


@pytest.fixture
def write_llama() -> Callable[..., None]:
    return write_tiny_llama
