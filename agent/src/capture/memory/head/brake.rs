//! The brake: what keeps a migration from ever completing, and the parameters it needs, put back afterwards.
//! Promises: whatever a killed predecessor left behind is found and undone before a new brake is set.

use super::super::MemoryError;
use lifeboat::hypervisor::monitor::{Monitor, MonitorError};
use serde_json::{Value, json};

const PREFIX: &str = "lbrake-";
const BITMAP: &str = "lifeboat-brake";
/// Bytes of zeros that the brake's bitmap covers, and per bit. QEMU counts the bits as work still to be done.
const COVERED: u64 = 1 << 30;
const GRAIN: u32 = 512;
/// Bytes a second: as fast as it goes.
const FULL_SPEED: u64 = 1 << 40;
/// Capabilities that change what a stream looks like or how it ends. libvirt turns them on for its own jobs only.
const UNWANTED: [&str; 12] = [
    "xbzrle",
    "compress",
    "multifd",
    "postcopy-ram",
    "release-ram",
    "x-colo",
    "background-snapshot",
    "x-ignore-shared",
    "return-path",
    "zero-copy-send",
    "mapped-ram",
    "pause-before-switchover",
];

/// A brake that has been set. Its node's name holds the parameters that it replaced.
pub struct Brake {
    node: String,
    saved: Parameters,
    turned_off: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parameters {
    downtime_ms: u64,
    max_bandwidth: u64,
}

impl Parameters {
    /// At most 31 characters, which is what QEMU allows.
    fn node_name(self) -> String {
        format!("{PREFIX}{:x}-{:x}", self.downtime_ms, self.max_bandwidth)
    }

    fn from_node_name(name: &str) -> Option<Self> {
        let (downtime, bandwidth) = name.strip_prefix(PREFIX)?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some(Self { downtime_ms: hex(downtime)?, max_bandwidth: hex(bandwidth)? })
    }
}

impl Brake {
    pub fn set(monitor: &dyn Monitor) -> Result<Self, MemoryError> {
        Self::release_left_over(monitor)?;
        let saved = current_parameters(monitor)?;
        let turned_off = unwanted_capabilities(monitor)?;
        let node = saved.node_name();
        let brake = Self { node, saved, turned_off };
        match brake.apply(monitor) {
            Ok(()) => Ok(brake),
            Err(error) => {
                let _ = brake.release(monitor);
                Err(error)
            }
        }
    }

    /// Undoes what a killed predecessor had set.
    pub fn release_left_over(monitor: &dyn Monitor) -> Result<(), MemoryError> {
        match find_left_over(monitor)? {
            Some((node, saved)) => Self { node, saved, turned_off: Vec::new() }.release(monitor),
            None => Ok(()),
        }
    }

    fn apply(&self, monitor: &dyn Monitor) -> Result<(), MemoryError> {
        let node = &self.node;
        monitor.execute(
            "blockdev-add",
            json!({ "driver": "null-co", "node-name": node, "size": COVERED, "read-only": true }),
        )?;
        monitor.execute(
            "block-dirty-bitmap-add",
            json!({ "node": node, "name": BITMAP, "granularity": GRAIN }),
        )?;
        set_capabilities(monitor, self.turned_off.iter().map(|name| (name.as_str(), false)))?;
        set_capabilities(monitor, [("dirty-bitmaps", true)])?;
        let bitmaps = json!([{ "name": BITMAP, "alias": BITMAP }]);
        monitor.execute(
            "migrate-set-parameters",
            json!({
                "downtime-limit": 0,
                "max-bandwidth": FULL_SPEED,
                "block-bitmap-mapping": [{ "node-name": node, "alias": node, "bitmaps": bitmaps }],
            }),
        )?;
        Ok(())
    }

    /// Undoes everything; what was never done is passed over. The node goes last, because its name is the memory.
    pub fn release(&self, monitor: &dyn Monitor) -> Result<(), MemoryError> {
        monitor.execute(
            "migrate-set-parameters",
            json!({
                "downtime-limit": self.saved.downtime_ms,
                "max-bandwidth": self.saved.max_bandwidth,
                "block-bitmap-mapping": [],
            }),
        )?;
        set_capabilities(monitor, [("dirty-bitmaps", false)])?;
        set_capabilities(monitor, self.turned_off.iter().map(|name| (name.as_str(), true)))?;
        let absent = |result: Result<Value, MonitorError>| match result {
            Ok(_) | Err(MonitorError::Refused { .. }) => Ok(()),
            Err(error) => Err(error),
        };
        absent(monitor.execute("block-dirty-bitmap-remove", json!({ "node": self.node, "name": BITMAP })))?;
        absent(monitor.execute("blockdev-del", json!({ "node-name": self.node })))?;
        Ok(())
    }
}

fn find_left_over(monitor: &dyn Monitor) -> Result<Option<(String, Parameters)>, MemoryError> {
    let nodes = monitor.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let names = nodes.as_array().into_iter().flatten().filter_map(|node| node.get("node-name")?.as_str());
    Ok(names.filter_map(|name| Some((name.to_owned(), Parameters::from_node_name(name)?))).next())
}

fn current_parameters(monitor: &dyn Monitor) -> Result<Parameters, MemoryError> {
    let answer = monitor.execute("query-migrate-parameters", json!({}))?;
    let number = |name: &str| {
        answer.get(name).and_then(Value::as_u64).ok_or_else(|| MonitorError::Unexpected {
            command: "query-migrate-parameters".into(),
            what: format!("no `{name}`"),
        })
    };
    Ok(Parameters { downtime_ms: number("downtime-limit")?, max_bandwidth: number("max-bandwidth")? })
}

fn unwanted_capabilities(monitor: &dyn Monitor) -> Result<Vec<String>, MemoryError> {
    let answer = monitor.execute("query-migrate-capabilities", json!({}))?;
    let on = answer.as_array().into_iter().flatten().filter(|entry| entry["state"] == json!(true));
    let names = on.filter_map(|entry| entry.get("capability")?.as_str());
    Ok(names.filter(|name| UNWANTED.contains(name)).map(str::to_owned).collect())
}

fn set_capabilities<'a>(
    monitor: &dyn Monitor,
    wanted: impl IntoIterator<Item = (&'a str, bool)>,
) -> Result<(), MemoryError> {
    let list: Vec<Value> =
        wanted.into_iter().map(|(name, on)| json!({ "capability": name, "state": on })).collect();
    if !list.is_empty() {
        monitor.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_brakes_name_remembers_what_it_replaced_and_fits_qemus_limit() {
        for saved in [
            Parameters { downtime_ms: 300, max_bandwidth: 128 << 20 },
            Parameters { downtime_ms: 2_000_000, max_bandwidth: i64::MAX as u64 },
        ] {
            let name = saved.node_name();
            assert!(name.len() <= 31, "{name}");
            assert_eq!(Parameters::from_node_name(&name), Some(saved));
        }
        assert_eq!(Parameters::from_node_name("libvirt-1-format"), None);
    }
}
