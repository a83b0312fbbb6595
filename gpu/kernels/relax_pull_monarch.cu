// Q x at an iterate, and the cotangents of all inputs of (F) at its solution, for Q = I - blockdiag(alpha_j M_j) with
// blocks of up to 128.
//
// With d = x - h, e = g s and m = x - alpha M d:
//     lam_bar_t = s_t (h_{t-1} - m_t), or s_t h_{t-1} with a gate, and gate_bar = s m;  initial_bar = lam_1 s_1
//     x_bar = e - alpha M^T e,   M_bar = -alpha e d^T,   alpha_bar = -e . (M d)
//
// Section 6 of docs/mathematics.md. LANES neighbouring lanes per block of M, which they read row after row, a lane
// every LANES-th column: sums over rows stay in the lane, sums over columns are folded over the lanes, LANES rows at a
// time, so that each lane ends with its own row.
//
// Memory traffic: everything read once and written once (h twice).
//
// Macros: STORE, EDGE; ADJOINT (mix_monarch only), GATED 0 or 1.
#include "common.cuh"

#ifndef ADJOINT
#define ADJOINT 0
#endif
#ifndef GATED
#define GATED 0
#endif

// No two of them are the same memory, where one is written
typedef const store* __restrict__ In;
typedef store* __restrict__ Out;

constexpr int lanes(int n) { return n < EDGE && n < 32 ? lanes(2 * n) : n; }
constexpr int LANES = lanes(1), OWN = (EDGE + LANES - 1) / LANES;  // columns, and rows, of a lane

// v[0] of the lane l is the sum of all lanes' v[l]
template <int N> __device__ __forceinline__ void fold(real* v, int lane) {
  if constexpr (N > 1) {
    const bool upper = lane & (N / 2);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const real keep = upper ? v[i + N / 2] : v[i], send = upper ? v[i] : v[i + N / 2];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, send, N / 2);
    }
    fold<N / 2>(v, lane);
  }
}

// One pass over the rows of a block: dots = M d (dots[k] is row k LANES + lane), sums = M^T w, bars = -w d^T
template <bool DOTS, bool SUMS, bool BARS>
__device__ __forceinline__ void walk(In m, Out bars, bool inside, const real* d, const real* w, real* dots,
                                     real* sums) {
  const int lane = threadIdx.x % LANES, base = threadIdx.x % 32 - lane;
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    real partial[LANES];
#pragma unroll
    for (int r = 0; r < LANES; ++r) {
      const int row = k * LANES + r;
      partial[r] = 0;
      if (row < EDGE) {
        real weight = 0;
        if (SUMS || BARS) weight = __shfl_sync(0xffffffffu, w[k], base + r);
#pragma unroll
        for (int c = 0; c < OWN; ++c) {
          const int column = c * LANES + lane;
          if (inside && (EDGE % LANES == 0 || column < EDGE)) {
            const real element = widen(m[row * EDGE + column]);
            if (DOTS) partial[r] += element * d[c];
            if (SUMS) sums[c] += element * weight;
            if (BARS) bars[row * EDGE + column] = narrow(-(weight * d[c]));
          }
        }
      }
    }
    if (DOTS) {
      fold<LANES>(partial, lane);
      dots[k] = partial[0];
    }
  }
}

// Which block of M the lanes of this thread have, counted over all steps
__device__ __forceinline__ i64 mine() { return ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES; }

// blocks, blocks_bar (B, T, COUNT, EDGE, EDGE), alpha, alpha_bar (B, T, COUNT); the rest (B, T, D), initial (B, D) or
// null
extern "C" __global__ void __launch_bounds__(128)
pull_monarch(In blocks, In alpha, In lam, In gate, In x, In initial, In h, In s, Out lam_bar, Out gate_bar,
             Out x_bar, Out initial_bar, Out blocks_bar, Out alpha_bar, int count, i64 rows, i64 steps) {
  const int lane = threadIdx.x % LANES, dim = count * EDGE;
  const i64 all = rows * count;
  const bool inside = mine() < all;
  const i64 block = inside ? mine() : all - 1, n = block / count, t = n % steps;
  const i64 at = block * EDGE;  // of the first channel
  const store* before = t > 0 ? h + at - dim : initial ? initial + n / steps * dim + block % count * EDGE : 0;
  const real strength = widen(alpha[block]);
  real d[OWN], e[OWN], weight[OWN], md[OWN], sums[OWN];
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int i = k * LANES + lane;
    d[k] = e[k] = sums[k] = 0;
    if (EDGE % LANES == 0 || i < EDGE) {
      const real given = widen((GATED ? gate : lam)[at + i]);
      d[k] = (real)widen(x[at + i]) - (real)widen(h[at + i]);
      e[k] = (GATED ? given : 1 - given) * (real)widen(s[at + i]);
    }
    weight[k] = strength * e[k];
  }
  walk<true, true, true>(blocks + at * EDGE, blocks_bar + at * EDGE, inside, d, weight, md, sums);
  real total = 0;
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int i = k * LANES + lane;
    if (EDGE % LANES == 0 || i < EDGE) total -= e[k] * md[k];
    if (inside && (EDGE % LANES == 0 || i < EDGE)) {
      const real was = before ? (real)widen(before[i]) : (real)0, own = widen(s[at + i]);
      const real mixed = (real)widen(x[at + i]) - strength * md[k];
      lam_bar[at + i] = narrow(GATED ? own * was : own * (was - mixed));
      if (GATED) gate_bar[at + i] = narrow(own * mixed);
      x_bar[at + i] = narrow(e[k] - sums[k]);
      if (t == 0) initial_bar[n / steps * dim + block % count * EDGE + i] = narrow((real)widen(lam[at + i]) * own);
    }
  }
#pragma unroll
  for (int reach = LANES / 2; reach > 0; reach /= 2) total += __shfl_xor_sync(0xffffffffu, total, reach);
  if (inside && lane == 0) alpha_bar[block] = narrow(total);
}

// z (rows, D): what every step adds to the scan, g (x - alpha M (x - h)), or hbar + alpha M^T (g s)
extern "C" __global__ void __launch_bounds__(128)
mix_monarch(In blocks, In alpha, In lam, In gate, In source, In h, real* __restrict__ z, int count, i64 rows) {
  const int lane = threadIdx.x % LANES;
  const i64 all = rows * count;
  const bool inside = mine() < all;
  const i64 block = inside ? mine() : all - 1, at = block * EDGE;
  const real strength = widen(alpha[block]);
  real v[OWN], mixed[OWN], x[OWN], g[OWN];
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int i = k * LANES + lane;
    v[k] = mixed[k] = x[k] = g[k] = 0;
    if (EDGE % LANES == 0 || i < EDGE) {
      const real given = widen((GATED ? gate : lam)[at + i]);
      g[k] = GATED ? given : 1 - given;
      x[k] = widen(source[at + i]);
      v[k] = ADJOINT ? strength * (g[k] * (real)widen(h[at + i])) : x[k] - (real)widen(h[at + i]);
    }
  }
  walk<!ADJOINT, ADJOINT, false>(blocks + at * EDGE, (store*)0, inside, v, v, mixed, mixed);
#pragma unroll
  for (int k = 0; k < OWN; ++k) {
    const int i = k * LANES + lane;
    if (inside && (EDGE % LANES == 0 || i < EDGE))
      z[at + i] = ADJOINT ? x[k] + mixed[k] : g[k] * (x[k] - strength * mixed[k]);
  }
}
