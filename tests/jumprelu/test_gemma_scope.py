"""Gemma Scope's files, paths and choices; memory; the hub, by a server on loopback; SAELens's own
loader where there is one."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import hub as fake
import numpy as np
import pytest
import safetensors.numpy
import torch
from huggingface_hub import constants

import jumprelu as jr
from jumprelu.exchange import formats, gemma_scope
from jumprelu.exchange.gemma_scope import available, path_for, save_gemma_scope
from jumprelu.exchange.loading import load_sae
from jumprelu.sae import SAE, Origin, Transcoder

D, F = 6, 20
RES = "google/gemma-scope-9b-pt-res"
TOKEN = "hf_thistokenmustbeseennowhere"


def numbers(seed: int = 0, d: int = D, f: int = F, lower: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a released file; atoms are not quite of norm 1."""
    g = np.random.default_rng(seed)
    arrays = {
        "W_enc": g.normal(size=(d, f)),
        "b_enc": g.normal(size=f) / 5,
        "W_dec": g.normal(size=(f, d)),
        "b_dec": g.normal(size=d),
        "threshold": g.uniform(0.2, 1, size=f),
    }
    arrays["W_dec"] *= 1.001 / np.linalg.norm(arrays["W_dec"], axis=1, keepdims=True)
    return {k.lower() if lower else k: v.astype(np.float32) for k, v in arrays.items()}


def npz(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def same(model: SAE, arrays: dict[str, np.ndarray]) -> bool:
    return all(
        np.array_equal(getattr(model, name).detach().numpy(), arrays[name])
        for name in gemma_scope.ARRAYS
    )


# ---- one file


def test_a_file_is_run_as_gemma_scope_runs_it(tmp_path):
    arrays = numbers()
    model = load_sae(put(tmp_path / "params.npz", npz(arrays)), site="mlp_out", layer=3)
    assert same(model, arrays) and model.origin == Origin(None, "mlp_out", 3) and type(model) is SAE
    assert model.W_enc.T.is_contiguous() and model.W_dec.is_contiguous()
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    pre = x.numpy() @ arrays["W_enc"] + arrays["b_enc"]  # b_dec is not subtracted
    acts = np.where(pre > arrays["threshold"], np.maximum(pre, 0), 0)
    assert 0 < (acts > 0).mean() < 1
    torch.testing.assert_close(model.encode(x).detach(), torch.from_numpy(acts))
    torch.testing.assert_close(
        model(x).detach(), torch.from_numpy(acts @ arrays["W_dec"] + arrays["b_dec"])
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model(x), torch.from_numpy(acts @ arrays["W_dec"] + arrays["b_dec"])
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda a: npz(a, compressed=True),
        lambda a: npz({k: np.asfortranarray(v) for k, v in a.items()}),
        lambda a: npz({k: np.asfortranarray(v) for k, v in a.items()}, compressed=True),
        lambda a: npz({k.lower(): v for k, v in a.items()}),
        lambda a: npz({k: v.astype(np.float64) for k, v in a.items()}),
        lambda a: npz(a | {"scaling_factor": np.ones(F, np.float32)}),
        lambda a: npz(a | {"scaling_factor": np.float32(1)}),
    ],
    ids=["compressed", "transposed", "both", "lower case", "float64", "factors of 1", "a factor"],
)
def test_every_way_to_store_the_arrays_gives_the_same_sae(tmp_path, make):
    assert same(load_sae(put(tmp_path / "params.npz", make(numbers()))), numbers())


def test_a_scaling_factor_scales_what_each_latent_adds(tmp_path):
    arrays, factor = numbers(), np.linspace(0.5, 2, F, dtype=np.float32)
    plain = load_sae(put(tmp_path / "a/params.npz", npz(arrays)))
    scaled = load_sae(put(tmp_path / "b/params.npz", npz(arrays | {"scaling_factor": factor})))
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.encode(x), scaled.encode(x))
    torch.testing.assert_close(scaled(x), plain.decode(plain.encode(x) * torch.from_numpy(factor)))


def test_a_cast_sae_keeps_its_thresholds(tmp_path):
    arrays = numbers()
    model = load_sae(put(tmp_path / "params.npz", npz(arrays)), dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        "W_enc": torch.bfloat16,
        "b_enc": torch.bfloat16,
        "W_dec": torch.bfloat16,
        "b_dec": torch.bfloat16,
        "threshold": torch.float32,
    }
    assert np.array_equal(model.threshold.detach(), arrays["threshold"])
    assert torch.equal(model.W_enc, torch.from_numpy(arrays["W_enc"]).bfloat16())


def test_an_sae_of_this_package_is_loaded_by_the_same_function(tmp_path):
    model = load_sae(put(tmp_path / "params.npz", npz(numbers())))
    folder = model.save(tmp_path / "ours")
    assert load_sae(folder).fingerprint == model.fingerprint
    assert load_sae(str(folder), dtype=torch.bfloat16).W_enc.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="holds one SAE, not a release"):
        load_sae(folder, layer=3)


def test_a_file_of_another_library_is_not_taken_for_gemma_scopes(tmp_path):
    """SAELens's and this package's own have the same arrays, and settings beside them that change
    what they mean."""
    for name in ("sae_weights.safetensors", "params.safetensors"):
        with pytest.raises(ValueError, match="is not a Gemma Scope SAE: .*found W_dec"):
            load_sae(put(tmp_path / name, safetensors.numpy.save(numbers())))


class Evil:
    def __reduce__(self):
        return os._exit, (3,)


def test_foreign_and_damaged_files_are_refused(tmp_path):
    D, F = 40, 200
    arrays = numbers(0, D, F)
    whole = npz(arrays)
    place = whole.index(arrays["W_dec"].tobytes()) + 7
    without = {k: v for k, v in arrays.items() if k != "threshold"}
    cases = {
        "cut off": (whole[: len(whole) // 2], "damaged or cut off"),
        "empty": (b"", "damaged or cut off"),
        "one byte changed": (
            changed(whole, place),
            "damaged or cut off .Bad CRC-32 for file 'W_dec.npy'",
        ),
        "one byte changed, compressed": (
            _spoilt(npz(arrays, compressed=True)),
            "damaged or cut off",
        ),
        "no threshold": (
            npz(without),
            "is not a Gemma Scope SAE.*found w_enc, b_enc, w_dec, b_dec$",
        ),
        "an array too many": (
            npz(arrays | {"k": np.float32(3)}),
            "is not a Gemma Scope SAE.*found.*k",
        ),
        "whole numbers": (
            npz(arrays | {"W_dec": np.ones((F, D), int)}),
            "expected floating point",
        ),
        "shapes": (
            npz(arrays | {"b_enc": np.ones(F + 1, np.float32)}),
            r"b_enc has shape \(201,\), expected \(200,\)",
        ),
        "a crosscoder": (
            npz(arrays | {"W_enc": np.ones((2, D, F), np.float32)}),
            r"not one SAE: W_enc has shape \(2, 40, 200\)",
        ),
        "factors": (
            npz(arrays | {"scaling_factor": np.ones(3, np.float32)}),
            r"scaling_factor has shape \(3,\)",
        ),
    }
    for name, (data, message) in cases.items():
        file = put(tmp_path / name / "params.npz", data)
        with pytest.raises(ValueError, match=message):
            load_sae(file)
            pytest.fail(f"{name} was loaded")
    objects = np.empty(F, object)
    objects[:] = Evil()
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        load_sae(put(tmp_path / "objects/params.npz", npz(arrays | {"b_enc": objects})))
    with pytest.raises(ValueError, match="is a pickle"):
        load_sae(put(tmp_path / "ae.pt", pickle.dumps(Evil())))
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        for name in gemma_scope.ARRAYS:
            archive.writestr(f"{name}.npy", b"no array")
    with pytest.raises(ValueError, match="W_enc is not an array"):
        load_sae(tmp_path)


def _spoilt(data: bytes) -> bytes:
    """A zip archive with a byte of its first member's content changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = archive.infolist()[0]
    place = info.header_offset + 30 + len(info.filename) + 20 + info.compress_size // 2
    return changed(data, place)


def changed(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_what_is_not_there_says_what_was_expected(tmp_path):
    for source in (tmp_path / "none", str(tmp_path / "none"), "none", Path("google/gemma")):
        with pytest.raises(FileNotFoundError, match="no SAE at .*google/gemma-scope-9b-pt-res"):
            load_sae(source)
    put(tmp_path / "full/notes.txt", b"")
    with pytest.raises(
        FileNotFoundError, match="no SAE in .*layer_20/width_16k/average_l0_68/params.npz"
    ):
        load_sae(tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="has no file layer_1/params.npz"):
        load_sae(tmp_path / "full", path="layer_1/params.npz")


# ---- writing


def test_written_and_read_again_every_bit_is_the_same(tmp_path):
    first = load_sae(put(tmp_path / "params.npz", npz(numbers())))
    tree = tmp_path / "gemma-scope-9b-pt-res"
    path = save_gemma_scope(first, tree / path_for(20, 16384, 68.2))
    assert path == tree / "layer_20/width_16k/average_l0_68/params.npz"
    with zipfile.ZipFile(path) as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    with np.load(path, allow_pickle=False) as found:
        assert set(found) == set(gemma_scope.ARRAYS)
        for name in gemma_scope.ARRAYS:
            assert found[name].dtype == np.float32 and found[name].flags.c_contiguous
    again = load_sae(tree, layer=20, width="16k", l0=68)
    assert same(again, {name: getattr(first, name).detach().numpy() for name in gemma_scope.ARRAYS})
    assert again.origin[:3] == ("google/gemma-2-9b", "resid_post", 20)
    assert again.origin.training == {
        "released_as": "gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_68/params.npz"
    }
    topk = SAE(*(getattr(first, name) for name in gemma_scope.ARRAYS), k=3)
    with pytest.raises(ValueError, match="has no k"):
        save_gemma_scope(topk, tmp_path / "topk")
    assert not (tmp_path / "topk").exists()


@pytest.mark.parametrize(
    "width, label",
    [
        (4096, "4k"),
        (16384, "16k"),
        (32768, "32k"),
        (65536, "65k"),
        (131072, "131k"),
        (262144, "262k"),
        (524288, "524k"),
        (1048576, "1m"),
        ("16K", "16k"),
    ],
)
def test_widths_are_named_as_in_the_releases(width, label):
    assert path_for(9, width, 100) == f"layer_9/width_{label}/average_l0_100"
    assert path_for(None, width, 100) == f"embedding/width_{label}/average_l0_100"


def test_an_odd_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match="width must be a number like 16384 or a label"):
        load_sae(tmp_path, width="wide")


# ---- releases


SECOND = "resid_post/layer_12_width_16k_l0_medium"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of both kinds of release."""
    root = tmp_path_factory.mktemp("downloads")
    first = ["gemma-scope-9b-pt-res/" + path_for(20, "16k", l0) for l0 in (11, 20, 36, 58, 68, 138)]
    first += [
        "gemma-scope-9b-pt-res/" + path_for(20, "131k", 114),
        "gemma-scope-9b-pt-res/" + path_for(21, "16k", 70),
        "gemma-scope-9b-pt-res/" + path_for(None, "4k", 6),
        "gemma-scope-9b-it-res/" + path_for(20, "16k", 91),
        "gemma-scope-2b-pt-att/" + path_for(27, "16k", 64),
        "gemma-scope-2b-pt-att/" + path_for(27, "16k", 136),
        "gemma-scope-27b-pt-mlp/" + path_for(10, "1m", 77),
        "gemma-scope-2b-pt-transcoders/" + path_for(3, "16k", 54),
        "mine/" + path_for(5, "16k", 30),
    ]
    for seed, path in enumerate(first):
        put(root / path / "params.npz", npz(numbers(seed)))
    second = [
        SECOND,
        "resid_post/layer_12_width_16k_l0_big",
        "resid_post/layer_12_width_262k_l0_medium_seed_1",
        "resid_post_all/layer_12_width_16k_l0_medium",
        "resid_post_all/layer_11_width_16k_l0_small",
        "resid_post_all/layer_11_width_16k_l0_big",
        "attn_out/layer_12_width_16k_l0_small",
        "mlp_out/layer_12_width_1m_l0_small",
        "transcoder/layer_12_width_16k_l0_small",
        "transcoder/layer_12_width_16k_l0_small_affine",
    ]
    for seed, path in enumerate(second):
        arrays = numbers(100 + seed, lower=True)
        if path.endswith("affine"):
            arrays["affine_skip_connection"] = np.arange(D * D, dtype=np.float32).reshape(D, D) / 10
        put(
            root / "gemma-scope-2-4b-it" / path / "params.safetensors",
            safetensors.numpy.save(arrays),
        )
    put(
        root
        / "gemma-scope-2-4b-it/crosscoder/layer_7_13_width_65k_l0_big/params_layer_0.safetensors",
        b"",
    )
    put(root / "gemma-scope-2-4b-it" / SECOND / "config.json", b"{}")
    put(
        root / "gemma-scope-2-270m-pt" / SECOND / "params.safetensors",
        safetensors.numpy.save(numbers(7, lower=True)),
    )
    return root


def test_what_there_is_is_listed(tree):
    frame = available(tree / "gemma-scope-9b-pt-res")
    assert list(frame.columns) == ["site", "layer", "width", "l0", "variant", "path"]
    assert frame.l0.tolist() == [6, 11, 20, 36, 58, 68, 138, 114, 70] and frame.width.tolist()[
        -3:
    ] == ["16k", "131k", "16k"]
    assert (
        frame.site.tolist() == ["embedding"] + ["resid_post"] * 8
        and frame.layer.isna().tolist() == [True] + [False] * 8
    )
    assert frame.path[5] == "layer_20/width_16k/average_l0_68/params.npz"
    second = available(str(tree / "gemma-scope-2-4b-it"))
    assert second[["site", "layer", "width", "l0", "variant"]].values.tolist() == [
        ["attn_out", 12, "16k", "small", ""],
        ["mlp_out", 12, "1m", "small", ""],
        ["resid_post", 11, "16k", "small", "all"],
        ["resid_post", 11, "16k", "big", "all"],
        ["resid_post", 12, "16k", "medium", ""],
        ["resid_post", 12, "16k", "big", ""],
        ["resid_post", 12, "16k", "medium", "all"],
        ["resid_post", 12, "262k", "medium", "seed_1"],
        ["transcoder", 12, "16k", "small", ""],
        ["transcoder", 12, "16k", "small", "affine"],
    ]
    for path in second.path:
        assert (tree / "gemma-scope-2-4b-it" / path).is_file()
    assert len(available(tree)) == 26


@pytest.mark.parametrize(
    "folder, path, origin",
    [
        ("gemma-scope-9b-pt-res", path_for(20, "16k", 68), ("google/gemma-2-9b", "resid_post", 20)),
        (
            "gemma-scope-9b-pt-res",
            path_for(None, "4k", 6),
            ("google/gemma-2-9b", "embedding", None),
        ),
        (
            "gemma-scope-9b-it-res",
            path_for(20, "16k", 91),
            ("google/gemma-2-9b-it", "resid_post", 20),
        ),
        ("gemma-scope-2b-pt-att", path_for(27, "16k", 64), ("google/gemma-2-2b", "attn_out", 27)),
        ("gemma-scope-27b-pt-mlp", path_for(10, "1m", 77), ("google/gemma-2-27b", "mlp_out", 10)),
        (
            "gemma-scope-2b-pt-transcoders",
            path_for(3, "16k", 54),
            ("google/gemma-2-2b", "mlp_in_before_gain", 3),
        ),
        ("gemma-scope-2-4b-it", SECOND, ("google/gemma-3-4b-it", "resid_post", 12)),
        (
            "gemma-scope-2-4b-it",
            "transcoder/layer_12_width_16k_l0_small",
            ("google/gemma-3-4b-it", "mlp_in", 12),
        ),
        ("gemma-scope-2-270m-pt", SECOND, ("google/gemma-3-270m", "resid_post", 12)),
        ("mine", path_for(5, "16k", 30), (None, None, 5)),
    ],
)
def test_the_path_tells_model_site_and_layer(tree, folder, path, origin):
    """Also from the path of the file, or of its folder, alone."""
    model = load_sae(tree / folder / path)
    assert model.origin[:3] == origin
    assert isinstance(model, Transcoder) == str(origin[1]).startswith("mlp_in")
    name = "params.npz" if (tree / folder / path / "params.npz").exists() else "params.safetensors"
    assert load_sae(tree / folder, path=f"{path}/{name}").fingerprint == model.fingerprint


@pytest.mark.parametrize(
    "folder, wanted, path",
    [
        (
            "gemma-scope-9b-pt-res",
            {"layer": 20, "width": "16k"},
            path_for(20, "16k", 68),
        ),  # canonical: nearest to 100
        ("gemma-scope-9b-pt-res", {"layer": 20, "width": 16384, "l0": 20}, path_for(20, "16k", 20)),
        ("gemma-scope-9b-pt-res", {"layer": 20, "width": 131072}, path_for(20, "131k", 114)),
        ("gemma-scope-9b-pt-res", {"layer": 21}, path_for(21, "16k", 70)),  # the only width
        ("gemma-scope-9b-pt-res", {"site": "embedding"}, path_for(None, "4k", 6)),
        (
            "gemma-scope-2b-pt-att",
            {"layer": 27, "site": "attn_out"},
            path_for(27, "16k", 136),
        ),  # |64 − 100| = |136 − 100|
        ("gemma-scope-2-4b-it", {"site": "resid_post", "layer": 12, "width": "16k"}, SECOND),
        (
            "gemma-scope-2-4b-it",
            {"site": "resid_post", "layer": 12, "width": "16k", "l0": "big"},
            SECOND.replace("medium", "big"),
        ),
        (
            "gemma-scope-2-4b-it",
            {"site": "resid_post", "layer": 12, "width": "262k"},
            SECOND.replace("16k", "262k") + "_seed_1",
        ),
        (
            "gemma-scope-2-4b-it",
            {"layer": 11, "l0": "small"},
            "resid_post_all/layer_11_width_16k_l0_small",
        ),
        (
            "gemma-scope-2-4b-it",
            {"site": "mlp_out"},
            "mlp_out/layer_12_width_1m_l0_small",
        ),  # the only one
        ("mine", {"layer": 5, "site": "resid_post"}, path_for(5, "16k", 30)),
    ],
)
def test_what_is_given_decides_which(tree, folder, wanted, path):
    found, exact = load_sae(tree / folder, **wanted), load_sae(tree / folder / path)
    assert all(
        torch.equal(p, q) for p, q in zip(found.parameters(), exact.parameters(), strict=True)
    )
    assert found.origin.site == (exact.origin.site or wanted["site"])


def test_another_l0_than_asked_for_is_said(tree):
    with pytest.warns(
        UserWarning,
        match="no SAE with L0 60 there: taking 58, the nearest of 11, 20, 36, 58, 68, 138",
    ) as caught:
        model = load_sae(tree / "gemma-scope-9b-pt-res", layer=20, width="16k", l0=60)
    assert caught[0].filename == __file__
    assert "average_l0_58" in model.origin.training["released_as"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sae(tree / "gemma-scope-9b-pt-res", layer=20, width="16k", l0=68)
        load_sae(tree / "gemma-scope-9b-pt-res", layer=20, width="16k")


@pytest.mark.parametrize(
    "folder, wanted, error, message",
    [
        (
            "gemma-scope-9b-pt-res",
            {},
            ValueError,
            "several SAEs: give site, one of embedding, resid_post",
        ),
        ("gemma-scope-9b-pt-res", {"site": "resid_post"}, ValueError, "give layer, one of 20, 21"),
        ("gemma-scope-9b-pt-res", {"layer": 20}, ValueError, "give width, one of 16k, 131k"),
        (
            "gemma-scope-9b-pt-res",
            {"layer": 20, "width": "16k", "l0": "big"},
            ValueError,
            "one of 11, 20, .*, not 'big'",
        ),
        (
            "gemma-scope-9b-pt-res",
            {"layer": 22, "width": "16k"},
            FileNotFoundError,
            "no SAE of layer 22, width 16k: for layer",
        ),
        (
            "gemma-scope-9b-pt-res",
            {"layer": 21, "width": "1m"},
            FileNotFoundError,
            "for width, there is 16k",
        ),
        (
            "gemma-scope-9b-pt-res",
            {"layer": 20, "site": "mlp_out"},
            FileNotFoundError,
            "for site, there is embedding, resid_post",
        ),
        (
            "gemma-scope-2-4b-it",
            {"layer": 11},
            ValueError,
            "give l0, one of small, big, not 'medium'",
        ),
        (
            "gemma-scope-2-4b-it",
            {"site": "attn_out", "l0": 20},
            ValueError,
            "L0 has names in .*: give l0, one of small, not 20",
        ),
        (
            "gemma-scope-9b-pt-res/" + path_for(20, "16k", 68),
            {"layer": 3},
            FileNotFoundError,
            "for layer, there is 20",
        ),
        (
            "gemma-scope-9b-pt-res/" + path_for(20, "16k", 68),
            {"l0": "big"},
            ValueError,
            "give l0, one of 68, not 'big'",
        ),
        (
            "gemma-scope-2-4b-it",
            {"path": SECOND + "/params.safetensors", "layer": 3},
            ValueError,
            "is of layer 12, not 3",
        ),
        (
            "gemma-scope-2-4b-it/" + SECOND,
            {"site": "mlp_out"},
            FileNotFoundError,
            "for site, there is resid_post",
        ),
    ],
)
def test_a_choice_that_leaves_none_or_several_says_what_there_is(
    tree, folder, wanted, error, message
):
    with pytest.raises(error, match=message):
        load_sae(tree / folder, **wanted)


def test_config_json_tells_what_the_path_does_not(tmp_path):
    config = {
        "hf_hook_point_in": "model.layers.17.self_attn.o_proj.input",
        "model_name": "google/gemma-3-1b-pt",
        "l0": 60,
    }
    put(tmp_path / "params.safetensors", safetensors.numpy.save(numbers(lower=True)))
    assert load_sae(tmp_path).origin[:3] == (None, None, None)
    put(tmp_path / "config.json", json.dumps(config).encode())
    model = load_sae(tmp_path)
    assert model.origin[:3] == ("google/gemma-3-1b-pt", "attn_out", 17) and same(model, numbers())
    put(tmp_path / "config.json", b"{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_sae(tmp_path)
    put(tmp_path / "params.safetensors", safetensors.numpy.save(numbers(lower=True))[:-9])
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_sae(tmp_path)


# ---- transcoders


def test_a_transcoder_adds_its_skip_connection(tree, tmp_path):
    path = "transcoder/layer_12_width_16k_l0_small_affine"
    model = load_sae(tree / "gemma-scope-2-4b-it", path=f"{path}/params.safetensors")
    arrays = numbers(109)
    skip = np.arange(D * D, dtype=np.float32).reshape(D, D) / 10
    assert isinstance(model, Transcoder) and same(model, arrays) and model.origin.site == "mlp_in"
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(0))
    pre = x.numpy() @ arrays["W_enc"] + arrays["b_enc"]
    expected = (
        (pre * (pre > arrays["threshold"])) @ arrays["W_dec"] + arrays["b_dec"] + x.numpy() @ skip
    )
    torch.testing.assert_close(model(x).detach(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x), model.decode(model.encode(x)))
    again = load_sae(save_gemma_scope(model, tmp_path), site="mlp_in", layer=12)
    assert (
        isinstance(again, Transcoder)
        and torch.equal(again(x), model(x))
        and again.origin.site == "mlp_in"
    )
    ours = load_sae(model.save(tmp_path / "ours"))
    assert (
        isinstance(ours, Transcoder)
        and torch.equal(ours(x), model(x))
        and ours.origin == model.origin
    )
    assert (
        ours.fingerprint
        != SAE(
            *(getattr(model, name) for name in gemma_scope.ARRAYS), origin=model.origin
        ).fingerprint
    )
    with pytest.raises(ValueError, match=r"W_skip has shape \(2, 6\), expected \(6, 6\)"):
        Transcoder(*(getattr(model, name) for name in gemma_scope.ARRAYS), W_skip=torch.zeros(2, D))


def test_a_transcoder_without_a_skip_connection_is_the_sae_of_its_arrays(tree):
    model = load_sae(tree / "gemma-scope-2b-pt-transcoders", layer=3)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    assert isinstance(model, Transcoder) and model.W_skip is None
    assert torch.equal(model(x), SAE(*(getattr(model, name) for name in gemma_scope.ARRAYS))(x))


# ---- memory

PEAK = """
import json, sys
import numpy as np, torch
from jumprelu.exchange.gemma_scope import ARRAYS
from jumprelu.exchange.loading import load_sae
from jumprelu.sae import SAE

def memory(name):
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(name))

def plainly(path):
    with np.load(path) as found:
        return SAE(**{name: torch.from_numpy(found[name]) for name in ARRAYS})

small, *large = sys.argv[1:]
load_sae(small)  # what is imported late and allocated once
before, peaks = memory("VmRSS"), []
for load, path in [(load_sae, large[0]), (load_sae, large[1]), (plainly, large[0])]:
    sae = load(path)
    assert float(sae.W_enc[-1, -1].detach()) == 2
    del sae
    peaks.append(memory("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory"
)
def test_no_more_than_one_array_is_in_memory_twice(tmp_path, root):
    d, f = 400, 65536
    arrays = {
        "W_enc": np.full((d, f), 2, np.float32),
        "W_dec": np.ones((f, d), np.float32),
        "b_enc": np.ones(f, np.float32),
        "b_dec": np.ones(d, np.float32),
        "threshold": np.ones(f, np.float32),
    }
    size = sum(array.nbytes for array in arrays.values())
    np.savez(tmp_path / "params.npz", **arrays)
    safetensors.numpy.save_file(
        {k.lower(): v for k, v in arrays.items()}, tmp_path / "params.safetensors"
    )
    paths = [
        put(tmp_path / "small/params.npz", npz(numbers())),
        tmp_path / "params.npz",
        tmp_path / "params.safetensors",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, paths)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    from_npz, from_safetensors, plainly = (peak / size for peak in json.loads(done.stdout))
    assert size > 2 * 10**8
    # of a safetensors file, what was read stays mapped, which the system may drop at any time
    assert from_npz < 1.6 and from_safetensors < 2.1
    assert plainly > 1.75  # what it would be without care


# ---- the hub

L0S = (11, 20, 36, 58, 68, 138)


def released() -> dict[str, bytes]:
    files = {f"{path_for(20, '16k', l0)}/params.npz": npz(numbers(l0)) for l0 in L0S}
    return files | {"README.md": b"#", f"{path_for(21, '16k', 70)}/params.npz": npz(numbers(70))}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, and huggingface_hub pointed to it, which reads these constants from the
    environment at its import."""
    server = fake.Hub({RES: released()})
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.waits = []
    monkeypatch.setattr("time.sleep", server.waits.append)
    yield server
    server.close()


def get(l0: int | None = 68, **more) -> SAE:
    return load_sae(RES, **({"layer": 20, "width": "16k", "l0": l0} | more))


def in_cache(tmp_path: Path) -> list[str]:
    """Files of snapshots, which are whole, and whatever else is a file in the folder of blobs."""
    cache = tmp_path / "cache"
    return sorted(p.name for p in cache.rglob("snapshots/*/**/*.npz")) + sorted(
        p.name for p in cache.rglob("blobs/*incomplete*")
    )


def test_a_release_on_the_hub_is_loaded_by_name(hub, tmp_path):
    model = get()
    assert same(model, numbers(68))
    assert model.origin[:3] == ("google/gemma-2-9b", "resid_post", 20)
    assert model.origin.training == {
        "released_as": "gemma-scope-9b-pt-res/layer_20/width_16k/average_l0_68/params.npz"
    }
    assert not hub.asked("/tree/") and len(hub.asked("/bytes/", "GET")) == 1
    assert same(get(), numbers(68)) and len(hub.asked("/bytes/", "GET")) == 1  # from the cache
    assert in_cache(tmp_path) == ["params.npz"]


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub):
    get()
    assert all(
        request.headers["authorization"] == f"Bearer {TOKEN}" for request in hub.asked("/resolve/")
    )
    assert hub.asked("/bytes/") and not any(
        "authorization" in request.headers for request in hub.asked("/bytes/")
    )


def test_the_list_decides_what_is_left_open(hub):
    assert same(get(l0=None), numbers(68))
    assert len(hub.asked("/tree/")) > 1  # page after page
    with pytest.warns(UserWarning, match="no SAE with L0 60 there: taking 58"):
        assert same(get(l0=60), numbers(58))
    assert same(load_sae(RES, layer=21), numbers(70))
    assert same(load_sae(RES, path=f"{path_for(20, '16k', 11)}/params.npz"), numbers(11))
    assert available(RES).l0.tolist() == [*L0S, 70]


def test_gemma_scope_2_from_the_hub(hub):
    repo = "google/gemma-scope-2-4b-it"
    hub.repos[repo] = {
        f"{SECOND}/params.safetensors": safetensors.numpy.save(numbers(5, lower=True)),
        f"{SECOND}/config.json": b"{}",
        f"{SECOND.replace('16k', '65k')}/params.safetensors": b"",
    }
    model = load_sae(repo, site="resid_post", layer=12, width="16k", l0="medium")
    assert same(model, numbers(5)) and model.origin[:3] == (
        "google/gemma-3-4b-it",
        "resid_post",
        12,
    )


@pytest.mark.parametrize("part", ["/resolve/", "/tree/"])
@pytest.mark.parametrize(
    "answer, error, advice",
    [
        (
            fake.GATED,
            PermissionError,
            ["is gated", "Accept the licence at", RES, "`hf auth login`"],
        ),
        (fake.GATED_LOGGED_OUT, PermissionError, ["is gated", "`hf auth login`"]),
        (fake.BAD_TOKEN, PermissionError, ["refused the login", "HTTP 401"]),
        ((403, {}), PermissionError, ["HTTP 403"]),
        (
            fake.NO_SUCH_REPO,
            FileNotFoundError,
            [f"no model {RES} on the hub", "check the spelling"],
        ),
        ((404, {"X-Error-Code": "RepoNotFound"}), FileNotFoundError, ["check the spelling"]),
        (fake.NO_SUCH_REVISION, FileNotFoundError, ["no such revision"]),
        ((429, {"Retry-After": "7"}), ConnectionError, ["HTTP 429", "wait a little and run again"]),
        ((503, {}), ConnectionError, ["HTTP 503", "wait a little and run again"]),
    ],
)
def test_the_hubs_refusals_say_what_to_do(hub, tmp_path, caplog, part, answer, error, advice):
    hub.answer("/" if error is FileNotFoundError else part, *answer)
    with pytest.raises(error) as caught:
        get(l0=68 if part == "/resolve/" else None)
    for words in advice:
        assert words in str(caught.value)
    assert TOKEN not in str(caught.value) + caplog.text
    assert in_cache(tmp_path) == []
    waits = {429: [8.0] * 5, 503: [1, 2, 4, 8, 8]}.get(answer[0], [])
    assert hub.waits == waits


def test_an_l0_or_a_layer_that_is_not_there_lists_what_is(hub):
    with pytest.raises(
        FileNotFoundError, match="no SAE of layer 33, width 16k: for layer, there is 20, 21"
    ):
        get(layer=33)
    with pytest.raises(FileNotFoundError, match="lacks a file that is needed"):
        load_sae(RES, path="layer_1/params.npz")
    hub.repos["google/other"] = {"README.md": b"", "model.safetensors": b""}
    with pytest.raises(
        FileNotFoundError,
        match=r"no SAE in google/other.*found \['README.md', 'model.safetensors'\]",
    ):
        load_sae("google/other", layer=3)
    hub.repos["google/none"] = {}
    with pytest.raises(FileNotFoundError, match="found none"):
        available("google/none")


@pytest.mark.parametrize(
    "part, status, waits",
    [
        ("/resolve/", 503, [1, 2]),
        ("/bytes/", 429, [1, 2]),
        ("/resolve/", 429, [1, 2]),
    ],
)
def test_a_hub_that_is_busy_for_a_while_is_asked_again(hub, part, status, waits):
    hub.answer(
        part, status, times=2 if part == "/bytes/" else 3
    )  # the first look at a file's headers is repeated at once
    assert same(get(), numbers(68))
    assert hub.waits == waits


def test_a_hub_says_how_long_to_wait(hub):
    hub.answer("/tree/", 429, {"Retry-After": "7"}, times=1)
    assert same(get(l0=None), numbers(68)) and hub.waits == [8.0]


def test_a_busy_host_of_files_is_an_error(hub, tmp_path, caplog):
    hub.answer("/bytes/", 503)
    with pytest.raises(ConnectionError, match="HTTP 503"):
        get()
    assert in_cache(tmp_path) == [] and TOKEN not in caplog.text


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_broken_download_goes_on_where_it_stopped(hub, tmp_path, monkeypatch, ignores_ranges):
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 100
    )  # what is written at once, else 10 MiB
    hub.cuts, hub.ignores_ranges = [1000, 300], ignores_ranges
    assert same(get(), numbers(68))
    ranges = [request.headers.get("range") for request in hub.asked("/bytes/", "GET")]
    assert ranges == [None, "bytes=1000-", "bytes=300-" if ignores_ranges else "bytes=1300-"]
    assert in_cache(tmp_path) == ["params.npz"]


def test_a_download_that_breaks_off_every_time_leaves_nothing_behind(hub, tmp_path):
    hub.cuts, hub.ignores_ranges = [0] * 1000, True
    with pytest.raises(ConnectionError, match="interrupted: run again"):
        get()
    assert in_cache(tmp_path) == []
    hub.cuts = []
    assert same(get(), numbers(68)) and in_cache(tmp_path) == ["params.npz"]


def test_a_file_that_comes_too_short_is_not_taken_for_a_whole_one(hub, tmp_path):
    hub.short_files = True
    with pytest.raises(ConnectionError, match="interrupted: run again"):
        get()
    assert in_cache(tmp_path) == []
    hub.short_files = False
    assert same(get(), numbers(68))


@pytest.mark.parametrize("how", ["offline mode", "no network"])
def test_what_is_in_the_cache_needs_no_network(hub, monkeypatch, how):
    get(l0=58)
    if how == "offline mode":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.close()
        monkeypatch.setattr(hub, "close", lambda: None)
    assert same(get(l0=58), numbers(58))
    with pytest.warns(
        UserWarning,
        match="only what is in the cache of google/gemma-scope-9b-pt-res can be chosen from",
    ):
        assert same(get(l0=None), numbers(58))
    with pytest.raises(
        ConnectionError,
        match="HF_HUB_OFFLINE=1 is set" if how == "offline mode" else "could not be reached",
    ):
        get(l0=68)
    with pytest.raises(ConnectionError):
        load_sae("google/gemma-scope-2b-pt-res", layer=3)


CHILD = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from jumprelu import load_sae
sae = load_sae("google/gemma-scope-9b-pt-res", layer=20, width="16k", l0=68)
print(sae.fingerprint)
"""


@pytest.mark.slow
def test_as_a_user_would_with_the_environment_alone(hub, tmp_path, root):
    """A process of its own, with HF_ENDPOINT and HF_TOKEN set and every log shown."""
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    env |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == get().fingerprint
    assert "DEBUG" in done.stderr and TOKEN not in done.stderr


# ---- SAELens


def test_sae_lens_reads_the_same_from_what_is_written(tmp_path, monkeypatch):
    loaders = pytest.importorskip(
        "sae_lens.loading.pretrained_sae_loaders", reason="SAELens is not installed"
    )
    model = load_sae(put(tmp_path / "params.npz", npz(numbers())))
    path = save_gemma_scope(model, tmp_path / path_for(20, "16k", 68))
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(path))
    config, state, _ = loaders.gemma_2_sae_huggingface_loader(RES, path_for(20, "16k", 68))
    assert all(torch.equal(state[name], getattr(model, name)) for name in gemma_scope.ARRAYS)
    assert config["hook_name"] == "blocks.20.hook_resid_post"


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
def test_folders_of_other_libraries_are_read(tmp_path, format):
    atoms = torch.nn.functional.normalize(
        torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    original = jr.SAE(atoms.T, torch.zeros(7), atoms, torch.zeros(5), torch.full((7,), 0.3))
    formats.write(original, tmp_path / format, format)
    found = jr.load_sae(tmp_path / format)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found(x), original(x), atol=1e-6) and torch.equal(
        found.threshold, original.threshold
    )
    assert jr.load_sae(tmp_path / format, dtype=torch.bfloat16).W_dec.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="holds one SAE, not a release"):
        jr.load_sae(tmp_path / format, layer=3)
