//! Damaged LoRA files, thousands of them: the reader and the key mapper return or refuse, and never panic.
//!
//! Deterministic mutations of the golden files. `DIFFLORA_MUTATIONS=N` sets how many; `tests/fuzz` has the same
//! target for libFuzzer.

use candle_core::{DType, Device, Tensor};
use difflora::lora::file::{self, Format};
use difflora::lora::ldm_keys::BlockLayout;
use difflora::lora::summary::Summary;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Reads `bytes`; whatever is read must be written and read again, and make its ΔW. Tells whether it was read.
fn read(bytes: &[u8], layout: &BlockLayout) -> bool {
    let report = Summary::read(&mut std::io::Cursor::new(bytes), layout);
    let Ok((changes, _)) = file::adapters_from_bytes(bytes, layout) else { return false };
    let report = report.expect("a file that can be read can be reported on");
    assert_eq!(report.kinds.values().sum::<usize>(), changes.modules.len());
    let written =
        file::adapters_to_bytes(&changes, Format::KohyaDiffusers, layout).expect("what is read is written");
    let (again, _) = file::adapters_from_bytes(&written, layout).expect("what is written is read");
    assert_eq!(changes.modules.len(), again.modules.len());
    for (module, change) in &changes.modules {
        assert!(report.kinds.contains_key(change.kind_name()), "{module}: {}", change.kind_name());
        let target = change.target();
        let small = target.iter().product::<usize>() < 20_000 && !target.contains(&0);
        if small && change.fits(&target) {
            let weight = Tensor::ones(target.as_slice(), DType::F32, &Device::Cpu).unwrap();
            let delta = change
                .delta(&weight, 0.5)
                .unwrap_or_else(|error| panic!("{module}, {}: {error}", change.kind_name()));
            assert_eq!(delta.dims(), target);
        }
    }
    true
}

/// The header's JSON with one piece of text changed, and the length in front set anew.
fn change_header(bytes: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    let words = [
        ("lora_down", "lora_up"),
        ("lora_up", "lora_mid"),
        ("alpha", "dora_scale"),
        ("hada_w1_a", "hada_w2_a"),
        ("hada", "lokr"),
        ("lokr_w1", "lokr_w2"),
        ("_a\"", "_b\""),
        ("diff", "diff_b"),
        ("weight", "on_input"),
        ("oft_blocks", "rescale"),
        ("F32", "I32"),
        ("F32", "F16"),
        ("16", "61"),
        ("[", "[1,"),
        ("3", "0"),
        (",3,3]", "]"),
        ("[16,", "[1,16,"),
        ("0", "9"),
        ("lycoris_", "unet."),
        ("conv1", "conv_shortcut"),
        ("to_k", "to_out"),
        ("blocks_1", "blocks_99999999999999999999"),
    ];
    let (from, to) = words[rng.random_range(0..words.len())];
    let places: Vec<usize> = header.match_indices(from).map(|(place, _)| place).collect();
    if !places.is_empty() {
        let place = places[rng.random_range(0..places.len())];
        header.replace_range(place..place + from.len(), to);
    }
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend(header.bytes());
    changed.extend(&bytes[8 + length..]);
    changed
}

fn change_bytes(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    let place = rng.random_range(0..bytes.len());
    let end = (place + rng.random_range(1..64)).min(bytes.len());
    match rng.random_range(0..6) {
        0 => bytes.truncate(place),
        1 => bytes[place] = rng.random(),
        2 => bytes[place] ^= 1 << rng.random_range(0..8),
        3 => drop(bytes.drain(place..end)),
        4 => {
            let again = bytes[place..end].to_vec();
            bytes.splice(place..place, again);
        }
        _ => bytes[..8].copy_from_slice(&rng.random::<u64>().to_le_bytes()),
    }
}

#[test]
fn no_damage_makes_the_reader_panic() {
    let folder = format!("{}/tests/data/golden/lora_kinds", env!("CARGO_MANIFEST_DIR"));
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| !path.ends_with("expected.safetensors"));
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert_eq!(seeds.len(), 22);
    let layout = BlockLayout::uniform(2, 2);
    assert!(seeds.iter().all(|seed| read(seed, &layout)));
    let count = std::env::var("DIFFLORA_MUTATIONS").map_or(5_000, |count| count.parse().unwrap());
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut usable = 0;
    for _ in 0..count {
        let mut bytes = seeds[rng.random_range(0..seeds.len())].clone();
        for _ in 0..rng.random_range(1..4) {
            if rng.random_bool(0.7) && Summary::read(&mut std::io::Cursor::new(&bytes), &layout).is_ok() {
                bytes = change_header(&bytes, &mut rng);
            } else if !bytes.is_empty() && bytes.len() >= 8 {
                change_bytes(&mut bytes, &mut rng);
            }
        }
        usable += usize::from(read(&bytes, &layout));
    }
    println!("{count} files, of which {usable} were still usable");
    assert!(usable > count / 50, "mutations that never leave a file usable test only the header");
}
