"""The error tree: every error of the library derives from `AttnInjectError` and from a builtin.

An error names the rule or site it speaks of, what was expected, what was found, and the fix.
"""

from __future__ import annotations

from dataclasses import dataclass


class AttnInjectError(Exception):
    """Base of every error that attninject raises on purpose."""


# --- text: patterns, recipes, blocks ----------------------------------------------------------


class PatternError(AttnInjectError, ValueError):
    """A pattern that does not parse, is too long, or uses a refused regular-expression feature."""


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a recipe: where (1-based line and column, None without a file) and what."""

    message: str
    file: str | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        where = ":".join(str(p) for p in (self.file, self.line, self.column) if p is not None)
        return f"{where}: {self.message}" if where else self.message


class RecipeError(AttnInjectError, ValueError):
    """A recipe with faults; all of them are in `faults`, one per line of the message."""

    def __init__(self, faults: list[Fault] | tuple[Fault, ...]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(f) for f in self.faults))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)


class UnknownBlockError(AttnInjectError, LookupError):
    """No block of that name is registered."""


class BlockError(AttnInjectError, ValueError):
    """A block's argument is unknown, of the wrong type, or out of its range."""


class TooFewChannelsError(BlockError):
    """The block cannot be built for so few channels, or for channels that do not divide."""


# --- models -----------------------------------------------------------------------------------


class UnsupportedModelError(AttnInjectError, TypeError):
    """The model is wrapped, scripted, compiled, quantized, or otherwise not open to surgery."""


class UnknownModelError(AttnInjectError, LookupError):
    """No model of that name, or its weights cannot be had."""


class ProbeError(AttnInjectError, RuntimeError):
    """The model could not be run to see its calls and shapes; give `example_inputs`."""


class TraceRefused(AttnInjectError, RuntimeError):
    """An owner has no faithful local graph; the text says why (it becomes a site's `reason`)."""


class RebuiltModelWarning(UserWarning):
    """The model's own trainer or loader makes it anew from a config, without the blocks; the text says what to do."""


# --- plans ------------------------------------------------------------------------------------


class PlanError(AttnInjectError, ValueError):
    """A rule cannot be carried out on this model."""


class NoMatchError(PlanError, LookupError):
    """A rule's pattern matches no module or operation; the nearest names are given."""


class AllExcludedError(PlanError):
    """A rule matched, but its filters (type, exclude, stages, min_channels, pick) left nothing."""


class NoSuchPlaceError(PlanError, LookupError):
    """The model has no such place; the places that it has are named."""


class NotCalledError(PlanError):
    """The matched module is never called in the model's forward."""


class SeveralCallsError(PlanError):
    """The matched module is called several times in one run of its owner and `call` is not given."""


class NoTensorError(PlanError, TypeError):
    """The site's value is no floating-point tensor, and `output` does not point at one."""


class LayoutError(PlanError):
    """The block's mathematics has no meaning in the layout found at the site."""


class UnusableNameError(PlanError):
    """The name of the new module is that of an attribute of its carrier's class."""


class InPlaceHazardError(PlanError):
    """An in-place operation changes a value that others read; no identity could keep the function."""


class CannotRewriteError(PlanError):
    """Neither a local graph nor a carrier serves this site; the message says why."""


class IdentityError(PlanError):
    """A foreign block is not the identity at init, and neither `paper` nor `blend` was asked for."""


class ForeignPlanError(PlanError):
    """The plan was made for another model."""


class StalePlanError(PlanError):
    """The model has changed since the plan was made."""


class VerificationError(AttnInjectError, RuntimeError):
    """`verify=True` found outputs that differ before and after injection; the model was restored."""


# --- files ------------------------------------------------------------------------------------


class HubError(AttnInjectError, OSError):
    """A repository or its files cannot be had, or nothing can be put there."""


class DeltaError(AttnInjectError, ValueError):
    """A delta file, or the record in a config, is damaged, hostile, or belongs to another base model."""


# --- training ---------------------------------------------------------------------------------


class NoHeadError(AttnInjectError, LookupError):
    """The model's head cannot be told from its backbone; name it with `head=`."""


class ExperimentError(RecipeError):
    """An experiment file or its flags with faults; all of them are in `faults`."""


class DataError(AttnInjectError, ValueError):
    """The images cannot be had: an empty folder, an unreadable file, classes that do not fit."""


class CheckpointError(AttnInjectError, ValueError):
    """A checkpoint is damaged, foreign, or of another run."""


class RunError(AttnInjectError, RuntimeError):
    """A run cannot begin or go on: its folder is taken or cannot be written, or it was interrupted."""


class NonFiniteError(RunError):
    """The loss or a weight became NaN or infinite; the message gives the step and the last good checkpoint."""


class PluginError(AttnInjectError, ImportError):
    """A plugin of the command line cannot be loaded, or fails while it is."""


class MissingPackageError(AttnInjectError, ImportError):
    """An optional package is not installed; the message gives the extra that brings it."""


class ExportError(AttnInjectError, RuntimeError):
    """A model cannot be exported, or what was exported computes something else."""


# --- evidence ---------------------------------------------------------------------------------


class PictureError(AttnInjectError, ValueError):
    """A picture cannot be made: no image, a position outside it, no blocks, or a folder that cannot be written."""
