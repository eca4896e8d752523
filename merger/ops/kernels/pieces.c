/* Expressions over a slice, a piece at a time: every step is taken on one piece, which stays in a core's first cache, before
 * the first is taken on the next. What lies between the stored values and the result goes through no memory.
 *
 * A register holds one piece: floats, or masks whose elements are all ones or 0. The steps come from steps.py.
 */
#include "numbers.h"

#define PIECE 1024 /* elements */
#define EACH for (int64_t i = 0; i < n; i++)

#define STEPS(X)                                                                                       \
    X(WIDEN) X(DELTA) X(ROUND) X(TAKE) X(WRITE)                           /* with stored values */      \
    X(LOAD) X(LOAD_MASK) X(COLUMNS) X(CONSTANT) X(UNIFORM)                /* from elsewhere */          \
    X(ADD) X(SUBTRACT) X(MULTIPLY) X(DIVIDE) X(ADD_PRODUCT) X(AGREE) X(ONE_FOR_ZERO)                    \
    X(AT_LEAST) X(NONZERO) X(MARK) X(TOP_OF_BLOCKS) X(AND) X(AND_NOT) X(OR) X(NOT)         /* masks */                   \
    X(STORE) X(STORE_MASK) X(TALLY_HIGH) X(TALLY_LOW) X(TALLY_NEAR) X(COUNT_EQUAL)      /* to memory */

#define NUMBER(NAME) NAME,
#define WORD(NAME) #NAME " "
enum { STEPS(NUMBER) };
const char step_names[] = STEPS(WORD); /* for steps.py */
const int64_t piece = PIECE;

typedef struct {
    uint64_t op, out, a, b, c; /* registers; 0 where there is none */
    uint64_t p, q, r, which;   /* addresses, numbers, and which of the stored types or of the tables of counts */
} step;

enum { NOT_FINITE = 1, OVERFLOW = 2, NO_MEMORY = 4 };

/* --- stored values ---------------------------------------------------------------------------- */

#define OF_TYPE(TYPE, NAME)                                                                             \
    WITHIN int64_t delta_##NAME(const TYPE *own, const TYPE *base, int64_t n, float *out, uint32_t *lossy) { \
        uint32_t largest = 0, lost = 0;                                                                 \
        EACH {                                                                                          \
            float value = from_##NAME(own[i]), from = from_##NAME(base[i]), delta = value - from;       \
            uint32_t size = as_bits(delta) & ABSOLUTE;                                                  \
            largest = size > largest ? size : largest;                                                  \
            lost |= as_bits(from + delta) ^ as_bits(value);                                             \
            out[i] = delta;                                                                             \
        }                                                                                               \
        *lossy = lost;                                                                                  \
        return largest < INFINITE ? 0 : NOT_FINITE;                                                     \
    }                                                                                                   \
    WITHIN int64_t write_##NAME(const float *merged, const float *delta, int64_t n, TYPE *out) {        \
        uint32_t largest = 0;                                                                           \
        EACH {                                                                                          \
            out[i] = to_##NAME(merged[i]);                                                              \
            uint32_t size = as_bits(merged[i]) & ABSOLUTE, asked = as_bits(delta[i]) & ABSOLUTE;        \
            size = size > asked ? size : asked;                                                         \
            largest = size > largest ? size : largest;                                                  \
        }                                                                                               \
        return largest < INFINITE ? 0 : OVERFLOW;                                                       \
    }                                                                                                   \
    /* ROUND and TAKE leave values of the stored type: base where delta is 0, and `own` where it is that expert's */ \
    WITHIN int64_t stored_##NAME(const step *s, uint32_t *const *at, uint32_t *lossy, int64_t start, int64_t n) { \
        const TYPE *own = (const TYPE *)s->p + start;                                                   \
        const float *a = (const float *)at[s->a], *b = (const float *)at[s->b];                         \
        float *out = (float *)at[s->out];                                                               \
        switch (s->op) {                                                                                \
        case WIDEN: EACH out[i] = from_##NAME(own[i]); return 0;                                        \
        case DELTA: return delta_##NAME(own, (const TYPE *)s->q + start, n, out, lossy + s->out);       \
        case ROUND:                                                                                     \
            EACH {                                                                                      \
                float base = a[i], delta = b[i], sum = from_##NAME(to_##NAME(base + delta));            \
                out[i] = delta == 0 ? base : sum;                                                       \
            }                                                                                           \
            return 0;                                                                                   \
        case TAKE:                                                                                      \
            EACH {                                                                                      \
                float mine = from_##NAME(own[i]), old = out[i];                                         \
                out[i] = (a[i] == b[i]) & (a[i] != 0) ? mine : old;                                     \
            }                                                                                           \
            return 0;                                                                                   \
        default: return write_##NAME(a, b, n, (TYPE *)s->p + start);                                    \
        }                                                                                               \
    }

OF_TYPE(bf16, bf16)
OF_TYPE(float, f32)
#ifdef __FLT16_MAX__
OF_TYPE(f16, f16)
const int64_t stored_types = 3;
#else
const int64_t stored_types = 2;
#endif

WITHIN int64_t stored(const step *s, uint32_t *const *at, uint32_t *lossy, int64_t start, int64_t n) {
    if (s->op == TAKE && !lossy[s->b]) return 0; /* base + (own - base) is own to the bit, all over the piece */
    switch (s->which) {
    case 0: return stored_bf16(s, at, lossy, start, n);
    case 1: return stored_f32(s, at, lossy, start, n);
#ifdef __FLT16_MAX__
    default: return stored_f16(s, at, lossy, start, n);
#else
    default: return 0;
#endif
    }
}

/* --- draws ------------------------------------------------------------------------------------ */

/* The words of a product of 64 bits by 64. */
WITHIN uint64_t product(uint64_t x, uint64_t y, uint64_t *high) {
#ifdef __SIZEOF_INT128__
    unsigned __int128 whole = (unsigned __int128)x * y;
    *high = (uint64_t)(whole >> 64);
    return (uint64_t)whole;
#else
    uint64_t x0 = (uint32_t)x, x1 = x >> 32, y0 = (uint32_t)y, y1 = y >> 32;
    uint64_t middle = x1 * y0 + (x0 * y0 >> 32), other = x0 * y1 + (uint32_t)middle;
    *high = x1 * y1 + (middle >> 32) + (other >> 32);
    return x * y;
#endif
}

/* Philox4x64-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405): four words of one counter. */
WITHIN void philox(uint64_t counter, uint64_t key0, uint64_t key1, uint64_t words[4]) {
    uint64_t c0 = counter, c1 = 0, c2 = 0, c3 = 0, left, right;
    for (int round = 0; round < 10; round++) {
        uint64_t low_left = product(0xD2E7470EE14C6C93u, c0, &left), low_right = product(0xCA5A826395121157u, c2, &right);
        c0 = right ^ c1 ^ key0, c1 = low_right;
        c2 = left ^ c3 ^ key1, c3 = low_left;
        key0 += 0x9E3779B97F4A7C15u;
        key1 += 0xBB67AE8584CAA73Bu;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

/* Uniforms of 24 bits from both halves of each word, low half first: numbers start to start + n of the stream, n at most
 * PIECE. Made apart from the words, of which several are under way at the same time and none of which is a vector. */
WITHIN void uniforms_f32(uint64_t key0, uint64_t key1, int64_t start, int64_t n, float *out) {
    uint64_t words[PIECE / 2 + 8];
    uint32_t halves[PIECE + 16];
    int64_t skip = start % 8, counters = (skip + n + 7) / 8;
    for (int64_t i = 0; i < counters; i++) philox((uint64_t)(start / 8 + i + 1), key0, key1, words + 4 * i);
    for (int64_t i = 0; i < 4 * counters; i++) halves[2 * i] = (uint32_t)words[i], halves[2 * i + 1] = (uint32_t)(words[i] >> 32);
    EACH out[i] = (float)(int32_t)(halves[skip + i] >> 8) * 0x1p-24f;
}

/* Uniforms of 53 bits, one from each word. */
int64_t uniforms_f64(uint64_t key0, uint64_t key1, int64_t start, int64_t n, double *out) {
    for (int64_t counter = start / 4; counter * 4 < start + n; counter++) {
        uint64_t words[4];
        philox((uint64_t)counter + 1, key0, key1, words);
        for (int64_t j = 0; j < 4; j++) {
            int64_t i = counter * 4 + j - start;
            if (i >= 0 && i < n) out[i] = (double)(words[j] >> 11) * 0x1p-53;
        }
    }
    return 1;
}

/* --- selection: the top of a score, as a count ------------------------------------------------ */

#define KEY(i) (own[i] & ABSOLUTE)
#define OPEN(i) (open ? open[i] : 0xFFFFFFFFu)
#define HIGH 32768

WITHIN int64_t count_equal(const uint32_t *own, const uint32_t *open, int64_t n, uint32_t level) {
    int32_t equal = 0;
    EACH equal += (int32_t)((KEY(i) == level) & OPEN(i));
    return equal;
}

/* All ones where a free key is above the level, and at the first `room` that are free and equal it; these are taken off. */
WITHIN void mark(const uint32_t *own, const uint32_t *open, int64_t n, uint32_t level, uint64_t *room, uint32_t *out) {
    uint64_t equal = *room ? (uint64_t)count_equal(own, open, n, level) : 0;
    uint32_t from = equal && *room >= equal ? level : level + 1;
    EACH out[i] = (KEY(i) >= from ? 0xFFFFFFFFu : 0) & OPEN(i);
    if (from == level) *room -= equal;
    else
        for (int64_t i = 0; equal && *room && i < n; i++)
            if (KEY(i) == level && OPEN(i)) {
                out[i] = 0xFFFFFFFFu;
                --*room;
            }
}

/* Counts the high halves of free keys into turns [32768 2]. */
WITHIN void tally_high(const uint32_t *own, const uint32_t *open, int64_t n, uint32_t *turns) {
    for (int64_t start = 0; start < n; start += 2) /* the same key again need not wait for the one before */
        for (int64_t i = start; i < least(start + 2, n); i++)
            turns[2 * (KEY(i) >> 16) + (uint32_t)(i - start)] += OPEN(i) & 1u;
}

/* Counts the free keys from `from` to from + width, each by itself, behind the number of those above. */
WITHIN void tally_near(const uint32_t *own, const uint32_t *open, int64_t n, uint32_t from, uint32_t width, int64_t *tally) {
    uint8_t inside[PIECE + 8] = {0};
    int32_t above = 0;
    EACH {
        uint32_t place = KEY(i) - from;
        above += (int32_t)((KEY(i) >= from + width) & OPEN(i));
        inside[i] = (uint8_t)((place < width) & OPEN(i));
    }
    tally[0] += above;
    for (int64_t start = 0; start < n; start += 8) { /* few are near */
        uint64_t eight;
        memcpy(&eight, inside + start, 8);
        for (int64_t i = start; eight; i++, eight >>= 8)
            if (eight & 1) tally[1 + KEY(i) - from]++;
    }
}

WITHIN void tally_low(const uint32_t *own, const uint32_t *open, int64_t n, uint32_t bucket, int64_t *tally) {
    uint16_t inside[PIECE];
    int64_t found = 0;
    EACH {
        inside[found] = (uint16_t)own[i];
        found += (KEY(i) >> 16 == bucket) & OPEN(i);
    }
    for (int64_t j = 0; j < found; j++) tally[inside[j]]++;
}

/* All ones at the `most` highest free keys of every block, of a last one that is shorter at `tail`. */
WITHIN void top_of_blocks(const uint32_t *own, const uint32_t *open, int64_t n, int64_t size, int64_t most, int64_t tail,
                          uint32_t *out) {
    uint32_t keys[PIECE], last = 0;
    EACH keys[i] = ((own[i] & ABSOLUTE) + 1) & OPEN(i);
    for (int64_t start = 0; start < n; start += size) {
        int64_t count = least(size, n - start), wanted = count < size ? tail : most, room = 0;
        const uint32_t *block = keys + start;
        uint32_t *mine = out + start, from = INFINITE + 2;
        int32_t there = 0;
        for (int64_t i = 0; i < count; i++) there += block[i] != 0;
        if (wanted >= there) from = 1;
        else if (wanted > 0) {
            last = last_taken(block, count, wanted, last, &room);
            from = last + 1;
        }
        for (int64_t i = 0; i < count; i++) mine[i] = block[i] >= from ? 0xFFFFFFFFu : 0;
        for (int64_t i = 0; room && i < count; i++)
            if (block[i] == last) mine[i] = 0xFFFFFFFFu, room--;
    }
}

/* --- the steps -------------------------------------------------------------------------------- */

WITHIN void columns(const float *own, int64_t start, int64_t n, int64_t width, float *out) {
    for (int64_t i = 0, column = start % width, count; i < n; i += count, column = 0) {
        count = least(n - i, width - column);
        memcpy(out + i, own + column, (size_t)count * sizeof *out);
    }
}

WITHIN int64_t take(step *s, uint32_t *const *at, uint32_t *lossy, uint32_t *turns, int64_t start, int64_t n) {
    uint32_t *out = at[s->out];
    const uint32_t *own = at[s->a], *other = at[s->b], *open = other;
    const float *a = (const float *)own, *b = (const float *)other, *c = (const float *)at[s->c];
    float *result = (float *)out;
    switch (s->op) {
    case LOAD: return 0; /* the register is that memory */
    case LOAD_MASK: EACH out[i] = 0u - ((const uint8_t *)s->p)[start + i]; return 0;
    case COLUMNS: columns((const float *)s->p, start, n, (int64_t)s->q, result); return 0;
    case CONSTANT: if (!start) EACH out[i] = (uint32_t)s->p; return 0;
    case UNIFORM: uniforms_f32(s->p, s->q, (int64_t)s->r + start, n, result); return 0;
    case ADD: EACH result[i] = a[i] + b[i]; return 0;
    case SUBTRACT: EACH result[i] = a[i] - b[i]; return 0;
    case MULTIPLY: EACH result[i] = a[i] * b[i]; return 0;
    case DIVIDE: EACH result[i] = a[i] / b[i]; return 0;
    case ADD_PRODUCT: EACH result[i] = a[i] + b[i] * c[i]; return 0;
    case AGREE: EACH { float weight = c[i]; result[i] = ((a[i] > 0) & (b[i] > 0)) | ((a[i] < 0) & (b[i] < 0)) ? weight : 0; } return 0;
    case ONE_FOR_ZERO: EACH { float old = a[i]; result[i] = old == 0 ? 1 : old; } return 0;
    case AT_LEAST: EACH out[i] = a[i] >= b[i] ? 0xFFFFFFFFu : 0; return 0;
    case NONZERO: EACH out[i] = a[i] != 0 ? 0xFFFFFFFFu : 0; return 0;
    case AND: EACH out[i] = own[i] & other[i]; return 0;
    case AND_NOT: EACH out[i] = own[i] & ~other[i]; return 0;
    case OR: EACH out[i] = own[i] | other[i]; return 0;
    case NOT: EACH out[i] = ~own[i]; return 0;
    case STORE: memcpy((float *)s->p + start, own, (size_t)n * sizeof *own); return 0;
    case STORE_MASK: EACH ((uint8_t *)s->p)[start + i] = own[i] & 1u; return 0;
    case MARK:
        if (open) mark(own, open, n, (uint32_t)s->p, &s->q, out);
        else mark(own, NULL, n, (uint32_t)s->p, &s->q, out);
        return 0;
    case TOP_OF_BLOCKS:
        if (open) top_of_blocks(own, open, n, (int64_t)s->p, (int64_t)s->q, (int64_t)s->r, out);
        else top_of_blocks(own, NULL, n, (int64_t)s->p, (int64_t)s->q, (int64_t)s->r, out);
        return 0;
    case TALLY_HIGH:
        if (open) tally_high(own, open, n, turns + s->which * 2 * HIGH);
        else tally_high(own, NULL, n, turns + s->which * 2 * HIGH);
        return 0;
    case TALLY_NEAR:
        if (open) tally_near(own, open, n, (uint32_t)s->q, (uint32_t)s->r, (int64_t *)s->p);
        else tally_near(own, NULL, n, (uint32_t)s->q, (uint32_t)s->r, (int64_t *)s->p);
        return 0;
    case TALLY_LOW:
        if (open) tally_low(own, open, n, (uint32_t)s->q, (int64_t *)s->p);
        else tally_low(own, NULL, n, (uint32_t)s->q, (int64_t *)s->p);
        return 0;
    case COUNT_EQUAL:
        *(int64_t *)s->p += open ? count_equal(own, open, n, (uint32_t)s->q) : count_equal(own, NULL, n, (uint32_t)s->q);
        return 0;
    default: return stored(s, at, lossy, start, n);
    }
}

/* Takes so many steps over n elements, with registers 1 to `registers`. What went wrong, as bits. */
CLONES int64_t take_steps(step *steps, int64_t count, int64_t registers, int64_t tables, int64_t n) {
    uint32_t *scratch = aligned_alloc(64, (size_t)(registers + 1) * PIECE * sizeof *scratch);
    uint32_t **at = calloc((size_t)registers + 1, sizeof *at);
    uint32_t *lossy = malloc((size_t)(registers + 1) * sizeof *lossy); /* whether a register may be no exact difference */
    uint32_t *turns = calloc((size_t)tables * 2 * HIGH + 1, sizeof *turns);
    int64_t wrong = scratch && at && lossy && turns ? 0 : NO_MEMORY;
    for (int64_t start = 0; start < n && !(wrong & NO_MEMORY); start += PIECE)
        for (step *s = steps; s < steps + count; s++) {
            lossy[s->out] = 1;
            if (s->out) at[s->out] = s->op == LOAD ? (uint32_t *)s->p + start : scratch + s->out * PIECE;
            wrong |= take(s, at, lossy, turns, start, least(PIECE, n - start));
        }
    for (step *s = steps; s < steps + count && !(wrong & NO_MEMORY); s++)
        for (int64_t h = 0; s->op == TALLY_HIGH && h < HIGH; h++) {
            const uint32_t *both = turns + (s->which * HIGH + (uint64_t)h) * 2;
            ((int64_t *)s->p)[h] += (int64_t)both[0] + both[1];
        }
    free(scratch), free(at), free(lossy), free(turns);
    return wrong;
}
