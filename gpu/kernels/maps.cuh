// What the kernels of `fpnumba.gpu.maps` share: packs of channels, activations, numbers of which the largest is wanted.
//
// Macros: STORE; EACH neighbouring channels of an access; ACT of `activate`: 0 identity, 1 relu, 2 silu, 3 sigmoid.
#pragma once
#include "packs.cuh"

// The larger; a NaN is larger than anything.
__device__ __forceinline__ real most(real a, real b) { return a != a || a >= b ? a : b; }

#ifdef ACT
__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }

__device__ __forceinline__ real activate(real v) {
  if constexpr (ACT == 1) return v < 0 ? (real)0 : v;
  if constexpr (ACT == 2) return v / (1 + exponential(-v));
  if constexpr (ACT == 3) return 1 / (1 + exponential(-v));
  return v;
}
__device__ __forceinline__ real activate_slope(real v) {
  if constexpr (ACT == 0) return 1;
  if constexpr (ACT == 1) return v > 0 ? (real)1 : (real)0;
  const real open = 1 / (1 + exponential(-v));
  return open * (ACT == 2 ? 1 + v * (1 - open) : 1 - open);
}
#endif
