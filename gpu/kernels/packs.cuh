// Neighbouring numbers of a row, loaded and stored at once, in whatever type they lie in memory; arithmetic is in `real`.
#pragma once
#include "common.cuh"

template <class T, int V> __device__ __forceinline__ void load(const T* from, real (&v)[V]) {
  const Pack<T, V> some = *(const Pack<T, V>*)from;
#pragma unroll
  for (int e = 0; e < V; ++e) v[e] = widen(some.v[e]);
}
template <class T, int V> __device__ __forceinline__ void save(T* to, const real (&v)[V]) {
  Pack<T, V> some;
#pragma unroll
  for (int e = 0; e < V; ++e) some.v[e] = Store<T>::narrow(v[e]);
  *(Pack<T, V>*)to = some;
}
template <int V> __device__ __forceinline__ void clear(real (&v)[V]) {
#pragma unroll
  for (int e = 0; e < V; ++e) v[e] = 0;
}
