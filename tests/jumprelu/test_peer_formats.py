"""Files of other libraries, against these libraries; run it with .venv-peers/bin/python, it is
skipped where they are not."""

from __future__ import annotations

import json
import os

import pytest
import torch

from jumprelu.architectures import Trainee
from jumprelu.exchange.convert import convert
from jumprelu.exchange.formats import examine, write
from jumprelu.exchange.loading import load_sae
from jumprelu.recipe import TrainConfig
from jumprelu.sae import Origin

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; the Triton kernel is for GPUs
lens = pytest.importorskip("sae_lens")
dl = pytest.importorskip("dictionary_learning")
sparsify = pytest.importorskip("sparsify")

from dictionary_learning.dictionary import (  # noqa: E402
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402
from sae_lens.loading import pretrained_sae_loaders as loaders  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("no_gradient"),
]  # warnings of theirs
ARCHITECTURES = ("jumprelu", "relu", "gated", "topk", "batchtopk")
D_IN, D_SAE, K = 12, 40, 5


@pytest.fixture
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def x():
    """Raw activations, off centre and of no particular scale."""
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(200, D_IN, generator=generator) + torch.linspace(-4, 4, D_IN)


def shaken(module, seed=0):
    """`module` with every floating parameter random, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) / 2
    return module


def ours(architecture, site="resid_post", seed=0):
    """An SAE as training ends with: folded from a trainee whose parameters are random."""
    trainee = shaken(Trainee(D_IN, TrainConfig(architecture, D_SAE, k=K)), seed)
    if architecture == "batchtopk":
        trainee.batch_threshold.fill_(0.4)
    return trainee.fold(7.5, model_name="gpt2", site=site, layer=3)


def assert_close(one, two):
    """Equal to 1e-5 of each row's norm, and not trivially so."""
    assert one.shape == two.shape and (one != 0).any()
    assert ((one - two).norm(dim=-1) <= 1e-5 * two.norm(dim=-1).clamp_min(1e-6)).all()


def check(sae, x, reconstruction, acts, same_units=True):
    """`sae` does what the other library does: x̂, and activations, up to a factor of each latent's
    own unless `same_units`."""
    mine = sae.encode(x)
    assert 0.02 < (mine > 0).float().mean() < 0.98
    assert_close(sae(x), reconstruction)
    if not same_units:
        factor = (mine * acts).sum(0) / acts.square().sum(0)
        assert (factor[(acts > 0).any(0)] > 0).all()
        acts = acts * factor.nan_to_num()
    assert_close(mine, acts)


# ---- SAELens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_loads_what_we_write(architecture, x, tmp_path):
    sae = ours(architecture)
    write(sae, tmp_path, "saelens")
    theirs = lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == {"relu": "standard", "topk": "topk"}.get(
        architecture, "jumprelu"
    )
    assert (
        theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
        and theirs.cfg.metadata.model_name == "gpt2"
    )
    acts = theirs.encode(x)
    assert_close(acts, sae.encode(x))
    assert_close(theirs.decode(acts), sae.decode(acts))
    assert theirs.W_enc.shape == sae.W_enc.shape and theirs.dtype == torch.float32
    assert load_sae(tmp_path).origin == sae.origin


def test_saelens_takes_the_heads_of_attn_out_apart(x, tmp_path):
    sae = ours("jumprelu", site="attn_out")
    assert "heads apart" in write(sae, tmp_path, "saelens")[0]
    theirs = lens.SAE.load_from_disk(tmp_path)
    heads = x.reshape(-1, 3, D_IN // 3)
    assert_close(theirs(heads).flatten(1), sae(x))
    assert "concatenated" in examine(tmp_path).notes[0]


INFERENCE = {
    "standard": (lens.StandardSAE, lens.StandardSAEConfig, {}),
    "jumprelu": (lens.JumpReLUSAE, lens.JumpReLUSAEConfig, {}),
    "gated": (lens.GatedSAE, lens.GatedSAEConfig, {}),
    "topk": (lens.TopKSAE, lens.TopKSAEConfig, {"k": K}),
    "topk by norm": (
        lens.TopKSAE,
        lens.TopKSAEConfig,
        {"k": K, "rescale_acts_by_decoder_norm": True},
    ),
}


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("kind", INFERENCE)
def test_we_read_what_saelens_saves(kind, apply_b_dec_to_input, x, tmp_path):
    make, config, options = INFERENCE[kind]
    about = lens.saes.sae.SAEMetadata(model_name="gpt2", hook_name="blocks.7.hook_mlp_out")
    theirs = shaken(
        make(
            config(
                d_in=D_IN,
                d_sae=D_SAE,
                apply_b_dec_to_input=apply_b_dec_to_input,
                metadata=about,
                **options,
            )
        )
    )
    theirs.save_model(tmp_path)
    reading = examine(tmp_path)
    assert reading.format == "saelens" and reading.sae.origin[:3] == ("gpt2", "mlp_out", 7)
    acts = theirs.encode(x)
    # random thresholds are of both signs; TopK alone keeps its own units, or SAELens has already
    # those of atoms of norm 1
    check(reading.sae, x, theirs.decode(acts), acts, same_units=kind.startswith("topk"))
    if kind != "topk":
        torch.testing.assert_close(reading.sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
        theirs.fold_W_dec_norm()
        theirs.cfg.rescale_acts_by_decoder_norm = False
        assert_close(reading.sae.encode(x), theirs.encode(x))


TRAINING = {
    "standard": (lens.StandardTrainingSAE, lens.StandardTrainingSAEConfig, {}),
    "jumprelu": (lens.JumpReLUTrainingSAE, lens.JumpReLUTrainingSAEConfig, {}),
    "gated": (lens.GatedTrainingSAE, lens.GatedTrainingSAEConfig, {}),
    "topk": (lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig, {"k": K}),
    "batchtopk": (lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig, {"k": K}),
    "batchtopk by size": (
        lens.BatchTopKTrainingSAE,
        lens.BatchTopKTrainingSAEConfig,
        {"k": K, "rescale_acts_by_decoder_norm": False},
    ),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", TRAINING)
def test_we_read_what_saelens_has_in_training(kind, scaled, x, tmp_path):
    """`save_model`, with the trainer's file of the input scale, is read as what
    `save_inference_model` makes of the same SAE."""
    make, config, options = TRAINING[kind]
    normalisation = "expected_average_only_in" if scaled else "none"
    theirs = shaken(
        make(config(d_in=D_IN, d_sae=D_SAE, normalize_activations=normalisation, **options))
    )
    if "batchtopk" in kind:
        theirs.topk_threshold.fill_(0.7)
    theirs.save_model(tmp_path / "training")
    if scaled:
        scaler = lens.training.activation_scaler.ActivationScaler()
        scaler.estimate_scaling_factor(D_IN, iter([x]), 1)
        with pytest.raises(ValueError, match="activation_scaler.json"):
            load_sae(tmp_path / "training")
        scaler.save(str(tmp_path / "training/activation_scaler.json"))
        theirs.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    theirs.save_inference_model(tmp_path / "inference")
    inference = lens.SAE.load_from_disk(tmp_path / "inference")
    acts = inference.encode(x)
    for name in ("training", "inference"):
        check(load_sae(tmp_path / name), x, inference.decode(acts), acts, same_units=False)
    assert load_sae(tmp_path / "training").origin.architecture == kind.split()[0].replace(
        "standard", "relu"
    )
    assert load_sae(tmp_path / "inference").origin.architecture == kind.split()[0].replace(
        "standard", "relu"
    )


# ---- dictionary_learning


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dictionary_learning_loads_what_we_write(architecture, x, tmp_path):
    sae = ours(architecture)
    write(sae, tmp_path, "dictionary_learning")
    theirs, config = load_dictionary(str(tmp_path), device="cpu")
    assert (
        theirs.activation_dim == D_IN
        and theirs.dict_size == D_SAE
        and config["trainer"]["layer"] == 3
    )
    acts = theirs.encode(x)
    assert_close(acts, sae.encode(x))
    assert_close(theirs.decode(acts), sae.decode(acts))
    assert load_sae(tmp_path).origin == sae.origin


CLASSES = {
    AutoEncoder: {},
    AutoEncoderNew: {},
    GatedAutoEncoder: {},
    JumpReluAutoEncoder: {},
    AutoEncoderTopK: {"k": K},
    BatchTopKSAE: {"k": K},
    MatryoshkaBatchTopKSAE: {"k": K, "group_sizes": [10, 30]},
}


def save_dictionary(theirs, folder):
    """As dictionary_learning's trainSAE does."""
    kind = type(theirs).__name__
    trainer = {
        "dict_class": kind,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": 4,
        "lm_name": "gpt2",
        "submodule_name": "resid_post_layer_4",
    } | ({"k": K} if "TopK" in kind else {})
    torch.save(
        {name: tensor.cpu() for name, tensor in theirs.state_dict().items()}, folder / "ae.pt"
    )
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}})
    )


@pytest.mark.parametrize("threshold", [-1.0, 0.7])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_we_read_what_dictionary_learning_saves(kind, threshold, x, tmp_path):
    theirs = shaken(kind(D_IN, D_SAE, **CLASSES[kind]))
    if "TopK" in kind.__name__:
        theirs.threshold = torch.tensor(threshold)
    if kind is not AutoEncoderNew:
        theirs.scale_biases(1.5)
    save_dictionary(theirs, tmp_path)
    theirs = load_dictionary(str(tmp_path), device="cpu")[0]
    acts = theirs.encode(x)
    reading = examine(tmp_path)
    assert reading.format == "dictionary_learning" and reading.sae.origin[:3] == (
        "gpt2",
        "resid_post",
        4,
    )
    # AutoEncoder brings its atoms to norm 1 when it is loaded, as we do
    check(
        reading.sae, x, theirs.decode(acts), acts, same_units=kind in (AutoEncoder, AutoEncoderTopK)
    )


# ---- sparsify


def dense(theirs, x):
    """Activations [n, d_sae] and the reconstruction, as sparsify computes them."""
    found = theirs.encode(x)
    acts = torch.zeros(len(x), theirs.num_latents).scatter(1, found.top_indices, found.top_acts)
    return acts, theirs.decode(found.top_acts, found.top_indices)


def test_sparsify_loads_what_we_write(x, tmp_path):
    sae = ours("topk")
    assert "b_dec" in write(sae, tmp_path, "sparsify")[0]
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
    acts, reconstruction = dense(theirs, x)
    assert_close(acts, sae.encode(x))
    assert_close(reconstruction, sae(x))
    assert load_sae(tmp_path).origin == sae.origin and theirs.num_latents == D_SAE


def test_we_read_what_sparsify_saves(x, tmp_path):
    folder = tmp_path / "layers.6"
    theirs = shaken(sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K)))
    theirs.save_to_disk(folder)
    acts, reconstruction = dense(theirs, x)
    sae = load_sae(folder)
    assert sae.k == K and sae.origin[1:3] == ("resid_post", 6)
    check(sae, x, reconstruction, acts)


@pytest.mark.parametrize(
    "options", [{"activation": "groupmax", "k": 4}, {"transcode": True}, {"skip_connection": True}]
)
def test_other_coders_of_sparsify_are_refused(options, tmp_path):
    sparsify.SparseCoder(
        D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, **options)
    ).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=next(iter(options))):
        load_sae(tmp_path)


# ---- Llama Scope, as SAELens reads it, and chains


def test_we_read_llama_scope_as_saelens_does(x, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) / 2
        for name, shape in {
            "encoder.weight": (D_SAE, D_IN),
            "encoder.bias": (D_SAE,),
            "decoder.bias": (D_IN,),
        }.items()
    }
    atoms = torch.randn(D_IN, D_SAE, generator=generator)
    weights["decoder.weight"] = atoms / atoms.norm(dim=0)
    average = float(x.norm(dim=-1).mean())
    hyperparams = {
        "act_fn": "jumprelu",
        "jump_relu_threshold": 4.0,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": average, "out": average},
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_decoder_bias": True,
        "top_k": 50,
    }
    (tmp_path / "checkpoints").mkdir()
    save_file(weights, tmp_path / "checkpoints/final.safetensors")
    (tmp_path / "hyperparams.json").write_text(json.dumps(hyperparams))

    def local(repo_id, filename, subfolder="", force_download=False):
        return str(tmp_path / subfolder.removeprefix("it/") / filename.removeprefix("it/"))

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    config, state, _ = loaders.llama_scope_sae_huggingface_loader(
        "repo", "it", cfg_overrides={"dtype": "float32"}
    )
    theirs = lens.JumpReLUSAE(
        lens.JumpReLUSAEConfig(
            d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=config["apply_b_dec_to_input"]
        )
    )
    theirs.load_state_dict(state)
    theirs.fold_activation_norm_scaling_factor(D_IN**0.5 / average)
    acts = theirs.encode(x)
    sae = load_sae(tmp_path)
    assert sae.origin == Origin(None, "resid_post", 3, "jumprelu")
    torch.testing.assert_close(sae.threshold, torch.full((D_SAE,), 4.0))
    check(sae, x, theirs.decode(acts), acts, same_units=False)


def test_a_saelens_gated_goes_to_dictionary_learning(x, tmp_path):
    theirs = shaken(lens.GatedSAE(lens.GatedSAEConfig(d_in=D_IN, d_sae=D_SAE)))
    theirs.save_model(tmp_path / "lens")
    report = "\n".join(convert(tmp_path / "lens", tmp_path / "dl", "dictionary_learning"))
    assert "gate" in report and "d_in 12, d_sae 40" in report
    other, _ = load_dictionary(str(tmp_path / "dl"), device="cpu")
    assert isinstance(other, JumpReluAutoEncoder)
    assert_close(other(x), theirs(x))


def test_saebench_takes_our_saes():
    """Its checks of a custom SAE, and its sparse probing on activations of two classes, which needs
    no download."""
    bench = pytest.importorskip("sae_bench.custom_saes.base_sae")
    from sae_bench.custom_saes.custom_sae_config import CustomSAEConfig
    from sae_bench.evals.sparse_probing import probe_training as probing
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations

    sae = Trainee(
        D_IN,
        TrainConfig(d_sae=D_SAE, steps=1, threshold_init=0.1),
        torch.Generator().manual_seed(0),
    ).fold(1.0)
    sae.cfg = CustomSAEConfig(
        "none", d_in=D_IN, d_sae=D_SAE, hook_name="blocks.0.hook_resid_post", hook_layer=0
    )
    assert bench.BaseSAE.check_decoder_norms(sae)
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(1)
    classes = {}
    for part in ("train", "test"):
        rows = [
            0.3 * torch.randn(60, 7, D_IN, generator=generator) + 2 * sae.W_dec[latent]
            for latent in (3, 11)
        ]
        classes[part] = dict(zip(("one", "other"), rows, strict=True))
    meaned = {part: get_sae_meaned_activations(rows, sae, 16) for part, rows in classes.items()}
    torch.testing.assert_close(meaned["test"]["one"], sae.encode(classes["test"]["one"]).mean(1))
    (train, labels), (test, test_labels) = (
        probing.prepare_probe_data(meaned[part], "one") for part in ("train", "test")
    )
    mask = probing.get_top_k_mean_diff_mask(train, labels, k=1)
    chosen = [probing.apply_topk_mask_reduce_dim(part, mask) for part in (train, test)]
    _, accuracy = probing.train_sklearn_probe(chosen[0], labels, chosen[1], test_labels)
    assert accuracy > 0.95 and not mask.all()  # one latent tells the classes apart
