//! The main thread's stack grows when it is touched, but only when the process touches it:
//! from Linux 6.5 on, KVM's touch on behalf of a guest does not make it grow. So it is grown
//! once, to its limit, before the first entry. That takes address space, and one page.
#![expect(unsafe_code, reason = "touches the end of the stack")]

/// Stacks without a limit are grown to this size.
const LARGEST: u64 = 1 << 30;
/// The kernel keeps this distance between a stack and the mapping below (`stack_guard_gap`,
/// 256 pages by default); twice that is surely accepted.
const GAP: u64 = 2 << 20;

/// Grows the mapping of the main thread's stack to its limit.
pub(crate) fn grow_main_stack() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        return;
    };
    let mut end_below = 0;
    for line in maps.lines() {
        let Some((start, end)) = crate::machine::parse_range(line) else {
            continue;
        };
        if !line.ends_with("[stack]") {
            end_below = end;
            continue;
        }
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the structure is the kernel's to fill.
        if unsafe { libc::getrlimit(libc::RLIMIT_STACK, &raw mut limit) } != 0 {
            return;
        }
        let target = (end - limit.rlim_cur.min(LARGEST).min(end)) & !0xfff;
        if target < start && target > end_below + GAP {
            // SAFETY: within the limit and clear of other mappings, so the kernel grows the
            // stack to here.
            unsafe { (target as *const u8).read_volatile() };
        }
        return;
    }
}
