/* Number formats, vectors of 16 floats, and how functions are compiled. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTOR \
  __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTOR __attribute__((noinline))
#endif
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

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

INLINE v16 load16_f32(const float *in) {
  v16 result;
  memcpy(&result, in, sizeof result);
  return result;
}

INLINE v16 load16_bf16(const bf16 *in) {
  h16 half;
  memcpy(&half, in, sizeof half);
  u16 bits = __builtin_convertvector(half, u16) << 16;
  v16 result;
  memcpy(&result, &bits, sizeof result);
  return result;
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
