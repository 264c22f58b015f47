//! The audit log as text for people. Pure.

use super::text::table;
use crate::api::types::{AuditList, AuditRow};

pub fn calls(list: &AuditList) -> String {
    if list.calls.is_empty() {
        return "No call that changes something was made.\n".into();
    }
    let cells: Vec<Vec<String>> = list.calls.iter().map(row).collect();
    table(&["WHEN", "WHO", "FROM", "WHAT", "END", "REQUEST"], &cells)
}

fn row(call: &AuditRow) -> Vec<String> {
    let end = match &call.end {
        Some(end) if end.done => "done".into(),
        Some(end) => end.code.clone().unwrap_or_else(|| "not done".into()),
        None => "under way, or cut short".into(),
    };
    let request: String = call.request.as_ref().map(ToString::to_string).unwrap_or_default();
    vec![
        call.at.to_string(),
        call.who.clone(),
        call.from.clone(),
        format!("{} {}", call.method, call.path),
        end,
        if request.chars().count() > SHOWN {
            request.chars().take(SHOWN).chain(['…']).collect()
        } else {
            request
        },
    ]
}

/// The rest is in the JSON.
const SHOWN: usize = 60;
