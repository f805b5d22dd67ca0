"""Per-image gradients of a loss at the zero parameters of identity blocks, as kernels over images.

One backward pass gives, for the layer that is zero, the gradient δ of its output and its input h, both per image.
The gradient of its weight for image i is Σ_p δ_ip h_ipᵀ over the positions p, so

    K_ij = ⟨g_i, g_j⟩ = Σ_pq ⟨δ_ip, δ_jq⟩ ⟨h_ip, h_jq⟩,

and for one position (SE, and every gate from a pooled descriptor) K = (δδᵀ) ∘ (hhᵀ): the gradients, as large as the
layer times the number of images, are never formed. Where there are many positions they are summed per image, and
where that is too wide for memory, projected at random (a sketch that keeps inner products in the mean).
Blocks whose zero parameters are no such layer get their gradients from their own input and output gradient, image
by image under `torch.func.vmap`. On the first batch both are compared with autograd's gradients of the last image
alone and of all; a block that fails is taken the other way, and one that mixes images has the whole model run
image by image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .samples import cut, size_of

FEW_POSITIONS = 4
"""Up to as many positions (or calls) per image, δ and h are kept apart."""
WIDEST = 8192
"""Numbers per image and site that are kept; a wider gradient is projected down to as many."""
TOLERANCE = 5e-3
"""Relative difference from autograd's gradient that is put down to rounding in float32."""


@dataclass
class Kept:
    """What is kept of one site: factors (δ: (n, P, O), h: (n, P, I)) and rows (n, p), batch by batch."""

    factors: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def kernel(self) -> Tensor:
        """K: (n, n) in float64."""
        parts = [
            factored_kernel(*(torch.cat(t).double() for t in zip(*f, strict=True)))
            for f in self.factors.values()
        ]
        for batches in self.rows.values():
            g = torch.cat(batches).double()
            parts.append(g @ g.T)
        return torch.stack(parts).sum(0)


def factored_kernel(delta: Tensor, inputs: Tensor) -> Tensor:
    """δ: (n, P, O), h: (n, P, I) → K: (n, n), K_ij = Σ_pq ⟨δ_ip, δ_jq⟩ ⟨h_ip, h_jq⟩."""
    total = delta.new_zeros(len(delta), len(delta))
    for p in range(delta.shape[1]):
        for q in range(delta.shape[1]):
            total += (delta[:, p] @ delta[:, q].T) * (inputs[:, p] @ inputs[:, q].T)
    return total


# --- layers whose gradient is an outer product, and norms --------------------------------------


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.groups == 1 and layer.weight[0, 0].numel() == 1 and set(layer.stride) == {1}
    return isinstance(layer, nn.Linear)


def _by_position(x: Tensor, layer: nn.Module, images: int) -> Tensor:
    """A layer's input or output: (m·B, C, *S), channels last for a Linear → (B, P, C)."""
    if not isinstance(layer, nn.Linear):
        x = x.flatten(2).mT
    return x.reshape(images, -1, x.shape[-1])


def _outer(
    layer: nn.Module, names: Sequence[str], h: Tensor, delta: Tensor, images: int
) -> tuple[Tensor, Tensor]:
    """δ: (B, P, O) and h: (B, P, I), a one put behind h for the bias."""
    delta, h = _by_position(delta, layer, images), _by_position(h, layer, images)
    ones = torch.ones_like(h[..., :1])
    wanted = [h] * ("weight" in names) + [ones] * ("bias" in names)
    return delta, torch.cat(wanted, -1)


def _norm_rows(layer: nn.Module, names: Sequence[str], x: Tensor, delta: Tensor, images: int) -> Tensor:
    """Gradients (B, p) of a batch norm's scale and shift, its statistics held."""
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    shape = (1, -1, *(1,) * (x.ndim - 2))
    xhat = (x - layer.running_mean.view(shape)) * (layer.running_var.view(shape) + layer.eps).rsqrt()
    sums = {"weight": delta * xhat, "bias": delta}
    rows = [
        sums[n].flatten(2).sum(2).reshape(images, -1, x.shape[1]).sum(1)
        for n in ("weight", "bias")
        if n in names
    ]
    return torch.cat(rows, 1)


# --- one block ---------------------------------------------------------------------------------


class Mixed(Exception):
    """The rows of a batch are not the images': the model has to be run image by image."""


class Whole:
    """An argument of a block that all images share: a weight of the module whose place the block takes."""

    def __init__(self, value: Any) -> None:
        self.value = value.detach() if isinstance(value, Tensor) else value


def _given(arguments: Iterable[Any], row: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The arguments of a block for one image; `row` takes its part of a tensor."""
    plain = (a.value if isinstance(a, Whole) else row(a) if isinstance(a, Tensor) else a for a in arguments)
    return tuple(plain)


class Watched:
    """One injected block: its zero parameters, and what is kept of their gradients."""

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name, self.block = name, block
        self.zeros = {n: p for n, p in block.named_parameters() if not p.detach().any()}
        self.live: set[str] = set()
        self.how = "layers"
        self.kept = Kept()
        self.sketched = self.one_by_one = False
        self.calls: list[tuple[str, tuple[Any, ...], list[Tensor]]] = []

    def layers(self) -> dict[str, list[str]]:
        """Layer → names of its parameters that are zero and live."""
        found: dict[str, list[str]] = {}
        for name in self.zeros:
            if name in self.live:
                owner, _, own = name.rpartition(".")
                found.setdefault(owner, []).append(own)
        return found

    def choose(self) -> None:
        """By layers where each is linear or a norm, else by the whole block."""
        of = [self.block.get_submodule(n) for n in self.layers()]
        if not all(_is_linear(m) or (isinstance(m, _BatchNorm) and not m.training) for m in of):
            self.how = "block"

    def hooks(self, on: Callable[[], bool]) -> list[Any]:
        """Watch the layers, or the block: inputs and gradients of outputs go to `calls` while `on()`."""
        watched = self.layers() if self.how == "layers" else [""]

        def hook(layer: str) -> Callable[..., None]:
            def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                if not on() or not isinstance(out, Tensor) or not out.requires_grad:
                    return
                delta: list[Tensor] = []
                each = len(args) - len(
                    getattr(module, "tensors", ())
                )  # behind them weights of a replaced module
                held = tuple(a.detach() if isinstance(a, Tensor) else a for a in args[:each])
                held += tuple(Whole(a) for a in args[each:])
                self.calls.append((layer, held, delta))
                out.register_hook(lambda g: delta.append(g.detach()) if on() else None)

            return after

        return [self.block.get_submodule(n).register_forward_hook(hook(n)) for n in watched]

    def take(self, images: int) -> dict[str, tuple[Tensor, Tensor] | Tensor]:
        """What the calls of one batch give: per layer (or "" for the block) factors or rows; forgets the calls."""
        calls = [(layer, args, delta[0]) for layer, args, delta in self.calls if delta]
        self.calls = []
        if any(len(args[0]) % images or len(delta) % images for _, args, delta in calls):
            raise Mixed(self.name)
        if self.how == "block":
            return (
                {"": torch.stack([self._rows(args, delta, images) for _, args, delta in calls]).sum(0)}
                if calls
                else {}
            )
        found: dict[str, tuple[Tensor, Tensor] | Tensor] = {}
        for layer, names in self.layers().items():
            module = self.block.get_submodule(layer)
            own = [(args[0], delta) for n, args, delta in calls if n == layer]
            if not own:
                continue
            if _is_linear(module):
                pairs = [_outer(module, names, x, delta, images) for x, delta in own]
                found[layer] = _joined([d for d, _ in pairs], [h for _, h in pairs])
            else:
                found[layer] = torch.stack([_norm_rows(module, names, x, d, images) for x, d in own]).sum(0)
        return found

    def _rows(self, args: tuple[Any, ...], delta: Tensor, images: int) -> Tensor:
        """Gradients (B, p) of the block's zero parameters from one call's inputs and output gradient."""
        rows = None if self.one_by_one else _by_vmap(self.block, self._parameters(), args, delta)
        if rows is None:
            self.one_by_one = True
            rows = _by_loop(self.block, self._parameters(), args, delta)
        return rows.reshape(images, -1, rows.shape[1]).sum(1)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.zeros.items() if n in self.live}

    def keep(self, found: Mapping[str, tuple[Tensor, Tensor] | Tensor]) -> None:
        """Add what a batch gave."""
        for layer, value in found.items():
            if isinstance(value, Tensor):
                self.kept.rows.setdefault(layer, []).append(self._narrow(value))
            else:
                self.kept.factors.setdefault(layer, []).append(value)

    def _narrow(self, rows: Tensor) -> Tensor:
        if rows.shape[1] <= WIDEST:
            return rows
        self.sketched = True
        return sketch(rows, WIDEST)

    def explicit(self, found: Mapping[str, tuple[Tensor, Tensor] | Tensor]) -> tuple[Tensor, Tensor]:
        """The gradient of the last image and that of all, (p,) each, in the order of `ordered`."""
        last, total = [], []
        for layer in self.layers() if self.how == "layers" else [""]:
            value = found.get(layer)
            if isinstance(value, tuple):
                delta, h = value
                last.append((delta[-1].mT @ h[-1]).flatten())
                total.append(torch.einsum("bpo,bpi->oi", delta, h).flatten())
            elif value is not None:
                last.append(value[-1])
                total.append(value.sum(0))
        return torch.cat(last), torch.cat(total)

    def ordered(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Autograd's gradients of the live parameters, (p,), in the order of `explicit`."""
        if self.how == "block":
            return torch.cat([gradients[n].flatten() for n in self._parameters()])
        parts = []
        for layer, names in self.layers().items():
            own = [gradients[f"{layer}.{n}" if layer else n] for n in ("weight", "bias") if n in names]
            linear = _is_linear(self.block.get_submodule(layer))
            parts.append(
                torch.cat([g.flatten(1) if g.ndim > 1 else g[:, None] for g in own], 1).flatten()
                if linear
                else torch.cat(own)
            )
        return torch.cat(parts)


def _joined(deltas: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, Tensor] | Tensor:
    """Factors of all calls behind one another, or the gradients themselves where those are smaller: (B, O·I)."""
    delta, h = torch.cat(deltas, 1), torch.cat(inputs, 1)
    _, p, o = delta.shape
    if p <= FEW_POSITIONS and p * (o + h.shape[2]) < o * h.shape[2]:
        return delta, h
    return (delta.mT @ h).flatten(1)


def sketch(rows: Tensor, width: int) -> Tensor:
    """A sketch of rows (B, p) → (B, width): inner products kept in the mean, with variance of at most about 2/width.

    Every coordinate is added, with a random sign, to one of `width` sums, as many to each as go; the same ones at
    every call. A count sketch (Charikar, Chen & Farach-Colton 2002) but for that, and but for the order of adding, which
    on a card would be another each time.
    """
    generator = torch.Generator().manual_seed(rows.shape[1])
    order = torch.randperm(rows.shape[1], generator=generator).to(rows.device)
    signs = (torch.randint(2, (rows.shape[1],), generator=generator) * 2 - 1).to(rows)
    mixed = F.pad((rows * signs)[:, order], (0, -rows.shape[1] % width))
    return mixed.view(len(rows), -1, width).sum(1)


def _by_vmap(
    block: nn.Module, zeros: Mapping[str, Tensor], args: tuple[Any, ...], delta: Tensor
) -> Tensor | None:
    """Gradients per row, (R, p); None where the block cannot be run under vmap."""
    dims = tuple(0 if isinstance(a, Tensor) else None for a in args)

    def of_row(held: dict[str, Tensor], row: tuple[Any, ...], g: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(block, held, _given(row, lambda a: a[None]))
        return (y[0] * g).sum()

    try:
        held = {n: p.detach() for n, p in zeros.items()}
        found = torch.func.vmap(torch.func.grad(of_row), in_dims=(None, dims, 0))(held, args, delta)
    except Exception:  # vmap refuses what depends on data, and says so in many ways
        return None
    return torch.cat([found[n].detach().flatten(1) for n in zeros], 1)


def _by_loop(block: nn.Module, zeros: Mapping[str, Tensor], args: tuple[Any, ...], delta: Tensor) -> Tensor:
    """The same, one row after the other."""
    rows = []
    for r in range(len(delta)):
        with torch.enable_grad():
            y = block(*_given(args, lambda a: a[r : r + 1]))  # noqa: B023 (called at once)
            found = torch.autograd.grad((y * delta[r : r + 1]).sum(), list(zeros.values()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


# --- all blocks --------------------------------------------------------------------------------

Losses = Callable[[Any], Tensor]
"""A batch → its images' losses (B,), or their mean."""


class _Again(Exception):
    """What was learnt from a batch asks for another way from the start."""


class Collector:
    """Kernels of all sites of a model in which every candidate block is injected."""

    def __init__(self, blocks: Mapping[str, nn.Module], complain: Callable[[int, Any], None]) -> None:
        """`complain(number, batch)` raises for a batch whose loss is not finite."""
        self.watched = [Watched(name, block) for name, block in blocks.items()]
        self.complain = complain
        self.notes: list[str] = []
        self.singly = False
        self.on = False

    def run(self, batches: Callable[[], Iterator[tuple[Any, Losses]]]) -> dict[str, Tensor]:
        """Name of a block → K: (n, n) over the images in the order of the batches, which may be asked for anew."""
        while True:
            for w in self.watched:
                w.kept, w.calls = Kept(), []
            try:
                for number, (batch, losses) in enumerate(self._sized(batches()), 1):
                    self._batch(number, batch, losses)
            except _Again:
                continue
            except Mixed as mixed:
                self.singly = True
                self.notes.append(
                    f"{mixed} does not keep a batch's images apart: the model was run image by image"
                )
                continue
            self._say()
            return self._kernels()

    def _sized(self, batches: Iterator[tuple[Any, Losses]]) -> Iterator[tuple[Any, Losses]]:
        for batch, losses in batches:
            size = size_of(batch)
            for i in range(0, size, 1 if self.singly else size):
                yield (cut(batch, i, i + 1, size) if self.singly else batch), losses

    def _batch(self, number: int, batch: Any, losses: Losses) -> None:
        images = size_of(batch)
        with self._watching():
            self.on = True
            each = losses(batch)
            total = each.sum() if each.ndim else each * images
            if not bool(torch.isfinite(total)):
                self.complain(number, batch)
            first = number == 1 and each.ndim > 0
            gradients = self._gradients(total, keep=first)
            self.on = False
            self._learn(gradients)
            last = self._gradients(each[-1]) if first else None
        for w, of_all in zip(self.watched, gradients, strict=True):
            if not w.live:
                w.calls = []
                continue
            found = w.take(images)
            if number == 1:
                self._check(w, found, of_all, None if last is None else last[self.watched.index(w)])
            w.keep(found)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        handles = [h for w in self.watched for h in w.hooks(lambda: self.on)]
        try:
            with torch.enable_grad():
                yield
        finally:
            self.on = False
            for handle in handles:
                handle.remove()

    def _gradients(self, loss: Tensor, keep: bool = False) -> list[dict[str, Tensor]]:
        flat = [p for w in self.watched for p in w.zeros.values()]
        if not loss.requires_grad or not flat:
            return [{n: torch.zeros_like(p) for n, p in w.zeros.items()} for w in self.watched]
        found = iter(torch.autograd.grad(loss, flat, retain_graph=keep, allow_unused=True))
        pairs = [{n: (p, next(found)) for n, p in w.zeros.items()} for w in self.watched]
        return [{n: torch.zeros_like(p) if g is None else g for n, (p, g) in of.items()} for of in pairs]

    def _learn(self, gradients: list[dict[str, Tensor]]) -> None:
        """Note parameters that have a gradient for the first time; the pass begins anew with them."""
        changed = False
        for w, of in zip(self.watched, gradients, strict=True):
            new = {n for n, g in of.items() if n not in w.live and bool(g.any())}
            if new:
                w.live |= new
                w.choose()
                changed = True
        if changed:
            raise _Again

    def _check(
        self,
        w: Watched,
        found: Mapping[str, Any],
        of_all: Mapping[str, Tensor],
        of_last: Mapping[str, Tensor] | None,
    ) -> None:
        """Against autograd: all images together, and the last alone."""
        if found:
            last, total = w.explicit(found)
            if _near(total, w.ordered(of_all)) and (of_last is None or _near(last, w.ordered(of_last))):
                return
        if w.how == "layers":
            w.how = "block"
            raise _Again
        if not self.singly:
            raise Mixed(w.name)
        raise RuntimeError(f"the gradient of {w.name} for one image is not that of autograd")

    def _say(self) -> None:
        if wide := [w.name for w in self.watched if w.sketched]:
            self.notes.append(
                f"gradients wider than {WIDEST:,} were projected at random to as many: {', '.join(wide)}"
            )
        if dead := [w.name for w in self.watched if not w.live]:
            self.notes.append(f"no gradient reaches {', '.join(dead)}: nothing can be said about them")

    def _kernels(self) -> dict[str, Tensor]:
        found = {w.name: w.kept.kernel() for w in self.watched if w.live}
        size = next(iter(found.values())) if found else torch.zeros(1, 1)
        return {w.name: found.get(w.name, torch.zeros_like(size)) for w in self.watched}


def _near(ours: Tensor, autograd: Tensor) -> bool:
    if ours.shape != autograd.shape:
        return False
    return float((ours - autograd).norm()) <= TOLERANCE * float(autograd.norm()) + 1e-12
