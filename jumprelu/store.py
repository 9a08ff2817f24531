"""A store of activations as files: shards of safetensors, and an index that names the request that
the store answers (model, tokens, site, layer, dtype) and, for every shard, rows, bytes and SHA-256.
"""

from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from .files import read_json, sha256, write_json, writing

FORMAT = 1
INDEX = "index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Shard(NamedTuple):
    """Consecutive rows of a store. activations: float32 [rows, d_in]; the others int32 [rows]:
    token, position in its row of tokens, and document, by which standard errors are clustered."""

    activations: torch.Tensor
    ids: torch.Tensor
    position: torch.Tensor
    document: torch.Tensor


def torch_dtype(name: str) -> torch.dtype:
    """Raises ValueError for other names than those of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def rows_not_finite(x: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows of `x`, [rows, d_in], that hold NaN or infinity."""
    # one of them makes the sum one, which is quick to see; a sum may overflow without one
    if torch.isfinite(x.sum(dtype=torch.float32)):
        return torch.empty(0, dtype=torch.long)
    return (~torch.isfinite(x).all(dim=-1)).nonzero().squeeze(-1)


def is_whole(path: Path, record: dict[str, Any], checksum: bool = True) -> bool:
    """Whether the file at `path` is the one that its record in the index describes."""
    return (
        path.is_file()
        and path.stat().st_size == record["bytes"]
        and (not checksum or sha256(path) == record["sha256"])
    )


def read_index(folder: Path) -> dict[str, Any]:
    """Raises ValueError for what is no index, or one of another format."""
    index = read_json(folder / INDEX)
    found = index.get("format") if isinstance(index, dict) else type(index).__name__
    if found != FORMAT:
        raise ValueError(
            f"{folder / INDEX} has format {found!r}, this version reads {FORMAT}: harvest into "
            "another folder"
        )
    return index


def start_store(
    folder: Path, request: dict[str, Any], model_name: str | None, d_in: int, n_shards: int
) -> dict[str, Any]:
    """The index to go on from: that of the store in `folder`, less damaged shards, if it answers
    `request`; else a new one.

    request: what the store's content follows from, with at least site, layer and dtype. If all
    shards are there with their sizes, checksums are left to the reader; if one is missing, the
    others' are compared now. The caller holds the folder's lock (:func:`jumprelu.files.locked`).

    Raises ValueError, and changes nothing, if `folder` holds the answer to another request, or
    shards without an index.
    """
    if (folder / INDEX).exists():
        index = read_index(folder)
        there = index["request"]
        differ = [
            f"{key} is {there.get(key)!r} there and {request.get(key)!r} here"
            for key in sorted(request.keys() | there.keys())
            if there.get(key) != request.get(key)
        ]
        if differ:
            raise ValueError(
                f"{folder} holds other activations: {'; '.join(differ)}. Choose another folder, "
                "or delete this one"
            )
        for checksum in (False, True):
            index["shards"] = {
                name: record
                for name, record in index["shards"].items()
                if is_whole(folder / name, record, checksum)
            }
            if len(index["shards"]) == n_shards:
                break
    elif any(folder.glob("shard-*.safetensors")):
        raise ValueError(
            f"{folder} holds shards without {INDEX}: choose another folder, or delete this one"
        )
    else:
        index = {
            "format": FORMAT,
            "request": request,
            "model_name": model_name,
            "d_in": d_in,
            "n_shards": n_shards,
            "shards": {},
        }
        write_json(folder / INDEX, index)
    for leftover in folder.glob(".*.tmp"):  # of a killed process
        leftover.unlink()
    return index


def add_shard(folder: Path, index: dict[str, Any], number: int, shard: Shard) -> None:
    """Write shard `number` in the index's dtype, then the index with it: a kill in between costs
    one shard, nothing else.

    The checksum is that of the bytes meant to be written, not of what a disk made of them. Raises
    ValueError for NaN or infinity, before anything is written; OSError naming the file if the disk
    is full.
    """
    name = shard_name(number)
    activations = shard.activations.to(DTYPES[index["request"]["dtype"]])
    bad = rows_not_finite(activations)
    if len(bad):
        raise ValueError(
            f"{folder / name} would hold NaN or infinity in {len(bad)} of {len(activations)} rows, "
            f"first row {int(bad[0])}: it was not written"
        )
    tensors = {"activations": activations.contiguous()}
    for key in ("ids", "position", "document"):
        tensors[key] = getattr(shard, key).to(torch.int32, copy=True)
    data = save(tensors)
    with writing(folder / name) as temporary:
        temporary.write_bytes(data)
    record = {"rows": len(activations), "bytes": len(data), "sha256": new_sha256(data).hexdigest()}
    index["shards"][name] = record
    write_json(folder / INDEX, index)
