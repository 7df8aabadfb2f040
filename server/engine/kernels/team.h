/* A team of threads inside one parallel region: what they share out, and where they meet.
 *
 * OpenMP's own barriers either spin, which starves whoever else needs the core, or sleep, and a layer
 * has eight of them: waking up would take longer than the work. Here a thread that waits spins for
 * some microseconds and then offers its core on every turn.
 */
#include <sched.h>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

#define SPINS 1000

typedef struct {
  _Alignas(64) int64_t arrived;
  _Alignas(64) int64_t phase;
  _Alignas(64) int64_t next; /* piece of the work under way that nobody has taken */
  int64_t size;
} Team;

/* First thing in the region: OpenMP may give fewer threads than were asked for. */
INLINE void assemble(Team *team) {
#pragma omp single
  team->size = omp_get_num_threads();
}

/* Everything that any thread did before, every thread sees afterwards. */
INLINE void meet(Team *team) {
  const int64_t phase = __atomic_load_n(&team->phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->size) {
    __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team->next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team->phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int64_t spins = 0; __atomic_load_n(&team->phase, __ATOMIC_ACQUIRE) == phase; spins++) {
    if (spins < SPINS)
      PAUSE();
    else
      sched_yield();
  }
}

/* The next piece between two meetings: whoever is free takes it. */
INLINE int64_t take(Team *team) {
  return __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
}

/* Pieces of `count` that leave every thread several to take; piece i is i * size .. */
INLINE int64_t piece_size(const Team *team, int64_t count) {
  const int64_t size = count / (4 * team->size);
  return size > 0 ? size : 1;
}

/* Every i in 0 .. count - 1 is done once, by some thread of the team, which then meet. */
#define SHARE(team, i, count, work)                                                           \
  do {                                                                                        \
    const int64_t size_ = piece_size(team, count);                                            \
    for (int64_t at_ = take(team) * size_; at_ < (count); at_ = take(team) * size_)           \
      for (int64_t i = at_; i < at_ + size_ && i < (count); i++) work;                        \
    meet(team);                                                                               \
  } while (0)
