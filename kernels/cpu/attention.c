/* Causal attention over a paged cache for ragged batches of prompt chunks and decode tokens alike.
 *
 * Bit-invariance: a query row's sums run over key tiles of TILE tokens at absolute positions, tiles are gathered into
 * partitions of PART tokens at absolute positions (online softmax within, each from an empty state), and partitions
 * are merged in order. Work may be cut between threads at row or partition borders, rows may be computed together or
 * alone: the arithmetic of a row is the same. Masked keys have weight exactly 0 and change nothing.
 */
#include "kv_layout.h"
#include "pool.h"

enum { TILE = 64, PART = 512, TILE_GROUPS = TILE / GROUP, TASK_ROWS = 48, MAX_R = 6 };
enum { QK_GROUPS = VL == 16 ? TILE_GROUPS : 1, PV_VECTORS = VL == 16 ? 4 : 2 }; /* what the registers hold */
#define EMPTY -1e30f /* the maximum of no scores: finite, so that no -inf - -inf arises */

typedef struct {
    const char *q;
    char *out;
    const KVCache *kv;
    const StepMeta *meta;
    int64_t num_heads, group; /* query heads, and of them those that share a kv head */
    int64_t window;
    float scale, soft_cap; /* scale: of scores to what tanh is taken of, or straight to exponents of 2 */
    const struct Task *tasks;
    float *partials; /* a state for each task, where partitions are computed apart */
} Attention;

/* Rows row0.. of one sequence and one kv head; row = query token * group + head. Partitions [part0, part1). */
typedef struct Task {
    int32_t seq, head, row0, rows, part0, part1;
    int32_t partial; /* index into partials, or -1: this task covers every partition and writes the output */
} Task;

/* State of the rows of a task: maximum, sum in VL lanes [rows][VL], and the unnormalised output [rows][d]. */
typedef struct { float *m, *l, *o; } Softmax;

typedef struct {
    const char *q[TASK_ROWS];
    char *out[TASK_ROWS];
    int64_t pos[TASK_ROWS];
} TaskRows;

static void locate_rows(const Attention *job, const Task *task, TaskRows *rows) {
    int64_t start = job->meta->query_start_loc[task->seq];
    int64_t query_len = job->meta->query_start_loc[task->seq + 1] - start;
    int64_t first_pos = job->meta->seq_lens[task->seq] - query_len;
    int64_t head_bytes = job->kv->head_dim * dtype_bytes(job->kv->dtype);
    for (int r = 0; r < task->rows; r++) {
        int64_t token = (task->row0 + r) / job->group, head = task->head * job->group + (task->row0 + r) % job->group;
        int64_t offset = ((start + token) * job->num_heads + head) * head_bytes;
        rows->q[r] = job->q + offset;
        rows->out[r] = job->out + offset;
        rows->pos[r] = first_pos + token;
    }
}

/* Where a tile's keys lie: 4 groups of 16 tokens. */
typedef struct { const char *k[TILE_GROUPS], *v[TILE_GROUPS]; int64_t first; } Keys;

INLINE vi lane_ids(void) {
    int32_t ids[VL];
    for (int i = 0; i < VL; i++) ids[i] = i;
    return vi_load(ids);
}
INLINE vf dot(vf acc, vi a, vi b, int dtype) { return dtype == F32 ? dot_f32(acc, a, b) : dot_bf16(acc, a, b); }

/* scores[r][TILE] = q[r] . k for one tile; every sum runs over the head's elements in order. The next tile's keys are
 * fetched meanwhile: blocks lie anywhere, so the hardware cannot guess them. */
INLINE void query_key(const char *const *q, const Keys *keys, const Keys *next, int64_t lanes, int R, int dtype,
                      float (*scores)[TILE]) {
    for (int g = 0; g < TILE_GROUPS; g += QK_GROUPS) {
        vf acc[MAX_R][QK_GROUPS * GV];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < QK_GROUPS * GV; v++) acc[r][v] = vf_set(0);
        for (int64_t i = 0; i < lanes; i++) {
            vi key[QK_GROUPS * GV];
            for (int v = 0; v < QK_GROUPS * GV; v++) key[v] = vi_load(keys->k[g + v / GV] + (i * 16 + v % GV * VL) * 4);
            for (int x = 0; x < QK_GROUPS; x++) prefetch(next->k[g + x] + i * 64);
            for (int r = 0; r < R; r++) {
                vi query = vi_broadcast(q[r] + i * 4);
                for (int v = 0; v < QK_GROUPS * GV; v++) acc[r][v] = dot(acc[r][v], query, key[v], dtype);
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < QK_GROUPS * GV; v++) vf_store(scores[r] + g * 16 + v * VL, acc[r][v]);
    }
}

/* Scores of one row times log2 e, soft-capped and masked, in place; returns their maximum. */
INLINE float scale_and_mask(const Attention *job, float *scores, int64_t key0, int64_t pos) {
    int64_t first = job->window && pos >= job->window ? pos - job->window + 1 : 0;
    int masked = first > key0 || pos < key0 + TILE - 1;
    vf max = vf_set(EMPTY);
    for (int i = 0; i < TILE; i += VL) {
        vf s = vf_load(scores + i) * job->scale;
        if (job->soft_cap != 0) s = vf_tanh(s) * (job->soft_cap * LOG2E);
        if (masked) {
            vi key = lane_ids() + (int32_t)(key0 + i);
            s = vf_select((key > (int32_t)pos) | (key < (int32_t)first), vf_set(-INFINITY), s);
        }
        vf_store(scores + i, s);
        max = vf_max(s, max);
    }
    return vf_hmax(max);
}

/* Online softmax of R rows: scores -> weights of dtype; old[r] is what the state so far is to be scaled by. */
INLINE void softmax_rows(const Attention *job, float (*scores)[TILE], int64_t key0, const int64_t *pos, Softmax state,
                         int row, int R, int dtype, char (*weights)[TILE * 4], float *old) {
    float new_m[MAX_R], change[2 * VL > 8 ? 2 * VL : 8] = {0}, factors[2 * VL > 8 ? 2 * VL : 8];
    for (int r = 0; r < R; r++) {
        float max = scale_and_mask(job, scores[r], key0, pos[r]), m = state.m[row + r];
        new_m[r] = max > m ? max : m;
        change[r] = m - new_m[r];
    }
    for (int i = 0; i < R; i += VL) vf_store(factors + i, vf_exp2(vf_load(change + i)));
    for (int r = 0; r < R; r++) {
        vf sum = vf_load(state.l + (row + r) * VL) * factors[r];
        for (int i = 0; i < TILE; i += VL) {
            vf p = vf_exp2(vf_load(scores[r] + i) - new_m[r]);
            sum += p;
            vf_put(weights[r], i, dtype, p);
        }
        vf_store(state.l + (row + r) * VL, sum);
        state.m[row + r] = new_m[r];
        old[r] = factors[r];
    }
}

/* o[r] = o[r] * old[r] + weights[r] . V over `steps` lanes of keys, VECTORS vectors of the head at element e.
 * `tail_mask` blanks the key after the last one, which shares its lane and may be another request's garbage. */
INLINE void weigh_values(float *o, int64_t d, int64_t e, const float *old, const char (*weights)[TILE * 4],
                         const Keys *keys, const Keys *next, int64_t steps, int32_t tail_mask, int R, int vectors,
                         int dtype) {
    int64_t group_steps = dtype == F32 ? GROUP : GROUP / 2;
    vf acc[MAX_R][PV_VECTORS];
    for (int r = 0; r < R; r++)
        for (int x = 0; x < vectors; x++) acc[r][x] = vf_load(o + r * d + e + x * VL) * old[r];
    for (int64_t i = 0; i < steps; i++) {
        int64_t offset = (i % group_steps * d + e) * 4;
        const char *lanes = keys->v[i / group_steps] + offset;
        for (int x = 0; x < vectors * VL; x += 16) prefetch(next->v[i / group_steps] + offset + x * 4);
        vi value[PV_VECTORS];
        for (int x = 0; x < vectors; x++) value[x] = vi_load(lanes + x * VL * 4);
        if (dtype == BF16 && i == steps - 1)
            for (int x = 0; x < vectors; x++) value[x] &= tail_mask;
        for (int r = 0; r < R; r++) {
            vi weight = vi_broadcast(weights[r] + i * 4);
            for (int x = 0; x < vectors; x++) acc[r][x] = dot(acc[r][x], weight, value[x], dtype);
        }
    }
    for (int r = 0; r < R; r++)
        for (int x = 0; x < vectors; x++) vf_store(o + r * d + e + x * VL, acc[r][x]);
}

/* One tile of keys for R rows from `row`. */
INLINE void attend_tile(const Attention *job, const TaskRows *rows, int row, const Keys *keys, const Keys *next,
                        Softmax state, int R, int dtype) {
    int64_t d = job->kv->head_dim, e = 0, last = rows->pos[row + R - 1] - keys->first;
    if (last < 0 || (job->window && rows->pos[row] - job->window >= keys->first + TILE - 1))
        return; /* the tile is masked for all these rows */
    _Alignas(64) float scores[MAX_R][TILE];
    _Alignas(64) char weights[MAX_R][TILE * 4];
    float old[MAX_R];
    query_key(rows->q + row, keys, next, d * dtype_bytes(dtype) / 4, R, dtype, scores);
    softmax_rows(job, scores, keys->first, rows->pos + row, state, row, R, dtype, weights, old);
    int64_t num_keys = last + 1 < TILE ? last + 1 : TILE;
    int64_t steps = dtype == F32 ? num_keys : (num_keys + 1) / 2;
    int32_t tail_mask = num_keys % 2 ? 0xffff : -1;
    float *o = state.o + row * d;
    for (; e + PV_VECTORS * VL <= d; e += PV_VECTORS * VL)
        weigh_values(o, d, e, old, weights, keys, next, steps, tail_mask, R, PV_VECTORS, dtype);
    for (; e < d; e += VL) weigh_values(o, d, e, old, weights, keys, next, steps, tail_mask, R, 1, dtype);
}

#define FOR_R(call) \
    switch (R) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    default: call(6); break; \
    }

INLINE void attend_rows(const Attention *job, const TaskRows *rows, int num_rows, const Keys *keys, const Keys *next,
                        Softmax state, int dtype) {
    int blocks = (num_rows + MAX_R - 1) / MAX_R;
    for (int b = 0, row = 0; b < blocks; b++, next = keys) { /* the first block of rows fetches the next tile */
        int R = (num_rows - row + blocks - b - 1) / (blocks - b);
#define CALL(n) attend_tile(job, rows, row, keys, next, state, n, dtype)
        FOR_R(CALL)
#undef CALL
        row += R;
    }
}
static void attend_rows_f32(const Attention *job, const TaskRows *rows, int num_rows, const Keys *keys,
                            const Keys *next, Softmax state) {
    attend_rows(job, rows, num_rows, keys, next, state, F32);
}
static void attend_rows_bf16(const Attention *job, const TaskRows *rows, int num_rows, const Keys *keys,
                             const Keys *next, Softmax state) {
    attend_rows(job, rows, num_rows, keys, next, state, BF16);
}

static void clear(Softmax state, int rows, int64_t d) {
    for (int r = 0; r < rows; r++) state.m[r] = EMPTY;
    memset(state.l, 0, sizeof(float) * (size_t)rows * VL);
    memset(state.o, 0, sizeof(float) * (size_t)rows * (size_t)d);
}

/* The tile of keys from `first`; groups from `end` on are masked, and stand for any block. */
static void locate_keys(const Attention *job, const Task *task, int64_t first, int64_t end, Keys *keys) {
    const KVCache *kv = job->kv;
    const int32_t *table = job->meta->block_table + task->seq * job->meta->block_table_stride;
    keys->first = first;
    for (int g = 0; g < TILE_GROUPS; g++) {
        int64_t key = first + g * GROUP < end ? first + g * GROUP : first, block = table[key / kv->block_size];
        keys->k[g] = k_group(kv, block, task->head, key % kv->block_size);
        keys->v[g] = v_group(kv, block, task->head, key % kv->block_size);
    }
}

/* One partition of keys for all rows of a task, from an empty state. */
static void attend_partition(const Attention *job, const Task *task, const TaskRows *rows, int64_t part,
                             Softmax state) {
    int64_t end = rows->pos[task->rows - 1] + 1, part_end = (part + 1) * PART < end ? (part + 1) * PART : end;
    Keys tiles[2];
    clear(state, task->rows, job->kv->head_dim);
    locate_keys(job, task, part * PART, end, &tiles[0]);
    for (int64_t first = part * PART, n = 0; first < part_end; first += TILE, n ^= 1) {
        int64_t following = first + TILE < end ? first + TILE : first;
        locate_keys(job, task, following, end, &tiles[n ^ 1]);
        if (job->kv->dtype == F32) attend_rows_f32(job, rows, task->rows, &tiles[n], &tiles[n ^ 1], state);
        else attend_rows_bf16(job, rows, task->rows, &tiles[n], &tiles[n ^ 1], state);
    }
}

/* Row r of total = total + part, both unnormalised. */
static void merge(Softmax total, Softmax part, int r, int64_t d) {
    float new_m = part.m[r] > total.m[r] ? part.m[r] : total.m[r];
    float a = f_exp2(total.m[r] - new_m), b = f_exp2(part.m[r] - new_m);
    total.m[r] = new_m;
    vf_store(total.l + r * VL, vf_load(total.l + r * VL) * a + vf_load(part.l + r * VL) * b);
    for (int64_t i = r * d; i < (r + 1) * d; i += VL)
        vf_store(total.o + i, vf_load(total.o + i) * a + vf_load(part.o + i) * b);
}

static void write_row(const Attention *job, char *out, Softmax state, int r) {
    int64_t d = job->kv->head_dim;
    float inverse = 1.0f / vf_sum(vf_load(state.l + r * VL));
    for (int64_t i = 0; i < d; i += VL) vf_put(out, i, job->kv->dtype, vf_load(state.o + r * d + i) * inverse);
}

INLINE int64_t state_floats(int64_t d) { return TASK_ROWS * (d + 1 + VL); }
static Softmax state_at(float *memory, int64_t d) {
    return (Softmax){.o = memory, .l = memory + TASK_ROWS * d, .m = memory + TASK_ROWS * (d + VL)};
}
static Softmax scratch_state(int slot, int64_t d) {
    return state_at(thread_scratch(slot, sizeof(float) * (size_t)state_floats(d)), d);
}

static void attention_tile(const void *arg, int tile) {
    const Attention *job = arg;
    const Task *task = job->tasks + tile;
    int64_t d = job->kv->head_dim;
    TaskRows rows;
    locate_rows(job, task, &rows);
    if (task->partial >= 0) {
        attend_partition(job, task, &rows, task->part0, state_at(job->partials + task->partial * state_floats(d), d));
        return;
    }
    Softmax part = scratch_state(0, d), total = scratch_state(1, d);
    clear(total, task->rows, d);
    for (int64_t p = task->part0; p < task->part1; p++) {
        attend_partition(job, task, &rows, p, part);
        for (int r = 0; r < task->rows; r++) merge(total, part, r, d);
    }
    for (int r = 0; r < task->rows; r++) write_row(job, rows.out[r], total, r);
}

/* Merges the partitions of tasks [first, last), which share their rows, in order. */
static void merge_partials(const Attention *job, const Task *first, const Task *last) {
    int64_t d = job->kv->head_dim;
    TaskRows rows;
    locate_rows(job, first, &rows);
    Softmax total = scratch_state(1, d);
    clear(total, first->rows, d);
    for (const Task *task = first; task < last; task++) {
        Softmax part = state_at(job->partials + task->partial * state_floats(d), d);
        for (int r = 0; r < first->rows; r++) merge(total, part, r, d);
    }
    for (int r = 0; r < first->rows; r++) write_row(job, rows.out[r], total, r);
}

/* Cuts the batch into tasks; with `split`, a task a partition. Returns their number; `tasks` NULL only counts. */
static int64_t plan(const Attention *job, int split, Task *tasks) {
    int64_t count = 0;
    for (int64_t seq = 0; seq < job->meta->num_seqs; seq++) {
        int64_t query_len = job->meta->query_start_loc[seq + 1] - job->meta->query_start_loc[seq];
        int64_t first_pos = job->meta->seq_lens[seq] - query_len, rows = query_len * job->group;
        for (int64_t head = 0; head < job->kv->num_kv_heads; head++)
            for (int64_t row0 = 0; row0 < rows; row0 += TASK_ROWS) {
                int64_t n = rows - row0 < TASK_ROWS ? rows - row0 : TASK_ROWS;
                int64_t low = first_pos + row0 / job->group, high = first_pos + (row0 + n - 1) / job->group;
                int64_t part0 = job->window && low >= job->window ? (low - job->window + 1) / PART : 0;
                int64_t part1 = high / PART + 1, pieces = split ? part1 - part0 : 1;
                for (int64_t p = 0; p < pieces; p++, count++) {
                    if (!tasks) continue;
                    tasks[count] = (Task){.seq = (int32_t)seq, .head = (int32_t)head, .row0 = (int32_t)row0,
                                          .rows = (int32_t)n, .part0 = (int32_t)(part0 + p),
                                          .part1 = (int32_t)(split ? part0 + p + 1 : part1),
                                          .partial = pieces > 1 ? (int32_t)count : -1};
                }
            }
    }
    return count;
}

EXPORT void llm_paged_attention(Pool *pool, const void *q, const KVCache *kv, const StepMeta *meta, int64_t num_heads,
                                float scale, int64_t window, float soft_cap, void *out) {
    Attention job = {.q = q, .out = out, .kv = kv, .meta = meta, .num_heads = num_heads,
                     .group = num_heads / kv->num_kv_heads, .window = window, .soft_cap = soft_cap,
                     .scale = soft_cap != 0 ? scale / soft_cap : scale * LOG2E};
    int64_t count = plan(&job, 0, NULL);
    int split = count < 4 * pool_threads(pool) && pool_threads(pool) > 1;
    if (split) count = plan(&job, 1, NULL);
    Task *tasks = thread_scratch(2, sizeof(Task) * (size_t)(count + 1));
    plan(&job, split, tasks);
    job.tasks = tasks;
    if (split) job.partials = thread_scratch(3, sizeof(float) * (size_t)(count * state_floats(kv->head_dim)));
    pool_run(pool, attention_tile, &job, (int)count);
    for (int64_t first = 0, last; split && first < count; first = last) {
        for (last = first + 1; last < count && tasks[last].seq == tasks[first].seq &&
                               tasks[last].head == tasks[first].head && tasks[last].row0 == tasks[first].row0;)
            last++;
        if (tasks[first].partial >= 0) merge_partials(&job, tasks + first, tasks + last);
    }
}
