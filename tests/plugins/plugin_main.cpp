// Drives the TensorRT plugin as TensorRT does, through its interfaces, without a TensorRT: argv[1] is the library.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

void expect(bool good, const char* what) {
  if (!good) {
    std::printf("FAILED: %s\n", what);
    std::exit(1);
  }
}

struct Fields {
  std::vector<int64_t> strides{8, 16, 32};
  std::vector<float> min_sizes{16, 32, 64, 128, 256.5f, 512};
  std::vector<float> variances{0.1f, 0.2f};
  float logit = -1.25f, iou = 0.45f;
  int32_t top_k = 77, keep = 33;

  std::vector<PluginField> list() const {
    return {{"strides", strides.data(), PluginFieldType::kINT64, int32_t(strides.size())},
            {"min_sizes", min_sizes.data(), PluginFieldType::kFLOAT32, int32_t(min_sizes.size())},
            {"variances", variances.data(), PluginFieldType::kFLOAT32, int32_t(variances.size())},
            {"logit_threshold", &logit, PluginFieldType::kFLOAT32, 1},
            {"iou_threshold", &iou, PluginFieldType::kFLOAT32, 1},
            {"top_k", &top_k, PluginFieldType::kINT32, 1},
            {"max_detections", &keep, PluginFieldType::kINT32, 1},
            {"something_else", &keep, PluginFieldType::kINT32, 1}};
  }
};

IPluginV3* create(IPluginCreatorV3One* creator, const std::vector<PluginField>& fields, TensorRTPhase phase) {
  const PluginFieldCollection collection{int32_t(fields.size()), fields.data()};
  return creator->createPlugin("node", &collection, phase);
}

template <typename Interface>
Interface* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

std::map<std::string, std::string> serialized(IPluginV3* plugin) {
  std::map<std::string, std::string> found;
  const auto* fields = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    expect(field.type == PluginFieldType::kFLOAT32 || field.type == PluginFieldType::kINT32, "types of fields");
    found[field.name] = std::string(static_cast<const char*>(field.data), 4 * size_t(field.length));
  }
  return found;
}

DynamicPluginTensorDesc tensor(DataType type, TensorFormat format, std::vector<int64_t> dims) {
  DynamicPluginTensorDesc desc{};
  desc.desc.type = type;
  desc.desc.format = format;
  desc.desc.dims.nbDims = int32_t(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) desc.desc.dims.d[i] = dims[i];
  desc.min = desc.opt = desc.max = desc.desc.dims;
  return desc;
}

std::vector<DynamicPluginTensorDesc> tensors(DataType type, TensorFormat format, int64_t batch, int64_t height,
                                             int64_t width) {
  std::vector<DynamicPluginTensorDesc> all;
  for (const int64_t stride : {8, 16, 32})
    all.push_back(tensor(type, format, {batch, 32, height / stride, width / stride}));
  for (const DataType output :
       {DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT32}) {
    all.push_back(tensor(output, TensorFormat::kLINEAR, {batch}));
  }
  return all;
}

}  // namespace

int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  expect(library != nullptr, "the library loads beside no TensorRT at all");
  auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  expect(get && dlsym(library, "setLoggerFinder"), "the library has the functions loadLibrary calls");
  int32_t count = 0;
  auto* creator = static_cast<IPluginCreatorV3One*>(get(count)[0]);
  expect(count == 1, "one creator");
  expect(!std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE"), "kind of creator");
  std::printf("%s %s %s\n", creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace());
  expect(creator->getFieldNames()->nbFields == 7, "number of attributes");

  const Fields good;
  std::unique_ptr<IPluginV3> plugin{create(creator, good.list(), TensorRTPhase::kBUILD)};
  expect(plugin != nullptr, "created from an ONNX node");

  // every attribute survives a round through an engine, whatever integer type the parser gave it
  const auto first = serialized(plugin.get());
  expect(first.size() == 7, "every attribute is serialised");
  expect(first.at("strides") == std::string("\x08\0\0\0\x10\0\0\0\x20\0\0\0", 12), "strides");
  expect(!std::memcmp(first.at("min_sizes").data(), good.min_sizes.data(), 24), "min_sizes");
  expect(!std::memcmp(first.at("logit_threshold").data(), &good.logit, 4), "logit_threshold");
  const auto* stored =
      capability<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  std::unique_ptr<IPluginV3> again{
      create(creator, {stored->fields, stored->fields + stored->nbFields}, TensorRTPhase::kRUNTIME)};
  expect(again && serialized(again.get()) == first, "the same from an engine");
  std::unique_ptr<IPluginV3> copy{again->clone()};
  again.reset();
  expect(serialized(copy.get()) == first, "a clone stands alone");
  std::unique_ptr<IPluginV3> attached{
      capability<IPluginV3OneRuntime>(copy.get(), PluginCapabilityType::kRUNTIME)->attachToContext(nullptr)};
  expect(attached && serialized(attached.get()) == first, "attached to a context");

  // impossible attributes are refused
  for (size_t missing = 0; missing < 7; ++missing) {
    auto fields = good.list();
    fields.erase(fields.begin() + long(missing));
    expect(!create(creator, fields, TensorRTPhase::kBUILD), "a missing attribute is refused");
  }
  const auto refuse = [&](auto&& change, const char* what) {
    Fields bad;
    change(bad);
    expect(!create(creator, bad.list(), TensorRTPhase::kBUILD), what);
  };
  refuse([](Fields& f) { f.iou = 1.f; }, "iou_threshold 1");
  refuse([](Fields& f) { f.iou = 0.f / 0.f; }, "iou_threshold NaN");
  refuse([](Fields& f) { f.logit = 1.f / 0.f; }, "logit_threshold infinity");
  refuse([](Fields& f) { f.top_k = 0; }, "top_k 0");
  refuse([](Fields& f) { f.keep = -1; }, "max_detections -1");
  refuse([](Fields& f) { f.strides[1] = 0; }, "a stride of 0");
  refuse([](Fields& f) { f.min_sizes.pop_back(); }, "min_sizes that do not divide by the levels");
  refuse([](Fields& f) { f.strides.assign(5, 8); }, "five levels");
  refuse([](Fields& f) { f.variances = {0.1f}; }, "one variance");
  auto text = good.list();
  text[5].type = PluginFieldType::kCHAR;
  expect(!create(creator, text, TensorRTPhase::kBUILD), "top_k as text is refused");

  // types and formats
  auto* build = capability<IPluginV3OneBuild>(plugin.get(), PluginCapabilityType::kBUILD);
  expect(build->getNbOutputs() == 5, "five outputs");
  DataType types[5];
  const DataType inputs[3] = {DataType::kHALF, DataType::kHALF, DataType::kHALF};
  expect(build->getOutputDataTypes(types, 5, inputs, 3) == 0 && types[0] == DataType::kINT32 &&
             types[1] == DataType::kFLOAT && types[4] == DataType::kINT32,
         "types of the outputs");
  const auto supported = [&](const std::vector<DynamicPluginTensorDesc>& all) {
    for (int32_t i = 0; i < 8; ++i) {
      if (!build->supportsFormatCombination(i, all.data(), 3, 5)) return false;
    }
    return true;
  };
  expect(supported(tensors(DataType::kFLOAT, TensorFormat::kLINEAR, 1, 64, 96)), "fp32 planar");
  expect(supported(tensors(DataType::kFLOAT, TensorFormat::kHWC, 1, 64, 96)), "fp32 channels-last");
  expect(supported(tensors(DataType::kHALF, TensorFormat::kLINEAR, 1, 64, 96)), "fp16 planar");
  expect(supported(tensors(DataType::kHALF, TensorFormat::kHWC8, 1, 64, 96)), "fp16 channels-last");
  expect(!supported(tensors(DataType::kHALF, TensorFormat::kCHW2, 1, 64, 96)), "not fp16 in pairs");
  expect(!supported(tensors(DataType::kINT8, TensorFormat::kLINEAR, 1, 64, 96)), "not int8");
  auto mixed = tensors(DataType::kHALF, TensorFormat::kHWC8, 1, 64, 96);
  mixed[2] = tensors(DataType::kHALF, TensorFormat::kLINEAR, 1, 64, 96)[2];
  expect(!supported(mixed), "not a mixture");
  auto half_output = tensors(DataType::kHALF, TensorFormat::kLINEAR, 1, 64, 96);
  half_output[3 + 1].desc.type = DataType::kHALF;
  expect(!supported(half_output), "boxes are fp32");

  // shapes
  const auto small = tensors(DataType::kFLOAT, TensorFormat::kLINEAR, 2, 64, 96);
  expect(build->configurePlugin(small.data(), 3, small.data() + 3, 5) == 0, "configured");
  auto wrong = small;
  wrong[1].desc.dims.d[1] = 16;
  expect(build->configurePlugin(wrong.data(), 3, wrong.data() + 3, 5) != 0, "16 channels are refused");
  const size_t bytes = build->getWorkspaceSize(small.data(), 3, small.data() + 3, 5);
  const auto large = tensors(DataType::kFLOAT, TensorFormat::kLINEAR, 8, 1088, 1920);
  const size_t more = build->getWorkspaceSize(large.data(), 3, large.data() + 3, 5);
  expect(bytes >= 2 * 126 * 2 * 8 && more >= size_t(8) * 85680 * 8 && more < (16 << 20),
         "workspace grows with the priors");
  auto* runtime = capability<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);
  PluginTensorDesc shaped[3] = {small[0].desc, small[1].desc, small[2].desc};
  expect(runtime->onShapeChange(shaped, 3, nullptr, 5) == 0, "a shape is accepted");
  shaped[2].dims.d[0] = 3;
  expect(runtime->onShapeChange(shaped, 3, nullptr, 5) != 0, "maps of different batches are refused");
  std::printf("passed\n");
  return 0;
}
