/* What a process does to the files below one directory: counted, recorded, and at a chosen point stopped or failed.

   Preloaded by effects.py. An effect is a call that changes the file system or makes it durable: a name made, changed or
   taken away, bytes written or cut off, a sync. Nothing is armed until `effects_arm` is called, and a fork is armed anew.

   Record, one line for each effect: KIND \t PATH \t OTHER PATH \t OFFSET \t LENGTH \n, then LENGTH bytes. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PASS, KILL, TEAR, FAIL, STOP, LIE = 8 };

static char under[PATH_MAX], kinds[256];
static int mode = PASS, error_number, record_fd = -1;
static long wanted, seen;

/* Start counting below `directory` (none: stop). At the `number`-th effect whose kind is in `which` (",fsync,write,"; empty:
   any) act as `how` says: KILL before it, TEAR a write in its middle and die, FAIL it with `error`. STOP: SIGSTOP before
   every one of them, and at every note. LIE, alone or with STOP: syncs do nothing and say that all is well. */
void effects_arm(const char *directory, const char *record, int how, const char *which, long number, int error) {
    snprintf(under, sizeof under, "%s", directory);
    snprintf(kinds, sizeof kinds, "%s", which);
    mode = how, wanted = number, seen = 0, error_number = error;
    if (record_fd >= 0) syscall(SYS_close, record_fd);
    record_fd = -1;
    if (*record) record_fd = syscall(SYS_openat, AT_FDCWD, record, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

long effects_seen(void) { return seen; }

static int ours(const char *path) {
    size_t length = strlen(under);
    return length && !strncmp(path, under, length) && (path[length] == '/' || path[length] == 0);
}

static const char *of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return path;
}

static const char *at(int fd, const char *name, char *path) {
    if (name[0] == '/') return strncpy(path, name, PATH_MAX);
    char base[PATH_MAX];
    if (fd == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; }
    else of_fd(fd, base);
    snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
    return path;
}

static void put(const void *data, size_t length) {
    for (const char *next = data; length;) {
        ssize_t done = syscall(SYS_write, record_fd, next, length);
        if (done <= 0) abort();
        next += done, length -= done;
    }
}

/* Say that an effect comes; 0: do it, 1: fail with errno, 2: tear it, 3: pretend. */
static int comes(const char *kind, const char *path, const char *other, off_t offset, const void *data, size_t length) {
    if (!ours(path)) return 0;
    char listed[64];
    snprintf(listed, sizeof listed, ",%s,", kind);
    int counts = !*kinds || strstr(kinds, listed) != NULL;
    if (counts && ++seen == wanted) {
        if ((mode & 7) == KILL) syscall(SYS_kill, getpid(), SIGKILL);
        if ((mode & 7) == TEAR) return 2;
        if ((mode & 7) == FAIL) { errno = error_number; return 1; }
    }
    if ((mode & 7) == STOP && counts) syscall(SYS_kill, getpid(), SIGSTOP);
    if (record_fd >= 0) {
        char line[2 * PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s\t%s\t%s\t%lld\t%zu\n", kind, path, other, (long long)offset, length);
        put(line, size);
        put(data, length);
    }
    return mode & LIE && !strcmp(kind, "fsync") ? 3 : 0;
}

/* A word of the test's own in the record, such as "saved b". */
void effects_note(const char *text) {
    if ((mode & 7) == STOP) syscall(SYS_kill, getpid(), SIGSTOP);
    if (record_fd >= 0) { char line[256]; put(line, snprintf(line, sizeof line, "note\t%s\t\t0\t0\n", text)); }
}

static int opened(int fd, const char *name, int flags, int mode_bits) {
    char path[PATH_MAX];
    struct stat found;
    if (flags & (O_CREAT | O_TRUNC)) {
        at(fd, name, path);
        int new = syscall(SYS_newfstatat, fd, name, &found, 0) != 0;
        if (new && flags & O_CREAT && comes("create", path, "", 0, "", 0) == 1) return -1;
        if (!new && flags & O_TRUNC && found.st_size && comes("truncate", path, "", 0, "", 0) == 1) return -1;
    }
    return syscall(SYS_openat, fd, name, flags, mode_bits);
}

#define OPEN(symbol) int symbol(const char *name, int flags, ...) { \
    va_list rest; va_start(rest, flags); int bits = flags & O_CREAT ? va_arg(rest, int) : 0; va_end(rest); \
    return opened(AT_FDCWD, name, flags, bits); }
#define OPENAT(symbol) int symbol(int fd, const char *name, int flags, ...) { \
    va_list rest; va_start(rest, flags); int bits = flags & O_CREAT ? va_arg(rest, int) : 0; va_end(rest); \
    return opened(fd, name, flags, bits); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

static ssize_t writes(int fd, const void *data, size_t length, off_t offset, int positioned) {
    char path[PATH_MAX];
    if (*under && ours(of_fd(fd, path))) {
        off_t where = positioned ? offset : lseek(fd, 0, SEEK_CUR);
        int how = comes("write", path, "", where, data, length);
        if (how == 1) return -1;
        if (how == 2) {
            syscall(SYS_pwrite64, fd, data, length / 2, where);
            syscall(SYS_kill, getpid(), SIGKILL);
        }
    }
    return positioned ? syscall(SYS_pwrite64, fd, data, length, offset) : syscall(SYS_write, fd, data, length);
}

ssize_t write(int fd, const void *data, size_t length) { return writes(fd, data, length, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) { return writes(fd, data, length, offset, 1); }
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) { return writes(fd, data, length, offset, 1); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    if (!*under || !ours(of_fd(fd, path))) return syscall(SYS_writev, fd, parts, count);
    ssize_t all = 0;
    for (int part = 0; part < count; part++) {
        ssize_t done = writes(fd, parts[part].iov_base, parts[part].iov_len, 0, 0);
        if (done < 0) return all ? all : -1;
        all += done;
        if ((size_t)done < parts[part].iov_len) break;
    }
    return all;
}

static int syncs(int fd, int call) {
    char path[PATH_MAX];
    if (*under) {
        int how = comes("fsync", of_fd(fd, path), "", 0, "", 0);
        if (how == 1) return -1;
        if (how == 3) return 0;
    }
    return syscall(call, fd);
}

int fsync(int fd) { return syncs(fd, SYS_fsync); }
int fdatasync(int fd) { return syncs(fd, SYS_fdatasync); }

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    char one[PATH_MAX], other[PATH_MAX];
    if (comes("rename", at(from_fd, from, one), at(to_fd, to, other), 0, "", 0) == 1) return -1;
    return syscall(SYS_renameat2, from_fd, from, to_fd, to, flags);
}
int renameat(int from_fd, const char *from, int to_fd, const char *to) { return renameat2(from_fd, from, to_fd, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int mkdirat(int fd, const char *name, mode_t bits) {
    char path[PATH_MAX];
    struct stat found;
    if (syscall(SYS_newfstatat, fd, name, &found, 0) && comes("mkdir", at(fd, name, path), "", 0, "", 0) == 1) return -1;
    return syscall(SYS_mkdirat, fd, name, bits);
}
int mkdir(const char *name, mode_t bits) { return mkdirat(AT_FDCWD, name, bits); }

int unlinkat(int fd, const char *name, int flags) {
    char path[PATH_MAX];
    struct stat found;
    const char *kind = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    if (!syscall(SYS_newfstatat, fd, name, &found, AT_SYMLINK_NOFOLLOW) &&
        comes(kind, at(fd, name, path), "", 0, "", 0) == 1) return -1;
    return syscall(SYS_unlinkat, fd, name, flags);
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int ftruncate(int fd, off_t length) {
    char path[PATH_MAX];
    if (*under && comes("truncate", of_fd(fd, path), "", length, "", 0) == 1) return -1;
    return syscall(SYS_ftruncate, fd, length);
}
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }
