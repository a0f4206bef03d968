/*
 * A doubly linked list that is edited while it is walked: old nodes get new
 * payloads, new neighbours, or go.
 *
 * 150,000 nodes, each with a payload of 8 words. Every pass walks the whole
 * list; at one node in ten something happens: half of the time a new payload,
 * a quarter a node inserted behind it, a quarter the node removed. Each visit
 * to a node that is edited also makes a note that dies at once.
 */
#include "harness.h"

enum { NODES = 150000, PASSES = 30, EDIT_ONE_IN = 10, PAYLOAD_WORDS = 8 };

struct payload {
    uint64_t words[PAYLOAD_WORDS];
};

struct node {
    struct node *next, *previous;
    struct payload *payload;
};

struct note {
    struct node *about;
    uint64_t serial;
};

struct list {
    struct node head; /* its neighbours are the ends */
    uint64_t length;
};

static struct payload *payload_of(uint64_t seed) {
    struct payload *payload = gc_new_atomic(sizeof *payload);
    for (int n = 0; n < PAYLOAD_WORDS; n++)
        payload->words[n] = mix(seed, (uint64_t)n);
    return payload;
}

static void insert_behind(struct list *list, struct node *place, uint64_t seed) {
    struct node *node = gc_make(struct node);
    node->payload = payload_of(seed);
    node->previous = place;
    node->next = place->next;
    place->next->previous = node;
    place->next = node;
    list->length++;
}

/* The removed node still points into the list, as in careless programs. */
static struct node *removed(struct list *list, struct node *node) {
    struct node *next = node->next;
    node->previous->next = next;
    next->previous = node->previous;
    list->length--;
    return next;
}

static uint64_t walk(struct list *list, struct random *random, uint64_t sum) {
    struct note *last = NULL;
    struct node *node = list->head.next;
    while (node != &list->head) {
        sum += node->payload->words[0];
        if (random_below(random, EDIT_ONE_IN) != 0) {
            node = node->next;
            continue;
        }
        uint64_t choice = random_next(random) >> 62;
        struct note *note = gc_make(struct note);
        note->about = node;
        note->serial = last == NULL ? 0 : last->serial + 1;
        last = note;
        if (choice < 2) {
            node->payload = payload_of(sum);
            node = node->next;
        } else if (choice == 2) {
            insert_behind(list, node, sum);
            node = node->next->next;
        } else {
            node = removed(list, node);
        }
    }
    return mix(sum, last == NULL ? 0 : last->serial);
}

int main(int argc, char **argv) {
    struct run run;
    struct random random = {2};
    run_begin(&run, "list", argc, argv);

    struct list *list = gc_make(struct list);
    list->head.next = list->head.previous = &list->head;
    uint64_t nodes = run_scaled(&run, NODES);
    for (uint64_t n = 0; n < nodes; n++)
        insert_behind(list, &list->head, n);

    for (int pass = 0; pass < PASSES; pass++)
        run.checksum = walk(list, &random, run.checksum);

    uint64_t backwards = 0;
    for (struct node *node = list->head.previous; node != &list->head; node = node->previous) {
        for (int n = 0; n < PAYLOAD_WORDS; n++)
            run.checksum = mix(run.checksum, node->payload->words[n]);
        backwards++;
    }
    if (backwards != list->length) {
        fprintf(stderr, "the list has %" PRIu64 " nodes, not %" PRIu64 "\n", backwards,
                list->length);
        return 1;
    }
    run_end(&run, "");
    return 0;
}
