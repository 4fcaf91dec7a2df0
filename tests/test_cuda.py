"""--device cuda without a GPU: choosing it, a step on fake CUDA tensors, the graph and the feed.

FakeTensorMode computes nothing. It checks devices, dtypes and shapes of every op. The autograd
engine needs a driver, so zero gradients replace backward(). Stand-ins for CUDA's graphs, streams
and events work on the CPU. tests/test_gpu.py runs the real thing where there is a GPU.
"""
import gzip
import inspect
import itertools
import json
import multiprocessing
import os
import sys
import time
import weakref
from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import FORKS, ROOT, TINY, new_process, run

sys.path.insert(0, str(ROOT))

import bench
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import train

PRESET = ["--preset", "naive-64"]


def set_up(monkeypatch, *words, capability=(9, 0)):
    """The arguments, and what set_up_device makes of a GPU with this compute capability."""
    args = train.parse_args([*PRESET, "--device", "cuda", *words])
    with monkeypatch.context() as patch:
        patch.setattr(model, "use_once", lambda kind, local_rank: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for name in ("benchmark", "allow_tf32"):  # set_up_device changes them
            patch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
        return args, train.set_up_device(args)


# ---- choosing a GPU ------------------------------------------------------------------------------
@pytest.mark.parametrize("capability, words, precision", [
    ((7, 0), [], "fp16"),
    ((8, 0), ["--graph"], "bf16"),
    ((9, 0), ["--precision", "fp32"], "fp32"),
])
def test_a_gpu_gets_its_fastest_safe_precision_and_capturable_adam_only_for_a_graph(
        capability, words, precision, monkeypatch):
    args, device = set_up(monkeypatch, *words, capability=capability)
    assert (device.kind, device.backend, device.precision) == ("cuda", "nccl", precision)
    assert device.adam == {"fused": True, "capturable": args.graph}
    assert device.pin and device.manual_seed is torch.cuda.manual_seed


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch):
    with pytest.raises(model.InputError, match="no bf16 .* --precision auto"):
        set_up(monkeypatch, "--precision", "bf16", capability=(7, 5))


HINTS = ("\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
         "stacktrace below might be incorrect.\nFor debugging consider passing "
         "CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side "
         "assertions.\n")
NO_KERNELS = "CUDA error: no kernel image is available for execution on the device" + HINTS
OLD_DRIVER = ("The NVIDIA driver on your system is too old (found version 11040). Please update "
              "your GPU driver by downloading and installing a new version")
NO_SUCH_GPU = ("CUDA error: invalid device ordinal\nGPU device may be out of range, do you have "
               "enough GPUs?" + HINTS)
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable" + HINTS
UNUSABLE = [("ones", NO_KERNELS), ("set_device", OLD_DRIVER), ("set_device", NO_SUCH_GPU),
            ("ones", BUSY)]


def break_gpu(monkeypatch, call, words):
    """A GPU of which torch says, at this call, that it cannot be used."""
    def fail(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda if call == "set_device" else torch, call, fail)


@pytest.mark.parametrize("call, words", UNUSABLE)
def test_a_gpu_that_cannot_be_used_gives_one_line_with_torchs_own_words(call, words, monkeypatch):
    break_gpu(monkeypatch, call, words)
    with pytest.raises(model.InputError) as caught:
        model.choose_device("cuda", local_rank=1)
    line = str(caught.value)
    assert "\n" not in line and " ".join(words.split())[:200] in line and "--device cpu" in line


@pytest.mark.parametrize("call, words", UNUSABLE)
def test_auto_warns_of_a_gpu_that_cannot_be_used_and_takes_the_cpu(
        call, words, monkeypatch, capsys):
    break_gpu(monkeypatch, call, words)
    monkeypatch.setattr(model, "find_spec", lambda name: None)  # no Gaudi plugin
    assert model.choose_device("auto").type == "cpu"
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: cuda cannot be used: " + " ".join(words.split())[:60])


def test_each_process_uses_a_gpu_of_its_own(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch, "ones", lambda n, device: used.append(device) or torch.zeros(n))
    assert model.choose_device("cuda", local_rank=3).type == "cuda"
    assert used == [3, "cuda"], "a kernel on the GPU that was set"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
@pytest.mark.parametrize("script, words", [
    ("train.py", ["--device", "cuda", "--data", "x"]), ("tests/bench.py", ["--gpu"])])
def test_without_a_gpu_a_script_ends_with_torchs_reason(script, words):
    line = run(script, *words, status=2).stderr.splitlines()[-1]
    assert "NVIDIA" in line or "CUDA" in line


# ---- a step on fake CUDA tensors -----------------------------------------------------------------
@pytest.fixture
def fake(monkeypatch):
    """A function: words of the command line → (a DCGAN, frames) of fake CUDA tensors."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("fake CUDA tensors of this torch need a driver")
    # G and G_ema share the mode.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    # It cannot move fake weights.
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, kind, memory_format: net)
    # Real latents take seconds.
    monkeypatch.setattr(train, "latents", lambda seeds, nz, latent: torch.zeros(len(seeds), nz))

    def make(*words):
        args, device = set_up(monkeypatch, "--batch-size", "4", *words)
        with torch.device("cuda"):
            dcgan = train.DCGAN(args, device)

        def backward(loss):
            for weight in (*dcgan.G.parameters(), *dcgan.D.parameters()):
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else weight.grad

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        height = args.image_size * 5 // 4
        shape = 4, height, height * 4 // 3, 3
        return dcgan, torch.zeros(shape, dtype=torch.uint8, device="cuda")

    with FakeTensorMode():
        yield make


@pytest.mark.parametrize("precision", train.AUTOCAST)
@pytest.mark.parametrize("preset", model.PRESETS)  # with noise, shifts, flips, uniform latents
def test_a_step_keeps_to_the_gpu_and_to_its_dtypes(preset, precision, fake):
    dcgan, frames = fake("--preset", preset, "--precision", precision)
    for value in dcgan.step(frames).values():
        assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, "cuda")
    assert dcgan.scaler.is_enabled() == (precision == "fp16")
    size = dcgan.args.image_size
    z = torch.zeros(4, dcgan.args.nz, device="cuda")
    assert dcgan.sampler()(z).shape == (4, 3, size, size)


@pytest.mark.parametrize("fault, message", [
    (lambda dcgan, D, images: D(images + torch.randn(images.shape)), "same device"),
    (lambda dcgan, D, images: D(images[:, :2]), "channels"),
    (lambda dcgan, D, images: D(images.bfloat16()), "dtype|type"),
    (lambda dcgan, D, images: D(images) / images.sum().item(), "_local_scalar_dense"),
])
def test_a_cpu_tensor_a_wrong_shape_a_wrong_dtype_and_a_wait_for_the_device_are_found(
        fault, message, fake, monkeypatch):
    monkeypatch.setattr(train.DCGAN, "logits", fault)
    dcgan, frames = fake("--preset", "demo-64", "--precision", "fp32")
    with pytest.raises((RuntimeError, DataDependentOutputException), match=message):
        dcgan.step(frames)


@pytest.mark.parametrize("words", [[], ["--graph"]])
def test_a_resumed_fused_optimizer_counts_its_steps_on_the_gpu(words, fake, monkeypatch):
    """Its kernel reads them there: a count on the CPU would be an illegal memory access."""
    words = ["--preset", "demo-64", "--precision", "bf16", *words]
    dcgan, frames = fake(*words)
    dcgan.step(frames)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__int__", lambda steps: 1)  # a fake tensor has no value
        saved = dcgan.state_dict()
    tensors = [leaf for leaf in tree_leaves(saved) if isinstance(leaf, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    resumed, frames = fake(*words)
    resumed.load_state_dict(saved)
    for optimizer in (resumed.opt_G, resumed.opt_D):
        moments = tree_leaves(list(optimizer.state.values()))
        assert {tensor.device.type for tensor in moments} == {"cuda"}
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


class GraphStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def graphs(monkeypatch):
    for name, value in dict(
            Stream=GraphStream,
            CUDAGraph=Graph,
            graph=Capture,
            current_stream=lambda: Capture.stream,
            set_stream=lambda stream: setattr(Capture, "stream", stream)).items():
        monkeypatch.setattr(torch.cuda, name, value)


def make_dcgan(*words):
    args = train.parse_args([*PRESET, *TINY, "--device", "cpu", *words])
    return train.DCGAN(args, train.set_up_device(args))


def run_steps(step, between=None, n=9):
    """The statistics (steps, 5) of n steps, with a seed for each as in train.main."""
    torch.manual_seed(0)
    batches = torch.randint(0, 256, (n, 16, 40, 54, 3), dtype=torch.uint8)
    untouched = batches.clone()
    stats = []
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        outputs = step(batch)
        stats.append(torch.stack(list(outputs.values())))
        if between:
            between()
    assert torch.equal(batches, untouched), "the graph has memory of its own for the frames"
    return torch.stack(stats)


def assert_same_weights(a, b):
    for net in ("G", "D", "G_ema"):
        states = getattr(a, net).state_dict(), getattr(b, net).state_dict()
        for one, other in zip(*(state.values() for state in states)):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


NOISY = "--precision bf16 --instance-noise 0.05 --latent uniform --mirror --augment"


@pytest.mark.parametrize("words", ["", NOISY])
def test_replayed_steps_equal_eager_steps_and_the_graph_is_freed_with_them(words, graphs):
    eager, replayed = (make_dcgan(*words.split()) for _ in range(2))
    step = train.graphed(replayed.step)
    torch.testing.assert_close(run_steps(step), run_steps(eager.step), rtol=0, atol=0)
    assert_same_weights(replayed, eager)
    assert Capture.latest.graph.replays == 4, "five steps to warm up, and one capture"
    graph = weakref.ref(Capture.latest.graph)
    Capture.latest = None
    del step
    assert graph() is None, "NCCL cannot end before the graph"


def test_samples_and_scores_between_replays_change_nothing(graphs):
    eager, replayed = make_dcgan(), make_dcgan()
    held_out = np.random.default_rng(0).integers(0, 256, (60, 40, 54, 3), np.uint8)

    def draw():
        replayed.sampler()
        replayed.d_held_out(held_out)

    stats = run_steps(train.graphed(replayed.step), draw)
    torch.testing.assert_close(stats, run_steps(eager.step), rtol=0, atol=0)
    eager.sampler()  # sets G_ema's statistics
    assert_same_weights(replayed, eager)


def test_a_replayed_step_that_overflows_changes_the_scale_and_no_weight(graphs):
    dcgan = make_dcgan()
    dcgan.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step = train.graphed(dcgan.step)
    run_steps(step, n=7)
    for scale, skipped in ((2.0 ** 127, True), (8.0, False)):
        dcgan.scaler._scale.fill_(scale)
        before = [weight.clone() for weight in (*dcgan.G.parameters(), *dcgan.D.parameters())]
        outputs = step(torch.full((16, 40, 54, 3), 100, dtype=torch.uint8))
        assert all(value.isfinite() for value in outputs.values())
        after = [*dcgan.G.parameters(), *dcgan.D.parameters()]
        assert all(map(torch.equal, before, after)) == skipped
        assert (dcgan.scaler._scale.item() < scale) == skipped


def test_a_step_is_captured_on_the_stream_of_its_warm_up_while_other_threads_use_the_gpu(graphs):
    streams = []

    def step(frames):
        streams.append(Capture.stream)
        return {"mean": frames.float().mean()}

    run_steps(train.graphed(step))
    assert streams[0] and {*streams, Capture.latest.call["stream"]} == {Capture.stream}
    mode = Capture.latest.call["capture_error_mode"]
    assert mode == "thread_local", "a thread pins memory, and NCCL's asks for events"


# ---- uploads beside the step ---------------------------------------------------------------------
class LazyGPU:
    """Streams and events of a GPU that does all its work as late as it may.

    It works only while the host waits for an event. A stream runs its operations in order.
    """

    def __init__(self, monkeypatch):
        self.default = LazyStream(self)
        self.current = self.default
        for name, value in dict(
                Stream=lambda: LazyStream(self),
                current_stream=lambda: self.current,
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
        self.queue.append(other.record_event().synchronize)


class LazyEvent:
    def __init__(self, stream):
        self.stream = stream
        self.finished = False

    def finish(self):
        self.finished = True

    def synchronize(self):
        while not self.finished:
            self.stream.queue.popleft()()


class LazyBatch:
    """A batch in pinned memory. The GPU reads it when it comes to the upload."""

    def __init__(self, gpu, batch):
        self.gpu = gpu
        self.batch = batch
        self.as_gathered = batch.clone()
        self.intact = None  # until it is uploaded
        self.used_by = None

    def to(self, kind, non_blocking=False):
        assert kind == "cuda" and non_blocking
        self.gpu.current.queue.append(self.upload)
        return self

    def upload(self):
        self.intact = torch.equal(self.batch, self.as_gathered)

    def record_stream(self, stream):
        self.used_by = stream


def feed_steps(monkeypatch, n=40):
    """Train n pretended steps: (batches, unfinished steps when each of them began)."""
    gpu = LazyGPU(monkeypatch)
    shape = 2, 5, 6, 3
    frames = np.random.default_rng(0).integers(0, 256, (64, *shape[1:]), np.uint8)
    rows = np.arange(64).reshape(-1, 2)
    gathered = 0

    def counted(batches):
        nonlocal gathered
        for batch in batches:
            gathered += 1
            yield batch

    batches = counted(train.gather(itertools.repeat((frames, rows)), shape, pin=False))
    ahead = train.read_ahead(batches, train.READ_AHEAD)
    lazy = []

    def taken():
        for i, batch in enumerate(ahead):
            while gathered < i + 1 + train.READ_AHEAD:  # the thread is as far ahead as it gets
                time.sleep(1e-4)
            lazy.append(LazyBatch(gpu, batch))
            yield lazy[-1]

    feed = train.Feed(taken(), train.Device("cuda"))
    finished = []
    ahead_of_gpu = []
    for step in range(n):
        assert next(feed) is lazy[-1]
        ahead_of_gpu.append(step - len(finished))
        gpu.default.queue.append(lambda step=step: finished.append((step, lazy[step].intact)))
    gpu.default.record_event().synchronize()
    assert [step for step, _ in finished] == list(range(n))
    assert all(intact is not None for _, intact in finished), "a step waits for its upload"
    assert {batch.used_by for batch in lazy} == {gpu.default}, "memory is kept until the step ends"
    return lazy, ahead_of_gpu


def test_the_host_stays_two_steps_ahead_and_no_batch_changes_before_it_is_uploaded(monkeypatch):
    batches, ahead = feed_steps(monkeypatch)
    assert all(batch.intact for batch in batches)
    assert max(ahead) == 2 and set(ahead[2:]) == {2}


def test_memory_that_is_used_again_too_soon_is_found(monkeypatch):
    monkeypatch.setattr(train, "KEPT", 2)
    batches, _ = feed_steps(monkeypatch)
    assert not all(batch.intact for batch in batches)


def test_waiting_for_data_does_not_count_waiting_for_the_gpu(monkeypatch):
    LazyGPU(monkeypatch)
    monkeypatch.setattr(LazyEvent, "synchronize", lambda event: time.sleep(0.05))

    class Batch(LazyBatch):
        def __init__(self):
            pass

        def to(self, kind, non_blocking):
            return self

    def slow():
        while True:
            time.sleep(0.02)
            yield Batch()

    feed = train.Feed(slow(), train.Device("cuda"))
    began = time.perf_counter()
    for _ in range(6):
        next(feed)
    took = time.perf_counter() - began
    assert 6 * 0.02 <= feed.waited <= took - 4 * 0.05


# ---- compiling, and several processes ------------------------------------------------------------
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiling_traces_g_once_and_d_twice(precision):
    """D is traced with and without gradients of its weights. Real and fake images look alike."""
    traced = []

    def compiler(graph, inputs):
        traced.append(graph)
        return graph.forward

    args = train.parse_args([*PRESET, *TINY, "--device", "cpu", "--precision", precision,
                             "--compile"])
    device = train.set_up_device(args)
    device.compiler = compiler
    torch.compiler.reset()
    dcgan = train.DCGAN(args, device)
    run_steps(dcgan.step, n=3)
    torch.compiler.reset()
    assert len(traced) == 3


class Count(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls.append(op.overloadpacket)
        return op(*args, **(kwargs or {}))


def test_gradients_are_added_up_in_one_message_without_copies_of_them(monkeypatch):
    shapes = [(8, 3, 4, 4), (1, 8, 4, 4), (16, 8, 1, 1), (5,), ()]
    gradients = [torch.randn(shape) for shape in shapes]
    channels_last = [torch.randn(shape).contiguous(memory_format=torch.channels_last)
                     for shape in shapes[:3]]
    for gradient in (*gradients, *channels_last):
        view = train.in_memory_order(gradient)
        assert view.shape == (gradient.numel(),) and view.data_ptr() == gradient.data_ptr()
        assert torch.equal(view.sort().values, gradient.flatten().sort().values)

    messages = []

    def all_reduce(message):
        messages.append(message)
        message *= 3

    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    both = [*gradients, *channels_last]
    before = [gradient.clone() for gradient in both]
    places = [(gradient.data_ptr(), gradient.stride()) for gradient in both]
    with Count() as count:
        train.add_up(both)
    assert len(messages) == 1
    assert places == [(gradient.data_ptr(), gradient.stride()) for gradient in both]
    for gradient, old in zip(both, before):
        torch.testing.assert_close(gradient, 3 * old)
    aten = torch.ops.aten
    assert not {aten.clone, aten._to_copy} & {*count.calls}
    assert count.calls.count(aten.copy_) == len(both), "from the message into each gradient"


# ---- the benchmark -------------------------------------------------------------------------------
def test_a_benchmark_prints_a_row_for_each_mode_and_leaves_no_run(pack, tmp_path):
    words = ["--step", 0.2, "--price", 3.06, *TINY, "--device", "cpu", "--data", pack]
    done = run("tests/bench.py", *words, "--modes", "plain,plain", cwd=tmp_path)
    header, line, *rows = done.stdout.splitlines()
    assert {row.count("|") for row in (header, line, *rows)} == {header.count("|")}
    assert len(rows) == 2 and all("| 1 × cpu | 1 × 16 | fp32 |" in row for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_writes_a_trace_and_a_table_of_the_longest_kernels(pack, tmp_path):
    file = tmp_path / "trace.json.gz"
    words = ["--step", 0, *TINY, "--device", "cpu", "--data", pack, "--trace", file]
    done = run("tests/bench.py", *words, popen=new_process)  # torch's profiler crashes in a fork
    names = {event.get("name") for event in json.loads(gzip.open(file).read())["traceEvents"]}
    assert "aten::convolution_backward" in names
    kernels = done.stdout.partition("| kernel |")[2]
    assert "aten::" in kernels and "%" in kernels


@pytest.fixture
def in_forks(monkeypatch):
    """bench.py's processes come from the tests' fork server, which has imported torch."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: FORKS)


@pytest.mark.parametrize("limit, function, argument, message", [
    (300, int, "x", "ValueError: invalid literal"),
    (0.2, time.sleep, 60, "no figure after 0 s"),
    (300, os._exit, 3, "its process ended with exit status 3"),
    (300, sys.exit, 2, "SystemExit: 2"),
])
def test_an_error_a_hang_and_a_crash_are_reasons_of_one_line(
        limit, function, argument, message, in_forks):
    with pytest.raises(bench.Failed, match=message):
        list(bench.isolated(limit, function, argument))


@pytest.mark.parametrize("error, line", [
    (RuntimeError(NO_KERNELS), "RuntimeError: CUDA error: no kernel image is available for "
     "execution on the device"),
    (RuntimeError("backend='inductor' raised:\nRuntimeError: Failed to find C compiler.\n\n"
                  "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace"),
     "RuntimeError: backend='inductor' raised: RuntimeError: Failed to find C compiler."),
    (AssertionError(), "AssertionError: "),
    (model.InputError("choose\nanother"), "choose another"),
])
def test_a_reason_is_the_line_that_says_what_is_wrong(error, line):
    assert bench.reason(error) == line


def test_the_benchmark_of_a_gpu_goes_on_after_a_row_that_fails(
        in_forks, monkeypatch, tmp_path, capsys):
    rows = [("naive-64", 128, {"graph": 0.16, "plain": None}), ("clamp-64", 256, {"plain": 0.4})]
    monkeypatch.setattr(bench, "GPU_ROWS", rows)
    words = "--device cpu --nz 4 --ngf 1 --ndf 1 --batch-size 16".split()
    bench.measure_gpu(tmp_path, 0.1, 5, 160, None, words)
    lines = capsys.readouterr().out.splitlines()
    assert any("| graph | --graph and --precision fp16 are for NVIDIA GPUs" in row for row in lines)
    assert sum("| plain |" in row and "%" in row for row in lines) == 2
    assert any(row.startswith("--graph: no decision") for row in lines)
    assert any("gathering" in row and "images/s" in row for row in lines)
    assert any("the next part | a score needs" in row for row in lines)
    assert any("| kernel |" in row or row.startswith("no profile: ") for row in lines)


def test_the_rule_for_defaults_asks_for_all_rows_and_for_short_runs(capsys):
    def row(images_s, start):
        return dict(images_s=images_s, start=start)

    small = {"plain": row(40_000, 2), "graph": row(60_000, 3), "graph+compile": row(80_000, 60)}
    large = {"plain": row(90_000, 2), "graph": row(90_500, 3)}
    bench.decide({("naive-64", 128): small, ("naive-64", 1024): large})
    large["graph"] = row(80_000, 3)
    bench.decide({("naive-64", 128): small, ("naive-64", 1024): large})
    graph, compiled, slower, _ = capsys.readouterr().out.splitlines()
    assert "--graph: 1.01 to 1.50" in graph and "it becomes a default, if its tests pass" in graph
    assert "66 s instead of 11 s" in compiled and "does not become" in compiled
    assert "does not become" in slower
