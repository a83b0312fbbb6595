// What the linear maps of an FP-Mamba layer say at all rows (b, t) at once, for the kernels that make parameters of it.
//
// Macros: of mamba.cuh; SAID, how lies in memory what linear maps say, what they see, and the cotangents of the former.
#pragma once
#include "mamba.cuh"

typedef SAID said;
__device__ __forceinline__ said to_said(real v) { return Store<said>::narrow(v); }

// Of x_t, mixer (B T, stride), b and c (B T, N); and of y_{t-1}, `fed` (B T, width) or null, in which each stands from `at_` on, or
// is missing if that is negative.
struct Told {
  const said* mixer;
  const store *b, *c;
  const said* fed;
  int width, stride, at_mixer, at_b, at_c;

  __device__ __forceinline__ bool sees(int at) const { return fed != nullptr && at >= 0; }
  __device__ __forceinline__ real of_row(int which, i64 row, int size, int n) const {
    const int at = which ? at_c : at_b;
    const real v = widen((which ? c : b)[row * size + n]);
    return sees(at) ? v + widen(fed[row * width + at + n]) : v;
  }
};
