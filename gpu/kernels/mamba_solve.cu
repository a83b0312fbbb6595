// FP-Mamba with a mixer of low rank, step after step; (M) of section 5 of docs/mathematics.md, see mamba.cuh.
//
//     u_t = Q_t (x_t - y_t) + y_t,   H_t = exp(delta_t A) * H_{t-1} + (delta_t u_t) B_t^T,
//     y_t = norm(gate_t (H_t C_t + D u_t))
//
// One block per sequence. Memory traffic of a step: its rows and u once (u again from the caches), the state read and
// written once; twice, from the caches, where it is too much to be held in registers meanwhile.
#include "mamba.cuh"

constexpr bool HOLD = OWN * VECTOR * (int)sizeof(real) * RESIDENT <= 128;

// With more numbers than one: once a step has been iterated so near to its end that the geometric series has less than
// this of its size left, Newton's method may take over, and may not go much further: there may be other solutions.
constexpr real NEAR = (real)1e-3;
// An iteration that goes back and forth, so many times without getting closer, is damped by half.
constexpr int PATIENCE = 4;
// With one number: so many iterations at most follow the map's shape.
constexpr int BOLD = 24;

struct Small {
  real e[R], f[R], pq[R], qq[PAIRS], G[R][R], pp, eps;

  // One application, as seen by the RANK numbers; returns 1 / sqrt(.).
  __device__ __forceinline__ real map(const real (&tau)[R], real (&out)[R]) const {
    real inverse = 1;
    if constexpr (MODE != 0) {
      real var = pp + eps;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        var += 2 * pq[i] * tau[i];
#pragma unroll
        for (int j = 0; j < R; ++j) var += tau[i] * qq[pair(i, j)] * tau[j];
      }
      inverse = var != var ? var : inverse_root(var > eps ? var : eps);
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
      real total = e[i];
#pragma unroll
      for (int j = 0; j < R; ++j) total += G[i][j] * tau[j];
      out[i] = total * inverse + f[i];
    }
    return inverse;
  }
  // With RANK 1: the derivative of `map`, (a + b tau) / var^(3/2), and where it is zero or its own derivative is.
  __device__ __forceinline__ real slope(real tau, real inverse) const {
    if (MODE == 0) return G[0][0];
    const real a = G[0][0] * (pp + eps) - e[0] * pq[0], b = G[0][0] * pq[0] - e[0] * qq[0];
    return (a + b * tau) * inverse * inverse * inverse;
  }
  __device__ __forceinline__ void turns(real (&tau)[3]) const {
    tau[0] = tau[1] = tau[2] = 0;
    if (MODE == 0) return;
    const real var = pp + eps, a = G[0][0] * var - e[0] * pq[0], b = G[0][0] * pq[0] - e[0] * qq[0];
    const real second = -2 * b * qq[0], first = -(b * pq[0] + 3 * a * qq[0]), none = b * var - 3 * a * pq[0];
    const real inside = first * first - 4 * second * none;
    if (b != 0) tau[0] = -a / b;
    if (inside >= 0) {
      const real z = (real)-0.5 * (first + (first < 0 ? -sqrt(inside) : sqrt(inside)));
      if (second != 0) tau[1] = z / second;
      if (z != 0) tau[2] = none / z;
    }
  }
  // How far rounding alone may move what `map` gives.
  __device__ __forceinline__ real noise(const real (&tau)[R], real inverse) const {
    real largest = 0;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      real total = magnitude(e[i]);
#pragma unroll
      for (int j = 0; j < R; ++j) total += magnitude(G[i][j] * tau[j]);
      largest = larger(largest, total * inverse + magnitude(f[i]));
    }
    return 4 * EPS * largest;
  }
};

// From sigma = 0; `xi` is U x. Leaves tau; returns the number of iterations.
__device__ __noinline__ i64 iterate_small(const Small& of, const real (&S)[R][R], const real (&xi)[R], real tolerance,
                                          i64 max_iter, real damping, real (&tau)[R]) {
  real sigma[R], shifted[R], next[R], past[R] = {}, before = LARGEST, ratio = LARGEST, last = LARGEST;
  bool known = false;
  int swings = 0;
  auto move = [&](const real(&from)[R], real(&to)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) shifted[i] = from[i] - xi[i];
    times(S, shifted, to);
  };
  real bends[3] = {};
  if (R == 1) {
    of.turns(bends);
    for (int k = 0; k < 3; ++k) bends[k] = MODE && S[0][0] != 0 && is_finite(bends[k]) ? bends[k] / S[0][0] + xi[0] : (real)0;
  }
#pragma unroll
  for (int i = 0; i < R; ++i) sigma[i] = 0;
  move(sigma, tau);
  real inverse = of.map(tau, next);
  for (i64 count = 1;; ++count) {
    real moved = 0, size = 0, back = 0;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      back += past[i] * (next[i] - sigma[i]);
      past[i] = next[i] - sigma[i];
      moved = most(moved, magnitude(next[i] - sigma[i]));
      size = larger(size, larger(magnitude(next[i]), magnitude(sigma[i])));
    }
    const real floor = of.noise(tau, inverse);
    const bool done = moved <= larger(tolerance * size, floor) || count >= max_iter || !is_finite(moved);
    if (known) {
      last = ratio;
      ratio = moved / before;
    } else {
      last = ratio;
    }
    known = true;
    before = moved;
    if (back < 0 && ratio > (real)0.98 && ++swings == PATIENCE) {
      damping /= 2;
      swings = 0;
    }
    if constexpr (R == 1) {
      const real slope = of.slope(tau[0], inverse) * S[0][0], gap = 1 - slope, ahead = next[0] - sigma[0];
      const bool turns = (bends[0] - sigma[0]) * (bends[0] - next[0]) <= 0;
      if (!done && count <= BOLD && (slope >= 0 || (!turns && (slope > -1 || swings > 1 || damping < 1)))) {
        // Where the map grows, its iterates go towards the nearest fixed point that way; where it falls up to its next
        // value, there is one between. Newton's step, or one to where the map bends or turns if that is nearer, passes that
        // one and no other. With no bend ahead there is exactly one, however far.
        real far = slope < 1 ? magnitude(ahead) / gap : LARGEST;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          const real there = (bends[k] - sigma[0]) * (ahead > 0 ? (real)1 : (real)-1);
          if (there > (real)1e-4 * larger(size, magnitude(bends[k])) && there < far) far = there;
        }
        if (far == LARGEST) far = 8 * larger(magnitude(ahead), size);
        sigma[0] += ahead > 0 ? far : -far;
        move(sigma, tau);
        inverse = of.map(tau, next);
        known = false;
        past[0] = 0;
        continue;
      }
      // Newton's method, where the slope hardly changes on the way (Kantorovich: there is one solution nearby) and the
      // iteration would go there as well
      if (!done && magnitude(1 - damping * gap) < 1) {
        real jump[R] = {sigma[0] + ahead / gap}, there[R], reached[R];
        move(jump, reached);
        const real then = of.map(reached, there), gap_there = 1 - of.slope(reached[0], then) * S[0][0];
        if (magnitude(gap_there - gap) <= (real)0.5 * magnitude(gap) &&
            magnitude(there[0] - jump[0]) < (real)0.5 * moved) {
          sigma[0] = jump[0];
          next[0] = there[0];
          tau[0] = reached[0];
          inverse = then;
          known = false;
          continue;
        }
      }
    } else if (!done && ratio < 1 && last < 1 && moved <= NEAR * (1 - ratio) * size) {
      // (I - F' S) jump = next - sigma
      real jump[R], along[R], m[R][R], slope[R], far = 0;
#pragma unroll
      for (int k = 0; k < R; ++k) {
        along[k] = (next[k] - of.f[k]) * inverse * inverse;
        jump[k] = next[k] - sigma[k];
        slope[k] = of.pq[k];
#pragma unroll
        for (int l = 0; l < R; ++l) slope[k] += of.qq[pair(k, l)] * tau[l];
      }
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < R; ++j) {
          real total = 0;
#pragma unroll
          for (int k = 0; k < R; ++k) total += (of.G[i][k] * inverse - (MODE ? along[i] * slope[k] : 0)) * S[k][j];
          m[i][j] = (i == j) - total;
        }
      eliminate(m, jump);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        far = most(far, magnitude(jump[i]));
        jump[i] += sigma[i];
      }
      if (far <= 2 * NEAR * size) {
        real there[R], reached[R], left = 0;
        move(jump, reached);
        const real ahead = of.map(reached, there);
#pragma unroll
        for (int i = 0; i < R; ++i) left = most(left, magnitude(there[i] - jump[i]));
        if (left < (real)0.5 * moved) {
#pragma unroll
          for (int i = 0; i < R; ++i) {
            sigma[i] = jump[i];
            next[i] = there[i];
            tau[i] = reached[i];
          }
          inverse = ahead;
          known = false;
          continue;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < R; ++i) sigma[i] = done ? next[i] : sigma[i] + damping * (next[i] - sigma[i]);
    move(sigma, tau);
    if (done) return count;
    inverse = of.map(tau, next);
  }
}

// u (B, T, R, D), alpha (B, T, R); x, gate, y (B, T, D); delta (B, T, D) or (B, T, heads); A (D, N) or (heads); B, C (B, T,
// N); skip, weight, bias (D), bias null for zero; before (B, D, N) is the state before step `from`, and state will be that
// before `to`, in place if they are the same; iterations, residual and met (B) are of all steps so far. MADE: the mixer, B and C are written, and
// arguments (B, T, R D) before their activation, norms (B, T, R + 2) of them, of b and of c, and seen (B, T, D), what the
// decayed state says, unless these are null.
// Shared memory: 2 STATES, then 2 R + 4, then 2 a warp, then the sums of both rounds and of R more, then one a channel.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
mamba_solve(store* u, store* alpha, const store* x, const store* delta, const store* A, store* B, store* C,
            const store* skip, const store* gate, const store* weight, const store* bias, const store* before, store* state,
            store* y, i64 steps, i64 from, i64 to, int dim, int size, int heads, double eps, double rtol, double atol, i64 max_iter,
            double damping, i64* iterations, double* residual, unsigned char* met, const store* mixer_arguments,
            const store* b_arguments, const store* c_arguments, const store* fed, int width, int stride, int at_mixer, int at_b,
            int at_c, double alpha_max, double unit_eps, double bc_eps, store* arguments, store* norms,
            store* seen) {
  constexpr int FIRST = 1 + 3 * R + GRAM, SECOND = 1 + 2 * R + PAIRS + R * R;
  if constexpr (FULL) size = STATES;  // the compiler is to know
  SHARED(memory);
  real *rowB = (real*)memory, *rowC = rowB + STATES, *told = rowC + STATES, *room = told + 2 * R + 4;
  real *first = room + 2 * (THREADS / 32), *second = first + sums_size<FIRST, THREADS>();
  real *lengths = second + sums_size<SECOND, THREADS>(), *exchange = lengths + sums_size<R, THREADS>();
  const i64 b = blockIdx.x;
  const real channels = (real)dim;
  i64 worst = from ? iterations[b] : 0;
  real left = from ? (real)residual[b] : (real)0;
  bool fine = from ? met[b] : true;
  for (int n = size + threadIdx.x; n < STATES; n += THREADS) rowB[n] = rowC[n] = 0;
  __syncthreads();  // thread 0 will overwrite them
  for (i64 t = from; t < to; ++t) {
    const i64 row = b * steps + t;
    const Inputs in = {u + row * R * dim, x + row * dim, delta + row * (HEADS ? heads : dim), A,
                       GATED ? gate + row * dim : nullptr, dim, size, heads};
    if constexpr (MADE) {
      const Arguments of = {mixer_arguments, b_arguments, c_arguments, fed, width, stride, at_mixer, at_b, at_c};
      real squares[R] = {}, made[CHANNELS][R];
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        const int d = c * THREADS + threadIdx.x;
#pragma unroll
        for (int i = 0; i < R; ++i) {
          made[c][i] = 0;
          if (d < dim) {
            const real argument = of.from(of.mixer, row, stride, of.at_mixer, b, i * dim + d);
            if (arguments) arguments[(row * R + i) * dim + d] = narrow(argument);
            made[c][i] = activate(argument);
            squares[i] += made[c][i] * made[c][i];
          }
        }
      }
      const real* sums = group_sums<R, THREADS>(squares, lengths);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const real length = sqrt(sums[i]), inverse = 1 / larger(length, (real)unit_eps);
        if (norms && threadIdx.x == 0) norms[row * (R + 2) + i] = narrow(length);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) {
          const int d = c * THREADS + threadIdx.x;
          if (d < dim) u[(row * R + i) * dim + d] = narrow(made[c][i] * inverse);
        }
      }
      if (threadIdx.x < R) {
        const real argument = of.from(of.mixer, row, stride, of.at_mixer, b, R * dim + threadIdx.x);
        alpha[row * R + threadIdx.x] = narrow((real)alpha_max * sigmoid(argument));
      }
      const int lane = threadIdx.x % 32;
      for (int which = threadIdx.x / 32; which < 2; which += THREADS / 32) {
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
        if (norms && lane == 0) norms[row * (R + 2) + R + which] = narrow(length);
        for (int n = lane; n < size; n += 32) {
          to_row[n] *= inverse;
          to_memory[row * size + n] = narrow(to_row[n]);
        }
      }
    } else {
      for (int n = threadIdx.x; n < size; n += THREADS) {
        rowB[n] = widen(B[row * size + n]);
        rowC[n] = widen(C[row * size + n]);
      }
    }
    __syncthreads();
    real bc = 0;
#pragma unroll
    for (int n = 0; n < STATES; ++n) bc += rowB[n] * rowC[n];
    // the state before the step, decayed, and what it says of each channel
    real held[HOLD ? OWN : 1][VECTOR];
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      const int d = pass_channel(pass);
      real r = 0;
      if (d < dim) {
        const real dt = in.step(d);
        const store* was = (t == from ? before : state) + (b * dim + d) * size;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
          const int n = piece_begin(piece);
          real(&now)[VECTOR] = held[HOLD ? pass * PIECES + piece : 0];
          real rate[VECTOR], decay[VECTOR];
          load_part(was, size, n, now);
          in.decays(d, dt, n, rate, decay);
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) {
            now[k] *= decay[k];
            r += now[k] * rowC[n + k];
          }
        }
      }
      r = lanes_total(r);
      if (threadIdx.x % LANES == 0 && d < dim) exchange[d] = r;
    }
    __syncthreads();
    real p[CHANNELS], gw[CHANNELS], s1[FIRST] = {}, s2[SECOND] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      p[c] = gw[c] = 0;
      if (d < dim) {
        const real dt = in.step(d), w = dt * bc + widen(skip[d]), xd = widen(in.x[d]), g = in.opening(d), r = exchange[d];
        if (MADE && seen) seen[row * dim + d] = narrow(r);
        gw[c] = g * w;
        p[c] = g * (r + w * xd);
        const real shift = bias ? widen(bias[d]) : (real)0;
        s1[0] += p[c];
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const real ui = in.vector(i, d);
          s1[1 + i] += gw[c] * ui;
          s1[1 + R + i] += ui * shift;
          s1[1 + 2 * R + i] += ui * xd;
          if constexpr (PRODUCT)
#pragma unroll
            for (int k = 0; k < i; ++k) s1[1 + 3 * R + below(i, k)] += ui * in.vector(k, d);
        }
      }
    }
    const real* sums = group_sums<FIRST, THREADS>(s1, first);
    const real mp = MODE == 2 ? sums[0] / channels : (real)0;
    real mq[R];
#pragma unroll
    for (int i = 0; i < R; ++i) mq[i] = MODE == 2 ? sums[1 + i] / channels : (real)0;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      if (d < dim) {
        const real own = p[c] - mp, wt = widen(weight[d]);
        real q[R];
#pragma unroll
        for (int i = 0; i < R; ++i) q[i] = gw[c] * in.vector(i, d) - mq[i];
        s2[0] += own * own;
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const real uw = in.vector(i, d) * wt;
          s2[1 + i] += own * q[i];
          s2[1 + R + i] += uw * own;
#pragma unroll
          for (int k = 0; k <= i; ++k) s2[1 + 2 * R + pair(i, k)] += q[i] * q[k];
#pragma unroll
          for (int k = 0; k < R; ++k) s2[1 + 2 * R + PAIRS + i * R + k] += uw * q[k];
        }
      }
    }
    const real* more = group_sums<SECOND, THREADS>(s2, second);
    if (threadIdx.x < 32) {
      Small of;
      real S[R][R], xi[R], tau[R], next[R], shifted[R], later[R];
      of.pp = more[0] / channels;
      of.eps = (real)eps;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        of.f[i] = sums[1 + R + i];
        xi[i] = sums[1 + 2 * R + i];
        of.pq[i] = more[1 + i] / channels;
        of.e[i] = more[1 + R + i];
#pragma unroll
        for (int k = 0; k < R; ++k) of.G[i][k] = more[1 + 2 * R + PAIRS + i * R + k];
      }
#pragma unroll
      for (int k = 0; k < PAIRS; ++k) of.qq[k] = more[1 + 2 * R + k] / channels;
      strengths(sums + 1 + 3 * R, alpha + row * R, S);
      const real tight = larger((real)(1e-2 * rtol), 4 * EPS);
      const i64 count = iterate_small(of, S, xi, tight, max_iter, (real)damping, tau);
      worst = count > worst ? count : worst;
      const real inverse = of.map(tau, next);
#pragma unroll
      for (int i = 0; i < R; ++i) shifted[i] = next[i] - xi[i];
      times(S, shifted, later);
      const real ahead = of.map(later, shifted);
      if (threadIdx.x == 0) {
        real middle = mp, middle_later = mp;
#pragma unroll
        for (int i = 0; i < R; ++i) {
          told[i] = tau[i];
          told[R + i] = later[i];
          middle += mq[i] * tau[i];
          middle_later += mq[i] * later[i];
        }
        told[2 * R] = inverse;
        told[2 * R + 1] = ahead;
        told[2 * R + 2] = middle;
        told[2 * R + 3] = middle_later;
      }
    }
    __syncthreads();
    // y, how far one more application would move it, and the state
    real far = 0, top = 0;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int d = c * THREADS + threadIdx.x;
      if (d < dim) {
        real here = p[c], then = p[c], mixed = widen(in.x[d]);
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const real ui = in.vector(i, d);
          here += told[i] * gw[c] * ui;
          then += told[R + i] * gw[c] * ui;
          mixed += told[R + i] * ui;
        }
        const real wt = widen(weight[d]), shift = bias ? widen(bias[d]) : (real)0;
        const real value = wt * ((here - told[2 * R + 2]) * told[2 * R]) + shift;
        const real other = wt * ((then - told[2 * R + 3]) * told[2 * R + 1]) + shift;
        far = most(far, magnitude(other - value));
        top = most(top, magnitude(value));
        y[row * dim + d] = narrow(value);
        exchange[d] = in.step(d) * mixed;
      }
    }
    block_most(far, top, room);
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
      const int d = pass_channel(pass);
      if (d < dim) {
        const real drive = exchange[d];
        store* h = state + (b * dim + d) * size;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
          const int n = piece_begin(piece);
          real(&now)[VECTOR] = held[HOLD ? pass * PIECES + piece : 0];
          if constexpr (!HOLD) {
            real rate[VECTOR], decay[VECTOR];
            load_part((t == from ? before : state) + (b * dim + d) * size, size, n, now);
            in.decays(d, in.step(d), n, rate, decay);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) now[k] *= decay[k];
          }
#pragma unroll
          for (int k = 0; k < VECTOR; ++k) now[k] += drive * rowB[n + k];
          store_part(h, size, n, now);
        }
      }
    }
    if (t + 1 < to) __syncthreads();
    const real allowed = larger((real)(atol + rtol * (double)top), 8 * EPS * top);
    if (!(far <= allowed) || !is_finite(top)) fine = false;
    left = most(left, far / larger(top, (real)1e-30));
  }
  if (threadIdx.x == 0) {
    iterations[b] = worst;
    residual[b] = left;
    met[b] = fine;
  }
}
