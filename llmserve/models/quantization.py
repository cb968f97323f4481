"""Which format each of a model's matrices is kept in: `--quantization` resolved for a file and a device. No torch.

The weights' types are those of the file's header ("BF16", "Q4_1"); what can be computed is `Ops.weight_formats`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from llmserve.errors import ConfigError
from llmserve.kernels.weight_formats import DENSE, FP8, GGUF_FORMATS, INT8, NATIVE_FORMATS, Q8_0
from llmserve.models.config import ModelConfig
from llmserve.models.parameters import linear_parameters

logger = logging.getLogger(__name__)

_FLOAT_TYPES = frozenset(("F64", "F32", "F16", "BF16"))


def quantization_choices(types: Iterable[str], supported: Iterable[str]) -> tuple[str, ...]:
    """What `--quantization` may be, beside auto, for weights of these types where those formats are computed."""
    formats = set(supported)
    made = [name for name in (Q8_0, INT8, FP8) if name in formats]
    return ("none", *made, *(["gguf"] if native_types(types, formats) else []))


def native_types(types: Iterable[str], supported: Iterable[str]) -> list[str]:
    """The quantised types among `types` that are computed as they lie in the file."""
    formats = set(NATIVE_FORMATS) & set(supported)
    return sorted({name for name in types if name.lower() in formats})


def resolve_quantization(
    asked: str, where: str, types: Iterable[str], supported: Iterable[str], *, dtype_is_auto: bool
) -> str:
    """One of "none", "q8_0", "int8", "fp8" and "gguf". Raises ConfigError, with the choices there are, for what is not
    possible here.

    `auto` keeps the blocks of a GGUF file, and makes q8_0 of other weights, where the device computes them; but who
    chose a dtype gets the weights in it.
    """
    types, supported = set(types), tuple(supported)
    choices = quantization_choices(types, supported)
    if asked == "auto":
        preferred = ("gguf", Q8_0, "none") if dtype_is_auto else ("none",)
        return next(name for name in preferred if name in choices)
    if asked not in choices:
        reason = f"the kernels that run here compute weights as {', '.join(supported)}"
        if asked == "gguf":
            reason = f"{where} has weights of type {', '.join(sorted(types))}, and {reason}"
        raise ConfigError(
            f"quantization {asked!r} is not possible: {reason}. Choose one of auto, {', '.join(choices)}."
        )
    return asked


def choose_formats(
    config: ModelConfig, types: Mapping[str, str], quantization: str, supported: Iterable[str]
) -> dict[str, str]:
    """`LinearParameter.name` -> its format. `types` is of every tensor, `quantization` one that was resolved.

    With "gguf" a matrix that no kernel computes as it lies, or whose parts differ, becomes q8_0, or dense where there
    is no q8_0; with "q8_0" one whose rows are not whole blocks stays dense. The log says so. Routers are always dense.
    """
    formats = set(supported)
    chosen: dict[str, str] = {}
    replaced: Counter[str] = Counter()
    for matrix in linear_parameters(config):
        wanted = "none" if matrix.is_small else quantization
        if wanted == "gguf":
            parts = {types[f"{part}.weight"] for part in matrix.parts}
            wanted = _block_format(parts, formats)
            if {wanted.upper()} != parts and not parts <= _FLOAT_TYPES:
                replaced[f"{' with '.join(sorted(parts))} as {wanted}"] += 1
        if wanted == Q8_0 and matrix.in_features % GGUF_FORMATS[Q8_0][0]:
            replaced[f"rows of {matrix.in_features} weights as dense"] += 1
            wanted = DENSE
        chosen[matrix.name] = DENSE if wanted == "none" else wanted
    if replaced:
        what = ", ".join(f"{count} of {name}" for name, count in replaced.most_common())
        logger.info("of %d matrices, kept in another format: %s", len(chosen), what)
    return chosen


def _block_format(types: set[str], formats: set[str]) -> str:
    """Of a matrix of a GGUF file, whose parts have these types."""
    if len(types) == 1 and native_types(types, formats):
        return next(iter(types)).lower()
    return DENSE if types <= _FLOAT_TYPES or Q8_0 not in formats else Q8_0


def describe_formats(config: ModelConfig, formats: Mapping[str, str]) -> str:
    """For people, most weights first: "q4_1, q8_0"."""
    weights: Counter[str] = Counter()
    for matrix in linear_parameters(config):
        if not matrix.is_small:
            weights[formats[matrix.name]] += matrix.out_features * matrix.in_features
    return ", ".join(name for name, _ in weights.most_common())
