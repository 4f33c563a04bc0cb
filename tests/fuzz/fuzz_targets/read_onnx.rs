//! Any bytes: the reader of ONNX headers returns or refuses.
#![no_main]

use difflora::identity::onnx_header::Header;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = Header::parse(bytes);
});
