// Gram matrices of each token's k rows of z, and their gradient: one pass over the rows each; squared cosines from them; the k
// largest of each row; a draw of tokens; every expert's answers to every routing vector, and their gradients.
//
// KERNELS makes the first two for one element type; bfloat16 (as uint16_t) is accumulated in float.

#include <omp.h>
#include <stdint.h>
#include <stddef.h>

#define BYTES 32
typedef float float_lanes __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef double double_lanes __attribute__((vector_size(BYTES), aligned(8), may_alias));
typedef uint16_t half_lanes __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));
typedef uint32_t word_lanes __attribute__((vector_size(BYTES)));

static inline float_lanes load_float(const float *p) { return *(const float_lanes *)p; }
static inline void store_float(float *p, float_lanes v) { *(float_lanes *)p = v; }
static inline double_lanes load_double(const double *p) { return *(const double_lanes *)p; }
static inline void store_double(double *p, double_lanes v) { *(double_lanes *)p = v; }

static inline float_lanes load_bfloat16(const uint16_t *p) {
    return (float_lanes)(__builtin_convertvector(*(const half_lanes *)p, word_lanes) << 16);
}
static inline void store_bfloat16(uint16_t *p, float_lanes v) { // rounds to nearest, ties to even; NaN stays NaN
    word_lanes bits = (word_lanes)v;
    word_lanes rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    word_lanes nan = (word_lanes)((bits & 0x7FFFFFFF) > 0x7F800000);
    *(half_lanes *)p = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0), half_lanes);
}

static inline float one_float(const float *p) { return *p; }
static inline double one_double(const double *p) { return *p; }
static inline float one_bfloat16(const uint16_t *p) {
    union { uint32_t word; float value; } bits = {(uint32_t)*p << 16};
    return bits.value;
}
static inline void put_float(float *p, float v) { *p = v; }
static inline void put_double(double *p, double v) { *p = v; }
static inline void put_bfloat16(uint16_t *p, float v) {
    union { float value; uint32_t word; } bits = {v};
    int nan = (bits.word & 0x7FFFFFFF) > 0x7F800000;
    *p = nan ? 0x7FC0 : (uint16_t)((bits.word + 0x7FFF + ((bits.word >> 16) & 1)) >> 16);
}

#define KERNELS(NAME, ELEMENT, SUM, LANES)                                                                             \
    enum { LANES_##NAME = sizeof(LANES) / sizeof(SUM) };                                                               \
    static inline SUM total_##NAME(LANES v) {                                                                          \
        SUM sum = 0;                                                                                                   \
        for (int i = 0; i < LANES_##NAME; i++) sum += v[i];                                                            \
        return sum;                                                                                                    \
    }                                                                                                                  \
    /* out[t, a, b] = <z[rows[t, a]], z[rows[t, b]]>; z (R, width), rows (tokens, k), out (tokens, k, k). */           \
    void token_gram_##NAME(const ELEMENT *z, const int64_t *rows, SUM *out, int64_t tokens, int64_t k, int64_t width,  \
                           int threads) {                                                                              \
        int64_t whole = width - width % LANES_##NAME;                                                                  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t t = 0; t < tokens; t++) {                                                                         \
            const int64_t *row = rows + t * k;                                                                         \
            SUM *gram = out + t * k * k;                                                                               \
            for (int64_t a = 0; a < k; a++) {                                                                          \
                const ELEMENT *x = z + row[a] * width;                                                                 \
                for (int64_t b = a; b < k; b += 4) {                                                                   \
                    int64_t count = k - b < 4 ? k - b : 4;                                                             \
                    const ELEMENT *y[4];                                                                               \
                    for (int64_t j = 0; j < 4; j++) y[j] = z + row[b + (j < count ? j : 0)] * width;                   \
                    LANES s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};                                                      \
                    for (int64_t f = 0; f < whole; f += LANES_##NAME) {                                                \
                        LANES v = load_##NAME(x + f);                                                                  \
                        s0 += v * load_##NAME(y[0] + f);                                                               \
                        s1 += v * load_##NAME(y[1] + f);                                                               \
                        s2 += v * load_##NAME(y[2] + f);                                                               \
                        s3 += v * load_##NAME(y[3] + f);                                                               \
                    }                                                                                                  \
                    SUM sums[4] = {total_##NAME(s0), total_##NAME(s1), total_##NAME(s2), total_##NAME(s3)};            \
                    for (int64_t j = 0; j < count; j++) {                                                              \
                        for (int64_t f = whole; f < width; f++) sums[j] += one_##NAME(x + f) * one_##NAME(y[j] + f);   \
                        gram[a * k + b + j] = gram[(b + j) * k + a] = sums[j];                                         \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    /* grad[rows[t, a]] += sum_b coefficients[t, a, b] z[rows[t, b]]; no row may stand in rows twice. */               \
    void add_gram_gradient_##NAME(ELEMENT *grad, const ELEMENT *z, const int64_t *rows, const SUM *coefficients,       \
                                  int64_t tokens, int64_t k, int64_t width, int threads) {                             \
        int64_t whole = width - width % LANES_##NAME;                                                                  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t t = 0; t < tokens; t++) {                                                                         \
            const int64_t *row = rows + t * k;                                                                         \
            for (int64_t a = 0; a < k; a++) {                                                                          \
                ELEMENT *g = grad + row[a] * width;                                                                    \
                const SUM *c = coefficients + (t * k + a) * k;                                                         \
                for (int64_t f = 0; f < whole; f += LANES_##NAME) {                                                    \
                    LANES sum = load_##NAME(g + f);                                                                    \
                    for (int64_t b = 0; b < k; b++) sum += c[b] * load_##NAME(z + row[b] * width + f);                 \
                    store_##NAME(g + f, sum);                                                                          \
                }                                                                                                      \
                for (int64_t f = whole; f < width; f++) {                                                              \
                    SUM sum = one_##NAME(g + f);                                                                       \
                    for (int64_t b = 0; b < k; b++) sum += c[b] * one_##NAME(z + row[b] * width + f);                  \
                    put_##NAME(g + f, sum);                                                                            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

KERNELS(float, float, float, float_lanes)
KERNELS(double, double, double, double_lanes)
KERNELS(bfloat16, uint16_t, float, float_lanes)

// ids[t, 0..k-1]: the places of the k largest of scores[t], the largest first, of equal ones the first; NaN counts as largest.
#define LARGEST(NAME, ELEMENT)                                                                                         \
    void largest_##NAME(const ELEMENT *scores, int64_t *ids, int64_t tokens, int64_t width, int64_t k, int threads) {  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t t = 0; t < tokens; t++) {                                                                         \
            const ELEMENT *row = scores + t * width;                                                                   \
            int64_t *best = ids + t * k, count = 0;                                                                    \
            for (int64_t e = 0; e < width; e++) {                                                                      \
                ELEMENT value = row[e];                                                                                \
                if (count == k && (value <= row[best[k - 1]] || row[best[k - 1]] != row[best[k - 1]])) continue;       \
                int64_t place = count < k ? count++ : k - 1;                                                           \
                for (; place > 0 && !(value <= row[best[place - 1]]) && row[best[place - 1]] == row[best[place - 1]];  \
                     place--)                                                                                          \
                    best[place] = best[place - 1];                                                                     \
                best[place] = e;                                                                                       \
            }                                                                                                          \
        }                                                                                                              \
    }

LARGEST(float, float)
LARGEST(double, double)

// From Gram matrices g (tokens, k, k): value[t], the sum over a != b of what g_ab^2 / (g_aa g_bb) has above `floor`, and its
// gradient (tokens, k, k) by every entry of g[t], g_ab and g_ba apart. A zero diagonal entry: cosine 0, gradient 0.
#define SQUARED_COSINES(NAME, ELEMENT)                                                                                 \
    void squared_cosines_##NAME(const ELEMENT *grams, ELEMENT *values, ELEMENT *gradients, int64_t tokens, int64_t k,  \
                                double floor, int threads) {                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t t = 0; t < tokens; t++) {                                                                         \
            const ELEMENT *g = grams + t * k * k;                                                                      \
            ELEMENT *d = gradients + t * k * k, inverse[k], value = 0;                                                 \
            for (int64_t a = 0; a < k; a++) {                                                                          \
                inverse[a] = g[a * k + a] > 0 ? 1 / g[a * k + a] : 0;                                                  \
                d[a * k + a] = 0;                                                                                      \
            }                                                                                                          \
            for (int64_t a = 0; a < k; a++)                                                                            \
                for (int64_t b = 0; b < k; b++) {                                                                      \
                    if (a == b) continue;                                                                              \
                    ELEMENT x = g[a * k + b], slope = x * inverse[a] * inverse[b], square = x * slope;                 \
                    int over = !(square <= (ELEMENT)floor); /* NaN is */                                               \
                    value += over ? square - (ELEMENT)floor : 0;                                                       \
                    d[a * k + b] = over ? 2 * slope : 0;                                                               \
                    d[a * k + a] -= over ? square * inverse[a] : 0;                                                    \
                    d[b * k + b] -= over ? square * inverse[b] : 0;                                                    \
                }                                                                                                      \
            values[t] = value;                                                                                         \
        }                                                                                                              \
    }

SQUARED_COSINES(float, float)
SQUARED_COSINES(double, double)

// draws.py's hash: one more part of a key.
static inline uint32_t folded(uint32_t h, int64_t part) {
    h = h * 0x9E3779B1u + (uint32_t)part + 0x7F4A7C15u;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}

// Flat places of the elements (a row's part, a column's part) whose bits, folded on from `start`, are below `limit`; how many.
int64_t drawn(const int64_t *rows, const int64_t *columns, int64_t *places, int64_t height, int64_t width, int64_t start,
              int64_t limit) {
    int64_t count = 0;
    for (int64_t r = 0; r < height; r++) {
        uint32_t h = folded((uint32_t)start, rows[r]);
        for (int64_t c = 0; c < width; c++) {
            places[count] = r * width + c;
            count += (int64_t)folded(h, columns[c]) < limit;
        }
    }
    return count;
}

// Products of a weight's first rows with a few vectors, for which a library's matrix product is slow: each weight is used once per
// vector, and there are fewer vectors than its tiles are long. Tiles of ROWS x 2 lanes stay in registers; `dim` is a multiple of
// 2 * LANES of every type, PANEL; the vectors come packed by the caller.
#define ROWS 6
#define STRIP 48 // rows of a weight that are used for both gradients while they are in the cache
#define PANEL 16
#define AHEAD 32 // columns from now: where the caches should be by then

#define RESPONSES(NAME, ELEMENT, SUM, LANES)                                                                           \
    /* answers[j, f, e] = <weight[j, f], vector e>; weight (experts, rows, dim) of which the first `width` rows count, */\
    /* packed (ceil(vectors / PANEL), dim, PANEL), zero where there is no vector; answers (experts, width, vectors). */\
    void responses_##NAME(const ELEMENT *weight, const SUM *packed, SUM *answers, int64_t experts, int64_t rows,       \
                          int64_t width, int64_t dim, int64_t vectors, int threads) {                                  \
        enum { LANE = LANES_##NAME, PARTS = PANEL / (2 * LANE) };                                                      \
        int64_t tiles = (width + ROWS - 1) / ROWS, panels = (vectors + PANEL - 1) / PANEL;                             \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t tile = 0; tile < experts * tiles; tile++) {                                                       \
            int64_t j = tile / tiles, first = tile % tiles * ROWS, count = width - first < ROWS ? width - first : ROWS;\
            const ELEMENT *w[ROWS];                                                                                    \
            for (int i = 0; i < ROWS; i++) w[i] = weight + (j * rows + first + (i < count ? i : 0)) * dim;             \
            for (int64_t panel = 0; panel < panels; panel++)                                                           \
                for (int part = 0; part < PARTS; part++) {                                                             \
                    const SUM *p = packed + panel * dim * PANEL + part * 2 * LANE;                                     \
                    LANES sum[ROWS][2] = {{{0}}};                                                                      \
                    for (int64_t d = 0; d < dim; d++) {                                                                \
                        LANES left = *(const LANES *)(p + d * PANEL), right = *(const LANES *)(p + d * PANEL + LANE);  \
                        _Pragma("GCC unroll 6")                                                                        \
                        for (int i = 0; i < ROWS; i++) {                                                               \
                            SUM x = one_##NAME(w[i] + d);                                                              \
                            sum[i][0] += x * left;                                                                     \
                            sum[i][1] += x * right;                                                                    \
                        }                                                                                              \
                    }                                                                                                  \
                    int64_t at = panel * PANEL + part * 2 * LANE;                                                      \
                    for (int64_t i = 0; i < count; i++)                                                                \
                        for (int64_t e = 0; e < 2 * LANE && at + e < vectors; e++)                                     \
                            answers[((j * width) + first + i) * vectors + at + e] = sum[i][e / LANE][e % LANE];        \
                }                                                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    /* From the gradient of answers, slopes (experts, width, vectors): grad[j, f] += sum_e slopes[j, f, e] vector e, and */\
    /* for every thread, parts (threads, dim / PANEL, vectors, PANEL), all 0 before: its share of sum_jf slopes[j, f, e] */\
    /* weight[j, f], if parts is not NULL. packed: (dim / PANEL, vectors, PANEL). */                                   \
    void add_response_gradients_##NAME(ELEMENT *grad, const ELEMENT *weight, const SUM *packed, const SUM *slopes,     \
                                       SUM *parts, int64_t experts, int64_t rows, int64_t width, int64_t dim,          \
                                       int64_t vectors, int threads) {                                                 \
        enum { LANE = LANES_##NAME };                                                                                  \
        int64_t strips = (width + STRIP - 1) / STRIP;                                                                  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t strip = 0; strip < experts * strips; strip++) {                                                   \
            int64_t j = strip / strips, first = strip % strips * STRIP;                                                \
            int64_t count = width - first < STRIP ? width - first : STRIP;                                             \
            const SUM *slope = slopes + (j * width + first) * vectors;                                                 \
            SUM *own = parts ? parts + omp_get_thread_num() * vectors * dim : NULL;                                    \
            for (int64_t d = 0; d < dim; d += 2 * LANE) {                                                              \
                int64_t at = d / PANEL * vectors * PANEL + d % PANEL;                                                  \
                const ELEMENT *w = weight + (j * rows + first) * dim + d;                                              \
                ELEMENT *g = grad + (j * rows + first) * dim + d;                                                      \
                for (int64_t f = 0; f < count; f += ROWS) {                                                            \
                    int64_t of[ROWS];                                                                                  \
                    LANES sum[ROWS][2];                                                                                \
                    _Pragma("GCC unroll 6")                                                                            \
                    for (int i = 0; i < ROWS; i++) {                                                                   \
                        of[i] = f + i < count ? f + i : f;                                                             \
                        sum[i][0] = load_##NAME(g + of[i] * dim);                                                      \
                        sum[i][1] = load_##NAME(g + of[i] * dim + LANE);                                               \
                        __builtin_prefetch(g + of[i] * dim + AHEAD, 1);                                                \
                        __builtin_prefetch(w + of[i] * dim + AHEAD);                                                   \
                    }                                                                                                  \
                    for (int64_t e = 0; e < vectors; e++) {                                                            \
                        LANES left = *(const LANES *)(packed + at + e * PANEL);                                        \
                        LANES right = *(const LANES *)(packed + at + e * PANEL + LANE);                                \
                        _Pragma("GCC unroll 6")                                                                        \
                        for (int i = 0; i < ROWS; i++) {                                                               \
                            SUM x = slope[of[i] * vectors + e];                                                        \
                            sum[i][0] += x * left;                                                                     \
                            sum[i][1] += x * right;                                                                    \
                        }                                                                                              \
                    }                                                                                                  \
                    _Pragma("GCC unroll 6")                                                                            \
                    for (int i = 0; i < ROWS; i++) {                                                                   \
                        store_##NAME(g + of[i] * dim, sum[i][0]);                                                      \
                        store_##NAME(g + of[i] * dim + LANE, sum[i][1]);                                               \
                    }                                                                                                  \
                }                                                                                                      \
                for (int64_t e = 0; parts && e < vectors; e += ROWS) {                                                 \
                    int64_t of[ROWS];                                                                                  \
                    LANES sum[ROWS][2];                                                                                \
                    _Pragma("GCC unroll 6")                                                                            \
                    for (int i = 0; i < ROWS; i++) {                                                                   \
                        of[i] = e + i < vectors ? e + i : e;                                                           \
                        sum[i][0] = *(const LANES *)(own + at + of[i] * PANEL);                                        \
                        sum[i][1] = *(const LANES *)(own + at + of[i] * PANEL + LANE);                                 \
                    }                                                                                                  \
                    for (int64_t f = 0; f < count; f++) {                                                              \
                        LANES left = load_##NAME(w + f * dim), right = load_##NAME(w + f * dim + LANE);                \
                        _Pragma("GCC unroll 6")                                                                        \
                        for (int i = 0; i < ROWS; i++) {                                                               \
                            SUM x = slope[f * vectors + of[i]];                                                        \
                            sum[i][0] += x * left;                                                                     \
                            sum[i][1] += x * right;                                                                    \
                        }                                                                                              \
                    }                                                                                                  \
                    _Pragma("GCC unroll 6")                                                                            \
                    for (int i = 0; i < ROWS; i++) {                                                                   \
                        *(LANES *)(own + at + of[i] * PANEL) = sum[i][0];                                              \
                        *(LANES *)(own + at + of[i] * PANEL + LANE) = sum[i][1];                                       \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

RESPONSES(float, float, float, float_lanes)
RESPONSES(double, double, double, double_lanes)
RESPONSES(bfloat16, uint16_t, float, float_lanes)
