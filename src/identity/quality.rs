//! How good a photo is as a reference of a face, and what to do about it.

use serde::Serialize;

use super::Face;
use super::align::{SIDE, TEMPLATE, align};
use crate::image::Image;

/// Quality of a face, independent of identity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quality {
    /// Width of the face's box in pixels of the image.
    pub width: f32,
    /// Between the eyes, in pixels of the image.
    pub eye_distance: f32,
    /// Standard deviation of the Laplacian of the aligned face's grey, in grey levels; see [`BLURRED`].
    pub sharpness: f32,
    /// Turned to the image's right by so many degrees; negative to its left. An estimate from five points.
    pub yaw: f32,
    /// Looking up by so many degrees; negative down. The roughest of the three.
    pub pitch: f32,
    /// Leaning clockwise by so many degrees.
    pub roll: f32,
    /// Other faces that are at least a quarter as large.
    pub other_faces: usize,
    /// Share of the face's box that lies outside the image, 0 to 1.
    pub cut_off: f32,
}

/// A box with fewer pixels across is enlarged for the recogniser, in whose 112×112 pixels it is about 70 wide.
const SMALL: f32 = 60.0;

/// The astronaut's face, 90 pixels wide, has 26, blurred by σ = 2 pixels 3.7; a photo's, 237 wide, 45, blurred by
/// σ = 6 pixels 3.1; painted portraits of 64×64 pixels 9 to 12.
const BLURRED: f32 = 4.0;

/// Degrees beyond which one half of the face is hidden.
const TURNED: f32 = 35.0;

/// Degrees beyond which brow or chin is foreshortened.
const TILTED: f32 = 30.0;

impl Quality {
    /// Judges `face`, one of the `faces` of `image`.
    pub fn of(image: &Image, face: &Face, faces: &[Face]) -> Self {
        let [x1, y1, x2, y2] = face.bounds;
        let inside = (x2.min(image.width as f32) - x1.max(0.0)).max(0.0)
            * (y2.min(image.height as f32) - y1.max(0.0)).max(0.0);
        let [left, right, ..] = face.points;
        let pose = Pose::of(&face.points);
        Self {
            width: x2 - x1,
            eye_distance: (right[0] - left[0]).hypot(right[1] - left[1]),
            sharpness: sharpness(&align(image, &face.points, SIDE)),
            yaw: pose.yaw,
            pitch: pose.pitch,
            roll: pose.roll,
            other_faces: faces
                .iter()
                .filter(|other| *other != face && 4.0 * other.area() >= face.area())
                .count(),
            cut_off: 1.0 - inside / face.area().max(f32::MIN_POSITIVE),
        }
    }

    /// Problems that reduce the likeness, each with a remedy; empty for a good photo.
    pub fn hints(&self) -> Vec<String> {
        let mut hints = Vec::new();
        if self.width < SMALL {
            hints.push(format!(
                "the face is only {:.0} pixels wide; one of {SMALL} or more keeps more of the likeness",
                self.width
            ));
        }
        if self.sharpness < BLURRED {
            let sharpness = self.sharpness;
            hints.push(format!(
                "the face is blurred (sharpness {sharpness:.1}, wanted {BLURRED}); take a sharper photo"
            ));
        }
        if self.yaw.abs() > TURNED {
            hints.push(format!(
                "the face is turned aside by about {:.0} degrees; take a photo from the front",
                self.yaw.abs()
            ));
        }
        if self.pitch.abs() > TILTED {
            let way = if self.pitch > 0.0 { "up" } else { "down" };
            hints.push(format!(
                "the face looks {way} by about {:.0} degrees; take a photo from the front",
                self.pitch.abs()
            ));
        }
        if self.cut_off > 0.15 {
            hints.push(format!(
                "{:.0} % of the face lie outside the image; take one that shows it whole",
                self.cut_off * 100.0
            ));
        }
        hints
    }
}

/// Angles of the head in degrees.
struct Pose {
    yaw: f32,
    pitch: f32,
    roll: f32,
}

impl Pose {
    /// From eyes, nose and mouth corners, on a plain head: the tip of the nose stands as far before the face's plane
    /// as an eye lies from its middle. Turning by θ then moves the tip by tan θ of half the eyes' distance.
    fn of(points: &[[f32; 2]; 5]) -> Self {
        let middle = |[a, b]: [[f32; 2]; 2]| [(a[0] + b[0]) / 2.0, (a[1] + b[1]) / 2.0];
        let [left, right, nose, mouth_left, mouth_right] = *points;
        let (eyes, mouth) = (middle([left, right]), middle([mouth_left, mouth_right]));
        let roll = (right[1] - left[1]).atan2(right[0] - left[0]);
        // Axes of the face: across along the eyes, down at a right angle to them.
        let across = |[x, y]: [f32; 2]| (x - eyes[0]) * roll.cos() + (y - eyes[1]) * roll.sin();
        let down = |[x, y]: [f32; 2]| (y - eyes[1]) * roll.cos() - (x - eyes[0]) * roll.sin();
        let half_eyes = (across(right)).max(1e-3);
        let height = down(mouth).max(1e-3);
        // The middle of the face's plane at the height of the nose lies between eyes and mouth.
        let at_nose = down(nose) / height;
        let yaw = ((across(nose) - at_nose * across(mouth)) / half_eyes).atan();
        let [_, _, front_nose, ..] = TEMPLATE;
        let (front_eyes, front_mouth) =
            (middle([TEMPLATE[0], TEMPLATE[1]]), middle([TEMPLATE[3], TEMPLATE[4]]));
        let front = (front_nose[1] - front_eyes[1]) / (front_mouth[1] - front_eyes[1]);
        let half_front_eyes = (TEMPLATE[1][0] - TEMPLATE[0][0]) / 2.0;
        let reach = half_front_eyes / (front_mouth[1] - front_eyes[1]);
        let pitch = ((front - at_nose) / reach).atan();
        Self { yaw: yaw.to_degrees(), pitch: pitch.to_degrees(), roll: roll.to_degrees() }
    }
}

/// Standard deviation of the Laplacian of an aligned face, inside the oval of eyes and mouth.
fn sharpness(face: &Image) -> f32 {
    let grey = |x: usize, y: usize| {
        let [r, g, b] = face.pixel(x, y).map(f32::from);
        0.299 * r + 0.587 * g + 0.114 * b
    };
    let (left, right, top, bottom) = (30, 82, 40, 100);
    let values: Vec<f32> = (top..bottom)
        .flat_map(|y| (left..right).map(move |x| (x, y)))
        .map(|(x, y)| grey(x - 1, y) + grey(x + 1, y) + grey(x, y - 1) + grey(x, y + 1) - 4.0 * grey(x, y))
        .collect();
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head that is turned by `yaw` and lifted by `pitch` degrees, seen from far, 10 pixels a unit of half an eye
    /// distance, then leaned by `roll`.
    fn head(yaw: f32, pitch: f32, roll: f32) -> [[f32; 2]; 5] {
        let (front_eyes, unit) =
            ((TEMPLATE[0][1] + TEMPLATE[1][1]) / 2.0, (TEMPLATE[1][0] - TEMPLATE[0][0]) / 2.0);
        let depths = [0.0, 0.0, 1.0, 0.0, 0.0];
        std::array::from_fn(|i| {
            let x = (TEMPLATE[i][0] - 55.9) / unit;
            let (y, z) = ((TEMPLATE[i][1] - front_eyes) / unit, depths[i]);
            let (sin, cos) = pitch.to_radians().sin_cos();
            let (y, z) = (y * cos - z * sin, y * sin + z * cos);
            let (sin, cos) = yaw.to_radians().sin_cos();
            let x = x * cos + z * sin;
            let (sin, cos) = roll.to_radians().sin_cos();
            [50.0 + 10.0 * (x * cos - y * sin), 40.0 + 10.0 * (x * sin + y * cos)]
        })
    }

    #[test]
    fn angles_of_a_plain_head_are_found() {
        for (yaw, pitch, roll) in
            [(0.0, 0.0, 0.0), (30.0, 0.0, 0.0), (-40.0, 0.0, 10.0), (0.0, 25.0, 0.0), (0.0, -25.0, -20.0)]
        {
            let pose = Pose::of(&head(yaw, pitch, roll));
            let near = |found: f32, wanted: f32| (found - wanted).abs() < 4.0;
            assert!(
                near(pose.yaw, yaw) && near(pose.pitch, pitch) && near(pose.roll, roll),
                "{yaw} {pitch} {roll}: {} {} {}",
                pose.yaw,
                pose.pitch,
                pose.roll
            );
        }
    }

    #[test]
    fn points_in_one_place_give_finite_numbers() {
        let face = Face { bounds: [0.0; 4], points: [[3.0; 2]; 5], score: 1.0 };
        let quality = Quality::of(&Image::filled(4, 4, [0; 3]), &face, &[]);
        assert!(
            [quality.yaw, quality.pitch, quality.roll, quality.cut_off].iter().all(|value| value.is_finite())
        );
    }

    #[test]
    fn each_fault_has_its_hint_and_a_good_photo_none() {
        let good = Quality {
            width: 200.0,
            eye_distance: 90.0,
            sharpness: 12.0,
            yaw: -10.0,
            pitch: 5.0,
            roll: 30.0,
            other_faces: 0,
            cut_off: 0.02,
        };
        assert_eq!(good.hints(), Vec::<String>::new());
        for (fault, said) in [
            (Quality { width: 40.0, ..good.clone() }, "40 pixels wide"),
            (Quality { sharpness: 1.0, ..good.clone() }, "blurred"),
            (Quality { yaw: -50.0, ..good.clone() }, "turned aside by about 50"),
            (Quality { pitch: -40.0, ..good.clone() }, "looks down"),
            (Quality { cut_off: 0.3, ..good.clone() }, "30 % of the face"),
        ] {
            let hints = fault.hints();
            assert!(hints.len() == 1 && hints[0].contains(said), "{hints:?}");
        }
    }
}
