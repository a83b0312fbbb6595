// The states of a selective scan in the registers of a block; what its kernels share.
//
// SPREAD neighbouring threads have CHANNELS channels between them, and each has STATES of the states of all of these: N
// rounded up to SPREAD STATES. With two channels a row of B or C that a thread reads from shared memory serves twice as
// many states, which is what shared memory can deliver beside the exponentials. Of the two channels one is a thread's own,
// c = 0: that one it loads and stores; the other, c = 1, is its neighbour's own, and comes and goes by one exchange. So
// accesses are one element a thread, neighbours side by side, whatever the alignment of the arrays.
//
//   HEADS   0: A (D, N), delta (B, T, D).  1: A (H), delta (B, T, H), a decay for each head
#pragma once
#include "sums.cuh"

constexpr int CHANNELS = SPREAD > 1 ? 2 : 1;
constexpr int SLOTS = SPREAD * STATES;      // of a row of B or C in shared memory; what lies beyond N is zero
constexpr int HELD = CHANNELS * STATES;    // states of a thread, number c STATES + s
constexpr int RATES = HEADS ? 1 : HELD;
constexpr int WIDEST = 16 / (int)sizeof(real);
constexpr int VEC = STATES % WIDEST == 0 ? WIDEST : STATES % 2 == 0 ? 2 : 1;
constexpr int PACKS = HELD / VEC;
typedef Pack<real, VEC> pack;

// exp in the base that is cheap: rates are held as A / BASE, so that exp(delta A) = power(delta rate).
constexpr real BASE = sizeof(real) == 8 ? (real)1 : (real)0.69314718055994531;
#ifdef SIMT
inline float power(float e) { return ::exp2f(e); }
#else
__device__ __forceinline__ float power(float e) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(e));
  return r;
}
#endif
__device__ __forceinline__ double power(double e) { return exp(e); }

// What the neighbour has for the channel that is a thread's own, or of its own.
__device__ __forceinline__ real exchange(real v) { return __shfl_xor_sync(EVERY_LANE, v, 1); }

// Where a thread sits: blocks are those of a segment of time of a sequence, side by side. Segments begin at multiples of
// `unit` steps.
struct Seat {
  i64 sequence, first, last;
  int segment, block, lane, channel;
  __device__ Seat(i64 steps, int segments, int blocks, int unit) {
    block = blockIdx.x % blocks;
    segment = blockIdx.x / blocks % segments;
    sequence = blockIdx.x / blocks / segments;
    const i64 units = (steps + unit - 1) / unit;
    first = units * segment / segments * unit;
    last = units * (segment + 1) / segments * unit;
    first = first < steps ? first : steps;
    last = last < steps ? last : steps;
    sit();
  }
  __device__ Seat(i64 sequence, int block) : sequence(sequence), first(0), last(0), segment(0), block(block) { sit(); }
  __device__ void sit() {
    lane = threadIdx.x % SPREAD;
    channel = (block * (THREADS / SPREAD) + (int)threadIdx.x / SPREAD) * CHANNELS + lane % CHANNELS;
  }
  // Number of an element of an array (B, D, N): of channel c, state s.
  __device__ i64 state(int c, int s, int dim, int size) const {
    return (sequence * dim + (channel ^ c)) * size + lane * STATES + s;
  }
  __device__ bool has(int c, int s, int dim, int size) const {
    return (channel ^ c) < dim && lane * STATES + s < size;
  }
  // The first pack of a thread in an array of packs [row][block][PACKS][THREADS].
  __device__ i64 packs(i64 row, int blocks) const { return (row * blocks + block) * PACKS * THREADS + threadIdx.x; }
};

__device__ __forceinline__ void load_rates(const store* A, const Seat& p, int dim, int size, int heads,
                                           real (&rate)[RATES]) {
  if constexpr (HEADS) {
    rate[0] = p.channel < dim ? widen(A[p.channel / (dim / heads)]) / BASE : 0;
  } else {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int c = i / STATES, s = i % STATES;
      rate[i] = p.has(c, s, dim, size) ? widen(A[(i64)(p.channel ^ c) * size + p.lane * STATES + s]) / BASE : 0;
    }
  }
}

// Of an array (B, D, N), which may be missing.
__device__ __forceinline__ void load_states(const store* from, const Seat& p, int dim, int size, real (&h)[HELD]) {
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int c = i / STATES, s = i % STATES;
    h[i] = from != nullptr && p.has(c, s, dim, size) ? widen(from[p.state(c, s, dim, size)]) : 0;
  }
}

// To an array (B, D, N) that begins at a multiple of 16 bytes: packed where no row is padded.
__device__ __forceinline__ void store_states(store* to, const Seat& p, int dim, int size, const real (&h)[HELD]) {
#pragma unroll
  for (int i = 0; i < HELD; i += VEC) {
    const int c = i / STATES, s = i % STATES;
    if (size == SLOTS) {
      Pack<store, VEC> out;
#pragma unroll
      for (int v = 0; v < VEC; ++v) out.v[v] = narrow(h[i + v]);
      if ((p.channel ^ c) < dim) *(Pack<store, VEC>*)(to + p.state(c, s, dim, size)) = out;
    } else {
#pragma unroll
      for (int v = 0; v < VEC; ++v)
        if (p.has(c, s + v, dim, size)) to[p.state(c, s + v, dim, size)] = narrow(h[i + v]);
    }
  }
}

// From and to packs STRIDE apart.
template <int STRIDE> __device__ __forceinline__ void load_packs(const pack* from, real (&h)[HELD]) {
#pragma unroll
  for (int q = 0; q < PACKS; ++q) {
    const pack one = from[q * STRIDE];
#pragma unroll
    for (int v = 0; v < VEC; ++v) h[q * VEC + v] = one.v[v];
  }
}
template <int STRIDE> __device__ __forceinline__ void store_packs(pack* to, const real (&h)[HELD]) {
#pragma unroll
  for (int q = 0; q < PACKS; ++q) {
    pack one;
#pragma unroll
    for (int v = 0; v < VEC; ++v) one.v[v] = h[q * VEC + v];
    to[q * STRIDE] = one;
  }
}

// A thread's part of a row of B or C in shared memory.
__device__ __forceinline__ void load_row(const real* row, int lane, real (&v)[STATES]) {
  const pack* from = (const pack*)(row + lane * STATES);
#pragma unroll
  for (int q = 0; q < STATES / VEC; ++q) {
    const pack one = from[q];
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[q * VEC + i] = one.v[i];
  }
}

// The decays of the heads of both channels; nothing where every state has its own.
__device__ __forceinline__ void head_decays(const real (&rate)[RATES], real step, real (&decay)[CHANNELS]) {
  if constexpr (HEADS) {
    decay[0] = power(step * rate[0]);
    if constexpr (CHANNELS == 2) decay[1] = exchange(decay[0]);
  }
}
__device__ __forceinline__ real decay_of(int i, const real (&rate)[RATES], const real (&step)[CHANNELS],
                                         const real (&decay)[CHANNELS]) {
  if constexpr (HEADS) return decay[i / STATES];
  else return power(step[i / STATES] * rate[i]);
}

// H_t = exp(delta_t A) H_{t-1} + (delta_t x_t) B_t
__device__ __forceinline__ void advance(real (&h)[HELD], const real (&rate)[RATES], const real (&step)[CHANNELS],
                                        const real (&drive)[CHANNELS], const real (&into)[STATES]) {
  real decay[CHANNELS];
  head_decays(rate, step[0], decay);
#pragma unroll
  for (int i = 0; i < HELD; ++i)
    h[i] = decay_of(i, rate, step, decay) * h[i] + drive[i / STATES] * into[i % STATES];
}

// The sum over all states of a thread's own channel, of the parts that its neighbours have.
__device__ __forceinline__ real over_states(const real (&part)[CHANNELS]) {
  real total = part[0];
  if constexpr (CHANNELS == 2) total += exchange(part[1]);
#pragma unroll
  for (int offset = 2; offset < SPREAD; offset *= 2) total += __shfl_xor_sync(EVERY_LANE, total, offset);
  return total;
}
