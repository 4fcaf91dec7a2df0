"""Tests of the simulated Gaudi card itself (hpu_sim/README.md): what it counts, what it refuses, what it prints."""
import json
import os
import signal
import sys
import time
from textwrap import dedent

import pytest
from helpers import Fork, run
from hpu_sim.build import Unavailable, build, unsupported, without_plugin_lines

PRELUDE = """
import json, torch
import habana_frameworks.torch.core as htcore
from habana_frameworks.torch.hpex.optimizers import FusedAdamW
def report(): return htcore.report()
def new_graphs(run):  # the number of new graphs that run() makes
    htcore.mark_step()
    before = report()["graphs"]
    run()
    htcore.mark_step()
    return report()["graphs"] - before
def new_layouts(run):  # the number of graphs that run() compiles again
    htcore.mark_step()
    before = report()["layout_graphs"]
    run()
    htcore.mark_step()
    return report()["layout_graphs"] - before
def error(run):
    try: run()
    except Exception as e: return f"{type(e).__name__}: {e}"
def show(*values): print(json.dumps(values))
"""


@pytest.fixture(scope="module")
def card():
    """The environment in which the simulated card exists."""
    try:
        return build()
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def on_card(card, tmp_path_factory):
    """on_card(mode, code, **environment) runs code as a script → (what show() printed last, stderr)."""
    def on_card(mode, code, **env):
        if mode is not None:
            env["PT_HPU_LAZY_MODE"] = mode
        script = tmp_path_factory.mktemp("card") / "script.py"
        script.write_text(PRELUDE + dedent(code))
        done = run(script, env={**card, **env}, timeout=120)
        return json.loads(done.stdout.splitlines()[-1]), done.stderr
    return on_card


LAZY, EAGER = "1", "0"
both = pytest.mark.parametrize("mode", [LAZY, EAGER], ids=["lazy", "eager"])


def test_lazy_mode_compiles_a_graph_for_each_new_constant(on_card):
    (made,), stderr = on_card(LAZY, """
        x, square = torch.ones(4, 6).to("hpu"), torch.ones(6, 6).to("hpu")
        rows = torch.arange(8).to("hpu")
        each = lambda f, values: sum(new_graphs(lambda v=v: f(v)) for v in values)
        made = dict(
            the_same=each(lambda _: x * 2 + x, range(3)),
            other_memory=each(lambda _: x.clone(), range(2)) + each(lambda t: t.clone(), [torch.ones(4, 6).to("hpu")]),
            numbers=each(lambda n: x - n, [1, 2, 3, 1]),
            uploaded=each(lambda n: x + torch.tensor([float(n)]).to("hpu"), [1, 2, 3, 1]),
            shapes=each(lambda n: torch.full((n,), 1.5, device="hpu"), [2, 3, 4, 2]),
            dtypes=each(lambda t: x.to(t), [torch.bfloat16, torch.int32, torch.bfloat16]),
            strides=each(lambda t: t.exp(), [square, square.t(), square]),
            offsets=each(lambda part: part + 1, rows.split(2)),
            slices=each(lambda n: x[:, n:n + 2], [1, 2, 3]),
            item=each(lambda _: (x.mean().item(), x.mean()), range(2)),
            copy=each(lambda _: (x.std().cpu(), x.std()), range(2)),
            synchronize=each(lambda _: (x.amax(), torch.hpu.synchronize(), x.amax()), range(2)),
            uploads_only=each(lambda _: torch.ones(2).to("hpu"), range(2)),
            nothing=new_graphs(lambda: None),
            draws=each(lambda n: (torch.manual_seed(n), torch.rand(3, device="hpu")), [1, 2, 3]))
        made["seeds"] = report()["uploads"]["seed"]
        show(made)
    """)
    assert made == dict(the_same=1, other_memory=1, numbers=3, uploaded=1, shapes=3, dtypes=2, strides=2, offsets=4,
                        slices=3, item=1, copy=1, synchronize=1, uploads_only=0, nothing=0, draws=1, seeds=0)
    assert without_plugin_lines(stderr) == []


def test_a_graph_compiles_again_while_the_layout_of_its_inputs_changes(on_card):
    (matrix, vector, uploaded, temporary), _ = on_card(LAZY, """
        matrix, vector = torch.ones(3, 3).to("hpu"), torch.ones(3).to("hpu")
        each = lambda run: [[new_layouts(run), report()["graphs"]] for _ in range(5)]
        in_place = each(lambda: matrix.mul_(2))
        of_a_vector = each(lambda: vector.mul_(3))
        matrix.copy_(torch.ones(3, 3))
        after_an_upload = each(lambda: matrix.mul_(2))
        def made_by_another_graph():
            made = matrix + 5
            htcore.mark_step()
            made.exp()
        show(in_place, of_a_vector, after_an_upload, each(made_by_another_graph))
    """)
    assert matrix == [[0, 1], [1, 1], [1, 1], [0, 1], [0, 1]], "the second and the third run"
    assert vector == [[0, 2]] * 5, "a vector has one layout"
    assert uploaded == [[0, 2]] * 5, "all three layouts are known"
    assert temporary == [[0, 4]] * 5, "in the first run already, its layout is the card's"


def test_update_bn_compiles_a_graph_for_each_batch_and_waits_for_each(on_card):
    (made, syncs), _ = on_card(LAZY, """
        net = torch.nn.BatchNorm1d(3).to("hpu")
        batch, before = torch.randn(8, 3).to("hpu"), report()["syncs"]
        made = new_graphs(lambda: torch.optim.swa_utils.update_bn([batch] * 6, net))
        show(made, report()["syncs"] - before)
    """)
    assert made >= 6 and syncs == 6


TRAIN = """
net = torch.nn.Linear(3, 3).to("hpu")
x = torch.randn(4, 3).to("hpu")
def step(optimizer, i, size=4):
    optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
    optimizer.zero_grad()
    net(x[:size] + torch.randn(size, 3, device="hpu")).square().mean().backward()
    optimizer.step()
"""


def test_a_steady_step_compiles_nothing_after_the_second_and_the_report_says_when_a_step_did(on_card):
    (steady, changed, decaying, count), _ = on_card(LAZY, TRAIN + """
optimizer = FusedAdamW(net.parameters(), lr=0.1)
for i in range(5): step(optimizer, i)
steady = report()
step(optimizer, 5, size=2)
changed = report()
count = optimizer.param_groups[0]["step"], [state["step"] for state in optimizer.state.values()]
optimizer.param_groups[0]["weight_decay"] = 0.1
for i in range(6, 9): step(optimizer, i)
show(steady, changed, report(), count)
""")
    assert steady["graphs"] == len(steady["new_graphs"]) == len(steady["graph_steps"]) > 2
    assert max(steady["graph_steps"]) == 1, "the first step makes the moments"
    assert steady["optimizer_steps"] == 5
    assert steady["uploads"] == {"seed": 0, "step": 5, "tensor": steady["events"].count("copy_to_hpu")}
    assert steady["new_graphs"][0] == 0 and steady["graphs_run"] > steady["graphs"] and steady["syncs"] == 0
    assert changed["graph_steps"][len(steady["graph_steps"]):] == [5], "forward and backward; the update is the same"
    assert changed["new_graphs"][-1] == steady["graphs_run"]
    assert decaying["graphs"] == changed["graphs"], "1 - weight_decay * lr is an input"
    assert set(decaying["layout_steps"]) == {1, 2}, "compiled again in the second and the third step"
    assert decaying["layout_graphs"] == len(decaying["layout_steps"])
    assert count == [6, [0, 0]]


def test_compiled_mode_lists_the_step_of_each_trace(on_card):
    (seen,), _ = on_card(EAGER, TRAIN + """
net = torch.compile(net, backend="hpu_backend", dynamic=False)
optimizer = FusedAdamW(net.parameters(), lr=0.1)
for i, size in enumerate([4, 4, 4, 2, 2, 4]): step(optimizer, i, size)
show(report())
""")
    assert seen["compiles"] == 2 and seen["compile_steps"] == [0, 3] and seen["optimizer_steps"] == 6
    assert seen["graphs"] == 0 and seen["new_graphs"] == []


@both
def test_what_has_no_kernel_for_its_dtype_falls_back_and_waits(on_card, mode):
    (seen, fine), _ = on_card(mode, """
        F = torch.nn.functional
        x, rows = torch.arange(12).view(3, 4).to("hpu"), torch.tensor([[0, 2, 1, 1]]).to("hpu")
        bytes = x.cpu().to(torch.uint8).to("hpu")
        images, grid = torch.ones(1, 1, 4, 4).to("hpu"), torch.zeros(1, 2, 2, 2).to("hpu")
        for t in (x, x.float(), x.bfloat16()): t.index_select(0, rows[0]), t.gather(0, rows), t[rows[0]]
        F.grid_sample(images, grid, align_corners=False)
        htcore.mark_step()
        fine = report()
        bytes + 1
        for _ in range(2):
            assert bytes[rows[0]].cpu().equal(bytes.cpu()[rows[0].cpu()])
        bytes.index_select(0, rows[0]), bytes.gather(0, rows)
        F.grid_sample(images.bfloat16(), grid.bfloat16(), align_corners=False)
        F.grid_sample(images.requires_grad_(), grid, align_corners=False).sum().backward()
        x[x > 3], torch.isin(x, rows)
        show(report(), fine)
    """)
    assert fine["fallbacks"] == {} and unsupported(fine) == []
    assert seen["fallbacks"] == {"aten::index_select uint8": 1, "aten::gather uint8": 1, "aten::index uint8": 2,
                                 "aten::grid_sampler_2d bfloat16": 1, "aten::grid_sampler_2d_backward float32": 1,
                                 "aten::nonzero bool": 1, "aten::isin int64": 1}
    assert unsupported(seen) == sorted(seen["fallbacks"])
    waits = [seen["syncs_by_op"][call.removeprefix("aten::").split()[0]] for call in seen["fallbacks"]]
    assert waits == list(seen["fallbacks"].values())


@both
def test_bytes_are_neither_permuted_nor_made_on_the_card(on_card, mode):
    (fine, seen, equal), _ = on_card(mode, """
        frames = torch.arange(24).view(2, 3, 4)
        images = frames.float().to("hpu")
        on_the_card = frames.to(torch.uint8).to("hpu")
        for t in (images, images.bfloat16(), images.int(), images.long()): t.permute(2, 0, 1)
        on_the_card.float().permute(2, 0, 1), on_the_card.clone(), on_the_card.cpu().permute(2, 0, 1)
        images.cpu().to(torch.uint8)
        fine = report()["fallbacks"]
        permuted = on_the_card.permute(2, 0, 1)
        made = images.to(torch.uint8)
        torch.empty(2, 3, 4, dtype=torch.uint8, device="hpu").copy_(images.int())
        seen = report()["fallbacks"]
        show(fine, seen, permuted.cpu().equal(frames.permute(2, 0, 1).byte()) and made.cpu().equal(frames.byte()))
    """)
    assert fine == {}
    assert seen == {"aten::permute uint8": 1, "aten::_copy_from float32->uint8": 1, "aten::_copy_from int32->uint8": 1}
    assert equal


# ---- a card, a busy card, no card -----------------------------------------------------------------------------------

def test_a_card_is_acquired_at_first_use_and_a_busy_one_fails_there(on_card):
    seen, _ = on_card(LAZY, """
        import os
        def use(cards, busy, rank):  # read when a card is acquired: one process can play all
            os.environ.update(HPU_SIM_CARDS=cards, HPU_SIM_BUSY=busy, LOCAL_RANK=rank)
            before = torch.hpu.is_available(), torch.hpu.device_count(), torch.hpu.is_initialized()
            uses = [torch.hpu.get_device_name, torch.hpu.synchronize, torch.hpu.mem_get_info,
                    lambda: torch.ones(2, device="hpu"), lambda: torch.ones(2).to("hpu")]
            return [*before, *{error(use) for use in uses}]
        show(*(use(*case) for case in ("220", "211", "210")))
    """, HPU_SIM_CARDS="0")
    busy = [True, 2, False, "RuntimeError: synStatus=8 [Device not found] Device acquire failed."]
    assert seen == [busy, busy, [True, 2, False, None]]


@both
def test_a_machine_without_a_card_has_an_empty_name_and_fails_at_the_first_tensor(on_card, mode):
    (name, available, count, errors), stderr = on_card(mode, """
        import habana_frameworks.torch.distributed.hccl
        name = torch.hpu.get_device_name()
        uses = [torch.hpu.synchronize, lambda: torch.ones(2, device="hpu"), lambda: torch.ones(2).to("hpu")]
        show(name, torch.hpu.is_available(), torch.hpu.device_count(), [error(use) for use in uses])
    """, HPU_SIM_CARDS="0")
    assert (name, available, count) == ("", False, 0)
    assert errors == ["RuntimeError: synStatus=8 [Device not found] Device acquire failed. No devices found."] * 3
    lines = without_plugin_lines(stderr)
    assert len(lines) == 2 and "UserWarning: Device not available" in lines[0]
    assert "CONFIGURATION" not in stderr


def test_the_first_use_of_a_card_prints_the_configuration_on_stderr_of_rank_0(on_card):
    use = "print('before', file=__import__('sys').stderr); torch.ones(2).to('hpu').exp().cpu(); show(1)"
    _, stderr = on_card(LAZY, use, PT_HPU_RECIPE_CACHE_CONFIG="/var/tmp/recipes,false,4096")
    first, start, *banner, end = stderr.splitlines()
    assert first == "before" and "HABANA PT BRIDGE CONFIGURATION" in start and set(end) == {"-"}
    assert " PT_HPU_LAZY_MODE = 1" in banner
    assert " PT_HPU_RECIPE_CACHE_CONFIG = /var/tmp/recipes,false,4096" in banner
    assert without_plugin_lines(stderr) == ["before"]
    assert on_card(LAZY, use, RANK="1")[1] == "before\n"
    assert on_card(LAZY, "show(1)")[1] == "", "a card that is not used"


def test_a_card_without_room_fails_in_the_allocators_words(on_card):
    (failed, fits, total), _ = on_card(LAZY, """
        x = torch.ones(256, 1024).to("hpu")
        failed = error(lambda: torch.ones(256, 1024).to("hpu"))
        del x
        show(failed, error(lambda: torch.ones(256, 1024).to("hpu")), torch.hpu.mem_get_info()[1])
    """, HPU_SIM_MEMORY=str(3 << 19))
    assert failed == ("RuntimeError: [Rank:0] FATAL ERROR :: MODULE:PT_DEVMEM "
                      "Allocation failed for size::1048576 (1)MB")
    assert fits is None and total == 3 << 19


# ---- environment variables ------------------------------------------------------------------------------------------

def test_the_mode_depends_on_the_variable_and_then_on_the_release(on_card):
    which = "from habana_frameworks.torch.utils.internal import is_lazy; show(is_lazy(), report()['mode'])"
    for mode, release, lazy in [(None, None, False), (None, "1.20.1", True), ("2", None, True)]:
        shown, stderr = on_card(mode, which, **({"HPU_SIM_RELEASE": release} if release else {}))
        assert shown == [lazy, "lazy" if lazy else "eager"]
        warned = [line.split()[1] for line in stderr.splitlines()]
        assert warned == ([] if lazy else ["add_step_closure", "mark_step", "iter_mark_step"])


def test_a_metrics_file_counts_compilations_and_fallbacks(on_card, tmp_path):
    file = tmp_path / "new" / "metrics.json"
    code = """
        x = torch.ones(4, 6).to("hpu")
        rows = torch.arange(2).to("hpu")
        for n in (1, 2, 1):
            (x + n).cpu()
        bytes = torch.ones(4, 6).byte().to("hpu")
        bytes.index_select(0, rows)
        show(open(FILE).read())
    """
    changes = dict(PT_HPU_METRICS_FILE=str(file), PT_HPU_METRICS_DUMP_TRIGGERS="process_exit,metric_change")
    (before_exit,), _ = on_card(LAZY, code.replace("FILE", repr(str(file))), **changes)
    assert before_exit.startswith("[{") and not before_exit.endswith("]\n"), "the closing bracket comes at exit"
    entries = json.loads(file.read_text())
    changed = [entry for entry in entries if entry["triggered_by"] == "metric_change"]
    assert [(entry["metric_name"], entry["statistics"]["TotalNumber"]) for entry in changed] == [
        ("graph_compilation", 1), ("graph_compilation", 2), ("cpu_fallback", 1)]
    at_exit = {e["metric_name"]: e["statistics"] for e in entries if e["triggered_by"] == "process_exit"}
    assert at_exit["graph_compilation"]["TotalNumber"] == 2
    assert at_exit["cpu_fallback"] == {"TotalNumber": 1, "FallbackOps": {"aten::index_select": 1}}

    on_card(LAZY, "torch.ones(2).to('hpu').exp().cpu(); show(1)", PT_HPU_METRICS_FILE=str(file), RANK="1")
    (entry, *_) = json.loads(file.with_name("metrics-rank1.json").read_text())
    assert entry["metric_name"] == "graph_compilation" and entry["statistics"]["TotalNumber"] == 1
    assert file.exists() and not file.with_name("metrics.json.1").exists()
    on_card(LAZY, "torch.ones(2).to('hpu'); show(1)", PT_HPU_METRICS_FILE=str(file))
    assert file.with_name("metrics.json.1").exists(), "an older file stays"
    on_card(LAZY, "show(1)", PT_HPU_METRICS_FILE=str(tmp_path / "unused.json"))
    assert not (tmp_path / "unused.json").exists(), "a card that is not used"


def test_a_metrics_file_without_a_folder_ends_the_run_at_its_first_graph(on_card):
    (before, first_graph), _ = on_card(LAZY, """
        x = torch.ones(4, 6).to("hpu")
        before = error(lambda: x + 1)
        show(before, error(htcore.mark_step))
    """, PT_HPU_METRICS_FILE="metrics.json", PT_HPU_METRICS_DUMP_TRIGGERS="metric_change")
    assert before is None
    assert first_graph.startswith("RuntimeError: FileNotFoundError: [Errno 2] No such file or directory: ''")


@pytest.mark.parametrize("release, fields, works", [("1.19", 3, True), ("1.19", 4, False), ("1.21", 4, True)])
def test_four_fields_of_the_recipe_cache_are_fatal_up_to_release_1_19(release, fields, works, on_card):
    config = ",".join(["/var/tmp/recipes", "false", "4096", "true"][:fields])
    (failed,), _ = on_card(LAZY, "show(error(torch.hpu.get_device_name))", HPU_SIM_RELEASE=release,
                           PT_HPU_RECIPE_CACHE_CONFIG=config)
    assert failed is None if works else "PT_HPU_RECIPE_CACHE_CONFIG should be from range <1:3>" in failed


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["Unix", "Windows"])
def test_a_list_of_ops_with_windows_line_ends_matches_nothing_and_says_nothing(end, on_card, tmp_path):
    (tmp_path / "ops").write_bytes(f"conv2d{end}matmul{end}".encode())
    (dtype,), stderr = on_card(LAZY, """
        x = torch.ones(4, 4).to("hpu")
        with torch.autocast("hpu", torch.bfloat16):
            show(str((x @ x).dtype))
    """, PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST=str(tmp_path / "ops"))
    assert dtype == ("torch.bfloat16" if end == "\n" else "torch.float32")
    assert without_plugin_lines(stderr) == []


def test_a_product_with_a_number_is_bf16_under_autocast(on_card):
    """The product of a random number and a number is rounded to 8 bits. A draw between two numbers is not."""
    (product, drawn), _ = on_card(LAZY, """
        with torch.autocast("hpu", torch.bfloat16):
            product = torch.rand(8, device="hpu") * 9
            drawn = torch.empty(8, device="hpu").uniform_(0, 9)
        show(str(product.dtype), str(drawn.dtype))
    """)
    assert (product, drawn) == ("torch.bfloat16", "torch.float32")


def test_eager_mode_uploads_a_seed_for_each_draw_and_waits_in_manual_seed(on_card):
    (events, uploads, free, total), _ = on_card(EAGER, """
        torch.manual_seed(1)  # nothing to wait for yet
        x = torch.empty(8, device="hpu")
        x.normal_(), x.uniform_(), torch.randperm(4, device="hpu"), torch.nn.functional.dropout(x), x.add_(1)
        torch.manual_seed(2)
        torch.hpu.random.manual_seed_all(3)
        show(report()["events"], report()["uploads"], *torch.hpu.mem_get_info())
    """)
    assert events == ["upload:seed"] * 4 + ["sync:manual_seed"] and uploads == {"seed": 4, "step": 0, "tensor": 0}
    assert 0 < free < total == 32 * 2 ** 30


@both
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(on_card, mode):
    (equal, moved), _ = on_card(mode, TRAIN + """
import copy, io
optimizer = FusedAdamW(net.parameters(), lr=0.1, weight_decay=0.1)
for i in range(3): step(optimizer, i)
file = io.BytesIO()
torch.save([net.state_dict(), optimizer.state_dict(), torch.hpu.get_rng_state()], file)
for i in range(3, 6): step(optimizer, i)
expected = net.weight.detach().clone()
file.seek(0)
saved = torch.load(file, weights_only=False)
net.load_state_dict(saved[0])
moved = not torch.equal(net.weight.cpu(), expected.cpu())
optimizer = FusedAdamW(net.parameters(), lr=0.1, weight_decay=0.1)
optimizer.load_state_dict(saved[1])
torch.hpu.random.set_rng_state(saved[2])
for i in range(3, 6): step(optimizer, i)
show(torch.equal(net.weight.cpu(), expected.cpu()), moved)
""")
    assert equal and moved


@both
def test_a_collective_is_part_of_the_graph_and_waiting_for_it_cuts_the_graph(on_card, mode):
    (refused, seen, made), _ = on_card(mode, """
        import torch.distributed as dist
        import habana_frameworks.torch.distributed.hccl
        one = dict(backend="hccl", store=dist.HashStore(), rank=0, world_size=1)
        refused = error(lambda: dist.init_process_group(**one, device_id=None))
        if not dist.is_initialized(): dist.init_process_group(**one)
        sizes = [4, 4, 6]
        made = [new_graphs(lambda: dist.all_reduce(torch.ones(n, device="hpu"))) for n in sizes]
        show(refused, report(), made)
        dist.destroy_process_group()
    """)
    assert "hccl::allreduce" in seen["ops"]
    assert (refused or "").startswith("TypeError") == (mode == LAZY), "lazy mode's wrapper has no device_id"
    assert made == ([1, 0, 1] if mode == LAZY else [0, 0, 0])
    assert seen["events"].count("mark:hccl") == (3 if mode == LAZY else 0)


RANK = """
import atexit, os, pathlib, signal, sys, time
import torch.distributed as dist
import habana_frameworks.torch.core
import habana_frameworks.torch.distributed.hccl
rank, end, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
dist.init_process_group("hccl", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
if rank == 1:
    while not (folder / "go").exists(): time.sleep(0.05)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
if end == "at once": atexit.register(lambda: dist.is_initialized() and os._exit(1))
(folder / f"{rank} ends").touch()
if end == "destroyed": dist.destroy_process_group()
sys.exit(3)
"""


@pytest.fixture
def two_ranks(card, tmp_path):
    """two_ranks(end) starts two processes. Rank 1 goes on when the file go is there."""
    (tmp_path / "rank.py").write_text(RANK)
    started = []

    def two_ranks(end):
        env = {**os.environ, **card, "PT_HPU_LAZY_MODE": LAZY, "HPU_SIM_CARDS": "2"}
        for rank in "01":
            words = [sys.executable, str(tmp_path / "rank.py"), rank, end, str(tmp_path)]
            started.append(Fork(words, env={**env, "RANK": rank, "LOCAL_RANK": rank}))
        return started
    yield two_ranks
    for process in started:
        process.process.kill()


@pytest.mark.parametrize("end", ["by itself", "destroyed"])
def test_a_rank_that_ends_alone_waits_for_the_others(end, two_ranks, tmp_path):
    first, second = two_ranks(end)
    deadline = time.monotonic() + 300
    while not (tmp_path / "0 ends").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            first.wait(2)
        first.send_signal(signal.SIGTERM)  # no handler of Python runs in the barrier
    (tmp_path / "go").touch()
    assert (first.wait(120), second.wait(120)) == (3, 3)


def test_an_exit_hook_of_the_script_runs_before_the_barrier(two_ranks):
    first, second = two_ranks("at once")
    assert first.wait(120) == 1
    assert second.poll() is None
