"""YOLO with CBAM, trained by `YOLO.train`.

python examples/finetune_ultralytics.py      (pip install ultralytics)

What to expect: Ultralytics makes its network anew from a yaml at the start of every run, and blocks put in before would
stay behind; `trainer_for` puts them in there. Its average, `best.pt`, validation, prediction and export have them. One
epoch on four images of 64 pixels finds nothing: start from `YOLO("yolo11n.pt")` and your own data.
"""

import tempfile
from pathlib import Path

import numpy
from PIL import Image
from ultralytics import YOLO

import attninject as ai
from attninject.integrations.ultralytics import trainer_for


def written(folder: Path) -> Path:
    """A data set of four images in Ultralytics' layout; the yaml that names it."""
    rng = numpy.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(4):
            for kind, name in (("images", f"{number}.png"), ("labels", f"{number}.txt")):
                file = folder / kind / split / name
                file.parent.mkdir(parents=True, exist_ok=True)
                if kind == "images":
                    Image.fromarray(rng.integers(0, 255, (64, 64, 3), numpy.uint8)).save(file)
                else:
                    file.write_text(
                        "0 0.5 0.5 0.4 0.4\n"
                    )  # class, then centre and size in parts of the image
    about = folder / "boxes.yaml"
    about.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {{0: thing}}\n")
    return about


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    yolo = YOLO("yolo11n.yaml")  # "yolo11n.pt" for pretrained weights
    trainer = trainer_for(yolo, block="cbam", place="stage_end")
    small = {"imgsz": 64, "batch": 2, "epochs": 1, "workers": 0, "device": "cpu"}
    quiet = {"plots": False, "verbose": False, "project": str(folder / "runs")}
    yolo.train(data=str(written(folder)), trainer=trainer, **small, **quiet)

    best = YOLO(yolo.trainer.best)  # pickled: attninject must be installed where it is loaded
    print(f"best.pt has {len(ai.injected(best.model))} blocks: {', '.join(ai.injected(best.model))}")
    results = best.predict(str(folder / "images" / "val"), imgsz=64, device="cpu", verbose=False)
    print(f"predicted on {len(results)} images")
