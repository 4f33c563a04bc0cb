//! A detected face, and non-maximum suppression.

use serde::Serialize;

/// A face in an image.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Face {
    /// Left, top, right and bottom in pixels of the upright image; may reach beyond its edge.
    #[serde(rename = "box")]
    pub bounds: [f32; 4],
    /// Left eye, right eye, nose, left and right mouth corner as seen in the image, (x, y) in its pixels.
    pub points: [[f32; 2]; 5],
    /// How sure the detector is, 0 to 1.
    pub score: f32,
}

impl Face {
    /// The face with its corners and landmarks mapped by `to`.
    pub(super) fn moved(mut self, to: impl Fn([f32; 2]) -> [f32; 2]) -> Self {
        let [x1, y1, x2, y2] = self.bounds;
        let ([x1, y1], [x2, y2]) = (to([x1, y1]), to([x2, y2]));
        self.bounds = [x1, y1, x2, y2];
        self.points = self.points.map(to);
        self
    }

    /// Area of the box in pixels.
    pub(super) fn area(&self) -> f32 {
        self.area_with(0.0)
    }

    /// Area of the box with `offset` added to width and height.
    fn area_with(&self, offset: f32) -> f32 {
        let [x1, y1, x2, y2] = self.bounds;
        (x2 + offset - x1).max(0.0) * (y2 + offset - y1).max(0.0)
    }
}

/// Non-maximum suppression: keeps candidates of at least `min_score` whose intersection over union with every better
/// one is at most `max_iou`. Expects the best first. `offset` is added to widths and heights: 1 where boxes count
/// whole pixels, as InsightFace does, else 0.
pub(super) fn nms(candidates: Vec<Face>, min_score: f32, max_iou: f32, offset: f32) -> Vec<Face> {
    let mut kept: Vec<Face> = Vec::new();
    for face in candidates.into_iter().filter(|face| face.score >= min_score) {
        if kept.iter().all(|better| iou(better, &face, offset) <= max_iou) {
            kept.push(face);
        }
    }
    kept
}

/// Intersection over union of two boxes.
pub(super) fn iou(a: &Face, b: &Face, offset: f32) -> f32 {
    let right = (a.bounds[2] + offset).min(b.bounds[2] + offset);
    let bottom = (a.bounds[3] + offset).min(b.bounds[3] + offset);
    let width = (right - a.bounds[0].max(b.bounds[0])).max(0.0);
    let height = (bottom - a.bounds[1].max(b.bounds[1])).max(0.0);
    let both = width * height;
    both / (a.area_with(offset) + b.area_with(offset) - both).max(f32::MIN_POSITIVE)
}
