"""The figures: pure functions from the plotted DataFrame to a Figure.

Notable here:
- a figure saved as `NN_name` is drawn by `plots.name(data)`, and a test draws it again from `figures/NN_name.csv`;
  so a function takes everything it shows from `data`, and nothing from anywhere else.
- one file a notebook, named nNN after it: a file named like a figure would stand in the way of the function. What several
  notebooks share is in `common.py`.
- importing a file of figures sets the style of `paper.mplstyle`, so that notebooks and tests draw alike. Each file does so
  itself, because a figure's code as `cache.py` follows it is what it uses and the bare statements of its own file; this file
  only passes names on.
"""

from .n00_subject_model import bits_per_byte, induction, lm_training, sites
from .n01_ste_derivation import (
    best_bandwidth,
    bias_and_noise,
    kernel_comparison,
    lemma,
    real_agreement,
    real_bandwidth,
    theorem,
    toy_activations,
    toy_errors,
)
from .n02_training import bandwidth_tradeoff, diagnostics, l0_by_token, shrinkage, thresholds, training
from .n03_pareto import matched_l0, pareto, place_ratios, places, scaling, tuning
from .n04_frequency import dead_latents, frequency_histograms, frequent_latents, latent_bands, remedies
from .n05_ablations import ablations, annealing, bandwidth_sweep, estimator_along_run, l0_targets
from .n06_dark import (
    dark_architectures,
    dark_baselines,
    dark_breakdown,
    dark_controls,
    dark_directions,
    dark_matched,
    dark_norms,
    dark_pairs,
    dark_places,
)
from .n07_dark import dark_harm, dark_parts, dark_pursuit, dark_sources, dark_synthetic
from .n08_scope import (
    scope_dark,
    scope_dtype,
    scope_frequency,
    scope_layers,
    scope_plan,
    scope_positions,
    scope_subsets,
    scope_tradeoff,
    scope_transcoders,
    scope_uniformity,
    scope_widths,
)
from .n09_interpretability import absorption, attribution_uniformity, editing, interp_bands, interp_scores
from .n10_speed import density, equal_tokens, inference, search_dtype, speed, step_profile

__all__ = [
    "ablations", "absorption", "annealing", "attribution_uniformity", "bandwidth_sweep",
    "bandwidth_tradeoff", "best_bandwidth", "bias_and_noise", "bits_per_byte", "dark_architectures",
    "dark_baselines", "dark_breakdown", "dark_controls", "dark_directions", "dark_harm", "dark_matched",
    "dark_norms", "dark_pairs", "dark_parts", "dark_places", "dark_pursuit", "dark_sources",
    "dark_synthetic", "dead_latents", "density", "diagnostics", "editing", "equal_tokens",
    "estimator_along_run", "frequency_histograms", "frequent_latents", "induction", "inference",
    "interp_bands", "interp_scores", "kernel_comparison", "l0_by_token", "l0_targets", "latent_bands",
    "lemma", "lm_training", "matched_l0", "pareto", "place_ratios", "places", "real_agreement",
    "real_bandwidth", "remedies", "scaling", "scope_dark", "scope_dtype", "scope_frequency",
    "scope_layers", "scope_plan", "scope_positions", "scope_subsets", "scope_tradeoff",
    "scope_transcoders", "scope_uniformity", "scope_widths", "search_dtype", "shrinkage", "sites",
    "speed", "step_profile", "theorem", "thresholds", "toy_activations", "toy_errors", "training",
    "tuning",
]  # fmt: skip
