// The fixed point of (F) and its adjoint for Q = I - K1 (x) K2, in chunks of at most WARPS steps; d1, d2 up to 32.
//
//     h_t = lam_t h_{t-1} + c_t + g_t P_t h_t,  c = g (x - P x)
//     s_t = lam_{t+1} s_{t+1} + hbar_t + P_t^T (g_t s_t)
//
// Sections 3, 6 and 7 of docs/mathematics.md. One block per sequence, or where these are few, per segment of time: then
// launches follow each other, a round each. In the first all segments start from zero, in the others from what the one
// before has left by then, as long as that is news, until their result is what was there to within rounding.
//
// A warp mixes one step, on tensor cores (relax_tensor.cuh), from parameters that it keeps in registers as long as the
// chunk is iterated. A thread scans the same channels of all steps, with their lam and iterate in registers and their c
// in shared memory. What passes between them, the iterate (in the adjoint g times it) one way and what mixing made of
// it the other, goes through shared memory, in place.
//
// Memory traffic: everything from device memory once (a gate once per iteration, from the caches), the result written
// once. Per iteration and step of D channels: D numbers of shared memory read and written by the mixing, 2 D read and D
// written by the scan.
//
// Macros: STORE (float, f16, bf16); D1, D2; WARPS; BLOCKS on a multiprocessor; ADJOINT, GATED, SEGMENTED 0 or 1.
#include "common.cuh"
#include "relax_mix.cuh"
#include "relax_rule.cuh"
#include "relax_tensor.cuh"

#ifndef ADJOINT
#define ADJOINT 0
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef SEGMENTED
#define SEGMENTED 0
#endif

constexpr int D = D1 * D2, THREADS = 32 * WARPS;
// Neighbouring channels that a thread takes at once, and how often it does
constexpr int WIDTH = D2 % 4 == 0 && D / 4 >= THREADS ? 4 : D2 % 2 == 0 && D / 2 >= THREADS ? 2 : 1;
constexpr int TURNS = over(D / WIDTH, THREADS);
constexpr bool EVEN = D / WIDTH % THREADS == 0;

typedef Pack<store, WIDTH> Stored;
typedef Pack<float, WIDTH> Wide;

// The larger magnitude, and NaN if there is one
__device__ __forceinline__ float most_of(float a, float b) {
#ifndef SIMT
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(fabsf(b)));
  return r;
#else
  return __uint_as_float(most(magnitude_bits(a), magnitude_bits(b)));
#endif
}

__device__ __forceinline__ void prefetch(const void* at) {
#ifndef SIMT
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

// `count` numbers that will be wanted, asked for by all threads of the block
__device__ __forceinline__ void announce(const store* from, i64 count) {
  constexpr int LINE = 128 / sizeof(store);
  for (i64 i = (i64)threadIdx.x * LINE; i < count; i += THREADS * LINE) prefetch(from + i);
}

// k1 (B, T, D1, D1), k2 (B, T, D2, D2); lam, gate, source, guess, value (B, T, D); initial (B, D) or null, guess null:
// from zero. Shared memory: 8 WARPS numbers, then WARPS steps, and WARPS TURNS THREADS WIDTH for c.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
relax_kronecker(const store* k1, const store* k2, const store* lam, const store* gate, const store* source,
                const store* initial, const store* guess, store* value, i64 steps, int chunk, double eps, double rtol,
                double atol, i64 max_iter, int* counts, double* change_out, double* scale_out, int* state_out,
                int cut, int turn, float* left, int* moved) {
  const int segments = SEGMENTED ? cut : 1, round = SEGMENTED ? turn : 0;
  const i64 b = blockIdx.x / segments;
  const int segment = blockIdx.x % segments;
  const int warp = threadIdx.x / 32;
  SHARED(memory);
  bits* room = (bits*)memory;
  float* mixing = (float*)(room + 8 * WARPS);
  float* mine = mixing + warp * STEP;
  for (int i = threadIdx.x; i < WARPS * STEP; i += THREADS) mixing[i] = 0;  // what is beyond D1 and D2 stays so
  __syncthreads();

  Wide* constant = (Wide*)(mixing + WARPS * STEP) + threadIdx.x;  // c, or hbar: of this thread only
  // Channel of a turn, and where it lies in a step in shared memory
  auto channel = [&](int turn) { return (turn * THREADS + (int)threadIdx.x) * WIDTH; };
  auto inside = [&](int turn) { return EVEN || channel(turn) < D; };
  auto place = [&](int turn, int k) {
    if (THREADS * WIDTH % D2 == 0) {
      const int first = threadIdx.x * WIDTH;
      return (Wide*)(mixing + k * STEP + first / D2 * ROW + first % D2 + turn * (THREADS * WIDTH / D2) * ROW);
    }
    const int i = channel(turn);
    return (Wide*)(mixing + k * STEP + i / D2 * ROW + i % D2);
  };

  float carry[TURNS][WIDTH];  // h_{t-1}, or lam_{t+1} s_{t+1}
#pragma unroll
  for (int j = 0; j < TURNS; ++j)
#pragma unroll
    for (int e = 0; e < WIDTH; ++e)
      carry[j][e] = initial && segment == 0 && inside(j) ? widen(initial[b * D + channel(j) + e]) : 0.0f;

  const i64 chunks = (steps + chunk - 1) / chunk, all = (i64)gridDim.x * D;
  Outcome outcome = {0, 0, CONVERGED};
  // What the segments leave, after the even and after the odd rounds; and whether that was news.
  float *before = left + ((round & 1) ^ 1) * all, *after = left + (round & 1) * all;
  const int *stirred = moved + ((round & 1) ^ 1) * gridDim.x;
  if (round > 0) {
    outcome = {change_out[blockIdx.x], scale_out[blockIdx.x], state_out[blockIdx.x]};
    const bool news = segment > 0 && stirred[blockIdx.x - 1];
    if (threadIdx.x == 0) moved[(round & 1) * gridDim.x + blockIdx.x] = 0;
#pragma unroll
    for (int j = 0; j < TURNS; ++j)
#pragma unroll
      for (int e = 0; e < WIDTH; ++e)
        if (inside(j)) {
          const i64 at = (i64)blockIdx.x * D + channel(j) + e;
          after[at] = before[at];
          if (news) carry[j][e] = before[at - D];
        }
    if (!news) return;
  }
  const i64 from = chunks * segment / segments, to = chunks * (segment + 1) / segments;
  bool settled = false;
  for (i64 q = from; q < to && !settled; ++q) {
    const i64 c = ADJOINT ? chunks - 1 - q : q, begin = c * chunk, end = begin + chunk < steps ? begin + chunk : steps;
    const int n = (int)(end - begin);
    const i64 row = b * steps + begin;  // the first step of the chunk, counted over all sequences
    // Steps are counted as they are scanned.
    auto step = [&](int k) { return row + (ADJOINT ? n - 1 - k : k); };
    auto at = [&](int turn, int k) { return step(k) * D + channel(turn); };
    auto gates = [&](int turn, int k, const float* decay, float* g) {
      if (GATED) {
        const Stored from = *(const Stored*)(gate + at(turn, min(k, n - 1)));
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) g[e] = widen(from.v[e]);
      } else {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) g[e] = 1 - decay[e];
      }
    };

    // Everything that the chunk needs, into registers. Steps beyond the last one are taken along, and hand on what
    // comes in.
    Factors factors;
    bool sound = true;
    if (warp < n) sound = factors.load<ADJOINT>(k1 + step(warp) * (D1 * D1), k2 + step(warp) * (D2 * D2));
    float decay[WARPS][TURNS][WIDTH], old[WARPS][TURNS][WIDTH];
    auto add = [&](int turn, int k) { return constant + (k * TURNS + turn) * THREADS; };
    bits any = 0, rest_bits = 0;
#pragma unroll
    for (int j = 0; j < TURNS; ++j) {
      float rest[WIDTH];
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
        rest[e] = 1;
        if (ADJOINT && inside(j) && end < steps) rest[e] = widen(lam[at(j, -1) + e]);
        any = most(any, magnitude_bits(carry[j][e]));
      }
#pragma unroll
      for (int k = 0; k < WARPS; ++k) {
        Stored l, x;
        if (k < n && inside(j)) {
          l = *(const Stored*)(lam + at(j, k));
          x = *(const Stored*)(source + at(j, k));
        } else {
#pragma unroll
          for (int e = 0; e < WIDTH; ++e) l.v[e] = x.v[e] = narrow(0);
        }
        Wide mixes;
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
          decay[k][j][e] = k < n ? widen(l.v[e]) : 1.0f;
          mixes.v[e] = widen(x.v[e]);
          old[k][j][e] = 0;
          any = most(any, magnitude_bits(mixes.v[e]));
          if (k < n - ADJOINT) rest[e] *= decay[k][j][e];
        }
        *add(j, k) = mixes;
        if (!ADJOINT && inside(j) && k < n) *place(j, k) = mixes;
      }
      if (inside(j))
#pragma unroll
        for (int e = 0; e < WIDTH; ++e)
          if (rest[e] == rest[e]) rest_bits = most(rest_bits, magnitude_bits(rest[e]));
    }
    if (ADJOINT && end == steps) rest_bits = 0;
    if (!sound) any = magnitude_bits(__uint_as_float(0x7fffffffu));
    block_largest(rest_bits, any, room);
    const double share = tolerance_share(chunks, from_magnitude(rest_bits));
    // From zero, mixing would make zero of it, or NaN where a parameter is not finite: c has that, or `any` says so.
    const bool warm = guess && any > 0;
    const float nothing = ADJOINT && any > 0x7f800000u ? __uint_as_float(0x7fffffffu) : 0.0f;
    // Forward, x was mixed: c = g (x - P x). Then the iterate that the chunk starts from.
    auto start = [&]() {
#pragma unroll
      for (int j = 0; j < TURNS; ++j)
#pragma unroll
        for (int k = 0; k < WARPS; ++k)
          if (inside(j)) {
            Wide mixes, x;
            float g[WIDTH];
            if (!ADJOINT || warm) gates(j, k, decay[k][j], g);
            if (!ADJOINT && k < n) {
              mixes = *place(j, k);
              x = *add(j, k);
#pragma unroll
              for (int e = 0; e < WIDTH; ++e) x.v[e] = g[e] * (x.v[e] - mixes.v[e]);
              *add(j, k) = x;
            }
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) mixes.v[e] = k < n ? nothing : 0.0f;
            if (warm && k < n) {
              const Stored from = *(const Stored*)(guess + at(j, k));
#pragma unroll
              for (int e = 0; e < WIDTH; ++e) {
                old[k][j][e] = widen(from.v[e]);
                mixes.v[e] = ADJOINT ? g[e] * old[k][j][e] : old[k][j][e];
              }
            }
            *place(j, k) = mixes;
          }
    };
    if (ADJOINT) {
      start();
      __syncthreads();
    }
    if (q + 1 < to) {  // the chunk after this one
      const i64 then = row + (ADJOINT ? -chunk : n), some = ADJOINT || end + chunk < steps ? chunk : steps - end;
      announce(k1 + then * (D1 * D1), some * (D1 * D1));
      announce(k2 + then * (D2 * D2), some * (D2 * D2));
      announce(lam + then * D, some * D);
      announce(source + then * D, some * D);
      if (GATED) announce(gate + then * D, some * D);
      if (guess) announce(guess + then * D, some * D);
    }

    float leaves[TURNS][WIDTH];  // the next chunk's carry
    Chunk now = {0, 0, outcome.scale, false};
    bool started = ADJOINT, mixes = !ADJOINT || warm;
    while (now.goes_on(max_iter)) {
      if (mixes) {
        if (warp < n) factors.apply(mine);
        __syncthreads();
      }
      mixes = started || warm;
      if (!started) {
        start();
        started = true;
        if (warm) __syncthreads();
        continue;
      }
      float change = 0, size = 0;
#pragma unroll
      for (int j = 0; j < TURNS; ++j) {
        float(&state)[WIDTH] = leaves[j];
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) state[e] = carry[j][e];
        Wide mixed[WARPS], plus[WARPS];
#pragma unroll
        for (int k = 0; k < WARPS; ++k)
          if (inside(j)) {
            mixed[k] = *place(j, k);
            plus[k] = *add(j, k);
          }
#pragma unroll
        for (int k = 0; k < WARPS; ++k)
          if (inside(j)) {
            float g[WIDTH];
            gates(j, k, decay[k][j], g);
            Wide next;
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) {
              float f;
              if (ADJOINT) {
                f = plus[k].v[e] + mixed[k].v[e] + state[e];
                state[e] = decay[k][j][e] * f;
                next.v[e] = g[e] * f;
              } else {
                f = fmaf(decay[k][j][e], state[e], fmaf(g[e], mixed[k].v[e], plus[k].v[e]));
                state[e] = f;
                next.v[e] = f;
              }
              if (k < n) {
                change = most_of(change, f - old[k][j][e]);
                size = most_of(size, f);
              }
              old[k][j][e] = f;
            }
            if (k < n) *place(j, k) = next;
          }
      }
      bits changed = magnitude_bits(change), largest = magnitude_bits(size);
      block_largest(changed, largest, room + 2 * WARPS);
      now.iterated(from_magnitude(changed), from_magnitude(largest), outcome.scale, share, eps, rtol, atol);
    }
    outcome.add(now);
    float differs = 0, wide = 0;
#pragma unroll
    for (int j = 0; j < TURNS; ++j)
      if (inside(j)) {
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) carry[j][e] = leaves[j][e];
        if (round > 0) {  // the last row, as it was
          const Stored was = *(const Stored*)(value + at(j, n - 1));
#pragma unroll
          for (int k = 0; k < WARPS; ++k)
            if (k == n - 1)
#pragma unroll
              for (int e = 0; e < WIDTH; ++e) {
                differs = most_of(differs, widen(narrow(old[k][j][e])) - widen(was.v[e]));
                wide = most_of(wide, old[k][j][e]);
              }
        }
#pragma unroll
        for (int k = 0; k < WARPS; ++k)
          if (k < n) {
            Stored out;
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) out.v[e] = narrow(old[k][j][e]);
            *(Stored*)(value + at(j, k)) = out;
          }
      }
    if (threadIdx.x == 0) {
      int* place = counts + b * chunks + c;
      *place = round > 0 ? max(*place, (int)now.count) : (int)now.count;
    }
    if (round > 0) {
      bits moves = magnitude_bits(differs), size = magnitude_bits(wide);
      block_largest(moves, size, room + 4 * WARPS);  // not where the last iteration or the next chunk is at work
      settled = from_magnitude(moves) <= 2 * eps * from_magnitude(size);
    }
  }
  if (segments > 1 && !settled) {
    if (threadIdx.x == 0) moved[(round & 1) * gridDim.x + blockIdx.x] = 1;
#pragma unroll
    for (int j = 0; j < TURNS; ++j)
#pragma unroll
      for (int e = 0; e < WIDTH; ++e)
        if (inside(j)) after[(i64)blockIdx.x * D + channel(j) + e] = carry[j][e];
  }
  if (threadIdx.x == 0) {
    change_out[blockIdx.x] = outcome.change;
    scale_out[blockIdx.x] = outcome.scale;
    state_out[blockIdx.x] = outcome.status;
  }
}
