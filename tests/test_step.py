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


def noise(n=16, seed=0):
    """Frames, uint8 (n, 40, 54, 3)."""
    return torch.randint(0, 256, (n, 40, 54, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def white(n=16):
    """Frames whose windows are 1 everywhere."""
    return torch.full((n, 40, 54, 3), 255, dtype=torch.uint8)


def weights(net):
    return [weight.detach().clone() for weight in net.parameters()]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


class Record:
    """What G gets (z) and makes (fake), and what D sees (seen), in each call."""

    def __init__(self, ours):
        self.z, self.fake, self.seen = [], [], []
        ours.G.register_forward_hook(self.note)
        ours.D.register_forward_pre_hook(lambda D, images: self.seen.append(images[0].detach().clone()))

    def note(self, G, z, images):
        self.z.append(z[0].clone())
        self.fake.append(images.detach().clone())


def step(frames, *words):
    """(Record, stats) of the first step on frames, with these options."""
    ours = dcgan(*words)
    record = Record(ours)
    torch.manual_seed(1)
    return record, ours.step(frames)


# ---- losses and updates ---------------------------------------------------------------------------------------------
def test_losses_are_the_logarithms_of_the_paper():
    real, fake = [-30, -2, 0, 1.5, 8], [9, -4, 0.25]
    found = train.d_loss(torch.tensor(real), torch.tensor(fake)), train.g_loss(torch.tensor(fake))
    on_fake = -np.log(1 - sigmoid(fake)).mean()
    assert found[0].item() == pytest.approx(-np.log(sigmoid(real)).mean() + on_fake, rel=1e-6)
    assert found[1].item() == pytest.approx(-np.log(sigmoid(fake)).mean(), rel=1e-6), "non-saturating"
    assert train.d_loss(torch.tensor([-200.]), torch.tensor([300.])).item() == 500, "no overflow"


def test_a_step_equals_the_plain_loop_to_rounding():
    """Twenty steps beside the well-known loop: real and fake backward apart, nothing frozen, plain Adam."""
    ours = dcgan()
    plain_G, plain_D = copy.deepcopy(ours.G), copy.deepcopy(ours.D)
    adam_G, adam_D = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (plain_G, plain_D))
    bce = torch.nn.BCEWithLogitsLoss()

    def plain_step(frames):
        real, z = model.cut_windows(frames, 32), torch.randn(16, 8)
        plain_D.zero_grad()
        loss_real = bce(plain_D(real), torch.ones(16))
        loss_real.backward()
        fake = plain_G(z)
        loss_fake = bce(plain_D(fake.detach()), torch.zeros(16))
        loss_fake.backward()
        adam_D.step()
        plain_G.zero_grad()
        loss_G = bce(plain_D(fake), torch.ones(16))
        loss_G.backward()
        adam_G.step()
        return {"Loss_D": (loss_real + loss_fake).detach(), "Loss_G": loss_G.detach()}

    for i in range(20):
        both = []
        for one_step in (ours.step, plain_step):
            torch.manual_seed(i)
            both.append(one_step(noise(seed=i)))
        for name, value in both[1].items():
            torch.testing.assert_close(both[0][name], value, rtol=1e-4, atol=1e-4)
    for net, plain in ((ours.G, plain_G), (ours.D, plain_D)):
        for a, b in zip(net.state_dict().values(), plain.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_each_network_learns_from_its_own_loss_and_the_numbers_are_those_at_its_update():
    ours = dcgan("--lr", 0.01)
    record, before, G_before = Record(ours), copy.deepcopy(ours.D), weights(ours.G)
    at = {}

    def before_D(*_):
        assert all(weight.grad is None for weight in ours.G.parameters()), "D's loss does not reach G"
        at["gradients"] = [weight.grad.clone() for weight in ours.D.parameters()]

    ours.opt_D.register_step_pre_hook(before_D)
    ours.opt_D.register_step_post_hook(lambda *_: at.update(D=copy.deepcopy(ours.D), G=weights(ours.G)))
    stats = ours.step(noise())
    real, fake, again = record.seen
    assert same(at["G"], G_before) and not same(weights(ours.G), G_before)
    assert same(weights(at["D"]), weights(ours.D)) and not same(weights(before), weights(ours.D))
    assert same(at["gradients"], [weight.grad for weight in ours.D.parameters()]), "G's loss gives D no gradients"
    assert all(weight.requires_grad for weight in ours.D.parameters())
    assert same(fake, record.fake[0]) and same(again, fake) and len(real) == len(fake) == 16

    x, z1, z2 = (net(images).detach().numpy() for net, images in ((before, real), (before, fake), (at["D"], fake)))
    expected = (-np.log(sigmoid(x)).mean() - np.log(1 - sigmoid(z1)).mean(), -np.log(sigmoid(z2)).mean(),
                *(sigmoid(logits).mean() for logits in (x, z1, z2)))
    assert tuple(stats) == STATS and list(map(float, stats.values())) == pytest.approx(expected, rel=1e-4)
    assert abs(expected[3] - expected[4]) > 0.01, "this update changes D's mind"


@pytest.mark.parametrize("words, lr, beta1, decay", [
    ([], 2e-4, 0.5, 0),
    (["--lr", 1e-3, "--beta1", 0.8, "--weight-decay", 0.5], 1e-3, 0.8, 0.5),
])
def test_both_optimizers_are_adamw_with_the_options(words, lr, beta1, decay):
    """Two steps of Kingma and Ba's algorithm with beta2 0.999 and epsilon 1e-8, and Loshchilov and Hutter's decay."""
    for name in ("G", "D"):
        ours, gradients = dcgan(*words), []
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


def test_several_processes_share_the_gradient_and_count_all_images(monkeypatch):
    one, four = dcgan(), dcgan()
    four.world, sums, counted = 4, [], []
    monkeypatch.setattr(train, "add_up", lambda gradients: sums.append([g.clone() for g in gradients]))
    monkeypatch.setattr(four, "update_average", counted.append)
    for ours in (one, four):
        torch.manual_seed(0)
        ours.step(noise())
    assert counted == [64] and [len(gradients) for gradients in sums] == [len(weights(four.D)), len(weights(four.G))]
    for weight, part in zip(one.D.parameters(), sums[0]):
        torch.testing.assert_close(part, weight.grad / 4)


# ---- the average of G's weights -------------------------------------------------------------------------------------
def hold(ours, value, n, steps):
    """G has this weight everywhere for some steps of n images. Returns G_ema's."""
    for weight in ours.G.parameters():
        weight.data.fill_(value)
    for _ in range(steps):
        ours.update_average(n)
    found = torch.cat([weight.flatten() for weight in ours.G_ema.parameters()])
    assert found.min() == found.max()
    return found[0].item()


def test_the_average_forgets_half_in_a_tenth_of_the_run():
    """The weights up to step s of t together count (1 - 7/(s+1)) … (1 - 7/t) = C(s, 7)/C(t, 7)."""
    ours = dcgan()
    assert [hold(ours, value, 1, 1) for value in (3, 1, 4, 1, 5, 9, 2)] == [3, 1, 4, 1, 5, 9, 2], "a copy at first"
    ours = dcgan()
    assert hold(ours, 1, 1, 91) == 1
    assert hold(ours, 0, 1, 9) == pytest.approx(math.comb(91, 7) / math.comb(100, 7), rel=1e-4)


def test_in_long_runs_the_average_forgets_half_in_20000_images():
    ours = dcgan()
    hold(ours, 1, 1000, 300)
    assert hold(ours, 0, 1000, 20) == pytest.approx(0.5, rel=1e-4)
    assert hold(ours, 0, 4000, 5) == pytest.approx(0.25, rel=1e-4), "whatever the size of the batches"


def test_the_average_is_of_g_before_the_update():
    ours = dcgan()
    for seed in range(3):
        before = weights(ours.G)
        ours.step(noise(seed=seed))
        assert same(weights(ours.G_ema), before) and not same(before, weights(ours.G))


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_samples_have_the_statistics_of_512_latents_and_leave_the_training_alone(latent):
    ours = dcgan("--latent", latent)
    for seed in range(9):
        ours.step(noise(seed=seed))
    before, random = copy.deepcopy([net.state_dict() for net in (ours.G, ours.D)]), torch.get_rng_state()
    average = copy.deepcopy(ours.G_ema)
    sampler = ours.sampler()
    assert not sampler.training and same(weights(sampler), weights(average))
    assert same(before, [net.state_dict() for net in (ours.G, ours.D)]) and same(random, torch.get_rng_state())
    x = model.latents(range(512), 8, latent)[:, :, None, None]
    for layer, own in zip(average.main, sampler.main):
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.testing.assert_close(own.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.running_var, x.var((0, 2, 3)), rtol=1e-4, atol=1e-7)
        x = layer.train()(x).detach()


# ---- what D sees ----------------------------------------------------------------------------------------------------
def test_without_tricks_d_sees_windows_and_fakes_as_they_are():
    record, _ = step(white())
    assert (record.seen[0] - 1).abs().max() < 1e-5
    assert same(record.seen[1], record.fake[0]) and same(record.seen[2], record.fake[0])


def test_instance_noise_has_its_standard_deviation_on_real_and_fake_images():
    record, _ = step(white(64), "--instance-noise", 0.2)
    clean = torch.ones(64, 3, 32, 32), record.fake[0], record.fake[0]
    parts = [seen - images for seen, images in zip(record.seen, clean)]
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
    record, _ = step(white(400), "--augment")
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
        record, _ = step(frames, *words)
        red = record.seen[0][:, 0].mean(1)
        assert (red[:, 0] < red[:, -1]).float().mean().item() == pytest.approx(share, abs=0.07)
        assert same(record.seen[1], record.fake[0])


def test_latents_have_the_distribution_of_the_option():
    for latent, variance, largest in (("normal", 1, 6), ("uniform", 1 / 3, 1)):
        z = dcgan("--latent", latent).draw_latents(5000)
        record, _ = step(white(500), "--latent", latent)
        for found in (z, record.z[0]):
            assert found.shape[1] == 8 and abs(found.mean()) < 0.05 and found.abs().max() <= largest
            assert found.var().item() == pytest.approx(variance, rel=0.06)
        assert z.abs().max() > (3 if latent == "normal" else 0.99)
        assert not torch.equal(z[:500], dcgan("--latent", latent).draw_latents(5000)[500:1000])


def test_precision_is_that_of_the_networks_and_losses_are_in_fp32():
    for precision, dtype in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        record, stats = step(noise(), "--precision", precision)
        assert record.fake[0].dtype == dtype and {value.dtype for value in stats.values()} == {torch.float32}
        ours = dcgan("--precision", precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            assert ours.logits(ours.D, torch.zeros(4, 3, 32, 32)).dtype == torch.float32


def test_options_set_the_sizes_of_both_networks():
    ours = dcgan("--image-size", 64, "--kernel-size", 5, "--nz", 7, "--ngf", 6, "--ndf", 5)
    assert ours.G.main[0].weight.shape == (7, 48, 4, 4) and ours.G.main[-2].weight.shape == (6, 3, 5, 5)
    assert ours.D.main[0].weight.shape == (5, 3, 5, 5) and ours.D.main[-1].weight.shape == (1, 40, 4, 4)
    stats = ours.step(torch.zeros(16, 80, 106, 3, dtype=torch.uint8))
    assert all(value.isfinite() for value in stats.values())


# ---- random numbers and batches -------------------------------------------------------------------------------------
def test_a_seed_gives_the_weights_of_the_paper_and_another_gives_others():
    one, again, other = (dcgan("--seed", seed) for seed in (5, 5, 6))
    for name in ("G", "D"):
        first, second, third = (weights(getattr(ours, name)) for ours in (one, again, other))
        assert same(first, second) and not any(map(torch.equal, first[:1], third[:1]))
    assert same(weights(one.G_ema), weights(one.G))
    wide = dcgan("--ngf", 32, "--ndf", 32)
    for net in (wide.G, wide.D):
        assert net.main[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_steps_random_numbers_are_those_of_its_seed_rank_and_number():
    device, drawn = train.Device("cpu"), {}
    for numbers in np.ndindex(3, 3, 3):
        train.seed_step(device, *numbers)
        drawn[numbers] = torch.rand(2)
    assert len({tuple(two.tolist()) for two in drawn.values()}) == 27
    assert drawn[0, 0, 0].tolist() == pytest.approx([0.1134326, 0.9062244]), "typed: a run can be repeated"
    assert drawn[1, 2, 0].tolist() == pytest.approx([0.7476010, 0.0683351])


def numbered(n):
    """Frames (n, 2, 4, 3) whose first value is their number."""
    frames = np.random.default_rng(0).integers(0, 256, (n, 2, 4, 3), np.uint8)
    frames[:, 0, 0, 0] = range(n)
    return frames


class Large(np.ndarray):
    """An array that says that it has 768 MB, so that it is read in three stretches."""
    nbytes = property(lambda self: 3 * 256 * 2 ** 20)


def order(frames, batch_size, seeds, steps, seen=0):
    """The numbers of the frames in each batch."""
    found = []
    for _, batch in zip(range(steps), train.batches(frames, batch_size, seeds, seen)):
        assert batch.dtype == torch.uint8 and batch.is_contiguous()
        found.append(batch[:, 0, 0, 0].tolist())
        assert np.array_equal(batch, frames[found[-1]])
    return found


def test_an_epoch_has_each_frame_once_in_whole_batches_and_an_order_of_its_own():
    frames = numbered(100)
    first = order(frames, 8, (0, 0), 24)
    for epoch in (first[:12], first[12:]):
        assert len(set(sum(epoch, []))) == 96, "12 batches, and no frame twice"
    orders = first[:12], first[12:], order(frames, 8, (1, 0), 12), order(frames, 8, (0, 1), 12)
    assert len({str(one) for one in orders}) == 4, "epochs, seeds and ranks"
    assert [first[0], first[12]] == [[82, 36, 20, 5, 93, 16, 94, 52], [74, 67, 17, 45, 35, 40, 15, 33]], "typed"
    for seen in (1, 11, 12, 17):
        assert order(frames, 8, (0, 0), 24 - seen, seen) == first[seen:], "a resumed run sees the rest"


def test_a_large_pack_is_read_in_stretches_in_random_order():
    frames = numbered(100).view(Large)
    first = order(frames, 4, (0, 0), 48)
    assert first[:3] == [[70, 99, 86, 84], [68, 69, 81, 90], [77, 97, 67, 66]], "typed"
    places = [{np.searchsorted([33, 66], number, "right") for number in batch} for batch in first]
    assert all(len(place) == 1 for place in places), "a batch is from one stretch"
    assert [place.pop() for place in places[::8]] == [2, 0, 1, 1, 2, 0]
    assert len(set(sum(first[:24], []))) == 96
    for seen in (3, 8, 23, 24, 30):
        assert order(frames, 4, (0, 0), 48 - seen, seen) == first[seen:]
