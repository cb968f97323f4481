/* Draws a token from each row of logits: filters by thresholds, never sorting the vocabulary; counter-based noise.
 * The noise is defined in kernels/reference_sampling.py: integers bit for bit, then -log(-log(u)) in fp32. */
#include <stdlib.h>

#include "pool.h"
#include "simd.h"

typedef struct {
    const float *logits; /* [rows, vocab] */
    int64_t vocab;
    const float *temperature, *top_p, *min_p;
    const int64_t *top_k, *seeds, *positions;
    int64_t *out;
} Sample;

typedef struct { uint32_t key0, key1; } Noise;
typedef struct { float value; int64_t id; } Best;

/* ---- noise --------------------------------------------------------------------------------------------------- */

INLINE uint32_t mix(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}
INLINE vu mix_lanes(vu h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}
static Noise noise_of(int64_t seed, int64_t position) {
    uint32_t low = (uint32_t)seed, high = (uint32_t)((uint64_t)seed >> 32), p = (uint32_t)position;
    return (Noise){mix(p ^ mix(low ^ mix(high ^ 0x9E3779B9u))), mix(p + mix(high ^ mix(low ^ 0x7F4A7C15u)))};
}
/* Natural logarithm of positive normal numbers, relative error under 2e-7 (polynomial of Cephes' logf). */
INLINE vf vf_log(vf x) {
    vi bits = (vi)x - 0x3f3504f3; /* sqrt(1/2): the mantissa is taken from [sqrt(1/2), sqrt(2)) */
    vf e = __builtin_convertvector(bits >> 23, vf);
    vf f = (vf)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, z = f * f;
    vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * z + e * -2.12194440e-4f - 0.5f * z;
    return f + p + e * 0.693359375f;
}
INLINE vf gumbel(Noise noise, vi ids) {
    vu x = mix_lanes(mix_lanes((vu)ids ^ noise.key0) ^ noise.key1);
    vf u = (__builtin_convertvector((vi)(x >> 9), vf) + 0.5f) * 0x1p-23f;
    return -vf_log(-vf_log(u));
}

/* ---- the largest --------------------------------------------------------------------------------------------- */

INLINE vi first_lanes(void) {
    int32_t ids[VL];
    for (int i = 0; i < VL; i++) ids[i] = i;
    return vi_load(ids);
}
/* Largest value, smallest id among equals; NaN never wins. With noise, of logit / temperature + noise, over those whose
 * logit / temperature is at least `threshold`. */
INLINE Best arg_max(const float *logits, int64_t n, float temperature, float threshold, const Noise *noise) {
    vf best = vf_set(-INFINITY);
    vi lanes = first_lanes(), best_id = vi_set(0);
    for (int64_t i = 0; i < n; i += VL) {
        float tail[VL];
        if (i + VL > n)
            for (int j = 0; j < VL; j++) tail[j] = i + j < n ? logits[i + j] : -INFINITY;
        vf v = i + VL > n ? vf_load(tail) : vf_load(logits + i);
        vi ids = lanes + (int32_t)i;
        if (noise) {
            v = v / temperature;
            vi kept = v >= threshold;
            int any = 0;
            for (int j = 0; j < VL; j++) any |= kept[j];
            if (!any) continue;
            v = vf_select(kept, v + gumbel(*noise, ids), vf_set(-INFINITY));
        }
        vi better = v > best;
        best = vf_select(better, v, best);
        best_id = (better & ids) | (~better & best_id);
    }
    Best result = {best[0], best_id[0]};
    for (int j = 1; j < VL; j++)
        if (best[j] > result.value || (best[j] == result.value && best_id[j] < result.id))
            result = (Best){best[j], best_id[j]};
    return result;
}

/* ---- thresholds ---------------------------------------------------------------------------------------------- */

enum { BIN_BITS = 12, BINS = 1 << BIN_BITS };

/* Floats in order as unsigned integers; NaN ends up first or last. */
INLINE uint32_t ordered(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
static int descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Elements of x[n] at or above the lower border of bin `bin`, sorted, largest first. Returns their number. */
static int64_t sorted_head(const float *x, int64_t n, int bin, float *head) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++)
        if ((int)(ordered(x[i]) >> (32 - BIN_BITS)) >= bin) head[count++] = x[i];
    qsort(head, (size_t)count, sizeof *head, descending);
    return count;
}

/* The k-th largest of x[n], 0 < k < n. `head` has room for n. */
static float kth_largest(const float *x, int64_t n, int64_t k, float *head) {
    static _Thread_local int64_t counts[BINS];
    memset(counts, 0, sizeof counts);
    for (int64_t i = 0; i < n; i++) counts[ordered(x[i]) >> (32 - BIN_BITS)]++;
    int bin = BINS - 1;
    for (int64_t seen = counts[bin]; seen < k; seen += counts[bin]) bin--;
    sorted_head(x, n, bin, head);
    return head[k - 1];
}

/* The smallest of the likeliest elements of x[n], all at least `threshold`, whose probabilities reach top_p. */
static float nucleus(const float *x, int64_t n, float max, float threshold, float top_p, float *head) {
    static _Thread_local double mass[BINS];
    memset(mass, 0, sizeof mass);
    double total = 0;
    for (int64_t i = 0; i < n; i += VL) {
        float p[VL], in[VL];
        int64_t width = i + VL > n ? n - i : VL;
        for (int64_t j = 0; j < VL; j++) in[j] = j < width ? x[i + j] : -INFINITY;
        vf_store(p, vf_exp2((vf_load(in) - max) * LOG2E));
        for (int64_t j = 0; j < width; j++)
            if (in[j] >= threshold) mass[ordered(in[j]) >> (32 - BIN_BITS)] += p[j], total += p[j];
    }
    int bin = BINS - 1;
    double reached = mass[bin];
    while ((reached == 0 || reached < top_p * total * (1 + 1e-6)) && bin > 0) reached += mass[--bin];
    int64_t count = sorted_head(x, n, bin, head), last = 0;
    if (count == 0) return max; /* no mass anywhere: a row of NaN */
    float before = 0;
    for (int64_t i = 0; i < count && head[i] >= threshold && (i == 0 || before < top_p); i++) {
        last = i;
        before += vf_exp2(vf_set((head[i] - max) * LOG2E))[0] / (float)total;
    }
    return head[last];
}

static void sample_row(const void *arg, int row) {
    const Sample *job = arg;
    const float *logits = job->logits + row * job->vocab;
    int64_t n = job->vocab;
    float temperature = job->temperature[row], threshold = -INFINITY;
    Best likeliest = {0, 0};
    int filtered = temperature > 0 && (job->min_p[row] > 0 || job->top_p[row] < 1 || job->top_k[row] > 0);
    if (temperature <= 0 || filtered) likeliest = arg_max(logits, n, 1, -INFINITY, NULL);
    if (temperature <= 0) {
        job->out[row] = likeliest.id;
        return;
    }
    if (filtered) {
        float *scaled = thread_scratch(0, sizeof(float) * (size_t)n), *head = thread_scratch(1, sizeof(float) * (size_t)n);
        float max = likeliest.value / temperature;
        for (int64_t i = 0; i < n; i++) scaled[i] = logits[i] / temperature;
        if (job->min_p[row] > 0) threshold = max + logf(job->min_p[row]);
        if (job->top_k[row] > 0 && job->top_k[row] < n) {
            float kth = kth_largest(scaled, n, job->top_k[row], head);
            threshold = kth > threshold ? kth : threshold;
        }
        if (job->top_p[row] < 1) threshold = nucleus(scaled, n, max, threshold, job->top_p[row], head);
    }
    Noise noise = noise_of(job->seeds[row], job->positions[row]);
    job->out[row] = arg_max(logits, n, temperature, threshold, &noise).id;
}

/* logits fp32 [rows, vocab] -> out [rows]. Parameters are arrays of `rows`; see SamplingTensors in ops.py. */
EXPORT void llm_sample(Pool *pool, const float *logits, int64_t rows, int64_t vocab, const float *temperature,
                       const int64_t *top_k, const float *top_p, const float *min_p, const int64_t *seeds,
                       const int64_t *positions, int64_t *out) {
    Sample job = {.logits = logits, .vocab = vocab, .temperature = temperature, .top_p = top_p, .min_p = min_p,
                  .top_k = top_k, .seeds = seeds, .positions = positions, .out = out};
    pool_run(pool, sample_row, &job, (int)rows);
}
