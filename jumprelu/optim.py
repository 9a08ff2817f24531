"""Adam as SAEs need it: no first moment where β₁ = 0, and atoms kept at norm 1 in the same pass
over memory.

At β₁ = 0 the first moment *is* the gradient, so the gradient's own memory stands in for it. The
update is that of `torch.optim.Adam(fused=True)`, on a CPU bit for bit. A matrix is taken a block of
rows at a time, small enough for a cache; on a GPU with Triton, one kernel does all.
"""

import torch

from . import kernels

BLOCK = 2**17
"""Numbers a block: three matrices of them, in float32, fit a second-level cache."""


class Adam:
    """Adam (Kingma & Ba 2015) over named parameters.

    betas, eps: as in torch.optim.Adam. unit_norm: names of matrices whose rows have norm 1: the
    part of the gradient parallel to a row is removed before the update and the row brought back to
    norm 1 after it, in place, as Gemma Scope trains.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        betas: tuple[float, float],
        eps: float = 1e-8,
        unit_norm: tuple[str, ...] = (),
    ):
        self.parameters, self.betas, self.eps, self.unit_norm = parameters, betas, eps, unit_norm
        kept = ("exp_avg_sq",) if betas[0] == 0 else ("exp_avg_sq", "exp_avg")
        self.moments = {
            name: {key: torch.zeros_like(p) for key in kept} for name, p in parameters.items()
        }
        """For each parameter exp_avg_sq, and exp_avg if β₁ > 0; shaped as the parameter."""
        self.steps = 0

    @torch.no_grad()
    def step(self, lr: dict[str, float], triton: bool | None = None) -> None:
        """One update from the parameters' gradients, which it consumes.

        lr: learning rate of each parameter by name; triton: as in
        :class:`jumprelu.sparse.SparsePolicy`.
        """
        self.steps += 1
        for name, parameter in self.parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            moments = self.moments[name]
            tensors = [parameter, gradient, moments["exp_avg_sq"], moments.get("exp_avg", gradient)]
            if parameter.ndim == 2 and parameter.stride(0) < parameter.stride(1):
                tensors = [tensor.T for tensor in tensors]  # W_enc: in memory latent by latent
            unit_norm = name in self.unit_norm
            if kernels.serves(parameter, triton) and (
                not unit_norm or tensors[0].shape[-1] <= kernels.WIDEST
            ):
                tensors[1] = tensors[1].contiguous()
                if "exp_avg" not in moments:
                    tensors[3] = None
                settings = lr[name], self.betas, self.eps, self.steps, unit_norm
                kernels.adam(*tensors, *settings)
                continue
            on_cpu = parameter.device.type == "cpu"
            rows = max(1, BLOCK // tensors[0][0].numel()) if on_cpu else len(tensors[0])
            step = torch.tensor(float(self.steps), device=parameter.device)
            for block in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
                self._update(*block, step, lr[name], unit_norm)

    def _update(
        self, parameter, gradient, exp_avg_sq, exp_avg, step, lr: float, unit_norm: bool
    ) -> None:
        if unit_norm:
            gradient.addcmul_(parameter, (gradient * parameter).sum(-1, keepdim=True), value=-1)
        beta1, beta2 = self.betas
        options = {"weight_decay": 0.0, "eps": self.eps, "amsgrad": False, "maximize": False}
        tensors = [parameter], [gradient], [exp_avg], [exp_avg_sq], [], [step]
        torch._fused_adam_(*tensors, lr=lr, beta1=beta1, beta2=beta2, **options)
        if unit_norm:
            parameter.div_(torch.linalg.vector_norm(parameter, dim=-1, keepdim=True))
