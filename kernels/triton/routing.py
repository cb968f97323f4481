"""Which experts each token goes to, and the rows of each: for mixtures of experts. Knows no matrices.

Shapes depend on the number of tokens alone and nothing waits for the device, so CUDA graphs hold these launches: a
program a token chooses (4 bytes an expert read), then a program an expert reads all choices, counts those of lesser
experts and lists its own, 8 * t * k bytes each from the L2 cache. No atomics: a place follows from the choices alone.
"""

import torch
import triton
import triton.language as tl

from llmserve.kernels.moe_ops import ExpertRows, Routing

_BLOCK = 1024


@triton.jit
def choose_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, scale, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, LANES: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid: tokens. The preferred expert first, the smaller id among equals; a NaN is chosen last."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    left = expert < NUM_EXPERTS
    logit = tl.load(logits_ptr + row * NUM_EXPERTS + expert, mask=left, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        raised = tl.exp(logit - tl.max(logit, axis=0))
        score = raised / tl.sum(raised, axis=0)
    wanted = score
    if HAS_BIAS:
        wanted += tl.load(bias_ptr + expert, mask=left, other=0.0)
    wanted = tl.where(wanted == wanted, wanted, float("-inf"))
    lane = tl.arange(0, LANES)
    weights = tl.zeros([LANES], tl.float32)
    total = 0.0
    for choice in tl.static_range(TOP_K):
        best = tl.max(tl.where(left, wanted, float("-inf")), axis=0)
        chosen = tl.min(tl.where(left & (wanted == best), expert, EXPERTS), axis=0)
        weight = tl.sum(tl.where(expert == chosen, score, 0.0), axis=0)
        tl.store(ids_ptr + row * TOP_K + choice, chosen)
        weights = tl.where(lane == choice, weight, weights)
        total += weight
        left = left & (expert != chosen)
    if RENORMALIZE:
        weights = weights / (total + 1e-20)
    tl.store(weights_ptr + row * TOP_K + lane, weights * scale, mask=lane < TOP_K)


@triton.jit(do_not_specialize=["num_assignments"])
def sort_kernel(
    ids_ptr, order_ptr, source_ptr, places_ptr, offsets_ptr, num_assignments, NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: experts. A stable sort of the assignments by expert."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lesser = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_assignments, BLOCK):
        chosen = tl.load(ids_ptr + start + lane, mask=start + lane < num_assignments, other=NUM_EXPERTS)
        lesser += (chosen < expert).to(tl.int32)
    place = tl.sum(lesser, axis=0)
    tl.store(offsets_ptr + expert, place.to(tl.int64))
    for start in range(0, num_assignments, BLOCK):
        assignment = start + lane
        chosen = tl.load(ids_ptr + assignment, mask=assignment < num_assignments, other=NUM_EXPERTS)
        mine = chosen == expert
        count = tl.cumsum(mine.to(tl.int32), axis=0)
        at = place + count - 1
        tl.store(order_ptr + at, assignment.to(tl.int64), mask=mine)
        tl.store(source_ptr + at, (assignment // TOP_K).to(tl.int64), mask=mine)
        tl.store(places_ptr + assignment, at.to(tl.int64), mask=mine)
        place += tl.max(count, axis=0)
    if expert == NUM_EXPERTS - 1:
        tl.store(offsets_ptr + NUM_EXPERTS, place.to(tl.int64))


def route(logits: torch.Tensor, routing: Routing, correction_bias: torch.Tensor | None) -> ExpertRows:
    """As `MoEOps.route`."""
    (num_rows, num_experts), top_k, device = logits.shape, routing.top_k, logits.device
    size = num_rows * top_k
    ids = torch.empty(size, dtype=torch.int32, device=device)
    weights = torch.empty((num_rows, top_k), dtype=torch.float32, device=device)
    order, source_rows, places = (torch.empty(size, dtype=torch.int64, device=device) for _ in range(3))
    offsets = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
    if num_rows:
        padded = triton.next_power_of_2(num_experts)
        choose_kernel[(num_rows,)](
            logits.contiguous(), weights if correction_bias is None else correction_bias, ids, weights, routing.scale,
            NUM_EXPERTS=num_experts, EXPERTS=padded, TOP_K=top_k, LANES=triton.next_power_of_2(top_k),
            SIGMOID=routing.scoring == "sigmoid", RENORMALIZE=routing.renormalize,
            HAS_BIAS=correction_bias is not None, num_warps=1,
        )  # fmt: skip
    sort_kernel[(num_experts,)](
        ids, order, source_rows, places, offsets, size, NUM_EXPERTS=num_experts, TOP_K=top_k, BLOCK=_BLOCK, num_warps=4
    )
    return ExpertRows(weights=weights, order=order, source_rows=source_rows, places=places, offsets=offsets)
