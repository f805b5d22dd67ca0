"""Shipping a trained model: ONNX, torch.export, or a state dict, each compared with the model it came from.

`like timm` writes a state dict that timm's own attention networks load. Identity SE computes x · 2σ(z(x)),
timm's x · σ(z(x)); with the norm in front doubled (γ, β × 2) and the first layer halved, timm's is the same.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attninject import models
from attninject.delta_file import detached, save_tensors
from attninject.errors import AttnInjectError, ExportError, MissingPackageError
from attninject.planning import support
from attninject.surgery import injected_state

CLOSE = 1e-3  # the largest difference, relative to the largest output, that still is the same function


@dataclass(frozen=True)
class Parity:
    """How far the exported model is from its source on one batch of random images."""

    shape: tuple[int, ...]
    difference: float
    scale: float

    def __str__(self) -> str:
        size = "×".join(map(str, self.shape))
        return f"{size}: largest difference {self.difference:.2g}, outputs up to {self.scale:.3g}"


def export(
    model: nn.Module,
    path: Path,
    to: str,
    *,
    size: int = 224,
    like: str | None = None,
    name: str | None = None,
) -> list[Parity]:
    """Write the model to `path` and measure the parity of the copy, at two batch sizes and resolutions.

    Args:
        model: injected or not; it is put into eval mode, on the CPU.
        path: the file to write.
        to: `onnx`, `pt2` (torch.export) or `state_dict` (safetensors).
        size: side of the images; the second resolution is a little larger, where model and exporter take it.
        like: `timm` with `state_dict`: under the names, and for the gate, of timm's own attention network.
        name: the base model's name (timm/resnet50), for `like`.

    Raises:
        ExportError: the exporter fails, or what was written computes something else (the file is removed).
        MissingPackageError: ONNX without its packages.
    """
    model = support.unwrapped(model).eval().cpu()
    inputs = _inputs(model, size)
    makers: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
        "onnx": _onnx, "pt2": _pt2, "state_dict": _state_dict if like is None else partial(_like_timm, name=name),
    }  # fmt: skip
    if like is not None and (like != "timm" or to != "state_dict"):
        raise ExportError(f"like {like!r} to {to!r}: what there is, is `like timm` to a state_dict")
    with suppress(_OneResolution):
        return _compared(model, makers[to](model, path, inputs), inputs, path)
    inputs = [inputs[0], torch.cat([inputs[0], inputs[0][:1]])]
    return _compared(model, makers[to](model, path, inputs), inputs, path)


class _OneResolution(ExportError):
    """The exporter took something for granted that holds at one resolution only, such as a map of 1×1."""


def _compared(
    model: nn.Module, again: Callable[[Tensor], Tensor], inputs: list[Tensor], path: Path
) -> list[Parity]:
    found = []
    for x in inputs:
        with torch.no_grad():
            expected = model(x)
            try:
                actual = again(x)
            except Exception as error:  # onnxruntime's own errors share no base but Exception
                path.unlink(missing_ok=True)
                kind = _OneResolution if _sides_vary(inputs) else ExportError
                raise kind(
                    f"the exported model does not run on {tuple(x.shape)}: {_first_line(error)}"
                ) from error
        scale = float(expected.abs().max())
        found.append(Parity(tuple(x.shape), float((actual - expected).abs().max()), scale))
        if not found[-1].difference <= CLOSE * max(scale, 1e-6):
            path.unlink(missing_ok=True)
            raise ExportError(f"the exported model computes something else ({found[-1]}); {path} was removed")
    return found


def _inputs(model: nn.Module, size: int) -> list[Tensor]:
    """Random images at two batch sizes and, where the model takes a second, two resolutions."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(2, 3, size, size, generator=generator)
    for shape in ((3, 3, size + 32, size + 64), (3, 3, size + 32, size + 32), (3, 3, size, size)):
        large = torch.randn(*shape, generator=generator)
        try:
            with torch.no_grad():
                model(large)
        except Exception:  # a network of one resolution says so in many ways
            continue
        return [small, large]
    raise ExportError(f"{type(model).__name__} does not run on images of {size}×{size}; give its input size")


def _sides_vary(inputs: list[Tensor]) -> bool:
    return inputs[0].shape[-1] != inputs[1].shape[-1]


def _dynamic(inputs: list[Tensor]) -> dict[int, Any]:
    """The axes that vary: the batch, and height and width where two resolutions run."""
    return dict.fromkeys((0, 2, 3) if _sides_vary(inputs) else (0,), torch.export.Dim.DYNAMIC)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters deprecate parts of themselves, and log what they try."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _pt2(model: nn.Module, path: Path, inputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    with _quiet():
        try:
            program = torch.export.export(model, (inputs[0],), dynamic_shapes=(_dynamic(inputs),))
            torch.export.save(program, path)
            return torch.export.load(path).module()
        except (RuntimeError, ValueError, AssertionError) as error:
            kind = _OneResolution if _sides_vary(inputs) else ExportError
            raise kind(f"torch.export refuses {type(model).__name__}: {_first_line(error)}") from error


def _onnx(model: nn.Module, path: Path, inputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise MissingPackageError(
            f'ONNX needs {error.name}, which is not installed: pip install "attninject[export]"'
        ) from error
    with _quiet():
        try:
            torch.onnx.export(
                model, (inputs[0],), path, dynamo=True, verbose=False, dynamic_shapes=(_dynamic(inputs),),
                external_data=False, input_names=["images"], output_names=["logits"],
            )  # fmt: skip
        except Exception as error:  # the exporter's own errors share no base but Exception
            kind = _OneResolution if _sides_vary(inputs) else ExportError
            raise kind(f"torch.onnx refuses {type(model).__name__}: {_first_line(error)}") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _write(state: dict[str, Tensor], path: Path) -> None:
    save_tensors(detached(state), path, {"format": "pt"})


def _state_dict(model: nn.Module, path: Path, inputs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    import copy

    from safetensors.torch import load_file

    _write(model.state_dict(), path)
    twin = copy.deepcopy(model)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    twin.load_state_dict(load_file(path))
    return twin


# --- timm's own networks -----------------------------------------------------------------------

_TIMM_KEYS = {
    "cbam": ((".spatial.conv.", ".spatial.conv.conv."), (".spatial.norm.", ".spatial.conv.bn.")),
}


def _like_timm(
    model: nn.Module, path: Path, inputs: list[Tensor], name: str | None
) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import load_file

    if not name or not name.startswith("timm/"):
        raise ExportError(f"like timm: the base must be one of timm's, it is {name or 'not known'}")
    state = {k: t.clone() for k, t in model.state_dict().items()}
    kinds = set()
    for block_name, site in injected_state.sites_of(model).items():
        kinds.add(site.block)
        _fold(model, state, block_name, site)
        for ours, theirs in _TIMM_KEYS.get(site.block, ()):
            for key in [k for k in state if k.startswith(f"{block_name}.")]:
                state[key.replace(ours, theirs)] = state.pop(key)
    if len(kinds) != 1:
        raise ExportError(f"like timm: one kind of block throughout, found {sorted(kinds) or 'none'}")
    twin = _timm_twin(name.removeprefix("timm/"), kinds.pop(), state)
    _write(state, path)
    twin.load_state_dict(load_file(path))
    return twin


def _fold(model: nn.Module, state: dict[str, Tensor], block_name: str, site: Any) -> None:
    """Identity SE as published SE: the norm before it doubled, its first layer halved."""
    if site.init == "paper":
        return
    norm = dict(model.named_modules()).get(site.path)
    if site.block != "se" or site.init != "identity" or site.args.get("gate", "sigmoid") != "sigmoid":
        found = f"{site.block} with init {site.init!r}"
        raise ExportError(f"like timm: {block_name} is {found}; it must be `paper`, or identity SE")
    weight = getattr(norm, "weight", None)
    if site.position != "after" or not isinstance(norm, nn.modules.batchnorm._BatchNorm) or weight is None:
        raise ExportError(
            f"like timm: the factor 2 of {block_name} needs a batch norm with γ and β right before it"
        )
    for key in (f"{site.path}.weight", f"{site.path}.bias"):
        state[key] = state[key] * 2
    state[f"{block_name}.fc1.weight"] = state[f"{block_name}.fc1.weight"] / 2


def _timm_twin(name: str, kind: str, state: dict[str, Tensor]) -> nn.Module:
    """timm's network with the same keys and shapes: `attn_layer` of the base, or the `se…` network."""
    architecture = name.partition(".")[0]
    ways: list[tuple[str, dict[str, Any]]] = [(f"timm/{architecture}", {"block_args": {"attn_layer": kind}})]
    if kind == "se":
        ways.append((f"timm/se{architecture}", {}))
    heads = [k for k in ("fc.weight", "head.fc.weight", "head.weight", "classifier.weight") if k in state]
    classes = {"num_classes": state[heads[0]].shape[0]} if heads else {}
    said = []
    for full, more in ways:
        try:
            twin = models.build(full, "none", **more, **classes).eval()
        except AttnInjectError as error:
            said.append(f"{full}: {_first_line(error)[:120]}")
            continue
        theirs = twin.state_dict()
        odd = [
            k
            for k in {**theirs, **state}
            if k not in state or k not in theirs or theirs[k].shape != state[k].shape
        ]
        if not odd:
            return twin
        said.append(f"{full} {more or ''}: {len(odd)} tensors differ ({odd[0]})")
    hint = "; timm rounds the width of SE to a multiple of 8: args {divisor: 8}" if kind == "se" else ""
    raise ExportError(f"like timm: no network of timm has these tensors ({'; '.join(said)}){hint}")
