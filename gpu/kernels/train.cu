// A step of training beside the network: data, loss, optimiser and what is told of the step, none of which waits for the
// host. What a step does depends on `step`, a number on the device, so that one recording serves all of them.
//
// Macros: STORE; THREADS of a block.
#include "sums.cuh"

// --- data: Philox 4x32-10 (Salmon et al., SC 2011), counted by step, sequence and position --------------------------

struct Four {
  u32 v[4];
};

__device__ __forceinline__ u32 high(u32 a, u32 b) { return (u32)(((unsigned long long)a * b) >> 32); }

__device__ __forceinline__ Four philox(Four c, u32 k0, u32 k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u32 a = 0xD2511F53u, b = 0xCD9E8D57u;
    c = {{high(b, c.v[2]) ^ c.v[1] ^ k0, b * c.v[2], high(a, c.v[0]) ^ c.v[3] ^ k1, a * c.v[0]}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Uniform elements of a group of `order`, their running products by `table` (state, element), and the number of the step
// counted from zero; a thread a sequence. tokens, targets (B, T)
extern "C" __global__ void __launch_bounds__(THREADS)
word_problem(const int* table, i64 order, i64 identity_first, i64 seed, const i64* step, i64 batch, i64 steps, i64* tokens,
             i64* targets) {
  const i64 b = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (b >= batch) return;
  const i64 now = *step;
  int state = 0;
  Four drawn = {};
  for (i64 t = 0; t < steps; ++t) {
    if (t % 4 == 0) drawn = philox({{(u32)now, (u32)(now >> 32), (u32)b, (u32)(t / 4)}}, (u32)seed, (u32)(seed >> 32));
    int token = (int)high(drawn.v[t % 4], (u32)order);
    if (t == 0 && identity_first) token = 0;
    state = table[state * order + token];
    tokens[b * steps + t] = token;
    targets[b * steps + t] = state;
  }
}

// --- loss -----------------------------------------------------------------------------------------------------------

// The number of targets that count; one block.
extern "C" __global__ void __launch_bounds__(THREADS) count_targets(const i64* targets, i64 rows, i64 ignore, i64* count) {
  SHARED(memory);
  i64* found = (i64*)memory;
  i64 mine = 0;
  for (i64 r = threadIdx.x; r < rows; r += THREADS) mine += targets[r] != ignore;
  found[threadIdx.x] = mine;
  for (int reach = THREADS / 2; reach > 0; reach /= 2) {
    __syncthreads();
    if (threadIdx.x < reach) found[threadIdx.x] += found[threadIdx.x + reach];
  }
  if (threadIdx.x == 0) *count = found[0];
}

// Mean cross-entropy of logits (rows, classes): its gradient `bar`, and of each block the sum of the losses and of the right
// answers (ties go to the first), in `told` (blocks, 2). A warp a row. Memory traffic: logits three times, twice from the
// caches, bar once.
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy(const store* logits, const i64* targets, i64 rows, i64 classes, i64 ignore, const i64* count, store* bar,
              double* told) {
  SHARED(memory);
  double* sums = (double*)memory;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 row = (i64)blockIdx.x * (THREADS / 32) + warp;
  double loss = 0, right = 0;
  if (row < rows) {
    const store* own = logits + row * classes;
    real top = -LARGEST;
    i64 at = classes;
    for (i64 k = lane; k < classes; k += 32) {
      const real v = widen(own[k]);
      if (v > top) {
        top = v;
        at = k;
      }
    }
#pragma unroll
    for (int reach = 16; reach > 0; reach /= 2) {
      const real other = __shfl_xor_sync(EVERY_LANE, top, reach);
      const i64 there = __shfl_xor_sync(EVERY_LANE, at, reach);
      if (other > top || (other == top && there < at)) {
        top = other;
        at = there;
      }
    }
    real total = 0;
    for (i64 k = lane; k < classes; k += 32) total += exp(widen(own[k]) - top);
#pragma unroll
    for (int reach = 16; reach > 0; reach /= 2) total += __shfl_xor_sync(EVERY_LANE, total, reach);
    const i64 target = targets[row];
    const bool counts = target != ignore && target >= 0 && target < classes;
    const real share = counts ? 1 / (real)*count : (real)0;
    for (i64 k = lane; k < classes; k += 32) {
      const real p = exp(widen(own[k]) - top) / total;
      bar[row * classes + k] = narrow(share * (p - (real)(k == target)));
    }
    if (counts && lane == 0) {
      loss = (double)(log(total) + top - widen(own[target]));
      right = at == target;
    }
  }
  if (lane == 0) {
    sums[2 * warp] = loss;
    sums[2 * warp + 1] = right;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    double all = 0;
    for (int w = 0; w < THREADS / 32; ++w) all += sums[2 * w + threadIdx.x];
    told[2 * (i64)blockIdx.x + threadIdx.x] = all;
  }
}

// --- optimiser: AdamW with clipping by the global norm, all parameters at once ---------------------------------------

__device__ __forceinline__ double block_total(double v, double* room) {
  room[threadIdx.x] = v;
  for (int reach = THREADS / 2; reach > 0; reach /= 2) {
    __syncthreads();
    if (threadIdx.x < reach) room[threadIdx.x] += room[threadIdx.x + reach];
  }
  __syncthreads();
  return room[0];
}

// Parameters lie in one array. A block has a piece of one of them: `pieces` (blocks, 4) are the number of the parameter,
// where the piece begins in it and in the array, and how many numbers it has. `grads` are addresses of gradients.

// The sum of squares of each piece's gradient.
extern "C" __global__ void __launch_bounds__(THREADS)
squares(const i64* pieces, const i64* grads, double* found) {
  SHARED(memory);
  const i64* piece = pieces + 4 * (i64)blockIdx.x;
  const store* g = (const store*)grads[piece[0]] + piece[1];
  double mine = 0;
  for (i64 k = threadIdx.x; k < piece[3]; k += THREADS) {
    const double v = (double)widen(g[k]);
    mine += v * v;
  }
  const double all = block_total(mine, (double*)memory);
  if (threadIdx.x == 0) found[blockIdx.x] = all;
}

// The step itself; `decays` says of each parameter whether weight decay reaches it. `norm` is told.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw(const i64* pieces, const i64* grads, const double* found, i64 blocks, const i64* decays, const double* rates,
      const i64* step, double clip, double weight_decay, double b1, double b2, double eps, store* p, store* m, store* v,
      double* norm) {
  SHARED(memory);
  double mine = 0;
  for (i64 k = threadIdx.x; k < blocks; k += THREADS) mine += found[k];
  const double length = sqrt(block_total(mine, (double*)memory));
  const double rate = rates[*step], count = (double)(*step + 1);
  const double first = 1 - pow(b1, count), second = sqrt(1 - pow(b2, count));
  const i64* piece = pieces + 4 * (i64)blockIdx.x;
  const store* g = (const store*)grads[piece[0]] + piece[1];
  const real scale = (real)(clip > 0 && length > clip ? clip / length : 1.0);
  const real decay = (real)(decays[piece[0]] ? rate * weight_decay : 0.0), pace = (real)(rate * second / first);
  const real small = (real)(eps * second), keep1 = (real)b1, keep2 = (real)b2;
  for (i64 k = threadIdx.x; k < piece[3]; k += THREADS) {
    const i64 at = piece[2] + k;
    const real grad = scale * widen(g[k]);
    const real moment = keep1 * widen(m[at]) + (1 - keep1) * grad;
    const real square = keep2 * widen(v[at]) + (1 - keep2) * grad * grad;
    m[at] = narrow(moment);
    v[at] = narrow(square);
    p[at] = narrow((1 - decay) * widen(p[at]) - pace * moment / (sqrt(square) + small));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *norm = length;
}

// --- what is told of a step -----------------------------------------------------------------------------------------

// Loss, accuracy, norm of the gradient, and of the solves the mean and the most iterations and the share that did not
// converge (status other than 0), into row `step % size` of `log` (size, 6); then the step is over. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
tell(const double* told, i64 blocks, const i64* count, const double* norm, const i64* iterations, const signed char* status,
     i64 solves, i64 size, double* log, i64* step) {
  SHARED(memory);
  double* room = (double*)memory;
  double loss = 0, right = 0, all = 0, most = 0, failed = 0;
  for (i64 k = threadIdx.x; k < blocks; k += THREADS) {
    loss += told[2 * k];
    right += told[2 * k + 1];
  }
  for (i64 k = threadIdx.x; k < solves; k += THREADS) {
    const double n = (double)iterations[k];
    all += n;
    most = n > most ? n : most;
    failed += status[k] != 0;
  }
  loss = block_total(loss, room);
  __syncthreads();
  right = block_total(right, room);
  __syncthreads();
  all = block_total(all, room);
  __syncthreads();
  failed = block_total(failed, room);
  __syncthreads();
  room[threadIdx.x] = most;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 1; k < THREADS; ++k) most = room[k] > most ? room[k] : most;
    const double counted = *count > 0 ? (double)*count : 1.0, solved = solves > 0 ? (double)solves : 1.0;
    double* row = log + 6 * (*step % size);
    row[0] = loss / counted;
    row[1] = right / counted;
    row[2] = *norm;
    row[3] = all / solved;
    row[4] = most;
    row[5] = failed / solved;
    *step += 1;
  }
}
