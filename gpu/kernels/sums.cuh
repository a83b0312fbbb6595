// Many sums at once over the threads of a group, for kernels in which a group of threads takes one step of a sequence.
//
// N values are folded over the lanes of a warp together, which halves them at every level, so that N sums cost about
// N exchanges and not 5 N. A group is a warp, and needs no barrier of the block, or it is the whole block.
#include "common.cuh"

constexpr u32 EVERY_LANE = 0xffffffffu;

// How many values a lane is left with when n have been folded over the lanes, or over every STOP-th of them.
__device__ constexpr int folded(int n, int stop = 1) {
  for (int offset = 16; offset >= stop; offset /= 2) n = (n + 1) / 2;
  return n;
}

// At each level a lane keeps one half of the values and sends the other. In the end it holds the totals of `valid`
// values from number `index` on. Down to STOP, which leaves the lanes of each STOP neighbours apart.
template <int N, int OFFSET, int STOP = 1>
__device__ __forceinline__ void fold_sums(real* v, int lane, int& index, int& valid) {
  if constexpr (OFFSET >= STOP) {
    const bool upper = lane & OFFSET;
    constexpr int H = (N + 1) / 2;
    if constexpr (N > 1) {
#pragma unroll
      for (int i = 0; i < H; ++i) {
        const real second = i + H < N ? v[i + H] : (real)0;
        const real kept = upper ? second : v[i], sent = upper ? v[i] : second;
        v[i] = kept + __shfl_xor_sync(EVERY_LANE, sent, OFFSET);
      }
      index += upper ? H : 0;
      valid = upper ? valid - H : (valid < H ? valid : H);
    } else {
      v[0] += __shfl_xor_sync(EVERY_LANE, v[0], OFFSET);
      if (upper) valid = 0;  // a twin of another lane's
    }
    fold_sums<H, OFFSET / 2, STOP>(v, lane, index, valid);
  }
}

// Where they are, before or without folding: the same `index` and `valid`.
template <int N, int OFFSET, int STOP = 1>
__device__ __forceinline__ void fold_place(int lane, int& index, int& valid) {
  if constexpr (OFFSET >= STOP) {
    const bool upper = lane & OFFSET;
    constexpr int H = (N + 1) / 2;
    if constexpr (N > 1) {
      index += upper ? H : 0;
      valid = upper ? valid - H : (valid < H ? valid : H);
    } else if (upper) {
      valid = 0;
    }
    fold_place<H, OFFSET / 2, STOP>(lane, index, valid);
  }
}

// Reals of shared memory that a group of SIZE threads needs for N sums.
template <int N, int SIZE> __device__ constexpr int sums_size() {
  return SIZE == 32 ? N : 2 * N * (SIZE / 32);
}

template <int SIZE> __device__ __forceinline__ void group_barrier() {
  if constexpr (SIZE == 32) __syncwarp(); else __syncthreads();
}

// The sums of N values over a group of SIZE threads, for all of them to read. `memory` is the group's own; before it is
// used again, the group must have met at a barrier. In two parts: the values come in parts of their own, from number
// `begin` on, and then the totals.
template <int N, int SIZE> __device__ __forceinline__ void sums_part(real* v, real* memory, int begin = 0) {
  constexpr int WARPS = SIZE / 32;
  const int lane = threadIdx.x & 31, warp = (threadIdx.x / 32) % WARPS;
  int index = 0, valid = N;
  fold_sums<N, 16>(v, lane, index, valid);
#pragma unroll
  for (int i = 0; i < folded(N); ++i)
    if (i < valid) memory[WARPS == 1 ? begin + index + i : (begin + index + i) * WARPS + warp] = v[i];
}
template <int N, int SIZE> __device__ __forceinline__ const real* sums_total(real* memory) {
  constexpr int WARPS = SIZE / 32;
  const int lane = threadIdx.x & 31, warp = (threadIdx.x / 32) % WARPS;
  if constexpr (WARPS == 1) {
    __syncwarp();
    return memory;
  } else {
    __syncthreads();
    real* totals = memory + N * WARPS + N * warp;  // this warp's own
    for (int i = lane; i < N; i += 32) {
      real total = memory[i * WARPS];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) total += memory[i * WARPS + w];
      totals[i] = total;
    }
    __syncwarp();
    return totals;
  }
}
template <int N, int SIZE> __device__ __forceinline__ const real* group_sums(real* v, real* memory) {
  sums_part<N, SIZE>(v, memory);
  return sums_total<N, SIZE>(memory);
}
