//! The painter: portraits as layers of soft shapes, evaluated at every pixel.
//!
//! A shape is a signed distance `d`, negative inside; its coverage is `½ − d / edge`, clamped to
//! [0, 1]. Layers go over one another from back to front, `colour ← (1 − α)·colour + α·ink`. Heads are
//! superellipses; the face is printed on a vertical cylinder, which a turn of the head rotates:
//! `u = W·sin(asin(x / W) − yaw)`, where `W` is half the head's width.
//!
//! Coordinates: `x` right, `y` down, origin in the middle of the head, about 0.5 is half a head wide.
//! `u`, `v` are the same on the unrolled face. Sizes below are in this unit.

use std::f32::consts::PI;

use rand::RngCore;

use crate::synthetic::people::{
    Beard, Colour, Expression, EyeColour, Glasses, HairColour, HairStyle, Hat, Person, Scene, Style, stream,
};

/// Paints `person` in `scene`: RGB bytes, `size`×`size`×3, rows from the top.
///
/// Every pixel is the mean of `supersample`² points: 1 for training data, 2 for images to look at.
/// A `size` or `supersample` of 0 gives an empty image.
pub fn paint(person: &Person, scene: &Scene, size: usize, supersample: usize) -> Vec<u8> {
    let sitter = Sitter::new(person, scene);
    let mut canvas = Canvas::new(&sitter, scene, size * supersample);

    paint_background(&mut canvas, scene);
    paint_hair_behind(&mut canvas, &sitter);
    paint_neck_and_shirt(&mut canvas, &sitter);
    paint_ears(&mut canvas, &sitter);
    paint_head(&mut canvas, &sitter);
    paint_freckles(&mut canvas, &sitter);
    paint_beard(&mut canvas, &sitter);
    paint_nose(&mut canvas, &sitter);
    paint_moustache(&mut canvas, &sitter);
    paint_mouth(&mut canvas, &sitter);
    for side in [-1.0, 1.0] {
        paint_eye(&mut canvas, &sitter, side);
        paint_brow(&mut canvas, &sitter, side);
    }
    paint_hair_in_front(&mut canvas, &sitter);
    paint_glasses(&mut canvas, &sitter);
    paint_hat(&mut canvas, &sitter);

    let colours = match scene.style {
        Style::Photo => canvas.colours,
        Style::Sketch => draw_as_sketch(&canvas, supersample),
        Style::Painting => paint_in_oil(&canvas),
    };
    develop(&average(&colours, size, supersample), scene)
}

/// Size of the head unit in half frames: larger faces tell more about a person.
const ZOOM: f32 = 1.24;
/// How far the head sits below the middle of the frame, in head units; hats need the room above.
const LOWERED: f32 = 0.045;

/// The person of one image, measured: lengths in head units, colours as they are painted.
struct Sitter {
    half_width: f32,
    half_height: f32,
    /// Exponent of the superellipse below the eyes: 2 is an ellipse, more is squarer.
    corner: f32,
    /// Share of the width that is lost at the chin.
    narrowing: f32,
    yaw: f32,
    light: f32,

    eye_x: f32,
    eye_y: f32,
    eye_width: f32,
    eye_open: f32,
    eye_slope: f32,
    brow_y: f32,
    brow_thickness: f32,
    brow_slope: f32,
    nose_y: f32,
    nose_width: f32,
    mouth_y: f32,
    mouth_width: f32,
    mouth_curve: f32,
    mouth_open: f32,
    lip: f32,
    ear: f32,
    hairline: f32,
    hair_volume: f32,
    /// Below this height the hair is free; a hat presses it down above.
    hat_line: f32,
    freckles: f32,

    hair_style: HairStyle,
    beard: Beard,
    expression: Expression,
    glasses: Glasses,
    hat: Hat,

    skin: Rgb,
    hair: Rgb,
    iris: Rgb,
    lips: Rgb,
    cloth: Rgb,
}

impl Sitter {
    fn new(person: &Person, scene: &Scene) -> Self {
        let who = &person.identity;
        let (smile, surprise, sadness) = match scene.expression {
            Expression::Neutral => (0.0, 0.0, 0.0),
            Expression::Smiling => (1.0, 0.0, 0.0),
            Expression::Surprised => (0.0, 1.0, 0.0),
            Expression::Sad => (0.0, 0.0, 1.0),
        };
        let half_height = between(0.56, 0.69, who.face_height);
        let eye_y = between(-0.13, 0.03, who.eye_height);
        let eye_width = between(0.070, 0.112, who.eye_size);
        let eye_open =
            eye_width * between(0.40, 0.68, who.eye_opening) * (1.0 + 0.30 * surprise - 0.12 * smile);
        let brow_y = eye_y - eye_open - between(0.055, 0.120, who.brow_height) - 0.04 * surprise;
        let nose_y = eye_y + between(0.21, 0.36, who.nose_length);
        let skin = skin_colour(who.skin, who.skin_hue);
        let hairline = between(-0.50, -0.33, who.hairline) * half_height / 0.62;
        Self {
            half_width: between(0.39, 0.54, who.face_width),
            half_height,
            corner: between(1.85, 3.2, who.jaw),
            narrowing: between(0.03, 0.38, who.chin),
            yaw: scene.yaw,
            light: scene.light,
            eye_x: between(0.150, 0.230, who.eye_spacing),
            eye_y,
            eye_width,
            eye_open,
            eye_slope: 0.55 * (who.eye_tilt - 0.5),
            brow_y,
            brow_thickness: between(0.012, 0.038, who.brow_thickness),
            brow_slope: 0.55 * (who.brow_angle - 0.5) - 0.28 * sadness,
            nose_y,
            nose_width: between(0.050, 0.130, who.nose_width),
            mouth_y: nose_y + between(0.125, 0.205, who.mouth_height),
            mouth_width: between(0.115, 0.225, who.mouth_width)
                * (1.0 + 0.20 * smile - 0.20 * surprise - 0.06 * sadness),
            mouth_curve: 0.050 * smile - 0.036 * sadness,
            mouth_open: 0.075 * surprise + 0.022 * smile,
            lip: between(0.020, 0.054, who.lip_thickness),
            ear: between(0.070, 0.125, who.ear_size),
            hairline,
            hair_volume: between(0.03, 0.13, who.hair_volume),
            hat_line: (hairline + 0.06).min(brow_y - 0.055),
            freckles: (4.0 * (who.freckles - 0.75)).clamp(0.0, 1.0),
            hair_style: who.hair_style_kind(),
            beard: who.beard_kind(),
            expression: scene.expression,
            glasses: scene.glasses,
            hat: scene.hat,
            skin,
            hair: hair_colour(who.hair_colour_kind(), who.hair_shade()),
            iris: iris_colour(who.eye_colour_kind()),
            lips: skin.tint(Rgb(0.92, 0.62, 0.60).mix(Rgb(0.98, 0.40, 0.44), who.lip_colour)),
            cloth: dye(scene.cloth),
        }
    }

    /// Half the width of the head at the height `y`, before its outline rounds off.
    fn width_at(&self, y: f32) -> f32 {
        let down = (y / self.half_height).clamp(0.0, 1.0);
        self.half_width * (1.0 - self.narrowing * down * down.sqrt())
    }

    /// Distance to the outline of the head.
    fn head_distance(&self, x: f32, y: f32) -> f32 {
        let corner = if y > 0.0 { self.corner } else { 2.15 };
        let power = (x.abs() / self.width_at(y)).powf(corner) + (y.abs() / self.half_height).powf(corner);
        (power.powf(1.0 / corner) - 1.0) * self.half_width
    }

    /// Radius of the cylinder that the face is printed on.
    fn radius(&self, y: f32) -> f32 {
        1.02 * self.width_at(y)
    }

    /// Where a point of the image lies on the unrolled face; far outside when it is beside the head.
    fn face_u(&self, x: f32, y: f32) -> f32 {
        let sine = x / self.radius(y);
        if sine.abs() < 1.0 { self.radius(y) * (sine.asin() - self.yaw).sin() } else { 3.0 * x }
    }

    /// Where a point of the unrolled face lies in the image.
    fn image_x(&self, u: f32, v: f32) -> f32 {
        let angle = (u / self.radius(v)).clamp(-1.0, 1.0).asin() + self.yaw;
        self.radius(v) * angle.clamp(-0.5 * PI, 0.5 * PI).sin()
    }

    /// The part of the image that holds this part of the face.
    fn on_face(&self, u: (f32, f32), v: (f32, f32)) -> Area {
        let left = self.image_x(u.0, v.0).min(self.image_x(u.0, v.1));
        let right = self.image_x(u.1, v.0).max(self.image_x(u.1, v.1));
        Area { x: (left, right), y: v }
    }

    /// Brightness of hair: strands, lit from above and from the side.
    fn strands(&self, at: &Spot) -> f32 {
        let strand = 0.10 * (46.0 * at.x + 6.0 * (5.0 * at.y + 70.0 * self.hair_volume).sin()).sin()
            + 0.05 * (71.0 * at.x + 13.0 * at.y).sin();
        1.0 + strand - 0.25 * (at.y + 0.3) + 0.18 * at.x * self.light
    }

    /// How far a hat draws the loose hair in at the height `y`.
    fn drawn_in(&self, y: f32) -> f32 {
        match self.hat {
            Hat::None => 0.0,
            Hat::Cap | Hat::Beanie => 0.08 * (1.0 - (y - self.hat_line) / 0.3).clamp(0.0, 1.0),
        }
    }

    /// How much of the hair a hat leaves free at the height `y`.
    fn below_hat(&self, y: f32) -> f32 {
        match self.hat {
            Hat::None => 1.0,
            Hat::Cap | Hat::Beanie => coverage(self.hat_line - y, 0.04),
        }
    }
}

/// Background with a little light from above.
fn paint_background(canvas: &mut Canvas, scene: &Scene) {
    let colour = dye(scene.background);
    let middle = LOWERED;
    canvas.over(Area::ALL, |at| (colour * (1.0 - 0.10 * (1.0 + at.y + middle)), 1.0));
}

/// The hair that falls behind the neck: long and curly.
fn paint_hair_behind(canvas: &mut Canvas, sitter: &Sitter) {
    let (width, volume) = (sitter.half_width, sitter.hair_volume);
    match sitter.hair_style {
        HairStyle::Long => {
            let edge = canvas.edge(1.5);
            canvas.over(Area::ALL, |at| {
                let falling = width + volume + 0.03 - 0.06 * (at.y - 0.3).max(0.0) - sitter.drawn_in(at.y);
                let curtain = (at.x.abs() - falling).max(at.y - 0.84).max(-at.y - 0.2);
                let crown = ellipse(at.x, at.y + 0.1, width + volume + 0.02, sitter.half_height + volume);
                let alpha = coverage(curtain.min(crown), edge) * sitter.below_hat(at.y);
                (sitter.hair * (0.82 * sitter.strands(at)), alpha)
            });
        }
        HairStyle::Curly => {
            let edge = canvas.edge(1.5);
            let phase = 60.0 * volume;
            canvas.over(Area::rows(-1.0, 0.35), |at| {
                let (x, y) = (at.x, at.y + 0.18);
                let (angle, radius) = (y.atan2(x), x.hypot(y));
                let rim = radius
                    - (width + 0.11 + volume - sitter.drawn_in(at.y))
                    - 0.028 * (11.0 * angle + phase).sin();
                let alpha = coverage(rim.max(at.y - 0.27), edge) * sitter.below_hat(at.y);
                let curl = 0.13 * (22.0 * angle + 14.0 * radius).sin();
                (sitter.hair * (sitter.strands(at) + curl), alpha)
            });
        }
        HairStyle::Bald | HairStyle::Short | HairStyle::Side | HairStyle::Fringe => {}
    }
}

/// Shoulders in the colour of the shirt, the neck, and the shadow of the chin on it.
fn paint_neck_and_shirt(canvas: &mut Canvas, sitter: &Sitter) {
    let edge = canvas.edge(1.5);
    let neck = 0.52 * sitter.half_width;
    let rows = Area::rows(0.2, 2.0);
    canvas.over(rows, |at| {
        let shoulders = ellipse(at.x, at.y - 1.22, 0.95, 0.58);
        (sitter.cloth * (0.90 + 0.25 * at.x * sitter.light), coverage(shoulders, edge))
    });
    canvas.over(rows, |at| {
        let throat = (at.x.abs() - neck).max(at.y - 0.74 + 0.9 * at.x * at.x);
        (sitter.skin * (0.74 + 0.12 * at.x * sitter.light), coverage(throat, edge))
    });
    let chin = sitter.half_height;
    canvas.over(rows, |at| {
        let shadow = hill(at.y - chin, 0.09) * coverage(at.x.abs() - neck, 0.05);
        (Rgb::BLACK, 0.28 * shadow * coverage(at.y - 0.72 + 0.9 * at.x * at.x, 0.1))
    });
}

/// Ears behind the head; the one on the side that the head turns to disappears.
fn paint_ears(canvas: &mut Canvas, sitter: &Sitter) {
    let edge = canvas.edge(1.0);
    for side in [-1.0, 1.0] {
        let hidden = 0.16 * (side * sitter.yaw).max(0.0);
        let middle = side * (0.98 * sitter.half_width - hidden);
        let y = 0.5 * (sitter.eye_y + sitter.nose_y) - 0.04;
        let area = Area { x: (middle - sitter.ear, middle + sitter.ear), y: (y - 0.25, y + 0.25) };
        let lit = 0.86 + 0.10 * side * sitter.light;
        canvas.over(area, |at| {
            (
                sitter.skin * lit,
                coverage(ellipse(at.x - middle, at.y - y, 0.75 * sitter.ear, 1.35 * sitter.ear), edge),
            )
        });
        canvas.over(area, |at| {
            let hollow = ellipse(at.x - middle, at.y - y, 0.38 * sitter.ear, 0.8 * sitter.ear);
            (sitter.skin * 0.58, 0.6 * coverage(hollow, 0.04))
        });
    }
}

/// The head with its round shading, and the soft forms of the face: sockets, cheeks, forehead.
fn paint_head(canvas: &mut Canvas, sitter: &Sitter) {
    let edge = canvas.edge(1.0);
    let turned = sitter.image_x(0.0, 0.0);
    canvas.over(Area::ALL, |at| {
        let (across, down) = ((at.x - 0.25 * turned) / sitter.half_width, at.y / sitter.half_height);
        let (across, down) = (across.clamp(-1.0, 1.0), down.clamp(-1.0, 1.0));
        let outward = (1.0 - 0.8 * across * across - 0.55 * down * down).max(0.02).sqrt();
        let shade = 0.52 + 0.48 * outward + 0.17 * across * sitter.light - 0.13 * down;
        (sitter.skin * shade, coverage(at.head, edge))
    });

    let (eye_y, nose_y, width) = (sitter.eye_y, sitter.nose_y, sitter.half_width);
    let blush = sitter.skin.tint(Rgb(1.1, 0.6, 0.6));
    canvas.over_face(Area::rows(eye_y - 0.3, nose_y + 0.35), |at| {
        let aside = at.u.abs();
        let socket =
            bump(aside - sitter.eye_x, 1.6 * sitter.eye_width, at.v - eye_y + 0.03, 1.2 * sitter.eye_width);
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
fn paint_freckles(canvas: &mut Canvas, sitter: &Sitter) {
    if sitter.freckles == 0.0 {
        return;
    }
    let brown = sitter.skin.tint(Rgb(0.62, 0.42, 0.30));
    let middle = sitter.nose_y - 0.05;
    canvas.over_face(Area::rows(middle - 0.25, middle + 0.25), |at| {
        let (u, v) = (at.u, at.v);
        let pattern = (61.0 * u + 1.3 * (51.0 * v).sin()).sin() * (57.0 * v + 1.7 * (47.0 * u).sin()).sin();
        let spots = (3.0 * (pattern - 0.40)).clamp(0.0, 1.0);
        (brown, 0.80 * sitter.freckles * spots * bump(u.abs() - 0.17, 0.14, v - middle, 0.10))
    });
}

/// Full beard on cheeks and chin, or goatee on the chin alone.
fn paint_beard(canvas: &mut Canvas, sitter: &Sitter) {
    match sitter.beard {
        Beard::Full => canvas.over_face(Area::rows(sitter.nose_y - 0.35, 1.0), |at| {
            let beside = (at.u.abs() / sitter.half_width - 0.35).max(0.0);
            let below = coverage(sitter.nose_y + 0.10 - 0.42 * beside - at.v, 0.09);
            let lips = coverage(ellipse(at.u, at.v - sitter.mouth_y, 1.02 * sitter.mouth_width, 0.055), 0.04);
            (sitter.hair * (0.92 * sitter.strands(at)), 0.92 * below * (1.0 - lips))
        }),
        Beard::Goatee => canvas.over_face(Area::rows(sitter.mouth_y - 0.05, 1.0), |at| {
            let tuft = ellipse(at.u, at.v - sitter.mouth_y - 0.14, 0.80 * sitter.mouth_width, 0.10);
            (sitter.hair * (0.92 * sitter.strands(at)), 0.92 * coverage(tuft, 0.05))
        }),
        Beard::None | Beard::Moustache => {}
    }
}

/// Bridge, tip, nostrils and wings; the nose stands out, so a turn moves it further than the face.
fn paint_nose(canvas: &mut Canvas, sitter: &Sitter) {
    let (width, tip) = (sitter.nose_width, sitter.nose_y);
    let (bridge, length) = (0.5 * (sitter.eye_y + tip), tip - sitter.eye_y);
    let ahead = 0.07 * sitter.yaw.sin();
    let shadow_side = -sitter.light.signum();
    let reach = 2.6 * width + ahead.abs();
    let area = sitter.on_face((-reach, reach), (sitter.eye_y - 0.2, tip + 0.12));
    canvas.over_face(area, |at| {
        let beside = bump(
            at.u - ahead - 0.75 * shadow_side * width,
            0.55 * width,
            at.v - bridge - 0.02,
            0.45 * length,
        );
        (Rgb::BLACK, (0.20 * sitter.light.abs() + 0.07) * beside)
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
fn paint_moustache(canvas: &mut Canvas, sitter: &Sitter) {
    if sitter.beard == Beard::None {
        return;
    }
    let width = sitter.mouth_width;
    let middle = between(sitter.nose_y, sitter.mouth_y, 0.52);
    canvas.over_face(Area::rows(middle - 0.1, middle + 0.15), |at| {
        let droop = 0.030 * (at.u / width).powi(2);
        let hairs = ellipse(at.u, at.v - middle - droop, 0.86 * width, 0.036);
        (sitter.hair * (0.92 * sitter.strands(at)), 0.95 * coverage(hairs, 0.035))
    });
}

/// Lips, the line between them or the opening, teeth of a smile, shadow below and in the corners.
fn paint_mouth(canvas: &mut Canvas, sitter: &Sitter) {
    let edge = canvas.edge(1.0);
    let (width, lip, open) = (sitter.mouth_width, sitter.lip, sitter.mouth_open);
    let smiling = sitter.expression == Expression::Smiling;
    // Height above the bent line of the mouth, and how much the lips taper there.
    let bent = move |at: &Spot| {
        let aside = at.u / width;
        (
            at.v - sitter.mouth_y + sitter.mouth_curve * (aside * aside - 0.3),
            (1.0 - aside * aside).max(0.0).sqrt(),
        )
    };
    let area = sitter.on_face((-1.6 * width, 1.6 * width), (sitter.mouth_y - 0.25, sitter.mouth_y + 0.3));

    canvas.over_face(area, |at| {
        let (v, taper) = bent(at);
        let lips = (v.abs() - (open + 1.05 * lip) * taper).max(at.u.abs() - width);
        (sitter.lips * if v < 0.0 { 0.88 } else { 1.0 }, coverage(lips, edge))
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
        let below = 0.20 * bump(at.u, 0.75 * width, at.v - sitter.mouth_y - lip - 0.055 - open, 0.028);
        let aside = at.u.abs();
        let corner = 0.35 * bump(aside - 1.03 * width, 0.020, bent(at).0, 0.024);
        let fold =
            bump(aside - 1.28 * width, 0.020, at.v - between(sitter.nose_y, sitter.mouth_y, 0.5), 0.075);
        (Rgb::BLACK, below + corner + if smiling { 0.25 * fold } else { 0.0 })
    });
}

/// One eye: white, iris, pupil, glint, lids. `side` is -1 for the left one in the image.
fn paint_eye(canvas: &mut Canvas, sitter: &Sitter, side: f32) {
    let edge = canvas.edge(0.8);
    let (width, open) = (sitter.eye_width, sitter.eye_open);
    let iris = 0.92 * open.max(0.42 * width);
    // Place relative to the middle of the eye, slanted; and the height of the lids there.
    let local = move |at: &Spot| {
        let u = at.u - side * sitter.eye_x;
        let v = at.v - sitter.eye_y + sitter.eye_slope * side * u;
        (u, v, open * (1.0 - (u / width).powi(2)).max(0.0).sqrt())
    };
    let inside = move |at: &Spot| {
        let (u, v, lid) = local(at);
        coverage((-v - lid).max(v - 0.85 * lid).max(u.abs() - width), edge)
    };
    let middle = side * sitter.eye_x;
    let area = sitter
        .on_face((middle - 1.3 * width, middle + 1.3 * width), (sitter.eye_y - 0.22, sitter.eye_y + 0.2));

    canvas.over_face(area, |at| {
        let shade = 0.80 + 0.20 * (local(at).1 / open + 0.5).clamp(0.0, 1.0);
        (Rgb(0.95, 0.94, 0.93) * shade, inside(at))
    });
    canvas.over_face(area, |at| {
        let (u, v, _) = local(at);
        let radius = u.hypot(v);
        let colour = sitter.iris * (0.65 + 0.55 * (radius / iris).min(1.0));
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
fn paint_brow(canvas: &mut Canvas, sitter: &Sitter, side: f32) {
    let edge = canvas.edge(0.8);
    let half = 1.32 * sitter.eye_width;
    let middle = side * sitter.eye_x;
    let colour = (sitter.hair * 0.66).mix(sitter.skin, 0.06);
    let area = sitter
        .on_face((middle - half - 0.05, middle + half + 0.05), (sitter.brow_y - 0.2, sitter.brow_y + 0.2));
    canvas.over_face(area, |at| {
        let u = at.u - middle;
        let v = at.v - sitter.brow_y + sitter.brow_slope * side * u + 0.9 * u * u;
        let outside = (0.5 * side * u / half + 0.5).clamp(0.0, 1.0);
        let thickness = sitter.brow_thickness * (1.0 - 0.5 * outside);
        (colour, 0.92 * band(v, thickness, edge) * coverage(u.abs() - half, 0.03))
    });
}

/// The hair on the skull down to the hairline, and the rim that frames a face with long hair.
fn paint_hair_in_front(canvas: &mut Canvas, sitter: &Sitter) {
    if sitter.hair_style == HairStyle::Bald {
        return;
    }
    let edge = canvas.edge(1.5);
    let (width, volume) = (sitter.half_width, sitter.hair_volume);
    canvas.over(Area::rows(-1.0, 0.3), |at| {
        let across = at.u.clamp(-width, width) / width;
        let line = match sitter.hair_style {
            HairStyle::Side => sitter.hairline + 0.02 + 0.16 * across,
            HairStyle::Fringe => sitter.hairline + 0.16 + 0.02 * (38.0 * at.u).sin(),
            _ => sitter.hairline + 0.11 * across * across,
        };
        // Beside the face the hair gets thinner downwards and ends as sideburns.
        let thinner = ((0.10 - at.y) / 0.35).clamp(0.0, 1.0);
        let above = (at.y - line).min((-at.head - 0.045 * thinner).max(at.y - 0.04));
        let hair = (at.head - (0.55 * volume + 0.015) * thinner).max(above);
        (sitter.hair * sitter.strands(at), coverage(hair, edge) * sitter.below_hat(at.y))
    });
    if sitter.hair_style == HairStyle::Long {
        canvas.over(Area::rows(-0.5, 0.85), |at| {
            let rim = (-at.head - 0.06)
                .max(at.head - volume - 0.03)
                .max(at.y - 0.80)
                .max(0.80 * width - at.x.abs());
            (sitter.hair * (0.95 * sitter.strands(at)), 0.95 * coverage(rim, edge) * sitter.below_hat(at.y))
        });
    }
}

/// Frames with clear or dark lenses, the bridge and the arms.
fn paint_glasses(canvas: &mut Canvas, sitter: &Sitter) {
    let lens_alpha = match sitter.glasses {
        Glasses::None => return,
        Glasses::Clear => 0.0,
        Glasses::Dark => 0.95,
    };
    let edge = canvas.edge(1.0);
    let frame = Rgb(0.09, 0.09, 0.10);
    let (middle, radius) = (1.05 * sitter.eye_x, 0.125);
    let area = Area::rows(sitter.eye_y - 0.2, sitter.eye_y + 0.25);
    canvas.over(area, |at| {
        let aside = at.u.abs();
        let lens = ellipse(aside - middle, at.v - sitter.eye_y - 0.01, radius, 0.82 * radius);
        let on_head = coverage(at.head - 0.05, edge);
        let rim = band(lens, 0.011, edge) * on_head;
        let bar = band(at.v - sitter.eye_y + 0.02, 0.011, edge);
        let bridge = bar * coverage(aside - (middle - radius), edge);
        let arm = bar * coverage(middle + radius - aside, edge) * at.face;
        (frame, (lens_alpha * coverage(lens, edge) * on_head).max(rim).max(bridge * at.face).max(arm))
    });
    if sitter.glasses == Glasses::Clear {
        canvas.over_face(area, |at| {
            let lens = ellipse(at.u.abs() - middle, at.v - sitter.eye_y - 0.01, radius, 0.82 * radius);
            (Rgb::WHITE, 0.08 * coverage(lens, edge))
        });
    }
}

/// A cap with its peak, or a knitted beanie with its fold; both fit the head that wears them.
fn paint_hat(canvas: &mut Canvas, sitter: &Sitter) {
    if sitter.hat == Hat::None {
        return;
    }
    let edge = canvas.edge(1.0);
    let (width, line) = (sitter.half_width, sitter.hat_line);
    let lit = |at: &Spot| sitter.cloth * (0.88 + 0.22 * at.x * sitter.light - 0.25 * (at.y + 0.5));
    let crown = move |at: &Spot, thick: f32, tall: f32| {
        let up = (line - at.y).max(0.0);
        at.head - thick - tall * (up / 0.12).min(1.0)
    };
    match sitter.hat {
        Hat::None => {}
        Hat::Cap => {
            canvas.over(Area::rows(-1.0, line + 0.15), |at| {
                let seam = 1.0 - 0.12 * hill(at.u, 0.02);
                (lit(at) * seam, coverage(crown(at, 0.04, 0.03).max(at.y - line - 0.02), edge))
            });
            let peak_x = 1.2 * sitter.image_x(0.0, 0.0);
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

/// Pencil on tinted paper: lines where the brightness changes, soft shading, a little colour left.
fn draw_as_sketch(canvas: &Canvas, step: usize) -> Vec<Rgb> {
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
fn paint_in_oil(canvas: &Canvas) -> Vec<Rgb> {
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

/// Means over squares of `supersample`² points.
fn average(colours: &[Rgb], size: usize, supersample: usize) -> Vec<Rgb> {
    let side = size * supersample;
    let share = 1.0 / (supersample * supersample) as f32;
    let mean = |index: usize| {
        let (row, column) = (index / size * supersample, index % size * supersample);
        let mut sum = Rgb::BLACK;
        for points in colours[row * side..].chunks(side).take(supersample) {
            for &point in &points[column..column + supersample] {
                sum = sum + point;
            }
        }
        sum * share
    };
    if supersample == 0 { Vec::new() } else { (0..size * size).map(mean).collect() }
}

/// Exposure, grain, and rounding to bytes.
fn develop(colours: &[Rgb], scene: &Scene) -> Vec<u8> {
    let mut rng = stream(scene.grain, *b"grain...", 0, 0);
    // The sum of four bytes is nearly normal, with this standard deviation.
    let deviation = (4.0 * (256.0f32 * 256.0 - 1.0) / 12.0).sqrt();
    let mut grain = || {
        let sum: u32 = rng.next_u32().to_le_bytes().into_iter().map(u32::from).sum();
        scene.noise * (sum as f32 - 510.0) / deviation
    };
    let byte = |value: f32| (255.0 * value.clamp(0.0, 1.0) + 0.5) as u8;
    let mut bytes = Vec::with_capacity(3 * colours.len());
    for &colour in colours {
        let Rgb(red, green, blue) = colour * scene.gain;
        bytes.extend([byte(red + grain()), byte(green + grain()), byte(blue + grain())]);
    }
    bytes
}

/// What is known about one point of the canvas before anything is painted there.
struct Spot {
    x: f32,
    y: f32,
    u: f32,
    v: f32,
    /// Distance to the outline of the head.
    head: f32,
    /// Coverage by the head.
    face: f32,
}

/// A rectangle of the image, in head units; layers are evaluated only there.
#[derive(Clone, Copy)]
struct Area {
    x: (f32, f32),
    y: (f32, f32),
}

impl Area {
    const ALL: Self = Self::rows(-9.0, 9.0);

    const fn rows(top: f32, bottom: f32) -> Self {
        Self { x: (-9.0, 9.0), y: (top, bottom) }
    }
}

/// The image while it is painted.
struct Canvas {
    side: usize,
    /// Half frames per head unit.
    zoom: f32,
    /// Head units from the middle of the frame to the middle of the head.
    middle: (f32, f32),
    spots: Vec<Spot>,
    colours: Vec<Rgb>,
}

impl Canvas {
    fn new(sitter: &Sitter, scene: &Scene, side: usize) -> Self {
        let zoom = ZOOM * scene.scale;
        let middle = (scene.shift[0] / zoom, scene.shift[1] / zoom + LOWERED);
        let edge = 2.0 / (side as f32 * zoom);
        let position = |index: usize| ((2 * index + 1) as f32 / side as f32 - 1.0) / zoom;
        let mut spots = Vec::with_capacity(side * side);
        for row in 0..side {
            let y = position(row) - middle.1;
            spots.extend((0..side).map(|column| {
                let x = position(column) - middle.0;
                let head = sitter.head_distance(x, y);
                Spot { x, y, u: sitter.face_u(x, y), v: y, head, face: coverage(head, edge) }
            }));
        }
        Self { side, zoom, middle, spots, colours: vec![Rgb::BLACK; side * side] }
    }

    /// Width of a soft edge, in head units, of so many pixels.
    fn edge(&self, pixels: f32) -> f32 {
        pixels * 2.0 / (self.side as f32 * self.zoom)
    }

    /// Lays ink over an area: `ink` gives colour and opacity at a spot.
    fn over(&mut self, area: Area, ink: impl Fn(&Spot) -> (Rgb, f32)) {
        let (left, right) = self.pixels(area.x, self.middle.0);
        let (top, bottom) = self.pixels(area.y, self.middle.1);
        for row in top..bottom {
            let row = row * self.side + left..row * self.side + right;
            for (spot, colour) in self.spots[row.clone()].iter().zip(&mut self.colours[row]) {
                let (ink, alpha) = ink(spot);
                if alpha > 0.0 {
                    *colour = colour.mix(ink, alpha.min(1.0));
                }
            }
        }
    }

    /// Lays ink over the face only: nothing beside the head is touched.
    fn over_face(&mut self, area: Area, ink: impl Fn(&Spot) -> (Rgb, f32)) {
        self.over(area, |spot| {
            if spot.face == 0.0 {
                return (Rgb::BLACK, 0.0);
            }
            let (colour, alpha) = ink(spot);
            (colour, spot.face * alpha)
        });
    }

    /// The pixels between two places along one axis, with one more at both ends.
    fn pixels(&self, places: (f32, f32), middle: f32) -> (usize, usize) {
        let pixel = |place: f32| ((place + middle) * self.zoom + 1.0) * 0.5 * self.side as f32;
        let inside = |pixel: f32| pixel.clamp(0.0, self.side as f32) as usize;
        (inside(pixel(places.0).floor() - 1.0), inside(pixel(places.1).ceil() + 1.0))
    }
}

/// A colour, red, green and blue, each about [0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rgb(f32, f32, f32);

impl Rgb {
    const BLACK: Self = Self(0.0, 0.0, 0.0);
    const WHITE: Self = Self(1.0, 1.0, 1.0);

    fn grey(value: f32) -> Self {
        Self(value, value, value)
    }

    fn map(self, change: impl Fn(f32) -> f32) -> Self {
        Self(change(self.0), change(self.1), change(self.2))
    }

    /// From this colour, at 0, to the other, at 1.
    fn mix(self, other: Self, share: f32) -> Self {
        Self(
            between(self.0, other.0, share),
            between(self.1, other.1, share),
            between(self.2, other.2, share),
        )
    }

    /// Through a filter of this colour.
    fn tint(self, filter: Self) -> Self {
        Self(self.0 * filter.0, self.1 * filter.1, self.2 * filter.2)
    }

    fn shift(self, by: f32) -> Self {
        self.map(|value| value + by)
    }

    fn luma(self) -> f32 {
        0.30 * self.0 + 0.59 * self.1 + 0.11 * self.2
    }
}

impl std::ops::Mul<f32> for Rgb {
    type Output = Self;
    fn mul(self, factor: f32) -> Self {
        self.map(|value| value * factor)
    }
}

impl std::ops::Add for Rgb {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0, self.1 + other.1, self.2 + other.2)
    }
}

fn skin_colour(dark: f32, hue: f32) -> Rgb {
    let base = Rgb(0.98, 0.84, 0.74).mix(Rgb(0.36, 0.21, 0.14), dark.powf(1.15));
    let hue = hue - 0.5;
    base.tint(Rgb(1.0 + 0.10 * hue, 1.0 - 0.04 * hue, 1.0 - 0.24 * hue))
}

fn hair_colour(colour: HairColour, shade: f32) -> Rgb {
    let base = match colour {
        HairColour::Black => Rgb(0.07, 0.06, 0.06),
        HairColour::DarkBrown => Rgb(0.28, 0.16, 0.09),
        HairColour::Brown => Rgb(0.50, 0.32, 0.16),
        HairColour::Blond => Rgb(0.86, 0.70, 0.38),
        HairColour::Red => Rgb(0.62, 0.22, 0.08),
        HairColour::Grey => Rgb(0.70, 0.70, 0.70),
    };
    base * (1.0 + 0.35 * (shade - 0.5))
}

fn iris_colour(colour: EyeColour) -> Rgb {
    match colour {
        EyeColour::Brown => Rgb(0.20, 0.11, 0.06),
        EyeColour::Hazel => Rgb(0.42, 0.26, 0.10),
        EyeColour::Green => Rgb(0.25, 0.45, 0.22),
        EyeColour::Blue => Rgb(0.22, 0.45, 0.75),
        EyeColour::Grey => Rgb(0.45, 0.50, 0.55),
    }
}

fn dye(colour: Colour) -> Rgb {
    match colour {
        Colour::Red => Rgb(0.80, 0.16, 0.14),
        Colour::Green => Rgb(0.18, 0.62, 0.25),
        Colour::Blue => Rgb(0.18, 0.32, 0.80),
        Colour::Yellow => Rgb(0.93, 0.82, 0.22),
        Colour::White => Rgb(0.93, 0.93, 0.93),
        Colour::Black => Rgb(0.12, 0.12, 0.14),
        Colour::Purple => Rgb(0.55, 0.25, 0.65),
        Colour::Orange => Rgb(0.92, 0.52, 0.15),
    }
}

/// From `low`, at 0, to `high`, at 1.
fn between(low: f32, high: f32, share: f32) -> f32 {
    low + (high - low) * share
}

/// How much of a pixel lies inside a shape: 1 well inside, 0 well outside, over a width of `edge`.
fn coverage(distance: f32, edge: f32) -> f32 {
    (0.5 - distance / edge).clamp(0.0, 1.0)
}

/// Coverage by the band of half-width `half` around a line; right for bands thinner than a pixel too.
fn band(distance: f32, half: f32, edge: f32) -> f32 {
    coverage(distance - half, edge) - coverage(distance + half, edge)
}

/// Gaussian of the given width: `exp(−(d / width)²)`.
fn hill(distance: f32, width: f32) -> f32 {
    let scaled = distance / width;
    if scaled.abs() > 3.0 { 0.0 } else { (-scaled * scaled).exp() }
}

/// Gaussian in two directions.
fn bump(x: f32, width: f32, y: f32, height: f32) -> f32 {
    let (x, y) = (x / width, y / height);
    let squared = x * x + y * y;
    if squared > 9.0 { 0.0 } else { (-squared).exp() }
}

/// Distance to an ellipse around the origin, exact on the outline.
fn ellipse(x: f32, y: f32, width: f32, height: f32) -> f32 {
    ((x / width).hypot(y / height) - 1.0) * width.min(height)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_person_and_scene_give_the_same_bytes() {
        let (person, scene) = (Person::new(7, 3), Scene::draw(7, 5));
        assert_eq!(paint(&person, &scene, 64, 2), paint(&person, &scene, 64, 2));
    }

    #[test]
    fn people_differ_in_the_same_scene() {
        let scene = Scene::draw(0, 0).plain();
        let images: Vec<_> = (0..20).map(|number| paint(&Person::new(0, number), &scene, 32, 1)).collect();
        for (index, one) in images.iter().enumerate() {
            for other in &images[..index] {
                let change: u64 = one.iter().zip(other).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
                assert!(change > 2 * one.len() as u64, "mean change {}", change as f64 / one.len() as f64);
            }
        }
    }

    #[test]
    fn every_size_is_painted_whole() {
        let (person, scene) = (Person::new(0, 1), Scene::draw(0, 1));
        for size in [0, 1, 2, 7, 64, 100] {
            for supersample in [1, 2, 3] {
                assert_eq!(paint(&person, &scene, size, supersample).len(), 3 * size * size);
            }
        }
    }

    #[test]
    fn hats_glasses_and_styles_are_seen() {
        let person = Person::new(0, 2);
        let plain = Scene::draw(0, 3).plain();
        let differs = |scene: Scene| {
            let (one, two) = (paint(&person, &plain, 64, 1), paint(&person, &scene, 64, 1));
            one.iter().zip(&two).filter(|(a, b)| a.abs_diff(**b) > 24).count()
        };
        for hat in [Hat::Cap, Hat::Beanie] {
            assert!(differs(Scene { hat, ..plain.clone() }) > 300, "{hat:?}");
        }
        for glasses in [Glasses::Clear, Glasses::Dark] {
            assert!(differs(Scene { glasses, ..plain.clone() }) > 60, "{glasses:?}");
        }
        for style in [Style::Sketch, Style::Painting] {
            assert!(differs(Scene { style, ..plain.clone() }) > 1000, "{style:?}");
        }
    }
}
