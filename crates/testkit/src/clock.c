// A wall clock that is wrong, preloaded before the C library's. Each reading is off by the next of the seconds in
// WRONG_CLOCK (separated by commas), and after the last one by the first again.

#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { JUMPS_MAX = 64 };

static int read_jumps(long long jumps[JUMPS_MAX]) {
    const char *text = getenv("WRONG_CLOCK");
    int count = 0;
    while (text && *text && count < JUMPS_MAX) {
        char *end;
        jumps[count++] = strtoll(text, &end, 10);
        text = *end == ',' ? end + 1 : NULL;
    }
    return count;
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    static atomic_uint readings;
    long long jumps[JUMPS_MAX];
    int failed = (int)syscall(SYS_clock_gettime, clock, at);
    if (!failed && clock == CLOCK_REALTIME) {
        int count = read_jumps(jumps);
        if (count) at->tv_sec += jumps[atomic_fetch_add(&readings, 1) % count];
    }
    return failed;
}
