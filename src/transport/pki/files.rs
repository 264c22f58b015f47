//! Certificate files on disk. Promises: a file is replaced whole or not at all, survives a power cut once written, and
//! a private one is never readable by others, not even while it is being written.

use super::PkiError;
use crate::durable;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use std::{
    fs::{DirBuilder, File},
    io::{self, Read},
    os::unix::fs::DirBuilderExt,
    path::Path,
};

/// Replaces a file that anybody may read.
pub fn write_public(path: &Path, bytes: &[u8]) -> Result<(), PkiError> {
    write(path, bytes, 0o644)
}

/// Replaces a file that only its owner may read.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), PkiError> {
    write(path, bytes, 0o600)
}

/// Makes the directory, closed to others, where it does not exist.
pub fn make_dir(dir: &Path) -> Result<(), PkiError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| disk(dir, "create", source))
}

/// The certificates of a PEM file, at least one.
pub fn read_certificates(
    path: &Path,
    remedy: &'static str,
) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let bytes = read(path, remedy)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(damaged(path, "holds no certificate")),
        Err(_) => Err(damaged(path, "is not a PEM file")),
    }
}

/// The private key of a PEM file that somebody else made: of any kind that there is.
pub fn read_any_key(path: &Path, remedy: &'static str) -> Result<PrivateKeyDer<'static>, PkiError> {
    let bytes = read(path, remedy)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| damaged(path, "holds no private key"))
}

/// The private key of a PEM file, as PKCS#8.
pub fn read_key(path: &Path, remedy: &'static str) -> Result<PrivatePkcs8KeyDer<'static>, PkiError> {
    let bytes = read(path, remedy)?;
    PrivatePkcs8KeyDer::from_pem_slice(&bytes).map_err(|_| damaged(path, "holds no PKCS#8 private key"))
}

pub fn damaged(path: &Path, why: impl Into<String>) -> PkiError {
    PkiError::Damaged { path: path.to_owned(), why: why.into() }
}

fn read(path: &Path, remedy: &'static str) -> Result<Vec<u8>, PkiError> {
    let file = File::open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => PkiError::Missing { path: path.to_owned(), remedy },
        _ => disk(path, "open", source),
    })?;
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes).map_err(|source| disk(path, "read", source))?;
    Ok(bytes)
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), PkiError> {
    durable::replace(path, bytes, mode).map_err(|source| disk(path, "replace", source))
}

fn disk(path: &Path, step: &'static str, source: io::Error) -> PkiError {
    PkiError::Disk { path: path.to_owned(), step, source }
}

/// No certificate file is larger; anything beyond is not read.
const FILE_MAX: u64 = 1 << 20;
