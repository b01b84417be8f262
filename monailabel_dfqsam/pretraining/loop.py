"""What every training here shares: its settings, its steps, and how it is cut off and goes on.

The weights exported are an exponential average over the steps. Several processes (`torchrun`) share a
step, each on one core and with phantoms of its own. A training that has ended is continued by asking for more
steps: its rate then rises again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from monailabel_dfqsam.files import replacing

Progress = Callable[[int, int, str], None]
"""Told (step, steps, text)."""

SLOW = 0.25
"""Rate of what learns slowly, of the others'."""
_TOLD = 0.02
"""Weight of a step in the averages that are told."""


@dataclass(frozen=True)
class PretrainConfig:
    """Training settings; those of the embedded weights, but for the number of steps.

    `batch` is of each process; `average` is the weight that the exported average keeps at a step; `cooldown`
    is the share of the steps, at the end, over which the rate falls.
    """

    steps: int
    batch: int = 8
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.02
    average: float = 0.998
    seed: int = 0
    save_every: int = 100
    cooldown: float = 0.25


def run(
    modules: dict[str, nn.Module],
    state_file: Path,
    config: PretrainConfig,
    device: torch.device,
    progress: Progress,
    losses: Callable[[int, int], Iterator[tuple[Tensor, dict[str, float]]]],
    write: Callable[[nn.Module, int, int], None],
    slow: Sequence[nn.Parameter] = (),
) -> None:
    """Trains modules until `config.steps` are done, from where the state file stands.

    Args:
        modules: what learns, by its name in the state file; the first is what is averaged and written.
        losses: (seed of this process's phantoms, steps done) -> for each further step its loss and what to
            tell of it, NaN for nothing; a step's is computed when it is asked for, after torch was seeded.
        write: called with (average, steps done, phantoms seen) wherever the state is saved.
        slow: those of the modules' parameters that learn at a smaller rate.
    """
    rank, world = _join()
    state_file.parent.mkdir(parents=True, exist_ok=True)
    model = next(iter(modules.values()))
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    few = {id(parameter) for parameter in slow}
    shares = ((1.0, [p for p in parameters if id(p) not in few]), (SLOW, list(slow)))
    groups: list[dict[str, Any]] = [{"params": some, "share": share} for share, some in shares if some]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.average))  # type: ignore[no-untyped-call]
    parts: dict[str, Any] = {**modules, "optimizer": optimizer, "averaged": averaged}
    first = _load(state_file, device, parts)
    steps = losses(config.seed * world + rank, first)
    shown: dict[str, float] = {}
    started = time.monotonic()
    for done in range(first + 1, config.steps + 1):
        torch.manual_seed((config.seed * 1_000_003 + done - 1) * world + rank)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done - 1, config) * group.get("share", 1.0)
        loss, told = next(steps)
        _learn(loss, optimizer, parameters, world)
        averaged.update_parameters(model)
        for name, value in {**told, "loss": float(loss.detach())}.items():
            before = shown.get(name, value)
            if value == value:
                shown[name] = before + max(_TOLD, 1 / (done - first)) * (value - before)
        if rank:
            continue
        if done % 10 == 0:
            seconds = (time.monotonic() - started) / (done - first)
            text = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
            progress(done, config.steps, f"{text} {seconds:.2f} s/step")
        if done % config.save_every == 0 or done == config.steps:
            with replacing(state_file) as partial:
                torch.save({"step": done, **{k: part.state_dict() for k, part in parts.items()}}, partial)
            write(averaged.module, done, done * config.batch * world)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, constant, then linear down to 2 % of the peak."""
    left = (config.steps - step) / max(1.0, config.cooldown * config.steps)
    return config.lr * min(1.0, (step + 1) / config.warmup, max(left, 0.02))


def export(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Writes a model's weights as safetensors, floats as float16, whole or not at all."""
    tensors = {
        key: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in model.state_dict().items()
    }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", **metadata})


def _learn(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], world: int
) -> None:
    """One step of an optimizer by the gradients of all processes, their norm at most 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    _share_gradients(parameters, world)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _load(path: Path, device: torch.device, parts: dict[str, Any]) -> int:
    """Loads what a run saved into its parts, by name; returns the steps done, 0 without a file."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def _join() -> tuple[int, int]:
    """Rank and number of the processes that `torchrun` started; (0, 1) without it."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    return dist.get_rank(), dist.get_world_size()


def _share_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """The mean of all processes' gradients to each of them."""
    if world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
