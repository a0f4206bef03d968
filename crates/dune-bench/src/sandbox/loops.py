# Loops of a fixed size whose results are known, timed one by one.
import sys
import time


def calls():
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    return fib(19)


def floats():
    x, y, vx, vy = 1.0, 0.0, 0.0, 1.0
    for _ in range(10000):
        squared = x * x + y * y
        pull = 0.001 / (squared * squared**0.5)
        vx -= x * pull
        vy -= y * pull
        x += vx * 0.001
        y += vy * 0.001
    return 0.99 < x * x + y * y < 1.01


def dicts():
    words = {}
    for i in range(10000):
        word = "w%d" % (i * i % 1009)
        words[word] = words.get(word, 0) + 1
    return len(words), sum(words.values())


def lists():
    state, numbers = 1, []
    for _ in range(6000):
        state = state * 48271 % 2147483647
        numbers.append(state)
    numbers.sort()
    return len({n % 1000 for n in numbers}), sum(numbers[i] <= numbers[i + 1] for i in range(5999))


LOOPS = {
    "python-calls": (calls, 4181),
    "python-floats": (floats, True),
    "python-dicts": (dicts, (505, 10000)),
    "python-lists": (lists, (999, 5999)),
}

for name, (loop, expected) in LOOPS.items():
    right, times = True, []
    loop()
    for _ in range(int(sys.argv[1])):
        start = time.perf_counter_ns()
        result = loop()
        times.append(time.perf_counter_ns() - start)
        right = right and result == expected
    print(name, "right" if right else "wrong:%r" % (result,), *times)
