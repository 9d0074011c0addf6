"""Muon written down once more, for whole matrices in float32."""

import torch


class PlainMuon(torch.optim.Optimizer):
    """Momentum, Nesterov, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), in float32.

    rows: of a parameter, the row numbers of each matrix that it joins; by default it is one.
    """

    def __init__(self, matrices, lr, momentum, weight_decay, rows=None):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._rows = rows or {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average += (1 - group["momentum"]) * (p.grad - average)
                update = p.grad + group["momentum"] * (average - p.grad)
                p *= 1 - group["lr"] * group["weight_decay"]
                for rows in self._rows.get(p, [list(range(len(p)))]):
                    p[rows] -= group["lr"] * orthogonalise(update[rows])


def orthogonalise(x):
    rows, columns = x.shape
    x = (x.T if rows > columns else x) / (x.norm() + 1e-7)  # projections of few rows hardly have a gradient
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if rows > columns else x) * max(1, rows / columns) ** 0.5


def rows_of(name: str, count: int) -> list[list[int]]:
    """Of the joined matrices of tests/helpers/tiny.py: row numbers of q, k, v; of q, k, v, z, beta, alpha; of gate and up."""
    if name.endswith("linear_fc1.weight"):
        sizes, heads = [count // 2] * 2, 1
    elif name.endswith("qkv_proj.weight"):
        sizes, heads = [count // 6] * 3, 2
    elif name.endswith("in_proj.weight"):
        sizes, heads = [4, 4, 6, 6, 1, 1], 2
    else:
        return [list(range(count))]
    found, start = [], 0
    for size in sizes:
        found.append([head * sum(sizes) + start + row for head in range(heads) for row in range(size)])
        start += size
    return found
