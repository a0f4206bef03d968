/* A conservative garbage-collected heap. Link with libdune_gc.a -lpthread -ldl -lm, or with
 * -ldune_gc; see examples/words.c.
 *
 * Roots: registers, stacks and thread-local variables of registered threads, the variables of
 * the program and its libraries (.data, .bss), and what dune_gc_add_roots adds. A word there or
 * in an object that holds any address within an object keeps the object; an address one past
 * its end does not. Not looked at: memory of malloc(), pthread_setspecific() in the first
 * thread, thread-local variables of libraries loaded by dlopen(), stacks that the program
 * switches to by itself. Objects do not move. dlclose() must not run beside a collection.
 *
 * Threads are stopped by a signal (SIGRTMIN + 6), which must not be blocked; system calls that
 * the kernel never restarts (poll, nanosleep and their like) may end with EINTR. A thread in a
 * handler on an alternate stack is waited for.
 *
 * After fork() the child has the heap, and its one thread is registered if it was in the parent.
 *
 * All functions may be called from any thread; none from a signal handler.
 */
#ifndef DUNE_GC_H
#define DUNE_GC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Makes the heap and registers the calling thread. provider: "none", "mprotect",
 * "userfaultfd", "dune" or "auto" (also NULL). 0, or an errno: EINVAL for another name, ENOTSUP
 * where the provider does not work here, ENOMEM, EALREADY. With DUNE_GC_VERBOSE in the
 * environment the reason is printed. Without this call the first allocation uses "auto", which
 * is "dune" in a thread that is in Dune mode or can enter it, otherwise "mprotect".
 *
 * With "dune" this and the first allocation of each thread enter Dune mode, for good. With
 * "mprotect" and "userfaultfd" a system call that writes into an object that may hold pointers
 * fails with EFAULT: read() into objects of dune_gc_malloc_atomic. */
int dune_gc_init(const char *provider);

/* Zeroed memory, aligned to 16 bytes; NULL where there is no more, even after a collection.
 * Some 15 instructions; once in a page of objects the heap's lock or a collection. Objects of
 * more than 32 KiB take whole blocks of 64 KiB. */
void *dune_gc_malloc(size_t size);

/* The same for memory that never holds a pointer into the heap. */
void *dune_gc_malloc_atomic(size_t size);

/* Another size, same contents and kind; what is new is zero. NULL: no memory, old as it was. */
void *dune_gc_realloc(void *old, size_t size);

/* A hint, which this version does not take. The object must not be used afterwards. */
void dune_gc_free(void *object);

/* Collects all that is unreachable, then runs finalizers. Linear in the live objects; the world
 * is stopped. */
void dune_gc_collect(void);

/* Words from lo to hi may be pointers, for as long as the process lives. */
void dune_gc_add_roots(void *lo, void *hi);

/* Registers the calling thread. Done by itself at its first allocation, and undone at its end.
 * 0 or an errno. */
int dune_gc_register_thread(void);
int dune_gc_unregister_thread(void);

/* Calls function(object, data) once after the object was found unreachable, in a thread that
 * allocates or collects, outside of every lock. Replaces an earlier one; NULL takes it back.
 * Objects that lead to each other are finalized in no order, each of them whole. The function
 * may make the object reachable again; the finalizer is used up then. */
void dune_gc_register_finalizer(void *object, void (*function)(void *, void *), void *data);

struct dune_gc_stats {
    uint64_t collections;       /* complete ones, minor ones included */
    uint64_t minor_collections; /* of young objects only */
    uint64_t pauses;            /* how often all threads were stopped */
    uint64_t pause_total_ns;
    uint64_t pause_longest_ns;
    uint64_t heap_bytes; /* blocks in use after the last collection */
    uint64_t live_bytes; /* live after the last collection */
    uint64_t pages_scanned;     /* because they were written */
    uint64_t first_write_traps; /* first writes to a page that cost a trap */
};

void dune_gc_get_stats(struct dune_gc_stats *into);

#ifdef __cplusplus
}
#endif

#endif
