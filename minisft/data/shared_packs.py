"""Plans and packs that the processes of a machine share: one makes them, all map the same files.

A plan and the packs of an epoch take tens of bytes a document in every process: gigabytes for 100 million documents. So of a
large data set the rank that comes first plans, or deals, and writes the arrays into a folder beside the token cache, where the
others, which have waited, map them. Mapped pages are in memory once for all processes, and are given back where memory is short.
"""

from collections.abc import Callable
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import numpy as np

from minisft.atomic_folder import (
    atomic_folder,
    read_manifest,
    remove_folder,
    remove_leftovers,
    verify_folder,
    waiting_lock,
)
from minisft.data.packing import Packs, Plan
from minisft.data.packing_strategies import Group

T = TypeVar("T", Plan, Packs)
LEAST = 5_000_000  # documents; a plan of fewer takes less memory than what it is read with


def folder_of(parent: Path, lengths: np.ndarray, max_length: int, strategy: str) -> Path:
    """Where the plan of these documents is shared. Its packs are in folders whose names begin like this one."""
    key = sha256(f"{max_length} {strategy} {lengths.dtype} ".encode())
    key.update(np.ascontiguousarray(lengths).data)
    return parent / f"plan-{key.hexdigest()[:32]}"


def made_once(folder: Path, make: Callable[[], T], kind: type[T]) -> T:
    """make(), written into the folder by the first process that asks, and mapped by all."""
    with waiting_lock(folder):
        if verify_folder(folder, hashes=False) is not None:
            remove_leftovers(folder.parent)
            if folder.exists():
                remove_folder(folder)
            _write(folder, make())
    manifest = read_manifest(folder)
    values = dict(manifest["values"])
    if "groups" in values:
        values["groups"] = [
            Group(first, number, space, arrival, tuple(map(tuple, runs)))
            for first, number, space, arrival, runs in values["groups"]
        ]
    for name, dtype in manifest["arrays"].items():
        path = folder / f"{name}.bin"
        values[name] = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
    return kind(**values)


def packs_of(plan: Plan, seed: tuple[int, ...] | None) -> Packs:
    """plan.deal(seed). Of a plan that is shared the packs are shared too, and those of other seeds are deleted, which whoever
    has mapped them does not notice."""
    if not isinstance(plan.end, np.memmap):
        return plan.deal(seed)
    of_plan = Path(str(plan.end.filename)).parent
    name = f"{of_plan.name}-dealt-{'-'.join(map(str, seed or ()))}"
    found = made_once(of_plan.with_name(name), lambda: plan.deal(seed), Packs)
    with waiting_lock(of_plan.with_name(f"{of_plan.name}-dealt")):
        for other in of_plan.parent.glob(f"{of_plan.name}-dealt-*"):
            if other.name != name:
                remove_folder(other)
    return found


def _write(folder: Path, made: Plan | Packs) -> None:
    manifest: dict = {"arrays": {}, "values": {}}
    with atomic_folder(folder, manifest) as temporary:
        for field in fields(made):
            value = getattr(made, field.name)
            if isinstance(value, np.ndarray):
                manifest["arrays"][field.name] = str(value.dtype)
                with open(temporary / f"{field.name}.bin", "wb") as file:
                    file.write(np.ascontiguousarray(value).data)  # tofile loses an error at the end
            else:
                manifest["values"][field.name] = value
