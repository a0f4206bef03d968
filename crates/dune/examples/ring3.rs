//! A function in ring 3: it sees the memory that it is given and nothing else, and every
//! system call that it makes comes to us.

use std::sync::Arc;

use dune::memory::{AddressSpace, Pages, PteFlags};
use dune::{Trap, UserContext};
use dune_x86::addr::GuestVirt;

/// `mov rax, rdi; imul rax, rsi; syscall; mov [0], rax`
const CODE: &[u8] = &[
    0x48, 0x89, 0xf8, 0x48, 0x0f, 0xaf, 0xc6, 0x0f, 0x05, 0x48, 0x89, 0x04, 0x25, 0, 0, 0, 0,
];
const CODE_AT: u64 = 0x40_0000;
const STACK_AT: u64 = 0x50_0000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    dune::enter()?;

    let mut space = AddressSpace::empty()?;
    let code = Arc::new(Pages::new(1)?);
    assert!(code.write(0, CODE));
    space.map(GuestVirt::try_new(CODE_AT)?, &code, PteFlags::RX)?;
    let stack = Arc::new(Pages::new(4)?);
    let stack = space.map(GuestVirt::try_new(STACK_AT)?, &stack, PteFlags::RW)?;

    let mut context = UserContext::new(CODE_AT, STACK_AT + stack.bytes())?;
    context.registers_mut().rdi = 6;
    context.registers_mut().rsi = 7;
    assert_eq!(context.run(&space)?, Trap::Syscall);
    println!("ring 3 asks for system call {}", context.registers().rax);

    let trap = context.run(&space)?;
    println!("then it writes where it has nothing: {trap:?}");
    Ok(())
}
