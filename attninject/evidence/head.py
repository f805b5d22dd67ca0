"""The classifier before the gradients: kept, or fitted with a penalty on other images than they come from.

Behind a head with random weights the gradients are noise, and behind one that has learnt its images by heart they
are noise too. So a new head is fitted by cross-fitting: for each fold, on all images of the other folds, with an L2
penalty that is chosen by the loss on the images left out. Such a head is linear in its input, so that the features
of all images, one forward pass, are all that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.errors import AttnInjectError, DataError
from attninject.training.freezing import head_of

from .score_test import projection

PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3)
"""α of mean loss + α/2 ‖W‖², on features of mean 0 and variance 1 in the mean; strong ones first."""


@dataclass
class Head:
    """How the images are classified when the gradients are taken.

    `weights`: per fold (W: (C, d), b: (C,)) of a fitted head; None where the model's own is kept.
    `removal`: R: (n, n), which takes from the images' gradients what the head could do by itself; None where it is
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

    Under `auto` it counts as new where its loss is not below that of guessing by the classes' shares.

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
    classes = int(labels.max()) + 1
    guess = _guessing(labels)
    fits = classes <= logits.shape[1]
    loss = float(F.cross_entropy(logits.double(), labels)) if fits else math.inf
    new = wanted == "fit" or (wanted == "auto" and not loss < guess)
    if new and features is not None and layer is not None:
        return _fitted(layer, features.double(), labels, folds, loss, guess)
    if not fits:
        raise DataError(f"there are labels up to {classes - 1}, but the model has {logits.shape[1]} outputs")
    said = f"the model's own head was kept (loss {loss:.3f}; guessing by the classes' shares {guess:.3f})"
    if new:
        said += (
            "; it looks new, but could not be fitted, since the model's output is not that of one Linear: train the "
            "head first, or its gradients are noise"
        )
    if features is None:
        return Head(layer, None, None, said)
    delta = _residuals(logits.double().softmax(1), labels)
    return Head(layer, None, _removal(features.double(), delta, torch.zeros_like(folds)), said)


def _guessing(labels: Tensor) -> float:
    shares = labels.bincount().double() / len(labels)
    return -float((shares * shares.clamp_min(1e-300).log()).sum())


def _residuals(probabilities: Tensor, labels: Tensor) -> Tensor:
    """δ: (n, C), the gradient of each image's loss at its class scores: probabilities − one-hot labels."""
    return probabilities - F.one_hot(labels, probabilities.shape[1])


def _kernel(features: Tensor, delta: Tensor, penalty: float | None = None) -> Tensor:
    """N = (δδᵀ) ∘ (φφᵀ) / λ: (n, n), inner products of the gradients of a linear head's weight.

    φ are the scaled features; λ = n α of the penalty, or the mean of the diagonal where no penalty is known.
    """
    scaled = _scaled(features)[0]
    weight = (delta @ delta.T) * (scaled @ scaled.T)
    lam = weight.diagonal().mean().item() if penalty is None else len(delta) * penalty
    return weight / max(lam, 1e-300)


def _removal(features: Tensor, delta: Tensor, folds: Tensor, penalty: float | None = None) -> Tensor:
    """R: (n, n), block by block of the folds: a damped Newton step of the head, R = P (I + P N P)⁻¹ P.

    P projects off the columns of δ: the bias is not penalised. It fits the classes' shares, so that the δ_i sum to
    0; without P, what all images' inputs have in common would pass for evidence against every site.
    """
    kernel, found = _kernel(features, delta, penalty), torch.zeros_like(features @ features.T)
    for fold in folds.unique():
        own = (folds == fold).nonzero()
        u, s, _ = torch.linalg.svd(delta[own[:, 0]], full_matrices=False)
        u = u[:, s > 1e-9 * s.max().clamp_min(1e-300)]
        off = torch.eye(len(own), dtype=delta.dtype, device=delta.device) - u @ u.T
        found[own, own.T] = off @ projection(off @ kernel[own, own.T] @ off) @ off
    return found


def _scaled(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, d) with mean 0 and, over all of them, variance 1; their mean and scale."""
    mean = features.mean(0)
    scale = (features - mean).square().mean().sqrt().clamp_min(1e-12)
    return (features - mean) / scale, mean, scale


# --- fitting -----------------------------------------------------------------------------------


def _fitted(
    layer: nn.Linear, features: Tensor, labels: Tensor, folds: Tensor, loss: float, guess: float
) -> Head:
    scaled, mean, scale = _scaled(features)
    reduced, back = _rotated(scaled)
    numbers = folds.unique().tolist()
    best: tuple[float, float, list[Tensor], Tensor] | None = None
    heads = [
        torch.zeros(int(labels.max()) + 1, reduced.shape[1] + 1, dtype=features.dtype, device=features.device)
        for _ in numbers
    ]
    for penalty in PENALTIES:
        heads = [
            _softmax_regression(reduced, labels, folds != f, penalty, w)
            for f, w in zip(numbers, heads, strict=True)
        ]
        out = _out_of_fold(reduced, folds, numbers, heads)
        held_out = float(F.cross_entropy(out, labels))
        if best is not None and held_out > best[0]:
            break
        best = (held_out, penalty, heads, out)
    assert best is not None
    held_out, penalty, heads, out = best
    weights = [_unscaled(w, back, mean, scale) for w in heads]
    delta = _residuals(out.softmax(1), labels)
    removal = _removal(features, delta, folds, penalty)
    accuracy = float((out.argmax(1) == labels).double().mean())
    first = f"its loss {loss:.3f} is not below" if loss < math.inf else "it has too few outputs;"
    said = (
        f"the head was taken as new ({first} guessing by the classes' shares, {guess:.3f}) and fitted in "
        f"{len(numbers)} folds, on other images than the gradients come from: penalty {penalty:g}, loss there "
        f"{held_out:.3f}, accuracy {accuracy:.1%}"
    )
    return Head(layer, weights, removal, said)


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
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
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
