/*
 * One source, two collectors. A program includes this header and is compiled
 * once with -DWITH_LIBGC (Debian's libgc-dev) and once with -DWITH_DUNE_GC.
 *
 *   gc_begin(contender)   the collector in the mode that the contender's name says
 *   gc_new(bytes)         zeroed memory that is scanned for pointers
 *   gc_new_atomic(bytes)  memory without pointers, not zeroed by every collector
 *   gc_end(&figures)      what the collector did
 *
 *   contender             collector
 *   libgc-plain           stop the world, mark all of the heap
 *   libgc-generational    mark what was written since (GC_TIME_UNLIMITED)
 *   libgc-incremental     as before, in steps of bounded time
 *   dune-gc-PROVIDER      none, mprotect, userfaultfd, dune
 *
 * With -DTIMED every allocation is timed, and the longest is what the program
 * saw of the collector: its pauses and its share of the marking.
 */
#ifndef GC_API_H
#define GC_API_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The time-stamp counter: an instruction a tick where the emulator counts them. */
static inline uint64_t ticks(void) {
    __builtin_ia32_lfence();
    return __builtin_ia32_rdtsc();
}

struct gc_figures {
    uint64_t collections;
    uint64_t longest_pause_ns; /* with the world stopped, by the collector's own account */
    uint64_t total_pause_ns;
    uint64_t longest_allocation; /* ticks; 0 without -DTIMED */
    uint64_t heap_bytes;
};

static uint64_t gc_longest_allocation;

static inline void gc_note_allocation(uint64_t began) {
    uint64_t took = ticks() - began;
    if (took > gc_longest_allocation)
        gc_longest_allocation = took;
}

static inline void gc_refuse(const char *contender, const char *reason) {
    fprintf(stderr, "cannot run as %s: %s\n", contender, reason);
    exit(3);
}

/* The part of the contender's name behind the prefix, or NULL. */
static inline const char *gc_mode(const char *contender, const char *prefix) {
    size_t length = strlen(prefix);
    return strncmp(contender, prefix, length) == 0 ? contender + length : NULL;
}

#if defined(WITH_LIBGC)

#include <gc/gc.h>

static uint64_t gc_stopped_at, gc_longest_stop, gc_all_stops;

static uint64_t gc_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void gc_on_event(GC_EventType event) {
    if (event == GC_EVENT_PRE_STOP_WORLD) {
        gc_stopped_at = gc_nanoseconds();
    } else if (event == GC_EVENT_POST_START_WORLD) {
        uint64_t took = gc_nanoseconds() - gc_stopped_at;
        gc_all_stops += took;
        if (took > gc_longest_stop)
            gc_longest_stop = took;
    }
}

static inline void gc_begin(const char *contender) {
    const char *mode = gc_mode(contender, "libgc-");
    if (mode == NULL)
        gc_refuse(contender, "this program was built with libgc");
    GC_INIT();
    GC_set_on_collection_event(gc_on_event);
    if (strcmp(mode, "plain") == 0)
        return;
    if (strcmp(mode, "generational") == 0)
        GC_set_time_limit(GC_TIME_UNLIMITED);
    else if (strcmp(mode, "incremental") != 0)
        gc_refuse(contender, "libgc's modes are plain, generational and incremental");
    GC_enable_incremental();
    if (!GC_is_incremental_mode())
        gc_refuse(contender, "this libgc finds no way to see which pages were written");
}

#define GC_NEW_RAW(bytes) GC_MALLOC(bytes)
#define GC_NEW_ATOMIC_RAW(bytes) GC_MALLOC_ATOMIC(bytes)

static inline void gc_end(struct gc_figures *figures) {
    figures->collections = GC_get_gc_no();
    figures->longest_pause_ns = gc_longest_stop;
    figures->total_pause_ns = gc_all_stops;
    figures->longest_allocation = gc_longest_allocation;
    figures->heap_bytes = GC_get_heap_size();
}

#elif defined(WITH_DUNE_GC)

#include "dune_gc.h"

static inline void gc_begin(const char *contender) {
    const char *provider = gc_mode(contender, "dune-gc-");
    if (provider == NULL)
        gc_refuse(contender, "this program was built with dune-gc");
    int error = dune_gc_init(provider);
    if (error != 0)
        gc_refuse(contender, strerror(error));
}

#define GC_NEW_RAW(bytes) dune_gc_malloc(bytes)
#define GC_NEW_ATOMIC_RAW(bytes) dune_gc_malloc_atomic(bytes)

static inline void gc_end(struct gc_figures *figures) {
    struct dune_gc_stats stats;
    dune_gc_get_stats(&stats);
    figures->collections = stats.collections;
    figures->longest_pause_ns = stats.pause_longest_ns;
    figures->total_pause_ns = stats.pause_total_ns;
    figures->longest_allocation = gc_longest_allocation;
    figures->heap_bytes = stats.heap_bytes;
}

#else
#error "choose a collector: -DWITH_LIBGC or -DWITH_DUNE_GC"
#endif

static inline void *gc_checked(void *memory, size_t bytes) {
    if (__builtin_expect(memory == NULL, 0)) {
        fprintf(stderr, "the collector has no %zu bytes\n", bytes);
        exit(2);
    }
    return memory;
}

static inline void *gc_new(size_t bytes) {
#ifdef TIMED
    uint64_t began = ticks();
    void *memory = GC_NEW_RAW(bytes);
    gc_note_allocation(began);
#else
    void *memory = GC_NEW_RAW(bytes);
#endif
    return gc_checked(memory, bytes);
}

static inline void *gc_new_atomic(size_t bytes) {
#ifdef TIMED
    uint64_t began = ticks();
    void *memory = GC_NEW_ATOMIC_RAW(bytes);
    gc_note_allocation(began);
#else
    void *memory = GC_NEW_ATOMIC_RAW(bytes);
#endif
    return gc_checked(memory, bytes);
}

#define gc_make(type) ((type *)gc_new(sizeof(type)))

#endif
