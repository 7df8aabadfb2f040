/* Keys and values that many queries see, as two products a block. Typed.
 *
 * Laying keys and values out as panels costs less than it saves from TILE queries on. The softmax's
 * shares are rounded to T before the second product, as flash attention does.
 */

/* keys [count, head_dim] as one panel. */
INLINE void NAME(key_panel)(const T *keys, int64_t count, int64_t head_dim, uint32_t *panel) {
  const int64_t units = head_dim * (int64_t)sizeof(T) / 4;
  for (int64_t c = 0; c < count; c++) {
    uint32_t key[MAX_HEAD_DIM];
    memcpy(key, keys + c * head_dim, sizeof(T) * head_dim);
    for (int64_t u = 0; u < units; u++) panel[u * PANEL + c] = key[u];
  }
  if (count < PANEL)
    for (int64_t u = 0; u < units; u++)
      memset(panel + u * PANEL + count, 0, sizeof(uint32_t) * (PANEL - count));
}

/* Columns first .. first + PANEL - 1 of values [count, head_dim]; a unit is along the positions. */
INLINE void NAME(value_panel)(const T *values, int64_t count, int64_t head_dim, int64_t first,
                              uint32_t *panel) {
  const int64_t each = 4 / (int64_t)sizeof(T);
  const int64_t width = head_dim - first < PANEL ? head_dim - first : PANEL;
  T rows[2][PANEL] = {{0}};
  for (int64_t j = 0; j < PANEL; j += each) {
    for (int64_t i = 0; i < each; i++) {
      if (j + i < count)
        memcpy(rows[i], values + (j + i) * head_dim + first, sizeof(T) * width);
      else
        memset(rows[i], 0, sizeof(rows[i]));
    }
    T *out = (T *)(panel + j / each * PANEL);
    if (each == 1)
      memcpy(out, rows[0], sizeof(rows[0]));
    else
#pragma omp simd
      for (int64_t c = 0; c < PANEL; c++) out[2 * c] = rows[0][c], out[2 * c + 1] = rows[1][c];
  }
}

/* A row of scores to shares; what was summed so far is to be multiplied by the result. */
INLINE float NAME(softmax_row)(float *scores, int64_t count, float scale, float *top, float *weight,
                               T *shares) {
  float most = *top, total = 0.0f;
#pragma omp simd
  for (int64_t c = 0; c < PANEL; c++) scores[c] = c < count ? scores[c] * scale : -INFINITY;
#pragma omp simd reduction(max : most)
  for (int64_t c = 0; c < PANEL; c++) most = scores[c] > most ? scores[c] : most;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < PANEL; c++) {
    const float share = vector_exp(scores[c] - most);
    shares[c] = STORE(c < count ? share : 0.0f);
    total += LOAD(shares[c]);
  }
  const float keep = vector_exp(*top - most);
  *top = most;
  *weight = *weight * keep + total;
  return keep;
}

/* Queries first .. last - 1 see `length` more positions. */
VECTOR void NAME(see_shared)(State *state, int64_t first, int64_t last, const T *keys,
                             const T *values, int64_t length, int64_t head_dim, float scale) {
  const int64_t units = head_dim * (int64_t)sizeof(T) / 4;
  const int64_t share_units = PANEL * (int64_t)sizeof(T) / 4;
  uint32_t panel[PANEL * MAX_HEAD_DIM];
  T shares[MAX_QUERIES][PANEL];
  float block[TILE * PANEL];
  for (int64_t j = 0; j < length; j += PANEL) {
    const int64_t count = length - j < PANEL ? length - j : PANEL;
    NAME(key_panel)(keys + j * head_dim, count, head_dim, panel);
    for (int64_t i = first; i < last; i += TILE) {
      const int64_t m = last - i < TILE ? last - i : TILE;
      NAME(tile)(state->raw[i], MAX_HEAD_DIM, panel, units, 0, m, 0, 0, block);
      for (int64_t q = 0; q < m; q++) {
        const float keep = NAME(softmax_row)(block + q * PANEL, count, scale, state->top + i + q,
                                             state->weight + i + q, shares[i + q]);
        float *sum = state->sum[i + q];
#pragma omp simd
        for (int64_t d = 0; d < head_dim; d++) sum[d] *= keep;
      }
    }
    for (int64_t d = 0; d < head_dim; d += PANEL) {
      const int64_t width = head_dim - d < PANEL ? head_dim - d : PANEL;
      NAME(value_panel)(values + j * head_dim, count, head_dim, d, panel);
      for (int64_t i = first; i < last; i += TILE) {
        const int64_t m = last - i < TILE ? last - i : TILE;
        NAME(tile)
        ((const uint32_t *)shares[i], share_units, panel, share_units, 0, m, 0, 0, block);
        for (int64_t q = 0; q < m; q++)
#pragma omp simd
          for (int64_t c = 0; c < width; c++) state->sum[i + q][d + c] += block[q * PANEL + c];
      }
    }
  }
}
