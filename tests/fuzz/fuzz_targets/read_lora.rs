//! Any bytes: the reader of LoRA files and the key mapper return or refuse; what was read can be written and read
//! again.
#![no_main]

use difflora::lora::file::{self, Format};
use difflora::lora::ldm_keys::BlockLayout;
use difflora::lora::summary::Summary;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let layout = BlockLayout::uniform(2, 2);
    let _ = Summary::read(&mut std::io::Cursor::new(bytes), &layout);
    if let Ok((changes, _)) = file::adapters_from_bytes(bytes, &layout) {
        let written = file::adapters_to_bytes(&changes, Format::KohyaDiffusers, &layout).expect("it is written");
        file::adapters_from_bytes(&written, &layout).expect("it is read again");
    }
});
