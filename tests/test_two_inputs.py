"""What `with:` promises: a block is given a second value of the same forward, and nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from fingerprints import Fingerprint
from pair_nets import Asked, CheckpointedUNet, FlatUNet, PartedUNet, Siamese, Towers, UNet
from small import SILENT_CHECKPOINTS, calls_of, images, se, stir
from torch import Tensor, nn

import attninject as ai
from attninject.errors import IdentityError, LayoutError, RecipeError

X, LEFT = images(size=32), images(size=32, seed=1)
TEXT = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
SKIPS = {"block": "attention_gate", "before": "up.*::cat", "with": {"before": "up.*.up"}}


class Both(nn.Module):
    """A module that gives two maps, and one that reads the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(3, 4, 2, 2)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 3, H, W) → (B, 8, H, W), (B, 4, H/2, W/2)."""
        return self.parts["a"](x), self.parts["b"](x)


class OfTwo(nn.Module):
    """The second value is an item of the same call's result, and is written to in place later."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = Both(), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 2, H, W)."""
        a, b = self.both(x)
        return self.head(torch.cat([a, b.relu_().repeat_interleave(2, 2).repeat_interleave(2, 3)], 1))


class Case(NamedTuple):
    """A net, what it is given, the rules, and the names of the blocks."""

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    rules: list[dict[str, Any]]
    names: list[str]


def cross(**where: Any) -> list[dict[str, Any]]:
    """One rule of cross attention with four heads."""
    return [{"block": "cross_attention", "args": {"num_heads": 4}, **where}]


CASES = {
    "each skip with the signal below": Case(UNet, (X,), [SKIPS], ["up.0.attention_gate", "up.1.attention_gate"]),
    "an operand with another": Case(
        UNet, (X,), [{"block": "attention_gate", "before": "up.*", "input": 1, "with": {"before": "up.*"}}],
        ["attention_gate", "attention_gate_2"],
    ),
    "under checkpoints": Case(
        CheckpointedUNet, (X,), [SKIPS], ["up.0.attention_gate", "up.1.attention_gate"]
    ),
    "among checkpoints": Case(
        CheckpointedUNet, (X,), [{"block": "attention_gate", "before": "up.*", "input": 1, "with": {"before": "up.*"}}],
        ["attention_gate", "attention_gate_2"],
    ),
    "in lists of one forward": Case(
        FlatUNet, (X,),
        [{"block": "attention_gate", "before": f"::{op}", "with": {"before": f"up.{n}"}, "name": f"gate_{n}"}
         for op, n in (("cat", 1), ("cat_1", 0))],
        ["gate_1", "gate_0"],
    ),
    "the other image": Case(
        Siamese, (X, LEFT), cross(after="encoder", call=2, **{"with": {"after": "encoder", "call": 1}}),
        ["cross_attention"],
    ),
    "a map with a text": Case(Towers, (X, TEXT), cross(after="image", **{"with": "text"}), ["cross_attention"]),
    "raised to where both are": Case(
        Towers, (X, TEXT), cross(after="image.1.act", **{"with": "text.mix"}), ["cross_attention"]
    ),
    "tokens with a text": Case(
        lambda: Towers(tokens=True), (X, TEXT), cross(after="image", **{"with": "text"}), ["cross_attention"]
    ),
    "a text with tokens": Case(
        lambda: Towers(tokens=True), (X, TEXT), cross(before="proj", **{"with": "image"}), ["cross_attention"]
    ),
    "a map with a vector": Case(Asked, (X, TEXT), cross(after="image", **{"with": "state"}), ["cross_attention"]),
    "a map with a state that asks": Case(
        Asked, (X, TEXT), [{"block": "sca", "after": "image", "with": "state"}], ["sca"]
    ),
    "an argument with another, without a graph": Case(
        PartedUNet, (X,), [{"block": "attention_gate", "before": "up.*", "input": 1, "with": {"before": "up.*"}}],
        ["up.0.attention_gate", "up.1.attention_gate"],
    ),
    "a result with an argument, without a graph": Case(
        PartedUNet, (X,), [{"block": "attention_gate", "after": "up.*", "with": {"before": "up.*", "input": 1}}],
        ["up.0.attention_gate", "up.1.attention_gate"],
    ),
    "an item with another": Case(
        OfTwo, (X,),
        [{"block": "attention_gate", "after": "both", "output": 0, "with": {"after": "both", "output": 1}}],
        ["attention_gate"],
    ),
}  # fmt: skip
EVERY = [pytest.param(n, marks=SILENT_CHECKPOINTS) if n == "among checkpoints" else n for n in CASES]


def made(case: Case) -> nn.Module:
    """The case's net, in train mode, with seeded weights."""
    torch.manual_seed(0)
    return case.make()


def injected(case: Case, model: nn.Module) -> nn.Module:
    """The net with its blocks."""
    return ai.inject(model, {"rules": case.rules}, example_inputs=case.inputs)


def losses(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradients of the base's parameters in train mode."""
    blocks = tuple(f"{name}." for name in ai.injected(model))
    model.train()(*inputs).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if not n.startswith(blocks) and p.grad is not None}


@pytest.mark.parametrize("name", EVERY)
def test_nothing_changes_until_training(name: str) -> None:
    """Outputs, gradients and statistics bit for bit, each block once; the keys stay; eject leaves no trace."""
    case = CASES[name]
    base, model = made(case), made(case)
    before, state = Fingerprint(model), torch.get_rng_state()
    ai.eject(injected(case, model))
    assert Fingerprint(model) == before
    assert injected(case, model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert list(ai.injected(model)) == case.names
    assert calls_of(model, *case.inputs) == dict.fromkeys(case.names, 1)
    base(*case.inputs)  # statistics as after the counted run
    for training in (True, False):
        assert torch.equal(model.train(training)(*case.inputs), base.train(training)(*case.inputs))
    found, expected = losses(model, case.inputs), losses(base, case.inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert type(model).__name__ == type(base).__name__
    assert set(base.state_dict()) == {k for k in model.state_dict() if not k.startswith(tuple(case.names))}


@pytest.mark.parametrize("name", EVERY)
def test_a_trained_block_goes_wherever_the_model_goes(name: str, tmp_path) -> None:
    """Copies, pickles, whole files, deltas, `disabled`, attention maps, and a model that is injected again."""
    case = CASES[name]
    base = made(case).eval()
    plain = base(*case.inputs)
    model = injected(case, copy.deepcopy(base))
    stir(model)
    expected = model(*case.inputs)
    assert not torch.equal(expected, plain)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    ai.save(model, tmp_path / "delta.safetensors")
    loaded = ai.load(copy.deepcopy(base), tmp_path / "delta.safetensors", example_inputs=case.inputs)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        loaded,
    ]
    for other in copies:
        assert torch.equal(other(*case.inputs), expected)
        assert list(ai.injected(other)) == case.names
    with ai.disabled(model):
        assert torch.equal(model(*case.inputs), plain)
    assert all(maps for maps in ai.attention_maps(model, case.inputs).values())
    ai.inject(model, **se(after="**", type="Conv2d", pick="first"), example_inputs=case.inputs)
    assert torch.equal(model(*case.inputs), expected)
    for other in (copies[0], copies[1]):
        ai.eject(other)
        assert torch.equal(other(*case.inputs), plain)


TRANSLATED = [
    "each skip with the signal below",
    "in lists of one forward",
    "a map with a text",
    "an item with another",
    "a map with a vector",
    "an argument with another, without a graph",
]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning",
    "ignore:`torch.jit:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)
@pytest.mark.parametrize("name", TRANSLATED)
def test_compilers_take_both_values(name: str) -> None:
    """torch.compile makes one graph of it; export, jit.trace and TorchScript compute the same."""
    case = CASES[name]
    model = injected(case, made(case)).eval()
    stir(model)
    expected = model(*case.inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    exported = torch.export.export(model, case.inputs).module()
    for other in (compiled, exported, torch.jit.trace(model, case.inputs), torch.jit.script(model)):
        torch.testing.assert_close(other(*case.inputs), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_tokens_in_both_places_are_scripted() -> None:
    """The adapters of both layouts are in the compiled text."""
    case = CASES["tokens with a text"]
    model = injected(case, made(case)).eval()
    stir(model)
    torch.testing.assert_close(torch.jit.script(model)(*case.inputs), model(*case.inputs))


def test_the_gate_is_where_and_what_a_hand_written_attention_unet_has() -> None:
    """The same blocks called in a forward written by hand give the same numbers."""
    case = CASES["in lists of one forward"]
    model = injected(case, made(case)).eval()
    stir(model)
    a = model.down[0](X)
    b = model.down[1](model.pool(a))
    c = model.down[2](model.pool(b))
    y = model.join[1](torch.cat([model.gate_1(b, c), model.up[1](c)], 1))
    y = model.join[0](torch.cat([model.gate_0(a, y), model.up[0](y)], 1))
    assert torch.equal(model(X), y)


def test_checkpoints_see_the_same_gradients() -> None:
    """A block inside what is checkpointed runs again in the backward pass, on the values of that run."""
    grads = []
    for unet in (UNet, CheckpointedUNet):
        torch.manual_seed(0)
        model = unet()
        ai.inject(model, {"rules": [SKIPS]}, example_inputs=X)
        stir(model)
        model(X).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_a_second_value_that_is_written_to_later_is_kept() -> None:
    """The block gets the value as it was where `with` names it, and its backward finds it unchanged."""
    case = CASES["an item with another"]
    model = injected(case, made(case))
    stir(model)
    seen: list[Tensor] = []
    model.attention_gate.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(X).sum().backward()
    assert torch.equal(seen[0], model.both.parts["b"](X))
    assert seen[0].min() < 0


class Rewriting(nn.Module):
    """Values that are written to in place before and after they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.act = nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True)
        self.read, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        made = self.make(x)
        self.act(made)
        read = self.read(made)
        made.mul_(2)
        return self.last(read) + made


@pytest.mark.parametrize("with_", ["make", {"before": "act"}, {"before": "read"}, {"before": "last"}])
def test_a_value_that_is_written_to_is_what_it_is_at_the_place_that_is_named(with_: Any) -> None:
    """Before the first write, between two, or another value."""
    torch.manual_seed(0)
    model = ai.inject(Rewriting(), block="attention_gate", after="last", with_=with_, example_inputs=X)
    seen = given_to(model, X)
    made = model.make(X)
    read = made.relu()
    expected = {"make": made, "act": made, "read": read, "last": model.read(read)}
    assert torch.equal(seen, expected[with_ if isinstance(with_, str) else with_["before"]])


class Keeping(nn.Module):
    """A module that writes into what it is given, in a net whose forward is not rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.inner = nn.Conv2d(3, 8, 1), Writing()

    def forward_features(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        made = self.make(x)
        return self.inner(made, made + 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        return self.forward_features(x)


class Writing(nn.Module):
    """Writes into its first argument; the second may be missing."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x, skip: (B, C, H, W) → the same shape."""
        return x.relu_() if skip is None else x.relu_() + skip


def given_to(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The second value that the model's one block is given in a run."""
    seen: list[Tensor] = []
    (block,) = ai.injected(model).values()
    with block.register_forward_pre_hook(lambda _, args: seen.append(args[1])):
        model(*inputs)
    return seen[0]


def test_an_argument_is_kept_as_it_was_given() -> None:
    """A module writes into its argument; the block behind it is given what it was before. A missing one is refused."""
    torch.manual_seed(0)
    model = ai.inject(
        Keeping(), block="attention_gate", after="inner", with_={"before": "inner"}, example_inputs=X
    )
    assert list(ai.injected(model)) == ["inner.attention_gate"]
    assert torch.equal(given_to(model, X), model.make(X))
    model = ai.eject(model)
    ai.inject(
        model, block="attention_gate", after="inner", with_={"before": "inner", "input": 1}, example_inputs=X
    )
    assert torch.equal(given_to(model, X), model.make(X) + 1)
    with pytest.raises(LayoutError, match="was given one value alone; there were both when it was planned"):
        model.inner(model.make(X))


class SelfAttending(nn.Module):
    """A part of two arguments, which the model gives the same value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Querying()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        return self.inner(x, x)


class Querying(nn.Module):
    """What asks, and what is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x, memory: (B, 3, H, W) → (B, 8, H, W)."""
        return self.query(x) + self.key(memory)


def test_an_argument_is_known_by_its_place_not_by_its_value() -> None:
    """Given the same value twice when the plan was made, and two values later."""
    model = ai.inject(
        SelfAttending(), block="attention_gate", after="inner.query", with_={"before": "inner", "input": 1},
        example_inputs=X,
    )  # fmt: skip
    assert torch.equal(given_to(model.inner, X, LEFT), LEFT)


def test_samples_are_never_broadcast() -> None:
    """One sample of either value beside several of the other is refused, not repeated in silence."""
    case = CASES["the other image"]
    model = injected(case, made(case)).eval()
    for inputs in ((X, LEFT[:1]), (X[:1], LEFT)):
        with pytest.raises(LayoutError, match=r"given \d samples, and \d of its second value"):
            model(*inputs)


def test_tokens_of_an_oblong_image_are_an_oblong_map_in_both_places() -> None:
    """The second value's rows and columns are those of the run, as the site's are."""
    where: dict[str, Any] = {"after": "image.mlp", "with_": {"before": "image.mlp"}}
    model = ai.inject(Towers(tokens=True), block="attention_gate", **where, example_inputs=(X, TEXT))
    for other in (model, copy.deepcopy(model)):
        assert given_to(other, torch.randn(2, 3, 16, 64), TEXT).shape == (2, 16, 4, 16)


def test_nothing_is_kept_between_runs() -> None:
    """Runs in threads, one that an error ended between both values, and one within another see their own values."""
    case = CASES["in lists of one forward"]
    model = injected(case, made(case)).eval()
    stir(model)
    pairs = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    expected = [model(x) for x in pairs]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(model, pairs))
    assert all(map(torch.equal, found, expected))
    inner: list[Tensor] = []

    def fail(*_: Any) -> None:
        raise RuntimeError

    def run_again(*_: Any) -> None:
        again.remove()
        inner.append(model(pairs[1]))

    failing = model.up[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        model(pairs[0])
    failing.remove()
    again = model.up[1].register_forward_pre_hook(run_again)
    assert torch.equal(model(pairs[2]), expected[2])
    assert torch.equal(inner[0], expected[1])


def test_blocks_in_the_way_of_a_second_value_come_first() -> None:
    """Another rule's block after the value's module: both orders of the rules give the block its result."""
    for order in (1, -1):
        rules = [
            {"block": "cross_attention", "after": "image", "with": "text"},
            {"block": "se", "after": "text", "args": {"reduction": 4}},
        ][::order]
        torch.manual_seed(0)
        model = ai.inject(Towers(), {"rules": rules}, example_inputs=(X, TEXT)).eval()
        stir(model)
        seen: list[Tensor] = []
        model.cross_attention.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1]))
        model(X, TEXT)
        expected = model.get_submodule(next(n for n in ai.injected(model) if n.endswith("se")))
        words = model.text.mix(model.text.embed(TEXT) + model.text.embed(TEXT).roll(1, 1)).transpose(1, 2)
        assert torch.equal(seen[0], expected(words))


def test_a_recipe_with_a_second_value_reads_as_it_was_written() -> None:
    """YAML, dict and Python say the same; the plan's table and its JSON name the second value."""
    text = "name: gates\nrules:\n- block: attention_gate\n  before: up.*::cat\n  with:\n    before: up.*.up\n"
    recipe = ai.parse_recipe(text)
    assert recipe.to_yaml() == text
    assert ai.load_recipe(recipe.to_dict()) == recipe
    model = UNet()
    plan = ai.plan(model, recipe, example_inputs=X)
    again = ai.plan(
        model, block="attention_gate", before="up.*::cat", with_={"before": "up.*.up"}, example_inputs=X
    )
    assert again.sites == plan.sites
    assert "before up.1::cat with before up.1.up" in str(plan)
    assert "rule 1: attention_gate, before up.*::cat, with before up.*.up, init identity: 2 sites" in str(
        plan
    )
    assert plan.to_dict()["sites"][0]["second"] == {
        "path": "up.1.up", "position": "before", "call": 1, "shape": [2, 32, 8, 8], "layout": "NCHW",
        "channels": 32, "input": 0, "output": None,
    }  # fmt: skip
    assert "second" not in ai.plan(model, **se(after="down.0")).to_dict()["sites"][0]


class Added(nn.Module):
    """A class of a user's own that takes two values, and changes the function."""

    spatial = False  # so that the second value may be tokens

    def __init__(self, channels: int, other_channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(other_channels, channels)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.mix(other.flatten(2).mean(2))[:, :, None, None]


def test_a_class_of_ones_own_is_given_both_values() -> None:
    """It is known by `other_channels`, built for both widths, tried on both shapes, and blended where asked for."""
    where = {"after": "image", "with_": "text", "example_inputs": (X, TEXT)}
    torch.manual_seed(0)
    model = Towers().eval()
    plain = model(X, TEXT)
    with pytest.raises(IdentityError, match="Added changes the function at init"):
        ai.inject(model, block=Added, **where)
    ai.inject(model, block=Added, init="blend", **where)
    assert torch.equal(model(X, TEXT), plain)
    assert model.added.block.mix.in_features == 24
    with pytest.raises(RecipeError, match="added takes a second value: say with `with` what gives it"):
        ai.plan(Towers(), block=Added, after="image.0", init="blend", example_inputs=(X, TEXT))
    with pytest.raises(RecipeError, match="identity takes one value, so `with` has nothing to give"):
        ai.plan(Towers(), block=nn.Identity, after="image", with_="text", example_inputs=(X, TEXT))


def test_without_with_a_block_of_two_inputs_is_given_its_own_twice() -> None:
    """Then cross attention is attention of a map to itself, at any site that takes a block."""
    model = UNet().eval()
    plan = ai.plan(model, block="cross_attention", after="down.2", example_inputs=X)
    assert plan.notes == (
        "rule 1 (cross_attention): it takes a second value, and is given that of its site twice, since `with` names no "
        "other",
    )
    ai.inject(model, plan)
    stir(model)
    block = ai.injected(model)["down.2.cross_attention"]
    seen: list[Any] = []
    block.register_forward_hook(lambda block, args, out: seen.append(torch.equal(out, block(args[0], args[0])))
                                if len(args) == 1 else None)  # fmt: skip
    model(X)
    assert seen == [True]
