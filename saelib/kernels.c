/* The part of `ops.py` that is much faster compiled. Plain C; `native.py` builds and calls it, and says when.
 * Branches that cannot be foreseen cost more than comparisons, so there are few of them. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct { float value; int64_t index; } entry;

static int descending(const void *a, const void *b) {
    float x = ((const entry *)a)->value, y = ((const entry *)b)->value;
    return (x < y) - (x > y);
}

/* A value that at least k, and not many more, of x[n] reach: by halving the range. */
static float threshold(const float *x, long n, long k) {
    float low = x[0], high = x[0];
    for (long j = 0; j < n; j++) {
        low = x[j] < low ? x[j] : low;
        high = x[j] > high ? x[j] : high;
    }
    for (int round = 0; round < 32; round++) {
        float middle = low + (high - low) / 2;
        int count = 0;
        for (long j = 0; j < n; j++) count += x[j] >= middle;
        if (count < k) high = middle;
        else low = middle;
        if (count >= k && count <= k + k / 8) break;
    }
    return low;
}

/* The k largest of the candidates, largest first: each one's rank is how many stand before it. */
static void ranked(entry *candidate, float *value, long count, long k, float *values, int64_t *indices) {
    if (count > 2 * k + 64) { /* many equal values: counting would take too long */
        qsort(candidate, count, sizeof(entry), descending);
        count = k;
    }
    for (long i = 0; i < count; i++) value[i] = candidate[i].value;
    for (long i = 0; i < count; i++) {
        int rank = 0;
        for (long j = 0; j < i; j++) rank += value[j] >= value[i];
        for (long j = i + 1; j < count; j++) rank += value[j] > value[i];
        if (rank < k) {
            values[rank] = value[i];
            indices[rank] = candidate[i].index;
        }
    }
}

/* The k largest of x[n], largest first. Returns whether all values are numbers; otherwise nothing is written.
 * Lane j is {x[j], x[j + lanes], ...}. Only lanes whose maxima are among the k largest can hold one of the k largest
 * values: if another did, each of those k lanes would hold a value at least as large. */
static int topk_row(const float *x, long n, long k, long lanes, float *maxima, entry *candidate, float *values,
                    int64_t *indices) {
    int nan = 0;
    for (long j = 0; j < n; j++) nan |= x[j] != x[j];
    if (nan) return 0;
    long i = lanes;
    for (long j = 0; j < lanes; j++) maxima[j] = x[j];
    for (; i + lanes <= n; i += lanes)
        for (long j = 0; j < lanes; j++) maxima[j] = x[i + j] > maxima[j] ? x[i + j] : maxima[j];
    for (long j = 0; i + j < n; j++) maxima[j] = x[i + j] > maxima[j] ? x[i + j] : maxima[j];
    float least = threshold(maxima, lanes, k);
    long count = 0;
    for (long j = 0; j < lanes; j++)
        if (maxima[j] >= least)
            for (long at = j; at < n; at += lanes) {
                candidate[count] = (entry){x[at], at};
                count += x[at] >= least;
            }
    ranked(candidate, maxima, count, k, values, indices); /* maxima are not needed any more */
    return 1;
}

/* z[j] = x[columns[j]] where that is positive and among the k largest of these, otherwise 0. Positive floats are ordered
 * as their bits are, so halving the range of bits finds the k-th exactly; of equal values the first ones stay. */
static void largest_row(const float *x, const int64_t *columns, long m, long k, float *z) {
    const int32_t *restrict from = (const int32_t *)x;
    int32_t *restrict bits = (int32_t *)z, low = 1, high = 0;
    int count = 0;
    for (long j = 0; j < m; j++) {
        int32_t found = from[columns[j]];
        bits[j] = found < 0 ? 0 : found;
        high = bits[j] > high ? bits[j] : high;
        count += bits[j] > 0;
    }
    if (count <= k) return;
    int32_t middle = high > 3 << 23 ? high - (3 << 23) : 1; /* an eighth of the largest: most often it lies above */
    while (low < high && count != k) { /* at least k reach `low`, fewer than k exceed `high` */
        int reach = 0;
        for (long j = 0; j < m; j++) reach += bits[j] >= middle;
        if (reach >= k) {
            low = middle;
            count = reach;
        } else high = middle - 1;
        middle = high - (high - low) / 2;
    }
    for (long j = 0; j < m; j++) bits[j] = bits[j] < low ? 0 : bits[j];
    for (long j = m; count > k && j-- > 0;)
        if (bits[j] == low) {
            bits[j] = 0;
            count--;
        }
}

/* For every row of x[rows][n], and of m of its columns as `largest_row` has it, while the row is in cache. Returns 0, or 1
 * where a value is not a number, or 2 where memory is short. */
int topk(const float *x, long rows, long n, long k, float *values, int64_t *indices, const int64_t *columns, long m,
         long most, float *z) {
    long lanes = (long)sqrt((double)n * k) / 16 * 16;
    if (lanes < 2 * k) lanes = n;
    int bad = 0;
#pragma omp parallel reduction(| : bad)
    {
        float *maxima = malloc((n + 1) * sizeof(float));
        entry *candidate = malloc((n + 1) * sizeof(entry));
        if (!maxima || !candidate) bad = 2;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++)
            if (!bad) {
                bad = !topk_row(x + r * n, n, k, lanes, maxima, candidate, values + r * k, indices + r * k);
                if (m) largest_row(x + r * n, columns, m, most, z + r * m);
            }
        free(maxima);
        free(candidate);
    }
    return bad;
}

/* Gradients of one row of both matrices for every latent, from the pairs (token, latent) sorted by latent:
 *     decoder[i] = sum z * g[token]      encoder[i] = sum dz * x[token]      latent[i] = sum dz      dz = (z > 0) g[token] . W[i]
 * over `sets` of latents z and gradients g, one behind the other, that share their pairs; order / k is the token. */
void gradients(long n, long d, long k, long tokens, long sets, const int64_t *starts, const int64_t *order, const float *z,
               const float *g, const float *x, const float *W, float *decoder, float *encoder, float *latent) {
#pragma omp parallel for schedule(dynamic, 64)
    for (long i = 0; i < n; i++) {
        float *to_decoder = decoder + i * d, *to_encoder = encoder + i * d, total = 0;
        const float *w = W + i * d;
        for (long c = 0; c < d; c++) to_decoder[c] = to_encoder[c] = 0;
        for (int64_t p = starts[i]; p < starts[i + 1]; p++) {
            long token = order[p] / k;
            float d_pre = 0;
            for (long s = 0; s < sets; s++) {
                const float *from = g + (s * tokens + token) * d;
                float active = z[s * tokens * k + order[p]], along = 0;
                if (active <= 0) continue;
#pragma omp simd reduction(+ : along)
                for (long c = 0; c < d; c++) {
                    to_decoder[c] += active * from[c];
                    along += from[c] * w[c];
                }
                d_pre += along;
            }
            total += d_pre;
            for (long c = 0; c < d; c++) to_encoder[c] += d_pre * x[token * d + c];
        }
        latent[i] = total;
    }
}

/* What `ops.update` does to the rows of one parameter. `to_first`, `to_second` and `to_average` are the shares of what is
 * new: 1 - beta1, 1 - beta2 and 1 - ema, which would lose digits if they were formed here. */
void adam(long n, long d, float *W, float *G, float *M, float *V, float *A, float rate, float to_first, float to_second,
          float eps, float root, float scale, float to_average, int project, int unit) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++) {
        float *w = W + i * d, *g = G + i * d, *m = M + i * d, *v = V + i * d, *a = A + i * d;
        float along = 0, square = 0;
        if (project) {
#pragma omp simd reduction(+ : along, square)
            for (long c = 0; c < d; c++) {
                along += g[c] * w[c];
                square += w[c] * w[c];
            }
            along /= square;
        }
        square = 0;
#pragma omp simd reduction(+ : square)
        for (long c = 0; c < d; c++) {
            float step = scale * (g[c] - along * w[c]);
            m[c] += to_first * (step - m[c]);
            v[c] += to_second * (step * step - v[c]);
            w[c] -= rate * m[c] / (sqrtf(v[c]) * root + eps);
            square += w[c] * w[c];
        }
        float factor = unit ? 1 / sqrtf(square) : 1;
        for (long c = 0; c < d; c++) {
            w[c] *= factor;
            a[c] += to_average * (w[c] - a[c]);
        }
    }
}

/* Squared norm of each gradient row without its part along the row of W. */
void across(long n, long d, const float *G, const float *W, float *squares) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i++) {
        float along = 0, norm = 0, total = 0;
#pragma omp simd reduction(+ : along, norm, total)
        for (long c = 0; c < d; c++) {
            float g = G[i * d + c], w = W[i * d + c];
            along += g * w;
            norm += w * w;
            total += g * g;
        }
        squares[i] = total - along * along / norm;
    }
}

/* e^x for x <= 0, to two last digits: 2^whole e^rest. Adding and taking away 1.5 * 2^23 rounds to a whole number; calls
 * of rintf and expf would keep the loop from being vectorised. */
static inline float exponential(float x) {
    x = x < -87 ? -87 : x; /* not a number stays so */
    float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float rest = fmaf(whole, 2.12194440e-4f, fmaf(whole, -0.693359375f, x));
    float sum = 1.0f / 5040;
    sum = fmaf(sum, rest, 1.0f / 720);
    sum = fmaf(sum, rest, 1.0f / 120);
    sum = fmaf(sum, rest, 1.0f / 24);
    sum = fmaf(sum, rest, 1.0f / 6);
    sum = fmaf(sum, rest, 0.5f);
    sum = fmaf(sum * rest, rest, rest + 1);
    return sum * (union { int32_t bits; float value; }){((int32_t)whole + 127) << 23}.value;
}

/* For every row x of logits[rows][n]: its maximum; log sum e^(x - maximum); sum p (x - maximum). */
void predictions(const float *logits, const float *p, long rows, long n, float *top, float *lse, float *expected) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *x = logits + r * n, *q = p + r * n;
        float high = x[0], sum = 0, product = 0;
#pragma omp simd reduction(max : high)
        for (long j = 0; j < n; j++) high = x[j] > high ? x[j] : high;
#pragma omp simd reduction(+ : sum, product)
        for (long j = 0; j < n; j++) {
            sum += exponential(x[j] - high);
            product += q[j] * (x[j] - high);
        }
        top[r] = high;
        lse[r] = logf(sum);
        expected[r] = product;
    }
}
