"""`cuda/adam.cu` as C++, a warp of threads for a block: what a GPU would compute, where there is none."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.ops.adam import Constants, Control, Moments, adam_step_torch, dynamic_map
from src.ops.cuda_extension import SOURCE_DIRECTORY

COMPILER = shutil.which("g++")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs g++")]

CONSTANTS = Constants(0.9, 0.99, 1e-8, clip=1.0)
SEED = 12345
CUDA = """
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
using std::max;
using std::min;
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
struct Place { unsigned x, y, z; };
static thread_local Place threadIdx;
static Place blockIdx{0, 0, 0}, blockDim{32, 1, 1}, gridDim{1, 1, 1};
static std::barrier<>* all;
static float given[32];
void __syncthreads() { all->arrive_and_wait(); }
void __syncwarp() { all->arrive_and_wait(); }
float __shfl_xor_sync(unsigned, float value, int lanes) {
    given[threadIdx.x] = value;
    all->arrive_and_wait();
    float got = given[threadIdx.x ^ lanes];
    all->arrive_and_wait();
    return got;
}
float __uint_as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
uint32_t __float_as_uint(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
float __fdividef(float one, float other) { return one / other; }
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float4 { float x, y, z, w; };
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
#include "adam.cu"
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, Arguments... arguments) {
    std::barrier<> barrier(32);
    all = &barrier;
    std::vector<std::thread> threads;
    for (unsigned lane = 0; lane < 32; ++lane)
        threads.emplace_back([=] { threadIdx = {lane, 0, 0}; kernel(arguments...); });
    for (auto& thread : threads) thread.join();
}
extern "C" void run(int narrow, int packed, void* w, const void* g, void* first, void* second, float* first_scales,
                    float* second_scales, const float* first_map, const float* second_map, const float* settings,
                    const float* norm, const int* flags, int count, int group, int seed, int aligned, double beta1,
                    double beta2, double eps, double clip) {
    auto kernel = narrow ? (packed ? adam_bf16_packed : adam_bf16) : (packed ? adam_fp32_packed : adam_fp32);
    launch(kernel, w, g, first, second, first_scales, second_scales, first_map, second_map, settings, norm, flags,
           count, group, seed, aligned, beta1, beta2, eps, clip);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("adam")
    (folder / "warp.cpp").write_text(CUDA)
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", f"-I{SOURCE_DIRECTORY}"]
    subprocess.run([COMPILER, *options, "-o", folder / "warp.so", folder / "warp.cpp"], check=True)  # type: ignore[list-item]
    return ctypes.CDLL(str(folder / "warp.so"))


def step(library: ctypes.CDLL, w: Tensor, g: Tensor, moments: Moments, given: Control, *, aligned: bool) -> None:
    packed = moments.first_scales is not None
    scales = (moments.first_scales, moments.second_scales) if packed else (given.norm, given.norm)
    maps = [dynamic_map(signed=signed) for signed in (True, False)]
    tensors = [w, g, moments.first, moments.second, *scales, *maps, given.settings, given.norm, given.flags]
    library.run(
        int(w.dtype == torch.bfloat16), int(packed),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors if tensor is not None),
        w.numel(), 1, SEED, int(aligned),
        *map(ctypes.c_double, (CONSTANTS.beta1, CONSTANTS.beta2, CONSTANTS.eps, CONSTANTS.clip)),
    )  # fmt: skip


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("count", [256, 4900, 3001])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_definition(
    dtype: torch.dtype, packed: bool, count: int, aligned: bool, library: ctypes.CDLL
) -> None:
    generator = torch.Generator().manual_seed(count)
    start = torch.randn(count, generator=generator).to(dtype)
    scale = torch.rand(count, generator=generator) ** 3
    one, other = start.clone(), start.clone()
    moments = [Moments.zeros(start, packed=packed) for _ in range(2)]
    for number in range(6):
        gradient = (scale * (torch.randn(count, generator=generator) + 0.2)).to(dtype)
        rows = torch.tensor([[0.0] * 4, CONSTANTS.settings_row(1e-2, 0.1, number + 1)])
        norm = torch.tensor((math.nan, 0.5, 2.0)[number % 3])
        given = Control(rows, norm, torch.tensor([number, int(number == 4)], dtype=torch.int32))
        step(library, one, gradient, moments[0], given, aligned=aligned)
        adam_step_torch(other, gradient, moments[1], given, CONSTANTS, 1, SEED)
    differ = (one != other).float().mean()
    if dtype == torch.bfloat16:  # where sums in another order end on the other side of a border
        assert float(differ) < 0.005
        assert packed or not differ
    assert float((one.float() - other.float()).abs().max()) < (1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert not torch.equal(one, start)
