//! Comparison with the reference implementations; the golden files come from `scripts/golden_*.py`.
//!
//! | part | compared with | size |
//! |---|---|---|
//! | UNet, VAE, CLIP text and image encoders | diffusers, transformers: outputs and every gradient | small random models |
//! | seven samplers: timesteps, sigmas, results | diffusers, 310 settings: tables to 1e-6, results to 1e-5 | – |
//! | text to image | diffusers' `StableDiffusionXLPipeline`, 208 cases: latents to 5e-6, pixels to 1/255 | four small random models, two with the shapes of SSD-1B, KOALA and LCM |
//! | weighted prompts | A1111 (auto1111sdk 0.0.95) and ComfyUI: pieces, contexts to 1e-4, 25 prompts | a small random model |
//! | LoRA files (kohya with LDM and diffusers names, PEFT) | diffusers and peft: ΔW, both ways | small random models |
//! | LoCon, LoHa, LoKr, full, norms, IA3, OFT, BOFT, GLoRA, DoRA | LyCORIS and peft: ΔW, 1e-5 relative | small random layers |
//! | LoRA key names | ComfyUI's and A1111's rules; stable-diffusion.cpp's conversion (`scripts/check_sdcpp.py`): 2166, 2166 and 1444 tensors of the three spellings, all matched | 722 modules of SDXL |
//! | single files in LDM layout | diffusers' loader gives the folder's weights; outputs bitwise equal | a small random model; names, shapes and counts of SSD-1B, Vega and KOALA |
//! | counts of `models show` | the table of arXiv 2404.02883, diffusers on meta tensors | 14 UNets up to 4 billion parameters |
//! | base and LoRA together | diffusers, pixels to 1/255 (`scripts/check_diffusers.py`) | the built-in `tiny` and a LoRA from `gen` |
//! | YuNet, MobileFaceNet, SFace | onnxruntime, real weights | as shipped |
//! | SCRFD, ArcFace (iresnet50) | the insightface package 2.1, onnxruntime | same graphs, few channels, random weights |
//! | HyperLoRA: every layer, coefficients, 16 linear layers' factors (unit tests) | PyTorch to 1e-5; the official code's published numbers to 5e-6 | two small random models |
//! | HyperLoRA's crops, 2d106det (unit tests) | the official code's and Pillow's bytes; onnxruntime, 0.01 pixels | 25 outlines; same blocks, few channels |
//! | DINO, DINOv2, SSIM, PSNR, Fréchet distance, KID | transformers, scikit-image, scipy | small random models and images |
//! | LAE, mixer, DiT, ridge | PyTorch and numpy: outputs, gradients, ten steps | small random models |
//! | DreamBooth | diffusers and peft: gradients at the first step, ten losses, the LoRA after ten steps | a tiny random SDXL |
//!
//! Not compared: real SDXL weights, GPUs, 16-bit types on real models.

mod denoiser;
mod eval;
mod face;
mod golden;
mod hypernet;
mod insightface;
mod lora;
mod lora_damage;
mod lora_kinds;
mod lora_round_trip;
mod pipeline;
mod prompts;
mod samplers;
mod sdxl_parts;
mod single_file;
mod train;
mod train_lora;
mod unet;
