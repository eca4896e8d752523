/* Orders within rows: the highest of each, and the place of every element. */
#include "numbers.h"

/* Marks each row's wanted[r] highest free scores; equal ones go to the lower column. 0 if memory ran out. */
CLONES int64_t top_of_rows(const uint32_t *scores, const uint8_t *is_free, const int64_t *wanted, int64_t rows, int64_t n,
                           uint8_t *kept) {
    uint32_t *keys = malloc((size_t)(n ? n : 1) * sizeof *keys);
    if (!keys) return 0;
    uint32_t last = 0;
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
            last = last_taken(keys, n, wanted[r], last, &room);
            for (int64_t i = 0; i < n; i++) kept[i] = keys[i] > last;
            for (int64_t i = 0; room && i < n; i++)
                if (keys[i] == last) kept[i] = 1, room--;
        }
    }
    free(keys);
    return 1;
}

/* Each key's place in its row as a float, 0 for the highest; equal ones rank by column. 0 if memory ran out. */
int64_t ranks_of_rows(const uint32_t *keys, int64_t rows, int64_t n, float *ranks) {
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
            int shift = 32 + 11 * d;
            uint32_t place = 0;
            if (n && counts[d][items[0] >> shift & 2047] == n) continue; /* as the low bits of changes to bf16 weights */
            for (int b = 0; b < 2048; b++) { uint32_t own = counts[d][b]; counts[d][b] = place; place += own; }
            for (int64_t i = 0; i < n; i++) other[counts[d][items[i] >> shift & 2047]++] = items[i];
            uint64_t *swap = items; items = other; other = swap;
        }
        for (int64_t i = 0; i < n; i++) ranks[(uint32_t)items[i]] = (float)i;
    }
    free(items < other ? items : other);
    return 1;
}
