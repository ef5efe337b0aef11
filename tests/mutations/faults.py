"""The faults: what is replaced by what, and the tests that must notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Fault:
    """One wrong edit of a kernel.

    Attributes:
        name: what is wrong then.
        file: relative to the repository.
        right: the text that is there, once.
        wrong: the text that takes its place.
        tests: the file of tests that must fail.
        sanitizer: the check of ``tests/sanitized`` under which they must, by its report; empty for
            kernels of GPUs, whose simulator checks as much.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    sanitizer: str = ""

    @property
    def backend(self) -> str:
        """``cuda`` or ``triton``, which is also how its tests are called."""
        return "cuda" if self.file.startswith("csrc/cuda") else "triton"


_GATHER_CU = "csrc/cuda/gather_scatter_kernel.cu"
_GATHER_PY = "saft_kernels/triton/gather_scatter.py"
_GATHER_TESTS = "tests/test_gather_scatter.py"

_ADAMW_CU = "csrc/cuda/sparse_adamw_kernel.cu"
_ADAMW_TABLE = "csrc/cuda/adamw_table.h"
_ADAMW_PY = "saft_kernels/triton/sparse_adamw.py"
_ADAMW_TESTS = "tests/test_sparse_adamw.py"
_ADAMW_GPU_TESTS = "tests/test_sparse_adamw_gpu.py"
_TOPK_CU = "csrc/cuda/accumulate_topk_kernel.cu"
_SETTLE_CU = "csrc/cuda/settle_topk.cuh"
_CANDIDATES_CU = "csrc/cuda/topk_candidates.cuh"
_TOPK_PY = "saft_kernels/triton/accumulate_topk.py"
_TOPK_TESTS = "tests/test_accumulate_topk.py"
_ENTRIES_CU = "csrc/cuda/sampled_grad_kernel.cu"
_PRODUCT_CU = "csrc/cuda/sampled_product_kernel.cu"
_LOOKUP_CU = "csrc/cuda/sampled_embedding_kernel.cu"
_SUMS_CU = "csrc/cuda/sums.cuh"
_SAMPLED_PY = "saft_kernels/triton/sampled_grad.py"
_LOOKUP_PY = "saft_kernels/triton/sampled_embedding.py"
_CODE_CPU = "csrc/cpu/index_code.cpp"
_CODE_TESTS = "tests/test_index_code.py"
_TOPK_CPU = "csrc/cpu/accumulate_topk.cpp"
_SAMPLED_CPU = "csrc/cpu/sampled_grad.cpp"
_SAMPLED_TESTS = "tests/test_sampled_grad.py"
_SAMPLED_GPU_TESTS = "tests/test_sampled_grad_gpu.py"

FAULTS = (
    Fault(
        "accumulate_topk: the product is not rounded before it is added",
        _TOPK_CU,
        "acc[i] += g * scan.scale;",
        "acc[i] = fmaf(g, scan.scale, acc[i]);",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: infinity is a candidate",
        _TOPK_CU,
        "if (found.bits[i] >= kInfinity)",
        "if (found.bits[i] > kInfinity)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the threshold's own bin does not count",
        _TOPK_CU,
        "own_bin >= bin",
        "own_bin > bin",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a refill leaves out the worst of the k best",
        _TOPK_CU,
        "bar.keeps(found.bits[i], found.position + i)",
        "bar.admits(found.bits[i], found.position + i)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a refill takes one part per block",
        _TOPK_CU,
        "start += parts * kPerBlock",
        "start += scan.n",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a refill takes NaN in",
        _TOPK_CU,
        "i < count && found.bits[i] < kInfinity",
        "i < count",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: one candidate is written behind the buffer",
        _CANDIDATES_CU,
        "slot >= buffer.capacity",
        "slot > buffer.capacity",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: lower positions lose ties",
        _CANDIDATES_CU,
        "candidate == bits && position < tie",
        "candidate == bits && position > tie",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the candidate at the tie is dropped",
        _CANDIDATES_CU,
        "candidate == bits && position <= tie",
        "candidate == bits && position < tie",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: lanes with the same bin count as one",
        _CANDIDATES_CU,
        "add(index, __popc(peers))",
        "add(index, 1)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the threshold's bin is one too high",
        _SETTLE_CU,
        "above_ - upto >= buffer_.k",
        "above_ - upto + 1 >= buffer_.k",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the search misses the rank by one",
        _SETTLE_CU,
        "int64_t rank = buffer_.k - (above_",
        "int64_t rank = buffer_.k - 1 - (above_",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the search leaves out a tensor that does not fit",
        _SETTLE_CU,
        "overflow ? scan_.n : 0",
        "0",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a digit's candidates above it are not taken off the rank",
        _SETTLE_CU,
        "rank -= shared_.above;",
        "rank -= 0;",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a tensor that does not fit is not read again",
        _TOPK_CU,
        "state[kRefill] = overflow;",
        "state[kRefill] = 0;",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a small tensor that does not fit is not read again",
        _TOPK_CU,
        "if (overflow && scan.n <= kAlone)",
        "if (false)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a block of a large tensor takes one part",
        _TOPK_CU,
        "start += gridDim.x * kPerBlock",
        "start += scan.n",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the first block settles, not the last one",
        _TOPK_CU,
        "add(done, 1) == gridDim.x - 1",
        "add(done, 1) == 0",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: blocks do not wait for their writes before they are done",
        _TOPK_CU,
        "    __threadfence();\n    is_last",
        "    is_last",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the last block may read what it knew before",
        _TOPK_CU,
        "gridDim.x - 1;\n    __threadfence();",
        "gridDim.x - 1;",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a warp may still be at work when its block is done",
        _TOPK_CU,
        "  __shared__ bool is_last;\n  __syncthreads();",
        "  __shared__ bool is_last;",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the next call counts the blocks of this one",
        _TOPK_CU,
        "    buffer.state[kDone] = 0;\n",
        "",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: what a scan has found is counted again by the next",
        _SETTLE_CU,
        "state[kFresh] = 0;",
        "state[kFresh] = all - before;",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the product is not rounded before it is added",
        _TOPK_PY,
        "a = a + g * scale",
        "a = tl.fma(g, scale, a)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: infinity is a candidate",
        _TOPK_PY,
        "finite = bits < INFINITY",
        "finite = bits <= INFINITY",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the threshold's own bin does not count",
        _TOPK_PY,
        "bins >= tl.load(state + BIN)",
        "bins > tl.load(state + BIN)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a refill takes one part per program",
        _TOPK_PY,
        "start += parts * BLOCK",
        "start += n",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a refill takes NaN in",
        _TOPK_PY,
        "exists & (bits < INFINITY) & _keeps",
        "exists & _keeps",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: one candidate is written behind the buffer",
        _TOPK_PY,
        "slot < capacity",
        "slot <= capacity",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: lower positions lose ties",
        _TOPK_PY,
        "position < tie)",
        "position > tie)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the candidate at the tie is dropped",
        _TOPK_PY,
        "position <= tie",
        "position < tie",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the threshold's bin is one too high",
        _TOPK_PY,
        "above - tl.cumsum(counts, 0) >= k",
        "above - tl.cumsum(counts, 0) + 1 >= k",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the search misses the rank by one",
        _TOPK_PY,
        "rank = k - (above - within)",
        "rank = k - 1 - (above - within)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the search leaves out a tensor that does not fit",
        _TOPK_PY,
        "tl.where(overflow, n, 0)",
        "n * 0",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a tensor that does not fit is not read again",
        _TOPK_PY,
        "tl.store(state + REFILL, overflow.to(tl.int64))",
        "tl.store(state + REFILL, zero)",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a small tensor that does not fit is not read again",
        _TOPK_PY,
        "if overflow & (n <= alone):",
        "if n > alone:",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: a program of a large tensor takes one part",
        _TOPK_PY,
        "start += tl.num_programs(0).to(tl.int64) * BLOCK",
        "start += n",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the first program settles, not the last one",
        _TOPK_PY,
        "== tl.num_programs(0) - 1",
        "== 0",
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: programs do not wait for their writes before they are done",
        _TOPK_PY,
        'sem="acq_rel"',
        'sem="relaxed"',
        _TOPK_TESTS,
    ),
    Fault(
        "accumulate_topk: the next call counts the programs of this one",
        _TOPK_PY,
        "    tl.store(state + DONE, zero)\n",
        "",
        _TOPK_TESTS,
    ),
    Fault(
        "gather, scatter: the last, incomplete group of entries is dropped",
        _GATHER_CU,
        "if (first >= n) return;",
        "if (first + kEntries > n) return;",
        _GATHER_TESTS,
    ),
    Fault(
        "gather, scatter: a thread's entries overlap its neighbour's",
        _GATHER_CU,
        "+ threadIdx.x) * kEntries;",
        "+ threadIdx.x) * (kEntries - 1);",
        _GATHER_TESTS,
    ),
    Fault(
        "gather, scatter: strides are ignored",
        _GATHER_CU,
        "place[i] = place_of(layout, index[i]);",
        "place[i] = index[i];",
        _GATHER_TESTS,
    ),
    Fault(
        "all: incomplete groups are loaded as a whole",
        "csrc/cuda/vectors.cuh",
        "return count == kEntries && reinterpret_cast",
        "return reinterpret_cast",
        _GATHER_TESTS,
    ),
    Fault(
        "all: misaligned groups are loaded as a whole",
        "csrc/cuda/vectors.cuh",
        "% alignof(Entries<T>) == 0;",
        "% sizeof(T) == 0;",
        _GATHER_TESTS,
    ),
    Fault(
        "all: the innermost dimension comes last",
        "csrc/cuda/numbers.cuh",
        "for (int d = layout.dims - 1; d >= 0; --d)",
        "for (int d = 0; d < layout.dims; ++d)",
        _GATHER_TESTS,
    ),
    Fault(
        "gather: entries behind the end are stored",
        _GATHER_PY,
        "tl.store(values + entry, tl.load(dense + place, exists), exists)",
        "tl.store(values + entry, tl.load(dense + place, exists))",
        _GATHER_TESTS,
    ),
    Fault(
        "scatter: entries behind the end are stored",
        _GATHER_PY,
        "tl.store(dense + place, tl.load(values + entry, exists), exists)",
        "tl.store(dense + place, tl.load(values + entry, exists))",
        _GATHER_TESTS,
    ),
    Fault(
        "all: the remainder of the last dimension is lost",
        "saft_kernels/triton/strided.py",
        "rest = rest // sizes[DIMS - 1 - i]",
        "rest = rest // sizes[0]",
        _GATHER_TESTS,
    ),
    Fault(
        "sparse_adamw: a block takes the tensor behind its own",
        _ADAMW_CU,
        "if (table.segments[middle].first_block <= block)",
        "if (table.segments[middle].first_block <= block + 1)",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: a thread takes entries of the tensor before",
        _ADAMW_CU,
        "max(chunk * kEntries - shift, segment.first_entry)",
        "max(chunk * kEntries - shift, int64_t{0})",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: a thread takes entries of the tensor behind",
        _ADAMW_CU,
        "min((chunk + 1) * kEntries - shift, table.segments[s + 1].first_entry)",
        "min((chunk + 1) * kEntries - shift, table.segments[table.count].first_entry)",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: a dense gradient is read with the parameter's layout",
        _ADAMW_CU,
        "places_of(table, segment.grad_layout, index, grad_place);",
        "places_of(table, segment.param_layout, index, grad_place);",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: the step count is one behind",
        _ADAMW_CU,
        "const float t = step[s] + 1;",
        "const float t = step[s];",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: bias corrections from a power, not from expm1",
        _ADAMW_CU,
        "return -expm1f(t * log_beta);",
        "return 1 - expf(t * log_beta);",
        _ADAMW_GPU_TESTS,
    ),
    Fault(
        "sparse_adamw: steps that are skipped are counted",
        _ADAMW_CU,
        "if (i < count && read(found_inf) == 0) step[i] += 1;",
        "if (i < count) step[i] += 1;",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: the first moment starts from the far end",
        _ADAMW_CU,
        "hyper.one_minus_beta1 < 0.5f ?",
        "hyper.one_minus_beta1 < 1.5f ?",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: a tensor's last block is missing",
        _ADAMW_TABLE,
        "(end - 1 + shift_) / chunk_ - (begin + shift_) / chunk_ + 1;",
        "(end - 1 + shift_) / chunk_ - (begin + shift_) / chunk_;",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: layouts that share a size are taken for equal",
        _ADAMW_TABLE,
        "if (dims[d].size != layout.sizes[d] || dims[d].stride != layout.strides[d]) return false;",
        "if (dims[d].size != layout.sizes[d]) return false;",
        _ADAMW_GPU_TESTS,
    ),
    Fault(
        "sparse_adamw: the tensor that did not fit is left out",
        _ADAMW_CU,
        "for (int64_t begin = 0, i = 0; begin < job.count; begin = i) {",
        "for (int64_t begin = 0, i = 0; begin < job.count; begin = ++i) {",
        _ADAMW_GPU_TESTS,
    ),
    Fault(
        "sparse_adamw: entries of the tensor behind are updated too",
        _ADAMW_PY,
        "exists = entry < end",
        "exists = entry < end + 1",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: entries of the tensor behind are written too",
        _ADAMW_PY,
        "written = entry < _none_if_inf(end, found_inf, has_found_inf)",
        "written = entry < _none_if_inf(end + 1, found_inf, has_found_inf)",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: dimensions are in the wrong order in the table",
        _ADAMW_PY,
        "zip(reversed(sizes), reversed(strides), strict=True)",
        "zip(sizes, strides, strict=True)",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: all tensors take the first one's step count",
        _ADAMW_PY,
        "tl.load(step + tl.load(segment + 3))",
        "tl.load(step)",
        _ADAMW_TESTS,
    ),
    Fault(
        "sparse_adamw: a table is not made anew when gradients move",
        _ADAMW_PY,
        "content = (like.device, tuple(bounds), _places(params), _places(grads))",
        "content = (like.device, tuple(bounds), _places(params), _places(grads[:0]))",
        _ADAMW_GPU_TESTS,
    ),
    Fault(
        "sparse_adamw: the first moment starts from the far end",
        _ADAMW_PY,
        "tl.where(one_minus_beta1 < 0.5,",
        "tl.where(one_minus_beta1 < 1.5,",
        _ADAMW_TESTS,
    ),
    Fault(
        "pack: tokens behind the last are ones in the column of ones",
        _ENTRIES_CU,
        "from_float<P>(t < left ? 1.0f : 0.0f)",
        "from_float<P>(1.0f)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "pack: only the first block of columns is packed",
        _ENTRIES_CU,
        "int64_t{blockIdx.x % chunks} * kThreads + threadIdx.x",
        "int64_t{threadIdx.x}",
        _SAMPLED_TESTS,
    ),
    Fault(
        "pack: fp32 is cut off instead of rounded",
        "csrc/cuda/numbers.cuh",
        "return __float2bfloat16_rn(x);",
        "return __float2bfloat16_rz(x);",
        _SAMPLED_TESTS,
    ),
    Fault(
        "entries: the last, shorter part is dropped",
        _ENTRIES_CU,
        "min(first + blocks_of_part, ceil_div(dy.tokens, kTokens))",
        "min(first + blocks_of_part, dy.tokens / kTokens)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "entries: parts overlap",
        _ENTRIES_CU,
        "const int64_t first = int64_t{blockIdx.y} * blocks_of_part;",
        "const int64_t first = int64_t{blockIdx.y} * (blocks_of_part - 1);",
        _SAMPLED_TESTS,
    ),
    Fault(
        "entries: a chain of sums is lost",
        _ENTRIES_CU,
        "(sums[0] + sums[2]) + (sums[1] + sums[3])",
        "(sums[0] + sums[2]) + sums[1]",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sum of parts: a group is lost",
        _ENTRIES_CU,
        "for (int k = 1; k < kGroups; ++k) sum",
        "for (int k = 2; k < kGroups; ++k) sum",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sum of parts: no barrier",
        _ENTRIES_CU,
        "= sum;\n  __syncthreads();",
        "= sum;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sampled: an empty row hides the next",
        _SUMS_CU,
        "lower_bound(plan.offsets + 1, plan.n_rows, e + 1)",
        "lower_bound(plan.offsets + 1, plan.n_rows, e)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sampled: misaligned tokens are loaded as pieces",
        _SUMS_CU,
        "reinterpret_cast<uintptr_t>(column) % alignof(Piece<T>) == 0",
        "true",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sampled: tokens behind the last are loaded as pieces",
        _SUMS_CU,
        "token_stride == 1 && left >= count &&",
        "token_stride == 1 &&",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: rows of a multiplication are swapped",
        _PRODUCT_CU,
        "lane() / 4 + i / 2 * 8][",
        "lane() / 4 + (1 - i / 2) * 8][",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: the factors' tokens do not match",
        _PRODUCT_CU,
        "* kTokens + lane() % 4 * 4;",
        "* kTokens + (3 - lane() % 4) * 4;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: one buffer for both steps",
        _PRODUCT_CU,
        "++block, buffer ^= 1)",
        "++block)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: results overwrite factors in use",
        _PRODUCT_CU,
        "  __syncthreads();  // the results take the place of the factors\n",
        "",
        _SAMPLED_GPU_TESTS,
    ),
    Fault(
        "product: entries of the next tile are picked too",
        _PRODUCT_CU,
        "if (column >= 0 && column < kTile) sums",
        "if (column >= 0) sums",
        _SAMPLED_GPU_TESTS,
    ),
    Fault(
        "product: a tile with an entry is taken for empty",
        _PRODUCT_CU,
        "found = column >= 0 && column < kTile;",
        "found = column > 0 && column < kTile;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: rows behind the last are read",
        _PRODUCT_CU,
        "const bool exists = j < job.plan.n_rows;",
        "const bool exists = true;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "embedding: a token that is no row is taken for one",
        _LOOKUP_CU,
        "row < n_rows && rows[row] == token ? row : n_rows",
        "row < n_rows ? row : n_rows",
        _SAMPLED_TESTS,
    ),
    Fault(
        "embedding: a row's last token is lost",
        _LOOKUP_CU,
        "i < end; i += kWarp)",
        "i < end - 1; i += kWarp)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "embedding: half of the lanes are not added",
        _LOOKUP_CU,
        "for (int half = kWarp / 2; half > 0;",
        "for (int half = kWarp / 4; half > 0;",
        _SAMPLED_TESTS,
    ),
    Fault(
        "pack: columns behind the last are stored",
        _SAMPLED_PY,
        "tl.store(to, values.to(packed.dtype.element_ty), exists)",
        "tl.store(to, values.to(packed.dtype.element_ty))",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: the factors' tokens do not match",
        _SAMPLED_PY,
        "* TOKENS + k % TOKENS,",
        "* TOKENS + (TOKENS - 1 - k % TOKENS),",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: a tile with an entry is taken for empty",
        _SAMPLED_PY,
        "if found > 0:",
        "if found > 1:",
        _SAMPLED_TESTS,
    ),
    Fault(
        "product: blocks behind a part are added",
        _SAMPLED_PY,
        "exists = block < end_block",
        "exists = block < tl.cdiv(tokens, TOKENS)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "sum of parts: the last are lost",
        _SAMPLED_PY,
        "for first in range(0, parts, GROUPS):",
        "for first in range(0, parts - 1, GROUPS):",
        _SAMPLED_GPU_TESTS,
    ),
    Fault(
        "search: one step too few",
        "saft_kernels/triton/search.py",
        "while longest > 0:",
        "while longest > 1:",
        _SAMPLED_TESTS,
    ),
    Fault(
        "embedding: a token that is no row is taken for one",
        _LOOKUP_PY,
        "tl.where(is_row & (token >= 0), place, n_rows)",
        "tl.where(token >= 0, place, n_rows)",
        _SAMPLED_TESTS,
    ),
    Fault(
        "index code: the last bytes are read as eight",
        _CODE_CPU,
        "if (byte + kWord <= bytes_)",
        "if (byte < bytes_)",
        _CODE_TESTS,
        "address",
    ),
    Fault(
        "index code: bytes may hold more indices than were said",
        _CODE_CPU,
        "      if (i == layout.n) return false;\n",
        "",
        _CODE_TESTS,
        "address",
    ),
    Fault(
        "index code: memset of no bytes, at no address",
        _CODE_CPU,
        "std::fill_n(code, layout.bytes(), uint8_t{0});",
        "std::memset(code, 0, static_cast<size_t>(layout.bytes()));",
        _CODE_TESTS,
        "address",
    ),
    Fault(
        "gather: the number of elements is taken for an index",
        "csrc/cpu/index_values.cpp",
        "index[end - 1] >= numel",
        "index[end - 1] > numel",
        _GATHER_TESTS,
        "address",
    ),
    Fault(
        "gather: two threads share an entry",
        "csrc/cpu/parallel.h",
        "f(begin, std::min(begin + kEntriesAtOnce, entries));",
        "f(begin, std::min(begin + kEntriesAtOnce + 1, entries));",
        _GATHER_TESTS,
        "thread",
    ),
    Fault(
        "accumulate_topk: the last survivors are looked for in a whole vector",
        "csrc/cpu/accumulate_topk_kernel.cpp",
        "for (; i + kLanes <= n; i += kLanes)",
        "for (; i < n; i += kLanes)",
        _TOPK_TESTS,
        "address",
    ),
    Fault(
        "accumulate_topk: a full buffer takes more candidates",
        _TOPK_CPU,
        "std::min(batch.n - from, b.capacity - count)",
        "batch.n - from",
        _TOPK_TESTS,
        "address",
    ),
    Fault(
        "accumulate_topk: batches are appended without the lock",
        _TOPK_CPU,
        "    if (wait) lock.lock();\n    if (!wait && !lock.try_lock()) return false;\n",
        "    static_cast<void>(wait);\n",
        _TOPK_TESTS,
        "thread",
    ),
    Fault(
        "accumulate_topk: the bar is read without the lock",
        _TOPK_CPU,
        "    const std::lock_guard lock(mutex_);\n    return bar_of",
        "    return bar_of",
        _TOPK_TESTS,
        "thread",
    ),
    Fault(
        "sparse_adamw: every block is taken for a full one",
        "csrc/cpu/sparse_adamw_kernel.cpp",
        "const int64_t n = end - begin < kBlock ? end - begin : kBlock;",
        "const int64_t n = kBlock;",
        _ADAMW_TESTS,
        "address",
    ),
    Fault(
        "sparse_adamw: two threads share an entry",
        "csrc/cpu/sparse_adamw.cpp",
        "f(i, begin - bounds[i], stop - bounds[i]);",
        "f(i, begin - bounds[i] - (begin > bounds[i]), stop - bounds[i]);",
        _ADAMW_TESTS,
        "thread",
    ),
    Fault(
        "sampled_grad: the last block of tokens is taken for a full one",
        "csrc/cpu/sampled_grad_kernel.cpp",
        "  if (tokens >= kTokens)\n",
        "  if (tokens > 0)\n",
        _SAMPLED_TESTS,
        "address",
    ),
    Fault(
        "pack_columns: two threads pack a block",
        _SAMPLED_CPU,
        "sampled_grad_kernels().pack(job, begin, end);",
        "sampled_grad_kernels().pack(job, begin > 0 ? begin - 1 : 0, end);",
        _SAMPLED_TESTS,
        "thread",
    ),
    Fault(
        "sampled_grad: threads share their sums",
        _SAMPLED_CPU,
        "  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {\n"
        "    std::vector<double> sums;\n",
        "  std::vector<double> sums(kEntriesPerTask * kTokens);\n"
        "  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {\n",
        _SAMPLED_TESTS,
        "thread",
    ),
    Fault(
        "sampled_embedding_grad: two threads look up one token",
        _SAMPLED_CPU,
        "for (int64_t t = begin; t < end; ++t) {",
        "for (int64_t t = begin > 0 ? begin - 1 : 0; t < end; ++t) {",
        _SAMPLED_TESTS,
        "thread",
    ),
)
