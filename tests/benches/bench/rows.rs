//! What was measured, one row each: a value, and beside it what it is to be compared with.

use serde::Serialize;
use std::fmt::Write;

#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: &'static str,
    pub value: f64,
    pub unit: &'static str,
    /// The best this machine could do in the same run, or the aim where the note says so.
    pub limit: Option<f64>,
    pub note: String,
}

#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Rows(Vec<Row>);

impl Rows {
    pub fn add(
        &mut self,
        name: &'static str,
        value: f64,
        unit: &'static str,
        limit: impl Into<Option<f64>>,
        note: impl Into<String>,
    ) {
        self.0.push(Row { name, value, unit, limit: limit.into(), note: note.into() });
    }

    /// A line for each row, and its note below it.
    pub fn table(&self) -> String {
        let mut out = line("what", "measured", "limit", "unit");
        for row in &self.0 {
            let limit = row.limit.map_or_else(|| "-".to_owned(), number);
            out.push_str(&line(row.name, &number(row.value), &limit, row.unit));
            row.note.split("; ").filter(|note| !note.is_empty()).for_each(|note| {
                let _ = writeln!(out, "      {note}"); // a String takes everything
            });
        }
        out
    }
}

fn line(name: &str, value: &str, limit: &str, unit: &str) -> String {
    format!("{name:<28} {value:>9} {limit:>9}  {unit}\n")
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
