/* The products' inner loops: TILE rows by one panel. */
#define TILE 8
#define PANEL 48

/* rows 0 .. m - 1 (`stride` units apart) times a panel; the sums go to block[m][PANEL] as float.
 * `ahead`: memory to prefetch on the way, `lines` cache lines per unit. `start`: int8's offsets.
 */
typedef void (*Tile)(const uint32_t *rows, int64_t stride, const uint32_t *panel, int64_t units,
                     const int32_t *start, int64_t m, const char *ahead, int64_t lines,
                     float *block);

#define TILE_CASES(tile)                                                       \
  switch (m) {                                                                 \
    case 1: tile(1); break;                                                    \
    case 2: tile(2); break;                                                    \
    case 3: tile(3); break;                                                    \
    case 4: tile(4); break;                                                    \
    case 5: tile(5); break;                                                    \
    case 6: tile(6); break;                                                    \
    case 7: tile(7); break;                                                    \
    default: tile(8);                                                          \
  }

/* ---- any processor ---- */

#define GENERIC_TILE(name, SUM, PRODUCT)                                                      \
  VECTOR void tile_##name##_generic(const uint32_t *rows, int64_t stride,                     \
                                    const uint32_t *panel, int64_t units,                     \
                                    const int32_t *start, int64_t m, const char *ahead,       \
                                    int64_t lines, float *block) {                            \
    (void)ahead, (void)lines;                                                                 \
    for (int64_t i = 0; i < m; i++) {                                                         \
      SUM sum[PANEL];                                                                         \
      for (int64_t c = 0; c < PANEL; c++) sum[c] = start ? (SUM)start[c] : (SUM)0;            \
      for (int64_t u = 0; u < units; u++) {                                                   \
        const uint32_t x = rows[i * stride + u], *y = panel + u * PANEL;                      \
        _Pragma("omp simd") for (int64_t c = 0; c < PANEL; c++) sum[c] += PRODUCT(x, y[c]);   \
      }                                                                                       \
      for (int64_t c = 0; c < PANEL; c++) block[i * PANEL + c] = (float)sum[c];               \
    }                                                                                         \
  }

INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
INLINE float product_f32(uint32_t x, uint32_t y) { return bits_to_float(x) * bits_to_float(y); }
INLINE float product_bf16(uint32_t x, uint32_t y) {
  return bits_to_float(x << 16) * bits_to_float(y << 16) +
         bits_to_float(x & 0xffff0000u) * bits_to_float(y & 0xffff0000u);
}
INLINE int32_t product_int8(uint32_t x, uint32_t y) { /* unsigned times signed */
  return (int32_t)(x & 255) * (int8_t)(y & 255) + (int32_t)(x >> 8 & 255) * (int8_t)(y >> 8 & 255) +
         (int32_t)(x >> 16 & 255) * (int8_t)(y >> 16 & 255) + (int32_t)(x >> 24) * (int8_t)(y >> 24);
}
GENERIC_TILE(f32, float, product_f32)
GENERIC_TILE(bf16, float, product_bf16)
GENERIC_TILE(int8, int32_t, product_int8)

/* ---- AVX-512 ---- */

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512(features) __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq" features)))

#define KIND f32
#define FEATURES ""
#define SUM __m512
#define START(offsets) (_mm512_setzero_ps())
#define ADD_PRODUCT(sum, x, y) \
  _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum)
#define TO_FLOAT(sum) (sum)
#include "tile_avx512.h"

#define KIND bf16
#define FEATURES ",avx512bf16"
#define SUM __m512
#define START(offsets) (_mm512_setzero_ps())
#define ADD_PRODUCT(sum, x, y) _mm512_dpbf16_ps(sum, (__m512bh)(x), (__m512bh)(y))
#define TO_FLOAT(sum) (sum)
#include "tile_avx512.h"

/* As _mm512_dpbusd_epi32, for which GCC 12 copies every sum to another register and back. */
INLINE AVX512(",avx512vnni") __m512i add_product_int8(__m512i sum, __m512i x, __m512i y) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  return sum;
}

#define KIND int8
#define FEATURES ",avx512vnni"
#define SUM __m512i
#define START(offsets) (_mm512_loadu_si512(offsets))
#define ADD_PRODUCT(sum, x, y) add_product_int8(sum, x, y)
#define TO_FLOAT(sum) _mm512_cvtepi32_ps(sum)
#include "tile_avx512.h"

#define HAS(feature) __builtin_cpu_supports(feature)
#define CHOOSE(kind, feature) \
  (wide && HAS(feature) ? tile_##kind##_avx512 : tile_##kind##_generic)
#define WIDE static AVX512("") __attribute__((noinline))
#define HAS_WIDE HAS("avx512bw")
#else
#define CHOOSE(kind, feature) tile_##kind##_generic
#define WIDE static __attribute__((noinline))
#define HAS_WIDE 1
#endif

/* Whether this processor has 32 vector registers, and may use them. */
static int wide;
static Tile tile_f32, tile_bf16, tile_int8;

/* For tests: `generic` keeps to the loops that every processor has. */
void choose_tiles(int64_t generic) {
  wide = !generic && HAS_WIDE;
  tile_f32 = CHOOSE(f32, "avx512f");
  tile_bf16 = CHOOSE(bf16, "avx512bf16");
  tile_int8 = CHOOSE(int8, "avx512vnni");
}

__attribute__((constructor)) static void choose_tiles_at_load(void) { choose_tiles(0); }
