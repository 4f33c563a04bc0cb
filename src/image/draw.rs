//! Polygons, blurs, masks and crops with Pillow's numbers, bit for bit: published face preparation is defined by them.

use super::Image;

impl Image {
    /// The rectangle from `[left, top]` to `[right, bottom]`, black where it lies outside the image (`Image.crop`).
    pub fn crop_with_border(&self, [left, top, right, bottom]: [isize; 4]) -> Self {
        let (width, height) = ((right - left).max(0) as usize, (bottom - top).max(0) as usize);
        let mut part = Self::filled(width, height, [0; 3]);
        let inside = |at: isize, length: usize| at.clamp(0, length as isize);
        let (first, end) = (inside(left, self.width), inside(right, self.width));
        let count = (end - first).max(0) as usize * 3;
        if count == 0 {
            return part;
        }
        for y in inside(top, self.height)..inside(bottom, self.height) {
            let from = (y as usize * self.width + first as usize) * 3;
            let to = ((y - top) as usize * width + (first - left) as usize) * 3;
            part.rgb[to..to + count].copy_from_slice(&self.rgb[from..from + count]);
        }
        part
    }

    /// Lays `other` over `self` with its upper left corner at (`left`, `top`), as far as each value of `mask`, which is as
    /// large as `other`, says: 0 keeps what is there, 255 takes `other` (`Paste.c`, `BLEND`).
    pub fn paste_masked(&mut self, other: &Self, mask: &Self, [left, top]: [isize; 2]) {
        for y in 0..other.height {
            for x in 0..other.width {
                let (to_x, to_y) = (x as isize + left, y as isize + top);
                if to_x < 0 || to_y < 0 || to_x >= self.width as isize || to_y >= self.height as isize {
                    continue;
                }
                let from = (y * other.width + x) * 3;
                let to = (to_y as usize * self.width + to_x as usize) * 3;
                for c in 0..3 {
                    let share = u32::from(mask.rgb[from + c]);
                    let sum =
                        u32::from(other.rgb[from + c]) * share + u32::from(self.rgb[to + c]) * (255 - share);
                    let t = sum + 128;
                    self.rgb[to + c] = ((t + (t >> 8)) >> 8) as u8;
                }
            }
        }
    }

    /// Fills the polygon through `vertices` and its outline; where it crosses itself, every other part (`Draw.c`,
    /// `polygon_generic`).
    pub fn fill_polygon(&mut self, vertices: &[[i32; 2]], colour: [u8; 3]) {
        let next = vertices.iter().cycle().skip(1);
        let edges: Vec<Edge> = vertices.iter().zip(next).map(|(&from, &to)| Edge::new(from, to)).collect();
        let (level, edges): (Vec<Edge>, Vec<Edge>) =
            edges.into_iter().partition(|edge| edge.top == edge.bottom);
        for edge in &level {
            self.fill_row(edge.top, edge.left, edge.right, colour);
        }
        let all = || level.iter().chain(&edges);
        let top = all().map(|edge| edge.top).min().unwrap_or(0).max(0);
        let bottom = all().map(|edge| edge.bottom).max().unwrap_or(-1).min(self.height as i32);
        for y in top..=bottom {
            for pair in crossings(&edges, y, bottom).chunks_exact(2) {
                self.fill_row(y, round_up(pair[0]), round_down(pair[1]), colour);
            }
        }
    }

    /// Fills row `y` from column `left` to column `right`, both included, as far as it lies in the image.
    fn fill_row(&mut self, y: i32, left: i32, right: i32, colour: [u8; 3]) {
        let (left, right) = (left.max(0), right.min(self.width as i32 - 1));
        if y < 0 || y >= self.height as i32 || left > right {
            return;
        }
        let row = &mut self.rgb[y as usize * self.width * 3..][..self.width * 3];
        let part = &mut row[left as usize * 3..(right as usize + 1) * 3];
        part.chunks_exact_mut(3).for_each(|pixel| pixel.copy_from_slice(&colour));
    }

    /// A Gaussian of standard deviation `sigma` pixels, made of three box filters along rows and three along columns,
    /// each rounded to bytes; the edge is continued (`BoxBlur.c`; Gwosdek et al. 2011, extended box filters).
    pub fn gaussian_blur(&self, sigma: f32) -> Self {
        let weights = BoxWeights::of(sigma);
        let mut image = self.clone();
        for _ in 0..3 {
            let rows = image.rgb.chunks_exact_mut(self.width * 3);
            rows.for_each(|row| (0..3).for_each(|c| weights.blur(row, c, 3, self.width)));
        }
        for _ in 0..3 {
            let stride = self.width * 3;
            (0..stride).for_each(|column| weights.blur(&mut image.rgb, column, stride, self.height));
        }
        image
    }
}

/// A side of a polygon.
struct Edge {
    start: [i32; 2],
    left: i32,
    right: i32,
    top: i32,
    bottom: i32,
    /// Columns a row.
    slope: f32,
}

impl Edge {
    fn new([x0, y0]: [i32; 2], [x1, y1]: [i32; 2]) -> Self {
        let slope = if y0 == y1 { 0.0 } else { (x1 - x0) as f32 / (y1 - y0) as f32 };
        let (left, right, top, bottom) = (x0.min(x1), x0.max(x1), y0.min(y1), y0.max(y1));
        Self { start: [x0, y0], left, right, top, bottom, slope }
    }

    /// Its column in row `y`.
    fn at(&self, y: i32) -> f32 {
        (y - self.start[1]) as f32 * self.slope + self.start[0] as f32
    }

    fn spans(&self, y: i32) -> bool {
        (self.top..=self.bottom).contains(&y)
    }

    fn ends_at(&self, y: i32) -> bool {
        y == self.top || y == self.bottom
    }
}

/// Where the edges cross row `y`, from left to right; between the first and the second of each two it is filled.
fn crossings(edges: &[Edge], y: i32, last: i32) -> Vec<f32> {
    let mut columns = Vec::new();
    for (i, edge) in edges.iter().enumerate().filter(|(_, edge)| edge.spans(y)) {
        let x = edge.at(y);
        if y == edge.bottom && y < last {
            columns.extend([x, x]);
        } else if edge.ends_at(y) && edge.slope != 0.0 {
            columns.push(corner(&edges[..i], edge, x, y));
        } else {
            columns.push(x);
        }
    }
    columns.sort_by(f32::total_cmp);
    columns
}

/// The column of the end of `edge` in row `y`; where it meets one of `others` in a sharp corner, the column up to which the
/// next row is filled, so that the corner is not torn off.
fn corner(others: &[Edge], edge: &Edge, x: f32, y: i32) -> f32 {
    let next = if y == edge.bottom { y - 1 } else { y + 1 };
    let meets = |other: &&Edge| {
        other.ends_at(y) && other.slope != 0.0 && x.round() == other.at(y).round() && other.spans(next)
    };
    let Some(other) = others.iter().find(meets) else { return x };
    let (a, b) = (edge.at(next), other.at(next));
    if x > a + 1.0 && x > b + 1.0 {
        a.max(b).round() + 1.0
    } else if x < a - 1.0 && x < b - 1.0 {
        a.min(b).round() - 1.0
    } else {
        x
    }
}

/// To the nearest column, halves away from zero.
fn round_up(x: f32) -> i32 {
    if x < 0.0 { x.round() as i32 } else { (x + 0.5).floor() as i32 }
}

/// To the nearest column, halves towards zero.
fn round_down(x: f32) -> i32 {
    if x < 0.0 { (x + 0.5).floor() as i32 } else { (x - 0.5).ceil() as i32 }
}

/// A box filter of a radius that is no whole number, in fixed point of 24 bits.
struct BoxWeights {
    radius: usize,
    /// Of the values up to `radius` away.
    inner: u32,
    /// Of the two values beyond.
    outer: u32,
}

impl BoxWeights {
    /// The box of which three make a Gaussian.
    fn of(sigma: f32) -> Self {
        const PASSES: f32 = 3.0;
        let variance = sigma * sigma / PASSES;
        let whole = (((12.0 * variance + 1.0).sqrt() - 1.0) / 2.0).floor();
        let share = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance);
        let radius = whole + share / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
        const ONE: u32 = 1 << 24;
        let inner = (ONE as f32 / (2.0 * radius + 1.0)) as u32;
        let full = 2 * radius as u32 + 1;
        Self { radius: radius as usize, inner, outer: (ONE - full * inner) / 2 }
    }

    /// Filters the `count` values that lie `stride` apart from `first` on.
    fn blur(&self, values: &mut [u8], first: usize, stride: usize, count: usize) {
        let line: Vec<u32> = (0..count).map(|i| u32::from(values[first + i * stride])).collect();
        let at = |i: isize| line[i.clamp(0, count as isize - 1) as usize];
        let radius = self.radius as isize;
        let mut sum: u32 = (-radius..=radius).map(at).sum();
        for i in 0..count {
            let here = i as isize;
            let edges = at(here - radius - 1) + at(here + radius + 1);
            values[first + i * stride] = ((self.inner * sum + self.outer * edges + (1 << 23)) >> 24) as u8;
            sum = sum + at(here + radius + 1) - at(here - radius);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crops_beyond_the_image_are_black() {
        let image = Image::filled(4, 3, [9; 3]);
        let part = image.crop_with_border([-1, 1, 6, 5]);
        assert_eq!((part.width, part.height), (7, 4));
        let rows: Vec<Vec<u8>> = (0..4).map(|y| (0..7).map(|x| part.pixel(x, y)[0]).collect()).collect();
        let full = [0, 9, 9, 9, 9, 0, 0];
        assert_eq!(rows, [full, full, [0; 7], [0; 7]]);
        let outside = image.crop_with_border([10, -9, 12, -7]);
        assert_eq!(outside, Image::filled(2, 2, [0; 3]));
        assert_eq!(image.crop_with_border([3, 3, 1, 1]).rgb.len(), 0);
    }

    #[test]
    fn a_polygon_has_its_edge_pixels_and_may_leave_the_image() {
        let mut image = Image::filled(7, 5, [0; 3]);
        image.fill_polygon(&[[1, 1], [5, 1], [3, 3]], [1; 3]);
        let rows: Vec<String> = (0..5)
            .map(|y| (0..7).map(|x| if image.pixel(x, y) == [1; 3] { '#' } else { '.' }).collect())
            .collect();
        assert_eq!(rows, [".......", ".#####.", "..###..", "...#...", "......."]);
        image.fill_polygon(&[[-9, -9], [90, -9], [90, 90], [-9, 90]], [2; 3]);
        assert_eq!(image, Image::filled(7, 5, [2; 3]));
        image.fill_polygon(&[], [3; 3]);
        assert_eq!(image, Image::filled(7, 5, [2; 3]));
    }

    #[test]
    fn a_blur_keeps_what_is_even_and_spreads_a_point() {
        let even = Image::filled(40, 9, [200, 3, 255]);
        assert_eq!(even.gaussian_blur(15.0), even);
        let weights = BoxWeights::of(15.0);
        assert_eq!((weights.radius, weights.inner), (14, 559_862));
        let mut point = Image::filled(9, 9, [0; 3]);
        point.rgb[(4 * 9 + 4) * 3] = 255;
        let blurred = point.gaussian_blur(1.0);
        assert!(
            blurred.pixel(4, 4)[0] > blurred.pixel(4, 3)[0] && blurred.pixel(4, 3) == blurred.pixel(3, 4)
        );
        assert_eq!(blurred.pixel(4, 4)[1], 0);
    }

    #[test]
    fn a_mask_blends_as_pillow_does() {
        let mut ground = Image::filled(3, 2, [127; 3]);
        let mask = Image { width: 2, height: 1, rgb: vec![0, 0, 0, 100, 255, 1] };
        ground.paste_masked(&Image::filled(2, 1, [255, 0, 255]), &mask, [1, 1]);
        assert_eq!((ground.pixel(1, 1), ground.pixel(2, 1)), ([127; 3], [177, 0, 128]));
        ground.paste_masked(&Image::filled(2, 1, [0; 3]), &Image::filled(2, 1, [255; 3]), [-1, -5]);
        assert_eq!(ground.pixel(0, 0), [127; 3]);
    }
}
