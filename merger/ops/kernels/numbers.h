/* What the loops share. A score ranks by its size, and a float32 without its sign sorts as its own bit pattern.
 *
 * Each loop has a twin in reference.py or counting.py that gives the same bits. Nothing here keeps state or starts a
 * thread. Built without contraction and without fast-math: a * b + c rounds twice, as it does in torch.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define WITHIN static inline __attribute__((always_inline)) /* a function of its own is compiled for the oldest processors */

#define ABSOLUTE 0x7FFFFFFFu
#define INFINITE 0x7F800000u

typedef uint16_t bf16;

WITHIN float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
WITHIN uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
WITHIN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

WITHIN float from_f32(float x) { return x; }
WITHIN float from_bf16(bf16 x) { return as_float((uint32_t)x << 16); }
WITHIN float to_f32(float x) { return x; }
WITHIN bf16 to_bf16(float x) { /* to the nearest, ties to even; what is not a number is not handed over */
    uint32_t bits = as_bits(x);
    return (bf16)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
#ifdef __FLT16_MAX__
typedef uint16_t f16;
WITHIN float from_f16(f16 x) { _Float16 half; memcpy(&half, &x, 2); return (float)half; }
WITHIN f16 to_f16(float x) { _Float16 half = (_Float16)x; f16 bits; memcpy(&bits, &half, 2); return bits; }
#endif

/* The key of the wanted-th highest of a row, and how many that equal it are to be taken. Counting what is above a level is the
 * one thing that vectors do best, so it is found by halving, in steps that grow from `near` on: neighbours are alike. Fewer
 * than `wanted` keys are above it; 0 is a barred place. */
WITHIN uint32_t last_taken(const uint32_t *keys, int64_t n, int64_t wanted, uint32_t near, int64_t *room) {
    uint32_t low = 1, high = INFINITE + 2, stride = 1u << 18; /* low is reached by at least `wanted` keys, high by fewer */
    uint32_t middle = near > low && near < high ? near : high / 2;
    int64_t above = 0;
    while (high - low > 1) {
        int32_t reached = 0;
        for (int64_t i = 0; i < n; i++) reached += keys[i] >= middle;
        if (reached >= wanted) low = middle;
        else { high = middle; above = reached; }
        if (reached == wanted) break;
        if (low > 1 && high == INFINITE + 2 && stride < high - low) middle = low + stride;
        else if (low == 1 && stride < high - low) middle = high - stride;
        else middle = low + (high - low) / 2;
        stride <<= stride < 1u << 30;
    }
    *room = wanted - above;
    return low;
}
