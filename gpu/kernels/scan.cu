// h_t = lam_t h_{t-1} + x_t over a whole sequence, and its gradient; section 1 of docs/mathematics.md.
//
//   scan       h_t = lam_t h_{t-1} + x_t from `initial`, or against time (REVERSE)
//   scan_vjp   s_t = hbar_t + lam_{t+1} s_{t+1}, x_bar_t = s_t, lam_bar_t = s_t h_{t-1}, initial_bar = lam_1 s_1;
//              with REVERSE all of time is turned round
//
// A thread walks EACH neighbouring channels; its rows come through a ring of STAGES steps of its own in shared memory.
// Where there are too few channels for the device (SPLIT), time is cut into segments, all of them walked at once from zero
// (cooperative launch). Each leaves the product of its lam and its last state; after one barrier every segment folds
// those before it, in the order of time, to its true state, and adds to its result what that brings, until it is lost to
// rounding. A result does not depend on which block ran first, so it repeats bit for bit.
//
// Traffic: scan reads lam and x and writes h, once; scan_vjp reads lam, h and hbar and writes lam_bar and x_bar, once. With
// SPLIT the steps that are corrected are read and written again: few where lam decays, all of them at worst.
#include "rows.cuh"

struct Place {
  i64 sequence, first, last;  // steps of the segment, counted in the direction of the walk
  int segment, channel;
  bool inside;
  __device__ Place(i64 steps, int dim, int segments, int groups) {
    const int group = blockIdx.x % groups;
    segment = blockIdx.x / groups % segments;
    sequence = blockIdx.x / groups / segments;
    first = steps * segment / segments;
    last = steps * (segment + 1) / segments;
    channel = (group * THREADS + (int)threadIdx.x) * EACH;
    inside = channel < dim;
  }
};

// The state that comes into this segment, by the folds of the segments before it: ends and products [sequence][segment][dim].
// Where a product has vanished, what lies before it cannot matter, unless it is not finite: `odd` [sequence] says so.
__device__ __forceinline__ void enter(const Place& p, int dim, int segments, const real* products, const real* ends,
                                      const u32* odd, const real (&start)[EACH], real (&state)[EACH]) {
  const i64 row = p.sequence * segments;
  const bool all = load_acquire(odd + p.sequence) != 0;
  int from = p.segment;
  real alive = 1;
  while (from > 0 && (all || alive > 0)) {  // how far back
    --from;
    real most = 0;
#pragma unroll
    for (int e = 0; e < EACH; ++e)
      if (p.inside) {
        const real a = magnitude(__ldcg(products + (row + from) * dim + p.channel + e));
        most = a > most ? a : most;
      }
    alive *= most;
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    real c = from == 0 ? start[e] : 0;
    for (int k = from; k < p.segment; ++k)
      if (p.inside) {
        const i64 at = (row + k) * dim + p.channel + e;
        c = __ldcg(products + at) * c + __ldcg(ends + at);
      }
    state[e] = c;
  }
}

// What a segment leaves for those after it.
__device__ __forceinline__ void leave(const Place& p, int dim, int segments, real* products, real* ends, u32* odd,
                                      const real (&product)[EACH], const real (&state)[EACH]) {
  if (!p.inside) return;
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const i64 at = (p.sequence * segments + p.segment) * dim + p.channel + e;
    products[at] = product[e];
    ends[at] = state[e];
    if (!(magnitude(state[e]) <= LARGEST && magnitude(product[e]) <= LARGEST)) atomicExch(odd + p.sequence, 1u);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MINBLOCKS)
scan(const store* __restrict__ lam, const store* __restrict__ x, const store* __restrict__ initial, store* h, i64 steps,
     int dim, int segments, int groups, real* products, real* ends, u32* odd, u32* barrier) {
  SHARED(memory);
  access* ring = (access*)memory;  // [STAGES][2][THREADS]
  const Place p(steps, dim, segments, groups);
  const i64 base = p.sequence * steps;
  auto at = [&](i64 n) { return (base + (REVERSE ? steps - 1 - n : n)) * dim + p.channel; };
  auto fetch = [&](i64 n, int slot, const store* other) {
    if (p.inside && n < p.last) {
      copy_async<sizeof(access)>(ring + slot * 2 * THREADS + threadIdx.x, lam + at(n));
      copy_async<sizeof(access)>(ring + (slot * 2 + 1) * THREADS + threadIdx.x, other + at(n));
    }
    commit();
  };
  real start[EACH], state[EACH], product[EACH];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    start[e] = p.inside && initial != nullptr ? widen(initial[p.sequence * dim + p.channel + e]) : 0;
    state[e] = p.segment == 0 ? start[e] : 0;
    product[e] = 1;
  }
#pragma unroll
  for (int k = 0; k < STAGES; ++k) fetch(p.first + k, k, x);
  int slot = 0;
  for (i64 n = p.first; n < p.last; ++n) {
    arrived<STAGES - 1>();
    const access decay = ring[slot * 2 * THREADS + threadIdx.x], add = ring[(slot * 2 + 1) * THREADS + threadIdx.x];
    fetch(n + STAGES, slot, x);
    access out;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      state[e] = widen(decay.v[e]) * state[e] + widen(add.v[e]);
      if (SPLIT) product[e] *= widen(decay.v[e]);
      out.v[e] = narrow(state[e]);
    }
    if (p.inside) *(access*)(h + at(n)) = out;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
  arrived<0>();
#if SPLIT
  leave(p, dim, segments, products, ends, odd, product, state);
  grid_barrier(barrier, 0);
  if (p.segment == 0) return;
  enter(p, dim, segments, products, ends, odd, start, state);
#pragma unroll
  for (int k = 0; k < STAGES; ++k) fetch(p.first + k, k, h);
  slot = 0;
  for (i64 n = p.first; n < p.last; ++n) {
    arrived<STAGES - 1>();
    const access decay = ring[slot * 2 * THREADS + threadIdx.x], there = ring[(slot * 2 + 1) * THREADS + threadIdx.x];
    fetch(n + STAGES, slot, h);
    access out;
    bool lost = true;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      state[e] *= widen(decay.v[e]);
      const real was = widen(there.v[e]);
      lost &= magnitude(state[e]) <= EPS / 16 * magnitude(was) || state[e] == 0;
      out.v[e] = narrow(was + state[e]);
    }
    if (!p.inside || lost) break;
    *(access*)(h + at(n)) = out;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
  arrived<0>();
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MINBLOCKS)
scan_vjp(const store* __restrict__ lam, const store* __restrict__ h, const store* __restrict__ initial,
         const store* __restrict__ hbar, store* lam_bar, store* x_bar, store* initial_bar, i64 steps, int dim, int segments,
         int groups, real* products, real* ends, u32* odd, u32* barrier) {
  SHARED(memory);
  access* ring = (access*)memory;  // [STAGES][3][THREADS]
  const Place p(steps, dim, segments, groups);
  const i64 base = p.sequence * steps;
  // Steps are counted from the end of the recurrence: the row that h_t was made from is that of n + 1.
  auto at = [&](i64 n) { return (base + (REVERSE ? n : steps - 1 - n)) * dim + p.channel; };
  auto fetch = [&](i64 n, int slot, const store* top) {
    if (p.inside && n < p.last) {
      copy_async<sizeof(access)>(ring + slot * 3 * THREADS + threadIdx.x, lam + at(n));
      copy_async<sizeof(access)>(ring + (slot * 3 + 1) * THREADS + threadIdx.x, top + at(n));
      access* before = ring + (slot * 3 + 2) * THREADS + threadIdx.x;
      if (n + 1 < steps)
        copy_async<sizeof(access)>(before, h + at(n + 1));
      else if (initial != nullptr)
        copy_async<sizeof(access)>(before, initial + p.sequence * dim + p.channel);
      else
        for (int e = 0; e < EACH; ++e) before->v[e] = narrow(0);
    }
    commit();
  };
  real state[EACH], product[EACH];  // lam_{t+1} s_{t+1}
#pragma unroll
  for (int e = 0; e < EACH; ++e) { state[e] = 0; product[e] = 1; }
#pragma unroll
  for (int k = 0; k < STAGES; ++k) fetch(p.first + k, k, hbar);
  int slot = 0;
  for (i64 n = p.first; n < p.last; ++n) {
    arrived<STAGES - 1>();
    const access decay = ring[slot * 3 * THREADS + threadIdx.x], top = ring[(slot * 3 + 1) * THREADS + threadIdx.x],
                 before = ring[(slot * 3 + 2) * THREADS + threadIdx.x];
    fetch(n + STAGES, slot, hbar);
    access into_x, into_lam;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const real s = widen(top.v[e]) + state[e];
      into_x.v[e] = narrow(s);
      into_lam.v[e] = narrow(s * widen(before.v[e]));
      state[e] = widen(decay.v[e]) * s;
      if (SPLIT) product[e] *= widen(decay.v[e]);
    }
    if (p.inside) {
      *(access*)(x_bar + at(n)) = into_x;
      *(access*)(lam_bar + at(n)) = into_lam;
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
  arrived<0>();
  const real none[EACH] = {};
#if SPLIT
  leave(p, dim, segments, products, ends, odd, product, state);
  grid_barrier(barrier, 0);
  bool reached = p.segment == 0;  // the end of the segment, with what was carried in
  if (p.segment > 0) {
    real carried[EACH];
    enter(p, dim, segments, products, ends, odd, none, carried);
#pragma unroll
    for (int k = 0; k < STAGES; ++k) fetch(p.first + k, k, x_bar);
    slot = 0;
    reached = true;
    for (i64 n = p.first; n < p.last; ++n) {
      arrived<STAGES - 1>();
      const access decay = ring[slot * 3 * THREADS + threadIdx.x], there = ring[(slot * 3 + 1) * THREADS + threadIdx.x],
                   before = ring[(slot * 3 + 2) * THREADS + threadIdx.x];
      fetch(n + STAGES, slot, x_bar);
      access into_x, into_lam;
      bool lost = true;
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const real was = widen(there.v[e]), s = was + carried[e];
        lost &= magnitude(carried[e]) <= EPS / 16 * magnitude(was) || carried[e] == 0;
        into_x.v[e] = narrow(s);
        into_lam.v[e] = narrow(s * widen(before.v[e]));
        carried[e] *= widen(decay.v[e]);
      }
      if (!p.inside || lost) { reached = false; break; }
      *(access*)(x_bar + at(n)) = into_x;
      *(access*)(lam_bar + at(n)) = into_lam;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    arrived<0>();
#pragma unroll
    for (int e = 0; e < EACH; ++e) state[e] += reached ? carried[e] : 0;
  }
#endif
  if (p.inside && p.last == steps && p.segment == segments - 1)
#pragma unroll
    for (int e = 0; e < EACH; ++e) initial_bar[p.sequence * dim + p.channel + e] = narrow(state[e]);
  (void)none;
}
