//! LoRAs by name, as prompts call them: `<lora:NAME:WEIGHT>`.

use std::path::{Path, PathBuf};

/// Folders below the given one that are looked through.
const DEPTH: usize = 8;

/// The LoRA `name` in a folder: `NAME.safetensors`, or a PEFT folder `NAME`. With `deep` folders inside it are looked
/// through as well, up to eight levels.
pub fn find(name: &str, folder: &Path, deep: bool) -> Option<PathBuf> {
    let mut folders = vec![(folder.to_path_buf(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        if let Some(file) = paths.iter().find(|path| is_named(path, name)) {
            return Some(file.clone());
        }
        if deep && depth < DEPTH {
            folders
                .extend(paths.into_iter().rev().filter(|path| path.is_dir()).map(|path| (path, depth + 1)));
        }
    }
    None
}

/// Whether a file is `NAME.safetensors`, or a folder is `NAME` and holds an adapter.
pub fn is_named(path: &Path, name: &str) -> bool {
    let is_file = path.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("safetensors"));
    if is_file {
        return path.file_stem().is_some_and(|stem| stem == name) && path.is_file();
    }
    path.file_name().is_some_and(|last| last == name) && path.join("adapter_config.json").is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loras_are_found_by_name_as_files_and_as_peft_folders() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for file in ["b/me.safetensors", "a/peft/adapter_config.json", "me.txt"] {
            std::fs::create_dir_all(at(file).parent().unwrap()).unwrap();
            std::fs::write(at(file), "x").unwrap();
        }
        assert_eq!(find("me", root.path(), true), Some(at("b/me.safetensors")));
        assert_eq!(find("peft", root.path(), true), Some(at("a/peft")));
        assert_eq!(find("me", root.path(), false), None);
        assert_eq!(find("a", root.path(), true), None);
        assert_eq!(find("me", &at("missing"), true), None);
    }
}
