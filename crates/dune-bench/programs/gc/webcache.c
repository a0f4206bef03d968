/*
 * A web cache: what a collector's pauses are to those who wait for an answer.
 *
 * Requests for 60,000 objects, of which few are popular (Zipf's law, exponent
 * 0.9). The cache keeps at most 32 MiB and drops what was used least recently.
 * An object's body (256 bytes to 6 KiB, most of them small) is made when it is
 * not there. Every request makes a short-lived record, a header text and an
 * answer with the first part of the body. Each request is timed.
 */
#include "harness.h"

enum { OBJECTS = 60000, REQUESTS = 400000, CAPACITY = 32 << 20, BUCKETS = 1 << 15 };

struct object {
    struct object *chain;
    struct object *newer, *older; /* by use */
    char *body;
    uint64_t number;
    uint32_t bytes;
    uint32_t hits;
};

struct cache {
    struct object **buckets;
    struct object *newest, *oldest;
    uint64_t bytes, objects;
    uint64_t hits, misses;
};

struct request {
    struct request *previous;
    uint64_t number;
    char *header;
};

struct answer {
    struct request *request;
    struct object *object;
    uint32_t bytes;
    char *part;
};

static uint32_t size_of(uint64_t number) {
    uint64_t hash = mix(number, 5);
    /* The product of two numbers below 77: small ones are many. */
    return (uint32_t)(256 + (hash & 0xffff) % 77 * ((hash >> 16 & 0xffff) % 77));
}

static void unlink_use(struct cache *cache, struct object *object) {
    if (object->newer != NULL)
        object->newer->older = object->older;
    else
        cache->newest = object->older;
    if (object->older != NULL)
        object->older->newer = object->newer;
    else
        cache->oldest = object->newer;
    object->newer = object->older = NULL;
}

static void link_newest(struct cache *cache, struct object *object) {
    object->older = cache->newest;
    if (cache->newest != NULL)
        cache->newest->newer = object;
    else
        cache->oldest = object;
    cache->newest = object;
}

static struct object **place_of(struct cache *cache, uint64_t number) {
    struct object **place = &cache->buckets[mix(number, 6) & (BUCKETS - 1)];
    while (*place != NULL && (*place)->number != number)
        place = &(*place)->chain;
    return place;
}

static void evict_oldest(struct cache *cache) {
    struct object *object = cache->oldest;
    *place_of(cache, object->number) = object->chain;
    object->chain = NULL;
    unlink_use(cache, object);
    cache->bytes -= object->bytes;
    cache->objects--;
}

static struct object *fetch(struct cache *cache, uint64_t number) {
    struct object *object = gc_make(struct object);
    object->number = number;
    object->bytes = size_of(number);
    object->body = gc_new_atomic(object->bytes);
    memset(object->body, (int)(number & 0x7f), object->bytes);
    while (cache->bytes + object->bytes > CAPACITY)
        evict_oldest(cache);
    struct object **place = place_of(cache, number);
    *place = object;
    cache->bytes += object->bytes;
    cache->objects++;
    return object;
}

enum { HEADER_BYTES = 96, PART_BYTES = 512 };

static struct answer *serve(struct cache *cache, struct request *request) {
    struct object *object = *place_of(cache, request->number);
    if (object != NULL) {
        cache->hits++;
        unlink_use(cache, object);
    } else {
        cache->misses++;
        object = fetch(cache, request->number);
    }
    link_newest(cache, object);
    object->hits++;

    struct answer *answer = gc_make(struct answer);
    answer->request = request;
    answer->object = object;
    answer->bytes = object->bytes < PART_BYTES ? object->bytes : PART_BYTES;
    answer->part = gc_new_atomic(answer->bytes);
    memcpy(answer->part, object->body, answer->bytes);
    return answer;
}

static struct request *request_for(uint64_t number) {
    struct request *request = gc_make(struct request);
    request->number = number;
    request->header = gc_new_atomic(HEADER_BYTES);
    memset(request->header, 'h', HEADER_BYTES);
    return request;
}

/* x^-0.9, for whole x: the tenth root of x to the ninth power, by Newton's method. */
static double weight(uint64_t rank) {
    double x = (double)rank, root = 1.0;
    for (int n = 0; n < 400; n++) {
        double r2 = root * root, r4 = r2 * r2, r9 = r4 * r4 * root;
        double next = (9.0 * root + x / r9) / 10.0;
        if (next - root < 1e-13 && root - next < 1e-13)
            break;
        root = next;
    }
    return root / x;
}

/* Cumulative shares of the objects, in plain memory. */
static double *shares(uint64_t objects) {
    double *cumulative = plain_memory(objects * sizeof *cumulative), sum = 0;
    for (uint64_t n = 0; n < objects; n++)
        cumulative[n] = sum += weight(n + 1);
    for (uint64_t n = 0; n < objects; n++)
        cumulative[n] /= sum;
    return cumulative;
}

static uint64_t draw(const double *cumulative, uint64_t objects, struct random *random) {
    double share = (double)(random_next(random) >> 11) / 9007199254740992.0;
    uint64_t low = 0, high = objects - 1;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (cumulative[middle] < share)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    /* What is asked for is drawn beforehand: it is the clients' work. */
    uint32_t *numbers = plain_memory((uint64_t)REQUESTS * sizeof *numbers);
    uint64_t *latencies = plain_memory((uint64_t)REQUESTS * sizeof *latencies);
    double *cumulative = shares(OBJECTS);
    struct random random = {4};
    for (uint64_t n = 0; n < REQUESTS; n++)
        numbers[n] = (uint32_t)draw(cumulative, OBJECTS, &random);

    struct run run;
    run_begin(&run, "webcache", argc, argv);
    uint64_t requests = run_scaled(&run, REQUESTS);
    if (requests > REQUESTS)
        requests = REQUESTS;
    struct cache *cache = gc_make(struct cache);
    cache->buckets = gc_new(BUCKETS * sizeof *cache->buckets);
    struct request *last = NULL;
    for (uint64_t n = 0; n < requests; n++) {
        uint64_t began = ticks();
        struct request *request = request_for(numbers[n]);
        /* A log of the last hundred requests. */
        request->previous = n % 100 == 0 ? NULL : last;
        last = request;
        struct answer *answer = serve(cache, request);
        run.checksum = mix(run.checksum, (uint64_t)answer->part[answer->bytes - 1] + answer->bytes);
        latencies[n] = ticks() - began;
    }
    run.checksum = mix(mix(run.checksum, cache->hits), cache->misses);
    uint64_t sum = 0, objects = 0;
    for (struct object *object = cache->newest; object != NULL; object = object->older) {
        sum += (uint64_t)object->body[object->bytes - 1] + object->hits;
        objects++;
    }
    run.checksum = mix(run.checksum, sum);
    if (objects != cache->objects) {
        fprintf(stderr, "the cache has %" PRIu64 " objects, not %" PRIu64 "\n", objects,
                cache->objects);
        return 1;
    }
    uint64_t hits = cache->hits;
    char more[256];
    /* run_end would count the sorting. */
    uint64_t pause = ticks();
    qsort(latencies, requests, sizeof *latencies, by_size);
    run.began += ticks() - pause;
    snprintf(more, sizeof more,
             ",\"hits\":%" PRIu64 ",\"p50\":%" PRIu64 ",\"p99\":%" PRIu64 ",\"p999\":%" PRIu64
             ",\"max\":%" PRIu64,
             hits, latencies[requests / 2], latencies[requests * 99 / 100],
             latencies[requests * 999 / 1000], latencies[requests - 1]);
    run_end(&run, more);
    return 0;
}
