// The argument checks of every operation as operations of their own, for backends that are not compiled
// (saft_kernels/triton): one set of checks, one set of messages.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "accumulate_topk.h"
#include "gather_scatter.h"
#include "sampled_grad.h"
#include "sparse_adamw.h"

namespace saft {
namespace {

void accumulate_topk(const Tensor& acc, const std::optional<Tensor>& grad, double scale, bool square, int64_t key,
                     int64_t offset, int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  const Device device = Device::of(acc);
  check_scan(acc, grad, scale, square, key, offset, device);
  check_topk_buffer(k, values, positions, state, device);
}

void compact_topk(int64_t k, const Tensor& values, const Tensor& positions, const Tensor& state) {
  check_topk_buffer(k, values, positions, state, Device::of(values));
}

void gather(const Tensor& dense, const Tensor& indices, const Tensor& values) {
  check_gather(dense, indices, values, Device::of(dense));
}

void scatter(const Tensor& dense, const Tensor& indices, const Tensor& values) {
  check_scatter(dense, indices, values, Device::of(dense));
}

void sparse_adamw(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                  const std::optional<Tensor>& compact_grad, const Tensor& indices, const std::vector<int64_t>& bounds,
                  const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& master,
                  const Tensor& step, const std::optional<Tensor>& lr, const std::optional<Tensor>& grad_scale,
                  const std::optional<Tensor>& found_inf) {
  const Device device = Device::of(exp_avg);
  check_adamw_step(params, grads, compact_grad, indices, bounds, exp_avg, exp_avg_sq, master, step, device);
  if (lr.has_value()) check_scalar(*lr, "lr", device);
  if (grad_scale.has_value()) check_scalar(*grad_scale, "grad_scale", device);
  if (found_inf.has_value()) check_scalar(*found_inf, "found_inf", device);
}

void pack_columns(const Tensor& x, const Tensor& columns, std::optional<ScalarType> dtype) {
  check_pack_columns(x, columns, dtype, Device::of(x));
}

void sampled_grad(const Tensor& packed, const Tensor& grad_output, const Tensor& rows, const Tensor& offsets,
                  const Tensor& columns) {
  check_sampled_grad(packed, grad_output, rows, offsets, columns, Device::of(grad_output));
}

void sampled_embedding_grad(const Tensor& tokens, const Tensor& grad_output, const Tensor& rows, const Tensor& offsets,
                            const Tensor& columns) {
  check_sampled_embedding_grad(tokens, grad_output, rows, offsets, columns, Device::of(grad_output));
}

}  // namespace
}  // namespace saft

STABLE_TORCH_LIBRARY_IMPL(saft_kernels, CompositeExplicitAutograd, m) {
  m.impl("check_accumulate_topk", TORCH_BOX(&saft::accumulate_topk));
  m.impl("check_compact_topk", TORCH_BOX(&saft::compact_topk));
  m.impl("check_gather", TORCH_BOX(&saft::gather));
  m.impl("check_scatter", TORCH_BOX(&saft::scatter));
  m.impl("check_sparse_adamw", TORCH_BOX(&saft::sparse_adamw));
  m.impl("check_pack_columns", TORCH_BOX(&saft::pack_columns));
  m.impl("check_sampled_grad", TORCH_BOX(&saft::sampled_grad));
  m.impl("check_sampled_embedding_grad", TORCH_BOX(&saft::sampled_embedding_grad));
}
