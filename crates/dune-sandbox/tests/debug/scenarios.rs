//! What is promised of the debugger, one promise a function.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use super::{Debugged, cpu_has, debug, line_of};

pub(crate) fn a_backtrace_names_every_function(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        int inner(int n) { return n * 2; }
        int outer(int n) { return inner(n + 1) + 1; }
        int main(void) { printf("%d\n", outer(2)); return 0; }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "info registers rip",
            "break inner",
            "continue",
            "bt",
            "info sharedlibrary",
            "continue",
        ],
    );
    ended.says(&[
        "Breakpoint 1, inner (n=3)",
        "#0  inner (n=3)",
        "#1  0x",
        "in outer (n=2)",
        "#2  0x",
        "in main ()",
        "libc.so.6",
        "exited normally",
    ]);
    ended.printed("7\n");
}

pub(crate) fn registers_set_by_gdb_are_the_programs(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        int add(int a, int b) { return a + b; }
        double half(double x) { return x / 2; }
        int main(void) {
            int sum = add(1, 1);
            double part = half(1);
            printf("%d %g\n", sum, part);
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "break *add",
            "break *half",
            "continue",
            "print $rdi + $rsi",
            "set $rdi = 40",
            "set $rsi = 2",
            "continue",
            "print $xmm0.v2_double[0]",
            "set $xmm0.v2_double[0] = 7",
            "print $mxcsr",
            "print $fctrl",
            "print $fs_base != 0",
            // Not a place where a program can be.
            "set $rip = 0xffff800000000000",
            "print $pc == (long)half",
            "continue",
        ],
    );
    ended.says(&[
        "$1 = 2",
        "$2 = 1",
        "$3 = [ IM DM ZM OM UM PM ]",
        "$4 = 895",
        "$5 = 1",
        "$6 = 1",
        "exited normally",
    ]);
    ended.printed("42 3.5\n");
}

pub(crate) fn vector_registers_are_seen_and_set(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        #include <immintrin.h>
        void here(void) {}
        __attribute__((target("avx"))) int main(void) {
            int in[8] = {1, 2, 3, 4, 5, 6, 7, 8}, out[8];
            register __m256i all asm("ymm5") = _mm256_loadu_si256((void *)in);
            asm volatile("" : "+x"(all));
            asm volatile("call here" : "+x"(all));
            _mm256_storeu_si256((void *)out, all);
            for (int i = 0; i < 8; i++) printf("%d ", out[i]);
            puts("");
            return 0;
        }
    "#;
    if !cpu_has("avx") {
        dune_testing::ignore("this CPU has no AVX");
    }
    let ended = debug(
        placement,
        SOURCE,
        &[
            "break here",
            "continue",
            "print $ymm5.v8_int32",
            "set $ymm5.v8_int32[1] = 20",
            "set $ymm5.v8_int32[6] = 70",
            "continue",
        ],
    );
    ended.says(&["= {1, 2, 3, 4, 5, 6, 7, 8}", "exited normally"]);
    ended.printed("1 20 3 4 5 6 70 8 \n");
}

pub(crate) fn memory_written_by_gdb_is_the_programs(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        int number = 1;
        char text[] = "heart";
        const char constant[] = "never";
        int main(void) { printf("%d %s %s\n", number, text, constant); return 0; }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "break main",
            "continue",
            "set var number = 42",
            "set var text[4] = 's'",
            // Where the program itself may not write.
            "set {char}&constant[0] = 'f'",
            "print constant",
            // Breakpoints are not seen in the code.
            "print/x *(unsigned char *)$pc != 0xcc",
            // The guard is not the program's, nor gdb's.
            "set {int}0x7ffff0000000 = 1",
            "print *(int *)0x400000000000",
            "print *(int *)8",
            "continue",
        ],
    );
    ended.says(&[
        "$1 = \"fever\"",
        "= 0x1",
        "exited normally",
        "Cannot access memory at address 0x7ffff0000000",
        "Cannot access memory at address 0x400000000000",
        "Cannot access memory at address 0x8",
    ]);
    ended.printed("42 hears fever\n");
}

pub(crate) fn single_steps_are_single_instructions(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        int main(void) {
            asm volatile(
                "begin: mov $39, %%eax\n syscall\n mov %%rax, %%rbx\n xor %%ecx, %%ecx\n"
                "loop: inc %%ecx\n cmp $3, %%ecx\n jne loop\n"
                "cpuid\n pushfq\n pop %%rdx\n"
                "finish: nop\n"
                ::: "rax", "rbx", "rcx", "rdx", "r11", "memory");
            puts("through");
            return 0;
        }
    "#;
    const STEPS: &str = "while $pc != (long)&finish\nstepi\nset $count = $count + 1\nend\n";
    let debugged = Debugged::start(placement, SOURCE);
    debugged.put("steps", STEPS);
    let commands = [
        "break *&begin",
        "continue",
        "stepi",
        "stepi",
        // Behind the call, with its answer and the flags as they were.
        "print $rax > 0",
        "print $r11 & 0x100",
        "x/i $pc",
        "set $count = 2",
        "source steps",
        "print $count",
        "continue",
    ];
    let output = debugged.gdb(&commands).output().unwrap();
    let ended = debugged.end(&output);
    ended.says(&["$1 = 1", "$2 = 0", "mov    %rax,%rbx", "exited normally"]);
    // mov, syscall, mov, xor, three times three, cpuid, pushfq, pop.
    ended.says(&["$3 = 16"]);
    ended.printed("through\n");
}

pub(crate) fn lines_are_stepped_over_and_into(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        int twice(int n) {
            int result = n + n; // in
            return result;
        }
        int main(void) {
            int n = twice(1); // first
            n = twice(n); // second
            printf("%d\n", n);
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "break main",
            "continue",
            "next",
            "step",
            "finish",
            "print twice(21)",
            "next",
            "next",
            "continue",
        ],
    );
    let line = |mark| line_of(SOURCE, mark).to_string();
    ended.says(&[
        &format!("{}\t", line("// second")),
        "twice (n=2)",
        &format!("{}\t", line("// in")),
        "Value returned is $1 = 4",
        "$2 = 42",
        "exited normally",
    ]);
    ended.printed("4\n");
}

pub(crate) fn a_watch_sees_the_value_change(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        int value;
        int main(void) {
            for (int i = 0; i < 3; i++)
                if (i == 2) value = 7;
            printf("%d\n", value);
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "set can-use-hw-watchpoints 0",
            "break main",
            "continue",
            "watch value",
            "continue",
            "delete",
            "continue",
        ],
    );
    ended.says(&[
        "Old value = 0",
        "New value = 7",
        "main ()",
        "exited normally",
    ]);
    ended.printed("7\n");
}

const TWO_THREADS: &str = r#"
    #define _GNU_SOURCE
    #include <pthread.h>
    #include <stdio.h>
    #include <unistd.h>
    pthread_barrier_t all, done;
    volatile long count_a, count_b;
    void wait_a(void) { pthread_barrier_wait(&all); pthread_barrier_wait(&done); }
    void wait_b(void) { pthread_barrier_wait(&all); pthread_barrier_wait(&done); }
    void *alpha(void *x) { wait_a(); return x; }
    void *beta(void *x) { wait_b(); return x; }
    void both(void) {}
    int main(void) {
        pthread_t a, b;
        pthread_barrier_init(&all, 0, 3);
        pthread_barrier_init(&done, 0, 3);
        pthread_create(&a, 0, alpha, 0);
        pthread_create(&b, 0, beta, 0);
        pthread_setname_np(a, "first");
        pthread_setname_np(b, "other");
        pthread_barrier_wait(&all);
        both();
        pthread_barrier_wait(&done);
        pthread_join(a, 0);
        pthread_join(b, 0);
        puts("joined");
        return 0;
    }
"#;

pub(crate) fn threads_have_names_and_backtraces(placement: &str) {
    let ended = debug(
        placement,
        TWO_THREADS,
        &[
            "break both",
            "continue",
            "info threads",
            "thread apply all bt",
            "continue",
        ],
    );
    ended.says(&["(first)", "(other)"]);
    ended.says(&["wait_b", "beta", "wait_a", "alpha", "both", "main"]);
    // The barriers, in which the threads were interrupted, have held.
    ended.says(&["exited normally"]);
    ended.printed("joined\n");
}

pub(crate) fn a_breakpoint_is_hit_by_every_thread(placement: &str) {
    const SOURCE: &str = r#"
        #include <pthread.h>
        #include <stdio.h>
        int hits;
        void hit(int n) { __sync_fetch_and_add(&hits, n); }
        void *run(void *x) { hit((int)(long)x); return 0; }
        int main(void) {
            pthread_t threads[4];
            for (long i = 0; i < 4; i++) pthread_create(&threads[i], 0, run, (void *)(i + 1));
            for (int i = 0; i < 4; i++) pthread_join(threads[i], 0);
            printf("%d\n", hits);
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "break hit",
            "continue",
            "continue",
            "continue",
            "continue",
            "info breakpoints",
            "continue",
        ],
    );
    let hits: std::collections::BTreeSet<&str> =
        ["hit (n=1)", "hit (n=2)", "hit (n=3)", "hit (n=4)"]
            .into_iter()
            .filter(|hit| ended.gdb.contains(hit))
            .collect();
    assert_eq!(hits.len(), 4, "{hits:?}");
    ended.says(&["already hit 4 times", "exited normally"]);
    ended.printed("10\n");
}

pub(crate) fn one_thread_is_stepped_while_others_stay(placement: &str) {
    const SOURCE: &str = r#"
        #include <pthread.h>
        #include <stdio.h>
        volatile long count;
        volatile int stop;
        void *run(void *x) { while (!stop) count++; return 0; }
        void here(void) {}
        int main(void) {
            pthread_t thread;
            pthread_create(&thread, 0, run, 0);
            while (count < 1000) {}
            here();
            stop = 1;
            pthread_join(thread, 0);
            puts("joined");
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "break here",
            "continue",
            "set scheduler-locking on",
            "set $before = count",
            "stepi",
            "stepi",
            "next",
            "print count - $before",
            "set scheduler-locking off",
            "continue",
        ],
    );
    // The other thread has gone on in the end: it was joined.
    ended.says(&["$1 = 0", "exited normally"]);
    ended.printed("joined\n");
}

pub(crate) fn a_fault_stops_at_its_instruction(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        int main(void) {
            puts("before");
            fflush(stdout);
            *(volatile int *)0x12340 = 7; // fault
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "continue",
            "print $_siginfo.si_signo",
            "print $_siginfo._sifields._sigfault.si_addr",
            "x/i $pc",
            "continue",
        ],
    );
    ended.says(&[
        "Program received signal SIGSEGV, Segmentation fault.",
        &format!("{}\t", line_of(SOURCE, "// fault")),
        "$1 = 11",
        "$2 = (void *) 0x12340",
        "movl   $0x7,(%rax)",
        "Program terminated with signal SIGSEGV",
    ]);
    assert_eq!(ended.output, "before\n");
    assert_eq!(ended.status.signal(), Some(11));
}

pub(crate) fn signals_are_passed_on_or_not(placement: &str) {
    const SOURCE: &str = r#"
        #include <signal.h>
        #include <stdio.h>
        volatile int handled;
        void handler(int signal) { handled++; }
        int main(void) {
            signal(SIGUSR1, handler);
            raise(SIGUSR1);
            printf("%d\n", handled);
            raise(SIGUSR1);
            printf("%d\n", handled);
            raise(SIGTERM);
            puts("lives");
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &["continue", "signal 0", "continue", "signal 0"],
    );
    ended.says(&[
        "received signal SIGUSR1",
        "received signal SIGUSR1",
        "received signal SIGTERM",
        "exited normally",
    ]);
    ended.printed("0\n1\nlives\n");
}

pub(crate) fn a_loop_is_interrupted(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        volatile int stop;
        int main(void) {
            puts("loops");
            fflush(stdout);
            while (!stop) {} // here
            puts("ended");
            return 0;
        }
    "#;
    let mut debugged = Debugged::start(placement, SOURCE);
    let commands = ["continue", "bt", "set var stop = 1", "continue"];
    let gdb = debugged.gdb(&commands).spawn().unwrap();
    assert_eq!(debugged.line(), "loops\n");
    let interrupted = Command::new("kill")
        .args(["-INT", &gdb.id().to_string()])
        .status();
    assert!(interrupted.unwrap().success());
    let output = gdb.wait_with_output().unwrap();
    let ended = debugged.end(&output);
    ended.says(&["received signal SIGINT", "main ()", "exited normally"]);
    ended.printed("ended\n");
}

const CALLS: &str = r#"
    #include <stdio.h>
    int sum;
    void call(int n) { sum += n; }
    int main(void) {
        for (int i = 0; i < 100; i++) call(i);
        printf("%d\n", sum);
        return 0;
    }
"#;

pub(crate) fn a_program_goes_on_after_gdb_detaches(placement: &str) {
    let commands = ["break call", "continue", "continue", "detach"];
    let ended = debug(placement, CALLS, &commands);
    ended.says(&["call (n=0)", "call (n=1)", "detached"]);
    ended.printed("4950\n");
}

pub(crate) fn a_program_goes_on_without_its_gdb(placement: &str) {
    let debugged = Debugged::start(placement, CALLS);
    let mut gdb = debugged
        .gdb_at_its_prompt(&["break call", "continue", "echo arrived\\n"])
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(gdb.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("arrived") {
        line.clear();
        let count = std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
        assert!(count > 0, "gdb has ended");
    }
    gdb.kill().unwrap();
    drop(lines);
    let output = gdb.wait_with_output().unwrap();
    debugged.end(&output).printed("4950\n");
}

pub(crate) fn a_running_program_goes_on_without_its_gdb(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        #include <time.h>
        volatile long count;
        void late(void) { puts("late"); }
        int main(void) {
            puts("loops");
            fflush(stdout);
            for (time_t end = time(0) + 3; time(0) < end;) count++;
            late();
            return 0;
        }
    "#;
    let mut debugged = Debugged::start(placement, SOURCE);
    let mut gdb = debugged.gdb(&["break late", "continue"]).spawn().unwrap();
    assert_eq!(debugged.line(), "loops\n");
    gdb.kill().unwrap();
    let output = gdb.wait_with_output().unwrap();
    // The breakpoint was there, and went with gdb.
    debugged.end(&output).printed("late\n");
}

pub(crate) fn nonsense_does_not_hurt(placement: &str) {
    let nonsense: [&[u8]; 6] = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"$$$$#00\x03###$\xff\xff#zz",
        b"$g#00",
        b"+$vCont;s:p-1.-1#00$qXfer:features:read:target.xml:0,ffffffffff#00",
        &[b'$'; 100_000],
    ];
    for bytes in nonsense {
        let debugged = Debugged::start(placement, CALLS);
        let mut stream = debugged.connect();
        // It may be refused before all of it is sent.
        let _ = stream.write_all(bytes);
        drop(stream);
        let none = Command::new("true").output().unwrap();
        debugged.end(&none).printed("4950\n");
    }
}

pub(crate) fn a_socket_is_its_owners_and_goes_with_its_client(placement: &str) {
    let debugged = Debugged::start(placement, CALLS);
    let mode = std::fs::metadata(debugged.socket()).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    let first = debugged.connect();
    while debugged.socket().exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(first);
    let none = Command::new("true").output().unwrap();
    debugged.end(&none).printed("4950\n");
}

pub(crate) fn a_program_is_killed(placement: &str) {
    let ended = debug(placement, CALLS, &["break call", "continue", "kill"]);
    ended.says(&["call (n=0)", "killed"]);
    assert_eq!(
        (ended.output.as_str(), ended.status.signal()),
        ("", Some(9))
    );
}

pub(crate) fn children_run_without_breakpoints(placement: &str) {
    const SOURCE: &str = r#"
        #include <stdio.h>
        #include <stdlib.h>
        #include <sys/wait.h>
        #include <unistd.h>
        int work(int n) { return n + 1; }
        int main(void) {
            int status, pid = fork();
            if (pid == 0) _exit(work(41));
            waitpid(pid, &status, 0);
            printf("%d\n", WEXITSTATUS(status));
            printf("%d\n", WEXITSTATUS(system("exit 3")));
            printf("%d\n", work(1));
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &["break work", "continue", "bt", "continue"],
    );
    ended.says(&["work (n=1)", "main ()", "exited normally"]);
    assert!(!ended.gdb.contains("work (n=41)"));
    ended.printed("42\n3\n2\n");
}

pub(crate) fn a_new_program_is_followed(placement: &str) {
    const SOURCE: &str = r#"
        #include <pthread.h>
        #include <stdio.h>
        #include <unistd.h>
        int second(int n) { return n * 2; }
        void *run(void *x) { execl("/proc/self/exe", "again", "again", (char *)0); return 0; }
        int main(int argc, char **argv) {
            pthread_t thread;
            if (argc > 1) {
                printf("%d\n", second(21));
                return 0;
            }
            pthread_create(&thread, 0, run, 0);
            pthread_join(thread, 0);
            return 1;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "catch exec",
            "break second",
            "continue",
            "info threads",
            "continue",
            "bt",
            "continue",
        ],
    );
    ended.says(&[
        "(exec'd",
        "second (n=21)",
        "main (argc=2",
        "exited normally",
    ]);
    ended.printed("42\n");
}

pub(crate) fn interrupted_calls_start_again(placement: &str) {
    const SOURCE: &str = r#"
        #include <pthread.h>
        #include <stdio.h>
        #include <unistd.h>
        #include <poll.h>
        int ends[2];
        void here(int n) {}
        void *run(void *x) {
            char byte;
            struct pollfd asked = {ends[0], POLLIN};
            int polled = poll(&asked, 1, -1);
            int count = read(ends[0], &byte, 1);
            int more = read(ends[0], &byte, 1);
            printf("%d %d %d %c\n", polled, count, more, byte);
            return 0;
        }
        int main(void) {
            pthread_t thread;
            pipe(ends);
            pthread_create(&thread, 0, run, 0);
            usleep(100000);
            here(1);
            write(ends[1], "a", 1);
            usleep(100000);
            here(2);
            write(ends[1], "b", 1);
            pthread_join(thread, 0);
            return 0;
        }
    "#;
    let ended = debug(
        placement,
        SOURCE,
        &[
            "break here",
            "continue",
            "thread apply all bt",
            "continue",
            "stepi",
            "continue",
        ],
    );
    ended.says(&["here (n=1)", "poll", "here (n=2)", "exited normally"]);
    ended.printed("1 1 1 b\n");
}
