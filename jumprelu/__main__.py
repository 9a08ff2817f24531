"""The command line.

    python -m jumprelu harvest --model MODEL --corpus CORPUS --layer 3 --out acts
    python -m jumprelu train acts --set d_sae=16384 --set sparsity=1e-3 --out sae
    torchrun --nproc-per-node 8 -m jumprelu train acts --config c.yaml --latents 4 --out sae
    python -m jumprelu evaluate sae --model MODEL --corpus CORPUS
    python -m jumprelu {convert,pages,rate} --help

harvest and train, interrupted, go on where they stopped when the same command is given again; train
on any number of processes, and by itself with torchrun's --max-restarts.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .corpus import Tokens
    from .lm import LM
    from .recipe import TrainConfig

# ---- harvest and evaluate


def add_text(parser: argparse.ArgumentParser, split: str, rows: int) -> None:
    """The arguments that say which model reads which tokens."""
    parser.add_argument("--model", help="a folder, or a hub id; default: the shipped model")
    parser.add_argument(
        "--corpus",
        default="installed",
        help="JSONL, Parquet or text, or a hub dataset; default: documentation of installed "
        "packages",
    )
    parser.add_argument("--split", default=split, help="of the corpus (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=rows, help="rows of tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--context-size", type=int, default=128, help="tokens of a row (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")


def read_text(given: argparse.Namespace) -> tuple[LM, Tokens]:
    from .corpus import load_texts, tokenize
    from .lm import load_lm

    lm = load_lm(given.model, given.device)
    if lm.tokenizer is None:
        raise ValueError(
            f"{given.model} has no tokenizer, so no text can be read: give a folder with "
            "tokenizer.json"
        )
    texts = load_texts(given.corpus, given.split)
    return lm, tokenize(texts, lm.tokenizer, given.context_size, given.rows)


def add_harvest(parser: argparse.ArgumentParser) -> None:
    add_text(parser, "train", 10_000)
    parser.add_argument(
        "--site", default="resid_post", help="resid_post, mlp_out, attn_out … (default: resid_post)"
    )
    parser.add_argument("--layer", type=int, required=True, help="counted from 0")
    parser.add_argument("--out", required=True, help="folder of the activations")
    parser.add_argument(
        "--dtype", default="float32", help="on disk: float32, bfloat16, float16 (default: float32)"
    )


def harvest_text(given: argparse.Namespace) -> str:
    from .harvest import harvest

    lm, tokens = read_text(given)
    acts = harvest(lm, tokens, given.site, layer=given.layer, out=given.out, dtype=given.dtype)
    return f"{acts}\nwritten to {given.out}"


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", help="folder or file of an SAE, of any known format")
    add_text(parser, "validation", 500)
    parser.add_argument("--site", help="default: where the SAE was trained")
    parser.add_argument("--layer", type=int, help="default: where the SAE was trained")


def evaluate_sae(given: argparse.Namespace) -> str:
    from .exchange.loading import load_sae
    from .metrics import evaluate

    sae = load_sae(given.sae)
    lm, tokens = read_text(given)
    return str(evaluate(sae, lm, tokens, given.site, given.layer))


# ---- train


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="folder of activations, as harvest writes it")
    parser.add_argument("--out", required=True, help="folder for the SAE, log and checkpoint")
    parser.add_argument("--config", type=Path, metavar="YAML", help="fields of TrainConfig")
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a field of TrainConfig; may be given several times",
    )
    parser.add_argument(
        "--latents",
        type=int,
        default=1,
        metavar="N",
        help="of the processes that torchrun starts, deal the latents among N, and tokens among "
        "the rest",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=60,
        help="between checkpoints (default: %(default)s)",
    )


def read_config(path: Path | None, changes: list[str]) -> TrainConfig:
    """The fields in a YAML file, and then those of `changes`, "name=value" with a value in YAML.

    Raises ValueError for an unknown field, a value of another type, or one that TrainConfig
    refuses; FileNotFoundError where there is no file.
    """
    import dataclasses

    from .recipe import TrainConfig

    values = parse_yaml(path.read_text(encoding="utf-8"), str(path)) if path else {}
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected fields: name: value")
    values = dict(values or {})
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: expected NAME=VALUE")
        values[name.strip()] = parse_yaml(text, f"--set {change}")
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, 1, cutoff=0)
            raise ValueError(f"TrainConfig has no field {name!r}: did you mean {near[0]!r}?")
        values[name] = check_type(name, value, str(fields[name].type))
    return TrainConfig(**values)


def parse_yaml(text: str, where: str) -> Any:
    """Plain values; numbers such as 1e-3, which YAML takes for text, are numbers."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", error)
        raise ValueError(f"{where} is not valid YAML ({problem})") from error


def check_type(name: str, value: Any, annotation: str) -> Any:
    """`value` as a field of type `annotation` holds it: a list as a tuple, a whole number as a
    float. Raises ValueError for another type."""
    if annotation.startswith("tuple"):
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(check_type(name, item, "float") for item in items)
    kinds = annotation.split(" | ")
    if value is None and "None" in kinds:
        return None
    if "float" in kinds and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value).__name__ in kinds:
        return value
    raise ValueError(f"{name} = {value!r}: expected {annotation}")


def train_sae(given: argparse.Namespace) -> str | None:
    from .activations import INDEX, open_activations
    from .distributed import start
    from .train import train

    config = read_config(given.config, given.changes)
    team = start(given.latents, given.device)
    try:
        team.check(config)
        team.wait_for_file(given.store / INDEX)
        acts = open_activations(given.store)
        seconds = given.checkpoint_seconds
        sae, log = train(acts, config, given.out, given.device, seconds, team=team)
        last = log.iloc[-1]
        numbers = f"L0 {last.l0:.1f}, FVU {last.fvu:.4f} on its last batch"
        return f"{sae}\n{numbers}; written to {given.out}" if team.first else None
    finally:
        team.close()


# ---- the door


OWN = {
    "harvest": (add_harvest, harvest_text, "store a language model's activations"),
    "train": (add_train, train_sae, "train an SAE on stored activations"),
    "evaluate": (
        add_evaluate,
        evaluate_sae,
        "sparsity, fidelity and cost of an SAE on held-out text",
    ),
}
ELSEWHERE = {
    "pages": "one HTML file to look at the latents of an SAE",
    "rate": "a blind manual study of latents: make the page, and score it",
    "convert": "an SAE from one library's files to another's",
}


def delegate(command: str, arguments: list[str]) -> int:
    """The command line of a module that has its own."""
    if command == "convert":
        from .exchange.convert import main

        return main(arguments)
    from .exchange.loading import load_sae

    if command == "pages":
        from .latents.pages import main
    else:
        from .latents.rating import main
    return main(arguments, load_sae)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error, which is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ELSEWHERE:
        return delegate(arguments[0], arguments[1:])
    parser = argparse.ArgumentParser(
        "python -m jumprelu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, _, purpose) in OWN.items():
        add_arguments(commands.add_parser(name, help=purpose, description=purpose))
    for name, purpose in ELSEWHERE.items():
        commands.add_parser(name, help=purpose, add_help=False)
    given = parser.parse_args(arguments)
    try:
        done = OWN[given.command][1](given)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if done is not None:
        print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
