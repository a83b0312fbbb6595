// One factor of a Kronecker mixer from what a layer's linear map gives; section 5 of docs/mathematics.md.
//
//     U the upper triangle filled with p, row by row;  r = U U^T with rows of unit length;
//     K = scale diag(d) r / divisor, transposed where FLIP,
//
// and divisor = 1, or where SPECTRAL the largest eigenvalue of r as STEPS power iterations from a constant vector estimate
// it, plus eps. The adjoint makes the small matrices again and goes back through the power iteration.
//
// A block takes a row: one matrix. Memory traffic: everything once. Macros: STORE, EDGE, FLIP and SPECTRAL 0 or 1, THREADS.
#include "common.cuh"

constexpr u32 EVERY = 0xffffffffu;
constexpr int STEPS = 16, PITCH = EDGE + 1, WARPS = THREADS / 32;

__device__ __forceinline__ real warp_sum(real v) {
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) v += __shfl_xor_sync(EVERY, v, reach);
  return v;
}

// The matrices of a row in shared memory.
struct Matrices {
  real *upper, *r, *norm, *x, *length;  // EDGE x PITCH twice; EDGE; (STEPS + 1) x EDGE; STEPS

  __device__ static Matrices in(real* memory) {
    return {memory, memory + EDGE * PITCH, memory + 2 * EDGE * PITCH, memory + 2 * EDGE * PITCH + EDGE,
            memory + 2 * EDGE * PITCH + EDGE * (STEPS + 2)};
  }
  static constexpr int NUMBERS = 2 * EDGE * PITCH + EDGE * (STEPS + 2) + STEPS;

  // Sum of a row times a vector, in every lane.
  __device__ __forceinline__ real row_times(int i, const real* v, int lane) const {
    real sum = 0;
    for (int j = lane; j < EDGE; j += 32) sum += r[i * PITCH + j] * v[j];
    return warp_sum(sum);
  }

  // Everything from p; returns the divisor. `room` has two numbers of each warp.
  __device__ real make(const store* p, real start, real eps, real* room) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
      const int i = at / EDGE, k = at % EDGE;
      upper[i * PITCH + k] = k >= i ? widen(p[i * EDGE - i * (i - 1) / 2 + k - i]) : (real)0;
    }
    for (int i = threadIdx.x; i < EDGE; i += THREADS) x[i] = start;
    __syncthreads();
    for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
      const int i = at / EDGE, j = at % EDGE;
      real total = 0;
      for (int k = i > j ? i : j; k < EDGE; ++k) total += upper[i * PITCH + k] * upper[j * PITCH + k];
      r[i * PITCH + j] = total;
    }
    __syncthreads();
    for (int i = warp; i < EDGE; i += WARPS) {
      real total = 0;
      for (int j = lane; j < EDGE; j += 32) total += r[i * PITCH + j] * r[i * PITCH + j];
      const real own = sqrt(warp_sum(total)), inverse = 1 / larger(own, eps);
      if (lane == 0) norm[i] = own;
      for (int j = lane; j < EDGE; j += 32) r[i * PITCH + j] *= inverse;
    }
    __syncthreads();
    if constexpr (!SPECTRAL) return 1;
    for (int l = 0; l <= STEPS; ++l) {
      // after the last step its product is only for the estimate
      real *from = x + l * EDGE, *to = x + (l + 1) * EDGE, squares = 0;
      for (int i = warp; i < EDGE; i += WARPS) {
        const real product = row_times(i, from, lane);
        if (l < STEPS) {
          squares += product * product;
          if (lane == 0) to[i] = product;
        } else {
          squares += x[(STEPS - 1) * EDGE + i] * product;
        }
      }
      if (lane == 0) room[(l % 2) * WARPS + warp] = squares;
      __syncthreads();
      real total = 0;
      for (int w = 0; w < WARPS; ++w) total += room[(l % 2) * WARPS + w];
      if (l == STEPS) return total + eps;
      const real own = sqrt(total), inverse = 1 / larger(own, (real)1e-12);
      if (threadIdx.x == 0) length[l] = own;
      for (int i = threadIdx.x; i < EDGE; i += THREADS) to[i] *= inverse;
      __syncthreads();
    }
    return 1;
  }
};

// p (rows, EDGE (EDGE + 1) / 2), diag (rows, EDGE), k (rows, EDGE, EDGE)
extern "C" __global__ void __launch_bounds__(THREADS)
factor(const store* p, const store* diag, double start, double eps, double scale, store* k) {
  SHARED(memory);
  real* room = (real*)memory;
  const Matrices of = Matrices::in(room + 2 * WARPS);
  const i64 n = blockIdx.x;
  const real divisor = of.make(p + n * (EDGE * (EDGE + 1) / 2), (real)start, (real)eps, room);
  const real whole = (real)scale / divisor;
  for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
    const int i = FLIP ? at % EDGE : at / EDGE, j = FLIP ? at / EDGE : at % EDGE;
    k[n * (EDGE * EDGE) + at] = narrow(whole * widen(diag[n * EDGE + i]) * of.r[i * PITCH + j]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
factor_vjp(const store* p, const store* diag, double start, double eps, double scale, const store* k_bar, store* p_bar,
           store* diag_bar) {
  SHARED(memory);
  real* room = (real*)memory;
  const Matrices of = Matrices::in(room + 2 * WARPS);
  real *bar = (real*)memory + 2 * WARPS + Matrices::NUMBERS, *x_bar = bar + EDGE * PITCH, *w_bar = x_bar + EDGE;
  const i64 n = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const real divisor = of.make(p + n * (EDGE * (EDGE + 1) / 2), (real)start, (real)eps, room);
  const real whole = (real)scale / divisor;
  for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
    const int i = FLIP ? at % EDGE : at / EDGE, j = FLIP ? at / EDGE : at % EDGE;
    bar[i * PITCH + j] = widen(k_bar[n * (EDGE * EDGE) + at]);
  }
  __syncthreads();
  real inner = 0;
  for (int i = warp; i < EDGE; i += WARPS) {
    const real own = widen(diag[n * EDGE + i]);
    real total = 0;
    for (int j = lane; j < EDGE; j += 32) {
      total += bar[i * PITCH + j] * of.r[i * PITCH + j];
      bar[i * PITCH + j] *= whole * own;
    }
    total = whole * warp_sum(total);
    inner += total * own;
    if (lane == 0) diag_bar[n * EDGE + i] = narrow(total);
  }
  if constexpr (SPECTRAL) {
    __syncthreads();  // `room` has been read
    if (lane == 0) room[warp] = inner;
    __syncthreads();
    real sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += room[w];
    // sigma = x_15^T r x_16, and x_{l+1} = r x_l / ||r x_l||, backwards; x_15 has a cotangent of its own. The matrix r is
    // not symmetric: its rows have been scaled.
    const real sigma_bar = -sum / divisor;
    const real *last = of.x + (STEPS - 1) * EDGE, *end = of.x + STEPS * EDGE;
    for (int j = threadIdx.x; j < EDGE; j += THREADS) {
      real total = 0;
      for (int i = 0; i < EDGE; ++i) {
        const real left = sigma_bar * last[i];
        total += left * of.r[i * PITCH + j];
        bar[i * PITCH + j] += left * end[j];
      }
      x_bar[j] = total;
    }
    __syncthreads();
    for (int l = STEPS - 1; l >= 0; --l) {
      const real *from = of.x + l * EDGE, *to = of.x + (l + 1) * EDGE;
      real along = 0;
      for (int i = 0; i < EDGE; ++i) along += x_bar[i] * to[i];  // by every thread
      if (!(of.length[l] >= (real)1e-12)) along = 0;
      const real inverse = 1 / larger(of.length[l], (real)1e-12);
      for (int i = threadIdx.x; i < EDGE; i += THREADS) w_bar[i] = (x_bar[i] - along * to[i]) * inverse;
      __syncthreads();
      for (int j = threadIdx.x; j < EDGE; j += THREADS) {
        real total = 0;
        for (int i = 0; i < EDGE; ++i) {
          total += w_bar[i] * of.r[i * PITCH + j];
          bar[i * PITCH + j] += w_bar[i] * from[j];
        }
        if (l == STEPS - 1) {
          real own = 0;
          for (int k = 0; k < EDGE; ++k) own += of.r[j * PITCH + k] * end[k];
          total += sigma_bar * own;
        }
        x_bar[j] = total;
      }
      __syncthreads();
    }
  }
  __syncthreads();
  // rows of unit length, backwards; then p_bar is the upper triangle of (M_bar + M_bar^T) U
  for (int i = warp; i < EDGE; i += WARPS) {
    real along = 0;
    for (int j = lane; j < EDGE; j += 32) along += of.r[i * PITCH + j] * bar[i * PITCH + j];
    along = of.norm[i] >= (real)eps ? warp_sum(along) : (real)0;
    const real inverse = 1 / larger(of.norm[i], (real)eps);
    for (int j = lane; j < EDGE; j += 32)
      bar[i * PITCH + j] = (bar[i * PITCH + j] - along * of.r[i * PITCH + j]) * inverse;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
    const int i = at / EDGE, k = at % EDGE;
    if (k < i) continue;
    real total = 0;
    for (int j = 0; j <= k; ++j) total += (bar[i * PITCH + j] + bar[j * PITCH + i]) * of.upper[j * PITCH + k];
    p_bar[n * (EDGE * (EDGE + 1) / 2) + i * EDGE - i * (i - 1) / 2 + k - i] = narrow(total);
  }
}
