// Drives the TensorRT plugin as TensorRT does, through its interfaces, without a TensorRT: argv[1] is the library.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
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
  int32_t top_k = 77, keep = 33, last = 0;

  std::vector<PluginField> list() const {
    return {{"strides", strides.data(), PluginFieldType::kINT64, int32_t(strides.size())},
            {"min_sizes", min_sizes.data(), PluginFieldType::kFLOAT32, int32_t(min_sizes.size())},
            {"variances", variances.data(), PluginFieldType::kFLOAT32, int32_t(variances.size())},
            {"logit_threshold", &logit, PluginFieldType::kFLOAT32, 1},
            {"iou_threshold", &iou, PluginFieldType::kFLOAT32, 1},
            {"top_k", &top_k, PluginFieldType::kINT32, 1},
            {"max_detections", &keep, PluginFieldType::kINT32, 1},
            {"channels_last", &last, PluginFieldType::kINT32, 1},
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

// Sizes of outputs: a constant, or one that an input has.
class Size final : public IDimensionExpr, apiv::VDimensionExpr {
 public:
  explicit Size(int64_t value, bool constant = true) : value_(value), constant_(constant) { mImpl = this; }
  bool isConstant() const override { return constant_; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  const int64_t value_;
  const bool constant_;
};

class Builder final : public IExprBuilder, apiv::VExprBuilder {
 public:
  Builder() { IExprBuilder::mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override {
    sizes_.push_back(std::make_unique<Size>(value));
    return sizes_.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Size>> sizes_;
};

// What the plugin reports.
class Log final : public ILogger, public ILoggerFinder {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity == Severity::kERROR) last = message;
  }
  ILogger* findLogger() override { return there ? this : nullptr; }
  bool there = true;
  std::string last;
};

int32_t version = NV_TENSORRT_MAJOR * 10000;

}  // namespace

// This program takes TensorRT's place: the plugin asks for the version of what its logger belongs to.
extern "C" __attribute__((visibility("default"))) int32_t getInferLibVersion() noexcept { return version; }

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
  expect(creator->getFieldNames()->nbFields == 8, "number of attributes");

  const Fields good;
  std::unique_ptr<IPluginV3> plugin{create(creator, good.list(), TensorRTPhase::kBUILD)};
  expect(plugin != nullptr, "created from an ONNX node");

  // every attribute survives a round through an engine, whatever integer type the parser gave it
  const auto first = serialized(plugin.get());
  expect(first.size() == 8, "every attribute is serialised");
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
  for (size_t missing = 0; missing < 8; ++missing) {
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
  refuse([](Fields& f) { f.last = 2; }, "channels_last 2");
  refuse([](Fields& f) { f.last = -1; }, "channels_last -1");
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

  // attributes of every numeric type, and what no attribute is
  const auto with = [&](size_t index, const void* data, PluginFieldType type, int32_t length) {
    auto fields = good.list();
    fields[index] = PluginField{fields[index].name, data, type, length};
    return std::unique_ptr<IPluginV3>{create(creator, fields, TensorRTPhase::kBUILD)};
  };
  const auto stores = [&](const std::unique_ptr<IPluginV3>& made, const char* name, const void* bytes, size_t size) {
    return made && serialized(made.get()).at(name) == std::string(static_cast<const char*>(bytes), size);
  };
  const std::vector<double> doubles{16, 32, 64, 128, 256.5, 512};
  expect(stores(with(1, doubles.data(), PluginFieldType::kFLOAT64, 6), "min_sizes", good.min_sizes.data(), 24),
         "min_sizes as doubles");
  const std::vector<int64_t> wholes{16, 32, 64, 128, 256, 512};
  const std::vector<float> rounded{16, 32, 64, 128, 256, 512};
  expect(stores(with(1, wholes.data(), PluginFieldType::kINT64, 6), "min_sizes", rounded.data(), 24),
         "min_sizes as integers");
  const float top = 77.f;
  expect(stores(with(5, &top, PluginFieldType::kFLOAT32, 1), "top_k", &good.top_k, 4), "top_k as a float");
  const int64_t huge = (int64_t(1) << 32) + 77, lowest = -(int64_t(1) << 32) + 77;
  expect(!with(5, &huge, PluginFieldType::kINT64, 1), "an integer that does not fit is refused, not cut");
  expect(!with(5, &lowest, PluginFieldType::kINT64, 1), "nor one that is too low");
  const double nan = 0. / 0.;
  expect(!with(5, &nan, PluginFieldType::kFLOAT64, 1), "top_k NaN");
  expect(!with(5, nullptr, PluginFieldType::kINT32, 1), "no data");
  expect(!with(5, &good.top_k, PluginFieldType::kINT32, 0), "no value");
  expect(!with(5, wholes.data(), PluginFieldType::kINT64, 2), "two values of top_k");
  expect(!with(2, doubles.data(), PluginFieldType::kFLOAT64, 3), "three variances");
  const std::vector<int32_t> many(64, 8);
  expect(!with(1, many.data(), PluginFieldType::kINT32, 17), "more priors than there may be");
  expect(!create(creator, {}, TensorRTPhase::kBUILD) && !creator->createPlugin("node", nullptr, TensorRTPhase::kBUILD),
         "no attributes");
  for (const auto& [name, value] : std::map<std::string, std::string>{
           {"variances", std::string(reinterpret_cast<const char*>(good.variances.data()), 8)},
           {"iou_threshold", std::string(reinterpret_cast<const char*>(&good.iou), 4)},
           {"top_k", std::string(reinterpret_cast<const char*>(&good.top_k), 4)},
           {"max_detections", std::string(reinterpret_cast<const char*>(&good.keep), 4)},
           {"channels_last", std::string(4, '\0')}}) {
    expect(first.at(name) == value, name.c_str());
  }
  const auto* offered = creator->getFieldNames();
  const std::vector<std::string> names{"strides",       "min_sizes", "variances",      "logit_threshold",
                                       "iou_threshold", "top_k",     "max_detections", "channels_last"};
  for (int32_t i = 0; i < 8; ++i) {
    const bool whole = i == 0 || i > 4;
    expect(offered->fields[i].name == names[size_t(i)], "names of the attributes");
    expect(offered->fields[i].type == (whole ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32), "their types");
  }
  std::unique_ptr<IPluginV3> one_level;
  {
    Fields one;
    one.strides = {16};
    one.min_sizes = {24};
    one_level.reset(create(creator, one.list(), TensorRTPhase::kBUILD));
    expect(one_level != nullptr, "one level of one prior");
  }

  // what it says it is
  auto* core = capability<IPluginV3OneCore>(plugin.get(), PluginCapabilityType::kCORE);
  expect(!std::strcmp(core->getPluginName(), creator->getPluginName()) &&
             !std::strcmp(core->getPluginVersion(), creator->getPluginVersion()) &&
             !std::strcmp(core->getPluginNamespace(), creator->getPluginNamespace()),
         "names of the plugin");
  std::map<std::string, int> timings;
  const auto timing = [&](int32_t top_k, int32_t keep, int32_t last = 0) {
    Fields fields;
    fields.last = last;
    fields.top_k = top_k;
    fields.keep = keep;
    std::unique_ptr<IPluginV3> made{create(creator, fields.list(), TensorRTPhase::kBUILD)};
    ++timings[capability<IPluginV3OneBuild>(made.get(), PluginCapabilityType::kBUILD)->getTimingCacheID()];
  };
  timing(77, 33), timing(77, 33), timing(78, 33), timing(77, 34), timing(77, 33, 1);
  expect(timings.size() == 4, "timings are shared where the work is the same, and nowhere else");
  expect(timings.count(build->getTimingCacheID()) == 1, "of equal plugins");

  // all types, shapes and formats
  expect(types[2] == DataType::kFLOAT && types[3] == DataType::kFLOAT, "types of scores and landmarks");
  expect(build->getOutputDataTypes(types, 4, inputs, 3) != 0 && build->getOutputDataTypes(types, 5, inputs, 2) != 0,
         "other numbers of tensors have no types");
  Builder builder;
  const Size batch(-1, false), sides(9, false);
  DimsExprs maps[3], shapes[5];
  for (DimsExprs& map : maps) {
    map.nbDims = 4;
    for (int32_t i = 0; i < 4; ++i) map.d[i] = i ? &sides : &batch;
  }
  expect(build->getOutputShapes(maps, 3, nullptr, 0, shapes, 5, builder) == 0, "shapes of the outputs");
  const std::vector<std::vector<int64_t>> rest{{}, {33, 4}, {33}, {33, 5, 2}, {}};
  for (size_t i = 0; i < 5; ++i) {
    expect(shapes[i].nbDims == int32_t(rest[i].size()) + 1 && shapes[i].d[0] == &batch, "the batch of an output");
    for (size_t j = 0; j < rest[i].size(); ++j) {
      expect(shapes[i].d[j + 1]->isConstant() && shapes[i].d[j + 1]->getConstantValue() == rest[i][j],
             "the sizes of an output");
    }
  }
  expect(build->getOutputShapes(maps, 2, nullptr, 0, shapes, 5, builder) != 0, "two maps have no shapes");
  expect(build->getOutputShapes(maps, 3, nullptr, 0, shapes, 4, builder) != 0, "four outputs have none");
  maps[0].nbDims = 3;
  expect(build->getOutputShapes(maps, 3, nullptr, 0, shapes, 5, builder) != 0, "maps have four dimensions");
  expect(supported(tensors(DataType::kHALF, TensorFormat::kHWC16, 1, 64, 96)), "fp16 channels-last in 16");
  expect(!supported(tensors(DataType::kHALF, TensorFormat::kHWC, 1, 64, 96)), "fp16 has no kHWC");
  expect(!supported(tensors(DataType::kFLOAT, TensorFormat::kHWC8, 1, 64, 96)), "fp32 has no kHWC8");
  expect(!supported(tensors(DataType::kBF16, TensorFormat::kLINEAR, 1, 64, 96)), "not bf16");
  for (size_t i = 0; i < 8; ++i) {
    auto other = tensors(DataType::kFLOAT, TensorFormat::kLINEAR, 1, 64, 96);
    other[i].desc.type = other[i].desc.type == DataType::kINT32 ? DataType::kFLOAT : DataType::kINT32;
    expect(!supported(other), "one tensor of another type");
    other = tensors(DataType::kFLOAT, TensorFormat::kLINEAR, 1, 64, 96);
    other[i].desc.format = TensorFormat::kHWC;
    expect(!supported(other), "one tensor of another format");
  }

  // impossible profiles
  const auto configured = [&](const std::vector<DynamicPluginTensorDesc>& all, int32_t in = 3, int32_t out = 5) {
    return build->configurePlugin(all.data(), in, all.data() + 3, out) == 0;
  };
  expect(!configured(small, 2) && !configured(small, 3, 4), "other numbers of tensors are refused");
  wrong = small;
  for (auto& each : wrong) each.max.d[0] = -1;
  expect(configured(wrong), "a profile that is not known yet");
  wrong = small;
  wrong[0].max.d[0] = 65536;
  expect(!configured(wrong), "the greatest batch counts, not the usual one");
  wrong = small;
  wrong[0].max.d[2] = 65537;
  expect(!configured(wrong), "the greatest height");
  wrong = small;
  wrong[2].max.d[3] = 65537;
  expect(!configured(wrong), "the greatest width of the last level");
  wrong = small;
  wrong[2].desc.dims.nbDims = 3;
  expect(!configured(wrong), "three dimensions");
  const auto needed = reinterpret_cast<size_t (*)(const void*)>(dlsym(library, "retinaface_workspace_bytes"));
  struct {  // DecodeParams of decode_nms.h, for the greatest shapes
    int32_t batch = 8, levels = 3, per_cell = 2, last = 0, strides[4] = {8, 16, 32}, rows[4] = {136, 68, 34},
            columns[4] = {240, 120, 60};
    float sizes[16] = {16, 32, 0, 0, 64, 128, 0, 0, 256.5f, 512}, variances[2] = {0.1f, 0.2f}, logit = -1.25f,
          iou = 0.45f;
    int32_t top_k = 77, keep = 33;
  } params;
  expect(needed && needed(&params) == more, "workspace of the launcher");
  auto grown = tensors(DataType::kFLOAT, TensorFormat::kLINEAR, 1, 64, 96);
  for (size_t i = 0; i < 3; ++i) grown[i].max = large[i].max;
  expect(build->getWorkspaceSize(grown.data(), 3, grown.data() + 3, 5) == more, "workspace of the greatest shapes");

  // maps that are [B,H,W,C]: linear, of the same workspace
  const auto last = [](std::vector<DynamicPluginTensorDesc> all) {
    for (size_t i = 0; i < 3; ++i) {
      for (Dims* dims : {&all[i].desc.dims, &all[i].min, &all[i].opt, &all[i].max}) {
        std::rotate(dims->d + 1, dims->d + 2, dims->d + 4);
      }
    }
    return all;
  };
  {
    Fields fields;
    fields.last = 1;
    const std::unique_ptr<IPluginV3> made{create(creator, fields.list(), TensorRTPhase::kBUILD)};
    expect(made && serialized(made.get()).at("channels_last") == std::string("\1\0\0\0", 4), "channels_last");
    auto* const other = capability<IPluginV3OneBuild>(made.get(), PluginCapabilityType::kBUILD);
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kINT8}) {
      for (const TensorFormat format :
           {TensorFormat::kLINEAR, TensorFormat::kHWC, TensorFormat::kHWC8, TensorFormat::kHWC16}) {
        const auto all = last(tensors(type, format, 1, 64, 96));
        const bool takes = format == TensorFormat::kLINEAR && type != DataType::kINT8;
        expect(other->supportsFormatCombination(0, all.data(), 3, 5) == takes, "formats of [B,H,W,C]");
      }
    }
    const auto given = last(large);
    expect(other->configurePlugin(given.data(), 3, given.data() + 3, 5) == 0, "[B,H,W,C] is taken");
    expect(other->configurePlugin(large.data(), 3, large.data() + 3, 5) != 0, "[B,C,H,W] is not");
    expect(build->configurePlugin(given.data(), 3, given.data() + 3, 5) != 0, "nor the other way round");
    expect(other->getWorkspaceSize(given.data(), 3, given.data() + 3, 5) == more, "workspace of [B,H,W,C]");
    auto* const running = capability<IPluginV3OneRuntime>(made.get(), PluginCapabilityType::kRUNTIME);
    PluginTensorDesc now[3] = {given[0].desc, given[1].desc, given[2].desc};
    now[2].dims.d[3] = 0;  // of channels, which are known
    expect(running->onShapeChange(now, 3, nullptr, 5) == 0, "a shape of [B,H,W,C]");
    now[2].dims.d[2] = 0;
    expect(running->onShapeChange(now, 3, nullptr, 5) != 0, "without columns");
  }

  // shapes at run time
  shaped[2].dims.d[0] = 2;
  expect(runtime->onShapeChange(shaped, 3, nullptr, 5) == 0, "and is accepted again");
  expect(runtime->onShapeChange(shaped, 2, nullptr, 5) != 0, "two maps are refused");
  shaped[0].dims.d[0] = shaped[1].dims.d[0] = shaped[2].dims.d[0] = 0;
  expect(runtime->onShapeChange(shaped, 3, nullptr, 5) != 0, "an empty batch is refused");
  for (PluginTensorDesc& desc : shaped) desc.dims.d[0] = 2;
  alignas(16) static char memory[64];
  const auto enqueue = [&](int32_t output, int32_t input, size_t offset, char* workspace) {
    const void* heads[3];
    void* outputs[5];
    for (int32_t i = 0; i < 3; ++i) heads[i] = memory + (i == input ? offset : 0);
    for (int32_t i = 0; i < 5; ++i) outputs[i] = memory + (i == output ? offset : 0);
    return runtime->enqueue(shaped, nullptr, heads, outputs, workspace, nullptr);
  };
  for (int32_t i = 0; i < 5; ++i) expect(enqueue(i, -1, 2, memory) == 716, "an output that is not aligned");
  expect(enqueue(1, -1, 8, memory) == 716, "boxes lie on 16 bytes");
  for (int32_t i = 0; i < 3; ++i) expect(enqueue(-1, i, 8, memory) == 716, "a map that is not aligned");
  expect(enqueue(-1, -1, 0, nullptr) == 1 && enqueue(-1, -1, 0, memory + 8) == 716, "the workspace");

  // reports go to TensorRT's logger, where there is one
  Log log;
  const auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  set_finder(&log);
  refuse([](Fields& f) { f.top_k = 0; }, "top_k 0 again");
  expect(log.last == std::string(creator->getPluginName()) + ": top_k must be in 1..1000000", "the logger hears why");
  log.last.clear();
  log.there = false;
  refuse([](Fields& f) { f.top_k = 0; }, "and again");
  expect(log.last.empty(), "without a logger stderr does");
  log.there = true;
  for (const int32_t other : {NV_TENSORRT_MAJOR + 1, NV_TENSORRT_MAJOR - 1, 1}) {
    version = other * 10000 + 401;
    set_finder(&log);
    refuse([](Fields& f) { f.top_k = 0; }, "of another version");
    expect(log.last.empty(), "the logger of another major version is not called");
  }
  set_finder(nullptr);
  std::printf("passed\n");
  return 0;
}
