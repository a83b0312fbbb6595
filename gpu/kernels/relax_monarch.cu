// The fixed point of (F) and its adjoint for Q = I - blockdiag(alpha_j M_j), step after step; blocks of 4 to 64, a
// power of two.
//
//     h_t = lam_t h_{t-1} + c_t + g_t alpha M h_t,  c = g (x - alpha M x)
//     s_t = hbar_t + lam_{t+1} s_{t+1} + alpha M^T (g_t s_t)
//
// Sections 3, 6 and 7 of docs/mathematics.md. One cluster of CLUSTER blocks per sequence. A thread has one channel, and
// EDGE elements of its block of M in registers as long as the step is iterated: TR rows of TC columns. It multiplies
// them with TC numbers of the iterate, which is in shared memory, and TR neighbours add up their rows so that each ends
// with its own channel. One barrier per iteration: with it go the iterate and the maxima that decide whether it was the
// last.
//
// Memory traffic: everything from device memory once, M by way of shared memory while the step before is iterated; the
// result written once.
//
// Macros: STORE, EDGE, THREADS (a multiple of EDGE), CLUSTER, BLOCKS on a multiprocessor; ADJOINT, GATED 0 or 1.
#include "common.cuh"
#define EACH (16 / (int)sizeof(store))
#include "rows.cuh"
#define KIND MONARCH
#include "relax_mix.cuh"
#include "relax_rule.cuh"

#ifndef ADJOINT
#define ADJOINT 0
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

constexpr int TR = EDGE >= 64 ? 8 : EDGE >= 16 ? 4 : 2, TC = EDGE / TR, WARPS = THREADS / 32;
// What of M lies together in memory for a thread, how it is copied
constexpr int RUN = ADJOINT ? TR : TC, RUNS = ADJOINT ? TC : TR;
constexpr int PIECE = RUN < EACH ? RUN : EACH, PIECES = RUN / PIECE;
// The iterate in shared memory: columns TC at a time; a thread reads four of them at once without bank conflicts.
constexpr int FOUR = TC < 4 ? TC : 4;
__device__ __forceinline__ int spot(int channel) {
  const int in = channel % EDGE;
  return channel - in + in % TC / FOUR * (EDGE / TC * FOUR) + in / TC * FOUR + in % FOUR;
}

__device__ __forceinline__ int rank_in_cluster() { return CLUSTER > 1 ? blockIdx.x % CLUSTER : 0; }

// All blocks of the cluster wait for each other, in two parts: what was written before the first is seen after the
// second.
__device__ __forceinline__ void arrive() {
#if CLUSTER > 1 && !defined(SIMT)
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait() {
#if CLUSTER == 1
  __syncthreads();
#elif defined(SIMT)
  simt_cluster_barrier();
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The threads that share a block of M wait for each other.
__device__ __forceinline__ void neighbours() {
#if EDGE <= 32
  __syncwarp();
#elif defined(SIMT)
  __syncthreads();
#else
  asm volatile("bar.sync %0, %1;" ::"r"(1 + (int)threadIdx.x / EDGE), "n"(EDGE) : "memory");
#endif
}

// Store at the same place of the shared memory of one block of the cluster.
__device__ __forceinline__ void tell(bits* place, bits v, int whom) {
#if CLUSTER == 1
  *place = v;
#elif defined(SIMT)
  *simt::in_cluster(place, whom) = v;
#else
  const u32 here = (u32)__cvta_generic_to_shared(place);
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(whom));
  if constexpr (sizeof(bits) == 8)
    asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(there), "l"((u64)v) : "memory");
  else
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(there), "r"((u32)v) : "memory");
#endif
}

// blocks (B, T, D / EDGE, EDGE, EDGE), alpha (B, T, D / EDGE); lam, gate, source, value (B, T, D); initial (B, D) or
// null. Shared memory: THREADS EDGE stored elements, 2 THREADS numbers, 6 WARPS CLUSTER of `bits`.
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, BLOCKS)
relax_monarch(const store* blocks, const store* alpha, const store* lam, const store* gate, const store* source,
              const store* initial, store* value, int dim, i64 steps, double eps, double rtol, double atol,
              i64 max_iter, int* counts, double* change_out, double* scale_out, int* state_out) {
  typedef Pack<store, PIECE> piece;
  const i64 b = blockIdx.x / CLUSTER;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int channel = rank_in_cluster() * THREADS + tid, block = channel / EDGE, count = dim / EDGE;
  const bool inside = channel < dim;
  const int group = tid % EDGE % TR, row = tid % EDGE / TR * TR;  // columns group TC on, rows row on
  SHARED(memory);
  piece* stage = (piece*)memory;
  real* iterates = (real*)(memory + sizeof(store) * THREADS * EDGE);
  bits* maxima = (bits*)(iterates + 2 * THREADS);
  arrive();
  wait();  // all run before one writes to another

  auto time = [&](i64 n) { return b * steps + (ADJOINT ? steps - 1 - n : n); };
  // Run r of the block: row `row + r` of M from column group TC on, or, transposed, row group TC + r from column `row`
  // on
  auto fetch = [&](i64 n) {
    if (inside && n < steps) {
      const store* from = blocks + (time(n) * count + block) * (EDGE * EDGE);
      from += ADJOINT ? group * TC * EDGE + row : row * EDGE + group * TC;
#pragma unroll
      for (int r = 0; r < RUNS; ++r)
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
          copy_async<sizeof(piece)>(stage + (r * PIECES + p) * THREADS + tid, from + r * EDGE + p * PIECE);
    }
    commit();
  };
  real next_lam = 0, next_x = 0, next_gate = 0, next_alpha = 0;
  auto fetch_rest = [&](i64 n) {
    if (inside && n < steps) {
      next_lam = widen(lam[time(n) * dim + channel]);
      next_x = widen(source[time(n) * dim + channel]);
      if (GATED) next_gate = widen(gate[time(n) * dim + channel]);
      next_alpha = widen(alpha[time(n) * count + block]);
    }
  };

  real carry = initial && inside ? (real)widen(initial[b * dim + channel]) : (real)0;
  real lam_before = 0;
  int side = 0, turn = 0;  // which of the two buffers
  real m[TR][TC];
  // alpha M v for the channel of this thread, of v as it is in the buffer
  auto mixed = [&](real strength) {
    const real* v = iterates + side * THREADS + tid / EDGE * EDGE + group * FOUR;
    real sum[TR] = {};
#pragma unroll
    for (int q = 0; q < TC / FOUR; ++q) {
      const Pack<real, FOUR> four = *(const Pack<real, FOUR>*)(v + q * (EDGE / TC * FOUR));
#pragma unroll
      for (int j = 0; j < FOUR; ++j)
#pragma unroll
        for (int i = 0; i < TR; ++i) sum[i] += m[i][q * FOUR + j] * four.v[j];
    }
#pragma unroll
    for (int half = TR / 2; half > 0; half /= 2) {
      const bool upper = group & half;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const real keep = upper ? sum[i + half] : sum[i], send = upper ? sum[i] : sum[i + half];
        sum[i] = keep + __shfl_xor_sync(0xffffffffu, send, half);
      }
    }
    return strength * sum[0];
  };
  auto publish = [&](real v) {
    side ^= 1;
    iterates[side * THREADS + spot(tid)] = v;
  };

  Outcome outcome = {0, 0, CONVERGED};
  fetch(0);
  fetch_rest(0);
  for (i64 n = 0; n < steps; ++n) {
    arrived<0>();
    real spoilt = 0;
#pragma unroll
    for (int r = 0; r < RUNS; ++r)
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        const piece some = stage[(r * PIECES + p) * THREADS + tid];
#pragma unroll
        for (int k = 0; k < PIECE; ++k) {
          const real element = inside ? (real)widen(some.v[k]) : (real)0;
          m[ADJOINT ? p * PIECE + k : r][ADJOINT ? r : p * PIECE + k] = element;
          if (ADJOINT) spoilt += element * 0;
        }
      }
    const real decay = next_lam, x = next_x, strength = next_alpha, g = GATED ? next_gate : 1 - decay;
    fetch(n + 1);
    fetch_rest(n + 1);
    real constant;
    if (ADJOINT) {  // mixing zero makes zero, or NaN where a parameter is not finite
      constant = x + (spoilt + strength * 0);
    } else {
      publish(x);
      neighbours();
      constant = g * (x - mixed(strength));
    }
    real f = ADJOINT ? constant + carry : decay * carry + constant, old = 0;
    double share = 1;
    Chunk now = {0, 0, outcome.scale, false};
    const real factor = ADJOINT ? lam_before : decay;
    const bits leaves = inside && factor == factor ? magnitude_bits(factor) : 0;
    for (;;) {
      publish(ADJOINT ? g * f : f);
      turn ^= 1;
      bits* told = maxima + turn * 3 * WARPS * CLUSTER;
      const bits changed = warp_largest(inside ? magnitude_bits(f - old) : 0);
      const bits size = warp_largest(inside ? magnitude_bits(f) : 0);
      bits loss = 0;
      if (now.count == 0) loss = warp_largest(leaves);
      if (lane < CLUSTER) {
        const int mine = rank_in_cluster() * WARPS + warp;
        tell(told + mine, changed, lane);
        tell(told + WARPS * CLUSTER + mine, size, lane);
        if (now.count == 0) tell(told + 2 * WARPS * CLUSTER + mine, loss, lane);
      }
      arrive();
      // The next iteration, while the news of this one is on its way
      neighbours();
      const real mixes = mixed(strength);
      const real next = ADJOINT ? constant + mixes + carry : decay * carry + (constant + g * mixes);
      wait();
      bits all[3] = {};
#pragma unroll
      for (int what = 0; what < 3; ++what) {
        if (what < 2 || now.count == 0) {
#pragma unroll
          for (int w = 0; w < WARPS * CLUSTER; w += 32)
            if (w + lane < WARPS * CLUSTER) all[what] = most(all[what], told[what * WARPS * CLUSTER + w + lane]);
          all[what] = warp_largest(all[what]);
        }
      }
      if (now.count == 0) share = tolerance_share(steps, from_magnitude(all[2]));
      now.iterated(from_magnitude(all[0]), from_magnitude(all[1]), outcome.scale, share, eps, rtol, atol);
      if (!now.goes_on(max_iter)) break;
      old = f;
      f = next;
    }
    outcome.add(now);
    if (inside) value[time(n) * dim + channel] = narrow(f);
    carry = ADJOINT ? decay * f : f;
    lam_before = decay;
    if (tid == 0 && rank_in_cluster() == 0) counts[time(n)] = (int)now.count;
  }
  if (tid == 0 && rank_in_cluster() == 0) {
    change_out[b] = outcome.change;
    scale_out[b] = outcome.scale;
    state_out[b] = outcome.status;
  }
}
