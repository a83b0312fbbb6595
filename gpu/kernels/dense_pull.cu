// Cotangents of (F) at its solution where a product of matrices does the mixing: what lies before and after the
// products; section 6 of docs/mathematics.md.
//
//   dense_split    d = x - h,  e = g s
//   dense_join     m = h + Q d,  lam_bar = s (h_{t-1} - m),  initial_bar = lam_1 s_1
//                  GATED: lam_bar = s h_{t-1},  gate_bar = s m
//
// One thread for EACH neighbouring channels of a step. Every input is read once and every output written once.
#include "common.cuh"

typedef Pack<store, EACH> access;
typedef Pack<real, EACH> wide;

#define AT(array) (*(const access*)((array) + from))

extern "C" __global__ void __launch_bounds__(THREADS)
dense_split(const store* __restrict__ lam, const store* __restrict__ gate, const store* __restrict__ x,
            const store* __restrict__ h, const store* __restrict__ s, real* __restrict__ d, real* __restrict__ e,
            int dim, int groups) {
  const int i = ((int)(blockIdx.x % groups) * THREADS + threadIdx.x) * EACH;
  const i64 from = (i64)(blockIdx.x / groups) * dim + i;
  if (i >= dim) return;
  const access xs = AT(x), hs = AT(h), ss = AT(s), gs = GATED ? AT(gate) : AT(lam);
  wide ds, es;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    ds.v[k] = widen(xs.v[k]) - widen(hs.v[k]);
    es.v[k] = (GATED ? widen(gs.v[k]) : 1 - widen(gs.v[k])) * widen(ss.v[k]);
  }
  *(wide*)(d + from) = ds;
  *(wide*)(e + from) = es;
}

extern "C" __global__ void __launch_bounds__(THREADS)
dense_join(const store* __restrict__ lam, const store* __restrict__ h, const store* __restrict__ s,
           const store* __restrict__ initial, const real* __restrict__ mixed, store* __restrict__ lam_bar,
           store* __restrict__ gate_bar, store* __restrict__ initial_bar, i64 steps, int dim, int groups) {
  const int i = ((int)(blockIdx.x % groups) * THREADS + threadIdx.x) * EACH;
  const i64 row = blockIdx.x / groups, from = row * dim + i, b = row / steps;
  const bool first = row % steps == 0;
  if (i >= dim) return;
  const access hs = AT(h), ss = AT(s);
  const wide ms = *(const wide*)(mixed + from);
  access before, decay;
  if (!first) {
    before = *(const access*)(h + from - dim);
  } else {
    decay = AT(lam);
    if (initial != nullptr) before = *(const access*)(initial + b * dim + i);
  }
  access lams, gates, initials;
#pragma unroll
  for (int k = 0; k < EACH; ++k) {
    const real m = widen(hs.v[k]) + ms.v[k], came = first && initial == nullptr ? (real)0 : widen(before.v[k]);
    const real bar = widen(ss.v[k]);
    lams.v[k] = narrow(bar * (GATED ? came : came - m));
    if (GATED) gates.v[k] = narrow(bar * m);
    if (first) initials.v[k] = narrow(widen(decay.v[k]) * bar);
  }
  *(access*)(lam_bar + from) = lams;
  if (GATED) *(access*)(gate_bar + from) = gates;
  if (first) *(access*)(initial_bar + b * dim + i) = initials;
}
