// H_t = exp(delta_t A) * H_{t-1} + (delta_t x_t) B_t^T,  y_t = H_t C_t + D * x_t;  section 1 of docs/mathematics.md.
//
//   walk, by MODE
//     VALUE  y and the last state
//     ENDS   where a segment of time comes to from zero, and the sum of its delta
//     KEEP   the state before every CHUNK-th step, for the gradient
//     BACK   where the adjoint of a segment comes to from zero, against time: G = exp(delta_t A) * (G + ybar_t C_t^T)
//   join   the state before each segment, from where all of them come to from zero: a segment decays by
//          exp(A sum delta), so that the states of long sequences follow from those of their segments
//
// Tile: a block walks THREADS CHANNELS / SPREAD channels of one sequence, states in registers (selective.cuh). Rows of B
// and C, which all channels share, lie TILE steps at a time in shared memory, twice; those of the next tile, and x and
// delta AHEAD steps ahead, are on their way in registers. Few sequences are cut into segments of time: ENDS, join, VALUE.
// A result repeats bit for bit.
//
// Traffic: x and delta are read once and y is written once (B, T, D); B and C (B, T, N) once for each block of channels,
// mostly from the second-level cache. The states (B, D, N) are written once. ENDS and KEEP read x, delta and B, BACK
// ybar, delta and C; KEEP writes N / CHUNK numbers for each element of x. Exponentials decide, B T D N of them a walk, or
// B T D where a head has one decay.
#include "selective.cuh"

constexpr int VALUE = 0, ENDS = 1, KEEP = 2, BACK = 3;
constexpr int ROWS = MODE == VALUE ? 2 : 1;
constexpr int SHARE = (TILE * SLOTS + THREADS - 1) / THREADS;  // of a thread in a tile

extern "C" __global__ void __launch_bounds__(THREADS, MINBLOCKS)
walk(const store* __restrict__ x, const store* __restrict__ delta, const store* __restrict__ A,
     const store* __restrict__ B, const store* __restrict__ C, const store* __restrict__ D,
     const store* __restrict__ initial, store* __restrict__ y, store* __restrict__ last_state, i64 steps, int dim, int size,
     int heads, int segments, int blocks, int unit, pack* ends, real* totals, pack* kept) {
  SHARED(memory);
  real* const tiles = (real*)memory;  // [2][ROWS][TILE][SLOTS]
  const Seat p(steps, segments, blocks, unit);
  const bool inside = p.channel < dim;
  const i64 row = p.sequence * segments + p.segment, base = p.sequence * steps, count = p.last - p.first;
  const i64 begin = base + (MODE == BACK ? p.last - 1 : p.first);
  constexpr int WAY = MODE == BACK ? -1 : 1;

  const int across = HEADS ? heads : dim, column = HEADS ? (inside ? p.channel / (dim / heads) : 0) : p.channel;
  const store* step_from = delta + begin * across + column;
  const store* x_from = x + begin * dim + p.channel;
  store* y_to = MODE == VALUE ? y + begin * dim + p.channel : nullptr;
  store next_step[AHEAD], next_x[AHEAD];
  auto ask = [&](i64 left) {  // for x and delta of the next steps, of which so many are left
    if (left >= AHEAD) {
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) {
        next_step[u] = inside ? step_from[u * (WAY * across)] : narrow(0);
        next_x[u] = inside ? x_from[u * (WAY * dim)] : narrow(0);
      }
    } else {
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) {
        next_step[u] = inside && u < left ? step_from[u * (WAY * across)] : narrow(0);
        next_x[u] = inside && u < left ? x_from[u * (WAY * dim)] : narrow(0);
      }
    }
    step_from += (i64)AHEAD * WAY * across;
    x_from += (i64)AHEAD * WAY * dim;
  };
  store next_row[ROWS][SHARE];
  auto fetch = [&](i64 k) {  // for rows of B and C
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < SHARE; ++i) {
        const int e = threadIdx.x + i * THREADS, step = e / SLOTS, n = e % SLOTS;
        const bool there = e < TILE * SLOTS && n < size && k + step < count;
        next_row[r][i] = there ? (r == 0 && MODE != BACK ? B : C)[(begin + WAY * (k + step)) * size + n] : narrow(0);
      }
  };
  auto put = [&](real* tile) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < SHARE; ++i) {
        const int e = threadIdx.x + i * THREADS;
        if (e < TILE * SLOTS) tile[r * TILE * SLOTS + e] = widen(next_row[r][i]);
      }
  };

  real rate[RATES], h[HELD], total = 0;
  fetch(0);
  ask(count);
  load_rates(A, p, dim, size, heads, rate);
  if (MODE == ENDS || MODE == BACK) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) h[i] = 0;
  } else if (segments > 1) {
    load_packs<THREADS>(ends + p.packs(row, blocks), h);
  } else {
    load_states(initial, p, dim, size, h);
  }
  const real through = MODE == VALUE && D != nullptr && inside ? widen(D[p.channel]) : 0;
  pack* keeping = MODE == KEEP ? kept + p.packs(p.sequence * ((steps + CHUNK - 1) / CHUNK) + p.first / CHUNK, blocks) : nullptr;
  int until = 0;  // steps to the next state that is kept

  auto one = [&](int u, store raw_step, store raw_x, const real* tile, int j) {
    const real own_step = widen(raw_step), own_x = widen(raw_x);
    real step[CHANNELS], drive[CHANNELS], into[STATES];
    step[0] = own_step;
    drive[0] = MODE == BACK ? own_x : own_step * own_x;
    if constexpr (CHANNELS == 2) {
      step[1] = exchange(step[0]);
      drive[1] = exchange(drive[0]);
    }
    load_row(tile + j * SLOTS, p.lane, into);
    if constexpr (MODE == KEEP) {
      if (until == 0) {
        store_packs<THREADS>(keeping, h);
        keeping += (i64)blocks * PACKS * THREADS;
        until = CHUNK;
      }
      --until;
    }
    if constexpr (MODE == ENDS || MODE == BACK) total += own_step;
    if constexpr (MODE == BACK) {
      real decay[CHANNELS];
      head_decays(rate, step[0], decay);
#pragma unroll
      for (int i = 0; i < HELD; ++i)
        h[i] = decay_of(i, rate, step, decay) * (h[i] + drive[i / STATES] * into[i % STATES]);
    } else {
      advance(h, rate, step, drive, into);
    }
    if constexpr (MODE == VALUE) {
      real out[STATES], part[CHANNELS];
      load_row(tile + (TILE + j) * SLOTS, p.lane, out);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) {
        part[c] = h[c * STATES] * out[0];
#pragma unroll
        for (int s = 1; s < STATES; ++s) part[c] += h[c * STATES + s] * out[s];
      }
      const real sum = over_states(part);
      if (inside && p.lane < CHANNELS) y_to[u * dim] = narrow(sum + through * own_x);
    }
  };

  put(tiles);
  __syncthreads();
  int turn = 0;
  for (i64 k = 0; k < count; k += TILE) {
    const real* tile = tiles + turn * ROWS * TILE * SLOTS;
    turn ^= 1;
    fetch(k + TILE);
    const int now = count - k < TILE ? (int)(count - k) : TILE;
#pragma unroll 1
    for (int j = 0; j < now; j += AHEAD) {
      store steps_now[AHEAD], x_now[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) { steps_now[u] = next_step[u]; x_now[u] = next_x[u]; }
      ask(count - k - j - AHEAD);
      if (j + AHEAD <= now) {
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) one(u, steps_now[u], x_now[u], tile, j + u);
      } else {
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
          if (j + u < now) one(u, steps_now[u], x_now[u], tile, j + u);
      }
      if (MODE == VALUE) y_to += (i64)AHEAD * dim;
    }
    put(tiles + turn * ROWS * TILE * SLOTS);
    __syncthreads();
  }
  if (MODE == VALUE && p.segment + 1 == segments) store_states(last_state, p, dim, size, h);
  if (MODE == ENDS || MODE == BACK) {
    store_packs<THREADS>(ends + p.packs(row, blocks), h);
    totals[(row * blocks + p.block) * THREADS + threadIdx.x] = total;
  }
}

// In place: `ends` becomes what comes into each segment, `initial` into the first, or `reverse` into the last.
extern "C" __global__ void __launch_bounds__(THREADS)
join(const store* __restrict__ A, const store* __restrict__ initial, pack* ends, const real* __restrict__ totals, int dim,
     int size, int heads, int segments, int blocks, int reverse) {
  const int q = blockIdx.x % PACKS, c = q * VEC / STATES, first = q * VEC % STATES;
  const Seat p(blockIdx.x / PACKS / blocks, blockIdx.x / PACKS % blocks);
  real rate[VEC];
  pack state;
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    const bool there = p.has(c, first + v, dim, size);
    const int channel = p.channel ^ c;
    rate[v] = !there ? 0
              : HEADS ? widen(A[channel / (dim / heads)]) / BASE
                      : widen(A[(i64)channel * size + p.lane * STATES + first + v]) / BASE;
    state.v[v] = initial != nullptr && there ? widen(initial[p.state(c, first + v, dim, size)]) : 0;
  }
  for (int k = 0; k < segments; ++k) {
    const i64 row = p.sequence * segments + (reverse ? segments - 1 - k : k);
    pack* const here = ends + p.packs(row, blocks) + q * THREADS;
    const pack end = *here;
    const real total = totals[(row * blocks + p.block) * THREADS + (threadIdx.x ^ c)];
    *here = state;
#pragma unroll
    for (int v = 0; v < VEC; ++v) state.v[v] = power(total * rate[v]) * state.v[v] + end.v[v];
  }
}
