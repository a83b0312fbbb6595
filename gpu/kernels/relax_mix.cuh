// Channel mixing of one step by a group of threads, for any shape: P = I - Q of every kind, and its transpose.
//
// A group is a warp, or with WIDE the whole block. Macros: KIND (below), RANK of the low-rank kinds.
#pragma once
#include "common.cuh"

#define KRONECKER 0
#define MONARCH 1
#define DPLR 2
#define HOUSEHOLDER 3
#define LOW_RANK (KIND == DPLR || KIND == HOUSEHOLDER)

#ifndef KIND
#define KIND KRONECKER
#endif
#ifndef RANK
#define RANK 0
#endif
#ifndef WIDE
#define WIDE 0
#endif

// What a step's parameters are: first and second array of the kind, (B, T, ...) each.
//   KRONECKER    K1 (d1, d1), K2 (d2, d2)
//   MONARCH      M (d1, d2, d2), alpha (d1)
//   low rank     u (RANK, D), alpha (RANK)
struct Shape {
  int dim, d1, d2;
};

__device__ __forceinline__ i64 first_size(Shape s) {
#if KIND == KRONECKER
  return (i64)s.d1 * s.d1;
#elif KIND == MONARCH
  return (i64)s.d1 * s.d2 * s.d2;
#else
  return (i64)RANK * s.dim;
#endif
}

__device__ __forceinline__ i64 second_size(Shape s) {
#if KIND == KRONECKER
  return (i64)s.d2 * s.d2;
#elif KIND == MONARCH
  return s.d1;
#else
  return RANK;
#endif
}

// A thread's place in its group
__device__ __forceinline__ int place() { return WIDE ? threadIdx.x : threadIdx.x % 32; }
__device__ __forceinline__ int group_size() { return WIDE ? blockDim.x : 32; }
__device__ __forceinline__ int group() { return WIDE ? 0 : threadIdx.x / 32; }
__device__ __forceinline__ int groups() { return WIDE ? 1 : blockDim.x / 32; }
__device__ __forceinline__ void group_sync() {
#if WIDE
  __syncthreads();
#else
  __syncwarp();
#endif
}

// The bits of |v|, in the order of the magnitudes, NaN above infinity: a maximum of them is exact and keeps a NaN.
__device__ __forceinline__ u32 magnitude_bits(float v) { return __float_as_uint(v) & 0x7fffffffu; }
__device__ __forceinline__ u64 magnitude_bits(double v) { return (u64)__double_as_longlong(v) & 0x7fffffffffffffffull; }
__device__ __forceinline__ double from_magnitude(u32 v) { return (double)__uint_as_float(v); }
__device__ __forceinline__ double from_magnitude(u64 v) { return __longlong_as_double((i64)v); }
template <class T> struct BitsOf { typedef u32 type; };
template <> struct BitsOf<double> { typedef u64 type; };
typedef BitsOf<real>::type bits;

__device__ __forceinline__ bits most(bits a, bits b) { return a > b ? a : b; }

// Largest over the warp, in every thread.
__device__ __forceinline__ bits warp_largest(bits a) {
#ifndef SIMT
  if constexpr (sizeof(bits) == 4) {
    return __reduce_max_sync(0xffffffffu, (u32)a);
  } else
#endif
  {
#pragma unroll
    for (int reach = 16; reach > 0; reach /= 2) a = most(a, __shfl_xor_sync(0xffffffffu, a, reach));
    return a;
  }
}

// Largest over the block, in every thread; `room` holds one entry per warp. Ends with all threads past a barrier after
// which `room` may not be written before another one.
__device__ __forceinline__ void block_largest(bits& a, bits& b, bits* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  a = warp_largest(a);
  b = warp_largest(b);
  if (lane == 0) {
    room[2 * warp] = a;
    room[2 * warp + 1] = b;
  }
  __syncthreads();
  for (int w = 0; w < warps; ++w) {
    a = most(a, room[2 * w]);
    b = most(b, room[2 * w + 1]);
  }
}

// N sums over the group, in every thread. `room` holds N entries per warp where the group is the block.
template <int N> __device__ __forceinline__ void group_sums(real* sums, real* room) {
#pragma unroll
  for (int n = 0; n < N; ++n)
    for (int reach = 16; reach > 0; reach /= 2) sums[n] += __shfl_xor_sync(0xffffffffu, sums[n], reach);
#if WIDE
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();
  if (lane == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) room[warp * N + n] = sums[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    real total = 0;
    for (int w = 0; w < warps; ++w) total += room[w * N + n];
    sums[n] = total;
  }
#endif
}

// A matrix in memory, or its transpose: element (i, j) of the product's factor
template <bool TRANSPOSED, class T> struct Matrix {
  const T* data;
  int row;
  __device__ __forceinline__ real at(int i, int j) const {
    return (real)widen(TRANSPOSED ? data[(i64)j * row + i] : data[(i64)i * row + j]);
  }
};

// out = A B for A (rows, inner), B (inner, columns), in tiles of 4 x 4; put(i, j, sum) takes the result.
template <class A, class B, class Put>
__device__ __forceinline__ void product(const A& a, const B& b, int rows, int inner, int columns, const Put& put) {
  const int across = (columns + 3) / 4, tiles = (rows + 3) / 4 * across;
  for (int tile = place(); tile < tiles; tile += group_size()) {
    const int i = tile / across * 4, j = tile % across * 4;
    int is[4], js[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // beyond the edge: the last one again, not stored
      is[k] = min(i + k, rows - 1);
      js[k] = min(j + k, columns - 1);
    }
    real sum[4][4] = {};
    for (int l = 0; l < inner; ++l) {
      real left[4], right[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        left[k] = a.at(is[k], l);
        right[k] = b.at(l, js[k]);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p)
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[p][q] += left[p] * right[q];
    }
#pragma unroll
    for (int p = 0; p < 4; ++p)
#pragma unroll
      for (int q = 0; q < 4; ++q)
        if (i + p < rows && j + q < columns) put(i + p, j + q, sum[p][q]);
  }
}

// put(row, sum_j M[row, j] v[j]) for a block of a Monarch mixer: eight lanes to a row.
template <class Put>
__device__ __forceinline__ void rows_times(const store* m, const real* v, int size, int rows, const Put& put) {
  const int lane = threadIdx.x % 8;
  for (int start = 0; start < rows; start += group_size() / 8) {  // the same trips for all lanes of a warp
    const int row = start + place() / 8;
    const bool inside = row < rows;
    const store* mine = m + (i64)(inside ? row : 0) * size;
    const real* of = v + (inside ? row / size * size : 0);
    real sum = 0;
    for (int j = lane; j < size; j += 8) sum += widen(mine[j]) * of[j];
    for (int reach = 4; reach > 0; reach /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, reach);
    if (inside && lane == 0) put(row, sum);
  }
}

// Of more vectors than this, the inner products are not taken together.
#define MANY (RANK > 8)

// Number of sums over channels that a step of low rank needs: U d, and for a product of reflections U U^T below its
// diagonal
#define PAIRS (KIND == HOUSEHOLDER && !MANY ? RANK * (RANK - 1) / 2 : 0)
#define SUMS (MANY || RANK == 0 ? 1 : RANK + PAIRS)

__device__ __forceinline__ int pair(int a, int b) { return RANK + a * (a - 1) / 2 + b; }  // b < a

#if MANY

// u . v for one vector
__device__ __forceinline__ real inner(int dim, const store* u, const real* v, real* room) {
  real sum[1] = {0};
  for (int i = place(); i < dim; i += group_size()) sum[0] += (real)widen(u[i]) * v[i];
  group_sums<1>(sum, room);
  return sum[0];
}

// v <- v - weight u
__device__ __forceinline__ void take_away(int dim, const store* u, real weight, real* v) {
  for (int i = place(); i < dim; i += group_size()) v[i] -= weight * (real)widen(u[i]);
  group_sync();
}

#else

// weights y with P d = sum_a y_a u_a; section 2 of docs/mathematics.md
template <bool TRANSPOSED>
__device__ __forceinline__ void low_rank_weights(const store* alpha, const real* sums, real* y) {
#pragma unroll
  for (int n = 0; n < RANK; ++n) {
    const int a = TRANSPOSED ? RANK - 1 - n : n;
    real total = sums[a];
#if KIND == HOUSEHOLDER
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const int b = TRANSPOSED ? RANK - 1 - k : k;
      total -= sums[TRANSPOSED ? pair(b, a) : pair(a, b)] * y[b];
    }
#endif
    y[a] = (real)widen(alpha[a]) * total;
  }
}

#endif

// v <- P v, or P^T v, for one step. `spare`: D numbers of this group; for low rank SUMS per warp
// instead, or D + 1 per warp of MANY.
template <bool TRANSPOSED>
__device__ __forceinline__ void mix(Shape s, const store* first, const store* second, real* v, real* spare) {
  group_sync();
#if KIND == KRONECKER
  const Matrix<false, real> V = {v, s.d2}, W = {spare, s.d2};
  const Matrix<TRANSPOSED, store> left = {first, s.d1};
  const Matrix<!TRANSPOSED, store> right = {second, s.d2};
  product(left, V, s.d1, s.d1, s.d2, [&](int i, int j, real sum) { spare[i * s.d2 + j] = sum; });
  group_sync();
  product(W, right, s.d1, s.d2, s.d2, [&](int i, int j, real sum) { v[i * s.d2 + j] = sum; });
#elif KIND == MONARCH
  if (TRANSPOSED) {
    for (int i = place(); i < s.dim; i += group_size()) {
      const int block = i / s.d2, column = i % s.d2;
      const store* m = first + (i64)block * s.d2 * s.d2 + column;
      real sum = 0;
      for (int j = 0; j < s.d2; ++j) sum += (real)widen(m[(i64)j * s.d2]) * v[block * s.d2 + j];
      spare[i] = (real)widen(second[block]) * sum;
    }
  } else {
    rows_times(first, v, s.d2, s.dim, [&](int i, real sum) { spare[i] = (real)widen(second[i / s.d2]) * sum; });
  }
  group_sync();
  for (int i = place(); i < s.dim; i += group_size()) v[i] = spare[i];
#elif MANY
  for (int i = place(); i < s.dim; i += group_size()) spare[i] = v[i];
  group_sync();
  for (int n = 0; n < RANK; ++n) {
    const int a = TRANSPOSED ? RANK - 1 - n : n;
    const store* u = first + (i64)a * s.dim;
    const real dot = inner(s.dim, u, KIND == HOUSEHOLDER ? spare : v, spare + s.dim);
    take_away(s.dim, u, (real)widen(second[a]) * dot, spare);
  }
  for (int i = place(); i < s.dim; i += group_size()) v[i] -= spare[i];
#else
  real sums[SUMS] = {}, y[RANK > 0 ? RANK : 1];
  for (int i = place(); i < s.dim; i += group_size()) {
    const real d = v[i];
    real u[RANK > 0 ? RANK : 1];
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
      u[a] = widen(first[(i64)a * s.dim + i]);
      sums[a] += u[a] * d;
#if KIND == HOUSEHOLDER
#pragma unroll
      for (int b = 0; b < a; ++b) sums[pair(a, b)] += u[a] * u[b];
#endif
    }
  }
  group_sums<SUMS>(sums, spare);
  low_rank_weights<TRANSPOSED>(second, sums, y);
  for (int i = place(); i < s.dim; i += group_size()) {
    real mixed = 0;
#pragma unroll
    for (int a = 0; a < RANK; ++a) mixed += y[a] * (real)widen(first[(i64)a * s.dim + i]);
    v[i] = mixed;
  }
#endif
  group_sync();
}
