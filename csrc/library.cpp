// Every operation of the compiled library: its schema, in data-path order.
//
// Implementations are registered next to their argument checks, in ops/<operation>.cpp. Documentation and
// fake implementations are in saft_kernels/ops.py, the specification in saft_kernels/reference.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(saft_kernels, m) {
  // 1 accumulate_topk
  m.def(
      "accumulate_topk_(Tensor(a!) acc, Tensor? grad, float scale, bool square, int key, int offset, int k, "
      "Tensor(b!) values, Tensor(c!) positions, Tensor(d!) state) -> ()");
  m.def("compact_topk_(int k, Tensor(a!) values, Tensor(b!) positions, Tensor(c!) state) -> ()");

  // 2 gather, scatter
  m.def("gather(Tensor dense, Tensor indices) -> Tensor");
  m.def("scatter_(Tensor(a!) dense, Tensor indices, Tensor values) -> ()");

  // 3 sparse_adamw
  m.def(
      "sparse_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor? compact_grad, Tensor indices, int[] bounds, "
      "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? master, Tensor(e!) step, float lr, "
      "Tensor? lr_tensor, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
      "Tensor? grad_scale, Tensor? found_inf) -> ()");

  // 4 sampled_grad
  m.def("pack_columns(Tensor x, Tensor columns, ScalarType? dtype=None) -> Tensor");
  m.def(
      "sampled_grad(Tensor packed, Tensor grad_output, Tensor rows, Tensor offsets, Tensor columns, bool product) -> "
      "Tensor");
  m.def(
      "sampled_embedding_grad(Tensor tokens, Tensor grad_output, Tensor rows, Tensor offsets, Tensor columns) -> "
      "Tensor");

  // 5 delta
  m.def("encode_indices(Tensor indices, int numel) -> Tensor");
  m.def("decode_indices(Tensor code, int n, int numel) -> Tensor");

  // The argument checks alone, for backends that are not compiled (ops/check_only.cpp)
  m.def(
      "check_accumulate_topk(Tensor acc, Tensor? grad, float scale, bool square, int key, int offset, int k, "
      "Tensor values, Tensor positions, Tensor state) -> ()");
  m.def("check_compact_topk(int k, Tensor values, Tensor positions, Tensor state) -> ()");
  m.def("check_gather(Tensor dense, Tensor indices, Tensor values) -> ()");
  m.def("check_scatter(Tensor dense, Tensor indices, Tensor values) -> ()");
  m.def(
      "check_sparse_adamw(Tensor[] params, Tensor[] grads, Tensor? compact_grad, Tensor indices, int[] bounds, "
      "Tensor exp_avg, Tensor exp_avg_sq, Tensor? master, Tensor step, Tensor? lr_tensor, Tensor? grad_scale, "
      "Tensor? found_inf) -> ()");
  m.def("check_pack_columns(Tensor x, Tensor columns, ScalarType? dtype) -> ()");
  m.def("check_sampled_grad(Tensor packed, Tensor grad_output, Tensor rows, Tensor offsets, Tensor columns) -> ()");
  m.def(
      "check_sampled_embedding_grad(Tensor tokens, Tensor grad_output, Tensor rows, Tensor offsets, "
      "Tensor columns) -> ()");

  // What was built and what is in use (backends.py)
  m.def("build_info() -> str");
  m.def("cuda_driver() -> int");
  m.def("cpu_isas() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> ()");
}
