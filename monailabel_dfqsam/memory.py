"""How much memory there is, and refusing what would not fit before it is tried.

A process that asks for more than there is gets killed, and everyone's work with it; one that asks first
answers with a sentence. Linux's limits that count are the machine's free memory, those of the containers
(cgroups, version 1 and 2) around the process, and its own address space (`ulimit -v`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from monailabel_dfqsam.numbers import in_bytes

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# By version: the limit, what is used, and in memory.stat the part of it that is cache and given up at need.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")
_NO_LIMIT = 1 << 60  # version 1 writes the greatest number of whole pages
# What torch, C++ and ITK say, each as a RuntimeError, where Python says MemoryError.
_SAID = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "allocate memory for image",
)


class MemoryShortage(MemoryError):
    """Something needs more memory than there is; the message is a sentence with both."""


def available() -> int:
    """Bytes that this process can still take: the least that any of the limits leaves."""
    left = [int(psutil.virtual_memory().available)]
    if _OWN_GROUPS.is_file():
        left += group_available(_OWN_GROUPS.read_text(), _CGROUPS)
    if sys.platform != "win32":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            left.append(soft - int(psutil.Process().memory_info().vms))
    return max(0, min(left))


def group_available(listing: str, root: Path) -> list[int]:
    """What each limited cgroup around a process leaves it, in bytes.

    Args:
        listing: /proc/self/cgroup, lines like `4:memory:/a/b` (version 1) and `0::/a/b` (version 2).
        root: where cgroups are mounted, version 1's by controller below it. A container that sees its own
            group as the root finds its limit there.
    """
    found: list[int] = []
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        names = _V1 if controllers else _V2
        folder = Path(os.path.normpath(top / path.lstrip("/")))
        for group in (folder, *folder.parents):
            if group == top or top in group.parents:
                found += _left_in(group, *names)
    return found


def require(needed: int, what: str) -> None:
    """Refuses what would not fit.

    Args:
        needed: bytes beside what the process holds already.
        what: for the message, which goes on 'needs …'.

    Raises:
        MemoryShortage: saying what is needed and what is free.
    """
    free = available()
    if needed > free:
        raise MemoryShortage(f"{what} needs {in_bytes(needed)} of memory, {in_bytes(free)} are free")


@contextmanager
def shortage_told(what: str) -> Iterator[None]:
    """Turns the ways in which libraries say that memory ran out into one.

    Args:
        what: for the message, 'memory ran out for …'.

    Raises:
        MemoryShortage: for a MemoryError, and for RuntimeErrors of torch (CPU and CUDA), C++ and ITK that
            mean the same. Every other error passes.
    """
    try:
        yield
    except MemoryShortage:
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _SAID):
            raise
        owner = "the GPU's memory" if "CUDA" in str(error) else "memory"
        raise MemoryShortage(f"{owner} ran out for {what}") from None


def _left_in(group: Path, limit_name: str, used_name: str, cache_name: str) -> list[int]:
    """[limit − used + cache] of one cgroup; nothing where it has no limit."""
    try:
        limit = (group / limit_name).read_text().strip()
        if limit == "max" or int(limit) > _NO_LIMIT:
            return []
        used = int((group / used_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [int(limit) - used + int(stat.get(cache_name, 0))]
    except (OSError, ValueError):
        return []
