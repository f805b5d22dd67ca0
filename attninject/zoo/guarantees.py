"""What injection promises, checked on one model: one function per promise, one finding per check.

Every check compares with the bare model as it was before; after `eject` the same model serves the next place.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attninject import api
from attninject.observe.example_inputs import Inputs
from attninject.observe.record import map_tensors
from attninject.planning.plan import Plan
from attninject.planning.planned_site import Site
from attninject.surgery import injected_state

from .subjects import Calls, quiet

OK, BARE, FAILED = "ok", "bare", "failed"

MEANING = {
    "untouched": "planning changes nothing",
    "kept": "the same keys, classes and tensor objects after injection",
    "eval": "bit-equal output in eval mode",
    "train": "bit-equal output and batch-norm statistics in train mode under one seed",
    "once": "each block called exactly once per call of its site",
    "gradient": "each block reached by a gradient",
    "deepcopy": "a deep copy is independent",
    "pickle": "saved and loaded whole, it computes the same",
    "eject": "the original again",
    "export": "torch.export gives a program with the same output",
    "compile": "torch.compile, in one graph where the bare model is, gives the same output",
}


class Broken(Exception):
    """A promise was not kept; the text says how."""


class BareCannot(Exception):
    """The bare model cannot do it either; the text says why."""


@dataclass(frozen=True)
class Finding:
    """The result of one check: `ok`, `bare` (the bare model cannot do it either), or `failed`."""

    status: str
    detail: str = ""

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return {"status": self.status, **({"detail": self.detail} if self.detail else {})}


def finding(check: Callable[[], None]) -> Finding:
    """Run one check."""
    try:
        check()
    except Broken as broken:
        return Finding(FAILED, str(broken))
    except BareCannot as reason:
        return Finding(BARE, str(reason))
    except Exception as error:
        return Finding(FAILED, told(error))
    return Finding(OK)


def told(error: BaseException, limit: int = 200) -> str:
    """An error on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# --- the bare model ----------------------------------------------------------------------------


def structure(model: nn.Module) -> list[tuple[Any, ...]]:
    """Name, identity, class and mode of every module."""
    return [(n, id(m), type(m), m.training) for n, m in model.named_modules(remove_duplicate=False)]


def on_meta(model: nn.Module) -> bool:
    """Whether the model was built without values."""
    return any(p.is_meta for p in model.parameters())


def tensors(model: nn.Module) -> dict[str, int]:
    """Identity of every parameter and buffer by name."""
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: id(t) for name, t in named}


def run_seeded(
    model: nn.Module, calls: Calls, training: bool, gradient: bool = False, seed: int = 0
) -> list[Tensor]:
    """The tensors that one forward gives, then those watched; every generator seeded and the inputs spared."""
    inputs = calls.inputs(training)
    given = map_tensors((inputs.args, inputs.kwargs), torch.clone)
    torch.manual_seed(seed)
    random.seed(seed)
    model.train(training)
    found: list[Tensor] = []
    watched: list[Tensor] = []
    hooks = []
    if calls.watched:
        part = model.get_submodule(calls.watched)
        hooks.append(part.register_forward_hook(lambda m, given, out: _note(out, watched)))
    try:
        with torch.set_grad_enabled(gradient):
            map_tensors(model(*given[0], **given[1]), found.append)
    finally:
        for hook in hooks:
            hook.remove()
    return found + watched


def _note(result: Any, into: list[Tensor]) -> None:
    map_tensors(result, into.append)


def difference(now: list[Tensor], before: list[Tensor]) -> str:
    """How two lists of tensors differ; "" when they are bit-equal."""
    if len(now) != len(before):
        return f"{len(now)} tensors instead of {len(before)}"
    for number, (a, b) in enumerate(zip(now, before, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"tensor {number} is {a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
        if not a.is_meta and not torch.equal(a, b):
            if not torch.isfinite(b).all():
                return f"tensor {number} of the bare model is not finite"
            far = (a.double() - b.double()).abs().max().item()
            return f"tensor {number} differs by up to {far:.3g}"
    return ""


class Bare:
    """What the bare model holds and computes, and how to bring it back there."""

    def __init__(self, model: nn.Module, calls: Calls | None) -> None:
        self.model, self.calls = model.eval(), calls
        self.on_meta = on_meta(model)
        self.values = calls is not None and not self.on_meta
        self.outputs: dict[bool, list[Tensor] | str] = {}
        self.buffers: list[Tensor] = []
        if calls:
            self.outputs[False] = self._run(
                False
            )  # first: some models make a buffer anew for another input size
        self.saved = [(b, b.detach().clone()) for b in model.buffers()]
        if calls:
            self.outputs[True] = self._run(True)
        self.restore()
        self.structure, self.tensors, self.keys = structure(model), tensors(model), list(model.state_dict())

    def _run(self, training: bool) -> list[Tensor] | str:
        """Its output, or why it has none. In train mode with gradients, as when it trains."""
        try:
            found = [t.detach() for t in run_seeded(self.model, self.called, training, training)]
        except Exception as error:
            return told(error)
        if training:
            self.buffers = [b.detach().clone() for b in self.model.buffers()]
        return found

    @property
    def called(self) -> Calls:
        """How the model is called."""
        assert self.calls is not None
        return self.calls

    def output(self, training: bool) -> list[Tensor]:
        """What it computes.

        Raises:
            BareCannot: it does not run in that mode.
        """
        found = self.outputs[training]
        if isinstance(found, str):
            raise BareCannot(found)
        return found

    def restore(self) -> None:
        """Eval mode, and every buffer as it was."""
        self.model.eval()
        with torch.no_grad():
            for buffer, saved in self.saved:
                buffer.copy_(saved)

    def compare(self, model: nn.Module, what: str = "the output") -> None:
        """The same output in eval mode.

        Raises:
            Broken: it differs.
        """
        wanted = self.output(False)
        if differs := difference(run_seeded(model, self.called, False), wanted):
            raise Broken(f"{what}: {differs}")


# --- one place ---------------------------------------------------------------------------------


class Counts:
    """Counts the calls of every injected block and of the module that it hangs on."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = dict(api.injected(model))
        self.of: dict[str, int] = {}
        self.handles: list[Any] = []
        for name, block in self.blocks.items():
            self._count(name, block)
        for carrier in dict.fromkeys(n.rpartition(".")[0] for n in self.blocks):
            self._count(carrier, model.get_submodule(carrier))

    def _count(self, name: str, module: nn.Module) -> None:
        def note(*_: Any) -> None:
            self.of[name] += 1

        self.of[name] = 0
        self.handles.append(module.register_forward_pre_hook(note))

    def __enter__(self) -> Counts:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def check(self) -> None:
        """As many calls of a block as of its carrier, and one at least.

        Raises:
            Broken: with the blocks whose counts are off.
        """
        off = []
        for name in self.blocks:
            calls, carrier = self.of[name], self.of[name.rpartition(".")[0]]
            if calls == 0 or calls != carrier:
                off.append(f"{name} {calls} times for {carrier} calls of its carrier")
        if off:
            raise Broken(f"called: {_some(off)}")


@dataclass
class Injected:
    """One plan carried out on a bare model, and the checks of it."""

    bare: Bare
    plan: Plan
    missing: dict[str, nn.Module] | None = (
        None  # blocks that no gradient reached when the training output was compared
    )

    @property
    def model(self) -> nn.Module:
        """The model with its blocks."""
        return self.bare.model

    def kept(self) -> None:
        """Keys, classes and tensor objects."""
        model, bare = self.model, self.bare
        now, keys = tensors(model), set(bare.keys)
        if {k: now.get(k) for k in bare.tensors} != bare.tensors:
            raise Broken("a parameter or buffer is another object")
        if [k for k in model.state_dict() if k in keys] != bare.keys:
            raise Broken("keys of the state dict are missing or moved")
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, identity, kind, training in bare.structure:
            module = modules.get(name)
            if module is None or id(module) != identity or module.training != training:
                raise Broken(f"module {name} is another object, or in another mode")
            if not isinstance(module, kind) or type(module).__name__ != kind.__name__:
                raise Broken(f"module {name} is of another class")
        if set(api.injected(model)) != {s.name for s in self.plan.sites}:
            raise Broken("the blocks injected are not those planned")

    def runs(self, training: bool) -> tuple[Finding, Finding]:
        """Findings on the output and on the calls in one mode."""
        bare = self.bare
        with Counts(self.model) as counts:
            output = finding(lambda: self._same_output(training))
        bare.restore()
        return output, output if output.status == BARE else finding(counts.check)

    def _same_output(self, training: bool) -> None:
        bare = self.bare
        wanted = bare.output(training)
        now = run_seeded(self.model, bare.called, training, gradient=training)
        if training and bare.values:
            with contextlib.suppress(
                Exception
            ):  # then `gradient` runs the model itself, and says what is wrong
                self.missing = _unreached(api.injected(self.model), _loss(now))
        if differs := difference([t.detach() for t in now], wanted):
            raise Broken(differs)
        if training and (differs := difference(self._base_buffers(), bare.buffers)):
            raise Broken(f"buffers: {differs}")

    def _base_buffers(self) -> list[Tensor]:
        return [b for b, _ in self.bare.saved]

    def gradient(self) -> None:
        """Some parameter of each block gets a gradient that is not zero; drop-path may take several draws."""
        bare = self.bare
        bare.output(True)
        missing = dict(api.injected(self.model)) if self.missing is None else self.missing
        for seed in range(4):
            if not missing:
                return
            training = seed < 3
            outputs = run_seeded(self.model, bare.called, training, gradient=True, seed=seed)
            missing = _unreached(missing, _loss(outputs))
            bare.restore()
        if not missing:
            return
        unread = self._unread([s for s in self.plan.sites if s.name in missing])
        if broken := [name for name in missing if name not in unread]:
            raise Broken(f"no gradient reaches {_some(broken)}")
        raise BareCannot(
            f"the bare model reads no position where the block is (only a class token): {_some(unread)}"
        )

    def _unread(self, sites: list[Site]) -> list[str]:
        """Blocks at whose site the bare model itself reads no position: those before a head of the class token.

        An operation has no hook: there the result of the module whose forward has it stands in.
        """
        bare = self.bare
        found: list[tuple[Site, Tensor]] = []  # of every call of the site's module

        def keep(site: Site, output: int | str | None) -> Callable[..., Any]:
            def hook(module: nn.Module, given: Any, result: Any) -> Any:
                return _with_copy(result, output, lambda copied: found.append((site, copied)))

            return hook

        def keep_given(site: Site) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
                given = {**dict(enumerate(args)), **kwargs}
                given = _with_copy(given, site.input or 0, lambda copied: found.append((site, copied)))
                return tuple(given[n] for n in range(len(args))), {k: given[k] for k in kwargs}

            return hook

        known = dict(self.model.named_modules())
        handles = []
        with injected_state.as_original(self.model):
            try:
                for s in sites:
                    if s.position == "before" and s.path in known:
                        hooked = known[s.path].register_forward_pre_hook(keep_given(s), with_kwargs=True)
                    else:
                        at, output = (s.path, s.output) if s.path in known else (s.owner, None)
                        hooked = known[at].register_forward_hook(keep(s, output))
                    handles.append(hooked)
                loss = _loss(run_seeded(self.model, bare.called, False, gradient=True))
            finally:
                for handle in handles:
                    handle.remove()
        if not found:
            return []
        gradients = torch.autograd.grad(loss, [copied for _, copied in found], allow_unused=True)
        bare.restore()
        read = {
            site.name
            for (site, _), gradient in zip(found, gradients, strict=True)
            if gradient is not None and (gradient[:, site.layout.prefix :] != 0).any()
        }
        return [site.name for site in sites if site.name not in read]

    def deepcopy(self) -> None:
        """The copy shares nothing with the original, and changing its blocks changes its output."""
        copied = copy.deepcopy(self.model)
        blocks = api.injected(copied)
        if list(blocks) != list(api.injected(self.model)):
            raise Broken("the copy has other blocks")
        if set(map(id, copied.modules())) & set(map(id, self.model.modules())):
            raise Broken("the copy shares modules with the original")
        if {t.data_ptr() for t in copied.parameters()} & {t.data_ptr() for t in self.model.parameters()} - {
            0
        }:
            raise Broken("the copy shares parameters with the original")
        if not self.bare.values:
            return
        _stir(blocks)
        wanted = self.bare.output(False)
        depends = difference(run_seeded(copied, self.bare.called, False), wanted)
        if not depends and not set(blocks) <= set(self._unread(list(self.plan.sites))):
            raise Broken("the copy's output does not depend on its own blocks")

    def pickle(self) -> None:
        """`torch.save` of the whole model, and back."""
        file = io.BytesIO()
        torch.save(self.model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        if list(api.injected(loaded)) != list(api.injected(self.model)):
            raise Broken("the loaded model has other blocks")
        if self.bare.calls is not None:
            self.bare.compare(loaded, "the loaded model")
        api.eject(loaded)
        if list(loaded.state_dict()) != self.bare.keys:
            raise Broken("ejected after loading, the model has other keys")

    def eject(self) -> None:
        """The same modules, classes and keys as before, and the same output."""
        bare = self.bare
        api.eject(self.model)
        if api.injected(self.model):
            raise Broken("blocks are left")
        if structure(self.model) != bare.structure:
            raise Broken("modules or classes are not those of before")
        if tensors(self.model) != bare.tensors or list(self.model.state_dict()) != bare.keys:
            raise Broken("tensors or keys are not those of before")
        if bare.calls is not None:
            bare.compare(self.model)


def _with_copy(result: Any, at: int | str | None, keep: Callable[[Tensor], None]) -> Any:
    """A module's result with one tensor of it, or all, replaced by copies, which are what is read later."""

    def copied(tensor: Tensor) -> Tensor:
        fresh = tensor.clone()
        keep(fresh)
        return fresh

    if at is None:
        return map_tensors(result, copied)
    items: Any = dict(result) if isinstance(result, Mapping) else list(result)
    items[at] = copied(items[at])
    return items if isinstance(items, dict) else type(result)(items)


def _learns(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.numel() > 0


def _loss(outputs: list[Tensor]) -> Tensor:
    """The outputs weighed at random, so that no gradient cancels."""
    return functools.reduce(torch.add, ((t * torch.randn(t.shape)).sum() for t in outputs if _learns(t)))


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def _unreached(blocks: Mapping[str, nn.Module], loss: Tensor) -> dict[str, nn.Module]:
    """The blocks none of whose parameters gets a gradient other than zero."""
    owned = [(name, p) for name, block in blocks.items() for p in block.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in owned], allow_unused=True)
    reached = {
        name
        for (name, _), gradient in zip(owned, gradients, strict=True)
        if gradient is not None and bool((gradient != 0).any())
    }
    return {name: block for name, block in blocks.items() if name not in reached}


def _stir(blocks: Mapping[str, nn.Module]) -> None:
    with torch.no_grad():
        for block in blocks.values():
            for p in block.parameters():
                p.add_(0.5)


def check(bare: Bare, arguments: Mapping[str, Any], checks: tuple[str, ...]) -> tuple[Plan, dict[str, Any]]:
    """Plan and inject, check, eject: the plan, and an entry with its time and the findings, JSON-ready.

    Raises:
        AttnInjectError: the plan is refused.
    """
    model, generator = bare.model, torch.get_rng_state()
    began = time.process_time()
    plan = api.plan(model, **arguments)
    seconds = time.process_time() - began
    findings: dict[str, Finding] = {}
    untouched = structure(model) == bare.structure and tensors(model) == bare.tensors
    untouched &= torch.equal(generator, torch.get_rng_state())
    findings["untouched"] = Finding(OK) if untouched else Finding(FAILED, "planning left a mark")
    api.inject(model, plan)
    injected = Injected(bare, plan)
    try:
        findings["kept"] = finding(injected.kept)
        for name, result in _running(injected, checks):
            findings[name] = result
    finally:
        bare.restore()
        findings["eject"] = finding(injected.eject)
    return plan, {
        "plan_seconds": round(seconds, 3),
        "checks": {name: findings[name].to_dict() for name in MEANING if name in findings},
    }


def _running(injected: Injected, checks: tuple[str, ...]) -> Any:
    """The checks asked for that run or copy the model, one after the other."""
    once = Finding(OK)
    for name in (
        "eval",
        "deepcopy",
        "pickle",
        "train",
        "gradient",
    ):  # copies first: a run in train mode leaves
        if name not in checks:  # graphs in what some models keep, and those cannot be copied
            continue
        if name in ("eval", "train"):
            output, count = injected.runs(training=name == "train")
            once = count if once.status == OK and count.status != BARE else once
            yield from ((name, output), ("once", once))
        else:
            yield name, finding(getattr(injected, name))
            injected.bare.restore()


def counted(sites: Sequence[Site]) -> dict[str, Any]:
    """How many sites, by which mechanism, and the reasons of those at the module."""
    reasons: dict[str, int] = {}
    for site in sites:
        if site.reason:
            reasons[site.reason] = reasons.get(site.reason, 0) + 1
    graph = sum(site.mechanism == "graph" for site in sites)
    return {"sites": len(sites), "graph": graph, "module": len(sites) - graph, "reasons": reasons}


# --- all places at once: what torch makes of the model -----------------------------------------


def check_together(bare: Bare, rules: list[dict[str, Any]], root: str) -> dict[str, dict[str, str]]:
    """Inject at all places at once, then export and compile. The bare model is asked only where that fails."""
    try:
        for rule in rules:
            api.inject(bare.model, root=root, **rule)
        findings = {"export": finding(lambda: _exports(bare)), "compile": finding(lambda: _compiles(bare))}
    finally:
        torch._dynamo.reset()
        bare.restore()
        api.eject(bare.model)
    return {name: result.to_dict() for name, result in findings.items()}


def _exports(bare: Bare) -> None:
    def program(model: nn.Module) -> nn.Module:
        given = bare.called.eval
        with quiet():
            return torch.export.export(model.eval(), given.args, given.kwargs, strict=False).module()

    _as_the_bare_one(bare, program, "export")


def _compiles(bare: Bare) -> None:
    def compiled(model: nn.Module, fullgraph: bool) -> nn.Module:
        torch._dynamo.reset()
        model.eval()
        return torch.compile(model, backend="eager", fullgraph=fullgraph)  # type: ignore[return-value]

    try:
        _as_the_bare_one(bare, lambda model: compiled(model, True), "compile")
    except BareCannot as reason:  # then in as many graphs as it takes
        try:
            _as_the_bare_one(bare, lambda model: compiled(model, False), "compile")
        except BareCannot:
            raise reason from None
        raise BareCannot(f"not in one graph, with breaks the same output: {reason}") from None


def _as_the_bare_one(bare: Bare, make: Callable[[nn.Module], nn.Module], what: str) -> None:
    """What `make` makes of the injected model computes the same; where it fails, the bare model must fail too."""
    everything = bare.output(False)

    def attempt() -> str:
        try:
            with quiet():
                now = _outputs(make(bare.model), bare.called.eval)
        except Exception as error:
            return told(error)
        wanted = everything[: len(now)] if bare.called.watched else everything
        close = len(now) == len(wanted) and all(map(_close, now, wanted))
        return "" if close else f"another output: {difference(now, wanted)}"

    if why := attempt():
        with injected_state.bypassed(bare.model), injected_state.as_original(bare.model):
            alone = attempt()
        if alone:
            raise BareCannot(f"the bare model cannot: {alone}")
        raise Broken(f"{what}: {why}")


def _outputs(made: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What an exported or compiled model gives; it may know no modes."""
    given = map_tensors((inputs.args, inputs.kwargs), torch.clone)
    found: list[Tensor] = []
    with torch.no_grad():
        map_tensors(made(*given[0], **given[1]), found.append)
    return found


def _close(now: Tensor, wanted: Tensor) -> bool:
    scale = float(wanted.double().abs().max()) if wanted.numel() else 1.0
    return torch.allclose(now.double(), wanted.double(), rtol=1e-3, atol=1e-3 * scale)
