/* A small target for a fuzzer: reads a file, and looks at a few bytes of it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
  char text[256];
  FILE *file = argc > 1 ? fopen(argv[1], "rb") : stdin;
  if (!file)
    return 1;
  size_t len = fread(text, 1, sizeof text, file);
  if (len > 3 && text[0] == 'c' && text[1] == 'r' && text[2] == 'a')
    abort();
  if (len > 3 && text[0] == 'h' && text[1] == 'a' && text[2] == 'n')
    for (;;)
      ;
  return len == 0;
}
