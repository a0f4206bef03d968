//! Samples as a figure: the kinds of memory, one on top of the other, over time.

use std::fs::File;
use std::io::Write;

use anyhow::{Context, Result, anyhow};
use dune_sandbox::working_set::{Bytes, Sample};
use plotters::prelude::*;

const SIZE: (u32, u32) = (960, 480);

type Kind = (&'static str, RGBColor, fn(&Bytes) -> u64);

/// From the bottom up.
const KINDS: [Kind; 6] = [
    ("code", RGBColor(94, 129, 172), |used| used.code),
    ("file", RGBColor(136, 192, 208), |used| used.file),
    ("heap", RGBColor(196, 106, 26), |used| used.heap),
    ("stack", RGBColor(163, 190, 140), |used| used.stack),
    ("other", RGBColor(235, 180, 90), |used| used.anonymous),
    ("shared", RGBColor(150, 150, 150), |used| used.shared),
];

/// Draws the samples.
///
/// # Errors
///
/// If the file cannot be written.
pub(super) fn draw(samples: &[Sample], mut file: File) -> Result<()> {
    let mut text = String::new();
    paint(samples, &mut text).map_err(|error| anyhow!("cannot draw the figure: {error}"))?;
    file.write_all(text.as_bytes())
        .context("cannot write the figure")
}

fn paint(samples: &[Sample], text: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    const MIB: f64 = 1048576.0;
    let end = samples.last().map_or(1.0, |last| last.at.as_secs_f64());
    let most = samples.iter().map(|sample| sample.used.total()).max();
    let most = most.unwrap_or(0).max(1) as f64 / MIB;
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .x_desc("seconds")
        .y_desc("MiB used in an interval")
        .draw()?;
    // Each kind with all below it, the highest first, so that the others cover it.
    for (index, (name, colour, _)) in KINDS.iter().enumerate().rev() {
        let below = |used: &Bytes| -> u64 { KINDS[..=index].iter().map(|kind| kind.2(used)).sum() };
        // An interval is a step: what was used in it, from its beginning to its end.
        let mut began = 0.0;
        let mut points = Vec::with_capacity(2 * samples.len());
        for sample in samples {
            let height = below(&sample.used) as f64 / MIB;
            let ended = sample.at.as_secs_f64();
            points.extend([(began, height), (ended, height)]);
            began = ended;
        }
        chart
            .draw_series(AreaSeries::new(points, 0.0, colour.filled()))?
            .label(*name)
            .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled()));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    drop(chart);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_kind_is_in_the_figure() {
        let sample = |at| Sample {
            at: Duration::from_millis(at),
            used: Bytes {
                code: 1 << 20,
                heap: 3 << 20,
                ..Bytes::default()
            },
            first_used: 0,
            ever_used: 4 << 20,
            mapped: 8 << 20,
        };
        for samples in [vec![], vec![sample(100), sample(200)]] {
            let mut text = String::new();
            paint(&samples, &mut text).unwrap();
            assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
            for (name, ..) in KINDS {
                assert!(text.contains(name), "{name}");
            }
        }
    }
}
