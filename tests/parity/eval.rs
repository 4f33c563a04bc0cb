//! Measures of `eval` against transformers, scikit-image and scipy (`scripts/golden_eval.py`).

use difflora::eval::dino::Dino;
use difflora::eval::distribution::{frechet, kid};
use difflora::eval::similarity::{psnr, ssim};
use difflora::image::Image;
use difflora::weights::model_folder::ModelFiles;

use crate::golden::{Golden, assert_close};

#[test]
fn dino_and_dinov2_are_those_of_transformers() {
    let golden = Golden::open("eval");
    for name in ["vit", "dinov2"] {
        let files = ModelFiles::folder(format!("tests/data/golden/eval/{name}")).unwrap();
        let ours = Dino::open(&files).unwrap().forward(&golden.get(&format!("{name}.pixels"))).unwrap();
        assert_close(&ours, &golden.get(&format!("{name}.class")), 1e-5, name);
    }
}

fn scalar(golden: &Golden, name: &str) -> f64 {
    golden.get(name).to_scalar().unwrap()
}

#[test]
fn psnr_and_ssim_are_those_of_scikit_image() {
    let golden = Golden::open("eval");
    let images = golden.get("images"); // (2, 24, 20, 3)
    let image = |i: usize| {
        let rgb = images.get(i).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap();
        Image { width: 20, height: 24, rgb }
    };
    let (a, b) = (image(0), image(1));
    assert!((ssim(&a, &b) - scalar(&golden, "ssim")).abs() < 1e-9, "{}", ssim(&a, &b));
    assert!((psnr(&a, &b) - scalar(&golden, "psnr")).abs() < 1e-9);
    assert_eq!((ssim(&a, &a), psnr(&a, &a)), (1.0, f64::INFINITY));
}

#[test]
fn distances_of_distributions_are_those_of_scipy() {
    let golden = Golden::open("eval");
    let rows = |name: &str| -> Vec<Vec<f32>> {
        golden.get(name).to_dtype(candle_core::DType::F32).unwrap().to_vec2().unwrap()
    };
    let (a, b) = (rows("features.a"), rows("features.b"));
    for (ours, name) in [(frechet(&a, &b).unwrap(), "frechet"), (kid(&a, &b).unwrap(), "kid")] {
        let theirs = scalar(&golden, name);
        assert!((ours / theirs - 1.0).abs() < 1e-5, "{name}: {ours} against {theirs}");
    }
    assert!(frechet(&a, &a).unwrap().abs() < 1e-9);
    let error = frechet(&a[..11], &b).unwrap_err().to_string();
    assert!(error.contains("needs 12 images") && error.contains("there are 11"), "{error}");
}
