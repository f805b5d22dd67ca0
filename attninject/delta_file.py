"""A delta's file: tensors with a sealed record beside them, and what is believed when one is read.

Nothing in it is ever imported, evaluated or fetched.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attninject import site_rules
from attninject.errors import AttnInjectError, DeltaError
from attninject.files import digest, raw_bytes, seal_holds, sealed
from attninject.wording import listed

FORMAT = 1
METADATA_KEY = "attninject"
MAX_METADATA_BYTES = 64 * 2**20


# --- writing ----------------------------------------------------------------------------------


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


def signature(tensor: torch.Tensor) -> str:
    """`float32 64x3x7x7`: what the fingerprint says of a tensor besides its value."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def prefixes(sites: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the keys of the blocks' tensors begin with."""
    return tuple(f"{site['qualified']}." for site in sites)


def digest_of(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes in logical order, whatever its strides."""
    return digest(raw_bytes(tensor))


def _digest_of_entry(key: str, tensor: torch.Tensor) -> str:
    """SHA-256 of all that a file says of a tensor: its name, dtype, shape and bytes."""
    return digest(f"{key}\n{signature(tensor)}\n", raw_bytes(tensor))


# --- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeltaFile:
    """What stands in a file. `signatures`: of each tensor, as in the fingerprint."""

    path: Path
    record: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    signatures: Mapping[str, str]

    @property
    def of_blocks(self) -> dict[str, str]:
        """The signatures of the blocks' tensors."""
        return {k: s for k, s in self.signatures.items() if k.startswith(prefixes(self.record["sites"]))}

    @property
    def of_base(self) -> dict[str, str]:
        """The signatures of the other tensors, which are the base's."""
        return {k: s for k, s in self.signatures.items() if not k.startswith(prefixes(self.record["sites"]))}


def read(path: Path) -> DeltaFile:
    """The content of a file of `save`, checked against its digests.

    Raises:
        DeltaError: no such file, another one, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DeltaError(f"no delta file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            record = _record(file, path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DeltaError(
            f"{path} is damaged or no safetensors file ({error}); it was not loaded, the model is unchanged"
        ) from error
    _check_digests(tensors, record, path)
    return DeltaFile(path, record, tensors, {key: signature(t) for key, t in tensors.items()})


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
    if not all(isinstance(name, str) for name in record.get("plugins", ())):
        raise ValueError("plugins holds something that is no text")
    site_rules.check_form(record["sites"])


def _check_digests(tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any], path: Path) -> None:
    """Compare each tensor with its digest; a file from before there were any is let pass with a warning."""
    expected = record.get("digests")
    if expected is None:
        warnings.warn(
            f"{path} was written by an earlier attninject and holds no digests, so damage to its tensors would not "
            f"be seen; to renew it, ai.load it and ai.save the model again",
            UserWarning,
            stacklevel=4,
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
