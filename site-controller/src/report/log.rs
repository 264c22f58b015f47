//! The slots of each group and VM, in files of thirty days, a line each: `ages/<subject>/<number>.jsonl` in `data_dir`.
//! Promises: a slot that was added is there after a power cut; a line that can't be read tells nothing, and harms no
//! other; files older than [`KEPT_DAYS`] go. Called by `recorder` and `gather`.

use super::slot::Slot;
use lifeboat::{
    durable::Appended,
    id::{GroupId, VmId},
    units::UnixMs,
};
use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

/// Whose slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Of {
    Group(GroupId),
    Vm(VmId),
}

#[derive(Debug, thiserror::Error)]
#[error("{}: {step} failed", path.display())]
pub struct SlotLogError {
    path: PathBuf,
    step: &'static str,
    source: io::Error,
}

/// Waits for a disk in each call.
#[derive(Clone, Debug)]
pub struct SlotLog {
    dir: PathBuf,
}

impl SlotLog {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Adds slots in the order of time; on disk when it returns.
    pub fn add(&self, of: Of, slots: &[Slot]) -> Result<(), SlotLogError> {
        let dir = self.folder(of);
        self.make(&dir).map_err(failed(&dir, "making it"))?;
        for of_file in slots.chunk_by(|one, other| file_no(one.from) == file_no(other.from)) {
            let path = dir.join(format!("{}.jsonl", of_file.first().map_or(0, |slot| file_no(slot.from))));
            let mut lines = Vec::new();
            for slot in of_file {
                let line = serde_json::to_vec(slot).map_err(io::Error::from);
                lines.extend(line.map_err(failed(&path, "writing"))?);
                lines.push(b'\n');
            }
            let file = Appended::open(&path, MODE).and_then(|mut file| file.append(&lines));
            file.map_err(failed(&path, "writing"))?;
        }
        Ok(())
    }

    /// Those that began at that time or later, in the order in which they were added.
    pub fn since(&self, of: Of, since: UnixMs) -> Result<Vec<Slot>, SlotLogError> {
        let mut slots = Vec::new();
        for (no, path) in self.files(of)? {
            if no >= file_no(since) {
                read(&path, &mut slots).map_err(failed(&path, "reading it"))?;
            }
        }
        slots.retain(|slot| slot.from >= since);
        Ok(slots)
    }

    /// Until when it was recorded.
    pub fn until(&self, of: Of) -> Result<Option<UnixMs>, SlotLogError> {
        let Some((_, path)) = self.files(of)?.pop() else { return Ok(None) };
        let mut slots = Vec::new();
        read(&path, &mut slots).map_err(failed(&path, "reading it"))?;
        Ok(slots.iter().map(|slot| slot.until).max())
    }

    /// Removes what is too old.
    pub fn tidy(&self, now: UnixMs) -> Result<(), SlotLogError> {
        let oldest = file_no(UnixMs(now.0.saturating_sub(KEPT_DAYS * DAY_MS)));
        let folders = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            folders => folders.map_err(failed(&self.dir, "reading it"))?,
        };
        for folder in folders {
            let folder = folder.map_err(failed(&self.dir, "reading it"))?.path();
            for (no, path) in files_of(&folder)? {
                if no < oldest {
                    fs::remove_file(&path).map_err(failed(&path, "removing it"))?;
                }
            }
        }
        Ok(())
    }

    /// A subject's folder, for good.
    fn make(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        [Some(self.dir.as_path()), self.dir.parent()]
            .into_iter()
            .flatten()
            .try_for_each(|dir| File::open(dir)?.sync_all())
    }

    fn folder(&self, of: Of) -> PathBuf {
        self.dir.join(match of {
            Of::Group(group) => format!("group-{group}"),
            Of::Vm(vm) => format!("vm-{vm}"),
        })
    }

    /// By number.
    fn files(&self, of: Of) -> Result<Vec<(u64, PathBuf)>, SlotLogError> {
        files_of(&self.folder(of))
    }
}

fn files_of(folder: &Path) -> Result<Vec<(u64, PathBuf)>, SlotLogError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed(folder, "reading it"))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed(folder, "reading it"))?.path();
        let no =
            path.extension().filter(|end| *end == "jsonl").and(path.file_stem()).and_then(|no| no.to_str());
        // Whatever else lies there is not ours.
        files.extend(no.and_then(|no| no.parse().ok()).map(|no| (no, path.clone())));
    }
    files.sort_unstable();
    Ok(files)
}

fn read(path: &Path, slots: &mut Vec<Slot>) -> io::Result<()> {
    let mut lines = BufReader::new(File::open(path)?.take(FILE_MAX));
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let slot: Option<Slot> = serde_json::from_slice(&line).ok();
        slots.extend(slot.filter(Slot::is_sound));
        line.clear();
    }
    Ok(())
}

fn failed(path: &Path, step: &'static str) -> impl FnOnce(io::Error) -> SlotLogError {
    let path = path.to_owned();
    move |source| SlotLogError { path, step, source }
}

fn file_no(at: UnixMs) -> u64 {
    at.0 / (FILE_DAYS * DAY_MS)
}

const MODE: u32 = 0o640;
const FILE_DAYS: u64 = 30;
const KEPT_DAYS: u64 = 400;
const DAY_MS: u64 = 86_400_000;
/// More than thirty days of slots ever take.
const FILE_MAX: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{age::Asked, slot::tests::a_second_each};
    use std::io::Write;

    const VM: Of = Of::Vm(VmId::from_bytes([7; 16]));

    fn slot(day: u64) -> Slot {
        let asked = Asked { since: UnixMs(day * DAY_MS), until: UnixMs(u64::MAX), target_ms: Some(1000) };
        Slot::of(&a_second_each(5, 0..0), asked, UnixMs(day * DAY_MS + 600_000))
    }

    #[test]
    fn slots_are_found_again_by_their_time_and_a_torn_line_tells_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let log = SlotLog::new(dir.path().join("ages"));
        assert_eq!((log.until(VM).unwrap(), log.since(VM, UnixMs(0)).unwrap()), (None, vec![]));
        let slots: Vec<Slot> = [28, 29, 30, 61].map(slot).into();
        log.add(VM, &slots[..1]).unwrap();
        let torn = log.files(VM).unwrap()[0].1.clone();
        fs::OpenOptions::new().append(true).open(torn).unwrap().write_all(b"{\"from\":12").unwrap();
        log.add(VM, &slots[1..]).unwrap();
        assert_eq!(log.since(VM, UnixMs(0)).unwrap(), slots);
        assert_eq!(log.since(VM, slots[1].from).unwrap(), slots[1..]);
        assert_eq!(log.files(VM).unwrap().len(), 3);
        assert_eq!(log.until(VM).unwrap(), Some(slots[3].until));
        assert!(log.since(Of::Vm(VmId::from_bytes([8; 16])), UnixMs(0)).unwrap().is_empty());
    }

    #[test]
    fn what_is_older_than_a_year_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let log = SlotLog::new(dir.path().to_owned());
        log.tidy(UnixMs(0)).unwrap();
        log.add(VM, &[slot(1), slot(100), slot(500)]).unwrap();
        fs::write(log.folder(VM).join("notes"), "an operator's").unwrap();
        log.tidy(UnixMs(501 * DAY_MS)).unwrap();
        assert_eq!(log.since(VM, UnixMs(0)).unwrap(), [slot(100), slot(500)]);
        assert!(log.folder(VM).join("notes").exists());
        SlotLog::new(dir.path().join("none")).tidy(UnixMs(1)).unwrap();
    }
}
