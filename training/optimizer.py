"""The optimizer of the hidden matrices and the learning rate schedule."""

import math

import torch


class Muon:
    """Momentum with orthogonalised updates for the hidden matrices, equal shapes stepped together.

    Updates are scaled to the typical size of an AdamW update, so both share one learning rate.
    """

    def __init__(self, params, momentum=0.95, weight_decay=0.1):
        self.momentum, self.weight_decay, self.groups = momentum, weight_decay, {}
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.buffers = {shape: torch.zeros(len(g), *shape, device=g[0].device) for shape, g in self.groups.items()}

    @torch.no_grad()
    def step(self, lr):
        for shape, params in self.groups.items():
            gradient, buffer = torch.stack([p.grad for p in params]), self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum))
            torch._foreach_mul_(params, 1 - lr * self.weight_decay)
            torch._foreach_add_(params, list(update.float().unbind()), alpha=-lr * 0.2 * math.sqrt(max(shape)))


def orthogonalize(x, steps=5):
    """Newton-Schulz iteration towards the nearest orthogonal matrices of a batch."""
    x = x.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def learning_rate(progress, peak, decay_from=0.5):
    """Short warm-up, constant, then a linear decay to zero."""
    return peak * min(1.0, progress / 0.01, (1 - progress) / (1 - decay_from))
