//! The site's book of tokens. Owns `enrolment-tokens.json` in the site's certificate directory.
//! Promises: only digests of secrets are stored; a token is spent on disk before anything is given for it; a stranger
//! who guesses is slowed down, and the book's size is bounded. The daemon and `init` may use it at the same time.

use super::token::{EnrolmentToken, Secret};
use crate::{
    clock::Clock,
    transport::{
        error::RefusalCode,
        pki::{AgentName, Fingerprint, PkiError, sha256, write_private},
    },
    units::UnixMs,
};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// The tokens of one site.
#[derive(Debug)]
pub struct EnrolmentTokens {
    path: PathBuf,
    authority: Fingerprint,
    clock: Arc<dyn Clock>,
    /// Wrong guesses by address, lately.
    guesses: Mutex<HashMap<IpAddr, Guesses>>,
}

/// A new token, and how it is listed.
#[derive(Debug)]
pub struct Issued {
    pub token: EnrolmentToken,
    pub status: TokenStatus,
}

/// A token as the site knows it; the secret can't be had from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenStatus {
    /// The digest's first digits, for people.
    pub id: String,
    /// Only this agent may use it; any, if none is named.
    pub agent: Option<AgentName>,
    pub created_at: UnixMs,
    pub expires_at: UnixMs,
    pub used_at: Option<UnixMs>,
    pub used_by: Option<AgentName>,
}

/// Why a token was not taken.
#[derive(Debug, thiserror::Error)]
pub enum TokenRefusal {
    #[error("this site does not know the token; make one with `lifeboat-site-controller token`")]
    Unknown,
    #[error("the token has been used already; each enrols one agent")]
    Used,
    #[error("the token has expired; make a new one")]
    Expired,
    #[error("the token was made for the agent {0}")]
    OtherName(AgentName),
    #[error("too many wrong tokens from this address; wait a minute")]
    TooMany,
    #[error("the site has {ACTIVE_MAX} unused tokens already; let some expire")]
    BookFull,
    #[error("the site can't read or write its tokens")]
    Book(#[from] PkiError),
}

impl TokenRefusal {
    pub fn code(&self) -> RefusalCode {
        match self {
            Self::Unknown => RefusalCode::TOKEN_UNKNOWN,
            Self::Used => RefusalCode::TOKEN_USED,
            Self::Expired => RefusalCode::TOKEN_EXPIRED,
            Self::OtherName(_) => RefusalCode::TOKEN_OTHER_NAME,
            Self::TooMany | Self::BookFull => RefusalCode::BUSY,
            Self::Book(_) => RefusalCode::INTERNAL,
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Book {
    tokens: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// SHA-256 of the secret, in hexadecimal. The secret is random, so that nothing slower is needed.
    digest: String,
    #[serde(flatten)]
    status: TokenStatus,
}

#[derive(Debug)]
struct Guesses {
    left: u32,
    since: UnixMs,
}

impl EnrolmentTokens {
    /// How long a token can be used unless the operator says otherwise.
    pub const VALIDITY: Duration = Duration::from_secs(24 * 3600);

    /// The book in the directory of the site whose authority this is.
    pub fn open(dir: &Path, authority: Fingerprint, clock: Arc<dyn Clock>) -> Self {
        Self { path: dir.join(FILE), authority, clock, guesses: Mutex::default() }
    }

    /// Makes a token for one agent: the named one, or whichever comes first.
    pub fn issue(&self, validity: Duration, agent: Option<AgentName>) -> Result<Issued, TokenRefusal> {
        let mut secret = Secret::default();
        aws_lc_rs::rand::fill(&mut secret).map_err(|_| {
            TokenRefusal::Book(self.disk("draw a secret for", io::Error::other("no randomness")))
        })?;
        let digest = hex(&sha256(&secret));
        let now = self.clock.now();
        let validity = u64::try_from(validity.as_millis()).unwrap_or(u64::MAX);
        let status = TokenStatus {
            id: digest[..8].to_owned(),
            agent,
            created_at: now,
            expires_at: UnixMs(now.0.saturating_add(validity)),
            used_at: None,
            used_by: None,
        };
        self.change(|book| {
            book.tokens.retain(|entry| now.0 < entry.status.expires_at.0.saturating_add(REMEMBERED_MS));
            if book.tokens.len() >= ACTIVE_MAX {
                return Err(TokenRefusal::BookFull);
            }
            book.tokens.push(Entry { digest, status: status.clone() });
            Ok(())
        })?;
        Ok(Issued { token: EnrolmentToken { authority: self.authority, secret }, status })
    }

    /// Spends a token. Once this returns, it can't be used again, whatever happens.
    pub(super) fn redeem(
        &self,
        secret: &Secret,
        agent: &AgentName,
        from: IpAddr,
    ) -> Result<TokenStatus, TokenRefusal> {
        let now = self.clock.now();
        self.admit_guess(from, now)?;
        let digest = hex(&sha256(secret));
        let redeemed = self.change(|book| {
            let entry = find(book, &digest).ok_or(TokenRefusal::Unknown)?;
            let status = &mut entry.status;
            if status.used_at.is_some() {
                return Err(TokenRefusal::Used);
            }
            if status.expires_at <= now {
                return Err(TokenRefusal::Expired);
            }
            if let Some(named) = status.agent.as_ref().filter(|named| *named != agent) {
                return Err(TokenRefusal::OtherName(named.clone()));
            }
            status.used_at = Some(now);
            status.used_by = Some(agent.clone());
            Ok(status.clone())
        })?;
        self.guesses.lock().unwrap_or_else(PoisonError::into_inner).remove(&from);
        Ok(redeemed)
    }

    /// Every token that is remembered, oldest first.
    pub fn list(&self) -> Result<Vec<TokenStatus>, TokenRefusal> {
        Ok(self.read()?.tokens.into_iter().map(|entry| entry.status).collect())
    }

    /// Each address may be wrong a few times a minute; while more addresses guess than are remembered, others wait.
    fn admit_guess(&self, from: IpAddr, now: UnixMs) -> Result<(), TokenRefusal> {
        let mut guesses = self.guesses.lock().unwrap_or_else(PoisonError::into_inner);
        guesses.retain(|_, guess| now.0.saturating_sub(guess.since.0) < GUESS_WINDOW_MS);
        if guesses.len() >= ADDRESSES_MAX && !guesses.contains_key(&from) {
            return Err(TokenRefusal::TooMany);
        }
        let guess = guesses.entry(from).or_insert(Guesses { left: GUESSES_MAX, since: now });
        guess.left = guess.left.checked_sub(1).ok_or(TokenRefusal::TooMany)?;
        Ok(())
    }

    /// Reads the book, lets `edit` change it, and writes it back if that went well; under a lock that other processes honour.
    fn change<T>(&self, edit: impl FnOnce(&mut Book) -> Result<T, TokenRefusal>) -> Result<T, TokenRefusal> {
        let lock = self.path.with_extension("lock");
        let file = File::options().create(true).append(true).open(&lock);
        let file = file.map_err(|source| self.disk("lock", source))?;
        let _held = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| self.disk("lock", io::Error::from(errno)))?;
        let mut book = self.read()?;
        let made = edit(&mut book)?;
        let text = serde_json::to_vec_pretty(&book)
            .map_err(|error| self.disk("write", io::Error::new(io::ErrorKind::InvalidData, error)))?;
        write_private(&self.path, &text)?;
        Ok(made)
    }

    fn read(&self) -> Result<Book, PkiError> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Book::default()),
            Err(source) => return Err(self.disk("read", source)),
        };
        serde_json::from_slice(&text)
            .map_err(|error| PkiError::Damaged { path: self.path.clone(), why: error.to_string() })
    }

    fn disk(&self, step: &'static str, source: io::Error) -> PkiError {
        PkiError::Disk { path: self.path.clone(), step, source }
    }
}

/// Compares with every digest, each in constant time, so that nothing can be learnt from how long it took.
fn find<'a>(book: &'a mut Book, digest: &str) -> Option<&'a mut Entry> {
    let mut found = None;
    for entry in &mut book.tokens {
        if aws_lc_rs::constant_time::verify_slices_are_equal(entry.digest.as_bytes(), digest.as_bytes())
            .is_ok()
        {
            found = Some(entry);
        }
    }
    found
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const FILE: &str = "enrolment-tokens.json";
/// Tokens in the book at the most.
const ACTIVE_MAX: usize = 1000;
/// Used and expired tokens are listed for a week after they expired.
const REMEMBERED_MS: u64 = 7 * 24 * 3600 * 1000;
const GUESSES_MAX: u32 = 5;
const GUESS_WINDOW_MS: u64 = 60_000;
const ADDRESSES_MAX: usize = 1024;
