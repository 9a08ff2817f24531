"""From a profile to a run outside of notebooks: what notebook 02 would train under it.

    cd notebooks
    python -m companion.rails.launch --profile gemma-2-9b --out ../runs/9b

harvests the activations of that notebook, or finds them in the cache, writes the configuration of
its main run to `config.yaml` in the folder, and prints the command that trains it
(`python -m jumprelu train`), on one device or on many.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import yaml

from jumprelu.activations import Activations
from jumprelu.corpus import load_texts, tokenize
from jumprelu.files import write_text
from jumprelu.harvest import harvest
from jumprelu.lm import load_lm
from jumprelu.recipe import TrainConfig

from .cache import remember
from .figures import ROOT
from .profiles import DEFAULT_PROFILE, check_profile, find_notebooks

NOTEBOOK = "02"


def parameters(root: Path, profile: str) -> tuple[dict[str, Any], TrainConfig]:
    """Notebook 02's parameters under a profile, and the configuration of its main run.

    Raises FileNotFoundError for an unknown profile or where there are no notebooks, ValueError for
    a profile that is not as it should be.
    """
    notebook = find_notebooks(root, NOTEBOOK)[0]
    values = {name: parameter.default for name, parameter in notebook.parameters().items()}
    values |= check_profile(root, profile)[NOTEBOOK]
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    config = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in fields
    }
    return values, TrainConfig(**config)


def harvested(values: dict[str, Any]) -> Activations:
    """The activations that notebook 02 trains on with these parameters; remembered."""
    lm = load_lm(values["model"] or None)
    texts = load_texts(values["dataset"], "train")
    rows, per_document = values["train_rows"], values["rows_per_document"]
    tokens = tokenize(texts, lm.tokenizer, values["context_size"], rows, per_document)
    place = {"site": values["site"], "layer": values["layer"]}
    return remember(harvest, lm, tokens, **place, dtype=values["storage"])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m companion.rails.launch", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for config.yaml and the SAE"
    )
    parser.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        help="a file of notebooks/profiles (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    try:
        values, config = parameters(ROOT, given.profile)
        store = harvested(values).folder.resolve()
        path = given.out.resolve() / "config.yaml"
        fields = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items()
        }
        write_text(path, yaml.safe_dump(fields, sort_keys=False))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    train = ["jumprelu", "train", str(store), "--config", str(path), "--out", str(path.parent)]
    print(f"wrote {path}\nto train it:\n  python -m {shlex.join(train)}")
    print("or, on 8 devices:\n  torchrun --nproc-per-node 8 -m " + shlex.join(train))


if __name__ == "__main__":
    main()
