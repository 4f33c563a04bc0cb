//! Files that are never half-written: beside the target first, then renamed over it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

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

static OVERWRITE: AtomicBool = AtomicBool::new(false);

/// `--overwrite`: images and LoRAs of other programs may be replaced.
pub fn set_overwrite(overwrite: bool) {
    OVERWRITE.store(overwrite, Ordering::SeqCst);
}

/// Refuses an output that is an input of the same command, under whatever name: the same path, a link or a hard link.
///
/// # Errors
/// [`Failure::Usage`] with both names.
pub fn refuse_inputs(outputs: &[&Path], inputs: &[PathBuf]) -> Result<()> {
    let inputs: Vec<(&PathBuf, FileId)> =
        inputs.iter().filter_map(|input| Some((input, file_id(input)?))).collect();
    for output in outputs {
        let Some(id) = file_id(output) else { continue };
        if let Some((input, _)) = inputs.iter().find(|(_, other)| *other == id) {
            let why = match input.as_path() == *output {
                true => "it is an input of this command".to_string(),
                false => format!("it is the same file as the input `{}`", input.display()),
            };
            let output = output.display();
            return Err(
                Failure::Usage(format!("cannot write `{output}`: {why}; choose another output")).into()
            );
        }
    }
    Ok(())
}

/// What makes two names one file: device and inode.
#[cfg(unix)]
type FileId = (u64, u64);
#[cfg(unix)]
fn file_id(path: &Path) -> Option<FileId> {
    use std::os::unix::fs::MetadataExt;
    let data = std::fs::metadata(path).ok()?;
    Some((data.dev(), data.ino()))
}

/// What makes two names one file: the path without links.
#[cfg(not(unix))]
type FileId = PathBuf;
#[cfg(not(unix))]
fn file_id(path: &Path) -> Option<FileId> {
    path.canonicalize().ok()
}

/// Whether an existing image or LoRA was written by this program: its metadata names it.
fn is_own(path: &Path) -> bool {
    /// Metadata stands at the head of a PNG, JPEG or safetensors file, and at the end of a WebP.
    const PART: u64 = 1 << 18;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let mut bytes = Vec::new();
        Read::by_ref(&mut file).take(PART).read_to_end(&mut bytes)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(PART).max(bytes.len() as u64)))?;
        file.take(PART).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let utf16: Vec<u8> = "difflora".encode_utf16().flat_map(u16::to_be_bytes).collect();
    let marks: [&[u8]; 4] = [b"difflora", &utf16, b"\"face_encoder_sha256\"", b"\"image_encoder_sha256\""];
    read().is_ok_and(|bytes| {
        bytes.is_empty() || marks.iter().any(|mark| bytes.windows(mark.len()).any(|part| part == *mark))
    })
}

/// Makes sure before the work begins that `path` can be written at its end, and that no image or LoRA of another
/// program is lost: an existing one is replaced only when its metadata names this program, or with `--overwrite`.
///
/// # Errors
/// [`Failure::Usage`] when it is a folder, when its folder is missing or not writable, or when it would replace the
/// user's own file.
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
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let precious = ["png", "jpg", "jpeg", "webp", "safetensors"].contains(&extension.as_str());
    if precious && path.is_file() && !OVERWRITE.load(Ordering::SeqCst) && !is_own(path) {
        return refuse("it exists and was not written by difflora; give --overwrite to replace it".into());
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

    #[test]
    fn an_output_that_is_an_input_is_refused_under_any_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("me.png"), b"photo").unwrap();
        std::fs::hard_link(at("me.png"), at("hard.png")).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink("me.png", at("link.png")).unwrap();
        let inputs = [at("me.png")];
        for name in [
            "me.png",
            "./me.png",
            "hard.png",
            #[cfg(unix)]
            "link.png",
        ] {
            let error = refuse_inputs(&[&at(name)], &inputs).unwrap_err().to_string();
            assert!(error.contains("input"), "{error}");
        }
        refuse_inputs(&[&at("new.png")], &inputs).unwrap();
    }

    #[test]
    fn only_files_of_this_program_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("photo.jpg"), b"\xFF\xD8 a photo").unwrap();
        std::fs::write(at("own.png"), b"\x89PNG Version: difflora 1").unwrap();
        let error = check_writable(&at("photo.jpg")).unwrap_err().to_string();
        assert!(error.contains("--overwrite"), "{error}");
        check_writable(&at("own.png")).unwrap();
        check_writable(&at("new.png")).unwrap();
    }
}
