// Threads scan disjoint ranges and collect survivors of the threshold in small local batches. A full batch is
// handed to the shared buffer under a lock; a full buffer is compacted, which raises the threshold, which the
// threads pick up at their next chunk. A thread that works with an old, lower threshold only hands over more
// candidates than needed: the result does not depend on when it notices.
//
// Of D values in random order about k (1 + ln(D / k)) beat the k best before them: eight times k for a thousandth of
// D. That holds only if the threshold follows closely, hence the histogram: it raises the threshold with every
// batch, while compactions only make room.

#include "accumulate_topk.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "../ops/accumulate_topk.h"

namespace saft::cpu {
namespace {

constexpr int64_t kChunk = 2048;         // elements per scan: a chunk of acc and grad stays in the L1 cache
constexpr int64_t kBatch = 4 * kChunk;   // survivors a thread collects before it takes the lock
constexpr int64_t kGrain = 16 * kChunk;  // elements below which a second thread costs more than it brings

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(int64_t bits) {
  const auto narrow = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &narrow, sizeof value);
  return value;
}

// What a candidate has to beat: value above `value`, or equal to it at a position below `tie`.
struct Bar {
  float value = 0;
  int64_t tie = kNoPosition;

  bool admits(float candidate, int64_t position) const {
    return candidate > value || (candidate == value && position < tie);
  }

  // The lowest value that can be admitted anywhere in a chunk that starts at `position`. Without the step up,
  // a tensor of equal values (zeros, say) would send every element past the tie to the slow path.
  float threshold_from(int64_t position) const {
    return position < tie ? value : std::nextafter(value, std::numeric_limits<float>::infinity());
  }
};

Bar bar_of(const int64_t* state) {
  return state[kThreshold] == kNoThreshold ? Bar{} : Bar{float_of(state[kThreshold]), state[kTie]};
}

constexpr int kDigits = 3;
constexpr std::array<int, kDigits> kShift = {20, 10, 0};  // 11 + 10 + 10 bits of a non-negative float
constexpr std::array<int, kDigits> kWidth = {11, 10, 10};

// The bits of the k-th largest of n values, by radix selection: non-negative floats order as their bits do.
// `above` receives how many values are strictly larger.
uint32_t kth_largest(const float* values, int64_t n, int64_t k, int64_t& above) {
  uint32_t prefix = 0, mask = 0;
  above = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    std::array<int64_t, 2048> histogram{};
    const uint32_t low = (1u << kWidth[digit]) - 1;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = bits_of(values[i]);
      if ((bits & mask) == prefix) ++histogram[(bits >> kShift[digit]) & low];
    }
    uint32_t bin = low;
    while (above + histogram[bin] < k) above += histogram[bin--];
    prefix |= bin << kShift[digit];
    mask |= low << kShift[digit];
  }
  return prefix;
}

// The position that separates the ties that stay from those that go: `keep` of them stay.
int64_t last_kept_tie(const TopkBuffer& b, int64_t n, uint32_t bits, int64_t keep) {
  std::vector<int64_t> ties;
  for (int64_t i = 0; i < n; ++i)
    if (bits_of(b.values[i]) == bits) ties.push_back(b.positions[i]);
  std::nth_element(ties.begin(), ties.begin() + (keep - 1), ties.end());
  return ties[static_cast<size_t>(keep - 1)];
}

struct Candidate {
  float value;
  int64_t position;
};

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

// Appends candidates until they or the room run out; returns how many it has dealt with. Works on copies of the
// counters: the compiler cannot know that the vectors do not overlap them.
int64_t fill(const TopkBuffer& b, const Candidate* candidates, int64_t n) {
  const Bar bar = bar_of(b.state);
  const int64_t bin = b.state[kBin];
  int64_t* const histogram = b.state + kHistogram;
  int64_t count = b.state[kCount], above = b.state[kAbove], i = 0;
  for (; i < n && count < b.capacity; ++i) {
    const auto [value, position] = candidates[i];
    if (!bar.admits(value, position)) continue;
    b.values[count] = value;
    b.positions[count] = position;
    ++count;
    const int64_t own_bin = bits_of(value) >> kBinShift;
    ++histogram[own_bin];
    above += own_bin >= bin;
  }
  b.state[kCount] = count;
  b.state[kAbove] = above;
  return i;
}

// Keeps the candidates above `value`, and those equal to it up to position `last`.
void drop_below(const TopkBuffer& b, float value, int64_t last) {
  int64_t kept = 0;
  for (int64_t i = 0; i < b.state[kCount]; ++i) {
    const float own = b.values[i];
    const int64_t position = b.positions[i];
    b.values[kept] = own;
    b.positions[kept] = position;
    kept += own > value || (own == value && position <= last);
  }
  b.state[kCount] = kept;
}

// Drops what no longer reaches the threshold; where that is little (equal values, mostly), keeps the k best.
void make_room(const TopkBuffer& b) {
  raise_to_bin(b);
  const Bar bar = bar_of(b.state);
  drop_below(b, bar.value, bar.tie);
  if (b.state[kCount] - b.k > (b.capacity - b.k) / 2) compact_topk(b);
}

// The buffer while several threads fill it.
class SharedBuffer {
 public:
  explicit SharedBuffer(const TopkBuffer& buffer) : b_(buffer) {}

  Bar bar() {
    const std::lock_guard lock(mutex_);
    return bar_of(b_.state);
  }

  // Changes whenever the bar rises.
  uint64_t version() const { return version_.load(std::memory_order_acquire); }

  void append(const Candidate* candidates, int64_t n) {
    const std::lock_guard lock(mutex_);
    for (int64_t i = 0; i < n;) {
      if (b_.state[kCount] == b_.capacity) make_room(b_);
      i += fill(b_, candidates + i, n - i);
    }
    raise_to_bin(b_);
    version_.fetch_add(1, std::memory_order_release);
  }

  void report_nonfinite(int64_t position) {
    const std::lock_guard lock(mutex_);
    b_.state[kNonFinite] = std::min(b_.state[kNonFinite], position);
  }

 private:
  TopkBuffer b_;
  std::mutex mutex_;
  std::atomic<uint64_t> version_{1};
};

// One thread's share of a tensor.
class Worker {
 public:
  Worker(const Scan& scan, int64_t base, bool select, SharedBuffer& shared)
      : scan_(scan), base_(base), select_(select), shared_(shared) {}

  void run(int64_t begin, int64_t end) {
    const auto& kernels = accumulate_topk_kernels();
    for (int64_t b = begin; b < end; b += kChunk) {
      const int64_t e = std::min(b + kChunk, end);
      const int64_t survivors = kernels.scan(scan_, b, e, threshold(b), survivors_.data());
      collect(b, survivors);
      if (pending_ > kBatch - kChunk) flush();
    }
    flush();
  }

 private:
  float threshold(int64_t i) {
    if (!select_) return std::numeric_limits<float>::infinity();
    if (const uint64_t now = shared_.version(); now != seen_) {
      seen_ = now;
      bar_ = shared_.bar();
    }
    return bar_.threshold_from(base_ + i);
  }

  void collect(int64_t begin, int64_t survivors) {
    for (int64_t s = 0; s < survivors; ++s) {
      const int64_t i = begin + survivors_[static_cast<size_t>(s)];
      const float value = std::fabs(scan_.acc[i]);
      const int64_t position = base_ + i;
      if (!std::isfinite(value)) {
        shared_.report_nonfinite(position);
      } else {
        batch_[static_cast<size_t>(pending_++)] = {value, position};
      }
    }
  }

  void flush() {
    if (pending_ > 0) shared_.append(batch_.data(), pending_);
    pending_ = 0;
  }

  const Scan& scan_;
  const int64_t base_;
  const bool select_;
  SharedBuffer& shared_;
  Bar bar_;
  uint64_t seen_ = 0;
  int64_t pending_ = 0;
  std::array<int32_t, kChunk + kSurvivorSlack> survivors_;
  std::array<Candidate, kBatch> batch_;
};

}  // namespace

void compact_topk(const TopkBuffer& b) {
  if (b.k == 0) b.state[kCount] = 0;
  if (b.state[kCount] < b.k || b.k == 0) return;
  const Bar bar = bar_of(b.state);
  drop_below(b, bar.value, bar.tie);
  const int64_t n = b.state[kCount];
  int64_t above = 0;
  const uint32_t bits = kth_largest(b.values, n, b.k, above);
  const int64_t tie = last_kept_tie(b, n, bits, b.k - above);
  drop_below(b, float_of(bits), tie);
  b.state[kThreshold] = bits;
  b.state[kTie] = tie;
}

void accumulate_topk(const Scan& scan, int64_t base, const TopkBuffer& buffer) {
  SharedBuffer shared(buffer);
  torch::stable::parallel_for(
      0, scan.n, kGrain, [&](int64_t begin, int64_t end) { Worker(scan, base, buffer.k > 0, shared).run(begin, end); });
}

}  // namespace saft::cpu
