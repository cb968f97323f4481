/* Causal attention over a paged cache for ragged batches of prompt chunks and decode tokens alike.
 *
 * Bit-invariance: a query row's sums run over key tiles of TILE tokens at absolute positions, tiles are gathered into
 * partitions of PART tokens at absolute positions (online softmax within, each from an empty state), and partitions
 * are merged in order. Work may be cut between threads at row or partition borders, rows may be computed together or
 * alone: the arithmetic of a row is the same. Masked keys have weight exactly 0 and change nothing.
 */
#include "attention_tile.h"
#include "kv_layout.h"
#include "op_calls.h"
#include "pool.h"

enum { PART = 512 };

typedef struct {
    const char *q;
    char *out;
    const KVCache *kv;
    const StepMeta *meta;
    int64_t num_heads, group; /* query heads, and of them those that share a kv head */
    int64_t window;
    Scoring scoring;
    const float *sinks; /* NULL, or for each query head the score of a key more, whose value is zero */
    const struct Task *tasks;
    float *partials; /* a state for each task, where partitions are computed apart */
} Attention;

/* Rows row0.. of one sequence and one kv head; row = query token * group + head. Partitions [part0, part1). */
typedef struct Task {
    int32_t seq, head, row0, rows, part0, part1;
    int32_t partial; /* index into partials, or -1: this task covers every partition and writes the output */
} Task;

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
        int64_t pos = first_pos + token;
        rows->first[r] = job->window && pos >= job->window ? pos - job->window + 1 : 0;
        rows->last[r] = pos;
        rows->bias[r] = NULL;
    }
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
    int64_t end = rows->last[task->rows - 1] + 1, part_end = (part + 1) * PART < end ? (part + 1) * PART : end;
    Keys tiles[2];
    clear(state, task->rows, job->kv->head_dim);
    locate_keys(job, task, part * PART, end, &tiles[0]);
    for (int64_t first = part * PART, n = 0; first < part_end; first += TILE, n ^= 1) {
        int64_t following = first + TILE < end ? first + TILE : first;
        locate_keys(job, task, following, end, &tiles[n ^ 1]);
        attend(job->scoring, rows, task->rows, &tiles[n], &tiles[n ^ 1], job->kv->head_dim, state, job->kv->dtype);
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

static Softmax scratch_state(int slot, int64_t d) {
    return state_at(thread_scratch(slot, sizeof(float) * (size_t)state_floats(d)), d);
}

static void write_rows(const Attention *job, const Task *task, const TaskRows *rows, Softmax state) {
    for (int r = 0; r < task->rows; r++) {
        int64_t head = task->head * job->group + (task->row0 + r) % job->group;
        /* A sink's weight may be infinite: then the output is zero. */
        if (job->sinks) state.l[r * VL] += exp2f(job->sinks[head] * LOG2E - state.m[r]);
        write_row(rows->out[r], job->kv->head_dim, state, r, job->kv->dtype);
    }
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
    write_rows(job, task, &rows, total);
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
    write_rows(job, first, &rows, total);
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
                                float scale, int64_t window, float soft_cap, const float *sinks, void *out) {
    Attention job = {.q = q, .out = out, .kv = kv, .meta = meta, .num_heads = num_heads,
                     .group = num_heads / kv->num_kv_heads, .window = window, .sinks = sinks,
                     .scoring = scoring(scale, soft_cap)};
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
