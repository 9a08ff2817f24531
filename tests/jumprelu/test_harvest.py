"""Harvest: the stored rows are the captured ones, and a killed process loses nothing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from jumprelu.activations import open_activations
from jumprelu.corpus import Tokens
from jumprelu.harvest import harvest
from jumprelu.lm import LM, load_lm
from jumprelu.sites import SITES, capture
from tests.models import D_MODEL, FAMILIES, random_ids, save_tiny, tiny_lm, tiny_model

IDS = random_ids(20, 9)
KEY = ("resid_post", 1)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm()


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_rows_are_the_captured_ones(family, tmp_path):
    lm, tokens = tiny_lm(family), Tokens(IDS, torch.arange(20) // 4)
    acts = harvest(lm, tokens, "attn_out", layer=2, out=tmp_path, batch_rows=3, shard_rows=7)
    shards = list(acts.shards())
    assert [len(s.ids) for s in shards] == [7 * 8, 7 * 8, 6 * 8]
    # batches of 3, 3 and 1 rows within a shard of 7: the same forward passes, so the same bits
    parts = [rows for shard in IDS.split(7) for rows in shard.split(3)]
    expected = torch.cat(
        [capture(lm, [("attn_out", 2)], rows)["attn_out", 2][:, 1:].flatten(0, 1) for rows in parts]
    )
    assert torch.equal(torch.cat([s.activations for s in shards]), expected)
    assert torch.equal(torch.cat([s.ids for s in shards]).long(), IDS[:, 1:].flatten())
    assert torch.cat([s.position for s in shards]).tolist() == list(range(1, 9)) * 20
    assert torch.cat([s.document for s in shards]).tolist() == [i // 32 for i in range(160)]
    assert (acts.site, acts.layer, acts.model_name, len(acts)) == (
        "attn_out",
        2,
        f"tiny-{family}",
        160,
    )


def test_special_positions_are_dropped_wherever_they_stand(lm, tmp_path):
    ids = IDS.clone()
    ids[3, 4], ids[5, 5:], ids[7] = 1, 0, 2
    acts = harvest(lm, ids, layer=0, out=tmp_path)
    [shard] = acts.shards()
    assert len(acts) == 20 * 8 - 1 - 4 - 8 and not set(shard.ids.tolist()) & {0, 1, 2}
    assert 7 not in shard.document and set(shard.position[shard.document == 5].tolist()) == {
        1,
        2,
        3,
        4,
    }
    with pytest.raises(ValueError, match=r"all tokens are special \(0, 1, 2 for tiny-gemma2\)"):
        harvest(lm, torch.full((2, 3), 2), layer=0, out=tmp_path / "none")


def test_several_sites_and_layers_in_one_pass_equal_one_by_one(lm, tmp_path):
    together = harvest(lm, IDS, SITES, layer=[0, 2], out=tmp_path / "all", shard_rows=8)
    assert list(together) == [(site, layer) for site in SITES for layer in (0, 2)]
    assert together["mlp_out", 2].folder == tmp_path / "all" / "mlp_out-2"
    for (site, layer), acts in together.items():
        alone = harvest(lm, IDS, site, layer=layer, out=tmp_path / f"{site}{layer}", shard_rows=8)
        assert files(alone.folder) == files(acts.folder)
        assert alone.fingerprint == acts.fingerprint
    # one store lost a shard: the others stay as they are
    before = files(tmp_path / "all")
    (tmp_path / "all/mlp_out-0/shard-00001.safetensors").unlink()
    harvest(lm, IDS, SITES, layer=[0, 2], out=tmp_path / "all", shard_rows=8)
    assert files(tmp_path / "all") == before
    assert list(harvest(lm, IDS, layer=[1], out=tmp_path / "list")) == [KEY]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_storage_rounds_the_float32_values(lm, dtype, tmp_path):
    full, half = (
        harvest(lm, IDS, layer=1, out=tmp_path / "full"),
        harvest(lm, IDS, layer=1, out=tmp_path / "half", dtype=dtype),
    )
    exact = next(full.shards()).activations
    assert torch.equal(next(half.shards()).activations, exact.to(getattr(torch, dtype)).float())
    assert (half.dtype, half.fingerprint != full.fingerprint) == (dtype, True)


def test_a_model_of_unusual_size_without_a_tokenizer(tmp_path):
    folder = save_tiny(
        "llama",
        tmp_path / "stranger",
        vocab_size=1237,
        hidden_size=36,
        intermediate_size=50,
        num_attention_heads=6,
        num_key_value_heads=3,
        bos_token_id=1111,
        eos_token_id=[1112, 1113],
        pad_token_id=None,
    )
    lm = load_lm(folder, device="cpu")
    assert lm.tokenizer is None
    ids = torch.randint(0, 1237, (5, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[2, 5] = 1111, 1113
    acts = harvest(lm, ids, "mlp_out", layer=2, out=tmp_path / "acts")
    assert (len(acts), acts.d_in, acts.model_name) == (5 * 11 - 1, 36, "stranger")


def test_a_finished_store_is_returned_without_a_forward_pass(tmp_path):
    lm, out = tiny_lm(), tmp_path
    first = harvest(lm, IDS, layer=1, out=out, shard_rows=6)
    stamps = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    shapes = []
    lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    again = harvest(lm, IDS, layer=1, out=out, shard_rows=6)
    assert (
        again.fingerprint == first.fingerprint
        and {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == stamps
    )
    assert shapes == [(1, 1)]  # one token, to learn the site's width


@pytest.mark.parametrize(
    "change",
    ["model", "tokens", "documents", "site", "layer", "dtype", "shard_rows", "dropped_ids"],
)
def test_another_request_overwrites_nothing(lm, tmp_path, change):
    tokens = Tokens(IDS, torch.zeros(20, dtype=torch.long))
    harvest(lm, tokens, layer=1, out=tmp_path, shard_rows=8)
    before = files(tmp_path)
    model, site, layer, options = lm, "resid_post", 1, {"shard_rows": 8}
    if change == "model":
        model = tiny_lm(seed=1)
    elif change == "tokens":
        tokens = Tokens(IDS.flip(0), tokens.document)
    elif change == "documents":
        tokens = Tokens(IDS, torch.ones(20, dtype=torch.long))
    elif change == "site":
        site = "mlp_out"
    elif change == "layer":
        layer = 2
    elif change == "dropped_ids":
        model = tiny_lm(eos_token_id=None)
    else:
        options[change] = {"dtype": "float16", "shard_rows": 4}[change]
    name = "tokens" if change == "documents" else change
    with pytest.raises(
        ValueError,
        match=rf"holds other activations: .*{name} is .* there and .* here.*Choose another folder",
    ):
        harvest(model, tokens, site, layer=layer, out=tmp_path, **options)
    assert files(tmp_path) == before


# ---- interruption


def harvest_and_die(out: Path, n: int, after: bool) -> None:
    """Harvest, and SIGKILL this very process around its n-th rename: before it, or after."""
    replace, count = os.replace, iter(range(100))

    def deadly(*paths):
        last = next(count) == n
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly
    harvest(tiny_lm(), IDS, layer=1, out=out, shard_rows=7, batch_rows=3)


def harvest_slowly(out: Path) -> None:
    lm = tiny_lm()
    lm.model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    harvest(lm, IDS, layer=1, out=out, shard_rows=7, batch_rows=3)


def harvest_on_a_small_disk(out: Path, errors) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4000, 4000)
    )  # bytes a file: fewer than a shard, more than the index
    try:
        harvest(tiny_lm(), IDS, layer=1, out=out, shard_rows=7, batch_rows=3)
    except OSError as error:
        errors.put((error.errno, str(error)))


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported everything: quick, and each can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.test_harvest", "transformers.models.gemma2.modeling_gemma2"]
    )
    return context


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted harvest."""
    out = tmp_path_factory.mktemp("whole")
    harvest(tiny_lm(), IDS, layer=1, out=out, shard_rows=7, batch_rows=3)
    assert len(files(out)) == 4
    return files(out)


# the renames of a harvest of three shards: index, shard, index, shard, index, shard, index
@pytest.mark.parametrize("n, after", [(n, after) for n in range(7) for after in (False, True)])
def test_sigkill_at_any_rename_loses_nothing(processes, whole, tmp_path, n, after):
    process = processes.Process(target=harvest_and_die, args=(tmp_path, n, after))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if n + after > 0:
        left = {name: data for name, data in files(tmp_path).items() if not name.startswith(".")}
        assert len(left) == min(1 + (n + after) // 2, 4)
        assert all(whole[name] == data for name, data in left.items() if name != "index.json")
    if n + after < 7:
        with pytest.raises((ValueError, FileNotFoundError), match="interrupted|no activations"):
            open_activations(tmp_path)
    harvest(tiny_lm(), IDS, layer=1, out=tmp_path, shard_rows=7, batch_rows=3)
    assert files(tmp_path) == whole  # and no temporary file is left


def test_sigkill_from_outside_while_the_model_runs(processes, whole, tmp_path):
    process = processes.Process(target=harvest_slowly, args=(tmp_path,))
    process.start()
    while not (tmp_path / "shard-00000.safetensors").exists():
        assert process.is_alive()
        process.join(0.01)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and "shard-00002.safetensors" not in files(tmp_path)
    harvest(tiny_lm(), IDS, layer=1, out=tmp_path, shard_rows=7, batch_rows=3)
    assert files(tmp_path) == whole


def test_damaged_shards_are_made_again_on_resume(whole, tmp_path):
    """One altered, one cut off, one deleted as the reader's error advises."""
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    altered = bytearray(whole["shard-00000.safetensors"])
    altered[-5] ^= 255
    (tmp_path / "shard-00000.safetensors").write_bytes(altered)
    (tmp_path / "shard-00001.safetensors").write_bytes(whole["shard-00001.safetensors"][:-1])
    (tmp_path / "shard-00002.safetensors").unlink()
    harvest(tiny_lm(), IDS, layer=1, out=tmp_path, shard_rows=7, batch_rows=3)
    assert files(tmp_path) == whole


def test_a_full_disk_names_the_file_and_keeps_the_old_ones(processes, whole, tmp_path):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "shard-00001.safetensors").unlink()
    before = files(tmp_path)
    errors = processes.Queue()
    process = processes.Process(target=harvest_on_a_small_disk, args=(tmp_path, errors))
    process.start()
    number, message = errors.get(timeout=60)
    process.join(60)
    assert (
        number == errno.EFBIG
        and f"could not write {tmp_path / 'shard-00001.safetensors'}: File too large" in message
    )
    assert files(tmp_path) == before
    harvest(tiny_lm(), IDS, layer=1, out=tmp_path, shard_rows=7, batch_rows=3)
    assert files(tmp_path) == whole


# ---- errors


def test_nan_is_named_by_row_of_tokens_and_its_shard_is_not_written(tmp_path):
    model = tiny_model("llama")
    ids = IDS.clone()
    ids[ids == 250] = 249
    ids[12, 6] = 250
    model.model.embed_tokens.weight.data[250] = float("nan")
    # earlier positions are lost too: a masked weight of 0 times NaN is NaN
    with pytest.raises(
        ValueError,
        match="bad gives NaN or infinity at mlp_out of layer 1, row of tokens 12, first at",
    ):
        harvest(
            LM(model, name="bad"), ids, "mlp_out", layer=1, out=tmp_path, shard_rows=7, batch_rows=2
        )
    assert sorted(files(tmp_path)) == ["index.json", "shard-00000.safetensors"]


def test_what_float16_cannot_hold_is_an_error_that_says_so(tmp_path):
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data *= 1e6
    lm = LM(model, name="huge")
    with pytest.raises(
        ValueError, match="row of tokens 0, .*stored as float16.*ends at 65504.*dtype='bfloat16'"
    ):
        harvest(lm, IDS, layer=0, out=tmp_path / "half", dtype="float16")
    assert len(harvest(lm, IDS, layer=0, out=tmp_path / "brain", dtype="bfloat16")) == 160


@pytest.mark.parametrize(
    "given, message",
    [
        ({"site": "resid_pre"}, "unknown site 'resid_pre'"),
        ({"layer": 3}, "unknown layer 3: tiny-gemma2 has layers 0 to 2"),
        ({"layer": []}, "nothing to capture"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"batch_rows": 0}, "batch_rows is 0"),
        ({"shard_rows": 0}, "shard_rows 0"),
        (
            {"tokens": torch.zeros(3)},
            r"tokens must be integer ids of shape \[n_rows, context_size\]",
        ),
        (
            {"tokens": torch.full((2, 3), 300)},
            "the tokens were made with another model's tokenizer",
        ),
    ],
)
def test_wrong_arguments_are_named_and_leave_no_folder(lm, tmp_path, given, message):
    arguments = {"tokens": IDS, "site": "resid_post", "layer": 1, **given}
    with pytest.raises(ValueError, match=message):
        harvest(
            lm, arguments.pop("tokens"), arguments.pop("site"), out=tmp_path / "new", **arguments
        )
    assert not (tmp_path / "new").exists()


def test_shards_are_whole_rows_of_about_the_same_size_by_default(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[harvest.__module__], "SHARD_NUMBERS", 3 * 9 * D_MODEL + 5)
    acts = harvest(lm, IDS, layer=1, out=tmp_path / "three", batch_rows=2)
    assert [len(s.ids) for s in acts.shards()] == [3 * 8] * 6 + [2 * 8]
    acts = harvest(lm, IDS, layer=1, out=tmp_path / "eight", batch_rows=8)  # a batch is never cut
    assert [len(s.ids) for s in acts.shards()] == [8 * 8] * 2 + [4 * 8]


def two_at_once(folder: Path, barrier, harvested) -> None:
    lm, ids = tiny_lm(), random_ids(60, 9)
    barrier.wait(60)
    acts = harvest(lm, ids, layer=1, out=folder, batch_rows=1, shard_rows=1)
    harvested.put((acts.fingerprint, len(acts.index["shards"])))


@pytest.mark.slow
def test_two_processes_harvest_into_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, harvested = context.Barrier(2), context.Queue()
    pair = [
        context.Process(target=two_at_once, args=(tmp_path / "both", barrier, harvested))
        for _ in range(2)
    ]
    for process in pair:
        process.start()
    one, other = (harvested.get(timeout=120) for _ in pair)
    for process in pair:
        process.join(60)
    alone = harvest(
        tiny_lm(), random_ids(60, 9), layer=1, out=tmp_path / "alone", batch_rows=1, shard_rows=1
    )
    assert one == other == (alone.fingerprint, 60)
    assert files(tmp_path / "both") == files(tmp_path / "alone")
