// What the stand-in for a device is tested by: one thing that works, or one rule broken, for each value of TRIAL.
#include "common.cuh"

constexpr u32 ALL = 0xffffffffu;

#ifndef CLUSTER
#define CLUSTER 1
#endif
__device__ void everybody() { simt_cluster_barrier(); }

// A frame larger than a stack.
__device__ __noinline__ void deep(i64 n) {
  volatile char large[1 << 20];
  for (i64 k = n - 1; k >= 0; --k) large[k] = 1;
}

// in, out: one int per thread; flags: one per block, zero; numbers (16,)
extern "C" __global__ void __launch_bounds__(64 + 2 * 32)
trial(int which, const int* in, int* out, u32* flags, float* numbers, i64 n) {
  SHARED(memory);
  int* shared = (int*)memory;
  const int t = threadIdx.x, lane = t & 31, b = blockIdx.x;
  const i64 i = (i64)b * blockDim.x + t;
  const int v = in[i];
  switch (which) {
    case 0:  // every kind of shuffle; the host knows what comes out
      out[i] = __shfl_sync(ALL, v, 5) + 10 * __shfl_xor_sync(ALL, v, 3) + 100 * __shfl_up_sync(ALL, v, 2) +
               1000 * __shfl_down_sync(ALL, v, 7) + 10000 * __shfl_sync(ALL, v, 1, 8);
      break;
    case 1:  // votes, of warp and block
      out[i] = __any_sync(ALL, v == 3) + 2 * __all_sync(ALL, v >= 0) + 4 * __popc(__ballot_sync(ALL, v & 1)) +
               1000 * __syncthreads_count(v == 3) + 1000000 * __syncthreads_or(v == 40) +
               2000000 * __syncthreads_and(v >= 0);
      break;
    case 2:  // reversed through shared memory
      shared[t] = v;
      __syncthreads();
      out[i] = shared[blockDim.x - 1 - t];
      break;
    case 3:  // the same with the barrier forgotten
      shared[t] = v;
      out[i] = shared[blockDim.x - 1 - t];
      break;
    case 4:  // each block waits for the one before it
      if (t == 0) {
        if (b > 0)
          while (load_acquire(flags + b - 1) == 0) {
          }
        store_release(flags + b, b == 0 ? 1 : flags[b - 1] + 1);
      }
      __syncthreads();
      out[i] = (int)flags[b];
      break;
    case 5:  // each block waits for the one after it
      if (t == 0) {
        if (b + 1 < gridDim.x)
          while (load_acquire(flags + b + 1) == 0) {
          }
        store_release(flags + b, 1);
      }
      break;
    case 6:  // all blocks, by a barrier of the grid
      if (t == 0) atomicAdd(flags + 1, 1u);
      grid_barrier(flags, 0);
      out[i] = (int)flags[1];
      break;
    case 7: {  // atomics
      int* most = shared;
      if (t == 0) most[0] = most[1] = 0;
      __syncthreads();
      atomicMax(most, v);
      atomicAdd(most + 1, 1);
      __syncthreads();
      out[i] = most[0] + 1000 * most[1];
      break;
    }
    case 8: out[i] = 0; numbers[t & 15] = ((float*)memory)[t]; break;  // what nobody has written
    case 10: {  // each block of a cluster tells the others
      shared[t] = -1;
      everybody();
      if (t == 0)
        for (int k = 0; k < CLUSTER; ++k) *simt::in_cluster(shared + b % CLUSTER, k) = 1 + b;
      everybody();
      int sum = 0;
      for (int k = 0; k < CLUSTER; ++k) sum += shared[k];
      out[i] = sum;
      everybody();
      break;
    }
    case 11:  // neighbours of a warp, twice
      for (int k = 0; k < 2; ++k) {
        shared[t] = v + k;
        __syncwarp();
        out[i] = shared[t ^ 1];
        __syncwarp();
      }
      break;
    case 12:  // asynchronous copies, the first group of two waited for
      simt::copy_async(shared + t, in + i, 4);
      simt::copy_commit();
      simt::copy_async(shared + blockDim.x + t, in + i, 4);
      simt::copy_commit();
      simt::copy_wait(1);
      out[i] = shared[t] - 1000 * shared[blockDim.x + t];
      simt::copy_wait(0);
      out[i] += shared[blockDim.x + t] * 100000;
      break;
    case 9: out[i] = t < 64 ? max(min(v, 7), -2) : 0; break;
    // broken rules
    case 20: if (t < 32) __syncthreads(); break;                  // some never come
    case 21: if (t != 7) __syncwarp(); break;
    case 22: if (lane < 16) out[i] = __shfl_sync(ALL, v, 0); else out[i] = -1; break;
    case 23:
      if (t < 32) __syncthreads();
      else
        __syncthreads();  // two barriers
      break;
    case 24: if (lane == 3) __syncthreads(); else __syncwarp(); break;
    case 25: shared[n / 4] = 1; break;                            // past the end
    case 39:  // neighbours of a warp, with the second barrier forgotten
      for (int k = 0; k < 2; ++k) {
        shared[t] = v + k;
        __syncwarp();
        out[i] = shared[t ^ 1];
      }
      break;
    case 40: simt::copy_async(shared + t, in + i, 4); break;      // never waited for
    case 41: simt::copy_async(memory + 4 + 8 * (t / 4), in + i, 8); break;  // misaligned
    case 42:  // a value of one warp for all, with no barrier of the block
      if (t == 0) shared[0] = v;
      __syncwarp();
      out[i] = shared[0];
      break;
    case 37: if (b % CLUSTER == 0) everybody(); break;            // the other block has left
    case 38: *simt::in_cluster(shared, CLUSTER) = 1; break;       // no such block
    case 26: shared[-1] = 1; break;
    case 27: *(i64*)(memory + 4) = n; break;                      // misaligned
    case 28: *(volatile int*)(which - 28 + (int*)nullptr) = 1; break;
    case 29: *(volatile int*)(u64)4096 = 1; break;                // wild
    case 30: { int few[4] = {v, v, v, v}; out[i] = few[n]; break; }
    case 31: out[i] = v / (int)(n - 1000); break;
    case 32: out[i] = __shfl_sync(0xffffu, v, 0); break;          // half a warp
    case 33: for (volatile i64 k = 0; k >= 0; k = (k + 1) & 0xffff) {} break;  // for ever
    case 34: deep(1 << 20); break;
    case 35: out[n] = 1; break;                                   // past the end of an array
    case 36: out[i] = (int)((v + 2147483647) & 1); break;         // overflows
  }
}
