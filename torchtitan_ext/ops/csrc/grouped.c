// Grouped products in bfloat16 with the tile units (AMX) of an x86 CPU, accumulated in float32.
//
// x (R, D) are rows sorted by expert, weight (E, N, D), offsets (E,) the end of each expert's rows. A tile product adds
// A (16 rows, 32 values) times B to C (16, 16) in float32. B is stored as 16 rows of 16 pairs: row i holds the values 2i
// and 2i + 1 of the inner dimension of 16 columns. So the inner dimension is padded with zeros to a multiple of 32.
//
//     forward          out = x weight^T       C: 16 columns of out by 16 rows;   A: weight as it is,  B: rows of x
//     backward, rows   grad_x = grad weight   C: 16 rows by 16 columns;          A: grad as it is,    B: weight
//     backward, weight grad_weight = grad^T x C: a block of grad_weight;         A: columns of grad,  B: x
//
// Every value is one sum in a fixed order, so results do not depend on the number of threads or on other rows.

#include <stdint.h>

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    REQUEST_PERMISSION = 0x1023, // arch_prctl: ARCH_REQ_XCOMP_PERM
    TILE_DATA = 18,
    STEP = 32,       // values of the inner dimension per tile product; also the edge of a block of C
    TILE = 512,      // 16-bit values in a tile
    ROWS = 512,      // rows of x that are multiplied with a whole weight at a time
    COLUMNS = 128,   // columns of a weight, or rows of its gradient, at a time
    TASKS = 8,       // wanted tasks per thread
};

typedef struct __attribute__((packed)) {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Configuration;

// Whether this process may use tiles. The kernel grants it once for all threads.
int grouped_available(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

static void configure(void) {
    Configuration tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.row_bytes[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t padded(int64_t n) { return (n + STEP - 1) / STEP * STEP; }

static void *scratch(int64_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) {
        fputs("no memory for a grouped product\n", stderr);
        abort();
    }
    return memory;
}

static inline __mmask32 first_halves(int64_t n) { return n >= 32 ? 0xFFFFFFFFu : n <= 0 ? 0 : (1u << n) - 1; }
static inline __mmask16 first_words(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }

// 32 values in bfloat16, of which `count` are read; the others are 0.
static inline __m512i load_bfloat16(const uint16_t *p, int64_t count) {
    return count >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first_halves(count), p);
}
static inline __m512i load_float(const float *p, int64_t count) {
    __m512 low = _mm512_maskz_loadu_ps(first_words(count), p);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first_words(count - 16), p + 16), low);
}

// Transposes 16 by 16 words.
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    }
}

// The words (a[j], b[j]), j < 32, as two vectors of 16.
static inline void interleave(__m512i a, __m512i b, __m512i *first, __m512i *second) {
    __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    *first = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
    *second = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
}

// B tiles whose columns are rows of x: out[(row block of 16, step)] from x (rows, width), zeros after both.
static void pack_rows(const uint16_t *x, int64_t stride, int64_t rows, int64_t width, uint16_t *out) {
    int64_t steps = padded(width) / STEP, blocks = padded(rows) / 16;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t s = 0; s < steps; s++) {
            __m512i words[16];
            for (int64_t i = 0; i < 16; i++) {
                int64_t row = 16 * b + i;
                const uint16_t *p = x + row * stride + s * STEP;
                words[i] = row < rows ? load_bfloat16(p, width - s * STEP) : _mm512_setzero_si512();
            }
            transpose(words);
            for (int64_t i = 0; i < 16; i++) _mm512_store_si512(out + (b * steps + s) * TILE + i * 32, words[i]);
        }
}

// B tiles whose columns are columns of a matrix (rows, columns): out[(step of 32 rows, block of 16 columns)].
#define PACK_COLUMNS(NAME, ELEMENT)                                                                                    \
    static void pack_columns_##NAME(const ELEMENT *m, int64_t stride, int64_t rows, int64_t columns, uint16_t *out) {  \
        int64_t steps = padded(rows) / STEP, blocks = padded(columns) / 16;                                            \
        for (int64_t s = 0; s < steps; s++)                                                                            \
            for (int64_t i = 0; i < 16; i++) {                                                                         \
                int64_t row = s * STEP + 2 * i;                                                                        \
                for (int64_t c = 0; c < columns; c += STEP) {                                                          \
                    const ELEMENT *p = m + row * stride + c;                                                           \
                    __m512i a = row < rows ? load_##NAME(p, columns - c) : _mm512_setzero_si512();                     \
                    __m512i b = row + 1 < rows ? load_##NAME(p + stride, columns - c) : _mm512_setzero_si512();        \
                    uint16_t *to = out + (s * blocks + c / 16) * TILE + i * 32;                                        \
                    __m512i first, second;                                                                             \
                    interleave(a, b, &first, &second);                                                                 \
                    _mm512_store_si512(to, first);                                                                     \
                    _mm512_store_si512(to + TILE, second);                                                             \
                }                                                                                                      \
            }                                                                                                          \
    }
PACK_COLUMNS(bfloat16, uint16_t)
PACK_COLUMNS(float, float)

// A tiles whose rows are columns of a matrix (rows, columns): out[(block of 16 columns, step of 32 rows)].
static void pack_transposed(const uint16_t *m, int64_t stride, int64_t rows, int64_t columns, uint16_t *out) {
    int64_t steps = padded(rows) / STEP;
    for (int64_t s = 0; s < steps; s++)
        for (int64_t c = 0; c < columns; c += STEP) {
            __m512i first[16], second[16];
            for (int64_t i = 0; i < 16; i++) {
                int64_t row = s * STEP + 2 * i;
                const uint16_t *p = m + row * stride + c;
                __m512i a = row < rows ? load_bfloat16(p, columns - c) : _mm512_setzero_si512();
                __m512i b = row + 1 < rows ? load_bfloat16(p + stride, columns - c) : _mm512_setzero_si512();
                interleave(a, b, first + i, second + i);
            }
            transpose(first);
            transpose(second);
            uint16_t *to = out + (c / 16 * steps + s) * TILE;
            for (int64_t i = 0; i < 16; i++) {
                _mm512_store_si512(to + i * 32, first[i]);
                _mm512_store_si512(to + steps * TILE + i * 32, second[i]);
            }
        }
}

// Rows of a matrix with zeros after its columns (and after `rows`), in bfloat16: out (32, padded width).
#define COPY_ROWS(NAME, ELEMENT)                                                                                       \
    static void copy_rows_##NAME(const ELEMENT *m, int64_t stride, int64_t rows, int64_t width, uint16_t *out) {       \
        int64_t wide = padded(width);                                                                                  \
        for (int64_t i = 0; i < STEP; i++)                                                                             \
            for (int64_t c = 0; c < wide; c += STEP)                                                                   \
                _mm512_store_si512(out + i * wide + c,                                                                 \
                                   i < rows ? load_##NAME(m + i * stride + c, width - c) : _mm512_setzero_si512());    \
    }
COPY_ROWS(bfloat16, uint16_t)
COPY_ROWS(float, float)

// C (32, 32) = the sum over steps of A (32 rows from a, `a_row` values apart, `a_step` to the next step) times
// B (two tiles, `b_block` apart, `b_step` to the next step). c: (32, 32) floats.
static inline void block(const uint16_t *a, int64_t a_row, int64_t a_half, int64_t a_step, const uint16_t *b,
                         int64_t b_block, int64_t b_step, int64_t steps, float *c) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s++, a += a_step, b += b_step) {
        _tile_loadd(4, a, a_row * 2);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + b_block, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + a_half, a_row * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
}

static inline __m512i rounded(const float *c) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(c + 16), _mm512_load_ps(c));
}

// Writes C as it is.
static inline void put_bfloat16(const float *c, uint16_t *out, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < least(rows, STEP); i++)
        _mm512_mask_storeu_epi16(out + i * stride, first_halves(columns), rounded(c + i * STEP));
}
static inline void put_float(const float *c, float *out, int64_t stride, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < least(rows, STEP); i++) {
        _mm512_mask_storeu_ps(out + i * stride, first_words(columns), _mm512_load_ps(c + i * STEP));
        _mm512_mask_storeu_ps(out + i * stride + 16, first_words(columns - 16), _mm512_load_ps(c + i * STEP + 16));
    }
}

// The same around the caches: a weight's gradient is larger than they are, and is read much later.
static inline int whole_lines(const void *out, int64_t row_bytes, int64_t rows, int64_t columns) {
    return rows >= STEP && columns >= STEP && ((uintptr_t)out | (uintptr_t)row_bytes) % 64 == 0;
}
static inline void stream_bfloat16(const float *c, uint16_t *out, int64_t stride, int64_t rows, int64_t columns) {
    if (!whole_lines(out, stride * 2, rows, columns)) {
        put_bfloat16(c, out, stride, rows, columns);
        return;
    }
    for (int64_t i = 0; i < STEP; i++) _mm512_stream_si512((__m512i *)(out + i * stride), rounded(c + i * STEP));
}
static inline void stream_float(const float *c, float *out, int64_t stride, int64_t rows, int64_t columns) {
    if (!whole_lines(out, stride * 4, rows, columns)) {
        put_float(c, out, stride, rows, columns);
        return;
    }
    for (int64_t i = 0; i < STEP; i++) {
        _mm512_stream_ps(out + i * stride, _mm512_load_ps(c + i * STEP));
        _mm512_stream_ps(out + i * stride + 16, _mm512_load_ps(c + i * STEP + 16));
    }
}

// Writes the transpose of C: `rows` of its columns, `columns` of its rows.
static inline void put_transposed(const float *c, uint16_t *out, int64_t stride, int64_t rows, int64_t columns) {
    __m512i first[16], second[16]; // pairs of rows of C, for its first 16 columns and the other 16
    for (int64_t i = 0; i < 16; i++)
        interleave(rounded(c + 2 * i * STEP), rounded(c + (2 * i + 1) * STEP), first + i, second + i);
    transpose(first);
    for (int64_t i = 0; i < least(rows, 16); i++)
        _mm512_mask_storeu_epi16(out + i * stride, first_halves(columns), first[i]);
    if (rows <= 16) return;
    transpose(second);
    for (int64_t i = 16; i < least(rows, STEP); i++)
        _mm512_mask_storeu_epi16(out + i * stride, first_halves(columns), second[i - 16]);
}

// Into how many parts the work of an expert is divided, so that all threads have some.
static inline int64_t parts(int64_t experts, int64_t units, int threads) {
    return least((TASKS * threads + experts - 1) / experts, units);
}

#define GROUPED(NAME, ELEMENT)                                                                                         \
    void grouped_forward_##NAME(const uint16_t *x, const ELEMENT *weight, const int32_t *offsets, uint16_t *out,       \
                                int64_t experts, int64_t N, int64_t D, int threads) {                                  \
        int64_t steps = padded(D) / STEP, wide = padded(D), panels = padded(N) / STEP;                                 \
        int64_t each = parts(experts, panels, threads);                                                                \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            configure();                                                                                               \
            uint16_t *packed = scratch(ROWS * wide * 2), *panel = scratch(STEP * wide * 2);                            \
            float *c = scratch(STEP * STEP * 4);                                                                       \
            _Pragma("omp for schedule(dynamic)") for (int64_t task = 0; task < experts * each; task++) {               \
                int64_t e = task / each, part = task % each;                                                           \
                int64_t start = e ? offsets[e - 1] : 0, end = offsets[e];                                              \
                for (int64_t r = start; r < end; r += ROWS) {                                                          \
                    int64_t rows = least(ROWS, end - r);                                                               \
                    pack_rows(x + r * D, D, rows, D, packed);                                                          \
                    for (int64_t p = part * panels / each; p < (part + 1) * panels / each; p++) {                      \
                        int64_t n = p * STEP, width = least(STEP, N - n);                                              \
                        const ELEMENT *from = weight + (e * N + n) * D;                                                \
                        const uint16_t *a = (const uint16_t *)from;                                                    \
                        if (sizeof(ELEMENT) == 4 || D % STEP || (e == experts - 1 && width < STEP)) {                  \
                            copy_rows_##NAME(from, D, width, D, panel);                                                \
                            a = panel;                                                                                 \
                        }                                                                                              \
                        int64_t stride = a == panel ? wide : D;                                                        \
                        for (int64_t i = 0; i < rows; i += STEP) {                                                     \
                            block(a, stride, 16 * stride, STEP, packed + i / 16 * steps * TILE, steps * TILE, TILE,    \
                                  steps, c);                                                                           \
                            put_transposed(c, out + (r + i) * N + n, N, rows - i, width);                              \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            free(packed);                                                                                              \
            free(panel);                                                                                               \
            free(c);                                                                                                   \
            _tile_release();                                                                                           \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void grouped_backward_rows_##NAME(const uint16_t *grad, const ELEMENT *weight, const int32_t *offsets,             \
                                      uint16_t *grad_x, int64_t experts, int64_t N, int64_t D, int threads) {          \
        int64_t steps = padded(N) / STEP, wide = padded(N), chunks = (D + COLUMNS - 1) / COLUMNS;                      \
        int64_t total = offsets[experts - 1];                                                                          \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            configure();                                                                                               \
            uint16_t *packed = scratch(COLUMNS * wide * 2), *panel = scratch(STEP * wide * 2);                         \
            float *c = scratch(STEP * STEP * 4);                                                                       \
            _Pragma("omp for schedule(dynamic)") for (int64_t task = 0; task < experts * chunks; task++) {             \
                int64_t e = task / chunks, d = task % chunks * COLUMNS, columns = least(COLUMNS, D - d);               \
                int64_t start = e ? offsets[e - 1] : 0, end = offsets[e], blocks = padded(columns) / 16;               \
                if (start == end) continue;                                                                            \
                pack_columns_##NAME(weight + e * N * D + d, D, N, columns, packed);                                    \
                for (int64_t r = start; r < end; r += STEP) {                                                          \
                    int64_t rows = least(STEP, end - r);                                                               \
                    const uint16_t *a = grad + r * N;                                                                  \
                    if (N % STEP || r + STEP > total) {                                                                \
                        copy_rows_bfloat16(a, N, rows, N, panel);                                                      \
                        a = panel;                                                                                     \
                    }                                                                                                  \
                    int64_t stride = a == panel ? wide : N;                                                            \
                    for (int64_t i = 0; i < columns; i += STEP) {                                                      \
                        block(a, stride, 16 * stride, STEP, packed + i / 16 * TILE, TILE, blocks * TILE, steps, c);    \
                        put_bfloat16(c, grad_x + r * D + d + i, D, rows, columns - i);                                 \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            free(packed);                                                                                              \
            free(panel);                                                                                               \
            free(c);                                                                                                   \
            _tile_release();                                                                                           \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void grouped_backward_weight_##NAME(const uint16_t *grad, const uint16_t *x, const int32_t *offsets,               \
                                        ELEMENT *grad_weight, int64_t experts, int64_t N, int64_t D, int threads) {    \
        int64_t chunks = (N + COLUMNS - 1) / COLUMNS, each = parts(experts, chunks, threads), most = 0;                \
        for (int64_t e = 0; e < experts; e++) {                                                                        \
            int64_t rows = offsets[e] - (e ? offsets[e - 1] : 0);                                                      \
            most = rows > most ? rows : most;                                                                          \
        }                                                                                                              \
        _Pragma("omp parallel num_threads(threads)") {                                                                 \
            configure();                                                                                               \
            uint16_t *packed = scratch(padded(most) * padded(D) * 2), *columns = scratch(padded(most) * COLUMNS * 2);  \
            float *c = scratch(STEP * STEP * 4);                                                                       \
            _Pragma("omp for schedule(dynamic)") for (int64_t task = 0; task < experts * each; task++) {               \
                int64_t e = task / each, part = task % each, first = part * chunks / each * COLUMNS;                   \
                int64_t last = least(N, (part + 1) * chunks / each * COLUMNS);                                         \
                int64_t start = e ? offsets[e - 1] : 0, rows = offsets[e] - start, steps = padded(rows) / STEP;        \
                ELEMENT *to = grad_weight + e * N * D;                                                                 \
                if (rows == 0) {                                                                                       \
                    memset(to + first * D, 0, (last - first) * D * sizeof(ELEMENT));                                   \
                    continue;                                                                                          \
                }                                                                                                      \
                int64_t blocks = padded(D) / 16;                                                                       \
                pack_columns_bfloat16(x + start * D, D, rows, D, packed);                                              \
                for (int64_t n = first; n < last; n += COLUMNS) {                                                      \
                    int64_t height = least(COLUMNS, last - n);                                                         \
                    pack_transposed(grad + start * N + n, N, rows, height, columns);                                   \
                    for (int64_t d = 0; d < D; d += STEP)                                                              \
                        for (int64_t i = 0; i < height; i += STEP) {                                                   \
                            block(columns + i / 16 * steps * TILE, 32, steps * TILE, TILE, packed + d / 16 * TILE,     \
                                  TILE, blocks * TILE, steps, c);                                                      \
                            stream_##NAME(c, to + (n + i) * D + d, D, height - i, D - d);                              \
                        }                                                                                              \
                }                                                                                                      \
            }                                                                                                          \
            _mm_sfence();                                                                                              \
            free(packed);                                                                                              \
            free(columns);                                                                                             \
            free(c);                                                                                                   \
            _tile_release();                                                                                           \
        }                                                                                                              \
    }
GROUPED(bfloat16, uint16_t)
GROUPED(float, float)

#else

int grouped_available(void) { return 0; }

#endif
