// Which sequences have something that is not finite in some arrays: wild[b] = 1 then, and is left alone otherwise.
//
// The blocks of a sequence look at a part of each of its arrays. Memory traffic: every array once, and only of sequences
// that are asked about; several threads may write the same number.
//
// Macro: STORE.
#include "common.cuh"

#define FIELDS(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
// An array, or null, and how many elements each sequence has of it.
#define FIELD(i) , const store *field##i, i64 size##i

// wild, only (B); only null: all sequences are asked about, otherwise those where it is not zero
extern "C" __global__ void __launch_bounds__(256)
look(int* wild, const int* only, int parts FIELDS(FIELD)) {
  const i64 b = blockIdx.x / parts;
  const int part = blockIdx.x % parts;
  if (only && only[b] == 0) return;
  bool bad = false;
  auto over = [&](const store* data, i64 size) {
    if (!data) return;
    const i64 first = size * part / parts, last = size * (part + 1) / parts;
#pragma unroll 4
    for (i64 i = first + threadIdx.x; i < last; i += 256) bad |= !is_finite(widen(data[b * size + i]));
  };
#define LOOK(i) over(field##i, size##i);
  FIELDS(LOOK)
  if (bad) wild[b] = 1;
}
