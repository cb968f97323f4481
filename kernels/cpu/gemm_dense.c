/* Register-tile kernels of fp32, bf16 and int8 weights. Every output is one chain of dots over k in order: the same for
 * any number of rows and columns computed beside it. */
#include "gemm.h"

enum { MAX_R = 6, MAX_NT = VL == 16 ? 4 : 1 }; /* groups whose accumulators, times MAX_R, stay in registers */

#define GEMM_FOR_R(R, call) \
    switch (R) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    default: call(6); break; \
    }

/* `next` points to lanes that will be read soon: one line of it is fetched at each step, if there are
 * rows enough to hide it. */
INLINE void tile(const Gemm *g, int64_t row, int64_t group, const char *next, int R, int NT, int format) {
    const Weight *w = g->w;
    int64_t lanes = w->k * (format == FMT_F32 ? 4 : format == FMT_BF16 ? 2 : 1) / 4;
    const char *columns = w->data + group * lanes * GROUP * 4, *x = g->x + row * g->x_bytes;
    vf acc[MAX_R][MAX_NT * GV];
    vi sum[MAX_R][MAX_NT * GV]; /* of int8; apart, for gcc copies a vector that changes its type at every step */
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NT * GV; v++)
            if (format == FMT_INT8) sum[r][v] = vi_set(g->x_sums[row + r]);
            else acc[r][v] = vf_set(0);
    for (int64_t i = 0; i < lanes; i++) {
        vi b[MAX_NT * GV];
        for (int v = 0; v < NT * GV; v++)
            b[v] = vi_load(columns + (v / GV * lanes + i) * GROUP * 4 + v % GV * VL * 4);
        if (R > 3) prefetch_l2(next + i * GROUP * 4);
        for (int r = 0; r < R; r++) {
            vi a = vi_broadcast(x + r * g->x_bytes + i * 4);
            for (int v = 0; v < NT * GV; v++)
                if (format == FMT_INT8) sum[r][v] = dot_i8(sum[r][v], b[v], a);
                else acc[r][v] = format == FMT_F32 ? dot_f32(acc[r][v], a, b[v]) : dot_bf16(acc[r][v], a, b[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < NT; t++) {
            vf values[GV];
            for (int v = 0; v < GV; v++)
                values[v] = format != FMT_INT8 ? acc[r][t * GV + v]
                                               : __builtin_convertvector(sum[r][t * GV + v], vf) *
                                                     (vf_load(w->scales + (group + t) * GROUP + v * VL) *
                                                      g->x_scales[row + r]);
            gemm_store(g, row + r, group + t, values);
        }
}

/* Rows [row, end) times groups [group, group + count): a panel of MAX_NT groups comes from memory for the first rows
 * and from the cache for the others, which fetch the next panel meanwhile, a group each. With one or two tiles of rows
 * the hardware's own prefetching does better. */
INLINE void panels(const Gemm *g, int64_t row, int64_t end, int64_t group, int count, int format) {
    int64_t group_bytes = g->w->k * (format == FMT_F32 ? 4 : format == FMT_BF16 ? 2 : 1) * GROUP;
    int64_t num_tiles = (end - row + MAX_R - 1) / MAX_R;
    for (; count > 0; group += MAX_NT, count -= MAX_NT) {
        int NT = count < MAX_NT ? count : MAX_NT;
        int64_t first = row;
        for (int64_t t = 0; t < num_tiles; t++) {
            int R = (int)((end - first + num_tiles - t - 1) / (num_tiles - t));
            int ahead = num_tiles > 2 && t > 0 && t <= MAX_NT && MAX_NT + t <= count ? MAX_NT + (int)t - 1 : 0;
            const char *next = g->w->data + (group + ahead) * group_bytes;
#define ONE(n) tile(g, first, group, next, n, 1, format)
#define TWO(n) tile(g, first, group, next, n, 2, format)
#define THREE(n) tile(g, first, group, next, n, 3, format)
#define FOUR(n) tile(g, first, group, next, n, 4, format)
            if (MAX_NT == 1 || NT == 1) GEMM_FOR_R(R, ONE)
#if VL == 16
            else if (NT == 2) GEMM_FOR_R(R, TWO)
            else if (NT == 3) GEMM_FOR_R(R, THREE)
            else GEMM_FOR_R(R, FOUR)
#endif
            first += R;
        }
    }
}
void gemm_f32(const Gemm *g, int64_t row, int64_t end, int64_t group, int count) {
    panels(g, row, end, group, count, FMT_F32);
}
void gemm_bf16(const Gemm *g, int64_t row, int64_t end, int64_t group, int count) {
    panels(g, row, end, group, count, FMT_BF16);
}
void gemm_int8(const Gemm *g, int64_t row, int64_t end, int64_t group, int count) {
    panels(g, row, end, group, count, FMT_INT8);
}
