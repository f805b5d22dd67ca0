"""Blocks in models that `save_pretrained` writes and `from_pretrained` reads.

`from_pretrained` makes the net from its config, so the blocks ride there: `config.attninject` holds each as a rule,
plain data that goes into `config.json` wherever the library writes one, in a Trainer's checkpoints too. The tensors
are in the weights' file already. Nothing in the record is imported, evaluated or fetched; blocks go by their names.
"""

from __future__ import annotations

import json
from typing import Any, Unpack

import torch
from torch import nn

from attninject import api, site_rules
from attninject.errors import DeltaError
from attninject.observe.snapshot import rng_kept
from attninject.planning.support import unwrapped
from attninject.recipe.loading import RecipeLike
from attninject.recipe.rules import RuleFields, explains_fields
from attninject.surgery import injected_state
from attninject.wording import listed

FORMAT = 1
KEY = "attninject"  # attribute of the config
HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


@explains_fields
def inject(
    model: nn.Module,
    recipe: RecipeLike | None = None,
    *,
    root: str = "",
    example_inputs: Any = None,
    strict: bool = True,
    **rule: Unpack[RuleFields],
) -> nn.Module:
    """`ai.inject`, and `remember`: returns the same model, ready for `save_pretrained` and for a Trainer.

    Args:
        model: a `PreTrainedModel`.
        recipe: see `plan`.
        root: see `plan`.
        example_inputs: see `plan`.
        strict: see `plan`.
        **rule: see `plan`:
    """
    found = api.plan(model, recipe, root=root, example_inputs=example_inputs, strict=strict, **rule)
    return remember(api.carry_out(model, found))


def remember(model: nn.Module) -> nn.Module:
    """Write the blocks that the model carries now into its config, and none if it has none; returns the same model.

    Raises:
        DeltaError: the blocks were injected into a part of the model, before it was one, or cannot be named.
    """
    inner: Any = unwrapped(model)
    sites = site_rules.recorded(inner)
    elsewhere = [n for n, s in zip(api.injected(inner), sites, strict=True) if n != s["qualified"]]
    if elsewhere:
        raise DeltaError(
            f"{listed(elsewhere)}: injected into a part of {type(inner).__name__} on its own; inject into the whole "
            f"model, with root= for the part"
        )
    if sites:
        record = {"format": FORMAT, "sites": sites}
        setattr(
            inner.config, KEY, json.loads(json.dumps(record, default=dict))
        )  # frozen mappings among the arguments
    elif hasattr(inner.config, KEY):
        delattr(inner.config, KEY)
    return model


def from_pretrained(
    kind: Any,
    name: Any,
    *args: Any,
    example_inputs: Any = None,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """`kind.from_pretrained(name, …)` with the blocks that the config tells of, and their tensors.

    Args:
        kind: the class that was saved, or an `AutoModelFor…`.
        name: a folder, or a repository's name.
        *args: go on to `kind.from_pretrained`.
        example_inputs: see `plan`; needed where the injection needed them.
        output_loading_info: as there: a pair with what was missing and unexpected.
        **options: go on to `kind.from_pretrained`.

    Raises:
        DeltaError: the config tells of no blocks, of blocks that do not fit the model, or the weights lack theirs.
    """
    config = options.pop("config", None) or _config(name, options)
    sites = _sites(config, name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        with torch.device(
            "meta"
        ):  # one of the Auto classes: it alone knows which class this config stands for
            kind = type(kind.from_config(config))
    making = _making_blocks(kind, sites, f"the config of {name}", example_inputs)
    model, info = making.from_pretrained(name, *args, config=config, output_loading_info=True, **options)
    _fill_buffers(model)
    blocks = tuple(f"{block}." for block in api.injected(model))
    if missing := [key for key in info["missing_keys"] if key.startswith(blocks)]:
        raise DeltaError(
            f"the weights of {name} have no tensors for {listed(sorted(missing))}, of which the config tells: it is "
            f"that of another model, or was written before blocks were ejected (remember(model) renews it)"
        )
    return (model, info) if output_loading_info else model


def _making_blocks(kind: Any, sites: list[dict[str, Any]], source: str, example_inputs: Any) -> Any:
    """A subclass whose constructor gives a `kind` with blocks: the library then loads them with all the rest."""

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        self.__class__ = kind
        with torch.device("cpu"):  # the library makes its nets under "meta", where planning could not count
            api.carry_out(self, site_rules.planned(self, sites, source, example_inputs))

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__init__": construct}
    return type(kind.__name__, (kind,), named)


def _fill_buffers(model: nn.Module) -> None:
    """Give blocks what they have beside their state dict, which the library leaves empty: that of blocks made anew."""
    sites = injected_state.sites_of(model)
    for name, block in api.injected(model).items():
        kept = block.state_dict()
        if beside := [key for key, _ in block.named_buffers() if key not in kept]:
            site = sites[name]
            with rng_kept():
                fresh = api.create_block(
                    site.block, site.channels, init=site.init, dims=site.layout.dims, **site.args
                )
            for key in beside:
                block.get_buffer(key).copy_(fresh.get_buffer(key))


def _config(name: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, **{key: options[key] for key in HUB if key in options})


def _sites(config: Any, name: Any) -> list[dict[str, Any]]:
    """The sites that a config tells of, checked to have the form that `remember` writes."""
    record = getattr(config, KEY, None)
    if record is None:
        raise DeltaError(
            f"the config of {name} tells of no blocks: they go there by attninject.integrations.transformers.inject, "
            f"or by remember(model) before save_pretrained"
        )
    try:
        if record["format"] != FORMAT:
            raise DeltaError(
                f"the config of {name} has blocks in format {record['format']!r}, this attninject reads {FORMAT}"
            )
        sites: list[dict[str, Any]] = record["sites"]
        site_rules.check_form(sites)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DeltaError):
            raise
        raise DeltaError(
            f"the config of {name}: what it tells of blocks is damaged ({type(error).__name__}: {error})"
        ) from error
    return sites
