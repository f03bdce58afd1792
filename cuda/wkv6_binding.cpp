// The WKV6 operator for torch: checks, memory and autograd around wkv6.cu.
//
// The autograd node is C++, because at small sizes a layer's time is what launching it costs. It saves its inputs, a
// bf16 state every 64 tokens and the 16x16 pair weights of each tile: 1.25 times the memory of y.

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/extension.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "wkv6.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kSize = kWkv6HeadSize;
constexpr int64_t kMostRows = int64_t{1} << 27;  // the kernels number 4-byte words with 32 bits
constexpr int64_t kShortestSegment = 2 * kWkv6ChunkTokens;
// Blocks that fit on one multiprocessor of Hopper, as the kernels ask for.
constexpr int64_t kForwardBlocks = 4;
constexpr int64_t kBackwardBlocks = 2;

void check_tensor(const Tensor& tensor, const char* name, const Tensor& like) {
  require(tensor.is_cuda() && tensor.device() == like.device(), name, " is on ", tensor.device(),
          ", expected the CUDA device of r, ", like.device());
  require(tensor.is_contiguous(), name, " is not contiguous");
  require(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name, " does not start on 16 bytes");
}

void check_tokens(const Tensor& tensor, const char* name, const Tensor& r) {
  check_tensor(tensor, name, r);
  require(tensor.scalar_type() == at::kBFloat16, name, " has dtype ", tensor.scalar_type(), ", expected bfloat16");
  require(tensor.dim() == 4 && tensor.sizes() == r.sizes(), name, " has shape ", tensor.sizes(), ", expected r's ",
          r.sizes());
}

// Contiguous and aligned, copied only when it is not.
Tensor prepared(const Tensor& tensor) {
  const Tensor dense = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Segments so short that the GPU is full, or whole sequences when these fill it.
int64_t segment_tokens_for(const Tensor& r, int64_t blocks_per_multiprocessor) {
  const int64_t heads = r.size(2), all_tokens = r.size(0) * r.size(1);
  const int64_t blocks = blocks_per_multiprocessor * wkv6_multiprocessors(r.get_device());
  const int64_t wanted = ceil_div(ceil_div(all_tokens * heads, blocks), kWkv6ChunkTokens) * kWkv6ChunkTokens;
  return std::max(wanted, kShortestSegment);
}

Wkv6Layout layout_of(const Tensor& r, const Tensor& borders, int64_t segment_tokens, int64_t blocks) {
  const int64_t batch = r.size(0), tokens = r.size(1), heads = r.size(2);
  require(batch * tokens * heads < kMostRows, "r has ", batch * tokens * heads, " rows of 64, expected fewer than ",
          kMostRows);
  if (segment_tokens == 0) segment_tokens = segment_tokens_for(r, blocks);
  require(segment_tokens > 0 && segment_tokens % kWkv6ChunkTokens == 0, "segment_tokens is ", segment_tokens,
          ", expected a multiple of ", kWkv6ChunkTokens);
  segment_tokens = std::min(segment_tokens, ceil_div(tokens, kWkv6ChunkTokens) * kWkv6ChunkTokens);
  const int64_t sequences = borders.defined() ? borders.size(0) - 1 : batch;
  const int64_t items =
      borders.defined() ? tokens / segment_tokens + sequences : batch * ceil_div(tokens, segment_tokens);
  require(items <= 65535, "there are ", items, " segments of sequences, more than a grid can have; use fewer rows");
  Wkv6Layout layout{};
  layout.heads = static_cast<int>(heads);
  layout.sequences = static_cast<int>(sequences);
  layout.tokens = static_cast<int>(tokens);
  layout.borders = borders.defined() ? borders.const_data_ptr<int32_t>() : nullptr;
  layout.segment_tokens = static_cast<int>(segment_tokens);
  layout.items = static_cast<int>(items);
  return layout;
}

struct Scratch {
  Tensor states, decays;
  Scratch(const Wkv6Layout& layout, const at::TensorOptions& options, bool needed) {
    if (!needed) return;
    states = at::empty({layout.items, layout.heads, kSize, kSize}, options);
    decays = at::empty({layout.items, layout.heads, kSize}, options);
  }
  float* states_pointer() const { return states.defined() ? states.mutable_data_ptr<float>() : nullptr; }
  float* decays_pointer() const { return decays.defined() ? decays.mutable_data_ptr<float>() : nullptr; }
};

// What is saved for the backward is written only when `save`.
struct ForwardResult {
  Tensor y, final_state, checkpoints, pair_weights;
};

ForwardResult run_forward(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w_raw, const Tensor& u,
                          const Tensor& state, const Tensor& borders, int64_t segment_tokens, bool save) {
  const c10::cuda::CUDAGuard guard(r.device());
  const Wkv6Layout layout = layout_of(r, borders, segment_tokens, kForwardBlocks);
  const int64_t heads = layout.heads, sequences = layout.sequences;
  const auto floats = r.options().dtype(at::kFloat);
  ForwardResult result;
  result.y = at::empty_like(r);
  result.final_state = at::empty({sequences, heads, kSize, kSize}, floats);
  if (save) {
    const int64_t chunks = borders.defined() ? layout.tokens / kWkv6ChunkTokens + sequences
                                             : sequences * ceil_div(layout.tokens, kWkv6ChunkTokens);
    const int64_t tiles = kWkv6ChunkTokens / kWkv6TileTokens;
    result.checkpoints = at::empty({chunks, heads, kSize, kSize}, r.options());
    result.pair_weights = at::empty({chunks, heads, tiles, kWkv6TileTokens, kWkv6TileTokens}, r.options());
  }
  const Scratch scratch(layout, floats, layout.segment_tokens < layout.tokens);

  Wkv6Forward arguments{};
  arguments.layout = layout;
  arguments.r = r.const_data_ptr();
  arguments.k = k.const_data_ptr();
  arguments.v = v.const_data_ptr();
  arguments.w_raw = w_raw.const_data_ptr();
  arguments.u = u.const_data_ptr();
  arguments.u_is_bf16 = u.scalar_type() == at::kBFloat16;
  arguments.state = state.const_data_ptr<float>();
  arguments.state_is_shared = state.dim() == 3;
  arguments.y = result.y.mutable_data_ptr();
  arguments.final_state = result.final_state.mutable_data_ptr<float>();
  arguments.checkpoints = save ? result.checkpoints.mutable_data_ptr() : nullptr;
  arguments.pair_weights = save ? result.pair_weights.mutable_data_ptr() : nullptr;
  arguments.segment_states = scratch.states_pointer();
  arguments.segment_decays = scratch.decays_pointer();
  check_launch(wkv6_forward(arguments, c10::cuda::getCurrentCUDAStream()), "wkv6_forward");
  return result;
}

// Input positions, which are also positions of their gradients.
enum : size_t { kR, kK, kV, kW, kU, kState, kBorders, kSegment, kSave };

class Wkv6 : public torch::autograd::Function<Wkv6> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& r, const Tensor& k, const Tensor& v,
                               const Tensor& w_raw, const Tensor& u, const Tensor& state,
                               const std::optional<Tensor>& given_borders, int64_t segment_tokens,
                               bool tokens_need_gradient) {
    const Tensor borders = given_borders.value_or(Tensor());
    const ForwardResult result = run_forward(r, k, v, w_raw, u, state, borders, segment_tokens, tokens_need_gradient);
    ctx->set_materialize_grads(false);
    ctx->saved_data["segment_tokens"] = segment_tokens;
    ctx->saved_data["state_is_shared"] = state.dim() == 3;
    ctx->saved_data["tokens"] = tokens_need_gradient;
    if (tokens_need_gradient) {
      ctx->save_for_backward({r, w_raw, borders, k, v, u, result.checkpoints, result.pair_weights});
    } else {
      ctx->save_for_backward({r, w_raw, borders});  // the state's gradient alone needs neither k nor v
    }
    return {result.y, result.final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    require(!at::GradMode::is_enabled(), "wkv6 has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &r = saved[0], &w_raw = saved[1], &borders = saved[2];
    const c10::cuda::CUDAGuard guard(r.device());
    const auto floats = r.options().dtype(at::kFloat);
    const Tensor dy = outputs[0].defined() ? prepared(outputs[0]) : at::zeros_like(r);
    check_tokens(dy, "the gradient of y", r);
    const Tensor dfinal = outputs[1].defined() ? prepared(outputs[1]) : Tensor();

    const bool tokens = ctx->saved_data["tokens"].toBool() &&
                        (ctx->needs_input_grad(kR) || ctx->needs_input_grad(kK) || ctx->needs_input_grad(kV) ||
                         ctx->needs_input_grad(kW) || ctx->needs_input_grad(kU));
    const Wkv6Layout layout =
        layout_of(r, borders, ctx->saved_data["segment_tokens"].toInt(), tokens ? kBackwardBlocks : kForwardBlocks);
    const int64_t heads = layout.heads;
    const Scratch scratch(layout, floats, !tokens || layout.segment_tokens < layout.tokens);

    Tensor du, dstate;
    if (ctx->needs_input_grad(kState)) dstate = at::empty({layout.sequences, heads, kSize, kSize}, floats);
    variable_list gradients(kSave + 1);
    Wkv6Backward arguments{};
    arguments.layout = layout;
    arguments.r = r.const_data_ptr();
    arguments.w_raw = w_raw.const_data_ptr();
    arguments.dy = dy.const_data_ptr();
    arguments.dfinal_state = dfinal.defined() ? dfinal.const_data_ptr<float>() : nullptr;
    arguments.segment_states = scratch.states_pointer();
    arguments.segment_decays = scratch.decays_pointer();
    arguments.dstate = dstate.defined() ? dstate.mutable_data_ptr<float>() : nullptr;
    if (tokens) {
      const Tensor& u = saved[5];
      arguments.k = saved[3].const_data_ptr();
      arguments.v = saved[4].const_data_ptr();
      arguments.u = u.const_data_ptr();
      arguments.u_is_bf16 = u.scalar_type() == at::kBFloat16;
      arguments.checkpoints = saved[6].const_data_ptr();
      arguments.pair_weights = saved[7].const_data_ptr();
      for (const size_t position : {kR, kK, kV, kW}) gradients[position] = at::empty_like(r);
      arguments.dr = gradients[kR].mutable_data_ptr();
      arguments.dk = gradients[kK].mutable_data_ptr();
      arguments.dv = gradients[kV].mutable_data_ptr();
      arguments.dw_raw = gradients[kW].mutable_data_ptr();
      if (ctx->needs_input_grad(kU)) {
        du = at::empty({layout.items, heads, kSize}, floats);
        arguments.du = du.mutable_data_ptr<float>();
      }
    }
    if (tokens || dstate.defined()) {
      check_launch(wkv6_backward(arguments, c10::cuda::getCurrentCUDAStream()), "wkv6_backward");
    }
    if (du.defined()) gradients[kU] = du.sum(0).to(saved[5].scalar_type());
    if (dstate.defined()) {
      const bool shared = ctx->saved_data["state_is_shared"].toBool();
      // A sum over a fixed order: the same bits in every run.
      gradients[kState] = !shared ? dstate : layout.sequences == 1 ? dstate.squeeze(0) : dstate.sum(0);
    }
    return gradients;
  }
};

std::tuple<Tensor, Tensor> wkv6(const Tensor& r_given, const Tensor& k_given, const Tensor& v_given,
                                const Tensor& w_given, const Tensor& u_given, const Tensor& state_given,
                                const std::optional<Tensor>& borders_given, int64_t segment_tokens) {
  const Tensor r = prepared(r_given), k = prepared(k_given), v = prepared(v_given), w_raw = prepared(w_given);
  const Tensor u = prepared(u_given), state = prepared(state_given);
  require(r.is_cuda(), "r is on ", r.device(), ", expected a CUDA device");
  require(r.dim() == 4 && r.size(3) == kSize && r.numel() > 0, "r has shape ", r.sizes(), ", expected [B, T, H, 64]");
  check_tokens(r, "r", r);
  check_tokens(k, "k", r);
  check_tokens(v, "v", r);
  check_tokens(w_raw, "w_raw", r);
  check_tensor(u, "u", r);
  const int64_t heads = r.size(2);
  require(u.dim() == 2 && u.size(0) == heads && u.size(1) == kSize, "u has shape ", u.sizes(), ", expected ",
          at::IntArrayRef({heads, kSize}));
  require(u.scalar_type() == at::kBFloat16 || u.scalar_type() == at::kFloat, "u has dtype ", u.scalar_type(),
          ", expected bfloat16 or float32");
  std::optional<Tensor> given_borders;  // absent, not undefined: an undefined input breaks the autograd node
  Tensor borders;
  if (borders_given) {
    borders = borders_given->to(at::kInt).contiguous();
    require(borders.device() == r.device(), "cu_seqlens is on ", borders.device(), ", expected r's device ",
            r.device());
    require(borders.dim() == 1 && borders.size(0) >= 2 && r.size(0) == 1, "cu_seqlens has shape ", borders.sizes(),
            " beside batch size ", r.size(0), ", expected [S + 1] beside 1");
    given_borders = borders;
  }
  const int64_t sequences = borders.defined() ? borders.size(0) - 1 : r.size(0);
  check_tensor(state, "state", r);
  require(state.scalar_type() == at::kFloat, "state has dtype ", state.scalar_type(), ", expected float32");
  require((state.dim() == 3 || (state.dim() == 4 && state.size(0) == sequences)) &&
              state.numel() == (state.dim() == 4 ? sequences : 1) * heads * kSize * kSize && state.size(-1) == kSize &&
              state.size(-2) == kSize,
          "state has shape ", state.sizes(), ", expected ", at::IntArrayRef({heads, kSize, kSize}), ", alone or ",
          sequences, " times");

  const bool tokens_need_gradient =
      r.requires_grad() || k.requires_grad() || v.requires_grad() || w_raw.requires_grad() || u.requires_grad();
  if (!at::GradMode::is_enabled() || !(tokens_need_gradient || state.requires_grad())) {
    const ForwardResult result = run_forward(r, k, v, w_raw, u, state, borders, segment_tokens, false);
    return {result.y, result.final_state};
  }
  const variable_list results =
      Wkv6::apply(r, k, v, w_raw, u, state, given_borders, segment_tokens, tokens_need_gradient);
  return {results[0], results[1]};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  // Wrapped, because it keeps the types of torch's exceptions, that of memory running out above all.
  module.def("wkv6", torch::wrap_pybind_function(wkv6), "y and final state of the RWKV-6 recurrence",
             pybind11::arg("r"), pybind11::arg("k"), pybind11::arg("v"), pybind11::arg("w_raw"), pybind11::arg("u"),
             pybind11::arg("state"), pybind11::arg("cu_seqlens") = std::nullopt, pybind11::arg("segment_tokens") = 0);
}
