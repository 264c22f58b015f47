//! The instant: pause, memory, devices, disk marks, resume. Everything of a point is of here.
//! Promises: disks are marked in one transaction; whatever fails, the pause ends, and nothing of the point counts.

use super::{State, blobs::Blob, failed, frozen, images, look};
use crate::capture::{meeting::Meeting, others, quiesce::QuiesceError, source::CaptureError};
use bytes::Bytes;
use lifeboat::{
    fault,
    format::manifest::{Consistency, ImageKind, PointMeta, PointStats, blob},
    hypervisor::{libvirt::XmlView, monitor::Monitor},
    id::PointId,
    page::PageGroup,
    units::UnixMs,
};
use look::Begun;
use serde_json::json;
use std::time::Duration;

/// What was cut, besides the memory that the engine has staged.
pub struct Barrier {
    pub meta: PointMeta,
    pub blobs: Vec<Blob>,
    /// Number of the first disk's image; the others follow.
    pub first_disk: u16,
}

/// What the pause left.
struct Instant {
    cut_at: UnixMs,
    device_state: Vec<u8>,
    was_running: bool,
    pause: Duration,
    consistency: Consistency,
}

pub fn cut(
    state: &mut State,
    begun: &Begun,
    point: PointId,
    meeting: Option<&Meeting>,
) -> Result<Barrier, CaptureError> {
    let active_xml = begun.domain.xml(XmlView::Active).map_err(look::domain_error)?;
    // What it will start with next time; a transient domain has no such thing.
    let persistent = begun.domain.is_persistent().map_err(look::domain_error)?;
    let definition = persistent.then(|| begun.domain.xml(XmlView::Inactive)).transpose();
    let definition = definition.map_err(look::domain_error)?;
    if look::read_spec(&begun.domain)? != begun.spec {
        return Err(failed("the domain was reconfigured while it was being cut"));
    }
    let memory = !begun.ram.is_empty();
    if let Some(attached) = &mut state.disks {
        attached.disks.prepare(point).map_err(failed)?;
    }
    fault::point("cut.disks-prepared");
    // Only now: a block job that begins after this puts itself below our filters, one that was there before would be
    // passed by. And a pause in the middle of a save or a migration is none of our business.
    if let Some(others) = others::somebody(&begun.domain) {
        return Err(CaptureError::Busy(others));
    }
    let instant =
        if memory { with_memory(state, begun, meeting)? } else { disks_only(state, begun, meeting)? };
    fault::point("cut.resumed");
    if let Some(others) = others::somebody(&begun.domain) {
        return Err(CaptureError::Busy(others));
    }
    if memory && state.take_resets() {
        return Err(failed("the guest was reset while it was being cut"));
    }
    let mut blobs = vec![(blob::DOMAIN_XML, Bytes::from(active_xml))];
    blobs.extend(definition.map(|xml| (blob::DEFINITION_XML, Bytes::from(xml))));
    if memory {
        blobs.push((blob::MACHINE_CONFIG, Bytes::from(state.memory.machine_config())));
        blobs.push((blob::DEVICE_STATE, Bytes::from(instant.device_state.clone())));
        let saved_by = state.device_state.as_ref().map(|(_, room)| room.version().to_string());
        blobs.extend(saved_by.map(|version| (blob::QEMU_VERSION, Bytes::from(version))));
    }
    describe(state, begun, instant, blobs)
}

/// The next pages of the running guest. It is stopped for a moment first where the engine wants that.
pub fn before(state: &mut State, begun: &Begun) -> Result<Option<PageGroup>, CaptureError> {
    loop {
        if !state.memory.wants_early_pause() {
            let pages = state.memory.before().map_err(failed)?;
            if pages.is_some() || !state.memory.wants_early_pause() {
                return Ok(pages);
            }
        }
        if let Some(others) = others::somebody(&begun.domain) {
            return Err(CaptureError::Busy(others));
        }
        let paused = state.pauser.pause(state.settings.vm, begun.monitor.clone()).map_err(pause_error)?;
        state.memory.early_pause().map_err(failed)?;
        let pause = paused.resume().map_err(pause_error)?;
        tracing::debug!(pause_us = pause.as_micros(), "paused before the cut, to clear page flags");
    }
}

fn with_memory(state: &mut State, begun: &Begun, meeting: Option<&Meeting>) -> Result<Instant, CaptureError> {
    let mut steps = Steps::new();
    let paused = state.pauser.pause(state.settings.vm, begun.monitor.clone()).map_err(pause_error)?;
    let cut_at = stands(state, meeting, paused.was_running());
    steps.took("stop");
    state.memory.drain().map_err(failed)?;
    steps.took("memory");
    fault::point("cut.memory-read");
    let room = state.device_state.as_mut().ok_or_else(|| failed("no room for device state was made"))?;
    let device_state = room.1.save(&*begun.monitor).map_err(failed)?;
    steps.took("device");
    fault::point("cut.device-saved");
    mark_disks(&mut state.disks, &*begun.monitor)?;
    steps.took("disk");
    fault::point("cut.disks-marked");
    wait_for_others(meeting);
    steps.took("others");
    let was_running = paused.was_running();
    let resumed = if state.memory.finish(was_running).map_err(failed)? {
        paused.was_resumed()
    } else {
        paused.resume()
    };
    if let Err(QuiesceError::Broken { why }) = &resumed {
        // Too long a pause, most likely: another engine's may be shorter.
        state.memory.failed(format!("the pause was ended from outside ({why})"));
    }
    let pause = resumed.map_err(pause_error)?;
    steps.took("cont");
    tracing::debug!(pause_us = pause.as_micros(), "paused for {steps}");
    Ok(Instant { cut_at, device_state, was_running, pause, consistency: Consistency::Memory })
}

/// What a pause was spent on.
struct Steps {
    since: std::time::Instant,
    took: Vec<(&'static str, Duration)>,
}

impl Steps {
    fn new() -> Self {
        Self { since: std::time::Instant::now(), took: Vec::new() }
    }

    fn took(&mut self, step: &'static str) {
        let now = std::time::Instant::now();
        self.took.push((step, now - std::mem::replace(&mut self.since, now)));
    }
}

impl std::fmt::Display for Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, (step, took)) in self.took.iter().enumerate() {
            write!(f, "{}{step} {} us", if at == 0 { "" } else { ", " }, took.as_micros())?;
        }
        Ok(())
    }
}

/// Without memory the pause is only for the disks' views to begin at the same instant.
fn disks_only(state: &mut State, begun: &Begun, meeting: Option<&Meeting>) -> Result<Instant, CaptureError> {
    // Declared first: on any way out it is dropped after the pause, as no guest thaws that stands.
    let frozen = frozen::held(state);
    let paused = state.pauser.pause(state.settings.vm, begun.monitor.clone()).map_err(pause_error)?;
    let cut_at = stands(state, meeting, paused.was_running());
    mark_disks(&mut state.disks, &*begun.monitor)?;
    fault::point("cut.disks-marked");
    wait_for_others(meeting);
    let was_running = paused.was_running();
    let pause = paused.resume().map_err(pause_error)?;
    let consistency = frozen::thaw(state, &begun.freezable, frozen);
    Ok(Instant { cut_at, device_state: Vec::new(), was_running, pause, consistency })
}

/// The guest stands: those that it meets are told. Returns the instant that its point bears.
fn stands(state: &State, meeting: Option<&Meeting>, ran: bool) -> UnixMs {
    match meeting {
        Some(meeting) => {
            meeting.stands(ran);
            fault::point("together.stands");
            meeting.at
        }
        None => state.clock.now(),
    }
}

/// All of this guest's own is done; the others may still be coming.
fn wait_for_others(meeting: Option<&Meeting>) {
    if let Some(meeting) = meeting {
        let kept = meeting.wait();
        tracing::debug!(kept, "waited for the other guests of the cut");
    }
}

fn mark_disks(disks: &mut Option<super::AttachedDisks>, monitor: &dyn Monitor) -> Result<(), CaptureError> {
    let Some(attached) = disks else { return Ok(()) };
    let actions = attached.disks.mark_actions();
    if !actions.is_empty() {
        monitor.execute("transaction", json!({ "actions": actions })).map_err(failed)?;
    }
    attached.disks.marked();
    Ok(())
}

fn describe(
    state: &State,
    begun: &Begun,
    instant: Instant,
    blobs: Vec<(&'static str, Bytes)>,
) -> Result<Barrier, CaptureError> {
    let disks = state.disks.iter().flat_map(|attached| attached.disks.images()).collect();
    let mut images = images::number(&begun.ram, disks)?;
    let first_disk = images.iter().filter(|image| image.kind == ImageKind::Ram).count();
    let first_disk = u16::try_from(first_disk).map_err(failed)?;
    let first_blob = images.len();
    let numbered = blobs.into_iter().enumerate().map(|(at, (name, bytes))| {
        let no = u16::try_from(first_blob + at).map_err(|_| failed("the guest has too many images"))?;
        Ok(Blob { no, name, bytes })
    });
    let blobs = numbered.collect::<Result<Vec<_>, CaptureError>>()?;
    images.extend(blobs.iter().map(Blob::image));
    let stats = PointStats {
        pause_us: u64::try_from(instant.pause.as_micros()).unwrap_or(u64::MAX),
        memory_changed_bytes: state.memory.changed_bytes(),
        disk_changed_bytes: 0,
    };
    let (consistency, was_running) = (instant.consistency, instant.was_running);
    let meta = PointMeta { cut_at: instant.cut_at, images, consistency, was_running, stats, cut: None };
    meta.check().map_err(failed)?;
    Ok(Barrier { meta, blobs, first_disk })
}

pub fn pause_error(error: QuiesceError) -> CaptureError {
    match error {
        QuiesceError::Status { .. } => CaptureError::NotRunning(error.to_string()),
        QuiesceError::Marker(_)
        | QuiesceError::Watchdog(_)
        | QuiesceError::Monitor(_)
        | QuiesceError::Broken { .. } => CaptureError::Failed(error.to_string()),
    }
}
