"""pytorch-grad-cam on a network with blocks: what a class hangs on, with the blocks and with them passed by.

python examples/grad_cam.py                  (pip install "attninject[pictures]")

What to expect: a heat map of the image's size for each target layer. A block is a layer like another, and can be a
target itself: its map tells what the class hangs on behind the gate. `ai.visualize` draws Grad-CAM beside the
gates, with no code at all; this is for maps of your own.
"""

import numpy
import torch
import torchvision
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import attninject as ai

torch.manual_seed(0)
model = ai.inject(torchvision.models.resnet18().eval(), "cbam_resnet")  # yours: trained
with torch.no_grad():  # blocks that do something
    for block in ai.injected(model).values():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

image = numpy.random.default_rng(0).random((64, 96, 3), numpy.float32)  # RGB in [0, 1]
x = torch.from_numpy(image).permute(2, 0, 1)[None]
targets = [ClassifierOutputTarget(207)]


def cam(layer: torch.nn.Module) -> numpy.ndarray:
    """The heat map (H, W) in [0, 1] for class 207, from what comes out of one layer."""
    with GradCAM(model=model, target_layers=[layer]) as method:
        return method(input_tensor=x, targets=targets)[0]


block = ai.injected(model)["layer4.1.cbam"]
for name, layer in (("layer4", model.layer4), ("layer4.1.cbam", block)):
    print(f"{name}: a map of {cam(layer).shape}")
with ai.disabled(model):
    without = cam(model.layer4)
print(f"the blocks change the map: {not numpy.allclose(cam(model.layer4), without)}")
print(f"over the image: {show_cam_on_image(image, cam(model.layer4), use_rgb=True).shape}")
