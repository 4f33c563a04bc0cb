//! Three texts, separated by zero bytes, as `vocab.json`, `merges.txt` and `tokenizer_config.json`: the tokenizer refuses
//! them, or encodes a prompt within its length.
#![no_main]

use difflora::sdxl::tokenizer::ClipTokenizer;
use difflora::weights::model_folder::ModelFiles;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let inside = folder.path().join("tokenizer");
    std::fs::create_dir(&inside).expect("it is made");
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
        std::fs::write(inside.join(name), parts.next().unwrap_or_default()).expect("it is written");
    }
    let files = ModelFiles::folder(folder.path()).expect("the folder is there");
    if let Ok(tokenizer) = ClipTokenizer::new(&files, "tokenizer")
        && let Ok(tokens) = tokenizer.encode("a photo of a person, smiling 🙂")
    {
        assert!(tokens.len() <= tokenizer.max_length());
    }
});
