//! Whole images against diffusers' StableDiffusionXLPipeline (`scripts/golden_pipeline.py`), and the parts on the way,
//! so that a fault is found where it is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use candle_core::{DType, Device, IndexOp, Tensor};
use difflora::image::Image;
use difflora::named::Named;
use difflora::sdxl::pipeline::{DenoiserInput, GenerationParams, Sampler, Sdxl, Sizes, Tiling};
use difflora::sdxl::unet::UNetInput;
use difflora::weights::model_folder::ModelFiles;
use serde::Deserialize;

use crate::golden::{Golden, assert_close};

#[derive(Deserialize)]
struct Case {
    model: String,
    sampler: String,
    steps: usize,
    guidance: f64,
    width: usize,
    height: usize,
    prompt: String,
    negative: Option<String>,
    /// Height and width, as in diffusers; so in the next.
    original_size: Option<[usize; 2]>,
    target_size: Option<[usize; 2]>,
    crops_coords_top_left: Option<[usize; 2]>,
}

/// Each golden file with its models: SDXL in miniature and one of another structure; one like SSD-1B, and one like KOALA
/// that is told the guidance.
const FILES: [(&str, [&str; 2]); 2] = [("pipeline", ["two", "three"]), ("distilled", ["layers", "guided"])];

/// The second prompt of the script, on which the parts are compared.
const UNICODE: &str = "naïve café — 日本語 🙂 ÀÉÎ";

fn open(name: &str, dtype: DType) -> Sdxl {
    let (file, _) = FILES.iter().find(|(_, models)| models.contains(&name)).unwrap();
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(file).join(name);
    Sdxl::open(&ModelFiles::folder(folder).unwrap(), dtype, &Device::Cpu).unwrap()
}

/// ‖a − b‖ / ‖b‖.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let norm = |x: &Tensor| f64::from(x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
    norm(&(a - b).unwrap()) / norm(b)
}

impl Case {
    fn drawing(&self) -> GenerationParams {
        let turned = |size: [usize; 2]| [size[1], size[0]];
        let own = [self.width, self.height];
        GenerationParams {
            steps: self.steps,
            guidance_scale: self.guidance,
            sampler: Sampler::from_name(&self.sampler).unwrap(),
            sizes: Some(Sizes {
                original: self.original_size.map_or(own, turned),
                crop: self.crops_coords_top_left.unwrap_or([0, 0]),
                target: self.target_size.map_or(own, turned),
            }),
            vae_tiling: Tiling::Auto,
        }
    }

    /// Final latents and the image.
    fn draw(&self, model: &Sdxl, golden: &Golden) -> (Tensor, Image) {
        let Case { model: name, width, height, .. } = self;
        let start = golden.get(&format!("{name}.start.{width}x{height}"));
        let noise = golden.get(&format!("{name}.noise.{width}x{height}"));
        let prompt = model.text.encode_prompts(&[&self.prompt]).unwrap();
        let negative = model.negative(self.negative.as_deref()).unwrap();
        let pipeline = model.pipeline();
        let fresh = |i: usize| Ok(noise.narrow(0, i, 1)?);
        let (latents, prompts, negative) = (&start, &prompt, &negative);
        let input = DenoiserInput { latents, prompts, negative, params: self.drawing() };
        let latents = pipeline.denoise(&input, fresh, |_| Ok(())).unwrap();
        let pixels = pipeline.decode(&latents, Tiling::Auto).unwrap();
        (latents, Image::from_tensor(&pixels.i(0).unwrap()).unwrap())
    }
}

#[test]
fn images_are_those_of_diffusers() {
    for (file, models) in FILES {
        let samplers = images_are_those_of(&Golden::open(file), models);
        let all = Sampler::ALL.len();
        assert!(file != "pipeline" || samplers == all, "every sampler has its cases");
    }
}

/// Gives how many samplers there were.
fn images_are_those_of(golden: &Golden, models: [&str; 2]) -> usize {
    let cases: Vec<Case> = golden.json("cases");
    let models: BTreeMap<&str, Sdxl> = models.map(|name| (name, open(name, DType::F32))).into();
    let mut worst = BTreeMap::<&str, (f64, u8)>::new();
    for (number, case) in cases.iter().enumerate() {
        let (latents, image) = case.draw(&models[case.model.as_str()], golden);
        let error = apart(&latents, &golden.get(&format!("{number}.latents")));
        let theirs = golden.get(&format!("{number}.pixels")).flatten_all().unwrap().to_vec1::<u8>().unwrap();
        assert!(theirs.iter().collect::<BTreeSet<_>>().len() > 10, "case {number} compares an empty image");
        let pixels = image.rgb.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        let Case { model, sampler, steps, guidance, width, height, prompt, .. } = case;
        let what =
            format!("{model} {sampler} {steps} steps, guidance {guidance}, {width}×{height}, {prompt:?}");
        assert!(error <= 2e-4, "{what}: latents differ by {error:.1e}");
        assert!(pixels <= 1, "{what}: a pixel differs by {pixels}");
        let worst = worst.entry(sampler).or_default();
        *worst = (worst.0.max(error), worst.1.max(pixels));
    }
    println!("largest relative difference of latents, and of a pixel: {worst:?}");
    worst.len()
}

#[test]
fn every_part_gives_what_diffusers_part_gives() {
    for (file, name) in FILES.into_iter().flat_map(|(file, models)| models.map(|name| (file, name))) {
        let golden = Golden::open(file);
        let model = open(name, DType::F32);
        let near = |ours: &Tensor, part: &str| {
            assert_close(ours, &golden.get(&format!("{name}.{part}")), 2e-5, &format!("{name}.{part}"));
        };
        let text = &model.text;
        let ids = |tokenizer: &difflora::sdxl::tokenizer::ClipTokenizer| {
            tokenizer.encode_batch(&[UNICODE], &Device::Cpu).unwrap()
        };
        near(&text.encoder.forward(&ids(&text.tokenizer)).unwrap().penultimate, "text_encoder.penultimate");
        near(
            &text.encoder_2.forward(&ids(&text.tokenizer_2)).unwrap().penultimate,
            "text_encoder_2.penultimate",
        );
        let conditioning = text.encode_prompts(&[UNICODE]).unwrap();
        near(&conditioning.context, "context");
        near(&conditioning.pooled, "pooled");
        let [width, height] = if name == "three" { [24, 32] } else { [24, 16] };
        let latents = golden.get(&format!("{name}.start.{width}x{height}"));
        let mut watched = 0;
        let out = model
            .unet
            .forward_watched(
                &UNetInput {
                    latents: &latents,
                    timesteps: &Tensor::new(&[601f32], &Device::Cpu).unwrap(),
                    context: &conditioning.context,
                    pooled: &conditioning.pooled,
                    time_ids: &Sizes::of(width, height).time_ids(1, &Device::Cpu).unwrap(),
                    guidance_scale: (name == "guided").then_some(5.0),
                },
                &mut |part, x| {
                    watched += 1;
                    near(x, &format!("unet.{part}"));
                },
            )
            .unwrap();
        assert_eq!(watched, golden.under(&format!("{name}.unet.")).len() - 1, "every part is watched");
        near(&out, "unet.out");
        near(&model.vae.decode(&latents).unwrap(), "vae");
    }
}

#[test]
fn strips_decode_the_image_without_seams() {
    let golden = Golden::open("pipeline");
    for (name, size) in [("two", "24x16"), ("three", "24x32")] {
        let vae = open(name, DType::F32).vae;
        let latents = golden.get(&format!("{name}.start.{size}"));
        // Two samples, larger than the start, not a multiple of a strip.
        let z = Tensor::cat(&[&latents, &latents.flip(&[2]).unwrap(), &latents], 2).unwrap();
        let z = Tensor::cat(&[&z, &z.flip(&[3]).unwrap()], 0).unwrap();
        let whole = vae.decode(&z).unwrap();
        for pixels in [1, 100, 1000, 1 << 20] {
            assert_close(
                &vae.decode_in_strips(&z, pixels).unwrap(),
                &whole,
                2e-5,
                &format!("{name} {pixels}"),
            );
        }
    }
}

#[test]
fn an_image_is_the_same_alone_and_in_a_batch() {
    let model = open("three", DType::F32);
    let prompts = ["a photo of a person", UNICODE];
    let shape = [1, 4, 8, 6];
    let noise =
        |seed: u64, i: u64| difflora::diffusion::noise::normal(seed, i, &shape, &Device::Cpu).unwrap();
    let negative = model.negative(None).unwrap();
    for sampler in ["unipc", "euler-a", "lcm"] {
        let drawing = GenerationParams {
            steps: 3,
            guidance_scale: 4.0,
            sampler: Sampler::from_name(sampler).unwrap(),
            sizes: None,
            vae_tiling: Tiling::Auto,
        };
        let draw = |seeds: &[u64], prompts: &[&str]| {
            let both = |i: u64| {
                let parts: Vec<Tensor> = seeds.iter().map(|seed| noise(*seed, i)).collect();
                Tensor::cat(&parts, 0)
            };
            let prompts = model.text.encode_prompts(prompts).unwrap();
            let fresh = |i: usize| Ok(both(1 + i as u64)?);
            let (latents, prompts, negative) = (&both(0).unwrap(), &prompts, &negative);
            let input = DenoiserInput { latents, prompts, negative, params: drawing };
            model.pipeline().denoise(&input, fresh, |_| Ok(())).unwrap()
        };
        let together = draw(&[7, 8], &prompts);
        for (i, prompt) in prompts.iter().enumerate() {
            let alone = draw(&[7 + i as u64], &[prompt]);
            assert_close(&alone, &together.narrow(0, i, 1).unwrap(), 1e-5, sampler);
        }
    }
}

#[test]
fn sixteen_bits_draw_nearly_the_same_image() {
    let golden = Golden::open("pipeline");
    let cases: Vec<Case> = golden.json("cases");
    for (number, case) in cases.iter().enumerate().filter(|(_, case)| case.steps == 4 && case.guidance == 1.0)
    {
        // The files hold f16, so nothing is lost with f16, and bf16 rounds to 8 bits.
        for (dtype, most) in [(DType::F16, 2e-4), (DType::BF16, 0.1)] {
            let model = open(&case.model, dtype);
            assert_eq!(model.unet.compute_dtype(), DType::F32, "a CPU computes in f32");
            let (latents, _) = case.draw(&model, &golden);
            let error = apart(&latents, &golden.get(&format!("{number}.latents")));
            assert!(error <= most, "{} {} {dtype:?}: {error:.1e}", case.model, case.sampler);
            if number == 6 {
                println!("{dtype:?}: {error:.1e}");
            }
        }
    }
}

#[test]
fn not_a_number_is_an_error_that_says_where() {
    let drawing = GenerationParams {
        steps: 2,
        guidance_scale: 5.0,
        sampler: Sampler::Euler,
        sizes: None,
        vae_tiling: Tiling::Auto,
    };
    let start = Tensor::zeros((1, 4, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let nan = |x: &Tensor| (x * f64::NAN).unwrap();
    let say = |damage: &dyn Fn(&mut Sdxl)| {
        let mut model = open("three", DType::F32);
        damage(&mut model);
        let prompt = model.text.encode_prompts(&["a photo"]).unwrap();
        let negative = model.negative(None).unwrap();
        let fresh = |_| anyhow::bail!("Euler needs no noise");
        let (latents, prompts, negative) = (&start, &prompt, &negative);
        let input = DenoiserInput { latents, prompts, negative, params: drawing };
        let result = model.pipeline().generate(&input, fresh, |_| Ok(()));
        format!("{:#}", result.unwrap_err())
    };
    let unet = say(&|model| {
        model.unet.visit_linears(&mut |name, linear| {
            if name == "time_embedding.linear_1" {
                linear.weight = nan(&linear.weight);
            }
        })
    });
    assert!(unet.contains("UNet") && unet.contains("step 1 of 2"), "{unet}");
    let text = say(&|model| {
        model.text.encoder_2.visit_layers(&mut |_, mut layer| {
            let (weight, bias) = (nan(layer.weight()), layer.bias().cloned());
            layer.set(weight, bias);
        })
    });
    assert!(text.contains("text encoder"), "{text}");
    let damaged = Tensor::full(f32::INFINITY, (1, 4, 8, 8), &Device::Cpu).unwrap();
    let vae = format!("{:#}", open("three", DType::F32).pipeline().decode(&damaged, Tiling::On).unwrap_err());
    assert!(vae.contains("VAE"), "{vae}");
}

#[test]
fn the_end_of_a_long_prompt_is_named_as_it_was_written() {
    let text = open("two", DType::F32).text;
    let long = "a photo of an person wearing glasses, ".repeat(12) + "Red  BACKGROUND";
    let end = text.cut(&long).unwrap().unwrap();
    assert!(long.ends_with(end), "{end}");
    // 75 tokens fit; 8 are one repetition, so the cut is behind `a photo of` of the tenth.
    assert_eq!(end, &long[9 * 38 + 11..], "{end}");
    assert_eq!(text.cut("a photo of a person").unwrap(), None);
    let emoji = "🙂 ".repeat(90);
    assert!(text.cut(&emoji).unwrap().is_some_and(|end| emoji.ends_with(&format!("{end} "))));
}

/// By hand, for it takes a minute and gigabytes: `cargo test --release --test parity -- --ignored --nocapture megapixel`.
#[test]
#[ignore = "takes a minute and several gigabytes"]
fn a_megapixel_decodes_the_same_in_strips() {
    use difflora::sdxl::vae::{Vae, VaeConfig};
    // SDXL's VAE at half its width.
    let config = VaeConfig::sized(&[64, 128, 256, 256], 2, 32);
    let trainable = difflora::weights::Trainable::new(1);
    Vae::new(&config, trainable.builder(&Device::Cpu)).unwrap();
    // Variables would keep every activation for the backward pass.
    let weights = trainable.vars().into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect();
    let vae = Vae::new(&config, difflora::weights::frozen(weights, DType::F32, &Device::Cpu)).unwrap();
    let peak = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM unknown").to_string()
    };
    let noise = difflora::diffusion::noise::normal(0, 0, (1, 4, 16, 16), &Device::Cpu).unwrap();
    let z = noise.upsample_bilinear2d(128, 128, false).unwrap();
    let timed = |tiling: &str, decode: &dyn Fn() -> Tensor| {
        let start = std::time::Instant::now();
        let image = decode();
        println!("{tiling}: {:.1} s, {}", start.elapsed().as_secs_f64(), peak());
        image
    };
    let strips = timed("strips", &|| vae.decode_in_strips(&z, 1 << 15).unwrap());
    let whole = timed("whole", &|| vae.decode(&z).unwrap());
    let largest = whole.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let apart = (strips - whole).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    println!("largest difference {:.1e} of {largest}", apart);
    assert!(apart <= 2.0 / 255.0 * largest);
}
