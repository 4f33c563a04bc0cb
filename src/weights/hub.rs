//! Models of the Hugging Face hub, in the cache that every other program shares.
//!
//! A repository that lies whole in the cache is used without asking the network; `difflora models pull` looks for a
//! newer one. `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` mean
//! what they mean to huggingface_hub and transformers. Only the files that generation needs are downloaded; an
//! interrupted download is continued.

mod selection;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

pub use self::selection::Weights;
use self::selection::{files_of, needed};
use crate::failure::Failure;
use crate::progress;
use crate::weights::sha256;

/// A repository at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// `owner/name`
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// A whole model in one file, where that is meant and not the diffusers folder.
    pub file: Option<String>,
}

impl Repository {
    /// Reads `owner/name[@revision][:file.safetensors]`; nothing when it is not of that form.
    pub fn parse(text: &str) -> Option<Self> {
        let (text, file) = match text.split_once(':') {
            Some((text, file)) => (text, Some(file)),
            None => (text, None),
        };
        let named = |file: &str| {
            file.ends_with(".safetensors")
                && file.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
        };
        if !file.is_none_or(named) {
            return None;
        }
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = id.split_once('/')?;
        let word = |word: &str| {
            word.starts_with(|c: char| c.is_ascii_alphanumeric())
                && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let fits = word(owner) && word(name) && !revision.is_empty() && !name.ends_with(".safetensors");
        fits.then(|| Self { id: id.into(), revision: revision.into(), file: file.map(String::from) })
    }

    /// As [`Repository::parse`] reads it.
    pub fn name(&self) -> String {
        let mut name = self.id.clone();
        if self.revision != "main" {
            name = format!("{name}@{}", self.revision);
        }
        match &self.file {
            Some(file) => format!("{name}:{file}"),
            None => name,
        }
    }

    /// The folder in the cache, whole or not; nothing when the revision was never fetched.
    pub fn folder(&self) -> Option<PathBuf> {
        let repository = cache().path().join(self.repo().folder_name());
        let commit = std::fs::read_to_string(repository.join("refs").join(&self.revision))
            .map_or(self.revision.clone(), |commit| commit.trim().to_string());
        Some(repository.join("snapshots").join(commit)).filter(|folder| folder.is_dir())
    }

    /// The folder in the cache, or the file where the model lies in one.
    ///
    /// # Errors
    /// [`Failure::Unusable`] when it is not there or not whole, with the command that fetches it.
    pub fn cached(&self) -> Result<PathBuf> {
        let lacking = match self.folder() {
            None => "it is not in the cache".to_string(),
            Some(folder) => match self.wanted(&files_of(&folder), Weights::Any) {
                Ok(wanted) => return Ok(place(folder, &wanted)),
                Err(lacking) => lacking,
            },
        };
        Err(Failure::Unusable(format!(
            "cannot use `{}`: {lacking}; with a network, `difflora models pull {}` fetches it into `{}`",
            self.name(),
            self.name(),
            cache().path().display()
        ))
        .into())
    }

    /// Which of the repository's files drawing needs: a diffusers folder's, or a whole model in one file.
    ///
    /// # Errors
    /// The missing part, or the files that could be meant.
    fn wanted(&self, files: &[String], weights: Weights) -> std::result::Result<BTreeSet<String>, String> {
        if let Some(file) = &self.file {
            return match files.contains(file) {
                true => Ok(BTreeSet::from([file.clone()])),
                false => Err(format!("it has no `{file}`")),
            };
        }
        let whole: Vec<&String> =
            files.iter().filter(|file| file.ends_with(".safetensors") && !file.contains('/')).collect();
        match &whole[..] {
            _ if files.iter().any(|file| file == "model_index.json") => needed(files, weights),
            [] => needed(files, weights),
            [one] => Ok(BTreeSet::from([(*one).clone()])),
            several => {
                let names = several.iter().map(|file| format!("\n  {}:{file}", self.name()));
                Err(format!(
                    "it holds several files that may be models; say which:{}",
                    names.collect::<String>()
                ))
            }
        }
    }

    /// The folder in the cache, or the file where the model lies in one; what is missing is fetched unless `offline`.
    pub fn open(&self, offline: bool) -> Result<PathBuf> {
        match self.cached() {
            Err(_) if !(offline || self::offline()) => self.fetch(Weights::Any),
            cached => cached,
        }
    }

    /// Fetches what drawing needs and the cache lacks of the newest commit of the revision; gives its folder, or the
    /// file where the model lies in one.
    ///
    /// # Errors
    /// [`Failure::Unusable`] that says what the hub answered and what to do, or that there is no network.
    pub fn fetch(&self, weights: Weights) -> Result<PathBuf> {
        let mut fetched = BTreeSet::new();
        let folder = self.fetch_those(|listed| {
            fetched = self.wanted(listed, weights).map_err(|why| self.unusable(&why))?;
            Ok(fetched.clone())
        })?;
        Ok(place(folder, &fetched))
    }

    /// The folder in the cache with these files; they are fetched unless they are there or `offline`.
    ///
    /// # Errors
    /// As [`Repository::fetch`].
    pub fn open_files(&self, files: &[&str], offline: bool) -> Result<PathBuf> {
        let lacks = |listed: &[String]| files.iter().find(|file| !listed.iter().any(|other| other == *file));
        let lacking = match self.folder() {
            None => "it is not in the cache".to_string(),
            Some(folder) => match lacks(&files_of(&folder)) {
                None => return Ok(folder),
                Some(file) => format!("`{file}` is not in the cache"),
            },
        };
        if offline || self::offline() {
            return Err(self.unusable(&format!("{lacking}, and the network may not be used")));
        }
        self.fetch_those(|listed| match lacks(listed) {
            None => Ok(files.iter().map(|file| (*file).to_string()).collect()),
            Some(file) => Err(self.unusable(&format!("it has no `{file}`"))),
        })
    }

    fn unusable(&self, why: &str) -> anyhow::Error {
        Failure::Unusable(format!("cannot use `{}`: {why}", self.name())).into()
    }

    /// Fetches these files of the newest commit of the revision; gives its folder.
    ///
    /// # Errors
    /// As [`Repository::fetch`].
    pub fn fetch_files<'a>(&self, files: impl Iterator<Item = &'a str>) -> Result<PathBuf> {
        self.fetch_those(|_| Ok(files.map(String::from).collect()))
    }

    /// Fetches what `choose` takes of the files that the repository lists.
    fn fetch_those(&self, choose: impl FnOnce(&[String]) -> Result<BTreeSet<String>>) -> Result<PathBuf> {
        let api = Arc::new(self.api()?);
        let info = self.watched(&api, ApiRepo::info)?;
        let listed: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let wanted = choose(&listed)?;
        let snapshots = cache().path().join(self.repo().folder_name()).join("snapshots");
        for file in &wanted {
            progress::check()?;
            if !snapshots.join(&info.sha).join(file).exists() {
                let file = file.clone();
                self.watched(&api, move |api| api.download(&file))?;
            }
        }
        cache().repo(self.repo()).create_ref(&info.sha).map_err(|error| self.explain(error.into()))?;
        self.folder().with_context(|| format!("`{}` was fetched and is not in the cache", self.name()))
    }

    /// Asks the hub for the list of files.
    ///
    /// # Errors
    /// [`Failure::Unusable`] that says what the hub answered and what to do, or that there is no network.
    pub fn ask(&self) -> Result<()> {
        self.watched(&Arc::new(self.api()?), ApiRepo::info).map(drop)
    }

    /// Runs `request` in a thread of its own and gives up on it when the server falls silent.
    ///
    /// # Errors
    /// As [`Repository::explain`]; [`Failure::Unusable`] after [`SILENCE`] without a byte; a signal.
    fn watched<T: Send + 'static>(
        &self,
        api: &Arc<ApiRepo>,
        request: impl FnOnce(&ApiRepo) -> std::result::Result<T, ApiError> + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = mpsc::channel();
        let api = api.clone();
        // It ends with its request or with the process.
        std::thread::spawn(move || drop(sender.send(request(&api))));
        let blobs = cache().path().join(self.repo().folder_name()).join("blobs");
        let (mut size, mut grown) = (size_of(&blobs), Instant::now());
        loop {
            match receiver.recv_timeout(Duration::from_millis(200)) {
                Ok(answer) => return answer.map_err(|error| self.explain(error)),
                Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the download ended unexpectedly"),
                Err(RecvTimeoutError::Timeout) => progress::check()?,
            }
            let now = size_of(&blobs);
            if now != size {
                (size, grown) = (now, Instant::now());
            }
            if grown.elapsed() > SILENCE {
                let why = format!(
                    "{} has sent nothing for {} seconds; call again later: what has been fetched is kept",
                    server(),
                    SILENCE.as_secs()
                );
                return Err(Failure::Unusable(format!("cannot fetch `{}`: {why}", self.name())).into());
            }
        }
    }

    fn api(&self) -> Result<ApiRepo> {
        let builder = ApiBuilder::from_cache(cache())
            .with_user_agent("difflora", env!("CARGO_PKG_VERSION"))
            .with_retries(3)
            .with_progress(!progress::is_quiet());
        let builder = match endpoint() {
            Some(endpoint) => builder.with_endpoint(endpoint.trim_end_matches('/').to_string()),
            None => builder,
        };
        let builder = match std::env::var("HF_TOKEN") {
            _ if is_mirror() => builder.with_token(None),
            Ok(token) if !token.trim().is_empty() => builder.with_token(Some(token.trim().to_string())),
            _ => builder,
        };
        Ok(builder.build().map_err(|error| self.explain(error))?.repo(self.repo()))
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, self.revision.clone())
    }

    /// User-facing error of a download.
    fn explain(&self, error: ApiError) -> anyhow::Error {
        let (id, place) = (&self.id, cache().path().display().to_string());
        let mut cause = &error;
        while let ApiError::TooManyRetries(inner) = cause {
            cause = inner;
        }
        let why = match cause {
            ApiError::RequestError(inner) => refusal(id, inner),
            ApiError::IoError(inner) if inner.kind() == ErrorKind::StorageFull => Some(format!(
                "the disk is full; make room in `{place}`, or name another folder in HF_HOME, and call again: what has \
                 been fetched is kept"
            )),
            ApiError::LockAcquisition(_) => {
                Some("another program is fetching it now; call again later".into())
            }
            _ => None,
        };
        let why = why.unwrap_or_else(|| {
            format!(
                "the download from {} failed ({error}); it goes on where it ended when `difflora models pull {}` is called \
                 again with a network",
                server(),
                self.name()
            )
        });
        Failure::Unusable(format!("cannot fetch `{}`: {why}", self.name())).into()
    }
}

static MIRROR: Mutex<Option<String>> = Mutex::new(None);

/// The mirror that is asked from now on in the place of the hub; `None` for the hub itself.
pub fn set_mirror(url: Option<&str>) {
    if let Ok(mut mirror) = MIRROR.lock() {
        *mirror = url.map(String::from);
    }
}

fn is_mirror() -> bool {
    MIRROR.lock().is_ok_and(|mirror| mirror.is_some())
}

/// The server in the place of the hub: the mirror, else `HF_ENDPOINT`.
fn endpoint() -> Option<String> {
    let mirror = MIRROR.lock().ok().and_then(|mirror| mirror.clone());
    mirror.or_else(|| std::env::var("HF_ENDPOINT").ok().filter(|url| !url.is_empty()))
}

/// Time without a byte after which a download is given up.
const SILENCE: Duration = Duration::from_secs(60);

/// Bytes of the files in a folder.
fn size_of(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|data| data.len()).sum()
}

/// The server that is asked, with the proxy on the way to it.
fn server() -> String {
    let hub = endpoint().unwrap_or_else(|| "https://huggingface.co".into());
    // In the order in which ureq takes them.
    let names = ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"];
    let proxy = names.iter().find_map(|name| {
        let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
        Some((name, value))
    });
    match proxy {
        Some((name, proxy)) => {
            // Without the password that may stand before the host.
            let host = proxy.rsplit_once('@').map_or(proxy.as_str(), |(_, host)| host);
            format!("`{hub}` through the proxy `{host}` of {name}")
        }
        None => format!("`{hub}`"),
    }
}

/// Meaning of an HTTP status of the hub.
fn refusal(id: &str, error: &ureq::Error) -> Option<String> {
    let ureq::Error::StatusCode(status) = error else { return None };
    Some(match status {
        401 => "the hub wants a token (401): the repository is gated or private, or there is none of this name; make \
                one at https://huggingface.co/settings/tokens and put it into HF_TOKEN"
            .to_string(),
        403 => format!(
            "the hub refuses your token (403): ask for access at https://huggingface.co/{id} with the account of the \
             token in HF_TOKEN"
        ),
        404 => "the hub knows no such repository, revision or file (404)".to_string(),
        _ => return None,
    })
}

/// Whether `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` forbids the network.
pub fn offline() -> bool {
    let is_set = |name: &str| {
        std::env::var(name)
            .is_ok_and(|value| ["1", "true", "yes", "y", "on"].contains(&value.to_lowercase().as_str()))
    };
    is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE")
}

/// The cache that huggingface_hub uses.
fn cache() -> Cache {
    match std::env::var("HF_HUB_CACHE") {
        Ok(path) if !path.is_empty() => Cache::new(path.into()),
        _ => Cache::from_env(),
    }
}

/// The folder of the cache, which may not exist yet.
pub fn cache_folder() -> PathBuf {
    cache().path().clone()
}

/// Every repository in the cache.
pub fn repositories() -> Vec<Repository> {
    let entries = std::fs::read_dir(cache().path()).into_iter().flatten().flatten();
    let mut found: Vec<Repository> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Repository::parse(&name.strip_prefix("models--")?.replacen("--", "/", 1))
        })
        .collect();
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found
}

/// Holds the files of a snapshot against the SHA-256 that the hub names large files by; gives how many there were.
///
/// # Errors
/// [`Failure::Unusable`] for the first file that differs.
pub fn verify_checksums(folder: &Path) -> Result<usize> {
    let mut checked = 0;
    for file in files_of(folder) {
        progress::check()?;
        let path = folder.join(file);
        let Ok(blob) = path.canonicalize() else { continue };
        let name = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.len() != 64 || !name.chars().all(|c| c.is_ascii_hexdigit()) {
            continue; // a small file, named by its Git hash
        }
        let found = sha256::of_file(&path)?;
        if found != name {
            let why = format!("its SHA-256 is {found}, the hub's {name}; delete it and pull the model again");
            return Err(Failure::unusable(&blob, why));
        }
        checked += 1;
    }
    Ok(checked)
}

/// Where a model lies: in its folder, or in the one file that was wanted.
fn place(folder: PathBuf, wanted: &BTreeSet<String>) -> PathBuf {
    match wanted.first() {
        Some(file) if wanted.len() == 1 => folder.join(file),
        _ => folder,
    }
}

#[cfg(test)]
mod tests {
    use super::selection::tests::listed;
    use super::*;

    #[test]
    fn repositories_are_told_from_paths() {
        let revision = |text: &str| Repository::parse(text).map(|it| (it.id, it.revision));
        let is = |id: &str, revision: &str| Some((id.to_string(), revision.to_string()));
        assert_eq!(revision("owner/name"), is("owner/name", "main"));
        assert_eq!(revision("owner/name@refs/pr/1"), is("owner/name", "refs/pr/1"));
        for text in ["name", "a/b/c", "./a", "../a", "/a", "a/", "owner/name@", "a/b.safetensors", "a b/c"] {
            assert_eq!(revision(text), None, "{text}");
        }
    }

    #[test]
    fn a_model_in_one_file_is_picked_or_asked_for() {
        let files = |names: &[&str]| names.iter().map(|name| (*name).to_string()).collect::<Vec<_>>();
        let wanted = |text: &str, names: &[&str]| {
            let wanted = Repository::parse(text).unwrap().wanted(&files(names), Weights::Any);
            wanted.map(|wanted| wanted.into_iter().collect::<Vec<_>>())
        };
        let (one, two) = ("model.safetensors", "model-fp16.safetensors");
        assert_eq!(wanted("a/b", &["README.md", one, "vae/x.safetensors"]).unwrap(), [one]);
        let message = wanted("a/b@v1", &[one, two]).unwrap_err();
        assert!(
            message.contains("a/b@v1:model.safetensors") && message.contains("a/b@v1:model-fp16"),
            "{message}"
        );
        assert_eq!(wanted("a/b@v1:model-fp16.safetensors", &[one, two]).unwrap(), [two]);
        assert!(wanted("a/b:x.safetensors", &[one, two]).unwrap_err().contains("x.safetensors"));
        assert!(wanted("a/b", &["README.md"]).unwrap_err().contains("model_index.json"));
        // A folder in diffusers' layout goes before the files beside it.
        let listed = listed();
        let names: Vec<&str> = listed.iter().map(String::as_str).collect();
        assert!(wanted("a/b", &names).unwrap().len() > 1);
        assert_eq!(wanted("a/b:sd_xl_base_1.0.safetensors", &names).unwrap(), ["sd_xl_base_1.0.safetensors"]);
        assert_eq!(Repository::parse("a/b@v1:c/d.safetensors").unwrap().name(), "a/b@v1:c/d.safetensors");
        for text in ["a/b:", "a/b:c.bin", "a/b:../c.safetensors", "C:/b.safetensors"] {
            assert_eq!(Repository::parse(text), None, "{text}");
        }
    }
}
