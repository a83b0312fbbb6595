// Q x at an iterate, and the cotangents of all inputs of (F) at its solution, for Q = I - K1 (x) K2 with d1, d2 up to
// 32.
//
// With D = X - H and E = G S as d1 x d2 matrices, m = X - K1 D K2^T:
//     lam_bar_t = s_t (h_{t-1} - m_t), or s_t h_{t-1} with a gate, and gate_bar = s m;  initial_bar = lam_1 s_1
//     X_bar = E - (K1^T E) K2,   K1_bar = -(E K2) D^T,   K2_bar = -(E^T K1) D
//
// Section 6 of docs/mathematics.md. One warp per step, products on tensor cores in the precision of float, as in
// relax_tensor.cuh: two of them in a row, the first one's result stays in registers. Eight products, not the six that
// would do, so that none of them is needed in another order than it was made in.
//
// Memory traffic: everything read once and written once (h, s and x come from the caches the second time).
//
// Macros: STORE (float, f16, bf16); D1, D2; ADJOINT (mix_kronecker only), GATED 0 or 1.
#include "common.cuh"
#include "relax_tensor.cuh"

#ifndef ADJOINT
#define ADJOINT 0
#endif
#ifndef GATED
#define GATED 0
#endif

// No two of them are the same memory, where one is written
typedef const store* __restrict__ In;
typedef store* __restrict__ Out;

constexpr int D = D1 * D2;
// Matrices in shared memory have whole tiles in both directions, zero beyond the edge; a row is four longer, against
// bank conflicts.
constexpr int TALL = 16 * over(D1, 16), BROAD = 16 * over(D2, 16);
constexpr int LONG1 = TALL + 4, LONG2 = BROAD + 4;
constexpr int SPACE = 2 * TALL * LONG2 + TALL * LONG1 + BROAD * LONG2;

// A matrix in shared memory, or its transpose
template <int ROW_LENGTH, bool TRANSPOSED> struct View {
  const float* data;
  __device__ __forceinline__ float at(int i, int j) const {
    return TRANSPOSED ? data[j * ROW_LENGTH + i] : data[i * ROW_LENGTH + j];
  }
};

// out += A B with A given tile by tile: left(m, k, values). Column l of a tile's sum is 2 t and 2 t + 1 for the
// operand's columns t and t + 4.
template <int M, int N, int K, bool EXACT_LEFT, bool EXACT_RIGHT, class Left, class Right>
__device__ __forceinline__ void accumulate(float (&out)[M][N][4], const Left& left, const Right& right) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    u32 high[M][4], low[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float values[4];
      left(m, k, values);
#pragma unroll
      for (int r = 0; r < 4; ++r) split(values[r], high[m][r], low[m][r]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      u32 whole[2], part[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) split(right.at(8 * k + 2 * t + r, 8 * n + g), whole[r], part[r]);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (!EXACT_RIGHT) multiply(out[m][n], high[m], part);
        if (!EXACT_LEFT) multiply(out[m][n], low[m], whole);
        multiply(out[m][n], high[m], whole);
      }
    }
  }
}

// put(i, j, (A B) C at i, j and at i, j + 1) for A (16 M, 8 K1), B (8 K1, 8 N), C (8 N, 8 P)
template <int M, int K, int N, int P, bool EXACT_A, bool EXACT_B, bool EXACT_C, class A, class B, class C, class Put>
__device__ __forceinline__ void chain(const A& a, const B& b, const C& c, const Put& put) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float middle[M][N][4] = {}, result[M][P][4] = {};
  accumulate<M, N, K, EXACT_A, EXACT_B>(
      middle,
      [&](int m, int k, float (&values)[4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) values[r] = a.at(16 * m + g + r % 2 * 8, 8 * k + 2 * t + r / 2);
      },
      b);
  accumulate<M, P, N, false, EXACT_C>(
      result,
      [&](int m, int k, float (&values)[4]) {
#pragma unroll
        for (int r = 0; r < 4; ++r) values[r] = middle[m][k][r % 2 * 2 + r / 2];
      },
      c);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int p = 0; p < P; ++p) put(16 * m + g + 8 * half, 8 * p + 2 * t, &result[m][p][2 * half]);
}

// Neighbouring elements, two at a time where rows allow it
template <int COLUMNS> __device__ __forceinline__ void put_two(store* row, int j, float a, float b) {
  if (COLUMNS % 2 == 0) {
    if (j < COLUMNS) {
      Pack<store, 2> two;
      two.v[0] = narrow(a);
      two.v[1] = narrow(b);
      *(Pack<store, 2>*)(row + j) = two;
    }
  } else {
    if (j < COLUMNS) row[j] = narrow(a);
    if (j + 1 < COLUMNS) row[j + 1] = narrow(b);
  }
}

template <int COLUMNS> __device__ __forceinline__ void get_two(const store* row, int j, float* v) {
  v[0] = v[1] = 0;
  if (COLUMNS % 2 == 0) {
    if (j < COLUMNS) {
      const Pack<store, 2> two = *(const Pack<store, 2>*)(row + j);
      v[0] = widen(two.v[0]);
      v[1] = widen(two.v[1]);
    }
  } else {
    if (j < COLUMNS) v[0] = widen(row[j]);
    if (j + 1 < COLUMNS) v[1] = widen(row[j + 1]);
  }
}

// V numbers of a row at a time, of a whole step: take(i, j, where it is in an array of the step)
template <int ROWS_, int COLUMNS, int V, class Take> __device__ __forceinline__ void each(const Take& take) {
#pragma unroll 4
  for (int n = threadIdx.x % 32 * V; n < ROWS_ * COLUMNS; n += 32 * V) take(n / COLUMNS, n % COLUMNS, n);
}
constexpr int V1 = D1 % 4 == 0 ? 4 : 1, V2 = D2 % 4 == 0 ? 4 : 1;

// k1, k1_bar (B, T, D1, D1), k2, k2_bar (B, T, D2, D2); the rest (B, T, D), initial (B, D) or null. Shared memory:
// SPACE floats per warp.
extern "C" __global__ void __launch_bounds__(128, 3)
pull_kronecker(In k1, In k2, In lam, In gate, In x, In initial, In h, In s, Out lam_bar, Out gate_bar, Out x_bar,
               Out initial_bar, Out k1_bar, Out k2_bar, i64 rows, i64 steps) {
  SHARED(memory);
  float* d = (float*)memory + threadIdx.x / 32 * SPACE;
  float *e = d + TALL * LONG2, *left = e + TALL * LONG2, *right = left + TALL * LONG1;
  const i64 n = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (n >= rows) return;  // a whole warp; there is no barrier of the block
  const i64 at = n * D, t = n % steps;
  const store* before = t > 0 ? h + at - D : initial ? initial + n / steps * D : 0;
  if (D1 % 16 != 0 || D2 % 16 != 0) {
    for (int i = threadIdx.x % 32; i < SPACE; i += 32) d[i] = 0;
    __syncwarp();
  }
  typedef Pack<store, V1> stored1;
  typedef Pack<store, V2> stored2;
  each<D1, D1, V1>([&](int i, int j, int k) {
    const stored1 some = *(const stored1*)(k1 + n * (D1 * D1) + k);
#pragma unroll
    for (int v = 0; v < V1; ++v) left[i * LONG1 + j + v] = widen(some.v[v]);
  });
  each<D2, D2, V2>([&](int i, int j, int k) {
    const stored2 some = *(const stored2*)(k2 + n * (D2 * D2) + k);
#pragma unroll
    for (int v = 0; v < V2; ++v) right[i * LONG2 + j + v] = widen(some.v[v]);
  });
  each<D1, D2, V2>([&](int i, int j, int k) {
    const stored2 xs = *(const stored2*)(x + at + k), hs = *(const stored2*)(h + at + k);
    const stored2 ss = *(const stored2*)(s + at + k), gs = *(const stored2*)((GATED ? gate : lam) + at + k);
    stored2 decays = gs;
    if (GATED && t == 0) decays = *(const stored2*)(lam + at + k);
    stored2 out;
#pragma unroll
    for (int v = 0; v < V2; ++v) {
      const float g = GATED ? widen(gs.v[v]) : 1 - widen(gs.v[v]);
      d[i * LONG2 + j + v] = widen(xs.v[v]) - widen(hs.v[v]);
      e[i * LONG2 + j + v] = g * widen(ss.v[v]);
      out.v[v] = narrow(widen(decays.v[v]) * widen(ss.v[v]));
    }
    if (t == 0) *(stored2*)(initial_bar + n / steps * D + k) = out;
  });
  __syncwarp();
  const View<LONG1, false> K1 = {left};
  const View<LONG1, true> K1T = {left};
  const View<LONG2, false> K2 = {right}, DD = {d}, EE = {e};
  const View<LONG2, true> K2T = {right}, DT = {d}, ET = {e};
  constexpr int M1 = TALL / 16, M2 = BROAD / 16, N1 = over(D1, 8), N2 = over(D2, 8);
  chain<M1, N1, N2, N2, EXACT, false, EXACT>(K1, DD, K2T, [&](int i, int j, const float* mixed) {
    if (D1 % 16 == 0 || i < D1) {
      float xs[2], ss[2], hs[2] = {0, 0}, a[2], b[2];
      get_two<D2>(x + at + i * D2, j, xs);
      get_two<D2>(s + at + i * D2, j, ss);
      if (before) get_two<D2>(before + i * D2, j, hs);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float m = xs[k] - mixed[k];
        a[k] = GATED ? ss[k] * hs[k] : ss[k] * (hs[k] - m);
        b[k] = ss[k] * m;
      }
      put_two<D2>(lam_bar + at + i * D2, j, a[0], a[1]);
      if (GATED) put_two<D2>(gate_bar + at + i * D2, j, b[0], b[1]);
    }
  });
  __syncwarp();  // nothing is kept in registers from one to the next
  chain<M1, N1, N2, N2, EXACT, false, EXACT>(K1T, EE, K2, [&](int i, int j, const float* mixed) {
    if (D1 % 16 == 0 || i < D1) {
      const float* own = e + i * LONG2 + j;
      put_two<D2>(x_bar + at + i * D2, j, own[0] - mixed[0], own[1] - mixed[1]);
    }
  });
  __syncwarp();
  chain<M1, N2, N2, N1, false, EXACT, false>(EE, K2, DT, [&](int i, int j, const float* sum) {
    if (D1 % 16 == 0 || i < D1) put_two<D1>(k1_bar + n * (D1 * D1) + i * D1, j, -sum[0], -sum[1]);
  });
  __syncwarp();
  chain<M2, N1, N1, N2, false, EXACT, false>(ET, K1, DD, [&](int i, int j, const float* sum) {
    if (D2 % 16 == 0 || i < D2) put_two<D2>(k2_bar + n * (D2 * D2) + i * D2, j, -sum[0], -sum[1]);
  });
}

// z (rows, D): what every step adds to the scan, g (x - P (x - h)), or hbar + P^T (g s). Shared memory: STEP floats
// per warp.
extern "C" __global__ void __launch_bounds__(128, 3)
mix_kronecker(In k1, In k2, In lam, In gate, In source, In h, float* __restrict__ z, i64 rows) {
  SHARED(memory);
  float* v = (float*)memory + threadIdx.x / 32 * STEP;
  const i64 n = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, at = n * D;
  if (n >= rows) return;  // a whole warp; there is no barrier of the block
  typedef Pack<store, V2> stored;
  typedef Pack<float, V2> wide;
  Factors factors;
  factors.load<ADJOINT>(k1 + n * (D1 * D1), k2 + n * (D2 * D2));
  if (D1 % 8 != 0 || D2 % 8 != 0) {
    for (int i = threadIdx.x % 32; i < STEP; i += 32) v[i] = 0;
    __syncwarp();
  }
  each<D1, D2, V2>([&](int i, int j, int k) {
    const stored some = *(const stored*)(h + at + k);
    stored other = *(const stored*)((ADJOINT ? GATED ? gate : lam : source) + at + k);
#pragma unroll
    for (int e = 0; e < V2; ++e) {
      const float w = widen(other.v[e]);
      v[i * ROW + j + e] = ADJOINT ? (GATED ? w : 1 - w) * widen(some.v[e]) : w - widen(some.v[e]);
    }
  });
  __syncwarp();
  factors.apply(v);
  __syncwarp();
  each<D1, D2, V2>([&](int i, int j, int k) {
    const stored xs = *(const stored*)(source + at + k);
    stored gs = xs;
    if (!ADJOINT) gs = *(const stored*)((GATED ? gate : lam) + at + k);
    wide out;
#pragma unroll
    for (int e = 0; e < V2; ++e) {
      const float w = widen(gs.v[e]), mixed = v[i * ROW + j + e];
      out.v[e] = ADJOINT ? widen(xs.v[e]) + mixed : (GATED ? w : 1 - w) * (widen(xs.v[e]) - mixed);
    }
    *(wide*)(z + at + k) = out;
  });
}
