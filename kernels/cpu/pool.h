/* A pool of threads that share out the tiles of one operation. See pool.c. */
#pragma once
#include <stddef.h>

typedef struct Pool Pool;
typedef void (*TileFn)(const void *job, int tile);

/* Calls fn(job, tile) once for each tile of 0..num_tiles, on the calling thread and whatever workers are awake. */
void pool_run(Pool *pool, TileFn fn, const void *job, int num_tiles);
int pool_threads(const Pool *pool);

/* A buffer of the calling thread's own, 64-byte aligned, valid until its next call; slots are independent, 0 to 3 the ops' own. */
enum { DECODER_SCRATCH = 4, SCRATCH_SLOTS };
void *thread_scratch(int slot, size_t bytes);
