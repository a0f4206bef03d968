//! The stage that an attack is played on: which engine runs it, and what has
//! been taken away of what protects the guard.

use dune_sandbox::Command;
use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;

/// `guest` for the engine in guest.
pub(crate) const ENGINE: &str = "DUNE_TEST_ENGINE";
/// What to do without: [`POINTER_CHECKS`], [`WALL`].
pub(crate) const WITHOUT: &str = "DUNE_TEST_WITHOUT";
pub(crate) const POINTER_CHECKS: &str = "pointer-checks";
pub(crate) const WALL: &str = "wall";

fn is_without(what: &str) -> bool {
    std::env::var(WITHOUT)
        .unwrap_or_default()
        .split(' ')
        .any(|word| word == what)
}

/// Whether the guard looks at pointers before the kernel does. The attacker may
/// know: without, the kernel finds other errors first, and does what it can do
/// before it meets a bad pointer.
pub(crate) fn checks_pointers() -> bool {
    !is_without(POINTER_CHECKS)
}

/// The engine that was asked for.
pub(crate) fn engine() -> Result<Box<dyn Engine>, Box<dyn std::error::Error>> {
    if !checks_pointers() {
        Command::without_pointer_checks();
    }
    if is_without(WALL) {
        Command::without_wall();
    }
    Ok(if std::env::var(ENGINE).as_deref() == Ok("guest") {
        Box::new(InGuest::new()?)
    } else {
        Box::new(OnHost::new()?)
    })
}
