//! trial
fn main() {
    println!("ring 3 natively: {}", dune::is_inside());
    dune::enter().unwrap();
    println!("in dune: {}", dune::is_inside());
    let v: Vec<u64> = (0..10_000_000).collect();
    println!("{}", v.iter().sum::<u64>());
    dune::leave();
    println!("left: {}", dune::is_inside());
    dune::enter().unwrap();
    println!("in dune: {}", dune::is_inside());
}
