// One application of FP-Mamba's map to all steps at once, but for the scan over time: rows (b, t) one by one; (M) of
// section 5 of docs/mathematics.md, with a mixer of rank one made from arguments (mamba.cuh).
//
//     mix:   u' = x - alpha u (u . d) with d = x - y, and B, C of unit length
//     norm:  y = weight * n + bias,  n = (v - mean v) / sqrt(var v + eps),  v = gate o
//
// and their adjoints, which make again what they need. A block takes a row, or in `norm_rows_vjp` rows one after the other,
// whose cotangents of weight and bias it adds up in registers. Memory traffic: every array once.
//
// Macros: of mamba.cuh, with RANK 1.
#include "mamba.cuh"

struct Unit {
  real v[CHANNELS], argument[CHANNELS];
};

// What a row's argument becomes before it is scaled, and sums of its square and of its products with one and two others.
template <int N, class Other>
__device__ __forceinline__ const real* unit_sums(const Arguments& of, i64 row, int dim, Unit& one, Other other, real* room) {
  real sums[N] = {};
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    one.v[c] = one.argument[c] = 0;
    if (d < dim) {
      one.argument[c] = of.from(of.mixer, row, of.stride, of.at_mixer, row, d);
      one.v[c] = activate(one.argument[c]);
      sums[0] += one.v[c] * one.v[c];
#pragma unroll
      for (int k = 1; k < N; ++k) sums[k] += one.v[c] * other(k, c, d);
    }
  }
  return group_sums<N, THREADS>(sums, room);
}

// mixer, b, c and fed as of `Arguments`, but fed (B T, width) is of all steps; x, y, mixed (B, T, D); B, C (B, T, N)
extern "C" __global__ void __launch_bounds__(THREADS)
mix_rows(const store* mixer, const store* b, const store* c_, const store* fed, int width, int stride, int at_mixer, int at_b, int at_c,
         const store* x, const store* y, int dim, int size, double alpha_max, double unit_eps, double bc_eps, store* mixed,
         store* B, store* C) {
  SHARED(memory);
  const i64 row = blockIdx.x;
  const Arguments of = {mixer, b, c_, fed, width, stride, at_mixer, at_b, at_c};
  Unit one;
  real gap[CHANNELS];
  const real* sums = unit_sums<2>(of, row, dim, one, [&](int, int c, int d) {
    return gap[c] = widen(x[row * dim + d]) - widen(y[row * dim + d]);
  }, (real*)memory);
  const real inverse = 1 / larger(sqrt(sums[0]), (real)unit_eps);
  const real strength = (real)alpha_max * sigmoid(of.from(mixer, row, stride, at_mixer, row, dim));
  const real along = strength * inverse * inverse * sums[1];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    if (d < dim) mixed[row * dim + d] = narrow(widen(x[row * dim + d]) - along * one.v[c]);
  }
  const int lane = threadIdx.x % 32;
  for (int which = threadIdx.x / 32; which < 2; which += THREADS / 32) {
    const store* own = which ? c_ : b;
    const int at = which ? at_c : at_b;
    real total = 0;
    for (int n = lane; n < size; n += 32) {
      const real v = of.from(own, row, size, at, row, n);
      total += v * v;
    }
    total = warp_total(total);
    const real scale = bc_eps < 0 ? (real)1 : 1 / larger(sqrt(total), (real)bc_eps);
    for (int n = lane; n < size; n += 32)
      (which ? C : B)[row * size + n] = narrow(of.from(own, row, size, at, row, n) * scale);
  }
}

// mixed_bar (B, T, D), B_bar and C_bar (B, T, N) to the cotangents of x, of the arguments and of `fed`
extern "C" __global__ void __launch_bounds__(THREADS)
mix_rows_vjp(const store* mixer, const store* b, const store* c_, const store* fed, int width, int stride, int at_mixer, int at_b,
             int at_c, const store* x, const store* y, int dim, int size, double alpha_max, double unit_eps, double bc_eps,
             const store* mixed_bar, const store* B_bar, const store* C_bar, store* x_bar, store* mixer_bar,
             store* b_bar, store* c_bar, store* fed_bar) {
  SHARED(memory);
  const i64 row = blockIdx.x;
  const Arguments of = {mixer, b, c_, fed, width, stride, at_mixer, at_b, at_c};
  Unit one;
  real gap[CHANNELS], e[CHANNELS];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    gap[c] = d < dim ? widen(x[row * dim + d]) - widen(y[row * dim + d]) : (real)0;
    e[c] = d < dim ? widen(mixed_bar[row * dim + d]) : (real)0;
  }
  const real* sums =
      unit_sums<3>(of, row, dim, one, [&](int k, int c, int) { return k == 1 ? gap[c] : e[c]; }, (real*)memory);
  const real length = sqrt(sums[0]), inverse = 1 / larger(length, (real)unit_eps);
  const real with_d = inverse * sums[1], with_e = inverse * sums[2];
  const real open = sigmoid(of.from(mixer, row, stride, at_mixer, row, dim)), strength = (real)alpha_max * open;
  const real turn = length >= (real)unit_eps ? -2 * strength * with_d * with_e : (real)0;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    if (d < dim) {
      const real u = one.v[c] * inverse, bar = -strength * (with_d * e[c] + with_e * gap[c]);
      const real own = activate_slope(one.argument[c]) * (bar - turn * u) * inverse;
      x_bar[row * dim + d] = narrow(e[c] - strength * with_e * u);
      mixer_bar[row * stride + d] = narrow(own);
      if (at_mixer >= 0) fed_bar[row * width + at_mixer + d] = narrow(own);
    }
  }
  for (int k = dim + 1 + threadIdx.x; k < stride; k += THREADS) {  // what is there to fill up
    mixer_bar[row * stride + k] = narrow((real)0);
    if (at_mixer >= 0) fed_bar[row * width + at_mixer + k] = narrow((real)0);
  }
  if (threadIdx.x == 0) {
    const real own = -with_e * with_d * strength * (1 - open);
    mixer_bar[row * stride + dim] = narrow(own);
    if (at_mixer >= 0) fed_bar[row * width + at_mixer + dim] = narrow(own);
  }
  const int lane = threadIdx.x % 32;
  for (int which = threadIdx.x / 32; which < 2; which += THREADS / 32) {
    const store *own = which ? c_ : b, *bar = which ? C_bar : B_bar;
    const int at = which ? at_c : at_b;
    real total = 0, back = 0;
    for (int n = lane; n < size; n += 32) {
      const real v = of.from(own, row, size, at, row, n);
      total += v * v;
      back += v * widen(bar[row * size + n]);
    }
    const real its = sqrt(warp_total(total)), scale = bc_eps < 0 ? (real)1 : 1 / larger(its, (real)bc_eps);
    back = warp_total(back) * scale;
    if (bc_eps < 0 || its < (real)bc_eps) back = 0;
    for (int n = lane; n < size; n += 32) {
      const real v = of.from(own, row, size, at, row, n) * scale;
      const real found = (widen(bar[row * size + n]) - back * v) * scale;
      (which ? c_bar : b_bar)[row * size + n] = narrow(found);
      if (at >= 0) fed_bar[row * width + at + n] = narrow(found);
    }
  }
}

// v = gate o of a row, centred, and the scale of its norm
__device__ __forceinline__ real normal(const store* o, const store* gate, i64 row, int dim, real eps, real (&v)[CHANNELS],
                                       real* first, real* second) {
  real total[1] = {0}, squares[1] = {0};
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    v[c] = d < dim ? widen(o[row * dim + d]) * (GATED ? widen(gate[row * dim + d]) : (real)1) : (real)0;
    total[0] += v[c];
  }
  real middle = 0;
  if constexpr (MODE == 2) middle = group_sums<1, THREADS>(total, first)[0] / (real)dim;
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    v[c] = d < dim ? v[c] - middle : (real)0;
    squares[0] += v[c] * v[c];
  }
  return MODE ? inverse_root(group_sums<1, THREADS>(squares, second)[0] / (real)dim + eps) : (real)1;
}

// o, gate, y (B, T, D); weight, bias (D), bias null for zero
extern "C" __global__ void __launch_bounds__(THREADS)
norm_rows(const store* o, const store* gate, const store* weight, const store* bias, int dim, double eps, store* y) {
  SHARED(memory);
  real *first = (real*)memory, *second = first + sums_size<1, THREADS>(), v[CHANNELS];
  const i64 row = blockIdx.x;
  const real scale = normal(o, gate, row, dim, (real)eps, v, first, second);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    if (d < dim) y[row * dim + d] = narrow(widen(weight[d]) * (v[c] * scale) + (bias ? widen(bias[d]) : (real)0));
  }
}

// The cotangents of o and of the gate; of each block those of weight and bias (blocks, D)
extern "C" __global__ void __launch_bounds__(THREADS)
norm_rows_vjp(const store* o, const store* gate, const store* weight, const store* y_bar, i64 rows, int dim, double eps,
              store* o_bar, store* gate_bar, store* weight_bar, store* bias_bar) {
  SHARED(memory);
  real *first = (real*)memory, *second = first + sums_size<1, THREADS>(), *third = second + sums_size<1, THREADS>();
  real weights[CHANNELS] = {}, biases[CHANNELS] = {};
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    __syncthreads();  // sums of the row before have been read
    real v[CHANNELS], inner[CHANNELS], sums[2] = {0, 0};
    const real scale = normal(o, gate, row, dim, (real)eps, v, first, second);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      inner[c] = 0;
      if (d < dim) {
        const real bar = widen(y_bar[row * dim + d]);
        inner[c] = bar * widen(weight[d]);
        sums[0] += inner[c];
        sums[1] += inner[c] * v[c];
        weights[c] += bar * v[c] * scale;
        biases[c] += bar;
      }
    }
    const real* found = group_sums<2, THREADS>(sums, third);
    const real middle = MODE == 2 ? found[0] / (real)dim : (real)0;
    const real along = MODE ? found[1] / (real)dim * scale * scale : (real)0;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      if (d < dim) {
        const real v_bar = scale * (inner[c] - middle - v[c] * along);
        o_bar[row * dim + d] = narrow(GATED ? v_bar * widen(gate[row * dim + d]) : v_bar);
        if (GATED) gate_bar[row * dim + d] = narrow(v_bar * widen(o[row * dim + d]));
      }
    }
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    if (d < dim) {
      weight_bar[(i64)blockIdx.x * dim + d] = narrow(weights[c]);
      bias_bar[(i64)blockIdx.x * dim + d] = narrow(biases[c]);
    }
  }
}
