//! Builds the native code with which the tests attack compartments.

fn main() {
    const SOURCE: &str = "tests/attacks/attacks.c";
    println!("cargo:rerun-if-changed={SOURCE}");
    // For the tests alone: not linked into the library.
    cc::Build::new()
        .file(SOURCE)
        .opt_level(1)
        .flag("-fno-stack-protector")
        .cargo_metadata(false)
        .compile("wedge_attacks");
    let folder = std::env::var("OUT_DIR").unwrap_or_default();
    println!("cargo:rustc-link-arg-tests={folder}/libwedge_attacks.a");
}
