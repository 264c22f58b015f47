//! The transmission phase: requests go out through one task, replies come in through another.
//! Promises: dropping a future never leaves half a request on the wire; a broken connection fails every request in
//! flight with the same cause. Called by `capture::disk::view`.

use super::{
    HANDSHAKE_WITHIN, NbdError, REPLY_WITHIN, REQUEST_MAX, STATUS_SPAN_MAX, handshake,
    reply::{Extents, ReadInFlight, StatusInFlight},
};
use bytes::Bytes;
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf, split},
    net::UnixStream,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

/// One connection to one export. Dropping it closes the connection.
#[derive(Debug)]
pub struct Client {
    size: u64,
    contexts: Vec<u32>,
    outgoing: mpsc::Sender<[u8; REQUEST_LEN]>,
    shared: Arc<Mutex<Shared>>,
    tasks: [JoinHandle<()>; 2],
}

/// `bytes` of the export that are the same in every meta context; `flags` in the order the contexts were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub bytes: u64,
    pub flags: Vec<u32>,
}

/// A read on its way.
#[derive(Debug)]
pub struct PendingRead(oneshot::Receiver<Result<Option<Bytes>, NbdError>>);

impl PendingRead {
    /// The bytes; `None` if the server said that all of them are zero instead of sending them.
    pub async fn wait(self) -> Result<Option<Bytes>, NbdError> {
        within(REPLY_WITHIN, "reading", self.0).await
    }
}

impl Client {
    /// Opens `export` with the meta contexts in `contexts`, all of which the server must know.
    pub async fn open(mut stream: UnixStream, export: &str, contexts: &[String]) -> Result<Self, NbdError> {
        let agreed =
            timeout(HANDSHAKE_WITHIN, handshake::negotiate(&mut stream, export, contexts)).await.map_err(
                |_| NbdError::Silent { step: "agreeing on the protocol", after: HANDSHAKE_WITHIN },
            )??;
        // Not `into_split`: its halves shut the connection down when dropped, also for whoever else holds it open.
        let (reader, writer) = split(stream);
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        let shared = Arc::new(Mutex::new(Shared::default()));
        let tasks = [
            tokio::spawn(receive(reader, Arc::clone(&shared))),
            tokio::spawn(transmit(writer, requests, Arc::clone(&shared))),
        ];
        Ok(Self { size: agreed.size, contexts: agreed.contexts, outgoing, shared, tasks })
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Asks for bytes; returns once the request is queued. Wait for the answer with [`PendingRead::wait`].
    pub async fn read(&self, offset: u64, len: u32) -> Result<PendingRead, NbdError> {
        self.check(offset, len, REQUEST_MAX)?;
        let (done, answer) = oneshot::channel();
        let waiting = Waiting::Read { read: ReadInFlight::new(offset, len), failed: None, done };
        self.submit(CMD_READ, offset, len, waiting).await?;
        Ok(PendingRead(answer))
    }

    /// Status of the export from `offset`: spans that cover at least one byte and at most `len`. The server decides how
    /// far it looks, so ask again from where the spans end.
    pub async fn status(&self, offset: u64, len: u32) -> Result<Vec<Span>, NbdError> {
        self.check(offset, len, STATUS_SPAN_MAX)?;
        let (done, answer) = oneshot::channel();
        let status = StatusInFlight::new(&self.contexts);
        self.submit(CMD_BLOCK_STATUS, offset, len, Waiting::Status { status, failed: None, done }).await?;
        let extents = within(REPLY_WITHIN, "asking for block status", answer).await?;
        Ok(shortest(&extents, u64::from(len)))
    }

    fn check(&self, offset: u64, len: u32, most: u32) -> Result<(), NbdError> {
        let fits = offset.checked_add(u64::from(len)).is_some_and(|end| end <= self.size);
        if len == 0 || len > most || !fits {
            return Err(NbdError::OutOfRange { offset, len, size: self.size });
        }
        Ok(())
    }

    async fn submit(&self, command: u16, offset: u64, len: u32, waiting: Waiting) -> Result<(), NbdError> {
        let cookie = lock(&self.shared).enlist(waiting)?;
        let sent = self.outgoing.send(request(command, cookie, offset, len)).await;
        sent.map_err(|_| lock(&self.shared).cause())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Merges the contexts' extents: each span ends where the first of them changes.
fn shortest(contexts: &[Extents], len: u64) -> Vec<Span> {
    let mut lists: Vec<_> = contexts.iter().map(|extents| extents.iter().copied()).collect();
    let mut heads: Vec<Option<(u32, u32)>> = lists.iter_mut().map(Iterator::next).collect();
    let (mut spans, mut covered) = (Vec::<Span>::new(), 0);
    while covered < len {
        let Some(current) = heads.iter().copied().collect::<Option<Vec<_>>>() else { break };
        let Some(bytes) = current.iter().map(|(bytes, _)| *bytes).min() else { break };
        let take = u64::from(bytes).min(len - covered);
        let flags: Vec<u32> = current.iter().map(|(_, flags)| *flags).collect();
        match spans.last_mut() {
            Some(last) if last.flags == flags => last.bytes += take,
            _ => spans.push(Span { bytes: take, flags }),
        }
        covered += take;
        for ((head, list), (left, flags)) in heads.iter_mut().zip(&mut lists).zip(current) {
            *head = if left > bytes { Some((left - bytes, flags)) } else { list.next() };
        }
    }
    spans
}

async fn within<T>(
    limit: Duration,
    step: &'static str,
    answer: oneshot::Receiver<Result<T, NbdError>>,
) -> Result<T, NbdError> {
    match timeout(limit, answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(NbdError::lost(step, io::ErrorKind::ConnectionAborted.into())),
        Err(_) => Err(NbdError::Silent { step, after: limit }),
    }
}

/// What both tasks and all requests share.
#[derive(Debug, Default)]
struct Shared {
    next_cookie: u64,
    waiting: HashMap<u64, Waiting>,
    /// Why the connection can't be used any more.
    broken: Option<NbdError>,
}

#[derive(Debug)]
enum Waiting {
    Read {
        read: ReadInFlight,
        failed: Option<NbdError>,
        done: oneshot::Sender<Result<Option<Bytes>, NbdError>>,
    },
    Status {
        status: StatusInFlight,
        failed: Option<NbdError>,
        done: oneshot::Sender<Result<Vec<Extents>, NbdError>>,
    },
}

impl Waiting {
    fn fail(self, error: NbdError) {
        // Nobody waits any more if sending fails: nothing to do.
        match self {
            Self::Read { done, .. } => drop(done.send(Err(error))),
            Self::Status { done, .. } => drop(done.send(Err(error))),
        }
    }
    fn note(&mut self, error: NbdError) {
        let (Self::Read { failed, .. } | Self::Status { failed, .. }) = self;
        failed.get_or_insert(error);
    }
    /// The last chunk came. An error is the server's fault, not the request's.
    fn finish(self) -> Result<(), NbdError> {
        match self {
            Self::Read { failed: Some(error), done, .. } => drop(done.send(Err(error))),
            Self::Status { failed: Some(error), done, .. } => drop(done.send(Err(error))),
            Self::Read { read, done, .. } => drop(done.send(Ok(read.finish()?))),
            Self::Status { status, done, .. } => drop(done.send(Ok(status.finish()?))),
        }
        Ok(())
    }
}

impl Shared {
    fn enlist(&mut self, waiting: Waiting) -> Result<u64, NbdError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        self.next_cookie += 1;
        self.waiting.insert(self.next_cookie, waiting);
        Ok(self.next_cookie)
    }
    fn cause(&self) -> NbdError {
        self.broken.clone().unwrap_or_else(|| NbdError::lost("sending", io::ErrorKind::BrokenPipe.into()))
    }
    fn break_off(&mut self, error: NbdError) {
        let error = self.broken.get_or_insert(error).clone();
        for (_, waiting) in self.waiting.drain() {
            waiting.fail(error.clone());
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn transmit(
    mut writer: WriteHalf<UnixStream>,
    mut requests: mpsc::Receiver<[u8; REQUEST_LEN]>,
    shared: Arc<Mutex<Shared>>,
) {
    while let Some(request) = requests.recv().await {
        if let Err(error) = writer.write_all(&request).await {
            lock(&shared).break_off(NbdError::lost("sending", error));
            return;
        }
    }
}

async fn receive(reader: ReadHalf<UnixStream>, shared: Arc<Mutex<Shared>>) {
    let mut reader = BufReader::with_capacity(READ_BUFFER, reader);
    loop {
        if let Err(error) = receive_one(&mut reader, &shared).await {
            lock(&shared).break_off(error);
            return;
        }
    }
}

/// Takes one simple reply or one chunk of a structured one.
async fn receive_one(
    reader: &mut BufReader<ReadHalf<UnixStream>>,
    shared: &Mutex<Shared>,
) -> Result<(), NbdError> {
    match reader.read_u32().await.map_err(lost)? {
        SIMPLE_MAGIC => {
            let errno = reader.read_u32().await.map_err(lost)?;
            let cookie = reader.read_u64().await.map_err(lost)?;
            if errno == 0 {
                return Err(NbdError::Protocol("a simple reply where a structured one was agreed"));
            }
            let waiting = take(shared, cookie)?;
            waiting.fail(NbdError::Failed { errno, message: String::new() });
            Ok(())
        }
        CHUNK_MAGIC => receive_chunk(reader, shared).await,
        _ => Err(NbdError::Protocol("a reply with a wrong magic number")),
    }
}

async fn receive_chunk(
    reader: &mut BufReader<ReadHalf<UnixStream>>,
    shared: &Mutex<Shared>,
) -> Result<(), NbdError> {
    let flags = reader.read_u16().await.map_err(lost)?;
    let kind = reader.read_u16().await.map_err(lost)?;
    let cookie = reader.read_u64().await.map_err(lost)?;
    let len = reader.read_u32().await.map_err(lost)?;
    // Taken out while its chunk is read (no lock is held over an await) and put back unless it is complete.
    let mut waiting = take(shared, cookie)?;
    let taken = match (kind, &mut waiting) {
        (CHUNK_NONE, _) if len == 0 && flags & CHUNK_DONE != 0 => Ok(()),
        (CHUNK_DATA, Waiting::Read { read, .. }) => receive_data(reader, read, len).await,
        (CHUNK_HOLE, Waiting::Read { read, .. }) if len == 12 => {
            let offset = reader.read_u64().await.map_err(lost)?;
            let hole = reader.read_u32().await.map_err(lost)?;
            read.claim(offset, hole).map(|_| ())
        }
        (CHUNK_STATUS, Waiting::Status { status, .. }) if len <= STATUS_MAX => {
            let mut body = vec![0; len as usize];
            match reader.read_exact(&mut body).await {
                Ok(_) => status.take(&body),
                Err(error) => Err(lost(error)),
            }
        }
        (kind, waiting) if kind & CHUNK_ERROR != 0 && (6..=ERROR_MAX).contains(&len) => {
            let mut body = vec![0; len as usize];
            match reader.read_exact(&mut body).await {
                Ok(_) => {
                    waiting.note(read_error(&body));
                    Ok(())
                }
                Err(error) => Err(lost(error)),
            }
        }
        _ => Err(NbdError::Protocol("a chunk that does not fit its request")),
    };
    match taken {
        Ok(()) if flags & CHUNK_DONE != 0 => waiting.finish(),
        Ok(()) => {
            lock(shared).waiting.insert(cookie, waiting);
            Ok(())
        }
        Err(error) => {
            waiting.fail(error.clone());
            Err(error)
        }
    }
}

async fn receive_data(
    reader: &mut BufReader<ReadHalf<UnixStream>>,
    read: &mut ReadInFlight,
    len: u32,
) -> Result<(), NbdError> {
    let data = len.checked_sub(8).ok_or(NbdError::Protocol("a data chunk without an offset"))?;
    let offset = reader.read_u64().await.map_err(lost)?;
    let place = read.place(offset, data)?;
    reader.read_exact(place).await.map(|_| ()).map_err(lost)
}

fn take(shared: &Mutex<Shared>, cookie: u64) -> Result<Waiting, NbdError> {
    lock(shared).waiting.remove(&cookie).ok_or(NbdError::Protocol("a reply to nothing that was asked"))
}

/// The body of an error chunk: errno 4, length 2, words.
fn read_error(body: &[u8]) -> NbdError {
    let errno = body.iter().take(4).fold(0, |value, byte| value << 8 | u32::from(*byte));
    let words = body.iter().skip(4).take(2).fold(0, |value, byte| value << 8 | usize::from(*byte));
    let words: Vec<u8> = body.iter().skip(6).take(words).copied().collect();
    NbdError::Failed { errno, message: String::from_utf8_lossy(&words).into_owned() }
}

fn request(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_LEN] {
    let mut request = [0; REQUEST_LEN];
    request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    request[6..8].copy_from_slice(&command.to_be_bytes());
    request[8..16].copy_from_slice(&cookie.to_be_bytes());
    request[16..24].copy_from_slice(&offset.to_be_bytes());
    request[24..].copy_from_slice(&len.to_be_bytes());
    request
}

fn lost(error: io::Error) -> NbdError {
    NbdError::lost("waiting for replies", error)
}

pub(super) const REQUEST_LEN: usize = 28;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_MAGIC: u32 = 0x6744_6698;
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;
pub(super) const CMD_READ: u16 = 0;
const CMD_BLOCK_STATUS: u16 = 7;
pub(super) const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;
/// QEMU sends 1 MiB of extents at the most.
const STATUS_MAX: u32 = 4 + (2 << 20);
const ERROR_MAX: u32 = 16 << 10;
const OUTGOING: usize = 64;
const READ_BUFFER: usize = 64 << 10;
