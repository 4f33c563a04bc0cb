//! Styles: how the finished canvas becomes a sketch, a painting, a woodcut … Every style is a fixed function of it.

use std::f32::consts::PI;

use super::canvas::{Canvas, Spot};
use super::rgb::Rgb;
use super::shapes::{coverage, hill};
use crate::synthetic::people::Style;

/// Pencil on tinted paper: lines where the brightness changes, soft shading, a little colour left.
pub(super) fn draw_as_sketch(canvas: &Canvas, step: usize) -> Vec<Rgb> {
    let (side, colours) = (canvas.side, &canvas.colours);
    let grey: Vec<f32> = colours.iter().map(|colour| colour.luma()).collect();
    let line = |row: usize, column: usize| {
        let here = grey[row * side + column];
        let left = here - grey[row * side + column.saturating_sub(step)];
        let above = here - grey[row.saturating_sub(step) * side + column];
        (2.0 * (left.hypot(above) - 0.04)).clamp(0.0, 0.75)
    };
    let pencil = |index: usize| {
        let (row, column) = (index / side, index % side);
        let paper = Rgb::grey(0.36 + 0.64 * grey[index]).mix(colours[index], 0.30);
        paper * (1.0 - line(row, column))
    };
    (0..colours.len()).map(pencil).collect()
}

/// Oil: soft steps of brightness, strong warm colours, slanted strokes.
pub(super) fn paint_in_oil(canvas: &Canvas) -> Vec<Rgb> {
    let oil = |(at, &colour): (&Spot, &Rgb)| {
        let grey = colour.luma();
        let stroke = (31.0 * (at.x + at.y) + 2.0 * (7.0 * (at.x - at.y)).sin()).sin();
        let step = (2.0 * PI * 4.0 * grey).sin() / (2.0 * PI * 4.0);
        let vivid = Rgb::grey(grey).mix(colour, 1.4).shift(0.022 * stroke - 0.8 * step);
        // A soft shoulder instead of clipping, so that bright colours keep their form.
        vivid.tint(Rgb(1.08, 1.0, 0.78)).map(|value| {
            let value = value.max(0.0);
            1.1 * value / (1.0 + value.powi(4)).sqrt().sqrt()
        })
    };
    canvas.spots.iter().zip(&canvas.colours).map(oil).collect()
}

/// Side of the cells of hatching and dots in frame units: a sixteenth of the frame, 8 of 128 pixels. A pattern that
/// is in step with the patches of the VAE is the same in each of them.
const CELL: f32 = 0.125;

/// The finished canvas in a style other than photo, sketch and painting. `background` is the colour of the scene's,
/// `skin` the person's.
pub(super) fn stylise(canvas: &Canvas, style: Style, background: Rgb, skin: Rgb) -> Vec<Rgb> {
    // Styles of few tones expose dark skin longer, or features drown in black.
    let exposure = (0.62 / (skin.luma() + 0.12)).clamp(1.0, 2.2);
    let side = canvas.side;
    let colours = match style {
        Style::Watercolour => blur(&canvas.colours, side, side / 64),
        Style::Pastel | Style::Stencil | Style::Poster => blur(&canvas.colours, side, side / 128),
        _ => canvas.colours.clone(),
    };
    let outline = outlines(&colours, side);
    let one = |index: usize| {
        let (x, y) = canvas.in_frame(&canvas.spots[index]);
        let (colour, line) = (colours[index], outline[index]);
        let grey = colour.luma();
        let cell = |place: f32| ((place + 1.0) / CELL).fract() - 0.5;
        match style {
            Style::Photo | Style::Sketch | Style::Painting => colour,
            Style::Cartoon => {
                let flat = colour * (steps(grey, 4.0) / grey.max(0.02)).clamp(0.5, 1.8);
                Rgb::grey(flat.luma()).mix(flat, 1.3) * (1.0 - line)
            }
            Style::Watercolour => {
                let wash = 0.05 * (9.0 * x + 3.0 * (5.0 * y).sin()).sin() + 0.04 * (13.0 * y).sin();
                Rgb::WHITE.mix(colour, 0.72 + wash) * (1.0 - 0.35 * line)
            }
            Style::Pastel => Rgb::grey(grey).mix(colour, 0.8).mix(Rgb(1.0, 0.97, 0.94), 0.5),
            Style::Blueprint => {
                let grid = hill(cell(x), 0.08).max(hill(cell(y), 0.08));
                let paper = Rgb(0.07, 0.22, 0.55) * (0.7 + 0.5 * grey);
                paper.mix(Rgb(0.92, 0.96, 1.0), (1.2 * line).min(1.0).max(0.10 * grid))
            }
            Style::Woodcut => {
                // Two lines a cell, thicker where it is darker.
                let wave = 2.0 * ((2.0 * (y + 1.0) / CELL).fract() - 0.5).abs();
                let ink = coverage(wave - 1.2 * (1.0 - exposure * grey) + 0.05, 0.5);
                Rgb(0.95, 0.90, 0.80).mix(Rgb(0.10, 0.08, 0.07), ink.max(line))
            }
            Style::Mosaic => colour,
            Style::Comic => {
                let flat = Rgb::grey(grey).mix(colour, 1.5).map(|value| steps(value, 3.0));
                let dot = coverage(cell(x).hypot(cell(y)) - 0.62 * (0.75 - grey).max(0.0), 0.18);
                flat.mix(Rgb(0.12, 0.10, 0.25), 0.55 * dot) * (1.0 - line)
            }
            Style::Charcoal => {
                let hatch = 0.12 * (2.0 * PI * (cell(x) + cell(y))).sin() * (1.0 - grey);
                let tone = (1.35 * grey - 0.12 + hatch).clamp(0.06, 0.95);
                Rgb(0.97, 0.96, 0.94) * (tone * (1.0 - 0.8 * line))
            }
            Style::Neon => {
                let vivid =
                    Rgb::grey(grey).mix(colour, 2.2).map(|value| (value / (grey + 0.15)).clamp(0.0, 1.6));
                Rgb(0.03, 0.02, 0.08).mix(colour, 0.16).mix(vivid, (1.4 * line).min(1.0))
            }
            Style::Sepia => {
                let edge = 1.0 - 0.35 * (0.5 * (x * x + y * y)).min(1.0);
                Rgb(1.06, 0.86, 0.62) * ((0.12 + 0.85 * grey) * edge)
            }
            Style::Poster => {
                let inks = [
                    Rgb(0.05, 0.16, 0.30),
                    Rgb(0.82, 0.14, 0.14),
                    Rgb(0.45, 0.65, 0.70),
                    Rgb(0.98, 0.90, 0.68),
                ];
                let level = 4.0 * (1.05 * exposure * grey - 0.08).clamp(0.0, 0.999);
                let (low, above) = (level as usize, level.fract());
                inks[low].mix(inks[(low + 1).min(3)], coverage(0.93 - above, 0.14))
            }
            Style::Chalk => {
                let hatch = 0.10 * (2.0 * PI * (cell(x) - cell(y))).sin();
                let chalk = (0.75 * grey - 0.10 + hatch * grey).max(line).clamp(0.0, 0.95);
                Rgb(0.10, 0.22, 0.18).mix(Rgb(0.96, 0.96, 0.92).mix(colour, 0.25), chalk)
            }
            Style::Stencil => {
                let light = Rgb(0.97, 0.95, 0.90).mix(background, 0.35);
                Rgb(0.08, 0.08, 0.09).mix(light, coverage(0.40 - exposure * grey, 0.07))
            }
        }
    };
    match style {
        Style::Mosaic => tiles(&colours, side, (side / 32).max(1)),
        _ => (0..colours.len()).map(one).collect(),
    }
}

/// `value` in `levels` flat steps with soft edges.
fn steps(value: f32, levels: f32) -> f32 {
    let scaled = value.max(0.0) * levels;
    (scaled.floor() + coverage(0.5 - scaled.fract(), 0.25)) / levels
}

/// How much of a line there is at each point: where brightness changes over a 64th of the frame.
fn outlines(colours: &[Rgb], side: usize) -> Vec<f32> {
    let reach = (side / 128).max(1);
    let grey: Vec<f32> = colours.iter().map(|colour| colour.luma()).collect();
    let line = |index: usize| {
        let (row, column) = (index / side, index % side);
        let at = |row: usize, column: usize| grey[row.min(side - 1) * side + column.min(side - 1)];
        let across = at(row, column + reach) - at(row, column.saturating_sub(reach));
        let down = at(row + reach, column) - at(row.saturating_sub(reach), column);
        (3.2 * (across.hypot(down) - 0.09)).clamp(0.0, 1.0)
    };
    (0..grey.len()).map(line).collect()
}

/// Means over squares of 2·`reach` + 1 points.
fn blur(colours: &[Rgb], side: usize, reach: usize) -> Vec<Rgb> {
    // Across and down, one after the other.
    let along = |colours: &[Rgb], step: usize, place: fn(usize, usize) -> usize| -> Vec<Rgb> {
        let mean = |index: usize| {
            let here = place(index, side);
            let (low, high) = (here.saturating_sub(reach), (here + reach).min(side - 1));
            let sum = (low..=high).fold(Rgb::BLACK, |sum, at| sum + colours[index + at * step - here * step]);
            sum * (1.0 / (high - low + 1) as f32)
        };
        (0..colours.len()).map(mean).collect()
    };
    let across = along(colours, 1, |index, side| index % side);
    along(&across, side, |index, side| index / side)
}

/// Flat squares of `cell`² points.
fn tiles(colours: &[Rgb], side: usize, cell: usize) -> Vec<Rgb> {
    let tile = |index: usize| {
        let (top, left) = (index / side / cell * cell, index % side / cell * cell);
        let (rows, columns) = (top..(top + cell).min(side), left..(left + cell).min(side));
        let share = 1.0 / (rows.len() * columns.len()) as f32;
        let sum = rows
            .flat_map(|row| columns.clone().map(move |column| colours[row * side + column]))
            .fold(Rgb::BLACK, |sum, colour| sum + colour);
        sum * share
    };
    (0..colours.len()).map(tile).collect()
}
