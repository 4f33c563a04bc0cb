//! The tables of `difflora eval`, in Markdown that is also aligned for a terminal.

use crate::eval::metrics::PromptAccuracy;
use crate::statistics::Mean;

/// Columns as wide as their widest cell; the first to the left, the others to the right.
pub fn table(head: &[String], rows: &[Vec<String>]) -> String {
    let all = || std::iter::once(head).chain(rows.iter().map(Vec::as_slice));
    let width = |column: usize| {
        all().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0).max(3)
    };
    let line = |row: &[String]| -> String {
        let cells = row.iter().enumerate().map(|(column, cell)| match column {
            0 => format!("| {cell:<0$} ", width(column)),
            _ => format!("| {cell:>0$} ", width(column)),
        });
        cells.collect::<String>() + "|\n"
    };
    let rule: String = (0..head.len())
        .map(|column| {
            let dashes = "-".repeat(width(column));
            if column == 0 { format!("| {dashes} ") } else { format!("| {}: ", &dashes[1..]) }
        })
        .collect();
    let body: String = rows.iter().map(|row| line(row)).collect();
    format!("{}{rule}|\n{body}", line(head))
}

/// `0.412 ± 0.018`, or `–`.
pub fn interval(mean: Option<Mean>) -> String {
    match mean {
        Some(Mean { mean, half_width: Some(half), .. }) => format!("{mean:.3} ± {half:.3}"),
        other => plain(other.map(|mean| mean.mean)),
    }
}

/// `0.412`, or `–`.
pub fn plain(value: Option<f64>) -> String {
    value.map_or("–".into(), |value| format!("{value:.3}"))
}

/// `0.96` for an attribute, or `–`.
pub fn accuracy_of(list: &[PromptAccuracy], attribute: &str) -> String {
    let found = list.iter().find(|row| row.attribute == attribute);
    found.map_or("–".into(), |row| format!("{:.2}", row.accuracy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_markdown_with_straight_columns() {
        let rows = [vec!["no LoRA".to_string(), "0.5 ± 0.1".into()], vec!["x".into(), "–".into()]];
        let text = table(&["method".into(), "cosine".into()], &rows);
        assert_eq!(
            text,
            "| method  |    cosine |\n| ------- | --------: |\n| no LoRA | 0.5 ± 0.1 |\n| x       |         – |\n"
        );
    }
}
