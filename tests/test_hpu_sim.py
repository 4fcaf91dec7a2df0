"""Tests of the simulated Gaudi card itself (hpu_sim/README.md): graphs, fall-backs, waits, uploads and busy cards."""
import json
from textwrap import dedent

import pytest
from helpers import run
from hpu_sim.build import Unavailable, build, unsupported

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
def error(run):
    try: run()
    except Exception as e: return f"{type(e).__name__}: {e}"
def show(*values): print(json.dumps(values))
"""


@pytest.fixture(scope="module")
def on_card(tmp_path_factory):
    """on_card(mode, code, **environment) runs code as a script → (what show() printed last, stderr)."""
    try:
        card = build()
    except Unavailable as why:
        pytest.skip(str(why))

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
    assert stderr == ""


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
    assert decaying["graph_steps"][-3:] == [6, 7, 8], "1 - weight_decay * lr is a constant"
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
        bytes = x.to(torch.uint8)
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


def test_a_card_is_acquired_at_first_use_and_a_busy_one_fails_there(on_card):
    seen, _ = on_card(LAZY, """
        import os
        def use(cards, busy, rank):  # read when a card is acquired: one process can play all
            os.environ.update(HPU_SIM_CARDS=cards, HPU_SIM_BUSY=busy, LOCAL_RANK=rank)
            before = torch.hpu.is_available(), torch.hpu.device_count(), torch.hpu.is_initialized()
            uses = [torch.hpu.get_device_name, torch.hpu.synchronize, torch.hpu.mem_get_info,
                    lambda: torch.ones(2, device="hpu"), lambda: torch.ones(2).to("hpu")]
            return [*before, *{error(use) for use in uses}]
        show(*(use(*case) for case in ("000", "220", "211", "210")))
    """, HPU_SIM_CARDS="0")
    failed = "RuntimeError: synStatus=8 [Device not found] Device acquire failed."
    busy = [True, 2, False, failed]
    assert seen == [[False, 0, False, failed], busy, busy, [True, 2, False, None]]


def test_the_mode_depends_on_the_variable_and_then_on_the_release(on_card):
    which = "from habana_frameworks.torch.utils.internal import is_lazy; show(is_lazy(), report()['mode'])"
    for mode, release, lazy in [(None, None, False), (None, "1.20.1", True), ("2", None, True)]:
        shown, stderr = on_card(mode, which, **({"HPU_SIM_RELEASE": release} if release else {}))
        assert shown == [lazy, "lazy" if lazy else "eager"]
        warned = [line.split()[1] for line in stderr.splitlines()]
        assert warned == ([] if lazy else ["add_step_closure", "mark_step", "iter_mark_step"])


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
