/* x @ W^T + bias: quantises the activations where the format asks for it, cuts the output into tasks, runs them. */
#include "op_calls.h"

enum { BLOCK_ROWS = 96, MAX_GROUPS = 16 }; /* of one task: its part of x stays in L2, its part of W is read once */

static GemmKernel kernel_of(int format) {
    static const GemmKernel kernels[] = {gemm_f32, gemm_bf16, gemm_int8, gemm_q8_0, gemm_q4_0, gemm_q4_1};
    return kernels[format];
}

/* What was added to the weights to make them unsigned; of Q4_1 the minimum, a term of its own, wants the plain sum. */
static int32_t zero_point(int format) {
    return format == FMT_Q4_0 ? 8 : format == FMT_Q4_1 ? -1 : 128;
}

static void gemm_task(const void *arg, int task) {
    const Gemm *g = arg;
    int64_t group = task / g->row_tasks * g->groups_per_task, row = task % g->row_tasks * g->rows_per_task;
    int64_t end = row + g->rows_per_task < g->m ? row + g->rows_per_task : g->m;
    int count = (int)(g->groups - group < g->groups_per_task ? g->groups - group : g->groups_per_task);
    kernel_of(g->w->format)(g, row, end, group, count);
}

/* Task sizes that end together: the fewest group-steps of the busiest thread, the widest tasks among equals. */
static int plan(Gemm *g, int threads) {
    g->groups = (g->w->n + GROUP - 1) / GROUP;
    g->row_tasks = (g->m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    g->rows_per_task = (g->m + g->row_tasks - 1) / g->row_tasks;
    if (g->tile_rows) g->rows_per_task += (g->tile_rows - g->rows_per_task % g->tile_rows) % g->tile_rows;
    g->row_tasks = (g->m + g->rows_per_task - 1) / g->rows_per_task;
    int64_t best = INT64_MAX, tasks = 0;
    for (int size = MAX_GROUPS; size; size--) {
        int64_t count = (g->groups + size - 1) / size * g->row_tasks, cost = (count + threads - 1) / threads * size;
        if (cost < best) best = cost, tasks = count, g->groups_per_task = size;
    }
    return (int)tasks;
}

/* x [m, k] of dtype -> out [m, n] of out_dtype. `k` of x may be less than the weight's, which is padded with zeros, only
 * where x is quantised. */
EXPORT void llm_linear(Pool *pool, const Weight *w, const void *x, void *out, int64_t m, int64_t k, int dtype,
                       int out_dtype) {
    if (m == 0) return;
    Gemm g = {.w = w, .x = x, .out = out, .m = m, .dtype = out_dtype, .x_bytes = k * dtype_bytes(dtype)};
    if (w->format >= FMT_INT8) {
        g.tile_rows = w->format == FMT_INT8 ? 0 : block_tile_rows(m);
        int64_t spans = g.tile_rows ? w->k / QK * (m + g.tile_rows) : m;
        int8_t *bytes = thread_scratch(0, (size_t)((m + g.tile_rows) * w->k));
        float *scales = thread_scratch(1, sizeof(float) * (size_t)spans);
        int32_t *sums = thread_scratch(2, sizeof(int32_t) * (size_t)spans);
        quantize_rows(pool, x, m, k, w->k, g.tile_rows, -zero_point(w->format), dtype, bytes, scales, sums);
        g.x = (const char *)bytes, g.x_bytes = w->k, g.x_scales = scales, g.x_sums = sums;
    }
    int tasks = plan(&g, pool_threads(pool));
    pool_run(pool, gemm_task, &g, tasks);
}
