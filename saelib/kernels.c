/* The part of `ops.py` that is much faster compiled. Plain C; `native.py` builds and calls it, and says when.
 * Branches that cannot be foreseen cost more than comparisons, so there are few of them. */
#include <math.h>
#include <omp.h>
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
    for (long j = 0; j < lanes; j++) maxima[j] = x[j];
    for (long i = 0; i < n; i += lanes) {
        long there = n - i < lanes ? n - i : lanes;
        for (long j = 0; j < there; j++) {
            nan |= x[i + j] != x[i + j];
            maxima[j] = x[i + j] > maxima[j] ? x[i + j] : maxima[j];
        }
    }
    if (nan) return 0;
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

/* What `topk_row` and `largest_row` write to for each row; `z` whole, or without its zeros as `most` values and places. */
typedef struct {
    long n, k, m, most;
    const int64_t *columns;
    float *values, *z, *others;
    int64_t *indices, *places;
} choice;

/* Makes the choice of row r, x[n]; `memory` holds 2 n + 2 entries. Returns whether all values are numbers. */
static int choose(const choice *to, const float *x, long r, entry *memory) {
    long n = to->n, k = to->k, m = to->m, most = to->most, lanes = (long)sqrt((double)n * k) / 16 * 16, count = 0;
    float *row = (float *)(memory + n + 1);
    if (!topk_row(x, n, k, lanes < 2 * k ? n : lanes, row, memory, to->values + r * k, to->indices + r * k)) return 0;
    if (to->z) largest_row(x, to->columns, m, most, to->z + r * m);
    if (!to->others) return 1;
    float *others = to->others + r * most;
    int64_t *places = to->places + r * most;
    largest_row(x, to->columns, m, most, row);
    for (long j = 0; j < m && count < most; j++) {
        others[count] = row[j];
        places[count] = j;
        count += row[j] > 0;
    }
    for (; count < most; count++) others[count] = places[count] = 0;
    return 1;
}

/* The choices of every row of x[rows][n]. Returns 0, or 1 where a value is not a number, or 2 where memory is short. */
int topk(const float *x, long rows, const choice *to) {
    int bad = 0;
#pragma omp parallel reduction(| : bad)
    {
        entry *memory = malloc((2 * to->n + 2) * sizeof(entry));
        if (!memory) bad = 2;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++)
            if (!bad) bad = !choose(to, x + r * to->n, r, memory);
        free(memory);
    }
    return bad;
}

#if !defined __AVX2__ || !defined __FMA__ || defined __AVX512F__
const long wide = 0; /* there is no `encode` */
#else
#include <sys/mman.h>
#include <xmmintrin.h>

/* The product x W^T + bias for `encode`. Latents stand in panels of WIDE, whose weights lie beside each other; HIGH tokens
 * times WIDE sums stay in registers while they take in DEEP numbers of d. That is made for 256-bit vectors, where PyTorch's
 * library reaches half of what the processor can; for wider ones the library is good. */
enum { HIGH = 6, WIDE = 16, DEEP = 256 };
const long wide = WIDE;
typedef float vector __attribute__((vector_size(4 * WIDE / 2), aligned(4)));

/* A panel: to[d][WIDE] from rows[there][d]; what is missing is 0. */
static void beside(const float *rows, long there, long d, float *to) {
    long whole = there < WIDE ? 0 : d / 4 * 4;
    for (long j = 0; j < whole; j += 4)
        for (long i = 0; i < WIDE; i += 4) {
            __m128 part[4];
            for (long c = 0; c < 4; c++) part[c] = _mm_loadu_ps(rows + (i + c) * d + j);
            _MM_TRANSPOSE4_PS(part[0], part[1], part[2], part[3]);
            for (long c = 0; c < 4; c++) _mm_storeu_ps(to + (j + c) * WIDE + i, part[c]);
        }
    for (long j = whole; j < d; j++)
        for (long i = 0; i < WIDE; i++) to[j * WIDE + i] = i < there ? rows[i * d + j] : 0;
}

/* to[HIGH][WIDE] = from[HIGH][WIDE] + x[HIGH][deep] panel[deep][WIDE]; the rows are so far apart. */
static void block(const float *from, long apart_from, const float *x, long apart_x, const float *panel, long deep, float *to,
                  long apart) {
    vector sum[HIGH][2];
#pragma GCC unroll 6
    for (int i = 0; i < HIGH; i++)
        for (int half = 0; half < 2; half++)
            sum[i][half] = *(const vector *)(from + i * apart_from + half * WIDE / 2);
    for (long j = 0; j < deep; j++, x++, panel += WIDE) {
        vector left = *(const vector *)panel, right = *(const vector *)(panel + WIDE / 2);
#pragma GCC unroll 6
        for (int i = 0; i < HIGH; i++) {
            sum[i][0] += x[i * apart_x] * left;
            sum[i][1] += x[i * apart_x] * right;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < HIGH; i++)
        for (int half = 0; half < 2; half++) *(vector *)(to + i * apart + half * WIDE / 2) = sum[i][half];
}

/* The product for x[there][d], into rows of `pre` that are `apart`; `last` has room for HIGH rows of x. */
static void product(const float *x, long there, long d, const float *start, const float *panels, long padded, float *last,
                    float *pre, long apart) {
    long whole = there / HIGH * HIGH, groups = (there + HIGH - 1) / HIGH;
    for (long i = 0; i < HIGH * d; i++) last[i] = whole * d + i < there * d ? x[whole * d + i] : 0;
    for (long p = 0; p < padded; p += WIDE)
        for (long j = 0; j < d; j += DEEP) {
            long deep = d - j < DEEP ? d - j : DEEP, share = (deep + groups - 1) / groups * WIDE;
            const float *now = panels + p * d + j * WIDE, *soon = now + deep * WIDE;
            for (long i = 0; i < there; i += HIGH) {
                float *to = pre + i * apart + p;
                for (const float *end = soon + share; soon < end; soon += WIDE) __builtin_prefetch(soon, 0, 2);
                block(j ? to : start + p, j ? apart : 0, (i < whole ? x + i * d : last) + j, d, now, deep, to, apart);
            }
        }
}

/* `topk` of x[rows][d] W[n][d]^T + bias[n], `tall` rows of it at a time in each thread. `room` is for so many bytes:
 * padded (d + 1) numbers, padded being n rounded up to WIDE, and for each of the threads (tall + HIGH) (padded + WIDE). */
int encode(const float *x, long rows, long d, long threads, long tall, const float *W, const float *bias, float *room,
           long bytes, const choice *to) {
    long n = to->n, padded = (n + WIDE - 1) / WIDE * WIDE, page = 1 << 21;
    long apart = padded + WIDE; /* rows that are 2^i apart get in each other's way in the cache */
    float *start = room + padded * d, *rest = start + padded;
    uintptr_t first_page = ((uintptr_t)room + page - 1) / page * page, last_page = ((uintptr_t)room + bytes) / page * page;
    if (first_page < last_page) madvise((void *)first_page, last_page - first_page, MADV_HUGEPAGE); /* fewer to look up */
    int bad = 0;
    for (long i = 0; i < padded; i++) start[i] = bias && i < n ? bias[i] : 0;
#pragma omp parallel reduction(| : bad) num_threads(threads)
    {
        float *pre = rest + omp_get_thread_num() * (tall + HIGH) * apart, *last = malloc(HIGH * d * sizeof(float));
        entry *memory = malloc((2 * n + 2) * sizeof(entry));
        if (!last || !memory) bad = 2;
#pragma omp for schedule(static)
        for (long p = 0; p < padded; p += WIDE) beside(W + p * d, n - p < WIDE ? n - p : WIDE, d, room + p * d);
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < rows; first += tall) {
            if (bad) continue;
            long there = rows - first < tall ? rows - first : tall;
            product(x + first * d, there, d, start, room, padded, last, pre, apart);
            for (long i = 0; i < there; i++)
                if (!bad) bad = !choose(to, pre + i * apart, first + i, memory);
        }
        free(last);
        free(memory);
    }
    return bad;
}
#endif

/* What `SAE.normalized` makes of rows x[d]. It takes out their mean and, by `by_spread`, their standard deviation or their
 * norm, + eps; a row where that is at most max(tiny, noise |mean|) becomes 0. */
void normalized(const float *x, long rows, long d, int by_spread, float eps, float tiny, float noise, float *out, float *means,
                float *scales) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *from = x + r * d;
        float *to = out + r * d, square = 0;
        double sum = 0; /* of equal numbers the mean must be the number, all but exactly */
#pragma omp simd reduction(+ : sum)
        for (long c = 0; c < d; c++) sum += from[c];
        float mean = sum / d;
#pragma omp simd reduction(+ : square)
        for (long c = 0; c < d; c++) {
            to[c] = from[c] - mean;
            square += to[c] * to[c];
        }
        float spread = sqrtf(by_spread ? square / (d - 1) : square), least = noise * fabsf(mean);
        float scale = spread + eps, factor = spread <= (least > tiny ? least : tiny) ? 0 : 1 / scale;
        for (long c = 0; c < d; c++) to[c] *= factor;
        means[r] = mean;
        scales[r] = scale;
    }
}

/* out = x - z W over the k pairs of each row, four at a time. */
void residuals(const float *x, long rows, long d, long k, const float *z, const int64_t *indices, const float *W, float *out) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *values = z + r * k, *from = x + r * d;
        const int64_t *row = indices + r * k;
        float *to = out + r * d;
        for (long i = 0; i < k; i += 4) {
            float z0 = values[i], z1 = i + 1 < k ? values[i + 1] : 0, z2 = i + 2 < k ? values[i + 2] : 0,
                  z3 = i + 3 < k ? values[i + 3] : 0;
            const float *w0 = W + row[i] * d, *w1 = i + 1 < k ? W + row[i + 1] * d : w0,
                        *w2 = i + 2 < k ? W + row[i + 2] * d : w0, *w3 = i + 3 < k ? W + row[i + 3] * d : w0;
            for (long next = i + 4; next < k && next < i + 8; next++)
                for (long c = 0; c < d; c += 16) __builtin_prefetch(W + row[next] * d + c);
#pragma omp simd
            for (long c = 0; c < d; c++) to[c] = from[c] - (z0 * w0[c] + z1 * w1[c] + z2 * w2[c] + z3 * w3[c]);
            from = to;
        }
    }
}

/* The numbers of the pairs indices[pairs] sorted by latent: those of latent i are order[starts[i] .. starts[i + 1]], rising.
 * `counts` has room for n numbers of each of `parts` threads. */
void sorted(const int64_t *indices, long pairs, long n, long parts, int64_t *counts, int64_t *starts, int64_t *order) {
#pragma omp parallel for schedule(static, 1)
    for (long t = 0; t < parts; t++) {
        int64_t *count = counts + t * n;
        for (long i = 0; i < n; i++) count[i] = 0;
        for (long p = pairs * t / parts; p < pairs * (t + 1) / parts; p++) count[indices[p]]++;
    }
    int64_t before = 0;
    for (long i = 0; i < n; i++) {
        starts[i] = before;
        for (long t = 0; t < parts; t++) {
            int64_t count = counts[t * n + i];
            counts[t * n + i] = before;
            before += count;
        }
    }
    starts[n] = before;
#pragma omp parallel for schedule(static, 1)
    for (long t = 0; t < parts; t++)
        for (long p = pairs * t / parts; p < pairs * (t + 1) / parts; p++) order[counts[t * n + indices[p]]++] = p;
}

/* Four pairs of one latent whose weights are w: adds their sums to the rows of both gradients, returns that of dz. The last
 * of them may be copies with `active` 0; their dz is left out by `there`. */
static float four(const float *const *from, const float *const *source, const float *active, int there, const float *w,
                  long d, float *restrict decoder, float *restrict encoder) {
    const float *f0 = from[0], *f1 = from[1], *f2 = from[2], *f3 = from[3];
    const float *x0 = source[0], *x1 = source[1], *x2 = source[2], *x3 = source[3];
    float z0 = active[0], z1 = active[1], z2 = active[2], z3 = active[3], d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3)
    for (long c = 0; c < d; c++) {
        d0 += f0[c] * w[c];
        d1 += f1[c] * w[c];
        d2 += f2[c] * w[c];
        d3 += f3[c] * w[c];
    }
    if (there < 2) d1 = 0;
    if (there < 3) d2 = 0;
    if (there < 4) d3 = 0;
    for (long c = 0; c < d; c++) {
        decoder[c] += z0 * f0[c] + z1 * f1[c] + z2 * f2[c] + z3 * f3[c];
        encoder[c] += d0 * x0[c] + d1 * x1[c] + d2 * x2[c] + d3 * x3[c];
    }
    return d0 + d1 + d2 + d3;
}

/* Gradients of one row of both matrices for every latent, from the pairs (token, latent) sorted by latent:
 *     decoder[i] = sum z * g[token]      encoder[i] = sum dz * x[token]      latent[i] = sum dz      dz = (z > 0) g[token] . W[i]
 * over `sets` of latents z and gradients g, one behind the other, that share their pairs; order / k is the token. */
void gradients(long n, long d, long k, long tokens, long sets, const int64_t *starts, const int64_t *order, const float *z,
               const float *g, const float *x, const float *W, float *decoder, float *encoder, float *latent) {
#pragma omp parallel for schedule(dynamic, 64)
    for (long i = 0; i < n; i++) {
        float *to_decoder = decoder + i * d, *to_encoder = encoder + i * d, total = 0, active[4];
        const float *from[4], *source[4];
        int there = 0;
        for (long c = 0; c < d; c++) to_decoder[c] = to_encoder[c] = 0;
        for (int64_t p = starts[i]; p < starts[i + 1]; p++) {
            long token = order[p] / k;
            for (long s = 0; s < sets; s++) {
                active[there] = z[s * tokens * k + order[p]];
                from[there] = g + (s * tokens + token) * d;
                source[there] = x + token * d;
                for (long c = 0; c < d; c += 16) {
                    __builtin_prefetch(from[there] + c);
                    __builtin_prefetch(source[there] + c);
                }
                there += active[there] > 0;
                if (there < 4) continue;
                total += four(from, source, active, there, W + i * d, d, to_decoder, to_encoder);
                there = 0;
            }
        }
        for (int other = there; there && other < 4; other++) {
            active[other] = 0;
            from[other] = from[0];
            source[other] = source[0];
        }
        if (there) total += four(from, source, active, there, W + i * d, d, to_decoder, to_encoder);
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
        float high = x[0];
#pragma omp simd reduction(max : high)
        for (long j = 0; j < n; j++) high = x[j] > high ? x[j] : high;
        double sums = 0, products = 0; /* a thousand at a time in float: rounding does not grow with the vocabulary */
        for (long first = 0; first < n; first += 1024) {
            float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
            for (long j = first; j < (first + 1024 < n ? first + 1024 : n); j++) {
                sum += exponential(x[j] - high);
                product += q[j] * (x[j] - high);
            }
            sums += sum;
            products += product;
        }
        top[r] = high;
        lse[r] = logf(sums);
        expected[r] = products;
    }
}
