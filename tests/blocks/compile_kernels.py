"""Compile every kernel for a card, without one: `python tests/blocks/compile_kernels.py 90` (its compute capability).

The blocks run as they would by kernels, on a CPU; each launch is compiled instead of carried out, so that what comes out
means nothing. Triton brings the compiler. Prints how many kernels there were; an error of the compiler ends it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from attninject.blocks import gpu, registry
from attninject.blocks.fast import dispatch

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
BLOCKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("se", {}), ("se", {"squeeze": "both"}), ("spatial_attention", {}), ("cbam", {}), ("gc", {}),
    ("gc", {"fusion": "both"}), ("scse", {}), ("bam", {}), ("bam", {"mode": "sum"}), ("coord", {}),
)  # fmt: skip
done: set[Any] = set()


class Launch:
    """What stands for `kernel[grid]`."""

    def __init__(self, kernel: JITFunction, capability: int) -> None:
        self.kernel, self.capability = kernel, capability

    def __call__(self, *args: Any, num_warps: int, **flags: Any) -> None:
        """Compile for these arguments; as in a launch, numbers that are 1 and multiples of 16 are told apart."""
        given = {**dict(zip(self.kernel.arg_names, args, strict=False)), **flags}
        types, constants, multiples = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1):
                types[parameter.name], constants[(i,)] = "constexpr", value
                continue
            tensor = isinstance(value, torch.Tensor)
            types[parameter.name] = (
                POINTERS[value.dtype] if tensor else "fp32" if type(value) is float else "i32"
            )
            if tensor or (type(value) is int and value % 16 == 0):
                multiples[(i,)] = [["tt.divisibility", 16]]
        key = self.kernel.__name__, str(types), str(constants), str(multiples)
        if key not in done:
            source = ASTSource(self.kernel, types, constants, multiples)
            triton.compile(source, GPUTarget("cuda", self.capability, 32), {"num_warps": num_warps})
            done.add(key)


def main(capability: int) -> None:
    """Every block with kernels, in two dtypes, both layouts, and sizes that vectors fit into or not."""
    JITFunction.__getitem__ = lambda kernel, grid: Launch(kernel, capability)
    gpu.serves = lambda x: True
    for name, args in BLOCKS:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                for size in ((2, 64, 16, 16), (2, 21, 5, 3)):
                    block = registry.create_block(name, size[1], init="paper", **args).to(dtype)
                    x = torch.ones(size, dtype=dtype).to(memory_format=layout).requires_grad_()
                    with dispatch.backend("kernels"):
                        y = block(x)
                    y.backward(torch.ones_like(y))
    print(len(done), "kernels compiled")


if __name__ == "__main__":
    main(int(sys.argv[1]))
