"""JumpReLU sparse autoencoders and SAE dark matter: a companion to two papers, in code.

    import jumprelu as jr
    lm = jr.load_lm()
    tokens = jr.tokenize(jr.load_texts("installed", "train"), lm.tokenizer, max_rows=1000)
    acts = jr.harvest(lm, tokens, site="resid_post", layer=3, out="acts")
    sae, log = jr.train(acts, jr.TrainConfig(d_sae=1024, steps=1000))

Reading order: estimators, losses, sparse, sae, architectures, recipe, optim, train; then hooks, harvest, activations; then
metrics; hub, scope and formats for the SAEs of others.
"""

from . import plots
from .activations import Activations, open_activations
from .cache import remember
from .corpus import Tokens, load_texts, tokenize
from .estimators import jump_relu, step
from .figures import facts, save_figure, use_style
from .harvest import harvest
from .lm import LM, load_lm
from .metrics import Report, evaluate
from .recipe import TrainConfig, paper_recipe
from .sae import SAE
from .scope import load_sae
from .train import train, train_many

__version__ = "0.1.0"

__all__ = [
    "LM", "SAE", "Activations", "Report", "Tokens", "TrainConfig", "evaluate", "facts", "harvest", "jump_relu", "load_lm",
    "load_sae", "load_texts", "open_activations", "paper_recipe", "plots", "remember", "save_figure", "step", "tokenize",
    "train", "train_many", "use_style",
]  # fmt: skip
