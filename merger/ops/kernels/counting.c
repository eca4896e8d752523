/* Counts: what an inspection says of task vectors. A position is kept where one is not zero. */
#include "numbers.h"

#define PIECE 4096  /* elements between two looks at the next array: what stays in a core's first cache */
#define SPAN 2048   /* elements of each vector that are looked at from all sides before the next */
#define SUMMED 1024 /* bytes of 0 and 1 that are added up eight to a word, whose sums stay below 256 */
#define WIDENED 512 /* elements that are doubles at once */
#define LANES 16    /* sums of an inner product that run side by side, of every 16th product */

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
WITHIN int64_t is_new(uint32_t pattern, uint32_t *table, int64_t bits) {
    uint32_t place = pattern * 0x9E3779B1u >> (32 - bits), mask = ((uint32_t)1 << bits) - 1;
    while (table[place] != pattern && table[place]) place = (place + 1) & mask;
    int64_t new = !table[place];
    table[place] = pattern;
    return new;
}

/* The different ones of n patterns other than those of zero, into found; how many. -1 if more than half of a table of
 * 2^bits places may be taken. A pattern whose low half is 0, as is nearly every difference of bf16 numbers, has a place of its
 * own in high [65536]; only the others go into the table. */
WITHIN int64_t gather(const uint32_t *patterns, int64_t n, uint8_t *high, uint32_t *table, int64_t bits,
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
ENDINGS(f16, f16)
#endif
