// Launchers of the WKV6 kernels.
#include "wkv6.h"
#include "wkv6_kernels.cuh"

namespace {

using namespace wkv6;

dim3 grid_of(const Wkv6Layout& layout) { return dim3(layout.heads, layout.items); }

bool is_split(const Wkv6Layout& layout) { return layout.span_tokens < layout.tokens; }

template <bool kBackward>
cudaError_t summarise(const Summary& arguments, cudaStream_t stream) {
  summary_kernel<kBackward><<<grid_of(arguments.layout), kThreads, kSummarySharedBytes, stream>>>(arguments);
  return cudaGetLastError();
}

template <bool kWithDu>
cudaError_t launch_backward(const Wkv6Backward& a, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(backward_kernel<kWithDu>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBackwardSharedBytes);
  if (error != cudaSuccess) return error;
  backward_kernel<kWithDu><<<grid_of(a.layout), kThreads, kBackwardSharedBytes, stream>>>(a);
  return cudaGetLastError();
}

static_assert(kForwardSharedBytes <= 48 * 1024 && kSummarySharedBytes <= 48 * 1024, "fits without being asked for");
static_assert(kBackwardSharedBytes <= 99 * 1024, "what a block may have on sm_86, sm_89 and sm_120");

}  // namespace

cudaError_t wkv6_forward(const Wkv6Forward& a, cudaStream_t stream) {
  if (is_split(a.layout)) {
    const cudaError_t error =
        summarise<false>({a.layout, a.k, a.w_raw, a.v, a.span_states, a.span_decays, false}, stream);
    if (error != cudaSuccess) return error;
  }
  forward_kernel<<<grid_of(a.layout), kThreads, kForwardSharedBytes, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t wkv6_backward(const Wkv6Backward& a, cudaStream_t stream) {
  const bool only_state = a.dr == nullptr;
  if (only_state || is_split(a.layout)) {
    const cudaError_t error =
        summarise<true>({a.layout, a.r, a.w_raw, a.dy, a.span_states, a.span_decays, only_state}, stream);
    if (error != cudaSuccess) return error;
  }
  if (only_state) {
    fold_kernel<<<dim3(a.layout.heads, a.layout.sequences), kThreads, 0, stream>>>(a);
    return cudaGetLastError();
  }
  return a.du != nullptr ? launch_backward<true>(a, stream) : launch_backward<false>(a, stream);
}

int wkv6_multiprocessors(int device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess && count > 0 ? count : 1;
}
