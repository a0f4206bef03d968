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
        name: "memory pressure",
        program: "/usr/bin/python3",
        arguments: &["-c", PRESSURE],
        end: End::Prints("refused 3 whole 192 zeroed 192\n"),
    },
    Load {
        name: "clients",
        program: "/usr/bin/python3",
        arguments: &["-c", CLIENT, "5"],
        end: End::Prints("answered 100\n"),
    },
    Load {
        name: "killed clients",
        program: "/usr/bin/python3",
        arguments: &["-c", CLIENT, "1000000"],
        end: End::Killed,
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

/// More memory than there may be, three times, each after all of the earlier was given
/// back; pages that the kernel is told to drop, of a file, which come back whole, and of
/// no file, which come back empty.
const PRESSURE: &str = "
import mmap, resource, tempfile
PIECE, PAGEOUT = 4 << 20, 21
resource.setrlimit(resource.RLIMIT_AS, (192 << 20, 192 << 20))
refused = 0
for round in range(3):
    pieces = []
    try:
        while len(pieces) < 64:
            pieces.append(mmap.mmap(-1, PIECE))
            pieces[-1][round * 4096] = 1
    except (OSError, MemoryError):
        refused += 1
    for piece in pieces: piece.close()
whole = zeroed = 0
with tempfile.TemporaryFile() as file:
    file.truncate(PIECE)
    shared = mmap.mmap(file.fileno(), PIECE)
    private = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for round in range(3):
        for page in range(64):
            shared[page * 65536] = private[page * 65536] = page + round + 1
        shared.flush()
        shared.madvise(PAGEOUT)
        private.madvise(mmap.MADV_DONTNEED)
        for page in range(64):
            whole += shared[page * 65536] == page + round + 1
            zeroed += private[page * 65536] == 0
print('refused', refused, 'whole', whole, 'zeroed', zeroed)
";

/// Asks the server of the soak, on as many connections as it is told.
const CLIENT: &str = "
import os, socket, sys
answered = 0
for _ in range(int(sys.argv[1])):
    with socket.create_connection(('127.0.0.1', int(os.environ['DUNE_SOAK_PORT']))) as s:
        stream = s.makefile('rw')
        for number in range(20):
            print('line', number, file=stream, flush=True)
            answered += stream.readline() == 'LINE %d\\n' % number
print('answered', answered)
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

/// A program that stays for the whole soak.
#[derive(Debug)]
pub(super) struct Stay {
    pub(super) name: &'static str,
    /// In Python. Says "round N" again and again, and "end N" after a `SIGTERM`.
    pub(super) script: &'static str,
    /// Threads that it has at once, at most.
    pub(super) threads: u64,
}

/// Makes threads, a child, mappings at ever other addresses, and signals in each round.
pub(super) const CHURN: Stay = Stay {
    name: "the program that stays",
    script: CHURN_SCRIPT,
    threads: 4,
};

/// Serves the clients, each in a thread of its own; says first at which port.
pub(super) const SERVER: Stay = Stay {
    name: "the server",
    script: SERVER_SCRIPT,
    threads: 16,
};

const SERVER_SCRIPT: &str = "
import signal, socketserver, sys, threading, time
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            for line in self.rfile: self.wfile.write(line.upper())
        except OSError:
            pass  # The client was killed.
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64
over = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
server = Server(('127.0.0.1', 0), Handler)
print('port', server.server_address[1], flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
rounds = 0
while not over.is_set():
    time.sleep(0.2)
    rounds += 1
    print('round', rounds, flush=True)
print('end', rounds, flush=True)
";

const CHURN_SCRIPT: &str = "
import ctypes, mmap, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
place = 0
def far_away():
    # Each a GiB from the last one, in more places than there are slots at once.
    global place
    for _ in range(8):
        place = (place + 1) % 1500
        at = (0x100 + place) << 30
        got = libc.mmap(at, 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        word = ctypes.c_uint64.from_address(got)
        was, word.value = word.value, place
        if got != at or was != 0 or word.value != place or libc.munmap(got, 4096) != 0:
            print('wrong', hex(at), hex(got or 0), was, word.value, flush=True)
            sys.exit(1)
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
    far_away()
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
            if load.name == "clients" {
                // Nobody serves them here.
                continue;
            }
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
