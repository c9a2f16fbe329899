/* A file system on which every open waits, as on a network: LD_PRELOAD this, with
 *   SLOW_OPEN_BELOW   a folder, absolute and without links; files elsewhere open at once
 *   SLOW_OPEN_MICROS  how long each open of a file below it takes longer
 * cc -O2 -shared -fPIC -o slow_open.so slow_open.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int delayed(int file)
{
    const char *below = getenv("SLOW_OPEN_BELOW"), *micros = getenv("SLOW_OPEN_MICROS");
    int error = errno;
    if (file >= 0 && below && micros) {
        char link[64], path[4096];
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        ssize_t size = readlink(link, path, sizeof path - 1);
        size_t length = strlen(below);
        if (size > (ssize_t)length && !memcmp(path, below, length) && path[length] == '/') {
            long wait = atol(micros);
            struct timespec left = {wait / 1000000, wait % 1000000 * 1000};
            while (nanosleep(&left, &left) && errno == EINTR) {}
        }
    }
    errno = error;
    return file;
}

/* the mode is there only when a file may be created; reading it otherwise does no harm */
#define MODE(last) va_list more; va_start(more, last); mode_t mode = va_arg(more, mode_t); va_end(more)
#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int open(const char *path, int flags, ...) { MODE(flags); NEXT(open); return delayed(next(path, flags, mode)); }
int open64(const char *path, int flags, ...) { MODE(flags); NEXT(open64); return delayed(next(path, flags, mode)); }
int openat(int at, const char *path, int flags, ...) { MODE(flags); NEXT(openat); return delayed(next(at, path, flags, mode)); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags); NEXT(openat64); return delayed(next(at, path, flags, mode)); }

/* what _FORTIFY_SOURCE makes of calls without a mode */
int __open_2(const char *, int);
int __open64_2(const char *, int);
int __openat_2(int, const char *, int);
int __openat64_2(int, const char *, int);
int __open_2(const char *path, int flags) { NEXT(__open_2); return delayed(next(path, flags)); }
int __open64_2(const char *path, int flags) { NEXT(__open64_2); return delayed(next(path, flags)); }
int __openat_2(int at, const char *path, int flags) { NEXT(__openat_2); return delayed(next(at, path, flags)); }
int __openat64_2(int at, const char *path, int flags) { NEXT(__openat64_2); return delayed(next(at, path, flags)); }
