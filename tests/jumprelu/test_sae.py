"""The inference form: shapes, TopK, precision of θ, files, and every architecture folded into
it."""

import copy

import pytest
import torch

import jumprelu as jr
from jumprelu.architectures import Trainee
from jumprelu.recipe import SPARSITY_LOSSES, TrainConfig
from jumprelu.sae import SAE, Origin, Transcoder
from jumprelu.support import DENSE


def random_sae(d_in=6, d_sae=10, k=None, seed=0, **origin):
    g = torch.Generator().manual_seed(seed)
    return SAE(
        torch.randn(d_in, d_sae, generator=g),
        torch.randn(d_sae, generator=g),
        torch.randn(d_sae, d_in, generator=g),
        torch.randn(d_in, generator=g),
        torch.rand(d_sae, generator=g),
        k=k,
        origin=Origin(**origin),
    )


def test_encode_by_hand():
    sae = SAE(
        torch.eye(2),
        torch.tensor([0.0, 1.0]),
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.tensor([0.5, 0.0]),
        torch.tensor([0.3, 1.5]),
    )
    x = torch.tensor([[0.3, 0.5], [0.31, 0.6], [-1.0, -3.0]])
    # π = (x₁, x₂ + 1); a latent at its threshold is off
    expected = torch.tensor([[0.0, 0.0], [0.31, 1.6], [0.0, 0.0]])
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae(x), torch.tensor([[0.5, 0.0], [0.81, 3.2], [0.5, 0.0]]))


def test_topk_keeps_at_most_k_and_the_largest():
    sae = random_sae(d_sae=50, k=5)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    acts, pre = sae.encode(x), sae.preactivations(x)
    assert ((acts > 0).sum(-1) <= 5).all() and (acts > 0).sum(-1).max() == 5
    for row_acts, row_pre in zip(acts, (pre.relu() * (pre > sae.threshold)), strict=True):
        torch.testing.assert_close(
            row_acts.sort(descending=True).values[:5], row_pre.topk(5).values
        )


def test_threshold_stays_float32():
    sae = random_sae()
    exact = sae.threshold.clone()
    sae.to(torch.bfloat16)
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.threshold.dtype == torch.float32 and torch.equal(sae.threshold, exact)
    assert sae.encode(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16


def test_save_and_load(tmp_path):
    sae = random_sae(
        k=3, model_name="m", site="mlp_out", layer=2, input_scale=7.5, training={"lr": 1.0}
    )
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    assert loaded.origin == sae.origin and loaded.k == 3 and loaded.fingerprint == sae.fingerprint
    for name, tensor in sae.named_parameters():
        assert torch.equal(tensor, getattr(loaded, name))
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae.safetensors"]


def test_bad_files(tmp_path):
    sae, folder = random_sae(), tmp_path / "sae"
    with pytest.raises(FileNotFoundError, match="no SAE in"):
        SAE.load(tmp_path / "none")
    sae.save(folder)
    whole = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="damaged or cut off"):
        SAE.load(folder)
    (folder / "sae.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is not what cfg.json was written with"):
        SAE.load(folder)
    (folder / "sae.safetensors").write_bytes(whole)
    (folder / "cfg.json").write_text('{"format": 1,')
    with pytest.raises(ValueError, match="not valid JSON"):
        SAE.load(folder)
    (folder / "cfg.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        SAE.load(folder)
    torch.save({"a": torch.zeros(1)}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="pickle"):
        SAE.load(tmp_path / "ae.pt")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"threshold has shape \(3,\), expected \(10,\)"):
        SAE(torch.zeros(6, 10), torch.zeros(10), torch.zeros(10, 6), torch.zeros(6), torch.zeros(3))
    with pytest.raises(ValueError, match="width 5, this SAE expects d_in = 6"):
        random_sae().encode(torch.zeros(2, 5))


@pytest.mark.parametrize("architecture", SPARSITY_LOSSES)
def test_fold_equals_the_trainee(architecture):
    """A folded SAE on raw activations gives what the trainee gives on scaled ones, times the
    scale."""
    config = TrainConfig(architecture=architecture, d_sae=24, k=4, threshold_init=0.2)
    g = torch.Generator().manual_seed(0)
    trainee = Trainee(8, config, g).double().eval()
    for parameter in trainee.parameters():  # away from the special point of initialisation
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    if config.unit_norm_atoms:
        trainee.W_dec.data /= trainee.W_dec.data.norm(dim=-1, keepdim=True)
    x, scale = torch.randn(200, 8, generator=g, dtype=torch.float64), 37.0
    if architecture == "batchtopk":  # after training its threshold replaces the sort over the batch
        trainee.batch_threshold.fill_(0.5)
        pre = trainee(x, 1.0, DENSE).pre
        acts = pre * (pre > 0.5)
        expected = acts @ trainee.W_dec + trainee.b_dec
    else:
        expected = trainee(x, 1.0, DENSE).x_hat
        acts = trainee(x, 1.0, DENSE).acts
    sae = trainee.fold(scale).double()
    torch.testing.assert_close(sae(x * scale), expected * scale, rtol=1e-6, atol=1e-5)
    assert torch.equal(sae.encode(x * scale) > 0, acts > 0)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1).float(), torch.ones(24), rtol=1e-5, atol=0)


def test_public_names():
    assert all(hasattr(jr, name) for name in jr.__all__)


# ---- the sparse forms


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 99.0])
def test_sparse_encoding_is_the_dense_one(k, threshold):
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(20, 6, generator=g), dim=-1)
    b_enc, b_dec = torch.randn(20, generator=g) / 5, torch.randn(6, generator=g)
    sae = SAE(W_dec.T.clone(), b_enc, W_dec, b_dec, torch.full((20,), threshold), k)
    x = torch.randn(50, 6, generator=g)
    dense, sparse = sae.encode(x), sae.encode(x, sparse=True)
    assert (
        sparse.is_sparse
        and sparse.is_coalesced()
        and sparse.shape == (50, 20)
        and not sparse.requires_grad
    )
    torch.testing.assert_close(sparse.to_dense(), dense, rtol=1e-5, atol=1e-6)
    assert len(sparse.values()) == (dense > 0).sum() and (threshold == 99) == (
        len(sparse.values()) == 0
    )
    torch.testing.assert_close(sae.decode(sparse), sae.decode(dense), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            sae(x.view(5, 10, 6)), sae.decode(dense).view(5, 10, 6), rtol=1e-5, atol=1e-5
        )
        assert sae(x[:0]).shape == (0, 6)
        torch.testing.assert_close(sae(x[0]), sae.decode(dense)[0], rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    torch.testing.assert_close(
        half.encode(x.bfloat16(), sparse=True).to_dense(), half.encode(x.bfloat16())
    )
    with pytest.raises(ValueError, match=r"\[tokens, d_in\], got \(5, 10, 6\)"):
        sae.encode(x.view(5, 10, 6), sparse=True)


def test_gradients_pass_through_a_saved_form():
    sae = SAE(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), torch.full((3,), 0.5))
    x = torch.tensor([[1.0, 0.2, 2.0]], requires_grad=True)
    sae(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_what_needs_an_autoencoder_refuses_a_transcoder(tmp_path):
    from companion.rails import attribution
    from companion.reading import editing
    from companion.scope import rises
    from companion.ste import on_activations

    from jumprelu.activations import activations_from_tensor
    from jumprelu.corpus import Tokens
    from jumprelu.dark import darkmatter
    from jumprelu.exchange import formats
    from jumprelu.sae import Origin, Transcoder
    from tests.models import random_ids, tiny_lm

    lm, tokens = tiny_lm(), Tokens(random_ids(4, 8), torch.arange(4))
    d = lm.d_model
    coder = Transcoder(
        torch.randn(d, 20),
        torch.zeros(20),
        torch.randn(20, d),
        torch.zeros(d),
        torch.zeros(20),
        origin=Origin(site="mlp_in", layer=1),
    )
    acts = activations_from_tensor(torch.randn(40, d), tmp_path / "acts")
    coder.save(tmp_path / "coder")
    for use in (
        lambda: rises.token_rises(lm, tokens, {"it": coder}),
        lambda: attribution.token_uniformity(coder, lm, tokens),
        lambda: on_activations.normalised(coder),
        lambda: editing.editing_table(lm, {"it": [coder]}, tokens),
        lambda: darkmatter.decompose(acts, {"it": coder}, darkmatter.split(acts)),
        lambda: formats.examine(tmp_path / "coder"),
        lambda: formats.write(coder, tmp_path / "other", "saelens"),
    ):
        with pytest.raises(ValueError, match="a transcoder"):
            use()


def test_device_and_dtype_are_those_of_the_weights():
    sae = jr.SAE(*[torch.zeros(s) for s in ((4, 6), (6,), (6, 4), (4,), (6,))])
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    assert sae.bfloat16().dtype == torch.bfloat16 and sae.threshold.dtype == torch.float32


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float64])
def test_activations_of_another_type_are_cast(given, grad, k):
    """Latents and reconstruction have the type of the SAE, whatever the type of x."""
    sae = random_sae(k=k)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)).to(given)
    with torch.set_grad_enabled(grad):
        for found, expected in (
            (sae(x), sae(x.float())),
            (sae.encode(x), sae.encode(x.float())),
            (sae.encode(x, sparse=True).to_dense(), sae.encode(x.float(), sparse=True).to_dense()),
        ):
            assert found.dtype == torch.float32 and torch.equal(found, expected)
        half = copy.deepcopy(sae).bfloat16()
        assert half(x).dtype == half.encode(x).dtype == torch.bfloat16


def test_a_transcoder_casts_too():
    plain = random_sae(d_sae=10)
    coder = Transcoder(*plain.parameters(), W_skip=torch.eye(6))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.testing.assert_close(coder(x), plain(x) + x.float())


def test_arrays_take_a_gradient_only_when_asked():
    sae = random_sae()
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    x = torch.randn(4, 6)
    assert not sae(x).requires_grad
    sae.requires_grad_()
    sae(x).sum().backward()
    assert sae.W_dec.grad.abs().sum() > 0 and not sae.double().threshold.grad
