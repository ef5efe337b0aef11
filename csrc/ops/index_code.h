// encode_indices, decode_indices: sorted flat indices <-> the bytes that a delta file keeps of them.
//
// encode_indices(indices [n], int numel) -> uint8 [size]
// decode_indices(code uint8 [size], int n, int numel) -> [n]
//
// The code is that of Elias (1974) and Fano (1971), as in Vigna, "Quasi-succinct indices" (2013), section 3. With
// w = floor(log2(numel / n)), it holds two sequences of bits, each filled up to whole bytes with zeros, the lowest bit
// of a byte being its first:
// - the w lower bits of every index, lowest first: n w bits;
// - n + ((numel - 1) >> w) bits, of which number (index >> w) + i is 1 for index i, and the others 0.
// That is at most 2 + log2(numel / n) bits for an index, wherever the indices lie.
//
// Contract
// - indices: int32 or int64, strictly increasing, in [0, numel); what decode_indices returns is int32, from 2**31
//   elements on int64.
// - n and numel say how long a code is, and there is one code of these indices: decode_indices refuses every other, so
//   that what it returns is sorted and in range whatever it was given. It reads and writes nothing beyond them.
// - Both run on the CPU, where files are read and written.
#pragma once

#include "checks.h"
#include "jobs.h"

namespace saft {

// Where the parts of a code lie.
struct IndexCode {
  int64_t n, numel;
  int low_bits;  // of every index, as they are
  int64_t low_bytes, high_bytes;

  int64_t bytes() const { return low_bytes + high_bytes; }
};

// That of n indices below numel.
IndexCode index_code(int64_t n, int64_t numel);

// The values of the indices are not checked yet.
Indices check_encode(const Tensor& indices, int64_t numel);
IndexCode check_decode(const Tensor& code, int64_t n, int64_t numel);

}  // namespace saft
