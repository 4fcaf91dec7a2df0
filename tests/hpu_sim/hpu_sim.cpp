// A simulated Gaudi card. Every tensor really has device type `hpu`, so device mix-ups,
// op lists, syncs and checkpoints behave as they do on the card; the arithmetic is the CPU's,
// on the same memory, so an fp32 run gives the CPU's numbers. Nothing here says how fast a card is;
// the record counts what makes a card slow: new graphs, fall-backs to the CPU, waits and uploads.
// Builds with torch 2.6 and later; no pybind, so it is loaded with torch.ops.load_library.
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
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <thread>
#include <unordered_set>

#include "metrics.h"

using namespace at;
static const Device kCard(DeviceType::HPU, 0);  // a process sees its one card as hpu:0, as on a real machine

// ---- the record: what a test reads afterwards -------------------------------------------------
static int64_t env_int(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoll(value) : otherwise;
}

static constexpr size_t kMaxEvents = 20000;

struct Hash {  // FNV-1a
  uint64_t value = 14695981039346656037ull;
  void add(const std::string& text) {
    for (unsigned char c : text) value = (value ^ c) * 1099511628211ull;
  }
};

static struct Record {
  std::mutex lock;  // backward runs in a thread of its own
  bool lazy = false;
  std::set<std::string> ops;
  std::map<std::string, int64_t> syncs, fallbacks, uploads{{"seed", 0}, {"step", 0}, {"tensor", 0}};
  std::vector<std::string> events;
  int64_t marks = 0;
  int64_t optimizer_steps = 0;
  int64_t in_graph = 0;  // ops since the last cut
  int64_t longest = 0;

  // Lazy mode: a graph is every op between two cuts. The card compiles each distinct graph once,
  // and once more where an input of the same graph comes in another layout.
  Hash graph, recipe;  // without the layouts of the inputs, and with them
  std::set<uint64_t> graphs, recipes;
  std::vector<int64_t> new_graphs, graph_steps, layout_steps;
  std::atomic<int64_t> graphs_run{0};

  std::ofstream dump;  // HPU_SIM_GRAPHS
  std::string text;    // of the graph since the last cut, for the dump
  Metrics metrics;
} record_;

// ---- layouts ----------------------------------------------------------------------------------
// The card chooses how a tensor that a graph writes lies in memory. A later graph that takes the
// tensor is compiled for that layout. Here a layout is a number: 0 as uploaded, then how many
// graphs have written the tensor, and 2 at most, because the card's choice is stable by then.
static constexpr int kLastLayout = 2;

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
static int layout_of(const Block& b) {
  const bool by_an_earlier_graph = b.written >= 0 && b.written < record_.graphs_run;
  return std::min(kLastLayout, b.layout + by_an_earlier_graph);
}
static int layout_of(const Tensor& t) {
  const Block* b = t.dim() < 2 ? nullptr : block_of(t);  // numbers and vectors have one layout
  return b ? layout_of(*b) : 0;
}
static void written(const Tensor& t) {  // by an op of the graph since the last cut
  Block* b = block_of(t);
  if (!b) return;
  b->layout = layout_of(*b);
  b->written = record_.graphs_run;
}
static void written_by_the_host(const Tensor& t) {
  Block* b = block_of(t);
  if (!b) return;
  b->layout = 0;
  b->written = -1;
}

// ---- what a graph is compiled for: of tensors all but the memory, and the value of everything else
static const char* name_of(ScalarType t) {
  switch (t) {
    case kByte: return "uint8";
    case kChar: return "int8";
    case kShort: return "int16";
    case kInt: return "int32";
    case kLong: return "int64";
    case kHalf: return "float16";
    case kBFloat16: return "bfloat16";
    case kFloat: return "float32";
    case kDouble: return "float64";
    case kBool: return "bool";
    default: return c10::toString(t);
  }
}

struct Arguments {
  std::string text;
  std::string layouts;  // of the tensors, a digit each

  Arguments& add(double v) {
    char s[40];
    std::snprintf(s, sizeof s, "%.17g ", v);
    text += s;
    return *this;
  }
  Arguments& add(int64_t v) {
    text += std::to_string(v) + " ";
    return *this;
  }
  Arguments& add(bool v) {
    text += v ? "True " : "False ";
    return *this;
  }
  Arguments& add(IntArrayRef list) {
    text += "[";
    for (int64_t v : list) add(v);
    text += "] ";
    return *this;
  }
  Arguments& add(const Tensor& t) {
    if (!t.defined()) {
      text += "None ";
      return *this;
    }
    if (t.device().is_cpu() && t.unsafeGetTensorImpl()->is_wrapped_number()) {  // a Python number: a constant
      const Scalar v = t.item();
      if (v.isComplex()) return add(v.toComplexDouble().real()).add(v.toComplexDouble().imag());
      if (v.isBoolean()) return add(v.toBool());
      return v.isIntegral(false) ? add(v.toLong()) : add(v.toDouble());
    }
    text += name_of(t.scalar_type());
    if (t.device().is_cpu()) {  // its value is an input
      text += "(uploaded) ";
      return *this;
    }
    layouts += std::to_string(layout_of(t));
    add(t.sizes()).text += "strides ";
    add(t.strides());
    if (t.storage_offset() == 0) return *this;
    text += "offset ";
    return add(t.storage_offset());
  }
  Arguments& add(const IValue& v) {
    if (v.isTensor()) return add(v.toTensor());
    if (v.isDouble()) return add(v.toDouble());
    if (v.isInt()) return add(v.toInt());  // dtypes and memory formats are numbers here
    if (v.isBool()) return add(v.toBool());
    if (v.isString()) {
      text += "'" + v.toStringRef() + "' ";
      return *this;
    }
    if (v.isList()) {
      text += "[";
      for (const IValue& x : v.toListRef()) add(x);
      text += "] ";
      return *this;
    }
    if (!v.isDevice()) text += v.tagKind() + " ";  // None, Generator
    return *this;
  }
};

// ---- writing into the record ------------------------------------------------------------------
static void add_event(const std::string& e) {
  if (record_.events.size() < kMaxEvents) record_.events.push_back(e);
}

static void dump_graph(const std::string& cut_by, const char* why) {
  auto& r = record_;
  if (!r.dump.is_open()) return;
  r.dump << "graph " << r.recipes.size() << why << ": " << r.in_graph << " ops, run " << r.graphs_run
         << ", after " << r.optimizer_steps << " optimizer steps, cut by " << cut_by << "\n"
         << r.text << "\n" << std::flush;
}

static void cut(const std::string& by) {  // the caller holds the lock
  auto& r = record_;
  bool compiled = false;
  if (r.in_graph > 0 && r.lazy) {
    const bool new_graph = r.graphs.insert(r.graph.value).second;
    compiled = r.recipes.insert(r.recipe.value).second;
    if (new_graph) {
      r.new_graphs.push_back(r.graphs_run);
      r.graph_steps.push_back(r.optimizer_steps);
      dump_graph(by, "");
    } else if (compiled) {
      r.layout_steps.push_back(r.optimizer_steps);
      dump_graph(by, " (again, for a layout)");
    }
    ++r.graphs_run;
  }
  r.in_graph = 0;
  r.graph = r.recipe = Hash();
  r.text.clear();
  if (compiled) r.metrics.compiled();
}

static void ran(const std::string& op, const Arguments& arguments) {
  std::lock_guard<std::mutex> hold(record_.lock);
  record_.ops.insert(op);
  const std::string line = op + "(" + arguments.text + ")\n";
  record_.graph.add(line);
  record_.recipe.add(line + arguments.layouts);
  if (record_.dump.is_open()) record_.text += "  " + arguments.layouts + " " + line;
  record_.longest = std::max(record_.longest, ++record_.in_graph);
}

static void synced(std::string by) {  // the host waits for the card, which first runs what it was given
  std::lock_guard<std::mutex> hold(record_.lock);
  ++record_.syncs[by];
  add_event("sync:" + by);
  cut(by);
}

// An op without a kernel: its tensors go to the host and back. `call` is the op and a dtype.
static void fell_back(const std::string& op, const std::string& call) {
  const std::string name = call.substr(0, call.find(' '));
  {
    std::lock_guard<std::mutex> hold(record_.lock);
    ++record_.fallbacks[call];
    record_.ops.insert(op);
    record_.metrics.fell_back(name);
  }
  synced(name.substr(name.find("::") + 2));
}

static void uploaded(std::string what) {  // "tensor", "seed" of a random draw, "step" of FusedAdamW
  std::lock_guard<std::mutex> hold(record_.lock);
  ++record_.uploads[what];
  add_event(what == "tensor" ? "copy_to_hpu" : "upload:" + what);
}

static void mark(std::string by) {  // by: empty when the script cut the graph, else who did (the optimizer, hccl)
  std::lock_guard<std::mutex> hold(record_.lock);
  if (by.empty()) ++record_.marks;
  add_event(by.empty() ? "mark" : "mark:" + by);
  cut(by.empty() ? "mark_step" : by);
}

static std::string report() {
  std::lock_guard<std::mutex> hold(record_.lock);
  const auto& r = record_;
  std::ostringstream out;
  auto names = [&](const char* key, const auto& values) {
    const char* comma = "";
    out << ",\"" << key << "\":[";
    for (const auto& v : values) {
      out << comma << '"' << v << '"';
      comma = ",";
    }
    out << "]";
  };
  auto numbers = [&](const char* key, const auto& values) {
    const char* comma = "";
    out << ",\"" << key << "\":[";
    for (int64_t v : values) {
      out << comma << v;
      comma = ",";
    }
    out << "]";
  };
  auto counts = [&](const char* key, const auto& values) {
    const char* comma = "";
    out << ",\"" << key << "\":{";
    for (const auto& [name, n] : values) {
      out << comma << '"' << name << "\":" << n;
      comma = ",";
    }
    out << "}";
  };
  out << "{\"mark_steps\":" << r.marks;
  out << ",\"longest_graph\":" << r.longest;
  out << ",\"graphs\":" << r.graphs.size();
  out << ",\"layout_graphs\":" << r.layout_steps.size();
  out << ",\"graphs_run\":" << r.graphs_run;
  out << ",\"optimizer_steps\":" << r.optimizer_steps;
  numbers("new_graphs", r.new_graphs);
  numbers("graph_steps", r.graph_steps);
  numbers("layout_steps", r.layout_steps);
  counts("syncs_by_op", r.syncs);
  counts("fallbacks", r.fallbacks);
  counts("uploads", r.uploads);
  names("ops", r.ops);
  names("events", r.events);
  out << "}";
  return out.str();
}

// ---- kernels that the card has: supported_ops.txt ---------------------------------------------
// A line is an op and what it lacks: "op", "op -dtype", "op ->dtype" (a conversion to that dtype).
static std::map<std::string, std::set<std::string>> supported;
static void read_supported(const std::vector<std::string>& lines) {
  for (const auto& line : lines) {
    std::istringstream words(line);
    std::string op, but;
    if (!(words >> op) || op[0] == '#') continue;
    auto& not_for = supported[op];
    while (words >> but) not_for.insert(but.substr(1));
  }
}

// Records a call of an op: part of a graph, or a fall-back to the host.
// `name` has the overload, `op` has not. `dtype` is that of its first tensor, or empty.
static void called(const std::string& name, const std::string& op, const std::string& dtype, const Arguments& arguments) {
  const auto known = op.rfind("aten::", 0) == 0 ? supported.find(op.substr(6)) : supported.end();
  if (known != supported.end() && !known->second.count(dtype)) ran(name, arguments);
  else fell_back(name, dtype.empty() ? op : op + " " + dtype);
}
static void called(const std::string& op, const Tensor& t, const Arguments& arguments) {
  called(op, op, name_of(t.scalar_type()), arguments);
}

// ---- memory, device guard, generator, hooks ---------------------------------------------------
// A process takes a card when it first needs one. Other processes hold HPU_SIM_BUSY of the machine's HPU_SIM_CARDS.
static int64_t cards() { return env_int("HPU_SIM_CARDS", 1); }
static std::atomic<bool> acquired{false};
static int64_t max_cache_fields = 3;  // of PT_HPU_RECIPE_CACHE_CONFIG

static void print_banner() {  // rank 0 alone
  std::clog << "============================= HABANA PT BRIDGE CONFIGURATION =========================== \n";
  const std::pair<const char*, const char*> flags[] = {
      {"PT_RECIPE_CACHE_PATH", ""},
      {"PT_CACHE_FOLDER_DELETE", "0"},
      {"PT_HPU_RECIPE_CACHE_CONFIG", ""},
      {"PT_HPU_MAX_COMPOUND_OP_SIZE", "9223372036854775807"},
      {"PT_HPU_LAZY_ACC_PAR_MODE", "1"},
      {"PT_HPU_ENABLE_REFINE_DYNAMIC_SHAPES", "0"},
      {"PT_HPU_EAGER_PIPELINE_ENABLE", "1"},
      {"PT_HPU_EAGER_COLLECTIVE_PIPELINE_ENABLE", "1"},
  };
  std::clog << " PT_HPU_LAZY_MODE = " << record_.lazy << "\n";
  for (const auto& [name, otherwise] : flags) {
    const char* value = std::getenv(name);
    std::clog << " " << name << " = " << (value ? value : otherwise) << "\n";
  }
  std::clog << "---------------------------: System Configuration :---------------------------\n";
  std::clog << "Num CPU Cores : " << std::thread::hardware_concurrency() << "\n";
  std::clog << "CPU RAM       : 32000000 KB\n";
  std::clog << "------------------------------------------------------------------------------\n" << std::flush;
}

static void check_recipe_cache() {
  const char* config = std::getenv("PT_HPU_RECIPE_CACHE_CONFIG");
  if (!config) return;
  std::istringstream fields(config);
  int64_t n = 0;
  for (std::string field; std::getline(fields, field, ',');) ++n;
  TORCH_CHECK(n <= max_cache_fields, "Expected number of parameters extracted from PT_HPU_RECIPE_CACHE_CONFIG "
              "should be from range <1:", max_cache_fields, ">.");
}

static void acquire() {
  if (acquired) return;
  TORCH_CHECK(cards() > 0, "synStatus=8 [Device not found] Device acquire failed. No devices found.");
  const bool is_free = env_int("LOCAL_RANK", 0) < cards() - env_int("HPU_SIM_BUSY", 0);
  TORCH_CHECK(is_free, "synStatus=8 [Device not found] Device acquire failed.");
  check_recipe_cache();
  acquired = true;
  if (env_int("RANK", 0) == 0) print_banner();
}

static std::atomic<int64_t> bytes_now{0}, bytes_peak{0};
void Block::release(void* context) {
  auto* block = static_cast<Block*>(context);
  bytes_now -= block->n;
  std::free(block->p);
  delete block;
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
    const int64_t now = bytes_now += n;
    for (int64_t peak = bytes_peak; peak < now && !bytes_peak.compare_exchange_weak(peak, now);) {}
    return {p, new Block{p, n}, &Block::release, kCard};
  }
  void copy_data(void* dst, const void* src, std::size_t n) const override { std::memcpy(dst, src, n); }
};
static CardAllocator card_memory;

struct PinnedAllocator final : c10::Allocator {  // plain memory that remembers that it was asked to be pinned
  static std::set<const void*>& live() { static std::set<const void*> s; return s; }
  static std::mutex& lock() { static std::mutex m; return m; }
  static void release(void* p) {
    { std::lock_guard<std::mutex> hold(lock()); live().erase(p); }
    std::free(p);
  }
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    TORCH_CHECK(posix_memalign(&p, 64, std::max<size_t>(n, 1)) == 0, "no memory left to pin");
    std::lock_guard<std::mutex> hold(lock());
    live().insert(p);
    return {p, p, &release, Device(kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* dst, const void* src, std::size_t n) const override { std::memcpy(dst, src, n); }
};
static PinnedAllocator pinned_memory;

template <DeviceType T>
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return T; }
  Device exchangeDevice(Device) const override { return Device(T, 0); }
  Device getDevice() const override { return Device(T, 0); }
  void setDevice(Device d) const override { TORCH_CHECK(d.index() <= 0, "this process has one card, hpu:0, not ", d); }
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(T, 0)); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return T == DeviceType::HPU && cards() > 0; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
static Guard<DeviceType::HPU> card_guard;
static Guard<DeviceType::CUDA> no_cuda_guard;

struct CardGenerator final : CPUGeneratorImpl {  // torch.Generator("hpu"): the CPU's numbers under the card's name
  explicit CardGenerator(uint64_t seed = default_rng_seed_val) : CPUGeneratorImpl(seed) { call_itself(kCard); }
  void call_itself(Device d) { device_ = d; }
};

struct CardHooks final : HPUHooksInterface {  // isBuilt and isAvailable override nothing in torch 2.6
  void init() const override {}
  bool hasHPU() const override { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return cards() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return cards() > 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* p) const override {
    std::lock_guard<std::mutex> hold(PinnedAllocator::lock());
    return PinnedAllocator::live().count(p) > 0;
  }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<CardGenerator>(); }
};
static CardHooks card_hooks;

// Called once, by habana_frameworks.torch.core.
static int64_t plug_in(bool lazy, std::vector<std::string> supported_ops, int64_t cache_fields) {
  record_.lazy = lazy;
  max_cache_fields = cache_fields;
  read_supported(supported_ops);
  if (const char* path = std::getenv("HPU_SIM_GRAPHS")) {
    const char* rank = std::getenv("RANK");
    record_.dump.open(rank ? std::string(path) + "." + rank : path);
  }
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

// Records a call of an op, before it runs.
static void record_call(const c10::OperatorHandle& op, const std::string& name, c10::ArrayRef<IValue> arguments) {
  std::string base = op.operator_name().name;  // aten::add of aten::add_.Tensor
  if (base.back() == '_') base.pop_back();
  std::string dtype;  // of the first tensor
  Arguments all;
  std::function<void(const IValue&)> look = [&](const IValue& v) {
    if (v.isList()) {
      for (const IValue& x : v.toListRef()) look(x);
    }
    if (!v.isTensor() || !v.toTensor().defined()) return;
    const Tensor& t = v.toTensor();
    if (dtype.empty()) dtype = name_of(t.scalar_type());
    const bool is_constant = t.unsafeGetTensorImpl()->is_wrapped_number();
    if (t.device().is_cpu() && t.dim() == 0 && !is_constant) uploaded("tensor");
  };
  for (const IValue& v : arguments) {
    look(v);
    all.add(v);
  }
  if (!record_.lazy && op.hasTag(at::Tag::nondeterministic_seeded)) uploaded("seed");
  called(name, base, dtype, all);
}

// Every op without a kernel below: check devices as the card would, run the CPU's kernel on the same memory.
static void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& args = schema.arguments();
  const size_t first = stack->size() - args.size();
  const auto& on = op.operator_name();
  const std::string name = on.overload_name.empty() ? on.name : on.name + "." + on.overload_name;
  record_call(op, name, c10::ArrayRef<IValue>(stack->data() + first, args.size()));

  auto check = [&](const Tensor& t) {
    TORCH_CHECK(!t.defined() || t.device() == kCard || (t.device().is_cpu() && t.dim() == 0),
                "Expected all tensors to be on the same device, but ", name, " found at least two devices, hpu:0 and ", t.device(), "!");
  };
  auto list_on_cpu = [&](const auto& list) {
    c10::List<Tensor> out;
    for (const Tensor& t : list) { check(t); out.push_back(on_cpu(t)); }
    return out;
  };
  std::vector<IValue> given(stack->begin() + first, stack->end());  // the card's tensors, to hand back those written in place
  CardGenerator* generator = nullptr;
  for (size_t i = 0; i < args.size(); ++i) {
    IValue& v = (*stack)[first + i];
    if (v.isTensor()) {
      check(v.toTensor());
      v = on_cpu(v.toTensor());
    } else if (v.isTensorList()) {
      v = list_on_cpu(v.toTensorVector());
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (const std::optional<Tensor>& t : v.toOptionalTensorVector()) {
        if (t) check(*t);
        out.push_back(t ? std::optional<Tensor>(on_cpu(*t)) : std::nullopt);
      }
      v = out;
    } else if (v.isGenerator()) {
      TORCH_CHECK(v.toGenerator().device() == kCard, "Expected a 'hpu' device type for generator but found '", v.toGenerator().device().type(), "'");
      generator = static_cast<CardGenerator*>(v.toGenerator().unsafeGetGeneratorImpl());
    } else if (v.isDevice()) {
      v = Device(kCPU);
    }
  }
  std::vector<IValue> seen(stack->begin() + first, stack->end());
  if (generator) generator->call_itself(Device(kCPU));  // a CPU kernel takes a CPU generator only
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  if (generator) generator->call_itself(kCard);

  for (size_t i = 0; i < args.size(); ++i) {
    if (!args[i].alias_info() || !args[i].alias_info()->isWrite()) continue;
    if (given[i].isTensorList()) {
      for (const Tensor& t : given[i].toTensorVector()) written(t);
    }
    if (!seen[i].isTensor() || !given[i].toTensor().defined()) continue;
    const Tensor& cpu = seen[i].toTensor();
    Tensor card = given[i].toTensor();
    written(card);
    // An `out` that the CPU's kernel resized has other memory now.
    if (card.device().is_cpu() || (cpu.sizes() == card.sizes() && cpu.storage().data() == card.storage().data())) continue;
    card.resize_(cpu.sizes());
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
    } else if (v.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) out.push_back(on_card(t));
      v = out;
    }
  }
}

static void check_card(std::optional<Device> d) {
  TORCH_CHECK(!d || d->index() <= 0, "this process has one card, hpu:0, not ", *d);
}
static Tensor card_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device,
                         std::optional<bool>, std::optional<MemoryFormat> format) {
  check_card(device);
  return at::detail::empty_generic(size, &card_memory, DispatchKeySet(DispatchKey::HPU), c10::dtype_or_default(dtype), format);
}
static Tensor card_empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                                 std::optional<Device> device, std::optional<bool>) {
  check_card(device);
  return at::detail::empty_strided_generic(size, stride, &card_memory, DispatchKeySet(DispatchKey::HPU), c10::dtype_or_default(dtype));
}
static void record_copy(const Tensor& src, const Tensor& dst) {  // from the card to the card
  const Arguments both = Arguments().add(src).add(dst);
  const std::string from = name_of(src.scalar_type());
  const std::string to = name_of(dst.scalar_type());
  const auto& lacks = supported["_copy_from"];
  if (from != to && lacks.count(">" + to)) fell_back("aten::_copy_from", "aten::_copy_from " + from + "->" + to);
  else called("aten::_copy_from", src, both);
}
static Tensor card_copy(const Tensor& src, const Tensor& dst, bool non_blocking) {
  const bool from_card = src.device() == kCard;
  const bool to_card = dst.device() == kCard;
  if (from_card && to_card) record_copy(src, dst);
  else if (from_card) synced(non_blocking ? "copy_to_cpu_non_blocking" : "copy_to_cpu");
  else uploaded("tensor");
  on_cpu(dst).copy_(on_cpu(src));
  if (from_card) written(dst);
  else written_by_the_host(dst);
  return dst;
}
static Tensor card_copy_and_resize(const Tensor& src, const Tensor& dst) {
  dst.resize_(src.sizes());
  return card_copy(src, dst, false);
}

// Views. Each is an op of the graph.
static Tensor card_as_strided(const Tensor& t, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  const int64_t at = offset.value_or(t.storage_offset());
  called("aten::as_strided", t, Arguments().add(t).add(size).add(stride).add(at));
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}
static Tensor card_permute(const Tensor& t, IntArrayRef dims) {
  called("aten::permute", t, Arguments().add(t).add(dims));
  TORCH_CHECK(static_cast<int64_t>(dims.size()) == t.dim(), "permute: ", dims.size(), " dimensions for ", t.dim());
  std::vector<int64_t> size, stride;
  for (int64_t dim : dims) {
    size.push_back(t.size(dim));
    stride.push_back(t.stride(dim));
  }
  return at::native::as_strided_tensorimpl(t, size, stride, t.storage_offset());
}
static Tensor card_unfold(const Tensor& t, int64_t dim, int64_t size, int64_t step) {
  called("aten::unfold", t, Arguments().add(t).add(dim).add(size).add(step));
  return at::native::unfold(t, dim, size, step);
}
static Tensor card_view(const Tensor& t, IntArrayRef size) {
  called("aten::view", t, Arguments().add(t).add(size));
  return at::native::view(t, size);
}
static Tensor card_reshape_alias(const Tensor& t, IntArrayRef size, IntArrayRef stride) {
  called("aten::_reshape_alias", t, Arguments().add(t).add(size).add(stride));
  return at::native::_reshape_alias(t, size, stride);
}

static Tensor& card_set(Tensor& t, Storage s, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::cpu::set_(t, s, offset, size, stride);
}
static Tensor& card_set_whole(Tensor& t, Storage s) {  // torch.save and torch.load move whole storages
  return at::cpu::set_(t, s, 0, {static_cast<int64_t>(s.nbytes() / t.dtype().itemsize())}, {});
}
static Scalar card_item(const Tensor& t) {
  synced("_local_scalar_dense");
  return at::native::_local_scalar_dense_cpu(on_cpu(t));
}
static void check_same(const Tensor& a, const Tensor& b, const char* what) {
  TORCH_CHECK(a.device() == b.device(), "Expected all tensors to be on the same device, but the input is on ", a.device(), " and ", what, " on ", b.device());
}
static Tensor card_conv(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, IntArrayRef stride, IntArrayRef pad,
                        IntArrayRef dil, bool transposed, IntArrayRef out_pad, int64_t groups) {
  Arguments all;
  all.add(x).add(w).add(b.value_or(Tensor())).add(stride).add(pad).add(dil).add(transposed).add(out_pad).add(groups);
  ran("aten::convolution_overrideable", all);
  check_same(x, w, "weight");
  const bool has_bias = b && b->defined();
  if (has_bias) check_same(x, *b, "bias");
  return on_card(at::convolution(on_cpu(x), on_cpu(w), has_bias ? std::optional<Tensor>(on_cpu(*b)) : std::nullopt,
                                 stride, pad, dil, transposed, out_pad, groups));
}
static std::tuple<Tensor, Tensor, Tensor> card_conv_backward(const Tensor& g, const Tensor& x, const Tensor& w, IntArrayRef stride,
    IntArrayRef pad, IntArrayRef dil, bool transposed, IntArrayRef out_pad, int64_t groups, std::array<bool, 3> mask) {
  Arguments all;
  all.add(g).add(x).add(w).add(stride).add(pad).add(dil).add(transposed).add(out_pad).add(groups);
  for (bool m : mask) all.add(m);
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
  m.impl("_copy_from_and_resize", &card_copy_and_resize);
  m.impl("as_strided", &card_as_strided);
  m.impl("permute", &card_permute);
  m.impl("unfold", &card_unfold);
  m.impl("view", &card_view);
  m.impl("_reshape_alias", &card_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", &card_set);
  m.impl("set_.source_Storage", &card_set_whole);
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
  if (!file.is_open()) {
    TORCH_WARN("Failed to open file with ops to autocast: ", path, ". Default list loaded.");
    return defaults;
  }
  Ops ops;  // a line is a name as it stands, and the file is the whole list
  for (std::string line; std::getline(file, line);) ops.insert(line);
  return ops;
}
static const Ops first_only{"layer_norm", "group_norm", "instance_norm", "batch_norm"};  // weights and statistics stay fp32
static const Ops promoted{"add", "addcmul", "addcdiv", "cat", "div", "exp", "mul", "pow", "sub", "stack"};

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
  const Ops lower = ops_from("PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST",
      {"addmm", "addbmm", "batch_norm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
       "conv_transpose3d", "dot", "dropout", "feature_dropout", "group_norm", "instance_norm", "layer_norm", "leaky_relu", "linear",
       "matmul", "mean", "mm", "mul", "mv", "softmax", "log_softmax", "scaled_dot_product_attention"});
  const Ops fp32 = ops_from("PT_HPU_AUTOCAST_FP32_OPS_LIST",
      {"acos", "addcdiv", "asin", "atan2", "bilinear", "binary_cross_entropy", "binary_cross_entropy_with_logits", "cdist", "cosh",
       "cosine_embedding_loss", "cosine_similarity", "cross_entropy_loss", "dist", "div", "divide", "embedding", "embedding_bag", "erfinv",
       "exp", "expm1", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss", "log", "log10", "log1p", "log2", "logsumexp",
       "margin_ranking_loss", "mse_loss", "multi_margin_loss", "multilabel_margin_loss", "nll_loss", "pdist", "poisson_nll_loss", "pow",
       "reciprocal", "renorm", "rsqrt", "sinh", "smooth_l1_loss", "soft_margin_loss", "softplus", "tan", "topk", "triplet_margin_loss",
       "true_divide"});
  for (const auto& on : c10::Dispatcher::singleton().getAllOpNames()) {
    if (on.name.rfind("aten::", 0) != 0) continue;
    const std::string op = on.name.substr(6);
    auto handle = c10::Dispatcher::singleton().findSchema(on);
    if (!handle || handle->schema().is_mutable()) continue;
    const std::string full = on.overload_name.empty() ? on.name : on.name + "." + on.overload_name;
    if (lower.count(op)) m.impl(full.c_str(), first_only.count(op) ? casting<Cast::lower_first>() : casting<Cast::lower>());
    else if (fp32.count(op)) m.impl(full.c_str(), casting<Cast::fp32>());
    else if (promoted.count(op)) m.impl(full.c_str(), casting<Cast::promote>());
  }
}

// ---- what the Python side calls -----------------------------------------------------------------
TORCH_LIBRARY(hpu_sim, m) {
  m.def("plug_in(bool lazy, str[] supported_ops, int cache_fields) -> int", &plug_in);
  m.def("acquire() -> ()", [] { acquire(); });
  m.def("acquired() -> bool", [] { return acquired.load(); });
  // An op that the Python side computes. It may write all its tensors.
  m.def("ran(str op, Tensor[] tensors, str constants) -> ()", [](std::string op, std::vector<Tensor> tensors, std::string constants) {
    Arguments all;
    for (const Tensor& t : tensors) all.add(t);
    all.text += constants;
    ran(op, all);
    for (const Tensor& t : tensors) written(t);
  });
  m.def("mark(str by) -> ()", &mark);
  m.def("synced(str by) -> ()", [](std::string by) { acquire(); synced(by); });
  m.def("uploaded(str what) -> ()", &uploaded);
  m.def("optimizer_step() -> ()", [] {
    std::lock_guard<std::mutex> hold(record_.lock);
    ++record_.optimizer_steps;
  });
  m.def("compiled() -> ()", [] {  // a trace of torch.compile
    std::lock_guard<std::mutex> hold(record_.lock);
    record_.metrics.compiled();
  });
  m.def("end_metrics() -> ()", [] {
    std::lock_guard<std::mutex> hold(record_.lock);
    if (acquired) record_.metrics.end();
  });
  m.def("report() -> str", &report);
  m.def("memory() -> int[]", [] { return std::vector<int64_t>{bytes_now, bytes_peak}; });
  m.def("reset_peak() -> ()", [] { bytes_peak = bytes_now.load(); });
  m.def("on_cpu(Tensor t) -> Tensor", &on_cpu);
}
