//! LoRA vectors of a dataset, read from their files when they are needed.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use candle_core::{Device, Tensor};

use crate::failure::Failure;
use crate::hypernet::row_source::RowSource;
use crate::lora::canonical::{Canonical, Form};
use crate::lora::file;
use crate::lora::layout::LoraLayout;
use crate::lora::ldm_keys::BlockLayout;

/// LoRA vectors on the disk.
pub struct Vectors {
    files: Vec<PathBuf>,
    reader: Reader,
    cached: Vec<OnceLock<Box<[f32]>>>,
    /// Bytes that may still be cached.
    free: AtomicUsize,
}

/// How a file becomes a vector.
#[derive(Clone)]
pub(super) struct Reader {
    pub layout: LoraLayout,
    pub blocks: BlockLayout,
    pub form: Form,
}

impl RowSource for Vectors {
    fn count(&self) -> usize {
        self.files.len()
    }

    fn width(&self) -> usize {
        self.reader.layout.parameters()
    }

    fn batch(&self, places: &[usize]) -> Result<Tensor> {
        let mut values = Vec::with_capacity(places.len() * self.width());
        for place in places {
            values.extend_from_slice(&self.row(*place)?);
        }
        Ok(Tensor::from_vec(values, (places.len(), self.width()), &Device::Cpu)?)
    }
}

impl Vectors {
    /// Of these files; `memory` bytes of vectors stay in memory once they are read.
    pub(super) fn new(files: Vec<PathBuf>, reader: Reader, memory: usize) -> Self {
        let cached = files.iter().map(|_| OnceLock::new()).collect();
        Self { files, reader, cached, free: AtomicUsize::new(memory) }
    }

    /// The file of vector `place`.
    pub(super) fn file(&self, place: usize) -> &Path {
        &self.files[place]
    }

    /// One vector, from memory or from its file.
    pub(super) fn row(&self, place: usize) -> Result<Cow<'_, [f32]>> {
        if let Some(row) = self.cached[place].get() {
            return Ok(Cow::Borrowed(row));
        }
        let path = &self.files[place];
        let vector = self.reader.vector(path)?.map_err(|why| Failure::unusable(path, why))?;
        let size = 4 * vector.len();
        let take = |free: usize| free.checked_sub(size);
        if self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            return Ok(Cow::Borrowed(self.cached[place].get_or_init(|| vector.into())));
        }
        Ok(Cow::Owned(vector))
    }

    /// Number of vectors in memory.
    pub fn held(&self) -> usize {
        self.cached.iter().filter(|row| row.get().is_some()).count()
    }
}

impl Reader {
    /// The vector of a file, or why it does not belong to this dataset.
    fn vector(&self, path: &Path) -> Result<Result<Vec<f32>, String>> {
        let lora = file::read(path, &self.blocks)?;
        let vector = self.layout.to_vector(&lora).and_then(|raw| match self.form.kind() {
            Canonical::None => Ok(raw),
            _ => self.layout.to_vector(&self.form.apply(&lora)?),
        });
        Ok(vector.map_err(|error| error.to_string()))
    }
}

/// The UNet's levels, which the names in a file depend on: those under which one has the modules of `layout`.
pub(super) fn block_layout(paths: &[PathBuf], layout: &LoraLayout) -> Result<BlockLayout> {
    let mut first = None;
    // A single file may be damaged.
    for path in paths.iter().take(5) {
        match blocks_of(path, layout) {
            Ok(blocks) => return Ok(blocks),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or_else(|| anyhow::anyhow!("a dataset without LoRAs")))
}

/// Modules and levels of a LoRA without a layout: the levels under which the fewest keys are unknown.
pub(super) fn layout_of(path: &Path) -> Result<(LoraLayout, BlockLayout)> {
    let bytes = std::fs::read(path).map_err(|error| Failure::unusable(path, error))?;
    let mut best: Option<(usize, LoraLayout, BlockLayout)> = None;
    for blocks in known_levels() {
        let (lora, unknown) = file::from_bytes(&bytes, &blocks)
            .map_err(|error| Failure::unusable(path, format!("{error:#}")))?;
        if best.as_ref().is_none_or(|(fewest, ..)| unknown.len() < *fewest) {
            best = Some((unknown.len(), LoraLayout::of(&lora), blocks));
        }
    }
    let (_, layout, blocks) = best.ok_or_else(|| Failure::unusable(path, "no levels are known"))?;
    Ok((layout, blocks))
}

/// SDXL's own first, so that it is taken, or its complaint shown, where several agree.
fn known_levels() -> impl Iterator<Item = BlockLayout> {
    let others = (1..=4).flat_map(|levels| (1..=4).map(move |layers| BlockLayout::uniform(levels, layers)));
    std::iter::once(BlockLayout::default()).chain(others)
}

fn blocks_of(path: &Path, layout: &LoraLayout) -> Result<BlockLayout> {
    let bytes = std::fs::read(path).map_err(|error| Failure::unusable(path, error))?;
    let mut first = None;
    for blocks in known_levels() {
        let vector = file::from_bytes(&bytes, &blocks).and_then(|(lora, _)| Ok(layout.to_vector(&lora)?));
        match vector {
            Ok(_) => return Ok(blocks),
            Err(error) => first = first.or(Some(error)),
        }
    }
    let why = first.map_or_else(|| "no layout fits".to_string(), |error| format!("{error:#}"));
    Err(Failure::unusable(path, why))
}
