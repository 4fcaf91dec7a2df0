"""`--device hpu` on a simulated Gaudi card (hpu_sim/README.md): the scripts run as Gaudi's users run them.

The simulated release starts in eager mode by default: where PT_HPU_LAZY_MODE is not set here, the scripts set it.
"""
import json
import re
import subprocess
import sys
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, STATS, TINY, content, make_pack, new_process, ranks, run, same, scalars
from hpu_sim.build import build
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulated card needs Linux (LD_PRELOAD)")

OPTIONS = "--weight-decay 1 --instance-noise 0.05 --latent uniform --mirror --augment".split()

# Gaudi's FusedAdamW adds its epsilon before it corrects the bias, and torch's AdamW after that. In the first steps this
# is 1e-6 of an update. It grows, as all differences do in training. The log lines have four decimals.
CLOSE = dict(rtol=2e-3, atol=2e-4)

# Lines that run before train.py. The card has random numbers of its own. To compare its arithmetic with the CPU's, all
# draws for the card are made on the host.
HOST_DRAWS = """
import torch
def drawn_on_the_host(draw):
    return lambda *args, device=None, **options: draw(*args, **options).to(device)
def filled_from_the_host(fill):
    return lambda tensor, *args, **options: tensor.copy_(fill(torch.empty(tensor.shape), *args, **options))
torch.rand, torch.randn = drawn_on_the_host(torch.rand), drawn_on_the_host(torch.randn)
torch.Tensor.normal_ = filled_from_the_host(torch.Tensor.normal_)
torch.Tensor.uniform_ = filled_from_the_host(torch.Tensor.uniform_)
import train
"""

# What each step drew, saw and returned, as a file. Nothing waits for the card before the run has ended.
RECORD = """
import torch
import train
seen = {"latents": [], "frames": [], "stats": []}
draw_latents, step, main = train.DCGAN.draw_latents, train.DCGAN.step, train.main
def draw_and_record(self, n):
    seen["latents"].append(draw_latents(self, n))
    return seen["latents"][-1]
def step_and_record(self, frames):
    seen["frames"].append(frames)
    seen["stats"].append(step(self, frames))
    return seen["stats"][-1]
def main_and_record(*args):
    try:
        dcgan = main(*args)
        seen["weights"] = {name: getattr(dcgan, name).state_dict() for name in ("G", "D", "G_ema")}
    finally:
        def on_cpu(value):
            if isinstance(value, torch.Tensor):
                return value.cpu()
            return {k: on_cpu(v) for k, v in (value.items() if isinstance(value, dict) else enumerate(value))}
        torch.save(on_cpu(seen), os.environ["RECORD"] + os.environ.get("RANK", ""), pickle_protocol=2)
train.DCGAN.draw_latents, train.DCGAN.step, train.main = draw_and_record, step_and_record, main_and_record
"""
# A cheap one. The real one takes seconds, and computes on the CPU all that G has not drawn.
SCORE = """
class Score:
    real = 1.0, 1.0
    def __init__(self, *frames):
        pass
    def __call__(self, G, latent):
        return train.render(G, train.latents(range(64), G.nz, latent)).float().mean().item(), 1.0
train.Score = Score
"""
STOP_IN_STEP_3 = """
recorded_step = train.DCGAN.step
def stop(self, frames):
    if len(seen["frames"]) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return recorded_step(self, frames)
train.DCGAN.step = stop
"""


@pytest.fixture(scope="module")
def card():
    """The environment in which the simulated card exists."""
    return build()


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """A pack of 64 frames of noise, all for training: four steps per epoch, no score."""
    frames = np.random.default_rng(0).integers(0, 256, (64, 40, 54, 3), np.uint8)
    return make_pack(tmp_path_factory.mktemp("packs") / "streets-32", frames)


@pytest.fixture(scope="module")
def train_on(card, streets, tmp_path_factory):
    """train_on(device, *options, …) runs train.py → out (its folder), losses, report (the card's), record, stdout."""
    def train(device, *options, data=streets, out=None, epochs=3, log_seconds=0, precision="fp32", first="", env=(),
              **how):
        folder = tmp_path_factory.mktemp("run")
        out = out or folder / "run"
        env = {"HPU_SIM_REPORT": str(folder / "card.json"), "RECORD": str(folder / "record"), **dict(env)}
        words = "--epochs", epochs, "--log-seconds", log_seconds, "--precision", precision, *options
        how |= {"first": first} if first else {}
        done = run("train.py", *TINY, "--device", device, "--data", data, "--out", out, *words,
                   env={**card, **env} if device == "hpu" else env, **how)
        report = json.loads((folder / "card.json").read_text()) if device == "hpu" else None
        logged = scalars(out)
        losses = np.array([[value for _, value in logged[name]] for name in STATS]).T  # (logged steps, 5)
        record = content(folder / "record") if first.startswith(RECORD) else None
        return SimpleNamespace(out=out, losses=losses, report=report, record=record, stdout=done.stdout,
                               stderr=done.stderr)
    return train


@pytest.fixture(scope="module")
def on_cpu(train_on):
    """12 steps on the CPU."""
    return train_on("cpu", *OPTIONS)


@pytest.fixture(scope="module")
def on_card(train_on):
    """The same 12 steps on the card, in lazy mode, with the CPU's random numbers."""
    return train_on("hpu", *OPTIONS, first=HOST_DRAWS)


# ---- what a step computes -------------------------------------------------------------------------------------------

def test_losses_on_the_card_follow_the_cpus_step_for_step(on_cpu, on_card):
    assert len(on_card.losses) == len(on_cpu.losses) == 12
    np.testing.assert_allclose(on_card.losses, on_cpu.losses, **CLOSE)
    np.testing.assert_allclose(on_card.losses[0], on_cpu.losses[0], rtol=1e-6, err_msg="only rounding differs")
    report = on_card.report
    assert report["mode"] == "lazy" and report["fallbacks"] == {} and on_card.stderr == ""
    assert {"aten::convolution_overrideable", "hpu::optimizer_adamw"} <= set(report["ops"])


def test_compile_takes_eager_mode_and_compiles_in_the_first_steps_alone(on_cpu, train_on):
    compiled = train_on("hpu", *OPTIONS, "--compile", first=HOST_DRAWS, env={"PT_HPU_LAZY_MODE": "1"})
    np.testing.assert_allclose(compiled.losses, on_cpu.losses, **CLOSE)
    report = compiled.report
    assert report["mode"] == "eager" and report["fallbacks"] == {}
    assert 2 <= len(report["compile_steps"]) <= 4 and max(report["compile_steps"]) < 4


ON_CARD = """
import json, torch
import train
import habana_frameworks.torch.core as htcore
def report():
    return htcore.report()
def new(kind, run):  # how many graphs run() makes, or how many of them it compiles again for a layout
    htcore.mark_step()
    before = len(report()[kind + "_steps"])
    run()
    htcore.mark_step()
    return len(report()[kind + "_steps"]) - before
def show(*values):
    print(json.dumps(values))
"""


@pytest.fixture
def script_on_card(card, tmp_path):
    """script_on_card(code, **environment) runs code on the card, in lazy mode → what show() printed."""
    def script_on_card(code, **env):
        (tmp_path / "script.py").write_text(ON_CARD + dedent(code))
        done = run(tmp_path / "script.py", env={**card, "PYTHONPATH": f"{ROOT}:{card['PYTHONPATH']}",
                                                "PT_HPU_LAZY_MODE": "1", **env})
        return json.loads(done.stdout.splitlines()[-1])
    return script_on_card


def test_gaudis_optimizer_gets_the_presets_numbers_and_torchs_epsilon(script_on_card):
    """Gaudi's own epsilon is 1e-6."""
    naive, safe = script_on_card("""
        groups = []
        for preset in ("naive-64", "safe-128"):
            typed = train.parse_args(["--preset", preset, "--device", "hpu", "--ngf", "1", "--ndf", "1"])
            args = getattr(train, "look_up", lambda args: args)(typed)
            optimizer = train.DCGAN(args, train.set_up_device(args)).opt_D
            groups.append([type(optimizer).__name__, optimizer.param_groups[0]])
        show(*([name, *(group[key] for key in "lr betas eps weight_decay".split())] for name, group in groups))
    """)
    assert naive == ["FusedAdamW", 2e-4, [0.5, 0.999], 1e-8, 0]
    assert safe == ["FusedAdamW", 2e-4, [0.5, 0.999], 1e-8, 0.05]


def test_images_are_shifted_by_whole_pixels_under_bf16(script_on_card):
    """The shifts are computed in fp32, although a product with a number is bf16 on Gaudi."""
    first, second, differing = script_on_card("""
        draw = torch.empty(2, 4096, 1, 1, 1).uniform_(-2, 3)
        torch.Tensor.uniform_ = lambda tensor, *bounds: tensor.copy_(draw)
        images = torch.ones(4096, 1, 16, 16)
        with torch.autocast("hpu", torch.bfloat16):
            on_card = train.translate(images.to("hpu")).cpu().float()
            product = torch.rand(8, device="hpu") * 9
        differing = (on_card != train.translate(images)).flatten(1).any(1).sum().item()
        show(str(product.dtype), list(on_card.shape), differing)
    """)
    assert (first, second, differing) == ("torch.bfloat16", [4096, 1, 16, 16], 0)


# ---- random numbers, saving and resuming ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scored(train_on, tmp_path_factory):
    """7 steps with a score at both ends; the first 3 of them, saved after each step; the same resumed to the end."""
    folder = tmp_path_factory.mktemp("scored")
    frames = np.random.default_rng(1).integers(0, 256, (112 + 50, 40, 54, 3), np.uint8)
    pack = make_pack(folder / "pack", frames[50:], frames[:50])
    how = dict(data=pack, precision="bf16", log_seconds=1000, epochs=1)
    first = RECORD + SCORE
    whole = train_on("hpu", *OPTIONS, **how, first=first, env={"PT_HPU_METRICS_FILE": str(folder / "metrics.json")})
    stopped = train_on("hpu", *OPTIONS, "--save-minutes", 0, **how, first=first + STOP_IN_STEP_3, status=143)
    resumed = train_on("hpu", *OPTIONS, "--save-minutes", 5, "--resume", **how, out=stopped.out, first=first)
    return SimpleNamespace(whole=whole, stopped=stopped, resumed=resumed, metrics=folder / "metrics.json")


def listed(numbered):
    """The values of {0: …, 1: …}, which is how lists are saved."""
    return [numbered[i] for i in range(len(numbered))]


def test_a_save_changes_nothing_that_follows(scored):
    """A save draws pictures, scores them, and seeds the card while it does so."""
    whole, stopped = scored.whole.record, scored.stopped.record
    assert len(stopped["stats"]) == 3 and (scored.stopped.out / "scores.csv").read_text().count("\n") > 3
    for what in ("latents", "frames", "stats"):
        assert same(listed(stopped[what]), listed(whole[what])[:3]), what


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(scored):
    whole, resumed = scored.whole.record, scored.resumed.record
    assert len(resumed["stats"]) == 7 - 3
    for what in ("latents", "frames", "stats"):
        assert same(listed(resumed[what]), listed(whole[what])[3:]), what
    assert same(resumed["weights"], whole["weights"])


def test_two_cards_draw_different_latents_and_the_same_ones_after_a_resume(card, streets, tmp_path):
    words = *TINY, *OPTIONS, "--device", "hpu", "--data", streets, "--out", tmp_path / "run"
    env = {**card, "HPU_SIM_CARDS": "2", "HPU_SIM_REPORT": str(tmp_path / "card.json")}
    keep = f"""
recorded_step = train.DCGAN.step
def keep_the_checkpoint(self, frames):
    if len(seen["frames"]) == 5 and os.environ["RANK"] == "0":
        import shutil
        shutil.copytree({str(tmp_path / "run")!r}, {str(tmp_path / "again")!r})
    return recorded_step(self, frames)
train.DCGAN.step = keep_the_checkpoint
"""
    def train(*words, first=RECORD, name):
        done = ranks(2, "train.py", *words, "--epochs", 4, "--log-seconds", 1000, env={**env, "RECORD": str(tmp_path / name)}, first=first)
        assert [rank.returncode for rank in done] == [0, 0], done
        return done, [content(tmp_path / f"{name}{rank}") for rank in (0, 1)]

    (first, _), whole = train(*words, "--save-minutes", 0, first=RECORD + keep, name="whole")
    assert "2 × hpu" in first.stdout
    again = content(tmp_path / "again" / "checkpoint.pt")["step"]
    _, resumed = train(*words[:-1], tmp_path / "again", "--resume", "--save-minutes", 5, name="resumed")
    assert again == 5
    for rank in (0, 1):
        for what in ("latents", "frames"):
            assert same(listed(resumed[rank][what]), listed(whole[rank][what])[again:]), what
    for what in ("latents", "frames"):
        drawn = [value.numpy().tobytes() for rank in whole for value in listed(rank[what])]
        assert len(set(drawn)) == len(drawn) == 16, f"8 steps of 2 cards repeat {what}"

    a, b = ({(net, key): value for net, weights in rank["weights"].items() for key, value in weights.items()
             if key.endswith(("weight", "bias"))} for rank in whole)
    assert same(a, b), "both cards have the same weights"
    for rank in (0, 1):
        report = json.loads((tmp_path / f"card.json.{rank}").read_text())  # of the resumed run, which is the last
        check_lazy(report, {1, 3}, {3}, more=2)  # the all-reduce cuts D's update in two, and G's
        assert report["ops"]["hccl::allreduce"] == 2 * 3, "one message for each update"


# ---- graphs, waits and metrics --------------------------------------------------------------------------------------

def check_lazy(report, logs, saves, more=0):
    """Check a run in lazy mode that logged and saved after these of its steps. It may have `more` graphs than six.

    A graph that is compiled again because its inputs have another layout is not counted: this is normal in the second
    and the third step, and in a save.
    """
    logs, saves = ({2 * step for step in steps} for steps in (logs, saves))  # in steps of an optimizer
    graphs = report["graph_steps"]
    assert report["mode"] == "lazy"
    assert report["fallbacks"] == {}, "fall-backs to the CPU"
    assert set(report["sync_steps"]) <= logs | saves, "waits for the card in other steps than logged ones and saves"
    assert len([step for step in graphs if step not in saves]) <= 6 + more, "graphs for training"
    assert len(graphs) <= 10 + more, "graphs: six for training, three for the first save, one for later saves"
    assert not [step for step in graphs if step >= 2 * 3 and step not in saves], "graphs after the third step"
    again = [step for step in report["layout_steps"] if step not in saves]
    assert max(again) < 2 * 3, "graphs compiled again after the third step"


def test_a_run_compiles_six_graphs_for_training_and_waits_only_to_log_and_to_save(scored):
    check_lazy(scored.whole.report, {1, 7}, {0, 7})
    check_lazy(scored.resumed.report, {1, 4}, {4})


def test_a_metrics_file_has_what_the_readme_says(scored):
    report = scored.whole.report
    numbers = {entry["metric_name"]: entry["statistics"]["TotalNumber"]
               for entry in json.loads(scored.metrics.read_text())}
    assert numbers == {"graph_compilation": len(report["graph_steps"] + report["layout_steps"]), "cpu_fallback": 0}


# ---- the lists of ops -----------------------------------------------------------------------------------------------

def test_lists_of_ops_replace_the_plugins_and_a_resumed_run_keeps_them(on_card, train_on, streets, tmp_path):
    (tmp_path / "low").write_text("dot\n")
    (tmp_path / "high").write_text("conv2d\nconv_transpose2d\nbatch_norm\nrelu\nleaky_relu\ntanh\nmatmul\nsoftplus\n")
    lists = {"PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST": str(tmp_path / "low"),
             "PT_HPU_AUTOCAST_FP32_OPS_LIST": str(tmp_path / "high")}
    words = "--bf16-ops", "low", "--hmp-fp32", "high"  # the second has its older name
    out = tmp_path / "runs" / "streets-32"
    how = dict(out=out, precision="bf16", first=HOST_DRAWS, cwd=tmp_path)
    fp32 = train_on("hpu", *OPTIONS, *words, **how)
    np.testing.assert_allclose(fp32.losses, on_card.losses, **CLOSE)
    assert fp32.report["lists"] == lists, "absolute paths"

    env = {"HPU_SIM_REPORT": str(tmp_path / "card.json")}
    run("train.py", "--resume", "--data", streets, "--device", "hpu", "--epochs", 4, cwd=tmp_path,
        env={**build(), **env})  # without --out
    report = json.loads((tmp_path / "card.json").read_text())
    assert report["lists"] == lists and report["optimizer_steps"] == 2 * 4


def test_a_new_process_starts_in_lazy_mode_with_the_plugins_own_lists(train_on):
    """Although `import torch` loads the plugin, unless train.py prevents it."""
    started = train_on("hpu", epochs=1, precision="bf16", popen=new_process)
    assert started.report["mode"] == "lazy" and started.report["lists"] == {} and len(started.losses) == 4


def test_a_list_with_windows_line_ends_is_refused_with_the_cure(tmp_path):
    """The plugin would find no op in it, and train in fp32 without a word."""
    (tmp_path / "ops").write_bytes(b"conv2d\r\nconv_transpose2d\r\n")
    refused = run("train.py", "--bf16-ops", "ops", "--device", "cpu", cwd=tmp_path, status=2)
    cure = re.search("sed .*", refused.stderr)[0]
    subprocess.run(cure, shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "ops").read_bytes() == b"conv2d\nconv_transpose2d\n"


# ---- files and pictures ---------------------------------------------------------------------------------------------

def test_files_saved_on_the_card_open_where_there_is_no_plugin(scored):
    files = [*scored.stopped.out.glob("*.pt")]
    assert {file.name for file in files} >= {"checkpoint.pt", "best.pt"}
    for file in files:
        weights = content(file)["G_ema"]  # fails with card tensors
        assert weights["main.0.weight"].device.type == "cpu"


@pytest.mark.parametrize("script, words", [("sample.py", ["--n", 70]), ("interpolate.py", ["--frames", 20])])
def test_pictures_drawn_on_the_card_are_those_of_the_cpu(script, words, on_card, card, tmp_path):
    words = "--checkpoint", on_card.out, "--scale", 2, *words
    run(script, *words, "--device", "cpu", "--out", tmp_path / "cpu.png")
    run(script, *words, "--device", "hpu", "--out", tmp_path / "hpu.png",
        env={**card, "HPU_SIM_REPORT": str(tmp_path / "card.json")})
    cpu, hpu = (np.asarray(Image.open(tmp_path / name), int) for name in ("cpu.png", "hpu.png"))
    assert abs(cpu - hpu).max() <= 1
    report = json.loads((tmp_path / "card.json").read_text())
    assert len(report["graph_steps"]) == 1 and report["fallbacks"] == {}, "one graph for both batches"


# ---- what goes wrong ------------------------------------------------------------------------------------------------

def test_resuming_a_run_of_the_cpu_on_the_card_is_one_line_that_names_init(on_cpu, card, streets):
    stderr = run("train.py", "--resume", "--device", "hpu", "--data", streets, "--out", on_cpu.out, "--epochs", 9,
                 env=card, status=2).stderr
    assert "--init" in stderr and "cpu" in stderr and "hpu" in stderr and len(stderr.splitlines()) == 1


def test_too_little_memory_is_one_line(card, streets, tmp_path):
    stderr = run("train.py", *TINY, "--device", "hpu", "--data", streets, "--out", tmp_path / "a", status=2,
                 env={**card, "HPU_SIM_MEMORY": "1000000"}).stderr
    assert "--batch-size" in stderr and len(stderr.splitlines()) == 1


@pytest.mark.parametrize("machine, script, reason", [
    (None, "interpolate.py", "habana_frameworks"),
    ({"HPU_SIM_CARDS": "0"}, "sample.py", "no Gaudi card"),
    ({"HPU_SIM_BUSY": "1"}, "train.py", "Device acquire failed"),
])
def test_without_a_usable_card_one_line_says_why(machine, script, reason, card, tmp_path):
    env = {**card, **machine} if machine else {}
    stderr = run(script, "--device", "hpu", env=env, cwd=tmp_path, status=2).stderr
    assert "hpu" in stderr and reason in stderr and len(stderr.splitlines()) == 1


def test_auto_takes_a_free_card_or_else_the_cpu_with_a_warning(card, on_cpu, tmp_path):
    def draw(env):
        return run("sample.py", "--checkpoint", on_cpu.out, "--n", 1, "--out", tmp_path / "a.png", env=env)
    report = tmp_path / "card.json"
    free = draw({**card, "HPU_SIM_REPORT": str(report)})
    assert json.loads(report.read_text())["ops"] and free.stderr == ""
    busy = draw({**card, "HPU_SIM_BUSY": "1"})
    assert "Device acquire failed" in busy.stderr and "CPU" in busy.stderr and len(busy.stderr.splitlines()) == 1


def test_a_rank_that_fails_ends_the_job_with_its_one_error_line(card, streets, tmp_path):
    """The plugin makes a process that ends alone wait for the others, without a time limit."""
    failing = """
import train
step = train.DCGAN.step
def fail_in_step_3(self, frames, calls=[]):
    calls.append(frames)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise train.InputError("this rank fails")
    return step(self, frames)
train.DCGAN.step = fail_in_step_3
"""
    words = *TINY, "--device", "hpu", "--data", streets, "--out", tmp_path / "run", "--epochs", 4
    done = ranks(2, "train.py", *words, env={**card, "HPU_SIM_CARDS": "2"}, first=failing, timeout=60)
    assert done[1].returncode == 2 and done[1].stderr.count("error: this rank fails") == 1
    assert done[0].returncode not in (0, -9), "it was not killed after the time limit"


# ---- the simulated card itself --------------------------------------------------------------------------------------

def test_the_card_has_random_numbers_of_its_own_which_only_the_plugin_seeds(script_on_card):
    cpu, card, again, other, bound_before, unchanged = script_on_card("""
        def draw(seed, n, device="hpu"):
            seed(n)
            return torch.randn(4, device=device).tolist()
        torch.manual_seed(3)
        host = torch.default_generator.get_state()
        everywhere, alone = torch.manual_seed, torch.hpu.random.manual_seed_all
        numbers = [draw(everywhere, 3, "cpu"), draw(everywhere, 3), draw(alone, 3), draw(alone, 4)]
        before = torch.manual_seed.__wrapped__  # what a script had bound before the plugin loaded
        torch.manual_seed(5), torch.rand(3, device="hpu")
        bound = [draw(before, 3) for _ in range(2)]
        torch.manual_seed(3)
        torch.empty(3, device="hpu").uniform_(), torch.nn.functional.dropout(torch.ones(3, device="hpu"))
        show(*numbers, bound, torch.equal(torch.default_generator.get_state(), host))
    """)
    assert card == again and len({*map(tuple, (cpu, card, other, *bound_before))}) == 5 and unchanged


def test_lazy_mode_compiles_a_graph_for_each_new_constant(script_on_card):
    made, = script_on_card("""
        x, square = torch.ones(4, 6).to("hpu"), torch.ones(6, 6).to("hpu")
        rows = torch.arange(8).to("hpu")
        each = lambda f, values: sum(new("graph", lambda v=v: f(v)) for v in values)
        show(dict(
            the_same=each(lambda _: x * 2 + x, range(3)),
            other_memory=each(lambda _: x.clone(), range(2)) + each(lambda t: t.clone(), [torch.ones(4, 6).to("hpu")]),
            numbers=each(lambda n: x - n, [1, 2, 3, 1]),
            uploaded=each(lambda n: x + torch.tensor([float(n)]).to("hpu"), [1, 2, 3, 1]),
            shapes=each(lambda n: torch.full((n,), 1.5, device="hpu"), [2, 3, 4, 2]),
            dtypes=each(lambda t: x.to(t), [torch.bfloat16, torch.int32, torch.bfloat16]),
            strides=each(lambda t: t.exp(), [square, square.t(), square]),
            offsets=each(lambda part: part + 1, rows.split(2)),
            slices=each(lambda n: x[:, n:n + 2], [1, 2, 3]),
            waiting=each(lambda _: (x.mean().item(), x.mean()), range(2)),
            nothing=new("graph", lambda: None),
            draws=each(lambda n: (torch.manual_seed(n), torch.rand(3, device="hpu")), [1, 2, 3])))
    """)
    assert made == dict(the_same=1, other_memory=1, numbers=3, uploaded=1, shapes=3, dtypes=2, strides=2, offsets=4,
                        slices=3, waiting=1, nothing=0, draws=1)


def test_what_has_no_kernel_for_its_dtype_falls_back_and_waits(script_on_card):
    fine, seen = script_on_card("""
        images, rows = torch.arange(24.0).view(2, 3, 4).to("hpu"), torch.tensor([1, 0]).to("hpu")
        frames = images.cpu().to(torch.uint8).to("hpu")
        images.permute(2, 0, 1), images.index_select(0, rows), frames.float().permute(2, 0, 1), frames.clone()
        fine = report()
        assert frames.permute(2, 0, 1).cpu().equal(frames.cpu().permute(2, 0, 1))
        assert images.to(torch.uint8).cpu().equal(frames.cpu())
        frames.index_select(0, rows), torch.isin(images, rows)
        show(fine, report())
    """)
    assert fine["fallbacks"] == {}
    assert seen["fallbacks"] == {"aten::permute Byte": 1, "aten::_copy_from Float->Byte": 1,
                                 "aten::index_select Byte": 1, "aten::isin Float": 1}
    assert sum(n for op, n in seen["syncs"].items() if op.startswith("aten::")) == 4, "the host waits for each"
