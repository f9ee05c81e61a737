// A CUDA driver with one device that is the CPU: the calls that vqkernels.cuda makes, running the
// emulated kernels on host memory. Built as a shared library in the place of libcuda.so.1, it shows
// what argument packing, grids, shared memory and contexts of the Python side are worth. Refuses
// what a real driver would refuse.
#include "test_cuda.cpp"

#include <dlfcn.h>

#include <map>
#include <utility>

namespace {

enum Status : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kNotInitialized = 3,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNotFound = 500,
};

struct Function {
  std::string name;
  void *address;
  int max_shared = 48 * 1024;
};

constexpr int kProcessors = 2;
constexpr int kMaxShared = 232448;  // what a block of an H100 may have

bool is_initialized = false;
int the_context;
thread_local void *current_context = nullptr;
std::map<std::string, Function> functions;
std::vector<std::string> launches;

template <typename... Arguments, std::size_t... I>
void call_with(void (*kernel)(Arguments...), void **arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Arguments *>(arguments[I])...);
}

template <typename... Arguments>
void call_as(void (*)(Arguments...), void *address, void **arguments) {
  call_with(reinterpret_cast<void (*)(Arguments...)>(address), arguments,
            std::index_sequence_for<Arguments...>{});
}

bool contains(const std::string &name, const char *part) {
  return name.find(part) != std::string::npos;
}

// All kernels of one kind and one way to read the weights have the same parameters.
template <typename Gemv, typename Gemm, typename Dequantize>
void call_kind(const Function &f, void **arguments, Gemv gemv, Gemm gemm, Dequantize dequantize) {
  if (contains(f.name, "_gemm")) {
    call_as(gemm, f.address, arguments);
  } else if (contains(f.name, "_dequantize")) {
    call_as(dequantize, f.address, arguments);
  } else {
    call_as(gemv, f.address, arguments);
  }
}

void call(const Function &f, void **arguments) {
  if (contains(f.name, "gptq")) {
    call_kind(f, arguments, &vq_gptq4_b1, &vq_gptq4_gemm16, &vq_gptq4_dequantize);
  } else if (contains(f.name, "trellis")) {
    call_kind(f, arguments, &vq_trellis4_b1, &vq_trellis4_gemm16, &vq_trellis4_dequantize);
  } else {
    call_kind(f, arguments, &vq_codebook8x1_b1, &vq_codebook8x1_gemm16, &vq_codebook8x1_dequantize);
  }
}

}  // namespace

extern "C" {

int cuInit(unsigned) {
  is_initialized = true;
  return kSuccess;
}

int cuGetErrorString(int, const char **text) {
  *text = "refused by the emulated driver";
  return kSuccess;
}

int cuDeviceGet(int *device, int ordinal) {
  if (!is_initialized) return kNotInitialized;
  if (ordinal != 0) return kInvalidValue;
  *device = 0;
  return kSuccess;
}

int cuDeviceGetName(char *name, int length, int) {
  std::snprintf(name, static_cast<std::size_t>(length), "emulated");
  return kSuccess;
}

int cuDeviceGetAttribute(int *value, int attribute, int) {
  if (attribute != 16 && attribute != 97) return kInvalidValue;
  *value = attribute == 16 ? kProcessors : kMaxShared;
  return kSuccess;
}

int cuDevicePrimaryCtxRetain(void **context, int) {
  *context = &the_context;
  return kSuccess;
}

int cuCtxGetCurrent(void **context) {
  *context = current_context;
  return kSuccess;
}

int cuCtxSetCurrent(void *context) {
  if (context != &the_context) return kInvalidContext;
  current_context = context;
  return kSuccess;
}

int cuModuleLoadData(void **module, const void *image) {
  if (current_context == nullptr) return kInvalidContext;
  if (std::memcmp(image, "emulated", 8) != 0) return kInvalidImage;
  *module = &functions;
  return kSuccess;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  if (module != &functions || std::strncmp(name, "vq_", 3) != 0) return kInvalidValue;
  Dl_info self;
  if (dladdr(reinterpret_cast<void *>(&cuInit), &self) == 0) return kNotFound;
  void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  void *address = library == nullptr ? nullptr : dlsym(library, name);
  if (address == nullptr) return kNotFound;
  *function = &(functions[name] = Function{name, address});
  return kSuccess;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute != 8 || value > kMaxShared) return kInvalidValue;
  static_cast<Function *>(function)->max_shared = value;
  return kSuccess;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared_bytes, void *, void **arguments, void **extra) {
  const Function &f = *static_cast<Function *>(function);
  if (current_context == nullptr) return kInvalidContext;
  if (gx < 1 || gy < 1 || gy > 65535 || gz != 1 || bx != 256 || by != 1 || bz != 1 ||
      extra != nullptr || static_cast<int>(shared_bytes) > f.max_shared) {
    return kInvalidValue;
  }
  launches.push_back(f.name);
  vq_emulation::copies_are_late = launches.size() % 2 == 0;
  vq_emulation::launch(dim3{gx, gy}, 256, shared_bytes, [&] { call(f, arguments); });
  return kSuccess;
}

// Kernels launched since the last call, one a line.
int fake_launches(char *text, std::size_t size) {
  std::string all;
  for (const std::string &name : launches) all += name + "\n";
  launches.clear();
  std::snprintf(text, size, "%s", all.c_str());
  return kSuccess;
}

}  // extern "C"
