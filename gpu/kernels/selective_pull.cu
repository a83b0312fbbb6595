// The gradient of selective_scan.cu; sections 1 and 6 of docs/mathematics.md. The adjoint of the state goes against time,
//
//   G_t = exp(delta_{t+1} A) * G_{t+1} + ybar_t C_t^T,    last_bar enters after the last step;
//   F_t = G_t * exp(delta_t A) * H_{t-1}                                                        (elementwise)
//   x_bar_t = delta_t (G_t B_t) + D ybar_t,    delta_bar_t = x_t (G_t B_t) + sum_n F_t A,    A_bar = sum_t delta_t F_t
//   B_bar_t = G_t^T (delta_t x_t),    C_bar_t = H_t^T ybar_t,    D_bar = sum_t ybar_t x_t,
//   initial_bar = exp(delta_1 A) * G_1
//
//   pull    all of it, but for sums over blocks and sequences
//   add_up  those: out[o][i] = sum_j parts[o][j][i], in the same order each time
//
// Tile: a block has THREADS CHANNELS / SPREAD channels of one segment of time of one sequence, G and the sums over time in
// registers (selective.cuh). It goes through chunks of CHUNK steps from the last to the first: reads the state before the
// chunk, which `walk` has kept, computes the states of the chunk again into shared memory, each thread its own, and
// takes the steps of the adjoint. Sums over states are exchanges between neighbours; sums over channels fold the lanes of
// a warp together (sums.cuh), meet those of other warps in shared memory once a chunk, and those of other blocks in
// add_up. Nothing of size (T, D, N) is written, and nothing is added atomically: a result repeats bit for bit.
//
// Traffic: x, delta and ybar are read and x_bar and delta_bar written, once (B, T, D); the kept states, N / CHUNK numbers
// for each element of x, are read once; B_bar and C_bar leave 2 N numbers a step and block of channels. With HEADS what
// becomes delta_bar is written in full (B, T, D) and summed by add_up. Exponentials: 2 B T D N.
#include "selective.cuh"

constexpr int WARPS = THREADS / 32;

// Brings a line into the second-level cache.
__device__ __forceinline__ void prefetch(const void* line) {
#ifndef SIMT
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MINBLOCKS)
pull(const store* __restrict__ x, const store* __restrict__ delta, const store* __restrict__ A,
     const store* __restrict__ B, const store* __restrict__ C, const store* __restrict__ D,
     const store* __restrict__ ybar, const store* __restrict__ last_bar, store* __restrict__ x_bar,
     store* __restrict__ delta_bar, real* __restrict__ step_parts, store* __restrict__ initial_bar,
     real* __restrict__ rate_parts, real* __restrict__ B_parts, real* __restrict__ C_parts, real* __restrict__ D_parts,
     i64 steps, int dim, int size, int heads, int segments, int blocks, const pack* __restrict__ entering,
     const pack* __restrict__ kept) {
  SHARED(memory);
  pack* const before = (pack*)memory + threadIdx.x;             // [CHUNK][PACKS][THREADS], H_{t-1}
  real* const given = (real*)((pack*)memory + CHUNK * PACKS * THREADS);  // [CHUNK][3][THREADS]: delta, x, ybar
  real* const rows = given + CHUNK * 3 * THREADS;               // [CHUNK][2][SLOTS]: B, C
  real* const sums = rows + CHUNK * 2 * SLOTS;                  // [WARPS][CHUNK][2][SLOTS]: C_bar, B_bar
  const Seat p(steps, segments, blocks, CHUNK);
  const bool inside = p.channel < dim;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, neighbour = threadIdx.x ^ 1;
  const i64 row = p.sequence * segments + p.segment, base = p.sequence * steps, chunks = (steps + CHUNK - 1) / CHUNK;
  const int across = HEADS ? heads : dim, column = HEADS ? (inside ? p.channel / (dim / heads) : 0) : p.channel;

  real rate[RATES], adjoint[HELD], rate_bar[RATES], skip_bar = 0;
  load_rates(A, p, dim, size, heads, rate);
  if (segments > 1) load_packs<THREADS>(entering + p.packs(row, blocks), adjoint);
  else load_states(last_bar, p, dim, size, adjoint);
#pragma unroll
  for (int i = 0; i < RATES; ++i) rate_bar[i] = 0;
  const real through = D != nullptr && inside ? widen(D[p.channel]) : 0;

  // Where this lane's part of the sums belongs, when 2 STATES numbers have been folded over the lanes.
  constexpr int LEFT = folded(2 * STATES, SPREAD);
  constexpr bool EVEN = 2 * STATES % (32 / SPREAD) == 0;  // every lane has LEFT of them
  int place[LEFT];
  {
    int index = 0, valid = 2 * STATES;
    fold_place<2 * STATES, 16, SPREAD>(lane, index, valid);
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const int which = (index + i) / STATES, s = (index + i) % STATES;
      place[i] = EVEN || i < valid ? (warp * CHUNK * 2 + which) * SLOTS + p.lane * STATES + s : -1;
#ifndef SIMT
      asm volatile("" : "+r"(place[i]));  // or it would be found anew at every step
#endif
    }
  }

  for (i64 chunk = (p.last + CHUNK - 1) / CHUNK; chunk-- > p.first / CHUNK;) {
    const i64 start = chunk * CHUNK;
    const int length = (int)(p.last - start < CHUNK ? p.last - start : CHUNK);
    real h[HELD];
    load_packs<THREADS>(kept + p.packs(p.sequence * chunks + chunk, blocks), h);
    const store* step_from = delta + (base + start) * across + column;
    const store* x_from = x + (base + start) * dim + p.channel;
    const store* y_from = ybar + (base + start) * dim + p.channel;
    auto bring = [&](int k) {
      real* const to = given + k * 3 * THREADS + threadIdx.x;
      to[0] = inside ? widen(*step_from) : 0;
      to[THREADS] = inside ? widen(*x_from) : 0;
      to[2 * THREADS] = inside ? widen(*y_from) : 0;
      step_from += across;
      x_from += dim;
      y_from += dim;
    };
    if (length == CHUNK) {  // all on their way at once
#pragma unroll
      for (int k = 0; k < CHUNK; ++k) bring(k);
    } else {
#pragma unroll 4
      for (int k = 0; k < length; ++k) bring(k);
    }
    const store* const B_from = B + (base + start) * size;
    const store* const C_from = C + (base + start) * size;
#pragma unroll
    for (int i = 0; i < (CHUNK * SLOTS + THREADS - 1) / THREADS; ++i) {
      const int e = threadIdx.x + i * THREADS, k = e / SLOTS, n = e % SLOTS;
      if (k < length) {
        rows[k * 2 * SLOTS + n] = n < size ? widen(B_from[k * size + n]) : 0;
        rows[(k * 2 + 1) * SLOTS + n] = n < size ? widen(C_from[k * size + n]) : 0;
      }
    }
    __syncthreads();

    if (start > p.first) {  // what the chunk before this one will ask for, a row or a line a lane
      const int channel = (p.block * (THREADS / SPREAD) + warp * 32 / SPREAD) * CHANNELS;
      if (lane < CHUNK && channel < dim) {
        const i64 there = (base + start - CHUNK + lane) * dim + channel;
        prefetch(x + there);
        prefetch(ybar + there);
        if (!HEADS) prefetch(delta + there);
      }
      constexpr int LINES = 32 * (int)sizeof(pack) / 128;  // of a warp in one of PACKS
      for (int i = lane; i < PACKS * LINES; i += 32)
        prefetch(kept + p.packs(p.sequence * chunks + chunk - 1, blocks) - lane + i / LINES * THREADS
                 + i % LINES * (32 / LINES));
    }

#pragma unroll 2
    for (int k = 0; k < length; ++k) {
      const real* const now = given + k * 3 * THREADS;
      real step[CHANNELS], drive[CHANNELS], into[STATES];
      step[0] = now[threadIdx.x];
      drive[0] = step[0] * now[THREADS + threadIdx.x];
      if constexpr (CHANNELS == 2) {
        step[1] = now[neighbour];
        drive[1] = step[1] * now[THREADS + neighbour];
      }
      load_row(rows + k * 2 * SLOTS, p.lane, into);
      store_packs<THREADS>(before + k * PACKS * THREADS, h);
      advance(h, rate, step, drive, into);
    }

    i64 at = (base + start + length - 1) * dim + p.channel;
#pragma unroll 1
    for (int k = length - 1; k >= 0; --k, at -= dim) {
      const real* const now = given + k * 3 * THREADS;
      const real own_x = now[THREADS + threadIdx.x];
      real step[CHANNELS], drive[CHANNELS], top[CHANNELS], decay[CHANNELS];
      step[0] = now[threadIdx.x];
      drive[0] = step[0] * own_x;
      top[0] = now[2 * THREADS + threadIdx.x];
      if constexpr (CHANNELS == 2) {
        step[1] = now[neighbour];
        drive[1] = step[1] * now[THREADS + neighbour];
        top[1] = now[2 * THREADS + neighbour];
      }
      head_decays(rate, step[0], decay);
      real into[STATES], out[STATES], was[HELD];
      load_row(rows + k * 2 * SLOTS, p.lane, into);
      load_row(rows + (k * 2 + 1) * SLOTS, p.lane, out);
      load_packs<THREADS>(before + k * PACKS * THREADS, was);
      real folds[2 * STATES], input_bar[CHANNELS], exponent_bar[CHANNELS];
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) { input_bar[c] = 0; exponent_bar[c] = 0; }
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int c = i / STATES, s = i % STATES;
        real g = adjoint[i] + top[c] * out[s];
        folds[s] = c == 0 ? top[c] * h[i] : folds[s] + top[c] * h[i];
        folds[STATES + s] = c == 0 ? g * drive[c] : folds[STATES + s] + g * drive[c];
        input_bar[c] += g * into[s];
        g *= decay_of(i, rate, step, decay);
        adjoint[i] = g;
        const real f = g * was[i];
        if constexpr (HEADS) {
          exponent_bar[c] += f;
        } else {
          exponent_bar[c] += f * rate[i];
          rate_bar[i] += f * step[c];
        }
        h[i] = was[i];
      }
      const real in_bar = over_states(input_bar), ex_bar = over_states(exponent_bar);
      if constexpr (HEADS) rate_bar[0] += ex_bar * step[0];
      skip_bar += top[0] * own_x;
      if (inside && p.lane < CHANNELS) {
        x_bar[at] = narrow(in_bar * step[0] + through * top[0]);
        const real step_bar = in_bar * own_x + ex_bar * (HEADS ? BASE * rate[0] : BASE);
        if constexpr (HEADS) step_parts[at] = step_bar;
        else delta_bar[at] = narrow(step_bar);
      }
      int index = 0, valid = 2 * STATES;
      fold_sums<2 * STATES, 16, SPREAD>(folds, lane, index, valid);
#pragma unroll
      for (int i = 0; i < LEFT; ++i)
        if (EVEN || place[i] >= 0) sums[place[i] + k * 2 * SLOTS] = folds[i];
    }
    __syncthreads();

    for (int e = threadIdx.x; e < length * 2 * SLOTS; e += THREADS) {
      real sum = sums[e];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) sum += sums[w * CHUNK * 2 * SLOTS + e];
      const int k = e / (2 * SLOTS), n = e % SLOTS;
      const i64 at = ((p.sequence * blocks + p.block) * steps + start + k) * size + n;
      if (n < size) (e / SLOTS % 2 == 0 ? C_parts : B_parts)[at] = sum;
    }
  }

  if (p.segment == 0) store_states(initial_bar, p, dim, size, adjoint);
  if constexpr (HEADS) {
    if (inside && p.lane < CHANNELS) rate_parts[row * dim + p.channel] = rate_bar[0];
  } else {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int c = i / STATES, s = i % STATES;
      if (p.has(c, s, dim, size))
        rate_parts[(row * dim + (p.channel ^ c)) * size + p.lane * STATES + s] = rate_bar[i];
    }
  }
  if (inside && p.lane < CHANNELS) D_parts[row * dim + p.channel] = skip_bar;
}

// parts (outer, many, inner) -> out (outer, inner); a thread has one sum, in four strands that are added in the end.
extern "C" __global__ void __launch_bounds__(256)
add_up(const real* __restrict__ parts, store* __restrict__ out, i64 outer, i64 many, i64 inner) {
  const i64 number = (i64)blockIdx.x * 256 + threadIdx.x;
  if (number >= outer * inner) return;
  const real* from = parts + number / inner * many * inner + number % inner;
  real strand[4] = {0, 0, 0, 0};
  i64 j = 0;
  for (; j + 4 <= many; j += 4)
#pragma unroll
    for (int k = 0; k < 4; ++k) strand[k] += from[(j + k) * inner];
#pragma unroll
  for (int k = 0; k < 3; ++k)
    if (j + k < many) strand[k] += from[(j + k) * inner];
  out[number] = narrow((strand[0] + strand[1]) + (strand[2] + strand[3]));
}
