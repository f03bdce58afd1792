// Checks of arguments, with messages, for the bindings.

#pragma once

#include <ATen/ATen.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Parts of messages. Not streams, nor TORCH_CHECK which uses them: on a machine where the compiler's libstdc++ was not
// the one that Python had loaded, the first std::ostringstream in an extension ended the process.
inline std::string text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(at::ScalarType part) { return c10::toString(part); }
inline std::string text(const at::Device& part) { return part.str(); }
inline std::string text(at::IntArrayRef part) {
  std::string result = "[";
  for (const int64_t size : part) result += (result.size() > 1 ? ", " : "") + std::to_string(size);
  return result + "]";
}

// Raises RuntimeError in Python.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error((text(parts) + ...));
}

inline void check_launch(cudaError_t error, const char* name) {
  require(error == cudaSuccess, "the CUDA kernel ", name, " could not be launched: ", cudaGetErrorString(error));
}
