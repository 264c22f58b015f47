//! The one home of sled: summaries of points by VM and seq. A cache; deleting it loses time, never data (I-9).
//!
//! What sled 0.34 makes necessary: every value carries its checksum (a flipped byte may go unnoticed by sled); every call
//! runs under `catch_unwind` (a flipped byte may also panic); its background flusher is off, because nothing waits for
//! it; everything is compared with the manifests' truth at each start, so that a lost or wrong entry never lasts; a
//! damaged folder is moved to `<folder>.damaged` and a bloated one replaced. Where sled can't be used at all (no room),
//! the index lives in memory. The order of points is kept in memory in either case: an entry of it that went wrong on disk
//! would not be missed. Blocking; called through the store, on blocking threads.

use crate::store::{Ask, MemoryIndex, Order, PointSummary, SummaryIndex};
use lifeboat::{chunk::digest::Digest, id::VmId, units::Seq};
use std::{
    collections::BTreeMap,
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Why this folder can't be used any more.
#[derive(Debug, thiserror::Error)]
enum IndexError {
    #[error("the index's database failed")]
    Sled(#[from] sled::Error),
    #[error("the index holds an entry that is not what was written")]
    Entry,
    #[error("the index's database panicked")]
    Panic,
    #[error("the index could not be moved away")]
    File(#[from] io::Error),
}

#[derive(Debug)]
pub struct SledIndex {
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// Nothing can be answered before the next `reconcile`.
    Unknown,
    Sled(sled::Db, Order),
    Memory(MemoryIndex),
}

impl SledIndex {
    /// An index in `folder`, which is created, or replaced, when it is first reconciled.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_path_buf(), state: Mutex::new(State::Unknown) }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn open(&self) -> Result<sled::Db, IndexError> {
        guarded(|| {
            let config = sled::Config::new().path(&self.folder).flush_every_ms(None);
            Ok(config.cache_capacity(CACHE).open()?)
        })
    }

    fn move_away(&self) -> Result<(), IndexError> {
        let mut aside = self.folder.as_os_str().to_owned();
        aside.push(".damaged");
        for result in [fs::remove_dir_all(&aside), fs::rename(&self.folder, &aside)] {
            match result {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Brings the folder up to date; says how many entries were not.
    fn bring_up(&self, truth: &[PointSummary]) -> Result<(sled::Db, u64), IndexError> {
        let db = self.open()?;
        let corrected = guarded(|| correct(&db, truth))?;
        let bloated = db.size_on_disk()? > SIZE_FREE + SIZE_PER_POINT * truth.len() as u64;
        if !bloated {
            return Ok((db, corrected));
        }
        drop(db);
        fs::remove_dir_all(&self.folder)?;
        let db = self.open()?;
        guarded(|| correct(&db, truth))?;
        Ok((db, corrected))
    }
}

impl SummaryIndex for SledIndex {
    fn reconcile(&self, truth: &[PointSummary]) -> u64 {
        self.with(|state| {
            *state = State::Unknown;
            let brought_up = self.bring_up(truth).or_else(|error| {
                tracing::warn!(folder = %self.folder.display(), %error, "the index is rebuilt from the manifests");
                self.move_away()?;
                let (db, _) = self.bring_up(truth)?;
                Ok((db, truth.len() as u64))
            });
            let (next, corrected) = match brought_up {
                Ok((db, corrected)) => (State::Sled(db, Order::of(truth)), corrected),
                Err(IndexError::Sled(_) | IndexError::Entry | IndexError::Panic | IndexError::File(_)) => {
                    tracing::warn!(folder = %self.folder.display(), "no index on disk; it is kept in memory");
                    let memory = MemoryIndex::default();
                    memory.reconcile(truth);
                    (State::Memory(memory), truth.len() as u64)
                }
            };
            *state = next;
            corrected
        })
    }

    fn put(&self, summary: &PointSummary) {
        self.with(|state| {
            let put = match state {
                State::Unknown => Ok(()),
                State::Memory(memory) => {
                    memory.put(summary);
                    Ok(())
                }
                State::Sled(db, order) => guarded(|| {
                    order.put(summary);
                    db.insert(key(summary.vm, summary.seq), encode(summary)?)?;
                    Ok(())
                }),
            };
            if let Err(error) = put {
                tracing::warn!(%error, "the index is rebuilt when it is next asked");
                *state = State::Unknown;
            }
        });
    }

    fn forget(&self, vm: VmId, seqs: &[Seq]) {
        self.with(|state| {
            let gone = match state {
                State::Unknown => Ok(()),
                State::Memory(memory) => {
                    memory.forget(vm, seqs);
                    Ok(())
                }
                State::Sled(db, order) => guarded(|| {
                    for seq in seqs {
                        order.forget(vm, *seq);
                        db.remove(key(vm, *seq))?;
                    }
                    Ok(())
                }),
            };
            if let Err(error) = gone {
                tracing::warn!(%error, "the index is rebuilt when it is next asked");
                *state = State::Unknown;
            }
        });
    }

    fn points(&self, vm: Option<VmId>) -> Option<Vec<PointSummary>> {
        self.with(|state| {
            let read = match state {
                State::Unknown => return None,
                State::Memory(memory) => return memory.points(vm),
                State::Sled(db, _) => guarded(|| {
                    let prefix = vm.map_or(Vec::new(), |vm| vm.as_bytes().to_vec());
                    db.scan_prefix(prefix).map(|entry| decode(entry?)).collect()
                }),
            };
            if let Err(error) = &read {
                tracing::warn!(%error, "the index is rebuilt from the manifests");
                *state = State::Unknown;
            }
            read.ok()
        })
    }

    fn find(&self, vm: VmId, ask: Ask) -> Option<Option<PointSummary>> {
        self.with(|state| {
            let read = match state {
                State::Unknown => return None,
                State::Memory(memory) => return memory.find(vm, ask),
                State::Sled(db, order) => {
                    let Some(seq) = order.find(vm, ask) else { return Some(None) };
                    guarded(|| {
                        let at = key(vm, seq);
                        decode((at.as_slice().into(), db.get(at)?.ok_or(IndexError::Entry)?))
                    })
                }
            };
            if let Err(error) = &read {
                tracing::warn!(%error, "the index is rebuilt from the manifests");
                *state = State::Unknown;
            }
            read.ok().map(Some)
        })
    }
}

impl Drop for SledIndex {
    fn drop(&mut self) {
        if let State::Sled(db, _) = self.state.get_mut().unwrap_or_else(PoisonError::into_inner) {
            // Saves the next start some corrections; nothing depends on it.
            let _ = guarded(|| Ok(db.flush()?));
        }
    }
}

fn correct(db: &sled::Db, truth: &[PointSummary]) -> Result<u64, IndexError> {
    let mut missing: BTreeMap<[u8; 24], &PointSummary> =
        truth.iter().map(|summary| (key(summary.vm, summary.seq), summary)).collect();
    let mut corrected = 0;
    let mut stale = Vec::new();
    for entry in db.iter() {
        let (at, value) = entry?;
        let held = decode((at.clone(), value))?;
        let known = <[u8; 24]>::try_from(at.as_ref()).ok().and_then(|at| missing.remove_entry(&at));
        match known {
            Some((_, summary)) if *summary == held => {}
            Some((at, summary)) => drop(missing.insert(at, summary)),
            None => stale.push(at),
        }
    }
    for at in stale {
        db.remove(at)?;
        corrected += 1;
    }
    for (at, summary) in missing {
        db.insert(at, encode(summary)?)?;
        corrected += 1;
    }
    db.flush()?;
    Ok(corrected)
}

fn guarded<T>(work: impl FnOnce() -> Result<T, IndexError>) -> Result<T, IndexError> {
    // Whatever sled left half done is thrown away with the folder.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(IndexError::Panic))
}

fn key(vm: VmId, seq: Seq) -> [u8; 24] {
    let mut out = [0; 24];
    out[..16].copy_from_slice(vm.as_bytes());
    out[16..].copy_from_slice(&seq.0.to_be_bytes());
    out
}

fn encode(summary: &PointSummary) -> Result<Vec<u8>, IndexError> {
    let body = postcard::to_stdvec(summary).map_err(|_| IndexError::Entry)?;
    let check = checksum(&key(summary.vm, summary.seq), &body);
    Ok([check.as_slice(), &body].concat())
}

fn decode((at, value): (sled::IVec, sled::IVec)) -> Result<PointSummary, IndexError> {
    let (check, body) = value.split_first_chunk::<8>().ok_or(IndexError::Entry)?;
    if *check != checksum(&at, body) {
        return Err(IndexError::Entry);
    }
    let summary: PointSummary = postcard::from_bytes(body).map_err(|_| IndexError::Entry)?;
    if key(summary.vm, summary.seq) == *at { Ok(summary) } else { Err(IndexError::Entry) }
}

fn checksum(at: &[u8], body: &[u8]) -> [u8; 8] {
    let digest = Digest::of_parts(&[at, body]);
    let [a, b, c, d, e, f, g, h, ..] = *digest.as_bytes();
    [a, b, c, d, e, f, g, h]
}

const CACHE: u64 = 16 << 20;
/// A folder larger than this, and this for each point, is rebuilt at the next start.
const SIZE_FREE: u64 = 64 << 20;
const SIZE_PER_POINT: u64 = 4096;
