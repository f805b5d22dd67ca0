"""What somebody else's torch.fx tracer sees of a block: one call, as it sees torch's own layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn


def one_call(block: nn.Module, x: fx.Proxy, *rest: Any) -> Tensor:
    """The call of a block in the graph that x belongs to; asked for from the block's own forward.

    A formula may decide by sizes and dtypes, which a proxy does not have, and the fast forms look at the tensor.
    """
    tracer: Any = x.tracer
    stay_float(block, tracer)
    call: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(block), (x, *rest), {})
    return call


def stay_float(block: nn.Module, tracer: Any) -> None:
    """Let torch.ao's quantization pass over the layers inside a block that is one call in its graph.

    It would exchange them for layers that imitate quantization, and when it converts the graph it takes those
    apart wherever the graph does not show them.
    """
    if type(tracer).__module__.startswith("torch.ao.quantization"):
        block.__dict__.setdefault("qconfig", None)
