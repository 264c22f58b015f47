//! QEMU's block layer as the rest of this room sees it: a few typed questions and commands over the monitor.
//! Promises: an answer of an unexpected form is an error, never a guess. Every call blocks. Called by this room only.

use super::DiskError;
use lifeboat::hypervisor::{
    monitor::{Monitor, MonitorError},
    version::QemuVersion,
};
use serde_json::{Value, json};
use std::{
    os::fd::BorrowedFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

#[derive(Clone)]
pub(super) struct Qemu(pub Arc<dyn Monitor>);

/// A disk as the guest has it.
#[derive(Debug)]
pub(super) struct Device {
    pub qdev: String,
    /// The node that the device writes to.
    pub node: String,
    pub bytes: u64,
    pub read_only: bool,
}

#[derive(Debug)]
pub(super) struct Node {
    pub name: String,
    pub bitmaps: Vec<Bitmap>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Bitmap {
    pub name: String,
    pub recording: bool,
    pub inconsistent: bool,
    pub granularity: u64,
}

impl Device {
    /// Where the device's properties are: `qdev` is a path already, or the id of a device that was given one.
    pub fn qom_path(&self) -> String {
        if self.qdev.starts_with('/') {
            self.qdev.clone()
        } else {
            format!("/machine/peripheral/{}", self.qdev)
        }
    }

    /// Whether this is the device with that alias, or lives in it (`/machine/peripheral/ALIAS/virtio-backend`).
    pub fn is(&self, alias: &str) -> bool {
        let path = self.qom_path();
        let id = path.strip_prefix("/machine/peripheral/").and_then(|rest| rest.split('/').next());
        id == Some(alias)
    }
}

impl Qemu {
    pub fn run(&self, command: &str, arguments: Value) -> Result<Value, DiskError> {
        Ok(self.0.execute(command, arguments)?)
    }

    pub fn run_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, DiskError> {
        Ok(self.0.execute_with_fds(command, arguments, &[fd])?)
    }

    pub fn transaction(&self, actions: Vec<Value>) -> Result<(), DiskError> {
        if !actions.is_empty() {
            self.run("transaction", json!({ "actions": actions }))?;
        }
        Ok(())
    }

    pub fn is_running(&self) -> Result<bool, DiskError> {
        let answer = self.run("query-status", json!({}))?;
        answer["running"].as_bool().ok_or_else(|| unexpected("query-status", "no `running`"))
    }

    /// All devices with a medium.
    pub fn devices(&self) -> Result<Vec<Device>, DiskError> {
        let answer = self.run("query-block", json!({}))?;
        let mut devices = Vec::new();
        for entry in list("query-block", &answer)? {
            let (Some(qdev), inserted) = (entry["qdev"].as_str(), &entry["inserted"]) else { continue };
            let Some(node) = inserted["node-name"].as_str() else { continue };
            let bytes = inserted["image"]["virtual-size"].as_u64();
            devices.push(Device {
                qdev: qdev.into(),
                node: node.into(),
                bytes: bytes.ok_or_else(|| unexpected("query-block", "no virtual size"))?,
                read_only: inserted["ro"].as_bool().unwrap_or(false),
            });
        }
        Ok(devices)
    }

    pub fn nodes(&self) -> Result<Vec<Node>, DiskError> {
        let answer = self.run("query-named-block-nodes", json!({ "flat": true }))?;
        let mut nodes = Vec::new();
        for entry in list("query-named-block-nodes", &answer)? {
            let Some(name) = entry["node-name"].as_str() else { continue };
            let bitmaps = entry["dirty-bitmaps"].as_array().into_iter().flatten();
            // A bitmap without a name belongs to a block job or a filter of QEMU's own.
            let bitmaps = bitmaps.filter_map(|bitmap| {
                Some(Bitmap {
                    name: bitmap["name"].as_str()?.into(),
                    recording: bitmap["recording"].as_bool().unwrap_or(false),
                    inconsistent: bitmap["inconsistent"].as_bool().unwrap_or(false),
                    granularity: bitmap["granularity"].as_u64().unwrap_or(0),
                })
            });
            nodes.push(Node { name: name.into(), bitmaps: bitmaps.collect() });
        }
        Ok(nodes)
    }

    /// The node that filter `name` passes writes on to. It moves when somebody takes an external snapshot below us.
    pub fn filtered(&self, name: &str) -> Result<String, DiskError> {
        const COMMAND: &str = "x-debug-query-block-graph";
        let graph = self.run(COMMAND, json!({}))?;
        let nodes = list(COMMAND, &graph["nodes"])?;
        let id = nodes.iter().find(|node| node["type"] == "block-driver" && node["name"] == name);
        let id =
            id.map(|node| &node["id"]).ok_or_else(|| unexpected(COMMAND, "a filter is not in the graph"))?;
        let edges = list(COMMAND, &graph["edges"])?;
        let child = edges.iter().find(|edge| edge["parent"] == *id && edge["name"] == "file");
        let child = child.map(|edge| &edge["child"]);
        let node =
            nodes.iter().find(|node| Some(&node["id"]) == child).and_then(|node| node["name"].as_str());
        node.map(str::to_owned).ok_or_else(|| unexpected(COMMAND, "a filter filters nothing"))
    }

    /// All nodes below filter `name` but its scratch, nearest first.
    pub fn chain(&self, name: &str) -> Result<Vec<String>, DiskError> {
        const COMMAND: &str = "x-debug-query-block-graph";
        let graph = self.run(COMMAND, json!({}))?;
        let (nodes, edges) = (list(COMMAND, &graph["nodes"])?, list(COMMAND, &graph["edges"])?);
        let named =
            |id: &Value| nodes.iter().find(|node| node["id"] == *id)?["name"].as_str().map(str::to_owned);
        let top = nodes.iter().find(|node| node["type"] == "block-driver" && node["name"] == name);
        let mut ids: Vec<&Value> = top.map(|node| &node["id"]).into_iter().collect();
        let mut at = 0;
        while let Some(id) = ids.get(at).copied() {
            let below =
                edges.iter().filter(|edge| edge["parent"] == *id && (at > 0 || edge["name"] == "file"));
            let new: Vec<_> = below.map(|edge| &edge["child"]).filter(|child| !ids.contains(child)).collect();
            ids.extend(new);
            at += 1;
        }
        Ok(ids.into_iter().skip(1).filter_map(named).collect())
    }

    pub fn set_drive(&self, qom_path: &str, node: &str) -> Result<(), DiskError> {
        self.run("qom-set", json!({ "path": qom_path, "property": "drive", "value": node })).map(|_| ())
    }

    /// Why reading a view of this device would put the guest at risk, if it would (see `serve`).
    pub fn iothread_risk(&self, qom_path: &str) -> Result<Option<&'static str>, DiskError> {
        let threads = self.run("query-iothreads", json!({}))?;
        if list("query-iothreads", &threads)?.is_empty() {
            return Ok(None);
        }
        if QemuVersion::ask(&*self.0)?.major >= IOTHREADS_SINCE {
            return Ok(None);
        }
        // The device's own thread, or that of the controller it hangs on.
        let bus = self.property(qom_path, "parent_bus")?;
        let controller =
            bus.as_deref().and_then(|bus| bus.rsplit_once('/')).map(|(controller, _)| controller);
        for path in [Some(qom_path), controller].into_iter().flatten() {
            if self.property(path, "iothread")?.is_some_and(|thread| !thread.is_empty()) {
                return Ok(Some(
                    "it is served by an iothread, and QEMU before 10.0 can abort while such a disk is read over NBD; \
                     remove <iothread> from the disk or its controller, or run the guest on QEMU 10.0 or later",
                ));
            }
        }
        Ok(None)
    }

    /// A property's text; `None` where the object has no such property.
    fn property(&self, path: &str, property: &str) -> Result<Option<String>, DiskError> {
        match self.0.execute("qom-get", json!({ "path": path, "property": property })) {
            Ok(value) => Ok(value.as_str().map(str::to_owned)),
            Err(MonitorError::Refused { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Ids of all block exports.
    pub fn exports(&self) -> Result<Vec<String>, DiskError> {
        let answer = self.run("query-block-exports", json!({}))?;
        let exports = list("query-block-exports", &answer)?;
        Ok(exports.iter().filter_map(|export| export["id"].as_str().map(str::to_owned)).collect())
    }

    /// Deletes a node as soon as QEMU has let go of it.
    pub fn delete_node(&self, name: &str) -> Result<(), DiskError> {
        self.until(name, || match self.0.execute("blockdev-del", json!({ "node-name": name })) {
            Ok(_) => Ok(true),
            Err(MonitorError::Refused { .. }) => Ok(!self.nodes()?.iter().any(|node| node.name == name)),
            Err(error) => Err(error.into()),
        })
    }

    /// Polls `done` until it holds, for a bounded time.
    pub fn until(&self, what: &str, done: impl Fn() -> Result<bool, DiskError>) -> Result<(), DiskError> {
        let deadline = Instant::now() + LET_GO_WITHIN;
        while !done()? {
            if Instant::now() > deadline {
                return Err(DiskError::Stuck { what: what.into(), after_s: LET_GO_WITHIN.as_secs() });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

pub(super) fn list<'a>(command: &str, answer: &'a Value) -> Result<&'a Vec<Value>, DiskError> {
    answer.as_array().ok_or_else(|| unexpected(command, "not a list"))
}

pub(super) fn unexpected(command: &str, what: &str) -> DiskError {
    MonitorError::Unexpected { command: command.into(), what: what.into() }.into()
}

const LET_GO_WITHIN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);
/// Major version of QEMU whose NBD server closes clients in the main thread, whatever thread their disk is in.
const IOTHREADS_SINCE: u32 = 10;
