// A stand-in for the CUDA driver (libcuda.so.1): device memory is host memory. As on a GPU, what is
// queued in a stream happens later: here when an event after it is looked at for the LAG-th time.
// So bytes that change before their copy was seen to be done arrive changed. The driver keeps count
// of what it gave out, remembers the first use that CUDA forbids, and fails on command. For tests
// of what calls it; the functions that begin with "stand_in" are theirs.
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };
enum { NOT_READY = 600, LAUNCH_FAILED = 719 };
enum { GPUS = 8, LAG = 3 };

typedef struct {
  size_t src_x, src_y, src_z, src_lod;
  int src_kind;
  const char *src_host;
  uint64_t src_device;
  void *src_array, *src_reserved;
  size_t src_pitch, src_height;
  size_t dst_x, dst_y, dst_z, dst_lod;
  int dst_kind;
  char *dst_host;
  uint64_t dst_device;
  void *dst_array, *dst_reserved;
  size_t dst_pitch, dst_height, width, height, depth;
} Copy3D;  // CUDA_MEMCPY3D of cuda.h

typedef struct Event Event;

typedef struct {
  int kernel;  // its number, from 1 on; 0 for none
  unsigned blocks, rows, threads;
  uint64_t arguments[2];
} Launch;

typedef struct Work {  // a copy of rows, a kernel, the mark of an event, or a wait for one
  struct Work *next;
  Event *event, *waits;
  Launch launch;
  Copy3D copy;
} Work;

typedef struct Stream {
  struct Stream *next;
  int gpu;
  Work *first, *last;
} Stream;

struct Event {
  Event *next;
  int gpu, looks;
  Stream *stream;  // NULL: nothing is recorded that is not done
};

typedef struct Memory {
  struct Memory *next;
  const char *start, *end;
  int gpu;
} Memory;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Stream *streams;
static Event *events;
static Memory *pinned, *allocated;
static __thread int contexts[64], depth;  // the stack of current ones: 0 for none, else GPU + 1
static int retained[GPUS];
static char violation[400];
static char failing[64];
static int fails_after, fails_times, failed;

static int forbidden(int status, const char *call, const char *what) {
  if (!violation[0]) snprintf(violation, sizeof violation, "%s: %s", call, what);
  return status;
}

static int current(void) { return contexts[depth] - 1; }

// Whether this call is one that shall fail.
static int told_to_fail(const char *call) {
  if (strcmp(call, failing)) return 0;
  if (fails_after-- > 0 || failed >= fails_times) return 0;
  failed++;
  return 1;
}

#define BEGIN                                     \
  pthread_mutex_lock(&lock);                      \
  int status = told_to_fail(__func__) ? OUT_OF_MEMORY : 0; \
  if (status) goto end;
#define END                    \
  end:                         \
  pthread_mutex_unlock(&lock); \
  return status;
#define REFUSE(why, what) do { status = forbidden(why, __func__, what); goto end; } while (0)

#define FIND(list, item)                      \
  ({                                          \
    __typeof__(list) at = list;               \
    while (at && (void *)at != (void *)item) at = at->next; \
    at;                                       \
  })

#define UNLINK(list, item)                    \
  do {                                        \
    __typeof__(list) *at = &list;             \
    while (*at != item) at = &(*at)->next;    \
    *at = item->next;                         \
    free(item);                               \
  } while (0)

static Memory *memory_at(Memory *list, const char *start, const char *end) {
  for (; list; list = list->next)
    if (list->start <= start && end <= list->end) return list;
  return NULL;
}

// The kernels of a module, as `stand_in_kernels` was given them.
static void (*run_kernel)(const char *, unsigned, unsigned, unsigned, const uint64_t *);
static char kernels[16][32];

static const char *source(const Copy3D *c) {
  return c->src_kind == 1 ? c->src_host : (const char *)c->src_device;
}

static const char *source_end(const Copy3D *c) {
  size_t rows = (c->depth - 1) * c->src_height + c->height - 1;
  return source(c) + rows * c->src_pitch + c->width;
}

static const char *target_end(const Copy3D *c) {
  size_t rows = (c->depth - 1) * c->dst_height + c->height - 1;
  return c->dst_host + rows * c->dst_pitch + c->width;
}

// Whether a copy reads or writes a piece of host memory.
static int touches(const Work *work, const Memory *memory) {
  const Copy3D *c = &work->copy;
  return (c->src_kind == 1 && memory->start <= source(c) && source(c) < memory->end) ||
         (c->dst_kind == 1 && memory->start <= c->dst_host && c->dst_host < memory->end);
}

static void carry_out(Stream *stream) {
  Work *work = stream->first;
  const Copy3D *c = &work->copy;
  stream->first = work->next;
  if (!stream->first) stream->last = NULL;
  if (work->event) {
    work->event->stream = NULL;
  } else if (work->waits) {
    while (work->waits->stream) carry_out(work->waits->stream);
  } else if (work->launch.kernel) {
    Launch *l = &work->launch;
    run_kernel(kernels[l->kernel], l->blocks, l->rows, l->threads, l->arguments);
  } else {
    char *to = c->dst_kind == 1 ? c->dst_host : (char *)c->dst_device;
    for (size_t z = 0; z < c->depth; z++)
      for (size_t y = 0; y < c->height; y++)
        memcpy(to + (z * c->dst_height + y) * c->dst_pitch,
               source(c) + (z * c->src_height + y) * c->src_pitch, c->width);
  }
  free(work);
}

static void forget(Stream *stream) {
  while (stream->first) {
    Work *work = stream->first;
    if (work->event) work->event->stream = NULL;
    stream->first = work->next;
    free(work);
  }
  stream->last = NULL;
}

static void queue(Stream *stream, Work what) {
  Work *work = malloc(sizeof *work);
  *work = what;
  if (stream->last) stream->last->next = work;
  else stream->first = work;
  stream->last = work;
}

// What tests ask and tell

const char *stand_in_violation(void) {
  static char last[sizeof violation];
  pthread_mutex_lock(&lock);
  memcpy(last, violation, sizeof last);
  violation[0] = 0;
  pthread_mutex_unlock(&lock);
  return last;
}

// The calls of a function but the next `after` fail, `times` of them.
void stand_in_fail(const char *call, int after, int times) {
  pthread_mutex_lock(&lock);
  snprintf(failing, sizeof failing, "%s", call);
  fails_after = after;
  fails_times = times;
  failed = 0;
  pthread_mutex_unlock(&lock);
}

// How many calls failed on command.
int stand_in_failed(void) { return failed; }

#define COUNT(name, list)                                        \
  int name(void) {                                               \
    int n = 0;                                                   \
    pthread_mutex_lock(&lock);                                   \
    for (__typeof__(list) at = list; at; at = at->next) n++;     \
    pthread_mutex_unlock(&lock);                                 \
    return n;                                                    \
  }

COUNT(stand_in_streams, streams)
COUNT(stand_in_events, events)
COUNT(stand_in_pinned, pinned)
COUNT(stand_in_allocated, allocated)

// How much is queued and not done.
int stand_in_queued(void) {
  int n = 0;
  pthread_mutex_lock(&lock);
  for (Stream *stream = streams; stream; stream = stream->next)
    for (Work *work = stream->first; work; work = work->next) n++;
  pthread_mutex_unlock(&lock);
  return n;
}

// Forgets what is queued, so that one test's failure is not the next one's.
void stand_in_forget(void) {
  pthread_mutex_lock(&lock);
  for (Stream *stream = streams; stream; stream = stream->next) forget(stream);
  pthread_mutex_unlock(&lock);
}

// Has kernels run: `run` is called with a kernel's name, the grid's two sizes, the threads of a
// block and the two arguments.
void stand_in_kernels(void (*run)(const char *, unsigned, unsigned, unsigned, const uint64_t *)) {
  run_kernel = run;
}

// What a driver has

int cuInit(unsigned flags) { return 0; }

int cuGetErrorName(int status, const char **name) {
  *name = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
  return 0;
}

int cuGetErrorString(int status, const char **text) {
  *text = status == OUT_OF_MEMORY ? "out of memory" : "see stand_in_violation";
  return 0;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return 0 <= ordinal && ordinal < GPUS ? 0 : INVALID_VALUE;
}

int cuDeviceGetCount(int *count) {
  *count = GPUS;
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = 0;  // a compute capability that there is no machine code for
  return 0;
}

int cuDeviceGetUuid_v2(char *uuid, int device) {
  memset(uuid, device, 16);
  return 0;
}

int cuDeviceGetPCIBusId(char *text, int n, int device) {
  return INVALID_VALUE;  // so that no NUMA node is near
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
  BEGIN
  retained[device] = 1;
  *context = (void *)(size_t)(device + 1);
  END
}

int cuCtxSetCurrent(void *context) {
  BEGIN
  size_t number = (size_t)context;
  if (number > GPUS || (number && !retained[number - 1])) REFUSE(INVALID_CONTEXT, "no context");
  contexts[depth] = (int)number;
  END
}

int cuCtxPushCurrent_v2(void *context) {
  BEGIN
  size_t number = (size_t)context;
  if (!number || number > GPUS || !retained[number - 1]) REFUSE(INVALID_CONTEXT, "no context");
  if (depth == 63) REFUSE(INVALID_CONTEXT, "pushed too often");
  contexts[++depth] = (int)number;
  END
}

int cuCtxPopCurrent_v2(void **context) {
  BEGIN
  if (!depth) REFUSE(INVALID_CONTEXT, "nothing was pushed");
  *context = (void *)(size_t)contexts[depth--];
  END
}

int cuMemHostRegister_v2(char *start, size_t nbytes, unsigned flags) {
  BEGIN
  if (current() < 0) REFUSE(INVALID_CONTEXT, "no current context");
  for (Memory *at = pinned; at; at = at->next)
    if (start < at->end && at->start < start + nbytes) REFUSE(712, "registered already");
  Memory *memory = malloc(sizeof *memory);
  *memory = (Memory){pinned, start, start + nbytes, current()};
  pinned = memory;
  END
}

int cuMemHostUnregister(char *start) {
  BEGIN
  if (current() < 0) REFUSE(INVALID_CONTEXT, "no current context");
  Memory *memory = pinned;
  while (memory && memory->start != start) memory = memory->next;
  Stream *early = NULL;
  if (!memory) REFUSE(713, "not registered");
  for (Stream *stream = streams; stream; stream = stream->next)
    for (Work *work = stream->first; work; work = work->next)
      if (touches(work, memory)) early = stream;
  if (early) {
    status = forbidden(INVALID_VALUE, __func__, "a copy from or to it is not done");
    forget(early);
  }
  UNLINK(pinned, memory);
  END
}

int cuMemAlloc_v2(uint64_t *pointer, size_t nbytes) {
  BEGIN
  if (current() < 0) REFUSE(INVALID_CONTEXT, "no current context");
  Memory *memory = malloc(sizeof *memory);
  char *start = malloc(nbytes);
  *memory = (Memory){allocated, start, start + nbytes, current()};
  allocated = memory;
  *pointer = (uint64_t)start;
  END
}

int cuMemFree_v2(uint64_t pointer) {
  BEGIN
  if (current() < 0) REFUSE(INVALID_CONTEXT, "no current context");
  Memory *memory = allocated;
  while (memory && memory->start != (char *)pointer) memory = memory->next;
  if (!memory) REFUSE(INVALID_VALUE, "not allocated");
  if (memory->gpu != current()) REFUSE(INVALID_CONTEXT, "memory of another GPU");
  for (Stream *stream = streams; stream; stream = stream->next)
    if (stream->gpu == current() && stream->first) REFUSE(INVALID_VALUE, "the GPU is not done");
  free((char *)pointer);
  UNLINK(allocated, memory);
  END
}

int cuStreamCreate(Stream **made, unsigned flags) {
  BEGIN
  if (current() < 0) REFUSE(INVALID_CONTEXT, "no current context");
  Stream *stream = calloc(1, sizeof *stream);
  *stream = (Stream){.next = streams, .gpu = current()};
  *made = streams = stream;
  END
}

int cuStreamSynchronize(Stream *stream) {
  BEGIN
  if (!FIND(streams, stream)) REFUSE(INVALID_HANDLE, "no such stream");
  while (stream->first) carry_out(stream);
  END
}

int cuStreamDestroy_v2(Stream *stream) {
  BEGIN
  if (!FIND(streams, stream)) REFUSE(INVALID_HANDLE, "no such stream");
  if (stream->first) status = forbidden(INVALID_HANDLE, __func__, "what is queued is not done");
  forget(stream);
  UNLINK(streams, stream);
  END
}

int cuEventCreate(Event **made, unsigned flags) {
  BEGIN
  if (current() < 0) REFUSE(INVALID_CONTEXT, "no current context");
  Event *event = calloc(1, sizeof *event);
  *event = (Event){.next = events, .gpu = current()};
  *made = events = event;
  END
}

int cuEventRecord(Event *event, Stream *stream) {
  BEGIN
  if (!FIND(events, event)) REFUSE(INVALID_HANDLE, "no such event");
  if (!FIND(streams, stream)) REFUSE(INVALID_HANDLE, "no such stream");
  if (event->gpu != stream->gpu) REFUSE(INVALID_HANDLE, "event and stream of two GPUs");
  if (event->stream) REFUSE(INVALID_HANDLE, "recorded again before it was seen to be done");
  event->stream = stream;
  event->looks = 0;
  queue(stream, (Work){.event = event});
  END
}

int cuEventQuery(Event *event) {
  BEGIN
  if (!FIND(events, event)) REFUSE(INVALID_HANDLE, "no such event");
  if (event->stream && ++event->looks < LAG) status = NOT_READY;
  else
    while (event->stream) carry_out(event->stream);
  END
}

int cuStreamWaitEvent(Stream *stream, Event *event, unsigned flags) {
  BEGIN
  if (!FIND(streams, stream)) REFUSE(INVALID_HANDLE, "no such stream");
  if (!FIND(events, event)) REFUSE(INVALID_HANDLE, "no such event");
  if (event->stream) queue(stream, (Work){.waits = event});
  END
}

int cuModuleLoadData(void **module, const char *image) {
  BEGIN
  if (current() < 0) REFUSE(INVALID_CONTEXT, "no current context");
  if (!run_kernel) REFUSE(INVALID_VALUE, "there are no kernels to run");
  *module = (void *)image;
  END
}

int cuModuleGetFunction(void **function, const char *module, const char *name) {
  BEGIN
  char entry[80];
  snprintf(entry, sizeof entry, ".entry %s(", name);
  if (!strstr(module, entry)) REFUSE(500, "no such kernel");
  size_t number = 1;
  while (kernels[number][0] && strcmp(kernels[number], name)) number++;
  snprintf(kernels[number], sizeof kernels[number], "%s", name);
  *function = (void *)number;
  END
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared, Stream *stream,
                   void **arguments, void **extra) {
  BEGIN
  if (!FIND(streams, stream)) REFUSE(INVALID_HANDLE, "no such stream");
  if (stream->gpu != current()) REFUSE(INVALID_HANDLE, "stream of another GPU");
  if (!x || !y || z != 1 || !threads || threads > 1024) REFUSE(INVALID_VALUE, "sizes");
  Launch launch = {(int)(size_t)function, x, y, threads,
                   {*(uint64_t *)arguments[0], *(uint64_t *)arguments[1]}};
  queue(stream, (Work){.launch = launch});
  END
}

int cuEventDestroy_v2(Event *event) {
  BEGIN
  if (!FIND(events, event)) REFUSE(INVALID_HANDLE, "no such event");
  if (event->stream) {
    status = forbidden(INVALID_HANDLE, __func__, "what it waits for is not done");
    forget(event->stream);
  }
  UNLINK(events, event);
  END
}

static int copy(const char *call, const Copy3D *c, Stream *stream) {
  if (current() < 0) return forbidden(INVALID_CONTEXT, call, "no current context");
  if (!FIND(streams, stream)) return forbidden(INVALID_HANDLE, call, "no such stream");
  if (stream->gpu != current()) return forbidden(INVALID_HANDLE, call, "stream of another GPU");
  if (!c->width || !c->height || !c->depth) return forbidden(INVALID_VALUE, call, "no bytes");
  if (c->src_kind == 1 && !memory_at(pinned, source(c), source_end(c)))
    return forbidden(INVALID_VALUE, call, "source is not pinned");
  if (c->dst_kind == 1 && !memory_at(pinned, c->dst_host, target_end(c)))
    return forbidden(INVALID_VALUE, call, "destination is not pinned");
  if (c->height * c->depth > 1 && (c->src_pitch < c->width || c->dst_pitch < c->width))
    return forbidden(INVALID_VALUE, call, "rows longer than their pitch");
  queue(stream, (Work){.copy = *c});
  return 0;
}

static Copy3D line(uint64_t dst, int kind, uint64_t src, size_t nbytes) {
  return (Copy3D){.src_kind = kind, .src_host = (char *)src, .src_device = src, .dst_kind = 2,
                  .dst_device = dst, .width = nbytes, .height = 1, .depth = 1};
}

int cuMemcpyHtoDAsync_v2(uint64_t dst, const void *src, size_t nbytes, Stream *stream) {
  BEGIN
  Copy3D c = line(dst, 1, (uint64_t)src, nbytes);
  status = copy(__func__, &c, stream);
  END
}

int cuMemcpyDtoDAsync_v2(uint64_t dst, uint64_t src, size_t nbytes, Stream *stream) {
  BEGIN
  Copy3D c = line(dst, 2, src, nbytes);
  status = copy(__func__, &c, stream);
  END
}

int cuMemcpy3DAsync_v2(const Copy3D *c, Stream *stream) {
  BEGIN
  status = copy(__func__, c, stream);
  END
}
