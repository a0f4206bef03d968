/*
 * A hash map whose old entries change: a table of chains that doubles as it
 * fills, keys and values objects of their own.
 *
 * 200,000 entries are inserted, then 2,000,000 operations on random keys: of
 * ten, five look a key up and make a short-lived copy of its value, three give
 * it a new value, one inserts the key or one like it, and one removes it.
 */
#include "harness.h"

enum { ENTRIES = 200000, OPERATIONS = 2000000, FIRST_BUCKETS = 64 };

struct value {
    uint64_t stamp;
    struct value *before; /* NULL: history is not kept, but the collector must look */
    uint64_t body[4];
};

struct entry {
    struct entry *next;
    uint64_t hash;
    const char *key;
    struct value *value;
};

struct map {
    struct entry **buckets;
    uint64_t bucket_count; /* a power of two */
    uint64_t length;
};

enum { KEY_BYTES = 24 };

/* The key with this number, into a buffer of KEY_BYTES: "/objects/0000000f423f". */
static void spell(uint64_t number, char *key) {
    static const char digits[] = "0123456789abcdef";
    memcpy(key, "/objects/", 9);
    for (int n = 0; n < 12; n++)
        key[9 + n] = digits[(number >> (4 * (11 - n))) & 15];
    memset(key + 21, 0, KEY_BYTES - 21);
}

static uint64_t hash_of(const char *key) {
    uint64_t hash = 0, word;
    for (int n = 0; n < KEY_BYTES; n += 8) {
        memcpy(&word, key + n, 8);
        hash = mix(hash, word);
    }
    return hash;
}

static struct value *value_of(uint64_t stamp) {
    struct value *value = gc_make(struct value);
    value->stamp = stamp;
    value->body[stamp & 3] = ~stamp;
    return value;
}

/* The place that points to the entry, or to where it would be. */
static struct entry **find(struct map *map, uint64_t hash, const char *key) {
    struct entry **place = &map->buckets[hash & (map->bucket_count - 1)];
    while (*place != NULL && ((*place)->hash != hash || memcmp((*place)->key, key, KEY_BYTES)))
        place = &(*place)->next;
    return place;
}

static void grow(struct map *map) {
    struct entry **old = map->buckets;
    uint64_t count = map->bucket_count;
    map->buckets = gc_new(2 * count * sizeof *old);
    map->bucket_count = 2 * count;
    for (uint64_t n = 0; n < count; n++) {
        struct entry *next;
        for (struct entry *entry = old[n]; entry != NULL; entry = next) {
            struct entry **place = &map->buckets[entry->hash & (2 * count - 1)];
            next = entry->next;
            entry->next = *place;
            *place = entry;
        }
    }
}

static void put(struct map *map, uint64_t number, uint64_t stamp) {
    char key[KEY_BYTES];
    spell(number, key);
    uint64_t hash = hash_of(key);
    struct entry **place = find(map, hash, key);
    if (*place != NULL) {
        (*place)->value = value_of(stamp);
        return;
    }
    struct entry *entry = gc_make(struct entry);
    char *own = gc_new_atomic(KEY_BYTES);
    memcpy(own, key, KEY_BYTES);
    entry->hash = hash;
    entry->key = own;
    entry->value = value_of(stamp);
    *place = entry;
    if (++map->length > map->bucket_count)
        grow(map);
}

/* A copy of the value, as a caller would get it. */
static struct value *get(struct map *map, uint64_t number) {
    char key[KEY_BYTES];
    spell(number, key);
    struct entry *entry = *find(map, hash_of(key), key);
    if (entry == NULL)
        return NULL;
    struct value *copy = gc_make(struct value);
    *copy = *entry->value;
    return copy;
}

static void take(struct map *map, uint64_t number) {
    char key[KEY_BYTES];
    spell(number, key);
    struct entry **place = find(map, hash_of(key), key);
    if (*place == NULL)
        return;
    *place = (*place)->next;
    map->length--;
}

int main(int argc, char **argv) {
    struct run run;
    struct random random = {3};
    run_begin(&run, "hashmap", argc, argv);

    uint64_t entries = run_scaled(&run, ENTRIES), operations = run_scaled(&run, OPERATIONS);
    struct map *map = gc_make(struct map);
    map->bucket_count = FIRST_BUCKETS;
    map->buckets = gc_new(FIRST_BUCKETS * sizeof *map->buckets);
    for (uint64_t n = 0; n < entries; n++)
        put(map, n, n);

    for (uint64_t n = 0; n < operations; n++) {
        uint64_t number = random_below(&random, entries), choice = random_below(&random, 10);
        if (choice < 5) {
            struct value *value = get(map, number);
            if (value != NULL)
                run.checksum = mix(run.checksum, value->stamp ^ value->body[value->stamp & 3]);
        } else if (choice < 9) {
            /* One in four of these may be new. */
            put(map, choice < 8 ? number : number + entries / 2, n);
        } else {
            take(map, number);
        }
    }

    uint64_t length = 0;
    for (uint64_t n = 0; n < map->bucket_count; n++)
        for (struct entry *entry = map->buckets[n]; entry != NULL; entry = entry->next) {
            struct value *value = entry->value;
            if (value->body[value->stamp & 3] != ~value->stamp || hash_of(entry->key) != entry->hash) {
                fprintf(stderr, "the entry of %s was damaged\n", entry->key);
                return 1;
            }
            run.checksum += mix(entry->hash, value->stamp);
            length++;
        }
    if (length != map->length) {
        fprintf(stderr, "the map has %" PRIu64 " entries, not %" PRIu64 "\n", length, map->length);
        return 1;
    }
    run_end(&run, "");
    return 0;
}
