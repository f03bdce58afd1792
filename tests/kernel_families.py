"""Every kernel that the program launches, by its source in `cuda/`."""

from collections.abc import Sequence

from src.ops import (
    adam,
    block_diagonal,
    cast,
    delta_rule_cuda,
    dequantize_cuda,
    elementwise_cuda,
    wkv6_cuda,
    wkv7_cuda,
)
from src.ops.kernels import Kernel

FAMILIES: dict[str, Sequence[Kernel]] = {
    "adam.cu": (*adam.KERNELS.values(), *adam.KERNELS_OF_MANY.values(), *adam.NORMS.values()),
    "block_diagonal.cu": block_diagonal.KERNELS,
    "cast.cu": (cast.TO_BF16,),
    "dequantize.cu": (*dequantize_cuda.KERNELS.values(), *dequantize_cuda.OF_SEVERAL.values()),
    "elementwise.cu": elementwise_cuda.KERNELS,
    "elementwise_delta_rule.cu": delta_rule_cuda.KERNELS,
    "wkv6.cu": wkv6_cuda.KERNELS,
    "wkv7.cu": wkv7_cuda.KERNELS,
}
