// Cotangents of all inputs of (F) at its solution, for any mixer and any shape; section 6 of docs/mathematics.md.
//
// With d = x - h, e = g s and m = x - P d:
//     lam_bar_t = s_t (h_{t-1} - m_t), or s_t h_{t-1} with a gate, and gate_bar = s m
//     x_bar = e - P^T e,  initial_bar = lam_1 s_1
//     K1_bar = -(E K2) D^T,  K2_bar = -E^T (K1 D)
//     M_bar_j = -alpha_j e_j d_j^T,  alpha_bar_j = -e_j . (M_j d_j)
//     reflection i, which sees v_i = d - sum_{j<i} y_j u_j and w_i = e - sum_{j>i} z_j u_j with y_i = alpha_i u_i . v_i
//     and z_i = alpha_i u_i . w_i:  u_bar_i = -y_i w_i - z_i v_i,  alpha_bar_i = -(u_i . v_i)(u_i . w_i);
//     a term of a sum sees d and e themselves
//
// One group of threads per step. Memory traffic: everything read once and written once, h twice.
//
// Macros: STORE; KIND, RANK, WIDE (relax_mix.cuh); GATED 0 or 1 (0: g = 1 - lam).
#include "common.cuh"
#include "relax_mix.cuh"

#ifndef GATED
#define GATED 0
#endif

// No two of them are the same memory, where one is written
typedef const store* __restrict__ In;
typedef store* __restrict__ Out;

// Arrays of one step
struct Step {
  const store *first, *second, *lam, *gate, *x, *h, *s, *before;  // before null: zero
  store *lam_bar, *gate_bar, *x_bar, *first_bar, *second_bar;
};

__device__ __forceinline__ real gate_at(const Step& p, int i) {
  return GATED ? (real)widen(p.gate[i]) : (real)1 - (real)widen(p.lam[i]);
}

__device__ __forceinline__ void put_lam_bar(const Step& p, int i, real mixed) {
  const real s = widen(p.s[i]), before = p.before ? (real)widen(p.before[i]) : (real)0;
  p.lam_bar[i] = narrow(GATED ? s * before : s * (before - mixed));
  if (GATED) p.gate_bar[i] = narrow(s * mixed);
}

#if KIND == KRONECKER

__device__ __forceinline__ void pull_step(Shape s, const Step& p, real* spare) {
  real *d = spare, *e = d + s.dim, *left = e + s.dim, *right = left + s.dim;
  for (int i = place(); i < s.dim; i += group_size()) {
    d[i] = (real)widen(p.x[i]) - (real)widen(p.h[i]);
    e[i] = gate_at(p, i) * (real)widen(p.s[i]);
  }
  group_sync();
  const int d1 = s.d1, d2 = s.d2;
  const Matrix<false, store> K1 = {p.first, d1}, K2 = {p.second, d2};
  const Matrix<true, store> K1T = {p.first, d1}, K2T = {p.second, d2};
  const Matrix<false, real> D = {d, d2}, E = {e, d2}, K1D = {left, d2}, EK2 = {right, d2};
  const Matrix<true, real> DT = {d, d2}, ET = {e, d2};
  product(K1, D, d1, d1, d2, [&](int i, int j, real sum) { left[i * d2 + j] = sum; });
  product(E, K2, d1, d2, d2, [&](int i, int j, real sum) { right[i * d2 + j] = sum; });
  group_sync();
  product(K1D, K2T, d1, d2, d2, [&](int i, int j, real sum) {
    put_lam_bar(p, i * d2 + j, (real)widen(p.x[i * d2 + j]) - sum);
  });
  product(K1T, EK2, d1, d1, d2, [&](int i, int j, real sum) { p.x_bar[i * d2 + j] = narrow(e[i * d2 + j] - sum); });
  product(EK2, DT, d1, d2, d1, [&](int i, int j, real sum) { p.first_bar[i * d1 + j] = narrow(-sum); });
  product(ET, K1D, d2, d1, d2, [&](int i, int j, real sum) { p.second_bar[i * d2 + j] = narrow(-sum); });
  group_sync();
}

#elif KIND == MONARCH

__device__ __forceinline__ void pull_step(Shape s, const Step& p, real* spare) {
  real *d = spare, *e = d + s.dim, *md = e + s.dim;
  const int size = s.d2;
  for (int i = place(); i < s.dim; i += group_size()) {
    d[i] = (real)widen(p.x[i]) - (real)widen(p.h[i]);
    e[i] = gate_at(p, i) * (real)widen(p.s[i]);
  }
  group_sync();
  rows_times(p.first, d, size, s.dim, [&](int i, real sum) { md[i] = sum; });
  group_sync();
  for (int j = place(); j < s.d1; j += group_size()) {
    real total = 0;
    for (int i = 0; i < size; ++i) total -= e[j * size + i] * md[j * size + i];
    p.second_bar[j] = narrow(total);
  }
  for (int i = place(); i < s.dim; i += group_size()) {
    const int block = i / size, column = i % size;
    const real alpha = widen(p.second[block]), mine = d[i];
    put_lam_bar(p, i, (real)widen(p.x[i]) - alpha * md[i]);
    const i64 at = (i64)block * size * size + column;
    const real* es = e + block * size;
    real sum = 0;
    for (int row = 0; row < size; ++row) {
      const real weight = alpha * es[row];
      sum += weight * (real)widen(p.first[at + (i64)row * size]);
      p.first_bar[at + (i64)row * size] = narrow(-(weight * mine));
    }
    p.x_bar[i] = narrow(e[i] - sum);
  }
  group_sync();
}

#elif MANY

// Reflection after reflection, v to the end and back again
__device__ __forceinline__ void pull_step(Shape s, const Step& p, real* spare) {
  real *v = spare, *w = v + s.dim, *dots = w + s.dim, *weights = dots + RANK, *room = weights + RANK;
  const bool product = KIND == HOUSEHOLDER;
  for (int i = place(); i < s.dim; i += group_size()) {
    v[i] = (real)widen(p.x[i]) - (real)widen(p.h[i]);
    w[i] = gate_at(p, i) * (real)widen(p.s[i]);
  }
  group_sync();
  for (int a = 0; a < RANK; ++a) {
    const store* u = p.first + (i64)a * s.dim;
    const real dot = inner(s.dim, u, v, room);
    if (place() == 0) dots[a] = dot;
    if (product) take_away(s.dim, u, (real)widen(p.second[a]) * dot, v);
  }
  group_sync();
  for (int i = place(); i < s.dim; i += group_size()) {
    real mixed = (real)widen(p.h[i]) + v[i];
    if (!product)
      for (int a = 0; a < RANK; ++a)
        mixed -= (real)widen(p.second[a]) * dots[a] * (real)widen(p.first[(i64)a * s.dim + i]);
    put_lam_bar(p, i, mixed);
  }
  for (int a = RANK - 1; a >= 0; --a) {
    const store* u = p.first + (i64)a * s.dim;
    const real alpha = widen(p.second[a]), dot = inner(s.dim, u, w, room), y = alpha * dots[a], z = alpha * dot;
    if (place() == 0) {
      p.second_bar[a] = narrow(-dots[a] * dot);
      weights[a] = z;
    }
    for (int i = place(); i < s.dim; i += group_size()) {
      const real of = widen(u[i]);
      if (product) v[i] += y * of;
      p.first_bar[(i64)a * s.dim + i] = narrow(-(y * w[i]) - z * v[i]);
      if (product) w[i] -= z * of;
    }
    group_sync();
  }
  for (int i = place(); i < s.dim; i += group_size()) {
    real e = w[i];
    if (!product)
      for (int a = 0; a < RANK; ++a) e -= weights[a] * (real)widen(p.first[(i64)a * s.dim + i]);
    p.x_bar[i] = narrow(e);
  }
  group_sync();
}

#else

#define R1 (RANK > 0 ? RANK : 1)

__device__ __forceinline__ void pull_step(Shape s, const Step& p, real* spare) {
  // U d, then U e, then U U^T below its diagonal
  real sums[2 * R1 + PAIRS] = {}, y[R1], z[R1];
  for (int i = place(); i < s.dim; i += group_size()) {
    const real d = (real)widen(p.x[i]) - (real)widen(p.h[i]), e = gate_at(p, i) * (real)widen(p.s[i]);
    real u[R1];
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
      u[a] = widen(p.first[(i64)a * s.dim + i]);
      sums[a] += u[a] * d;
      sums[RANK + a] += u[a] * e;
#if KIND == HOUSEHOLDER
#pragma unroll
      for (int b = 0; b < a; ++b) sums[RANK + pair(a, b)] += u[a] * u[b];
#endif
    }
  }
  group_sums<2 * R1 + PAIRS>(sums, spare);
#pragma unroll
  for (int a = 0; a < RANK; ++a) {
#if KIND == HOUSEHOLDER
#pragma unroll
    for (int b = 0; b < a; ++b) sums[a] -= sums[RANK + pair(a, b)] * y[b];
#endif
    y[a] = (real)widen(p.second[a]) * sums[a];
  }
#pragma unroll
  for (int a = RANK - 1; a >= 0; --a) {
    real total = sums[RANK + a];
#if KIND == HOUSEHOLDER
#pragma unroll
    for (int b = RANK - 1; b > a; --b) total -= sums[RANK + pair(b, a)] * z[b];
#endif
    z[a] = (real)widen(p.second[a]) * total;
    if (place() == 0) p.second_bar[a] = narrow(-sums[a] * total);
  }
  for (int i = place(); i < s.dim; i += group_size()) {
    const real x = widen(p.x[i]), d = x - (real)widen(p.h[i]), e = gate_at(p, i) * (real)widen(p.s[i]);
    real u[R1], u_bar[R1], v = d, w = e, mixed = x;
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
      u[a] = widen(p.first[(i64)a * s.dim + i]);
      u_bar[a] = -z[a] * v;
      if (KIND == HOUSEHOLDER) v -= y[a] * u[a];
      mixed -= y[a] * u[a];
    }
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
      u_bar[a] -= y[a] * (KIND == HOUSEHOLDER ? w : e);
      w -= z[a] * u[a];
      p.first_bar[(i64)a * s.dim + i] = narrow(u_bar[a]);
    }
    put_lam_bar(p, i, mixed);
    p.x_bar[i] = narrow(w);
  }
}

#endif

// first, first_bar, second, second_bar as relax_mix.cuh says; the rest (B, T, D), initial (B, D) or null. Shared
// memory: `spare` numbers per group, unless they lie in `scratch`, for each block.
extern "C" __global__ void __launch_bounds__(256, 2)
pull(In first, In second, In lam, In gate, In x, In initial, In h, In s, Out lam_bar, Out gate_bar, Out x_bar,
     Out initial_bar, Out first_bar, Out second_bar, real* __restrict__ scratch, int dim, int d1, int d2, i64 rows,
     i64 steps, int spare_size) {
  const Shape shape = {dim, d1, d2};
  const i64 one = first_size(shape), two = second_size(shape);
  SHARED(memory);
  real* spare = scratch ? scratch + (i64)blockIdx.x * groups() * spare_size : (real*)memory;
  spare += (i64)group() * spare_size;
  for (i64 n = (i64)blockIdx.x * groups() + group(); n < rows; n += (i64)gridDim.x * groups()) {
    const i64 at = n * dim, t = n % steps;
    const store* before = t > 0 ? h + at - dim : initial ? initial + n / steps * dim : 0;
    const Step p = {first + n * one, second + n * two, lam + at, GATED ? gate + at : 0, x + at, h + at, s + at, before,
                    lam_bar + at, GATED ? gate_bar + at : 0, x_bar + at, first_bar + n * one, second_bar + n * two};
    pull_step(shape, p, spare);
    if (t == 0)
      for (int i = place(); i < dim; i += group_size())
        initial_bar[n / steps * dim + i] = narrow((real)widen(p.lam[i]) * (real)widen(p.s[i]));
  }
}
