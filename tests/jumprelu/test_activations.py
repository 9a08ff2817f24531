"""The store's reader: a permutation every epoch, resumable anywhere, and damage is named."""

from __future__ import annotations

import gc
import threading
import time
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file

from jumprelu.activations import Activations, _generator, activations_from_tensor, open_activations
from jumprelu.files import read_json, sha256, write_json

ROWS = 500


@pytest.fixture
def acts(tmp_path) -> Activations:
    """500 rows of [i, −i], documents of 10 rows, in shards of 70."""
    i = torch.arange(float(ROWS))
    return activations_from_tensor(
        torch.stack([i, -i], 1),
        tmp_path / "store",
        document=torch.arange(ROWS) // 10,
        shard_rows=70,
    )


def numbers(batches) -> list[int]:
    return torch.cat(list(batches))[:, 0].int().tolist()


def test_shards_are_the_rows_in_order(acts):
    shards = list(acts.shards())
    assert [len(s.ids) for s in shards] == [70] * 7 + [10]
    assert numbers(s.activations for s in shards) == list(range(ROWS))
    assert torch.cat([s.document for s in shards]).tolist() == [i // 10 for i in range(ROWS)]
    assert (
        shards[0].ids.dtype == shards[0].position.dtype == shards[0].document.dtype == torch.int32
    )
    assert len(acts) == ROWS and acts.d_in == 2 and acts.site is None and acts.dtype == "float32"
    assert "500 rows of 2 from a tensor, float32" in repr(acts)


@pytest.mark.parametrize("bucket_rows", [1, 70, 150, 2**18])
@pytest.mark.parametrize("batch_size", [1, 33, 70, 500, 1200])
def test_every_epoch_is_a_permutation_in_full_batches(acts, batch_size, bucket_rows):
    n = -(-2 * ROWS // batch_size)
    batches = list(islice(acts.batches(batch_size, seed=1, bucket_rows=bucket_rows), n))
    assert all(b.shape == (batch_size, 2) and b.dtype == torch.float32 for b in batches)
    stream = numbers(batches)
    first, second = stream[:ROWS], stream[ROWS : 2 * ROWS]
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("bucket_rows", [1, 150, 2**18])
@pytest.mark.parametrize("batch_size", [7, 33, 70, 1200])
def test_start_is_as_if_the_earlier_batches_had_been_read(acts, batch_size, bucket_rows):
    n = 3 * ROWS // batch_size + 2
    full = list(islice(acts.batches(batch_size, seed=3, bucket_rows=bucket_rows), n))
    for start in {*range(0, n, max(1, n // 25)), n - 1}:
        resumed = list(
            islice(
                acts.batches(batch_size, seed=3, start=start, bucket_rows=bucket_rows), n - start
            )
        )
        assert torch.equal(torch.stack(resumed), torch.stack(full[start:]))


def test_start_reads_no_shard_that_it_skips(acts):
    next(acts.batches(10, seed=0, start=7 * ROWS // 10 + 20, bucket_rows=70))
    assert len(acts._checked) <= 2


def test_order_depends_on_seed_and_bucket_and_not_on_batch_size(acts):
    def stream(batch_size, seed, bucket_rows):
        return numbers(
            islice(acts.batches(batch_size, seed, bucket_rows=bucket_rows), ROWS // batch_size)
        )

    assert stream(10, 0, 150) == stream(50, 0, 150) == stream(500, 0, 150)
    assert stream(10, 0, 150) != stream(10, 1, 150) != stream(10, 1, 300)


def test_a_bucket_mixes_its_shards_and_holds_no_more_than_asked(acts):
    for epoch in range(5):
        buckets = acts._buckets(0, epoch, 150)
        sizes = [sum(acts.index["shards"][name]["rows"] for name in names) for names in buckets]
        assert sum(sizes) == ROWS and max(sizes) <= 150
        assert sorted(sum(buckets, [])) == sorted(acts.index["shards"])
    first = numbers(islice(acts.batches(70, seed=0, bucket_rows=150), 1))
    assert len({i // 70 for i in first}) >= 2


def test_rows_are_a_uniform_sample(acts):
    sample = acts.rows(200, seed=4)
    assert sample.shape == (200, 2) and len(set(numbers([sample]))) == 200
    assert torch.equal(sample, acts.rows(200, seed=4)) and not torch.equal(
        sample, acts.rows(200, seed=5)
    )
    assert sorted(numbers([acts.rows(10**6)])) == list(range(ROWS))
    means = torch.stack([acts.rows(50, seed=s)[:, 0].mean() for s in range(100)])
    standard_error = ROWS / 12**0.5 / (50 * 100) ** 0.5
    assert abs(means.mean() - (ROWS - 1) / 2) < 4 * standard_error
    with pytest.raises(ValueError, match="asked for 0 rows"):
        acts.rows(0)


@pytest.mark.parametrize("dtype, error", [("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_storage_types_round_to_nearest_and_are_read_as_float32(tmp_path, dtype, error):
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    acts = activations_from_tensor(x, tmp_path, dtype=dtype)
    got = next(acts.shards()).activations
    assert (
        got.dtype == torch.float32
        and acts.dtype == dtype
        and next(acts.batches(5)).dtype == torch.float32
    )
    assert ((got - x).abs() <= error * x.abs()).all()


def test_fingerprint_is_of_request_and_content(acts, tmp_path):
    x = torch.cat([s.activations for s in acts.shards()])
    document = torch.cat([s.document for s in acts.shards()]).long()
    again = activations_from_tensor(x, tmp_path / "again", document=document, shard_rows=70)
    other = activations_from_tensor(x + 1, tmp_path / "other", document=document, shard_rows=70)
    assert (
        open_activations(acts.folder).fingerprint
        == acts.fingerprint
        == again.fingerprint
        != other.fingerprint
    )


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"batch_size": 1, "start": -1}, {"batch_size": 1, "bucket_rows": 0}]
)
def test_impossible_batches_are_refused(acts, bad):
    with pytest.raises(ValueError, match="expected at least 1, 0 and 1"):
        next(acts.batches(**bad))


# ---- the thread that reads ahead


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def readers() -> set[threading.Thread]:
    return {
        thread for thread in threading.enumerate() if thread.name.startswith("jumprelu-batches")
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d_in", [3, 2**15 + 5])  # a row wider than a piece
def test_the_order_is_that_of_shuffling_a_bucket_in_memory(tmp_path, d_in, dtype):
    """The order of the data is part of a result: rows are drawn bucket by bucket, with a generator
    for each."""
    acts = activations_from_tensor(torch.randn(60, d_in), tmp_path, shard_rows=7, dtype=dtype)
    stored = {
        f"shard-{i:05d}.safetensors": shard.activations for i, shard in enumerate(acts.shards())
    }
    expected = []
    for epoch in range(3):
        for number, names in enumerate(acts._buckets(5, epoch, 21)):
            bucket = torch.cat([stored[name] for name in names])
            expected.append(
                bucket[torch.randperm(len(bucket), generator=_generator(5, epoch, number))]
            )
    assert torch.equal(
        torch.cat(list(islice(acts.batches(4, seed=5, bucket_rows=21), 45))), torch.cat(expected)
    )


def test_the_next_bucket_is_read_meanwhile_and_no_more(acts):
    batches = acts.batches(10, seed=0, bucket_rows=150)
    plan = acts._buckets(0, 0, 150)
    wait_until(lambda: acts._checked == set(plan[0]))  # before a batch is asked for
    next(batches)
    wait_until(lambda: acts._checked == {*plan[0], *plan[1]})
    wait_until(lambda: all(job.done() for job in batches._ahead[2]))
    time.sleep(0.05)
    assert acts._checked == {*plan[0], *plan[1]}  # two buckets in memory, not a third


def test_waiting_is_counted(acts, monkeypatch):
    read = Activations._read
    monkeypatch.setattr(
        Activations, "_read", lambda *a: (time.sleep(0.05), read(*a))[1]
    )  # a slow disk
    batches, began = acts.batches(ROWS, seed=0), time.monotonic()
    next(batches)
    assert (
        4 * 0.05 < batches.waited <= time.monotonic() - began
    )  # 8 shards, some of which may have been read before


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_the_thread_ends_with_the_stream(acts, taken):
    before = readers()
    batches = acts.batches(10, bucket_rows=70)
    assert len(readers() - before) == 1 and len(list(islice(batches, taken))) == taken
    batches.close()
    assert readers() == before and list(batches) == []
    abandoned = acts.batches(10, bucket_rows=70)
    assert len(list(islice(abandoned, taken))) == taken
    gc.disable()  # dropping the last reference is enough
    try:
        del abandoned
        wait_until(lambda: readers() == before)
    finally:
        gc.enable()


def test_closing_waits_for_one_shard_and_not_for_a_bucket(acts, monkeypatch):
    read, begun, go = Activations._read, [], threading.Event()
    monkeypatch.setattr(
        Activations,
        "_read",
        lambda self, name: (begun.append(name), go.wait(20), read(self, name))[2],
    )
    batches = acts.batches(10)
    wait_until(lambda: begun)
    threading.Timer(0.2, go.set).start()
    batches.close()
    assert go.is_set() and len(begun) == 1 < len(acts.index["shards"])


def test_an_error_of_the_thread_comes_in_its_turn(acts):
    """All batches before the damaged bucket are there; then the error, each time it is asked
    for."""
    names = sum(acts._buckets(0, 0, 70), [])
    before = sum(acts.index["shards"][name]["rows"] for name in names[:3])
    (acts.folder / names[3]).unlink()
    batches = acts.batches(10, seed=0, bucket_rows=70)
    assert len(list(islice(batches, before // 10))) == before // 10
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{names[3]} is missing, truncated or altered"):
            next(batches)
    batches.close()


# ---- damage


def test_a_truncated_shard_is_named_on_opening(acts):
    path = acts.folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match="shard-00002.safetensors is missing, truncated or altered.*Delete the file and call",
    ):
        open_activations(acts.folder)


def test_a_missing_shard_is_named_on_opening(acts):
    (acts.folder / "shard-00007.safetensors").unlink()
    with pytest.raises(ValueError, match="shard-00007.safetensors is missing"):
        open_activations(acts.folder)


def test_an_altered_shard_is_named_on_its_first_reading(acts):
    path = acts.folder / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    acts = open_activations(acts.folder)  # same size: opening does not read it
    shards = acts.shards()
    assert next(shards) and next(shards)
    for read in (
        lambda: next(shards),
        lambda: acts.rows(ROWS),
        lambda: list(islice(acts.batches(100), 5)),
    ):
        with pytest.raises(
            ValueError, match="shard-00002.safetensors is missing, truncated or altered"
        ):
            read()


def test_nan_in_a_shard_is_named_by_file_and_row(acts):
    """A foreign writer's shard, whose checksum fits: the values are looked at all the same."""
    path = acts.folder / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors["activations"] = tensors["activations"].clone()
    tensors["activations"][5, 1] = float("nan")
    tensors["activations"][6, 0] = float("inf")
    save_file(tensors, path)
    index = read_json(acts.folder / "index.json")
    index["shards"][path.name] |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    write_json(acts.folder / "index.json", index)
    with pytest.raises(
        ValueError,
        match="shard-00001.safetensors holds NaN or infinity in 2 of 70 rows, first row 5",
    ):
        list(open_activations(acts.folder).shards())
    with pytest.raises(
        ValueError,
        match="shard-00001.safetensors holds NaN or infinity in 2 of 70 rows, first row 5",
    ):
        next(open_activations(acts.folder).batches(10))


@pytest.mark.parametrize("dtype, largest", [("float32", 3e38), ("float16", 60_000.0)])
def test_numbers_whose_sum_overflows_are_read(tmp_path, dtype, largest):
    x = torch.full((40, 50), largest)
    acts = activations_from_tensor(x, tmp_path, dtype=dtype)
    assert torch.equal(next(acts.shards()).activations, x.to(getattr(torch, dtype)).float())


def test_nan_is_not_stored(tmp_path):
    x = torch.ones(10, 2)
    x[7, 0] = float("nan")
    with pytest.raises(
        ValueError,
        match="shard-00001.safetensors would hold NaN or infinity in 1 of 5 rows, first row 2",
    ):
        activations_from_tensor(x, tmp_path, shard_rows=5)
    assert [p.name for p in tmp_path.glob("*shard*")] == ["shard-00000.safetensors"]
    with pytest.raises(ValueError, match="1 of 2 shards: its harvest was interrupted"):
        open_activations(tmp_path)


@pytest.mark.parametrize(
    "x", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.long), torch.zeros(0, 2)]
)
def test_a_tensor_of_another_kind_is_refused(tmp_path, x):
    with pytest.raises(ValueError, match=r"expected a float tensor of shape \[rows, d_in\]"):
        activations_from_tensor(x, tmp_path)


def test_another_tensor_does_not_overwrite_a_store(acts):
    before = {p.name: p.read_bytes() for p in acts.folder.iterdir()}
    with pytest.raises(
        ValueError,
        match="holds other activations: .*tokens is '[0-9a-f]{16}' there and '[0-9a-f]{16}' here",
    ):
        activations_from_tensor(torch.ones(3, 2), acts.folder)
    assert {p.name: p.read_bytes() for p in acts.folder.iterdir()} == before


def test_shards_without_an_index_are_not_overwritten(acts):
    (acts.folder / "index.json").unlink()
    with pytest.raises(ValueError, match="holds shards without index.json"):
        activations_from_tensor(torch.ones(3, 2), acts.folder)


def test_opening_what_is_no_store(acts, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="no activations in .*nothing: .*Give a folder that jumprelu.harvest",
    ):
        open_activations(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="Open one of its sub-folders: store"):
        open_activations(tmp_path)
    for broken, message in (
        ({"format": 99}, "format 99, this version reads 1"),
        ([], "format 'list'"),
    ):
        write_json(tmp_path / "store/index.json", broken)
        with pytest.raises(ValueError, match=message):
            open_activations(tmp_path / "store")
    with pytest.raises(ValueError, match="unknown dtype 'int8': expected one of float32"):
        activations_from_tensor(torch.ones(3, 2), tmp_path / "new", dtype="int8")
