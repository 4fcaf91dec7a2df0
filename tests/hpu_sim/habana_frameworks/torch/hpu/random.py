"""The card's generator. Only these functions, and the plugin's torch.manual_seed, seed it."""
import torch


def manual_seed(seed):
    torch.ops.hpu_sim.seed(int(seed))


manual_seed_all = manual_seed
