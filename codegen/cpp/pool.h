// Threads that run one program (SPMD): every thread executes every step, with a barrier in between.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#include "simd.h"

extern "C" {
typedef struct {
  int32_t tokens, sequences, rows, table_stride;
  const int32_t *ids, *positions, *row_index, *starts, *block_table;
  const void *const *weights;
  void *const *caches;
  uint8_t *arena, *workspace;
} tm_args;
}

namespace mill {

// One word on a cache line of its own.
struct alignas(128) Word {
  int32_t value;
};
TM_INLINE int32_t peek(const Word &w) { return __atomic_load_n(&w.value, __ATOMIC_ACQUIRE); }
TM_INLINE void put(Word &w, int32_t x) { __atomic_store_n(&w.value, x, __ATOMIC_RELEASE); }
TM_INLINE int32_t bump(Word &w) { return __atomic_fetch_add(&w.value, 1, __ATOMIC_ACQ_REL); }

TM_INLINE void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spin for about a microsecond, then let others have the core: it may be the one we are waiting for.
constexpr int SPINS = 256;
inline void wait_while(const Word &w, int32_t value) {
  for (int i = 0; peek(w) == value; i++) {
    if (i < SPINS)
      pause();
    else
      sched_yield();
  }
}

struct Team {
  Word arrived, generation;
  Word *taken;  // per thread: jobs taken from its share
};

struct Thread {
  int id, count;
  const tm_args *args;
  Team *team;
  uint8_t *shared, *local;  // scratch of the kernel at hand: all threads', and this thread's

  // This thread's share [first, last) of n equal rows.
  int share(int n, int part) const { return (int)((int64_t)n * (id + part) / count); }

  void barrier() {
    const int32_t generation = peek(team->generation);
    if (bump(team->arrived) + 1 == count) {
      put(team->arrived, 0);
      for (int i = 0; i < count; i++) put(team->taken[i], 0);
      put(team->generation, generation + 1);
    } else {
      wait_while(team->generation, generation);
    }
  }
};

// Jobs [0, count) of a phase, of which there is one between two barriers.  A thread takes its own share in
// order, so that weights stream, and then from the shares of those that are behind:
//   for (Jobs jobs(th, n); jobs.next();) use(jobs.at);
struct Jobs {
  Thread &th;
  int count, at = 0;
  Jobs(Thread &th, int count) : th(th), count(count) {}
  bool next() {
    for (; helped < th.count; helped++) {
      const int64_t owner = (th.id + helped) % th.count;
      at = (int)(count * owner / th.count) + bump(th.team->taken[owner]);
      if (at < (int)(count * (owner + 1) / th.count)) return true;
    }
    return false;
  }

 private:
  int helped = 0;
};

// Arrays carved from a block of scratch, each on its own cache lines.
struct Scratch {
  uint8_t *at;
  template <class T>
  T *take(size_t count) {
    T *p = (T *)at;
    at += bytes<T>(count);
    return p;
  }
  template <class T>
  static constexpr size_t bytes(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }
  // Bytes of several arrays of T.
  template <class T, class... Counts>
  static constexpr size_t sizes(Counts... counts) {
    return (bytes<T>((size_t)counts) + ...);
  }
};

// Rows of an arena buffer, from some column on.
template <class T>
struct Rows {
  T *data;
  int64_t pitch;
  TM_INLINE T *operator[](int row) const { return data + row * pitch; }
};

// --- the pool ---------------------------------------------------------------------------------------

typedef void (*Program)(Thread &, int first, int last);

struct Pool {
  Team team;
  Word epoch;  // counts runs; -1 ends the workers
  int threads;
  size_t shared_bytes, local_bytes;
  Program program;
  const tm_args *args;
  int first, last;
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  pthread_t *workers;
};

inline void run_as(Pool *pool, int id) {
  uint8_t *workspace = pool->args->workspace;
  Thread th{id,
            pool->threads,
            pool->args,
            &pool->team,
            workspace,
            workspace + pool->shared_bytes + id * pool->local_bytes};
  pool->program(th, pool->first, pool->last);
}

// Wait for the next run: spin, then yield for as long as it takes to choose a token, then sleep.
inline int32_t next_epoch(Pool *pool, int32_t seen) {
  for (int i = 0; i < 8 * SPINS; i++) {
    if (peek(pool->epoch) != seen) return peek(pool->epoch);
    pause();
  }
  for (int i = 0; i < 2 * SPINS; i++) {
    if (peek(pool->epoch) != seen) return peek(pool->epoch);
    sched_yield();
  }
  pthread_mutex_lock(&pool->mutex);
  while (peek(pool->epoch) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
  pthread_mutex_unlock(&pool->mutex);
  return peek(pool->epoch);
}

struct Start {
  Pool *pool;
  int id;
};

inline void *worker(void *raw) {
  const Start start = *(Start *)raw;
  free(raw);
  for (int32_t seen = 0; (seen = next_epoch(start.pool, seen)) != -1;) run_as(start.pool, start.id);
  return nullptr;
}

inline void publish(Pool *pool, int32_t epoch) {
  pthread_mutex_lock(&pool->mutex);
  put(pool->epoch, epoch);
  pthread_cond_broadcast(&pool->wake);
  pthread_mutex_unlock(&pool->mutex);
}

inline void pool_destroy(Pool *pool) {
  publish(pool, -1);
  for (int i = 1; i < pool->threads; i++) pthread_join(pool->workers[i], nullptr);
  pthread_cond_destroy(&pool->wake);
  pthread_mutex_destroy(&pool->mutex);
  free(pool->workers);
  free(pool->team.taken);
  free(pool);
}

// Null if memory or threads run out.
inline Pool *pool_create(int threads, size_t shared_bytes, size_t local_bytes, Program program) {
  void *memory = nullptr;
  if (threads < 1 || posix_memalign(&memory, alignof(Pool), sizeof(Pool))) return nullptr;
  memset(memory, 0, sizeof(Pool));
  Pool *pool = (Pool *)memory;
  pool->threads = 1;
  pool->shared_bytes = shared_bytes;
  pool->local_bytes = local_bytes;
  pool->program = program;
  pthread_mutex_init(&pool->mutex, nullptr);
  pthread_cond_init(&pool->wake, nullptr);
  pool->workers = (pthread_t *)calloc((size_t)threads, sizeof(pthread_t));
  void *taken = nullptr;
  if (posix_memalign(&taken, alignof(Word), (size_t)threads * sizeof(Word))) taken = nullptr;
  if (taken) memset(taken, 0, (size_t)threads * sizeof(Word));
  pool->team.taken = (Word *)taken;
  for (int id = 1; pool->workers && taken && id < threads; id++) {
    Start *start = (Start *)malloc(sizeof(Start));
    if (start) *start = {pool, id};
    if (!start || pthread_create(&pool->workers[id], nullptr, worker, start)) {
      free(start);
      break;
    }
    pool->threads++;
  }
  if (pool->threads == threads && pool->workers && taken) return pool;
  pool_destroy(pool);
  return nullptr;
}

// Steps [first, last) on all threads.  The last step's barrier means that every worker is done.
inline void pool_run(Pool *pool, const tm_args *args, int first, int last) {
  if (first >= last) return;
  pool->args = args;
  pool->first = first;
  pool->last = last;
  if (pool->threads > 1) publish(pool, (pool->epoch.value + 1) & 0x7fffffff);
  run_as(pool, 0);
}

}  // namespace mill
