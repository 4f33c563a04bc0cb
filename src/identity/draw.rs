//! Boxes, landmarks and numbers of faces, painted into their image.

use super::Face;
use super::landmarks::Landmarks;
use crate::image::Image;

/// One colour a face, the largest first; then they repeat.
const COLOURS: [[u8; 3]; 4] = [[0, 200, 80], [255, 120, 0], [0, 140, 255], [230, 0, 120]];

/// Rows of the digits 0 to 9, five bits each.
const DIGITS: [[u8; 7]; 10] = [
    [14, 17, 19, 21, 25, 17, 14],
    [4, 12, 4, 4, 4, 4, 14],
    [14, 17, 1, 2, 4, 8, 31],
    [14, 17, 1, 6, 1, 17, 14],
    [2, 6, 10, 18, 31, 2, 2],
    [31, 16, 30, 1, 1, 17, 14],
    [6, 8, 16, 30, 17, 17, 14],
    [31, 1, 2, 4, 8, 8, 8],
    [14, 17, 17, 14, 17, 17, 14],
    [14, 17, 17, 15, 1, 2, 12],
];

/// The image with each face's box, its five points, its landmarks where there are any, and its number as `--face` takes it.
pub fn draw(image: &Image, faces: &[Face], landmarks: &[&Landmarks]) -> Image {
    let mut drawn = image.clone();
    // Lines of 1 pixel in 64×64, of 4 in a photo.
    let thick = (image.width.max(image.height) / 400).clamp(1, 12) as isize;
    for (number, face) in faces.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let [x1, y1, x2, y2] = face.bounds.map(|at| at.round() as isize);
        for (left, top, right, bottom) in [
            (x1, y1, x2, y1 + thick),
            (x1, y2 - thick, x2, y2),
            (x1, y1, x1 + thick, y2),
            (x2 - thick, y1, x2, y2),
        ] {
            fill(&mut drawn, [left, top, right, bottom], colour);
        }
        for [x, y] in face.points.map(|point| point.map(|at| at.round() as isize)) {
            fill(&mut drawn, [x - thick, y - thick, x + thick + 1, y + thick + 1], colour);
        }
        let dot = (thick / 2).max(1);
        for [x, y] in landmarks.get(number).into_iter().flat_map(|points| **points) {
            let (x, y) = (x.round() as isize, y.round() as isize);
            fill(&mut drawn, [x, y, x + dot, y + dot], colour);
        }
        for (place, digit) in (number + 1).to_string().bytes().enumerate() {
            let corner = [x1 + 2 * thick + place as isize * 6 * thick, y1 + 2 * thick];
            for (row, bits) in DIGITS[usize::from(digit - b'0')].into_iter().enumerate() {
                for column in (0..5).filter(|column| bits >> (4 - column) & 1 == 1) {
                    let (x, y) = (corner[0] + column as isize * thick, corner[1] + row as isize * thick);
                    fill(&mut drawn, [x, y, x + thick, y + thick], colour);
                }
            }
        }
    }
    drawn
}

/// Fills a rectangle, without its right and lower edge, as far as it lies in the image.
fn fill(image: &mut Image, [left, top, right, bottom]: [isize; 4], colour: [u8; 3]) {
    let inside = |at: isize, length: usize| at.clamp(0, length as isize) as usize;
    let (width, height) = (image.width, image.height);
    for y in inside(top, height)..inside(bottom, height) {
        for x in inside(left, width)..inside(right, width) {
            image.rgb[(y * width + x) * 3..][..3].copy_from_slice(&colour);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_and_points_lie_where_the_face_is_and_nothing_leaves_the_image() {
        let face = |bounds| Face { bounds, points: [[30.0, 40.0]; 5], score: 1.0 };
        let image = Image::filled(60, 60, [9; 3]);
        let drawn = draw(
            &image,
            &[face([10.0, 12.0, 50.0, 52.0]), face([-1e9, -5.0, 1e9, 400.0])],
            &[&[[7.0, 8.0]; 106]],
        );
        for (x, y) in [(10, 30), (49, 30), (30, 12), (30, 51)] {
            assert_eq!(drawn.pixel(x, y), COLOURS[0], "{x} {y}");
        }
        assert_eq!(drawn.pixel(30, 40), COLOURS[1]);
        assert_eq!((drawn.pixel(7, 8), drawn.pixel(20, 30)), (COLOURS[0], [9; 3]));
        assert_eq!((drawn.width, drawn.height), (60, 60));
    }
}
