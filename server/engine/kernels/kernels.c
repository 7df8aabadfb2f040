/* The layers of a Llama-shaped model over the rows of one step, for the CPU.
 *
 * Plain C with vector extensions and OpenMP. Functions marked VECTOR are compiled once per
 * instruction set and the right one is chosen when the library is loaded; the products' inner loops
 * also exist for AVX-512 with BF16 and VNNI (tile_avx512.h), chosen once by the processor.
 *
 * The typed headers are included once per element type of activations, keys and values: float32 and
 * bfloat16. Sums are always float32.
 *
 * GOMP_* symbols are left undefined on purpose: torch has loaded its own OpenMP runtime, and a
 * second one would fight it for the cores.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "common.h"
#include "structures.h"
#include "team.h"
#include "tiles.h"
#include "attention_state.h"

#define T float
#define NAME(name) name##_f32
#define LOAD(value) (value)
#define STORE(value) (value)
#include "elementwise.h"
#include "attention_shared.h"
#include "attention.h"
#include "matmul.h"
#include "layers.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE

#define T bf16
#define NAME(name) name##_bf16
#define LOAD(value) bf16_to_float(value)
#define STORE(value) float_to_bf16(value)
#include "elementwise.h"
#include "attention_shared.h"
#include "attention.h"
#include "matmul.h"
#include "layers.h"
