"""Modules watched while they run, and copied without their tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Call(NamedTuple):
    """What went into a module and what came out."""

    inputs: tuple[Tensor, ...]
    output: Tensor


def shared_copy(module: AnyModule) -> AnyModule:
    """A copy that shares all tensors: giving the copy another one leaves the original as it is."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def run(module: nn.Module, names: Iterable[str], x: Tensor) -> tuple[Tensor, dict[str, Call]]:
    """What a module makes of x, and by name the calls of some modules within it, each of which runs once."""
    calls: dict[str, Call] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = Call(inputs, output)

        return module.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name in names]
    try:
        return module(x), calls
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """Ends a run of which no more is wanted."""


def read_by(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a module within another reads when that one is given x; what would run after it does not."""
    read: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.extend(inputs)
        raise _Enough

    handle = module.get_submodule(name).register_forward_pre_hook(hook)
    try:
        with suppress(_Enough):
            module(x)
    finally:
        handle.remove()
    return read[0]


def put_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another one's, by its name within the root."""
    parent, _, child = name.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, (nn.Sequential, nn.ModuleList)):
        owner[int(child)] = module
    else:
        setattr(owner, child, module)
