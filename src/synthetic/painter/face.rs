//! The layers of the face: head, ears, freckles, beard, nose, mouth, eyes and brows.

use super::canvas::{Area, Canvas, Spot};
use super::head::HeadGeometry;
use super::rgb::Rgb;
use super::shapes::{band, between, bump, coverage, ellipse, hill};
use crate::synthetic::people::{Beard, Expression};

/// Ears behind the head; the one on the side that the head turns to disappears.
pub(super) fn paint_ears(canvas: &mut Canvas, head: &HeadGeometry) {
    let edge = canvas.edge(1.0);
    for side in [-1.0, 1.0] {
        let hidden = 0.16 * (side * head.yaw).max(0.0);
        let middle = side * (0.98 * head.half_width - hidden);
        let y = 0.5 * (head.eye_y + head.nose_y) - 0.04;
        let area = Area { x: (middle - head.ear, middle + head.ear), y: (y - 0.25, y + 0.25) };
        let lit = 0.86 + 0.10 * side * head.light;
        canvas.over(area, |at| {
            (
                head.skin * lit,
                coverage(ellipse(at.x - middle, at.y - y, 0.75 * head.ear, 1.35 * head.ear), edge),
            )
        });
        canvas.over(area, |at| {
            let hollow = ellipse(at.x - middle, at.y - y, 0.38 * head.ear, 0.8 * head.ear);
            (head.skin * 0.58, 0.6 * coverage(hollow, 0.04))
        });
    }
}

/// The head with its round shading, and the soft forms of the face: sockets, cheeks, forehead.
pub(super) fn paint_head(canvas: &mut Canvas, head: &HeadGeometry) {
    let edge = canvas.edge(1.0);
    let turned = head.image_x(0.0, 0.0);
    canvas.over(Area::ALL, |at| {
        let (across, down) = ((at.x - 0.25 * turned) / head.half_width, at.y / head.half_height);
        let (across, down) = (across.clamp(-1.0, 1.0), down.clamp(-1.0, 1.0));
        let outward = (1.0 - 0.8 * across * across - 0.55 * down * down).max(0.02).sqrt();
        let shade = 0.52 + 0.48 * outward + 0.17 * across * head.light - 0.13 * down;
        (head.skin * shade, coverage(at.head, edge))
    });

    let (eye_y, nose_y, width) = (head.eye_y, head.nose_y, head.half_width);
    let blush = head.skin.tint(Rgb(1.1, 0.6, 0.6));
    canvas.over_face(Area::rows(eye_y - 0.3, nose_y + 0.35), |at| {
        let aside = at.u.abs();
        let socket =
            bump(aside - head.eye_x, 1.6 * head.eye_width, at.v - eye_y + 0.03, 1.2 * head.eye_width);
        (Rgb::BLACK, 0.22 * socket)
    });
    canvas.over_face(Area::rows(nose_y - 0.3, nose_y + 0.3), |at| {
        (blush, 0.16 * bump(at.u.abs() - 0.58 * width, 0.13, at.v - nose_y - 0.01, 0.11))
    });
    canvas.over_face(Area::rows(nose_y - 0.3, nose_y + 0.1), |at| {
        (Rgb::WHITE, 0.10 * bump(at.u.abs() - 0.52 * width, 0.10, at.v - nose_y + 0.08, 0.07))
    });
    canvas.over_face(Area::rows(-0.7, -0.05), |at| (Rgb::WHITE, 0.10 * bump(at.u, 0.22, at.v + 0.36, 0.14)));
}

/// Freckles over nose and cheeks.
pub(super) fn paint_freckles(canvas: &mut Canvas, head: &HeadGeometry) {
    if head.freckles == 0.0 {
        return;
    }
    let brown = head.skin.tint(Rgb(0.62, 0.42, 0.30));
    let middle = head.nose_y - 0.05;
    canvas.over_face(Area::rows(middle - 0.25, middle + 0.25), |at| {
        let (u, v) = (at.u, at.v);
        let pattern = (61.0 * u + 1.3 * (51.0 * v).sin()).sin() * (57.0 * v + 1.7 * (47.0 * u).sin()).sin();
        let spots = (3.0 * (pattern - 0.40)).clamp(0.0, 1.0);
        (brown, 0.80 * head.freckles * spots * bump(u.abs() - 0.17, 0.14, v - middle, 0.10))
    });
}

/// Full beard on cheeks and chin, or goatee on the chin alone.
pub(super) fn paint_beard(canvas: &mut Canvas, head: &HeadGeometry) {
    match head.beard {
        Beard::Full => canvas.over_face(Area::rows(head.nose_y - 0.35, 1.0), |at| {
            let beside = (at.u.abs() / head.half_width - 0.35).max(0.0);
            let below = coverage(head.nose_y + 0.10 - 0.42 * beside - at.v, 0.09);
            let lips = coverage(ellipse(at.u, at.v - head.mouth_y, 1.02 * head.mouth_width, 0.055), 0.04);
            (head.hair * (0.92 * head.strands(at)), 0.92 * below * (1.0 - lips))
        }),
        Beard::Goatee => canvas.over_face(Area::rows(head.mouth_y - 0.05, 1.0), |at| {
            let tuft = ellipse(at.u, at.v - head.mouth_y - 0.14, 0.80 * head.mouth_width, 0.10);
            (head.hair * (0.92 * head.strands(at)), 0.92 * coverage(tuft, 0.05))
        }),
        Beard::None | Beard::Moustache => {}
    }
}

/// Bridge, tip, nostrils and wings; the nose stands out, so a turn moves it further than the face.
pub(super) fn paint_nose(canvas: &mut Canvas, head: &HeadGeometry) {
    let (width, tip) = (head.nose_width, head.nose_y);
    let (bridge, length) = (0.5 * (head.eye_y + tip), tip - head.eye_y);
    let ahead = 0.07 * head.yaw.sin();
    let shadow_side = -head.light.signum();
    let reach = 2.6 * width + ahead.abs();
    let area = head.on_face((-reach, reach), (head.eye_y - 0.2, tip + 0.12));
    canvas.over_face(area, |at| {
        let beside = bump(
            at.u - ahead - 0.75 * shadow_side * width,
            0.55 * width,
            at.v - bridge - 0.02,
            0.45 * length,
        );
        (Rgb::BLACK, (0.20 * head.light.abs() + 0.07) * beside)
    });
    canvas.over_face(area, |at| {
        (Rgb::WHITE, 0.22 * bump(at.u - ahead, 0.38 * width, at.v - bridge, 0.5 * length))
    });
    canvas.over_face(area, |at| {
        (Rgb::WHITE, 0.18 * bump(at.u - ahead, 0.5 * width, at.v - tip + 0.015, 0.035))
    });
    canvas.over_face(area, |at| {
        (Rgb::BLACK, 0.38 * bump(at.u - ahead, 1.25 * width, at.v - tip - 0.035, 0.026))
    });
    canvas.over_face(area, |at| {
        let aside = (at.u - ahead).abs();
        let nostril = coverage(ellipse(aside - 0.52 * width, at.v - tip - 0.018, 0.30 * width, 0.016), 0.024);
        let wing = bump(aside - 1.12 * width, 0.022, at.v - tip + 0.005, 0.035);
        (Rgb::BLACK, 0.62 * nostril + 0.30 * wing)
    });
}

/// Moustache of those who have one, alone or with a beard.
pub(super) fn paint_moustache(canvas: &mut Canvas, head: &HeadGeometry) {
    if head.beard == Beard::None {
        return;
    }
    let width = head.mouth_width;
    let middle = between(head.nose_y, head.mouth_y, 0.52);
    canvas.over_face(Area::rows(middle - 0.1, middle + 0.15), |at| {
        let droop = 0.030 * (at.u / width).powi(2);
        let hairs = ellipse(at.u, at.v - middle - droop, 0.86 * width, 0.036);
        (head.hair * (0.92 * head.strands(at)), 0.95 * coverage(hairs, 0.035))
    });
}

/// Lips, the line between them or the opening, teeth of a smile, shadow below and in the corners.
pub(super) fn paint_mouth(canvas: &mut Canvas, head: &HeadGeometry) {
    let edge = canvas.edge(1.0);
    let (width, lip, open) = (head.mouth_width, head.lip, head.mouth_open);
    let smiling = head.expression == Expression::Smiling;
    // Height above the bent line of the mouth, and how much the lips taper there.
    let bent = move |at: &Spot| {
        let aside = at.u / width;
        (
            at.v - head.mouth_y + head.mouth_curve * (aside * aside - 0.3),
            (1.0 - aside * aside).max(0.0).sqrt(),
        )
    };
    let area = head.on_face((-1.6 * width, 1.6 * width), (head.mouth_y - 0.25, head.mouth_y + 0.3));

    canvas.over_face(area, |at| {
        let (v, taper) = bent(at);
        let lips = (v.abs() - (open + 1.05 * lip) * taper).max(at.u.abs() - width);
        (head.lips * if v < 0.0 { 0.88 } else { 1.0 }, coverage(lips, edge))
    });
    if open > 0.0 {
        canvas.over_face(area, |at| {
            let (v, taper) = bent(at);
            (Rgb(0.22, 0.05, 0.05), coverage((v.abs() - open * taper).max(at.u.abs() - 0.92 * width), edge))
        });
    } else {
        canvas.over_face(area, |at| {
            (Rgb::BLACK, 0.60 * hill(bent(at).0, 0.014) * coverage(at.u.abs() - width, 0.04))
        });
    }
    if smiling {
        canvas.over_face(area, |at| {
            let (v, taper) = bent(at);
            let teeth = (v.abs() - 0.75 * open * taper).max(at.u.abs() - 0.8 * width);
            (Rgb(0.95, 0.94, 0.90), coverage(teeth, edge))
        });
    }
    canvas.over_face(area, |at| {
        let below = 0.20 * bump(at.u, 0.75 * width, at.v - head.mouth_y - lip - 0.055 - open, 0.028);
        let aside = at.u.abs();
        let corner = 0.35 * bump(aside - 1.03 * width, 0.020, bent(at).0, 0.024);
        let fold = bump(aside - 1.28 * width, 0.020, at.v - between(head.nose_y, head.mouth_y, 0.5), 0.075);
        (Rgb::BLACK, below + corner + if smiling { 0.25 * fold } else { 0.0 })
    });
}

/// One eye: white, iris, pupil, glint, lids. `side` is -1 for the left one in the image.
pub(super) fn paint_eye(canvas: &mut Canvas, head: &HeadGeometry, side: f32) {
    let edge = canvas.edge(0.8);
    let (width, open) = (head.eye_width, head.eye_open);
    let iris = 0.92 * open.max(0.42 * width);
    // Place relative to the middle of the eye, slanted; and the height of the lids there.
    let local = move |at: &Spot| {
        let u = at.u - side * head.eye_x;
        let v = at.v - head.eye_y + head.eye_slope * side * u;
        (u, v, open * (1.0 - (u / width).powi(2)).max(0.0).sqrt())
    };
    let inside = move |at: &Spot| {
        let (u, v, lid) = local(at);
        coverage((-v - lid).max(v - 0.85 * lid).max(u.abs() - width), edge)
    };
    let middle = side * head.eye_x;
    let area =
        head.on_face((middle - 1.3 * width, middle + 1.3 * width), (head.eye_y - 0.22, head.eye_y + 0.2));

    canvas.over_face(area, |at| {
        let shade = 0.80 + 0.20 * (local(at).1 / open + 0.5).clamp(0.0, 1.0);
        (Rgb(0.95, 0.94, 0.93) * shade, inside(at))
    });
    canvas.over_face(area, |at| {
        let (u, v, _) = local(at);
        let radius = u.hypot(v);
        let colour = head.iris * (0.65 + 0.55 * (radius / iris).min(1.0));
        let pupil = coverage(radius - 0.45 * iris, edge);
        (colour.mix(Rgb(0.03, 0.03, 0.03), pupil), inside(at) * coverage(radius - iris, edge))
    });
    canvas.over_face(area, |at| {
        let (u, v, _) = local(at);
        (Rgb::WHITE, 0.9 * inside(at) * bump(u + 0.25 * iris, 0.28 * iris, v + 0.35 * iris, 0.28 * iris))
    });
    canvas.over_face(area, |at| {
        let (u, v, lid) = local(at);
        let upper = 0.85 * hill(v + lid, 0.016) * coverage(u.abs() - 1.02 * width, 0.03);
        (Rgb(0.08, 0.08, 0.08), upper)
    });
    canvas.over_face(area, |at| {
        let (u, v, lid) = local(at);
        let lower = 0.30 * hill(v - 0.85 * lid, 0.014) * coverage(u.abs() - 0.9 * width, 0.04);
        let fold = 0.28 * hill(v + lid + 0.034, 0.012) * coverage(u.abs() - 0.95 * width, 0.05);
        (Rgb::BLACK, lower + fold)
    });
}

/// One brow, thick near the nose and thinner outside.
pub(super) fn paint_brow(canvas: &mut Canvas, head: &HeadGeometry, side: f32) {
    let edge = canvas.edge(0.8);
    let half = 1.32 * head.eye_width;
    let middle = side * head.eye_x;
    let colour = (head.hair * 0.66).mix(head.skin, 0.06);
    let area =
        head.on_face((middle - half - 0.05, middle + half + 0.05), (head.brow_y - 0.2, head.brow_y + 0.2));
    canvas.over_face(area, |at| {
        let u = at.u - middle;
        let v = at.v - head.brow_y + head.brow_slope * side * u + 0.9 * u * u;
        let outside = (0.5 * side * u / half + 0.5).clamp(0.0, 1.0);
        let thickness = head.brow_thickness * (1.0 - 0.5 * outside);
        (colour, 0.92 * band(v, thickness, edge) * coverage(u.abs() - half, 0.03))
    });
}
