// Drives the TensorRT plugin on a GPU as TensorRT does, without a TensorRT: argv[1] is the library. Exit code 2: no
// GPU.
//
// The first enqueue on a type, format and shape is captured. What the graph and a plain enqueue give must be, bit for
// bit, what retinaface_launch gives for the same maps, planar. The maps are [B,C,H,W] in every format, and [B,H,W,C].
#include <NvInferRuntime.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "decode_nms.h"

using namespace nvinfer1;
using retinaface::DecodeParams;

namespace {

constexpr int32_t kLevels = 3, kPerCell = 2, kChannels = 16 * kPerCell, kTopK = 77, kKeep = 33, kOutputs = 5;
constexpr const char* kNames[kOutputs] = {"num_detections", "boxes", "scores", "landmarks", "num_candidates"};
constexpr int32_t kValues[kOutputs] = {1, 4 * kKeep, kKeep, 10 * kKeep, 1};  // of an image

struct Format {
  const char* name;
  DataType type;
  TensorFormat format;
  bool last = false;  // [B,H,W,C]

  bool channels_last() const { return last || format != TensorFormat::kLINEAR; }
};
constexpr Format kFormats[] = {{"fp32 kLINEAR", DataType::kFLOAT, TensorFormat::kLINEAR},
                               {"fp32 kHWC", DataType::kFLOAT, TensorFormat::kHWC},
                               {"fp16 kLINEAR", DataType::kHALF, TensorFormat::kLINEAR},
                               {"fp16 kHWC8", DataType::kHALF, TensorFormat::kHWC8},
                               {"fp16 kHWC16", DataType::kHALF, TensorFormat::kHWC16},
                               {"fp32 [B,H,W,C]", DataType::kFLOAT, TensorFormat::kLINEAR, true},
                               {"fp16 [B,H,W,C]", DataType::kHALF, TensorFormat::kLINEAR, true}};

struct Shape {
  int32_t batch, height, width, broken;  // broken: the image with a NaN, or -1
};
constexpr Shape kSmallest{1, 64, 96, -1}, kLargest{5, 320, 320, -1};
constexpr Shape kShapes[] = {kSmallest, kLargest, {5, 64, 96, 3}, {1, 320, 320, -1}};

using Results = std::vector<std::vector<int32_t>>;  // the bits of each output

using Creators = IPluginCreatorInterface* const* (*)(int32_t&);
using WorkspaceBytes = size_t (*)(const DecodeParams*);
using Launch = int32_t (*)(const DecodeParams*, int32_t, const void* const*, const retinaface::Outputs*, void*, void*);

std::string where = "start";

void expect(bool good, const std::string& what) {
  if (!good) {
    std::printf("FAILED: %s: %s\n", where.c_str(), what.c_str());
    std::exit(1);
  }
}

void check(cudaError_t error, int line = __builtin_LINE()) {
  expect(error == cudaSuccess, "line " + std::to_string(line) + ": " + cudaGetErrorString(error));
}

// Device memory; it is freed when the program ends.
void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  return memory;
}

IPluginV3OneRuntime* runtime_of(IPluginV3* plugin) {
  return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// The inputs, then the outputs.
std::vector<PluginTensorDesc> tensors(const Format& f, const Shape& s) {
  const int64_t batch = s.batch;
  std::vector<PluginTensorDesc> all;
  for (const int64_t stride : {8, 16, 32}) {
    const int64_t rows = s.height / stride, columns = s.width / stride;
    const Dims dims = f.last ? Dims{4, {batch, rows, columns, kChannels}} : Dims{4, {batch, kChannels, rows, columns}};
    all.push_back({dims, f.type, f.format, 1.f});
  }
  all.push_back({{1, {batch}}, DataType::kINT32, TensorFormat::kLINEAR, 1.f});
  all.push_back({{3, {batch, kKeep, 4}}, DataType::kFLOAT, TensorFormat::kLINEAR, 1.f});
  all.push_back({{2, {batch, kKeep}}, DataType::kFLOAT, TensorFormat::kLINEAR, 1.f});
  all.push_back({{4, {batch, kKeep, 5, 2}}, DataType::kFLOAT, TensorFormat::kLINEAR, 1.f});
  all.push_back({{1, {batch}}, DataType::kINT32, TensorFormat::kLINEAR, 1.f});
  return all;
}

DecodeParams make_params(const Shape& s) {
  return {s.batch,
          kLevels,
          kPerCell,
          0,
          {8, 16, 32},
          {s.height / 8, s.height / 16, s.height / 32},
          {s.width / 8, s.width / 16, s.width / 32},
          {{16, 32}, {64, 128}, {256.5f, 512}},
          {0.1f, 0.2f},
          -1.25f,
          0.45f,
          kTopK,
          kKeep};
}

std::unique_ptr<IPluginV3> create(IPluginCreatorV3One* creator, bool last) {
  const int64_t strides[] = {8, 16, 32};
  const float min_sizes[] = {16, 32, 64, 128, 256.5f, 512}, variances[] = {0.1f, 0.2f}, logit = -1.25f, iou = 0.45f;
  const int32_t channels_last = last;
  const PluginField fields[] = {{"strides", strides, PluginFieldType::kINT64, kLevels},
                                {"min_sizes", min_sizes, PluginFieldType::kFLOAT32, kLevels * kPerCell},
                                {"variances", variances, PluginFieldType::kFLOAT32, 2},
                                {"logit_threshold", &logit, PluginFieldType::kFLOAT32, 1},
                                {"iou_threshold", &iou, PluginFieldType::kFLOAT32, 1},
                                {"top_k", &kTopK, PluginFieldType::kINT32, 1},
                                {"max_detections", &kKeep, PluginFieldType::kINT32, 1},
                                {"channels_last", &channels_last, PluginFieldType::kINT32, 1}};
  const PluginFieldCollection node{8, fields};
  return std::unique_ptr<IPluginV3>{creator->createPlugin("node", &node, TensorRTPhase::kBUILD)};
}

// A planar map: in every fourth block of 3 x 3 cells, boxes around its middle, most of them over the threshold.
std::vector<float> head_map(const DecodeParams& p, int32_t level, int32_t broken) {
  std::mt19937 random(1000 * p.batch + 10 * p.grid_h[level] + level);
  const auto noise = [&] { return float(random() >> 8) * 0x1p-23f - 1.f; };  // -1 .. 1
  const int32_t columns = p.grid_w[level], cells = p.grid_h[level] * columns;
  std::vector<float> map(size_t(p.batch * kChannels * cells));
  for (float& value : map) value = noise();
  for (int32_t i = 0; i < p.batch * cells * kPerCell; ++i) {
    const int32_t member = i % kPerCell, cell = i / kPerCell % cells, image = i / kPerCell / cells;
    const int32_t row = cell / columns, column = cell % columns, box = 2 * kPerCell + 4 * member;
    const auto at = [&](int32_t channel) -> float& { return map[(image * kChannels + channel) * cells + cell]; };
    const bool face = (row / 3 * ((columns + 2) / 3) + column / 3 + image) % 4 == 0;
    const float step = float(p.strides[level]) / (p.variances[0] * p.min_sizes[level][member]);
    at(2 * member + 1) = at(2 * member) + (face ? 1.f + 4.f * noise() : -8.f + 2.f * noise());
    if (face) at(box) += float(1 - column % 3) * step;
    if (face) at(box + 1) += float(1 - row % 3) * step;
  }
  if (level == kLevels - 1 && broken >= 0) map[(broken + 1) * kChannels * cells - 1] = std::nanf("");
  return map;
}

// Copies a planar map to the device, in the type and order asked for.
const void* upload(const std::vector<float>& map, size_t cells, DataType type, bool channels_last) {
  std::vector<float> ordered(map);
  for (size_t i = 0; channels_last && i < map.size(); ++i) {
    const size_t row = i / kChannels, channel = i % kChannels;
    ordered[i] = map[(row / cells * kChannels + channel) * cells + row % cells];
  }
  const std::vector<__half> halves(ordered.begin(), ordered.end());
  const bool half = type == DataType::kHALF;
  const size_t bytes = map.size() * (half ? 2 : 4);
  void* const memory = allocate(bytes);
  const void* const from = half ? static_cast<const void*>(halves.data()) : ordered.data();
  check(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
  return memory;
}

// The comparison would be worth little if nothing were found.
void expect_faces(const Results& results, const Shape& shape) {
  for (int32_t image = 0; image < shape.batch; ++image) {
    const int32_t found = results[0][image], candidates = results[4][image];
    bool good = found > 0 && found < kKeep && candidates > 2 * found;
    if (shape.height == 320) good = found == kKeep && candidates > kTopK;
    if (image == shape.broken) good = found == 0 && candidates == -1;
    expect(good, "image " + std::to_string(image) + ": " + std::to_string(candidates) + ", " + std::to_string(found));
  }
}

void test_shape(Launch launch, IPluginV3OneRuntime* runtime, const Format& format, const Shape& shape, void* workspace,
                size_t workspace_bytes, cudaStream_t stream) {
  const DecodeParams params = make_params(shape);
  const auto described = tensors(format, shape);
  const PluginTensorDesc *const in = described.data(), *const out = in + kLevels;
  std::vector<const void*> maps, planar;
  for (int32_t level = 0; level < kLevels; ++level) {
    const auto map = head_map(params, level, shape.broken);
    const size_t cells = size_t(params.grid_h[level] * params.grid_w[level]);
    maps.push_back(upload(map, cells, format.type, format.channels_last()));
    planar.push_back(upload(map, cells, format.type, false));
  }
  Results blank;
  std::vector<void*> outputs;
  for (int32_t i = 0; i < kOutputs; ++i) {
    const size_t values = size_t(shape.batch * kValues[i]);
    blank.emplace_back(values);
    outputs.push_back(allocate(4 * values));
  }
  check(cudaDeviceSynchronize());

  // the outputs after some work on the stream; before it they and the workspace are filled with a byte
  const auto results = [&](int byte, auto&& work) {
    for (int32_t i = 0; i < kOutputs; ++i) check(cudaMemsetAsync(outputs[i], byte, 4 * blank[i].size(), stream));
    check(cudaMemsetAsync(workspace, byte, workspace_bytes, stream));
    work();
    check(cudaStreamSynchronize(stream));
    Results read = blank;
    for (int32_t i = 0; i < kOutputs; ++i) {
      check(cudaMemcpy(read[i].data(), outputs[i], 4 * read[i].size(), cudaMemcpyDeviceToHost));
    }
    return read;
  };
  const auto enqueue = [&] {
    const int32_t code = runtime->enqueue(in, out, maps.data(), outputs.data(), workspace, stream);
    expect(code == 0, "enqueue returned " + std::to_string(code));
  };

  cudaGraph_t graph;
  cudaGraphExec_t executable;
  expect(runtime->onShapeChange(in, kLevels, out, kOutputs) == 0, "onShapeChange");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue();
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiateWithFlags(&executable, graph, 0));
  const auto replay = [&] { check(cudaGraphLaunch(executable, stream)); };
  const Results got[] = {results(0x5a, replay), results(0xff, replay), results(0x5a, enqueue)};
  const Results want = results(0x33, [&] {
    const retinaface::Outputs places{static_cast<int32_t*>(outputs[0]), static_cast<float*>(outputs[1]),
                                     static_cast<float*>(outputs[2]), static_cast<float*>(outputs[3]),
                                     static_cast<int32_t*>(outputs[4])};
    const bool half = format.type == DataType::kHALF;
    check(static_cast<cudaError_t>(launch(&params, half, planar.data(), &places, workspace, stream)));
  });
  expect_faces(want, shape);
  for (int32_t run = 0; run < 3; ++run) {
    for (int32_t i = 0; i < kOutputs; ++i) {
      expect(got[run][i] == want[i], std::string(kNames[i]) + (run < 2 ? " of the graph" : " of enqueue"));
    }
  }
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_MODULE_LOADING", "LAZY", 1);  // what onShapeChange does not load would be loaded within the capture
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    std::printf("no GPU: %s\n", cudaGetErrorString(error));
    return 2;
  }
  check(error);
  void* const handle = argc == 2 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
  expect(handle != nullptr, "the library loads");
  const auto creators = reinterpret_cast<Creators>(dlsym(handle, "getCreators"));
  const auto workspace_bytes = reinterpret_cast<WorkspaceBytes>(dlsym(handle, "retinaface_workspace_bytes"));
  const auto launch = reinterpret_cast<Launch>(dlsym(handle, "retinaface_launch"));
  expect(creators && workspace_bytes && launch, "the library has its functions");

  int32_t count = 0;
  auto* const creator = static_cast<IPluginCreatorV3One*>(creators(count)[0]);
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const Format& format : kFormats) {
    where = format.name;
    const auto built = create(creator, format.last);
    expect(built != nullptr, "created from an ONNX node");
    auto* const build = static_cast<IPluginV3OneBuild*>(built->getCapabilityInterface(PluginCapabilityType::kBUILD));
    const PluginFieldCollection* const stored = runtime_of(built.get())->getFieldsToSerialize();
    const std::unique_ptr<IPluginV3> loaded{creator->createPlugin("node", stored, TensorRTPhase::kRUNTIME)};
    expect(loaded != nullptr, "created from an engine");
    const auto least = tensors(format, kSmallest), most = tensors(format, kLargest);
    std::vector<DynamicPluginTensorDesc> range;
    for (int32_t i = 0; i < kLevels + kOutputs; ++i)
      range.push_back({least[i], least[i].dims, most[i].dims, least[i].dims});
    for (int32_t i = 0; i < kLevels + kOutputs; ++i) {
      expect(build->supportsFormatCombination(i, range.data(), kLevels, kOutputs), "supportsFormatCombination");
    }
    expect(build->configurePlugin(range.data(), kLevels, range.data() + kLevels, kOutputs) == 0, "configurePlugin");
    const size_t bytes = build->getWorkspaceSize(range.data(), kLevels, range.data() + kLevels, kOutputs);
    void* const workspace = allocate(bytes);
    const std::unique_ptr<IPluginV3> attached{runtime_of(loaded.get())->attachToContext(nullptr)};
    expect(attached != nullptr, "attachToContext");
    for (const Shape& shape : kShapes) {
      where = std::string(format.name) + ", batch " + std::to_string(shape.batch) + ", height " +
              std::to_string(shape.height);
      const DecodeParams params = make_params(shape);
      expect(workspace_bytes(&params) <= bytes, "getWorkspaceSize is too small");
      test_shape(launch, runtime_of(attached.get()), format, shape, workspace, bytes, stream);
    }
  }
  check(cudaStreamDestroy(stream));
  std::printf("passed\n");
  return 0;
}
