"""Model names to models: `torchvision/resnet50`, `timm/convnext_tiny`, with or without weights.

The only file that imports `timm.create_model` and `torchvision.models`, and only when it is called.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attninject import package_weights
from attninject.errors import UnknownModelError
from attninject.wording import listed, nearest

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".safetensors")
NESTED_UNDER = ("state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def build(name: str, weights: str | None = "none", **kw: Any) -> nn.Module:
    """A model by its name, such as `torchvision/resnet50`; a bare name if only one library has it.

    `weights` is `none`, `default`, `package` (see `package_weights`), a tag of that library, or a local file; a
    file must hold exactly the model's keys. Further keywords (`num_classes=10`) go to the library's own builder.
    Nothing is downloaded unless `weights` asks for it.
    """
    library, bare = _resolve(name)
    weights = weights or "none"
    if weights == package_weights.WORD:
        return package_weights.fill(_BUILDERS[library](bare, "none", kw), f"{library}/{bare}")
    if not _is_file(weights):
        return _BUILDERS[library](bare, weights, kw)
    tensors = _read(Path(weights))
    model = _BUILDERS[library](bare, "none", kw)
    _load_strictly(model, tensors, Path(weights), f"{library}/{bare}")
    return model


def names(pattern: str | None = None) -> list[str]:
    """Every model name, sorted; with a pattern (`*resnet50*`, `timm/conv*`) those that match it."""
    everything = sorted(f"{library}/{bare}" for library in _LISTS for bare in _LISTS[library]())
    if pattern is None:
        return everything
    return [
        full
        for full in everything
        if fnmatch.fnmatchcase(full if "/" in pattern else full.split("/", 1)[1], pattern)
    ]


def shapes(weights: str) -> dict[str, tuple[int, ...]]:
    """Key → shape of the tensors in a local file of weights; {} where `weights` is no file but a tag."""
    return {key: tuple(t.shape) for key, t in _read(Path(weights)).items()} if _is_file(weights) else {}


def family(name: str) -> str:
    """Where a model's code lives in its library: `timm/resnet`, `torchvision/detection.ssd`."""
    library, _, bare = name.partition("/")
    if library not in _FAMILIES:
        library, bare = _resolve(name)
    return f"{library}/{_FAMILIES[library](_architecture(library, bare))}"


# --- names --------------------------------------------------------------------------------------


def _list_torchvision() -> list[str]:
    import torchvision.models

    return list(torchvision.models.list_models())


def _list_timm() -> list[str]:
    import timm

    return timm.list_models()


_LISTS: dict[str, Callable[[], list[str]]] = {"torchvision": _list_torchvision, "timm": _list_timm}


def _family_in_torchvision(bare: str) -> str:
    import torchvision.models

    builder = torchvision.models.get_model_builder(bare)
    return str(builder.__module__).removeprefix("torchvision.models.")


def _family_in_timm(bare: str) -> str:
    import timm

    return timm.model_entrypoint(bare).__module__.removeprefix("timm.models.")


_FAMILIES: dict[str, Callable[[str], str]] = {
    "torchvision": _family_in_torchvision,
    "timm": _family_in_timm,
}


def _resolve(name: str) -> tuple[str, str]:
    """The library and the name within it; timm's `resnet50.a1_in1k` keeps its tag."""
    library, slash, bare = name.partition("/")
    if not slash:
        library, bare = "", name
    elif library not in _LISTS:
        raise UnknownModelError(
            f"unknown model library {library!r} in {name!r}: a model is torchvision/NAME or timm/NAME"
            f"{_nearest(bare)}"
        )
    candidates = [library] if library else list(_LISTS)
    found = [one for one in candidates if _architecture(one, bare) in set(_LISTS[one]())]
    if len(found) == 1:
        return found[0], bare
    if found:
        both = " and ".join(f"{one}/{bare}" for one in found)
        raise UnknownModelError(
            f"the model name {name!r} is ambiguous: both {both} exist; write one of them out"
        )
    raise UnknownModelError(
        f"no model is named {name!r}{_nearest(bare, library)}; `attninject list models` shows all"
    )


def _architecture(library: str, bare: str) -> str:
    return bare.split(".", 1)[0] if library == "timm" else bare


def _nearest(bare: str, library: str = "") -> str:
    pool = {one: f"{lib}/{one}" for lib in _LISTS if library in ("", lib) for one in _LISTS[lib]()}
    close = nearest(bare, pool, reordered=False)
    return f"; nearest: {', '.join(pool[one] for one in close)}" if close else ""


# --- builders -----------------------------------------------------------------------------------


def _build_torchvision(bare: str, weights: str, kw: dict[str, Any]) -> nn.Module:
    import torchvision.models

    taken = inspect.signature(torchvision.models.get_model_builder(bare)).parameters
    if "weights_backbone" in taken:
        kw.setdefault("weights_backbone", None)  # its default downloads
    if bare in ("googlenet", "inception_v3") and weights == "none":
        kw.setdefault("init_weights", True)  # what None means today, without the warning
    entry = None
    if weights != "none":
        entries = torchvision.models.get_model_weights(bare)
        tags = [one.name for one in entries]
        tag = "DEFAULT" if weights == "default" else weights
        if not tags or tag not in entries.__members__:
            raise _unknown_weights(f"torchvision/{bare}", weights, tags)
        entry = entries[tag]
    full = f"torchvision/{bare}"
    return _run(lambda: torchvision.models.get_model(bare, weights=entry, **kw), full, weights, kw)


def _build_timm(bare: str, weights: str, kw: dict[str, Any]) -> nn.Module:
    import timm

    architecture = _architecture("timm", bare)
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    own_tag = bare.partition(".")[2]
    if own_tag and own_tag not in tags:
        raise _unknown_weights(f"timm/{architecture}", own_tag, tags)
    if weights == "default" and not tags:
        raise _unknown_weights(f"timm/{architecture}", weights, tags)
    if weights not in ("none", "default"):
        if weights not in tags:
            raise _unknown_weights(f"timm/{architecture}", weights, tags)
        bare = f"{architecture}.{weights}"
    fetch = weights != "none"
    return _run(lambda: timm.create_model(bare, pretrained=fetch, **kw), f"timm/{bare}", weights, kw)


_BUILDERS: dict[str, Callable[[str, str, dict[str, Any]], nn.Module]] = {
    "torchvision": _build_torchvision,
    "timm": _build_timm,
}


def _run(builder: Callable[[], nn.Module], full: str, weights: str, kw: dict[str, Any]) -> nn.Module:
    """Call a library's builder; whatever it raises becomes one paragraph of ours."""
    try:
        return builder()
    except Exception as error:
        why = f"{type(error).__name__}: {_one_line(error)}"
        if weights != "none" and _is_fetch_failure(error):
            raise UnknownModelError(
                f"the weights {weights!r} of {full} could not be fetched ({why}); without a network give "
                f"a local file, or `none` for random weights"
            ) from error
        given = "".join(f", {key}={value!r}" for key, value in kw.items() if value is not None)
        raise UnknownModelError(f"{full} cannot be built with weights={weights!r}{given} ({why})") from error


def _is_fetch_failure(error: Exception) -> bool:
    clients = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "urllib", "http")
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in clients


def _unknown_weights(full: str, weights: str, tags: list[str]) -> UnknownModelError:
    if not tags:
        return UnknownModelError(
            f"{full} has no published weights, {weights!r} was asked for; give `none` or a local file"
        )
    close = nearest(weights, tags, 1, reordered=False)
    hint = f"; nearest: {close[0]}" if close else ""
    return UnknownModelError(
        f"{full} has no weights {weights!r}{hint}; it has: {', '.join(tags)}; or give `none`, `default`, "
        f"or a local file ({', '.join(FILE_SUFFIXES)})"
    )


# --- local files --------------------------------------------------------------------------------


def _is_file(weights: str) -> bool:
    return weights.endswith(FILE_SUFFIXES) or "/" in weights or "\\" in weights


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by key, unwrapped from `{'state_dict': …}` and from `module.` prefixes."""
    if not path.is_file():
        raise UnknownModelError(f"no weights file at {path}")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except UnknownModelError:
        raise
    except Exception as error:
        raise UnknownModelError(
            f"{path} cannot be read as weights ({type(error).__name__}: {_one_line(error)}); a file holds "
            f"a state dict, written by torch.save or safetensors"
        ) from error
    for key in NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise UnknownModelError(
            f"{path} holds {type(content).__name__}, not a state dict of names and tensors"
        )
    odd = [
        key
        for key, value in content.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if odd:
        raise UnknownModelError(
            f"{path} is no plain state dict: {odd[0]!r} holds {type(content[odd[0]]).__name__}, not a "
            f"tensor; a state dict may stand alone or under {' or '.join(map(repr, NESTED_UNDER))}"
        )
    return _without_prefix(content)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        if "attninject" in (file.metadata() or {}):
            raise UnknownModelError(
                f"{path} is a delta file of attninject, not the weights of a base model: build the base, "
                f"then `ai.load(base, {str(path)!r})`"
            )
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping


def _read_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _without_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same without the prefix that DataParallel, DDP or torch.compile put before every key."""
    result: dict[str, torch.Tensor] = _renamed(tensors, "")
    while wrapped := [p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in result)]:
        result = _renamed(result, wrapped[0])
    return result


def _renamed(tensors: Mapping[str, torch.Tensor], prefix: str) -> Any:
    """The state dict without a prefix; its module versions, by which old files are upgraded, go along."""
    result = OrderedDict((key.removeprefix(prefix), value) for key, value in tensors.items())
    versions = getattr(tensors, "_metadata", None)
    if isinstance(versions, Mapping):
        kept = ((f"{key}.".removeprefix(prefix).removesuffix("."), value) for key, value in versions.items())
        result._metadata = OrderedDict(kept)  # type: ignore[attr-defined]
    return result


def _load_strictly(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path, full: str) -> None:
    try:
        try:
            model.load_state_dict(tensors, strict=True)
        except (
            ValueError
        ):  # torchvision's MnasNet asks for its module's version, which safetensors do not keep
            today = OrderedDict(tensors)
            today._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
            model.load_state_dict(today, strict=True)
    except (RuntimeError, ValueError) as error:
        raise UnknownModelError(
            f"{path} does not fit {full}: {_misfit(model.state_dict(), tensors)}"
        ) from error


def _misfit(wanted: Mapping[str, Any], given: Mapping[str, torch.Tensor]) -> str:
    """What differs between two state dicts, in one sentence, with the fix for another class count."""
    missing = [key for key in wanted if key not in given]
    surplus = [key for key in given if key not in wanted]
    other = [key for key in wanted if key in given and tuple(wanted[key].shape) != tuple(given[key].shape)]
    if other and not missing and not surplus and _is_head(other, wanted, given):
        key = other[-1]
        return (
            f"its head has {given[key].shape[0]} classes ({key}), the model's has {wanted[key].shape[0]}; "
            f"build the model with num_classes={given[key].shape[0]} (--num-classes {given[key].shape[0]})"
        )
    said = []
    if missing:
        said.append(f"{len(missing)} keys of the model are missing ({listed(missing)})")
    if surplus:
        said.append(f"{len(surplus)} keys are unknown to the model ({listed(surplus)})")
    if other:
        key = other[0]
        said.append(
            f"{len(other)} tensors have another shape ({key}: {tuple(given[key].shape)} in the file, "
            f"{tuple(wanted[key].shape)} in the model)"
        )
    return "; ".join(said) or "its tensors cannot be copied"


def _is_head(other: list[str], wanted: Mapping[str, Any], given: Mapping[str, torch.Tensor]) -> bool:
    """Only first dimensions differ, all in the same way: the number of classes."""
    changes = {(wanted[key].shape[:1], given[key].shape[:1]) for key in other}
    return len(changes) == 1 and all(wanted[key].shape[1:] == given[key].shape[1:] for key in other)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:299]}…"
