// The state behind the fake libraries: nothing here computes, but memory is memory, copies are copies, and the rules of streams
// and captures are kept.
#include "core.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <csignal>
#include <ctime>
#include <map>
#include <mutex>
#include <set>
#include <vector>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fc {
namespace {

const uint64_t MAGIC = 0xFA4ECDA5FA4ECDA5ull;
const size_t PAGE = 4096;

struct Capture;
struct Stream { uint64_t magic = MAGIC; int id = 0; unsigned flags = 0; Capture* capture = nullptr; bool dirty = false; };
struct Event { uint64_t magic = MAGIC; int id = 0; double at = -1; Capture* capture = nullptr; Stream* from = nullptr; unsigned flags = 0; };
struct Node { int kind; void* to; const void* from; size_t bytes; int value; void (*function)(void*); void* data; std::string what; };
struct Graph { uint64_t magic = MAGIC; std::vector<Node> nodes; uint64_t at = 0; };
struct Exec { uint64_t magic = MAGIC; int id = 0; std::vector<Node> nodes; uint64_t at = 0; size_t freed = 0, freed_blocks = 0; long launches = 0; bool told = false; };
struct Capture { Stream* origin; int mode; long thread; bool invalid = false; Graph* graph; std::set<Stream*> members; unsigned long long id; };
struct Block { size_t bytes; Kind kind; uint64_t at; bool ours; };

struct State {
  std::recursive_mutex lock;
  // Device memory has addresses that the host may not touch; what is in it is kept at the same offset of `shadow`.
  char *device = nullptr, *shadow = nullptr;
  size_t span = 0, limit = 80ull << 30, used = 0, peak = 0, unit = 512;
  std::map<uintptr_t, Block> blocks;
  std::map<uintptr_t, size_t> holes;
  std::map<std::string, long> counts;
  std::map<std::string, long> works;
  std::map<std::string, std::pair<long, int>> failing;
  std::set<std::string> traced;
  std::vector<std::string> violations, notes;
  std::set<Stream*> streams;
  std::set<Event*> events;
  std::set<Graph*> graphs;
  std::set<Exec*> execs;
  std::set<Capture*> captures;
  std::set<Handle*> handles;
  uint64_t clock = 0;
  int next = 0;
  FILE* out = nullptr;
  int level = 1, traced_signal = SIGUSR1;
  bool aborts = false;
  std::string summary, control;
  time_t control_at = 0;
  long control_ns = 0;
  int major = 9, minor = 0, processors = 132;
  std::string name = "Fake GPU";
  Stream legacy, per_thread;
};

thread_local int tl_last = 0;
thread_local int tl_mode = 0;  // cudaStreamCaptureModeGlobal

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

size_t bytes_of(const char* text) {
  char* end = nullptr;
  double value = strtod(text, &end);
  switch (end ? *end : 0) {
    case 'G': case 'g': value *= 1ull << 30; break;
    case 'M': case 'm': value *= 1 << 20; break;
    case 'K': case 'k': value *= 1 << 10; break;
  }
  return (size_t)value;
}

// "cudaMalloc:5:2,cublasCreate_v2:1:3": the fifth call from now on fails with 2; ":-" in place of a number means every one.
void read_failing(State& s, const std::string& text) {
  s.failing.clear();
  size_t at = 0;
  while (at < text.size()) {
    size_t end = text.find(',', at);
    if (end == std::string::npos) end = text.size();
    std::string item = text.substr(at, end - at);
    size_t a = item.find(':'), b = a == std::string::npos ? a : item.find(':', a + 1);
    if (b != std::string::npos) {
      std::string nth = item.substr(a + 1, b - a - 1);
      s.failing[item.substr(0, a)] = {nth == "-" ? -1 : atol(nth.c_str()), atoi(item.c_str() + b + 1)};
    }
    at = end + 1;
  }
}

void write_summary();

void read_control(State& s) {
  if (s.control.empty()) return;
  struct stat st;
  if (stat(s.control.c_str(), &st) || (st.st_mtim.tv_sec == s.control_at && st.st_mtim.tv_nsec == s.control_ns)) return;
  s.control_at = st.st_mtim.tv_sec, s.control_ns = st.st_mtim.tv_nsec;
  FILE* f = fopen(s.control.c_str(), "r");
  if (!f) return;
  char line[4096];
  while (fgets(line, sizeof line, f)) {
    line[strcspn(line, "\r\n")] = 0;
    if (!strncmp(line, "memory=", 7)) s.limit = bytes_of(line + 7);
    if (!strncmp(line, "fail=", 5)) read_failing(s, line + 5);
    if (!strcmp(line, "summary")) write_summary();
  }
  fclose(f);
}

std::string with_pid(const char* path) {
  std::string text = path;
  size_t at = text.find("%p");
  if (at != std::string::npos) text.replace(at, 2, std::to_string(getpid()));
  return text;
}

State& state() {
  static State* made = [] {
    State* s = new State;
    auto env = [](const char* name) { const char* v = getenv(name); return v && *v ? v : nullptr; };
    if (auto v = env("FAKECUDA_MEMORY")) s->limit = bytes_of(v);
    if (auto v = env("FAKECUDA_LOG")) s->out = fopen(with_pid(v).c_str(), "a");
    if (auto v = env("FAKECUDA_LOG_LEVEL")) s->level = atoi(v);
    if (auto v = env("FAKECUDA_SUMMARY")) s->summary = with_pid(v);
    if (auto v = env("FAKECUDA_CONTROL")) s->control = v;
    if (auto v = env("FAKECUDA_FAIL")) read_failing(*s, v);
    if (auto v = env("FAKECUDA_NAME")) s->name = v;
    if (auto v = env("FAKECUDA_CC")) sscanf(v, "%d.%d", &s->major, &s->minor);
    if (auto v = env("FAKECUDA_TRACE_SIGNAL")) s->traced_signal = atoi(v);
    s->aborts = env("FAKECUDA_ABORT") != nullptr;
    if (auto v = env("FAKECUDA_TRACE")) {
      std::string text = v;
      size_t at = 0;
      while (at <= text.size()) {
        size_t end = text.find(';', at);
        if (end == std::string::npos) end = text.size();
        s->traced.insert(text.substr(at, end - at));
        at = end + 1;
      }
    }
    s->span = 512ull << 30;
    int host = PROT_READ | PROT_WRITE;
    s->shadow = (char*)mmap(nullptr, s->span, host, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // FAKECUDA_HOST_READABLE: device memory that the host can touch, to tell such a fault from others.
    if (env("FAKECUDA_HOST_READABLE")) s->device = s->shadow;
    else s->device = (char*)mmap(nullptr, s->span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (s->shadow == MAP_FAILED || s->device == MAP_FAILED) { perror("fakecuda: mmap"); abort(); }
    s->holes[(uintptr_t)s->device + (2 << 20)] = s->span - (2 << 20);
    read_control(*s);
    return s;
  }();
  return *made;
}

typedef std::lock_guard<std::recursive_mutex> Guard;

void put(FILE* out, const char* head, const char* format, va_list list) {
  static double begun = now();
  fprintf(out, "%.6f %ld %s", now() - begun, (long)syscall(SYS_gettid), head);
  vfprintf(out, format, list);
  fputc('\n', out);
  fflush(out);
}

std::string spell(const char* format, va_list list) {
  char text[1024];
  vsnprintf(text, sizeof text, format, list);
  return text;
}

Stream* stream_of(void* handle) {
  State& s = state();
  if (handle == nullptr || handle == (void*)1) return &s.legacy;
  if (handle == (void*)2) return &s.per_thread;
  return s.streams.count((Stream*)handle) ? (Stream*)handle : nullptr;
}

// Device addresses become those of what they hold. The others stay.
void* host_of(const void* p) {
  State& s = state();
  char* c = (char*)p;
  return c >= s.device && c < s.device + s.span ? s.shadow + (c - s.device) : c;
}

bool on_device(const void* p) {
  State& s = state();
  return (char*)p >= s.device && (char*)p < s.device + s.span;
}

std::map<uintptr_t, Block>::iterator block_at(const void* p) {
  State& s = state();
  auto it = s.blocks.upper_bound((uintptr_t)p);
  if (it == s.blocks.begin()) return s.blocks.end();
  --it;
  return (uintptr_t)p < it->first + it->second.bytes ? it : s.blocks.end();
}

bool within(const char* name, const void* p, size_t bytes) {
  if (!on_device(p)) return true;
  auto it = block_at(p);
  if (it != state().blocks.end() && (uintptr_t)p + bytes <= it->first + it->second.bytes) return true;
  violation("%s: %zu bytes at device address %p are not (all) of one allocation", name, bytes, p);
  return false;
}

void invalidate(Capture* c, const char* name) {
  if (!c->invalid) violation("%s is not allowed while a stream is captured: the capture is lost", name);
  c->invalid = true;
}

// Calls that are not allowed while anything is captured, unless the thread says that it knows (cudaThreadExchangeStreamCaptureMode).
int unsafe(const char* name) {
  State& s = state();
  long me = syscall(SYS_gettid);
  for (Capture* c : s.captures) {
    bool own = c->thread == me && c->mode != 2 && tl_mode != 2;
    bool all = c->mode == 0 && tl_mode == 0;
    if (own || all) {
      invalidate(c, name);
      return fail(name, CAPTURE_UNSUPPORTED, "a stream is being captured");
    }
  }
  return OK;
}

// Work that is asked for on `stream`: goes into the capture where there is one. `recorded` says whether it did.
int enqueue(const char* name, void* handle, const Node& node, bool* recorded) {
  State& s = state();
  *recorded = false;
  Stream* stream = stream_of(handle);
  if (!stream) {
    violation("%s: %p is no stream, or one that was destroyed", name, handle);
    return fail(name, INVALID_HANDLE, "no such stream");
  }
  if (stream == &s.legacy) {
    for (Capture* c : s.captures)
      for (Stream* member : c->members)
        if (!(member->flags & 1)) {
          invalidate(c, name);
          return fail(name, CAPTURE_IMPLICIT, "the default stream waits for a captured one");
        }
  }
  if (Capture* c = stream->capture) {
    if (c->invalid) return fail(name, CAPTURE_INVALIDATED, "the capture was lost before");
    c->graph->nodes.push_back(node);
    stream->dirty = true;
    *recorded = true;
  }
  return OK;
}

int run(const Node& node, const char* name) {
  switch (node.kind) {
    case 1:
      if (!within(name, node.to, node.bytes) || !within(name, node.from, node.bytes)) return INVALID_VALUE;
      memmove(host_of(node.to), host_of(node.from), node.bytes);
      break;
    case 2:
      if (!within(name, node.to, node.bytes)) return INVALID_VALUE;
      memset(host_of(node.to), node.value, node.bytes);
      break;
    case 3: node.function(node.data); break;
    default: break;
  }
  return OK;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += (unsigned char)c < 32 ? ' ' : c;
  }
  return out + "\"";
}

void write_map(FILE* f, const char* name, const std::map<std::string, long>& map) {
  fprintf(f, " \"%s\": {", name);
  const char* comma = "";
  for (auto& item : map) fprintf(f, "%s\n  %s: %ld", comma, quoted(item.first).c_str(), item.second), comma = ",";
  fprintf(f, "\n },\n");
}

void write_list(FILE* f, const char* name, const std::vector<std::string>& list, const char* end) {
  fprintf(f, " \"%s\": [", name);
  const char* comma = "";
  for (auto& item : list) fprintf(f, "%s\n  %s", comma, quoted(item).c_str()), comma = ",";
  fprintf(f, "\n ]%s\n", end);
}

void write_summary() {
  State& s = state();
  if (s.summary.empty()) return;
  std::string part = s.summary + ".part";
  FILE* f = fopen(part.c_str(), "w");
  if (!f) return;
  size_t device = 0, pinned = 0, n_device = 0, n_pinned = 0;
  for (auto& b : s.blocks) {
    if (b.second.kind == Kind::Device) device += b.second.bytes, n_device++;
    else pinned += b.second.bytes, n_pinned++;
  }
  fprintf(f, "{\n \"pid\": %d, \"memory\": {\"limit\": %zu, \"peak\": %zu, \"device\": %zu, \"device_blocks\": %zu, \"pinned\": %zu, \"pinned_blocks\": %zu},\n",
          getpid(), s.limit, s.peak, device, n_device, pinned, n_pinned);
  fprintf(f, " \"alive\": {\"streams\": %zu, \"events\": %zu, \"graphs\": %zu, \"graph_execs\": %zu, \"handles\": %zu},\n",
          s.streams.size(), s.events.size(), s.graphs.size(), s.execs.size(), s.handles.size());
  write_map(f, "calls", s.counts);
  write_map(f, "works", s.works);
  write_list(f, "violations", s.violations, ",");
  write_list(f, "notes", s.notes, "");
  fprintf(f, "}\n");
  fclose(f);
  rename(part.c_str(), s.summary.c_str());
}

__attribute__((destructor)) void at_exit() {
  Guard guard(state().lock);
  write_summary();
}

}  // namespace

void log(int level, const char* format, ...) {
  State& s = state();
  if (!s.out || level > s.level) return;
  Guard guard(s.lock);
  va_list list;
  va_start(list, format);
  put(s.out, "", format, list);
  va_end(list);
}

void violation(const char* format, ...) {
  State& s = state();
  Guard guard(s.lock);
  va_list list, again;
  va_start(list, format);
  va_copy(again, list);
  std::string text = spell(format, again);
  va_end(again);
  s.counts["violation"]++;
  if (s.violations.size() < 200) s.violations.push_back(text);
  if (s.out) put(s.out, "VIOLATION ", format, list);
  va_end(list);
  if (s.aborts) abort();
  if (s.traced.count("violation")) raise(s.traced_signal);
}

void note(const char* format, ...) {
  State& s = state();
  Guard guard(s.lock);
  va_list list, again;
  va_start(list, format);
  va_copy(again, list);
  std::string text = spell(format, again);
  va_end(again);
  s.counts["note"]++;
  if (s.notes.size() < 200) s.notes.push_back(text);
  if (s.out) put(s.out, "NOTE ", format, list);
  va_end(list);
  if (s.traced.count("note")) raise(s.traced_signal);
}

void count(const std::string& what, long by) {
  Guard guard(state().lock);
  state().counts[what] += by;
}

int enter(const char* name) {
  State& s = state();
  int code = 0;
  bool traced;
  {
    Guard guard(s.lock);
    s.counts[name]++;
    if (s.counts.size() && !s.control.empty()) read_control(s);
    auto it = s.failing.find(name);
    if (it != s.failing.end() && (it->second.first < 0 || --it->second.first == 0)) {
      code = it->second.second;
      if (it->second.first == 0) s.failing.erase(it);
    }
    traced = s.traced.count(name);
  }
  log(2, "%s", name);
  if (traced) raise(s.traced_signal);
  if (code) fail(name, code, "as FAKECUDA_FAIL asks");
  return code;
}

int stub(const char* name, void* first) {
  if (int code = enter(name)) return code;
  if (strstr(name, "Destroy")) {
    Guard guard(state().lock);
    state().handles.erase((Handle*)first);  // never freed: nothing else gets its address
    return OK;
  }
  if (strstr(name, "Set") || strstr(name, "Get") || strstr(name, "Create") || strstr(name, "bufferSize")) return OK;
  Handle* handle = as_handle(first);
  if (!handle) return OK;
  int code = work(name, name, handle->stream);
  return code ? 14 : OK;  // CUBLAS_STATUS_INTERNAL_ERROR and the like: no library's status is a cudaError_t
}

int fail(const char* name, int code, const char* why) {
  tl_last = code;
  log(1, "%s fails: %s (%s)", name, error_name(code), why);
  return code;
}

int last_error(bool reset) {
  int code = tl_last;
  if (reset) tl_last = 0;
  return code;
}

void* make_handle(const char* what) {
  Guard guard(state().lock);
  Handle* h = new Handle{MAGIC, what, nullptr};
  state().handles.insert(h);
  return h;
}

Handle* as_handle(void* pointer) {
  Guard guard(state().lock);
  return state().handles.count((Handle*)pointer) ? (Handle*)pointer : nullptr;
}

int allocate(const char* name, void** out, size_t bytes, Kind kind, bool ordered) {
  State& s = state();
  Guard guard(s.lock);
  *out = nullptr;
  if (!ordered) if (int code = unsafe(name)) return code;
  if (!bytes) return OK;
  if (kind != Kind::Device) {
    size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    void* p = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return fail(name, NO_MEMORY, "the host has no more");
    s.blocks[(uintptr_t)p] = {whole, kind, ++s.clock, true};
    *out = p;
    log(1, "%s %zu -> %p", name, bytes, p);
    return OK;
  }
  size_t unit = bytes >= (1 << 20) ? 2 << 20 : s.unit;
  size_t whole = (bytes + unit - 1) / unit * unit;
  if (s.used + whole > s.limit) {
    log(1, "%s %zu: %zu of %zu are used", name, bytes, s.used, s.limit);
    return fail(name, NO_MEMORY, "the device has no more");
  }
  for (auto hole = s.holes.begin(); hole != s.holes.end(); ++hole) {
    uintptr_t begin = (hole->first + unit - 1) / unit * unit, end = hole->first + hole->second;
    if (begin + whole > end) continue;
    uintptr_t first = hole->first;
    s.holes.erase(hole);
    if (begin > first) s.holes[first] = begin - first;
    if (begin + whole < end) s.holes[begin + whole] = end - begin - whole;
    s.blocks[begin] = {whole, Kind::Device, ++s.clock, true};
    s.used += whole;
    if (s.used > s.peak) s.peak = s.used;
    *out = (void*)begin;
    log(1, "%s %zu -> %p (%zu used)", name, bytes, *out, s.used);
    return OK;
  }
  return fail(name, NO_MEMORY, "no hole is large enough");
}

int release(const char* name, void* pointer, bool ordered) {
  State& s = state();
  Guard guard(s.lock);
  if (!pointer) return OK;
  if (!ordered) if (int code = unsafe(name)) return code;
  auto it = s.blocks.find((uintptr_t)pointer);
  if (it == s.blocks.end() || !it->second.ours) {
    violation("%s: %p was not allocated, or is freed already", name, pointer);
    return fail(name, INVALID_VALUE, "no such memory");
  }
  Block block = it->second;
  s.blocks.erase(it);
  log(1, "%s %p (%zu)", name, pointer, block.bytes);
  if (block.kind != Kind::Device) {
    munmap(pointer, block.bytes);
    return OK;
  }
  s.used -= block.bytes;
  for (Exec* exec : s.execs)
    if (block.at < exec->at) exec->freed += block.bytes, exec->freed_blocks++;
  char* kept = (char*)host_of(pointer);
  uintptr_t a = ((uintptr_t)kept + PAGE - 1) / PAGE * PAGE, b = ((uintptr_t)kept + block.bytes) / PAGE * PAGE;
  if (b > a) {
    memset(kept, 0, a - (uintptr_t)kept);
    madvise((void*)a, b - a, MADV_DONTNEED);
    memset((void*)b, 0, (uintptr_t)kept + block.bytes - b);
  } else {
    memset(kept, 0, block.bytes);
  }
  auto hole = s.holes.emplace((uintptr_t)pointer, block.bytes).first;
  auto next = std::next(hole);
  if (next != s.holes.end() && hole->first + hole->second == next->first) hole->second += next->second, s.holes.erase(next);
  if (hole != s.holes.begin()) {
    auto before = std::prev(hole);
    if (before->first + before->second == hole->first) before->second += hole->second, s.holes.erase(hole);
  }
  return OK;
}

Kind kind_of(const void* pointer) {
  Guard guard(state().lock);
  auto it = block_at(pointer);
  return it == state().blocks.end() ? Kind::None : it->second.kind;
}

void* base_of(const void* pointer, size_t* bytes) {
  Guard guard(state().lock);
  auto it = block_at(pointer);
  if (it == state().blocks.end()) return nullptr;
  *bytes = it->second.bytes;
  return (void*)it->first;
}

void memory(size_t* left, size_t* total) {
  State& s = state();
  Guard guard(s.lock);
  *left = s.limit > s.used ? s.limit - s.used : 0;
  *total = s.limit;
}

int register_host(void* pointer, size_t bytes) {
  Guard guard(state().lock);
  state().blocks[(uintptr_t)pointer] = {bytes, Kind::Pinned, ++state().clock, false};
  return OK;
}

int unregister_host(void* pointer) {
  Guard guard(state().lock);
  state().blocks.erase((uintptr_t)pointer);
  return OK;
}

int copy(const char* name, void* to, const void* from, size_t bytes, int direction, void* stream, bool async) {
  State& s = state();
  Guard guard(s.lock);
  if (!async) if (int code = unsafe(name)) return code;
  if (!bytes) return OK;
  bool up = on_device(to), down = on_device(from);
  const char* way = up && down ? "device to device" : up ? "to device" : down ? "to host" : "host to host";
  if ((direction == 1 && (!up || down)) || (direction == 2 && (up || !down)) || (direction == 3 && (!up || !down)) || (direction == 0 && (up || down)))
    violation("%s of %zu bytes, %s, was said to be of kind %d", name, bytes, way, direction);
  if (!within(name, to, bytes) || !within(name, from, bytes)) return fail(name, INVALID_VALUE, "not in one allocation");
  const void* host = up && !down ? from : down && !up ? to : nullptr;
  bool pageable = host && block_at(host) == s.blocks.end();
  std::string kind = std::string(name) + " " + way + (host ? pageable ? ", pageable" : ", pinned" : "");
  s.counts[kind]++;
  if (s.traced.count(kind)) raise(s.traced_signal);
  s.counts[std::string("bytes ") + way] += bytes;
  log(1, "%s %zu %s%s stream %p", name, bytes, way, host ? pageable ? ", pageable" : ", pinned" : "", stream);
  Node node{1, to, from, bytes, 0, nullptr, nullptr, name};
  bool recorded;
  if (int code = enqueue(name, stream, node, &recorded)) return code;
  if (recorded) {
    if (pageable) note("%s of %zu bytes, %s, pageable, is recorded in a graph: every replay uses this host address", name, bytes, way);
    return OK;
  }
  return run(node, name);
}

int copy_2d(const char* name, void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, int direction, void* stream, bool async) {
  for (size_t row = 0; row < height; row++)
    if (int code = copy(name, (char*)to + row * to_pitch, (const char*)from + row * from_pitch, width, direction, stream, async)) return code;
  return OK;
}

int fill(const char* name, void* to, int value, size_t bytes, void* stream, bool async) {
  Guard guard(state().lock);
  if (!async) if (int code = unsafe(name)) return code;
  if (!bytes) return OK;
  if (!within(name, to, bytes)) return fail(name, INVALID_VALUE, "not in one allocation");
  Node node{2, to, nullptr, bytes, value, nullptr, nullptr, name};
  bool recorded;
  if (int code = enqueue(name, stream, node, &recorded)) return code;
  return recorded ? OK : run(node, name);
}

int stream_create(void** out, unsigned flags) {
  State& s = state();
  Guard guard(s.lock);
  Stream* stream = new Stream;
  stream->id = ++s.next, stream->flags = flags;
  s.streams.insert(stream);
  *out = stream;
  log(1, "stream %d created: %p flags %u", stream->id, *out, flags);
  return OK;
}

int stream_destroy(void* handle) {
  State& s = state();
  Guard guard(s.lock);
  Stream* stream = stream_of(handle);
  if (!stream) {
    violation("cudaStreamDestroy: %p is no stream, or is destroyed already", handle);
    return fail("cudaStreamDestroy", INVALID_HANDLE, "no such stream");
  }
  if (stream == &s.legacy || stream == &s.per_thread) return fail("cudaStreamDestroy", INVALID_HANDLE, "the default stream");
  if (stream->capture) violation("cudaStreamDestroy of a stream that is captured");
  s.streams.erase(stream);  // never freed: nothing else gets its address
  return OK;
}

int stream_sync(const char* name, void* handle) {
  State& s = state();
  Guard guard(s.lock);
  Stream* stream = stream_of(handle);
  if (!stream) {
    violation("%s: %p is no stream, or one that was destroyed", name, handle);
    return fail(name, INVALID_HANDLE, "no such stream");
  }
  log(1, "%s %p", name, handle);
  if (stream->capture) {
    invalidate(stream->capture, name);
    return fail(name, CAPTURE_UNSUPPORTED, "the stream is being captured");
  }
  if (stream == &s.legacy)
    for (Capture* c : s.captures)
      for (Stream* member : c->members)
        if (!(member->flags & 1)) {
          invalidate(c, name);
          return fail(name, CAPTURE_IMPLICIT, "the default stream waits for a captured one");
        }
  return OK;
}

int device_sync(const char* name) {
  State& s = state();
  Guard guard(s.lock);
  log(1, "%s", name);
  for (Capture* c : s.captures) {
    invalidate(c, name);
    return fail(name, CAPTURE_UNSUPPORTED, "a stream is being captured");
  }
  return OK;
}

int event_create(void** out, unsigned flags) {
  State& s = state();
  Guard guard(s.lock);
  Event* event = new Event;
  event->id = ++s.next, event->flags = flags;
  s.events.insert(event);
  *out = event;
  return OK;
}

int event_destroy(void* handle) {
  State& s = state();
  Guard guard(s.lock);
  if (!s.events.erase((Event*)handle)) {
    violation("cudaEventDestroy: %p is no event, or is destroyed already", handle);
    return fail("cudaEventDestroy", INVALID_HANDLE, "no such event");
  }
  return OK;
}

int event_record(void* handle, void* stream) {
  State& s = state();
  Guard guard(s.lock);
  Event* event = (Event*)handle;
  Stream* on = stream_of(stream);
  if (!s.events.count(event) || !on) {
    violation("cudaEventRecord: no such event (%p) or stream (%p)", handle, stream);
    return fail("cudaEventRecord", INVALID_HANDLE, "no such event or stream");
  }
  event->at = now(), event->capture = on->capture, event->from = on;
  return OK;
}

int stream_wait(void* handle, void* event_handle) {
  State& s = state();
  Guard guard(s.lock);
  Event* event = (Event*)event_handle;
  Stream* stream = stream_of(handle);
  if (!s.events.count(event) || !stream) {
    violation("cudaStreamWaitEvent: no such event (%p) or stream (%p)", event_handle, handle);
    return fail("cudaStreamWaitEvent", INVALID_HANDLE, "no such event or stream");
  }
  if (event->capture && !s.captures.count(event->capture)) event->capture = nullptr;
  if (event->capture && !stream->capture) {
    stream->capture = event->capture;
    event->capture->members.insert(stream);
  } else if (event->capture && stream->capture == event->capture) {
    event->from->dirty = false;
  } else if (stream->capture && event->at >= 0 && event->from != stream) {
    invalidate(stream->capture, "cudaStreamWaitEvent");
    return fail("cudaStreamWaitEvent", CAPTURE_ISOLATION, "a captured stream may not wait for what is not captured");
  }
  return OK;
}

int event_sync(const char* name, void* handle, bool query) {
  State& s = state();
  Guard guard(s.lock);
  Event* event = (Event*)handle;
  if (!s.events.count(event)) {
    violation("%s: no such event (%p)", name, handle);
    return fail(name, INVALID_HANDLE, "no such event");
  }
  if (!query) log(1, "%s", name);
  if (event->capture && s.captures.count(event->capture)) return fail(name, CAPTURED_EVENT, "recorded in a capture");
  return unsafe(name);
}

int event_elapsed(float* milliseconds, void* begin, void* end) {
  State& s = state();
  Guard guard(s.lock);
  Event *a = (Event*)begin, *b = (Event*)end;
  if (!s.events.count(a) || !s.events.count(b) || a->at < 0 || b->at < 0) return fail("cudaEventElapsedTime", INVALID_HANDLE, "not recorded");
  *milliseconds = (float)((b->at - a->at) * 1e3);
  return OK;
}

int work(const char* name, const std::string& what, void* stream) {
  State& s = state();
  Guard guard(s.lock);
  s.works[what]++;
  Node node{0, nullptr, nullptr, 0, 0, nullptr, nullptr, what};
  bool recorded;
  int code = enqueue(name, stream, node, &recorded);
  if (!code && !recorded) s.counts["launch"]++;
  return code;
}

int host_function(void (*function)(void*), void* data, void* stream) {
  Node node{3, nullptr, nullptr, 0, 0, function, data, "host function"};
  bool recorded;
  {
    Guard guard(state().lock);
    if (int code = enqueue("cudaLaunchHostFunc", stream, node, &recorded)) return code;
  }
  if (!recorded) function(data);
  return OK;
}

int capture_begin(void* handle, int mode) {
  State& s = state();
  Guard guard(s.lock);
  Stream* stream = stream_of(handle);
  if (!stream) {
    violation("cudaStreamBeginCapture: %p is no stream", handle);
    return fail("cudaStreamBeginCapture", INVALID_HANDLE, "no such stream");
  }
  if (stream == &s.legacy) return fail("cudaStreamBeginCapture", CAPTURE_UNSUPPORTED, "the default stream");
  if (stream->capture) return fail("cudaStreamBeginCapture", INVALID_VALUE, "is captured already");
  Capture* c = new Capture{stream, mode, syscall(SYS_gettid), false, new Graph, {stream}, (unsigned long long)++s.next};
  s.graphs.insert(c->graph);
  s.captures.insert(c);
  stream->capture = c, stream->dirty = false;
  log(1, "capture begins on %p, mode %d", handle, mode);
  return OK;
}

int capture_end(void* handle, void** graph) {
  State& s = state();
  Guard guard(s.lock);
  *graph = nullptr;
  Stream* stream = stream_of(handle);
  if (!stream || !stream->capture) return fail("cudaStreamEndCapture", INVALID_VALUE, "is not captured");
  Capture* c = stream->capture;
  if (c->origin != stream) return fail("cudaStreamEndCapture", CAPTURE_UNMATCHED, "was begun on another stream");
  int code = OK;
  if (c->mode != 2 && c->thread != syscall(SYS_gettid)) code = CAPTURE_WRONG_THREAD;
  for (Stream* member : c->members) {
    if (member != stream && member->dirty && !code) code = CAPTURE_UNJOINED;
    member->capture = nullptr;
  }
  if (c->invalid) code = CAPTURE_INVALIDATED;
  s.captures.erase(c);
  log(1, "capture ends: %zu nodes, %s", c->graph->nodes.size(), error_name(code));
  if (code) {
    s.graphs.erase(c->graph);
    return fail("cudaStreamEndCapture", code, "see above");
  }
  c->graph->at = ++s.clock;
  *graph = c->graph;
  return OK;
}

int capture_status(void* handle, int* status, unsigned long long* id, void** graph) {
  Guard guard(state().lock);
  Stream* stream = stream_of(handle);
  if (!stream) {
    violation("cudaStreamIsCapturing: %p is no stream, or one that was destroyed", handle);
    return fail("cudaStreamIsCapturing", INVALID_HANDLE, "no such stream");
  }
  Capture* c = stream->capture;
  if (status) *status = c ? c->invalid ? 2 : 1 : 0;
  if (id) *id = c ? c->id : 0;
  if (graph) *graph = c ? c->graph : nullptr;
  return OK;
}

int capture_mode(int* mode) {
  int before = tl_mode;
  tl_mode = *mode;
  *mode = before;
  return OK;
}

int graph_instantiate(void** out, void* handle) {
  State& s = state();
  Guard guard(s.lock);
  Graph* graph = (Graph*)handle;
  if (!s.graphs.count(graph)) return fail("cudaGraphInstantiate", INVALID_VALUE, "no such graph");
  Exec* exec = new Exec;
  exec->id = ++s.next, exec->nodes = graph->nodes, exec->at = graph->at;
  s.execs.insert(exec);
  *out = exec;
  log(1, "graph %d: %zu nodes", exec->id, exec->nodes.size());
  return OK;
}

int graph_launch(void* handle, void* stream) {
  State& s = state();
  Guard guard(s.lock);
  Exec* exec = (Exec*)handle;
  if (!s.execs.count(exec)) {
    violation("cudaGraphLaunch: %p is no graph, or one that was destroyed", handle);
    return fail("cudaGraphLaunch", INVALID_VALUE, "no such graph");
  }
  if (!stream_of(stream)) {
    violation("cudaGraphLaunch: %p is no stream, or one that was destroyed", stream);
    return fail("cudaGraphLaunch", INVALID_HANDLE, "no such stream");
  }
  exec->launches++;
  log(1, "graph %d is launched on %p", exec->id, stream);
  if (exec->freed && !exec->told) {
    exec->told = true;
    note("graph %d is launched after %zu allocations (%zu bytes) that were there when it was recorded were freed: none of them may be its", exec->id, exec->freed_blocks, exec->freed);
  }
  for (const Node& node : exec->nodes)
    if (int code = run(node, "a copy in a graph")) return fail("cudaGraphLaunch", code, "a copy's memory is gone");
  return OK;
}

int graph_destroy(void* handle) {
  Guard guard(state().lock);
  if (!state().graphs.erase((Graph*)handle)) return fail("cudaGraphDestroy", INVALID_VALUE, "no such graph");
  return OK;
}

int exec_destroy(void* handle) {
  Guard guard(state().lock);
  if (!state().execs.erase((Exec*)handle)) return fail("cudaGraphExecDestroy", INVALID_VALUE, "no such graph");
  return OK;
}

int graph_nodes(void* handle, size_t* count) {
  Guard guard(state().lock);
  if (!state().graphs.count((Graph*)handle)) return INVALID_VALUE;
  *count = ((Graph*)handle)->nodes.size();
  return OK;
}

const char* device_name() { return state().name.c_str(); }

int device_attribute(int attribute) {
  State& s = state();
  switch (attribute) {
    case 1: case 2: case 3: return 1024;
    case 4: return 64;
    case 5: return 2147483647;
    case 6: case 7: return 65535;
    case 8: return 49152;
    case 9: return 65536;
    case 10: return 32;
    case 11: return 2147483647;
    case 12: case 82: return 65536;
    case 13: return 1980000;
    case 14: return 512;
    case 16: return s.processors;
    case 19: case 31: case 41: case 78: case 79: case 80: case 83: case 89: case 90: case 91: case 95: case 98: case 99: case 115: return 1;
    case 15: return 1;
    case 36: return 2619000;
    case 37: return 5120;
    case 38: return 50 << 20;
    case 39: return 2048;
    case 40: return 3;
    case 75: return s.major;
    case 76: return s.minor;
    case 81: return 228 << 10;
    case 97: return 227 << 10;
    case 106: return 32;
    case 111: return 1024;
    case 120: return s.major >= 9;
    default: return 0;
  }
}

const char* error_name(int code) {
  switch (code) {
    case 0: return "cudaSuccess";
    case 1: return "cudaErrorInvalidValue";
    case 2: return "cudaErrorMemoryAllocation";
    case 3: return "cudaErrorInitializationError";
    case 9: return "cudaErrorInvalidConfiguration";
    case 100: return "cudaErrorNoDevice";
    case 400: return "cudaErrorInvalidResourceHandle";
    case 600: return "cudaErrorNotReady";
    case 700: return "cudaErrorIllegalAddress";
    case 719: return "cudaErrorLaunchFailure";
    case 801: return "cudaErrorNotSupported";
    case 900: return "cudaErrorStreamCaptureUnsupported";
    case 901: return "cudaErrorStreamCaptureInvalidated";
    case 903: return "cudaErrorStreamCaptureUnmatched";
    case 904: return "cudaErrorStreamCaptureUnjoined";
    case 905: return "cudaErrorStreamCaptureIsolation";
    case 906: return "cudaErrorStreamCaptureImplicit";
    case 907: return "cudaErrorCapturedEvent";
    case 908: return "cudaErrorStreamCaptureWrongThread";
    default: return "cudaErrorUnknown";
  }
}

const char* error_text(int code) {
  switch (code) {
    case 0: return "no error";
    case 1: return "invalid argument";
    case 2: return "out of memory";
    case 9: return "invalid configuration argument";
    case 100: return "no CUDA-capable device is detected";
    case 400: return "invalid resource handle";
    case 700: return "an illegal memory access was encountered";
    case 719: return "unspecified launch failure";
    case 801: return "operation not supported";
    case 900: return "operation not permitted when stream is capturing";
    case 901: return "operation failed due to a previous error during capture";
    case 904: return "capturing stream has unjoined work";
    case 905: return "dependency created on uncaptured work in another stream";
    case 906: return "operation would make the legacy stream depend on a capturing blocking stream";
    case 907: return "operation not permitted on an event last recorded in a capturing stream";
    case 908: return "attempt to terminate a thread-local capture sequence from another thread";
    default: return "unknown error";
  }
}

}  // namespace fc

// For tests in the process itself, through ctypes.
FC_API void fakecuda_set_memory(size_t bytes) { fc::Guard guard(fc::state().lock); fc::state().limit = bytes; }
FC_API size_t fakecuda_used() { fc::Guard guard(fc::state().lock); return fc::state().used; }
FC_API long fakecuda_count(const char* name) { fc::Guard guard(fc::state().lock); auto& c = fc::state().counts; auto it = c.find(name); return it == c.end() ? 0 : it->second; }
FC_API void fakecuda_fail(const char* what) { fc::Guard guard(fc::state().lock); fc::read_failing(fc::state(), what); }
FC_API void fakecuda_forget_counts() { fc::Guard guard(fc::state().lock); fc::state().counts.clear(); fc::state().works.clear(); }
FC_API void fakecuda_mark(const char* text) { fc::log(0, "MARK %s", text); }
FC_API void fakecuda_summary(const char* path) { fc::Guard guard(fc::state().lock); std::string before = fc::state().summary; fc::state().summary = path; fc::write_summary(); fc::state().summary = before; }
