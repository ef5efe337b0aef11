// What kernels are given, on every backend: plain pointers and sizes, made by the checks of each operation.
//
// No header of torch is included here: kernel files are compiled with this alone.
#pragma once

#include <cstdint>
#include <limits>

namespace saft {

// The floating types that kernels compute with; `none` is that of a gradient that is absent.
enum class FloatType { none, fp32, bf16, fp16, fp64 };

constexpr int kMaxDims = 8;

// A tensor's shape and strides, adjacent dimensions merged where memory allows; dims = 0 means contiguous.
struct Strided {
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
};

// Flat indices, 32 or 64 bits wide.
struct Indices {
  const void* data;
  bool wide;
  int64_t n;

  Indices slice(int64_t begin, int64_t end) const {
    return {static_cast<const char*>(data) + begin * (wide ? 8 : 4), wide, end - begin};
  }
};

// 1 accumulate_topk ---------------------------------------------------------------------------------------------------

// Mirrors saft_kernels/layout.py.
constexpr int kPositionBits = 40;
constexpr int64_t kMaxElements = int64_t{1} << kPositionBits;
constexpr int64_t kMaxKeys = int64_t{1} << (63 - kPositionBits);

// A value's bin in the histogram: the exponent and the 6 leading mantissa bits of a non-negative float, so that
// bins are ordered as values are and 1.6% wide.
constexpr int kBinShift = 17;
constexpr int kBins = 1 << (31 - kBinShift);

// kBin: the highest bin whose lower edge k candidates have reached; kAbove: candidates so far in it and above. kFresh,
// kDone and kRefill are of a GPU call under way: candidates found, blocks that are done, and whether the candidates did
// not fit. The first two are zero between calls, kRefill is written before it is read; the CPU uses none of them.
enum StateSlot : int {
  kCount,
  kThreshold,
  kTie,
  kNonFinite,
  kBin,
  kAbove,
  kFresh,
  kDone,
  kRefill,
  kHistogram,
  kStateSize = kHistogram + kBins
};

constexpr int64_t kNoThreshold = -1;
constexpr int64_t kNoPosition = std::numeric_limits<int64_t>::max();

// acc += scale * grad, then |acc| offered from position `base` on.
struct Scan {
  float* acc;        // [n], changed in place
  const void* grad;  // [n] of `type`, or null
  FloatType type;
  float scale;
  bool square;
  int64_t n;
  int64_t base;
};

// The caller's buffer of candidates; see accumulate_topk.h.
struct TopkBuffer {
  int64_t k;
  int64_t capacity;
  float* values;
  int64_t* positions;
  int64_t* state;
};

// 2 gather, scatter ---------------------------------------------------------------------------------------------------

struct GatherScatter {
  void* dense;
  void* values;      // [indices.n], contiguous
  int element_size;  // 1, 2, 4 or 8 bytes: values are moved as bits
  int64_t numel;     // of dense
  Strided layout;    // of dense
  Indices indices;
};

// 3 sparse_adamw ------------------------------------------------------------------------------------------------------

// One tensor of a step.
struct AdamWTensor {
  void* param;
  const void* grad;  // dense, of the type of param; null if there is a compact gradient
  int64_t numel;
  Strided param_layout;
  Strided grad_layout;
};

// Compact vectors, [indices.n] each.
struct AdamWVectors {
  Indices indices;
  const float* grad;  // null if gradients are dense
  float* exp_avg;
  float* exp_avg_sq;
  float* master;  // null for fp32

  AdamWVectors slice(int64_t begin, int64_t end) const {
    return {indices.slice(begin, end), grad ? grad + begin : nullptr, exp_avg + begin, exp_avg_sq + begin,
            master ? master + begin : nullptr};
  }
};

// 4 sampled_grad ------------------------------------------------------------------------------------------------------

// Tokens of a packed column that lie side by side.
constexpr int64_t kTokens = 16;

// A matrix of `tokens` rows, element (t, i) at data[t * token_stride + i * column_stride].
struct TokenMajor {
  const void* data;
  FloatType type;
  int64_t tokens;
  int64_t width;
  int64_t token_stride;
  int64_t column_stride;
};

struct PackColumns {
  TokenMajor x;  // its width as a column stands for ones
  const int32_t* columns;
  int64_t n_columns;
  FloatType packed_type;  // that of x, or for fp32 any of fp32, bf16, fp16
  void* packed;           // [ceil(tokens / kTokens), n_columns, kTokens]
};

// Which entries of a weight are wanted, row by row.
struct RowPlan {
  const int32_t* rows;     // [n_rows]
  const int32_t* offsets;  // [n_rows + 1]
  const int32_t* columns;  // [n]
  int64_t n_rows;
  int64_t n;
};

struct SampledGrad {
  TokenMajor grad_output;
  const void* packed;
  int64_t n_columns;
  RowPlan plan;
  void* grad;  // [n], fp32, or fp64 for fp64
};

struct SampledEmbeddingGrad {
  TokenMajor grad_output;
  const int64_t* tokens;
  RowPlan plan;
  void* grad;  // [n], fp32, or fp64 for fp64
};

}  // namespace saft
