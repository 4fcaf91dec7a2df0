// LD_PRELOAD this. A build of torch made for CUDA answers CUDA whenever it is asked
// for its accelerator, and reads the HPU hooks before a plugin can register its own;
// these three functions answer in its place once the simulated card is loaded.
// No torch header, so that it is the same for every torch.
#include <dlfcn.h>
#include <cstdint>
#include <optional>

static const void* hooks = nullptr;
extern "C" void hpu_sim_on(const void* h) { hooks = h; }

namespace c10 { enum class DeviceType : int8_t { HPU = 15 }; }
using Accelerator = std::optional<c10::DeviceType>;

static Accelerator accelerator(bool checked, const char* name) {
  if (hooks) return c10::DeviceType::HPU;
  auto real = reinterpret_cast<Accelerator (*)(bool)>(dlsym(RTLD_NEXT, name));
  return real ? real(checked) : std::nullopt;
}

namespace at {
struct HPUHooksInterface;
Accelerator getAccelerator(bool checked) { return accelerator(checked, "_ZN2at14getAcceleratorEb"); }  // torch 2.6
namespace accelerator {
Accelerator getAccelerator(bool checked) { return ::accelerator(checked, "_ZN2at11accelerator14getAcceleratorEb"); }
}  // namespace accelerator
namespace detail {
const HPUHooksInterface& getHPUHooks() {
  if (hooks) return *static_cast<const HPUHooksInterface*>(hooks);
  return reinterpret_cast<const HPUHooksInterface& (*)()>(dlsym(RTLD_NEXT, "_ZN2at6detail11getHPUHooksEv"))();
}
}  // namespace detail
}  // namespace at
