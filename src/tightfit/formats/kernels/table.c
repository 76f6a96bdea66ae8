/* Products with weights of 2, 3 or 4 bits, and their decoding, for CPUs with AVX-512 and bfloat16. Knows no Python and no torch.
 *
 * The layout of codes is that of `formats/packing.py`. A weight is `table[row][code]`, or `scale · (code - zero)` of its row and group,
 * which is made a table of the group on the way. So there is one way to multiply: shift a register of words, look the weights up
 * (`vpermw` in bfloat16, `vpermps` in float32), multiply with the inputs that lie side by side, and add in float32.
 *
 * Inputs are padded with zeros to whole lanes of 16 columns. Nothing need be aligned, nothing is allocated, and each row's sum is
 * taken in the same order however rows are shared between threads and tokens between calls. bfloat16 inputs below 2^-126 count as zero.
 */

#include <stdint.h>
#include <string.h>

/* Counts up with every change of a function's arguments or of the layout: `cpu.CONTRACT`. */
int tightfit_contract(void) { return 1; }

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) FAST
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")

enum { DEPTH = 16, LANES = 32, CHUNK = DEPTH * LANES, ROWS = 4 };

#define FITTING(bits) (16 / (bits))                        /* codes that a word holds whole */
#define TURNS(bits) ((bits) == 3 ? 1 : (bits))             /* words taken one by one, or all three at once */
#define PLACES(bits) ((bits) == 3 ? DEPTH : FITTING(bits)) /* codes of a turn */

typedef uint16_t words16 __attribute__((vector_size(64)));
typedef uint32_t words32 __attribute__((vector_size(64)));

typedef struct {
    int64_t groups;   /* scales of a row; 0: a table for every row */
    int64_t tokens, columns, rows;
    int64_t padded;   /* columns in whole lanes */
    int64_t group;    /* columns that share a scale */
    const void *x;    /* (tokens, padded) bfloat16 or float32 */
    const uint8_t *packed;
    const uint16_t *grid; /* tables (rows, 2^bits) or scales (rows, groups), bfloat16 */
    const uint8_t *zero;  /* (rows, groups) */
    void *out;        /* product: (tokens, rows), decode: (rows, columns), in the dtype asked for */
} Job;

/* Where a group's table begins: `RAMP.from[255 - zero + code] == code - zero`. */
static struct { float from[256 + DEPTH]; } RAMP;

__attribute__((constructor)) static void fill_ramp(void) {
    for (int i = 0; i < 256 + DEPTH; i++) RAMP.from[i] = (float)(i - 255);
}

static inline float widened(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

/* Half to even, as torch does. */
static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* A row's table, repeated: 32 bfloat16, or 16 float32. */
INLINE __m512i row_table(const int bits, const int wide, const uint16_t *table) {
    __m256i half;
    if (bits == 4) half = _mm256_loadu_si256((const __m256i *)table);
    if (bits == 3) half = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    if (bits == 2) half = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)table));
    return wide ? _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16) : _mm512_broadcast_i64x4(half);
}

/* The same of a group: `scale · (code - zero)`, repeated by the length of a code. */
INLINE __m512i group_table(const int bits, const int wide, uint16_t scale, uint8_t zero) {
    __m512 codes = _mm512_loadu_ps(RAMP.from + 255 - zero);
    if (bits == 3) codes = _mm512_shuffle_f32x4(codes, codes, 0x44);
    if (bits == 2) codes = _mm512_shuffle_f32x4(codes, codes, 0x00);
    __m512 weights = _mm512_mul_ps(codes, _mm512_set1_ps(widened(scale)));
    return wide ? _mm512_castps_si512(weights) : _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(weights));
}

INLINE __m512i load16(const int whole, __mmask32 mask, const void *from) {
    return whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from);
}

/* Indices of the codes at place `i` of a word, in 16 bits each. The bits above an index are those of other codes. With 3 bits, `i` goes
 * through all three words, and the sixteenth code is what they have left. */
INLINE __m512i codes16(const int bits, const int i, const int whole, __mmask32 mask, int64_t lanes, const uint8_t *word) {
    if (bits == 3 && i == 15) {
        words16 low = (words16)load16(whole, mask, word), middle = (words16)load16(whole, mask, word + 2 * lanes);
        words16 high = (words16)load16(whole, mask, word + 4 * lanes);
        return (__m512i)((low >> 15) | (middle >> 14 & 2) | (high >> 13 & 4));
    }
    return (__m512i)((words16)load16(whole, mask, word + i / FITTING(bits) * 2 * lanes) >> i % FITTING(bits) * bits);
}

INLINE words32 load32(const int whole, __mmask16 mask, const uint8_t *from) {
    __m256i narrow = whole ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi16(mask, from);
    return (words32)_mm512_cvtepu16_epi32(narrow);
}

/* The same for 16 lanes in 32 bits each. */
INLINE __m512i codes32(const int bits, const int i, const int whole, __mmask16 mask, int64_t lanes, const uint8_t *word) {
    if (bits == 3 && i == 15) {
        words32 low = load32(whole, mask, word), middle = load32(whole, mask, word + 2 * lanes);
        return (__m512i)((low >> 15) | (middle >> 14 & 2) | (load32(whole, mask, word + 4 * lanes) >> 13 & 4));
    }
    return (__m512i)(load32(whole, mask, word + i / FITTING(bits) * 2 * lanes) >> i % FITTING(bits) * bits);
}

/* Which scale is next, while the columns go by. */
typedef struct { int64_t index, left; } Group;

INLINE void take_columns(Group *group, int64_t columns, int64_t size) {
    group->left -= columns;
    if (group->left == 0) {
        group->index++;
        group->left = size;
    }
}

/* Tables of the next group for R rows. */
INLINE void take_tables(const int bits, const int wide, const int R, const Job *job, const int64_t *row, Group *group, int64_t columns,
                        __m512i *table) {
    UNROLL for (int r = 0; r < R; r++) {
        int64_t at = row[r] * job->groups + group->index;
        table[r] = group_table(bits, wide, job->grid[at], job->zero[at]);
    }
    take_columns(group, columns, job->group);
}

/* R rows times T tokens, the columns from `first` on that belong to place `i`, in bfloat16. */
INLINE void product_step(const int bits, const int i, const int R, const int T, const int whole, const Job *job, int64_t lanes,
                         const uint8_t *const *word, int64_t token, int64_t first, const __m512i *table, __m512 (*sum)[4]) {
    const __mmask32 mask = whole ? ~(__mmask32)0 : ((__mmask32)1 << lanes) - 1;
    __m512i weights[ROWS];
    UNROLL for (int r = 0; r < R; r++)
        weights[r] = _mm512_permutexvar_epi16(codes16(bits, i, whole, mask, lanes, word[r]), table[r]);
    UNROLL for (int t = 0; t < T; t++) {
        __m512i x = load16(whole, mask, (const uint16_t *)job->x + (token + t) * job->padded + first);
        UNROLL for (int r = 0; r < R; r++) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], (__m512bh)weights[r], (__m512bh)x);
    }
}

/* The same in float32, half a register of words at a time. Fewer than 32 lanes are 16 at most. */
INLINE void product_step_wide(const int bits, const int i, const int R, const int T, const int whole, const Job *job, int64_t lanes,
                              const uint8_t *const *word, int64_t token, int64_t first, const __m512i *table, __m512 (*sum)[4]) {
    const __mmask16 mask = whole ? ~(__mmask16)0 : (__mmask16)(((__mmask32)1 << lanes) - 1);
    UNROLL for (int half = 0; half < 1 + whole; half++) {
        __m512 weights[ROWS];
        UNROLL for (int r = 0; r < R; r++)
            weights[r] = _mm512_permutexvar_ps(codes32(bits, i, whole, mask, lanes, word[r] + 32 * half), (__m512)table[r]);
        UNROLL for (int t = 0; t < T; t++) {
            const float *from = (const float *)job->x + (token + t) * job->padded + first + 16 * half;
            __m512 x = whole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from);
            UNROLL for (int r = 0; r < R; r++) sum[r][t] = _mm512_fmadd_ps(weights[r], x, sum[r][t]);
        }
    }
}

/* `run`: codes of a lane after which the scale may change; 0: never. */
INLINE void product_place(const int bits, const int i, const int wide, const int run, const int R, const int T, const int whole,
                          const Job *job, int64_t lanes, const int64_t *row, const uint8_t *const *word, int64_t token, int64_t first,
                          Group *group, __m512i *table, __m512 (*sum)[4]) {
    if (run && i % run == 0) take_tables(bits, wide, R, job, row, group, run * lanes, table);
    if (wide) product_step_wide(bits, i, R, T, whole, job, lanes, word, token, first + i * lanes, table, sum);
    else product_step(bits, i, R, T, whole, job, lanes, word, token, first + i * lanes, table, sum);
}

/* One chunk. Those that end a row are few, and their code is kept short. */
INLINE void product_chunk(const int bits, const int wide, const int run, const int R, const int T, const int whole, const Job *job,
                          int64_t lanes, const int64_t *row, const uint8_t **word, int64_t token, int64_t first, Group *group,
                          __m512i *table, __m512 (*sum)[4]) {
    const int turns = TURNS(bits), places = PLACES(bits);
    ROLLED for (int turn = 0; turn < turns; turn++, first += places * lanes) {
        if (whole)
            UNROLL for (int i = 0; i < places; i++)
                product_place(bits, i, wide, run, R, T, 1, job, lanes, row, word, token, first, group, table, sum);
        else
            ROLLED for (int i = 0; i < places; i++)
                product_place(bits, i, wide, run, R, T, 0, job, lanes, row, word, token, first, group, table, sum);
        UNROLL for (int r = 0; r < R; r++) word[r] += 2 * lanes * (bits == 3 ? 3 : 1);
    }
}

/* The rows `first`, `first + apart`, … (R of them; past `stop` the last one again) times T tokens. */
INLINE void product_block(const int bits, const int wide, const int run, const int R, const int T, const Job *job, int64_t first,
                          int64_t apart, int64_t stop, int64_t token) {
    int64_t row[ROWS];
    const uint8_t *word[ROWS];
    __m512i table[ROWS];
    __m512 sum[ROWS][4];
    UNROLL for (int r = 0; r < R; r++) {
        row[r] = first + r * apart < stop ? first + r * apart : stop - 1;
        word[r] = job->packed + row[r] * (job->padded / 8 * bits);
        table[r] = run ? _mm512_setzero_si512() : row_table(bits, wide, job->grid + (row[r] << bits));
        UNROLL for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    }
    Group group = {0, job->group};
    int64_t column = 0;
    for (; column + CHUNK <= job->padded; column += CHUNK)
        product_chunk(bits, wide, run, R, T, 1, job, LANES, row, word, token, column, &group, table, sum);
    for (int64_t lanes = LANES / 2; lanes; lanes /= 2)
        if ((job->padded - column) / DEPTH >= lanes) {
            product_chunk(bits, wide, run, R, T, 0, job, lanes, row, word, token, column, &group, table, sum);
            column += DEPTH * lanes;
        }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) {
            float total = _mm512_reduce_add_ps(sum[r][t]);
            int64_t at = (token + t) * job->rows + row[r];
            if (wide) ((float *)job->out)[at] = total;
            else ((uint16_t *)job->out)[at] = rounded(total);
        }
}

/* Four rows at a time, one from each quarter: four streams in pages of their own, which the hardware fetches ahead; rows that follow
 * each other would be fetched too late, at half the speed. Four tokens at a time, with as many rows as there are registers for. */
INLINE void product_rows(const int bits, const int wide, const int run, const Job *job, int64_t start, int64_t stop) {
    const int64_t apart = (stop - start + ROWS - 1) / ROWS;
    for (int64_t row = start; row < start + apart; row++) {
        int64_t token = 0;
        for (; token + 4 <= job->tokens; token += 4)
            if (wide) {
                for (int half = 0; half < ROWS; half += 2)
                    product_block(bits, wide, run, 2, 4, job, row + half * apart, apart, stop, token);
            } else product_block(bits, wide, run, ROWS, 4, job, row, apart, stop, token);
        if (token + 2 <= job->tokens) {
            product_block(bits, wide, run, ROWS, 2, job, row, apart, stop, token);
            token += 2;
        }
        if (token < job->tokens) product_block(bits, wide, run, ROWS, 1, job, row, apart, stop, token);
    }
}

/* Where a chunk is not whole, columns past the end are not written. */
INLINE void decode_place(const int bits, const int i, const int wide, const int run, const int whole, const Job *job, int64_t lanes,
                         int64_t row, const uint8_t *word, int64_t column, Group *group, __m512i *table) {
    if (run && i % run == 0) take_tables(bits, wide, 1, job, &row, group, run * lanes, table);
    const __mmask32 all = ~(__mmask32)0, in_lanes = lanes == LANES ? all : ((__mmask32)1 << lanes) - 1;
    const int64_t left = job->columns - column, at = row * job->columns + column;
    const __mmask32 mask = whole || left >= LANES ? in_lanes : left <= 0 ? 0 : in_lanes & (((__mmask32)1 << left) - 1);
    if (wide) {
        UNROLL for (int half = 0; half < 2; half++) {
            const __mmask16 half_mask = (__mmask16)(mask >> 16 * half);
            __m512i codes = codes32(bits, i, whole, half_mask, lanes, word + 32 * half);
            _mm512_mask_storeu_ps((float *)job->out + at + 16 * half, half_mask, _mm512_permutexvar_ps(codes, (__m512)*table));
        }
    } else {
        __m512i weights = _mm512_permutexvar_epi16(codes16(bits, i, whole, mask, lanes, word), *table);
        _mm512_mask_storeu_epi16((uint16_t *)job->out + at, mask, weights);
    }
}

INLINE void decode_chunk(const int bits, const int wide, const int run, const int whole, const Job *job, int64_t lanes, int64_t row,
                         const uint8_t *word, int64_t column, Group *group, __m512i *table) {
    const int turns = TURNS(bits), places = PLACES(bits);
    ROLLED for (int turn = 0; turn < turns; turn++, word += 2 * lanes, column += places * lanes) {
        if (whole)
            UNROLL for (int i = 0; i < places; i++)
                decode_place(bits, i, wide, run, 1, job, LANES, row, word, column + i * LANES, group, table);
        else
            ROLLED for (int i = 0; i < places; i++)
                decode_place(bits, i, wide, run, 0, job, lanes, row, word, column + i * lanes, group, table);
    }
}

INLINE void decode_rows(const int bits, const int wide, const int run, const Job *job, int64_t start, int64_t stop) {
    for (int64_t row = start; row < stop; row++) {
        const uint8_t *word = job->packed + row * (job->padded / 8 * bits);
        __m512i table = run ? _mm512_setzero_si512() : row_table(bits, wide, job->grid + (row << bits));
        Group group = {0, job->group};
        int64_t column = 0;
        for (; column + CHUNK <= job->columns; column += CHUNK)
            decode_chunk(bits, wide, run, 1, job, LANES, row, word + column / 8 * bits, column, &group, &table);
        for (int64_t lanes = LANES; lanes; lanes /= 2)
            if ((job->padded - column) / DEPTH >= lanes) {
                decode_chunk(bits, wide, run, 0, job, lanes, row, word + column / 8 * bits, column, &group, &table);
                column += DEPTH * lanes;
            }
    }
}

/* A function for every width and every step of the scales. */
#define FOR_EACH_RUN(name, what, bits, wide)                                                                                   \
    FAST static __attribute__((noinline)) void name(int run, const Job *job, int64_t start, int64_t stop) {                   \
        if (run == 0) what(bits, wide, 0, job, start, stop);                                                                   \
        if (run == 1) what(bits, wide, 1, job, start, stop);                                                                   \
        if (run == 4) what(bits, wide, 4, job, start, stop);                                                                   \
    }
FOR_EACH_RUN(product_2, product_rows, 2, 0)
FOR_EACH_RUN(product_3, product_rows, 3, 0)
FOR_EACH_RUN(product_4, product_rows, 4, 0)
FOR_EACH_RUN(product_2_wide, product_rows, 2, 1)
FOR_EACH_RUN(product_3_wide, product_rows, 3, 1)
FOR_EACH_RUN(product_4_wide, product_rows, 4, 1)
FOR_EACH_RUN(decode_2, decode_rows, 2, 0)
FOR_EACH_RUN(decode_3, decode_rows, 3, 0)
FOR_EACH_RUN(decode_4, decode_rows, 4, 0)
FOR_EACH_RUN(decode_2_wide, decode_rows, 2, 1)
FOR_EACH_RUN(decode_3_wide, decode_rows, 3, 1)
FOR_EACH_RUN(decode_4_wide, decode_rows, 4, 1)

typedef void (*Rows)(int run, const Job *job, int64_t start, int64_t stop);
static const Rows PRODUCT[2][3] = {{product_2, product_3, product_4}, {product_2_wide, product_3_wide, product_4_wide}};
static const Rows DECODE[2][3] = {{decode_2, decode_3, decode_4}, {decode_2_wide, decode_3_wide, decode_4_wide}};

int tightfit_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

static Job job_of(int64_t groups, int64_t tokens, int64_t columns, int64_t rows, const void *x, const void *packed, const void *grid,
                  const void *zero, void *out) {
    int64_t padded = (columns + DEPTH - 1) / DEPTH * DEPTH;
    int64_t group = groups > 1 ? columns / groups : INT64_MAX;
    return (Job){groups, tokens, columns, rows, padded, group, x, packed, grid, zero, out};
}

static int run_of(const Job *job) {
    return job->groups == 0 ? 0 : job->groups == 1 || job->group % (4 * LANES) == 0 ? 4 : 1;
}

/* `out[token][row] = sum of x[token][column] · weight[row][column]` for the rows start … stop - 1 of `rows`. */
void tightfit_product(int bits, int wide, int64_t groups, int64_t tokens, int64_t columns, int64_t rows, int64_t start, int64_t stop,
                      const void *x, const void *packed, const void *grid, const void *zero, void *out) {
    Job job = job_of(groups, tokens, columns, rows, x, packed, grid, zero, out);
    PRODUCT[wide][bits - 2](run_of(&job), &job, start, stop);
}

/* `out[row][column] = weight[row][column]` for the rows start … stop - 1. */
void tightfit_decode(int bits, int wide, int64_t groups, int64_t columns, int64_t start, int64_t stop, const void *packed,
                     const void *grid, const void *zero, void *out) {
    Job job = job_of(groups, 0, columns, 0, 0, packed, grid, zero, out);
    DECODE[wide][bits - 2](run_of(&job), &job, start, stop);
}

#else

int tightfit_supported(void) { return 0; }

#endif
