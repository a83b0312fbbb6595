// The fixed point of (F) and its adjoint where a product of matrices does the mixing: everything but that product;
// sections 3, 6 and 7 of docs/mathematics.md.
//
//   forward    d = x - h,     f_t = lam_t f_{t-1} + g_t (h_t + (Q d)_t)
//   ADJOINT    e = g s,       f_t = hbar_t + (e_t - (Q^T e)_t) + lam_{t+1} f_{t+1},   time reversed
//
// An iteration of all sequences at once is a product, d to Q d, and a scan, which replaces h by f (or goes a part of the
// way there) and leaves the next d. Sequences go through their chunks of time independently: each is at its own chunk
// number done[b], and when an iteration meets the tolerance, the last block of the sequence moves it on to the next.
// A sequence that has no more chunks rests, and its values are left alone. No iteration asks the host for anything:
// `remaining` counts the sequences that still move.
//
// Tile: one thread per channel walks the steps of the chunk, with AHEAD steps of its inputs loaded at once. The sizes
// that the stopping rule wants are maxima, which are the same in whatever order they are taken.
//
// Traffic of an iteration, beside that of the product: lam, source (and the gate), h and Q d read once, h and d written
// once.
//
// ONCE is a single iteration of a whole sequence from and to storage, without a stopping rule.
#include "common.cuh"

#define CONVERGED 0
#define MAX_ITER 1
#define DIVERGED 2

constexpr u32 EVERY_LANE = 0xffffffffu;
constexpr int AHEAD = 8;

#if ONCE
typedef store held;
#else
typedef real held;
#endif

// Where a sequence is.
struct Chunk {
  i64 number, begin, end;
  bool first;  // nothing has come before it
};

__device__ __forceinline__ Chunk chunk_at(i64 q, i64 steps, i64 chunk, i64 chunks) {
  const i64 c = ADJOINT ? chunks - 1 - q : q;
  const i64 begin = c * chunk;
  return {c, begin, begin + chunk < steps ? begin + chunk : steps, q == 0};
}

// What is carried into a chunk, in channel i.
__device__ __forceinline__ real carried(const Chunk& at, const store* lam, const store* initial, const held* value,
                                        i64 b, i64 steps, int dim, int i) {
  if (ADJOINT) {
    const i64 next = (b * steps + at.end) * dim + i;
    return at.first ? (real)0 : widen(lam[next]) * widen(value[next]);
  }
  if (!at.first) return widen(value[(b * steps + at.begin - 1) * dim + i]);
  return initial != nullptr ? widen(initial[b * dim + i]) : (real)0;
}

__device__ __forceinline__ real most_of(real a, real b) { return b > a || b != b ? b : a; }  // keeps a NaN

// The bits of a size as a whole number of the same order, in which a NaN is above everything.
__device__ __forceinline__ u64 to_bits(real v) {
  union { double number; u64 bits; } both;
  both.number = (double)v;
  return both.bits & 0x7fffffffffffffffull;
}
__device__ __forceinline__ double from_bits(u64 v) {
  union { u64 bits; double number; } both;
  both.bits = v;
  return both.number;
}

#ifdef OCCUPIED
// Whether a chunk of the source has anything but zeros: one block for each sequence and chunk.
extern "C" __global__ void __launch_bounds__(THREADS)
dense_occupied(const store* __restrict__ source, int* __restrict__ occupied, i64 steps, int dim, i64 chunk,
               i64 chunks) {
  const i64 b = blockIdx.x / chunks, begin = blockIdx.x % chunks * chunk;
  const i64 end = begin + chunk < steps ? begin + chunk : steps;
  const store* rows = source + (b * steps + begin) * dim;
  bool any = false;
  for (i64 i = threadIdx.x; i < (end - begin) * dim; i += THREADS) any |= widen(rows[i]) != 0;
  any = __syncthreads_or(any);
  if (threadIdx.x == 0) occupied[blockIdx.x] = any;
}
#endif

// The first vectors to be mixed of a sequence that has come to a new chunk. COLD: the values begin as zero. `occupied`
// is there where a guess has been given: a chunk with no source and nothing carried into it has exactly the answer
// zero, which no relative tolerance would find from another guess.
extern "C" __global__ void __launch_bounds__(THREADS)
dense_begin(const store* __restrict__ lam, const store* __restrict__ gate, const store* __restrict__ source,
            const store* __restrict__ initial, held* value, real* __restrict__ vectors, i64 steps, int dim, i64 chunk,
            i64 chunks, int groups, const int* done, const int* count, const int* occupied) {
  const i64 b = blockIdx.x / groups;
  const int i = (int)(blockIdx.x % groups) * THREADS + threadIdx.x;
  const i64 q = ONCE ? 0 : done[b];
  if (!ONCE && (q == chunks || count[b] != 0)) return;  // the same in all threads
  const Chunk at = chunk_at(q, steps, chunk, chunks);
  bool zero = COLD;
  if (!ONCE && occupied != nullptr) {
    bool any = occupied[b * chunks + at.number];
    if (!any)
      for (int c = threadIdx.x; c < dim; c += THREADS) any |= carried(at, lam, initial, value, b, steps, dim, c) != 0;
    zero |= !__syncthreads_or(any);
  }
  if (i >= dim) return;
#pragma unroll 4
  for (i64 t = at.begin; t < at.end; ++t) {
    const i64 from = (b * steps + t) * dim + i;
    real v = 0;
    if (zero) {
      value[from] = Store<held>::narrow(v);
    } else {
      v = widen(value[from]);
    }
    real vector;
    if (ADJOINT) {
      vector = (GATED ? widen(gate[from]) : 1 - widen(lam[from])) * v;
    } else {
      vector = widen(source[from]) - v;
    }
    vectors[(b * chunk + t - at.begin) * dim + i] = vector;
  }
}

// sizes (B, 3): the bits of max|f - h|, max|h| and of the largest product of decays over the chunk
extern "C" __global__ void __launch_bounds__(THREADS)
dense_scan(const store* __restrict__ lam, const store* __restrict__ gate, const store* __restrict__ source,
           const store* __restrict__ initial, const held* old, held* value, real* vectors,
           const real* __restrict__ mixed, i64 steps, int dim, i64 chunk, i64 chunks, int groups, double rtol,
           double atol, i64 max_iter, double damping, int* done, int* count, int* arrived, int* remaining, u64* sizes,
           int* counts, double* changes, double* scales, int* states) {
  const i64 b = blockIdx.x / groups;
  const int i = (int)(blockIdx.x % groups) * THREADS + threadIdx.x;
  const i64 q = ONCE ? 0 : done[b];
  if (q == chunks) return;  // at rest, the same in all threads
  const Chunk at = chunk_at(q, steps, chunk, chunks);
  const real new_share = (real)damping, old_share = 1 - new_share;
  [[maybe_unused]] real change = 0, size = 0, decays = 0;
  if (i < dim) {
    real state = carried(at, lam, initial, value, b, steps, dim, i);
    const bool last = ADJOINT && at.first;  // no decay leads out of the last step
    real product = last ? 0 : 1;
    if (ADJOINT && !last) product = magnitude(widen(lam[(b * steps + at.end) * dim + i]));
    const int length = (int)(at.end - at.begin);
    for (int k0 = 0; k0 < length; k0 += AHEAD) {
      real decay[AHEAD], x[AHEAD], g[AHEAD], was[AHEAD], mix[AHEAD];
#pragma unroll
      for (int j = 0; j < AHEAD; ++j)
        if (k0 + j < length) {
          const int k = ADJOINT ? length - 1 - k0 - j : k0 + j;
          const i64 from = (b * steps + at.begin + k) * dim + i, row = (b * chunk + k) * dim + i;
          decay[j] = widen(lam[from]);
          x[j] = widen(source[from]);
          g[j] = GATED ? widen(gate[from]) : 1 - decay[j];
          was[j] = widen(old[from]);
          mix[j] = mixed[row];
        }
#pragma unroll
      for (int j = 0; j < AHEAD; ++j)
        if (k0 + j < length) {
          const int k = ADJOINT ? length - 1 - k0 - j : k0 + j;
          const i64 to = (b * steps + at.begin + k) * dim + i, row = (b * chunk + k) * dim + i;
          real f;
          if (ADJOINT) {
            f = x[j] + (g[j] * was[j] - mix[j]) + state;
            state = decay[j] * f;
            if (k > 0) product *= magnitude(decay[j]);
          } else {
            f = decay[j] * state + g[j] * (was[j] + mix[j]);
            state = f;
            product *= magnitude(decay[j]);
          }
          const real now = ONCE ? f : old_share * was[j] + new_share * f;
          value[to] = Store<held>::narrow(now);
          if (!ONCE) {
            vectors[row] = ADJOINT ? g[j] * now : x[j] - now;
            change = most_of(change, magnitude(f - was[j]));
            size = most_of(size, magnitude(now));
          }
        }
    }
    decays = product;
  }
#if !ONCE
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    change = most_of(change, __shfl_xor_sync(EVERY_LANE, change, offset));
    size = most_of(size, __shfl_xor_sync(EVERY_LANE, size, offset));
    decays = most_of(decays, __shfl_xor_sync(EVERY_LANE, decays, offset));
  }
  u64* of = sizes + 3 * b;
  if ((threadIdx.x & 31) == 0) {
    atomicMax(of, to_bits(change));
    atomicMax(of + 1, to_bits(size));
    atomicMax(of + 2, to_bits(decays));
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x != 0 || atomicAdd(arrived + b, 1) != groups - 1) return;
  __threadfence();  // the last block of the sequence decides
  const double moved = from_bits(atomicExch(of, 0ull)), tall = from_bits(atomicExch(of + 1, 0ull));
  const double reach = from_bits(atomicExch(of + 2, 0ull));
  arrived[b] = 0;
  const double scale = tall > scales[b] ? tall : scales[b];
  // Of an error carried in, `reach` leaves the chunk at most: errors of 1 - reach, or of one over the number of chunks,
  // add up to one. Half of that, since the mixing makes something of the carried error too.
  double share = 1;
  if (chunks > 1) {
    const double even = 1.0 / (double)chunks, rest = 1 - reach;
    share = 0.5 * (rest > even ? rest : even);
  }
  const double asked = share * (atol + rtol * scale), least = 4 * (double)EPS * scale;
  const bool finite = is_finite(moved), converged = finite && moved <= (least > asked ? least : asked);
  const int n = count[b] + 1;
  if (converged || !finite || n >= max_iter) {
    counts[b * chunks + at.number] = n;
    if (!converged) states[b] = max(states[b], finite ? MAX_ITER : DIVERGED);
    scales[b] = scale;
    if (!(moved <= changes[b])) changes[b] = moved;  // keeps a NaN
    count[b] = 0;
    done[b] = (int)(q + 1);
    if (q + 1 == chunks) atomicAdd(remaining, -1);
  } else {
    count[b] = n;
  }
#endif
}
