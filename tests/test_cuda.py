"""--device cuda and --graph without a GPU: the step on fake CUDA tensors, and the graph on a stand-in.

FakeTensorMode computes nothing. It checks devices, dtypes and shapes of every op. The autograd engine needs a driver,
so zero gradients replace backward(). tests/test_gpu.py runs the real thing where there is a GPU.
"""
import inspect
import sys
import weakref

import pytest
from helpers import ROOT, TINY, run

sys.path.insert(0, str(ROOT))

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import train


def set_up(monkeypatch, *words, capability=(9, 0)):
    """The arguments, and what set_up_device makes of a GPU with this compute capability."""
    args = train.parse_args(["--device", "cuda", *words])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        for name in ("benchmark", "allow_tf32"):  # set_up_device changes them
            patch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
        return args, train.set_up_device(args)


@pytest.mark.parametrize("capability, words, precision", [
    ((7, 0), [], "fp16"), ((8, 0), ["--graph"], "bf16"), ((9, 0), ["--precision", "fp32"], "fp32")])
def test_a_gpu_gets_its_fastest_safe_precision_and_capturable_adam_only_for_a_graph(
        capability, words, precision, monkeypatch):
    args, device = set_up(monkeypatch, *words, capability=capability)
    assert (device.kind, device.backend, device.precision) == ("cuda", "nccl", precision)
    assert device.adam == {"fused": True, "capturable": args.graph}


# ---- the step on fake CUDA tensors ----------------------------------------------------------------------------------

@pytest.fixture
def fake(monkeypatch):
    """A function: words of the command line → (a DCGAN, frames) of fake CUDA tensors."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("fake CUDA tensors of this torch need a driver")
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)  # G and G_ema share it
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, kind, memory_format: net)  # it cannot move fake weights
    monkeypatch.setattr(train, "latents", lambda seeds, nz, latent: torch.zeros(len(seeds), nz))  # takes seconds

    def make(*words):
        args, device = set_up(monkeypatch, "--batch-size", "4", *words)
        with torch.device("cuda"):
            dcgan = train.DCGAN(args, device)

        def backward(loss):
            for weight in (*dcgan.G.parameters(), *dcgan.D.parameters()):
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else weight.grad

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        height = args.image_size * 5 // 4
        return dcgan, torch.zeros(4, height, height * 4 // 3, 3, dtype=torch.uint8, device="cuda")

    with FakeTensorMode():
        yield make


@pytest.mark.parametrize("precision", train.DTYPES)
@pytest.mark.parametrize("preset", model.PRESETS)  # with noise, shifts, flips and uniform latents among them
def test_a_step_keeps_to_the_gpu_and_to_its_dtypes(preset, precision, fake):
    dcgan, frames = fake("--preset", preset, "--precision", precision)
    stats = dcgan.step(frames)
    assert (stats.shape, stats.dtype, stats.device.type) == ((5,), torch.float32, "cuda")
    assert dcgan.scaler.is_enabled() == (precision == "fp16")
    size = dcgan.args.image_size
    assert dcgan.sampler()(torch.zeros(4, dcgan.args.nz, device="cuda")).shape == (4, 3, size, size)


@pytest.mark.parametrize("fault, message", [
    (lambda dcgan, images: dcgan.D(images + torch.randn(images.shape)), "same device"),
    (lambda dcgan, images: dcgan.D(images[:, :2]), "channels"),
    (lambda dcgan, images: dcgan.D(images.bfloat16()), "dtype|type"),
    (lambda dcgan, images: dcgan.D(images) / images.sum().item(), "_local_scalar_dense")])
def test_a_cpu_tensor_a_wrong_shape_a_wrong_dtype_and_a_wait_for_the_device_are_found(
        fault, message, fake, monkeypatch):
    monkeypatch.setattr(train.DCGAN, "logits", fault)
    dcgan, frames = fake("--preset", "demo-64", "--precision", "fp32")
    with pytest.raises((RuntimeError, DataDependentOutputException), match=message):
        dcgan.step(frames)


@pytest.mark.parametrize("words", [[], ["--graph"]])
def test_a_resumed_fused_optimizer_counts_its_steps_on_the_gpu(words, fake):
    """Its kernel reads them there: a count on the CPU would be an illegal memory access."""
    words = ["--preset", "demo-64", "--precision", "bf16", *words]
    dcgan, frames = fake(*words)
    dcgan.step(frames)
    saved = {**dcgan.state_dict(), "step": 1}
    assert {tensor.device.type for tensor in tree_leaves(saved) if isinstance(tensor, torch.Tensor)} == {"cpu"}
    resumed, frames = fake(*words)
    resumed.load_state_dict(saved)
    for optimizer in (resumed.opt_G, resumed.opt_D):
        assert {tensor.device.type for tensor in tree_leaves(list(optimizer.state.values()))} == {"cuda"}
    resumed.step(frames)


# ---- the step as one graph ------------------------------------------------------------------------------------------

class Capture(TorchDispatchMode):
    """In the place of torch.cuda.graph and its CUDAGraph: replay() runs the recorded ops again, on the same memory.

    The first replay does nothing, as the ops have run here while they were recorded.
    """
    signature, stream = inspect.signature(torch.cuda.graph), None

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.call = self.signature.bind(*args, **kwargs).arguments
        self.graph = self.call["cuda_graph"]
        self.graph.ops, self.graph.replays, Capture.latest = [], 0, self

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
                if isinstance(new, torch.Tensor) and new.data_ptr() != out.data_ptr():  # else it is in place, or a view
                    out.copy_(new)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    for name, value in dict(Stream=Stream, CUDAGraph=Graph, graph=Capture, current_stream=lambda: Capture.stream,
                            set_stream=lambda stream: setattr(Capture, "stream", stream)).items():
        monkeypatch.setattr(torch.cuda, name, value)


def run_steps(step):
    """The statistics of nine steps, with a seed for each as in train.main."""
    torch.manual_seed(0)
    batches, stats = torch.randint(0, 256, (9, 16, 40, 54, 3), dtype=torch.uint8), []
    untouched = batches.clone()
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        stats.append(step(batch))
    assert torch.equal(batches, untouched), "the graph has memory of its own for the frames"
    return torch.stack(stats)


@pytest.mark.parametrize("words", ["", "--precision bf16 --instance-noise 0.05 --latent uniform --mirror --augment"])
def test_replayed_steps_equal_eager_steps_and_the_graph_is_freed_with_them(words):
    args = train.parse_args([*TINY, "--preset", "naive-64", "--device", "cpu", *words.split()])
    eager, replayed = (train.DCGAN(args, train.set_up_device(args)) for _ in range(2))
    step = train.graphed(replayed.step)
    torch.testing.assert_close(run_steps(step), run_steps(eager.step), rtol=0, atol=0)
    for net in ("G", "D", "G_ema"):
        for a, b in zip(getattr(replayed, net).state_dict().values(), getattr(eager, net).state_dict().values()):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert Capture.latest.graph.replays == 4, "five steps to warm up, and one capture for all that follow"
    graph, Capture.latest = weakref.ref(Capture.latest.graph), None
    del step
    assert graph() is None, "NCCL cannot end before the graph"


def test_a_step_is_captured_on_the_stream_of_its_warm_up_while_other_threads_use_the_gpu():
    streams = []
    run_steps(train.graphed(lambda frames: streams.append(Capture.stream) or frames.float().mean()))
    assert streams[0] and {*streams, Capture.latest.call["stream"]} == {Capture.stream}
    assert Capture.latest.call["capture_error_mode"] == "thread_local", "a thread pins memory, NCCL's asks for events"


# ---- the benchmark --------------------------------------------------------------------------------------------------

def test_a_benchmark_prints_a_row_and_leaves_no_run(pack, tmp_path):
    words = "--step", 0.3, "--price", 3.06, *TINY, "--device", "cpu", "--data", pack
    header, line, row = run("tests/bench.py", *words, cwd=tmp_path).stdout.splitlines()
    assert header.count("|") == line.count("|") == row.count("|") and "| 1 × cpu | 1 × 16 | fp32 |" in row
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_the_benchmark_of_a_gpu_needs_one():
    assert "no NVIDIA GPU" in run("tests/bench.py", "--gpu", status=2).stderr
