/* All layers of a dense decoder in one call: the ops of their own files, one after another, with no Python in between.
 *
 * What lies between two ops stays in this thread's scratch memory, warm from layer to layer. Everything but attention
 * goes a part of the rows at a time, so that it stays in the cache from one op to the next. */
#include "op_calls.h"

enum { PART_ROWS = 192 };

/* `DecoderLayerStruct` in decoder.py. Norms are fp32 [hidden], q_norm and k_norm [head_dim]; NULL: there is none. */
typedef struct {
    const Weight *qkv, *o, *gate_up, *down;
    const float *attention_norm, *mlp_norm, *post_attention_norm, *post_mlp_norm, *q_norm, *k_norm, *cos_sin;
    const KVCache *kv;
    int64_t num_heads, window;
    float scale, soft_cap, eps;
    int gelu;
} Layer;

/* The rows of one step, or a part of them. Activations of `dtype`, the residual fp32. */
typedef struct {
    char *normed, *qkv, *q, *attended, *out, *gate_up, *gated;
    float *residual;
    int dtype;
} Rows;

typedef struct { int64_t hidden, qkv, q, intermediate; } Widths;

static char *carve(char **at, int64_t elements, int64_t bytes) {
    char *start = *at;
    *at += (elements * bytes + 63) / 64 * 64;
    return start;
}

static Rows lay_out(char *memory, int64_t rows, Widths width, int dtype, size_t *total) {
    int64_t bytes = dtype_bytes(dtype), part = rows < PART_ROWS ? rows : PART_ROWS;
    char *at = memory;
    Rows laid = {.dtype = dtype};
    laid.residual = (float *)carve(&at, rows * width.hidden, 4);
    laid.normed = carve(&at, rows * width.hidden, bytes);
    laid.qkv = carve(&at, rows * width.qkv, bytes);
    laid.q = carve(&at, rows * width.q, bytes);
    laid.attended = carve(&at, rows * width.q, bytes);
    laid.out = carve(&at, part * width.hidden, bytes);
    laid.gate_up = carve(&at, part * 2 * width.intermediate, bytes);
    laid.gated = carve(&at, part * width.intermediate, bytes);
    *total = (size_t)(at - memory);
    return laid;
}

/* From what attention returns for some rows to their normed input of the next layer. */
static void feed_forward(Pool *pool, const Layer *layer, const float *next_norm, Rows x, char *normed_out, int64_t rows,
                         Widths width) {
    int64_t hidden = width.hidden;
    llm_linear(pool, layer->o, x.attended, x.out, rows, width.q, x.dtype, x.dtype);
    if (layer->post_attention_norm)
        llm_rms_norm(pool, x.out, NULL, layer->post_attention_norm, x.out, rows, hidden, layer->eps, x.dtype);
    llm_rms_norm(pool, x.out, x.residual, layer->mlp_norm, x.normed, rows, hidden, layer->eps, x.dtype);
    llm_linear(pool, layer->gate_up, x.normed, x.gate_up, rows, hidden, x.dtype, x.dtype);
    llm_gate_and_mul(pool, x.gate_up, x.gated, rows, width.intermediate, x.dtype, layer->gelu);
    llm_linear(pool, layer->down, x.gated, x.out, rows, width.intermediate, x.dtype, x.dtype);
    if (layer->post_mlp_norm)
        llm_rms_norm(pool, x.out, NULL, layer->post_mlp_norm, x.out, rows, hidden, layer->eps, x.dtype);
    llm_rms_norm(pool, x.out, x.residual, next_norm, normed_out, rows, hidden, layer->eps, x.dtype);
}

static void forward_layer(Pool *pool, const Layer *layer, const float *next_norm, const StepMeta *meta, Rows x,
                          char *normed_out, Widths width) {
    int64_t rows = meta->num_tokens, bytes = dtype_bytes(x.dtype);
    llm_linear(pool, layer->qkv, x.normed, x.qkv, rows, width.hidden, x.dtype, x.dtype);
    llm_rotary_and_cache(pool, x.qkv, layer->cos_sin, layer->kv, meta, layer->num_heads, layer->q_norm, layer->k_norm,
                         layer->eps, x.q);
    llm_paged_attention(pool, x.q, layer->kv, meta, layer->num_heads, layer->scale, layer->window, layer->soft_cap,
                        NULL, x.attended);
    for (int64_t row = 0; row < rows; row += PART_ROWS) {
        int64_t count = rows - row < PART_ROWS ? rows - row : PART_ROWS;
        Rows part = x;
        part.residual += row * width.hidden;
        part.normed += row * width.hidden * bytes;
        part.attended += row * width.q * bytes;
        feed_forward(pool, layer, next_norm, part, normed_out + row * width.hidden * bytes, count, width);
    }
}

/* embedded [tokens, hidden] of dtype through the layers -> out, normed by `final_norm`. All layers have the shapes of
 * the first. */
EXPORT void llm_decoder(Pool *pool, const Layer *layers, int64_t num_layers, const float *final_norm,
                        const StepMeta *meta, const void *embedded, void *out, int dtype) {
    const Layer *first = layers;
    int64_t rows = meta->num_tokens;
    Widths width = {.hidden = first->o->n, .qkv = first->qkv->n, .q = first->num_heads * first->kv->head_dim,
                    .intermediate = first->gate_up->n / 2};
    size_t total;
    lay_out(NULL, rows, width, dtype, &total);
    Rows x = lay_out(thread_scratch(DECODER_SCRATCH, total), rows, width, dtype, &total);
    for (int64_t i = 0; i < rows * width.hidden; i++) x.residual[i] = f_get(embedded, i, dtype);
    llm_rms_norm(pool, embedded, NULL, first->attention_norm, x.normed, rows, width.hidden, first->eps, dtype);
    for (int64_t i = 0; i < num_layers; i++) {
        const float *next_norm = i + 1 < num_layers ? layers[i + 1].attention_norm : final_norm;
        forward_layer(pool, layers + i, next_norm, meta, x, i + 1 < num_layers ? x.normed : out, width);
    }
}
