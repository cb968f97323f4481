/* What the GEMM driver, its kernels and the quantiser of activations tell each other. */
#pragma once
#include "pool.h"
#include "simd.h"

/* Formats of a packed weight matrix [n, k]. Columns of W^T are stored in groups of 16, group after group:
 *   FMT_F32, FMT_BF16, FMT_INT8: [k * bytes / 4][16] lanes of 1 float, 2 bf16 or 4 bytes (signed weight + 128)
 *   FMT_Q8_0, FMT_Q4_0, FMT_Q4_1: blocks of 32 along k, each 16 fp16 scales (Q4_1: and 16 fp16 minima), then lanes of 4
 *   unsigned bytes [8][16]; with 4 bits [4][16], whose low halves are lanes 0..3 and high halves lanes 4..7 */
enum { FMT_F32 = F32, FMT_BF16 = BF16, FMT_INT8, FMT_Q8_0, FMT_Q4_0, FMT_Q4_1 };

typedef struct {
    const char *data;
    const float *scales; /* [n, rounded up to 16] of FMT_INT8, else NULL */
    const float *bias;   /* [n, rounded up to 16] or NULL */
    int64_t n, k;        /* k as packed */
    int format;
} Weight;

enum { QK = 32 };

typedef struct {
    const Weight *w;
    /* As the kernel reads it: [m, k] fp32, bf16 or (FMT_INT8) signed bytes; for the block formats signed bytes in panels
     * of rows, [m / tile_rows][k / 32][tile_rows][32], so that within a tile every address is a constant away. The last
     * panel has room for as many rows as the others. */
    const char *x;
    int64_t x_bytes, tile_rows; /* of a row; of a panel */
    const float *x_scales; /* quantised x: [m] (FMT_INT8) or as the panels, a scale for 32 bytes */
    const int32_t *x_sums; /* sums of the bytes those scales belong to, times minus the weights' zero point */
    char *out;             /* [m, n] */
    int dtype;             /* of out */
    int64_t m, rows_per_task, groups_per_task, row_tasks, groups;
} Gemm;

/* Rows [row, end) times groups [group, group + count). */
typedef void (*GemmKernel)(const Gemm *g, int64_t row, int64_t end, int64_t group, int count);
void gemm_f32(const Gemm *g, int64_t row, int64_t end, int64_t group, int count);
void gemm_bf16(const Gemm *g, int64_t row, int64_t end, int64_t group, int count);
void gemm_int8(const Gemm *g, int64_t row, int64_t end, int64_t group, int count);
void gemm_q8_0(const Gemm *g, int64_t row, int64_t end, int64_t group, int count);
void gemm_q4_0(const Gemm *g, int64_t row, int64_t end, int64_t group, int count);
void gemm_q4_1(const Gemm *g, int64_t row, int64_t end, int64_t group, int count);

/* Rows that the kernels of block formats compute together, where there are m. */
int64_t block_tile_rows(int64_t m);

/* x [m, k] of dtype -> bytes in panels of tile_rows, with a scale and a sum for every 32 (see Gemm); tile_rows 0: bytes
 * [m, k_packed], with a scale and a sum a row. The sums are multiplied by `factor`. */
void quantize_rows(Pool *pool, const void *x, int64_t m, int64_t k, int64_t k_packed, int64_t tile_rows, int32_t factor,
                   int dtype, int8_t *out, float *scales, int32_t *sums);

/* One row of a finished group: values + bias -> out, in its dtype; the last group may be partly padding. */
INLINE void gemm_store(const Gemm *g, int64_t row, int64_t group, const vf *values) {
    int64_t column = group * GROUP, at = row * g->w->n + column;
    vf v[GV];
    for (int i = 0; i < GV; i++) v[i] = g->w->bias ? values[i] + vf_load(g->w->bias + column + i * VL) : values[i];
    if (column + GROUP <= g->w->n) {
        for (int i = 0; i < GV; i++) vf_put(g->out, at + i * VL, g->dtype, v[i]);
        return;
    }
    char tail[GROUP * 4];
    for (int i = 0; i < GV; i++) vf_put(tail, i * VL, g->dtype, v[i]);
    memcpy(g->out + at * dtype_bytes(g->dtype), tail, (size_t)((g->w->n - column) * dtype_bytes(g->dtype)));
}


