"""Plant one fault at a time in a copy of the project, and show which test notices it. CI does not run this.

    python tests/mutants.py                        # about half an hour on a core
    python tests/mutants.py --only latents --jobs 2    # the faults whose file, tests or text have this word

Below, `## file: tests` names a script and the tests that should notice, as pytest takes them. Each line after it is one
fault: the text, `=>`, and what replaces it (nothing: the text is dropped). \\n is a new line, and text occurs once.
"""
import argparse
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for the tests of one fault; a hang is noticed, too
MUTANTS = r"""
## model.py: tests/test_model.py -k "preset or judged or networks or start"
width = ngf * image_size // 8 => width = ngf * 8
padding=(kernel_size - 1) // 2,\n            output_padding => padding=1,\n            output_padding
nn.LeakyReLU(0.2),\n            ]\n            width *= 2\n        layers += [  # => nn.LeakyReLU(0.1),\n            ]\n            width *= 2\n        layers += [  #
nn.init.normal_(module.weight, 0.0, 0.02) => nn.init.normal_(module.weight, 0.0, 0.2)
nn.init.normal_(module.weight, 1.0, 0.02) => nn.init.normal_(module.weight, 0.0, 0.02)
batch_size=128, => batch_size=64,
beta1=0.5, => beta1=0.9,
"radford-64": dict(NAIVE, kernel_size=5, => "radford-64": dict(NAIVE,
weight_decay=0.05, instance_noise=0.05) => weight_decay=0.05)
batch_size=16, lr=4e-4, => batch_size=16,
nn.ReLU(),\n            ]\n            width //= 2 => ]\n            width //= 2
## model.py: tests/test_model.py -k "latent or window or mirror or picture"
torch.Generator().manual_seed(seed) => torch.Generator().manual_seed(seed + 1)
generator = torch.Generator().manual_seed(seed)\n        if latent == "normal" => generator = torch.Generator().manual_seed(seeds[0])\n        if latent == "normal"
row.uniform_(-1, 1, generator=generator) => row.uniform_(0, 1, generator=generator)
side = image_size + size * (H - image_size) => side = image_size + 0 * size
1 - ticks, ticks) if mirror else ticks => 1 - ticks, ticks)
torch.where(flip < 0.5, => torch.where(flip < 0.4,
(top * (H - side) => (0 * top * (H - side)
(left * (W - side) => (left * (H - side)
images = frames.float().permute(0, 3, 1, 2) => images = frames.float().flip(3).permute(0, 3, 1, 2)
align_corners=False) / 127.5 - 1 => align_corners=False) / 255
rows = torch.arange(n) * len(frames) // n => rows = torch.arange(n) % len(frames)
mode="bicubic" => mode="nearest"
[:len(part)]) => )
127.5).round().clamp(0, 255) => 127.5).clamp(0, 255)
.expand(-1, 3, -1, -1)  # a => # a
if G.training: => if False:
row, column = divmod(i, columns) => column, row = divmod(i, columns)
## model.py: tests/test_model.py -k score
distance = 1000 * torch => distance = 900 * torch
.log().mean().exp() => .mean()
distances.kthvalue(6, dim=2) => distances.kthvalue(5, dim=2)
SCORED = 50 => SCORED = 49
smaller = F.avg_pool2d(images, 2) => smaller = F.max_pool2d(images, 2)
F.interpolate(smaller, scale_factor=2, mode="bilinear") => F.interpolate(smaller, scale_factor=2)
while images.shape[-1] > 16: => while images.shape[-1] > 8:
directions @ components / variances.sqrt() @ components.T => directions @ components @ components.T
min=1e-4 * variances[-1] => min=1e-2 * variances[-1]
images = to_grey_levels(images) / 127.5 - 1 => pass
pooled.append(F.max_pool2d( => pooled.append(F.avg_pool2d(
(nearest <= self.radius) => (nearest <= 2 * self.radius)
z = latents(range(self.images), G.nz, latent) => z = latents(range(self.images), G.nz)
z = latents(range(self.images), => z = latents([i % 300 for i in range(self.images)],
spread_windows(train, self.images, image_size) => spread_windows(holdout, self.images, image_size)
with torch.random.fork_rng(devices=[]): => if True:
## model.py: tests/test_model.py -k "run or weights or dictionaries or bit or code or neither or whole or format"
path = saved[-1].parent => path = saved[0].parent
Path(path, "best.pt"), Path(path, "checkpoint.pt") => Path(path, "checkpoint.pt"), Path(path, "best.pt")
damaged = archive.testzip() => damaged = None
weights_only=True => weights_only=False
key.removeprefix("module.") => key
G = rebuild(Generator, "G_ema", content, path) => G = rebuild(Generator, "G", content, path)
.get("latent", "normal") => .get("latents", "normal")
return net.eval().requires_grad_(False) => return net.requires_grad_(False)
temporary = Path(f"{path}.tmp") => temporary = Path(path)
if sync: => if False:
temporary.parent.mkdir(parents=True, exist_ok=True) =>
## train.py: tests/test_step.py -k "losses or loop or learns or adamw or several"
return F.softplus(-on_fake).mean() => return -F.softplus(on_fake).mean()
F.softplus(-on_real).mean() + F => F.softplus(on_real).mean() + F
lr=args.lr, => lr=2e-4,
betas=(args.beta1, 0.999) => betas=(0.5, 0.999)
(args.beta1, 0.999) => (args.beta1, 0.99)
eps=1e-8, => eps=1e-6,
weight_decay=args.weight_decay, => weight_decay=0.0,
self.logits(D, fake.detach())  # => self.logits(D, fake)  #
D.requires_grad_(False)\n        with => with
D.requires_grad_(True) => pass
"D(x)": on_real => "D(x)": on_fake
"D(G(z2))": on_fake_after => "D(G(z2))": on_fake
on_real = self.logits(D, real)\n => on_real = self.logits(D, fake.detach())\n
loss = loss / self.world => loss = loss
self.update(self.opt_G, loss_G) => self.update(self.opt_G, -loss_G)
self.opt_D = device.AdamW(self.D.parameters(), **self.adam) => self.opt_D = device.AdamW(self.D.parameters(), **self.adam | dict(lr=1e-4))
optimizer.zero_grad(set_to_none=True) =>
## train.py: tests/test_step.py -k "average or samples"
rate = (7 / self.steps) => rate = (6 / self.steps)
0.5 ** (n / 20_000) => 0.5 ** (n / 2_000)
.clamp(slowest, 1) => .clamp(0, 1)
self.update_average(len(frames) * self.world)\n        self.update(self.opt_G, loss_G) => self.update(self.opt_G, loss_G)\n        self.update_average(len(frames) * self.world)
self.update_average(len(frames) * self.world) =>
layer.momentum = 1.0 => layer.momentum = 0.1
z = latents(range(512), self.args.nz, self.args.latent) => z = latents(range(512), self.args.nz)
return self.G_ema.eval() => return self.G_ema
## train.py: tests/test_step.py -k "sees or noise or augment or mirror or latents or precision or sizes"
self.args.image_size, self.args.mirror) => self.args.image_size)
if self.args.augment: => if False:
if self.args.instance_noise: => if False:
self.args.instance_noise * noise => 10 * self.args.instance_noise * noise
noise = torch.randn( => noise = torch.rand(
if self.args.latent == "normal" else z.uniform_ => if True else z.uniform_
else z.uniform_(-1, 1) => else z.uniform_(0, 1)
D(images).float()  # => D(images)  #
-(S // 8), S // 8 + 1) => -(S // 8), S // 8)
-(S // 8), S // 8 + 1).floor() => -(S // 4), S // 4 + 1).floor()
return rows @ images @ columns.mT => return rows @ images
if args.precision != "auto": => if False:
args.ndf, kernel_size=args.kernel_size) => args.ndf)
Generator(args.image_size, args.nz, args.ngf, => Generator(args.image_size, args.nz, 64,
## train.py: tests/test_step.py -k "seed or epoch or large or rank"
torch.manual_seed(args.seed) => torch.manual_seed(0)
self.D.apply(init_weights) => pass
SeedSequence((seed, rank, step)) => SeedSequence((seed, rank))
SeedSequence((seed, rank, => SeedSequence((seed, 0,
SeedSequence((seed, => SeedSequence((0,
default_rng((*seeds, epoch)) => default_rng((*seeds, 0))
default_rng((*seeds, => default_rng((seeds[0], 0,
in rng.permutation(stretches): => in stretches:
rows = rng.permutation(stop - start) => rows = np.arange(stop - start)
unseen = rows[skip:] => unseen = rows
skip = max(0, skip - whole) => skip = 0
np.array(frames[start:stop]) => np.array(frames[:stop - start])
## train.py: tests/test_options.py -k "optimizer or lr_is or beta1 or seed or latents or noise or augment or mirror or override"
optimizer.param_groups[0].update(self.adam) => pass
.get("args", {}) | typed => .get("args", {})
defaults | PRESETS.get(preset, {}) | given => defaults | given | PRESETS.get(preset, {})
seed_step(device, args.seed, ranks.rank, run.step) =>
## train.py: tests/test_options.py -k "minutes or saves or log_line or images_are or length_follow or named_after or without_data or init"
>= 10_000: => >= 100_000:
"small-64" if pack.image_size <= 64 else => "small-64" if True else
max(25, math.ceil( => max(1, math.ceil(
math.ceil(500_000 / => math.ceil(50_000 /
minutes=4.5, => minutes=45,
if "data" not in given:\n        defaults |= DEMO => if False:\n        defaults |= DEMO
.removesuffix(f'-{size}') =>
if "resume" not in typed: => if False:
if not 2 <= batch_size <= n: => if False:
unfinished = self.images + self.images_per_step <= self.total => unfinished = self.images <= self.total
self.ends = began + 60 * => self.ends = began + 600 *
pause = max(pause, 40 * => pause = max(pause, 0.4 *
if now >= self.next_save: => if False:
start_from(self.dcgan, find_checkpoint(args.init)) => pass
dcgan.D.load_state_dict(rebuild( => (lambda *_: None)(rebuild(
dcgan.G_ema.load_state_dict(rebuild(Generator, "G_ema", => dcgan.G_ema.load_state_dict(rebuild(Generator, "G",
## train.py: tests/test_resume.py -k "second_save or more_epochs or other_batches or has_scores or best_pt or operation or infinite or own_with or data_is_typed or signals"
seen = run.images // run.images_per_step => seen = 0
in ("G", "D", "G_ema", "opt_G", "opt_D"):\n            getattr => in ("G", "D", "G_ema"):\n            getattr
self.steps.copy_(torch.tensor(float(saved["step"]))) =>
self.scores = saved["scores"] => self.scores = []
purge_step=self.images + 1 if resumed else 0 => purge_step=None
temporary.unlink() => pass
self.keep_best()\n        else: => pass\n        else:
if coverage >= real_coverage / 2] => if True]
if enough and min(enough)[1] == => if enough and max(enough)[1] ==
if not all(weight.isfinite().all() => if False and not all(weight.isfinite().all()
self.save(draw=not self.signum) => pass
sys.exit(128 + run.signum) => sys.exit(0)
score, coverage = self.score(G, self.args.latent) => score, coverage = self.score(G, "uniform")
Score(pack.train, pack.holdout, pack.image_size) => Score(pack.holdout, pack.train, pack.image_size)
self.dcgan.state_dict()  # => copy.deepcopy(self.dcgan.G).state_dict()  #
## train.py: tests/test_ranks.py -k "same_weights or gradients or twice or differ or signal_to_one"
frames[ranks.rank * n:(ranks.rank + 1) * n] => frames[:n]
dist.all_reduce(message)\n => pass\n
seed_step(device, args.seed, ranks.rank, => seed_step(device, args.seed, 0,
self.ranks.check_same(int( => (lambda *_: None)(int(
DCGAN(args, device, ranks.world) => DCGAN(args, device)
images_per_step = args.batch_size * ranks.world => images_per_step = args.batch_size
## prepare_data.py: tests/test_prepare_data.py -k "quarter or renaming or group_by or limit or fewer or sequence or exclude or patch or cities"
"holdout": (float, 0.25, => "holdout": (float, 0.1,
hash_fraction(f"holdout/{frame.group}") => hash_fraction(f"holdout/{frame.path}")
hash_fraction(f"order/{seed}/{frame.group}") => hash_fraction(f"order/{frame.group}")
frame.group}"), frame.number, frame.path => frame.group}"), frame.path
< FEW: => < 0:
elif frame.group == group and => elif
elif path in patched: => elif False:
default=["panorama"] => default=[]
("pano", "True") => ("pano", "False")
if group_by == "folder": => if False:
group = path if msls else inside => group = path
min(len(plan), args.limit or len(plan)) => len(plan)
if plain(frame.city) in chosen) => )
## prepare_data.py: tests/test_prepare_data.py -k "copies or near_duplicates or upright or transparent or profile or hidden or links or packs_and_runs"
SIMILAR = 25 => SIMILAR = 10
SIMILAR = 25 => SIMILAR = 250
differing <= bits and => differing <= 2 * bits and
if not frame.sequence:\n                other => if False:\n                other
"duplicates": (int, 4, => "duplicates": (int, 0,
turn_upright(picture)\n    profile => profile
Image.new("RGB", picture.size, "white") => Image.new("RGB", picture.size, "black")
return to_srgb(frame, profile) if profile else frame => return frame
followlinks=True => followlinks=False
or RESULTS & set(names): => :
if any(map(HIDDEN.match, inside.split("/"))): => if False:
Image.Resampling.HAMMING) => Image.Resampling.HAMMING, centering=(0, 0))
## prepare_data.py: tests/test_prepare_data.py -k "index or fit_on or drawn or pack_json or find_pack or progress or two_programs or identity or mistake"
words = sources or ["--demo", str(DEMO_STREETS)] => words = sources
if n * each > free: => if False:
H = image_size * 5 // 4 => H = image_size
rng = random.Random(f"{seed}/ => rng = random.Random(f"0/
(split, counts[split].total(), => (split, 0,
blake2b(index, digest_size=16) => blake2b(b"", digest_size=16)
if os.path.lexists(out): => if False:
.get("sources") != sources: => .get("sources") == "":
if now - shown > 10: => if now - shown > 100:
## sample.py: tests/test_sample.py -k "options or seed or suffix or real or score or arithmetic or nearest or one_line"
args.seeds or range(64) => args.seeds or range(63)
f"{number:08d}.png" => f"{number:06d}.png"
spread_windows(pack.train, len(args.seeds) => spread_windows(pack.holdout, len(args.seeds)
weights[seed] += int(sign + "1") / len(seeds) => weights[seed] += 1 / len(seeds)
length = math.hypot(*weights.values()) => length = 1
noise[1, 1] = 0 =>
yield view.flip(3) =>
for zoom in (1, 8 / 9, 4 / 5): => for zoom in (1,):
closer = distances < best => closer = distances > -1
return 127.5 * best / 768 ** 0.5 => return best / 768 ** 0.5
distance, coverage = score(G, latent) => distance, coverage = score(G)
pack.image_size != network.image_size: => False:
## interpolate.py: tests/test_sample.py -k "scene or loop or walk or strip or line or arcs or grid"
z.roll(-1, 0) => z.roll(1, 0)
between(a, b, i / frames) => between(a, b, (i + 1) / frames)
slerp if latent == "normal" else torch.lerp => slerp
between = slerp if latent == "normal" else => between = torch.lerp if True else
if angle.sin() < 1e-4: => if False:
duration=1000 // args.fps => duration=40
range(6 * args.scenes) => range(12 * args.scenes)
4 if args.kind == ".png" else 25 => 4
unflatten(0, (args.scenes, -1))  # => unflatten(0, (-1, args.scenes)).transpose(0, 1)  #
## model.py: tests/test_sample.py -k "without_options or tilde or seed"
range(int(first), int(last or first) + 1) => range(int(first), int(last or first) + 0)
return Path(text).expanduser() => return Path(text)
"""


def read_mutants(only):
    """[(file, tests, old text, new text), …]. First each group without a fault: its tests must pass."""
    groups, chosen = {}, []
    for line in MUTANTS.strip().splitlines():
        if line.startswith("## "):
            file, tests = line[3:].split(": ", 1)
        elif only in f"{file} {tests} {line}":
            old, new = (part.strip(" ").replace(r"\n", "\n") for part in re.split("(?<= )=>", line))
            groups[file, tests] = file, tests, "", ""
            chosen.append((file, tests, old, new))
    for file, _, old, new in chosen:
        text = (ROOT / file).read_text()
        assert text.count(old) == 1, f"not once in {file}: {old}"
        compile(text.replace(old, new), file, "exec")  # a syntax error is no fault to test with
    return [*groups.values(), *chosen]


def be_tested(folder, mutant):
    """In a fork, which has imported torch: plant the fault in this copy of the project, and run the tests."""
    file, tests, old, new = mutant
    os.setsid()
    if old:
        (folder / file).write_text((folder / file).read_text().replace(old, new))
    os.chdir(folder)
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))


def verdict(process, folder):
    """The name of the test that failed, "time limit", or None if all passed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # whatever its tests have started
    if process.exitcode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", (folder / "output").read_text(), re.MULTILINE)
    return failed[1] if failed else f"status {process.exitcode}" if process.exitcode else "time limit"


def run_all(mutants, jobs, work):
    """Yield (mutant, verdict) as they end. work: a folder for copies of the project."""
    shutil.copytree(ROOT, work / "0", ignore=shutil.ignore_patterns("runs", "packs", ".git*", "__pycache__"))
    waiting, running = list(enumerate(mutants, 1)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            i, mutant = waiting.pop(0)
            folder = shutil.copytree(work / "0", work / str(i))
            process = multiprocessing.get_context("fork").Process(target=be_tested, args=(folder, mutant))
            process.start()
            running[process] = mutant, folder, time.monotonic() + SECONDS
        connection.wait([process.sentinel for process in running], 5)
        for process, (mutant, folder, end) in list(running.items()):
            if process.exitcode is not None or time.monotonic() > end:
                del running[process]
                yield mutant, verdict(process, folder)
                shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="only faults whose line or header has this text")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time (default: 1)")
    args = parser.parse_args()
    mutants, noticed = read_mutants(args.only), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        for (file, tests, old, new), found in run_all(mutants, args.jobs, Path(work)):
            if not old and found:
                sys.exit(f"without a fault, {tests} fails: {found}")
            if old:
                noticed.append(bool(found))
                print(f"{found or 'SURVIVED':<70} {file}: {old!r:.70} => {new!r:.50}", flush=True)
    print(f"noticed: {sum(noticed)} of {len(noticed)}, {sum(noticed) / len(noticed):.0%}")


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    import PIL.Image  # noqa: F401  the forks need not import these
    import pytest
    import torch.utils.tensorboard  # noqa: F401

    main()
