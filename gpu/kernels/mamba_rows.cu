// One application of FP-Mamba's map to all steps at once, but for the scan over time: rows (b, t) one by one; (M) of
// section 5 of docs/mathematics.md, with a mixer of rank one made from arguments (mamba.cuh).
//
//     mix:   u' = x - alpha u (u . d) with d = x - y, and B, C of unit length
//     norm:  y = weight * n + bias,  n = (v - mean v) / sqrt(var v + eps),  v = gate o
//
// and their adjoints, which make again what they need. `norm_rows` makes a damped step of the iteration with it, and tells how far
// that goes, as map_advance.cu. A block takes a row, or in `norm_rows_vjp` rows one after the other, whose cotangents of weight
// and bias it adds up in registers. Memory traffic: every array once.
//
// Macros: of told.cuh, with RANK 1; EACH neighbouring channels of an access, of which a thread has CHANNELS / EACH.
#include "packs.cuh"
#include "told.cuh"

constexpr int PACKED = CHANNELS / EACH;
// Of a thread's c-th access, the first channel.
__device__ __forceinline__ int channel(int c) { return (c * THREADS + (int)threadIdx.x) * EACH; }

// Arguments of a row: of alpha, and EACH of the vector's.
__device__ __forceinline__ real strength_of(const Told& of, i64 row, int dim) {
  const real v = widen(of.mixer[row * of.stride + dim]);
  return sigmoid(of.sees(of.at_mixer) ? v + widen(of.fed[row * of.width + of.at_mixer + dim]) : v);
}
__device__ __forceinline__ void vector_of(const Told& of, i64 row, int d, real (&v)[EACH]) {
  load(of.mixer + row * of.stride + d, v);
  if (of.sees(of.at_mixer)) {
    real more[EACH];
    load(of.fed + row * of.width + of.at_mixer + d, more);
#pragma unroll
    for (int e = 0; e < EACH; ++e) v[e] += more[e];
  }
}

// x, y, mixed (B, T, D), y null for zero; B, C (B, T, N)
extern "C" __global__ void __launch_bounds__(THREADS)
mix_rows(const said* mixer, const store* b, const store* c_, const said* fed, int width, int stride, int at_mixer, int at_b, int at_c,
         const store* x, const store* y, int dim, int size, double alpha_max, double unit_eps, double bc_eps, store* mixed,
         store* B, store* C) {
  SHARED(memory);
  const i64 row = blockIdx.x;
  const Told of = {mixer, b, c_, fed, width, stride, at_mixer, at_b, at_c};
  real v[PACKED][EACH], own[PACKED][EACH], sums[2] = {};
#pragma unroll
  for (int c = 0; c < PACKED; ++c) {
    const int d = channel(c);
    if (d < dim) {
      real was[EACH];
      vector_of(of, row, d, v[c]);
      load(x + row * dim + d, own[c]);
      if (y) load(y + row * dim + d, was);
      else clear(was);
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        v[c][e] = activate(v[c][e]);
        sums[0] += v[c][e] * v[c][e];
        sums[1] += v[c][e] * (own[c][e] - was[e]);
      }
    }
  }
  const real strength = (real)alpha_max * strength_of(of, row, dim);
  const real* totals = group_sums<2, THREADS>(sums, (real*)memory);
  const real inverse = 1 / larger(sqrt(totals[0]), (real)unit_eps), along = strength * inverse * inverse * totals[1];
#pragma unroll
  for (int c = 0; c < PACKED; ++c) {
    const int d = channel(c);
    if (d < dim) {
#pragma unroll
      for (int e = 0; e < EACH; ++e) own[c][e] -= along * v[c][e];
      save(mixed + row * dim + d, own[c]);
    }
  }
  const int lane = threadIdx.x % 32;
  for (int which = threadIdx.x / 32; which < 2; which += THREADS / 32) {
    real total = 0;
    for (int n = lane; n < size; n += 32) {
      const real part = of.of_row(which, row, size, n);
      total += part * part;
    }
    total = warp_total(total);
    const real scale = bc_eps < 0 ? (real)1 : 1 / larger(sqrt(total), (real)bc_eps);
    for (int n = lane; n < size; n += 32) (which ? C : B)[row * size + n] = narrow(of.of_row(which, row, size, n) * scale);
  }
}

// mixed_bar (B, T, D), B_bar and C_bar (B, T, N) to the cotangents of x, and to those of all arguments in one: told_bar (B T, told)
// has them from `to_mixer` on, stride of them, from `to_b` on and from `to_c` on.
extern "C" __global__ void __launch_bounds__(THREADS)
mix_rows_vjp(const said* mixer, const store* b, const store* c_, const said* fed, int width, int stride, int at_mixer, int at_b,
             int at_c, const store* x, const store* y, int dim, int size, double alpha_max, double unit_eps, double bc_eps,
             const store* mixed_bar, const store* B_bar, const store* C_bar, store* x_bar, said* told_bar, int told, int to_mixer,
             int to_b, int to_c) {
  SHARED(memory);
  const i64 row = blockIdx.x;
  const Told of = {mixer, b, c_, fed, width, stride, at_mixer, at_b, at_c};
  real argument[PACKED][EACH], gap[PACKED][EACH], e_[PACKED][EACH], sums[3] = {};
#pragma unroll
  for (int c = 0; c < PACKED; ++c) {
    const int d = channel(c);
    if (d < dim) {
      real was[EACH];
      vector_of(of, row, d, argument[c]);
      load(x + row * dim + d, gap[c]);
      if (y) load(y + row * dim + d, was);
      else clear(was);
      load(mixed_bar + row * dim + d, e_[c]);
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const real v = activate(argument[c][e]);
        gap[c][e] -= was[e];
        sums[0] += v * v;
        sums[1] += v * gap[c][e];
        sums[2] += v * e_[c][e];
      }
    }
  }
  const real open = strength_of(of, row, dim), strength = (real)alpha_max * open;
  const real* totals = group_sums<3, THREADS>(sums, (real*)memory);
  const real length = sqrt(totals[0]), inverse = 1 / larger(length, (real)unit_eps);
  const real with_d = inverse * totals[1], with_e = inverse * totals[2];
  const real turn = length >= (real)unit_eps ? -2 * strength * with_d * with_e : (real)0;
  said* const out = told_bar + row * told;
#pragma unroll
  for (int c = 0; c < PACKED; ++c) {
    const int d = channel(c);
    if (d < dim) {
      real own[EACH];
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const real u = activate(argument[c][e]) * inverse, bar = -strength * (with_d * e_[c][e] + with_e * gap[c][e]);
        own[e] = activate_slope(argument[c][e]) * (bar - turn * u) * inverse;
        e_[c][e] -= strength * with_e * u;
      }
      save(x_bar + row * dim + d, e_[c]);
      save(out + to_mixer + d, own);
    }
  }
  for (int k = dim + 1 + threadIdx.x; k < stride; k += THREADS) out[to_mixer + k] = to_said(0);  // what is there to fill up
  if (threadIdx.x == 0) out[to_mixer + dim] = to_said(-with_e * with_d * strength * (1 - open));
  const int lane = threadIdx.x % 32;
  for (int which = threadIdx.x / 32; which < 2; which += THREADS / 32) {
    const store* bar = which ? C_bar : B_bar;
    real total = 0, back = 0;
    for (int n = lane; n < size; n += 32) {
      const real v = of.of_row(which, row, size, n);
      total += v * v;
      back += v * widen(bar[row * size + n]);
    }
    const real its = sqrt(warp_total(total)), scale = bc_eps < 0 ? (real)1 : 1 / larger(its, (real)bc_eps);
    back = warp_total(back) * scale;
    if (bc_eps < 0 || its < (real)bc_eps) back = 0;
    for (int n = lane; n < size; n += 32) {
      const real v = of.of_row(which, row, size, n) * scale;
      out[(which ? to_c : to_b) + n] = to_said((widen(bar[row * size + n]) - back * v) * scale);
    }
  }
}

// v = gate o of a row, centred, and the scale of its norm. Warps find mean and squares of their own channels, and put those
// together (Chan, Golub, LeVeque), so that the block meets once. `room` has two a warp.
__device__ __forceinline__ real normal(const store* o, const store* gate, i64 row, int dim, real eps, real (&v)[PACKED][EACH],
                                       real* room) {
  constexpr int WARPS = THREADS / 32;
  const int warp = threadIdx.x / 32;
  real total = 0;
#pragma unroll
  for (int c = 0; c < PACKED; ++c) {
    const int d = channel(c);
    clear(v[c]);
    if (d < dim) {
      load(o + row * dim + d, v[c]);
      if constexpr (GATED) {
        real open[EACH];
        load(gate + row * dim + d, open);
#pragma unroll
        for (int e = 0; e < EACH; ++e) v[c][e] *= open[e];
      }
#pragma unroll
      for (int e = 0; e < EACH; ++e) total += v[c][e];
    }
  }
  if constexpr (MODE == 0) return 1;
  auto channels = [&](int w) {
    int count = 0;
#pragma unroll
    for (int c = 0; c < PACKED; ++c) {
      const int left = dim - (c * THREADS + w * 32) * EACH;
      count += left < 0 ? 0 : left < 32 * EACH ? left : 32 * EACH;
    }
    return count;
  };
  const int own = channels(warp);
  const real middle = MODE == 2 && own > 0 ? warp_total(total) / (real)own : (real)0;
  real squares = 0;
#pragma unroll
  for (int c = 0; c < PACKED; ++c)
#pragma unroll
    for (int e = 0; e < EACH; ++e)
      if (channel(c) < dim) squares += (v[c][e] - middle) * (v[c][e] - middle);
  squares = warp_total(squares);
  if (threadIdx.x % 32 == 0) {
    room[2 * warp] = middle;
    room[2 * warp + 1] = squares;
  }
  __syncthreads();
  real mean = 0, all = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    if (MODE == 2) mean += room[2 * w] * (real)channels(w);
    all += room[2 * w + 1];
  }
  mean /= (real)dim;
  if constexpr (MODE == 2) {
#pragma unroll
    for (int w = 0; w < WARPS; ++w) all += (real)channels(w) * (room[2 * w] - mean) * (room[2 * w] - mean);
#pragma unroll
    for (int c = 0; c < PACKED; ++c)
#pragma unroll
      for (int e = 0; e < EACH; ++e)
        if (channel(c) < dim) v[c][e] -= mean;
  }
  return inverse_root(all / (real)dim + eps);
}

// o, gate, h, next (B, T, D), h null for zero; weight, bias (D), bias null for zero; pace (B) or null, and numbers (B T, 2), of the
// damped step from h: as map_advance.cu has them. Without, `next` is the norm. before (B, T, D) or null: `next` one step later.
extern "C" __global__ void __launch_bounds__(THREADS)
norm_rows(const store* o, const store* gate, const store* weight, const store* bias, const store* h, const store* pace, i64 steps,
          int dim, double eps, int published, store* next, said* before, store* numbers) {
  SHARED(memory);
  real *room = (real*)memory, *another = room + 2 * (THREADS / 32);
  real v[PACKED][EACH], was[PACKED][EACH], moved = 0, size = 0;
  const i64 row = blockIdx.x;
  const bool handed = before != nullptr && row % steps + 1 < steps;
  const real go = pace ? widen(pace[row / steps]) : (real)1;
  const bool rests = go < 0;  // the same in the whole block
#pragma unroll
  for (int c = 0; c < PACKED; ++c) {
    clear(was[c]);
    if (h && channel(c) < dim) load(h + row * dim + channel(c), was[c]);
  }
  const real scale = rests ? (real)1 : normal(o, gate, row, dim, (real)eps, v, room);
#pragma unroll
  for (int c = 0; c < PACKED; ++c) {
    const int d = channel(c);
    if (d < dim) {
      real its[EACH], shift[EACH];
      clear(shift);
      if (!rests) {
        load(weight + d, its);
        if (bias) load(bias + d, shift);
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          const real value = its[e] * (v[c][e] * scale) + shift[e];
          if (pace) {
            const real change = value - was[c][e], proposal = was[c][e] + go * change;
            moved = most(moved, magnitude(change));
            size = most(size, magnitude(published ? value : proposal));
            was[c][e] = proposal;
          } else {
            was[c][e] = value;
          }
        }
      }
      save(next + row * dim + d, was[c]);
      if (handed) save(before + (row + 1) * dim + d, was[c]);
    }
  }
  if (numbers) {
    block_most(moved, size, another);
    if (threadIdx.x == 0) {
      numbers[2 * row] = narrow(published ? moved / (size + (real)1e-8) : moved);
      numbers[2 * row + 1] = narrow(published ? (real)0 : size);
    }
  }
}

// The cotangents of o and of the gate; of each block those of weight and bias (blocks, D)
extern "C" __global__ void __launch_bounds__(THREADS)
norm_rows_vjp(const store* o, const store* gate, const store* weight, const store* y_bar, i64 rows, int dim, double eps,
              store* o_bar, store* gate_bar, store* weight_bar, store* bias_bar) {
  SHARED(memory);
  real *room = (real*)memory, *sums_room = room + 2 * (THREADS / 32);
  real weights[PACKED][EACH] = {}, biases[PACKED][EACH] = {};
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    real v[PACKED][EACH], inner[PACKED][EACH], bar[PACKED][EACH], sums[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < PACKED; ++c) {
      clear(bar[c]);
      if (channel(c) < dim) load(y_bar + row * dim + channel(c), bar[c]);
    }
    if (MODE == 0) __syncthreads();  // sums of the row before have been read
    const real scale = normal(o, gate, row, dim, (real)eps, v, room);
#pragma unroll
    for (int c = 0; c < PACKED; ++c) {
      const int d = channel(c);
      clear(inner[c]);
      if (d < dim) {
        real its[EACH];
        load(weight + d, its);
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          inner[c][e] = bar[c][e] * its[e];
          sums[0] += inner[c][e];
          sums[1] += inner[c][e] * v[c][e];
          weights[c][e] += bar[c][e] * v[c][e] * scale;
          biases[c][e] += bar[c][e];
        }
      }
    }
    const real* found = group_sums<2, THREADS>(sums, sums_room);
    const real middle = MODE == 2 ? found[0] / (real)dim : (real)0;
    const real along = MODE ? found[1] / (real)dim * scale * scale : (real)0;
#pragma unroll
    for (int c = 0; c < PACKED; ++c) {
      const int d = channel(c);
      if (d < dim) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) inner[c][e] = scale * (inner[c][e] - middle - v[c][e] * along);
        if constexpr (GATED) {
          real open[EACH], own[EACH];
          load(gate + row * dim + d, open);
          load(o + row * dim + d, own);
#pragma unroll
          for (int e = 0; e < EACH; ++e) {
            own[e] *= inner[c][e];
            inner[c][e] *= open[e];
          }
          save(gate_bar + row * dim + d, own);
        }
        save(o_bar + row * dim + d, inner[c]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < PACKED; ++c) {
    const int d = channel(c);
    if (d < dim) {
      save(weight_bar + (i64)blockIdx.x * dim + d, weights[c]);
      save(bias_bar + (i64)blockIdx.x * dim + d, biases[c]);
    }
  }
}
