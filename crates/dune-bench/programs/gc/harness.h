/*
 * What the programs have in common: `PROGRAM CONTENDER [SIZE]`, where SIZE
 * scales the work in percent (100 by default), and one line of JSON at the
 * end. The checksum depends on the program and its size alone: two collectors
 * that disagree about it have lost or mixed up an object.
 */
#ifndef HARNESS_H
#define HARNESS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* memmem, clock_gettime */
#endif

#include "gc_api.h"

#include <inttypes.h>

/* A generator of pseudo-random numbers (xorshift64*), the same everywhere. */
struct random {
    uint64_t state;
};

static inline uint64_t random_next(struct random *random) {
    uint64_t x = random->state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    random->state = x;
    return x * UINT64_C(0x2545f4914f6cdd1d);
}

/* Below `limit`, which is at most 2^32. */
static inline uint64_t random_below(struct random *random, uint64_t limit) {
    return ((random_next(random) >> 32) * limit) >> 32;
}

static inline uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ (hash >> 29);
}

struct run {
    const char *program;
    const char *contender;
    uint64_t percent;
    uint64_t began;
    uint64_t checksum;
};

/* Reads the arguments, starts the clock, then the collector: setting it up counts. */
static inline void run_begin(struct run *run, const char *program, int argc, char **argv) {
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: %s CONTENDER [SIZE]\n", program);
        exit(2);
    }
    run->program = program;
    run->contender = argv[1];
    run->percent = 100;
    run->checksum = 0;
    if (argc == 3) {
        char *end;
        errno = 0;
        run->percent = strtoull(argv[2], &end, 10);
        if (errno != 0 || *end != '\0' || run->percent == 0 || run->percent > 10000) {
            fprintf(stderr, "SIZE is a percentage between 1 and 10000, not %s\n", argv[2]);
            exit(2);
        }
    }
    run->began = ticks();
    gc_begin(run->contender);
}

/* `count` at the chosen size, at least one. */
static inline uint64_t run_scaled(const struct run *run, uint64_t count) {
    uint64_t scaled = count * run->percent / 100;
    return scaled == 0 ? 1 : scaled;
}

/* Stops the clock and says everything; `more` is further JSON, or empty. */
static inline void run_end(const struct run *run, const char *more) {
    uint64_t took = ticks() - run->began;
    struct gc_figures figures;
    gc_end(&figures);
    printf("{\"program\":\"%s\",\"contender\":\"%s\",\"percent\":%" PRIu64
           ",\"checksum\":\"%016" PRIx64 "\",\"ticks\":%" PRIu64 ",\"collections\":%" PRIu64
           ",\"longest_pause_ns\":%" PRIu64 ",\"total_pause_ns\":%" PRIu64
           ",\"longest_allocation\":%" PRIu64 ",\"heap_bytes\":%" PRIu64 "%s}\n",
           run->program, run->contender, run->percent, run->checksum, took,
           figures.collections, figures.longest_pause_ns, figures.total_pause_ns,
           figures.longest_allocation, figures.heap_bytes, more);
}

/* Memory that no collector knows, for what the measuring itself keeps. */
static inline void *plain_memory(size_t bytes) {
    void *memory = malloc(bytes);
    if (memory == NULL) {
        fprintf(stderr, "no memory for %zu bytes\n", bytes);
        exit(2);
    }
    memset(memory, 0, bytes);
    return memory;
}

#endif
