/* Attention of a few query rows over one tile of keys: scores, online softmax, weighted values. Knows no cache, no batch.
 *
 * Keys and values lie in groups of 16 tokens, made of 32-bit lanes (1 float or 2 bf16) as in kv_layout.h. A row's
 * arithmetic does not depend on the rows computed with it; masked keys have weight exactly 0 and change nothing.
 */
#pragma once
#include "simd.h"

enum { TILE = 64, TILE_GROUPS = TILE / GROUP, TASK_ROWS = 48, MAX_R = 6 };
enum { QK_GROUPS = VL == 16 ? TILE_GROUPS : 1, PV_VECTORS = VL == 16 ? 4 : 2 }; /* what the registers hold */
#define EMPTY -1e30f /* the maximum of no scores: finite, so that no -inf - -inf arises */

/* How a dot product becomes a score. `scale` leads to what tanh is taken of, or straight to exponents of 2. */
typedef struct { float scale, soft_cap; } Scoring;
INLINE Scoring scoring(float scale, float soft_cap) {
    return (Scoring){.scale = soft_cap != 0 ? scale / soft_cap : scale * LOG2E, .soft_cap = soft_cap};
}

/* Rows of one sequence and head, in order. Row r sees the keys first[r] .. last[r]; neither ever decreases. To the
 * score of key j is added bias[r][j], where there is a bias: its memory reaches to the end of the last key's tile. */
typedef struct {
    const char *q[TASK_ROWS];
    char *out[TASK_ROWS];
    int64_t first[TASK_ROWS], last[TASK_ROWS];
    const float *bias[TASK_ROWS];
} TaskRows;

/* State of the rows of a task: maximum, sum in VL lanes [rows][VL], and the unnormalised output [rows][d]. */
typedef struct { float *m, *l, *o; } Softmax;

/* Where a tile's keys lie: 4 groups of 16 tokens. */
typedef struct { const char *k[TILE_GROUPS], *v[TILE_GROUPS]; int64_t first; } Keys;

INLINE vi lane_ids(void) {
    int32_t ids[VL];
    for (int i = 0; i < VL; i++) ids[i] = i;
    return vi_load(ids);
}
INLINE vf dot(vf acc, vi a, vi b, int dtype) { return dtype == F32 ? dot_f32(acc, a, b) : dot_bf16(acc, a, b); }

/* scores[r][16 * count] = q[r] . k for `count` groups of keys from `g`; every sum runs over the head's elements in
 * order. The next tile's keys are fetched meanwhile: blocks lie anywhere, so the hardware cannot guess them. */
INLINE void query_key(const char *const *q, const Keys *keys, const Keys *next, int g, int count, int64_t lanes, int R,
                      int dtype, float (*scores)[TILE]) {
    vf acc[MAX_R][QK_GROUPS * GV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < count * GV; v++) acc[r][v] = vf_set(0);
    for (int64_t i = 0; i < lanes; i++) {
        vi key[QK_GROUPS * GV];
        for (int v = 0; v < count * GV; v++) key[v] = vi_load(keys->k[g + v / GV] + (i * 16 + v % GV * VL) * 4);
        for (int x = 0; x < count; x++) prefetch(next->k[g + x] + i * 64);
        for (int r = 0; r < R; r++) {
            vi query = vi_broadcast(q[r] + i * 4);
            for (int v = 0; v < count * GV; v++) acc[r][v] = dot(acc[r][v], query, key[v], dtype);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < count * GV; v++) vf_store(scores[r] + g * 16 + v * VL, acc[r][v]);
}

/* Scores of one row times log2 e, soft-capped, biased and masked, in place; returns their maximum. */
INLINE float scale_and_mask(Scoring job, float *scores, int width, int64_t key0, const TaskRows *rows, int row) {
    int64_t first = rows->first[row], last = rows->last[row];
    const float *bias = rows->bias[row];
    int masked = first > key0 || last < key0 + width - 1;
    vf max = vf_set(EMPTY);
    for (int i = 0; i < width; i += VL) {
        vf s = vf_load(scores + i) * job.scale;
        if (job.soft_cap != 0) s = vf_tanh(s) * (job.soft_cap * LOG2E);
        if (bias) s += vf_load(bias + key0 + i) * LOG2E;
        if (masked) {
            vi key = lane_ids() + (int32_t)(key0 + i);
            s = vf_select((key > (int32_t)last) | (key < (int32_t)first), vf_set(-INFINITY), s);
        }
        vf_store(scores + i, s);
        max = vf_max(s, max);
    }
    return vf_hmax(max);
}

/* Online softmax of R rows: scores -> weights of dtype; old[r] is what the state so far is to be scaled by. */
INLINE void softmax_rows(Scoring job, float (*scores)[TILE], int width, int64_t key0, const TaskRows *rows, int row,
                         Softmax state, int R, int dtype, char (*weights)[TILE * 4], float *old) {
    float new_m[MAX_R], change[2 * VL > 8 ? 2 * VL : 8] = {0}, factors[2 * VL > 8 ? 2 * VL : 8];
    for (int r = 0; r < R; r++) {
        float max = scale_and_mask(job, scores[r], width, key0, rows, row + r), m = state.m[row + r];
        new_m[r] = max > m ? max : m;
        change[r] = m - new_m[r];
    }
    for (int i = 0; i < R; i += VL) vf_store(factors + i, vf_exp2(vf_load(change + i)));
    for (int r = 0; r < R; r++) {
        vf sum = vf_load(state.l + (row + r) * VL) * factors[r];
        for (int i = 0; i < width; i += VL) {
            vf p = vf_exp2(vf_load(scores[r] + i) - new_m[r]);
            sum += p;
            vf_put(weights[r], i, dtype, p);
        }
        vf_store(state.l + (row + r) * VL, sum);
        state.m[row + r] = new_m[r];
        old[r] = factors[r];
    }
}

/* o[r] = o[r] * old[r] + weights[r] . V over `steps` lanes of keys, VECTORS vectors of the head at element e.
 * `tail_mask` blanks the key after the last one, which shares its lane and may be another request's garbage. */
INLINE void weigh_values(float *o, int64_t d, int64_t e, const float *old, const char (*weights)[TILE * 4],
                         const Keys *keys, const Keys *next, int64_t steps, int32_t tail_mask, int R, int vectors,
                         int dtype) {
    int64_t group_steps = dtype == F32 ? GROUP : GROUP / 2;
    vf acc[MAX_R][PV_VECTORS];
    for (int r = 0; r < R; r++)
        for (int x = 0; x < vectors; x++) acc[r][x] = vf_load(o + r * d + e + x * VL) * old[r];
    for (int64_t i = 0; i < steps; i++) {
        int64_t offset = (i % group_steps * d + e) * 4;
        const char *lanes = keys->v[i / group_steps] + offset;
        for (int x = 0; x < vectors * VL; x += 16) prefetch(next->v[i / group_steps] + offset + x * 4);
        vi value[PV_VECTORS];
        for (int x = 0; x < vectors; x++) value[x] = vi_load(lanes + x * VL * 4);
        if (dtype == BF16 && i == steps - 1)
            for (int x = 0; x < vectors; x++) value[x] &= tail_mask;
        for (int r = 0; r < R; r++) {
            vi weight = vi_broadcast(weights[r] + i * 4);
            for (int x = 0; x < vectors; x++) acc[r][x] = dot(acc[r][x], weight, value[x], dtype);
        }
    }
    for (int r = 0; r < R; r++)
        for (int x = 0; x < vectors; x++) vf_store(o + r * d + e + x * VL, acc[r][x]);
}

/* One tile of keys for R rows from `row`. */
INLINE void attend_tile(Scoring job, const TaskRows *rows, int row, const Keys *keys, const Keys *next, int64_t d,
                        Softmax state, int R, int dtype) {
    int64_t e = 0, num_keys = rows->last[row + R - 1] + 1 - keys->first, lanes = d * dtype_bytes(dtype) / 4;
    if (num_keys <= 0 || rows->first[row] >= keys->first + TILE) return; /* the tile is masked for all these rows */
    if (num_keys > TILE) num_keys = TILE;
    _Alignas(64) float scores[MAX_R][TILE];
    _Alignas(64) char weights[MAX_R][TILE * 4];
    float old[MAX_R];
    int groups = (int)(num_keys + GROUP - 1) / GROUP, g = 0;
    for (; g + QK_GROUPS <= groups; g += QK_GROUPS)
        query_key(rows->q + row, keys, next, g, QK_GROUPS, lanes, R, dtype, scores);
    for (; g < groups; g++) query_key(rows->q + row, keys, next, g, 1, lanes, R, dtype, scores);
    softmax_rows(job, scores, groups * GROUP, keys->first, rows, row, state, R, dtype, weights, old);
    int64_t steps = dtype == F32 ? num_keys : (num_keys + 1) / 2;
    int32_t tail_mask = num_keys % 2 ? 0xffff : -1;
    float *o = state.o + row * d;
    for (; e + PV_VECTORS * VL <= d; e += PV_VECTORS * VL)
        weigh_values(o, d, e, old, weights, keys, next, steps, tail_mask, R, PV_VECTORS, dtype);
    for (; e + 2 * VL <= d; e += 2 * VL) weigh_values(o, d, e, old, weights, keys, next, steps, tail_mask, R, 2, dtype);
    for (; e < d; e += VL) weigh_values(o, d, e, old, weights, keys, next, steps, tail_mask, R, 1, dtype);
}

#define FOR_R(call) \
    switch (R) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    default: call(6); break; \
    }

INLINE void attend_rows(Scoring job, const TaskRows *rows, int num_rows, const Keys *keys, const Keys *next, int64_t d,
                        Softmax state, int dtype) {
    int blocks = (num_rows + MAX_R - 1) / MAX_R;
    for (int b = 0, row = 0; b < blocks; b++, next = keys) { /* the first block of rows fetches the next tile */
        int R = (num_rows - row + blocks - b - 1) / (blocks - b);
#define CALL(n) attend_tile(job, rows, row, keys, next, d, state, n, dtype)
        FOR_R(CALL)
#undef CALL
        row += R;
    }
}

/* One tile of keys for all rows of a task. */
static void attend(Scoring job, const TaskRows *rows, int num_rows, const Keys *keys, const Keys *next, int64_t d,
                   Softmax state, int dtype) {
    if (dtype == F32) attend_rows(job, rows, num_rows, keys, next, d, state, F32);
    else attend_rows(job, rows, num_rows, keys, next, d, state, BF16);
}

INLINE void clear(Softmax state, int rows, int64_t d) {
    for (int r = 0; r < rows; r++) state.m[r] = EMPTY;
    memset(state.l, 0, sizeof(float) * (size_t)rows * VL);
    memset(state.o, 0, sizeof(float) * (size_t)rows * (size_t)d);
}

INLINE void write_row(char *out, int64_t d, Softmax state, int r, int dtype) {
    float inverse = 1.0f / vf_sum(vf_load(state.l + r * VL));
    for (int64_t i = 0; i < d; i += VL) vf_put(out, i, dtype, vf_load(state.o + r * d + i) * inverse);
}

INLINE int64_t state_floats(int64_t d) { return TASK_ROWS * (d + 1 + VL); }
INLINE Softmax state_at(float *memory, int64_t d) {
    return (Softmax){.o = memory, .l = memory + TASK_ROWS * d, .m = memory + TASK_ROWS * (d + VL)};
}
