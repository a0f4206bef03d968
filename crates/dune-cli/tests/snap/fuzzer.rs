//! A fuzzer's side of the fork server protocol.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use crate::target::ROLE;

pub(crate) const MAP_BYTES: usize = 4096;

/// See the module documentation. The target is this test binary.
pub(crate) struct Fuzzer {
    child: Child,
    requests: File,
    answers: File,
    input: File,
    segment: i32,
    map: *mut u8,
    pub(crate) hello: u32,
    killed: u32,
}

/// What came of a run.
pub(crate) struct Run {
    pub(crate) pid: u32,
    pub(crate) status: i32,
    pub(crate) map: Vec<u8>,
}

impl Fuzzer {
    pub(crate) fn start(placement: &str, options: &[&str]) -> Self {
        // SAFETY: makes a segment.
        let segment =
            unsafe { libc::shmget(libc::IPC_PRIVATE, MAP_BYTES, libc::IPC_CREAT | 0o600) };
        // SAFETY: attaches it, wherever there is room.
        let map = unsafe { libc::shmat(segment, std::ptr::null(), 0) };
        assert_ne!(map as isize, -1);
        // SAFETY: makes a descriptor.
        let input = unsafe { libc::memfd_create(c"case".as_ptr(), 0) };
        // SAFETY: just made.
        let input = unsafe { File::from_raw_fd(input) };
        let (theirs, requests) = std::io::pipe().unwrap();
        let (answers, ours) = std::io::pipe().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dune"));
        command
            .args(["snap", "--afl", "--placement", placement])
            .args(options)
            .arg("--")
            .arg(std::env::current_exe().unwrap())
            .env(ROLE, "target")
            .env("__AFL_SHM_ID", segment.to_string())
            .stdin(Stdio::from(input.try_clone().unwrap()));
        let ends = [(OwnedFd::from(theirs), 198), (OwnedFd::from(ours), 199)];
        let give = move || {
            for (from, to) in &ends {
                // SAFETY: in the child, whose descriptors nobody holds.
                unsafe { libc::dup2(from.as_raw_fd(), *to) };
            }
            Ok(())
        };
        // SAFETY: two system calls.
        unsafe { command.pre_exec(give) };
        let child = command.spawn().unwrap();
        drop(command);
        let mut this = Self {
            child,
            requests: OwnedFd::from(requests).into(),
            answers: OwnedFd::from(answers).into(),
            input,
            segment,
            map: map.cast(),
            hello: 0,
            killed: 0,
        };
        this.hello = this.answer();
        this
    }

    fn answer(&mut self) -> u32 {
        let mut answer = [0; 4];
        self.answers.read_exact(&mut answer).expect("no answer");
        u32::from_ne_bytes(answer)
    }

    fn begin(&mut self, input: &[u8]) -> u32 {
        self.input.rewind().unwrap();
        self.input.write_all(input).unwrap();
        self.input.set_len(input.len() as u64).unwrap();
        self.input.rewind().unwrap();
        // SAFETY: the segment is that large.
        unsafe { self.map.write_bytes(0, MAP_BYTES) };
        let killed = std::mem::take(&mut self.killed);
        self.requests.write_all(&killed.to_ne_bytes()).unwrap();
        self.answer()
    }

    fn end(&mut self, pid: u32) -> Run {
        let status = self.answer() as i32;
        // SAFETY: as above; nobody writes any more.
        let map = unsafe { std::slice::from_raw_parts(self.map, MAP_BYTES) }.to_vec();
        Run { pid, status, map }
    }

    /// A run to its end.
    pub(crate) fn run(&mut self, input: &[u8]) -> Run {
        let pid = self.begin(input);
        self.end(pid)
    }

    /// A run that is ended as a fuzzer does it.
    pub(crate) fn run_and_kill(&mut self, input: &[u8]) -> Run {
        let pid = self.begin(input);
        std::thread::sleep(std::time::Duration::from_millis(200));
        // SAFETY: the process that it was told.
        let sent = unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        assert_eq!(sent, 0, "{pid} is no process");
        self.killed = 1;
        self.end(pid)
    }

    /// Goes away, as a fuzzer that is ended: nothing stays behind.
    pub(crate) fn leave(mut self) {
        let pid = self.run(b"hello").pid;
        drop(std::mem::replace(&mut self.requests, null()));
        drop(std::mem::replace(&mut self.answers, null()));
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), Some(0));
        for _ in 0..500 {
            if !std::path::Path::new(&format!("/proc/{pid}")).exists() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("process {pid} is still there");
    }
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

impl Drop for Fuzzer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // SAFETY: the segment made above.
        unsafe { libc::shmctl(self.segment, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}
