//! The processes that descend from this one.
#![expect(unsafe_code, reason = "kill and prctl")]

use std::collections::BTreeMap;
use std::fs;

/// Makes descendants whose parent ends children of this process, so that they
/// are found.
pub(crate) fn adopt_orphans() {
    // SAFETY: sets a flag of the process; cannot fail since Linux 3.4.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
}

/// Kills every process that descends from this one.
pub(crate) fn end_descendants() {
    /// A process that is being killed may have made another one just before.
    const MOST_ROUNDS: u32 = 100;
    for _ in 0..MOST_ROUNDS {
        let living = descendants(std::process::id(), &parents());
        if living.is_empty() {
            return;
        }
        for pid in living {
            // SAFETY: a signal to a process that descends from this one. It
            // has not been waited for, so the number is still its own, unless
            // its parent did so this moment; then the kernel does not give
            // the number out again so soon.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
        std::thread::yield_now();
    }
}

/// Each living process's parent.
fn parents() -> BTreeMap<u32, u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| Some((pid, parent(&fs::read(format!("/proc/{pid}/stat")).ok()?)?)))
        .collect()
}

/// The parent in the text of `/proc/PID/stat`, unless the process is dead.
fn parent(stat: &[u8]) -> Option<u32> {
    // The name in parentheses may hold anything.
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.next()?.parse().ok(),
    }
}

fn descendants(root: u32, parents: &BTreeMap<u32, u32>) -> Vec<u32> {
    let descends = |mut pid: u32| {
        // No chain is longer than there are processes, whatever changed while
        // they were read.
        for _ in 0..parents.len() {
            match parents.get(&pid) {
                Some(&parent) if parent == root => return true,
                Some(&parent) => pid = parent,
                None => return false,
            }
        }
        false
    };
    parents
        .keys()
        .copied()
        .filter(|&pid| descends(pid))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_read_from_stat() {
        assert_eq!(parent(b"7 (a) b) S 3 7 7 0"), Some(3));
        assert_eq!(parent(b"7 (a) Z 3 7 7 0"), None);
        assert_eq!(parent(b"7 (a"), None);
        assert!(parents().contains_key(&std::process::id()));
    }

    #[test]
    fn descendants_are_children_and_theirs() {
        let parents = BTreeMap::from([(2, 1), (3, 2), (4, 3), (5, 1), (6, 7), (7, 6)]);
        assert_eq!(descendants(2, &parents), [3, 4]);
        assert_eq!(descendants(9, &parents), Vec::<u32>::new());
    }
}
