"""What the zoo examines: models by name with random "pretrained" weights, and the inputs that each kind takes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from attninject import models
from attninject.errors import ProbeError
from attninject.observe.example_inputs import Inputs
from attninject.observe.meta_kernels import meta_like
from attninject.observe.probe import run
from attninject.observe.record import map_tensors

SIZES = (64, 96, 128, 160, 192, 224, 256, 299, 331, 384)  # images: the smallest that the model takes
CLIPS = ((8, 64), (16, 64), (16, 112), (16, 224))  # frames and size of a video

# Detectors resize their images to 800 pixels and drop what they are unsure of: here small images, and no
# threshold, so that the output of a detector with random weights depends on every layer.
_RCNN = {"min_size": 128, "max_size": 160, "box_score_thresh": 0.0, "box_detections_per_img": 20}
_ONE_STAGE = {"score_thresh": 0.0, "detections_per_img": 20}
_SIZED = {**_ONE_STAGE, "min_size": 128, "max_size": 160}
BUILT_WITH: dict[str, dict[str, Any]] = {
    "torchvision/detection.faster_rcnn": _RCNN,
    "torchvision/detection.keypoint_rcnn": _RCNN,
    "torchvision/detection.mask_rcnn": _RCNN,
    "torchvision/detection.retinanet": _SIZED,
    "torchvision/detection.fcos": _SIZED,
    "torchvision/detection.ssd": _ONE_STAGE,
    "torchvision/detection.ssdlite": _ONE_STAGE,
}
ROOTS = {  # of models whose trunk is one part among several: where the places are looked for
    "torchvision/detection.faster_rcnn": "backbone.body",
    "torchvision/detection.keypoint_rcnn": "backbone.body",
    "torchvision/detection.mask_rcnn": "backbone.body",
    "torchvision/detection.retinanet": "backbone.body",
    "torchvision/detection.fcos": "backbone.body",
    "torchvision/detection.ssd": "backbone",
    "torchvision/detection.ssdlite": "backbone",
    "torchvision/segmentation.deeplabv3": "backbone",
    "torchvision/segmentation.fcn": "backbone",
    "torchvision/segmentation.lraspp": "backbone",
}


@dataclass(frozen=True)
class Calls:
    """How a model is called in eval and in train mode.

    `watched` names a submodule whose result is compared too: what a detector with random weights says of its
    images can be the same whatever it sees.
    """

    eval: Inputs
    train: Inputs
    watched: str = ""

    def inputs(self, training: bool) -> Inputs:
        """What the model is called with in that mode."""
        return self.train if training else self.eval


# --- names -------------------------------------------------------------------------------------


def sample() -> list[str]:
    """One small model per file of timm and per family of torchvision, in the order of the families.

    The list shipped in `samples.yaml` says which; a family that it does not know, or whose model this
    version lacks, is represented by its first model.
    """
    text = resources.files(__package__).joinpath("samples.yaml").read_text(encoding="utf-8")
    listed = {f"{lib}/{f}": f"{lib}/{n}" for lib, of in yaml.safe_load(text).items() for f, n in of.items()}
    members: dict[str, list[str]] = {}
    for name in models.names():
        members.setdefault(models.family(name), []).append(name)
    return [listed[f] if listed.get(f) in names else names[0] for f, names in sorted(members.items())]


# --- models ------------------------------------------------------------------------------------


def build(name: str, meta: bool = False) -> nn.Module:
    """The model in eval mode, seeded; `meta`: without any memory for its tensors, where it can be built so."""
    family = models.family(name)
    more = dict(BUILT_WITH.get(family, {}))
    if family.startswith("torchvision/quantization."):
        more["quantize"] = True  # what the name says; the library's default is the float model
    torch.manual_seed(0)
    if meta:
        with contextlib.suppress(Exception), quiet(), torch.device("meta"):
            return models.build(name, **more).eval()
    with quiet():
        return models.build(name, **more).eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What libraries say about themselves while they build, compile or export is not the zoo's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make a freshly built model look trained, in place: every norm, scale, bias and head random.

    Many nets start with their last batch norm, their layer scale or their head at zero; any block at all
    would look like the identity there.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            for name, p in module.named_parameters(recurse=False):
                if not p.is_floating_point() or p.is_meta or not p.numel():
                    continue
                if norm:
                    _normal(p, 1.0 if name == "weight" else 0.0, 0.2, generator)
                elif p.ndim <= 1 or p.abs().max() < 1e-3:
                    _normal(p, 0.3, 0.2, generator)
            for name, b in module.named_buffers(recurse=False):
                if norm and name == "running_mean":
                    _normal(b, 0.0, 0.3, generator)
                elif norm and name == "running_var":
                    b.copy_(torch.empty(b.shape).uniform_(0.5, 1.5, generator=generator))
    return model


def _normal(t: Tensor, mean: float, std: float, generator: torch.Generator) -> None:
    t.copy_(torch.empty(t.shape).normal_(mean, std, generator=generator))


# --- inputs ------------------------------------------------------------------------------------


def calls(name: str, model: nn.Module) -> Calls:
    """Random inputs that the model takes, as small as they may be, the same in every run.

    Raises:
        ProbeError: the model takes none of the usual sizes.
    """
    family = models.family(name)
    generator = torch.Generator().manual_seed(1)
    if ".detection." in f".{family.partition('/')[2]}":
        return _detection(generator)
    count = 2 if "optical_flow" in family else 1
    more = {"num_flow_updates": 2} if "optical_flow" in family else {}
    why = ""
    for shape in _shapes(model, family):
        x = torch.empty((2, *shape), device="meta")
        try:
            for training in (False, True):  # some have further outputs in train mode, which take a larger map
                run(model, Inputs((x,) * count, more), "meta", training)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            continue
        inputs = Inputs(tuple(torch.randn(2, *shape, generator=generator) for _ in range(count)), more)
        return Calls(inputs, inputs)
    raise ProbeError(f"{name} runs at none of the usual input sizes; at the last: {why}")


def _shapes(model: nn.Module, family: str) -> Iterator[tuple[int, ...]]:
    """Input shapes to try; what the model declares comes last, or alone where it takes no other."""
    if ".video." in f".{family.partition('/')[2]}":
        yield from ((3, frames, size, size) for frames, size in CLIPS)
        return
    config = getattr(model, "pretrained_cfg", None) or {}
    declared = tuple(config.get("input_size") or ())
    if declared and config.get("fixed_input_size"):
        yield declared
        return
    if smallest := config.get("min_input_size"):
        yield tuple(smallest)
    channels = declared[0] if declared else 3
    yield from ((channels, size, size) for size in SIZES if size >= 128 or "optical_flow" not in family)
    if declared:
        yield declared


def _detection(generator: torch.Generator) -> Calls:
    """Two images of different shape, and for training the boxes, masks and points that they are to show."""
    images = [torch.rand(3, h, w, generator=generator) for h, w in ((96, 128), (128, 112))]
    boxes = torch.tensor([[8.0, 10.0, 60.0, 70.0], [30.0, 20.0, 100.0, 90.0]])
    targets = []
    for image in images:
        masks = torch.zeros(2, *image.shape[-2:], dtype=torch.uint8)
        masks[:, 20:60, 30:50] = 1
        points = torch.rand(2, 17, 3, generator=generator) * 50 + 10
        points[..., 2] = 1
        labels = torch.tensor([1, 1])
        targets.append({"boxes": boxes.clone(), "labels": labels, "masks": masks, "keypoints": points})
    return Calls(Inputs((images,)), Inputs((images, targets)), watched="backbone")


def on_meta(calls: Calls) -> Calls:
    """The same inputs without values."""

    def bare(inputs: Inputs) -> Inputs:
        return Inputs(*map_tensors((inputs.args, inputs.kwargs), meta_like))

    return Calls(bare(calls.eval), bare(calls.train), calls.watched)


def parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters())


def shape_text(inputs: Inputs) -> str:
    """`2×3×64×64`, or what stands for it in a list of images."""
    shapes: list[str] = []
    map_tensors((inputs.args, inputs.kwargs), lambda t: shapes.append("×".join(map(str, t.shape))))
    return ", ".join(dict.fromkeys(shapes))
