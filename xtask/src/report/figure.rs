//! A row as a figure: a bar for each contender, on a logarithmic scale.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Row, number};

const WIDTH: u32 = 640;
const BAR: u32 = 18;
const MARGIN: u32 = 8;
/// Left of the bars: the contenders' names.
const NAMES: i32 = 120;
/// Right of the longest bar: its figure.
const FIGURES: i32 = 110;
const INK: RGBColor = RGBColor(40, 40, 40);
const BASE: RGBColor = RGBColor(150, 150, 150);
const DUNE: RGBColor = RGBColor(196, 106, 26);
const PEER: RGBColor = RGBColor(94, 129, 172);

/// The row's figure as SVG; none where there is nothing to draw.
pub(super) fn bars(row: &Row, columns: &[&str]) -> Result<Option<String>> {
    let values: Vec<(&str, f64)> = columns
        .iter()
        .filter_map(|column| Some((*column, *row.values.get(*column)?)))
        .filter(|(_, value)| *value > 0.0)
        .collect();
    if values.len() < 2 {
        return Ok(None);
    }
    let least = values
        .iter()
        .map(|(_, value)| *value)
        .fold(f64::MAX, f64::min);
    let most = values.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    let height = 2 * MARGIN + BAR * values.len() as u32;
    let mut text = String::new();
    let failed = |error: &dyn std::fmt::Display| anyhow!("draw {}: {error}", row.id);
    {
        let area = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
        for (index, (contender, value)) in values.iter().enumerate() {
            let top = (MARGIN + BAR * index as u32) as i32;
            let middle = top + BAR as i32 / 2;
            let end = NAMES + length(*value, least, most);
            let bar = Rectangle::new(
                [(NAMES, top + 2), (end, top + BAR as i32 - 2)],
                colour(contender).filled(),
            );
            area.draw(&bar).map_err(|error| failed(&error))?;
            let style = |horizontal| {
                ("sans-serif", 12)
                    .into_font()
                    .color(&INK)
                    .pos(Pos::new(horizontal, VPos::Center))
            };
            let name = Text::new(
                (*contender).to_owned(),
                (NAMES - 6, middle),
                style(HPos::Right),
            );
            area.draw(&name).map_err(|error| failed(&error))?;
            let figure = Text::new(number(*value), (end + 6, middle), style(HPos::Left));
            area.draw(&figure).map_err(|error| failed(&error))?;
        }
        area.present().map_err(|error| failed(&error))?;
    }
    Ok(Some(text))
}

/// A bar's length in pixels: the least of a row has a tenth of what there is.
fn length(value: f64, least: f64, most: f64) -> i32 {
    let whole = WIDTH as i32 - NAMES - FIGURES;
    let tenth = whole / 10;
    if most <= least {
        return whole;
    }
    let part = (value / least).ln() / (most / least).ln();
    tenth + (f64::from(whole - tenth) * part) as i32
}

fn colour(contender: &str) -> RGBColor {
    match contender {
        "native" | "linux" => BASE,
        name if name.starts_with("dune") => DUNE,
        _ => PEER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_grow_with_their_figures() {
        let lengths = [1.0, 10.0, 100.0].map(|value| length(value, 1.0, 100.0));
        assert!(lengths[0] > 0 && lengths[0] < lengths[1] && lengths[1] < lengths[2]);
        assert_eq!(lengths[2], WIDTH as i32 - NAMES - FIGURES);
    }
}
