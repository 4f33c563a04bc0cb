//! Clothing: shirt, glasses, hats.

use super::canvas::{Area, Canvas, Spot};
use super::head::HeadGeometry;
use super::rgb::Rgb;
use super::shapes::{band, coverage, ellipse, hill};
use crate::synthetic::people::{Clothing, Glasses, Hat};

/// Shoulders in the colour of the shirt, the neck, and the shadow of the chin on it.
pub(super) fn paint_neck_and_shirt(canvas: &mut Canvas, head: &HeadGeometry) {
    let edge = canvas.edge(1.5);
    let neck = 0.52 * head.half_width;
    let rows = Area::rows(0.2, 2.0);
    if head.clothing == Clothing::Hoodie {
        canvas.over(rows, |at| {
            let hood = ellipse(at.x, at.y - 0.68, 0.50, 0.24);
            (head.cloth * (0.66 + 0.15 * at.x * head.light), coverage(hood, edge))
        });
    }
    canvas.over(rows, |at| {
        let shoulders = ellipse(at.x, at.y - 1.22, 0.95, 0.58);
        (head.cloth * (0.90 + 0.25 * at.x * head.light), coverage(shoulders, edge))
    });
    if head.clothing == Clothing::Striped {
        canvas.over(rows, |at| {
            let shoulders = ellipse(at.x, at.y - 1.22, 0.95, 0.58);
            let stripe = (at.y - 0.25 * at.x * at.x - 0.70).rem_euclid(0.13) - 0.065;
            let light =
                Rgb::WHITE.mix(Rgb(0.25, 0.25, 0.28), if head.cloth.luma() > 0.75 { 1.0 } else { 0.0 });
            (light * 0.95, coverage(shoulders.max(stripe.abs() - 0.032), edge))
        });
    }
    canvas.over(rows, |at| {
        let throat = (at.x.abs() - neck).max(at.y - 0.74 + 0.9 * at.x * at.x);
        (head.skin * (0.74 + 0.12 * at.x * head.light), coverage(throat, edge))
    });
    let chin = head.half_height;
    canvas.over(rows, |at| {
        let shadow = hill(at.y - chin, 0.09) * coverage(at.x.abs() - neck, 0.05);
        (Rgb::BLACK, 0.28 * shadow * coverage(at.y - 0.72 + 0.9 * at.x * at.x, 0.1))
    });
    match head.clothing {
        Clothing::Shirt | Clothing::Striped => {}
        Clothing::Suit => {
            // Below the throat, whose end bends upwards to the sides.
            let below = |at: &Spot| 0.72 - 0.9 * at.x * at.x - at.y;
            canvas.over(rows, |at| {
                let front = (at.x.abs() - 0.22 + 0.5 * (at.y - 0.74)).max(below(at));
                (Rgb(0.95, 0.95, 0.95), coverage(front, edge))
            });
            canvas.over(rows, |at| {
                let tie = (at.x.abs() - 0.035 - 0.12 * (at.y - 0.78)).max(below(at));
                let colour =
                    if head.cloth.luma() < 0.3 { Rgb(0.70, 0.12, 0.14) } else { Rgb(0.12, 0.12, 0.18) };
                (colour, coverage(tie, edge))
            });
        }
        Clothing::Hoodie => canvas.over(rows, |at| {
            let cord = (at.x.abs() - 0.13).abs() - 0.016;
            (Rgb(0.95, 0.95, 0.93), coverage(cord.max(0.74 - at.y), edge))
        }),
    }
}

/// Frames with clear or dark lenses, the bridge and the arms.
pub(super) fn paint_glasses(canvas: &mut Canvas, head: &HeadGeometry) {
    let lens_alpha = match head.glasses {
        Glasses::None => return,
        Glasses::Clear => 0.0,
        Glasses::Dark => 0.95,
    };
    let edge = canvas.edge(1.0);
    let frame = Rgb(0.09, 0.09, 0.10);
    let (middle, radius) = (1.05 * head.eye_x, 0.125);
    let area = Area::rows(head.eye_y - 0.2, head.eye_y + 0.25);
    canvas.over(area, |at| {
        let aside = at.u.abs();
        let lens = ellipse(aside - middle, at.v - head.eye_y - 0.01, radius, 0.82 * radius);
        let on_head = coverage(at.head - 0.05, edge);
        let rim = band(lens, 0.011, edge) * on_head;
        let bar = band(at.v - head.eye_y + 0.02, 0.011, edge);
        let bridge = bar * coverage(aside - (middle - radius), edge);
        let arm = bar * coverage(middle + radius - aside, edge) * at.face;
        (frame, (lens_alpha * coverage(lens, edge) * on_head).max(rim).max(bridge * at.face).max(arm))
    });
    if head.glasses == Glasses::Clear {
        canvas.over_face(area, |at| {
            let lens = ellipse(at.u.abs() - middle, at.v - head.eye_y - 0.01, radius, 0.82 * radius);
            (Rgb::WHITE, 0.08 * coverage(lens, edge))
        });
    }
}

/// A cap with its peak, or a knitted beanie with its fold; both fit the head that wears them.
pub(super) fn paint_hat(canvas: &mut Canvas, head: &HeadGeometry) {
    if head.hat == Hat::None {
        return;
    }
    let edge = canvas.edge(1.0);
    let (width, line) = (head.half_width, head.hat_line);
    let lit = |at: &Spot| head.cloth * (0.88 + 0.22 * at.x * head.light - 0.25 * (at.y + 0.5));
    let crown = move |at: &Spot, thick: f32, tall: f32| {
        let up = (line - at.y).max(0.0);
        at.head - thick - tall * (up / 0.12).min(1.0)
    };
    match head.hat {
        Hat::None => {}
        Hat::Cap => {
            canvas.over(Area::rows(-1.0, line + 0.15), |at| {
                let seam = 1.0 - 0.12 * hill(at.u, 0.02);
                (lit(at) * seam, coverage(crown(at, 0.04, 0.03).max(at.y - line - 0.02), edge))
            });
            let peak_x = 1.2 * head.image_x(0.0, 0.0);
            canvas.over(Area::rows(line - 0.2, line + 0.25), |at| {
                let across = (at.x - peak_x) / (0.92 * width);
                let bow = 0.075 * (1.0 - across * across).max(0.0);
                let peak = (at.y - line - bow - 0.02)
                    .max(line - 0.035 + 0.5 * bow - at.y)
                    .max((across.abs() - 1.0) * width);
                (lit(at) * 0.66, coverage(peak, edge))
            });
            canvas.over_face(Area::rows(line, line + 0.3), |at| {
                let across = (at.x - peak_x) / (0.92 * width);
                let bow = 0.075 * (1.0 - across * across).max(0.0);
                (Rgb::BLACK, 0.30 * hill((at.y - line - bow - 0.02).max(0.0), 0.045))
            });
        }
        Hat::Beanie => {
            canvas.over(Area::rows(-1.0, line + 0.15), |at| {
                let rib = 1.0 + 0.10 * (44.0 * at.u.clamp(-width, width)).sin();
                (lit(at) * rib, coverage(crown(at, 0.045, 0.05).max(at.y - line - 0.02), edge))
            });
            canvas.over(Area::rows(line - 0.2, line + 0.15), |at| {
                let fold = (at.head - 0.065).max((at.y - line + 0.045).abs() - 0.065);
                (lit(at) * 0.74, coverage(fold, edge))
            });
        }
    }
}
