"""Writes a model folder in the shape of Llama 3.2 1B with random weights, so that nothing is tuned to one size.

    python -m benchmarks.peers.made_up FOLDER
    python -m benchmarks.peers run --model FOLDER --concurrency 1,8 llmserve:q8_0 llama.cpp:q8_0

Layers, heads and rotary settings are that model's. Vocabulary and tokenizer are the embedded model's, for the load
generator and the GGUF writer need one that is at hand: 1.07 billion weights in place of 1.24. Takes 2.1 GB on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmserve.repository import embedded

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2048, 8192, 16, 32, 8, 64
MATRICES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = ("input_layernorm", "post_attention_layernorm")


def write(folder: Path) -> None:
    """A file a layer: never more than one is in memory."""
    source = embedded.fetch(embedded.DEFAULT_LLM)
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        if "index" not in path.name:
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).bfloat16()

    weight_map: dict[str, str] = {}
    for number in range(LAYERS + 1):
        prefix = f"model.layers.{number}."
        tensors = {f"{prefix}{name}.weight": torch.ones(HIDDEN).bfloat16() for name in NORMS}
        tensors |= {f"{prefix}{name}.weight": matrix(*shape) for name, shape in MATRICES.items()}
        if number == LAYERS:
            tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], HIDDEN)}
            tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
        name = f"model-{number + 1:05}-of-{LAYERS + 1:05}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
