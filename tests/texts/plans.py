"""Printed plans and sites of small and real nets, and what is said where a rule cannot be carried out."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small import Around, Through, images, se
from torch import nn

import attninject as ai

from .models import small
from .registry import case, cases

# --- printed -----------------------------------------------------------------------------------

NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18 with cbam_resnet": ("torchvision/resnet18", {"recipe": "cbam_resnet"}),
    "resnet50 with se_resnet": ("torchvision/resnet50", {"recipe": "se_resnet"}),
    "resnet50 with nonlocal": ("torchvision/resnet50", {"recipe": "nonlocal_resnet_5"}),
    "densenet121": ("torchvision/densenet121", {"block": "eca", "place": "stage_end"}),
    "vit_b_16": ("torchvision/vit_b_16", {"block": "se", "place": "residual_branch"}),
    "mobilenet_v3": ("torchvision/mobilenet_v3_small", {"block": "cbam", "place": "block_end"}),
    "convnext": ("timm/convnext_tiny", {"block": "cbam", "place": "residual_branch", "pick": "last", "per": "stage"}),
    "swin": ("timm/swin_tiny_patch4_window7_224", {"block": "se", "place": "stage_end"}),
    "an operand": ("torchvision/resnet18", {"block": "se", "before": "layer4.*::add", "input": 1}),
    "every call": ("torchvision/resnet18", {"block": "eca", "after": "layer[34].*.relu", "call": "all"}),
    "in place of": ("torchvision/resnet18", {"block": "dynamic_conv", "replace": "layer4.*.conv2"}),
    "a root": ("torchvision/resnet18", {"block": "se", "place": "stage_end", "root": "layer3"}),
    "paper and arguments": (
        "torchvision/resnet18",
        {"block": "se", "place": "stage_end", "init": "paper", "args": {"reduction": 8, "bias": False}},
    ),
}  # fmt: skip
PLACES = ("resnet18", "vit_b_16", "densenet121")


def net(name: str) -> nn.Module:
    """A net of timm or torchvision without memory for its weights."""
    import timm
    import torchvision

    library, _, bare = name.partition("/")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(bare).eval()
        return torchvision.models.get_model(bare, weights=None).eval()


def _printed(name: str, rule: dict[str, Any], folder: Path) -> ai.Plan:
    return ai.plan(net(name), **rule)


def _places(name: str, folder: Path) -> str:
    """Where each place is; or that the net has none."""
    said, model = [], net(name)
    for place in ai.list_places():
        try:
            said.append(f"{place}: {[s.name for s in ai.plan(model, block='se', place=place).sites]}")
        except ai.AttnInjectError as error:
            said.append(f"{place}: {type(error).__name__}: {error}")
    return "\n".join(said)


cases("plan", [(name, functools.partial(_printed, *given)) for name, given in NETS.items()])
cases("places", [(name, functools.partial(_places, f"torchvision/{name}")) for name in PLACES])


class Tokens(nn.Module):
    """Two residual layers on the tokens of patches, with a class token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 1, 8))
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1)
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """A residual layer on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Last(nn.Module):
    """The same layers on maps with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.layers = nn.Conv2d(3, 8, 4, 4), nn.Sequential(Layer(), Layer())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.patch(x).permute(0, 2, 3, 1))


def _halves(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Python's randomness, so no graph."""
    y = self.norm(self.a(x))
    return y * 2 + y if random.random() < 0.5 else y + y * 2


def _branching(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The same without a norm."""
    y = self.b(self.a(x))
    return x + y if random.random() < 0.5 else y + x


def _branches() -> nn.Module:
    return Around(Through(_branching)).eval()


def _own(make: Callable[[], nn.Module], rule: dict[str, Any], folder: Path) -> ai.Plan:
    return ai.plan(make(), **{**se(), **rule}, example_inputs=images())


cases(
    "own plan",
    [
        ("tokens", functools.partial(_own, Tokens, {"block": "cbam", "place": "residual_branch"})),
        ("channels last", functools.partial(_own, Last, {"block": "cbam", "after": "layers.*"})),
        ("a carrier, with the reason", functools.partial(_own, _branches, {"after": "inner.b"})),
        ("several rules", lambda folder: _several()),
        ("nothing but a note", functools.partial(_own, small, {"after": "none", "optional": True})),
        ("not strict", functools.partial(_own, small, {"after": "none", "strict": False})),
    ],
)


def _several() -> ai.Plan:
    rules = [se(after="inner.a"), se(after="inner.a", block="cbam"), se(before="inner::add", block="eca")]
    rules[2].pop("args")
    return ai.plan(small(), {"name": "three", "rules": rules}, example_inputs=images())


@case("plan: to_dict")
def _(folder: Path) -> Any:
    return _several().to_dict()


@case("plan: on top of blocks")
def _(folder: Path) -> Any:
    model = ai.inject(small(), _on(se(after="inner.a")))
    return ai.plan(model, **se(after="inner.a"), example_inputs=images())


def _on(rule: dict[str, Any]) -> dict[str, Any]:
    return {"rules": [rule]}


cases(
    "sites",
    [
        ("small", lambda folder: ai.sites(small(), example_inputs=images())),
        ("tokens", lambda folder: ai.sites(Tokens(), example_inputs=images())),
        ("resnet18", lambda folder: ai.sites(net("torchvision/resnet18"), "layer[12].**")),
        ("swin", lambda folder: ai.sites(net("timm/swin_tiny_patch4_window7_224"), "layers.1.blocks.0.**")),
    ],
)

# --- refused -----------------------------------------------------------------------------------


class Untensored(nn.Module):
    """Its result is no tensor."""

    def forward(self, x: torch.Tensor) -> dict[str, int]:
        return {"size": x.shape[-1]}


def _talk(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.note(x)
    return self.act(self.b(self.act(self.a(x)))) + x


def talkative() -> nn.Module:
    """One activation twice, a child whose result is no tensor, and one that is never called."""
    children = {"act": nn.ReLU(), "note": Untensored(), "unused": nn.Conv2d(8, 8, 1)}
    return Around(Through(_talk, **children)).eval()


RULES: dict[str, dict[str, Any]] = {
    "no module": {"after": "inner.aa"},
    "no module near": {"after": "zzz"},
    "no operation": {"after": "inner::mul"},
    "an owner in vain": {"after": "iner::add"},
    "type leaves nothing": {"after": "inner.a", "type": "Linear"},
    "exclude leaves nothing": {"after": "inner.a", "exclude": "inner.*"},
    "min_channels leaves nothing": {"after": "inner.a", "min_channels": 64},
    "pick leaves nothing": {"after": "inner.a", "pick": [3]},
    "stages leave nothing": {"after": "inner.a", "stages": [3]},
    "never called": {"after": "inner.unused"},
    "no such call": {"after": "inner.a", "call": 2},
    "several calls": {"after": "inner.act"},
    "a dict without tensors": {"after": "inner.note"},
    "an output of a tensor": {"after": "inner.a", "output": 1},
    "no such operand": {"before": "inner.a", "input": 3},
    "a method's name": {"after": "inner.a", "name": "describe"},
    "another layout": {"after": "inner.a", "layout": "NLC"},
    "no such place": {"place": "before_downsample"},
    "few channels": {"block": "mhsa", "args": {"num_heads": 3}, "after": "inner.a"},
}
cases("rule", [(f"refused, {k}", functools.partial(_own, talkative, r)) for k, r in RULES.items()])


def _tuple(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, str]:
    return self.a(x), "text"


def _overwritten(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    z = self.keep(y)
    y.relu_()
    return self.b(y) + z


class Changes(nn.Module):
    """No identity at init."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Breaks(Changes):
    """Fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not this map")


def _fixed() -> nn.Module:
    model = Around(nn.Conv2d(8, 8, 1))
    model.inner.forward = model.inner.forward
    return model


def _unordered(self: Any, x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return self.keep(x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c))


def _vector() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return Around(nn.Sequential(nn.Flatten(2), Turn(), layer)).eval()


class Turn(nn.Module):
    """Channels to the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


class Hidden(nn.Module):
    """Blocks in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 1), [Layered() for _ in range(3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class Layered(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(x)


class Shares(nn.Module):
    """One activation for all nets of the class, and a forward for inference."""

    act0 = nn.SiLU()

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), self.act0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))


def _shares() -> nn.Module:
    return nn.Sequential(Shares()).eval()


def _with(body: Callable, **children: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Around(Through(body, **children)).eval()


def _parametrized() -> nn.Module:
    return nn.Sequential(*(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)) for _ in range(2)))


OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a tuple": (_with(_tuple), {"after": "inner"}),
    "an in-place hazard": (_with(_overwritten, keep=nn.Identity()), {"after": "inner.keep"}),
    "a hazard before": (_with(_overwritten, keep=nn.Identity()), {"before": "inner.keep"}),
    "an operation without a graph": (_branches, {"before": "inner::add"}),
    "a norm that carries nothing": (_with(_halves, norm=nn.BatchNorm2d(8)), {"after": "inner.norm"}),
    "a shared activation": (_shares, {"after": "0.bn"}),
    "a forward of its own": (_fixed, {"after": "inner"}),
    "a parametrized carrier": (_parametrized, {"after": "0"}),
    "inside torch's fast path": (_encoder, {"after": "inner.2.linear1"}),
    "windows": (_with(_unordered, keep=nn.Identity()), {"block": "cbam", "after": "inner.keep"}),
    "two axes": (_vector, {"after": "3"}),
    "a plain list": (Hidden, {"place": "block_end", "args": {}}),
    "changes the function": (small, {"block": Changes, "args": {}, "after": "inner.a"}),
    "of another shape": (small, {"block": "se", "args": {}, "replace": "stem"}),
    "no convolution": (small, {"block": "dynamic_conv", "args": {}, "replace": "inner"}),
    "a block that fails": (small, {"block": Breaks, "args": {}, "after": "inner.a"}),
    "arguments at the site": (small, {"block": "ge", "args": {"extent": 3}, "after": "inner.a"}),
}
cases("rule", [(f"refused, {k}", functools.partial(_own, *given)) for k, given in OTHERS.items()])


@case("plan: of another model")
def _(folder: Path) -> Any:
    return ai.inject(small(), ai.plan(small(), **se(after="inner.a"), example_inputs=images()))


@case("plan: a layer and its norm parted")
def _(folder: Path) -> Any:
    return ai.plan(_shares(), **se(after="0.conv"), example_inputs=images())


@case("plan: folded across a block")
def _(folder: Path) -> Any:
    model = ai.inject(_shares(), **se(after="0.conv"), example_inputs=images())
    return torch.nn.utils.fusion.fuse_conv_bn_eval(model[0].conv, model[0].bn)


@case("plan: a forward that would lose its block")
def _(folder: Path) -> Any:
    model = ai.inject(small(), **se(after="inner.a"), example_inputs=images())
    model.inner.forward = nn.functional.silu


@case("plan: stale")
def _(folder: Path) -> Any:
    model = small()
    plan = ai.plan(model, **se(after="inner.a"), example_inputs=images())
    model.inner.b = nn.Identity()
    return ai.inject(model, plan)


@case("plan: with fields")
def _(folder: Path) -> Any:
    model = small()
    plan = ai.plan(model, **se(after="inner.a"), example_inputs=images())
    return ai.inject(model, plan, after="stem")


@case("plan: verification fails")
def _(folder: Path) -> Any:
    return ai.inject(small(), **se(after="inner.a", init="paper"), verify=True, example_inputs=images())
