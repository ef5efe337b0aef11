#include "index_code.h"

#include "indices.h"

namespace saft {
namespace {

int floor_log2(int64_t x) {
  int log = 0;
  while (x >>= 1) ++log;
  return log;
}

int64_t bytes_of(int64_t bits) {
  return (bits + 7) / 8;
}

void check_sizes(int64_t n, int64_t numel) {
  STD_TORCH_CHECK(numel >= 0 && numel <= kMaxElements, "numel must lie between 0 and ", kMaxElements, ", not at ",
                  numel);
  STD_TORCH_CHECK(n >= 0 && n <= numel, "there cannot be ", n, " different indices below ", numel);
}

}  // namespace

IndexCode index_code(int64_t n, int64_t numel) {
  if (n == 0) return {0, numel, 0, 0, 0};
  const int low_bits = floor_log2(numel / n);
  return {n, numel, low_bits, bytes_of(n * low_bits), bytes_of(n + ((numel - 1) >> low_bits))};
}

Indices check_encode(const Tensor& indices, int64_t numel) {
  const Indices index = index_vector(indices, kCpu, "indices");
  check_sizes(index.n, numel);
  return index;
}

IndexCode check_decode(const Tensor& code, int64_t n, int64_t numel) {
  check_vector(code, kCpu, ScalarType::Byte, "code");
  check_sizes(n, numel);
  const IndexCode layout = index_code(n, numel);
  STD_TORCH_CHECK(code.numel() == layout.bytes(), "the code of ", n, " indices below ", numel, " has ", layout.bytes(),
                  " bytes, not ", code.numel());
  return layout;
}

}  // namespace saft
