// An index costs a few instructions either way, and the next does not wait for it: its upper part is where the next 1
// is, its lower part lies at a place that is known beforehand. So plain loops are faster than memory hands out values.

#include "../ops/index_code.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "index_values.h"

namespace saft::cpu {
namespace {

static_assert(std::endian::native == std::endian::little, "eight bytes of a code are read as one number");

constexpr int kWord = 8;  // bytes

// A sequence of bits; numbers of up to 57 bits are read from it and written to it.
class Bits {
 public:
  Bits(uint8_t* data, int64_t bytes) : data_(data), bytes_(bytes) {}

  uint64_t word(int64_t byte) const {
    uint64_t word = 0;
    if (byte + kWord <= bytes_)
      std::memcpy(&word, data_ + byte, kWord);
    else
      std::memcpy(&word, data_ + byte, static_cast<size_t>(bytes_ - byte));
    return word;
  }

  uint64_t number(int64_t bit) const { return word(bit / 8) >> (bit % 8); }

  // Where only zeros have been written yet.
  void write(int64_t bit, uint64_t number) {
    const uint64_t written = word(bit / 8) | number << (bit % 8);
    if (bit / 8 + kWord <= bytes_)
      std::memcpy(data_ + bit / 8, &written, kWord);
    else
      std::memcpy(data_ + bit / 8, &written, static_cast<size_t>(bytes_ - bit / 8));
  }

  void set(int64_t bit) { data_[bit / 8] |= static_cast<uint8_t>(1 << (bit % 8)); }

  // Whether the bits from this one to the end of its byte are zeros.
  bool filled_with_zeros(int64_t bit) const { return bit % 8 == 0 || data_[bit / 8] >> (bit % 8) == 0; }

 private:
  uint8_t* data_;
  int64_t bytes_;
};

uint64_t low_mask(const IndexCode& layout) {
  return (uint64_t{1} << layout.low_bits) - 1;
}

template <typename Index>
void encode(const Index* indices, const IndexCode& layout, uint8_t* code) {
  std::fill_n(code, layout.bytes(), uint8_t{0});  // none of no indices, whose code lies nowhere
  Bits low(code, layout.low_bytes), high(code + layout.low_bytes, layout.high_bytes);
  for (int64_t i = 0; i < layout.n; ++i) {
    const auto index = static_cast<uint64_t>(indices[i]);
    if (layout.low_bits) low.write(i * layout.low_bits, index & low_mask(layout));
    high.set(static_cast<int64_t>(index >> layout.low_bits) + i);
  }
}

// Whether the code is that of n increasing indices below numel.
template <typename Index>
bool decode(uint8_t* code, const IndexCode& layout, Index* indices) {
  // Reading a lower part may go on into the upper ones, which are masked.
  const Bits low(code, layout.bytes()), high(code + layout.low_bytes, layout.high_bytes);
  const uint64_t mask = low_mask(layout);
  int64_t i = 0, previous = -1;
  bool increase = true;
  for (int64_t byte = 0; byte < layout.high_bytes; byte += kWord) {
    for (uint64_t ones = high.word(byte); ones; ones &= ones - 1) {
      if (i == layout.n) return false;
      const int64_t upper = 8 * byte + std::countr_zero(ones) - i;
      const int64_t lower = static_cast<int64_t>(low.number(i * layout.low_bits) & mask);
      const int64_t index = upper << layout.low_bits | lower;
      increase &= index > previous;
      previous = index;
      indices[i++] = static_cast<Index>(index);
    }
  }
  return i == layout.n && increase && previous < layout.numel && low.filled_with_zeros(layout.n * layout.low_bits);
}

Tensor encode_indices(const Tensor& indices, int64_t numel) {
  const Indices index = check_encode(indices, numel);
  require_increase_below(index, numel, "indices");
  const IndexCode layout = index_code(index.n, numel);
  Tensor code = torch::stable::new_empty(indices, {layout.bytes()}, ScalarType::Byte);
  auto* bytes = code.mutable_data_ptr<uint8_t>();
  if (index.wide)
    encode(static_cast<const int64_t*>(index.data), layout, bytes);
  else
    encode(static_cast<const int32_t*>(index.data), layout, bytes);
  return code;
}

Tensor decode_indices(const Tensor& code, int64_t n, int64_t numel) {
  const IndexCode layout = check_decode(code, n, numel);
  const bool wide = numel >= int64_t{1} << 31;
  Tensor indices = torch::stable::new_empty(code, {n}, wide ? ScalarType::Long : ScalarType::Int);
  auto* bytes = const_cast<uint8_t*>(code.const_data_ptr<uint8_t>());  // which are only read
  const bool valid = wide ? decode(bytes, layout, indices.mutable_data_ptr<int64_t>())
                          : decode(bytes, layout, indices.mutable_data_ptr<int32_t>());
  STD_TORCH_CHECK(valid, "this is no code of ", n, " increasing indices below ", numel);
  return indices;
}

}  // namespace
}  // namespace saft::cpu

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("encode_indices", TORCH_BOX(&saft::cpu::encode_indices));
  m.impl("decode_indices", TORCH_BOX(&saft::cpu::decode_indices));
}
