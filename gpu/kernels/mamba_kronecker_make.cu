// Both factors of Kronecker mixers from what a layer's linear map gives, and back; as map_kronecker.cu, which has the formulas.
//
// A block takes a factor. All threads make r; from there on a warp is alone, a row or two a lane, in registers where they are
// short, and a step of the power iteration is one way through shared memory: every lane finds the length of the vector by itself.
// What the way back needs of that, the trail of a factor, is made from kept arguments for many steps at once, so that only what
// depends on cotangents is left for the step in hand:
//
//     r (EDGE, EDGE);  its rows' norms (EDGE);  x_0 to x_16, then r x_16 (18, EDGE);  r^T x_1 to r^T x_16 (16, EDGE);
//     the lengths of r x_0 to r x_15 (16);  the divisor
//
// THREADS is that of a factor.
#include "mamba_kronecker.cuh"

// Where the parts of a trail begin, and how long it is.
__device__ constexpr int trail_norms(int edge) { return edge * edge; }
__device__ constexpr int trail_vectors(int edge) { return trail_norms(edge) + edge; }
__device__ constexpr int trail_turned(int edge) { return trail_vectors(edge) + (STEPS + 2) * edge; }
__device__ constexpr int trail_lengths(int edge) { return trail_turned(edge) + STEPS * edge; }
__device__ constexpr int trail_size(int edge) { return trail_lengths(edge) + STEPS + 1; }
constexpr int TRAIL = trail_size(EDGE1) + trail_size(EDGE2);

// The sum over the four threads of a row.
__device__ __forceinline__ real quarters_total(real v) {
  v += __shfl_xor_sync(EVERY_LANE, v, 1);
  return v + __shfl_xor_sync(EVERY_LANE, v, 2);
}

template <int EDGE, bool FLIP, class Argument>
__device__ __forceinline__ void make(real* memory, Argument argument, int at_entries, int at_diagonal, real start, real eps,
                                     real scale, store* k_out, store* trail) {
  constexpr int S = pitch(EDGE), LONG = up(EDGE, PIECE);
  real *upper = memory, *r = upper + matrix(EDGE, EDGE), *vectors = r + matrix(EDGE, EDGE);  // STEPS + 2 of LONG, then two to take turns
  real *turns = vectors + (STEPS + 2) * LONG, *open = turns + 2 * LONG, *told = open + LONG;
  fill<EDGE>(upper, open, argument, at_entries, at_diagonal);
  for (int i = threadIdx.x; i < LONG; i += THREADS) turns[i] = turns[LONG + i] = 0;
  __syncthreads();
  whole_product<EDGE, EDGE, EDGE, WARPS>(upper, S, upper, S, [&](int i, int j, real c) { r[i * S + j] = c; });
  __syncthreads();
  if (threadIdx.x < 32) {
    const real divisor = strongest<EDGE>(
        r, turns, start, eps,
        [&](int i, real norm, real inverse) {
          if (trail) trail[trail_norms(EDGE) + i] = narrow(norm);
#pragma unroll
          for (int k = 0; k < LONG; k += PIECE) {
            piece_of_row some = *(const piece_of_row*)(r + i * S + k);
#pragma unroll
            for (int e = 0; e < PIECE; ++e) some.v[e] *= inverse;
            *(piece_of_row*)(r + i * S + k) = some;
          }
        },
        [&](int l, int i, real v) { vectors[l * LONG + i] = v; },
        [&](int l, real length) {
          if (trail) trail[trail_lengths(EDGE) + l] = narrow(length);
        });
    if (threadIdx.x == 0) told[0] = divisor;
  }
  __syncthreads();
  const real whole = scale / told[0];
  for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
    const int i = FLIP ? at % EDGE : at / EDGE, j = FLIP ? at / EDGE : at % EDGE;
    k_out[at] = narrow(whole * open[i] * r[i * S + j]);
  }
  if (trail) {
    for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) trail[at] = narrow(r[at / EDGE * S + at % EDGE]);
    if (threadIdx.x == 0) trail[trail_lengths(EDGE) + STEPS] = narrow(told[0]);
    if constexpr (SPECTRAL) {
      for (int at = threadIdx.x; at < (STEPS + 2) * EDGE; at += THREADS)
        trail[trail_vectors(EDGE) + at] = narrow(vectors[at / EDGE * LONG + at % EDGE]);
      for (int at = threadIdx.x; at < STEPS * EDGE; at += THREADS) {
        const int l = at / EDGE, j = at % EDGE;
        real total = 0;
#pragma unroll 4
        for (int i = 0; i < EDGE; ++i) total += vectors[(l + 1) * LONG + i] * r[i * S + j];
        trail[trail_turned(EDGE) + at] = narrow(total);
      }
    }
  }
}

// For steps `first` to first + count of all sequences, two blocks each: mixer (B, T, stride) as in Arguments; arguments (B, T,
// OUTPUTS) or null, factors (count, B, FACTORS) and trails (count, B, TRAIL) or null are written.
// Shared memory: twice a matrix, STEPS + 5 of its rows, and a few numbers, for the larger edge.
extern "C" __global__ void __launch_bounds__(THREADS)
mamba_kronecker_make(const store* mixer, const store* fed, i64 batch, i64 steps, i64 first, int width, int stride, int at_mixer,
                     double start, double eps, double alpha_max, store* arguments, store* factors, store* trails) {
  SHARED(memory);
  const i64 place = blockIdx.x / 2, b = place % batch, row = b * steps + first + place / batch;
  const Arguments of = {mixer, nullptr, nullptr, fed, width, stride, at_mixer, -1, -1};
  auto argument = [&](int k) {
    const real v = of.from(mixer, row, stride, at_mixer, b, k);
    if (arguments) arguments[row * OUTPUTS + k] = narrow(v);
    return v;
  };
  store *k = factors + place * FACTORS, *trail = trails ? trails + place * TRAIL : nullptr;
  if (blockIdx.x % 2 == 0)
    make<EDGE1, true>((real*)memory, argument, 0, ENTRIES, (real)start, (real)eps, (real)alpha_max, k, trail);
  else
    make<EDGE2, false>((real*)memory, argument, triangle(EDGE1), ENTRIES + EDGE1, (real)start, (real)eps, (real)1,
                       k + EDGE1 * EDGE1, trail ? trail + trail_size(EDGE1) : nullptr);
}

template <int EDGE, bool FLIP, class Put>
__device__ __forceinline__ void back(real* memory, const store* arguments, int at_entries, int at_diagonal, real eps, real scale,
                                     const store* k_bar, const store* trail, Put put) {
  constexpr int S = pitch(EDGE), ROWS = (EDGE + 31) / 32, LONG = up(EDGE, PIECE);
  constexpr bool HELD = EDGE <= 32;
  real *bar = memory, *r = bar + matrix(EDGE, EDGE), *across = r + matrix(EDGE, EDGE);  // the last: U^T
  real *vectors = across + matrix(EDGE, EDGE), *lefts = vectors + (STEPS + 2) * LONG;     // STEPS + 1 cotangents of r x_l
  real *turned = lefts + (STEPS + 1) * LONG, *turns = turned + STEPS * LONG, *lengths = turns + 2 * LONG, *room = lengths + STEPS + 1;
  for (int at = threadIdx.x; at < matrix(EDGE, EDGE); at += THREADS) {
    const int k = at / S, i = at % S;
    const bool inside = k < EDGE && i < EDGE;
    across[at] = inside && k >= i ? activate(widen(arguments[at_entries + i * EDGE - i * (i - 1) / 2 + k - i])) : (real)0;
    r[at] = inside ? widen(trail[k * EDGE + i]) : (real)0;
    if (!inside) bar[at] = 0;
  }
  for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
    const int i = FLIP ? at % EDGE : at / EDGE, j = FLIP ? at / EDGE : at % EDGE;
    bar[i * S + j] = widen(k_bar[at]);
  }
  if constexpr (SPECTRAL) {
    for (int at = threadIdx.x; at < (STEPS + 2) * LONG; at += THREADS)
      vectors[at] = at % LONG < EDGE ? widen(trail[trail_vectors(EDGE) + at / LONG * EDGE + at % LONG]) : (real)0;
    for (int at = threadIdx.x; at < STEPS * LONG; at += THREADS)
      turned[at] = at % LONG < EDGE ? widen(trail[trail_turned(EDGE) + at / LONG * EDGE + at % LONG]) : (real)0;
    for (int i = threadIdx.x; i < LONG; i += THREADS) turns[i] = turns[LONG + i] = 0;
  }
  for (int l = threadIdx.x; l <= STEPS; l += THREADS) lengths[l] = widen(trail[trail_lengths(EDGE) + l]);
  __syncthreads();
  // four threads a row, of which each has every fourth piece
  const int quarter = threadIdx.x % 4 * PIECE;
  const real divisor = lengths[STEPS], whole = scale / divisor;
  real inner = 0;
  for (int begin = 0; begin < EDGE; begin += THREADS / 4) {
    const int i = begin + threadIdx.x / 4;
    real total = 0;
    if (i < EDGE)
      for (int j = quarter; j < LONG; j += 4 * PIECE)
#pragma unroll
        for (int e = 0; e < PIECE; ++e) total += bar[i * S + j + e] * r[i * S + j + e];
    total = whole * quarters_total(total);
    if (i < EDGE) {
      const real open = sigmoid(widen(arguments[at_diagonal + i]));
      for (int j = quarter; j < LONG; j += 4 * PIECE)
#pragma unroll
        for (int e = 0; e < PIECE; ++e) bar[i * S + j + e] *= whole * open;
      if (quarter == 0) {
        inner += total * open;
        put(at_diagonal + i, total * open * (1 - open));
      }
    }
  }
  if constexpr (SPECTRAL) {
    inner = warp_total(inner);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = inner;
    __syncthreads();
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      real sum = 0;
#pragma unroll
      for (int w = 0; w < THREADS / 32; ++w) sum += room[w];
      const real sigma_bar = -sum / divisor;
      // sigma = x_15^T r x_16, and x_{l+1} = r x_l / ||r x_l||, backwards
      real column[HELD ? LONG : 1];
      if constexpr (HELD)
#pragma unroll
        for (int i = 0; i < LONG; ++i) column[i] = lane < EDGE ? r[i * S + lane] : (real)0;
#pragma unroll
      for (int o = 0; o < ROWS; ++o) {
        const int j = lane + 32 * o;
        if (j < EDGE) {
          turns[j] = sigma_bar * turned[(STEPS - 2) * LONG + j];
          lefts[STEPS * LONG + j] = sigma_bar * vectors[(STEPS - 1) * LONG + j];
        }
      }
      __syncwarp();
      for (int l = STEPS - 1; l >= 0; --l) {
        const real *x_bar = turns + (l + 1) % 2 * LONG, *to = vectors + (l + 1) * LONG;
        real *next = turns + l % 2 * LONG, along = 0, sum[ROWS] = {};
#pragma unroll 8
        for (int k = 0; k < LONG; k += PIECE) {
          const piece_of_row some = *(const piece_of_row*)(x_bar + k), its = *(const piece_of_row*)(to + k);
#pragma unroll
          for (int e = 0; e < PIECE; ++e) {
            along += some.v[e] * its.v[e];
            if constexpr (HELD) {
              sum[0] += column[k + e] * some.v[e];
            } else {
#pragma unroll
              for (int o = 0; o < ROWS; ++o)
                if (lane + 32 * o < EDGE) sum[o] += r[(k + e) * S + lane + 32 * o] * some.v[e];
            }
          }
        }
        const real inverse = 1 / larger(lengths[l], SHORTEST);
        if (!(lengths[l] >= SHORTEST)) along = 0;
#pragma unroll
        for (int o = 0; o < ROWS; ++o) {
          const int j = lane + 32 * o;
          if (j < EDGE) {
            lefts[l * LONG + j] = (x_bar[j] - along * to[j]) * inverse;
            next[j] = (sum[o] - along * turned[l * LONG + j]) * inverse +
                      (l == STEPS - 1 ? sigma_bar * vectors[(STEPS + 1) * LONG + j] : (real)0);
          }
        }
        __syncwarp();
      }
    }
  }
  __syncthreads();
  // what r has to do with the vectors, then rows of unit length backwards
  for (int begin = 0; begin < EDGE; begin += THREADS / 4) {
    const int i = begin + threadIdx.x / 4;
    real along = 0;
    if (i < EDGE)
      for (int j = quarter; j < LONG; j += 4 * PIECE) {
        piece_of_row some = *(const piece_of_row*)(bar + i * S + j);
        if constexpr (SPECTRAL)
#pragma unroll
          for (int l = 0; l <= STEPS; ++l) {
            const piece_of_row its = *(const piece_of_row*)(vectors + l * LONG + j);
            const real left = lefts[l * LONG + i];
#pragma unroll
            for (int e = 0; e < PIECE; ++e) some.v[e] += left * its.v[e];
          }
        *(piece_of_row*)(bar + i * S + j) = some;
#pragma unroll
        for (int e = 0; e < PIECE; ++e) along += some.v[e] * r[i * S + j + e];
      }
    along = quarters_total(along);
    if (i < EDGE) {
      const real norm = widen(trail[trail_norms(EDGE) + i]), inverse = 1 / larger(norm, eps);
      if (!(norm >= eps)) along = 0;
      for (int j = quarter; j < LONG; j += 4 * PIECE)
#pragma unroll
        for (int e = 0; e < PIECE; ++e) bar[i * S + j + e] = (bar[i * S + j + e] - along * r[i * S + j + e]) * inverse;
    }
  }
  __syncthreads();
  // the upper triangle of (M_bar + M_bar^T) U; r is not needed any more
  for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
    const int i = at / EDGE, j = at % EDGE;
    r[i * S + j] = bar[i * S + j] + bar[j * S + i];
  }
  __syncthreads();
  whole_product<EDGE, EDGE, EDGE, WARPS>(r, S, across, S, [&](int i, int k, real c) {
    if (k < EDGE && k >= i) {
      const int at = at_entries + i * EDGE - i * (i - 1) / 2 + k - i;
      put(at, activate_slope(widen(arguments[at])) * c);
    }
  });
}

// The step `t` of all sequences, two blocks each: factors_bar (B, FACTORS), trails (B, TRAIL); mixer_bar (B, T, stride), and
// fed_bar (B, width) of `fed` where `at_mixer` is not negative, are written.
// Shared memory: three matrices, 3 STEPS + 5 of their rows, and a few numbers, for the larger edge.
extern "C" __global__ void __launch_bounds__(THREADS)
mamba_kronecker_back(const store* arguments, const store* factors_bar, const store* trails, i64 steps, i64 t, int width, int stride,
                     int at_mixer, double eps, double alpha_max, store* mixer_bar, store* fed_bar) {
  SHARED(memory);
  const i64 b = blockIdx.x / 2, row = b * steps + t;
  auto put = [&](int k, real v) {
    mixer_bar[row * stride + k] = narrow(v);
    if (at_mixer >= 0) fed_bar[b * width + at_mixer + k] = narrow(v);
  };
  const store *own = arguments + row * OUTPUTS, *bar = factors_bar + b * FACTORS, *trail = trails + b * TRAIL;
  if (blockIdx.x % 2 == 0) {
    for (int k = OUTPUTS + threadIdx.x; k < stride; k += THREADS) put(k, 0);  // what is there to fill up
    back<EDGE1, true>((real*)memory, own, 0, ENTRIES, (real)eps, (real)alpha_max, bar, trail, put);
  } else {
    back<EDGE2, false>((real*)memory, own, triangle(EDGE1), ENTRIES + EDGE1, (real)eps, (real)1, bar + EDGE1 * EDGE1,
                       trail + trail_size(EDGE1), put);
  }
}
