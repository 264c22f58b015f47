//! Making certificates and reading what they say. Promises: serial numbers are random; reading never panics.

use super::PkiError;
use crate::units::UnixMs;
use rcgen::{CertificateParams, DistinguishedName, DnType, SerialNumber};
use rustls::pki_types::CertificateDer;
use std::{
    fmt,
    str::FromStr,
    time::{Duration, UNIX_EPOCH},
};
use x509_parser::{extensions::GeneralName, prelude::FromDer, prelude::X509Certificate};

/// SHA-256 of a certificate's DER, by which people and enrolment tokens name it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    pub const LEN: usize = 32;

    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
    pub(in crate::transport) fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha256(certificate))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Fingerprint {
    type Err = PkiError;
    fn from_str(given: &str) -> Result<Self, PkiError> {
        let refuse = || PkiError::BadName {
            given: given.chars().take(80).collect(),
            why: "is no fingerprint; it looks like `sha256:` and 64 hexadecimal digits",
        };
        let hex = given.trim().strip_prefix("sha256:").ok_or_else(refuse)?.as_bytes();
        let mut bytes = [0; 32];
        if hex.len() != 64 || !hex.iter().all(u8::is_ascii_hexdigit) {
            return Err(refuse());
        }
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| refuse())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| refuse())?;
        }
        Ok(Self(bytes))
    }
}

/// What a certificate says of itself.
#[derive(Clone, Debug)]
pub(in crate::transport) struct Facts {
    pub common_name: String,
    pub expires: UnixMs,
    /// Names and addresses it is valid for.
    pub names: Vec<String>,
    /// Its public key, as DER.
    pub public_key: Vec<u8>,
}

impl Facts {
    /// `None` if it can't be read.
    pub fn read(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let common_name = parsed.subject().iter_common_name().next()?.as_str().ok()?.to_owned();
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
        let names = match parsed.subject_alternative_name() {
            Ok(Some(names)) => names.value.general_names.iter().filter_map(address).collect(),
            Ok(None) | Err(_) => Vec::new(),
        };
        let public_key = parsed.public_key().raw.to_vec();
        Some(Self { common_name, expires: UnixMs(seconds.saturating_mul(1000)), names, public_key })
    }
}

/// Parameters that every certificate of ours starts from.
pub(super) fn template(
    common_name: &str,
    now: UnixMs,
    validity: Duration,
) -> Result<CertificateParams, PkiError> {
    let at = UNIX_EPOCH + Duration::from_millis(now.0);
    let mut serial = [0; 16];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| PkiError::Crypto {
        step: "drawing a serial number",
        source: rcgen::Error::RingUnspecified,
    })?;
    // A serial number is positive and its first byte must not be zero.
    serial[0] = serial[0] & 0x7f | 0x40;
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = (at - CLOCK_SKEW).into();
    params.not_after = (at + validity).into();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

pub(in crate::transport) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

fn address(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
            v4.or_else(|_| {
                <[u8; 16]>::try_from(*bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string())
            })
            .ok()
        }
        _ => None,
    }
}

/// Certificates are valid from a little earlier, for hosts whose clock runs behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
