//! A library in C that reads hostile input, called in a compartment: Debian's libexpat, loaded
//! as any library is.
#![expect(unsafe_code, reason = "a library in C")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    clippy::missing_transmute_annotations,
    reason = "a parser's life is one block; the types of its functions are in their structure"
)]

use core::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use dune_wedge::{Access, Compartment, CompartmentError};

type Parser = *mut c_void;
type Start = unsafe extern "C" fn(*mut c_void, *const c_char, *const *const c_char);
type End = unsafe extern "C" fn(*mut c_void, *const c_char);

/// The functions of the library that are used.
#[derive(Debug)]
struct Expat {
    create: unsafe extern "C" fn(*const c_char) -> Parser,
    salt: unsafe extern "C" fn(Parser, u64) -> c_int,
    user_data: unsafe extern "C" fn(Parser, *mut c_void),
    elements: unsafe extern "C" fn(Parser, Option<Start>, Option<End>),
    parse: unsafe extern "C" fn(Parser, *const c_char, c_int, c_int) -> c_int,
    error: unsafe extern "C" fn(Parser) -> c_int,
    free: unsafe extern "C" fn(Parser),
}

static EXPAT: OnceLock<Expat> = OnceLock::new();

/// Loads the library before the runtime starts, so that it is in the image; ignores the test
/// where there is none.
fn start() {
    // SAFETY: loading it has no effect but that.
    let library = unsafe { libc::dlopen(c"libexpat.so.1".as_ptr(), libc::RTLD_LAZY) };
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
            parse: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_Parse")),
            error: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_GetErrorCode")),
            free: core::mem::transmute::<*mut c_void, _>(symbol(c"XML_ParserFree")),
        }
    };
    EXPAT.set(expat).unwrap();
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
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
    ring0 a_crash_in_the_library_is_an_error,
    ring0 what_it_was_not_given_the_library_cannot_have,
}
