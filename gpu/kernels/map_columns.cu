// Sums of the columns of a matrix, for some of its rows at a time: x (N, D) to (parts, D), part p of rows N p / parts on.
// A second launch adds up the parts of the first.
//
// `lanes` threads side by side take EACH columns each, the threads of a block every so many rows of a part, in four strands;
// they are put together in a fixed order. Memory traffic: x once, and D sums a part.
//
// Macros: of maps.cuh; OUT of the sums.
#include "maps.cuh"

extern "C" __global__ void __launch_bounds__(256)
columns(const store* __restrict__ x, OUT* __restrict__ out, i64 rows, int dim, int lanes, int parts) {
  SHARED(memory);
  real* room = (real*)memory;  // EACH numbers of every thread
  const int groups = blockDim.x / lanes, group = threadIdx.x / lanes, across = (dim + EACH * lanes - 1) / (EACH * lanes);
  const int d = (blockIdx.x % across * lanes + threadIdx.x % lanes) * EACH;
  const i64 part = blockIdx.x / across, last = rows * (part + 1) / parts;
  real strand[4][EACH] = {};
  if (d < dim)
    for (i64 row = rows * part / parts + group; row < last; row += 4 * groups) {
      real some[4][EACH];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (row + k * groups < last) load(x + (row + k * groups) * dim + d, some[k]);
        else clear(some[k]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int e = 0; e < EACH; ++e) strand[k][e] += some[k][e];
    }
  real total[EACH];
#pragma unroll
  for (int e = 0; e < EACH; ++e) total[e] = (strand[0][e] + strand[1][e]) + (strand[2][e] + strand[3][e]);
  for (int half = groups / 2; half > 0; half /= 2) {
    if (group >= half && group < 2 * half)
#pragma unroll
      for (int e = 0; e < EACH; ++e) room[e * blockDim.x + threadIdx.x] = total[e];
    __syncthreads();
    if (group < half)
#pragma unroll
      for (int e = 0; e < EACH; ++e) total[e] += room[e * blockDim.x + threadIdx.x + half * lanes];
  }
  if (group == 0 && d < dim) save(out + part * dim + d, total);
}
