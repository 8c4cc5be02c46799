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

/* The largest of each lane of x[n]; lane j is {x[j], x[j + lanes], ...}. Returns whether all values are numbers. */
static int largest_of_lanes(const float *x, long n, long lanes, float *maxima) {
    int nan = 0;
    for (long j = 0; j < lanes; j++) maxima[j] = x[j];
    for (long i = 0; i < n; i += lanes) {
        long there = n - i < lanes ? n - i : lanes;
        for (long j = 0; j < there; j++) {
            nan |= x[i + j] != x[i + j];
            maxima[j] = x[i + j] > maxima[j] ? x[i + j] : maxima[j];
        }
    }
    return !nan;
}

/* The values of x[n] that are at least `least`. Returns how many; one more may be written. */
static long reaching(const float *x, long n, long lanes, const float *maxima, float least, entry *candidate) {
    long count = 0;
    for (long j = 0; j < lanes; j++)
        if (maxima[j] >= least)
            for (long at = j; at < n; at += lanes) {
                candidate[count] = (entry){x[at], at};
                count += x[at] >= least;
            }
    return count;
}

/* So many lanes that their maxima take about as long to look through as the lanes that are left. */
static long lanes_of(long n, long k) {
    long lanes = (long)sqrt((double)n * k) / 16 * 16;
    return lanes < 2 * k ? n : lanes;
}

/* The k largest of x[n], largest first. Returns whether all values are numbers; otherwise nothing is written.
 * Only lanes whose maxima are among the k largest can hold one of the k largest values: if another did, each of those k
 * lanes would hold a value at least as large. */
static int topk_row(const float *x, long n, long k, float *maxima, entry *candidate, float *values, int64_t *indices) {
    long lanes = lanes_of(n, k);
    if (!largest_of_lanes(x, n, lanes, maxima)) return 0;
    long count = reaching(x, n, lanes, maxima, threshold(maxima, lanes, k), candidate);
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

/* Whether all values are numbers. */
static int numbers(const float *x, long n) {
    int nan = 0;
    for (long j = 0; j < n; j++) nan |= x[j] != x[j];
    return !nan;
}

/* Makes the choice of row r, x[n]; without the top k where k is 0. `memory` holds 2 n + 2 entries. Returns whether all
 * values are numbers. */
static int choose(const choice *to, const float *x, long r, entry *memory) {
    long n = to->n, k = to->k, m = to->m, most = to->most, count = 0;
    float *row = (float *)(memory + n + 1);
    if (!(k ? topk_row(x, n, k, row, memory, to->values + r * k, to->indices + r * k) : numbers(x, n))) return 0;
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
const long high = 0, wide = 0; /* there is no `encode` */
#else
#include <immintrin.h>
#include <sys/mman.h>

/* `encode`: exact top k of x W^T + bias, most of it in whole numbers of 16 bits, of which the processor multiplies twice as many
 * at a time as of floats. Each row of x and of W is divided by its scale and rounded, so that its norm is about NORM:
 *     x = s (q + e)    w = t (p + f)    x . w = s t (q . p + q . f + e . (p + f))    |q . f + e . (p + f)| <= |q| |f| + |e| |p + f|
 * which bounds each pre-activation from above and below. Only latents whose upper bound reaches the k-th largest lower
 * bound can be among the k largest: a few more than k. Their pre-activations are computed from x and W themselves.
 * No sum of products can overflow: none of its parts exceeds |q| |p|, about 2^30.
 *
 * Latents stand in panels of WIDE, whose numbers lie beside each other, two by two; HIGH tokens times WIDE sums stay in
 * registers. That is made for vectors of 256 bits, where PyTorch's library reaches half of what the processor can. */
enum { HIGH = 6, WIDE = 16 };
const long high = HIGH, wide = WIDE;
static const float NORM = 32000;
typedef float floats __attribute__((vector_size(32), aligned(4)));
typedef int32_t integers __attribute__((vector_size(32), aligned(4)));

/* Rounds x[d] to whole[d] as above; says its scale, and |e|, not too low. Returns whether its norm allows that. */
static int rounded(const float *x, long d, int16_t *whole, float *scale, float *missed) {
    float square = 0, rest = 0;
#pragma omp simd reduction(+ : square)
    for (long c = 0; c < d; c++) square += x[c] * x[c];
    if (!(square > 1e-24f && square < 1e30f)) {
        *scale = *missed = 0;
        for (long c = 0; c < d; c++) {
            whole[c] = 0;
            if (x[c] != 0) return 0; /* too small, too large, or not a number */
        }
        return 1;
    }
    float factor = NORM / sqrtf(square);
#pragma omp simd reduction(+ : rest)
    for (long c = 0; c < d; c++) {
        float exact = x[c] * factor, near = (exact + 12582912.0f) - 12582912.0f;
        whole[c] = (int16_t)(int32_t)near;
        rest += (exact - near) * (exact - near);
    }
    *scale = 1 / factor;
    *missed = sqrtf(rest) * 1.01f + 0.01f;
    return 1;
}

/* A panel: to[pairs][WIDE] from rows[WIDE][pairs]; a pair is copied as one number of 32 bits. */
static void beside(const int32_t *rows, long pairs, int32_t *to) {
    for (long j = 0; j < pairs; j++)
        for (long i = 0; i < WIDE; i++) to[j * WIDE + i] = rows[i * pairs + j];
}

/* Upper bounds to[HIGH][WIDE] of pre-activations of x[pairs][HIGH] and a panel; rows of `to` are so far `apart`. */
static void block(const int32_t *x, const float *scales, const float *bounds, const int32_t *panel, long pairs,
                  const float *panel_scales, const float *bias, float *to, long apart) {
    __m256i sum[HIGH][2];
#pragma GCC unroll 6
    for (int i = 0; i < HIGH; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    for (long j = 0; j < pairs; j++, x += HIGH, panel += WIDE) {
        __m256i left = *(const __m256i_u *)panel, right = *(const __m256i_u *)(panel + WIDE / 2);
#pragma GCC unroll 6
        for (int i = 0; i < HIGH; i++) {
            __m256i both = _mm256_set1_epi32(x[i]);
            sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(both, left));
            sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(both, right));
            __asm__("" : "+x"(sum[i][0]), "+x"(sum[i][1])); /* or the compiler takes all products first, and has no room */
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < HIGH; i++)
        for (int half = 0; half < 2; half++) {
            floats product = __builtin_convertvector((integers)sum[i][half], floats) + bounds[i];
            floats scale = *(const floats *)(panel_scales + half * WIDE / 2) * scales[i];
            *(floats *)(to + i * apart + half * WIDE / 2) = product * scale + *(const floats *)(bias + half * WIDE / 2);
        }
}

/* Pre-activations of the candidates, four at a time; of zeros (`d` 0) they are the bias. */
static void exactly(const float *x, long d, const float *W, long width, const float *bias, entry *candidate, long count) {
    for (long i = 0; i < count; i += 4) {
        const float *w[4];
        float a = 0, b = 0, c = 0, e = 0;
        for (int j = 0; j < 4; j++) w[j] = W + candidate[i + j < count ? i + j : i].index * width;
#pragma omp simd reduction(+ : a, b, c, e)
        for (long at = 0; at < d; at++) {
            a += x[at] * w[0][at];
            b += x[at] * w[1][at];
            c += x[at] * w[2][at];
            e += x[at] * w[3][at];
        }
        float found[4] = {a, b, c, e};
        for (int j = 0; j < 4 && i + j < count; j++) candidate[i + j].value = found[j] + bias[candidate[i + j].index];
    }
}

/* `topk` of x[rows][d] W[n][d]^T + bias[n], `tall` rows of it at a time, a multiple of HIGH, in each thread. `room` is for so
 * many bytes: with n rounded up to WIDE and d to 2, n (d / 2 + 2) numbers, and for each of the threads tall (n + WIDE + d / 2 + 2) +
 * WIDE d / 2. Returns 0, or 1 where a number is not finite, or too large or small a row, or 2 where memory is short. */
int encode(const float *x, long rows, long d, long threads, long tall, const float *W, const float *bias, int32_t *room,
           long bytes, const choice *to) {
    long n = to->n, k = to->k, lanes = lanes_of(n, k), page = 1 << 21;
    long padded = (n + WIDE - 1) / WIDE * WIDE, pairs = (d + 1) / 2;
    long apart = padded + WIDE; /* rows that are 2^i apart get in each other's way in the cache */
    int32_t *panels = room;
    float *start = (float *)(panels + padded * pairs), *scales = start + padded, *rest = scales + padded;
    uintptr_t first_page = ((uintptr_t)room + page - 1) / page * page, last_page = ((uintptr_t)room + bytes) / page * page;
    if (first_page < last_page) madvise((void *)first_page, last_page - first_page, MADV_HUGEPAGE); /* fewer to look up */
    float rounding = (d / 8 + 16) * 1.2e-7f * NORM * NORM, most_missed = 0; /* of floats, in sums and in `block` */
    int bad = 0;
#pragma omp parallel reduction(| : bad) num_threads(threads)
    {
        float *upper = rest + omp_get_thread_num() * (tall * (apart + pairs + 2) + WIDE * pairs), worst = 0, missed;
        float *x_scales = upper + tall * apart, *bounds = x_scales + tall;
        int32_t *x_whole = (int32_t *)(bounds + tall), *one = x_whole + tall * pairs;
        entry *candidate = malloc((2 * n + 2) * sizeof(entry));
        float *maxima = (float *)(candidate + n + 1), *lower = maxima + n + 1;
        if (!candidate) bad = 2;
        for (long i = 0; i < WIDE; i++) one[i * pairs + pairs - 1] = 0; /* where d is odd */
#pragma omp for schedule(static) nowait
        for (long p = 0; p < padded; p += WIDE) {
            for (long i = 0; i < WIDE; i++) {
                long latent = p + i < n ? p + i : n - 1;
                bad |= !rounded(W + latent * d, d, (int16_t *)(one + i * pairs), scales + p + i, &missed);
                worst = missed > worst ? missed : worst;
                start[p + i] = bias ? bias[latent] : 0;
                bad |= !(fabsf(start[p + i]) < 1e30f);
            }
            beside(one, pairs, panels + p * pairs);
        }
#pragma omp critical
        most_missed = worst > most_missed ? worst : most_missed;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < rows; first += tall) {
            if (bad) continue;
            long there = rows - first < tall ? rows - first : tall;
            for (long i = 0; i < tall; i++) {
                if (i < there) bad |= !rounded(x + (first + i) * d, d, (int16_t *)one, x_scales + i, &missed);
                bounds[i] = (NORM + missed) * most_missed + NORM * missed + rounding;
                for (long j = 0; j < pairs; j++) x_whole[(i / HIGH * pairs + j) * HIGH + i % HIGH] = one[j];
            }
            for (long p = 0; p < padded; p += WIDE) {
                const int32_t *panel = panels + p * pairs, *soon = panel + WIDE * pairs;
                long groups = (there + HIGH - 1) / HIGH, share = (pairs + groups - 1) / groups * WIDE;
                for (long i = 0; i < there; i += HIGH) {
                    for (const int32_t *end = soon + share; soon < end; soon += WIDE) __builtin_prefetch(soon, 0, 2);
                    block(x_whole + i * pairs, x_scales + i, bounds + i, panel, pairs, scales + p, start + p,
                          upper + i * apart + p, apart);
                }
            }
            for (long i = 0; i < there && !bad; i++) {
                const float *row = upper + i * apart, *from = x + (first + i) * d;
                largest_of_lanes(row, n, lanes, maxima);
                long count = reaching(row, n, lanes, maxima, threshold(maxima, lanes, k), candidate);
                for (long j = 0; j < count; j++)
                    lower[j] = candidate[j].value - 2.001f * bounds[i] * x_scales[i] * scales[candidate[j].index] -
                               3e-7f * fabsf(candidate[j].value);
                count = reaching(row, n, lanes, maxima, threshold(lower, count, k), candidate);
                exactly(from, x_scales[i] ? d : 0, W, d, start, candidate, count);
                ranked(candidate, maxima, count, k, to->values + (first + i) * k, to->indices + (first + i) * k);
            }
        }
        free(candidate);
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
 * of them may be copies whose `active` and `factor` are 0. */
static float four(const float *const *from, const float *const *source, const float *active, const float *factor,
                  const float *w, long d, float *restrict decoder, float *restrict encoder) {
    const float *f0 = from[0], *f1 = from[1], *f2 = from[2], *f3 = from[3];
    const float *x0 = source[0], *x1 = source[1], *x2 = source[2], *x3 = source[3];
    float z0 = active[0] * factor[0], z1 = active[1] * factor[1], z2 = active[2] * factor[2], z3 = active[3] * factor[3];
    float d0 = 0, d1 = 0, d2 = 0, d3 = 0;
#pragma omp simd reduction(+ : d0, d1, d2, d3)
    for (long c = 0; c < d; c++) {
        d0 += f0[c] * w[c];
        d1 += f1[c] * w[c];
        d2 += f2[c] * w[c];
        d3 += f3[c] * w[c];
    }
    d0 *= factor[0];
    d1 *= factor[1];
    d2 *= factor[2];
    d3 *= factor[3];
    for (long c = 0; c < d; c++) {
        decoder[c] += z0 * f0[c] + z1 * f1[c] + z2 * f2[c] + z3 * f3[c];
        encoder[c] += d0 * x0[c] + d1 * x1[c] + d2 * x2[c] + d3 * x3[c];
    }
    return d0 + d1 + d2 + d3;
}

/* Gradients of one row of both matrices for every latent, from the pairs (token, latent) sorted by latent:
 *     decoder[i] = sum z f g      encoder[i] = sum dz x      latent[i] = sum dz      dz = (z > 0) f g . W[i]
 * g and x being rows and f a factor of the token, which is order / k, over `sets` of z, f and g, one behind the other, that
 * share their pairs. */
void gradients(long n, long d, long k, long tokens, long sets, const int64_t *starts, const int64_t *order, const float *z,
               const float *g, const float *factors, const float *x, const float *W, float *decoder, float *encoder,
               float *latent) {
#pragma omp parallel for schedule(dynamic, 64)
    for (long i = 0; i < n; i++) {
        float *to_decoder = decoder + i * d, *to_encoder = encoder + i * d, total = 0, active[4], factor[4];
        const float *from[4], *source[4];
        int there = 0;
        for (long c = 0; c < d; c++) to_decoder[c] = to_encoder[c] = 0;
        for (int64_t p = starts[i]; p < starts[i + 1]; p++) {
            long token = order[p] / k;
            for (long s = 0; s < sets; s++) {
                active[there] = z[s * tokens * k + order[p]];
                factor[there] = factors[s * tokens + token];
                from[there] = g + (s * tokens + token) * d;
                source[there] = x + token * d;
                for (long c = 0; c < d; c += 16) {
                    __builtin_prefetch(from[there] + c);
                    __builtin_prefetch(source[there] + c);
                }
                there += active[there] > 0;
                if (there < 4) continue;
                total += four(from, source, active, factor, W + i * d, d, to_decoder, to_encoder);
                there = 0;
            }
        }
        for (int other = there; there && other < 4; other++) {
            active[other] = factor[other] = 0;
            from[other] = from[0];
            source[other] = source[0];
        }
        if (there) total += four(from, source, active, factor, W + i * d, d, to_decoder, to_encoder);
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
