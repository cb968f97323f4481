/* Activations to signed bytes, symmetric, one scale a token or a block of 32: never a scale over several tokens. */
#include "gemm.h"

enum { TASK_ELEMENTS = 1 << 13 }; /* some 2 us */
typedef int8_t vb __attribute__((vector_size(VL)));
typedef struct {
    const void *x;
    int64_t m, k, k_packed, tile_rows, rows_per_task; /* tile_rows: of a panel of blocks; 0: one span a row */
    int32_t factor;
    int dtype;
    int8_t *out;
    float *scales;
    int32_t *sums;
} Quantize;

/* The largest magnitude of n elements; NaN if one of them is NaN or infinite. Compared as integers, which orders the
 * magnitudes of floats and puts those two last. */
INLINE float magnitude(const void *x, int64_t at, int64_t n, int dtype) {
    const int32_t infinity = 0x7f800000;
    vi max = vi_set(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) max = vi_max((vi)vf_abs(vf_get(x, at + i, dtype)), max);
    int32_t top = vi_hmax(max);
    for (; i < n; i++) {
        float v = fabsf(f_get(x, at + i, dtype));
        int32_t bits;
        memcpy(&bits, &v, 4);
        top = bits > top ? bits : top;
    }
    float value;
    memcpy(&value, &top, 4);
    return top < infinity ? value : NAN;
}

/* n elements -> bytes, round to nearest even. A NaN or an infinity makes the scale NaN, and with it every result. */
INLINE void quantize_span(const void *x, int64_t at, int64_t n, int32_t factor, int dtype, int8_t *out, float *scale,
                         int32_t *sum) {
    float top = magnitude(x, at, n, dtype);
    float inverse = top > 1e-35f ? 127.0f / top : 0.0f; /* smaller is taken as zero; NaN compares false */
    const float magic = 12582912.0f;                    /* 1.5 * 2^23: adding it rounds to an integer */
    vi total = vi_set(0);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vi q = (vi)(vf_get(x, at + i, dtype) * inverse + magic) - 0x4b400000;
        vb bytes = __builtin_convertvector(q, vb);
        total += q;
        memcpy(out + i, &bytes, sizeof bytes);
    }
    int32_t bytes_sum = vi_sum(total);
    for (; i < n; i++) {
        float shifted = f_get(x, at + i, dtype) * inverse + magic;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        out[i] = (int8_t)(bits - 0x4b400000);
        bytes_sum += out[i];
    }
    *sum = bytes_sum * factor;
    *scale = top * (1.0f / 127.0f);
}

INLINE void quantize_row(const Quantize *job, int64_t row, int dtype) {
    if (job->tile_rows) { /* spans whose length the compiler knows stay in two registers */
        int64_t spans = job->k / QK, at = row / job->tile_rows * job->tile_rows * spans + row % job->tile_rows;
        for (int64_t s = 0; s < spans; s++, at += job->tile_rows)
            quantize_span(job->x, row * job->k + s * QK, QK, job->factor, dtype, job->out + at * QK, job->scales + at,
                          job->sums + at);
        return;
    }
    int8_t *out = job->out + row * job->k_packed;
    quantize_span(job->x, row * job->k, job->k, job->factor, dtype, out, job->scales + row, job->sums + row);
    memset(out + job->k, 0, (size_t)(job->k_packed - job->k));
}
static void quantize_task(const void *arg, int task) {
    const Quantize *job = arg;
    int64_t end = (task + 1) * job->rows_per_task;
    for (int64_t row = task * job->rows_per_task; row < end && row < job->m; row++)
        job->dtype == F32 ? quantize_row(job, row, F32) : quantize_row(job, row, BF16);
}

void quantize_rows(Pool *pool, const void *x, int64_t m, int64_t k, int64_t k_packed, int64_t tile_rows, int32_t factor,
                   int dtype, int8_t *out, float *scales, int32_t *sums) {
    int64_t tasks = (m * k + TASK_ELEMENTS - 1) / TASK_ELEMENTS, rows_per_task = (m + tasks - 1) / tasks;
    if (tile_rows) rows_per_task += (tile_rows - rows_per_task % tile_rows) % tile_rows; /* whole panels */
    Quantize job = {.x = x, .m = m, .k = k, .k_packed = k_packed, .tile_rows = tile_rows, .factor = factor,
                    .dtype = dtype, .out = out, .scales = scales, .sums = sums, .rows_per_task = rows_per_task};
    pool_run(pool, quantize_task, &job, (int)((m + rows_per_task - 1) / rows_per_task));
}
