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
  // of both sides neighbours have the same, one by one or two by two: half the time of a 16-byte access
  const int lane = threadIdx.x % 32, down = lane / 2 % 2 + lane / 16 * 2, across = lane % 2 + lane / 4 % 4 * 2;
  const int i = number / All::ACROSS * 4 + down, j = number % All::ACROSS * 8 + across;
  return {{i, i + 4 * All::DOWN}, {j, j + 8 * All::ACROSS}};
}

// c[m][n] is the sum of a[i_m][k] b[j_n][k] over k < K.
template <int K> __device__ __forceinline__ void dots(const real* a, int as, const real* b, int bs, const Tile& at, real (&c)[2][2]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n) c[m][n] = 0;
#pragma unroll 2
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

__device__ __forceinline__ bool inside(int i, int j) {
  return (EDGE1 % 8 == 0 || i < EDGE1) && (EDGE2 % 16 == 0 || j < EDGE2);
}

// With KEPT, the factors stay in registers from one application to the next, and a product is laid out for that: four lanes
// that lie 8 apart share 4 x 4 elements, each with a quarter of what is summed, of four neighbouring rows of the factor. In the
// end each has one of these rows and four of the other side, which lie a quarter of the edge apart. A warp has 2 such tiles by
// 4. Neighbours read the same of shared memory, so that a 16-byte access takes half its time, and all of it different banks.
template <int ROWS, int COLUMNS> struct Part {  // of a product of a factor's ROWS with COLUMNS rows in shared memory
  int held, other, share;

  __device__ __forceinline__ Part() {
    constexpr int DOWN = ROWS / 8;  // warps
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    share = lane / 8;
    held = 4 * (warp % DOWN * 2 + lane % 2);
    other = warp / DOWN * 4 + lane / 2 % 4;
  }
  __device__ __forceinline__ int row() const { return held + share; }
  __device__ __forceinline__ int column(int m) const { return other + m * (COLUMNS / 4); }
  // Where the share begins of K numbers.
  template <int K> __device__ __forceinline__ int begin() const { return share % 2 * (K / 2) + share / 2 * (K / 4); }
};
template <int ROWS, int COLUMNS, int K> struct Kept {
  static constexpr int SHARE = K / 4;
  real its[4][SHARE];

  __device__ __forceinline__ void take(const real* factor, int pitch) {
    const Part<ROWS, COLUMNS> at;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int k = 0; k < SHARE; k += PIECE) {
        const piece_of_row some = *(const piece_of_row*)(factor + (at.held + n) * pitch + at.template begin<K>() + k);
#pragma unroll
        for (int e = 0; e < PIECE; ++e) its[n][k + e] = some.v[e];
      }
  }
  // c[m] is the product of row at.row() with row at.column(m) of `from`.
  __device__ __forceinline__ void times(const real* from, int pitch, const Part<ROWS, COLUMNS>& at, real (&c)[4]) const {
    real sums[16] = {};
#pragma unroll
    for (int k = 0; k < SHARE; k += PIECE) {
      piece_of_row some[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) some[m] = *(const piece_of_row*)(from + at.column(m) * pitch + at.template begin<K>() + k);
#pragma unroll
      for (int e = 0; e < PIECE; ++e)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int m = 0; m < 4; ++m) sums[n * 4 + m] += its[n][k + e] * some[m].v[e];
    }
    int index = 0, valid = 16;
    fold_sums<16, 16, 8>(sums, threadIdx.x % 32, index, valid);
#pragma unroll
    for (int m = 0; m < 4; ++m) c[m] = sums[m];
  }
};

// Both factors, and the products with them. A thread's channels: `each(c, i, j)`, c counts them.
template <bool IN_REGISTERS> struct Factors;

template <> struct Factors<true> {
  Kept<EDGE2, EDGE1, EDGE2> second;
  Kept<EDGE1, EDGE2, EDGE1> first;

  template <class Each> static __device__ __forceinline__ void own(Each each) {
    const Part<EDGE1, EDGE2> at;
#pragma unroll
    for (int m = 0; m < 4; ++m) each(m, at.row(), at.column(m));
  }
  __device__ __forceinline__ void take(const real* k1, const real* k2) {
    first.take(k1, S1);
    second.take(k2, S2);
  }
  // K1 X K2^T at a thread's channels; X lies in `from` (pitch S2), and `between` (EDGE2 rows, pitch S1) is for X K2^T, transposed,
  // which `seen(i, j, c)` is told as well. One barrier in the middle; X must be there, and nobody at `between`.
  template <class Seen>
  __device__ __forceinline__ void apply(const real*, const real*, const real* from, real* between, real (&out)[OWNED], Seen seen) const {
    const Part<EDGE2, EDGE1> at;
    real c[4];
    second.times(from, S2, at, c);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      between[at.row() * S1 + at.column(m)] = c[m];
      seen(at.column(m), at.row(), c[m]);
    }
    __syncthreads();
    first.times(between, S1, Part<EDGE1, EDGE2>(), c);
#pragma unroll
    for (int m = 0; m < 4; ++m) out[m] = c[m];
  }
};

template <> struct Factors<false> {
  // Whether the n-th tile of this warp is one.
  static __device__ __forceinline__ bool is_tile(int n) { return COUNT % WARPS == 0 || n * WARPS + (int)threadIdx.x / 32 < COUNT; }
  static __device__ __forceinline__ Tile tile(int n) { return tile_of<EDGE1, EDGE2>(n * WARPS + threadIdx.x / 32); }

  template <class Each> static __device__ __forceinline__ void own(Each each) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      if (is_tile(n)) {
        const Tile at = tile(n);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int l = 0; l < 2; ++l)
            if (inside(at.i[m], at.j[l])) each(n * 4 + m * 2 + l, at.i[m], at.j[l]);
      }
  }
  __device__ __forceinline__ void take(const real*, const real*) {}
  template <class Seen>
  __device__ __forceinline__ void apply(const real* k1, const real* k2, const real* from, real* between, real (&out)[OWNED],
                                        Seen seen) const {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      if (is_tile(n)) {
        const Tile at = tile(n);
        real c[2][2];
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
        const Tile at = tile(n);
        real c[2][2];
        dots<EDGE1>(k1, S1, between, S1, at, c);
#pragma unroll
        for (int m = 0; m < 4; ++m) out[n * 4 + m] = c[m / 2][m % 2];
      }
  }
};
__device__ __forceinline__ void unseen(int, int, real) {}

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
// What a kernel with two blocks on a multiprocessor has no registers for lies in shared memory: where nobody else looks at a
// thread's own channels.
constexpr bool PARKED = RESIDENT > 1;
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

  // After an iteration whose largest change was `moved`; `inner()` is a thread's part of its inner product with the change before,
  // and `room` is for sums.
  template <class Back> __device__ __forceinline__ void look(real moved, Back inner, real* room) {
    if (moved > (real)0.98 * before) {  // the same in all threads
      real back, none;
      pair_part(inner(), 0, room);
      __syncthreads();
      pair_total(room, back, none);
      if (back < 0 && ++swings >= PATIENCE) {
        factor /= 2;
        swings = 0;
      }
    }
    before = moved;
  }
};
