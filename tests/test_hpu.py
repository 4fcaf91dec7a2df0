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
seen = {"latents": {}, "frames": {}, "stats": {}}
def record(what, value):
    seen[what][len(seen[what])] = value
    return value
draw_latents, step, main = train.DCGAN.draw_latents, train.DCGAN.step, train.main
def step_and_record(self, frames):
    record("frames", frames)
    return record("stats", step(self, frames))
def main_and_record(*args):
    try:
        dcgan = main(*args)
        seen["weights"] = {name: getattr(dcgan, name).state_dict() for name in ("G", "D", "G_ema")}
    finally:
        path = os.environ["RECORD"] + os.environ.get("RANK", "")
        torch.save(train.to_cpu(seen), path, pickle_protocol=2)
train.DCGAN.draw_latents = lambda self, n: record("latents", draw_latents(self, n))
train.DCGAN.step, train.main = step_and_record, main_and_record
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
def stop(self, frames, recorded_step=train.DCGAN.step):
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
    """train_on(device, *options, …) runs train.py → out, losses, report, record, stderr."""
    def train(device, *options, data=streets, out=None, epochs=3, log_seconds=0, precision="fp32", first="", env=(),
              **how):
        folder = tmp_path_factory.mktemp("run")
        out = out or folder / "run"
        env = {**(card if device == "hpu" else {}), "HPU_SIM_REPORT": str(folder / "card.json"),
               "RECORD": str(folder / "record"), **dict(env)}
        words = "--epochs", epochs, "--log-seconds", log_seconds, "--precision", precision, *options
        how |= {"first": first} if first else {}
        words += "--device", device, "--data", data, "--out", out
        done = run("train.py", *TINY, *words, env=env, **how)
        report = json.loads((folder / "card.json").read_text()) if device == "hpu" else None
        logged = scalars(out)
        losses = np.array([[value for _, value in logged[name]] for name in STATS]).T  # (logged steps, 5)
        record = content(folder / "record") if first.startswith(RECORD) else None
        return SimpleNamespace(out=out, losses=losses, report=report, record=record,
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
from habana_frameworks.torch.core import mark_step, report
def new(kind, run):  # how many graphs run() makes, or how many of them it compiles again for a layout
    mark_step()
    before = len(report()[kind + "_steps"])
    run()
    mark_step()
    return len(report()[kind + "_steps"]) - before
def show(*values):
    print(json.dumps(values))
"""


@pytest.fixture
def script_on_card(card, tmp_path):
    """script_on_card(code) runs code on the card, in lazy mode → what show() printed."""
    env = {**card, "PYTHONPATH": f"{ROOT}:{card['PYTHONPATH']}", "PT_HPU_LAZY_MODE": "1"}

    def script_on_card(code):
        (tmp_path / "script.py").write_text(ON_CARD + dedent(code))
        done = run(tmp_path / "script.py", env=env)
        return json.loads(done.stdout.splitlines()[-1])
    return script_on_card


def test_images_are_shifted_by_whole_pixels_under_bf16(script_on_card):
    """The shifts are computed in fp32, although a product with a number is bf16 on Gaudi."""
    product, differing = script_on_card("""
        draw = torch.empty(2, 4096, 1, 1, 1).uniform_(-2, 3)
        torch.Tensor.uniform_ = lambda tensor, *bounds: tensor.copy_(draw)
        images = torch.ones(4096, 1, 16, 16)
        with torch.autocast("hpu", torch.bfloat16):
            on_card = train.translate(images.to("hpu")).cpu().float()
            product = torch.rand(8, device="hpu") * 9
        show(str(product.dtype), (on_card != train.translate(images)).sum().item())
    """)
    assert (product, differing) == ("torch.bfloat16", 0)


# ---- random numbers, saving and resuming ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scored(train_on, tmp_path_factory):
    """7 steps with a score at both ends; the first 3 of them, saved after each step; the same resumed to the end."""
    folder = tmp_path_factory.mktemp("scored")
    frames = np.random.default_rng(1).integers(0, 256, (112 + 50, 40, 54, 3), np.uint8)
    pack = make_pack(folder / "pack", frames[50:], frames[:50])
    how = dict(data=pack, precision="bf16", log_seconds=1000, epochs=1)
    first = RECORD + SCORE
    whole = train_on("hpu", *OPTIONS, **how, first=first)
    stopped = train_on("hpu", *OPTIONS, "--save-minutes", 0, **how, first=first + STOP_IN_STEP_3, status=143)
    resumed = train_on("hpu", *OPTIONS, "--save-minutes", 5, "--resume", **how, out=stopped.out, first=first)
    return SimpleNamespace(whole=whole, stopped=stopped, resumed=resumed)


def test_a_run_that_saves_more_often_or_is_resumed_equals_an_uninterrupted_one_bit_for_bit(scored):
    """A save draws pictures, scores them, and seeds the card."""
    whole, stopped, resumed = scored.whole.record, scored.stopped.record, scored.resumed.record
    assert (scored.stopped.out / "scores.csv").read_text().count("\n") > 3
    for what in ("latents", "frames", "stats"):
        assert (len(stopped[what]), len(resumed[what])) == (3, 4)
        parts = [*stopped[what].values(), *resumed[what].values()]
        assert same(parts, [*whole[what].values()]), what
    assert same(resumed["weights"], whole["weights"])


def test_two_cards_have_the_same_weights_and_draw_numbers_of_their_own(card, streets, tmp_path):
    env = {**card, "HPU_SIM_CARDS": "2", "RECORD": str(tmp_path / "rank"),
           "HPU_SIM_REPORT": str(tmp_path / "card.json")}
    words = *TINY, *OPTIONS, "--device", "hpu", "--epochs", 4, "--log-seconds", 1000
    words += "--data", streets, "--out", tmp_path / "run"
    done = ranks(2, "train.py", *words, env=env, first=RECORD)
    assert [rank.returncode for rank in done] == [0, 0] and "2 × hpu" in done[0].stdout, done
    seen = [content(tmp_path / f"rank{rank}") for rank in (0, 1)]
    for what in ("latents", "frames"):
        drawn = {value.numpy().tobytes() for rank in seen for value in rank[what].values()}
        assert len(drawn) == 16, f"8 steps of 2 cards repeat {what}"
    a, b = ({(net, key): value for net, weights in rank["weights"].items() for key, value in weights.items()
             if key.endswith(("weight", "bias"))} for rank in seen)
    assert same(a, b)
    for rank in (0, 1):
        report = json.loads((tmp_path / f"card.json.{rank}").read_text())
        check_lazy(report, {1, 8}, {0, 8}, more=2)  # the all-reduce cuts D's update in two, and G's
        assert report["ops"]["hccl::allreduce"] == 2 * 8, "one message for each update"


# ---- graphs and waits ----------------------------------------------------------------------------

def check_lazy(report, logs, saves, more=0):
    """Check a run in lazy mode that logged and saved after these of its steps.

    It may have `more` graphs than six. A graph that is compiled again because its inputs have
    another layout is not counted: this is normal in the second and the third step, and in a save.
    """
    logs, saves = ({2 * step for step in steps} for steps in (logs, saves))  # of an optimizer
    training = [step for step in report["graph_steps"] if step not in saves]
    again = [step for step in report["layout_steps"] if step not in saves]
    assert report["mode"] == "lazy" and report["fallbacks"] == {}
    assert set(report["sync_steps"]) <= logs | saves, "it waits for the card in other steps"
    assert len(training) <= 6 + more and len(report["graph_steps"]) <= 10 + more, (
        "six for training, three for the first save, one for later saves")
    assert max(training) < 2 * 3 and max(again) < 2 * 3, "compiled after the third step"


def test_a_run_compiles_six_graphs_for_training_and_waits_only_to_log_and_to_save(scored):
    check_lazy(scored.whole.report, {1, 7}, {0, 7})
    check_lazy(scored.resumed.report, {1, 4}, {4})


# ---- the lists of ops -----------------------------------------------------------------------------------------------

def test_lists_of_ops_replace_the_plugins_and_a_resumed_run_keeps_them(
        on_card, train_on, card, streets, tmp_path):
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

    env = {**card, "HPU_SIM_REPORT": str(tmp_path / "card.json")}
    words = "--resume", "--data", streets, "--device", "hpu", "--epochs", 4  # without --out
    run("train.py", *words, cwd=tmp_path, env=env)
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
    subprocess.run(re.search("sed .*", refused.stderr)[0], shell=True, check=True, cwd=tmp_path)
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

@pytest.mark.parametrize("machine, reason", [
    ({"HPU_SIM_CARDS": "0"}, "no Gaudi card"),
    ({"HPU_SIM_BUSY": "1"}, "Device acquire failed"),
    ({"HPU_SIM_MEMORY": "1000000"}, "--batch-size"),
])
def test_no_card_a_busy_one_and_too_little_memory_are_one_line(
        machine, reason, card, streets, tmp_path):
    words = *TINY, "--device", "hpu", "--data", streets, "--out", tmp_path / "a"
    stderr = run("train.py", *words, env={**card, **machine}, status=2).stderr
    assert reason in stderr and len(stderr.splitlines()) == 1


def test_auto_takes_a_free_card_or_else_the_cpu_with_a_warning(card, on_cpu, tmp_path):
    def draw(env):
        return run("sample.py", "--checkpoint", on_cpu.out, "--n", 1, "--out", tmp_path / "a.png", env=env)
    free = draw({**card, "HPU_SIM_REPORT": str(tmp_path / "card.json")})
    assert json.loads((tmp_path / "card.json").read_text())["ops"] and free.stderr == ""
    busy = draw({**card, "HPU_SIM_BUSY": "1"})
    assert "Device acquire failed" in busy.stderr and "CPU" in busy.stderr and len(busy.stderr.splitlines()) == 1


def test_a_rank_that_fails_ends_the_job_with_its_one_error_line(card, streets, tmp_path):
    """The plugin makes a process that ends alone wait for the others, without a time limit."""
    failing = """
import train
def fail_in_step_3(self, frames, calls=[], step=train.DCGAN.step):
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
    cpu, card, again, other, unseeded = script_on_card("""
        def draw(n, seed=torch.manual_seed, device="hpu"):
            seed(n)
            return torch.randn(4, device=device).tolist()
        bound_before = torch.manual_seed.__wrapped__  # before the plugin loaded
        show(draw(3, device="cpu"), draw(3), draw(3), draw(4), draw(3, bound_before))
    """)
    assert card == again and len({*map(tuple, (cpu, card, other, unseeded))}) == 4


def test_lazy_mode_compiles_a_graph_for_each_new_constant(script_on_card):
    made, = script_on_card("""
        x, square = torch.ones(4, 6).to("hpu"), torch.ones(6, 6).to("hpu")
        rows = torch.arange(8).to("hpu")
        each = lambda f, values: sum(new("graph", lambda v=v: f(v)) for v in values)
        show(dict(
            the_same=each(lambda _: x * 2 + x, range(3)),
            other_memory=each(lambda t: t.clone(), [x, torch.ones(4, 6).to("hpu")]),
            numbers=each(lambda n: x - n, [1, 2, 3, 1]),
            uploaded=each(lambda n: x + torch.tensor([float(n)]).to("hpu"), [1, 2, 3, 1]),
            shapes=each(lambda n: torch.full((n,), 1.5, device="hpu"), [2, 3, 4, 2]),
            strides=each(lambda t: t.exp(), [square, square.t(), square]),
            offsets=each(lambda part: part + 1, rows.split(2)),
            draws=each(lambda n: (torch.manual_seed(n), torch.rand(3, device="hpu")), [1, 2, 3])))
    """)
    assert made == dict(the_same=1, other_memory=1, numbers=3, uploaded=1, shapes=3, strides=2,
                        offsets=4, draws=1)


def test_a_graph_compiles_again_while_the_layout_of_its_inputs_changes(script_on_card):
    matrix, vector, uploaded = script_on_card("""
        matrix, vector = torch.ones(3, 3).to("hpu"), torch.ones(3).to("hpu")
        each = lambda run: [new("layout", run) for _ in range(5)]
        in_place, of_a_vector = each(lambda: matrix.mul_(2)), each(lambda: vector.mul_(3))
        matrix.copy_(torch.ones(3, 3))
        show(in_place, of_a_vector, each(lambda: matrix.mul_(5)))
    """)
    assert matrix == uploaded == [0, 1, 1, 0, 0], "in the second and the third run"
    assert vector == [0] * 5, "a vector has one layout"


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
