# A new project, built, tested and run by cargo.
export CARGO_HOME=$PWD/cargo-home CARGO_TERM_COLOR=never CARGO_NET_OFFLINE=true USER=user
cargo new -q --vcs none hello 2>&1 || { cargo new --vcs none hello; exit 1; }
cd hello
cat >src/main.rs <<'END'
use std::{collections::BTreeMap, sync::mpsc, thread};
fn main() {
    let (send, receive) = mpsc::channel();
    for n in 0..8_u64 { let send = send.clone(); thread::spawn(move || send.send((n, (1..=n).product::<u64>())).unwrap()); }
    drop(send);
    println!("Hello, world! {:?}", receive.into_iter().collect::<BTreeMap<_, _>>());
}
#[test]
fn it_adds() { assert_eq!(2 + 2, 4); }
#[test]
#[should_panic]
fn it_panics() { panic!("on purpose"); }
END
cargo build >build.log 2>&1 || { cat build.log; exit 1; }
cargo run -q; ./target/debug/hello; cargo test -q 2>/dev/null | grep 'test result' | cut -d';' -f1-2
sed -i 's/2 + 2, 4/2 + 2, 5/' src/main.rs; cargo test -q >test.log 2>&1; echo "failing test $?"
echo 'broken' >>src/main.rs; cargo check >check.log 2>&1; echo "broken $?"; grep -c '^error' check.log
