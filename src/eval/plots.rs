//! Plots of reports, as SVG.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// A value with the half width of its interval.
pub type Value = (f64, f64);

const SIZE: (u32, u32) = (720, 300);
const FONT: (&str, u32) = ("sans-serif", 13);
/// Colours that readers with colour blindness tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// Horizontal bars with intervals, one for each name, from top to bottom.
///
/// # Errors
/// What the plotting library says.
pub fn bars(title: &str, values: &[(String, Value)]) -> Result<String> {
    let mut text = String::new();
    {
        let height = 70 + 26 * values.len() as u32;
        let area = SVGBackend::with_string(&mut text, (SIZE.0, height)).into_drawing_area();
        let range = around(values.iter().flat_map(|(_, (value, half))| [value - half, value + half, 0.0]));
        let count = values.len();
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT.0, 15))
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(230)
            .build_cartesian_2d(range, 0.0..count as f64)
            .map_err(failed)?;
        let name = |y: &f64| {
            let at = count as f64 - y - 0.5;
            let whole = (at - at.round()).abs() < 1e-6 && at >= 0.0;
            whole
                .then(|| values.get(at.round() as usize))
                .flatten()
                .map_or(String::new(), |(name, _)| name.clone())
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(2 * count + 1)
            .y_label_formatter(&name)
            .label_style(FONT)
            .draw()
            .map_err(failed)?;
        for (i, (_, (value, half))) in values.iter().enumerate() {
            let y = (count - i) as f64;
            let bar = Rectangle::new([(0.0, y - 0.8), (*value, y - 0.2)], COLOURS[0].mix(0.6).filled());
            let line = PathElement::new([(value - half, y - 0.5), (value + half, y - 0.5)], BLACK);
            chart.draw_series([bar]).map_err(failed)?;
            chart.draw_series([line]).map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(text)
}

/// A series of a line plot.
pub struct Line {
    /// In the legend.
    pub name: String,
    /// Rising x, each with a value.
    pub points: Vec<(f64, Value)>,
}

/// Lines with intervals over a logarithmic x.
///
/// # Errors
/// What the plotting library says.
pub fn lines(title: &str, x: &str, y: &str, lines: &[Line]) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        let points = || lines.iter().flat_map(|line| &line.points);
        let first = points().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
        let last = points().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
        let range = around(points().flat_map(|(_, (value, half))| [value - half, value + half]));
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT.0, 15))
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(60)
            .build_cartesian_2d((first * 0.9..last * 1.1).log_scale(), range)
            .map_err(failed)?;
        chart.configure_mesh().x_desc(x).y_desc(y).label_style(FONT).draw().map_err(failed)?;
        for (i, line) in lines.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            chart
                .draw_series(LineSeries::new(
                    line.points.iter().map(|(x, (y, _))| (*x, *y)),
                    colour.stroke_width(2),
                ))
                .map_err(failed)?
                .label(line.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
            for (x, (y, half)) in &line.points {
                let interval = PathElement::new([(*x, y - half), (*x, y + half)], colour);
                chart.draw_series([interval]).map_err(failed)?;
            }
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font(FONT)
            .draw()
            .map_err(failed)?;
        area.present().map_err(failed)?;
    }
    Ok(text)
}

/// A range that holds all finite values, with some air.
fn around(values: impl Iterator<Item = f64>) -> Range<f64> {
    let finite = values.filter(|value| value.is_finite());
    let (low, high) =
        finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    if low > high {
        return 0.0..1.0;
    }
    let air = 0.05 * (high - low).max(1e-6);
    low - air..high + air
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot plot: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_svg_with_their_names() -> Result<()> {
        let svg = bars("likeness", &[("no LoRA".into(), (0.1, 0.02)), ("own".into(), (0.7, 0.01))])?;
        assert!(svg.starts_with("<svg") && svg.contains("no LoRA") && svg.contains("own"), "{svg}");
        let line = Line { name: "LoRAs".into(), points: vec![(10.0, (30.0, 1.0)), (300.0, (20.0, 0.5))] };
        let svg = lines("PSNR", "compression", "dB", &[line])?;
        assert!(svg.contains("LoRAs") && svg.contains("compression"), "{svg}");
        bars("nothing", &[])?;
        Ok(())
    }
}
