// Channel mixing of low rank: Q x, Q^T x and the cotangents; sections 2 and 6 of docs/mathematics.md.
//
//   a sum of terms               Q = I - sum_i alpha_i u_i u_i^T
//   PRODUCT, of reflections      Q = (I - alpha_r u_r u_r^T) ... (I - alpha_1 u_1 u_1^T)
//
// With a product, reflection i sees not x but x^(i) = x - sum_{j<i} alpha_j a_j u_j, so that a_i = u_i . x^(i) obeys
// a_i = u_i . x - sum_{j<i} alpha_j (u_i . u_j) a_j: U x and the strictly lower part of U U^T, which are one batched
// reduction over the channels, give all a_i, and Q x = x - sum_i alpha_i a_i u_i. Q^T is the same with the rows in the
// other order (REVERSED). For the cotangents of y = Q x, with e = y_bar, reflection i has seen d^(i) = x^(i) and gets
// e^(i) = e - sum_{j>i} alpha_j b_j u_j, where b_i = u_i . e^(i) is the chain from the other end:
//
//   u_bar_i = -alpha_i (a_i e^(i) + b_i d^(i)),   alpha_bar_i = -a_i b_i
//
// and in a sum of terms d^(i) = x and e^(i) = e.
//
// Tile: one step by a GROUP of threads, a warp or a whole block, with all channels of x and of RANK rows in registers:
// ACCESSES accesses of EACH neighbouring channels a thread. With MANY, rows come in tiles of RANK, the last one filled
// up with zeros: what a tile of reflections leaves is what the next one sees.
//
// Traffic: x and u read once, y written once; cotangents: x, y_bar and u read once (u twice by a product with MANY),
// u_bar written once.
#include "sums.cuh"

#define VALUES (EACH * ACCESSES)

static_assert(GROUP == 32 || GROUP == THREADS, "a group is a warp or the block");

constexpr int R = RANK;
constexpr bool CHAIN = PRODUCT && RANK > 1;
constexpr int PLAINS = CHAIN ? R * (R - 1) / 2 : 0;
__device__ constexpr int below(int i, int j) { return i * (i - 1) / 2 + j; }  // of the strictly lower part, i > j

typedef Pack<store, EACH> access;

__device__ __forceinline__ int channel(int a) { return (a * GROUP + (int)threadIdx.x % GROUP) * EACH; }

__device__ __forceinline__ void load(real (&v)[VALUES], const store* row, int dim) {
  access got[ACCESSES];
#pragma unroll
  for (int a = 0; a < ACCESSES; ++a)
    if (channel(a) < dim) got[a] = *(const access*)(row + channel(a));
#pragma unroll
  for (int a = 0; a < ACCESSES; ++a)
#pragma unroll
    for (int e = 0; e < EACH; ++e) v[a * EACH + e] = channel(a) < dim ? widen(got[a].v[e]) : (real)0;
}

__device__ __forceinline__ void write(store* row, const real (&v)[VALUES], int dim) {
#pragma unroll
  for (int a = 0; a < ACCESSES; ++a) {
    access out;
#pragma unroll
    for (int e = 0; e < EACH; ++e) out.v[e] = narrow(v[a * EACH + e]);
    if (channel(a) < dim) *(access*)(row + channel(a)) = out;
  }
}

// RANK rows of a step, as they lie in memory, and their strengths; rows that do not exist are zero.
struct Rows {
  access rows[R][ACCESSES];
  real alpha[R];

  __device__ __forceinline__ void load(const store* u, const store* strengths, int from, int rank, int dim) {
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const bool there = !MANY || from + k < rank;
#pragma unroll
      for (int a = 0; a < ACCESSES; ++a) {
        if (there && channel(a) < dim) {
          rows[k][a] = *(const access*)(u + (i64)(from + k) * dim + channel(a));
        } else {
#pragma unroll
          for (int e = 0; e < EACH; ++e) rows[k][a].v[e] = narrow(0);
        }
      }
      alpha[k] = there ? widen(strengths[from + k]) : (real)0;
    }
  }
  __device__ __forceinline__ real at(int k, int v) const { return widen(rows[k][v / EACH].v[v % EACH]); }
};

// alpha_i a_i from the sums U x and the strictly lower part of U U^T; BACK: from the last row on.
template <bool BACK>
__device__ __forceinline__ void chain(const Rows& of, const real* sums, const real* plain, real (&a)[R]) {
#pragma unroll
  for (int n = 0; n < R; ++n) {
    const int i = BACK ? R - 1 - n : n;
    a[i] = sums[i];
    if constexpr (CHAIN) {
#pragma unroll
      for (int j = 0; j < R; ++j)
        if (BACK ? j > i : j < i) a[i] -= plain[BACK ? below(j, i) : below(i, j)] * (of.alpha[j] * a[j]);
    }
  }
}

template <int NS> __device__ __forceinline__ void plain_products(const Rows& of, real (&s)[NS]) {
  if constexpr (CHAIN) {
#pragma unroll
    for (int i = 1; i < R; ++i)
#pragma unroll
      for (int j = 0; j < i; ++j)
#pragma unroll
        for (int v = 0; v < VALUES; ++v) s[NS - PLAINS + below(i, j)] += of.at(i, v) * of.at(j, v);
  }
}

// a_i for what is seen as `seen`, in place of `a`; shared memory is free again after the next barrier of the group.
template <bool BACK>
__device__ __forceinline__ void project(const Rows& of, const real (&seen)[VALUES], real* memory, real (&a)[R]) {
  real s[R + PLAINS];
#pragma unroll
  for (int i = 0; i < R + PLAINS; ++i) s[i] = 0;
#pragma unroll
  for (int k = 0; k < R; ++k)
#pragma unroll
    for (int v = 0; v < VALUES; ++v) s[k] += of.at(k, v) * seen[v];
  plain_products(of, s);
  const real* sums = group_sums<R + PLAINS, GROUP>(s, memory);
  chain<BACK>(of, sums, sums + R, a);
}

// v += sign * sum_k alpha_k a_k u_k
template <int SIGN> __device__ __forceinline__ void add(const Rows& of, const real (&a)[R], real (&v)[VALUES]) {
#pragma unroll
  for (int k = 0; k < R; ++k) {
    const real strength = SIGN * of.alpha[k] * a[k];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) v[i] += strength * of.at(k, i);
  }
}

#define STEPS_OF_BLOCK (THREADS / GROUP)

// u (steps, rank, dim), alpha (steps, rank), x and y (steps, dim)
extern "C" __global__ void __launch_bounds__(THREADS)
low_rank_apply(const store* __restrict__ u, const store* __restrict__ alpha, const store* __restrict__ x,
               store* __restrict__ y, i64 steps, int rank, int dim) {
  SHARED(memory);
  const int group = threadIdx.x / GROUP;
  real* sums = (real*)memory + group * sums_size<R + PLAINS, GROUP>();
  const i64 t = (i64)blockIdx.x * STEPS_OF_BLOCK + group;
  if (t >= steps) return;  // a whole warp; a group that is a block has a step
  const store *rows = u + t * rank * dim, *strengths = alpha + t * rank;
  const int tiles = MANY ? (rank + R - 1) / R : 1;
  real v[VALUES], out[VALUES], a[R];
  load(v, x + t * dim, dim);
#pragma unroll
  for (int i = 0; i < VALUES; ++i) out[i] = v[i];
  for (int n = 0; n < tiles; ++n) {
    Rows of;
    of.load(rows, strengths, (REVERSED ? tiles - 1 - n : n) * R, rank, dim);
    project<REVERSED>(of, v, sums, a);
    add<-1>(of, a, PRODUCT ? v : out);
    if constexpr (MANY) group_barrier<GROUP>();
  }
  write(y + t * dim, PRODUCT ? v : out, dim);
}

// `kept` has room for `rank` numbers per group where MANY
extern "C" __global__ void __launch_bounds__(THREADS)
low_rank_cotangent(const store* __restrict__ u, const store* __restrict__ alpha, const store* __restrict__ x,
                   const store* __restrict__ ybar, store* __restrict__ u_bar, store* __restrict__ alpha_bar, i64 steps,
                   int rank, int dim) {
  SHARED(memory);
  constexpr int SUMS = 2 * R + PLAINS;
  const int group = threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
  real* sums = (real*)memory + group * sums_size<SUMS, GROUP>();
  const i64 t = (i64)blockIdx.x * STEPS_OF_BLOCK + group;
  if (t >= steps) return;
  const store *rows = u + t * rank * dim, *strengths = alpha + t * rank;
  const int tiles = MANY ? (rank + R - 1) / R : 1;
  real* kept = (real*)memory + STEPS_OF_BLOCK * sums_size<SUMS, GROUP>() + group * tiles * R;
  real d[VALUES], e[VALUES], a[R], b[R];
  load(d, x + t * dim, dim);
  load(e, ybar + t * dim, dim);
  if constexpr (MANY && PRODUCT) {  // what every tile of reflections sees
    for (int n = 0; n + 1 < tiles; ++n) {
      Rows of;
      of.load(rows, strengths, n * R, rank, dim);
      project<false>(of, d, sums, a);
      add<-1>(of, a, d);
#pragma unroll
      for (int k = 0; k < R; ++k)
        if (lane == k) kept[n * R + k] = a[k];
      group_barrier<GROUP>();
    }
  }
  for (int n = tiles - 1; n >= 0; --n) {
    Rows of;
    of.load(rows, strengths, n * R, rank, dim);
    if constexpr (MANY && PRODUCT) {
      if (n + 1 < tiles) {  // back to what this tile has seen
#pragma unroll
        for (int k = 0; k < R; ++k) a[k] = kept[n * R + k];
        add<1>(of, a, d);
      }
    }
    real s[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) s[i] = 0;
#pragma unroll
    for (int k = 0; k < R; ++k)
#pragma unroll
      for (int v = 0; v < VALUES; ++v) {
        s[k] += of.at(k, v) * d[v];
        s[R + k] += of.at(k, v) * e[v];
      }
    plain_products(of, s);
    const real* totals = group_sums<SUMS, GROUP>(s, sums);
    chain<false>(of, totals, totals + 2 * R, a);
    chain<true>(of, totals + R, totals + 2 * R, b);
#pragma unroll
    for (int k = 0; k < R; ++k)
      if (lane == k && (!MANY || n * R + k < rank)) alpha_bar[t * rank + n * R + k] = narrow(-a[k] * b[k]);
#pragma unroll
    for (int c = 0; c < ACCESSES; ++c) {
      access out[R];
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int v = c * EACH + i;
        real after[R], before = d[v];  // e^(k) and d^(k)
        after[R - 1] = e[v];
        if constexpr (PRODUCT) {
#pragma unroll
          for (int k = R - 1; k > 0; --k) after[k - 1] = after[k] - of.alpha[k] * b[k] * of.at(k, v);
          if constexpr (MANY) e[v] = after[0] - of.alpha[0] * b[0] * of.at(0, v);
        }
#pragma unroll
        for (int k = 0; k < R; ++k) {
          const real seen = PRODUCT ? after[k] : e[v];
          out[k].v[i] = narrow(-of.alpha[k] * (a[k] * seen + b[k] * before));
          if constexpr (PRODUCT) before -= of.alpha[k] * a[k] * of.at(k, v);
        }
      }
      if (channel(c) < dim) {
#pragma unroll
        for (int k = 0; k < R; ++k)
          if (!MANY || n * R + k < rank) *(access*)(u_bar + (t * rank + n * R + k) * dim + channel(c)) = out[k];
      }
    }
    if constexpr (MANY) group_barrier<GROUP>();
  }
}
