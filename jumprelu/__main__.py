"""The command line.

    python -m jumprelu harvest --model MODEL --corpus CORPUS --layer 3 --out acts
    python -m jumprelu train acts --set d_sae=16384 --set sparsity=1e-3 --out sae
    torchrun --nproc-per-node 8 -m jumprelu train acts --config c.yaml --latents 4 --out sae
    python -m jumprelu evaluate sae --model MODEL --corpus CORPUS
    python -m jumprelu pages sae MODEL page.html
    python -m jumprelu convert sae there --to saelens
    python -m jumprelu rate {make,score} --help

harvest and train, interrupted, go on where they stopped when the same command is given again; train
on any number of processes, and by itself with torchrun's --max-restarts.
"""

import argparse
import contextlib
import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any

import torch

from .activations import open_activations
from .corpus import Tokens, load_texts, tokenize
from .distributed import start
from .exchange.convert import convert
from .exchange.formats import FORMATS
from .exchange.loading import load_sae
from .harvest import harvest
from .latents import pages, rating, verdicts
from .latents.contexts import collect
from .lm import LM, load_lm
from .metrics import evaluate
from .recipe import TrainConfig
from .store import INDEX
from .train import train

# ---- harvest and evaluate


DEFAULT = "(default: %(default)s)"
SAES = "folder or file of an SAE, of any known format"


def add_text(
    parser: argparse.ArgumentParser, split: str, rows: int, model: str = "--model"
) -> None:
    """The arguments that say which model reads which tokens, and where."""
    add = parser.add_argument
    add(model, help="a folder, a hub id, or jumprelu-lm, the shipped one (default of --model)")
    corpus = "JSONL, Parquet or text, or a hub dataset; default: texts of installed packages"
    add("--corpus", default="installed", help=corpus)
    add("--split", default=split, help=f"of the corpus {DEFAULT}")
    add("--rows", type=int, default=rows, help=f"rows of tokens {DEFAULT}")
    add("--context-size", type=int, default=128, help=f"tokens of a row {DEFAULT}")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")


def read_text(given: argparse.Namespace) -> tuple[LM, Tokens]:
    lm = load_lm(given.model, given.device)
    if lm.tokenizer is None:
        raise ValueError(f"{given.model} has no tokenizer: give a folder with tokenizer.json")
    texts = load_texts(given.corpus, given.split)
    return lm, tokenize(texts, lm.tokenizer, given.context_size, given.rows)


def add_harvest(parser: argparse.ArgumentParser) -> None:
    add_text(parser, "train", 10_000)
    add = parser.add_argument
    add("--site", default="resid_post", help=f"resid_post, mlp_out, attn_out … {DEFAULT}")
    add("--layer", type=int, required=True, help="counted from 0")
    add("--out", required=True, help="folder of the activations")
    add("--dtype", default="float32", help=f"on disk: float32, bfloat16, float16 {DEFAULT}")


def harvest_text(given: argparse.Namespace) -> str:
    lm, tokens = read_text(given)
    acts = harvest(lm, tokens, given.site, layer=given.layer, out=given.out, dtype=given.dtype)
    return f"{acts}\nwritten to {given.out}"


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sae", help=SAES)
    add_text(parser, "validation", 500)
    parser.add_argument("--site", help="default: where the SAE was trained")
    parser.add_argument("--layer", type=int, help="default: where the SAE was trained")


def evaluate_sae(given: argparse.Namespace) -> str:
    sae = load_sae(given.sae)
    lm, tokens = read_text(given)
    return str(evaluate(sae, lm, tokens, given.site, given.layer))


# ---- train


def add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("store", type=Path, help="folder of activations, as harvest writes it")
    add("--out", required=True, help="folder for the SAE, log and checkpoint")
    add("--config", type=Path, metavar="YAML", help="fields of TrainConfig")
    change = "another value for a field of TrainConfig; may be given several times"
    add("--set", dest="changes", action="append", default=[], metavar="NAME=VALUE", help=change)
    latents = "deal the latents among N of torchrun's processes, and tokens among the rest"
    add("--latents", type=int, default=1, metavar="N", help=f"{latents} {DEFAULT}")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--checkpoint-seconds", type=float, default=60, help=f"between checkpoints {DEFAULT}")


def read_config(path: Path | None, changes: list[str]) -> TrainConfig:
    """The fields in a YAML file, and then those of `changes`, "name=value" with a value in YAML.

    Raises ValueError for an unknown field, a value of another type, or one that TrainConfig
    refuses; FileNotFoundError where there is no file.
    """
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path)) if path else None
    if not isinstance(values, dict | None):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected fields: name: value")
    values = values or {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change}: expected NAME=VALUE")
        values[name.strip()] = parse_yaml(text, f"--set {change}")
    types = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    for name, value in values.items():
        if name not in types:
            near = difflib.get_close_matches(str(name), types, 1, cutoff=0)
            raise ValueError(f"TrainConfig has no field {name!r}: did you mean {near[0]!r}?")
        values[name] = check_type(name, value, types[name])
    return TrainConfig(**values)


def parse_yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", error)
        raise ValueError(f"{where} is not valid YAML ({problem})") from error


def check_type(name: str, value: Any, annotation: str) -> Any:
    """`value` as a field of type `annotation` holds it: a list as a tuple; as a float what says
    one, such as 1e-3, which YAML takes for text. Raises ValueError for another type."""
    if annotation.startswith("tuple"):
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(check_type(name, item, "float") for item in items)
    kinds = annotation.split(" | ")
    if (type(value).__name__ if value is not None else "None") in kinds:
        return value
    if "float" in kinds and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    raise ValueError(f"{name} = {value!r}: expected {annotation}")


def train_sae(given: argparse.Namespace) -> str | None:
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


# ---- convert, pages and rate


def add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="folder of an SAE")
    add("target", metavar="DST", help="folder to write, new or empty")
    written = [name for name, each in FORMATS.items() if each.write]
    add("--to", required=True, metavar="FORMAT", choices=written, help="one of %(choices)s")
    known = "one of %(choices)s; recognised from the files by default"
    add("--from", dest="format", metavar="FORMAT", choices=list(FORMATS), help=known)


def convert_sae(given: argparse.Namespace) -> str:
    return "\n".join(convert(given.source, given.target, given.to, given.format))


def add_pages(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sae", help=SAES)
    add_text(parser, "validation", 2000, model="model")
    add("out", type=Path, help="the HTML file to write")
    add("--latents", type=int, nargs="+", metavar="N", help="only these latents")
    columns = "columns latent, explanation, score"
    add("--explanations", type=Path, metavar="CSV", help=columns)
    add("--title", help="by default what the SAE says of itself")
    add("--seed", type=int, default=0, help=f"for the choice of contexts {DEFAULT}")


def make_pages(given: argparse.Namespace) -> str:
    sae = load_sae(given.sae)
    explanations = pages.read_explanations(given.explanations) if given.explanations else {}
    lm, tokens = read_text(given)
    latents = None if given.latents is None else torch.tensor(given.latents)
    contexts = collect(lm, sae, tokens, latents=latents, **pages.SHOWN, seed=given.seed)
    path = pages.write_pages(given.out, sae, lm, contexts, explanations, given.title)
    return f"{path}: {len(contexts.latents)} latents, {path.stat().st_size / 1e6:.1f} MB"


def add_rate(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(dest="way", required=True, metavar="WAY")
    maker = ways.add_parser("make", help="write a page for the raters and a sealed key")
    add = maker.add_argument
    add("out", type=Path, help="folder for the page and the key")
    add("saes", nargs="+", metavar="SAE", help=SAES)
    add("--per-stratum", type=int, default=5, help=f"latents of each {DEFAULT}")
    targets, nearest = list(rating.TARGETS), f"each SAE belongs to the nearest {DEFAULT}"
    add("--targets", type=float, nargs="+", default=targets, metavar="L0", help=nearest)
    add("--seed", type=int, help="for draw and order; default: a secret one")
    add("--title", default=rating.TITLE, help="of the page; must not tell the source")
    add_text(maker, "validation", 2000)
    scorer = ways.add_parser("score", help="open the key and count")
    add = scorer.add_argument
    add("key", type=Path, help="key-ID.json")
    add("csv", nargs="+", type=Path, help="what the raters exported")
    groups = "what to count by, architecture by default: %(choices)s"
    add("--by", nargs="+", default=["architecture"], choices=verdicts.GROUPS, help=groups)
    add("--partial", action="store_true", help="accept raters who left items out")
    add("--out", type=Path, metavar="CSV", help="write every item with its source and ratings")


def rate_latents(given: argparse.Namespace) -> str:
    if given.way == "score":
        key = verdicts.read_key(given.key)
        found = verdicts.score(key, given.csv, given.by, given.partial)
        if given.out:
            found.write(given.out)
        return found.report()
    lm, tokens = read_text(given)
    saes = {str(folder): load_sae(folder) for folder in given.saes}
    if len(saes) < len(given.saes):
        raise ValueError("an SAE is given twice: name each folder once")
    options = given.per_stratum, given.targets, given.seed, given.title
    study = rating.make(given.out, lm, saes, tokens, *options)
    return f"{study.page}: for the raters\n{study.key}: keep it closed until all ratings are in"


# ---- the door


COMMANDS = {
    "harvest": (add_harvest, harvest_text, "store a language model's activations"),
    "train": (add_train, train_sae, "train an SAE on stored activations"),
    "evaluate": (add_evaluate, evaluate_sae, "sparsity, fidelity and cost on held-out text"),
    "pages": (add_pages, make_pages, "one HTML file to look at the latents of an SAE"),
    "rate": (add_rate, rate_latents, "a blind manual study of latents: make the page, score it"),
    "convert": (add_convert, convert_sae, "an SAE from one library's files to another's"),
}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error, which is one line on stderr."""
    parser = argparse.ArgumentParser(
        "python -m jumprelu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, _, purpose) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=purpose, description=purpose))
    given = parser.parse_args(arguments)
    try:
        done = COMMANDS[given.command][1](given)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if done is not None:
        print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
