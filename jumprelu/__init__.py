"""JumpReLU sparse autoencoders of language-model activations: train, evaluate, and read those of
others.

    import jumprelu as jr
    lm = jr.load_lm()
    tokens = jr.tokenize(jr.load_texts("installed", "train"), lm.tokenizer, max_rows=1000)
    acts = jr.harvest(lm, tokens, site="resid_post", layer=3, out="acts")
    sae, log = jr.train(acts, jr.TrainConfig(d_sae=1024, steps=1000))

Reading order: estimators, support, losses, sparse, sae, recipe, architectures, optim, state (the
training step), train; then corpus, lm, sites, store, harvest, activations; then splicing, metrics.
exchange/ has the SAEs of others, latents/ what latents mean, dark/ what SAEs miss.
"""

# ruff: noqa: E402, I001
from .threads import wait_passively

wait_passively()  # before torch is loaded

from .activations import Activations, open_activations
from .corpus import Tokens, load_texts, tokenize
from .estimators import jump_relu, step
from .exchange.loading import load_sae
from .harvest import harvest
from .lm import LM, load_lm
from .metrics import Report, evaluate
from .recipe import TrainConfig, paper_recipe
from .sae import SAE
from .train import train, train_many

__version__ = "0.1.0"

__all__ = [
    "LM",
    "SAE",
    "Activations",
    "Report",
    "Tokens",
    "TrainConfig",
    "evaluate",
    "harvest",
    "jump_relu",
    "load_lm",
    "load_sae",
    "load_texts",
    "open_activations",
    "paper_recipe",
    "step",
    "tokenize",
    "train",
    "train_many",
]
