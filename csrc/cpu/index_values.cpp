#include "index_values.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace saft::cpu {
namespace {

template <typename Index>
bool increase_below(const Index* index, int64_t begin, int64_t end, int64_t numel) {
  if (begin == end) return true;
  if (index[begin] < 0 || index[end - 1] >= numel) return false;
  Index disorder = 0;  // as wide as an index: the compiler then compares whole vectors
  for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) disorder |= index[i - 1] >= index[i];
  return disorder == 0;
}

}  // namespace

bool increase_below(const Indices& indices, int64_t begin, int64_t end, int64_t numel) {
  return indices.wide ? increase_below(static_cast<const int64_t*>(indices.data), begin, end, numel)
                      : increase_below(static_cast<const int32_t*>(indices.data), begin, end, numel);
}

void require_increase_below(bool holds, int64_t limit, const char* name, const char* of) {
  STD_TORCH_CHECK(holds, name, " must increase strictly and lie within the ", limit, " ", of);
}

void require_increase_below(const Indices& indices, int64_t limit, const char* name, const char* of) {
  require_increase_below(increase_below(indices, 0, indices.n, limit), limit, name, of);
}

void require_offsets(const int32_t* offsets, int64_t rows, int64_t n) {
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[rows] == n && std::is_sorted(offsets, offsets + rows + 1),
                  "offsets must rise from 0 to the number of entries, ", n, ", in ", rows + 1, " values");
}

void require_columns(const int32_t* columns, int64_t n, int64_t limit, const char* of) {
  uint32_t largest = 0;  // of unsigned values, so that negative ones are too large
  for (int64_t e = 0; e < n; ++e) largest = std::max(largest, static_cast<uint32_t>(columns[e]));
  STD_TORCH_CHECK(n == 0 || largest < limit, "columns must lie within the ", limit, " ", of);
}

}  // namespace saft::cpu
