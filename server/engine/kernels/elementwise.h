/* Norms, rotary positions, gates, and the likeliest token. Typed. */

/* Functions with a team are called by each of its threads; they share the work and meet at the end. */

/* residual += delta where there is one; output = residual / rms(residual) * weight. */
VECTOR void NAME(add_rms_norm_row)(T *residual, const T *delta, const T *weight, T *output,
                                   int64_t width, float epsilon) {
  float squares = 0.0f;
  if (delta) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) residual[i] = STORE(LOAD(residual[i]) + LOAD(delta[i]));
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; i++) squares += LOAD(residual[i]) * LOAD(residual[i]);
  const float scale = 1.0f / sqrtf(squares / (float)width + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < width; i++)
    output[i] = STORE(LOAD(STORE(LOAD(residual[i]) * scale)) * LOAD(weight[i]));
}

static void NAME(add_rms_norm)(Team *team, T *residual, const T *delta, const T *weight, T *output,
                               int64_t rows, int64_t width, float epsilon) {
  SHARE(team, row, rows,
        NAME(add_rms_norm_row)(residual + row * width, delta ? delta + row * width : 0, weight,
                               output + row * width, width, epsilon));
}

/* Rotates a row's queries and keys in place (halves, as Llama does), and stores its keys and values
 * at its index of its slot. qkv [(num_heads + 2 * kv_heads) * head_dim].
 */
VECTOR void NAME(rotate_and_store_row)(T *qkv, const float *cosine, const float *sine, T *keys,
                                       T *values, int64_t num_heads, int64_t kv_heads,
                                       int64_t head_dim, int64_t head_stride) {
  const int64_t half = head_dim / 2;
  for (int64_t head = 0; head < num_heads + kv_heads; head++) {
    T *x = qkv + head * head_dim;
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
      const float low = LOAD(x[d]), high = LOAD(x[d + half]);
      x[d] = STORE(low * cosine[d] - high * sine[d]);
      x[d + half] = STORE(high * cosine[d + half] + low * sine[d + half]);
    }
  }
  const T *key = qkv + num_heads * head_dim, *value = key + kv_heads * head_dim;
  for (int64_t head = 0; head < kv_heads; head++) {
    memcpy(keys + head * head_stride, key + head * head_dim, sizeof(T) * head_dim);
    memcpy(values + head * head_stride, value + head * head_dim, sizeof(T) * head_dim);
  }
}

static void NAME(rotate_and_store)(Team *team, const Model *model, const Step *step,
                                   int64_t layer) {
  const int64_t width = (model->num_heads + 2 * model->kv_heads) * model->head_dim;
  T *keys = (T *)step->keys + layer * step->layer_stride;
  T *values = (T *)step->values + layer * step->layer_stride;
  SHARE(team, row, step->rows, {
    const int64_t at = step->slots[row] * step->slot_stride + step->indices[row] * model->head_dim;
    const int64_t table = step->positions[row] * model->head_dim;
    NAME(rotate_and_store_row)
    ((T *)step->qkv + row * width, model->cosine + table, model->sine + table, keys + at,
     values + at, model->num_heads, model->kv_heads, model->head_dim, step->head_stride);
  });
}

/* best = index of the first maximum; normalizer = log(sum(exp(logits))), NaN if any is NaN. */
VECTOR void NAME(argmax_row)(const T *logits, int64_t *best, float *normalizer, int64_t width) {
  float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < width; i++) top = LOAD(logits[i]) > top ? LOAD(logits[i]) : top;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) sum += vector_exp(LOAD(logits[i]) - top);
  int64_t found = 0;
  while (found < width - 1 && LOAD(logits[found]) != top) found++;
  *best = found;
  *normalizer = top + logf(sum);
}

void NAME(argmax)(const T *logits, int64_t *best, float *normalizer, int64_t rows, int64_t width) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++)
    NAME(argmax_row)(logits + row * width, best + row, normalizer + row, width);
}
