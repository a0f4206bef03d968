/* A small target for a fuzzer: reads its input, and looks at a few bytes of it. */
#include <stdlib.h>
#include <unistd.h>

int main(void) {
  static char text[256];
  ssize_t len = read(0, text, sizeof text);
  if (len > 3 && text[0] == 'c' && text[1] == 'r' && text[2] == 'a')
    abort();
  if (len > 3 && text[0] == 'h' && text[1] == 'a' && text[2] == 'n')
    for (;;)
      ;
  return len <= 0;
}
