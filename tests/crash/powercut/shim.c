// Writes down what a process does to the disk of one directory, in the order in which it does it. Loaded with
// LD_PRELOAD, so that Python and the native core are seen alike.
//
// A record says that a call begins, another that it has ended, since a sync covers only what had ended before it began.
// Calls that change names are made one at a time and have one record, after the call. What is not seen here (mmap,
// links, io_uring) is found out by comparing the trace with the directory; see trace.py, which is this format's reader.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

struct record {
    uint64_t kind;  // a letter
    uint64_t size;  // of the data that follows
    uint64_t call;  // joins beginning and end
    uint64_t inode;
    int64_t a, b, c;
};

static atomic_int trace_fd = -1;
static atomic_ullong last_call;
static atomic_uint max_delay_us;
static atomic_int failing;  // the kind of call of which the next one fails
static char root[PATH_MAX];
static size_t root_length;
static dev_t root_device;
static pthread_mutex_t names = PTHREAD_MUTEX_INITIALIZER;

// O_APPEND makes one order of all threads' records.
static void put(struct record record, const void* data, size_t size) {
    const int error = errno;
    record.size = size;
    const struct iovec parts[2] = {{&record, sizeof record}, {(void*)data, size}};
    if (syscall(SYS_writev, trace_fd, parts, 2) != (long)(sizeof record + size))
        abort();
    errno = error;
}

EXPORT void powercut_start(const char* directory, const char* trace_path) {
    struct stat info;
    if (stat(directory, &info) != 0)
        abort();
    root_device = info.st_dev;
    root_length = strlen(directory);
    memcpy(root, directory, root_length + 1);
    trace_fd = (int)syscall(SYS_openat, AT_FDCWD, trace_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (trace_fd < 0)
        abort();
}

EXPORT void powercut_stop(void) {
    syscall(SYS_close, atomic_exchange(&trace_fd, -1));
}

// What the test itself has to say, in order with all else.
EXPORT void powercut_note(const char* text, size_t size) {
    put((struct record){.kind = 'n'}, text, size);
}

// Calls take up to so much longer, so that more of them are under way at once.
EXPORT void powercut_delay(unsigned microseconds) {
    max_delay_us = microseconds;
}

// The next write or sync ('w' or 's') by the core fails, having done nothing; 0: none does. Tells what was still to
// fail.
EXPORT int powercut_fail(int kind) {
    return atomic_exchange(&failing, kind);
}

static bool fails(int kind) {
    if (!atomic_compare_exchange_strong(&failing, &kind, 0))
        return false;
    errno = EIO;
    return true;
}

static void delay(void) {
    static _Thread_local unsigned state;
    if (max_delay_us == 0)
        return;
    if (state == 0)
        state = (unsigned)gettid() * 2654435761U + 1;
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    if (state % 4 == 0)
        usleep(state / 4 % max_delay_us);
}

// Whether calls on the descriptor are to be written down; the reader knows which inodes are below the root.
static bool watched(int fd, uint64_t* inode) {
    struct stat info;
    if (trace_fd < 0 || fd < 0)
        return false;
    const int error = errno;
    const bool found =
        fstat(fd, &info) == 0 && (S_ISREG(info.st_mode) || S_ISDIR(info.st_mode)) && info.st_dev == root_device;
    errno = error;
    *inode = info.st_ino;
    return found;
}

static uint64_t begin(uint64_t kind, uint64_t inode, int64_t a, int64_t b, int64_t c, const void* data, size_t size) {
    const uint64_t call = ++last_call;
    put((struct record){.kind = kind, .call = call, .inode = inode, .a = a, .b = b, .c = c}, data, size);
    delay();
    return call;
}

static long end(uint64_t call, long result) {
    put((struct record){.kind = 'e', .call = call, .a = result}, NULL, 0);
    return result;
}

// --- files

static ssize_t traced_write(int fd, const struct iovec* parts, int count, off_t offset, int flags, bool may_fail) {
    // -1 with SYS_pwritev2 is the file's own offset.
    uint64_t inode;
    if (!watched(fd, &inode))
        return syscall(SYS_pwritev2, fd, parts, count, offset, 0, flags);
    const int modes = fcntl(fd, F_GETFL);
    struct stat info;
    off_t at = offset;
    if ((modes & O_APPEND) != 0 && fstat(fd, &info) == 0)
        at = info.st_size;
    else if (offset == -1)
        at = lseek(fd, 0, SEEK_CUR);
    size_t size = 0;
    for (int i = 0; i < count; ++i)
        size += parts[i].iov_len;
    char* copy = malloc(size + 1);
    if (copy == NULL)
        abort();
    size_t filled = 0;
    for (int i = 0; i < count; ++i) {
        memcpy(copy + filled, parts[i].iov_base, parts[i].iov_len);
        filled += parts[i].iov_len;
    }
    const bool synced = (modes & O_DSYNC) != 0 || (flags & (RWF_DSYNC | RWF_SYNC)) != 0;
    const uint64_t call = begin('w', inode, at, synced, 0, copy, size);
    free(copy);
    if (may_fail && fails('w'))
        return end(call, -1);
    return end(call, syscall(SYS_pwritev2, fd, parts, count, offset, 0, flags));
}

EXPORT ssize_t pwritev2(int fd, const struct iovec* parts, int count, off_t offset, int flags) {
    return traced_write(fd, parts, count, offset, flags, false);
}

EXPORT ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t offset) {
    return traced_write(fd, parts, count, offset, 0, true);
}

EXPORT ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
    const struct iovec part = {(void*)data, size};
    return traced_write(fd, &part, 1, offset, 0, false);
}

EXPORT ssize_t writev(int fd, const struct iovec* parts, int count) {
    uint64_t inode;
    return watched(fd, &inode) ? traced_write(fd, parts, count, -1, 0, false) : syscall(SYS_writev, fd, parts, count);
}

EXPORT ssize_t write(int fd, const void* data, size_t size) {
    uint64_t inode;
    const struct iovec part = {(void*)data, size};
    return watched(fd, &inode) ? traced_write(fd, &part, 1, -1, 0, false) : syscall(SYS_write, fd, data, size);
}

EXPORT int ftruncate(int fd, off_t size) {
    uint64_t inode;
    if (!watched(fd, &inode))
        return (int)syscall(SYS_ftruncate, fd, size);
    const uint64_t call = begin('t', inode, size, 0, 0, NULL, 0);
    return (int)end(call, syscall(SYS_ftruncate, fd, size));
}

EXPORT int fallocate(int fd, int mode, off_t offset, off_t size) {
    uint64_t inode;
    if (!watched(fd, &inode))
        return (int)syscall(SYS_fallocate, fd, mode, offset, size);
    const uint64_t call = begin('a', inode, offset, size, mode, NULL, 0);
    return (int)end(call, syscall(SYS_fallocate, fd, mode, offset, size));
}

EXPORT int posix_fallocate(int fd, off_t offset, off_t size) {
    return fallocate(fd, 0, offset, size) == 0 ? 0 : errno;
}

static int traced_sync(int fd, long number, bool data_only) {
    uint64_t inode;
    if (!watched(fd, &inode))
        return (int)syscall(number, fd);
    const uint64_t call = begin('s', inode, data_only, 0, 0, NULL, 0);
    if (data_only && fails('s'))
        return (int)end(call, -1);
    return (int)end(call, syscall(number, fd));
}

EXPORT int fsync(int fd) {
    return traced_sync(fd, SYS_fsync, false);
}

EXPORT int fdatasync(int fd) {
    return traced_sync(fd, SYS_fdatasync, true);
}

EXPORT int syncfs(int fd) {
    uint64_t inode;
    if (!watched(fd, &inode))
        return (int)syscall(SYS_syncfs, fd);
    const uint64_t call = begin('S', 0, 0, 0, 0, NULL, 0);
    return (int)end(call, syscall(SYS_syncfs, fd));
}

// --- names

// Whether a path leads below the root; `full` is it from the root directory on.
static bool below_root(int directory, const char* path, char* full) {
    size_t length = 0;
    if (trace_fd < 0)
        return false;
    if (path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
        const ssize_t got = readlink(link, full, PATH_MAX - 1);
        if (got <= 0)
            return false;
        length = (size_t)got;
        full[length++] = '/';
    }
    if (length + strlen(path) >= PATH_MAX)
        return false;
    strcpy(full + length, path);
    return strncmp(full, root, root_length) == 0 && full[root_length] == '/';
}

static void put_name(uint64_t kind, uint64_t inode, int64_t a, const char* path) {
    put((struct record){.kind = kind, .inode = inode, .a = a}, path, strlen(path));
}

static int traced_open(int directory, const char* path, int flags, mode_t mode) {
    char full[PATH_MAX];
    if ((flags & (O_CREAT | O_TRUNC)) == 0 || !below_root(directory, path, full))
        return (int)syscall(SYS_openat, directory, path, flags, mode);
    struct stat info;
    pthread_mutex_lock(&names);
    const bool existed = fstatat(directory, path, &info, 0) == 0;
    const int fd = (int)syscall(SYS_openat, directory, path, flags, mode);
    if (fd >= 0 && fstat(fd, &info) == 0) {
        if (!existed)
            put_name('c', info.st_ino, 0, full);
        else if ((flags & O_TRUNC) != 0)
            end(begin('t', info.st_ino, 0, 0, 0, NULL, 0), 0);
    }
    pthread_mutex_unlock(&names);
    return fd;
}

static mode_t mode_argument(int flags, va_list arguments) {
    return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

EXPORT int open(const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = mode_argument(flags, arguments);
    va_end(arguments);
    return traced_open(AT_FDCWD, path, flags, mode);
}

EXPORT int openat(int directory, const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = mode_argument(flags, arguments);
    va_end(arguments);
    return traced_open(directory, path, flags, mode);
}

EXPORT int renameat2(int old_directory, const char* old, int new_directory, const char* new, unsigned flags) {
    char full[2 * PATH_MAX];
    const bool traced = below_root(old_directory, old, full) && below_root(new_directory, new, full + strlen(full) + 1);
    if (!traced)
        return (int)syscall(SYS_renameat2, old_directory, old, new_directory, new, flags);
    pthread_mutex_lock(&names);
    const int result = (int)syscall(SYS_renameat2, old_directory, old, new_directory, new, flags);
    if (result == 0) {
        const size_t size = strlen(full) + 1 + strlen(full + strlen(full) + 1);
        put((struct record){.kind = 'r', .a = flags}, full, size);
    }
    pthread_mutex_unlock(&names);
    return result;
}

EXPORT int renameat(int old_directory, const char* old, int new_directory, const char* new) {
    return renameat2(old_directory, old, new_directory, new, 0);
}

EXPORT int rename(const char* old, const char* new) {
    return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0);
}

EXPORT int unlinkat(int directory, const char* path, int flags) {
    char full[PATH_MAX];
    if (!below_root(directory, path, full))
        return (int)syscall(SYS_unlinkat, directory, path, flags);
    pthread_mutex_lock(&names);
    const int result = (int)syscall(SYS_unlinkat, directory, path, flags);
    if (result == 0)
        put_name('u', 0, 0, full);
    pthread_mutex_unlock(&names);
    return result;
}

EXPORT int unlink(const char* path) {
    return unlinkat(AT_FDCWD, path, 0);
}

EXPORT int rmdir(const char* path) {
    return unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}

EXPORT int mkdirat(int directory, const char* path, mode_t mode) {
    char full[PATH_MAX];
    if (!below_root(directory, path, full))
        return (int)syscall(SYS_mkdirat, directory, path, mode);
    struct stat info;
    pthread_mutex_lock(&names);
    const int result = (int)syscall(SYS_mkdirat, directory, path, mode);
    if (result == 0 && fstatat(directory, path, &info, 0) == 0)
        put_name('d', info.st_ino, 0, full);
    pthread_mutex_unlock(&names);
    return result;
}

EXPORT int mkdir(const char* path, mode_t mode) {
    return mkdirat(AT_FDCWD, path, mode);
}

// The same calls under their other names, which is what Python and large-file builds use.
#define ALIAS(name) __attribute__((alias(name), visibility("default")))
ssize_t pwrite64(int, const void*, size_t, off_t) ALIAS("pwrite");
ssize_t pwritev64(int, const struct iovec*, int, off_t) ALIAS("pwritev");
ssize_t pwritev64v2(int, const struct iovec*, int, off_t, int) ALIAS("pwritev2");
int ftruncate64(int, off_t) ALIAS("ftruncate");
int fallocate64(int, int, off_t, off_t) ALIAS("fallocate");
int posix_fallocate64(int, off_t, off_t) ALIAS("posix_fallocate");
int open64(const char*, int, ...) ALIAS("open");
int openat64(int, const char*, int, ...) ALIAS("openat");
