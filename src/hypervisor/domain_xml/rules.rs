//! What can't be protected, and what to do about it. One rule per thing that a cut would miss or that a replica
//! could not have.

use super::{attribute, devices, elements};
use xmltree::Element;

/// Why the domain's memory can't be captured.
pub(super) fn memory_obstacles(root: &Element) -> Vec<String> {
    let mut found = Vec::new();
    let mut refuse = |what: String, remedy: &str| found.push(format!("{what}; {remedy}"));
    for device in devices(root) {
        device_obstacle(device, &mut refuse);
    }
    if let Some(backing) = root.get_child("memoryBacking") {
        let shared = |child: &Element| child.name == "access" && attribute(child, "mode") == "shared";
        if elements(backing).any(shared) {
            refuse(
                "its memory is shared with other processes, whose writes would be missed".into(),
                "set <access mode='private'/>",
            );
        }
    }
    let cells = root.get_child("cpu").and_then(|cpu| cpu.get_child("numa")).into_iter().flat_map(elements);
    if cells.into_iter().any(|cell| attribute(cell, "memAccess") == "shared") {
        refuse("a NUMA cell's memory is shared with other processes".into(), "remove memAccess='shared'");
    }
    if let Some(security) = root.get_child("launchSecurity") {
        let kind = attribute(security, "type").to_uppercase();
        refuse(
            format!("its memory is encrypted ({kind}) and can't be read by the host"),
            "remove <launchSecurity>",
        );
    }
    found
}

fn device_obstacle(device: &Element, refuse: &mut impl FnMut(String, &str)) {
    let (kind, model) = (attribute(device, "type"), attribute(device, "model"));
    match device.name.as_str() {
        "hostdev" => {
            let what = format!("a host device ({kind}) is passed through, whose state can't be saved");
            refuse(what, "detach the <hostdev>");
        }
        "interface" if matches!(kind, "hostdev" | "vdpa") => {
            refuse(
                format!("a network card of type {kind} is the host's own hardware"),
                "use a virtio card on a bridge",
            );
        }
        "interface" if kind == "vhostuser" => {
            refuse(
                "a vhost-user network card's process writes to memory unseen".into(),
                "use a virtio card on a bridge",
            );
        }
        "filesystem"
            if device.get_child("driver").is_some_and(|driver| attribute(driver, "type") == "virtiofs") =>
        {
            refuse("a virtiofs file system is shared with the host".into(), "detach the <filesystem>");
        }
        "filesystem" => refuse("a host folder is shared with it".into(), "detach the <filesystem>"),
        "memory" if matches!(model, "nvdimm" | "virtio-pmem") => {
            refuse(
                format!("it has persistent memory ({model}), kept in a file of the host"),
                "detach the <memory>",
            );
        }
        "memory" if model == "virtio-mem" => {
            refuse("its memory grows and shrinks by virtio-mem".into(), "use ordinary memory");
        }
        "tpm" => {
            let backend = device.get_child("backend").map_or("", |backend| attribute(backend, "type"));
            let what = if backend == "passthrough" {
                "the host's TPM is passed through"
            } else {
                "its TPM is emulated by another process, whose state is not replicated"
            };
            refuse(what.into(), "detach the <tpm>");
        }
        "shmem" => refuse("it shares memory with other guests".into(), "detach the <shmem>"),
        "disk" if kind == "vhostuser" => {
            refuse(
                "a vhost-user disk's process writes to memory unseen".into(),
                "use a virtio disk on a file",
            );
        }
        _ => {}
    }
}

/// Why the domain's disks can't be captured, memory or not.
pub(super) fn disk_obstacles(root: &Element) -> Vec<String> {
    let mut found = Vec::new();
    for disk in devices(root).filter(|device| device.name == "disk") {
        let target = disk.get_child("target").map_or("?", |target| attribute(target, "dev"));
        let mut refuse = |what: &str, remedy: &str| found.push(format!("disk {target} {what}; {remedy}"));
        if disk.get_child("readonly").is_some() || matches!(attribute(disk, "device"), "cdrom" | "floppy") {
            continue;
        }
        if attribute(disk, "device") == "lun" {
            refuse("is a SCSI device passed through, whose writes QEMU does not see", "use device='disk'");
        }
        if matches!(attribute(disk, "type"), "vhostuser" | "vhostvdpa" | "nvme") {
            refuse(
                "is written by something other than QEMU's block layer",
                "use a file, block or network disk",
            );
        }
        if disk.get_child("shareable").is_some() {
            refuse("may be written by other machines at the same time", "remove <shareable/>");
        }
        if disk.get_child("transient").is_some() {
            refuse("is thrown away at power-off", "remove <transient/>");
        }
    }
    found
}
