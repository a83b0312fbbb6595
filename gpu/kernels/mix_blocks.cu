// Channel mixing by square blocks: Monarch, Q = I - blockdiag(alpha_j M_j), and with PLAIN any matrix, Q itself, which
// is one block; sections 2 and 6 of docs/mathematics.md.
//
//   block_rows        y = x - alpha M x           PLAIN: y = Q x
//   block_columns     y = x - alpha M^T x         PLAIN: y = Q^T x
//   block_cotangent   M_bar = -alpha y_bar x^T,   alpha_bar = -y_bar . M x      PLAIN: Q_bar = y_bar x^T
//
// Every element of a matrix serves once, so there is nothing to hold: rows stream through registers, a row of EDGE
// elements by ROW_LANES lanes with accesses of EACH elements, and x comes from the first-level cache.
//
// IN and OUT are how x and y lie in memory: store, or real inside a solve. With CHUNKED, x and y are those of a chunk
// of every sequence, (B, chunk, dim), and the matrices (B, steps, ...): sequence b is at its chunk number done[b],
// counted from the end where BACKWARD, and rests if it has no more.
//
// Traffic: matrices read once, vectors once; cotangents: M and the vectors read once, M_bar written once.
#include "common.cuh"

constexpr u32 EVERY_LANE = 0xffffffffu;
constexpr int SPAN = ROW_LANES * EACH;                       // columns that a row's lanes take at once
constexpr int SPANS = (EDGE + SPAN - 1) / SPAN;

typedef Pack<store, EACH> access;
typedef Pack<IN, EACH> given;

struct Place {
  const int* done;
  i64 chunk, chunks, steps;
};

// Where the matrix of vector number v is, or -1 if there is none to apply.
__device__ __forceinline__ i64 matrix_of(i64 v, const Place& at) {
#if CHUNKED
  const i64 b = v / at.chunk;
  const i64 q = at.done[b];
  const i64 t = (BACKWARD ? at.chunks - 1 - q : q) * at.chunk + v % at.chunk;
  return q < at.chunks && t < at.steps ? b * at.steps + t : -1;
#else
  return v;
#endif
}

__device__ __forceinline__ real mixed(real x, real alpha, real sum) { return PLAIN ? sum : x - alpha * sum; }

#ifdef ROWS_EACH
// Blocks of `blocks` a vector; all of them are `total`. A warp takes ROWS_EACH rows for each group of ROW_LANES lanes.
extern "C" __global__ void __launch_bounds__(THREADS)
block_rows(const store* __restrict__ m, const store* __restrict__ alpha, const IN* __restrict__ x, OUT* __restrict__ y,
           i64 total, i64 blocks, const int* done, i64 chunk, i64 chunks, i64 steps) {
  constexpr int AT_ONCE = 32 / ROW_LANES;
  const Place at = {done, chunk, chunks, steps};
  const int lane = threadIdx.x % ROW_LANES, group = (threadIdx.x & 31) / ROW_LANES;
  const i64 first = ((i64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5)) * (AT_ONCE * ROWS_EACH);
  const i64 from = first / EDGE;                         // the first row's block
  const int past = (int)(first - from * EDGE);
  const store* rows[ROWS_EACH];
  i64 block[ROWS_EACH];
  i64 place[ROWS_EACH];
  real sum[ROWS_EACH];
#pragma unroll
  for (int n = 0; n < ROWS_EACH; ++n) {
    const int offset = past + n * AT_ONCE + group;
    block[n] = from + offset / EDGE;
    place[n] = -1;
    rows[n] = m;
    sum[n] = 0;
    if (block[n] < total) {
      const i64 v = CHUNKED ? block[n] / blocks : 0;
      const i64 to = CHUNKED ? matrix_of(v, at) : 0;
      if (to >= 0) place[n] = CHUNKED ? to * blocks + block[n] % blocks : block[n];
      if (place[n] >= 0) rows[n] = m + (place[n] * EDGE + offset % EDGE) * EDGE;
    }
  }
#pragma unroll 2
  for (int c = 0; c < SPANS; ++c) {
    const int column = c * SPAN + lane * EACH;
    access got[ROWS_EACH];
    given with[ROWS_EACH];
#pragma unroll
    for (int n = 0; n < ROWS_EACH; ++n)
      if (place[n] >= 0 && column < EDGE) got[n] = *(const access*)(rows[n] + column);
#pragma unroll
    for (int n = 0; n < ROWS_EACH; ++n)
      if (place[n] >= 0 && column < EDGE) with[n] = *(const given*)(x + block[n] * EDGE + column);
#pragma unroll
    for (int n = 0; n < ROWS_EACH; ++n)
      if (place[n] >= 0 && column < EDGE) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) sum[n] += widen(got[n].v[e]) * widen(with[n].v[e]);
      }
  }
#pragma unroll
  for (int n = 0; n < ROWS_EACH; ++n) {
#pragma unroll
    for (int offset = ROW_LANES / 2; offset; offset /= 2) sum[n] += __shfl_xor_sync(EVERY_LANE, sum[n], offset);
    if (lane == 0 && place[n] >= 0) {
      const i64 row = first + n * AT_ONCE + group;
      y[row] = Store<OUT>::narrow(mixed(PLAIN ? 0 : widen(x[row]), PLAIN ? 0 : widen(alpha[block[n]]), sum[n]));
    }
  }
}
#endif

#ifdef ROW_GROUPS
// ROW_GROUPS groups of ROW_LANES lanes share the rows of a block. They are a part of a warp, or the block of threads.
constexpr int UNIT = ROW_LANES * ROW_GROUPS;
constexpr bool WHOLE = UNIT > 32;
static_assert(!WHOLE || (ROW_LANES == 32 && UNIT == THREADS), "a unit is a part of a warp or the block");

// Sum over the groups of a unit, for the lanes of its first group; `memory` has (ROW_GROUPS - 1) ROW_LANES N reals.
template <int N> __device__ __forceinline__ void over_groups(real (&v)[N], real* memory) {
  if constexpr (!WHOLE) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int offset = UNIT / 2; offset >= ROW_LANES; offset /= 2) v[i] += __shfl_xor_sync(EVERY_LANE, v[i], offset);
  } else {
    const int lane = threadIdx.x % ROW_LANES, group = threadIdx.x / ROW_LANES;
    if (group > 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) memory[((group - 1) * N + i) * ROW_LANES + lane] = v[i];
    }
    __syncthreads();
    if (group == 0) {
      for (int g = 0; g + 1 < ROW_GROUPS; ++g)
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += memory[(g * N + i) * ROW_LANES + lane];
    }
  }
}

// A unit is a span of the columns of one block.
extern "C" __global__ void __launch_bounds__(THREADS)
block_columns(const store* __restrict__ m, const store* __restrict__ alpha, const IN* __restrict__ x,
              OUT* __restrict__ y, i64 total, i64 blocks, const int* done, i64 chunk, i64 chunks, i64 steps) {
  SHARED(memory);
  const Place at = {done, chunk, chunks, steps};
  const int lane = threadIdx.x % ROW_LANES, group = (threadIdx.x % UNIT) / ROW_LANES;
  const i64 unit = ((i64)blockIdx.x * THREADS + threadIdx.x) / UNIT;
  const i64 block = unit / SPANS;
  const int column = (int)(unit % SPANS) * SPAN + lane * EACH;
  i64 place = -1;
  if (block < total) {
    const i64 to = CHUNKED ? matrix_of(block / blocks, at) : 0;
    if (to >= 0) place = CHUNKED ? to * blocks + block % blocks : block;
  }
  if (WHOLE && place < 0) return;  // the same in the whole block of threads
  real sum[EACH];
#pragma unroll
  for (int e = 0; e < EACH; ++e) sum[e] = 0;
  if (place >= 0 && column < EDGE) {
    const store* rows = m + place * EDGE * EDGE + column;
    const IN* with = x + block * EDGE;
#pragma unroll 8
    for (int i = group; i < EDGE; i += ROW_GROUPS) {
      const access got = *(const access*)(rows + (i64)i * EDGE);
      const real factor = widen(with[i]);
#pragma unroll
      for (int e = 0; e < EACH; ++e) sum[e] += factor * widen(got.v[e]);
    }
  }
  over_groups(sum, (real*)memory);
  if (group == 0 && place >= 0 && column < EDGE) {
    given seen;
    if constexpr (!PLAIN) seen = *(const given*)(x + block * EDGE + column);
    const real strength = PLAIN ? 0 : widen(alpha[block]);
    Pack<OUT, EACH> out;
#pragma unroll
    for (int e = 0; e < EACH; ++e)
      out.v[e] = Store<OUT>::narrow(mixed(PLAIN ? 0 : widen(seen.v[e]), strength, sum[e]));
    *(Pack<OUT, EACH>*)(y + block * EDGE + column) = out;
  }
}

// A unit is one of `pieces` equal parts of the rows of one block; one part unless PLAIN, since alpha_bar is a sum.
extern "C" __global__ void __launch_bounds__(THREADS)
block_cotangent(const store* __restrict__ m, const store* __restrict__ alpha, const IN* __restrict__ x,
                const IN* __restrict__ ybar, store* __restrict__ m_bar, store* __restrict__ alpha_bar, i64 total,
                int pieces) {
  SHARED(memory);
  const int lane = threadIdx.x % ROW_LANES, group = (threadIdx.x % UNIT) / ROW_LANES;
  const i64 unit = ((i64)blockIdx.x * THREADS + threadIdx.x) / UNIT;
  const i64 block = unit / pieces;
  const int piece = (int)(unit % pieces);
  const int begin = (int)((i64)EDGE * piece / pieces), end = (int)((i64)EDGE * (piece + 1) / pieces);
  real product[1] = {0};
  if (block < total) {
    const IN *bars = ybar + block * EDGE, *with = x + block * EDGE;
    const real strength = PLAIN ? (real)1 : -widen(alpha[block]);
    for (int c = 0; c < SPANS; ++c) {
      const int column = c * SPAN + lane * EACH;
      if (column < EDGE) {
        const given row = *(const given*)(with + column);
        const i64 corner = block * EDGE * EDGE + column;
#pragma unroll 4
        for (int i = begin + group; i < end; i += ROW_GROUPS) {
          const real bar = widen(bars[i]);
          access out;
          if constexpr (!PLAIN) {
            const access got = *(const access*)(m + corner + (i64)i * EDGE);
            real sum = 0;
#pragma unroll
            for (int e = 0; e < EACH; ++e) sum += widen(got.v[e]) * widen(row.v[e]);
            product[0] += bar * sum;
          }
          const real factor = strength * bar;
#pragma unroll
          for (int e = 0; e < EACH; ++e) out.v[e] = narrow(factor * widen(row.v[e]));
          *(access*)(m_bar + corner + (i64)i * EDGE) = out;
        }
      }
    }
  }
  if constexpr (!PLAIN) {
    over_groups(product, (real*)memory);
#pragma unroll
    for (int offset = ROW_LANES / 2; offset; offset /= 2) product[0] += __shfl_xor_sync(EVERY_LANE, product[0], offset);
    if (lane == 0 && group == 0 && block < total) alpha_bar[block] = narrow(-product[0]);
  }
}
#endif
