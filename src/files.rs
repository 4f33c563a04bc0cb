//! Files that are never half-written: beside the target first, then renamed over it.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result};
use tempfile::{NamedTempFile, TempDir};

use crate::failure::Failure;

/// Writes `bytes` to `path`, through a temporary file in the same folder that is renamed at the end.
///
/// A reader sees the old file or the new one, never a part.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| Ok(file.write_all(bytes)?))
}

/// The same where no file of other contents may be replaced: an older run may have left this one.
///
/// # Errors
/// [`Failure::Usage`] for a file of other contents, without `--overwrite`.
pub fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let is_other = std::fs::metadata(path).is_ok_and(|data| data.is_file() && data.len() > 0)
        && !std::fs::read(path).is_ok_and(|before| before == bytes);
    if is_other && !may_overwrite() {
        let why =
            "it exists and is not what this command wrote before; choose another --out, or give --overwrite";
        return Err(Failure::Usage(format!("cannot write `{}`: {why}", path.display())).into());
    }
    write_whole(path, bytes)
}

/// The same for a file that is not in memory: `fill` writes it piece by piece. When it fails there is no file.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    write_beside(path, |beside| fill(beside.as_file_mut()))
}

/// The same where `fill` makes the file by its name; in a folder of its own, since it may open temporary files of its own
/// beside that name.
pub fn write_at(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    write_beside(path, |beside| {
        let folder = temporary_folder(beside.path())?;
        let file = folder.path().join("file");
        fill(&file)?;
        Ok(std::fs::rename(file, beside.path())?)
    })
}

fn write_beside(path: &Path, fill: impl FnOnce(&mut NamedTempFile) -> Result<()>) -> Result<()> {
    let write = || -> Result<()> {
        // The target of a link is written; the link stays.
        let target = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let before = std::fs::metadata(&target).ok();
        if before.as_ref().is_some_and(|before| !before.is_file() && !before.is_dir()) {
            // Devices and pipes are written through, and never replaced.
            let mut whole = temporary().tempfile()?;
            fill(&mut whole)?;
            let mut device = File::options().write(true).open(&target)?;
            std::io::copy(&mut File::open(whole.path())?, &mut device)?;
            return Ok(());
        }
        let mut beside = temporary_file(&target)?;
        let permissions = match before {
            Some(before) => before.permissions(),
            None => beside.as_file().metadata()?.permissions(),
        };
        fill(&mut beside)?;
        // By its name, under which `fill` may have put another file.
        File::options().write(true).open(beside.path())?.sync_all()?;
        std::fs::set_permissions(beside.path(), permissions)?;
        beside.persist(&target).map_err(|failed| failed.error)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write `{}`", path.display()))
}

/// A temporary file beside `path`. Those that killed processes left there are removed.
pub fn temporary_file(path: &Path) -> std::io::Result<NamedTempFile> {
    let folder = folder_of(path);
    remove_leftovers(folder);
    temporary().tempfile_in(folder)
}

/// A temporary folder beside `path`. Those that killed processes left there are removed.
pub fn temporary_folder(path: &Path) -> std::io::Result<TempDir> {
    let folder = folder_of(path);
    remove_leftovers(folder);
    tempfile::Builder::new().prefix(&temporary_prefix()).tempdir_in(folder)
}

/// Names of temporary files begin with the machine and the process that writes them.
fn temporary_prefix() -> String {
    format!(".difflora-{}-{}-", machine(), std::process::id())
}

/// A temporary file with the permissions of any other new file.
fn temporary() -> tempfile::Builder<'static, 'static> {
    static PREFIX: OnceLock<String> = OnceLock::new();
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX.get_or_init(temporary_prefix).as_str());
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The umask is subtracted.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder
}

/// The machine's name, in letters and digits.
fn machine() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
    if name.is_empty() { "host".into() } else { name }
}

/// Removes temporary files that killed processes of this machine left in `folder`; once a folder and process.
fn remove_leftovers(folder: &Path) {
    static SEEN: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    let first = SEEN.lock().is_ok_and(|mut seen| seen.insert(folder.to_path_buf()));
    // Only Linux tells here which processes are alive.
    if !first || !Path::new("/proc/self").exists() {
        return;
    }
    let prefix = format!(".difflora-{}-", machine());
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process =
            name.to_str().and_then(|name| name.strip_prefix(&prefix)?.split('-').next()?.parse::<u32>().ok());
        if process.is_some_and(|process| !is_running(process)) {
            let path = entry.path();
            let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        }
    }
}

/// Whether a process exists and has not ended: in a container whose first process waits for no other, killed ones stay
/// in the list as zombies.
fn is_running(process: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{process}/stat")) else {
        return Path::new(&format!("/proc/{process}")).exists();
    };
    // `PID (NAME) STATE …`, and a name may hold brackets.
    !matches!(stat.rsplit(") ").next().and_then(|rest| rest.chars().next()), Some('Z' | 'X'))
}

/// Opens an input file; a pipe or a device is an error, since opening it might wait for what is never written.
///
/// # Errors
/// As [`File::open`].
pub fn open_input(path: &Path) -> std::io::Result<File> {
    let data = std::fs::metadata(path)?;
    if !data.is_file() && !data.is_dir() {
        return Err(std::io::Error::other("it is a device or a pipe, wanted a file"));
    }
    File::open(path)
}

/// Reads an input file whole.
///
/// # Errors
/// [`Failure::Unusable`] when it is missing, a folder, a device or a pipe, or larger than `most` bytes.
pub fn read_input(path: &Path, most: u64) -> Result<Vec<u8>> {
    let data = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Failure::unusable(path, "there is no such file"),
        _ => Failure::unusable(path, error),
    })?;
    if data.is_dir() {
        return Err(Failure::unusable(path, "it is a folder, wanted a file"));
    }
    if !data.is_file() {
        return Err(Failure::unusable(path, "it is a device or a pipe, wanted a file"));
    }
    if data.len() > most {
        let why = format!("it has {} bytes, more than the limit of {most}", data.len());
        return Err(Failure::unusable(path, why));
    }
    std::fs::read(path).map_err(|error| Failure::unusable(path, error))
}

/// Reads an input file of UTF-8 text whole; see [`read_input`].
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read_input(path, most)?).map_err(|error| Failure::unusable(path, error.utf8_error()))
}

static OVERWRITE: AtomicBool = AtomicBool::new(false);

/// `--overwrite`: images and LoRAs of other programs may be replaced.
pub fn set_overwrite(overwrite: bool) {
    OVERWRITE.store(overwrite, Ordering::SeqCst);
}

/// Whether files of other programs may be replaced.
pub fn may_overwrite() -> bool {
    OVERWRITE.load(Ordering::SeqCst)
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

/// Identity of a file: device and inode.
#[cfg(unix)]
type FileId = (u64, u64);
#[cfg(unix)]
fn file_id(path: &Path) -> Option<FileId> {
    use std::os::unix::fs::MetadataExt;
    let data = std::fs::metadata(path).ok()?;
    Some((data.dev(), data.ino()))
}

/// Identity of a file: the path without links.
#[cfg(not(unix))]
type FileId = PathBuf;
#[cfg(not(unix))]
fn file_id(path: &Path) -> Option<FileId> {
    path.canonicalize().ok()
}

/// What the parameters of every image of this program end with; [`is_generated`] looks for it.
pub fn version_mark() -> String {
    format!("Version: difflora {}", env!("CARGO_PKG_VERSION"))
}

/// Whether an image was generated by this program, by its generation parameters.
pub fn is_generated(path: &Path) -> bool {
    contains(path, &["Version: difflora"])
}

/// Whether an existing image or LoRA was written by this program: its metadata names it.
fn is_own(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.len() == 0)
        || contains(path, &["difflora", "\"face_encoder_sha256\"", "\"image_encoder_sha256\""])
}

/// Whether a file's metadata contain one of `marks`, in ASCII or, as in EXIF, big-endian UTF-16.
fn contains(path: &Path, marks: &[&str]) -> bool {
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
    let has = |bytes: &[u8], mark: &[u8]| bytes.windows(mark.len()).any(|part| part == mark);
    path.is_file()
        && read().is_ok_and(|bytes| {
            marks.iter().any(|mark| {
                let utf16: Vec<u8> = mark.encode_utf16().flat_map(u16::to_be_bytes).collect();
                has(&bytes, mark.as_bytes()) || has(&bytes, &utf16)
            })
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
    if precious && path.is_file() && !may_overwrite() && !is_own(path) {
        return refuse("it exists and was not written by difflora; give --overwrite to replace it".into());
    }
    if path.exists() && !path.is_file() {
        // A device or a pipe; opening a pipe would wait for its reader.
        return Ok(());
    }
    match temporary().tempfile_in(folder) {
        Ok(_) => Ok(()),
        Err(error) => refuse(error.to_string()),
    }
}

/// An exclusive lock on a folder: the file `.lock` in it, which holds the process id.
///
/// It does not outlive its process, however that ends: a file that a killed process left is not locked.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    _file: File,
}

impl FolderLock {
    /// Refuses a folder that another process has locked; it is not locked here.
    ///
    /// # Errors
    /// [`Failure::Usage`] with the process id.
    pub fn require_free(folder: &Path) -> Result<()> {
        let path = folder.join(".lock");
        match File::open(&path).map(|file| file.try_lock_shared()) {
            Ok(Err(TryLockError::WouldBlock)) => Err(taken(folder, &path)),
            _ => Ok(()),
        }
    }

    /// Locks the folder, which is made if it is missing.
    ///
    /// # Errors
    /// [`Failure::Usage`] with the process id when another process holds it.
    pub fn acquire(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
        let path = folder.join(".lock");
        let cannot = || format!("cannot lock `{}`", path.display());
        loop {
            let options = File::options().create(true).read(true).write(true).truncate(false).clone();
            let mut file = options.open(&path).with_context(cannot)?;
            match file.try_lock() {
                // The process that held it may have removed it since it was opened here.
                Ok(()) if !is_same_file(&file, &path) => continue,
                // A full disk is no reason to refuse: the id only makes the message of another process better.
                Ok(()) => drop(file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()))),
                Err(TryLockError::WouldBlock) => return Err(taken(folder, &path)),
                // Some network file systems have no locks.
                Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {}
                Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
            }
            return Ok(Self { path, _file: file });
        }
    }
}

/// The error for a `folder` that the process in the file `lock` holds.
fn taken(folder: &Path, lock: &Path) -> anyhow::Error {
    let owner = std::fs::read_to_string(lock).unwrap_or_default();
    let owner = match owner.trim() {
        "" => "another process".to_string(),
        id => format!("process {id}"),
    };
    let folder = folder.display();
    Failure::Usage(format!("cannot use `{folder}`: {owner} is writing to it; wait, or choose another --out"))
        .into()
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Before the lock is released, so that no other process's file is removed.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether `path` still names the open `file`.
#[cfg(unix)]
fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    file.metadata().is_ok_and(|data| file_id(path) == Some((data.dev(), data.ino())))
}
#[cfg(not(unix))]
fn is_same_file(_: &File, path: &Path) -> bool {
    path.exists()
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
    fn a_folder_is_locked_until_the_lock_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("new");
        let held = FolderLock::acquire(&inside).unwrap();
        let error = FolderLock::acquire(&inside).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(held);
        assert!(!inside.join(".lock").exists());
        FolderLock::acquire(&inside).unwrap();
    }

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

    #[cfg(unix)]
    #[test]
    fn links_pipes_and_permissions_are_kept() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        write_whole(&at("secret"), b"old").unwrap();
        std::fs::set_permissions(at("secret"), std::fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink("secret", at("link")).unwrap();
        write_whole(&at("link"), b"new").unwrap();
        assert_eq!(std::fs::read(at("secret")).unwrap(), b"new");
        assert!(at("link").is_symlink());
        assert_eq!(std::fs::metadata(at("secret")).unwrap().permissions().mode() & 0o777, 0o600);
        write_whole(Path::new("/dev/null"), b"nothing").unwrap();
        assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
        assert!(read_input(Path::new("/dev/zero"), 9).unwrap_err().to_string().contains("device"));
    }

    #[cfg(target_os = "linux")]
    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_that_has_ended_but_was_not_waited_for_is_not_running() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let begun = std::time::Instant::now();
        while is_running(child.id()) {
            assert!(begun.elapsed().as_secs() < 10, "`true` does not end");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(Path::new(&format!("/proc/{}", child.id())).exists(), "it is a zombie");
        child.wait().unwrap();
        assert!(is_running(std::process::id()) && !is_running(child.id()));
    }

    #[test]
    fn temporary_files_of_killed_processes_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let of = |process: u32| folder.path().join(format!(".difflora-{}-{process}-x", machine()));
        // Above Linux' largest process id.
        let (dead, alive) = (of(4_194_305), of(std::process::id()));
        std::fs::write(&dead, b"").unwrap();
        std::fs::write(&alive, b"").unwrap();
        write_whole(&folder.path().join("file"), b"").unwrap();
        assert!(!dead.exists() && alive.exists());

        let other = tempfile::tempdir().unwrap();
        let dead = other.path().join(dead.file_name().unwrap());
        std::fs::create_dir_all(dead.join("unet")).unwrap();
        let beside = temporary_folder(&other.path().join("model")).unwrap();
        assert!(!dead.exists() && beside.path().exists());
        drop(beside);
        let fill = |path: &Path| {
            assert_ne!(path.parent(), Some(other.path()), "a killed `fill` would leave its files there");
            Ok(std::fs::write(path, b"whole")?)
        };
        write_at(&other.path().join("state"), fill).unwrap();
        assert_eq!(std::fs::read(other.path().join("state")).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 1);
    }
}
