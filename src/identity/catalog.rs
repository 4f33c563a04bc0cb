//! The face encoders that a name stands for, where their files are looked for, and under which licence they come.
//!
//! Files are looked for in the hub's cache (`HF_HOME`, else `~/.cache/huggingface`) and in
//! `~/.insightface/models/NAME`, where the insightface package keeps its packs. A folder can be named instead. The
//! checksums of the packs' files are those that several public projects pin independently of each other (found by a
//! search over public repositories, November 2026); the files themselves have not been run here.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::FaceEncoder;
use super::detector::Detector;
use super::landmarks::LandmarkDetector;
use super::onnx_header::Header;
use super::recognise::Recogniser;
use crate::failure::Failure;
use crate::progress;
use crate::weights::hub::Repository;
use crate::weights::sha256;

/// A face encoder that is not built in.
#[derive(Debug)]
pub struct FaceModel {
    /// Name for `--face-encoder`.
    pub name: &'static str,
    /// Short description.
    pub about: &'static str,
    /// Under which licence the weights come, as their publisher says.
    pub licence: &'static str,
    /// The repository on the hub that carries the files.
    pub repo: &'static str,
    /// The detector; YuNet where there is none.
    pub detector: Option<ModelFile>,
    /// The recogniser.
    pub recogniser: ModelFile,
    /// The 106-point landmark detector, which the encoder itself does without.
    pub landmarks: Option<ModelFile>,
}

/// A file of a face encoder.
#[derive(Debug)]
pub struct ModelFile {
    /// Its path in the repository; its last part is the name in the other places.
    pub path: &'static str,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: &'static str,
}

const INSIGHTFACE_LICENCE: &str = "non-commercial research only (InsightFace)";

/// `2d106det.onnx`, one file in both packs.
const LANDMARKS: &str = "f001b856447c413801ef5c42091ed0cd516fcd21f2d6b79635b1e733a7109dbf";

const SCRFD_10G: &str = "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91";

/// The face encoders whose files can be fetched or found.
pub static FACE_MODELS: [FaceModel; 3] = [
    FaceModel {
        name: "antelopev2",
        about: "SCRFD-10GF and ArcFace ResNet-100 on Glint360K, as HyperLoRA, InstantID and PuLID use it",
        licence: INSIGHTFACE_LICENCE,
        repo: "DIAMONIK7777/antelopev2",
        detector: Some(ModelFile { path: "scrfd_10g_bnkps.onnx", sha256: SCRFD_10G }),
        recogniser: ModelFile {
            path: "glintr100.onnx",
            sha256: "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
        },
        landmarks: Some(ModelFile { path: "2d106det.onnx", sha256: LANDMARKS }),
    },
    FaceModel {
        name: "buffalo_l",
        about: "SCRFD-10GF and ArcFace ResNet-50 on WebFace600K, as IP-Adapter-FaceID uses it",
        licence: INSIGHTFACE_LICENCE,
        repo: "public-data/insightface",
        detector: Some(ModelFile { path: "models/buffalo_l/det_10g.onnx", sha256: SCRFD_10G }),
        recogniser: ModelFile {
            path: "models/buffalo_l/w600k_r50.onnx",
            sha256: "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
        },
        landmarks: Some(ModelFile { path: "models/buffalo_l/2d106det.onnx", sha256: LANDMARKS }),
    },
    FaceModel {
        name: "auraface",
        about: "ArcFace ResNet-100 for commercial use too, with YuNet for the faces",
        licence: "Apache-2.0 (fal)",
        repo: "fal/AuraFace-v1",
        detector: None,
        recogniser: ModelFile {
            path: "glintr100.onnx",
            sha256: "a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60",
        },
        landmarks: None,
    },
];

impl FaceModel {
    /// The files without which it cannot be used.
    pub fn files(&self) -> impl Iterator<Item = &ModelFile> {
        self.detector.iter().chain([&self.recogniser])
    }

    /// All its files.
    pub fn files_and_landmarks(&self) -> impl Iterator<Item = &ModelFile> {
        self.files().chain(&self.landmarks)
    }

    /// Fetches all its files from the hub and checks their hashes; gives the folder of the repository. Its licence has to
    /// be shown.
    ///
    /// # Errors
    /// The hub cannot be reached; [`Failure::Unusable`] for a file of other bytes.
    pub fn fetch(&self) -> Result<PathBuf> {
        let repository = Repository { id: self.repo.into(), revision: "main".into(), file: None };
        let folder = repository.fetch_files(self.files_and_landmarks().map(|file| file.path))?;
        for file in self.files_and_landmarks() {
            sha256::demand(&folder.join(file.path), self.name, file.sha256)?;
        }
        Ok(folder)
    }
}

impl ModelFile {
    /// The file's own name.
    pub fn name(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

/// The recogniser that is built in and that hypernetworks are made for unless another is asked for.
pub const BUILT_IN: &str = "mobilefacenet";

/// The names that `--face-encoder` knows.
pub const NAMES: &str = "mobilefacenet, sface, antelopev2, buffalo_l, auraface";

/// A face encoder that is not built in.
pub fn find(name: &str) -> Option<&'static FaceModel> {
    FACE_MODELS.iter().find(|model| model.name == name)
}

/// Whether a name means the same encoder on every machine.
pub fn is_known(name: &str) -> bool {
    matches!(name, "mobilefacenet" | "mobilefacenet512" | "sface" | "sface-2021dec") || find(name).is_some()
}

/// A file of a face encoder on this machine.
#[derive(Debug)]
pub struct InstalledFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Whether its SHA-256 is the known one.
    pub matches: bool,
}

/// The files of `model` on this machine; nothing when one is missing.
pub fn installed(model: &FaceModel) -> Option<Vec<InstalledFile>> {
    let places = Places::of_this_machine();
    let file = |file: &ModelFile| {
        let path = places.find(model, file).ok()?;
        let matches = sha256::of_file(&path).is_ok_and(|found| found == file.sha256);
        Some(InstalledFile { path, matches })
    };
    model.files().map(file).collect()
}

/// The face encoder of a name or a folder; a note names its licence when it is not built in.
///
/// # Errors
/// Those of [`FaceEncoder::open`].
pub fn open_encoder(name: &str) -> Result<FaceEncoder> {
    let encoder = FaceEncoder::open(name)?;
    if let Some(model) = find(name) {
        progress::note(format_args!("face encoder `{name}`: {}; licence: {}", model.about, model.licence));
    }
    Ok(encoder)
}

/// The 106-point landmark detector beside the face encoder of a name or a folder, and that of [`LANDMARKS_OF`] where it has
/// none.
///
/// # Errors
/// [`Failure::Usage`] where the file is not on this machine; [`Failure::Unusable`] for a folder without it, and for a file
/// that is not what it should be.
pub fn open_landmarks(name: &str) -> Result<LandmarkDetector> {
    let known = find(name).filter(|model| model.landmarks.is_some()).or_else(|| find(LANDMARKS_OF));
    let folder = Path::new(name);
    match known.and_then(|model| Some((model, model.landmarks.as_ref()?))) {
        Some((model, file)) if find(name).is_some() || !folder.is_dir() => {
            let path = Places::of_this_machine().find(model, file)?;
            let detector = LandmarkDetector::open(file.name(), &path)?;
            check(file, &path, &detector.provenance().1, model)?;
            Ok(detector)
        }
        _ => match at_most_one(folder, Contents::of(folder)?.landmarks, "landmark detectors")? {
            Some(path) => {
                LandmarkDetector::open(&path.file_name().unwrap_or_default().to_string_lossy(), &path)
            }
            None => {
                let why =
                    "no ONNX file in it takes [B, 3, 192, 192] and gives 212 numbers, as 2d106det.onnx does";
                Err(Failure::unusable(folder, why))
            }
        },
    }
}

/// The face model whose landmark detector is used beside encoders that have none.
const LANDMARKS_OF: &str = "antelopev2";

/// Detector and recogniser of a name or a folder.
pub(super) fn open(name: &str) -> Result<(Detector, Recogniser)> {
    match name {
        "mobilefacenet" | "mobilefacenet512" => Ok((Detector::yunet()?, Recogniser::mobilefacenet()?)),
        "sface" | "sface-2021dec" => Ok((Detector::yunet()?, Recogniser::sface()?)),
        _ => match find(name) {
            Some(model) => known(model, &Places::of_this_machine()),
            None if Path::new(name).is_dir() => folder(Path::new(name)),
            None if Path::new(name).exists() => {
                let why = "it is a file; give the folder that holds the recogniser's ONNX file";
                Err(Failure::unusable(Path::new(name), why))
            }
            None => Err(Failure::Usage(format!(
                "there is no face encoder `{name}`: it is {NAMES}, or a folder with ONNX files"
            ))
            .into()),
        },
    }
}

fn known(model: &FaceModel, places: &Places) -> Result<(Detector, Recogniser)> {
    let detector = match &model.detector {
        Some(file) => {
            let path = places.find(model, file)?;
            let detector = Detector::scrfd(file.name(), &path)?;
            check(file, &path, &detector.provenance().1, model)?;
            detector
        }
        None => Detector::yunet()?,
    };
    let path = places.find(model, &model.recogniser)?;
    let recogniser = Recogniser::arcface(model.name, &path)?;
    check(&model.recogniser, &path, &recogniser.network().sha256(), model)?;
    Ok((detector, recogniser))
}

/// Refuses a file that has the right name and other bytes: its embeddings would mean something else.
fn check(file: &ModelFile, path: &Path, sha256: &str, model: &FaceModel) -> Result<()> {
    if sha256 == file.sha256 {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new(".")).display();
    let why = format!(
        "its SHA-256 {}… is not {}… of `{}`; fetch it again, or use it under its own name with `--face-encoder {folder}`",
        &sha256[..12],
        &file.sha256[..12],
        model.name
    );
    Err(Failure::unusable(path, why))
}

/// The ONNX files of a folder, recognised by their inputs and outputs.
#[derive(Default)]
struct Contents {
    detectors: Vec<PathBuf>,
    recognisers: Vec<PathBuf>,
    landmarks: Vec<PathBuf>,
    /// Files for other purposes, for example age, with their inputs and outputs.
    others: Vec<String>,
}

impl Contents {
    fn of(folder: &Path) -> Result<Self> {
        let entries = std::fs::read_dir(folder).map_err(|error| Failure::unusable(folder, error))?;
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")));
        files.sort();
        let mut found = Self::default();
        for file in files {
            let bytes = std::fs::read(&file).map_err(|error| Failure::unusable(&file, error))?;
            let header =
                Header::parse(&bytes).map_err(|error| Failure::unusable(&file, format!("{error:#}")))?;
            match Purpose::of(&header) {
                Purpose::Detects => found.detectors.push(file),
                Purpose::Recognises => found.recognisers.push(file),
                Purpose::Landmarks => found.landmarks.push(file),
                Purpose::Other(ports) => {
                    let name = file.file_name().unwrap_or_default().to_string_lossy();
                    found.others.push(format!("`{name}` has {ports}"));
                }
            }
        }
        Ok(found)
    }
}

/// The encoder of a folder: a file that embeds faces, and SCRFD or, where there is none, YuNet.
fn folder(folder: &Path) -> Result<(Detector, Recogniser)> {
    let Contents { detectors, recognisers, others, .. } = Contents::of(folder)?;
    let name = folder.file_name().map_or_else(|| "folder".into(), |name| name.to_string_lossy());
    let Some(recogniser) = at_most_one(folder, recognisers, "recognisers")? else {
        let seen = if others.is_empty() { String::new() } else { format!(": {}", others.join("; ")) };
        let why = format!("no ONNX file in it takes [B, 3, 112, 112] and gives one embedding{seen}");
        return Err(Failure::unusable(folder, why));
    };
    let detector = match at_most_one(folder, detectors, "detectors")? {
        Some(file) => Detector::scrfd(&file.file_stem().unwrap_or_default().to_string_lossy(), &file)?,
        None => Detector::yunet()?,
    };
    Ok((detector, Recogniser::arcface(&name, &recogniser)?))
}

fn at_most_one(folder: &Path, mut found: Vec<PathBuf>, what: &str) -> Result<Option<PathBuf>> {
    if found.len() < 2 {
        return Ok(found.pop());
    }
    let names: Vec<String> = found.iter().map(|file| file.display().to_string()).collect();
    let why = format!("it has several {what} ({}); leave one in it", names.join(", "));
    Err(Failure::unusable(folder, why))
}

/// Task of a network, as far as its header shows.
enum Purpose {
    Detects,
    Recognises,
    Landmarks,
    Other(String),
}

impl Purpose {
    fn of(header: &Header) -> Self {
        let sides: Vec<Option<usize>> =
            header.inputs.iter().flat_map(|input| input.shape.iter().skip(2).copied()).collect();
        match header.outputs.len() {
            6 | 9 | 10 | 15 => Self::Detects,
            _ if LandmarkDetector::fits(header) => Self::Landmarks,
            1 if sides.iter().all(|side| side.is_none_or(|side| side == super::align::SIDE)) => {
                Self::Recognises
            }
            _ => {
                let list = |ports: &[super::onnx_header::Port]| {
                    ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
                };
                Self::Other(format!("input {} and output {}", list(&header.inputs), list(&header.outputs)))
            }
        }
    }
}

/// Where files are looked for.
struct Places {
    /// The hub's cache, the folder `hub` in it.
    hub: Option<PathBuf>,
    /// `~/.insightface/models`.
    insightface: Option<PathBuf>,
}

impl Places {
    fn of_this_machine() -> Self {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = std::env::home_dir();
        let cache = variable("HF_HOME").or_else(|| home.as_ref().map(|home| home.join(".cache/huggingface")));
        Self {
            hub: variable("HF_HUB_CACHE").or_else(|| Some(cache?.join("hub"))),
            insightface: home.map(|home| home.join(".insightface/models")),
        }
    }

    /// The path of a file of `model`.
    ///
    /// # Errors
    /// [`Failure::Usage`] that says where it was looked for and how to get it.
    fn find(&self, model: &FaceModel, file: &ModelFile) -> Result<PathBuf> {
        let mut looked = Vec::new();
        if let Some(hub) = &self.hub {
            let repo = hub.join(format!("models--{}", model.repo.replace('/', "--")));
            let snapshots = repo.join("snapshots");
            let mut revisions: Vec<PathBuf> = std::fs::read_dir(&snapshots)
                .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
                .unwrap_or_default();
            // The revision that `main` stands for comes first.
            let main = std::fs::read_to_string(repo.join("refs/main")).unwrap_or_default();
            revisions.sort_by_key(|revision| (!revision.ends_with(main.trim()), revision.clone()));
            if let Some(found) =
                revisions.iter().map(|revision| revision.join(file.path)).find(|path| path.is_file())
            {
                return Ok(found);
            }
            looked.push(snapshots.join("*").join(file.path));
        }
        if let Some(models) = &self.insightface {
            let folder = models.join(model.name);
            // The archive of antelopev2 holds a folder of its own name, so that unpacking it nests one in the other.
            let places = [folder.join(file.name()), folder.join(model.name).join(file.name())];
            if let Some(found) = places.iter().find(|path| path.is_file()) {
                return Ok(found.clone());
            }
            looked.extend(places.into_iter().take(1));
        }
        let looked: Vec<String> = looked.iter().map(|path| format!("`{}`", path.display())).collect();
        Err(Failure::Usage(format!(
            "the face encoder `{}` is not on this machine (looked for {}); fetch it with `difflora models pull {}`, \
             or give its folder (licence: {})",
            model.name,
            looked.join(" and "),
            model.name,
            model.licence
        ))
        .into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_in_the_hub_cache_and_where_insightface_keeps_them() {
        let root = tempfile::tempdir().unwrap();
        let places =
            Places { hub: Some(root.path().join("hub")), insightface: Some(root.path().join("insight")) };
        let model = find("auraface").unwrap();
        let message = places.find(model, &model.recogniser).unwrap_err().to_string();
        for said in [
            "models--fal--AuraFace-v1",
            "insight/auraface/glintr100.onnx",
            "models pull auraface",
            "Apache-2.0",
        ] {
            assert!(message.contains(said), "{message}");
        }
        let put = |path: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "x").unwrap();
            path
        };
        let nested = put("insight/auraface/auraface/glintr100.onnx");
        assert_eq!(places.find(model, &model.recogniser).unwrap(), nested);
        let plain = put("insight/auraface/glintr100.onnx");
        assert_eq!(places.find(model, &model.recogniser).unwrap(), plain);
        put("hub/models--fal--AuraFace-v1/snapshots/aaa/glintr100.onnx");
        let main = put("hub/models--fal--AuraFace-v1/snapshots/bbb/glintr100.onnx");
        std::fs::create_dir_all(root.path().join("hub/models--fal--AuraFace-v1/refs")).unwrap();
        std::fs::write(root.path().join("hub/models--fal--AuraFace-v1/refs/main"), "bbb\n").unwrap();
        assert_eq!(places.find(model, &model.recogniser).unwrap(), main);
        let message = known(model, &places).err().unwrap().to_string();
        assert!(message.contains("glintr100.onnx") && message.contains("truncated"), "{message}");
    }

    #[test]
    fn a_known_name_with_other_bytes_is_refused_with_both_sums() {
        let network = Recogniser::mobilefacenet().unwrap();
        let model = find("antelopev2").unwrap();
        let path = Path::new("models/glintr100.onnx");
        let own = network.network().sha256();
        let message = check(&model.recogniser, path, &own, model).unwrap_err().to_string();
        assert!(message.contains(&own[..12]) && message.contains("4ab1d6435d63"), "{message}");
    }

    #[test]
    fn folders_are_told_apart_by_inputs_and_outputs() {
        let root = tempfile::tempdir().unwrap();
        let message = || format!("{:#}", open(root.path().to_str().unwrap()).err().unwrap());
        assert!(message().contains("no ONNX file in it"), "{}", message());
        let yunet = include_bytes!("../assets/face/yunet.onnx");
        std::fs::write(root.path().join("yunet.onnx"), yunet).unwrap();
        assert!(message().contains("`cls_8`"), "{}", message());
        let recogniser = include_bytes!("../assets/face/mobilefacenet512.onnx");
        std::fs::write(root.path().join("r.onnx"), recogniser).unwrap();
        let (detector, found) = open(root.path().to_str().unwrap()).unwrap();
        assert_eq!(detector.provenance().0, "yunet-2023mar");
        assert_eq!(found.network().sha256(), Recogniser::mobilefacenet().unwrap().network().sha256());
        assert!(open("nosuch").err().unwrap().to_string().contains("antelopev2"));
        std::fs::write(root.path().join("r.onnx"), &recogniser[..recogniser.len() / 2]).unwrap();
        assert!(message().contains("r.onnx") && message().contains("truncated"), "{}", message());
    }

    #[test]
    fn checksums_are_whole() {
        for file in FACE_MODELS.iter().flat_map(FaceModel::files_and_landmarks) {
            assert!(file.sha256.len() == 64 && file.sha256.chars().all(|c| "0123456789abcdef".contains(c)));
        }
    }
}
