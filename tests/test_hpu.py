"""`--device hpu` on a simulated Gaudi card (hpu_sim/README.md): the scripts run as Gaudi's users run them.

The simulated release starts in eager mode by default: where PT_HPU_LAZY_MODE is not set here, the scripts set it.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, STATS, TINY, Fork, new_process, run, scalars
from hpu_sim.build import Unavailable, build, without_plugin_lines
from PIL import Image

EAGER = {"PT_HPU_LAZY_MODE": "0"}
OPTIONS = "--weight-decay 1 --instance-noise 0.05 --latent uniform --mirror --augment".split()

# Gaudi's FusedAdamW adds its epsilon before it corrects the bias, and torch's AdamW after that. In the first steps this
# is 1e-6 of an update. It grows, as all differences do in training. The log lines have four decimals.
CLOSE = dict(rtol=2e-3, atol=2e-4)


def at_once(*calls):
    """The results of calls that wait for processes, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def losses(out):
    """(steps, 5): the statistics of each step that the run in `out` has logged."""
    logged = scalars(out)
    return np.array([[value for _, value in logged[name]] for name in STATS]).T


def load(out, name="checkpoint.pt"):
    return torch.load(out / name, weights_only=True)


def equal(a, b):
    """Bit for bit: nested dictionaries of tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def driver(folder, plant):
    """A script: train.py, changed by the lines `plant` before its main() runs."""
    path = folder / "driver.py"
    path.write_text("import os, sys\nos.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'  # as train.py does\n"
                    f"sys.path.insert(0, {str(ROOT)!r})\nimport train, torch\n{plant}\n"
                    "train.run_script(train.main)\n")
    return path


@pytest.fixture(scope="module")
def card():
    """The environment in which the simulated card exists."""
    try:
        return build()
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """A pack of 64 drawn streets, all for training: four steps per epoch, no score."""
    folder = tmp_path_factory.mktemp("packs") / "streets"
    run("prepare_data.py", "--demo", 64, "--image-size", 32, "--holdout", 0, "--duplicates", 0, folder)
    return folder


@pytest.fixture(scope="module")
def train_on(card, streets, tmp_path_factory):
    """train_on(device, *options, …) runs train.py → out (its folder), losses, report (the card's), stdout, warnings.

    stderr has the plugin's banner, its three warnings in eager mode, and `warnings` lines of train.py.
    """
    def train(device, *options, script="train.py", data=streets, out=None, epochs=3, log_seconds=0, precision="fp32",
              env=(), warnings=0, status=0, popen=Fork):
        folder = tmp_path_factory.mktemp("run")
        out, env = out or folder / "run", dict(env)
        if device == "hpu":
            env = {**card, "HPU_SIM_REPORT": str(folder / "card.json"), **env}
        done = run(script, *TINY, "--device", device, "--data", data, "--out", out, "--epochs", epochs, "--log-seconds",
                   log_seconds, "--precision", precision, *options, env=env, status=status, popen=popen)
        report = json.loads((folder / "card.json").read_text()) if device == "hpu" else {}
        ours = without_plugin_lines(done.stderr)
        assert len(ours) == warnings, done.stderr
        eager = 3 if report.get("mode") == "eager" else 0
        assert done.stderr.count("does not have any effect. It's lazy mode only") == eager, done.stderr
        return SimpleNamespace(out=out, losses=losses(out), report=report, stdout=done.stdout, warnings=ours)
    return train


@pytest.fixture(scope="module")
def runs(train_on):
    """The same 12 steps on the CPU, and on the card in both modes."""
    kinds = {"cpu": ("cpu", {}), "lazy": ("hpu", {}), "eager": ("hpu", EAGER)}
    done = at_once(*(lambda kind=kind, env=env: train_on(kind, *OPTIONS, env=env) for kind, env in kinds.values()))
    return dict(zip(kinds, done))


both = pytest.mark.parametrize("mode", ["lazy", "eager"])


# ---- what a step computes -------------------------------------------------------------------------------------------

@both
def test_losses_on_the_card_follow_the_cpus_step_for_step(mode, runs):
    seen, expected, report = runs[mode].losses, runs["cpu"].losses, runs[mode].report
    assert len(seen) == len(expected) == 12
    np.testing.assert_allclose(seen, expected, **CLOSE)
    np.testing.assert_allclose(seen[0], expected[0], rtol=1e-6, err_msg="before the first update only rounding differs")
    assert report["mode"] == mode and report["fallbacks"] == {}
    assert {"aten::convolution_overrideable", "hpu::optimizer_adamw"} <= set(report["ops"])


@both
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(mode, runs, train_on, tmp_path):
    out, env = tmp_path / "run", EAGER if mode == "eager" else {}
    stop = driver(tmp_path, """
step = train.DCGAN.step
def stopped_in_the_sixth(self, frames, calls=[]):
    calls.append(frames)
    if len(calls) == 6:
        os.kill(os.getpid(), 15)
    return step(self, frames)
train.DCGAN.step = stopped_in_the_sixth""")
    train_on("hpu", *OPTIONS, script=stop, out=out, env=env, status=128 + 15)
    assert load(out)["step"] == 6
    train_on("hpu", "--resume", out=out, env=env)
    resumed, expected = load(out), load(runs[mode].out)
    for saved in (resumed, expected):
        for state in (*saved["opt_G"].values(), *saved["opt_D"].values()):
            state.pop("step", None)  # Gaudi's optimizer counts in the group, and neither reads nor changes this one
    assert equal(resumed, expected)


def test_a_run_moves_to_the_card_and_back_as_if_nothing_had_changed(runs, train_on, tmp_path):
    def go_on(name, *stages):
        out = shutil.copytree(runs["cpu"].out, tmp_path / name)
        return [train_on(device, "--resume", out=out, epochs=epochs) for device, epochs in stages]
    (to, back), (stayed,) = at_once(lambda: go_on("moved", ("hpu", 6), ("cpu", 9)), lambda: go_on("stayed", ("cpu", 9)))
    np.testing.assert_allclose(back.losses, stayed.losses, rtol=0, atol=5e-3)
    saved = load(back.out)
    counts = {int(state["step"]) for name in ("opt_G", "opt_D") for state in saved[name].values()}
    assert counts == {saved["step"]} == {36}, "the bias correction continues"


def test_gaudis_optimizer_gets_the_presets_numbers_and_torchs_epsilon(card):
    done = subprocess.run([sys.executable, "-c", """
import json, train
device = train.set_up_device(train.parse_args(["--device", "hpu", "--precision", "fp32"]))
for preset in ("naive-64", "safe-128"):
    model = train.DCGAN(train.parse_args(["--preset", preset, "--ngf", "1", "--ndf", "1"]), device)
    for optimizer in (model.opt_G, model.opt_D):
        group = optimizer.param_groups[0]
        print(json.dumps([type(optimizer).__name__, *(group[key] for key in "lr betas eps weight_decay".split())]))
"""], cwd=ROOT, env={**os.environ, **card}, capture_output=True, text=True)
    naive, safe = (["FusedAdamW", 2e-4, [0.5, 0.999], 1e-8, decay] for decay in (0, 0.05))
    assert [json.loads(line) for line in done.stdout.splitlines()] == [naive, naive, safe, safe], done.stderr


# ---- graphs and waits -----------------------------------------------------------------------------------------------

def waits(report):
    """{optimizer steps finished before it: how often the host waited for the card}. Two of them are a training step."""
    steps, found = 0, Counter()
    for event in report["events"]:
        steps += event == "upload:step"
        if event.startswith("sync:"):
            found[steps] += 1
    assert steps == report["optimizer_steps"], "all events are there"
    return found


def check_lazy(report, logs, saves, begun=0, more=0):
    """Check a lazy run that began at step `begun` and logged and saved after these steps. It may have `more` graphs.

    A graph that is compiled again because its inputs have another layout is not counted: this is normal in the second
    and the third step, and in a save.
    """
    logs, saves = ({2 * (step - begun) for step in steps} for steps in (logs, saves))
    graphs = report["graph_steps"]
    assert report["mode"] == "lazy"
    assert report["fallbacks"] == {}, "fall-backs to the CPU"
    assert set(waits(report)) <= logs | saves, "waits for the card in other steps than logged ones and saves"
    assert len(graphs) <= 10 + more, "graphs: six for training, three for the first save, one for later saves"
    assert len([step for step in graphs if step not in saves]) <= more + (4 if 0 in saves else 6), "graphs for training"
    assert not [step for step in graphs if step >= 2 * 3 and step not in saves], "graphs after the third step"
    again = [step for step in report["layout_steps"] if step not in saves]
    assert max(again) < 2 * 3, "graphs compiled again after the third step"


@pytest.fixture(scope="module")
def scored(train_on, tmp_path_factory):
    """(pack, run of 301 steps that scored its first and last pictures, the same resumed for 35 steps)."""
    pack = tmp_path_factory.mktemp("packs") / "scored"
    run("prepare_data.py", "--demo", 240, "--image-size", 32, "--holdout", 0.4, pack)  # 124 frames to train on
    first = train_on("hpu", *OPTIONS, precision="bf16", data=pack, epochs=43, log_seconds=1000)
    resumed = train_on("hpu", *OPTIONS, "--resume", precision="bf16", data=pack, out=first.out, epochs=48,
                       log_seconds=1000)
    return pack, first, resumed


def test_a_run_compiles_six_graphs_for_training_and_waits_only_to_log_and_to_save(scored, train_on):
    _, long, resumed = scored
    check_lazy(long.report, {1, 301}, {0, 301})
    check_lazy(resumed.report, {302, 336}, {336}, begun=301)
    assert (long.out / "scores.csv").read_text().count("\n") == 1 + 2 + 1
    short = train_on("hpu", *OPTIONS, precision="bf16", log_seconds=1000)
    check_lazy(short.report, {1, 12}, {0, 12})
    in_training = [[step for step in run.report["graph_steps"] if 0 < step < 24] for run in (long, short)]
    assert in_training[0] == in_training[1], "as many in 301 steps as in 12"


FAULTS = {
    "batches that are views at changing offsets": ("graphs", """
batches = train.batches
def of_one_upload(*args):
    one_by_one = batches(*args)
    while True:
        yield from torch.cat([next(one_by_one) for _ in range(64)]).to("hpu").split(16)
train.batches = of_one_upload"""),
    "swa_utils.update_bn": ("graphs", """
def sampler(self):
    z = train.latents(range(512), self.args.nz, self.args.latent).split(64)
    torch.optim.swa_utils.update_bn((part.to("hpu") for part in z), self.G_ema)
    return self.G_ema.eval()
train.DCGAN.sampler = sampler"""),
    "a slice with Python numbers in the step": ("graphs", """
cut_windows = train.cut_windows
def at(frames, *args, calls=[]):
    calls.append(len(calls) % 8)
    return cut_windows(frames[:, :, calls[-1]:calls[-1] + 40], *args)
train.cut_windows = at"""),
    "weights that are uploaded again in a later step": ("compiled again", """
step = train.DCGAN.step
def step_and_upload(self, frames, calls=[]):
    calls.append(frames)
    if len(calls) == 6:
        for weight in self.G.parameters():
            weight.data.copy_(0.02 * torch.randn(weight.shape))
    return step(self, frames)
train.DCGAN.step = step_and_upload"""),
    "bytes that are permuted": ("fall-backs", """
cut_windows = train.cut_windows
def permuted(frames, *args):
    frames.permute(0, 3, 1, 2)
    return cut_windows(frames, *args)
train.cut_windows = permuted"""),
    "pictures that become bytes on the card": ("fall-backs", """
render = train.render
def on_the_card(G, z, *args):
    with torch.no_grad():
        G(z.to("hpu")).to(torch.uint8)
    return render(G, z, *args)
train.render = on_the_card"""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_a_planted_fault(fault, train_on, tmp_path):
    words, plant = FAULTS[fault]
    report = train_on("hpu", *OPTIONS, script=driver(tmp_path, plant), precision="bf16",
                      log_seconds=1000).report
    with pytest.raises(AssertionError, match=words):
        check_lazy(report, {1, 12}, {0, 12})


def test_compile_takes_eager_mode_and_compiles_in_the_first_steps_alone(train_on):
    report = train_on("hpu", *OPTIONS, "--compile", "--save-minutes", 0, precision="bf16",
                      env={"PT_HPU_LAZY_MODE": "1"}).report  # as older launch scripts set it
    assert report["mode"] == "eager" and report["fallbacks"] == {}
    assert 2 <= report["compiles"] <= 4 and max(report["compile_steps"]) < 4


def shifted(card, plant=""):
    """How many of 4,096 images train.translate shifts differently on the card, in bf16, and on the CPU, in fp32."""
    code = f"""
import sys
import torch, train
device = train.choose_device("hpu")
{plant}
images = torch.ones(4096, 1, 16, 16)
torch.manual_seed(0)
on_cpu = train.translate(images)
torch.manual_seed(0)
with torch.autocast("hpu", torch.bfloat16):
    on_card = train.translate(images.to("hpu"))
print((on_card.cpu().float() != on_cpu).flatten(1).any(1).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **card}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_images_are_shifted_on_the_card_as_on_the_cpu(card):
    assert shifted(card) == 0


def test_that_check_finds_shifts_in_bf16(card):
    assert shifted(card, """
def translate(images):
    S = images.shape[-1]
    pixels = torch.arange(S, device=images.device)
    shifts = (torch.rand(2, len(images), 1, 1, 1, device=images.device) * (S // 4 + 1)).floor() - S // 8
    rows, columns = (pixels[:, None] == pixels + shifts).to(images.dtype)
    return rows @ images @ columns.mT
train.translate = translate""") > 0


# ---- the plugin's own files and words -------------------------------------------------------------------------------

def test_a_metrics_file_has_what_the_readme_says(train_on, tmp_path):
    env = {"PT_HPU_METRICS_FILE": str(tmp_path / "metrics.json"),
           "PT_HPU_METRICS_DUMP_TRIGGERS": "process_exit,metric_change"}
    report = train_on("hpu", *OPTIONS, env=env).report
    entries = json.loads((tmp_path / "metrics.json").read_text())
    last = {entry["metric_name"]: entry["statistics"]["TotalNumber"] for entry in entries}
    assert last["graph_compilation"] == report["graphs"] + report["layout_graphs"]
    assert last["cpu_fallback"] == 0


def test_a_metrics_file_without_a_folder_ends_the_run(card, streets, tmp_path):
    env = {**os.environ, **card, "PT_HPU_METRICS_FILE": "metrics.json",
           "PT_HPU_METRICS_DUMP_TRIGGERS": "process_exit,metric_change"}
    words = [sys.executable, ROOT / "train.py", *TINY, "--device", "hpu", "--data", streets, "--out", tmp_path / "a"]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "No such file or directory: ''" in done.stderr


def test_too_little_memory_is_one_line(card, streets, tmp_path):
    stderr = run("train.py", *TINY, "--device", "hpu", "--data", streets, "--out", tmp_path / "a", status=2,
                 env={**card, "HPU_SIM_MEMORY": "1000000"}).stderr
    line, = without_plugin_lines(stderr)
    assert "--batch-size" in line


# ---- files and pictures ---------------------------------------------------------------------------------------------

def test_files_saved_on_the_card_open_where_there_is_no_plugin(runs):
    files = [path.name for path in runs["lazy"].out.glob("*.pt")]
    assert {"checkpoint.pt", "generator-000000192.pt"} <= set(files)
    for file in files:
        weights = load(runs["lazy"].out, file)["G_ema"]  # load fails with card tensors
        assert weights["main.0.weight"].device.type == "cpu"


@pytest.mark.parametrize("script, words", [("sample.py", ["--n", 70]), ("interpolate.py", ["--frames", 20])])
def test_pictures_drawn_on_the_card_are_those_of_the_cpu(script, words, runs, card, tmp_path):
    words = "--checkpoint", runs["lazy"].out, "--scale", 2, *words
    env = {**card, "HPU_SIM_REPORT": str(tmp_path / "card.json")}
    at_once(lambda: run(script, *words, "--device", "cpu", "--out", tmp_path / "cpu.png"),
            lambda: run(script, *words, "--device", "hpu", "--out", tmp_path / "hpu.png", env=env))
    cpu, hpu = (np.asarray(Image.open(tmp_path / name), int) for name in ("cpu.png", "hpu.png"))
    assert abs(cpu - hpu).max() <= 1
    report = json.loads((tmp_path / "card.json").read_text())
    assert report["graphs"] == 1 and report["syncs"] == 2 and report["fallbacks"] == {}, "one graph for both batches"


def test_nearest_and_features_run_on_the_cpu_and_say_so(scored, card, tmp_path):
    pack, trained, _ = scored
    def examine(option, *words):
        env = {**card, "HPU_SIM_REPORT": str(tmp_path / option)}
        return run("sample.py", "--device", "hpu", "--checkpoint", trained.out, option, pack, *words, env=env)
    both = at_once(lambda: examine("--nearest", "--n", 4, "--out", tmp_path / "a.png"), lambda: examine("--features"))
    for option, done in zip(("--nearest", "--features"), both):
        lines = done.stdout.splitlines() + without_plugin_lines(done.stderr)
        assert len([line for line in lines if "CPU" in line]) == 1
        report = tmp_path / option
        assert not report.exists() or json.loads(report.read_text())["ops"] == {}


# ---- several cards --------------------------------------------------------------------------------------------------

def test_two_cards_share_the_data_and_have_the_same_weights(card, streets, tmp_path):
    script = driver(tmp_path, f"""
frames, noise, main, batches, step = [], [], train.main, train.batches, train.DCGAN.step
def seen(*args):
    for batch in batches(*args):
        frames.append(batch.clone())
        yield batch
def seen_step(*args):
    noise.append(torch.hpu.get_rng_state())
    return step(*args)
def main_and_what_it_saw():
    model = main()
    saw = dict(model=model.state_dict(), frames=torch.cat(frames), noise=torch.stack(noise))
    torch.save(saw, {str(tmp_path)!r} + "/rank" + os.environ["RANK"], pickle_protocol=2)
train.main, train.batches, train.DCGAN.step = main_and_what_it_saw, seen, seen_step""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, *TINY,
               *OPTIONS, "--device", "hpu", "--data", streets, "--out", tmp_path / "a", "--epochs", 4,
               "--log-seconds", 0]
    env = {**os.environ, **card, "HPU_SIM_CARDS": "2", "HPU_SIM_REPORT": str(tmp_path / "card.json")}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "a")) == 8 and "2 × hpu" in done.stdout, "16 images per card: 4 epochs of 2 steps"
    ranks = [load(tmp_path, f"rank{rank}") for rank in (0, 1)]
    a, b = ({(net, key): value for net in ("G", "D", "G_ema") for key, value in rank["model"][net].items()
             if key.endswith(("weight", "bias"))} for rank in ranks)
    assert equal(a, b)
    frames = [{frame.numpy().tobytes() for frame in rank["frames"]} for rank in ranks]
    assert len(frames[0]) == len(frames[1]) == 32 and not frames[0] & frames[1]
    assert len({state.numpy().tobytes() for rank in ranks for state in rank["noise"]}) == 2 * 8, "no noise is repeated"
    for rank in (0, 1):
        report = json.loads((tmp_path / f"card.json.{rank}").read_text())
        check_lazy(report, range(1, 9), {0, 8}, more=2)  # the all-reduce cuts D's update in two, and G's
        assert "hccl::allreduce" in report["ops"]
        assert report["events"].count("mark:hccl") == 2 * 8, "one all-reduce for each update"


FAILING_RANK = """
open(os.path.join(os.path.dirname(__file__), "pid" + os.environ["RANK"]), "w").write(str(os.getpid()))
step = train.DCGAN.step
def failing(self, frames, calls=[]):
    calls.append(frames)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise train.InputError("this rank fails")
    return step(self, frames)
train.DCGAN.step = failing"""


def run_failing_rank(script, card, streets, timeout):
    """(exit status, output) of two ranks under torchrun. Raises TimeoutExpired this many seconds after the failure."""
    folder = script.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, *TINY,
               "--device", "hpu", "--data", streets, "--out", folder / "run", "--epochs", 4]
    job = subprocess.Popen(list(map(str, command)), env={**os.environ, **card, "HPU_SIM_CARDS": "2"},
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    with job:
        for line in job.stdout:
            output.append(line)
            if "this rank fails" in line:
                break
        try:
            job.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in [job.pid, *(int(path.read_text()) for path in folder.glob("pid*"))]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise
        output += job.stdout
    return job.returncode, "".join(output)


def test_a_rank_that_fails_ends_the_job_with_its_one_error_line(card, streets, tmp_path):
    status, output = run_failing_rank(driver(tmp_path, FAILING_RANK), card, streets, timeout=60)
    assert status != 0 and output.count("error: this rank fails") == 1


def test_that_check_finds_a_rank_that_waits_for_the_others_at_its_end(card, streets, tmp_path):
    plant = f"{FAILING_RANK}\nfrom types import SimpleNamespace\ntrain.atexit = SimpleNamespace(register=print)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_failing_rank(driver(tmp_path, plant), card, streets, timeout=20)


# ---- the lists of ops -----------------------------------------------------------------------------------------------

def test_files_replace_the_plugins_lists(runs, train_on, tmp_path):
    (tmp_path / "low").write_text("dot\n")
    (tmp_path / "high").write_text("conv2d\nconv_transpose2d\nbatch_norm\nrelu\nleaky_relu\ntanh\nmatmul\nsoftplus\n")
    low, high = (os.path.relpath(tmp_path / name) for name in ("low", "high"))
    script = driver(tmp_path, "import atexit\natexit.register(lambda: print(sorted(\n"
                              "    path for name, path in os.environ.items() if name.endswith('_OPS_LIST'))))")
    mixed, fp32 = at_once(
        lambda: train_on("hpu", *OPTIONS, script=script, precision="bf16", popen=new_process),
        lambda: train_on("hpu", *OPTIONS, "--bf16-ops", low, "--hmp-fp32", high, script=script, precision="bf16"))
    assert abs(mixed.losses - runs["lazy"].losses).max() > 1e-3, "bf16 shows"
    np.testing.assert_allclose(fp32.losses, runs["lazy"].losses, **CLOSE)
    assert mixed.stdout.splitlines()[-1] == "[]", "without options the plugin's own lists apply"
    assert fp32.stdout.splitlines()[-1] == str([str(tmp_path / "high"), str(tmp_path / "low")]), "absolute paths"


def test_a_list_with_windows_line_ends_is_refused_with_the_cure(tmp_path):
    """The plugin would find no op in it, and train in fp32 without a word."""
    (tmp_path / "ops").write_bytes(b"conv2d\r\nconv_transpose2d\r\n")
    refused = run("train.py", "--bf16-ops", "ops", "--device", "cpu", cwd=tmp_path, status=2)
    cure = re.search("sed .*", refused.stderr)[0]
    subprocess.run(cure, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "ops").read_bytes() == b"conv2d\nconv_transpose2d\n"


def test_old_launch_scripts_start_a_run(train_on, tmp_path):
    """One line says which flags have no effect."""
    (tmp_path / "ops").write_text("conv2d\n")
    lists = "--hmp-bf16", tmp_path / "ops", "--hmp-fp32", tmp_path / "ops"
    words = "--hmp", "--hmp-opt-level", "O1", "--hmp-verbose", *lists
    done = train_on("hpu", *words, epochs=1, precision="bf16")
    assert done.stdout.count("without effect: --hmp, --hmp-opt-level, --hmp-verbose") == 1
    assert len(done.losses) == 4


def test_names_that_torch_does_not_know_and_other_devices_are_no_errors(train_on, tmp_path):
    """Habana's published lists have such names. One launch script serves all devices."""
    (tmp_path / "ops").write_bytes(b"conv2d\ncross_entropy\niadd\n\n# a comment \xff\ntruediv\n")
    words = "--hmp-bf16", tmp_path / "ops", "--fp32-ops", tmp_path / "ops"
    hpu, cpu = at_once(*(lambda device=device: train_on(device, *words, epochs=1, precision="bf16", warnings=2)
                         for device in ("hpu", "cpu")))
    assert len(hpu.losses) == len(cpu.losses) == 4
    for warning in (*hpu.warnings, *cpu.warnings):
        assert warning.startswith("warning: ")
        assert all(repr(name) in warning for name in ("cross_entropy", "iadd", "", "# a comment \ufffd", "truediv"))
    assert cpu.stdout.count("torch.autocast") == 1 and "torch.autocast" not in hpu.stdout


def test_a_missing_list_is_an_error(tmp_path):
    done = run("train.py", "--bf16-ops", "no/such/file", "--device", "cpu", cwd=tmp_path, status=2)
    assert "no/such/file" in done.stderr and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


# ---- where something is missing -------------------------------------------------------------------------------------

def check_refusal(script, env, reason, cwd):
    """--device hpu without a usable card is one line and status 2."""
    stderr = run(script, "--device", "hpu", env=env, cwd=cwd, status=2).stderr
    assert "--device hpu" in stderr and reason in stderr and len(stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["train.py", "sample.py", "interpolate.py"])
def test_without_a_card_one_line_says_why(script, card, tmp_path):
    at_once(lambda: check_refusal(script, {}, "docs.habana.ai", tmp_path),
            lambda: check_refusal(script, {**card, "HPU_SIM_CARDS": "0"}, "no Gaudi card", tmp_path),
            lambda: check_refusal(script, {**card, "HPU_SIM_BUSY": "1"}, "Device acquire failed", tmp_path))


@pytest.mark.parametrize("machine, reason, choose", [
    ("busy", "Device acquire failed", "torch.hpu.is_available()"),
    ("without a card", "no Gaudi card", "torch.hpu.get_device_name() is not None"),
])
def test_that_check_finds_a_script_that_looks_at_one_sign_of_a_card(machine, reason, choose, card, streets, tmp_path):
    script = driver(tmp_path, f"""
def choose_device(name, *rank):
    import habana_frameworks.torch.core
    if {choose}:
        return torch.device("hpu")
train.choose_device = choose_device
sys.argv += ["--data", {str(streets)!r}, "--image-size", "32", "--batch-size", "16"]""")
    env = {"HPU_SIM_BUSY": "1"} if machine == "busy" else {"HPU_SIM_CARDS": "0"}
    with pytest.raises(AssertionError, match="(?s)Traceback.*Device acquire failed"):
        check_refusal(script, {**card, **env}, reason, tmp_path)


def test_auto_takes_a_free_card_or_else_the_cpu(card, streets, runs, tmp_path):
    train, busy = [*TINY, "--data", streets, "--epochs", 1], {**card, "HPU_SIM_BUSY": "1"}
    free, *others = at_once(
        lambda: run("train.py", *train, "--out", tmp_path / "free", env=card),
        lambda: run("train.py", *train, "--out", tmp_path / "busy", env=busy),
        lambda: run("sample.py", "--checkpoint", runs["cpu"].out, "--out", tmp_path / "samples.png", env=busy),
        lambda: run("interpolate.py", "--checkpoint", runs["cpu"].out, "--out", tmp_path / "walk.png", env=busy))
    assert "1 × hpu" in free.stdout and without_plugin_lines(free.stderr) == [] and "1 × cpu" in others[0].stdout
    for done in others:
        assert "Device acquire failed" in done.stderr and "CPU" in done.stderr and len(done.stderr.splitlines()) == 1
