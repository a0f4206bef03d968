#![allow(unsafe_code, missing_docs, clippy::undocumented_unsafe_blocks)]
use dune::memory::*;
use dune::*;
use dune_x86::addr::GuestVirt;
use std::sync::Arc;
fn main() {
    dune::enter().unwrap();
    for around in [false, true] {
        let mut sp = if around {
            AddressSpace::around_process().unwrap()
        } else {
            AddressSpace::empty().unwrap()
        };
        let code = Arc::new(Pages::new(1).unwrap());
        // mov eax, 39; mov rbx, 0x1122; syscall; add rbx,1; syscall; mov [0x5000], eax ; ud2
        assert!(code.write(
            0,
            &[
                0xb8, 39, 0, 0, 0, 0x48, 0xc7, 0xc3, 0x22, 0x11, 0, 0, 0x0f, 0x05, 0x48, 0xff,
                0xc3, 0x0f, 0x05, 0x89, 0x04, 0x25, 0, 0x50, 0, 0, 0x0f, 0x0b
            ]
        ));
        sp.map(GuestVirt::new(0x40_0000), &code, PteFlags::RX)
            .unwrap();
        let mut u = UserContext::new(0x40_0000, 0x7000).unwrap();
        for _ in 0..2 {
            println!(
                "{:?} rip {:x} rbx {:x}",
                u.run(&sp).unwrap(),
                u.registers().rip,
                u.registers().rbx
            );
        }
        println!("{:?} rip {:x}", u.run(&sp).unwrap(), u.registers().rip);
        let data = Arc::new(Pages::new(1).unwrap());
        sp.map(GuestVirt::new(0x5000), &data, PteFlags::RW).unwrap();
        println!("{:?} rip {:x}", u.run(&sp).unwrap(), u.registers().rip);
        let mut b = [0; 4];
        assert!(data.read(0, &mut b));
        println!("{b:?}");
        u.registers_mut().rip = 0x40_0000;
        u.run(&sp).unwrap();
        u.registers_mut().rip = 0x40_0000;
        let t = std::time::Instant::now();
        for _ in 0..1000 {
            u.registers_mut().rip = 0x40_000c;
            u.run(&sp).unwrap();
        }
        println!("{:?}/1000", t.elapsed());
    }
    println!("frames {}", Frames::in_use());
    // own page tables
    let own = ProcessTables::get().unwrap();
    let p = Pages::new(4).unwrap();
    let r = p.range();
    own.split(r, PageSize::Size4KiB)
        .unwrap()
        .apply(&Tlb::of_process());
    assert!(p.write(0, &[1]));
    own.clear_dirty(r, |l| println!("was dirty {:?}", l.va))
        .unwrap()
        .apply(&Tlb::of_process());
    assert!(p.write(4096 * 2, &[1]));
    own.clear_dirty(r, |l| println!("dirty {:?}", l.va))
        .unwrap()
        .apply(&Tlb::of_process());
    let h = std::thread::spawn(|| ());
    h.join().unwrap();
    assert!(p.write(4096 * 3, &[1]));
    own.clear_dirty(r, |l| println!("dirty {:?}", l.va))
        .unwrap()
        .apply(&Tlb::of_process());
    assert!(p.write(4096 * 3, &[1]));
    own.clear_dirty(r, |l| println!("dirty {:?}", l.va))
        .unwrap()
        .apply(&Tlb::of_process());
}
