//! What is known of the running QEMU whose memory is captured: where its blocks are, and whether that still holds.
//! Promises: the layout is that of the guest as it is now, read anew after a reset, a change of blocks or another QEMU
//! process; pages come from wherever their block is. Shared by the engines that read memory themselves.

use super::{
    MemoryError, Target,
    head::{self, Contents},
    layout::{self, Layout, Place},
    process_memory,
};
use lifeboat::page::PAGE;
use std::time::{Duration, Instant};

/// Firmware rewrites its tables for some time after a reset; what was read before then is read once more.
const FIRMWARE_BUSY: Duration = Duration::from_secs(30);

pub struct Known {
    pub target: Target,
    pub layout: Layout,
    /// Read so soon after a reset that the firmware may not have been done; read again after this.
    again_after: Option<Instant>,
    /// The look that gave this read the layout, and the contents of blocks without an address.
    pub anew: bool,
}

impl Known {
    /// Looks at the running guest; `before` is what was known of it.
    pub fn look(before: Option<Self>, target: &Target) -> Result<Self, MemoryError> {
        let fingerprint = layout::fingerprint(target)?;
        let now = Instant::now();
        let usable = before.filter(|known| {
            known.target.process == target.process
                && known.layout.fingerprint == fingerprint
                && !target.may_have_reset
                && known.again_after.is_none_or(|after| now < after)
        });
        if let Some(mut known) = usable {
            known.layout.place_missing(target)?;
            return Ok(Self { anew: false, ..known });
        }
        let age = target.process.age_seconds().map_or(Duration::ZERO, Duration::from_secs_f64);
        let settled = !target.may_have_reset && age > FIRMWARE_BUSY;
        let layout = Layout::find(target, head::read(target)?, fingerprint)?;
        let again_after = (!settled).then(|| now + FIRMWARE_BUSY);
        Ok(Self { target: target.clone(), layout, again_after, anew: true })
    }

    /// Refuses if a block came, went or grew since the look.
    pub fn check_layout(&self) -> Result<(), MemoryError> {
        if layout::fingerprint(&self.target)? == self.layout.fingerprint {
            Ok(())
        } else {
            Err(MemoryError::Changed { what: "a memory block came, went or grew".into() })
        }
    }

    /// Refuses if the process that was read is gone: its number may be another's by now.
    pub fn check_alive(&self) -> Result<(), MemoryError> {
        if self.target.process.is_alive() {
            Ok(())
        } else {
            Err(MemoryError::Changed { what: "its QEMU process ended".into() })
        }
    }

    /// Reads pages of a block from wherever it is.
    pub fn read(&self, block: usize, first: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let offset = first * PAGE as u64;
        match (&self.layout.blocks[block].place, &self.layout.head.contents[block]) {
            (Place::Host { address }, _) => process_memory::read(self.target.process, address + offset, into),
            (Place::Head, Contents::Whole(whole)) => {
                into.copy_from_slice(&whole[offset as usize..offset as usize + into.len()]);
                Ok(())
            }
            (Place::Head, Contents::Samples(_)) => {
                Err(MemoryError::Layout { what: format!("block {block} has neither address nor contents") })
            }
        }
    }

    /// What a test knows without a QEMU to look at.
    #[cfg(test)]
    pub fn of(target: Target, layout: Layout) -> Self {
        Self { target, layout, again_after: None, anew: true }
    }
}
