//! Any bytes: the image reader decodes or refuses them within the limits of pixels and memory.
#![no_main]

use difflora::image::Image;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(image) = Image::decode(bytes) {
        assert_eq!(image.rgb.len(), 3 * image.width * image.height);
    }
});
