# Makes a C project in the folder $1, compiles its files one by one, links and runs it.
set -e
cd "$1"
printf '#include <stdio.h>\n' > main.c
for part in 1 2 3 4 5; do
    {
        printf '#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n'
        printf 'static int more(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }\n'
        printf 'int part%s(int from, int to) {\n' "$part"
        printf '    int numbers[64], count = 0, sum = 0;\n    char text[32];\n'
        printf '    for (int n = from; n <= to; n++) numbers[count++] = n;\n'
        printf '    qsort(numbers, count, sizeof *numbers, more);\n'
        printf '    for (int i = 0; i < count; i++) {\n'
        printf '        snprintf(text, sizeof text, "%%d", numbers[i]);\n'
        printf '        sum += atoi(text) + (int)strlen(text) * 0;\n    }\n    return sum;\n}\n'
    } > "part$part.c"
    printf 'int part%s(int, int);\n' "$part" >> main.c
done
printf 'int main(void) { printf("sum %%d\\n", part1(1, 20) + part2(21, 40) + part3(41, 60) + part4(61, 80) + part5(81, 100)); return 0; }\n' >> main.c
for source in main part1 part2 part3 part4 part5; do
    cc -O2 -c "$source.c" -o "$source.o"
done
cc -o project main.o part1.o part2.o part3.o part4.o part5.o
./project
