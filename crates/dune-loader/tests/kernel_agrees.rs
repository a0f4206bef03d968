//! The running kernel is asked what it does, and the loader must say the same.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use dune_loader::{
    AuxEntry, AuxKey, AuxvInputs, Elf, Ids, InitialStack, Layout, LoadPlan, Machine, Program,
    UserAddr, UserRange, parse_auxv,
};
use proptest::prelude::*;
use rustix::io::Errno;

/// The outcome of running a script whose interpreter is `echo`: what it
/// printed, or why it did not start.
type Outcome = Result<Vec<u8>, i32>;

fn by_the_kernel(script: &Path) -> Outcome {
    loop {
        match Command::new(script)
            .args(["one", "two"])
            .env_clear()
            .output()
        {
            Ok(output) => return Ok(output.stdout),
            // Another test's child, between fork and exec, still has the
            // script open for writing.
            Err(error) if error.raw_os_error() == Some(Errno::TXTBSY.raw_os_error()) => {}
            Err(error) => return Err(error.raw_os_error().unwrap()),
        }
    }
}

fn by_the_loader(script: &Path) -> Outcome {
    let argv = vec![c"zero".into(), c"one".into(), c"two".into()];
    match Program::open(script, argv) {
        Ok(program) => {
            let words: Vec<&[u8]> = program.argv[1..].iter().map(|arg| arg.as_bytes()).collect();
            Ok([&words.join(&b" "[..])[..], b"\n"].concat())
        }
        Err(error) => Err(error.errno().raw_os_error()),
    }
}

fn write_script(path: &Path, content: &[u8]) {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o755)
        .open(path)
        .unwrap();
    file.write_all(content).unwrap();
}

/// Names of `echo` of many lengths, around the limit too, and names of nothing.
fn interpreter() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => Just("/bin/echo".to_owned()),
        3 => (230usize..260).prop_map(|len| format!("/bin{}echo", "/".repeat(len - 8))),
        1 => Just("/no/such/program".to_owned()),
        1 => Just(String::new()),
        1 => Just("/bin".to_owned()),
    ]
}

proptest! {
    // A process for each case.
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn first_lines_mean_what_linux_takes_them_for(
        before in "[ \t]{0,3}",
        name in interpreter(),
        after in "[ \t\x00]{0,3}",
        argument in prop_oneof![
            3 => "[ab \t]{0,6}",
            1 => "[ab \t\x00]{0,4}",
            1 => "a[ ab]{200,280}",
        ],
        end in prop_oneof![Just("\n"), Just(""), Just(" \t\n"), Just("\x00"), Just("\x00\n"), Just("\nb\n")],
    ) {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        let content = format!("#!{before}{name}{after}{argument}{end}");
        write_script(&script, content.as_bytes());
        prop_assert_eq!(by_the_loader(&script), by_the_kernel(&script), "{:?}", content);
    }
}

#[test]
fn scripts_nest_as_deep_as_on_linux() {
    let folder = tempfile::tempdir().unwrap();
    let mut interpreter = Path::new("/bin/echo").to_owned();
    for level in 1..=7 {
        let script = folder.path().join(level.to_string());
        write_script(&script, format!("#!{}\n", interpreter.display()).as_bytes());
        assert_eq!(
            by_the_loader(&script),
            by_the_kernel(&script),
            "level {level}"
        );
        interpreter = script;
    }
}

#[test]
fn strings_are_limited_as_on_linux() {
    let plan = own_plan();
    let limit = |len: usize| {
        let built = InitialStack {
            top: plan.span.end(),
            len: 8 << 20,
            filename: c"/bin/true",
            argv: &[c"/bin/true".into(), CString::new(vec![b'x'; len]).unwrap()],
            envp: &[],
            auxv: inputs(&plan, [0; 16], None),
        };
        built
            .build()
            .map_err(|error| error.errno().raw_os_error())
            .map(|_| ())
    };
    for len in [131_071, 131_072] {
        let run = Command::new("/bin/true")
            .arg("x".repeat(len))
            .env_clear()
            .status();
        assert_eq!(
            limit(len),
            run.map(|_| ())
                .map_err(|error| error.raw_os_error().unwrap())
        );
    }
}

fn own_plan() -> LoadPlan {
    let at = |addr| UserAddr::new(addr).unwrap();
    let layout = Layout {
        exe_base: at(0x5500_0000_0000),
        interp_base: at(0x7f00_0000_0000),
        user_range: UserRange::new(at(0x1_0000), at(0x7fff_ffff_f000)).unwrap(),
    };
    let elf = Elf::parse(&File::open("/proc/self/exe").unwrap()).unwrap();
    LoadPlan::new(&elf, None, &layout).unwrap()
}

fn inputs(plan: &LoadPlan, random: [u8; 16], vdso: Option<u64>) -> AuxvInputs<'_> {
    AuxvInputs {
        plan,
        ids: Ids::of_this_process(),
        machine: Machine::of_host().unwrap(),
        random,
        vdso: vdso.map(|vdso| UserAddr::new(vdso).unwrap()),
    }
}

/// This process's memory as the kernel left it at the start: nothing here
/// writes to arguments, environment or auxiliary vector.
struct KernelStack {
    sp: u64,
    bytes: Vec<u8>,
}

impl KernelStack {
    fn of_this_process() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        // Field 28 of proc(5), the first after the name being field 3.
        let sp: u64 = fields.split(' ').nth(28 - 3).unwrap().parse().unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
        let end = line.split(['-', ' ']).nth(1).unwrap();
        let end = u64::from_str_radix(end, 16).unwrap();
        let mut bytes = vec![0; (end - sp) as usize];
        File::open("/proc/self/mem")
            .unwrap()
            .read_exact_at(&mut bytes, sp)
            .unwrap();
        Self { sp, bytes }
    }

    fn word(&self, index: usize) -> u64 {
        u64::from_le_bytes(self.bytes[8 * index..][..8].try_into().unwrap())
    }

    fn string(&self, addr: u64) -> CString {
        let from = &self.bytes[(addr - self.sp) as usize..];
        std::ffi::CStr::from_bytes_until_nul(from)
            .unwrap()
            .to_owned()
    }

    /// The strings of a list of pointers, and the index after its end.
    fn strings(&self, from: usize) -> (Vec<CString>, usize) {
        let count = (from..).take_while(|&index| self.word(index) != 0).count();
        let strings = (from..from + count)
            .map(|index| self.string(self.word(index)))
            .collect();
        (strings, from + count + 1)
    }
}

/// Builds this process's own first stack again, from what it holds.
#[test]
fn a_stack_is_laid_out_as_by_linux() {
    let kernel = KernelStack::of_this_process();
    let (argv, next) = kernel.strings(1);
    let (envp, next) = kernel.strings(next);
    let auxv: Vec<AuxEntry> = parse_auxv(&kernel.bytes[8 * next..]).collect();
    let told = |key| {
        auxv.iter()
            .find(|entry| entry.key == key)
            .map(|entry| entry.value)
    };
    let random = &kernel.bytes[(told(AuxKey::RANDOM).unwrap() - kernel.sp) as usize..][..16];
    let filename = kernel.string(told(AuxKey::EXECFN).unwrap());
    let plan = own_plan();

    let built = InitialStack {
        top: UserAddr::new(kernel.sp + kernel.bytes.len() as u64).unwrap(),
        len: 8 << 20,
        filename: &filename,
        argv: &argv,
        envp: &envp,
        auxv: inputs(
            &plan,
            random.try_into().unwrap(),
            told(AuxKey::SYSINFO_EHDR),
        ),
    }
    .build()
    .unwrap();
    let ours = KernelStack {
        sp: built.sp.get(),
        bytes: built.bytes,
    };

    // From the first argument's string to the top, byte for byte.
    let strings_len = kernel.bytes.len() - (kernel.word(1) - kernel.sp) as usize;
    let tail = |stack: &KernelStack| stack.bytes[stack.bytes.len() - strings_len..].to_vec();
    assert_eq!(tail(&ours), tail(&kernel));
    // The pointers to them are the same addresses.
    assert_eq!(
        (0..next).map(|i| ours.word(i)).collect::<Vec<_>>(),
        (0..next).map(|i| kernel.word(i)).collect::<Vec<_>>()
    );

    // The same keys in the same order, but for those of restartable sequences
    // (27 and 28), and keys that kernels may get one day.
    let ours: Vec<AuxEntry> = parse_auxv(&ours.bytes[8 * next..]).collect();
    let keys = |auxv: &[AuxEntry]| auxv.iter().map(|entry| entry.key).collect::<Vec<_>>();
    let mut expected = keys(&auxv);
    expected.retain(|key| key.0 <= AuxKey::MINSIGSTKSZ.0 && ![27, 28].contains(&key.0));
    assert_eq!(keys(&ours), expected);
    // The same values, but for the plan's bases and what lies below the
    // strings, where the kernel adds a random gap.
    let moved = [
        AuxKey::PHDR,
        AuxKey::BASE,
        AuxKey::ENTRY,
        AuxKey::RANDOM,
        AuxKey::PLATFORM,
        AuxKey::HWCAP2,
    ];
    for entry in ours.iter().filter(|entry| !moved.contains(&entry.key)) {
        assert_eq!(Some(entry.value), told(entry.key), "{:?}", entry.key);
    }
}
