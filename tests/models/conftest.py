"""Tiny random models of every architecture, and a driver that runs a model over a paged cache."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

from llmserve.kernels.ops import AttentionMetadata
from llmserve.kernels.reference import ReferenceOps
from llmserve.models.config import read_model_config
from llmserve.models.loader import load_model
from llmserve.models.weights import open_weights

SMALL = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "num_hidden_layers": 3}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

# name -> (transformers' config class, what it differs in). head_dim is never hidden / heads where it may be chosen;
# windows and original contexts are shorter than the sequences, so that sliding and stretching happen.
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-llama3-tied": (
        "Llama",
        {
            "head_dim": 24,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-linear-biases": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0},
        },
    ),
    "mistral-window": ("Mistral", {"sliding_window": 7, "num_key_value_heads": 1, "head_dim": 12}),
    "qwen2-yarn": (
        "Qwen2",
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 40, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 24,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 24,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}),
    "qwen2moe": (
        "Qwen2Moe",
        MOE | {"num_experts": 5, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "qkv_bias": True},
    ),
    "qwen3moe": (
        "Qwen3Moe",
        MOE
        | {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "dots1": (
        "Dots1",
        MOE
        | {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "head_dim": 24}
        | {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "sliding_window": None},
    ),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 24,
            "sliding_window": 6,
            "swiglu_limit": 1.5,  # low enough to clamp
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1.5e5,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
            },
        },
    ),
}


def build_transformers_model(family: str, **changes: object) -> transformers.PreTrainedModel:
    """A random model in float32; norms and biases are random too, so that none can be forgotten unseen."""
    config = getattr(transformers, f"{family}Config")(**(SMALL | {"tie_word_embeddings": False} | changes))
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")._from_config(
        config, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        # Matrices outweigh embeddings: else a random model repeats its last token for ever.
        spread = 0.5 if parameter.dim() == 1 else 0.1 if "embed" in name else 0.3
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class PagedDriver:
    """Runs a model step by step over blocks that are scattered on purpose. Sequences are named by anything."""

    def __init__(self, model, ops=None, block_size: int = 4, num_blocks: int = 512) -> None:
        self.model = model
        self.ops = ops or ReferenceOps()
        self.block_size = block_size
        spec = model.kv_cache_spec(block_size, model.dtype)
        self.caches = [self.ops.allocate_kv_cache(spec, num_blocks, model.device) for _ in range(model.num_layers)]
        self.free = list(range(num_blocks))
        random.Random(5).shuffle(self.free)
        self.blocks: dict[object, list[int]] = {}
        self.lengths: dict[object, int] = {}

    def step(self, tokens: dict[object, list[int]]) -> dict[object, torch.Tensor]:
        """Appends tokens to sequences, in one ragged batch -> logits [new tokens, vocab] of each."""
        positions, slots, starts = [], [], [0]
        for seq, ids in tokens.items():
            blocks = self.blocks.setdefault(seq, [])
            first = self.lengths.get(seq, 0)
            self.lengths[seq] = first + len(ids)
            while len(blocks) * self.block_size < self.lengths[seq]:
                blocks.append(self.free.pop())
            for position in range(first, self.lengths[seq]):
                positions.append(position)
                slots.append(blocks[position // self.block_size] * self.block_size + position % self.block_size)
            starts.append(starts[-1] + len(ids))
        width = max(len(self.blocks[seq]) for seq in tokens)
        table = [self.blocks[seq] + [-1] * (width - len(self.blocks[seq])) for seq in tokens]
        meta = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor([self.lengths[seq] for seq in tokens], dtype=torch.int32),
            block_table=torch.tensor(table, dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            positions=torch.tensor(positions),
            max_seq_len=max(self.lengths[seq] for seq in tokens),
        )
        with torch.inference_mode():
            hidden = self.model.forward(torch.tensor([t for ids in tokens.values() for t in ids]), meta, self.caches)
            logits = self.model.compute_logits(hidden)
        return dict(zip(tokens, logits.split([len(ids) for ids in tokens.values()]), strict=True))

    def generate(self, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Greedy: prompt + generated ids, and the logits [len(prompt) + num_tokens - 1, vocab] on the way."""
        ids, seq = list(prompt), object()
        rows = [self.step({seq: prompt})[seq]]
        for _ in range(num_tokens - 1):
            ids.append(int(rows[-1][-1].argmax()))
            rows.append(self.step({seq: ids[-1:]})[seq])
        ids.append(int(rows[-1][-1].argmax()))
        return ids, torch.cat(rows)


@pytest.fixture
def driver_class():
    return PagedDriver


@pytest.fixture(scope="session")
def build_model():
    return build_transformers_model


@pytest.fixture
def load():
    """Loads a folder or file on the CPU."""

    def load_path(path: Path, dtype: torch.dtype = torch.float32, ops=None, **options):
        config = read_model_config(path)
        source = open_weights(path, config)
        return load_model(source, config, dtype, torch.device("cpu"), ops or ReferenceOps(), **options)

    return load_path


@pytest.fixture(scope="session", params=list(CASES))
def tiny(request, tmp_path_factory):
    """(name, transformers' model, folder where it is saved in several shards) of each architecture."""
    family, changes = CASES[request.param]
    model = build_transformers_model(family, **changes)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="60KB")
    return request.param, model, folder


@pytest.fixture
def prompt() -> list[int]:
    rng = random.Random(3)
    return [rng.randrange(101) for _ in range(24)]
