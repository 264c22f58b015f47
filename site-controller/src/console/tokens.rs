//! Tokens of the API as text for people. Pure.

use super::text::table;
use crate::api::types::TokenRow;

pub fn list(rows: &[TokenRow]) -> String {
    if rows.is_empty() {
        return "There are no tokens; `lifeboat token create NAME --role viewer` makes one.\n".into();
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            vec![
                row.name.clone(),
                row.id.clone(),
                row.role.to_string(),
                row.created_at.to_string(),
                row.created_by.clone(),
                row.expires_at.map_or_else(|| "never".into(), |at| at.to_string()),
            ]
        })
        .collect();
    table(&["TOKEN", "ID", "ROLE", "CREATED", "BY", "EXPIRES"], &cells)
}

/// For stderr: the token itself goes to stdout.
pub fn created(row: &TokenRow) -> String {
    let until = row.expires_at.map_or_else(|| "until it is revoked".into(), |at| format!("until {at}"));
    format!("Token {} with the role {}, good {until}. Keep it: it is not shown again.", row.name, row.role)
}

pub fn revoked(row: &TokenRow) -> String {
    format!("Token {} ({}) opens nothing any more.\n", row.name, row.id)
}
