/* Norms, gated activations and the embedding lookup: rows in, rows out. Knows no model. */
#include "pool.h"
#include "simd.h"

enum { INLINE_ELEMENTS = 1 << 14, TILE_ELEMENTS = 1 << 13 }; /* below the first one thread is faster than waking two */

typedef struct {
    const void *x, *weight;
    void *residual, *out;
    int64_t rows, n, tile_rows;
    float eps;
    int dtype;
} Rows;

static void run_rows(Pool *pool, TileFn fn, Rows *job) {
    if (job->rows * job->n <= INLINE_ELEMENTS) {
        job->tile_rows = job->rows;
        fn(job, 0);
        return;
    }
    job->tile_rows = job->n < TILE_ELEMENTS ? TILE_ELEMENTS / job->n : 1;
    pool_run(pool, fn, job, (int)((job->rows + job->tile_rows - 1) / job->tile_rows));
}

/* x*x summed over a row in VL lanes, then folded: the order depends on n alone. With an fp32 residual, x is added to it
 * first and the sum is squared. */
INLINE float add_and_square(const void *x, float *residual, int64_t base, int64_t n, int dtype) {
    vf sum = vf_set(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf v = vf_get(x, base + i, dtype);
        if (residual) {
            v += vf_load(residual + base + i);
            vf_store(residual + base + i, v);
        }
        sum += v * v;
    }
    float total = vf_sum(sum);
    for (; i < n; i++) {
        float v = f_get(x, base + i, dtype);
        if (residual) v = residual[base + i] += v;
        total += v * v;
    }
    return total;
}

INLINE void norm_rows(const Rows *job, int tile, int dtype, int add) {
    int64_t n = job->n, end = (tile + 1) * job->tile_rows;
    for (int64_t row = tile * job->tile_rows; row < end && row < job->rows; row++) {
        int64_t base = row * n, i = 0;
        float square = add_and_square(job->x, add ? job->residual : NULL, base, n, dtype);
        const void *x = add ? job->residual : job->x;
        int x_dtype = add ? F32 : dtype;
        float scale = 1.0f / sqrtf(square / (float)n + job->eps);
        for (; i + VL <= n; i += VL)
            vf_put(job->out, base + i, dtype, vf_get(x, base + i, x_dtype) * scale * vf_get(job->weight, i, F32));
        for (; i < n; i++)
            f_put(job->out, base + i, dtype, f_get(x, base + i, x_dtype) * scale * f_get(job->weight, i, F32));
    }
}
static void norm_tile(const void *arg, int tile) {
    const Rows *job = arg;
    if (job->dtype == F32) job->residual ? norm_rows(job, tile, F32, 1) : norm_rows(job, tile, F32, 0);
    else job->residual ? norm_rows(job, tile, BF16, 1) : norm_rows(job, tile, BF16, 0);
}

/* out = rms_norm(x) * weight; with an fp32 residual: residual += x in place, out = rms_norm(residual) * weight. */
EXPORT void llm_rms_norm(Pool *pool, const void *x, void *residual, const void *weight, void *out, int64_t rows,
                         int64_t n, float eps, int dtype) {
    Rows job = {.x = x, .residual = residual, .weight = weight, .out = out, .rows = rows, .n = n, .eps = eps,
                .dtype = dtype};
    run_rows(pool, norm_tile, &job);
}

INLINE vf gate_silu(vf g) { return g * vf_sigmoid(g); }
INLINE vf gate_gelu(vf g) { /* 0.5 (1 + tanh(u)) is sigmoid(2u) */
    return g * vf_sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
}
INLINE void gate_rows(const Rows *job, int tile, int dtype, vf (*gate)(vf)) {
    int64_t n = job->n, end = (tile + 1) * job->tile_rows;
    for (int64_t row = tile * job->tile_rows; row < end && row < job->rows; row++) {
        int64_t in = row * 2 * n, i = 0;
        for (; i + VL <= n; i += VL)
            vf_put(job->out, row * n + i, dtype,
                   gate(vf_get(job->x, in + i, dtype)) * vf_get(job->x, in + n + i, dtype));
        for (; i < n; i++) {
            float g = gate(vf_set(f_get(job->x, in + i, dtype)))[0];
            f_put(job->out, row * n + i, dtype, g * f_get(job->x, in + n + i, dtype));
        }
    }
}
static void silu_tile(const void *arg, int tile) {
    const Rows *job = arg;
    job->dtype == F32 ? gate_rows(job, tile, F32, gate_silu) : gate_rows(job, tile, BF16, gate_silu);
}
static void gelu_tile(const void *arg, int tile) {
    const Rows *job = arg;
    job->dtype == F32 ? gate_rows(job, tile, F32, gate_gelu) : gate_rows(job, tile, BF16, gate_gelu);
}

/* x [rows, 2n] -> gate(x[:, :n]) * x[:, n:], gate SiLU or tanh-GELU. */
EXPORT void llm_gate_and_mul(Pool *pool, const void *x, void *out, int64_t rows, int64_t n, int dtype, int gelu) {
    Rows job = {.x = x, .out = out, .rows = rows, .n = n, .dtype = dtype};
    run_rows(pool, gelu ? gelu_tile : silu_tile, &job);
}

/* out[i] = table[ids[i]], rows of row_bytes. Returns the index of the first id outside the table, or -1. */
EXPORT int64_t llm_embedding(const int64_t *ids, int64_t num_ids, const char *table, int64_t vocab, int64_t row_bytes,
                             char *out) {
    for (int64_t i = 0; i < num_ids; i++) {
        if (ids[i] < 0 || ids[i] >= vocab) return i;
        memcpy(out + i * row_bytes, table + ids[i] * row_bytes, (size_t)row_bytes);
    }
    return -1;
}
