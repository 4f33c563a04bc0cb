//! Any bytes as `model.safetensors.index.json` of a checkpoint in parts: no part outside the folder is named.
#![no_main]

use difflora::weights::model_folder::ModelFiles;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("model.safetensors.index.json"), bytes).expect("it is written");
    let files = ModelFiles::folder(folder.path()).expect("the folder is there");
    if let Ok((_, parts)) = files.weight_files("", "model") {
        assert!(parts.iter().all(|part| !part.contains("..") || !part.contains('/')), "{parts:?}");
    }
});
