"""The blind study, without a browser: agreement by hand and as published, draws, the key, and what
files are refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from latents import hostile_contexts, hostile_lm, random_sae
from models import D_MODEL, random_ids, save_tiny

from jumprelu.__main__ import main
from jumprelu.latents import rating, verdicts
from jumprelu.latents.rating import Item, draw, make, write_study
from jumprelu.latents.verdicts import (
    RATINGS,
    guard,
    krippendorff_alpha,
    read_key,
    read_ratings,
    score,
)

NONE = float("nan")


def table(text: str) -> np.ndarray:
    """Raters below each other, a rating a character, a dot for none."""
    return np.array([[NONE if c == "." else ord(c) - 48 for c in line] for line in text.split()])


# ---- agreement


def test_alpha_is_that_of_krippendorffs_examples():
    # "Computing Krippendorff's Alpha-Reliability" (2011): section A, binary; C, with missing data
    assert krippendorff_alpha(table("0100000010 1110010000")) == pytest.approx(0.095, abs=5e-4)
    four = table("123321412... 1233224125.3 .3332342251. 12332441251.")
    assert krippendorff_alpha(four) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand():
    # of two values, ranks and names are the same:
    # pairs (1,1) (1,2): coincidences 2, 1, 1, 0; n = 3, 1; D_o = 2, D_e = (3·1 + 1·3)/3 = 2
    assert krippendorff_alpha(table("11 12")) == pytest.approx(0.0)
    # (0,0) (0,1) (2,2): n = 3, 1, 2. δ²(0,1) = (3+1−2)² = 4, δ²(1,2) = (1+2−1.5)² = 2.25,
    # δ²(0,2) = (6−2.5)² = 12.25 D_o = 2·4, D_e = 2·(3·1·4 + 1·2·2.25 + 3·2·12.25)/5
    by_hand = 1 - 8 / (2 * (12 + 4.5 + 73.5) / 5)
    assert krippendorff_alpha(table("002 012")) == pytest.approx(by_hand)
    assert krippendorff_alpha(table("0121 0121")) == 1
    single = table("00.. 1122")  # single ratings say nothing
    assert krippendorff_alpha(single) == krippendorff_alpha(table("00 11"))
    assert krippendorff_alpha(table("01 10")) < 0


@pytest.mark.parametrize("ratings", ["11 11", "012", "0. .1", "..."])
def test_alpha_is_unknown_where_nothing_can_differ(ratings):
    assert np.isnan(krippendorff_alpha(table(ratings)))


# ---- drawing


def frequency(l0: float, alive: int, dead: int = 3) -> torch.Tensor:
    return torch.cat(
        [
            torch.full((alive,), l0 / alive, dtype=torch.float64),
            torch.zeros(dead, dtype=torch.float64),
        ]
    )


def test_a_draw_is_even_over_strata_and_takes_only_latents_that_fire():
    saes = [
        random_sae(4, 33, architecture=a, site=s)
        for a, s in [
            ("gated", "resid_post"),
            ("gated", "resid_post"),
            ("gated", "resid_post"),
            ("topk", "mlp_out"),
        ]
    ]
    frequencies = [frequency(l0, 30) for l0 in (21, 19, 140, 60)]
    items = draw(saes, frequencies, 5, seed=3)
    strata = pd.DataFrame(items).groupby(["architecture", "site", "layer", "target"]).size()
    here = "gated", "resid_post", 1
    assert strata.to_dict() == {(*here, 20): 5, (*here, 150): 5, ("topk", "mlp_out", 1, 75): 5}
    assert {item.sae for item in items if item.target == 20} == {0, 1}  # they take turns
    assert all(item.latent < 30 for item in items) and len({(i.sae, i.latent) for i in items}) == 15
    assert items == draw(saes, frequencies, 5, seed=3) != draw(saes, frequencies, 5, seed=4)
    assert [item.sae for item in items] != sorted(item.sae for item in items)
    with pytest.raises(
        ValueError,
        match=r"stratum \('topk', 'mlp_out', 1, 75.0\) has 2 latents that fire, 5 were asked for",
    ):
        draw(saes[3:], [frequency(60, 2)], 5, seed=0)
    with pytest.raises(ValueError, match="does not remember where"):
        draw([random_sae(4, 33, site=None)], frequencies[:1], 1, seed=0)
    with pytest.raises(ValueError, match="at least one SAE"):
        draw([], [], 1, seed=0)


def test_two_saes_of_a_stratum_fill_in_for_each_other():
    saes = [random_sae(4, 33, seed=i) for i in range(2)]
    items = draw(saes, [frequency(20, 1), frequency(20, 30)], 6, seed=0)
    assert sorted(item.sae for item in items) == [0, 1, 1, 1, 1, 1]


# ---- the files


@pytest.fixture
def study(tmp_path) -> rating.Study:
    """Four items of two SAEs with secret names, from contexts full of hostile tokens."""
    saes = {
        f"secret-{a}": random_sae(D_MODEL, 40, seed=i, architecture=a)
        for i, a in enumerate(["jumprelu", "gated"])
    }
    chosen = [(0, 2), (1, 5), (0, 1), (1, 2)]
    items = [
        Item(s, n, f"secret-{['jumprelu', 'gated'][s]}", "resid_post", 1, 20.0, 17.25)
        for s, n in chosen
    ]
    contexts = {0: hostile_contexts(), 1: hostile_contexts(seed=1)}
    return write_study(
        tmp_path, hostile_lm(), saes, items, contexts, seed=424242, salt="salt-of-the-test"
    )


def data(page: Path, id: str):
    return json.loads(
        re.search(
            rf'<script type="application/json" id="{id}">(.*?)</script', page.read_text(), re.S
        )[1]
    )


def test_the_page_holds_no_source(study):
    html, key = study.page.read_text(), read_key(study.key)
    for hidden in (
        "secret",
        "gated",
        "17.25",
        "salt-of",
        "424242",
        *[item["fingerprint"] for item in key["items"]],
    ):
        assert hidden not in html
        assert hidden in study.key.read_text()
    about = data(study.page, "about")
    assert (
        about["items"] == [item["item"] for item in key["items"]]
        and about["study"] == key["study"] in study.page.name
    )
    assert [item["latent"] for item in key["items"]] == [2, 5, 1, 2] and len(
        set(about["items"])
    ) == 4
    assert set(about) == {"title", "study", "digest", "items", "layout", "window", "slots"}
    assert [name for name, *_ in about["layout"]] == ["tokens", "acts", "quantile"]


def test_activations_lose_their_scale_and_bins_their_number(study):
    about = data(study.page, "about")
    text = re.search(r'id="items">(.*?)<', study.page.read_text())[1]
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    cells = 4 * about["slots"] * about["window"]
    acts, quantile = raw[2 * cells : 3 * cells].reshape(4, -1), raw[3 * cells :].view(np.int8)
    assert acts.max(1).tolist() == [255] * 4 and set(quantile.tolist()) == {-1, 0, 1}


def test_ids_need_the_salt(study, tmp_path):
    saes = {"a": random_sae(D_MODEL, 40)}
    items = [Item(0, 2, "jumprelu", "resid_post", 1, 20.0, 17.25)]
    two = [
        write_study(tmp_path / str(i), hostile_lm(), saes, items, {0: hostile_contexts()})
        for i in range(2)
    ]
    first, second = (read_key(each.key) for each in two)
    assert (
        first["items"][0]["item"] != second["items"][0]["item"]
        and first["study"] != second["study"]
    )


def test_a_key_that_was_changed_is_refused(study, tmp_path):
    key = json.loads(study.key.read_text())
    key["items"][0]["architecture"] = "topk"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(key))
    with pytest.raises(ValueError, match="was changed after the study was made"):
        read_key(changed)
    for text, message in [
        ("{}", "is not the key"),
        ("[]", "is not the key"),
        ('{"study', "not valid JSON"),
        (json.dumps(key | {"format": 9}), "is not the key .* format 1"),
    ]:
        changed.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_key(changed)


# ---- raters' files


def exported(
    key: dict, ratings: str, rater: str = "Ada", explanations: dict[int, str] | None = None
) -> list[list[str]]:
    """What the page exports, as rows without the guard: a letter of YMN an item, a dot for none."""
    crc, rows = zlib.crc32((key["study"] + key["digest"]).encode()), []
    for i, (item, letter) in enumerate(zip(key["items"], ratings, strict=True)):
        if letter != ".":
            word = {r[0]: r for r in RATINGS}[letter]
            row = [
                key["study"],
                item["item"],
                word,
                (explanations or {}).get(i, ""),
                rater,
                "2026-01-31T12:00:00.000Z",
            ]
            crc = verdicts.checksum(crc, row)
            rows.append([*row, f"{crc:08x}"])
    return [list(verdicts.COLUMNS), *rows]


def write(path: Path, rows: list[list[str]], guarded: bool = True) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(
        [guard(cell) if guarded else cell for cell in row] for row in rows
    )
    path.write_bytes(("\ufeff" + text.getvalue()).encode())
    return path


def test_a_file_is_read_with_its_formulas_harmless(study, tmp_path):
    key = read_key(study.key)
    odd = {0: "=HYPERLINK(1)", 1: '\'quoted, "twice"', 2: "-1", 3: "＝full width"}
    path = write(tmp_path / "a.csv", exported(key, "YMNY", explanations=odd))
    found = read_ratings(path, key)
    assert found.rater == "Ada" and list(found.ratings.values()) == ["YES", "MAYBE", "NO", "YES"]
    assert list(found.explanations.values()) == list(odd.values())
    score(key, [path]).write(tmp_path / "out.csv")
    cells = [
        cell for row in csv.reader((tmp_path / "out.csv").read_text().splitlines()) for cell in row
    ]
    assert "'=HYPERLINK(1)" in cells and not any(
        cell.startswith(("=", "+", "-", "@")) for cell in cells
    )


def changed(rows: list[list[str]], line: int, column: str, value: str) -> list[list[str]]:
    rows = [list(row) for row in rows]
    rows[line - 1][verdicts.COLUMNS.index(column)] = value
    return rows


def test_a_file_that_does_not_fit_is_refused_with_its_line(study, tmp_path):
    key = read_key(study.key)
    good, other = exported(key, "YMNY"), exported(key, "YMNY", rater="Bob")
    cases = [
        (changed(good, 3, "rating", "YES"), 3, "changed"),
        (changed(good, 2, "item", "0" * 12), 2, "changed"),
        (changed(good, 5, "study", "0" * 16), 5, "it is of study '0000000000000000'"),
        (changed(good, 5, "checksum", "00000000"), 5, "changed"),
        (changed(good, 2, "explanation", "added later"), 2, "was changed, moved, left out"),
        (changed(good, 2, "time", "31.1."), 2, "changed"),
        ([*good[:3], other[3]], 4, "changed"),
        ([good[0], good[2], good[1], *good[3:]], 2, "moved"),
        ([good[0], *good[2:]], 2, "left out"),
        ([*good, good[4]], 6, "added"),
        ([row[:-1] for row in good], 1, "expected study, item, rating"),
        ([*good[:2], good[2][:-1]], 3, "6 cells, expected 7"),
        ([], 1, "the columns are"),
    ]
    for rows, line, message in cases:
        path = write(tmp_path / "bad.csv", rows)
        with pytest.raises(ValueError, match=message) as error:
            read_ratings(path, key)
        assert f"bad.csv, line {line}: " in str(error.value)


def test_a_file_that_is_no_csv_is_refused(study, tmp_path):
    key, path = read_key(study.key), tmp_path / "bad.csv"
    quoted = exported(key, "YMNY", explanations={1: "'a"})
    with pytest.raises(ValueError, match="line 3: this row or one above was changed"):
        read_ratings(write(path, quoted, guarded=False), key)  # a spreadsheet took the guard
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="line 1: .*utf-8"):
        read_ratings(path, key)
    path.write_text(",".join(verdicts.COLUMNS) + '\n"open')
    with pytest.raises(ValueError, match="line 2: unexpected end of data"):
        read_ratings(path, key)
    path.write_text(",".join(verdicts.COLUMNS) + "\n")
    with pytest.raises(ValueError, match="holds no rating"):
        read_ratings(path, key)
    with pytest.raises(FileNotFoundError):
        read_ratings(tmp_path / "none.csv", key)


def test_scores_are_counts_of_median_ratings_with_exact_intervals(study, tmp_path):
    key = read_key(study.key)
    raters = {"Ada": "YYNM", "Bob": "YMNY", "Cy": "MYNY"}
    paths = [
        write(tmp_path / f"{name}.csv", exported(key, ratings, name))
        for name, ratings in raters.items()
    ]
    found = score(key, paths)
    assert found.items.verdict.tolist() == ["YES", "YES", "NO", "YES"] and found.raters == (
        "Ada",
        "Bob",
        "Cy",
    )
    shares = found.shares.set_index(["architecture", "rating"])
    assert shares.loc[("secret-jumprelu", "YES"), ["count", "n", "share"]].tolist() == [1, 2, 0.5]
    assert shares.loc[("secret-gated", "YES"), ["count", "n", "share", "high"]].tolist() == [
        2,
        2,
        1,
        1,
    ]
    assert shares.loc[("secret-gated", "YES"), "low"] == pytest.approx(0.025**0.5)
    ranks = table("2201 2102 1202")
    assert found.alpha == krippendorff_alpha(ranks)
    assert score(key, paths[:2]).items.verdict.tolist() == [
        "YES",
        "MAYBE",
        "NO",
        "MAYBE",
    ]  # the lower of two
    assert len(score(key, paths, by=["site", "target"]).shares) == 3
    assert "alpha: 0." in found.report()
    assert "not defined" in score(key, paths[:1]).report()


def test_ratings_that_lack_or_come_twice(study, tmp_path):
    key = read_key(study.key)
    whole, part = (write(tmp_path / f"{r}.csv", exported(key, r, r)) for r in ("YYNM", "Y..N"))
    with pytest.raises(ValueError, match="has 2 of 4 items"):
        score(key, [whole, part])
    found = score(key, [part], partial=True)
    assert (
        found.items.verdict.tolist() == ["YES", "", "", "NO"] and found.shares["count"].sum() == 2
    )
    with pytest.raises(ValueError, match="one file a rater"):
        score(key, [whole, whole])
    with pytest.raises(ValueError, match="no ratings given"):
        score(key, [])


# ---- command line


def test_a_study_from_the_command_line(tmp_path, capsys):
    lm = save_tiny("llama", tmp_path / "lm", tokenizer=True)
    folders = [
        random_sae(D_MODEL, 24, seed=i, architecture=a).save(tmp_path / a)
        for i, a in enumerate(["gated", "topk"])
    ]
    texts = [json.dumps({"text": f"def f_{i}(x):\n    return x[{i}]\n" * 3}) for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(texts))
    options = [
        "--model",
        str(lm),
        "--corpus",
        str(tmp_path / "t.jsonl"),
        "--split",
        "train",
        "--rows",
        "30",
        "--context-size",
        "24",
    ]
    arguments = ["rate", "make", str(tmp_path / "out"), *map(str, folders), *options]
    assert main([*arguments, "--per-stratum", "3", "--targets", "5"]) == 0
    key_path = next((tmp_path / "out").glob("key-*.json"))
    key = read_key(key_path)
    assert sorted(item["architecture"] for item in key["items"]) == ["gated"] * 3 + ["topk"] * 3
    assert str(key_path) in capsys.readouterr().out
    ratings = write(tmp_path / "a.csv", exported(key, "YYNMYY"))
    assert (
        main(["rate", "score", str(key_path), str(ratings), "--out", str(tmp_path / "items.csv")])
        == 0
    )
    assert (
        "6 items, 1 raters" in capsys.readouterr().out
        and len(pd.read_csv(tmp_path / "items.csv")) == 6
    )
    for wrong, message in [
        (["rate", "make", str(tmp_path / "o"), str(tmp_path / "none"), *options], "no SAE at"),
        (["rate", "make", str(tmp_path / "o"), *map(str, folders * 2), *options], "given twice"),
        ([*arguments, "--per-stratum", "99"], "were asked for"),
        ([*arguments, "--model", str(save_tiny("llama", tmp_path / "mute"))], "has no tokenizer"),
        (["rate", "score", str(key_path), str(key_path)], "line 1"),
    ]:
        assert main(wrong) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_seed_gives_the_same_draw(tmp_path):
    saes = {"a": random_sae(D_MODEL, 24)}
    keys = [
        read_key(make(tmp_path, hostile_lm(), saes, random_ids(20, 16), 4, [5], seed=7).key)
        for _ in range(2)
    ]
    assert [i["latent"] for i in keys[0]["items"]] == [i["latent"] for i in keys[1]["items"]]
    assert not {i["item"] for i in keys[0]["items"]} & {i["item"] for i in keys[1]["items"]}
