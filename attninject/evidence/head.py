"""The classifier before the gradients: kept, or fitted with a penalty on other images than they come from.

Behind a head with random weights the gradients are noise, and behind one that has learnt its images by heart they
are noise too. So a new head is fitted by cross-fitting: for each fold, on all images of the other folds, with an L2
penalty that is chosen by the loss on the images left out. Such a head is linear in its input, so that the features
of all images, one forward pass, are all that is needed.

Only images of one fold are then compared with one another. A pair from two folds would not do: each of the two has
been seen by the head that the other's gradient comes through, and with labels drawn at random such pairs agree more
often than chance has it (with four folds 17 of 100 p-values were below 0.05).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.errors import AttnInjectError, DataError
from attninject.training.heads import head_of

PENALTIES: tuple[float, ...] = (10.0, 1.0, 0.1, 0.01, 1e-3)
"""α of mean loss + α/2 ‖W‖², on features of mean 0 and variance 1 in the mean; strong ones first."""


@dataclass
class Head:
    """How the images are classified when the gradients are taken.

    `weights`: per fold (W: (C, d), b: (C,)) of a fitted head; None where the model's own is kept.
    `removal`: P: (n, n), which takes from the images' gradients what the head could do by itself; None where it is
    not known how.
    """

    layer: nn.Linear | None
    weights: list[tuple[Tensor, Tensor]] | None
    removal: Tensor | None
    said: str

    def use(self, fold: int) -> None:
        """Put the head of a fold into the (copied) model."""
        if self.weights is None or self.layer is None:
            return
        weight, bias = self.weights[fold]
        like = self.layer.weight
        self.layer.weight = nn.Parameter(weight.to(like), requires_grad=False)
        self.layer.bias = nn.Parameter(bias.to(like), requires_grad=False)
        self.layer.out_features = len(weight)


def layer_of(model: nn.Module) -> nn.Linear | None:
    """The Linear that is the head; None where the head is nothing so simple."""
    try:
        names = head_of(model)
    except AttnInjectError:
        return None
    inside = [m for n in names for m in model.get_submodule(n).modules()]
    linears = [m for m in inside if isinstance(m, nn.Linear)]
    return linears[0] if len(linears) == 1 else None


class Watch:
    """Input and output of the head in a forward pass, to tell whether the model's output is the head's."""

    def __init__(self, layer: nn.Linear | None) -> None:
        self.layer, self.direct = layer, layer is not None
        self.features: list[Tensor] = []
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Watch:
        def after(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self._seen.append((args[0].detach(), out.detach()))

        self._handle = None if self.layer is None else self.layer.register_forward_hook(after)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def note(self, logits: Tensor) -> None:
        """After each batch: keep the features, or note that the output is not the head's."""
        ok = len(self._seen) == 1 and self._seen[0][0].ndim == 2 and torch.equal(self._seen[0][1], logits)
        self.direct = self.direct and ok
        if self.direct:
            self.features.append(self._seen[0][0])
        self._seen = []


def settle(
    wanted: str,
    layer: nn.Linear | None,
    features: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    folds: Tensor,
) -> Head:
    """Decide whether the head is kept or fitted, and fit it.

    Under `auto` it counts as new where it has less than half of what a fitted one gains over guessing by the classes'
    shares, or nothing at all.

    Args:
        wanted: `fit`, `keep` or `auto`.
        layer: the head's Linear.
        features: its input, (n, d); None where the model's output is not its output.
        logits: (n, C) as the model gives them now.
        labels: (n,).
        folds: (n,), the fold of each image.

    Raises:
        DataError: a label that the kept head has no output for.
    """
    guess = _guessing(labels)
    fits = int(labels.max()) < logits.shape[1]
    loss = float(F.cross_entropy(logits.double(), labels)) if fits else math.inf
    if features is not None and layer is not None and wanted != "keep":
        fit = _fitted(features.double(), labels, folds)
        if wanted == "fit" or not loss < (guess + min(fit.loss, guess)) / 2:
            return _new(layer, fit, features.double(), labels, folds, loss, guess)
    if not fits:
        raise DataError(
            f"there are labels up to {int(labels.max())}, but the model has {logits.shape[1]} outputs"
        )
    said = f"the model's own head was kept (loss {loss:.3f}; guessing by the classes' shares {guess:.3f})"
    if features is None:
        if wanted == "fit" or not loss < guess:
            said += (
                "; it looks new, but could not be fitted, since the model's output is not that of one Linear: train "
                "the head first, or its gradients are noise"
            )
        return Head(layer, None, None, said)
    removal = _removal(features.double(), logits.double(), labels, torch.zeros_like(folds))
    return Head(layer, None, removal, said)


def _guessing(labels: Tensor) -> float:
    shares = labels.bincount().double() / len(labels)
    return -float((shares * shares.clamp_min(1e-300).log()).sum())


def _removal(
    features: Tensor, logits: Tensor, labels: Tensor, folds: Tensor, penalty: float | None = None
) -> Tensor:
    """P: (n, n), block by block of the folds: the projection off what the head is free to do.

    N = (δδᵀ) ∘ (φφᵀ) / λ are the inner products of the images' gradients at the head's weight: δ: (n, C), class
    probabilities less one-hot labels; φ the scaled features; λ = m α of the penalty for a fold of m images, or the mean
    of the diagonal where none is known. Taken out are the eigenvectors of N with values above 1, in which the loss bends
    more than the penalty (so that the head follows the images); and what no penalty holds back: the bias (the columns
    of δ), and the size of all weights at once (⟨δ_i, z_i⟩, z the class scores). Without the bias, what all images'
    inputs have in common would pass for evidence against every site, since it makes the δ_i sum to 0; without the size, a
    head that is surer than it has reason to be would be evidence for every site that can damp its input.

    A direction is taken out wholly or not at all: of a damped step (I + N)⁻¹ in its place, which takes out parts of all,
    it is not known how long it ought to leave the ones (`score_test.stretch`), and with more features than images to
    a fold most of what it leaves are such parts.
    """
    delta = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    scaled = _scaled(features)[0]
    kernel = (delta @ delta.T) * (scaled @ scaled.T)
    free = torch.cat([delta, (delta * (logits - logits.mean(1, keepdim=True))).sum(1, keepdim=True)], 1)
    found = torch.zeros_like(kernel)
    for fold in folds.unique():
        own = (folds == fold).nonzero()
        inside = kernel[own, own.T]
        lam = inside.diagonal().mean() if penalty is None else len(own) * penalty
        off = _off(free[own[:, 0]])
        values, vectors = torch.linalg.eigh(off @ inside @ off)
        held = vectors[:, values > lam]
        found[own, own.T] = off - held @ held.T
    return found


def _off(columns: Tensor) -> Tensor:
    """The projection (n, n) off the span of some columns: (n, c)."""
    u, s, _ = torch.linalg.svd(F.normalize(columns, dim=0), full_matrices=False)
    u = u[:, s > 1e-6]
    off: Tensor = torch.eye(len(u), dtype=u.dtype, device=u.device) - u @ u.T
    return off


def _scaled(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, d) with mean 0 and, over all of them, variance 1; their mean and scale."""
    mean = features.mean(0)
    scale = (features - mean).square().mean().sqrt().clamp_min(1e-12)
    return (features - mean) / scale, mean, scale


# --- fitting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Penalised:
    """A fitted head for features (φ − mean) / scale: weight (C, d), bias (C,), penalty α of α/2 ‖weight‖²."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    penalty: float


def penalised(features: Tensor, labels: Tensor, folds: Tensor) -> Penalised:
    """The head that is fitted on all images, with the penalty that is best on folds left out.

    features: (n, d); labels: (n,); folds: (n,). In float64, as `settle` fits its heads of the folds.
    """
    features = features.double()
    penalty = _fitted(features, labels, folds).penalty
    scaled, mean, scale = _scaled(features)
    reduced, back = _rotated(scaled)
    start = reduced.new_zeros(int(labels.max()) + 1, reduced.shape[1] + 1)
    w = _softmax_regression(reduced, labels, torch.ones_like(labels, dtype=torch.bool), penalty, start)
    weight = w[:, :-1] if back is None else w[:, :-1] @ back.T
    return Penalised(weight, w[:, -1], mean, scale, penalty)


@dataclass
class _Fit:
    """Heads of all folds for raw features, the penalty, and class scores (n, C) with their loss on images left out."""

    weights: list[tuple[Tensor, Tensor]]
    penalty: float
    out: Tensor
    loss: float


def _fitted(features: Tensor, labels: Tensor, folds: Tensor) -> _Fit:
    """A head per fold, fitted on the other folds; penalties from strong to weak while the loss left out falls."""
    scaled, mean, scale = _scaled(features)
    reduced, back = _rotated(scaled)
    numbers = folds.unique().tolist()
    heads = [reduced.new_zeros(int(labels.max()) + 1, reduced.shape[1] + 1) for _ in numbers]
    best: _Fit | None = None
    for penalty in PENALTIES:
        heads = [
            _softmax_regression(reduced, labels, folds != f, penalty, w)
            for f, w in zip(numbers, heads, strict=True)
        ]
        out = _out_of_fold(reduced, folds, numbers, heads)
        loss = float(F.cross_entropy(out, labels))
        if best is not None and loss > best.loss:
            break
        best = _Fit([_unscaled(w, back, mean, scale) for w in heads], penalty, out, loss)
    assert best is not None
    return best


def _new(
    layer: nn.Linear, fit: _Fit, features: Tensor, labels: Tensor, folds: Tensor, loss: float, guess: float
) -> Head:
    """The fitted head in place of the model's, and what is to be said of it."""
    removal = _removal(features, fit.out, labels, folds, fit.penalty)
    accuracy = float((fit.out.argmax(1) == labels).double().mean())
    own = f"the model's own has loss {loss:.3f}" if loss < math.inf else "the model's own has too few outputs"
    said = (
        f"a new head was fitted ({own}, guessing by the classes' shares {guess:.3f}) in {len(fit.weights)} folds, on "
        f"other images than the gradients come from: penalty {fit.penalty:g}, loss there {fit.loss:.3f}, accuracy "
        f"{accuracy:.1%}"
    )
    return Head(layer, fit.weights, removal, said)


def _rotated(features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features (n, d) in min(n, d) coordinates, which an L2 penalty cannot tell apart, and the way back."""
    n, d = features.shape
    if d <= n:
        return features, None
    q, r = torch.linalg.qr(features.T)  # features = rᵀ qᵀ
    return r.T, q


def _softmax_regression(x: Tensor, labels: Tensor, used: Tensor, penalty: float, start: Tensor) -> Tensor:
    """argmin mean cross-entropy + α/2 ‖W‖² over (W, b): (C, d + 1), from `start`, by L-BFGS in float64."""
    w = start.clone().requires_grad_()
    inputs, targets = x[used], labels[used]
    optimizer = torch.optim.LBFGS([w], max_iter=60, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(inputs @ w[:, :-1].T + w[:, -1], targets) + penalty / 2 * w[:, :-1].square().sum()
        )
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return w.detach()


def _out_of_fold(x: Tensor, folds: Tensor, numbers: Sequence[int], heads: Sequence[Tensor]) -> Tensor:
    out = x.new_empty(len(x), len(heads[0]))
    for f, w in zip(numbers, heads, strict=True):
        out[folds == f] = x[folds == f] @ w[:, :-1].T + w[:, -1]
    return out


def _unscaled(w: Tensor, back: Tensor | None, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same head for the raw features."""
    weight = (w[:, :-1] if back is None else w[:, :-1] @ back.T) / scale
    return weight, w[:, -1] - weight @ mean


def divided(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """(n,): the fold of each image, every class spread over all folds as evenly as it goes."""
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]
    found = torch.empty(len(labels), dtype=torch.long)
    found[order] = torch.arange(len(labels)) % folds
    return found
