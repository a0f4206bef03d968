//! A library in C that reads hostile input, called in a compartment: Debian's libexpat, loaded
//! as any library is.
//!
//! Inputs that versions of it are known to crash of are among them. What each does is found
//! out without a compartment first, in a process that may die: if it kills that, it must be an
//! error in the compartment, and otherwise the answers must be the same. The variable
//! `DUNE_TEST_EXPAT` names another libexpat than the installed one: with that of Debian's
//! 2.5.0-1+deb12u2, CVE-2026-32776 is a jump to a null pointer.
#![expect(unsafe_code, reason = "a library in C")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    clippy::missing_transmute_annotations,
    reason = "a parser's life is one block; the types of its functions are in their structure"
)]

use core::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dune_wedge::{Access, Compartment, CompartmentError};

type Parser = *mut c_void;
type Start = unsafe extern "C" fn(*mut c_void, *const c_char, *const *const c_char);
type End = unsafe extern "C" fn(*mut c_void, *const c_char);
type External = unsafe extern "C" fn(
    Parser,
    *const c_char,
    *const c_char,
    *const c_char,
    *const c_char,
) -> c_int;

/// The functions of the library that are used.
#[derive(Debug)]
struct Expat {
    create: unsafe extern "C" fn(*const c_char) -> Parser,
    salt: unsafe extern "C" fn(Parser, u64) -> c_int,
    user_data: unsafe extern "C" fn(Parser, *mut c_void),
    elements: unsafe extern "C" fn(Parser, Option<Start>, Option<End>),
    parameter_entities: unsafe extern "C" fn(Parser, c_int) -> c_int,
    external: unsafe extern "C" fn(Parser, Option<External>),
    create_external: unsafe extern "C" fn(Parser, *const c_char, *const c_char) -> Parser,
    parse: unsafe extern "C" fn(Parser, *const c_char, c_int, c_int) -> c_int,
    error: unsafe extern "C" fn(Parser) -> c_int,
    free: unsafe extern "C" fn(Parser),
}

static EXPAT: OnceLock<Expat> = OnceLock::new();

/// Loads the library, before the runtime starts, so that it is in the image.
fn start() {
    load();
    enter();
}

fn enter() {
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
}

/// Loads the library; ignores the test where there is none.
fn load() {
    let name = std::env::var("DUNE_TEST_EXPAT").unwrap_or_else(|_| "libexpat.so.1".to_owned());
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: loading it has no effect but that.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) };
    if library.is_null() {
        dune_testing::ignore("libexpat is not installed (Debian: apt-get install libexpat1)");
    }
    let symbol = |name: &core::ffi::CStr| {
        // SAFETY: a question.
        let address = unsafe { libc::dlsym(library, name.as_ptr()) };
        assert!(!address.is_null(), "{name:?}");
        address
    };
    // SAFETY: the functions have these types (expat.h).
    let expat = unsafe {
        Expat {
            create: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_ParserCreate")),
            salt: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_SetHashSalt")),
            user_data: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_SetUserData")),
            elements: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_SetElementHandler")),
            parameter_entities: core::mem::transmute::<*mut c_void, _>(symbol(
                c"XML_SetParamEntityParsing",
            )),
            external: core::mem::transmute::<*mut c_void, _>(symbol(
                c"XML_SetExternalEntityRefHandler",
            )),
            create_external: core::mem::transmute::<*mut c_void, _>(symbol(
                c"XML_ExternalEntityParserCreate",
            )),
            parse: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_Parse")),
            error: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_GetErrorCode")),
            free: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_ParserFree")),
        }
    };
    EXPAT.set(expat).unwrap();
}

#[derive(Debug, Default)]
struct Seen {
    elements: u32,
    depth: u32,
    deepest: u32,
}

unsafe extern "C" fn on_start(seen: *mut c_void, _: *const c_char, _: *const *const c_char) {
    // SAFETY: what `parse_with` passed.
    let seen = unsafe { &mut *seen.cast::<Seen>() };
    seen.elements += 1;
    seen.depth += 1;
    seen.deepest = seen.deepest.max(seen.depth);
}

unsafe extern "C" fn on_end(seen: *mut c_void, _: *const c_char) {
    // SAFETY: as above.
    let seen = unsafe { &mut *seen.cast::<Seen>() };
    seen.depth = seen.depth.saturating_sub(1);
}

/// A bug, as libraries and those who use them have: it believes a length that the input has.
unsafe extern "C" fn faulty_start(
    _: *mut c_void,
    _: *const c_char,
    attributes: *const *const c_char,
) {
    // SAFETY: none: the number comes from the input.
    unsafe {
        let value = *attributes.wrapping_add(1);
        if value.is_null() {
            return;
        }
        let length = core::ffi::CStr::from_ptr(value).to_string_lossy();
        let length: usize = length.parse().unwrap_or(0);
        let buffer = libc::malloc(16).cast::<u8>();
        buffer.write_bytes(b'x', length);
        libc::free(core::hint::black_box(buffer).cast());
    }
}

/// Parses, inside a compartment or not: the error code, elements, and depth.
fn parse_with(input: &[u8], handler: Start) -> [u32; 3] {
    let expat = EXPAT.get().unwrap();
    let mut seen = Seen::default();
    // SAFETY: as expat.h says.
    unsafe {
        let parser = (expat.create)(core::ptr::null());
        // So that it does not ask for random numbers, which it is not given.
        (expat.salt)(parser, 0x1234_5678);
        (expat.user_data)(parser, (&raw mut seen).cast());
        (expat.elements)(parser, Some(handler), Some(on_end));
        let text = input.as_ptr().cast::<c_char>();
        let parsed = (expat.parse)(parser, text, input.len() as c_int, 1);
        let error = if parsed == 0 {
            (expat.error)(parser)
        } else {
            0
        };
        (expat.free)(parser);
        [error as u32, seen.elements, seen.deepest]
    }
}

/// The texts that external entities lead to: the first word of each is its name.
static TEXTS: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

unsafe extern "C" fn on_external(
    parser: Parser,
    context: *const c_char,
    _: *const c_char,
    name: *const c_char,
    _: *const c_char,
) -> c_int {
    let expat = EXPAT.get().unwrap();
    let [address, length] = TEXTS.each_ref().map(|word| word.load(Ordering::Relaxed));
    // SAFETY: the input of `parse_known`, which has not returned; a string of the library's;
    // the rest as expat.h says.
    unsafe {
        let texts = core::slice::from_raw_parts(address as *const u8, length);
        let name = core::ffi::CStr::from_ptr(name).to_bytes();
        let named = texts.split(|byte| *byte == 0).find_map(|text| {
            let text = text.strip_prefix(name)?;
            text.strip_prefix(b" ")
        });
        let Some(text) = named else {
            return 0;
        };
        let inner = (expat.create_external)(parser, context, core::ptr::null());
        let parsed = (expat.parse)(inner, text.as_ptr().cast(), text.len() as c_int, 1);
        (expat.free)(inner);
        parsed
    }
}

/// Parses a document with a DTD elsewhere: document and external texts have zeros between
/// them.
fn parse_known(input: &[u8]) -> Vec<u8> {
    let expat = EXPAT.get().unwrap();
    let (document, texts) = match input.iter().position(|byte| *byte == 0) {
        Some(end) => (&input[..end], &input[end + 1..]),
        None => (input, &[][..]),
    };
    TEXTS[0].store(texts.as_ptr() as usize, Ordering::Relaxed);
    TEXTS[1].store(texts.len(), Ordering::Relaxed);
    // SAFETY: as expat.h says.
    unsafe {
        let parser = (expat.create)(core::ptr::null());
        (expat.salt)(parser, 0x1234_5678);
        const ALWAYS: c_int = 2;
        (expat.parameter_entities)(parser, ALWAYS);
        (expat.external)(parser, Some(on_external));
        let text = document.as_ptr().cast::<c_char>();
        let parsed = (expat.parse)(parser, text, document.len() as c_int, 1);
        let error = (expat.error)(parser);
        (expat.free)(parser);
        vec![parsed as u8, error as u8]
    }
}

fn parse(input: &[u8]) -> Vec<u8> {
    parse_with(input, on_start)
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect()
}

fn parse_faulty(input: &[u8]) -> Vec<u8> {
    parse_with(input, faulty_start)
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect()
}

/// Inputs that parsers have died of, and what this one says.
fn documents() -> Vec<Vec<u8>> {
    let deep = 20_000;
    let mut documents: Vec<Vec<u8>> = vec![
        b"<a><b x='1'/><b/>text &amp; more</a>".to_vec(),
        b"<?xml version='1.0' encoding='UTF-16'?><a/>".to_vec(),
        b"<a>\xff\xfe\x00</a>".to_vec(),
        b"<a xmlns:x='u' x:b='1' x:b='2'/>".to_vec(),
        b"<!DOCTYPE a [<!ENTITY x '&x;'>]><a>&x;</a>".to_vec(),
        b"<!DOCTYPE a [<!ELEMENT a (b,(c|(d,e)*)+)>]><a/>".to_vec(),
        b"".to_vec(),
        b"<".to_vec(),
        b"<a".repeat(5000),
    ];
    // As deep as no stack should have to follow.
    documents.push([b"<a>".repeat(deep), b"</a>".repeat(deep)].concat());
    // Laughs: each entity is ten of the one before.
    let mut laughs = String::from("<!DOCTYPE l [<!ENTITY l0 'lol'>");
    for n in 1..6 {
        let ten = format!("&l{};", n - 1).repeat(10);
        laughs.push_str(&format!("<!ENTITY l{n} '{ten}'>"));
    }
    laughs.push_str("]><l>&l5;</l>");
    documents.push(laughs.into_bytes());
    documents
}

/// Inputs that versions of the library crash of.
fn known() -> Vec<(&'static str, Vec<u8>)> {
    const DEEP: usize = 15_000;
    // Entities that lead to entities: the stack was used up by following them.
    let mut chain = String::from("<!DOCTYPE a [<!ENTITY e0 'x'>");
    for n in 1..DEEP {
        chain.push_str(&format!("<!ENTITY e{n} '&e{};'>", n - 1));
    }
    let content = format!("{chain}]><a>&e{};</a>", DEEP - 1);
    let attribute = format!("{chain}]><a b='&e{};'/>", DEEP - 1);
    let groups = ["(".repeat(DEEP), ")".repeat(DEEP)];
    let model = format!(
        "<!DOCTYPE a [<!ELEMENT a {}b{}>]><a/>",
        groups[0], groups[1]
    );
    // A value from an external entity that is empty.
    let empty = "<!DOCTYPE r SYSTEM 'ext.dtd'><r/>\0\
                 ext.dtd <!ENTITY % pe SYSTEM 'empty'><!ENTITY ge \"%pe;\">\0\
                 empty ";
    vec![
        ("CVE-2024-8176, in content", content.into_bytes()),
        ("CVE-2024-8176, in an attribute", attribute.into_bytes()),
        ("CVE-2022-25313", model.into_bytes()),
        ("CVE-2026-32776", empty.as_bytes().to_vec()),
    ]
}

/// What becomes of a process that parses.
#[derive(Debug)]
enum Natively {
    Said(Vec<u8>),
    Died(i32),
}

/// Parses in a child, with as much stack as a compartment has.
fn natively(parser: fn(&[u8]) -> Vec<u8>, input: &[u8]) -> Natively {
    use std::io::{Read, Write};
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    // SAFETY: the child parses, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK);
            let said = thread.spawn_scoped(scope, || parser(input)).unwrap();
            writer.write_all(&said.join().unwrap()).unwrap();
        });
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    drop(writer);
    let mut said = Vec::new();
    reader.read_to_end(&mut said).unwrap();
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    if libc::WIFSIGNALED(status) {
        return Natively::Died(libc::WTERMSIG(status));
    }
    Natively::Said(said)
}

const STACK: usize = 256 << 10;

/// The two agree: death outside is an error inside.
#[track_caller]
fn assert_alike(name: &str, outside: &Natively, inside: &Result<Vec<u8>, CompartmentError>) {
    println!("{name}: {outside:?} outside, {inside:?} inside");
    match (outside, inside) {
        (Natively::Said(outside), Ok(inside)) => assert_eq!(outside, inside, "{name}"),
        (Natively::Died(_), Err(_)) => {}
        _ => panic!("{name}: {outside:?} outside, {inside:?} inside"),
    }
}

fn known_crashing_inputs_are_errors_where_they_crash() {
    load();
    let outside: Vec<_> = known()
        .into_iter()
        .map(|(name, input)| (natively(parse_known, &input), name, input))
        .collect();
    enter();
    let mut compartment = Compartment::builder()
        .stack(STACK)
        .time_limit(Duration::from_secs(60))
        .build()
        .unwrap();
    for (outside, name, input) in outside {
        let inside = compartment.run_bytes(parse_known, &input, 2);
        assert_alike(name, &outside, &inside);
        // The next document is none the worse for it.
        assert_eq!(
            compartment.run_bytes(parse_known, b"<a/>", 2).unwrap(),
            [1, 0]
        );
    }
}

fn what_kills_a_process_is_an_error_in_a_compartment() {
    load();
    let documents = [
        &b"<a length='10'/>"[..],
        b"<a length='10485760'/>",
        b"<a length='1099511627776'/>",
    ];
    let outside = documents.map(|document| natively(parse_faulty, document));
    assert!(matches!(outside[0], Natively::Said(_)), "{outside:?}");
    for crash in &outside[1..] {
        assert!(matches!(crash, Natively::Died(libc::SIGSEGV)), "{crash:?}");
    }
    enter();
    let mut compartment = Compartment::builder().memory(1 << 20).build().unwrap();
    for (document, outside) in documents.iter().zip(&outside) {
        let inside = compartment.run_bytes(parse_faulty, document, 12);
        assert_alike(&String::from_utf8_lossy(document), outside, &inside);
    }
}

fn the_library_says_the_same_inside_and_outside() {
    start();
    let mut compartment = Compartment::builder()
        .time_limit(Duration::from_secs(60))
        .build()
        .unwrap();
    for document in documents() {
        let begin = Instant::now();
        let outside = parse(&document);
        let native = begin.elapsed();
        let inside = compartment.run_bytes(parse, &document, 12).unwrap();
        println!("{native:?} outside, {:?} inside", begin.elapsed() - native);
        let shown = String::from_utf8_lossy(&document[..document.len().min(40)]).into_owned();
        assert_eq!(inside, outside, "{shown}");
    }
}

fn a_crash_in_the_library_is_an_error() {
    start();
    let mut compartment = Compartment::builder().memory(1 << 20).build().unwrap();
    let good = compartment.run_bytes(parse_faulty, b"<a length='10'/>", 12);
    assert_eq!(good.unwrap()[..4], [0; 4]);
    for (length, document) in [
        (1_u64 << 20, &b"<a length='1048576'/>"[..]),
        (1 << 40, &b"<a length='1099511627776'/>"[..]),
    ] {
        let result = compartment.run_bytes(parse_faulty, document, 12);
        assert!(
            matches!(result, Err(CompartmentError::OutOfMemory { .. })),
            "{length}: {result:?}"
        );
        // The next document is none the worse for it.
        let next = compartment.run_bytes(parse, b"<a><b/></a>", 12).unwrap();
        assert_eq!(next, [[0_u8, 0, 0, 0], [2, 0, 0, 0], [2, 0, 0, 0]].concat());
    }
    // A null pointer in a callback.
    let result = compartment.run_bytes(
        |input| {
            unsafe extern "C" fn null(_: *mut c_void, _: *const c_char, _: *const *const c_char) {
                // SAFETY: none: the crash is what is tested.
                unsafe { (24 as *mut u64).write_volatile(1) };
            }
            parse_with(input, null);
            Vec::new()
        },
        b"<a/>",
        12,
    );
    assert!(
        matches!(
            result,
            Err(CompartmentError::Fault {
                address: 24,
                access: Access::Write,
                ..
            })
        ),
        "{result:?}"
    );
}

fn what_it_was_not_given_the_library_cannot_have() {
    start();
    // Without a salt it asks for random numbers.
    let result = Compartment::builder().build().unwrap().run_bytes(
        |input| {
            let expat = EXPAT.get().unwrap();
            // SAFETY: as expat.h says.
            unsafe {
                let parser = (expat.create)(core::ptr::null());
                (expat.parse)(parser, input.as_ptr().cast(), input.len() as c_int, 1);
            }
            Vec::new()
        },
        b"<a/>",
        0,
    );
    assert!(
        matches!(result, Err(CompartmentError::Refused { number: 318, .. })),
        "{result:?}"
    );
}

dune_testing::tests! {
    ring0 the_library_says_the_same_inside_and_outside,
    ring0 known_crashing_inputs_are_errors_where_they_crash, timeout 120,
    ring0 what_kills_a_process_is_an_error_in_a_compartment,
    ring0 a_crash_in_the_library_is_an_error,
    ring0 what_it_was_not_given_the_library_cannot_have,
}
