// RetinaFaceDecodeNMS, version 2: the kernels as a TensorRT plugin (IPluginV3), for TensorRT 10 and 11 and
// TensorRT-RTX.
//
// inputs   one map for each pyramid level, see include/decode_nms.h; fp32 or fp16. The attribute channels_last tells
//          their shape: 0 for [B,C,H,W], in whichever format TensorRT prefers; 1 for [B,H,W,C], which is linear
// outputs  num_detections int32 [B], boxes [B,K,4], scores [B,K], landmarks [B,K,5,2] fp32, num_candidates int32 [B]
//
// Nothing of libnvinfer is linked: its headers are enough, and IPluginRegistry::loadLibrary calls getCreators below.
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <link.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "decode_nms.h"

namespace retinaface {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr const char* kName = "RetinaFaceDecodeNMS";
constexpr const char* kVersion = "2";
constexpr const char* kNamespace = "retinaface_trt";
constexpr int32_t kOutputs = 5;

nvinfer1::ILoggerFinder* logger_finder = nullptr;

void report(const char* message) {
  char line[256];
  std::snprintf(line, sizeof line, "%s: %s", kName, message);
  if (logger_finder) {
    if (nvinfer1::ILogger* const logger = logger_finder->findLogger()) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, line);
      return;
    }
  }
  std::fprintf(stderr, "%s\n", line);
}

// Major version of the TensorRT whose library has an object's class; 0 if it cannot be told.
int32_t major_version(const void* object) {
  Dl_info info;
  void* library = nullptr;
  if (!object || !dladdr1(*static_cast<void* const*>(object), &info, &library, RTLD_DL_LINKMAP)) return 0;
  void* const symbol = dlsym(library, "getInferLibVersion");
  return symbol ? reinterpret_cast<int32_t (*)()>(symbol)() / 10000 : 0;
}

// The attributes of a node, as ONNX has them and as an engine stores them.
struct Attributes {
  std::vector<int32_t> strides;        // of each level, pixels
  std::vector<float> min_sizes;        // of each level, one for each prior of a cell, pixels
  std::vector<float> variances;        // of centres and landmarks, of sizes
  std::vector<float> logit_threshold;  // log(p / (1 - p)) of DecodeSpec.score_threshold
  std::vector<float> iou_threshold;
  std::vector<int32_t> top_k;
  std::vector<int32_t> max_detections;
  std::vector<int32_t> channels_last;  // 1: the maps are [B,H,W,C], 0: [B,C,H,W]

  // visit(name, values) for each attribute; they are scalars where they hold one value
  template <typename Self, typename Visit>
  static void each(Self& self, Visit&& visit) {
    visit("strides", self.strides);
    visit("min_sizes", self.min_sizes);
    visit("variances", self.variances);
    visit("logit_threshold", self.logit_threshold);
    visit("iou_threshold", self.iou_threshold);
    visit("top_k", self.top_k);
    visit("max_detections", self.max_detections);
    visit("channels_last", self.channels_last);
  }
};

PluginFieldType field_type(const std::vector<float>&) { return PluginFieldType::kFLOAT32; }
PluginFieldType field_type(const std::vector<int32_t>&) { return PluginFieldType::kINT32; }

// Copy the values of a field whatever numeric type a parser gave them.
template <typename Value>
bool read_field(const PluginField& field, std::vector<Value>& values) {
  if (field.length < 1 || field.length > kMaxLevels * kMaxPerCell || !field.data) return false;
  values.clear();
  const auto copy = [&](const auto* data) {
    for (int32_t i = 0; i < field.length; ++i) {
      // what does not fit, NaN included, becomes 0, which check() refuses
      const bool fits = std::is_floating_point_v<Value> || (data[i] >= -2147483647 && data[i] <= 2147483647);
      values.push_back(fits ? static_cast<Value>(data[i]) : Value{});
    }
    return true;
  };
  switch (field.type) {
    case PluginFieldType::kINT32:
      return copy(static_cast<const int32_t*>(field.data));
    case PluginFieldType::kINT64:
      return copy(static_cast<const int64_t*>(field.data));
    case PluginFieldType::kFLOAT32:
      return copy(static_cast<const float*>(field.data));
    case PluginFieldType::kFLOAT64:
      return copy(static_cast<const double*>(field.data));
    default:
      return false;
  }
}

// The parameters that do not depend on the shapes; false, and a report, if the attributes are incomplete or impossible.
bool make_params(const Attributes& a, DecodeParams& p) {
  p = {};
  p.batch = 1;
  const size_t levels = a.strides.size();
  if (levels < 1 || levels > size_t(kMaxLevels) || a.min_sizes.empty() || a.min_sizes.size() % levels ||
      a.min_sizes.size() / levels > size_t(kMaxPerCell) || a.variances.size() != 2 || a.logit_threshold.size() != 1 ||
      a.iou_threshold.size() != 1 || a.top_k.size() != 1 || a.max_detections.size() != 1 ||
      a.channels_last.size() != 1) {
    report("an attribute is missing or has the wrong number of values");
    return false;
  }
  p.levels = int32_t(levels);
  p.per_cell = int32_t(a.min_sizes.size() / levels);
  for (int32_t level = 0; level < p.levels; ++level) {
    p.strides[level] = a.strides[level];
    p.grid_h[level] = p.grid_w[level] = 1;
    for (int32_t i = 0; i < p.per_cell; ++i) p.min_sizes[level][i] = a.min_sizes[level * p.per_cell + i];
  }
  p.variances[0] = a.variances[0];
  p.variances[1] = a.variances[1];
  p.logit_threshold = a.logit_threshold[0];
  p.iou_threshold = a.iou_threshold[0];
  p.top_k = a.top_k[0];
  p.max_detections = a.max_detections[0];
  p.channels_last = a.channels_last[0];
  if (p.channels_last != 0 && p.channels_last != 1) {
    report("channels_last must be 0 or 1");
    return false;
  }
  if (const char* const problem = check(p)) {
    report(problem);
    return false;
  }
  return true;
}

class DecodeNMS final : public nvinfer1::IPluginV3,
                        public nvinfer1::IPluginV3OneCore,
                        public nvinfer1::IPluginV3OneBuild,
                        public nvinfer1::IPluginV3OneRuntime {
 public:
  DecodeNMS(Attributes attributes, const DecodeParams& params)
      : attributes_(std::move(attributes)),
        params_(params),
        timing_id_("top_k " + std::to_string(params.top_k) + " keep " + std::to_string(params.max_detections) +
                   (params.channels_last ? " channels last" : "")) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) DecodeNMS(attributes_, params_); }

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return kOutputs; }

  int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType*,
                             int32_t inputs) const noexcept override {
    if (outputs != kOutputs || inputs != params_.levels) return -1;
    for (int32_t i = 0; i < kOutputs; ++i) types[i] = output_type(i);
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t output_count, nvinfer1::IExprBuilder& build) noexcept override {
    if (output_count != kOutputs || input_count != params_.levels || inputs[0].nbDims != 4) {
      report("it takes one 4-dimensional map for each level and has five outputs");
      return -1;
    }
    const auto shape = [&](int32_t output, std::initializer_list<int32_t> rest) {
      outputs[output].nbDims = 1;
      outputs[output].d[0] = inputs[0].d[0];
      for (const int32_t size : rest) outputs[output].d[outputs[output].nbDims++] = build.constant(size);
    };
    const int32_t k = params_.max_detections;
    shape(0, {});
    shape(1, {k, 4});
    shape(2, {k});
    shape(3, {k, 5, 2});
    shape(4, {});
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t) noexcept override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (position >= inputs) {
      return tensor.type == output_type(position - inputs) && tensor.format == TensorFormat::kLINEAR;
    }
    const PluginTensorDesc& first = tensors[0].desc;
    if (position > 0) return tensor.type == first.type && tensor.format == first.format;
    const bool linear = tensor.format == TensorFormat::kLINEAR;
    if (params_.channels_last) return linear && (tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF);
    // 16 * per_cell channels fill every one of these channels-last formats without padding
    if (tensor.type == DataType::kFLOAT) {
      return linear || tensor.format == TensorFormat::kHWC;
    }
    return tensor.type == DataType::kHALF &&
           (linear || tensor.format == TensorFormat::kHWC8 || tensor.format == TensorFormat::kHWC16);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t outputs) noexcept override {
    if (inputs != params_.levels || outputs != kOutputs) return -1;
    const DecodeParams largest = at_maximum(in);
    const char* const problem = largest.batch > 0 ? check(largest) : nullptr;  // a profile may not be known yet
    if (problem) {
      report(problem);
      return -1;
    }
    for (int32_t level = 0; level < inputs; ++level) {
      if (in[level].desc.dims.nbDims != 4 ||
          in[level].desc.dims.d[params_.channels_last ? 3 : 1] != 16 * params_.per_cell) {
        report("a map does not have 16 channels for each prior of a cell");
        return -1;
      }
    }
    return 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    const DecodeParams p = at_maximum(in);
    return check(p) ? 0 : workspace_bytes(p);  // configurePlugin has refused what does not pass
  }

  // The timing of two plugins may be shared where these are equal.
  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*,
                        int32_t) noexcept override {
    if (inputs != params_.levels) return -1;
    const DecodeParams p = shaped(in);
    for (int32_t level = 1; level < inputs; ++level) {
      if (in[level].dims.d[0] != p.batch) {
        report("the maps have different batch sizes");
        return -1;
      }
    }
    if (const char* const problem = check(p)) {
      report(problem);
      return -1;
    }
    load(head_type(in));  // so that enqueue may be captured the first time; where there is no GPU, nothing is enqueued
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    const Outputs out{static_cast<int32_t*>(outputs[0]), static_cast<float*>(outputs[1]),
                      static_cast<float*>(outputs[2]), static_cast<float*>(outputs[3]),
                      static_cast<int32_t*>(outputs[4])};
    return launch(shaped(in), head_type(in), inputs, out, workspace, stream);
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    fields_.clear();
    Attributes::each(attributes_, [&](const char* name, const auto& values) {
      fields_.emplace_back(name, values.data(), field_type(values), int32_t(values.size()));
    });
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  static DataType output_type(int32_t output) {
    return output == 0 || output == kOutputs - 1 ? DataType::kINT32 : DataType::kFLOAT;
  }

  // The parameters for maps of these sizes.
  template <typename DimsOf>
  DecodeParams sized(DimsOf&& dims_of) const {
    DecodeParams p = params_;
    p.batch = int32_t(dims_of(0).d[0]);
    const int32_t rows = p.channels_last ? 1 : 2;  // the dimension
    for (int32_t level = 0; level < p.levels; ++level) {
      p.grid_h[level] = int32_t(dims_of(level).d[rows]);
      p.grid_w[level] = int32_t(dims_of(level).d[rows + 1]);
    }
    return p;
  }

  // The parameters at the largest shapes of a profile.
  DecodeParams at_maximum(const DynamicPluginTensorDesc* in) const {
    return sized([in](int32_t level) { return in[level].max; });
  }

  static HeadType head_type(const PluginTensorDesc* in) {
    return in[0].type == DataType::kHALF ? HeadType::kHalf : HeadType::kFloat;
  }

  DecodeParams shaped(const PluginTensorDesc* in) const {
    DecodeParams p = sized([in](int32_t level) { return in[level].dims; });
    if (in[0].format != TensorFormat::kLINEAR) p.channels_last = 1;
    return p;
  }

  Attributes attributes_;
  DecodeParams params_;
  std::string timing_id_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    Attributes::each(names_, [&](const char* name, const auto& values) {
      fields_.emplace_back(name, nullptr, field_type(values), 0);
    });
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    Attributes attributes;
    bool good = true;
    for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      Attributes::each(attributes, [&](const char* name, auto& values) {
        if (field.name && !std::strcmp(field.name, name)) good &= read_field(field, values);
      });
    }
    DecodeParams params;
    if (!good) report("an attribute is not a number");
    if (!good || !make_params(attributes, params)) return nullptr;
    return new (std::nothrow) DecodeNMS(std::move(attributes), params);
  }

 private:
  Attributes names_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace retinaface

// Loggers of another major version have their functions at other places: then messages go to stderr.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  retinaface::logger_finder = retinaface::major_version(finder) == NV_TENSORRT_MAJOR ? finder : nullptr;
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static retinaface::Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

namespace {

struct LoadedLibraries {
  bool triton = false;
  std::string nvinfer;
};

int note_library(dl_phdr_info* info, size_t, void* found) {
  const char* const slash = std::strrchr(info->dlpi_name, '/');
  const std::string name = slash ? slash + 1 : info->dlpi_name;
  auto& libraries = *static_cast<LoadedLibraries*>(found);
  if (name == "libtriton_tensorrt.so") libraries.triton = true;
  if (name.rfind("libnvinfer.so.", 0) == 0) libraries.nvinfer = info->dlpi_name;
  return 0;
}

// Triton's TensorRT backend opens the libraries of its option `plugins` and calls nothing in them. So there, and
// nowhere else, the creator registers itself, with the libnvinfer that the backend has loaded. The layout of the
// registry is that of the headers: another major version may have another.
__attribute__((constructor)) void register_with_triton() {
  LoadedLibraries libraries;
  dl_iterate_phdr(note_library, &libraries);
  if (!libraries.triton || libraries.nvinfer.empty()) return;
  const size_t version = libraries.nvinfer.rfind(".so.") + 4;
  if (std::atoi(libraries.nvinfer.c_str() + version) != NV_TENSORRT_MAJOR) {
    return retinaface::report("compiled with the headers of another TensorRT than Triton's: python -m plugins.build");
  }
  void* const nvinfer = dlopen(libraries.nvinfer.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  void* const symbol = nvinfer ? dlsym(nvinfer, "getPluginRegistry") : nullptr;
  auto* const registry = symbol ? reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(symbol)() : nullptr;
  int32_t count = 0;
  if (!registry || !registry->registerCreator(*getCreators(count)[0], retinaface::kNamespace)) {
    retinaface::report("Triton's TensorRT did not take it");
  }
}

}  // namespace
