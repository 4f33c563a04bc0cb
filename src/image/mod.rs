//! Images: decoding with limits, upright and over white; resizing as Pillow does; PNG, JPEG and WebP with text.

mod decode;
mod draw;
mod encode;
mod folder;
mod resize;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};

pub use decode::{MAX_MEGAPIXELS, set_max_megapixels};
pub use encode::FileFormat;
pub use folder::{
    files_in, has_image_name, images_in, is_skipped, is_written_as_folder, note_skipped, numbered, pngs_for,
    short_names,
};
pub use resize::Filter;

/// An upright RGB image with 8 bits a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Pixels from left to right.
    pub width: usize,
    /// Pixels from top to bottom.
    pub height: usize,
    /// `height · width · 3` bytes: row by row, red, green and blue of each pixel.
    pub rgb: Vec<u8>,
}

impl Image {
    /// An image of one colour.
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Self {
        Self { width, height, rgb: colour.repeat(width * height) }
    }

    /// The image in a tensor of shape (3, height, width) with values in −1…1, as the VAE decodes them.
    ///
    /// # Errors
    /// Numbers that are not finite, or another shape.
    pub fn from_tensor(image: &Tensor) -> Result<Self> {
        let (channels, height, width) = image.dims3()?;
        ensure!(channels == 3, "an image has 3 channels, this tensor {channels}");
        let values = image.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.permute((1, 2, 0))?;
        let values = values.flatten_all()?.to_vec1::<f32>()?;
        ensure!(
            values.iter().all(|value| value.is_finite()),
            "the network drew numbers that are not finite (NaN); no image is written"
        );
        let rgb =
            values.iter().map(|value| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8).collect();
        Ok(Self { width, height, rgb })
    }

    /// The image as a tensor of shape (3, height, width) with values in −1…1.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        let values: Vec<f32> = self.rgb.iter().map(|&value| f32::from(value) / 127.5 - 1.0).collect();
        let tensor = Tensor::from_vec(values, (self.height, self.width, 3), &Device::Cpu)?;
        Ok(tensor.permute((2, 0, 1))?.contiguous()?.to_device(device)?)
    }

    /// Red, green and blue at column `x` and row `y`.
    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        let at = (y * self.width + x) * 3;
        [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]
    }

    /// The part of the image from (`left`, `top`) on, cut to what lies inside.
    pub fn crop(&self, left: usize, top: usize, width: usize, height: usize) -> Self {
        let (left, top) = (left.min(self.width), top.min(self.height));
        let (width, height) = (width.min(self.width - left), height.min(self.height - top));
        let rows = self.rgb.chunks_exact(self.width * 3).skip(top).take(height);
        let rgb = rows.flat_map(|row| &row[left * 3..(left + width) * 3]).copied().collect();
        Self { width, height, rgb }
    }

    /// The largest centred square, cut out and brought to `size`×`size`.
    pub fn square(&self, size: usize, filter: Filter) -> Self {
        let side = self.width.min(self.height);
        self.crop((self.width - side) / 2, (self.height - side) / 2, side, side).resize(size, size, filter)
    }

    /// Lays `other` over `self` with its upper left corner at (`left`, `top`); what hangs over the edge is cut.
    pub fn paste(&mut self, other: &Self, left: usize, top: usize) {
        let width = other.width.min(self.width.saturating_sub(left));
        for y in 0..other.height.min(self.height.saturating_sub(top)) {
            let (to, from) = (((top + y) * self.width + left) * 3, y * other.width * 3);
            self.rgb[to..to + width * 3].copy_from_slice(&other.rgb[from..from + width * 3]);
        }
    }

    /// The image mirrored left to right.
    pub fn mirrored(&self) -> Self {
        let mut image = self.clone();
        for (to, from) in
            image.rgb.chunks_exact_mut(self.width * 3).zip(self.rgb.chunks_exact(self.width * 3))
        {
            for (to, from) in to.chunks_exact_mut(3).zip(from.chunks_exact(3).rev()) {
                to.copy_from_slice(from);
            }
        }
        image
    }
}

/// Images in rows on a white ground, each brought to `cell` pixels in height and width (its longer side; centred
/// in its cell), with `gap` white pixels between and around them.
pub fn contact_sheet(rows: &[Vec<&Image>], cell: usize, gap: usize) -> Image {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let pitch = cell + gap;
    let mut sheet = Image::filled(gap + columns * pitch, gap + rows.len() * pitch, [255; 3]);
    for (y, row) in rows.iter().enumerate() {
        for (x, image) in row.iter().enumerate() {
            let longer = image.width.max(image.height);
            let side = |length: usize| (length * cell / longer).max(1);
            let (width, height) = (side(image.width), side(image.height));
            let small = image.resize(width, height, Filter::Bicubic);
            sheet.paste(&small, gap + x * pitch + (cell - width) / 2, gap + y * pitch + (cell - height) / 2);
        }
    }
    sheet
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small image without symmetry.
    pub(in crate::image) fn gradient(width: usize, height: usize) -> Image {
        let rgb = (0..width * height * 3).map(|at| (at * 37 % 251) as u8).collect();
        Image { width, height, rgb }
    }

    #[test]
    fn a_contact_sheet_keeps_proportions_and_order() {
        let (wide, dark) = (Image::filled(20, 10, [200, 0, 0]), Image::filled(5, 5, [0, 0, 50]));
        let sheet = contact_sheet(&[vec![&wide, &dark], vec![&dark]], 10, 2);
        assert_eq!((sheet.width, sheet.height), (26, 26));
        assert_eq!((sheet.pixel(2, 7), sheet.pixel(2, 3)), ([200, 0, 0], [255; 3]));
        assert_eq!(
            (sheet.pixel(20, 7), sheet.pixel(7, 20), sheet.pixel(20, 20)),
            ([0, 0, 50], [0, 0, 50], [255; 3])
        );
    }

    #[test]
    fn crops_and_pastes_stay_inside() {
        let image = gradient(6, 4);
        let part = image.crop(4, 2, 10, 10);
        assert_eq!((part.width, part.height, part.pixel(1, 1)), (2, 2, image.pixel(5, 3)));
        let mut ground = Image::filled(3, 3, [9; 3]);
        ground.paste(&image, 2, 2);
        assert_eq!((ground.pixel(2, 2), ground.pixel(1, 2)), (image.pixel(0, 0), [9; 3]));
        assert_eq!(image.mirrored().pixel(0, 1), image.pixel(5, 1));
    }

    #[test]
    fn a_tensor_with_nan_is_no_image() {
        let tensor = Tensor::new(&[[[f32::NAN]], [[0.0]], [[0.0]]], &Device::Cpu).unwrap();
        assert!(Image::from_tensor(&tensor).unwrap_err().to_string().contains("not finite"));
        let image = gradient(5, 3);
        assert_eq!(Image::from_tensor(&image.to_tensor(&Device::Cpu).unwrap()).unwrap(), image);
    }
}
