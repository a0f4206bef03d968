//! What must hold of any text that is read as a policy; shared by the property
//! test and the fuzz target.

use std::path::Path;

use dune_sandbox::policy::text;
use dune_sandbox::policy::{Net, NormalPath};

/// Any bytes as a policy: no panic, one line of explanation, and nothing that
/// a person did not write.
///
/// # Panics
///
/// If any of it does not hold.
pub(crate) fn check_policy(bytes: &[u8]) {
    let Ok(contents) = std::str::from_utf8(bytes) else {
        return;
    };
    let policy = match text::parse(contents, Path::new("/folder")) {
        Ok(policy) => policy,
        Err(error) => {
            let shown = error.to_string();
            assert_eq!(shown.lines().count(), 1, "{shown:?}");
            return;
        }
    };
    // Reading is a function.
    assert_eq!(
        text::parse(contents, Path::new("/folder")).as_ref(),
        Ok(&policy)
    );
    if policy.is_strict() {
        assert!(policy.restricts_files());
        // Only `net` itself can give network back.
        assert!(policy.network() == Net::None || contents.contains("net"));
    }
    let limits = policy.limits();
    assert_ne!(limits.memory, Some(0));
    assert_ne!(limits.processes, Some(0));
    assert!(limits.timeout.is_none_or(|time| !time.is_zero()));
    assert!(limits.cpu_time.is_none_or(|time| !time.is_zero()));
    // The paths of any text are normal, or none.
    if let Some(path) = NormalPath::new(bytes) {
        assert_eq!(NormalPath::new(path.as_bytes()), Some(path));
    }
}
