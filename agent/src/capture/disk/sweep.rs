//! Taking our views away again: exports, NBD server, filters, nodes, file descriptors, whatever is there.
//! Promises: looks at QEMU and not at what we remember, so that it serves a view just read, a failed one and one that
//! a killed agent left behind alike; touches nothing that is not ours; running it twice does no harm; the guest goes on
//! writing meanwhile. Marks are not its business. Called by `disk`.

use super::{
    DiskError,
    names::{FILTER, LISTENER, PREFIX, SERVER_MARK},
    qemu::{Qemu, list},
};
use lifeboat::hypervisor::monitor::MonitorError;
use serde_json::json;

pub(super) fn sweep(qemu: &Qemu) -> Result<(), DiskError> {
    // Exports first: they hold the views.
    remove_exports(qemu)?;
    let names: Vec<String> = ours(qemu)?;
    if names.iter().any(|name| name == SERVER_MARK) {
        stop_server(qemu)?;
    }
    refusable(qemu.run("closefd", json!({ "fdname": LISTENER })))?;
    let filters = |name: &&String| name.starts_with(FILTER);
    for name in names.iter().filter(|name| !filters(name)) {
        // A scratch node goes with its filter.
        if !name.starts_with(SCRATCH) && name != SERVER_MARK {
            qemu.delete_node(name)?;
        }
    }
    unsplice(qemu)?;
    let orphans = orphans(qemu, names.iter().filter(filters))?;
    for name in names.iter().filter(filters) {
        qemu.delete_node(name)?;
    }
    for orphan in &orphans {
        // Refused if somebody uses it after all: then it is none.
        refusable(qemu.run("blockdev-del", json!({ "node-name": orphan })))?;
    }
    remove_fdsets(qemu)
}

/// libvirt's nodes below a filter of ours whose disk was unplugged: libvirt wanted to take them away then, and could not
/// because of us. Left there, they would keep the image locked.
fn orphans<'a>(qemu: &Qemu, filters: impl Iterator<Item = &'a String>) -> Result<Vec<String>, DiskError> {
    let devices = qemu.devices()?;
    let mut orphans = Vec::new();
    for filter in filters {
        let chain = qemu.chain(filter)?;
        let used = chain.iter().any(|node| devices.iter().any(|device| device.node == *node));
        if !used {
            orphans.extend(chain.into_iter().filter(|node| node.starts_with(LIBVIRTS)));
        }
    }
    Ok(orphans)
}

fn ours(qemu: &Qemu) -> Result<Vec<String>, DiskError> {
    let names = qemu.nodes()?.into_iter().map(|node| node.name);
    Ok(names.filter(|name| name.starts_with(PREFIX)).collect())
}

fn remove_exports(qemu: &Qemu) -> Result<(), DiskError> {
    let ours = || -> Result<Vec<String>, DiskError> {
        Ok(qemu.exports()?.into_iter().filter(|id| id.starts_with(PREFIX)).collect())
    };
    for id in ours()? {
        // Refused if it is on its way out already; whether it is gone is seen below.
        refusable(qemu.run("block-export-del", json!({ "id": id, "mode": "hard" })))?;
    }
    qemu.until("an export of a disk", || Ok(ours()?.is_empty()))
}

fn stop_server(qemu: &Qemu) -> Result<(), DiskError> {
    // The mark is set before the server is started: killed in between, the server may be somebody else's by now.
    if qemu.exports()?.is_empty() {
        refusable(qemu.run("nbd-server-stop", json!({})))?;
    }
    qemu.delete_node(SERVER_MARK)
}

/// Gives each device that writes through a filter of ours the node below it.
fn unsplice(qemu: &Qemu) -> Result<(), DiskError> {
    for device in qemu.devices()?.iter().filter(|device| device.node.starts_with(FILTER)) {
        let mut below = qemu.filtered(&device.node)?;
        loop {
            qemu.set_drive(&device.qom_path(), &below)?;
            // An external snapshot may have slipped in: then the filter sits on the new top by now, and so must we.
            let now = qemu.filtered(&device.node)?;
            if now == below {
                break;
            }
            below = now;
        }
    }
    Ok(())
}

fn remove_fdsets(qemu: &Qemu) -> Result<(), DiskError> {
    let sets = qemu.run("query-fdsets", json!({}))?;
    for set in list("query-fdsets", &sets)? {
        let fds = set["fds"].as_array().map(Vec::as_slice).unwrap_or_default();
        let ours =
            |fd: &serde_json::Value| fd["opaque"].as_str().is_some_and(|words| words.starts_with(PREFIX));
        if !fds.is_empty() && fds.iter().all(ours) {
            refusable(qemu.run("remove-fd", json!({ "fdset-id": set["fdset-id"] })))?;
        }
    }
    Ok(())
}

/// Whether QEMU did it; a refusal means that there was nothing to do.
fn refusable(answer: Result<serde_json::Value, DiskError>) -> Result<bool, DiskError> {
    match answer {
        Ok(_) => Ok(true),
        Err(DiskError::Monitor(MonitorError::Refused { .. })) => Ok(false),
        Err(error) => Err(error),
    }
}

const SCRATCH: &str = "lifeboat-buf-";
/// How libvirt calls the nodes that it makes.
const LIBVIRTS: &str = "libvirt-";
