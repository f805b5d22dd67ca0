"""Delta files: the blocks, where they sit, and every tensor that training may have changed.

A delta is one safetensors file; nothing in it is ever imported, evaluated or fetched. Its metadata
(JSON) holds the rules as they were resolved, site by site, and a fingerprint of the base model: the
keys, shapes and dtypes of all its tensors, and a hash of the value of each tensor that is *not* in the
file. `load` compares all of that before it touches the model. A SHA-256 of each tensor in the file, with its
name, dtype and shape, stands in the metadata, and one of the metadata itself: damage anywhere is seen.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attninject import adapters, api, hub, plugins, site_rules, switching
from attninject.delta_file import (
    FORMAT,
    DeltaFile,
    detached,
    digest_of,
    metadata,
    prefixes,
    read,
    save_tensors,
    signature,
)  # fmt: skip
from attninject.errors import DeltaError, UnsupportedModelError
from attninject.files import installed_versions, replacing
from attninject.planning import support
from attninject.planning.plan import Plan
from attninject.surgery import change_history, injected_state
from attninject.wording import listed


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
    again = prefixes(site for site in sites if "shares" in site)
    state = {key: t for key, t in _tensors(model).items() if not key.startswith(again)}  # a shared block once
    chosen = set(state) if changed is None else _chosen(model, state).union(changed)
    record = {
        "format": FORMAT,
        "versions": installed_versions(("attninject", "torch", "torchvision", "timm")),
        "base": base or _timm_name(model),
        **({"plugins": plugins.names()} if plugins.names() else {}),
        "sites": sites,
        "fingerprint": _fingerprint(state, chosen, prefixes(sites)),
    }
    tensors = detached({key: state[key] for key in sorted(chosen)})
    target = Path(path)
    try:
        with replacing(target) as temporary:
            save_tensors(tensors, temporary, metadata(record, tensors))
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"{target} cannot be written: {error}") from error


def load(
    base_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    strict_base: bool = True,
    example_inputs: Any = None,
) -> nn.Module:
    """Inject a delta file's blocks into its base model and load its tensors; returns the same model.

    Everything is checked first: a damaged file, a base that is not the one that the file was made
    from, or a block that is not registered raises, and the model is as it was.

    With a name, several deltas share one base. The first is active; each later one waits for `activate`. What a named
    delta trained beside its blocks are tensors of its own, and its head may have other classes than the base's.

    Args:
        base_model: without blocks, or with those of named deltas; its own checkpoint loaded.
        path: a file of `save`, a folder that holds one (a run's too), or a repository: `hf-hub:user/name@revision`.
        name: what the delta is called; None: it has the model for itself.
        strict_base: False lets other values and dtypes of the base pass (what is in the file must fit).
        example_inputs: see `plan`; needed where the injection needed them.

    Raises:
        DeltaError: with what differs.
        HubError: the repository or its file cannot be had.
    """
    file = read(hub.delta_of(path))
    if name is None:
        if names := switching.names(base_model):
            raise DeltaError(
                f"the model has named deltas ({', '.join(names)}): give {path} a name too (name=…)"
            )
        _load(base_model, file, strict_base, example_inputs)
        return base_model
    shapes = {key: tuple(file.tensors[key].shape) for key in file.of_base}
    with switching.added(base_model, name, shapes):
        _load(base_model, file, strict_base, example_inputs)
    return base_model


def _load(model: nn.Module, file: DeltaFile, strict: bool, example_inputs: Any) -> None:
    _check_base(model, file, strict)
    plan = _plan(model, file, example_inputs)
    api.carry_out(model, plan)
    try:
        _check_blocks(model, file, strict)
    except BaseException:
        api.eject(model)
        raise
    targets = _tensors(model)
    with torch.no_grad():
        for key, value in file.tensors.items():
            targets[key].copy_(value)  # in place: the tensor object and its memory format stay


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
    kept, own = change_history.kept_by_freeze(model), switching.own_keys(model)

    def may_differ(key: str) -> bool:
        if key in own or key in kept:
            return key in own
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


def _fingerprint(
    state: Mapping[str, torch.Tensor], chosen: Collection[str], of_blocks: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """What `load` compares a base with: all its tensors, and the values of those outside the file."""
    return {
        "tensors": {key: signature(t) for key, t in state.items() if not key.startswith(of_blocks)},
        "values": {key: digest_of(t) for key, t in state.items() if key not in chosen},
    }


def _timm_name(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, dict) else None
    return f"timm/{architecture}" if isinstance(architecture, str) and architecture else None


# --- what a file must fit -----------------------------------------------------------------------


def _check_base(model: nn.Module, file: DeltaFile, strict: bool) -> None:
    """Compare the base with the fingerprint, and the file's base tensors with the base."""
    path, record, in_file = file.path, file.record, file.of_base
    if api.injected(model):
        raise DeltaError(
            f"the model already carries injected blocks; load {path} into a clean base (ai.eject)"
        )
    state = _tensors(model)
    here = {key: signature(t) for key, t in state.items()}
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
        other = [key for key, digest in values.items() if digest_of(state[key]) != digest]
        if other:
            said = f"{len(other)} of {len(values)} frozen tensors have other values ({listed(other)})"
    if said:
        made_for = f" ({record['base']})" if isinstance(record.get("base"), str) else ""
        raise DeltaError(
            f"{path} was made from another base model{made_for}: {said}; the model is unchanged"
            + ("; strict_base=False ignores values and dtypes of the base" if strict else "")
        )


def _plan(model: nn.Module, file: DeltaFile, example_inputs: Any) -> Plan:
    """The record's rules resolved on this model: the same names in the same layouts, and no larger."""
    record = file.record
    plan = site_rules.planned(
        model, record["sites"], file.path, example_inputs, made_with=record.get("plugins", ())
    )
    for site in plan.sites:
        held = [t.numel() for key, t in file.tensors.items() if key.startswith(f"{site.name}.")]
        if site.parameters > sum(held):
            raise DeltaError(
                f"{file.path}: {site.name} needs {site.parameters:,} parameters, the file has fewer"
            )
    return plan


def _check_blocks(model: nn.Module, file: DeltaFile, strict: bool) -> None:
    """Compare the injected blocks' tensors with the file's, name by name."""
    of_blocks = prefixes(file.record["sites"])
    again = prefixes(site for site in file.record["sites"] if site.get("shares"))
    tensors = {key: t for key, t in _tensors(model).items() if not key.startswith(again)}
    made = {key: signature(t) for key, t in tensors.items() if key.startswith(of_blocks)}
    held = file.of_blocks
    if not strict:
        made = {key: _shape_of(s) for key, s in made.items()}
        held = {key: _shape_of(s) for key, s in held.items()}
    said = _differences(held, made, both_ways=True)
    if said:
        raise DeltaError(
            f"{file.path} does not fit the blocks that its own recipe makes: {said}; the model is unchanged"
        )


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


def _shape_of(signature: str) -> str:
    return signature.partition(" ")[2]
