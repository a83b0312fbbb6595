// The exact gradient of (F) for low-rank mixers in one pass over memory: the adjoint fixed point, step after step from the
// last to the first, and the cotangents of all inputs at each step while it is at hand; section 6 of docs/mathematics.md.
//
//   w = hbar_t + lam_{t+1} s_{t+1},  tau = U (g s) = U (g w) + G S^T tau,  s_t = w + U^T S^T tau,  e = g s,  d = x - h
//   reflection i sees d_i = d - sum_{j<i} y_j u_j with y_i = alpha_i u_i . d_i, and from the other end
//   e_i = e - sum_{j>i} z_j u_j with z_i = alpha_i u_i . e_i; in a sum of terms (PRODUCT 0) all see d and e themselves:
//   u_bar_i = -(y_i e_i + z_i d_i),  alpha_bar_i = -(u_i . d_i) (u_i . e_i),  x_bar = e - sum z_j u_j,
//   m = d - sum y_j u_j + h,  lam_bar = s (h_{t-1} - m), or s h_{t-1} beside gate_bar = s m.
//
// The reduction that the system of a step needs anyway also takes U d, so a step costs one. GIVEN: s is an input, and
// every step stands for itself. Otherwise the walk is that of solve_steps.cu, SPLIT too: a second walk writes the
// cotangents of the steps that it corrects again.
//
// Traffic: lam, hbar (or s), x, h, u, alpha (and the gate) read once; s, lam_bar, x_bar, u_bar, alpha_bar (and gate_bar)
// written once.
#include "lowrank.cuh"

constexpr int ARRAYS = 4 + GATED + R + SPLIT, LAM = 0, TOP = 1, X = 2, BEFORE = 3, GATE = 4, U = 4 + GATED;
constexpr int OLD = 4 + GATED + R;
constexpr int SYSTEM = GIVEN ? 0 : GRAMS;
constexpr int SUMS = 2 * R + SYSTEM + PLAINS;  // U e or U (g w); U d; G; U U^T
constexpr int MAXIMA = DIRECT || GIVEN ? 0 : R + 2;
constexpr int TOTALS = SUMS + MAXIMA + 2;

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, MINBLOCKS)
pull_steps(const store* __restrict__ lam, const store* __restrict__ gate, const store* __restrict__ x,
           const store* __restrict__ u, const store* __restrict__ alpha, const store* __restrict__ initial,
           const store* __restrict__ h, const store* __restrict__ top, store* value, store* lam_bar, store* gate_bar,
           store* x_bar, store* u_bar, store* alpha_bar, store* initial_bar, i64 steps, int dim, int segments, double rtol,
           double atol, i64 max_iter, int* counts, double* change, double* scale, double* rcond, int* state, real* between,
           u32* barrier) {
  SHARED(memory);
  Ring<ARRAYS> ring;
  ring.init(memory, dim);
  if (CLUSTER > 1) everybody();  // all of a cluster run before one writes to another
  real* partial = (real*)(memory + Ring<ARRAYS>::BYTES);  // two buffers
  real mine[FEW ? TOTALS : 1], got[1];
  real* scratch = partial + 2 * partials(TOTALS);  // R R, of a warp that thinks
  real* totals = FEW ? mine : scratch + R * R;
  real* most_of_all = FEW ? got : totals + TOTALS;
  real* shared = scratch + R * R + TOTALS + 1;
  const i64 b = blockIdx.x / CLUSTER / segments;
  const int j = blockIdx.x / CLUSTER % segments;
  const i64 first = steps * j / segments, last = steps * (j + 1) / segments;  // counted from the last step

  real c[VALUES];  // lam_{t+1} s_{t+1}
  real decay[SPLIT ? VALUES : 1];  // product of the segment's lam
  Told told;
  const Stop stop = {rtol, atol, max_iter, steps};
  int buffer = 0;

  auto fetch = [&](i64 n, int slot, int word, bool comparing) {
    if (n < last) {
      const i64 here = steps - 1 - n, t = b * steps + here;
      ring.fetch(slot, LAM, lam + t * dim, dim);
      ring.fetch(slot, TOP, top + t * dim, dim);
      ring.fetch(slot, X, x + t * dim, dim);
      if (here > 0)
        ring.fetch(slot, BEFORE, h + (t - 1) * dim, dim);
      else if (initial != nullptr)
        ring.fetch(slot, BEFORE, initial + b * dim, dim);
      else
        for (int a = 0; a < ACCESSES; ++a)
          for (int e = 0; e < EACH; ++e) ring.at(slot, BEFORE, a).v[e] = narrow(0);
      if constexpr (GATED) ring.fetch(slot, GATE, gate + t * dim, dim);
#pragma unroll
      for (int k = 0; k < R; ++k) ring.fetch(slot, U + k, u + (t * R + k) * dim, dim);
      if (SPLIT && comparing) ring.fetch(slot, OLD, value + t * dim, dim);
      ring.fetch_alpha(word, alpha + t * R);
    }
    commit();
  };
  auto gate_of = [&](int slot, int a, int e) {
    return GATED ? widen(ring.at(slot, GATE, a).v[e]) : 1 - widen(ring.at(slot, LAM, a).v[e]);
  };

  auto walk = [&](auto compare) {
    constexpr bool COMPARE = decltype(compare)::value;
    constexpr int EXTRA = COMPARE ? 2 : 0;
    real size_before = 0, lam_before = 0, differs = 0, now[VALUES];  // h_t
    bool meets = false;
#pragma unroll
    for (int a = 0; a < ACCESSES; ++a) {
      access row;
      if (first < last && channel(a) < dim) row = *(const access*)(h + (b * steps + steps - 1 - first) * dim + channel(a));
#pragma unroll
      for (int e = 0; e < EACH; ++e) now[a * EACH + e] = first < last && channel(a) < dim ? widen(row.v[e]) : 0;
    }
    for (int p = 0; p < STAGES; ++p) fetch(first + p, p, p, COMPARE);
    int slot = 0, word = 0;
    for (i64 n = first; n < last; ++n) {
      const i64 t = b * steps + steps - 1 - n;
      arrived<STAGES - 1>();
      real s[SUMS], m[MAXIMA + EXTRA + 1];
#pragma unroll
      for (int i = 0; i < SUMS; ++i) s[i] = 0;
#pragma unroll
      for (int i = 0; i < MAXIMA; ++i) m[i] = 0;
      real lam_here = 0;
#pragma unroll
      for (int a = 0; a < ACCESSES; ++a)
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          const int v = a * EACH + e;
          const real g = gate_of(slot, a, e), topmost = widen(ring.at(slot, TOP, a).v[e]);
          const real gw = g * (GIVEN ? topmost : topmost + c[v]), d = widen(ring.at(slot, X, a).v[e]) - now[v];
          real row[R];
#pragma unroll
          for (int k = 0; k < R; ++k) row[k] = widen(ring.at(slot, U + k, a).v[e]);
#pragma unroll
          for (int k = 0; k < R; ++k) {
            s[k] += row[k] * gw;
            s[R + k] += row[k] * d;
            if constexpr (SYSTEM > 0) {
              const real gu = g * row[k];
#pragma unroll
              for (int i = 0; i <= k; ++i) s[2 * R + pair(k, i)] += gu * row[i];
            }
            if constexpr (CHAIN) {
#pragma unroll
              for (int i = 0; i < k; ++i) s[2 * R + SYSTEM + below(k, i)] += row[k] * row[i];
            }
            if constexpr (MAXIMA > 0) m[k] = Most::of(m[k], magnitude(row[k]));
          }
          if constexpr (MAXIMA > 0) lam_here = Most::of(lam_here, magnitude(widen(ring.at(slot, LAM, a).v[e])));
        }
      if constexpr (MAXIMA > 0) {
        m[R] = lam_before;
        m[R + 1] = size_before;
      }
      if constexpr (COMPARE) {
        m[MAXIMA] = differs;
        m[MAXIMA + 1] = size_before;
      }
      reduce<SUMS, MAXIMA + EXTRA>(s, m, partial + buffer * partials(TOTALS), totals);
      buffer ^= 1;
      // y and z of the head, and S^T tau as far as the adjoint has got
      real found[3 * R], strength[R];
      real *y = found, *z = found + R, *into = found + 2 * R;
      int verdict = GO;
      const System of = {totals, totals + 2 * R, totals + 2 * R + SYSTEM};
      const real* bounds = totals + SUMS;
      auto adjoint_of = [&](int a, int e) {
        const real topmost = widen(ring.at(slot, TOP, a).v[e]);
        if constexpr (GIVEN) return topmost;
        real mixed = 0;
#pragma unroll
        for (int k = 0; k < R; ++k) mixed += into[k] * widen(ring.at(slot, U + k, a).v[e]);
        return (topmost + c[a * EACH + e]) + mixed;
      };
      // From tau to everything else.
      auto conclude = [&](real (&tau)[R]) {
        real through[R];
#pragma unroll
        for (int k = 0; k < R; ++k) through[k] = totals[R + k];
        chain<true>(of, strength, tau);
        chain<false>(of, strength, through);
#pragma unroll
        for (int k = 0; k < R; ++k) {
          if (leader()) alpha_bar[t * R + k] = narrow(-(through[k] * tau[k]));
          y[k] = strength[k] * through[k];
          z[k] = strength[k] * tau[k];
          if (DIRECT || GIVEN) into[k] = z[k];
        }
      };
      if (thinks()) {
        ring.alpha(word, alpha + t * R, strength);
        if (COMPARE && n > first && bounds[MAXIMA] <= EPS / 4 * bounds[MAXIMA + 1]) {
          verdict = SETTLED;
        } else if constexpr (GIVEN || DIRECT) {
          real tau[R];
          if constexpr (GIVEN) {
#pragma unroll
            for (int k = 0; k < R; ++k) tau[k] = totals[k];
          } else {
            const real condition = solve_small<true>(of, strength, tau);
            if (!(condition >= told.rcond)) told.rcond = condition;  // keeps a NaN
          }
          conclude(tau);
        } else {
          told.largest = Most::of(told.largest, bounds[R + 1]);
#pragma unroll
          for (int k = 0; k < R; ++k) into[k] = 0;
        }
      }
      if constexpr (MAXIMA > 0) {
        Relaxing relaxing(stop, bounds);
        auto finish = [&](real size) {
          real tau[R], at[R];
#pragma unroll
          for (int k = 0; k < R; ++k) at[k] = into[k];
          relaxing.finish<true>(of, strength, bounds, scratch, size, told, at);
#pragma unroll
          for (int k = 0; k < R; ++k) {
            tau[k] = totals[k];
            into[k] = at[k];
#pragma unroll
            for (int i = 0; i < R; ++i) tau[k] += of.gram[pair(k, i)] * at[i];
          }
          conclude(tau);
          if (leader()) counts[t] = COMPARE ? max(counts[t], (int)relaxing.count) : (int)relaxing.count;
        };
        if (thinks() && verdict == GO) {
          if (relaxing.wants_look(told))
            verdict = LOOK;
          else
            finish(-1);
        }
        share(shared, found, verdict);
        if (verdict == LOOK) {
          real none[1], most[1] = {0};
          bool nan = false;
#pragma unroll
          for (int a = 0; a < ACCESSES; ++a)
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
              const real r = adjoint_of(a, e);
              most[0] = Most::of(most[0], magnitude(r));
              nan |= !is_finite(r);
            }
          if (nan) most[0] = 2 * LARGEST;
          reduce<0, 1>(none, most, partial + buffer * partials(TOTALS), most_of_all);
          buffer ^= 1;
          if (thinks()) finish(most_of_all[0]);
          share(shared, found, verdict);
        }
      } else {
        share(shared, found, verdict);
      }
      if (verdict == SETTLED) { meets = true; break; }
      size_before = 0;
      differs = 0;
      bool nan = false;
#pragma unroll
      for (int a = 0; a < ACCESSES; ++a) {
        access s_out, lam_out, gate_out, x_out, u_out[R];
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          const int v = a * EACH + e;
          const real r = adjoint_of(a, e), g = gate_of(slot, a, e);
          const real before = widen(ring.at(slot, BEFORE, a).v[e]);
          real row[R], seen[R];
#pragma unroll
          for (int k = 0; k < R; ++k) row[k] = widen(ring.at(slot, U + k, a).v[e]);
          const real e_all = g * r, d_all = widen(ring.at(slot, X, a).v[e]) - now[v];
          real rest = e_all;
#pragma unroll
          for (int k = R - 1; k >= 0; --k) {
            seen[k] = PRODUCT ? rest : e_all;
            rest -= z[k] * row[k];
          }
          x_out.v[e] = narrow(rest);
          rest = d_all;
#pragma unroll
          for (int k = 0; k < R; ++k) {
            u_out[k].v[e] = narrow(-(y[k] * seen[k] + z[k] * (PRODUCT ? rest : d_all)));
            rest -= y[k] * row[k];
          }
          const real mixed = rest + now[v];
          lam_out.v[e] = narrow(GATED ? r * before : r * (before - mixed));
          if constexpr (GATED) gate_out.v[e] = narrow(r * mixed);
          s_out.v[e] = narrow(r);
          if constexpr (!GIVEN) {
            size_before = Most::of(size_before, magnitude(r));
            nan |= !is_finite(r);
            if constexpr (COMPARE) {
              const real off = magnitude(widen(s_out.v[e]) - widen(ring.at(slot, OLD, a).v[e]));
              differs = off <= differs ? differs : off;
            }
          }
          c[v] = widen(ring.at(slot, LAM, a).v[e]) * r;
          if constexpr (SPLIT && !COMPARE) decay[v] *= widen(ring.at(slot, LAM, a).v[e]);
          now[v] = before;
        }
        if (channel(a) < dim) {
          const i64 at = t * dim + channel(a);
          if constexpr (!GIVEN) *(access*)(value + at) = s_out;
          *(access*)(lam_bar + at) = lam_out;
          *(access*)(x_bar + at) = x_out;
          if constexpr (GATED) *(access*)(gate_bar + at) = gate_out;
#pragma unroll
          for (int k = 0; k < R; ++k) *(access*)(u_bar + (t * R + k) * dim + channel(a)) = u_out[k];
          if (n == steps - 1) {
            access start;
#pragma unroll
            for (int e = 0; e < EACH; ++e) start.v[e] = narrow(c[a * EACH + e]);
            *(access*)(initial_bar + b * dim + channel(a)) = start;
          }
        }
      }
      told.bad |= nan;
      if (COMPARE && nan) differs = LARGEST;  // a maximum drops a NaN
      lam_before = lam_here;
      fetch(n + STAGES, slot, word == 0 ? STAGES : word - 1, COMPARE);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      word = word == STAGES ? 0 : word + 1;
    }
    arrived<0>();
    if constexpr (MAXIMA > 0) {  // the size of the last step
      real none[1], m[1] = {size_before};
      reduce<0, 1>(none, m, partial + buffer * partials(TOTALS), totals);
      buffer ^= 1;
      if (thinks()) told.largest = Most::of(told.largest, totals[0]);
    }
    return !meets;
  };

#pragma unroll
  for (int v = 0; v < VALUES; ++v) c[v] = 0;
#if SPLIT
#pragma unroll
  for (int v = 0; v < VALUES; ++v) decay[v] = 1;
#endif
  walk(No());
#if SPLIT
  settle_segments(j, segments, dim, c, decay, between, barrier, [&] { return walk(Yes()); },
                  [&](real change, real size) {
                    real none[1], m[2] = {change, size};
                    reduce<0, 2>(none, m, partial + buffer * partials(TOTALS), totals);
                    buffer ^= 1;
                    return (bool)__syncthreads_or(thinks() && totals[0] > 2 * EPS * totals[1]);
                  });
#endif
  if constexpr (!GIVEN) told.write(DIRECT, max_iter, change, scale, rcond, state, partial + buffer * partials(TOTALS), totals);
}
