/* The loops in which a merge spends its time. Each has a twin in reference.py that gives the same bits.
 *
 * Arrays lie in one piece: k experts of n elements each. A score ranks by its size, and a float32 without its sign
 * sorts as its own bit pattern: its key. Nothing here allocates but scratch, keeps state, or starts a thread.
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

#define SPAN 2048   /* elements of each vector that are looked at from all sides before the next */
#define SUMMED 1024 /* bytes of 0 and 1 that are added up eight to a word, whose sums stay below 256 */
#define WIDENED 512 /* elements that are doubles at once */
#define LANES 16    /* sums of an inner product that run side by side, of every 16th product */
#define WITHIN static inline __attribute__((always_inline)) /* a function of its own is compiled for the oldest processors */

/* How many of SPAN bytes of 0 and 1 are 1. */
WITHIN int64_t ones(const uint8_t *bytes) {
    const uint64_t even = 0x00FF00FF00FF00FFu;
    int64_t total = 0;
    for (int64_t start = 0; start < SPAN; start += SUMMED) {
        uint64_t sums = 0, word;
        for (int64_t i = start; i < start + SUMMED; i += 8) { memcpy(&word, bytes + i, 8); sums += word; }
        sums = (sums & even) + (sums >> 8 & even);
        total += (int64_t)(sums * 0x0001000100010001u >> 48);
    }
    return total;
}

/* Bytes of 0 and 1 for n elements, the rest of SPAN 0: whether one is kept, and below zero. */
WITHIN void signs_of(const uint32_t *own, int64_t n, uint8_t *held, uint8_t *below) {
    for (int64_t i = 0; i < n; i++) held[i] = (own[i] & ABSOLUTE) != 0;
    for (int64_t i = 0; i < n; i++) below[i] = (uint8_t)(own[i] >> 31);
    memset(held + n, 0, (size_t)(SPAN - n));
    memset(below + n, 0, (size_t)(SPAN - n));
}

/* Adds to both [k k] and opposed [k k], given held [k SPAN] and below. */
WITHIN void add_pairs(const uint8_t *held, const uint8_t *below, int64_t k, int64_t *both, int64_t *opposed) {
    uint8_t shared[SPAN], unlike[SPAN];
    for (int64_t e = 0; e < k; e++) {
        both[e * k + e] += ones(held + e * SPAN);
        for (int64_t f = 0; f < e; f++) {
            const uint8_t *one = held + e * SPAN, *other = held + f * SPAN;
            const uint8_t *sign = below + e * SPAN, *other_sign = below + f * SPAN;
            for (int64_t i = 0; i < SPAN; i++) shared[i] = one[i] & other[i];
            for (int64_t i = 0; i < SPAN; i++) unlike[i] = shared[i] & (sign[i] ^ other_sign[i]);
            int64_t counts[] = {ones(shared), ones(unlike)};
            both[e * k + f] += counts[0], both[f * k + e] += counts[0];
            opposed[e * k + f] += counts[1], opposed[f * k + e] += counts[1];
        }
    }
}

/* Adds to holders [k+1], given held [k SPAN] of n elements. */
WITHIN void add_holders(const uint8_t *held, int64_t k, int64_t n, int64_t *holders) {
    uint8_t depth[SPAN], equal[SPAN];
    memset(depth, 0, sizeof depth);
    for (int64_t e = 0; e < k; e++)
        for (int64_t i = 0; i < SPAN; i++) depth[i] = (uint8_t)(depth[i] + held[e * SPAN + i]);
    for (int64_t h = 0; h <= k; h++) {
        for (int64_t i = 0; i < SPAN; i++) equal[i] = depth[i] == (uint8_t)h;
        holders[h] += ones(equal);
    }
    holders[0] -= SPAN - n;
}

/* The row or block that n elements begin in: how many elements came before them, and of these are kept. */
typedef struct { int64_t passed, kept; } line;

/* Adds to by_column [c], and the square of what each row that ends here keeps to squares. */
WITHIN void add_rows(const uint8_t *held, int64_t n, int64_t c, line *row, int32_t *by_column, int64_t *squares) {
    for (int64_t start = 0, stop; start < n; start = stop) {
        stop = least(n, start + c - row->passed);
        int32_t *columns = by_column + row->passed, kept = 0;
        for (int64_t i = start; i < stop; i++) {
            columns[i - start] += held[i];
            kept += held[i];
        }
        *row = (line){row->passed + stop - start, row->kept + kept};
        if (row->passed < c) return;
        *squares += row->kept * row->kept;
        *row = (line){0, 0};
    }
}

/* Adds the square of what each block that ends here keeps to squares; but of one that begins elsewhere, what it keeps
 * to *cut. */
WITHIN void add_blocks(const uint8_t *held, int64_t n, int64_t size, line *block, int64_t **cut, int64_t *squares) {
    for (int64_t start = 0, stop; start < n; start = stop) {
        stop = least(n, start + size - block->passed);
        int32_t kept = 0;
        for (int64_t i = start; i < stop; i++) kept += held[i];
        *block = (line){block->passed + stop - start, block->kept + kept};
        if (block->passed < size) return;
        if (*cut) **cut = block->kept;
        else *squares += block->kept * block->kept;
        *cut = NULL;
        *block = (line){0, 0};
    }
}

/* n floats as doubles, up to the next full row of lanes with zeros. */
WITHIN void widen(const float *own, int64_t n, double *wide) {
    for (int64_t i = 0; i < n; i++) wide[i] = (double)own[i];
    for (int64_t i = n; i % LANES; i++) wide[i] = 0;
}

/* Adds n products to the lanes: the product of two floats is a double without rounding. */
WITHIN void add_products(const double *one, const double *other, int64_t n, double *into) {
    double lanes[LANES];
    memcpy(lanes, into, sizeof lanes);
    for (int64_t i = 0; i < n; i += LANES)
        for (int64_t l = 0; l < LANES; l++) lanes[l] += one[i + l] * other[i + l];
    memcpy(into, lanes, sizeof lanes);
}

WITHIN double sum_of(const double *lanes) {
    double total = 0;
    for (int64_t l = 0; l < LANES; l++) total += lanes[l];
    return total;
}

/* Adds to lanes [k k 16], f <= e, of n elements of k vectors that lie `apart`; wide [k WIDENED] is scratch. */
WITHIN void add_gram(const float *deltas, int64_t k, int64_t apart, int64_t n, double *wide, double *lanes) {
    for (int64_t start = 0; start < n; start += WIDENED) {
        int64_t count = least(WIDENED, n - start);
        for (int64_t e = 0; e < k; e++) {
            widen(deltas + e * apart + start, count, wide + e * WIDENED);
            for (int64_t f = 0; f <= e; f++)
                add_products(wide + e * WIDENED, wide + f * WIDENED, count, lanes + (e * k + f) * LANES);
        }
    }
}

/* Looks at k < 255 task vectors [k r c] of a slice. Adds up the positions that experts e and f both keep, both [k k],
 * and with different signs, opposed [k k]; those that exactly 0, 1, .. k keep, holders [k+1]; the squares of what each row
 * keeps, row_squares [k], and each block of `size` elements, block_squares [k]; what each column keeps, by_column
 * [k c]. Gives what is kept of a first and of a last block that other slices have a part of, cut [k 2] (element 0 is number
 * `first` of the first block), and inner products [k k]. 0 if memory ran out. */
CLONES int64_t count_vectors(const float *deltas, int64_t k, int64_t r, int64_t c, int64_t first, int64_t size,
                             int64_t *both, int64_t *opposed, int64_t *holders, int64_t *row_squares,
                             int64_t *block_squares, int32_t *by_column, int64_t *cut, double *products) {
    struct { line row, block; int64_t *cut; } *at = malloc((size_t)k * sizeof *at);
    uint8_t *held = malloc((size_t)(2 * k * SPAN)), *below = held + k * SPAN;
    double *lanes = calloc((size_t)(k * k * LANES + k * WIDENED), sizeof *lanes), *wide = lanes + k * k * LANES;
    int64_t done = at && held && lanes, n = r * c;
    for (int64_t e = 0; done && e < k; e++) {
        at[e].row = (line){0, 0}, at[e].block = (line){first, 0};
        at[e].cut = first ? cut + 2 * e : NULL;
    }
    for (int64_t start = 0; done && start < n; start += SPAN) {
        int64_t count = least(SPAN, n - start);
        for (int64_t e = 0; e < k; e++) {
            uint8_t *own = held + e * SPAN;
            signs_of((const uint32_t *)(deltas + e * n + start), count, own, below + e * SPAN);
            add_rows(own, count, c, &at[e].row, by_column + e * c, row_squares + e);
            add_blocks(own, count, size, &at[e].block, &at[e].cut, block_squares + e);
        }
        add_pairs(held, below, k, both, opposed);
        add_holders(held, k, count, holders);
        add_gram(deltas + start, k, n, count, wide, lanes);
    }
    for (int64_t e = 0; done && e < k; e++) {
        cut[2 * e + 1] = at[e].block.kept;
        for (int64_t f = 0; f <= e; f++) products[e * k + f] = products[f * k + e] = sum_of(lanes + (e * k + f) * LANES);
    }
    free(at), free(held), free(lanes);
    return done;
}

/* Looks at a merged vector [n] beside the task vectors [k n]: how many positions it keeps, and its inner products with itself
 * and with each of them [1+k]. -1 if memory ran out. */
CLONES int64_t count_merged(const float *merged, const float *deltas, int64_t k, int64_t n, double *products) {
    double wide[WIDENED], other[WIDENED], *lanes = calloc((size_t)(1 + k) * LANES, sizeof *lanes);
    int64_t kept = 0;
    if (!lanes) return -1;
    for (int64_t start = 0; start < n; start += WIDENED) {
        int64_t count = least(WIDENED, n - start);
        int32_t here = 0;
        for (int64_t i = start; i < start + count; i++) here += merged[i] != 0;
        kept += here;
        widen(merged + start, count, wide);
        add_products(wide, wide, count, lanes);
        for (int64_t e = 0; e < k; e++) {
            widen(deltas + e * n + start, count, other);
            add_products(wide, other, count, lanes + (1 + e) * LANES);
        }
    }
    for (int64_t e = 0; e <= k; e++) products[e] = sum_of(lanes + e * LANES);
    free(lanes);
    return kept;
}

/* Puts a pattern into a table of 2^bits places, 0 where free; whether it is new. */
static inline int64_t is_new(uint32_t pattern, uint32_t *table, int64_t bits) {
    uint32_t place = pattern * 0x9E3779B1u >> (32 - bits), mask = ((uint32_t)1 << bits) - 1;
    while (table[place] != pattern && table[place]) place = (place + 1) & mask;
    int64_t new = !table[place];
    table[place] = pattern;
    return new;
}

/* The different ones of n patterns other than those of zero, into found; how many. -1 if more than half of a table of
 * 2^bits places may be taken. A pattern whose low half is 0, as is nearly every difference of bf16 numbers, has a place of its
 * own in high [65536]; only the others go into the table. */
static inline int64_t gather(const uint32_t *patterns, int64_t n, uint8_t *high, uint32_t *table, int64_t bits,
                             uint32_t *found) {
    uint32_t others[PIECE];
    int64_t known = 0, most = (int64_t)1 << (bits - 1);
    memset(high, 0, 65536);
    memset(table, 0, sizeof *table << bits);
    for (int64_t start = 0; start < n; start += PIECE) {
        int64_t stop = least(start + PIECE, n), count = 0;
        for (int64_t i = start; i < stop; i++) {
            uint32_t pattern = others[count] = patterns[i], low = (uint16_t)pattern;
            high[low ? 0 : pattern >> 16] = 1;
            count += low != 0;
        }
        if (known + count > most) return -1;
        for (int64_t j = 0; j < count; j++)
            if (is_new(others[j], table, bits)) found[known++] = others[j];
    }
    high[0] = high[0x8000] = 0;
    for (uint32_t first = 0; first < 65536; first += 8) {
        uint64_t any;
        memcpy(&any, high + first, 8);
        for (uint32_t h = first; any && h < first + 8; h++)
            if (high[h]) found[known++] = h << 16;
    }
    return known;
}

/* The different values but zero of vectors [k n] into found [k n], and how many each has, known [k]. The scratch is a table
 * of 2^bits places and high [65536]; 0 if that table is too small. */
int64_t different(const uint32_t *patterns, int64_t k, int64_t n, uint8_t *high, uint32_t *table, int64_t bits,
                  uint32_t *found, int64_t *known) {
    for (int64_t e = 0; e < k; e++) {
        known[e] = gather(patterns + e * n, n, high, table, bits, found + e * n);
        if (known[e] < 0) return 0;
    }
    return 1;
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
