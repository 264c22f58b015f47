//! One image file, read by QEMU's own reader (`qemu-nbd`, read-only) and handed on region by region.
//! Promises: the process ends with the value; no QEMU writes to the file meanwhile ([`super::locks`], or QEMU's own locks for
//! formats other than raw); what QEMU knows to be zero is not read; a few regions are on their way at once.

use super::{
    SeedError,
    disks::{DiskFile, DiskFormat},
    locks::Hold,
};
use bytes::Bytes;
use lifeboat::{
    chunk::fingerprint::REGION_PAGES,
    fault,
    nbd::{ALLOCATION, Client, NbdError, PendingRead, STATE_ZERO, STATUS_SPAN_MAX},
    page::PAGE,
};
use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    process::{Child, Command},
    time::Instant,
};

/// Bytes of a region: what is compared at once.
pub(super) const REGION: u64 = (REGION_PAGES * PAGE) as u64;

/// See the module.
#[derive(Debug)]
pub(super) struct Image {
    file: DiskFile,
    client: Client,
    _process: Child,
    _socket: Socket,
    _hold: Option<Hold>,
}

/// A socket's file, which goes with it.
#[derive(Debug)]
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0); // there may be none
    }
}

impl Image {
    pub async fn open(file: &DiskFile, run_dir: &Path) -> Result<Self, SeedError> {
        let refuse = |why: String| {
            let DiskFile { target, path, .. } = file.clone();
            SeedError::Image { target, path, why }
        };
        let hold = match file.format {
            DiskFormat::Raw => Hold::on(&file.path).map_err(|error| refuse(error.to_string()))?,
            DiskFormat::Qcow2 => None,
        };
        let socket =
            Socket(run_dir.join(format!("seed-{}", &uuid::Uuid::new_v4().simple().to_string()[..8])));
        let mut command = Command::new("qemu-nbd");
        command.args(["--read-only", "--format", file.format.as_str(), "--socket"]).arg(&socket.0);
        command.arg("--").arg(&file.path).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        for variable in fault::VARIABLES {
            command.env_remove(variable);
        }
        let started = command.spawn();
        let mut process = started.map_err(|error| refuse(format!("qemu-nbd (of qemu-utils): {error}")))?;
        let stream = connect(&mut process, &socket.0).await.map_err(&refuse)?;
        let client = match Client::open(stream, "", &[ALLOCATION.to_owned()]).await {
            Ok(client) => client,
            // It listens before it opens the image; what it then can't open it tells on its way out.
            Err(source) => match tokio::time::timeout(ENDS_WITHIN, process.wait()).await {
                Ok(Ok(_)) => return Err(refuse(last_words(&mut process).await)),
                Ok(Err(_)) | Err(_) => return Err(failed(file, source)),
            },
        };
        Ok(Self { file: file.clone(), client, _process: process, _socket: socket, _hold: hold })
    }

    pub fn bytes(&self) -> u64 {
        self.client.size()
    }

    /// Its regions, from the first one on.
    pub fn regions(&self) -> Regions<'_> {
        Regions { image: self, spans: VecDeque::new(), known: 0, asked: VecDeque::new(), next: 0 }
    }
}

fn failed(file: &DiskFile, source: NbdError) -> SeedError {
    SeedError::Nbd { target: file.target.clone(), path: file.path.clone(), source }
}

/// Waits until the process listens, or has ended and said why.
async fn connect(process: &mut Child, socket: &Path) -> Result<UnixStream, String> {
    let until = Instant::now() + LISTENS_WITHIN;
    loop {
        if let Ok(stream) = UnixStream::connect(socket).await {
            return Ok(stream);
        }
        if process.try_wait().map_err(|error| error.to_string())?.is_some() {
            return Err(last_words(process).await);
        }
        if Instant::now() >= until {
            return Err("qemu-nbd does not serve it".into());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Why it has ended.
async fn last_words(process: &mut Child) -> String {
    let mut said = Vec::new();
    if let Some(stderr) = process.stderr.take() {
        let _ = stderr.take(SAID_MAX).read_to_end(&mut said).await; // what there is of it
    }
    String::from_utf8_lossy(&said).trim().trim_start_matches("qemu-nbd: ").replace('\n', " ")
}

/// Reading ahead through an image.
pub(super) struct Regions<'a> {
    image: &'a Image,
    /// Ends of stretches that are alike, and whether they are zero.
    spans: VecDeque<(u64, bool)>,
    /// Up to where `spans` tell.
    known: u64,
    asked: VecDeque<Option<PendingRead>>,
    next: u64,
}

impl Regions<'_> {
    /// Bytes of the next region; `Some(None)` if all of it is zero, `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Option<Bytes>>, SeedError> {
        self.read_ahead().await.map_err(|source| failed(&self.image.file, source))?;
        match self.asked.pop_front() {
            None => Ok(None),
            Some(None) => Ok(Some(None)),
            Some(Some(read)) => {
                read.wait().await.map(Some).map_err(|source| failed(&self.image.file, source))
            }
        }
    }

    async fn read_ahead(&mut self) -> Result<(), NbdError> {
        let size = self.image.bytes();
        while self.asked.len() < AHEAD && self.next < size {
            let end = (self.next + REGION).min(size);
            let read = if self.is_zero(self.next, end).await? {
                None
            } else {
                Some(self.image.client.read(self.next, (end - self.next) as u32).await?)
            };
            self.asked.push_back(read);
            self.next = end;
        }
        Ok(())
    }

    async fn is_zero(&mut self, from: u64, to: u64) -> Result<bool, NbdError> {
        while self.known < to {
            let len = (self.image.bytes() - self.known).min(u64::from(STATUS_SPAN_MAX)) as u32;
            for span in self.image.client.status(self.known, len).await? {
                self.known += span.bytes;
                let zero = span.flags.iter().all(|flags| flags & STATE_ZERO != 0);
                self.spans.push_back((self.known, zero));
            }
        }
        while self.spans.front().is_some_and(|(end, _)| *end <= from) {
            self.spans.pop_front();
        }
        let mut within = self.spans.iter().scan(from, |start, (end, zero)| {
            let begins = *start < to;
            *start = *end;
            begins.then_some(*zero)
        });
        Ok(within.all(|zero| zero))
    }
}

const AHEAD: usize = 4;
const LISTENS_WITHIN: Duration = Duration::from_secs(30);
const ENDS_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const SAID_MAX: u64 = 4096;
