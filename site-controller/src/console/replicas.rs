//! Folders of replicas as text for people. Pure.

use super::text::table;
use crate::{
    api::types::{ReplicaList, ReplicaRow},
    failover::folders::Needed,
};
use lifeboat::units::ByteSize;

pub fn list(list: &ReplicaList) -> String {
    if list.replicas.is_empty() {
        return "There are no replicas here.\n".into();
    }
    let cells: Vec<Vec<String>> = list.replicas.iter().map(row).collect();
    table(&["VM", "SIZE", "NEEDED BY", "FOLDER"], &cells)
}

/// What would go, for whoever is asked.
pub fn going(list: &ReplicaList) -> String {
    format!("These are removed, and can't be brought back:\n{}", self::list(list))
}

pub fn removed(list: &ReplicaList) -> String {
    let bytes = ByteSize(list.replicas.iter().map(|row| row.folder.bytes).sum());
    match list.replicas.len() {
        0 => "Every folder is needed by somebody, or may be; nothing was removed.\n".into(),
        1 => format!("Removed 1 folder of {bytes}.\n"),
        many => format!("Removed {many} folders of {bytes} together.\n"),
    }
}

fn row(row: &ReplicaRow) -> Vec<String> {
    let folder = &row.folder;
    let needed = match &folder.needed {
        Needed::Domain { name, running: true } => format!("{name}, which runs"),
        Needed::Domain { name, running: false } => format!("{name}, which is off"),
        Needed::Failover => "its failover".into(),
        Needed::Undo { until } => format!("an undo, until {until}"),
        Needed::Unknown { host } => format!("not known: host {host} could not be looked at"),
        Needed::Nobody => "nobody".into(),
    };
    vec![
        row.name.clone().unwrap_or_else(|| folder.vm.to_string()),
        ByteSize(folder.bytes).to_string(),
        needed,
        folder.dir.display().to_string(),
    ]
}
