/*
 * Counts the words of its standard input: a C program without free().
 *
 *   cargo build --release -p dune-gc-c
 *   cc -O2 -I crates/dune-gc/include crates/dune-gc/examples/words.c \
 *      target/release/libdune_gc.a -lpthread -ldl -lm -o words
 *   ./words < README.md
 *   ./words mprotect < README.md
 *
 * Instead of the archive, `-L target/release -ldune_gc` links the shared library (and
 * LD_LIBRARY_PATH=target/release finds it).
 */
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "dune_gc.h"

struct word {
    struct word *next;
    char *text;
    unsigned long count;
};

enum { BUCKETS = 4096 };

/* A variable of the program: a root. */
static struct word **table;

static struct word **find(const char *text) {
    unsigned long hash = 5381;
    for (const char *c = text; *c; c++)
        hash = hash * 33 + (unsigned char)*c;
    struct word **place = &table[hash % BUCKETS];
    while (*place && strcmp((*place)->text, text) != 0)
        place = &(*place)->next;
    return place;
}

/* The next word, in memory that never holds pointers; NULL at the end. */
static char *next_word(void) {
    size_t room = 16, length = 0;
    int c = getchar();
    while (c != EOF && !isalnum(c))
        c = getchar();
    if (c == EOF)
        return NULL;
    char *text = dune_gc_malloc_atomic(room);
    for (; text && c != EOF && isalnum(c); c = getchar()) {
        if (length + 1 == room)
            text = dune_gc_realloc(text, room *= 2);
        if (text)
            text[length++] = (char)tolower(c);
    }
    if (text)
        text[length] = '\0';
    return text;
}

int main(int argc, char **argv) {
    int error = dune_gc_init(argc > 1 ? argv[1] : "auto");
    if (error) {
        fprintf(stderr, "words: no heap: %s\n", strerror(error));
        return 1;
    }
    table = dune_gc_malloc(BUCKETS * sizeof *table);
    if (!table)
        return 1;
    unsigned long words = 0, distinct = 0;
    char *text;
    while ((text = next_word()) != NULL) {
        struct word **place = find(text);
        words++;
        if (!*place) {
            struct word *word = dune_gc_malloc(sizeof *word);
            if (!word)
                return 1;
            word->text = text;
            *place = word;
            distinct++;
        }
        (*place)->count++;
    }
    struct word *most = NULL;
    for (size_t n = 0; n < BUCKETS; n++)
        for (struct word *word = table[n]; word; word = word->next)
            if (!most || word->count > most->count)
                most = word;
    struct dune_gc_stats stats;
    dune_gc_get_stats(&stats);
    printf("%lu words, %lu different", words, distinct);
    if (most)
        printf(", most of them \"%s\": %lu", most->text, most->count);
    printf("; %llu collections\n", (unsigned long long)stats.collections);
    return 0;
}
