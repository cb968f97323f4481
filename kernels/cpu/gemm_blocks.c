/* Register-tile kernels of GGUF's block formats, computed as they lie: an exact integer dot for each block of 32,
 * then value += dot * (weight scale * activation scale) in fp32, block after block: one order for every batch. */
#include "gemm.h"

/* Two sets of accumulators must fit into the registers: many rows by one group, or fewer by two, which loads less. */
enum { WIDE = VL == 16 ? 2 : 1, WIDE_R = VL == 16 ? 6 : 3, MAX_R = VL == 16 ? 12 : 3 };
enum { AHEAD = 2048 }; /* bytes between what is computed and what is fetched from memory */

int64_t block_tile_rows(int64_t m) { return m <= MAX_R ? m : WIDE_R; }

/* Bytes of one block of 16 columns. */
INLINE int64_t block_bytes(int format) {
    return format == FMT_Q8_0 ? 32 + QK * 16 : format == FMT_Q4_0 ? 32 + QK * 8 : 64 + QK * 8;
}
/* Lane j of a block's 8, of columns v * VL .. */
INLINE vi weight_lanes(const char *quants, int j, int v, int format) {
    if (format == FMT_Q8_0) return vi_load(quants + j * 64 + v * VL * 4);
    vu packed = (vu)vi_load(quants + (j % 4) * 64 + v * VL * 4);
    return (vi)((j < 4 ? packed : packed >> 4) & 0x0f0f0f0f);
}

/* R rows from `row`, the first of a panel of x, times NT groups; meanwhile fetches as many bytes from `next` on. */
INLINE void tile(const Gemm *g, int64_t row, int64_t group, const char *next, int R, int NT, int format) {
    int64_t blocks = g->w->k / QK, bytes = block_bytes(format), step = g->tile_rows;
    const char *columns = g->w->data + group * blocks * bytes, *x = g->x + row * blocks * QK;
    const int32_t *x_sums = g->x_sums + row * blocks;
    const float *x_scales = g->x_scales + row * blocks;
    vf acc[MAX_R][WIDE * GV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NT * GV; v++) acc[r][v] = vf_set(0);
    for (int64_t b = 0; b < blocks; b++, x += step * QK, x_sums += step, x_scales += step, columns += bytes) {
        vi sum[MAX_R][WIDE * GV];
        for (int64_t i = 0; i < NT * bytes; i += 64) prefetch(next + i);
        next += NT * bytes;
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NT * GV; v++) sum[r][v] = format == FMT_Q4_1 ? vi_set(0) : vi_set(x_sums[r]);
        for (int j = 0; j < 8; j++) {
            vi w[WIDE * GV];
            for (int v = 0; v < NT * GV; v++)
                w[v] = weight_lanes(columns + v / GV * blocks * bytes + (format == FMT_Q4_1 ? 64 : 32), j, v % GV, format);
            for (int r = 0; r < R; r++) {
                vi a = vi_broadcast(x + r * QK + j * 4);
                for (int v = 0; v < NT * GV; v++) sum[r][v] = dot_i8(sum[r][v], w[v], a);
            }
        }
        for (int v = 0; v < NT * GV; v++) {
            const char *factors = columns + v / GV * blocks * bytes + v % GV * VL * 2;
            vf scale = vf_from_f16(vh_load(factors)), minimum = vf_set(0);
            if (format == FMT_Q4_1) minimum = vf_from_f16(vh_load(factors + 32));
            for (int r = 0; r < R; r++) {
                vf value = __builtin_convertvector(sum[r][v], vf) * scale;
                if (format == FMT_Q4_1) value += minimum * (float)x_sums[r];
                acc[r][v] += value * x_scales[r];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < NT; t++) gemm_store(g, row + r, group + t, acc[r] + t * GV);
}

/* A group comes from memory for the first rows, fetched a little ahead; the other rows find it in the cache, and fetch
 * the following one meanwhile. */
INLINE void panels(const Gemm *g, int64_t row, int64_t end, int64_t group, int count, int format) {
    int64_t group_bytes = g->w->k / QK * block_bytes(format);
    for (int NT = g->m > MAX_R ? WIDE : 1; count > 0; group += NT, count -= NT) {
        if (NT > count) NT = 1;
        const char *here = g->w->data + group * group_bytes, *next = here + AHEAD;
        for (int64_t first = row; first < end; first += g->tile_rows, next = here + NT * group_bytes) {
            int R = (int)(end - first < g->tile_rows ? end - first : g->tile_rows);
#define ONE(n) case n: tile(g, first, group, next, n, 1, format); break;
#define TWO(n) case n: tile(g, first, group, next, n, 2, format); break;
#if VL == 16
            if (NT == 2) switch (R) { TWO(1) TWO(2) TWO(3) TWO(4) TWO(5) TWO(6) }
            else switch (R) {
                ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) ONE(11) ONE(12)
            }
#else
            switch (R) { ONE(1) ONE(2) ONE(3) }
#endif
        }
    }
}
void gemm_q8_0(const Gemm *g, int64_t row, int64_t end, int64_t group, int count) {
    panels(g, row, end, group, count, FMT_Q8_0);
}
void gemm_q4_0(const Gemm *g, int64_t row, int64_t end, int64_t group, int count) {
    panels(g, row, end, group, count, FMT_Q4_0);
}
void gemm_q4_1(const Gemm *g, int64_t row, int64_t end, int64_t group, int count) {
    panels(g, row, end, group, count, FMT_Q4_1);
}
