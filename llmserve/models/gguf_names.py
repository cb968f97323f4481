"""What GGUF calls the tensors that Hugging Face has other names for, as llama.cpp's converter does. Reads no bytes."""

from __future__ import annotations

import re
from dataclasses import replace

from llmserve.gguf_file import TensorInfo
from llmserve.models.config import ModelConfig, MoEConfig

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
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
_GGUF_NORM_NAMES = {"post_attention_layernorm": "ffn_norm"}
_GGUF_POST_NORM_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERT_PARTS = "gate|up|down"


def split_experts(tensor: TensorInfo) -> list[TensorInfo]:
    """blk.3.ffn_up_exps.weight [e, n, hidden] -> blk.3.ffn_up.0.weight and so on, the names older files have; any other
    tensor as it is."""
    match = re.fullmatch(rf"(blk\.\d+\.ffn_(?:{_EXPERT_PARTS}))_exps\.weight", tensor.name)
    if match is None or len(tensor.shape) != 3:
        return [tensor]
    num_experts = tensor.shape[0]
    expert_bytes = tensor.nbytes // num_experts
    return [
        replace(
            tensor,
            name=f"{match[1]}.{expert}.weight",
            shape=tensor.shape[1:],
            offset=tensor.offset + expert * expert_bytes,
        )
        for expert in range(num_experts)
    ]


def hugging_face_name(gguf_name: str, config: ModelConfig) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; an unknown name stays as it is."""
    stem, _, kind = gguf_name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if layer is None:
        names, part, prefix = _GGUF_NAMES, stem, ""
    else:
        names = _GGUF_LAYER_NAMES | (_GGUF_POST_NORM_NAMES if config.post_norms else _GGUF_NORM_NAMES)
        part, prefix = layer[2], f"model.layers.{layer[1]}."
        if config.moe is not None and (found := _expert_name(part, config.moe)) is not None:
            return f"{prefix}{found}.{kind}"
    for hugging_face, ggml in names.items():
        if ggml == part:
            return f"{prefix}{hugging_face}.{kind}"
    return gguf_name


def _expert_name(part: str, moe: MoEConfig) -> str | None:
    """Of a mixture's parts: router, shared expert and its gate, and the experts one by one."""
    fixed = {"ffn_gate_inp": moe.names.router, "ffn_gate_inp_shexp": f"{moe.shared_name}_gate"}
    if part in fixed:
        return fixed[part]
    shared = re.fullmatch(rf"ffn_({_EXPERT_PARTS})_shexp", part)
    if shared is not None:
        return f"{moe.shared_name}.{shared[1]}_proj"
    expert = re.fullmatch(rf"ffn_({_EXPERT_PARTS})\.(\d+)", part)
    if expert is None:
        return None
    names = {"gate": moe.names.gate, "up": moe.names.up, "down": moe.names.down}
    return f"{moe.names.expert.format(expert[2])}.{names[expert[1]]}"
