// Threads scan disjoint ranges and collect what survives the threshold in small batches of their own. A batch is copied
// to the shared buffer under a lock; when the buffer is full, what no longer reaches the threshold is dropped. A thread
// that works with an old, lower threshold only hands over more candidates than needed: the result does not depend on
// when it notices.
//
// Of D values in random order about k (1 + ln(D / k)) beat the k best before them: eight times k for a thousandth of
// D. That holds only if the threshold follows closely, hence the histogram: it raises the threshold with every batch.

#include "../ops/accumulate_topk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <vector>

#include "accumulate_topk_kernel.h"
#include "numbers.h"

namespace saft::cpu {
namespace {

constexpr int64_t kChunk = 2048;         // elements per scan: a chunk of acc and grad stays in the L1 cache
constexpr int64_t kBatch = 4 * kChunk;   // candidates a thread can hold; then it waits for the lock
constexpr int64_t kEager = 512;          // candidates from which it takes the lock if nobody else has it
constexpr int64_t kGrain = 16 * kChunk;  // elements below which a second thread costs more than it brings

constexpr uint32_t kInfinity = 0x7f800000;

// What a candidate has to beat: bits above `bits`, or equal to them at a position below `tie`. Non-negative floats
// order as their bits do.
struct Bar {
  uint32_t bits = 0;
  int64_t tie = kNoPosition;

  bool admits(uint32_t candidate, int64_t position) const {
    return (candidate > bits) | ((candidate == bits) & (position < tie));
  }

  // The lowest value that can be admitted anywhere in a chunk that starts at `position`. Without the step up,
  // a tensor of equal values (zeros, say) would send every element past the tie to the slow path.
  float threshold_from(int64_t position) const { return from_bits(position < tie ? bits : bits + 1); }
};

Bar bar_of(const int64_t* state) {
  if (state[kThreshold] == kNoThreshold) return {};
  return {static_cast<uint32_t>(state[kThreshold]), state[kTie]};
}

// Moves the bin up while k candidates lie above its lower edge; that edge then bounds the k-th best from below.
// Candidates dropped from the buffer still count: they were offered, once each.
void raise_to_bin(const TopkBuffer& b) {
  int64_t& bin = b.state[kBin];
  while (bin + 1 < kBins && b.state[kAbove] - b.state[kHistogram + bin] >= b.k)
    b.state[kAbove] -= b.state[kHistogram + bin++];
  const int64_t edge = bin << kBinShift;
  if (b.state[kAbove] >= b.k && edge > b.state[kThreshold]) {
    b.state[kThreshold] = edge;
    b.state[kTie] = kNoPosition;
  }
}

// Keeps the candidates above the bar, and those equal to it up to the tie itself.
void drop_below(const TopkBuffer& b, Bar bar) {
  int64_t& count = b.state[kCount];
  count = accumulate_topk_kernels().keep(b.values, b.positions, count, bar.bits, bar.tie);
}

// Which candidates have values in [low, high).
std::vector<int64_t> between(const TopkBuffer& b, uint32_t low, uint32_t high) {
  const auto lies_between = [=](float value) { return bits_of(value) - low < high - low; };
  const int64_t count = b.state[kCount];
  std::vector<int64_t> found;
  found.reserve(std::count_if(b.values, b.values + count, lies_between));
  for (int64_t i = 0; i < count; ++i)
    if (lies_between(b.values[i])) found.push_back(i);
  return found;
}

// The k-th best candidate. It lies in the bin that the histogram has reached: fewer than k lie above that bin.
Bar kth_best(const TopkBuffer& b) {
  const auto edge = static_cast<uint32_t>(b.state[kBin] << kBinShift);
  const uint32_t next_edge = edge + (1u << kBinShift);
  const int64_t above =
      std::count_if(b.values, b.values + b.state[kCount], [=](float value) { return bits_of(value) >= next_edge; });
  std::vector<int64_t> candidates = between(b, edge, next_edge);
  const int64_t rank = b.k - above - 1;
  STD_TORCH_CHECK(rank >= 0 && rank < static_cast<int64_t>(candidates.size()),
                  "state does not fit the buffer: it was kept with another k");
  const auto better = [&](int64_t i, int64_t j) {
    return b.values[i] > b.values[j] || (b.values[i] == b.values[j] && b.positions[i] < b.positions[j]);
  };
  std::nth_element(candidates.begin(), candidates.begin() + rank, candidates.end(), better);
  const int64_t kth = candidates[rank];
  return {bits_of(b.values[kth]), b.positions[kth]};
}

void compact(const TopkBuffer& b) {
  if (b.k == 0) b.state[kCount] = 0;
  if (b.state[kCount] < b.k || b.k == 0) return;
  raise_to_bin(b);
  const Bar kth = kth_best(b);
  drop_below(b, kth);
  b.state[kThreshold] = kth.bits;
  b.state[kTie] = kth.tie;
}

// Drops what no longer reaches the threshold; where that is little (equal values, mostly), keeps only the k best.
void make_room(const TopkBuffer& b) {
  raise_to_bin(b);
  drop_below(b, bar_of(b.state));
  if (b.state[kCount] - b.k > (b.capacity - b.k) / 2) compact(b);
  STD_TORCH_CHECK(b.state[kCount] < b.capacity, "an entry was offered more often than the buffer has room for");
}

// What a thread has found since it last held the lock.
struct Batch {
  std::array<float, kBatch> values;
  std::array<int64_t, kBatch> positions;
  int64_t n = 0;
  int64_t nonfinite = kNoPosition;

  bool empty() const { return n == 0 && nonfinite == kNoPosition; }

  void clear() {
    n = 0;
    nonfinite = kNoPosition;
  }
};

// Appends the batch's candidates from `from` on, as many as there is room for; returns the first one left. Works on
// copies of the counters: the compiler cannot know that the vectors do not overlap them.
int64_t append_some(const TopkBuffer& b, const Batch& batch, int64_t from) {
  int64_t* const histogram = b.state + kHistogram;
  const int64_t bin = b.state[kBin], count = b.state[kCount];
  const int64_t n = std::min(batch.n - from, b.capacity - count);
  std::copy_n(batch.values.data() + from, n, b.values + count);
  std::copy_n(batch.positions.data() + from, n, b.positions + count);
  int64_t above = 0;
  for (int64_t i = from; i < from + n; ++i) {
    const int64_t own_bin = bits_of(batch.values[i]) >> kBinShift;
    ++histogram[own_bin];
    above += own_bin >= bin;
  }
  b.state[kCount] = count + n;
  b.state[kAbove] += above;
  return from + n;
}

// The buffer while several threads fill it.
class SharedBuffer {
 public:
  explicit SharedBuffer(const TopkBuffer& buffer) : b_(buffer) {}

  Bar bar() {
    const std::lock_guard lock(mutex_);
    return bar_of(b_.state);
  }

  // Changes whenever the bar may have risen.
  uint64_t version() const { return version_.load(std::memory_order_acquire); }

  // Unless `wait`, gives up and returns false while another thread holds the buffer.
  bool append(const Batch& batch, bool wait) {
    std::unique_lock lock(mutex_, std::defer_lock);
    if (wait) lock.lock();
    if (!wait && !lock.try_lock()) return false;
    b_.state[kNonFinite] = std::min(b_.state[kNonFinite], batch.nonfinite);
    if (batch.n == 0) return true;
    for (int64_t next = append_some(b_, batch, 0); next < batch.n; next = append_some(b_, batch, next)) make_room(b_);
    raise_to_bin(b_);
    version_.fetch_add(1, std::memory_order_release);
    return true;
  }

  bool selects() const { return b_.k > 0; }

 private:
  TopkBuffer b_;
  std::mutex mutex_;
  std::atomic<uint64_t> version_{1};
};

// One thread's share of a tensor.
class Worker {
 public:
  Worker(const Scan& scan, SharedBuffer& shared) : scan_(scan), shared_(shared) {}

  void run(int64_t begin, int64_t end) {
    const auto& kernels = accumulate_topk_kernels();
    for (; begin < end; begin += kChunk) {
      follow_bar();
      const float threshold = shared_.selects() ? bar_.threshold_from(scan_.base + begin) : from_bits(kInfinity);
      const int64_t n = kernels.scan(scan_, begin, std::min(begin + kChunk, end), threshold, offsets_.data());
      collect(begin, n);
      if (batch_.n >= kEager) flush(batch_.n > kBatch - kChunk);
    }
    flush(true);
  }

 private:
  void follow_bar() {
    const uint64_t now = shared_.version();
    if (now == seen_) return;
    seen_ = now;
    bar_ = shared_.bar();
  }

  // The survivors of a chunk that may be among the k best join the batch. Without a branch on the bar, as above.
  void collect(int64_t begin, int64_t n) {
    int64_t found = batch_.n;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t element = begin + offsets_[i];
      const uint32_t bits = bits_of(scan_.acc[element]) & 0x7fffffff;
      batch_.values[found] = from_bits(bits);
      batch_.positions[found] = scan_.base + element;
      if (bits >= kInfinity)
        batch_.nonfinite = std::min(batch_.nonfinite, scan_.base + element);
      else
        found += bar_.admits(bits, scan_.base + element);
    }
    batch_.n = found;
  }

  void flush(bool wait) {
    if (!batch_.empty() && shared_.append(batch_, wait)) batch_.clear();
  }

  const Scan& scan_;
  SharedBuffer& shared_;
  Bar bar_;
  uint64_t seen_ = 0;
  Batch batch_;
  std::array<int32_t, kChunk> offsets_;
};

TopkBuffer checked_buffer(int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  const TopkBuffer buffer = check_topk_buffer(k, values, positions, state, kCpu);
  const int64_t count = buffer.state[kCount], bin = buffer.state[kBin];
  STD_TORCH_CHECK(count >= 0 && count <= buffer.capacity, "state says ", count, " candidates, the buffer holds ",
                  buffer.capacity);
  STD_TORCH_CHECK(bin >= 0 && bin < kBins, "state was not made for this operation");
  return buffer;
}

void accumulate_topk_(const Tensor& acc, const std::optional<Tensor>& grad, double scale, bool square, int64_t key,
                      int64_t offset, int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  const Scan scan = check_scan(acc, grad, scale, square, key, offset, kCpu);
  SharedBuffer shared(checked_buffer(k, values, positions, state));
  torch::stable::parallel_for(0, scan.n, kGrain,
                              [&](int64_t begin, int64_t end) { Worker(scan, shared).run(begin, end); });
}

void compact_topk_(int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  compact(checked_buffer(k, values, positions, state));
}

}  // namespace
}  // namespace saft::cpu

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CPU, m) {
  m.impl("accumulate_topk_", TORCH_BOX(&saft::cpu::accumulate_topk_));
  m.impl("compact_topk_", TORCH_BOX(&saft::cpu::compact_topk_));
}
