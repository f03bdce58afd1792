// Differentiable element-wise operators for torch: checks, memory and autograd around elementwise.cu.
//
// The autograd nodes are C++, because at small sizes a layer's time is what launching it costs. They save what is dear
// (inputs that some product made), or kept by another node in any case, and recompute the rest; frozen parameters
// travel beside the saved tensors, so that activation checkpointing does not handle them.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/extension.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "elementwise.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int kVector = 8;

// Contiguous, and named in the message when it does not fit the kernels.
Tensor prepared(const Tensor& tensor, const char* name) {
  require(tensor.is_cuda(), name, " is on ", tensor.device(), ", expected a CUDA device");
  require(tensor.scalar_type() == at::kBFloat16, name, " has dtype ", tensor.scalar_type(), ", expected bfloat16");
  return tensor.contiguous();
}

void check_shape(const Tensor& tensor, at::IntArrayRef shape, const char* name) {
  require(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), ", expected ", shape);
}

void check_channels(int64_t channels, int64_t rows) {
  require(channels % kVector == 0, "the channel count is ", channels, ", expected a multiple of ", kVector);
  require(
      rows * (channels / kVector) < std::numeric_limits<uint32_t>::max() && rows < std::numeric_limits<int32_t>::max(),
      rows, " rows of ", channels, " channels are more than the kernels can index");
}

const void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }

void* mutable_pointer(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

void refuse_double_backward() {
  require(!at::GradMode::is_enabled(), "the fused element-wise operators have no second derivative");
}

// What forward and backward of the token shift share.
elementwise::ShiftMix shift_mix_arguments(const Tensor& z, const Tensor& carry, const Tensor& maa,
                                          const Tensor& modulation, const Tensor& previous) {
  elementwise::ShiftMix arguments{};
  arguments.z = pointer(z);
  arguments.carry = pointer(carry);
  arguments.maa = pointer(maa);
  arguments.modulation = pointer(modulation);
  arguments.previous = previous.defined() ? previous.const_data_ptr<int64_t>() : nullptr;
  arguments.mixes = static_cast<int>(maa.size(0));
  arguments.rows = static_cast<int>(z.size(0) * z.size(1));
  arguments.tokens = static_cast<int>(z.size(1));
  arguments.channels = static_cast<int>(z.size(2));
  return arguments;
}

// The inputs of a token shift, checked; what is not given is undefined.
struct ShiftInputs {
  Tensor z, carry, maa, previous, children;

  ShiftInputs(const Tensor& z_in, const std::optional<Tensor>& carry_in, const Tensor& maa_in,
              const std::optional<Tensor>& previous_in, const std::optional<Tensor>& children_in)
      : z(prepared(z_in, "z")), maa(prepared(maa_in, "maa")) {
    require(z.dim() == 3, "z has ", z.dim(), " dimensions, expected [batch, tokens, channels]");
    const int64_t batch = z.size(0), tokens = z.size(1), channels = z.size(2);
    check_channels(channels, batch * tokens);
    const int64_t mixes = maa.size(0);
    require(mixes == 1 || mixes == 2 || mixes == 5, "maa holds ", mixes, " mixes, expected 1, 2 or 5");
    check_shape(maa, {mixes, channels}, "maa");
    if (carry_in) {
      require(!previous_in, "carry and previous exclude each other here");
      carry = prepared(*carry_in, "carry");
      check_shape(carry, {batch, channels}, "carry");
    }
    if (previous_in) {
      require(batch == 1, "a packed row has batch size 1, got ", batch);
      check_shape(*previous_in, {tokens}, "previous");
      require(children_in && children_in->sizes() == at::IntArrayRef({2, tokens}), "children must be [2, tokens]");
      require(previous_in->device() == z.device() && children_in->device() == z.device(),
              "previous and children must be on z's device");
      require(previous_in->is_contiguous() && children_in->is_contiguous(), "previous and children must be contiguous");
      previous = *previous_in;
      children = *children_in;
    }
  }

  // Outputs as z, and where they are.
  variable_list outputs(elementwise::MixPointers& pointers) const {
    variable_list made(maa.size(0));
    for (size_t g = 0; g < made.size(); ++g) {
      made[g] = at::empty_like(z);
      pointers.mix[g] = mutable_pointer(made[g]);
    }
    return made;
  }

  // For `shift_mix_gradients`, but for what is saved as tensors.
  void save(AutogradContext* context, bool carry_gradient) const {
    context->saved_data["maa"] = maa;
    context->saved_data["shape"] = z.sizes().vec();
    context->saved_data["carry_gradient"] = carry_gradient;
    if (previous.defined()) {
      context->saved_data["previous"] = previous;
      context->saved_data["children"] = children;
    }
  }
};

struct ShiftGradients {
  Tensor z, carry, modulation;
};

// The gradients from those of the outputs; all undefined when these are. z, carry and modulation: as far as there are.
ShiftGradients shift_mix_gradients(AutogradContext* context, const variable_list& grad_outputs, const Tensor& z,
                                   const Tensor& carry, const Tensor& modulation, bool modulation_gradient) {
  const Tensor maa = context->saved_data["maa"].toTensor();
  const auto shape = context->saved_data["shape"].toIntVector();
  ShiftGradients result;
  std::vector<Tensor> grads(grad_outputs.size());
  elementwise::MixPointers pointers{};
  bool any = false;
  for (size_t g = 0; g < grad_outputs.size(); ++g) {
    if (!grad_outputs[g].defined()) continue;
    grads[g] = prepared(grad_outputs[g], "the gradient of shift_mix");
    pointers.mix[g] = mutable_pointer(grads[g]);
    any = true;
  }
  if (!any) return result;
  Tensor previous, children;
  if (context->saved_data.count("previous") != 0) {
    previous = context->saved_data["previous"].toTensor();
    children = context->saved_data["children"].toTensor();
  }
  result.z = at::empty(shape, maa.options());
  elementwise::ShiftMix arguments = shift_mix_arguments(result.z, carry, maa, modulation, previous);
  arguments.z = pointer(z);
  if (context->saved_data["carry_gradient"].toBool()) result.carry = at::empty({shape[0], shape[2]}, maa.options());
  if (modulation_gradient) result.modulation = at::empty_like(modulation);
  check_launch(elementwise::shift_mix_backward(arguments, pointers,
                                               children.defined() ? children.const_data_ptr<int>() : nullptr,
                                               mutable_pointer(result.z), mutable_pointer(result.carry),
                                               mutable_pointer(result.modulation), c10::cuda::getCurrentCUDAStream()),
               "shift_mix backward");
  return result;
}

class ShiftMix : public torch::autograd::Function<ShiftMix> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& z_in, const std::optional<Tensor>& carry_in,
                               const Tensor& maa_in, const std::optional<Tensor>& modulation_in,
                               const std::optional<Tensor>& previous, const std::optional<Tensor>& children) {
    const c10::cuda::CUDAGuard guard(z_in.device());
    const ShiftInputs inputs(z_in, carry_in, maa_in, previous, children);
    const Tensor& z = inputs.z;
    Tensor modulation;
    if (modulation_in) {
      modulation = prepared(*modulation_in, "modulation");
      check_shape(modulation, {inputs.maa.size(0), z.size(0), z.size(1), z.size(2)}, "modulation");
    }
    elementwise::MixPointers pointers{};
    const variable_list outputs = inputs.outputs(pointers);
    const auto arguments = shift_mix_arguments(z, inputs.carry, inputs.maa, modulation, inputs.previous);
    check_launch(elementwise::shift_mix_forward(arguments, pointers, c10::cuda::getCurrentCUDAStream()), "shift_mix");

    context->set_materialize_grads(false);
    const bool carry_gradient = carry_in && carry_in->requires_grad();
    const bool modulation_gradient = modulation_in && modulation_in->requires_grad();
    if (z_in.requires_grad() || carry_gradient || modulation_gradient) {
      // Without modulation the proportions are constants and the backward needs no input at all.
      if (modulation.defined()) context->save_for_backward({z, modulation, inputs.carry});
      context->saved_data["modulation_gradient"] = modulation_gradient;
      inputs.save(context, carry_gradient);
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const c10::cuda::CUDAGuard guard(context->saved_data["maa"].toTensor().device());
    const auto saved = context->get_saved_variables();
    const bool modulated = !saved.empty();
    const ShiftGradients gradients =
        shift_mix_gradients(context, grad_outputs, modulated ? saved[0] : Tensor(), modulated ? saved[2] : Tensor(),
                            modulated ? saved[1] : Tensor(), context->saved_data["modulation_gradient"].toBool());
    return {gradients.z, gradients.carry, Tensor(), gradients.modulation, Tensor(), Tensor()};
  }
};

// hidden [batch, tokens, mixes * width] as [mixes, tokens of all, width].
Tensor by_mix(const Tensor& hidden, const Tensor& up) {
  return hidden.view({hidden.size(0) * hidden.size(1), up.size(0), up.size(1)}).transpose(0, 1);
}

// A token shift whose modulation, hidden @ up for each mix, is formed in both passes and kept in neither.
class ModulatedShiftMix : public torch::autograd::Function<ModulatedShiftMix> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& z_in, const std::optional<Tensor>& carry_in,
                               const Tensor& maa_in, const Tensor& hidden_in, const Tensor& up_in,
                               const std::optional<Tensor>& previous, const std::optional<Tensor>& children) {
    const c10::cuda::CUDAGuard guard(z_in.device());
    const ShiftInputs inputs(z_in, carry_in, maa_in, previous, children);
    const Tensor& z = inputs.z;
    const Tensor hidden = prepared(hidden_in, "hidden"), up = prepared(up_in, "up");
    require(up.dim() == 3, "up has ", up.dim(), " dimensions, expected [mixes, width, channels]");
    check_shape(up, {inputs.maa.size(0), up.size(1), z.size(2)}, "up");
    check_shape(hidden, {z.size(0), z.size(1), up.size(0) * up.size(1)}, "hidden");
    elementwise::MixPointers pointers{};
    const variable_list outputs = inputs.outputs(pointers);
    const Tensor modulation = at::bmm(by_mix(hidden, up), up);
    const auto arguments = shift_mix_arguments(z, inputs.carry, inputs.maa, modulation, inputs.previous);
    check_launch(elementwise::shift_mix_forward(arguments, pointers, c10::cuda::getCurrentCUDAStream()), "shift_mix");

    context->set_materialize_grads(false);
    const bool carry_gradient = carry_in && carry_in->requires_grad();
    if (z_in.requires_grad() || carry_gradient || hidden_in.requires_grad()) {
      context->save_for_backward({z, hidden, inputs.carry});
      context->saved_data["up"] = up;
      context->saved_data["hidden_gradient"] = hidden_in.requires_grad();
      inputs.save(context, carry_gradient);
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const auto saved = context->get_saved_variables();
    const Tensor &z = saved[0], &hidden = saved[1];
    const Tensor up = context->saved_data["up"].toTensor();
    const c10::cuda::CUDAGuard guard(z.device());
    const ShiftGradients gradients =
        shift_mix_gradients(context, grad_outputs, z, saved[2], at::bmm(by_mix(hidden, up), up),
                            context->saved_data["hidden_gradient"].toBool());
    Tensor grad_hidden;
    if (gradients.modulation.defined()) {
      grad_hidden = at::empty_like(hidden);
      Tensor by_mixes = by_mix(grad_hidden, up);
      at::bmm_out(by_mixes, gradients.modulation, up.transpose(1, 2));
    }
    return {gradients.z, gradients.carry, Tensor(), grad_hidden, Tensor(), Tensor(), Tensor()};
  }
};

class GroupNormSiluGate : public torch::autograd::Function<GroupNormSiluGate> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& y_in, const Tensor& gate_in, const Tensor& weight_in,
                        const Tensor& bias_in, double eps) {
    const c10::cuda::CUDAGuard guard(y_in.device());
    const Tensor y = prepared(y_in, "y"), gate = prepared(gate_in, "gate");
    const Tensor weight = prepared(weight_in, "weight"), bias = prepared(bias_in, "bias");
    require(y.dim() == 4, "y has ", y.dim(), " dimensions, expected [batch, tokens, heads, head size]");
    const int64_t head_size = y.size(3), channels = y.size(2) * head_size;
    require(head_size == 16 || head_size == 32 || head_size == 64 || head_size == 128, "the head size is ", head_size,
            ", expected 16, 32, 64 or 128");
    check_channels(channels, y.size(0) * y.size(1));
    check_shape(gate, {y.size(0), y.size(1), channels}, "gate");
    check_shape(weight, {channels}, "weight");
    check_shape(bias, {channels}, "bias");
    const Tensor output = at::empty_like(gate);
    check_launch(elementwise::group_norm_silu_gate_forward(
                     pointer(y), pointer(gate), pointer(weight), pointer(bias), static_cast<float>(eps),
                     mutable_pointer(output), static_cast<int>(y.size(0) * y.size(1)), static_cast<int>(channels),
                     static_cast<int>(head_size), c10::cuda::getCurrentCUDAStream()),
                 "group_norm_silu_gate");
    if (y_in.requires_grad() || gate_in.requires_grad()) {
      context->save_for_backward({y, gate});
      context->saved_data["weight"] = weight;
      context->saved_data["bias"] = bias;
      context->saved_data["eps"] = eps;
    }
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const auto saved = context->get_saved_variables();
    const Tensor &y = saved[0], &gate = saved[1];
    const Tensor weight = context->saved_data["weight"].toTensor(), bias = context->saved_data["bias"].toTensor();
    const c10::cuda::CUDAGuard guard(y.device());
    const Tensor grad_output = prepared(grad_outputs[0], "the gradient of group_norm_silu_gate");
    const Tensor grad_y = at::empty_like(y), grad_gate = at::empty_like(gate);
    check_launch(elementwise::group_norm_silu_gate_backward(
                     pointer(y), pointer(gate), pointer(weight), pointer(bias),
                     static_cast<float>(context->saved_data["eps"].toDouble()), pointer(grad_output),
                     mutable_pointer(grad_y), mutable_pointer(grad_gate), static_cast<int>(y.size(0) * y.size(1)),
                     static_cast<int>(gate.size(2)), static_cast<int>(y.size(3)), c10::cuda::getCurrentCUDAStream()),
                 "group_norm_silu_gate backward");
    return {grad_y, grad_gate, Tensor(), Tensor(), Tensor()};
  }
};

// (x + delta, layer norm of that), so that the backward adds the residual stream's gradient in the same pass.
class AddNorm : public torch::autograd::Function<AddNorm> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& x_in, const std::optional<Tensor>& delta_in,
                               const Tensor& weight_in, const Tensor& bias_in, double eps) {
    const c10::cuda::CUDAGuard guard(x_in.device());
    const Tensor x = prepared(x_in, "x");
    const Tensor weight = prepared(weight_in, "weight"), bias = prepared(bias_in, "bias");
    require(x.dim() >= 1, "x has no dimension, expected [..., channels]");
    const int64_t channels = x.size(-1);
    require(channels > 0 && channels <= elementwise::kMostNormChannels, "x has ", channels, " channels, expected 1 to ",
            elementwise::kMostNormChannels);
    const int64_t rows = x.numel() / channels;
    check_channels(channels, rows);
    check_shape(weight, {channels}, "weight");
    check_shape(bias, {channels}, "bias");
    Tensor delta, sum = x;
    if (delta_in) {
      delta = prepared(*delta_in, "delta");
      check_shape(delta, x.sizes(), "delta");
      sum = at::empty_like(x);
    }
    const Tensor normed = at::empty_like(x);
    const Tensor statistics = at::empty({2, rows}, x.options().dtype(at::kFloat));
    check_launch(elementwise::add_norm_forward(
                     pointer(x), pointer(delta), pointer(weight), pointer(bias), static_cast<float>(eps),
                     delta_in ? mutable_pointer(sum) : nullptr, mutable_pointer(normed), statistics.data_ptr<float>(),
                     static_cast<int>(rows), static_cast<int>(channels), c10::cuda::getCurrentCUDAStream()),
                 "add_norm");
    context->set_materialize_grads(false);
    if (x_in.requires_grad() || (delta_in && delta_in->requires_grad())) {
      context->save_for_backward({sum, statistics});
      context->saved_data["weight"] = weight;
      context->saved_data["adds"] = delta_in.has_value();
    }
    return {delta_in ? sum : x_in.detach(), normed};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    variable_list result(5);
    const bool adds = context->saved_data["adds"].toBool();
    Tensor grad_x = grad_outputs[0];
    if (grad_outputs[1].defined()) {
      const auto saved = context->get_saved_variables();
      const Tensor &sum = saved[0], &statistics = saved[1];
      const Tensor weight = context->saved_data["weight"].toTensor();
      const c10::cuda::CUDAGuard guard(sum.device());
      const Tensor grad_normed = prepared(grad_outputs[1], "the gradient of add_norm");
      Tensor grad_sum;
      if (grad_outputs[0].defined()) grad_sum = prepared(grad_outputs[0], "the gradient of add_norm's sum");
      grad_x = at::empty_like(sum);
      check_launch(elementwise::add_norm_backward(pointer(sum), statistics.const_data_ptr<float>(), pointer(weight),
                                                  pointer(grad_normed), pointer(grad_sum), mutable_pointer(grad_x),
                                                  static_cast<int>(statistics.size(1)),
                                                  static_cast<int>(weight.size(0)), c10::cuda::getCurrentCUDAStream()),
                   "add_norm backward");
    }
    result[0] = grad_x;
    if (adds) result[1] = grad_x;
    return result;
  }
};

void check_vectors(const Tensor& tensor, const char* name) {
  require(tensor.numel() % kVector == 0, name, " has ", tensor.numel(), " values, expected a multiple of ", kVector);
}

// Writes the gradient of x into grad_x, which may be grad itself.
void squared_relu_backward(const Tensor& x, const Tensor& grad, const Tensor& grad_x) {
  check_launch(elementwise::squared_relu_backward(pointer(x), pointer(grad), mutable_pointer(grad_x), x.numel(),
                                                  c10::cuda::getCurrentCUDAStream()),
               "squared_relu backward");
}

class SquaredRelu : public torch::autograd::Function<SquaredRelu> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x_in) {
    const c10::cuda::CUDAGuard guard(x_in.device());
    const Tensor x = prepared(x_in, "x");
    check_vectors(x, "x");
    const Tensor output = at::empty_like(x);
    check_launch(elementwise::squared_relu_forward(pointer(x), mutable_pointer(output), x.numel(),
                                                   c10::cuda::getCurrentCUDAStream()),
                 "squared_relu");
    if (x_in.requires_grad()) context->save_for_backward({x});
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const Tensor x = context->get_saved_variables()[0];
    const c10::cuda::CUDAGuard guard(x.device());
    const Tensor grad_x = at::empty_like(x);
    squared_relu_backward(x, prepared(grad_outputs[0], "the gradient of squared_relu"), grad_x);
    return {grad_x};
  }
};

// The gradients of r and value.
std::tuple<Tensor, Tensor> sigmoid_gated_residual_gradients(const Tensor& x_in, const Tensor& r_in,
                                                            const Tensor& result_in, const Tensor& grad_in) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = prepared(x_in, "x"), r = prepared(r_in, "r"), result = prepared(result_in, "result");
  const Tensor grad = prepared(grad_in, "the gradient of sigmoid_gated_residual");
  check_vectors(x, "x");
  check_shape(r, x.sizes(), "r");
  check_shape(result, x.sizes(), "result");
  check_shape(grad, x.sizes(), "the gradient of sigmoid_gated_residual");
  const Tensor grad_r = at::empty_like(r), grad_value = at::empty_like(r);
  check_launch(elementwise::sigmoid_gated_residual_backward(pointer(x), pointer(r), pointer(result), pointer(grad),
                                                            mutable_pointer(grad_r), mutable_pointer(grad_value),
                                                            x.numel(), c10::cuda::getCurrentCUDAStream()),
               "sigmoid_gated_residual backward");
  return {grad_r, grad_value};
}

class SigmoidGatedResidual : public torch::autograd::Function<SigmoidGatedResidual> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x_in, const Tensor& r_in, const Tensor& value_in) {
    const c10::cuda::CUDAGuard guard(x_in.device());
    const Tensor x = prepared(x_in, "x"), r = prepared(r_in, "r"), value = prepared(value_in, "value");
    check_vectors(x, "x");
    check_shape(r, x.sizes(), "r");
    check_shape(value, x.sizes(), "value");
    const Tensor result = at::empty_like(x);
    check_launch(
        elementwise::sigmoid_gated_residual_forward(pointer(x), pointer(r), pointer(value), mutable_pointer(result),
                                                    x.numel(), c10::cuda::getCurrentCUDAStream()),
        "sigmoid_gated_residual");
    if (x_in.requires_grad() || r_in.requires_grad() || value_in.requires_grad()) {
      // The norms beside this sum keep x and the result in any case; value would be kept for this alone.
      context->save_for_backward({x, r, result});
    }
    return result;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const auto saved = context->get_saved_variables();
    const auto [grad_r, grad_value] = sigmoid_gated_residual_gradients(saved[0], saved[1], saved[2], grad_outputs[0]);
    return {grad_outputs[0], grad_r, grad_value};
  }
};

std::vector<Tensor> shift_mixes(const Tensor& z, const std::optional<Tensor>& carry, const Tensor& maa,
                                const std::optional<Tensor>& modulation, const std::optional<Tensor>& previous,
                                const std::optional<Tensor>& children) {
  return ShiftMix::apply(z, carry, maa, modulation, previous, children);
}

std::vector<Tensor> modulated_shift_mixes(const Tensor& z, const std::optional<Tensor>& carry, const Tensor& maa,
                                          const Tensor& hidden, const Tensor& up, const std::optional<Tensor>& previous,
                                          const std::optional<Tensor>& children) {
  return ModulatedShiftMix::apply(z, carry, maa, hidden, up, previous, children);
}

Tensor group_norm_silu_gate(const Tensor& y, const Tensor& gate, const Tensor& weight, const Tensor& bias, double eps) {
  return GroupNormSiluGate::apply(y, gate, weight, bias, eps);
}

std::vector<Tensor> add_norm(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& weight,
                             const Tensor& bias, double eps) {
  return AddNorm::apply(x, delta, weight, bias, eps);
}

Tensor squared_relu(const Tensor& x) { return SquaredRelu::apply(x); }

void squared_relu_gradient(const Tensor& x_in, const Tensor& grad) {
  const c10::cuda::CUDAGuard guard(x_in.device());
  const Tensor x = prepared(x_in, "x");
  check_vectors(x, "x");
  check_shape(grad, x.sizes(), "the gradient of squared_relu");
  require(prepared(grad, "the gradient of squared_relu").is_same(grad), "the gradient of squared_relu is strided");
  squared_relu_backward(x, grad, grad);
}

Tensor sigmoid_gated_residual(const Tensor& x, const Tensor& r, const Tensor& value) {
  return SigmoidGatedResidual::apply(x, r, value);
}

// Both check what both kernels rely on.
void check_logits(const Tensor& logits, const Tensor& targets) {
  require(logits.is_cuda() && logits.scalar_type() == at::kBFloat16 && logits.dim() == 2 && logits.is_contiguous(),
          "logits must be a contiguous bfloat16 matrix [rows, vocabulary] on a CUDA device");
  require(logits.size(1) % kVector == 0, "the vocabulary has ", logits.size(1), " entries, expected a multiple of ",
          kVector);
  require(targets.scalar_type() == at::kLong && targets.is_contiguous() && targets.device() == logits.device(),
          "targets must be contiguous int64 on the logits' device");
  check_shape(targets, {logits.size(0)}, "targets");
}

template <typename Value>
Value* row_values(const Tensor& tensor, const Tensor& logits, const char* name) {
  require(tensor.is_contiguous() && tensor.device() == logits.device(), name,
          " must be contiguous on the logits' device");
  check_shape(tensor, {logits.size(0)}, name);
  return tensor.data_ptr<Value>();
}

void logit_statistics(const Tensor& logits, const Tensor& targets, const Tensor& logp, const Tensor& max_logit,
                      const Tensor& logsumexp, const Tensor& argmax) {
  check_logits(logits, targets);
  const c10::cuda::CUDAGuard guard(logits.device());
  check_launch(elementwise::logit_statistics(
                   pointer(logits), targets.const_data_ptr<int64_t>(), row_values<float>(logp, logits, "logp"),
                   row_values<float>(max_logit, logits, "max_logit"), row_values<float>(logsumexp, logits, "logsumexp"),
                   row_values<int>(argmax, logits, "argmax"), static_cast<int>(logits.size(0)),
                   static_cast<int>(logits.size(1)), c10::cuda::getCurrentCUDAStream()),
               "logit_statistics");
}

void logit_gradient(const Tensor& logits, const Tensor& targets, const Tensor& logsumexp, const Tensor& argmax,
                    const Tensor& grad_logp, const Tensor& grad_max_logit) {
  check_logits(logits, targets);
  const c10::cuda::CUDAGuard guard(logits.device());
  check_launch(
      elementwise::logit_gradient(
          mutable_pointer(logits), targets.const_data_ptr<int64_t>(), row_values<float>(logsumexp, logits, "logsumexp"),
          row_values<int>(argmax, logits, "argmax"), row_values<float>(grad_logp, logits, "grad_logp"),
          row_values<float>(grad_max_logit, logits, "grad_max_logit"), static_cast<int>(logits.size(0)),
          static_cast<int>(logits.size(1)), c10::cuda::getCurrentCUDAStream()),
      "logit_gradient");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  // wrap_pybind_function lets Python exceptions pass that autograd's hooks raise inside (checkpointing ends a
  // recomputation by one).
  module.def("shift_mixes", torch::wrap_pybind_function(shift_mixes));
  module.def("modulated_shift_mixes", torch::wrap_pybind_function(modulated_shift_mixes));
  module.def("group_norm_silu_gate", torch::wrap_pybind_function(group_norm_silu_gate));
  module.def("add_norm", torch::wrap_pybind_function(add_norm));
  module.attr("most_norm_channels") = elementwise::kMostNormChannels;
  module.def("squared_relu", torch::wrap_pybind_function(squared_relu));
  module.def("squared_relu_gradient", torch::wrap_pybind_function(squared_relu_gradient));
  module.def("sigmoid_gated_residual", torch::wrap_pybind_function(sigmoid_gated_residual));
  module.def("sigmoid_gated_residual_gradients", torch::wrap_pybind_function(sigmoid_gated_residual_gradients));
  module.def("logit_statistics", torch::wrap_pybind_function(logit_statistics));
  module.def("logit_gradient", torch::wrap_pybind_function(logit_gradient));
}
