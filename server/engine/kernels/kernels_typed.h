/* Included by kernels.c once per element type T. */

/* ---- attention ---- */

/* Where one layer's queries, keys, values and output lie; element strides.
 * A row is one token. It attends to its sequence's prefix, then to `length` positions of its slot.
 * Rows of the same prefix should be neighbours: they read it together.
 */
typedef struct {
  const T *queries; /* [rows, query_stride], the first num_heads * head_dim of each */
  T *output;        /* [rows, num_heads * head_dim] */
  const T *keys;    /* [slots, kv_heads, positions, head_dim] of this layer */
  const T *values;
  const int64_t *slots;         /* [rows] */
  const int64_t *lengths;       /* [rows] */
  const int64_t *prefix_keys;   /* [rows], addresses of [layers, kv_heads, prefix_length, head_dim] */
  const int64_t *prefix_values; /* [rows] */
  const int64_t *prefix_lengths; /* [rows] */
  int64_t layer, rows, num_heads, kv_heads, head_dim;
  int64_t query_stride, slot_stride, head_stride;
  float scale;
} NAME(Attention);

/* Running softmax of `count` queries over the keys seen so far. */
typedef struct {
  float query[MAX_QUERIES][MAX_HEAD_DIM];
  float sum[MAX_QUERIES][MAX_HEAD_DIM];
  float top[MAX_QUERIES];
  float weight[MAX_QUERIES];
} NAME(State);

INLINE void NAME(to_float)(float *out, const T *in, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) out[i] = LOAD(in[i]);
}

/* Queries first .. last - 1 see `count` <= BLOCK more positions. */
INLINE void NAME(see_block)(NAME(State) *state, int64_t first, int64_t last, const T *keys,
                            const T *values, int64_t count, const int64_t head_dim) {
  float block[BLOCK * MAX_HEAD_DIM], scores[MAX_QUERIES][BLOCK];
  NAME(to_float)(block, keys, count * head_dim);
  for (int64_t i = first; i < last; i++) {
    const float *query = state->query[i];
    for (int64_t j = 0; j < count; j++) {
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < head_dim; d++) dot += query[d] * block[j * head_dim + d];
      scores[i][j] = dot;
    }
  }
  NAME(to_float)(block, values, count * head_dim);
  for (int64_t i = first; i < last; i++) {
    float top = state->top[i], weight = 0.0f;
    float *score = scores[i], *sum = state->sum[i];
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < count; j++) top = score[j] > top ? score[j] : top;
    float keep = vector_exp(state->top[i] - top);
#pragma omp simd reduction(+ : weight)
    for (int64_t j = 0; j < count; j++) {
      score[j] = vector_exp(score[j] - top);
      weight += score[j];
    }
    state->top[i] = top;
    state->weight[i] = state->weight[i] * keep + weight;
#pragma omp simd
    for (int64_t d = 0; d < head_dim; d++) sum[d] *= keep;
    for (int64_t j = 0; j < count; j++) {
#pragma omp simd
      for (int64_t d = 0; d < head_dim; d++) sum[d] += score[j] * block[j * head_dim + d];
    }
  }
}

INLINE void NAME(see)(NAME(State) *state, int64_t first, int64_t last, const T *keys,
                      const T *values, int64_t length, const int64_t head_dim) {
  for (int64_t j = 0; j < length; j += BLOCK) {
    int64_t count = length - j < BLOCK ? length - j : BLOCK;
    NAME(see_block)
    (state, first, last, keys + j * head_dim, values + j * head_dim, count, head_dim);
  }
}

/* Rows first .. last - 1, all of one prefix, for one key-value head. */
INLINE void NAME(attend_rows)(const NAME(Attention) *a, int64_t first, int64_t last, int64_t head,
                              const int64_t head_dim) {
  NAME(State) state;
  const int64_t group = a->num_heads / a->kv_heads, queries = (last - first) * group;
  for (int64_t i = 0; i < queries; i++) {
    const T *query = a->queries + (first + i / group) * a->query_stride +
                     (head * group + i % group) * head_dim;
    for (int64_t d = 0; d < head_dim; d++) state.query[i][d] = LOAD(query[d]) * a->scale;
    memset(state.sum[i], 0, sizeof(float) * head_dim);
    state.top[i] = -INFINITY;
    state.weight[i] = 0.0f;
  }
  const int64_t length = a->prefix_lengths[first];
  const int64_t offset = (a->layer * a->kv_heads + head) * length * head_dim;
  NAME(see)
  (&state, 0, queries, (const T *)a->prefix_keys[first] + offset,
   (const T *)a->prefix_values[first] + offset, length, head_dim);
  for (int64_t row = first; row < last; row++) {
    const int64_t start = a->slots[row] * a->slot_stride + head * a->head_stride;
    NAME(see)
    (&state, (row - first) * group, (row - first + 1) * group, a->keys + start, a->values + start,
     a->lengths[row], head_dim);
  }
  for (int64_t i = 0; i < queries; i++) {
    T *output = a->output + ((first + i / group) * a->num_heads + head * group + i % group) *
                                head_dim;
    const float share = 1.0f / state.weight[i];
    for (int64_t d = 0; d < head_dim; d++) output[d] = STORE(state.sum[i][d] * share);
  }
}

VECTOR void NAME(attend_task)(const NAME(Attention) *a, int64_t first, int64_t last,
                              int64_t head) {
  switch (a->head_dim) { /* known sizes become straight vector code */
    case 64: NAME(attend_rows)(a, first, last, head, 64); break;
    case 128: NAME(attend_rows)(a, first, last, head, 128); break;
    default: NAME(attend_rows)(a, first, last, head, a->head_dim);
  }
}

/* `rows_per_task` <= MAX_QUERIES / (num_heads / kv_heads); `tasks` is scratch, [2 * rows]. */
void NAME(attention)(const NAME(Attention) *a, int64_t rows_per_task, int64_t *tasks) {
  int64_t count = 0;
  for (int64_t first = 0, last; first < a->rows; first = last) {
    for (last = first + 1; last < a->rows && last - first < rows_per_task &&
                           a->prefix_keys[last] == a->prefix_keys[first];)
      last++;
    tasks[2 * count] = first;
    tasks[2 * count + 1] = last;
    count++;
  }
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t task = 0; task < count; task++)
    for (int64_t head = 0; head < a->kv_heads; head++)
      NAME(attend_task)(a, tasks[2 * task], tasks[2 * task + 1], head);
}

/* ---- rotary embedding and cache writes ---- */

/* qkv [rows, (num_heads + 2 * kv_heads) * head_dim]: rotates queries and keys in place (halves, as
 * Llama does), and stores the row's keys and values at its index of its slot.
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

/* cosine, sine: float32 [positions, head_dim] tables. */
void NAME(rotate_and_store)(T *qkv, const float *cosine, const float *sine, T *keys, T *values,
                            const int64_t *slots, const int64_t *indices,
                            const int64_t *positions, int64_t rows, int64_t num_heads,
                            int64_t kv_heads, int64_t head_dim, int64_t slot_stride,
                            int64_t head_stride) {
#pragma omp parallel for if (rows * (num_heads + 2 * kv_heads) * head_dim > WORTH_A_THREAD)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t at = slots[row] * slot_stride + indices[row] * head_dim;
    const int64_t table = positions[row] * head_dim;
    NAME(rotate_and_store_row)
    (qkv + row * (num_heads + 2 * kv_heads) * head_dim, cosine + table, sine + table, keys + at,
     values + at, num_heads, kv_heads, head_dim, head_stride);
  }
}

/* ---- elementwise ---- */

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

void NAME(add_rms_norm)(T *residual, const T *delta, const T *weight, T *output, int64_t rows,
                        int64_t width, float epsilon) {
#pragma omp parallel for if (rows * width > WORTH_A_THREAD)
  for (int64_t row = 0; row < rows; row++)
    NAME(add_rms_norm_row)
    (residual + row * width, delta ? delta + row * width : 0, weight, output + row * width, width,
     epsilon);
}

/* gate_up [rows, 2 * width]; output = silu(gate) * up. */
VECTOR void NAME(silu_multiply_row)(const T *gate_up, T *output, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; i++) {
    const float gate = LOAD(gate_up[i]);
    const float activated = LOAD(STORE(gate / (1.0f + vector_exp(-gate))));
    output[i] = STORE(activated * LOAD(gate_up[width + i]));
  }
}

void NAME(silu_multiply)(const T *gate_up, T *output, int64_t rows, int64_t width) {
#pragma omp parallel for if (8 * rows * width > WORTH_A_THREAD) /* exp costs as much as 8 others */
  for (int64_t row = 0; row < rows; row++)
    NAME(silu_multiply_row)(gate_up + row * 2 * width, output + row * width, width);
}

/* ---- the likeliest token ---- */

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
