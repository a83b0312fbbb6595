// Depthwise causal convolution over time, then an activation, and the adjoint:
//
//     y_t = act(i_t),  i_t = bias + sum_k taps_k x_{t-(W-1)+k},  of x before the first step `past`, or zero
//     g_t = act'(i_t) y_bar_t,  x_bar_s = sum_k taps_k g_{s+(W-1)-k},  taps_bar_k = sum_t g_t x_{t-(W-1)+k}
//
// A thread takes EACH neighbouring channels through a stretch of time of a sequence, with the last W steps in registers,
// then through other stretches; `lanes` threads lie side by side. The adjoint makes i_t again, so that the value keeps
// nothing, and every worker leaves its sums for the taps and the bias. Memory traffic: x, and y_bar, once, the W - 1 steps
// around a stretch again from the caches; y or x_bar once; of each worker W + 1 rows of sums.
//
// Macros: of maps.cuh; W, the number of taps; AHEAD, how many steps are asked for at a time.
#include "maps.cuh"

// Where a thread works: channel c, as one of `workers` who share `stretches` of each of B sequences.
struct Seat {
  int c;
  i64 worker, workers;
  __device__ Seat(int channels, int lanes) {
    const int groups = blockDim.x / lanes, across = (channels + EACH * lanes - 1) / (EACH * lanes);
    c = (blockIdx.x % across * lanes + threadIdx.x % lanes) * EACH;
    worker = (i64)(blockIdx.x / across) * groups + threadIdx.x / lanes;
    workers = (i64)(gridDim.x / across) * groups;
  }
};

struct Filter {
  const store *x, *past;
  i64 steps;
  int channels;
  real tap[W][EACH], bias[EACH];

  __device__ Filter(const store* x, const store* past, const store* taps, const store* offset, i64 steps, int channels, int c)
      : x(x), past(past), steps(steps), channels(channels) {
#pragma unroll
    for (int k = 0; k < W; ++k) load(taps + (i64)k * channels + c, tap[k]);
    load(offset + c, bias);
  }
  // x_t, also from before the first step
  __device__ __forceinline__ void step(i64 b, i64 t, int c, real (&v)[EACH]) const {
    if (t >= 0 && t < steps) load(x + (b * steps + t) * channels + c, v);
    else if (t < 0 && past) load(past + (b * (W - 1) + (W - 1) + t) * channels + c, v);
    else clear(v);
  }
  // i_t from x_{t-(W-1)} and what follows
  template <int N> __device__ __forceinline__ real inner(const real (&window)[N][EACH], int at, int e) const {
    real sum = bias[e];
#pragma unroll
    for (int k = 0; k < W; ++k) sum += tap[k][e] * window[at + k][e];
    return sum;
  }
};

template <int N> __device__ __forceinline__ void shift(real (&window)[N][EACH]) {
#pragma unroll
  for (int i = 0; i < W - 1; ++i)
#pragma unroll
    for (int e = 0; e < EACH; ++e) window[i][e] = window[i + AHEAD][e];
}

// x, y (B, T, C); past (B, W - 1, C) or null; taps (W, C); bias (C)
extern "C" __global__ void __launch_bounds__(256, 2)
conv(const store* __restrict__ x, const store* __restrict__ past, const store* __restrict__ taps,
     const store* __restrict__ bias, store* __restrict__ y, i64 batch, i64 steps, int channels, int lanes, i64 stretches) {
  const Seat p(channels, lanes);
  if (p.c >= channels) return;
  const Filter filter(x, past, taps, bias, steps, channels, p.c);
  for (i64 item = p.worker; item < batch * stretches; item += p.workers) {
    const i64 b = item / stretches, part = item % stretches;
    const i64 first = steps * part / stretches, last = steps * (part + 1) / stretches;
    real window[W - 1 + AHEAD][EACH];
#pragma unroll
    for (int i = 0; i < W - 1; ++i) filter.step(b, first - (W - 1) + i, p.c, window[i]);
    for (i64 t = first; t < last; t += AHEAD) {
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) filter.step(b, t + j, p.c, window[W - 1 + j]);
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        if (t + j < last) {
          real found[EACH];
#pragma unroll
          for (int e = 0; e < EACH; ++e) found[e] = activate(filter.inner(window, j, e));
          save(y + (b * steps + t + j) * channels + p.c, found);
        }
      }
      shift(window);
    }
  }
}

// y_bar, x_bar (B, T, C); of each worker the sums for taps and bias (workers, W + 1, C)
extern "C" __global__ void __launch_bounds__(256, 2)
conv_vjp(const store* __restrict__ x, const store* __restrict__ past, const store* __restrict__ taps,
         const store* __restrict__ bias, const store* __restrict__ y_bar, store* __restrict__ x_bar,
         store* __restrict__ parts, i64 batch, i64 steps, int channels, int lanes, i64 stretches) {
  const Seat p(channels, lanes);
  if (p.c >= channels) return;
  const Filter filter(x, past, taps, bias, steps, channels, p.c);
  real sums[W + 1][EACH] = {};
  for (i64 item = p.worker; item < batch * stretches; item += p.workers) {
    const i64 b = item / stretches, part = item % stretches;
    const i64 first = steps * part / stretches, last = steps * (part + 1) / stretches;
    real window[W - 1 + AHEAD][EACH], g[W - 1 + AHEAD][EACH];
#pragma unroll
    for (int i = 0; i < W - 1; ++i) {
      filter.step(b, first - (W - 1) + i, p.c, window[i]);
      clear(g[i]);
    }
    for (i64 t = first; t < last + W - 1; t += AHEAD) {  // x_bar follows W - 1 steps behind
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        filter.step(b, t + j, p.c, window[W - 1 + j]);
        if (t + j < steps) load(y_bar + (b * steps + t + j) * channels + p.c, g[W - 1 + j]);
        else clear(g[W - 1 + j]);
      }
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        if (ACT != 0 && t + j < steps)  // beyond the end g is zero
#pragma unroll
          for (int e = 0; e < EACH; ++e) g[W - 1 + j][e] *= activate_slope(filter.inner(window, j, e));
        if (t + j < last)
#pragma unroll
          for (int e = 0; e < EACH; ++e) {
#pragma unroll
            for (int k = 0; k < W; ++k) sums[k][e] += g[W - 1 + j][e] * window[j + k][e];
            sums[W][e] += g[W - 1 + j][e];
          }
        const i64 s = t + j - (W - 1);
        if (s >= first && s < last) {
          real found[EACH];
#pragma unroll
          for (int e = 0; e < EACH; ++e) {
            found[e] = 0;
#pragma unroll
            for (int k = 0; k < W; ++k) found[e] += filter.tap[k][e] * g[W - 1 + j - k][e];
          }
          save(x_bar + (b * steps + s) * channels + p.c, found);
        }
      }
      shift(window);
      shift(g);
    }
  }
#pragma unroll
  for (int k = 0; k <= W; ++k) save(parts + (p.worker * (W + 1) + k) * channels + p.c, sums[k]);
}
