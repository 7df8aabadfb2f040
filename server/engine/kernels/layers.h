/* Every layer over a step's rows, by one team of threads. Typed. */

/* Neighbouring rows of one prefix share its reads, `rows_per_group` at most. */
static int64_t NAME(group_rows)(const Step *step) {
  int64_t count = 0;
  for (int64_t first = 0, last; first < step->rows; first = last, count++) {
    for (last = first + 1; last < step->rows && last - first < step->rows_per_group &&
                           step->prefix_keys[last] == step->prefix_keys[first];)
      last++;
    step->groups[2 * count] = first;
    step->groups[2 * count + 1] = last;
  }
  return count;
}

/* From the embeddings in `residual` to the last norm's output in `normed`. */
void NAME(layers)(const Model *model, const Step *step) {
  const int64_t hidden = model->hidden_size, rows = step->rows;
  const int64_t attended = model->num_heads * model->head_dim;
  const int64_t num_groups = NAME(group_rows)(step);
  T *residual = step->residual, *normed = step->normed, *delta = step->delta;
  Team team = {0};
#pragma omp parallel num_threads(step->threads)
  {
    assemble(&team);
    for (int64_t i = 0; i < model->num_layers; i++) {
      const Layer *layer = model->layers + i;
      NAME(add_rms_norm)(&team, residual, i ? delta : 0, layer->input_norm, normed, rows, hidden, model->epsilon);
      NAME(matmul)(&team, &layer->qkv, normed, hidden, rows, step->qkv, &step->quantized);
      NAME(rotate_and_store)(&team, model, step, i);
      NAME(attention)(&team, model, step, i, num_groups);
      NAME(matmul)(&team, &layer->output, step->mixed, attended, rows, delta, &step->quantized);
      NAME(add_rms_norm)(&team, residual, delta, layer->mlp_norm, normed, rows, hidden, model->epsilon);
      NAME(matmul)(&team, &layer->gate_up, normed, hidden, rows, step->gated, &step->quantized);
      NAME(matmul)(&team, &layer->down, step->gated, layer->gate_up.columns, rows, delta, &step->quantized);
    }
    NAME(add_rms_norm)(&team, residual, delta, model->norm, normed, rows, hidden, model->epsilon);
  }
}
