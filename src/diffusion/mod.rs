//! Diffusion as mathematics: noise, schedules, samplers. Knows no network.
//!
//! x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (Ho et al. 2020, eq. 4). A network predicts ε, v or x_0 from x_t and t; a sampler
//! goes from noise to x_0 by calling a closure. The same code generates images with the UNet (ε or v) and LoRA latents
//! with the identity DiT (x_0).
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use difflora::diffusion::schedule::{NoiseSchedule, SchedulerConfig};
//!
//! // The schedule of SDXL: β from 0.00085 to 0.012, linear in √β.
//! let config = r#"{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}"#;
//! let schedule = NoiseSchedule::new(&SchedulerConfig::from_json(config)?)?;
//! assert!((schedule.alphas_bar[0] - 0.99915).abs() < 1e-5);
//!
//! // σ falls from 14.61 to 0; four steps have five σ.
//! let sigmas = schedule.euler_sigmas(4)?.sigmas;
//! assert!((sigmas[0] - 14.6146).abs() < 1e-3);
//! assert_eq!((sigmas.len(), sigmas[4]), (5, 0.0));
//!
//! // A network that predicts ε exactly gives x_0 back.
//! let x_0 = Tensor::new(&[[1.0f32, -2.0]], &Device::Cpu)?;
//! let eps = Tensor::new(&[[0.5f32, 0.25]], &Device::Cpu)?;
//! let x_t = schedule.add_noise(&x_0, &eps, &[500])?;
//! let error = (schedule.to_x0(&eps, &x_t, &[500])? - x_0)?.abs()?.sum_all()?.to_scalar::<f32>()?;
//! assert!(error < 1e-4);
//! # anyhow::Ok(())
//! ```

pub mod noise;
pub mod sampler;
pub mod schedule;
pub mod shifted;
mod sigmas;

pub use sigmas::Sigmas;
