//! Encoding as PNG, JPEG or WebP, with the generation parameters as text.

use std::path::Path;

use anyhow::Result;
use image::{ExtendedColorType, ImageEncoder};

use super::Image;
use crate::failure::Failure;
use crate::files;

impl Image {
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
    /// Format by the extension of `path`.
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

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{ImageDecoder, ImageReader};

    use super::super::tests::gradient;
    use super::*;

    #[test]
    fn an_image_survives_png() {
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
}
