//! The programs of the soak: what they do, and what they must print.

/// A program in the sandbox.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) name: &'static str,
    pub(super) program: &'static str,
    pub(super) arguments: &'static [&'static str],
    pub(super) end: End,
}

/// How it must end.
#[derive(Debug)]
pub(super) enum End {
    /// By itself, with code 0 and this on its standard output.
    Prints(&'static str),
    /// By a `SIGKILL` to all of its processes, after a time that differs each round.
    Killed,
}

pub(super) const LOADS: &[Load] = &[
    Load {
        name: "threads",
        program: "/usr/bin/python3",
        arguments: &["-c", THREADS],
        end: End::Prints("27872\n"),
    },
    Load {
        name: "forks",
        program: "/bin/sh",
        arguments: &["-c", FORKS],
        end: End::Prints("12\n66\n"),
    },
    Load {
        name: "killed with threads",
        program: "/usr/bin/python3",
        arguments: &["-c", FOREVER_THREADS],
        end: End::Killed,
    },
    Load {
        name: "signals",
        program: "/usr/bin/python3",
        arguments: &["-c", SIGNALS],
        end: End::Prints("200 20\n"),
    },
    Load {
        name: "memory",
        program: "/usr/bin/python3",
        arguments: &["-c", MEMORY],
        end: End::Prints("1920\n"),
    },
    Load {
        name: "killed with children",
        program: "/bin/sh",
        arguments: &["-c", "while :; do echo x | cat > /dev/null; done"],
        end: End::Killed,
    },
    Load {
        name: "traps",
        program: "/bin/sh",
        arguments: &["-c", TRAPS],
        end: End::Prints("10\n"),
    },
    Load {
        name: "pipes",
        program: "/bin/sh",
        arguments: &["-c", "seq 1 50000 | sort -rn | head -n 1 | tr 0 x"],
        end: End::Prints("5xxxx\n"),
    },
];

/// Threads that count together under a lock.
const THREADS: &str = "
import threading
total, lock = 0, threading.Lock()
def count():
    global total
    for i in range(500):
        with lock:
            total += i % 8
for _ in range(2):
    threads = [threading.Thread(target=count) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
print(total)
";

/// Children, one after the other and within each other.
const FORKS: &str = "
i=0 sum=0
while [ $i -lt 12 ]; do
    out=$(echo $i | cat)
    sum=$((sum + out))
    i=$((i + 1))
done
echo $i
(echo $sum)
";

/// Signals of a timer and of the program itself.
const SIGNALS: &str = "
import os, signal, time
own = timer = 0
def on_own(*_):
    global own
    own += 1
def on_timer(*_):
    global timer
    timer += 1
signal.signal(signal.SIGUSR1, on_own)
signal.signal(signal.SIGALRM, on_timer)
for _ in range(200):
    os.kill(os.getpid(), signal.SIGUSR1)
signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
while timer < 20:
    time.sleep(0.5)
signal.setitimer(signal.ITIMER_REAL, 0, 0)
print(own, min(timer, 20))
";

/// Memory that is mapped, written, checked, and given back.
const MEMORY: &str = "
import mmap
found = 0
for round in range(5):
    pieces = [mmap.mmap(-1, 4 << 20) for _ in range(6)]
    for number, piece in enumerate(pieces):
        for offset in range(0, 4 << 20, 65536):
            piece[offset] = number + 1
    for number, piece in enumerate(pieces):
        found += sum(piece[offset] == number + 1 for offset in range(0, 4 << 20, 65536))
        piece.close()
print(found)
";

/// A shell's own handlers.
const TRAPS: &str = "
n=0
trap 'n=$((n + 1))' USR1
i=0
while [ $i -lt 10 ]; do
    kill -USR1 $$
    i=$((i + 1))
done
echo $n
";

/// Threads that never end.
const FOREVER_THREADS: &str = "
import threading, os
def spin():
    while True:
        os.getppid()
for _ in range(4):
    threading.Thread(target=spin).start()
";

/// What the program that stays does in each of its rounds; says so each time.
pub(super) const RESIDENT: &str = "
import mmap, os, signal, sys, threading, time
over = False
def end(*_):
    global over
    over = True
signal.signal(signal.SIGTERM, end)
handled = 0
def count(*_):
    global handled
    handled += 1
signal.signal(signal.SIGUSR1, count)
rounds = 0
while not over:
    threads = [threading.Thread(target=lambda: None) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    r, w = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(w, b'child')
        os._exit(7)
    os.close(w)
    said = os.read(r, 10)
    os.close(r)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    piece = mmap.mmap(-1, 8 << 20)
    for offset in range(0, 8 << 20, 4096):
        piece[offset] = 1
    piece.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    rounds += 1
    if said != b'child' or status != 7 or handled != rounds:
        print('wrong', said, status, handled, rounds, flush=True)
        sys.exit(1)
    print('round', rounds, flush=True)
    time.sleep(0.05)
print('end', rounds, flush=True)
";

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn natively_every_program_prints_what_it_must() {
        for load in LOADS {
            let End::Prints(expected) = load.end else {
                continue;
            };
            let output = Command::new(load.program)
                .args(load.arguments)
                .output()
                .unwrap();
            assert_eq!(
                String::from_utf8_lossy(&output.stdout),
                expected,
                "{}",
                load.name
            );
        }
    }
}
