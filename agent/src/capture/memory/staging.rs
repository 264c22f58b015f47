//! Pages drained inside the pause, until they can be sent: in memory up to a budget, beyond it in an unlinked file.
//! Promises: memory stays within the budget; the file has no name, so nothing is left behind however the agent ends.

use super::MemoryError;
use bytes::Bytes;
use lifeboat::page::{Content, PageGroup, PageRun};
use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

enum Staged {
    Here(PageGroup),
    Spooled { image: u16, runs: Vec<PageRun>, at: u64, len: usize },
}

/// A queue of groups.
pub struct Staging {
    budget: usize,
    dir: PathBuf,
    queue: VecDeque<Staged>,
    in_memory: usize,
    spool: Option<File>,
    spooled: u64,
}

impl Staging {
    /// Stages up to `budget` bytes in memory, the rest in `dir`.
    pub fn new(budget: usize, dir: PathBuf) -> Self {
        Self { budget, dir, queue: VecDeque::new(), in_memory: 0, spool: None, spooled: 0 }
    }

    /// An empty one with the same budget and folder.
    pub fn another(&self) -> Self {
        Self::new(self.budget, self.dir.clone())
    }

    pub fn push(&mut self, group: PageGroup) -> Result<(), MemoryError> {
        let staged = match &group.content {
            Content::Bytes(bytes) if self.in_memory + bytes.len() > self.budget => {
                let at = self.spooled;
                let step = "writing changed pages to the spool folder";
                let spool = match &mut self.spool {
                    Some(spool) => spool,
                    slot => slot.insert(nameless_file(&self.dir).map_err(MemoryError::io(step))?),
                };
                spool.write_all_at(bytes, at).map_err(MemoryError::io(step))?;
                self.spooled += bytes.len() as u64;
                Staged::Spooled { image: group.image, runs: group.runs, at, len: bytes.len() }
            }
            Content::Bytes(bytes) => {
                self.in_memory += bytes.len();
                Staged::Here(group)
            }
            Content::Zero => Staged::Here(group),
        };
        self.queue.push_back(staged);
        Ok(())
    }

    pub fn pop(&mut self) -> Result<Option<PageGroup>, MemoryError> {
        Ok(match self.queue.pop_front() {
            None => {
                self.clear();
                None
            }
            Some(Staged::Here(group)) => {
                if let Content::Bytes(bytes) = &group.content {
                    self.in_memory -= bytes.len();
                }
                Some(group)
            }
            Some(Staged::Spooled { image, runs, at, len }) => {
                let spool = self.spool.as_ref().ok_or(MemoryError::Order("the spool is gone"))?;
                let mut bytes = vec![0; len];
                let step = "reading changed pages back from the spool folder";
                spool.read_exact_at(&mut bytes, at).map_err(MemoryError::io(step))?;
                Some(PageGroup { image, runs, content: Content::Bytes(Bytes::from(bytes)) })
            }
        })
    }

    /// Forgets everything and gives the file back.
    pub fn clear(&mut self) {
        self.queue.clear();
        self.in_memory = 0;
        self.spool = None;
        self.spooled = 0;
    }
}

fn nameless_file(dir: &Path) -> io::Result<File> {
    let open = |flags: i32, path: &Path, create: bool| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(create).mode(0o600).custom_flags(flags);
        options.open(path)
    };
    match open(libc::O_TMPFILE, dir, false) {
        // A file system without nameless files: make one and take its name away.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) =>
        {
            let path = dir.join(format!(".spool-{}-{:x}", std::process::id(), rand_suffix()));
            let file = open(0, &path, true)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        opened => opened,
    }
}

fn rand_suffix() -> u128 {
    uuid::Uuid::new_v4().as_u128()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_come_back_in_order_with_memory_within_the_budget() {
        let dir = tempfile::tempdir().unwrap();
        let mut staging = Staging::new(3 * 4096, dir.path().into());
        let group = |page: u64| PageGroup {
            image: 1,
            runs: vec![PageRun::new(page, 1)],
            content: if page % 5 == 4 {
                Content::Zero
            } else {
                Content::Bytes(vec![page as u8; 4096].into())
            },
        };
        for page in 0..50 {
            staging.push(group(page)).unwrap();
            assert!(staging.in_memory <= staging.budget);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the spool has a name");
        for page in 0..50 {
            assert_eq!(staging.pop().unwrap(), Some(group(page)));
        }
        assert_eq!(staging.pop().unwrap(), None);
        assert!(staging.spool.is_none());
    }

    #[test]
    fn a_folder_that_is_missing_is_an_error_and_no_panic() {
        let mut staging = Staging::new(0, "/nonexistent/folder".into());
        let group = PageGroup {
            image: 0,
            runs: vec![PageRun::new(0, 1)],
            content: Content::Bytes(vec![1; 4096].into()),
        };
        assert!(staging.push(group).is_err());
    }
}
