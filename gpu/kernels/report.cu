// What became of each sequence of a solve, put together on the device: residual, iterations, status; section 7 of
// docs/mathematics.md.
//
// One block per sequence. A sequence that went wrong has its inputs looked through for what is not finite, and nobody
// else's are read: the traffic is a few numbers per sequence.
#include "common.cuh"

#define CONVERGED 0
#define DIVERGED 2
#define NONFINITE_INPUT 3
#define ILL_CONDITIONED 4

#define FIELDS(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
// An array, and how many elements each sequence has of it; negative: all of them share so many.
#define FIELD(i) , const store *field##i, i64 size##i

// counts (B, chunks); change, scale, rcond and state (B, parts)
extern "C" __global__ void __launch_bounds__(256)
report(const int* counts, i64 chunks, const double* change, const double* scale, const double* rcond, const int* state,
       int parts, int direct, double eps, double tiny, i64* iterations, double* residual, signed char* status,
       i64* chunk_iterations FIELDS(FIELD)) {
  const i64 b = blockIdx.x;
  SHARED(memory);
  int* most = (int*)memory;
  if (threadIdx.x == 0) { most[0] = 0; most[1] = 0; }
  __syncthreads();
  int mine = 0;
  for (i64 c = threadIdx.x; c < chunks; c += blockDim.x) {
    const int count = direct ? 1 : counts[b * chunks + c];
    chunk_iterations[b * chunks + c] = count;
    mine = max(mine, count);
  }
  atomicMax(most, mine);
  double largest = 0, size = 0, condition = 1;
  int worst = CONVERGED;
  for (int k = 0; k < parts; ++k) {
    const double d = change[b * parts + k], c = rcond[b * parts + k];
    if (!(d <= largest)) largest = d;  // keeps a NaN
    if (!(c >= condition)) condition = c;
    size = fmax(size, scale[b * parts + k]);
    worst = max(worst, state[b * parts + k]);
  }
  if (worst == DIVERGED || worst == ILL_CONDITIONED) {  // the same in every thread
    bool bad = false;
    auto look = [&](const store* data, i64 size) {
      const i64 each = size < 0 ? -size : size, from = size < 0 ? 0 : b * each;
      for (i64 i = threadIdx.x; i < each; i += blockDim.x) bad |= !is_finite(widen(data[from + i]));
    };
#define LOOK(i) look(field##i, size##i);
    FIELDS(LOOK)
    if (bad) atomicMax(most + 1, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    iterations[b] = most[0];
    residual[b] = direct ? (chunks ? eps / condition : 0.0) : largest / fmax(size, tiny);
    status[b] = (signed char)(most[1] ? NONFINITE_INPUT : worst);
  }
}
