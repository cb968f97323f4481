"""Writes GGUF files as llama.cpp's converter does, from transformers' models: what tests of several rooms load."""

from __future__ import annotations

import re

import gguf
import numpy as np
import torch

Q = gguf.GGMLQuantizationType
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES |= {
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "experts.gate_proj": "ffn_gate_exps",
    "experts.up_proj": "ffn_up_exps",
    "experts.down_proj": "ffn_down_exps",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    stem, _, kind = name.rpartition(".")
    names = GEMMA_NAMES if arch.startswith("gemma") else NAMES
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names[part]}.{kind}"
    return f"{names[stem]}.{kind}"


def permute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py: rows of a head from halves to neighbouring pairs."""
    rows = values.shape[0]
    return values.reshape(num_heads, 2, rows // num_heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def stack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices of all experts of a layer as one tensor [e, out, in]."""
    mixtral = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    stacked: dict[str, list[torch.Tensor]] = {}
    out = {}
    for name in sorted(tensors, key=lambda name: [int(t) if t.isdigit() else t for t in name.split(".")]):
        match = re.fullmatch(r"(model\.layers\.\d+)\..*experts\.\d+\.(\w+)\.weight", name)
        if match is None:
            out[name] = tensors[name]
        else:
            part = f"{match[1]}.experts.{mixtral.get(match[2], match[2])}.weight"
            stacked.setdefault(part, []).append(tensors[name])
    return out | {name: torch.stack(experts) for name, experts in stacked.items()}


def write_gguf(
    path,
    model,
    tensors,
    arch: str,
    quantisation: Q,
    factors: np.ndarray | None = None,
    exceptions: dict[str, Q] | None = None,
) -> None:
    """The weights `tensors` of a model of transformers; matrices whose name holds a key of `exceptions` are of that
    type, the others of `quantisation`."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    theta = config.rope_parameters.get("rope_theta") or config.rope_parameters["full_attention"]["rope_theta"]
    writer.add_rope_freq_base(theta)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    writer.add_token_list(["<unk>", "<s>", "</s>", "<|im_end|>"] + [f"t{i}" for i in range(97)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    num_experts = getattr(config, "num_local_experts", getattr(config, "num_experts", 0))
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for name, tensor in stack_experts(tensors).items():
        values = tensor.numpy()
        if arch == "llama" and ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        kind = next((kind for part, kind in (exceptions or {}).items() if part in name), quantisation)
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        is_matrix = values.ndim > 1 and "mlp.gate." not in name and "moe.gate." not in name
        kind = kind if is_matrix else Q.F32
        writer.add_tensor(gguf_name(name, arch), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
