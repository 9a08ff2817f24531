"""Other SAE libraries, each trained as its own trainer trains: what `python -m
companion.speed.benchmark` compares with.

Notable here:
- a step is what a library's trainer does with one batch of activations, through its own classes:
  bookkeeping, gradient clipping, optimiser and schedules included; logging, checkpoints and the
  language model are left out.
- a finished peer is brought into the form of :class:`jumprelu.SAE`, with scales folded, so all are
  scored by the same code.
- imports are inside functions: the package needs none of these libraries. `make benchmark` installs
  them in a place of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from jumprelu.exchange.parts import Parts, fold
from jumprelu.sae import SAE, Origin

DISTRIBUTIONS = {
    "SAELens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
}
"""Peers by the name of their distribution."""


class Finished(NamedTuple):
    """A trained SAE: as its library runs it, raw activations [n, d_in] to reconstructions, and in
    our form."""

    reconstruct: Callable[[torch.Tensor], torch.Tensor]
    sae: SAE


class Trainer(NamedTuple):
    """One SAE in training."""

    step: Callable[[torch.Tensor], Any]
    """A training step on raw activations [batch, d_in]."""
    finish: Callable[[], Finished]
    """The SAE as it is now; training can go on."""
    entries: Callable[[torch.Tensor], float]
    """Entries of [batch, d_sae] that a step on this batch looks at, a token: d_sae where it is
    dense."""


def version(peer: str) -> str:
    """Installed version of a peer; raises ModuleNotFoundError, saying how to get it, if there is
    none."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS[peer])
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "not installed: `make benchmark` makes an environment with it"
        ) from None


def peer_trainer(
    peer: str,
    architecture: str,
    d_sae: int,
    steps: int,
    batch_size: int,
    sample: torch.Tensor,
    seed: int = 0,
    **options: Any,
) -> Trainer:
    """A trainer of one of DISTRIBUTIONS for a run of `steps` batches.

    architecture: "jumprelu", "relu" or "topk". sample: raw activations [n, d_in] that scales are
    estimated from. options: of the library's own configuration, by its own names; what is not given
    is the library's default. Raises ModuleNotFoundError if it is not installed, ValueError if it
    has no such architecture.
    """
    version(peer)
    make = {
        "SAELens": _saelens,
        "dictionary_learning": _dictionary_learning,
        "sparsify": _sparsify,
    }[peer]
    torch.manual_seed(seed)  # the libraries draw their initial weights from the global generator
    return make(architecture, sample.shape[1], d_sae, steps, batch_size, sample, **options)


def in_our_form(
    architecture: str,
    W_enc: torch.Tensor,
    b_enc: torch.Tensor,
    W_dec: torch.Tensor,
    b_dec: torch.Tensor,
    b_in: torch.Tensor | float = 0.0,
    threshold: torch.Tensor | float = 0.0,
    scale: float = 1.0,
    k: int | None = None,
) -> SAE:
    """The SAE with f = act((x/scale − b_in) W_enc + b_enc), x̂ = scale·(f W_dec + b_dec), for raw
    activations x.

    Shapes as for :class:`jumprelu.SAE`; b_in: [d_in]. Norms of atoms move into the encoder, except
    for TopK, where that would change which latents are the largest.
    """
    parts = Parts(
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        threshold,
        b_in * torch.ones_like(b_dec),
        scale,
        k,
        origin=Origin(architecture=architecture, input_scale=scale),
    )
    return fold(parts)[0]


def _no_such(peer: str, architecture: str, known: dict[str, Any]) -> ValueError:
    return ValueError(
        f"{peer} has no trainer for {architecture!r} here: expected one of {', '.join(known)}"
    )


def _root_mean_square(sample: torch.Tensor) -> float:
    return float(sample.square().sum(-1).mean().sqrt())


def _saelens(
    architecture: str,
    d_in: int,
    d_sae: int,
    steps: int,
    batch_size: int,
    sample: torch.Tensor,
    normalize_activations: str = "expected_average_only_in",
    b_dec_init: str | None = None,
    **options: Any,
) -> Trainer:
    """SAELens's SAETrainer. With use_sparse_activations, its TopK's backward pass does not run on a
    CPU.

    normalize_activations: "expected_average_only_in" (E‖x‖ = √d_in, which SAELens recommends), or
    "none", for inputs that come with E‖x‖² = 1. b_dec_init: "mean" starts b_dec at the mean
    activation: SAELens has no such option, a short run needs it.
    """
    import sae_lens as lens
    from sae_lens.config import SAETrainerConfig

    kinds = {
        "jumprelu": (lens.JumpReLUTrainingSAE, lens.JumpReLUTrainingSAEConfig),
        "relu": (lens.StandardTrainingSAE, lens.StandardTrainingSAEConfig),
        "topk": (lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig),
    }
    if architecture not in kinds:
        raise _no_such("SAELens", architecture, kinds)
    new_sae, new_config = kinds[architecture]
    names = {field.name for field in dataclasses.fields(SAETrainerConfig)}
    of_trainer = {name: value for name, value in options.items() if name in names}
    of_sae = {name: value for name, value in options.items() if name not in names}
    sae = new_sae(
        new_config(d_in=d_in, d_sae=d_sae, normalize_activations=normalize_activations, **of_sae)
    )
    config = SAETrainerConfig(
        total_training_samples=steps * batch_size, train_batch_size_samples=batch_size, **of_trainer
    )
    config.lr_end = config.lr / 10  # what SAELens's runner fills in
    trainer = lens.SAETrainer(config, sae, iter(()))
    if normalize_activations == "expected_average_only_in":
        trainer.activation_scaler.estimate_scaling_factor(d_in, iter([sample]), 1)
    else:
        trainer.activation_scaler.scaling_factor = 1 / _root_mean_square(sample)
    if b_dec_init == "mean":
        sae.b_dec.data = sample.mean(0) * trainer.activation_scaler.scaling_factor

    def step(x: torch.Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    def finish() -> Finished:
        trained = copy.deepcopy(trainer.sae)
        trained.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        arrays = trained.state_dict()
        trained.process_state_dict_for_saving_inference(arrays)
        used = lens.SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict())
        used.load_state_dict(arrays)
        k = getattr(used.cfg, "k", None)
        if k is not None:
            trained.fold_W_dec_norm()
        ours = in_our_form(
            architecture,
            trained.W_enc,
            trained.b_enc,
            trained.W_dec,
            trained.b_dec,
            trained.b_dec,
            getattr(trained, "threshold", 0.0),
            k=k,
        )
        return Finished(lambda x: used.decode(used.encode(x)), ours)

    return Trainer(step, finish, lambda _: float(d_sae))


def _dictionary_learning(
    architecture: str,
    d_in: int,
    d_sae: int,
    steps: int,
    batch_size: int,
    sample: torch.Tensor,
    threshold_init: float | None = None,
    b_dec_init: str | None = None,
    **options: Any,
) -> Trainer:
    """dictionary_learning's trainers, with `normalize_activations=True` as its `trainSAE` does it:
    E‖x‖² = 1.

    threshold_init: θ at the start of a JumpReLU, for which the library has 0.001 and no option.
    b_dec_init: "mean" starts b_dec at the mean activation. Neither is an option of the library; a
    short run needs both.
    """
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    kinds = {"jumprelu": JumpReluTrainer, "relu": StandardTrainer, "topk": TopKTrainer}
    if architecture not in kinds:
        raise _no_such("dictionary_learning", architecture, kinds)
    trainer = kinds[architecture](
        steps=steps,
        activation_dim=d_in,
        dict_size=d_sae,
        layer=0,
        lm_name="none",
        device="cpu",
        **options,
    )
    scale, done = _root_mean_square(sample), 0
    if threshold_init is not None:
        trainer.ae.threshold.data.fill_(threshold_init)
    if b_dec_init == "mean":
        trainer.ae.b_dec.data = sample.mean(0) / scale

    def step(x: torch.Tensor) -> None:
        nonlocal done
        trainer.update(done, x / scale)
        done += 1

    def finish() -> Finished:
        ae = copy.deepcopy(trainer.ae)
        if architecture == "jumprelu":
            ours = in_our_form(
                architecture,
                ae.W_enc,
                ae.b_enc,
                ae.W_dec,
                ae.b_dec,
                threshold=ae.threshold,
                scale=scale,
            )
        else:
            b_dec = ae.bias if architecture == "relu" else ae.b_dec
            k = int(ae.k) if architecture == "topk" else None
            ours = in_our_form(
                architecture,
                ae.encoder.weight.T,
                ae.encoder.bias,
                ae.decoder.weight.T,
                b_dec,
                b_dec,
                scale=scale,
                k=k,
            )
        ae.scale_biases(scale)  # as trainSAE does when it saves
        return Finished(lambda x: ae.decode(ae.encode(x)), ours)

    return Trainer(step, finish, lambda _: float(d_sae))


def _sparsify(
    architecture: str,
    d_in: int,
    d_sae: int,
    steps: int,
    batch_size: int,
    sample: torch.Tensor,
    **options: Any,
) -> Trainer:
    """sparsify's Trainer, whose loop needs a language model: what that loop does with a batch of
    activations, in its order."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; the Triton kernel is for GPUs
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    if architecture != "topk":
        raise _no_such("sparsify", architecture, {"topk": None})
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, **options), dtype=torch.float32)
    coder.b_dec.data = sample.mean(0)
    lr = 5e-3 / (d_sae / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(
        SignSGD([{"params": list(coder.parameters()), "lr": lr}]), momentum=0.95
    )
    optimizer.train()
    silent = torch.zeros(d_sae, dtype=torch.long)
    fired = torch.zeros(d_sae, dtype=torch.bool)

    def step(x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, total_variance=(x - x.mean(0)).pow(2).sum())
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[fired] = 0
        fired.zero_()

    def finish() -> Finished:
        optimizer.eval()  # to the averaged weights, which are what is saved
        used = copy.deepcopy(coder)
        optimizer.train()
        ours = in_our_form(
            architecture,
            used.encoder.weight.T,
            used.encoder.bias,
            used.W_dec,
            used.b_dec,
            used.b_dec,
            k=used.cfg.k,
        )

        def reconstruct(x: torch.Tensor) -> torch.Tensor:
            found = used.encode(x)
            return used.decode(found.top_acts, found.top_indices)

        return Finished(reconstruct, ours)

    return Trainer(step, finish, lambda _: float(d_sae))
