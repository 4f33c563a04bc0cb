//! The rule of the house: a module imports only modules below it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Top-level modules from the highest to the lowest; those of one line may import each other in one direction only,
/// which the compiler does not check and [`no_two_modules_import_each_other`] does.
const ORDER: [&[&str]; 9] = [
    &["main", "lib", "cli"],
    &["commands", "diagnostics"],
    &["eval", "personal_lora"],
    &["recipes"],
    &["dataset", "registry"],
    &["sdxl", "hypernet", "lora", "identity", "synthetic"],
    &["train", "weights", "image"],
    &["diffusion", "layers"],
    &["device", "threads", "statistics", "limits", "files", "progress", "failure", "guides", "named"],
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let mut found: Vec<PathBuf> =
        files.into_iter().filter(|path| path.extension() == Some("rs".as_ref())).collect();
    found.extend(
        folders.iter().filter(|folder| !folder.ends_with("assets")).flat_map(|folder| sources(folder)),
    );
    found
}

/// The top-level module of a file, and those that its code names as `crate::…`, with the place; unit tests left out.
fn imports() -> Vec<(String, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for path in sources(&root) {
        let inside = path.strip_prefix(&root).unwrap().with_extension("");
        let module = inside.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            if line.contains("mod tests") {
                break;
            }
            let code = line.split("//").next().unwrap_or_default();
            for part in code.split("crate::").skip(1).filter(|_| !code.contains("$crate::")) {
                let list = part.strip_prefix('{').map_or(part, |list| list.split('}').next().unwrap_or(list));
                let names = if part.starts_with('{') { list.split(',').collect() } else { vec![list] };
                for name in names {
                    let end = |c: char| !c.is_alphanumeric() && c != '_';
                    let used = name.trim().split(end).next().unwrap_or_default().to_string();
                    if !used.is_empty() && used != module {
                        found.push((module.clone(), used, format!("{}:{}", path.display(), number + 1)));
                    }
                }
            }
        }
    }
    found
}

#[test]
fn modules_import_only_what_lies_below_them() {
    let floor = |module: &str| {
        let floor = ORDER.iter().position(|modules| modules.contains(&module));
        floor.unwrap_or_else(|| panic!("`{module}` has no place in ORDER of tests/imports.rs"))
    };
    let upwards: Vec<String> = imports()
        .iter()
        .filter(|(module, used, _)| floor(used) < floor(module))
        .map(|(module, used, place)| format!("{place}: {module} imports {used}"))
        .collect();
    assert!(upwards.is_empty(), "imports upwards:\n{}", upwards.join("\n"));
}

#[test]
fn no_two_modules_import_each_other() {
    let mut uses: BTreeMap<(String, String), String> = BTreeMap::new();
    for (module, used, place) in imports() {
        uses.entry((module, used)).or_insert(place);
    }
    let circles: Vec<String> = uses
        .iter()
        .filter(|((module, used), _)| module < used)
        .filter_map(|((module, used), place)| {
            let back = uses.get(&(used.clone(), module.clone()))?;
            Some(format!("{module} imports {used} ({place}), {used} imports {module} ({back})"))
        })
        .collect();
    assert!(circles.is_empty(), "circles:\n{}", circles.join("\n"));
}
