// Matrix instructions of a whole warp: ldmatrix, stmatrix, mma.sync.
#include "collectives.h"
#include "math.h"
#include "memory.h"

namespace ptx {

static void full_warp(const Thread& t, uint32_t mask, const char* what) {
  if (mask != ~0u) fail(t, std::string(what) + " needs a full warp");
}

// ---------------------------------------------------------------- ldmatrix, stmatrix
struct MatrixSlot {
  Thread* thread;
  int count;
  bool trans;
  uint64_t addr;
  uint32_t* reg;
};

// Lane l holds row l / 4, columns 2 * (l % 4) and the next; of the transposed matrix if `trans`.
static uint16_t& element(uint16_t (&m)[8][8], int lane, int i, bool trans) {
  int r = lane / 4, c = 2 * (lane % 4) + i;
  return trans ? m[c][r] : m[r][c];
}

static void load_matrices(void** slots, uint32_t mask) {
  auto slot = [&](int lane) -> MatrixSlot& { return *static_cast<MatrixSlot*>(slots[lane]); };
  full_warp(*slot(std::countr_zero(mask)).thread, mask, "ldmatrix");
  for (int i = 0; i < slot(0).count; i++) {
    uint16_t m[8][8];
    for (int row = 0; row < 8; row++) {
      auto& s = slot(8 * i + row);
      std::memcpy(m[row], shared_ptr(*s.thread, s.addr, 16, Access::Read), 16);
    }
    for (int l = 0; l < 32; l++)
      slot(l).reg[i] = element(m, l, 0, slot(0).trans) | uint32_t(element(m, l, 1, slot(0).trans)) << 16;
  }
}

static void store_matrices(void** slots, uint32_t mask) {
  auto slot = [&](int lane) -> MatrixSlot& { return *static_cast<MatrixSlot*>(slots[lane]); };
  full_warp(*slot(std::countr_zero(mask)).thread, mask, "stmatrix");
  for (int i = 0; i < slot(0).count; i++) {
    uint16_t m[8][8];
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 2; e++) element(m, l, e, slot(0).trans) = uint16_t(slot(l).reg[i] >> 16 * e);
    for (int row = 0; row < 8; row++) {
      auto& s = slot(8 * i + row);
      std::memcpy(shared_ptr(*s.thread, s.addr, 16, Access::Write, m[row]), m[row], 16);
    }
  }
}

void ldmatrix(Thread& t, int count, bool trans, uint64_t addr, uint32_t* reg) {
  MatrixSlot slot{&t, count, trans, addr, reg};
  collective(t, ~0u, load_matrices, 2 * count + trans, &slot, "ldmatrix");
}

void stmatrix(Thread& t, int count, bool trans, uint64_t addr, const uint32_t* reg) {
  MatrixSlot slot{&t, count, trans, addr, const_cast<uint32_t*>(reg)};
  collective(t, ~0u, store_matrices, 2 * count + trans, &slot, "stmatrix");
}

// ---------------------------------------------------------------- mma
static int per_register(Elem e) {
  return e == Elem::TF32 ? 1 : e == Elem::F16 || e == Elem::BF16 ? 2 : 4;
}

// Element i of a register.  A double holds all of them, and all sums of integers, exactly.
static double decode(Elem e, uint32_t r, int i) {
  switch (e) {
    case Elem::F16:
      return f16_to_f32(uint16_t(r >> 16 * i));
    case Elem::BF16:
      return bf16_to_f32(uint16_t(r >> 16 * i));
    case Elem::TF32:
      return std::bit_cast<float>(r & 0xffffe000u);
    case Elem::S8:
      return int8_t(r >> 8 * i);
    case Elem::U8:
      return uint8_t(r >> 8 * i);
  }
  __builtin_unreachable();
}

// Value i (0 to 3) of the accumulator fragment of a lane.
static double get(Acc type, const uint32_t* c, int i) {
  if (type == Acc::F32) return std::bit_cast<float>(c[i]);
  if (type == Acc::S32) return int32_t(c[i]);
  return f16_to_f32(uint16_t(c[i / 2] >> 16 * (i % 2)));
}

static void set(Acc type, uint32_t* d, int i, double v) {
  if (type == Acc::F32) {
    d[i] = std::bit_cast<uint32_t>(float(v));
  } else if (type == Acc::S32) {
    d[i] = uint32_t(int64_t(v));
  } else {
    uint32_t shift = 16 * (i % 2);
    d[i / 2] = (d[i / 2] & ~(0xffffu << shift)) | uint32_t(to_f16(v)) << shift;
  }
}

struct MmaSlot {
  const Thread* thread;
  int k;
  Elem a_type, b_type;
  Acc c_type;
  const uint32_t *a, *b, *c;
  uint32_t* d;
};

static void multiply(void** slots, uint32_t mask) {
  auto slot = [&](int lane) -> MmaSlot& { return *static_cast<MmaSlot*>(slots[lane]); };
  const MmaSlot& first = slot(std::countr_zero(mask));
  full_warp(*first.thread, mask, "mma.sync");
  const int k = first.k, per = per_register(first.a_type), chunks = k / (4 * per);
  double a[16][32], b[8][32];
  for (int l = 0; l < 32; l++) {
    const MmaSlot& s = slot(l);
    int group = l / 4, pos = l % 4;
    for (int chunk = 0; chunk < chunks; chunk++)
      for (int e = 0; e < per; e++) {
        int col = (4 * chunk + pos) * per + e;
        a[group][col] = decode(s.a_type, s.a[2 * chunk], e);
        a[group + 8][col] = decode(s.a_type, s.a[2 * chunk + 1], e);
        b[group][col] = decode(s.b_type, s.b[chunk], e);
      }
  }
  for (int l = 0; l < 32; l++) {
    const MmaSlot& s = slot(l);
    double sum[4];
    for (int i = 0; i < 4; i++) {
      int row = l / 4 + 8 * (i >> 1), col = 2 * (l % 4) + (i & 1);
      sum[i] = 0;
      for (int j = 0; j < k; j++) sum[i] += a[row][j] * b[col][j];
      sum[i] += get(s.c_type, s.c, i);
    }
    for (int i = 0; i < 4; i++) set(s.c_type, s.d, i, sum[i]);  // d may be c
  }
}

void mma_m16n8(Thread& t, int k, Elem a_type, Elem b_type, Acc c_type, const uint32_t* a, const uint32_t* b,
               const uint32_t* c, uint32_t* d) {
  MmaSlot slot{&t, k, a_type, b_type, c_type, a, b, c, d};
  unsigned tag = unsigned(k) << 12 | unsigned(a_type) << 8 | unsigned(b_type) << 4 | unsigned(c_type);
  collective(t, ~0u, multiply, tag, &slot, "mma.sync");
}

}  // namespace ptx
