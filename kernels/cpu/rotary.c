/* Splits qkv, norms and rotates q and k, writes k and v into their blocks: one pass over a step's new tokens. */
#include "kv_layout.h"
#include "op_calls.h"
#include "pool.h"

enum { TILE_TOKENS = 8, MAX_HEAD_DIM = 256 };

typedef struct {
    const void *qkv;
    const float *cos_sin;
    const KVCache *kv;
    const StepMeta *meta;
    const void *q_norm, *k_norm;
    void *q_out;
    int64_t num_heads, tile_tokens;
    float eps;
} Rotary;

/* head[0:d] of dtype -> fp32, normed if `norm` is given, rotated: element i pairs with i + d/2. */
INLINE void rotate_head(const void *x, int64_t base, const void *norm, const float *cos_sin, int64_t d, float eps,
                        int dtype, float *out) {
    int64_t half = d / 2;
    vf square = vf_set(0);
    for (int64_t i = 0; i < d; i += VL) {
        vf v = vf_get(x, base + i, dtype);
        square += v * v;
        vf_store(out + i, v);
    }
    if (norm) {
        float scale = 1.0f / sqrtf(vf_sum(square) / (float)d + eps);
        for (int64_t i = 0; i < d; i += VL) vf_store(out + i, vf_load(out + i) * scale * vf_get(norm, i, F32));
    }
    int64_t i = 0;
    for (; i + VL <= half; i += VL) {
        vf c = vf_load(cos_sin + i), s = vf_load(cos_sin + half + i);
        vf a = vf_load(out + i), b = vf_load(out + half + i);
        vf_store(out + i, a * c - b * s);
        vf_store(out + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float c = cos_sin[i], s = cos_sin[half + i], a = out[i], b = out[half + i];
        out[i] = a * c - b * s;
        out[half + i] = b * c + a * s;
    }
}

INLINE void write_k(const KVCache *kv, int64_t slot, int64_t head, const float *k, int dtype) {
    int64_t token = slot % kv->block_size, d = kv->head_dim;
    char *group = k_group(kv, slot / kv->block_size, head, token & ~(int64_t)15);
    uint32_t *lanes = (uint32_t *)group + (token & 15);
    if (dtype == F32) {
        for (int64_t i = 0; i < d; i++) memcpy(lanes + i * 16, k + i, 4);
        return;
    }
    uint16_t rounded[MAX_HEAD_DIM];
    for (int64_t i = 0; i < d; i += VL) vf_put(rounded, i, BF16, vf_load(k + i));
    for (int64_t i = 0; i < d / 2; i++) memcpy(lanes + i * 16, rounded + 2 * i, 4);
}

INLINE void write_v(const KVCache *kv, int64_t slot, int64_t head, const void *v, int64_t base, int dtype) {
    int64_t token = slot % kv->block_size, d = kv->head_dim;
    if (dtype == F32) {
        memcpy(v_group(kv, slot / kv->block_size, head, token), (const float *)v + base, (size_t)d * 4);
        return;
    }
    uint16_t *lanes = (uint16_t *)v_group(kv, slot / kv->block_size, head, token & ~(int64_t)1) + (token & 1);
    for (int64_t i = 0; i < d; i++) lanes[2 * i] = ((const uint16_t *)v)[base + i];
}

INLINE void rotary_tokens(const Rotary *job, int tile, int dtype) {
    const KVCache *kv = job->kv;
    int64_t d = kv->head_dim, kv_heads = kv->num_kv_heads, heads = job->num_heads;
    int64_t end = (tile + 1) * job->tile_tokens;
    _Alignas(64) float head[MAX_HEAD_DIM];
    for (int64_t t = tile * job->tile_tokens; t < end && t < job->meta->num_tokens; t++) {
        const float *cos_sin = job->cos_sin + job->meta->positions[t] * d;
        int64_t row = t * (heads + 2 * kv_heads) * d, slot = job->meta->slot_mapping[t];
        for (int64_t h = 0; h < heads; h++) {
            rotate_head(job->qkv, row + h * d, job->q_norm, cos_sin, d, job->eps, dtype, head);
            for (int64_t i = 0; i < d; i += VL) vf_put(job->q_out, (t * heads + h) * d + i, dtype, vf_load(head + i));
        }
        if (slot < 0) continue; /* padding */
        for (int64_t h = 0; h < kv_heads; h++) {
            rotate_head(job->qkv, row + (heads + h) * d, job->k_norm, cos_sin, d, job->eps, dtype, head);
            write_k(kv, slot, h, head, dtype);
            write_v(kv, slot, h, job->qkv, row + (heads + kv_heads + h) * d, dtype);
        }
    }
}
static void rotary_tile(const void *arg, int tile) {
    const Rotary *job = arg;
    job->kv->dtype == F32 ? rotary_tokens(job, tile, F32) : rotary_tokens(job, tile, BF16);
}

EXPORT void llm_rotary_and_cache(Pool *pool, const void *qkv, const float *cos_sin, const KVCache *kv,
                                 const StepMeta *meta, int64_t num_heads, const void *q_norm, const void *k_norm,
                                 float eps, void *q_out) {
    Rotary job = {.qkv = qkv, .cos_sin = cos_sin, .kv = kv, .meta = meta, .q_norm = q_norm, .k_norm = k_norm,
                  .q_out = q_out, .num_heads = num_heads, .tile_tokens = TILE_TOKENS, .eps = eps};
    if (meta->num_tokens <= TILE_TOKENS) {
        job.tile_tokens = meta->num_tokens;
        rotary_tile(&job, 0);
        return;
    }
    pool_run(pool, rotary_tile, &job, (int)((meta->num_tokens + TILE_TOKENS - 1) / TILE_TOKENS));
}

typedef struct {
    char *qkv;
    const float *cos_sin;
    const int64_t *positions;
    int64_t tokens, heads, d;
    int dtype;
} RotaryPacked;

INLINE void rotate_packed(const RotaryPacked *job, int64_t token, int dtype) {
    _Alignas(64) float head[MAX_HEAD_DIM];
    const float *cos_sin = job->cos_sin + job->positions[token] * job->d;
    for (int64_t h = 0; h < 2 * job->heads; h++) {
        int64_t at = (token * 3 * job->heads + h) * job->d;
        rotate_head(job->qkv, at, NULL, cos_sin, job->d, 0, dtype, head);
        for (int64_t i = 0; i < job->d; i += VL) vf_put(job->qkv, at + i, dtype, vf_load(head + i));
    }
}
static void rotary_packed_tile(const void *arg, int tile) {
    const RotaryPacked *job = arg;
    for (int64_t t = tile * TILE_TOKENS; t < (tile + 1) * TILE_TOKENS && t < job->tokens; t++)
        job->dtype == F32 ? rotate_packed(job, t, F32) : rotate_packed(job, t, BF16);
}

/* Rotates q and k of qkv [tokens, 3, heads, d] in place. */
EXPORT void llm_rotary_packed(Pool *pool, void *qkv, const float *cos_sin, const int64_t *positions, int64_t tokens,
                              int64_t heads, int64_t d, int dtype) {
    RotaryPacked job = {.qkv = qkv, .cos_sin = cos_sin, .positions = positions, .tokens = tokens, .heads = heads,
                        .d = d, .dtype = dtype};
    pool_run(pool, rotary_packed_tile, &job, (int)((tokens + TILE_TOKENS - 1) / TILE_TOKENS));
}
