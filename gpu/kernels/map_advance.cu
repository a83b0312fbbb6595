// A damped step of an iteration in hand, h' = h + d (new - h), and how far it went; section 7 of docs/mathematics.md.
//
// A warp takes a row (b, t), and leaves two numbers of it; a block then finds the largest of those of a sequence, where a
// NaN is larger than anything. They are max |new - h| and max |h'|; or, by the published rule, the quotient of max |new - h|
// and max |new| + 1e-8, and nothing. A sequence with d < 0 rests: its h' is h, and its numbers are zero. Memory traffic: h,
// new and h' once.
//
// Macros: of maps.cuh.
#include "maps.cuh"

// The largest of two numbers over a warp.
__device__ __forceinline__ void warp_most(real& a, real& b) {
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) {
    a = most(a, __shfl_xor_sync(0xffffffffu, a, reach));
    b = most(b, __shfl_xor_sync(0xffffffffu, b, reach));
  }
}

// h, fresh, next (B T, D); damping (B); numbers (B T, 2)
extern "C" __global__ void __launch_bounds__(256)
advance(const store* __restrict__ h, const store* __restrict__ fresh, const store* __restrict__ damping,
        store* __restrict__ next, store* __restrict__ numbers, i64 rows, i64 steps, int dim, int published) {
  const i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const real pace = widen(damping[row / steps]);
  real moved = 0, size = 0;
#pragma unroll 4
  for (int d = lane * EACH; d < dim; d += 32 * EACH) {
    real before[EACH], after[EACH];
    load(h + row * dim + d, before);
    if (pace >= 0) {
      load(fresh + row * dim + d, after);
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const real change = after[e] - before[e], proposal = before[e] + pace * change;
        moved = most(moved, magnitude(change));
        size = most(size, magnitude(published ? after[e] : proposal));
        before[e] = proposal;
      }
    }
    save(next + row * dim + d, before);
  }
  warp_most(moved, size);
  if (lane == 0) {
    numbers[2 * row] = narrow(published ? moved / (size + (real)1e-8) : moved);
    numbers[2 * row + 1] = narrow(published ? (real)0 : size);
  }
}

// numbers (B, T, 2) to (B, 2)
extern "C" __global__ void __launch_bounds__(256)
advance_most(const store* __restrict__ numbers, store* __restrict__ out, i64 steps) {
  SHARED(memory);
  real *room = (real*)memory, a = 0, b = 0;
  const i64 sequence = blockIdx.x;
  for (i64 t = threadIdx.x; t < steps; t += blockDim.x) {
    const i64 at = 2 * (sequence * steps + t);
    a = most(a, widen(numbers[at]));
    b = most(b, widen(numbers[at + 1]));
  }
  warp_most(a, b);
  if (threadIdx.x % 32 == 0) {
    room[threadIdx.x / 32 * 2] = a;
    room[threadIdx.x / 32 * 2 + 1] = b;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < (int)blockDim.x / 32; ++w) {
      a = most(a, room[2 * w]);
      b = most(b, room[2 * w + 1]);
    }
    out[2 * sequence] = narrow(a);
    out[2 * sequence + 1] = narrow(b);
  }
}
