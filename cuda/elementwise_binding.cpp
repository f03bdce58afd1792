// Differentiable element-wise operators for torch: checks, memory and autograd around elementwise.cu.
//
// The autograd nodes are C++, because at small sizes a layer's time is what launching it costs. They save what is dear
// (inputs that some product made), or kept by another node in any case, and recompute the rest. Parameters may be
// stored wider than bf16; their gradients are summed in fp32 and so handed to autograd, which casts them to the
// parameter's dtype. A gradient that is not asked for costs nothing.

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
using elementwise::kVector;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;


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

bool requires_grad(const std::optional<Tensor>& tensor) { return tensor && tensor->requires_grad(); }

// Any of the gradients that have arrived; undefined when none has.
Tensor any_of(const variable_list& gradients) {
  for (const Tensor& gradient : gradients) {
    if (gradient.defined()) return gradient;
  }
  return Tensor();
}

void refuse_double_backward() {
  require(!at::GradMode::is_enabled(), "the fused element-wise operators have no second derivative");
}

// What forward and backward of the token shift share; shape is that of z, which may be undefined as the rest.
elementwise::ShiftMix shift_mix_arguments(at::IntArrayRef shape, const Tensor& z, const Tensor& carry,
                                          const Tensor& maa, const Tensor& modulation, const Tensor& previous) {
  elementwise::ShiftMix arguments{};
  arguments.z = pointer(z);
  arguments.carry = pointer(carry);
  arguments.maa = pointer(maa);
  arguments.modulation = pointer(modulation);
  arguments.previous = previous.defined() ? previous.const_data_ptr<int64_t>() : nullptr;
  arguments.mixes = static_cast<int>(maa.size(0));
  arguments.rows = static_cast<int>(shape[0] * shape[1]);
  arguments.tokens = static_cast<int>(shape[1]);
  arguments.channels = static_cast<int>(shape[2]);
  return arguments;
}

// Says for the tensor arguments of a node in turn whether the gradient is asked for; one that is not given has no edge.
class Asked {
 public:
  explicit Asked(AutogradContext* context) : context_(context) {}
  bool next(bool given = true) { return given && context_->needs_input_grad(edge_++); }

 private:
  AutogradContext* context_;
  size_t edge_ = 0;
};

// A parameter as the kernels read it: it may be stored wider.
Tensor prepared_parameter(const Tensor& parameter, const char* name) {
  return prepared(parameter.to(at::kBFloat16), name);
}

// Keeps a parameter as it was given, so that no rounded copy lives until the backward: a trained one is returned, to go
// among the saved tensors, which notice changes in place; a frozen one goes beside them.
Tensor kept(AutogradContext* context, const char* name, const Tensor& parameter) {
  if (parameter.requires_grad()) return parameter;
  context->saved_data[name] = parameter;
  return Tensor();
}

Tensor kept_parameter(AutogradContext* context, const char* name, const Tensor& saved) {
  return prepared_parameter(saved.defined() ? saved : context->saved_data.at(name).toTensor(), name);
}

// For the sums over tiles of rows that `rows_of_sums` parameter rows of `channels` have.
Tensor empty_sums(const Tensor& like, int64_t rows, int64_t rows_of_sums, int64_t channels) {
  return at::empty({elementwise::parameter_tiles(rows, channels), rows_of_sums, channels},
                   like.options().dtype(at::kFloat));
}

// The gradients of a norm's weight and bias, as far as they are asked for; launch(NormSums) sums over tiles.
template <typename Launch>
std::tuple<Tensor, Tensor> norm_gradients(bool of_weight, bool of_bias, const Tensor& like, int64_t rows,
                                          int64_t channels, const Launch& launch, const char* name) {
  if (!of_weight && !of_bias) return {};
  const int64_t asked = of_weight + of_bias;
  const Tensor sums = empty_sums(like, rows, asked, channels);
  float* first = sums.data_ptr<float>();
  const elementwise::NormSums places{of_weight ? first : nullptr, of_bias ? first + of_weight * channels : nullptr,
                                     asked * channels};
  check_launch(launch(places), name);
  const Tensor total = sums.sum(0);
  return {of_weight ? total[0] : Tensor(), of_bias ? total[of_weight] : Tensor()};
}

// The inputs of a token shift, checked; what is not given is undefined.
struct ShiftInputs {
  Tensor z, carry, maa, previous, children;

  ShiftInputs(const Tensor& z_in, const std::optional<Tensor>& carry_in, const Tensor& maa_in,
              const std::optional<Tensor>& previous_in, const std::optional<Tensor>& children_in)
      : z(prepared(z_in, "z")), maa(prepared_parameter(maa_in, "maa")) {
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

  variable_list mixed(const Tensor& modulation) const {
    elementwise::MixPointers pointers{};
    variable_list outputs(maa.size(0));
    for (size_t g = 0; g < outputs.size(); ++g) {
      outputs[g] = at::empty_like(z);
      pointers.mix[g] = mutable_pointer(outputs[g]);
    }
    const auto arguments = shift_mix_arguments(z.sizes(), z, carry, maa, modulation, previous);
    check_launch(elementwise::shift_mix_forward(arguments, pointers, c10::cuda::getCurrentCUDAStream()), "shift_mix");
    return outputs;
  }

  // For `ShiftGradients`, but for what goes among the saved tensors.
  void save(AutogradContext* context) const {
    context->saved_data["shape"] = z.sizes().vec();
    context->saved_data["has_carry"] = carry.defined();
    if (previous.defined()) {
      context->saved_data["previous"] = previous;
      context->saved_data["children"] = children;
    }
  }
};

// The gradients of a token shift, as far as they are asked for.
struct ShiftGradients {
  Tensor z, carry, maa, modulation;

  // z_in, carry_in and modulation_in: as far as the gradients that are asked for need them.
  ShiftGradients(AutogradContext* context, const variable_list& grad_outputs, const Tensor& z_in,
                 const Tensor& carry_in, const Tensor& maa_in, const Tensor& modulation_in, bool of_z, bool of_carry,
                 bool of_maa, bool of_modulation) {
    const auto shape = context->saved_data["shape"].toIntVector();
    std::vector<Tensor> grads(grad_outputs.size());
    elementwise::MixPointers pointers{};
    for (size_t g = 0; g < grads.size(); ++g) {
      if (!grad_outputs[g].defined()) continue;
      grads[g] = prepared(grad_outputs[g], "the gradient of shift_mix");
      pointers.mix[g] = mutable_pointer(grads[g]);
    }
    Tensor previous, children;
    if (context->saved_data.count("previous") != 0) {
      previous = context->saved_data["previous"].toTensor();
      children = context->saved_data["children"].toTensor();
    }
    const auto stream = c10::cuda::getCurrentCUDAStream();
    auto arguments = shift_mix_arguments(shape, z_in, carry_in, maa_in, modulation_in, previous);
    if (of_z || of_carry || of_modulation) {
      z = at::empty(shape, maa_in.options());
      if (of_carry) carry = at::empty({shape[0], shape[2]}, maa_in.options());
      if (of_modulation) modulation = at::empty_like(modulation_in);
      check_launch(elementwise::shift_mix_backward(
                       arguments, pointers, children.defined() ? children.const_data_ptr<int>() : nullptr,
                       mutable_pointer(z), mutable_pointer(carry), mutable_pointer(modulation), stream),
                   "shift_mix backward");
    }
    if (of_maa) {
      const Tensor sums = empty_sums(maa_in, arguments.rows, arguments.mixes, arguments.channels);
      check_launch(elementwise::shift_mix_maa_sums(arguments, pointers, sums.data_ptr<float>(), stream),
                   "shift_mix backward for maa");
      maa = sums.sum(0);
    }
  }
};

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
    const variable_list outputs = inputs.mixed(modulation);

    context->set_materialize_grads(false);
    if (z_in.requires_grad() || requires_grad(carry_in) || maa_in.requires_grad() || requires_grad(modulation_in)) {
      // Without modulation the proportions are constants: only the gradient of maa needs an input.
      const bool needs_inputs = modulation.defined() || maa_in.requires_grad();
      context->save_for_backward({needs_inputs ? z : Tensor(), needs_inputs ? inputs.carry : Tensor(),
                                  kept(context, "maa", maa_in), modulation});
      inputs.save(context);
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const Tensor any = any_of(grad_outputs);
    if (!any.defined()) return variable_list(6);
    const c10::cuda::CUDAGuard guard(any.device());
    const auto saved = context->get_saved_variables();
    const Tensor &z = saved[0], &carry = saved[1], &modulation = saved[3];
    Asked asked(context);
    const bool of_z = asked.next(), of_carry = asked.next(context->saved_data["has_carry"].toBool());
    const bool of_maa = asked.next(), of_modulation = asked.next(modulation.defined());
    const Tensor maa = kept_parameter(context, "maa", saved[2]);
    const ShiftGradients gradients(context, grad_outputs, z, carry, maa, modulation, of_z, of_carry, of_maa,
                                   of_modulation);
    return {gradients.z, gradients.carry, gradients.maa, gradients.modulation, Tensor(), Tensor()};
  }
};

// hidden [batch, tokens, mixes * width] as [mixes, tokens of all, width].
Tensor by_mix(const Tensor& hidden, const Tensor& up) {
  return hidden.view({hidden.size(0) * hidden.size(1), up.size(0), up.size(1)}).transpose(0, 1);
}

// A token shift whose modulation is hidden @ up for each mix; unless it is kept, the backward pass forms it again.
class ModulatedShiftMix : public torch::autograd::Function<ModulatedShiftMix> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& z_in, const std::optional<Tensor>& carry_in,
                               const Tensor& maa_in, const Tensor& hidden_in, const Tensor& up_in,
                               const std::optional<Tensor>& previous, const std::optional<Tensor>& children,
                               bool keeps_modulation) {
    const c10::cuda::CUDAGuard guard(z_in.device());
    const ShiftInputs inputs(z_in, carry_in, maa_in, previous, children);
    const Tensor& z = inputs.z;
    const Tensor hidden = prepared(hidden_in, "hidden"), up = prepared_parameter(up_in, "up");
    require(up.dim() == 3, "up has ", up.dim(), " dimensions, expected [mixes, width, channels]");
    check_shape(up, {inputs.maa.size(0), up.size(1), z.size(2)}, "up");
    check_shape(hidden, {z.size(0), z.size(1), up.size(0) * up.size(1)}, "hidden");
    const Tensor modulation = at::bmm(by_mix(hidden, up), up);
    const variable_list outputs = inputs.mixed(modulation);

    context->set_materialize_grads(false);
    if (z_in.requires_grad() || requires_grad(carry_in) || maa_in.requires_grad() || hidden_in.requires_grad() ||
        up_in.requires_grad()) {
      context->save_for_backward({z, inputs.carry, kept(context, "maa", maa_in),
                                  keeps_modulation ? modulation : Tensor(),
                                  !keeps_modulation || up_in.requires_grad() ? hidden : Tensor(),
                                  kept(context, "up", up_in)});
      inputs.save(context);
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const Tensor any = any_of(grad_outputs);
    if (!any.defined()) return variable_list(8);
    const c10::cuda::CUDAGuard guard(any.device());
    const auto saved = context->get_saved_variables();
    const Tensor &z = saved[0], &carry = saved[1], &hidden = saved[4];
    Asked asked(context);
    const bool of_z = asked.next(), of_carry = asked.next(carry.defined()), of_maa = asked.next();
    const bool of_hidden = asked.next(), of_up = asked.next();
    const Tensor maa = kept_parameter(context, "maa", saved[2]), up = kept_parameter(context, "up", saved[5]);
    Tensor modulation = saved[3];
    if (!modulation.defined() && (of_z || of_carry || of_hidden || of_up)) modulation = at::bmm(by_mix(hidden, up), up);
    const ShiftGradients gradients(context, grad_outputs, z, carry, maa, modulation, of_z, of_carry, of_maa,
                                   of_hidden || of_up);
    Tensor grad_hidden, grad_up;
    if (of_hidden) {
      grad_hidden = at::empty({z.size(0), z.size(1), up.size(0) * up.size(1)}, z.options());
      Tensor by_mixes = by_mix(grad_hidden, up);
      at::bmm_out(by_mixes, gradients.modulation, up.transpose(1, 2));
    }
    if (of_up) grad_up = at::bmm(by_mix(hidden, up).transpose(1, 2), gradients.modulation, at::kFloat);
    return {gradients.z, gradients.carry, gradients.maa, grad_hidden, grad_up, Tensor(), Tensor(), Tensor()};
  }
};

class GroupNormSiluGate : public torch::autograd::Function<GroupNormSiluGate> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& y_in, const Tensor& gate_in, const Tensor& weight_in,
                        const Tensor& bias_in, double eps) {
    const c10::cuda::CUDAGuard guard(y_in.device());
    const Tensor y = prepared(y_in, "y"), gate = prepared(gate_in, "gate");
    const Tensor weight = prepared_parameter(weight_in, "weight"), bias = prepared_parameter(bias_in, "bias");
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
    if (y_in.requires_grad() || gate_in.requires_grad() || weight_in.requires_grad() || bias_in.requires_grad()) {
      context->save_for_backward({y, gate, kept(context, "weight", weight_in), kept(context, "bias", bias_in)});
      context->saved_data["eps"] = eps;
    }
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const auto saved = context->get_saved_variables();
    const Tensor &y = saved[0], &gate = saved[1];
    Asked asked(context);
    const bool of_y = asked.next(), of_gate = asked.next(), of_weight = asked.next(), of_bias = asked.next();
    const c10::cuda::CUDAGuard guard(y.device());
    const Tensor grad_output = prepared(grad_outputs[0], "the gradient of group_norm_silu_gate");
    const float eps = static_cast<float>(context->saved_data["eps"].toDouble());
    const int rows = static_cast<int>(y.size(0) * y.size(1)), channels = static_cast<int>(gate.size(2));
    const int head_size = static_cast<int>(y.size(3));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    Tensor grad_y, grad_gate;
    if (of_y || of_gate) {
      const Tensor weight = kept_parameter(context, "weight", saved[2]);
      const Tensor bias = kept_parameter(context, "bias", saved[3]);
      grad_y = at::empty_like(y);
      grad_gate = at::empty_like(gate);
      check_launch(elementwise::group_norm_silu_gate_backward(
                       pointer(y), pointer(gate), pointer(weight), pointer(bias), eps, pointer(grad_output),
                       mutable_pointer(grad_y), mutable_pointer(grad_gate), rows, channels, head_size, stream),
                   "group_norm_silu_gate backward");
    }
    const auto [grad_weight, grad_bias] = norm_gradients(
        of_weight, of_bias, y, rows, channels,
        [&](const elementwise::NormSums& sums) {
          return elementwise::group_norm_silu_gate_sums(pointer(y), pointer(gate), eps, pointer(grad_output), rows,
                                                        channels, head_size, sums, stream);
        },
        "group_norm_silu_gate backward for weight and bias");
    return {grad_y, grad_gate, grad_weight, grad_bias, Tensor()};
  }
};

// (x + delta, layer norm of that), so that the backward adds the residual stream's gradient in the same pass.
class AddNorm : public torch::autograd::Function<AddNorm> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& x_in, const std::optional<Tensor>& delta_in,
                               const Tensor& weight_in, const Tensor& bias_in, double eps) {
    const c10::cuda::CUDAGuard guard(x_in.device());
    const Tensor x = prepared(x_in, "x");
    const Tensor weight = prepared_parameter(weight_in, "weight"), bias = prepared_parameter(bias_in, "bias");
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
    const bool sum_has_gradient = x_in.requires_grad() || requires_grad(delta_in);
    const Tensor total = delta_in ? sum : x_in.detach();
    if (!sum_has_gradient) context->mark_non_differentiable({total});
    if (sum_has_gradient || weight_in.requires_grad() || bias_in.requires_grad()) {
      context->save_for_backward({sum, statistics, kept(context, "weight", weight_in)});
      context->saved_data["adds"] = delta_in.has_value();
    }
    return {total, normed};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    refuse_double_backward();
    const bool adds = context->saved_data["adds"].toBool();
    Asked asked(context);
    const bool of_x = asked.next(), of_delta = asked.next(adds), of_weight = asked.next(), of_bias = asked.next();
    Tensor grad_x = grad_outputs[0], grad_weight, grad_bias;
    if (grad_outputs[1].defined()) {
      const auto saved = context->get_saved_variables();
      const Tensor &sum = saved[0], &statistics = saved[1];
      const c10::cuda::CUDAGuard guard(sum.device());
      const Tensor grad_normed = prepared(grad_outputs[1], "the gradient of add_norm");
      const float* row_statistics = statistics.const_data_ptr<float>();
      const int rows = static_cast<int>(statistics.size(1)), channels = static_cast<int>(sum.size(-1));
      const auto stream = c10::cuda::getCurrentCUDAStream();
      if (of_x || of_delta) {
        const Tensor weight = kept_parameter(context, "weight", saved[2]);
        Tensor grad_sum;
        if (grad_outputs[0].defined()) grad_sum = prepared(grad_outputs[0], "the gradient of add_norm's sum");
        grad_x = at::empty_like(sum);
        check_launch(
            elementwise::add_norm_backward(pointer(sum), row_statistics, pointer(weight), pointer(grad_normed),
                                           pointer(grad_sum), mutable_pointer(grad_x), rows, channels, stream),
            "add_norm backward");
      }
      std::tie(grad_weight, grad_bias) = norm_gradients(
          of_weight, of_bias, sum, rows, channels,
          [&](const elementwise::NormSums& sums) {
            return elementwise::add_norm_sums(pointer(sum), row_statistics, pointer(grad_normed), rows, channels, sums,
                                              stream);
          },
          "add_norm backward for weight and bias");
    }
    return {grad_x, adds ? grad_x : Tensor(), grad_weight, grad_bias, Tensor()};
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
                                          const std::optional<Tensor>& children, bool keeps_modulation) {
  return ModulatedShiftMix::apply(z, carry, maa, hidden, up, previous, children, keeps_modulation);
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
