"""CBAM in the ResNet-FPN backbone of Faster R-CNN and of Keypoint R-CNN: a training step on tiny images.

python examples/detector.py
"""

import torch
import torchvision

import attninject as ai

torch.manual_seed(0)
SMALL = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 96, "box_detections_per_img": 5,
         "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16}  # fmt: skip
IMAGES = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
BOXES = [torch.tensor([[4.0, 6.0, 40.0, 50.0]]), torch.tensor([[10.0, 8.0, 50.0, 60.0]])]


def targets(keypoints: int) -> list[dict[str, torch.Tensor]]:
    """One object in each image; for keypoints their places, all visible."""
    found = []
    for box in BOXES:
        target = {"boxes": box, "labels": torch.tensor([1])}
        if keypoints:
            middle = (box[0, :2] + box[0, 2:]) / 2
            target["keypoints"] = torch.cat([middle, torch.ones(1)]).repeat(1, keypoints, 1)
        found.append(target)
    return found


for name, keypoints, more in (
    ("fasterrcnn_resnet50_fpn", 0, {"num_classes": 2}),
    ("keypointrcnn_resnet50_fpn", 5, {"num_classes": 2, "num_keypoints": 5}),
):
    model = torchvision.models.detection.__dict__[name](**SMALL, **more).eval()
    with torch.no_grad():
        before = model(IMAGES)
        ai.inject(model, "cbam_resnet", root="backbone.body")
        after = model(IMAGES)
    same = all(torch.equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a)
    print(f"{name}: {len(ai.injected(model))} blocks, detections unchanged: {same}")

    ai.freeze(model)  # the head is all beside `backbone`: proposals, boxes, keypoints
    optimizer = torch.optim.SGD(ai.param_groups(model, lr=1e-3), lr=1e-3)
    model.train()
    losses = model(IMAGES, targets(keypoints))
    sum(losses.values()).backward()
    optimizer.step()
    reached = [
        block for block in ai.injected(model).values() if any(p.grad.any() for p in block.parameters())
    ]
    print(f"  {ai.trainable(model)} learn; blocks with a gradient: {len(reached)}")
