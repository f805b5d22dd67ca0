"""`attninject bench inject`: what injection costs, beside its peers, in one process.

Every figure that is compared was taken in interleaved rounds on this machine; the ratios are what
counts. Times are CPU time of one thread, so that other work on the machine shifts them little. Only two
things need processes of their own: peak memory, whose high-water mark belongs to a process, and imports.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from attninject import api, models

from .measure import python, resident, saved_bytes, threads, timed

RECIPE = "se_resnet"
STEP_BATCH, STEP_SIZE = 4, 96


def inject(rounds: int = 9, chain: Sequence[int] = (100, 1000, 10000)) -> dict[str, Any]:
    """Measure everything, with one thread; every time in seconds, every size in bytes."""
    with threads(1):
        return {
            "machine": {"torch": torch.__version__, "python": platform.python_version(), "rounds": rounds},
            "inject": time_injection(rounds),
            "chain": [time_chain(count) for count in chain],
            "step": time_step(rounds),
            "memory": peak_memory(max(3, rounds // 3)),
            "import": time_import(rounds),
        }


# --- injection and its peers --------------------------------------------------------------------


def time_injection(rounds: int) -> dict[str, Any]:
    """Build resnet50, inject SE at 16 sites; PEFT and torchvision on fresh models, in the same round."""
    contenders: dict[str, Callable[[nn.Module], Any]] = {"inject": _inject, "plan": _plan}
    peft = _peft()
    if peft is not None:
        contenders["peft inject_adapter_in_model"] = peft
    contenders["torchvision create_feature_extractor"] = _feature_extractor
    times: dict[str, list[float]] = {name: [] for name in ("build", *contenders)}
    for one in range(rounds + 1):  # the first round warms up
        for name, work in contenders.items():
            build_seconds, model = timed(models.build, "torchvision/resnet50")
            work_seconds, _ = timed(work, model)
            if one:
                times["build"].append(build_seconds)
                times[name].append(work_seconds)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    fastest = {name: min(taken) for name, taken in times.items()}
    return {
        "sites": len(api.injected(_inject(models.build("torchvision/resnet50")))),
        "seconds": medians,
        "of_build": {name: seconds / medians["build"] for name, seconds in medians.items()},
        "fastest_of_build": {name: seconds / fastest["build"] for name, seconds in fastest.items()},
        "skipped": [] if peft is not None else ["peft is not installed"],
    }


def _inject(model: nn.Module) -> nn.Module:
    return api.inject(model, RECIPE)


def _plan(model: nn.Module) -> Any:
    return api.plan(model, RECIPE)


def _peft() -> Callable[[nn.Module], Any] | None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None

    def work(model: nn.Module) -> Any:
        return inject_adapter_in_model(LoraConfig(r=8, target_modules=r"layer\d\.\d+\.conv3"), model)

    return work


def _feature_extractor(model: nn.Module) -> Any:
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = [name for name, _ in model.named_modules() if name.endswith("bn3")]
    return create_feature_extractor(model, return_nodes=nodes)


# --- many sites ---------------------------------------------------------------------------------


class Unit(nn.Module):
    """One small residual block of the deep chain."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), the same out."""
        made: torch.Tensor = x + self.bn(self.conv(x))
        return made


class Chain(nn.Module):
    """`count` units, one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.units = nn.Sequential(*(Unit() for _ in range(count)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, 16, H, W), the same out."""
        made: torch.Tensor = self.units(x)
        return made


def time_chain(count: int) -> dict[str, Any]:
    """Inject SE after every batch norm of a chain of that many blocks."""
    build_seconds, model = timed(lambda: Chain(count).eval())
    x = torch.zeros(2, 16, 4, 4)
    seconds, _ = timed(
        lambda: api.inject(model, block="se", after="units.*.bn", args={"reduction": 4}, example_inputs=x)
    )
    found = len(api.injected(model))
    return {"sites": found, "seconds": seconds, "per_site": seconds / found, "build": build_seconds}


# --- against the same network written by hand ---------------------------------------------------


def by_hand() -> nn.Module:
    """torchvision's resnet50 with our SE block written into a Bottleneck of its own, before the add."""
    from torchvision.models.resnet import Bottleneck, ResNet

    class SEBottleneck(Bottleneck):  # type: ignore[misc]  # torchvision ships no types
        """torchvision's Bottleneck with `se` behind bn3."""

        def __init__(self, *args: Any, **kw: Any) -> None:
            super().__init__(*args, **kw)
            self.se = api.create_block("se", self.bn3.num_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x: (B, C, H, W), as torchvision's."""
            identity = x
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.relu(self.bn2(self.conv2(out)))
            out = self.se(self.bn3(self.conv3(out)))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            made: torch.Tensor = self.relu(out)
            return made

    made: nn.Module = ResNet(SEBottleneck, [3, 4, 6, 3])
    return made


def injected() -> nn.Module:
    """The same network by injection."""
    return _inject(models.build("torchvision/resnet50"))


NETWORKS = {"injected": injected, "by hand": by_hand}


def training_step(model: nn.Module) -> Callable[[], None]:
    """One step of SGD with momentum on fixed random images, as a function."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEP_BATCH, 3, STEP_SIZE, STEP_SIZE, generator=generator)
    labels = torch.arange(STEP_BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def step() -> None:
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_step(rounds: int) -> dict[str, Any]:
    """Training steps of both networks, in turn; which goes first alternates."""
    nets = {name: make() for name, make in NETWORKS.items()}
    nets["by hand"].load_state_dict(nets["injected"].state_dict())  # the same keys, or this raises
    with torch.no_grad():
        x = torch.randn(1, 3, STEP_SIZE, STEP_SIZE)
        outputs = [net.eval()(x) for net in nets.values()]
    steps = {name: training_step(net) for name, net in nets.items()}
    saved = {name: bytes_saved_for_backward(net) for name, net in nets.items()}
    times: dict[str, list[float]] = {name: [] for name in nets}
    for one in range(2 * rounds + 2):
        for name in list(nets) if one % 2 else list(nets)[::-1]:
            seconds, _ = timed(steps[name])
            if one > 1:
                times[name].append(seconds)
    ratios = [ours / theirs for ours, theirs in zip(*times.values(), strict=True)]
    return {
        "outputs_bit_equal": torch.equal(*outputs),
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "ratio_of_pairs": statistics.median(ratios),
        "ratio_of_minima": min(times["injected"]) / min(times["by hand"]),
        "saved_for_backward": saved,
    }


def bytes_saved_for_backward(model: nn.Module) -> int:
    """Bytes that one forward in train mode keeps for its backward, parameters left out: an exact count."""
    was = model.training
    model.train()
    images = torch.zeros(STEP_BATCH, 3, STEP_SIZE, STEP_SIZE)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    total = saved_bytes(lambda: model(images).sum(), model.parameters())
    model.load_state_dict(state)  # batch norm statistics
    model.train(was)
    return total


# --- peak memory: a process each ----------------------------------------------------------------


def peak_memory(rounds: int) -> dict[str, Any]:
    """Growth of the process's high-water mark over three training steps, in processes of their own."""
    taken: dict[str, list[int]] = {name: [] for name in NETWORKS}
    for _ in range(rounds):
        for name in NETWORKS:
            taken[name].append(_in_child(f"bench.peak_of({name!r})"))
    medians = {name: int(statistics.median(values)) for name, values in taken.items()}
    return {"bytes": medians, "ratio": medians["injected"] / medians["by hand"]}


def peak_of(name: str) -> int:
    """Bytes between the resident size before the first step and the high-water mark after the third."""
    torch.set_num_threads(1)
    step = training_step(NETWORKS[name]())
    before = resident()["VmRSS"]
    for _ in range(3):
        step()
    return resident()["VmHWM"] - before


def _in_child(expression: str) -> Any:
    code = f"import json; from attninject.bench import injection as bench; print(json.dumps({expression}))"
    return json.loads(python(code).splitlines()[-1])


# --- import -------------------------------------------------------------------------------------


def time_import(rounds: int) -> dict[str, Any]:
    """Seconds that `import attninject` adds to `import torch`, in fresh processes; lazy rooms beside."""
    clock = "began = time.process_time(); {}; print(time.process_time() - began)"
    lines = {
        "seconds": f"import time, torch; {clock.format('import attninject')}",
        "with_inject": f"import time, torch; {clock.format('import attninject; attninject.inject')}",
    }
    return {
        name: statistics.median(float(python(code)) for _ in range(min(rounds, 5)))
        for name, code in lines.items()
    }


# --- words --------------------------------------------------------------------------------------


def to_markdown(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    parts = (_about, _injection, _chains, _steps, _import)
    return "\n\n".join(part(result) for part in parts)


def _about(result: dict[str, Any]) -> str:
    m = result["machine"]
    return (
        f"torch {m['torch']}, Python {m['python']}, CPU time of one "
        f"thread, medians of {m['rounds']} interleaved rounds on fresh models."
    )


def _injection(result: dict[str, Any]) -> str:
    found = result["inject"]
    lines = [
        f"### {found['sites']} SE sites on torchvision resnet50",
        "",
        "| | ms | of the build | fastest rounds |",
        "|---|--:|--:|--:|",
    ]
    labels = {
        "build": "torchvision builds resnet50",
        "inject": f"`ai.inject(model, {RECIPE!r})`, planning and checks included",
        "plan": f"`ai.plan(model, {RECIPE!r})` alone",
    }
    for name, seconds in found["seconds"].items():
        shares = f"{found['of_build'][name]:.2f} | {found['fastest_of_build'][name]:.2f}"
        lines.append(f"| {labels.get(name, name)} | {seconds * 1e3:.1f} | {shares} |")
    lines += [f"\n({word})" for word in found["skipped"]]
    return "\n".join(lines)


def _chains(result: dict[str, Any]) -> str:
    lines = [
        "### Linear in sites: a chain of residual blocks",
        "",
        "| sites | s | ms per site |",
        "|--:|--:|--:|",
    ]
    for row in result["chain"]:
        lines.append(f"| {row['sites']:,} | {row['seconds']:.2f} | {row['per_site'] * 1e3:.2f} |")
    return "\n".join(lines)


def _steps(result: dict[str, Any]) -> str:
    step, memory = result["step"], result["memory"]
    ours, theirs = "injected", "by hand"
    mib = 2**20
    rows = [
        ("training step, ms", *(step["seconds"][n] * 1e3 for n in (ours, theirs)), step["ratio_of_pairs"]),
        ("peak growth, MiB", *(memory["bytes"][n] / mib for n in (ours, theirs)), memory["ratio"]),
        (
            "saved for backward, MiB",
            *(step["saved_for_backward"][n] / mib for n in (ours, theirs)),
            step["saved_for_backward"][ours] / step["saved_for_backward"][theirs],
        ),
    ]
    lines = [
        f"### resnet50 + SE, injected and written by hand with the same block "
        f"(batch {STEP_BATCH}, {STEP_SIZE}×{STEP_SIZE})",
        "",
        "| | injected | by hand | ratio |",
        "|---|--:|--:|--:|",
        *(f"| {name} | {a:.1f} | {b:.1f} | {ratio:.3f} |" for name, a, b, ratio in rows),
        "",
        f"Same keys; outputs bit-equal: {'yes' if step['outputs_bit_equal'] else 'NO'}. Time: median ratio "
        f"of steps taken in turn (ratio of the fastest steps: {step['ratio_of_minima']:.3f}). Peak: growth "
        f"of the kernel's high-water mark (VmHWM) over three steps, median of fresh processes.",
    ]
    return "\n".join(lines)


def _import(result: dict[str, Any]) -> str:
    found = result["import"]
    return (
        f"### Import\n\n`import attninject` adds {found['seconds']:.3f} s to `import torch`; "
        f"with the first look at `attninject.inject`, {found['with_inject']:.3f} s."
    )
