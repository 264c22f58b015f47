//! The blocking half of [`super::Disks`]: what is known of each disk, and every conversation with QEMU's monitor.
//! Promises: each step can be called again after it failed. Called by `disk` only, from blocking threads.

use super::{
    DiskError, DiskImage, DiskTarget, marks,
    marks::{Owed, owed},
    names::{FILTER, Mark, Names},
    qemu::{Device, Qemu},
    scratch::Scratch,
    serve::{Lines, Offer, serve},
    sweep::sweep,
};
use lifeboat::id::{PointId, VmId};
use serde_json::{Value, json};
use std::{path::PathBuf, sync::Arc};

pub(super) struct Core {
    qemu: Qemu,
    vm: VmId,
    scratch_dir: PathBuf,
    pub disks: Vec<Disk>,
    point: Option<PointId>,
    /// The newest point known to be durable, and those sent since, in order: whose marks are kept.
    over: Vec<PointId>,
    /// Why the views of this point are no good, if they are not.
    torn: Option<DiskError>,
}

pub(super) struct Disk {
    pub target: String,
    alias: String,
    qom_path: String,
    /// The node that the guest writes to when no filter of ours is in between.
    node: String,
    pub bytes: u64,
    /// The mark that holds what is owed since the basis.
    pub old: Option<String>,
    cut: Option<ThisCut>,
}

/// What one point added to a disk.
struct ThisCut {
    names: Names,
    mark: String,
    scratch: Arc<Scratch>,
}

impl Core {
    pub fn attach(
        qemu: Qemu,
        vm: VmId,
        targets: &[DiskTarget],
        scratch_dir: PathBuf,
    ) -> Result<Self, DiskError> {
        let devices = if targets.is_empty() { Vec::new() } else { qemu.devices()? };
        let disks = targets.iter().map(|target| Disk::find(&qemu, &devices, &target.target, &target.alias));
        let disks = disks.collect::<Result<_, _>>()?;
        Ok(Self { qemu, vm, scratch_dir, disks, point: None, over: Vec::new(), torn: None })
    }

    pub fn recover(&mut self, over: &[PointId]) -> Result<(), DiskError> {
        self.forget_cut();
        self.over = over.to_vec();
        sweep(&self.qemu)?;
        let (devices, nodes) = (self.qemu.devices()?, self.qemu.nodes()?);
        let mut actions = Vec::new();
        for disk in &mut self.disks {
            *disk = Disk::find(&self.qemu, &devices, &disk.target, &disk.alias)?;
            let bitmaps =
                nodes.iter().find(|node| node.name == disk.node).map(|node| node.bitmaps.as_slice());
            let owed = owed(bitmaps.unwrap_or_default(), over, disk.bytes);
            actions.extend(owed.actions(&disk.node));
            disk.old = owed.old().map(str::to_owned);
        }
        // Marks on nodes that no disk writes to any more (below a snapshot, or of a disk that is no longer protected).
        for node in nodes.iter().filter(|node| self.disks.iter().all(|disk| disk.node != node.name)) {
            actions.extend(owed(&node.bitmaps, &[], 0).actions(&node.name));
        }
        self.qemu.transaction(actions)
    }

    pub fn prepare(&mut self, point: PointId) -> Result<(), DiskError> {
        if self.point.is_some() {
            return Err(DiskError::OutOfOrder { asked: "prepare a point" });
        }
        self.point = Some(point);
        for disk in &mut self.disks {
            let names = Names::of(self.vm, &disk.target, point);
            let scratch = Scratch::create(&self.scratch_dir, disk.bytes)?;
            let file = scratch.pass_to(&self.qemu, &names.scratch)?;
            let mark = Mark { point, bytes: disk.bytes }.name();
            self.qemu.run("blockdev-add", filter(&names, &disk.node, &file))?;
            disk.cut = Some(ThisCut { names, mark, scratch: Arc::new(scratch) });
        }
        Ok(())
    }

    pub fn mark_actions(&self) -> Vec<Value> {
        let mut actions = Vec::new();
        for (disk, cut) in self.disks.iter().filter_map(|disk| Some((disk, disk.cut.as_ref()?))) {
            actions.push(marks::add(&disk.node, &cut.mark));
            if let Some(old) = &disk.old {
                actions.push(marks::disable(&disk.node, old));
            }
        }
        actions
    }

    pub fn marked(&mut self) {
        if let Err(error) = self.splice() {
            self.torn = Some(error);
        }
    }

    /// Puts each disk's filter between the guest and the disk. Instant and consistent because the guest stands still.
    fn splice(&self) -> Result<(), DiskError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        if self.qemu.is_running()? {
            return Err(DiskError::NotStopped);
        }
        let devices = self.qemu.devices()?;
        for disk in &self.disks {
            let reconfigured = |what| DiskError::Reconfigured { target: disk.target.clone(), what };
            let device = devices.iter().find(|device| device.is(&disk.alias));
            let device = device.ok_or_else(|| reconfigured("it was unplugged"))?;
            if device.node != disk.node {
                return Err(reconfigured("another node took its place"));
            }
            if device.bytes != disk.bytes {
                return Err(reconfigured("its size changed"));
            }
            let cut = disk.cut.as_ref().ok_or(DiskError::OutOfOrder { asked: "mark" })?;
            self.qemu.set_drive(&disk.qom_path, &cut.names.filter)?;
        }
        Ok(())
    }

    /// Serves the views; what each connection is for, in the order of the disks.
    pub fn open_views(&mut self) -> Result<Vec<Opened>, DiskError> {
        if let Some(torn) = self.torn.take() {
            return Err(torn);
        }
        if self.disks.is_empty() {
            return Ok(Vec::new());
        }
        let mut offers = Vec::with_capacity(self.disks.len());
        let mut opened = Vec::with_capacity(self.disks.len());
        for disk in &self.disks {
            let cut = disk.cut.as_ref().ok_or(DiskError::OutOfOrder { asked: "open views" })?;
            let Names { filter, access, export, .. } = cut.names.clone();
            opened.push((
                disk.target.clone(),
                disk.bytes,
                export.clone(),
                disk.old.clone(),
                cut.scratch.clone(),
            ));
            let mark = disk.old.clone().map(|old| (disk.node.clone(), old));
            offers.push(Offer { filter, access, export, mark });
        }
        let lines = serve(&self.qemu, &self.scratch_dir, &offers)?;
        let opened = opened.into_iter().zip(lines);
        let opened = opened.map(|((target, bytes, export, old, scratch), lines)| Opened {
            target,
            bytes,
            export,
            old,
            scratch,
            lines,
        });
        Ok(opened.collect())
    }

    pub fn close_views(&mut self) -> Result<(), DiskError> {
        sweep(&self.qemu)
    }

    pub fn sent(&mut self, point: PointId) -> Result<(), DiskError> {
        if self.point != Some(point) {
            return Err(DiskError::OutOfOrder { asked: "send a point that was not cut" });
        }
        for disk in &mut self.disks {
            disk.old = disk.cut.as_ref().map(|cut| cut.mark.clone());
        }
        self.over.push(point);
        self.forget_cut();
        Ok(())
    }

    pub fn settle(&mut self, point: PointId) -> Result<(), DiskError> {
        // Of a point that is not known nothing is: the next `recover` finds out.
        let Some(at) = self.over.iter().position(|of| *of == point).filter(|_| self.point.is_none()) else {
            return Err(DiskError::OutOfOrder { asked: "settle a point that was not sent" });
        };
        let nodes = if self.disks.is_empty() { Vec::new() } else { self.qemu.nodes()? };
        let mut actions = Vec::new();
        for disk in &self.disks {
            let bitmaps =
                nodes.iter().find(|node| node.name == disk.node).map(|node| node.bitmaps.as_slice());
            let outdated = marks::outdated(bitmaps.unwrap_or_default(), &self.over[at..]);
            actions.extend(outdated.map(|name| marks::remove(&disk.node, name)));
        }
        self.qemu.transaction(actions)?;
        self.over.drain(..at);
        Ok(())
    }

    pub fn put_back(&mut self) -> Result<(), DiskError> {
        sweep(&self.qemu)?;
        let nodes = self.qemu.nodes()?;
        let mut actions = Vec::new();
        for disk in &self.disks {
            let Some(cut) = &disk.cut else { continue };
            let here = |name: &str| {
                let mut nodes = nodes.iter().filter(|node| node.name == disk.node);
                nodes.any(|node| node.bitmaps.iter().any(|bitmap| bitmap.name == name))
            };
            // Without the new mark there was no cut, and the old one never stopped.
            if here(&cut.mark) {
                match disk.old.as_deref().filter(|old| here(old)) {
                    Some(old) => {
                        actions.extend(marks::take_back(&disk.node, old, std::slice::from_ref(&cut.mark)));
                    }
                    None => actions.push(marks::remove(&disk.node, &cut.mark)),
                }
            }
        }
        self.qemu.transaction(actions)?;
        self.forget_cut();
        Ok(())
    }

    pub fn clear(&mut self) -> Result<(), DiskError> {
        sweep(&self.qemu)
    }

    pub fn detach(&mut self) -> Result<(), DiskError> {
        sweep(&self.qemu)?;
        let nodes = self.qemu.nodes()?;
        let actions = nodes.iter().flat_map(|node| match owed(&node.bitmaps, &[], 0) {
            Owed::Full { remove } => remove.iter().map(|name| marks::remove(&node.name, name)).collect(),
            Owed::Delta { .. } => Vec::new(),
        });
        self.qemu.transaction(actions.collect())?;
        self.disks.iter_mut().for_each(|disk| disk.old = None);
        self.over.clear();
        self.forget_cut();
        Ok(())
    }

    pub fn images(&self) -> Vec<DiskImage> {
        let image = |disk: &Disk| DiskImage {
            target: disk.target.clone(),
            bytes: disk.bytes,
            full: disk.old.is_none(),
        };
        self.disks.iter().map(image).collect()
    }

    fn forget_cut(&mut self) {
        self.point = None;
        self.torn = None;
        self.disks.iter_mut().for_each(|disk| disk.cut = None);
    }
}

/// One disk's view, served and connected to.
pub(super) struct Opened {
    pub target: String,
    pub bytes: u64,
    pub export: String,
    pub old: Option<String>,
    pub scratch: Arc<Scratch>,
    pub lines: Lines,
}

impl Disk {
    fn find(qemu: &Qemu, devices: &[Device], target: &str, alias: &str) -> Result<Self, DiskError> {
        let untracked = |why: &str| DiskError::Untracked { target: target.into(), why: why.into() };
        let device = devices.iter().find(|device| device.is(alias));
        let device = device.ok_or_else(|| {
            untracked(&format!(
                "QEMU's block layer has no disk with alias `{alias}` (passthrough, vhost-user, or empty?)"
            ))
        })?;
        if device.read_only {
            return Err(untracked("it is read-only: nothing can change on it"));
        }
        if device.bytes == 0 {
            return Err(untracked("it has no size"));
        }
        let (qom_path, bytes) = (device.qom_path(), device.bytes);
        let kind = qemu.run("qom-get", json!({ "path": qom_path, "property": "type" }))?;
        if matches!(kind.as_str(), Some("scsi-block" | "scsi-generic")) {
            return Err(untracked(
                "it is a SCSI passthrough device, whose writes QEMU's block layer does not see",
            ));
        }
        if let Some(why) = qemu.iothread_risk(&qom_path)? {
            return Err(untracked(why));
        }
        let node = &device.node;
        let node = if node.starts_with(FILTER) { qemu.filtered(node)? } else { node.clone() };
        let (target, alias) = (target.into(), alias.into());
        Ok(Self { target, alias, qom_path, node, bytes, old: None, cut: None })
    }
}

/// The filter that keeps old data, not in anybody's way yet. If old data can't be kept, or not in time, the view breaks
/// and the guest's write goes on.
fn filter(names: &Names, node: &str, scratch_file: &str) -> Value {
    json!({
        "driver": "copy-before-write",
        "node-name": names.filter,
        "file": node,
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": KEEP_WITHIN_S,
        // Without it, the guest's discards would end here.
        "discard": "unmap",
        "target": {
            "driver": "file",
            "node-name": names.scratch,
            "filename": scratch_file,
            "locking": "off",
            "discard": "unmap",
            "detect-zeroes": "unmap",
        },
    })
}

/// Seconds by which a guest's write may be held up while old data is kept.
const KEEP_WITHIN_S: u32 = 3;
