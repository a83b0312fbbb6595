// States of FP-Mamba made again, H_t = exp(delta_t A) * H_{t-1} + (delta_t u_t) B_t^T, where u is known; see mamba.cuh.
//
// A block takes GROUP channels of a sequence through the steps, its states in registers. Memory traffic: rows once, every state
// written once.
#include "mamba.cuh"

// u (B, T, D); delta (B, T, D) or (B, T, heads); A (D, N) or (heads); B (B, T, N); before (B, D, N) is the state before step `first`,
// after (count, B, D, N) receives those after that step and the next.
extern "C" __global__ void __launch_bounds__(THREADS)
mamba_states(const store* u, const store* delta, const store* A, const store* B, const store* before, store* after, i64 batch,
             i64 steps, i64 first, i64 count, int dim, int size, int heads) {
  const int groups = (dim + GROUP - 1) / GROUP, d = blockIdx.x % groups * GROUP + threadIdx.x / LANES;
  const i64 b = blockIdx.x / groups;
  if (d >= dim) return;
  real now[PIECES][VECTOR];
#pragma unroll
  for (int piece = 0; piece < PIECES; ++piece) load_part(before + (b * dim + d) * size, size, piece_begin(piece), now[piece]);
  for (i64 k = 0; k < count; ++k) {
    const i64 row = b * steps + first + k;
    const Inputs in = {nullptr, nullptr, delta + row * (HEADS ? heads : dim), A, nullptr, dim, size, heads};
    const real dt = in.step(d), drive = dt * widen(u[row * dim + d]);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int n = piece_begin(piece);
      real rate[VECTOR], decay[VECTOR], into[VECTOR];
      in.decays(d, dt, n, rate, decay);
      load_part(B + row * size, size, n, into);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) now[piece][v] = decay[v] * now[piece][v] + drive * into[v];
      store_part(after + ((k * batch + b) * dim + d) * size, size, n, now[piece]);
    }
  }
}
