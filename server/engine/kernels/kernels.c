/* The parts of a decode step that are not matrix products, for the CPU.
 *
 * Plain C and OpenMP, no intrinsics: every function marked VECTOR is compiled once per instruction
 * set and the right one is chosen when the library is loaded. The functions of kernels_typed.h
 * exist for float32 and bfloat16; sums are always float32.
 *
 * GOMP_* symbols are left undefined on purpose: torch has loaded its own OpenMP runtime, and a
 * second one would fight it for the cores.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR \
  __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTOR __attribute__((noinline))
#endif
#define INLINE static inline __attribute__((always_inline))

/* Elements below which one thread is done before others have woken up. */
#define WORTH_A_THREAD 65536

/* Positions of keys and values worked on at a time, and most queries that share them. */
#define BLOCK 64
#define MAX_QUERIES 64
#define MAX_HEAD_DIM 256

typedef uint16_t bf16;

INLINE float bf16_to_float(bf16 value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

INLINE bf16 float_to_bf16(float value) { /* to nearest, ties to even; NaN stays NaN */
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* exp(x) to a few units in the last place; Cephes' polynomial, which vectorises. */
INLINE float vector_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  float n = (x * 1.44269504088896341f + shift) - shift;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = ((int32_t)n + 127) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

#define T float
#define NAME(name) name##_f32
#define LOAD(value) (value)
#define STORE(value) (value)
#include "kernels_typed.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE

#define T bf16
#define NAME(name) name##_bf16
#define LOAD(value) bf16_to_float(value)
#define STORE(value) float_to_bf16(value)
#include "kernels_typed.h"
