/* What Python passes in; mirrored by server/engine/kernels/structures.py. */

/* Weights [columns, depth] as panels: [panels][units][PANEL] 32-bit units along the depth, a unit
 * being one float32, two bfloat16 or four int8. A gated matrix has its gate's and its up
 * projection's panels by turns. Everything is padded with zeros to whole panels.
 */
typedef struct {
  const uint32_t *packed;
  const float *bias;      /* [panels * PANEL] or NULL */
  const float *scales;    /* int8: [panels * PANEL], what one step of a column is worth; or NULL */
  const int32_t *offsets; /* int8: [panels * PANEL], -128 * the column's sum; or NULL */
  int64_t columns, units;
  int64_t gated;
} Matrix;

typedef struct {
  const void *input_norm, *mlp_norm;
  Matrix qkv, output, gate_up, down;
} Layer;

typedef struct {
  const Layer *layers;
  const void *norm;           /* of the last layer's output */
  const float *cosine, *sine; /* [positions, head_dim] */
  int64_t num_layers, hidden_size, num_heads, kv_heads, head_dim;
  float epsilon, scale;
} Model;

/* Room for a product's quantised rows. */
typedef struct {
  uint8_t *rows; /* [rows, deepest depth rounded up to units] */
  float *scales; /* [rows] */
} Quantized;

/* A step's rows, one per token. A row attends to its sequence's prefix, then to `lengths` positions
 * of its slot. Rows of one prefix, and rows of one slot in order, should be neighbours: they read
 * keys and values together.
 */
typedef struct {
  const int64_t *slots, *indices, *positions, *lengths;                /* [rows] */
  const int64_t *prefix_keys, *prefix_values;                          /* [rows], addresses */
  const int64_t *prefix_lengths;                                       /* [rows] */
  int64_t *groups;                                                     /* scratch [2 * rows] */
  void *keys, *values; /* [layers, slots, kv_heads, positions, head_dim] */
  int64_t layer_stride, slot_stride, head_stride;
  void *residual, *normed, *delta; /* [rows, hidden_size]; residual holds the embeddings */
  void *qkv, *mixed, *gated;       /* [rows, their product's columns] */
  Quantized quantized;
  int64_t rows, rows_per_group, threads;
} Step;
