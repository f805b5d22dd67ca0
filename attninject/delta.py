"""Delta files: the blocks, where they sit, and every tensor that training may have changed.

A delta is one safetensors file; nothing in it is ever imported, evaluated or fetched. Its metadata
(JSON) holds the rules as they were resolved, site by site, and a fingerprint of the base model: the
keys, shapes and dtypes of all its tensors, and a hash of the value of each tensor that is *not* in the
file. `load` compares all of that before it touches the model. A SHA-256 of each tensor in the file, with its
name, dtype and shape, stands in the metadata, and one of the metadata itself: damage anywhere is seen.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attninject import adapters, api, hub, site_rules
from attninject.errors import AttnInjectError, DeltaError, UnsupportedModelError
from attninject.files import digest, installed_versions, raw_bytes, replacing, seal_holds, sealed
from attninject.planning import support
from attninject.planning.plan import Plan
from attninject.surgery import change_history, injected_state
from attninject.wording import listed

FORMAT = 1
METADATA_KEY = "attninject"
MAX_METADATA_BYTES = 64 * 2**20

DTYPES = {  # safetensors' codes in torch's words
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip


def save(model: nn.Module, path: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Write the injected blocks and every tensor that training may have changed to one file.

    In the file: the blocks' parameters and buffers; every base parameter that requires grad, or was
    trained between the injection and its freezing; every base buffer except those of norms that `freeze`
    holds in eval; the rules as resolved; a fingerprint of the base. `base` is the base model's name, for
    messages. The file appears whole or not at all.

    Wrappers are looked through: DDP, torch.compile, an average of weights (`AveragedModel`, `ModelEmaV3`), which
    is saved whole, and any module that only holds the model. Of a `PeftModel` a copy is saved with its adapters
    merged: `load` gives what `merge_and_unload()` would.
    """
    from safetensors import SafetensorError

    model, changed = _plain(model)
    sites = site_rules.recorded(model)
    if not sites:
        raise DeltaError("the model has no injected blocks, so there is nothing to save: inject first")
    state = _tensors(model)
    chosen = set(state) if changed is None else _chosen(model, state).union(changed)
    record = {
        "format": FORMAT,
        "versions": installed_versions(("attninject", "torch", "torchvision", "timm")),
        "base": base or _timm_name(model),
        "sites": sites,
        "fingerprint": _fingerprint(state, chosen, _prefixes(sites)),
    }
    tensors = detached({key: state[key] for key in sorted(chosen)})
    target = Path(path)
    try:
        with replacing(target) as temporary:
            save_tensors(tensors, temporary, metadata(record, tensors))
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"{target} cannot be written: {error}") from error


def metadata(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A record as it stands in a file with these tensors: with a digest of each, and one of itself."""
    digests = {key: _digest_of_entry(key, t) for key, t in tensors.items()}
    text = json.dumps({**record, "digests": digests}, default=dict)  # frozen mappings among the arguments
    return {METADATA_KEY: sealed(text)}


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file for whom the umask allows; safetensors itself writes for the owner only."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def load(
    base_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict_base: bool = True,
    example_inputs: Any = None,
) -> nn.Module:
    """Inject a delta file's blocks into its base model and load its tensors; returns the same model.

    Everything is checked first: a damaged file, a base that is not the one that the file was made
    from, or a block that is not registered raises, and the model is as it was.

    Args:
        base_model: without blocks; its own checkpoint loaded.
        path: a file of `save`, a folder that holds one (a run's too), or a repository: `hf-hub:user/name@revision`.
        strict_base: False lets other values and dtypes of the base pass (what is in the file must fit).
        example_inputs: see `plan`; needed where the injection needed them.

    Raises:
        DeltaError: with what differs.
        HubError: the repository or its file cannot be had.
    """
    file_path = hub.delta_of(path)
    with _opened(file_path) as file:
        record = _record(file, file_path)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        _check_digests(tensors, record, file_path)
        signatures = {key: _slice_signature(file, key) for key in tensors}
        _check_base(base_model, record, signatures, file_path, strict_base)
        plan = _plan(base_model, record, signatures, file_path, example_inputs)
    api.carry_out(base_model, plan)
    try:
        _check_blocks(base_model, record, signatures, file_path, strict_base)
    except BaseException:
        api.eject(base_model)
        raise
    targets = _tensors(base_model)
    with torch.no_grad():
        for key, value in tensors.items():
            targets[key].copy_(value)  # in place: the tensor object and its memory format stay
    return base_model


# --- what goes into a file ----------------------------------------------------------------------


def _plain(model: nn.Module) -> tuple[nn.Module, Collection[str] | None]:
    """The model that the blocks were injected into, and keys of tensors that changed unseen; None: any may have."""
    layers = list(support.wrapped(model))
    inner, changed = layers[-1], frozenset[str]()
    try:
        merged = adapters.merged(inner)
    except UnsupportedModelError as error:
        raise DeltaError(str(error)) from error
    if merged is not None:
        inner, changed = merged.model, merged.changed
    return _holder_of_sites(inner), None if any(map(support.averages, layers)) else changed


def _holder_of_sites(model: nn.Module) -> nn.Module:
    """The module that the sites' names begin at; another one if the model was put into it since.

    Raises:
        DeltaError: what is around the model has tensors of its own, which the file would not hold.
    """
    found = [(name, site.name) for name, site in injected_state.sites_of(model).items() if site is not None]
    prefixes = {name.removesuffix(own) if name.endswith(f".{own}") else "" for name, own in found}
    if len(prefixes) != 1 or prefixes == {""}:
        return model
    path = prefixes.pop()
    others = [key for key in _tensors(model) if not key.startswith(path)]
    if others:
        name = path.rstrip(".")
        raise DeltaError(
            f"the blocks were injected into what is now {name} of {type(model).__name__}, which has tensors of its "
            f"own ({listed(others)}): a delta holds one model, so save that one: ai.save(model.{name}, …)"
        )
    return model.get_submodule(path.rstrip("."))


def _chosen(model: nn.Module, state: Mapping[str, torch.Tensor]) -> set[str]:
    """Keys that the file holds: blocks, and whatever training may have changed since injection."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    blocks = tuple(f"{name}." for name in api.injected(model))
    kept = change_history.kept_by_freeze(model)

    def may_differ(key: str) -> bool:
        if key in kept:
            return False
        parameter = parameters.get(key)
        if parameter is None or parameter.requires_grad:
            return True
        module = model.get_submodule(key.rpartition(".")[0])
        frozen = module.__dict__.get(change_history.FROZEN, {}).get(key.rpartition(".")[2], False)
        return bool(frozen) or change_history.changed_since_injection(parameter, unknown=False)

    return {key for key in state if key.startswith(blocks) or may_differ(key)}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict's tensors; extra state that is no tensor belongs to the base alone."""
    return {key: t for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


def detached(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, contiguous, on the CPU, none sharing memory with another, as safetensors demands."""
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        pointer = flat.untyped_storage().data_ptr()
        whole = flat.untyped_storage().nbytes() == flat.numel() * flat.element_size()
        result[key] = flat if whole and pointer not in seen else flat.clone()
        seen.add(pointer)
    return result


def _prefixes(sites: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the keys of the blocks' tensors begin with."""
    return tuple(f"{site['qualified']}." for site in sites)


def _signature(tensor: torch.Tensor) -> str:
    """`float32 64x3x7x7`: what the fingerprint says of a tensor besides its value."""
    return _described(str(tensor.dtype).removeprefix("torch."), tensor.shape)


def _described(dtype: str, shape: Iterable[int]) -> str:
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'}"


def _digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in logical order, whatever its strides."""
    return digest(raw_bytes(tensor))


def _digest_of_entry(key: str, tensor: torch.Tensor) -> str:
    """SHA-256 of all that a file says of a tensor: its name, dtype, shape and bytes."""
    return digest(f"{key}\n{_signature(tensor)}\n", raw_bytes(tensor))


def _fingerprint(
    state: Mapping[str, torch.Tensor], chosen: Collection[str], prefixes: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """What `load` compares a base with: all its tensors, and the values of those outside the file."""
    return {
        "tensors": {key: _signature(t) for key, t in state.items() if not key.startswith(prefixes)},
        "values": {key: _digest(t) for key, t in state.items() if key not in chosen},
    }


def _timm_name(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, dict) else None
    return f"timm/{architecture}" if isinstance(architecture, str) and architecture else None


# --- what is read and believed ------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file behind safetensors' own header check; whatever is wrong with it is a `DeltaError`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DeltaError(f"no delta file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DeltaError(
            f"{path} is damaged or no safetensors file ({error}); it was not loaded, the model is unchanged"
        ) from error


def _record(file: Any, path: Path) -> dict[str, Any]:
    """The metadata of a file, checked to have the form that `save` writes."""
    text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        raise DeltaError(f"{path} is a safetensors file, but no delta of attninject: it has no recipe inside")
    try:
        if len(text) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata over {MAX_METADATA_BYTES} bytes")
        intact = seal_holds(text)
        if intact is False:
            raise ValueError("it is not what was saved")
        record: dict[str, Any] = json.loads(text)
        if record["format"] != FORMAT:
            raise DeltaError(
                f"{path} has delta format {record['format']!r}, this attninject reads {FORMAT}; "
                f"it was written by attninject {record.get('versions', {}).get('attninject', 'unknown')}"
            )
        _check_form(record)
        if intact is None and "digests" in record:
            raise ValueError("its own digest is gone")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, AttnInjectError):
            raise
        raise DeltaError(
            f"{path}: its metadata is damaged ({type(error).__name__}: {error}); the model is unchanged"
        ) from error
    return record


def _check_form(record: Mapping[str, Any]) -> None:
    fingerprint = record["fingerprint"]
    held = {f"fingerprint.{part}": fingerprint[part] for part in ("tensors", "values")}
    for name, texts in {**held, "digests": record.get("digests", {})}.items():
        if not all(isinstance(v, str) for v in texts.values()):
            raise ValueError(f"{name} holds something that is no text")
    site_rules.check_form(record["sites"])


def _check_digests(tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any], path: Path) -> None:
    """Compare each tensor with its digest; a file from before there were any is let pass with a warning."""
    expected = record.get("digests")
    if expected is None:
        warnings.warn(
            f"{path} was written by an earlier attninject and holds no digests, so damage to its tensors would not "
            f"be seen; to renew it, ai.load it and ai.save the model again",
            UserWarning,
            stacklevel=3,
        )
        return
    missing = [key for key in expected if key not in tensors]
    surplus = [key for key in tensors if key not in expected]
    other = [k for k, t in tensors.items() if k in expected and expected[k] != _digest_of_entry(k, t)]
    said = []
    if missing:
        said.append(f"{listed(missing)} is not in it any more")
    if surplus:
        said.append(f"{listed(surplus)} was not in it when it was saved")
    if other:
        said.append(f"the values of {listed(other)} are not those that were saved")
    if said:
        raise DeltaError(f"{path} is damaged: {'; '.join(said)}; the model is unchanged")


def _slice_signature(file: Any, key: str) -> str:
    piece = file.get_slice(key)
    return _described(DTYPES.get(piece.get_dtype(), piece.get_dtype()), piece.get_shape())


def _check_base(
    model: nn.Module, record: Mapping[str, Any], signatures: Mapping[str, str], path: Path, strict: bool
) -> None:
    """Compare the base with the fingerprint, and the file's base tensors with the base."""
    if api.injected(model):
        raise DeltaError(
            f"the model already carries injected blocks; load {path} into a clean base (ai.eject)"
        )
    state = _tensors(model)
    prefixes = _prefixes(record["sites"])
    here = {key: _signature(t) for key, t in state.items()}
    in_file = {key: s for key, s in signatures.items() if not key.startswith(prefixes)}
    expected = record["fingerprint"]["tensors"] if strict else {}
    values = record["fingerprint"]["values"]
    if strict and set(values) != set(expected) - set(in_file):
        raise DeltaError(
            f"{path}: its fingerprint does not cover the tensors outside the file; it is damaged"
        )
    said = _differences(expected, here, both_ways=strict)
    fits = in_file if strict else {key: _shape_of(s) for key, s in in_file.items()}
    said = said or _differences(fits, here if strict else {k: _shape_of(s) for k, s in here.items()})
    if not said and strict:
        other = [key for key, digest in values.items() if _digest(state[key]) != digest]
        if other:
            said = f"{len(other)} of {len(values)} frozen tensors have other values ({listed(other)})"
    if said:
        made_for = f" ({record['base']})" if isinstance(record.get("base"), str) else ""
        raise DeltaError(
            f"{path} was made from another base model{made_for}: {said}; the model is unchanged"
            + ("; strict_base=False ignores values and dtypes of the base" if strict else "")
        )


def _plan(
    model: nn.Module,
    record: Mapping[str, Any],
    signatures: Mapping[str, str],
    path: Path,
    example_inputs: Any,
) -> Plan:
    """The record's rules resolved on this model: the same names in the same layouts, and no larger."""
    plan = site_rules.planned(model, record["sites"], path, example_inputs)
    for site in plan.sites:
        held = [_shape_of(s) for key, s in signatures.items() if key.startswith(f"{site.name}.")]
        if site.parameters > sum(_count(shape) for shape in held):
            raise DeltaError(f"{path}: {site.name} needs {site.parameters:,} parameters, the file has fewer")
    return plan


def _differences(expected: Mapping[str, str], here: Mapping[str, str], both_ways: bool = False) -> str:
    """What the file expects and the model has otherwise, in one sentence; empty if nothing."""
    missing = [key for key in expected if key not in here]
    surplus = [key for key in here if key not in expected] if both_ways else []
    other = [key for key in expected if key in here and expected[key] != here[key]]
    said = []
    if missing:
        said.append(f"{len(missing)} of its tensors are not in this model ({listed(missing)})")
    if surplus:
        said.append(f"{len(surplus)} tensors of this model are unknown to it ({listed(surplus)})")
    if other:
        said.append(
            f"{len(other)} differ ({other[0]}: {expected[other[0]]} in the file, {here[other[0]]} here)"
        )
    return "; ".join(said)


def _check_blocks(
    model: nn.Module, record: Mapping[str, Any], signatures: Mapping[str, str], path: Path, strict: bool
) -> None:
    """Compare the injected blocks' tensors with the file's, name by name."""
    prefixes = _prefixes(record["sites"])
    made = {key: _signature(t) for key, t in _tensors(model).items() if key.startswith(prefixes)}
    held = {key: s for key, s in signatures.items() if key.startswith(prefixes)}
    if not strict:
        made = {key: _shape_of(s) for key, s in made.items()}
        held = {key: _shape_of(s) for key, s in held.items()}
    said = _differences(held, made, both_ways=True)
    if said:
        raise DeltaError(
            f"{path} does not fit the blocks that its own recipe makes: {said}; the model is unchanged"
        )


def _shape_of(signature: str) -> str:
    return signature.partition(" ")[2]


def _count(shape: str) -> int:
    return math.prod(int(extent) for extent in shape.split("x")) if shape != "scalar" else 1
