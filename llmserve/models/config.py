"""What a decoder looks like, in numbers: `ModelConfig`, and how to read it. Knows no tensors and no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmserve.errors import ConfigError, ModelLoadError
from llmserve.models.checkpoint_quantization import CheckpointQuantization

RopeKind = Literal["none", "linear", "llama3", "yarn", "factors"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, Su et al. 2021) and how its frequencies theta^(-2i/d) are stretched.

    Kinds: "none"; "linear" divides all by `factor` (position interpolation); "llama3" divides the low ones (Llama 3.1);
    "yarn" blends both by frequency and scales the table by `attention_factor` (YaRN, Peng et al. 2023); "factors"
    divides each by its own number, the form in which GGUF files carry llama3.
    """

    theta: float
    kind: RopeKind = "none"
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn: the context before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float = 1.0  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the blend's bounds to whole dimensions
    freq_factors: tuple[float, ...] = ()  # factors: [head_dim / 2]


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a mixture's tensors are called within a layer; `expert` is a format for the expert's number."""

    router: str
    expert: str
    gate: str
    up: str
    down: str
    fused: str  # of all experts in one tensor, as transformers 5 keeps them in memory
    fused_is_transposed: bool = False  # there [in, out], the columns of gate and up alternating (gpt-oss)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of the MLP (Shazeer et al. 2017; the sparse layers of Mixtral and Qwen)."""

    names: ExpertNames
    num_experts: int
    num_experts_per_token: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int = 0  # of the expert that every token goes to; 0: there is none
    shared_name: str = "mlp.shared_expert"
    has_shared_gate: bool = False  # the shared expert's answer is scaled by the sigmoid of its own product
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True  # the chosen experts' weights sum to one
    scale: float = 1.0  # of the chosen experts' weights
    has_correction_bias: bool = False  # added to the scores for the choice alone (DeepSeek-V3)
    has_biases: bool = False  # of the router and of the experts
    dense_layers: frozenset[int] = frozenset()  # those with a plain MLP
    swiglu_limit: float = 0.0  # gpt-oss's clamped activation; 0: the model's own activation
    swiglu_alpha: float = 1.702


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family, whole: two models that differ, differ here or in their weights."""

    architecture: str  # the name Hugging Face gives it, also for a GGUF file
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    rope_local: RopeConfig | None = None  # of the sliding layers, where it differs (Gemma 3)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k
    post_norms: bool = False  # RMSNorm also after attention and after the MLP, before the residual (Gemma)
    norm_weight_offset: float = 0.0  # added to stored norm weights: 1.0 in Gemma's safetensors, 0.0 in its GGUF
    sliding_windows: tuple[int, ...] = ()  # [num_layers]; 0 is full attention
    attention_soft_cap: float = 0.0  # 0 is none
    logits_soft_cap: float = 0.0
    embedding_scale: float = 1.0
    query_scale: float = 1.0  # multiplies q . k
    activation: Activation = "silu"
    attention_sinks: bool = False  # a learnt score for each head that takes weight and gives nothing (gpt-oss)
    moe: MoEConfig | None = None
    quantization: CheckpointQuantization | None = None  # of a folder whose matrices are packed
    dtype: str = "float32"  # torch's name for the type the weights were published in; bfloat16 for quantised files

    def __post_init__(self) -> None:
        assert len(self.sliding_windows) == self.num_layers

    def context_length(self, asked: int | None) -> int:
        """The longest context in tokens; by default all the model has positions for. Raises ConfigError for more."""
        longest = self.max_position_embeddings
        if asked is not None and asked > longest:
            raise ConfigError(f"max_model_len {asked} is beyond the {longest} positions of the model.")
        return asked or longest

    def moe_of_layer(self, layer: int) -> MoEConfig | None:
        """The mixture that layer has in place of an MLP, if it has one."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe

    def rope_of_layer(self, layer: int) -> RopeConfig:
        """The rotary embedding that layer uses."""
        return self.rope_local if self.rope_local is not None and self.sliding_windows[layer] else self.rope


def yarn_magnitude(factor: float, mscale: float) -> float:
    """How much YaRN scales the rotary table (Peng et al. 2023, section 3.4, applied to q and k each)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def read_model_config(path: str | Path) -> ModelConfig:
    """Reads a Hugging Face folder (its config.json) or a .gguf file (its metadata).

    Raises ModelLoadError, naming the file and the key, for what is missing, malformed or not supported.
    """
    # Imported here, because both readers build a ModelConfig.
    from llmserve.models.gguf_config import config_from_gguf
    from llmserve.models.hf_config import config_from_folder

    path = Path(path)
    if path.is_dir():
        return config_from_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return config_from_gguf(path)
    raise ModelLoadError(f"{path} is neither a folder with a config.json nor a .gguf file.")
