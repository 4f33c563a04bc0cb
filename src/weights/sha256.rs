//! SHA-256 of files. That of a large file takes seconds, so it is remembered until the file changes.
//!
//! `difflora/hashes.json` in the user's cache directory holds, for each file, its size, when it was changed, and its
//! hash; A1111 does the same (`modules/hashes.py`). It can be deleted at any time.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::failure::Failure;
use crate::files;
use crate::progress;

/// Bytes from which on a hash is worth remembering: a tenth of a second.
const LARGE: u64 = 128 << 20;

/// A file that was changed this recently may change again without its time telling so.
const SETTLED: Duration = Duration::from_secs(2);

/// A hash, in lower-case hexadecimal.
pub fn in_hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 of bytes.
pub fn of_bytes(bytes: &[u8]) -> String {
    in_hex(Sha256::new_with_prefix(bytes))
}

/// SHA-256 of a file.
///
/// # Errors
/// [`Failure::Unusable`] when it cannot be read.
pub fn of_file(path: &Path) -> Result<String> {
    of_files(&[path.to_path_buf()])
}

/// Refuses a downloaded file whose SHA-256 is not that of `model`.
///
/// # Errors
/// [`Failure::Unusable`] with both hashes.
pub fn demand(path: &Path, model: &str, wanted: &str) -> Result<()> {
    let found = of_file(path)?;
    if found == wanted {
        return Ok(());
    }
    let why = format!("its SHA-256 is {found}, that of {model} is {wanted}; delete it and pull again");
    Err(Failure::unusable(path, why))
}

/// SHA-256 of several files one after the other, remembered when they are large.
///
/// # Errors
/// [`Failure::Unusable`] when one cannot be read.
pub fn remembered(paths: &[PathBuf]) -> Result<String> {
    match cache_file() {
        Some(cache) => remembered_in(&cache, paths, LARGE),
        None => of_files(paths),
    }
}

/// Where hashes are remembered; nothing where the user has no cache directory.
pub fn cache_file() -> Option<PathBuf> {
    Some(dirs::cache_dir()?.join("difflora/hashes.json"))
}

fn of_files(paths: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    for path in paths {
        let unusable = |error| Failure::unusable(path, error);
        let mut file = crate::files::open_input(path).map_err(unusable)?;
        loop {
            progress::check()?;
            match file.read(&mut piece).map_err(unusable)? {
                0 => break,
                read => hash.update(&piece[..read]),
            }
        }
    }
    Ok(in_hex(hash))
}

/// Cache entry of a file, or of several that are hashed as one.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    /// Size in bytes and time of change in nanoseconds since 1970, of each.
    stamps: Vec<(u64, u64)>,
    sha256: String,
}

fn remembered_in(cache: &Path, paths: &[PathBuf], large: u64) -> Result<String> {
    let mut stamps = Vec::new();
    let mut settled = true;
    for path in paths {
        let unusable = |error| Failure::unusable(path, error);
        let about = std::fs::metadata(path).map_err(unusable)?;
        let changed = about.modified().map_err(unusable)?;
        settled &= SystemTime::now().duration_since(changed).is_ok_and(|age| age >= SETTLED);
        let since = changed.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        stamps.push((about.len(), since.as_nanos() as u64));
    }
    if stamps.iter().map(|(size, _)| size).sum::<u64>() < large {
        return of_files(paths);
    }
    let key: Vec<String> = paths
        .iter()
        .map(|path| path.canonicalize().map(|path| path.display().to_string()))
        .collect::<Result<_, _>>()
        .context("a path that was just read")?;
    let key = key.join("\n");
    if let Some(known) = read(cache).remove(&key).filter(|known| known.stamps == stamps) {
        return Ok(known.sha256);
    }
    let sha256 = of_files(paths)?;
    if settled {
        let mut all = read(cache); // again: another program may have added to it meanwhile
        all.insert(key, Known { stamps, sha256: sha256.clone() });
        if let Err(error) = write(cache, &all) {
            progress::note(format_args!("hashes cannot be remembered: {error:#}"));
        }
    }
    Ok(sha256)
}

/// The cache entry; none where the cache is missing or damaged, since it can be made again.
fn read(cache: &Path) -> BTreeMap<String, Known> {
    std::fs::read(cache).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn write(cache: &Path, all: &BTreeMap<String, Known>) -> Result<()> {
    let folder = files::folder_of(cache);
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
    files::write_whole(cache, format!("{:#}\n", serde_json::to_value(all)?).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a file that was last changed so many seconds ago.
    fn file(path: &Path, bytes: &[u8], age: u64) {
        std::fs::write(path, bytes).unwrap();
        let changed = SystemTime::now() - Duration::from_secs(age);
        std::fs::File::options().write(true).open(path).unwrap().set_modified(changed).unwrap();
    }

    #[test]
    fn a_hash_is_remembered_until_the_file_changes() {
        let root = tempfile::tempdir().unwrap();
        let (cache, path) = (root.path().join("made/hashes.json"), root.path().join("a"));
        let hash = || remembered_in(&cache, std::slice::from_ref(&path), 1).unwrap();
        file(&path, b"one", 100);
        assert_eq!(hash(), of_bytes(b"one"));
        // What is remembered is believed: the file is not read again.
        let mut all = read(&cache);
        all.values_mut().for_each(|known| known.sha256 = "believed".into());
        write(&cache, &all).unwrap();
        assert_eq!(hash(), "believed");
        file(&path, b"two", 50); // of the same size
        assert_eq!(hash(), of_bytes(b"two"));
        file(&path, b"three", 50);
        assert_eq!(hash(), of_bytes(b"three"));
        std::fs::write(&cache, "{ damaged").unwrap();
        assert_eq!(hash(), of_bytes(b"three"));
        assert_eq!(read(&cache).len(), 1);
    }

    #[test]
    fn small_files_and_files_that_were_just_written_are_not_remembered() {
        let root = tempfile::tempdir().unwrap();
        let (cache, path) = (root.path().join("hashes.json"), root.path().join("a"));
        file(&path, b"one", 100);
        assert_eq!(remembered_in(&cache, std::slice::from_ref(&path), 4).unwrap(), of_bytes(b"one"));
        file(&path, b"one", 0);
        assert_eq!(remembered_in(&cache, std::slice::from_ref(&path), 1).unwrap(), of_bytes(b"one"));
        assert!(!cache.exists());
    }

    #[test]
    fn parts_are_hashed_as_one_file_and_a_missing_one_is_named() {
        let root = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| root.path().join(name));
        file(&paths[0], b"ab", 100);
        file(&paths[1], b"c", 100);
        let cache = root.path().join("hashes.json");
        assert_eq!(remembered_in(&cache, &paths, 1).unwrap(), of_bytes(b"abc"));
        std::fs::remove_file(&paths[1]).unwrap();
        let message = format!("{:#}", remembered_in(&cache, &paths, 1).unwrap_err());
        assert!(message.contains(paths[1].to_str().unwrap()), "{message}");
    }
}
