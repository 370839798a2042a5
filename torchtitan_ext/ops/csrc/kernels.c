// Kernels of the losses: Gram matrices of each token's k rows of z and their gradient (one pass over the rows each),
// squared cosines from Gram matrices, the k largest of each row, random numbers from integer keys, products of erc, and
// SwiGLU in bfloat16.
//
// KERNELS defines the first two for one element type. bfloat16 (stored as uint16_t) is accumulated in float.

#include <float.h>
#include <math.h>
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
    /* grad[rows[t, a]] += sum_b coefficients[t, a, b] z[rows[t, b]]; no row may occur in rows twice. */               \
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

// ids[t, 0..k-1]: the indices of the k largest of scores[t], largest first; of equal values the first. NaN is largest.
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

// From Gram matrices g (tokens, k, k): values[t], the sum over a != b of max(g_ab^2 / (g_aa g_bb) - floor, 0), and its
// gradient (tokens, k, k), g_ab and g_ba as independent entries. Where a diagonal entry is below LEAST, cosine and
// gradient are 0.
#define SQUARED_COSINES(NAME, ELEMENT, LEAST)                                                                          \
    void squared_cosines_##NAME(const ELEMENT *grams, ELEMENT *values, ELEMENT *gradients, int64_t tokens, int64_t k,  \
                                double floor, int threads) {                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t t = 0; t < tokens; t++) {                                                                         \
            const ELEMENT *g = grams + t * k * k;                                                                      \
            ELEMENT *d = gradients + t * k * k, inverse[k], value = 0;                                                 \
            for (int64_t a = 0; a < k; a++) {                                                                          \
                inverse[a] = g[a * k + a] >= LEAST ? 1 / g[a * k + a] : 0;                                             \
                d[a * k + a] = 0;                                                                                      \
            }                                                                                                          \
            for (int64_t a = 0; a < k; a++)                                                                            \
                for (int64_t b = 0; b < k; b++) {                                                                      \
                    if (a == b) continue;                                                                              \
                    ELEMENT x = g[a * k + b], slope = x * inverse[a] * inverse[b], square = x * slope;                 \
                    int over = !(square <= (ELEMENT)floor); /* true for NaN */                                         \
                    value += over ? square - (ELEMENT)floor : 0;                                                       \
                    d[a * k + b] = over ? 2 * slope : 0;                                                               \
                    d[a * k + a] -= over ? square * inverse[a] : 0;                                                    \
                    d[b * k + b] -= over ? square * inverse[b] : 0;                                                    \
                }                                                                                                      \
            values[t] = value;                                                                                         \
        }                                                                                                              \
    }

SQUARED_COSINES(float, float, FLT_MIN)
SQUARED_COSINES(double, double, DBL_MIN)

// e^x within 2 units in the last place for -87 <= x <= 88, infinity above 88.4, e^-87 below -87, NaN for NaN. Without
// branches or calls, so that loops over it use SIMD: x = n ln 2 + r with |r| <= ln 2 / 2, the Taylor polynomial of e^r,
// times 2^n.
static inline float exponential(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -87.0f ? -87.0f : x;
    union { float value; uint32_t word; } shifted = {x * 1.44269504f + 0x1.8p23f}, power;
    float n = shifted.value - 0x1.8p23f, r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float sum = 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    power.word = (shifted.word << 23) + 0x3F800000u;
    return sum * power.value;
}

// z = silu(gate) * up, where a row of gate_up (rows, 2 width) is gate and then up; z (rows, width).
void swiglu_bfloat16(const uint16_t *gate_up, uint16_t *z, int64_t rows, int64_t width, int threads) {
    _Pragma("omp parallel for num_threads(threads) schedule(static)")
    for (int64_t i = 0; i < rows; i++) {
        const uint16_t *restrict gates = gate_up + 2 * i * width, *restrict ups = gates + width;
        uint16_t *restrict out = z + i * width;
        for (int64_t f = 0; f < width; f++) {
            float gate = one_bfloat16(gates + f);
            put_bfloat16(out + f, gate / (1 + exponential(-gate)) * one_bfloat16(ups + f));
        }
    }
}

// The gradient of gate_up from that of z.
void swiglu_backward_bfloat16(const uint16_t *gate_up, const uint16_t *dz, uint16_t *gradient, int64_t rows,
                              int64_t width, int threads) {
    _Pragma("omp parallel for num_threads(threads) schedule(static)")
    for (int64_t i = 0; i < rows; i++) {
        const uint16_t *restrict gates = gate_up + 2 * i * width, *restrict ups = gates + width;
        const uint16_t *restrict slopes = dz + i * width;
        uint16_t *restrict to_gate = gradient + 2 * i * width, *restrict to_up = to_gate + width;
        for (int64_t f = 0; f < width; f++) {
            float gate = one_bfloat16(gates + f), up = one_bfloat16(ups + f), slope = one_bfloat16(slopes + f);
            float sigmoid = 1 / (1 + exponential(-gate));
            put_bfloat16(to_up + f, slope * gate * sigmoid);
            put_bfloat16(to_gate + f, slope * up * sigmoid * (1 + gate * (1 - sigmoid)));
        }
    }
}

// The hash of draws.py: extends a key by one part.
static inline uint32_t folded(uint32_t h, int64_t part) {
    h = h * 0x9E3779B1u + (uint32_t)part + 0x7F4A7C15u;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}

// Writes the flat indices of the elements whose hash (`start`, extended by row and column) is below `limit`. Returns how
// many there are.
int64_t sample(const int64_t *rows, const int64_t *columns, int64_t *indices, int64_t height, int64_t width, int64_t start,
              int64_t limit) {
    int64_t count = 0;
    for (int64_t r = 0; r < height; r++) {
        uint32_t h = folded((uint32_t)start, rows[r]);
        for (int64_t c = 0; c < width; c++) {
            indices[count] = r * width + c;
            count += (int64_t)folded(h, columns[c]) < limit;
        }
    }
    return count;
}

// Uniform numbers in [0, 1) from the upper 24 bits of the same hash, (height, width).
#define UNIFORM(NAME, ELEMENT)                                                                                         \
    void uniform_##NAME(const int64_t *rows, const int64_t *columns, ELEMENT *values, int64_t height, int64_t width,   \
                        int64_t start, int threads) {                                                                  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t r = 0; r < height; r++) {                                                                         \
            uint32_t h = folded((uint32_t)start, rows[r]);                                                             \
            for (int64_t c = 0; c < width; c++)                                                                        \
                values[r * width + c] = (ELEMENT)(folded(h, columns[c]) >> 8) * (ELEMENT)0x1p-24;                      \
        }                                                                                                              \
    }

UNIFORM(float, float)
UNIFORM(double, double)

// Two small functions of erc, for which calling PyTorch's operations takes longer than their work. bounds[i]: half the
// distance of row i of router (experts, dim) to the nearest other row, divided by the norm of row i. slopes (experts,
// experts): the gradient, with respect to M, of
// 1 / experts^2 sum_{i != j} max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0).
#define COUPLING(NAME, ELEMENT, LANES, ROOT, LEAST)                                                                    \
    static ELEMENT distance_##NAME(const ELEMENT *x, const ELEMENT *y, int64_t dim) {                                  \
        int64_t whole = dim - dim % LANES_##NAME;                                                                      \
        LANES sums = {0};                                                                                              \
        for (int64_t d = 0; d < whole; d += LANES_##NAME) {                                                            \
            LANES apart = load_##NAME(x + d) - load_##NAME(y + d);                                                     \
            sums += apart * apart;                                                                                     \
        }                                                                                                              \
        ELEMENT square = total_##NAME(sums);                                                                           \
        for (int64_t d = whole; d < dim; d++) square += (x[d] - y[d]) * (x[d] - y[d]);                                 \
        return ROOT(square);                                                                                           \
    }                                                                                                                  \
    void coupling_bounds_##NAME(const ELEMENT *router, ELEMENT *bounds, int64_t experts, int64_t dim, int threads) {   \
        ELEMENT origin[dim];                                                                                           \
        for (int64_t d = 0; d < dim; d++) origin[d] = 0;                                                               \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t i = 0; i < experts; i++) {                                                                        \
            ELEMENT nearest = INFINITY, length = 2 * distance_##NAME(router + i * dim, origin, dim);                   \
            for (int64_t j = 0; j < experts; j++) {                                                                    \
                if (i == j) continue;                                                                                  \
                ELEMENT apart = distance_##NAME(router + i * dim, router + j * dim, dim);                              \
                if (!(apart >= nearest) && nearest == nearest) nearest = apart; /* keeps NaN */                        \
            }                                                                                                          \
            bounds[i] = nearest / (length < LEAST ? LEAST : length);                                                   \
        }                                                                                                              \
    }                                                                                                                  \
    void excess_slopes_##NAME(const ELEMENT *matrix, ELEMENT *slopes, int64_t experts, double alpha, int threads) {    \
        (void)threads;                                                                                                 \
        ELEMENT unit = (ELEMENT)1 / (experts * experts);                                                               \
        for (int64_t i = 0; i < experts * experts; i++) slopes[i] = 0;                                                 \
        for (int64_t i = 0; i < experts; i++) {                                                                        \
            ELEMENT own = (ELEMENT)alpha * matrix[i * experts + i];                                                    \
            int64_t over = 0;                                                                                          \
            for (int64_t j = 0; j < experts; j++) {                                                                    \
                if (i == j) continue;                                                                                  \
                int by_others = matrix[i * experts + j] > own, of_others = matrix[j * experts + i] > own;              \
                slopes[i * experts + j] += by_others ? unit : 0;                                                       \
                slopes[j * experts + i] += of_others ? unit : 0;                                                       \
                over += by_others + of_others;                                                                         \
            }                                                                                                          \
            slopes[i * experts + i] -= (ELEMENT)alpha * over * unit;                                                   \
        }                                                                                                              \
    }

COUPLING(float, float, float_lanes, __builtin_sqrtf, FLT_MIN)
COUPLING(double, double, double_lanes, __builtin_sqrt, DBL_MIN)

// Products of the first rows of a weight with a few vectors. A BLAS matrix product is slow here, since there are fewer
// vectors than its tiles have columns. Tiles of up to HEIGHT x 2 SIMD vectors stay in registers; the weights of the next
// tile are prefetched while one is computed. `dim` is a multiple of PANEL (at least 2 SIMD vectors of every type); the
// caller packs the vectors into panels.
#define HEIGHT 6
#define STRIP 48 // rows of a weight that stay in the cache between their uses
#define PANEL 16

#define FOR_ROWS _Pragma("GCC unroll 6") for (int i = 0; i < height; i++)
#define INLINE static inline __attribute__((always_inline))

// sum[i] += x * (left, right), summed over s < steps, for every row i of a tile; x depends on i and s, left and right on s.
#define ADD_PRODUCTS(steps, SUM, LANES, x, left, right)                                                                \
    for (int64_t s = 0; s < steps; s++) {                                                                              \
        LANES lanes0 = left, lanes1 = right;                                                                           \
        FOR_ROWS {                                                                                                     \
            SUM factor = x;                                                                                            \
            sum[i][0] += factor * lanes0;                                                                              \
            sum[i][1] += factor * lanes1;                                                                              \
        }                                                                                                              \
    }

// Calls a tile's function with a constant height, so that the compiler unrolls its loops.
#define WITH_HEIGHT(height, function, ...)                                                                             \
    switch (height) {                                                                                                  \
    case 1: function(1, __VA_ARGS__); break;                                                                           \
    case 2: function(2, __VA_ARGS__); break;                                                                           \
    case 3: function(3, __VA_ARGS__); break;                                                                           \
    case 4: function(4, __VA_ARGS__); break;                                                                           \
    case 5: function(5, __VA_ARGS__); break;                                                                           \
    case 6: function(6, __VA_ARGS__); break;                                                                           \
    }

#define RESPONSES(NAME, ELEMENT, SUM, LANES)                                                                           \
    enum { PAIR_##NAME = 2 * LANES_##NAME };                                                                           \
    INLINE void response_tile_##NAME(const int height, const ELEMENT *w, int64_t dim, const SUM *packed, SUM *answers, \
                                     int64_t vectors, int64_t columns) {                                               \
        enum { LANE = LANES_##NAME };                                                                                  \
        LANES sum[HEIGHT][2] = {{{0}}};                                                                                \
        for (int64_t d = 0; d < dim; d += PANEL) {                                                                     \
            FOR_ROWS __builtin_prefetch(w + (height + i) * dim + d);                                                   \
            const SUM *p = packed + d * PANEL;                                                                         \
            ADD_PRODUCTS(PANEL, SUM, LANES, one_##NAME(w + i * dim + d + s), *(const LANES *)(p + s * PANEL),          \
                         *(const LANES *)(p + s * PANEL + LANE))                                                       \
        }                                                                                                              \
        FOR_ROWS {                                                                                                     \
            SUM line[2 * LANE]; /* a variable index into `sum` would move it to memory */                              \
            *(LANES *)line = sum[i][0];                                                                                \
            *(LANES *)(line + LANE) = sum[i][1];                                                                       \
            for (int64_t e = 0; e < columns; e++) answers[i * vectors + e] = line[e];                                  \
        }                                                                                                              \
    }                                                                                                                  \
    /* answers[j, f, e] = <weight[j, f], vector e>, and their squares summed over the f of each strip. weight          \
       (experts, rows, dim), of which the first `width` rows are used; packed (ceil(vectors / PANEL), dim, PANEL), with\
       zeros beyond the last vector; answers (experts, width, vectors); squares (experts, ceil(width / STRIP),         \
       vectors). */                                                                                                    \
    void responses_##NAME(const ELEMENT *weight, const SUM *packed, SUM *answers, SUM *squares, int64_t experts,       \
                          int64_t rows, int64_t width, int64_t dim, int64_t vectors, int threads) {                    \
        int64_t strips = (width + STRIP - 1) / STRIP;                                                                  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t strip = 0; strip < experts * strips; strip++) {                                                   \
            int64_t j = strip / strips, first = strip % strips * STRIP;                                                \
            int64_t count = width - first < STRIP ? width - first : STRIP;                                             \
            const ELEMENT *w = weight + (j * rows + first) * dim;                                                      \
            SUM *answer = answers + (j * width + first) * vectors, *square = squares + strip * vectors;                \
            for (int64_t f = 0; f < count; f += HEIGHT)                                                                \
                for (int64_t e = 0; e < vectors; e += PAIR_##NAME) {                                                   \
                    int64_t height = count - f < HEIGHT ? count - f : HEIGHT;                                          \
                    int64_t columns = vectors - e < PAIR_##NAME ? vectors - e : PAIR_##NAME;                           \
                    const SUM *p = packed + e / PANEL * dim * PANEL + e % PANEL;                                       \
                    WITH_HEIGHT(height, response_tile_##NAME, w + f * dim, dim, p, answer + f * vectors + e, vectors,  \
                                columns)                                                                               \
                }                                                                                                      \
            for (int64_t e = 0; e < vectors; e++) square[e] = 0;                                                       \
            for (int64_t f = 0; f < count; f++)                                                                        \
                for (int64_t e = 0; e < vectors; e++)                                                                  \
                    square[e] += answer[f * vectors + e] * answer[f * vectors + e];                                    \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void weight_tile_##NAME(const int height, ELEMENT *grad, const ELEMENT *weight, int64_t dim,                \
                                   const SUM *packed, const SUM *slopes, const int64_t *pulled, int64_t pulls,         \
                                   int64_t vectors) {                                                                  \
        enum { LANE = LANES_##NAME };                                                                                  \
        for (int64_t d = 0; d < dim; d += 2 * LANE) {                                                                  \
            const SUM *p = packed + d / PANEL * vectors * PANEL + d % PANEL;                                           \
            ELEMENT *g = grad + d;                                                                                     \
            LANES sum[HEIGHT][2];                                                                                      \
            FOR_ROWS {                                                                                                 \
                sum[i][0] = load_##NAME(g + i * dim);                                                                  \
                sum[i][1] = load_##NAME(g + i * dim + LANE);                                                           \
                __builtin_prefetch(g + (height + i) * dim, 1);                                                         \
                __builtin_prefetch(weight + d + i * dim);                                                              \
            }                                                                                                          \
            ADD_PRODUCTS(pulls, SUM, LANES, slopes[i * vectors + s], *(const LANES *)(p + pulled[s] * PANEL),          \
                         *(const LANES *)(p + pulled[s] * PANEL + LANE))                                               \
            FOR_ROWS {                                                                                                 \
                store_##NAME(g + i * dim, sum[i][0]);                                                                  \
                store_##NAME(g + i * dim + LANE, sum[i][1]);                                                           \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void vector_tile_##NAME(const int height, SUM *grad, const ELEMENT *w, int64_t dim, const SUM *slopes,      \
                                   const int64_t *pulled, int64_t vectors, int64_t count) {                            \
        enum { LANE = LANES_##NAME };                                                                                  \
        LANES sum[HEIGHT][2];                                                                                          \
        FOR_ROWS {                                                                                                     \
            sum[i][0] = *(const LANES *)(grad + pulled[i] * PANEL);                                                    \
            sum[i][1] = *(const LANES *)(grad + pulled[i] * PANEL + LANE);                                             \
        }                                                                                                              \
        ADD_PRODUCTS(count, SUM, LANES, slopes[s * vectors + i], load_##NAME(w + s * dim),                             \
                     load_##NAME(w + s * dim + LANE))                                                                  \
        FOR_ROWS {                                                                                                     \
            *(LANES *)(grad + pulled[i] * PANEL) = sum[i][0];                                                          \
            *(LANES *)(grad + pulled[i] * PANEL + LANE) = sum[i][1];                                                   \
        }                                                                                                              \
    }                                                                                                                  \
    /* Backward of responses, from pulls (experts, vectors), the gradient of sum_f answers[j, f, e]^2. With            \
       slopes = 2 answers * pulls: grad[j, f] += sum_e slopes[j, f, e] vector e. If parts is not NULL, each thread     \
       adds its part of sum_jf slopes[j, f, e] weight[j, f] to its slice of parts (threads, dim / PANEL, vectors,      \
       PANEL), which must be 0 before. Vectors whose pull is 0 are skipped. packed: (dim / PANEL, vectors, PANEL). */  \
    void add_response_gradients_##NAME(ELEMENT *grad, const ELEMENT *weight, const SUM *packed, const SUM *answers,    \
                                       const SUM *pulls, SUM *parts, int64_t experts, int64_t rows, int64_t width,     \
                                       int64_t dim, int64_t vectors, int threads) {                                    \
        int64_t strips = (width + STRIP - 1) / STRIP;                                                                  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                              \
        for (int64_t strip = 0; strip < experts * strips; strip++) {                                                   \
            int64_t j = strip / strips, first = strip % strips * STRIP;                                                \
            int64_t count = width - first < STRIP ? width - first : STRIP;                                             \
            int64_t pulled[vectors], some = 0;                                                                         \
            for (int64_t e = 0; e < vectors; e++) {                                                                    \
                pulled[some] = e;                                                                                      \
                some += pulls[j * vectors + e] != 0; /* true for NaN */                                                \
            }                                                                                                          \
            if (some == 0) continue;                                                                                   \
            const SUM *answer = answers + (j * width + first) * vectors;                                               \
            SUM slope[STRIP * vectors];                                                                                \
            for (int64_t f = 0; f < count; f++)                                                                        \
                for (int64_t s = 0; s < some; s++)                                                                     \
                    slope[f * vectors + s] = 2 * answer[f * vectors + pulled[s]] * pulls[j * vectors + pulled[s]];     \
            const ELEMENT *w = weight + (j * rows + first) * dim;                                                      \
            ELEMENT *g = grad + (j * rows + first) * dim;                                                              \
            for (int64_t f = 0; f < count; f += HEIGHT) {                                                              \
                int64_t height = count - f < HEIGHT ? count - f : HEIGHT;                                              \
                WITH_HEIGHT(height, weight_tile_##NAME, g + f * dim, w + f * dim, dim, packed, slope + f * vectors,    \
                            pulled, some, vectors)                                                                     \
            }                                                                                                          \
            int64_t groups = (some + HEIGHT - 1) / HEIGHT;                                                             \
            for (int64_t d = 0; parts && d < dim; d += PAIR_##NAME) {                                                  \
                SUM *own = parts + omp_get_thread_num() * vectors * dim + d / PANEL * vectors * PANEL + d % PANEL;     \
                for (int64_t group = 0, s = 0; group < groups; group++) {                                              \
                    int64_t height = some / groups + (group < some % groups); /* equal, or one more */                 \
                    WITH_HEIGHT(height, vector_tile_##NAME, own, w + d, dim, slope + s, pulled + s, vectors, count)    \
                    s += height;                                                                                       \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

RESPONSES(float, float, float, float_lanes)
RESPONSES(double, double, double, double_lanes)
RESPONSES(bfloat16, uint16_t, float, float_lanes)
