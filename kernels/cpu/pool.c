/* The thread pool: tiles are claimed from an atomic counter, nobody waits for a thread that has claimed nothing.
 *
 * A worker that lost its core to another process therefore costs at most the tile it holds, never a barrier. Workers
 * watch for the next operation for SPIN_NS after the last one (a decode step is hundreds of operations a few
 * microseconds apart), then sleep on a condition variable: an idle pool uses no CPU.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "simd.h"

#define SPIN_NS 60000
/* A worker that kept the caller waiting for longer than the caller's own share took has lost its core to somebody else.
 * For the next MIN_SOLO_NS (about a time slice) operations are then done alone; for twice as long if it happens again
 * before CALM operations have gone well, at most MAX_SOLO_NS. */
enum { STALL_NS = 20000, MIN_SOLO_NS = 1000000, MAX_SOLO_NS = 16000000, CALM = 256 };

struct Pool {
    int num_threads; /* the caller included */
    pthread_t *workers;
    TileFn fn;
    const void *job;
    int num_tiles;
    int64_t solo_until, penalty_ns; /* alone until then; and for how long the next time */
    int calm;                       /* shared operations that went well since */
    _Alignas(64) atomic_int next;   /* the next tile to claim */
    _Alignas(64) atomic_int epoch;  /* counts operations */
    atomic_int open;                /* an operation may be joined */
    atomic_int stop;
    _Alignas(64) atomic_int active; /* workers inside an operation */
    atomic_int sleepers;
    atomic_int waiting;             /* the caller sleeps until active is 0 */
    pthread_mutex_t run_lock, sleep_lock;
    pthread_cond_t wake, done;
};

INLINE void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* True as soon as *value differs from `old` (or equals, if `until_equal`); false after SPIN_NS. */
static int spin(atomic_int *value, int old, int until_equal) {
    int64_t deadline = 0;
    for (int round = 0;; round++) {
        for (int i = 0; i < 32; i++) {
            if ((atomic_load(value) == old) == until_equal) return 1;
            relax();
        }
        int64_t now = now_ns();
        if (!round) deadline = now + SPIN_NS;
        else if (now > deadline) return 0;
    }
}

static void claim_tiles(Pool *pool) {
    for (int tile; (tile = atomic_fetch_add(&pool->next, 1)) < pool->num_tiles;) pool->fn(pool->job, tile);
}

static void *worker_main(void *arg) {
    Pool *pool = arg;
    int seen = 0;
    while (!atomic_load(&pool->stop)) {
        if (!spin(&pool->epoch, seen, 0)) {
            pthread_mutex_lock(&pool->sleep_lock);
            atomic_fetch_add(&pool->sleepers, 1);
            while (atomic_load(&pool->epoch) == seen) pthread_cond_wait(&pool->wake, &pool->sleep_lock);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->sleep_lock);
        }
        seen = atomic_load(&pool->epoch);
        /* First say "inside", then look: either we see the operation closed, or the caller sees us and waits. */
        atomic_fetch_add(&pool->active, 1);
        if (atomic_load(&pool->open)) claim_tiles(pool);
        if (atomic_fetch_sub(&pool->active, 1) == 1 && atomic_load(&pool->waiting)) {
            pthread_mutex_lock(&pool->sleep_lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->sleep_lock);
        }
    }
    return NULL;
}

static void wake_workers(Pool *pool, int wanted) {
    atomic_fetch_add(&pool->epoch, 1);
    int sleepers = atomic_load(&pool->sleepers);
    if (!sleepers) return;
    pthread_mutex_lock(&pool->sleep_lock);
    if (wanted >= sleepers) pthread_cond_broadcast(&pool->wake);
    else while (wanted--) pthread_cond_signal(&pool->wake);
    pthread_mutex_unlock(&pool->sleep_lock);
}

static void wait_for_workers(Pool *pool) {
    if (spin(&pool->active, 0, 1)) return;
    pthread_mutex_lock(&pool->sleep_lock);
    atomic_store(&pool->waiting, 1);
    while (atomic_load(&pool->active)) pthread_cond_wait(&pool->done, &pool->sleep_lock);
    atomic_store(&pool->waiting, 0);
    pthread_mutex_unlock(&pool->sleep_lock);
}

/* After a shared operation: was the caller's wait out of proportion to its own work? */
static void judge(Pool *pool, int64_t worked, int64_t waited, int64_t now) {
    if (waited > worked + STALL_NS) {
        pool->solo_until = now + pool->penalty_ns;
        pool->penalty_ns = 2 * pool->penalty_ns < MAX_SOLO_NS ? 2 * pool->penalty_ns : MAX_SOLO_NS;
        pool->calm = 0;
    } else if (++pool->calm >= CALM) {
        pool->penalty_ns = MIN_SOLO_NS;
    }
}

static void run_shared(Pool *pool, TileFn fn, const void *job, int num_tiles, int64_t start) {
    pool->fn = fn;
    pool->job = job;
    pool->num_tiles = num_tiles;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->open, 1);
    wake_workers(pool, num_tiles - 1);
    claim_tiles(pool);
    atomic_store(&pool->open, 0);
    int64_t claimed = now_ns();
    wait_for_workers(pool);
    int64_t end = now_ns();
    judge(pool, claimed - start, end - claimed, end);
}

static void run_alone(TileFn fn, const void *job, int num_tiles) {
    for (int tile = 0; tile < num_tiles; tile++) fn(job, tile);
}

void pool_run(Pool *pool, TileFn fn, const void *job, int num_tiles) {
    /* A pool busy with another thread's operation is not waited for: this thread has a core too. */
    if (num_tiles < 2 || pool->num_threads < 2 || pthread_mutex_trylock(&pool->run_lock)) {
        run_alone(fn, job, num_tiles);
        return;
    }
    int64_t now = now_ns();
    if (now < pool->solo_until) run_alone(fn, job, num_tiles);
    else run_shared(pool, fn, job, num_tiles, now);
    pthread_mutex_unlock(&pool->run_lock);
}

int pool_threads(const Pool *pool) { return pool->num_threads; }

EXPORT void llm_pool_destroy(Pool *pool) {
    atomic_store(&pool->stop, 1);
    wake_workers(pool, pool->num_threads);
    for (int i = 0; i < pool->num_threads - 1; i++) pthread_join(pool->workers[i], NULL);
    pthread_mutex_destroy(&pool->run_lock);
    pthread_mutex_destroy(&pool->sleep_lock);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->done);
    free(pool->workers);
    free(pool);
}

/* Puts a worker on the n-th core this process may use, if there is one: woken workers otherwise tend to land on the
 * caller's core and wait there for it. The caller's thread stays free to move away from whatever shares its core. */
static void pin(pthread_t worker, int n) {
#ifdef __linux__
    cpu_set_t allowed, core;
    CPU_ZERO(&core);
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &allowed) && n-- == 0) CPU_SET(i, &core);
    if (CPU_COUNT(&core)) pthread_setaffinity_np(worker, sizeof core, &core);
#else
    (void)worker, (void)n;
#endif
}

/* A pool of `num_threads`, the caller's thread counted; fewer if the system gives no more. NULL: out of memory. */
EXPORT Pool *llm_pool_create(int num_threads) {
    Pool *pool = NULL;
    if (posix_memalign((void **)&pool, 64, sizeof *pool)) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->workers = calloc((size_t)num_threads, sizeof *pool->workers);
    if (!pool->workers) return free(pool), NULL;
    pthread_mutex_init(&pool->run_lock, NULL);
    pthread_mutex_init(&pool->sleep_lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->num_threads = 1;
    pool->penalty_ns = MIN_SOLO_NS;
    for (int i = 0; i < num_threads - 1; i++) {
        if (pthread_create(&pool->workers[i], NULL, worker_main, pool)) break;
        pin(pool->workers[i], i + 1);
        pool->num_threads++;
    }
    return pool;
}

EXPORT int llm_pool_threads(const Pool *pool) { return pool->num_threads; }

/* ---- scratch memory, one set a thread ------------------------------------------------------------------------ */

typedef struct { void *data[SCRATCH_SLOTS]; size_t bytes[SCRATCH_SLOTS]; } Scratch;
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_scratch(void *arg) {
    Scratch *scratch = arg;
    for (int i = 0; i < SCRATCH_SLOTS; i++) free(scratch->data[i]);
    free(scratch);
}
static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

void *thread_scratch(int slot, size_t bytes) {
    pthread_once(&scratch_once, make_scratch_key);
    Scratch *scratch = pthread_getspecific(scratch_key);
    if (!scratch) {
        scratch = calloc(1, sizeof *scratch);
        if (!scratch) abort();
        pthread_setspecific(scratch_key, scratch);
    }
    if (scratch->bytes[slot] < bytes) {
        free(scratch->data[slot]);
        if (posix_memalign(&scratch->data[slot], 64, bytes)) abort();
        scratch->bytes[slot] = bytes;
    }
    return scratch->data[slot];
}
