"""`rank_sites`: every candidate block in a copy of the model at once, and what each would change first."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attninject import api
from attninject.errors import DataError, NoMatchError, NonFiniteError, PlanError
from attninject.observe.snapshot import rng_kept
from attninject.planning import support
from attninject.planning.plan import Plan
from attninject.training.devices import deterministic
from attninject.wording import nearest_hint

from . import head as heads
from . import score_test
from .gradients import Collector, Losses
from .methods import METHODS, PAPERS_PLACES, Candidate, Setting
from .ranking import RankedSite, Ranking, ranks_of
from .samples import Samples, labelled, size_of, taken, to_device
from .statistics import holm

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) → the losses of the batch's images (B,), or their mean."""

SIGNS = 1999
"""Random signs that the null is sampled with: the smallest p is 1 / 2000."""
RESAMPLES = 500
"""Bootstrap samples behind an interval."""
CALIBRATION = 4
"""Batches that the norms inside the blocks take their statistics from, where the loss is the caller's own."""


def rank_sites(
    model: nn.Module, recipe: Any = None, data: Any = None, *, metric: str | Loss = "loss", images: int = 512,
    method: str = "auto", batch_size: int = 32, head: str = "auto", folds: int = 2, ridge: float = 1.0,
    mode: str = "eval", seed: int = 0, root: str = "", example_inputs: Any = None, strict: bool = True,
    args: Mapping[str, Any] | None = None, **rule: Any,
) -> Ranking:  # fmt: skip
    """Rank the sites of a recipe by how much a block there would help, before any training. `print` the result.

    All candidates are injected at once into a copy; with identity gates it computes what the model computes, and
    the gradient at the parameters that are zero says what training would change first. The model itself is not
    touched. The images (all of them, in memory) are run once forward and once forward and backward.

    Args:
        model: see `plan`.
        recipe: see `plan`: all candidate sites; also a `Plan`.
        data: batches (images, labels), a `DataLoader`, a `Dataset`, or a pair of tensors; with a loss of your own,
            batches of whatever it takes.
        metric: `loss` is the cross-entropy; else a callable `loss(model, batch)` that returns the images' losses
            (B,), or their mean, so that detectors and segmenters rank too.
        images: how many are looked at.
        method: a key of `evidence.methods.METHODS`; `auto` is `score`, the efficient score test.
        batch_size: images per batch where the data do not come in batches.
        head: `keep` the model's classifier, `fit` a new one with a penalty, on other images than the gradients come
            from, or `auto`: fit where the present one is no better than guessing.
        folds: of cross-fitting.
        ridge: λ of the score test, in units of the mean eigenvalue of a site's kernel.
        mode: `eval`; or `train` for models that give a loss in training mode only (norms and dropout stay in eval).
        seed: of blocks, folds, signs and resamples; same seed and data, same ranking.
        root: see `plan`; patterns of `Ranking.top` are relative to the whole model.
        example_inputs: see `plan`; None: the first images.
        strict: see `plan`.
        args: see `plan`.
        **rule: fields of one rule.

    Raises:
        DataError: no labels, one class, fewer images than a batch.
        NonFiniteError: the loss is NaN or infinite; names the batch and the first site where.
        PlanError: the recipe has no site here, or a block that is not the identity at init.
    """
    _check_words(method, head, mode, images, batch_size, folds)
    methods = ("score" if method == "auto" else method,)
    job = _Job(methods, head, folds, ridge, mode, seed, batch_size)
    return _ranked(model, recipe, data, metric, images, job, root, example_inputs, strict, args, rule)[
        methods[0]
    ]


def rankings(
    model: nn.Module, recipe: Any = None, data: Any = None, *, methods: Sequence[str] = tuple(METHODS),
    images: int = 512, batch_size: int = 32, head: str = "auto", seed: int = 0, example_inputs: Any = None,
    args: Mapping[str, Any] | None = None, **rule: Any,
) -> dict[str, Ranking]:  # fmt: skip
    """Method → what `rank_sites` returns for it, all from one measurement; arguments as there."""
    for method in methods:
        _check_words(method, head, "eval", images, batch_size, 2)
    job = _Job(tuple(methods), head, 2, 1.0, "eval", seed, batch_size)
    return _ranked(model, recipe, data, "loss", images, job, "", example_inputs, True, args, rule)


@dataclass(frozen=True)
class _Job:
    """The caller's choices."""

    methods: tuple[str, ...]
    head: str
    folds: int
    ridge: float
    mode: str
    seed: int
    batch_size: int


@dataclass(frozen=True)
class _Source:
    """Labelled images, or batches for a loss of the caller's own."""

    samples: Samples | None
    batches: tuple[Any, ...]
    loss: Loss | None


def _ranked(
    model: nn.Module, recipe: Any, data: Any, metric: str | Loss, images: int, job: _Job, root: str,
    example_inputs: Any, strict: bool, args: Mapping[str, Any] | None, rule: Mapping[str, Any],
) -> dict[str, Ranking]:  # fmt: skip
    """Method → its ranking, measured on a copy of the model."""
    if data is None:
        raise DataError(
            "rank_sites needs data: batches of (images, labels), a data set, a loader or two tensors"
        )
    support.refuse_unsupported(model)
    with rng_kept(), _exact():
        torch.manual_seed(job.seed)
        source = _source(model, data, metric, images, job.batch_size)
        torch.manual_seed(job.seed)  # a loader has drawn from the generator, a pair of tensors has not
        twin = _twin(model)
        plan = _plan(twin, recipe, source, root, example_inputs, strict, args, rule)
        usual = _usual(twin, plan, root) if "papers_places" in job.methods else frozenset[int]()
        api.inject(twin, plan)
        return _Measurement(twin, plan, source, job, usual).rankings()


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """On a card: the same kernels each time, and products of float32 in float32.

    In tf32, the default of convolutions there, a gradient summed over images may be off from autograd's by more than
    `gradients.TOLERANCE`, and be taken for that of a block that mixes images.
    """
    conv, product = torch.backends.cudnn, torch.backends.cuda.matmul
    name, value = "allow_tf32", cast(Any, False)
    parts: list[Any] = [conv, product]
    if hasattr(conv, "conv"):  # since torch 2.9; one who has set these may not ask for the old one
        name, value, parts = "fp32_precision", "ieee", [conv.conv, product]
    before = [getattr(part, name) for part in parts]
    try:
        for part in parts:
            setattr(part, name, value)
        with deterministic():
            yield
    finally:
        for part, held in zip(parts, before, strict=True):
            setattr(part, name, held)


def _check_words(method: str, head: str, mode: str, images: int, batch_size: int, folds: int) -> None:
    allowed = (
        ("method", method, ("auto", *METHODS)),
        ("head", head, ("auto", "fit", "keep")),
        ("mode", mode, ("eval", "train")),
    )
    for name, value, words in allowed:
        if value not in words:
            raise ValueError(
                f"{name}: expected one of {', '.join(words)}, found {value!r}{nearest_hint(str(value), words)}"
            )
    for name, number, least in (("images", images, 8), ("batch_size", batch_size, 1), ("folds", folds, 2)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name}: expected a whole number >= {least}, found {number!r}")
    if images < batch_size:
        raise DataError(
            f"images={images} are fewer than one batch of {batch_size}; give a smaller batch_size"
        )


def _source(model: nn.Module, data: Any, metric: str | Loss, images: int, batch_size: int) -> _Source:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if callable(metric):
        batches = tuple(to_device(b, device) for b in taken(data, images, batch_size))
        count = sum(map(size_of, batches))
        if count < batch_size:
            raise DataError(
                f"{count} images are fewer than one batch of {batch_size}; give more, or a smaller batch_size"
            )
        return _Source(None, batches, metric)
    if metric != "loss":
        raise ValueError(
            f'metric: expected "loss" (the cross-entropy) or a callable loss(model, batch), found {metric!r}'
        )
    samples = labelled(data, images, batch_size)
    pixels = samples.images.to(device)
    if pixels.is_floating_point():
        pixels = pixels.float() if pixels.dtype in (torch.float16, torch.bfloat16) else pixels
    return _Source(Samples(pixels, samples.labels.to(device)), (), None)


def _twin(model: nn.Module) -> nn.Module:
    """A copy to measure on, in float32 at least, nothing of it learning."""
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise PlanError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and ranking runs on a copy"
        ) from error
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters()):
        twin.float()
    for p in twin.parameters():
        p.requires_grad_(False)
        p.grad = None
    return twin


def _plan(
    twin: nn.Module, recipe: Any, source: _Source, root: str, example_inputs: Any, strict: bool,
    args: Mapping[str, Any] | None, rule: Mapping[str, Any],
) -> Plan:  # fmt: skip
    given = recipe.recipe if isinstance(recipe, Plan) else recipe
    if example_inputs is None and source.samples is not None:
        example_inputs = source.samples.images[:2]
    plan = api.plan(twin, given, root=root, example_inputs=example_inputs, strict=strict, args=args, **rule)
    if not plan.sites:
        raise NoMatchError(
            f"the recipe {plan.recipe.name} has no site on {plan.model_name}: there is nothing to rank"
        )
    if published := [s for s in plan.sites if s.init == "paper"]:
        raise PlanError(
            f"rule {published[0].rule + 1} asks for init: paper, so that {published[0].name} changes the output at "
            "once: a ranking needs blocks that are the identity at init (init: identity, or blend)"
        )
    if shared := [s for s in plan.sites if s.shares]:
        raise PlanError(
            f"rule {shared[0].rule + 1} lets {shared[0].name} share {shared[0].shares}: a ranking asks what a block does "
            "at each site by itself; leave `share` out"
        )
    return plan


def _usual(twin: nn.Module, plan: Plan, root: str) -> frozenset[int]:
    """Numbers of the sites that stand at the place of their block's paper."""
    found: set[tuple[str, str, str]] = set()
    for block in dict.fromkeys(s.block for s in plan.sites):
        place = PAPERS_PLACES.get(block) if isinstance(block, str) else None
        if place is None:
            raise PlanError(
                f"papers_places: no place is on record for the block {block!r}; it knows {', '.join(PAPERS_PLACES)}"
            )
        there = api.plan(twin, block=block, place=place, root=root, example_inputs=plan.inputs.args or None)
        found |= {(str(block), s.position, s.path) for s in there.sites}
    return frozenset(i for i, s in enumerate(plan.sites) if (str(s.block), s.position, s.path) in found)


# --- measuring ---------------------------------------------------------------------------------


class _Measurement:
    """From the injected copy to a ranking."""

    def __init__(
        self, twin: nn.Module, plan: Plan, source: _Source, job: _Job, usual: frozenset[int]
    ) -> None:
        self.twin, self.plan, self.source, self.job, self.usual = twin, plan, source, job, usual
        self.blocks = {s.name: api.injected(twin)[s.name] for s in plan.sites}
        for p in (p for block in self.blocks.values() for p in block.parameters()):
            p.requires_grad_(not p.detach().any())
        self.generator = torch.Generator().manual_seed(job.seed)
        self.notes: list[str] = list(plan.notes)

    def rankings(self) -> dict[str, Ranking]:
        """Method → its ranking."""
        _set_mode(self.twin, self.job.mode)
        collector = Collector(self.blocks, self._not_finite)
        if self.source.samples is None:
            of_blocks = self._of_batches(collector)
            kernels = [of_blocks[s.name] for s in self.plan.sites]
            removal = torch.eye(len(kernels[0])).to(kernels[0])
        else:
            of_blocks, head, order, groups = self._of_samples(collector, self.source.samples)
            kernels = [of_blocks[s.name] * (groups[:, None] == groups) for s in self.plan.sites]
            removal = torch.eye(len(kernels[0])).to(kernels[0])
            if head.removal is not None:
                removal = self._left(head.removal[order][:, order].to(removal))
        self.notes += collector.notes
        return self._scored(kernels, removal)

    # gradients

    def _of_samples(
        self, collector: Collector, samples: Samples
    ) -> tuple[dict[str, Tensor], heads.Head, Tensor, Tensor]:
        """Kernels by block, the head, the images' order in the kernels, and which of the head's folds each is in."""
        folds = heads.divided(samples.labels, self.job.folds, self.generator).to(samples.labels.device)
        head = self._head(samples, folds)
        groups = folds if head.weights is not None else torch.zeros_like(folds)
        order = groups.argsort(stable=True)

        def batches() -> Iterator[tuple[Any, Losses]]:
            for fold in groups.unique().tolist():
                head.use(fold)
                for at in order[groups[order] == fold].split(self.job.batch_size):
                    yield (samples.images[at], samples.labels[at]), self._cross_entropy

        kernels = collector.run(batches)
        if head.removal is None:
            self.notes.append(
                "the head's own directions were not projected out: it is not one Linear whose output is the model's"
            )
        return kernels, head, order, groups[order]

    def _left(self, removal: Tensor) -> Tensor:
        """P; zeros with a note where it leaves nothing but rounding errors, as with more classes than images."""
        if float(removal.trace()) > 0.5:  # a whole number but for rounding
            return removal
        self.notes.append(
            f"the head could do by itself all that these {len(removal)} images ask for, so that nothing is left to test: "
            "give more images than it has outputs, and where a new one is fitted, more in every fold"
        )
        return torch.zeros_like(removal)

    def _cross_entropy(self, batch: Any) -> Tensor:
        return F.cross_entropy(_logits(self.twin(batch[0])), batch[1], reduction="none")

    def _head(self, samples: Samples, folds: Tensor) -> heads.Head:
        """One forward pass: the head's features, and statistics for the norms inside the blocks."""
        layer = heads.layer_of(self.twin)
        found: list[Tensor] = []
        with torch.no_grad(), _calibrating(self.blocks), heads.Watch(layer) as watch:
            for number, x in enumerate(samples.images.split(self.job.batch_size), 1):
                found.append(_logits(self.twin(x)))
                watch.note(found[-1])
                if not bool(found[-1].isfinite().all()):
                    self._not_finite(number, (x,))
        logits = torch.cat(found)
        if logits.ndim != 2:
            raise DataError(
                f"the model gives {tuple(logits.shape[1:])} per image, no class scores; give metric= a loss of your own"
            )
        features = torch.cat(watch.features) if watch.direct else None
        head = heads.settle(self.job.head, layer, features, logits, samples.labels, folds)
        self.notes.append(head.said)
        return head

    def _of_batches(self, collector: Collector) -> dict[str, Tensor]:
        loss = self.source.loss
        assert loss is not None
        with torch.no_grad(), _calibrating(self.blocks):
            for batch in self.source.batches[:CALIBRATION]:
                loss(self.twin, batch)
        self.notes.append(
            "the loss is the caller's: the head was kept, and its own directions were not projected out"
        )
        return collector.run(lambda: ((batch, lambda b: loss(self.twin, b)) for batch in self.source.batches))

    def _not_finite(self, number: int, batch: Any) -> None:
        """Raise with the first site whose block makes a non-finite value from a finite one."""
        name = self._first_bad(batch)
        where = (
            f"at {name}" if name else "in the model itself: every block's output is finite where its input is"
        )
        raise NonFiniteError(f"the loss of batch {number} is NaN or infinite; it begins {where}")

    def _first_bad(self, batch: Any) -> str | None:
        bad: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                if isinstance(out, Tensor) and not out.isfinite().all() and args[0].isfinite().all():
                    bad.append(name)

            return after

        handles = [block.register_forward_hook(watch(name)) for name, block in self.blocks.items()]
        try:
            with torch.no_grad():
                self.source.loss(self.twin, batch) if self.source.loss else self.twin(batch[0])
        finally:
            for handle in handles:
                handle.remove()
        return bad[0] if bad else None

    # scores

    def _scored(self, kernels: list[Tensor], removal: Tensor) -> dict[str, Ranking]:
        job, n = self.job, len(removal)
        efficient = [removal @ k @ removal.T for k in kernels]
        influences = [score_test.influence(k, job.ridge) for k in efficient]
        stretched = score_test.stretch(removal)
        candidates = [
            Candidate(site, i, kernels[i], influences[i], stretched) for i, site in enumerate(self.plan.sites)
        ]
        weights = torch.cat([torch.ones(1, n), self._resamples(n)]).to(removal)
        signs = self._signs(n).to(removal)
        halves = (torch.randperm(n, generator=self.generator) % 2).to(removal.device)
        drops = [score_test.expected_drop(k, halves, job.ridge) for k in efficient]
        tests = [score_test.p_value(c.influence, signs, c.stretched) for c in candidates]
        return {method: self._by(method, candidates, weights, signs, tests, drops) for method in job.methods}

    def _by(
        self, method: str, candidates: list[Candidate], weights: Tensor, signs: Tensor, tests: list[float],
        drops: list[float],
    ) -> Ranking:  # fmt: skip
        """The ranking by one method."""
        setting = Setting(self.job.ridge, self.job.batch_size, self.job.seed, len(candidates), self.usual)
        scores = torch.stack([METHODS[method](c, setting, weights) for c in candidates])
        rows = _rows(candidates, scores, tests, drops)
        order = [row.number for row in rows]
        if method == "score":
            influences = [c.influence for c in candidates]
            order = score_test.forward_selection(influences, signs, candidates[0].stretched)
        at = {row.number: i for i, row in enumerate(rows)}
        return Ranking(
            tuple(rows), tuple(at[i] for i in order), self.plan.recipe, self.plan.model_name, method,
            weights.shape[1], self.job.seed, tuple(self.notes),
        )  # fmt: skip

    def _resamples(self, n: int) -> Tensor:
        """(r, n): how often each image is drawn in each bootstrap sample."""
        drawn = torch.randint(n, (RESAMPLES, n), generator=self.generator)
        return torch.zeros(RESAMPLES, n).scatter_add_(1, drawn, torch.ones(RESAMPLES, n))

    def _signs(self, n: int) -> Tensor:
        return torch.randint(2, (SIGNS, n), generator=self.generator) * 2.0 - 1


def _rows(
    candidates: list[Candidate], scores: Tensor, tests: list[float], drops: list[float]
) -> list[RankedSite]:
    """Best first. scores: (sites, 1 + r), those of all images and under resampling."""
    own, again = scores[:, 0].tolist(), scores[:, 1:]
    ranks = ranks_of(own)
    resampled = ((-again).argsort(dim=0, stable=True).argsort(dim=0, stable=True) + 1).to(again)
    bounds = torch.tensor([0.025, 0.975], dtype=again.dtype, device=again.device)
    adjusted = holm(tests)
    rows = []
    for i, candidate in enumerate(candidates):
        low, high = again[i].quantile(bounds).tolist()
        first, last = map(int, resampled[i].quantile(bounds, interpolation="nearest").tolist())
        rows.append(
            RankedSite(
                candidate.site,
                i,
                own[i],
                (low, high),
                ranks[i],
                (first, last),
                tests[i],
                adjusted[i],
                drops[i],
            )
        )
    return sorted(rows, key=lambda row: row.rank)


def _logits(out: Any) -> Tensor:
    """The class scores in what a model returns."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping):
        out = out.get("logits", out.get("out", next(iter(out.values()), None)))
    elif hasattr(out, "logits"):
        out = out.logits
    elif isinstance(out, list | tuple) and out:
        out = out[0]
    if isinstance(out, Tensor):
        return out
    raise DataError(
        f"the model returns {type(out).__name__}, no class scores; give metric= a loss of your own"
    )


def _set_mode(model: nn.Module, mode: str) -> None:
    """Eval; or train with norms and dropout held in eval, so that images do not mix and nothing is drawn."""
    model.train(mode == "train")
    if mode == "train":
        for module in model.modules():
            if isinstance(module, _BatchNorm) or "drop" in type(module).__name__.lower():
                module.eval()


class _calibrating:
    """Norms inside the blocks take their statistics from what passes by; a new one has mean 0 and variance 1."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.norms = [
            m
            for b in blocks.values()
            for m in b.modules()
            if isinstance(m, _BatchNorm) and m.track_running_stats
        ]

    def __enter__(self) -> None:
        self.held = [(m, m.momentum) for m in self.norms]
        for m in self.norms:
            m.reset_running_stats()
            m.train()
            m.momentum = None  # the plain average over all batches

    def __exit__(self, *_: object) -> None:
        for m, momentum in self.held:
            m.momentum = momentum
            m.eval()
