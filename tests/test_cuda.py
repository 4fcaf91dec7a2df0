"""What `--device cuda` decides and how it replays a step, on a GPU that is played by the CPU."""
import gc
import inspect
import shutil
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers import ROOT, TINY

sys.path.insert(0, str(ROOT))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ---- a step as one graph --------------------------------------------------------------------------------------------

class Graph:
    """Plays torch.cuda.CUDAGraph: replay() runs the recorded ops again, on the same memory."""

    def __init__(self):
        self.ops, self.replays = [], 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, kwargs, outs in self.ops:
            for out, new in zip(outs, tree_leaves(op(*args, **kwargs))):
                if isinstance(new, torch.Tensor) and storage(new) != storage(out):  # else it is in place, or a view
                    out.copy_(new)


class Capture(TorchDispatchMode):
    """Plays torch.cuda.graph: it records what runs, and afterwards nothing has run."""
    LATEST = None
    WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}  # ops that need the device's answer
    signature = inspect.signature(torch.cuda.graph)  # torch's own, of this release

    def __init__(self, *args, **kwargs):
        super().__init__()
        Capture.LATEST, self.call, self.before = self, self.signature.bind(*args, **kwargs).arguments, {}
        self.graph, self.made = self.call["cuda_graph"], set()

    def __enter__(self):
        assert not self.graph.ops, "a graph holds one capture"
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        torch.set_rng_state(self.random)
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert op.overloadpacket.__name__ not in self.WAITS, f"operation not permitted when stream is capturing: {op}"
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor) and storage(t) not in self.made and id(t) not in self.before:
                self.before[id(t)] = t, t.clone()
        outs = tree_leaves(result := op(*args, **kwargs))
        self.made |= {storage(t) for t in outs if isinstance(t, torch.Tensor)} - {storage(t) for t, _ in self.before.values()}
        self.graph.ops.append((op, args, kwargs, outs))
        return result


def storage(tensor):
    return tensor.untyped_storage()._cdata


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 2022 with Triton and a C compiler beside it."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "manual_seed", torch.default_generator.manual_seed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(train, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name)


def arguments(*words):
    return train.parse_args([*TINY, "--preset", "naive-64", "--device", "cpu", *words])


def networks(args, gpu=True):
    """A DCGAN on the CPU that is made fast as on a GPU."""
    device = train.set_up_device(args, 0)
    if gpu:
        cuda = train.on_cuda(0)
        device.graph, device.compiler, device.compiling_pays, device.seed = cuda.graph, cuda.compiler, cuda.compiling_pays, cuda.seed
    return train.DCGAN(args, device)


@pytest.mark.parametrize("words", [[], ["--precision", "bf16", "--instance-noise", "0.05", "--latent", "uniform", "--mirror"]])
def test_replayed_steps_are_those_of_the_plain_loop(words, gpu):
    args = arguments(*words)
    models = networks(args, gpu=False), networks(args)
    plain, replayed = (train.make_fast(each, args, 0, 0) for each in models)
    frames = [torch.randint(0, 256, (16, 40, 54, 3), dtype=torch.uint8) for _ in range(12)]
    untouched = torch.stack(frames)
    expected, got = ([step(batch, number) for number, batch in enumerate(frames, 40)] for step in (plain, replayed))
    assert Capture.LATEST.graph.replays == 7, "five steps to warm up, and one capture for all that follow"
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=0, atol=0)
    assert len({tuple(row.tolist()) for row in got}) == 12, "an earlier step's statistics are not overwritten by a later one"
    assert torch.equal(torch.stack(frames), untouched), "the graph's own memory takes the frames, and no caller's"
    for net in ("G", "D", "G_ema"):
        torch.testing.assert_close(getattr(models[1], net).state_dict(), getattr(models[0], net).state_dict(), rtol=0, atol=0)


def test_other_threads_may_use_the_gpu_during_the_capture(gpu, monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or nullcontext())
    step = train.graphed(lambda frames: frames.float().mean((1, 2, 3)))
    for _ in range(6):
        step(torch.ones(2, 4, 4, 3, dtype=torch.uint8))
    call = Capture.LATEST.call
    assert call["capture_error_mode"] == "thread_local", "a thread pins memory, and NCCL's asks for events"
    assert {call["stream"]} == {*streams}, "it is captured on the stream of the first steps"


def test_the_graph_is_gone_with_the_step(gpu):
    """At once, and not when the collector comes by: NCCL's end would wait for it."""
    dcgan = networks(arguments())
    step = train.make_fast(dcgan, arguments(), 0, 0)
    for number in range(6):
        step(torch.zeros(16, 40, 54, 3, dtype=torch.uint8), number)
    graph, Capture.LATEST = weakref.ref(Capture.LATEST.graph), None
    assert graph().replays == 1
    gc.disable()
    try:
        del step
        assert graph() is None
    finally:
        gc.enable()


def test_what_waits_for_the_gpu_in_a_step_can_not_be_captured(gpu):
    """That the tests above would notice."""
    step = train.graphed(lambda frames: frames.float().mean() / frames.sum().item())
    with pytest.raises(AssertionError, match="capturing"):
        for _ in range(6):
            step(torch.ones(2, 4, 4, 3, dtype=torch.uint8))


@pytest.mark.parametrize("words, captured", [([], True), (["--precision", "bf16"], True), (["--no-graph"], False), (["--precision", "fp16"], False)])
def test_steps_are_captured_but_those_of_fp16_and_where_it_is_not_wanted(words, captured, gpu, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: None)
    args, asked = arguments(*words), []
    dcgan = networks(args)
    dcgan.device.graph = asked.append
    train.make_fast(dcgan, args, 0, 0)
    assert asked == [dcgan.step] * captured
    monkeypatch.undo()
    assert networks(args, gpu=False).device.graph(dcgan.step) == dcgan.step, "there are none on a CPU"


def test_a_gpus_optimizer_is_one_kernel_that_a_graph_may_hold(gpu):
    weight = torch.nn.Parameter(torch.empty(2, device="meta"))
    assert {key: train.on_cuda(0).AdamW([weight]).defaults[key] for key in ("fused", "capturable")} == {"fused": True, "capturable": True}


@pytest.mark.parametrize("capturable", [True, False])
def test_a_resumed_fused_optimizer_counts_its_steps_on_the_gpu(capturable):
    """Its kernel reads them there; a count on the CPU is an illegal memory access."""
    weight = torch.nn.Parameter(torch.empty(2, 2, device="meta"))
    optimizer = SimpleNamespace(param_groups=[dict(params=[weight], fused=True, capturable=capturable)], state={})
    train.load_adam_state(optimizer, {"step": 3, "exp_avg": [torch.zeros(2, 2)], "exp_avg_sq": [torch.zeros(2, 2)]})
    assert {t.device for t in optimizer.state[weight].values()} == {weight.device}


# ---- what is compiled -----------------------------------------------------------------------------------------------

@pytest.fixture
def compiled(monkeypatch):
    """The backends that networks are compiled with."""
    backends = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, backend: backends.append(backend))
    return backends


def without_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def without_triton(monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)


def with_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))


@pytest.mark.parametrize("lack", [without_compiler, without_triton, with_an_old_gpu])
def test_compile_is_left_out_in_a_line_where_it_can_not_be_and_refused_if_asked_for(lack, gpu, compiled, monkeypatch, capsys):
    lack(monkeypatch)
    dcgan = networks(arguments())
    train.make_fast(dcgan, arguments(), 0, 1e9)
    said = capsys.readouterr().out
    assert said.startswith("not compiled: ") and said.count("\n") == 1 and compiled == []
    with pytest.raises(model.InputError, match="--compile needs a C compiler, on cuda Triton and compute capability 7.0"):
        train.make_fast(dcgan, arguments("--compile"), 0, 1e9)


@pytest.mark.parametrize("words, on_gpu, images, backends", [
    ([], True, 1e9, ["inductor"] * 2),
    ([], True, 1e5, []),
    (["--minutes", "9"], True, 1e9, []),
    (["--minutes", "10"], True, 1e9, ["inductor"] * 2),
    (["--compile"], True, 1e5, ["inductor"] * 2),
    (["--no-compile"], True, 1e9, []),
    ([], False, 1e9, []),
    (["--compile"], False, 1e5, ["inductor"] * 2),
])
def test_compile_comes_with_long_runs_or_when_asked_for(words, on_gpu, images, backends, gpu, compiled, capsys):
    train.make_fast(networks(arguments(*words), on_gpu), arguments(*words), 0, images)
    assert compiled == backends and capsys.readouterr().out == ""


# ---- which cards the installed torch can use ------------------------------------------------------------------------

WHEEL = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize("card, built", [
    ((7, 5), WHEEL),
    ((8, 6), WHEEL),              # kernels for 8.0 run on all 8.x
    ((9, 0), ["sm_90a"]),         # this one card alone
    ((12, 1), ["compute_120"]),   # compiled by the driver
    ((13, 0), WHEEL),
])
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_card_that_the_installed_torch_has_kernels_for_is_taken(card, built, name, monkeypatch):
    play_card(monkeypatch, card, built)
    assert model.choose_device(name) == CUDA


@pytest.mark.parametrize("card, built", [
    ((7, 0), WHEEL),
    ((6, 1), WHEEL),
    ((8, 0), ["sm_86", "sm_90"]),  # kernels for 8.6 do not run on 8.0
    ((10, 0), ["sm_90"]),          # nor those for another major version
    ((10, 3), ["sm_120", "compute_120"]),
])
def test_one_that_it_has_none_for_is_refused_in_a_line_that_says_what_to_install(card, built, monkeypatch):
    play_card(monkeypatch, card, built)
    with pytest.raises(model.InputError, match="Tesla.*install.*torch<2.8") as refused:
        model.choose_device("cuda")
    assert "sm_{}{}".format(*card) in str(refused.value) and "\n" not in str(refused.value)
    assert model.choose_device("cpu") == CPU


def play_card(monkeypatch, card, built):
    for name, value in (("is_available", True), ("get_device_capability", card), ("get_arch_list", built), ("get_device_name", "Tesla")):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
