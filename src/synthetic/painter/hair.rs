//! The layers of the hair, behind the neck and in front of the head.

use super::canvas::{Area, Canvas};
use super::head::HeadGeometry;
use super::shapes::{coverage, ellipse};
use crate::synthetic::people::HairStyle;

/// The hair that falls behind the neck: long and curly.
pub(super) fn paint_hair_behind(canvas: &mut Canvas, head: &HeadGeometry) {
    let (width, volume) = (head.half_width, head.hair_volume);
    match head.hair_style {
        HairStyle::Long => {
            let edge = canvas.edge(1.5);
            canvas.over(Area::ALL, |at| {
                let falling = width + volume + 0.03 - 0.06 * (at.y - 0.3).max(0.0) - head.drawn_in(at.y);
                let curtain = (at.x.abs() - falling).max(at.y - 0.84).max(-at.y - 0.2);
                let crown = ellipse(at.x, at.y + 0.1, width + volume + 0.02, head.half_height + volume);
                let alpha = coverage(curtain.min(crown), edge) * head.below_hat(at.y);
                (head.hair * (0.82 * head.strands(at)), alpha)
            });
        }
        HairStyle::Curly => {
            let edge = canvas.edge(1.5);
            let phase = 60.0 * volume;
            canvas.over(Area::rows(-1.0, 0.35), |at| {
                let (x, y) = (at.x, at.y + 0.18);
                let (angle, radius) = (y.atan2(x), x.hypot(y));
                let rim = radius
                    - (width + 0.11 + volume - head.drawn_in(at.y))
                    - 0.028 * (11.0 * angle + phase).sin();
                let alpha = coverage(rim.max(at.y - 0.27), edge) * head.below_hat(at.y);
                let curl = 0.13 * (22.0 * angle + 14.0 * radius).sin();
                (head.hair * (head.strands(at) + curl), alpha)
            });
        }
        HairStyle::Bald | HairStyle::Short | HairStyle::Side | HairStyle::Fringe => {}
    }
}

/// The hair on the skull down to the hairline, and the rim that frames a face with long hair.
pub(super) fn paint_hair_in_front(canvas: &mut Canvas, head: &HeadGeometry) {
    if head.hair_style == HairStyle::Bald {
        return;
    }
    let edge = canvas.edge(1.5);
    let (width, volume) = (head.half_width, head.hair_volume);
    canvas.over(Area::rows(-1.0, 0.3), |at| {
        let across = at.u.clamp(-width, width) / width;
        let line = match head.hair_style {
            HairStyle::Side => head.hairline + 0.02 + 0.16 * across,
            HairStyle::Fringe => head.hairline + 0.16 + 0.02 * (38.0 * at.u).sin(),
            _ => head.hairline + 0.11 * across * across,
        };
        // Beside the face the hair gets thinner downwards and ends as sideburns.
        let thinner = ((0.10 - at.y) / 0.35).clamp(0.0, 1.0);
        let above = (at.y - line).min((-at.head - 0.045 * thinner).max(at.y - 0.04));
        let hair = (at.head - (0.55 * volume + 0.015) * thinner).max(above);
        (head.hair * head.strands(at), coverage(hair, edge) * head.below_hat(at.y))
    });
    if head.hair_style == HairStyle::Long {
        canvas.over(Area::rows(-0.5, 0.85), |at| {
            let rim = (-at.head - 0.06)
                .max(at.head - volume - 0.03)
                .max(at.y - 0.80)
                .max(0.80 * width - at.x.abs());
            (head.hair * (0.95 * head.strands(at)), 0.95 * coverage(rim, edge) * head.below_hat(at.y))
        });
    }
}
