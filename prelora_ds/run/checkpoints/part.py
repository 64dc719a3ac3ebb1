"""A rank's part of a state on disk: slices by name in one safetensors file, and reading back any part of them.

Keys are ``value/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and ``buffer/NAME``, tensors flat; the metadata holds
under ``starts`` where in its parameter each slice begins.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prelora_ds.engine.optimizer import MOMENTS
from prelora_ds.engine.state import EngineState, Slice, even_share


def part_name(rank: int, world_size: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_part(state: EngineState, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write this rank's slices and buffers; on disk and read back when this returns.

    Raises OSError when they cannot be written, or are not what was written.
    """
    mine = {name: s for name, s in state.slices.items() if s.value.numel()}
    tensors = {f"value/{name}": s.value for name, s in mine.items()}
    tensors |= {f"{key}/{name}": t for name, s in mine.items() for key, t in s.moments.items()}
    tensors |= {f"buffer/{name}": b.contiguous() for name, b in state.buffers.items()}
    starts = json.dumps({name: s.start for name, s in mine.items()})
    try:
        save_file(tensors, path, metadata={"starts": starts, **(metadata or {})})
        with open(path, "rb") as written:
            os.fsync(written.fileno())
            # What is read back shall come from the disk and not from memory.
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with safe_open(path, "pt") as file:
            wrong = [key for key, tensor in tensors.items() if not _same_bits(file.get_tensor(key), tensor)]
    except SafetensorError as exc:  # how safetensors reports a full disk
        raise OSError(f"{path}: {exc}") from exc
    if wrong:
        raise OSError(f"{path}: {wrong[0]} reads back other than it was written")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) if a.numel() else a.shape == b.shape


def read_state(folders: Sequence[Path], worlds: Sequence[int], shapes: Mapping[str, int], rank: int,
               world_size: int) -> tuple[EngineState, dict[str, str]]:
    """This rank's part of what lies in ``folders`` (each written by ``worlds`` ranks), and the metadata of the rank
    file it follows in the first of them.

    A rank of a world of the same size takes the file that its like wrote; otherwise an even share of each parameter,
    cut from wherever it lies, so that no rank reads more than its part. shapes: name -> elements of the parameter.
    Raises OSError when a file is broken, or when elements are missing.
    """
    state, metadata = EngineState({}), {}
    for folder, world in zip(folders, worlds, strict=True):
        own = folder / part_name(rank % world, world)
        try:
            if world == world_size:
                state.slices |= _read_own(own)
            else:
                paths = [folder / part_name(r, world) for r in range(world)]
                state.slices |= _read_share(paths, shapes, rank, world_size)
            if folder == folders[0]:
                with safe_open(own, "pt") as file:
                    metadata = file.metadata()
                    state.buffers = {key.removeprefix("buffer/"): file.get_tensor(key) for key in file.keys()  # noqa: SIM118
                                     if key.startswith("buffer/")}
        except (SafetensorError, KeyError, ValueError) as exc:
            raise OSError(f"{folder}: {exc}") from exc
    return state, metadata


def _read_own(path: Path) -> dict[str, Slice]:
    with safe_open(path, "pt") as file:
        keys, starts = set(file.keys()), json.loads(file.metadata()["starts"])
        return {name: Slice(start, file.get_tensor(f"value/{name}"),
                            {key: file.get_tensor(f"{key}/{name}") for key in MOMENTS if f"{key}/{name}" in keys})
                for name, start in starts.items()}


def _read_share(paths: Sequence[Path], elements: Mapping[str, int], rank: int, world_size: int) -> dict[str, Slice]:
    found: dict[str, list[tuple[int, dict[str, torch.Tensor]]]] = {}
    written: Counter[str] = Counter()
    for path in paths:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for name, start in json.loads(file.metadata()["starts"]).items():
                if name not in elements:
                    raise ValueError(f"{name} is not a parameter of this model")
                low, high = even_share(elements[name], rank, world_size)
                (length,) = file.get_slice(f"value/{name}").get_shape()
                written[name] += length
                low, high = max(low, start), min(high, start + length)
                if low < high:
                    found.setdefault(name, []).append((low, {
                        key: file.get_slice(f"{key}/{name}")[low - start: high - start]
                        for key in ("value", *MOMENTS) if f"{key}/{name}" in keys}))
    for name, count in written.items():
        if count != elements[name]:  # else the first of them would be taken for the whole
            raise ValueError(f"{name} has {count:,} elements there and {elements[name]:,} in this model")
    slices = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        whole = {key: torch.cat([tensors[key] for _, tensors in parts]) for key in parts[0][1]}
        low, high = even_share(elements[name], rank, world_size)
        if (parts[0][0], whole["value"].numel()) != (low, high - low):
            raise ValueError(f"elements {low} to {high} of {name} are not all there")
        slices[name] = Slice(low, whole.pop("value"), whole)
    return slices
