//! Builds the agent: a static program, compiled from `src/agent` with `std`
//! alone, that the library carries inside and puts into the guest's initial
//! RAM file system.
//!
//! It is linked against the C library's static archive, so that it needs no
//! further target of the toolchain to be installed.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src/agent");
    println!("cargo::rerun-if-changed=src/wire.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let target = env::var("TARGET").expect("cargo sets TARGET");
    let agent = out.join("dune-lab-agent");
    let status = Command::new(rustc)
        .args([
            "--edition=2024",
            "--crate-name=dune_lab_agent",
            "--crate-type=bin",
        ])
        .args(["--target", &target, "--cap-lints=allow"])
        .args(["-Ctarget-feature=+crt-static", "-Crelocation-model=static"])
        .args([
            "-Copt-level=s",
            "-Cpanic=abort",
            "-Cstrip=symbols",
            "-Clto=thin",
        ])
        // The same bytes wherever the checkout lies: saved states are keyed by them.
        .arg(format!(
            "--remap-path-prefix={}=.",
            env::var("CARGO_MANIFEST_DIR").unwrap_or_default()
        ))
        .arg("-o")
        .arg(&agent)
        .arg("src/agent/main.rs")
        .status()
        .expect("rustc runs");
    assert!(
        status.success(),
        "the lab's agent could not be linked statically; install the C library's static archive \
         (Debian: libc6-dev, Fedora: glibc-static)"
    );
    println!("cargo::rustc-env=DUNE_LAB_AGENT={}", agent.display());
}
