"""--device cuda without a GPU: choosing it, a step on fake CUDA tensors, the graph and the feed.

FakeTensorMode computes nothing. It checks devices, dtypes and shapes of every op. The autograd
engine needs a driver, so zero gradients replace backward(). Stand-ins for CUDA's graphs, streams
and events work on the CPU. tests/test_gpu.py runs the real thing where there is a GPU.
"""
import inspect
import itertools
import re
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import bench
import numpy as np
import pytest
import torch
from helpers import dcgan, new_process, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import train


def set_up(monkeypatch, *words, capability=(9, 0)):
    """The arguments, and what set_up_device makes of a GPU with this compute capability."""
    args = train.look_up(train.parse_args(["--preset", "naive-64", "--device", "cuda", *words]))
    with monkeypatch.context() as patch:
        patch.setattr(model, "use_once", lambda kind, local_rank: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for name in ("benchmark", "allow_tf32"):  # set_up_device changes them
            patch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
        return args, train.set_up_device(args)


# ---- choosing a GPU ------------------------------------------------------------------------------
@pytest.mark.parametrize("capability, words, precision", [
    ((7, 5), [], "fp16"), ((8, 0), ["--graph"], "bf16"), ((9, 0), ["--precision", "fp32"], "fp32")])
def test_a_gpu_gets_its_fastest_safe_precision_and_capturable_adam_only_for_a_graph(
        capability, words, precision, monkeypatch):
    args, device = set_up(monkeypatch, *words, capability=capability)
    assert (device.backend, device.precision, device.layout) == ("nccl", precision, torch.channels_last)
    assert device.adam == {"fused": True, "capturable": args.graph}
    assert device.pin and device.manual_seed is torch.cuda.manual_seed


HINTS = "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
NO_KERNELS = "CUDA error: no kernel image is available for execution on the device" + HINTS
NO_SUCH_GPU = "CUDA error: invalid device ordinal\nGPU device may be out of range" + HINTS


@pytest.fixture(params=[("ones", NO_KERNELS), ("set_device", NO_SUCH_GPU)], ids=["old", "missing"])
def broken(request, monkeypatch):
    """A GPU of which torch says that it cannot be used. Returns torch's words, on one line."""
    call, words = request.param

    def fail(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda if call == "set_device" else torch, call, fail)
    monkeypatch.setattr(model, "find_spec", lambda name: None)  # no Gaudi plugin
    return " ".join(words.split())[:80]


def test_a_gpu_that_cannot_be_used_is_one_line_and_auto_takes_the_cpu_unless_others_would_wait(broken, capsys):
    for name, local_rank in (("cuda", None), ("cuda", 1), ("auto", 1)):
        with pytest.raises(model.InputError) as caught:
            model.choose_device(name, local_rank)
        line = str(caught.value)
        assert "\n" not in line and broken in line and "--device cpu" in line
    assert model.choose_device("auto").type == "cpu"
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and broken in warning


def test_each_process_uses_a_gpu_of_its_own(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "ones", lambda n, device: used.append(device) or torch.zeros(n))
    assert model.choose_device("cuda", local_rank=3).type == "cuda" and used == [3, "cuda"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_train_py_ends_with_torchs_reason():
    line = run("train.py", "--device", "cuda", "--data", "x", status=2).stderr.splitlines()[-1]
    assert "NVIDIA" in line or "CUDA" in line


def test_an_illegal_memory_access_is_not_called_out_of_memory():
    advice = "choose less"
    error = torch.AcceleratorError if hasattr(torch, "AcceleratorError") else RuntimeError
    illegal = error("CUDA error: an illegal memory access was encountered")
    assert model.find_problem(illegal, advice) is None
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert advice in model.find_problem(full, advice)


# ---- a step on fake CUDA tensors -----------------------------------------------------------------
@pytest.fixture
def fake(monkeypatch):
    """A function: words of the command line → (a DCGAN, frames) of fake CUDA tensors."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("fake CUDA tensors of this torch need a driver")
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)  # G's and G_ema's
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, *how, **more: net)  # it cannot move fake weights
    monkeypatch.setattr(train, "latents", lambda seeds, nz, latent: torch.zeros(len(seeds), nz))  # real ones are slow

    def make(*words):
        args, device = set_up(monkeypatch, "--batch-size", "4", *words)
        with torch.device("cuda"):
            made = train.DCGAN(args, device)

        def backward(loss):
            for weight in (*made.G.parameters(), *made.D.parameters()):
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else weight.grad

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        return made, torch.zeros(4, args.image_size + 16, args.image_size + 20, 3, dtype=torch.uint8, device="cuda")

    with FakeTensorMode():
        yield make


@pytest.mark.parametrize("preset", model.PRESETS)  # with noise, shifts, flips, uniform latents
def test_a_step_keeps_to_the_gpu_and_to_its_dtypes_in_each_precision(preset, fake):
    for precision in train.AUTOCAST:
        made, frames = fake("--preset", preset, "--precision", precision)
        for value in made.step(frames).values():
            assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, "cuda")
        assert made.scaler.is_enabled() == (precision == "fp16")
    size = made.args.image_size
    assert made.sampler()(torch.zeros(4, made.args.nz, device="cuda")).shape == (4, 3, size, size)


def test_a_resumed_fused_optimizer_counts_its_steps_on_the_gpu(fake, monkeypatch):
    """Its kernel reads them there: a count on the CPU would be an illegal memory access."""
    words = ["--preset", "demo-64", "--graph"]
    made, frames = fake(*words)
    made.step(frames)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__int__", lambda steps: 1)  # a fake tensor has no value
        saved = made.state_dict()
    resumed, frames = fake(*words)
    resumed.load_state_dict(saved)
    for state, device in ((saved, "cpu"), (resumed.opt_G.state, "cuda"), (resumed.opt_D.state, "cuda")):
        leaves = tree_leaves([*state.values()])
        assert {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)} == {device}
    resumed.step(frames)


# ---- the step as one graph -----------------------------------------------------------------------
class Capture(TorchDispatchMode):
    """In the place of torch.cuda.graph and its CUDAGraph.

    replay() runs the recorded ops again, on the same memory. The first replay does nothing, as the
    ops have run here while they were recorded.
    """

    signature = inspect.signature(torch.cuda.graph)
    stream = None
    latest = None

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.call = self.signature.bind(*args, **kwargs).arguments
        self.graph = self.call["cuda_graph"]
        self.graph.ops = []
        self.graph.replays = 0
        Capture.latest = self

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.graph.ops.append((op, args, kwargs or {}, tree_leaves(result)))
        return result


class Graph:
    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, kwargs, outs in self.ops if self.replays > 1 else ():
            for out, new in zip(outs, tree_leaves(op(*args, **kwargs))):
                # Others are in place, or views.
                if isinstance(new, torch.Tensor) and new.data_ptr() != out.data_ptr():
                    out.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(Stream=lambda: stream, CUDAGraph=Graph, graph=Capture, current_stream=lambda: None,
                            set_stream=lambda stream: setattr(Capture, "stream", stream)).items():
        monkeypatch.setattr(torch.cuda, name, value)


def run_steps(step, between=None, n=9):
    """The statistics (steps, 5) of n steps, with a seed for each as in train.main."""
    torch.manual_seed(0)
    batches = torch.randint(0, 256, (n, 16, 40, 54, 3), dtype=torch.uint8)
    untouched = batches.clone()
    stats = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        stats.append(torch.stack(list(step(batch).values())))
        if between:
            between()
    assert torch.equal(batches, untouched), "the graph has memory of its own for the frames"
    return torch.stack(stats)


def assert_same_weights(a, b, nets):
    for net in nets:
        torch.testing.assert_close(getattr(a, net).state_dict(), getattr(b, net).state_dict(), rtol=0, atol=0)


NOISY = "--precision bf16 --instance-noise 0.05 --latent uniform --mirror --augment".split()


def test_replayed_steps_equal_eager_steps_and_the_graph_is_freed_with_them(graphs):
    eager, replayed = dcgan(*NOISY), dcgan(*NOISY)
    step = train.graphed(replayed.step)
    stats = run_steps(step, between=replayed.sampler)
    torch.testing.assert_close(stats, run_steps(eager.step), rtol=0, atol=0)
    eager.sampler()  # sets G_ema's statistics
    assert_same_weights(replayed, eager, ("G", "D", "G_ema"))
    assert Capture.latest.graph.replays == 4, "five steps to warm up, and one capture"
    assert Capture.latest.call["stream"] is Capture.stream, "the stream of the warm-up"
    assert Capture.latest.call["capture_error_mode"] == "thread_local", "a thread pins memory meanwhile"
    graph = weakref.ref(Capture.latest.graph)
    Capture.latest = None
    del step
    assert graph() is None, "NCCL cannot end before the graph"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiling_traces_g_once_and_d_twice(precision, monkeypatch):
    """D is traced with and without gradients of its weights. Real and fake images look alike."""
    traced = []

    def compiler(graph, inputs):
        traced.append(graph)
        return graph.forward

    set_up_device = train.set_up_device
    monkeypatch.setattr(train, "set_up_device", lambda args: replace(set_up_device(args), compiler=compiler))
    torch.compiler.reset()
    run_steps(dcgan("--compile", "--precision", precision).step, n=3)
    torch.compiler.reset()
    assert len(traced) == 3


# ---- uploads beside the step ---------------------------------------------------------------------
class Stream:
    """A CUDA stream that writes down in what order it is used."""

    def __init__(self, name, calls):
        self.name, self.calls, self.steps = name, calls, 0

    def record_event(self):
        self.steps += 1
        step = self.steps
        return SimpleNamespace(synchronize=lambda: self.calls.append(f"host waits for step {step}"))

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


class PinnedBatch:
    def __init__(self, calls):
        self.calls = calls

    def to(self, kind, non_blocking):
        assert kind == "cuda" and non_blocking
        self.calls.append(f"upload in {torch.cuda.current_stream().name}")
        return self

    def record_stream(self, stream):
        self.calls.append(f"memory is kept for {stream.name}")


def test_uploads_run_beside_the_step_and_the_host_stays_two_steps_ahead(monkeypatch):
    calls = []
    streams = [Stream("the step's stream", calls)]

    @contextmanager
    def use(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("another stream", calls))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", use)
    for _ in train.upload((PinnedBatch(calls) for _ in range(4)), train.Device("cuda")):
        calls.append("step")
    each = ["upload in another stream", "the step's stream waits for another stream",
            "memory is kept for the step's stream", "step"]
    assert calls == [*each, *each, *each, "host waits for step 1", *each, "host waits for step 2"]


@pytest.mark.parametrize("pin", [False, True])
def test_each_batch_has_memory_of_its_own_which_is_page_locked_for_a_gpu(pin, monkeypatch):
    """torch keeps such memory until its upload has ended."""
    empty, pinned = torch.empty, []

    def make(*size, pin_memory=False, **options):
        pinned.append(pin_memory)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", make)
    frames = np.random.default_rng(0).integers(0, 256, (64, 5, 6, 3), np.uint8)
    batches = list(itertools.islice(train.batches(frames, 4, (0, 0), pin=pin), 20))
    assert len({batch.data_ptr() for batch in batches}) == len(pinned) == 20 and set(pinned) == {pin}


# ---- gradients of several processes --------------------------------------------------------------
def test_gradients_are_added_up_in_one_message_for_each_update(monkeypatch):
    """Two processes with equal frames and numbers train as one: twice the half of a gradient."""
    messages = []

    def all_reduce(message, *_):
        messages.append(message.numel())
        message *= 2

    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    alone, one_of_two = dcgan(), dcgan()  # channels_last
    assert any(not weight.is_contiguous() for weight in one_of_two.D.parameters())
    one_of_two.world = 2
    stats = run_steps(one_of_two.step, n=3)
    torch.testing.assert_close(stats, run_steps(alone.step, n=3), rtol=0, atol=0)
    assert_same_weights(alone, one_of_two, ("G", "D"))
    sizes = [sum(weight.numel() for weight in net.parameters()) for net in (alone.D, alone.G)]
    assert messages == 3 * sizes, "D's, then G's, in each step"


# ---- the benchmark -------------------------------------------------------------------------------
def test_a_benchmark_prints_figures_and_writes_a_trace_and_leaves_no_run(pack, tmp_path):
    words = "--step 0.3 --price 3600 --trace trace.json --image-size 32 --batch-size 16 --ngf 4 --ndf 4".split()
    done = run("tests/bench.py", *words, "--device", "cpu", "--data", pack, cwd=tmp_path, popen=new_process)
    *_, header, _, row = (line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|"))
    figures = {name.strip("| "): float(re.sub("[^0-9.]", "", cell) or "nan") for name, cell in zip(header, row)}
    assert figures["images/s"] * 3600 == pytest.approx(figures["images/hour"], rel=0.01)
    assert figures["images per $"] == pytest.approx(figures["images/s"], rel=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json"}


def test_a_figure_that_cannot_be_measured_says_why_in_one_line():
    with pytest.raises(bench.Failed, match="error: .*--graph"):
        bench.isolated("step", 0, ["--device", "cpu", "--graph"])
    with pytest.raises(bench.Failed, match="no figure after 0 s"):
        bench.isolated("step", 60, [], limit=0.1)
