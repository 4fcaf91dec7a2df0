"""`--device hpu` on a card that the CPU plays (hpu_sim/README.md): the scripts as they are, run as Gaudi's users run them."""
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ROOT, TINY, run
from hpu_sim.build import Unavailable, build, unsupported

sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image

import model
import train

LAZY, EAGER = {"PT_HPU_LAZY_MODE": "1"}, {"PT_HPU_LAZY_MODE": "0"}
LISTS = train.GAUDI_LISTS.values()
SILENT = ["--log-every", 1000]


def at_once(*calls):
    """The results of two or more calls that wait for processes of their own."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.fixture(scope="module")
def card():
    """The environment in which the simulated card exists."""
    try:
        return build()
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def pack32(tmp_path_factory):
    """64 drawn streets, all for training: four steps an epoch."""
    folder = tmp_path_factory.mktemp("packs") / "pack"
    run("prepare_data.py", "--demo", 64, "--image-size", 32, "--holdout", 0, "--duplicates", 0, folder)
    return folder


@pytest.fixture(scope="module")
def trained_on(card, pack32, tmp_path_factory):
    """trained_on(device, *words, **environment) → (run folder, losses by step, the card's report, stdout)."""
    def train_on(device, *words, env=(), epochs=3, precision="fp32"):
        folder = tmp_path_factory.mktemp("run")
        env = {**card, "HPU_SIM_REPORT": str(folder / "card.json"), **dict(env)} if device == "hpu" else dict(env)
        where = [] if "--resume" in words else [*TINY, "--data", pack32, "--out", folder / "run"]
        done = run("train.py", *where, "--device", device, "--precision", precision, "--epochs", epochs, "--log-every", 1,
                   *words, env=env)
        assert done.stderr == "", "no warning on the way"
        report = json.loads((folder / "card.json").read_text()) if device == "hpu" else {}
        return folder / "run", losses(done.stdout), report, done.stdout
    return train_on


@pytest.fixture(scope="module")
def on_cpu(trained_on):
    return trained_on("cpu")


@pytest.fixture(scope="module")
def on_cpu_twice_as_long(trained_on):
    return trained_on("cpu", epochs=6)


@pytest.fixture(scope="module")
def on_hpu(trained_on):
    return trained_on("hpu", env=LAZY)


def losses(text):
    """(steps, 5): Loss_D, Loss_G, D(x), D(G(z1)), D(G(z2)) of each log line."""
    lines = re.findall(r"Loss_D (\S+) Loss_G (\S+) D\(x\) (\S+) D\(G\(z\)\) (\S+) / (\S+)", text)
    return np.array(lines, float)


# Gaudi's FusedAdamW adds its epsilon before the bias is corrected, torch's after it: in the first steps another 1e-6 of an update,
# which grows as all differences do in training. The lines have four decimals.
close = dict(rtol=2e-3, atol=2e-4)


# ---- what a step does on the card -----------------------------------------------------------------------------------

def test_losses_on_the_card_follow_the_cpus_step_for_step(on_cpu, on_hpu):
    assert len(on_cpu[1]) == len(on_hpu[1]) == 12
    np.testing.assert_allclose(on_hpu[1], on_cpu[1], **close)
    np.testing.assert_array_equal(on_hpu[1][0], on_cpu[1][0], "before the first update there is no difference at all")


def test_they_do_so_with_weight_decay_and_instance_noise_in_eager_mode(trained_on):
    words = "--weight-decay", 1, "--instance-noise", 0.05, "--latent", "uniform", "--mirror"
    hpu, cpu = at_once(lambda: trained_on("hpu", *words, env=EAGER), lambda: trained_on("cpu", *words))
    np.testing.assert_allclose(hpu[1], cpu[1], **close)
    assert hpu[2]["mode"] == "eager" and not unsupported(hpu[2])


@pytest.fixture(scope="module")
def silent_runs(trained_on):
    """Two bf16 runs in lazy mode that log at their end alone, one of 12 steps, one of 68."""
    return at_once(*(lambda epochs=epochs: trained_on("hpu", *SILENT, env=LAZY, epochs=epochs, precision="bf16")[2]
                     for epochs in (3, 17)))


def test_a_step_that_is_not_logged_never_waits_for_the_card(silent_runs):
    short, long = silent_runs
    assert short["syncs_by_op"] == long["syncs_by_op"], "56 steps more, and not a sync more"
    assert long["events"].count("copy_to_hpu") - short["events"].count("copy_to_hpu") == 1, "row numbers go up for 64 steps at once"


def test_the_graph_is_cut_after_each_backward_and_each_optimizers_step(silent_runs):
    short, long = silent_runs
    assert short["mode"] == long["mode"] == "lazy"
    assert short["mark_steps"] == 12 * 4 and long["mark_steps"] == 68 * 4, "two for D's update, two for G's"
    assert short["longest_graph"] == long["longest_graph"] < 1000


def test_gaudis_optimizer_gets_the_presets_numbers_and_torchs_epsilon(card):
    done = subprocess.run([sys.executable, "-c", """
import json, model, torch, train
device = train.set_up_device(train.parse_args(["--data", "", "--device", "hpu", "--precision", "fp32"]), 0)
for preset in ("naive-64", "safe-128"):
    args = train.parse_args(["--data", "", "--preset", preset, "--ngf", "1", "--ndf", "1"])
    optimizer = train.DCGAN(args, device).opt_D
    group = optimizer.param_groups[0]
    print(json.dumps([type(optimizer).__name__, *(group[key] for key in "lr betas eps weight_decay bias_correction".split())]))
"""], cwd=ROOT, env={**os.environ, **card}, capture_output=True, text=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["FusedAdamW", 2e-4, [0.5, 0.999], 1e-8, 0, True], ["FusedAdamW", 2e-4, [0.5, 0.999], 1e-8, 0.05, True]], done.stderr


def test_a_step_uses_ops_that_gaudi_supports(silent_runs, on_hpu):
    for report in (*silent_runs, on_hpu[2]):
        assert "aten::convolution_overrideable" in report["ops"] and "hpu::optimizer_adamw" in report["ops"]
        assert unsupported(report) == []


def test_eager_mode_compiles_with_hpu_backend_and_lazy_mode_says_that_it_does_not(trained_on, card, pack32, tmp_path):
    (_, compiled, report, _), lazy = at_once(
        lambda: trained_on("hpu", "--compile", env=EAGER, precision="bf16"),
        lambda: run("train.py", *TINY, "--device", "hpu", "--data", pack32, "--out", tmp_path / "run", "--compile",
                    env={**card, **LAZY}, status=2))
    assert report["compiles"] >= 2 and len(compiled) == 12 and report["mode"] == "eager"
    assert "PT_HPU_LAZY_MODE" in lazy.stderr


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first, then", [("cpu", "hpu"), ("hpu", "cpu")])
def test_a_run_goes_on_on_another_device_as_if_nothing_had_changed(first, then, on_cpu, on_hpu, on_cpu_twice_as_long, trained_on, tmp_path):
    begun = {"cpu": on_cpu, "hpu": on_hpu}[first][0]
    out = shutil.copytree(begun, tmp_path / "run")
    _, went_on, *_ = trained_on(then, "--resume", "--out", out, epochs=6, env=LAZY)
    assert len(went_on) == 12
    np.testing.assert_allclose(went_on, on_cpu_twice_as_long[1][12:], rtol=0, atol=5e-3)  # 0.002; moments lost, it is 0.017
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["opt_D"]["step"] == saved["opt_G"]["step"] == saved["step"] == 24, "the count for bias correction goes on"


def test_the_count_of_steps_is_carried_wherever_an_optimizer_keeps_it():
    """Per parameter as torch does, per group as Gaudi does, and in both where its releases differ."""
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(3):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    saved = train.adam_state(optimizer)
    assert saved["step"] == 3
    optimizer.param_groups[0]["step"] = 5
    assert train.adam_state(optimizer)["step"] == 5
    train.load_adam_state(other := torch.optim.AdamW(net.parameters()), saved)
    other.step()
    assert train.adam_state(other)["step"] == 4


def test_what_was_saved_on_the_card_opens_where_there_is_none(on_hpu, tmp_path):
    out = on_hpu[0]
    for file in ("checkpoint.pt", "generator-000000192.pt"):
        content = torch.load(out / file, weights_only=True)  # with device tensors in it this fails here
        assert content["G"]["main.0.weight"].device.type == "cpu"
    run("sample.py", "--checkpoint", out, "--device", "cpu", "--out", tmp_path / "grid.png")


def test_pictures_made_on_the_card_are_those_made_on_the_cpu(on_hpu, card, tmp_path):
    words, hpu = ("--checkpoint", on_hpu[0], "--scale", 2), {**card, "HPU_SIM_REPORT": str(tmp_path / "card.json")}
    for script, name in (("sample.py", "grid.png"), ("interpolate.py", "walk.png")):
        at_once(lambda: run(script, *words, "--device", "cpu", "--out", tmp_path / "cpu" / name),
                lambda: run(script, *words, "--device", "hpu", "--out", tmp_path / "hpu" / name, env=hpu))
        cpu, hpus = (np.asarray(Image.open(tmp_path / device / name), int) for device in ("cpu", "hpu"))
        assert abs(cpu - hpus).max() <= 1
        report = json.loads((tmp_path / "card.json").read_text())
        assert "aten::convolution_overrideable" in report["ops"] and unsupported(report) == []


# ---- several cards --------------------------------------------------------------------------------------------------

def torchrun(script, *words, env):
    """Two processes, one a card; CompletedProcess."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
                           *map(str, words)], capture_output=True, text=True, timeout=240, env={**os.environ, **env})


def test_two_cards_share_the_data_and_hold_the_same_weights(card, pack32, tmp_path):
    driver = tmp_path / "driver.py"  # what train.py is, and then what each rank holds
    driver.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train, torch
frames, states, cut = [], [], train.cut_windows
def cut_windows(batch, *xs):
    if batch.device.type == "hpu":  # no picture of real frames
        frames.append(batch.cpu())
        states.append(torch.hpu.get_rng_state())
    return cut(batch, *xs)
train.cut_windows = cut_windows
model = train.main()
weights = {{f"{{name}}.{{key}}": p.cpu() for name in ("G", "D", "G_ema") for key, p in getattr(model, name).named_parameters()}}
torch.save((weights, torch.cat(frames), torch.stack(states)), {str(tmp_path)!r} + "/rank" + os.environ["RANK"], pickle_protocol=2)
""")
    words = [*TINY, "--device", "hpu", "--data", pack32, "--out", tmp_path / "run", "--epochs", 2, "--log-every", 1]
    done = torchrun(driver, *words, env={**card, **LAZY, "HPU_SIM_CARDS": "2", "HPU_SIM_REPORT": str(tmp_path / "card.json")})
    assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr[-3000:]
    assert len(losses(done.stdout)) == 4 and "2 × GAUDI" in done.stdout, "16 images a card: 2 epochs of 2 steps"
    (a, seen, states), (b, others, other_states) = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    saw, others_saw = ({frame.numpy().tobytes() for frame in frames} for frames in (seen, others))
    assert len(saw) == len(others_saw) == 32 and not saw & others_saw, "64 streets, half of them for each card"
    assert len({row.numpy().tobytes() for row in (*states, *other_states)}) == 8, "no card, and no step, draws another's numbers"
    for rank in (0, 1):
        report = json.loads((tmp_path / f"card.json.{rank}").read_text())
        assert any(op.startswith("hccl::allreduce") for op in report["ops"]) and unsupported(report) == []


def test_a_benchmark_of_two_cards_ends_on_both_however_their_clocks_go(card, pack32, tmp_path):
    driver = tmp_path / "driver.py"  # tests/bench.py with one rank that would go on for a second more
    driver.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import bench
bench.measure_step(0.5 + int(os.environ["RANK"]), 13.11, None, sys.argv[1:])
assert not bench.train.dist.is_initialized()
""")
    words = [*TINY, "--device", "hpu", "--data", pack32]
    done = torchrun(driver, *words, env={**card, **LAZY, "HPU_SIM_CARDS": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| 2 × GAUDI" in done.stdout.splitlines()[-1], "rank 0 says it, once"


# ---- the mixed-precision lists --------------------------------------------------------------------------------------

ALL_HIGH = "conv2d,conv_transpose2d,batch_norm,relu,leaky_relu,tanh,binary_cross_entropy_with_logits"


@pytest.mark.parametrize("device", ["hpu", "cpu"])
def test_the_lists_decide_what_computes_in_which_precision(device, trained_on, on_cpu):
    (_, mixed, *_), (_, high, *_) = at_once(
        lambda: trained_on(device, precision="bf16"),
        lambda: trained_on(device, "--bf16-ops", "bmm", "--hmp-fp32", ALL_HIGH, precision="bf16"))
    assert abs(mixed - on_cpu[1]).max() > 1e-3, "bf16 shows"
    np.testing.assert_allclose(high, on_cpu[1], **close)


def test_the_plugin_gets_exactly_the_names_that_are_meant(card, pack32, tmp_path):
    (tmp_path / "low.txt").write_bytes(b"conv2d  \r\n\r\n# the generator's\r\n  conv_transpose2d # too\r\n")
    words = [*map(str, [*TINY, "--precision", "bf16", "--device", "hpu", "--data", pack32, "--out", tmp_path / "run", "--epochs", 1,
                        "--hmp-bf16", tmp_path / "low.txt", "--fp32-ops=-softplus"])]
    reads = "; ".join(f"print(open(os.environ['{name}'], 'rb').read())" for name in LISTS)
    done = subprocess.run([sys.executable, "-c", f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train; "
                           f"train.main({words!r}); {reads}"], env={**os.environ, **card}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    low, high = (eval(line).decode().splitlines() for line in done.stdout.splitlines()[-2:])
    assert low == ["conv2d", "conv_transpose2d"]
    assert set(high) == set(train.FP32_OPS) - {"softplus"}
    in_force = json.loads((tmp_path / "run" / "args.json").read_text())["in_force"]
    assert in_force["bf16_ops"] == low and in_force["fp32_ops"] == high
    assert f"ops in low precision: {' '.join(low)}" in done.stdout and f"ops in fp32: {' '.join(high)}" in done.stdout


def test_lists_in_an_older_launch_scripts_environment_count(card, pack32, tmp_path):
    (tmp_path / "low.txt").write_text("conv2d\n")
    done = run("train.py", *TINY, "--precision", "bf16", "--device", "hpu", "--data", pack32, "--out", tmp_path / "run", "--epochs", 1,
               env={**card, "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST": str(tmp_path / "low.txt")})
    assert "ops in low precision: conv2d\n" in done.stdout


def lists(*words):
    return train.op_lists(train.parse_args([*words, "--data", ""]))


def test_lists_are_files_names_or_changes_by_a_name(tmp_path):
    (tmp_path / "ops").write_text("relu\ntanh\n")
    assert lists() is None, "without a list torch's own autocast holds, and nothing is patched"
    assert lists("--bf16-ops", str(tmp_path / "ops"), "--fp32-ops", "sum") == (["relu", "tanh"], ["sum"])
    assert lists("--hmp-bf16", "relu,tanh")[0] == ["relu", "tanh"]
    assert set(lists("--bf16-ops", "+gelu,-tanh")[0]) == {*train.BF16_OPS, "gelu"} - {"tanh"}
    low, high = lists("--bf16-ops=-tanh", "--fp32-ops", "+tanh")
    assert "tanh" not in low and "tanh" in high


@pytest.mark.parametrize("words, culprit", [
    (["--bf16-ops", "no/such/file.txt"], "no/such/file.txt"),
    (["--bf16-ops", "conv2d,conv2x"], "conv2x"),
    (["--bf16-ops", "conv2d,name"], "'name'"),
    (["--fp32-ops", "+conv2d"], "conv2d"),
    (["--fp32-ops=-gelu"], "gelu"),
    (["--bf16-ops", ","], "--bf16-ops"),
    (["--hmp-fp32", "tanh", "--precision", "fp32"], "--precision fp32"),
])
def test_a_list_that_would_not_do_what_it_says_is_an_error_that_names_it(words, culprit):
    with pytest.raises(model.InputError, match=re.escape(culprit)):
        lists(*words)


def test_that_error_comes_before_any_work(tmp_path):
    run("train.py", "--bf16-ops", "conv2d,conv2x", "--device", "cpu", cwd=tmp_path, status=2)
    assert list(tmp_path.iterdir()) == []


def test_listed_ops_compute_as_listed_on_the_cpu_and_others_as_torch_has_it():
    code = ("import torch, train, torch.nn.functional as F; dtype = torch.bfloat16\n"
            "train.patch_autocast((['tanh', 'batch_norm'], ['conv2d']), 'cpu', dtype)\n"
            "x, w = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3, requires_grad=True)\n"
            "with torch.autocast('cpu', dtype):\n"
            "    outs = F.conv2d(x.bfloat16(), w), x.tanh(), F.linear(x, x[0, 0]), F.batch_norm(x, torch.zeros(3), torch.ones(3))\n"
            "print(*(out.dtype for out in outs), torch.tanh(x).dtype)\n"
            "outs[0].sum().backward(); print(w.grad.abs().sum() > 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["torch.float32", "torch.bfloat16", "torch.bfloat16", "torch.bfloat16", "torch.float32",
                                   "tensor(True)"], done.stderr


@pytest.mark.skipif(not train.c_compiler(), reason="no C compiler")
def test_a_compiled_network_obeys_the_lists_and_no_others(tmp_path):
    """Nor those of a network that was compiled before, and is in the cache."""
    code = ("import sys, torch, train; dtype = torch.bfloat16; lists = [[], []]; lists[int(sys.argv[1])].append('tanh')\n"
            "train.patch_autocast(lists, 'cpu', dtype); net = torch.nn.Tanh(); net.compile(backend='inductor')\n"
            "with torch.autocast('cpu', dtype): print(net(torch.randn(8)).dtype)")
    for listed, dtype in ((0, "torch.bfloat16"), (1, "torch.float32")):
        done = subprocess.run([sys.executable, "-c", code, str(listed)], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
        assert done.stdout.strip() == dtype, done.stderr


# ---- where something is missing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["train.py", "sample.py", "interpolate.py"])
def test_without_the_plugin_one_line_says_where_it_comes_from(script, tmp_path):
    assert "docs.habana.ai" in run(script, "--device", "hpu", cwd=tmp_path, status=2).stderr


@pytest.mark.parametrize("script", ["train.py", "sample.py", "interpolate.py"])
def test_without_a_card_one_line_says_so(script, card, tmp_path):
    stderr = run(script, "--device", "hpu", cwd=tmp_path, status=2, env={**card, "HPU_SIM_CARDS": "0"}).stderr
    assert "--device hpu" in stderr and len(stderr.splitlines()) == 1


def test_auto_takes_the_card_where_there_is_one_and_else_the_cpu(on_cpu, card, pack32, tmp_path):
    words = [*TINY, "--data", pack32, "--step", 1, "--no-compile"]
    one, none = at_once(*(lambda cards=cards: run("tests/bench.py", *words, env={**card, "HPU_SIM_CARDS": cards}, cwd=tmp_path)
                          for cards in "10"))
    assert "GAUDI" in one.stdout.splitlines()[-1] and "CPU threads" in none.stdout.splitlines()[-1]
    pictures = run("sample.py", "--checkpoint", on_cpu[0], env={**card, "HPU_SIM_CARDS": "0"}, cwd=tmp_path)
    assert one.stderr == none.stderr == pictures.stderr == ""
