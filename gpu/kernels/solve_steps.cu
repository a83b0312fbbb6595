// The fixed point of (F), step after step, for low-rank mixers; sections 3 and 6 of docs/mathematics.md.
//
//   forward   w = lam_t h_{t-1} + g_t x_t,        rho = U (x - h),  rho = U (x - w) + G S rho,      h_t = w - g U^T S rho
//   ADJOINT   w = hbar_t + lam_{t+1} s_{t+1},     rho = U (g s),    rho = U (g w) + G S^T rho,      s_t = w + U^T S^T rho
//
// DIRECT solves a step's R equations; otherwise they are iterated from U (x - 0), which gives the iterates of (F)
// exactly, and a bound of the change of the iterate, sum_k max_d |g u_k| |d(S rho)_k|, is tested against the tolerance.
//
// One block walks one sequence. With SPLIT a sequence is cut into segments of time, a block each, all of them resident
// (cooperative launch): every segment starts from a zero state, then blocks walk again from the true state until the
// result is the one that is there, to within rounding, and hand on what moved until nothing does. What is carried in decays
// with the product of the A_t, so a second walk is short; at worst, segments follow each other as one block would.
//
// Traffic: lam, source, u, alpha (and the gate) read once, the result written once; with SPLIT the second walks again.
#include "lowrank.cuh"

constexpr int ARRAYS = 2 + GATED + R + SPLIT, LAM = 0, SOURCE = 1, GATE = 2, U = 2 + GATED, OLD = 2 + GATED + R;
constexpr int SECOND = DIRECT || ADJOINT ? 0 : R;  // U x, from which the iteration starts
constexpr int SUMS = R + SECOND + GRAMS + PLAINS;
constexpr int MAXIMA = DIRECT ? 0 : R + 2;          // bounds, |lam|, the size of the step before
constexpr int TOTALS = SUMS + MAXIMA + 2;
// What the second half of a step needs again stays in registers, unless it is too much for them.
constexpr bool KEEP = R * VALUES <= 8;

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, MINBLOCKS)
solve_steps(const store* __restrict__ lam, const store* __restrict__ gate, const store* __restrict__ source,
            const store* __restrict__ u, const store* __restrict__ alpha, const store* __restrict__ initial, store* value,
            i64 steps, int dim, int segments, double rtol, double atol, i64 max_iter, int* counts, double* change,
            double* scale, double* rcond, int* state, real* between, u32* barrier) {
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
  const i64 first = steps * j / segments, last = steps * (j + 1) / segments;

  real h[VALUES];                  // what the step before hands on: h, or lam s
  real decay[SPLIT ? VALUES : 1];  // product of the segment's lam
  Told told;
  const Stop stop = {rtol, atol, max_iter, steps};
  int buffer = 0;

  auto fetch = [&](i64 n, int slot, int word, bool comparing) {
    if (n < last) {
      const i64 t = b * steps + (ADJOINT ? steps - 1 - n : n);
      ring.fetch(slot, LAM, lam + t * dim, dim);
      ring.fetch(slot, SOURCE, source + t * dim, dim);
      if constexpr (GATED) ring.fetch(slot, GATE, gate + t * dim, dim);
#pragma unroll
      for (int k = 0; k < R; ++k) ring.fetch(slot, U + k, u + (t * R + k) * dim, dim);
      if (SPLIT && comparing) ring.fetch(slot, OLD, value + t * dim, dim);
      ring.fetch_alpha(word, alpha + t * R);
    }
    commit();
  };
  auto gate_of = [&](int slot, int a, int e, real decay) {
    return GATED ? widen(ring.at(slot, GATE, a).v[e]) : 1 - decay;
  };

  // Walk the segment from `h`. Comparing, stop as soon as a step's result is what was there; whether it never was.
  auto walk = [&](auto compare) {
    constexpr bool COMPARE = decltype(compare)::value;
    constexpr int EXTRA = COMPARE ? 2 : 0;  // by how much the step before differs from what was there, and its size
    real size_before = 0, lam_before = 0, differs = 0;
    bool meets = false;
    for (int p = 0; p < STAGES; ++p) fetch(first + p, p, p, COMPARE);
    int slot = 0, word = 0;
    for (i64 n = first; n < last; ++n) {
      const i64 t = ADJOINT ? steps - 1 - n : n;
      arrived<STAGES - 1>();
      real s[SUMS], m[MAXIMA + EXTRA + 1], w[VALUES], kept[KEEP ? R * VALUES : 1];
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
          const real decay = widen(ring.at(slot, LAM, a).v[e]), x = widen(ring.at(slot, SOURCE, a).v[e]);
          const real g = gate_of(slot, a, e, decay);
          w[v] = ADJOINT ? x + h[v] : decay * h[v] + g * x;
          const real into = ADJOINT ? g * w[v] : x - w[v];
          real row[R];
#pragma unroll
          for (int k = 0; k < R; ++k) row[k] = widen(ring.at(slot, U + k, a).v[e]);
#pragma unroll
          for (int k = 0; k < R; ++k) {
            const real gu = g * row[k];
            if constexpr (KEEP) kept[v * R + k] = ADJOINT ? row[k] : gu;
            s[k] += row[k] * into;
            if constexpr (SECOND > 0) s[R + k] += row[k] * x;
#pragma unroll
            for (int i = 0; i <= k; ++i) s[R + SECOND + pair(k, i)] += gu * row[i];
            if constexpr (CHAIN) {
#pragma unroll
              for (int i = 0; i < k; ++i) s[R + SECOND + GRAMS + below(k, i)] += row[k] * row[i];
            }
            if constexpr (!DIRECT) m[k] = Most::of(m[k], magnitude(ADJOINT ? row[k] : gu));
          }
          lam_here = Most::of(lam_here, magnitude(decay));
        }
      if constexpr (!DIRECT) {
        m[R] = ADJOINT ? lam_before : lam_here;
        m[R + 1] = size_before;
      }
      if constexpr (COMPARE) {
        m[MAXIMA] = differs;
        m[MAXIMA + 1] = size_before;
      }
      reduce<SUMS, MAXIMA + EXTRA>(s, m, partial + buffer * partials(TOTALS), totals);
      buffer ^= 1;
      real y[R];
      int verdict = GO;
      auto result = [&](int a, int e) {
        const int v = a * EACH + e;
        real mixed = 0;
#pragma unroll
        for (int k = 0; k < R; ++k) {
          if constexpr (KEEP)
            mixed += y[k] * kept[v * R + k];
          else
            mixed += y[k] * widen(ring.at(slot, U + k, a).v[e]);
        }
        if constexpr (!ADJOINT && !KEEP) mixed *= gate_of(slot, a, e, widen(ring.at(slot, LAM, a).v[e]));
        return ADJOINT ? w[v] + mixed : w[v] - mixed;
      };
      real strength[R];
      const System of = {totals, totals + R + SECOND, totals + R + SECOND + GRAMS};
      const real* bounds = totals + SUMS;
      if (thinks()) {
        ring.alpha(word, alpha + (b * steps + t) * R, strength);
        if (COMPARE && n > first && bounds[MAXIMA] <= EPS / 4 * bounds[MAXIMA + 1]) {
          verdict = SETTLED;
        } else if constexpr (DIRECT) {
          const real condition = solve_small<ADJOINT>(of, strength, y);
          if (!(condition >= told.rcond)) told.rcond = condition;  // keeps a NaN
          chain<ADJOINT>(of, strength, y);
#pragma unroll
          for (int k = 0; k < R; ++k) y[k] *= strength[k];
        } else {
          told.largest = Most::of(told.largest, bounds[R + 1]);
#pragma unroll
          for (int k = 0; k < R; ++k) y[k] = ADJOINT ? 0 : totals[R + k];
          if constexpr (!ADJOINT) {
            chain<false>(of, strength, y);
#pragma unroll
            for (int k = 0; k < R; ++k) y[k] *= strength[k];
          }
        }
      }
      if constexpr (!DIRECT) {
        Relaxing relaxing(stop, bounds);
        auto finish = [&](real size) {
          relaxing.finish<ADJOINT>(of, strength, bounds, scratch, size, told, y);
          if (leader()) {
            int* place = counts + b * steps + t;
            *place = COMPARE ? max(*place, (int)relaxing.count) : (int)relaxing.count;
          }
        };
        if (thinks() && verdict == GO) {
          if (relaxing.wants_look(told))
            verdict = LOOK;
          else
            finish(-1);
        }
        share(shared, y, verdict);
        if (verdict == LOOK) {
          real none[1], most[1] = {0};
          bool nan = false;
#pragma unroll
          for (int a = 0; a < ACCESSES; ++a)
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
              const real r = result(a, e);
              most[0] = Most::of(most[0], magnitude(r));
              nan |= !is_finite(r);
            }
          if (nan) most[0] = 2 * LARGEST;
          reduce<0, 1>(none, most, partial + buffer * partials(TOTALS), most_of_all);
          buffer ^= 1;
          if (thinks()) finish(most_of_all[0]);
          share(shared, y, verdict);
        }
      } else {
        share(shared, y, verdict);
      }
      if (verdict == SETTLED) { meets = true; break; }
      size_before = 0;
      differs = 0;
      bool nan = false;
#pragma unroll
      for (int a = 0; a < ACCESSES; ++a) {
        access out;
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          const int v = a * EACH + e;
          const real r = result(a, e);
          out.v[e] = narrow(r);
          size_before = Most::of(size_before, magnitude(r));
          nan |= !is_finite(r);
          if constexpr (COMPARE) {
            const real d = magnitude(widen(out.v[e]) - widen(ring.at(slot, OLD, a).v[e]));
            differs = d <= differs ? differs : d;
          }
          h[v] = ADJOINT ? widen(ring.at(slot, LAM, a).v[e]) * r : r;
          if constexpr (SPLIT && !COMPARE) decay[v] *= widen(ring.at(slot, LAM, a).v[e]);
        }
        if (channel(a) < dim) *(access*)(value + (b * steps + t) * dim + channel(a)) = out;
      }
      told.bad |= nan;
      if (COMPARE && nan) differs = LARGEST;  // a maximum drops a NaN
      lam_before = lam_here;
      fetch(n + STAGES, slot, word == 0 ? STAGES : word - 1, COMPARE);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      word = word == STAGES ? 0 : word + 1;
    }
    arrived<0>();
    if constexpr (!DIRECT) {  // the size of the last step
      real none[1], m[1] = {size_before};
      reduce<0, 1>(none, m, partial + buffer * partials(TOTALS), totals);
      buffer ^= 1;
      if (thinks()) told.largest = Most::of(told.largest, totals[0]);
    }
    return !meets;
  };
#pragma unroll
  for (int a = 0; a < ACCESSES; ++a)
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int d = channel(a) + e;
      h[a * EACH + e] = !ADJOINT && j == 0 && initial != nullptr && d < dim ? widen(initial[b * dim + d]) : 0;
    }
#if SPLIT
#pragma unroll
  for (int v = 0; v < VALUES; ++v) decay[v] = 1;
#endif
  walk(No());
#if SPLIT
  settle_segments(j, segments, dim, h, decay, between, barrier, [&] { return walk(Yes()); },
                  [&](real change, real size) {
                    real none[1], m[2] = {change, size};
                    reduce<0, 2>(none, m, partial + buffer * partials(TOTALS), totals);
                    buffer ^= 1;
                    return (bool)__syncthreads_or(thinks() && totals[0] > 2 * EPS * totals[1]);
                  });
#endif
  told.write(DIRECT, max_iter, change, scale, rcond, state, partial + buffer * partials(TOTALS), totals);
}
