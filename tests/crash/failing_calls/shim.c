// Fails, hangs or ends a process at a call it makes on the files below one directory. Loaded with LD_PRELOAD, so that
// Python and the native core are met alike; told what to do through memory that other processes share (control.py).
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum kind { CHANGE = 1, LOOK = 2 };
// In place of an errno: a read gets only some of the blocks it asked for, as from a disk that fails in its middle.
enum { SHORT = -1 };

struct control {
    atomic_llong kinds;    // what is counted, and fails or hangs
    atomic_llong calls;    // made so far
    atomic_llong at;       // the number of the first one that fails; -1: none
    atomic_llong count;    // so many fail
    atomic_llong error;    // with this errno; 0: the process is killed before the first of them
    atomic_llong hanging;  // calls wait as long as this is not 0
    atomic_llong waiting;  // so many do
    atomic_llong failed;
    char what[512];  // the first one that failed
    char root[PATH_MAX];
};

static struct control* control;

__attribute__((constructor)) static void attach(void) {
    const char* path = getenv("HLFS_FAILING_CALLS");
    if (path == NULL)
        return;
    const int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0)
        abort();
    void* memory = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (memory == MAP_FAILED)
        abort();
    control = memory;
}

static bool counted(int kind) {
    return control != NULL && (control->kinds & kind) != 0;
}

// Whether the call is to fail; `path` is absolute.
static bool fails_at(const char* name, const char* path) {
    const size_t length = strlen(control->root);
    if (length == 0 || strncmp(path, control->root, length) != 0 || (path[length] != '/' && path[length] != '\0'))
        return false;
    if (control->hanging != 0) {
        ++control->waiting;
        while (control->hanging != 0)
            usleep(1000);
        --control->waiting;
    }
    const long long number = control->calls++;
    if (control->at < 0 || number < control->at || number >= control->at + control->count)
        return false;
    if (control->failed++ == 0)
        snprintf(control->what, sizeof control->what, "%s %s", name, path + length);
    if (control->error == 0) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = control->error == SHORT ? EIO : (int)control->error;
    return true;
}

static bool fd_fails(int kind, const char* name, int fd) {
    char link[64];
    char path[PATH_MAX];
    if (!counted(kind) || fd < 0)
        return false;
    const int error = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t got = readlink(link, path, sizeof path - 1);
    errno = error;
    if (got <= 0)
        return false;
    path[got] = '\0';
    return fails_at(name, path);
}

static bool path_fails(int kind, const char* name, int directory, const char* path) {
    char full[2 * PATH_MAX];
    if (!counted(kind) || path == NULL)
        return false;
    if (path[0] == '/')
        return fails_at(name, path);
    char link[64];
    const int error = errno;
    snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
    const ssize_t got = readlink(link, full, PATH_MAX - 1);
    errno = error;
    if (got <= 0)
        return false;
    snprintf(full + got, sizeof full - (size_t)got, "/%s", path);
    return fails_at(name, full);
}

// --- files

EXPORT ssize_t pwritev2(int fd, const struct iovec* parts, int count, off_t offset, int flags) {
    return fd_fails(CHANGE, "write", fd) ? -1 : syscall(SYS_pwritev2, fd, parts, count, offset, 0, flags);
}

EXPORT ssize_t pwritev(int fd, const struct iovec* parts, int count, off_t offset) {
    return fd_fails(CHANGE, "write", fd) ? -1 : syscall(SYS_pwritev2, fd, parts, count, offset, 0, 0);
}

EXPORT ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
    return fd_fails(CHANGE, "write", fd) ? -1 : syscall(SYS_pwrite64, fd, data, size, offset);
}

EXPORT ssize_t write(int fd, const void* data, size_t size) {
    return fd_fails(CHANGE, "write", fd) ? -1 : syscall(SYS_write, fd, data, size);
}

EXPORT int ftruncate(int fd, off_t size) {
    return fd_fails(CHANGE, "truncate", fd) ? -1 : (int)syscall(SYS_ftruncate, fd, size);
}

EXPORT int fallocate(int fd, int mode, off_t offset, off_t size) {
    return fd_fails(CHANGE, mode == 0 ? "allocate" : "punch", fd) ? -1
                                                                  : (int)syscall(SYS_fallocate, fd, mode, offset, size);
}

EXPORT int posix_fallocate(int fd, off_t offset, off_t size) {
    return fallocate(fd, 0, offset, size) == 0 ? 0 : errno;
}

EXPORT int fsync(int fd) {
    return fd_fails(CHANGE, "fsync", fd) ? -1 : (int)syscall(SYS_fsync, fd);
}

EXPORT int fdatasync(int fd) {
    return fd_fails(CHANGE, "fdatasync", fd) ? -1 : (int)syscall(SYS_fdatasync, fd);
}

// --- names

static mode_t mode_argument(int flags, va_list arguments) {
    return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

EXPORT int openat(int directory, const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = mode_argument(flags, arguments);
    va_end(arguments);
    const bool creates = (flags & O_CREAT) != 0;
    if (path_fails(creates ? CHANGE : CHANGE | LOOK, creates ? "create" : "open", directory, path))
        return -1;
    return (int)syscall(SYS_openat, directory, path, flags, mode);
}

EXPORT int open(const char* path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    const mode_t mode = mode_argument(flags, arguments);
    va_end(arguments);
    return openat(AT_FDCWD, path, flags, mode);
}

EXPORT int renameat2(int old_directory, const char* old, int new_directory, const char* new, unsigned flags) {
    if (path_fails(CHANGE, "rename", old_directory, old))
        return -1;
    return (int)syscall(SYS_renameat2, old_directory, old, new_directory, new, flags);
}

EXPORT int renameat(int old_directory, const char* old, int new_directory, const char* new) {
    return renameat2(old_directory, old, new_directory, new, 0);
}

EXPORT int rename(const char* old, const char* new) {
    return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0);
}

EXPORT int unlinkat(int directory, const char* path, int flags) {
    return path_fails(CHANGE, "unlink", directory, path) ? -1 : (int)syscall(SYS_unlinkat, directory, path, flags);
}

EXPORT int unlink(const char* path) {
    return unlinkat(AT_FDCWD, path, 0);
}

EXPORT int rmdir(const char* path) {
    return unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
}

EXPORT int mkdirat(int directory, const char* path, mode_t mode) {
    return path_fails(CHANGE, "mkdir", directory, path) ? -1 : (int)syscall(SYS_mkdirat, directory, path, mode);
}

EXPORT int mkdir(const char* path, mode_t mode) {
    return mkdirat(AT_FDCWD, path, mode);
}

EXPORT int utimensat(int directory, const char* path, const struct timespec times[2], int flags) {
    return path_fails(CHANGE, "set times", directory, path)
               ? -1
               : (int)syscall(SYS_utimensat, directory, path, times, flags);
}

// --- looks

// How much of a read comes, in bytes; -1: it fails.
static ssize_t readable(int fd, size_t size) {
    if (!fd_fails(LOOK, "read", fd))
        return (ssize_t)size;
    return control->error == SHORT && size > 512 ? (ssize_t)(size / 2 / 512 * 512) : -1;
}

EXPORT ssize_t pread(int fd, void* data, size_t size, off_t offset) {
    const ssize_t much = readable(fd, size);
    return much < 0 ? -1 : syscall(SYS_pread64, fd, data, (size_t)much, offset);
}

EXPORT ssize_t read(int fd, void* data, size_t size) {
    const ssize_t much = readable(fd, size);
    return much < 0 ? -1 : syscall(SYS_read, fd, data, (size_t)much);
}

EXPORT off_t lseek(int fd, off_t offset, int whence) {
    if ((whence == SEEK_DATA || whence == SEEK_HOLE) && fd_fails(LOOK, "seek", fd))
        return -1;
    return syscall(SYS_lseek, fd, offset, whence);
}

EXPORT int fstatat(int directory, const char* path, struct stat* found, int flags) {
    const bool itself = path[0] == '\0' && (flags & AT_EMPTY_PATH) != 0;
    if (itself ? fd_fails(LOOK, "stat", directory) : path_fails(LOOK, "stat", directory, path))
        return -1;
    return (int)syscall(SYS_newfstatat, directory, path, found, flags);
}

EXPORT int stat(const char* path, struct stat* found) {
    return fstatat(AT_FDCWD, path, found, 0);
}

EXPORT int lstat(const char* path, struct stat* found) {
    return fstatat(AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW);
}

EXPORT int fstat(int fd, struct stat* found) {
    return fstatat(fd, "", found, AT_EMPTY_PATH);
}

EXPORT DIR* opendir(const char* path) {
    static DIR* (*next)(const char*);
    if (next == NULL)
        *(void**)&next = dlsym(RTLD_NEXT, "opendir");
    return path_fails(LOOK, "list", AT_FDCWD, path) ? NULL : next(path);
}

EXPORT struct dirent* readdir(DIR* directory) {
    static struct dirent* (*next)(DIR*);
    if (next == NULL)
        *(void**)&next = dlsym(RTLD_NEXT, "readdir");
    return fd_fails(LOOK, "list", dirfd(directory)) ? NULL : next(directory);
}

EXPORT int statvfs(const char* path, struct statvfs* found) {
    static int (*next)(const char*, struct statvfs*);
    if (next == NULL)
        *(void**)&next = dlsym(RTLD_NEXT, "statvfs");
    return path_fails(LOOK, "statvfs", AT_FDCWD, path) ? -1 : next(path, found);
}

EXPORT int fstatvfs(int fd, struct statvfs* found) {
    static int (*next)(int, struct statvfs*);
    if (next == NULL)
        *(void**)&next = dlsym(RTLD_NEXT, "fstatvfs");
    return fd_fails(LOOK, "statvfs", fd) ? -1 : next(fd, found);
}

// Reads of the core are seen only where they are calls of its own, so while looks fail the kernel refuses io_setup(2).
EXPORT long syscall(long number, ...) {
    static long (*next)(long, ...);
    if (number == SYS_io_setup && counted(LOOK)) {
        errno = EPERM;
        return -1;
    }
    if (next == NULL)
        *(void**)&next = dlsym(RTLD_NEXT, "syscall");
    va_list arguments;
    va_start(arguments, number);
    long values[6];
    for (int i = 0; i < 6; ++i)
        values[i] = va_arg(arguments, long);
    va_end(arguments);
    return next(number, values[0], values[1], values[2], values[3], values[4], values[5]);
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
ssize_t pread64(int, void*, size_t, off_t) ALIAS("pread");
off_t lseek64(int, off_t, int) ALIAS("lseek");
struct stat64;
int stat64(const char*, struct stat64*) ALIAS("stat");
int lstat64(const char*, struct stat64*) ALIAS("lstat");
int fstat64(int, struct stat64*) ALIAS("fstat");
int fstatat64(int, const char*, struct stat64*, int) ALIAS("fstatat");
struct dirent64* readdir64(DIR*) ALIAS("readdir");
struct statvfs64;
int statvfs64(const char*, struct statvfs64*) ALIAS("statvfs");
int fstatvfs64(int, struct statvfs64*) ALIAS("fstatvfs");
