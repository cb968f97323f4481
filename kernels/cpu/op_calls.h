/* The ops as other C files call them. Shapes and meanings stand where they are defined. */
#pragma once
#include "gemm.h"
#include "kv_layout.h"

EXPORT void llm_linear(Pool *pool, const Weight *w, const void *x, void *out, int64_t m, int64_t k, int dtype,
                       int out_dtype);
EXPORT void llm_rms_norm(Pool *pool, const void *x, void *residual, const void *weight, void *out, int64_t rows,
                         int64_t n, float eps, int dtype);
EXPORT void llm_gate_and_mul(Pool *pool, const void *x, void *out, int64_t rows, int64_t n, int dtype, int gelu);
EXPORT void llm_rotary_and_cache(Pool *pool, const void *qkv, const float *cos_sin, const KVCache *kv,
                                 const StepMeta *meta, int64_t num_heads, const void *q_norm, const void *k_norm,
                                 float eps, void *q_out);
EXPORT void llm_paged_attention(Pool *pool, const void *q, const KVCache *kv, const StepMeta *meta, int64_t num_heads,
                                float scale, int64_t window, float soft_cap, const float *sinks, void *out);
