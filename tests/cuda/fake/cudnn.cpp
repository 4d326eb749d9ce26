// libcudnn 9: handles, the older convolution calls, and the graph API, whose heuristics have one engine without workspace for all.
#include "core.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

static const int BAD_PARAM = 2000;

FC_API size_t cudnnGetVersion() { const char* v = getenv("FAKECUDA_CUDNN"); return v && *v ? strtoul(v, nullptr, 10) : 92000; }
FC_API size_t cudnnGetCudartVersion() { return fc::cuda_version; }
FC_API const char* cudnnGetErrorString(int code) { return code ? "CUDNN_STATUS_INTERNAL_ERROR" : "CUDNN_STATUS_SUCCESS"; }
FC_API void cudnnGetLastErrorString(char* text, size_t n) { if (n) text[0] = 0; }
FC_API int cudnnGetProperty(int which, int* value) { int v = cudnnGetVersion(); *value = which == 0 ? v / 10000 : which == 1 ? v / 100 % 100 : v % 100; return 0; }
FC_API int cudnnCreate(void** h) { FC_ENTER("cudnnCreate"); *h = fc::make_handle("cudnn"); return 0; }
FC_API int cudnnSetStream(void* h, void* stream) {
  FC_ENTER("cudnnSetStream");
  fc::Handle* handle = fc::as_handle(h);
  if (!handle) { fc::violation("cudnnSetStream: %p is no handle", h); return BAD_PARAM; }
  handle->stream = stream;
  return 0;
}
FC_API int cudnnGetStream(void* h, void** stream) { fc::Handle* handle = fc::as_handle(h); *stream = handle ? handle->stream : nullptr; return 0; }

// cudnnConvolutionFwdAlgoPerf_t
struct Perf { int algo, status; float time; size_t memory; int determinism, math, reserved[3]; };
static void one(int* returned, Perf* perf) { *returned = 1; memset(perf, 0, sizeof *perf); perf->algo = 1, perf->time = 0.1f, perf->math = 1; }
FC_API int cudnnGetConvolutionForwardAlgorithm_v7(void*, void*, void*, void*, void*, int, int* n, Perf* p) { FC_ENTER("cudnnGetConvolutionForwardAlgorithm_v7"); one(n, p); return 0; }
FC_API int cudnnFindConvolutionForwardAlgorithmEx(void*, void*, const void*, void*, const void*, void*, void*, void*, int, int* n, Perf* p, void*, size_t) { FC_ENTER("cudnnFindConvolutionForwardAlgorithmEx"); one(n, p); return 0; }
FC_API int cudnnGetConvolutionForwardWorkspaceSize(void*, void*, void*, void*, void*, int, size_t* n) { FC_ENTER("cudnnGetConvolutionForwardWorkspaceSize"); *n = 0; return 0; }
FC_API int cudnnGetReductionIndicesSize(void*, void*, void*, void*, size_t* n) { FC_ENTER("cudnnGetReductionIndicesSize"); *n = 0; return 0; }
FC_API int cudnnGetReductionWorkspaceSize(void*, void*, void*, void*, size_t* n) { FC_ENTER("cudnnGetReductionWorkspaceSize"); *n = 0; return 0; }
FC_API int cudnnDropoutGetStatesSize(void*, size_t* n) { *n = 0; return 0; }
FC_API int cudnnGetTensorNdDescriptor(void*, int, int* type, int* n, int*, int*) { *type = 0, *n = 0; return 0; }

// The graph API. A descriptor keeps what was set, as bytes.
namespace {
struct Value { int type; int64_t count; std::vector<char> bytes; };
struct Descriptor { int kind; bool final = false; std::map<int, Value> values; };
std::mutex g_lock;
std::map<void*, Descriptor>& table() { static auto* made = new std::map<void*, Descriptor>; return *made; }

size_t size_of(int type) {
  switch (type) {
    case 0: case 3: case 5: case 6: case 15: case 26: return 8;  // handle, int64, double, pointer, descriptor, fraction
    case 2: case 24: return 1;  // boolean, char
    default: return 4;
  }
}
const int EXECUTION_PLAN = 5;  // CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR
enum { ENGINEHEUR_RESULTS = 202, ENGINECFG_ENGINE = 300, INTERMEDIATE = 301, KNOB_CHOICES = 302, ENGINECFG_WORKSPACE = 303, ENGINECFG_SHARED = 304, PLAN_CONFIG = 401,
       PLAN_WORKSPACE = 402, COMPUTED_UIDS = 403, PLAN_JSON = 405, PLAN_HANDLE = 400, GLOBAL_INDEX = 1301, KNOB_INFO = 1302, NUMERICAL = 1303, LAYOUT = 1304, BEHAVIOR = 1305 };
}  // namespace

FC_API int cudnnBackendCreateDescriptor(int kind, void** out) {
  FC_ENTER("cudnnBackendCreateDescriptor");
  std::lock_guard<std::mutex> guard(g_lock);
  *out = malloc(64);
  table()[*out].kind = kind;
  return 0;
}
FC_API int cudnnBackendDestroyDescriptor(void* d) {
  FC_ENTER("cudnnBackendDestroyDescriptor");
  std::lock_guard<std::mutex> guard(g_lock);
  if (!table().erase(d)) fc::violation("cudnnBackendDestroyDescriptor: %p is no descriptor", d);
  else free(d);
  return 0;
}
FC_API int cudnnBackendInitialize(void*) { return 0; }
FC_API int cudnnBackendSetAttribute(void* d, int name, int type, int64_t count, const void* data) {
  FC_ENTER("cudnnBackendSetAttribute");
  std::lock_guard<std::mutex> guard(g_lock);
  auto it = table().find(d);
  if (it == table().end() || it->second.final) { fc::violation("cudnnBackendSetAttribute %d: no such descriptor, or it is finalized", name); return BAD_PARAM; }
  const char* bytes = (const char*)data;
  it->second.values[name] = {type, count, bytes && count > 0 ? std::vector<char>(bytes, bytes + count * size_of(type)) : std::vector<char>()};
  return 0;
}
FC_API int cudnnBackendFinalize(void* d) {
  FC_ENTER("cudnnBackendFinalize");
  std::lock_guard<std::mutex> guard(g_lock);
  auto it = table().find(d);
  if (it == table().end()) { fc::violation("cudnnBackendFinalize: %p is no descriptor", d); return BAD_PARAM; }
  it->second.final = true;
  if (it->second.kind == EXECUTION_PLAN) fc::count("plan");
  return 0;
}
FC_API int cudnnBackendGetAttribute(void* d, int name, int type, int64_t most, int64_t* count, void* data) {
  FC_ENTER("cudnnBackendGetAttribute");
  std::lock_guard<std::mutex> guard(g_lock);
  auto it = table().find(d);
  if (it == table().end()) { fc::violation("cudnnBackendGetAttribute %d: no such descriptor", name); return BAD_PARAM; }
  auto tell = [&](int64_t n) { if (count) *count = n; return 0; };
  auto value = it->second.values.find(name);
  switch (name) {
    case ENGINEHEUR_RESULTS: case ENGINECFG_ENGINE: case PLAN_CONFIG:
      if (data && most > 0 && type == 15) for (int64_t i = 0; i < 1; i++) { auto other = table().find(((void**)data)[i]); if (other != table().end()) other->second.final = true; }
      return tell(1);
    case KNOB_CHOICES: case KNOB_INFO: case NUMERICAL: case BEHAVIOR: case LAYOUT: case INTERMEDIATE: case COMPUTED_UIDS:
      return tell(0);
    case PLAN_JSON: {
      const char* text = "{}";
      if (data && most >= 2) memcpy(data, text, 2);
      return tell(2);
    }
    default: break;
  }
  if (value != it->second.values.end()) {
    int64_t n = value->second.count < most ? value->second.count : most;
    if (data && n > 0) memcpy(data, value->second.bytes.data(), n * size_of(value->second.type));
    return tell(value->second.count);
  }
  if (data && most > 0) memset(data, 0, size_of(type));
  return tell(1);
}
FC_API int cudnnBackendExecute(void* h, void* plan, void* pack) {
  FC_ENTER("cudnnBackendExecute");
  fc::Handle* handle = fc::as_handle(h);
  {
    std::lock_guard<std::mutex> guard(g_lock);
    if (!table().count(plan) || !table().count(pack)) { fc::violation("cudnnBackendExecute: no such plan or pack"); return BAD_PARAM; }
  }
  if (!handle) { fc::violation("cudnnBackendExecute: %p is no handle", h); return BAD_PARAM; }
  return fc::work("cudnnBackendExecute", "cudnnBackendExecute", handle->stream) ? 5000 : 0;
}
FC_API int cudnnBackendPopulateCudaGraph(void*, void*, void*, void*) { FC_ENTER("cudnnBackendPopulateCudaGraph"); return 0; }
