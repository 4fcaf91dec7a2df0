"""The card draws from the CPU's generator: with one seed a run on it gets the numbers of a run on the CPU.

The real card has a generator of its own, with other numbers.
"""
import torch


def manual_seed(seed):
    torch.default_generator.manual_seed(int(seed))


manual_seed_all = manual_seed


def seed():
    torch.default_generator.seed()


seed_all = seed


def initial_seed():
    return torch.default_generator.initial_seed()


def get_rng_state(device="hpu"):
    return torch.default_generator.get_state()


def set_rng_state(new_state, device="hpu"):
    torch.default_generator.set_state(new_state)


def get_rng_state_all():
    return [get_rng_state()]


def set_rng_state_all(new_states):
    set_rng_state(new_states[0])
