//! The registers as gdb knows them, described to it in its own XML.
//!
//! The names of features, registers and types are those that gdb gives meaning
//! to (its manual, "Standard Target Features", "i386 Features"). Which vector
//! registers there are is told by XCR0.

use core::fmt::Write;

use super::control::Saved;
use crate::engine::{UserRegs, UserState};

/// Ring 3 selectors as Linux programs see them.
const USER_CS: u32 = 0x33;
const USER_SS: u32 = 0x2b;

/// Bit 1 and IF, which the engine sets by itself.
const FLAGS_ALWAYS_SET: u64 = 0x202;

/// What no program has: gdb would let the kernel start a call again.
const NO_CALL: u64 = u64::MAX;

/// First address that is not canonical in the lower half.
const LOWER_HALF_END: u64 = 1 << 47;

/// Components of the extended state (SDM volume 1, 13.1).
mod component {
    pub(super) const X87: u32 = 0;
    pub(super) const SSE: u32 = 1;
    pub(super) const AVX: u32 = 2;
    pub(super) const OPMASK: u32 = 5;
    pub(super) const ZMM_HIGH: u32 = 6;
    pub(super) const HIGH_ZMM: u32 = 7;
}

/// Offsets in the XSAVE area's legacy part (SDM volume 1, 10.5.1 and 13.4.1).
mod legacy {
    pub(super) const FCW: usize = 0;
    pub(super) const FSW: usize = 2;
    pub(super) const TAGS: usize = 4;
    pub(super) const OPCODE: usize = 6;
    pub(super) const INSTRUCTION: usize = 8;
    pub(super) const OPERAND: usize = 16;
    pub(super) const MXCSR: usize = 24;
    pub(super) const ST: usize = 32;
    pub(super) const XMM: usize = 160;
    pub(super) const XSTATE_BV: usize = 512;
}

/// FCW and MXCSR in their initial state.
const FCW_INITIAL: u16 = 0x37f;

type General = fn(&mut UserRegs) -> &mut u64;

/// Where a register is.
#[derive(Clone, Copy)]
enum Place {
    General(General),
    Rip,
    Flags,
    Segment(u32),
    FsBase,
    GsBase,
    OrigRax,
    X87(X87),
    Mxcsr,
    /// Bytes of the XSAVE area.
    Extended {
        component: u32,
        at: usize,
    },
}

/// The x87 registers that gdb has as 32-bit numbers.
#[derive(Clone, Copy)]
enum X87 {
    Fctrl,
    Fstat,
    Ftag,
    Fiseg,
    Fioff,
    Foseg,
    Fooff,
    Fop,
}

struct Register {
    bytes: usize,
    /// In the packet that has all registers.
    at: usize,
    place: Place,
}

/// All registers of a thread, as gdb is told of them.
pub(crate) struct Layout {
    registers: Vec<Register>,
    xml: String,
    len: usize,
}

/// A register cannot have this value, or is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused;

impl Layout {
    /// For a CPU with these components of extended state.
    pub(crate) fn new(xcr0: u64) -> Self {
        let mut layout = Self {
            registers: Vec::new(),
            xml: String::from(HEAD),
            len: 0,
        };
        layout.core();
        layout.sse();
        layout.begin("linux");
        layout.add("orig_rax", "int", 8, Place::OrigRax);
        layout.end();
        layout.begin("segments");
        layout.add("fs_base", "int", 8, Place::FsBase);
        layout.add("gs_base", "int", 8, Place::GsBase);
        layout.end();
        let has = |component: u32| xcr0 >> component & 1 == 1;
        if has(component::AVX) {
            layout.avx();
            let avx512 = [component::OPMASK, component::ZMM_HIGH, component::HIGH_ZMM];
            if avx512.into_iter().all(has) {
                layout.avx512();
            }
        }
        layout.xml.push_str("</target>\n");
        layout
    }

    /// The description for gdb.
    pub(crate) fn xml(&self) -> &str {
        &self.xml
    }

    fn begin(&mut self, feature: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.xml, "<feature name=\"org.gnu.gdb.i386.{feature}\">");
    }

    fn end(&mut self) {
        self.xml.push_str("</feature>\n");
    }

    fn add(&mut self, name: &str, kind: &str, bytes: usize, place: Place) {
        let bits = bytes * 8;
        let group = match place {
            Place::X87(_) => " group=\"float\"",
            _ => "",
        };
        let _ = writeln!(
            self.xml,
            "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"{group}/>"
        );
        self.registers.push(Register {
            bytes,
            at: self.len,
            place,
        });
        self.len += bytes;
    }

    /// `count` registers of the extended state, one after the other.
    fn add_row(&mut self, names: Names, kind: &str, bytes: usize, component: u32, row: Row) {
        for index in 0..row.count {
            let name = format!("{}{}{}", names.before, names.first + index, names.after);
            let at = row.at + index * row.stride;
            self.add(&name, kind, bytes, Place::Extended { component, at });
        }
    }

    fn core(&mut self) {
        const GENERAL: [(&str, General); 16] = [
            ("rax", |regs| &mut regs.rax),
            ("rbx", |regs| &mut regs.rbx),
            ("rcx", |regs| &mut regs.rcx),
            ("rdx", |regs| &mut regs.rdx),
            ("rsi", |regs| &mut regs.rsi),
            ("rdi", |regs| &mut regs.rdi),
            ("rbp", |regs| &mut regs.rbp),
            ("rsp", |regs| &mut regs.rsp),
            ("r8", |regs| &mut regs.r8),
            ("r9", |regs| &mut regs.r9),
            ("r10", |regs| &mut regs.r10),
            ("r11", |regs| &mut regs.r11),
            ("r12", |regs| &mut regs.r12),
            ("r13", |regs| &mut regs.r13),
            ("r14", |regs| &mut regs.r14),
            ("r15", |regs| &mut regs.r15),
        ];
        const X87S: [(&str, X87); 8] = [
            ("fctrl", X87::Fctrl),
            ("fstat", X87::Fstat),
            ("ftag", X87::Ftag),
            ("fiseg", X87::Fiseg),
            ("fioff", X87::Fioff),
            ("foseg", X87::Foseg),
            ("fooff", X87::Fooff),
            ("fop", X87::Fop),
        ];
        self.begin("core");
        self.xml.push_str(EFLAGS);
        for (name, general) in GENERAL {
            let kind = match name {
                "rbp" | "rsp" => "data_ptr",
                _ => "int64",
            };
            self.add(name, kind, 8, Place::General(general));
        }
        self.add("rip", "code_ptr", 8, Place::Rip);
        self.add("eflags", "i386_eflags", 4, Place::Flags);
        for (name, selector) in [
            ("cs", USER_CS),
            ("ss", USER_SS),
            ("ds", 0),
            ("es", 0),
            ("fs", 0),
            ("gs", 0),
        ] {
            self.add(name, "int32", 4, Place::Segment(selector));
        }
        let st = Row {
            at: legacy::ST,
            stride: 16,
            count: 8,
        };
        self.add_row(Names::of("st"), "i387_ext", 10, component::X87, st);
        for (name, x87) in X87S {
            self.add(name, "int", 4, Place::X87(x87));
        }
        self.end();
    }

    fn sse(&mut self) {
        self.begin("sse");
        self.xml.push_str(VEC128);
        self.xml.push_str(MXCSR);
        let xmm = Row {
            at: legacy::XMM,
            stride: 16,
            count: 16,
        };
        self.add_row(Names::of("xmm"), "vec128", 16, component::SSE, xmm);
        self.add("mxcsr", "i386_mxcsr", 4, Place::Mxcsr);
        self.end();
    }

    fn avx(&mut self) {
        self.begin("avx");
        let upper = Row {
            at: offset_of_component(component::AVX),
            stride: 16,
            count: 16,
        };
        let names = Names {
            after: "h",
            ..Names::of("ymm")
        };
        self.add_row(names, "uint128", 16, component::AVX, upper);
        self.end();
    }

    fn avx512(&mut self) {
        self.begin("avx512");
        self.xml.push_str(VEC128);
        self.xml
            .push_str("<vector id=\"v2ui128\" type=\"uint128\" count=\"2\"/>\n");
        let high = offset_of_component(component::HIGH_ZMM);
        let row = |at, stride, count| Row { at, stride, count };
        let names = |before, first, after| Names {
            before,
            first,
            after,
        };
        let component = component::HIGH_ZMM;
        self.add_row(
            names("xmm", 16, ""),
            "vec128",
            16,
            component,
            row(high, 64, 16),
        );
        let upper = row(high + 16, 64, 16);
        self.add_row(names("ymm", 16, "h"), "uint128", 16, component, upper);
        let masks = row(offset_of_component(component::OPMASK), 8, 8);
        self.add_row(Names::of("k"), "uint64", 8, component::OPMASK, masks);
        let zmm = row(offset_of_component(component::ZMM_HIGH), 32, 16);
        self.add_row(
            names("zmm", 0, "h"),
            "v2ui128",
            32,
            component::ZMM_HIGH,
            zmm,
        );
        let upper = row(high + 32, 64, 16);
        self.add_row(names("zmm", 16, "h"), "v2ui128", 32, component, upper);
        self.end();
    }

    /// All registers, in the order of the description.
    pub(crate) fn read_all(&self, saved: &Saved) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        for register in &self.registers {
            let to = &mut bytes[register.at..register.at + register.bytes];
            register.place.read(saved, to);
        }
        bytes
    }

    /// One register, by its number; its length is the result's.
    pub(crate) fn read(&self, number: usize, saved: &Saved) -> Result<Vec<u8>, Refused> {
        let register = self.registers.get(number).ok_or(Refused)?;
        let mut bytes = vec![0; register.bytes];
        register.place.read(saved, &mut bytes);
        Ok(bytes)
    }

    /// Sets all registers; nothing changes if one of them cannot be.
    pub(crate) fn write_all(&self, saved: &mut Saved, bytes: &[u8]) -> Result<(), Refused> {
        if bytes.len() != self.len {
            return Err(Refused);
        }
        let mut new = saved.clone();
        for register in &self.registers {
            let from = &bytes[register.at..register.at + register.bytes];
            // Only what is to change, lest an initial component be marked as
            // used.
            let mut old = vec![0; register.bytes];
            register.place.read(&new, &mut old);
            if old != from {
                register.place.write(&mut new, from)?;
            }
        }
        *saved = new;
        Ok(())
    }

    /// Sets one register.
    pub(crate) fn write(
        &self,
        number: usize,
        saved: &mut Saved,
        bytes: &[u8],
    ) -> Result<(), Refused> {
        let register = self.registers.get(number).ok_or(Refused)?;
        if bytes.len() != register.bytes {
            return Err(Refused);
        }
        register.place.write(saved, bytes)
    }
}

/// How a row of registers is called: `before`, a number, `after`.
#[derive(Clone, Copy)]
struct Names {
    before: &'static str,
    first: usize,
    after: &'static str,
}

impl Names {
    const fn of(before: &'static str) -> Self {
        Self {
            before,
            first: 0,
            after: "",
        }
    }
}

/// Where a row of registers lies in the XSAVE area.
#[derive(Clone, Copy)]
struct Row {
    at: usize,
    stride: usize,
    count: usize,
}

/// Where the standard format has a component beyond the first two: the CPU
/// says so.
fn offset_of_component(component: u32) -> usize {
    core::arch::x86_64::__cpuid_count(0xd, component).ebx as usize
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// Whether a component is in use; if it is not, it has its initial value,
/// whatever the area holds.
fn is_in_use(xstate: &[u8], component: u32) -> bool {
    let byte = legacy::XSTATE_BV + component as usize / 8;
    xstate
        .get(byte)
        .is_some_and(|bits| bits >> (component % 8) & 1 == 1)
}

/// Marks a component as in use, with its initial value where it was not.
fn bring_into_use(xstate: &mut [u8], component: u32) {
    if is_in_use(xstate, component) {
        return;
    }
    let (start, end) = match component {
        component::X87 => (legacy::ST, legacy::XMM),
        component::SSE => (legacy::XMM, legacy::XMM + 256),
        other => {
            let leaf = core::arch::x86_64::__cpuid_count(0xd, other);
            let start = leaf.ebx as usize;
            (start, start + leaf.eax as usize)
        }
    };
    if let Some(place) = xstate.get_mut(start..end) {
        place.fill(0);
    }
    if component == component::X87 {
        put(xstate, 0, &[0; legacy::MXCSR]);
        put(xstate, legacy::FCW, &FCW_INITIAL.to_le_bytes());
    }
    let byte = legacy::XSTATE_BV + component as usize / 8;
    if let Some(bits) = xstate.get_mut(byte) {
        *bits |= 1 << (component % 8);
    }
}

impl Place {
    fn read(self, saved: &Saved, to: &mut [u8]) {
        let mut regs = saved.user.regs;
        let mut number = |value: u64| to.copy_from_slice(&value.to_le_bytes()[..to.len()]);
        match self {
            Self::General(general) => number(*general(&mut regs)),
            Self::Rip => number(regs.rip),
            Self::Flags => number(regs.rflags | FLAGS_ALWAYS_SET),
            Self::Segment(selector) => number(selector.into()),
            Self::FsBase => number(saved.user.fs_base),
            Self::GsBase => number(saved.user.gs_base),
            Self::OrigRax => number(NO_CALL),
            Self::X87(x87) => number(x87.read(&saved.xstate).into()),
            Self::Mxcsr => {
                if let Some(from) = saved.xstate.get(legacy::MXCSR..legacy::MXCSR + 4) {
                    to.copy_from_slice(from);
                }
            }
            Self::Extended { component, at } => match saved.xstate.get(at..at + to.len()) {
                Some(from) if is_in_use(&saved.xstate, component) => to.copy_from_slice(from),
                _ => to.fill(0),
            },
        }
    }

    fn write(self, saved: &mut Saved, from: &[u8]) -> Result<(), Refused> {
        let mut bytes = [0; 8];
        let len = from.len().min(8);
        bytes[..len].copy_from_slice(&from[..len]);
        let value = u64::from_le_bytes(bytes);
        let user = &mut saved.user;
        match self {
            Self::Rip | Self::FsBase | Self::GsBase if value >= LOWER_HALF_END => {
                return Err(Refused);
            }
            Self::General(general) => *general(&mut user.regs) = value,
            Self::Rip => user.regs.rip = value,
            Self::Flags => user.regs.rflags = value & UserState::RFLAGS_USER,
            Self::FsBase => user.fs_base = value,
            Self::GsBase => user.gs_base = value,
            // What is written back unchanged, and has no other value here.
            Self::Segment(_) | Self::OrigRax => {}
            Self::X87(x87) => x87.write(&mut saved.xstate, value as u32),
            Self::Mxcsr => put(&mut saved.xstate, legacy::MXCSR, from),
            Self::Extended { component, at } => {
                bring_into_use(&mut saved.xstate, component);
                put(&mut saved.xstate, at, from);
            }
        }
        saved.changed = true;
        Ok(())
    }
}

impl X87 {
    fn read(self, xstate: &[u8]) -> u32 {
        if !is_in_use(xstate, component::X87) {
            return match self {
                Self::Fctrl => FCW_INITIAL.into(),
                Self::Ftag => 0xffff,
                _ => 0,
            };
        }
        let word = |at| u32::from(u16_at(xstate, at));
        match self {
            Self::Fctrl => word(legacy::FCW),
            Self::Fstat => word(legacy::FSW),
            Self::Ftag => full_tags(xstate),
            Self::Fiseg => word(legacy::INSTRUCTION + 4),
            Self::Fioff => word(legacy::INSTRUCTION) | word(legacy::INSTRUCTION + 2) << 16,
            Self::Foseg => word(legacy::OPERAND + 4),
            Self::Fooff => word(legacy::OPERAND) | word(legacy::OPERAND + 2) << 16,
            Self::Fop => word(legacy::OPCODE),
        }
    }

    fn write(self, xstate: &mut [u8], value: u32) {
        bring_into_use(xstate, component::X87);
        let low = &value.to_le_bytes()[..2];
        match self {
            Self::Fctrl => put(xstate, legacy::FCW, low),
            Self::Fstat => put(xstate, legacy::FSW, low),
            Self::Ftag => {
                let used = (0..8).filter(|index| value >> (2 * index) & 3 != 3);
                let tags = used.fold(0_u8, |tags, index| tags | 1 << index);
                put(xstate, legacy::TAGS, &[tags]);
            }
            Self::Fiseg => put(xstate, legacy::INSTRUCTION + 4, low),
            Self::Fioff => put(xstate, legacy::INSTRUCTION, &value.to_le_bytes()),
            Self::Foseg => put(xstate, legacy::OPERAND + 4, low),
            Self::Fooff => put(xstate, legacy::OPERAND, &value.to_le_bytes()),
            Self::Fop => put(xstate, legacy::OPCODE, low),
        }
    }
}

/// The tag word of two bits a register, of which FXSAVE keeps one (SDM volume
/// 1, 10.5.1.1).
fn full_tags(xstate: &[u8]) -> u32 {
    const VALID: u32 = 0;
    const ZERO: u32 = 1;
    const SPECIAL: u32 = 2;
    const EMPTY: u32 = 3;
    let top = usize::from(u16_at(xstate, legacy::FSW)) >> 11 & 7;
    let used = xstate.get(legacy::TAGS).copied().unwrap_or(0);
    (0..8_usize).fold(0, |tags, physical| {
        let tag = if used >> physical & 1 == 0 {
            EMPTY
        } else {
            let at = legacy::ST + 16 * ((physical + 8 - top) % 8);
            let exponent = u16_at(xstate, at + 8) & 0x7fff;
            let significand = xstate.get(at..at + 8).unwrap_or(&[0; 8]);
            let has_integer_bit = significand[7] & 0x80 != 0;
            match exponent {
                0 if significand.iter().all(|&byte| byte == 0) => ZERO,
                0 | 0x7fff => SPECIAL,
                _ if has_integer_bit => VALID,
                _ => SPECIAL,
            }
        };
        tags | tag << (2 * physical)
    })
}

const HEAD: &str = "<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n\
    <target>\n<architecture>i386:x86-64</architecture>\n<osabi>GNU/Linux</osabi>\n";

const EFLAGS: &str = "<flags id=\"i386_eflags\" size=\"4\">\
    <field name=\"CF\" start=\"0\" end=\"0\"/><field name=\"\" start=\"1\" end=\"1\"/>\
    <field name=\"PF\" start=\"2\" end=\"2\"/><field name=\"AF\" start=\"4\" end=\"4\"/>\
    <field name=\"ZF\" start=\"6\" end=\"6\"/><field name=\"SF\" start=\"7\" end=\"7\"/>\
    <field name=\"TF\" start=\"8\" end=\"8\"/><field name=\"IF\" start=\"9\" end=\"9\"/>\
    <field name=\"DF\" start=\"10\" end=\"10\"/><field name=\"OF\" start=\"11\" end=\"11\"/>\
    <field name=\"RF\" start=\"16\" end=\"16\"/><field name=\"AC\" start=\"18\" end=\"18\"/>\
    <field name=\"ID\" start=\"21\" end=\"21\"/></flags>\n";

const VEC128: &str = "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\
    <vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>\
    <vector id=\"v16i8\" type=\"int8\" count=\"16\"/>\
    <vector id=\"v8i16\" type=\"int16\" count=\"8\"/>\
    <vector id=\"v4i32\" type=\"int32\" count=\"4\"/>\
    <vector id=\"v2i64\" type=\"int64\" count=\"2\"/>\
    <union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/>\
    <field name=\"v2_double\" type=\"v2d\"/><field name=\"v16_int8\" type=\"v16i8\"/>\
    <field name=\"v8_int16\" type=\"v8i16\"/><field name=\"v4_int32\" type=\"v4i32\"/>\
    <field name=\"v2_int64\" type=\"v2i64\"/><field name=\"uint128\" type=\"uint128\"/></union>\n";

const MXCSR: &str = "<flags id=\"i386_mxcsr\" size=\"4\">\
    <field name=\"IE\" start=\"0\" end=\"0\"/><field name=\"DE\" start=\"1\" end=\"1\"/>\
    <field name=\"ZE\" start=\"2\" end=\"2\"/><field name=\"OE\" start=\"3\" end=\"3\"/>\
    <field name=\"UE\" start=\"4\" end=\"4\"/><field name=\"PE\" start=\"5\" end=\"5\"/>\
    <field name=\"DAZ\" start=\"6\" end=\"6\"/><field name=\"IM\" start=\"7\" end=\"7\"/>\
    <field name=\"DM\" start=\"8\" end=\"8\"/><field name=\"ZM\" start=\"9\" end=\"9\"/>\
    <field name=\"OM\" start=\"10\" end=\"10\"/><field name=\"UM\" start=\"11\" end=\"11\"/>\
    <field name=\"PM\" start=\"12\" end=\"12\"/><field name=\"FZ\" start=\"15\" end=\"15\"/>\
    </flags>\n";

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Saved {
        let mut saved = Saved {
            user: UserState::default(),
            xstate: vec![0xaa; 4096],
            name: String::new(),
            changed: false,
        };
        saved.xstate[legacy::XSTATE_BV..legacy::XSTATE_BV + 64].fill(0);
        saved
    }

    fn number(layout: &Layout, name: &str) -> usize {
        let of = |line: &str| line.contains(&format!("<reg name=\"{name}\""));
        let mut lines = layout.xml.lines().filter(|line| line.starts_with("<reg "));
        lines.position(of).unwrap()
    }

    #[test]
    fn what_is_written_is_read_again_and_nothing_else_changes() {
        // As many components as this CPU has.
        let has = |component: &u32| core::arch::x86_64::__cpuid_count(0xd, *component).eax != 0;
        let components = [2, 5, 6, 7].into_iter().filter(has);
        let layout = Layout::new(components.fold(3, |xcr0, component| xcr0 | 1 << component));
        let before = layout.read_all(&saved());
        for index in 0..layout.registers.len() {
            let register = &layout.registers[index];
            let mut saved = saved();
            let mut value = vec![0x15; register.bytes];
            // Canonical, where it must be.
            if register.bytes == 8 {
                value[6..].fill(0);
            }
            layout.write(index, &mut saved, &value).unwrap();
            // Tags are told by what the registers hold.
            let fixed = matches!(
                register.place,
                Place::Segment(_) | Place::OrigRax | Place::Flags | Place::X87(X87::Ftag)
            );
            let read = layout.read(index, &saved).unwrap();
            // Of most x87 registers there is half.
            let len = match register.place {
                Place::X87(_) => 2,
                _ => register.bytes,
            };
            if !fixed {
                assert_eq!(read[..len], value[..len], "register {index}");
            }
            let after = layout.read_all(&saved);
            let all = register.at..register.at + register.bytes;
            // The tags are made of the registers too.
            let tags = &layout.registers[number(&layout, "ftag")];
            for at in (0..layout.len).filter(|at| !all.contains(at)) {
                if !(tags.at..tags.at + 4).contains(&at) {
                    assert_eq!(after[at], before[at], "register {index}, byte {at}");
                }
            }
        }
    }

    #[test]
    fn components_that_are_not_in_use_have_their_initial_values() {
        let layout = Layout::new(7);
        let mut saved = saved();
        let read = |name: &str, saved: &Saved| layout.read(number(&layout, name), saved).unwrap();
        assert_eq!(read("fctrl", &saved), [0x7f, 3, 0, 0]);
        assert_eq!(read("ftag", &saved), [0xff, 0xff, 0, 0]);
        assert_eq!(read("xmm3", &saved), [0; 16]);
        assert_eq!(read("ymm3h", &saved), [0; 16]);
        layout
            .write(number(&layout, "xmm3"), &mut saved, &[1; 16])
            .unwrap();
        assert_eq!(read("xmm3", &saved), [1; 16]);
        assert_eq!(read("xmm2", &saved), [0; 16]);
    }

    #[test]
    fn addresses_that_no_program_has_are_refused() {
        let layout = Layout::new(3);
        for name in ["rip", "fs_base", "gs_base"] {
            let mut saved = saved();
            let refused = layout.write(
                number(&layout, name),
                &mut saved,
                &LOWER_HALF_END.to_le_bytes(),
            );
            assert_eq!((refused, saved.changed), (Err(Refused), false), "{name}");
        }
        let mut saved = saved();
        let flags = number(&layout, "eflags");
        layout.write(flags, &mut saved, &[0xff; 4]).unwrap();
        assert_eq!(
            saved.user.regs.rflags & !UserState::RFLAGS_USER,
            0,
            "{:#x}",
            saved.user.regs.rflags
        );
        assert_eq!(layout.write(flags, &mut saved, &[0; 8]), Err(Refused));
        assert_eq!(layout.write(9999, &mut saved, &[0; 8]), Err(Refused));
    }

    #[test]
    fn tags_tell_what_x87_registers_hold() {
        let mut saved = saved();
        bring_into_use(&mut saved.xstate, component::X87);
        // Top is 6: ST0 is the physical register 6.
        put(&mut saved.xstate, legacy::FSW, &(6_u16 << 11).to_le_bytes());
        put(&mut saved.xstate, legacy::TAGS, &[0b1100_0000]);
        // 1.0 and 0.0.
        put(&mut saved.xstate, legacy::ST + 7, &[0x80, 0xff, 0x3f]);
        let tags = full_tags(&saved.xstate);
        assert_eq!(tags, 0xffff & !(3 << 12) & !(3 << 14) | 1 << 14);
    }
}
