//! Sockets under a policy: which may be made, and whom they may reach.
//!
//! Decisions are made on the guard's copy of an address, which is what the
//! kernel gets. The kernel chooses an address by itself where the program
//! names none; under `--net loopback` it must not choose one that other
//! machines can reach, so the guard chooses first.

use linux_raw_sys::general::{__NR_bind, __NR_getsockname};
use linux_raw_sys::net::{AF_INET, AF_INET6};

use crate::calls::net::{ADDRESS_MAX, Address};
use crate::calls::{forward_always, own, own_mut};
use crate::guard::Guard;
use crate::host::Errno;
use crate::policy::net::{Address as Named, UnixName};
use crate::policy::uses::Last;
use crate::policy::{Need, Net, Remedy};

/// `AT_FDCWD` in a register.
const CWD: u64 = linux_raw_sys::general::AT_FDCWD as i64 as u64;

/// What an address is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Naming {
    /// To be the socket's own.
    Bind,
    /// To reach it from this descriptor, by this call.
    Reach(u64, &'static str),
}

impl Guard {
    /// Whether the policy has sockets of this kind.
    ///
    /// # Errors
    ///
    /// `EACCES`.
    pub(crate) fn may_make_socket(&self, family: u32, kind: u32) -> Result<(), Errno> {
        /// The type without `SOCK_NONBLOCK` and `SOCK_CLOEXEC`.
        const TYPE: u32 = 0xf;
        let decided = self
            .program
            .policy()
            .net()
            .decide_socket(family, kind & TYPE);
        decided.map_err(|remedy| self.refuse(format!("socket({})", family_name(family)), remedy))
    }

    /// Whether the policy lets the program use `address` so. The path of a
    /// pathname socket to be reached is replaced by one that leads to the file
    /// that was decided on.
    ///
    /// # Errors
    ///
    /// `EACCES`, or what the kernel says of a path.
    pub(crate) fn may_name(&self, naming: Naming, address: &mut Address) -> Result<(), Errno> {
        let policy = self.program.policy();
        if policy.net() == Net::Full && policy.files().is_none() {
            return Ok(());
        }
        let named = Named::parse(address.bytes());
        let call = match naming {
            Naming::Bind => "bind",
            Naming::Reach(_, call) => call,
        };
        policy
            .net()
            .decide_address(&named)
            .map_err(|remedy| self.refuse(format!("{call}({named})"), remedy))?;
        match (&named, naming) {
            (Named::Unix(UnixName::Path(path)), Naming::Bind) => {
                // The name that others will be told must stay as it is; that
                // the folder is the one decided on, the second wall sees to.
                let request = |path: &str| format!("bind({path})");
                self.hold_path(CWD, path, Last::Entry, Need::Entries, &request)?;
            }
            (Named::Unix(UnixName::Path(path)), Naming::Reach(..)) => {
                let request = |path: &str| format!("{call}({path})");
                let held = self.hold_path(CWD, path, Last::Follow, Need::Write, &request)?;
                address.set_unix_path(&held)?;
            }
            // `connect` by itself chooses an address of the same side.
            (Named::Inet(..), Naming::Reach(fd, _))
                if policy.net() == Net::Loopback && call != "connect" =>
            {
                settle_on_loopback(fd, address);
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether a socket may be listened on: one without an address would get
    /// one that every machine can reach.
    ///
    /// # Errors
    ///
    /// `EACCES`.
    pub(crate) fn may_listen(&self, fd: u64) -> Result<(), Errno> {
        let net = self.program.policy().net();
        if net == Net::Full {
            return Ok(());
        }
        match own_name(fd) {
            Some(named @ Named::Inet(..)) => net
                .decide_address(&named)
                .map_err(|remedy| self.refuse(format!("listen({named})"), remedy)),
            // The kernel says what is wrong with it.
            _ => Ok(()),
        }
    }

    fn refuse(&self, request: String, remedy: Remedy) -> Errno {
        self.program.policy().refuse(request, remedy, Errno::EACCES)
    }
}

/// The socket's own address.
fn own_name(fd: u64) -> Option<Named> {
    let mut bytes = [0_u8; ADDRESS_MAX];
    let mut len = ADDRESS_MAX as u32;
    let args = [fd, own_mut(&mut bytes), own_mut(&mut len), 0, 0, 0];
    forward_always(__NR_getsockname, args).ok()?;
    Some(Named::parse(bytes.get(..len as usize)?))
}

/// Gives a socket without an address the loopback address of the family that
/// `to` has, on a port of the kernel's choice. Should another thread bind the
/// socket at the same moment, its address was decided on as well.
fn settle_on_loopback(fd: u64, to: &Address) {
    if !matches!(own_name(fd), Some(Named::Inet(_, 0))) {
        return;
    }
    let mut own_address = [0_u8; 28];
    let family = u16::from_ne_bytes([to.bytes()[0], to.bytes()[1]]);
    own_address[..2].copy_from_slice(&family.to_ne_bytes());
    let len: u64 = match u32::from(family) {
        // Port zero, then the address that is to be reached, which is a
        // loopback address: this machine has it.
        AF_INET => {
            own_address[4..8].copy_from_slice(&to.bytes()[4..8]);
            16
        }
        AF_INET6 => {
            own_address[8..24].copy_from_slice(&to.bytes()[8..24]);
            28
        }
        _ => return,
    };
    // A stream socket that is being connected may refuse: it gets the address
    // of its peer's side then anyway.
    let _ = forward_always(__NR_bind, [fd, own(&own_address), len, 0, 0, 0]);
}

fn family_name(family: u32) -> String {
    match family {
        AF_INET => "AF_INET".to_owned(),
        AF_INET6 => "AF_INET6".to_owned(),
        16 => "AF_NETLINK".to_owned(),
        other => format!("family {other}"),
    }
}
