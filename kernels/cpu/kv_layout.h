/* How one layer's KV blocks lie in memory. The rotary kernel writes them, attention reads them; nobody else looks.
 *
 * [block][kv head] holds block_size tokens of K, then of V. Both are made of 32-bit lanes (1 float or 2 bf16), so that
 * one dot instruction serves 16 tokens of K, or 16 elements of V, with no horizontal sum:
 *   K: groups of 16 tokens, each [head_dim * bytes / 4][16 tokens] lanes; a bf16 lane is elements 2i, 2i + 1
 *   V: [tokens * bytes / 4][head_dim] lanes; a bf16 lane is tokens 2i, 2i + 1
 */
#pragma once
#include "simd.h"

typedef struct {
    char *data;
    int64_t num_kv_heads, head_dim, block_size;
    int dtype;
} KVCache;

/* One step's sequences: `AttentionMetadata` as pointers. */
typedef struct {
    const int32_t *query_start_loc, *seq_lens, *block_table;
    const int64_t *slot_mapping, *positions;
    int64_t block_table_stride, num_seqs, num_tokens;
} StepMeta;

INLINE char *kv_head(const KVCache *kv, int64_t block, int64_t head) {
    return kv->data + (block * kv->num_kv_heads + head) * 2 * kv->block_size * kv->head_dim * dtype_bytes(kv->dtype);
}
/* 16 tokens of K from `token`, a multiple of 16 within the block; and of V. */
INLINE char *k_group(const KVCache *kv, int64_t block, int64_t head, int64_t token) {
    return kv_head(kv, block, head) + token * kv->head_dim * dtype_bytes(kv->dtype);
}
INLINE char *v_group(const KVCache *kv, int64_t block, int64_t head, int64_t token) {
    return kv_head(kv, block, head) + (kv->block_size + token) * kv->head_dim * dtype_bytes(kv->dtype);
}
