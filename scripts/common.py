"""What the training scripts share: atomic files, an average of weights, a learning-rate curve, a log."""

import json
import math
import os
import time
from pathlib import Path

import torch


def save_atomic(state: dict, path: Path) -> None:
    """The file is whole or not there: written beside its name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


class Ema:
    """Exponential moving average of parameters; young averages forget faster."""

    def __init__(self, params: list[torch.nn.Parameter], decay: float):
        self.decay, self.count = decay, 0
        self.params, self.shadow = params, [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.params], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters with their average; call again to change back."""
        for param, shadow in zip(self.params, self.shadow):
            kept = param.detach().clone()
            param.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict:
        return {"count": self.count, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for mine, saved in zip(self.shadow, state["shadow"]):
            mine.copy_(saved)


def lr_factor(progress: float, warmup: float = 0.01) -> float:
    """Linear warmup, then a cosine to 1 % over progress 0 to 1."""
    if progress < warmup:
        return progress / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Log:
    """One JSON line per report, on the screen and appended to a file."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
        print(time.strftime("%H:%M:%S"), line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Muon:
    """Muon (Jordan et al., 2024) for weights of two or more dimensions, AdamW for the rest; made for small CPU models.

    An update is the momentum, orthogonalised by five Newton-Schulz steps, times 0.2 * sqrt(longer side), so that AdamW's
    learning rates fit (Moonlight, arXiv:2502.16982). Matrices of one shape go through the steps together.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        self.lr, self.momentum = lr, momentum
        self.adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.matrices = matrices
        self.buffers = [torch.zeros_like(p) for p in matrices]
        self.by_shape: dict[tuple[int, int], list[int]] = {}
        for index, param in enumerate(matrices):
            self.by_shape.setdefault((param.shape[0], param[0].numel()), []).append(index)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate; gradients are cleared."""
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        self.adam.zero_grad()
        for (rows, columns), indices in self.by_shape.items():
            stack = []
            for index in indices:
                grad, buffer = self.matrices[index].grad, self.buffers[index]
                buffer.lerp_(grad, 1 - self.momentum)
                stack.append(grad.lerp(buffer, self.momentum).reshape(rows, columns))
                self.matrices[index].grad = None
            updates = orthogonal(torch.stack(stack)) * (0.2 * max(rows, columns) ** 0.5)
            for index, update in zip(indices, updates):
                self.matrices[index].sub_(update.view_as(self.matrices[index]), alpha=self.lr * factor)

    def state_dict(self) -> dict:
        return {"adam": self.adam.state_dict(), "buffers": self.buffers}

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        for mine, saved in zip(self.buffers, state["buffers"]):
            mine.copy_(saved)


def orthogonal(x: torch.Tensor) -> torch.Tensor:  # (N,rows,columns) -> the same shape, singular values near 1
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT
