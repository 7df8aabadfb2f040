/* The running softmax of queries, and sums across vectors. */

/* Most queries that share keys and values, and positions worked on at a time. */
#define MAX_QUERIES 64
#define MAX_HEAD_DIM 256
#define BLOCK 64
/* Bytes fetched ahead of each stretch of keys or values. */
#define FETCH 2048

/* Running softmax of queries over the keys seen so far. */
typedef struct {
  float query[MAX_QUERIES][MAX_HEAD_DIM]; /* scaled */
  float sum[MAX_QUERIES][MAX_HEAD_DIM];
  float top[MAX_QUERIES], weight[MAX_QUERIES];
  uint32_t raw[MAX_QUERIES][MAX_HEAD_DIM]; /* the queries as they came, for see_shared */
} State;

#define PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

/* Each 128-bit part of the result holds that part's sums of a, b, c, d. */
INLINE v16 sum_parts(v16 a, v16 b, v16 c, v16 d) {
#define EVENLY(x, y)                                                                           \
  (PAIR(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +                      \
   PAIR(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
  const v16 ab = EVENLY(a, b), cd = EVENLY(c, d);
#undef EVENLY
  return PAIR(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         PAIR(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

/* Part i of the result is the sum of the i-th vector's four parts. */
INLINE v16 sum_of_parts(v16 a, v16 b, v16 c, v16 d) {
#define HALVES(x, y)                                                                           \
  (PAIR(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                        \
   PAIR(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  const v16 ab = HALVES(a, b), cd = HALVES(c, d);
#undef HALVES
  return PAIR(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         PAIR(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

INLINE v16 larger(v16 a, v16 b) {
  i16 more = a > b;
  return (v16)(((i16)a & more) | ((i16)b & ~more));
}

INLINE float largest(v16 x) {
  x = larger(x, PAIR(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = larger(x, PAIR(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = larger(x, PAIR(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = larger(x, PAIR(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return x[0];
}
