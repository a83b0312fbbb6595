// RMSNorm of rows and its adjoint: y = weight * n, n = scale x, scale = 1 / sqrt(mean(x^2) + eps).
//
//     x_bar = scale (weight y_bar - mean(weight y_bar n) n),  weight_bar = sum over rows of y_bar n
//
// A group of THREADS, a warp or a block, takes a row; in the adjoint rows one after the other, whose cotangents of the
// weight it adds up in registers. Memory traffic: every array once, and a row of sums a group.
//
// Macros: STORE, THREADS of a row, ROWS of a block where a warp has one, CHANNELS of a thread.
#include "sums.cuh"

constexpr int GROUPS = THREADS == 32 ? ROWS : 1;

// x, y (N, D); weight (D); scale (N)
extern "C" __global__ void __launch_bounds__(THREADS* GROUPS)
rms_rows(const store* x, const store* weight, store* y, store* scale, i64 rows, int dim, double eps) {
  SHARED(memory);
  const int group = threadIdx.x / THREADS, me = threadIdx.x % THREADS;
  const i64 row = (i64)blockIdx.x * GROUPS + group;
  if (row >= rows) return;  // whole warps only: a row of a block has the block
  real v[CHANNELS], total[1] = {0};
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + me;
    v[c] = d < dim ? widen(x[row * dim + d]) : (real)0;
    total[0] += v[c] * v[c];
  }
  const real* sum = group_sums<1, THREADS>(total, (real*)memory + group * sums_size<1, THREADS>());
  const real factor = 1 / sqrt(sum[0] / (real)dim + (real)eps);
  if (me == 0) scale[row] = narrow(factor);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + me;
    if (d < dim) y[row * dim + d] = narrow(widen(weight[d]) * (v[c] * factor));
  }
}

// y_bar, x_bar (N, D); of each group the sums for the weight (groups, D)
extern "C" __global__ void __launch_bounds__(THREADS* GROUPS)
rms_rows_vjp(const store* x, const store* weight, const store* scale, const store* y_bar, store* x_bar, store* parts,
             i64 rows, int dim) {
  SHARED(memory);
  const int group = threadIdx.x / THREADS, me = threadIdx.x % THREADS;
  const i64 worker = (i64)blockIdx.x * GROUPS + group;
  real *room = (real*)memory + group * sums_size<1, THREADS>(), weights[CHANNELS] = {};
  for (i64 row = worker; row < rows; row += (i64)gridDim.x * GROUPS) {
    const real factor = widen(scale[row]);
    real n[CHANNELS], inner[CHANNELS], total[1] = {0};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + me;
      n[c] = inner[c] = 0;
      if (d < dim) {
        const real bar = widen(y_bar[row * dim + d]);
        n[c] = widen(x[row * dim + d]) * factor;
        inner[c] = bar * widen(weight[d]);
        weights[c] += bar * n[c];
        total[0] += inner[c] * n[c];
      }
    }
    group_barrier<THREADS>();  // the sum of the row before has been read
    const real along = group_sums<1, THREADS>(total, room)[0] / (real)dim;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + me;
      if (d < dim) x_bar[row * dim + d] = narrow(factor * (inner[c] - n[c] * along));
    }
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + me;
    if (d < dim) parts[worker * dim + d] = narrow(weights[c]);
  }
}
