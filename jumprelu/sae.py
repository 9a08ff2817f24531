"""The sparse autoencoder as it is used: five arrays, raw activations in, raw activations out.

    π(x) = x W_enc + b_enc        f(x) = π ⊙ H(π − θ)₊        x̂ = f W_dec + b_dec

Every architecture ends in this form: ReLU has θ = 0; Gated, whose encoders are tied, is a JumpReLU
(derived in `Trainee.fold`); BatchTopK has one threshold for all latents; TopK keeps `k` besides.
Nothing has to be normalised to use an SAE. Atoms (rows of W_dec) have norm 1 in SAEs trained here,
and nearly so in released ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .files import digest, read_json, sha256, tensor_digest, write_json, write_tensors
from .sparse import POLICY, SparsePolicy, fast_dtype, largest, screen
from .support import Support

FORMAT = 1
WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle"}


class Origin(NamedTuple):
    """Where an SAE's activations come from, and how it was trained; remembered in its file."""

    model_name: str | None = None
    site: str | None = None
    layer: int | None = None
    architecture: str = "jumprelu"
    input_scale: float = 1.0
    """√E‖x‖² of the training activations (a transcoder's: of what it predicts): θ/input_scale and
    f/input_scale are in the paper's units."""
    training: dict[str, Any] | None = None
    """The TrainConfig, as a dictionary; of a released SAE, {"released_as": its path}."""


class SAE(torch.nn.Module):
    """A trained sparse autoencoder.

    W_enc: [d_in, d_sae]; b_enc: [d_sae]; W_dec: [d_sae, d_in]; b_dec: [d_in]; threshold: [d_sae], θ
    ≥ 0, always float32 whatever the rest is cast to (bf16 would round small differences away). k:
    for TopK, the number of latents kept. ValueError when the shapes do not belong together.

    Activations of any floating type go in; latents and reconstructions have the type of the arrays,
    :attr:`dtype`. The arrays take no gradient until `requires_grad_()` asks for it; a gradient
    reaches x in any case.
    """

    policy: SparsePolicy = POLICY
    """How active latents are looked for."""

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        k: int | None = None,
        origin: Origin | None = None,
    ):
        super().__init__()
        d_in, d_sae = W_enc.shape
        for name, tensor, shape in (
            ("W_enc", W_enc, (d_in, d_sae)),
            ("b_enc", b_enc, (d_sae,)),
            ("W_dec", W_dec, (d_sae, d_in)),
            ("b_dec", b_dec, (d_in,)),
            ("threshold", threshold, (d_sae,)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {shape} to go with W_enc "
                    f"[d_in, d_sae] = {(d_in, d_sae)}"
                )
            self.register_parameter(name, _constant(tensor))
        self.W_enc.data = self.W_enc.data.T.contiguous().T  # in memory latent by latent, as W_dec
        self.threshold.data = self.threshold.data.float()
        self.k, self.origin = k, origin or Origin()

    def _apply(self, fn, recurse=True):
        threshold = self.threshold.data
        super()._apply(fn, recurse)
        self.threshold.data = threshold.to(self.threshold.device)  # moved, never cast
        return self

    d_in = property(lambda self: self.W_enc.shape[0])
    d_sae = property(lambda self: self.W_enc.shape[1])
    device = property(lambda self: self.W_enc.device)
    dtype = property(lambda self: self.W_enc.dtype, doc="Of all arrays but `threshold`.")
    input_scale = property(lambda self: self.origin.input_scale)

    @property
    def fingerprint(self) -> str:
        """Digest of the weights and their origin."""
        arrays = tensor_digest(dict(self.named_parameters()))
        return digest(type(self).__name__, arrays, self.k, self.origin._asdict())

    def preactivations(self, x: Tensor) -> Tensor:
        """π(x), [..., d_sae]; x: raw activations [..., d_in]. ValueError for another width."""
        return self._checked(x) @ self.W_enc + self.b_enc

    def _checked(self, x: Tensor) -> Tensor:
        """x in the type of the arrays."""
        if x.shape[-1] != self.d_in:
            raise ValueError(
                f"activations have width {x.shape[-1]}, this SAE expects d_in = {self.d_in} "
                f"({self.extra_repr()})"
            )
        return x.to(self.dtype)

    def encode(self, x: Tensor, sparse: bool = False) -> Tensor:
        """f(x) ≥ 0, shape [..., d_sae]; x: raw activations [..., d_in].

        sparse: return a sparse COO tensor, coalesced, without a gradient; x is [tokens, d_in] then,
        else ValueError. On a CPU, and on a GPU with Triton, the dense matrix is never formed.
        """
        if sparse:
            if x.ndim != 2:
                raise ValueError(
                    f"sparse encoding takes [tokens, d_in], got {tuple(x.shape)}: flatten(0, -2)"
                )
            with torch.no_grad():
                support = self._support(x, limit=1.0)
                return self.encode(x).to_sparse() if support is None else _as_coo(support)
        pre = self.preactivations(x)
        acts = pre.relu() * (pre.float() > self.threshold)
        if self.k is None:
            return acts
        values, index = acts.topk(self.k, dim=-1)
        return torch.zeros_like(acts).scatter(-1, index, values)

    def decode(self, acts: Tensor) -> Tensor:
        """x̂, [..., d_in]; acts: [..., d_sae], or the sparse tensor that :meth:`encode` gives."""
        if not acts.is_sparse:
            return acts @ self.W_dec + self.b_dec
        (token, latent), values = acts.indices(), acts.values().to(self.dtype)
        start = torch.searchsorted(token, torch.arange(len(acts) + 1, device=token.device))
        options = {"mode": "sum", "include_last_offset": True, "per_sample_weights": values}
        x_hat = torch.nn.functional.embedding_bag(latent, self.W_dec, start, **options)
        return x_hat + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """x̂(x), raw activations to raw reconstruction, [..., d_in]. Within `torch.no_grad()` only
        active latents are computed, if they are few: the same to rounding, and faster."""
        if not torch.is_grad_enabled():
            support = self._support(x.reshape(-1, x.shape[-1]), self.policy.dense_above)
            if support is not None:
                return (support.decode(support.pre, self.W_dec) + self.b_dec).view(x.shape)
        return self.decode(self.encode(x))

    def _support(self, x: Tensor, limit: float) -> Support | None:
        """What is active on x: [tokens, d_in]; None where dense arithmetic is used instead."""
        x = self._checked(x)
        if not self.policy.usable(x) or x.dtype != torch.float32 or not len(x):
            return None
        if self.k is None:
            options = fast_dtype(x.device), limit, self.policy
            return screen(x, self.W_enc, self.b_enc, self.threshold, *options)
        support = largest(x, self.W_enc, self.b_enc, self.k, policy=self.policy)
        return support.take((support.pre > support.at(self.threshold)).nonzero().squeeze(-1))

    def save(self, folder: str | Path) -> Path:
        """Write `sae.safetensors` and `cfg.json` to `folder`; returns it."""
        folder = Path(folder)
        write_tensors(folder / WEIGHTS, dict(self.named_parameters()))
        config = {"format": FORMAT, "kind": type(self).__name__, "sha256": sha256(folder / WEIGHTS)}
        config |= {"d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
        write_json(folder / CONFIG, config | self.origin._asdict())
        return folder

    @staticmethod
    def load(
        folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> SAE:
        """Read what :meth:`SAE.save` wrote, an SAE or a transcoder.

        Raises FileNotFoundError where there is none, ValueError for a pickle (never opened), a file
        that was cut off, and weights that their configuration was not written with.
        """
        folder = Path(folder)
        if folder.is_file() and folder.suffix in PICKLES:
            raise ValueError(
                f"{folder} is a pickle, which can run code when it is opened: convert it where it "
                f"came from to a folder with {WEIGHTS} and {CONFIG}"
            )
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"no SAE in {folder}: expected {' and '.join(missing)}")
        config = read_json(folder / CONFIG)
        form, kind = config.get("format"), config.get("kind", SAE.__name__)
        if form != FORMAT or kind not in KINDS:
            raise ValueError(
                f"{folder / CONFIG} is a {kind} of format {form!r}, this version reads format "
                f"{FORMAT} of {' and '.join(KINDS)}: save it again with a matching version"
            )
        try:
            tensors = load_file(folder / WEIGHTS, device=str(device))
        except SafetensorError as error:
            raise ValueError(
                f"{folder / WEIGHTS} is damaged or cut off ({error}): copy or save it again"
            ) from error
        if sha256(folder / WEIGHTS) != config["sha256"]:
            raise ValueError(
                f"{folder / WEIGHTS} is not what {CONFIG} was written with: copy or save both again"
            )
        origin = Origin(**{name: config[name] for name in Origin._fields})
        threshold = tensors.pop("threshold")
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        return KINDS[kind](**tensors, threshold=threshold, k=config["k"], origin=origin)

    def extra_repr(self) -> str:
        o = self.origin
        shape = f"{o.architecture}, d_in={self.d_in}, d_sae={self.d_sae}"
        return f"{shape}, {o.model_name}, {o.site}, layer={o.layer}"


class Transcoder(SAE):
    """Predicts an MLP's output from its input: ŷ = f(x) W_dec + b_dec + x W_skip.

    W_skip: [d_in, d_in], or None. `encode` and `decode` are those of :class:`SAE`: only `forward`
    adds the skip connection. Raises ValueError for shapes that do not fit.
    """

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        W_skip: Tensor | None = None,
        k: int | None = None,
        origin: Origin | None = None,
    ):
        super().__init__(W_enc, b_enc, W_dec, b_dec, threshold, k, origin)
        if W_skip is not None and tuple(W_skip.shape) != (self.d_in, self.d_in):
            raise ValueError(
                f"W_skip has shape {tuple(W_skip.shape)}, expected {(self.d_in, self.d_in)}"
            )
        self.register_parameter("W_skip", None if W_skip is None else _constant(W_skip))

    def forward(self, x: Tensor) -> Tensor:
        """ŷ, [..., d_in], of the MLP input x: [..., d_in]."""
        y = super().forward(x)
        return y if self.W_skip is None else y + x.to(self.dtype) @ self.W_skip


def check_autoencoder(sae: object) -> None:
    """Raise ValueError for a transcoder, where x̂ stands for x itself."""
    if isinstance(sae, Transcoder):
        raise ValueError(
            "this is a transcoder: expected an SAE (jumprelu.evaluate takes transcoders, too)"
        )


KINDS = {kind.__name__: kind for kind in (SAE, Transcoder)}


def _constant(tensor: Tensor) -> torch.nn.Parameter:
    """A copy, as a parameter that takes no gradient."""
    return torch.nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _as_coo(support: Support) -> Tensor:
    order, start, latent = support.by_token
    token = torch.arange(support.shape[0], device=start.device).repeat_interleave(start.diff())
    index, values = torch.stack([token, latent.long()]), support.pre.index_select(0, order)
    return torch.sparse_coo_tensor(
        index, values, support.shape, is_coalesced=True, check_invariants=False
    )
