// Channel mixing by a Kronecker product, Q = I - K1 (x) K2; sections 2 and 6 of docs/mathematics.md. A vector of
// D = D1 D2 channels is a matrix X, row by row, and
//
//   y = Q x                   Y = X - K1 (X K2^T)
//   TRANSPOSED: y = Q^T x     Y = X - K1^T (X K2)
//   cotangents of y = Q x, with E = Y_bar:    K1_bar = -(E K2) X^T,   K2_bar = -E^T (K1 X)
//
// Tile: one step by a GROUP of threads, a warp or the whole block. The step's matrices are in shared memory, in `real`,
// filled up with zeros to multiples of TALL; a product is done in tiles of TALL x 4 elements a thread. Rows are skewed
// so that the lanes that read neighbouring rows at once do so from different banks. Of the two products of an
// application the one with rows against rows comes first: its result goes to shared memory, so that the other one,
// which goes to global memory, has neighbouring columns in a thread.
//
// Traffic: K1, K2 and X (and E) read once, Y or the cotangents written once.
#include "common.cuh"

constexpr int WIDE = 4;
constexpr int VEC = 16 / (int)sizeof(real);              // elements of a 16-byte access of shared memory
__device__ constexpr int padded(int n) { return (n + TALL - 1) / TALL * TALL; }
// An odd number of 16-byte accesses.
__device__ constexpr int stride(int n) { return padded(n) / VEC % 2 ? padded(n) : padded(n) + VEC; }

constexpr int P1 = padded(D1), P2 = padded(D2), S1 = stride(D1), S2 = stride(D2);
constexpr int SQUARE1 = P1 * S1, SQUARE2 = P2 * S2, FLAT = P1 * S2;

typedef Pack<store, EACH> access;
typedef Pack<real, VEC> quad;

__device__ __forceinline__ int self() { return (int)threadIdx.x % GROUP; }

__device__ __forceinline__ void barrier() {
  if constexpr (GROUP == 32) __syncwarp(); else __syncthreads();
}

// A matrix of ROWS x COLUMNS from global to shared memory, with the zeros around it.
template <int ROWS, int COLUMNS> __device__ __forceinline__ void fetch(real* to, const store* from) {
  constexpr int STRIDE = stride(COLUMNS), PER_ROW = COLUMNS / EACH, ALL = ROWS * PER_ROW;
#ifndef SIMT
  if constexpr (sizeof(store) == sizeof(real) && EACH * sizeof(store) == 16) {
    for (int i = self(); i < ALL; i += GROUP) {
      const u32 at = (u32)__cvta_generic_to_shared(to + i / PER_ROW * STRIDE + i % PER_ROW * EACH);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from + i * EACH) : "memory");
    }
  } else
#endif
  {
#pragma unroll 4
    for (int i = self(); i < ALL; i += GROUP) {
      const access got = *(const access*)(from + i * EACH);
      real* row = to + i / PER_ROW * STRIDE + i % PER_ROW * EACH;
      if constexpr (EACH % VEC == 0) {
#pragma unroll
        for (int n = 0; n < EACH / VEC; ++n) {
          quad q;
#pragma unroll
          for (int e = 0; e < VEC; ++e) q.v[e] = widen(got.v[n * VEC + e]);
          *(quad*)(row + n * VEC) = q;
        }
      } else {
#pragma unroll
        for (int e = 0; e < EACH; ++e) row[e] = widen(got.v[e]);
      }
    }
  }
  constexpr int MORE = padded(COLUMNS) - COLUMNS, BELOW = padded(ROWS) - ROWS;
  if constexpr (MORE > 0)
    for (int i = self(); i < ROWS * MORE; i += GROUP) to[i / MORE * STRIDE + COLUMNS + i % MORE] = 0;
  if constexpr (BELOW > 0)
    for (int i = self(); i < BELOW * padded(COLUMNS); i += GROUP)
      to[(ROWS + i / padded(COLUMNS)) * STRIDE + i % padded(COLUMNS)] = 0;
}

__device__ __forceinline__ void arrived() {
#ifndef SIMT
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
#endif
  barrier();
}

// N neighbouring elements of shared memory.
template <int N> __device__ __forceinline__ void take(real (&v)[N], const real* from) {
#pragma unroll
  for (int n = 0; n < N / VEC; ++n) {
    const quad q = *(const quad*)(from + n * VEC);
#pragma unroll
    for (int e = 0; e < VEC; ++e) v[n * VEC + e] = q.v[e];
  }
}

// How an operand of a product lies in memory: with the summed index along its rows, or down its columns.
enum Along { ROWS, COLUMNS };

// The tiles of C = A B, of I x J elements, K summed up. A is C's rows, B its columns: A[i][k] or A[k][i], B[j][k] or
// B[k][j]. `done(i0, columns, c)` takes a tile: rows from i0 on, and columns[n] the number of its n-th column. Where B
// lies along rows, a thread's columns are far apart, so that neighbouring lanes have neighbouring ones.
template <int I, int J, int K, Along A, Along B, class Done>
__device__ __forceinline__ void product(const real* a, int as, const real* b, int bs, Done done) {
  constexpr int TI = padded(I) / TALL, TJ = padded(J) / WIDE;
  for (int tile = self(); tile < TI * TJ; tile += GROUP) {
    const int i0 = tile / TJ * TALL;
    int columns[WIDE];
#pragma unroll
    for (int n = 0; n < WIDE; ++n) columns[n] = B == ROWS ? tile % TJ + n * TJ : tile % TJ * WIDE + n;
    real c[TALL][WIDE];
#pragma unroll
    for (int m = 0; m < TALL; ++m)
#pragma unroll
      for (int n = 0; n < WIDE; ++n) c[m][n] = 0;
#pragma unroll 2
    for (int k0 = 0; k0 < padded(K); k0 += VEC) {
      real left[VEC][TALL], right[VEC][WIDE];
      if constexpr (A == ROWS) {
#pragma unroll
        for (int m = 0; m < TALL; ++m) {
          real v[VEC];
          take(v, a + (i0 + m) * as + k0);
#pragma unroll
          for (int k = 0; k < VEC; ++k) left[k][m] = v[k];
        }
      } else {
#pragma unroll
        for (int k = 0; k < VEC; ++k) take(left[k], a + (k0 + k) * as + i0);
      }
      if constexpr (B == ROWS) {
#pragma unroll
        for (int n = 0; n < WIDE; ++n) {
          real v[VEC];
          take(v, b + columns[n] * bs + k0);
#pragma unroll
          for (int k = 0; k < VEC; ++k) right[k][n] = v[k];
        }
      } else {
#pragma unroll
        for (int k = 0; k < VEC; ++k) take(right[k], b + (k0 + k) * bs + columns[0]);
      }
#pragma unroll
      for (int k = 0; k < VEC; ++k)
#pragma unroll
        for (int m = 0; m < TALL; ++m)
#pragma unroll
          for (int n = 0; n < WIDE; ++n) c[m][n] += left[k][m] * right[k][n];
    }
    done(i0, columns, c);
  }
}

// A product whose result goes to shared memory.
template <int I, int J, int K, Along A, Along B>
__device__ __forceinline__ void hold(real* to, const real* a, int as, const real* b, int bs) {
  product<I, J, K, A, B>(a, as, b, bs, [&](int i0, const int (&columns)[WIDE], const real (&c)[TALL][WIDE]) {
#pragma unroll
    for (int m = 0; m < TALL; ++m)
      if constexpr (B == ROWS) {
#pragma unroll
        for (int n = 0; n < WIDE; ++n) to[(i0 + m) * stride(J) + columns[n]] = c[m][n];
      } else {
#pragma unroll
        for (int n = 0; n < WIDE / VEC; ++n) {
          quad q;
#pragma unroll
          for (int e = 0; e < VEC; ++e) q.v[e] = c[m][n * VEC + e];
          *(quad*)(to + (i0 + m) * stride(J) + columns[0] + n * VEC) = q;
        }
      }
  });
}

// A product that goes to global memory, as `plus` minus it, or negated where `plus` is null.
template <int I, int J, int K, Along A, Along B>
__device__ __forceinline__ void release(store* to, const real* plus, const real* a, int as, const real* b, int bs) {
  constexpr bool NEIGHBOURS = B == COLUMNS && J % WIDE == 0 && EACH > 1;  // four elements that may be written at once
  product<I, J, K, A, B>(a, as, b, bs, [&](int i0, const int (&columns)[WIDE], const real (&c)[TALL][WIDE]) {
#pragma unroll
    for (int m = 0; m < TALL; ++m) {
      if (i0 + m >= I) continue;
      real v[WIDE];
#pragma unroll
      for (int n = 0; n < WIDE; ++n)
        v[n] = (plus != nullptr ? plus[(i0 + m) * stride(J) + columns[n]] : (real)0) - c[m][n];
      if constexpr (NEIGHBOURS) {
        constexpr int N = EACH < WIDE ? EACH : WIDE;
        if (columns[0] < J) {
#pragma unroll
          for (int n = 0; n < WIDE; n += N) {
            Pack<store, N> out;
#pragma unroll
            for (int e = 0; e < N; ++e) out.v[e] = narrow(v[n + e]);
            *(Pack<store, N>*)(to + (i0 + m) * J + columns[n]) = out;
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < WIDE; ++n)
          if (columns[n] < J) to[(i0 + m) * J + columns[n]] = narrow(v[n]);
      }
    }
  });
}

#define APPLY_SIZE (SQUARE1 + SQUARE2 + 2 * FLAT)
#define COTANGENT_SIZE (SQUARE1 + SQUARE2 + 4 * FLAT)

// k1 (steps, D1, D1), k2 (steps, D2, D2), x and y (steps, D1 D2)
extern "C" __global__ void __launch_bounds__(THREADS)
kronecker_apply(const store* __restrict__ k1, const store* __restrict__ k2, const store* __restrict__ x,
                store* __restrict__ y, i64 steps) {
  SHARED(memory);
  const int group = threadIdx.x / GROUP;
  const i64 t = (i64)blockIdx.x * (THREADS / GROUP) + group;
  if (t >= steps) return;  // a whole warp; a group that is a block has a step
  real* left = (real*)memory + group * APPLY_SIZE;
  real *right = left + SQUARE1, *seen = right + SQUARE2, *mixed = seen + FLAT;
  fetch<D1, D2>(seen, x + t * D1 * D2);
  fetch<D2, D2>(right, k2 + t * D2 * D2);
  fetch<D1, D1>(left, k1 + t * D1 * D1);
  arrived();
  hold<D1, D2, D2, ROWS, TRANSPOSED ? COLUMNS : ROWS>(mixed, seen, S2, right, S2);
  barrier();
  release<D1, D2, D1, TRANSPOSED ? COLUMNS : ROWS, COLUMNS>(y + t * D1 * D2, seen, left, S1, mixed, S2);
}

extern "C" __global__ void __launch_bounds__(THREADS)
kronecker_cotangent(const store* __restrict__ k1, const store* __restrict__ k2, const store* __restrict__ x,
                    const store* __restrict__ ybar, store* __restrict__ k1_bar, store* __restrict__ k2_bar, i64 steps) {
  SHARED(memory);
  const int group = threadIdx.x / GROUP;
  const i64 t = (i64)blockIdx.x * (THREADS / GROUP) + group;
  if (t >= steps) return;
  real* left = (real*)memory + group * COTANGENT_SIZE;
  real *right = left + SQUARE1, *seen = right + SQUARE2, *bar = seen + FLAT, *back = bar + FLAT, *mixed = back + FLAT;
  fetch<D1, D2>(bar, ybar + t * D1 * D2);
  fetch<D2, D2>(right, k2 + t * D2 * D2);
  fetch<D1, D1>(left, k1 + t * D1 * D1);
  fetch<D1, D2>(seen, x + t * D1 * D2);
  arrived();
  hold<D1, D2, D2, ROWS, COLUMNS>(back, bar, S2, right, S2);
  hold<D1, D2, D1, ROWS, COLUMNS>(mixed, left, S1, seen, S2);
  barrier();
  release<D1, D1, D2, ROWS, ROWS>(k1_bar + t * D1 * D1, nullptr, back, S2, seen, S2);
  release<D2, D2, D1, COLUMNS, COLUMNS>(k2_bar + t * D2 * D2, nullptr, bar, S2, mixed, S2);
}
