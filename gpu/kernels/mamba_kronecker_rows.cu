// The mixing half of one application of FP-Mamba's map to all rows (b, t) at once, with a Kronecker mixer made from arguments, and
// its adjoint; as `mix_rows` of mamba_rows.cu, with the factors of mamba_kronecker_make.cu.
//
//     u' = x - K1 D K2^T with D = x - y, and B, C of unit length
//
// A block takes a row, and one of its warps each factor, on its own until both are there. Before its rows had unit length a factor
// was M = U U^T, symmetric, so that nothing but M and a diagonal is ever stored (o is the opened diagonal, v the inverse lengths of
// the rows):
//
//     K1 = M1 diag(s1),  K2 = diag(s2) M2,  s = scale o v / divisor,  r = diag(v) M,  r^T w = M (v w)
//
// and a lane that has a row of M in registers has what a power iteration needs, both ways. Products come in chains of two, of which
// a warp takes a strip of 16 rows: what the first leaves in registers is what the second has on its left, as it is, for the order of
// a sum over k is free: the lane that has the columns 2 t and 2 t + 1 of eight takes them as its k. With E for the cotangent of u'
//
//     u' - x       = -(M1 s1 D) M2 s2
//     x_bar - E    = -(F s2) M2,  F = s1 M1 E
//     bar of K1^T  = -(D M2 s2) E^T,  of K2 = -F^T D
//
// Rows of what is read along rows are 8 or 24 numbers more than a multiple of 32 long, so that pairs are read without conflicts;
// of what is read across, 4 or 12 more than one of 16.
// Memory traffic: every array once, but arguments twice by the adjoint, and x twice by the value, near each other in time.
//
// Macros: of mamba_kronecker.cuh and told.cuh. THREADS is a warp for every 16 rows of the larger edge, two at least.
#include "mamba_kronecker.cuh"
#include "told.cuh"

typedef Pack<real, 2> two;

// Where pairs are read along rows; `pitch` is for what is read across.
__device__ constexpr int wide(int edge) { return up(edge, 16) + 2 * PIECE; }
__device__ constexpr int square(int edge) { return rows_of(edge) * wide(edge); }
__device__ constexpr int longer(int a, int b) { return a > b ? a : b; }
__device__ constexpr int length(int edge) { return up(edge, PIECE); }

// --- numbers --------------------------------------------------------------------------------------------------------

#ifdef SIMT
__device__ inline float reciprocal(float v) { return 1 / v; }
__device__ inline float root_below(float v) { return 1 / sqrtf(v); }
#else
__device__ __forceinline__ float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float root_below(float v) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
#endif
__device__ __forceinline__ double reciprocal(double v) { return 1 / v; }
__device__ __forceinline__ double root_below(double v) { return 1 / sqrt(v); }
// Of an argument: the sigmoid; what stands in the triangle, and its slope.
__device__ __forceinline__ real opened(real v) { return reciprocal(1 + exponential(-v)); }
__device__ __forceinline__ real shaped(real v) { return ACT == 1 ? v * opened(v) : activate(v); }
__device__ __forceinline__ real shaped(real v, real& slope) {
  if constexpr (ACT == 1) {
    const real open = opened(v);
    slope = open * (1 + v * (1 - open));
    return v * open;
  }
  slope = activate_slope(v);
  return activate(v);
}

// --- products -------------------------------------------------------------------------------------------------------

// Operands: `one(i, k)`, and those of k and k + 1 at once. A matrix along its rows, of P numbers; its columns scaled; across; and
// the sum of it and its transpose.
template <int P> struct Along {
  const real* m;
  __device__ __forceinline__ real one(int i, int k) const { return m[i * P + k]; }
  __device__ __forceinline__ two pair(int i, int k) const { return *(const two*)(m + i * P + k); }
};
template <int P> struct Scaled {
  const real *m, *by;
  __device__ __forceinline__ real one(int i, int k) const { return m[i * P + k] * by[k]; }
  __device__ __forceinline__ two pair(int i, int k) const {
    const two some = *(const two*)(m + i * P + k), its = *(const two*)(by + k);
    return {some.v[0] * its.v[0], some.v[1] * its.v[1]};
  }
};
template <int P> struct Across {
  const real* m;
  __device__ __forceinline__ real one(int i, int k) const { return m[k * P + i]; }
  __device__ __forceinline__ two pair(int i, int k) const { return {m[k * P + i], m[(k + 1) * P + i]}; }
};
template <int P> struct Both {
  const real* m;
  __device__ __forceinline__ real one(int i, int k) const { return m[i * P + k] + m[k * P + i]; }
  __device__ __forceinline__ two pair(int i, int k) const {
    const two some = *(const two*)(m + i * P + k);
    return {some.v[0] + m[k * P + i], some.v[1] + m[(k + 1) * P + i]};
  }
};

// A warp's 16 rows of a matrix of J columns, c[i][j] = sum_k a(i, k) b(j, k), in registers: pairs of neighbouring columns.
struct All {
  __device__ __forceinline__ bool operator()(int, int) const { return true; }
};
template <int J, bool = TENSOR> struct Strip;

template <int J> struct Strip<J, true> {
  static constexpr int TILES = up(J, 8) / 8;
  float main[TILES][4] = {}, rest[TILES][4] = {};

  template <class Right, class Wanted>
  __device__ __forceinline__ void step(const Rows16& left, const Right& b, int k, Wanted wanted) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < TILES; ++n)
      if (wanted(k, 8 * n)) {
        Rows8 right;
        const two its = b.pair(8 * n + g, k + 2 * t);
#pragma unroll
        for (int r = 0; r < 2; ++r) split((float)its.v[r], right.high[r], right.low[r]);
        multiply(rest[n], left.low, right.high);
        multiply(main[n], left.high, right.high);
        multiply(rest[n], left.high, right.low);
      }
  }
  // For the rows from i on, over k < K from `begin` on where `wanted(k, j)`, asked of eights, holds
  template <int K, class Left, class Right, class Wanted = All>
  __device__ __forceinline__ void add(int i, const Left& a, const Right& b, int begin = 0, Wanted wanted = Wanted()) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < K; k += 8)
      if (k >= begin) {
        Rows16 left;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const two its = a.pair(i + g + 8 * r, k + 2 * t);
          split((float)its.v[0], left.high[r], left.low[r]);
          split((float)its.v[1], left.high[r + 2], left.low[r + 2]);
        }
        step(left, b, k, wanted);
      }
    finish();
  }
  // The same with a strip on the left.
  template <int K, class Right> __device__ __forceinline__ void add(const Strip<K, true>& a, const Right& b) {
#pragma unroll
    for (int n = 0; n < Strip<K, true>::TILES; ++n) {
      Rows16 left;
#pragma unroll
      for (int r = 0; r < 4; ++r) split(a.main[n][r], left.high[r % 2 * 2 + r / 2], left.low[r % 2 * 2 + r / 2]);
      step(left, b, 8 * n, All());
    }
    finish();
  }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r) main[n][r] += rest[n][r];
  }
  // `each(i, j, c, d)`: those of the columns j and j + 1
  template <class Each> __device__ __forceinline__ void pairs(int i, Each each) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int r = 0; r < 4; r += 2) each(i + g + 4 * r, 8 * n + 2 * t, main[n][r], main[n][r + 1]);
  }
};

// In double two lanes have a row, of which each has every other pair.
template <int J> struct Strip<J, false> {
  static constexpr int PAIRS = up(J, 8) / 4;
  real c[PAIRS][2] = {};

  __device__ __forceinline__ static int column(int n) { return 4 * n + threadIdx.x % 32 / 16 * 2; }
  template <int K, class Left, class Right, class Wanted = All>
  __device__ __forceinline__ void add(int i, const Left& a, const Right& b, int begin = 0, Wanted wanted = Wanted()) {
#pragma unroll 1
    for (int k = begin; k < K; ++k) {
      const real left = a.one(i + threadIdx.x % 16, k);
#pragma unroll
      for (int n = 0; n < PAIRS; ++n)
        if (wanted(k / 8 * 8, n / 2 * 8))
#pragma unroll
          for (int r = 0; r < 2; ++r) c[n][r] += left * b.one(column(n) + r, k);
    }
  }
  template <int K, class Right> __device__ __forceinline__ void add(const Strip<K, false>& a, const Right& b) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const real left = __shfl_sync(EVERY_LANE, a.c[k / 4][k % 2], threadIdx.x % 16 + k / 2 % 2 * 16);
#pragma unroll
      for (int n = 0; n < PAIRS; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) c[n][r] += left * b.one(column(n) + r, k);
    }
  }
  template <class Each> __device__ __forceinline__ void pairs(int i, Each each) {
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) each(i + threadIdx.x % 16, column(n), c[n][0], c[n][1]);
  }
};
__device__ __forceinline__ void put_two(real* to, real a, real b) { *(two*)to = {a, b}; }

// --- what is given --------------------------------------------------------------------------------------------------

// The mixer's arguments of a row, from one on. There always is something to read, so that nothing waits for a branch.
struct Given {
  const said *own, *more;
  bool sees;

  __device__ __forceinline__ Given(const Told& of, i64 row, int begin)
      : own(of.mixer + row * of.stride + begin), more(own), sees(of.sees(of.at_mixer)) {
    if (sees) more = of.fed + row * of.width + of.at_mixer + begin;
  }
  __device__ __forceinline__ real operator()(int k) const {
    const real v = widen(own[k]), also = widen(more[k]);
    return sees ? v + also : v;
  }
};

// Where the entries of an upper triangle lie in a square, in bytes, one after the other.
template <int EDGE> struct Offsets {
  u16 at[triangle(EDGE)];
  __device__ constexpr Offsets() : at() {
    int n = 0;
    for (int i = 0; i < EDGE; ++i)
      for (int k = i; k < EDGE; ++k) at[n++] = (u16)((i * wide(EDGE) + k) * sizeof(real));
  }
};
template <int EDGE> __device__ constexpr Offsets<EDGE> OFFSETS = {};

// The entries by a warp, `each(slot, at)`: a lane has every 32nd; its arguments are in registers where they are few.
template <int EDGE> constexpr bool FEW = EDGE <= 32;
template <int EDGE> constexpr int SLOTS = FEW<EDGE> ? (triangle(EDGE) + 31) / 32 : 1;
template <int EDGE, class Each> __device__ __forceinline__ void entries(Each each) {
  // by a way that a compiler does not see through: it would keep all that follows from it until it comes here again
  const int lane = __shfl_sync(EVERY_LANE, (int)threadIdx.x % 32, threadIdx.x % 32);
  if constexpr (FEW<EDGE>) {
#pragma unroll
    for (int slot = 0; slot < SLOTS<EDGE>; ++slot)
      if (32 * slot + 32 <= triangle(EDGE) || 32 * slot + lane < triangle(EDGE)) each(slot, 32 * slot + lane);
  } else {
#pragma unroll 4
    for (int at = lane; at < triangle(EDGE); at += 32) each(0, at);
  }
}
template <int EDGE> __device__ __forceinline__ real& entry_of(real* m, int at) {
  return *(real*)((char*)m + OFFSETS<EDGE>.at[at]);
}
// The upper triangle in a square, zero below; slopes, where they can be kept.
template <int EDGE, bool SLOPES>
__device__ __forceinline__ void triangle_of(const Given& argument, real* m, real (&slopes)[SLOTS<EDGE>]) {
  const int lane = threadIdx.x % 32;
  real v[SLOTS<EDGE>];
  if constexpr (FEW<EDGE>) entries<EDGE>([&](int slot, int at) { v[slot] = argument(at); });
#pragma unroll
  for (int at = lane * PIECE; at < square(EDGE); at += 32 * PIECE) *(piece_of_row*)(m + at) = {};
  __syncwarp();
  entries<EDGE>([&](int slot, int at) {
    const real own = FEW<EDGE> ? v[slot] : argument(at);
    entry_of<EDGE>(m, at) = SLOPES ? shaped(own, slopes[slot]) : shaped(own);
  });
  __syncwarp();
}

// --- factors --------------------------------------------------------------------------------------------------------

// A lane's rows of a matrix, lane and lane + 32, in registers where they are short.
template <int EDGE> struct Rows {
  static constexpr int P = wide(EDGE), COUNT = (EDGE + 31) / 32, LONG = length(EDGE);
  static constexpr bool HELD = EDGE <= 32;
  real held[HELD ? LONG : 1];
  real* m;

  __device__ __forceinline__ static int index(int o) { return threadIdx.x % 32 + 32 * o; }
  __device__ __forceinline__ explicit Rows(real* from) : m(from) {
    if constexpr (HELD)
#pragma unroll
      for (int k = 0; k < LONG; k += PIECE) {
        const piece_of_row some = index(0) < EDGE ? *(const piece_of_row*)(m + index(0) * P + k) : piece_of_row{};
#pragma unroll
        for (int e = 0; e < PIECE; ++e) held[k + e] = some.v[e];
      }
  }
  __device__ __forceinline__ piece_of_row get(int o, int k) const {
    piece_of_row some = {};
    if constexpr (HELD) {
#pragma unroll
      for (int e = 0; e < PIECE; ++e) some.v[e] = held[k + e];
    } else if (index(o) < EDGE) {
      some = *(const piece_of_row*)(m + index(o) * P + k);
    }
    return some;
  }
  __device__ __forceinline__ void put(int o, int k, const piece_of_row& some) {
    if constexpr (HELD) {
#pragma unroll
      for (int e = 0; e < PIECE; ++e) held[k + e] = some.v[e];
    } else if (index(o) < EDGE) {
      *(piece_of_row*)(m + index(o) * P + k) = some;
    }
  }
  // Back to memory.
  __device__ __forceinline__ void leave() const {
    if constexpr (HELD)
      if (index(0) < EDGE)
#pragma unroll
        for (int k = 0; k < LONG; k += PIECE) *(piece_of_row*)(m + index(0) * P + k) = get(0, k);
  }
  // The sum of `other(k)`, pieces, times a row
  template <class Other> __device__ __forceinline__ real with(int o, Other other) const {
    real sums[PIECE] = {};
#pragma unroll
    for (int k = 0; k < LONG; k += PIECE) {
      const piece_of_row own = get(o, k), its = other(k);
#pragma unroll
      for (int e = 0; e < PIECE; ++e) sums[e] += own.v[e] * its.v[e];
    }
    real total = 0;
#pragma unroll
    for (int e = 0; e < PIECE; e += 2) total += sums[e] + sums[e + 1];
    return total;
  }
  __device__ __forceinline__ real times(int o, const real* vector) const {
    return with(o, [&](int k) { return *(const piece_of_row*)(vector + k); });
  }
};

// What is known of a factor beside M: of its rows s, v and o; the inverse lengths of r x_0 to r x_16, and the divisor; x_0 to x_16
// and r x_16, or two vectors that take turns where nothing is kept; where M is not in registers, cotangents of r x_0 to r x_16.
template <int EDGE, bool KEEP> struct Place {
  static constexpr int ROWS = rows_of(EDGE), LENGTHS = up(STEPS + 2, PIECE), P = pitch(EDGE);
  static constexpr int VECTORS = KEEP ? STEPS + 2 : 2, MORE = KEEP && EDGE > 32 ? STEPS + 1 : 0;
  static constexpr int SIZE = 3 * ROWS + LENGTHS + (VECTORS + MORE) * P;
  real *by, *inverse, *open, *lengths, *vectors;

  __device__ __forceinline__ explicit Place(real* at)
      : by(at), inverse(by + ROWS), open(inverse + ROWS), lengths(open + ROWS), vectors(lengths + LENGTHS) {}
  __device__ __forceinline__ real* vector(int l) const { return vectors + (KEEP ? l : l % 2) * P; }
};
constexpr real WIDEST = 1 / SHORTEST;

// M and what is known of it, by a warp.
template <int EDGE, bool KEEP>
__device__ __forceinline__ void make(const Given& entry, const Given& diagonal, real* m, const Place<EDGE, KEEP>& own, real start,
                                     real eps, real scale) {
  constexpr int P = wide(EDGE), COUNT = Rows<EDGE>::COUNT, STRIPS = rows_of(EDGE) / 16;
  const int lane = threadIdx.x % 32;
  real open[COUNT], none[SLOTS<EDGE>];
#pragma unroll
  for (int o = 0; o < COUNT; ++o) open[o] = lane + 32 * o < EDGE ? diagonal(lane + 32 * o) : (real)0;
  for (int at = lane * PIECE; at < own.SIZE; at += 32 * PIECE) *(piece_of_row*)(own.by + at) = {};
  triangle_of<EDGE, false>(entry, m, none);
  // U U^T in its place, strip by strip: those below do not look at what is written to the left of them
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
    Strip<EDGE> c;
    c.template add<EDGE>(16 * s, Along<P>{m}, Along<P>{m}, 16 * s, [=](int k, int j) { return j >= 16 * s && k >= j; });
    __syncwarp();
    c.pairs(16 * s, [&](int i, int j, real a, real b) {
      if (j >= 16 * s) put_two(m + i * P + j, a, b);
      if (j >= 16 * s + 16) {
        m[j * P + i] = a;
        m[(j + 1) * P + i] = b;
      }
    });
    __syncwarp();
  }
  const Rows<EDGE> rows(m);
  real inverse[COUNT], x[COUNT], before[COUNT] = {}, w[COUNT], divisor = 1;
#pragma unroll
  for (int o = 0; o < COUNT; ++o) {
    inverse[o] = 1 / larger(sqrt(rows.with(o, [&](int k) { return rows.get(o, k); })), eps);
    x[o] = start;
    if (lane + 32 * o < EDGE) own.vectors[lane + 32 * o] = start;
  }
  if constexpr (SPECTRAL) {
    real sigma;  // in the end x_15^T r x_16
#pragma unroll 1
    for (int l = 0; l <= STEPS; ++l) {
      __syncwarp();
      real squares = sigma = 0;
#pragma unroll
      for (int o = 0; o < COUNT; ++o) {
        w[o] = inverse[o] * rows.times(o, own.vector(l));
        if (EDGE % 32 != 0 && lane + 32 * o >= EDGE) w[o] = 0;
        squares += w[o] * w[o];
        sigma += before[o] * w[o];
      }
      squares = warp_total(squares);
      const real shorten = squares >= SHORTEST * SHORTEST ? root_below(squares) : WIDEST;
      if (KEEP && lane == 0) own.lengths[l] = shorten;
#pragma unroll
      for (int o = 0; o < COUNT; ++o) {
        before[o] = x[o];
        x[o] = w[o] * shorten;
        if (lane + 32 * o < EDGE) own.vector(l + 1)[lane + 32 * o] = l < STEPS ? x[o] : w[o];
      }
    }
    divisor = warp_total(sigma) + eps;
    __syncwarp();
  }
  const real whole = scale / divisor;
  if (KEEP && lane == 0) own.lengths[STEPS + 1] = divisor;
#pragma unroll
  for (int o = 0; o < COUNT; ++o)
    if (lane + 32 * o < EDGE) {
      const real its = opened(open[o]);
      own.by[lane + 32 * o] = whole * its * inverse[o];
      own.inverse[lane + 32 * o] = inverse[o];
      own.open[lane + 32 * o] = its;
    }
}

// The cotangents of a factor's arguments, by a warp, from those of K, with rows as r's and times s, in `bar`; both
// matrices are used up. With u_l = v w_l for the cotangent w_l of r x_l,
//
//     g = bar + sum_l u_l x_l^T,   M_bar = g - (g . r) r, row by row
template <int EDGE>
__device__ __forceinline__ void back(const Given& entry, real* m, real* bar, const Place<EDGE, true>& own, real eps,
                                     said* entry_bar, said* diagonal_bar) {
  typedef Rows<EDGE> Own;
  constexpr int P = wide(EDGE), L = pitch(EDGE), COUNT = Own::COUNT, LONG = Own::LONG, STRIPS = rows_of(EDGE) / 16;
  const int lane = threadIdx.x % 32;
  {
    const Own rows(m);
    real* const lefts = Own::HELD ? m : own.vector(STEPS + 2);
    real inverse[COUNT], left[COUNT] = {}, inner = 0;
#pragma unroll
    for (int o = 0; o < COUNT; ++o) {
      const int i = lane + 32 * o;
      const bool is = i < EDGE;
      const real total = rows.with(o, [&](int k) { return *(const piece_of_row*)(bar + (is ? i : 0) * P + k); });
      inverse[o] = is ? own.inverse[i] : (real)0;
      inner += total;
      if (is) diagonal_bar[i] = to_said(total * (1 - own.open[i]));
    }
    if constexpr (SPECTRAL) {
      __syncwarp();  // all have their rows of M
      // sigma = x_15^T r x_16, and x_{l+1} = r x_l / ||r x_l||, backwards
      const real sigma_bar = -warp_total(inner) / own.lengths[STEPS + 1];
      real x_bar[COUNT];
#pragma unroll
      for (int o = 0; o < COUNT; ++o) {
        const int i = lane + 32 * o;
        left[o] = i < EDGE ? inverse[o] * sigma_bar * own.vector(STEPS - 1)[i] : (real)0;
        if (i < LONG) lefts[STEPS * L + i] = left[o];
      }
#pragma unroll 1
      for (int l = STEPS - 1; l >= 0; --l) {
        __syncwarp();
        real next[COUNT], along = 0;
#pragma unroll
        for (int o = 0; o < COUNT; ++o) {
          const int i = lane + 32 * o;
          next[o] = i < EDGE ? own.vector(l + 1)[i] : (real)0;
          x_bar[o] = rows.times(o, lefts + (l + 1) * L);
          if (l == STEPS - 2 && i < EDGE) x_bar[o] += sigma_bar * own.vector(STEPS + 1)[i];
          along += x_bar[o] * next[o];
        }
        const real shorten = own.lengths[l];
        along = warp_total(along);
        if (!(shorten < WIDEST)) along = 0;
#pragma unroll
        for (int o = 0; o < COUNT; ++o) {
          const int i = lane + 32 * o;
          if (i < LONG) lefts[l * L + i] = (x_bar[o] - along * next[o]) * (shorten * inverse[o]);
        }
      }
      __syncwarp();
      // those with x_0 to x_15
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
        Strip<EDGE> c;
        c.template add<STEPS>(16 * s, Across<L>{lefts}, Across<L>{own.vectors});
        c.pairs(16 * s, [&](int i, int j, real a, real b) {
          if (EDGE % 16 == 0 || i < EDGE) {
            const two was = *(const two*)(bar + i * P + j);
            put_two(bar + i * P + j, was.v[0] + a, was.v[1] + b);
          }
        });
      }
      __syncwarp();
    }
    Own bars(bar);
#pragma unroll
    for (int o = 0; o < COUNT; ++o) {
      if constexpr (SPECTRAL)
#pragma unroll
        for (int k = 0; k < LONG; k += PIECE) {
          piece_of_row some = bars.get(o, k);
          const piece_of_row its = *(const piece_of_row*)(own.vector(STEPS) + k);
#pragma unroll
          for (int e = 0; e < PIECE; ++e) some.v[e] += left[o] * its.v[e];
          bars.put(o, k, some);
        }
      // with r as it is, whose rows of a single number are to be rid of it
      auto unit = [&](int k) {
        piece_of_row some = rows.get(o, k);
#pragma unroll
        for (int e = 0; e < PIECE; ++e) some.v[e] *= inverse[o];
        return some;
      };
      real along = bars.with(o, unit);
      if (!(inverse[o] * eps < 1)) along = 0;
#pragma unroll
      for (int k = 0; k < LONG; k += PIECE) {
        piece_of_row some = bars.get(o, k);
        const piece_of_row its = unit(k);
#pragma unroll
        for (int e = 0; e < PIECE; ++e) some.v[e] -= along * its.v[e];
        bars.put(o, k, some);
      }
    }
    bars.leave();
  }
  __syncwarp();
  // the upper triangle of (M_bar + M_bar^T) U in the place of M_bar: strips above do not look at what those below wrote
  real slopes[SLOTS<EDGE>];
  triangle_of<EDGE, FEW<EDGE>>(entry, m, slopes);
#pragma unroll
  for (int s = STRIPS - 1; s >= 0; --s) {
    Strip<EDGE> c;
    c.template add<EDGE>(16 * s, Both<P>{bar}, Across<P>{m}, 0, [=](int k, int j) { return j >= 16 * s && k <= j; });
    __syncwarp();
    c.pairs(16 * s, [&](int i, int j, real a, real b) {
      if (j >= 16 * s) put_two(bar + i * P + j, a, b);
    });
  }
  __syncwarp();
  entries<EDGE>([&](int slot, int at) {
    real slope;
    if constexpr (FEW<EDGE>)
      slope = slopes[slot];
    else
      shaped(entry(at), slope);
    entry_bar[at] = to_said(slope * entry_of<EDGE>(bar, at));
  });
}

// By the warps 0 and 1, each with a place for its own: `each(Edge, which)`.
template <int EDGE> struct Edge { static constexpr int SIZE = EDGE; };
template <class Each> __device__ __forceinline__ void factors(Each each) {
  const int warp = threadIdx.x / 32;
  if constexpr (EDGE1 == EDGE2) {  // the same code
    if (warp < 2) each(Edge<EDGE1>(), warp == 1);
  } else {
    if (warp == 0) each(Edge<EDGE1>(), false);
    if (warp == 1) each(Edge<EDGE2>(), true);
  }
}

// --- rows -----------------------------------------------------------------------------------------------------------

constexpr int P1 = wide(EDGE1), P2 = wide(EDGE2), ACROSS = pitch(EDGE2), FLAT = matrix(EDGE1, EDGE2);

// A row of channels, or a difference of two, as a matrix that has zeros around.
__device__ __forceinline__ void fetch(const store* x, const store* y, real* to) {
  constexpr int EACH = EDGE2 % PIECE ? 1 : PIECE, ROUND = THREADS * EACH, DEPTH = 4;
  typedef Pack<store, EACH> some;
#pragma unroll 1
  for (int begin = threadIdx.x * EACH; begin < D; begin += DEPTH * ROUND) {
    some own[DEPTH], was[DEPTH] = {};
#pragma unroll
    for (int r = 0; r < DEPTH; ++r)
      if (D % (DEPTH * ROUND) == 0 || begin + r * ROUND < D) own[r] = *(const some*)(x + begin + r * ROUND);
    if (y)
#pragma unroll
      for (int r = 0; r < DEPTH; ++r)
        if (D % (DEPTH * ROUND) == 0 || begin + r * ROUND < D) was[r] = *(const some*)(y + begin + r * ROUND);
#pragma unroll
    for (int r = 0; r < DEPTH; ++r) {
      const int at = begin + r * ROUND;
      if (D % (DEPTH * ROUND) == 0 || at < D) {
        Pack<real, EACH> gap;
#pragma unroll
        for (int e = 0; e < EACH; ++e) gap.v[e] = widen(own[r].v[e]) - widen(was[r].v[e]);
        *(Pack<real, EACH>*)(to + at / EDGE2 * ACROSS + at % EDGE2) = gap;
      }
    }
  }
}
__device__ __forceinline__ void clear(real* m, int numbers) {
  if constexpr (EDGE1 % 16 != 0 || EDGE2 % 16 != 0) {
    for (int at = threadIdx.x; at < numbers; at += THREADS) m[at] = 0;
    __syncthreads();
  }
}
// A pair of channels of a strip to memory.
__device__ __forceinline__ void put_channels(store* to, int i, int j, real a, real b) {
  if (!inside(i, j)) return;
  if constexpr (EDGE2 % 2 == 0) {
    *(Pack<store, 2>*)(to + i * EDGE2 + j) = {narrow(a), narrow(b)};
  } else {
    to[i * EDGE2 + j] = narrow(a);
    if (j + 1 < EDGE2) to[i * EDGE2 + j + 1] = narrow(b);
  }
}

// mixer (rows, stride) of triangles and diagonals, b and c (rows, N), `fed` (rows, width) or null, x, y, mixed (rows, D), y null
// for zero; B, C (rows, N). A block a row.
// Shared memory: M1, M2, D, and of both factors `Place`.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
kronecker_mix_rows(const said* mixer, const store* b, const store* c_, const said* fed, int width, int stride, int at_mixer,
                   int at_b, int at_c, const store* x, const store* y, i64 rows, int size, double start, double unit_eps,
                   double alpha_max, double bc_eps, store* mixed, store* B, store* C) {
  SHARED(memory);
  real *m1 = (real*)memory, *m2 = m1 + square(EDGE1), *gap = m2 + square(EDGE2), *own1 = gap + FLAT;
  real* own2 = own1 + Place<EDGE1, false>::SIZE;
  const i64 row = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Told of = {mixer, b, c_, fed, width, stride, at_mixer, at_b, at_c};
  clear(gap, FLAT);
  fetch(x + row * D, y ? y + row * D : nullptr, gap);
  for (int which = warp; which < 2; which += WARPS) {
    real total = 0;
#pragma unroll 1
    for (int n = lane; n < size; n += 32) {
      const real part = of.of_row(which, row, size, n);
      total += part * part;
    }
    const real unit = bc_eps < 0 ? (real)1 : 1 / larger(sqrt(warp_total(total)), (real)bc_eps);
#pragma unroll 1
    for (int n = lane; n < size; n += 32) (which ? C : B)[row * size + n] = narrow(of.of_row(which, row, size, n) * unit);
  }
  factors([&](auto edge, bool second) {
    constexpr int EDGE = decltype(edge)::SIZE;
    const Given entry(of, row, second ? triangle(EDGE1) : 0), diagonal(of, row, second ? ENTRIES + EDGE1 : ENTRIES);
    make(entry, diagonal, second ? m2 : m1, Place<EDGE, false>(second ? own2 : own1), (real)start, (real)unit_eps,
         second ? (real)1 : (real)alpha_max);
  });
  __syncthreads();
  const int i0 = 16 * warp;
  if (i0 < EDGE1) {
    const real *by1 = own1, *by2 = own2;
    Strip<EDGE2> first, second;
    first.template add<EDGE1>(i0, Scaled<P1>{m1, by1}, Across<ACROSS>{gap});
    second.add(first, Along<P2>{m2});
    __syncwarp();  // x is not wanted before
    const store* from = x + row * D;
    second.pairs(i0, [&](int i, int j, real c, real d) {
      if (inside(i, j)) {
        const real own = widen(from[i * EDGE2 + j]), next = j + 1 < EDGE2 ? widen(from[i * EDGE2 + j + 1]) : (real)0;
        put_channels(mixed + row * D, i, j, own - by2[j] * c, next - by2[j + 1] * d);
      }
    });
  }
}

// mixed_bar (rows, D), B_bar and C_bar (rows, N) to the cotangents of x, and to those of all arguments in one: told_bar (rows,
// told) has them from `to_mixer` on, stride of them, from `to_b` on and from `to_c` on.
// Shared memory: M1, M2; D, and E, then F, or the cotangents of both factors in their places; of both factors `Place`.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
kronecker_mix_rows_vjp(const said* mixer, const store* b, const store* c_, const said* fed, int width, int stride, int at_mixer,
                       int at_b, int at_c, const store* x, const store* y, i64 rows, int size, double start, double unit_eps,
                       double alpha_max, double bc_eps, const store* mixed_bar, const store* B_bar, const store* C_bar,
                       store* x_bar, said* told_bar, int told, int to_mixer, int to_b, int to_c) {
  SHARED(memory);
  real *m1 = (real*)memory, *m2 = m1 + square(EDGE1), *gap = m2 + square(EDGE2), *bar = gap + longer(FLAT, square(EDGE1));
  real *own1 = bar + longer(FLAT, square(EDGE2)), *own2 = own1 + Place<EDGE1, true>::SIZE;
  const i64 row = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Told of = {mixer, b, c_, fed, width, stride, at_mixer, at_b, at_c};
  said* const out = told_bar + row * told;
  clear(gap, (int)(own1 - gap));
  fetch(x + row * D, y ? y + row * D : nullptr, gap);
  fetch(mixed_bar + row * D, nullptr, bar);
  for (int which = warp; which < 2; which += WARPS) {
    const store* its_bar = which ? C_bar : B_bar;
    real total = 0, along = 0;
#pragma unroll 1
    for (int n = lane; n < size; n += 32) {
      const real v = of.of_row(which, row, size, n);
      total += v * v;
      along += v * widen(its_bar[row * size + n]);
    }
    const real its = sqrt(warp_total(total)), unit = bc_eps < 0 ? (real)1 : 1 / larger(its, (real)bc_eps);
    along = warp_total(along) * unit;
    if (bc_eps < 0 || its < (real)bc_eps) along = 0;
#pragma unroll 1
    for (int n = lane; n < size; n += 32) {
      const real v = of.of_row(which, row, size, n) * unit;
      out[(which ? to_c : to_b) + n] = to_said((widen(its_bar[row * size + n]) - along * v) * unit);
    }
  }
  for (int k = OUTPUTS + threadIdx.x; k < stride; k += THREADS) out[to_mixer + k] = to_said(0);  // what is there to fill up
  factors([&](auto edge, bool second) {
    constexpr int EDGE = decltype(edge)::SIZE;
    const Given entry(of, row, second ? triangle(EDGE1) : 0), diagonal(of, row, second ? ENTRIES + EDGE1 : ENTRIES);
    make(entry, diagonal, second ? m2 : m1, Place<EDGE, true>(second ? own2 : own1), (real)start, (real)unit_eps,
         second ? (real)1 : (real)alpha_max);
  });
  __syncthreads();
  const int i0 = 16 * warp;
  const real *by1 = own1, *by2 = own2;
  Strip<EDGE1> bar1;
  Strip<EDGE2> middle, bar2;
  if (i0 < EDGE1) {
    Strip<EDGE2> first;
    first.template add<EDGE2>(i0, Along<ACROSS>{gap}, Along<P2>{m2});
    first.pairs(i0, [&](int, int j, real& c, real& d) {
      c *= -by2[j];
      d *= -by2[j + 1];
    });
    bar1.add(first, Along<ACROSS>{bar});
    bar1.pairs(i0, [&](int i, int, real& c, real& d) {
      const real its = by1[i];
      c *= its;
      d *= its;
    });
  }
  __syncwarp();  // nothing of the products before is kept in registers for those that follow
  if (i0 < EDGE1) {
    Strip<EDGE2> scaled, second;
    middle.template add<EDGE1>(i0, Along<P1>{m1}, Across<ACROSS>{bar});
    middle.pairs(i0, [&](int i, int, real& c, real& d) {
      const real its = by1[i];
      c *= its;
      d *= its;
    });
    scaled = middle;
    scaled.pairs(i0, [&](int, int j, real& c, real& d) {
      c *= by2[j];
      d *= by2[j + 1];
    });
    second.add(scaled, Along<P2>{m2});
    second.pairs(i0, [&](int i, int j, real c, real d) {
      put_channels(x_bar + row * D, i, j, bar[i * ACROSS + j] - c, bar[i * ACROSS + j + 1] - d);
    });
  }
  __syncthreads();
  if (i0 < EDGE1)
    middle.pairs(i0, [&](int i, int j, real c, real d) {
      if (EDGE1 % 16 == 0 || i < EDGE1) put_two(bar + i * ACROSS + j, c, d);
    });
  __syncthreads();
  if (i0 < EDGE2) {
    bar2.template add<EDGE1>(i0, Across<ACROSS>{bar}, Across<ACROSS>{gap});
    bar2.pairs(i0, [&](int i, int, real& c, real& d) {
      const real its = -by2[i];
      c *= its;
      d *= its;
    });
  }
  __syncthreads();
  if (i0 < EDGE1) bar1.pairs(i0, [&](int i, int j, real c, real d) { put_two(gap + i * P1 + j, c, d); });
  if (i0 < EDGE2) bar2.pairs(i0, [&](int i, int j, real c, real d) { put_two(bar + i * P2 + j, c, d); });
  __syncthreads();
  factors([&](auto edge, bool second) {
    constexpr int EDGE = decltype(edge)::SIZE;
    const int entries_at = second ? triangle(EDGE1) : 0, diagonal_at = second ? ENTRIES + EDGE1 : ENTRIES;
    const Given entry(of, row, entries_at);
    back(entry, second ? m2 : m1, second ? bar : gap, Place<EDGE, true>(second ? own2 : own1), (real)unit_eps,
         out + to_mixer + entries_at, out + to_mixer + diagonal_at);
  });
}
