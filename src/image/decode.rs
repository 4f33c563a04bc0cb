//! Decoding image files, with limits on what a file may ask for.

use std::borrow::Cow;
use std::io::Cursor;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use image::{AnimationDecoder, DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use super::Image;
use crate::failure::Failure;
use crate::files;
use crate::progress;

/// Most megapixels that are decoded; a file that claims more is refused before memory is taken for it.
pub const MAX_MEGAPIXELS: u32 = 200;

static LIMIT: AtomicU32 = AtomicU32::new(MAX_MEGAPIXELS);

/// `--max-megapixels`: another limit than [`MAX_MEGAPIXELS`].
pub fn set_max_megapixels(limit: u32) {
    LIMIT.store(limit, Ordering::SeqCst);
}

fn max_pixels() -> u64 {
    u64::from(LIMIT.load(Ordering::SeqCst)) * 1_000_000
}

/// Largest file that is read as an image, in bytes.
const MAX_BYTES: u64 = 1 << 29;

impl Image {
    /// Reads a PNG, JPEG, WebP, BMP, TIFF or GIF (first frame): EXIF orientation applied, transparency laid over
    /// white, grey and 16-bit pixels turned into 8-bit RGB.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when the file is missing, a folder, no image, truncated or larger than
    /// [`MAX_MEGAPIXELS`].
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = files::read_input(path, MAX_BYTES)?;
        let image = Self::decode(&bytes).map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
        if is_animated(&without_texts(&bytes)) {
            progress::note(format_args!("`{}` is animated: its first frame is taken", path.display()));
        }
        Ok(image)
    }

    /// [`Image::open`] for a file that is in memory.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        ensure!(!bytes.is_empty(), "the file is empty");
        if let Some(kind) = container_of_other_kind(bytes) {
            bail!(
                "it is {kind} image, which difflora does not read; convert it to JPEG or PNG first, for example with \
                 `magick IN OUT.jpg` or, for HEIC, `heif-convert IN OUT.jpg` (iPhones take JPEG with Settings > Camera > \
                 Formats > Most Compatible)"
            );
        }
        let max_pixels = max_pixels();
        let bytes = &*without_texts(bytes);
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
        let format = reader.format().context("it is not a PNG, JPEG, WebP, BMP, TIFF or GIF image")?;
        let mut limits = image::Limits::default();
        // Room for 16-bit RGBA of the largest image.
        limits.max_alloc = Some(max_pixels * 8);
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(damaged)?;
        let (width, height) = decoder.dimensions();
        ensure!(
            u64::from(width) * u64::from(height) <= max_pixels,
            "{width}×{height} pixels are more than the limit of {} megapixels; make it smaller first, or raise --max-megapixels",
            max_pixels / 1_000_000
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
}

/// RGBA bytes over a white ground, rounded to nearest.
fn over_white(rgba: &[u8]) -> Vec<u8> {
    let blend = |colour: u8, alpha: u8| {
        let (colour, alpha) = (u32::from(colour), u32::from(alpha));
        ((colour * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    rgba.chunks_exact(4).flat_map(|p| [blend(p[0], p[3]), blend(p[1], p[3]), blend(p[2], p[3])]).collect()
}

/// A PNG without its colour profile and texts, which decompress to any size and are not used here.
fn without_texts(bytes: &[u8]) -> Cow<'_, [u8]> {
    const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
    let unused = |name: &[u8]| matches!(name, b"iCCP" | b"zTXt" | b"iTXt" | b"tEXt");
    let (mut kept, mut at) = (Vec::new(), SIGNATURE.len());
    if !bytes.starts_with(SIGNATURE) {
        return Cow::Borrowed(bytes);
    }
    let mut from = 0;
    // A chunk: length, name, data, checksum.
    while let Some(head) = bytes.get(at..at + 8) {
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let end = (at + 12).saturating_add(length).min(bytes.len());
        if unused(&head[4..]) {
            kept.extend_from_slice(&bytes[from..at]);
            from = end;
        }
        at = end;
    }
    if from == 0 {
        return Cow::Borrowed(bytes);
    }
    kept.extend_from_slice(&bytes[from..]);
    Cow::Owned(kept)
}

/// Whether the image's own end marker is there, or the trailer that Samsung's phones put in its place: segments are skipped by their length (a thumbnail has an end of
/// its own), the pixel data between them byte by byte (there FF is followed by 00 or a restart marker).
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    if bytes.ends_with(b"SEFT") {
        return true;
    }
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

/// Whether the file holds more than one frame. What cannot be read counts as one: decoding reports the error.
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
///
/// They are refused, not decoded. Of the decoders of HEVC in pure Rust, `heic` is under the AGPL; `heic-rs` 0.1.4 (MIT or
/// Apache-2.0) ignores the range of values in the stream, so that photos with an ICC profile alone, as phones write
/// them, get 9 % too much contrast: a mean error of 9.6 of 255, where libheif has 1.4. AVIF needs a C library or a
/// translation of one (`rav1d`), for photos that few cameras write.
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
            anyhow::anyhow!("it is larger than the limit of {} megapixels", max_pixels() / 1_000_000)
        }
        error => anyhow::anyhow!("it is truncated or damaged ({error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::gradient;
    use super::*;

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
            assert!(error.contains("limit of 200 megapixels"), "{kind}: {error}");
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

    /// CRC-32 as PNG chunks carry it.
    fn crc32(bytes: &[u8]) -> u32 {
        let shift = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
        !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| shift(crc)))
    }

    #[test]
    fn packed_profiles_and_texts_of_a_png_are_not_unpacked() {
        let png = gradient(7, 5).to_png(Some("text")).unwrap();
        let mut bomb = png[..33].to_vec();
        let mut chunk = b"iCCPname\0\0".to_vec();
        chunk.extend([0x78, 0x9C, 0xFF, 0xFF]);
        bomb.extend((chunk.len() as u32 - 4).to_be_bytes());
        bomb.extend(&chunk);
        bomb.extend(crc32(&chunk).to_be_bytes());
        bomb.extend(&png[33..]);
        let stripped = without_texts(&bomb);
        assert!(!stripped.windows(4).any(|name| name == b"iCCP" || name == b"tEXt"));
        assert_eq!(Image::decode(&bomb).unwrap(), gradient(7, 5));
    }

    #[test]
    fn a_trailer_in_place_of_the_end_marker_is_fine() {
        let image = gradient(32, 32);
        let mut jpeg = Vec::new();
        let encoder = image::codecs::jpeg::JpegEncoder::new(&mut jpeg);
        image::ImageEncoder::write_image(encoder, &image.rgb, 32, 32, image::ExtendedColorType::Rgb8)
            .unwrap();
        jpeg.truncate(jpeg.len() - 2);
        jpeg.extend(b"\0\0\x01\x0aImage_UTC_Data SEFH\0\0\0\0SEFT");
        assert!(Image::decode(&jpeg).is_ok());
    }
}
