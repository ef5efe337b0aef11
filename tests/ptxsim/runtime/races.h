// Race detectors.  Each keeps a cell per byte of memory.
#pragma once
#include "launch.h"

namespace ptx {

// Between blocks: who wrote and who read a byte in this launch.  `writer`: 0 none, else block + 1, with kStrong set for
// atomics and other strong writes; `time`: that of the writer then.  `reader`: 0 none, block + 1 or kMany.  With
// several OS threads cells may be updated at the same time; a lost update can hide a race, never invent one.
struct BlockCell {
  uint32_t writer, reader, time;
  bool operator==(const BlockCell&) const = default;
};
constexpr uint32_t kStrong = 0x80000000u, kMany = 0x7fffffffu;

// Inside a block: accesses of different warps are ordered by a barrier (block epoch), those of lanes of one warp also
// by bar.warp.sync (warp epoch).
struct ThreadCell {
  uint32_t write_epoch, write_warp_epoch;
  uint32_t read_epoch, read_warp_epoch, read_lanes;
  uint16_t writer;       // thread + 1
  uint16_t reader_warp;  // warp + 1 of read_lanes
  uint16_t other_warp;   // another warp that has read in read_epoch
  bool strong;
};

void touch_blocks(ThreadState& t, BlockCell* cells, uint64_t addr, unsigned n, Access kind);

// `bytes`: the memory itself; `fences`: whether fences and flags order threads as barriers do.
void touch_threads(ThreadState& t, ThreadCell* cells, const uint8_t* bytes, unsigned n, Access kind, const void* data,
                   bool fences, const char* memory, uint64_t where);

}  // namespace ptx
