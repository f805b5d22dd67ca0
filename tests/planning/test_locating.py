"""Where new modules live, which sites are refused, and with what words."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from nets import image, net, pretrained
from small import Around, Calls, Through, calls_of, images, se, stir
from torch import nn

import attninject as ai
from attninject import errors


def chain(self, x):
    """Two layers."""
    return self.b(self.a(x))


def plan(model: nn.Module, **where: object) -> ai.planning.Plan:
    """A plan of SE on small images."""
    return ai.plan(model, **{**se(), **where}, example_inputs=images())


def inject(model: nn.Module, **where: object) -> nn.Module:
    """SE, on small images."""
    return ai.inject(model, plan(model, **where))


def unchanged_and_called_once(model: nn.Module, before: torch.Tensor, x: torch.Tensor) -> None:
    """Bit for bit the same output, one call per block, and every block takes part once it is stirred."""
    with torch.no_grad():
        assert torch.equal(model(x), before)
        assert set(calls_of(model, x).values()) == {1}
        for name in ai.injected(model):
            other = ai.injected(model)[name]
            saved = {k: v.clone() for k, v in other.state_dict().items()}
            for p in other.parameters():
                p.add_(0.3)
            assert not torch.equal(model(x), before), f"{name} does nothing"
            other.load_state_dict(saved)
        assert torch.equal(model(x), before)


class Encoder(nn.Module):
    """Patches through one of torch's own encoder layers."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, **options})

    def forward(self, x):
        return self.layer(self.patch(x).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("where", [{"after": "layer.linear2"}, {"place": "residual_branch"}])
def test_a_block_that_torchs_fast_path_would_pass_by_is_refused(where: dict) -> None:
    """A block inside nn.TransformerEncoderLayer would train and then be left out of every evaluation."""
    with pytest.raises(errors.CannotRewriteError, match="name the layer itself"):
        plan(Encoder(), **where)


def test_an_encoder_layer_without_a_fast_path_takes_blocks_inside() -> None:
    """With an activation of one's own its children are called in eval mode too; the layer itself may always be named."""
    for model, where in ((Encoder(activation=nn.SiLU()), "layer.linear2"), (Encoder(), "layer")):
        x = images()
        inject(model.eval(), after=where)
        with torch.no_grad():
            before = model(x)
            for p in next(iter(ai.injected(model).values())).parameters():
                p.add_(0.3)
            assert not torch.equal(model(x), before)


# --- a batch norm or a parametrized layer carries nothing --------------------------------------


def test_a_block_of_a_parametrized_layer_hangs_on_its_only_reader() -> None:
    """The GAN's way: after a convolution under spectral norm means before the activation that alone reads it."""
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(conv, nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(8, 4, 1)).eval()
    x = images()
    before = model(x).detach()
    inject(model, after="0")
    assert list(ai.injected(model)) == ["1.se"]
    unchanged_and_called_once(model, before, x)


def test_a_sequential_whose_last_layer_was_patched_carries_the_block_itself() -> None:
    """A forward set on an instance would pass by what its class was given, so the block stays a level above."""
    model = Around(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())).eval()
    model.inner[1].forward = nn.functional.silu
    x = images()
    before = model(x).detach()
    inject(model, after="inner")
    assert list(ai.injected(model)) == ["inner.se"]
    unchanged_and_called_once(model, before, x)
    with pytest.raises(errors.CannotRewriteError, match="patch the class"):
        plan(model, after="inner.1")


def halves(self, x):
    """Python's randomness, so no graph; its norm has no single module as its reader."""
    y = self.norm(self.a(x))
    return y * 2 + y if random.random() < 0.5 else y + y * 2


def test_a_norm_that_carries_nothing_says_why_and_what_to_name() -> None:
    """The reason that kept the owner's forward from being rewritten, and the layer in front of the norm."""
    with pytest.raises(errors.CannotRewriteError, match=r"in front of it, inner\.a,") as caught:
        plan(Around(Through(halves, norm=nn.BatchNorm2d(8))), after="inner.norm")
    assert "draws random numbers" in str(caught.value)


# --- names and homes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule", "mechanism", "home"),
    [
        ("torchvision/resnet18", {"after": "layer1.0.bn2"}, "graph", "layer1.0.se"),
        ("timm/resnet14t", {"after": "layer1.0.bn3"}, "graph", "layer1.0.se"),
        ("torchvision/resnet18", {"before": "layer1.1.conv2"}, "graph", "layer1.1.se"),
        ("torchvision/resnet18", {"after": "layer1"}, "module", "layer1.1.se"),
        ("torchvision/resnet18", {"before": "layer2"}, "module", "layer2.0.se"),
        ("torchvision/resnet18", {"after": "maxpool"}, "module", "maxpool.se"),
        ("torchvision/resnet18", {"after": "bn1"}, "module", "relu.se"),
        ("torchvision/resnet18", {"after": "layer2.0.downsample.1"}, "graph", "layer2.0.se"),
        ("torchvision/resnet18", {"after": "layer2.0.downsample"}, "graph", "layer2.0.se"),
        ("torchvision/resnet18", {"before": "layer1.0::add", "input": 1}, "graph", "layer1.0.se"),
        ("torchvision/resnet18", {"after": "layer1.0::add"}, "graph", "layer1.0.se"),
        ("timm/regnety_002", {"after": "s2"}, "module", "s2.b1.se_2"),
    ],
)
def test_a_block_lives_where_the_contract_says(name: str, rule: dict, mechanism: str, home: str) -> None:
    """Mechanism and qualified name; the function is kept, and the block runs once per forward."""
    model, x = net(name), image(name)
    found = ai.plan(model, **se(**rule))
    assert [(s.mechanism, s.name) for s in found.sites] == [(mechanism, home)]
    assert bool(found.sites[0].reason) is (mechanism == "module")
    with torch.no_grad():
        before = model(x)
    ai.inject(model, found)
    unchanged_and_called_once(model, before, x)


def test_a_norm_before_its_only_maker_and_between_operations_of_a_root() -> None:
    """`before` a norm hangs on what makes its input; behind a norm between operations the root's forward takes it."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y * y + y

    model = Root().eval()
    assert plan(model, before="norm").sites[0].name == "conv.se"
    site = plan(model, after="norm").sites[0]
    assert (site.name, site.mechanism) == ("se", "graph")


RESNET = ("torchvision/resnet18", {"after": "{bn1,layer1.*.bn*,layer2.0.downsample.1}"})
MOBILENET = ("timm/mobilenetv3_small_050", {"after": "blocks.*.*.bn1"})


@pytest.mark.parametrize(
    ("convert", "name", "rule"),
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, *RESNET),
        (timm.layers.freeze_batch_norm_2d, *RESNET),
        (timm.layers.freeze_batch_norm_2d, *MOBILENET),
        (timm.layers.convert_sync_batchnorm, *MOBILENET),
    ],
)
def test_converting_norms_keeps_every_block_running(convert: Callable, name: str, rule: dict) -> None:
    """SyncBN conversion and freezing replace norm objects; no block hangs on one."""
    model, x = net(name), image(name)
    ai.inject(model, **se(**rule))
    count = len(ai.injected(model))
    model = convert(model)
    assert len(ai.injected(model)) == count
    assert set(calls_of(model.eval(), x).values()) == {1}


def test_an_owner_that_is_a_norm_is_not_rewritten() -> None:
    """timm's BatchNormAct2d owns an activation; the block hangs on that, which conversion keeps."""
    model = net("timm/mobilenetv3_small_050")
    site = ai.plan(model, **se(after="blocks.0.0.bn1.act")).sites[0]
    assert (site.mechanism, site.name) == ("module", "blocks.0.0.bn1.act.se")


def densenet() -> nn.Module:
    """A DenseNet of two blocks of two layers."""
    return pretrained(
        torchvision.models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=4)
    )


def test_a_dense_block_hides_the_new_child_from_its_own_loop() -> None:
    """Length, iteration, items and lookups are as before; the block is in the state dict and runs once."""
    model, x = densenet(), images(size=32)
    block = model.features.denseblock1
    before = (
        len(block),
        list(block),
        list(block.items()),
        list(block.keys()),
        [id(v) for v in block.values()],
    )
    with torch.no_grad():
        output = model(x)
    ai.inject(model, **se(after="features.denseblock1"))
    assert list(ai.injected(model)) == ["features.denseblock1.se"]
    assert (len(block), list(block), list(block.items()), list(block.keys())) == before[:4]
    assert [id(v) for v in block.values()] == before[4]
    assert "se" not in block
    assert any(k.startswith("features.denseblock1.se.") for k in model.state_dict())
    unchanged_and_called_once(model, output, x)


def test_a_sequential_that_carries_keeps_its_face() -> None:
    """Indexing, slices, length and iteration of a Sequential ended by a norm do not show the block."""
    tail = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    children = list(tail)
    model = inject(Around(nn.Sequential(tail)).eval(), after="inner")
    assert list(ai.injected(model)) == ["inner.0.se"]
    assert list(tail) == children
    assert (len(tail), tail[-1], tail[0], list(tail[:1])) == (2, children[1], children[0], children[:1])
    assert type(tail[:1]) is nn.Sequential
    assert set(calls_of(model, images()).values()) == {1}


def test_a_stage_that_loops_over_its_children_does_not_call_the_block_as_a_layer() -> None:
    """timm's RegStage: the block hangs on the last child, and runs once."""
    model, x = net("timm/regnety_002"), image("regnety")
    with torch.no_grad():
        before = model(x)
    ai.inject(model, block="cbam", after="s3")
    (name,) = ai.injected(model)
    assert name.startswith("s3.b4.")
    unchanged_and_called_once(model, before, x)


def test_roots_with_several_forwards_get_modules_that_all_of_them_run() -> None:
    """forward_features and forward run the same blocks; an operation of such a root is refused."""
    model, x = net("timm/resnet14t"), image("resnet")
    ai.inject(model, **se(after="layer[1-3]"))
    assert calls_of(model, x) == calls_of(model, x, run=model.forward_features)
    with pytest.raises(errors.CannotRewriteError, match=r"cannot be named|several forward methods"):
        ai.plan(net("timm/vit_tiny_patch16_224"), **se(after="::getitem"))


def test_a_timm_network_inside_another_model_counts_as_a_root() -> None:
    """Its other forwards bypass a rewritten one, so its own children carry."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net("timm/resnet14t")

        def forward(self, x):
            return self.net.forward_features(x).mean() + self.net(x).mean()

    model = ai.inject(Outer(), example_inputs=images(size=64), block="cbam", after="net.layer1")
    assert list(ai.injected(model)) == ["net.layer1.0.cbam"]
    assert calls_of(model, images(size=64)) == {"net.layer1.0.cbam": 2}


def test_outputs_of_tuples_are_chosen_and_the_rest_is_left_alone() -> None:
    """`output:` takes one item; type and other items of the result stay."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x + 0, {"y": self.c(x)}["y"]

    def body(self, x):
        pair = self.two(self.a(x))
        return self.b(pair[0]) + pair[1]

    for output in (0, 1):
        model, x = Around(Through(body, two=Two())).eval(), images()
        before = model(x)
        with pytest.raises(
            errors.NoTensorError, match=r"inner\.two is a tuple, no tensor; choose one with output: 0 or 1"
        ):
            plan(model, after="inner.two")
        inject(model, after="inner.two", output=output)
        assert list(ai.injected(model)) == ["inner.se"]
        unchanged_and_called_once(model, before, x)


@pytest.mark.parametrize(
    ("result", "output"),
    [
        (lambda y: (y, y), 1),
        (lambda y: [y, y], 0),
        (lambda y: {"y": y}, "y"),
        (lambda y: OrderedDict(y=y), "y"),
    ],
    ids=["tuple", "list", "dict", "OrderedDict"],
)
def test_one_tensor_of_a_result_is_replaced_within_one_compiled_graph(result, output) -> None:
    """A carrier that returns several tensors keeps its type and breaks no compiled graph."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return result(self.c(x))

    model, x = nn.Sequential(Several()).eval(), torch.randn(2, 8, 6, 6)
    before = model(x)
    ai.inject(model, example_inputs=x, block="se", after="0", output=output)
    after = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert type(after) is type(before)
    assert torch.equal(after[output], before[output])
    torch._dynamo.reset()


# --- several at once ---------------------------------------------------------------------------


def test_two_blocks_at_one_site_both_run_in_order() -> None:
    """By one recipe in file order, and by stacking injections."""
    rules = {"name": "two", "rules": [{**se(after="inner.a")}, {"block": "cbam", "after": "inner.a"}]}
    model, x = Around(Through(chain)).eval(), images()
    before = model(x)
    ai.inject(model, rules, example_inputs=x)
    inject(model, after="inner.a")
    assert list(ai.injected(model)) == ["inner.se", "inner.cbam", "inner.se_2"]
    with Calls(model) as calls:
        model(x)
    assert calls.order == ["inner.se", "inner.cbam", "inner.se_2"]
    unchanged_and_called_once(model, before, x)


def test_two_carried_blocks_both_run_in_order() -> None:
    """The same on one carrier."""
    model, x = Around(nn.ReLU()).eval(), images()
    before = model(x)
    for _ in range(2):
        inject(model, after="inner")
    inject(model, before="inner")
    with Calls(model) as calls:
        model(x)
    assert calls.order == ["inner.se_3", "inner.se", "inner.se_2"]
    unchanged_and_called_once(model, before, x)


def test_two_sites_never_share_parameters() -> None:
    """Every block has its own tensors, also under two rules alike."""
    model = ai.inject(net("torchvision/resnet18"), "se_resnet")
    ai.inject(model, "se_resnet")
    tensors = [t for b in ai.injected(model).values() for t in b.parameters()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    assert len({id(b) for b in ai.injected(model).values()}) == 16


def test_a_shared_relu_is_told_apart_by_call() -> None:
    """torchvision's Bottleneck calls one relu three times: unasked an error; with call: all three blocks."""
    model, x = net("torchvision/resnet18"), image("resnet")
    with pytest.raises(
        errors.SeveralCallsError, match=r"relu is called 2 times .* call: a number from 1, last, or all"
    ):
        ai.plan(model, **se(after="layer1.0.relu"))
    with torch.no_grad():
        before = model(x)
    found = ai.plan(model, **se(after="layer1.0.relu", call="all"))
    assert [(s.call, s.name) for s in found.sites] == [(1, "layer1.0.se"), (2, "layer1.0.se_2")]
    assert [s.call for s in ai.plan(model, **se(after="layer1.0.relu", call="last")).sites] == [2]
    ai.inject(model, found)
    unchanged_and_called_once(model, before, x)


def test_an_owner_that_runs_several_times_runs_its_one_block_each_time() -> None:
    """One block per site of the owner's forward, however often the owner runs."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.unit = nn.Conv2d(3, 8, 1), Through(chain)

        def forward(self, x):
            return self.unit(self.unit(self.stem(x)))

    model, x = Twice().eval(), images()
    before = model(x)
    inject(model, after="unit.a")
    assert calls_of(model, x) == {"unit.se": 2}
    assert torch.equal(model(x), before)


def test_one_module_under_two_names_is_one_site() -> None:
    """A module reachable under two names gets one block for one call."""
    relu = nn.ReLU()
    model, x = (
        Around(Through(lambda self, x: self.b(self.other(self.a(x))), one=relu, other=relu)).eval(),
        images(),
    )
    before = model(x)
    inject(model, after="inner.{one,other}")
    assert len(ai.injected(model)) == 1
    unchanged_and_called_once(model, before, x)


def test_a_module_shared_by_two_owners_gets_a_block_per_owner() -> None:
    """Each owner's call is a site of its own, and neither block runs in the other's."""
    shared = nn.ReLU()
    body = lambda self, x: self.b(self.act(self.a(x)))  # noqa: E731
    model = Around(nn.Sequential(Through(body, act=shared), Through(body, act=shared))).eval()
    x = images()
    before = model(x)
    inject(model, after="inner.*.act")
    assert list(ai.injected(model)) == ["inner.0.se", "inner.1.se"]
    unchanged_and_called_once(model, before, x)


def test_nested_owners_both_keep_their_blocks() -> None:
    """A rewritten module inside a rewritten module."""
    inner = Through(chain)
    model, x = Around(Through(lambda self, x: self.b(self.inside(self.a(x))), inside=inner)).eval(), images()
    before = model(x)
    inject(model, after=["inner.a", "inner.inside", "inner.inside.a"])
    assert set(ai.injected(model)) == {"inner.se", "inner.se_2", "inner.inside.se"}
    unchanged_and_called_once(model, before, x)


def test_an_empty_slot_is_filled_called_once_and_put_back() -> None:
    """timm's `se` slots hold None: neither the original code nor a later trace runs the block again."""
    model, x = net("timm/resnet14t"), image("resnet")
    with torch.no_grad():
        before = model(x)
    ai.inject(model, **se(after="layer1.*.bn3"))
    assert "layer1.0.se" in ai.injected(model)
    unchanged_and_called_once(model, before, x)
    ai.inject(model, block="cbam", after="layer1.*.conv2")
    ai.inject(model, **se(after="layer1.*.bn3"))
    assert {"layer1.0.se", "layer1.0.cbam", "layer1.0.se_2"} == set(ai.injected(model))
    unchanged_and_called_once(model, before, x)
    ai.eject(model, "**.se")
    assert model.layer1[0].se is None
    assert "layer1.0.se_2" in ai.injected(model)
    unchanged_and_called_once(model, before, x)
    ai.eject(model)
    assert model.layer1[0].__dict__["se"] is None


# --- in-place ----------------------------------------------------------------------------------


def test_an_in_place_hazard_is_refused_by_name() -> None:
    """A value that is changed in place while its original is read too: no identity could serve."""

    def body(self, x):
        y = self.a(x)
        z = self.keep(y)
        y.relu_()
        return self.b(y) + z

    model = Around(Through(body, keep=nn.Identity()))
    with pytest.raises(
        errors.InPlaceHazardError, match=r"inner\.keep: an in-place operation changes a value"
    ):
        plan(model, after="inner.keep")
    with pytest.raises(errors.InPlaceHazardError):
        plan(model, before="inner.keep")


def test_harmless_in_place_operations_stay_and_train() -> None:
    """resnets add and rectify in place behind the block; the gradients are the base's."""
    base, model = net("torchvision/resnet18").train(), net("torchvision/resnet18").train()
    ai.inject(model, block="cbam", after="layer*.*.bn2")
    ai.inject(model, block="bam", after="layer1.*.bn1", args={"reduction": 4})
    x = image("resnet")
    for m in (base, model):
        torch.manual_seed(0)
        m(x).square().mean().backward()
    for name, p in base.named_parameters():
        assert torch.equal(p.grad, model.get_parameter(name).grad), name


def test_an_in_place_carrier_keeps_its_function() -> None:
    """An in-place relu of a root carries the block: before and after."""
    for where in ({"after": "relu"}, {"before": "relu"}, {"after": "bn1"}):
        model, x = net("torchvision/resnet18"), image("resnet")
        with torch.no_grad():
            before = model(x)
        ai.inject(model, **se(**where))
        unchanged_and_called_once(model, before, x)
        stir(model)
        model.train()(x).sum().backward()


# --- words -------------------------------------------------------------------------------------


class Untensored(nn.Module):
    def forward(self, x):
        return {"shape": tuple(x.shape)}


def talk(self, x):
    """Also calls a child whose result is no tensor."""
    self.note(x)
    return self.b(self.a(x))


TALKATIVE = lambda: Around(Through(talk, note=Untensored(), unused=nn.ReLU(), empty=nn.Identity()))  # noqa: E731


def twice(self, x):
    """Calls one activation twice, and a child whose result is no tensor."""
    self.note(x)
    return self.act(self.b(self.act(self.a(x))))


@pytest.mark.parametrize("rule", [{"type": "Conv2d"}, {"exclude": ["inner.act", "inner.note"]}])
def test_a_module_that_the_filters_leave_out_is_no_fault(rule: dict) -> None:
    """`after: "**"` with `type: Conv2d` puts a block after every convolution, whatever else is called how often."""
    model = Around(Through(twice, act=nn.ReLU(), note=Untensored()))
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions <= {s.path for s in plan(model, after="**", **rule, strict=False).sites}


def test_a_fault_at_the_only_modules_of_a_pattern_is_told_though_filters_leave_them_out() -> None:
    """Nothing to put a block at is an error still, with a reason."""
    model = Around(Through(twice, act=nn.ReLU(), note=Untensored()))
    with pytest.raises(errors.SeveralCallsError, match="is called 2 times"):
        plan(model, after="inner.act", type="Conv2d")


@pytest.mark.parametrize(
    ("rule", "error", "words"),
    [
        (
            {"after": "inner.aa"},
            errors.NoMatchError,
            r"rule 1 \(se\): no module matches 'inner.aa'; the nearest names are inner.a",
        ),
        ({"after": "inner::mul"}, errors.NoMatchError, r"no operation matches 'inner::mul'"),
        (
            {"after": "inner.a", "type": "Linear"},
            errors.AllExcludedError,
            r"1 sites match \(inner.a; Conv2d\), but type leave",
        ),
        ({"after": "inner.a", "exclude": "inner.*"}, errors.AllExcludedError, "exclude"),
        ({"after": "inner.a", "min_channels": 64}, errors.AllExcludedError, "min_channels"),
        ({"after": "inner.unused"}, errors.NotCalledError, "inner.unused is never called"),
        ({"after": "inner.a", "call": 2}, errors.NotCalledError, "called 1 times, so there is no call 2"),
        ({"after": "inner.note"}, errors.NoTensorError, "the output of inner.note is a dict"),
        ({"after": "inner.a", "output": 1}, errors.NoTensorError, "is one tensor"),
        ({"before": "inner.a", "input": 3}, errors.NoTensorError, r"operand 3 of inner.a is no tensor"),
        ({"after": "inner.a", "name": "b"}, errors.UnusableNameError, None),
        (
            {"after": "inner.a", "name": "describe"},
            errors.UnusableNameError,
            "Through has an attribute 'describe'",
        ),
        ({"after": "inner.a", "layout": "NLC"}, errors.LayoutError, "layout NLC has 3 axes"),
        ({"after": "stem", "place": None}, None, None),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(map(str, v.values())),
)
def test_each_fault_has_its_class_and_says_what_to_do(
    rule: dict, error: type | None, words: str | None
) -> None:
    """The message names the rule, what was found, and what would work."""
    fields = {k: v for k, v in rule.items() if v is not None}
    if error is None:
        assert len(plan(TALKATIVE(), **fields).sites) == 1
        return
    if error is errors.UnusableNameError and fields["name"] == "b":
        assert plan(TALKATIVE(), **fields).sites[0].name == "inner.b_2"  # a taken child's name gets a number
        return
    with pytest.raises(error, match=words) as caught:
        plan(TALKATIVE(), **fields)
    assert "rule 1 (se)" in str(caught.value)


class Grouped(nn.Module):
    """A block for channels that divide by three."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 3:
            raise errors.TooFewChannelsError(f"channels must divide by 3, found {channels}")

    def forward(self, x):
        return x


def test_too_few_channels_are_refused() -> None:
    """A block that cannot be built for a site's channels says at which site."""
    with pytest.raises(errors.TooFewChannelsError, match=r"rule 1 \(Grouped\): at inner\.a: .*found 8"):
        ai.plan(Around(Through(chain)), block=Grouped, after="inner.a", example_inputs=images())


def test_stale_and_foreign_plans_are_refused() -> None:
    """A plan serves the model it was made for, as it was then."""
    model, other = Around(Through(chain)), Around(Through(chain))
    given = plan(model, after="inner.a")
    with pytest.raises(
        errors.ForeignPlanError, match="another Around object; make one for this model with plan"
    ):
        ai.inject(other, given)
    model.inner.b = nn.Identity()
    with pytest.raises(errors.StalePlanError, match="changed since this plan was made"):
        ai.inject(model, given)
    again = plan(model, after="inner.a")
    ai.inject(model, again)
    with pytest.raises(errors.StalePlanError):
        ai.inject(model, again)


def test_a_plan_outlived_by_an_attribute_is_stale() -> None:
    """A graph that read an attribute is not used after that attribute changed."""
    model = Around(Through(lambda self, x: self.b(self.a(x)) * self.rate)).eval()
    model.inner.rate = 1
    given = plan(model, after="inner.a")
    model.inner.rate = 2
    with pytest.raises(errors.StalePlanError):
        ai.inject(model, given)


class Own(nn.Conv2d):
    pass


def test_an_instance_with_its_own_forward_is_refused() -> None:
    """An attribute `forward` would win over any rewritten class."""
    model = Around(Own(8, 8, 1))
    model.inner.forward = model.inner.forward
    with pytest.raises(errors.CannotRewriteError, match="forward of its own"):
        plan(model, after="inner")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: nn.DataParallel(m), "wrapped in DataParallel; inject into model.module first"),
        (lambda m: torch.compile(m, backend="eager"), "compiled; inject first"),
        (lambda m: torch.fx.symbolic_trace(m), "GraphModule; inject into the original"),
        (lambda m: nn.Sequential(nn.LazyConv2d(8, 1), m), "not initialised"),
        (lambda m: 3, "expected a torch.nn.Module, found int"),
    ],
    ids=["parallel", "compiled", "graphmodule", "lazy", "number"],
)
def test_models_that_are_not_open_are_refused(make, words: str) -> None:
    """With what to pass instead."""
    model = make(torchvision.models.resnet18(weights=None))
    for verb in (ai.plan, ai.inject):
        with pytest.raises(errors.UnsupportedModelError, match=words):
            verb(model, "se_resnet")


@pytest.mark.filterwarnings("ignore")
def test_scripted_and_quantized_models_are_refused() -> None:
    """Also where only a part is."""
    scripted = torch.jit.trace(nn.Conv2d(8, 8, 1), torch.rand(1, 8, 4, 4))
    with pytest.raises(errors.UnsupportedModelError, match=r"inner.*is scripted; inject into the original"):
        plan(Around(scripted), after="stem")
    with pytest.raises(errors.UnsupportedModelError, match="quantized; inject into the float model"):
        plan(Around(torch.ao.nn.quantized.Conv2d(8, 8, 1)), after="stem")


def test_a_holder_extended_by_others_is_refused_and_still_listed() -> None:
    """A parametrization of a carrier makes a class of its own; swapping that class would undo it."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = nn.Conv2d(8, 8, 1), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.a(x) * self.scale

    model = inject(Around(Scaled()), after="inner.a")
    torch.nn.utils.parametrize.register_parametrization(model.inner, "scale", nn.Identity())
    assert list(ai.injected(model)) == ["inner.se"]
    assert calls_of(model, images()) == {"inner.se": 1}
    with pytest.raises(errors.UnsupportedModelError, match="parametrized"):
        ai.eject(model)


# --- order, and blocks that keep what they give --------------------------------------------------


@pytest.mark.parametrize("first", ["units", "units.0"])
def test_blocks_around_one_carrier_run_as_the_data_flow(first: str) -> None:
    """`before` a Sequential comes before `before` its first child, whichever rule stands first."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

        def forward(self, x):
            return self.units(x)

    names = {"units": "outer", "units.0": "inner"}
    order = [first, *(n for n in names if n != first)]
    rules = [{"block": "se", "before": n, "name": names[n], "args": {"reduction": 1}} for n in order]
    model = ai.inject(Net(), {"name": "both", "rules": rules}, example_inputs=images())
    with Calls(model) as calls:
        model(images())
    assert calls.order == ["units.0.outer", "units.0.inner"]


class Saves(nn.Module):
    """A block that keeps its result for the backward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return torch.sigmoid(self.conv(x))


@pytest.mark.parametrize("where", [{"after": "inner.a"}, {"before": "inner.r"}])
def test_an_in_place_layer_behind_a_block_that_keeps_its_result_is_no_trouble(where: dict) -> None:
    """The layer gets a copy, so that the backward finds what the block kept."""
    model = Around(Through(lambda self, x: self.b(self.r(self.a(x))), r=nn.ReLU(inplace=True)))
    ai.inject(model, block=Saves, init="paper", example_inputs=images(), **where)
    model(images()).sum().backward()
    (block,) = ai.injected(model).values()
    assert block.conv.weight.grad.abs().sum() > 0
