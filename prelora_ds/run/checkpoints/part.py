"""Write one rank's part of a state to a safetensors file, and read back any part of such files.

The keys are ``value/NAME``, ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and ``buffer/NAME``, and for adapters
that are pruned ``sensitivity/NAME`` and ``uncertainty/NAME``. All but buffers are flat tensors.
``starts`` in the metadata maps each name to the offset at which its slice begins in the parameter.
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

from prelora_ds.engine.optimizer import KEPT
from prelora_ds.engine.state import EngineState, Slice, even_share


def part_name(rank: int, world_size: int) -> str:
    """Return the file name of one rank's part."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_part(state: EngineState, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write this rank's slices and buffers, sync them to disk, read them back and compare.

    Raises OSError if they cannot be written or do not read back as written.
    """
    slices = {name: s for name, s in state.slices.items() if s.value.numel()}
    tensors = {f"value/{name}": s.value for name, s in slices.items()}
    tensors |= {f"{key}/{name}": t for name, s in slices.items() for key, t in s.moments.items()}
    tensors |= {f"buffer/{name}": b.contiguous() for name, b in state.buffers.items()}
    starts = json.dumps({name: s.start for name, s in slices.items()})
    try:
        save_file(tensors, path, metadata={"starts": starts, **(metadata or {})})
        with open(path, "rb") as written:
            os.fsync(written.fileno())
            # Drop the pages, so that the file is read back from the disk and not from memory.
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with safe_open(path, "pt") as file:
            wrong = [
                key
                for key, tensor in tensors.items()
                if not _same_bits(file.get_tensor(key), tensor)
            ]
    except SafetensorError as exc:  # how safetensors reports a full disk
        raise OSError(f"{path}: {exc}") from exc
    if wrong:
        raise OSError(f"{path}: {wrong[0]} does not read back as written")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.numel():
        return a.shape == b.shape
    return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def read_state(
    folders: Sequence[Path],
    worlds: Sequence[int],
    shapes: Mapping[str, int],
    rank: int,
    world_size: int,
) -> tuple[EngineState, dict[str, str]]:
    """Read this rank's part of the state in ``folders``.

    If a folder was written by a world of the same size, the rank reads the file of the same rank.
    Otherwise it reads an even share of each parameter, cut from all files, so that no rank reads
    more than its part.

    worlds: the number of ranks that wrote each folder.
    shapes: parameter name -> number of elements.

    Returns the state, and the metadata of the rank file in the first folder from which the buffers
    are read. Raises OSError if a file is broken or elements are missing.
    """
    state = EngineState({})
    metadata: dict[str, str] = {}
    for folder, world in zip(folders, worlds, strict=True):
        rank_file = folder / part_name(rank % world, world)
        try:
            if world == world_size:
                state.slices |= _read_rank_file(rank_file)
            else:
                paths = [folder / part_name(r, world) for r in range(world)]
                state.slices |= _read_share(paths, shapes, rank, world_size)
            if folder == folders[0]:
                with safe_open(rank_file, "pt") as file:
                    metadata = file.metadata()
                    state.buffers = {
                        key.removeprefix("buffer/"): file.get_tensor(key)
                        for key in file.keys()  # noqa: SIM118
                        if key.startswith("buffer/")
                    }
        except (SafetensorError, KeyError, ValueError) as exc:
            raise OSError(f"{folder}: {exc}") from exc
    return state, metadata


def _read_rank_file(path: Path) -> dict[str, Slice]:
    """Read all slices of one rank's file."""
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        starts = json.loads(file.metadata()["starts"])
        slices = {}
        for name, start in starts.items():
            value = file.get_tensor(f"value/{name}")
            moments = {
                key: file.get_tensor(f"{key}/{name}") for key in KEPT if f"{key}/{name}" in keys
            }
            slices[name] = Slice(start, value, moments)
        return slices


def _read_share(
    paths: Sequence[Path], elements: Mapping[str, int], rank: int, world_size: int
) -> dict[str, Slice]:
    """Read this rank's even share of each parameter from the files of all ranks.

    elements: parameter name -> number of elements. Raises ValueError if a name or a number of
    elements does not match, or if elements are missing.
    """
    parts_by_name: dict[str, list[tuple[int, dict[str, torch.Tensor]]]] = {}
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
                low = max(low, start)
                high = min(high, start + length)
                if low < high:
                    tensors = {
                        key: file.get_slice(f"{key}/{name}")[low - start : high - start]
                        for key in ("value", *KEPT)
                        if f"{key}/{name}" in keys
                    }
                    parts_by_name.setdefault(name, []).append((low, tensors))

    for name, count in written.items():
        # A longer parameter would pass the check below: its first elements would be taken for all.
        if count != elements[name]:
            raise ValueError(
                f"{name} has {count:,} elements there and {elements[name]:,} in this model"
            )

    slices = {}
    for name, parts in parts_by_name.items():
        parts.sort(key=lambda part: part[0])
        joined = {key: torch.cat([tensors[key] for _, tensors in parts]) for key in parts[0][1]}
        low, high = even_share(elements[name], rank, world_size)
        first = parts[0][0]
        if (first, joined["value"].numel()) != (low, high - low):
            raise ValueError(f"elements {low} to {high} of {name} are missing")
        slices[name] = Slice(low, joined.pop("value"), joined)
    return slices
