/* A libcuda.so.1 for machines without a GPU: the driver calls of trt_runtime/gpu/cuda.py over the host's memory.
 *
 * The real cuda.bindings (and PyCUDA) run on it, so that what they are given is converted and checked for real. Work is
 * done as late as can be, when something waits for it: what does not wait sees nothing done. Where a stream is captured
 * it is recorded. Rules that CUDA has are kept: a context must be current, and that of the stream; nothing is
 * allocated, freed or waited for in a capture; every handle must be a live one.
 *
 * FAKE_CUDA_DEVICES, FAKE_CUDA_VERSION, FAKE_CUDA_MEMORY: what there is. FAKE_CUDA_LACKS=cuLaunch: what an old driver
 * does not have. FAKE_CUDA_FAIL says what fails: cuLaunch=700, every call; cuLaunch=700@3, the third one since that was
 * set; cuLaunch=700@3!, and from then on every call in its context, until the context is destroyed, as after a kernel
 * with an illegal address; cuLaunch=4@3!!, and from then on every call at all, as when the driver has shut down.
 * FAKE_CUDA_LOG=FILE: where each call is noted, in a line: the number of the thread, the function, and what it was
 * given, as kind and number, in the order of the arguments. FAKE_CUDA_POOL=0 or =1: memory is of no context, and to be
 * asked for that gives none, or is an error: so is that of cuMemAllocAsync. Of contexts each GPU has its primary one
 * and one that is the caller's own.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MEMORY = 1, PINNED, STREAM, EVENT, GRAPH, EXECUTABLE, CONTEXT };
enum { COPY, RECORD, WAIT };
struct Object;
typedef struct Work { /* a copy; or a mark of an event, or a wait for what a stream was given up to a number */
  int kind;
  void* to;
  const void* from;
  size_t size;
  struct Object* other;
  long number;
  struct Work* next;
} Work;
typedef struct Object {
  int kind, capturing, invalid, passed, context, id;
  size_t size;
  double seconds;
  void* data;
  struct Object* stream; /* that an event was last put on */
  long number;           /* of that work on the stream; of a stream, how much it has been given */
  long done;             /* how much of it a stream has done */
  Work *queue, **tail;   /* what a stream is still to do */
  Work *first, **last;   /* what was captured */
  struct Object* next;
} Object;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER, working;
static Object* objects;
static long retained, used;
static unsigned last_flags;
static Object contexts[16]; /* the primary ones of 8 GPUs, then those that are the caller's own */
static int holders[8], broken[16], gone; /* of each primary context; and the error that a context, or all, now gives */
static __thread void* stack[16];
static __thread int depth, relaxed;
static __thread Object* captured;

static long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}

static int current(void) { return (int)((Object*)stack[depth - 1] - contexts); }

/* Counts the calls that FAKE_CUDA_FAIL names, and returns the error of this one; 0: it works. */
static int failure(const char* name) {
  static char setting[128];
  static long calls;
  const char* wanted = getenv("FAKE_CUDA_FAIL");
  size_t length = strlen(name);
  int code = gone;
  if (gone || !wanted || strncmp(wanted, name, length) || wanted[length] != '=') return code;
  pthread_mutex_lock(&mutex);
  if (strcmp(setting, wanted)) snprintf(setting, sizeof setting, "%s", wanted), calls = 0;
  char* end;
  int named = (int)strtol(wanted + length + 1, &end, 10);
  long number = *end == '@' ? strtol(end + 1, &end, 10) : 0;
  calls++;
  if (!number || calls == number) code = named;
  if (code && end[0] == '!' && end[1] == '!') gone = code;
  if (code && end[0] == '!' && depth) broken[current()] = code;
  pthread_mutex_unlock(&mutex);
  return code;
}

static void note(const char* name, int count, const void** given);

#define ENTER(name, ...)                                            \
  do {                                                              \
    const void* given[] = {NULL, ##__VA_ARGS__};                    \
    int code = failure(name);                                       \
    note(name, (int)(sizeof given / sizeof *given) - 1, given + 1); \
    if (code) return code;                                          \
  } while (0)
#define ENTER_CONTEXT(name, ...)                     \
  do {                                               \
    ENTER(name, ##__VA_ARGS__);                      \
    if (!depth) return 201;                          \
    if (broken[current()]) return broken[current()]; \
  } while (0)
#define NOT_CAPTURED()          \
  do {                          \
    if (captured && !relaxed) { \
      captured->invalid = 1;    \
      return 900;               \
    }                           \
  } while (0)

static Object* add(int kind, void* data, size_t size) {
  Object* object = calloc(1, sizeof *object);
  static int made[CONTEXT];
  object->context = depth ? current() : 0;
  object->kind = kind, object->data = data ? data : object, object->size = size, object->last = &object->first;
  object->tail = &object->queue;
  pthread_mutex_lock(&mutex);
  object->id = ++made[kind];
  object->next = objects, objects = object;
  pthread_mutex_unlock(&mutex);
  return object;
}

static Object* find(int kind, const void* data) {
  pthread_mutex_lock(&mutex);
  Object* object = objects;
  while (object && !(object->kind == kind && object->data == data)) object = object->next;
  pthread_mutex_unlock(&mutex);
  return object;
}

/* Writes a call to the log. */
static void note(const char* name, int count, const void** given) {
  static const char* kinds[] = {"", "memory", "pinned", "stream", "event", "graph", "executable"};
  static int threads;
  static __thread int thread;
  const char* path = getenv("FAKE_CUDA_LOG");
  if (!path || !*path) return;
  pthread_mutex_lock(&mutex);
  if (!thread) thread = ++threads;
  FILE* file = fopen(path, "a");
  fprintf(file, "%d %s", thread, name);
  for (int i = 0; i < count; i++) {
    uintptr_t at = (uintptr_t)given[i];
    Object* object = objects;
    while (object && !((uintptr_t)object->data <= at &&
                       at < (uintptr_t)object->data + (object->kind < STREAM ? object->size : 1)))
      object = object->next;
    if (object)
      fprintf(file, " %s%d", kinds[object->kind], object->id);
    else
      fprintf(file, at == 1 ? " legacy" : at == 2 ? " per-thread" : " other");
  }
  fputc('\n', file);
  fclose(file);
  pthread_mutex_unlock(&mutex);
}

static int take(int kind, const void* data) {
  int found = 0;
  pthread_mutex_lock(&mutex);
  for (Object** place = &objects; *place && !found; place = *place ? &(*place)->next : place)
    if ((*place)->kind == kind && (*place)->data == data) {
      Object* gone = *place;
      if (kind == MEMORY) used -= (long)gone->size;
      if (kind == MEMORY || kind == PINNED) free(gone->data);
      *place = gone->next, found = 1; /* the object itself stays: a handle is never given out twice */
      break;
    }
  pthread_mutex_unlock(&mutex);
  return found ? 0 : kind == MEMORY || kind == PINNED ? 1 : 400;
}

/* Does what a stream has been given, up to a number, and what that waits for. */
static void work_off(Object* stream, long number) {
  while (stream->queue && stream->done < number) {
    Work* item = stream->queue;
    stream->queue = item->next, stream->done++;
    if (!stream->queue) stream->tail = &stream->queue;
    if (item->kind == COPY) memcpy(item->to, item->from, item->size);
    if (item->kind == WAIT) work_off(item->other, item->number);
    if (item->kind == RECORD) {
      struct timespec now;
      clock_gettime(CLOCK_MONOTONIC, &now);
      item->other->seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
      item->other->passed = 1;
    }
    free(item);
  }
}
static void finish(Object* stream, long number) {
  pthread_mutex_lock(&working);
  work_off(stream, number);
  pthread_mutex_unlock(&working);
}
static void finish_all(void) {
  for (Object* object = objects; object; object = object->next)
    if (object->kind == STREAM) finish(object, object->number);
}
static void put(Object* stream, Work work) {
  Work* item = malloc(sizeof *item);
  *item = work;
  pthread_mutex_lock(&working);
  if (stream->capturing)
    *stream->last = item, stream->last = &item->next;
  else
    *stream->tail = item, stream->tail = &item->next, stream->number++;
  pthread_mutex_unlock(&working);
}
__attribute__((constructor)) static void prepare(void) {
  pthread_mutexattr_t recursive;
  pthread_mutexattr_init(&recursive);
  pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
  pthread_mutex_init(&working, &recursive);
}

/* Counts what is alive of a kind, 0 for all, the primary context among them. */
int fake_cuda_live(int kind) {
  int count = kind && kind != CONTEXT ? 0 : (int)retained;
  for (Object* object = objects; object; object = object->next) count += !kind || object->kind == kind;
  return count;
}
int fake_cuda_depth(void) { return depth; }
/* What pinned memory was last asked for with. */
unsigned fake_cuda_flags(void) { return last_flags; }

int cuInit(unsigned flags) {
  ENTER("cuInit");
  return setting("FAKE_CUDA_DEVICES", 2) ? 0 : 100;
}
int cuDriverGetVersion(int* version) { return *version = (int)setting("FAKE_CUDA_VERSION", 13000), 0; }
int cuDeviceGetCount(int* count) { return *count = (int)setting("FAKE_CUDA_DEVICES", 2), 0; }
int cuDeviceGet(int* device, int ordinal) {
  ENTER("cuDeviceGet");
  return *device = ordinal, 0;
}
int cuDeviceGetName(char* name, int length, int device) { return snprintf(name, length, "Fake"), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  ENTER("cuDeviceGetAttribute");
  return *value = attribute == 75 ? 9 : attribute == 76 ? 1 : 0, 0;
}
int cuDeviceComputeCapability(int* major, int* minor, int device) { return *major = 9, *minor = 1, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER("cuDevicePrimaryCtxRetain");
  return retained++, holders[device]++, *context = &contexts[device], 0;
}
int cuCtxCreate_v4(void** context, void* parameters, unsigned flags, int device) {
  return retained++, *context = stack[depth++] = &contexts[8 + device], 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER("cuDevicePrimaryCtxRelease");
  if (!--holders[device] && broken[device]) { /* a broken context takes all that is in it along */
    pthread_mutex_lock(&mutex);
    for (Object** place = &objects; *place;)
      if ((*place)->context == device) {
        if ((*place)->kind == MEMORY) used -= (long)(*place)->size;
        *place = (*place)->next;
      } else
        place = &(*place)->next;
    pthread_mutex_unlock(&mutex);
    broken[device] = 0;
  }
  return retained--, 0;
}
int cuCtxDetach(void* context) { return retained--, depth -= depth > 0, 0; }
int cuCtxPushCurrent_v2(void* context) {
  ENTER("cuCtxPushCurrent");
  return stack[depth++] = context, 0;
}
int cuCtxPopCurrent_v2(void** context) {
  int code = failure("cuCtxPopCurrent");
  return depth ? (*context = stack[--depth], code) : 201;
}
int cuCtxGetCurrent(void** context) { return *context = depth ? stack[depth - 1] : NULL, 0; }
int cuCtxGetDevice(int* device) {
  ENTER_CONTEXT("cuCtxGetDevice");
  return *device = current() % 8, 0;
}
int cuCtxSynchronize(void) {
  ENTER_CONTEXT("cuCtxSynchronize");
  return finish_all(), 0;
}
int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  ENTER_CONTEXT("cuMemGetInfo");
  *total = (size_t)setting("FAKE_CUDA_MEMORY", 1 << 30);
  return *free_bytes = *total - (size_t)used, 0;
}
int cuMemAlloc_v2(uintptr_t* address, size_t size) {
  ENTER_CONTEXT("cuMemAlloc");
  NOT_CAPTURED();
  if (used + (long)size > setting("FAKE_CUDA_MEMORY", 1 << 30)) return 2;
  void* data = aligned_alloc(256, (size + 255) / 256 * 256);
  memset(data, 0xFF, size);
  used += (long)size;
  return *address = (uintptr_t)data, add(MEMORY, data, size), 0;
}
int cuMemFree_v2(uintptr_t address) {
  ENTER_CONTEXT("cuMemFree", (void*)address);
  NOT_CAPTURED();
  return finish_all(), take(MEMORY, (void*)address);
}
int cuMemHostAlloc(void** address, size_t size, unsigned flags) {
  ENTER_CONTEXT("cuMemHostAlloc");
  NOT_CAPTURED();
  last_flags = flags;
  return add(PINNED, *address = malloc(size), size), 0;
}
int cuMemFreeHost(void* address) {
  ENTER_CONTEXT("cuMemFreeHost", address);
  NOT_CAPTURED();
  return finish_all(), take(PINNED, address);
}
int cuPointerGetAttribute(void* value, int attribute, uintptr_t address) {
  ENTER("cuPointerGetAttribute");
  if (attribute != 1 && attribute != 9) return 1; /* CU_POINTER_ATTRIBUTE_CONTEXT, ..._DEVICE_ORDINAL */
  for (Object* object = objects; object; object = object->next)
    if (object->kind == MEMORY && (uintptr_t)object->data <= address &&
        address < (uintptr_t)object->data + object->size) {
      if (attribute == 9) return *(int*)value = object->context % 8, 0;
      long pool = setting("FAKE_CUDA_POOL", -1);
      return *(void**)value = pool < 0 ? &contexts[object->context] : NULL, pool == 1;
    }
  return 1;
}

int cuStreamCreate(void** stream, unsigned flags) {
  ENTER_CONTEXT("cuStreamCreate");
  return flags == 1 ? (*stream = add(STREAM, NULL, 0), 0) : 1; /* non-blocking ones only */
}
int cuStreamDestroy_v2(void* stream) {
  ENTER_CONTEXT("cuStreamDestroy", stream);
  Object* object = find(STREAM, stream);
  if (object) finish(object, object->number);
  return take(STREAM, stream);
}
int cuStreamSynchronize(void* stream) {
  ENTER_CONTEXT("cuStreamSynchronize", stream);
  Object* object = find(STREAM, stream);
  if (object && object->capturing) return object->invalid = 1, 900;
  if (!object || object->context != current()) return 400;
  return finish(object, object->number), 0;
}
static int copy(Object* stream, void* to, const void* from, size_t size) {
  if (!stream || stream->context != current()) return 400;
  return put(stream, (Work){.kind = COPY, .to = to, .from = from, .size = size}), 0;
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t size, void* stream) {
  ENTER_CONTEXT("cuMemcpyHtoDAsync", (void*)to, from, stream);
  return copy(find(STREAM, stream), (void*)to, from, size);
}
int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t size, void* stream) {
  ENTER_CONTEXT("cuMemcpyDtoHAsync", to, (void*)from, stream);
  return copy(find(STREAM, stream), to, (void*)from, size);
}

int cuEventCreate(void** event, unsigned flags) {
  ENTER_CONTEXT("cuEventCreate");
  return *event = add(EVENT, NULL, flags), 0;
}
int cuEventDestroy_v2(void* event) {
  ENTER_CONTEXT("cuEventDestroy", event);
  return take(EVENT, event);
}
int cuEventRecord(void* event, void* stream) {
  ENTER_CONTEXT("cuEventRecord", event, stream);
  Object *object = find(EVENT, event), *on = find(STREAM, stream);
  if (!object || ((uintptr_t)stream > 2 && !on)) return 400;
  object->passed = !on, object->stream = on;
  if (on) put(on, (Work){.kind = RECORD, .other = object});
  return object->number = on ? on->number : -1, 0;
}
int cuEventSynchronize(void* event) {
  ENTER_CONTEXT("cuEventSynchronize", event);
  Object* object = find(EVENT, event);
  if (!object) return 400;
  if (object->stream && object->stream->capturing) return object->stream->invalid = 1, 900;
  if (object->stream) finish(object->stream, object->number);
  return 0;
}
int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  ENTER_CONTEXT("cuEventElapsedTime", start, end);
  Object *first = find(EVENT, start), *last = find(EVENT, end);
  if (!first || !last || !first->number || !last->number || first->size || last->size) return 400;
  if (!first->passed || !last->passed) return 600;
  return *milliseconds = (float)((last->seconds - first->seconds) * 1e3), 0;
}
int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
  ENTER_CONTEXT("cuStreamWaitEvent", stream, event);
  Object *on = find(STREAM, stream), *object = find(EVENT, event);
  if (!on || !object || flags || on->context != current()) return 400;
  if (on->capturing) return on->invalid = 1, 905; /* the event is none of the capture */
  if (object->stream) put(on, (Work){.kind = WAIT, .other = object->stream, .number = object->number});
  return 0;
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER("cuThreadExchangeStreamCaptureMode");
  int before = relaxed ? 2 : 0;
  return relaxed = *mode == 2, *mode = before, 0;
}
int cuStreamBeginCapture_v2(void* stream, int mode) {
  ENTER_CONTEXT("cuStreamBeginCapture", stream);
  Object* object = find(STREAM, stream);
  if (!object || mode != 1) return 1; /* thread-local ones only */
  return captured = object, object->capturing = 1, object->invalid = 0, object->last = &object->first,
         object->first = NULL, 0;
}
int cuStreamEndCapture(void* stream, void** graph) {
  *graph = NULL;
  ENTER_CONTEXT("cuStreamEndCapture", stream);
  Object* object = find(STREAM, stream);
  if (!object || !object->capturing) return 400;
  captured = NULL, object->capturing = 0;
  if (object->invalid) return 901;
  Object* made = add(GRAPH, NULL, 0);
  made->first = object->first;
  return *graph = made, 0;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
  ENTER_CONTEXT("cuGraphInstantiate", graph);
  Object *from = find(GRAPH, graph), *made = from ? add(EXECUTABLE, NULL, 0) : NULL;
  return from ? (made->first = from->first, *executable = made, 0) : 400;
}
int cuGraphDestroy(void* graph) {
  ENTER("cuGraphDestroy", graph);
  return take(GRAPH, graph);
}
int cuGraphLaunch(void* executable, void* stream) {
  ENTER_CONTEXT("cuGraphLaunch", executable, stream);
  Object *object = find(EXECUTABLE, executable), *on = find(STREAM, stream);
  int code = object && on ? 0 : 400;
  for (Work* item = code ? NULL : object->first; item && !code; item = item->next)
    code = copy(on, item->to, item->from, item->size);
  return code;
}
int cuGraphExecDestroy(void* executable) {
  ENTER("cuGraphExecDestroy", executable);
  return take(EXECUTABLE, executable);
}

int cuGetErrorString(int code, const char** text) {
  switch (code) { /* CUDA's own words */
    case 2:
      return *text = "out of memory", 0;
    case 700:
      return *text = "an illegal memory access was encountered", 0;
    case 710:
      return *text = "device-side assert triggered", 0;
    case 715:
      return *text = "an illegal instruction was encountered", 0;
    case 716:
      return *text = "misaligned address", 0;
    case 719:
      return *text = "unspecified launch failure", 0;
    default:
      return *text = "a fake error", 0;
  }
}
int cuGetErrorName(int code, const char** text) { return *text = "CUDA_ERROR_FAKE", 0; }

int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status) {
  char name[128];
  Dl_info own;
  const char* lacked = getenv("FAKE_CUDA_LACKS");
  *function = NULL;
  if (lacked && !strcmp(lacked, symbol)) {
    if (status) *status = 1;
    return 500;
  }
  dladdr((void*)cuInit, &own);
  void* library = dlopen(own.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  snprintf(name, sizeof name, "%s_v2", symbol);
  if (!(*function = dlsym(library, name))) *function = dlsym(library, symbol);
  if (!*function && !strcmp(symbol, "cuGraphInstantiate")) *function = (void*)cuGraphInstantiateWithFlags;
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
