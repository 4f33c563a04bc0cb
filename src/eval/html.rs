//! `report.html`: one file with tables, plots, and every person's images, that needs no network.

use std::fmt::Write;

use anyhow::Result;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::image::{FileFormat, Filter, Image};

/// Longer side of an image in the report, in pixels.
const THUMBNAIL: usize = 128;

/// What a report shows.
pub struct Page {
    /// The heading.
    pub title: String,
    /// Tables in Markdown, each with its heading.
    pub tables: Vec<(String, String)>,
    /// SVG.
    pub plots: Vec<String>,
    /// How to read the tables.
    pub notes: Vec<String>,
    /// Everyone's images.
    pub people: Vec<PersonRow>,
}

/// A person's images.
pub struct PersonRow {
    /// Name.
    pub id: String,
    /// Values to sort by, with their names: similarities by method.
    pub values: Vec<(String, Option<f64>)>,
    /// Each with a caption, as `data:` addresses; see [`thumbnail`].
    pub images: Vec<(String, String)>,
}

/// A small copy of an image as a `data:` address.
pub fn thumbnail(image: &Image) -> Result<String> {
    let longer = image.width.max(image.height);
    let side = |length: usize| if longer > THUMBNAIL { (length * THUMBNAIL / longer).max(1) } else { length };
    let small = image.resize(side(image.width), side(image.height), Filter::Bicubic);
    Ok(format!("data:image/png;base64,{}", STANDARD.encode(small.to_bytes(FileFormat::Png, None)?)))
}

impl Page {
    /// The whole file.
    pub fn to_html(&self) -> String {
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n\
             <style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n",
            title = escaped(&self.title)
        );
        for (heading, table) in &self.tables {
            // Writing to a string does not fail.
            let _ = write!(page, "<h2>{}</h2>\n{}", escaped(heading), html_table(table));
        }
        for note in &self.notes {
            let _ = writeln!(page, "<p>{}</p>", escaped(note));
        }
        for plot in &self.plots {
            let _ = writeln!(page, "<figure>{plot}</figure>");
        }
        if let Some(first) = self.people.first() {
            page += "<h2>People</h2>\n<p>Sort by: <button onclick=\"order(-1,1)\">name</button>";
            for (i, (name, _)) in first.values.iter().enumerate() {
                let _ = write!(
                    page,
                    " <button onclick=\"order({i},-1)\">{name}, best first</button> <button onclick=\"order({i},1)\">worst \
                     first</button>",
                    name = escaped(name)
                );
            }
            page += "</p>\n<div id=\"people\">\n";
        }
        for (number, person) in self.people.iter().enumerate() {
            let values: Vec<String> = person
                .values
                .iter()
                .map(|(_, value)| value.map_or("-9".into(), |value| format!("{value:.4}")))
                .collect();
            let _ = write!(
                page,
                "<section data-n=\"{number}\" data-v=\"{}\"><h3>{}</h3>",
                values.join(" "),
                escaped(&person.id)
            );
            for (caption, image) in &person.images {
                let caption = escaped(caption);
                let _ = write!(
                    page,
                    "<figure><img src=\"{image}\" alt=\"{caption}\" loading=\"lazy\"><figcaption>{caption}</figcaption></figure>"
                );
            }
            page += "</section>\n";
        }
        if !self.people.is_empty() {
            let _ = write!(page, "</div>\n<script>{SCRIPT}</script>\n");
        }
        page + "</body></html>\n"
    }
}

const STYLE: &str = "body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse;display:block;\
overflow-x:auto}td,th{padding:.2em .6em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}td:first-child,\
th:first-child{text-align:left}section{margin:.6em 0;border-top:1px solid #eee}section figure{display:inline-block;margin:.2em;\
vertical-align:top}section h3{margin:.3em 0;font-size:14px}figcaption{font-size:11px;max-width:128px;color:#555}\
button{font-size:12px}";

/// Sorts the people by value `i`, or by name for −1; `way` 1 is rising.
const SCRIPT: &str = "function order(i,way){const p=document.getElementById('people');const v=s=>i<0?+s.dataset.n:+s.dataset.v\
.split(' ')[i];[...p.children].sort((a,b)=>way*(v(a)-v(b))).forEach(s=>p.append(s));}";

/// A table of Markdown, whose first row is the head.
fn html_table(markdown: &str) -> String {
    let mut html = String::from("<table>\n");
    for (i, line) in markdown.lines().filter(|line| line.starts_with('|')).enumerate() {
        if i == 1 {
            continue; // the rule
        }
        let cell = if i == 0 { "th" } else { "td" };
        let cells = line.trim_matches('|').split(" |");
        let cells: String = cells.map(|text| format!("<{cell}>{}</{cell}>", escaped(text.trim()))).collect();
        html += &format!("<tr>{cells}</tr>\n");
    }
    html + "</table>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_holds_everything_and_escapes_names() -> Result<()> {
        let image = thumbnail(&Image::filled(300, 150, [9, 9, 9]))?;
        let small = Image::decode(&STANDARD.decode(image.trim_start_matches("data:image/png;base64,"))?)?;
        assert_eq!((small.width, small.height), (128, 64));
        let page = Page {
            title: "t".into(),
            tables: vec![("Methods".into(), "| a | b |\n| --- | --: |\n| x | 1 ± 2 |\n".into())],
            plots: vec!["<svg/>".into()],
            notes: vec!["read".into()],
            people: vec![PersonRow {
                id: "<b>&".into(),
                values: vec![("own".into(), Some(0.5)), ("mean".into(), None)],
                images: vec![("photo".into(), image)],
            }],
        };
        let html = page.to_html();
        for part in [
            "<th>a</th><th>b</th>",
            "<td>x</td><td>1 ± 2</td>",
            "<svg/>",
            "&lt;b&gt;&amp;",
            "data-v=\"0.5000 -9\"",
        ] {
            assert!(html.contains(part), "{part} in {html}");
        }
        assert!(!html.contains("http"), "nothing is fetched");
        Ok(())
    }
}
