// The fixed point of (F) and its adjoint, chunk after chunk, for any mixer and any shape; one iteration over all steps.
//
//     h_t = lam_t h_{t-1} + g_t (x_t - P_t (x_t - h_t)),        s_t = hbar_t + lam_{t+1} s_{t+1} + P_t^T (g_t s_t)
//
// Sections 3, 6 and 7 of docs/mathematics.md. One block per sequence. An iteration of a chunk is two passes: groups of
// threads mix one step each, then every thread scans its channels over the steps of the chunk, which also yields the
// change and the size that the stopping rule wants. The iterate and what mixing made of it lie in shared memory where
// they fit, in device memory otherwise.
//
// Memory traffic: lam, source, the parameters (and the gate) from device memory once per chunk, and from the caches
// once per iteration; the result written once.
//
// Macros: STORE; KIND, RANK, WIDE (relax_mix.cuh); ADJOINT 0 or 1; GATED 0 or 1 (0: g = 1 - lam).
#include "common.cuh"
#include "relax_mix.cuh"
#include "relax_rule.cuh"

#ifndef ADJOINT
#define ADJOINT 0
#endif
#ifndef GATED
#define GATED 0
#endif

__device__ __forceinline__ real gate_at(const store* lam, const store* gate, i64 at) {
  return GATED ? (real)widen(gate[at]) : (real)1 - (real)widen(lam[at]);
}

// What one step of (F) adds to the scan, into v: g (x - P (x - h)), or hbar + P^T (g s). `at` is where the step begins.
__device__ __forceinline__ void mix_step(Shape s, const store* first, const store* second, const store* lam,
                                         const store* gate, const store* source, i64 step, const real* h, real* v,
                                         real* spare) {
  const i64 at = step * s.dim;
  for (int i = place(); i < s.dim; i += group_size())
    v[i] = ADJOINT ? gate_at(lam, gate, at + i) * h[i] : (real)widen(source[at + i]) - h[i];
  mix<ADJOINT>(s, first + step * first_size(s), second + step * second_size(s), v, spare);
  for (int i = place(); i < s.dim; i += group_size()) {
    const real x = widen(source[at + i]);
    v[i] = ADJOINT ? x + v[i] : gate_at(lam, gate, at + i) * (x - v[i]);
  }
}

#define BATCH 4

// One channel over the steps of a chunk; `state` is what comes in, lam h or lam s of the step before included if
// ADJOINT.
__device__ __forceinline__ void scan_channel(int n, int dim, const store* lam, const real* z, real* h, real state,
                                             real old_share, real new_share, bits& change, bits& size) {
  for (int from = 0; from < n; from += BATCH) {
    real decay[BATCH], add[BATCH], old[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      const int turn = min(from + k, n - 1);
      const i64 at = (i64)(ADJOINT ? n - 1 - turn : turn) * dim;
      decay[k] = widen(lam[at]);
      add[k] = z[at];
      old[k] = h[at];
    }
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      if (from + k < n) {
        real f;
        if (ADJOINT) {
          f = add[k] + state;
          state = decay[k] * f;
        } else {
          f = decay[k] * state + add[k];
          state = f;
        }
        const real value = old_share * old[k] + new_share * f;
        h[(i64)(ADJOINT ? n - 1 - from - k : from + k) * dim] = value;
        change = most(change, magnitude_bits(f - old[k]));
        size = most(size, magnitude_bits(value));
      }
    }
  }
}

// value, lam, gate, source, guess (B, T, D); initial, carry (B, D). `iterate` and `mixed` are (B, chunk, D), or null
// for shared memory; `iterate` may be `value`. guess null: from zero. Shared memory: 128 of bits, `spare` numbers per
// group, 2 chunk D numbers unless `iterate` is given.
extern "C" __global__ void __launch_bounds__(512, 1)
relax(const store* first, const store* second, const store* lam, const store* gate, const store* source,
      const store* initial, const store* guess, store* value, real* iterate, real* mixed, real* carry, int dim, int d1,
      int d2, i64 steps, i64 chunk, int spare_size, double eps, double rtol, double atol, i64 max_iter, double damping,
      int* counts, double* change_out, double* scale_out, int* state_out) {
  const i64 b = blockIdx.x;
  const Shape s = {dim, d1, d2};
  SHARED(memory);
  bits* room = (bits*)memory;
  real* spares = (real*)(room + 128);
  real* spare = spares + (i64)group() * spare_size;
  real* h = iterate ? iterate + b * chunk * dim : spares + (i64)groups() * spare_size;
  real* z = mixed ? mixed + b * chunk * dim : h + chunk * dim;
  const i64 chunks = (steps + chunk - 1) / chunk;
  const real new_share = (real)damping, old_share = (real)1 - new_share;
  Outcome outcome = {0, 0, CONVERGED};
  for (i64 q = 0; q < chunks; ++q) {
    const i64 c = ADJOINT ? chunks - 1 - q : q, begin = c * chunk, end = begin + chunk < steps ? begin + chunk : steps;
    const int n = (int)(end - begin);
    const i64 row = b * steps + begin;  // the first step of the chunk, counted over all sequences
    // What comes in; how much of an error would leave; whether all is zero
    bits decay = 0, any = 0;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
      real state = 0;
      if (q > 0) state = carry[b * dim + i];
      else if (initial) state = widen(initial[b * dim + i]);
      carry[b * dim + i] = state;
      any = most(any, magnitude_bits(state));
      if (guess)
        for (int k = 0; k < n; ++k) any = most(any, magnitude_bits((real)widen(source[(row + k) * dim + i])));
      if (chunks > 1 && (!ADJOINT || end < steps)) {
        real rest = 1;
        for (int k = 0; k < n; ++k) rest *= (real)widen(lam[(row + k + ADJOINT) * dim + i]);
        if (rest == rest) decay = most(decay, magnitude_bits(rest));
      }
    }
    block_largest(decay, any, room + 64);  // not where the last iteration may still be read
    const double share = tolerance_share(chunks, from_magnitude(decay));
    for (int i = threadIdx.x; i < dim; i += blockDim.x)
      for (int k = 0; k < n; ++k)
        h[(i64)k * dim + i] = guess && any ? (real)widen(guess[(row + k) * dim + i]) : (real)0;
    __syncthreads();
    Chunk now = {0, 0, outcome.scale, false};
    while (now.goes_on(max_iter)) {
      for (int k = group(); k < n; k += groups())
        mix_step(s, first, second, lam, gate, source, row + k, h + (i64)k * dim, z + (i64)k * dim, spare);
      __syncthreads();
      bits change = 0, size = 0;
      for (int i = threadIdx.x; i < dim; i += blockDim.x)
        scan_channel(n, dim, lam + row * dim + i, z + i, h + i, carry[b * dim + i], old_share, new_share, change, size);
      block_largest(change, size, room);
      now.iterated(from_magnitude(change), from_magnitude(size), outcome.scale, share, eps, rtol, atol);
    }
    outcome.add(now);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
      carry[b * dim + i] =
          ADJOINT ? (real)widen(lam[row * dim + i]) * h[i] : h[(i64)(n - 1) * dim + i];
      if ((void*)h != (void*)(value + row * dim))
        for (int k = 0; k < n; ++k) value[(row + k) * dim + i] = narrow(h[(i64)k * dim + i]);
    }
    if (threadIdx.x == 0) counts[b * chunks + c] = (int)now.count;
  }
  if (threadIdx.x == 0) {
    change_out[b] = outcome.change;
    scale_out[b] = outcome.scale;
    state_out[b] = outcome.status;
  }
}

// z (rows, D): what every step adds to the scan, from the iterate h (rows, D). Shared memory per group: D numbers, and
// `spare`.
extern "C" __global__ void __launch_bounds__(512, 1)
mix_steps(const store* first, const store* second, const store* lam, const store* gate, const store* source,
          const store* h, real* z, int dim, int d1, int d2, i64 rows, int spare_size) {
  const Shape s = {dim, d1, d2};
  SHARED(memory);
  real* v = (real*)memory + (i64)group() * (dim + spare_size);
  const i64 step = (i64)blockIdx.x * groups() + group();
  if (step >= rows) return;  // a whole warp, or the whole block
  for (int i = place(); i < dim; i += group_size()) v[i] = widen(h[step * dim + i]);
  group_sync();
  mix_step(s, first, second, lam, gate, source, step, v, v, v + dim);
  for (int i = place(); i < dim; i += group_size()) z[step * dim + i] = v[i];
}

#define AHEAD 8

// One scan over all steps: h_t = lam_t h_{t-1} + z_t, or s_t = lam_{t+1} s_{t+1} + z_t. One thread per channel.
extern "C" __global__ void __launch_bounds__(128)
scan_steps(const store* lam, const real* z, const store* initial, store* value, i64 channels, int dim, i64 steps) {
  const i64 channel = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  const i64 b = channel / dim, base = b * steps * dim + channel % dim;
  real state = initial ? (real)widen(initial[channel]) : (real)0;
  for (i64 from = 0; from < steps; from += AHEAD) {
    real decay[AHEAD], add[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const i64 turn = from + k < steps ? from + k : steps - 1, t = ADJOINT ? steps - 1 - turn : turn;
      decay[k] = widen(lam[base + t * dim]);
      add[k] = z[base + t * dim];
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const i64 turn = from + k;
      if (turn < steps) {
        real f;
        if (ADJOINT) {
          f = add[k] + state;
          state = decay[k] * f;
        } else {
          f = decay[k] * state + add[k];
          state = f;
        }
        value[base + (ADJOINT ? steps - 1 - turn : turn) * dim] = narrow(f);
      }
    }
  }
}
