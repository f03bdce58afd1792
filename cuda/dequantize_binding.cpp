// Products with packed matrices for torch: the workspace, and an autograd node that keeps packed data only.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/custom_class.h>
#include <torch/extension.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checks.h"
#include "dequantize.h"

namespace {

using at::Tensor;
using torch::autograd::variable_list;

// The buffers of one device. See DequantizationWorkspace in quant.py for what they are for.
class Workspace {
 public:
  explicit Workspace(bool keep_dequantized) : keep_dequantized_(keep_dequantized) {}

  void set_keep_dequantized(bool keep) {
    keep_dequantized_ = keep;
    clear();
  }

  void clear() { held_.clear(); }

  void forget() {
    for (auto& [name, held] : held_) held.owner = kNobody;
  }

  std::vector<Tensor> buffers() const {
    std::vector<Tensor> all;
    for (const auto& [name, held] : held_) {
      if (held.buffer.defined()) all.push_back(held.buffer);
    }
    return all;
  }

  // Whose matrix, and how often its packed data had been written when it was dequantised.
  using Owner = std::pair<int64_t, int64_t>;

  // The matrix [rows, columns] of `owner`, made by fill(buffer) unless its buffer still holds it.
  template <typename Fill>
  Tensor matrix(const Owner& owner, const std::string& kind, int64_t rows, int64_t columns,
                const at::TensorOptions& options, const Fill& fill) {
    Held& held = held_[keep_dequantized_ ? kind : std::string()];
    if (!held.buffer.defined() || held.buffer.numel() < rows * columns) {
      held = Held();  // frees the old buffer before there is a new one
      held.buffer = at::empty({rows * columns}, options);
    }
    if (held.owner != owner) {
      held.owner = kNobody;
      fill(held.buffer);
      held.owner = owner;
    }
    return held.buffer.as_strided({rows, columns}, {columns, 1});
  }

 private:
  static constexpr Owner kNobody = {-1, 0};
  struct Held {
    Tensor buffer;
    Owner owner = kNobody;
  };
  bool keep_dequantized_;
  std::unordered_map<std::string, Held> held_;
};

void check_tensor(const Tensor& tensor, at::ScalarType dtype, int64_t count, const Tensor& packed, const char* name) {
  require(tensor.scalar_type() == dtype, name, " has dtype ", tensor.scalar_type(), ", expected ", dtype);
  require(tensor.is_contiguous() && tensor.device() == packed.device(), name,
          " must be contiguous and on the device of packed");
  require(tensor.numel() == count, name, " has ", tensor.numel(), " elements, expected ", count);
}

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

class PackedMatrix : public torch::CustomClassHolder {
 public:
  PackedMatrix(Tensor packed, Tensor absmax, std::optional<Tensor> absmax_scale, std::optional<Tensor> absmax_offset,
               Tensor absmax_code, Tensor value_code, int bits, int64_t rows, int64_t columns, std::string kind,
               std::shared_ptr<Workspace> workspace)
      : packed_(std::move(packed)),
        absmax_(std::move(absmax)),
        absmax_scale_(absmax_scale.value_or(Tensor())),
        absmax_offset_(absmax_offset.value_or(Tensor())),
        absmax_code_(std::move(absmax_code)),
        value_code_(std::move(value_code)),
        bits_(bits),
        rows_(rows),
        columns_(columns),
        kind_(std::move(kind)),
        workspace_(std::move(workspace)),
        identity_(next_identity()) {
    const int64_t count = rows * columns;
    require(packed_.is_cuda(), "packed is on ", packed_.device(), ", expected a CUDA device");
    require(bits == 4 || bits == 8, "values have ", bits, " bits, expected 4 or 8");
    require(count % 8 == 0, "the matrix has ", count, " values, expected a multiple of 8");
    require(reinterpret_cast<uintptr_t>(packed_.const_data_ptr()) % 16 == 0, "packed must be 16-byte aligned");
    require(absmax_scale_.defined() == absmax_offset_.defined(), "absmax_scale and absmax_offset go together");
    const int64_t blocks = blocks_of(count, bits == 4 ? 64 : 256);
    check_tensor(packed_, at::kByte, count * bits / 8, packed_, "packed");
    check_tensor(absmax_, absmax_scale_.defined() ? at::kByte : at::kFloat, blocks, packed_, "absmax");
    check_tensor(value_code_, at::kFloat, bits == 4 ? 16 : 256, packed_, "value_code");
    if (absmax_scale_.defined()) {
      require(bits == 4, "8-bit matrices have no double quantisation");
      check_tensor(absmax_scale_, at::kFloat, blocks_of(blocks, 256), packed_, "absmax_scale");
      check_tensor(absmax_offset_, at::kFloat, 1, packed_, "absmax_offset");
      check_tensor(absmax_code_, at::kFloat, 256, packed_, "absmax_code");
    }
  }

  // bf16 [rows, columns], contiguous, on the packed data's device.
  void fill(const Tensor& dense) const {
    require(dense.scalar_type() == at::kBFloat16 && dense.is_contiguous() && dense.device() == packed_.device() &&
                dense.numel() >= rows_ * columns_,
            "the dense matrix must be contiguous bfloat16 on the packed data's device");
    const c10::cuda::CUDAGuard guard(packed_.device());
    dequantize::Packed matrix{};
    matrix.packed = packed_.const_data_ptr();
    matrix.absmax = absmax_.const_data_ptr();
    matrix.absmax_scale = absmax_scale_.defined() ? absmax_scale_.const_data_ptr<float>() : nullptr;
    matrix.absmax_offset = absmax_offset_.defined() ? absmax_offset_.const_data_ptr<float>() : nullptr;
    matrix.absmax_code = absmax_code_.const_data_ptr<float>();
    matrix.value_code = value_code_.const_data_ptr<float>();
    matrix.bits = bits_;
    matrix.count = rows_ * columns_;
    check_launch(dequantize::to_bf16(matrix, dense.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()),
                 "dequantize");
  }

  // The dense matrix in the workspace, valid until the next dequantisation.
  Tensor shared_dense() const {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    return workspace_->matrix({identity_, writes()}, kind_, rows_, columns_, packed_.options().dtype(at::kBFloat16),
                              [this](const Tensor& buffer) { fill(buffer); });
  }

  // Raises when x is not bf16 [..., columns] on the packed data's device.
  void check_input(const Tensor& x) const {
    require(x.scalar_type() == at::kBFloat16 && x.device() == packed_.device(), "x is ", x.scalar_type(), " on ",
            x.device(), ", expected bfloat16 on ", packed_.device());
    require(x.dim() > 0 && x.size(-1) == columns_, "x has shape ", x.sizes(), ", expected [..., ", columns_, "]");
  }

 private:
  int64_t writes() const {
    int64_t count = 0;
    for (const Tensor* tensor : {&packed_, &absmax_, &absmax_scale_, &absmax_offset_})
      if (tensor->defined()) count += tensor->_version();
    return count;
  }

  static int64_t next_identity() {
    static std::atomic<int64_t> next{0};
    return next++;
  }

  Tensor packed_, absmax_, absmax_scale_, absmax_offset_, absmax_code_, value_code_;
  int bits_;
  int64_t rows_, columns_;
  std::string kind_;
  std::shared_ptr<Workspace> workspace_;
  int64_t identity_;
};

using PackedMatrixPointer = c10::intrusive_ptr<PackedMatrix>;

// x @ W.T whose backward is dy @ W. The node holds the packed matrix and saves no tensor.
class FrozenProduct : public torch::autograd::Function<FrozenProduct> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const PackedMatrixPointer& matrix) {
    context->saved_data["matrix"] = c10::IValue::make_capsule(matrix);
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    return at::linear(x, matrix->shared_dense());
  }

  static variable_list backward(torch::autograd::AutogradContext* context, const variable_list& grad_outputs) {
    require(!at::GradMode::is_enabled(), "the product with a packed matrix has no second derivative");
    const auto holder = context->saved_data["matrix"].toCapsule();
    const auto& matrix = static_cast<const PackedMatrix&>(*holder);
    return {at::matmul(grad_outputs[0], matrix.shared_dense()), Tensor()};
  }
};

// x [..., columns] bf16 -> [..., rows]; differentiable with respect to x.
Tensor product(const PackedMatrixPointer& matrix, const Tensor& x) {
  matrix->check_input(x);
  return FrozenProduct::apply(x, matrix);
}

Tensor shared_dense(const PackedMatrixPointer& matrix) { return matrix->shared_dense(); }

void fill(const PackedMatrixPointer& matrix, const Tensor& dense) { matrix->fill(dense); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  // wrap_pybind_function keeps the types of torch's exceptions, that of memory running out above all.
  py::class_<Workspace, std::shared_ptr<Workspace>>(module, "Workspace")
      .def(py::init<bool>())
      .def("set_keep_dequantized", &Workspace::set_keep_dequantized)
      .def("clear", &Workspace::clear)
      .def("forget", &Workspace::forget)
      .def("buffers", &Workspace::buffers);
  py::class_<PackedMatrix, PackedMatrixPointer>(module, "PackedMatrix")
      .def(py::init<Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>, Tensor, Tensor, int, int64_t, int64_t,
                    std::string, std::shared_ptr<Workspace>>())
      .def("fill", torch::wrap_pybind_function(fill))
      .def("shared_dense", torch::wrap_pybind_function(shared_dense))
      .def("product", torch::wrap_pybind_function(product));
}
