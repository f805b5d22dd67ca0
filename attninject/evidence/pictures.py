"""`visualize`: what every injected block of a model does to an image, as PNG files and one HTML page.

Each image has a folder of PNG files, named after the block and what is shown; a heat map has a pixel square per
position and, in its metadata, the range of its colours, so that its values can be read back. `index.html` shows
them all by block.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from attninject import api, hub
from attninject.errors import PictureError
from attninject.files import replacing
from attninject.observe.example_inputs import first_float

from . import pictures_cam, pictures_paint
from .pictures_input import ImageLike, Position, Seen, eyes_of, look_at
from .pictures_page import Chapter, Figure, Section, page
from .pictures_record import Look, looks_of, spread, untouched, with_start
from .pictures_views import Heat, Panel

PAGE = "index.html"
RANGE = "attninject range"  # key of a heat map's PNG metadata: "LOW HIGH"


def visualize(
    model: nn.Module | str | os.PathLike[str],
    image: ImageLike | Sequence[ImageLike],
    out: str | os.PathLike[str] = "maps",
    *,
    at: Position | None = None,
    size: int | None = None,
    start: nn.Module | None = None,
    cam: bool | None = None,
) -> list[Path]:
    """Pictures of what the injected blocks do to an image; returns the files, the page first.

    Gates over positions are heat maps over the image, gates over channels bars, the rows of Non-Local and its
    kin what one position looks at; of every block the map before and behind it. For the whole network Grad-CAM,
    if the package `grad-cam` is there, and for vision transformers attention rollout. The model is as it was
    afterwards: modes, buffers, gradients, random generators.

    Args:
        model: with injected blocks; or a run of `attninject finetune`, as its folder or `hf-hub:user/name`, whose start
            is shown too.
        image: a file, an image of Pillow, or a tensor (C, H, W) as the model takes it; or several of them. Files
            enter as timm's evaluation has it: resized, the centre cropped, normalised by the model's own values.
        out: the folder for the files; made if it is not there.
        at: the position (x, y) whose rows are shown, in pixels of the upright image; by default the centre.
        size: side of the images that the model is given; by default the run's or the model's.
        start: the model before training, to compare with.
        cam: True: Grad-CAM or an error; False: none; None: where the package is there.

    Raises:
        PictureError: the model has no blocks, a file is no image, the position lies outside, or `out` cannot be
            written.
        RunError: the folder holds no run. MissingPackageError: `cam=True` without the package.
    """
    if cam:
        pictures_cam.refuse_missing()
    net, data, start = _opened(model, start)
    if not api.injected(net):
        raise PictureError(f"{type(net).__name__} has no injected blocks; inject a recipe first")
    images = [image] if isinstance(image, str | os.PathLike | Image.Image | Tensor) else list(image)
    seen = look_at(images, eyes_of(net, data, size), at)
    if not seen:
        raise PictureError("no image was given")
    folder = _made(Path(out))
    album = _Album(folder)
    for one in seen:
        _picture(album, net, start, one, pictures_cam.installed() if cam is None else cam)
    return album.finish(_title(model, net))


def _opened(model: Any, start: nn.Module | None) -> tuple[nn.Module, Any, nn.Module | None]:
    """The model, the data settings of its run, and the model at the start; a run has all three."""
    if isinstance(model, nn.Module):
        return model, None, start
    from attninject.training import read_experiment, trained
    from attninject.training.engine import started
    from attninject.training.runs import SETTINGS

    folder = hub.folder_of(model)
    return trained(folder), read_experiment(folder / SETTINGS).data, start or started(folder)


def _title(model: Any, net: nn.Module) -> str:
    return f"{type(net).__name__}{'' if isinstance(model, nn.Module) else f' of {os.fspath(model)}'}"


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / PAGE) as temporary:
            temporary.write_text("", encoding="utf-8")
    except OSError as error:
        raise PictureError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


# --- one image ----------------------------------------------------------------------------------


def _picture(album: _Album, net: nn.Module, start: nn.Module | None, seen: Seen, cam: bool) -> None:
    with untouched(net) as inner:
        looks, output = looks_of(inner, seen.x, seen.at)
        whole = list(_of_network(inner, seen, looks, output, cam))
    if start is not None:
        with untouched(start) as before:
            looks = with_start(looks, looks_of(before, seen.x.to(first_float(before, seen.x)), seen.at)[0])
    album.chapter(seen, [panel for panel in whole if panel is not None], looks)


def _of_network(
    inner: nn.Module, seen: Seen, looks: list[Look], output: Any, cam: bool
) -> Iterator[Heat | None]:
    """Grad-CAM behind the last block that ran once, where the model gives class scores; rollout."""
    ran = [look.name for look in looks if look.shape]
    once = [name for name in ran if name in api.injected(inner) and f"{name}.2" not in ran]
    if cam and once and isinstance(output, Tensor) and output.ndim == 2:
        yield pictures_cam.grad_cam(inner, seen.x, once[-1], seen.at)
    yield pictures_cam.rollout(inner, seen.x)


@dataclass
class _Album:
    """The files written so far, and the page that will show them."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    chapters: list[Chapter] = field(default_factory=list)

    def chapter(self, seen: Seen, whole: list[Heat], looks: list[Look]) -> None:
        """One image: what the model saw, the network as a whole, then each block."""
        x, y = seen.pixel
        first = Section("")
        shown = pictures_paint.marked(pictures_paint.enlarged(seen.shown), seen.at)
        first.figures.append(self._write(seen, "image", shown, "what the model sees, the position marked"))
        for heat in whole:
            first.figures += self._heat(seen, heat.name, heat, alone=False)
        sections = [first]
        for look in looks:
            size = "×".join(map(str, look.shape[1:]))
            section = Section(look.name, f"{look.kind}{f' on {size}' if size else ''}", note=look.note)
            for panel in look.panels:
                section.figures += self._panel(seen, f"{look.name}.{panel.name}", panel)
            sections.append(section)
        height, width = seen.x.shape[-2:]
        about = f"given to the model as {width}×{height}; the position marked is {x},{y} of the file"
        self.chapters.append(Chapter(seen.name, about, sections))

    def _panel(self, seen: Seen, name: str, panel: Panel) -> Iterator[Figure]:
        if isinstance(panel, Heat):
            yield from self._heat(seen, name, panel)
            return
        image = pictures_paint.bars(panel.values, panel.start, panel.base)
        start = "" if panel.start is None else "; orange: before training"
        yield self._write(seen, name, image, panel.text + start, spread(panel), "wide")

    def _heat(self, seen: Seen, name: str, heat: Heat, alone: bool = True) -> Iterator[Figure]:
        """The map over the image where it belongs there, and by itself."""
        values, (low, high) = spread(heat), heat.range
        if heat.over:
            image = pictures_paint.over(heat.values, low, high, seen.shown)
            image = pictures_paint.marked(image, seen.at) if heat.marked else image
            yield self._write(seen, f"{name}.over", image, heat.text, values)
        plain = pictures_paint.heat(heat.values, low, high)
        text = f"{heat.text}, by itself" if heat.over else heat.text
        figure = self._write(seen, name, plain, text, values, "map", f"{low!r} {high!r}")
        if alone:
            yield figure

    def _write(
        self, seen: Seen, name: str, image: Image.Image, text: str, values: str = "", form: str = "",
        ends: str = "",
    ) -> Figure:  # fmt: skip
        info = PngInfo()
        info.add_text("Description", text)
        if ends:
            info.add_text(RANGE, ends)
        stream = io.BytesIO()
        image.save(stream, "PNG", pnginfo=info)
        self._put(self.folder / seen.name / f"{name}.png", stream.getvalue())
        return Figure(stream.getvalue(), text, values, form)

    def _put(self, file: Path, content: bytes) -> None:
        try:
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise PictureError(f"{file} cannot be written: {error.strerror or error}") from error
        self.files.append(file)

    def finish(self, title: str) -> list[Path]:
        """Write the page; all files, the page first."""
        about = [
            "A block that starts as the identity has gates of 1: where such a gate differs from 1, it has learnt."
        ]
        if not pictures_cam.installed():
            about.append(f"Grad-CAM is left out: it needs the package grad-cam ({pictures_cam.HINT}).")
        self._put(self.folder / PAGE, page(title, about, self.chapters).encode("utf-8"))
        return [self.files[-1], *self.files[:-1]]
