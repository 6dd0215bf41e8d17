/* Ends a process at its N-th system call below a folder, for tests.campaigns.kill_points.

   Loaded by LD_PRELOAD. It counts the calls, of all threads together, that change a file or folder
   whose path lies below KILL_POINTS_FOLDER, and acts at the call with the number KILL_POINTS_AT, as
   KILL_POINTS_KIND says:

     kill    SIGKILL before the call; a write is first done by half
     full    this call and all later ones that need room fail with ENOSPC

   KILL_POINTS_LOG names a file that gets a line for each counted call. */

#define _GNU_SOURCE
#include <dlfcn.h>
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
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t folder_length;
static long at = -1;
static int full, log_file = -1;
static long calls;

/* Called by the campaign in the process that shall end. */
void kill_points_begin(const char *path, long number, int disk_full, const char *log_path) {
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
    full = disk_full;
    if (log_path && *log_path)
        log_file = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND, 0666);
    __atomic_store_n(&calls, 0, __ATOMIC_SEQ_CST);
    at = number;
}

long kill_points_counted(void) { return __atomic_load_n(&calls, __ATOMIC_SEQ_CST); }

__attribute__((constructor)) static void from_environment(void) {
    const char *path = getenv("KILL_POINTS_FOLDER"), *number = getenv("KILL_POINTS_AT");
    if (path && number) {
        const char *kind = getenv("KILL_POINTS_KIND");
        kill_points_begin(path, atol(number), kind && !strcmp(kind, "full"),
                          getenv("KILL_POINTS_LOG"));
        unsetenv("LD_PRELOAD"); /* children are not counted */
    }
}

static int below(const char *path) {
    return folder_length && path && !strncmp(path, folder, folder_length) &&
           (path[folder_length] == '/' || !path[folder_length]);
}

static int resolve(int directory, const char *path, char *whole) {
    char link[64];
    if (path && path[0] == '/') {
        snprintf(whole, PATH_MAX, "%s", path);
        return 1;
    }
    if (directory == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, whole, PATH_MAX - 1);
    if (length < 0)
        return 0;
    whole[length] = 0;
    if (path && *path && length + strlen(path) + 2 < PATH_MAX) {
        whole[length] = '/';
        strcpy(whole + length + 1, path);
    }
    return 1;
}

/* What a counted call must do: 0 go on, 1 end after half of it, 2 fail for want of room. */
static int count(const char *name, int directory, const char *path, int needs_room) {
    char whole[PATH_MAX];
    if (!folder_length || !resolve(directory, path, whole) || !below(whole))
        return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (log_file >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, name,
                              whole + folder_length);
        syscall(SYS_write, log_file, line, (size_t)length);
    }
    if (at < 0 || number < at)
        return 0;
    if (full)
        return needs_room ? 2 : 0;
    return number == at ? 1 : 0;
}

static void end(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define GUARD(label, directory, path, room)                                                        \
    int verdict = count(label, directory, path, room);                                             \
    if (verdict == 1)                                                                              \
        end();                                                                                     \
    if (verdict == 2) {                                                                            \
        errno = ENOSPC;                                                                            \
        return -1;                                                                                 \
    }

static int changes(int flags) { return flags & (O_CREAT | O_TRUNC); }

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;                                  \
        va_end(rest);                                                                              \
        if (changes(flags)) {                                                                      \
            GUARD("open", AT_FDCWD, path, flags & O_CREAT)                                         \
        }                                                                                          \
        return REAL(name)(path, flags, mode);                                                      \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                               \
    int name(int directory, const char *path, int flags, ...) {                                    \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;                                  \
        va_end(rest);                                                                              \
        if (changes(flags)) {                                                                      \
            GUARD("open", directory, path, flags & O_CREAT)                                        \
        }                                                                                          \
        return REAL(name)(directory, path, flags, mode);                                           \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size) {
    int verdict = folder_length ? count("write", file, NULL, 1) : 0;
    if (verdict == 1) {
        syscall(SYS_write, file, data, size / 2);
        end();
    }
    if (verdict == 2) {
        errno = ENOSPC;
        return -1;
    }
    return syscall(SYS_write, file, data, size);
}

#define PWRITE(name)                                                                               \
    ssize_t name(int file, const void *data, size_t size, off_t offset) {                          \
        int verdict = count("pwrite", file, NULL, 1);                                              \
        if (verdict == 1) {                                                                        \
            REAL(name)(file, data, size / 2, offset);                                              \
            end();                                                                                 \
        }                                                                                          \
        if (verdict == 2) {                                                                        \
            errno = ENOSPC;                                                                        \
            return -1;                                                                             \
        }                                                                                          \
        return REAL(name)(file, data, size, offset);                                               \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int file, const struct iovec *parts, int number) {
    int verdict = count("writev", file, NULL, 1);
    if (verdict == 1) {
        if (number)
            syscall(SYS_write, file, parts[0].iov_base, parts[0].iov_len / 2);
        end();
    }
    if (verdict == 2) {
        errno = ENOSPC;
        return -1;
    }
    return REAL(writev)(file, parts, number);
}

int rename(const char *from, const char *to) {
    GUARD("rename", AT_FDCWD, to, 0)
    return REAL(rename)(from, to);
}
int renameat(int from_directory, const char *from, int to_directory, const char *to) {
    GUARD("rename", to_directory, to, 0)
    return REAL(renameat)(from_directory, from, to_directory, to);
}
int renameat2(int from_directory, const char *from, int to_directory, const char *to,
              unsigned flags) {
    GUARD("rename", to_directory, to, 0)
    return REAL(renameat2)(from_directory, from, to_directory, to, flags);
}
int link(const char *from, const char *to) {
    GUARD("link", AT_FDCWD, to, 1)
    return REAL(link)(from, to);
}
int symlink(const char *from, const char *to) {
    GUARD("symlink", AT_FDCWD, to, 1)
    return REAL(symlink)(from, to);
}
int unlink(const char *path) {
    GUARD("unlink", AT_FDCWD, path, 0)
    return REAL(unlink)(path);
}
int unlinkat(int directory, const char *path, int flags) {
    GUARD("unlink", directory, path, 0)
    return REAL(unlinkat)(directory, path, flags);
}
int remove(const char *path) {
    GUARD("remove", AT_FDCWD, path, 0)
    return REAL(remove)(path);
}
int rmdir(const char *path) {
    GUARD("rmdir", AT_FDCWD, path, 0)
    return REAL(rmdir)(path);
}
int mkdir(const char *path, mode_t mode) {
    GUARD("mkdir", AT_FDCWD, path, 1)
    return REAL(mkdir)(path, mode);
}
int mkdirat(int directory, const char *path, mode_t mode) {
    GUARD("mkdir", directory, path, 1)
    return REAL(mkdirat)(directory, path, mode);
}
int fsync(int file) {
    GUARD("fsync", file, NULL, 0)
    return REAL(fsync)(file);
}
int fdatasync(int file) {
    GUARD("fdatasync", file, NULL, 0)
    return REAL(fdatasync)(file);
}
int ftruncate(int file, off_t size) {
    GUARD("ftruncate", file, NULL, 0)
    return REAL(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) {
    GUARD("ftruncate", file, NULL, 0)
    return REAL(ftruncate64)(file, size);
}
int truncate(const char *path, off_t size) {
    GUARD("truncate", AT_FDCWD, path, 0)
    return REAL(truncate)(path, size);
}
int close(int file) {
    /* A kill between the last write and the close. Only files that were opened below the folder
       for writing matter, and all of them are cheap to count. */
    if (folder_length && at != -1 && (fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY) {
        GUARD("close", file, NULL, 0)
    }
    return syscall(SYS_close, file);
}
