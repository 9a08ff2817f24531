r"""Train the SAE of a profile from the command line, on one device or on many.

    cd notebooks
    python -m companion.rails.launch --profile laptop --out runs/laptop
    torchrun --nproc-per-node 8 -m companion.rails.launch --profile gemma-2-9b --latents 4 \
        --out runs/9b

The parameters are those of notebook 02 under that profile. The first process harvests the
activations, or finds them in the cache; then all train (`distributed.py`). Interrupted, the same
command goes on from the last checkpoint, on any number of processes; with torchrun's --max-restarts
it does so by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from jumprelu.activations import INDEX, open_activations
from jumprelu.corpus import load_texts, tokenize
from jumprelu.distributed import start
from jumprelu.harvest import harvest
from jumprelu.lm import load_lm
from jumprelu.recipe import TrainConfig
from jumprelu.train import train

from .cache import remember
from .figures import ROOT
from .profiles import DEFAULT_PROFILE, check_profile, find_notebooks, read_value

NOTEBOOK = "02"


def parameters(root: Path, profile: str, changes: list[str]) -> tuple[dict[str, Any], TrainConfig]:
    """Notebook 02's parameters under a profile, and the configuration of its main run.

    changes: "name=value" of any parameter of either, the value in YAML. Raises ValueError for an
    unknown name or a value that the configuration refuses, FileNotFoundError for an unknown profile
    or where there are no notebooks.
    """
    of_notebook = find_notebooks(root, NOTEBOOK)[0].parameters()
    values = {name: parameter.default for name, parameter in of_notebook.items()} | check_profile(
        root, profile
    )[NOTEBOOK]
    known = {name: of_notebook[name].annotation for name in HARVEST}
    known |= {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in known:
            raise ValueError(
                f"--set {change}: expected name=value with one of {', '.join(sorted(known))}"
            )
        values[name] = read_value(text, known[name])
    config = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in {field.name for field in dataclasses.fields(TrainConfig)}
    }
    return values, TrainConfig(**config)


HARVEST = (
    "model",
    "dataset",
    "site",
    "layer",
    "context_size",
    "train_rows",
    "rows_per_document",
    "storage",
)
"""Parameters of the notebook that say what is harvested."""


def _harvested(values: dict[str, Any]) -> str:
    """The folder of the activations to train on."""
    lm = load_lm(values["model"] or None)
    tokens = tokenize(
        load_texts(values["dataset"], "train"),
        lm.tokenizer,
        values["context_size"],
        values["train_rows"],
        values["rows_per_document"],
    )
    acts = remember(
        harvest, lm, tokens, site=values["site"], layer=values["layer"], dtype=values["storage"]
    )
    return str(acts.folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m companion.rails.launch", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the SAE, its log and the checkpoint"
    )
    parser.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        help="a file of notebooks/profiles (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a parameter of notebook 02 or of TrainConfig; may be repeated",
    )
    parser.add_argument(
        "--latents",
        type=int,
        default=1,
        metavar="N",
        help="deal latents among N of the processes that torchrun starts, tokens among the rest",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: a GPU where there is one"
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=60,
        help="seconds between checkpoints (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    try:
        values, config = parameters(ROOT, given.profile, given.changes)
        team = start(given.latents, given.device)
        team.check(config)
        folder = Path(team.tell(lambda: _harvested(values)))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # of the language model
        team.see(folder / INDEX)
        sae, log = train(
            open_activations(folder),
            config,
            given.out,
            given.device,
            given.checkpoint_seconds,
            team=team,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if team.first:
        last = log.iloc[-1]
        print(
            f"{sae}\nL0 {last.l0:.1f}, FVU {last.fvu:.4f} on its last batch; written to {given.out}"
        )
    team.end()


if __name__ == "__main__":
    main()
