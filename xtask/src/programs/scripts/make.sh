# A C project of ten files with a static and a shared library: built in parallel by make and gcc, run, changed, built again.
mkdir -p src; cd src
for n in 1 2 3 4 5 6; do
    cat >part$n.c <<END
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include "parts.h"
static int order(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }
int part$n(int seed) {
    int numbers[256]; unsigned state = seed * 2654435761u + $n;
    for (int i = 0; i < 256; i++) { state = state * 1664525u + 1013904223u; numbers[i] = state >> 8; }
    qsort(numbers, 256, sizeof *numbers, order);
    return numbers[128] % 1000;
}
END
done
cat >parts.h <<'END'
int part1(int), part2(int), part3(int), part4(int), part5(int), part6(int);
END
cat >main.c <<'END'
#include <stdio.h>
#include <math.h>
#include <pthread.h>
#include "parts.h"
static void *run(void *at) { int *n = at; *n = part1(*n) + part2(*n) + part3(*n); return 0; }
int main(void) {
    pthread_t threads[8]; int values[8]; long sum = 0;
    for (int i = 0; i < 8; i++) { values[i] = i; pthread_create(&threads[i], 0, run, &values[i]); }
    for (int i = 0; i < 8; i++) { pthread_join(threads[i], 0); sum += values[i]; }
    printf("%ld %d %.6f\n", sum, part4(1) + part5(2) + part6(3), sqrt(2.0));
    return 0;
}
END
cat >Makefile <<'END'
CFLAGS = -O2 -Wall -fPIC
all: program program-static
libshared.so: part1.o part2.o part3.o
	$(CC) -shared -o $@ $^
libstatic.a: part4.o part5.o part6.o
	$(AR) rcs $@ $^
program: main.o libshared.so libstatic.a
	$(CC) -o $@ main.o -L. -lshared -lstatic -lm -pthread -Wl,-rpath,'$$ORIGIN'
program-static: main.o part1.o part2.o part3.o libstatic.a
	$(CC) -static -o $@ $^ -lm -pthread
%.o: %.c parts.h
	$(CC) $(CFLAGS) -c -o $@ $<
check: all
	./program > out; ./program-static | cmp - out && echo same
clean:
	rm -f *.o *.a *.so program program-static out
.PHONY: all check clean
END
make -s -j 2 2>&1; make -s check; cat out; nm -g --defined-only part1.o; ar t libstatic.a | sort
touch parts.h; make -n | grep -c -- -c; make -j 2 2>&1 | sort; sha256sum <part1.o
sed -i 's/return 0;$/retrun 0;/' main.c; make main.o >error.log 2>&1; echo "error $?"; grep -c retrun error.log
make -s clean; ls
