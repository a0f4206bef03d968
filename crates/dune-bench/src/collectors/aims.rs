//! What dune-gc with Dune's dirty bits is held against; all bounds come from other contenders'
//! figures of the same run.

use super::contender::{DUNE, LIBGC, MPROTECT, NONE};
use super::program::{GCBENCH, HASHMAP, PROGRAMS};
use super::{Matrix, PAUSE, TOTAL, id};
use crate::matrix::{Aim, Row, RowUnit};
use crate::meter::Figure;

/// Programs that mutate old objects take at most so much of what they take with page
/// protection.
const OF_MPROTECT: f64 = 0.75;
/// The longest pause is at most so much of that of a collector that stops the world.
const OF_STOPPED_WORLD: f64 = 0.1;
/// At most so much of what libgc takes in the mode that suits the program best.
const OF_LIBGC: f64 = 1.1;
/// It is to be faster than libgc on so many programs.
const FASTER_ON: usize = 2;

pub(crate) fn set(matrix: &mut Matrix) {
    let mut compared = 0;
    let mut slower = 0;
    for row in matrix.rows_mut() {
        let program = |measure| PROGRAMS.iter().find(|one| id(one, measure) == row.id);
        let aims = if let Some(program) = program(TOTAL) {
            if let (Some((_, best)), Some(dune)) = (best_libgc(row), row.median(DUNE)) {
                compared += 1;
                slower += usize::from(dune >= best);
            }
            let mutates = [GCBENCH, HASHMAP].contains(&program.name);
            let mprotect = row.median(MPROTECT).filter(|_| mutates);
            vec![
                best_libgc(row).map(|(id, best)| {
                    bound(
                        best * OF_LIBGC,
                        format!("10% more than libgc at its best, {id}"),
                    )
                }),
                mprotect.map(|figure| {
                    bound(
                        figure * OF_MPROTECT,
                        "25% less than page protection".to_owned(),
                    )
                }),
            ]
        } else if program(PAUSE).is_some() {
            let stopped = row.median(NONE);
            vec![stopped.map(|figure| {
                let because = "a tenth of a stop of the world for all of the heap".to_owned();
                bound(figure * OF_STOPPED_WORLD, because)
            })]
        } else {
            Vec::new()
        };
        for aim in aims.into_iter().flatten() {
            row.add_aim(aim);
        }
    }
    if compared > 0 {
        summary(matrix, compared, slower);
    }
}

fn bound(at_most: f64, because: String) -> Aim {
    Aim {
        contender: DUNE,
        at_most: at_most.round(),
        because,
    }
}

fn summary(matrix: &mut Matrix, compared: usize, slower: usize) {
    let id = "gc-not-faster-than-libgc";
    let label = format!("programs, of {compared}, that libgc at its best runs at least as fast");
    matrix.add_row(id, &label, RowUnit::Count);
    matrix.put(id, DUNE, Ok(Figure::of(vec![slower as f64])));
    if let Some(row) = matrix.rows_mut().iter_mut().find(|row| row.id == id) {
        let at_most = compared.saturating_sub(FASTER_ON) as f64;
        row.add_aim(bound(at_most, format!("faster on {FASTER_ON} or more")));
    }
}

/// The mode in which libgc is fastest.
fn best_libgc(row: &Row) -> Option<(&'static str, f64)> {
    LIBGC
        .into_iter()
        .filter_map(|id| Some((id, row.median(id)?)))
        .min_by(|one, other| one.1.total_cmp(&other.1))
}
