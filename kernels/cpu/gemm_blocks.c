/* Register-tile kernels of GGUF's block formats, computed as they lie: an exact integer dot for each block of 32,
 * then value += dot * (weight scale * activation scale) in fp32, block after block: one order for every batch. */
#include "gemm.h"

/* Two sets of accumulators must fit into the registers: 6 rows by 2 groups, or few rows by 4, to have chains enough. */
enum { MAX_NT = VL == 16 ? 4 : 1, TILE_NT = VL == 16 ? 2 : 1, TILE_R = VL == 16 ? 6 : 3, WIDE_R = 2 };

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

INLINE void tile(const Gemm *g, int64_t row, int64_t group, int R, int NT, int format) {
    int64_t blocks = g->w->k / QK, bytes = block_bytes(format);
    const char *x = g->x + row * g->x_bytes, *columns = g->w->data + group * blocks * bytes;
    const int32_t *x_sums = g->x_sums + row * blocks;
    const float *x_scales = g->x_scales + row * blocks;
    vf acc[TILE_R][MAX_NT * GV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NT * GV; v++) acc[r][v] = vf_set(0);
    for (int64_t b = 0; b < blocks; b++, x += QK) {
        const char *block[MAX_NT];
        vi sum[TILE_R][MAX_NT * GV];
        for (int t = 0; t < NT; t++) block[t] = columns + (t * blocks + b) * bytes;
        for (int r = 0; r < R; r++)
            for (int v = 0; v < NT * GV; v++)
                sum[r][v] = format == FMT_Q4_1 ? vi_set(0) : vi_set(x_sums[r * blocks + b]);
        for (int j = 0; j < 8; j++) {
            vi w[MAX_NT * GV];
            for (int v = 0; v < NT * GV; v++)
                w[v] = weight_lanes(block[v / GV] + (format == FMT_Q4_1 ? 64 : 32), j, v % GV, format);
            for (int r = 0; r < R; r++) {
                vi a = vi_broadcast(x + r * g->x_bytes + j * 4);
                for (int v = 0; v < NT * GV; v++) sum[r][v] = dot_i8(sum[r][v], w[v], a);
            }
        }
        for (int v = 0; v < NT * GV; v++) {
            const char *factors = block[v / GV] + v % GV * VL * 2;
            vf scale = vf_from_f16(vh_load(factors)), minimum = vf_set(0);
            if (format == FMT_Q4_1) minimum = vf_from_f16(vh_load(factors + 32));
            for (int r = 0; r < R; r++) {
                vf value = __builtin_convertvector(sum[r][v], vf) * scale;
                if (format == FMT_Q4_1) value += minimum * (float)x_sums[r * blocks + b];
                acc[r][v] += value * x_scales[r * blocks + b];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < NT; t++) gemm_store(g, row + r, group + t, acc[r] + t * GV);
}

INLINE void panels(const Gemm *g, int64_t row, int64_t end, int64_t group, int count, int format) {
    int64_t num_tiles = (end - row + TILE_R - 1) / TILE_R;
    int width = end - row <= WIDE_R ? MAX_NT : TILE_NT;
    while (count > 0) {
        int NT = count >= width ? width : count >= TILE_NT ? TILE_NT : 1;
        int64_t first = row;
        for (int64_t t = 0; t < num_tiles; t++) {
            int R = (int)((end - first + num_tiles - t - 1) / (num_tiles - t));
#define WIDE(n) tile(g, first, group, n, MAX_NT, format)
#define NARROW(n) tile(g, first, group, n, TILE_NT, format)
#define ONE(n) tile(g, first, group, n, 1, format)
            if (NT == TILE_NT) GEMM_FOR_R(R, NARROW)
            else if (NT == 1) GEMM_FOR_R(R, ONE)
            else if (R == 1) WIDE(1);
            else WIDE(2);
            first += R;
        }
        group += NT;
        count -= NT;
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
