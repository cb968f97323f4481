/* Norms, activations, sums over sequences and the embedding lookup: rows in, rows out. Knows no model. */
#include "pool.h"
#include "op_calls.h"
#include "simd.h"

enum { INLINE_ELEMENTS = 1 << 14, TILE_ELEMENTS = 1 << 13 }; /* below the first one thread is faster than waking two */

typedef struct {
    const void *x, *weight, *bias;
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

/* ---- LayerNorm ------------------------------------------------------------------------------------------------- */

enum { PLAIN = 0, PRE_NORM = 1, POST_NORM = 2 }; /* kinds of llm_layer_norm, as Python passes them */

/* Sums over the fp32 row in VL lanes, then folded: of v - shift, and of its square. */
INLINE void moments(const float *row, int64_t n, float shift, float *sum, float *square) {
    vf sums = vf_set(0), squares = vf_set(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf v = vf_load(row + i) - shift;
        sums += v;
        squares += v * v;
    }
    *sum = vf_sum(sums), *square = vf_sum(squares);
    for (; i < n; i++) {
        float v = row[i] - shift;
        *sum += v;
        *square += v * v;
    }
}

INLINE void layer_norm_rows(const Rows *job, int tile, int dtype, int kind) {
    int64_t n = job->n, end = (tile + 1) * job->tile_rows;
    float *scratch = kind == PLAIN ? thread_scratch(0, sizeof(float) * (size_t)n) : NULL;
    const float *weight = job->weight, *bias = job->bias;
    for (int64_t row = tile * job->tile_rows; row < end && row < job->rows; row++) {
        float *v = kind == PLAIN ? scratch : (float *)job->residual + row * n, sum, square;
        int64_t base = row * n, i = 0;
        for (; i + VL <= n; i += VL) {
            vf x = vf_get(job->x, base + i, dtype);
            vf_store(v + i, kind == PLAIN ? x : vf_load(v + i) + x);
        }
        for (; i < n; i++) v[i] = kind == PLAIN ? f_get(job->x, base + i, dtype) : v[i] + f_get(job->x, base + i, dtype);
        moments(v, n, 0, &sum, &square);
        float mean = sum / (float)n;
        moments(v, n, mean, &sum, &square); /* a second pass: no difference of large squares */
        float scale = 1.0f / sqrtf(square / (float)n + job->eps);
        for (i = 0; i + VL <= n; i += VL) {
            vf y = (vf_load(v + i) - mean) * scale * vf_load(weight + i);
            if (bias) y += vf_load(bias + i);
            if (kind == POST_NORM) vf_store(v + i, y);
            if (job->out) vf_put(job->out, base + i, dtype, y);
        }
        for (; i < n; i++) {
            float y = (v[i] - mean) * scale * weight[i];
            if (bias) y += bias[i];
            if (kind == POST_NORM) v[i] = y;
            if (job->out) f_put(job->out, base + i, dtype, y);
        }
    }
}
#define LAYER_NORM_TILE(name, kind) \
    static void name(const void *arg, int tile) { \
        const Rows *job = arg; \
        job->dtype == F32 ? layer_norm_rows(job, tile, F32, kind) : layer_norm_rows(job, tile, BF16, kind); \
    }
LAYER_NORM_TILE(layer_norm_tile, PLAIN)
LAYER_NORM_TILE(pre_norm_tile, PRE_NORM)
LAYER_NORM_TILE(post_norm_tile, POST_NORM)

/* PLAIN: out = norm(x). With an fp32 residual, PRE_NORM: residual += x, out = norm(residual); POST_NORM: residual =
 * norm(residual + x), and out the same in x's dtype, unless it is NULL. `bias` may be NULL. */
EXPORT void llm_layer_norm(Pool *pool, const void *x, void *residual, const float *weight, const float *bias, void *out,
                           int64_t rows, int64_t n, float eps, int dtype, int kind) {
    static const TileFn tiles[] = {layer_norm_tile, pre_norm_tile, post_norm_tile};
    Rows job = {.x = x, .residual = residual, .weight = weight, .bias = bias, .out = out, .rows = rows, .n = n,
                .eps = eps, .dtype = dtype};
    run_rows(pool, tiles[kind], &job);
}

/* ---- activations ----------------------------------------------------------------------------------------------- */

INLINE vf gate_silu(vf g) { return g * vf_sigmoid(g); }
INLINE vf gate_gelu(vf g) { /* 0.5 (1 + tanh(u)) is sigmoid(2u) */
    return g * vf_sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));
}
/* g * 0.5 (1 + erf(g / sqrt 2)); erf by formula 7.1.26 of Abramowitz and Stegun, absolute error under 2e-7. */
INLINE vf gate_gelu_erf(vf g) {
    vf z = vf_abs(g) * 0.70710678f;
    vf t = 1.0f / (1.0f + 0.3275911f * z);
    vf p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vf tail = p * t * vf_exp2(z * z * -LOG2E) * 0.5f; /* of the normal distribution, beyond |g| */
    return g * vf_select(g < 0.0f, tail, 1.0f - tail);
}
INLINE vf activate_relu(vf x) { return vf_select(x < 0.0f, vf_set(0), x); }

INLINE void activate_rows(const Rows *job, int tile, int dtype, vf (*fn)(vf)) {
    int64_t n = job->n, end = (tile + 1) * job->tile_rows;
    for (int64_t row = tile * job->tile_rows; row < end && row < job->rows; row++) {
        int64_t base = row * n, i = 0;
        for (; i + VL <= n; i += VL) vf_put(job->out, base + i, dtype, fn(vf_get(job->out, base + i, dtype)));
        for (; i < n; i++) f_put(job->out, base + i, dtype, fn(vf_set(f_get(job->out, base + i, dtype)))[0]);
    }
}
#define ACTIVATE_TILE(name, fn) \
    static void name(const void *arg, int tile) { \
        const Rows *job = arg; \
        job->dtype == F32 ? activate_rows(job, tile, F32, fn) : activate_rows(job, tile, BF16, fn); \
    }
ACTIVATE_TILE(activate_gelu_tile, gate_gelu_erf)
ACTIVATE_TILE(activate_gelu_tanh_tile, gate_gelu)
ACTIVATE_TILE(activate_silu_tile, gate_silu)
ACTIVATE_TILE(activate_relu_tile, activate_relu)
ACTIVATE_TILE(activate_tanh_tile, vf_tanh)
ACTIVATE_TILE(activate_sigmoid_tile, vf_sigmoid)

/* x = f(x) in place; kinds as in Python's table: gelu, gelu_tanh, silu, relu, tanh, sigmoid. */
EXPORT void llm_activate(Pool *pool, void *x, int64_t rows, int64_t n, int dtype, int kind) {
    static const TileFn tiles[] = {activate_gelu_tile, activate_gelu_tanh_tile, activate_silu_tile,
                                   activate_relu_tile, activate_tanh_tile, activate_sigmoid_tile};
    Rows job = {.out = x, .rows = rows, .n = n, .dtype = dtype};
    run_rows(pool, tiles[kind], &job);
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

static void gelu_erf_tile(const void *arg, int tile) {
    const Rows *job = arg;
    job->dtype == F32 ? gate_rows(job, tile, F32, gate_gelu_erf) : gate_rows(job, tile, BF16, gate_gelu_erf);
}

/* x [rows, 2n] -> gate(x[:, :n]) * x[:, n:]; gates are 0 SiLU, 1 GELU by tanh, 2 GELU by erf. */
EXPORT void llm_gate_and_mul(Pool *pool, const void *x, void *out, int64_t rows, int64_t n, int dtype, int gate) {
    static const TileFn tiles[] = {silu_tile, gelu_tile, gelu_erf_tile};
    Rows job = {.x = x, .out = out, .rows = rows, .n = n, .dtype = dtype};
    run_rows(pool, tiles[gate], &job);
}

/* ---- sums over sequences --------------------------------------------------------------------------------------- */

typedef struct {
    const void *x;
    const float *weights;
    const int32_t *cu_seqlens;
    float *out;
    int64_t n;
    int dtype;
} SegmentSum;

static void segment_sum_task(const void *arg, int seq) {
    const SegmentSum *job = arg;
    int64_t n = job->n;
    float *out = job->out + seq * n;
    memset(out, 0, sizeof(float) * (size_t)n);
    for (int64_t row = job->cu_seqlens[seq]; row < job->cu_seqlens[seq + 1]; row++) {
        float weight = job->weights[row];
        int64_t i = 0;
        for (; i + VL <= n; i += VL) vf_store(out + i, vf_load(out + i) + weight * vf_get(job->x, row * n + i, job->dtype));
        for (; i < n; i++) out[i] += weight * f_get(job->x, row * n + i, job->dtype);
    }
}

/* out [num_seqs, n] fp32: the weighted sum of each sequence's rows, in their order. */
EXPORT void llm_segment_sum(Pool *pool, const void *x, const float *weights, const int32_t *cu_seqlens,
                            int64_t num_seqs, int64_t n, int dtype, float *out) {
    SegmentSum job = {.x = x, .weights = weights, .cu_seqlens = cu_seqlens, .out = out, .n = n, .dtype = dtype};
    pool_run(pool, segment_sum_task, &job, (int)num_seqs);
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
