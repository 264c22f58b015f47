//! What was measured, one row each: a value, and beside it what it is to be compared with.

use serde::Serialize;

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

    pub fn table(&self) -> String {
        let limit = |row: &Row| row.limit.map_or_else(|| "-".to_owned(), number);
        let line = |name: &str, value: &str, limit: &str, unit: &str, note: &str| {
            format!("{name:<26} {value:>9} {limit:>9}  {unit:<11} {note}\n")
        };
        let rows =
            self.0.iter().map(|row| line(row.name, &number(row.value), &limit(row), row.unit, &row.note));
        std::iter::once(line("what", "measured", "limit", "unit", "")).chain(rows).collect()
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
