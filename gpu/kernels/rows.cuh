// Rows on their way into shared memory: asynchronous copies of EACH neighbouring channels at a time.
#pragma once
#include "common.cuh"

typedef Pack<store, EACH> access;


template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from) {
#ifdef SIMT
  for (int i = 0; i < BYTES; ++i) ((unsigned char*)to)[i] = ((const unsigned char*)from)[i];
#else
  const u32 at = (u32)__cvta_generic_to_shared(to);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else if constexpr (BYTES >= 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
  else
    *(u16*)to = *(const u16*)from;
#endif
}
__device__ __forceinline__ void commit() {
#ifndef SIMT
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> __device__ __forceinline__ void arrived() {
#ifndef SIMT
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
