// A simulated Gaudi card. Every tensor really has device type `hpu`, so device mix-ups, op lists,
// waits and checkpoints behave as they do on the card. The CPU does the arithmetic, on the same
// memory. Random numbers come from a generator of the card's own. Nothing here says how fast a card
// is. The record counts what makes a card slow: new graphs, fall-backs to the CPU, and waits.
// Builds with torch 2.6 and later.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/permute_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <unordered_set>

using namespace at;
static const Device kCard(DeviceType::HPU, 0);  // a process sees its one card as hpu:0

// ---- the record: what a test reads afterwards -------------------------------------------------
static int64_t env_int(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoll(value) : otherwise;
}

static struct Record {
  std::mutex lock;  // backward runs in a thread of its own
  bool lazy = false;
  std::map<std::string, std::map<std::string, int64_t>> counts;  // of ops, syncs and fallbacks, by name
  int64_t optimizer_steps = 0;

  // Lazy mode: a graph is every op between two cuts. The card compiles each distinct graph once,
  // and once more where an input of the same graph comes in another layout.
  std::string text, layouts;  // of the graph since the last cut
  std::set<size_t> graphs, recipes;  // hashes: without the layouts of the inputs, and with them
  std::map<std::string, std::vector<int64_t>> steps;  // the optimizer steps before each graph, layout and sync
  std::atomic<int64_t> graphs_run{0};
} record_;

// ---- layouts ----------------------------------------------------------------------------------
// The card chooses how a tensor that a graph writes lies in memory. A later graph that takes the
// tensor is compiled for that layout. Here a layout is a number: 0 as uploaded, then how many
// graphs have written the tensor, and 2 at most, because the card's choice is stable by then.
struct Block {  // memory of the card
  void* p;
  int64_t n;
  int layout = 0;        // before the graph that wrote it last
  int64_t written = -1;  // the graph that wrote it last: its number among those that ran
  static void release(void* block);
};

static Block* block_of(const Tensor& t) {
  if (!t.defined() || !t.has_storage() || !t.device().is_hpu()) return nullptr;
  const auto& memory = t.storage().data_ptr();
  return memory.get_deleter() == &Block::release ? static_cast<Block*>(memory.get_context()) : nullptr;
}
static int layout_of(const Tensor& t) {
  const Block* b = t.dim() < 2 ? nullptr : block_of(t);  // numbers and vectors have one layout
  return b ? std::min(2, b->layout + (b->written >= 0 && b->written < record_.graphs_run)) : 0;
}
static void written(const Tensor& t, bool by_the_host = false) {  // otherwise by an op since the last cut
  if (Block* b = block_of(t)) {
    b->layout = by_the_host ? 0 : layout_of(t);
    b->written = by_the_host ? -1 : record_.graphs_run.load();
  }
}

// ---- what a graph is compiled for: of tensors all but the memory, and the value of everything else
struct Arguments {
  std::string text;
  std::string layouts;  // of the tensors, a digit each
  std::string dtype;    // of the first tensor

  Arguments& say(const std::string& words) {
    text += words + " ";
    return *this;
  }
  Arguments& add(const Tensor& t) {
    if (!t.defined()) return say("None");
    if (dtype.empty()) dtype = toString(t.scalar_type());
    // A Python number is a constant.
    if (t.device().is_cpu() && t.unsafeGetTensorImpl()->is_wrapped_number()) return add(t.item());
    say(toString(t.scalar_type()));  // Byte, Float, BFloat16, …
    if (t.device().is_cpu()) return say("uploaded");  // its value is an input
    layouts += std::to_string(layout_of(t));
    return add(t.sizes()).say("strides").add(t.strides()).say("offset").add(t.storage_offset());
  }
  Arguments& add(const IValue& v) {
    if (v.isTensor()) return add(v.toTensor());
    if (!v.isTensorList()) return say(c10::str(v));
    say("[");
    for (const Tensor& t : v.toTensorVector()) add(t);
    return say("]");
  }
};

// ---- writing into the record ------------------------------------------------------------------
static void cut() {  // the caller holds the lock
  auto& r = record_;
  if (!r.text.empty() && r.lazy) {
    const bool new_graph = r.graphs.insert(std::hash<std::string>()(r.text)).second;
    const bool compiled = r.recipes.insert(std::hash<std::string>()(r.text + r.layouts)).second;
    if (compiled) r.steps[new_graph ? "graph" : "layout"].push_back(r.optimizer_steps);
    ++r.graphs_run;
  }
  r.text.clear();
  r.layouts.clear();
}

static void ran(const std::string& op, const Arguments& arguments) {
  std::lock_guard<std::mutex> hold(record_.lock);
  ++record_.counts["ops"][op];
  record_.text += "  " + op + "(" + arguments.text + ")\n";
  record_.layouts += arguments.layouts + " ";
}

// The host waits for the card, which first runs what it was given.
static void synced(std::string by) {
  std::lock_guard<std::mutex> hold(record_.lock);
  ++record_.counts["syncs"][by];
  record_.steps["sync"].push_back(record_.optimizer_steps);
  cut();
}

// An op without a kernel: its tensors go to the host and back. `call` is the op and a dtype.
static void fell_back(const std::string& op, const std::string& call) {
  synced(op);
  std::lock_guard<std::mutex> hold(record_.lock);
  ++record_.counts["fallbacks"][call];
}

// ---- kernels that the card has: supported_ops.txt ---------------------------------------------
static std::unordered_set<std::string> supported;  // "op"
static std::unordered_set<std::string> lacking;    // "op dtype", "op >dtype" for a conversion to it

// Records a call of an op: part of a graph, or a fall-back to the host.
static void called(const std::string& name, const Arguments& arguments) {
  std::string op = name.substr(0, name.find('.'));  // without the overload
  if (op.back() == '_') op.pop_back();
  const std::string base = op.substr(op.find(':') + 2);
  if (supported.count(base) && !lacking.count(base + " " + arguments.dtype)) ran(name, arguments);
  else fell_back(name, op + " " + arguments.dtype);
}

// ---- memory, device guard, generator, hooks ---------------------------------------------------
// A process takes a card when it first needs one. Other processes hold HPU_SIM_BUSY of the machine's HPU_SIM_CARDS.
static int64_t cards() { return env_int("HPU_SIM_CARDS", 1); }
static std::atomic<bool> acquired{false};

static void acquire() {
  if (acquired) return;
  const bool is_free = env_int("LOCAL_RANK", 0) < cards() - env_int("HPU_SIM_BUSY", 0);
  TORCH_CHECK(is_free, "synStatus=8 [Device not found] Device acquire failed.");
  acquired = true;
}

static std::atomic<int64_t> bytes_now{0}, bytes_peak{0};
void Block::release(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  bytes_now -= block->n;
  std::free(block->p);
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    acquire();
    const int64_t n = size;
    if (n == 0) return {nullptr, kCard};
    TORCH_CHECK(bytes_now + n <= env_int("HPU_SIM_MEMORY", 32ll << 30), "[Rank:", env_int("RANK", 0),
                "] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::", n, " (", n / 1048576.0, ")MB");
    void* p = nullptr;
    // 64: what the CPU's vector kernels get
    TORCH_CHECK(posix_memalign(&p, 64, n) == 0, "no memory left for the simulated card");
    bytes_peak = std::max(bytes_peak.load(), bytes_now += n);
    return {p, new Block{p, n}, &Block::release, kCard};
  }
  void copy_data(void* dst, const void* src, std::size_t n) const override { std::memcpy(dst, src, n); }
};
static CardAllocator card_memory;

template <DeviceType T>
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return T; }
  Device exchangeDevice(Device) const override { return Device(T, 0); }
  Device getDevice() const override { return Device(T, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(T, 0)); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return T == DeviceType::HPU && cards() > 0; }
};
static Guard<DeviceType::HPU> card_guard;
static Guard<DeviceType::CUDA> no_cuda_guard;

// The card's generator. Its numbers are not the CPU's. Before it is seeded, all cards have the same.
static constexpr uint64_t kOther = 0x6A09E667;
static Generator card_numbers = at::detail::createCPUGenerator(kOther);
static void seed_card(int64_t seed) { card_numbers.set_current_seed(seed ^ kOther); }

struct CardHooks final : HPUHooksInterface {  // isBuilt and isAvailable override nothing in torch 2.6
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return cards() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return cards() > 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
static CardHooks card_hooks;

// Called once, by habana_frameworks.torch.core.
static int64_t plug_in(bool lazy, std::vector<std::string> ops, std::vector<std::string> lacks) {
  record_.lazy = lazy;
  supported.insert(ops.begin(), ops.end());
  lacking.insert(lacks.begin(), lacks.end());
  c10::SetAllocator(DeviceType::HPU, &card_memory, 1);
  c10::impl::DeviceGuardImplRegistrar hpu(DeviceType::HPU, &card_guard);
  // A CUDA build's autograd engine asks CUDA's guard for its device count and streams: without a GPU, let it be none.
  if (c10::impl::hasDeviceGuardImpl(DeviceType::CUDA)) c10::impl::DeviceGuardImplRegistrar cuda(DeviceType::CUDA, &no_cuda_guard);
  return reinterpret_cast<int64_t>(static_cast<const HPUHooksInterface*>(&card_hooks));
}

// ---- kernels ----------------------------------------------------------------------------------
// The same memory, seen from the CPU: a kernel that writes into an argument (batch norm's running
// statistics, every in-place op) writes into the card's tensor.
static Tensor on_cpu(const Tensor& t) {
  if (!t.defined() || t.device().is_cpu()) return t;
  const auto& s = t.storage();
  c10::Storage storage({}, s.nbytes(), c10::DataPtr(const_cast<void*>(s.data()), Device(kCPU)), GetAllocator(kCPU), true);
  Tensor out = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}
static Tensor on_card(const Tensor& t) {
  if (!t.defined()) return t;
  Tensor out = at::detail::empty_strided_generic(t.sizes(), t.strides(), &card_memory, DispatchKeySet(DispatchKey::HPU), t.scalar_type());
  on_cpu(out).copy_(t);
  written(out);
  return out;
}

// Every op without a kernel below: check devices as the card would, run the CPU's kernel on the same memory.
static void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& args = schema.arguments();
  const size_t first = stack->size() - args.size();
  const auto& on = op.operator_name();
  const std::string name = on.overload_name.empty() ? on.name : on.name + "." + on.overload_name;
  std::vector<IValue> given(stack->begin() + first, stack->end());  // the card's tensors, to hand back those written in place
  Arguments all;
  for (const IValue& v : given) all.add(v);
  called(name, all);

  auto check = [&](const Tensor& t) {
    TORCH_CHECK(!t.defined() || t.device() == kCard || (t.device().is_cpu() && t.dim() == 0),
                "Expected all tensors to be on the same device, but ", name, " found at least two devices, hpu:0 and ", t.device(), "!");
  };
  for (size_t i = 0; i < args.size(); ++i) {
    IValue& v = (*stack)[first + i];
    if (v.isTensor()) {
      check(v.toTensor());
      v = on_cpu(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) { check(t); out.push_back(on_cpu(t)); }
      v = out;
    } else if (args[i].name() == "generator") {
      v = card_numbers;
    }
  }
  std::vector<IValue> used(stack->begin() + first, stack->end());
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);

  for (size_t i = 0; i < args.size(); ++i) {
    const auto* alias = args[i].alias_info();
    if (!alias || !alias->isWrite() || !given[i].isTensor()) continue;
    const Tensor& cpu = used[i].toTensor();
    const Tensor& card = given[i].toTensor();
    written(card);
    if (!card.defined() || card.device().is_cpu() || cpu.sizes() == card.sizes()) continue;
    card.resize_(cpu.sizes());  // an `out`, which the CPU's kernel has given other memory
    on_cpu(card).copy_(cpu);
  }
  const auto& returns = schema.returns();
  const size_t first_return = stack->size() - returns.size();
  for (size_t r = 0; r < returns.size(); ++r) {
    IValue& v = (*stack)[first_return + r];
    if (const auto* alias = returns[r].alias_info()) {
      for (size_t i = 0; i < args.size(); ++i)
        if (args[i].alias_info() && *args[i].alias_info() == *alias) { v = given[i]; break; }
      TORCH_CHECK(alias->isWrite(), name, " makes a view: the simulated card needs a kernel of its own for it");
    } else if (v.isTensor()) {
      v = on_card(v.toTensor());
    }
  }
}

static Tensor card_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                         std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &card_memory, DispatchKeySet(DispatchKey::HPU), c10::dtype_or_default(dtype), format);
}
static Tensor card_empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                                 std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &card_memory, DispatchKeySet(DispatchKey::HPU), c10::dtype_or_default(dtype));
}
static void record_copy(const Tensor& src, const Tensor& dst) {  // from the card to the card
  const std::string from = toString(src.scalar_type()), to = toString(dst.scalar_type());
  if (from != to && lacking.count("_copy_from >" + to)) fell_back("aten::_copy_from", "aten::_copy_from " + from + "->" + to);
  else called("aten::_copy_from", Arguments().add(src).add(dst));
}
static Tensor card_copy(const Tensor& src, const Tensor& dst, bool non_blocking) {
  const bool from_card = src.device() == kCard;
  if (from_card && dst.device() == kCard) record_copy(src, dst);
  else if (from_card) synced(non_blocking ? "copy_to_cpu_non_blocking" : "copy_to_cpu");
  on_cpu(dst).copy_(on_cpu(src));
  written(dst, !from_card);
  return dst;
}

// Views. Each is an op of the graph.
static Tensor card_as_strided(const Tensor& t, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  const int64_t at = offset.value_or(t.storage_offset());
  called("aten::as_strided", Arguments().add(t).add(size).add(stride).add(at));
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}
static Tensor card_permute(const Tensor& t, IntArrayRef dims) {
  called("aten::permute", Arguments().add(t).add(dims));
  return at::native::permute(t, dims);
}
static Tensor card_view(const Tensor& t, IntArrayRef size) {
  called("aten::view", Arguments().add(t).add(size));
  return at::native::view(t, size);
}
static Tensor card_reshape_alias(const Tensor& t, IntArrayRef size, IntArrayRef stride) {
  called("aten::_reshape_alias", Arguments().add(t).add(size).add(stride));
  return at::native::_reshape_alias(t, size, stride);
}

static Scalar card_item(const Tensor& t) {
  synced("_local_scalar_dense");
  return at::native::_local_scalar_dense_cpu(on_cpu(t));
}
static Tensor card_conv(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, IntArrayRef stride, IntArrayRef pad,
                        IntArrayRef dil, bool transposed, IntArrayRef out_pad, int64_t groups) {
  Arguments all;
  all.add(x).add(w).add(b.value_or(Tensor())).add(stride).add(pad).add(dil).add(transposed).add(out_pad).add(groups);
  ran("aten::convolution_overrideable", all);
  TORCH_CHECK(x.device() == w.device(), "Expected all tensors to be on the same device: ", x.device(), w.device());
  return on_card(at::convolution(on_cpu(x), on_cpu(w), on_cpu(b.value_or(Tensor())),
                                 stride, pad, dil, transposed, out_pad, groups));
}
static std::tuple<Tensor, Tensor, Tensor> card_conv_backward(const Tensor& g, const Tensor& x, const Tensor& w, IntArrayRef stride,
    IntArrayRef pad, IntArrayRef dil, bool transposed, IntArrayRef out_pad, int64_t groups, std::array<bool, 3> mask) {
  Arguments all;
  all.add(g).add(x).add(w).add(stride).add(pad).add(dil).add(transposed).add(out_pad).add(groups);
  all.add(mask);
  ran("aten::convolution_backward_overrideable", all);
  const std::vector<int64_t> bias_size{transposed ? w.size(1) * groups : w.size(0)};
  auto [gx, gw, gb] = at::convolution_backward(on_cpu(g), on_cpu(x), on_cpu(w), at::OptionalIntArrayRef(bias_size),
                                               stride, pad, dil, transposed, out_pad, groups, mask);
  return {on_card(gx), on_card(gw), on_card(gb)};
}

TORCH_LIBRARY_IMPL(_, HPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, HPU, m) {
  m.impl("empty.memory_format", &card_empty);
  m.impl("empty_strided", &card_empty_strided);
  m.impl("_copy_from", &card_copy);
  m.impl("as_strided", &card_as_strided);
  m.impl("permute", &card_permute);
  m.impl("view", &card_view);
  m.impl("_reshape_alias", &card_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("_local_scalar_dense", &card_item);
  m.impl("convolution_overrideable", &card_conv);
  m.impl("convolution_backward_overrideable", &card_conv_backward);
}

// ---- autocast: the plugin's own rules, its lists read once, when it loads -----------------------
using Ops = std::unordered_set<std::string>;
static Ops ops_from(const char* env, Ops defaults) {
  const char* path = std::getenv(env);
  if (!path) return defaults;
  std::ifstream file(path);
  Ops ops;  // a line is a name as it stands (no trimming), and the file is the whole list
  for (std::string line; std::getline(file, line);) ops.insert(line);
  return ops;
}
static const Ops promoted{"add", "addcmul", "cat", "div", "exp", "mul", "pow", "sub", "stack"};

enum class Cast { lower, lower_first, fp32, promote };
template <Cast HOW>
static void cast_then_call(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(DispatchKey::AutocastHPU);
  const size_t first = stack->size() - op.schema().arguments().size();
  auto casts = [](const Tensor& t) {
    return t.defined() && t.device() == kCard && t.is_floating_point() && t.scalar_type() != kDouble;
  };
  auto each_tensor = [&](auto f) {
    for (size_t i = first; i < stack->size(); ++i) {
      IValue& v = (*stack)[i];
      if (v.isTensor() && casts(v.toTensor())) v = f(v.toTensor());
      else if (v.isTensorList()) {
        c10::List<Tensor> out;
        for (const Tensor& t : v.toTensorVector()) out.push_back(casts(t) ? f(t) : t);
        v = out;
      }
      if (HOW == Cast::lower_first) break;
    }
  };
  ScalarType to = HOW == Cast::fp32 ? kFloat : at::autocast::get_autocast_dtype(DeviceType::HPU);
  if (HOW == Cast::promote) each_tensor([&](const Tensor& t) { if (t.scalar_type() == kFloat) to = kFloat; return t; });
  each_tensor([&](const Tensor& t) { return t.to(to); });
  op.callBoxed(stack);
}
template <Cast HOW>
static torch::CppFunction casting() { return torch::CppFunction::makeFromBoxedFunction<&cast_then_call<HOW>>(); }

TORCH_LIBRARY_IMPL(_, AutocastHPU, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastHPU, m) {
  // Of the plugin's lists, what a GAN may call.
  const Ops lower = ops_from("PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST",
      {"addmm", "batch_norm", "bmm", "conv2d", "conv_transpose2d", "dropout", "leaky_relu",
       "linear", "matmul", "mean", "mm", "mul", "softmax", "log_softmax"});
  const Ops fp32 = ops_from("PT_HPU_AUTOCAST_FP32_OPS_LIST",
      {"addcdiv", "binary_cross_entropy", "binary_cross_entropy_with_logits", "div", "exp", "log",
       "log1p", "l1_loss", "logsumexp", "mse_loss", "pow", "reciprocal", "rsqrt", "softplus"});
  for (const auto& on : c10::Dispatcher::singleton().getAllOpNames()) {
    if (on.name.rfind("aten::", 0) != 0) continue;
    const std::string op = on.name.substr(6);
    auto handle = c10::Dispatcher::singleton().findSchema(on);
    if (!handle || handle->schema().is_mutable()) continue;
    const std::string full = on.overload_name.empty() ? on.name : on.name + "." + on.overload_name;
    // Batch norm's weights and statistics stay in fp32.
    if (lower.count(op) && op == "batch_norm") m.impl(full.c_str(), casting<Cast::lower_first>());
    else if (lower.count(op)) m.impl(full.c_str(), casting<Cast::lower>());
    else if (fp32.count(op)) m.impl(full.c_str(), casting<Cast::fp32>());
    else if (promoted.count(op)) m.impl(full.c_str(), casting<Cast::promote>());
  }
}

// ---- what the Python side calls -----------------------------------------------------------------
TORCH_LIBRARY(hpu_sim, m) {
  m.def("plug_in(bool lazy, str[] ops, str[] lacks) -> int", &plug_in);
  m.def("acquire() -> ()", [] { acquire(); });
  m.def("seed(int seed) -> ()", &seed_card);
  // An op that the Python side computes. It may write all its tensors.
  m.def("ran(str op, Tensor[] tensors, str constants) -> ()", [](std::string op, std::vector<Tensor> tensors, std::string constants) {
    ran(op, Arguments().add(tensors).say(constants));
    for (const Tensor& t : tensors) written(t);
  });
  m.def("mark(int optimizer_steps) -> ()", [](int64_t optimizer_steps) {
    std::lock_guard<std::mutex> hold(record_.lock);
    cut();
    record_.optimizer_steps += optimizer_steps;
  });
  m.def("synced(str by) -> ()", &synced);
  m.def("counts(str what) -> Dict(str, int)", [](std::string what) {
    std::lock_guard<std::mutex> hold(record_.lock);
    c10::Dict<std::string, int64_t> counts;
    for (const auto& [name, n] : record_.counts[what]) counts.insert(name, n);
    return counts;
  });
  m.def("steps(str what) -> int[]", [](std::string what) {
    std::lock_guard<std::mutex> hold(record_.lock);
    return what == "optimizer" ? std::vector<int64_t>{record_.optimizer_steps} : record_.steps[what];
  });
  m.def("peak_memory() -> int", [] { return bytes_peak.load(); });
  m.def("on_cpu(Tensor t) -> Tensor", &on_cpu);
}
