//! Real programs, in the sandbox and natively: standard output, standard
//! error, exit status and fatal signal must be the same.
//!
//! A test binary that uses this is also what runs the program in the sandbox:
//! started with `DUNE_TEST_SANDBOX` set to an engine's name, it does what
//! `dune run` does with its arguments ([`sandbox`]).
#![allow(dead_code, reason = "each test target uses a part of it")]

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};

use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;

const ROLE: &str = "DUNE_TEST_SANDBOX";
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// One program: a name for the test, what to run, and what it reads.
struct Case {
    name: String,
    argv: Vec<String>,
    stdin: &'static str,
}

/// Which engine the sandbox uses.
#[derive(Clone, Copy)]
pub(crate) enum Placement {
    OnHost,
    InGuest,
}

impl Placement {
    fn name(self) -> &'static str {
        match self {
            Self::OnHost => "host",
            Self::InGuest => "guest",
        }
    }
}

/// Runs every program with the engine on host, each as a test.
pub(crate) fn run_on_host() -> ExitCode {
    let arguments = Arguments::from_args();
    let folder = Arc::new(Fixture::new());
    let report = dune_kvm::probe::probe();
    let no_kvm = report.natural_placement() == dune_kvm::probe::Placement::Lab;
    let reason = no_kvm.then(|| report.kvm.to_string());
    if reason.is_some() && std::env::var_os("DUNE_REQUIRE_RING0").is_some_and(|value| value == "1")
    {
        eprintln!(
            "this machine has no usable KVM: {}",
            reason.unwrap_or_default()
        );
        return ExitCode::FAILURE;
    }
    let trials = cases()
        .into_iter()
        .map(|case| {
            let installed = find(&case.argv[0]).is_some();
            let kind = match (&reason, installed) {
                (Some(reason), _) => reason.clone(),
                (None, false) => format!("{} is not installed", case.argv[0]),
                (None, true) => String::new(),
            };
            let folder = Arc::clone(&folder);
            let ignored = !kind.is_empty();
            Trial::test(case.name.clone(), move || {
                compare(&case, &folder.path, Placement::OnHost)
            })
            .with_kind(kind)
            .with_ignored_flag(ignored)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Runs the programs whose name begins with one of `prefixes`, with the engine in guest, one
/// after the other.
///
/// # Panics
///
/// If any of them differs from its native run, or none is installed.
pub(crate) fn run_in_guest(prefixes: &[&str]) {
    let folder = Fixture::new();
    let mut failures = Vec::new();
    let mut compared = 0;
    for case in cases() {
        let wanted = prefixes.iter().any(|prefix| case.name.starts_with(prefix));
        if !wanted || find(&case.argv[0]).is_none() {
            continue;
        }
        compared += 1;
        if let Err(failed) = compare(&case, &folder.path, Placement::InGuest) {
            failures.push(format!("{}: {}", case.name, failed.message().unwrap_or("")));
        }
    }
    println!("{compared} programs compared");
    assert!(compared > 0, "none of these programs is installed");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// What `dune run` does, if this process was started for that.
pub(crate) fn sandbox() -> Option<ExitCode> {
    let role = std::env::var_os(ROLE)?;
    let mut words = std::env::args_os().skip(1);
    let program = words.next().unwrap_or_default();
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let engine: Box<dyn Engine> = if role == Placement::InGuest.name() {
            Box::new(InGuest::new()?)
        } else {
            Box::new(OnHost::new()?)
        };
        let command = dune_sandbox::Command::new(program)
            .args(words)
            .env_remove(ROLE);
        Ok(command.run(engine)?)
    };
    Some(match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            let code = error
                .downcast_ref::<dune_sandbox::RunError>()
                .map_or(125, dune_sandbox::RunError::exit_code);
            eprintln!("dune: {error}");
            ExitCode::from(code)
        }
    })
}

/// Files that the programs work on.
struct Fixture {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().to_owned();
        let put = |name: &str, text: &str| {
            std::fs::write(path.join(name), text).expect("a file in the temporary folder");
        };
        let mut numbers = String::new();
        let mut value = 12_345_u64;
        for _ in 0..5_000 {
            value = value
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            numbers.push_str(&format!("{}\n", value >> 40));
        }
        put("numbers", &numbers);
        put("table", "alice 30 paris\nbob 25 rome\ncarol 41 oslo\n");
        put("left", "a\nb\nc\nd\n");
        put("right", "b\nc\nx\nd\n");
        put("script.sh", "#!/bin/sh\necho script $0 $#\n");
        std::fs::create_dir(path.join("folder")).expect("a folder");
        put("folder/inner", "inside\n");
        let mut rights = std::fs::metadata(path.join("script.sh"))
            .expect("the script")
            .permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut rights, 0o755);
        std::fs::set_permissions(path.join("script.sh"), rights).expect("rights of the script");
        Self {
            path,
            _folder: folder,
        }
    }
}

fn case(name: &str, line: &str) -> Case {
    Case {
        name: name.to_owned(),
        argv: line.split_whitespace().map(str::to_owned).collect(),
        stdin: "",
    }
}

fn code(name: &str, interpreter: &[&str], text: &str) -> Case {
    let mut argv: Vec<String> = interpreter.iter().map(|&word| word.to_owned()).collect();
    argv.push(text.to_owned());
    Case {
        name: name.to_owned(),
        argv,
        stdin: "",
    }
}

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = [
        ("ls", "ls -l /usr /etc"),
        ("ls_recursive", "ls -lR /usr/share/doc/bash /etc/apt"),
        ("cat", "cat numbers table"),
        ("sort", "sort -n numbers"),
        ("grep_recursive", "grep -rc license /usr/share/doc"),
        ("tar_create", "tar --sort=name -cf - folder table"),
        ("tar_list", "tar -tvf /dev/null"),
        ("gzip", "gzip -9nc numbers"),
        ("xz", "xz -c numbers"),
        ("bzip2", "bzip2 -c numbers"),
        ("sha256sum", "sha256sum numbers /bin/bash"),
        ("wc", "wc numbers table"),
        ("find", "find /usr/share/doc/bash /etc/apt"),
        ("stat", "stat table"),
        ("readlink_exe", "readlink /proc/self/exe"),
        ("diff", "diff left right"),
        ("env", "env"),
        ("id", "id"),
        ("date", "date -u -d @86400"),
        ("od", "od -c table"),
        ("cut", "cut -d. -f1 numbers"),
        ("comm", "comm left right"),
        ("join", "join left right"),
        ("dd", "dd if=numbers bs=100 count=7 status=none"),
        ("factor", "factor 600851475143 97"),
        ("script", "./script.sh one two"),
        ("setarch", "setarch -R sh -c echo"),
        ("missing_operand", "cp"),
        ("no_such_file", "cat /nonexistent"),
    ]
    .map(|(name, line)| case(name, line))
    .into();
    cases.extend(busybox());
    cases.extend(interpreters());
    cases.extend(ends());
    cases
}

/// At least forty applets.
fn busybox() -> Vec<Case> {
    [
        "ash -c busybox:true",
        "awk {n+=$1}END{print(n)} numbers",
        "base64 numbers",
        "basename /usr/bin/busybox",
        "bzip2 -c table",
        "cal 1 2000",
        "cat table",
        "cksum numbers",
        "cmp left right",
        "comm left right",
        "cp table /dev/stdout",
        "cut -c1-3 numbers",
        "date -u -d @0",
        "dc -e 2_3*p",
        "dd if=numbers bs=512 count=3",
        "diff left right",
        "dirname /usr/bin/busybox",
        "du -s folder",
        "echo hello world",
        "env",
        "expand table",
        "expr 6 * 7",
        "factor 1000000007",
        "false",
        "find folder",
        "fold -w 10 table",
        "grep -n bob table",
        "gzip -c table",
        "head -n 3 numbers",
        "hexdump -C table",
        "id",
        "ls -l /usr",
        "ls -lR /etc/apt",
        "md5sum numbers",
        "mktemp -u XXXXXX/fixed",
        "nl table",
        "od -x table",
        "paste left right",
        "printf %d:%s\\n 42 text",
        "pwd",
        "readlink -f /bin",
        "realpath /bin/sh",
        "rev table",
        "sed -e s/a/A/g table",
        "seq 1 100",
        "sha1sum numbers",
        "sha256sum numbers",
        "sha512sum numbers",
        "shuf -i 1-1",
        "sort -n numbers",
        "split --help",
        "stat -c %s:%a table",
        "strings /bin/true",
        "sum numbers",
        "tac table",
        "tail -n 4 numbers",
        "tar -cf - folder",
        "tee",
        "test -f table",
        "tr a-z A-Z",
        "true",
        "tsort",
        "tty",
        "uname -a",
        "unexpand table",
        "uniq -c left",
        "wc numbers",
        "which sh",
        "whoami",
        "xxd table",
        "yes --help",
        "zcat --help",
    ]
    .iter()
    .enumerate()
    .map(|(index, line)| {
        let applet = line.split(' ').next().unwrap_or_default();
        let mut case = case(
            &format!("busybox_{index:02}_{applet}"),
            &format!("busybox {line}"),
        );
        case.stdin = "one two\nthree four\n";
        case
    })
    .collect()
}

fn interpreters() -> Vec<Case> {
    let python = &["/usr/bin/python3", "-c"];
    let perl = &["perl", "-e"];
    vec![
        code(
            "awk",
            &["awk"],
            "BEGIN { for (i = 0; i < 20000; i++) s += i * i; print s }",
        ),
        code("sed", &["sed", "-n"], "1,3p;$="),
        code(
            "bash_loop",
            &["bash", "-c"],
            "for ((i=0;i<2000;i++)); do s=$((s+i)); done; echo $s",
        ),
        code("shell_exec", &["sh", "-c"], "exec ls /"),
        code(
            "shell_redirect",
            &["sh", "-c"],
            "exec 3<table; read line <&3; echo \"$line\"; exec 3<&-",
        ),
        code(
            "perl_hash",
            perl,
            "my %h; $h{$_ % 97} += $_ for 1..50000; print map { \"$_=$h{$_}\\n\" } sort { $a <=> $b } keys %h",
        ),
        code(
            "perl_files",
            perl,
            "open F, 'numbers'; my @a = sort { $a <=> $b } <F>; print @a[0..9], $^X",
        ),
        code(
            "perl_alarm",
            perl,
            "$SIG{ALRM} = sub { die \"late\\n\" }; alarm 1; eval { sleep 5 }; print $@",
        ),
        code(
            "python_hash",
            python,
            "import hashlib; print(hashlib.sha256(open('numbers','rb').read()).hexdigest())",
        ),
        code(
            "python_json",
            python,
            "import json,sys; print(json.dumps([i*i for i in range(500)]), sys.executable)",
        ),
        code(
            "python_decimal",
            python,
            "import decimal; decimal.getcontext().prec=300; print(decimal.Decimal(2).sqrt())",
        ),
        code(
            "python_mmap",
            python,
            "import mmap; m=mmap.mmap(-1,10000); m[5]=3; m.resize(900000); m[800000]=1; print(m[5],len(m))",
        ),
        code(
            "python_file_mmap",
            python,
            "import mmap; f=open('numbers','rb'); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); print(m[:40])",
        ),
        code(
            "python_no_random_places",
            python,
            "import ctypes,subprocess,sys\nl=ctypes.CDLL(None)\nprint(l.personality(-1)&0xff, l.personality(0x40000)&0xff, hex(l.personality(-1)&0x40000))\na=[subprocess.run([sys.executable,'-c','print([l.split()[0] for l in open(\"/proc/self/maps\") if \"[stack]\" in l or \"python\" in l])'],capture_output=True).stdout for _ in range(3)]\nprint(len(a[0])>9, len(set(a)))",
        ),
        code(
            "python_walk",
            python,
            "import os; print(sorted(os.listdir('.')), os.getcwd() == os.path.realpath('.'))",
        ),
        code(
            "python_fds",
            python,
            "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:3])",
        ),
        code(
            "python_maps",
            python,
            "print(sum('python3' in l for l in open('/proc/self/maps')) > 2, any('[stack]' in l for l in open('/proc/self/maps')))",
        ),
        code(
            "python_cmdline",
            python,
            "print(open('/proc/self/cmdline').read(), open('/proc/self/comm').read())",
        ),
        code(
            "python_signal",
            python,
            "import signal,os\nsignal.signal(signal.SIGUSR1, lambda *a: print('got', a[0]))\nfor i in range(50): os.kill(os.getpid(), signal.SIGUSR1)\nprint('after')",
        ),
        code(
            "python_timer",
            python,
            "import signal,time\nn=[0]\ndef tick(*a): n[0]+=1\nsignal.signal(signal.SIGALRM, tick)\nsignal.setitimer(signal.ITIMER_REAL,0.02,0.02)\nt=time.time()\nwhile n[0]<20 and time.time()-t<30: pass\nsignal.setitimer(signal.ITIMER_REAL,0)\nprint(n[0]>=20)",
        ),
        code(
            "python_restart",
            python,
            "import signal,os,time\nsignal.signal(signal.SIGALRM, lambda *a: os.write(w, b'x'))\nr,w=os.pipe()\nsignal.setitimer(signal.ITIMER_REAL,0.1)\nprint(os.read(r,1))",
        ),
        code(
            "python_sigpipe",
            python,
            "import os; r,w=os.pipe(); os.close(r)\ntry: os.write(w,b'x')\nexcept BrokenPipeError as e: print('pipe', e.errno)",
        ),
        code(
            "python_blocked",
            python,
            "import signal,os; signal.pthread_sigmask(signal.SIG_BLOCK,[10]); os.kill(os.getpid(),10); print(signal.sigpending(), signal.sigwait([10]))",
        ),
        code(
            "python_errors",
            python,
            "import os\nfor p in ['/nonexistent','/etc/passwd/x','.']:\n  try: os.open(p, os.O_RDWR); print('opened')\n  except OSError as e: print(e.errno)\nimport sys; sys.exit(3)",
        ),
        code(
            "python_select",
            python,
            "import select,os; r,w=os.pipe(); print(select.select([r],[w],[],0.1)[1]==[w]); p=select.poll(); p.register(r); print(p.poll(50))",
        ),
        code(
            "python_sockets",
            python,
            "import socket\nfor f,a in [(socket.AF_INET,('127.0.0.1',0)),(socket.AF_INET6,('::1',0)),(socket.AF_UNIX,'')]:\n  s=socket.socket(f); s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1); s.bind(a); s.listen(); c=socket.socket(f); c.connect(s.getsockname()); d,_=s.accept(); c.sendall(b'x'*50000); c.shutdown(socket.SHUT_WR)\n  n=0\n  while b:=d.recv(4096): n+=len(b)\n  print(f, n, c.getpeername()==s.getsockname(), d.getsockopt(socket.SOL_SOCKET,socket.SO_TYPE))",
        ),
        code(
            "python_messages",
            python,
            "import socket,array,os,struct\na,b=socket.socketpair(socket.AF_UNIX,socket.SOCK_DGRAM)\nb.setsockopt(socket.SOL_SOCKET,socket.SO_PASSCRED,1)\nf=os.open('numbers',os.O_RDONLY)\na.sendmsg([b'one',b'two'],[(socket.SOL_SOCKET,socket.SCM_RIGHTS,array.array('i',[f]))])\nd,anc,fl,ad=b.recvmsg(100,200)\nprint(d,fl,ad)\nfor l,t,v in anc:\n  if t==socket.SCM_RIGHTS: print(os.read(struct.unpack('i',v)[0],8))\n  else: print(struct.unpack('3i',v)[0]==os.getpid())\nx,y=bytearray(2),bytearray(9)\na.send(b'hello'); print(b.recvmsg_into([x,y])[0],x,y)\na.send(b'0123456789'); print(b.recvmsg(4)[2]==socket.MSG_TRUNC)\nu=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); u.bind(('127.0.0.1',0)); u.sendto(b'self',u.getsockname()); print(u.recvfrom(9)[0])",
        ),
        code(
            "python_selectors",
            python,
            "import selectors,socket\nfor kind in (selectors.EpollSelector,selectors.PollSelector,selectors.SelectSelector):\n  s=kind(); a,b=socket.socketpair(); a.setblocking(False)\n  s.register(a,selectors.EVENT_READ,'a'); print(s.select(0)); b.send(b'x'); print([k.data for k,_ in s.select(5)]); s.close()",
        ),
        code(
            "python_lookups",
            python,
            "import socket\nprint(sorted(socket.if_nameindex())[:1], socket.getaddrinfo('127.0.0.1',80,type=socket.SOCK_STREAM), socket.gethostbyname('localhost'), socket.if_nametoindex('lo'), socket.if_indextoname(1))",
        ),
        code(
            "python_socket_time_limit",
            python,
            "import socket,signal,ctypes,struct\nl=ctypes.CDLL(None,use_errno=True)\na,b=socket.socketpair()\nsignal.signal(signal.SIGALRM,lambda *x: None); signal.siginterrupt(signal.SIGALRM,False)\na.setsockopt(socket.SOL_SOCKET,socket.SO_RCVTIMEO,struct.pack('ll',20,0))\nbuf=ctypes.create_string_buffer(8)\nv=(ctypes.c_void_p*2)(ctypes.addressof(buf),8); h=(ctypes.c_void_p*7)(0,0,ctypes.addressof(v),1,0,0,0)\nfor f in (lambda: l.recv(a.fileno(),buf,8,0), lambda: l.recvmsg(a.fileno(),h,0)):\n  signal.setitimer(signal.ITIMER_REAL,.1); print(f(), ctypes.get_errno())",
        ),
        code(
            "python_threading_server",
            python,
            "import socketserver,socket,threading\nclass H(socketserver.StreamRequestHandler):\n  def handle(self):\n    for line in self.rfile: self.wfile.write(line.upper())\nclass S(socketserver.ThreadingTCPServer): daemon_threads=True\ns=S(('127.0.0.1',0),H); threading.Thread(target=s.serve_forever,daemon=True).start()\ndef one(i):\n  with socket.create_connection(s.server_address) as c:\n    f=c.makefile('rw')\n    for k in range(20): f.write('line %d %d\\n' % (i,k)); f.flush(); r=f.readline(); assert r=='LINE %d %d\\n' % (i,k), r\nts=[threading.Thread(target=one,args=(i,)) for i in range(6)]\n[t.start() for t in ts]; [t.join() for t in ts]; s.shutdown(); print('served')",
        ),
        code(
            "python_asyncio",
            python,
            "import asyncio\nasync def serve(r,w):\n  while d:=await r.readline(): w.write(d[::-1]); await w.drain()\n  w.close()\nasync def one(p,i):\n  r,w=await asyncio.open_connection('127.0.0.1',p)\n  for k in range(5): w.write(b'%d %d\\n' % (i,k)); await w.drain(); await r.readexactly(4)\n  w.close(); return i\nasync def main():\n  s=await asyncio.start_server(serve,'127.0.0.1',0); p=s.sockets[0].getsockname()[1]\n  print(await asyncio.gather(*(one(p,i) for i in range(5))))\n  q=await asyncio.create_subprocess_exec('/bin/cat',stdin=-1,stdout=-1); print(await q.communicate(b'piped'), q.returncode)\nasyncio.run(main())",
        ),
        code(
            "python_rights_across_fork",
            python,
            "import socket,os,array\na,b=socket.socketpair()\nif not (p:=os.fork()):\n  r,w=os.pipe(); socket.send_fds(b,[b'fd'],[r]); os.write(w,b'from the child'); os._exit(4)\nm,f,_,_=socket.recv_fds(a,9,2); print(m,os.read(f[0],99)); print(os.waitstatus_to_exitcode(os.waitpid(p,0)[1]))",
        ),
        code(
            "python_server",
            python,
            "import socketserver,socket\nclass H(socketserver.StreamRequestHandler):\n  def handle(self): self.wfile.write(self.rfile.readline().upper())\nwith socketserver.TCPServer(('127.0.0.1',0),H) as s:\n  for i in range(5):\n    c=socket.create_connection(s.server_address); c.sendall(b'line %d\\n' % i); s.handle_request(); print(c.makefile().read())",
        ),
        code(
            "python_timers",
            python,
            "import os,select,time,struct,ctypes,signal\nl=ctypes.CDLL(None,use_errno=True)\nf=l.timerfd_create(1,0); l.timerfd_settime(f,0,struct.pack('4q',0,10**7,0,10**7),None)\nprint(len(os.read(f,8)))\ne=l.eventfd(3,0); print(struct.unpack('Q',os.read(e,8)))\nt=ctypes.c_void_p(); n=[0]\nsignal.signal(signal.SIGUSR1,lambda *a: n.__setitem__(0,n[0]+1))\nprint(l.timer_create(1,struct.pack('Qiiii40x',7,signal.SIGUSR1,0,0,0),ctypes.byref(t)), l.timer_settime(t,0,struct.pack('4q',0,0,0,10**7),None)); time.sleep(.2); print(n)",
        ),
        code(
            "python_faulthandler",
            python,
            "import faulthandler,ctypes; faulthandler.enable(); ctypes.string_at(8)",
        ),
        code(
            "sqlite",
            &["sqlite3", ":memory:"],
            "create table t(a,b); insert into t values (1,'x'),(2,'y'); select sum(a), group_concat(b) from t; with recursive c(n) as (select 1 union all select n+1 from c where n<20000) select sum(n*n) from c;",
        ),
        code("openssl", &["openssl", "prime"], "1000000007"),
    ]
}

/// Exit codes and deaths.
fn ends() -> Vec<Case> {
    let mut cases = vec![
        code("exit_code", &["sh", "-c"], "exit 7"),
        code("exit_code_255", &["sh", "-c"], "exit 255"),
        code(
            "segmentation_fault",
            &["/usr/bin/python3", "-c"],
            "import ctypes; ctypes.string_at(0)",
        ),
        code(
            "bus_error",
            &["/usr/bin/python3", "-c"],
            "import mmap,os,tempfile\nf=tempfile.TemporaryFile()\nf.truncate(8192)\nm=mmap.mmap(f.fileno(),8192)\nf.truncate(0)\nm[5000]",
        ),
        code("abort", &["perl", "-e"], "use POSIX; POSIX::abort()"),
        code(
            "division",
            &["/usr/bin/python3", "-c"],
            "import ctypes,mmap\nm=mmap.mmap(-1,4096,prot=7)\nm.write(bytes([0x31,0xc9,0xf7,0xf1]))\nctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
        ),
        code(
            "illegal_instruction",
            &["/usr/bin/python3", "-c"],
            "import ctypes,mmap\nm=mmap.mmap(-1,4096,prot=7)\nm.write(bytes([0x0f,0x0b]))\nctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
        ),
        code(
            "privileged_instruction",
            &["/usr/bin/python3", "-c"],
            "import ctypes,mmap\nm=mmap.mmap(-1,4096,prot=7)\nm.write(bytes([0xf4]))\nctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
        ),
        code(
            "breakpoint",
            &["/usr/bin/python3", "-c"],
            "import ctypes,mmap\nm=mmap.mmap(-1,4096,prot=7)\nm.write(bytes([0xcc]))\nctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
        ),
        code(
            "not_executable_memory",
            &["/usr/bin/python3", "-c"],
            "import ctypes,mmap\nm=mmap.mmap(-1,4096,prot=3)\nm.write(bytes([0xc3]))\nctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
        ),
    ];
    for signal in [
        "HUP", "INT", "QUIT", "KILL", "USR1", "PIPE", "ALRM", "TERM", "SEGV", "XCPU",
    ] {
        cases.push(code(
            &format!("killed_by_{signal}"),
            &["bash", "-c"],
            &format!("echo before; kill -{signal} $$; echo after"),
        ));
    }
    cases
}

/// What a run left.
#[derive(PartialEq, Eq)]
struct Seen {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

fn compare(case: &Case, folder: &Path, placement: Placement) -> Result<(), Failed> {
    let program = find(&case.argv[0]).ok_or("not installed")?;
    let native = observe(Command::new(&program).args(&case.argv[1..]), case, folder)?;
    let own = std::env::current_exe()?;
    let mut command = Command::new(own);
    command
        .env(ROLE, placement.name())
        .arg(&program)
        .args(&case.argv[1..]);
    let sandboxed = observe(&mut command, case, folder)?;
    if native == sandboxed {
        return Ok(());
    }
    Err(format!(
        "natively: {}\n{}{}\nin the sandbox: {}\n{}{}",
        ending(native.status),
        excerpt(&native.stdout, &sandboxed.stdout),
        excerpt(&native.stderr, &sandboxed.stderr),
        ending(sandboxed.status),
        excerpt(&sandboxed.stdout, &native.stdout),
        excerpt(&sandboxed.stderr, &native.stderr),
    )
    .into())
}

fn ending(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("died of signal {signal}"),
        None => format!("exit code {}", status.code().unwrap_or_default()),
    }
}

/// The text from the line in which it differs from `other`.
fn excerpt(text: &[u8], other: &[u8]) -> String {
    const LINES: usize = 6;
    let lines = |text: &[u8]| -> Vec<String> {
        String::from_utf8_lossy(text)
            .lines()
            .map(str::to_owned)
            .collect()
    };
    let (text, other) = (lines(text), lines(other));
    let same = text
        .iter()
        .zip(&other)
        .take_while(|(line, other)| line == other)
        .count();
    text.iter()
        .skip(same)
        .take(LINES)
        .map(|line| format!("  {:.200}\n", line))
        .collect()
}

fn observe(command: &mut Command, case: &Case, folder: &Path) -> Result<Seen, Failed> {
    let mut child = command
        .env_remove("RUST_BACKTRACE")
        .env("LC_ALL", "C")
        .env("PATH", "/usr/bin:/bin")
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read it has its reasons.
        let _ = stdin.write_all(case.stdin.as_bytes());
    }
    let pid = child.id();
    let (done, is_done) = std::sync::mpsc::channel();
    let start = Instant::now();
    let reader = std::thread::spawn(move || {
        let output = child.wait_with_output();
        let _ = done.send(());
        output
    });
    if is_done.recv_timeout(TIME_LIMIT).is_err() {
        // The process that this test started.
        Command::new("kill")
            .args(["-KILL", &pid.to_string()])
            .status()?;
        let _ = reader.join();
        return Err(format!("still running after {:?}", start.elapsed()).into());
    }
    let output = reader.join().map_err(|_| "the reader panicked")??;
    Ok(Seen {
        status: output.status,
        stdout: output.stdout,
        stderr: without_addresses(&output.stderr),
    })
}

/// Addresses of 12 digits and more differ from run to run.
fn without_addresses(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(text);
    let mut parts = text.split("0x");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_hexdigit).count();
        kept.push_str("0x");
        kept.push_str(if digits >= 12 { &part[digits..] } else { part });
    }
    kept.into_bytes()
}

fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(program.into());
    }
    ["/usr/bin", "/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(OsString::from(program)))
        .find(|path| path.exists())
}
