"""The training step: each option has its effect, and each number is that of a formula or of the well-known loop.

dcgan(*options) makes tiny networks on the CPU: 32 pixels, 8 latent numbers, batches of 16.
"""
import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import STATS, dcgan, same

import model
import train


def noise(seed=0):
    """Frames, uint8 (16, 40, 54, 3)."""
    return torch.randint(0, 256, (16, 40, 54, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def white(n):
    """Frames whose windows are 1 everywhere."""
    return torch.full((n, 40, 54, 3), 255, dtype=torch.uint8)


def weights(net):
    return [weight.detach().clone() for weight in net.parameters()]


class Record:
    """What G gets (z) and makes (fake), and what D sees (seen), in each call."""

    def __init__(self, ours):
        self.z, self.fake, self.seen = [], [], []
        ours.G.register_forward_pre_hook(lambda G, z: self.z.append(z[0].clone()))
        ours.G.register_forward_hook(lambda G, z, images: self.fake.append(images.detach().clone()))
        ours.D.register_forward_pre_hook(lambda D, images: self.seen.append(images[0].detach().clone()))


def step(frames, *words):
    """The Record of the first step on frames, with these options."""
    record = Record(ours := dcgan(*words))
    torch.manual_seed(1)
    ours.step(frames)
    return record


# ---- losses and updates ---------------------------------------------------------------------------------------------
def test_losses_are_the_logarithms_of_the_paper():
    real, fake = np.array([-30, -2, 0, 1.5, 8]), np.array([9, -4, 0.25])
    D, G = train.d_loss(torch.tensor(real), torch.tensor(fake)), train.g_loss(torch.tensor(fake))
    right_on_real, right_on_fake, wrong = (1 / (1 + np.exp(x)) for x in (-real, fake, -fake))  # probabilities
    assert D.item() == pytest.approx(-np.log(right_on_real).mean() - np.log(right_on_fake).mean(), rel=1e-6)
    assert G.item() == pytest.approx(-np.log(wrong).mean(), rel=1e-6), "non-saturating"


def test_a_step_equals_the_plain_loop_to_rounding():
    """Twenty steps beside the well-known loop: real and fake backward apart, nothing frozen, plain Adam."""
    ours = dcgan()
    G, D = copy.deepcopy(ours.G), copy.deepcopy(ours.D)
    bce = F.binary_cross_entropy_with_logits
    adam_G, adam_D = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D))

    def plain_step(frames):
        real, z = model.cut_windows(frames, 32), torch.randn(16, 8)
        fake = G(z)
        D.zero_grad()
        x, z1 = D(real), D(fake.detach())
        loss_real, loss_fake = bce(x, torch.ones(16)), bce(z1, torch.zeros(16))
        loss_real.backward()
        loss_fake.backward()
        adam_D.step()
        G.zero_grad()
        z2 = D(fake)
        loss_G = bce(z2, torch.ones(16))
        loss_G.backward()
        adam_G.step()
        return loss_real + loss_fake, loss_G, *(logits.sigmoid().mean() for logits in (x, z1, z2))

    for i in range(20):
        torch.manual_seed(i)
        stats = ours.step(noise(seed=i))
        torch.manual_seed(i)
        expected = dict(zip(STATS, map(torch.Tensor.detach, plain_step(noise(seed=i)))))
        torch.testing.assert_close(stats, expected, rtol=1e-4, atol=1e-4)
    for net, plain in ((ours.G, G), (ours.D, D)):
        for a, b in zip(net.state_dict().values(), plain.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_both_optimizers_are_adamw_with_the_options():
    """Two steps of Kingma and Ba's algorithm with beta2 0.999 and epsilon 1e-8, and Loshchilov and Hutter's decay."""
    lr, beta1, decay = 1e-3, 0.8, 0.5
    for name in ("G", "D"):
        ours, gradients = dcgan("--lr", lr, "--beta1", beta1, "--weight-decay", decay), []
        net = getattr(ours, name)
        start = weights(net)
        for i in range(2):
            ours.step(noise(seed=i))
            gradients.append([weight.grad.double() for weight in net.parameters()])
        for w, end, *both in zip(start, weights(net), *gradients):
            w, m, v = w.double(), 0, 0
            for t, g in enumerate(both, 1):
                m, v = beta1 * m + (1 - beta1) * g, 0.999 * v + 0.001 * g ** 2
                w = w - lr * decay * w - lr * m / (1 - beta1 ** t) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)
            assert (w - end).abs().max() < 2e-3 * lr


# ---- the average of G's weights -------------------------------------------------------------------------------------
def hold(ours, value, n, steps):
    """G has this weight everywhere for some steps of n images. Returns the mean of G_ema's first weights."""
    for weight in ours.G.parameters():
        weight.data.fill_(value)
    for _ in range(steps):
        ours.update_average(n)
    return next(ours.G_ema.parameters()).mean().item()


def test_the_average_is_a_copy_of_g_before_the_update_and_later_forgets_half_in_a_tenth_of_the_run():
    """The weights up to step s of t together count (1 - 7/(s+1)) … (1 - 7/t) = C(s, 7)/C(t, 7)."""
    ours = dcgan()
    for seed in range(7):
        before = weights(ours.G)
        ours.step(noise(seed=seed))
        assert same(weights(ours.G_ema), before) and not same(before, weights(ours.G))
    assert hold(ours, 1, 1, 84) == pytest.approx(1, rel=1e-5)
    assert hold(ours, 0, 1, 9) == pytest.approx(math.comb(91, 7) / math.comb(100, 7), rel=1e-4)


def test_in_long_runs_the_average_forgets_half_in_20000_images_of_all_processes(monkeypatch):
    ours, counted = dcgan(), []
    hold(ours, 1, 1000, 300)
    assert hold(ours, 0, 1000, 20) == pytest.approx(0.5, rel=1e-4)
    assert hold(ours, 0, 4000, 5) == pytest.approx(0.25, rel=1e-4), "whatever the size of the batches"
    ours.world = 4
    monkeypatch.setattr(train, "add_up", lambda gradients: None)
    monkeypatch.setattr(ours, "update_average", counted.append)
    ours.step(noise())
    assert counted == [64]


def test_samples_have_the_statistics_of_512_latents_and_leave_the_training_alone():
    ours = dcgan("--latent", "uniform")
    for seed in range(9):
        ours.step(noise(seed=seed))
    before, random = copy.deepcopy([net.state_dict() for net in (ours.G, ours.D)]), torch.get_rng_state()
    average = copy.deepcopy(ours.G_ema)
    sampler = ours.sampler()
    assert not sampler.training and same(weights(sampler), weights(average))
    assert same(before, [net.state_dict() for net in (ours.G, ours.D)]) and same(random, torch.get_rng_state())
    x = model.latents(range(512), 8, "uniform")[:, :, None, None]
    for layer, own in zip(average.main, sampler.main):
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.testing.assert_close(own.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.running_var, x.var((0, 2, 3)), rtol=1e-4, atol=1e-7)
        x = layer.train()(x).detach()


# ---- what D sees ----------------------------------------------------------------------------------------------------
def test_instance_noise_has_its_standard_deviation_on_real_and_fake_images():
    record = step(white(64), "--instance-noise", 0.2)
    clean = torch.ones(64, 3, 32, 32), record.fake[0], record.fake[0]
    parts = list(map(torch.sub, record.seen, clean))
    for part in parts:
        assert abs(part.mean()) < 0.003 and part.std().item() == pytest.approx(0.2, rel=0.02)
        assert (part.abs() < 0.2).float().mean().item() == pytest.approx(0.683, abs=0.01), "a normal distribution"
    assert abs(np.corrcoef([part.flatten() for part in parts]) - np.eye(3)).max() < 0.02, "new noise each time"


def shifts(seen, images):
    """[(down, right), …]: by how many pixels each image was shifted, with zeros at the border."""
    padded, found = F.pad(images, (5, 5, 5, 5)), [[] for _ in seen]
    for down, right in np.ndindex(11, 11):
        shifted = padded[:, :, 10 - down:42 - down, 10 - right:42 - right]
        for i in ((seen - shifted).abs().amax((1, 2, 3)) < 1e-5).nonzero():
            found[i].append((down - 5, right - 5))
    assert all(len(places) == 1 for places in found), "whole pixels"
    return [places[0] for places in found]


def test_augment_shifts_real_and_fake_images_by_up_to_an_eighth():
    record = step(white(400), "--augment")
    real, *both = record.seen
    found = [shifts(seen, record.fake[0]) for seen in both] + [shifts(real, torch.ones_like(real))]
    for axis in range(2):
        for counts in (Counter(shift[axis] for shift in one) for one in found):
            assert sorted(counts) == list(range(-4, 5)) and all(abs(n - 400 / 9) < 24 for n in counts.values())
    assert all(abs(np.corrcoef(np.transpose(one))[0, 1]) < 0.15 for one in found), "down and right are independent"
    assert found[0] != found[1], "new shifts each time"


def test_mirror_flips_half_of_the_real_images_and_no_other():
    frames = torch.zeros(600, 40, 54, 3, dtype=torch.uint8)
    frames[:, :, :, 0] = torch.linspace(250, 0, 54).to(torch.uint8)  # red on the left
    for words, share in (([], 0), (["--mirror"], 0.5), (["--mirror", "--no-mirror"], 0)):
        record = step(frames, *words)
        red = record.seen[0][:, 0].mean(1)
        assert (red[:, 0] < red[:, -1]).float().mean().item() == pytest.approx(share, abs=0.07)
        assert same(record.seen[1], record.fake[0])


def test_latents_have_the_distribution_of_the_option():
    for latent, variance, largest in (("normal", 1, (3, 6)), ("uniform", 1 / 3, (0.99, 1))):
        z = step(white(500), "--latent", latent).z[0]
        assert z.shape == (500, 8) and abs(z.mean()) < 0.05 and z.var().item() == pytest.approx(variance, rel=0.06)
        assert largest[0] < z.abs().max() <= largest[1]


def test_options_set_the_sizes_of_both_networks_and_losses_are_in_fp32():
    ours = dcgan("--kernel-size", 5, "--nz", 7, "--ngf", 6, "--ndf", 5, "--precision", "bf16")
    assert ours.G.main[0].weight.shape == (7, 24, 4, 4) and ours.G.main[-2].weight.shape == (6, 3, 5, 5)
    assert ours.D.main[0].weight.shape == (5, 3, 5, 5) and ours.D.main[-1].weight.shape == (1, 20, 4, 4)
    record = Record(ours)
    assert {value.dtype for value in ours.step(noise()).values()} == {torch.float32}
    assert record.fake[0].dtype == torch.bfloat16


# ---- random numbers and batches -------------------------------------------------------------------------------------
def test_a_seed_gives_the_weights_of_the_paper_and_another_gives_others():
    one, again, other = (dcgan("--seed", seed, "--ngf", 32, "--ndf", 32) for seed in (5, 5, 6))
    for first, second, third in ((one.G, again.G, other.G), (one.D, again.D, other.D)):
        assert same(weights(first), weights(second)) and not torch.equal(first.main[0].weight, third.main[0].weight)
        for name, w in first.named_parameters():
            mean = 1 if name.endswith("weight") and w.dim() == 1 else 0  # of a batch norm's gains
            std = 0 if name.endswith("bias") else 0.02
            assert abs(w.mean() - mean) < 0.01 and abs(w.std() - std) < 0.3 * std + 1e-9, name


def test_a_steps_random_numbers_are_those_of_its_seed_rank_and_number():
    device, drawn = train.Device("cpu"), {}
    for numbers in np.ndindex(3, 3, 3):
        train.seed_step(device, *numbers)
        drawn[numbers] = torch.rand(2)
    assert len({tuple(two.tolist()) for two in drawn.values()}) == 27
    assert drawn[0, 0, 0].tolist() == pytest.approx([0.1134326, 0.9062244]), "typed: a run can be repeated"


FRAMES = np.arange(100, dtype=np.uint8).repeat(24).reshape(100, 2, 4, 3)  # each is full of its number


class Large(np.ndarray):
    """An array that says that it has 768 MB, so that it is read in three stretches."""
    nbytes = property(lambda self: 3 * 256 * 2 ** 20)


def order(frames, batch_size, seeds, steps, seen=0):
    """The numbers of the frames in each batch."""
    batches = zip(range(steps), train.batches(frames, batch_size, seeds, seen))
    return [batch[:, 0, 0, 0].tolist() for _, batch in batches]


def test_an_epoch_has_each_frame_once_in_whole_batches_and_an_order_of_its_own():
    first = order(FRAMES, 8, (0, 0), 24)
    for epoch in (first[:12], first[12:]):
        assert len(set(sum(epoch, []))) == 96, "12 batches, and no frame twice"
    orders = first[:12], first[12:], order(FRAMES, 8, (1, 0), 12), order(FRAMES, 8, (0, 1), 12)
    assert len({str(one) for one in orders}) == 4, "epochs, seeds and ranks"
    assert [first[0], first[12]] == [[82, 36, 20, 5, 93, 16, 94, 52], [74, 67, 17, 45, 35, 40, 15, 33]], "typed"
    for seen in (1, 11, 12, 17):
        assert order(FRAMES, 8, (0, 0), 24 - seen, seen) == first[seen:], "a resumed run sees the rest"


def test_a_large_pack_is_read_in_stretches_in_random_order():
    frames = FRAMES.view(Large)
    first = order(frames, 4, (0, 0), 48)
    places = [{np.searchsorted([33, 66], number, "right") for number in batch} for batch in first]
    assert all(len(place) == 1 for place in places), "a batch is from one stretch"
    assert [place.pop() for place in places[::8]] == [2, 0, 1, 1, 2, 0]
    assert len(set(sum(first[:24], []))) == 96
    for seen in (3, 8, 23, 24, 30):
        assert order(frames, 4, (0, 0), 48 - seen, seen) == first[seen:]
