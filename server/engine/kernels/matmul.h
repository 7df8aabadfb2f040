/* Products of a step's rows with packed weights. Typed. */

#ifndef SOON
#define SOON 8192 /* bytes that memory takes to arrive, roughly */
#endif

/* A row of a block scaled and biased, in place; whole panels, so that no loop has an odd end. */
INLINE void NAME(adjust)(float *block, const float *row_scale, const float *scales, const float *bias) {
  if (scales) {
    const float by = *row_scale;
#pragma omp simd
    for (int64_t c = 0; c < PANEL; c++) block[c] *= by * scales[c];
  }
  if (bias) {
#pragma omp simd
    for (int64_t c = 0; c < PANEL; c++) block[c] += bias[c];
  }
}

/* block[m][PANEL] to `width` columns of the output. */
VECTOR void NAME(finish)(float *block, int64_t m, int64_t width, const float *row_scales,
                         const float *scales, const float *bias, T *output, int64_t stride) {
  for (int64_t i = 0; i < m; i++, block += PANEL, output += stride) {
    T row[PANEL];
    NAME(adjust)(block, row_scales + i, scales, bias);
#pragma omp simd
    for (int64_t c = 0; c < PANEL; c++) row[c] = STORE(block[c]);
    memcpy(output, row, sizeof(T) * width);
  }
}

/* silu(gate) * up. */
VECTOR void NAME(finish_gated)(float *gate, float *up, int64_t m, int64_t width,
                               const float *row_scales, const float *scales, const float *bias,
                               T *output, int64_t stride) {
  for (int64_t i = 0; i < m; i++, gate += PANEL, up += PANEL, output += stride) {
    T row[PANEL];
    NAME(adjust)(gate, row_scales + i, scales, bias);
    NAME(adjust)(up, row_scales + i, scales ? scales + PANEL : 0, bias ? bias + PANEL : 0);
#pragma omp simd
    for (int64_t c = 0; c < PANEL; c++)
      row[c] = STORE(gate[c] / (1.0f + vector_exp(-gate[c])) * up[c]);
    memcpy(output, row, sizeof(T) * width);
  }
}

/* A row as unsigned bytes around 128, each worth `*scale`; NaN or Inf in the row makes it NaN. */
VECTOR void NAME(quantize_row)(const T *row, int64_t depth, uint8_t *output, int64_t padded,
                               float *scale) {
  float top = 0.0f, zero = 0.0f;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < depth; i++) {
    const float size = fabsf(LOAD(row[i]));
    top = size > top ? size : top;
  }
#pragma omp simd reduction(+ : zero)
  for (int64_t i = 0; i < depth; i++) zero += LOAD(row[i]) * 0.0f;
  const float steps = top > 0.0f && zero == 0.0f ? 127.0f / top : 0.0f;
#pragma omp simd
  for (int64_t i = 0; i < depth; i++) {
    const float value = zero == 0.0f ? LOAD(row[i]) : 0.0f;
    output[i] = (uint8_t)(int32_t)(value * steps + 128.5f);
  }
  memset(output + depth, 128, padded - depth);
  *scale = top / 127.0f + zero;
}

/* The t-th of `tiles` tiles of rows times one panel. Meanwhile a share of the memory that follows is
 * fetched: the next panel while this one's rows are worked on, or what comes soon if they are few.
 */
INLINE void NAME(multiply)(Tile tile, const uint32_t *rows, int64_t stride, const uint32_t *panel,
                           int64_t units, const int32_t *start, int64_t m, int64_t t,
                           int64_t tiles, int64_t each, float *block) {
  const int64_t lines_per_unit = PANEL / 16;
  const int64_t lines = tiles < lines_per_unit ? (lines_per_unit + tiles - 1) / tiles : 1;
  const char *ahead = (const char *)(panel + each * units * PANEL) + t * units * lines * 64;
  if (tiles == 1) ahead = (const char *)panel + SOON;
  tile(rows, stride, panel, units, start, m, ahead, t < lines_per_unit ? lines : 0, block);
}

/* Every row times panel `p`. */
static void NAME(multiply_panel)(const Matrix *matrix, int64_t p, Tile tile, const uint32_t *rows,
                                 int64_t stride, int64_t count, T *output,
                                 const float *row_scales) {
  const int64_t units = matrix->units, each = matrix->gated ? 2 : 1;
  const int64_t column = p * PANEL, at = column * each;
  const int64_t width = matrix->columns - column < PANEL ? matrix->columns - column : PANEL;
  const uint32_t *panel = matrix->packed + at * units;
  const int32_t *offsets = matrix->offsets ? matrix->offsets + at : 0;
  const float *scales = matrix->scales ? matrix->scales + at : 0;
  const float *bias = matrix->bias ? matrix->bias + at : 0;
  const int64_t tiles = (count + TILE - 1) / TILE;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t first = count * t / tiles, m = count * (t + 1) / tiles - first;
    const float *row_scale = scales ? row_scales + first : 0;
    T *to = output + first * matrix->columns + column;
    float block[2][TILE * PANEL];
    for (int64_t half = 0; half < each; half++)
      NAME(multiply)
      (tile, rows + first * stride, stride, panel + half * units * PANEL, units,
       offsets ? offsets + half * PANEL : 0, m, t, tiles, each, block[half]);
    if (matrix->gated)
      NAME(finish_gated)
      (block[0], block[1], m, width, row_scale, scales, bias, to, matrix->columns);
    else
      NAME(finish)(block[0], m, width, row_scale, scales, bias, to, matrix->columns);
  }
}

/* rows [count, depth], output [count, columns]; `quantized` is used by int8 matrices alone. */
static void NAME(matmul)(Team *team, const Matrix *matrix, const T *rows, int64_t depth,
                         int64_t count, T *output, const Quantized *quantized) {
  const uint32_t *input = (const uint32_t *)rows;
  int64_t stride = depth * (int64_t)sizeof(T) / 4;
  Tile tile = NAME(tile);
  if (matrix->scales) {
    const int64_t padded = matrix->units * 4;
    SHARE(team, row, count,
          NAME(quantize_row)(rows + row * depth, depth, quantized->rows + row * padded, padded,
                             quantized->scales + row));
    input = (const uint32_t *)quantized->rows, stride = matrix->units, tile = tile_int8;
  }
  SHARE(team, p, (matrix->columns + PANEL - 1) / PANEL,
        NAME(multiply_panel)(matrix, p, tile, input, stride, count, output, quantized->scales));
}

/* One product on its own: logits, and what tests compare. */
void NAME(project)(const Matrix *matrix, const T *rows, int64_t depth, int64_t count, T *output,
                   const Quantized *quantized, int64_t threads) {
  Team team = {0};
#pragma omp parallel num_threads(threads)
  {
    assemble(&team);
    NAME(matmul)(&team, matrix, rows, depth, count, output, quantized);
  }
}
