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
constexpr int64_t kShortestSpan = 2 * kWkv6ChunkTokens;
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

// Spans so short that the GPU is full, or whole sequences when these fill it.
int64_t span_tokens_for(const Tensor& r, int64_t blocks_per_multiprocessor) {
  const int64_t heads = r.size(2), all_tokens = r.size(0) * r.size(1);
  const int64_t blocks = blocks_per_multiprocessor * wkv6_multiprocessors(r.get_device());
  const int64_t wanted = ceil_div(ceil_div(all_tokens * heads, blocks), kWkv6ChunkTokens) * kWkv6ChunkTokens;
  return std::max(wanted, kShortestSpan);
}

Wkv6Layout layout_of(const Tensor& r, const Tensor& borders, int64_t span_tokens, int64_t blocks) {
  const int64_t batch = r.size(0), tokens = r.size(1), heads = r.size(2);
  require(batch * tokens * heads < kMostRows, "r has ", batch * tokens * heads, " rows of 64, expected fewer than ",
          kMostRows);
  if (span_tokens == 0) span_tokens = span_tokens_for(r, blocks);
  require(span_tokens > 0 && span_tokens % kWkv6ChunkTokens == 0, "span_tokens is ", span_tokens,
          ", expected a multiple of ", kWkv6ChunkTokens);
  span_tokens = std::min(span_tokens, ceil_div(tokens, kWkv6ChunkTokens) * kWkv6ChunkTokens);
  const int64_t sequences = borders.defined() ? borders.size(0) - 1 : batch;
  const int64_t items =
      borders.defined() ? tokens / span_tokens + sequences : batch * ceil_div(tokens, span_tokens);
  require(items <= 65535, "there are ", items, " spans of sequences, more than a grid can have; use fewer rows");
  Wkv6Layout layout{};
  layout.heads = static_cast<int>(heads);
  layout.sequences = static_cast<int>(sequences);
  layout.tokens = static_cast<int>(tokens);
  layout.borders = borders.defined() ? borders.const_data_ptr<int32_t>() : nullptr;
  layout.span_tokens = static_cast<int>(span_tokens);
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

// The tokens of some sequences: r, k, v, w_raw [B, T, H, 64], and their borders when they are packed.
struct Tokens {
  Tensor r, k, v, w_raw, borders;

  // Some tokens of a packed row.
  Tokens part(int64_t first, int64_t count, const Tensor& own_borders) const {
    return {r.narrow(1, first, count), k.narrow(1, first, count), v.narrow(1, first, count),
            w_raw.narrow(1, first, count), own_borders};
  }
};

// What the backward of the tokens needs besides them.
struct Kept {
  Tensor checkpoints, pair_weights;
};

// Writes y and returns the final states; with `kept` also writes what the backward needs. `parents`: see Wkv6Forward.
Tensor run_forward(const Tokens& tokens, const Tensor& u, const Tensor& state, const Tensor& parents,
                   int64_t span_tokens, const Tensor& y, Kept* kept) {
  const Tensor &r = tokens.r, &borders = tokens.borders;
  const Wkv6Layout layout = layout_of(r, borders, span_tokens, kForwardBlocks);
  const int64_t heads = layout.heads, sequences = layout.sequences;
  const auto floats = r.options().dtype(at::kFloat);
  const Tensor final_state = at::empty({sequences, heads, kSize, kSize}, floats);
  if (kept != nullptr) {
    const int64_t chunks = borders.defined() ? layout.tokens / kWkv6ChunkTokens + sequences
                                             : sequences * ceil_div(layout.tokens, kWkv6ChunkTokens);
    const int64_t tiles = kWkv6ChunkTokens / kWkv6TileTokens;
    kept->checkpoints = at::empty({chunks, heads, kSize, kSize}, r.options());
    kept->pair_weights = at::empty({chunks, heads, tiles, kWkv6TileTokens, kWkv6TileTokens}, r.options());
  }
  const Scratch scratch(layout, floats, layout.span_tokens < layout.tokens);

  Wkv6Forward arguments{};
  arguments.layout = layout;
  arguments.r = r.const_data_ptr();
  arguments.k = tokens.k.const_data_ptr();
  arguments.v = tokens.v.const_data_ptr();
  arguments.w_raw = tokens.w_raw.const_data_ptr();
  arguments.u = u.const_data_ptr();
  arguments.u_is_bf16 = u.scalar_type() == at::kBFloat16;
  arguments.state = state.const_data_ptr<float>();
  arguments.state_is_shared = state.dim() == 3;
  arguments.parents = parents.defined() ? parents.const_data_ptr<int64_t>() : nullptr;
  arguments.y = y.mutable_data_ptr();
  arguments.final_state = final_state.mutable_data_ptr<float>();
  arguments.checkpoints = kept != nullptr ? kept->checkpoints.mutable_data_ptr() : nullptr;
  arguments.pair_weights = kept != nullptr ? kept->pair_weights.mutable_data_ptr() : nullptr;
  arguments.span_states = scratch.states_pointer();
  arguments.span_decays = scratch.decays_pointer();
  check_launch(wkv6_forward(arguments, c10::cuda::getCurrentCUDAStream()), "wkv6_forward");
  return final_state;
}

// Gradients to be written: those of the tokens only where they are defined, likewise u's.
struct Gradients {
  Tokens tokens;
  Tensor u, state;  // [H, 64] float; [S, H, 64, 64]
};

// `kept` is read when the tokens' gradients are wanted; `dfinal` may be undefined. u's gradient is replaced.
void run_backward(const Tokens& tokens, const Tensor& u, const Kept& kept, const Tensor& dy, const Tensor& dfinal,
                  int64_t span_tokens, Gradients& gradients, bool wants_u) {
  const bool wants_tokens = gradients.tokens.r.defined();
  if (!wants_tokens && !gradients.state.defined()) return;
  const Tensor& r = tokens.r;
  const auto floats = r.options().dtype(at::kFloat);
  const Wkv6Layout layout =
      layout_of(r, tokens.borders, span_tokens, wants_tokens ? kBackwardBlocks : kForwardBlocks);
  const Scratch scratch(layout, floats, !wants_tokens || layout.span_tokens < layout.tokens);
  Wkv6Backward arguments{};
  arguments.layout = layout;
  arguments.r = r.const_data_ptr();
  arguments.w_raw = tokens.w_raw.const_data_ptr();
  arguments.dy = dy.const_data_ptr();
  arguments.dfinal_state = dfinal.defined() ? dfinal.const_data_ptr<float>() : nullptr;
  arguments.span_states = scratch.states_pointer();
  arguments.span_decays = scratch.decays_pointer();
  arguments.dstate = gradients.state.defined() ? gradients.state.mutable_data_ptr<float>() : nullptr;
  Tensor du;
  if (wants_tokens) {
    arguments.k = tokens.k.const_data_ptr();
    arguments.v = tokens.v.const_data_ptr();
    arguments.u = u.const_data_ptr();
    arguments.u_is_bf16 = u.scalar_type() == at::kBFloat16;
    arguments.checkpoints = kept.checkpoints.const_data_ptr();
    arguments.pair_weights = kept.pair_weights.const_data_ptr();
    arguments.dr = gradients.tokens.r.mutable_data_ptr();
    arguments.dk = gradients.tokens.k.mutable_data_ptr();
    arguments.dv = gradients.tokens.v.mutable_data_ptr();
    arguments.dw_raw = gradients.tokens.w_raw.mutable_data_ptr();
    if (wants_u) {
      du = at::empty({layout.items, layout.heads, kSize}, floats);
      arguments.du = du.mutable_data_ptr<float>();
    }
  }
  check_launch(wkv6_backward(arguments, c10::cuda::getCurrentCUDAStream()), "wkv6_backward");
  if (du.defined()) gradients.u = du.sum(0);
}

Tokens empty_like(const Tokens& tokens) {
  return {at::empty_like(tokens.r), at::empty_like(tokens.k), at::empty_like(tokens.v), at::empty_like(tokens.w_raw),
          Tensor()};
}

// A sum over a fixed order: the same bits in every run.
Tensor state_gradient(const Tensor& of_sequences, bool shared) {
  return !shared ? of_sequences : of_sequences.size(0) == 1 ? of_sequences.squeeze(0) : of_sequences.sum(0);
}

// Input positions, which are also positions of their gradients; what follows them has none.
enum : size_t { kR, kK, kV, kW, kU, kState, kInputs };

bool wants_tokens(AutogradContext* ctx) {
  return ctx->saved_data["tokens"].toBool() &&
         (ctx->needs_input_grad(kR) || ctx->needs_input_grad(kK) || ctx->needs_input_grad(kV) ||
          ctx->needs_input_grad(kW) || ctx->needs_input_grad(kU));
}

Tensor output_gradient(const Tensor& given, const Tensor& r) {
  const Tensor dy = given.defined() ? prepared(given) : at::zeros_like(r);
  check_tokens(dy, "the gradient of y", r);
  return dy;
}

variable_list input_gradients(const Gradients& gradients, const Tensor& u, bool state_is_shared, size_t inputs) {
  variable_list result(inputs);
  result[kR] = gradients.tokens.r;
  result[kK] = gradients.tokens.k;
  result[kV] = gradients.tokens.v;
  result[kW] = gradients.tokens.w_raw;
  if (gradients.u.defined()) result[kU] = gradients.u.to(u.scalar_type());
  if (gradients.state.defined()) result[kState] = state_gradient(gradients.state, state_is_shared);
  return result;
}

class Wkv6 : public torch::autograd::Function<Wkv6> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& r, const Tensor& k, const Tensor& v,
                               const Tensor& w_raw, const Tensor& u, const Tensor& state,
                               const std::optional<Tensor>& borders, int64_t span_tokens,
                               bool tokens_need_gradient) {
    const c10::cuda::CUDAGuard guard(r.device());
    const Tokens tokens{r, k, v, w_raw, borders.value_or(Tensor())};
    const Tensor y = at::empty_like(r);
    Kept kept;
    const Tensor final_state =
        run_forward(tokens, u, state, Tensor(), span_tokens, y, tokens_need_gradient ? &kept : nullptr);
    ctx->set_materialize_grads(false);
    ctx->saved_data["span_tokens"] = span_tokens;
    ctx->saved_data["state_is_shared"] = state.dim() == 3;
    ctx->saved_data["tokens"] = tokens_need_gradient;
    if (tokens_need_gradient) {
      ctx->save_for_backward({r, w_raw, tokens.borders, k, v, u, kept.checkpoints, kept.pair_weights});
    } else {
      ctx->save_for_backward({r, w_raw, tokens.borders});  // the state's gradient alone needs neither k nor v
    }
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    require(!at::GradMode::is_enabled(), "wkv6 has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& r = saved[0];
    const c10::cuda::CUDAGuard guard(r.device());
    const Tensor dfinal = outputs[1].defined() ? prepared(outputs[1]) : Tensor();
    Tokens tokens{r, Tensor(), Tensor(), saved[1], saved[2]};
    Tensor u;
    Kept kept;
    if (saved.size() > 3) {
      tokens.k = saved[3];
      tokens.v = saved[4];
      u = saved[5];
      kept = {saved[6], saved[7]};
    }
    Gradients gradients;
    if (wants_tokens(ctx)) gradients.tokens = empty_like(tokens);
    if (ctx->needs_input_grad(kState)) {
      const int64_t sequences = tokens.borders.defined() ? tokens.borders.size(0) - 1 : r.size(0);
      gradients.state = at::empty({sequences, r.size(2), kSize, kSize}, r.options().dtype(at::kFloat));
    }
    run_backward(tokens, u, kept, output_gradient(outputs[0], r), dfinal, ctx->saved_data["span_tokens"].toInt(),
                 gradients, ctx->needs_input_grad(kU));
    return input_gradients(gradients, u, ctx->saved_data["state_is_shared"].toBool(), kInputs + 3);
  }
};

// Roots, then sequences that continue them: two passes over one row, so that nothing has to be cut or put together.
class Wkv6Branching : public torch::autograd::Function<Wkv6Branching> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& r, const Tensor& k, const Tensor& v,
                               const Tensor& w_raw, const Tensor& u, const Tensor& state, const Tensor& root_borders,
                               const Tensor& child_borders, const Tensor& parents, int64_t root_tokens,
                               bool tokens_need_gradient) {
    const c10::cuda::CUDAGuard guard(r.device());
    const Tensor y = at::empty_like(r);
    Kept of_roots, of_children;
    const Tokens tokens{r, k, v, w_raw, Tensor()};
    const Tensor final_state = run_forward(tokens.part(0, root_tokens, root_borders), u, state, Tensor(), 0,
                                           y.narrow(1, 0, root_tokens), tokens_need_gradient ? &of_roots : nullptr);
    const int64_t rest = r.size(1) - root_tokens;
    run_forward(tokens.part(root_tokens, rest, child_borders), u, final_state, parents, 0,
                y.narrow(1, root_tokens, rest), tokens_need_gradient ? &of_children : nullptr);
    ctx->set_materialize_grads(false);
    ctx->saved_data["root_tokens"] = root_tokens;
    ctx->saved_data["state_is_shared"] = state.dim() == 3;
    ctx->saved_data["tokens"] = tokens_need_gradient;
    if (tokens_need_gradient) {
      ctx->save_for_backward({r, w_raw, root_borders, child_borders, parents, k, v, u, of_roots.checkpoints,
                              of_roots.pair_weights, of_children.checkpoints, of_children.pair_weights});
    } else {
      ctx->save_for_backward({r, w_raw, root_borders, child_borders, parents});
    }
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    require(!at::GradMode::is_enabled(), "wkv6 has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &r = saved[0], &w_raw = saved[1];
    const Tensor &root_borders = saved[2], &child_borders = saved[3], &parents = saved[4];
    const c10::cuda::CUDAGuard guard(r.device());
    const int64_t root_tokens = ctx->saved_data["root_tokens"].toInt(), rest = r.size(1) - root_tokens;
    const Tensor dy = output_gradient(outputs[0], r);
    // Where there are no k and v, r stands for them: nothing reads it as such.
    const bool kept_tokens = saved.size() > 5;
    const Tokens tokens{r, kept_tokens ? saved[5] : r, kept_tokens ? saved[6] : r, w_raw, Tensor()};
    const Tensor u = kept_tokens ? saved[7] : Tensor();
    const Kept of_roots = kept_tokens ? Kept{saved[8], saved[9]} : Kept{};
    const Kept of_children = kept_tokens ? Kept{saved[10], saved[11]} : Kept{};
    const bool wants = wants_tokens(ctx), wants_u = ctx->needs_input_grad(kU);
    const auto floats = r.options().dtype(at::kFloat);

    Gradients whole, roots, children;
    if (wants) {
      whole.tokens = empty_like(tokens);
      roots.tokens = whole.tokens.part(0, root_tokens, Tensor());
      children.tokens = whole.tokens.part(root_tokens, rest, Tensor());
    }
    children.state = at::empty({parents.size(0), r.size(2), kSize, kSize}, floats);
    run_backward(tokens.part(root_tokens, rest, child_borders), u, of_children, dy.narrow(1, root_tokens, rest),
                 Tensor(), 0, children, wants_u);
    const int64_t root_count = root_borders.size(0) - 1;
    Tensor dfinal =
        outputs[1].defined() ? outputs[1].clone() : at::zeros({root_count, r.size(2), kSize, kSize}, floats);
    dfinal = prepared(dfinal).index_add_(0, parents, children.state);
    if (ctx->needs_input_grad(kState)) roots.state = at::empty({root_count, r.size(2), kSize, kSize}, floats);
    run_backward(tokens.part(0, root_tokens, root_borders), u, of_roots, dy.narrow(1, 0, root_tokens), dfinal, 0, roots,
                 wants_u);
    whole.state = roots.state;
    if (wants && wants_u) whole.u = roots.u + children.u;
    return input_gradients(whole, u, ctx->saved_data["state_is_shared"].toBool(), kInputs + 5);
  }
};

// The arguments of both operators, contiguous and checked.
struct Checked {
  Tensor r, k, v, w_raw, u, state;

  Checked(const Tensor& r_given, const Tensor& k_given, const Tensor& v_given, const Tensor& w_given,
          const Tensor& u_given, const Tensor& state_given)
      : r(prepared(r_given)),
        k(prepared(k_given)),
        v(prepared(v_given)),
        w_raw(prepared(w_given)),
        u(prepared(u_given)),
        state(prepared(state_given)) {
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
    check_tensor(state, "state", r);
    require(state.scalar_type() == at::kFloat, "state has dtype ", state.scalar_type(), ", expected float32");
  }

  void check_state(int64_t sequences) const {
    const int64_t heads = r.size(2);
    require((state.dim() == 3 || (state.dim() == 4 && state.size(0) == sequences)) &&
                state.numel() == (state.dim() == 4 ? sequences : 1) * heads * kSize * kSize &&
                state.size(-1) == kSize && state.size(-2) == kSize,
            "state has shape ", state.sizes(), ", expected ", at::IntArrayRef({heads, kSize, kSize}), ", alone or ",
            sequences, " times");
  }

  Tensor borders(const Tensor& given, const char* name) const {
    const Tensor borders = given.to(at::kInt).contiguous();
    require(borders.device() == r.device(), name, " is on ", borders.device(), ", expected r's device ", r.device());
    require(borders.dim() == 1 && borders.size(0) >= 2 && r.size(0) == 1, name, " has shape ", borders.sizes(),
            " beside batch size ", r.size(0), ", expected [S + 1] beside 1");
    return borders;
  }

  bool tokens_need_gradient() const {
    return r.requires_grad() || k.requires_grad() || v.requires_grad() || w_raw.requires_grad() || u.requires_grad();
  }

  bool need_gradient() const { return at::GradMode::is_enabled() && (tokens_need_gradient() || state.requires_grad()); }
};

std::tuple<Tensor, Tensor> wkv6(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w_raw, const Tensor& u,
                                const Tensor& state, const std::optional<Tensor>& borders_given,
                                int64_t span_tokens) {
  const Checked given(r, k, v, w_raw, u, state);
  std::optional<Tensor> borders;  // absent, not undefined: an undefined input breaks the autograd node
  if (borders_given) borders = given.borders(*borders_given, "cu_seqlens");
  given.check_state(borders ? borders->size(0) - 1 : given.r.size(0));
  if (!given.need_gradient()) {
    const c10::cuda::CUDAGuard guard(given.r.device());
    const Tensor y = at::empty_like(given.r);
    const Tokens tokens{given.r, given.k, given.v, given.w_raw, borders.value_or(Tensor())};
    const Tensor final_state = run_forward(tokens, given.u, given.state, Tensor(), span_tokens, y, nullptr);
    return {y, final_state};
  }
  const variable_list results = Wkv6::apply(given.r, given.k, given.v, given.w_raw, given.u, given.state, borders,
                                            span_tokens, given.tokens_need_gradient());
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor> wkv6_branching(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w_raw,
                                          const Tensor& u, const Tensor& state, const Tensor& root_borders_given,
                                          const Tensor& child_borders_given, const Tensor& parents,
                                          int64_t root_tokens) {
  const Checked given(r, k, v, w_raw, u, state);
  const Tensor root_borders = given.borders(root_borders_given, "root_borders");
  const Tensor child_borders = given.borders(child_borders_given, "child_borders");
  given.check_state(root_borders.size(0) - 1);
  check_tensor(parents, "parents", given.r);
  require(parents.scalar_type() == at::kLong && parents.dim() == 1 && parents.size(0) == child_borders.size(0) - 1,
          "parents is ", parents.scalar_type(), " of shape ", parents.sizes(), ", expected int64 [",
          child_borders.size(0) - 1, "]");
  require(root_tokens > 0 && root_tokens < given.r.size(1), "root_tokens is ", root_tokens, ", expected 1 to ",
          given.r.size(1) - 1);
  // Without gradients the node saves nothing either: it is not recorded.
  const variable_list results =
      Wkv6Branching::apply(given.r, given.k, given.v, given.w_raw, given.u, given.state, root_borders, child_borders,
                           parents, root_tokens, given.need_gradient() && given.tokens_need_gradient());
  return {results[0], results[1]};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  // Wrapped, because it keeps the types of torch's exceptions, that of memory running out above all.
  module.def("wkv6", torch::wrap_pybind_function(wkv6), "y and final state of the RWKV-6 recurrence",
             pybind11::arg("r"), pybind11::arg("k"), pybind11::arg("v"), pybind11::arg("w_raw"), pybind11::arg("u"),
             pybind11::arg("state"), pybind11::arg("cu_seqlens") = std::nullopt, pybind11::arg("span_tokens") = 0);
  module.def("wkv6_branching", torch::wrap_pybind_function(wkv6_branching),
             "y, and final states of the roots, of sequences that continue others");
}
