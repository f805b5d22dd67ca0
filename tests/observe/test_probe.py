"""Looking at a model leaves no mark, and sees calls, shapes and inputs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import numpy
import pytest
import timm
import torch
import torchvision
from small import Around, Through, images, se, state
from torch import nn

import attninject as ai
from attninject.errors import ProbeError
from attninject.observe.meta_kernels import execute, meta_like
from attninject.observe.probe import probe
from attninject.observe.record import map_tensors
from attninject.observe.recorder import calls_through


def fcos() -> nn.Module:
    """A detector for small images."""
    return torchvision.models.detection.fcos_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    )


class Recurrent(nn.Module):
    """An LSTM keeps its weights a second time, in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 32, stride=32)
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.rnn(self.conv(x).flatten(2).transpose(1, 2))[0]


class Untidy(nn.Module):
    """Counts, caches, draws and forgets while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.count, self.seen, self.cache, self.names = 0, [], {"deep": [{}]}, set()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        self.runs.add_(1)
        self.seen.append(x.shape)
        self.cache["deep"][0][str(x.device)] = x
        self.cache["last"] = x
        self.names |= {random.random(), numpy.random.random()}
        self.late = torch.rand(3)
        return self.norm(self.conv(x))


class Falls(Untidy):
    """The same, and then raises."""

    def forward(self, x):
        super().forward(x)
        raise RuntimeError("out of luck")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "coat": lambda: timm.create_model("coat_tiny"),
    "levit": lambda: timm.create_model("levit_128s"),
    "fcos": fcos,
    "lstm": Recurrent,
    "untidy": Untidy,
    "batchnormact": lambda: timm.create_model("mobilenetv3_small_050"),
}


SITES = {
    "coat": "serial_blocks1.*.mlp",
    "levit": "stages.0.blocks.0.attn",
    "fcos": "backbone.body.layer1.*.bn3",
    "lstm": "conv",
    "untidy": "conv",
    "batchnormact": "blocks.*.*.conv_pw",
}


@pytest.mark.parametrize("name", MODELS)
def test_planning_leaves_no_mark(name: str) -> None:
    """Parameters, buffers, caches, modes, gradients and random generators are as before, to the identity."""
    model = MODELS[name]()
    model.train()
    next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
    before = state(model)
    ai.sites(model)
    ai.plan(model, **se(after=SITES[name]))
    assert state(model) == before


def test_planning_inside_a_norm_that_counts_does_not_count() -> None:
    """Tracing timm's BatchNormAct2d in train mode must not advance `num_batches_tracked`."""
    model = timm.create_model("mobilenetv3_small_050")
    before = state(model)
    ai.plan(model, block="se", after="**.bn1.act", args={"reduction": 4})
    assert state(model) == before


def test_a_forward_that_raises_leaves_no_mark() -> None:
    """The model is as it was when its own forward fails under the probe."""
    model = Falls()
    before = state(model)
    with pytest.raises(ProbeError, match=r"Falls fails its own forward on inputs of shape \(2, 3, 16, 16\)"):
        ai.plan(model, **se(after="conv"), example_inputs=images())
    assert state(model) == before


def test_user_hooks_stay_and_stay_silent() -> None:
    """Planning does not run the hooks of the model's owner."""
    model = torchvision.models.resnet18(weights=None)
    seen: list[str] = []
    handles = [
        model.layer1.register_forward_hook(lambda *_: seen.append("after")),
        model.layer1.register_forward_pre_hook(lambda *_: seen.append("before")),
    ]
    ai.inject(model, "se_resnet")
    assert seen == []
    model.eval()(images(size=32))
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()


def test_data_dependent_forwards_run_for_real_on_copies() -> None:
    """A forward that needs values still gets a plan, and its statistics are not touched."""

    def body(self, x):
        y = self.n(self.a(x))
        return self.b(y) if y.mean().item() < 1e9 else y

    model = Around(Through(body, n=nn.BatchNorm2d(8))).train()
    before = state(model)
    plan = ai.plan(model, **se(after="inner.b"), example_inputs=images())
    assert plan.sites[0].shape == (2, 8, 16, 16)
    assert state(model) == before


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(5, 8, 3), (2, 5, 224, 224)),
        (nn.Conv1d(4, 8, 3), (2, 4, 256)),
        (nn.Conv3d(2, 8, 3), (2, 2, 16, 112, 112)),
        (nn.Linear(7, 8), (2, 7)),
    ],
)
def test_inputs_are_found_from_the_first_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Without an example the probe makes one that the first layer takes."""
    _, inputs = probe(nn.Sequential(layer))
    assert tuple(inputs.args[0].shape) == shape


def test_timm_models_say_their_size() -> None:
    """A timm model is probed at its own input size."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=96)
    assert ai.plan(model, block="se", after="blocks.0").sites[0].layout.grid == (6, 6)


@pytest.mark.parametrize(
    "example",
    [images(), (images(),), {"x": images()}],
    ids=["tensor", "tuple", "dict"],
)
def test_examples_come_as_tensor_tuple_or_keywords(example: object) -> None:
    """All three forms are understood."""
    model = Around(nn.Conv2d(8, 8, 1))
    assert ai.plan(model, **se(after="inner"), example_inputs=example).sites[0].shape == (2, 8, 16, 16)


def test_sites_lists_what_a_detector_runs_before_its_data_decide() -> None:
    """On fcos the layers up to the proposals are there, with shapes."""
    found = ai.sites(fcos(), "backbone.body.layer1.0.*")
    assert {s.path for s in found} >= {"backbone.body.layer1.0.conv1", "backbone.body.layer1.0.bn3"}
    assert all(s.layout is not None and str(s.layout) == "NCHW" for s in found)


def test_a_model_probed_in_half_precision_keeps_its_dtype() -> None:
    """A bfloat16 model gets bfloat16 blocks."""
    model = torchvision.models.resnet18(weights=None).bfloat16()
    ai.inject(model, "se_resnet")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# --- shapes without torch's own meta kernels ----------------------------------------------------

aten = torch.ops.aten


def tensors(*shape: int) -> list[torch.Tensor]:
    """One shape in several orders of its axes in memory."""
    x = torch.randn(*shape)
    found = [x, x.transpose(0, 1).contiguous().transpose(0, 1), x[..., ::2]]
    return [*found, x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else found


ANSWERS = [
    *((getattr(aten, n).default, (x,)) for n in ("gelu", "silu", "hardswish", "rsqrt") for x in tensors(2, 4, 6, 6)),
    *((aten.upsample_bilinear2d.default, (x, [3, 5], False)) for x in tensors(2, 4, 6, 6)[::3]),
    *((aten._softmax.default, (x, -1, False)) for x in tensors(2, 4, 6)),
    *((aten.native_layer_norm.default, (x, [6], torch.ones(6), None, 1e-5)) for x in tensors(2, 4, 6)[:2]),
    *((aten.add.Tensor, (x, y)) for x in tensors(2, 4, 6, 6) for y in (*tensors(2, 4, 6, 6), torch.randn(6), 2)
      if not isinstance(y, torch.Tensor) or y.shape[-1] == x.shape[-1]),
    (aten.add.Tensor, (torch.randn(2, 4, 6), torch.randn(3, 2, 4, 6))),
    (aten.add.Tensor, (torch.randn(2, 4), torch.randn(2, 4).double())),
    (aten.mul.Tensor, (torch.randn(2, 6), 1j)),
    (aten.mul.Tensor, (torch.randn(2, 1, 6), torch.randn(2, 4, 6))),
    (aten.addmm.default, (torch.randn(5), torch.randn(7, 3), torch.randn(3, 5))),
    (aten.addmm.default, (torch.randn(7, 5), torch.randn(7, 3), torch.randn(3, 5))),
    (aten.clamp.Tensor, (torch.randn(2, 6), torch.tensor(0.0), torch.tensor(1.0))),
    (aten.pow.Tensor_Scalar, (torch.arange(3), 0.5)),
    *((aten.convolution.default,
       (torch.randn(2, 4, 6, 6), torch.randn(8, 4 // g, 3, 3), bias, [2, 1], pad, [1], False, [0], g))
      for g in (1, 2) for bias in (None, torch.randn(8)) for pad in ([1], [0, 2])),
    *((aten.convolution.default, (torch.randn(2, 4, *n), torch.randn(3, 4, *n), None, [1], [0], [1], False, [0], 1))
      for n in ((6,), (2, 3, 4))),
    (aten.convolution.default, (torch.randn(2, 4, 6), torch.randn(4, 3, 2), None, [2], [0], [1], True, [1], 1)),
    *((aten.mean.dim, (x, dims, keep))
      for x in tensors(2, 4, 6, 6) for dims in ([-1, -2], [1]) for keep in (True, False)),
    *((getattr(aten, n).default, (torch.randn(2, 6),)) for n in ("relu_", "silu_", "hardswish_", "sigmoid_")),
    *((aten.add_.Tensor, (torch.randn(2, 6), y)) for y in (torch.randn(2, 6), torch.randn(6), 2)),
    (aten.native_batch_norm.default, (torch.randn(2, 4, 3), *(torch.ones(4),) * 4, False, 0.1, 1e-5)),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "given"), ANSWERS)
def test_short_answers_are_those_of_the_real_operation(operation: Callable, given: tuple) -> None:
    """Shape, strides and dtype of what a probe sees are those of a real run."""
    real = operation(*given)
    meta = execute(operation, tuple(map_tensors(list(given), meta_like)), {})
    for a, b in zip(*((o,) if isinstance(o, torch.Tensor) else o[:1] for o in (real, meta)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize(
    ("operation", "given"),
    [
        (aten.convolution.default, ((2, 4, 6), (3, 5, 3), None, [1], [0], [1], False, [0], 1)),
        (aten.convolution.default, ((2, 4, 6), (3, 4, 9), None, [1], [0], [1], False, [0], 1)),
        (aten.mean.dim, ((2, 4), [1, -1])),
        (aten.mean.dim, ((2, 4), [2])),
        (aten.add_.Tensor, ((2, 4), (3, 2, 4))),
    ],
)
def test_what_no_operation_takes_has_no_short_answer(operation: Callable, given: tuple) -> None:
    """Other channels, a kernel larger than the map, an axis twice or not there: refused as by torch."""
    shaped = [torch.empty(a, device="meta") if isinstance(a, tuple) else a for a in given]
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        execute(operation, tuple(shaped), {})


def test_threads_that_plan_at_once_wait_for_each_other() -> None:
    """Patches of torch's classes are put back in the order in which they were made, so none stays for good."""
    original, entered, leave = nn.Module.__call__, threading.Event(), threading.Event()

    def other() -> None:
        with calls_through(lambda call, module, args, kwargs: call(module, *args, **kwargs)):
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=other)
    with calls_through(lambda call, module, args, kwargs: call(module, *args, **kwargs)):
        thread.start()
        assert not entered.wait(0.1)
    leave.set()
    thread.join()
    assert entered.is_set()
    assert nn.Module.__call__ is original


def test_blocks_go_in_once_another_thread_has_its_record() -> None:
    """While a run is recorded, the forwards of classes are others; no generated class holds on to those."""
    entered, slow = threading.Event(), []

    class Shared(Through):
        def forward(self, x):
            if slow:
                entered.set()
                time.sleep(0.2)
            return self.b(self.a(x))

    forward, model = Shared.forward, Around(Shared(None))
    rule = {"block": "se", "after": "inner.a", "args": {"reduction": 4}}
    plan = ai.plan(model, **rule)
    slow.append(True)
    thread = threading.Thread(target=ai.plan, args=(Around(Shared(None)),), kwargs=rule)
    thread.start()
    assert entered.wait(10)
    ai.inject(model, plan)
    thread.join()
    assert type(model.inner).forward.__globals__["_base"] is forward


def test_a_trace_leaves_other_threads_alone() -> None:
    """A net that is made and run in another thread meanwhile is neither refused nor taken for the traced one."""
    stop, errors, layer = threading.Event(), [], nn.Linear(8, 8)

    def busy() -> None:
        while not stop.is_set():
            try:
                net = nn.Sequential(layer, nn.ReLU())
                net.mark = torch.is_grad_enabled()
                assert net(torch.ones(1, 8)).shape == (1, 8)
            except Exception as error:
                errors.append(error)
                return

    class Parted(Through):
        def forward_first(self, x):
            stop.wait(0.05)  # time for the other thread
            return torch.relu(self.a(x))

        def forward(self, x):
            return x + self.b(self.forward_first(x))

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        plan = ai.plan(Around(Parted(None)), block="se", after="inner::add", args={"reduction": 4})
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert [site.mechanism for site in plan.sites] == ["graph"]
