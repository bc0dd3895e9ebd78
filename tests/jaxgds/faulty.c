// Preloaded into a process: reads, writes and opens of files whose path contains a given string
// fail as told by fault(). For Linux on 64 bits, where off_t and off64_t are one.
#define _GNU_SOURCE
#include <aio.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, EIO_READ, SHORT_READ, EINTR_READ, END_READ, STALL_READ, EACCES_OPEN, ENOSPC_WRITE };

static volatile int kind;
static char part[4096] = "\1";
static volatile int count;  // of faults so far

void fault(int what, const char *path_part) {
  kind = NONE;
  strncpy(part, path_part, sizeof part - 1);
  count = 0;
  kind = what;
}

int faults(void) { return count; }

static int hit(int fd) {
  char link[64], path[4096];
  if (kind == NONE) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strstr(path, part) != NULL;
}

static void stall(void) {
  while (kind == STALL_READ) nanosleep(&(struct timespec){0, 10000000}, NULL);
}

// Before a read: what to return instead; -2 for going on, with at most *limit bytes.
static ssize_t before_read(int fd, size_t *limit) {
  if (!hit(fd)) return -2;
  int now = kind;
  __sync_fetch_and_add(&count, 1);
  switch (now) {
    case EIO_READ: errno = EIO; return -1;
    case EINTR_READ:
      if (count % 2) { errno = EINTR; return -1; }
      return -2;
    case END_READ: return 0;
    case SHORT_READ: *limit = 1 + count % 1000; return -2;
    case STALL_READ:
      stall();
      return -2;
  }
  return -2;
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = dlsym(RTLD_NEXT, #name)

#define READ(name, params, args)                      \
  ssize_t name params {                               \
    NEXT(name);                                       \
    size_t limit = size;                              \
    ssize_t instead = before_read(fd, &limit);        \
    if (instead != -2) return instead;                \
    if (limit < size) size = limit;                   \
    return next args;                                 \
  }

READ(read, (int fd, void *buffer, size_t size), (fd, buffer, size))
READ(pread, (int fd, void *buffer, size_t size, off_t at), (fd, buffer, size, at))
READ(pread64, (int fd, void *buffer, size_t size, off64_t at), (fd, buffer, size, at))

#define READV(name, params, args, at_once)                                \
  ssize_t name params {                                                   \
    NEXT(name);                                                           \
    if (kind == STALL_READ && (at_once)) return next args;                \
    size_t limit = (size_t)-1;                                            \
    ssize_t instead = before_read(fd, &limit);                            \
    struct iovec one;                                                     \
    if (instead != -2) return instead;                                    \
    if (limit != (size_t)-1 && n > 0 && limit < vectors[0].iov_len) {     \
      one = (struct iovec){vectors[0].iov_base, limit};                   \
      vectors = &one;                                                     \
      n = 1;                                                              \
    }                                                                     \
    return next args;                                                     \
  }

READV(preadv, (int fd, const struct iovec *vectors, int n, off_t at), (fd, vectors, n, at), 0)
READV(preadv64, (int fd, const struct iovec *vectors, int n, off64_t at), (fd, vectors, n, at), 0)
READV(preadv2, (int fd, const struct iovec *vectors, int n, off_t at, int flags),
      (fd, vectors, n, at, flags), flags & RWF_NOWAIT)
READV(preadv64v2, (int fd, const struct iovec *vectors, int n, off64_t at, int flags),
      (fd, vectors, n, at, flags), flags & RWF_NOWAIT)

// glibc's own threads, which call no function that could be replaced, carry these out.

static int ended(struct aiocb64 *block, ssize_t returned, int error) {
  block->__return_value = returned;
  __atomic_store_n(&block->__error_code, error, __ATOMIC_RELEASE);
  return 1;
}

static void *read_late(void *block) {
  NEXT(aio_read64);
  stall();
  if (next(block)) ended(block, -1, errno);
  return NULL;
}

// Whether what is done with a read is done already.
static int instead_of(struct aiocb64 *block) {
  size_t limit = block->aio_nbytes;
  pthread_t thread;
  if (kind == STALL_READ && hit(block->aio_fildes)) {
    __sync_fetch_and_add(&count, 1);
    block->__error_code = EINPROGRESS;
    return !pthread_create(&thread, NULL, read_late, block) && !pthread_detach(thread);
  }
  ssize_t instead = before_read(block->aio_fildes, &limit);
  if (instead != -2) return ended(block, instead, instead < 0 ? errno : 0);
  if (limit < block->aio_nbytes) block->aio_nbytes = limit;
  return 0;
}

int lio_listio64(int mode, struct aiocb64 *const blocks[], int number, struct sigevent *then) {
  NEXT(lio_listio64);
  struct aiocb64 *left[number];
  for (int i = 0; i < number; i++) left[i] = instead_of(blocks[i]) ? NULL : blocks[i];
  return next(mode, left, number, then);
}

#define OPEN(name)                                             \
  int name(const char *path, int flags, ...) {                 \
    NEXT(name);                                                \
    va_list rest;                                              \
    va_start(rest, flags);                                     \
    mode_t mode = va_arg(rest, mode_t);                        \
    va_end(rest);                                              \
    if (kind == EACCES_OPEN && strstr(path, part)) {           \
      __sync_fetch_and_add(&count, 1);                         \
      errno = EACCES;                                          \
      return -1;                                               \
    }                                                          \
    return next(path, flags, mode);                            \
  }

OPEN(open)
OPEN(open64)

static int full(int fd) {
  if (kind != ENOSPC_WRITE || !hit(fd)) return 0;
  errno = ENOSPC;
  return __sync_fetch_and_add(&count, 1) > 0;  // the first write still finds room
}

ssize_t write(int fd, const void *buffer, size_t size) {
  NEXT(write);
  return full(fd) ? -1 : next(fd, buffer, size);
}

ssize_t pwrite64(int fd, const void *buffer, size_t size, off64_t at) {
  NEXT(pwrite64);
  return full(fd) ? -1 : next(fd, buffer, size, at);
}

ssize_t pwrite(int fd, const void *buffer, size_t size, off_t at) {
  NEXT(pwrite);
  return full(fd) ? -1 : next(fd, buffer, size, at);
}
