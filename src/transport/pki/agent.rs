//! An agent's identity at one site: its key, the certificate the site gave it, and the authority it trusts.
//! Owns `ca.pem`, `agent.pem`, `agent.key`. Called by the agent's start and by `enrol`.

use super::{
    AgentName, PkiError,
    certificate::{Facts, Fingerprint},
    files::{damaged, make_dir, read_certificates, read_key, write_private, write_public},
};
use crate::units::UnixMs;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use std::{fmt, path::Path};

/// An agent's key and certificate, loaded and found consistent.
pub struct AgentIdentity {
    name: AgentName,
    authority: CertificateDer<'static>,
    own: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
    expires: UnixMs,
}

impl AgentIdentity {
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let own = one_certificate(&dir.join(AGENT_PEM))?;
        let authority = one_certificate(&dir.join(CA_PEM))?;
        let key = read_key(&dir.join(AGENT_KEY), REMEDY)?;
        Self::join(dir, authority, own, key)
    }

    pub fn name(&self) -> &AgentName {
        &self.name
    }
    /// When the certificate expires; the agent must be enrolled again before.
    pub fn expires(&self) -> UnixMs {
        self.expires
    }
    /// Fingerprint of the authority that this agent trusts.
    pub fn site_fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.authority)
    }
    /// Fingerprint of the agent's own certificate, as the site logs it.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.own)
    }

    pub(in crate::transport) fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }
    pub(in crate::transport) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.own.clone()]
    }
    pub(in crate::transport) fn key(&self) -> PrivatePkcs8KeyDer<'static> {
        self.key.clone_key()
    }

    fn join(
        dir: &Path,
        authority: CertificateDer<'static>,
        own: CertificateDer<'static>,
        key: PrivatePkcs8KeyDer<'static>,
    ) -> Result<Self, PkiError> {
        let pem = dir.join(AGENT_PEM);
        let facts =
            Facts::read(&own).ok_or_else(|| damaged(&pem, "holds a certificate that can't be read"))?;
        let pair = KeyPair::try_from(&key)
            .map_err(|_| damaged(&dir.join(AGENT_KEY), "holds a key of an unknown kind"))?;
        if rcgen::PublicKeyData::subject_public_key_info(&pair) != facts.public_key {
            return Err(damaged(&dir.join(AGENT_KEY), "does not belong to the certificate beside it"));
        }
        let name = facts.common_name.parse()?;
        Ok(Self { name, authority, own, key, expires: facts.expires })
    }
}

impl fmt::Debug for AgentIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgentIdentity({}, {})", self.name, self.fingerprint())
    }
}

/// A key made here, for which a certificate is still to be had.
pub(in crate::transport) struct AgentKey {
    name: AgentName,
    key: KeyPair,
}

impl AgentKey {
    pub fn generate(name: &AgentName) -> Result<Self, PkiError> {
        let key = KeyPair::generate()
            .map_err(|source| PkiError::Crypto { step: "making the agent's key", source })?;
        Ok(Self { name: name.clone(), key })
    }

    /// The request for a certificate, as DER.
    pub fn request(&self) -> Result<Vec<u8>, PkiError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, self.name.as_str());
        let request = params
            .serialize_request(&self.key)
            .map_err(|source| PkiError::Crypto { step: "writing the certificate request", source })?;
        Ok(request.der().to_vec())
    }

    /// Stores the key with the certificate that the site made for it. The certificate comes last: with it, the agent
    /// counts as enrolled.
    pub fn store(
        self,
        dir: &Path,
        authority: CertificateDer<'static>,
        own: CertificateDer<'static>,
    ) -> Result<AgentIdentity, PkiError> {
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        let identity = AgentIdentity::join(dir, authority, own, key)?;
        if identity.name != self.name {
            return Err(PkiError::BadRequest("the site made the certificate out to another name"));
        }
        make_dir(dir)?;
        write_private(&dir.join(AGENT_KEY), self.key.serialize_pem().as_bytes())?;
        write_public(&dir.join(CA_PEM), pem(&identity.authority).as_bytes())?;
        write_public(&dir.join(AGENT_PEM), pem(&identity.own).as_bytes())?;
        AgentIdentity::load(dir)
    }
}

fn one_certificate(path: &Path) -> Result<CertificateDer<'static>, PkiError> {
    let found = read_certificates(path, REMEDY)?;
    found.into_iter().next().ok_or_else(|| damaged(path, "holds no certificate"))
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", certificate.to_vec()))
}

const CA_PEM: &str = "ca.pem";
const AGENT_PEM: &str = "agent.pem";
const AGENT_KEY: &str = "agent.key";
const REMEDY: &str = "enrol this agent first: `lifeboat-agent enrol --site HOST:PORT TOKEN`";
