// One step of a low-rank mixer: what the kernels that walk over time share. Section 3 of docs/mathematics.md.
//
// P = I - Q = U^T S U of rank R leaves R unknown numbers per step, rho = U (x - h). A step is one batched reduction over
// the channels, for q, G = U diag(g) U^T and, for a product of reflections, the plain U U^T; then a system of R
// equations, solved by one warp with one column to a lane. S itself is never needed but for that: S rho is
// alpha times a chain, f_i = rho_i - sum_{j<i} (u_i . u_j) alpha_j f_j, and S^T rho is the same from the other end.
//
// Shape class: RANK 1 to 8, PRODUCT (0 for a sum of terms, 1 for a product of reflections), THREADS of a block, which
// has all channels: ACCESSES accesses of EACH neighbouring channels a thread. Rows come through a ring of STAGES steps in
// shared memory, filled by asynchronous copies; what a thread copies only that thread reads, so rows need no barrier.
// Where a step is too large for the shared memory of one block, a cluster of CLUSTER blocks shares its channels, and the
// sums of the warps go straight to the shared memory of all of them.
#include "rows.cuh"

#define WARPS (THREADS / 32)
#define VALUES (EACH * ACCESSES)

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

constexpr u32 ALL = 0xffffffffu;
constexpr int R = RANK;
constexpr bool CHAIN = PRODUCT && RANK > 1;
constexpr int GRAMS = R * (R + 1) / 2, PLAINS = CHAIN ? R * (R - 1) / 2 : 0;
__device__ constexpr int pair(int k, int m) { return k >= m ? k * (k + 1) / 2 + m : m * (m + 1) / 2 + k; }
__device__ constexpr int below(int k, int m) { return k * (k - 1) / 2 + m; }  // k > m

// --- the blocks of a sequence -------------------------------------------------------------------------------------

__device__ __forceinline__ int rank_in_cluster() { return CLUSTER > 1 ? blockIdx.x % CLUSTER : 0; }
// The thread that speaks for the sequence.
__device__ __forceinline__ bool leader() { return threadIdx.x == 0 && rank_in_cluster() == 0; }

// Everybody who works on the step waits for everybody.
__device__ __forceinline__ void everybody() {
#if CLUSTER > 1 && defined(SIMT)
  simt_cluster_barrier();
#elif CLUSTER > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  __syncthreads();  // adds nothing, but checkers of races do not know the other
#else
  __syncthreads();
#endif
}

// Store a number at the same place of the shared memory of every block of the cluster.
__device__ __forceinline__ void tell(real* place, real v) {
#if CLUSTER > 1 && defined(SIMT)
  for (int k = 0; k < CLUSTER; ++k) *simt::in_cluster(place, k) = v;
#elif CLUSTER > 1
  const u32 here = (u32)__cvta_generic_to_shared(place);
#pragma unroll
  for (int k = 0; k < CLUSTER; ++k) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(k));
    if constexpr (sizeof(real) == 8)
      asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(there), "l"(__double_as_longlong(v)) : "memory");
    else
      asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(there), "r"(__float_as_uint(v)) : "memory");
  }
#else
  *place = v;
#endif
}

// --- sums and maxima over a block ---------------------------------------------------------------------------------

struct Sum {
  __device__ static real of(real a, real b) { return a + b; }
};
struct Most {  // of magnitudes; drops a NaN
  __device__ static real of(real a, real b) { return larger(a, b); }
};

// How many values a lane is left with when N have been folded over the lanes.
__device__ constexpr int left_over(int n) {
  for (int k = 0; k < 5; ++k) n = (n + 1) / 2;
  return n;
}

// Reduce N values over the 32 lanes at once: at each level a lane keeps one half of them and sends the other. In the
// end it holds the totals of `valid` values from number `index` on.
template <int N, int OFFSET, class Op>
__device__ __forceinline__ void fold(real* v, int lane, int& index, int& valid) {
  if constexpr (OFFSET > 0) {
    const bool upper = lane & OFFSET;
    if constexpr (N > 1) {
      constexpr int H = (N + 1) / 2;
#pragma unroll
      for (int i = 0; i < H; ++i) {
        const real other = i + H < N ? v[i + H] : (real)0;
        const real keep = upper ? other : v[i], send = upper ? v[i] : other;
        v[i] = Op::of(keep, __shfl_xor_sync(ALL, send, OFFSET));
      }
      index += upper ? H : 0;
      valid = upper ? valid - H : (valid < H ? valid : H);
      fold<H, OFFSET / 2, Op>(v, lane, index, valid);
    } else {
      v[0] = Op::of(v[0], __shfl_xor_sync(ALL, v[0], OFFSET));
      if (upper) valid = 0;  // a twin of another lane's
      fold<1, OFFSET / 2, Op>(v, lane, index, valid);
    }
  }
}

// For rank one and few warps (FEW) every thread adds up the partial results and thinks for itself. Otherwise the first warp
// does, and tells the others.
#define FEW (RANK == 1 && WARPS <= 8 && CLUSTER == 1)
__device__ __forceinline__ bool thinks() { return FEW || threadIdx.x < 32; }

// How many numbers the partial results of N values take; the caller has two such buffers.
__device__ constexpr int partials(int n) { return (WARPS * n + (CLUSTER > 1 ? CLUSTER * n : 0) + 3) / 4 * 4; }

// NS sums and NM maxima over everybody, left in `totals` of whom `thinks`: an array of its own where FEW, shared memory
// otherwise. One barrier, and one more in a cluster: `partial` must not be the buffer of the reduction before.
template <int NS, int NM>
__device__ __forceinline__ void reduce(real* s, real* m, real* partial, real* totals) {
  constexpr int N = NS + NM;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  auto join = [](int i, real a, real b) { return i < NS ? a + b : Most::of(a, b); };
  if constexpr (NS > 0) {
    int index = 0, valid = NS;
    fold<NS, 16, Sum>(s, lane, index, valid);
#pragma unroll
    for (int i = 0; i < left_over(NS); ++i)
      if (i < valid) partial[warp * N + index + i] = s[i];
  }
  if constexpr (NM > 0) {
    int index = 0, valid = NM;
    fold<NM, 16, Most>(m, lane, index, valid);
#pragma unroll
    for (int i = 0; i < left_over(NM); ++i)
      if (i < valid) partial[warp * N + NS + index + i] = m[i];
  }
  __syncthreads();
  if constexpr (FEW) {
    constexpr int PACKS = (WARPS * N + 3) / 4;
    real all[PACKS * 4];
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      const Pack<real, 4> four = ((const Pack<real, 4>*)partial)[i];
#pragma unroll
      for (int k = 0; k < 4; ++k) all[4 * i + k] = four.v[k];
    }
#pragma unroll
    for (int gap = 1; gap < WARPS; gap *= 2)
#pragma unroll
      for (int w = 0; w + gap < WARPS; w += 2 * gap)
#pragma unroll
        for (int i = 0; i < N; ++i) all[w * N + i] = join(i, all[w * N + i], all[(w + gap) * N + i]);
#pragma unroll
    for (int i = 0; i < N; ++i) totals[i] = all[i];
    return;
  }
  real* everywhere = partial + WARPS * N;
  if (warp == 0)
    for (int i = lane; i < N; i += 32) {
      real t = partial[i];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) t = join(i, t, partial[w * N + i]);
      if (CLUSTER == 1)
        totals[i] = t;
      else
        tell(everywhere + rank_in_cluster() * N + i, t);
    }
  if constexpr (CLUSTER > 1) {
    everybody();
    if (warp == 0)
      for (int i = lane; i < N; i += 32) {
        real t = everywhere[i];
#pragma unroll
        for (int k = 1; k < CLUSTER; ++k) t = join(i, t, everywhere[k * N + i]);
        totals[i] = t;
      }
  }
  __syncwarp();
}

// What the warp that thinks has found out, for everybody: COUNT numbers and a verdict. Nothing to do where FEW.
template <int COUNT>
__device__ __forceinline__ void share(real* shared, real (&v)[COUNT], int& verdict) {
  if constexpr (!FEW) {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) shared[i] = v[i];
      *(int*)(shared + COUNT) = verdict;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] = shared[i];
    verdict = *(const int*)(shared + COUNT);
  }
}

// --- the system of a step -----------------------------------------------------------------------------------------

// q (R), G, and the plain products as `reduce` left them
struct System {
  const real *q, *gram, *plain;
};

// Column `lane` of S, or of S^T where BACK.
template <bool BACK>
__device__ __forceinline__ void column_of_s(const System& of, const real (&alpha)[R], int lane, real (&c)[R]) {
#pragma unroll
  for (int n = 0; n < R; ++n) {
    const int i = BACK ? R - 1 - n : n;
    real chained = 0;
    if constexpr (CHAIN) {
#pragma unroll
      for (int k = 0; k < R; ++k) {
        if (BACK ? k > i : k < i) chained += of.plain[BACK ? below(k, i) : below(i, k)] * c[k];
      }
    }
    c[i] = i == lane ? alpha[i] : -alpha[i] * chained;
  }
}

// alpha_i v_i with the chain through the plain products: S v, or S^T v where BACK. `v` becomes the chained one.
template <bool BACK>
__device__ __forceinline__ void chain(const System& of, const real (&alpha)[R], real (&v)[R]) {
  if constexpr (CHAIN) {
#pragma unroll
    for (int n = 0; n < R; ++n) {
      const int i = BACK ? R - 1 - n : n;
#pragma unroll
      for (int k = 0; k < R; ++k) {
        if (BACK ? k > i : k < i) v[i] -= of.plain[BACK ? below(k, i) : below(i, k)] * (alpha[k] * v[k]);
      }
    }
  }
}

// a / b to a few digits.
__device__ __forceinline__ real roughly(real a, real b) {
#ifdef SIMT
  return a / b;
#else
  return sizeof(real) == 4 ? (real)__fdividef((float)a, (float)b) : a / b;
#endif
}

// (I - G S) rho = q, or with S^T, by elimination with row pivoting; a column to a lane, the right side in lane R.
// Returns an estimate of the reciprocal condition: the smallest pivot against 1 + ||G S||_1, since what loses digits is
// the cancellation in I - G S.
template <bool BACK>
__device__ __forceinline__ real solve_small(const System& of, const real (&alpha)[R], real (&rho)[R]) {
  if constexpr (R == 1) {
    const real k = alpha[0] * of.gram[0], pivot = 1 - k;
    rho[0] = of.q[0] / pivot;
    return roughly(magnitude(pivot), 1 + magnitude(k));
  } else {
    const int lane = threadIdx.x & 31;
    real a[R], c[R], norm = 0, smallest = LARGEST;
    column_of_s<BACK>(of, alpha, lane, c);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      real gs = 0;
#pragma unroll
      for (int n = 0; n < R; ++n) gs += of.gram[pair(i, n)] * c[n];
      norm += lane < R ? magnitude(gs) : 0;
      a[i] = lane < R ? (i == lane ? 1 : 0) - gs : lane == R ? of.q[i] : 0;
    }
#pragma unroll
    for (int offset = 8; offset; offset /= 2) norm = Most::of(norm, __shfl_xor_sync(ALL, norm, offset));
    norm = __shfl_sync(ALL, norm, 0);
#pragma unroll
    for (int k = 0; k < R; ++k) {
      int best = k;
      real top = magnitude(a[k]);
#pragma unroll
      for (int i = k + 1; i < R; ++i) {
        if (magnitude(a[i]) > top) { top = magnitude(a[i]); best = i; }
      }
      best = __shfl_sync(ALL, best, k);
#pragma unroll
      for (int i = k + 1; i < R; ++i) {
        if (i == best) { const real t = a[k]; a[k] = a[i]; a[i] = t; }
      }
      const real pivot = __shfl_sync(ALL, a[k], k);
      if (!(magnitude(pivot) >= smallest)) smallest = magnitude(pivot);  // keeps a NaN
      const real inverse = 1 / pivot;
      if (lane != k) a[k] *= inverse;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        if (i != k) {
          const real factor = __shfl_sync(ALL, a[i], k);
          if (lane != k) a[i] -= factor * a[k];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < R; ++k) rho[k] = __shfl_sync(ALL, a[k], R);
    return smallest / (1 + norm);
  }
}

// Iterate y = S (q + G y), or with S^T, until the result changes by less than the tolerance: `bound` says how far one
// unit of y_k moves it. `count` iterations are behind, of which the last left `y`. `scratch` is this warp's, R R.
template <bool BACK>
__device__ __forceinline__ void iterate_small(const System& of, const real (&alpha)[R], const real* bound, real* scratch,
                                              real tolerance, i64 max_iter, i64& count, real& change, real (&y)[R]) {
  change = LARGEST;
  if constexpr (R == 1) {
    const real k = alpha[0] * of.gram[0], b = alpha[0] * of.q[0];
    // Changes are a geometric sequence: where the first and the last of four are too large, so are those between.
    while (count + 4 < max_iter) {
      real next[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) next[i] = b + k * (i == 0 ? y[0] : next[i - 1]);
      const real early = bound[0] * magnitude(next[0] - y[0]), late = bound[0] * magnitude(next[3] - next[2]);
      if (!(early > tolerance && late > tolerance && is_finite(late))) break;
      y[0] = next[3];
      count += 4;
    }
    do {
      const real next = b + k * y[0];
      change = bound[0] * magnitude(next - y[0]);
      y[0] = next;
      ++count;
    } while (!(change <= tolerance) && is_finite(change) && count < max_iter);
  } else {
    const int lane = threadIdx.x & 31, row = lane < R ? lane : 0;
    real c[R], k[R], b = 0, mine = 0;
    column_of_s<BACK>(of, alpha, lane, c);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < R; ++i)
      if (lane < R) scratch[i * R + lane] = c[i];
    __syncwarp();
#pragma unroll
    for (int n = 0; n < R; ++n) {
      b += scratch[row * R + n] * of.q[n];
      k[n] = 0;
      mine = n == row ? y[n] : mine;
    }
#pragma unroll
    for (int m = 0; m < R; ++m)
#pragma unroll
      for (int n = 0; n < R; ++n) k[m] += scratch[row * R + n] * of.gram[pair(n, m)];
    const real reach = lane < R ? bound[row] : 0;
    while (!(change <= tolerance) && is_finite(change) && count < max_iter) {
      real next = b;
#pragma unroll
      for (int m = 0; m < R; ++m) next += k[m] * __shfl_sync(ALL, mine, m);
      change = reach * magnitude(next - mine);
#pragma unroll
      for (int offset = 4; offset; offset /= 2) change += __shfl_xor_sync(ALL, change, offset);
      change = __shfl_sync(ALL, change, 0);
      mine = next;
      ++count;
    }
#pragma unroll
    for (int n = 0; n < R; ++n) y[n] = __shfl_sync(ALL, mine, n);
  }
}

// What is said of the steps of a segment.
struct Told {
  real largest = 0, rcond = 1, change = 0;
  int worst = 0;     // a status
  bool bad = false;  // something, in this thread, that is not finite

  // Once, by all threads, which then may leave.
  __device__ void write(bool direct, i64 max_iter, double* changes, double* scales, double* rconds, int* states,
                        real* partial, real* totals) {
    if (!direct && max_iter == 1) change = Most::of(change, largest);  // a first iterate moved by its own size
    real none[1], any[1] = {bad ? (real)1 : (real)0};
    reduce<0, 1>(none, any, partial, totals);
    if (leader()) {
      if (totals[0] > 0) worst = 2;
      if (direct && rcond < 1000 * EPS) worst = 4;
      const int part = blockIdx.x / CLUSTER;
      changes[part] = change;
      scales[part] = largest;
      rconds[part] = rcond;
      states[part] = worst;
    }
    everybody();  // nobody leaves whom others still write to
  }
};

struct Stop {
  double rtol, atol;
  i64 max_iter, steps;
};

// What a step is told to do next.
#define GO 0       // its result is found
#define LOOK 1     // the size of the first iterate is wanted first
#define SETTLED 2  // nothing has changed since the last walk: stop

// The iterative way through one step. `bounds` are the step's maxima: how far a unit of y_k moves the result, the largest
// decay, and the size of the step before.
struct Relaxing {
  const Stop& stop;
  real share = 0;
  i64 count = 1;

  __device__ Relaxing(const Stop& stop, const real* bounds) : stop(stop) {
    if (thinks()) share = stop.steps == 1 ? 1 : (real)0.5 * Most::of(1 - bounds[R], (real)1 / (real)stop.steps);
  }
  __device__ real allowed(real size) const {
    return Most::of(share * ((real)stop.atol + (real)stop.rtol * size), 4 * EPS * size);
  }
  // The first iterate started from zero and is its own change: its size matters only where it can be small enough.
  __device__ bool wants_look(const Told& told) const {
    return told.largest == 0 || stop.atol > 0 || (stop.max_iter == 1 && stop.rtol >= 1);
  }
  // From the first iterate on; `size` is its size, or -1 if nobody looked.
  template <bool BACK>
  __device__ void finish(const System& of, const real (&alpha)[R], const real* bounds, real* scratch, real size,
                         Told& told, real (&y)[R]) {
    if (size < 0 && stop.max_iter == 1) {  // it moved by its size, which is too much, and is seen with the next step
      told.worst = max(told.worst, 1);
      return;
    }
    const real tallest = Most::of(told.largest, size);
    real moves = size < 0 ? LARGEST : size;
    const bool done = size >= 0 && (moves <= allowed(tallest) || !is_finite(moves) || stop.max_iter == 1);
    if (!done) iterate_small<BACK>(of, alpha, bounds, scratch, allowed(tallest), stop.max_iter, count, moves, y);
    if (!(moves <= told.change)) told.change = moves;  // keeps a NaN
    if (!(moves <= allowed(tallest))) told.worst = max(told.worst, is_finite(moves) ? 1 : 2);
  }
};

// --- rows ---------------------------------------------------------------------------------------------------------

// The first channel of an access of this thread.
__device__ __forceinline__ int channel(int a) {
  return ((rank_in_cluster() * ACCESSES + a) * THREADS + (int)threadIdx.x) * EACH;
}

// A ring of STAGES steps of ARRAYS rows, and of the step's alpha.
template <int ARRAYS> struct Ring {
  static constexpr int ROWS = ARRAYS * ACCESSES * THREADS;  // accesses a stage
  access* rows;
  // [STAGES + 1][STRENGTHS], each as it lies in memory. One more than stages: all threads read what one has fetched, and
  // who fetches the next may be a step ahead of who still reads.
  u64* strengths;

  static constexpr int STRENGTHS = (R + 1) / 2 * 2;  // words a stage
  static constexpr int BYTES = STAGES * ROWS * (int)sizeof(access) + (STAGES + 1) * STRENGTHS * 8;

  __device__ void init(unsigned char* memory, int dim) {
    rows = (access*)memory;
    strengths = (u64*)(memory + STAGES * ROWS * sizeof(access));
    for (int a = 0; a < ACCESSES; ++a)  // channels that do not exist are zero in every row
      if (channel(a) >= dim)
        for (int i = 0; i < STAGES * ARRAYS; ++i)
          for (int e = 0; e < EACH; ++e) rows[(i * ACCESSES + a) * THREADS + threadIdx.x].v[e] = narrow(0);
  }
  __device__ __forceinline__ access& at(int slot, int array, int a) const {
    return rows[((slot * ARRAYS + array) * ACCESSES + a) * THREADS + threadIdx.x];
  }
  __device__ __forceinline__ void fetch(int slot, int array, const store* row, int dim) const {
#pragma unroll
    for (int a = 0; a < ACCESSES; ++a)
      if (channel(a) < dim) copy_async<sizeof(access)>(&at(slot, array, a), row + channel(a));
  }
  __device__ __forceinline__ void fetch_alpha(int slot, const store* row) const {
    const int i = threadIdx.x;
    if (i < R) {
      unsigned char* to = (unsigned char*)(strengths + slot * STRENGTHS + i);
#ifdef SIMT
      copy_async<sizeof(store)>(to, row + i);
#else
      if constexpr (sizeof(store) >= 4)
        copy_async<sizeof(store)>(to, row + i);
      else  // the aligned word that holds it
        copy_async<4>(to, (const void*)((u64)(row + i) & ~3ull));
#endif
    }
  }
  __device__ __forceinline__ void alpha(int slot, const store* row, real (&alpha)[R]) const {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const unsigned char* from = (const unsigned char*)(strengths + slot * STRENGTHS + i);
#ifndef SIMT
      if constexpr (sizeof(store) == 2) from += (u64)(row + i) & 2;
#endif
      alpha[i] = widen(*(const store*)from);
    }
  }
};

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };

// The blocks of a sequence's segments, one each and all of them resident, walk again from better and better states until
// nothing moves. What comes into a segment is what the one before left, and what it would have left more or less, had it
// known what comes into it: the product of its lam says that, roughly, for what only decays and is not mixed. Where lam
// decays fast that product is nothing; where it does not, a correction reaches all segments at once, not one a round.
//   state     what a walk starts from, and leaves
//   decay     the product of the segment's lam
//   again     walks, stops where the result is what was there to within rounding, and says whether it never was
//   differ    whether the largest of one number a thread is more than roundings of the largest of another
//   between   [3][blocks][dim]: what segments left, what entered them, their products
//   barrier   how many have arrived, and then for each round how many moved
template <class Walk, class Differ>
__device__ __forceinline__ void settle_segments(int j, int segments, int dim, real (&state)[VALUES],
                                                const real (&decay)[VALUES], real* between, u32* barrier, Walk again,
                                                Differ differ) {
  const i64 all = (i64)gridDim.x * dim, mine = (i64)blockIdx.x * dim;
  real *ends = between, *entries = between + all, *products = between + 2 * all;
  auto worse = [](real so_far, real d) { return is_finite(d) ? Most::of(so_far, magnitude(d)) : 2 * LARGEST; };
  u32* movers = barrier + 1;
  auto leave = [&](real* to, auto what) {
#pragma unroll
    for (int a = 0; a < ACCESSES; ++a)
#pragma unroll
      for (int e = 0; e < EACH; ++e)
        if (channel(a) + e < dim) to[mine + channel(a) + e] = what(a * EACH + e);
  };
  leave(ends, [&](int v) { return state[v]; });
  leave(entries, [&](int) { return (real)0; });
  leave(products, [&](int v) { return decay[v]; });
  u32 met = 0;
  grid_barrier(barrier, met++);
  for (int round = 0; round + 1 < segments; ++round) {
    real enters[VALUES], change = 0, size = 0;
#pragma unroll
    for (int a = 0; a < ACCESSES; ++a)
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const i64 at = mine + channel(a) + e;
        real now = 0;
        if (channel(a) + e < dim && j > round) {
          int back = 1;  // how far back a correction can come from
          for (real alive = 1; back < j; ++back) {
            alive *= magnitude(__ldcg(products + at - (i64)back * dim));
            if (!(alive > EPS / 16)) break;
          }
          real shift = 0, old = 0;
#pragma unroll 4
          for (; back >= 1; --back) {
            const i64 before = at - (i64)back * dim;
            old = __ldcg(entries + before + dim);
            now = __ldcg(ends + before);
            if (shift != 0) now += __ldcg(products + before) * shift;
            shift = now - old;
          }
          change = worse(change, now - old);
          size = Most::of(size, magnitude(now));
        }
        enters[a * EACH + e] = now;
      }
    const bool walks = differ(change, size);
    grid_barrier(barrier, met++);
    if (walks) {
#pragma unroll
      for (int v = 0; v < VALUES; ++v) state[v] = enters[v];
      leave(entries, [&](int v) { return enters[v]; });
      const bool reached = again();
      change = size = 0;
      if (reached) {
#pragma unroll
        for (int a = 0; a < ACCESSES; ++a)
#pragma unroll
          for (int e = 0; e < EACH; ++e) {
            const int v = a * EACH + e;
            if (channel(a) + e < dim) change = worse(change, state[v] - __ldcg(ends + mine + channel(a) + e));
            size = Most::of(size, magnitude(state[v]));
          }
        leave(ends, [&](int v) { return state[v]; });
      }
      if (differ(change, size) && threadIdx.x == 0) atomicAdd(movers + round, 1u);
    }
    grid_barrier(barrier, met++);
    if (load_acquire(movers + round) == 0) break;
  }
}
