/* The loops in which a merge spends its time. Each has a twin in reference.py that gives the same bits.
 *
 * Arrays lie in one piece: k experts of n elements each. A score ranks by its size, and a float32 without its sign
 * sorts as its own bit pattern: its key. Nothing here allocates but a row's scratch, keeps state, or starts a thread.
 * Built without contraction and without fast-math: a * b + c rounds twice, as it does in torch.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define PIECE 4096 /* elements between two looks at the next array: what stays in a core's first cache */
#define ABSOLUTE 0x7FFFFFFFu
#define INFINITE 0x7F800000u

typedef uint16_t bf16;

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float from_f32(float x) { return x; }
static inline float to_f32(float x) { return x; }
static inline float from_bf16(bf16 x) { return as_float((uint32_t)x << 16); }
static inline bf16 to_bf16(float x) { /* to the nearest, ties to even; what is not a number is not handed over */
    uint32_t bits = as_bits(x);
    return (bf16)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

/* --- what is read, and what is written ------------------------------------------------------- */

/* base and deltas [k n] of stored [1+k n]; whether all of them are finite. */
#define DIFFERENCE(TYPE, NAME)                                                                          \
    CLONES int64_t difference_##NAME(const TYPE *stored, int64_t k, int64_t n, float *base, float *deltas) { \
        uint32_t largest = 0;                                                                           \
        for (int64_t start = 0; start < n; start += PIECE) {                                            \
            int64_t stop = least(start + PIECE, n);                                                     \
            for (int64_t i = start; i < stop; i++) {                                                    \
                base[i] = from_##NAME(stored[i]);                                                       \
                uint32_t size = as_bits(base[i]) & ABSOLUTE;                                            \
                largest = size > largest ? size : largest;                                              \
            }                                                                                           \
            for (int64_t e = 0; e < k; e++) {                                                           \
                const TYPE *own = stored + (e + 1) * n;                                                 \
                float *delta = deltas + e * n;                                                          \
                for (int64_t i = start; i < stop; i++) {                                                \
                    delta[i] = from_##NAME(own[i]) - base[i];                                           \
                    uint32_t size = as_bits(delta[i]) & ABSOLUTE;                                       \
                    largest = size > largest ? size : largest;                                          \
                }                                                                                       \
            }                                                                                           \
        }                                                                                               \
        return largest < INFINITE;                                                                      \
    }

/* base + delta rounded, but the stored bits themselves where delta is zero or exactly one expert's;
 * whether all of it is finite. */
#define RESTORED(TYPE, NAME)                                                                            \
    CLONES int64_t restored_##NAME(const TYPE *stored, const float *base, const float *deltas,          \
                                   const float *delta, int64_t k, int64_t n, TYPE *out) {               \
        uint32_t largest = 0;                                                                           \
        for (int64_t start = 0; start < n; start += PIECE) {                                            \
            int64_t stop = least(start + PIECE, n);                                                     \
            for (int64_t i = start; i < stop; i++) out[i] = to_##NAME(base[i] + delta[i]);              \
            for (int64_t e = 0; e < k; e++) {                                                           \
                const TYPE *own = stored + (e + 1) * n;                                                 \
                const float *change = deltas + e * n;                                                   \
                for (int64_t i = start; i < stop; i++) out[i] = delta[i] == change[i] ? own[i] : out[i]; \
            }                                                                                           \
            for (int64_t i = start; i < stop; i++) {                                                    \
                out[i] = delta[i] == 0 ? stored[i] : out[i];                                            \
                uint32_t size = as_bits(from_##NAME(out[i])) & ABSOLUTE;                                \
                uint32_t asked = as_bits(delta[i]) & ABSOLUTE;                                          \
                size = size > asked ? size : asked;                                                     \
                largest = size > largest ? size : largest;                                              \
            }                                                                                           \
        }                                                                                               \
        return largest < INFINITE;                                                                      \
    }

DIFFERENCE(bf16, bf16)
DIFFERENCE(float, f32)
RESTORED(bf16, bf16)
RESTORED(float, f32)

#ifdef __FLT16_MAX__
static inline float from_f16(uint16_t x) { _Float16 half; memcpy(&half, &x, 2); return (float)half; }
static inline uint16_t to_f16(float x) { _Float16 half = (_Float16)x; uint16_t bits; memcpy(&bits, &half, 2); return bits; }
DIFFERENCE(uint16_t, f16)
RESTORED(uint16_t, f16)
#endif

/* --- selection: the top of a score, as a count ------------------------------------------------ */

#define KEY(i) (own[i] & ABSOLUTE)
#define EACH_EXPERT                                                  \
    const uint32_t *own = keys + e * n;                              \
    const uint8_t *open = is_free ? is_free + e * n : NULL;

static inline void tally_keys(const uint32_t *own, const uint8_t *open, int64_t n, uint32_t from, uint32_t width,
                              int64_t *high, int64_t *low) {
    uint32_t turns[2][32768] = {{0}}; /* the same key again waits for the one before it, but not for every other's */
    uint32_t inside[PIECE];
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t stop = least(start + PIECE, n), found = 0;
        for (int64_t i = start; i < stop; i += 2)
            for (int64_t j = i; j < least(i + 2, stop); j++) {
                uint32_t key = KEY(j), one = open ? open[j] : 1;
                turns[j - i][key >> 16] += one;
                if (key - from < width && one) inside[found++] = key - from;
            }
        for (int64_t j = 0; j < found; j++) low[inside[j]]++; /* apart, so that these wait for memory together */
    }
    for (int64_t h = 0; h < 32768; h++) high[h] += (int64_t)turns[0][h] + turns[1][h];
}

/* Adds to tally [k 32768+65536*near] how often each high half of a key occurs among the free ones (is_free may be
 * NULL), and each low half of those whose high half is one of `near` from first[e] on. */
CLONES int64_t tally_high(const uint32_t *keys, const uint8_t *is_free, const int64_t *first, int64_t near, int64_t k,
                          int64_t n, int64_t *tally) {
    uint32_t width = (uint32_t)near << 16;
    for (int64_t e = 0; e < k; e++, tally += 32768 + width) {
        EACH_EXPERT
        uint32_t from = near ? (uint32_t)first[e] << 16 : 0;
        if (open) tally_keys(own, open, n, from, width, tally, tally + 32768);
        else tally_keys(own, NULL, n, from, width, tally, tally + 32768);
    }
    return 1;
}

/* Adds to tally [k 65536] how often each low half occurs among the free keys whose high half is the bucket. */
CLONES int64_t tally_low(const uint32_t *keys, const uint8_t *is_free, const int64_t *bucket, int64_t k, int64_t n,
                         int64_t *tally) {
    uint16_t inside[PIECE];
    for (int64_t e = 0; e < k; e++, tally += 65536) {
        EACH_EXPERT
        uint32_t wanted = (uint32_t)bucket[e];
        for (int64_t start = 0; start < n; start += PIECE) {
            int64_t stop = least(start + PIECE, n), found = 0;
            if (open)
                for (int64_t i = start; i < stop; i++) {
                    inside[found] = (uint16_t)own[i];
                    found += (KEY(i) >> 16 == wanted) & open[i];
                }
            else
                for (int64_t i = start; i < stop; i++) {
                    inside[found] = (uint16_t)own[i];
                    found += KEY(i) >> 16 == wanted;
                }
            for (int64_t j = 0; j < found; j++) tally[inside[j]]++;
        }
    }
    return 1;
}

static inline int64_t equal_ones(const uint32_t *own, const uint8_t *open, int64_t n, uint32_t level) {
    int64_t equal = 0;
    if (open)
        for (int64_t i = 0; i < n; i++) equal += (KEY(i) == level) & open[i];
    else
        for (int64_t i = 0; i < n; i++) equal += KEY(i) == level;
    return equal;
}

/* How many free keys of each expert are exactly its last. */
CLONES int64_t count_equal(const uint32_t *keys, const uint8_t *is_free, const int64_t *last, int64_t k, int64_t n,
                           int64_t *equal) {
    for (int64_t e = 0; e < k; e++) {
        EACH_EXPERT
        equal[e] = equal_ones(own, open, n, (uint32_t)last[e]);
    }
    return 1;
}

static inline void mark(const uint32_t *own, const uint8_t *open, int64_t n, uint32_t level, int64_t room, uint8_t *kept) {
    int64_t equal = room <= 0 ? 0 : equal_ones(own, open, n, level);
    uint32_t from = equal && room >= equal ? level : level + 1;
    for (int64_t i = 0; i < n; i++) kept[i] = KEY(i) >= from;
    if (open)
        for (int64_t i = 0; i < n; i++) kept[i] &= open[i];
    if (from == level || !equal) return;
    for (int64_t i = 0; room && i < n; i++)
        if (KEY(i) == level && (!open || open[i])) {
            kept[i] = 1;
            room--;
        }
}

/* Marks the free keys above last, and the first room[e] of those that equal it. */
CLONES int64_t mark_top(const uint32_t *keys, const uint8_t *is_free, const int64_t *last, const int64_t *room, int64_t k,
                        int64_t n, uint8_t *kept) {
    for (int64_t e = 0; e < k; e++) {
        EACH_EXPERT
        mark(own, open, n, (uint32_t)last[e], room[e], kept + e * n);
    }
    return 1;
}

/* The key of the wanted-th highest of a row: found by halving, since counting what is above is the one thing
 * that vectors do best. Fewer than `wanted` keys are above it; 0 is a barred place. */
static inline uint32_t last_taken(const uint32_t *keys, int64_t n, int64_t wanted, int64_t *room) {
    uint32_t low = 1, high = INFINITE + 2; /* low is reached by at least `wanted` keys, high by fewer */
    int64_t above = 0;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        int32_t reached = 0;
        for (int64_t i = 0; i < n; i++) reached += keys[i] >= middle;
        if (reached >= wanted) low = middle;
        else { high = middle; above = reached; }
        if (reached == wanted) break;
    }
    *room = wanted - above;
    return low;
}

/* Marks each row's wanted[r] highest free scores; equal ones go to the lower column. 0 if memory ran out. */
CLONES int64_t top_of_rows(const uint32_t *scores, const uint8_t *is_free, const int64_t *wanted, int64_t rows, int64_t n,
                           uint8_t *kept) {
    uint32_t *keys = malloc((size_t)(n ? n : 1) * sizeof *keys);
    if (!keys) return 0;
    for (int64_t r = 0; r < rows; r++, scores += n, is_free += n, kept += n) {
        int64_t free_ones = 0;
        for (int64_t i = 0; i < n; i++) {
            keys[i] = is_free[i] ? (scores[i] & ABSOLUTE) + 1 : 0;
            free_ones += is_free[i];
        }
        if (wanted[r] <= 0) memset(kept, 0, (size_t)n);
        else if (wanted[r] >= free_ones) memcpy(kept, is_free, (size_t)n);
        else {
            int64_t room = 0;
            uint32_t last = last_taken(keys, n, wanted[r], &room);
            mark(keys, NULL, n, last, room, kept);
        }
    }
    free(keys);
    return 1;
}

/* Each key's place in its row, 0 for the highest; equal ones rank by column. 0 if memory ran out. */
int64_t ranks_of_rows(const uint32_t *keys, int64_t rows, int64_t n, int32_t *ranks) {
    uint64_t *items = malloc(2 * (size_t)(n ? n : 1) * sizeof *items), *other = items + n;
    if (!items) return 0;
    for (int64_t r = 0; r < rows; r++, keys += n, ranks += n) {
        uint32_t counts[3][2048] = {{0}};
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = ABSOLUTE - (keys[i] & ABSOLUTE); /* the highest first */
            items[i] = (uint64_t)key << 32 | (uint32_t)i;
            for (int d = 0; d < 3; d++) counts[d][key >> 11 * d & 2047]++;
        }
        for (int d = 0; d < 3; d++) { /* a stable sort by 11 bits at a time */
            uint32_t place = 0;
            for (int b = 0; b < 2048; b++) { uint32_t own = counts[d][b]; counts[d][b] = place; place += own; }
            for (int64_t i = 0; i < n; i++) other[counts[d][items[i] >> (32 + 11 * d) & 2047]++] = items[i];
            uint64_t *swap = items; items = other; other = swap;
        }
        for (int64_t i = 0; i < n; i++) ranks[(uint32_t)items[i]] = (int32_t)i;
    }
    free(items < other ? items : other);
    return 1;
}

/* --- arithmetic over the experts -------------------------------------------------------------- */

/* The deltas where kept, +0 elsewhere. */
CLONES int64_t keep(const uint32_t *deltas, const uint8_t *kept, int64_t n, uint32_t *out) {
    for (int64_t i = 0; i < n; i++) out[i] = kept[i] ? deltas[i] : 0;
    return 1;
}

/* The sum over the experts of delta * weight, in their order. */
CLONES int64_t weighted_sum(const float *deltas, const float *weights, int64_t k, int64_t n, float *out) {
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t stop = least(start + PIECE, n);
        for (int64_t i = start; i < stop; i++) out[i] = deltas[i] * weights[0];
        for (int64_t e = 1; e < k; e++) {
            const float *delta = deltas + e * n;
            for (int64_t i = start; i < stop; i++) out[i] += delta[i] * weights[e];
        }
    }
    return 1;
}

/* The first expert's delta, and of the others what they add to it, times their weights. */
CLONES int64_t anchored_sum(const float *deltas, const float *weights, int64_t k, int64_t n, float *out) {
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t stop = least(start + PIECE, n);
        for (int64_t i = start; i < stop; i++) out[i] = deltas[i];
        for (int64_t e = 1; e < k; e++) {
            const float *delta = deltas + e * n;
            for (int64_t i = start; i < stop; i++) out[i] += (delta[i] - deltas[i]) * weights[e];
        }
    }
    return 1;
}

static inline float agreeing(float delta, float elected, float weight) {
    return (delta > 0 && elected > 0) || (delta < 0 && elected < 0) ? weight : 0;
}

/* The mean, by their weights, of the deltas that have the elected sign; 0 where nobody has it. */
CLONES int64_t mean_of_agreeing(const float *deltas, const float *elected, const float *weights, int64_t k, int64_t n,
                             float *out) {
    float together[PIECE];
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t count = least(PIECE, n - start);
        const float *sign = elected + start;
        float *mean = out + start;
        for (int64_t i = 0; i < count; i++) together[i] = agreeing(deltas[start + i], sign[i], weights[0]);
        for (int64_t e = 1; e < k; e++)
            for (int64_t i = 0; i < count; i++) together[i] += agreeing(deltas[e * n + start + i], sign[i], weights[e]);
        for (int64_t i = 0; i < count; i++) together[i] = together[i] == 0 ? 1 : together[i];
        for (int64_t e = 0; e < k; e++)
            for (int64_t i = 0; i < count; i++) {
                float delta = deltas[e * n + start + i];
                float term = delta * (agreeing(delta, sign[i], weights[e]) / together[i]);
                mean[i] = e ? mean[i] + term : term;
            }
    }
    return 1;
}

/* --- draws ------------------------------------------------------------------------------------ */

#ifdef __SIZEOF_INT128__
/* Philox4x64-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405): four words of one step. */
static inline void philox(uint64_t step, uint64_t key0, uint64_t key1, uint64_t words[4]) {
    uint64_t c0 = step, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        unsigned __int128 left = (unsigned __int128)0xD2E7470EE14C6C93u * c0;
        unsigned __int128 right = (unsigned __int128)0xCA5A826395121157u * c2;
        c0 = (uint64_t)(right >> 64) ^ c1 ^ key0;
        c1 = (uint64_t)right;
        c2 = (uint64_t)(left >> 64) ^ c3 ^ key1;
        c3 = (uint64_t)left;
        key0 += 0x9E3779B97F4A7C15u;
        key1 += 0xBB67AE8584CAA73Bu;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

/* Uniforms of 24 bits from both halves of each word, low half first: numbers start to start + n of the stream. */
int64_t uniforms_f32(uint64_t key0, uint64_t key1, int64_t start, int64_t n, float *out) {
    for (int64_t step = start / 8; step * 8 < start + n; step++) {
        uint64_t words[4];
        philox((uint64_t)step + 1, key0, key1, words);
        for (int64_t j = 0; j < 8; j++) {
            int64_t i = step * 8 + j - start;
            if (i >= 0 && i < n) out[i] = (float)((uint32_t)(words[j / 2] >> 32 * (j % 2)) >> 8) * 0x1p-24f;
        }
    }
    return 1;
}

/* Uniforms of 53 bits, one from each word. */
int64_t uniforms_f64(uint64_t key0, uint64_t key1, int64_t start, int64_t n, double *out) {
    for (int64_t step = start / 4; step * 4 < start + n; step++) {
        uint64_t words[4];
        philox((uint64_t)step + 1, key0, key1, words);
        for (int64_t j = 0; j < 4; j++) {
            int64_t i = step * 4 + j - start;
            if (i >= 0 && i < n) out[i] = (double)(words[j] >> 11) * 0x1p-53;
        }
    }
    return 1;
}
#endif

/* --- counts: what an inspection says of task vectors; a position is kept where one is not zero -------------- */

/* The sum of products of signs, or of zeros and ones: 32 at a time where vectors have 512 bits. */
static inline int64_t agreement(const int16_t *one, const int16_t *other, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (int32_t)one[i] * other[i];
    return sum;
}

/* How many of at most PIECE numbers are the wanted one. On its own, or gcc takes several wanted ones for a vector. */
CLONES int64_t occurrences(const int16_t *numbers, int64_t n, int16_t wanted) {
    int16_t found = 0;
    for (int64_t i = 0; i < n; i++) found = (int16_t)(found + (numbers[i] == wanted));
    return found;
}

/* Positions that experts e and f both keep, both [k k], and with different signs, opposed [k k]; positions that
 * exactly 0, 1, .. k of them keep, holders [k+1]. 0 if memory ran out. */
CLONES int64_t count_pairs(const float *deltas, int64_t k, int64_t n, int64_t *both, int64_t *opposed, int64_t *holders) {
    int16_t depth[PIECE], *signs = malloc((size_t)(2 * k) * sizeof depth), *kept = signs + k * PIECE;
    if (!signs) return 0;
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t count = least(PIECE, n - start);
        memset(depth, 0, sizeof depth);
        for (int64_t e = 0; e < k; e++) {
            const float *own = deltas + e * n + start;
            int16_t *sign = signs + e * PIECE, *held = kept + e * PIECE;
            for (int64_t i = 0; i < count; i++) {
                sign[i] = (int16_t)((own[i] > 0) - (own[i] < 0));
                held[i] = (int16_t)(sign[i] * sign[i]);
                depth[i] = (int16_t)(depth[i] + held[i]);
            }
            for (int64_t f = 0; f <= e; f++) {
                int64_t shared = agreement(held, kept + f * PIECE, count);
                both[e * k + f] += shared;
                opposed[e * k + f] += (shared - agreement(sign, signs + f * PIECE, count)) / 2;
            }
        }
        for (int16_t h = 0; h <= k; h++) holders[h] += occurrences(depth, count, h);
    }
    for (int64_t e = 0; e < k; e++)
        for (int64_t f = e + 1; f < k; f++) both[e * k + f] = both[f * k + e], opposed[e * k + f] = opposed[f * k + e];
    free(signs);
    return 1;
}

#define LANES 16 /* sums that run side by side, of every 16th product */

static inline double dot(const float *one, const float *other, int64_t n) {
    double sums[LANES] = {0}, total = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t l = 0; l < LANES; l++) sums[l] += (double)one[i + l] * (double)other[i + l];
    for (int64_t l = 0; i + l < n; l++) sums[l] += (double)one[i + l] * (double)other[i + l];
    for (int64_t l = 0; l < LANES; l++) total += sums[l];
    return total;
}

/* Inner products [k m] of vectors [k n] and [m n]: the product of two floats is a double without rounding. */
CLONES void products(const float *left, int64_t k, const float *right, int64_t m, int64_t n, double *out) {
    for (int64_t e = 0; e < k; e++)
        for (int64_t f = 0; f < m; f++)
            out[e * m + f] = left == right && f < e ? out[f * m + e] : dot(left + e * n, right + f * n, n);
}

/* How many positions of [k r c] each row keeps, by_row [k r], and each column, by_column [k c]; and each block of
 * `size` elements, by_block [k b], where element 0 is number `first` of the first block. */
CLONES void count_lines(const float *deltas, int64_t k, int64_t r, int64_t c, int64_t first, int64_t size, int64_t blocks,
                        int32_t *by_row, int32_t *by_column, int32_t *by_block) {
    for (int64_t e = 0; e < k; e++) {
        const float *own = deltas + e * r * c;
        for (int64_t y = 0; y < r; y++) {
            int32_t kept = 0;
            for (int64_t x = 0; x < c; x++) {
                int32_t here = own[y * c + x] != 0;
                by_column[e * c + x] += here;
                kept += here;
            }
            by_row[e * r + y] = kept;
        }
        for (int64_t b = 0; b < blocks; b++) {
            int64_t from = b ? b * size - first : 0, to = least((b + 1) * size - first, r * c);
            int32_t kept = 0;
            for (int64_t i = from; i < to; i++) kept += own[i] != 0;
            by_block[e * blocks + b] = kept;
        }
    }
}

/* Appends to found, which has `known` values, those of the n patterns that are not zero and new. `table` has
 * 2^bits places, 0 where free. -1 once more than half of it is taken: then it is as good as lost. */
int64_t gather(const uint32_t *patterns, int64_t n, uint32_t *table, int64_t bits, uint32_t *found, int64_t known) {
    int64_t most = (int64_t)1 << (bits - 1);
    uint32_t mask = ((uint32_t)1 << bits) - 1;
    for (int64_t i = 0; i < n; i++) {
        uint32_t pattern = patterns[i], place = pattern * 0x9E3779B1u >> (32 - bits);
        while (table[place] != pattern && table[place]) place = (place + 1) & mask;
        if (table[place] == pattern || pattern << 1 == 0) continue; /* 0 is found where a place is free */
        if (known == most) return -1;
        table[place] = found[known++] = pattern;
    }
    return known;
}

/* Adds to ends [k+2] how many positions have the value of base [n], of the experts [k n], of none of them; where several
 * have it, the first counts. Without a base it is 0. */
#define ENDINGS(TYPE, NAME)                                                                             \
    CLONES void endings_##NAME(const TYPE *result, const TYPE *base, const TYPE *experts, int64_t k, int64_t n, \
                               int64_t *ends) {                                                         \
        uint8_t left[PIECE];                                                                            \
        for (int64_t start = 0; start < n; start += PIECE) {                                            \
            int64_t count = least(PIECE, n - start);                                                    \
            const TYPE *found = result + start;                                                         \
            int32_t here = 0;                                                                           \
            for (int64_t i = 0; i < count; i++) {                                                       \
                left[i] = from_##NAME(found[i]) != (base ? from_##NAME(base[start + i]) : 0.0f);        \
                here += !left[i];                                                                       \
            }                                                                                           \
            ends[0] += here;                                                                            \
            for (int64_t e = 0; e < k; e++) {                                                           \
                const TYPE *own = experts + e * n + start;                                              \
                here = 0;                                                                               \
                for (int64_t i = 0; i < count; i++) {                                                   \
                    uint8_t equal = left[i] & (from_##NAME(found[i]) == from_##NAME(own[i]));           \
                    here += equal;                                                                      \
                    left[i] ^= equal;                                                                   \
                }                                                                                       \
                ends[e + 1] += here;                                                                    \
            }                                                                                           \
            here = 0;                                                                                   \
            for (int64_t i = 0; i < count; i++) here += left[i];                                        \
            ends[k + 1] += here;                                                                        \
        }                                                                                               \
    }

ENDINGS(bf16, bf16)
ENDINGS(float, f32)
#ifdef __FLT16_MAX__
ENDINGS(uint16_t, f16)
#endif
