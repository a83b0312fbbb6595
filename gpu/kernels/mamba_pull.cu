// The adjoint of one step of FP-Mamba with a mixer of low rank; section 6 of docs/mathematics.md, see mamba.cuh.
//
// With G the cotangent of H_t that later steps left, J the Jacobian of the step's map and N that of its norm,
//
//     z = y_bar + P^T (delta * G B) + J^T z = right + U^T k,   k = S^T U (gate w * N^T z),
//
// a system of RANK numbers. N^T is linear in sums over the channels, so that one round of sums gives N^T of `right` and
// of each u_i, and all inner products of them. Then the step is differentiated once, with z for the cotangent of y_t.
//
// Block k takes the sequences k, k + blocks, ... and adds up what all of them share; the cotangents of the rates in shared
// memory (RATES_SHARED) if there is room. Memory traffic: rows and u once, H_{t-1} and G once (twice, from the caches,
// where they are too much to be held in registers meanwhile), the new G once. MADE: the solve has kept what H_{t-1} says
// of each channel, and the launch for the step after has left G B, so that once is enough.
#include "mamba.cuh"

constexpr bool HOLD = !MADE && 2 * OWN * VECTOR * (int)sizeof(real) * RESIDENT <= 256;
// Cotangents of the rates: of a thread's own numbers, or with HEADS of its channels.
constexpr int RATES = HEADS ? CHANNELS : OWN * VECTOR;

// As in mamba_solve.cu, at the step `t` alone. `more` (B, D) or null is what comes to y_bar from the next step; past, G,
// before (B, D, N): H_{t-1} and the cotangents of H_t and of H_{t-1}; z, u_bar, gate_bar, delta_bar (B, T, D), the last
// for each channel whatever HEADS; B_bar, C_bar (B, T, N). Added to, for each block: rate_bar (blocks, D, N), with HEADS
// (blocks, D), and skip_bar, weight_bar, bias_bar (blocks, D). MADE, for rank one: B_bar and C_bar are those of their
// arguments, x_bar (B, T, D) and mixer_bar (B, T, D + 1), of the mixer's, come too, and fed_bar (B, width) is that of `fed`;
// seen (B, T, D) is of the solve, later (B, D) is G B of this step, and earlier (B, D) will be that of the step before.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
mamba_pull(const store* u, const store* alpha, const store* x, const store* delta, const store* A, const store* B,
           const store* C, const store* skip, const store* gate, const store* weight, const store* past, const store* G,
           const store* y, const store* y_bar, const store* more_bar, i64 batch, i64 steps, i64 t, int dim, int size,
           int heads, double eps, store* before, store* z, store* u_bar, store* gate_bar, store* delta_bar, store* B_bar,
           store* C_bar, store* rate_bar, store* skip_bar, store* weight_bar, store* bias_bar, const store* arguments,
           const store* norms, int width, int stride, int at_mixer, int at_b, int at_c, double alpha_max, double unit_eps,
           double bc_eps, store* x_bar, store* mixer_bar, store* fed_bar, const store* seen, const store* later_step,
           store* earlier_step) {
  constexpr int FIRST = 2 * R + GRAM;
  // var; of `right` and each u: sums with the weight, and with v too; through: right, pairs, u, u v
  constexpr int WITH = 1, ALONG = WITH + R + 1, RIGHT = ALONG + R + 1, BOTH = RIGHT + R, PLAIN = BOTH + PAIRS,
                NORMAL = PLAIN + R, SECOND = NORMAL + R;
  if constexpr (FULL) size = STATES;  // the compiler is to know
  SHARED(memory);
  real *rowB = (real*)memory, *rowC = rowB + STATES, *rowPast = rowC + STATES;  // that of B of the step before
  real* told = rowPast + STATES;                                               // tau, S^T U later, k
  real *first = told + 3 * R, *middle_room = first + sums_size<FIRST, THREADS>();
  real *second = middle_room + sums_size<1, THREADS>(), *last = second + sums_size<SECOND, THREADS>();
  real* onto_room = last + sums_size<2 * STATES, THREADS>();
  const real channels = (real)dim;
  // one a channel: r and what comes from later, then the cotangent of o and the drive, then what the state says of it
  real *one = onto_room + sums_size<2, THREADS>(), *two = one + CHANNELS * THREADS;
  real* shared_rates = two + CHANNELS * THREADS;
  real own_rates[RATES_SHARED ? 1 : RATES] = {};
  auto rates = [&](int k) -> real& {
    if constexpr (RATES_SHARED)
      return shared_rates[k * THREADS + threadIdx.x];
    else
      return own_rates[k];
  };
  if constexpr (RATES_SHARED)
    for (int k = 0; k < RATES; ++k) rates(k) = 0;
  real skips[CHANNELS] = {}, weights[CHANNELS] = {}, biases[CHANNELS] = {};
  for (int n = size + threadIdx.x; n < STATES; n += THREADS) rowB[n] = rowC[n] = rowPast[n] = 0;
  for (i64 b = blockIdx.x; b < batch; b += gridDim.x) {
    const i64 row = b * steps + t;
    const Inputs in = {u + row * R * dim, x + row * dim, delta + row * (HEADS ? heads : dim), A,
                       GATED ? gate + row * dim : nullptr, dim, size, heads};
    __syncthreads();  // nobody is at the sequence before
    for (int n = threadIdx.x; n < size; n += THREADS) {
      rowB[n] = widen(B[row * size + n]);
      rowC[n] = widen(C[row * size + n]);
      if (MADE) rowPast[n] = t > 0 ? widen(B[(row - 1) * size + n]) : (real)0;
    }
    __syncthreads();
    real bc = 0;
#pragma unroll
    for (int n = 0; n < STATES; ++n) bc += rowB[n] * rowC[n];
    real was[HOLD ? OWN : 1][VECTOR], coming[HOLD ? OWN : 1][VECTOR];
    auto fetch = [&](int pass, int piece, int d) {
      const int at = HOLD ? pass * PIECES + piece : 0, n = piece_begin(piece);
      load_part(past + (b * dim + d) * size, size, n, was[at]);
      load_part(G + (b * dim + d) * size, size, n, coming[at]);
      return at;
    };
    if constexpr (HOLD)  // all of them are on their way before the first is looked at
#pragma unroll
      for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
          if (pass_channel(pass) < dim) fetch(pass, piece, pass_channel(pass));
    if constexpr (!MADE)
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      const int d = pass_channel(pass);
      real decayed = 0, from_later = 0;
      if (d < dim) {
        const real dt = in.step(d);
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
          const int at = HOLD ? pass * PIECES + piece : fetch(pass, piece, d), n = piece_begin(piece);
          real rate[VECTOR], decay[VECTOR];
          in.decays(d, dt, n, rate, decay);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) {
            decayed += was[at][k] * decay[k] * rowC[n + k];
            from_later += coming[at][k] * rowB[n + k];
          }
        }
      }
      decayed = lanes_total(decayed);
      from_later = lanes_total(from_later);
      if (threadIdx.x % LANES == 0 && d < dim) {
        one[d] = decayed;
        two[d] = from_later;
      }
    }
    if constexpr (!MADE) __syncthreads();
    real r[CHANNELS], later[CHANNELS], s1[FIRST] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      r[c] = later[c] = 0;
      if (d < dim) {
        const real gap = widen(in.x[d]) - widen(y[row * dim + d]);
        r[c] = MADE ? widen(seen[row * dim + d]) : one[d];
        later[c] = (MADE ? widen(later_step[b * dim + d]) : two[d]) * in.step(d);
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const real ui = in.vector(i, d);
          s1[i] += ui * gap;
          s1[R + i] += ui * later[c];
          if constexpr (PRODUCT)
#pragma unroll
            for (int k = 0; k < i; ++k) s1[2 * R + below(i, k)] += ui * in.vector(k, d);
        }
      }
    }
    const real* sums = group_sums<FIRST, THREADS>(s1, first);
    if (threadIdx.x < 32) {
      real S[R][R], gap[R], seen[R], tau[R], back[R];
      strengths(sums + 2 * R, alpha + row * R, S);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        gap[i] = sums[i];
        seen[i] = sums[R + i];
      }
      times(S, gap, tau);
      times_transposed(S, seen, back);
      if (threadIdx.x == 0)
#pragma unroll
        for (int i = 0; i < R; ++i) {
          told[i] = tau[i];
          told[R + i] = back[i];
        }
    }
    __syncthreads();
    // from here on `r` is o, and `right` what z would be without the step's own Jacobian
    real right[CHANNELS], through[CHANNELS], mixed[CHANNELS], v[CHANNELS], total[1] = {0};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      right[c] = through[c] = mixed[c] = v[c] = 0;
      if (d < dim) {
        const real w = in.step(d) * bc + widen(skip[d]), g = in.opening(d);
        mixed[c] = widen(in.x[d]);
        right[c] = widen(y_bar[row * dim + d]) + (more_bar ? widen(more_bar[b * dim + d]) : (real)0);
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const real ui = in.vector(i, d);
          mixed[c] -= told[i] * ui;
          right[c] += told[R + i] * ui;
        }
        r[c] += w * mixed[c];
        v[c] = g * r[c];
        through[c] = g * w;
        total[0] += v[c];
      }
    }
    real middle = 0;
    if constexpr (MODE == 2) middle = group_sums<1, THREADS>(total, middle_room)[0] / channels;
    real s2[SECOND] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      if (d < dim) {
        v[c] -= middle;
        const real wt = widen(weight[d]), th = through[c];
        s2[0] += v[c] * v[c];
        s2[WITH + R] += right[c] * wt;
        s2[ALONG + R] += right[c] * wt * v[c];
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const real ui = in.vector(i, d);
          s2[WITH + i] += ui * wt;
          s2[ALONG + i] += ui * wt * v[c];
          s2[RIGHT + i] += ui * th * wt * right[c];
          s2[PLAIN + i] += ui * th;
          s2[NORMAL + i] += ui * th * v[c];
#pragma unroll
          for (int k = 0; k <= i; ++k) s2[BOTH + pair(i, k)] += ui * th * wt * in.vector(k, d);
        }
      }
    }
    const real* more = group_sums<SECOND, THREADS>(s2, second);
    const real scale = MODE ? inverse_root(more[0] / channels + (real)eps) : (real)1;
    // N^T a = scale (weight a - mean(weight a) - v scale^2 mean(weight a v)); without a norm just weight a
    auto mean_with = [&](int k) { return MODE == 2 ? more[WITH + k] / channels : (real)0; };
    auto mean_along = [&](int k) { return MODE ? more[ALONG + k] / channels * scale * scale : (real)0; };
    if (threadIdx.x < 32) {
      real S[R][R], m[R][R], seen[R], k[R], column[R], out[R];
      strengths(sums + 2 * R, alpha + row * R, S);
#pragma unroll
      for (int i = 0; i < R; ++i)
        seen[i] = scale * (more[RIGHT + i] - mean_with(R) * more[PLAIN + i] - mean_along(R) * more[NORMAL + i]);
      times_transposed(S, seen, k);
#pragma unroll
      for (int j = 0; j < R; ++j) {
#pragma unroll
        for (int i = 0; i < R; ++i)
          column[i] = scale * (more[BOTH + pair(i, j)] - mean_with(j) * more[PLAIN + i] - mean_along(j) * more[NORMAL + i]);
        times_transposed(S, column, out);
#pragma unroll
        for (int i = 0; i < R; ++i) m[i][j] = (i == j) - out[i];
      }
      eliminate(m, k);
      if (threadIdx.x == 0)
#pragma unroll
        for (int i = 0; i < R; ++i) told[2 * R + i] = k[i];
    }
    __syncthreads();
    real with = mean_with(R), along = mean_along(R);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      with += told[2 * R + i] * mean_with(i);
      along += told[2 * R + i] * mean_along(i);
    }
    real e[CHANNELS], o_bar[CHANNELS], onto[2] = {0, 0};  // u . e, and what the drive adds to C . C_bar
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      o_bar[c] = 0;
      if (d < dim) {
        real zd = right[c];
#pragma unroll
        for (int i = 0; i < R; ++i) zd += told[2 * R + i] * in.vector(i, d);
        const real v_bar = scale * (zd * widen(weight[d]) - with - v[c] * along);
        o_bar[c] = in.opening(d) * v_bar;
        z[row * dim + d] = narrow(zd);
        if (GATED) gate_bar[row * dim + d] = narrow(v_bar * r[c]);
        one[d] = o_bar[c];
        two[d] = in.step(d) * mixed[c];
        onto[1] += o_bar[c] * two[d];
        skips[c] += o_bar[c] * mixed[c];
        weights[c] += zd * v[c] * scale;
        biases[c] += zd;
      }
    }
    __syncthreads();
    constexpr int HALF = PIECES * VECTOR;
    real s3[2 * HALF] = {};  // of B, then of C
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      const int d = pass_channel(pass);
      real fed = 0, slope = 0, onward = 0;
      if (d < dim) {
        const real dt = in.step(d), o = one[d], drive = two[d];
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
          const int at = HOLD ? pass * PIECES + piece : fetch(pass, piece, d), n = piece_begin(piece);
          real rate[VECTOR], decay[VECTOR], bars[VECTOR];
          in.decays(d, dt, n, rate, decay);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) {
            const real now = was[at][k] * decay[k];
            const real bar = FULL || n + k < size ? coming[at][k] + o * rowC[n + k] : (real)0, both = bar * now;
            s3[piece * VECTOR + k] += drive * bar;
            s3[HALF + piece * VECTOR + k] += o * now;
            fed += bar * rowB[n + k];
            slope += HEADS ? both : both * rate[k];
            if (!HEADS) rates((pass * PIECES + piece) * VECTOR + k) += both * dt;
            bars[k] = bar * decay[k];
            if (MADE) onward += bars[k] * rowPast[n + k];
          }
          store_part(before + (b * dim + d) * size, size, n, bars);
        }
      }
      fed = lanes_total(fed);
      slope = lanes_total(slope);
      __syncwarp();  // the channel's lanes have read both
      if constexpr (MADE) {
        onward = lanes_total(onward);
        if (threadIdx.x % LANES == 0 && d < dim) earlier_step[b * dim + d] = narrow(onward);
      }
      if (threadIdx.x % LANES == 0 && d < dim) {
        one[d] = fed;
        two[d] = slope;
      }
    }
    sum_rows(s3, last);
    const real* totals = sums_total<2 * STATES, THREADS>(last);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      e[c] = 0;
      if (d < dim) {
        const real dt = in.step(d), fed = one[d];
        real slope = two[d];
        if constexpr (HEADS) {
          rates(c) += slope * dt;
          slope *= widen(A[d / (dim / heads)]);
        }
        e[c] = widen(skip[d]) * o_bar[c] + dt * fed;
        delta_bar[row * dim + d] = narrow(mixed[c] * fed + slope);
        if constexpr (MADE)
          onto[0] += in.vector(0, d) * e[c];
        else
          u_bar[row * dim + d] = narrow(e[c]);
      }
    }
    const real* across = group_sums<2, THREADS>(onto, onto_room);
    auto row_bar = [&](int which, int n) {
      return which ? totals[STATES + n] + across[1] * rowB[n] : totals[n];
    };
    if constexpr (!MADE) {
      for (int n = threadIdx.x; n < size; n += THREADS) {
        B_bar[row * size + n] = narrow(row_bar(0, n));
        C_bar[row * size + n] = narrow(row_bar(1, n));
      }
    } else {
      // Q = I - alpha u u^T:  alpha_bar = -(u . e) (u . d), u_bar = -alpha ((u . d) e + (u . e) d) with d = x - y
      const real with_e = across[0], with_d = sums[0], strength = widen(alpha[row]);
      const real length = widen(norms[row * 3]), inverse = 1 / larger(length, (real)unit_eps);
      const real turn = length >= (real)unit_eps ? -2 * strength * with_d * with_e : (real)0;  // u . u_bar
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const int d = c * THREADS + threadIdx.x;
        if (d < dim) {
          const real ud = in.vector(0, d), gap = widen(in.x[d]) - widen(y[row * dim + d]);
          const real bar = -strength * (with_d * e[c] + with_e * gap);
          const real own = activate_slope(widen(arguments[row * dim + d])) * (bar - turn * ud) * inverse;
          x_bar[row * dim + d] = narrow(e[c] - strength * with_e * ud);
          mixer_bar[row * stride + d] = narrow(own);
          if (at_mixer >= 0) fed_bar[b * width + at_mixer + d] = narrow(own);
        }
      }
      for (int k = dim + 1 + threadIdx.x; k < stride; k += THREADS) {  // what is there to fill up
        mixer_bar[row * stride + k] = narrow((real)0);
        if (at_mixer >= 0) fed_bar[b * width + at_mixer + k] = narrow((real)0);
      }
      if (threadIdx.x == 0) {
        const real own = -with_e * with_d * strength * (1 - strength / (real)alpha_max);
        mixer_bar[row * stride + dim] = narrow(own);
        if (at_mixer >= 0) fed_bar[b * width + at_mixer + dim] = narrow(own);
      }
      const int lane = threadIdx.x % 32;
      for (int which = threadIdx.x / 32; which < 2; which += THREADS / 32) {
        const real* own = which ? rowC : rowB;
        const real its = widen(norms[row * 3 + 1 + which]);
        real back = 0;
        for (int n = lane; n < size; n += 32) back += own[n] * row_bar(which, n);
        back = bc_eps >= 0 && its >= (real)bc_eps ? warp_total(back) : (real)0;
        const real over = bc_eps >= 0 ? 1 / larger(its, (real)bc_eps) : (real)1;
        const int at = which ? at_c : at_b;
        for (int n = lane; n < size; n += 32) {
          const real found = (row_bar(which, n) - back * own[n]) * over;
          (which ? C_bar : B_bar)[row * size + n] = narrow(found);
          if (at >= 0) fed_bar[b * width + at + n] = narrow(found);
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int d = c * THREADS + threadIdx.x;
    if (d < dim) {
      const i64 at = (i64)blockIdx.x * dim + d;
      skip_bar[at] = narrow(widen(skip_bar[at]) + skips[c]);
      weight_bar[at] = narrow(widen(weight_bar[at]) + weights[c]);
      bias_bar[at] = narrow(widen(bias_bar[at]) + biases[c]);
      if constexpr (HEADS) rate_bar[at] = narrow(widen(rate_bar[at]) + rates(c));
    }
  }
  if constexpr (!HEADS) {
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        const int d = pass_channel(pass), n = piece_begin(piece);
        if (d < dim) {
          store* to = rate_bar + ((i64)blockIdx.x * dim + d) * size;
          real sums[VECTOR];
          load_part(to, size, n, sums);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) sums[k] += rates((pass * PIECES + piece) * VECTOR + k);
          store_part(to, size, n, sums);
        }
      }
  }
}
