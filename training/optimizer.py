# SPDX-License-Identifier: Apache-2.0
"""Muon for the weight matrices and AdamW for the embedding and the norms, as one optimizer."""

from __future__ import annotations

from concurrent.futures import Executor

import torch
from torch import Tensor, nn


def orthogonalised(g: Tensor, steps: int = 5) -> Tensor:
    """The nearly orthogonal matrices nearest to a batch of matrices [S, R, C], by Newton-Schulz iteration."""
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x if wide else x.mT


class MuonAdamW:
    """Weight matrices of the layers: Muon (orthogonalised momentum); everything else: AdamW."""

    def __init__(self, model: nn.Module, matrix_lr: float, other_lr: float, weight_decay: float) -> None:
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in matrices:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.momentum = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.groups.items()}
        others = [p for n, p in named if p.dim() != 2 or "embed" in n]
        self.adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.matrix_lr, self.other_lr, self.weight_decay = matrix_lr, other_lr, weight_decay

    @torch.no_grad()
    def step(self, scale: float, pool: Executor) -> None:
        """One update with both learning rates times `scale`; the groups of equal shapes are shared among the pool."""

        @torch.no_grad()
        def update(item: tuple[tuple[int, ...], list[nn.Parameter]]) -> None:
            shape, parameters = item
            g = torch.stack([p.grad for p in parameters])  # type: ignore[misc]
            m = self.momentum[shape]
            m.lerp_(g, 0.05)
            direction = orthogonalised(g.lerp(m, 0.95))
            lr = self.matrix_lr * scale * max(1.0, shape[0] / shape[1]) ** 0.5
            for p, u in zip(parameters, direction, strict=True):
                p.mul_(1.0 - self.matrix_lr * scale * self.weight_decay).add_(u, alpha=-lr)

        for _ in pool.map(update, sorted(self.groups.items(), key=lambda item: -item[0][0] * item[0][1])):
            pass
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * scale
        self.adam.step()

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs."""
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take the state of an earlier run."""
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])
