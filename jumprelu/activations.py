"""Reading a store of activations: whole shards, random rows, and shuffled batches.

Notable here:
- a shard's size is checked when the store is opened, its checksum when it is first read.
- `batches` is a shuffled, endless stream whose order depends on the seed and `bucket_rows` alone.
  It can start at any batch number without reading what comes before, so training resumes exactly.
- reading in random order from a disk is slow, and a whole store may not fit into memory: shards are
  shuffled, read in buckets of several, and rows are shuffled within a bucket. A thread reads the
  next bucket while one is in use, each row straight to its place in the shuffled order. Memory is
  two buckets, whatever the store's size.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .files import digest, locked, tensor_digest
from .store import (
    INDEX,
    Shard,
    add_shard,
    is_whole,
    read_index,
    rows_not_finite,
    shard_name,
    start_store,
    torch_dtype,
)

Bucket = tuple[list[str], torch.Tensor, int]
"""Names of shards, the place of each of their rows in the shuffled order, and how many rows of that
order to skip."""


@dataclass(frozen=True, eq=False)
class Activations:
    """A store, open for reading; made by :func:`open_activations`.

    site (named as in jumprelu/sites.py), layer (from 0), model_name: where the activations come
    from, None for a tensor. d_in: their width. dtype: on disk, a string; what is read is float32.
    """

    folder: Path
    index: dict[str, Any] = field(repr=False)
    _checked: set[str] = field(default_factory=set, repr=False)
    """Shards whose checksum was compared since the store was opened."""

    site = property(lambda self: self.index["request"]["site"])
    layer = property(lambda self: self.index["request"]["layer"])
    dtype = property(lambda self: self.index["request"]["dtype"])
    d_in = property(lambda self: self.index["d_in"])
    model_name = property(lambda self: self.index["model_name"])

    def __len__(self) -> int:
        return sum(record["rows"] for record in self.index["shards"].values())

    def __repr__(self) -> str:
        place = f"{self.site} of layer {self.layer} of {self.model_name}"
        origin = place if self.model_name else "a tensor"
        return f"Activations({len(self)} rows of {self.d_in} from {origin}, {self.dtype})"

    @property
    def fingerprint(self) -> str:
        """Digest of what was asked for, and of the bytes that came."""
        sums = {name: record["sha256"] for name, record in self.index["shards"].items()}
        return digest(self.index["request"], sums)

    def shards(self) -> Iterator[Shard]:
        """All rows in the order of the tokens, a shard at a time. Raises ValueError for a damaged
        shard."""
        for name in sorted(self.index["shards"]):
            shard = self._read(name)
            yield shard._replace(activations=shard.activations.float())

    def rows(self, n: int, seed: int = 0) -> torch.Tensor:
        """A uniform sample of `n` different rows in random order, all rows if there are no more:
        float32 [n, d_in].

        Reads every shard that holds one of them, one at a time. Raises ValueError for n < 1 or a
        damaged shard.
        """
        if n < 1:
            raise ValueError(f"asked for {n} rows, expected 1 or more")
        chosen = torch.randperm(len(self), generator=_generator(seed, "rows"))[:n]
        sample = torch.empty(len(chosen), self.d_in)
        first = 0
        for name, record in sorted(self.index["shards"].items()):
            mine = (chosen >= first) & (chosen < first + record["rows"])
            if mine.any():
                sample[mine] = self._read(name).activations[chosen[mine] - first].float()
            first += record["rows"]
        return sample

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        bucket_rows: int = 2**18,
        pinned: bool = False,
    ) -> Batches:
        """Endless stream of shuffled batches, float32 [batch_size, d_in], epoch after epoch, every
        batch full.

        start: number of the first batch; `batches(b, seed, k)` gives what `batches(b, seed)` gives
        after k batches. bucket_rows: rows in a bucket (at least one shard), 4·d_in bytes each; more
        mixes further. pinned: in memory from which a GPU can copy by itself. A batch may hold rows
        from both sides of the border between two epochs. Raises ValueError for a damaged shard.
        """
        if batch_size < 1 or start < 0 or bucket_rows < 1:
            raise ValueError(
                f"batch_size {batch_size}, start {start}, bucket_rows {bucket_rows}: expected at "
                "least 1, 0 and 1"
            )
        plan = self._bucket_stream(seed, start * batch_size, bucket_rows)
        return Batches(self, batch_size, plan, pinned)

    def _bucket_stream(self, seed: int, row: int, bucket_rows: int) -> Iterator[Bucket]:
        """The buckets from the one on that holds row number `row` of the stream."""
        epoch, skip = divmod(row, len(self))
        while True:
            for number, names in enumerate(self._buckets(seed, epoch, bucket_rows)):
                rows = sum(self.index["shards"][name]["rows"] for name in names)
                if skip >= rows:
                    skip -= rows
                    continue
                order = torch.randperm(rows, generator=_generator(seed, epoch, number))
                places = torch.empty_like(order)
                places[order] = torch.arange(rows)
                yield names, places, skip
                skip = 0
            epoch += 1

    def _buckets(self, seed: int, epoch: int, bucket_rows: int) -> list[list[str]]:
        """Names of the shards in the order of this epoch, grouped so that no group of several has
        more than `bucket_rows`."""
        shards = sorted(self.index["shards"].items())
        buckets: list[list[str]] = []
        room = 0
        for i in torch.randperm(len(shards), generator=_generator(seed, epoch)).tolist():
            name, record = shards[i]
            if not buckets or record["rows"] > room:
                buckets.append([])
                room = bucket_rows
            buckets[-1].append(name)
            room -= record["rows"]
        return buckets

    def _read_into(self, bucket: torch.Tensor, name: str, places: torch.Tensor) -> None:
        """Put the rows of a shard at `places` of the bucket, float32 [rows, d_in]."""
        activations = self._read(name).activations
        # pieces that stay in a cache, and below the size from which torch uses several threads:
        # those are for training
        rows = max(1, (2**15 - 1) // self.d_in)
        for piece, where in zip(activations.split(rows), places.split(rows), strict=True):
            bucket.index_copy_(0, where, piece.float())

    def _read(self, name: str) -> Shard:
        path, new = self.folder / name, name not in self._checked
        if new and not is_whole(path, self.index["shards"][name]):
            raise ValueError(_damaged(path))
        with safe_open(path, framework="pt") as f:
            shard = Shard(*(f.get_tensor(key) for key in Shard._fields))
        if new and len(bad := rows_not_finite(shard.activations)):
            raise ValueError(
                f"{path} holds NaN or infinity in {len(bad)} of {len(shard.ids)} rows, first row "
                f"{int(bad[0])}. Harvest again into another folder, from a model that gives finite "
                "activations, or with dtype='float32'"
            )
        self._checked.add(name)
        return shard


class Batches(Iterator[torch.Tensor]):
    """The stream of :meth:`Activations.batches`. A batch is a view of its bucket, which stays in
    memory as long as the batch.

    An error of the reading threads, such as a damaged shard, is raised when the stream comes to
    that bucket. They end with the stream, after the shard that they are at: :meth:`close` waits for
    this, dropping the last reference does not.
    """

    def __init__(
        self, acts: Activations, batch_size: int, plan: Iterator[Bucket], pinned: bool = False
    ):
        self.waited = 0.0
        """Seconds that the consumer waited for the thread, so far."""
        # one on a laptop, whose cores are for training; more where they must keep up with a GPU
        threads = max(1, min(4, (os.cpu_count() or 1) // 4))
        self._thread = ThreadPoolExecutor(threads, "jumprelu-batches")
        weakref.finalize(self, self._thread.shutdown, wait=False, cancel_futures=True)
        self._acts, self._batch_size, self._plan, self._pinned = acts, batch_size, plan, pinned
        self._left: torch.Tensor | None = None
        """What is not yet used of the bucket in use."""
        self._ahead: tuple[torch.Tensor, int, list[Future]] | None = None
        """The next bucket, rows to skip, jobs that fill it; None once closed."""
        self._read_ahead()

    def __next__(self) -> torch.Tensor:
        if self._ahead is None:
            raise StopIteration
        parts, missing = [], self._batch_size
        while missing:
            if self._left is None:
                self._left = self._next_bucket()
            parts.append(self._left[:missing])
            missing -= len(parts[-1])
            rest = self._left[len(parts[-1]) :]
            self._left = rest if len(rest) else None
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def close(self) -> None:
        """End the stream and its thread; returns when the thread is gone."""
        self._left = self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        names, places, skip = next(self._plan)
        bucket = torch.empty(len(places), self._acts.d_in, pin_memory=self._pinned)
        places = places.split([self._acts.index["shards"][name]["rows"] for name in names])
        # a job a shard, so that ending the stream waits for one shard at most
        jobs = [
            self._thread.submit(self._acts._read_into, bucket, *each)
            for each in zip(names, places, strict=True)
        ]
        self._ahead = bucket, skip, jobs

    def _next_bucket(self) -> torch.Tensor:
        bucket, skip, jobs = self._ahead
        began = time.perf_counter()
        for job in jobs:
            job.result()
        self.waited += time.perf_counter() - began
        self._read_ahead()
        return bucket[skip:]


def open_activations(folder: str | Path) -> Activations:
    """Open the store that :func:`jumprelu.harvest` wrote to `folder`.

    Raises FileNotFoundError if there is none, ValueError if its harvest is unfinished or a shard is
    missing or truncated.
    """
    folder = Path(folder)
    if not (folder / INDEX).exists():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
        advice = "Give a folder that jumprelu.harvest(…, out=folder) wrote"
        if inside:
            advice = f"Open one of its sub-folders: {', '.join(inside)}"
        raise FileNotFoundError(f"no activations in {folder}: it has no {INDEX}. {advice}")
    index = read_index(folder)
    for name, record in index["shards"].items():
        if not is_whole(folder / name, record, checksum=False):
            raise ValueError(_damaged(folder / name))
    if len(index["shards"]) < index["n_shards"]:
        raise ValueError(
            f"{folder} has {len(index['shards'])} of {index['n_shards']} shards: its harvest was "
            "interrupted. Call jumprelu.harvest again with the same arguments: it goes on where it "
            "stopped"
        )
    return Activations(folder, index)


def _damaged(path: Path) -> str:
    return (
        f"{path} is missing, truncated or altered: its size or SHA-256 is not the one in {INDEX}. "
        "Delete the file and call jumprelu.harvest again with the same arguments: it makes this "
        "shard again and keeps the others"
    )


def _generator(*key: Any) -> torch.Generator:
    """A random generator of its own for every key; on the CPU, so that the order is the same on all
    machines."""
    return torch.Generator().manual_seed(int(digest(*key), 16))


def activations_from_tensor(
    x: torch.Tensor,
    out: str | Path,
    document: torch.Tensor | None = None,
    shard_rows: int = 2**16,
    dtype: str = "float32",
) -> Activations:
    """Store the rows of `x`, float [rows, d_in], in the folder `out`: toy data for whatever takes
    `Activations`.

    document: integers [rows], by default one a row. Token ids and positions are 0. Raises
    ValueError for another shape, NaN or infinity, or a folder that holds something else.
    """
    if x.ndim != 2 or not x.is_floating_point() or not x.numel():
        raise ValueError(
            f"expected a float tensor of shape [rows, d_in], got {tuple(x.shape)} of {x.dtype}"
        )
    torch_dtype(dtype)  # raises for an unknown one
    x = x.detach().cpu()
    document = torch.arange(len(x)) if document is None else document.cpu()
    zeros = torch.zeros(len(x), dtype=torch.int32)
    request = {
        "tokens": tensor_digest({"x": x, "document": document}),
        "model": None,
        "site": None,
        "layer": None,
        "dtype": dtype,
        "shard_rows": shard_rows,
    }
    starts = range(0, len(x), shard_rows)
    with locked(out, f"another process stores a tensor in {out}: waiting until it is done"):
        index = start_store(Path(out), request, None, x.shape[1], len(starts))
        for number, first in enumerate(starts):
            if shard_name(number) not in index["shards"]:
                rows = slice(first, first + shard_rows)
                shard = Shard(x[rows], zeros[rows], zeros[rows], document[rows])
                add_shard(Path(out), index, number, shard)
        return open_activations(out)


# Part of the key under which a store is kept, see harvest.py.
activations_from_tensor.version, activations_from_tensor.threads_matter = 1, False
