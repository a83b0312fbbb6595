// The adjoint of one step of FP-Mamba with a Kronecker mixer; section 6 of docs/mathematics.md, see mamba_kronecker.cuh.
//
// With G the cotangent of H_t that later steps left, N the Jacobian of the step's norm and P = K1 (x) K2,
//
//     z = y_bar + P^T (delta * G B) + P^T (gate w * N^T z),
//
// by iteration; N^T takes two sums over the channels, of the next z while it is made, so that an iteration has three barriers, as
// forwards. Then the step is differentiated once, with z for the cotangent of y_t.
//
// Block k takes the sequences k, k + blocks, ... and adds up what all of them share; the cotangents of the rates in shared
// memory (RATES_SHARED) if there is room. Memory traffic: rows and factors once, H_{t-1} and G twice, the second time from the
// caches, the new G once.
//
// Macros, beside those of mamba_kronecker.cuh: KEPT 0 or 1.
#include "mamba_kronecker.cuh"

// Cotangents of the rates: of a thread's own numbers, or with HEADS of its channels, which are in registers.
constexpr bool SHARE_RATES = RATES_SHARED && !HEADS;
constexpr int RATES = HEADS ? OWNED : OWN * VECTOR;

// Passes over the state that are under way together.
constexpr int AT_A_TIME = SHARE_RATES && PASSES > 4 ? 4 : PASSES;

// Transposed where it lies.
template <int EDGE> __device__ __forceinline__ void turn(real* matrix) {
  constexpr int S = pitch(EDGE);
  for (int at = threadIdx.x; at < EDGE * EDGE; at += THREADS) {
    const int i = at / EDGE, j = at % EDGE;
    if (i < j) {
      const real other = matrix[i * S + j];
      matrix[i * S + j] = matrix[j * S + i];
      matrix[j * S + i] = other;
    }
  }
}

// As in mamba_pull.cu with parameters that are made on the way: norms (B, T, 2) of the arguments of b and c. factors and
// factors_bar (B, FACTORS) are of this step; met (B) is cleared where the adjoint did not get below its tolerance.
// Shared memory: 2 STATES; three rooms of two a warp; 2 STATES sums; both factors and six matrices; two a channel; the rates.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
mamba_kronecker_pull(const store* factors, const store* x, const store* delta, const store* A, const store* B, const store* C,
                     const store* skip, const store* gate, const store* weight, const store* past_state, const store* G,
                     const store* y, const store* y_bar, const store* more_bar, i64 batch, i64 steps, i64 t, int size, int heads,
                     double eps, double rtol, i64 max_iter, store* before, store* z_out, store* gate_bar, store* delta_bar,
                     store* B_bar, store* C_bar, store* rate_bar, store* skip_bar, store* weight_bar, store* bias_bar,
                     const store* norms, int width, int at_b, int at_c, double bc_eps, store* x_bar, store* factors_bar,
                     store* fed_bar, unsigned char* met) {
  SHARED(memory);
  real *rowB = (real*)memory, *rowC = rowB + STATES, *room = rowC + STATES, *tops = room + 2 * WARPS, *swinging = tops + 2 * WARPS;
  real *rows = swinging + 2 * WARPS, *k1 = rowB + up(2 * STATES + 6 * WARPS + sums_size<2 * STATES, THREADS>(), PIECE);
  real *k2 = k1 + matrix(EDGE1, EDGE1);
  // X - Y; what is between two products; K1 (X - Y), transposed; a cotangent E of u; E K2; X - Y transposed, later E
  real *gap = k2 + matrix(EDGE2, EDGE2), *between = gap + matrix(EDGE1, EDGE2), *turned = between + matrix(EDGE2, EDGE1);
  real *into = turned + matrix(EDGE2, EDGE1), *half = into + matrix(EDGE1, EDGE2), *across = half + matrix(EDGE1, EDGE2);
  // one a channel: r and what comes from later, then u and gate w, then the cotangent of o and the drive, then what the state says
  real *one = across + matrix(EDGE2, EDGE1), *two = one + D, *shared_rates = two + D;
  constexpr int MATRICES = matrix(EDGE1, EDGE1) + matrix(EDGE2, EDGE2) + 3 * matrix(EDGE1, EDGE2) + 3 * matrix(EDGE2, EDGE1);
  for (int at = threadIdx.x; at < MATRICES; at += THREADS) k1[at] = 0;
  real own_rates[SHARE_RATES ? 1 : RATES] = {};
  auto rates = [&](int k) -> real& {
    if constexpr (SHARE_RATES)
      return shared_rates[k * THREADS + threadIdx.x];
    else
      return own_rates[k];
  };
  if constexpr (SHARE_RATES)
    for (int k = 0; k < RATES; ++k) rates(k) = 0;
  auto add = [&](store* to, int d, real more) { to[(i64)blockIdx.x * D + d] = narrow(widen(to[(i64)blockIdx.x * D + d]) + more); };
  const real channels = (real)D;
  for (int n = size + threadIdx.x; n < STATES; n += THREADS) rowB[n] = rowC[n] = 0;
  for (int b = blockIdx.x; b < (int)batch; b += gridDim.x) {
    const i64 row = b * steps + t;
    const Inputs in = {nullptr, x + row * D, delta + row * (HEADS ? heads : D), A, GATED ? gate + row * D : nullptr, D, size, heads};
    __syncthreads();  // nobody is at the sequence before
    for (int n = threadIdx.x; n < size; n += THREADS) {
      rowB[n] = widen(B[row * size + n]);
      rowC[n] = widen(C[row * size + n]);
    }
    fetch_factors(factors + (i64)b * FACTORS, k1, k2);
    own([&](int, int i, int j) {
      const real v = widen(in.x[i * EDGE2 + j]) - widen(y[row * D + i * EDGE2 + j]);
      gap[i * S2 + j] = v;
      across[j * S1 + i] = v;
    });
    __syncthreads();
    real bc = 0;
#pragma unroll
    for (int n = 0; n < STATES; ++n) bc += rowB[n] * rowC[n];
    auto fetch = [&](int piece, int d, real(&was)[VECTOR], real(&coming)[VECTOR]) {
      const int n = piece_begin(piece);
      load_part(past_state + ((i64)b * D + d) * size, size, n, was);
      load_part(G + ((i64)b * D + d) * size, size, n, coming);
      return n;
    };
#pragma unroll (AT_A_TIME)
    for (int pass = 0; pass < PASSES; ++pass) {
      const int d = pass_channel(pass);
      real seen = 0, from_later = 0;
      if (d < D) {
        const real dt = in.step(d);
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
          real was[VECTOR], coming[VECTOR], rate[VECTOR], decay[VECTOR];
          const int n = fetch(piece, d, was, coming);
          in.decays(d, dt, n, rate, decay);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) {
            seen += was[k] * decay[k] * rowC[n + k];
            from_later += coming[k] * rowB[n + k];
          }
        }
      }
      seen = lanes_total(seen);
      from_later = lanes_total(from_later);
      if (threadIdx.x % LANES == 0 && d < D) {
        one[d] = seen;
        two[d] = from_later;
      }
    }
    whole_product<EDGE2, EDGE1, EDGE1, WARPS>(across, S1, k1, S1, [&](int l, int i, real c) {
      if (inside(i, l)) turned[l * S1 + i] = c;
    });
    Factors<KEPT> factor;
    real v[OWNED] = {}, through[OWNED] = {}, product[OWNED] = {};
    real own_weight[PARKED ? 1 : OWNED] = {}, own_through[PARKED ? 1 : OWNED] = {};
    auto parked_through = [&](int c, int i, int j) -> real& {
      if constexpr (PARKED)
        return two[i * EDGE2 + j];
      else
        return own_through[c];
    };
    auto wt = [&](int c, int i, int j) -> real& {
      if constexpr (PARKED)
        return gap[i * S2 + j];
      else
        return own_weight[c];
    };
    factor.take(k1, k2);
    factor.apply(k1, k2, gap, between, product, unseen);
    real total = 0, none = 0, scale = 1;
    own([&](int c, int i, int j) {
      const int d = i * EDGE2 + j;
      const real dt = in.step(d), w = dt * bc + widen(skip[d]), g = in.opening(d);
      const real mixed = widen(in.x[d]) - product[c];
      const real o = one[d] + w * mixed;
      one[d] = mixed;
      v[c] = g * o;
      if (GATED) gate_bar[row * D + d] = narrow(o);  // until it is known
      through[c] = g * w;
      total += v[c];
    });
    if constexpr (MODE == 2) {
      pair_part(total, 0, room);
      __syncthreads();
      pair_total(room, total, none);
      total /= channels;
      own([&](int c, int, int) { v[c] -= total; });
    }
    if constexpr (MODE != 0) {
      real squares = 0;
      own([&](int c, int, int) { squares += v[c] * v[c]; });
      pair_part(squares, 0, tops);
      __syncthreads();
      pair_total(tops, squares, none);
      scale = inverse_root(squares / channels + (real)eps);
      own([&](int c, int, int) { v[c] *= scale; });
    } else {
      __syncthreads();
    }
    // everybody is through with the factors as they are
    own([&](int c, int i, int j) {
      const int d = i * EDGE2 + j;
      wt(c, i, j) = widen(weight[d]);
      into[i * S2 + j] = two[d] * in.step(d);
      parked_through(c, i, j) = through[c];
    });
    turn<EDGE1>(k1);
    turn<EDGE2>(k2);
    __syncthreads();
    factor.take(k1, k2);
    factor.apply(k1, k2, into, between, product, unseen);
    real z[OWNED] = {}, e[OWNED] = {}, change[OWNED] = {}, own_right[PARKED ? 1 : OWNED] = {}, own_past[PARKED ? 1 : OWNED] = {};
    auto right = [&](int c, int i, int j) -> real& {
      if constexpr (PARKED)
        return half[i * S2 + j];
      else
        return own_right[c];
    };
    auto past = [&](int c, int i, int j) -> real& {
      if constexpr (PARKED)
        return across[j * S1 + i];
      else
        return own_past[c];
    };
    own([&](int c, int i, int j) {
      const int d = i * EDGE2 + j;
      z[c] = widen(y_bar[row * D + d]) + (more_bar ? widen(more_bar[(i64)b * D + d]) : (real)0) + product[c];
      right(c, i, j) = z[c];
      past(c, i, j) = 0;
    });
    // N^T z = scale (weight z - with - n along): v is n by now
    real with = 0, along = 0;
    Swing swing = {(real)1};
    bool judged = true, fine = false, given_up = false;
    real first_moved = LARGEST;
    for (int count = 0;;) {
      if constexpr (MODE != 0) {
        real a = 0, a_along = 0;
        own([&](int c, int i, int j) {
          const real inner = wt(c, i, j) * z[c];
          a += inner;
          a_along += inner * v[c];
        });
        pair_part(a, a_along, room);
      }
      __syncthreads();
      if constexpr (MODE != 0) {
        pair_total(room, with, along);
        with = MODE == 2 ? with / channels : (real)0;
        along /= channels;
      }
      if (given_up) break;
      if (!judged) {
        real moved, top;
        most_total(tops, moved, top);
        judged = true;
        const real taken = swing.factor;
        fine = moved <= larger((real)rtol, 8 * EPS) * top;
        if (fine) break;
        if (count == 1) first_moved = moved;
        if (count >= max_iter || !(moved <= GROWN * first_moved)) {
          if (moved < first_moved) break;
          own([&](int c, int i, int j) { z[c] = right(c, i, j); });
          given_up = true;
          __syncthreads();  // the sums have been read
          continue;
        }
        const real last_moved = swing.before;
        swing.look(moved, [&] {
          real back = 0;
          own([&](int c, int i, int j) { back += change[c] * past(c, i, j); });
          return back;
        }, swinging);
        real further = swing.factor - taken;
        if (further == 0)
          further = taken * swing.further(moved, last_moved, LARGEST, [&] {
            real back = 0;
            own([&](int c, int i, int j) { back += change[c] * past(c, i, j); });
            return back;
          }, [&] {
            real square = 0;
            own([&](int c, int i, int j) { square += past(c, i, j) * past(c, i, j); });
            return square;
          }, swinging);
        own([&](int c, int i, int j) { past(c, i, j) = change[c]; });
        if (further != 0) {  // or not so far; behind a barrier of its own
          own([&](int c, int, int) { z[c] += further * change[c]; });
          continue;
        }
      }
      own([&](int c, int i, int j) {
        into[i * S2 + j] = parked_through(c, i, j) * (MODE ? scale * (wt(c, i, j) * z[c] - with - v[c] * along) : z[c]);
      });
      __syncthreads();
      factor.apply(k1, k2, into, between, product, unseen);
      real far = 0, top = 0;
      own([&](int c, int i, int j) {
        const real now = right(c, i, j) + product[c];
        change[c] = now - z[c];
        far = most(far, magnitude(change[c]));
        top = larger(top, magnitude(now));
        z[c] += swing.factor * change[c];
      });
      most_part(far, top, tops);
      judged = false;
      ++count;
    }
    own([&](int c, int i, int j) {
      const int d = i * EDGE2 + j;
      const real v_bar = MODE ? scale * (wt(c, i, j) * z[c] - with - v[c] * along) : z[c], mixed = one[d];
      e[c] = in.opening(d) * v_bar;  // the cotangent of o
      z_out[row * D + d] = narrow(z[c]);
      if (GATED) gate_bar[row * D + d] = narrow(v_bar * widen(gate_bar[row * D + d]));
      one[d] = e[c];
      two[d] = in.step(d) * mixed;
      add(skip_bar, d, e[c] * mixed);
      add(weight_bar, d, z[c] * v[c]);
      add(bias_bar, d, z[c]);
      into[i * S2 + j] = mixed;
    });
    __syncthreads();
    constexpr int HALF = PIECES * VECTOR;
    real s3[2 * HALF] = {};  // of B, then of C
#pragma unroll (AT_A_TIME)
    for (int pass = 0; pass < PASSES; ++pass) {
      const int d = pass_channel(pass);
      real fed = 0, slope = 0;
      if (d < D) {
        const real dt = in.step(d), its = one[d], drive = two[d];
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
          real was[VECTOR], coming[VECTOR], rate[VECTOR], decay[VECTOR], bars[VECTOR];
          const int n = fetch(piece, d, was, coming);
          in.decays(d, dt, n, rate, decay);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) {
            const real now = was[k] * decay[k];
            const real bar = n + k < size ? coming[k] + its * rowC[n + k] : (real)0, both = bar * now;
            s3[piece * VECTOR + k] += drive * bar;
            s3[HALF + piece * VECTOR + k] += its * (now + drive * rowB[n + k]);
            fed += bar * rowB[n + k];
            slope += HEADS ? both : both * rate[k];
            if (!HEADS) rates((pass * PIECES + piece) * VECTOR + k) += both * dt;
            bars[k] = bar * decay[k];
          }
          store_part(before + ((i64)b * D + d) * size, size, n, bars);
        }
      }
      fed = lanes_total(fed);
      slope = lanes_total(slope);
      __syncwarp();  // the channel's lanes have read both
      if (threadIdx.x % LANES == 0 && d < D) {
        one[d] = fed;
        two[d] = slope;
      }
    }
    sum_rows(s3, rows);
    const real* totals = sums_total<2 * STATES, THREADS>(rows);
    // e becomes the cotangent of u
    own([&](int c, int i, int j) {
      const int d = i * EDGE2 + j;
      const real dt = in.step(d), fed = one[d];
      real slope = two[d];
      if constexpr (HEADS) {
        rates(c) += slope * dt;
        slope *= widen(A[d / (D / heads)]);
      }
      e[c] = widen(skip[d]) * e[c] + dt * fed;
      delta_bar[row * D + d] = narrow(into[i * S2 + j] * fed + slope);
      into[i * S2 + j] = e[c];
      across[j * S1 + i] = e[c];
      if constexpr (PARKED) gap[i * S2 + j] = widen(in.x[d]) - widen(y[row * D + d]);
    });
    {
      const int lane = threadIdx.x % 32;
      for (int which = threadIdx.x / 32; which < 2; which += WARPS) {
        const real *its = which ? rowC : rowB, *bar = totals + which * STATES;
        const real length = widen(norms[row * 2 + which]);
        real back = 0;
        for (int n = lane; n < size; n += 32) back += its[n] * bar[n];
        back = bc_eps >= 0 && length >= (real)bc_eps ? warp_total(back) : (real)0;
        const real over = bc_eps >= 0 ? 1 / larger(length, (real)bc_eps) : (real)1;
        const int at = which ? at_c : at_b;
        for (int n = lane; n < size; n += 32) {
          const real found = (bar[n] - back * its[n]) * over;
          (which ? C_bar : B_bar)[row * size + n] = narrow(found);
          if (at >= 0) fed_bar[(i64)b * width + at + n] = narrow(found);
        }
      }
    }
    __syncthreads();
    Factors<KEPT> again;  // they need not stay where the states are looked at
    again.take(k1, k2);
    again.apply(k1, k2, into, between, product, [&](int i, int j, real c) { half[i * S2 + j] = c; });
    own([&](int c, int i, int j) { x_bar[row * D + i * EDGE2 + j] = narrow(e[c] - product[c]); });
    // K1_bar = -(E K2) (X - Y)^T,   K2_bar = -E^T (K1 (X - Y))
    store* to = factors_bar + (i64)b * FACTORS;
    whole_product<EDGE1, EDGE1, EDGE2, WARPS>(half, S2, gap, S2, [&](int i, int k, real c) {
      if (i < EDGE1 && k < EDGE1) to[i * EDGE1 + k] = narrow(-c);
    });
    whole_product<EDGE2, EDGE2, EDGE1, WARPS>(across, S1, turned, S1, [&](int j, int l, real c) {
      if (j < EDGE2 && l < EDGE2) to[EDGE1 * EDGE1 + j * EDGE2 + l] = narrow(-c);
    });
    if (threadIdx.x == 0 && !fine) met[b] = 0;
  }
  if constexpr (HEADS) own([&](int c, int i, int j) { add(rate_bar, i * EDGE2 + j, rates(c)); });
  if constexpr (!HEADS) {
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        const int d = pass_channel(pass), n = piece_begin(piece);
        if (d < D) {
          store* to = rate_bar + ((i64)blockIdx.x * D + d) * size;
          real sums[VECTOR];
          load_part(to, size, n, sums);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) sums[k] += rates((pass * PIECES + piece) * VECTOR + k);
          store_part(to, size, n, sums);
        }
      }
  }
}
