"""FusedAdamW by the plugin's rules. They differ from torch's:

- eps is 1e-6 by default and is added to sqrt(v) without bias correction: torch's eps is sqrt(1 - b2^t) times as large
- the count of steps is param_groups[i]["step"]; state[p]["step"] is there too and stays 0
- in lazy mode it cuts the graph, before each group and after the last; step size and decay are inputs of the graph
"""
import math

import torch
from habana_frameworks.torch import core as htcore


class FusedAdamW(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            htcore.mark_step()
            group["step"] = group.get("step", 0) + 1
            (b1, b2), lr = group["betas"], group["lr"]
            step_size = lr * math.sqrt(1 - b2 ** group["step"]) / (1 - b1 ** group["step"])
            decay = 1 - group["weight_decay"] * lr
            rows = []
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                rows.append((p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
            # One fused op: the record does not show the arithmetic below.
            constants = f"{b1} {b2} {group['eps']}"
            torch.ops.hpu_sim.ran("hpu::optimizer_adamw", [t for row in rows for t in row], constants)
            for row in rows:
                w, g, m, v = map(torch.ops.hpu_sim.on_cpu, row)
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                w.mul_(decay).addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
        torch.ops.hpu_sim.mark(1)
