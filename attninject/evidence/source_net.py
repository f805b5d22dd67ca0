"""A small ViT trained here, where no pretrained one can be had: on a source task that no target task is.

It learns the letters K to Z in the installed fonts, in ink on crops of scikit-learn's photographs, whose contrast
comes in slowly: on whole photographs from the start it learnt nothing in 200 batches of 64. The tasks have other
letters (A to J), or none, and its photographs are in no test image: it sees the left two thirds of each, which
`digits_on_photos` and `corruptions` train on too. Its fonts are all of those of `letters`, test fonts among them, in
other letters.

    python -m attninject.evidence.source_net source.safetensors
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject import models
from attninject.delta_file import detached, save_tensors
from attninject.observe.snapshot import rng_kept

from .samples import Samples
from .tasks.drawn_letters import FONT_FOLDERS, fonts_by_maker, letter
from .tasks.photographs import scikit_learns
from .tasks.task import crop, draw

NAME = "timm/vit_tiny_patch16_224"
SHAPE: Mapping[str, int] = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
"""What timm's builder is given: 64 patches and a class token, 0.7 M parameters."""

LETTERS = "KLMNOPQRSTUVWXYZ"
SIZE = 64
MEAN = STD = (0.5, 0.5, 0.5)
STEPS, BATCH = 2400, 32
LR, WEIGHT_DECAY, WARMUP = 1e-3, 0.05, 0.1


def build(classes: int = len(LETTERS), weights: str | Path | None = None) -> nn.Module:
    """The ViT for images (B, 3, 64, 64) normalised by `MEAN` and `STD`; logits (B, classes).

    Args:
        classes: of the head; one for other than the 16 letters is new, drawn from torch's generator.
        weights: a file that `main` wrote; None: all random.

    Raises:
        UnknownModelError: the file does not hold this net.
    """
    model = models.build(NAME, str(weights or "none"), num_classes=len(LETTERS), **SHAPE)
    if classes != len(LETTERS):
        model.reset_classifier(classes)  # type: ignore[operator]
    return model


def train(
    seed: int = 0, steps: int = STEPS, batch: int = BATCH, say: Callable[[str], None] | None = None
) -> nn.Module:
    """The ViT from random weights, `steps` batches of images drawn anew, AdamW with a cosine; in eval mode.

    The same seed, fonts and number of threads give the same weights. Torch's own generator is left as it was.
    """
    fonts = list(fonts_by_maker(FONT_FOLDERS, LETTERS).values())
    photos = [p[:, :, : p.shape[2] * 2 // 3] for p in scikit_learns().values()]
    generator = torch.Generator().manual_seed(seed)
    with rng_kept():
        torch.manual_seed(seed)
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LR, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
        )
        for step in range(1, steps + 1):
            drawn = images(fonts, photos, batch, generator, min(1.0, 1.5 * step / steps))
            loss = F.cross_entropy(model(drawn.images), drawn.labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if say and (step % 100 == 0 or step == steps):
                right = accuracy(model, images(fonts, photos, 256, torch.Generator().manual_seed(seed + 1)))
                say(f"step {step}/{steps}: loss {loss.item():.3f}, {right:.1%} of 256 other images right")
    return model.eval()


def images(
    makers: Sequence[Sequence[Path]],
    photos: Sequence[Tensor],
    count: int,
    generator: torch.Generator,
    contrast: float = 1.0,
) -> Samples:
    """Letters on crops of photographs, normalised: (count, 3, 64, 64).

    The ink is of a random colour, lighter than a dark crop and darker than a light one. `contrast` of the photographs:
    0 leaves their mean colour.
    """
    labels = torch.randint(len(LETTERS), (count,), generator=generator)
    made = []
    for label in labels.tolist():
        fonts = makers[draw(len(makers), generator)]
        ink = letter(LETTERS[label], fonts[draw(len(fonts), generator)], SIZE, generator)
        back = crop(photos, SIZE, generator)
        mean = back.mean((1, 2), keepdim=True)
        colour = torch.rand(3, 1, 1, generator=generator) * 0.4 + (0.6 if mean.mean() < 0.5 else 0.0)
        made.append(ink * colour + (1 - ink) * (mean + contrast * (back - mean)))
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return Samples((torch.stack(made) - shift) / scale, labels)


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    """The fraction of right answers in eval mode; the mode is put back."""
    mode = model.training
    logits = model.eval()(samples.images)
    model.train(mode)
    return float((logits.argmax(1) == samples.labels).float().mean())


def main() -> None:
    """Train and write the file."""
    parser = argparse.ArgumentParser(description="Train the small ViT of the studies, and save its weights.")
    parser.add_argument("file", type=Path, help="the safetensors file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the last bits of sums depend on it
    began = time.perf_counter()
    model = train(args.seed, args.steps, say=print)
    save_tensors(detached(model.state_dict()), args.file, {"format": "pt"})
    print(f"{args.file}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
