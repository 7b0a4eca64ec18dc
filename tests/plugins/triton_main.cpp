// Compiled as a library: the part of libnvinfer that a plugin library may use, with a registry that keeps one creator.
// Compiled with MAIN: opens libraries one after the other, each for itself, as Triton opens its TensorRT backend and
// that opens plugin libraries, and asks the registry of the last argument, a libnvinfer, what it has.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>

using namespace nvinfer1;

#ifdef MAIN

int main(int count, char** paths) {
  void* library = nullptr;
  for (int i = 1; i < count; ++i) {
    library = dlopen(paths[i], RTLD_NOW | RTLD_LOCAL);
    if (!library) return std::printf("%s\n", dlerror()), 1;
  }
  auto* const registry = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"))();
  int32_t creators = 0;
  auto* const* const all = registry->getAllCreators(&creators);
  for (int32_t i = 0; i < creators; ++i) {
    auto* const creator = static_cast<IPluginCreatorV3One*>(all[i]);
    std::printf("%s %s %s\n", creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace());
  }
}

#else

namespace {

class Registry : public IPluginRegistry {
 public:
  bool registerCreator(IPluginCreatorInterface& creator, const char* space) noexcept override {
    creators_[count_++] = &creator;
    return std::string(space) == "retinaface_trt" && count_ == 1;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    *count = count_;
    return creators_;
  }
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  IPluginCreatorInterface* getCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return false; }
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const char*) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
#endif

 private:
  IPluginCreatorInterface* creators_[8]{};
  int32_t count_ = 0;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}

#endif
