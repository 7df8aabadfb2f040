/* One Tile for AVX-512; included by tiles.h once per KIND. */
#define JOIN_(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_(a, b, c)

INLINE AVX512(FEATURES) void JOIN(rows_, KIND, _avx512)(const uint32_t *rows, int64_t stride,
                                                        const uint32_t *panel, int64_t units,
                                                        const int32_t *start, const int m,
                                                        const char *ahead, int64_t lines,
                                                        float *block) {
  (void)start; /* int8 alone has offsets */
  SUM sum[TILE][3];
#pragma GCC unroll 8
  for (int i = 0; i < m; i++)
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) sum[i][j] = START(start + 16 * j);
  for (int64_t u = 0; u < units; u++, panel += PANEL) {
    const __m512i y0 = _mm512_loadu_si512(panel), y1 = _mm512_loadu_si512(panel + 16),
                  y2 = _mm512_loadu_si512(panel + 32);
    for (int64_t line = 0; line < lines; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 8
    for (int i = 0; i < m; i++) {
      const __m512i x = _mm512_set1_epi32((int)rows[i * stride + u]);
      sum[i][0] = ADD_PRODUCT(sum[i][0], x, y0);
      sum[i][1] = ADD_PRODUCT(sum[i][1], x, y1);
      sum[i][2] = ADD_PRODUCT(sum[i][2], x, y2);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < m; i++)
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) _mm512_storeu_ps(block + i * PANEL + 16 * j, TO_FLOAT(sum[i][j]));
}

static AVX512(FEATURES) void JOIN(tile_, KIND, _avx512)(const uint32_t *rows, int64_t stride,
                                                        const uint32_t *panel, int64_t units,
                                                        const int32_t *start, int64_t m,
                                                        const char *ahead, int64_t lines,
                                                        float *block) {
  /* The usual number of prefetched lines as a constant keeps the loop straight. */
#define ROWS(m)                                                                             \
  lines == 1                                                                                \
      ? JOIN(rows_, KIND, _avx512)(rows, stride, panel, units, start, m, ahead, 1, block)   \
      : JOIN(rows_, KIND, _avx512)(rows, stride, panel, units, start, m, ahead, lines, block)
  TILE_CASES(ROWS)
#undef ROWS
}

#undef JOIN
#undef JOIN_
#undef KIND
#undef FEATURES
#undef SUM
#undef START
#undef ADD_PRODUCT
#undef TO_FLOAT
