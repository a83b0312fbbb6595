// CUDA C on a CPU, for tests: what a kernel of gpu/kernels needs to be compiled by g++ and run block by block.
//
// Every thread of a block is a fiber with a stack of its own, and they take turns on one thread of the host. A fiber runs
// until it waits for others (a barrier, a shuffle, a flag), so what lies between two waits is one piece; the order in which
// fibers are resumed is drawn from a seed, so that a missing barrier shows as a result that depends on the seed. Seed 0 is the
// natural order.
//
// What is checked: that all threads of a block (of a warp) wait at one and the same line, that somebody always can go on,
// the zones around shared memory, alignment, null pointers, indices of arrays of fixed size, overrun stacks. A kernel that
// breaks a rule is left where it stands, with a message; nothing of it is unwound. Wild pointers are caught where
// they hit no memory at all; the rest is for the address sanitizer.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <new>
#include <type_traits>
#include <utility>

#if defined(__linux__) && defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_SWITCH 1
#else
#include <ucontext.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// --- words of the language ----------------------------------------------------------------------------------------
#define __device__
#define __global__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };

#define SIMT_VECTOR(T, name) \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR(float, float)
SIMT_VECTOR(double, double)
SIMT_VECTOR(int, int)
SIMT_VECTOR(unsigned, uint)
SIMT_VECTOR(short, short)
SIMT_VECTOR(unsigned short, ushort)
SIMT_VECTOR(unsigned char, uchar)
#undef SIMT_VECTOR

// One thread of the host runs everything, so these are plain variables: set whenever a fiber is resumed.
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

#ifdef SIMT_SWITCH
// Save what a call preserves on this stack, go on from another one.
asm(R"(
.text
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** from, void* to);
#endif
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;  // where the library lies, from the linker

namespace simt {

typedef uint64_t u64;
typedef int64_t i64;

constexpr int LANES = 32;
constexpr size_t GUARD = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 512 * 1024;  // its frames are larger
#else
constexpr size_t STACK = 128 * 1024;
#endif
constexpr size_t PAGE = 4096;
// Stacks that lie a power of two apart would all fall on the same lines of the cache.
constexpr size_t STRIDE = STACK + 5 * PAGE, STAGGER = 1088;

// --- state --------------------------------------------------------------------------------------------------------

struct Block;

struct Context {
#ifdef SIMT_SWITCH
  void* sp;
#else
  ucontext_t ucontext;
#endif
  void* fake;  // of the address sanitizer
  char* bottom;
  size_t size;
};

enum State : int { READY, AT_BLOCK, AT_WARP, AT_CLUSTER, POLLS, DONE };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  Context context;
  Block* block;
  int thread, line;
  State state;
  // asynchronous copies: those of group g end at ends[g % GROUPS]; `first` is the oldest group that has not arrived
  static constexpr unsigned GROUPS = 64;
  Copy* copies;
  size_t copied, issued, room, ends[GROUPS];
  unsigned first, groups;
};

struct Warp {
  int arrived, line;
  unsigned phase, barriers;
  u64 ballot[2];
  u64 value[2][LANES];
};

struct Block {
  i64 index;
  int arrived, line, finished;
  unsigned phase, epoch;  // barriers of the block that are behind; of any kind that orders all its threads
  int tally[2];
  Fiber* fibers;
  Warp* warps;
  unsigned char* memory;
  struct Cluster* cluster;
};

struct Cluster {
  int arrived, line, finished;  // threads, blocks
  Block* blocks;
};

struct Launch {
  int threads, warps, cluster_size;
  i64 blocks;
  size_t shared;
  u64 seed, random;
  void (*thread)(void**);
  void** arguments;
  Fiber **queue;  // a ring
  u64 mask, head, tail;
  i64 polls, patience;
  Context main;
  Cluster* ended;
  bool failed;
  char* message;
  int message_size;
  sigjmp_buf jump;
  char *stacks, *stacks_end;
  Fiber* fibers;  // of all blocks, one block after the other
};

static Launch L;
static Fiber* self;

inline unsigned draw(unsigned n) {  // 0 .. n - 1
  if (!L.seed) return 0;
  L.random ^= L.random << 13;
  L.random ^= L.random >> 7;
  L.random ^= L.random << 17;
  return (unsigned)(((L.random >> 32) * n) >> 32);
}

// --- switching ----------------------------------------------------------------------------------------------------

__attribute__((noinline)) static void switch_to(Context& from, Context& to, bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.bottom, to.size);
#endif
#ifdef SIMT_SWITCH
  simt_switch(&from.sp, to.sp);
#else
  swapcontext(&from.ucontext, &to.ucontext);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
  (void)last;
}

inline void push(Fiber* f) { L.queue[L.tail++ & L.mask] = f; }
inline void push_first(Fiber* f) { L.queue[--L.head & L.mask] = f; }

inline void become(Fiber* f) {
  self = f;
  threadIdx.x = (unsigned)f->thread;
  blockIdx.x = (unsigned)f->block->index;
}

// Leave the fiber that runs, for whoever is next; to the host where there is nobody or something is up.
__attribute__((noinline)) static void wait(bool last = false) {
  Fiber* me = self;
  if (L.failed || L.ended || L.head == L.tail) {
    switch_to(me->context, L.main, last);
  } else {
    Fiber* next = L.queue[L.head++ & L.mask];
    if (next != me) {
      become(next);
      switch_to(me->context, next->context, last);
    }
  }
  self->state = READY;
}

// A line of the kernel's source stands as @line@ in messages.
static void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char* format, ...) {
  const size_t used = strlen(L.message);
  va_list rest;
  va_start(rest, format);
  if (used + 1 < (size_t)L.message_size) vsnprintf(L.message + used, L.message_size - used, format, rest);
  va_end(rest);
}
static void where() { say(" (thread %d of block %lld)", self->thread, (long long)self->block->index); }
[[noreturn]] static void fail() {
  L.failed = true;
  for (;;) wait();
}

static void shuffle_in(Fiber** f, int n, bool first) {  // n is a multiple of 32
  if (!L.seed) {
    for (int i = 0; i < n; ++i) push(f[i]);
    return;
  }
  const int warps = n / LANES;
  const unsigned factor = 2 * draw(16) + 1, shift = draw(32), rotate = draw(warps);
  const bool back = draw(2), across = draw(2);
  for (int i = 0; i < n; ++i) {
    int w = across ? i % warps : i / LANES;
    const int lane = ((across ? i / warps : i % LANES) * factor + shift) % LANES;
    w = (w + rotate) % warps;
    if (back) w = warps - 1 - w;
    Fiber* next = f[w * LANES + lane];
    if (first) push_first(next);
    else push(next);
  }
}

static void release(Fiber* fibers, int n, bool first) {
  // the fibers of a block or warp lie one after the other
  Fiber* all[1024];
  for (int i = 0; i < n; ++i) all[i] = fibers + i;
  shuffle_in(all, n, first);
}

// --- meeting places -----------------------------------------------------------------------------------------------

static const char* const PLACES[] = {"running", "at a barrier of the block", "at an operation of the warp",
                                     "at a barrier of the cluster", "polling", "finished"};

[[noreturn]] static void diverged(int there, int here) {
  say("divergence: some threads wait at @%d@ while others have come to @%d@", there, here);
  where();
  fail();
}

// All threads of the block; the number of those whose `predicate` holds.
__attribute__((noinline)) static int barrier_count(int line, bool predicate) {
  Block& b = *self->block;
  if (b.arrived == 0) b.line = line;
  else if (b.line != line) diverged(b.line, line);
  const unsigned parity = b.phase & 1;
  b.tally[parity] += predicate;
  self->state = AT_BLOCK;
  self->line = line;
  L.polls = 0;
  if (++b.arrived == L.threads) {
    b.arrived = 0;
    b.tally[parity ^ 1] = 0;
    ++b.phase;
    ++b.epoch;
    release(b.fibers, L.threads, false);
  }
  wait();
  return b.tally[parity];
}
inline void barrier(int line) { barrier_count(line, false); }
inline int barrier_or(int line, int predicate) { return barrier_count(line, predicate != 0) > 0; }
inline int barrier_and(int line, int predicate) { return barrier_count(line, predicate != 0) == L.threads; }

// All lanes of the warp give a value each; what the lanes gave.
__attribute__((noinline)) static const u64* exchange(int line, unsigned mask, u64 value, bool predicate,
                                                     u64* ballot = nullptr) {
  if (mask != 0xffffffffu) {
    say("the mask at @%d@ is %08x: only whole warps are supported", line, mask);
    where();
    fail();
  }
  Warp& w = self->block->warps[self->thread / LANES];
  if (w.arrived == 0) w.line = line;
  else if (w.line != line) diverged(w.line, line);
  const unsigned parity = w.phase & 1;
  w.value[parity][self->thread % LANES] = value;
  if (predicate) w.ballot[parity] |= 1ull << self->thread % LANES;
  self->state = AT_WARP;
  self->line = line;
  L.polls = 0;
  if (++w.arrived == LANES) {
    w.arrived = 0;
    w.ballot[parity ^ 1] = 0;  // all have read it: they are here
    ++w.phase;
    release(self->block->fibers + self->thread / LANES * LANES, LANES, draw(2));
  }
  wait();
  if (ballot) *ballot = w.ballot[parity];
  return w.value[parity];
}

inline void warp_barrier(int line, unsigned mask = 0xffffffffu) {
  Warp& w = self->block->warps[self->thread / LANES];
  const unsigned before = w.barriers;
  exchange(line, mask, 0, false);
  w.barriers = before + 1;
}

template <class T> inline T from_lane(const u64* values, int lane) {
  T v;
  memcpy(&v, values + lane, sizeof(T));
  return v;
}
template <class T> inline const u64* give(int line, unsigned mask, T v) {
  static_assert(std::is_arithmetic<T>::value, "only numbers are shuffled");
  u64 bits = 0;
  memcpy(&bits, &v, sizeof(T));
  return exchange(line, mask, bits, false);
}
inline int lane_of_self() { return self->thread % LANES; }
template <class T> inline T shfl(int line, unsigned mask, T v, int from, int width = LANES) {
  const u64* values = give(line, mask, v);
  const int lane = lane_of_self();
  return from_lane<T>(values, (lane & ~(width - 1)) | (from & (width - 1)));
}
template <class T> inline T shfl_xor(int line, unsigned mask, T v, int bits, int width = LANES) {
  const u64* values = give(line, mask, v);
  const int lane = lane_of_self(), from = lane ^ bits;
  return from_lane<T>(values, from > (lane | (width - 1)) ? lane : from);
}
template <class T> inline T shfl_down(int line, unsigned mask, T v, unsigned by, int width = LANES) {
  const u64* values = give(line, mask, v);
  const int lane = lane_of_self(), from = lane + (int)by;
  return from_lane<T>(values, from > (lane | (width - 1)) ? lane : from);
}
template <class T> inline T shfl_up(int line, unsigned mask, T v, unsigned by, int width = LANES) {
  const u64* values = give(line, mask, v);
  const int lane = lane_of_self(), from = lane - (int)by;
  return from_lane<T>(values, from < (lane & ~(width - 1)) ? lane : from);
}
inline unsigned ballot(int line, unsigned mask, int predicate) {
  u64 all;
  exchange(line, mask, 0, predicate != 0, &all);
  return (unsigned)all;
}
inline int any(int line, unsigned mask, int predicate) { return ballot(line, mask, predicate) != 0; }
inline int all(int line, unsigned mask, int predicate) { return ballot(line, mask, predicate) == 0xffffffffu; }

// All threads of all blocks of the cluster (macro CLUSTER of the kernel).
__attribute__((noinline)) static void cluster_barrier_at(int line) {
  Cluster& c = *self->block->cluster;
  if (c.arrived == 0) c.line = line;
  else if (c.line != line) diverged(c.line, line);
  self->state = AT_CLUSTER;
  self->line = line;
  L.polls = 0;
  if (++c.arrived == L.threads * L.cluster_size) {
    c.arrived = 0;
    const int first = (int)draw(L.cluster_size);
    for (int k = 0; k < L.cluster_size; ++k) ++c.blocks[k].epoch;
    for (int k = 0; k < L.cluster_size; ++k)
      release(c.blocks[(first + k) % L.cluster_size].fibers, L.threads, false);
  }
  wait();
}

// Somebody else may go on: in a loop that waits for another block.
__attribute__((noinline)) static void yield() {
  if (++L.polls > L.patience) {
    say("deadlock: threads poll and nobody else can go on");
    fail();
  }
  self->state = POLLS;
  push(self);
  wait();
}
inline void perhaps_yield() {
  if (draw(4) == 1) yield();
}

// --- memory -------------------------------------------------------------------------------------------------------

inline unsigned char* shared_memory() { return self->block->memory; }
// Where a pointer into this block's shared memory points to in block `rank` of the cluster.
template <class T> inline T* in_cluster(T* pointer, int rank) {
  const ptrdiff_t offset = (unsigned char*)pointer - self->block->memory;
  if (rank < 0 || rank >= L.cluster_size || offset < 0 || (size_t)offset + sizeof(T) > L.shared) {
    say("a pointer to the shared memory of block %d of the cluster leaves it", rank);
    where();
    fail();
  }
  const Block& there = self->block->cluster->blocks[rank];
  if (there.finished == L.threads) {
    say("block %d of the cluster has left, but its shared memory is asked for", rank);
    where();
    fail();
  }
  return (T*)(there.memory + offset);
}

// As cp.async, commit_group and wait_group: nothing is there before it is waited for.
static void copy_async(void* to, const void* from, int bytes) {
  if (((uintptr_t)to | (uintptr_t)from) % bytes) {
    say("misaligned asynchronous copy of %d bytes", bytes);
    where();
    fail();
  }
  Fiber& f = *self;
  if (f.issued == f.room) {
    f.room = f.room ? 2 * f.room : 64;
    f.copies = (Copy*)realloc((void*)f.copies, f.room * sizeof(Copy));
  }
  f.copies[f.issued++] = {to, from, bytes};
}
static void copy_commit() {
  Fiber& f = *self;
  f.ends[f.groups++ % Fiber::GROUPS] = f.issued;
  if (f.groups - f.first > Fiber::GROUPS) {
    say("more than %u groups of asynchronous copies are under way", Fiber::GROUPS);
    where();
    fail();
  }
}
static void wrote(void* to, size_t bytes);
// Until at most `pending` groups are under way.
static void copy_wait(unsigned pending) {
  Fiber& f = *self;
  while (f.groups - f.first > pending) {
    for (const size_t end = f.ends[f.first % Fiber::GROUPS]; f.copied < end; ++f.copied) {
      const Copy& c = f.copies[f.copied];
      memcpy(c.to, c.from, c.bytes);
      wrote(c.to, c.bytes);
    }
    ++f.first;
  }
  if (f.copied == f.issued) f.copied = f.issued = 0;
  for (unsigned g = f.first; f.issued == 0 && g != f.groups; ++g) f.ends[g % Fiber::GROUPS] = 0;
}

inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) {
    const float small = (float)rest * 5.9604644775390625e-08f;  // exact
    return sign ? -small : small;
  }
  return bits_to_float(sign | ((rest << 13) + 0x38000000));
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;  // as the device does
  if (rest >= 0x47800000) return (uint16_t)(sign | 0x7c00);
  if (rest < 0x38800000) {  // subnormal: the addition rounds at the last place of a half
    const float moved = bits_to_float(rest) + 0.5f;
    return (uint16_t)(sign | (float_to_bits(moved) - 0x3f000000));
  }
  return (uint16_t)(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
}
inline uint16_t float_to_bfloat16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// --- races --------------------------------------------------------------------------------------------------------
//
// With SIMT_RACES the compiler reports every access (-fsanitize=thread, without that sanitizer's library). Two accesses
// of a byte of shared memory by different threads, one of them a write, must have a barrier of the block between
// them, or of the warp where both are of one warp. Shuffles order nothing, as on the device. Atomics and other volatile
// accesses are not looked at.
#ifdef SIMT_RACES
struct Trace {  // of one byte
  short writer, reader;  // threads; -1: none. Of a warp that read, any one
  bool many;             // several threads of the reader's warp read
  bool everywhere;       // threads of several warps read, since the same barrier of the block
  unsigned write_epoch, write_barriers, read_epoch, read_barriers;
  const char* write_at;
  const char* read_at;
};
static Trace* traces;
static void remember(size_t resident) {
  traces = (Trace*)malloc((resident * L.shared + 1) * sizeof(Trace));
}
static void forget() {
  free(traces);
  traces = nullptr;
}
#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))
SIMT_UNSEEN static Trace* traces_of(const Block& b) { return traces + (size_t)(b.fibers - L.fibers) / L.threads * L.shared; }
static void fresh(Block& b) {
  Trace* t = traces_of(b);
  memset((void*)t, 0, L.shared * sizeof(Trace));
  for (size_t i = 0; i < L.shared; ++i) t[i].writer = t[i].reader = -1;
}
[[noreturn]] static void race(const char* what, size_t byte, int other, const char* there, bool write,
                              const char* here) {
  const char* base = &__ehdr_start;
  say("race: byte %zu of shared memory is %s thread %d at $%zx$ and %s by this one at $%zx$, with no barrier between them",
      byte, what, other, (size_t)(there - base), write ? "written" : "read", (size_t)(here - base));
  where();
  fail();
}
SIMT_UNSEEN static void look(void* address, size_t bytes, bool write, const char* at) {
  if (!self) return;  // the host's own
  Block& b = *self->block;
  const size_t first = (size_t)((unsigned char*)address - b.memory);
  if (first >= L.shared) return;
  const int me = self->thread, warp = me / LANES;
  const unsigned barriers = b.warps[warp].barriers;
  Trace* t = traces_of(b) + first;
  for (size_t i = 0; i < bytes && first + i < L.shared; ++i, ++t) {
    const bool written = t->writer >= 0 && t->writer != me && t->write_epoch == b.epoch &&
                         !(t->writer / LANES == warp && t->write_barriers != barriers);
    if (written) race("written by", first + i, t->writer, t->write_at, write, at);
    const bool read_now = t->reader >= 0 && t->read_epoch == b.epoch;
    const bool same_warp = t->reader / LANES == warp;
    if (write) {
      if (read_now && (t->everywhere || !same_warp || ((t->many || t->reader != me) && t->read_barriers == barriers)))
        race(t->everywhere || t->many ? "read by others and last by" : "read by", first + i, t->reader, t->read_at, write,
             at);
      t->writer = (short)me;
      t->write_epoch = b.epoch;
      t->write_barriers = barriers;
      t->write_at = at;
      t->reader = -1;
    } else {
      t->everywhere = read_now && (t->everywhere || !same_warp);
      t->many = read_now && same_warp && t->read_barriers == barriers && (t->many || t->reader != me);
      t->reader = (short)me;
      t->read_epoch = b.epoch;
      t->read_barriers = barriers;
      t->read_at = at;
    }
  }
}
static void wrote(void* to, size_t bytes) { look(to, bytes, true, (const char*)__builtin_return_address(0)); }
#else
static void remember(size_t) {}
static void forget() {}
static void fresh(Block&) {}
static void wrote(void*, size_t) {}
#endif

// --- a launch -----------------------------------------------------------------------------------------------------

static void finish() {
  if (self->copied != self->issued) {
    say("asynchronous copies are under way where the thread ends");
    where();
    fail();
  }
  self->state = DONE;
  L.polls = 0;
  Block& b = *self->block;
  if (++b.finished == L.threads) {
    Cluster& c = *b.cluster;
    if (++c.finished == L.cluster_size) L.ended = &c;
  }
  wait(true);
}

static void enter() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!L.main.bottom) {  // the first of all comes from the host's stack
    L.main.bottom = (char*)bottom;
    L.main.size = size;
  }
#endif
  L.thread(L.arguments);
  finish();
  abort();
}

static void prepare(Fiber& f, int number) {
  char* bottom = L.stacks + (size_t)number * STRIDE + PAGE;
  f.context.bottom = bottom;
  f.context.size = STRIDE - PAGE;
  f.context.fake = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(bottom, f.context.size);
#endif
#ifdef SIMT_SWITCH
  char* top = bottom + STRIDE - PAGE - (number * STAGGER) % (4 * PAGE) / 64 * 64;
  void** sp = (void**)top;
  *--sp = nullptr;  // a return address that is never used: aligns as a call does
  *--sp = (void*)&enter;
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.context.sp = sp;
#else
  getcontext(&f.context.ucontext);
  f.context.ucontext.uc_stack.ss_sp = bottom;
  f.context.ucontext.uc_stack.ss_size = f.context.size;
  f.context.ucontext.uc_link = nullptr;
  makecontext(&f.context.ucontext, (void (*)())enter, 0);
#endif
}

static void start(Cluster& c, i64 first, int slot) {
  c.arrived = c.finished = 0;
  for (int k = 0; k < L.cluster_size; ++k) {
    Block& b = c.blocks[k];
    b.index = first + k;
    b.arrived = b.finished = 0;
    b.phase = b.epoch = 0;
    b.tally[0] = b.tally[1] = 0;
    memset((void*)b.warps, 0, sizeof(Warp) * L.warps);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(b.memory - GUARD, L.shared + 2 * GUARD);
#endif
    memset(b.memory - GUARD, 0xff, L.shared + 2 * GUARD);  // a NaN in every type
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(b.memory - GUARD, GUARD);
    __asan_poison_memory_region(b.memory + L.shared, GUARD);
#endif
    fresh(b);
    for (int i = 0; i < L.threads; ++i) {
      Fiber& f = b.fibers[i];
      f.block = &b;
      f.thread = i;
      f.state = READY;
      f.line = 0;
      f.copied = f.issued = f.first = f.groups = 0;
      prepare(f, (slot * L.cluster_size + k) * L.threads + i);
    }
    release(b.fibers, L.threads, false);
  }
}

static bool intact(const Block& b) {
#ifdef __SANITIZE_ADDRESS__
  (void)b;
  return true;
#else
  const unsigned char* after = b.memory + L.shared;
  for (size_t i = 0; i < GUARD; ++i) {
    if (after[i] != 0xff) {
      say("overrun: byte %zu after the %zu bytes of shared memory was written (block %lld)", i, L.shared,
          (long long)b.index);
      return false;
    }
    if (b.memory[-1 - (ptrdiff_t)i] != 0xff) {
      say("overrun: byte %zu before shared memory was written (block %lld)", i + 1, (long long)b.index);
      return false;
    }
  }
  return true;
#endif
}

// Nobody can go on.
static void stuck(Cluster* clusters, int slots) {
  say("deadlock or divergence: nobody can go on.");
  int told = 0;
  for (int s = 0; s < slots; ++s)
    for (int k = 0; k < L.cluster_size; ++k) {
      const Block& b = clusters[s].blocks[k];
      if (b.index < 0 || b.finished == L.threads || told++ == 4) continue;
      say(" Block %lld:", (long long)b.index);
      for (int i = 0; i < L.threads;) {  // runs of threads that stand alike
        const Fiber& f = b.fibers[i];
        int n = i;
        while (n < L.threads && b.fibers[n].state == f.state && b.fibers[n].line == f.line) ++n;
        if (f.state == DONE) say(" threads %d to %d have finished;", i, n - 1);
        else say(" threads %d to %d are %s @%d@;", i, n - 1, PLACES[f.state], f.line);
        i = n;
      }
    }
}

#ifndef __SANITIZE_ADDRESS__
constexpr int CAUGHT[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
static struct sigaction before_caught[4], before_alarm;
static void on_signal(int signal, siginfo_t* info, void*) {
  const char* at = (const char*)info->si_addr;
  if (signal == SIGFPE) say("an integer was divided by zero");
  else if ((signal == SIGSEGV || signal == SIGBUS) && at >= L.stacks && at < L.stacks_end) say("stack overflow");
  else if (signal == SIGSEGV || signal == SIGBUS) say("a wild pointer: no memory at %p", (const void*)at);
  else if (signal == SIGILL) say("trap");
  else say("time limit: the kernel ran too long");
  if (self) where();
  siglongjmp(L.jump, 1);
}

struct Signals {
  stack_t own, old;
  char* room;
  static constexpr size_t SIZE = 64 * 1024;
#ifdef __linux__
  timer_t timer;
  bool timed;
  static int number() { return SIGRTMAX - 3; }
#endif
  explicit Signals(double limit) {
    room = (char*)malloc(SIZE);
    own.ss_sp = room;
    own.ss_size = SIZE;
    own.ss_flags = 0;
    sigaltstack(&own, &old);
    struct sigaction act;
    memset(&act, 0, sizeof act);
    act.sa_sigaction = on_signal;
    act.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(CAUGHT[i], &act, &before_caught[i]);
#ifdef __linux__
    sigaction(number(), &act, &before_alarm);
    struct sigevent event;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = number();
    event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    timed = limit > 0 && timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
    if (timed) {
      struct itimerspec when;
      memset(&when, 0, sizeof when);
      when.it_value.tv_sec = (time_t)limit;
      when.it_value.tv_nsec = (long)((limit - (double)(time_t)limit) * 1e9);
      timer_settime(timer, 0, &when, nullptr);
    }
#endif
    (void)limit;
  }
  ~Signals() {
#ifdef __linux__
    if (timed) timer_delete(timer);
    sigaction(number(), &before_alarm, nullptr);
#endif
    for (int i = 0; i < 4; ++i) sigaction(CAUGHT[i], &before_caught[i], nullptr);
    sigaltstack(&old, nullptr);
    free(room);
  }
};
#endif

template <class T> T* table(size_t n) { return (T*)calloc(n ? n : 1, sizeof(T)); }

static void run(Cluster* clusters, int slots) {
  i64 next = 0;
  int busy = 0;
  for (int s = 0; s < slots && next < L.blocks; ++s, ++busy, next += L.cluster_size) start(clusters[s], next, s);
  while (busy) {
    if (L.head == L.tail) {
      stuck(clusters, slots);
      return;
    }
    Fiber* f = L.queue[L.head++ & L.mask];
    become(f);
    switch_to(L.main, f->context, false);
    self = nullptr;
    if (L.failed) return;
    if (L.ended) {
      Cluster* c = L.ended;
      L.ended = nullptr;
      for (int k = 0; k < L.cluster_size; ++k) {
        if (!intact(c->blocks[k])) return;
        c->blocks[k].index = -1;
      }
      --busy;
      if (next < L.blocks) {
        start(*c, next, (int)(c - clusters));
        next += L.cluster_size;
        ++busy;
      }
    }
  }
}

struct Order {  // of a launch, as Python gives it
  i64 blocks, resident, shared;
  u64 seed;
  double limit;
  int threads, message_size;
  char* message;
};

// Whether all went well; otherwise there is a message.
static int launch(void (*thread)(void**), void** arguments, const Order& order, int cluster_size) {
  const int slots = (int)((order.resident + cluster_size - 1) / cluster_size);
  L.threads = order.threads;
  L.warps = order.threads / LANES;
  L.cluster_size = cluster_size;
  L.blocks = order.blocks;
  L.shared = (size_t)order.shared;
  L.seed = order.seed;
  L.random = order.seed * 0x9e3779b97f4a7c15ull | 1;
  L.thread = thread;
  L.arguments = arguments;
  L.ended = nullptr;
  L.failed = false;
  L.message = order.message;
  L.message_size = order.message_size;
  L.message[0] = 0;
  self = nullptr;
  threadIdx = blockIdx = {0, 0, 0};
  blockDim = {(unsigned)order.threads, 1, 1};
  gridDim = {(unsigned)order.blocks, 1, 1};

  const size_t resident = (size_t)slots * cluster_size, fibers = resident * order.threads;
  const size_t room = (GUARD + L.shared + GUARD + 255) / 128 * 128;
  L.mask = 1;
  while (L.mask < 2 * fibers) L.mask *= 2;
  L.queue = table<Fiber*>(L.mask);
  L.mask -= 1;
  L.head = L.tail = 1ull << 62;
  L.polls = 0;
  L.patience = 1000000 + 2000 * (i64)fibers;
  const size_t all_stacks = fibers * STRIDE + PAGE;
  L.stacks = (char*)mmap(nullptr, all_stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (L.stacks == (char*)MAP_FAILED) {
    say("no memory for the stacks of %zu threads", fibers);
    free(L.queue);
    return 0;
  }
  L.stacks_end = L.stacks + all_stacks;
  if (fibers <= 8192)  // one mapping each, of which there may be 65530
    for (size_t i = 0; i <= fibers; ++i) mprotect(L.stacks + i * STRIDE, PAGE, PROT_NONE);
  Fiber* fiber = table<Fiber>(fibers);
  L.fibers = fiber;
  Warp* warps = table<Warp>(resident * L.warps);
  Block* blocks = table<Block>(resident);
  Cluster* clusters = table<Cluster>(slots);
  unsigned char* memory = (unsigned char*)malloc(resident * room + 256);
  unsigned char* aligned = (unsigned char*)(((uintptr_t)memory + 127) / 128 * 128 + 16);  // to 16, and no more
  for (size_t i = 0; i < resident; ++i) {
    blocks[i].index = -1;
    blocks[i].fibers = fiber + i * order.threads;
    blocks[i].warps = warps + i * L.warps;
    blocks[i].memory = aligned + i * room + GUARD;
    blocks[i].cluster = clusters + i / cluster_size;
  }
  for (int s = 0; s < slots; ++s) clusters[s].blocks = blocks + (size_t)s * cluster_size;
  remember(resident);
#ifdef __SANITIZE_ADDRESS__
  L.main.bottom = nullptr;  // told by the first switch
  run(clusters, slots);
  __asan_unpoison_memory_region(L.stacks, all_stacks);
  __asan_unpoison_memory_region(memory, resident * room + 256);
#else
  {
    Signals signals(order.limit);
    if (sigsetjmp(L.jump, 1) == 0) run(clusters, slots);
  }
#endif
  self = nullptr;
  for (size_t i = 0; i < fibers; ++i) free((void*)fiber[i].copies);
  forget();
  free(memory);
  free(clusters);
  free(blocks);
  free(warps);
  free(fiber);
  free(L.queue);
  munmap(L.stacks, all_stacks);
  return L.message[0] == 0;
}

// --- arguments ----------------------------------------------------------------------------------------------------

// One letter for what a parameter is, and its size: f4, i8; pointers have a p before that; ? is a type of its own.
template <class T> struct Describe {
  static void to(char*& out) {
    typedef typename std::remove_cv<typename std::remove_pointer<T>::type>::type E;
    if (std::is_pointer<T>::value) *out++ = 'p';
    typedef typename std::conditional<std::is_void<E>::value, char, E>::type sized;
    const char kind = std::is_void<E>::value ? 'v' : std::is_floating_point<E>::value ? 'f'
                      : std::is_integral<E>::value || std::is_enum<E>::value ? 'i' : std::is_pointer<E>::value ? 'p' : '?';
    out += sprintf(out, "%c%d ", kind, (int)sizeof(sized));
  }
};

template <class F> struct Call;
template <class... A> struct Call<void(A...)> {
  typedef void (*function)(A...);
  template <function F, size_t... I> static void unpack(void** arguments, std::index_sequence<I...>) {
    F(*(typename std::remove_cv<typename std::remove_reference<A>::type>::type*)arguments[I]...);
  }
  template <function F> static void thread(void** arguments) {
    unpack<F>(arguments, std::index_sequence_for<A...>());
  }
  static void describe(char* out) {
    *out = 0;
    const int dummy[] = {0, (Describe<A>::to(out), 0)...};
    (void)dummy;
  }
};

}  // namespace simt

// What the shared library has for Python: a function of the source, the most threads of a block, blocks of a cluster.
#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))
#define SIMT_ENTRY(function, bound, cluster) \
  SIMT_EXPORT int simt_launch(void** arguments, const simt::Order* order) { \
    return simt::launch(&simt::Call<decltype(function)>::thread<&function>, arguments, *order, cluster); \
  } \
  SIMT_EXPORT void simt_describe(char* out) { simt::Call<decltype(function)>::describe(out); } \
  SIMT_EXPORT int simt_bound() { return bound; } \
  SIMT_EXPORT int simt_cluster() { return cluster; }

// --- intrinsics ---------------------------------------------------------------------------------------------------
#define __syncthreads() simt::barrier(__LINE__)
#define __syncthreads_count(p) simt::barrier_count(__LINE__, (p) != 0)
#define __syncthreads_or(p) simt::barrier_or(__LINE__, p)
#define __syncthreads_and(p) simt::barrier_and(__LINE__, p)
#define __syncwarp(...) simt::warp_barrier(__LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) simt::shfl(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shfl_xor(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) simt::shfl_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) simt::shfl_up(__LINE__, __VA_ARGS__)
#define __any_sync(...) simt::any(__LINE__, __VA_ARGS__)
#define __all_sync(...) simt::all(__LINE__, __VA_ARGS__)
#define __ballot_sync(...) simt::ballot(__LINE__, __VA_ARGS__)
// not CUDA's: what stands for barrier.cluster and mapa under SIMT
#define simt_cluster_barrier() simt::cluster_barrier_at(__LINE__)

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { simt::yield(); }
[[noreturn]] inline void __trap() {
  simt::say("trap");
  simt::where();
  simt::fail();
}

#define SIMT_ATOMIC(T, name, expression) \
  inline T name(T* p, T v) { \
    simt::perhaps_yield(); \
    const T old = *(volatile T*)p, next = (T)(expression); \
    if (next != old) { *(volatile T*)p = next; simt::L.polls = 0; } \
    return old; \
  }
#define SIMT_ATOMIC_BITS(T) \
  SIMT_ATOMIC(T, atomicAnd, old & v) \
  SIMT_ATOMIC(T, atomicOr, old | v) \
  SIMT_ATOMIC(T, atomicXor, old ^ v)
#define SIMT_ATOMIC_ORDER(T) \
  SIMT_ATOMIC(T, atomicMax, old > v ? old : v) \
  SIMT_ATOMIC(T, atomicMin, old < v ? old : v)
#define SIMT_ATOMIC_SWAP(T) \
  SIMT_ATOMIC(T, atomicExch, v) \
  inline T atomicCAS(T* p, T compare, T v) { \
    simt::perhaps_yield(); \
    const T old = *(volatile T*)p; \
    if (old == compare && old != v) { *(volatile T*)p = v; simt::L.polls = 0; } \
    return old; \
  }
SIMT_ATOMIC(int, atomicAdd, (unsigned)old + (unsigned)v)
SIMT_ATOMIC(unsigned, atomicAdd, old + v)
SIMT_ATOMIC(unsigned long long, atomicAdd, old + v)
SIMT_ATOMIC(int, atomicSub, (unsigned)old - (unsigned)v)
SIMT_ATOMIC(unsigned, atomicSub, old - v)
SIMT_ATOMIC_BITS(int)
SIMT_ATOMIC_BITS(unsigned)
SIMT_ATOMIC_BITS(unsigned long long)
SIMT_ATOMIC_ORDER(int)
SIMT_ATOMIC_ORDER(unsigned)
SIMT_ATOMIC_ORDER(long long)
SIMT_ATOMIC_ORDER(unsigned long long)
SIMT_ATOMIC_SWAP(int)
SIMT_ATOMIC_SWAP(unsigned)
SIMT_ATOMIC_SWAP(unsigned long long)

template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldlu(const T* p) { return *p; }
template <class T> inline T __ldcv(const T* p) { simt::yield(); return *(const volatile T*)p; }
template <class T> inline void __stwb(T* p, T v) { *p = v; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stwt(T* p, T v) { *p = v; }

inline unsigned __float_as_uint(float v) { return simt::float_to_bits(v); }
inline int __float_as_int(float v) { return (int)simt::float_to_bits(v); }
inline float __uint_as_float(unsigned v) { return simt::bits_to_float(v); }
inline float __int_as_float(int v) { return simt::bits_to_float((unsigned)v); }
inline long long __double_as_longlong(double v) {
  long long r;
  memcpy(&r, &v, 8);
  return r;
}
inline double __longlong_as_double(long long v) {
  double r;
  memcpy(&r, &v, 8);
  return r;
}
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float rsqrt(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }

// max and min of floating-point numbers drop a NaN, as on the device
#define SIMT_EXTREMA(T, A, B) \
  inline T max(A a, B b) { return (T)a < (T)b ? (T)b : (T)a; } \
  inline T min(A a, B b) { return (T)b < (T)a ? (T)b : (T)a; }
SIMT_EXTREMA(int, int, int)
SIMT_EXTREMA(unsigned, unsigned, unsigned)
SIMT_EXTREMA(unsigned, int, unsigned)
SIMT_EXTREMA(unsigned, unsigned, int)
SIMT_EXTREMA(long, long, long)
SIMT_EXTREMA(unsigned long, unsigned long, unsigned long)
SIMT_EXTREMA(long long, long long, long long)
SIMT_EXTREMA(unsigned long long, unsigned long long, unsigned long long)
SIMT_EXTREMA(unsigned long long, long long, unsigned long long)
SIMT_EXTREMA(unsigned long long, unsigned long long, long long)
#undef SIMT_EXTREMA
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline float fdividef(float a, float b) { return a / b; }

// --- checks that the compiler puts in (-fsanitize=alignment,null,bounds), without the sanitizer's library ---------------
#define SIMT_HANDLER extern "C" __attribute__((visibility("hidden"), used)) void
#ifdef SIMT_CHECKS
namespace simt {
struct At { const char* file; uint32_t line, column; };
struct Mismatch { At at; const void* type; unsigned char log_alignment, kind; };
struct Bounds { At at; const void *array, *index; };
[[noreturn]] static void bad_access(Mismatch* m, uintptr_t pointer) {
  const unsigned long align = 1ul << m->log_alignment;
  if (!pointer) say("null pointer at @%u@", m->at.line);
  else say("misaligned access at @%u@: the address is not a multiple of %lu", m->at.line, align);
  where();
  fail();
}
[[noreturn]] static void bad_index(Bounds* b, uintptr_t index) {
  say("index %lld out of an array's bounds at @%u@", (long long)index, b->at.line);
  where();
  fail();
}
}  // namespace simt
SIMT_HANDLER __ubsan_handle_type_mismatch_v1(simt::Mismatch* m, uintptr_t p) { simt::bad_access(m, p); }
SIMT_HANDLER __ubsan_handle_type_mismatch_v1_abort(simt::Mismatch* m, uintptr_t p) { simt::bad_access(m, p); }
SIMT_HANDLER __ubsan_handle_out_of_bounds(simt::Bounds* b, uintptr_t i) { simt::bad_index(b, i); }
SIMT_HANDLER __ubsan_handle_out_of_bounds_abort(simt::Bounds* b, uintptr_t i) { simt::bad_index(b, i); }
#endif

#ifdef SIMT_RACES
#define SIMT_LOOK(name, bytes, write) \
  SIMT_HANDLER __tsan_##name(void* p) { simt::look(p, bytes, write, (const char*)__builtin_return_address(0)); }
#define SIMT_LOOKS(bytes) \
  SIMT_LOOK(read##bytes, bytes, false) \
  SIMT_LOOK(write##bytes, bytes, true) \
  SIMT_LOOK(unaligned_read##bytes, bytes, false) \
  SIMT_LOOK(unaligned_write##bytes, bytes, true) \
  SIMT_HANDLER __tsan_volatile_read##bytes(void*) {} \
  SIMT_HANDLER __tsan_volatile_write##bytes(void*) {} \
  SIMT_HANDLER __tsan_unaligned_volatile_read##bytes(void*) {} \
  SIMT_HANDLER __tsan_unaligned_volatile_write##bytes(void*) {}
SIMT_LOOKS(1)
SIMT_LOOKS(2)
SIMT_LOOKS(4)
SIMT_LOOKS(8)
SIMT_LOOKS(16)
SIMT_HANDLER __tsan_read_range(void* p, size_t n) { simt::look(p, n, false, (const char*)__builtin_return_address(0)); }
SIMT_HANDLER __tsan_write_range(void* p, size_t n) { simt::look(p, n, true, (const char*)__builtin_return_address(0)); }
SIMT_HANDLER __tsan_func_entry(void*) {}
SIMT_HANDLER __tsan_func_exit(void*) {}
SIMT_HANDLER __tsan_init() {}
#endif
