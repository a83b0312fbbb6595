// Rows on their way into shared memory: asynchronous copies of EACH neighbouring channels at a time.
#pragma once
#include "common.cuh"

typedef Pack<store, EACH> access;

template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from) {
  if constexpr (BYTES < 4) {  // too little for an asynchronous copy
    *(u16*)to = *(const u16*)from;
    return;
  }
#ifdef SIMT
  simt::copy_async(to, from, BYTES);
#else
  const u32 at = (u32)__cvta_generic_to_shared(to);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else if constexpr (BYTES >= 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
#endif
}
__device__ __forceinline__ void commit() {
#ifdef SIMT
  simt::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> __device__ __forceinline__ void arrived() {
#ifdef SIMT
  simt::copy_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
