"""rank_sites as a user meets it: what it says, that it leaves no trace, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fingerprints import Fingerprint
from nets import net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attninject as ai
from attninject.errors import DataError, NoMatchError, NonFiniteError, PlanError
from attninject.evidence import rank
from attninject.evidence.measuring import kolmogorov
from attninject.evidence.methods import METHODS
from attninject.evidence.ranking import Ranking


def tiny(seed: int = 0, classes: int = 3) -> nn.Module:
    """Four convolutions with a norm and dropout between, and a head with random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes),
    )  # fmt: skip


def images(count: int = 48, classes: int = 3, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(
        classes, (count,), generator=generator
    )


AFTER = "re:(2|4|7)"


def ranked(model: nn.Module | None = None, data: Any = None, **kw: Any) -> Ranking:
    kw = {"block": "se", "after": AFTER, "args": {"reduction": 4}, **kw}
    return ai.rank_sites(tiny() if model is None else model, data=images() if data is None else data, **kw)


# --- what it says ------------------------------------------------------------------------------


def test_it_prints_a_table_with_a_verdict() -> None:
    """Every site with its shape, cost, score, interval and rank; then the method and what it has shown."""
    r = ranked()
    text = str(r)
    for word in ("after 2", "8×8×8", "score", "95 % interval", "p (Holm)", "no method chose better sites"):
        assert word in text
    assert text.splitlines()[-1] == "no site can be told from chance on these 48 images"
    assert [s.rank for s in r.sites] == [1, 2, 3]
    assert sorted(r.order) == [0, 1, 2]
    for s in r.sites:
        assert s.interval[0] <= s.interval[1]
        assert 1 <= s.rank_interval[0] <= s.rank_interval[1] <= 3
        assert s.p <= s.p_holm <= 1


def test_it_is_data() -> None:
    """`to_dict` goes through JSON with every figure of the table; HTML escapes what it shows."""
    r = ranked()
    data = json.loads(json.dumps(r.to_dict()))
    assert [s["site"]["path"] for s in data["sites"]] == [s.site.path for s in r.sites]
    assert data["verdict"] == r.verdict
    assert data["method"] == "score"
    page = r._repr_html_()
    assert page.count("<tr>") == 4
    assert r.verdict in page
    with pytest.raises(AttributeError):
        r.images = 3  # type: ignore[misc]


def test_the_same_seed_gives_the_same_ranking_whatever_happened_before() -> None:
    """Neither the global generators nor an earlier call has a say; another seed has."""
    model = tiny()
    first = ranked(model)
    torch.manual_seed(99)
    torch.randn(3)
    assert ranked(model).to_dict() == first.to_dict()
    assert ranked(model, seed=1).to_dict() != first.to_dict()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "score"])
def test_every_method_ranks(method: str) -> None:
    """All methods share table and intervals; the p-values stay those of the score test."""
    model = net("torchvision/resnet18")
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    r = ai.rank_sites(model, data=(x, y), block="se", place="block_end", method=method, batch_size=8)
    assert r.method == method
    assert [s.score for s in r.sites] == sorted((s.score for s in r.sites), reverse=True)
    assert method in str(r)


# --- what it finds -----------------------------------------------------------------------------


class TwoChannels(nn.Module):
    """Two numbers a, b in two channels; behind `mix` only a is left, then two more layers that keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.mix, self.then = nn.Identity(), nn.Conv2d(4, 4, 1, bias=False), nn.Identity()
        self.fc = nn.Linear(4, 2)
        with torch.no_grad():
            self.mix.weight.zero_()
            for c in (0, 2, 3):
                self.mix.weight[c, c] = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.then(self.mix(self.see(x))).mean((2, 3)))


def product_data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels that hang on a · b: where b is 1 the sign of a says nearly all, where it is −1 little.

    Without b the label's chance is σ(1.5 a), so that a linear head on a alone leaves nothing to find.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 1, 1, generator=generator)
    x[:, 1] = x[:, 1].sign()
    a, b = x[:, 0, 0, 0], x[:, 1, 0, 0]
    alone = torch.sigmoid(1.5 * a)
    chance = alone + 0.9 * b * a.sign() * torch.minimum(alone, 1 - alone)
    return x.expand(-1, -1, 4, 4).contiguous(), torch.bernoulli(chance, generator=generator).long()


def test_the_site_that_sees_the_product_comes_first() -> None:
    """SE before the second channel is lost can use it: it is first and told from chance; behind, it is neither."""
    r = ai.rank_sites(
        TwoChannels(), data=product_data(256, 0), block="se", after=["see", "then"], args={"reduction": 0.5}
    )
    assert [s.site.path for s in r.sites] == ["see", "then"]
    first, second = r.sites
    assert first.p_holm < 0.01
    assert second.p_holm > 0.05
    assert first.drop > 0.01
    assert first.rank_interval == (1, 1)
    assert r.verdict == "1 of 2 sites can be told from chance on these 256 images: after see"


@pytest.mark.parametrize("head", ["fit", "keep"])
def test_p_values_are_uniform_where_labels_are_drawn(head: str) -> None:
    """Labels that know nothing of the images give uniform p-values: Kolmogorov-Smirnov at 1 %, one p per net."""
    found = []
    for seed in range(30):
        r = ranked(tiny(seed), images(64, seed=100 + seed), head=head, seed=seed, block="se")
        found.append(next(s.p for s in r.sites if s.number == seed % 3))
    assert kolmogorov(found) < 1.63 / math.sqrt(len(found))


# --- the model stays as it is ------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_bit_identical_afterwards(training: bool) -> None:
    """Weights, grads and their absence, statistics, modes, requires_grad, dictionaries and generators."""
    model = tiny().train(training)
    model[0].weight.requires_grad_(False)
    F.cross_entropy(model(images()[0]), images()[1]).backward()
    before = Fingerprint(model)
    ranked(model)
    assert before.differences(Fingerprint(model)) == []


class Breaks:
    """Batches, and an error after so many."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield images(32)
        raise self.error


def breaking_loss(error: BaseException) -> Callable[[nn.Module, Any], Tensor]:
    calls = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        torch.randn(1)
        if len(calls) == 4:
            raise error
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return loss


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_the_model_is_untouched_where_it_raises(error: BaseException) -> None:
    """An error or Ctrl-C, in the data or in the middle of the gradients, leaves everything as it was."""
    model = tiny()
    before = Fingerprint(model)
    with pytest.raises(type(error)):
        ranked(model, Breaks(error), images=64)
    with pytest.raises(type(error)):
        ranked(model, [images(32), images(32)], metric=breaking_loss(error))
    assert before.differences(Fingerprint(model)) == []


def test_an_injected_model_ranks_what_comes_next() -> None:
    """Blocks that are there stay, and are no candidates."""
    model = ai.inject(tiny(), block="eca", after="2")
    names = list(ai.injected(model))
    r = ranked(model, after=["4", "7"])
    assert list(ai.injected(model)) == names
    assert len(r.sites) == 2


# --- the recipe of the best --------------------------------------------------------------------


def where(sites: Any) -> set[tuple[Any, ...]]:
    return {(s.path, s.position, s.call, s.input, s.output, s.block, s.args, s.layout) for s in sites}


@pytest.mark.parametrize(
    ("name", "size", "rule"),
    [
        ("torchvision/resnet18", 32, {"block": "se", "place": "residual_branch"}),
        ("torchvision/resnet18", 32, {"block": "cbam", "before": "layer*.*::add", "input": 1}),
        ("torchvision/densenet121", 32, {"block": "eca", "place": "stage_end"}),
        ("timm/vit_tiny_patch16_224", 224, {"block": "se", "place": "block_end"}),
        ("timm/convnext_atto", 32, {"block": "se", "place": "residual_branch"}),
        ("torchvision/mobilenet_v3_small", 32, {"block": "coord", "place": "block_end"}),
    ],
)
def test_top_names_exactly_the_sites_it_chose(name: str, size: int, rule: dict[str, Any]) -> None:
    """On a fresh copy the recipe plans to the same sites, and to no other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, size, size, generator=generator)
    r = ai.rank_sites(net(name), data=(x, torch.arange(8) % 2), batch_size=8, **rule)
    chosen = [r.sites[i].site for i in r.order[:3]]
    plan = ai.plan(net(name), r.top(3), example_inputs=x[:2])
    assert where(plan.sites) == where(chosen)
    assert len(plan.sites) == 3
    assert where(ai.plan(net(name), r.top(3).to_dict(), example_inputs=x[:2]).sites) == where(chosen)


def test_budgets_pass_over_what_does_not_fit() -> None:
    """`top(parameters=)` and `top(macs=)` stay within the budget and take the next site that fits."""
    r = ranked()
    sizes = {s.number: s.site.parameters for s in r.sites}
    budget = sizes[0] + sizes[1]
    planned = ai.plan(tiny(), r.top(parameters=budget))
    assert planned.parameters <= budget
    macs = min(s.site.macs for s in r.sites)
    assert ai.plan(tiny(), r.top(macs=macs)).macs <= macs
    assert len(ai.plan(tiny(), r.top(3)).sites) == 3


@pytest.mark.parametrize("given", [{"k": 0}, {"k": 4}, {"parameters": 1}, {"macs": 0}])
def test_impossible_tops_are_refused(given: dict[str, int]) -> None:
    """With what would be possible."""
    with pytest.raises(PlanError, match=r"expected 1 … 3|the smallest has"):
        ranked().top(**given)


def test_top_takes_one_limit() -> None:
    """Two limits, or none, are a mistake in the call."""
    r = ranked()
    for bad in ({}, {"k": 1, "macs": 3}):
        with pytest.raises(TypeError, match="exactly one"):
            r.top(**bad)


# --- data, heads, losses -----------------------------------------------------------------------


def test_all_ways_to_give_data_give_the_same_ranking() -> None:
    """A pair of tensors, a loader and an iterable of batches hold the same images in the same order."""
    x, y = images()
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    results = [ranked(data=d).to_dict() for d in ((x, y), loader, list(loader))]
    assert results[0] == results[1] == results[2]
    assert ranked(data=TensorDataset(x, y)).images == 48


def test_only_so_many_images_are_looked_at() -> None:
    """`images` is a limit, also within a batch."""
    assert ranked(images=40).images == 40


def test_a_head_that_knows_nothing_is_fitted_and_one_that_does_is_kept() -> None:
    """`auto` goes by how much of a fitted head's gain over guessing it has; `fit` and `keep` overrule it."""
    model, (x, y) = tiny(), images(64)
    with torch.no_grad():
        logits = model.eval()(x)
        model[-1].bias -= logits.mean(0)
        model[-1].weight *= 300
        model[-1].bias *= 300
        y = model(x).argmax(1)
    assert "own head was kept" in ranked(model, (x, y)).notes[0]
    assert "in 2 folds, on other images" in ranked(model, (x, y), head="fit").notes[0]
    assert "a new head was fitted" in ranked(tiny(1), (x, (y + 1) % 3)).notes[0]
    assert "own head was kept" in ranked(tiny(1), (x, (y + 1) % 3), head="keep").notes[0]


def test_more_classes_than_outputs_call_for_a_new_head() -> None:
    """Labels that the head cannot name: fitted under auto, refused under keep."""
    x, y = images(48, classes=5)
    assert "too few outputs" in ranked(data=(x, y)).notes[0]
    with pytest.raises(DataError, match="labels up to 4, but the model has 3 outputs"):
        ranked(data=(x, y), head="keep")


def test_a_head_that_is_not_linear_is_kept_and_said() -> None:
    """A net whose output is no Linear's: what could not be done stands in the notes."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    r = ranked(model, after="1")
    assert any("could not be fitted" in note for note in r.notes)
    assert any("not projected out" in note for note in r.notes)


def test_a_loss_of_ones_own_per_image_or_as_a_mean_gives_the_same_ranking() -> None:
    """The mean's gradients are taken times the number of images; dictionaries are batches too."""

    def each(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch["x"]), batch["t"], reduction="none").mean(1)

    x, _ = images(32)
    batches = [{"x": part, "t": torch.ones(16, 3)} for part in x.split(16)]
    first = ranked(data=batches, metric=each)
    second = ranked(data=batches, metric=lambda m, b: each(m, b).mean())
    assert [s.number for s in first.sites] == [s.number for s in second.sites]
    for a, b in zip(first.sites, second.sites, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-4)
    assert any("loss is the caller's" in note for note in first.notes)


def test_a_detector_ranks_by_its_own_loss() -> None:
    """torchvision's detectors take lists and give losses in training mode only; lists are cut by image."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    target = {"boxes": torch.tensor([[10.0, 10, 90, 90]]), "labels": torch.tensor([1])}
    generator = torch.Generator().manual_seed(0)
    batches = [
        ([torch.rand(3, 96, 96, generator=generator) for _ in range(4)], [dict(target) for _ in range(4)])
        for _ in range(2)
    ]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return sum(model(*batch).values())

    before = Fingerprint(model)
    r = ai.rank_sites(
        model, data=batches, metric=loss, mode="train", batch_size=4, images=8,
        block="se", after="backbone.features.0.{3,6}",
    )  # fmt: skip
    assert len(r.sites) == 2
    assert r.images == 8
    assert before.differences(Fingerprint(model)) == []


# --- what it refuses ---------------------------------------------------------------------------


def constant_labels() -> tuple[Tensor, Tensor]:
    return images()[0], torch.ones(48, dtype=torch.long)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images()[0], "there are no labels"),
        ([images()[0]], "batch 1 has no labels"),
        ([(images()[0], None)], "batch 1 has no labels"),
        (constant_labels(), "all 48 images have label 1: with one class"),
        (images(20), "20 images are fewer than one batch of 32"),
        ([], "hold no images"),
        ((images()[0], images()[1].float()), "whole class numbers"),
        ((images()[0], images()[1] - 1), "a label is -1"),
        ((images()[0], images(40)[1]), "48 images but 40 labels"),
        ([images(), (torch.randn(8, 3, 9, 9), torch.arange(8))], "several sizes"),
        (3, "found int"),
    ],
    ids=[
        "tensor",
        "no pair",
        "none",
        "one class",
        "few",
        "empty",
        "floats",
        "negative",
        "uneven",
        "sizes",
        "number",
    ],
)
def test_bad_data_are_refused(data: Any, message: str) -> None:
    """Each with what was found and what to give."""
    with pytest.raises(DataError, match=message):
        ranked(data=data, images=512)


def test_no_data_at_all() -> None:
    """Data are no keyword that one may leave out."""
    with pytest.raises(DataError, match="needs data"):
        ai.rank_sites(tiny(), block="se", after="2")


class Burns(nn.Module):
    """A blend candidate that makes an infinity of a finite map."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x / (x - x).detach().abs()


def test_a_loss_that_is_no_number_names_site_and_batch() -> None:
    """The first block that makes a non-finite value of a finite one, and the batch that showed it."""
    with pytest.raises(NonFiniteError, match=r"loss of batch 1 is NaN or infinite; it begins at 4.burns"):
        ranked(block=Burns, init="blend", after="4", args=None)


def test_a_model_that_is_broken_itself_is_said_to_be() -> None:
    """NaN weights are no block's fault."""
    model = tiny()
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="in the model itself"):
        ranked(model)


def test_a_nan_in_the_second_batch_of_a_loss_of_ones_own() -> None:
    """The number is that of the batch, from 1."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) * batch[2][0]

    x, y = images(32)
    batches = [(x[:16], y[:16], torch.ones(16)), (x[16:], y[16:], torch.full((16,), float("nan")))]
    with pytest.raises(NonFiniteError, match="loss of batch 2"):
        ranked(data=batches, metric=loss)


def test_a_recipe_without_sites_is_refused() -> None:
    """An optional rule that finds nothing leaves nothing to rank; the published init is no null model."""
    recipe = {"name": "none", "rules": [{"block": "se", "after": "nothing", "optional": True}]}
    with pytest.raises(NoMatchError, match="no site on Sequential: there is nothing to rank"):
        ai.rank_sites(tiny(), recipe, images())
    with pytest.raises(PlanError, match="asks for init: paper"):
        ranked(init="paper")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "scor"}, "method: expected one of auto, score.*nearest"),
        ({"head": "new"}, "head: expected one of auto, fit, keep"),
        ({"mode": "test"}, "mode: expected one of eval, train"),
        ({"images": 2}, "images: expected a whole number >= 8"),
        ({"folds": 1}, "folds: expected a whole number >= 2"),
        ({"metric": "accuracy"}, 'metric: expected "loss"'),
    ],
)
def test_words_that_it_does_not_know(given: dict[str, Any], message: str) -> None:
    """Refused before anything runs, with those it knows."""
    with pytest.raises(ValueError, match=message):
        ranked(**given)


def test_wrapped_models_are_refused_as_by_plan() -> None:
    """DataParallel is no model open to surgery."""
    with pytest.raises(ai.AttnInjectError, match="wrapped in DataParallel"):
        ranked(nn.DataParallel(tiny()))


def test_half_precision_models_are_measured_in_float32() -> None:
    """A bfloat16 model ranks as its float32 form does, and stays bfloat16."""
    model = tiny().bfloat16()
    x, y = images()
    r = ranked(model, (x.bfloat16(), y))
    assert len(r.sites) == 3
    assert next(model.parameters()).dtype == torch.bfloat16


def test_dead_blocks_are_said_to_be_dead() -> None:
    """A block that no gradient reaches scores 0 and is named in a note."""
    model = tiny()
    with torch.no_grad():
        model[6].weight.zero_()
    r = ranked(model, after=["2", "7"])
    assert any("no gradient reaches 2.se" in note or "no gradient reaches" in note for note in r.notes)
    assert next(s for s in r.sites if s.number == 0).score == 0


def test_where_the_head_has_as_many_outputs_as_images_nothing_is_left_to_test() -> None:
    """A head that could do all by itself leaves no evidence: said, not made up of rounding errors."""
    x, _ = images(20)
    few = {"data": (x, torch.arange(20) % 10), "model": tiny(classes=10), "images": 20, "batch_size": 10}
    for head in ("fit", "keep"):
        many = (
            {**few, "model": tiny(classes=30), "data": (x, torch.arange(20) % 5)} if head == "keep" else few
        )
        r = ranked(**many, head=head)
        assert {(s.score, s.interval, s.p) for s in r.sites} == {(0.0, (0.0, 0.0), 1.0)}
        assert any("nothing is left to test" in note for note in r.notes)
        assert r.verdict == "no site can be told from chance on these 20 images"


def test_it_computes_in_float32_and_by_the_same_kernels_and_puts_the_settings_back() -> None:
    """On a card convolutions run in tf32 by default; there and here what was set is as it was, also after an error."""
    conv: Any = getattr(torch.backends.cudnn, "conv", None) or pytest.skip("torch before 2.9")
    seen: list[tuple[str, bool]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append((conv.fp32_precision, torch.backends.cudnn.deterministic))
        if len(seen) > 1:
            raise KeyError("enough")
        return F.cross_entropy(model(batch[0]), batch[1])

    before = conv.fp32_precision, torch.backends.cudnn.deterministic
    with pytest.raises(KeyError):
        ranked(data=[images()], metric=loss)
    assert set(seen) == {("ieee", True)}
    assert (conv.fp32_precision, torch.backends.cudnn.deterministic) == before


def test_the_null_is_sampled_finely_enough_for_many_sites() -> None:
    """The smallest p-value, corrected for 50 sites, is still below 5 %."""
    assert 50 / (1 + rank.SIGNS) < 0.05
