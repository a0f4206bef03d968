//! ELF images, the auxiliary vector and the initial stack.
//!
//! Everything about turning a path, arguments and an environment into an image
//! that is ready to run in ring 3 of the *same* process. Nothing here maps or
//! runs anything: files are opened and read, and the rest is arithmetic, so
//! there is no `unsafe`. Who runs the program executes the plan.
//!
//! Read on in the order in which a program is started:
//!
//! 1. [`program`]: find the command, open it, follow its `#!` line
//!    ([`shebang`]), open its dynamic linker;
//! 2. [`elf`]: check the headers of both;
//! 3. [`plan`]: give every segment its place in user memory ([`addr`]);
//! 4. [`stack`] and [`auxv`]: lay out the first stack ([`vdso`] finds what a
//!    vDSO offers, for callers that show one to the program);
//! 5. map the segments, copy the stack, and start at [`LoadPlan::start`] with
//!    the stack pointer at [`StackImage::sp`] and every other register zero
//!    (the psABI gives rdx a meaning: a function for `atexit`, so 0 for none).
//!
//! What goes wrong on the way is an [`ImageError`].
//!
//! ```
//! use std::ffi::OsStr;
//! use dune_loader::{
//!     AuxvInputs, Ids, ImageError, InitialStack, Layout, Machine, Program, UserAddr, UserRange,
//!     find_command,
//! };
//!
//! let at = |address| UserAddr::new(address).unwrap();
//! let layout = Layout {
//!     exe_base: at(0x5500_0000_0000),
//!     interp_base: at(0x5600_0000_0000),
//!     user_range: UserRange::new(at(0x1_0000), at(0x6000_0000_0000)).unwrap(),
//! };
//! let path = find_command(OsStr::new("ls"), std::env::var_os("PATH").as_deref())?;
//! let program = Program::open(&path, vec![c"ls".into(), c"-l".into()])?;
//! let plan = program.plan(&layout)?;
//! let stack = InitialStack {
//!     top: layout.user_range.end(),
//!     len: 8 << 20,
//!     filename: &program.filename,
//!     argv: &program.argv,
//!     envp: &[c"LC_ALL=C".into()],
//!     auxv: AuxvInputs {
//!         plan: &plan,
//!         ids: Ids::of_this_process(),
//!         machine: Machine::of_host().expect("/proc is mounted"),
//!         random: [0x5a; 16], // an example; take them from getrandom
//!         vdso: None,
//!     },
//! }
//! .build()?;
//! println!("start at {} with rsp = {}", plan.start(), stack.sp);
//! # Ok::<(), ImageError>(())
//! ```

pub mod addr;
pub mod auxv;
pub mod elf;
pub mod error;
pub mod plan;
pub mod program;
pub mod shebang;
pub mod stack;
#[cfg(test)]
mod test_elf;
pub mod vdso;

pub use addr::{NotUserAddress, PAGE_SIZE, Prot, USER_END, UserAddr, UserRange};
pub use auxv::{AuxEntry, AuxKey, AuxvInputs, Ids, Machine, parse_auxv};
pub use elf::{Elf, ElfError, ElfKind, PROGRAM_HEADER_LEN, ReadAt, Segment};
pub use error::{EXIT_CANNOT_RUN, EXIT_NOT_FOUND, ImageError};
pub use plan::{ImagePart, InterpreterPlan, Layout, LoadPlan, PlanError, SegmentMap};
pub use program::{Image, Program, find_command};
pub use shebang::{SCRIPT_DEPTH_LIMIT, SHEBANG_LIMIT, Shebang, ShebangError};
pub use stack::{InitialStack, STRING_LIMIT, StackError, StackImage};
pub use vdso::{Vdso, VdsoError};
