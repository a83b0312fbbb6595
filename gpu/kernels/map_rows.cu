// Rows of unit length, and their adjoint: u = y / max(||y||, eps), section 5 of docs/mathematics.md.
//
//     y_bar = (u_bar - (u . u_bar) u) / max(||y||, eps), without the second term below eps
//
// And rows of given lengths: w = m y / ||y||;  m_bar = w_bar . y / ||y||,  y_bar = (w_bar - m_bar y / ||y||) m / ||y||
//
// A group of THREADS, a warp or a block, takes a row. Memory traffic: everything once, y or u and u_bar again from the
// caches. Macros: STORE, THREADS of a row, ROWS of a block.
#include "sums.cuh"

constexpr int GROUPS = THREADS == 32 ? ROWS : 1;

extern "C" __global__ void __launch_bounds__(THREADS* GROUPS)
unit_rows(const store* y, store* u, store* norm, i64 rows, int dim, double eps) {
  SHARED(memory);
  const int group = threadIdx.x / THREADS, me = threadIdx.x % THREADS;
  const i64 row = (i64)blockIdx.x * GROUPS + group;
  if (row >= rows) return;  // whole warps only: a row of a block has the block
  real total[1] = {0};
  for (int d = me; d < dim; d += THREADS) {
    const real v = widen(y[row * dim + d]);
    total[0] += v * v;
  }
  const real* sum = group_sums<1, THREADS>(total, (real*)memory + group * sums_size<1, THREADS>());
  const real length = sqrt(sum[0]), inverse = 1 / larger(length, (real)eps);
  if (me == 0) norm[row] = narrow(length);
  for (int d = me; d < dim; d += THREADS) u[row * dim + d] = narrow(widen(y[row * dim + d]) * inverse);
}

extern "C" __global__ void __launch_bounds__(THREADS* GROUPS)
unit_rows_vjp(const store* u, const store* norm, const store* u_bar, store* y_bar, i64 rows, int dim, double eps) {
  SHARED(memory);
  const int group = threadIdx.x / THREADS, me = threadIdx.x % THREADS;
  const i64 row = (i64)blockIdx.x * GROUPS + group;
  if (row >= rows) return;
  real total[1] = {0};
  for (int d = me; d < dim; d += THREADS) total[0] += widen(u[row * dim + d]) * widen(u_bar[row * dim + d]);
  const real* sum = group_sums<1, THREADS>(total, (real*)memory + group * sums_size<1, THREADS>());
  const real length = widen(norm[row]), along = length >= (real)eps ? sum[0] : (real)0;
  const real inverse = 1 / larger(length, (real)eps);
  for (int d = me; d < dim; d += THREADS) {
    const i64 at = row * dim + d;
    y_bar[at] = narrow((widen(u_bar[at]) - along * widen(u[at])) * inverse);
  }
}

// y, w (N, D), m (N)
extern "C" __global__ void __launch_bounds__(THREADS* GROUPS)
long_rows(const store* y, const store* m, store* w, i64 rows, int dim) {
  SHARED(memory);
  const int group = threadIdx.x / THREADS, me = threadIdx.x % THREADS;
  const i64 row = (i64)blockIdx.x * GROUPS + group;
  if (row >= rows) return;
  real total[1] = {0};
  for (int d = me; d < dim; d += THREADS) {
    const real v = widen(y[row * dim + d]);
    total[0] += v * v;
  }
  const real* sum = group_sums<1, THREADS>(total, (real*)memory + group * sums_size<1, THREADS>());
  const real scale = widen(m[row]) / sqrt(sum[0]);
  for (int d = me; d < dim; d += THREADS) w[row * dim + d] = narrow(widen(y[row * dim + d]) * scale);
}

extern "C" __global__ void __launch_bounds__(THREADS* GROUPS)
long_rows_vjp(const store* y, const store* m, const store* w_bar, store* y_bar, store* m_bar, i64 rows, int dim) {
  SHARED(memory);
  const int group = threadIdx.x / THREADS, me = threadIdx.x % THREADS;
  const i64 row = (i64)blockIdx.x * GROUPS + group;
  if (row >= rows) return;
  real totals[2] = {0, 0};
  for (int d = me; d < dim; d += THREADS) {
    const real v = widen(y[row * dim + d]);
    totals[0] += v * v;
    totals[1] += v * widen(w_bar[row * dim + d]);
  }
  const real* sums = group_sums<2, THREADS>(totals, (real*)memory + group * sums_size<2, THREADS>());
  const real inverse = 1 / sqrt(sums[0]), along = sums[1] * inverse, scale = widen(m[row]) * inverse;
  if (me == 0) m_bar[row] = narrow(along);
  for (int d = me; d < dim; d += THREADS) {
    const i64 at = row * dim + d;
    y_bar[at] = narrow((widen(w_bar[at]) - along * widen(y[at]) * inverse) * scale);
  }
}
