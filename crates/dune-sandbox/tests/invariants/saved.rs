//! What must hold of any bytes that are read as a saved program; shared by the property
//! test and the fuzz target.

use dune_sandbox::engine::UserState;
use dune_sandbox::range::USER_HI;
use dune_sandbox::snapshot::Header;
use dune_sandbox::vma::Areas;

/// Any bytes as a saved program: no panic, one line of explanation, and all that resuming it
/// relies on.
///
/// # Panics
///
/// If any of it does not hold.
pub(crate) fn check_saved(bytes: &[u8]) {
    // As if all the pages were there that the header tells of.
    let header = match Header::read(bytes, u64::MAX) {
        Ok(header) => header,
        Err(error) => {
            let shown = error.to_string();
            assert_eq!(shown.lines().count(), 1, "{shown:?}");
            assert!(Header::read(bytes, bytes.len() as u64).is_err());
            return;
        }
    };
    let user = header.registers();
    assert!(
        [user.regs.rip, user.fs_base, user.gs_base]
            .iter()
            .all(|&at| at < 1 << 47)
    );
    assert_eq!(user.regs.rflags & !UserState::RFLAGS_USER, 0);
    let mut table = Areas::new();
    for area in header.areas() {
        assert!(area.range.end() <= USER_HI, "{area:?}");
        assert!(table.is_free(area.range), "{area:?}");
        table.map(area.range, area.attributes);
    }
    assert!(header.stored().iter().all(|run| table.is_mapped(*run)));
    // A file is as long as it says, or refused.
    let pages: u64 = header
        .stored()
        .iter()
        .map(|run| run.len())
        .fold(0, u64::saturating_add);
    let len = header.pages_at().saturating_add(pages);
    assert!(Header::read(bytes, len).is_ok());
    assert!(Header::read(bytes, len - 1).is_err());
    // What is understood is written as it was understood.
    let written = header.to_bytes();
    let again = Header::read(&written, u64::MAX).map(|again| again.to_bytes());
    assert!(again.is_ok_and(|again| again == written));
}
