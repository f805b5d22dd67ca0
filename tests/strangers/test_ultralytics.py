"""Detectors of Ultralytics, without weights: blocks live through `fuse` and what its exporters do to a net."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from small import calls_of, se, stir
from torch import nn

import attninject as ai
from attninject import errors

pytestmark = [pytest.mark.strangers, pytest.mark.filterwarnings("ignore")]
tasks = pytest.importorskip("ultralytics.nn.tasks")


def detector(name: str) -> nn.Module:
    """From its yaml, with batch norms as training leaves them."""
    torch.manual_seed(0)
    model = tasks.DetectionModel(name, verbose=False).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model


def first(out: object) -> torch.Tensor:
    """Boxes and scores."""
    return out[0] if isinstance(out, (tuple, list)) else out


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
def test_a_fused_and_exported_detector_has_its_blocks(name: str) -> None:
    """`fuse`, the exporter's `forward_split`, ONNX and TorchScript all compute what the injected net does."""
    model, x = detector(name), torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        bare = first(model(x))
        ai.inject(model, block="cbam", after="model.{4,6,9}", example_inputs=x)
        assert torch.equal(first(model(x)), bare)
        stir(model)
        wanted = first(model(x))
        assert not torch.allclose(wanted, bare, rtol=1e-6, atol=1e-4)
        fused = copy.deepcopy(model)
        fused.fuse(verbose=False)
        torch.testing.assert_close(first(fused(x)), wanted, rtol=1e-5, atol=2e-4)
        for m in fused.modules():
            if hasattr(m, "forward_split"):
                m.forward = m.forward_split
            if hasattr(m, "export"):
                m.export, m.format = True, "onnx"
        torch.testing.assert_close(first(fused(x)), wanted, rtol=1e-5, atol=2e-4)
        assert calls_of(fused, x) == {f"model.{n}.cbam": 1 for n in (4, 6, 9)}
        traced = torch.jit.trace(fused, x, strict=False)
        torch.testing.assert_close(first(traced(x)), wanted, rtol=1e-5, atol=2e-4)
        by_onnx(fused, x, wanted)


def by_onnx(model: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same through ONNX, where a runtime is installed."""
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    session = runtime.InferenceSession(file.getvalue())
    (out, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), wanted, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("where", ["model.8.cv2.bn", "**.bn", "model.8.cv2.act"])
def test_the_activation_of_all_detectors_carries_no_block(where: str) -> None:
    """`Conv.default_act` is one object for every net of the process."""
    with pytest.raises(errors.CannotRewriteError, match="the class Conv"):
        ai.plan(detector("yolov8n.yaml"), **se(after=where), example_inputs=torch.rand(1, 3, 64, 64))


def test_fusing_across_a_block_is_refused() -> None:
    """And said in the plan."""
    model = detector("yolov8n.yaml")
    found = ai.plan(model, **se(after="model.8.cv2.conv"), example_inputs=torch.rand(1, 3, 64, 64))
    assert "between a layer and its batch norm" in found.notes[0]
    with pytest.raises(errors.CannotRewriteError, match="would reach across it"):
        ai.inject(model, found).fuse(verbose=False)
