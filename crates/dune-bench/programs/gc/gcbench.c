/*
 * GCBench: binary trees of many sizes that die soon, beside a tree and an
 * array that live as long as the program.
 *
 * The benchmark is Ellis's, Kovac's and Boehm's; this is a new program after
 * its description:
 *
 *   1. A tree of depth 18 is built and dropped, which stretches the heap.
 *   2. A tree of depth 16 and an array of 500,000 doubles are built and kept.
 *   3. For the depths 4, 6, ... 16: trees are built from the root down (old
 *      objects point to young ones) and from the leaves up (the other way
 *      round), as many as hold twice the nodes of the first tree.
 *   4. What was kept must still be there.
 */
#include "harness.h"

enum { STRETCH_DEPTH = 18, LONG_LIVED_DEPTH = 16, LEAST_DEPTH = 4, MOST_DEPTH = 16 };
enum { ARRAY_LENGTH = 500000 };

struct node {
    struct node *left, *right;
    int i, j;
};

static uint64_t nodes_of(int depth) { return (UINT64_C(1) << (depth + 1)) - 1; }

/* From the root down. */
static void grow(struct node *node, int depth) {
    if (depth == 0)
        return;
    node->left = gc_make(struct node);
    node->right = gc_make(struct node);
    grow(node->left, depth - 1);
    grow(node->right, depth - 1);
}

/* From the leaves up. */
static struct node *build(int depth) {
    struct node *left = NULL, *right = NULL;
    if (depth > 0) {
        left = build(depth - 1);
        right = build(depth - 1);
    }
    struct node *node = gc_make(struct node);
    node->left = left;
    node->right = right;
    return node;
}

static uint64_t count(const struct node *node) {
    return node == NULL ? 0 : 1 + count(node->left) + count(node->right);
}

/* The length of one random way down: a cheap look at a whole tree. */
static uint64_t descend(const struct node *node, struct random *random) {
    uint64_t length = 0;
    uint64_t turns = random_next(random);
    for (; node != NULL; turns >>= 1, length++)
        node = turns & 1 ? node->left : node->right;
    return length;
}

static void trees_of(struct run *run, struct random *random, int depth) {
    uint64_t trees = run_scaled(run, 2 * nodes_of(STRETCH_DEPTH) / nodes_of(depth));
    for (uint64_t n = 0; n < trees; n++) {
        struct node *root = gc_make(struct node);
        grow(root, depth);
        run->checksum = mix(run->checksum, descend(root, random));
    }
    for (uint64_t n = 0; n < trees; n++)
        run->checksum = mix(run->checksum, descend(build(depth), random));
}

int main(int argc, char **argv) {
    struct run run;
    struct random random = {1};
    run_begin(&run, "gcbench", argc, argv);

    run.checksum = mix(run.checksum, descend(build(STRETCH_DEPTH), &random));

    struct node *kept = gc_make(struct node);
    grow(kept, LONG_LIVED_DEPTH);
    double *array = gc_new_atomic(ARRAY_LENGTH * sizeof *array);
    for (int n = 0; n < ARRAY_LENGTH; n++)
        array[n] = 1.0 / (n + 1);

    for (int depth = LEAST_DEPTH; depth <= MOST_DEPTH; depth += 2)
        trees_of(&run, &random, depth);

    run.checksum = mix(run.checksum, count(kept));
    double sum = 0;
    for (int n = 0; n < ARRAY_LENGTH; n++)
        sum += array[n];
    run.checksum = mix(run.checksum, (uint64_t)(sum * 1e9));
    run_end(&run, "");
    return 0;
}
