// The tensors of a sparse_adamw_ step as its kernel gets them: a table that travels by value with the launch. Nothing
// is copied to the device for it, and a captured CUDA graph holds a table of its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../ops/jobs.h"

namespace saft::cuda {

// What one launch can take; a step with more tensors or layouts is launched in parts. The table is then 15 KB of the 32
// that parameters of a kernel may have (CUDA 12.1, sm_70), and takes the 302 tensors of CLIP ViT-B/16 at once.
constexpr int kMaxSegments = 384;
constexpr int kMaxPooledDims = 192;
static_assert(kMaxPooledDims >= 2 * kMaxDims, "a tensor and its gradient always fit");

struct Dim {
  int64_t size, stride;
};

// Dimensions [first, first + dims) of the pool; dims = 0 means contiguous.
struct PooledLayout {
  uint16_t first : 12;
  uint16_t dims : 4;
};

// One tensor and its entries, [first_entry, that of the next segment), which its own blocks take.
struct Segment {
  void* param;
  const void* grad;  // dense; null if there is a compact gradient
  int64_t first_entry;
  int first_block;
  PooledLayout param_layout;
  PooledLayout grad_layout;
};

struct AdamWTable {
  Segment segments[kMaxSegments + 1];  // one more, where the last one ends
  Dim pool[kMaxPooledDims];
  int count;
};

// Fills a table with tensors until they end or it is full.
class TableFiller {
 public:
  // Entries and blocks are counted in chunks of entries whose place in the vectors is a multiple of `chunk`, `shift`
  // entries after which the vectors begin.
  TableFiller(AdamWTable& table, int chunk, int shift, int chunks_per_block)
      : table_(table), chunk_(chunk), shift_(shift), chunks_per_block_(chunks_per_block) {
    table_.count = 0;
    table_.segments[0].first_block = 0;
  }

  // Whether there was room for the tensor with entries [begin, end).
  bool add(const AdamWTensor& tensor, int64_t begin, int64_t end) {
    if (table_.count == kMaxSegments) return false;
    Segment& segment = table_.segments[table_.count];
    const int dims_before = pooled_;
    if (!pool(tensor.param_layout, segment.param_layout) || !pool(tensor.grad_layout, segment.grad_layout)) {
      pooled_ = dims_before;
      return false;
    }
    segment.param = tensor.param;
    segment.grad = tensor.grad;
    segment.first_entry = begin;
    Segment& next = table_.segments[++table_.count];
    next.first_entry = end;
    next.first_block = segment.first_block + blocks(begin, end);
    return true;
  }

 private:
  int blocks(int64_t begin, int64_t end) const {
    if (begin == end) return 0;
    const int64_t chunks = (end - 1 + shift_) / chunk_ - (begin + shift_) / chunk_ + 1;
    return static_cast<int>((chunks + chunks_per_block_ - 1) / chunks_per_block_);
  }

  // Layouts repeat: a gradient mostly has its parameter's, and the layers of a network each other's.
  bool pool(const Strided& layout, PooledLayout& pooled) {
    const int dims = layout.dims;
    int first = 0;
    while (first + dims <= pooled_ && !holds(first, layout)) ++first;
    if (first + dims > pooled_) {
      if (pooled_ + dims > kMaxPooledDims) return false;
      first = pooled_;
      for (int d = 0; d < dims; ++d) table_.pool[pooled_++] = {layout.sizes[d], layout.strides[d]};
    }
    pooled = {static_cast<uint16_t>(first), static_cast<uint16_t>(dims)};
    return true;
  }

  bool holds(int first, const Strided& layout) const {
    const Dim* dims = table_.pool + first;
    for (int d = 0; d < layout.dims; ++d)
      if (dims[d].size != layout.sizes[d] || dims[d].stride != layout.strides[d]) return false;
    return true;
  }

  AdamWTable& table_;
  const int chunk_, shift_, chunks_per_block_;
  int pooled_ = 0;
};

}  // namespace saft::cuda
