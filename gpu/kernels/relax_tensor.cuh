// K1 V K2^T of one step by one warp, on tensor cores, in the precision of float; for d1, d2 up to 32, known when
// compiled.
//
// A float is the sum of two numbers of eleven bits, and a product of floats is three products of those, summed in
// float; what is left out is 2^-22 of it. Where parameters are stored in half precision they are one such number, and
// two products do.
//
// The parameters stay in registers, in the order of the instruction's operands. Tiles are 16 x 8 (x 8); the sums over l
// and j below may go in any order and columns may be dealt to tiles in any order, and these are chosen so that
//     the result of K1 V is in the registers where the second product wants it,
//     rows and columns are read from shared memory and written there 16 bytes at a time, without bank conflicts.
// With g = lane / 4, t = lane % 4:
//     K1[i, l], (row, column) of tile (m, k):  l = 8 k + 2 t for columns t, 8 k + 2 t + 1 for columns t + 4
//     columns of V, of K1 V and of the result, tile n of N:  column c of the tile is N c + n
//
// Macros: STORE, D1, D2.
#pragma once
#include "tensor.cuh"

__host__ __device__ constexpr int over(int n, int by) { return (n + by - 1) / by; }

// Tiles: M of rows, N of columns, K of the sum in the first product (the second one's are N)
constexpr int TILES_M = over(D1, 16), TILES_N = over(D2, 8), TILES_K = over(D1, 8);
// A row in shared memory, and the rows that are read of it: what is beyond D1 and D2 must be zero
constexpr int ROW = 8 * TILES_N + 4, ROWS = 8 * TILES_K, STEP = ROWS * ROW;

// Columns of a row that a thread can read at once, one for each tile
constexpr int TOGETHER = TILES_N == 4 ? 4 : TILES_N == 2 ? 2 : 1;

constexpr bool EXACT = sizeof(store) == 2;  // parameters have no second half

// Of a parameter; what is fed to `multiply` as it is loses its lower bits there.
__device__ __forceinline__ u32 rest(float v) {
  return __float_as_uint(v - __uint_as_float(__float_as_uint(v) & 0xffffe000u));
}

// Zero, which the compiler does not know.
__device__ __forceinline__ u32 nothing() {
#ifndef SIMT
  u32 zero;
  asm volatile("mov.u32 %0, %%tid.y;" : "=r"(zero));
  return zero;
#else
  return 0;
#endif
}

// The parameters of one step, in the registers of one warp
struct Factors {
  float left[TILES_M][TILES_K][4], right[TILES_N][TILES_N][2];

  // K1, K2, or their transposes. Returns whether all are finite.
  template <bool TRANSPOSED> __device__ __forceinline__ bool load(const store* k1, const store* k2) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
      for (int k = 0; k < TILES_K; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 16 * m + g + 8 * half, l = 8 * k + 2 * t;
          if (!TRANSPOSED && D1 % 8 == 0) {
            const bool inside = D1 % 16 == 0 || i < D1;
            const Pack<store, 2> two = *(const Pack<store, 2>*)(k1 + (inside ? i * D1 + l : 0));
#pragma unroll
            for (int r = 0; r < 2; ++r) left[m][k][half + 2 * r] = inside ? widen(two.v[r]) : 0.0f;
          } else {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const bool inside = (D1 % 16 == 0 || i < D1) && (D1 % 8 == 0 || l + r < D1);
              left[m][k][half + 2 * r] = inside ? widen(TRANSPOSED ? k1[(l + r) * D1 + i] : k1[i * D1 + l + r]) : 0.0f;
            }
          }
        }
#pragma unroll
    for (int n = 0; n < TILES_N; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // for transposes `n` is the tile that is summed over, else the column's; what varies in a row is the other
        const int j = TILES_N * (2 * t + r), c = TILES_N * g;
        if (D2 % 8 == 0 && TOGETHER == TILES_N) {
          typedef Pack<store, TOGETHER> row;
          const row four = *(const row*)(TRANSPOSED ? k2 + (j + n) * D2 + c : k2 + (c + n) * D2 + j);
#pragma unroll
          for (int k = 0; k < TILES_N; ++k)
            right[TRANSPOSED ? n : k][TRANSPOSED ? k : n][r] = widen(four.v[k % TOGETHER]);
        } else {
#pragma unroll
          for (int k = 0; k < TILES_N; ++k) {
            const bool inside = D2 % 8 == 0 || (j + k < D2 && c + n < D2);
            right[k][n][r] = inside ? widen(TRANSPOSED ? k2[(j + k) * D2 + c + n] : k2[(c + n) * D2 + j + k]) : 0.0f;
          }
        }
      }
    // What one load brings lies in registers in a row, in another order than an instruction's operands: copied here, once,
    // to numbers that the compiler takes for others. Left to it, they are copied for every product, which is a third of
    // all instructions.
    const u32 zero = nothing();
    float spoilt = 0;
    auto settle = [&](float& v) {
      spoilt = fmaf(v, 0.0f, spoilt);
      v = __uint_as_float(__float_as_uint(v) | zero);
    };
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
      for (int k = 0; k < TILES_K; ++k)
#pragma unroll
        for (int r = 0; r < 4; ++r) settle(left[m][k][r]);
#pragma unroll
    for (int k = 0; k < TILES_N; ++k)
#pragma unroll
      for (int n = 0; n < TILES_N; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) settle(right[k][n][r]);
    return spoilt == 0;
  }

  // v <- K1 V K2^T in shared memory, rows of ROW numbers
  __device__ __forceinline__ void apply(float* v) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float middle[TILES_M][TILES_N][4] = {};
#pragma unroll
    for (int k = 0; k < TILES_K; ++k) {
      float rows[2][TILES_N];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* row = v + (8 * k + 2 * t + r) * ROW + TILES_N * g;
        if (TOGETHER == TILES_N) {
          const Pack<float, TOGETHER> some = *(const Pack<float, TOGETHER>*)row;
#pragma unroll
          for (int n = 0; n < TILES_N; ++n) rows[r][n] = some.v[n % TOGETHER];
        } else {
#pragma unroll
          for (int n = 0; n < TILES_N; ++n) rows[r][n] = row[n];
        }
      }
      u32 high[TILES_N][2], low[TILES_N][2];
#pragma unroll
      for (int n = 0; n < TILES_N; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) split(rows[r][n], high[n][r], low[n][r]);
#pragma unroll
      for (int m = 0; m < TILES_M; ++m) {
        u32 whole[4], part[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          whole[r] = __float_as_uint(left[m][k][r]);
          part[r] = rest(left[m][k][r]);
        }
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
          if (!EXACT) multiply(middle[m][n], part, high[n]);
          multiply(middle[m][n], whole, low[n]);
        }
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) multiply(middle[m][n], whole, high[n]);
      }
    }
    float result[TILES_M][TILES_N][4] = {};
#pragma unroll
    for (int k = 0; k < TILES_N; ++k) {
      u32 high[TILES_M][4], low[TILES_M][4];
#pragma unroll
      for (int m = 0; m < TILES_M; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r)  // rows g and g + 8 of column t, then of column t + 4
          split(middle[m][k][r % 2 * 2 + r / 2], high[m][r], low[m][r]);
#pragma unroll
      for (int n = 0; n < TILES_N; ++n) {
        u32 whole[2], part[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          whole[r] = __float_as_uint(right[k][n][r]);
          part[r] = rest(right[k][n][r]);
        }
#pragma unroll
        for (int m = 0; m < TILES_M; ++m) {
          if (!EXACT) multiply(result[m][n], high[m], part);
          multiply(result[m][n], low[m], whole);
          multiply(result[m][n], high[m], whole);
        }
      }
    }
    __syncwarp();  // everybody has read
#pragma unroll
    for (int m = 0; m < TILES_M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + g + 8 * half;
        if (D1 % 16 == 0 || row < D1) {
          float* to = v + row * ROW + TILES_N * 2 * t;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            if (TILES_N == 4) {
              Pack<float, 4> four;
#pragma unroll
              for (int n = 0; n < TILES_N; ++n) four.v[n % 4] = result[m][n][2 * half + c];
              *(Pack<float, 4>*)(to + 4 * c) = four;
            } else {
#pragma unroll
              for (int n = 0; n < TILES_N; ++n) to[TILES_N * c + n] = result[m][n][2 * half + c];
            }
          }
        }
      }
  }
};
