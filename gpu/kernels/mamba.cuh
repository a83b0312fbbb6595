// One step of FP-Mamba with a mixer of low rank, by a block; sections 5 and 6 of docs/mathematics.md.
//
// P = U^T S U, so the step sees y only through the RANK numbers sigma = U y. With tau = S (sigma - U x),
// p = gate (r + w x) and q_i = gate w u_i,
//
//     v = p + sum_i tau_i q_i,   U norm(v) = (e + G tau) / sqrt(var(p) + 2 cov(p, q) tau + tau^T cov(q, q) tau + eps) + f,
//
// and after two rounds of sums over the channels an iteration is some arithmetic on RANK numbers, which one warp does.
//
// Channel d belongs to thread d % THREADS. States are read and written by LANES neighbouring threads a channel, each with
// VECTOR neighbouring numbers at a time, so that a warp's access is one piece of memory; what is found of a channel goes
// from one view to the other through shared memory.
//
// The mixer, B and C are given, or made here (MADE) from what a layer's linear maps say of x_t and y_{t-1}, its arguments:
//
//     u_i = a / max(||a||, eps), a = act(.);  alpha = alpha_max sigmoid(.);  B, C = (.) / max(||.||, eps)
//
// Macros: STORE; RANK; PRODUCT (Householder) 0 or 1; MODE of the norm: 0 none, 1 mean square, 2 centred; GATED, HEADS,
// MADE 0 or 1; ACT of the arguments: 0 none, 1 silu, 2 relu; THREADS; CHANNELS of a thread; STATES, the most that N may
// be, and FULL if it is that, and rows of N can be read 16 bytes at a time; RESIDENT, the blocks that a multiprocessor shall
// hold.
#pragma once
#include "sums.cuh"

constexpr int R = RANK, GRAM = PRODUCT ? R * (R - 1) / 2 : 0, PAIRS = R * (R + 1) / 2;

__device__ constexpr int below(int i, int k) { return i * (i - 1) / 2 + k; }            // i > k
__device__ constexpr int pair(int i, int k) { return i >= k ? i * (i + 1) / 2 + k : k * (k + 1) / 2 + i; }

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }
// exp(v / BASE), as the multiplier of the device has it in single precision.
constexpr real BASE = sizeof(real) == 8 ? (real)1 : (real)0.69314718055994531;
__device__ __forceinline__ float power(float v) { return exp2f(v); }
__device__ __forceinline__ double power(double v) { return exp(v); }
__device__ __forceinline__ real inverse_root(real v) { return 1 / sqrt(v); }

// Where NaN stays.
__device__ __forceinline__ real most(real a, real b) { return a != a || a >= b ? a : b; }

// S of P = U^T S U, from the inner products of the u below the diagonal.
__device__ __forceinline__ void strengths(const real* gram, const store* alpha, real (&S)[R][R]) {
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) S[i][j] = i == j;
  if constexpr (PRODUCT) {
#pragma unroll
    for (int i = 1; i < R; ++i)
#pragma unroll
      for (int k = 0; k < i; ++k) {
        const real factor = gram[below(i, k)] * widen(alpha[k]);
#pragma unroll
        for (int j = 0; j <= k; ++j) S[i][j] -= factor * S[k][j];
      }
  }
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) S[i][j] *= widen(alpha[i]);
}

__device__ __forceinline__ void times(const real (&S)[R][R], const real (&x)[R], real (&out)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
    out[i] = 0;
#pragma unroll
    for (int j = 0; j < R; ++j) out[i] += S[i][j] * x[j];
  }
}

__device__ __forceinline__ void times_transposed(const real (&S)[R][R], const real (&x)[R], real (&out)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
    out[i] = 0;
#pragma unroll
    for (int j = 0; j < R; ++j) out[i] += S[j][i] * x[j];
  }
}

// m x = b in place, b in x, by elimination with row pivots.
__device__ __forceinline__ void eliminate(real (&m)[R][R], real (&x)[R]) {
#pragma unroll
  for (int k = 0; k < R; ++k) {
#pragma unroll
    for (int i = k + 1; i < R; ++i)  // the largest of the column comes up by exchanges
      if (magnitude(m[i][k]) > magnitude(m[k][k])) {
#pragma unroll
        for (int j = 0; j < R; ++j) {
          const real other = m[i][j];
          m[i][j] = m[k][j];
          m[k][j] = other;
        }
        const real other = x[i];
        x[i] = x[k];
        x[k] = other;
      }
#pragma unroll
    for (int i = k + 1; i < R; ++i) {
      const real factor = m[i][k] / m[k][k];
#pragma unroll
      for (int j = k + 1; j < R; ++j) m[i][j] -= factor * m[k][j];
      x[i] -= factor * x[k];
    }
  }
#pragma unroll
  for (int k = R - 1; k >= 0; --k) {
#pragma unroll
    for (int j = k + 1; j < R; ++j) x[k] -= m[k][j] * x[j];
    x[k] /= m[k][k];
  }
}

// VECTOR numbers of a row of N, from number `begin` on; those beyond N are zero.
constexpr int VECTOR = FULL ? (STATES * (int)sizeof(store) >= 16 ? 16 / (int)sizeof(store) : STATES) : 1;
__device__ __forceinline__ void load_part(const store* from, int size, int begin, real (&v)[VECTOR]) {
  if constexpr (FULL) {
    const Pack<store, VECTOR> some = *(const Pack<store, VECTOR>*)(from + begin);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) v[k] = widen(some.v[k]);
  } else {
    v[0] = begin < size ? widen(from[begin]) : (real)0;
  }
}
__device__ __forceinline__ void store_part(store* to, int size, int begin, const real (&v)[VECTOR]) {
  if constexpr (FULL) {
    Pack<store, VECTOR> some;
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) some.v[k] = narrow(v[k]);
    *(Pack<store, VECTOR>*)(to + begin) = some;
  } else {
    if (begin < size) to[begin] = narrow(v[0]);
  }
}
constexpr int LANES = STATES / VECTOR > 32 ? 32 : STATES / VECTOR, PIECES = STATES / VECTOR / LANES;
// Channels that the block's threads have at a time, and how many times; numbers of the state in all of a thread's.
constexpr int GROUP = THREADS / LANES, PASSES = CHANNELS * LANES, OWN = PASSES * PIECES;
__device__ __forceinline__ int pass_channel(int pass) { return pass * GROUP + (int)threadIdx.x / LANES; }
// The first of the VECTOR numbers of a thread's piece.
__device__ __forceinline__ int piece_begin(int piece) { return (piece * LANES + (int)threadIdx.x % LANES) * VECTOR; }
// The sum over the threads of a channel; every thread of the warp takes part.
__device__ __forceinline__ real lanes_total(real v) {
#pragma unroll
  for (int reach = LANES / 2; reach > 0; reach /= 2) v += __shfl_xor_sync(EVERY_LANE, v, reach);
  return v;
}

// The arrays of a step that a thread of either kernel looks at, for one sequence and step.
struct Inputs {
  const store *u, *x, *delta, *A, *gate;
  int dim, size, heads;

  __device__ real vector(int i, int d) const { return widen(u[(i64)i * dim + d]); }
  __device__ real step(int d) const { return widen(delta[HEADS ? d / (dim / heads) : d]); }
  // A and exp(dt A) of VECTOR states of a channel, from number `begin` on
  __device__ __forceinline__ void decays(int d, real dt, int begin, real (&rate)[VECTOR], real (&decay)[VECTOR]) const {
    if constexpr (HEADS) {
      const real own = widen(A[d / (dim / heads)]), whole = power(dt * (1 / BASE) * own);
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) {
        rate[k] = own;
        decay[k] = whole;
      }
    } else {
      load_part(A + (i64)d * size, size, begin, rate);
#pragma unroll
      for (int k = 0; k < VECTOR; ++k) decay[k] = power(dt * (1 / BASE) * rate[k]);
    }
  }
  __device__ real opening(int d) const { return GATED ? widen(gate[d]) : (real)1; }
};

// The largest of two numbers over the block, in every thread; NaN stays. `room` has two a warp.
__device__ __forceinline__ void block_most(real& a, real& b, real* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) {
    a = most(a, __shfl_xor_sync(EVERY_LANE, a, reach));
    b = most(b, __shfl_xor_sync(EVERY_LANE, b, reach));
  }
  if (lane == 0) {
    room[2 * warp] = a;
    room[2 * warp + 1] = b;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) {
    a = most(a, room[2 * w]);
    b = most(b, room[2 * w + 1]);
  }
}

// --- arguments ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ real sigmoid(real v) { return 1 / (1 + exponential(-v)); }
__device__ __forceinline__ real activate(real v) {
  return ACT == 1 ? v * sigmoid(v) : ACT == 2 ? larger(v, (real)0) : v;
}
__device__ __forceinline__ real activate_slope(real v) {
  if (ACT == 1) {
    const real open = sigmoid(v);
    return open * (1 + v * (1 - open));
  }
  return ACT == 2 ? (real)(v > 0) : (real)1;
}

__device__ __forceinline__ real warp_total(real v) {
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) v += __shfl_xor_sync(EVERY_LANE, v, reach);
  return v;
}

// Arguments: those of x_t for all steps, mixer (B, T, stride >= R D + R), b and c (B, T, N); and `fed` (B, width) of y_{t-1}, in which
// each stands from `at_` on, or is missing if that is negative.
struct Arguments {
  const store *mixer, *b, *c, *fed;
  int width, stride, at_mixer, at_b, at_c;

  __device__ __forceinline__ real from(const store* own, i64 row, int size, int at, i64 sequence, int k) const {
    const real v = widen(own[row * size + k]);
    return at < 0 ? v : v + widen(fed[sequence * width + at + k]);
  }
};

// A thread's sums of B and of C over its channels, one after the other, into the room of a block's sums of 2 STATES.
__device__ __forceinline__ void sum_rows(real (&sums)[2 * PIECES * VECTOR], real* room) {
  constexpr int HALF = PIECES * VECTOR, OF = THREADS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int index = 0, valid = 2 * HALF;
  fold_sums<2 * HALF, 16, LANES>(sums, lane, index, valid);
#pragma unroll
  for (int i = 0; i < folded(2 * HALF, LANES); ++i)
    if (i < valid) {
      const int which = (index + i) / HALF, k = (index + i) % HALF;
      const int slot = which * STATES + piece_begin(k / VECTOR) + k % VECTOR;
      room[OF == 1 ? slot : slot * OF + warp] = sums[i];
    }
}
