"""Where a class's score comes from: Grad-CAM by the package `grad-cam`, and attention rollout."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attninject import api
from attninject.errors import MissingPackageError
from attninject.observe.snapshot import undoing
from attninject.surgery.injected_state import sites_of

from .pictures_views import Heat, scene_of

PACKAGE = "pytorch_grad_cam"
HINT = 'pip install "attninject[pictures]"'


def refuse_missing() -> None:
    """Raises MissingPackageError where the package is not there."""
    if not installed():
        raise MissingPackageError(f"Grad-CAM needs the package grad-cam, which is not installed: {HINT}")


def installed() -> bool:
    """Whether `grad-cam` is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def grad_cam(inner: nn.Module, x: Tensor, last: str, at: tuple[float, float]) -> Heat | None:
    """Grad-CAM behind the block `last`, for the likeliest class; None where its output is no map.

    arXiv:1610.02391, eq. 1-2: relu(Σ_k α_k A_k), α_k the mean over positions of the score's gradient at A_k,
    A the block's output. The model's gradients are the caller's to keep (`pictures_record.untouched`).
    """
    block = api.injected(inner)[last]
    layout, given = getattr(sites_of(inner)[last], "layout", None), _input_of(inner, block, x)
    scene = scene_of(block, given, layout, at)
    if not scene.is_map:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies', on import
        from pytorch_grad_cam import GradCAM

    def to_map(t: Tensor) -> Tensor:
        return t.reshape(*t.shape[:2], *scene.grid)

    with torch.enable_grad():
        cam = GradCAM(inner, [block], reshape_transform=to_map)
        cam.compute_input_gradient = True  # else a model whose weights are all frozen has no gradient
        try:
            values = torch.from_numpy(cam(input_tensor=x.clone(), targets=None)[0])
            chosen = int(cam.outputs.argmax(-1)[0])
        finally:
            cam.activations_and_grads.release()
    return Heat("grad-cam", f"Grad-CAM behind {last} for class {chosen}, the likeliest; scaled to 1", values)


def _input_of(inner: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    """What a block is given in a run on x."""
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with undoing(handle.remove), torch.no_grad():
        inner(x)
    return seen[0]


# --- rollout ------------------------------------------------------------------------------------


def rollout(inner: nn.Module, x: Tensor) -> Heat | None:
    """How much of each patch reaches the class token, or all tokens, through the network's own attention.

    Abnar and Zuidema (arXiv:2005.00928), eq. 1: the product over layers of (A + I) / 2, A the mean over heads.
    None for a network without two layers of attention over the same tokens (of timm's kind or torch's).
    """
    found: list[Tensor] = []
    with _attention_kept(inner, found), torch.no_grad():
        inner(x)
    sizes = {tuple(a.shape) for a in found}
    if len(found) < 2 or len(sizes) != 1 or found[0].shape[0] != 1:
        return None
    count = found[0].shape[-1]
    joint = torch.eye(count)
    for a in found:
        joint = (a[0].float().cpu() + torch.eye(count)) / 2 @ joint
    grid, prefix = _patches(inner, count)
    if grid is None:
        return None
    row = joint[0, prefix:] if prefix else joint.mean(0)
    text = f"attention rollout over {len(found)} layers: what reaches the {'class token' if prefix else 'tokens'}"
    return Heat("rollout", text, row.reshape(grid))


def _patches(inner: nn.Module, count: int) -> tuple[tuple[int, int] | None, int]:
    """The grid of the patches and the number of tokens in front of them."""
    declared = getattr(inner, "num_prefix_tokens", None)
    for prefix in (declared,) if isinstance(declared, int) else (0, 1, 2, 5):
        side = math.isqrt(count - prefix)
        if side * side == count - prefix:
            return (side, side), prefix
    return None, 0


@contextmanager
def _attention_kept(inner: nn.Module, found: list[Tensor]) -> Iterator[None]:
    """Collects the rows of each attention layer, (B, N, N), mean over heads, in the order of the run."""
    handles: list[Any] = []
    fused: list[Any] = []

    def keep(module: nn.Module, args: Any) -> None:
        if args[0].ndim == 4 and args[0].shape[-1] == args[0].shape[-2]:
            found.append(args[0].mean(1))

    def again(module: Any, args: Any, kwargs: Any) -> None:
        wanted = {**kwargs, "need_weights": True, "average_attn_weights": True}
        rows = module.forward(*args[:3], **wanted)[1]
        found.append(rows if rows.ndim == 3 else rows[None])

    def put_back() -> None:
        for handle in handles:
            handle.remove()
        for module in fused:
            module.fused_attn = True

    with undoing(put_back):
        for module in inner.modules():
            if isinstance(module, nn.MultiheadAttention):
                handles.append(module.register_forward_pre_hook(again, with_kwargs=True))
            elif isinstance(drop := getattr(module, "attn_drop", None), nn.Module):
                handles.append(drop.register_forward_pre_hook(keep))
                if getattr(module, "fused_attn", False):
                    fused.append(module)
                    fused[-1].fused_attn = False
        yield
