//! A site's identity: its authority, which signs agents' certificates, and the certificate it shows them.
//! Owns `ca.pem`, `ca.key`, `site.pem`, `site.key`. Called by the site controller's `init` and start, and by `enrol`.

use super::{
    PkiError,
    certificate::{Facts, Fingerprint, template},
    files::{self, damaged, make_dir, read_certificates, read_key, write_private, write_public},
    name::{self, AgentName},
};
use crate::{clock::Clock, units::UnixMs};
use aws_lc_rs::hmac;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

/// How long an agent's certificate is valid unless the operator says otherwise.
pub const AGENT_VALIDITY: Duration = days(825);

/// A site's authority and certificate, loaded and found consistent.
pub struct SiteIdentity {
    dir: PathBuf,
    authority: CertificateDer<'static>,
    authority_key: KeyPair,
    authority_facts: Facts,
    own: CertificateDer<'static>,
    own_key: PrivatePkcs8KeyDer<'static>,
    own_facts: Facts,
}

impl SiteIdentity {
    /// Makes an authority and a certificate for `addresses` (names and IPs under which agents reach the site).
    /// Refuses a directory that already holds an authority.
    pub fn create(
        dir: &Path,
        site_name: &str,
        addresses: &[String],
        clock: &dyn Clock,
    ) -> Result<Self, PkiError> {
        name::check(site_name)?;
        let names = alternative_names(addresses)?;
        make_dir(dir)?;
        if [CA_PEM, CA_KEY].iter().any(|file| dir.join(file).exists()) {
            return Err(PkiError::Exists { dir: dir.to_owned() });
        }
        let key = KeyPair::generate().map_err(crypto("making the authority's key"))?;
        let params = authority_params(site_name, clock)?;
        let authority = params.self_signed(&key).map_err(crypto("signing the authority"))?;
        let issuer = Issuer::from_params(&params, &key);
        let (chain, own_key) = issue_own(site_name, names, &issuer, authority.der(), clock)?;
        // The authority's certificate comes last: with it, the directory counts as made.
        write_private(&dir.join(CA_KEY), key.serialize_pem().as_bytes())?;
        write_own(dir, &chain, &own_key)?;
        write_public(&dir.join(CA_PEM), authority.pem().as_bytes())?;
        Self::load(dir)
    }

    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let authority = first_certificate(&dir.join(CA_PEM))?;
        let authority_facts = facts(&dir.join(CA_PEM), &authority)?;
        let authority_key = key_pair(&dir.join(CA_KEY), &authority_facts)?;
        let own = first_certificate(&dir.join(SITE_PEM))?;
        let own_facts = facts(&dir.join(SITE_PEM), &own)?;
        key_pair(&dir.join(SITE_KEY), &own_facts)?;
        let own_key = read_key(&dir.join(SITE_KEY), REMEDY)?;
        Ok(Self { dir: dir.to_owned(), authority, authority_key, authority_facts, own, own_key, own_facts })
    }

    /// A new certificate of the site under the same authority: for other addresses, or before the old one expires.
    pub fn reissue(&self, addresses: &[String], clock: &dyn Clock) -> Result<Self, PkiError> {
        let names = alternative_names(addresses)?;
        let (chain, key) = issue_own(self.name(), names, &self.issuer()?, &self.authority, clock)?;
        write_own(&self.dir, &chain, &key)?;
        Self::load(&self.dir)
    }

    /// A secret of this site's for one purpose, the same after each start.
    pub(in crate::transport) fn derived(&self, purpose: &[u8]) -> [u8; 32] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, self.own_key.secret_pkcs8_der());
        let mut secret = [0; 32];
        secret.copy_from_slice(hmac::sign(&key, purpose).as_ref());
        secret
    }

    pub fn name(&self) -> &str {
        &self.own_facts.common_name
    }
    /// The authority's fingerprint, by which agents recognise the site.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.authority)
    }
    /// The fingerprint of the site's own certificate; another after each renewal.
    pub fn own_fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.own)
    }
    /// Names and addresses under which agents may reach the site.
    pub fn addresses(&self) -> &[String] {
        &self.own_facts.names
    }
    /// When the site's own certificate expires.
    pub fn expires(&self) -> UnixMs {
        self.own_facts.expires
    }
    pub fn authority_expires(&self) -> UnixMs {
        self.authority_facts.expires
    }

    /// Signs an agent's request. Of the request only the key counts; who the agent is, is the caller's word.
    pub(in crate::transport) fn issue_agent(
        &self,
        name: &AgentName,
        request: &[u8],
        validity: Duration,
        clock: &dyn Clock,
    ) -> Result<CertificateDer<'static>, PkiError> {
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
            .map_err(|_| PkiError::BadRequest("it can't be read or is not signed by its own key"))?;
        if rcgen::PublicKeyData::algorithm(&request.public_key) != &PKCS_ECDSA_P256_SHA256 {
            return Err(PkiError::BadRequest("its key is not of the kind ECDSA P-256"));
        }
        let mut params = template(name.as_str(), clock.now(), validity)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let signed = params.signed_by(&request.public_key, &self.issuer()?);
        Ok(signed.map_err(crypto("signing an agent's certificate"))?.der().clone())
    }

    pub(in crate::transport) fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }
    /// What the site shows in a handshake. The authority goes along, so that an enrolling agent can pin it.
    pub(in crate::transport) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.own.clone(), self.authority.clone()]
    }
    pub(in crate::transport) fn key(&self) -> PrivatePkcs8KeyDer<'static> {
        self.own_key.clone_key()
    }

    fn issuer(&self) -> Result<Issuer<'static, &KeyPair>, PkiError> {
        Issuer::from_ca_cert_der(&self.authority, &self.authority_key)
            .map_err(crypto("reading the authority"))
    }
}

impl fmt::Debug for SiteIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SiteIdentity({}, {})", self.name(), self.fingerprint())
    }
}

fn authority_params(site_name: &str, clock: &dyn Clock) -> Result<CertificateParams, PkiError> {
    let mut params = template(&format!("Lifeboat CA of {site_name}"), clock.now(), AUTHORITY_VALIDITY)?;
    // It signs leaves only, so that no agent's certificate can ever sign another.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn issue_own(
    site_name: &str,
    names: Vec<SanType>,
    issuer: &Issuer<'_, &KeyPair>,
    authority: &CertificateDer<'_>,
    clock: &dyn Clock,
) -> Result<(String, KeyPair), PkiError> {
    let key = KeyPair::generate().map_err(crypto("making the site's key"))?;
    let mut params = template(site_name, clock.now(), SITE_VALIDITY)?;
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let own = params.signed_by(&key, issuer).map_err(crypto("signing the site's certificate"))?;
    debug_assert_ne!(own.der(), authority);
    Ok((own.pem(), key))
}

/// The key goes first: a crash in between leaves a pair that does not match, which `load` refuses and `reissue` mends.
fn write_own(dir: &Path, chain: &str, key: &KeyPair) -> Result<(), PkiError> {
    write_private(&dir.join(SITE_KEY), key.serialize_pem().as_bytes())?;
    write_public(&dir.join(SITE_PEM), chain.as_bytes())
}

fn alternative_names(addresses: &[String]) -> Result<Vec<SanType>, PkiError> {
    if addresses.is_empty() {
        return Err(PkiError::BadName {
            given: String::new(),
            why: "is no address; give at least one name or IP under which agents reach this site",
        });
    }
    let one = |given: &String| match given.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() => Err(PkiError::BadName {
            given: given.clone(),
            why: "is no address that agents can reach; give the site's own",
        }),
        Ok(ip) => Ok(SanType::IpAddress(ip)),
        Err(_) => {
            let refuse = || PkiError::BadName {
                given: given.escape_default().take(80).collect(),
                why: "is neither a host name nor an IP address",
            };
            rustls::pki_types::DnsName::try_from(given.as_str()).map_err(|_| refuse())?;
            given.as_str().try_into().map(SanType::DnsName).map_err(|_| refuse())
        }
    };
    addresses.iter().map(one).collect()
}

fn first_certificate(path: &Path) -> Result<CertificateDer<'static>, PkiError> {
    read_certificates(path, REMEDY)?.into_iter().next().ok_or_else(|| damaged(path, "holds no certificate"))
}

fn facts(path: &Path, certificate: &CertificateDer<'_>) -> Result<Facts, PkiError> {
    Facts::read(certificate).ok_or_else(|| damaged(path, "holds a certificate that can't be read"))
}

/// The key at `path`, which must be the one that the certificate is for.
fn key_pair(path: &Path, facts: &Facts) -> Result<KeyPair, PkiError> {
    let key = files::read_key(path, REMEDY)?;
    let key = KeyPair::try_from(&key).map_err(|_| damaged(path, "holds a key of an unknown kind"))?;
    if rcgen::PublicKeyData::subject_public_key_info(&key) != facts.public_key {
        return Err(damaged(path, "does not belong to the certificate beside it"));
    }
    Ok(key)
}

fn crypto(step: &'static str) -> impl FnOnce(rcgen::Error) -> PkiError {
    move |source| PkiError::Crypto { step, source }
}

const fn days(days: u64) -> Duration {
    Duration::from_secs(days * 86400)
}

const AUTHORITY_VALIDITY: Duration = days(3652);
const SITE_VALIDITY: Duration = days(825);
const CA_PEM: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const SITE_PEM: &str = "site.pem";
const SITE_KEY: &str = "site.key";
const REMEDY: &str = "run `lifeboat-site-controller init` first";
