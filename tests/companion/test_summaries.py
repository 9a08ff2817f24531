"""Means over latents and differences between SAEs."""

import numpy as np
import pandas as pd
import pytest
from companion.reading.summaries import difference, summary


def frame(sae, values, band, weight=1.0):
    return pd.DataFrame({"sae": sae, "correlation": values, "band": band, "weight": weight})


def test_the_mean_counts_latents_by_weight_and_its_interval_is_that_of_a_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, 400)
    table = frame(
        "a", [*values, 0.0, 6.0, np.nan], [*[0] * 400, 1, 1, 1], [*[1.0] * 400, 10.0, 30.0, 5.0]
    )
    plain = summary(table[table.band == 0], ["correlation"]).iloc[0]
    assert plain["mean"] == pytest.approx(values.mean()) and plain.latents == 400
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(
        [plain.high - plain["mean"], plain["mean"] - plain.low], half, rtol=0.15
    )
    both = summary(table, ["correlation"]).iloc[0]
    assert both["mean"] == pytest.approx((values.sum() + 30 * 6) / 440) and both.latents == 402
    empty = summary(frame("a", [np.nan], 0), ["correlation"]).iloc[0]
    assert np.isnan(empty["mean"]) and empty.latents == 0
    by_band = summary(table, ["correlation"], by=["sae", "band"])
    assert by_band.band.tolist() == [0, 1] and list(by_band) == [
        "sae",
        "band",
        "score",
        "mean",
        "low",
        "high",
        "latents",
    ]


def test_saes_are_compared_at_equal_frequency():
    rng = np.random.default_rng(1)
    level = {0: 0.8, 1: 0.2}
    bands = {"often": [0] * 20 + [1] * 180, "rarely": [0] * 180 + [1] * 20}
    table = pd.concat(
        [
            frame(name, [level[b] + rng.normal() * 0.05 for b in band], band)
            for name, band in bands.items()
        ]
    )
    means = table.groupby("sae").correlation.mean()
    assert means.rarely - means.often > 0.4  # as they come
    found = difference(table, "rarely", "often")
    assert found.low < 0 < found.high and abs(found.mean) < 0.03
    better = table.assign(correlation=table.correlation + 0.1 * (table.sae == "often"))
    assert difference(better, "often", "rarely").low > 0.05
    with pytest.raises(ValueError, match="common band"):
        difference(pd.concat([frame("a", [1.0], 0), frame("b", [1.0], 1)]), "a", "b")
