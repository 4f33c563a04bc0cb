//! Packing of operands: stored values to the words that [`microkernel`](super::microkernel) reads.

mod values;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::bf16;

use super::isa::ElemType;
#[cfg(target_arch = "x86_64")]
use super::isa::has_avx512;
use super::microkernel::NR;
pub(in crate::layers) use values::Value;

/// A word of two values, rounded to bf16 (to nearest, ties to even).
fn pair(first: f32, second: f32) -> u32 {
    u32::from(bf16::from_f32(first).to_bits()) | u32::from(bf16::from_f32(second).to_bits()) << 16
}

/// Word `w` of the values `at(0)`, `at(1)`, … along the depth.
fn word(elem: ElemType, w: usize, at: impl Fn(usize) -> f32) -> u32 {
    match elem {
        ElemType::F32 => at(w).to_bits(),
        ElemType::Bf16 => pair(at(2 * w), at(2 * w + 1)),
    }
}

/// Packs values that follow each other along the depth, row by row: word `w` of row `i` goes to
/// `to[i · step + w]`. `from(i)` is where row `i` begins.
///
/// # Safety
/// Each row has `depth` values, and `to` has room for `rows` of them.
pub(in crate::layers) unsafe fn pack_contiguous<V: Value>(
    elem: ElemType,
    rows: usize,
    depth: usize,
    from: impl Fn(usize) -> *const V,
    to: &mut [u32],
    step: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        for i in 0..rows {
            let to = to[i * step..][..depth.div_ceil(elem.per())].as_mut_ptr();
            // SAFETY: the processor has AVX-512, and bf16 where words are pairs; the row has `depth` values.
            unsafe {
                match elem {
                    ElemType::F32 => x86::copy_f32(from(i), depth, to),
                    ElemType::Bf16 => x86::copy_bf16(from(i), depth, to),
                }
            }
        }
        return;
    }
    for i in 0..rows {
        // SAFETY: the caller's promise.
        let row = unsafe { std::slice::from_raw_parts(from(i), depth) };
        let to = &mut to[i * step..];
        match elem {
            ElemType::F32 => to.iter_mut().zip(row).for_each(|(to, value)| *to = value.wide().to_bits()),
            ElemType::Bf16 => to.iter_mut().zip(row.chunks(2)).for_each(|(to, values)| {
                *to = pair(values[0].wide(), values.get(1).map_or(0.0, |value| value.wide()));
            }),
        }
    }
}

/// The same turned over: word `w` of row `i` goes to `to[w · step + i]`, and rows from `rows` to the next multiple of
/// 16 are zeros.
///
/// # Safety
/// Each row has `depth` values, and `to` has room.
pub(in crate::layers) unsafe fn pack_strided<V: Value>(
    elem: ElemType,
    rows: usize,
    depth: usize,
    from: impl Fn(usize) -> *const V,
    to: &mut [u32],
    step: usize,
) {
    let count = depth.div_ceil(elem.per());
    if rows == 0 || count == 0 {
        return;
    }
    assert!((count - 1) * step + rows.next_multiple_of(16) <= to.len());
    for first in (0..rows).step_by(16) {
        let rows = (rows - first).min(16);
        #[cfg(target_arch = "x86_64")]
        if has_avx512() {
            let mut starts = [std::ptr::null(); 16];
            starts.iter_mut().enumerate().take(rows).for_each(|(i, start)| *start = from(first + i));
            // SAFETY: as above; the assertion bounds what is written.
            unsafe {
                match elem {
                    ElemType::F32 => x86::turn_f32(&starts[..rows], depth, to.as_mut_ptr().add(first), step),
                    ElemType::Bf16 => {
                        x86::turn_bf16(&starts[..rows], depth, to.as_mut_ptr().add(first), step)
                    }
                }
            }
            continue;
        }
        for i in 0..16 {
            // SAFETY: the caller's promise.
            let row =
                if i < rows { unsafe { std::slice::from_raw_parts(from(first + i), depth) } } else { &[] };
            let at = |k: usize| row.get(k).map_or(0.0, |value| value.wide());
            for w in 0..count {
                to[w * step + first + i] = word(elem, w, at);
            }
        }
    }
}

/// Packs rows of runs of `taps` (at most 16) bf16 that are turned around each, as pairs: run `o` of row `i` begins at
/// `run(o, i)` and goes to values `o · taps` and on of row `i`, `step` words from row to row.
///
/// # Safety
/// Each run has `taps` values.
pub(in crate::layers) unsafe fn pack_transposed(
    rows: usize,
    runs: usize,
    taps: usize,
    run: impl Fn(usize, usize) -> *const bf16,
    to: &mut [u32],
    step: usize,
) {
    let length = runs * taps;
    assert!(taps <= 16 && (rows == 0 || (rows - 1) * step + length.div_ceil(2) <= to.len()));
    for o in 0..runs {
        for i in 0..rows {
            let from = run(o, i);
            let row = to[i * step..].as_mut_ptr().cast::<bf16>();
            #[cfg(target_arch = "x86_64")]
            if o * taps + 16 <= length && has_avx512() {
                // SAFETY: the processor has AVX-512; what is written beyond this run belongs to the row's next one.
                unsafe { x86::turn_run(from, taps, row.add(o * taps)) };
                continue;
            }
            for t in 0..taps {
                // SAFETY: the caller's promise; the assertion bounds what is written.
                unsafe { *row.add(o * taps + t) = *from.add(taps - 1 - t) };
            }
        }
    }
    if length % 2 == 1 {
        (0..rows).for_each(|i| to[i * step + length / 2] &= 0xffff);
    }
}

/// Packs lines that run across the depth: word `w` of column `j` comes from the `j`-th values of the lines `w`, or `2 w`
/// and `2 w + 1`, and goes to `to[w · step + j]`; `line(k)` is where line `k` of `depth` begins. At most 32 columns.
///
/// # Safety
/// Each line has `columns` values.
pub(in crate::layers) unsafe fn pack_lines<V: Value>(
    elem: ElemType,
    columns: usize,
    depth: usize,
    line: impl Fn(usize) -> *const V,
    to: &mut [u32],
    step: usize,
) {
    let count = depth.div_ceil(elem.per());
    assert!(columns <= NR && (count == 0 || (count - 1) * step + columns.next_multiple_of(16) <= to.len()));
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512, and bf16 where words are pairs; the caller's promise.
        unsafe {
            match elem {
                ElemType::F32 => x86::lines_f32(columns, depth, line, to.as_mut_ptr(), step),
                ElemType::Bf16 => x86::lines_bf16(columns, depth, line, to.as_mut_ptr(), step),
            }
        }
        return;
    }
    // SAFETY: the caller's promise.
    let at = |k: usize, j: usize| if k < depth { unsafe { (*line(k).add(j)).wide() } } else { 0.0 };
    for w in 0..count {
        for (j, to) in to[w * step..][..columns].iter_mut().enumerate() {
            *to = word(elem, w, |k| at(k, j));
        }
    }
}

/// Packs 16 columns that lie `columns` apart (one word each) in `from`, for every offset of `depth`:
/// `to[w · step + j]`.
///
/// # Safety
/// Every offset plus every column points into `from`, and `to` has room.
pub(in crate::layers) unsafe fn pack_gathered(
    elem: ElemType,
    from: *const f32,
    depth: &[usize],
    columns: &[u32; 16],
    to: &mut [u32],
    step: usize,
) {
    let count = depth.len().div_ceil(elem.per());
    assert!(count == 0 || (count - 1) * step + 16 <= to.len());
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512, and bf16 where words are pairs; the caller's promise.
        unsafe {
            match elem {
                ElemType::F32 => x86::gather_f32(from, depth, columns, to.as_mut_ptr(), step),
                ElemType::Bf16 => x86::gather_bf16(from, depth, columns, to.as_mut_ptr(), step),
            }
        }
        return;
    }
    let at = |k: usize, j: u32| match depth.get(k) {
        // SAFETY: the caller's promise.
        Some(offset) => unsafe { *from.add(offset + j as usize) },
        None => 0.0,
    };
    for w in 0..count {
        for (to, &j) in to[w * step..].iter_mut().zip(columns) {
            *to = word(elem, w, |k| at(k, j));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turned_runs_are_pairs_of_the_values_turned_around() {
        for (rows, runs, taps) in
            [(1usize, 1usize, 1usize), (5, 7, 9), (12, 40, 9), (3, 4, 16), (2, 9, 1), (4, 5, 3)]
        {
            let values: Vec<bf16> = (0..rows * runs * taps).map(|i| bf16::from_bits(i as u16 + 1)).collect();
            let step = (runs * taps).div_ceil(2) + 1;
            let mut packed = vec![u32::MAX; rows * step];
            // SAFETY: each run has `taps` values.
            unsafe {
                let run = |o: usize, i: usize| values[(o * rows + i) * taps..].as_ptr();
                pack_transposed(rows, runs, taps, run, &mut packed, step);
            }
            for (i, row) in packed.chunks_exact(step).enumerate() {
                for k in 0..runs * taps {
                    let (o, t) = (k / taps, k % taps);
                    let got = (row[k / 2] >> (16 * (k % 2))) as u16;
                    assert_eq!(
                        got,
                        values[(o * rows + i) * taps + taps - 1 - t].to_bits(),
                        "{taps}: {i}, {k}"
                    );
                }
                if runs * taps % 2 == 1 {
                    assert_eq!(row[runs * taps / 2] >> 16, 0);
                }
                assert_eq!(row[step - 1], u32::MAX);
            }
        }
    }
}
