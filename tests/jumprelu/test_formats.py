"""Files of other libraries, made by hand from their definitions; against the libraries themselves:
test_peer_formats.py."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

import jumprelu as jr
from jumprelu.__main__ import main
from jumprelu.architectures import Trainee
from jumprelu.exchange import gemma_scope, peers
from jumprelu.exchange.convert import convert, difference
from jumprelu.exchange.formats import FORMATS, examine, recognise, write
from jumprelu.exchange.parts import Parts, fold, kind_of
from jumprelu.recipe import TrainConfig
from jumprelu.sae import SAE, Origin, Transcoder


def read(folder, format=None):
    return examine(folder, format).sae


ARCHITECTURES = ("jumprelu", "relu", "gated", "topk", "batchtopk")
D, F, K = 6, 16, 4
HERE = {"layer": 2, "lm_name": "gpt2", "submodule_name": "resid_post_layer_2"}
SITE = {"hook_point_in": "blocks.2.hook_resid_post", "hook_point_out": "blocks.2.hook_resid_post"}
WRITTEN = [name for name, each in FORMATS.items() if each.write]


@pytest.fixture(autouse=True)
def no_gradient():
    with torch.no_grad():
        yield


@pytest.fixture
def x():
    return 2 * torch.randn(100, D, generator=torch.Generator().manual_seed(9)) + 1


def draw(**shapes):
    """Random tensors, half as large as normal."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}


def ours(architecture):
    """What training ends with, from random parameters."""
    trainee = Trainee(D, TrainConfig(architecture, F, k=K))
    for name, tensor in draw(
        **{name: tuple(each.shape) for name, each in trainee.named_parameters()}
    ).items():
        dict(trainee.named_parameters())[name].data.copy_(tensor)
    if architecture == "batchtopk":
        trainee.batch_threshold.fill_(0.4)
    return trainee.fold(3.5, model_name="gpt2", site="resid_post", layer=2)


def assert_same(one, two, tolerance=1e-6):
    assert ((one - two).norm(dim=-1) <= tolerance * two.norm(dim=-1).clamp_min(1e-3)).all() and (
        one != 0
    ).any()


def put_saelens(folder, arrays, architecture, **config):
    about = {
        "sae_lens_version": "6.54.12",
        "model_name": "gpt2",
        "hook_name": "blocks.2.hook_mlp_out",
    }
    config = {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "architecture": architecture,
        "metadata": about,
    } | config
    return put(folder, "cfg.json", config, "sae_weights.safetensors", arrays)


def put_dictionary(folder, arrays, kind, **trainer):
    config = {
        "trainer": {"dict_class": kind, "activation_dim": D, "dict_size": F} | HERE | trainer,
        "buffer": {},
    }
    put(folder, "config.json", config, None, {})
    torch.save(arrays, folder / "ae.pt")
    return folder


def put(folder, config_name, config, weights_name, arrays):
    (folder / (weights_name or "x")).parent.mkdir(parents=True, exist_ok=True)
    (folder / config_name).write_text(json.dumps(config))
    if weights_name:
        save_file(
            {name: tensor.contiguous() for name, tensor in arrays.items()}, folder / weights_name
        )
    return folder


def top(pre, k):
    values, index = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, index, values)


def check(sae, acts, x_hat, x, factor):
    """`sae` gives x̂, and the activations of the definition times `factor`: most often the norms of
    the atoms."""
    assert 0.05 < (acts > 0).float().mean() < 0.95
    assert_same(sae(x), x_hat, 1e-5)
    assert_same(sae.encode(x), acts * factor, 1e-5)


# ---- SAELens


@pytest.mark.parametrize("minus", [0, 1])
@pytest.mark.parametrize(
    "kind", ["standard", "jumprelu", "log_threshold", "gated", "topk", "topk by norm", "batchtopk"]
)
def test_saelens(kind, minus, x, tmp_path):
    w = draw(W_enc=(D, F), W_dec=(F, D), b_enc=(F,), b_dec=(D,))
    norm = w["W_dec"].norm(dim=-1)
    linear = (x - minus * w["b_dec"]) @ w["W_enc"]
    pre, options, factor = linear + w["b_enc"], {}, norm
    acts = pre.relu()
    if kind == "jumprelu":
        w |= draw(threshold=F)  # of both signs
        acts = acts * (pre > w["threshold"])
    elif kind == "log_threshold":  # checkpoints of SAELens before its PR 718
        w |= draw(log_threshold=F)
        acts = acts * (pre > w["log_threshold"].exp())
    elif kind == "gated":
        del w["b_enc"]
        w |= draw(r_mag=F, b_gate=F, b_mag=F)
        acts = (linear + w["b_gate"] > 0) * (linear * w["r_mag"].exp() + w["b_mag"]).relu()
    elif kind == "topk":
        acts, options, factor = top(acts, K), {"k": K}, 1.0
    elif kind == "topk by norm":
        acts, options, factor = (
            top(acts * norm, K) / norm,
            {"k": K, "rescale_acts_by_decoder_norm": True},
            norm,
        )
    elif kind == "batchtopk":
        w["topk_threshold"] = torch.tensor(0.3, dtype=torch.float64)
        acts, options = acts * (acts * norm > 0.3), {"k": 3.5, "rescale_acts_by_decoder_norm": True}
    architecture = {"log_threshold": "jumprelu", "topk by norm": "topk"}.get(kind, kind)
    put_saelens(tmp_path, w, architecture, apply_b_dec_to_input=bool(minus), **options)
    reading = examine(tmp_path)
    check(reading.sae, acts, acts @ w["W_dec"] + w["b_dec"], x, factor)
    notes = " ".join(reading.notes)
    assert ("bias subtracted" in notes) == bool(minus) and ("keep their norms" in notes) == (
        kind == "topk"
    )
    name = {"standard": "relu"}.get(architecture, architecture)
    assert reading.format == "saelens" and reading.sae.origin == Origin("gpt2", "mlp_out", 2, name)


def test_the_input_scale_of_saelens(x, tmp_path):
    w = draw(W_enc=(D, F), W_dec=(F, D), b_enc=(F,), b_dec=(D,), threshold=F)
    put_saelens(
        tmp_path,
        w,
        "jumprelu",
        apply_b_dec_to_input=True,
        normalize_activations="expected_average_only_in",
    )
    with pytest.raises(ValueError, match=r"E‖x‖ = √d_in.*activation_scaler.json"):
        read(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(
        '{"scaling_factor": 0.4, "has_whitening": false}'
    )
    pre = (0.4 * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = pre.relu() * (pre > w["threshold"])
    check(
        read(tmp_path),
        acts,
        (acts @ w["W_dec"] + w["b_dec"]) / 0.4,
        x,
        w["W_dec"].norm(dim=-1) / 0.4,
    )
    assert any("divided by 2.5" in note for note in examine(tmp_path).notes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "layer_norm.*cannot be folded"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"architecture": "transcoder"}, "transcoder.*expected standard"),
        ({"metadata": {"sae_lens_version": "5.11.0"}}, "5.11.0.*save_model"),
        ({"metadata": {}}, "before 6"),
        ({"d_sae": F + 1}, "copy both again"),
    ],
)
def test_a_saelens_that_is_refused(changed, message, tmp_path):
    put_saelens(
        tmp_path,
        draw(W_enc=(D, F), W_dec=(F, D), b_enc=(F,), b_dec=(D,)),
        **({"architecture": "standard"} | changed),
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


# ---- dictionary_learning and sparsify


@pytest.mark.parametrize("kind", peers.CLASSES)
def test_dictionary_learning(kind, x, tmp_path):
    w = draw(E=(F, D), b=(F,), A=(D, F), c=(D,), theta=F, r_mag=F, gate=F)
    E, b, A, c, theta = (w[name] for name in ("E", "b", "A", "c", "theta"))
    norm = factor = A.norm(dim=0)
    linear = {"encoder.weight": E, "encoder.bias": b, "decoder.weight": A}
    minus = kind not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    pre = (x - minus * c) @ E.T + b
    acts = pre.relu()
    if kind == "AutoEncoder":
        arrays = linear | {"bias": c}
    elif kind == "AutoEncoderNew":
        arrays = linear | {"decoder.bias": c}
    elif kind == "GatedAutoEncoder":
        arrays = {
            "encoder.weight": E,
            "decoder.weight": A,
            "decoder_bias": c,
            "r_mag": w["r_mag"],
            "gate_bias": w["gate"],
            "mag_bias": b,
        }
        acts = ((x - c) @ E.T * w["r_mag"].exp() + b).relu() * ((x - c) @ E.T + w["gate"] > 0)
    elif kind == "JumpReluAutoEncoder":
        arrays = {"W_enc": E.T, "b_enc": b, "W_dec": A.T, "b_dec": c, "threshold": theta}
        acts = (pre * (pre > theta)).relu()
    elif kind == "AutoEncoderTopK":
        arrays = linear | {
            "b_dec": c,
            "k": torch.tensor(K, dtype=torch.int),
            "threshold": torch.tensor(0.1),
        }
        acts, factor = top(acts, K), 1.0
    elif kind == "BatchTopKSAE":
        arrays = linear | {"b_dec": c, "k": torch.tensor(K), "threshold": torch.tensor(0.3)}
        acts = acts * (acts > 0.3)
    else:
        arrays = {
            "W_enc": E.T,
            "b_enc": b,
            "W_dec": A.T,
            "b_dec": c,
            "threshold": torch.tensor(-1.0),
            "k": torch.tensor(K),
            "group_sizes": torch.tensor([4, 12]),
        }
    put_dictionary(tmp_path, arrays, kind, k=K)
    sae = read(tmp_path)
    check(sae, acts, acts @ A.T + c, x, factor)
    assert sae.origin == Origin("gpt2", "resid_post", 2, peers.CLASSES[kind][0])
    assert torch.allclose(sae.W_dec.norm(dim=-1), norm if sae.k else torch.ones(F))


def test_a_class_that_dictionary_learning_does_not_have(tmp_path):
    put_dictionary(tmp_path, draw(W_enc=(D, F)), "CrossCoder")
    with pytest.raises(ValueError, match=r"CrossCoder.*expected one of JumpReluAutoEncoder"):
        read(tmp_path)


def put_sparsify(folder, **config):
    w = draw(**{"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)})
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "num_latents": 0,
        "k": K,
        "d_in": D,
    } | config
    put(folder, "cfg.json", config, "sae.safetensors", w)
    return w


def test_sparsify(x, tmp_path):
    w = put_sparsify(tmp_path / "layers.5")
    acts = top(((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu(), K)
    sae = read(tmp_path / "layers.5")
    check(sae, acts, acts @ w["W_dec"] + w["b_dec"], x, 1.0)
    assert sae.k == K and sae.origin == Origin(None, "resid_post", 5, "topk")


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation", "groupmax"), ("transcode", True), ("skip_connection", True), ("signed", True)],
)
def test_a_sparsify_that_is_refused(name, value, tmp_path):
    put_sparsify(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=f"{name} = .*cannot hold"):
        read(tmp_path)


# ---- Llama Scope and Llamascopium


def openmoss(**config):
    return (
        {
            "d_model": D,
            "expansion_factor": F / D,
            "act_fn": "jumprelu",
            "norm_activation": "dataset-wise",
            "top_k": K,
            "sparsity_include_decoder_norm": True,
        }
        | SITE
        | config
    )


@pytest.mark.parametrize("by_norm", [True, False])
def test_llama_scope(by_norm, x, tmp_path):
    """θ is in raw units: the library folds the input scale into the weights before it finds θ
    (SAELens reads it so, too)."""
    w = draw(
        **{
            "encoder.weight": (F, D),
            "encoder.bias": (F,),
            "decoder.weight": (D, F),
            "decoder.bias": (D,),
        }
    )
    config = openmoss(
        d_sae=F,
        jump_relu_threshold=1.5,
        dataset_average_activation_norm={"in": 5.0, "out": 5.0},
        sparsity_include_decoder_norm=by_norm,
    )
    put(tmp_path, "hyperparams.json", config, "checkpoints/final.safetensors", w)
    norm, s = w["decoder.weight"].norm(dim=0), 5 / D**0.5
    pre = x @ w["encoder.weight"].T + s * w["encoder.bias"]
    acts = pre.relu() * (pre * (norm if by_norm else 1) > 1.5)
    sae = read(tmp_path)
    check(sae, acts, acts @ w["decoder.weight"].T + s * w["decoder.bias"], x, norm)
    assert sae.origin == Origin(None, "resid_post", 2, "jumprelu")
    if by_norm:
        torch.testing.assert_close(sae.threshold, torch.full((F,), 1.5))


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_llamascopium(kind, by_norm, old_names, x, tmp_path):
    w = draw(W_E=(D, F), b_E=(F,), W_D=(F, D), b_D=(D,), log=F)
    norm, s, log = w["W_D"].norm(dim=-1), 5 / D**0.5, w.pop("log")
    pre = x / s @ w["W_E"] + w["b_E"]
    seen = pre * norm if by_norm else pre
    acts = {
        "relu": seen.relu(),
        "jumprelu": seen * (seen > log.exp()),
        "topk": top(seen.relu(), K),
    }[kind]
    acts = acts / norm if by_norm else acts
    x_hat = s * (acts @ w["W_D"] + w["b_D"])
    threshold = (
        "log_jumprelu_threshold" if old_names else "activation_function.log_jumprelu_threshold"
    )
    if old_names:
        w = {
            "encoder.weight": w["W_E"].T,
            "encoder.bias": w["b_E"],
            "decoder.weight": w["W_D"].T,
            "decoder.bias": w["b_D"],
        }
    w |= {
        f"dataset_average_activation_norm.{SITE['hook_point_in']}": torch.tensor(5.0),
        threshold: log,
    }
    put(
        tmp_path,
        "config.json",
        openmoss(act_fn=kind, sparsity_include_decoder_norm=by_norm),
        "sae_weights.safetensors",
        w,
    )
    check(read(tmp_path), acts, x_hat, x, s if kind == "topk" and not by_norm else s * norm)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"act_fn": "batchtopk"}, "batchtopk.*over a batch"),
        ({"use_glu_encoder": True}, "GLU"),
        ({"norm_activation": "token-wise"}, "token-wise.*differs by input"),
        ({"sae_type": "clt"}, "sae_type = 'clt'"),
        ({"hook_point_out": "blocks.2.hook_mlp_out"}, "transcoder"),
        ({}, "dataset_average_activation_norm"),
    ],
)
def test_a_llamascopium_that_is_refused(changed, message, tmp_path):
    w = draw(W_E=(D, F), b_E=(F,), W_D=(F, D), b_D=(D,))
    put(
        tmp_path,
        "config.json",
        openmoss(**({"act_fn": "relu"} | changed)),
        "sae_weights.safetensors",
        w,
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_llamascopium_of_inference_and_without_a_bias(x, tmp_path):
    w = draw(W_E=(D, F), b_E=(F,), W_D=(F, D))
    put(
        tmp_path,
        "config.json",
        openmoss(act_fn="relu", norm_activation="inference"),
        "sae_weights.safetensors",
        w,
    )
    acts = (x @ w["W_E"] + w["b_E"]).relu()
    check(read(tmp_path), acts, acts @ w["W_D"], x, w["W_D"].norm(dim=-1))


# ---- the fold


def test_fold_by_hand():
    atoms = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    parts = Parts(
        torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 3.0]]),
        torch.tensor([1.0, 2.0, 3.0]),
        atoms,
        torch.ones(2),
        threshold=torch.tensor([0.5, 0.5, -4.0]),
        b_in=torch.tensor([1.0, 2.0]),
        scale=10.0,
    )
    sae, notes = fold(parts)
    # n = 2, 1 (an atom that is zero), 1; b_enc − b_in W_enc = 0, −1, −3
    torch.testing.assert_close(sae.W_enc, torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]))
    torch.testing.assert_close(sae.b_enc, torch.tensor([0.0, -10.0, -30.0]))
    torch.testing.assert_close(sae.threshold, torch.tensor([10.0, 5.0, 0.0]))
    torch.testing.assert_close(sae.W_dec, torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(sae.b_dec, torch.tensor([10.0, 10.0]))
    assert len(notes) == 4 and "1 negative" in notes[-1]


def test_nothing_to_fold_is_left_to_the_bit():
    sae = ours("jumprelu")
    again, notes = fold(Parts(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold))
    assert notes == () and all(
        torch.equal(mine, getattr(again, name)) for name, mine in sae.named_parameters()
    )


def test_a_gate_is_a_threshold_of_the_magnitude(tmp_path):
    """One latent on a line: the gate opens at x > −b_gate, the magnitude at x > −b_mag/e^r; what
    comes later decides."""
    for gate, magnitude, r, opens in [(-2.0, 1.0, 0.5, 2.0), (3.0, 1.0, 0.5, -(2.718281828**-0.5))]:
        w = {
            "W_enc": torch.ones(1, 1),
            "W_dec": torch.ones(1, 1),
            "b_dec": torch.zeros(1),
            "r_mag": torch.tensor([r]),
            "b_gate": torch.tensor([gate]),
            "b_mag": torch.tensor([magnitude]),
        }
        sae = read(put_saelens(tmp_path, w, "gated", d_in=1, d_sae=1))
        assert sae.threshold.item() == pytest.approx(
            max(0.0, magnitude - 2.718281828**r * gate), rel=1e-6
        )
        x = torch.tensor([[opens - 0.01], [opens + 0.01]])
        assert (sae.encode(x) > 0).flatten().tolist() == [False, True]
        assert sae.encode(x)[1].item() == pytest.approx(
            (opens + 0.01) * 2.718281828**r + magnitude, rel=1e-4
        )


# ---- writing


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_round_trip(architecture, format, x, tmp_path):
    sae = ours(architecture)
    if kind_of(sae) not in FORMATS[format].holds:
        with pytest.raises(
            ValueError,
            match=f"{format} has no {kind_of(sae)} SAE: choose one of jumprelu, saelens",
        ):
            write(sae, tmp_path / "sae", format)
        assert not (tmp_path / "sae").exists()
        return
    write(sae, tmp_path / "sae", format)
    assert recognise(tmp_path / "sae") == format
    again = read(tmp_path / "sae")
    assert_same(again.encode(x), sae.encode(x))
    assert_same(again(x), sae(x))
    assert again.k == sae.k
    if format != "gemma_scope":
        assert again.origin == sae.origin


def test_what_no_format_holds(tmp_path):
    sae = ours("topk")
    sae.threshold.data += 0.1
    for format in ("saelens", "dictionary_learning", "sparsify"):
        with pytest.raises(
            ValueError, match="has no topk with thresholds SAE: choose one of jumprelu$"
        ):
            write(sae, tmp_path, format)
    with pytest.raises(
        ValueError, match="llama_scope is only read: write one of jumprelu, saelens"
    ):
        write(sae, tmp_path, "llama_scope")
    with pytest.raises(ValueError, match="unknown format 'onnx': expected one of jumprelu"):
        write(sae, tmp_path, "onnx")
    write(sae, tmp_path, "jumprelu")
    assert read(tmp_path).k == K and kind_of(read(tmp_path)) == "topk with thresholds"


def test_a_transcoder_is_no_sae(tmp_path):
    sae = ours("jumprelu")
    gemma_scope.save_gemma_scope(
        Transcoder(**dict(sae.named_parameters()), W_skip=torch.eye(D)), tmp_path
    )
    with pytest.raises(ValueError, match="this is a transcoder"):
        read(tmp_path)
    with pytest.raises(ValueError, match="a transcoder is no SAE"):
        write(jr.load_sae(tmp_path), tmp_path / "new", "saelens")


def test_another_precision_is_written_as_float32(x, tmp_path):
    sae = ours("jumprelu").to(torch.bfloat16)
    write(sae, tmp_path, "saelens")
    again = read(tmp_path)
    assert again.W_enc.dtype == torch.float32
    assert_same(again(x), sae.float()(x))


# ---- bad files


def test_which_format(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="no such folder; expected one of jumprelu: cfg.json and sae.safetensors",
    ):
        read(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="found .*notes.txt"):
        read(tmp_path)
    write(ours("jumprelu"), tmp_path, "saelens")
    with pytest.raises(
        FileNotFoundError, match="no config.json and no ae.pt, which a dictionary_learning SAE has"
    ):
        read(tmp_path, "dictionary_learning")
    write(ours("jumprelu"), tmp_path / "two", "saelens")
    write(ours("jumprelu"), tmp_path / "two", "dictionary_learning")
    with pytest.raises(
        ValueError, match="looks like saelens and dictionary_learning and llamascopium: say which"
    ):
        read(tmp_path / "two")
    assert_same(
        read(tmp_path / "two/ae.pt", "dictionary_learning").W_enc, ours("jumprelu").W_enc
    )  # a file means its folder


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("saelens", "sae_weights.safetensors"),
        ("sparsify", "sae.safetensors"),
        ("dictionary_learning", "ae.pt"),
        ("saelens", "cfg.json"),
        ("dictionary_learning", "config.json"),
    ],
)
def test_a_file_that_was_cut_off(format, name, tmp_path):
    write(ours("topk"), tmp_path, format)
    whole = (tmp_path / name).read_bytes()
    for size in (len(whole) // 2, len(whole) - 20, 3, 0):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=name):
            read(tmp_path)


def test_a_missing_array_is_named(tmp_path):
    put_saelens(tmp_path / "a", draw(W_enc=(D, F), W_dec=(F, D), b_dec=(D,), b_enc=F), "jumprelu")
    put_saelens(tmp_path / "b", draw(W_enc=(D, F), W_dec=(F, D), b_dec=(D,)), "standard")
    put_dictionary(
        tmp_path / "c",
        draw(**{"encoder.weight": (F, D), "encoder.bias": F, "decoder.weight": (D, F)}),
        "AutoEncoder",
    )
    for folder, name in {"a": "threshold", "b": "b_enc", "c": "bias"}.items():
        with pytest.raises(ValueError, match=f"has no '{name}'"):
            read(tmp_path / folder)
    (tmp_path / "a/cfg.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        read(tmp_path / "a", "saelens")


class Hostile:
    """Unpickled by `pickle`, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(tmp_path):
    trap = tmp_path / "trap"
    folder = put_dictionary(
        tmp_path / "sae", {"W_enc": torch.zeros(D, F), "k": Hostile(trap)}, "JumpReluAutoEncoder"
    )
    with pytest.raises(ValueError, match="ae.pt is refused: .*could run code"):
        read(folder)
    (folder / "ae.pt").write_bytes(pickle.dumps(Hostile(trap), protocol=2))  # not of torch.save
    with pytest.raises(ValueError, match="ae.pt is refused"):
        read(folder)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Hostile(trap)))
    assert trap.exists()  # it would have done so
    for other in (torch.zeros(3), {"W_enc": 1.0}):
        torch.save(other, folder / "ae.pt")
        with pytest.raises(ValueError, match="no dictionary of tensors"):
            read(folder)


# ---- convert


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_a_chain_of_conversions_ends_where_it_began(architecture, x, tmp_path):
    sae = ours(architecture)
    sae.save(tmp_path / "0")
    chain = [
        name for name in WRITTEN if kind_of(sae) in FORMATS[name].holds and name != "gemma_scope"
    ]
    for step, format in enumerate([*chain, "jumprelu"]):
        convert(tmp_path / str(step), tmp_path / str(step + 1), format)
    again = read(tmp_path / str(len(chain) + 1), "jumprelu")
    assert_same(again(x), sae(x))
    assert again.origin == sae.origin


def test_the_command(tmp_path, capsys):
    put_saelens(
        tmp_path / "from",
        draw(W_enc=(D, F), W_dec=(F, D), b_enc=F, b_dec=D, threshold=F),
        "jumprelu",
        apply_b_dec_to_input=True,
    )
    (tmp_path / "to").mkdir()
    assert (
        main(
            [
                "convert",
                str(tmp_path / "from"),
                str(tmp_path / "to"),
                "--to",
                "dictionary_learning",
                "--from",
                "saelens",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert (
        f"saelens, jumprelu, d_in {D}, d_sae {F}" in shown
        and "moved into b_enc" in shown
        and "brought to 1" in shown
    )
    assert "largest relative difference" in shown
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["ae.pt", "config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]


def test_the_command_refuses(tmp_path, capsys):
    ours("jumprelu").save(tmp_path / "sae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")

    def refused(*arguments):
        source, target, *options = arguments
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), *options]) == 2
        return capsys.readouterr().err

    assert "full has something in it" in refused("sae", "full", "--to", "saelens")
    assert "sparsify has no jumprelu SAE" in refused("sae", "new", "--to", "sparsify")
    assert "no such folder" in refused("nothing", "new", "--to", "saelens")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "sae"]
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    with pytest.raises(SystemExit) as stop:
        main(["convert", "a", "b", "--to", "llama_scope"])
    assert stop.value.code == 2


def test_a_copy_that_differs_is_not_kept(tmp_path, monkeypatch):
    sae = ours("jumprelu")
    sae.save(tmp_path / "sae")

    def careless(sae, folder):
        other = SAE(
            sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold * 1.1, origin=sae.origin
        )
        return peers.write_saelens(other, folder)

    monkeypatch.setitem(FORMATS, "saelens", FORMATS["saelens"]._replace(write=careless))
    with pytest.raises(ValueError, match=r"differs by 0\.1, relative.*not kept"):
        convert(tmp_path / "sae", tmp_path / "copy", "saelens")
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]
    nan = SAE(sae.W_enc * float("nan"), sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)
    nan.save(tmp_path / "nan")
    with pytest.raises(ValueError, match="may not be finite"):
        convert(tmp_path / "nan", tmp_path / "copy", "dictionary_learning")


def test_difference_by_hand():
    one = ours("jumprelu")
    arrays = dict(one.named_parameters())

    def changed(k=None, **factor):
        return SAE(**{name: tensor * factor.get(name, 1) for name, tensor in arrays.items()}, k=k)

    assert difference(one, changed()) == {"encode": 0, "decode": 0}
    found = difference(one, changed(W_enc=1.01, b_enc=1.01))
    assert found == {"encode": pytest.approx(0.01, rel=1e-3), "decode": 0}
    found = difference(one, changed(W_dec=0.99, b_dec=0.99))
    assert found == {"encode": 0, "decode": pytest.approx(0.01, rel=1e-3)}
    assert difference(one, changed(threshold=0.98))["encode"] == pytest.approx(0.02, rel=1e-3)
    assert difference(one, changed(k=3))["encode"] == float("inf")
    with pytest.raises(ValueError, match="cannot be compared"):
        difference(
            one, SAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
        )
