// A gate, out = silu(z + fed) y, `fed` null for zero, and softplus(x + bias), with their adjoints; and the same numbers stored
// smaller. What comes out may be stored smaller, as products take it. A thread has EACH neighbouring numbers at a time. Memory traffic: every array once.
//
// Macros: of maps.cuh, with ACT 2; SAID of `z` and `fed`, OUT of `out` and of the cotangents of z and x.
#include "maps.cuh"

__device__ __forceinline__ void argument(const SAID* z, const SAID* fed, i64 at, real (&v)[EACH]) {
  load(z + at, v);
  if (fed) {
    real more[EACH];
    load(fed + at, more);
#pragma unroll
    for (int e = 0; e < EACH; ++e) v[e] += more[e];
  }
}

// z, fed, y, out (size)
extern "C" __global__ void __launch_bounds__(256)
gate(const SAID* __restrict__ z, const SAID* __restrict__ fed, const store* __restrict__ y, OUT* __restrict__ out, i64 size) {
  const i64 at = ((i64)blockIdx.x * 256 + threadIdx.x) * EACH;
  if (at >= size) return;
  real v[EACH], own[EACH];
  argument(z, fed, at, v);
  load(y + at, own);
#pragma unroll
  for (int e = 0; e < EACH; ++e) own[e] *= activate(v[e]);
  save(out + at, own);
}

extern "C" __global__ void __launch_bounds__(256)
gate_vjp(const SAID* __restrict__ z, const SAID* __restrict__ fed, const store* __restrict__ y, const store* __restrict__ bar,
         OUT* __restrict__ z_bar, store* __restrict__ y_bar, i64 size) {
  const i64 at = ((i64)blockIdx.x * 256 + threadIdx.x) * EACH;
  if (at >= size) return;
  real v[EACH], own[EACH], its[EACH];
  argument(z, fed, at, v);
  load(y + at, own);
  load(bar + at, its);
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const real open = 1 / (1 + exponential(-v[e]));
    own[e] *= its[e] * open * (1 + v[e] * (1 - open));
    its[e] *= v[e] * open;
  }
  save(z_bar + at, own);
  save(y_bar + at, its);
}

__device__ __forceinline__ float log_of_one_and(float v) { return log1pf(v); }
__device__ __forceinline__ double log_of_one_and(double v) { return log1p(v); }
__device__ __forceinline__ float exponential_less_one(float v) { return expm1f(v); }
__device__ __forceinline__ double exponential_less_one(double v) { return expm1(v); }

// x, y (rows, dim), bias (dim); `across` blocks lie side by side, each with ROWS rows
constexpr int ROWS = 8;
extern "C" __global__ void __launch_bounds__(256)
softplus(const store* __restrict__ x, const store* __restrict__ bias, store* __restrict__ y, i64 rows, int dim, int across) {
  const int d = (blockIdx.x % across * 256 + threadIdx.x) * EACH;
  const i64 first = (i64)(blockIdx.x / across) * ROWS;
  if (d >= dim) return;
  real shift[EACH];
  load(bias + d, shift);
#pragma unroll 4
  for (int k = 0; k < ROWS; ++k)
    if (first + k < rows) {
      real v[EACH];
      load(x + (first + k) * dim + d, v);
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const real own = v[e] + shift[e], rest = log_of_one_and(exponential(-magnitude(own)));
        v[e] = own != own ? own : (own > 0 ? own : (real)0) + rest;
      }
      save(y + (first + k) * dim + d, v);
    }
}

// y, y_bar, x_bar (size)
extern "C" __global__ void __launch_bounds__(256)
softplus_vjp(const store* __restrict__ y, const store* __restrict__ y_bar, OUT* __restrict__ x_bar, i64 size) {
  const i64 at = ((i64)blockIdx.x * 256 + threadIdx.x) * EACH;
  if (at >= size) return;
  real v[EACH], bar[EACH];
  load(y + at, v);
  load(y_bar + at, bar);
#pragma unroll
  for (int e = 0; e < EACH; ++e) v[e] = -exponential_less_one(-v[e]) * bar[e];
  save(x_bar + at, v);
}

// x, out (size)
extern "C" __global__ void __launch_bounds__(256) rounded(const store* __restrict__ x, OUT* __restrict__ out, i64 size) {
  const i64 at = ((i64)blockIdx.x * 256 + threadIdx.x) * EACH;
  if (at >= size) return;
  real v[EACH];
  load(x + at, v);
  save(out + at, v);
}
