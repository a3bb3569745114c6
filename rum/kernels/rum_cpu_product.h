/* A matrix product with few rows: out += a panels. rum_cpu.c includes this file once for each
 * instruction set, with NAME, TARGET, VECTOR_BYTES and ROWS (rows of a tile, so many that its sums
 * fill the registers).
 *
 * A tile is ROWS x WIDTH of `out`; its sums stay in registers over the whole depth. `panels` holds
 * the other matrix, WIDTH columns after WIDTH columns, each panel (depth, WIDTH), the last one
 * filled up with zeros. Depth is cut into pieces whose panel stays in the first cache.
 */
#define JOINED_(a, b) a##_##b
#define JOINED(a, b) JOINED_(a, b)
#define VECTOR JOINED(vector, NAME)
#define TILE JOINED(tile, NAME)

typedef float VECTOR __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

INLINE TARGET void TILE(
    const int rows, const float *a, int64_t stride_a, int64_t depth, const float *panel,
    float *out, int64_t stride_out, int64_t columns)
{
    enum { PARTS = 4 * WIDTH / VECTOR_BYTES };
    /* An addition waits for the one before it in the same sum: few rows have several sums each. */
    const int sums = rows * PARTS <= 2 ? 4 : (rows * PARTS <= 4 ? 2 : 1);
    VECTOR sum[ROWS][PARTS], more[3][ROWS][PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            sum[r][p] = (VECTOR){0};
#pragma GCC unroll 4
            for (int s = 1; s < sums; s++) more[s - 1][r][p] = (VECTOR){0};
        }
    int64_t k = 0;
    for (; k + sums <= depth; k += sums) {
        const VECTOR *b = (const VECTOR *)(panel + WIDTH * k);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) {
                sum[r][p] += a[r * stride_a + k] * b[p];
#pragma GCC unroll 4
                for (int s = 1; s < sums; s++)
                    more[s - 1][r][p] += a[r * stride_a + k + s] * b[s * PARTS + p];
            }
    }
    for (; k < depth; k++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++)
                sum[r][p] += a[r * stride_a + k] * ((const VECTOR *)(panel + WIDTH * k))[p];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++)
#pragma GCC unroll 4
            for (int s = 1; s < sums; s++) sum[r][p] += more[s - 1][r][p];
    if (columns == WIDTH) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++)
                ((VECTOR *)(out + r * stride_out))[p] += sum[r][p];
    } else {
        float last[WIDTH];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
            for (int p = 0; p < PARTS; p++) ((VECTOR *)last)[p] = sum[r][p];
            for (int64_t j = 0; j < columns; j++)
                out[r * stride_out + j] += last[j];
        }
    }
}

TARGET static void JOINED(multiply, NAME)(
    int64_t rows, int64_t depth, int64_t columns, int64_t first_panel, int64_t last_panel,
    const float *a, int64_t stride_a, const float *panels, float *out, int64_t stride_out)
{
    for (int64_t begin = 0; begin < depth; begin += DEPTH) {
        const int64_t piece = depth - begin < DEPTH ? depth - begin : DEPTH;
        for (int64_t p = first_panel; p < last_panel; p++) {
            const int64_t left = columns - WIDTH * p, width = left < WIDTH ? left : WIDTH;
            const float *panel = panels + WIDTH * (p * depth + begin);
            int64_t row = 0;
#define ROWS_OF_TILE(count)                                                                     \
    TILE(count, a + row * stride_a + begin, stride_a, piece, panel,                             \
         out + row * stride_out + WIDTH * p, stride_out, width)
            for (; row + ROWS <= rows; row += ROWS) ROWS_OF_TILE(ROWS);
#if ROWS > 4
            for (; row + 4 <= rows; row += 4) ROWS_OF_TILE(4);
#endif
            for (; row + 2 <= rows; row += 2) ROWS_OF_TILE(2);
            for (; row < rows; row++) ROWS_OF_TILE(1);
#undef ROWS_OF_TILE
        }
    }
}

#undef JOINED_
#undef JOINED
#undef VECTOR
#undef TILE
#undef NAME
#undef TARGET
#undef VECTOR_BYTES
#undef ROWS
