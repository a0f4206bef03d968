/*
 * An XML document as a tree: almost nothing that was made is changed or dies
 * while the document is read, so there is little for a write barrier to win.
 *
 * A small parser that does not validate: elements, attributes, text, CDATA,
 * comments and processing instructions (skipped), the five entities and
 * character references, a document type declaration (skipped). Names are kept
 * once, in a table. After reading, the whole tree is walked, and every
 * element's text of more than a line is joined anew, words apart by one space,
 * which replaces what it had.
 *
 *   xml CONTENDER DOCUMENT
 */
#include "harness.h"

struct attribute {
    struct attribute *next;
    const char *name;
    const char *value;
};

enum kind { ELEMENT, TEXT };

struct node {
    struct node *next; /* the next child of the same parent */
    struct node *parent;
    struct node *first, *last; /* children, of an element */
    struct attribute *attributes;
    const char *text; /* an element's name, or a text with its end at `length` */
    uint32_t length;
    uint32_t kind;
};

struct name {
    struct name *next;
    uint64_t hash;
    uint64_t length;
    const char *spelling;
};

enum { NAME_BUCKETS = 1024 };

struct parser {
    struct node *open; /* the element whose end is awaited */
    struct node *root;
    struct name **names;
    const char *at, *end, *begin;
    char *scratch; /* plain memory, as long as the document */
};

static void fail(const struct parser *parser, const char *what) {
    fprintf(stderr, "the document at byte %td: %s\n", parser->at - parser->begin, what);
    exit(1);
}

static int is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

static int ends_name(char c) {
    return is_space(c) || c == '=' || c == '/' || c == '>' || c == '<' || c == '?';
}

static void skip_space(struct parser *parser) {
    while (parser->at < parser->end && is_space(*parser->at))
        parser->at++;
}

static int starts_with(const struct parser *parser, const char *text) {
    size_t length = strlen(text);
    return (size_t)(parser->end - parser->at) >= length && memcmp(parser->at, text, length) == 0;
}

/* To behind the next `text`. */
static void skip_past(struct parser *parser, const char *text) {
    const char *found =
        memmem(parser->at, (size_t)(parser->end - parser->at), text, strlen(text));
    if (found == NULL)
        fail(parser, "something is not closed");
    parser->at = found + strlen(text);
}

/* The one copy of a name. */
static const char *intern(struct parser *parser, const char *text, size_t length) {
    uint64_t hash = length;
    for (size_t n = 0; n < length; n++)
        hash = hash * 31 + (unsigned char)text[n];
    struct name **place = &parser->names[mix(hash, 0) & (NAME_BUCKETS - 1)];
    for (struct name *name = *place; name != NULL; name = name->next)
        if (name->hash == hash && name->length == length &&
            memcmp(name->spelling, text, length) == 0)
            return name->spelling;
    struct name *name = gc_make(struct name);
    char *spelling = gc_new_atomic(length + 1);
    memcpy(spelling, text, length);
    spelling[length] = '\0';
    name->hash = hash;
    name->length = length;
    name->spelling = spelling;
    name->next = *place;
    *place = name;
    return spelling;
}

static const char *read_name(struct parser *parser) {
    const char *start = parser->at;
    while (parser->at < parser->end && !ends_name(*parser->at))
        parser->at++;
    if (parser->at == start)
        fail(parser, "a name is missing");
    return intern(parser, start, (size_t)(parser->at - start));
}

static char *put_utf8(char *to, uint32_t code) {
    if (code < 0x80) {
        *to++ = (char)code;
    } else if (code < 0x800) {
        *to++ = (char)(0xc0 | code >> 6);
        *to++ = (char)(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        *to++ = (char)(0xe0 | code >> 12);
        *to++ = (char)(0x80 | (code >> 6 & 0x3f));
        *to++ = (char)(0x80 | (code & 0x3f));
    } else {
        *to++ = (char)(0xf0 | code >> 18);
        *to++ = (char)(0x80 | (code >> 12 & 0x3f));
        *to++ = (char)(0x80 | (code >> 6 & 0x3f));
        *to++ = (char)(0x80 | (code & 0x3f));
    }
    return to;
}

/* The reference at `at`, which is an ampersand; where the text goes on. */
static const char *reference(struct parser *parser, const char *at, const char *end, char **to) {
    static const struct {
        const char *name;
        char means;
    } entities[] = {{"&amp;", '&'}, {"&lt;", '<'}, {"&gt;", '>'}, {"&quot;", '"'}, {"&apos;", '\''}};
    size_t left = (size_t)(end - at);
    for (size_t n = 0; n < sizeof entities / sizeof *entities; n++) {
        size_t length = strlen(entities[n].name);
        if (left >= length && memcmp(at, entities[n].name, length) == 0) {
            *(*to)++ = entities[n].means;
            return at + length;
        }
    }
    if (left > 3 && at[1] == '#') {
        int is_hex = at[2] == 'x';
        char *stop;
        unsigned long code = strtoul(at + 2 + is_hex, &stop, is_hex ? 16 : 10);
        if (stop < end && *stop == ';' && code > 0 && code < 0x110000) {
            *to = put_utf8(*to, (uint32_t)code);
            return stop + 1;
        }
    }
    parser->at = at;
    fail(parser, "an entity that this parser does not know");
    return end;
}

/* The text between two places with its references resolved, as a string of the collector's. */
static char *text_of(struct parser *parser, const char *from, const char *end, uint32_t *length) {
    size_t bytes = (size_t)(end - from);
    if (memchr(from, '&', bytes) != NULL) {
        char *to = parser->scratch;
        while (from < end) {
            if (*from == '&')
                from = reference(parser, from, end, &to);
            else
                *to++ = *from++;
        }
        from = parser->scratch;
        bytes = (size_t)(to - parser->scratch);
    }
    char *text = gc_new_atomic(bytes + 1);
    memcpy(text, from, bytes);
    text[bytes] = '\0';
    *length = (uint32_t)bytes;
    return text;
}

static struct node *append(struct parser *parser, enum kind kind) {
    struct node *node = gc_make(struct node), *parent = parser->open;
    node->kind = kind;
    node->parent = parent;
    if (parent == NULL) {
        if (parser->root != NULL)
            fail(parser, "a second root");
        parser->root = node;
    } else if (parent->last == NULL) {
        parent->first = parent->last = node;
    } else {
        parent->last->next = node;
        parent->last = node;
    }
    return node;
}

static void add_text(struct parser *parser, const char *from, const char *end) {
    if (parser->open == NULL || from == end)
        return;
    struct node *node = append(parser, TEXT);
    node->text = text_of(parser, from, end, &node->length);
}

static void read_attribute(struct parser *parser, struct attribute ***place) {
    struct attribute *attribute = gc_make(struct attribute);
    attribute->name = read_name(parser);
    skip_space(parser);
    if (!starts_with(parser, "="))
        fail(parser, "an attribute without a value");
    parser->at++;
    skip_space(parser);
    char quote = parser->at < parser->end ? *parser->at : '\0';
    if (quote != '"' && quote != '\'')
        fail(parser, "a value without quotes");
    const char *from = ++parser->at;
    const char *end = memchr(from, quote, (size_t)(parser->end - from));
    if (end == NULL)
        fail(parser, "a value that does not end");
    uint32_t length;
    attribute->value = text_of(parser, from, end, &length);
    parser->at = end + 1;
    **place = attribute;
    *place = &attribute->next;
}

static void read_start(struct parser *parser) {
    parser->at++;
    struct node *node = append(parser, ELEMENT);
    node->text = read_name(parser);
    struct attribute **place = &node->attributes;
    for (;;) {
        skip_space(parser);
        if (starts_with(parser, ">")) {
            parser->at++;
            parser->open = node;
            return;
        }
        if (starts_with(parser, "/>")) {
            parser->at += 2;
            return;
        }
        read_attribute(parser, &place);
    }
}

static void read_end(struct parser *parser) {
    parser->at += 2;
    if (parser->open == NULL || read_name(parser) != parser->open->text)
        fail(parser, "an end without its beginning");
    skip_space(parser);
    if (!starts_with(parser, ">"))
        fail(parser, "an end that is not closed");
    parser->at++;
    parser->open = parser->open->parent;
}

/* As far as its brackets are balanced, which is all that skipping it needs. */
static void skip_doctype(struct parser *parser) {
    int depth = 0;
    for (; parser->at < parser->end; parser->at++) {
        depth += (*parser->at == '<') - (*parser->at == '>');
        if (depth == 0) {
            parser->at++;
            return;
        }
    }
    fail(parser, "a document type declaration that is not closed");
}

static void parse(struct parser *parser) {
    while (parser->at < parser->end) {
        const char *from = parser->at;
        const char *tag = memchr(from, '<', (size_t)(parser->end - from));
        parser->at = tag == NULL ? parser->end : tag;
        add_text(parser, from, parser->at);
        if (tag == NULL)
            break;
        if (starts_with(parser, "</")) {
            read_end(parser);
        } else if (starts_with(parser, "<!--")) {
            skip_past(parser, "-->");
        } else if (starts_with(parser, "<![CDATA[")) {
            from = parser->at + 9;
            skip_past(parser, "]]>");
            struct node *node = append(parser, TEXT);
            node->length = (uint32_t)(parser->at - 3 - from);
            char *text = gc_new_atomic(node->length + 1);
            memcpy(text, from, node->length);
            text[node->length] = '\0';
            node->text = text;
        } else if (starts_with(parser, "<!")) {
            skip_doctype(parser);
        } else if (starts_with(parser, "<?")) {
            skip_past(parser, "?>");
        } else {
            read_start(parser);
        }
    }
    if (parser->open != NULL || parser->root == NULL)
        fail(parser, "the document ends too early");
}

/* The node after this one in document order. */
static struct node *following(struct node *node) {
    if (node->first != NULL)
        return node->first;
    while (node != NULL && node->next == NULL)
        node = node->parent;
    return node == NULL ? NULL : node->next;
}

/* Words apart by one space: a new string where that is shorter. */
static void tidy(struct parser *parser, struct node *node) {
    if (memchr(node->text, '\n', node->length) == NULL)
        return;
    char *to = parser->scratch;
    int was_space = 1;
    for (uint32_t n = 0; n < node->length; n++) {
        int space = is_space(node->text[n]);
        if (!space)
            *to++ = node->text[n];
        else if (!was_space)
            *to++ = ' ';
        was_space = space;
    }
    uint32_t length = (uint32_t)(to - parser->scratch);
    char *text = gc_new_atomic(length + 1);
    memcpy(text, parser->scratch, length);
    text[length] = '\0';
    node->text = text;
    node->length = length;
}

struct counts {
    uint64_t elements, attributes, texts, text_bytes;
};

static struct counts walk(struct parser *parser, struct run *run) {
    struct counts counts = {0, 0, 0, 0};
    for (struct node *node = parser->root; node != NULL; node = following(node)) {
        if (node->kind == ELEMENT) {
            counts.elements++;
            run->checksum = mix(run->checksum, (unsigned char)node->text[0]);
            for (struct attribute *a = node->attributes; a != NULL; a = a->next) {
                counts.attributes++;
                run->checksum = mix(run->checksum, strlen(a->value));
            }
        } else {
            counts.texts++;
            counts.text_bytes += node->length;
            tidy(parser, node);
            run->checksum = mix(run->checksum, node->length);
        }
    }
    return counts;
}

/* The whole file in plain memory, before the clock starts. */
static char *document(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
        fprintf(stderr, "cannot read %s: %s\n", path, strerror(errno));
        exit(1);
    }
    long bytes = ftell(file);
    rewind(file);
    char *text = plain_memory((size_t)bytes + 1);
    if (bytes <= 0 || fread(text, 1, (size_t)bytes, file) != (size_t)bytes) {
        fprintf(stderr, "cannot read %s\n", path);
        exit(1);
    }
    fclose(file);
    *length = (size_t)bytes;
    return text;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: xml CONTENDER DOCUMENT\n");
        return 2;
    }
    size_t length;
    const char *text = document(argv[2], &length);
    struct parser parser = {.at = text, .begin = text, .end = text + length};
    parser.scratch = plain_memory(length + 1);

    struct run run;
    run_begin(&run, "xml", 2, argv);
    parser.names = gc_new(NAME_BUCKETS * sizeof *parser.names);
    parse(&parser);
    struct counts counts = walk(&parser, &run);
    /* Once more, over what is left of the texts. */
    struct counts again = walk(&parser, &run);
    if (counts.elements != again.elements || counts.texts != again.texts) {
        fprintf(stderr, "parts of the tree are gone\n");
        return 1;
    }
    char more[256];
    snprintf(more, sizeof more,
             ",\"bytes\":%zu,\"elements\":%" PRIu64 ",\"attributes\":%" PRIu64
             ",\"texts\":%" PRIu64 ",\"text_bytes\":%" PRIu64,
             length, counts.elements, counts.attributes, counts.texts, counts.text_bytes);
    run_end(&run, more);
    return 0;
}
