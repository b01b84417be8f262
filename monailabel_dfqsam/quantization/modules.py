"""Modules watched while they run, and copied without their tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable
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
