//! Files that are never half-written: beside the target first, then renamed over it.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use crate::failure::Failure;

/// Writes `bytes` to `path`, through a temporary file in the same folder that is renamed at the end.
///
/// A reader sees the old file or the new one, never a part.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| Ok(file.write_all(bytes)?))
}

/// The same for a file that is not in memory: `fill` writes it piece by piece. When it fails there is no file.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    write_beside(path, |beside| fill(beside.as_file_mut()))
}

/// The same where the temporary file is opened, or replaced, by its name.
pub fn write_at(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    write_beside(path, |beside| fill(beside.path()))
}

fn write_beside(path: &Path, fill: impl FnOnce(&mut NamedTempFile) -> Result<()>) -> Result<()> {
    let write = || -> Result<()> {
        let mut beside = tempfile::Builder::new().prefix(".difflora-").tempfile_in(folder_of(path))?;
        fill(&mut beside)?;
        // By its name, under which `fill` may have put another file.
        File::options().write(true).open(beside.path())?.sync_all()?;
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Temporary files are private; a result is as readable as any other new file.
            std::fs::set_permissions(beside.path(), std::fs::Permissions::from_mode(0o644))?;
        }
        beside.persist(path).map_err(|failed| failed.error)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write `{}`", path.display()))
}

/// Makes sure before the work begins that `path` can be written at its end.
///
/// # Errors
/// [`Failure::Usage`] when it is a folder, or when its folder is missing or not writable.
pub fn check_writable(path: &Path) -> Result<()> {
    let refuse =
        |why: String| Err(Failure::Usage(format!("cannot write `{}`: {why}", path.display())).into());
    let folder = folder_of(path);
    if path.is_dir() {
        return refuse("it is a folder".into());
    }
    if !folder.is_dir() {
        return refuse(format!("there is no folder `{}`; make it first", folder.display()));
    }
    match tempfile::Builder::new().prefix(".difflora-").tempfile_in(folder) {
        Ok(_) => Ok(()),
        Err(error) => refuse(error.to_string()),
    }
}

/// The folder that holds `path`; `.` for a bare file name.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use super::*;

    #[test]
    fn a_full_disk_leaves_the_old_file_whole_and_nothing_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        write_whole(&path, b"old").unwrap();
        let full = write_with(&path, |file| {
            file.write_all(b"half of the n")?;
            Err(Error::new(ErrorKind::StorageFull, "no space left on device").into())
        });
        let error = format!("{:#}", full.unwrap_err());
        assert!(error.contains("state") && error.contains("no space left"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
