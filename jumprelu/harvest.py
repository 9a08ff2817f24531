"""Harvest: run the language model over rows of tokens and store its activations.

Notable here:
- a shard is a function of its rows of tokens alone, is written by rename, and is entered in the
  index afterwards. So a process that is killed at any point leaves a store that the same call
  completes, byte for byte as if it had never stopped (on one machine, with one number of threads
  and one `batch_rows`: these change the last bits of a sum).
- the model does not wait: activations are copied to the host while the next batch is computed, and
  a thread checks and writes a shard while the next one is filled. Memory: two shards a site, and
  one batch in the model.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .activations import Activations, open_activations
from .corpus import Tokens, as_tokens
from .files import locked, tensor_digest
from .lm import LM
from .sites import Key, capture
from .store import Shard, add_shard, rows_not_finite, shard_name, start_store, torch_dtype

SHARD_NUMBERS = 2**24
"""Numbers in a shard by default (64 MiB in float32), before rounding to whole rows of tokens."""


def harvest(
    lm: LM,
    tokens: Tokens | torch.Tensor,
    site: str | Sequence[str] = "resid_post",
    *,
    layer: int | Sequence[int],
    out: str | Path,
    dtype: str = "float32",
    batch_rows: int = 16,
    shard_rows: int | None = None,
) -> Activations | dict[Key, Activations]:
    """Store the activations of `lm` on `tokens` at `site` of `layer` in the folder `out`, and open
    the store.

    tokens: rows of ids, [n_rows, context_size]. site, layer: one each gives one store in `out`; if
    either is a sequence, all pairs are taken in one pass, each pair in the sub-folder `site-layer`,
    and the result is a dictionary by (site, layer). dtype: on disk, "float32", "bfloat16" or
    "float16". batch_rows: rows of tokens a forward pass. shard_rows: rows of tokens a shard, by
    default about 16 M numbers, but a batch at least.

    Positions that hold BOS, EOS or padding are dropped (:attr:`LM.special_ids`). A finished store
    is returned at once; an interrupted one is completed.

    Raises ValueError for an unknown site, layer, layout or dtype, unreadable tokens, NaN or
    infinity (naming the row of tokens; that shard is not written), or a folder that holds other
    activations (nothing is overwritten); OSError naming the file if it cannot be written.
    """
    tokens = as_tokens(tokens)
    lm.check_ids(tokens.ids)
    torch_dtype(dtype)  # raises for an unknown one
    several = not (isinstance(site, str) and isinstance(layer, int))
    sites = [site] if isinstance(site, str) else site
    layers = [layer] if isinstance(layer, int) else layer
    keys = [(s, n) for s in sites for n in layers]
    widths = {key: value.shape[-1] for key, value in capture(lm, keys, tokens.ids[:1, :1]).items()}
    if shard_rows is None:
        shard_rows = max(1, batch_rows, SHARD_NUMBERS // (tokens.ids.shape[1] * lm.d_model))
    if batch_rows < 1 or shard_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}, shard_rows {shard_rows}: expected 1 or more")
    keep = ~lm.is_special(tokens.ids)
    if not keep.any():
        special = ", ".join(map(str, lm.special_ids))
        raise ValueError(f"all tokens are special ({special} for {lm.name}): nothing is left")

    folders = {key: Path(out) / f"{key[0]}-{key[1]}" if several else Path(out) for key in keys}
    request = {
        "model": lm.fingerprint,
        "tokens": tensor_digest({"ids": tokens.ids, "document": tokens.document}),
        "dropped_ids": list(lm.special_ids),
        "dtype": dtype,
        "shard_rows": shard_rows,
    }
    with ExitStack() as stack:
        for folder in sorted(folders.values()):  # in one order, so that no two wait for each other
            waiting = f"another process harvests into {folder}: waiting until it is done"
            stack.enter_context(locked(folder, waiting))
        n_shards = -(-len(tokens) // shard_rows)
        targets = []
        for key, folder in folders.items():
            own = request | {"site": key[0], "layer": key[1]}
            index = start_store(folder, own, lm.name, widths[key], n_shards)
            targets.append(_Target(key, folder, index))
        _complete(lm, tokens, keep, targets, batch_rows)
        stores = {key: open_activations(folder) for key, folder in folders.items()}
    return stores if several else stores[keys[0]]


# Part of the key under which a store is kept: raise it with every change of what is stored. Number
# of threads and version of torch are left out: a store is taken as it is.
harvest.version, harvest.threads_matter = 1, False


class _Target(NamedTuple):
    """A store to be completed."""

    key: Key
    folder: Path
    index: dict[str, Any]


def _complete(
    lm: LM, tokens: Tokens, keep: torch.Tensor, targets: list[_Target], batch_rows: int
) -> None:
    """Make the shards that the stores lack. keep: bool [n_rows, context_size], the positions whose
    activations are stored."""
    index = targets[0].index
    shard_rows, dtype = index["request"]["shard_rows"], torch_dtype(index["request"]["dtype"])
    missing: dict[int, list[_Target]] = {}
    for number in range(index["n_shards"]):
        wanted = [one for one in targets if shard_name(number) not in one.index["shards"]]
        if wanted:
            missing[number] = wanted
    total = sum(int(keep[n * shard_rows : (n + 1) * shard_rows].sum()) for n in missing)
    leave, on_gpu = bool(missing), lm.device.type == "cuda"
    progress = tqdm(
        total=total, desc="harvesting", unit="act", unit_scale=True, mininterval=2, leave=leave
    )
    writing: list[Future] = []
    with progress, ThreadPoolExecutor(1, "jumprelu-shards") as writer:
        for number, wanted in missing.items():
            rows = slice(number * shard_rows, (number + 1) * shard_rows)
            part, kept = tokens[rows], keep[rows]
            row, position = kept.nonzero(as_tuple=True)
            shards = {}
            for one in wanted:
                empty = torch.empty(len(row), one.index["d_in"], dtype=dtype, pin_memory=on_gpu)
                shards[one.key] = Shard(empty, part.ids[kept], position, part.document[row])
            done = 0
            for ids, some in zip(part.ids.split(batch_rows), kept.split(batch_rows), strict=True):
                chosen = some.flatten().nonzero().squeeze(-1).to(lm.device)
                for key, value in capture(lm, shards, ids).items():
                    new = value.flatten(0, 1)[chosen.to(value.device)].to(dtype)
                    shards[key].activations[done : done + len(chosen)].copy_(new, non_blocking=True)
                done += len(chosen)
                progress.update(len(chosen))
            if on_gpu:
                torch.cuda.synchronize(lm.device)
            for job in writing:
                job.result()
            writing = [
                writer.submit(_check_and_add, lm, one, number, shards[one.key], kept)
                for one in wanted
            ]
        for job in writing:
            job.result()


def _check_and_add(lm: LM, to: _Target, number: int, shard: Shard, keep: torch.Tensor) -> None:
    """Write a shard; keep: bool [n_rows, context_size], the positions that it holds."""
    bad = rows_not_finite(shard.activations)
    if len(bad):
        row, position = keep.nonzero()[int(bad[0])].tolist()
        row += number * to.index["request"]["shard_rows"]
        (site, layer), dtype = to.key, to.index["request"]["dtype"]
        raise ValueError(
            f"{lm.name} gives NaN or infinity at {site} of layer {layer}, row of tokens {row}, "
            f"first at position {position}, stored as {dtype}. That shard was not written; check "
            "the weights, or use another type than float16, which ends at 65504: load the model "
            "with dtype='float32' or 'bfloat16', harvest with dtype='bfloat16' or 'float32'"
        )
    add_shard(to.folder, to.index, number, shard)
