"""What the torch ecosystem does with a model still works: compile, export, ONNX, trace, DDP, …

One net by graph, one by module, one of tokens; of full size in the slow tier.
"""

from __future__ import annotations

import copy
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torchvision
from nets import pretrained
from small import Calls, calls_of, images, skip_onnx_of_norms, stir
from torch import nn
from torch.utils.checkpoint import checkpoint

import attninject as ai


def resnet() -> nn.Module:
    """A resnet of one bottleneck per stage."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)


def densenet() -> nn.Module:
    """A DenseNet of two blocks of two layers."""
    return torchvision.models.DenseNet(
        growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=10
    )


def vit() -> nn.Module:
    """A transformer of three blocks with drop-path."""
    return timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=3, num_classes=10, drop_path_rate=0.1
    )


SMALL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet": (resnet, "residual_branch"),
    "densenet": (densenet, "stage_end"),
    "vit": (vit, "residual_branch"),
    "forms": (resnet, ""),
}
FORMS = ("dynamic_conv", "deformable_conv", "selective_kernel", "splat")
"""What stands in the place of the 3×3 convolution of each stage in the net `forms`."""
LARGE = {
    "resnet50": (lambda: torchvision.models.resnet50(weights=None), "residual_branch"),
    "densenet121": (lambda: torchvision.models.densenet121(weights=None), "stage_end"),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), "residual_branch"),
}
NETS = [*list(SMALL)[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in ("forms", *LARGE))]


def injected(name: str) -> nn.Module:
    """The net with CBAM by its mechanism, or with other forms, blocks no longer at the identity; in eval mode."""
    make, place = {**SMALL, **LARGE}[name]
    torch.manual_seed(0)
    model = pretrained(make())
    if name == "forms":
        rules = [{"block": form, "replace": f"layer{i}.0.conv2"} for i, form in enumerate(FORMS, 1)]
        ai.inject(model, {"name": "forms", "rules": rules})
    else:
        ai.inject(model, block="cbam", place=place, args={"reduction": 4})
    stir(
        model, scale=0.03 if name in SMALL else 0.001
    )  # a deep random net amplifies: more, and rounding would show
    return model


def x_of() -> torch.Tensor:
    """Images of 64 × 64."""
    return images(size=64)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Exporters warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def test_the_three_mechanisms_are_what_they_say() -> None:
    """Graph, module, tokens: the nets below stand for these."""
    for name, mechanism, layout in (
        ("resnet", "graph", "NCHW"),
        ("densenet", "module", "NCHW"),
        ("vit", "graph", "NLC"),
    ):
        make, place = SMALL[name]
        sites = ai.plan(make(), block="cbam", place=place, args={"reduction": 4}).sites
        assert {s.mechanism for s in sites} == {mechanism}
        assert {s.layout.kind for s in sites} == {layout}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(name: str, training: bool) -> None:
    """fullgraph=True in eval and train, same numbers."""
    model = injected(name).train(training)
    if training and name.startswith("vit"):
        model.eval()  # drop-path draws differently when compiled
        model.train()
        for m in model.modules():
            if hasattr(m, "drop_prob"):
                m.drop_prob = 0.0
    x = x_of()
    reference = copy.deepcopy(model)(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), reference)
    assert len(ai.injected(compiled)) == len(ai.injected(model))


@pytest.mark.parametrize("name", NETS)
def test_exports(name: str) -> None:
    """torch.export gives a program with the same numbers and the blocks' weights."""
    model, x = injected(name), x_of()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert set(program.state_dict) >= {k for k, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NETS)
def test_runs_in_onnxruntime(name: str) -> None:
    """The ONNX file computes what the model computes."""
    import onnxruntime

    model, x = injected(name), x_of()
    skip_onnx_of_norms(model)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    assert (torch.from_numpy(y) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", NETS)
def test_traces_to_torchscript(name: str) -> None:
    """torch.jit.trace, with the same numbers on other data."""
    model, x = injected(name), x_of()
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        other = images(size=64, seed=3)
        torch.testing.assert_close(traced(other), model(other))


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize("name", NETS)
def test_trains_under_ddp(name: str, group: None) -> None:
    """Every block gets a gradient and runs once per step; `injected` looks through the wrapper."""
    model = injected(name).train()
    names = list(ai.injected(model))
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert list(ai.injected(wrapped)) == names
    with Calls(model) as calls:
        wrapped(x_of()).square().mean().backward()
    assert set(calls.counts.values()) == {1}
    assert all(p.grad is not None for b in ai.injected(model).values() for p in b.parameters())
    with pytest.raises(ai.errors.UnsupportedModelError, match=r"inject into model\.module first"):
        ai.eject(wrapped)


# --- checkpointing -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", pytest.param("vit_tiny", marks=pytest.mark.slow)])
@pytest.mark.parametrize("early", [True, False])
def test_timms_checkpointing_really_recomputes(name: str, early: bool) -> None:
    """Switched on before or after injection, each block runs twice per training step, and once without."""
    make, place = {**SMALL, **LARGE}[name]
    model = pretrained(make()).train()
    if early:
        model.set_grad_checkpointing(True)
    ai.inject(model, block="cbam", place=place, args={"reduction": 4})
    model.set_grad_checkpointing(True)
    with Calls(model) as calls:
        model(x_of()).square().mean().backward()
    assert set(calls.counts.values()) == {2}
    model.set_grad_checkpointing(False)
    with Calls(model) as calls:
        model(x_of()).square().mean().backward()
    assert set(calls.counts.values()) == {1}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_layer_recomputes_and_gives_the_same_gradients(reentrant: bool) -> None:
    """torch.utils.checkpoint around a layer of a resnet."""

    class Checkpointed(nn.Module):
        def __init__(self, net: nn.Module, on: bool) -> None:
            super().__init__()
            self.net, self.on = net, on

        def forward(self, x):
            n = self.net
            x = n.layer1(n.maxpool(n.relu(n.bn1(n.conv1(x)))))
            x = checkpoint(n.layer2, x, use_reentrant=reentrant) if self.on else n.layer2(x)
            return n.fc(n.avgpool(n.layer4(n.layer3(x))).flatten(1))

    gradients = []
    for on in (False, True):
        model = injected("resnet").eval()  # no batch statistics, which a second run would update
        with Calls(model) as calls:
            Checkpointed(model, on)(x_of()).square().mean().backward()
        again = {k for k, n in calls.counts.items() if n == 2}
        assert again == ({k for k in calls.counts if k.startswith("layer2")} if on else set())
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# --- other tools -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "densenet"])
def test_torchvisions_feature_extractor_sees_the_blocks(name: str) -> None:
    """create_feature_extractor on an injected model: outputs of layers, blocks run."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = injected(name), x_of()
    node = {"resnet": "layer4", "densenet": "features.norm5"}[name]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(node).register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
    with torch.no_grad():
        model(x)
        handle.remove()
        features = create_feature_extractor(model, {node: "out"})(x)["out"]
    torch.testing.assert_close(features, seen[0])


@pytest.mark.parametrize("name", NETS)
def test_autocast_trains(name: str) -> None:
    """Under autocast the forward is bfloat16 where the base's is, and the backward works."""
    model = injected(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x_of())
    assert y.dtype is torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet", "densenet"])
def test_channels_last_is_kept(name: str) -> None:
    """A channels_last model stays so through every block, at the identity bit for bit."""
    make, place = SMALL[name]
    model = pretrained(make()).to(memory_format=torch.channels_last)
    x = x_of().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = model(x)
        ai.inject(model, block="cbam", place=place, args={"reduction": 4})
        seen: list[bool] = []
        for block in ai.injected(model).values():
            block.register_forward_hook(
                lambda _m, _i, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
            )
        assert torch.equal(model(x), before)
    assert len(seen) == len(ai.injected(model))
    assert all(seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_trains_under_fsdp2(name: str, group: None) -> None:
    """fully_shard of every block of layers and the root: a step changes the blocks; they are still listed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = injected(name).train()
    names = list(ai.injected(model))
    mesh = init_device_mesh("cpu", (1,))
    for path in {n.rpartition(".")[0] for n in names}:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert list(ai.injected(model)) == names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Calls(model) as calls:
        model(x_of()).square().mean().backward()
    assert set(calls.counts.values()) == {1}
    before = [p.full_tensor().clone() for b in ai.injected(model).values() for p in b.parameters()]
    optimizer.step()
    after = [p.full_tensor() for b in ai.injected(model).values() for p in b.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(ai.errors.UnsupportedModelError, match=r"FSDP|sharded"):
        ai.eject(model)


def test_an_average_of_weights_runs_its_own_blocks() -> None:
    """EMA by deepcopy: the average has blocks of its own, updated from the model's."""
    model, x = injected("resnet"), x_of()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    reference = average.module(x)
    stir(model, seed=8)
    assert torch.equal(average.module(x), reference)
    average.update(model)
    assert not torch.equal(average.module(x), reference)
    assert set(calls_of(average.module, x).values()) == {1}
