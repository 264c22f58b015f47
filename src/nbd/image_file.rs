//! One image file, read by QEMU's own reader (`qemu-nbd`, read-only) and handed on region by region.
//! Promises: the process ends with the value; what QEMU knows to be zero is not read; a few regions are on their way at once.
//! The format is told by the caller, never guessed from bytes that a guest may have written. Called by the site's `seed` and
//! by the agent's capture of guests that are off.

use super::{ALLOCATION, Client, NbdError, PendingRead, STATE_ZERO, STATUS_SPAN_MAX};
use crate::{chunk::fingerprint::REGION_PAGES, fault, page::PAGE};
use bytes::Bytes;
use std::{
    collections::VecDeque,
    os::unix::fs::FileTypeExt,
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
pub const REGION: u64 = (REGION_PAGES * PAGE) as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// QEMU's own locks keep writers away from the image, where its format has them taken (not for raw ones).
    NoWriters,
    /// Whoever wants to write to the image, or to those it is made over, finds no lock of ours. What was read while they did is
    /// worth nothing, which the caller must find out.
    Writers,
}

#[derive(Debug, thiserror::Error)]
pub enum ImageFileError {
    /// It can't be opened; why, in the reader's words.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Nbd(#[from] NbdError),
}

/// See the module.
#[derive(Debug)]
pub struct ImageFile {
    client: Client,
    _process: Child,
    _socket: Socket,
    /// Ends of stretches that are alike, and whether they are zero.
    spans: VecDeque<(u64, bool)>,
    /// Up to where `spans` tell.
    known: u64,
    asked: VecDeque<Option<PendingRead>>,
    next: u64,
}

/// A socket's file, which goes with it.
#[derive(Debug)]
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0); // there may be none
    }
}

impl ImageFile {
    /// `format` as QEMU calls it; `run_dir` is for the reader's socket.
    pub async fn open(
        path: &Path,
        format: &str,
        beside: Beside,
        run_dir: &Path,
    ) -> Result<Self, ImageFileError> {
        let name = format!("image-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        let socket = Socket(run_dir.join(name));
        let mut command = Command::new("qemu-nbd");
        command.args(["--read-only", "--socket"]).arg(&socket.0);
        match beside {
            Beside::NoWriters => command.args(["--format", format, "--"]).arg(path),
            Beside::Writers => command.args(["--image-opts", "--", &shared(path, format)?]),
        };
        command.kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        for variable in fault::VARIABLES {
            command.env_remove(variable);
        }
        let refused = ImageFileError::Refused;
        let started = command.spawn();
        let mut process = started.map_err(|error| refused(format!("qemu-nbd (of qemu-utils): {error}")))?;
        let stream = connect(&mut process, &socket.0).await.map_err(refused)?;
        let client = match Client::open(stream, "", &[ALLOCATION.to_owned()]).await {
            Ok(client) => client,
            // It listens before it opens the image; what it then can't open it tells on its way out.
            Err(source) => match tokio::time::timeout(ENDS_WITHIN, process.wait()).await {
                Ok(Ok(_)) => return Err(refused(last_words(&mut process).await)),
                Ok(Err(_)) | Err(_) => return Err(source.into()),
            },
        };
        let (spans, asked) = Default::default();
        Ok(Self { client, _process: process, _socket: socket, spans, known: 0, asked, next: 0 })
    }

    pub fn bytes(&self) -> u64 {
        self.client.size()
    }

    /// Its regions, from the first one on: `Some(None)` if all of it is zero, `None` at the end.
    pub async fn next_region(&mut self) -> Result<Option<Option<Bytes>>, NbdError> {
        self.read_ahead().await?;
        match self.asked.pop_front() {
            None => Ok(None),
            Some(None) => Ok(Some(None)),
            Some(Some(read)) => read.wait().await.map(Some),
        }
    }

    async fn read_ahead(&mut self) -> Result<(), NbdError> {
        let size = self.bytes();
        while self.asked.len() < AHEAD && self.next < size {
            let end = (self.next + REGION).min(size);
            let read = if self.is_zero(self.next, end).await? {
                None
            } else {
                Some(self.client.read(self.next, (end - self.next) as u32).await?)
            };
            self.asked.push_back(read);
            self.next = end;
        }
        Ok(())
    }

    async fn is_zero(&mut self, from: u64, to: u64) -> Result<bool, NbdError> {
        while self.known < to {
            let len = (self.bytes() - self.known).min(u64::from(STATUS_SPAN_MAX)) as u32;
            for span in self.client.status(self.known, len).await? {
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

/// QEMU's options for an image that others may write to. What it is made over is opened in the same way.
fn shared(path: &Path, format: &str) -> Result<String, ImageFileError> {
    let refused = |why: &str| ImageFileError::Refused(why.into());
    let kind = std::fs::metadata(path).map_err(|error| refused(&error.to_string()))?.file_type();
    let driver = if kind.is_block_device() { "host_device" } else { "file" };
    // A comma is doubled.
    let name = path.to_str().ok_or_else(|| refused("its path is not text"))?.replace(',', ",,");
    Ok(format!("driver={format},force-share=on,file.driver={driver},file.filename={name}"))
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

const AHEAD: usize = 4;
const LISTENS_WITHIN: Duration = Duration::from_secs(30);
const ENDS_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const SAID_MAX: u64 = 4096;
