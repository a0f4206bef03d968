#![allow(unsafe_code, missing_docs, clippy::undocumented_unsafe_blocks)]
use dune::exceptions::*;
use std::process::Command;
use std::sync::atomic::*;
fn h(f: &mut dune::TrapFrame) -> Outcome {
    f.rip += 2;
    f.rax = 77;
    Outcome::Resume
}
static N: AtomicU32 = AtomicU32::new(0);
extern "C" fn on_sig(_s: i32) {
    N.fetch_add(1, Ordering::SeqCst);
}
fn main() {
    let which = std::env::args().nth(1).unwrap_or_default();
    dune::enter().unwrap();
    match which.as_str() {
        "thread" => {
            let t: Vec<_> = (0..4)
                .map(|i| {
                    std::thread::spawn(move || {
                        assert!(dune::is_inside());
                        println!("t{i}");
                        i
                    })
                })
                .collect();
            for t in t {
                print!("j{} ", t.join().unwrap());
            }
            println!();
        }
        "fork" => {
            let p = unsafe { libc::fork() };
            if p == 0 {
                println!(
                    "child inside={} pid={} {}",
                    dune::is_inside(),
                    std::process::id(),
                    unsafe { libc::getppid() }
                );
                std::process::exit(7);
            }
            let mut st = 0;
            unsafe { libc::waitpid(p, &mut st, 0) };
            println!("status {:x} pid {p}", st);
        }
        "spawn" => {
            let o = Command::new("/bin/echo").arg("hi").output().unwrap();
            println!("{o:?}");
        }
        "div" => {
            set_handler(0, h);
            let x: u64;
            unsafe {
                std::arch::asm!("div ecx", in("ecx") 0, inout("rax") 5u64 => x, out("rdx") _);
            }
            println!("{x}");
        }
        "sig" => {
            unsafe {
                libc::signal(libc::SIGUSR1, on_sig as *const () as usize);
                libc::raise(libc::SIGUSR1);
            }
            println!("n={}", N.load(Ordering::SeqCst));
        }
        "alarm" => {
            unsafe {
                libc::signal(libc::SIGALRM, on_sig as *const () as usize);
                let it = libc::itimerval {
                    it_interval: libc::timeval {
                        tv_sec: 0,
                        tv_usec: 10000,
                    },
                    it_value: libc::timeval {
                        tv_sec: 0,
                        tv_usec: 10000,
                    },
                };
                libc::setitimer(libc::ITIMER_REAL, &it, std::ptr::null_mut());
            }
            while N.load(Ordering::SeqCst) < 20 {}
            println!("n={}", N.load(Ordering::SeqCst));
        }
        "segv" => unsafe {
            let p = std::hint::black_box(8 as *mut u8);
            *p = 1;
        },
        "segv2" => {
            std::fs::write("/dev/null", "x").unwrap();
            unsafe {
                let p = libc::mmap(std::ptr::null_mut(), 4096, 0, 0x22, -1, 0) as *mut u8;
                *p = 1;
            }
        }
        "overflow" => {
            fn f(n: u64) -> u64 {
                let a = [n; 100];
                std::hint::black_box(&a);
                if n == u64::MAX { 0 } else { f(n + 1) + a[3] }
            }
            println!("{}", f(0));
        }
        "panic" => {
            let r = std::panic::catch_unwind(|| panic!("boom"));
            println!("{}", r.is_err());
        }
        "bt" => {
            println!("{}", std::backtrace::Backtrace::force_capture());
        }
        "time" => {
            let t = std::time::Instant::now();
            std::thread::sleep(std::time::Duration::from_millis(50));
            println!("{:?}", t.elapsed());
        }
        "mmap" => {
            let mut v = vec![0u8; 3 << 28];
            for i in (0..v.len()).step_by(1 << 20) {
                v[i] = 1;
            }
            println!(
                "{}",
                v.iter().step_by(1 << 20).map(|x| *x as u64).sum::<u64>()
            );
        }
        _ => {}
    }
}
