// What the kernels of FP-Mamba with a Kronecker mixer share: small products, from matrices in shared memory.
//
// A vector of EDGE1 EDGE2 channels is a matrix, row by row. All products are of rows with rows, c[i][j] = sum_k a[i][k] b[j][k],
// so that both are read 16 bytes at a time; what is summed down a column is written transposed beforehand. A warp takes 8 x 16
// elements, a lane of it 2 x 2, whose rows lie far apart: the lanes that read neighbouring rows at once do so from different
// banks, for a row is an odd number of 16-byte pieces long. Around a matrix there are zeros.
//
// Macros: those of mamba.cuh, and EDGE1, EDGE2.
#pragma once
#include "mamba.cuh"

constexpr int PIECE = 16 / (int)sizeof(real);
typedef Pack<real, PIECE> piece_of_row;

__device__ constexpr int up(int n, int to) { return (n + to - 1) / to * to; }
__device__ constexpr int rows_of(int edge) { return up(edge, 16); }
__device__ constexpr int pitch(int edge) { return up(edge, 16) + PIECE; }
// Numbers of shared memory of a matrix.
__device__ constexpr int matrix(int rows, int columns) { return rows_of(rows) * pitch(columns); }
// Of an upper triangle.
__device__ constexpr int triangle(int edge) { return edge * (edge + 1) / 2; }

template <int I, int J> struct Tiles {
  static constexpr int DOWN = (I + 7) / 8, ACROSS = (J + 15) / 16, COUNT = DOWN * ACROSS;
};
struct Tile { int i[2], j[2]; };
template <int I, int J> __device__ __forceinline__ Tile tile_of(int number) {
  typedef Tiles<I, J> All;
  const int lane = threadIdx.x % 32, i = number / All::ACROSS * 4 + lane / 8, j = number % All::ACROSS * 8 + lane % 8;
  return {{i, i + 4 * All::DOWN}, {j, j + 8 * All::ACROSS}};
}

// c[m][n] is the sum of a[i_m][k] b[j_n][k] over k < K.
template <int K> __device__ __forceinline__ void dots(const real* a, int as, const real* b, int bs, const Tile& at, real (&c)[2][2]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n) c[m][n] = 0;
#pragma unroll 4
  for (int k = 0; k < up(K, PIECE); k += PIECE) {
    piece_of_row left[2], right[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      left[m] = *(const piece_of_row*)(a + at.i[m] * as + k);
      right[m] = *(const piece_of_row*)(b + at.j[m] * bs + k);
    }
#pragma unroll
    for (int e = 0; e < PIECE; ++e)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n) c[m][n] += left[m].v[e] * right[n].v[e];
  }
}
// The same where one side is in registers: c[m][n] is the sum of own[m][k] b[at_n][k], or with TURNED of own[n][k] b[at_m][k].
template <int K, bool TURNED>
__device__ __forceinline__ void dots_with(const real (&own)[2][up(K, PIECE)], const real* b, int bs, const int (&at)[2], real (&c)[2][2]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n) c[m][n] = 0;
#pragma unroll
  for (int k = 0; k < up(K, PIECE); k += PIECE) {
    piece_of_row other[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) other[m] = *(const piece_of_row*)(b + at[m] * bs + k);
#pragma unroll
    for (int e = 0; e < PIECE; ++e)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n)
          c[m][n] += TURNED ? other[m].v[e] * own[n][k + e] : own[m][k + e] * other[n].v[e];
  }
}
template <int K>
__device__ __forceinline__ void rows_held(real (&own)[2][up(K, PIECE)], const real* a, int as, const int (&at)[2]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int k = 0; k < up(K, PIECE); k += PIECE) {
      const piece_of_row some = *(const piece_of_row*)(a + at[m] * as + k);
#pragma unroll
      for (int e = 0; e < PIECE; ++e) own[m][k + e] = some.v[e];
    }
}

// All elements of a product by so many warps: `done(i, j, c)`, beyond the edges as well, where it is zero.
template <int I, int J, int K, int WARPS, class Done>
__device__ __forceinline__ void multiply(const real* a, int as, const real* b, int bs, Done done) {
#pragma unroll 1
  for (int number = threadIdx.x / 32; number < Tiles<I, J>::COUNT; number += WARPS) {
    const Tile at = tile_of<I, J>(number);
    real c[2][2];
    dots<K>(a, as, b, bs, at, c);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n) done(at.i[m], at.j[n], c[m][n]);
  }
}

// --- the kernels that have a block for a sequence: THREADS of EDGE1 x EDGE2 channels ---------------------------------

constexpr int D = EDGE1 * EDGE2, WARPS = THREADS / 32;
constexpr int S1 = pitch(EDGE1), S2 = pitch(EDGE2);
constexpr int COUNT = Tiles<EDGE1, EDGE2>::COUNT, TILES = (COUNT + WARPS - 1) / WARPS, OWNED = 4 * TILES;
// Numbers of both factors, one after the other.
constexpr int FACTORS = EDGE1 * EDGE1 + EDGE2 * EDGE2;

// Whether the n-th tile of this warp is one.
__device__ __forceinline__ bool is_tile(int n) { return COUNT % WARPS == 0 || n * WARPS + (int)threadIdx.x / 32 < COUNT; }
__device__ __forceinline__ Tile own_tile(int n) { return tile_of<EDGE1, EDGE2>(n * WARPS + threadIdx.x / 32); }

__device__ __forceinline__ bool inside(int i, int j) {
  return (EDGE1 % 8 == 0 || i < EDGE1) && (EDGE2 % 16 == 0 || j < EDGE2);
}
// A thread's channels: `each(c, i, j)`, c counts them.
template <class Each> __device__ __forceinline__ void own(Each each) {
#pragma unroll
  for (int n = 0; n < TILES; ++n)
    if (is_tile(n)) {
      const Tile at = own_tile(n);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int l = 0; l < 2; ++l)
          if (inside(at.i[m], at.j[l])) each(n * 4 + m * 2 + l, at.i[m], at.j[l]);
    }
}

// What a thread keeps of the factors in registers from one application to the next: WHICH is 0, or 1: of the second, 3: of both.
template <int WHICH> struct Held {
  real first[WHICH & 2 ? 2 : 1][WHICH & 2 ? up(EDGE1, PIECE) : 1], second[WHICH & 1 ? 2 : 1][WHICH & 1 ? up(EDGE2, PIECE) : 1];

  __device__ __forceinline__ void take(const real* k1, const real* k2) {
    static_assert(WHICH == 0 || TILES == 1, "one tile");
    const Tile at = own_tile(0);
    if constexpr (WHICH & 2) rows_held<EDGE1>(first, k1, S1, at.i);
    if constexpr (WHICH & 1) rows_held<EDGE2>(second, k2, S2, at.j);
  }
};

// K1 X K2^T at a thread's channels; X lies in `from` (pitch S2), and `between` (EDGE2 rows, pitch S1) is for X K2^T, transposed,
// which `seen(i, j, c)` is told as well. One barrier in the middle; X must be there, and nobody at `between`.
template <int WHICH, class Seen>
__device__ __forceinline__ void apply(const Held<WHICH>& held, const real* k1, const real* k2, const real* from, real* between,
                                      real (&out)[OWNED], Seen seen) {
#pragma unroll
  for (int n = 0; n < TILES; ++n)
    if (is_tile(n)) {
      const Tile at = own_tile(n);
      real c[2][2];
      if constexpr (WHICH & 1)
        dots_with<EDGE2, true>(held.second, from, S2, at.i, c);
      else
        dots<EDGE2>(from, S2, k2, S2, at, c);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int l = 0; l < 2; ++l)
          if (inside(at.i[m], at.j[l])) {  // the zeros around stay, whatever a sequence brings
            between[at.j[l] * S1 + at.i[m]] = c[m][l];
            seen(at.i[m], at.j[l], c[m][l]);
          }
    }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < TILES; ++n)
    if (is_tile(n)) {
      const Tile at = own_tile(n);
      real c[2][2];
      if constexpr (WHICH & 2)
        dots_with<EDGE1, false>(held.first, between, S1, at.j, c);
      else
        dots<EDGE1>(k1, S1, between, S1, at, c);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int l = 0; l < 2; ++l) out[n * 4 + m * 2 + l] = c[m][l];
    }
}
template <int WHICH>
__device__ __forceinline__ void apply(const Held<WHICH>& held, const real* k1, const real* k2, const real* from, real* between,
                                      real (&out)[OWNED]) {
  apply(held, k1, k2, from, between, out, [](int, int, real) {});
}

// Both factors of a sequence into shared memory, around which there are zeros already.
__device__ __forceinline__ void fetch_factors(const store* from, real* k1, real* k2) {
  for (int at = threadIdx.x; at < EDGE1 * EDGE1; at += THREADS) k1[at / EDGE1 * S1 + at % EDGE1] = widen(from[at]);
  for (int at = threadIdx.x; at < EDGE2 * EDGE2; at += THREADS) k2[at / EDGE2 * S2 + at % EDGE2] = widen(from[EDGE1 * EDGE1 + at]);
}

// Sums of two numbers over the block in two parts with a barrier between; `room` has two a warp.
__device__ __forceinline__ void pair_part(real a, real b, real* room) {
  real v[2] = {a, b};
  int index = 0, valid = 2;
  fold_sums<2, 16>(v, threadIdx.x % 32, index, valid);
  if (valid > 0) room[index * WARPS + threadIdx.x / 32] = v[0];
}
__device__ __forceinline__ void pair_total(const real* room, real& a, real& b) {
  a = b = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    a += room[w];
    b += room[WARPS + w];
  }
}
// The largest of what is not negative over a warp; NaN stays.
__device__ __forceinline__ real warp_most(real v) {
#if !defined(SIMT) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(real) == 4)  // as whole numbers they are in the same order, a NaN above all
    return __uint_as_float(__reduce_max_sync(EVERY_LANE, __float_as_uint((float)v)));
#endif
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) v = most(v, __shfl_xor_sync(EVERY_LANE, v, reach));
  return v;
}
// The same of two over the block, in two parts.
__device__ __forceinline__ void most_part(real a, real b, real* room) {
  a = warp_most(a);
  b = warp_most(b);
  if (threadIdx.x % 32 == 0) {
    room[threadIdx.x / 32] = a;
    room[WARPS + threadIdx.x / 32] = b;
  }
}
__device__ __forceinline__ void most_total(const real* room, real& a, real& b) {
  a = b = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    a = most(a, room[w]);
    b = most(b, room[WARPS + w]);
  }
}

// An iteration that goes back and forth, so many times without getting closer, is damped by half.
constexpr int PATIENCE = 4;
struct Swing {
  real factor, before = LARGEST;
  int swings = 0;

  // After an iteration that made this change, the largest of it `moved`; `room` is for sums.
  __device__ __forceinline__ void look(real moved, const real (&change)[OWNED], real (&past)[OWNED], real* room) {
    if (moved > (real)0.98 * before) {  // the same in all threads
      real back = 0, none;
#pragma unroll
      for (int c = 0; c < OWNED; ++c) back += change[c] * past[c];
      pair_part(back, 0, room);
      __syncthreads();
      pair_total(room, back, none);
      if (back < 0 && ++swings >= PATIENCE) {
        factor /= 2;
        swings = 0;
      }
    }
    before = moved;
#pragma unroll
    for (int c = 0; c < OWNED; ++c) past[c] = change[c];
  }
};
