//! A guest that is off: what its disks hold is read from their files ([`cut`]), when these are other than at its last point
//! ([`stands`]).
//! Promises: its start is never hindered, as no lock is held and whoever starts it is given way to; what was read counts only
//! if it was off, and its files were left alone, from [`SETTLES`] before the first byte until after the last. One that goes on
//! elsewhere, or from a saved state, is not taken to be off. What it was at its last point is remembered over a restart of the
//! agent, and of the host.

pub mod cut;
pub mod stands;

use super::{State, look};
use crate::capture::source::CaptureError;
use lifeboat::{
    durable,
    hypervisor::{
        domain_xml::DomainSpec,
        libvirt::{Domain, Off, XmlView},
    },
    id::{PointId, VmId},
};
use serde::{Deserialize, Serialize};
use stands::{OffDisk, Stands};
use std::{
    collections::VecDeque,
    fs, io,
    path::PathBuf,
    time::{Duration, Instant},
};

/// A guest that is off for so long, with files that nobody writes to, stays so for now: one that is only restarted runs again
/// by then.
pub const SETTLES: Duration = Duration::from_secs(5);
/// Points that may be under way, and the last durable one.
const KNOWN_MAX: usize = 4;

/// What is known of one VM's disks at rest.
pub struct Resting {
    vm: VmId,
    dir: PathBuf,
    /// What stands there, and since when as far as we have looked.
    seen: Option<(Stands, Instant)>,
    /// Somebody wanted it off, as libvirt said in this time that it is off.
    wanted: Option<bool>,
    /// Points of it at rest, newest last.
    known: VecDeque<AtRest>,
    kept: Option<AtRest>,
}

/// One point of a guest that was off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct AtRest {
    point: PointId,
    stands: Stands,
    disks: Vec<(String, u64)>,
    wanted: bool,
}

/// A guest that is off, as it was found.
pub struct Stood {
    domain: Domain,
    xml: String,
    disks: Vec<OffDisk>,
    stands: Stands,
    /// It is to be off at the site as well.
    wanted: bool,
    /// Sizes of its disks, if the point that is to be built on is of them as they stand.
    unchanged: Option<Vec<(String, u64)>>,
}

impl Stood {
    /// The newest point is of what stands there.
    pub fn is_unchanged(&self) -> bool {
        self.unchanged.is_some()
    }
}

impl Resting {
    /// Takes up what an agent before us knew. A record that can't be read costs a comparison.
    pub fn open(vm: VmId, dir: PathBuf) -> Self {
        let text = fs::read(dir.join(format!("{vm}.json"))).ok();
        let kept: Option<AtRest> = text.and_then(|text| serde_json::from_slice(&text).ok());
        Self { vm, dir, seen: None, wanted: None, known: kept.iter().cloned().collect(), kept }
    }

    /// The next point is compared with what the site holds.
    pub fn forget(&mut self) {
        self.known.clear();
    }

    fn wakes(&mut self) {
        (self.seen, self.wanted) = (None, None);
    }

    /// Whether it has been seen so for long enough.
    fn has_settled(&mut self, stands: &Stands) -> bool {
        if self.seen.as_ref().is_none_or(|(before, _)| before != stands) {
            self.seen = Some((stands.clone(), Instant::now()));
        }
        self.seen.as_ref().is_some_and(|(_, since)| since.elapsed() >= SETTLES)
    }

    /// Whether somebody wanted it off. What libvirt has forgotten is told by the last point, if nothing ran since.
    fn was_wanted(&mut self, off: Off, stands: &Stands, first: bool) -> bool {
        let now = match off {
            Off::Wanted => Some(true),
            Off::Failed => Some(false),
            Off::Unknown | Off::Saved | Off::MovedAway => None,
        };
        let kept = self.kept.as_ref().filter(|kept| kept.stands.same_files(stands)).map(|kept| kept.wanted);
        // One of which the site has nothing was never started, as far as anybody knows.
        *self.wanted.insert(now.or(self.wanted).or(kept).unwrap_or(first))
    }

    fn sent(&mut self, at_rest: AtRest) {
        self.known.push_back(at_rest);
        while self.known.len() > KNOWN_MAX {
            self.known.pop_front();
        }
    }

    /// A point has become durable; `false` if it is none of a guest that was off. Blocks.
    pub fn settle(&mut self, point: PointId) -> bool {
        let Some(known) = self.known.iter().find(|known| known.point == point) else { return false };
        let told = |kept: &AtRest| kept.stands == known.stands && kept.wanted == known.wanted;
        if !self.kept.as_ref().is_some_and(told) {
            let written = self.write(known);
            if let Err(error) = written {
                tracing::warn!(vm = %self.vm, %error, "what was off could not be remembered; it is compared after a restart");
            }
            self.kept = Some(known.clone());
        }
        true
    }

    fn write(&self, known: &AtRest) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        durable::replace(&self.dir.join(format!("{}.json", self.vm)), &serde_json::to_vec(known)?, 0o600)
    }
}

/// Looks whether the guest is off; `None` if it is not. Blocks.
pub fn look(state: &mut State, over: &[PointId]) -> Result<Option<Stood>, CaptureError> {
    let domain = state.domain()?;
    let Some(off) = domain.off().map_err(look::domain_error)? else {
        state.resting.wakes();
        return Ok(None);
    };
    let name = domain.name().to_owned();
    let not = |why: String| CaptureError::NotRunning(format!("domain `{name}` {why}"));
    match off {
        Off::MovedAway => return Err(not("is shut off: it was migrated".into())),
        Off::Saved => {
            let why = "is shut off, and saved: it goes on from there, and its last point stays its newest";
            return Err(not(why.into()));
        }
        Off::Wanted | Off::Failed | Off::Unknown => {}
    }
    let xml = domain.xml(XmlView::Inactive).map_err(look::domain_error)?;
    let spec = DomainSpec::read(&xml).map_err(super::failed)?;
    if !spec.disk_obstacles.is_empty() {
        return Err(look::unsupported(&spec, &spec.disk_obstacles.join(". ")));
    }
    let unread =
        |why: String| not(format!("is shut off, and its disks can't be read without its QEMU: {why}"));
    let disks = stands::disks_of(&spec).map_err(unread)?;
    let stands = Stands::look(&disks, &xml).map_err(unread)?;
    if !state.resting.has_settled(&stands) {
        return Err(not("is shut off".into()));
    }
    let wanted = state.resting.was_wanted(off, &stands, over.is_empty());
    // Its QEMU is gone, and with it whatever we knew of it.
    (state.disks, state.device_state) = (None, None);
    let told = |known: &&AtRest| {
        Some(&known.point) == over.last() && known.stands == stands && known.wanted == wanted
    };
    let unchanged = state.resting.known.iter().find(told).map(|known| known.disks.clone());
    Ok(Some(Stood { domain, xml, disks, stands, wanted, unchanged }))
}

impl Stood {
    /// It is still off, and nothing of it was touched. Blocks.
    fn is_still_so(&self) -> Result<(), CaptureError> {
        let off = self.domain.off().map_err(look::domain_error)?;
        let now = || {
            let xml = self.domain.xml(XmlView::Inactive).map_err(look::domain_error)?;
            Stands::look(&self.disks, &xml).map_err(super::failed)
        };
        match off {
            Some(Off::Wanted | Off::Failed | Off::Unknown) if now()? == self.stands => Ok(()),
            Some(Off::Wanted | Off::Failed | Off::Unknown) => {
                Err(super::failed("its disks or its XML were changed while it was off and they were read"))
            }
            None | Some(Off::Saved | Off::MovedAway) => Err(super::failed(STARTED)),
        }
    }
}

const STARTED: &str = "it was started while its disks were read";

#[cfg(test)]
mod tests {
    use super::*;

    fn stands(dir: &tempfile::TempDir, bytes: &str) -> Stands {
        let path = dir.path().join("disk");
        fs::write(&path, bytes).unwrap();
        Stands::look(&[OffDisk { target: "vda".into(), path, format: "raw".into() }], "<domain/>").unwrap()
    }

    fn at_rest(no: u8, stands: &Stands, wanted: bool) -> AtRest {
        AtRest { point: PointId::from_bytes([no; 16]), stands: stands.clone(), disks: Vec::new(), wanted }
    }

    /// Goal: a guest that nobody wanted off is not taken for one that is to stay off, whatever was forgotten.
    #[test]
    fn whether_it_was_wanted_is_libvirts_word_or_else_that_of_a_point_since_which_nothing_ran() {
        let dir = tempfile::tempdir().unwrap();
        let vm = VmId::from_bytes([1; 16]);
        let open = || Resting::open(vm, dir.path().join("off"));
        let before = stands(&dir, "one");
        let mut resting = open();
        assert!(resting.was_wanted(Off::Unknown, &before, true), "never started");
        assert!(resting.was_wanted(Off::Wanted, &before, false));
        assert!(resting.was_wanted(Off::Unknown, &before, false), "libvirtd was restarted");
        resting.wakes();
        assert!(!resting.was_wanted(Off::Unknown, &before, false), "its host lost power, say");
        assert!(!resting.was_wanted(Off::Failed, &before, true));
        for wanted in [true, false] {
            let mut resting = open();
            resting.sent(at_rest(7, &before, wanted));
            assert!(
                resting.settle(PointId::from_bytes([7; 16])) && !resting.settle(PointId::from_bytes([8; 16]))
            );
            let mut next = open();
            assert_eq!(next.known.len(), 1, "it outlives the agent");
            assert_eq!(next.was_wanted(Off::Unknown, &before, false), wanted);
            let after = stands(&dir, if wanted { "three" } else { "two" });
            assert!(!open().was_wanted(Off::Unknown, &after, false), "it ran since");
            assert!(before != after);
            fs::remove_file(dir.path().join("off").join(format!("{vm}.json"))).unwrap();
        }
    }

    #[test]
    fn what_changes_is_looked_at_anew_before_anything_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let mut resting = Resting::open(VmId::from_bytes([1; 16]), dir.path().join("off"));
        let one = stands(&dir, "one");
        assert!(!resting.has_settled(&one));
        resting.seen = Some((one.clone(), Instant::now().checked_sub(SETTLES).unwrap()));
        assert!(resting.has_settled(&one));
        assert!(!resting.has_settled(&stands(&dir, "other")));
        resting.seen = Some((one.clone(), Instant::now().checked_sub(SETTLES).unwrap()));
        resting.wakes();
        assert!(!resting.has_settled(&one));
    }
}
