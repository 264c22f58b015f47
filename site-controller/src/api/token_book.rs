//! The tokens of the API, as the site knows them. Owns `api-tokens.json` in `data_dir`.
//! Promises: only digests are stored; a token is on disk before it is shown; one that was revoked or has expired opens
//! nothing from then on; what a comparison takes tells nothing. A book that can't be read is an error, not an empty book.
//! Called by the [`super::gate`] and by the requests about tokens.

use super::types::{TokenCreated, TokenRequest, TokenRow};
use lifeboat::{chunk::digest::Digest, clock::Clock, durable, units::UnixMs};
use rand::{TryRngCore, rngs::OsRng};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

pub struct TokenBook {
    path: PathBuf,
    clock: Arc<dyn Clock>,
    book: Mutex<Book>,
}

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("a token's name has 1 to 63 of a-z, 0-9, `-`, `_` and `.`")]
    BadName,
    #[error("there is a token `{0}` already; revoke it, or take another name")]
    NameTaken(String),
    #[error("there is no token `{0}`")]
    Unknown(String),
    #[error("there are {TOKENS_MAX} tokens already; revoke some")]
    TooMany,
    #[error("{path}: {step} failed", path = path.display())]
    Disk {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not what this release writes; move it away, and make tokens anew", path = path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Book {
    tokens: Vec<Entry>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Entry {
    /// Of the whole token. It is random, so that nothing slower is needed.
    digest: Digest,
    #[serde(flatten)]
    row: TokenRow,
}

impl TokenBook {
    pub fn open(data_dir: &Path, clock: Arc<dyn Clock>) -> Result<Self, TokenError> {
        let path = data_dir.join(FILE);
        let book = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|source| TokenError::Malformed { path: path.clone(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Book::default(),
            Err(source) => return Err(TokenError::Disk { path, step: "read", source }),
        };
        Ok(Self { path, clock, book: Mutex::new(book) })
    }

    /// Makes a token. Waits for a disk.
    pub fn create(&self, request: TokenRequest, by: &str) -> Result<TokenCreated, TokenError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
        if !(1..=63).contains(&request.name.len()) || !request.name.bytes().all(plain) {
            return Err(TokenError::BadName);
        }
        let mut secret = [0_u8; 32];
        OsRng.try_fill_bytes(&mut secret).map_err(|error| TokenError::Disk {
            path: self.path.clone(),
            step: "drawing a secret",
            source: io::Error::other(error),
        })?;
        let token = format!("{PREFIX}{}", Digest::from_bytes(secret));
        let digest = Digest::of(token.as_bytes());
        let now = self.clock.now();
        let row = TokenRow {
            name: request.name,
            id: digest.to_string()[..ID_LEN].to_owned(),
            role: request.role,
            created_at: now,
            created_by: by.to_owned(),
            expires_at: request.valid_ms.map(|valid| UnixMs(now.0.saturating_add(valid))),
        };
        self.change(|book| {
            if book.tokens.iter().any(|entry| entry.row.name == row.name) {
                return Err(TokenError::NameTaken(row.name.clone()));
            }
            if book.tokens.len() >= TOKENS_MAX {
                return Err(TokenError::TooMany);
            }
            book.tokens.push(Entry { digest, row: row.clone() });
            Ok(())
        })?;
        Ok(TokenCreated { token, row })
    }

    /// Takes a token away, by its name or id. Waits for a disk.
    pub fn revoke(&self, given: &str) -> Result<TokenRow, TokenError> {
        self.change(|book| {
            let meant = |entry: &Entry| entry.row.name == given || entry.row.id == given;
            let at = book.tokens.iter().position(meant);
            let at = at.ok_or_else(|| TokenError::Unknown(given.escape_debug().take(80).collect()))?;
            Ok(book.tokens.remove(at).row)
        })
    }

    pub fn list(&self) -> Vec<TokenRow> {
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        book.tokens.iter().map(|entry| entry.row.clone()).collect()
    }

    /// Whose token it is, if it is good for anything. Compares with each, so that nothing is learnt from the time it took.
    pub fn holder(&self, token: &str) -> Option<TokenRow> {
        let digest = Digest::of(token.as_bytes());
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = None;
        for entry in &book.tokens {
            if entry.digest.is(&digest) {
                found = Some(&entry.row);
            }
        }
        let now = self.clock.now();
        found.filter(|row| row.expires_at.is_none_or(|at| now < at)).cloned()
    }

    /// What holds from then on is what is on disk.
    fn change<T>(&self, edit: impl FnOnce(&mut Book) -> Result<T, TokenError>) -> Result<T, TokenError> {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = book.clone();
        let made = edit(&mut changed)?;
        let failed = |source| TokenError::Disk { path: self.path.clone(), step: "write", source };
        let text = serde_json::to_vec_pretty(&changed).map_err(|error| failed(error.into()))?;
        durable::replace(&self.path, &text, 0o600).map_err(failed)?;
        *book = changed;
        Ok(made)
    }
}

const FILE: &str = "api-tokens.json";
const PREFIX: &str = "lba1-";
const ID_LEN: usize = 12;
const TOKENS_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::role::Role;
    use lifeboat::clock::{ManualClock, SystemClock};
    use std::os::unix::fs::PermissionsExt;

    fn request(name: &str, valid_ms: Option<u64>) -> TokenRequest {
        TokenRequest { name: name.into(), role: Role::Operator, valid_ms }
    }

    #[test]
    fn a_token_opens_until_it_expires_or_is_revoked_and_is_stored_as_a_digest_only() {
        let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::default());
        let open = || TokenBook::open(dir.path(), Arc::new(clock.clone())).unwrap();
        let book = open();
        let (kept, short) = (
            book.create(request("kept", None), "x").unwrap(),
            book.create(request("short", Some(10)), "x").unwrap(),
        );
        let file = dir.path().join(FILE);
        let text = fs::read_to_string(&file).unwrap();
        for made in [&kept, &short] {
            assert!(!text.contains(&made.token[PREFIX.len()..]), "{text}");
            assert_eq!(open().holder(&made.token), Some(made.row.clone()), "a restart knows it");
        }
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        clock.advance(10);
        assert_eq!(book.holder(&short.token), None, "expired");
        assert_eq!(book.holder(&kept.token).unwrap().name, "kept");
        assert_eq!(book.revoke(&kept.row.id).unwrap(), kept.row);
        assert_eq!((book.holder(&kept.token), open().holder(&kept.token)), (None, None), "revoked");
        for wrong in ["", "lba1-", &kept.row.id, &kept.token[..kept.token.len() - 1]] {
            assert_eq!(book.holder(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn names_are_plain_and_given_once_and_a_damaged_book_is_no_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let book = TokenBook::open(dir.path(), Arc::new(SystemClock)).unwrap();
        for bad in ["", "A", "a b", "ü", &"a".repeat(64)] {
            assert!(matches!(book.create(request(bad, None), "x"), Err(TokenError::BadName)), "{bad}");
        }
        book.create(request("a", None), "x").unwrap();
        assert!(matches!(book.create(request("a", None), "x"), Err(TokenError::NameTaken(_))));
        assert!(matches!(book.revoke("b"), Err(TokenError::Unknown(_))));
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(TokenBook::open(dir.path(), Arc::new(SystemClock)).is_err());
    }
}
