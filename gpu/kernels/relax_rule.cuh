// When a chunk has been iterated enough, and what is said of it; section 7 of docs/mathematics.md.
#pragma once
#include "common.cuh"

#define CONVERGED 0
#define MAX_ITER 1
#define DIVERGED 2

// The part of the tolerance that one chunk may use up. An error carried in leaves the chunk multiplied by `decay` =
// max_d prod_t |lam| at most: errors of 1 - decay, or of 1 / chunks, add up to one. Half of that: the other half is for
// what the mixing makes of the carried error.
__device__ __forceinline__ double tolerance_share(i64 chunks, double decay) {
  return chunks == 1 ? 1.0 : 0.5 * fmax(1.0 / (double)chunks, 1.0 - decay);
}

// One chunk on its way. `scale` includes the chunks before; the change is that of the last iteration.
struct Chunk {
  i64 count;
  double change, scale;
  bool converged;

  __device__ __forceinline__ bool goes_on(i64 max_iter) const {
    return !converged && is_finite(change) && count < max_iter;
  }
  __device__ __forceinline__ void iterated(double dh, double size, double before, double share, double eps,
                                           double rtol, double atol) {
    ++count;
    change = dh;
    scale = size > before ? size : before;  // drops a NaN, which the change keeps
    converged = is_finite(dh) && dh <= fmax(share * (atol + rtol * scale), 4 * eps * scale);
  }
};

// A sequence: the largest last change of any chunk, the largest value, the worst status
struct Outcome {
  double change, scale;
  int status;

  __device__ __forceinline__ void add(const Chunk& chunk) {
    if (!chunk.converged) status = max(status, is_finite(chunk.change) ? MAX_ITER : DIVERGED);
    scale = chunk.scale;
    if (!(chunk.change <= change)) change = chunk.change;  // keeps a NaN
  }
};
