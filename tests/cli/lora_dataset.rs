//! A dataset of LoRAs as trainings read it: whole, in bounded memory, damaged.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use difflora::dataset::lora_dataset::{FormWanted, LoraDataset, ReadOptions};
use difflora::failure::Failure;
use difflora::hypernet::delta_metrics::DeltaSpace;
use difflora::hypernet::pca::Pca;
use difflora::hypernet::row_source::RowSource;
use difflora::lora::LoraLayer;
use difflora::lora::canonical::Canonical;
use difflora::lora::file::{self, Format};
use difflora::lora::ldm_keys::BlockLayout;

use crate::hypernet_dataset::{RANK, write_dataset};

fn refusal(folder: &Path) -> String {
    let error = LoraDataset::open(folder, &ReadOptions::default()).err().expect("the dataset is damaged");
    assert!(
        error.chain().any(|cause| matches!(cause.downcast_ref(), Some(Failure::Unusable(_)))),
        "{error:#}"
    );
    format!("{error:#}")
}

#[test]
fn a_dataset_is_read_with_all_references_of_all_people() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(folder.path(), 20);
    let set = LoraDataset::open(folder.path(), &ReadOptions::default()).unwrap();
    assert_eq!((set.train.vectors.count(), set.train.vectors.width()), (20, 2 * 8 * RANK));
    assert_eq!((set.train.faces.dims(), set.held_out.images.dims()), (&[40, 6][..], &[24, 5][..]));
    assert_eq!(set.held_out.references()[3], [6, 7]);
    let owners = Tensor::arange(0f32, 12., &Device::Cpu).unwrap().unsqueeze(1).unwrap();
    let each: Vec<u32> = set.held_out.owners.iter().map(|owner| *owner as u32).collect();
    let rows = owners.index_select(&Tensor::new(each, &Device::Cpu).unwrap(), 0).unwrap();
    assert_eq!(
        set.held_out.mean_per_person(&rows).unwrap().to_vec2::<f32>().unwrap(),
        owners.to_vec2::<f32>().unwrap()
    );
}

#[test]
fn no_more_rows_are_kept_than_the_memory_allows() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(folder.path(), 20);
    let whole = LoraDataset::open(folder.path(), &ReadOptions::default()).unwrap();
    assert_eq!((whole.train.vectors.held(), whole.held_out.vectors.held()), (20, 12));
    let row = 4 * whole.layout.parameters();
    for (memory, held) in [(0, [0, 0]), (12 * row + row / 2, [0, 12]), (17 * row, [5, 12])] {
        let set =
            LoraDataset::open(folder.path(), &ReadOptions { memory, ..ReadOptions::default() }).unwrap();
        let rows = |set: &LoraDataset| set.train.vectors.all().unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows(&set), rows(&whole));
        assert_eq!([set.train.vectors.held(), set.held_out.vectors.held()], held);
    }
}

/// Writes the LoRA of a row again.
fn change(folder: &Path, id: &str, work: impl Fn(&mut LoraLayer)) {
    let path = folder.join(format!("loras/{id}.safetensors"));
    let blocks = BlockLayout::uniform(2, 1);
    let mut lora = file::read(&path, &blocks).unwrap();
    lora.layers.values_mut().for_each(work);
    file::write(&path, &lora, Format::Kohya, &blocks).unwrap();
}

#[test]
fn rows_that_do_not_belong_with_the_others_are_listed_by_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(folder.path(), 20);
    for id in ["p0", "p4", "p25"] {
        change(folder.path(), id, |layer| {
            layer.up = layer.up.narrow(1, 0, 1).unwrap().contiguous().unwrap();
            layer.down = layer.down.narrow(0, 0, 1).unwrap().contiguous().unwrap();
        });
    }
    change(folder.path(), "p3", |layer| layer.alpha = 1.0);
    change(folder.path(), "p9", |layer| layer.up = (&layer.up * f64::NAN).unwrap());
    let message = refusal(folder.path());
    for part in ["p0, p4, p25: ", "rank 1, wanted 2", "p3: ", "alpha 1, wanted 2", "p9: ", "not finite"] {
        assert!(message.contains(part), "{part} in {message}");
    }
}

#[test]
fn people_whose_files_are_missing_are_left_out_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(folder.path(), 20);
    std::fs::remove_file(folder.path().join("loras/p7.safetensors")).unwrap();
    std::fs::remove_file(folder.path().join("embeddings/p22.safetensors")).unwrap();
    let message = refusal(folder.path());
    assert!(message.contains("2 people") && message.contains("--skip-missing"), "{message}");
    let options = ReadOptions { skip_missing: true, ..ReadOptions::default() };
    let set = LoraDataset::open(folder.path(), &options).unwrap();
    assert_eq!((set.train.people(), set.held_out.people()), (19, 11));
}

#[test]
fn a_layout_that_was_left_out_is_that_of_the_first_lora_and_a_form_undoes_other_factorisations() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(folder.path(), 20);
    let path = folder.path().join("dataset.json");
    let mut header: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let shared = ReadOptions { form: FormWanted::New(Canonical::Svd), ..ReadOptions::default() };
    let refused = LoraDataset::open(folder.path(), &shared).err().unwrap();
    assert!(refused.to_string().contains("canonical"), "{refused}");
    header.as_object_mut().unwrap().remove("layout");
    std::fs::write(&path, serde_json::to_vec(&header).unwrap()).unwrap();
    // The first LoRA decides, so it stays; every other is factored anew: B·R and R⁻¹·A with R = [[1, 1], [0, 1]].
    let form = |kind| {
        let options = ReadOptions { form: FormWanted::New(kind), ..ReadOptions::default() };
        let set = LoraDataset::open(folder.path(), &options).unwrap();
        assert_eq!(set.layout.parameters(), 2 * (8 + 6) * RANK);
        set.train.vectors.batch(&[1, 2]).unwrap()
    };
    let before = [Canonical::None, Canonical::Svd, Canonical::Procrustes].map(form);
    for id in ["p1", "p2"] {
        change(folder.path(), id, |layer| {
            let turn = Tensor::new(&[[1f32, 1.0], [0.0, 1.0]], &Device::Cpu).unwrap();
            let back = Tensor::new(&[[1f32, -1.0], [0.0, 1.0]], &Device::Cpu).unwrap();
            layer.up = layer.up.matmul(&turn).unwrap();
            layer.down = back.matmul(&layer.down).unwrap();
        });
    }
    let far = |(kind, before): (Canonical, &Tensor)| {
        let change = (form(kind) - before).unwrap().abs().unwrap().max_all().unwrap();
        change.to_scalar::<f32>().unwrap()
    };
    assert!(far((Canonical::None, &before[0])) > 0.5);
    assert!(far((Canonical::Svd, &before[1])) < 1e-3);
    assert!(far((Canonical::Procrustes, &before[2])) < 1e-3);
}

#[test]
fn components_of_turned_loras_are_worth_something_again_in_a_canonical_form() {
    let folder = tempfile::tempdir().unwrap();
    write_dataset(folder.path(), 60);
    let path = folder.path().join("dataset.json");
    let mut header: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    header.as_object_mut().unwrap().remove("layout");
    std::fs::write(&path, serde_json::to_vec(&header).unwrap()).unwrap();
    // Each person's factors are rotated by an angle of its own.
    for i in 0..72 {
        change(folder.path(), &format!("p{i}"), |layer| {
            let (sin, cos) = (2.4 * i as f32).sin_cos();
            let turn = Tensor::new(&[[cos, -sin], [sin, cos]], &Device::Cpu).unwrap();
            layer.up = layer.up.matmul(&turn).unwrap();
            layer.down = turn.t().unwrap().matmul(&layer.down).unwrap();
        });
    }
    // The error of ΔW behind as many components as there are factors: turned, they need more.
    let error = |kind| {
        let options = ReadOptions { form: FormWanted::New(kind), ..ReadOptions::default() };
        let set = LoraDataset::open(folder.path(), &options).unwrap();
        let (train, new) = (set.train.vectors.all().unwrap(), set.held_out.vectors.all().unwrap());
        let mean = train.mean_keepdim(0).unwrap();
        let basis = Pca::fit(&train.broadcast_sub(&mean).unwrap(), 4).unwrap().basis;
        let z = new.broadcast_sub(&mean).unwrap().matmul(&basis.t().unwrap()).unwrap();
        let guess = z.matmul(&basis).unwrap().broadcast_add(&mean).unwrap();
        let space = DeltaSpace::new(&set.layout, &Device::Cpu).unwrap();
        let alike = space.agreement(&guess, &new, &mean).unwrap();
        alike.iter().map(|alike| alike.relative_error).sum::<f64>() / alike.len() as f64
    };
    let [none, svd, aligned] = [Canonical::None, Canonical::Svd, Canonical::Procrustes].map(error);
    eprintln!("error of ΔW: none {none:.3}, svd {svd:.3}, procrustes {aligned:.3}");
    assert!(aligned < 0.5 * none && aligned < svd, "none {none}, svd {svd}, procrustes {aligned}");
}

#[test]
fn damaged_datasets_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    assert!(refusal(folder.path()).contains("dataset.json"));
    write_dataset(folder.path(), 8);
    assert!(refusal(folder.path()).contains("8 people"));
    write_dataset(folder.path(), 20);
    std::fs::remove_file(path("loras/p7.safetensors")).unwrap();
    assert!(refusal(folder.path()).contains("p7.safetensors"));

    write_dataset(folder.path(), 20);
    let bad = Tensor::full(f32::NAN, (2, 6), &Device::Cpu).unwrap();
    let image = Tensor::ones((2, 5), DType::F32, &Device::Cpu).unwrap();
    let embeddings = BTreeMap::from([("face", bad), ("image", image)]);
    safetensors::serialize_to_file(&embeddings, None, &path("embeddings/p3.safetensors")).unwrap();
    assert!(refusal(folder.path()).contains("not finite"));

    write_dataset(folder.path(), 20);
    let manifest = std::fs::read_to_string(path("manifest.jsonl")).unwrap();
    std::fs::write(path("manifest.jsonl"), manifest.replacen("\"one\"", "\"two\"", 1)).unwrap();
    let message = refusal(folder.path());
    assert!(
        message.contains("two: p0") && message.contains("one: p1, p2, p3, p4, p5 and 26 more"),
        "{message}"
    );
}
