//! Random files of every kind: what is written is read again with the same bits.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use difflora::diffusion::noise::normal;
use difflora::lora::adapter::{Adapter, AdapterFile, AdapterKind, BiasChange, Magnitude, Matrix};
use difflora::lora::file::{self, Format};
use difflora::lora::ldm_keys::BlockLayout;
use difflora::lora::summary::Summary;
use proptest::prelude::*;
use safetensors::tensor::View;

const LINEAR: [&str; 5] = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.proj_in",
    "up_blocks.0.attentions.2.transformer_blocks.7.ff.net.0.proj",
    "text_encoder.text_model.encoder.layers.11.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
];
const CONVOLUTIONS: [&str; 4] = [
    "conv_in",
    "down_blocks.0.resnets.1.conv2",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.upsamplers.0.conv",
];
const NORMS: [&str; 3] =
    ["conv_norm_out", "up_blocks.1.resnets.0.norm2", "text_encoder.text_model.final_layer_norm"];

/// What a layer's change is drawn from.
#[derive(Clone, Debug)]
struct Draw {
    kind: usize,
    out: usize,
    input: usize,
    rank: usize,
    alpha: f32,
    seed: u64,
    dtype: DType,
    /// 0 for none, 1 by outputs, 2 by inputs.
    dora: usize,
    bias: bool,
}

fn draw() -> impl Strategy<Value = Draw> {
    let sizes = (2usize..7, 2usize..7, 1usize..5);
    let dtypes = prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)];
    (0usize..13, sizes, 1u8..64, 0u64..10_000, dtypes, 0usize..3, any::<bool>()).prop_map(
        |(kind, (out, input, rank), alpha, seed, dtype, dora, bias)| {
            let alpha = f32::from(alpha) / 7.0;
            Draw { kind, out, input, rank, alpha, seed, dtype, dora, bias }
        },
    )
}

impl Draw {
    fn tensor(&self, stream: u64, shape: &[usize]) -> Tensor {
        normal(self.seed, stream, shape, &Device::Cpu).unwrap().to_dtype(self.dtype).unwrap()
    }

    /// The change of a linear layer, or of a 3×3 convolution.
    fn layer(&self, convolution: bool) -> Adapter {
        let Self { out, input, rank, alpha, .. } = *self;
        let inner = |first: usize, last: usize| -> Vec<usize> {
            if convolution { vec![first, last, 3, 3] } else { vec![first, last] }
        };
        let thin = |first: usize, last: usize| -> Vec<usize> {
            if convolution { vec![first, last, 1, 1] } else { vec![first, last] }
        };
        let width = if convolution { 9 * input } else { input };
        let core = |stream| self.tensor(stream, &[rank, rank, 3, 3]);
        let kind = match self.kind {
            1 if convolution => AdapterKind::LowRank {
                down: self.tensor(1, &thin(rank, input)),
                up: self.tensor(2, &thin(out, rank)),
                mid: Some(core(3)),
                alpha,
            },
            2 => AdapterKind::Hadamard {
                first: [self.tensor(1, &[out, rank]), self.tensor(2, &[rank, width])],
                second: [self.tensor(3, &[out, rank]), self.tensor(4, &[rank, width])],
                cores: None,
                alpha,
            },
            3 if convolution => AdapterKind::Hadamard {
                first: [self.tensor(1, &[rank, out]), self.tensor(2, &[rank, input])],
                second: [self.tensor(3, &[rank, out]), self.tensor(4, &[rank, input])],
                cores: Some([core(5), core(6)]),
                alpha,
            },
            4 => AdapterKind::Kronecker {
                first: Matrix::Whole(self.tensor(1, &[2, 3])),
                second: Matrix::Whole(self.tensor(2, &inner(out, input))),
                core: None,
                alpha,
            },
            5 => AdapterKind::Kronecker {
                first: Matrix::Product(self.tensor(1, &[2, rank]), self.tensor(2, &[rank, 3])),
                second: Matrix::Product(self.tensor(3, &[out, rank]), self.tensor(4, &[rank, width])),
                core: None,
                alpha,
            },
            6 if convolution => AdapterKind::Kronecker {
                first: Matrix::Whole(self.tensor(1, &[2, 3])),
                second: Matrix::Product(self.tensor(3, &[rank, out]), self.tensor(4, &[rank, input])),
                core: Some(core(5)),
                alpha,
            },
            7 => AdapterKind::Full(self.tensor(1, &inner(out, input))),
            12 => AdapterKind::Replaced(self.tensor(1, &inner(out, input))),
            8 => {
                let on_input = self.dora == 2;
                AdapterKind::Scaled {
                    factor: self.tensor(1, &[if on_input { input } else { out }]),
                    on_input,
                }
            }
            9 => AdapterKind::Orthogonal {
                blocks: self.tensor(1, &[rank, out, out]),
                rescale: self.bias.then(|| self.tensor(2, &[rank * out, 1])),
                constraint: if self.dora == 0 { 0.0 } else { alpha },
            },
            10 => AdapterKind::Orthogonal {
                blocks: self.tensor(1, &[2, rank, 2, 2]),
                rescale: self.bias.then(|| self.tensor(2, &[2 * rank, 1])),
                constraint: 0.0,
            },
            11 if !convolution => AdapterKind::Generalised {
                a: [self.tensor(1, &[input, rank]), self.tensor(2, &[rank, input])],
                b: [self.tensor(3, &[out, rank]), self.tensor(4, &[rank, input])],
                alpha,
            },
            _ => AdapterKind::LowRank {
                down: self.tensor(1, &inner(rank, input)),
                up: self.tensor(2, &thin(out, rank)),
                mid: None,
                alpha,
            },
        };
        let takes_dora = matches!(
            kind,
            AdapterKind::LowRank { .. } | AdapterKind::Hadamard { .. } | AdapterKind::Kronecker { .. }
        );
        let magnitude = (takes_dora && self.dora > 0).then(|| {
            let on_input = self.dora == 2;
            let mut shape = vec![1; if convolution { 4 } else { 2 }];
            shape[usize::from(on_input)] = if on_input { input } else { out };
            Magnitude { values: self.tensor(7, &shape), on_input }
        });
        let bias =
            (self.bias && !matches!(kind, AdapterKind::Orthogonal { .. })).then(|| self.bias_change(8, out));
        Adapter { kind, magnitude, bias }
    }

    fn bias_change(&self, stream: u64, out: usize) -> BiasChange {
        let values = self.tensor(stream, &[out]);
        if self.rank.is_multiple_of(2) { BiasChange::Added(values) } else { BiasChange::Replaced(values) }
    }

    fn norm(&self) -> Adapter {
        let bias = self.bias.then(|| self.bias_change(2, self.out));
        let kind = if self.kind == 0 && bias.is_some() {
            AdapterKind::BiasOnly
        } else {
            AdapterKind::Full(self.tensor(1, &[self.out]))
        };
        Adapter { kind, magnitude: None, bias }
    }
}

fn files() -> impl Strategy<Value = AdapterFile> {
    let some = |names: &'static [&'static str]| {
        proptest::collection::btree_map(proptest::sample::select(names), draw(), 0..=names.len())
    };
    let metadata = proptest::collection::btree_map("ss_[a-z]{1,8}", "\\PC{0,20}", 0..3);
    (some(&LINEAR), some(&CONVOLUTIONS), some(&NORMS), metadata)
        .prop_map(|(linear, convolutions, norms, metadata)| {
            let linear = linear.into_iter().map(|(module, draw)| (module, draw.layer(false)));
            let convolutions = convolutions.into_iter().map(|(module, draw)| (module, draw.layer(true)));
            let norms = norms.into_iter().map(|(module, draw)| (module, draw.norm()));
            let modules = linear.chain(convolutions).chain(norms);
            AdapterFile {
                modules: modules.map(|(module, change)| (module.to_string(), change)).collect(),
                metadata,
                ..AdapterFile::default()
            }
        })
        .prop_filter("a file without modules is refused", |changes| !changes.modules.is_empty())
}

/// Name, type, shape and bytes of all parts.
fn parts(change: &Adapter) -> BTreeMap<&'static str, (DType, Vec<usize>, Vec<u8>)> {
    let parts = change.parts().unwrap();
    let part = |(part, tensor): (difflora::lora::keys::Part, Tensor)| {
        (part.suffix(), (tensor.dtype(), tensor.dims().to_vec(), View::data(&&tensor).to_vec()))
    };
    parts.into_iter().map(part).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn files_of_every_kind_come_back_bit_for_bit(changes in files()) {
        let layout = BlockLayout::default();
        for format in [Format::Kohya, Format::KohyaDiffusers] {
            let bytes = file::adapters_to_bytes(&changes, format, &layout).unwrap();
            let (again, unknown) = file::adapters_from_bytes(&bytes, &layout).unwrap();
            prop_assert!(unknown.is_empty(), "{unknown:?}");
            prop_assert_eq!(changes.modules.keys().collect::<Vec<_>>(), again.modules.keys().collect::<Vec<_>>());
            for (module, change) in &changes.modules {
                prop_assert_eq!(change.kind_name(), again.modules[module].kind_name());
                prop_assert_eq!(parts(change), parts(&again.modules[module]), "{}", module);
            }
            for (key, value) in &changes.metadata {
                prop_assert_eq!(again.metadata.get(key), Some(value));
            }
            prop_assert_eq!(&bytes, &file::adapters_to_bytes(&again, format, &layout).unwrap());
            // The header alone tells the same kinds.
            let report = Summary::read(&mut std::io::Cursor::new(&bytes), &layout).unwrap();
            for change in changes.modules.values() {
                prop_assert!(report.kinds.contains_key(change.kind_name()), "{}", change.kind_name());
            }
            prop_assert_eq!(report.kinds.values().sum::<usize>(), changes.modules.len());
        }
    }

    #[test]
    fn peft_files_come_back_bit_for_bit_where_alpha_is_the_rank(drawn in proptest::collection::vec(draw(), 9)) {
        let layout = BlockLayout::default();
        let names = LINEAR.iter().map(|name| (*name, false)).chain(CONVOLUTIONS.iter().map(|name| (*name, true)));
        let modules = names.zip(drawn).map(|((name, convolution), draw)| {
            let plain = Draw { kind: 0, alpha: draw.rank as f32, bias: false, dora: draw.dora % 2, ..draw };
            (name.to_string(), plain.layer(convolution))
        });
        let changes = AdapterFile { modules: modules.collect(), ..AdapterFile::default() };
        let bytes = file::adapters_to_bytes(&changes, Format::Peft, &layout).unwrap();
        let (again, unknown) = file::adapters_from_bytes(&bytes, &layout).unwrap();
        prop_assert!(unknown.is_empty(), "{unknown:?}");
        prop_assert_eq!(again.modules.len(), changes.modules.len());
        for (module, change) in &changes.modules {
            prop_assert_eq!(parts(change), parts(&again.modules[module]), "{}", module);
        }
    }
}
