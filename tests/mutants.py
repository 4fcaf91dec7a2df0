"""Plant one fault at a time in a copy of the project, and show which test notices it. CI does not run this.

    python tests/mutants.py                        # about half an hour on a core
    python tests/mutants.py --only latents         # the faults whose file, tests or text have this word

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
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for the tests of one fault; a hang is noticed, too
MUTANTS = r"""
## model.py: tests/test_model.py -k "preset or judged or examples"
width = ngf * image_size // 8 => width = ngf * 8
batch_size=128, => batch_size=64,
ndf=16, lr=4e-4) => ndf=16)
## model.py: tests/test_step.py -k "of_the_paper or mirror"
torch.where(flip < 0.5, => torch.where(flip < 0.4,
nn.init.normal_(module.weight, 1.0, 0.02) => nn.init.normal_(module.weight, 0.0, 0.02)
## model.py: tests/test_model.py tests/test_sample.py -k "latent or window or picture or grid"
torch.Generator().manual_seed(seed) => torch.Generator().manual_seed(seed + 1)
1 - ticks, ticks) if mirror else ticks => 1 - ticks, ticks)
align_corners=False) / 127.5 - 1 => align_corners=False) / 255
[:len(part)]) => )
row, column = divmod(i, columns) => column, row = divmod(i, columns)
## model.py: tests/test_model.py -k score
score = 1000 * torch => score = 900 * torch
distances.kthvalue(6, dim=2) => distances.kthvalue(5, dim=2)
while images.shape[-1] > 16: => while images.shape[-1] > 8:
(nearest <= self.radius) => (nearest <= 2 * self.radius)
z = latents(range(self.images), => z = latents([i % 300 for i in range(self.images)],
## model.py: tests/test_model.py -k "run or weights or dictionaries or damaged or neither or whole"
path = saved[-1].parent => path = saved[0].parent
path / "best.pt", path / "checkpoint.pt" => path / "checkpoint.pt", path / "best.pt"
damaged = archive.testzip() => damaged = None
G = rebuild(Generator, "G_ema", content, path) => G = rebuild(Generator, "G", content, path)
if sync: => if False:
## train.py: tests/test_step.py -k "losses or loop or adamw or average"
return F.softplus(-on_fake).mean() => return -F.softplus(on_fake).mean()
lr=args.lr, => lr=2e-4,
betas=(args.beta1, 0.999) => betas=(0.5, 0.999)
eps=1e-8, => eps=1e-6,
"D(G(z2))": on_fake_after => "D(G(z2))": on_fake
optimizer.zero_grad(set_to_none=True) =>
## train.py: tests/test_step.py -k "average or samples"
rate = (7 / self.steps) => rate = (6 / self.steps)
layer.momentum = 1.0 => layer.momentum = 0.1
## train.py: tests/test_step.py -k "noise or augment or mirror or latents or sizes"
self.args.image_size, self.args.mirror) => self.args.image_size)
if self.args.augment: => if False:
if self.args.instance_noise: => if False:
self.args.instance_noise * noise => 10 * self.args.instance_noise * noise
if self.args.latent == "normal" else z.uniform_ => if True else z.uniform_
self.D(images).float()  # => self.D(images)  #
if args.precision != "auto": => if False:
args.ndf, kernel_size=args.kernel_size) => args.ndf)
## train.py: tests/test_step.py -k "seed or epoch or large or rank"
torch.manual_seed(args.seed) => torch.manual_seed(0)
SeedSequence((seed, => SeedSequence((0,
in rng.permutation(stretches): => in stretches:
np.array(frames[start:stop]) => np.array(frames[:stop - start])
## train.py: tests/test_options.py -k "override"
optimizer.param_groups[0].update(self.adam) => pass
## train.py: tests/test_options.py -k "minutes or saves or log_line or images_are or length_follow or named_after or without_data or init or mistake"
>= 10_000: => >= 100_000:
max(25, math.ceil( => max(1, math.ceil(
if "data" not in given:\n        defaults |= DEMO => if False:\n        defaults |= DEMO
if "resume" not in typed: => if False:
pause = max(pause, 40 * => pause = max(pause, 0.4 *
if now >= self.next_save: => if False:
dcgan.D.load_state_dict(rebuild( => (lambda *_: None)(rebuild(
## train.py: tests/test_resume.py -k "second_save or more_epochs or other_batches or has_scores or best_pt or operation or infinite or own_with or data_is_typed or signals"
seen = run.images // run.images_per_step => seen = 0
purge_step=self.images + 1 if resumed else 0 => purge_step=None
if coverage >= real_coverage / 2} => if True}
<= 1.1 * min(enough.values() => <= 1.0 * min(enough.values()
score, coverage = self.score(G, self.args.latent) => score, coverage = self.score(G, "uniform")
## train.py: tests/test_ranks.py -k "same_weights or gradients or twice or differ or signal_to_one"
loss = loss / self.world => loss = loss
frames[ranks.rank * n:(ranks.rank + 1) * n] => frames[:n]
seed_step(device, args.seed, ranks.rank, => seed_step(device, args.seed, 0,
images_per_step = args.batch_size * ranks.world => images_per_step = args.batch_size
## prepare_data.py: tests/test_prepare_data.py -k "quarter or renaming or group_by or limit or fewer or sequence or exclude or patch or cities"
"holdout": (float, 0.25, => "holdout": (float, 0.1,
hash_fraction(f"order/{seed}/{frame.group}") => hash_fraction(f"order/{frame.group}")
elif frame.group == group and => elif
if group_by == "folder": => if False:
if plain(frame.city) in chosen) => )
## prepare_data.py: tests/test_prepare_data.py -k "copies or near_duplicates or upright or transparent or profile or hidden or links or packs_and_runs"
SIMILAR = 25 => SIMILAR = 10
"duplicates": (int, 4, => "duplicates": (int, 0,
return to_srgb(frame, profile) if profile else frame => return frame
or RESULTS & set(names): => :
## prepare_data.py: tests/test_prepare_data.py -k "index or fit_on or drawn or pack_json or find_pack or progress or two_programs or identity or mistake"
words = sources or ["--demo", str(DEMO_STREETS)] => words = sources
H = image_size * 5 // 4 => H = image_size
blake2b(index, digest_size=16) => blake2b(b"", digest_size=16)
## sample.py: tests/test_sample.py -k "options or seed or suffix or real or score or arithmetic or nearest or one_line"
args.seeds or range(64) => args.seeds or range(63)
spread_windows(pack.train, len(args.seeds) => spread_windows(pack.holdout, len(args.seeds)
noise[1, 1] = 0 =>
return 127.5 * best / 768 ** 0.5 => return best / 768 ** 0.5
pack.image_size != network.image_size: => False:
## interpolate.py: tests/test_sample.py -k "scene or loop or walk or strip or line or arcs or grid"
z.roll(-1, 0) => z.roll(1, 0)
if angle.sin() < 1e-4: => if False:
4 if args.kind == ".png" else 25 => 4
## model.py: tests/test_sample.py -k "without_options or tilde or seed"
range(int(first), int(last or first) + 1) => range(int(first), int(last or first) + 0)
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


def test_that_fails(mutant):
    """The name of the test that fails with this fault, "time limit", or None if all pass."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("runs", "packs", ".git*", "__pycache__"))
        process = multiprocessing.get_context("fork").Process(target=be_tested, args=(copy, mutant))
        process.start()
        process.join(SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever its tests have started, too
        process.join()
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", (copy / "output").read_text(), re.MULTILINE)
        return failed[1] if failed else "time limit" if process.exitcode else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="only faults whose line or header has this text")
    mutants, noticed = read_mutants(parser.parse_args().only), []
    for mutant in mutants:
        file, tests, old, new = mutant
        found = test_that_fails(mutant)
        if not old and found:
            sys.exit(f"without a fault, {tests} fails: {found}")
        if old:
            noticed.append(bool(found))
            print(f"{found or 'SURVIVED':<70} {file}: {old!r:.70} => {new!r:.50}", flush=True)
    print(f"noticed: {sum(noticed)} of {len(noticed)}")


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    import PIL.Image  # noqa: F401  the forks need not import these
    import pytest
    import torch.utils.tensorboard  # noqa: F401

    main()
