/* Softmax attention of a step's rows over prefixes and slots, by running log-sum-exp. Typed. */

/* scores[i] = `count` queries (at most 4) times 16 keys. */
INLINE void NAME(score)(const float (*query)[MAX_HEAD_DIM], const int count, const T *keys,
                        const int64_t head_dim, v16 *scores) {
  v16 parts[4][4];
#pragma GCC unroll 4
  for (int four = 0; four < 4; four++) {
    const T *key = keys + 4 * four * head_dim;
    v16 sum[4][4] = {{{0}}};
    for (int64_t d = 0; d < head_dim; d += 16) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const v16 k = NAME(load16)(key + j * head_dim + d);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) sum[i][j] += load16_f32(query[i] + d) * k;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++)
      parts[i][four] = sum_parts(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; i++)
    scores[i] = sum_of_parts(parts[i][0], parts[i][1], parts[i][2], parts[i][3]);
}

/* `count` queries (at most 4) from `first` on see `length` <= BLOCK more positions. */
INLINE void NAME(see_block)(State *state, int64_t first, const int count, const T *keys,
                            const T *values, int64_t length, const int64_t head_dim) {
  const v16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float scores[4][BLOCK];
  T last[16 * MAX_HEAD_DIM];
  for (int64_t j = 0; j < length; j += 16) {
    const T *sixteen = keys + j * head_dim;
    if (length - j < 16) { /* nothing is read beyond the last key */
      memset(last, 0, sizeof(T) * 16 * head_dim);
      memcpy(last, sixteen, sizeof(T) * (length - j) * head_dim);
      sixteen = last;
    }
    v16 found[4];
    NAME(score)(state->query + first, count, sixteen, head_dim, found);
    const v16 left = (v16){0} + (float)(length - j);
    const i16 real = lanes < left;
    const v16 nothing = (v16){0} - INFINITY;
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      found[i] = (v16)(((i16)found[i] & real) | ((i16)nothing & ~real));
      memcpy(scores[i] + j, &found[i], sizeof found[i]);
    }
  }
  const int64_t padded = (length + 15) / 16 * 16;
#pragma GCC unroll 4
  for (int i = 0; i < count; i++) {
    v16 tops = load16_f32(scores[i]);
    for (int64_t j = 16; j < padded; j += 16) tops = larger(load16_f32(scores[i] + j), tops);
    const float before = state->top[first + i], found = largest(tops);
    const float top = found > before ? found : before;
    const float keep = vector_exp(before - top);
    float weight = 0.0f;
#pragma omp simd reduction(+ : weight)
    for (int64_t j = 0; j < padded; j++) {
      const float share = scores[i][j] == -INFINITY ? 0.0f : vector_exp(scores[i][j] - top);
      scores[i][j] = share;
      weight += share;
    }
    state->top[first + i] = top;
    state->weight[first + i] = state->weight[first + i] * keep + weight;
    float *sum = state->sum[first + i];
#pragma omp simd
    for (int64_t d = 0; d < head_dim; d++) sum[d] *= keep;
  }
  for (int64_t d = 0; d < head_dim; d += 64) { /* as many sums as registers hold */
    const int parts = head_dim - d < 64 ? (int)(head_dim - d) / 16 : 4;
    v16 sums[4][4] = {{{0}}};
#pragma GCC unroll 4
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++)
        if (part < parts) sums[i][part] = load16_f32(state->sum[first + i] + d + 16 * part);
    for (int64_t j = 0; j < length; j++) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        if (part >= parts) break;
        const v16 value = NAME(load16)(values + j * head_dim + d + 16 * part);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) sums[i][part] += scores[i][j] * value;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++)
        if (part < parts)
          memcpy(state->sum[first + i] + d + 16 * part, &sums[i][part], sizeof(v16));
  }
}

INLINE void NAME(see_blocks)(State *state, int64_t first, int64_t last, const T *keys,
                             const T *values, int64_t length, const int64_t head_dim) {
  for (int64_t j = 0; j < length; j += BLOCK) {
    const int64_t size = length - j < BLOCK ? length - j : BLOCK;
    const T *k = keys + j * head_dim, *v = values + j * head_dim;
    int64_t i = first;
    for (; last - i >= 4; i += 4) NAME(see_block)(state, i, 4, k, v, size, head_dim);
    switch (last - i) {
      case 3: NAME(see_block)(state, i, 3, k, v, size, head_dim); break;
      case 2: NAME(see_block)(state, i, 2, k, v, size, head_dim); break;
      case 1: NAME(see_block)(state, i, 1, k, v, size, head_dim);
    }
  }
}

/* With registers for a block's sums, known sizes become straight vector code. */
WIDE void NAME(see_blocks_wide)(State *state, int64_t first, int64_t last, const T *keys,
                                const T *values, int64_t length, int64_t head_dim) {
  switch (head_dim) {
    case 64: NAME(see_blocks)(state, first, last, keys, values, length, 64); break;
    case 128: NAME(see_blocks)(state, first, last, keys, values, length, 128); break;
    default: NAME(see_blocks)(state, first, last, keys, values, length, head_dim);
  }
}

/* Without, they bring little and take minutes to compile; AVX2 brings nothing. */
static __attribute__((noinline)) void NAME(see_blocks_narrow)(State *state, int64_t first,
                                                              int64_t last, const T *keys,
                                                              const T *values, int64_t length,
                                                              int64_t head_dim) {
  NAME(see_blocks)(state, first, last, keys, values, length, head_dim);
}

/* Queries first .. last - 1 see `length` more positions. */
INLINE void NAME(see)(State *state, int64_t first, int64_t last, const T *keys, const T *values,
                      int64_t length, int64_t head_dim, float scale) {
  if (last - first >= TILE && length >= PANEL)
    NAME(see_shared)(state, first, last, keys, values, length, head_dim, scale);
  else if (wide)
    NAME(see_blocks_wide)(state, first, last, keys, values, length, head_dim);
  else
    NAME(see_blocks_narrow)(state, first, last, keys, values, length, head_dim);
}

/* Rows first .. last - 1 of one slot: what all of them see, then what the later ones add. */
INLINE void NAME(see_slot)(State *state, const Step *step, const T *keys, const T *values,
                           int64_t first, int64_t last, int64_t base, int64_t group,
                           int64_t head_dim, float scale) {
  const int64_t shared = step->lengths[first], end = (last - base) * group;
  NAME(see)(state, (first - base) * group, end, keys, values, shared, head_dim, scale);
  for (int64_t row = first + 1; row < last; row++) {
    const int64_t query = (row - base) * group;
    NAME(see)
    (state, query, query + group, keys + shared * head_dim, values + shared * head_dim,
     step->lengths[row] - shared, head_dim, scale);
  }
}

/* Rows first .. last - 1, all of one prefix, for one key-value head. */
VECTOR void NAME(attend_group)(const Model *model, const Step *step, int64_t layer, int64_t first,
                               int64_t last, int64_t head) {
  State state;
  const int64_t heads = model->num_heads, group = heads / model->kv_heads;
  const int64_t head_dim = model->head_dim;
  const int64_t queries = (last - first) * group, width = (heads + 2 * model->kv_heads) * head_dim;
  for (int64_t i = 0; i < queries; i++) {
    const T *query = (const T *)step->qkv + (first + i / group) * width +
                     (head * group + i % group) * head_dim;
#pragma omp simd
    for (int64_t d = 0; d < head_dim; d++) state.query[i][d] = LOAD(query[d]) * model->scale;
    memcpy(state.raw[i], query, sizeof(T) * head_dim);
    memset(state.sum[i], 0, sizeof(float) * head_dim);
    state.top[i] = -INFINITY;
    state.weight[i] = 0.0f;
  }
  const int64_t length = step->prefix_lengths[first];
  const int64_t offset = (layer * model->kv_heads + head) * length * head_dim;
  NAME(see)
  (&state, 0, queries, (const T *)step->prefix_keys[first] + offset,
   (const T *)step->prefix_values[first] + offset, length, head_dim, model->scale);
  for (int64_t row = first, end; row < last; row = end) {
    for (end = row + 1; end < last && step->slots[end] == step->slots[row];) end++;
    const int64_t at = layer * step->layer_stride + step->slots[row] * step->slot_stride +
                       head * step->head_stride;
    NAME(see_slot)
    (&state, step, (const T *)step->keys + at, (const T *)step->values + at, row, end, first,
     group, head_dim, model->scale);
  }
  for (int64_t i = 0; i < queries; i++) {
    T *output = (T *)step->mixed + ((first + i / group) * heads + head * group + i % group) *
                                       head_dim;
    const float share = 1.0f / state.weight[i];
#pragma omp simd
    for (int64_t d = 0; d < head_dim; d++) output[d] = STORE(state.sum[i][d] * share);
  }
}

INLINE void NAME(fetch)(const T *from, int64_t count) {
  const char *bytes = (const char *)from;
  const int64_t size = count * (int64_t)sizeof(T) < FETCH ? count * (int64_t)sizeof(T) : FETCH;
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i);
}

/* Fetch where a row's positions begin: each is a stretch of its own, which no hardware foresees. */
INLINE void NAME(fetch_row)(const Model *model, const Step *step, int64_t layer, int64_t row,
                            int64_t head) {
  const int64_t length = step->prefix_lengths[row] * model->head_dim;
  const int64_t offset = (layer * model->kv_heads + head) * length;
  const int64_t at =
      layer * step->layer_stride + step->slots[row] * step->slot_stride + head * step->head_stride;
  NAME(fetch)((const T *)step->prefix_keys[row] + offset, length);
  NAME(fetch)((const T *)step->prefix_values[row] + offset, length);
  NAME(fetch)((const T *)step->keys + at, step->lengths[row] * model->head_dim);
  NAME(fetch)((const T *)step->values + at, step->lengths[row] * model->head_dim);
}

/* `groups`: first and last row of each group. */
static void NAME(attention)(Team *team, const Model *model, const Step *step, int64_t layer,
                            int64_t num_groups) {
  const int64_t pieces = num_groups * model->kv_heads;
  SHARE(team, i, pieces, {
    const int64_t *group = step->groups + i / model->kv_heads * 2;
    const int64_t next = i + 1;
    if (next < pieces)
      NAME(fetch_row)(model, step, layer, step->groups[next / model->kv_heads * 2],
                      next % model->kv_heads);
    NAME(attend_group)(model, step, layer, group[0], group[1], i % model->kv_heads);
  });
}
