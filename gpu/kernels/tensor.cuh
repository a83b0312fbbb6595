// Products on tensor cores in the precision of float: a float is the sum of two numbers of eleven bits.
#pragma once
#include "common.cuh"

// d += a b for tiles 16 x 8 and 8 x 8, of which the leading eleven bits count
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifndef SIMT
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int k = 0; k < 8; ++k) {
    const int at = k % 4, half = k / 4;
    float left[2], right[2];
    for (int i = 0; i < 2; ++i)
      left[i] = __uint_as_float(__shfl_sync(0xffffffffu, a[2 * half + i], 4 * g + at) & 0xffffe000u);
    for (int j = 0; j < 2; ++j) {
      const u32 low = __shfl_sync(0xffffffffu, b[0], 4 * (2 * t + j) + at);
      const u32 high = __shfl_sync(0xffffffffu, b[1], 4 * (2 * t + j) + at);
      right[j] = __uint_as_float((half ? high : low) & 0xffffe000u);
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) d[2 * i + j] += left[i] * right[j];
  }
#endif
}

// v = high + low, rounded to nearest: products of two low parts cancel. A NaN or an infinity is in one of them.
__device__ __forceinline__ void split(float v, u32& high, u32& low) {
  high = (__float_as_uint(v) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(v - __uint_as_float(high));
}
