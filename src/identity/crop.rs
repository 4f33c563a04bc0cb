//! The square around a face that the image encoder sees: hair, ears and chin, little of the rest.

use super::Face;
use crate::image::{Filter, Image};

/// Side of the square as a multiple of the longer side of the face's box, which ends at brow and chin.
pub const MARGIN: f32 = 1.5;

/// The square around a face, `size`×`size` pixels; beyond the image its edge is continued.
pub fn portrait_crop(image: &Image, face: &Face, size: usize) -> Image {
    let [x1, y1, x2, y2] = face.bounds;
    square_around(image, [(x1 + x2) / 2.0, (y1 + y2) / 2.0], MARGIN * (x2 - x1).max(y2 - y1), size)
}

/// Makes all grey that lies outside the ellipse around the face's box in a [`portrait_crop`]. The ellipse is
/// [`MARGIN`] times as wide and as high as the box, so that it touches the crop's edges on the longer axis.
pub fn blank_background(crop: &mut Image, face: &Face) {
    const GREY: [u8; 3] = [127; 3];
    let [x1, y1, x2, y2] = face.bounds;
    let (width, height) = (x2 - x1, y2 - y1);
    let longer = width.max(height).max(f32::MIN_POSITIVE);
    let half = crop.width as f32 / 2.0;
    let (across, down) = (half * width / longer, half * height / longer);
    for y in 0..crop.height {
        for x in 0..crop.width {
            let (dx, dy) = ((x as f32 + 0.5 - half) / across, (y as f32 + 0.5 - half) / down);
            if dx * dx + dy * dy > 1.0 {
                crop.rgb[(y * crop.width + x) * 3..][..3].copy_from_slice(&GREY);
            }
        }
    }
}

/// The square of `side` pixels around `centre` (x, y), brought to `size`×`size`; beyond the image its edge is
/// continued.
pub fn square_around(image: &Image, centre: [f32; 2], side: f32, size: usize) -> Image {
    // No larger than the image with a border of its own size, however wrong the box.
    let most = 3 * image.width.max(image.height);
    let side = (side.round().max(1.0) as usize).min(most);
    let [left, top] = centre.map(|middle| (middle - side as f32 / 2.0).round() as isize);
    let inside = |at: isize, length: usize| at.clamp(0, length as isize - 1) as usize;
    let mut rgb = Vec::with_capacity(side * side * 3);
    for y in (top..).take(side) {
        let y = inside(y, image.height);
        for x in (left..).take(side) {
            rgb.extend(image.pixel(inside(x, image.width), y));
        }
    }
    Image { width: side, height: side, rgb }.resize(size, size, Filter::Bicubic)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 8×8 pixels whose red is the column and whose green is the row.
    fn gradient() -> Image {
        let rgb = (0..64u8).flat_map(|i| [i % 8, i / 8, 0]).collect();
        Image { width: 8, height: 8, rgb }
    }

    #[test]
    fn the_square_lies_around_the_middle_of_the_face() {
        let face = Face { bounds: [3.0, 2.0, 5.0, 6.0], points: [[0.0; 2]; 5], score: 1.0 };
        let crop = portrait_crop(&gradient(), &face, 6);
        assert_eq!((crop.width, crop.height), (6, 6));
        assert_eq!((crop.pixel(0, 0), crop.pixel(5, 5)), ([1, 1, 0], [6, 6, 0]));
    }

    #[test]
    fn the_ellipse_keeps_the_face_and_blanks_the_corners() {
        let face = Face { bounds: [10.0, 10.0, 30.0, 50.0], points: [[0.0; 2]; 5], score: 1.0 };
        let mut crop = portrait_crop(&Image::filled(60, 60, [9; 3]), &face, 40);
        blank_background(&mut crop, &face);
        for (x, y, grey) in [(20, 20, 9), (20, 0, 9), (0, 20, 127), (11, 20, 9), (8, 20, 127), (1, 1, 127)] {
            assert_eq!(crop.pixel(x, y)[0], grey, "{x} {y}");
        }
    }

    #[test]
    fn beyond_the_image_its_edge_is_continued() {
        let crop = square_around(&gradient(), [0.0, 8.0], 6.0, 6);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|x| crop.pixel(x, 0)[0]), [0, 0, 0, 0, 1, 2]);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|y| crop.pixel(0, y)[1]), [5, 6, 7, 7, 7, 7]);
        let absurd = square_around(&gradient(), [1e9, f32::NAN], 1e12, 6);
        assert_eq!(absurd.width, 6);
    }
}
