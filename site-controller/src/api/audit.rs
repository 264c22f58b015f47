//! The audit log: every call that changes something, who made it, and how it ended. Owns `audit.log` in `data_dir` and the
//! files that it was rotated into.
//! Promises: a call is on disk before it acts, and one that can't be written down is refused; how it ended is written
//! when it has, also if its caller went away; a call without an end was under way when the controller went away, or still
//! is. No secret is written. Bounded: [`FILES`] of [`FILE_MAX`] bytes. Called by the [`super::gate`].

use super::{
    caller::{Caller, Who},
    types::{AuditEnd, AuditLine, AuditRow},
};
use lifeboat::{
    clock::Clock,
    durable::Appended,
    local_api::{ErrorBody, Origin},
    units::UnixMs,
};
use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

pub struct AuditLog {
    path: PathBuf,
    file_max: u64,
    clock: Arc<dyn Clock>,
    file: Mutex<Appended>,
}

#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("the audit log ({path}): {step} failed", path = path.display())]
    Disk {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the audit log could not be waited for")]
    Task(#[from] tokio::task::JoinError),
}

/// What is asked, as it is written down.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: String,
    /// As the table of routes has it, and as it was asked.
    pub route: String,
    pub path: String,
    pub body: Vec<u8>,
}

/// How a call that was written down is going to end; its handler finds it as an extension. Clones are the same call.
#[derive(Clone)]
pub struct Outcome {
    log: Arc<AuditLog>,
    id: String,
    /// The handler's answer is not the end of it.
    later: Arc<AtomicBool>,
}

impl AuditLog {
    pub fn open(data_dir: &std::path::Path, clock: Arc<dyn Clock>) -> Result<Self, AuditError> {
        let path = data_dir.join(NAME);
        let file = Appended::open(&path, MODE).map_err(|source| AuditError::Disk {
            path: path.clone(),
            step: "opening it",
            source,
        })?;
        Ok(Self { path, file_max: FILE_MAX, clock, file: Mutex::new(file) })
    }

    /// Writes a call down; on disk when it returns.
    pub async fn begin(self: &Arc<Self>, caller: &Caller, call: Call) -> Result<Outcome, AuditError> {
        let (id, line) = self.line_of(caller, call, None);
        self.write(line).await?;
        Ok(Outcome { log: self.clone(), id, later: Arc::default() })
    }

    /// Writes down one that its caller may not make.
    pub async fn refused(
        self: &Arc<Self>,
        caller: &Caller,
        call: Call,
        why: &ErrorBody,
    ) -> Result<(), AuditError> {
        let (_, line) = self.line_of(caller, call, Some(why.code.clone()));
        self.write(line).await
    }

    /// Calls since then, oldest first; the newest `limit` of them. Waits for a disk.
    pub fn read(&self, since: UnixMs, limit: usize) -> Result<Vec<AuditRow>, AuditError> {
        let mut rows = Rows { rows: VecDeque::new(), gone: 0, at: HashMap::new(), limit };
        for no in (0..FILES).rev() {
            let path = self.named(no);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(AuditError::Disk { path, step: "reading it", source }),
            };
            // More than any file ever holds.
            let mut lines = BufReader::new(file.take(2 * FILE_MAX));
            let mut text = Vec::new();
            loop {
                text.clear();
                let read = lines.read_until(b'\n', &mut text);
                match read.map_err(|source| AuditError::Disk {
                    path: path.clone(),
                    step: "reading it",
                    source,
                })? {
                    0 => break,
                    // A line that a power cut tore is left out; what it told never began.
                    _ => rows.take(serde_json::from_slice(&text).ok(), since),
                }
            }
        }
        Ok(rows.rows.into())
    }

    fn line_of(&self, caller: &Caller, call: Call, refused: Option<String>) -> (String, AuditLine) {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let from = match caller.origin {
            _ if caller.who == Who::Witness => "site".to_owned(),
            Origin::Local { .. } => "socket".to_owned(),
            Origin::Network { from } => from.to_string(),
        };
        let asked: Option<serde_json::Value> =
            serde_json::from_slice(&call.body).ok().filter(|asked| !matches!(asked, serde_json::Value::Null));
        let request = match asked {
            Some(asked) if call.body.len() <= REQUEST_MAX => Some(asked),
            Some(_) => Some(serde_json::json!({ "bytes": call.body.len() })),
            None => None,
        };
        let row = AuditRow {
            id: id.clone(),
            at: self.clock.now(),
            who: caller.to_string(),
            role: caller.role,
            from,
            method: call.method,
            route: call.route,
            path: call.path,
            request,
            end: refused.map(|code| AuditEnd {
                at: self.clock.now(),
                done: false,
                code: Some(code),
                what: None,
            }),
        };
        (id, AuditLine::Call(row))
    }

    async fn write(self: &Arc<Self>, line: AuditLine) -> Result<(), AuditError> {
        let log = self.clone();
        tokio::task::spawn_blocking(move || log.append(&line)).await?
    }

    fn append(&self, line: &AuditLine) -> Result<(), AuditError> {
        let failed = |step| move |source| AuditError::Disk { path: self.path.clone(), step, source };
        let mut text = serde_json::to_vec(line).map_err(|error| failed("writing")(error.into()))?;
        text.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if !file.is_empty() && file.len() + text.len() as u64 > self.file_max {
            self.rotate().map_err(failed("rotating"))?;
            *file = Appended::open(&self.path, MODE).map_err(failed("opening it"))?;
        }
        file.append(&text).map_err(failed("writing"))
    }

    fn rotate(&self) -> io::Result<()> {
        for no in (0..FILES - 1).rev() {
            match fs::rename(self.named(no), self.named(no + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn named(&self, no: usize) -> PathBuf {
        if no == 0 { self.path.clone() } else { self.path.with_file_name(format!("{NAME}.{no}")) }
    }
}

impl Outcome {
    /// The work goes on after the answer has begun: whoever takes this tells how it ended.
    pub fn later(self) -> Later {
        self.later.store(true, Ordering::Relaxed);
        Later(self)
    }

    /// The handler has answered. `None`: it did what was asked.
    pub(super) async fn answered(self, error: Option<&ErrorBody>) {
        if !self.later.load(Ordering::Relaxed) {
            self.ended(error).await;
        }
    }

    /// What [`AuditLog::end_of`] is told with.
    pub fn id(&self) -> &str {
        &self.id
    }

    async fn ended(self, error: Option<&ErrorBody>) {
        self.log.end_of(self.id, error).await;
    }
}

impl AuditLog {
    /// How a call ended.
    pub async fn end_of(self: &Arc<Self>, id: String, error: Option<&ErrorBody>) {
        let at = self.clock.now();
        let (code, what) =
            (error.map(|error| error.code.clone()), error.map(|error| cut(&error.to_string())));
        let end = AuditEnd { at, done: error.is_none(), code, what };
        // What was done can't be undone for it.
        if let Err(error) = self.write(AuditLine::End { id, end }).await {
            tracing::error!(
                error = lifeboat::error::chain(&error),
                "how a call ended could not be written down"
            );
        }
    }
}

/// The end of a call whose work goes on.
pub struct Later(Outcome);

impl Later {
    pub async fn ended(self, error: Option<&ErrorBody>) {
        self.0.ended(error).await;
    }
}

fn cut(words: &str) -> String {
    words.chars().take(WORDS_MAX).collect()
}

/// Calls as they are read, the newest `limit` of them.
struct Rows {
    rows: VecDeque<AuditRow>,
    /// Rows that were dropped for newer ones.
    gone: usize,
    at: HashMap<String, usize>,
    limit: usize,
}

impl Rows {
    fn take(&mut self, line: Option<AuditLine>, since: UnixMs) {
        match line {
            Some(AuditLine::Call(row)) if row.at >= since => {
                self.at.insert(row.id.clone(), self.gone + self.rows.len());
                self.rows.push_back(row);
                if self.rows.len() > self.limit {
                    self.gone += 1;
                    if let Some(gone) = self.rows.pop_front() {
                        self.at.remove(&gone.id);
                    }
                }
            }
            Some(AuditLine::End { id, end }) => {
                let at = self.at.remove(&id).and_then(|at| at.checked_sub(self.gone));
                if let Some(row) = at.and_then(|at| self.rows.get_mut(at)) {
                    row.end = Some(end);
                }
            }
            Some(AuditLine::Call(_)) | None => {}
        }
    }
}

const NAME: &str = "audit.log";
const MODE: u32 = 0o600;
const FILE_MAX: u64 = 8 << 20;
const FILES: usize = 10;
/// A larger request is written down by its size alone.
const REQUEST_MAX: usize = 8 << 10;
const WORDS_MAX: usize = 1000;

#[cfg(test)]
mod tests;
