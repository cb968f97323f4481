/* Activations to signed bytes, symmetric, one scale a token or a block of 32: never a scale over several tokens. */
#include "gemm.h"

typedef int8_t vb __attribute__((vector_size(VL)));
typedef struct {
    const void *x;
    int64_t m, k, k_packed, block, rows_per_tile;
    int32_t factor;
    int dtype;
    int8_t *out;
    float *scales;
    int32_t *sums;
} Quantize;

/* n elements -> bytes, round to nearest even. A NaN or an infinity makes the scale NaN, and with it every result. */
INLINE void quantize_span(const void *x, int64_t at, int64_t n, int32_t factor, int dtype, int8_t *out, float *scale,
                         int32_t *sum) {
    vf max = vf_set(0), poison = vf_set(0);
    float tail_max = 0, tail_poison = 0;
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf v = vf_get(x, at + i, dtype);
        max = vf_max(vf_abs(v), max);
        poison += v * 0.0f;
    }
    for (; i < n; i++) {
        float v = fabsf(f_get(x, at + i, dtype));
        tail_max = v > tail_max ? v : tail_max;
        tail_poison += v * 0.0f;
    }
    float top = vf_hmax(max);
    top = (top > tail_max ? top : tail_max) + vf_sum(poison) + tail_poison;
    float inverse = top > 1e-35f ? 127.0f / top : 0.0f; /* smaller is taken as zero; NaN compares false */
    const float magic = 12582912.0f;                    /* 1.5 * 2^23: adding it rounds to an integer */
    vi total = vi_set(0);
    for (i = 0; i + VL <= n; i += VL) {
        vi q = (vi)(vf_get(x, at + i, dtype) * inverse + magic) - 0x4b400000;
        vb bytes = __builtin_convertvector(q, vb);
        total += __builtin_convertvector(bytes, vi);
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
    int64_t span = job->block ? job->block : job->k, spans = job->k / span;
    int8_t *out = job->out + row * job->k_packed;
    for (int64_t s = 0; s < spans; s++)
        quantize_span(job->x, row * job->k + s * span, span, job->factor, dtype, out + s * span, job->scales + row * spans + s,
                      job->sums + row * spans + s);
    memset(out + job->k, 0, (size_t)(job->k_packed - job->k));
}
static void quantize_tile(const void *arg, int tile) {
    const Quantize *job = arg;
    int64_t end = (tile + 1) * job->rows_per_tile;
    for (int64_t row = tile * job->rows_per_tile; row < end && row < job->m; row++)
        job->dtype == F32 ? quantize_row(job, row, F32) : quantize_row(job, row, BF16);
}

void quantize_rows(Pool *pool, const void *x, int64_t m, int64_t k, int64_t k_packed, int64_t block, int32_t factor,
                   int dtype, int8_t *out, float *scales, int32_t *sums) {
    Quantize job = {.x = x, .m = m, .k = k, .k_packed = k_packed, .block = block, .factor = factor, .dtype = dtype,
                    .out = out, .scales = scales, .sums = sums, .rows_per_tile = 1 + (1 << 14) / k};
    pool_run(pool, quantize_tile, &job, (int)((m + job.rows_per_tile - 1) / job.rows_per_tile));
}
