// What every kernel needs: storage types and their arithmetic, rows of channels, sums over a block, flags between blocks.
//
// A kernel is compiled for one storage type and one shape class, by macros:
//   STORE   how arrays lie in memory: float, double, f16 or bf16
// and computes in `real`: double where STORE is double, float elsewhere. All shared memory is the dynamic block that
// SHARED declares, so that a host can poison it. No toolkit header is included: the sources compile by NVRTC alone.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// float16 and bfloat16 as they lie in memory; arithmetic is in float.
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
#ifdef SIMT
__device__ inline float widen(f16 v) { return simt::half_to_float(v.bits); }
#else
__device__ __forceinline__ float widen(f16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
  return r;
}
#endif

template <class T> struct Store;
template <> struct Store<float> {
  typedef float real;
  __device__ static float narrow(float v) { return v; }
};
template <> struct Store<double> {
  typedef double real;
  __device__ static double narrow(double v) { return v; }
};
template <> struct Store<f16> {
  typedef float real;
#ifdef SIMT
  static f16 narrow(float v) { return {simt::float_to_half(v)}; }
#else
  __device__ static f16 narrow(float v) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
  }
#endif
};
template <> struct Store<bf16> {
  typedef float real;
#ifdef SIMT
  static bf16 narrow(float v) { return {simt::float_to_bfloat16(v)}; }
#else
  __device__ static bf16 narrow(float v) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
  }
#endif
};

#ifdef STORE
typedef STORE store;
typedef Store<store>::real real;
__device__ __forceinline__ store narrow(real v) { return Store<store>::narrow(v); }
#endif

// Of the compute type, whichever it is.
__device__ __forceinline__ float magnitude(float v) { return fabsf(v); }
__device__ __forceinline__ double magnitude(double v) { return fabs(v); }
// The larger; drops a NaN.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) <= 3.402823466e38f; }
__device__ __forceinline__ bool is_finite(double v) { return fabs(v) <= 1.7976931348623157e308; }
#ifdef STORE
constexpr real EPS = sizeof(real) == 8 ? (real)2.220446049250313e-16 : (real)1.1920928955078125e-07;
constexpr real LARGEST = sizeof(real) == 8 ? (real)1.7976931348623157e308 : (real)3.402823466e38;
#endif

// V neighbouring elements, loaded and stored at once.
template <class T, int V> struct alignas(sizeof(T) * V > 16 ? 16 : sizeof(T) * V) Pack { T v[V]; };

#ifdef SIMT
#define SHARED(name) unsigned char* name = simt::shared_memory()
#else
#define SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// Flags between blocks.
#ifdef SIMT
inline u32 load_acquire(const u32* p) { simt::yield(); return *(volatile const u32*)p; }
inline void store_release(u32* p, u32 v) { *(volatile u32*)p = v; }
#else
__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 r;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
  return r;
}
__device__ __forceinline__ void store_release(u32* p, u32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
#endif

// All blocks of a cooperative launch wait for each other; `barrier` starts as zero. `generation` counts from 0.
__device__ inline void grid_barrier(u32* barrier, u32 generation) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(barrier, 1u);
    while (load_acquire(barrier) < (generation + 1) * gridDim.x) {
    }
    __threadfence();
  }
  __syncthreads();
}
