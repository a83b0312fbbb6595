// One step of FP-Mamba with a Kronecker mixer; (M) of section 5 of docs/mathematics.md, see mamba_kronecker.cuh.
//
//     y = norm(gate (r + w u)),   u = x - K1 (X - Y) K2^T,   r = (exp(delta A) * H) C,   w = delta (B . C) + D
//
// One block per sequence iterates from y = 0. A thread has the same channels throughout, and an iteration has three barriers:
// behind X - Y, behind the first product, behind the sums of the norm. How far it went is known to all behind the first of
// them, and is looked at after the products: at the end they are those of the last y, which the state needs.
// Where they are KEPT in registers the factors are made here, by a warp each while the others are at the state; else they are given.
// Memory traffic: rows once, the factors or their arguments once, the state read and written once.
//
// Macros, beside those of mamba_kronecker.cuh: KEPT 0 or 1; HOLD, where the decayed state is meanwhile: 0 nowhere (it is read
// again), 1 in registers, 2 in shared memory.
#include "mamba_kronecker.cuh"

// factors (B, FACTORS), or null and mixer (B, T, stride) as in Arguments, of which arguments (B, T, OUTPUTS) is written unless null;
// mixed (B, T, D), u, or null; the rest as in mamba_solve.cu, at the step `t` alone: B and C are written,
// norms (B, T, 2) of their arguments too unless null.
// Shared memory: 2 STATES; three rooms of two a warp; the factors, X - Y and what is between; one a channel; KEPT three an
// edge; PARKED five a channel
// of the threads; with HOLD 2 the state.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
mamba_kronecker_solve(const store* factors, const store* x, const store* delta, const store* A, store* B, store* C,
                      const store* skip, const store* gate, const store* weight, const store* bias, const store* before,
                      store* state, store* y_out, store* mixed_out, i64 steps, i64 t, int size, int heads, double eps, double rtol,
                      double atol, i64 max_iter, double damping, i64* iterations, double* residual, unsigned char* met,
                      const store* b_arguments, const store* c_arguments, const store* fed, int width, int at_b, int at_c,
                      double bc_eps, store* norms, const store* mixer, int stride, int at_mixer, double start, double unit_eps,
                      double alpha_max, store* arguments) {
  SHARED(memory);
  real *rowB = (real*)memory, *rowC = rowB + STATES, *sums = rowC + STATES, *tops = sums + 2 * WARPS, *swinging = tops + 2 * WARPS;
  real *k1 = rowB + up(2 * STATES + 6 * WARPS, PIECE), *k2 = k1 + matrix(EDGE1, EDGE1), *gap = k2 + matrix(EDGE2, EDGE2);
  real *between = gap + matrix(EDGE1, EDGE2), *exchange = between + matrix(EDGE2, EDGE2);  // there may be a triangle
  real *making = exchange + up(D, PIECE), *parked = making + (KEPT ? up(3 * (EDGE1 + EDGE2) + 2, PIECE) : 0);
  real* meanwhile = parked + (PARKED ? 5 * OWNED * THREADS : 0);
  const i64 b = blockIdx.x, row = b * steps + t;
  const Inputs in = {nullptr, x + row * D, delta + row * (HEADS ? heads : D), A, GATED ? gate + row * D : nullptr, D, size, heads};

  // the state is on its way before anything else is looked at
  real held[HOLD == 1 ? OWN : 1][VECTOR];
  auto fetch = [&](int pass, int piece) {
    load_part(before + (b * D + pass_channel(pass)) * size, size, piece_begin(piece), held[HOLD == 1 ? pass * PIECES + piece : 0]);
  };
  if constexpr (HOLD == 1)
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece)
        if (pass_channel(pass) < D) fetch(pass, piece);
  constexpr int MATRICES = matrix(EDGE1, EDGE1) + matrix(EDGE2, EDGE2) + matrix(EDGE1, EDGE2) + matrix(EDGE2, EDGE2);
  if constexpr (EDGE1 % 16 != 0 || EDGE2 % 16 != 0) {
    for (int at = threadIdx.x; at < MATRICES; at += THREADS) k1[at] = 0;
    __syncthreads();
  }
  // of both factors the diagonals, then rows' scales; two vectors; what they are divided by
  real *open1 = making, *open2 = open1 + EDGE1, *turns1 = open2 + EDGE2, *turns2 = turns1 + 2 * EDGE1, *divisors = turns2 + 2 * EDGE2;
  if constexpr (KEPT) {
    const Arguments of = {mixer, nullptr, nullptr, fed, width, stride, at_mixer, -1, -1};
    auto argument = [&](int k) {
      const real v = of.from(mixer, row, stride, at_mixer, b, k);
      if (arguments) arguments[row * OUTPUTS + k] = narrow(v);
      return v;
    };
    fill<EDGE1>(gap, open1, argument, 0, ENTRIES);
    fill<EDGE2>(between, open2, argument, triangle(EDGE1), ENTRIES + EDGE1);
  } else {
    fetch_factors(factors + b * FACTORS, k1, k2);
  }
  real own_x[PARKED ? 1 : OWNED] = {};
  auto xs = [&](int c) -> real& {
    if constexpr (PARKED)
      return parked[(2 * OWNED + c) * THREADS + threadIdx.x];
    else
      return own_x[c];
  };
  own([&](int c, int i, int j) {
    xs(c) = widen(in.x[i * EDGE2 + j]);
    if constexpr (!KEPT) gap[i * S2 + j] = xs(c);
  });
  for (int n = size + threadIdx.x; n < STATES; n += THREADS) rowB[n] = rowC[n] = 0;
  {
    const Arguments of = {nullptr, b_arguments, c_arguments, fed, width, 0, -1, at_b, at_c};
    const int lane = threadIdx.x % 32;
    for (int which = threadIdx.x / 32; which < 2; which += WARPS) {
      real total = 0;
      store* to_memory = which ? C : B;
      real* to_row = which ? rowC : rowB;
      for (int n = lane; n < size; n += 32) {
        const real v = of.from(which ? of.c : of.b, row, size, which ? of.at_c : of.at_b, b, n);
        to_row[n] = v;
        total += v * v;
      }
      const real length = bc_eps < 0 ? (real)1 : sqrt(warp_total(total));
      const real inverse = bc_eps < 0 ? (real)1 : 1 / larger(length, (real)bc_eps);
      if (norms && lane == 0) norms[row * 2 + which] = narrow(length);
      for (int n = lane; n < size; n += 32) {
        to_row[n] *= inverse;
        to_memory[row * size + n] = narrow(to_row[n]);
      }
    }
  }
  __syncthreads();
  if constexpr (KEPT) {
    whole_product<EDGE1, EDGE1, EDGE1, WARPS>(gap, S1, gap, S1, [&](int i, int j, real c) { k1[i * S1 + j] = c; });
    whole_product<EDGE2, EDGE2, EDGE2, WARPS>(between, S2, between, S2, [&](int i, int j, real c) { k2[i * S2 + j] = c; });
    __syncthreads();
    auto unused = [](int, int, real) {};
    auto unasked = [](int, real) {};
    if (threadIdx.x < 32) {
      auto norm = [&](int i, real, real inverse) { open1[i] *= inverse; };
      const real divisor = strongest<EDGE1>(k1, turns1, (real)start, (real)unit_eps, norm, unused, unasked);
      if (threadIdx.x == 0) divisors[0] = (real)alpha_max / divisor;
    } else if (threadIdx.x < 64) {
      auto norm = [&](int i, real, real inverse) { open2[i] *= inverse; };
      const real divisor = strongest<EDGE2>(k2, turns2, (real)start, (real)unit_eps, norm, unused, unasked);
      if (threadIdx.x == 32) divisors[1] = 1 / divisor;
    }
    own([&](int c, int i, int j) { gap[i * S2 + j] = xs(c); });
  }
  real bc = 0;
#pragma unroll
  for (int n = 0; n < STATES; ++n) bc += rowB[n] * rowC[n];
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int d = pass_channel(pass);
    real r = 0;
    if (d < D) {
      const real dt = in.step(d);
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        const int n = piece_begin(piece), at = pass * PIECES + piece;
        real(&now)[VECTOR] = held[HOLD == 1 ? at : 0];
        real rate[VECTOR], decay[VECTOR];
        if constexpr (HOLD != 1) fetch(pass, piece);
        in.decays(d, dt, n, rate, decay);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
          now[k] *= decay[k];
          r += now[k] * rowC[n + k];
        }
        if constexpr (HOLD == 2) {
          Pack<real, VECTOR> some;
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) some.v[k] = now[k];
          *(Pack<real, VECTOR>*)(meanwhile + (at * THREADS + threadIdx.x) * VECTOR) = some;
        }
      }
    }
    r = lanes_total(r);
    if (threadIdx.x % LANES == 0 && d < D) exchange[d] = r;
  }
  __syncthreads();
  Factors<KEPT> factor;
  if constexpr (KEPT) {
    // before its rows had unit length the product was symmetric: the first factor is the transpose of scaled rows
    for (int at = threadIdx.x; at < EDGE1 * EDGE1; at += THREADS) k1[at / EDGE1 * S1 + at % EDGE1] *= divisors[0] * open1[at % EDGE1];
    for (int at = threadIdx.x; at < EDGE2 * EDGE2; at += THREADS) k2[at / EDGE2 * S2 + at % EDGE2] *= divisors[1] * open2[at / EDGE2];
    __syncthreads();
    factor.take(k1, k2);
  }

  real own_p[PARKED ? 1 : OWNED] = {}, own_gw[PARKED ? 1 : OWNED] = {}, y[OWNED] = {}, change[OWNED] = {};
  real past[OWNED] = {}, own_weight[PARKED ? 1 : OWNED] = {}, own_shift[PARKED ? 1 : OWNED] = {};
  auto wt = [&](int c) -> real& {
    if constexpr (PARKED)
      return parked[c * THREADS + threadIdx.x];
    else
      return own_weight[c];
  };
  auto shift = [&](int c) -> real& {
    if constexpr (PARKED)
      return parked[(OWNED + c) * THREADS + threadIdx.x];
    else
      return own_shift[c];
  };
  real product[OWNED] = {};
  auto gw = [&](int c) -> real& {
    if constexpr (PARKED)
      return parked[(4 * OWNED + c) * THREADS + threadIdx.x];
    else
      return own_gw[c];
  };
  auto p = [&](int c) -> real& {
    if constexpr (PARKED)
      return parked[(3 * OWNED + c) * THREADS + threadIdx.x];
    else
      return own_p[c];
  };
  own([&](int c, int i, int j) {
    const int d = i * EDGE2 + j;
    const real w = in.step(d) * bc + widen(skip[d]), g = in.opening(d);
    gw(c) = g * w;
    p(c) = g * (exchange[d] + w * xs(c));
    wt(c) = widen(weight[d]);
    shift(c) = bias ? widen(bias[d]) : (real)0;
  });
  Swing swing = {(real)damping};
  const real channels = (real)D;
  real centre = 0, left = 0, largest = 0;
  bool fine = false, judged = true, last = false;
  i64 count = 0;
  for (;;) {
    factor.apply(k1, k2, gap, between, product, unseen);
    if (last) break;
    if (!judged) {
      real moved, top;
      most_total(tops, moved, top);
      judged = true;
      const real taken = swing.factor;
      fine = moved <= larger((real)atol + (real)rtol * top, 8 * EPS * top);
      left = moved;
      largest = top;
      const bool stop = fine || count >= max_iter || !is_finite(moved);
      const real last_moved = swing.before;
      real jump = 0;
      if (!stop) {
        swing.look(moved, [&] {
          real back = 0;
          own([&](int c, int, int) { back += change[c] * past[c]; });
          return back;
        }, swinging);
        if (swing.factor == taken)
          jump = swing.further(moved, last_moved, NEAR * top, [&] {
            real back = 0;
            own([&](int c, int, int) { back += change[c] * past[c]; });
            return back;
          }, [&] {
            real square = 0;
            own([&](int c, int, int) { square += past[c] * past[c]; });
            return square;
          }, swinging);
      }
      const real wanted = fine ? (real)1 : swing.factor;
      const real further = wanted - taken + taken * jump;
      own([&](int c, int, int) { past[c] = change[c]; });
      if (further != 0) {  // further than it went, or not so far
        own([&](int c, int i, int j) {
          y[c] += further * change[c];
          gap[i * S2 + j] = xs(c) - y[c];
        });
        last = stop;
        __syncthreads();
        continue;
      }
      if (stop) break;
    }
    real a = 0, squares = 0, scale = 1;
    if constexpr (MODE == 2) {
      if (count == 0) {  // later on the mean hardly moves
        own([&](int c, int, int) { a += p(c) - gw(c) * product[c]; });
        pair_part(a, 0, swinging);
        __syncthreads();
        pair_total(swinging, centre, squares);
        centre /= channels;
        a = squares = 0;
      }
    }
    own([&](int c, int, int) {
      product[c] = p(c) - gw(c) * product[c] - centre;
      a += product[c];
      squares += product[c] * product[c];
    });
    if constexpr (MODE != 0) {
      pair_part(a, squares, sums);
      __syncthreads();
      pair_total(sums, a, squares);
      const real off = MODE == 2 ? a / channels : (real)0, var = squares / channels - off * off;
      scale = inverse_root((var > 0 ? var : (real)0) + (real)eps);
      if (var != var) scale = var;
      a = off;
    }
    real far = 0, top = 0;
    own([&](int c, int i, int j) {
      const real now = MODE ? wt(c) * ((product[c] - a) * scale) + shift(c) : product[c];
      change[c] = now - y[c];
      far = most(far, magnitude(change[c]));
      top = larger(top, larger(magnitude(now), magnitude(y[c])));
      y[c] += swing.factor * change[c];
      gap[i * S2 + j] = xs(c) - y[c];
    });
    if (MODE == 2) centre += a;
    if (MODE == 0) __syncthreads();  // `tops` have been read
    most_part(far, top, tops);
    judged = false;
    ++count;
    __syncthreads();
  }
  own([&](int c, int i, int j) {
    const int d = i * EDGE2 + j;
    const real u = xs(c) - product[c];
    y_out[row * D + d] = narrow(y[c]);
    if (mixed_out) mixed_out[row * D + d] = narrow(u);
    exchange[d] = in.step(d) * u;
  });
  __syncthreads();
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int d = pass_channel(pass);
    if (d < D) {
      const real drive = exchange[d];
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        const int n = piece_begin(piece), at = pass * PIECES + piece;
        real(&now)[VECTOR] = held[HOLD == 1 ? at : 0];
        if constexpr (HOLD == 0) {
          real rate[VECTOR], decay[VECTOR];
          fetch(pass, piece);
          in.decays(d, in.step(d), n, rate, decay);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) now[k] *= decay[k];
        }
        if constexpr (HOLD == 2) {
          const Pack<real, VECTOR> some = *(const Pack<real, VECTOR>*)(meanwhile + (at * THREADS + threadIdx.x) * VECTOR);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) now[k] = some.v[k];
        }
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) now[k] += drive * rowB[n + k];
        store_part(state + (b * D + d) * size, size, n, now);
      }
    }
  }
  if (threadIdx.x == 0) {
    left /= larger(largest, (real)1e-37);
    iterations[b] = t && iterations[b] > count ? iterations[b] : count;
    residual[b] = t ? (double)most((real)residual[b], left) : (double)left;
    met[b] = fine && (t == 0 || met[b]);
  }
}
