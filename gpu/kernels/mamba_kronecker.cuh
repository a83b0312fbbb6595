// What the kernels of FP-Mamba with a Kronecker mixer share: small products, from matrices in shared memory.
//
// A vector of EDGE1 EDGE2 channels is a matrix, row by row. All products are of rows with rows, c[i][j] = sum_k a[i][k] b[j][k];
// what is summed down a column is written transposed beforehand. A warp takes a tile, 16 x 8 elements on tensor cores
// (tensor.cuh), or in double 8 x 16 by 2 x 2 a lane. Rows are an odd number of 16-byte pieces long, so that lanes that read
// neighbouring rows at once do so from different banks. Around a matrix there are zeros.
//
// Macros: those of mamba.cuh, and EDGE1, EDGE2; SPECTRAL 0 or 1 where factors are made.
#pragma once
#include "mamba.cuh"
#include "tensor.cuh"

#ifndef SPECTRAL
#define SPECTRAL 0
#endif

constexpr int PIECE = 16 / (int)sizeof(real);
typedef Pack<real, PIECE> piece_of_row;

__device__ constexpr int up(int n, int to) { return (n + to - 1) / to * to; }
__device__ constexpr int rows_of(int edge) { return up(edge, 16); }
__device__ constexpr int pitch(int edge) { return up(edge, 16) + PIECE; }
// Numbers of shared memory of a matrix.
__device__ constexpr int matrix(int rows, int columns) { return rows_of(rows) * pitch(columns); }
// Of an upper triangle.
__device__ constexpr int triangle(int edge) { return edge * (edge + 1) / 2; }

constexpr bool TENSOR = sizeof(real) == 4;
constexpr int TALL = TENSOR ? 16 : 8, WIDE = TENSOR ? 8 : 16;

// The tiles of a matrix of I x J, and a lane's four elements of one.
template <int I, int J> struct Tile {
  static constexpr int DOWN = up(I, TALL) / TALL, ACROSS = up(J, WIDE) / WIDE, COUNT = DOWN * ACROSS;
  int i, j;

  __device__ __forceinline__ explicit Tile(int number) {
    const int lane = threadIdx.x % 32;
    i = number % DOWN;
    j = number / DOWN;
    if constexpr (TENSOR) {
      i *= TALL;
      j *= WIDE;
    } else {  // far apart; neighbours have the same of both sides, one by one or two by two
      i = i * 4 + lane / 2 % 2 + lane / 16 * 2;
      j = j * 8 + lane % 2 + lane / 4 % 4 * 2;
    }
  }
  __device__ __forceinline__ int row(int c) const {
    return TENSOR ? i + (int)threadIdx.x % 32 / 4 + c / 2 * 8 : i + c / 2 * 4 * DOWN;
  }
  __device__ __forceinline__ int column(int c) const {
    return TENSOR ? j + (int)threadIdx.x % 4 * 2 + c % 2 : j + c % 2 * 8 * ACROSS;
  }
};

// Operands of tensor cores: a step's 16 x 8 of rows from `i`, 8 x 8 of rows from `j`, in two parts.
struct Rows16 {
  u32 high[4], low[4];

  __device__ __forceinline__ void take(const real* a, int as, int i, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) split((float)a[(i + g + r % 2 * 8) * as + k + t + r / 2 * 4], high[r], low[r]);
  }
};
struct Rows8 {
  u32 high[2], low[2];

  __device__ __forceinline__ void take(const real* b, int bs, int j, int k) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) split((float)b[(j + g) * bs + k + t + r * 4], high[r], low[r]);
  }
};
// Sums of a tile: in parts, so that no more than four instructions of K = 32 wait for each other.
struct Sums {
  float main[2][4] = {}, rest[2][4] = {};

  __device__ __forceinline__ void add(int step, const Rows16& a, const Rows8& b) {
    multiply(rest[step % 2], a.low, b.high);
    multiply(main[step % 2], a.high, b.high);
    multiply(rest[step % 2], a.high, b.low);
  }
  __device__ __forceinline__ void total(real (&c)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) c[r] = (main[0][r] + main[1][r]) + (rest[0][r] + rest[1][r]);
  }
};

// A tile's elements of the product, over k < K.
template <int K, int I, int J>
__device__ __forceinline__ void dots(const real* a, int as, const real* b, int bs, const Tile<I, J>& at, real (&c)[4]) {
  if constexpr (TENSOR) {
    Sums sums;
#pragma unroll
    for (int k = 0; k < K; k += 8) {
      Rows16 left;
      Rows8 right;
      left.take(a, as, at.i, k);
      right.take(b, bs, at.j, k);
      sums.add(k / 8, left, right);
    }
    sums.total(c);
  } else {
#pragma unroll
    for (int r = 0; r < 4; ++r) c[r] = 0;
#pragma unroll 2
    for (int k = 0; k < K; k += PIECE) {
      piece_of_row left[2], right[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        left[r] = *(const piece_of_row*)(a + at.row(2 * r) * as + k);
        right[r] = *(const piece_of_row*)(b + at.column(r) * bs + k);
      }
#pragma unroll
      for (int e = 0; e < PIECE; ++e)
#pragma unroll
        for (int r = 0; r < 4; ++r) c[r] += left[r / 2].v[e] * right[r % 2].v[e];
    }
  }
}

// All elements of a product by so many warps: `done(i, j, c)`, beyond the edges as well, where it is zero.
template <int I, int J, int K, int WARPS, class Done>
__device__ __forceinline__ void whole_product(const real* a, int as, const real* b, int bs, Done done) {
#pragma unroll 1
  for (int number = threadIdx.x / 32; number < Tile<I, J>::COUNT; number += WARPS) {
    const Tile<I, J> at(number);
    real c[4];
    dots<K>(a, as, b, bs, at, c);
#pragma unroll
    for (int r = 0; r < 4; ++r) done(at.row(r), at.column(r), c[r]);
  }
}

// --- factors ------------------------------------------------------------------------------------------------------

// Of the power iteration.
constexpr int STEPS = 16;
constexpr real SHORTEST = (real)1e-12;
// Entries of both triangles, after which both diagonals stand.
constexpr int ENTRIES = triangle(EDGE1) + triangle(EDGE2), OUTPUTS = ENTRIES + EDGE1 + EDGE2;

// An upper triangle, and a diagonal between 0 and 1, from arguments.
template <int EDGE, class Argument>
__device__ __forceinline__ void fill(real* upper, real* open, Argument argument, int at_entries, int at_diagonal) {
  constexpr int S = pitch(EDGE);
  for (int at = threadIdx.x; at < matrix(EDGE, EDGE); at += THREADS) {
    const int i = at / S, k = at % S;
    upper[at] = i < EDGE && k < EDGE && k >= i ? activate(argument(at_entries + i * EDGE - i * (i - 1) / 2 + k - i)) : (real)0;
  }
  for (int i = threadIdx.x; i < EDGE; i += THREADS) open[i] = sigmoid(argument(at_diagonal + i));
}

// What a matrix with rows of unit length is divided by, by a warp: 1, or with SPECTRAL what power iterations find. It hands out
// the rows' norms, `norm(i, norm, inverse)`, which where rows are long has to scale them in memory; the vectors, `vector(l, i, v)`,
// the last being r x_16; and the lengths of r x_l. `turns` has two vectors, zero beyond EDGE.
template <int EDGE, class Norm, class Vector, class Length>
__device__ __forceinline__ real strongest(const real* r, real* turns, real start, real eps, Norm norm, Vector vector, Length length_of) {
  constexpr int S = pitch(EDGE), ROWS = (EDGE + 31) / 32, LONG = up(EDGE, PIECE);
  constexpr bool HELD = EDGE <= 32;
  const int lane = threadIdx.x % 32;
  real row[HELD ? LONG : 1];
#pragma unroll
  for (int o = 0; o < ROWS; ++o) {
    const int i = lane + 32 * o;
    if (i < EDGE) {
      real total = 0;
#pragma unroll
      for (int k = 0; k < LONG; k += PIECE) {
        const piece_of_row some = *(const piece_of_row*)(r + i * S + k);
#pragma unroll
        for (int e = 0; e < PIECE; ++e) {
          if constexpr (HELD) row[k + e] = some.v[e];
          total += some.v[e] * some.v[e];
        }
      }
      const real own = sqrt(total), inverse = 1 / larger(own, eps);
      norm(i, own, inverse);
      if constexpr (HELD)
#pragma unroll
        for (int k = 0; k < LONG; ++k) row[k] *= inverse;
      turns[i] = start;
      vector(0, i, start);
    }
  }
  __syncwarp();
  if constexpr (!SPECTRAL) return 1;
  // `turns` has w_l = r x_{l-1}, whose length is not yet taken out; every lane finds it by itself
  real sigma = 0, fifteenth[ROWS] = {};
  for (int l = 0; l <= STEPS; ++l) {
    const real* from = turns + l % 2 * LONG;
    real* to = turns + (l + 1) % 2 * LONG;
    real squares = 0, sum[ROWS] = {};
#pragma unroll 8
    for (int k = 0; k < LONG; k += PIECE) {
      const piece_of_row some = *(const piece_of_row*)(from + k);
#pragma unroll
      for (int e = 0; e < PIECE; ++e) squares += some.v[e] * some.v[e];
      if constexpr (HELD) {
#pragma unroll
        for (int e = 0; e < PIECE; ++e) sum[0] += row[k + e] * some.v[e];
      } else {
#pragma unroll
        for (int o = 0; o < ROWS; ++o)
          if (lane + 32 * o < EDGE) {
            const piece_of_row its = *(const piece_of_row*)(r + (lane + 32 * o) * S + k);
#pragma unroll
            for (int e = 0; e < PIECE; ++e) sum[o] += its.v[e] * some.v[e];
          }
      }
    }
    const real length = sqrt(squares), inverse = l == 0 ? (real)1 : 1 / larger(length, SHORTEST);
    if (l > 0 && lane == 0) length_of(l - 1, length);
#pragma unroll
    for (int o = 0; o < ROWS; ++o) {
      const int i = lane + 32 * o;
      if (i < EDGE) {
        const real x = from[i] * inverse, next = sum[o] * inverse;
        if (l > 0) vector(l, i, x);
        if (l == STEPS - 1) fifteenth[o] = x;
        if (l == STEPS) {
          vector(STEPS + 1, i, next);
          sigma += fifteenth[o] * next;
        }
        to[i] = next;
      }
    }
    __syncwarp();
  }
  return warp_total(sigma) + eps;
}

// --- the kernels that have a block for a sequence: THREADS of EDGE1 x EDGE2 channels ---------------------------------

constexpr int D = EDGE1 * EDGE2, WARPS = THREADS / 32;
constexpr int S1 = pitch(EDGE1), S2 = pitch(EDGE2);
typedef Tile<EDGE1, EDGE2> Channels;
constexpr int COUNT = Channels::COUNT, TILES = (COUNT + WARPS - 1) / WARPS, OWNED = 4 * TILES;
// Numbers of both factors, one after the other.
constexpr int FACTORS = EDGE1 * EDGE1 + EDGE2 * EDGE2;

__device__ __forceinline__ bool inside(int i, int j) {
  return (EDGE1 % 16 == 0 || i < EDGE1) && (EDGE2 % 16 == 0 || j < EDGE2);
}
// Whether the n-th tile of this warp is one.
__device__ __forceinline__ bool is_tile(int n) { return COUNT % WARPS == 0 || n * WARPS + (int)threadIdx.x / 32 < COUNT; }
__device__ __forceinline__ Channels own_tile(int n) { return Channels(n * WARPS + threadIdx.x / 32); }
// A thread's channels: `each(c, i, j)`, c counts them.
template <class Each> __device__ __forceinline__ void own(Each each) {
#pragma unroll
  for (int n = 0; n < TILES; ++n)
    if (is_tile(n)) {
      const Channels at = own_tile(n);
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (inside(at.row(r), at.column(r))) each(n * 4 + r, at.row(r), at.column(r));
    }
}

// Both factors, and the products with them; IN_REGISTERS, a warp's rows of them stay there.
template <bool IN_REGISTERS> struct Factors {
  static_assert(!IN_REGISTERS || (TENSOR && TILES == 1), "one tile of float");
  Rows16 first[IN_REGISTERS ? up(EDGE1, 8) / 8 : 1];
  Rows8 second[IN_REGISTERS ? up(EDGE2, 8) / 8 : 1];

  __device__ __forceinline__ void take(const real* k1, const real* k2) {
    if constexpr (IN_REGISTERS) {
      const Channels at = own_tile(0);
#pragma unroll
      for (int k = 0; k < EDGE1; k += 8) first[k / 8].take(k1, S1, at.i, k);
#pragma unroll
      for (int k = 0; k < EDGE2; k += 8) second[k / 8].take(k2, S2, at.j, k);
    }
  }

  // K1 X K2^T at a thread's channels; X lies in `from` (pitch S2), and `between` (EDGE2 rows, pitch S1) is for X K2^T, transposed,
  // which `seen(i, j, c)` is told as well. One barrier in the middle; X must be there, and nobody at `between`.
  template <class Seen>
  __device__ __forceinline__ void apply(const real* k1, const real* k2, const real* from, real* between, real (&out)[OWNED],
                                        Seen seen) const {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      if (is_tile(n)) {
        const Channels at = own_tile(n);
        real c[4];
        if constexpr (IN_REGISTERS) {
          Sums sums;
#pragma unroll
          for (int k = 0; k < EDGE2; k += 8) {
            Rows16 left;
            left.take(from, S2, at.i, k);
            sums.add(k / 8, left, second[k / 8]);
          }
          sums.total(c);
        } else {
          dots<EDGE2>(from, S2, k2, S2, at, c);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
          if (inside(at.row(r), at.column(r))) {  // the zeros around stay, whatever a sequence brings
            between[at.column(r) * S1 + at.row(r)] = c[r];
            seen(at.row(r), at.column(r), c[r]);
          }
      }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      if (is_tile(n)) {
        const Channels at = own_tile(n);
        real c[4];
        if constexpr (IN_REGISTERS) {
          Sums sums;
#pragma unroll
          for (int k = 0; k < EDGE1; k += 8) {
            Rows8 right;
            right.take(between, S1, at.j, k);
            sums.add(k / 8, first[k / 8], right);
          }
          sums.total(c);
        } else {
          dots<EDGE1>(k1, S1, between, S1, at, c);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) out[n * 4 + r] = c[r];
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
// Where changes have become smaller by the same factor twice, one direction is left, whose geometric series is known: the rest of it
// is gone at once, forwards if that is less than NEAR of the size, for there may be other solutions. Then other directions show.
constexpr real NEAR = (real)1e-3, ALIKE = (real)0.05, SLOWEST = (real)0.98;  // above it `look` uses the room
// Changes of an adjoint that have grown so much since the first will not shrink: it has no solution that iterating finds, and what
// is found without the step's own Jacobian, as by the one-step gradient, takes its place.
constexpr real GROWN = (real)1e4;
struct Swing {
  real factor, before = LARGEST, ratio = 0;
  int swings = 0;

  // How much further than the last change, zero mostly. To be asked after `look` of a change that was the whole of `moved`;
  // `inner()` is a thread's part of its inner product with the change before, `square()` that of the latter with itself.
  template <class Inner, class Square>
  __device__ __forceinline__ real further(real moved, real last, real most_far, Inner inner, Square square, real* room) {
    const real now = moved / last, then = ratio;
    ratio = now;
    if (!(now < SLOWEST && now > (real)0.3 && magnitude(now - then) <= ALIKE * now && moved * now <= most_far * (1 - now))) return 0;
    real a, b;
    pair_part(inner(), square(), room);
    __syncthreads();
    pair_total(room, a, b);
    const real rate = a / b;
    if (!(magnitude(magnitude(rate) - now) <= 2 * ALIKE * now)) return 0;
    before = LARGEST;
    ratio = 0;
    return rate / (1 - rate);
  }

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
