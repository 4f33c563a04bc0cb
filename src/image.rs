//! Images in and out: decoding with limits, upright and over white; resizing as Pillow does; PNG with text.
//!
//! Resizing gives Pillow's numbers bit for bit, because CLIP's and the detector's published pre-processing is
//! defined by it (`src/libImaging/Resample.c`: two passes, each rounded to bytes).

use std::borrow::Cow;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use image::{
    AnimationDecoder, DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, ImageFormat, ImageReader,
};

use crate::failure::Failure;
use crate::files;
use crate::progress;

/// Most pixels that are decoded; a file that claims more is refused before memory is taken for it.
pub const MAX_PIXELS: u64 = 100_000_000;

/// Largest file that is read as an image, in bytes.
const MAX_BYTES: u64 = 1 << 29;

/// Extensions of image files.
const EXTENSIONS: [&str; 8] = ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"];

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

/// How [`Image::resize`] weighs its neighbours; both widen when they shrink an image (antialiasing).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Triangle, Pillow's `BILINEAR`.
    Bilinear,
    /// Keys' cubic with a = −0.5, Pillow's `BICUBIC`.
    Bicubic,
}

impl Image {
    /// Reads a PNG, JPEG, WebP, BMP, TIFF or GIF (first frame): EXIF orientation applied, transparency laid over
    /// white, grey and 16-bit pixels turned into 8-bit RGB.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when the file is missing, a folder, no image, truncated or larger than
    /// [`MAX_PIXELS`].
    pub fn open(path: &Path) -> Result<Self> {
        let data = std::fs::metadata(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Failure::unusable(path, "there is no such file"),
            _ => Failure::unusable(path, error),
        })?;
        if data.is_dir() {
            return Err(Failure::unusable(path, "it is a folder, wanted an image file"));
        }
        if data.len() > MAX_BYTES {
            return Err(Failure::unusable(
                path,
                format!("{} MB are too large for an image", data.len() >> 20),
            ));
        }
        let bytes = std::fs::read(path).map_err(|error| Failure::unusable(path, error))?;
        let image = Self::decode(&bytes).map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
        if is_animated(&bytes) {
            progress::note(format_args!("`{}` is animated: its first frame is taken", path.display()));
        }
        Ok(image)
    }

    /// [`Image::open`] for a file that is in memory.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        ensure!(!bytes.is_empty(), "the file is empty");
        if let Some(kind) = container_of_other_kind(bytes) {
            bail!("it is {kind} image, which is not read here; save it as JPEG, PNG or WebP");
        }
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
        let format = reader.format().context("it is not a PNG, JPEG, WebP, BMP, TIFF or GIF image")?;
        let mut limits = image::Limits::default();
        // Room for 16-bit RGBA of the largest image.
        limits.max_alloc = Some(MAX_PIXELS * 8);
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(damaged)?;
        let (width, height) = decoder.dimensions();
        ensure!(
            u64::from(width) * u64::from(height) <= MAX_PIXELS,
            "{width}×{height} pixels are more than the limit of {} megapixels; make it smaller first",
            MAX_PIXELS / 1_000_000
        );
        ensure!(width > 0 && height > 0, "it has no pixels");
        // The JPEG decoder fills what is missing with grey instead of saying so.
        ensure!(format != image::ImageFormat::Jpeg || jpeg_is_whole(bytes), "it is truncated");
        let orientation = decoder.orientation().map_err(damaged)?;
        let mut decoded = DynamicImage::from_decoder(decoder).map_err(damaged)?;
        decoded.apply_orientation(orientation);
        let (width, height) = (decoded.width() as usize, decoded.height() as usize);
        let rgb = if decoded.color().has_alpha() {
            over_white(decoded.into_rgba8().as_raw())
        } else {
            decoded.into_rgb8().into_raw()
        };
        Ok(Self { width, height, rgb })
    }

    /// An image of one colour.
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Self {
        Self { width, height, rgb: colour.repeat(width * height) }
    }

    /// The image in a tensor of shape (3, height, width) with values in −1…1, as the VAE draws them.
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

    /// The image at another size, equal to Pillow's `resize` bit for bit.
    pub fn resize(&self, width: usize, height: usize, filter: Filter) -> Self {
        assert!(width > 0 && height > 0, "an image has at least one pixel");
        let mut image = Cow::Borrowed(self);
        if width != self.width {
            let taps = taps(self.width, width, filter);
            let mut rgb = vec![0; width * self.height * 3];
            for (row, out) in image.rgb.chunks_exact(self.width * 3).zip(rgb.chunks_exact_mut(width * 3)) {
                for (pixel, (first, weights)) in out.chunks_exact_mut(3).zip(&taps) {
                    let mut sums = [HALF; 3];
                    for (from, weight) in row[first * 3..].chunks_exact(3).zip(weights) {
                        for (sum, &value) in sums.iter_mut().zip(from) {
                            *sum += weight * i32::from(value);
                        }
                    }
                    pixel.copy_from_slice(&sums.map(to_byte));
                }
            }
            image = Cow::Owned(Self { width, height: self.height, rgb });
        }
        if height != self.height {
            let taps = taps(self.height, height, filter);
            let stride = width * 3;
            let mut rgb = vec![0; stride * height];
            let mut sums = vec![0; stride];
            for (out, (first, weights)) in rgb.chunks_exact_mut(stride).zip(&taps) {
                sums.fill(HALF);
                for (row, weight) in image.rgb[first * stride..].chunks_exact(stride).zip(weights) {
                    for (sum, &value) in sums.iter_mut().zip(row) {
                        *sum += weight * i32::from(value);
                    }
                }
                out.iter_mut().zip(&sums).for_each(|(out, &sum)| *out = to_byte(sum));
            }
            image = Cow::Owned(Self { width, height, rgb });
        }
        image.into_owned()
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

    /// The bytes of a PNG file, the same for the same image. `parameters` is the text chunk in which A1111 and
    /// its kin keep prompt and settings: Latin-1 (`tEXt`) where it fits, else UTF-8 (`iTXt`).
    pub fn to_png(&self, parameters: Option<&str>) -> Result<Vec<u8>> {
        let (width, height) = (u32::try_from(self.width)?, u32::try_from(self.height)?);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        if let Some(text) = parameters {
            let latin1 = text.chars().all(|c| u32::from(c) < 256);
            let (keyword, text) = ("parameters".to_string(), text.to_string());
            if latin1 {
                encoder.add_text_chunk(keyword, text)?
            } else {
                encoder.add_itxt_chunk(keyword, text)?
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// The bytes of a file in `format`. `parameters` is the text that A1111 and its relatives read: a text chunk of a
    /// PNG, EXIF's user comment elsewhere. JPEG is written with quality 95, WebP without loss.
    pub fn to_bytes(&self, format: FileFormat, parameters: Option<&str>) -> Result<Vec<u8>> {
        let (width, height) = (u32::try_from(self.width)?, u32::try_from(self.height)?);
        let exif = parameters.map(user_comment);
        let mut bytes = Vec::new();
        match format {
            FileFormat::Png => return self.to_png(parameters),
            FileFormat::Jpeg => {
                let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 95);
                if let Some(exif) = exif {
                    encoder.set_exif_metadata(exif)?;
                }
                encoder.write_image(&self.rgb, width, height, ExtendedColorType::Rgb8)?;
            }
            FileFormat::WebP => {
                let mut encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut bytes);
                if let Some(exif) = exif {
                    encoder.set_exif_metadata(exif)?;
                }
                encoder.write_image(&self.rgb, width, height, ExtendedColorType::Rgb8)?;
            }
        }
        Ok(bytes)
    }

    /// Writes the image as PNG, JPEG or WebP by the extension of `path`, see [`Image::to_bytes`].
    ///
    /// # Errors
    /// [`Failure::Usage`] for another extension.
    pub fn save(&self, path: &Path, parameters: Option<&str>) -> Result<()> {
        files::write_whole(path, &self.to_bytes(FileFormat::of(path)?, parameters)?)
    }
}

/// A kind of image file that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// `.png`
    Png,
    /// `.jpg`, `.jpeg`
    Jpeg,
    /// `.webp`
    WebP,
}

impl FileFormat {
    /// What the extension of `path` stands for.
    ///
    /// # Errors
    /// [`Failure::Usage`] when it is none of these.
    pub fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        match extension.as_str() {
            "png" => Ok(Self::Png),
            "jpg" | "jpeg" => Ok(Self::Jpeg),
            "webp" => Ok(Self::WebP),
            _ => Err(Failure::Usage(format!(
                "images are written as PNG, JPEG or WebP: name `{}` with .png, .jpg or .webp, or give a folder",
                path.display()
            ))
            .into()),
        }
    }
}

/// EXIF data whose only entry is the user comment `text`, as A1111 writes it: `UNICODE` and big-endian UTF-16.
fn user_comment(text: &str) -> Vec<u8> {
    let mut comment = b"UNICODE\0".to_vec();
    comment.extend(text.encode_utf16().flat_map(u16::to_be_bytes));
    // A big-endian TIFF of two directories with one entry each: tag, type, count, value or where it lies.
    let entry = |tag: u16, kind: u16, count: u32, value: u32| {
        let mut bytes = 1u16.to_be_bytes().to_vec();
        bytes.extend([tag, kind].iter().flat_map(|x| x.to_be_bytes()));
        bytes.extend([count, value, 0].iter().flat_map(|x| x.to_be_bytes()));
        bytes
    };
    const HEADER: u32 = 8;
    const DIRECTORY: u32 = 18;
    let mut exif = b"MM\0\x2a\0\0\0\x08".to_vec();
    exif.extend(entry(0x8769, 4, 1, HEADER + DIRECTORY));
    exif.extend(entry(0x9286, 7, comment.len() as u32, HEADER + 2 * DIRECTORY));
    exif.extend(comment);
    exif
}

/// The image files in a folder and in the folders inside it, by their extension and sorted by path; what is hidden
/// is left out.
pub fn images_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = files_in(folder)?;
    files.retain(|path| has_image_name(path));
    Ok(files)
}

/// All files in a folder and in the folders inside it, sorted by path; what is hidden is left out.
pub fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = std::fs::read_dir(folder).map_err(|error| Failure::unusable(folder, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Failure::unusable(folder, error))?;
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if path.is_dir() {
            // A link to a folder may lead in a circle.
            if !path.is_symlink() {
                found.extend(files_in(&path)?);
            }
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a file is an image by its extension.
pub fn has_image_name(path: &Path) -> bool {
    path.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e.eq_ignore_ascii_case(known)))
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

/// Fixed-point bits of Pillow's weights: 32 − 8 for the byte − 2 for headroom.
const WEIGHT_BITS: u32 = 22;

/// For each output pixel the first input pixel that it reads and the weights from there on (`precompute_coeffs`).
fn taps(from: usize, to: usize, filter: Filter) -> Vec<(usize, Vec<i32>)> {
    let scale = from as f64 / to as f64;
    let spread = scale.max(1.0);
    let support = spread * if filter == Filter::Bicubic { 2.0 } else { 1.0 };
    (0..to)
        .map(|out| {
            let centre = (out as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let mut weights: Vec<f64> =
                (first..end).map(|at| kernel((at as f64 - centre + 0.5) * (1.0 / spread), filter)).collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            let one = f64::from(1 << WEIGHT_BITS);
            // Rounds half away from zero, as the C code does by adding ±0.5 and cutting.
            let fixed =
                weights.iter().map(|weight| (weight * one + 0.5f64.copysign(*weight)) as i32).collect();
            (first, fixed)
        })
        .collect()
}

fn kernel(x: f64, filter: Filter) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    match filter {
        Filter::Bilinear if x < 1.0 => 1.0 - x,
        Filter::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
        _ => 0.0,
    }
}

/// A half in fixed point, so that [`to_byte`] rounds.
const HALF: i32 = 1 << (WEIGHT_BITS - 1);

fn to_byte(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// RGBA bytes over a white ground, rounded to nearest.
fn over_white(rgba: &[u8]) -> Vec<u8> {
    let blend = |colour: u8, alpha: u8| {
        let (colour, alpha) = (u32::from(colour), u32::from(alpha));
        ((colour * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    rgba.chunks_exact(4).flat_map(|p| [blend(p[0], p[3]), blend(p[1], p[3]), blend(p[2], p[3])]).collect()
}

/// Whether the image's own end marker is there: segments are skipped by their length (a thumbnail has an end of
/// its own), the pixel data between them byte by byte (there FF is followed by 00 or a restart marker).
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[mark, kind]) = bytes.get(at..at + 2) {
        at += match (mark, kind) {
            (0xFF, 0xD9) => return true,
            (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => 2,
            (0xFF, 0xFF) => 1,
            (0xFF, _) => match bytes.get(at + 2..at + 4) {
                Some(&[high, low]) => 2 + usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
            _ => 1,
        };
    }
    false
}

/// Whether the file holds more than one frame. What cannot be read counts as one: decoding has told what is wrong.
fn is_animated(bytes: &[u8]) -> bool {
    let file = || Cursor::new(bytes);
    match image::guess_format(bytes) {
        Ok(ImageFormat::Gif) => image::codecs::gif::GifDecoder::new(file())
            .is_ok_and(|gif| gif.into_frames().take(2).filter(Result::is_ok).count() == 2),
        Ok(ImageFormat::WebP) => {
            image::codecs::webp::WebPDecoder::new(file()).is_ok_and(|webp| webp.has_animation())
        }
        Ok(ImageFormat::Png) => {
            image::codecs::png::PngDecoder::new(file()).and_then(|png| png.is_apng()).unwrap_or(false)
        }
        _ => false,
    }
}

/// `an AVIF`, `a HEIC` or `a JPEG XL` for files that start as those do (ISO/IEC 14496-12, the brands of the `ftyp`
/// box; ISO/IEC 18181-2).
fn container_of_other_kind(bytes: &[u8]) -> Option<&'static str> {
    let brands = match bytes.get(4..12) {
        Some(start) if start.starts_with(b"ftyp") => bytes.get(8..bytes.len().min(40))?,
        Some(start) if start.starts_with(b"JXL ") => return Some("a JPEG XL"),
        _ => return bytes.starts_with(&[0xFF, 0x0A]).then_some("a JPEG XL"),
    };
    let has = |wanted: &[&[u8]]| brands.chunks_exact(4).any(|brand| wanted.contains(&brand));
    if has(&[b"avif", b"avis"]) {
        Some("an AVIF")
    } else if has(&[b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"]) {
        Some("a HEIC")
    } else {
        None
    }
}

fn damaged(error: image::ImageError) -> anyhow::Error {
    match error {
        image::ImageError::Unsupported(what) => anyhow::anyhow!("{what}"),
        image::ImageError::Limits(_) => {
            anyhow::anyhow!("it is larger than the limit of {} megapixels", MAX_PIXELS / 1_000_000)
        }
        error => anyhow::anyhow!("it is truncated or damaged ({error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small image without symmetry.
    fn gradient(width: usize, height: usize) -> Image {
        let rgb = (0..width * height * 3).map(|at| (at * 37 % 251) as u8).collect();
        Image { width, height, rgb }
    }

    #[test]
    fn a_image_survives_png() {
        let image = gradient(7, 5);
        assert_eq!(Image::decode(&image.to_png(None).unwrap()).unwrap(), image);
    }

    #[test]
    fn png_text_is_latin1_where_it_fits_and_utf8_elsewhere() {
        let text_of = |text: &str| {
            let bytes = gradient(2, 2).to_png(Some(text)).unwrap();
            let reader = png::Decoder::new(Cursor::new(bytes)).read_info().unwrap();
            let info = reader.info().clone();
            let latin1 = info.uncompressed_latin1_text.first().map(|chunk| chunk.text.clone());
            let utf8 = info.utf8_text.first().map(|chunk| chunk.get_text().unwrap());
            (latin1, utf8)
        };
        assert_eq!(text_of("café, Steps: 3"), (Some("café, Steps: 3".to_string()), None));
        assert_eq!(text_of("写真"), (None, Some("写真".to_string())));
    }

    #[test]
    fn every_format_carries_its_text() {
        let image = gradient(16, 8);
        for (format, loss) in [(FileFormat::Png, 0), (FileFormat::WebP, 0), (FileFormat::Jpeg, 255)] {
            let text = "naïve 写真, Steps: 3";
            let bytes = image.to_bytes(format, Some(text)).unwrap();
            let again = Image::decode(&bytes).unwrap();
            let apart = again.rgb.iter().zip(&image.rgb).map(|(a, b)| a.abs_diff(*b)).max();
            assert!((again.width, again.height) == (16, 8) && apart.unwrap() <= loss, "{format:?}");
            if format != FileFormat::Png {
                let mut decoder = ImageReader::new(Cursor::new(&bytes))
                    .with_guessed_format()
                    .unwrap()
                    .into_decoder()
                    .unwrap();
                let exif = decoder.exif_metadata().unwrap().unwrap();
                let at = exif.windows(8).position(|part| part == b"UNICODE\0").unwrap() + 8;
                let units: Vec<u16> =
                    exif[at..].chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
                assert_eq!(String::from_utf16(&units).unwrap(), text, "{format:?}");
            }
            assert!(image.to_bytes(format, None).unwrap().len() < bytes.len());
        }
        assert!(FileFormat::of(Path::new("a.gif")).is_err() && FileFormat::of(Path::new("a")).is_err());
    }

    #[test]
    fn grey_alpha_and_16_bit_become_rgb() {
        let png = |colour, depth, data: &[u8]| {
            let mut bytes = Vec::new();
            let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
            encoder.set_color(colour);
            encoder.set_depth(depth);
            encoder.write_header().unwrap().write_image_data(data).unwrap();
            Image::decode(&bytes).unwrap().rgb
        };
        use png::{BitDepth::*, ColorType::*};
        assert_eq!(png(Grayscale, Eight, &[77]), [77, 77, 77]);
        assert_eq!(png(Grayscale, Sixteen, &[128, 0]), [128, 128, 128]);
        assert_eq!(png(Rgb, Sixteen, &[255, 255, 0, 0, 64, 0]), [255, 0, 64]);
        assert_eq!(png(Rgba, Eight, &[0, 100, 200, 0]), [255, 255, 255]);
        assert_eq!(png(Rgba, Eight, &[0, 100, 200, 51]), [204, 224, 244]);
        assert_eq!(png(GrayscaleAlpha, Eight, &[10, 255]), [10, 10, 10]);
    }

    #[test]
    fn exif_orientation_turns_the_image_upright() {
        let mut jpeg = Vec::new();
        let wide = gradient(16, 8);
        let mut encoder = image::codecs::jpeg::JpegEncoder::new(&mut jpeg);
        let mut exif = b"II*\0\x08\0\0\0\x01\0".to_vec();
        // Tag 0x0112 (orientation), one short, 6: turn by 90 degrees clockwise.
        exif.extend([0x12, 0x01, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
        image::ImageEncoder::set_exif_metadata(&mut encoder, exif).unwrap();
        encoder.encode(&wide.rgb, 16, 8, image::ExtendedColorType::Rgb8).unwrap();
        let upright = Image::decode(&jpeg).unwrap();
        assert_eq!((upright.width, upright.height), (8, 16));
    }

    /// A small image in every kind of file that is read.
    fn every_kind(image: &Image) -> Vec<(&'static str, Vec<u8>)> {
        let (width, height) = (image.width as u32, image.height as u32);
        let rgb = image::RgbImage::from_raw(width, height, image.rgb.clone()).unwrap();
        let formats = [
            ("PNG", ImageFormat::Png),
            ("JPEG", ImageFormat::Jpeg),
            ("WebP", ImageFormat::WebP),
            ("BMP", ImageFormat::Bmp),
            ("TIFF", ImageFormat::Tiff),
            ("GIF", ImageFormat::Gif),
        ];
        let encode = |format| {
            let mut bytes = Cursor::new(Vec::new());
            DynamicImage::ImageRgb8(rgb.clone()).write_to(&mut bytes, format).unwrap();
            bytes.into_inner()
        };
        let mut files: Vec<_> = formats.into_iter().map(|(name, format)| (name, encode(format))).collect();
        // `image` writes WebP without loss only; this one is lossy.
        files.push(("lossy WebP", std::fs::read("tests/data/odd/lossy.webp").unwrap()));
        files
    }

    #[test]
    fn one_pixel_is_a_image_in_every_kind_of_file() {
        for (kind, bytes) in every_kind(&Image::filled(1, 1, [200; 3])).into_iter().take(6) {
            let image = Image::decode(&bytes).unwrap_or_else(|error| panic!("{kind}: {error:#}"));
            assert_eq!((image.width, image.height), (1, 1), "{kind}");
            assert!(image.rgb.iter().all(|value| value.abs_diff(200) < 4), "{kind}: {:?}", image.rgb);
        }
    }

    #[test]
    fn a_header_that_claims_too_many_pixels_is_refused_before_decoding() {
        for (kind, mut bytes) in every_kind(&gradient(16, 8)) {
            let at = |pattern: &[u8]| bytes.windows(pattern.len()).position(|part| part == pattern).unwrap();
            match kind {
                // Width and height stand behind the signature and the chunk's length and name.
                "PNG" => {
                    bytes[16..20].copy_from_slice(&30_000u32.to_be_bytes());
                    bytes[20..24].copy_from_slice(&30_000u32.to_be_bytes());
                    let crc = crc32(&bytes[12..29]);
                    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
                }
                // Start of frame: marker, length, 8 bits, height, width.
                "JPEG" => {
                    let at = at(&[0xFF, 0xC0, 0, 17, 8]) + 5;
                    bytes[at..at + 4].copy_from_slice(&[0x75, 0x30, 0x75, 0x30]);
                }
                // 14 bits each, less one, behind the chunk's header and a signature byte: 16,383².
                "WebP" => {
                    let at = at(b"VP8L") + 9;
                    bytes[at..at + 4].copy_from_slice(&[0xFE, 0xBF, 0xFF, 0x0F]);
                }
                // 14 bits each behind the chunk's header, the frame tag and the start code: 16,383².
                "lossy WebP" => {
                    let at = at(&[0x9D, 0x01, 0x2A]) + 3;
                    bytes[at..at + 4].copy_from_slice(&[0xFF, 0x3F, 0xFF, 0x3F]);
                }
                "BMP" => {
                    bytes[18..22].copy_from_slice(&30_000u32.to_le_bytes());
                    bytes[22..26].copy_from_slice(&30_000u32.to_le_bytes());
                }
                // Entries of the directory (width, height, rows in a strip): tag, type (short or long), count, value.
                "TIFF" => {
                    for tag in [256u16, 257, 278] {
                        let [low, high] = tag.to_le_bytes();
                        let long = [low, high, 4, 0, 1, 0, 0, 0];
                        let short = [low, high, 3, 0, 1, 0, 0, 0];
                        let found = |entry: &[u8]| bytes.windows(8).position(|part| part == entry);
                        let at = found(&long).or(found(&short)).unwrap() + 8;
                        bytes[at..at + 4].copy_from_slice(&30_000u32.to_le_bytes());
                    }
                }
                "GIF" => bytes[6..10].copy_from_slice(&[0x30, 0x75, 0x30, 0x75]),
                _ => unreachable!("every kind has its place for the size"),
            }
            let error = Image::decode(&bytes).unwrap_err().to_string();
            assert!(error.contains("limit of 100 megapixels"), "{kind}: {error}");
        }
    }

    #[test]
    fn a_truncated_file_is_said_to_be_truncated() {
        for (kind, whole) in every_kind(&gradient(64, 64)) {
            assert!(Image::decode(&whole).is_ok(), "{kind}");
            for part in [3, 12, 40, whole.len() / 2, whole.len() * 9 / 10] {
                let cut = Image::decode(&whole[..part.min(whole.len() - 1)]);
                let error = format!("{:#}", cut.expect_err(&format!("{kind}, {part} bytes")));
                let said = ["truncated", "not a PNG"].iter().any(|said| error.contains(said));
                assert!(said, "{kind}, {part} bytes: {error}");
            }
        }
    }

    #[test]
    fn what_a_file_is_counts_and_not_how_it_is_called() {
        let folder = tempfile::tempdir().unwrap();
        let mislabelled = folder.path().join("really-a-png.jpg");
        std::fs::write(&mislabelled, gradient(7, 5).to_png(None).unwrap()).unwrap();
        assert_eq!(Image::open(&mislabelled).unwrap(), gradient(7, 5));
    }

    #[test]
    fn a_jpeg_may_carry_other_data_behind_its_end() {
        let image = gradient(32, 32);
        let mut jpeg = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new(&mut jpeg);
        image::ImageEncoder::write_image(encoder, &image.rgb, 32, 32, image::ExtendedColorType::Rgb8)
            .unwrap();
        jpeg.extend([0, 1, 0xFF, 0xDA, 2, 3]);
        assert!(Image::decode(&jpeg).is_ok());
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
    fn what_is_no_image_file_is_unusable() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text.png");
        std::fs::write(&text, "hello, this is text").unwrap();
        for (path, why) in [
            (folder.path().to_path_buf(), "folder"),
            (folder.path().join("missing.png"), "no such file"),
            (text, "not a PNG"),
        ] {
            let error = Image::open(&path).unwrap_err();
            assert!(
                matches!(error.downcast_ref(), Some(Failure::Unusable(text)) if text.contains(why)),
                "{error}"
            );
        }
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

    /// CRC-32 as PNG chunks carry it.
    fn crc32(bytes: &[u8]) -> u32 {
        let shift = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
        !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| shift(crc)))
    }
}
