/* Bidirectional attention within each sequence of a packed batch, straight from the fused qkv projection.
 *
 * A task is one head of one sequence: it packs the keys and values into groups once, then attends all query rows to
 * them. Tiles of keys stand at fixed positions of the sequence, so a sequence's result is the same in any batch.
 */
#include "attention_tile.h"
#include "pool.h"

typedef struct {
    const char *qkv; /* [t, 3, heads, d] */
    char *out;       /* [t, heads, d] */
    const int32_t *cu_seqlens;
    const float *bias; /* [heads, 2 * bias_span - 1], by key - query + bias_span - 1; or NULL */
    int64_t heads, d, window, bias_span;
    int dtype;
    Scoring scoring;
} PackedAttention;

/* Groups of 16 keys: lane i of the 16 stands together. Keys beyond the sequence are zeros. */
INLINE void pack_keys(const char *k, int64_t stride, int64_t n, int64_t lanes, char *packed) {
    for (int64_t key = 0; key < n; key += GROUP, packed += lanes * 64) {
        int count = n - key < GROUP ? (int)(n - key) : GROUP;
        const char *rows[GROUP];
        for (int t = 0; t < GROUP; t++) rows[t] = k + (key + (t < count ? t : 0)) * stride;
        for (int64_t i = 0; i < lanes; i++)
            for (int t = 0; t < GROUP; t++) memcpy(packed + (i * 16 + t) * 4, rows[t] + i * 4, 4);
        for (int64_t i = 0; count < GROUP && i < lanes; i++)
            memset(packed + (i * 16 + count) * 4, 0, (size_t)(GROUP - count) * 4);
    }
}

/* fp32: rows as they are. bf16: a lane is an element of two neighbouring keys; the last key's neighbour is zero. */
INLINE void pack_values(const char *v, int64_t stride, int64_t n, int64_t d, int dtype, char *packed) {
    if (dtype == F32) {
        for (int64_t key = 0; key < n; key++) memcpy(packed + key * d * 4, v + key * stride, (size_t)d * 4);
        return;
    }
    for (int64_t key = 0; key < n; key += 2)
        for (int64_t e = 0; e < d; e += VL) {
            vu even = __builtin_convertvector(vh_load(v + key * stride + e * 2), vu), odd = {0};
            if (key + 1 < n) odd = __builtin_convertvector(vh_load(v + (key + 1) * stride + e * 2), vu);
            vu lanes = even | (odd << 16);
            memcpy(packed + (key / 2 * d + e) * 4, &lanes, sizeof lanes);
        }
}

typedef struct { const char *k, *v; int64_t n, group_bytes; } Packed;

/* The tile of keys from `first`; groups beyond the sequence are never looked at. */
static Keys tile_at(const Packed *keys, int64_t first) {
    Keys tile = {.first = first};
    for (int g = 0; g < TILE_GROUPS; g++) {
        int64_t group = first / GROUP + g;
        if (group * GROUP >= keys->n) group = first / GROUP;
        tile.k[g] = keys->k + group * keys->group_bytes;
        tile.v[g] = keys->v + group * keys->group_bytes;
    }
    return tile;
}

/* bias_row[j - i], j a key and i a query of a sequence of n: a copy, so that whole vectors may be read at its end. */
static const float *relative_bias(const PackedAttention *job, int64_t head, int64_t n) {
    if (!job->bias) return NULL;
    float *row = thread_scratch(2, sizeof(float) * (size_t)(2 * n - 1 + TILE));
    const float *from = job->bias + head * (2 * job->bias_span - 1) + job->bias_span - n;
    memcpy(row, from, sizeof(float) * (size_t)(2 * n - 1));
    memset(row + 2 * n - 1, 0, sizeof(float) * TILE);
    return row + n - 1;
}

static void attend_queries(const PackedAttention *job, const Packed *keys, const TaskRows *rows, int num_rows,
                           Softmax state) {
    clear(state, num_rows, job->d);
    int64_t end = rows->last[num_rows - 1] + 1;
    for (int64_t first = rows->first[0] / TILE * TILE; first < end; first += TILE) {
        Keys tile = tile_at(keys, first), next = first + TILE < end ? tile_at(keys, first + TILE) : tile;
        attend(job->scoring, rows, num_rows, &tile, &next, job->d, state, job->dtype);
    }
    for (int r = 0; r < num_rows; r++) write_row(rows->out[r], job->d, state, r, job->dtype);
}

static void packed_attention_task(const void *arg, int task) {
    const PackedAttention *job = arg;
    int64_t head = task % job->heads, start = job->cu_seqlens[task / job->heads];
    int64_t n = job->cu_seqlens[task / job->heads + 1] - start, d = job->d, bytes = dtype_bytes(job->dtype);
    int64_t stride = 3 * job->heads * d * bytes, part = job->heads * d * bytes;
    int64_t packed_bytes = (n + GROUP - 1) / GROUP * GROUP * d * bytes;
    const char *q = job->qkv + start * stride + head * d * bytes;
    char *memory = thread_scratch(1, (size_t)(2 * packed_bytes));
    Packed keys = {.k = memory, .v = memory + packed_bytes, .n = n, .group_bytes = GROUP * d * bytes};
    pack_keys(q + part, stride, n, d * bytes / 4, memory);
    pack_values(q + 2 * part, stride, n, d, job->dtype, memory + packed_bytes);
    const float *bias = relative_bias(job, head, n);
    Softmax state = state_at(thread_scratch(0, sizeof(float) * (size_t)state_floats(d)), d);
    TaskRows rows;
    for (int64_t row0 = 0; row0 < n; row0 += TASK_ROWS) {
        int num_rows = (int)(n - row0 < TASK_ROWS ? n - row0 : TASK_ROWS);
        for (int r = 0; r < num_rows; r++) {
            int64_t i = row0 + r;
            rows.q[r] = q + i * stride;
            rows.out[r] = job->out + ((start + i) * job->heads + head) * d * bytes;
            rows.first[r] = job->window && i > job->window ? i - job->window : 0;
            rows.last[r] = job->window && i + job->window < n ? i + job->window : n - 1;
            rows.bias[r] = bias ? bias - i : NULL;
        }
        attend_queries(job, &keys, &rows, num_rows, state);
    }
}

/* qkv [t, 3 * heads * d] -> out [t, heads * d]. A window w > 0 leaves keys at most w away from their query. */
EXPORT void llm_packed_attention(Pool *pool, const void *qkv, const int32_t *cu_seqlens, int64_t num_seqs,
                                 int64_t heads, int64_t d, float scale, int64_t window, const float *bias,
                                 int64_t bias_span, int dtype, void *out) {
    PackedAttention job = {.qkv = qkv, .out = out, .cu_seqlens = cu_seqlens, .bias = bias, .heads = heads, .d = d,
                           .window = window, .bias_span = bias_span, .dtype = dtype, .scoring = scoring(scale, 0)};
    pool_run(pool, packed_attention_task, &job, (int)(num_seqs * heads));
}
