//! Figure 4 of the paper (Wu et al. 2024, arXiv 2408.06740): which weights of a LoRA carry the person. The largest or
//! the smallest quarter of each person's own LoRA is zeroed or replaced by noise of the same size.

use anyhow::Result;
use serde_json::json;

use crate::eval::methods::Method;
use crate::eval::report::{Findings, MethodRow};
use crate::eval::tables::{interval, plain, table};
use crate::eval::{html, plots};
use crate::lora::arithmetic::{Replacement, Which};

/// The rows of the figure: no LoRA, the own one, and the four changes of it.
pub fn methods() -> Vec<Method> {
    let changes = [
        (Which::Smallest, Replacement::Zero),
        (Which::Smallest, Replacement::Noise),
        (Which::Largest, Replacement::Zero),
        (Which::Largest, Replacement::Noise),
    ];
    let changed = changes.map(|(which, replacement)| Method::Perturbed(which, replacement));
    [Method::NoLora, Method::Own].into_iter().chain(changed).collect()
}

/// The figure from an evaluation of [`methods`].
///
/// # Errors
/// What the plotting library says.
pub fn figure(findings: Findings) -> Result<Findings> {
    let rows = &findings.rows;
    let accuracy = |row: &MethodRow| {
        let (right, asked) =
            row.metrics.prompt_accuracy.iter().fold((0.0, 0.0), |(right, asked), attribute| {
                (right + attribute.accuracy * attribute.images as f64, asked + attribute.images as f64)
            });
        (asked > 0.0).then(|| right / asked)
    };
    let head = ["LoRA", "similarity", "same − different", "rank 1", "prompt accuracy", "distance to own"];
    let cells = |row: &MethodRow| {
        vec![
            row.method.title(),
            interval(row.metrics.similarity),
            interval(row.metrics.same_minus_different),
            interval(row.metrics.rank_1),
            plain(accuracy(row)),
            plain(row.pixels_from_own.map(|mean| mean.mean)),
        ]
    };
    let head: Vec<String> = head.into_iter().map(String::from).collect();
    let text = table(&head, &rows.iter().map(cells).collect::<Vec<_>>());
    let claim = claim(rows);
    let bar = |row: &MethodRow| {
        let mean = row.metrics.same_minus_different?;
        Some((row.method.title(), (mean.mean, mean.half_width.unwrap_or(0.0))))
    };
    let plot = plots::bars(
        "Same − different with a quarter of the weights replaced",
        &rows.iter().filter_map(bar).collect::<Vec<_>>(),
    )?;
    let page = html::Page {
        title: "Which weights of a LoRA carry the person".into(),
        tables: vec![("Perturbation".into(), text.clone())],
        plots: vec![plot],
        notes: vec![claim.clone()],
        people: Vec::new(),
    };
    let accuracies: Vec<_> =
        rows.iter().map(|row| json!({ "method": row.method, "prompt_accuracy": accuracy(row) })).collect();
    let mut report = findings.report.clone();
    report["perturbation"] = json!({ "claim": claim, "prompt_accuracy": accuracies });
    Ok(Findings { report, text: format!("{text}\n{claim}\n"), html: Some(page.to_html()), ..findings })
}

/// Whether large weights matter more than small ones, as the paper says.
fn claim(rows: &[MethodRow]) -> String {
    let of = |which: Which| {
        let method = Method::Perturbed(which, Replacement::Zero);
        let row = rows.iter().find(|row| row.method == method)?;
        row.metrics.same_minus_different
    };
    let (Some(largest), Some(smallest)) = (of(Which::Largest), of(Which::Smallest)) else {
        return "Not everyone has an own LoRA, so that nothing can be said.".into();
    };
    let apart = (smallest.mean - largest.mean).abs()
        > largest.half_width.unwrap_or(f64::INFINITY) + smallest.half_width.unwrap_or(f64::INFINITY);
    let values =
        format!("{:.3} without the largest quarter, {:.3} without the smallest", largest.mean, smallest.mean);
    match (largest.mean < smallest.mean, apart) {
        (true, true) => format!(
            "The paper's claim holds here: large weights carry the person (same − different {values})."
        ),
        (_, false) => format!("The two do not differ beyond their intervals (same − different {values})."),
        (false, true) => format!("The paper's claim does not hold here (same − different {values})."),
    }
}
