//! What Dune is held against. All bounds but one come from the other contenders' figures of
//! the same run.

use super::Matrix;
use super::contender::{Contender, DUNE_GUEST, DUNE_HOST, NATIVE, PTRACE};
use crate::clock::Unit;
use crate::matrix::{Aim, Row};

/// A forwarded call may take so many instructions: what the core suite allows for one of the
/// process itself, and what the guard may add.
const FORWARDED: f64 = 3_800.0 + 400.0;
/// An answered call is at least so many times cheaper than one that a tracer answers.
const ANSWERED: f64 = 40.0;
/// Start-up is at least so many times faster than gVisor's.
const START: f64 = 10.0;
/// Servers answer at least so many times as many requests as gVisor's.
const SERVED: f64 = 3.0;
/// CPU-bound work takes at most so much more than natively.
const CPU_BOUND: f64 = 1.01;

pub(super) fn set(matrix: &mut Matrix) {
    let counted = matrix.unit() == Unit::Instructions;
    let able = matrix.able();
    let is_able = |id: &str| able.iter().any(|contender| contender.id == id);
    let dunes: Vec<&'static str> = [DUNE_GUEST, DUNE_HOST]
        .into_iter()
        .filter(|id| is_able(id))
        .collect();
    // Where it is the fast one, a placement is held against everybody.
    let natural: Vec<_> = dunes.first().copied().into_iter().collect();
    for row in matrix.rows_mut() {
        row.clear_aims();
        let aims = match row.id.as_str() {
            "null-call" if is_able(DUNE_GUEST) => answered(row),
            "getppid" if counted && is_able(DUNE_GUEST) => vec![Aim {
                contender: DUNE_GUEST,
                at_most: FORWARDED,
                because: "the core suite's bound of a forwarded call, and 400".to_owned(),
            }],
            "cpu-bound" => cpu_bound(row, &dunes),
            "start-true" | "start-python" => beside_runsc(row, START, &natural, &able),
            "redis-set" | "redis-get" | "nginx-request" => {
                beside_runsc(row, SERVED, &natural, &able)
            }
            _ => Vec::new(),
        };
        for aim in aims {
            row.add_aim(aim);
        }
        if !is_able(DUNE_GUEST) && is_able(DUNE_HOST) && row.is_time() {
            let peer = least(row, able.iter().filter(|one| one.by_ptrace));
            if let Some((peer, figure)) = peer {
                row.add_aim(Aim {
                    contender: DUNE_HOST,
                    at_most: figure,
                    because: format!("the best ptrace-based peer, {peer}"),
                });
            }
        }
    }
}

fn answered(row: &Row) -> Vec<Aim> {
    let bound = row.median(PTRACE).map(|ptrace| Aim {
        contender: DUNE_GUEST,
        at_most: (ptrace / ANSWERED).round(),
        because: format!("a {ANSWERED}th of what ptrace takes"),
    });
    bound.into_iter().collect()
}

fn cpu_bound(row: &Row, dunes: &[&'static str]) -> Vec<Aim> {
    let Some(native) = row.median(NATIVE) else {
        return Vec::new();
    };
    let aim = |contender: &&'static str| Aim {
        contender,
        at_most: (native * CPU_BOUND).round(),
        because: "native and 1%".to_owned(),
    };
    dunes.iter().map(aim).collect()
}

/// So many times less than gVisor's best.
fn beside_runsc(row: &Row, times: f64, dunes: &[&'static str], able: &[Contender]) -> Vec<Aim> {
    let Some((peer, figure)) = least(row, able.iter().filter(|one| one.is_runsc())) else {
        return Vec::new();
    };
    let aim = |contender: &&'static str| Aim {
        contender,
        at_most: (figure / times).round(),
        because: format!("what {peer} takes, divided by {times}"),
    };
    dunes.iter().map(aim).collect()
}

/// The best of some contenders.
fn least<'a>(
    row: &Row,
    contenders: impl Iterator<Item = &'a Contender>,
) -> Option<(&'static str, f64)> {
    contenders
        .filter_map(|contender| Some((contender.id, row.median(contender.id)?)))
        .min_by(|one, other| one.1.total_cmp(&other.1))
}
