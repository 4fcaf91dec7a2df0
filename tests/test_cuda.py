"""--device cuda without a GPU: choosing it, a step on fake CUDA tensors, the graph and the feed.

FakeTensorMode computes nothing. It checks devices, dtypes and shapes of every op. The autograd
engine needs a driver, so zero gradients replace backward(). Stand-ins for CUDA's graphs, streams
and events work on the CPU. tests/test_gpu.py runs the real thing where there is a GPU.
"""
import inspect
import itertools
import weakref
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import bench
import numpy as np
import pytest
import torch
from helpers import TINY, dcgan, new_process, run
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


def test_a_gpu_that_cannot_be_used_gives_one_line_with_torchs_own_words(broken):
    with pytest.raises(model.InputError) as caught:
        model.choose_device("cuda")
    line = str(caught.value)
    assert "\n" not in line and broken in line and "--device cpu" in line


def test_auto_warns_of_a_gpu_that_cannot_be_used_and_takes_the_cpu(broken, capsys):
    assert model.choose_device("auto").type == "cpu"
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and broken in warning


def test_one_of_several_processes_does_not_take_the_cpu_instead(broken):
    """The others would wait half an hour for it."""
    for name in ("auto", "cuda"):
        with pytest.raises(model.InputError, match=broken[:30]):
            model.choose_device(name, local_rank=1)


def test_each_process_uses_a_gpu_of_its_own(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "ones", lambda n, device: used.append(device) or torch.zeros(n))
    assert model.choose_device("cuda", local_rank=3).type == "cuda" and used == [3, "cuda"]


@pytest.mark.parametrize("rank", [{}, dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")],
                         ids=["alone", "one of two"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_train_py_ends_with_torchs_reason(rank):
    line = run("train.py", "--device", "cuda", "--data", "x", env=rank, status=2).stderr.splitlines()[-1]
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
class LazyGPU:
    """Streams and events of a GPU that does all its work as late as it may.

    It works only while the host waits for an event. A stream runs its operations in order.
    """

    def __init__(self, monkeypatch):
        self.waits = 0  # of the host
        self.default = self.current = LazyStream(self)
        for name, value in dict(Stream=lambda: LazyStream(self), current_stream=lambda: self.current,
                                stream=self.use).items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def use(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before


class LazyStream:
    def __init__(self, gpu):
        self.gpu = gpu
        self.queue = deque()

    def record_event(self):
        event = LazyEvent(self)
        self.queue.append(event.finish)
        return event

    def wait_stream(self, other):
        self.queue.append(other.record_event().finish_all_before)


class LazyEvent:
    def __init__(self, stream):
        self.stream, self.finished = stream, False

    def finish(self):
        self.finished = True

    def finish_all_before(self):
        while not self.finished:
            self.stream.queue.popleft()()

    def synchronize(self):
        self.stream.gpu.waits += 1
        self.finish_all_before()


class LazyBatch:
    """A batch in pinned memory. The GPU reads it when it comes to the upload."""

    def __init__(self, gpu):
        self.gpu, self.uploaded, self.used_by = gpu, False, None

    def to(self, kind, non_blocking=False):
        assert kind == "cuda" and non_blocking
        self.gpu.current.queue.append(lambda: setattr(self, "uploaded", True))
        return self

    def record_stream(self, stream):
        self.used_by = stream


def test_uploads_run_beside_the_step_and_the_host_stays_two_steps_ahead(monkeypatch):
    gpu = LazyGPU(monkeypatch)
    clock = itertools.count()  # in seconds: each look at it takes one
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock) + 1000 * gpu.waits)
    batches = [LazyBatch(gpu) for _ in range(40)]
    feed = train.Feed(iter(batches), train.Device("cuda"))
    finished, ahead_of_gpu = [], []
    for i, batch in enumerate(batches):
        assert next(feed) is batch
        ahead_of_gpu.append(i - len(finished))
        gpu.default.queue.append(lambda batch=batch: finished.append(batch.uploaded))
    gpu.default.record_event().synchronize()
    assert finished == [True] * 40, "a step waits for its upload"
    assert max(ahead_of_gpu) == 2 and set(ahead_of_gpu[2:]) == {2}
    assert {batch.used_by for batch in batches} == {gpu.default}, "memory is kept until the step ends"
    assert feed.waited == 40, "waiting for the GPU is not waiting for data"


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
def test_a_benchmark_prints_figures_and_the_longest_kernels_and_leaves_no_run(pack, tmp_path):
    words = ["--step", 0.2, "--price", 3.06, *TINY, "--device", "cpu", "--data", pack, "--trace", tmp_path / "trace.json"]
    done = run("tests/bench.py", *words, cwd=tmp_path, popen=new_process)  # torch's profiler crashes in a fork
    row, kernels = done.stdout.split("| kernel |")
    assert "| 1 × cpu | 1 × 16 | fp32 |" in row and len({line.count("|") for line in row.splitlines()[:3]}) == 1
    assert "aten::convolution_backward" in kernels and "%" in kernels
    assert "aten::convolution_backward" in (tmp_path / "trace.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_an_error_and_a_hang_are_reasons_of_one_line():
    with pytest.raises(bench.Failed, match="error: .*--graph"):
        bench.isolated("step", 0, ["--device", "cpu", "--graph"])
    with pytest.raises(bench.Failed, match="no figure after 0 s"):
        bench.isolated("step", 60, [], limit=0.1)


def test_the_benchmark_of_a_gpu_goes_on_after_a_row_that_fails(monkeypatch, tmp_path, capsys):
    def isolated(what, seconds, words, limit=120):
        if "--graph" in words:
            raise bench.Failed("this card is broken")
        if what == "card":
            return "a GPU", "bf16", 800.0, 1000.0
        return dict(preset="naive-64", mode="plain", device="1 × GPU", batch="1 × 128", precision="bf16", memory="1 GB",
                    images_s=3000.0, waiting=0.01, tflops=80.0, start=2.0, profile=(1.0, [("conv", 10, 0.5)]))

    monkeypatch.setattr(bench, "isolated", isolated)
    bench.measure_gpu(tmp_path, 3, 5, 50, None, [])
    lines = capsys.readouterr().out.splitlines()
    assert sum("this card is broken" in line for line in lines) == sum(len(goals) - 1 for *_, goals in bench.GPU_ROWS)
    assert sum("3,000" in line and "10.0%" in line for line in lines) == len(bench.GPU_ROWS)
    assert sum("3.00×" in line for line in lines) == 1, "the plain loop's batch size"
    assert any("conv" in line and "100.0%" in line for line in lines)


def test_annotations_are_not_counted_as_kernels():
    """Optimizer.step's, for example, spans kernels and the gaps between them."""
    def event(key, seconds, device, annotation):
        return SimpleNamespace(key=key, count=1, self_device_time_total=seconds * 1e6, self_cpu_time_total=0,
                               device_type=device, is_user_annotation=annotation)

    kinds = torch.autograd.DeviceType
    events = [event("short", 1, kinds.CUDA, False), event("Optimizer.step", 9, kinds.CUDA, True),
              event("long", 2, kinds.CUDA, False), event("aten::add", 3, kinds.CPU, False)]
    assert bench.longest_kernels(events) == [("long", 1, 2.0), ("short", 1, 1.0)]
